"""ONNX -> layers: one function for each operator, called node by node in the file's order.

Shapes are followed along the way, since SAME paddings depend on them, and so is the number of axes: the graph makes no difference between
(N, C, 1, 1) and (N, C), but an operator's `axis` does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import onnx
from google.protobuf.message import DecodeError
from onnx import numpy_helper

from fastdtd.errors import ConversionError
from fastdtd.graph import (
    INPUT,
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
    LocalResponseNorm,
    MaxPool2d,
    ReLU,
    Shape,
    Softmax,
)
from fastdtd.importers.tensors import NO_PADDING, Padding, Tensor, by_channel, sum_of

LEAST_OPSET = 7  # before it, broadcasting was an attribute
WEIGHT_TYPES = {onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE}
INTEGER_TYPES = {onnx.TensorProto.INT32, onnx.TensorProto.INT64, onnx.TensorProto.BOOL}

Constant = npt.NDArray[Any]


def parse(data: bytes, size: tuple[int, int] | None = None) -> tuple[list[Layer], Shape, str]:
    """The network in an ONNX file.

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
        Opset and producer.

    Raises
    ------
    ConversionError
        Damage, or what is not supported.
    ModelError
        A layer that contradicts itself or its input.
    """
    try:
        return _parse(onnx.ModelProto.FromString(data), size)
    except DecodeError:
        raise ConversionError("damaged, or no ONNX file") from None
    except UnicodeDecodeError:
        raise ConversionError("damaged: it holds a name that is no text") from None


def _parse(model: Any, size: tuple[int, int] | None) -> tuple[list[Layer], Shape, str]:
    if not model.graph.node or not model.graph.output:
        raise ConversionError("damaged, or no ONNX file: it holds no network")
    opset = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=1)
    if opset < LEAST_OPSET:
        raise ConversionError(f"written for ONNX opset {opset}; required: {LEAST_OPSET} or later. onnx.version_converter raises it")
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    if len(inputs) != 1:
        raise ConversionError(f"the network has {len(inputs)} inputs ({', '.join(repr(i.name) for i in inputs[:5])}); required: one")
    network = _Network(*_input(inputs[0], size), opset)
    network.values |= weights

    output = model.graph.output[0].name
    nodes = _nodes_leading_to(output, model.graph.node)
    times = Counter(node.name for _, node in nodes)
    network.node_names = {name for name, count in times.items() if count == 1} - {"", INPUT}
    for index, proto in nodes:
        network.read(_Node(proto, index, len(model.graph.node)))

    result = network.values.get(output)
    if not isinstance(result, Tensor) or result.pad != NO_PADDING:
        raise ConversionError(f"the output {output!r} is not computed from the input by supported operators")
    producer = "".join(c for c in f"{model.producer_name} {model.producer_version}" if c.isprintable()).strip()[:100]
    return list(network.layers.values()), network.input_shape, f"onnx opset {opset}" + (f" from {producer}" if producer else "")


def _input(value: Any, size: tuple[int, int] | None) -> tuple[str, Shape, int, int]:
    """Name, shape, number of axes and batch size (0: open) of the network's input."""
    dims = [max(dim.dim_value, 0) for dim in value.type.tensor_type.shape.dim]  # 0: open
    if len(dims) == 4:
        channels, (height, width) = dims[1], size or (dims[2], dims[3])
        if not height or not width:
            raise ConversionError(f"the input {value.name!r} leaves its height and width open; give size=(height, width)")
    elif len(dims) == 2 and size is None:
        channels, height, width = dims[1], 1, 1
    elif len(dims) == 2:
        raise ConversionError(f"the input {value.name!r} has no height and width, (N, {dims[1] or '?'}); required: no size")
    else:
        raise ConversionError(f"the input {value.name!r} has {len(dims)} axes; required: (N, C, H, W) or (N, F)")
    if not channels:
        raise ConversionError(f"the input {value.name!r} leaves its number of channels open; required: a network that fixes it")
    return value.name, (channels, height, width), len(dims), dims[0]


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
            waiting.extend(nodes[made_by].input)
    return [(index, nodes[index]) for index in sorted(needed)]


class _Node:
    """A node's attributes, checked as they are asked for."""

    def __init__(self, proto: Any, index: int, count: int) -> None:
        self.op, self.domain, self.name = str(proto.op_type), str(proto.domain), str(proto.name)
        self.inputs: list[str] = list(proto.input)
        self.outputs: list[str] = list(proto.output)
        self.attributes = {attribute.name: attribute for attribute in proto.attribute}
        self.index, self._count = index, count

    def refuse(self, what: str) -> NoReturn:
        name = repr(self.name or (self.outputs[0] if self.outputs else ""))
        reads = ", ".join(map(repr, self.inputs[:10])) or "nothing"
        raise ConversionError(f"{self.op} {name} (node {self.index + 1} of {self._count}, reads {reads}) {what}")

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

    def pair(self, name: str, default: tuple[int, int] | None = None) -> tuple[int, int]:
        """Two numbers from 1, for height and width."""
        pair = self.integers(name) or default
        if pair is None or len(pair) != 2 or min(pair) < 1:
            self.refuse(f"has {name} {pair}; required: two numbers from 1, for height and width")
        return pair[0], pair[1]


class _Network:
    """What the nodes read so far have made."""

    def __init__(self, input_name: str, input_shape: Shape, rank: int, batch: int, opset: int) -> None:
        self.input_shape, self.batch, self.opset = input_shape, batch, opset
        self.layers: dict[str, Layer] = {}
        self.values: dict[str, Any] = {input_name: Tensor(INPUT, input_shape, rank)}  # and constants: arrays or TensorProtos
        self.node_names: set[str] = set()  # those that may name a layer
        self._taken = {INPUT, ""}
        self._weights = 0

    def read(self, node: _Node) -> None:
        """Add what `node` makes."""
        if node.domain not in ("", "ai.onnx") or node.op not in _OPERATORS:
            operator = f" of domain {node.domain!r}" if node.domain not in ("", "ai.onnx") else ""
            node.refuse(f"is an operator{operator} that is not supported; supported: {', '.join(sorted(_OPERATORS))}")
        if not node.outputs:
            node.refuse("has no output")
        self.values[node.outputs[0]] = _OPERATORS[node.op](self, node)

    def value(self, node: _Node, index: int) -> Any:
        if not node.has_input(index):
            node.refuse(f"lacks its input {index + 1}")
        if node.inputs[index] not in self.values:
            node.refuse(f"reads {node.inputs[index]!r}, which no node before it makes as its first output")
        return self.values[node.inputs[index]]

    def is_constant(self, node: _Node, index: int) -> bool:
        return not isinstance(self.value(node, index), Tensor)

    def constant(self, node: _Node, index: int) -> Constant:
        value = self.value(node, index)
        if isinstance(value, Tensor):
            node.refuse(f"computes its input {node.inputs[index]!r}; required: a constant")
        return value if isinstance(value, np.ndarray) else _decode(node, value)

    def optional_constant(self, node: _Node, index: int) -> Constant | None:
        return self.constant(node, index) if node.has_input(index) else None

    def tensor(self, node: _Node, index: int = 0, *, rank: int | None = None, padded: bool = False) -> Tensor:
        value = self.value(node, index)
        if not isinstance(value, Tensor):
            node.refuse(f"has the constant {node.inputs[index]!r} as input; required: a tensor that depends on the network's input")
        if rank is not None and value.rank != rank:
            node.refuse(f"reads {node.inputs[index]!r} with {value.rank} axes; required: {'(N, C, H, W)' if rank == 4 else '(N, F)'}")
        if value.pad != NO_PADDING and not padded:
            node.refuse("reads what a Pad makes; a Pad is supported before Conv and AveragePool only")
        return value

    def axes(self, node: _Node, rank: int) -> set[int] | None:
        """The axes in an attribute or, since opsets 13 and 18, in the second input; None where they are not given."""
        axes = self.optional_constant(node, 1) if node.has_input(1) else node.integers("axes")
        return None if axes is None else {int(axis) % rank for axis in np.ravel(axes)}

    def add(self, layer_type: type[Layer], node: _Node, inputs: Sequence[Tensor], rank: int | None = None, part: str = "", **fields: Any
            ) -> Tensor:
        """The output of a new layer. part: marks one of several layers that one node needs."""
        self.count_weights(node, *fields.values())
        layer = layer_type(self._layer_name(node, part), tuple(x.layer for x in inputs), **fields)
        self.layers[layer.name] = layer
        return Tensor(layer.name, layer.output_shape([x.shape for x in inputs]), rank or inputs[0].rank)

    def count_weights(self, node: _Node, *values: Any) -> None:
        """Keep a small file from becoming a large network: nodes may share weights, but what is made of them does not."""
        self._weights += sum(value.size for value in values if isinstance(value, np.ndarray))
        if self._weights > MAX_WEIGHT_ELEMENTS:
            node.refuse(f"brings the network beyond {MAX_WEIGHT_ELEMENTS} weights")

    def _layer_name(self, node: _Node, part: str) -> str:
        if node.name in self.node_names:
            name = node.name + part
        else:
            name = node.outputs[0] + part
            if name in self.node_names or name in self._taken:
                name = f"{node.op}{node.index}{part}"
        while name in self._taken:
            name += "_"
        self._taken.add(name)
        return name


def _decode(node: _Node, tensor: Any) -> Constant:
    if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
        node.refuse(f"has its constant {tensor.name!r} in another file; required: weights inside the .onnx file "
                    "(onnx.load and onnx.save bring them there)")
    if tensor.data_type not in WEIGHT_TYPES | INTEGER_TYPES:
        node.refuse(f"has a constant {tensor.name!r} of element type {tensor.data_type}; required: float16, float32, float64 or integers")
    try:
        if min(tensor.dims, default=0) < 0:
            raise ValueError
        return np.asarray(numpy_helper.to_array(tensor))  # a view of the file's bytes, so that dims beyond them allocate nothing
    except (ValueError, TypeError):
        node.refuse(f"has a damaged constant {tensor.name!r}: its shape {tuple(tensor.dims)} does not fit its content")


# ---- Operators ---------------------------------------------------------------------------------------------------------------------------


def _conv(network: _Network, node: _Node) -> Tensor:
    x, weight = network.tensor(node, rank=4, padded=True), network.constant(node, 1)
    if weight.ndim != 4 or node.pair("kernel_shape", weight.shape[2:]) != weight.shape[2:]:
        node.refuse(f"has weights of shape {weight.shape}; required: (K, C / group, *kernel_shape), in two dimensions")
    stride, dilation = node.pair("strides", (1, 1)), node.pair("dilations", (1, 1))
    padding = _padding(node, x, weight.shape[2:], stride, dilation)
    return network.add(Conv2d, node, [x], weight=weight, bias=network.optional_constant(node, 2), stride=stride,
                       padding=sum_of(padding, x.pad), dilation=dilation, groups=node.integer("group", 1))


def _padding(node: _Node, x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Padding:
    mode = node.text("auto_pad", "NOTSET")
    if mode in ("NOTSET", ""):
        pads = node.integers("pads") or NO_PADDING
        if len(pads) != 4:
            node.refuse(f"has pads {pads}; required: four, for top, left, bottom and right")
        return pads[0], pads[1], pads[2], pads[3]
    if mode == "VALID":
        return NO_PADDING
    if mode not in ("SAME_UPPER", "SAME_LOWER"):
        node.refuse(f"has auto_pad {mode!r}; required: NOTSET, VALID, SAME_UPPER or SAME_LOWER")
    before, after = [0, 0], [0, 0]
    for axis in (0, 1):
        size = x.shape[1 + axis] + x.pad[axis] + x.pad[2 + axis]
        windows = -(-size // stride[axis])
        total = max((windows - 1) * stride[axis] + dilation[axis] * (kernel[axis] - 1) + 1 - size, 0)
        before[axis] = total // 2 if mode == "SAME_UPPER" else -(-total // 2)
        after[axis] = total - before[axis]
    return before[0], before[1], after[0], after[1]


def _pool(network: _Network, node: _Node) -> Tensor:
    is_average = node.op == "AveragePool"
    x = network.tensor(node, rank=4, padded=is_average)
    kernel, stride = node.pair("kernel_shape"), node.pair("strides", (1, 1))
    if node.pair("dilations", (1, 1)) != (1, 1):
        node.refuse("has dilations; required: none")
    padding = _padding(node, x, kernel, stride, (1, 1))
    ceil_mode = node.integer("ceil_mode", 0) != 0 and not node.text("auto_pad", "").startswith("SAME")
    if not is_average:
        return network.add(MaxPool2d, node, [x], kernel=kernel, stride=stride, padding=padding, ceil_mode=ceil_mode)
    include_pad = node.integer("count_include_pad", 0) != 0
    if x.pad != NO_PADDING:  # the zeros of a Pad are part of the image and always count
        if ceil_mode or (padding != NO_PADDING and not include_pad):
            node.refuse("reads what a Pad makes and pads it differently itself; required: one or the other")
        include_pad = True
    return network.add(AveragePool2d, node, [x], kernel=kernel, stride=stride, padding=sum_of(padding, x.pad), ceil_mode=ceil_mode,
                       count_include_pad=include_pad)


def _global_pool(network: _Network, node: _Node) -> Tensor:
    x = network.tensor(node, rank=4)
    if node.op == "GlobalMaxPool":
        return network.add(MaxPool2d, node, [x], kernel=x.shape[1:])
    return network.add(GlobalAveragePool, node, [x])


def _reduce_mean(network: _Network, node: _Node) -> Tensor:
    x = network.tensor(node, rank=4)
    if network.axes(node, 4) != {2, 3}:
        node.refuse("does not average over height and width; required: axes 2 and 3")
    return network.add(GlobalAveragePool, node, [x], rank=4 if node.integer("keepdims", 1) else 2)


def _pad(network: _Network, node: _Node) -> Tensor:
    x, value = network.tensor(node, rank=4), network.optional_constant(node, 2)
    pads = node.integers("pads") if network.opset < 11 else tuple(int(n) for n in network.constant(node, 1).ravel())
    is_zero = node.number("value", 0.0) == 0 and (value is None or not value.any())
    if node.text("mode", "constant") != "constant" or not is_zero or node.has_input(3):
        node.refuse("pads with something else than zeros, or chosen axes; required: constant zeros on all axes")
    if pads is None or len(pads) != 8 or min(pads) < 0 or any(pads[i] for i in (0, 1, 4, 5)):
        node.refuse(f"has pads {pads}; required: eight, none negative, and none for batch and channels")
    return replace(x, pad=(pads[2], pads[3], pads[6], pads[7]))


def _gemm(network: _Network, node: _Node) -> Tensor:
    x, weight, bias = network.tensor(node, rank=2), network.constant(node, 1), network.optional_constant(node, 2)
    if node.integer("transA", 0):
        node.refuse("transposes its input; required: transA 0")
    if weight.ndim != 2:
        node.refuse(f"has weights of shape {weight.shape}; required: two axes")
    weight = np.float32(node.number("alpha", 1.0)) * (weight if node.integer("transB", 0) else weight.T)
    if bias is not None:
        bias = np.float32(node.number("beta", 1.0)) * by_channel(bias, Tensor("", (len(weight), 1, 1), 2), node.refuse)
    return network.add(Dense, node, [x], weight=weight, bias=bias)


def _matmul(network: _Network, node: _Node) -> Tensor:
    x, weight = network.tensor(node, rank=2), network.constant(node, 1)
    if weight.ndim != 2:
        node.refuse(f"has weights of shape {weight.shape}; required: two axes")
    return network.add(Dense, node, [x], weight=weight.T)


def _add(network: _Network, node: _Node) -> Tensor:
    if not network.is_constant(node, 0) and not network.is_constant(node, 1):
        return _sum_of_tensors(network, node)
    x, value = _with_constant(network, node)
    return network.add(BatchNorm, node, [x], scale=np.ones(x.shape[0], np.float32), shift=by_channel(value, x, node.refuse))


def _subtract(network: _Network, node: _Node) -> Tensor:
    if not network.is_constant(node, 1):
        node.refuse("subtracts what is computed; required: a constant")
    x, value = network.tensor(node), network.constant(node, 1)
    return network.add(BatchNorm, node, [x], scale=np.ones(x.shape[0], np.float32), shift=-by_channel(value, x, node.refuse))


def _multiply(network: _Network, node: _Node) -> Tensor:
    x, value = _with_constant(network, node)
    return network.add(BatchNorm, node, [x], scale=by_channel(value, x, node.refuse), shift=np.zeros(x.shape[0], np.float32))


def _divide(network: _Network, node: _Node) -> Tensor:
    if not network.is_constant(node, 1) or not network.constant(node, 1).all():
        node.refuse("divides by what is computed, or by zero; required: constants other than zero")
    x, value = network.tensor(node), network.constant(node, 1)
    return network.add(BatchNorm, node, [x], scale=1 / by_channel(value, x, node.refuse).astype(np.float64),
                       shift=np.zeros(x.shape[0], np.float32))


def _with_constant(network: _Network, node: _Node) -> tuple[Tensor, Constant]:
    """Of two inputs, the one that depends on the network's input, and the one that does not."""
    if not network.is_constant(node, 0) and not network.is_constant(node, 1):
        node.refuse("multiplies two tensors that are computed; required: one, and a constant")
    index = 0 if network.is_constant(node, 1) else 1
    return network.tensor(node, index), network.constant(node, 1 - index)


def _sum_of_tensors(network: _Network, node: _Node) -> Tensor:
    terms = [network.tensor(node, i) for i in range(max(len(node.inputs), 1))]
    if len({x.rank for x in terms}) > 1:
        node.refuse("adds (N, C, H, W) and (N, F); required: tensors of one shape")
    total = terms[0]
    for i, term in enumerate(terms[1:], 1):
        total = network.add(Add, node, [total, term], part="" if i == len(terms) - 1 else f"/{i}")
    return total


def _batch_norm(network: _Network, node: _Node) -> Tensor:
    x = network.tensor(node)
    if node.integer("training_mode", 0) or not node.integer("spatial", 1):
        node.refuse("normalises by the batch or by the pixel; required: training_mode 0 and spatial 1")
    gamma, beta, mean, variance = (network.constant(node, i).astype(np.float64) for i in range(1, 5))
    if not gamma.shape == beta.shape == mean.shape == variance.shape == (x.shape[0],):
        node.refuse(f"has parameters of shapes {gamma.shape}, {beta.shape}, {mean.shape}, {variance.shape}; required: ({x.shape[0]},)")
    scale = gamma / np.sqrt(variance + node.number("epsilon", 1e-5))
    return network.add(BatchNorm, node, [x], scale=scale, shift=beta - mean * scale)


def _relu(network: _Network, node: _Node) -> Tensor:
    return network.add(ReLU, node, [network.tensor(node)])


def _clip(network: _Network, node: _Node) -> Tensor:
    low, high = (network.optional_constant(node, i) for i in (1, 2))
    least = node.number("min", -np.inf) if low is None else low.astype(np.float64).max(initial=-np.inf)
    most = node.number("max", np.inf) if high is None else high.astype(np.float64).max(initial=-np.inf)
    least, most = (float(np.copysign(np.inf, bound)) if abs(bound) >= np.finfo(np.float32).max else float(bound) for bound in (least, most))
    if (least, most) == (0, np.inf):  # the default of old opsets is the largest float32
        return _relu(network, node)
    if not least <= 0 < most:
        node.refuse(f"clips to [{least:g}, {most:g}]; required: a lower bound of 0 or less, and an upper one above 0")
    return network.add(Clip, node, [network.tensor(node)], low=least, high=most)


def _lrn(network: _Network, node: _Node) -> Tensor:
    return network.add(LocalResponseNorm, node, [network.tensor(node, rank=4)], size=node.integer("size", 0),
                       alpha=node.number("alpha", 1e-4), beta=node.number("beta", 0.75), bias=node.number("bias", 1.0))


def _softmax(network: _Network, node: _Node) -> Tensor:
    x = network.tensor(node)
    axis = node.integer("axis", 1 if network.opset < 13 else -1)
    if axis not in (1, 1 - x.rank):
        node.refuse(f"has axis {axis} over {x.rank} axes; required: 1, the classes")
    return network.add(Softmax, node, [x])


def _concat(network: _Network, node: _Node) -> Tensor:
    parts = [network.tensor(node, i) for i in range(max(len(node.inputs), 1))]
    rank, axis = parts[0].rank, node.integer("axis", 0)
    if axis not in (1, 1 - rank) or any(x.rank != rank for x in parts):
        node.refuse(f"has axis {axis} over {rank} axes; required: 1, the channels, and inputs of as many axes")
    return network.add(Concat, node, parts)


def _flatten(network: _Network, node: _Node) -> Tensor:
    x = network.tensor(node)
    axis = node.integer("axis", 1)
    if axis not in (1, 1 - x.rank):
        node.refuse(f"has axis {axis}; required: 1, so that all but the batch becomes flat")
    return _flat(network, node, x)


def _flat(network: _Network, node: _Node, x: Tensor) -> Tensor:
    return replace(x, rank=2) if x.shape[1:] == (1, 1) else network.add(Flatten, node, [x], rank=2)


def _reshape(network: _Network, node: _Node) -> Tensor | Constant:
    shape = tuple(int(n) for n in network.constant(node, 1).ravel())
    if network.is_constant(node, 0):
        weight = network.constant(node, 0)
        network.count_weights(node, weight)
        try:
            return weight.reshape([weight.shape[i] if n == 0 else n for i, n in enumerate(shape)])
        except (ValueError, IndexError):
            node.refuse(f"makes {shape} of a constant of shape {weight.shape}; required: as many numbers")
    x = network.tensor(node)
    features = int(np.prod(x.shape, dtype=object))
    if len(shape) != 2 or shape[0] not in (-1, 0, 1, network.batch or 1) or shape[1] not in (-1, features) or shape == (-1, -1):
        node.refuse(f"makes {shape} of (N, {', '.join(map(str, x.shape))}); required: (N, {features}), all but the batch made flat")
    return _flat(network, node, x)


def _squeeze(network: _Network, node: _Node) -> Tensor:
    x = network.tensor(node, rank=4)
    if network.axes(node, 4) != {2, 3} or x.shape[1:] != (1, 1):
        node.refuse("removes other axes than height and width, or from more than one pixel; required: axes 2 and 3 of (N, C, 1, 1)")
    return replace(x, rank=2)


def _transpose(network: _Network, node: _Node) -> Constant:
    weight = network.constant(node, 0)
    axes = node.integers("perm") or tuple(reversed(range(weight.ndim)))
    if sorted(axes) != list(range(weight.ndim)):
        node.refuse(f"has perm {axes} for {weight.ndim} axes")
    return weight.transpose(axes)


def _constant(_: _Network, node: _Node) -> Any:
    for name, field in {"value": "t", "value_float": "f", "value_floats": "floats", "value_int": "i", "value_ints": "ints"}.items():
        if name in node.attributes:
            value = getattr(node.attributes[name], field)
            return value if field == "t" else np.asarray(value)
    return node.refuse(f"has attributes {sorted(node.attributes)}; required: a tensor or numbers")


def _identity(network: _Network, node: _Node) -> Any:
    return network.value(node, 0)


def _dropout(network: _Network, node: _Node) -> Tensor:
    training = network.optional_constant(node, 2)
    if training is not None and training.any():
        node.refuse("drops at inference; required: training_mode false")
    return network.tensor(node)


_OPERATORS: dict[str, Callable[[_Network, _Node], Any]] = {
    "Add": _add, "AveragePool": _pool, "BatchNormalization": _batch_norm, "Clip": _clip, "Concat": _concat, "Constant": _constant,
    "Conv": _conv, "Div": _divide, "Dropout": _dropout, "Flatten": _flatten, "Gemm": _gemm, "GlobalAveragePool": _global_pool,
    "GlobalMaxPool": _global_pool, "Identity": _identity, "LRN": _lrn, "LogSoftmax": _softmax, "MatMul": _matmul, "MaxPool": _pool,
    "Mul": _multiply, "Pad": _pad, "ReduceMean": _reduce_mean, "Relu": _relu, "Reshape": _reshape, "Softmax": _softmax,
    "Squeeze": _squeeze, "Sub": _subtract, "Sum": _sum_of_tensors, "Transpose": _transpose,
}
