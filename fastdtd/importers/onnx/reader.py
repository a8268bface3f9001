"""ONNX file -> nodes, read one by one in the file's order, and the values that go between them.

Numbers of axes are followed along the way: the graph makes no difference between (N, C, 1, 1) and (N, C), but an
operator's `axis` does. What depends on constants and shapes alone is computed at once (constants.py). A batch that the
file leaves open counts as 1.
"""

from __future__ import annotations

import logging
import math
from collections import ChainMap, Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import numpy_helper

from fastdtd.errors import ConversionError
from fastdtd.graph import INPUT, MAX_TENSOR_ELEMENTS
from fastdtd.importers.budget import Budget
from fastdtd.importers.builder import Builder, Parsed, chosen, nearest
from fastdtd.importers.moves import MAX_AXES, Array
from fastdtd.importers.onnx import constants, operators, quantized
from fastdtd.importers.onnx.operators import FLOATS, IGNORED, NEAREST
from fastdtd.importers.onnx.runtime import QUANTIZED_TOLERANCE, OnnxRuntime
from fastdtd.importers.patterns import COMPUTED, ValueNode, as_tensor
from fastdtd.importers.tensors import Tensor, layer_shape, side_by_side
from fastdtd.importers.verify import TOLERANCE

MIN_OPSET = 7  # before it, broadcasting was an attribute
NEWEST_OPSET = 28  # whose operators' attributes and inputs tests go through
_MAX_OPSET = 1000  # beyond it, no version but damage
_PASSING = {"Add", "Cast", "Div", "Identity", "Mul", "Neg", "Sub"}  # what preprocessing is made of
_DOMAINS = ("", "ai.onnx")  # of ONNX's own operators
_WHOLE = {getattr(onnx.TensorProto, f"{sign}INT{bits}") for sign in ("", "U") for bits in (8, 16, 32, 64)}
# What whole numbers stay as they are by; in other operators they are rounded, and wrap.
_MOVES = {"Concat", "DepthToSpace", "Expand", "Flatten", "Gather", "Identity", "Pad", "Reshape", "Shape", "Size",
          "Slice", "SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze"}
OPERATORS = {**operators.OPERATORS, **quantized.OPERATORS}
_LOG = logging.getLogger("fastdtd")


def parse(data: bytes, size: tuple[int, int] | None = None, others: Mapping[str, bytes] | None = None,
          limit: int | None = None, output: int | str | None = None) -> Parsed:
    """The network in an ONNX file: an output, and the layers that lead to it. The format is opset and producer.

    output: its number or name, or that of any other tensor that the file computes; None: the first.

    size: replaces the input size in the file. others: by name, files that may hold weights of this one. It names where
    in them, but no file that is not given is read. limit: bytes, see `Budget`. Raises ConversionError and ModelError.
    """
    try:
        model = onnx.ModelProto.FromString(data)
        _embed(model, others or {})
        return _parse(model, size, Budget(len(data) + sum(map(len, (others or {}).values())), limit), output)
    except DecodeError:
        raise ConversionError("damaged, or no ONNX file") from None
    except UnicodeDecodeError:
        raise ConversionError("damaged: it holds a name that is no text") from None


def _embed(model: Any, others: Mapping[str, bytes]) -> None:
    """Weights that are in other files, as far as these are given. Each byte is taken at most once: none grow by it."""
    left = {name: len(content) for name, content in others.items()}
    for tensor in model.graph.initializer:
        where = {entry.key: entry.value for entry in tensor.external_data}
        name = where.get("location", "")
        if tensor.data_location != onnx.TensorProto.EXTERNAL or name not in others:
            continue
        start, length = where.get("offset", "0"), where.get("length", str(len(others[name])))
        if not all(number.isascii() and number.isdigit() and len(number) < 20 for number in (start, length)):
            raise ConversionError(f"damaged: the constant {tensor.name!r} begins at {start[:20]!r} of {name!r} and has "
                                  f"length {length[:20]!r}")
        content = others[name][int(start):int(start) + int(length)]
        left[name] -= len(content)
        if len(content) != int(length) or left[name] < 0:
            raise ConversionError(f"damaged: the constant {tensor.name!r} has {length} bytes from {start} on in "
                                  f"{name!r}, which has {len(others[name])}, or others have the same")
        tensor.raw_data = content
        tensor.data_location = onnx.TensorProto.DEFAULT
        tensor.ClearField("external_data")


def _parse(model: Any, size: tuple[int, int] | None, budget: Budget, wanted: int | str | None) -> Parsed:
    if not model.graph.node or not model.graph.output:
        raise ConversionError("damaged, or no ONNX file: it holds no network")
    opset = max((entry.version for entry in model.opset_import if entry.domain in _DOMAINS), default=1)
    if opset < MIN_OPSET:
        raise ConversionError(f"written for ONNX opset {opset}; required: {MIN_OPSET} or later. onnx.version_converter "
                              "raises it")
    if opset > _MAX_OPSET:
        raise ConversionError(f"damaged: written for ONNX opset {opset}; {NEWEST_OPSET} is the newest that is known")
    if opset > NEWEST_OPSET:  # mostly new element types; refusing all would help nobody, for scores are compared
        _LOG.warning("written for ONNX opset %d; %d is the newest that this version was tested with: make sure that "
                     "its scores are compared", opset, NEWEST_OPSET)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    if not inputs or len({value.name for value in inputs}) < len(inputs):
        raise ConversionError(f"the network has {len(inputs)} inputs; required: one or more, each of a name of its own")
    output = _output(model.graph, wanted)
    nodes = _nodes_leading_to(output, model.graph.node, {*(value.name for value in inputs), *weights})
    read_by = {name for _, proto in nodes for name in _read_by(proto)}
    inputs = [value for value in inputs if value.name in read_by] or inputs[:1]
    are_last = [_has_channels_last(value.name, [proto for _, proto in nodes]) for value in inputs]
    # Of several inputs, images have a size.
    sizes = [size if len(inputs) == 1 or len(value.type.tensor_type.shape.dim) == 4 else None for value in inputs]
    found = [_input(*each) for each in zip(inputs, sizes, are_last, strict=True)]
    batch = max(count for _, count in found)
    if any(count not in (0, batch) for _, count in found):
        counts = ", ".join(str(count) for _, count in found)
        raise ConversionError(f"the inputs have batches of {counts}; required: one size")
    xs = side_by_side([x for x, _ in found])
    functions = {function.name for function in model.functions if function.domain in _DOMAINS}
    reader = Reader(Builder(budget, batch or 1), opset, nodes, functions)
    reader.values.update({value.name: x for value, x in zip(inputs, xs, strict=True)} | weights)
    reader.whole.update(value.name for value in inputs if value.type.tensor_type.elem_type in _WHOLE)
    steps: list[tuple[str, Any, Any]] = []
    for index, proto in nodes:
        node = reader.read(proto, index, len(model.graph.node))
        steps += [(str(node), name, reader.values.get(name)) for name in node.outputs[:1]]
    result = reader.values.get(output)
    if not nodes or not isinstance(result, COMPUTED):
        raise ConversionError(f"the output {output!r} is not computed from the input by supported operators")
    with reader.builder.at(Node(reader, nodes[-1][1], nodes[-1][0], len(model.graph.node))):
        layers = reader.builder.leading_to(reader.builder.scores(as_tensor(reader.builder, result)))
    producer = "".join(c for c in f"{model.producer_name} {model.producer_version}" if c.isprintable()).strip()[:100]
    file_format = f"onnx opset {opset}" + (f" from {producer}" if producer else "")
    bounds = next((grid.bounds() for name, grid in reader.grids.items() if grid.scale and getattr(
        reader.values.get(name), "layer", "") == INPUT), (-1.0, 1.0))  # in which the input's grid has many numbers
    if reader.grids:
        file_format += ", dequantised"
        _LOG.warning("quantised: it is converted to the floating-point numbers that its whole numbers stand for, and "
                     "what it rounds is not rounded, so that scores differ a little from the source's")
    steps = [step for step in steps if isinstance(step[2], Tensor)]
    shapes = [[batch or 1, *x.dims] for x in xs]
    graph = _only(model.graph, inputs, shapes, output, nodes)
    runtime = OnnxRuntime(reader.builder, xs, batch or 1, bounds=bounds, rounds_probabilities=bool(reader.grids),
                          tolerance=QUANTIZED_TOLERANCE if reader.grids else TOLERANCE,
                          elements=reader.elements, steps=steps, graph=graph, opset=opset)
    named = {} if len(inputs) == 1 else {value.name: x.shape for value, (x, _) in zip(inputs, found, strict=True)}
    return Parsed(layers, xs[0].shape, file_format + (", channels last" if any(are_last) else ""), runtime, named)


def _output(graph: Any, wanted: int | str | None) -> str:
    names: list[str] = [value.name for value in graph.output]
    if isinstance(wanted, str) and any(wanted in node.output for node in graph.node):
        return wanted
    return names[chosen(wanted, names)]


def _only(graph: Any, inputs: Sequence[Any], shapes: Sequence[Sequence[int]], output: str,
          nodes: Sequence[tuple[int, Any]]) -> Any:
    """The graph of these nodes alone, with the weights that they read."""
    used = {name for _, proto in nodes for name in _read_by(proto)}
    return onnx.GraphProto(
        name="network", node=[proto for _, proto in nodes],
        initializer=[tensor for tensor in graph.initializer if tensor.name in used],
        input=[onnx.helper.make_tensor_value_info(x.name, x.type.tensor_type.elem_type or onnx.TensorProto.FLOAT, shape)
               for x, shape in zip(inputs, shapes, strict=True)], output=[onnx.ValueInfoProto(name=output)])


def _has_channels_last(name: str, nodes: Sequence[Any]) -> bool:
    """Whether what first makes more of the input than products and sums with constants moves its channels forward."""
    reached = {name}
    for node in nodes:
        if reached.isdisjoint(node.input):
            continue
        if node.op_type not in _PASSING:
            perm = next((tuple(attribute.ints) for attribute in node.attribute if attribute.name == "perm"), None)
            return bool(node.op_type == "Transpose" and perm == (0, 3, 1, 2))
        reached.update(node.output)
    return False


def _input(value: Any, size: tuple[int, int] | None, channels_last: bool) -> tuple[Tensor, int]:
    """The network's input, and its batch size (0: open)."""
    dims = [max(dim.dim_value, 0) for dim in value.type.tensor_type.shape.dim]  # 0: open
    where, kind = f"the input {value.name!r}", value.type.tensor_type.elem_type
    if kind and kind not in _WHOLE | FLOATS:
        raise ConversionError(f"{where} has element type {kind}; required: floating-point or whole numbers")
    if not 2 <= len(dims) <= 4:
        raise ConversionError(f"{where} has {len(dims)} axes; required: (N, C, H, W), (N, C, L) or (N, F)")
    if len(dims) == 2 and size is not None:
        raise ConversionError(f"{where} has no height and width, (N, {dims[1] or '?'}); required: no size")
    channels_last = channels_last and len(dims) == 4
    if channels_last:
        dims = [dims[0], dims[3], dims[1], dims[2]]
    if size is not None:
        dims[2:] = size if len(dims) == 4 else size[1:]
    if not all(dims[2:]):
        raise ConversionError(f"{where} leaves its height and width open; give size=(height, width)")
    if not dims[1]:
        raise ConversionError(f"{where} leaves its number of channels open; required: a network that fixes it")
    shape = layer_shape(dims[1:])
    if math.prod(shape) > MAX_TENSOR_ELEMENTS:
        raise ConversionError(f"{where} has {math.prod(shape)} elements; at most {MAX_TENSOR_ELEMENTS} are accepted")
    if channels_last:
        whole = Tensor.whole(INPUT, shape, name="input/channels_last")
        return whole.transposed((1, 2, 0)) or whole, dims[0]
    return Tensor.whole(INPUT, shape, dims[1:]), dims[0]


def _nodes_leading_to(output: str, nodes: Sequence[Any], given: Set[str]) -> list[tuple[int, Any]]:
    """The nodes that `output` needs, with their indices in the file. given: names of the input and the weights."""
    maker: dict[str, int] = {}
    for index, node in enumerate(nodes):
        for name in filter(None, node.output):
            if name in maker or name in given:
                others = "two nodes make" if name in maker else "a node makes"
                raise ConversionError(f"damaged: {others} the tensor {name!r}"
                                      + ("" if name in maker else ", which is an input or a weight"))
            maker[name] = index
    needed: set[int] = set()
    waiting = [output]
    while waiting:
        made_by = maker.get(waiting.pop())
        if made_by is not None and made_by not in needed:
            needed.add(made_by)
            waiting.extend(_read_by(nodes[made_by]))
    return [(index, nodes[index]) for index in sorted(needed)]


def _zeros(count: int) -> Any:
    """A graph of so many outputs, in place of one that is not read."""
    names = [f"unread/{i}" for i in range(count)]
    return onnx.GraphProto(name="unread", output=[onnx.ValueInfoProto(name=name) for name in names],
                           node=[onnx.helper.make_node("Constant", [], [name], value_float=0.0) for name in names])


def _read_by(node: Any) -> Iterator[str]:
    """Names of the tensors that a node reads, also within its branches; protobuf limits how deep these go."""
    yield from node.input
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            for inner in attribute.g.node:
                yield from _read_by(inner)
            yield from (value.name for value in attribute.g.output)


def _value(attribute: Any) -> Any:
    """Of an attribute, or of a default, which may be none; texts as such."""
    if not attribute.name:
        return None
    value = onnx.helper.get_attribute_value(attribute)
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _widened(tensor: Any) -> Array:
    """A bfloat16 tensor as float32, of which it is the upper half."""
    upper = np.frombuffer(tensor.raw_data, "<u2") if tensor.raw_data else np.array(tensor.int32_data, np.uint16)
    return (upper.astype(np.uint32) << 16).view(np.float32)


class Reader:
    """The values that the nodes read so far have made: tensors, and constants, which are arrays or TensorProtos."""

    def __init__(self, builder: Builder, opset: int, nodes: Sequence[tuple[int, Any]], functions: Set[str]) -> None:
        self.builder, self.opset, self.functions = builder, opset, functions
        self.values: ChainMap[str, Any] = ChainMap({})
        self.elements = 0  # of all that was made, as a runtime would
        self.whole: set[str] = set()  # what are still the whole numbers of the input
        self.grids: dict[str, quantized.Grid] = {}  # of what is quantised
        self.sums: dict[str, str] = {}  # sums of quantised numbers, and of which
        times = Counter(proto.name for _, proto in nodes)
        self.names = {name for name, count in times.items() if count == 1} - {"", INPUT}  # that may name a layer

    def read(self, proto: Any, index: int, count: int) -> Node:
        """Add what a node makes."""
        node = Node(self, proto, index, count)
        is_foreign = node.domain not in _DOMAINS and not node.is_of_runtime
        if node.op in self.functions or getattr(proto, "overload", "") != "":
            node.refuse("is a function of the file's own; required: ONNX's operators. onnx.inliner puts them in its "
                        "place")
        if is_foreign or (node.op not in OPERATORS and node.op not in constants.OPERATORS):
            node.refuse(f"is an operator{f' of domain {node.domain!r}' if is_foreign else ''} that is not supported; "
                        f"nearest: {nearest(node.op, NEAREST, OPERATORS, constants.OPERATORS)}; supported: "
                        f"{', '.join(sorted(OPERATORS))}")
        if not node.outputs:
            node.refuse("has no output")
        node.check_known(proto)
        self.builder.budget.step(node, 1)
        if not self.whole.isdisjoint(node.inputs) and node.op not in ("Cast", "DequantizeLinear"):
            if node.op == "Gather" and any(name in self.whole and isinstance(self.values.get(name), COMPUTED)
                                           for name in node.inputs[1:]):
                node.refuse("looks up what the input's whole numbers stand for, such as tokens, which contribute to "
                            "nothing themselves; required: a network that begins with what was looked up. "
                            "onnx.utils.extract_model cuts it out, with this node's output as its input")
            if node.op not in _MOVES or not self.whole.issuperset(filter(None, node.inputs[:1])):
                node.refuse("computes in the input's whole numbers; required: a Cast to floating point before it")
            self.whole.update(node.outputs)
        quantized.follow(node, _MOVES)
        is_computed = any(isinstance(self.values.get(name), COMPUTED) for name in node.inputs)
        if node.op not in quantized.OPERATORS and any(
                isinstance(self.values.get(name), quantized.RUNTIME) for name in node.inputs):
            with self.builder.at(node):
                made = quantized.scaled(self.builder, node)
        elif node.op in constants.OPERATORS and not is_computed:
            made = constants.fold(node, [node.optional(i) for i in range(len(node.inputs))])
        elif node.op in OPERATORS:
            with self.builder.at(node):
                made = OPERATORS[node.op](self.builder, node)
        else:
            node.refuse("reads what is computed; required: constants. Supported of what is computed: "
                        f"{', '.join(sorted(OPERATORS))}")
        node.check_read()
        for name, value in zip(node.outputs, made if isinstance(made, list) else [made], strict=False):
            self.values[name] = value
            if isinstance(value, COMPUTED):
                view = value if isinstance(value, Tensor) else value.view
                self.elements += self.builder.batch * view.elements
            elif isinstance(value, np.ndarray):
                self.elements += value.size
        return node

    def read_branch(self, node: Node, name: str) -> list[Any]:
        """What a graph within a node makes, read where the node is; its other graphs, which are not read, go."""
        branches = {each: node.graph(each) for each in ("then_branch", "else_branch")}
        branch = branches.pop(name)
        for other in branches.values():
            other.CopyFrom(_zeros(len(branch.output)))
        self.values = self.values.new_child({tensor.name: tensor for tensor in branch.initializer})
        try:
            for proto in branch.node:
                self.read(proto, node.index, node.count)
            return [self.values.get(value.name) for value in branch.output]
        finally:
            self.values = self.values.parents


class Node(ValueNode):
    """A node of the file: attributes by name, inputs by position."""

    def __init__(self, reader: Reader, proto: Any, index: int, count: int) -> None:
        self.reader, self.builder, self.opset = reader, reader.builder, reader.opset
        self.op, self.domain, self.name = str(proto.op_type), str(proto.domain), str(proto.name)
        self.inputs: list[str] = list(proto.input)
        self.outputs: list[str] = list(proto.output)
        self.attributes = {attribute.name: attribute for attribute in proto.attribute}
        self.index, self.count = index, count
        self._read: set[str | int] = set()  # names of attributes, positions of inputs
        output = self.outputs[0] if self.outputs else ""
        is_taken = output in reader.names or output in reader.builder.layers or output in ("", INPUT)
        self.layer_name = self.name if self.name in reader.names else f"{self.op}{index}" if is_taken else output

    def __str__(self) -> str:
        name = repr(self.name or (self.outputs[0] if self.outputs else ""))
        reads = ", ".join(map(repr, self.inputs[:10])) or "nothing"
        return f"{self.op} {name} (node {self.index + 1} of {self.count}, reads {reads})"

    def spend(self, count: int) -> None:
        """Ask for a constant of `count` elements before it is made."""
        self.builder.budget.take(self, count)

    # What is read

    @property
    def is_of_runtime(self) -> bool:
        """Whether it is an operator that onnxruntime's own tools write for quantised networks."""
        return self.domain == quantized.DOMAIN and self.op in quantized.ATTRIBUTES

    def check_known(self, proto: Any) -> None:
        """Refuse what ONNX does not know of the operator: nobody has said what it means."""
        self._schema: Any = None
        if len(self.attributes) < len(proto.attribute):
            self.refuse("has an attribute twice")
        if self.is_of_runtime:
            if unknown := self.attributes.keys() - quantized.ATTRIBUTES[self.op]:
                self.refuse(f"has an attribute {min(unknown)[:60]!r}; required: "
                            f"{', '.join(sorted(quantized.ATTRIBUTES[self.op])) or 'none'}")
            return
        try:
            self._schema = onnx.defs.get_schema(self.op, self.opset)
        except onnx.defs.SchemaError:
            self.refuse(f"is no operator of ONNX's opset {self.opset}, which the file is written for")
        if len(self.inputs) > self._schema.max_input:
            self.refuse(f"has {len(self.inputs)} inputs; required: at most {self._schema.max_input}")
        for name, attribute in self.attributes.items():
            if name not in self._schema.attributes:
                known = ", ".join(sorted(self._schema.attributes)) or "none"
                self.refuse(f"has an attribute {name[:60]!r} that it has not in opset {self.opset}, as onnx "
                            f"{onnx.__version__} knows it; required: one of its own ({known})")
            expected = self._schema.attributes[name].type
            if attribute.type not in (0, expected.value):  # 0: written before there were types
                self.refuse(f"has {name} as attribute of type {attribute.type}; required: {expected.name.lower()}")
            if attribute.ref_attr_name:
                self.refuse(f"takes its {name} from a function that it is not in")

    def check_read(self) -> None:
        """Refuse what was given and not read, unless it is what is computed without it."""
        for name, attribute in self.attributes.items():
            default = None if self._schema is None else _value(self._schema.attributes[name].default_value)
            values = [_value(attribute), default]
            if name not in self._read and name not in IGNORED and values[0] != values[1]:
                self.refuse_unread(f"{name} {str(values[0])[:60]}", values[1])
        for i, name in enumerate(self.inputs):
            formal = "" if self._schema is None else self._schema.inputs[min(i, len(self._schema.inputs) - 1)].name
            if name and i not in self._read and formal not in IGNORED:
                self.refuse_unread(f"{name!r} as its {formal}")

    def ignore(self, *names: str) -> None:
        """Count attributes as read that mean nothing beside others."""
        self._read.update(names)

    # Inputs

    def has_input(self, index: int) -> bool:
        return index < len(self.inputs) and self.inputs[index] != ""

    def value(self, key: int) -> Any:
        if not self.has_input(key):
            self.refuse(f"lacks its input {key + 1}")
        self._read.add(key)
        if self.inputs[key] not in self.reader.values:
            self.refuse(f"reads {self.inputs[key]!r}, which no node before it makes as its first output")
        return self.reader.values[self.inputs[key]]

    def label(self, key: int) -> str:
        return f"input {self.inputs[key]!r}"

    def array(self, value: Any) -> Array:
        return value if isinstance(value, np.ndarray) else self._decoded(value)

    def _decoded(self, tensor: Any) -> Array:
        if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
            self.refuse(f"has its constant {tensor.name!r} in another file; required: weights inside the .onnx file, "
                        "in NAME.onnx.data beside it, or in a second file that is given")
        is_packed = tensor.data_type in constants.PACKED and self.op == "DequantizeLinear"  # else the type would count
        if tensor.data_type not in constants.TYPES and not is_packed:
            self.refuse(f"has a constant {tensor.name!r} of element type {tensor.data_type}; required: "
                        f"{constants.TYPES_TEXT}; or, in DequantizeLinear, one of 2 or 4 bits")
        self.builder.budget.take(self, tensor.ByteSize(), 1)  # it may be read again and again
        try:
            if min(tensor.dims, default=0) < 0:
                raise ValueError
            if is_packed:
                return self._unpacked(tensor)
            if tensor.data_type == onnx.TensorProto.BFLOAT16:
                return _widened(tensor).reshape(tuple(tensor.dims))
            return np.asarray(numpy_helper.to_array(tensor))  # a view: dims beyond the file's bytes allocate nothing
        except (ValueError, TypeError):
            self.refuse(f"has a damaged constant {tensor.name!r}: its shape {tuple(tensor.dims)} does not fit its "
                        "content")

    def _unpacked(self, tensor: Any) -> Array:
        """Whole numbers of less than a byte."""
        bits, is_signed = constants.PACKED[tensor.data_type]
        packed = np.frombuffer(tensor.raw_data, np.uint8) if tensor.raw_data else np.array(
            tensor.int32_data, np.int64).astype(np.uint8)
        count = math.prod(tensor.dims)
        if len(packed) != -(-count * bits // 8):
            raise ValueError
        self.builder.budget.take(self, len(packed) * 8 // bits, 2)
        return constants.unpacked(packed, bits, is_signed)[:count].reshape(tuple(tensor.dims))

    def optional(self, index: int) -> Array | None:
        return self.constant(index) if self.has_input(index) else None

    def tensors(self) -> list[Tensor]:
        return [self.tensor(i) for i in range(max(len(self.inputs), 1))]

    def image(self) -> tuple[Tensor, int]:
        """The first input, and how many spatial axes it has."""
        return self.tensor(), self.builder.spatial(self.tensor())

    def integers_at(self, index: int, limit: int = MAX_AXES) -> list[int] | None:
        """A short list of integers in an input."""
        value = self.optional(index)
        return None if value is None else constants.small_integers(self, value, limit)

    def axes(self, index: int = 1) -> list[int] | None:
        """The axes in an attribute or, since opsets 13 and 18, in an input; None where they are not given."""
        given = self.integers_at(index)
        return list(self.integers("axes") or ()) or None if given is None else given

    # Attributes

    def _attribute(self, name: str, kind: str, default: Any = None) -> Any:
        self._read.add(name)
        attribute = self.attributes.get(name)
        if attribute is None:
            return default
        if attribute.type != getattr(onnx.AttributeProto, kind) or attribute.ref_attr_name:
            self.refuse(f"has an attribute {name} of a type that it must not have")
        return onnx.helper.get_attribute_value(attribute)

    def integer(self, name: str, default: int) -> int:
        return int(self._attribute(name, "INT", default))

    def number(self, name: str, default: float) -> float:
        return float(self._attribute(name, "FLOAT", default))

    def text(self, name: str, default: str) -> str:
        return str(self._attribute(name, "STRING", default.encode()), errors="replace")

    def integers(self, name: str) -> tuple[int, ...] | None:
        value = self._attribute(name, "INTS")
        return None if value is None else tuple(value)

    def floats(self, name: str) -> list[float] | None:
        return self._attribute(name, "FLOATS")  # type: ignore[no-any-return]

    def attribute_tensor(self, name: str) -> Array | None:
        tensor = self._attribute(name, "TENSOR")
        return None if tensor is None else self._decoded(tensor)

    def graph(self, name: str) -> Any:
        return self._attribute(name, "GRAPH") or self.refuse(f"has no {name}; required: one")

    def window(self, name: str, axes: int, default: int | None = None) -> tuple[int, ...]:
        """Numbers from 1, one for each spatial axis."""
        window = self.integers(name) or (None if default is None else (default,) * axes)
        if window is None or len(window) != axes or min(window) < 1:
            self.refuse(f"has {name} {window}; required: {'two numbers' if axes == 2 else 'one number'} from 1, for "
                        + ("height and width" if axes == 2 else "the length"))
        return window
