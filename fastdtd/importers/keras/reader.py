"""Keras's configuration -> layers' calls, in an order in which each comes after those that it reads.

The configuration is data: classes are looked up in the table in operators.py, and no code in the file is ever run.
"""

from __future__ import annotations

import graphlib
import heapq
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastdtd import hdf5
from fastdtd.errors import ConversionError
from fastdtd.graph import INPUT, MAX_LAYERS, MAX_TENSOR_ELEMENTS, MAX_WEIGHT_ELEMENTS, Shape
from fastdtd.importers import moves
from fastdtd.importers.budget import Budget
from fastdtd.importers.builder import Builder, Parsed, chosen
from fastdtd.importers.keras import files
from fastdtd.importers.keras.files import MODELS, expect, is_keras_module
from fastdtd.importers.keras.operators import IGNORED, IGNORED_ENDINGS, INSTEAD, OPERATORS, UNREAD, unchanged
from fastdtd.importers.keras.runtime import KerasRuntime
from fastdtd.importers.moves import Array
from fastdtd.importers.tensors import Tensor, layer_shape, side_by_side

MAX_NESTING = 16  # models in models
_DTYPES = {"float16", "float32", "float64", "bfloat16", "mixed_float16", "mixed_bfloat16"}

Reference = tuple[str, int, int]  # a layer's name, which of its calls, which of its outputs


@dataclass(frozen=True)
class Constant:
    """What an operation is called on beside tensors, as it stands in the file: a number, an array, or an index."""

    value: Any


def parse(data: bytes, size: tuple[int, int] | None = None, limit: int | None = None,
          output: int | str | None = None) -> Parsed:
    """The network in a .keras or .h5 file: an output, and the layers that lead to it.

    output: its number, or the name of any layer; None: the first.
    The format is the version of Keras that wrote it. size: replaces the input size in the file. limit: bytes, see
    `Budget`. Raises ConversionError and ModelError.
    """
    def read(config: dict[str, Any], weights: files.NumberedWeights | files.NamedWeights, version: Any
             ) -> tuple[Any, KerasRuntime]:
        reader = Reader(weights, Budget(len(data), limit), not str(version).startswith(("1.", "2.")))
        layers, inputs, which = reader.read(config, size, output)
        return (layers, reader.input_shapes), KerasRuntime(reader.builder, inputs, content=data, which=which)

    ((layers, shapes), runtime), file_format = files.read(data, read)
    return Parsed(layers, runtime.inputs[0].shape, file_format, runtime, shapes)


class Node(moves.Node):
    """A layer's configuration, and what the layer is called on."""

    def __init__(self, entry: Any, index: int, count: int, outer: str) -> None:
        where = f"layer {index + 1} of {count}" + (f" in {outer!r}" if outer else "")
        entry = expect(entry, dict, where)
        self.kind: str = expect(entry.get("class_name"), str, f"{where}: class_name")
        self.entry, self.settings = entry, entry.get("config")
        self._read: set[str] = set()
        name = entry.get("name")
        if name is None and isinstance(self.settings, dict):
            name = self.settings.get("name")
        self.name: str = expect(self.kind.lower() if name is None else name, str, f"{where}: name")
        self.layer_name = f"{outer}/{self.name}" if outer else self.name
        self.where = f"{self.kind} {self.layer_name!r} (layer {index + 1} of {count})"
        self.location: Any = None  # of its weights
        self.reader: Reader
        self.inputs: list[Tensor | Constant] = []
        if not is_keras_module(entry.get("module")) or ">" in str(entry.get("registered_name")) or ">" in self.kind:
            self.refuse("is a class of somebody's own, whose code is not in the file and would not be run; required: "
                        "Keras's own layers")
        if self.kind not in MODELS:
            self.settings = expect(self.settings, dict, f"{self}: config")

    def __str__(self) -> str:
        return self.where

    def inner(self, kind: str, settings: Any, part: str, x: Tensor) -> Node:
        """A layer in a setting of this one, called on `x`."""
        node = Node({"class_name": kind, "config": settings, "name": self.name + part}, 0, 1, "")
        node.layer_name, node.where, node.inputs = self.layer_name + part, f"{self} activation", [x]
        return node

    # Inputs and weights

    def tensor(self) -> Tensor:
        """The only input."""
        found = self._only_tensors()
        if len(found) != 1:
            self.refuse(f"has {len(found)} inputs; required: one")
        return found[0]

    def tensors(self) -> list[Tensor]:
        found = self._only_tensors()
        if len(found) < 2 or len({x.rank for x in found}) > 1:
            self.refuse(f"reads tensors of {[x.rank for x in found]} axes; required: two or more of one number of "
                        "axes")
        return found

    def _only_tensors(self) -> list[Tensor]:
        found = [x for x in self.inputs if isinstance(x, Tensor)]
        if len(found) < len(self.inputs):
            self.refuse("is called on a constant; required: nothing but tensors")
        return found

    def operands(self) -> list[Tensor | Array]:
        """Two inputs, of which one may be a number or an array."""
        if len(self.inputs) != 2:
            self.refuse(f"has {len(self.inputs)} inputs; required: two")
        return [x if isinstance(x, Tensor) else self._array(x) for x in self.inputs]

    def _array(self, constant: Constant) -> Array:
        try:
            array = np.asarray(_without_type(constant.value))
        except ValueError:  # lists of different lengths
            array = np.asarray(None)
        if array.dtype.kind not in "iuf":
            self.refuse(f"is called on {str(constant.value)[:60]}; required: a tensor, a number or an array of numbers")
        return array

    def index(self) -> tuple[Tensor, list[int | slice | None]]:
        """A tensor and its index, with a slice for what an ellipsis leaves out."""
        x, *rest = self.inputs
        if not isinstance(x, Tensor) or len(rest) != 1 or not isinstance(rest[0], Constant):
            self.refuse("is not called on a tensor and an index; required: both")
        entries = rest[0].value if isinstance(rest[0].value, list) else [rest[0].value]
        kinds = [entry.get("class_name") if isinstance(entry, dict) else "" for entry in entries]
        others = sum(entry is not None and kind != "__ellipsis__" for entry, kind in zip(entries, kinds, strict=True))
        if kinds.count("__ellipsis__") > 1 or others > x.rank:
            self.refuse(f"has an index of {others} axes, or two ellipses; required: at most {x.rank}, and one")
        found: list[int | slice | None] = []
        where = f"{self}: index"
        for entry, kind in zip(entries, kinds, strict=True):
            if kind == "__ellipsis__":
                found += [slice(None)] * (x.rank - others)
            elif kind == "__slice__":
                ends = expect(entry.get("config"), dict, where)
                start, stop, step = (None if ends.get(key) is None else expect(ends[key], int, where)
                                     for key in ("start", "stop", "step"))
                if step == 0:
                    self.refuse("has a step of 0; required: another")
                found.append(slice(start, stop, step))
            else:
                found.append(None if entry is None else expect(entry, int, where))
        return x, found

    def image(self) -> tuple[Tensor, int]:
        """The only input, with its channels first, and how many spatial axes the layer is for."""
        x, axes = self.tensor(), 1 if "1D" in self.kind else 2
        if x.rank != axes + 2:
            self.refuse(f"reads a tensor of {x.rank} axes, the batch included; required: {axes + 2}")
        return (x if self.has_channels_first() else self.reader.builder.channels_first(x)), axes

    def has_channels_first(self) -> bool:
        """Whether the layer's images are (N, C, H, W)."""
        found = self.get("data_format", str, "channels_last")
        if found not in ("channels_first", "channels_last"):
            self.refuse(f"has data_format {found[:40]!r}; required: channels_first or channels_last")
        return bool(found == "channels_first")

    def restored(self, x: Tensor) -> Tensor:
        """An image as the layer has it, from one with the channels first."""
        return x if self.has_channels_first() else self.reader.builder.channels_last(x)

    def channel_axis(self, x: Tensor) -> int:
        """The axis that the layer works along: 1 or the last, which are the channels or features."""
        axis = self.setting("axis", -1)
        axis = axis[0] if isinstance(axis, list) and len(axis) == 1 else axis
        if axis not in (-1, 1, x.rank - 1) or isinstance(axis, bool) or x.rank < 2:
            self.refuse(f"has axis {str(axis)[:40]} over {x.rank} axes; required: -1 or 1, the channels or features")
        return int(axis) % x.rank

    def arrays(self, *wanted: tuple[str, tuple[int, ...]]) -> list[Array]:
        """The layer's weights, in Keras's order. wanted: names, as in 'kernel|depthwise_kernel', and shapes."""
        found = self.reader.weights.find(self, [name.split("|") for name, _ in wanted])
        arrays = []
        for (names, shape), data in zip(wanted, found, strict=True):
            name = names.split("|")[0]
            if data is None:
                self.refuse(f"has no {name} in the file; required: weights of shape {shape}")
            stored = hdf5.dataset(data, f"{self} {name}", tuple(range(5)), MAX_WEIGHT_ELEMENTS).shape
            if stored != shape:
                self.refuse(f"has {name} of shape {stored}; required by its settings and its input: {shape}")
            self.reader.builder.spend(math.prod(shape))
            arrays.append(hdf5.array(data, f"{self} {name}", (len(shape),), MAX_WEIGHT_ELEMENTS, bfloat16=True))
        return arrays

    def bias(self, outputs: int) -> list[tuple[str, tuple[int, ...]]]:
        """For `arrays`, where there is one."""
        return [("bias", (outputs,))] if self.get("use_bias", bool, True) else []

    # Settings

    def setting(self, key: str, default: Any = None) -> Any:
        """As it stands in the file."""
        self._read.add(key)
        return self.settings.get(key, default)

    def check_read(self) -> None:
        """Refuse what was given and not read, unless it is what is computed without it."""
        for key, value in self.settings.items():
            is_known = key in self._read or key in IGNORED or key.endswith(IGNORED_ENDINGS)
            if not is_known and value is not None and value != (default := UNREAD.get(key)):
                self.refuse_unread(f"{key[:60]} {str(value)[:60]}", default)

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        value = self.setting(key)
        return default if value is None and default is not None else expect(value, kind, f"{self}: {key}")

    def has(self, key: str) -> bool:
        return self.setting(key) is not None

    def integer(self, key: str, default: int | None = None) -> int:
        value: int = self.get(key, int, default)
        if value < 1:
            self.refuse(f"has {key} {value}; required: a whole number from 1")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.setting(key)
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        return self._finite(default if value is None and default is not None else value, key)

    def _finite(self, value: Any, key: str) -> float:
        try:
            number = float(expect(value, float, f"{self}: {key}"))
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            self.refuse(f"has {key} {str(value)[:40]}; required: a finite number")
        return number

    def numbers(self, key: str) -> Array:
        """One number, or lists of them, as one axis."""
        flat: list[float] = []
        waiting = [_without_type(self.setting(key))]
        while waiting:
            value = waiting.pop()
            if isinstance(value, list):
                waiting.extend(reversed(value))
            else:
                flat.append(self._finite(value, key))
        return np.array(flat, np.float64)

    def integers(self, key: str, count: int, low: int = 1, default: Any = None) -> tuple[int, ...]:
        """`count` whole numbers from `low`; one stands for all."""
        value = self.setting(key)
        value = default if value is None else value
        values: list[Any] = [value] * count if isinstance(value, int) else expect(value, list, f"{self}: {key}")
        checked = [expect(v, int, f"{self}: {key}") for v in values]
        if len(checked) != count or min(checked) < low or max(checked) >= 2**31:
            self.refuse(f"has {key} {str(value)[:60]}; required: {count} whole numbers from {low}")
        return tuple(checked)

    def sides(self, key: str, axes: int, default: int) -> list[tuple[int, int]]:
        """(before, after) for each of the spatial axes."""
        if axes == 1:
            before, after = self.integers(key, 2, 0, default)
            return [(before, after)]
        value = self.setting(key)
        value = default if value is None else value
        both: list[Any] = [value, value] if isinstance(value, int) else expect(value, list, f"{self}: {key}")
        pairs: list[list[Any]] = [[v, v] if isinstance(v, int) else expect(v, list, f"{self}: {key}") for v in both]
        flat = [expect(v, int, f"{self}: {key}") for pair in pairs for v in pair]
        if [len(pair) for pair in pairs] != [2, 2] or min(flat) < 0 or max(flat) >= 2**31:
            self.refuse(f"has {key} {str(value)[:60]}; required: two pairs of whole numbers from 0")
        return [(flat[0], flat[1]), (flat[2], flat[3])]

    def check_type(self) -> None:
        if self.kind not in OPERATORS:
            known = f"supported: {', '.join(sorted((*OPERATORS, 'Functional', 'Sequential')))}"
            self.refuse("is of a class that is not supported; "
                        + (f"what works: {INSTEAD[self.kind]}" if self.kind in INSTEAD else known))
        policy = self.setting("dtype")
        kind = policy.get("class_name") if isinstance(policy, dict) else None
        if isinstance(policy, dict):
            policy = policy["config"].get("name") if isinstance(policy.get("config"), dict) else kind
        advice = "required: floating-point weights. Save the model before it is quantized"
        is_known = policy is None or str(policy) in _DTYPES or self.kind == "InputLayer"
        if not is_known or "Quantized" in str(kind):
            self.refuse(f"computes in {str(policy)[:60]!r}; {advice}")
        if self.has("quantization_config"):
            self.refuse(f"is quantized; {advice}")


class Reader:
    """Calls layers, and models of layers, one after the other.

    is_keras_3: whether functions are as they have been since Keras 3
    """

    def __init__(self, weights: files.NumberedWeights | files.NamedWeights, budget: Budget, is_keras_3: bool) -> None:
        self.weights, self.is_keras_3 = weights, is_keras_3
        self.builder = Builder(budget)
        self._depth = self._calls = 0
        self.input_shapes: dict[str, Shape] = {}

    def read(self, config: dict[str, Any], size: tuple[int, int] | None, wanted: int | str | None
             ) -> tuple[list[Any], list[Tensor], int | str]:
        """The layers, the inputs, and which of the outputs, or which layer's."""
        kind = expect(config.get("class_name"), str, "class_name")
        if kind not in MODELS:
            raise ConversionError(f"the model is of class {kind!r}; required: Sequential or Functional, whose layers "
                                  "are in the file")
        top = Node(config, 0, 1, "")
        top.where, top.layer_name = "the model", "output"
        nodes = _nodes(top, "")
        self.weights.locate(None, nodes)
        calls = None if kind == "Sequential" else _Calls(top, nodes)
        channels_first = _first_data_format(config) == "channels_first"
        first = nodes[:1] if calls is None else [calls.nodes[name] for name, _, _ in calls.inputs]
        whole = [_input(node, top, size, channels_first) for node in first]
        inputs = side_by_side(whole)
        if len(inputs) > 1:
            self.input_shapes = {node.name: x.shape for node, x in zip(first, whole, strict=True)}
        which: int | str = 0
        if calls is not None:
            which = calls.choose(wanted)
            output = calls.run(self, inputs)[0]
        else:
            names = [node.name for node in nodes]
            if isinstance(wanted, str):
                which = names[chosen(wanted, names)]
                nodes = nodes[:names.index(which) + 1]
            else:
                chosen(wanted, names[-1:])
            output = self._run(nodes, inputs)
        with self.builder.at(top):
            is_last = output.rank <= 4 and not channels_first
            layers = self.builder.leading_to(self.builder.scores(
                self.builder.channels_first(output) if is_last else output))
        if not layers:
            raise ConversionError("the network has no layers that compute anything")
        return layers, inputs, which

    def call(self, node: Node, inputs: Sequence[Tensor | Constant]) -> list[Tensor]:
        """The outputs of `node`."""
        self._calls += 1
        if self._calls > MAX_LAYERS:
            node.refuse(f"is called as number {self._calls}; at most {MAX_LAYERS} calls of layers are accepted")
        node.reader, node.inputs = self, list(inputs)
        if node.kind in MODELS:
            return self._call_model(node, [x for x in inputs if isinstance(x, Tensor)])
        node.check_type()
        with self.builder.at(node):
            made = OPERATORS[node.kind](self.builder, node)
        if OPERATORS[node.kind] is not unchanged:
            node.check_read()
        return [made]

    def _call_model(self, model: Node, inputs: list[Tensor]) -> list[Tensor]:
        self._depth += 1
        if self._depth > MAX_NESTING:
            model.refuse(f"lies in {self._depth} other models; at most {MAX_NESTING} are accepted")
        nodes = _nodes(model, model.layer_name)
        self.builder.budget.step(model, len(nodes))  # for a model may be called again and again
        self.weights.locate(model, nodes)
        is_sequential = model.kind == "Sequential"
        outputs = [self._run(nodes, inputs)] if is_sequential else _Calls(model, nodes).run(self, inputs)
        self._depth -= 1
        return outputs

    def _run(self, nodes: list[Node], inputs: list[Tensor]) -> Tensor:
        """A Sequential model."""
        values = inputs
        for node in nodes:
            values = self.call(node, values)
        if len(values) != 1:
            nodes[-1].refuse(f"has {len(values)} outputs, at the end of a Sequential model; required: one")
        return values[0]


def _first_data_format(config: Any) -> str:
    """Where the channels of images are, by the first layer that says so: the input's layer does not."""
    waiting = [config]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if isinstance(found := value.get("data_format"), str):
                return found
            waiting.extend(list(value.values())[::-1])
        elif isinstance(value, list):
            waiting.extend(value[::-1])
    return "channels_last"


def _input(node: Node, model: Node, size: tuple[int, int] | None, channels_first: bool) -> Tensor:
    """The network's input, from the layer that says its shape."""
    settings = node.settings if isinstance(node.settings, dict) else {}
    shape = next((settings[key] for key in ("batch_shape", "batch_input_shape") if settings.get(key) is not None), None)
    if shape is None and isinstance(model.settings, dict):
        shape = model.settings.get("build_input_shape")
    if shape is None:
        node.refuse("comes first and does not say its input's shape; required: a model that begins with keras.Input, "
                    "or was built")
    where = f"{node}: input shape"
    axes = [0 if n is None else expect(n, int, where) for n in expect(shape, list, where)][1:]
    pixels = slice(1, 3) if channels_first else slice(0, 2)
    if len(axes) == 3:
        axes[pixels] = size or axes[pixels]
    elif size is not None:
        raise ConversionError(f"the input has shape {shape}, without a height and a width; required: no size")
    if not 1 <= len(axes) <= 3:
        raise ConversionError(f"the input has shape {shape}; required: (N, H, W, C), (N, L, C) or (N, F)")
    if min(axes) < 1:
        is_image = len(axes) == 3 and axes[0 if channels_first else 2] > 0
        raise ConversionError(f"the input has shape {shape}, which leaves its size open; "
                              + ("give size=(height, width)" if is_image else "required: a model that fixes it"))
    if math.prod(axes) > MAX_TENSOR_ELEMENTS:
        raise ConversionError(f"the input has shape {shape}; at most {MAX_TENSOR_ELEMENTS} elements are accepted")
    if channels_first:
        return Tensor.whole(INPUT, layer_shape(axes), axes)
    dims = axes[-1:] + axes[:-1]
    whole = Tensor.whole(INPUT, layer_shape(dims), dims, "input/channels_last")
    return whole.transposed([*range(1, len(dims)), 0]) or whole


def _nodes(model: Node, outer: str) -> list[Node]:
    entries = model.settings
    if model.kind != "Sequential" or not isinstance(entries, list):  # which it was before Keras 2.2
        entries = expect(expect(entries, dict, f"{model}: config").get("layers"), list, f"{model}: layers")
    if not entries:
        model.refuse("has no layers")
    nodes = [Node(entry, i, len(entries), outer) for i, entry in enumerate(entries)]
    if len({node.name for node in nodes}) < len(nodes):
        model.refuse("has two layers of one name; required: a name for each that no other has")
    return nodes


class _Calls:
    """A functional model: which layer is called on what."""

    def __init__(self, model: Node, nodes: list[Node]) -> None:
        self.model = model
        self.nodes = {node.name: node for node in nodes}
        self.inputs = self._ends("input_layers")
        self.outputs = self._ends("output_layers")
        self.reads: dict[tuple[str, int], list[Reference | Constant]] = {}
        for node in nodes:
            entries = expect(node.entry.get("inbound_nodes", []), list, f"{node}: inbound_nodes")
            for i, entry in enumerate(entries):
                self.reads[node.name, i] = _references(node, entry)
        # Keras counts from 1 the calls of a model that is called already when it is made.
        first: dict[str, int] = {}
        everything = [*self.outputs, *self.inputs, *itertools.chain(*map(_only_references, self.reads.values()))]
        for name, i, _ in everything:
            first[name] = min(i, first.get(name, i))
        self.offset = {name: 1 if i == 1 and self.nodes[name].kind in MODELS else 0
                       for name, i in first.items() if name in self.nodes}

    def _ends(self, key: str) -> list[Reference]:
        where = f"{self.model}: {key}"
        value = expect(self.model.settings, dict, f"{self.model}: config").get(key)
        value = list(value.values()) if isinstance(value, dict) else expect(value, list, where)
        ends = [_reference(entry, where) for entry in ([value] if value and isinstance(value[0], str) else value)]
        for name, _, _ in ends:
            if name not in self.nodes:
                self.model.refuse(f"has {name!r} among its {key}, which is none of its layers")
        if not ends:
            self.model.refuse(f"has no {key}; required: one or more")
        return ends

    def choose(self, wanted: int | str | None) -> int | str:
        """One of the outputs by its number, or a layer by its name, as the only output; returns which."""
        if isinstance(wanted, str) and wanted in self.nodes:
            last = max((i for name, i in self.reads if name == wanted), default=0)
            self.outputs = [(wanted, last, 0)]
            return wanted
        which = chosen(wanted, [name for name, _, _ in self.outputs])
        self.outputs = self.outputs[which:which + 1]
        return which

    def run(self, reader: Reader, inputs: list[Tensor]) -> list[Tensor]:
        if len(inputs) != len(self.inputs):
            self.model.refuse(f"is called on {len(inputs)} tensors; required: {len(self.inputs)}")
        values = {(name, 0): [x] for (name, _, _), x in zip(self.inputs, inputs, strict=True)}
        for call in self._order(set(values)):
            node = self.nodes[call[0]]
            values[call] = reader.call(node, [x if isinstance(x, Constant) else self._value(values, x, node)
                                              for x in self.reads[call]])
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
                self.nodes[call[0]].refuse(f"is read as called {call[1] + 1} times, which it is not, or is an input "
                                           "that the model does not list; required: inbound_nodes for each call")
            before = [self._call(reference, self.nodes[call[0]]) for reference in _only_references(self.reads[call])]
            sorter.add(call, *before)
            waiting.extend(before)
        try:
            sorter.prepare()
        except graphlib.CycleError as error:
            names = ", ".join(repr(name) for name, _ in error.args[1][:5])
            raise ConversionError(f"the network has a cycle through {names}; required: layers that lead forward only"
                                  ) from None
        positions = {name: i for i, name in enumerate(self.nodes)}
        ready: list[tuple[int, tuple[str, int]]] = []
        while sorter.is_active():
            for call in sorter.get_ready():
                heapq.heappush(ready, (positions[call[0]], call))
            call = heapq.heappop(ready)[1]
            sorter.done(call)
            if call not in given:
                yield call

    def _call(self, reference: Reference, reader: Node) -> tuple[str, int]:
        name, i, _ = reference
        if name not in self.nodes:
            reader.refuse(f"reads {name!r}, which is no layer beside it")
        return name, i - self.offset[name]

    def _value(self, values: dict[tuple[str, int], list[Tensor]], reference: Reference, reader: Node) -> Tensor:
        outputs = values[self._call(reference, reader)]
        if not 0 <= reference[2] < len(outputs):
            reader.refuse(f"reads output {reference[2] + 1} of {reference[0]!r}, which has {len(outputs)}")
        return outputs[reference[2]]


def _reference(entry: Any, where: str) -> Reference:
    entry = expect(entry, list, where)
    if len(entry) not in (3, 4):
        raise ConversionError(f"{where} refers to {str(entry)[:60]}; required: a layer's name, and the numbers of its "
                              "call and output")
    name, call, output = entry[:3]
    return expect(name, str, where), expect(call, int, where), expect(output, int, where)


def _only_references(arguments: Sequence[Reference | Constant]) -> list[Reference]:
    return [x for x in arguments if not isinstance(x, Constant)]


def _references(node: Node, entry: Any) -> list[Reference | Constant]:
    """What one call of `node` is given, in either dialect."""
    where = f"{node}: inbound_nodes"
    if isinstance(entry, list):  # Keras 2: [[layer, call, output, further arguments], ...]
        entries: Sequence[Any] = [entry] if entry and isinstance(entry[0], str) else entry
        for each in entries:
            if isinstance(each, list) and len(each) == 4:
                _check_arguments(node, expect(each[3], dict, where))
        return [_reference(each, where) for each in entries]
    entry = expect(entry, dict, where)
    found: list[Reference | Constant] = []
    waiting = list(reversed(expect(entry.get("args"), list, where)))
    while waiting:
        value = waiting.pop()
        if isinstance(value, list) and all(isinstance(x, list) or _is_tensor(x) for x in value):
            waiting.extend(reversed(value))
        elif _is_tensor(value):
            settings = expect(value.get("config"), dict, where)
            found.append(_reference(settings.get("keras_history"), where))
        else:
            found.append(Constant(value))
    if node.kind in ("Add", "Subtract", "Multiply", "Negative") and all(map(_is_whole, entry["args"])):
        node.refuse("computes with whole numbers, which may be too large for their type; required: floating point. "
                    "Divide them first, or cast the input")
    _check_arguments(node, expect(entry.get("kwargs", {}), dict, where))
    return found


def _without_type(value: Any) -> Any:
    """The numbers of an array, which Keras 3 writes with its type; anything else as it is."""
    if isinstance(value, dict) and value.get("class_name") in ("__tensor__", "__numpy__"):
        settings = value.get("config")
        return settings.get("value") if isinstance(settings, dict) else value
    return value


def _is_whole(value: Any) -> bool:
    """Whether a tensor or constant has whole numbers."""
    settings = value.get("config") if isinstance(value, dict) else None
    return isinstance(value, int) or (isinstance(settings, dict) and "int" in str(settings.get("dtype")))


def _is_tensor(value: Any) -> bool:
    return isinstance(value, dict) and value.get("class_name") == "__keras_tensor__"


def _check_arguments(node: Node, arguments: dict[str, Any]) -> None:
    for key, value in arguments.items():
        if value is not None and not (key == "training" and value is False):
            if node.kind not in MODELS:
                node.check_type()  # says more of what is not supported at all
            node.refuse(f"is called with {key}={str(value)[:40]}; required: nothing but tensors, and training=False at "
                        "most")
