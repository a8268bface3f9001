"""GPUs at work: several share out images, whatever memory they have; copies; steps that are captured and replayed.

No GPU is needed: CuPy is faked where copies are looked at, and kernels run in a simulator (tests/lockstep.py).
"""

import ctypes
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from explaining import plans_of, taken
from faking import CUDARuntimeError, raises
from fastdtd.kernels import cuda as kernels
from fastdtd.kernels.cuda import memory, steps
from graphs import images

from fastdtd import devices
from fastdtd import executor as executor_module
from fastdtd import graph as g
from fastdtd.devices import Devices
from fastdtd.errors import DeviceError, InputError
from fastdtd.explainer import Explainer
from fastdtd.model import Model, Preprocessing
from fastdtd.plan import OutOfMemoryError


def tiny():
    rng = np.random.default_rng(0)
    layers = (g.Conv2d("conv", ("input", ), rng.standard_normal((4, 2, 3, 3)), np.array([0.1, -0.1, 50, 0]),
                       padding=(1, 1, 1, 1)), g.ReLU("relu", ("conv", )), g.GlobalAveragePool("scores", ("relu", )))
    return Model(g.Graph(layers, (2, 4, 4), (-1.0, 1.0)), Preprocessing(None))


@pytest.fixture
def gpus(simulator, monkeypatch):
    """Says how many there are; gives a list, to which each piece of work is added that begins: (number of the GPU,
    thread).
    """
    begun, on_device = [], kernels.on_device

    def noting(number):
        begun.append((number, threading.current_thread()))
        return on_device(number)

    def make(count):
        monkeypatch.setattr(devices, "find",
                            lambda device, precision: Devices(kernels, tuple(range(count)), precision or "fp32"))
        monkeypatch.setattr(kernels, "on_device", noting)
        return begun

    return make


def assert_same(found, wanted):
    for name in ("relevance", "output", "target", "explained", "absorbed"):
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name), name)


@pytest.mark.slow
def test_gpus_share_out_images(gpus, monkeypatch):
    model = tiny()
    batch = images(model.graph, 7, seed=0)
    wanted = Explainer(model, device="cuda", precision="fp32")(batch, 1)
    begun = gpus(2)
    made = Explainer(model, device="cuda")
    assert (made.batch, made.at_once) == (kernels.MAX_IMAGES, 2 * kernels.MAX_PLANS * kernels.MAX_IMAGES)
    begun.clear()
    assert_same(made(batch, 1), wanted)
    assert {number for number, _ in begun} == {0, 1}
    assert threading.main_thread() in {thread for _, thread in begun}  # the last part is the caller's
    assert len({thread for _, thread in begun}) == 2
    made._executor.batch = 2
    assert_same(made(batch, 1), wanted)
    np.testing.assert_array_equal(made.predict(batch), wanted.output)
    assert_same(made(batch[:1], 1), Explainer(model, device="cuda")(batch[:1], 1))
    np.testing.assert_allclose(wanted.relevance,
                               Explainer(model)(batch, 1).relevance, atol=1e-5 * np.abs(wanted.relevance).max())
    assert made(batch[:0]).relevance.shape == (0, 2, 4, 4)


def test_a_gpu_that_is_busy_is_passed_over(gpus):
    model = tiny()
    begun = gpus(2)
    made = Explainer(model, device="cuda")
    with taken(plans_of(made), 1, 1):
        begun.clear()
        made(images(model.graph, 1, seed=0))
    assert {number for number, _ in begun} == {1}


def test_the_gpu_with_least_memory_says_how_many_images(gpus, monkeypatch):
    model = tiny()
    gpus(2)
    one = Explainer(model, device="cuda")._executor.devices[0][1].nbytes(1, 1)
    monkeypatch.setattr(kernels, "memory_budget", lambda number: (20, 7)[number] * one)
    made = Explainer(model, device="cuda")
    assert made.batch == 3
    assert [plans.limit for _, plans in made._executor.devices] == [20 * one, 7 * one]
    monkeypatch.setattr(kernels, "memory_budget", lambda number: (20, 0.5)[number] * one)
    for memory_limit in (None, "1GiB"):
        with pytest.raises(InputError,
                           match=r"one image takes .*, and a GPU has less; use a network with a smaller input"):
            Explainer(model, device="cuda", memory=memory_limit)
    with pytest.raises(InputError, match=r"and memory is limited to 100; raise the limit, or use a network"):
        Explainer(model, device="cuda", memory=100)


class Limited:
    """`empty` of memory with space for plans of so many images."""

    def __init__(self, monkeypatch, model, images):
        schedule = plans_of(Explainer(model, device="cuda", precision="fp32")).schedule(images, 1)
        self.most, self.empty, self.refused = schedule.workspace_elements, kernels.empty, 0
        monkeypatch.setattr(kernels, "empty", self)

    def __call__(self, elements):
        if elements > self.most:
            self.refused += 1
            raise MemoryError
        return self.empty(elements)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_less_memory_than_there_seemed_halves_the_batch(gpus, monkeypatch, count):
    model = tiny()
    batch = images(model.graph, 11, seed=1)
    gpus(count)
    made = Explainer(model, device="cuda")
    wanted = made(batch)
    for _, plans in made._executor.devices:
        plans.drop_idle()
    limited = Limited(monkeypatch, model, 2)
    assert_same(made(batch), wanted)
    assert limited.refused
    assert made.batch in (1, 2)
    limited.refused = 0
    assert_same(made(batch), wanted)
    assert not limited.refused
    limited.most = 0
    for _, plans in made._executor.devices:
        plans.drop_idle()
    with pytest.raises(OutOfMemoryError, match=r"the network needs .* for 1 images at a time, more than there is"):
        made(batch)
    assert all(plans.used_bytes == plans.used_workers == 0 for _, plans in made._executor.devices)
    limited.most = 1 << 30
    assert_same(made(batch), wanted)


@pytest.mark.slow
def test_one_image_may_take_the_memory_of_idle_plans(gpus, monkeypatch):
    model = tiny()
    gpus(1)
    made = Explainer(model, device="cuda")
    batch = images(model.graph, 9, seed=1)
    wanted = made(batch)
    assert plans_of(made).idle
    empty = kernels.empty
    monkeypatch.setattr(kernels, "empty", lambda elements: raises(MemoryError())()
                        if plans_of(made).idle else empty(elements))
    most = made.batch
    plans_of(made).idle = [plan for plan in plans_of(made).idle if plan.schedule.batch != 1]
    np.testing.assert_array_equal(made(batch[:1]).relevance, wanted.relevance[:1])
    assert made.batch == most
    made(batch)
    np.testing.assert_array_equal(made(batch[:1]).at("input"), wanted.at("input")[:1])


@pytest.mark.slow
def test_less_memory_than_there_seemed_when_it_is_made(gpus, monkeypatch):
    model = tiny()
    gpus(1)
    wanted = Explainer(model)(images(model.graph, 70, seed=1), 1).relevance
    Limited(monkeypatch, model, 5)
    made = Explainer(model, device="cuda")
    found = made(images(model.graph, 70, seed=1), 1).relevance  # halved until it fits
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())
    assert made.batch <= 5
    monkeypatch.setattr(kernels, "constant", raises(MemoryError("none")))
    with pytest.raises(InputError, match=r"there is no memory for the network's weights \(none\)"):
        Explainer(model, device="cuda")


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_memory_that_is_short_in_the_middle_of_the_work(gpus, monkeypatch, count):
    """As when a copy needs some, or CUDA for itself."""
    model = tiny()
    batch = images(model.graph, 10, seed=1)
    gpus(count)
    made = Explainer(model, device="cuda")
    wanted = made(batch)
    write = kernels.write

    def limited(to, numbers):
        if len(numbers) > 3:
            raise MemoryError
        write(to, numbers)

    monkeypatch.setattr(kernels, "write", limited)
    assert_same(made(batch), wanted)
    assert made.batch <= 3
    monkeypatch.setattr(kernels, "write", raises(MemoryError("none at all")))
    with pytest.raises(InputError, match=r"no memory left for it .none at all.; fewer images at a time"):
        made(batch)
    monkeypatch.setattr(kernels, "write", write)
    assert_same(made(batch), wanted)


def test_an_explainer_of_a_forked_process_says_so(gpus, monkeypatch):
    model = tiny()
    gpus(1)
    made = Explainer(model, device="cuda")
    e = made(images(model.graph, 1, seed=0))
    monkeypatch.setattr(executor_module.os, "getpid", lambda: -1)
    for use in (lambda: made(images(model.graph, 1, seed=0)), lambda: e.at("conv")):
        with pytest.raises(DeviceError, match=r"made before the process was forked.*'spawn'"):
            use()


# ---- Copies, and memory that they read and write ---------------------------------------------------------------------


class Stream:
    """Does what it is given when somebody waits for it, as late as a GPU may."""

    def __init__(self):
        self.todo = []

    def synchronize(self):
        for task in self.todo:
            task()
        self.todo.clear()


class DeviceArray(np.ndarray):
    """An array of CuPy, whose copies are a stream's."""

    def set(self, host, stream):
        assert self.flags.c_contiguous
        to, at = self.view(np.ndarray), host.ctypes.data
        stream.todo.append(lambda: ctypes.memmove(to.ctypes.data, at, to.nbytes))

    def get(self, stream, out, blocking):
        assert not blocking
        source, at = self.view(np.ndarray), out.ctypes.data
        stream.todo.append(lambda: ctypes.memmove(at, source.ctypes.data, source.nbytes))

    def __setitem__(self, key, value):
        to, value = self.view(np.ndarray), value.view(np.ndarray)
        current.todo.append(lambda: to.__setitem__(key, value))


current = Stream()


def page_locked(size):
    """Memory that goes back to a pool, where somebody else writes, as soon as nobody refers to it."""
    memory_of_all.append(bytearray(b"\xff" * size))
    kind = type("PageLocked", (ctypes.c_char * size,), {"__del__": lambda own: ctypes.memset(own, 0xFF, size)})
    return kind.from_buffer(memory_of_all[-1])


memory_of_all = []


@pytest.fixture
def copies(monkeypatch):
    """kernels/cuda/memory.py with a fake CuPy, whose copies are asynchronous."""
    fake = SimpleNamespace(
        ndarray=DeviceArray, empty=lambda shape, dtype: np.full(shape, np.nan, dtype).view(DeviceArray),
        ascontiguousarray=lambda array: np.ascontiguousarray(array).view(DeviceArray),
        asnumpy=lambda array: current.synchronize() or array.view(np.ndarray).copy(),
        cuda=SimpleNamespace(get_current_stream=lambda: current, alloc_pinned_memory=page_locked))
    monkeypatch.setattr(memory, "cupy", fake)
    monkeypatch.setattr(memory, "_of_thread", threading.local())
    current.todo.clear()
    return fake


@pytest.mark.parametrize("sizes", [(5, 3), (3, 5), (3, 50), (40, 1)])
def test_staged_memory_is_not_overwritten_nor_given_up_while_a_copy_is_under_way(copies, sizes):
    """As a plan is used: write, read, write, read."""
    for scale in (1, 2, 3):
        inputs, outputs = (np.arange(size, dtype=np.float32).reshape(1, size) + scale for size in sizes)
        to, of = copies.empty(inputs.shape, np.float32), copies.empty(outputs.shape, np.float32)
        for source in (inputs, 2 * inputs):
            given = source.copy()
            memory.write(to, given)
            given[:] = -1  # the caller's again
            current.todo.append(
                lambda of=of, outputs=outputs: of.view(np.ndarray).__setitem__(slice(None), outputs))  # what kernels do
            result = np.empty(outputs.shape, np.float32)
            memory.read(result, of)
            np.testing.assert_array_equal(result, outputs)
            np.testing.assert_array_equal(to.view(np.ndarray), source)


def test_copies_of_channels_between_others_and_of_a_device_and_of_float64(copies):
    whole = np.zeros((2, 3, 4), np.float32)
    part = whole.view(DeviceArray)[:, 1:2]
    numbers = np.arange(8, dtype=np.float32).reshape(2, 1, 4)
    memory.write(part, numbers)
    current.synchronize()
    np.testing.assert_array_equal(whole, np.pad(numbers, ((0, 0), (1, 1), (0, 0))))
    memory.write(part, (2 * numbers).view(DeviceArray))
    current.synchronize()
    result = copies.empty(numbers.shape, np.float32)
    memory.read(result, part)
    current.synchronize()
    np.testing.assert_array_equal(result.view(np.ndarray), 2 * numbers)
    ledger, read = np.arange(3.0), np.empty(3)
    memory.read(read, ledger.view(DeviceArray))
    np.testing.assert_array_equal(read, ledger)


# ---- Graphs ----------------------------------------------------------------------------------------------------------


class Capturing:
    """A stream of CuPy that captures."""

    ptr = 7

    def __init__(self, events):
        self.events = events

    def begin_capture(self, mode):
        self.events.append(f"begin {mode}")

    def end_capture(self):
        self.events.append("end")
        return SimpleNamespace(launch=lambda: self.events.append("graph"))


@pytest.fixture
def events(monkeypatch):
    """What a fake CuPy, and launchers that say so, are asked for."""
    asked = []
    cuda = SimpleNamespace(get_current_stream=lambda: Capturing(asked),
                           runtime=SimpleNamespace(streamCaptureModeThreadLocal="local"))
    monkeypatch.setattr(steps, "cupy", SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(steps, "cuda", SimpleNamespace(external_stream=lambda ptr: f"stream {ptr}"))
    monkeypatch.setattr(steps, "use_stream", asked.append)
    return asked


def run_thrice(asked, wanted=(0, 2)):
    """What each of three runs asks for, of calls that are numbered."""
    calls = [
        SimpleNamespace(code=lambda name, first, last: asked.append(f"{name} {first}-{last}"), slots=[name], first=0,
                        last=3) for name in "abc"
    ]
    table, seen = steps.table(calls), []
    for _ in range(3):
        assert steps.run_steps(table, np.array(wanted), None, None, 1)
        seen.append(asked.copy())
        asked.clear()
    return seen


def test_calls_are_launched_then_captured_then_replayed(events):
    walk = ["stream 7", "a 0-3", "c 0-3"]
    assert run_thrice(events) == [walk, ["begin local", *walk, "end", "graph"], ["graph"]]
    assert steps.config.CUDA_LOW_OCCUPANCY_WARNINGS == 1


def test_what_cannot_be_captured_is_launched_one_by_one(events, monkeypatch):
    monkeypatch.setattr(Capturing, "end_capture", raises(CUDARuntimeError("cudaErrorStreamCaptureInvalidated: why")))
    walk = ["stream 7", "a 0-3", "c 0-3"]
    with pytest.warns(RuntimeWarning,
                      match="kernels are launched one by one.*cudaErrorStreamCaptureInvalidated: why") as told:
        assert run_thrice(events) == [walk, ["begin local", *walk, *walk], walk]
    assert len(told) == 1


def test_a_first_walk_that_fails_is_not_taken_for_one(events):
    call = SimpleNamespace(code=raises(ZeroDivisionError), slots=[], first=0, last=1)
    table = steps.table([call])
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            steps.run_steps(table, np.array([0]), None, None, 1)
    assert events == ["stream 7"] * 2


@pytest.mark.parametrize("error", [MemoryError("of the pool"), RuntimeError("cudaErrorMemoryAllocation: out of memory"),
                                   ValueError("[CUDA_ERROR_OUT_OF_MEMORY] in launch")])
def test_every_lack_of_memory_is_a_memory_error(device_contexts, error):
    with pytest.raises(MemoryError) as told, memory.on_device(1):
        raise error
    assert str(told.value) == str(error)
    with pytest.raises(ValueError, match="another"), memory.on_device(1):
        raise ValueError("another")
    assert device_contexts == [*ENTERED, *LEFT] * 2


ENTERED, LEFT = ["CuPy in", "Numba in", "stream in"], ["waits", "stream out", "Numba out", "CuPy out"]


@pytest.fixture
def device_contexts(monkeypatch):
    """What is entered and left, of fakes."""
    seen = []

    class Context:
        def __init__(self, name):
            self.name = name

        def __enter__(self):
            seen.append(f"{self.name} in")

        def __exit__(self, *_):
            seen.append(f"{self.name} out")

        def synchronize(self):
            seen.append("waits")

    fake = SimpleNamespace(
        ndarray=DeviceArray,
        cuda=SimpleNamespace(Device=lambda number: Context("CuPy"), Stream=lambda non_blocking: Context("stream"),
                             get_current_stream=lambda: Context(""),
                             runtime=SimpleNamespace(memGetInfo=lambda: (60, 100))),
        get_default_memory_pool=lambda: SimpleNamespace(free_bytes=lambda: 40))
    monkeypatch.setattr(memory, "cupy", fake)
    monkeypatch.setattr(memory, "cuda", SimpleNamespace(gpus={1: Context("Numba")}))
    monkeypatch.setattr(memory, "_of_thread", threading.local())
    monkeypatch.setattr(DeviceArray, "device", Context("device"), raising=False)
    return seen


def test_work_on_a_device_is_done_when_it_is_left(device_contexts):
    with memory.on_device(1):
        assert device_contexts == ENTERED
    with memory.on_device(1):
        pass
    assert device_contexts == [*ENTERED, *LEFT] * 2
    assert len(memory._of_thread.streams) == 1


def test_what_callers_began_is_done_before_other_streams_write(device_contexts):
    with memory.on_device_of(np.zeros(1)), memory.on_device_of([1]):
        pass
    assert device_contexts == []
    with memory.on_device_of(np.zeros(1).view(DeviceArray)):
        pass
    assert device_contexts == ["device in", "waits", "device out"]


def test_what_the_pool_keeps_counts_as_free(device_contexts):
    assert memory.memory_budget(1) == 80
