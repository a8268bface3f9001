"""A GPU's memory and streams with a faked CuPy: copies, captured launches, contexts, and memory that runs out."""

import ctypes
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from fakes import CUDARuntimeError, raises
from fastdtd.kernels.cuda import memory, steps

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
