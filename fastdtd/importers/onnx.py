"""ONNX -> layers: one function for each operator, called node by node in the file's order.

Numbers of axes are followed along the way: the graph makes no difference between (N, C, 1, 1) and (N, C), but an operator's `axis` does.
What depends on constants and shapes alone is computed at once (onnx_constants.py). A batch that the file leaves open counts as 1.
"""

from __future__ import annotations

import difflib
import math
from collections import ChainMap, Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import onnx
from google.protobuf.message import DecodeError
from onnx import numpy_helper

from fastdtd.errors import ConversionError
from fastdtd.graph import INPUT, MAX_TENSOR_ELEMENTS, Layer, LocalResponseNorm, Shape
from fastdtd.importers import onnx_constants as constants
from fastdtd.importers.network import Network, Sign, Squares, Tensor, plain_shape, viewed

LEAST_OPSET = 7  # before it, broadcasting was an attribute
ROOM = 2**24  # numbers that a file's constant arithmetic may make, and eight more for each of its bytes

Constant = npt.NDArray[Any]


def parse(data: bytes, size: tuple[int, int] | None = None, others: Mapping[str, bytes] | None = None) -> tuple[list[Layer], Shape, str]:
    """The network in an ONNX file.

    Where it has several outputs, the first is taken, and layers that do not lead to it are left out.

    Parameters
    ----------
    data : bytes
        The file.
    size : (height, width), optional
        Replaces the input size in the file.
    others : dict of str to bytes, optional
        By name, files that may hold weights of this one. It names where in them, but no file that is not given is read.

    Returns
    -------
    layers : list of Layer
    input_shape : (C, H, W)
    file_format : str
        Opset and producer.

    Raises
    ------
    ConversionError
        Damage, or what is not supported.
    ModelError
        A layer that contradicts itself or its input.
    """
    try:
        model = onnx.ModelProto.FromString(data)
        _put_inside(model, others or {})
        return _parse(model, size, ROOM + 8 * (len(data) + sum(map(len, (others or {}).values()))))
    except DecodeError:
        raise ConversionError("damaged, or no ONNX file") from None
    except UnicodeDecodeError:
        raise ConversionError("damaged: it holds a name that is no text") from None


def _put_inside(model: Any, others: Mapping[str, bytes]) -> None:
    """Weights that are in other files, as far as these are given. Each byte of them is taken at most once: none grow by it."""
    left = {name: len(content) for name, content in others.items()}
    for tensor in model.graph.initializer:
        where = {entry.key: entry.value for entry in tensor.external_data}
        name = where.get("location", "")
        if tensor.data_location != onnx.TensorProto.EXTERNAL or name not in others:
            continue
        start, length = where.get("offset", "0"), where.get("length", str(len(others[name])))
        if not all(number.isascii() and number.isdigit() and len(number) < 20 for number in (start, length)):
            raise ConversionError(f"damaged: the constant {tensor.name!r} begins at {start[:20]!r} of {name!r} and has length "
                                  f"{length[:20]!r}")
        content = others[name][int(start):int(start) + int(length)]
        left[name] -= len(content)
        if len(content) != int(length) or left[name] < 0:
            raise ConversionError(f"damaged: the constant {tensor.name!r} has {length} bytes from {start} on in {name!r}, which "
                                  f"has {len(others[name])}, or others have the same")
        tensor.raw_data = content
        tensor.data_location = onnx.TensorProto.DEFAULT
        tensor.ClearField("external_data")


def _parse(model: Any, size: tuple[int, int] | None, room: int) -> tuple[list[Layer], Shape, str]:
    if not model.graph.node or not model.graph.output:
        raise ConversionError("damaged, or no ONNX file: it holds no network")
    opset = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=1)
    if opset < LEAST_OPSET:
        raise ConversionError(f"written for ONNX opset {opset}; required: {LEAST_OPSET} or later. onnx.version_converter raises it")
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    if len(inputs) != 1:
        raise ConversionError(f"the network has {len(inputs)} inputs ({', '.join(repr(i.name) for i in inputs[:5])}); required: one")
    output = model.graph.output[0].name
    nodes = _nodes_leading_to(output, model.graph.node)
    channels_last = _has_channels_last(inputs[0].name, [proto for _, proto in nodes])
    network = _Network(*_input(inputs[0], size, channels_last), opset, room)
    network.values.update(weights)

    times = Counter(node.name for _, node in nodes)
    network.node_names = {name for name, count in times.items() if count == 1} - {"", INPUT}
    for index, proto in nodes:
        network.read(_Node(proto, index, len(model.graph.node)))

    last = nodes[-1][1] if nodes else None
    result = network.values.get(output)
    if last is None or not isinstance(result, (Tensor, Squares)):
        raise ConversionError(f"the output {output!r} is not computed from the input by supported operators")
    node = _Node(last, nodes[-1][0], len(model.graph.node))
    node.layer_name = network.name_for(node)
    producer = "".join(c for c in f"{model.producer_name} {model.producer_version}" if c.isprintable()).strip()[:100]
    layers = network.leading_to(network.plain(node, network.unsquared(node, result)).layer)
    return layers, network.input_shape, (f"onnx opset {opset}" + (f" from {producer}" if producer else "")
                                         + (CHANNELS_LAST if channels_last else ""))


CHANNELS_LAST = ", channels last"  # how a format ends whose input is (N, H, W, C)
_PASSING = {"Add", "Cast", "Div", "Identity", "Mul", "Neg", "Sub"}  # what preprocessing is made of


def _has_channels_last(name: str, nodes: Sequence[Any]) -> bool:
    """Whether what first makes more of the input than a product or sum with constants takes it from (N, H, W, C) to (N, C, H, W)."""
    reached = {name}
    for node in nodes:
        if reached.isdisjoint(node.input):
            continue
        if node.op_type not in _PASSING:
            perm = next((tuple(attribute.ints) for attribute in node.attribute if attribute.name == "perm"), None)
            return bool(node.op_type == "Transpose" and perm == (0, 3, 1, 2))
        reached.update(node.output)
    return False


def _input(value: Any, size: tuple[int, int] | None, channels_last: bool) -> tuple[str, Tensor, int]:
    """Name of the network's input, the input itself, and its batch size (0: open)."""
    dims = [max(dim.dim_value, 0) for dim in value.type.tensor_type.shape.dim]  # 0: open
    if not 2 <= len(dims) <= 4:
        raise ConversionError(f"the input {value.name!r} has {len(dims)} axes; required: (N, C, H, W), (N, C, L) or (N, F)")
    if len(dims) == 2 and size is not None:
        raise ConversionError(f"the input {value.name!r} has no height and width, (N, {dims[1] or '?'}); required: no size")
    if channels_last and len(dims) == 4:
        dims = [dims[0], dims[3], dims[1], dims[2]]
    if len(dims) == 3 and size is not None:
        dims[2] = size[1]
    elif size is not None:
        dims[2:] = size
    if not all(dims[2:]):
        raise ConversionError(f"the input {value.name!r} leaves its height and width open; give size=(height, width)")
    if not dims[1]:
        raise ConversionError(f"the input {value.name!r} leaves its number of channels open; required: a network that fixes it")
    shape = plain_shape(dims[1:])
    if math.prod(shape) > MAX_TENSOR_ELEMENTS:
        raise ConversionError(f"the input {value.name!r} has {math.prod(shape)} numbers; at most {MAX_TENSOR_ELEMENTS} are accepted")
    if not channels_last or len(dims) != 4:
        return value.name, Tensor(INPUT, shape, tuple(dims[1:])), dims[0]
    index = np.arange(math.prod(shape), dtype=np.int32).reshape(shape).transpose(1, 2, 0)
    return value.name, Tensor(INPUT, shape, index.shape, index, "input/channels_last"), dims[0]


def _nodes_leading_to(output: str, nodes: Sequence[Any]) -> list[tuple[int, Any]]:
    """The nodes that `output` needs, with their indices in the file."""
    maker: dict[str, int] = {}
    for index, node in enumerate(nodes):
        for name in filter(None, node.output):
            if name in maker:
                raise ConversionError(f"damaged: two nodes make the tensor {name!r}")
            maker[name] = index
    needed: set[int] = set()
    waiting = [output]
    while waiting:
        made_by = maker.get(waiting.pop())
        if made_by is not None and made_by not in needed:
            needed.add(made_by)
            waiting.extend(_read_by(nodes[made_by]))
    return [(index, nodes[index]) for index in sorted(needed)]


def _read_by(node: Any) -> Iterator[str]:
    """Names of the tensors that a node reads, also within its branches; protobuf limits how deep these go."""
    yield from node.input
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            for inner in attribute.g.node:
                yield from _read_by(inner)
            yield from (value.name for value in attribute.g.output)


class _Node:
    """A node's attributes, checked as they are asked for."""

    def __init__(self, proto: Any, index: int, count: int) -> None:
        self.op, self.domain, self.name = str(proto.op_type), str(proto.domain), str(proto.name)
        self.inputs: list[str] = list(proto.input)
        self.outputs: list[str] = list(proto.output)
        self.attributes = {attribute.name: attribute for attribute in proto.attribute}
        self.index, self.count = index, count
        self.layer_name = ""

    def refuse(self, what: str) -> NoReturn:
        name = repr(self.name or (self.outputs[0] if self.outputs else ""))
        reads = ", ".join(map(repr, self.inputs[:10])) or "nothing"
        raise ConversionError(f"{self.op} {name} (node {self.index + 1} of {self.count}, reads {reads}) {what}")

    def has_input(self, index: int) -> bool:
        return index < len(self.inputs) and self.inputs[index] != ""

    def _attribute(self, name: str, kind: int) -> Any:
        attribute = self.attributes.get(name)
        if attribute is not None and attribute.type != kind:
            self.refuse(f"has an attribute {name} of a type that it must not have")
        return attribute

    def integer(self, name: str, default: int) -> int:
        attribute = self._attribute(name, onnx.AttributeProto.INT)
        return default if attribute is None else int(attribute.i)

    def number(self, name: str, default: float) -> float:
        attribute = self._attribute(name, onnx.AttributeProto.FLOAT)
        return default if attribute is None else float(attribute.f)

    def text(self, name: str, default: str) -> str:
        attribute = self._attribute(name, onnx.AttributeProto.STRING)
        return default if attribute is None else str(attribute.s, errors="replace")

    def integers(self, name: str) -> tuple[int, ...] | None:
        attribute = self._attribute(name, onnx.AttributeProto.INTS)
        return None if attribute is None else tuple(attribute.ints)

    def floats(self, name: str) -> tuple[float, ...] | None:
        attribute = self._attribute(name, onnx.AttributeProto.FLOATS)
        return None if attribute is None else tuple(attribute.floats)

    def attribute_tensor(self, name: str) -> Constant | None:
        attribute = self._attribute(name, onnx.AttributeProto.TENSOR)
        return None if attribute is None else _decode(self, attribute.t)

    def graph(self, name: str) -> Any:
        attribute = self._attribute(name, onnx.AttributeProto.GRAPH)
        if attribute is None:
            self.refuse(f"has no {name}; required: one")
        return attribute.g

    def window(self, name: str, axes: int, default: int | None = None) -> tuple[int, ...]:
        """Numbers from 1, one for each spatial axis."""
        window = self.integers(name) or (None if default is None else (default,) * axes)
        if window is None or len(window) != axes or min(window) < 1:
            self.refuse(f"has {name} {window}; required: {'two numbers' if axes == 2 else 'one number'} from 1, for "
                        + ("height and width" if axes == 2 else "the length"))
        return window


class _Network(Network):
    """What the nodes read so far have made."""

    def __init__(self, input_name: str, x: Tensor, batch: int, opset: int, room: int) -> None:
        super().__init__(x.shape)
        self.batch, self.opset = batch or 1, opset
        self.values: ChainMap[str, Any] = ChainMap({input_name: x})  # tensors, and constants: arrays or TensorProtos
        self.node_names: set[str] = set()  # those that may name a layer
        self._room = room

    def read(self, node: _Node) -> None:
        """Add what `node` makes."""
        is_foreign = node.domain not in ("", "ai.onnx")
        if is_foreign or (node.op not in _OPERATORS and node.op not in constants.OPERATORS):
            node.refuse(f"is an operator{f' of domain {node.domain!r}' if is_foreign else ''} that is not supported; "
                        f"nearest: {_nearest(node.op)}; supported: {', '.join(sorted(_OPERATORS))}")
        if not node.outputs:
            node.refuse("has no output")
        node.layer_name = self.name_for(node)
        if node.op in constants.OPERATORS and all(self.is_constant(node, i) for i, name in enumerate(node.inputs) if name):
            values = [self.optional_constant(node, i) for i in range(len(node.inputs))]
            made = constants.fold(node, values, lambda count: self._make_room(node, count))
        elif node.op in _OPERATORS:
            made = _OPERATORS[node.op](self, node)
        else:
            node.refuse(f"reads what is computed; required: constants. Supported of what is computed: {', '.join(sorted(_OPERATORS))}")
        for name, value in zip(node.outputs, made if isinstance(made, list) else [made], strict=False):
            self.values[name] = value

    def name_for(self, node: _Node) -> str:
        """How a layer is called that is made of the node."""
        if node.name in self.node_names:
            return node.name
        output = node.outputs[0]
        return f"{node.op}{node.index}" if output in self.node_names or output in self.layers or output in ("", INPUT) else output

    def _make_room(self, node: _Node, count: int) -> None:
        self._room -= count
        if self._room < 0:
            node.refuse(f"makes a constant of {count} numbers; with it, constants are larger than is accepted for a file of this size")

    def value(self, node: _Node, index: int) -> Any:
        if not node.has_input(index):
            node.refuse(f"lacks its input {index + 1}")
        if node.inputs[index] not in self.values:
            node.refuse(f"reads {node.inputs[index]!r}, which no node before it makes as its first output")
        return self.values[node.inputs[index]]

    def is_constant(self, node: _Node, index: int) -> bool:
        return not isinstance(self.value(node, index), (Tensor, Squares, Sign))

    def constant(self, node: _Node, index: int) -> Constant:
        value = self.value(node, index)
        if not self.is_constant(node, index):
            node.refuse(f"computes its input {node.inputs[index]!r}; required: a constant")
        return value if isinstance(value, np.ndarray) else _decode(node, value)

    def optional_constant(self, node: _Node, index: int) -> Constant | None:
        return self.constant(node, index) if node.has_input(index) else None

    def integers(self, node: _Node, index: int, most: int = constants.MAX_AXES) -> list[int] | None:
        """A short list of integers in an input."""
        value = self.optional_constant(node, index)
        return None if value is None else constants.small_integers(node, value, most)

    def moving(self, node: _Node) -> Tensor | Squares:
        """The first input, where it may be squares."""
        value = self.value(node, 0)
        return value if isinstance(value, Squares) else self.tensor(node)

    def tensor(self, node: _Node, index: int = 0, *, rank: int | None = None) -> Tensor:
        value = self.value(node, index)
        if isinstance(value, Sign):
            node.refuse(f"reads the sign {node.inputs[index]!r}; required: one as part of a pool by the p-norm only")
        if isinstance(value, Squares):
            value = self.values[node.inputs[index]] = self.unsquared(node, value)
        if not isinstance(value, Tensor):
            node.refuse(f"has the constant {node.inputs[index]!r} as input; required: a tensor that depends on the network's input")
        if rank is not None and value.rank != rank:
            node.refuse(f"reads {node.inputs[index]!r} with {value.rank} axes; required: {'(N, C, H, W)' if rank == 4 else '(N, F)'}")
        return value

    def axes(self, node: _Node, index: int = 1) -> list[int] | None:
        """The axes in an attribute or, since opsets 13 and 18, in an input; None where they are not given."""
        given = self.integers(node, index)
        return list(node.integers("axes") or ()) or None if given is None else given


def _nearest(operator: str) -> str:
    if operator in _NEAREST:
        return _NEAREST[operator]
    close = difflib.get_close_matches(operator, [*_OPERATORS, *constants.OPERATORS], 1, 0.5)
    return close[0] if close else "none"


_ACTIVATION = "Relu, LeakyRelu or Clip"
_NORMALISATION = "BatchNormalization, whose numbers do not depend on the picture"
_NEAREST = {
    **dict.fromkeys(("Celu", "Elu", "Erf", "Gelu", "HardSigmoid", "HardSwish", "Mish", "Selu", "Sigmoid", "Softplus", "Softsign", "Swish",
                     "Tanh", "ThresholdedRelu"), _ACTIVATION),
    **dict.fromkeys(("GroupNormalization", "InstanceNormalization", "LayerNormalization", "LpNormalization", "RMSNormalization",
                     "MeanVarianceNormalization"), _NORMALISATION),
    **dict.fromkeys(("ReduceL1", "ReduceL2", "ReduceSumSquare"), "GlobalLpPool"), "ConvInteger": "Conv", "QLinearConv": "Conv",
    "QLinearMatMul": "MatMul", "MatMulInteger": "MatMul", "DequantizeLinear": "Conv and Gemm with weights in floating point",
    "QuantizeLinear": "Conv and Gemm with weights in floating point", "Einsum": "MatMul", "Loop": "If with a constant condition",
    "Scan": "If with a constant condition", "GatherND": "Gather", "GatherElements": "Gather", "MaxRoiPool": "MaxPool",
    "MaxUnpool": "Resize", "GridSample": "Resize", "LogSoftmax": "Softmax", "Hardmax": "Softmax", "ArgMax": "the scores before it",
}


def _decode(node: _Node, tensor: Any) -> Constant:
    if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
        node.refuse(f"has its constant {tensor.name!r} in another file; required: weights inside the .onnx file, in "
                    "NAME.onnx.data beside it, or in a second file that is given")
    if tensor.data_type not in constants.TYPES:
        node.refuse(f"has a constant {tensor.name!r} of element type {tensor.data_type}; required: float16, float32, float64, int32, "
                    "int64 or bool")
    try:
        if min(tensor.dims, default=0) < 0:
            raise ValueError
        return np.asarray(numpy_helper.to_array(tensor))  # a view of the file's bytes, so that dims beyond them allocate nothing
    except (ValueError, TypeError):
        node.refuse(f"has a damaged constant {tensor.name!r}: its shape {tuple(tensor.dims)} does not fit its content")


# ---- Operators ---------------------------------------------------------------------------------------------------------------------------


def _conv(network: _Network, node: _Node) -> Tensor:
    x, weight = network.tensor(node), network.constant(node, 1)
    axes = network.spatial(node, x)
    kernel = weight.shape[2:]
    if weight.ndim != axes + 2 or (node.integers("kernel_shape") or kernel) != kernel:
        node.refuse(f"has weights of shape {weight.shape}; required: (K, C / group, *kernel_shape), in {axes} dimensions")
    stride, dilation = node.window("strides", axes, 1), node.window("dilations", axes, 1)
    padding = _padding(node, x, kernel, stride, dilation)
    return network.conv(node, x, weight, network.optional_constant(node, 2), stride, padding, dilation, node.integer("group", 1))


def _conv_transpose(network: _Network, node: _Node) -> Tensor:
    x, weight = network.tensor(node), network.constant(node, 1)
    axes = network.spatial(node, x)
    if weight.ndim != axes + 2:
        node.refuse(f"has weights of shape {weight.shape}; required: (C, K / group, *kernel_shape), in {axes} dimensions")
    stride, dilation = node.window("strides", axes, 1), node.window("dilations", axes, 1)
    more = node.integers("output_padding") or (0,) * axes
    if len(more) != axes:
        node.refuse(f"has output_padding {more}; required: {axes} numbers")
    mode, wanted = node.text("auto_pad", "NOTSET"), node.integers("output_shape")
    if wanted is not None or mode.startswith("SAME"):
        sizes = [n * s for n, s in zip(x.dims[1:], stride, strict=True)] if wanted is None else list(wanted[-axes:])
        full = [(x.dims[1 + i] - 1) * stride[i] + dilation[i] * (weight.shape[2 + i] - 1) + 1 + more[i] for i in range(axes)]
        if len(sizes) != axes or any(size < 1 for size in sizes):
            node.refuse(f"has output_shape {wanted}; required: {axes} numbers from 1")
        total = [n - size for n, size in zip(full, sizes, strict=True)]
        before = [n - n // 2 if mode != "SAME_UPPER" else n // 2 for n in total]
        before = [max(n, 0) for n in before]
        more = tuple(o + max(-n, 0) for o, n in zip(more, total, strict=True))
        padding = (*before, *(max(n, 0) - b for n, b in zip(total, before, strict=True)))
    else:
        padding = _padding(node, x, weight.shape[2:], stride, dilation)
    return network.conv_transpose(node, x, weight, network.optional_constant(node, 2), stride, padding, dilation, node.integer("group", 1),
                                  more)


def _padding(node: _Node, x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> tuple[int, ...]:
    """What is padded before each spatial axis, then what is padded behind."""
    mode, axes = node.text("auto_pad", "NOTSET"), len(kernel)
    if mode in ("NOTSET", ""):
        pads = node.integers("pads") or (0,) * 2 * axes
        if len(pads) != 2 * axes:
            node.refuse(f"has pads {pads}; required: " + ("four, for top, left, bottom and right" if axes == 2 else f"{2 * axes}"))
        return pads
    if mode == "VALID":
        return (0,) * 2 * axes
    if mode not in ("SAME_UPPER", "SAME_LOWER"):
        node.refuse(f"has auto_pad {mode!r}; required: NOTSET, VALID, SAME_UPPER or SAME_LOWER")
    before, after = [], []
    for size, k, s, d in zip(x.dims[1:], kernel, stride, dilation, strict=True):
        total = max((-(-size // s) - 1) * s + d * (k - 1) + 1 - size, 0)
        before.append(total // 2 if mode == "SAME_UPPER" else -(-total // 2))
        after.append(total - before[-1])
    return *before, *after


def _pool(network: _Network, node: _Node) -> Tensor | Squares:
    is_average, x = node.op == "AveragePool", network.moving(node)
    if isinstance(x, Squares) and x.view.rank == 5:
        kernel, pads = node.window("kernel_shape", 3), node.integers("pads")
        if not is_average or kernel[1:] != (1, 1) or node.window("strides", 3, 1) != (1, 1, 1) or any(pads or ()):
            node.refuse("is no part of a local response normalisation; required: one as PyTorch computes it")
        return network.mean_over_channels(node, x, kernel[0])
    x = network.tensor(node)
    axes = network.spatial(node, x)
    kernel, stride = node.window("kernel_shape", axes), node.window("strides", axes, 1)
    if any(n != 1 for n in node.integers("dilations") or ()):
        node.refuse("has dilations; required: none")
    padding = _padding(node, x, kernel, stride, (1,) * axes)
    ceil_mode = node.integer("ceil_mode", 0) != 0 and not node.text("auto_pad", "").startswith("SAME")
    return network.pool(node, x, is_average, kernel, stride, padding, ceil_mode, node.integer("count_include_pad", 0) != 0)


def _norm_pool(network: _Network, node: _Node) -> Tensor:
    x = network.tensor(node)
    axes = network.spatial(node, x)
    if node.op == "GlobalLpPool":
        return network.norm_pool(node, x, node.integer("p", 2), x.dims[1:], (1,) * axes, (0,) * 2 * axes)
    kernel, stride = node.window("kernel_shape", axes), node.window("strides", axes, 1)
    if any(n != 1 for n in node.integers("dilations") or ()) or node.integer("ceil_mode", 0):
        node.refuse("has dilations or ceil_mode; required: neither")
    return network.norm_pool(node, x, node.integer("p", 2), kernel, stride, _padding(node, x, kernel, stride, (1,) * axes))


def _global_pool(network: _Network, node: _Node) -> Tensor:
    x = network.tensor(node)
    network.spatial(node, x)
    return network.reduce(node, x, node.op == "GlobalAveragePool", range(2, x.rank), keep=True)


def _reduce(network: _Network, node: _Node) -> Tensor:
    x, axes = network.tensor(node), network.axes(node)
    if axes is None:
        if node.integer("noop_with_empty_axes", 0):
            return x
        node.refuse("is over all axes, the batch too; required: others")
    result = network.reduce(node, x, node.op != "ReduceMax", axes, node.integer("keepdims", 1) != 0)
    if node.op != "ReduceSum":
        return result
    count = math.prod(x.dims[axis] for axis in {network.own_axis(node, x, axis) for axis in axes})
    return network.affine(node, result, scale=float(count))


def _pad(network: _Network, node: _Node) -> Tensor | Squares:
    x, mode = network.moving(node), node.text("mode", "constant")
    rank = x.view.rank if isinstance(x, Squares) else x.rank
    given = network.integers(node, 1, 2 * constants.MAX_AXES) if network.opset >= 11 else node.integers("pads")
    value = network.optional_constant(node, 2) if network.opset >= 11 else None
    axes = [network.axis(node, axis, rank) for axis in network.integers(node, 3) or range(rank)]
    if given is None or len(given) != 2 * len(axes) or len(set(axes)) < len(axes):
        node.refuse(f"has pads {given}; required: two for each of {len(axes)} axes")
    pads = [(0, 0)] * rank
    for i, axis in enumerate(axes):
        pads[axis] = given[i], given[i + len(axes)]
    is_zero = node.number("value", 0.0) == 0 and (value is None or not value.any())
    if mode not in ("constant", "reflect", "edge") or (mode == "constant" and not is_zero):
        node.refuse(f"has mode {mode!r} and pads with something else than zeros; required: constant zeros, reflect or edge")
    if pads[0] != (0, 0) or (isinstance(x, Squares) and mode != "constant"):
        node.refuse(f"has pads {tuple(given)}; required: none for the batch")
    return viewed(x, lambda y: network.pad(node, y, pads[1:], mode))


def _gemm(network: _Network, node: _Node) -> Tensor:
    x, weight, bias = network.tensor(node, rank=2), network.constant(node, 1), network.optional_constant(node, 2)
    if node.integer("transA", 0):
        node.refuse("transposes its input; required: transA 0")
    if weight.ndim != 2:
        node.refuse(f"has weights of shape {weight.shape}; required: two axes")
    weight = np.float32(node.number("alpha", 1.0)) * (weight if node.integer("transB", 0) else weight.T)
    if bias is not None:
        if bias.ndim > 2 or (bias.ndim == 2 and len(bias) != 1) or bias.shape[-1:] not in ((), (1,), (len(weight),)):
            node.refuse(f"has a constant of shape {bias.shape} for {len(weight)} channels; required: one number, or one for each channel")
        bias = np.float32(node.number("beta", 1.0)) * np.broadcast_to(bias.reshape(-1), len(weight))
    return network.dense(node, x, weight, bias)


def _matmul(network: _Network, node: _Node) -> Tensor:
    x, weight = network.tensor(node), network.constant(node, 1)
    if weight.ndim != 2:
        node.refuse(f"has weights of shape {weight.shape}; required: two axes")
    return network.dense(node, x, weight.T, None)


def _add(network: _Network, node: _Node) -> Tensor | Squares:
    if not network.is_constant(node, 0) and not network.is_constant(node, 1):
        return _sum_of_tensors(network, node)
    x, value = _with_constant(network, node)
    if isinstance(x, Squares) and x.size and x.bias is None and value.size == 1:
        return Squares(x.of, x.view, x.size, x.alpha, value.item())
    return network.affine(node, network.unsquared(node, x), shift=value)


def _subtract(network: _Network, node: _Node) -> Tensor:
    if network.is_constant(node, 1):
        return network.affine(node, network.tensor(node), shift=-network.constant(node, 1).astype(np.float64))
    if not network.is_constant(node, 0):
        return network.sum(node, [network.tensor(node), network.affine(node, network.tensor(node, 1), scale=-1.0, part="/minus")])
    return network.affine(node, network.tensor(node, 1), scale=-1.0, shift=network.constant(node, 0))


def _multiply(network: _Network, node: _Node) -> Tensor | Squares:
    if not network.is_constant(node, 0) and not network.is_constant(node, 1):
        return network.product(node, network.value(node, 0), network.value(node, 1))
    x, value = _with_constant(network, node)
    if isinstance(x, Squares) and x.size and x.bias is None and value.size == 1:
        return Squares(x.of, x.view, x.size, x.alpha * value.item())
    return network.affine(node, network.unsquared(node, x), scale=value)


def _divide(network: _Network, node: _Node) -> Tensor:
    if not network.is_constant(node, 0) and isinstance(by := network.value(node, 1), Squares):
        return network.normalise(node, network.tensor(node), by)
    if not network.is_constant(node, 1) or not network.constant(node, 1).all():
        node.refuse("divides by what is computed, or by zero; required: constants other than zero")
    return network.affine(node, network.tensor(node), scale=1 / network.constant(node, 1).astype(np.float64))


def _power(network: _Network, node: _Node) -> Tensor | Squares:
    exponent = network.constant(node, 1)
    if exponent.size != 1:
        node.refuse(f"has exponents of shape {exponent.shape}; required: one")
    return network.power(node, network.moving(node), float(exponent.item()))


def _root(network: _Network, node: _Node) -> Tensor | Squares:
    return network.power(node, network.moving(node), 0.5)


def _magnitude(network: _Network, node: _Node) -> Tensor:
    return network.magnitude(node, network.tensor(node))


def _sign(network: _Network, node: _Node) -> Sign:
    return Sign(network.tensor(node))


def _negate(network: _Network, node: _Node) -> Tensor:
    return network.affine(node, network.tensor(node), scale=-1.0)


def _with_constant(network: _Network, node: _Node) -> tuple[Tensor | Squares, Constant]:
    """Of two inputs, the one that depends on the network's input, and the one that does not."""
    index = 0 if network.is_constant(node, 1) else 1
    value = network.value(node, index)
    return value if isinstance(value, Squares) else network.tensor(node, index), network.constant(node, 1 - index)


def _sum_of_tensors(network: _Network, node: _Node) -> Tensor:
    terms = [network.tensor(node, i) for i in range(max(len(node.inputs), 1))]
    total = network.sum(node, terms)
    return total if node.op != "Mean" else network.affine(node, total, scale=1 / len(terms))


def _batch_norm(network: _Network, node: _Node) -> Tensor:
    x = network.tensor(node)
    if node.integer("training_mode", 0) or not node.integer("spatial", 1):
        node.refuse("normalises by the batch or by the pixel; required: training_mode 0 and spatial 1")
    gamma, beta, mean, variance = (network.constant(node, i).astype(np.float64) for i in range(1, 5))
    if not gamma.shape == beta.shape == mean.shape == variance.shape == x.dims[:1]:
        node.refuse(f"has parameters of shapes {gamma.shape}, {beta.shape}, {mean.shape}, {variance.shape}; required: {x.dims[:1]}")
    scale = gamma / np.sqrt(variance + node.number("epsilon", 1e-5))
    column = (1, -1) + (1,) * (x.rank - 2)
    return network.affine(node, x, scale.reshape(column), (beta - mean * scale).reshape(column))


def _relu(network: _Network, node: _Node) -> Tensor:
    return network.clip(node, network.tensor(node), 0.0, math.inf)


def _leaky_relu(network: _Network, node: _Node) -> Tensor:
    return network.prelu(node, network.tensor(node), node.number("alpha", 0.01))


def _prelu(network: _Network, node: _Node) -> Tensor:
    return network.prelu(node, network.tensor(node), network.constant(node, 1))


def _clip(network: _Network, node: _Node) -> Tensor:
    bounds = []
    for i, (name, limit) in enumerate((("min", -math.inf), ("max", math.inf)), 1):
        given = network.optional_constant(node, i)
        if given is not None and given.size != 1:
            node.refuse(f"has bounds of shape {given.shape}; required: one number each")
        bounds.append(_bound(node.number(name, limit) if given is None else float(given.item())))
    return network.clip(node, network.tensor(node), *bounds)


def _bound(value: float) -> float:
    """Old opsets write the largest float32 for infinity."""
    return math.copysign(math.inf, value) if abs(value) >= np.finfo(np.float32).max else value


def _extreme(network: _Network, node: _Node) -> Tensor:
    """The larger or smaller of a tensor and a number."""
    if len(node.inputs) != 2 or network.is_constant(node, 0) == network.is_constant(node, 1):
        node.refuse("compares tensors that are computed; required: one, and a constant")
    x, value = _with_constant(network, node)
    if value.size != 1:
        node.refuse(f"has a constant of shape {value.shape}; required: one number")
    bound = _bound(float(value.item()))
    low, high = (bound, math.inf) if node.op == "Max" else (-math.inf, bound)
    return network.clip(node, network.unsquared(node, x), low, high)


def _lrn(network: _Network, node: _Node) -> Tensor:
    x = network.plain(node, network.tensor(node, rank=4))
    return network.add(LocalResponseNorm, node, [x], size=node.integer("size", 0), alpha=node.number("alpha", 1e-4),
                       beta=node.number("beta", 0.75), bias=node.number("bias", 1.0))


def _softmax(network: _Network, node: _Node) -> Tensor:
    x = network.tensor(node)
    axis = node.integer("axis", 1 if network.opset < 13 else -1)
    if network.opset < 13 and network.axis(node, axis, x.rank) == 1:  # over all axes from there
        x = network.flatten(node, x) if math.prod(x.dims) == math.prod(x.dims[:1]) else x
    return network.softmax(node, x, 1 if axis % x.rank == 1 else axis)


def _concat(network: _Network, node: _Node) -> Tensor:
    return network.concat(node, [network.tensor(node, i) for i in range(max(len(node.inputs), 1))], node.integer("axis", 0))


def _flatten(network: _Network, node: _Node) -> Tensor:
    x = network.tensor(node)
    axis = node.integer("axis", 1)
    axis += x.rank if axis < 0 else 0
    if not 1 <= axis <= x.rank or math.prod(x.dims[:axis - 1]) != 1:
        node.refuse(f"has axis {axis}; required: 1, so that all but the batch becomes flat")
    return network.flatten(node, x) if x.dims else x


def _reshape(network: _Network, node: _Node) -> Tensor | Squares:
    target = network.integers(node, 1)
    if target is None:
        node.refuse("lacks its input 2")

    def reshaped(x: Tensor) -> Tensor:
        shape, own = target, (network.batch, *x.dims)
        if not node.integer("allowzero", 0):
            if any(n == 0 and i >= len(own) for i, n in enumerate(target)):
                node.refuse(f"makes {tuple(target)} of {x}; required: no 0 for an axis that there is not")
            shape = [own[i] if n == 0 else n for i, n in enumerate(target)]
        return network.reshape(node, x, shape, network.batch)

    return viewed(network.moving(node), reshaped)


def _squeeze(network: _Network, node: _Node) -> Tensor | Squares:
    axes = network.axes(node)
    if axes is None:
        node.refuse("removes all axes of length 1, the batch too; required: axes")
    return viewed(network.moving(node), lambda x: network.squeeze(node, x, axes))


def _unsqueeze(network: _Network, node: _Node) -> Tensor | Squares:
    axes = network.axes(node)
    if axes is None:
        node.refuse("has no axes; required: some")
    return viewed(network.moving(node), lambda x: network.unsqueeze(node, x, axes))


def _transpose(network: _Network, node: _Node) -> Tensor | Squares:
    return viewed(network.moving(node), lambda x: network.transpose(node, x, node.integers("perm") or tuple(reversed(range(x.rank)))))


def _shape(network: _Network, node: _Node) -> Constant:
    x = network.moving(node)
    shape = (network.batch, *(x.view if isinstance(x, Squares) else x).dims)
    return constants.shape_slice(node, shape) if node.op == "Shape" else np.array(math.prod(shape), np.int64)


def _slice(network: _Network, node: _Node) -> Tensor:
    x = network.tensor(node)
    shape = (network.batch, *x.dims)
    chosen = constants.slices(node, shape, [None, *(network.optional_constant(node, i) for i in range(1, len(node.inputs)))])
    if chosen[0] not in (slice(None), slice(0, network.batch, 1)):
        node.refuse("takes a part of the batch; required: all of it")
    for axis, part in enumerate(chosen[1:], 1):
        if part != slice(None):
            x = network.take(node, x, axis, part)
    return x


def _gather(network: _Network, node: _Node) -> Tensor:
    return network.take(node, network.tensor(node), node.integer("axis", 0), network.constant(node, 1))


def _split(network: _Network, node: _Node) -> list[Tensor]:
    x, axis = network.tensor(node), node.integer("axis", 0)
    own = network.own_axis(node, x, axis)
    sizes = constants.split_sizes(node, x.dims[own], [None, network.optional_constant(node, 1)], len(node.outputs))
    return network.split(node, x, axis, sizes)


def _expand(network: _Network, node: _Node) -> Tensor:
    x, target = network.tensor(node), network.integers(node, 1) or []
    target = [1] * (x.rank - len(target)) + target
    if len(target) != x.rank or target[0] not in (1, network.batch):
        node.refuse(f"makes {tuple(target)} of {x}; required: as many axes, and the batch as it is")
    return network.expand(node, x, target[1:])


def _tile(network: _Network, node: _Node) -> Tensor:
    x, times = network.tensor(node), network.integers(node, 1) or []
    if len(times) != x.rank or times[0] != 1 or min(times) < 1:
        node.refuse(f"repeats {x} by {tuple(times)}; required: a number from 1 for each axis, and 1 for the batch")
    return network.move(node, x, math.prod(x.dims) * math.prod(times), lambda index: np.tile(index, times[1:]))


def _depth_and_space(network: _Network, node: _Node) -> Tensor:
    x, n = network.tensor(node, rank=4), node.integer("blocksize", 0)
    channels, height, width = x.dims
    to_space, mode = node.op == "DepthToSpace", node.text("mode", "DCR")
    if n < 1 or (channels % (n * n) if to_space else height % n or width % n) or mode not in ("DCR", "CRD"):
        node.refuse(f"has blocksize {n} and mode {mode!r} for {x}; required: one that divides it, and DCR or CRD")
    if to_space:
        return network.depth_to_space(node, x, n, mode == "CRD")
    return network.move(node, x, math.prod(x.dims), lambda index: index.reshape(channels, height // n, n, width // n, n)
                        .transpose(2, 4, 0, 1, 3).reshape(-1, height // n, width // n))


def _resize(network: _Network, node: _Node) -> Tensor:
    x = network.tensor(node)
    if node.text("mode", "nearest") != "nearest" or node.text("keep_aspect_ratio_policy", "stretch") != "stretch":
        node.refuse(f"has mode {node.text('mode', 'nearest')!r}; required: nearest, stretched")
    is_old = node.op == "Upsample" or network.opset < 11
    place = 1 if is_old else 2
    scales: Sequence[float] | None = node.floats("scales")
    if scales is None and (given := network.optional_constant(node, place)) is not None and given.size:
        if given.size > constants.MAX_AXES or given.dtype.kind != "f":
            node.refuse(f"has {given.size} scales; required: one for each axis")
        scales = [float(n) for n in given.ravel()]
    sizes = None if is_old or scales else network.integers(node, 3)
    axes = [network.axis(node, axis, x.rank) for axis in node.integers("axes") or range(x.rank)]
    if (scales is None) == (sizes is None) or len(scales or sizes or ()) != len(axes):
        node.refuse("has neither scales nor sizes for all axes; required: one of them")
    own = (network.batch, *x.dims)
    steps, wanted = [1.0] * x.rank, list(own)
    for i, axis in enumerate(axes):
        if scales is not None:
            if not 0 < scales[i] <= MAX_TENSOR_ELEMENTS:
                node.refuse(f"has scales {tuple(scales)}; required: numbers above 0")
            steps[axis], wanted[axis] = scales[i], math.floor(own[axis] * scales[i])
        elif sizes is not None:
            steps[axis], wanted[axis] = sizes[i] / own[axis], sizes[i]
    if wanted[0] != own[0] or min(wanted) < 1 or math.prod(wanted) > MAX_TENSOR_ELEMENTS:
        node.refuse(f"makes {tuple(wanted)} of {x}; required: the batch as it is, and at most {MAX_TENSOR_ELEMENTS} numbers")
    coordinates = "asymmetric" if is_old else node.text("coordinate_transformation_mode", "half_pixel")
    rounding = "floor" if is_old else node.text("nearest_mode", "round_prefer_floor")
    if coordinates not in _COORDINATES or rounding not in _ROUNDINGS:
        node.refuse(f"has coordinate_transformation_mode {coordinates!r} and nearest_mode {rounding!r}; required: one of "
                    f"{', '.join(_COORDINATES)}, and one of {', '.join(_ROUNDINGS)}")
    places = []
    for axis in range(1, x.rank):
        at = _COORDINATES[coordinates](np.arange(wanted[axis], dtype=np.float64), steps[axis], own[axis], wanted[axis])
        places.append(np.clip(_ROUNDINGS[rounding](at), 0, own[axis] - 1).astype(np.int64))
    return network.repeat(node, x, places)


_COORDINATES: dict[str, Callable[[Any, float, int, int], Any]] = {  # of a place in the result: place, scale, old length, new length
    "half_pixel": lambda x, scale, _, __: (x + 0.5) / scale - 0.5,
    "pytorch_half_pixel": lambda x, scale, _, new: (x + 0.5) / scale - 0.5 if new > 1 else 0 * x,
    "asymmetric": lambda x, scale, _, __: x / scale,
    "tf_half_pixel_for_nn": lambda x, scale, _, __: (x + 0.5) / scale,
    "align_corners": lambda x, _, old, new: x * (old - 1) / (new - 1) if new > 1 else 0 * x,
}
_ROUNDINGS: dict[str, Callable[[Any], Any]] = {
    "round_prefer_floor": lambda x: np.ceil(x - 0.5), "round_prefer_ceil": lambda x: np.floor(x + 0.5), "floor": np.floor, "ceil": np.ceil,
}


def _if(network: _Network, node: _Node) -> list[Any]:
    """The branch that a constant condition chooses, read where the node is."""
    condition = network.constant(node, 0)
    if condition.size != 1:
        node.refuse(f"has a condition of shape {condition.shape}; required: one value")
    branch = node.graph("then_branch" if condition.any() else "else_branch")
    network.values = network.values.new_child({tensor.name: tensor for tensor in branch.initializer})
    try:
        for proto in branch.node:
            network.read(_Node(proto, node.index, node.count))
        made = [network.values.get(value.name) for value in branch.output]
    finally:
        network.values = network.values.parents
    if len(made) < len(node.outputs) or any(value is None for value in made):
        node.refuse("has a branch that does not make all outputs; required: one that does")
    return made


def _constant(_: _Network, node: _Node) -> Any:
    for name, field in {"value": "t", "value_float": "f", "value_floats": "floats", "value_int": "i", "value_ints": "ints"}.items():
        if name in node.attributes:
            value = getattr(node.attributes[name], field)
            return value if field == "t" else np.asarray(value, np.float32 if "float" in name else np.int64)
    return node.refuse(f"has attributes {sorted(node.attributes)}; required: a tensor or numbers")


def _same(network: _Network, node: _Node) -> Any:
    return network.value(node, 0)


def _cast(network: _Network, node: _Node) -> Any:
    if node.op == "Cast" and node.integer("to", 0) not in _FLOATS:
        node.refuse(f"casts what is computed to element type {node.integer('to', 0)}; required: float16, float32 or float64")
    return network.moving(node)


_FLOATS = {onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE, onnx.TensorProto.BFLOAT16}


def _dropout(network: _Network, node: _Node) -> Tensor:
    training = network.optional_constant(node, 2)
    if training is not None and training.any():
        node.refuse("drops at inference; required: training_mode false")
    return network.tensor(node)


_OPERATORS: dict[str, Callable[[_Network, _Node], Any]] = {
    "Abs": _magnitude, "Add": _add, "AveragePool": _pool, "BatchNormalization": _batch_norm, "Cast": _cast, "CastLike": _cast,
    "Clip": _clip, "Concat": _concat, "Constant": _constant, "Conv": _conv, "ConvTranspose": _conv_transpose,
    "DepthToSpace": _depth_and_space, "Div": _divide, "Dropout": _dropout, "Expand": _expand, "Flatten": _flatten, "Gather": _gather,
    "Gemm": _gemm, "GlobalAveragePool": _global_pool, "GlobalLpPool": _norm_pool, "GlobalMaxPool": _global_pool, "Identity": _same,
    "If": _if, "LRN": _lrn, "LeakyRelu": _leaky_relu, "LogSoftmax": _softmax, "LpPool": _norm_pool, "MatMul": _matmul, "Max": _extreme,
    "MaxPool": _pool, "Mean": _sum_of_tensors, "Min": _extreme, "Mul": _multiply, "Neg": _negate, "PRelu": _prelu, "Pad": _pad,
    "Pow": _power, "ReduceMax": _reduce, "ReduceMean": _reduce, "ReduceSum": _reduce, "Relu": _relu, "Reshape": _reshape,
    "Resize": _resize, "Shape": _shape, "Sign": _sign, "Size": _shape, "Slice": _slice, "Softmax": _softmax,
    "SpaceToDepth": _depth_and_space, "Split": _split, "Sqrt": _root, "Squeeze": _squeeze, "Sub": _subtract, "Sum": _sum_of_tensors,
    "Tile": _tile, "Transpose": _transpose, "Unsqueeze": _unsqueeze, "Upsample": _resize,
}
