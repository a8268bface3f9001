"""What `device` names: kernels, and the GPUs that run them. What is missing is named, with what to install."""

from __future__ import annotations

import functools
import importlib.util
import logging
import re
from dataclasses import dataclass

from fastdtd.errors import DeviceError, InputError, shown
from fastdtd.kernels import codes
from fastdtd.protocols import AnyDevice
from fastdtd.warmup import load_kernels

PRECISIONS = {"fp32": codes.FP32, "tf32": codes.TF32, "3xtf32": codes.TF32X3}
_OLDEST_TENSOR_CORES = (8, 0)  # that take TF32, and copy asynchronously
_INSTALL = 'pip install "fastdtd[cuda]"'
_LOG = logging.getLogger("fastdtd")


@dataclass(frozen=True)
class Devices:
    """Kernels, the numbers of the devices that run them, and the precision of products ("" without tensor cores)."""

    kernels: AnyDevice
    numbers: tuple[int, ...]
    precision: str

    @property
    def precision_code(self) -> int:
        """As kernels know it."""
        return int(PRECISIONS.get(self.precision, codes.FP32))


def find(device: str, precision: str | None) -> Devices:
    """The devices that a text names.

    Parameters
    ----------
    device : str
        "cpu"; "cuda": all GPUs that CUDA shows; "cuda:1": one of them; "auto": "cuda" where that works, else "cpu".
    precision : str or None
        On GPUs one of PRECISIONS; None: "tf32" where the chip has it, else "fp32".

    Raises
    ------
    InputError
        Another device or precision, or a precision without a GPU.
    DeviceError
        What is asked for cannot be used, and why.
    """
    if not isinstance(device, str) or not re.fullmatch(r"cpu|auto|cuda(:\d{1,3})?", device, re.ASCII):
        raise InputError(
            f"device {shown(device)} is unknown; required: 'cpu', 'cuda' (all GPUs), 'cuda:0' (one of them) or 'auto'")
    if precision is not None and (not isinstance(precision, str) or precision not in PRECISIONS):
        raise InputError(
            f"precision {shown(precision)} is unknown; required: one of {', '.join(PRECISIONS)}, or None for the "
            "fastest")
    why = ""
    if device != "cpu":
        try:
            return _gpus(device, precision)
        except DeviceError as error:
            if device != "auto":
                raise
            why = f"; no GPU can be used: {error}"
    if precision not in (None, "fp32"):
        raise InputError(f"precision {precision!r} is for GPUs; required on processors: 'fp32' or None{why}")
    return Devices(load_kernels("cpu"), (0,), "")


def _gpus(device: str, precision: str | None) -> Devices:
    if _simulated():
        if device == "auto":
            raise DeviceError(
                "NUMBA_ENABLE_CUDASIM is set, which puts Numba's simulator, for tests, in the place of GPUs")
        _say_simulated()
        chips, oldest_chip, cuda = {0: _OLDEST_TENSOR_CORES}, _OLDEST_TENSOR_CORES, ""
    else:
        chips, version = _chips()
        # Numba compiles for what its CUDA knows, which is that of CuPy.
        oldest_chip, cuda = (7, 5) if version >= 13000 else (7, 0), f"CUDA {version // 1000}"
    _, _, number = device.partition(":")
    if number and int(number) not in chips:
        raise DeviceError(f"device {device!r} was asked for, and CUDA shows {', '.join(f'cuda:{i}' for i in chips)}; "
                          "is CUDA_VISIBLE_DEVICES set?")
    numbers = (int(number),) if number else tuple(chips)
    oldest = min(chips[i] for i in numbers)
    if oldest < oldest_chip:
        for_older = 'in place of the packages for CUDA 13 install cupy-cuda12x and "numba-cuda[cu12]", '
        raise DeviceError(
            f"a GPU of {device!r} has compute capability {_dotted(oldest)}; required by {cuda}: {_dotted(oldest_chip)} "
            f"or newer. Name a newer GPU, as in 'cuda:1', {for_older if oldest >= (7, 0) else ''}or use device='cpu'")
    if oldest < _OLDEST_TENSOR_CORES and precision not in (None, "fp32"):
        raise DeviceError(
            f"precision {precision!r} needs compute capability {_dotted(_OLDEST_TENSOR_CORES)}, and a GPU of "
            f"{device!r} has {_dotted(oldest)}; use precision='fp32'")
    if not _simulated():
        for i in numbers:
            _try(i)
    return Devices(load_kernels("cuda"), numbers, precision or ("tf32" if oldest >= _OLDEST_TENSOR_CORES else "fp32"))


def _simulated() -> bool:
    """Whether Numba's simulator takes the place of GPUs, as it does in our tests."""
    from numba import config

    return bool(config.ENABLE_CUDASIM)


@functools.cache
def _say_simulated() -> None:
    _LOG.warning(
        "fastdtd: NUMBA_ENABLE_CUDASIM is set, so no GPU is used but Numba's simulator, which is for tests and very "
        "slow"
    )


def _chips() -> tuple[dict[int, tuple[int, int]], int]:
    """GPU's number -> compute capability; the version of CUDA that CuPy is made for."""
    if importlib.util.find_spec("numba_cuda") is None:
        raise DeviceError(f"device 'cuda' needs numba-cuda, which is not installed: {_INSTALL}")
    try:
        import cupy
    except ImportError as error:
        raise DeviceError(
            f"device 'cuda' needs CuPy, which cannot be imported ({_line(error, -1)}): {_INSTALL}, or the cupy-cuda12x "
            "package where the driver is older than CUDA 13") from None
    runtime = cupy.cuda.runtime
    try:
        driver, needed = runtime.driverGetVersion(), runtime.runtimeGetVersion()
    except Exception as error:  # CuPy has a kind of error for each library that may be missing
        raise DeviceError(
            f"CuPy cannot use CUDA: {_line(error)}. Is the NVIDIA driver installed? `nvidia-smi` tells") from None
    if driver == 0:
        raise DeviceError(
            "no NVIDIA driver was found; install the one for your GPU (`nvidia-smi` tells), or use device='cpu'")
    if driver // 1000 < needed // 1000:
        raise DeviceError(
            f"the NVIDIA driver is made for CUDA {_version(driver)} and CuPy for {_version(needed)}; update the "
            f"driver, or install what fits it: pip install cupy-cuda{driver // 1000}x "
            f"\"numba-cuda[cu{driver // 1000}]\"")
    try:
        count = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        if "cudaErrorInitializationError" in str(error):
            raise DeviceError(
                "CUDA cannot start here; was this process forked from one that uses it? Start processes by "
                "multiprocessing's 'spawn'") from None
        raise DeviceError(f"CUDA shows no GPU: {_line(error)}; is CUDA_VISIBLE_DEVICES set?") from None
    if count == 0:
        raise DeviceError("CUDA shows no GPU; is CUDA_VISIBLE_DEVICES set?")
    properties = [runtime.getDeviceProperties(i) for i in range(count)]
    return {i: (int(of["major"]), int(of["minor"])) for i, of in enumerate(properties)}, needed


@functools.cache
def _try(number: int) -> None:
    """Compile and run a kernel that does nothing: what is missing is told here, not in the middle of the work."""
    try:
        from numba import cuda

        with cuda.gpus[number]:
            cuda.jit(lambda: None)[128, 32]()  # of fewer blocks Numba says that they are few
            cuda.synchronize()
    except Exception as error:  # of its driver bindings, its compiler or its libraries
        raise DeviceError(
            f"numba-cuda cannot use cuda:{number}: {_line(error)}; {_INSTALL} installs versions that fit") from None


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _line(error: Exception, which: int = 0) -> str:
    """Of a message; some are many lines long.

    CuPy's, where it cannot be imported, has the reason in the last, before a rule.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" =")]
    return lines[which] if lines else type(error).__name__
