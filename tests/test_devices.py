"""GPUs as users ask for them: what is told when one cannot be used, and that several share out images, whatever memory
they have.

No GPU is needed: CuPy is faked where errors and copies are looked at, and kernels run in a simulator
(tests/lockstep.py).
"""

import importlib.util
import os
import subprocess
import sys
import threading
from types import ModuleType, SimpleNamespace

import numba
import numpy as np
import pytest
from fakes import CUDARuntimeError, raises
from fastdtd.kernels import cuda as kernels
from graphs import images

from fastdtd import devices
from fastdtd import executor as executor_module
from fastdtd import graph as g
from fastdtd.devices import Devices
from fastdtd.errors import DeviceError, InputError
from fastdtd.explainer import Explainer
from fastdtd.model import Model, Preprocessing
from fastdtd.plan import OutOfMemoryError

# ---- What cannot be used ---------------------------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch):
    """Makes this a machine with the GPUs, and versions of CUDA, that a test says."""
    def make(chips=((9, 0),), driver=13020, needed=13020, count=None, works=True):
        runtime = SimpleNamespace(
            driverGetVersion=lambda: driver, runtimeGetVersion=lambda: needed, CUDARuntimeError=CUDARuntimeError,
            getDeviceCount=count or (lambda: len(chips)),
            getDeviceProperties=lambda i: {"major": chips[i][0], "minor": chips[i][1]})
        if callable(driver):
            runtime.driverGetVersion = driver
        cupy = ModuleType("cupy")
        cupy.cuda = SimpleNamespace(runtime=runtime)
        monkeypatch.setitem(sys.modules, "cupy", cupy)
        if works:
            monkeypatch.setattr(devices, "_try", lambda number: None)

    monkeypatch.setattr(numba.config, "ENABLE_CUDASIM", 0)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace())
    devices._try.cache_clear()
    yield make
    monkeypatch.undo()
    devices._try.cache_clear()


MACHINES = [({"driver": 0}, "cuda", None, "no NVIDIA driver was found; install the one"),
            ({"driver": raises(RuntimeError("libcudart.so.13 is missing\nand more"))}, "cuda", None,
             r"CuPy cannot use CUDA: libcudart.so.13 is missing\. Is the NVIDIA driver installed"),
            ({"driver": 12040}, "cuda", None,
             r"the NVIDIA driver is made for CUDA 12\.4 and CuPy for 13\.2; update the driver, or install what "
             r'fits it: pip install cupy-cuda12x "numba-cuda\[cu12\]"'),
            ({"count": raises(CUDARuntimeError("cudaErrorNoDevice: no CUDA-capable device is detected"))}, "cuda", None,
             "CUDA shows no GPU: cudaErrorNoDevice: no CUDA-capable device is detected; is CUDA_VISIBLE_DEVICES set"),
            ({"count": raises(CUDARuntimeError("cudaErrorInitializationError: initialization error"))}, "cuda",
             None, "was this process forked"),
            ({"chips": ()}, "cuda", None, "CUDA shows no GPU; is CUDA_VISIBLE_DEVICES set"),
            ({}, "cuda:1", None, "device 'cuda:1' was asked for, and CUDA shows cuda:0; is CUDA_VISIBLE_DEVICES set"),
            ({"chips": [(9, 0)] * 3}, "cuda:3", None, "CUDA shows cuda:0, cuda:1, cuda:2; is"),
            ({"chips": [(9, 0), (6, 1)]}, "cuda", None,
             r"a GPU of 'cuda' has compute capability 6\.1; required by CUDA 13: 7\.5 or newer\. Name a "
             r"newer GPU, as in 'cuda:1', or use device='cpu'"),
            ({"chips": [(7, 0)]}, "cuda:0", None, "in place of the packages for CUDA 13 install cupy-cuda12x"),
            ({"chips": [(6, 1)], "needed": 12060}, "cuda", None, r"required by CUDA 12: 7\.0 or newer"),
            ({"chips": [(9, 0), (7, 5)]}, "cuda", "tf32",
             r"precision 'tf32' needs compute capability 8\.0, and a GPU of 'cuda' has 7\.5; use "
             "precision='fp32'"), ({"chips": [(7, 5)]}, "cuda", "3xtf32", "use precision='fp32'"), ]


@pytest.mark.parametrize(("options", "device", "precision", "message"), MACHINES)
def test_gpus_that_cannot_be_used(machine, options, device, precision, message):
    machine(**options)
    with pytest.raises(DeviceError, match=message):
        devices.find(device, precision)


@pytest.mark.parametrize(("options", "device", "precision"), [(o, d, p) for o, d, p, _ in MACHINES if d == "cuda"])
def test_auto_is_the_processor_where_gpus_cannot_be_used(machine, options, device, precision):
    machine(**options)
    if precision is None:
        found = devices.find("auto", None)
        assert (found.kernels.__name__, found.numbers, found.precision) == ("fastdtd.kernels.cpu", (0,), "")
    else:
        with pytest.raises(
                InputError,
                match=rf"precision '{precision}' is for GPUs; required on processors: 'fp32' or None; no GPU can be "
                "used: "):
            devices.find("auto", precision)


def test_gpus_that_can_be_used(machine):
    for options, device, precision, numbers, chosen in (({}, "cuda", None, (0, ), "tf32"), ({}, "auto", "fp32", (0, ),
                                                                                            "fp32"),
                                                        ({"chips": [(9, 0), (8, 0)]}, "cuda", None, (0, 1), "tf32"),
                                                        ({"chips": [(9, 0), (7, 5)]}, "cuda", None, (0, 1),
                                                         "fp32"), ({"chips": [(9, 0), (7, 5)]}, "cuda:0", "3xtf32",
                                                                   (0, ), "3xtf32"), ({"chips": [(6, 0), (8, 9)]},
                                                                                      "cuda:1", None, (1, ), "tf32"),
                                                        ({"chips": [(7, 0)], "needed": 12060,
                                                          "driver": 13000}, "auto", None, (0, ), "fp32")):
        machine(**options)
        found = devices.find(device, precision)
        assert (found.kernels, found.numbers, found.precision) == (kernels, numbers, chosen)


def test_packages_that_are_missing(machine, monkeypatch):
    machine()
    why = "\n====\nFailed to import CuPy.\n\nOriginal error:\n  ImportError: libnvrtc.so.13: cannot open\n====\n"
    cupy = ModuleType("cupy")
    for module, message in ((None, "CuPy, which cannot be imported"),
                            (why, r"\(ImportError: libnvrtc\.so\.13: cannot open\): pip install")):
        monkeypatch.setitem(sys.modules, "cupy", module and cupy)
        if module:
            monkeypatch.setattr("builtins.__import__", lambda name, *rest, found=__import__: (
                found(name, *rest) if name != "cupy" else raises(ImportError(why))()))
        with pytest.raises(DeviceError, match=message):
            devices.find("cuda", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DeviceError, match=r'needs numba-cuda, which is not installed: pip install "fastdtd\[cuda\]"'):
        devices.find("cuda", None)


def test_a_compiler_that_does_not_work(machine, monkeypatch):
    machine(works=False)
    from numba import cuda

    monkeypatch.setattr(cuda, "gpus", SimpleNamespace(__getitem__=None), raising=False)
    with pytest.raises(
            DeviceError,
            match=r'numba-cuda cannot use cuda:0: .*; pip install "fastdtd\[cuda\]" installs versions that fit'):
        devices.find("cuda", None)


@pytest.mark.parametrize("device", [
    "tpu", "gpu", "CUDA", "cuda:", "cuda:-1", "cuda:1234", "cuda:0,1", "cuda:\N{SUPERSCRIPT TWO}", "", None, 0
])
def test_unknown_devices(device):
    with pytest.raises(InputError, match="is unknown; required: 'cpu', 'cuda'"):
        devices.find(device, None)


def test_precisions_that_do_not_fit():
    for device in ("cpu", "cuda", "auto"):
        with pytest.raises(InputError,
                           match="precision 'fp16' is unknown; required: one of fp32, tf32, 3xtf32, or None"):
            devices.find(device, "fp16")
    with pytest.raises(InputError, match=r"precision 'tf32' is for GPUs; required on processors: 'fp32' or None$"):
        devices.find("cpu", "tf32")
    assert devices.find("cpu", "fp32").precision == ""


def test_the_simulator_is_never_chosen_by_itself_and_says_that_it_is_one(simulator, caplog):
    devices._say_simulated.cache_clear()
    assert devices.find("auto", None).kernels.__name__ == "fastdtd.kernels.cpu"
    assert not caplog.records
    for _ in range(2):
        assert devices.find("cuda", "3xtf32").kernels is kernels
    assert ["NUMBA_ENABLE_CUDASIM is set" in record.message for record in caplog.records] == [True]


@pytest.mark.slow
@pytest.mark.skipif(os.path.exists("/dev/nvidiactl"), reason="a GPU is here")
def test_without_a_gpu():
    """In a process of its own, where nothing is simulated or faked."""
    pytest.importorskip("numba_cuda")
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_ENABLE_CUDASIM"}
    code = ("import sys, fastdtd\nmodel = fastdtd.load('squeezenet1_1')\n"
            "print(fastdtd.Explainer(model, device='auto').precision)\n"
            "try:\n fastdtd.Explainer(model, device='cuda')\nexcept fastdtd.DeviceError as error:\n print(error)\n"
            "from fastdtd.cli import main\nsys.exit(main(['explain', 'squeezenet1_1', '--device', 'cuda:0']))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment,
                          timeout=100)
    assert done.returncode == 1
    _, told = done.stdout.splitlines()
    assert ("no NVIDIA driver was found; install the one for your GPU" in told
            or "needs CuPy, which cannot be imported" in told)
    assert done.stderr.splitlines()[-1] == f"fastdtd: {told}"


# ---- Several of them, and little memory ------------------------------------------------------------------------------


def tiny():
    rng = np.random.default_rng(0)
    layers = (g.Conv2d("conv", ("input", ), rng.standard_normal((4, 2, 3, 3)), np.array([0.1, -0.1, 50, 0]),
                       padding=(1, 1, 1, 1)), g.ReLU("relu", ("conv", )), g.GlobalAveragePool("scores", ("relu", )))
    return Model(g.Graph(layers, (2, 4, 4), (-1.0, 1.0)), Preprocessing(None))


def plans_of(made):
    """Of the first device."""
    return made._executor.devices[0][1]


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
    assert sorted({number for number, thread in begun if thread is not threading.main_thread()}) == [0, 1]
    made._executor.batch = 2
    assert_same(made(batch, 1), wanted)
    assert_same(made(batch[:1], 1), Explainer(model, device="cuda")(batch[:1], 1))
    np.testing.assert_allclose(wanted.relevance,
                               Explainer(model)(batch, 1).relevance, atol=1e-5 * np.abs(wanted.relevance).max())
    assert made(batch[:0]).relevance.shape == (0, 2, 4, 4)


def test_a_gpu_that_is_busy_is_passed_over(gpus):
    model = tiny()
    begun = gpus(2)
    made = Explainer(model, device="cuda")
    plan = made._executor.devices[0][1].take(1, 1)
    begun.clear()
    made(images(model.graph, 1, seed=0))
    assert {number for number, _ in begun} == {1}
    made._executor.devices[0][1].give_back(plan)


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
    with pytest.raises(MemoryError, match="none at all"):
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
