"""What `device` names: kernels, and the GPUs that run them. Each thing that can be missing is named, with what to install or set."""

from __future__ import annotations

import importlib.util
import os
import re
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from fastdtd.compiling import load_kernels
from fastdtd.errors import DeviceError, InputError
from fastdtd.kernels import codes

PRECISIONS = {"fp32": codes.FP32, "tf32": codes.TF32, "3xtf32": codes.TF32X3}
_OLDEST_CHIP = (7, 0)  # what current CUDA compiles for
_OLDEST_TENSOR_CORES = (8, 0)  # that take TF32, and copy asynchronously
_INSTALL = 'pip install "fastdtd[cuda]"'


@dataclass(frozen=True)
class Devices:
    """Kernels, the devices that run them, by number, and the precision of products on tensor cores ("" where there is no choice)."""

    kernels: ModuleType
    numbers: tuple[int, ...]
    precision: str


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
        raise InputError(f"device {device!r} is unknown; required: 'cpu', 'cuda' (all GPUs), 'cuda:0' (one of them) or 'auto'")
    if precision not in (None, *PRECISIONS):
        raise InputError(f"precision {precision!r} is unknown; required: one of {', '.join(PRECISIONS)}, or None for the fastest")
    if device != "cpu":
        try:
            return _gpus(device, precision)
        except DeviceError:
            if device != "auto":
                raise
    if precision not in (None, "fp32"):
        raise InputError(f"precision {precision!r} is for GPUs; required on processors: 'fp32' or None")
    return Devices(load_kernels("cpu"), (0,), "")


def _gpus(device: str, precision: str | None) -> Devices:
    simulated = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"
    chips = {0: _OLDEST_TENSOR_CORES} if simulated else _chips()
    _, _, number = device.partition(":")
    if number and int(number) not in chips:
        raise DeviceError(f"device {device!r} was asked for and CUDA shows {len(chips)} GPU{'s'[:len(chips) != 1]}, cuda:0 to "
                          f"cuda:{len(chips) - 1}; is CUDA_VISIBLE_DEVICES set?")
    numbers = (int(number),) if number else tuple(chips)
    oldest = min(chips[i] for i in numbers)
    if oldest < _OLDEST_CHIP:
        raise DeviceError(f"a GPU of {device!r} has compute capability {_dotted(oldest)}; required: {_dotted(_OLDEST_CHIP)} or newer. Use "
                          "device='cpu', or name a newer GPU, as in 'cuda:1'")
    if oldest < _OLDEST_TENSOR_CORES and precision not in (None, "fp32"):
        raise DeviceError(f"precision {precision!r} needs compute capability {_dotted(_OLDEST_TENSOR_CORES)}, and a GPU of {device!r} has "
                          f"{_dotted(oldest)}; use precision='fp32'")
    return Devices(load_kernels("cuda"), numbers, precision or ("tf32" if oldest >= _OLDEST_TENSOR_CORES else "fp32"))


def _chips() -> dict[int, tuple[int, int]]:
    """GPU's number -> compute capability."""
    if importlib.util.find_spec("numba_cuda") is None:
        raise DeviceError(f"device 'cuda' needs numba-cuda, which is not installed: {_INSTALL}")
    try:
        import cupy
    except ImportError as error:
        raise DeviceError(f"device 'cuda' needs CuPy, which cannot be imported ({error}): {_INSTALL}, or the cupy-cuda12x package where "
                          "the driver is older than CUDA 13") from None
    runtime = cupy.cuda.runtime
    try:
        driver, needed = runtime.driverGetVersion(), runtime.runtimeGetVersion()
    except Exception as error:  # CuPy has a kind of error for each library that may be missing
        raise DeviceError(f"CuPy cannot use CUDA: {_first_line(error)}. Is the NVIDIA driver installed? `nvidia-smi` tells") from None
    if driver == 0:
        raise DeviceError("no NVIDIA driver was found; install the one for your GPU (`nvidia-smi` tells), or use device='cpu'")
    if driver // 1000 < needed // 1000:
        raise DeviceError(f"the NVIDIA driver is made for CUDA {_version(driver)} and CuPy for {_version(needed)}; update the driver, or "
                          f"install what fits it: pip install cupy-cuda{driver // 1000}x \"numba-cuda[cu{driver // 1000}]\"")
    try:
        count = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        raise DeviceError(f"CUDA shows no GPU: {_first_line(error)}; is CUDA_VISIBLE_DEVICES set?") from None
    if count == 0:
        raise DeviceError("CUDA shows no GPU; is CUDA_VISIBLE_DEVICES set?")
    try:
        from numba import cuda

        cuda.current_context()
    except Exception as error:  # of its driver bindings, its compiler or its libraries
        raise DeviceError(f"numba-cuda cannot use the GPU: {_first_line(error)}; {_INSTALL} installs versions that fit") from None
    return {i: _capability(runtime, i) for i in range(count)}


def _capability(runtime: Any, number: int) -> tuple[int, int]:
    properties = runtime.getDeviceProperties(number)
    return int(properties["major"]), int(properties["minor"])


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
