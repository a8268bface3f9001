"""Quantised networks: read as what their whole numbers stand for, value = (number - zero point) * scale.

What quantising rounds is not rounded here, so scores differ from the source's by as much. What it cuts off is cut off:
a range that begins at zero is often all that is left of a ReLU. The grid of a tensor's numbers is followed from the
node that makes them to those that read them.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fastdtd.graph import (
    INPUT,
    Activation,
    AveragePool2d,
    Clip,
    Concat,
    Flatten,
    GlobalAveragePool,
    MaxPool2d,
    Rearrange,
    Softmax,
)
from fastdtd.importers.builder import Builder
from fastdtd.importers.moves import Array
from fastdtd.importers.onnx.constants import dequantized, quantized_type, unpacked
from fastdtd.importers.onnx.operators import convolved, padding_of
from fastdtd.importers.tensors import Tensor

if TYPE_CHECKING:
    from fastdtd.importers.onnx.reader import Node

DOMAIN = "com.microsoft"  # of onnxruntime's own operators
# Of operators there, in which onnx knows none: the attributes that they may have.
ATTRIBUTES: dict[str, set[str]] = {
    "DequantizeLinear": {"axis", "block_size"},
    "MatMulNBits": {"K", "N", "accuracy_level", "bits", "block_size", "weight_prepacked"},
    "QGemm": {"alpha", "transA", "transB"}, "QLinearAdd": set(),
    "QLinearAveragePool": {"auto_pad", "ceil_mode", "channels_last", "count_include_pad", "kernel_shape", "pads",
                           "strides"},
    "QLinearConcat": {"axis"}, "QLinearGlobalAveragePool": {"channels_last"}, "QLinearLeakyRelu": {"alpha"},
    "QLinearMul": set(), "QLinearSigmoid": set(), "QLinearSoftmax": {"axis", "opset"},
    "QuantizeLinear": {"axis", "block_size"},
}
_KEEP_RANGE = AveragePool2d, GlobalAveragePool, MaxPool2d, Concat, Flatten, Rearrange  # of what they read, and zero


@dataclass(frozen=True)
class Grid:
    """Which values a tensor's whole numbers stand for. scale 0: not known before the network runs."""

    scale: float
    zero: int
    dtype: np.dtype[Any]

    def bounds(self) -> tuple[float, float]:
        info = np.iinfo(self.dtype)
        low, high = (np.float32(limit - self.zero) * np.float32(self.scale) for limit in (info.min, info.max))
        return float(low), float(high)


@dataclass(frozen=True)
class RuntimeScale:
    """The scale of numbers whose grid is chosen for each image, times a constant. It cancels, for they are not
    rounded."""

    of: str  # the numbers
    factor: Any = 1.0


@dataclass(frozen=True)
class RuntimeZero:
    """Their zero point."""

    of: str


RUNTIME = RuntimeScale, RuntimeZero


# ---- What is computed ------------------------------------------------------------------------------------------------


def _grid(node: Node, scale: int, zero: int) -> Grid:
    """The grid in two of the node's inputs."""
    factor = node.constant(scale)
    offset = node.optional(zero)
    if factor.size != 1 or not np.isfinite(factor).all() or not factor.all() or (factor < 0).any() or (
            offset is not None and offset.size != 1):
        node.refuse(f"quantises by scales of shape {factor.shape}; required: one, above zero, for what is computed")
    return Grid(float(factor.item()), 0 if offset is None else int(offset.item()), quantized_type(node, offset))


def _read(node: Node, key: int, scale: int, zero: int) -> Tensor:
    """The values of an input's numbers, whose grid two other inputs repeat, or follow from."""
    x, grid = node.tensor(key), node.reader.grids.get(node.inputs[key])
    if grid is None:
        node.refuse(f"reads {node.inputs[key]!r}, which is not quantised; required: what QuantizeLinear makes")
    if grid.scale and (own := _grid(node, scale, zero)) != grid:
        node.refuse(f"reads {node.inputs[key]!r} as {own}, which was made as {grid}; required: the same")
    return x


def _made(b: Builder, node: Node, x: Tensor, scale: int, zero: int) -> Tensor:
    """x, cut off where the grid of the node's result ends."""
    grid = _grid(node, scale, zero)
    node.reader.grids[node.outputs[0]] = grid
    low, high = grid.bounds()
    if not low <= 0 < high:
        node.refuse(f"quantises to {low:g}..{high:g}; required: a range with zero and what is above it")
    return x if _lies_within(b, x, low, high) else b.clip(x, low, high)


def _lies_within(b: Builder, x: Tensor, low: float, high: float) -> bool:
    """Whether it is known to be; the network's input is taken as if it were, for the rule there depends on that."""
    waiting, seen = [x.layer], set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        match b.layers.get(name):
            case Clip(low=own_low, high=own_high) if low <= own_low and own_high <= high:
                pass
            case Softmax() | Activation(function="sigmoid" | "hard_sigmoid"):  # grids for these end at about 1
                pass
            case None if name == INPUT:
                pass
            case layer if isinstance(layer, _KEEP_RANGE):
                waiting.extend(layer.inputs)
            case _:
                return False
    return True


def _quantize(b: Builder, node: Node) -> Tensor:
    node.ignore("axis", "block_size")
    return _made(b, node, node.tensor(), 1, 2)


def _dequantize(b: Builder, node: Node) -> Tensor:
    node.ignore("axis", "block_size", "output_dtype")
    if node.inputs[0] in node.reader.whole:  # pixels, which the network takes as such
        grid = _grid(node, 1, 2)
        return b.affine(node.tensor(), scale=grid.scale, shift=-grid.zero * grid.scale)
    return _read(node, 0, 1, 2)


def _quantize_dynamically(b: Builder, node: Node) -> list[Any]:
    node.reader.grids[node.outputs[0]] = Grid(0.0, 0, np.dtype(np.uint8))
    return [node.tensor(), RuntimeScale(node.outputs[0]), RuntimeZero(node.outputs[0])]


def scaled(b: Builder, node: Node) -> Any:
    """A node that reads what RUNTIME has: products with constants, and with the sums of the numbers."""
    values = [node.value(i) for i in range(len(node.inputs))]
    for i in range(2 if node.op == "Mul" and len(values) == 2 else 0):
        one, other = values[i], values[1 - i]
        if not isinstance(one, RuntimeScale) or isinstance(other, RUNTIME):
            continue
        if not isinstance(other, Tensor):
            return RuntimeScale(one.of, one.factor * node.constant(1 - i).astype(np.float64))
        if node.reader.sums.get(node.inputs[1 - i]) != one.of:
            node.refuse("multiplies by the scale of other numbers; required: that of those it sums up")
        return b.affine(other, scale=one.factor)
    return node.refuse("reads the scale of numbers that are quantised as the network runs; required: a product of it "
                       "with constants and with their sums, as quantize_dynamic of onnxruntime writes it")


def _sum_of_numbers(b: Builder, node: Node) -> Tensor:
    """ConvInteger and MatMulInteger: sums of the numbers less their zero points, which are values over their scale."""
    x, zero = node.tensor(), node.value(2) if node.has_input(2) else None
    grid = node.reader.grids.get(node.inputs[0])
    if grid is None or grid.scale or not isinstance(zero, RuntimeZero) or zero.of != node.inputs[0]:
        node.refuse("sums up other numbers than DynamicQuantizeLinear makes; required: those, and their zero point")
    numbers = node.constant(1)
    ones = np.ones(1, np.float32)
    zeros = node.optional(3)
    if node.op == "MatMulInteger":
        made = b.dense(x, dequantized(node, (numbers, ones, zeros), numbers.ndim - 1).T, None)
    else:
        made = convolved(b, node, x, dequantized(node, (numbers, ones, zeros), 0), None, "/product")
    node.reader.sums[node.outputs[0]] = node.inputs[0]
    return made


def _weights(node: Node, numbers: int, axis: int) -> tuple[Array, Array]:
    """The values of constants whose scale and zero point follow them, and the scales."""
    scale = node.constant(numbers + 1)
    return dequantized(node, (node.constant(numbers), scale, node.optional(numbers + 2)), axis), scale


def _bias(node: Node, index: int, weight_scale: Array) -> Array | None:
    """Whole numbers by the product of both scales."""
    numbers, scale = node.optional(index), node.constant(1)
    return None if numbers is None else np.asarray(
        numbers.astype(np.float64) * scale.astype(np.float64).reshape(-1)[0] * weight_scale.reshape(-1), np.float32)


def _conv(b: Builder, node: Node) -> Tensor:
    x, (weight, scale) = _read(node, 0, 1, 2), _weights(node, 3, 0)
    return _made(b, node, convolved(b, node, x, weight, _bias(node, 8, scale), "/product"), 6, 7)


def _matmul(b: Builder, node: Node) -> Tensor:
    x, (weight, _) = _read(node, 0, 1, 2), _weights(node, 3, -1)
    return _made(b, node, b.dense(x, weight.T, None), 6, 7)


def _matmul_of_few_bits(b: Builder, node: Node) -> Tensor:
    """Weights (N, K) in blocks along K, each with a scale and a zero point of its own; x and the sums are no whole
    numbers."""
    x, packed, scale, zero, bias = node.tensor(), node.constant(1), *(node.optional(i) for i in (2, 3, 5))
    outputs, features = node.integer("N", 0), node.integer("K", 0)
    bits, block = node.integer("bits", 4), node.integer("block_size", 0)
    node.ignore("accuracy_level")  # to how many bits x may be rounded
    if node.has_input(4) or node.integer("weight_prepacked", 0):
        node.refuse("has its inputs in another order, g_idx, or weights that are packed for one device; required: "
                    "neither")
    if bits not in (2, 4, 8) or block < 16 or block & (block - 1) or min(outputs, features) < 1:
        node.refuse(f"has {bits} bits, blocks of {block}, N {outputs} and K {features}; required: 2, 4 or 8 bits, "
                    "blocks of a power of two from 16, N and K from 1")
    blocks = -(-features // block)
    packs = zero is not None and zero.dtype == np.uint8
    zeros = outputs * (-(-blocks * bits // 8) if packs else blocks)
    if packed.dtype != np.uint8 or packed.shape != (outputs, blocks, block * bits // 8) or scale is None or (
            scale.dtype.kind != "f" or scale.size != outputs * blocks) or (
            zero is not None and (zero.size != zeros or not (packs or zero.dtype.kind == "f"))) or (
            bias is not None and bias.shape != (outputs,)):
        shapes = ", ".join(f"{one.shape} of {one.dtype}" for one in (packed, scale, zero, bias) if one is not None)
        node.refuse(f"has weights, scales, zero points and bias of shapes {shapes}; required: ({outputs}, {blocks}, "
                    f"{block * bits // 8}) of uint8, ({outputs}, {blocks}), as many or these packed, and ({outputs},)")
    b.spend(2 * outputs * blocks * block)
    weight = unpacked(packed, bits).astype(np.float32)
    if zero is None:
        weight -= 2**(bits - 1)
    else:
        each = unpacked(zero.reshape(outputs, -1), bits)[:, :blocks] if packs else zero
        weight -= each.reshape(outputs, blocks, 1).astype(np.float32)
    weight *= scale.reshape(outputs, blocks, 1).astype(np.float32)
    return b.dense(x, weight.reshape(outputs, -1)[:, :features], bias)


def _gemm(b: Builder, node: Node) -> Tensor:
    if node.integer("transA", 0) or node.number("alpha", 1.0) != 1:
        node.refuse("transposes or scales its input; required: transA 0 and alpha 1")
    is_transposed = node.integer("transB", 0) != 0
    x, (weight, scale) = _read(node, 0, 1, 2), _weights(node, 3, 0 if is_transposed else 1)
    bias = _bias(node, 6, scale)
    made = b.dense(x, weight if is_transposed else weight.T, bias)
    return _made(b, node, made, 7, 8) if node.has_input(7) else made


def _add(b: Builder, node: Node) -> Tensor:
    return _made(b, node, b.sum([_read(node, 0, 1, 2), _read(node, 3, 4, 5)]), 6, 7)


def _multiply(b: Builder, node: Node) -> Tensor:
    return _made(b, node, b.gated(_read(node, 0, 1, 2), _read(node, 3, 4, 5)), 6, 7)


def _concat(b: Builder, node: Node) -> Tensor:
    parts = [_read(node, i, i + 1, i + 2) for i in range(2, len(node.inputs), 3)]
    return _made(b, node, b.concat(parts, node.integer("axis", 0)), 0, 1)


def _pool(b: Builder, node: Node) -> Tensor:
    if node.integer("channels_last", 0):
        node.refuse("has its channels last; required: channels_last 0")
    x = _read(node, 0, 1, 2)
    axes = b.spatial(x)
    if node.op == "QLinearGlobalAveragePool":
        return _made(b, node, b.reduce(x, "mean", range(2, axes + 2), keep=True), 3, 4)
    kernel, stride = node.window("kernel_shape", axes), node.window("strides", axes, 1)
    made = b.pool(x, True, kernel, stride, padding_of(node, x, kernel, stride, (1,) * axes),
                  node.integer("ceil_mode", 0) != 0, node.integer("count_include_pad", 0) != 0)
    return _made(b, node, made, 3, 4)


def _leaky_relu(b: Builder, node: Node) -> Tensor:
    return _made(b, node, b.leaky_relu(_read(node, 0, 1, 2), node.number("alpha", 0.01)), 3, 4)


def _probabilities(b: Builder, node: Node) -> Tensor:
    x = _read(node, 0, 1, 2)
    if node.op == "QLinearSigmoid":
        return _made(b, node, b.activation(x, "sigmoid"), 3, 4)
    axis, opset = node.integer("axis", -1), node.integer("opset", 13)
    return _made(b, node, b.softmax(x, axis, to_the_end=opset < 13), 3, 4)


OPERATORS: dict[str, Callable[[Builder, Node], Any]] = {
    "ConvInteger": _sum_of_numbers, "DequantizeLinear": _dequantize, "DynamicQuantizeLinear": _quantize_dynamically,
    "MatMulInteger": _sum_of_numbers, "MatMulNBits": _matmul_of_few_bits, "QGemm": _gemm,
    "QLinearAdd": _add, "QLinearAveragePool": _pool,
    "QLinearConcat": _concat, "QLinearConv": _conv, "QLinearGlobalAveragePool": _pool,
    "QLinearLeakyRelu": _leaky_relu, "QLinearMatMul": _matmul, "QLinearMul": _multiply,
    "QLinearSigmoid": _probabilities, "QLinearSoftmax": _probabilities, "QuantizeLinear": _quantize,
}


_OF_VALUES = {"DynamicQuantizeLinear", "MatMulNBits", "QuantizeLinear"}  # what reads no numbers of such


def follow(node: Node, moves: Set[str]) -> None:
    """What becomes of the grids of numbers that a node moves; refuses one that computes with them otherwise."""
    grids, sums = node.reader.grids, node.reader.sums
    own = {grids[name] for name in node.inputs if name in grids}
    added = {sums[name] for name in node.inputs if name in sums}
    if node.op in OPERATORS and node.op not in _OF_VALUES:
        return
    if own:
        if node.op not in moves | {"MaxPool"} or len(own) > 1 or (node.op == "Pad" and next(iter(own)).zero):
            node.refuse("computes with quantised numbers; required: DequantizeLinear before it")
        grids.update(dict.fromkeys(node.outputs, own.pop()))
    if added and node.op != "Mul":
        if node.op != "Cast":
            node.refuse("reads the sums of quantised numbers; required: a product with their scales")
        sums.update(dict.fromkeys(node.outputs, added.pop()))
