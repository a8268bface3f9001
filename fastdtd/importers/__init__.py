"""Foreign model files -> Model: `convert`, and `from_torch` for a module in memory.

sources.py says by which reader a source is read. The reader calls a function for each operator (`OPERATORS` in its
operators.py, or in caffe.py), and these call one `Builder` (builder.py, moves.py), which makes layers.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastdtd.errors import ConversionError, InputError, ModelError, out_of_memory, shown
from fastdtd.graph import Graph, Shape
from fastdtd.importers.builder import Parsed
from fastdtd.importers.sources import (
    MAX_TEXT_BYTES,
    FilePath,
    TorchSource,
    opened,
    parse_files,
    parse_module,
    pytorch_reader,
    read,
)
from fastdtd.importers.verify import verified
from fastdtd.inputs import memory_size
from fastdtd.model import Model, Preprocessing

__all__ = ["TorchSource", "convert", "from_torch", "opened"]


def convert(source: FilePath | TorchSource, weights: FilePath | None = None, *, color: str | None = None,
            size: int | tuple[int, int] | None = None, resize: str = "stretch", mean: Any = 0, std: Any = 1,
            scale: float = 1, box: Any = None, labels: FilePath | Sequence[str] | None = None,
            verify: bool | None = None, max_constants: str | int | None = None, output: int | str | None = None
            ) -> Model:
    """A network from an ONNX, Keras or Caffe file, or from a PyTorch module's name, and what these do not say.

    That is how an image becomes the network's input, and what its outputs mean.

    Parameters
    ----------
    source : path or str
        An .onnx file, a .keras file, an .h5 or .hdf5 file of Keras's, a Caffe network's .prototxt, or
        ``module:callable`` for what makes a PyTorch module, see `opened`.
    weights : path, optional
        The .caffemodel that goes with a .prototxt, a PyTorch module's state dict, or the file of an .onnx file's
        weights, where they are in another one; NAME.onnx.data is found by itself.
    color : {"rgb", "bgr", "gray"}, optional
        Order of the input's channels. Default: "rgb" for three channels, "gray" for one, else the input is no image.
    size : (height, width) or int, optional
        Size of the input. Required where the file leaves it open, and for PyTorch; elsewhere it replaces the file's.
    resize : {"stretch", "crop"}
    mean, std : float, (C,) or (C, H, W)
    scale : float
        The input is ``(pixel * scale - mean) / std``, see `fastdtd.Preprocessing`.
    box : (low, high), or a (low, high) for each channel, optional
        Bounds of the input's values, after preprocessing. low and high may also be sequences, a value for each channel;
        of several inputs, (low, high) by name.
    labels : path or sequence of str, optional
        Names of the outputs: a text file with a line for each, or the names themselves. Two for the one output of a
        binary classifier, the complement's first, give it a second.
    verify : bool, optional
        Whether the scores are compared with the source's own, on two random inputs inside the box: the PyTorch
        module's, Keras's, onnxruntime's, or, where that is not installed and the network is small, those of ONNX's
        reference. By default they are where they can be; what keeps them from it is said in a line of the log
        "fastdtd". True: then it is an error. False: nothing is compared. What verified it is in the model's provenance.
    max_constants : str or int, optional
        Bytes that constants, weights and the indices of moved elements may come to in all while the network is read,
        as in "4GiB". Default: 1 GiB, and 32 bytes for each of the source's own; more is taken for an attack.
    output : int or str, optional
        Which of several outputs is explained, by its number or name: of an ONNX file or a Keras model it may also be an
        inner tensor or layer; of a PyTorch module a key of the dictionary that it returns. Where it is a map, as in
        segmentation and detection, see `Explainer` for its targets. Default: the first.

    Returns
    -------
    Model

    Raises
    ------
    ConversionError
        A file that is missing, damaged or of another kind, an operator that is not supported, an option that does not
        fit the network, a package that is not installed, or scores that differ from the source's by more than a
        thousandth of the largest (somewhat more where the source computes in half precision).

    Examples
    --------
    >>> import fastdtd
    >>> model = fastdtd.convert("net.onnx", scale=1 / 255, box=(0, 1), labels="names.txt")
    >>> fastdtd.save(model, "net.h5")
    >>> fastdtd.convert("deploy.prototxt", "net.caffemodel", color="bgr", mean=(104, 117, 123),
    ...                 box=[(-104, 151), (-117, 138), (-123, 132)])  # doctest: +SKIP
    """
    source = opened(source, weights) if not isinstance(source, TorchSource) else source
    size, limit = _checked_size(size), _limit(max_constants)

    def parsed() -> tuple[Parsed, dict[str, str]]:
        if isinstance(source, TorchSource):
            return parse_module(source, size, color, limit, output)
        files = [Path(source)] + ([] if weights is None else [Path(weights)])
        beside = Path(f"{files[0]}.data")
        if weights is None and files[0].suffix.lower() == ".onnx" and beside.is_file() and not beside.is_symlink():
            files.append(beside)  # where PyTorch puts the weights; an .onnx file may name no other on its own
        network, contents = parse_files(files, size, limit, output)
        return network, {"source": ", ".join(file.name for file in files),
                         "sha256": ", ".join(hashlib.sha256(content).hexdigest() for content in contents)}

    return _model(str(source), parsed, verify, box, color, labels, output, resize=resize, mean=mean, std=std,
                  scale=scale)


def from_torch(module: Any, example: Any, *, color: str | None = None, resize: str = "stretch", mean: Any = 0,
               std: Any = 1, scale: float = 1, box: Any = None, labels: FilePath | Sequence[str] | None = None,
               verify: bool | None = None, max_constants: str | int | None = None, output: int | str | None = None
               ) -> Model:
    """A network from a PyTorch module, through torch.export. PyTorch is needed for this alone.

    Parameters
    ----------
    module : torch.nn.Module
        It is exported in evaluation mode, and left as it is.
    example : torch.Tensor, or tuple of these
        (N, C, H, W) or (N, F): an input that the module takes, or all of several. The values do not matter.
    color, resize, mean, std, scale, box, labels, verify, max_constants, output
        As for `convert`.

    Returns
    -------
    Model

    Raises
    ------
    ConversionError
        No PyTorch, a module that torch.export cannot export, an operator that is not supported, an option that does not
        fit the network, or scores that differ from the module's.

    Examples
    --------
    >>> module = torchvision.models.resnet18(weights="DEFAULT")  # doctest: +SKIP
    >>> model = fastdtd.from_torch(module, torch.zeros(1, 3, 224, 224), resize="crop", scale=1 / 255,
    ...                            mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))  # doctest: +SKIP
    """
    pytorch, name, limit = pytorch_reader(), type(module).__name__, _limit(max_constants)
    return _model(name, lambda: (pytorch.parse(module, example, limit, output), {"source": name}), verify, box, color,
                  labels, output, resize=resize, mean=mean, std=std, scale=scale)


def _model(name: str, parsed: Callable[[], tuple[Parsed, dict[str, str]]], verify: bool | None, box: Any,
           color: str | None, labels: FilePath | Sequence[str] | None, output: int | str | None, **preprocessing: Any
           ) -> Model:
    """A Model of what `parsed` gives, a network and its provenance; `name` begins the errors."""
    if output is not None and (isinstance(output, bool) or not isinstance(output, (int, np.integer, str))):
        raise ConversionError(f"output {shown(output)} was asked for; required: its number or its name")
    try:
        with out_of_memory(ConversionError, "max_constants= (--max-constants SIZE) limits what conversion takes"):
            with np.errstate(all="ignore"):  # what overflows or is no number is refused by the layer that gets it
                network, provenance = parsed()
                chosen = {} if output is None else {"output": str(output)}
                box = _of_inputs(box, network.inputs) if network.inputs else box
                graph = Graph(tuple(network.layers), network.shape, _low_and_high(box, network.shape[0]))
                if color is None and network.shape[1:] != (1, 1):
                    color = {1: "gray", 3: "rgb"}.get(network.shape[0])
                names = _class_names(labels)
                is_binary = len(names) == 2 and graph.output_shape[0] == 1  # and its source has no complement
                model = Model(graph, Preprocessing(color, **preprocessing), () if is_binary else names,
                              provenance | {"format": network.format} | chosen, dict(network.inputs))
            if verify is not False:
                model = verified(model, name, network.runtime, is_required=verify is True)
            return dataclasses.replace(model, classes=names)
    except (ConversionError, ModelError) as error:
        raise ConversionError(f"{name}: {error}") from error


def _limit(max_constants: str | int | None) -> int | None:
    try:
        return None if max_constants is None else memory_size(max_constants, "max_constants")
    except InputError as error:
        raise ConversionError(str(error)) from None


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
    except ValueError:  # ragged: a value and a sequence
        is_pair_each = False
    return tuple(zip(*box, strict=True)) if is_pair_each else box


def _of_inputs(box: Any, inputs: Mapping[str, Shape]) -> Any:
    """Bounds of all values of several inputs, from (low, high) of each by its name."""
    if box is None or not isinstance(box, Mapping):
        return box
    if set(box) != set(inputs):
        raise ConversionError(f"the box names {', '.join(map(shown, box))}; required: (low, high) for each of "
                              f"{', '.join(inputs)}")
    bounds = []
    for side in (0, 1):
        try:
            bounds.append(np.concatenate([
                np.repeat(np.broadcast_to(np.asarray(box[name][side], np.float32), shape[:1]), shape[1] * shape[2])
                for name, shape in inputs.items()]))
        except (ValueError, TypeError, LookupError):
            raise ConversionError(f"the box is {shown(box)}; required: by name (low, high), each a number or one for "
                                  "each channel") from None
    return tuple(bounds)


def _class_names(labels: FilePath | Sequence[str] | None) -> tuple[str, ...]:
    if labels is None:
        return ()
    if not isinstance(labels, (str, os.PathLike)):
        return tuple(labels)
    try:
        text = read(Path(labels), MAX_TEXT_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ConversionError(f"{str(labels)!r} is no text in UTF-8; required: a class name a line") from None
    return tuple(line.strip() for line in text.rstrip().split("\n"))
