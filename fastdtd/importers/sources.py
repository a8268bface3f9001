"""What a network is converted from: files, by their names, or a PyTorch module; and which reader takes them apart."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdtd.errors import ConversionError
from fastdtd.files import as_path, open_to_read

if TYPE_CHECKING:
    from fastdtd.importers.builder import Parsed

MAX_WEIGHT_BYTES = 2**31  # what protobuf can hold in one message
MAX_STATE_BYTES = 2**34
MAX_TEXT_BYTES = 2**24
MAX_PROTOTXT_BYTES = 2**21  # protobuf reads a megabyte a second; networks of hundreds of layers have a third of one
KERAS_SUFFIXES = (".keras", ".h5", ".hdf5")

FilePath = str | os.PathLike[str]


@dataclass(frozen=True)
class TorchSource:
    """A PyTorch module, and what it is called by: `module:callable`, and the file of its weights."""

    module: Any
    name: str
    weights: Path | None = None
    digest: str = ""

    def __str__(self) -> str:
        return self.name


def opened(source: FilePath, weights: FilePath | None = None) -> FilePath | TorchSource:
    """`source` as it is where it is a file; the module where it is written ``module:callable``.

    Parameters
    ----------
    source : path or str
        ``torchvision.models:resnet18``, say, is imported (from the working directory, too) and called. That is your own
        code, by its name: nothing that a file says is run.
    weights : path, optional
        A state dict, as ``torch.save(module.state_dict(), path)`` writes it. It is loaded without running what is
        pickled in it.

    Raises
    ------
    ConversionError
        No PyTorch, nothing of that name, code that fails, no module, or a state dict that is none or does not fit.
    """
    for path in (source, *([] if weights is None else [weights])):
        as_path(path, ConversionError, "a file, or MODULE:CALLABLE")
    names = r"[^\W\d]\w*(\.[^\W\d]\w*)*"
    if not isinstance(source, str) or not re.fullmatch(f"{names}:{names}", source) or Path(source).exists():
        return source
    pytorch = pytorch_reader(f"{source}: ")
    try:
        module, content = pytorch.made_by(source), b""
        if weights is None:
            return TorchSource(module, source)
        content = read(Path(weights), MAX_STATE_BYTES)
        pytorch.load_weights(module, content)
    except ConversionError as error:
        raise ConversionError(f"{source}: {error}") from error
    return TorchSource(module, source, Path(weights), hashlib.sha256(content).hexdigest())


def pytorch_reader(where: str = "") -> Any:
    try:
        from fastdtd.importers import pytorch
    except ModuleNotFoundError as error:
        raise ConversionError(f"{where}{error}; `pip install torch` installs what reading PyTorch's modules takes"
                              ) from None
    return pytorch


def parse_module(source: TorchSource, size: tuple[int, int] | None, color: str | None, limit: int | None = None,
                 output: int | str | None = None) -> tuple[Parsed, dict[str, str]]:
    import torch

    from fastdtd.importers import pytorch

    if size is None:
        raise ConversionError("a PyTorch module does not say the size of its input; give size=(height, width)")
    channels = {"gray": 1, "rgb": 3, "bgr": 3}.get(color or "") or pytorch.input_channels(source.module)
    kind = next((weight.dtype for weight in source.module.parameters()), torch.float32)
    network = pytorch.parse(source.module, torch.zeros(1, channels, *size, dtype=kind), limit, output)
    if source.weights is None:
        return network, {"source": source.name}
    return network, {"source": f"{source.name}, {source.weights.name}", "sha256": source.digest}


def parse_files(files: Sequence[Path], size: tuple[int, int] | None, limit: int | None = None,
                output: int | str | None = None) -> tuple[Parsed, list[bytes]]:
    """The network in `files`, and the files' contents. limit: bytes, see `Budget`; output: which of several."""
    kind = files[0].suffix.lower()
    if kind == ".onnx":
        try:
            from fastdtd.importers import onnx
        except ModuleNotFoundError as error:
            raise ConversionError(f"{error}; `pip install 'fastdtd[onnx]'` installs what reading .onnx takes") from None
        contents = [read(files[0], MAX_WEIGHT_BYTES), *(read(file, MAX_STATE_BYTES) for file in files[1:])]
        others = {file.name: content for file, content in zip(files[1:], contents[1:], strict=True)}
        return onnx.parse(contents[0], size, others, limit, output), contents
    if kind in KERAS_SUFFIXES:
        if len(files) > 1:
            raise ConversionError(f"an {kind} file of Keras's holds its weights; required: no second file")
        from fastdtd.importers import keras

        contents = [read(files[0], MAX_WEIGHT_BYTES)]
        return keras.parse(contents[0], size, limit, output), contents
    if kind == ".prototxt":
        if len(files) == 1:
            raise ConversionError("a .prototxt holds no weights; required: the .caffemodel that goes with it, as "
                                  "second file")
        try:
            from fastdtd.importers import caffe
        except ModuleNotFoundError as error:
            raise ConversionError(f"{error}; `pip install 'fastdtd[caffe]'` installs what reading Caffe's files takes"
                                  ) from None
        contents = [read(files[0], MAX_PROTOTXT_BYTES), read(files[1], MAX_WEIGHT_BYTES)]
        return caffe.parse(contents[0], contents[1], size, limit, output), contents
    if kind in (".pt2", ".pt", ".pth"):
        raise ConversionError(f"loading a {kind} file would run code that is pickled in it; required: MODULE:CALLABLE, "
                              "Python code that makes the module, and as second file its state dict")
    raise ConversionError("none of the kinds that can be converted (.onnx, .keras, .h5 or .hdf5 of Keras, .prototxt), "
                          "by its name, nor MODULE:CALLABLE"
                          + ("; give the .prototxt first, then the .caffemodel" if kind == ".caffemodel" else ""))


def read(file: Path, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes."""
    try:
        with open_to_read(file) as content:
            size = os.fstat(content.fileno()).st_size
            if size > limit:
                raise ConversionError(f"{str(file)!r} has {size} bytes; at most {limit} are accepted")
            return content.read(size)
    except FileNotFoundError:
        raise ConversionError(f"there is no file {str(file)!r}") from None
    except OSError as error:
        raise ConversionError(f"{str(file)!r} cannot be read: {error.strerror}") from None
    except ValueError as error:  # a NUL in its name
        raise ConversionError(f"{str(file)!r} cannot be read: {error}") from None
