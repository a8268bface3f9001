"""Foreign model files -> Model. One module for each format turns a file's bytes into layers; what they share is here."""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastdtd.errors import ConversionError, ModelError
from fastdtd.graph import Graph, Layer, Shape
from fastdtd.model import Model, Preprocessing

MAX_WEIGHT_BYTES = 2**31  # what protobuf can hold in one message
MAX_STATE_BYTES = 2**34
MAX_TEXT_BYTES = 2**24
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
        ``torchvision.models:resnet18``, say, is imported (from the working directory, too) and called. That is your own code, by its name:
        nothing that a file says is run.
    weights : path, optional
        A state dict, as ``torch.save(module.state_dict(), path)`` writes it. It is loaded without running what is pickled in it.

    Raises
    ------
    ConversionError
        No PyTorch, nothing of that name, code that fails, no module, or a state dict that is none or does not fit.
    """
    names = r"[^\W\d]\w*(\.[^\W\d]\w*)*"
    if not isinstance(source, str) or not re.fullmatch(f"{names}:{names}", source) or Path(source).exists():
        return source
    try:
        from fastdtd.importers import pytorch
    except ModuleNotFoundError as error:
        raise ConversionError(f"{source}: {error}; `pip install torch` installs what reading PyTorch's modules takes") from None
    try:
        module, content = pytorch.made_by(source), b""
        if weights is not None:
            content = _read(Path(weights), MAX_STATE_BYTES)
            pytorch.load_weights(module, content)
    except ConversionError as error:
        raise ConversionError(f"{source}: {error}") from error
    return TorchSource(module, source, *(() if weights is None else (Path(weights), hashlib.sha256(content).hexdigest())))


def convert(source: FilePath | TorchSource, weights: FilePath | None = None, *, color: str | None = None,
            size: int | tuple[int, int] | None = None, resize: str = "stretch", mean: Any = 0, std: Any = 1, scale: float = 1,
            box: Any = None, labels: FilePath | Sequence[str] | None = None) -> Model:
    """A network from an ONNX, Keras or Caffe file, or from a PyTorch module's name, and what these do not say.

    That is how a picture becomes the network's input, and what its outputs mean.

    Parameters
    ----------
    source : path or str
        An .onnx file, a .keras file, an .h5 or .hdf5 file of Keras's, a Caffe network's .prototxt, or ``module:callable`` for what makes a
        PyTorch module, see `opened`.
    weights : path, optional
        The .caffemodel that goes with a .prototxt, a PyTorch module's state dict, or the file of an .onnx file's weights, where they are in
        another one; NAME.onnx.data is found by itself.
    color : {"rgb", "bgr", "gray"}, optional
        Order of the input's channels. Default: "rgb" for three channels, "gray" for one, else the input is no picture.
    size : (height, width) or int, optional
        Size of the input. Required where the file leaves it open, and for PyTorch; elsewhere it replaces the file's.
    resize : {"stretch", "crop"}
    mean, std : float, (C,) or (C, H, W)
    scale : float
        The input is ``(pixel * scale - mean) / std``, see `fastdtd.Preprocessing`.
    box : (low, high), or a (low, high) for each channel, optional
        Bounds of the input's values, after preprocessing. low and high may also be sequences, a number for each channel.
    labels : path or sequence of str, optional
        Names of the outputs: a text file with a line for each, or the names themselves.

    Returns
    -------
    Model

    Raises
    ------
    ConversionError
        A file that is missing, damaged or of another kind, an operator that is not supported, an option that does not fit the network, or
        a package that is not installed.

    Examples
    --------
    >>> model = convert("deploy.prototxt", "net.caffemodel", color="bgr", mean=(104, 117, 123),
    ...                 box=[(-104, 151), (-117, 138), (-123, 132)], labels="names.txt")
    >>> fastdtd.save(model, "net.h5")
    >>> model = convert("net.keras", box=(0, 255))
    """
    source = opened(source, weights) if not isinstance(source, TorchSource) else source
    if isinstance(source, TorchSource):
        return _from_torch_source(source, _checked_size(size), color, (resize, mean, std, scale), box, labels)
    files = [Path(source)] + ([] if weights is None else [Path(weights)])
    beside = Path(f"{files[0]}.data")
    if weights is None and files[0].suffix.lower() == ".onnx" and beside.is_file() and not beside.is_symlink():
        files.append(beside)  # where PyTorch puts the weights; an .onnx file may name no other on its own
    try:
        with np.errstate(all="ignore"):  # what overflows or is no number is refused by the layer that gets it
            layers, shape, file_format, contents = _parse(files, _checked_size(size))
            provenance = {
                "source": ", ".join(file.name for file in files),
                "sha256": ", ".join(hashlib.sha256(content).hexdigest() for content in contents),
                "format": file_format,
            }
            return _model(layers, shape, box, color, resize, mean, std, scale, labels, provenance)
    except (ConversionError, ModelError) as error:
        raise ConversionError(f"{source}: {error}") from error


def _from_torch_source(source: TorchSource, size: tuple[int, int] | None, color: str | None, preprocessing: tuple[Any, ...], box: Any,
                       labels: FilePath | Sequence[str] | None) -> Model:
    import torch

    from fastdtd.importers import pytorch

    try:
        if size is None:
            raise ConversionError("a PyTorch module does not say the size of its input; give size=(height, width)")
        channels = {"gray": 1, "rgb": 3, "bgr": 3}.get(color or "") or pytorch.input_channels(source.module)
        example = torch.zeros(1, channels, *size)
        with np.errstate(all="ignore"):
            layers, shape, file_format = pytorch.parse(source.module, example)
            provenance = {"source": ", ".join([source.name] + ([source.weights.name] if source.weights else [])),
                          **({"sha256": source.digest} if source.weights else {}), "format": file_format}
            resize, mean, std, scale = preprocessing
            return _model(layers, shape, box, color, resize, mean, std, scale, labels, provenance)
    except (ConversionError, ModelError) as error:
        raise ConversionError(f"{source}: {error}") from error


def verify(model: Model, source: FilePath | TorchSource) -> float:
    """How far a converted network's scores are from those of its source: onnxruntime or Keras on the file, or the PyTorch module.

    Parameters
    ----------
    model : Model
    source : path or TorchSource
        The .onnx, .keras, .h5 or .hdf5 file, or the module as `opened` gives it.

    Returns
    -------
    float
        The largest difference on four random inputs, relative to the largest score.

    Raises
    ------
    ConversionError
        No onnxruntime or Keras, a source of another kind, or one that does not run.
    """
    runtime = runtime_of(source)
    runtimes: dict[str, Callable[[Any, Any, Model], Any]] = {
        "onnxruntime": _onnxruntime_scores, "Keras": _keras_scores, "PyTorch": _torch_scores}
    from fastdtd.explainer import Explainer

    graph = model.graph
    low, high = (-1.0, 1.0) if graph.box is None else (bound[:, None, None] for bound in graph.box)
    batch = np.asarray(low + (high - low) * np.random.default_rng(0).random((4, *graph.input_shape)), np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of scores that are not positive
        scores = Explainer(model)(batch).output
    try:
        theirs = runtimes[runtime](source, batch, model)
    except ModuleNotFoundError as error:
        packages = "onnxruntime" if runtime == "onnxruntime" else "keras tensorflow"
        raise ConversionError(f"{error}; `pip install {packages}` installs what verifying takes") from None
    except (ConversionError, ModelError):
        raise
    except Exception as error:  # all have many kinds, and none in common
        message = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        advice = "; required: the version that wrote the file, for Keras 3 reads few files of Keras 2" if runtime == "Keras" else ""
        raise ConversionError(f"{source}: {runtime} cannot run it: {message}{advice}") from error
    if theirs.shape != scores.shape:
        raise ConversionError(f"{source}: {runtime} gives {theirs.shape[1]} outputs, the converted network {scores.shape[1]}")
    exponents = np.exp(scores - scores.max(1, keepdims=True))
    probabilities = exponents / exponents.sum(1, keepdims=True)
    if np.allclose(theirs.sum(1), 1, atol=1e-3) and (theirs >= 0).all():  # behind a softmax, which conversion drops
        scores = probabilities
    elif np.allclose(np.exp(theirs).sum(1), 1, atol=1e-3):
        scores = np.log(probabilities)
    return float(np.abs(scores - theirs).max() / np.abs(theirs).max())


def runtime_of(source: FilePath | TorchSource) -> str:
    """What runs a source to verify it: "onnxruntime", "Keras" or "PyTorch". ConversionError: there is nothing for this kind."""
    if isinstance(source, TorchSource):
        return "PyTorch"
    kind = Path(source).suffix.lower()
    if kind == ".onnx":
        return "onnxruntime"
    if kind in KERAS_SUFFIXES:
        return "Keras"
    raise ConversionError(f"{source}: only .onnx files can be verified, by onnxruntime, .keras, .h5 and .hdf5 files, by Keras, and PyTorch "
                          "modules; there is no runtime here for others")


def _onnxruntime_scores(source: FilePath, batch: Any, model: Model) -> Any:
    import onnxruntime

    from fastdtd.importers.onnx import CHANNELS_LAST

    session = onnxruntime.InferenceSession(str(source), providers=["CPUExecutionProvider"])
    name, output = session.get_inputs()[0], session.get_outputs()[0].name
    pictures = {2: batch[:, :, 0, 0], 3: batch[:, :, 0]}.get(len(name.shape), batch)
    if model.provenance.get("format", "").endswith(CHANNELS_LAST):
        pictures = np.ascontiguousarray(batch.transpose(0, 2, 3, 1))
    size = name.shape[0] if isinstance(name.shape[0], int) and name.shape[0] > 0 else 1
    repeated = [np.repeat(picture[None], size, 0) for picture in pictures]
    return np.concatenate([session.run([output], {name.name: same})[0].reshape(size, -1)[:1] for same in repeated])


def _keras_scores(source: FilePath, batch: Any, _: Model) -> Any:
    import keras

    _parse([Path(source)], batch.shape[2:] if batch.shape[2] > 1 else None)  # for Keras runs the code in a file, and this refuses it
    network = keras.models.load_model(str(source), compile=False)
    rank = len(network.inputs[0].shape)
    pictures = batch.transpose(0, 2, 3, 1) if rank == 4 else batch[:, :, 0].transpose(0, 2, 1) if rank == 3 else batch[:, :, 0, 0]
    scores = network.predict(pictures, verbose=0)
    return np.reshape(scores[0] if isinstance(scores, list) else scores, (len(batch), -1))


def _torch_scores(source: TorchSource, batch: Any, _: Model) -> Any:
    from fastdtd.importers import pytorch

    return pytorch.scores(source.module, batch)


def from_torch(module: Any, example: Any, *, color: str | None = None, resize: str = "stretch", mean: Any = 0, std: Any = 1,
               scale: float = 1, box: Any = None, labels: FilePath | Sequence[str] | None = None) -> Model:
    """A network from a PyTorch module, through torch.export. PyTorch is needed for this alone.

    Parameters
    ----------
    module : torch.nn.Module
        It is exported in evaluation mode, and left as it is.
    example : torch.Tensor
        (N, C, H, W) or (N, F): an input that the module takes. Its values do not matter.
    color, resize, mean, std, scale, box, labels
        As for `convert`.

    Returns
    -------
    Model

    Raises
    ------
    ConversionError
        No PyTorch, a module that torch.export cannot export, an operator that is not supported, an option that does not fit the network.

    Examples
    --------
    >>> module = torchvision.models.resnet18(weights="DEFAULT")
    >>> model = from_torch(module, torch.zeros(1, 3, 224, 224), resize="crop", scale=1 / 255, mean=(0.485, 0.456, 0.406),
    ...                    std=(0.229, 0.224, 0.225))
    """
    try:
        from fastdtd.importers import pytorch
    except ModuleNotFoundError as error:
        raise ConversionError(f"{error}; `pip install torch` installs what reading PyTorch's modules takes") from None
    name = type(module).__name__
    try:
        with np.errstate(all="ignore"):
            layers, shape, file_format = pytorch.parse(module, example)
            return _model(layers, shape, box, color, resize, mean, std, scale, labels, {"source": name, "format": file_format})
    except (ConversionError, ModelError) as error:
        raise ConversionError(f"{name}: {error}") from error


def _model(layers: list[Layer], shape: Shape, box: Any, color: str | None, resize: str, mean: Any, std: Any, scale: float,
           labels: FilePath | Sequence[str] | None, provenance: dict[str, str]) -> Model:
    graph = Graph(tuple(layers), shape, _low_and_high(box, shape[0]))
    if color is None and shape[1:] != (1, 1):
        color = {1: "gray", 3: "rgb"}.get(shape[0])
    return Model(graph, Preprocessing(color, resize, mean, std, scale), _class_names(labels), provenance)


def _parse(files: list[Path], size: tuple[int, int] | None) -> tuple[list[Layer], Shape, str, list[bytes]]:
    """Layers, input shape and format of the network in `files`, and the files' contents."""
    kind = files[0].suffix.lower()
    if kind == ".onnx":
        try:
            from fastdtd.importers import onnx
        except ModuleNotFoundError as error:
            raise ConversionError(f"{error}; `pip install 'fastdtd[onnx]'` installs what reading .onnx takes") from None
        contents = [_read(files[0], MAX_WEIGHT_BYTES), *(_read(file, MAX_STATE_BYTES) for file in files[1:])]
        return *onnx.parse(contents[0], size, {file.name: content for file, content in zip(files[1:], contents[1:], strict=True)}), contents
    if kind in KERAS_SUFFIXES:
        if len(files) > 1:
            raise ConversionError(f"an {kind} file of Keras's holds its weights; required: no second file")
        from fastdtd.importers import keras

        contents = [_read(files[0], MAX_WEIGHT_BYTES)]
        return *keras.parse(contents[0], size), contents
    if kind == ".prototxt":
        if len(files) == 1:
            raise ConversionError("a .prototxt holds no weights; required: the .caffemodel that goes with it, as second file")
        try:
            from fastdtd.importers import caffe
        except ModuleNotFoundError as error:
            raise ConversionError(f"{error}; `pip install 'fastdtd[caffe]'` installs what reading Caffe's files takes") from None
        contents = [_read(files[0], MAX_TEXT_BYTES), _read(files[1], MAX_WEIGHT_BYTES)]
        return *caffe.parse(contents[0], contents[1], size), contents
    if kind in (".pt2", ".pt", ".pth"):
        raise ConversionError(f"loading a {kind} file would run code that is pickled in it; required: MODULE:CALLABLE, Python code that "
                              "makes the module, and as second file its state dict")
    raise ConversionError("none of the kinds that can be converted (.onnx, .keras, .h5 or .hdf5 of Keras, .prototxt), by its name, nor "
                          "MODULE:CALLABLE"
                          + ("; give the .prototxt first, then the .caffemodel" if kind == ".caffemodel" else ""))


def _read(file: Path, limit: int) -> bytes:
    try:
        if not file.is_file():
            raise ConversionError(f"there is no file {str(file)!r}")
        if file.stat().st_size > limit:
            raise ConversionError(f"{str(file)!r} has {file.stat().st_size} bytes; at most {limit} are accepted")
        return file.read_bytes()
    except OSError as error:
        raise ConversionError(f"{str(file)!r} cannot be read: {error.strerror}") from None


def _checked_size(size: Any) -> tuple[int, int] | None:
    if size is None:
        return None
    pair = tuple(size) if np.iterable(size) else (size, size)
    if len(pair) != 2 or any(not isinstance(n, (int, np.integer)) or n < 1 for n in pair):
        raise ConversionError(f"size {size!r} given; required: (height, width) or one whole number for both, from 1")
    return int(pair[0]), int(pair[1])


def _low_and_high(box: Any, channels: int) -> Any:
    """`box` as Graph takes it, (low, high), also where it is a pair for each channel."""
    try:
        is_pair_each = np.shape(box) == (channels, 2)
    except ValueError:  # ragged: a number and a sequence
        is_pair_each = False
    return tuple(zip(*box, strict=True)) if is_pair_each else box


def _class_names(labels: FilePath | Sequence[str] | None) -> tuple[str, ...]:
    if labels is None:
        return ()
    if not isinstance(labels, (str, os.PathLike)):
        return tuple(labels)
    try:
        text = _read(Path(labels), MAX_TEXT_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ConversionError(f"{str(labels)!r} is no text in UTF-8; required: a class name a line") from None
    return tuple(line.strip() for line in text.rstrip().split("\n"))
