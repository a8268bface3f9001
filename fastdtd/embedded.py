"""Libraries that ``fastdtd embed`` wrote, called from Python with NumPy alone.

This file needs nothing else of fastdtd: copy it to a machine that has NumPy. There::

    import embedded
    network = embedded.load("libsqueezenet.so")
    e = network.explain(network.preprocess(pixels))  # uint8 (H, W, 3), red first
    print(network.class_name(e.target), e.relevance.shape)
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING or __package__ == "fastdtd":
    from fastdtd.errors import FastDTDError as _Error
else:  # by itself
    _Error = Exception

__all__ = ["EmbeddedError", "Explained", "Network", "load"]

_ABI_VERSION = 1
_ALIGNMENT = 64
_ADDRESS = ctypes.c_void_p
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "abi_version": (ctypes.c_uint, []),
    "workspace_bytes": (ctypes.c_size_t, []),
    "weights_bytes": (ctypes.c_size_t, []),
    "input_shape": (None, [_ADDRESS]),
    "classes": (ctypes.c_int, []),
    "class_name": (ctypes.c_char_p, [ctypes.c_int]),
    "error": (ctypes.c_char_p, [ctypes.c_int]),
    "check_weights": (ctypes.c_int, [_ADDRESS, ctypes.c_size_t]),
    "check_workspace": (ctypes.c_int, [_ADDRESS, ctypes.c_size_t]),
    "predict": (ctypes.c_int, [_ADDRESS] * 4),
    "explain": (ctypes.c_int, [_ADDRESS, _ADDRESS, ctypes.c_int, _ADDRESS, _ADDRESS, _ADDRESS, _ADDRESS]),
    "preprocess_rgb": (ctypes.c_int, [_ADDRESS, ctypes.c_int, ctypes.c_int, ctypes.c_int, _ADDRESS]),
    "compact_bytes": (ctypes.c_size_t, []),
    "unpack": (ctypes.c_int, [_ADDRESS, ctypes.c_size_t, _ADDRESS, _ADDRESS]),
}
_OF_COMPACT_WEIGHTS = ("compact_bytes", "unpack")


class EmbeddedError(_Error):
    """A library, its weights, an input or a target that cannot be used; the message says what is required.

    Attributes
    ----------
    code : int
        What the library returned; 0 where it was not called.
    """

    def __init__(self, message: str, code: int = 0) -> None:
        super().__init__(message)
        self.code = code


class Explained(NamedTuple):
    """One explanation: relevance and what layers absorbed sum to the target's score; but where that is not positive and
    the rules decompose positive scores alone, to zero.

    Attributes
    ----------
    target : int
    output : (K,) float32
        Class scores, before any softmax.
    relevance : (C, H, W) float32
    absorbed : float
    """

    target: int
    output: npt.NDArray[np.float32]
    relevance: npt.NDArray[np.float32]
    absorbed: float


class Network:
    """A network in a library. `load` makes one; any number of threads may call it.

    Attributes
    ----------
    input_shape : (C, H, W)
    outputs : int
    workspace_bytes : int
        That each thread which calls it keeps.
    """

    def __init__(self, path: Path, name: str, weights: Path | None) -> None:
        self._functions = _bound(path, name)
        shape = (ctypes.c_int * 3)()
        self._functions["input_shape"](shape)
        self.input_shape: tuple[int, int, int] = (shape[0], shape[1], shape[2])
        self.outputs = int(self._functions["classes"]())
        self.workspace_bytes = int(self._functions["workspace_bytes"]())
        self._weights, self._mapped = None, None
        self._own = threading.local()
        if wanted := int(self._functions["weights_bytes"]()):
            compact = int(self._functions["compact_bytes"]()) if "compact_bytes" in self._functions else 0
            self._mapped = _mapped(weights or path.with_name(f"{name}.weights"), compact or wanted)
            if compact:
                memory = _aligned(wanted)
                self._check("unpack", self._mapped.ctypes.data, compact, memory.ctypes.data, self._workspace())
                self._mapped = memory
            self._weights = self._mapped.ctypes.data
            self._check("check_weights", self._weights, wanted)

    def preprocess(self, pixels: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """The network's input from a picture: uint8 (H, W, 3), red first, of any size."""
        given = np.asarray(pixels)
        if given.dtype != np.uint8 or given.ndim != 3 or given.shape[2] != 3 or not given.size:
            raise EmbeddedError(
                f"the pixels have type {given.dtype} and shape {given.shape}; required: uint8 (H, W, 3)")
        given = np.ascontiguousarray(given)
        result = np.empty(self.input_shape, np.float32)
        self._check("preprocess_rgb", given.ctypes.data, *given.shape[:2], given.strides[0], result.ctypes.data)
        return result

    def predict(self, image: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Class scores (K,) of an input (C, H, W)."""
        given, output = self._checked(image), np.empty(self.outputs, np.float32)
        self._check("predict", self._weights, given.ctypes.data, output.ctypes.data, self._workspace())
        return output

    def explain(self, image: npt.ArrayLike, target: int | None = None) -> Explained:
        """The relevance of an input (C, H, W) for an output; None: the one with the highest score."""
        given, output = self._checked(image), np.empty(self.outputs, np.float32)
        relevance, absorbed = np.empty(self.input_shape, np.float32), np.empty(1, np.float32)
        if target is not None and not 0 <= int(target) < self.outputs:
            raise EmbeddedError(f"target is {target!r}; required: a whole number from 0 to {self.outputs - 1}, or None")
        self._check("explain", self._weights, given.ctypes.data, -1 if target is None else int(target),
                    output.ctypes.data, relevance.ctypes.data, absorbed.ctypes.data, self._workspace())
        chosen = int(output.argmax()) if target is None else int(target)
        return Explained(chosen, output, relevance, float(absorbed[0]))

    def class_name(self, index: int) -> str:
        """Of an output; its number where the network has no names."""
        found = self._functions["class_name"](index)
        return found.decode() if found else str(index)

    def _checked(self, image: npt.ArrayLike) -> npt.NDArray[np.float32]:
        given = np.asarray(image)
        if given.shape != self.input_shape or given.dtype.kind not in "fiu":
            raise EmbeddedError(f"the input has type {given.dtype} and shape {given.shape}; required: numbers "
                                f"{self.input_shape}, as preprocess makes them")
        return np.ascontiguousarray(given, np.float32)

    def _workspace(self) -> int:
        """Of the calling thread, aligned."""
        if not hasattr(self._own, "memory"):
            self._own.memory = _aligned(self.workspace_bytes)
        return int(self._own.memory.ctypes.data)

    def _check(self, function: str, *arguments: Any) -> None:
        if code := self._functions[function](*arguments):
            raise EmbeddedError(self._functions["error"](code).decode(), code)


def load(path: str | os.PathLike[str], weights: str | os.PathLike[str] | None = None, name: str | None = None
         ) -> Network:
    """A network from a shared library.

    Parameters
    ----------
    path : path
        The library's. Its code is run: load none that you would not run.
    weights : path or None
        None: inside of the library, or the file NAME.weights beside it, which is mapped into memory.
    name : str or None
        What its functions' names begin with; None: as the file's name says, libNAME.so.

    Returns
    -------
    Network

    Raises
    ------
    EmbeddedError
        A file that is no such library, or weights that are not this network's.
    """
    file = Path(path).absolute()
    stem = file.name.split(".")[0]
    return Network(file, name or stem.removeprefix("lib"), None if weights is None else Path(weights))


def _bound(path: Path, name: str) -> dict[str, Any]:
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise EmbeddedError(f"{str(path)!r} cannot be loaded ({error}); required: a shared library that fastdtd embed "
                            "wrote for this processor") from None
    functions = {}
    for function, (result, arguments) in _FUNCTIONS.items():
        try:
            bound = getattr(library, f"{name}_{function}")
        except AttributeError:
            if function in _OF_COMPACT_WEIGHTS:
                continue
            raise EmbeddedError(f"{str(path)!r} has no function {name}_{function}; required: a library that fastdtd "
                                "embed wrote, with name= as it was written with") from None
        bound.restype, bound.argtypes = result, arguments
        functions[function] = bound
    if (version := functions["abi_version"]()) != _ABI_VERSION:
        raise EmbeddedError(f"{str(path)!r} has version {version} of the interface; required: {_ABI_VERSION}")
    return functions


def _aligned(size: int) -> npt.NDArray[np.uint8]:
    memory = np.zeros(size + _ALIGNMENT, np.uint8)  # unpacking leaves gaps between arrays: as in a file, they are zero
    begin = -memory.ctypes.data % _ALIGNMENT
    return memory[begin:begin + size]


def _mapped(path: Path, wanted: int) -> npt.NDArray[np.uint8]:
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != wanted:
                raise EmbeddedError(f"{str(path)!r} has {size} bytes; required: the network's weights, {wanted} bytes")
            return np.frombuffer(mmap.mmap(file.fileno(), wanted, access=mmap.ACCESS_READ), np.uint8)
    except (OSError, ValueError) as error:
        raise EmbeddedError(f"the weights {str(path)!r} cannot be read ({error}); required: the file that was written "
                            "beside the library, or weights=") from None
