"""GPUs as users ask for them: what is told when one cannot be used.

No GPU is needed: CuPy is faked.
"""

import importlib.util
import os
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import numba
import pytest
from faking import CUDARuntimeError, raises
from fastdtd.kernels import cuda as kernels

from fastdtd import devices
from fastdtd.errors import DeviceError, InputError


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


MACHINES = [
    ({"driver": 0}, "cuda", None, "no NVIDIA driver was found; install the one"),
    ({"driver": raises(RuntimeError("libcudart.so.13 is missing\nand more"))}, "cuda", None,
     r"CuPy cannot use CUDA: libcudart.so.13 is missing\. Is the NVIDIA driver installed"),
    ({"driver": 12040}, "cuda", None,
     r"the NVIDIA driver is made for CUDA 12\.4 and CuPy for 13\.2; update the driver, or install what fits it: "
     r'pip install cupy-cuda12x "numba-cuda\[cu12\]"'),
    ({"count": raises(CUDARuntimeError("cudaErrorNoDevice: no CUDA-capable device is detected"))}, "cuda", None,
     "CUDA shows no GPU: cudaErrorNoDevice: no CUDA-capable device is detected; is CUDA_VISIBLE_DEVICES set"),
    ({"count": raises(CUDARuntimeError("cudaErrorInitializationError: initialization error"))}, "cuda", None,
     "was this process forked"),
    ({"chips": ()}, "cuda", None, "CUDA shows no GPU; is CUDA_VISIBLE_DEVICES set"),
    ({}, "cuda:1", None, "device 'cuda:1' was asked for, and CUDA shows cuda:0; is CUDA_VISIBLE_DEVICES set"),
    ({"chips": [(9, 0)] * 3}, "cuda:3", None, "CUDA shows cuda:0, cuda:1, cuda:2; is"),
    ({"chips": [(9, 0), (6, 1)]}, "cuda", None,
     r"a GPU of 'cuda' has compute capability 6\.1; required by CUDA 13: 7\.5 or newer\. Name a newer GPU, as in "
     r"'cuda:1', or use device='cpu'"),
    ({"chips": [(7, 0)]}, "cuda:0", None, "in place of the packages for CUDA 13 install cupy-cuda12x"),
    ({"chips": [(6, 1)], "needed": 12060}, "cuda", None, r"required by CUDA 12: 7\.0 or newer"),
    ({"chips": [(9, 0), (7, 5)]}, "cuda", "tf32",
     r"precision 'tf32' needs compute capability 8\.0, and a GPU of 'cuda' has 7\.5; use precision='fp32'"),
    ({"chips": [(7, 5)]}, "cuda", "3xtf32", "use precision='fp32'"),
]


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
    for options, device, precision, numbers, chosen in (
            ({}, "cuda", None, (0,), "tf32"), ({}, "auto", "fp32", (0,), "fp32"),
            ({"chips": [(9, 0), (8, 0)]}, "cuda", None, (0, 1), "tf32"),
            ({"chips": [(9, 0), (7, 5)]}, "cuda", None, (0, 1), "fp32"),
            ({"chips": [(9, 0), (7, 5)]}, "cuda:0", "3xtf32", (0,), "3xtf32"),
            ({"chips": [(6, 0), (8, 9)]}, "cuda:1", None, (1,), "tf32"),
            ({"chips": [(7, 0)], "needed": 12060, "driver": 13000}, "auto", None, (0,), "fp32")):
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
