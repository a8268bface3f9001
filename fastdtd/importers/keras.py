"""Keras -> layers: .keras files (a zip), and .h5 files as model.save wrote them before. Neither Keras nor TensorFlow is needed.

One function for each class of layers, called in an order in which every layer comes after its inputs. Keras has channels last, fastdtd
first: a tensor is in Keras's order only as far as a layer can tell. What moves numbers around (Flatten, Reshape, Permute, Cropping, ...)
is followed as an index, a *view*, and becomes a layer only where something reads it that cares.

Files come from anywhere. Their configuration is data: classes are looked up in a table here, and no code in them is ever run.
"""

from __future__ import annotations

import graphlib
import heapq
import io
import json
import math
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from fastdtd import hdf5
from fastdtd.errors import ConversionError
from fastdtd.graph import (
    INPUT,
    MAX_LAYERS,
    MAX_TENSOR_ELEMENTS,
    MAX_WEIGHT_ELEMENTS,
    Add,
    AveragePool2d,
    BatchNorm,
    Clip,
    Concat,
    Conv2d,
    Dense,
    Flatten,
    GlobalAveragePool,
    Layer,
    LeakyReLU,
    MaxPool2d,
    Rearrange,
    ReLU,
    Shape,
    Softmax,
)
from fastdtd.importers.tensors import NO_PADDING, Padding, Tensor, sum_of, transposed_convolution

MAX_CONFIG_BYTES = 2**24
MAX_UNPACKED_BYTES = 2**31
MAX_NESTING = 16  # models in models
MAX_GROUP_DEPTH = 64
_CONFIG, _METADATA, _WEIGHTS = "config.json", "metadata.json", "model.weights.h5"
_REQUIRED = "an undamaged file that Keras's model.save wrote"
_MODELS = {"Sequential": "sequential", "Functional": "functional", "Model": "functional"}  # and what weight files call them
_DTYPES = {"float16", "float32", "float64", "bfloat16", "mixed_float16", "mixed_bfloat16"}
_KERAS_MODULE = re.compile(r"(tf_)?keras(\.|$)")
_EPSILON = 1e-7  # keras.backend.epsilon()

Constant = npt.NDArray[Any]
Index = npt.NDArray[np.int32]
Reference = tuple[str, int, int]  # a layer's name, which of its calls, which of its outputs


def parse(data: bytes, size: tuple[int, int] | None = None) -> tuple[list[Layer], Shape, str]:
    """The network in a .keras file or in a .h5 file of Keras's.

    Where it has several outputs, the first is taken, and layers that do not lead to it are left out.

    Parameters
    ----------
    data : bytes
        The file.
    size : (height, width), optional
        Replaces the input size in the file.

    Returns
    -------
    layers : list of Layer
    input_shape : (C, H, W)
    file_format : str
        The version of Keras that wrote it.

    Raises
    ------
    ConversionError
        Damage, or what is not supported.
    ModelError
        Damage in HDF5, or a layer that contradicts itself or its input.
    """
    if data.startswith(b"PK"):
        return _parse_zip(data, size)
    if data.startswith(hdf5.SIGNATURE):
        return _parse_hdf5(data, size)
    raise ConversionError(f"neither a zip nor an HDF5 file, or its start is damaged; required: {_REQUIRED}")


# ---- Files -------------------------------------------------------------------------------------------------------------------------------


def _parse_zip(data: bytes, size: tuple[int, int] | None) -> tuple[list[Layer], Shape, str]:
    members = _unpacked(data)
    version = _json(members[_METADATA], _METADATA).get("keras_version") if _METADATA in members else None
    config = _json(members[_CONFIG], _CONFIG)
    with hdf5.opened(members[_WEIGHTS], f"{_REQUIRED}, with sound weights in {_WEIGHTS}", MAX_CONFIG_BYTES) as file:
        return *_network(config, _NumberedWeights(file), size), _format(version)


def _unpacked(data: bytes) -> dict[str, bytes]:
    """The members of a .keras file that are known. Nothing else is unpacked, and nothing before its size is known."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            found = [info for info in archive.infolist() if info.filename in (_CONFIG, _METADATA, _WEIGHTS)]
            names = [info.filename for info in found]
            if len(set(names)) < len(names):
                raise ConversionError(f"damaged: it holds {', '.join(sorted(names))}; required: each once")
            for name in (_CONFIG, _WEIGHTS):
                if name not in names:
                    raise ConversionError(f"a zip without {name}; required: {_REQUIRED}")
            if any(info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for info in found):
                raise ConversionError("packed by an unusual method; required: stored or deflated members, as Keras writes them")
            total = sum(info.file_size for info in found)
            texts = max(info.file_size for info in found if info.filename != _WEIGHTS)
            if total > MAX_UNPACKED_BYTES or texts > MAX_CONFIG_BYTES:
                raise ConversionError(f"unpacks to {total} bytes, {texts} of them in one text; at most {MAX_UNPACKED_BYTES} and "
                                      f"{MAX_CONFIG_BYTES} are accepted")
            return {info.filename: archive.read(info) for info in found}  # zipfile gives no more than file_size says
    except (zipfile.BadZipFile, zlib.error, EOFError, LookupError, OSError, RuntimeError, ValueError) as error:
        raise ConversionError(f"damaged, or no .keras file ({error}); required: {_REQUIRED}") from None


def _parse_hdf5(data: bytes, size: tuple[int, int] | None) -> tuple[list[Layer], Shape, str]:
    with hdf5.opened(data, _REQUIRED, MAX_CONFIG_BYTES) as file:
        with hdf5.errors(_REQUIRED):
            names = hdf5.attribute_names(file, "the file")
            texts = {name: hdf5.single(hdf5.attribute(file, name, f"root attribute {name!r}", MAX_CONFIG_BYTES), str,
                                       f"root attribute {name!r}")
                     for name in ("format", "keras_version", "model_config") if name in names}
            if "model_config" not in texts:
                if texts.get("format") == "fastdtd-model":
                    raise ConversionError("already a fastdtd model file; it needs no conversion (fastdtd.load reads it)")
                raise ConversionError("has no root attribute 'model_config', so it holds weights at most; required: a whole model, as "
                                      "model.save('net.keras') writes it")
            members = hdf5.children(file, "the file", MAX_LAYERS)
            if "model_weights" not in members:
                raise ConversionError(f"has no group 'model_weights'; required: {_REQUIRED}")
            weights = _NamedWeights(hdf5.group(members["model_weights"], "/model_weights"))
        config = _json(texts["model_config"].encode(), "model_config")
        return *_network(config, weights, size), _format(texts.get("keras_version")) + " (HDF5)"


def _format(version: Any) -> str:
    return f"keras {''.join(c for c in version if c.isprintable())[:40]}" if isinstance(version, str) and version else "keras"


def _json(text: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"damaged: {where} is no JSON, or nested too deeply ({str(error)[:100]}); required: {_REQUIRED}") from None
    checked: dict[str, Any] = _expect(value, dict, where)
    return checked


_KINDS = {dict: "an object", list: "a list", str: "a text", int: "a whole number", float: "a number", bool: "true or false"}


def _expect(value: Any, kind: type, where: str) -> Any:
    """`value`, which JSON gave, where it is of `kind`; a float may be an int, and a bool is neither."""
    is_bool = isinstance(value, bool)
    if (is_bool if kind is bool else not is_bool and isinstance(value, (int, float) if kind is float else kind)):
        return value
    found = "null" if value is None else f"{_KINDS.get(type(value), 'something else')} {str(value)[:60]!r}"
    raise ConversionError(f"{where} is {found}; required: {_KINDS[kind]}")


# ---- Weights -----------------------------------------------------------------------------------------------------------------------------


class _NumberedWeights:
    """Of a .keras file: groups are numbered by class in each model, and what a layer has is numbered in its group."""

    def __init__(self, file: Any) -> None:
        self.root = file

    def inside(self, model: _Node | None, nodes: Sequence[_Node]) -> None:
        """Give each of the layers of `model` its place."""
        root = self.root if model is None else model.place
        by_class: dict[str, list[_Node]] = {}
        for node in nodes:
            by_class.setdefault(_MODELS.get(node.kind) or _snake_case(node.kind), []).append(node)
        with hdf5.errors(_REQUIRED):
            groups: dict[str, Any] = {}
            if root is not None:
                parts = hdf5.children(root, "a model in the weights", MAX_LAYERS)
                container = parts.get("layers", parts.get("_layer_checkpoint_dependencies"))
                groups = {} if container is None else hdf5.children(container, "the layers in the weights", MAX_LAYERS)
        numbered: dict[str, list[tuple[int, Any]]] = {}
        for name, group in groups.items():
            stem, _, number = name.rpartition("_")
            kind, place = (stem, int(number)) if number.isdecimal() and len(number) < 9 else (name, 0)
            numbered.setdefault(kind, []).append((place, group))
        for kind, of_kind in by_class.items():
            # Keras 2.12 skips numbers; what holds is their order.
            places = [group for _, group in sorted(numbered.get(kind, []), key=lambda entry: entry[0])]
            for node, place in zip(of_kind, places if len(places) == len(of_kind) else [], strict=False):
                node.place = place

    def find(self, node: _Node, names: Sequence[Sequence[str]]) -> list[Any]:
        if node.place is None:
            node.refuse("has no weights of its own in the file, or layers of its class are not as many there as here; required: a model "
                        "that is saved whole, and layers that belong to one model only")
        with hdf5.errors(_REQUIRED):
            parts = hdf5.children(hdf5.group(node.place, node.where), node.where, MAX_LAYERS)
            found = hdf5.children(hdf5.group(parts["vars"], node.where), node.where, 16) if "vars" in parts else {}
        return [found.get(str(i)) for i in range(len(names))]


class _NamedWeights:
    """Of a .h5 file: groups have the names of the outermost layers, and paths in them end in a layer's and a weight's name."""

    def __init__(self, root: Any) -> None:
        self.datasets: dict[str, Any] = {}
        waiting = [("", root)]
        groups = 0
        while waiting:  # hard links may lead round in circles
            path, group = waiting.pop()
            groups += 1
            if groups > 10 * MAX_LAYERS or path.count("/") > MAX_GROUP_DEPTH:
                raise ConversionError(f"holds more groups of weights than {MAX_LAYERS} layers have, or too deep ones; required: "
                                      f"{_REQUIRED}")
            for name, child in hdf5.children(group, f"/model_weights{path}", MAX_LAYERS).items():
                if hdf5.is_dataset(child):
                    self.datasets[f"{path}/{name}"] = child
                else:
                    waiting.append((f"{path}/{name}", hdf5.group(child, f"/model_weights{path}/{name}")))

    def inside(self, model: _Node | None, nodes: Sequence[_Node]) -> None:
        for node in nodes:
            node.place = (f"/{node.name}/", model is None) if model is None else (model.place[0], False)

    def find(self, node: _Node, names: Sequence[Sequence[str]]) -> list[Any]:
        outermost, is_outermost = node.place
        within = [path for path in self.datasets if path.startswith(outermost)]
        found = []
        for choices in names:
            ending = re.compile(rf"(/|^){re.escape(node.name)}/({'|'.join(choices)})(_\d+)?(:\d+)?$")
            paths = [path for path in within if ending.search(path[len(outermost):])]
            if not paths and is_outermost:  # a layer that was given another name after it was made
                ending = re.compile(rf"/({'|'.join(choices)})(_\d+)?(:\d+)?$")
                paths = [path for path in within if ending.search(path)]
            if len(paths) > 1:
                node.refuse(f"may have its {choices[0]} in {' or '.join(map(repr, paths[:3]))}; required: one place. Save the model as "
                            ".keras")
            found.append(self.datasets[paths[0]] if paths else None)
        return found


def _snake_case(name: str) -> str:
    """As Keras makes the names of groups from those of classes."""
    return re.sub("([a-z])([A-Z])", r"\1_\2", re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)).lower()


# ---- Networks ----------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tensor(Tensor):
    """rank is Keras's. view: for each number in Keras's order, without the batch, its place in the layer's output, or -1 for a zero."""

    view: Index | None = None
    made_by: str = ""  # path of the node that made the view or padding


class _Node:
    """A layer's configuration, checked as it is asked for."""

    def __init__(self, entry: Any, index: int, count: int, outer: str) -> None:
        where = f"layer {index + 1} of {count}" + (f" in {outer!r}" if outer else "")
        entry = _expect(entry, dict, where)
        self.kind: str = _expect(entry.get("class_name"), str, f"{where}: class_name")
        self.entry = entry
        self.settings: Any = entry.get("config")
        name = entry.get("name")
        if name is None and isinstance(self.settings, dict):
            name = self.settings.get("name")
        self.name: str = _expect(self.kind.lower() if name is None else name, str, f"{where}: name")
        self.path = f"{outer}/{self.name}" if outer else self.name
        self.where = f"{self.kind} {self.path!r} (layer {index + 1} of {count})"
        self.place: Any = None  # of its weights
        module, registered = entry.get("module"), entry.get("registered_name")
        if (module is not None and not _KERAS_MODULE.match(str(module))) or ">" in str(registered) or ">" in self.kind:
            self.refuse("is a class of somebody's own, whose code is not in the file and would not be run; required: Keras's own layers")
        if self.kind not in _MODELS:
            self.settings = _expect(self.settings, dict, f"{self.where}: config")

    def refuse(self, what: str) -> NoReturn:
        raise ConversionError(f"{self.where} {what}")

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        value = self.settings.get(key)
        return default if value is None and default is not None else _expect(value, kind, f"{self.where}: {key}")

    def integer(self, key: str, least: int = 1, default: int | None = None) -> int:
        value: int = self.get(key, int, default)
        if value < least:
            self.refuse(f"has {key} {value}; required: a whole number from {least}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.settings.get(key)
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        return self._finite(default if value is None and default is not None else value, key)

    def _finite(self, value: Any, key: str) -> float:
        try:
            number = float(_expect(value, float, f"{self.where}: {key}"))
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            self.refuse(f"has {key} {str(value)[:40]}; required: a finite number")
        return number

    def numbers(self, key: str) -> Constant:
        """One number, or lists of them, as one axis."""
        flat: list[float] = []
        waiting = [self.settings.get(key)]
        while waiting:
            value = waiting.pop()
            if isinstance(value, list):
                waiting.extend(reversed(value))
            else:
                flat.append(self._finite(value, key))
        return np.array(flat, np.float64)

    def integers(self, key: str, count: int, least: int, default: Any = None) -> tuple[int, ...]:
        """`count` whole numbers; one stands for all."""
        value = self.settings.get(key)
        value = default if value is None else value
        values = [value] * count if isinstance(value, int) else _expect(value, list, f"{self.where}: {key}")
        checked = [_expect(v, int, f"{self.where}: {key}") for v in values]
        if len(checked) != count or min(checked) < least or max(checked) >= 2**31:
            self.refuse(f"has {key} {str(value)[:60]}; required: {count} whole numbers from {least}")
        return tuple(checked)

    def pair(self, key: str, axes: int, least: int = 1, default: Any = None) -> tuple[int, int]:
        """For height and width. What has one axis is an image of one row."""
        values = self.integers(key, axes, least, default)
        return (1, values[0]) if axes == 1 else (values[0], values[1])

    def sides(self, key: str, axes: int, default: int) -> Padding:
        """Before and behind each axis, as (top, left, bottom, right)."""
        value = self.settings.get(key)
        value = default if value is None else value
        if axes == 1:
            left, right = self.integers(key, 2, 0, default)
            return 0, left, 0, right
        if isinstance(value, int):
            value = [value, value]
        pairs = [[v, v] if isinstance(v, int) else _expect(v, list, f"{self.where}: {key}")
                 for v in _expect(value, list, f"{self.where}: {key}")]
        flat = [_expect(v, int, f"{self.where}: {key}") for pair in pairs for v in pair]
        if [len(pair) for pair in pairs] != [2, 2] or min(flat) < 0 or max(flat) >= 2**31:
            self.refuse(f"has {key} {str(value)[:60]}; required: two pairs of whole numbers from 0")
        return flat[0], flat[2], flat[1], flat[3]

    def require_channels_last(self) -> None:
        if self.get("data_format", str, "channels_last") != "channels_last":
            self.refuse("has the channels first; required: channels_last. Build the model again with data_format 'channels_last' and set "
                        "the weights of this one, which are the same")


class _Network:
    """What the nodes read so far have made."""

    def __init__(self, weights: _NumberedWeights | _NamedWeights) -> None:
        self.weights = weights
        self.layers: dict[str, Layer] = {}
        self.depth = self._calls = self._numbers = 0
        self._materialised: dict[tuple[str, int, Padding], tuple[_Tensor, _Tensor]] = {}

    def call(self, node: _Node, inputs: list[_Tensor]) -> list[_Tensor]:
        """The outputs of `node`."""
        self._calls += 1
        if self._calls > MAX_LAYERS:
            node.refuse(f"is called as number {self._calls}; at most {MAX_LAYERS} calls of layers are accepted")
        if node.kind in _MODELS:
            return _call_model(self, node, inputs)
        self.check_type(node)
        function = _LAYERS[node.kind]
        if function in (_add, _concatenate):
            return [function(self, node, inputs)]
        if len(inputs) != 1:
            node.refuse(f"has {len(inputs)} inputs; required: one")
        return [function(self, node, inputs[0])]

    def check_type(self, node: _Node) -> None:
        if node.kind not in _LAYERS:
            known = f"supported: {', '.join(sorted((*_LAYERS, 'Functional', 'Sequential')))}"
            node.refuse("is of a class that is not supported; "
                        + (f"what works: {_INSTEAD[node.kind]}" if node.kind in _INSTEAD else known))
        policy = node.settings.get("dtype")
        kind = policy.get("class_name") if isinstance(policy, dict) else None
        if isinstance(policy, dict):
            policy = policy["config"].get("name") if isinstance(policy.get("config"), dict) else kind
        if (policy is not None and str(policy) not in _DTYPES and node.kind != "InputLayer") or "Quantized" in str(kind):
            node.refuse(f"computes in {str(policy)[:60]!r}; required: floating-point numbers. Save the model before it is quantized")
        if node.settings.get("quantization_config") is not None:
            node.refuse("is quantized; required: floating-point weights. Save the model before it is quantized")

    def add(self, layer_type: type[Layer], node: _Node, inputs: Sequence[Tensor], rank: int | None = None, part: str = "", **fields: Any
            ) -> _Tensor:
        """The output of a new layer. part: marks one of several layers that one node needs."""
        self.count(node, sum(value.size for value in fields.values() if isinstance(value, np.ndarray)))
        name = node.path + part
        while name in self.layers or name == INPUT:
            name += "_"
        layer = layer_type(name, tuple(x.layer for x in inputs), **fields)
        self.layers[name] = layer
        return _Tensor(name, layer.output_shape([x.shape for x in inputs]), rank or inputs[0].rank)

    def count(self, node: _Node, numbers: int) -> None:
        """Keep a small file from becoming a large network: layers may be called again and again, and indices cost what weights do."""
        self._numbers += numbers
        if self._numbers > MAX_WEIGHT_ELEMENTS:
            node.refuse(f"brings the network beyond {MAX_WEIGHT_ELEMENTS} weights")

    def arrays(self, node: _Node, *wanted: tuple[str, tuple[int, ...]]) -> list[Constant]:
        """The weights of `node`, in Keras's order. wanted: names, as in 'kernel|depthwise_kernel', and shapes."""
        found = self.weights.find(node, [name.split("|") for name, _ in wanted])
        arrays = []
        for (names, shape), data in zip(wanted, found, strict=True):
            name = names.split("|")[0]
            if data is None:
                node.refuse(f"has no {name} in the file; required: weights of shape {shape}")
            with hdf5.errors(_REQUIRED):
                where = f"{node.where} {name}"
                stored = hdf5.dataset(data, where, tuple(range(5)), MAX_WEIGHT_ELEMENTS).shape
                if stored != shape:
                    node.refuse(f"has {name} of shape {stored}; required by its settings and its input: {shape}")
                arrays.append(hdf5.array(data, where, (len(shape),), MAX_WEIGHT_ELEMENTS))
        return arrays

    # ---- Order and padding

    def image(self, node: _Node, x: _Tensor, axes: int = 2, padded: bool = False) -> _Tensor:
        """`x` as a layer over `axes` axes and channels reads it."""
        if x.rank != axes + 2:
            node.refuse(f"reads a tensor of {x.rank} axes, the batch included; required: {axes + 2}")
        return x if padded and x.view is None else self.plain(node, x)

    def plain(self, node: _Node, x: _Tensor) -> _Tensor:
        """`x` with its view and padding made by a layer."""
        if x.view is None and x.pad == NO_PADDING:
            return x
        key = x.layer, id(x.view), x.pad
        if key not in self._materialised:  # which keeps x too, and with it the id
            self._materialised[key] = x, self._rearrange(node, x)
        return self._materialised[key][1]

    def _rearrange(self, node: _Node, x: _Tensor) -> _Tensor:
        index = _channels_first(self.numbering(x))
        if index is None:
            node.refuse(f"reads a tensor of {x.rank} axes, made by {x.made_by!r}; required: at most 4, the batch included")
        name = x.made_by or node.path + "/rearrange"
        while name in self.layers or name == INPUT:
            name += "_"
        is_flat = index.shape[1:] == (1, 1) and np.array_equal(index.ravel(), np.arange(math.prod(x.shape)))
        if not is_flat:
            self.count(node, index.size)
        self.layers[name] = Flatten(name, (x.layer,)) if is_flat else Rearrange(name, (x.layer,), index)
        return _Tensor(name, index.shape, x.rank)

    def numbering(self, x: _Tensor) -> Index:
        """For each number of `x`, in Keras's order, its place in what its layer makes."""
        if x.view is not None:
            return x.view
        index = np.arange(math.prod(x.shape), dtype=np.int32).reshape(x.shape)
        index = np.pad(index, ((0, 0), (x.pad[0], x.pad[2]), (x.pad[1], x.pad[3])), constant_values=-1)
        return index.transpose(1, 2, 0) if x.rank == 4 else index[:, 0].T if x.rank == 3 else index.ravel()

    def check_size(self, node: _Node, shape: Sequence[int]) -> None:
        if math.prod(shape) > MAX_TENSOR_ELEMENTS:
            node.refuse(f"makes a tensor of shape {tuple(shape)}; at most {MAX_TENSOR_ELEMENTS} numbers are accepted")

    def viewed(self, node: _Node, x: _Tensor, index: Index) -> _Tensor:
        """The numbers of `x` that `index` says, in its order. A view is kept only where it changes anything."""
        self.count(node, index.size)
        moved = _channels_first(index)
        is_same = moved is not None and moved.shape == x.shape and np.array_equal(moved.ravel(), np.arange(moved.size))
        return replace(x, rank=index.ndim + 1, view=None if is_same else index, pad=NO_PADDING, made_by=node.path)

    def elementwise(self, layer_type: type[Layer], node: _Node, x: _Tensor, part: str = "", **fields: Any) -> _Tensor:
        """A layer that keeps zeros zero works on each number where it lies, whatever view there is."""
        return replace(x, layer=self.add(layer_type, node, [x], part=part, **fields).layer)


def _channels_first(index: Index) -> Index | None:
    """An index in Keras's order in ours, (C, H, W); None where it has more axes."""
    if index.ndim == 1:
        return index[:, None, None]
    if index.ndim == 2:
        return index.T[:, None, :]
    return index.transpose(2, 0, 1) if index.ndim == 3 else None


# ---- Models ------------------------------------------------------------------------------------------------------------------------------


def _network(config: dict[str, Any], weights: _NumberedWeights | _NamedWeights, size: tuple[int, int] | None) -> tuple[list[Layer], Shape]:
    kind = _expect(config.get("class_name"), str, "class_name")
    if kind not in _MODELS:
        raise ConversionError(f"the model is of class {kind!r}; required: Sequential or Functional, whose layers are in the file")
    top = _Node(config, 0, 1, "")
    top.where = "the model"
    network = _Network(weights)
    nodes = _nodes(top, "")
    weights.inside(None, nodes)
    calls = None if kind == "Sequential" else _Calls(top, nodes)
    if calls is not None and len(calls.inputs) != 1:
        raise ConversionError(f"the network has {len(calls.inputs)} inputs; required: one")
    first = nodes[0] if calls is None else calls.nodes[calls.inputs[0][0]]
    x = _input(first, top, size)
    output = _run(network, nodes, [x]) if calls is None else calls.run(network, [x])[0]
    last = network.plain(top, output)
    if last.layer == INPUT:
        raise ConversionError("the network has no layers that compute anything")
    return _leading_to(last.layer, network.layers), x.shape


def _input(node: _Node, model: _Node, size: tuple[int, int] | None) -> _Tensor:
    """The network's input, from the layer that says its shape."""
    settings = node.settings if isinstance(node.settings, dict) else {}
    shape = next((settings[key] for key in ("batch_shape", "batch_input_shape") if settings.get(key) is not None), None)
    if shape is None and isinstance(model.settings, dict):
        shape = model.settings.get("build_input_shape")
    if shape is None:
        node.refuse("comes first and does not say its input's shape; required: a model that begins with keras.Input, or was built")
    where = f"{node.where}: input shape"
    axes = [0 if n is None else _expect(n, int, where) for n in _expect(shape, list, where)][1:]
    if len(axes) == 3:
        axes[:2] = size or axes[:2]
    elif size is not None:
        raise ConversionError(f"the input has shape {shape}, without a height and a width; required: no size")
    if not 1 <= len(axes) <= 3:
        raise ConversionError(f"the input has shape {shape}; required: (N, H, W, C), (N, L, C) or (N, F)")
    if min(axes) < 1:
        raise ConversionError(f"the input has shape {shape}, which leaves its size open"
                              + ("; give size=(height, width)" if len(axes) == 3 and axes[2] > 0 else "; required: a model that fixes it"))
    if math.prod(axes) > MAX_TENSOR_ELEMENTS:
        raise ConversionError(f"the input has shape {shape}; at most {MAX_TENSOR_ELEMENTS} numbers are accepted")
    channels, *places = axes[-1:] + axes[:-1]
    height, width = (1, *places) if len(places) == 1 else places or (1, 1)
    return _Tensor(INPUT, (channels, height, width), len(axes) + 1)


def _nodes(model: _Node, outer: str) -> list[_Node]:
    settings = model.settings
    entries = settings if model.kind == "Sequential" and isinstance(settings, list) else (  # a list before Keras 2.2
        _expect(_expect(settings, dict, f"{model.where}: config").get("layers"), list, f"{model.where}: layers"))
    if not entries:
        model.refuse("has no layers")
    nodes = [_Node(entry, i, len(entries), outer) for i, entry in enumerate(entries)]
    if len({node.name for node in nodes}) < len(nodes):
        model.refuse("has two layers of one name; required: a name for each that no other has")
    return nodes


def _call_model(network: _Network, model: _Node, inputs: list[_Tensor]) -> list[_Tensor]:
    network.depth += 1
    if network.depth > MAX_NESTING:
        model.refuse(f"lies in {network.depth} other models; at most {MAX_NESTING} are accepted")
    nodes = _nodes(model, model.path)
    network.weights.inside(model, nodes)
    outputs = [_run(network, nodes, inputs)] if model.kind == "Sequential" else _Calls(model, nodes).run(network, inputs)
    network.depth -= 1
    return outputs


def _run(network: _Network, nodes: list[_Node], inputs: list[_Tensor]) -> _Tensor:
    """A Sequential model."""
    values = inputs
    for node in nodes:
        values = network.call(node, values)
    if len(values) != 1:
        nodes[-1].refuse(f"has {len(values)} outputs, at the end of a Sequential model; required: one")
    return values[0]


class _Calls:
    """A functional model: which layer is called on what."""

    def __init__(self, model: _Node, nodes: list[_Node]) -> None:
        self.model = model
        self.nodes = {node.name: node for node in nodes}
        self.inputs = self._ends("input_layers")
        self.outputs = self._ends("output_layers")
        self.reads: dict[tuple[str, int], list[Reference]] = {}
        for node in nodes:
            entries = _expect(node.entry.get("inbound_nodes", []), list, f"{node.where}: inbound_nodes")
            for i, entry in enumerate(entries):
                self.reads[node.name, i] = _references(node, entry)
        # Keras counts from 1 the calls of a model that is called already when it is made.
        least: dict[str, int] = {}
        for name, i, _ in [*self.outputs, *self.inputs, *(reference for call in self.reads.values() for reference in call)]:
            least[name] = min(i, least.get(name, i))
        self.offset = {name: 1 if i == 1 and self.nodes[name].kind in _MODELS else 0 for name, i in least.items() if name in self.nodes}

    def _ends(self, key: str) -> list[Reference]:
        where = f"{self.model.where}: {key}"
        value = _expect(self.model.settings, dict, f"{self.model.where}: config").get(key)
        value = list(value.values()) if isinstance(value, dict) else _expect(value, list, where)
        ends = [_reference(entry, where) for entry in ([value] if value and isinstance(value[0], str) else value)]
        for name, _, _ in ends:
            if name not in self.nodes:
                self.model.refuse(f"has {name!r} among its {key}, which is none of its layers")
        if not ends:
            self.model.refuse(f"has no {key}; required: one or more")
        return ends

    def run(self, network: _Network, inputs: list[_Tensor]) -> list[_Tensor]:
        if len(inputs) != len(self.inputs):
            self.model.refuse(f"is called on {len(inputs)} tensors; required: {len(self.inputs)}")
        values = {(name, 0): [x] for (name, _, _), x in zip(self.inputs, inputs, strict=True)}
        for call in self._order(set(values)):
            node = self.nodes[call[0]]
            values[call] = network.call(node, [self._value(values, reference, node) for reference in self.reads[call]])
        return [self._value(values, reference, self.model) for reference in self.outputs]

    def _order(self, given: set[tuple[str, int]]) -> Iterator[tuple[str, int]]:
        """The calls that the outputs need, in the file's order as far as it goes, each after those that it reads."""
        sorter: graphlib.TopologicalSorter[tuple[str, int]] = graphlib.TopologicalSorter()
        seen = set(given)
        waiting = [self._call(reference, self.model) for reference in self.outputs]
        while waiting:
            call = waiting.pop()
            if call in seen:
                continue
            seen.add(call)
            if call not in self.reads:
                self.nodes[call[0]].refuse(f"is read as called {call[1] + 1} times, which it is not, or is an input that the model "
                                           "does not list; required: inbound_nodes for each call")
            before = [self._call(reference, self.nodes[call[0]]) for reference in self.reads[call]]
            sorter.add(call, *before)
            waiting.extend(before)
        try:
            sorter.prepare()
        except graphlib.CycleError as error:
            names = ", ".join(repr(name) for name, _ in error.args[1][:5])
            raise ConversionError(f"the network has a cycle through {names}; required: layers that lead forward only") from None
        places = {name: i for i, name in enumerate(self.nodes)}
        ready: list[tuple[int, tuple[str, int]]] = []
        while sorter.is_active():
            for call in sorter.get_ready():
                heapq.heappush(ready, (places[call[0]], call))
            call = heapq.heappop(ready)[1]
            sorter.done(call)
            if call not in given:
                yield call

    def _call(self, reference: Reference, reader: _Node) -> tuple[str, int]:
        name, i, _ = reference
        if name not in self.nodes:
            reader.refuse(f"reads {name!r}, which is no layer beside it")
        return name, i - self.offset[name]

    def _value(self, values: dict[tuple[str, int], list[_Tensor]], reference: Reference, reader: _Node) -> _Tensor:
        outputs = values[self._call(reference, reader)]
        if not 0 <= reference[2] < len(outputs):
            reader.refuse(f"reads output {reference[2] + 1} of {reference[0]!r}, which has {len(outputs)}")
        return outputs[reference[2]]


def _reference(entry: Any, where: str) -> Reference:
    entry = _expect(entry, list, where)
    if len(entry) not in (3, 4):
        raise ConversionError(f"{where} refers to {str(entry)[:60]}; required: a layer's name, and the numbers of its call and output")
    name, call, output = entry[:3]
    return _expect(name, str, where), _expect(call, int, where), _expect(output, int, where)


def _references(node: _Node, entry: Any) -> list[Reference]:
    """What one call of `node` reads, in either dialect."""
    where = f"{node.where}: inbound_nodes"
    if isinstance(entry, list):  # Keras 2: [[layer, call, output, further arguments], ...]
        entries = [entry] if entry and isinstance(entry[0], str) else entry
        for each in entries:
            if isinstance(each, list) and len(each) == 4:
                _check_arguments(node, _expect(each[3], dict, where))
        return [_reference(each, where) for each in entries]
    entry = _expect(entry, dict, where)
    found: list[Reference] = []
    waiting = list(reversed(_expect(entry.get("args"), list, where)))
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            waiting.extend(reversed(value))
            continue
        value = _expect(value, dict, where)
        settings = _expect(value.get("config"), dict, where)
        found.append(_reference(settings.get("keras_history"), where))
    _check_arguments(node, _expect(entry.get("kwargs", {}), dict, where))
    return found


def _check_arguments(node: _Node, arguments: dict[str, Any]) -> None:
    for key, value in arguments.items():
        if key == "training" and value in (None, False):
            continue
        if value is not None:
            node.refuse(f"is called with {key}={str(value)[:40]}; required: nothing but tensors, and training=False at most")


def _leading_to(output: str, layers: dict[str, Layer]) -> list[Layer]:
    needed: set[str] = set()
    waiting = [output]
    while waiting:
        name = waiting.pop()
        if name in layers and name not in needed:
            needed.add(name)
            waiting.extend(layers[name].inputs)
    return [layer for name, layer in layers.items() if name in needed]


# ---- Layers ------------------------------------------------------------------------------------------------------------------------------


def _keep(_: _Network, __: _Node, x: _Tensor) -> _Tensor:
    return x


def _axes(node: _Node) -> int:
    return 1 if "1D" in node.kind else 2


def _same_or_valid(node: _Node, x: _Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int] = (1, 1)) -> Padding:
    mode = node.get("padding", str, "valid")
    if mode == "valid":
        return NO_PADDING
    if mode == "causal" and node.kind == "Conv1D":
        return 0, dilation[1] * (kernel[1] - 1), 0, 0
    if mode != "same":
        node.refuse(f"has padding {mode!r}; required: 'valid' or 'same'")
    before, after = [0, 0], [0, 0]
    for axis in (0, 1):
        size = x.shape[1 + axis] + x.pad[axis] + x.pad[2 + axis]
        windows = -(-size // stride[axis])
        total = max((windows - 1) * stride[axis] + dilation[axis] * (kernel[axis] - 1) + 1 - size, 0)
        before[axis], after[axis] = total // 2, total - total // 2
    return before[0], before[1], after[0], after[1]


def _kernel(node: _Node) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Kernel, stride and dilation of a convolution."""
    node.require_channels_last()
    axes = _axes(node)
    return node.pair("kernel_size", axes), node.pair("strides", axes, default=1), node.pair("dilation_rate", axes, default=1)


def _with_bias(node: _Node, outputs: int) -> list[tuple[str, tuple[int, ...]]]:
    return [("bias", (outputs,))] if node.get("use_bias", bool, True) else []


def _conv(network: _Network, node: _Node, x: _Tensor) -> _Tensor:
    kernel, stride, dilation = _kernel(node)
    x = network.image(node, x, _axes(node), padded=True)
    groups, outputs = node.integer("groups", default=1), node.integer("filters")
    if x.shape[0] % groups or outputs % groups:
        node.refuse(f"has {groups} groups for {x.shape[0]} channels and {outputs} filters; required: groups that divide both")
    shape = (*kernel[2 - _axes(node):], x.shape[0] // groups, outputs)
    weight, *bias = network.arrays(node, ("kernel", shape), *_with_bias(node, outputs))
    weight = weight.reshape(*kernel, *shape[-2:]).transpose(3, 2, 0, 1)
    padding = sum_of(_same_or_valid(node, x, kernel, stride, dilation), x.pad)
    y = network.add(Conv2d, node, [x], weight=weight, bias=bias[0] if bias else None, stride=stride, padding=padding, dilation=dilation,
                    groups=groups)
    return _activate(network, node, y)


def _depthwise(network: _Network, node: _Node, x: _Tensor) -> _Tensor:
    """DepthwiseConv, and SeparableConv, which has a convolution of 1 x 1 behind it."""
    kernel, stride, dilation = _kernel(node)
    x = network.image(node, x, _axes(node), padded=True)
    times, channels = node.integer("depth_multiplier", default=1), x.shape[0]
    is_separable = node.kind.startswith("Separable")
    outputs = node.integer("filters") if is_separable else channels * times
    spatial = kernel[2 - _axes(node):]
    depthwise = ("depthwise_kernel|kernel", (*spatial, channels, times))
    pointwise = [("pointwise_kernel", ((1,) * _axes(node)) + (channels * times, outputs))] if is_separable else []
    weight, *rest = network.arrays(node, depthwise, *pointwise, *_with_bias(node, outputs))
    bias = rest[-1] if len(rest) > len(pointwise) else None
    weight = weight.reshape(*kernel, channels, times).transpose(2, 3, 0, 1).reshape(channels * times, 1, *kernel)
    padding = sum_of(_same_or_valid(node, x, kernel, stride, dilation), x.pad)
    y = network.add(Conv2d, node, [x], part="/depthwise" if is_separable else "", weight=weight, bias=None if is_separable else bias,
                    stride=stride, padding=padding, dilation=dilation, groups=channels)
    if is_separable:
        y = network.add(Conv2d, node, [y], weight=rest[0].reshape(channels * times, outputs).T[:, :, None, None], bias=bias)
    return _activate(network, node, y)


def _transposed(network: _Network, node: _Node, x: _Tensor) -> _Tensor:
    kernel, stride, dilation = _kernel(node)
    axes = _axes(node)
    x = network.image(node, x, axes)
    outputs, channels = node.integer("filters"), x.shape[0]
    mode = node.get("padding", str, "valid")
    if mode not in ("same", "valid"):
        node.refuse(f"has padding {mode!r}; required: 'valid' or 'same'")
    extra = None if node.settings.get("output_padding") is None else node.pair("output_padding", axes, 0)
    before, after, more, places = [0, 0], [0, 0], [0, 0], 1
    for axis in (2 - axes, 1)[-axes:]:
        span, size = dilation[axis] * (kernel[axis] - 1) + 1, x.shape[1 + axis]
        whole = (size - 1) * stride[axis] + span
        if extra is not None:
            made = whole + extra[axis] - (2 * (span // 2) if mode == "same" else 0)
        else:
            made = size * stride[axis] + (max(span - stride[axis], 0) if mode == "valid" else 0)
        if made < 1 or (extra is not None and extra[axis] >= stride[axis]):
            node.refuse(f"has a kernel of {kernel[axis]}, stride {stride[axis]} and output_padding {extra} over {size} places; "
                        "required: an output of one place at least, and an output_padding less than the stride")
        # TensorFlow's: the way back through a convolution that makes the input from the output.
        total = max((size - 1) * stride[axis] + span - made, 0) if mode == "same" else 0
        before[axis] = total // 2
        more[axis] = max(made + total - whole, 0)
        after[axis] = whole + more[axis] - before[axis] - made
        places *= stride[axis] * (span // stride[axis] + 2)
    network.check_size(node, (channels, outputs, places))
    network.check_size(node, (outputs, *((x.shape[1 + a] + kernel[a] * dilation[a]) * stride[a] for a in (0, 1))))
    weight, *bias = network.arrays(node, ("kernel", (*kernel[2 - axes:], outputs, channels)), *_with_bias(node, outputs))
    weight = weight.reshape(*kernel, outputs, channels).transpose(3, 2, 0, 1)
    fields, index = transposed_convolution(weight, bias[0] if bias else None, x.shape, stride, (before[0], before[1], after[0], after[1]),
                                           dilation, 1, more)
    y = network.add(Conv2d, node, [x], part="/phases", **fields)
    return _activate(network, node, network.add(Rearrange, node, [y], index=index))


def _dense(network: _Network, node: _Node, x: _Tensor) -> _Tensor:
    outputs = node.integer("units")
    if x.rank in (3, 4):  # every place for itself
        x = network.image(node, x, x.rank - 2)
        weight, *bias = network.arrays(node, ("kernel", (x.shape[0], outputs)), *_with_bias(node, outputs))
        y = network.add(Conv2d, node, [x], weight=weight.T[:, :, None, None], bias=bias[0] if bias else None)
        return _activate(network, node, y)
    if x.rank != 2:
        node.refuse(f"reads a tensor of {x.rank} axes; required: 2 to 4, the batch included")
    view = x.view
    if view is None or view.size != math.prod(x.shape) or not np.array_equal(np.sort(view), np.arange(view.size)):
        x, view = network.plain(node, x), None
    features = math.prod(x.shape)
    weight, *bias = network.arrays(node, ("kernel", (features, outputs)), *_with_bias(node, outputs))
    if view is not None:  # what Flatten makes: as it lies in memory, and the weights moved instead
        places = np.arange(features, dtype=np.int32)
        x = network.plain(node, x if np.array_equal(view, places) else replace(x, view=places))
        weight = weight[np.argsort(view)]
    y = network.add(Dense, node, [x], rank=2, weight=weight.T, bias=bias[0] if bias else None)
    return _activate(network, node, y)


def _activate(network: _Network, node: _Node, x: _Tensor, key: str = "activation") -> _Tensor:
    """What the setting `activation` makes of `x`: a name, a function's name in an object, or a layer."""
    value = node.settings.get(key)
    part = "" if node.kind == "Activation" else "/activation"
    if isinstance(value, dict):
        kind = _expect(value.get("class_name"), str, f"{node.where}: {key}")
        module = value.get("module")
        if module is not None and module != "builtins" and not _KERAS_MODULE.match(str(module)):
            node.refuse("has an activation of somebody's own, whose code is not in the file; required: Keras's own")
        if kind in ("ReLU", "LeakyReLU", "Softmax"):
            inner = _Node({"class_name": kind, "config": value.get("config"), "name": node.name + part}, 0, 1, "")
            inner.path, inner.where = node.path + part, f"{node.where} activation"
            return _LAYERS[kind](network, inner, x)
        value = value.get("config") if kind == "function" else kind
    name = "linear" if value is None else _expect(value, str, f"{node.where}: {key}")
    if name == "linear":
        return x
    if name == "relu":
        return network.elementwise(ReLU, node, x, part)
    if name == "relu6":
        return network.elementwise(Clip, node, x, part, low=0.0, high=6.0)
    if name == "leaky_relu":
        return network.elementwise(LeakyReLU, node, x, part, slope=0.2)
    if name in ("softmax", "log_softmax"):
        return network.add(Softmax, node, [network.plain(node, x)], part=part)
    advice = "; at the end of the network, save a model without it, whose output is the score" if name == "sigmoid" else ""
    return node.refuse(f"has activation {name[:60]!r}; required: linear, relu, relu6, leaky_relu or, at the end, softmax{advice}")


def _relu(network: _Network, node: _Node, x: _Tensor) -> _Tensor:
    slope = node.number("negative_slope", 0.0)
    most = None if node.settings.get("max_value") is None else node.number("max_value")
    if node.number("threshold", 0.0) != 0:
        node.refuse(f"has threshold {node.number('threshold'):g}; required: 0")
    if slope == 0:
        return network.elementwise(ReLU, node, x) if most is None else network.elementwise(Clip, node, x, low=0.0, high=most)
    y = network.elementwise(LeakyReLU, node, x, slope=slope)
    return y if most is None else network.elementwise(Clip, node, y, "/clip", low=-math.inf, high=most)


def _leaky_relu(network: _Network, node: _Node, x: _Tensor) -> _Tensor:
    slope = node.number("alpha" if node.settings.get("negative_slope") is None else "negative_slope", 0.3)
    return network.elementwise(LeakyReLU, node, x, slope=slope)


def _softmax(network: _Network, node: _Node, x: _Tensor) -> _Tensor:
    _require_last_axis(node, x)
    return network.add(Softmax, node, [network.plain(node, x)])


def _require_last_axis(node: _Node, x: _Tensor) -> None:
    axis = node.settings.get("axis", -1)
    axis = axis[0] if isinstance(axis, list) and len(axis) == 1 else axis
    if axis not in (-1, x.rank - 1) or isinstance(axis, bool):
        node.refuse(f"has axis {str(axis)[:40]} over {x.rank} axes; required: -1, the channels or features")


def _batch_norm(network: _Network, node: _Node, x: _Tensor) -> _Tensor:
    _require_last_axis(node, x)
    x = network.plain(node, x)
    has_scale, has_center = node.get("scale", bool, True), node.get("center", bool, True)
    wanted = ["gamma"] * has_scale + ["beta"] * has_center + ["moving_mean", "moving_variance"]
    arrays = network.arrays(node, *((name, (x.shape[0],)) for name in wanted))
    found = {name: array.astype(np.float64) for name, array in zip(wanted, arrays, strict=True)}
    scale = found.get("gamma", 1.0) / np.sqrt(found["moving_variance"] + node.number("epsilon", 1e-3))
    return network.add(BatchNorm, node, [x], scale=scale, shift=found.get("beta", 0.0) - found["moving_mean"] * scale)


def _rescaling(network: _Network, node: _Node, x: _Tensor) -> _Tensor:
    return _affine(network, node, x, node.numbers("scale"), node.numbers("offset"))


def _normalization(network: _Network, node: _Node, x: _Tensor) -> _Tensor:
    axis = node.settings.get("axis", -1)
    if axis not in (None, []):
        _require_last_axis(node, x)
    if node.settings.get("mean") is not None:
        mean, variance = node.numbers("mean"), node.numbers("variance")
    else:
        shape = () if axis in (None, []) else (x.shape[0],)
        mean, variance = (np.ravel(array).astype(np.float64) for array in network.arrays(node, ("mean", shape), ("variance", shape)))
    if mean.size != variance.size:
        node.refuse(f"has {mean.size} means and {variance.size} variances; required: as many of each")
    deviation = np.maximum(np.sqrt(variance), _EPSILON)
    if node.get("invert", bool, False):
        return _affine(network, node, x, deviation, mean)
    return _affine(network, node, x, 1 / deviation, -mean / deviation)


def _affine(network: _Network, node: _Node, x: _Tensor, scale: Constant, shift: Constant) -> _Tensor:
    x = network.plain(node, x)
    if any(len(number) not in (1, x.shape[0]) for number in (scale, shift)):
        node.refuse(f"has {len(scale)} factors and {len(shift)} offsets for {x.shape[0]} channels; required: one, or one for each channel")
    return network.add(BatchNorm, node, [x], scale=np.broadcast_to(scale, x.shape[0]), shift=np.broadcast_to(shift, x.shape[0]))


def _pool(network: _Network, node: _Node, x: _Tensor) -> _Tensor:
    node.require_channels_last()
    axes, is_average = _axes(node), node.kind.startswith("Average")
    x = network.image(node, x, axes, padded=True)
    kernel = node.pair("pool_size", axes, default=2)
    stride = kernel if node.settings.get("strides") is None else node.pair("strides", axes)
    may_join = node.get("padding", str, "valid") == "valid" and all(x.pad[i] < kernel[i % 2] for i in range(4))
    if x.pad != NO_PADDING and not (may_join and (is_average or _is_nonnegative(network.layers.get(x.layer)))):
        x = network.plain(node, x)
    padding = sum_of(_same_or_valid(node, x, kernel, stride), x.pad)
    if is_average:
        return network.add(AveragePool2d, node, [x], kernel=kernel, stride=stride, padding=padding, count_include_pad=x.pad != NO_PADDING)
    return network.add(MaxPool2d, node, [x], kernel=kernel, stride=stride, padding=padding)


def _is_nonnegative(layer: Layer | None) -> bool:
    """Whether a zero beside the layer's output changes no maximum."""
    return isinstance(layer, ReLU) or (isinstance(layer, Clip) and layer.low >= 0)


def _global_pool(network: _Network, node: _Node, x: _Tensor) -> _Tensor:
    node.require_channels_last()
    x = network.image(node, x, _axes(node))
    rank = x.rank if node.get("keepdims", bool, False) else 2
    if "Max" in node.kind:
        return network.add(MaxPool2d, node, [x], rank, kernel=x.shape[1:])
    return network.add(GlobalAveragePool, node, [x], rank)


def _zero_padding(network: _Network, node: _Node, x: _Tensor) -> _Tensor:
    node.require_channels_last()
    axes = _axes(node)
    x = network.image(node, x, axes, padded=True)
    pad = sum_of(node.sides("padding", axes, 1), x.pad)
    network.check_size(node, (x.shape[0], x.shape[1] + pad[0] + pad[2], x.shape[2] + pad[1] + pad[3]))
    return replace(x, pad=pad, made_by=node.path)


def _cropping(network: _Network, node: _Node, x: _Tensor) -> _Tensor:
    node.require_channels_last()
    axes = _axes(node)
    if x.rank != axes + 2:
        node.refuse(f"reads a tensor of {x.rank} axes, the batch included; required: {axes + 2}")
    top, left, bottom, right = node.sides("cropping", axes, 0 if axes == 2 else 1)
    index = network.numbering(x)
    index = index[left:index.shape[0] - right] if axes == 1 else index[top:index.shape[0] - bottom, left:index.shape[1] - right]
    if not index.size:
        node.refuse("crops everything away; required: one row and column at least that stay")
    return network.viewed(node, x, index)


def _upsampling(network: _Network, node: _Node, x: _Tensor) -> _Tensor:
    node.require_channels_last()
    axes = _axes(node)
    if x.rank != axes + 2:
        node.refuse(f"reads a tensor of {x.rank} axes, the batch included; required: {axes + 2}")
    if node.get("interpolation", str, "nearest") != "nearest":
        node.refuse(f"has interpolation {node.get('interpolation', str)!r}; required: nearest")
    times = node.pair("size", axes, default=2)[2 - axes:]
    index = network.numbering(x)
    network.check_size(node, (index.size, *times))
    for axis, count in enumerate(times):
        index = np.repeat(index, count, axis)
    return network.viewed(node, x, index)


def _flatten(network: _Network, node: _Node, x: _Tensor) -> _Tensor:
    node.require_channels_last()
    return x if x.rank == 2 else network.viewed(node, x, network.numbering(x).ravel())


def _reshape(network: _Network, node: _Node, x: _Tensor) -> _Tensor:
    target = [_expect(n, int, f"{node.where}: target_shape") for n in node.get("target_shape", list)]
    index = network.numbering(x)
    known = math.prod(n for n in target if n != -1)
    if target.count(-1) == 1 and known > 0 and index.size % known == 0:
        target[target.index(-1)] = index.size // known
    if not 1 <= len(target) <= 8 or min(target) < 1 or math.prod(target) != index.size:
        node.refuse(f"makes {str(target)[:60]} of {index.size} numbers; required: as many, in 1 to 8 axes")
    return network.viewed(node, x, index.reshape(target))


def _permute(network: _Network, node: _Node, x: _Tensor) -> _Tensor:
    index = network.numbering(x)
    axes = node.integers("dims", index.ndim, 1)
    if sorted(axes) != list(range(1, index.ndim + 1)):
        node.refuse(f"has dims {axes}; required: each of 1 to {index.ndim} once")
    return network.viewed(node, x, index.transpose([axis - 1 for axis in axes]))


def _same_ranks(network: _Network, node: _Node, inputs: list[_Tensor]) -> list[_Tensor]:
    if len(inputs) < 2 or len({x.rank for x in inputs}) > 1:
        node.refuse(f"reads tensors of {[x.rank for x in inputs]} axes; required: two or more of one number of axes")
    return [network.plain(node, x) for x in inputs]


def _add(network: _Network, node: _Node, inputs: list[_Tensor]) -> _Tensor:
    terms = _same_ranks(network, node, inputs)
    total = terms[0]
    for i, term in enumerate(terms[1:], 1):
        total = network.add(Add, node, [total, term], part="" if i == len(terms) - 1 else f"/{i}")
    return total


def _concatenate(network: _Network, node: _Node, inputs: list[_Tensor]) -> _Tensor:
    parts = _same_ranks(network, node, inputs)
    _require_last_axis(node, parts[0])
    return network.add(Concat, node, parts)


_LAYERS: dict[str, Callable[[_Network, _Node, Any], _Tensor]] = {
    "Activation": _activate, "ActivityRegularization": _keep, "Add": _add, "AlphaDropout": _keep, "AveragePooling1D": _pool,
    "AveragePooling2D": _pool, "BatchNormalization": _batch_norm, "BatchNormalizationV1": _batch_norm, "Concatenate": _concatenate,
    "Conv1D": _conv, "Conv1DTranspose": _transposed, "Conv2D": _conv, "Conv2DTranspose": _transposed, "Cropping1D": _cropping,
    "Cropping2D": _cropping, "Dense": _dense, "DepthwiseConv1D": _depthwise, "DepthwiseConv2D": _depthwise, "Dropout": _keep,
    "Flatten": _flatten, "GaussianDropout": _keep, "GaussianNoise": _keep, "GlobalAveragePooling1D": _global_pool,
    "GlobalAveragePooling2D": _global_pool, "GlobalMaxPooling1D": _global_pool, "GlobalMaxPooling2D": _global_pool, "Identity": _keep,
    "InputLayer": _keep, "LeakyReLU": _leaky_relu, "MaxPooling1D": _pool, "MaxPooling2D": _pool, "Normalization": _normalization,
    "Permute": _permute, "RandomBrightness": _keep, "RandomContrast": _keep, "RandomFlip": _keep, "RandomRotation": _keep,
    "RandomTranslation": _keep, "RandomZoom": _keep, "ReLU": _relu, "Rescaling": _rescaling, "Reshape": _reshape,
    "SeparableConv1D": _depthwise, "SeparableConv2D": _depthwise, "Softmax": _softmax, "SpatialDropout1D": _keep, "SpatialDropout2D": _keep,
    "UpSampling1D": _upsampling, "UpSampling2D": _upsampling, "ZeroPadding1D": _zero_padding, "ZeroPadding2D": _zero_padding,
}
_INSTEAD = {
    "Lambda": "a layer of Keras's own, Rescaling say; the code in a Lambda is never run",
    "TFOpLambda": "layers in place of TensorFlow's functions, Rescaling in place of preprocess_input's arithmetic say",
    "SlicingOpLambda": "Cropping2D in place of slices",
    "TrueDivide": "a Rescaling layer", "Subtract": "a Rescaling layer, where what is subtracted is constant",
    "Multiply": "Rescaling, where one factor is constant; products of two tensors, as in squeeze-and-excitation, have no rule",
    "Average": "Add, and Rescaling behind it", "Maximum": "MaxPooling2D over what lies side by side",
    "PReLU": "LeakyReLU", "ELU": "ReLU or LeakyReLU", "LocallyConnected2D": "Conv2D", "Conv3D": "Conv2D",
    "LayerNormalization": "BatchNormalization", "GroupNormalization": "BatchNormalization", "UnitNormalization": "BatchNormalization",
    "Resizing": "a model that begins behind it, for fastdtd resizes pictures", "CenterCrop": "Cropping2D", "RandomCrop": "Cropping2D",
    "TimeDistributed": "the layer in it, where there is one step only",
}
