"""ONNX operators on constants: arithmetic on shapes, as exporters write it between the layers, and on weights.

A file is not trusted, so nothing here runs it but these functions, and each says how many elements it makes before it
makes them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from fastdtd.importers.moves import MAX_AXES, Array

if TYPE_CHECKING:
    from fastdtd.importers.onnx.reader import Node

_QUANTIZED: dict[int, Any] = {
    onnx.TensorProto.INT8: np.int8, onnx.TensorProto.UINT8: np.uint8, onnx.TensorProto.INT16: np.int16,
    onnx.TensorProto.UINT16: np.uint16,
}
TYPES: dict[int, Any] = {
    **_QUANTIZED,
    onnx.TensorProto.FLOAT16: np.float16, onnx.TensorProto.FLOAT: np.float32, onnx.TensorProto.DOUBLE: np.float64,
    onnx.TensorProto.INT32: np.int32, onnx.TensorProto.INT64: np.int64, onnx.TensorProto.BOOL: np.bool_,
    onnx.TensorProto.BFLOAT16: np.float32,  # with half of its bits
}
TYPES_TEXT = "float16, bfloat16, float32, float64, a whole number of 8 to 64 bits, or bool"
# Bits, and whether there is a sign, of element types of which a byte holds several. Older versions of onnx lack names.
PACKED = {21: (4, False), 22: (4, True), 25: (2, False), 26: (2, True)}  # UINT4, INT4, UINT2, INT2


Fold = Callable[["Node", list[Any]], Any]


def fold(node: Node, inputs: list[Array | None]) -> Array | list[Array]:
    """What `node`, of an operator in OPERATORS, makes of constants; None stands for an input that is left out.

    Raises ConversionError, by node.refuse or node.spend, where the inputs do not fit each other or would make too much.
    """
    count = MIN_INPUTS.get(node.op, 1)
    required = inputs[:count] if node.op in WITH_OPTIONAL_INPUTS else inputs
    if len(inputs) < count or any(value is None for value in required):
        node.refuse(f"lacks one of its inputs; required: {count}")
    try:
        with np.errstate(all="ignore"):
            made = OPERATORS[node.op](node, inputs)
        return [np.asarray(part) for part in made] if isinstance(made, list) else np.asarray(made)
    except (ValueError, IndexError, TypeError, OverflowError, ZeroDivisionError) as error:
        shapes = ", ".join(str(value.shape) for value in inputs[:5] if value is not None)
        reason = str(error).strip() or type(error).__name__
        node.refuse(f"cannot be computed from constants of shapes {shapes}: {reason}")


def small_integers(node: Node, value: Any, limit: int = MAX_AXES) -> list[int]:
    """A short list of integers: axes, a shape, where to slice."""
    value = np.asarray(value)
    if value.dtype.kind not in "iub" or value.size > limit:
        node.refuse(f"has {value.size} values of type {value.dtype} where a list belongs; required: at most {limit} "
                    "integers")
    return [int(n) for n in value.ravel()]


def axes_of(node: Node, inputs: Sequence[Array | None]) -> tuple[int, ...] | None:
    """The axes in an attribute or, in newer opsets, in the second input."""
    if len(inputs) > 1 and inputs[1] is not None:
        return tuple(small_integers(node, inputs[1]))
    return node.integers("axes")


def slices(node: Node, shape: Sequence[int], inputs: Sequence[Array | None]) -> list[slice]:
    """What Slice takes of each axis, from attributes (before opset 10) or inputs."""
    lists = [node.integers("starts"), node.integers("ends"), node.integers("axes"), None]
    for i, given in enumerate(inputs[1:5]):
        if given is not None:
            lists[i] = tuple(small_integers(node, given))
    starts, ends, axes, steps = lists
    axes = tuple(range(len(starts or ()))) if axes is None else axes
    if starts is None or ends is None or not len(starts) == len(ends) == len(axes) == len(
            starts if steps is None else steps):
        node.refuse("has starts, ends, axes and steps of different lengths; required: as many of each")
    result = [slice(None)] * len(shape)
    for start, end, axis, step in zip(starts, ends, axes, steps or (1,) * len(starts), strict=True):
        if not -len(shape) <= axis < len(shape) or not step:
            node.refuse(f"has axis {axis} and step {step} for {len(shape)} axes; required: an axis that there is, and "
                        "a step other than 0")
        size = shape[axis]
        if step > 0:
            low, high = _clamped(start, size, 0, size), _clamped(end, size, 0, size)
            result[axis] = slice(low, max(high, low), step)
        else:
            low, high = _clamped(start, size, 0, size - 1), _clamped(end, size, -1, size - 1)
            result[axis] = slice(low, None if high < 0 else high, step) if low > high else slice(0, 0)
    return result


def _clamped(position: int, size: int, low: int, high: int) -> int:
    return min(max(position + size if position < 0 else position, low), high)


def split_sizes(node: Node, length: int, inputs: Sequence[Array | None]) -> list[int]:
    """How long the parts are that Split makes of an axis."""
    if len(inputs) > 1 and inputs[1] is not None:
        return small_integers(node, inputs[1], 10_000)
    if (sizes := node.integers("split")) is not None:
        return list(sizes)
    count = node.integer("num_outputs", len(node.outputs))
    if not 1 <= count <= 10_000:
        node.refuse(f"splits into {count} parts; required: 1 to 10000")
    size = -(-length // count)
    return [min(size, length - i * size) for i in range(count)]


def shape_slice(node: Node, shape: Sequence[int]) -> Array:
    """What Shape makes: since opset 15, of some of the axes."""
    return np.array(shape, np.int64)[node.integer("start", 0):node.integer("end", len(shape))]


def _broadcast_size(*values: Any) -> int:
    return math.prod(np.broadcast_shapes(*(value.shape for value in values)))


def _elementwise(function: Callable[..., Any]) -> Fold:
    def make(node: Node, inputs: list[Any]) -> Any:
        node.spend(_broadcast_size(*inputs))
        return function(*inputs)

    return make


def _chained(function: Callable[[Any, Any], Any]) -> Fold:
    """Of any number of inputs."""
    def make(node: Node, inputs: list[Any]) -> Any:
        total = inputs[0]
        for value in inputs[1:]:
            node.spend(_broadcast_size(total, value))
            total = function(total, value)
        return total

    return make


def _reduced(function: Callable[..., Any]) -> Fold:
    def make(node: Node, inputs: list[Any]) -> Any:
        axes, keep = axes_of(node, inputs), bool(node.integer("keepdims", 1))
        if node.integer("noop_with_empty_axes", 0) and not axes:
            return inputs[0]
        node.spend(inputs[0].size)
        return function(inputs[0], axis=axes or None, keepdims=keep).astype(inputs[0].dtype)

    return make


def _quotient(a: Array, b: Array) -> Array:
    if a.dtype.kind == "f" or b.dtype.kind == "f":
        return np.asarray(a / b)
    _check_divisor(b)
    return np.asarray(np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b)), a.dtype)  # towards zero, as ONNX does


def _check_divisor(b: Array) -> None:
    if b.dtype.kind != "f" and not b.all():
        raise ZeroDivisionError("an integer is divided by zero")


def _remainder(node: Node, inputs: list[Any]) -> Any:
    node.spend(_broadcast_size(*inputs[:2]))
    _check_divisor(inputs[1])
    return (np.fmod if node.integer("fmod", 0) else np.mod)(inputs[0], inputs[1])


def _cast(node: Node, inputs: list[Any]) -> Any:
    dtype = inputs[1].dtype if node.op == "CastLike" else TYPES.get(node.integer("to", 0))
    if dtype is None:
        node.refuse(f"casts to element type {node.integer('to', 0)}; required: {TYPES_TEXT}")
    node.spend(inputs[0].size)
    made = inputs[0].astype(dtype)
    return _rounded(made) if node.integer("to", 0) == onnx.TensorProto.BFLOAT16 else made


def _rounded(value: Array) -> Array:
    """float32 numbers as bfloat16 has them: the nearest with half of the bits, the even one of two."""
    bits = value.view(np.uint32)
    upper = (bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)
    return np.where(np.isfinite(value), upper.view(np.float32), value)


def _gather(node: Node, inputs: list[Any]) -> Any:
    data, positions = inputs
    axis = node.integer("axis", 0)
    length = data.shape[axis]
    if positions.dtype.kind not in "iu" or (
            positions.size and not -length <= positions.min() <= positions.max() < length):
        raise IndexError(f"positions {positions.min()} to {positions.max()} of an axis of length {length}")
    node.spend(data.size // max(length, 1) * positions.size)
    return np.take(data, positions, axis)


def _concat(node: Node, inputs: list[Any]) -> Any:
    node.spend(sum(value.size for value in inputs))
    return np.concatenate(inputs, node.integer("axis", 0))


def _split(node: Node, inputs: list[Any]) -> Any:
    axis = node.integer("axis", 0)
    sizes = split_sizes(node, inputs[0].shape[axis], inputs)
    if min(sizes, default=0) < 0 or sum(sizes) != inputs[0].shape[axis]:
        raise ValueError(f"parts of {sizes} elements")
    node.builder.budget.step(node, len(sizes))
    return np.split(inputs[0], np.cumsum(sizes)[:-1].tolist(), axis)


def _unsqueeze(node: Node, inputs: list[Any]) -> Any:
    axes = axes_of(node, inputs)
    if axes is None or len(axes) + inputs[0].ndim > MAX_AXES:
        raise ValueError(f"axes {axes}")
    return np.expand_dims(inputs[0], axes)


def _reshape(node: Node, inputs: list[Any]) -> Any:
    target = small_integers(node, inputs[1])
    if not node.integer("allowzero", 0):
        target = [inputs[0].shape[i] if n == 0 else n for i, n in enumerate(target)]
    return _reshaped(node, inputs[0], target)


def _reshaped(node: Node, value: Array, shape: Sequence[int]) -> Array:
    """What is expanded or transposed is copied."""
    node.spend(value.size)
    return value.reshape(shape)


def _target(node: Node, value: Any) -> tuple[int, ...]:
    shape = tuple(small_integers(node, value))
    if min(shape, default=0) < 0:
        raise ValueError(f"a shape {list(shape)}")
    return shape


def _constant_of_shape(node: Node, inputs: list[Any]) -> Any:
    shape, value = _target(node, inputs[0]), node.attribute_tensor("value")
    node.spend(math.prod(shape))
    return np.full(shape, np.float32(0) if value is None else value.reshape(()))


def _expand(node: Node, inputs: list[Any]) -> Any:
    shape = np.broadcast_shapes(inputs[0].shape, _target(node, inputs[1]))
    node.spend(math.prod(shape))
    return np.broadcast_to(inputs[0], shape)


def _tile(node: Node, inputs: list[Any]) -> Any:
    times = _target(node, inputs[1])
    if len(times) != inputs[0].ndim:
        raise ValueError(f"{list(times)} repeats")
    node.spend(inputs[0].size * math.prod(times))
    return np.tile(inputs[0], times)


def _range(node: Node, inputs: list[Any]) -> Any:
    start, limit, delta = (value.reshape(()).item() for value in inputs)
    count = max(math.ceil((limit - start) / delta), 0)
    node.spend(count)
    return (start + np.arange(count) * delta).astype(inputs[0].dtype)


def _clip(node: Node, inputs: list[Any]) -> Any:
    low, high = (np.asarray(node.number(name, limit)) if bound is None else bound for bound, name, limit in
                 zip([*inputs[1:], None, None][:2], ("min", "max"), (-np.inf, np.inf), strict=True))
    node.spend(_broadcast_size(inputs[0], low, high))
    return np.minimum(np.maximum(inputs[0], low), high).astype(inputs[0].dtype)


def _nonzero(node: Node, inputs: list[Any]) -> Any:
    node.spend(inputs[0].size * max(inputs[0].ndim, 1))
    return np.array(np.nonzero(np.atleast_1d(inputs[0])), np.int64)


def _flatten(node: Node, inputs: list[Any]) -> Any:
    return _reshaped(node, inputs[0], [math.prod(inputs[0].shape[:node.integer("axis", 1)]), -1])


def unpacked(packed: Array, bits: int, is_signed: bool = False) -> Array:
    """Whole numbers of 2, 4 or 8 bits that bytes hold along the last axis, the first in the lowest bits."""
    each = packed[..., None] >> np.arange(0, 8, bits, dtype=np.uint8) & np.uint8(2**bits - 1)
    numbers = each.reshape(*packed.shape[:-1], -1)
    return (numbers << np.uint8(8 - bits)).view(np.int8) >> np.int8(8 - bits) if is_signed else numbers


def dequantized(node: Node, inputs: Sequence[Any], axis: int | None = None) -> Array:
    """(numbers - zero point) * scale; axis: along which there are several of both, None: the node's own."""
    numbers, scale, zero = (*inputs, None)[:3]
    axis, block = node.integer("axis", 1) if axis is None else axis, node.integer("block_size", 0)
    node.ignore("output_dtype")  # a type of floating-point numbers
    if numbers.dtype.kind not in "iu" or scale.dtype.kind != "f" or (zero is not None and zero.dtype.kind not in "iu"):
        node.refuse(f"has numbers of type {numbers.dtype} with scales of type {scale.dtype}; required: whole numbers, "
                    "as zero points too, and floating-point scales")
    node.spend(numbers.size)
    if block:
        return _dequantized_blocks(node, numbers, scale, zero, axis, block)
    shape = [1] * numbers.ndim
    if scale.size > 1:
        if scale.ndim != 1 or not -numbers.ndim <= axis < numbers.ndim or len(scale) != numbers.shape[axis]:
            node.refuse(f"has scales of shape {scale.shape} for numbers of shape {numbers.shape}, axis {axis}; "
                        "required: one, or one for each along the axis")
        shape[axis] = len(scale)
    zeros = np.zeros(1, np.int32) if zero is None else zero.astype(np.int32)
    if zeros.size not in (1, scale.size):
        node.refuse(f"has {zeros.size} zero points and {scale.size} scales; required: as many")
    shifted = numbers.astype(np.int64) - (zeros.reshape(shape) if zeros.size > 1 else zeros.reshape(-1)[0])
    return np.asarray(shifted * scale.astype(np.float32).reshape(shape), np.float32)


def _dequantized_blocks(node: Node, numbers: Array, scale: Array, zero: Array | None, axis: int, block: int) -> Array:
    """Where so many numbers along the axis have one scale and zero point."""
    is_axis = -numbers.ndim <= axis < numbers.ndim
    wanted = list(numbers.shape)
    if is_axis and block > 0:
        wanted[axis] = -(-wanted[axis] // block)
    if not is_axis or block < 0 or scale.shape != tuple(wanted) or (zero is not None and zero.shape != scale.shape):
        node.refuse(f"has scales of shape {scale.shape} and zero points of shape "
                    f"{None if zero is None else zero.shape} for numbers of shape {numbers.shape} in blocks of {block} "
                    f"along axis {axis}; required: one of each for every block, an axis that there is, and blocks of 1 "
                    "or more")
    node.spend(numbers.size)
    position = np.arange(numbers.shape[axis]) // block
    shifted = numbers.astype(np.int32) - (0 if zero is None else np.take(zero, position, axis).astype(np.int32))
    return np.asarray(shifted * np.take(scale.astype(np.float32), position, axis), np.float32)


def _quantized(node: Node, inputs: Sequence[Any]) -> Array:
    """The whole numbers of constants."""
    values, scale, zero = (*inputs, None)[:3]
    axis, dtype = node.integer("axis", 1), quantized_type(node, zero)
    node.spend(values.size)
    shape = [1] * values.ndim
    if scale.size > 1:
        shape[axis] = scale.size  # what does not fit is a ValueError
    zeros = np.zeros_like(scale, np.int64) if zero is None else np.broadcast_to(zero.astype(np.int64), scale.shape)
    info = np.iinfo(dtype)
    numbers = np.rint(values / scale.reshape(shape)) + zeros.reshape(shape)
    return np.asarray(np.clip(numbers, info.min, info.max), dtype)


def quantized_type(node: Node, zero: Array | None) -> np.dtype[Any]:
    node.ignore("precision", "saturate")
    wanted = node.integer("output_dtype", 0)
    dtype = zero.dtype if zero is not None else np.dtype(_QUANTIZED.get(wanted, np.uint8))
    if dtype not in _QUANTIZED.values() or wanted not in (0, *_QUANTIZED):
        node.refuse(f"quantises to {dtype}, output_dtype {wanted}; required: int8, uint8, int16 or uint16")
    return dtype


OPERATORS: dict[str, Fold] = {
    "Abs": _elementwise(np.abs), "Add": _elementwise(np.add), "And": _elementwise(np.logical_and), "Cast": _cast,
    "CastLike": _cast, "Ceil": _elementwise(np.ceil), "Clip": _clip, "Concat": _concat,
    "ConstantOfShape": _constant_of_shape, "DequantizeLinear": dequantized, "Div": _elementwise(_quotient),
    "Equal": _elementwise(np.equal), "Exp": _elementwise(np.exp), "Expand": _expand, "Flatten": _flatten,
    "Floor": _elementwise(np.floor), "Gather": _gather, "Greater": _elementwise(np.greater),
    "GreaterOrEqual": _elementwise(np.greater_equal),
    "Identity": lambda _, inputs: inputs[0], "Less": _elementwise(np.less), "LessOrEqual": _elementwise(np.less_equal),
    "Log": _elementwise(np.log), "Max": _chained(np.maximum), "Min": _chained(np.minimum), "Mod": _remainder,
    "Mul": _elementwise(np.multiply), "Neg": _elementwise(np.negative), "NonZero": _nonzero,
    "Not": _elementwise(np.logical_not), "Or": _elementwise(np.logical_or),
    "Pow": _elementwise(lambda a, b: np.asarray(np.power(a, b), a.dtype)), "QuantizeLinear": _quantized,
    "Range": _range, "Reciprocal": _elementwise(np.reciprocal), "ReduceMax": _reduced(np.max),
    "ReduceMean": _reduced(np.mean), "ReduceMin": _reduced(np.min), "ReduceProd": _reduced(np.prod),
    "ReduceSum": _reduced(np.sum), "Relu": _elementwise(lambda a: np.maximum(a, 0)), "Reshape": _reshape,
    "Round": _elementwise(np.round), "Shape": lambda node, inputs: shape_slice(node, inputs[0].shape),
    "Sign": _elementwise(np.sign),
    "Size": lambda _, inputs: np.array(inputs[0].size, np.int64),
    "Slice": lambda node, inputs: inputs[0][tuple(slices(node, inputs[0].shape, inputs))], "Split": _split,
    "Sqrt": _elementwise(np.sqrt), "Squeeze": lambda node, inputs: np.squeeze(inputs[0], axes_of(node, inputs)),
    "Sub": _elementwise(np.subtract), "Sum": _chained(np.add), "Tile": _tile,
    "Transpose": lambda node, inputs: inputs[0].transpose(node.integers("perm")), "Unsqueeze": _unsqueeze,
    "Where": _elementwise(np.where), "Xor": _elementwise(np.logical_xor),
}
MIN_INPUTS = {
    **dict.fromkeys(("Add", "And", "CastLike", "DequantizeLinear", "Div", "Equal", "Expand", "Gather", "Greater",
                     "GreaterOrEqual", "Less", "LessOrEqual", "Mod", "Mul", "Or", "Pow", "QuantizeLinear", "Reshape",
                     "Sub", "Tile", "Xor"), 2),
    "Range": 3, "Where": 3,
}
WITH_OPTIONAL_INPUTS = {"Clip", "DequantizeLinear", "QuantizeLinear", "ReduceMax", "ReduceMean", "ReduceMin",
                        "ReduceProd", "ReduceSum", "Slice", "Split", "Squeeze"}
