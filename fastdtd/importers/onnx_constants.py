"""ONNX operators on constants: the arithmetic on shapes that exporters write between the layers, and what they do to weights.

A file is not trusted, so nothing here runs it but these functions, and each says how many numbers it makes before it makes them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, Protocol

import numpy as np
import numpy.typing as npt
import onnx

MAX_AXES = 32  # what NumPy 1 holds

Constant = npt.NDArray[Any]

TYPES: dict[int, Any] = {
    onnx.TensorProto.FLOAT16: np.float16, onnx.TensorProto.FLOAT: np.float32, onnx.TensorProto.DOUBLE: np.float64,
    onnx.TensorProto.INT32: np.int32, onnx.TensorProto.INT64: np.int64, onnx.TensorProto.BOOL: np.bool_,
}


class Node(Protocol):
    """The node whose constants are computed, and the room that is left for what it makes."""

    op: str

    def refuse(self, what: str) -> NoReturn: ...
    def integer(self, name: str, default: int) -> int: ...
    def number(self, name: str, default: float) -> float: ...
    def text(self, name: str, default: str) -> str: ...
    def integers(self, name: str) -> tuple[int, ...] | None: ...
    def attribute_tensor(self, name: str) -> Constant | None: ...


Room = Callable[[int], None]  # refuses as many numbers as would be too many
Fold = Callable[[Node, list[Any], Room], Any]


def fold(node: Node, inputs: list[Constant | None], room: Room) -> Constant | list[Constant]:
    """What `node`, of an operator in OPERATORS, makes of constants; None stands for an input that is left out.

    Raises
    ------
    ConversionError
        By node.refuse or room, where the inputs do not fit each other or would make too much.
    """
    least = LEAST_INPUTS.get(node.op, 1)
    if len(inputs) < least or any(value is None for value in (inputs[:least] if node.op in WITH_OPTIONAL_INPUTS else inputs)):
        node.refuse(f"lacks one of its inputs; required: {least}")
    try:
        with np.errstate(all="ignore"):
            made = OPERATORS[node.op](node, inputs, room)
        if isinstance(made, list):
            return [np.asarray(part) for part in made]
        return np.asarray(made)
    except (ValueError, IndexError, TypeError, OverflowError, ZeroDivisionError) as error:
        shapes = ", ".join(str(value.shape) for value in inputs[:5] if value is not None)
        node.refuse(f"cannot be computed from constants of shapes {shapes}: {str(error).strip() or type(error).__name__}")


def small_integers(node: Node, value: Any, most: int = MAX_AXES) -> list[int]:
    """A short list of integers: axes, a shape, where to slice."""
    value = np.asarray(value)
    if value.dtype.kind not in "iub" or value.size > most:
        node.refuse(f"has {value.size} numbers of type {value.dtype} where a list belongs; required: at most {most} integers")
    return [int(n) for n in value.ravel()]


def axes_of(node: Node, inputs: Sequence[Constant | None], index: int = 1) -> list[int] | None:
    """The axes in an attribute or, in newer opsets, in an input."""
    given = inputs[index] if len(inputs) > index else None
    if given is not None:
        return small_integers(node, given)
    axes = node.integers("axes")
    return None if axes is None else list(axes)


def slices(node: Node, shape: Sequence[int], inputs: Sequence[Constant | None]) -> list[slice]:
    """What Slice takes of each axis, from attributes (before opset 10) or inputs."""
    lists = [node.integers("starts"), node.integers("ends"), node.integers("axes"), None]
    for i in range(4):
        given = inputs[i + 1] if len(inputs) > i + 1 else None
        if given is not None:
            lists[i] = tuple(small_integers(node, given))
    starts, ends, axes, steps = lists
    axes = tuple(range(len(starts or ()))) if axes is None else axes
    if starts is None or ends is None or not len(starts) == len(ends) == len(axes) == len(starts if steps is None else steps):
        node.refuse("has starts, ends, axes and steps of different lengths; required: as many of each")
    result = [slice(None)] * len(shape)
    for start, end, axis, step in zip(starts, ends, axes, steps or (1,) * len(starts), strict=True):
        if not -len(shape) <= axis < len(shape) or not step:
            node.refuse(f"has axis {axis} and step {step} for {len(shape)} axes; required: an axis that there is, and a step other than 0")
        size = shape[axis]
        if step > 0:
            low, high = _clamped(start, size, 0, size), _clamped(end, size, 0, size)
            result[axis] = slice(low, max(high, low), step)
        else:
            low, high = _clamped(start, size, 0, size - 1), _clamped(end, size, -1, size - 1)
            result[axis] = slice(low, None if high < 0 else high, step) if low > high else slice(0, 0)
    return result


def _clamped(place: int, size: int, least: int, most: int) -> int:
    return min(max(place + size if place < 0 else place, least), most)


def split_sizes(node: Node, length: int, inputs: Sequence[Constant | None], outputs: int) -> list[int]:
    """How long the parts are that Split makes of an axis."""
    given = inputs[1] if len(inputs) > 1 else None
    if given is not None:
        return small_integers(node, given, 10_000)
    if (sizes := node.integers("split")) is not None:
        return list(sizes)
    count = node.integer("num_outputs", outputs)
    if not 1 <= count <= 10_000:
        node.refuse(f"splits into {count} parts; required: 1 to 10000")
    size = -(-length // count)
    return [min(size, length - i * size) for i in range(count)]


def _elementwise(function: Callable[..., Any]) -> Fold:
    def make(node: Node, inputs: list[Any], room: Room) -> Any:
        inputs = inputs[:LEAST_INPUTS.get(node.op, 1)]  # NumPy would write into one more
        room(math.prod(np.broadcast_shapes(*(value.shape for value in inputs))))
        return function(*inputs)

    return make


def _chained(function: Callable[[Any, Any], Any]) -> Fold:
    """Of any number of inputs."""
    def make(_: Node, inputs: list[Any], room: Room) -> Any:
        total = inputs[0]
        for value in inputs[1:]:
            room(math.prod(np.broadcast_shapes(total.shape, value.shape)))
            total = function(total, value)
        return total

    return make


def _quotient(a: Constant, b: Constant) -> Constant:
    if a.dtype.kind == "f" or b.dtype.kind == "f":
        return np.asarray(a / b)
    if not b.all():
        raise ZeroDivisionError("an integer is divided by zero")
    return np.asarray(np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b)), a.dtype)  # towards zero, as ONNX does


def _raised(a: Constant, b: Constant) -> Constant:
    return np.asarray(np.power(a, b), a.dtype)


def _remainder(node: Node, inputs: list[Any], room: Room) -> Any:
    room(math.prod(np.broadcast_shapes(inputs[0].shape, inputs[1].shape)))
    if inputs[1].dtype.kind != "f" and not inputs[1].all():
        raise ZeroDivisionError("an integer is divided by zero")
    return (np.fmod if node.integer("fmod", 0) else np.mod)(inputs[0], inputs[1])


def _cast(node: Node, inputs: list[Any], room: Room) -> Any:
    dtype = inputs[1].dtype if node.op == "CastLike" else TYPES.get(node.integer("to", 0))
    if dtype is None:
        node.refuse(f"casts to element type {node.integer('to', 0)}; required: float16, float32, float64, int32, int64 or bool")
    room(inputs[0].size)
    return inputs[0].astype(dtype)


def _shape(node: Node, inputs: list[Any], _: Room) -> Any:
    return shape_slice(node, inputs[0].shape)


def shape_slice(node: Node, shape: Sequence[int]) -> Constant:
    """What Shape makes: since opset 15, of some of the axes."""
    return np.array(shape, np.int64)[node.integer("start", 0):node.integer("end", len(shape))]


def _gather(node: Node, inputs: list[Any], room: Room) -> Any:
    data, places = inputs
    axis = node.integer("axis", 0)
    length = data.shape[axis]
    if places.dtype.kind not in "iu" or (places.size and not -length <= places.min() <= places.max() < length):
        raise IndexError(f"places {places.min()} to {places.max()} of an axis of length {length}")
    room(data.size // max(length, 1) * places.size)
    return np.take(data, places, axis)


def _slice(node: Node, inputs: list[Any], _: Room) -> Any:
    return inputs[0][tuple(slices(node, inputs[0].shape, inputs))]


def _concat(node: Node, inputs: list[Any], room: Room) -> Any:
    room(sum(value.size for value in inputs))
    return np.concatenate(inputs, node.integer("axis", 0))


def _split(node: Node, inputs: list[Any], _: Room) -> Any:
    axis = node.integer("axis", 0)
    sizes = split_sizes(node, inputs[0].shape[axis], inputs, len(getattr(node, "outputs", [])))
    if min(sizes, default=0) < 0 or sum(sizes) != inputs[0].shape[axis]:
        raise ValueError(f"parts of {sizes} numbers")
    return np.split(inputs[0], np.cumsum(sizes)[:-1].tolist(), axis)


def _unsqueeze(node: Node, inputs: list[Any], _: Room) -> Any:
    axes = axes_of(node, inputs)
    if axes is None or len(axes) + inputs[0].ndim > MAX_AXES:
        raise ValueError(f"axes {axes}")
    return np.expand_dims(inputs[0], tuple(axes))


def _squeeze(node: Node, inputs: list[Any], _: Room) -> Any:
    axes = axes_of(node, inputs)
    return np.squeeze(inputs[0], None if axes is None else tuple(axes))


def _reshape(node: Node, inputs: list[Any], _: Room) -> Any:
    target = small_integers(node, inputs[1])
    shape = inputs[0].shape
    if not node.integer("allowzero", 0):
        target = [shape[i] if n == 0 else n for i, n in enumerate(target)]
    return inputs[0].reshape(target)


def _flatten(node: Node, inputs: list[Any], _: Room) -> Any:
    axis = node.integer("axis", 1)
    return inputs[0].reshape(math.prod(inputs[0].shape[:axis]), -1)


def _transpose(node: Node, inputs: list[Any], _: Room) -> Any:
    return inputs[0].transpose(node.integers("perm"))


def _constant_of_shape(node: Node, inputs: list[Any], room: Room) -> Any:
    shape, value = small_integers(node, inputs[0]), node.attribute_tensor("value")
    if min(shape, default=0) < 0:
        raise ValueError(f"a shape {shape}")
    room(math.prod(shape))
    return np.full(shape, np.float32(0) if value is None else value.reshape(()))


def _range(_: Node, inputs: list[Any], room: Room) -> Any:
    start, limit, delta = (value.reshape(()).item() for value in inputs)
    count = max(math.ceil((limit - start) / delta), 0)
    room(count)
    return (start + np.arange(count) * delta).astype(inputs[0].dtype)


def _expand(node: Node, inputs: list[Any], room: Room) -> Any:
    target = small_integers(node, inputs[1])
    if min(target, default=1) < 0:
        raise ValueError(f"a shape {target}")
    shape = np.broadcast_shapes(inputs[0].shape, tuple(target))
    room(math.prod(shape))
    return np.broadcast_to(inputs[0], shape)


def _tile(node: Node, inputs: list[Any], room: Room) -> Any:
    times = small_integers(node, inputs[1])
    if min(times, default=1) < 0 or len(times) != inputs[0].ndim:
        raise ValueError(f"{times} repeats")
    room(inputs[0].size * math.prod(times))
    return np.tile(inputs[0], times)


def _reduce(function: Callable[..., Any]) -> Fold:
    def make(node: Node, inputs: list[Any], room: Room) -> Any:
        axes = axes_of(node, inputs)
        if not axes and node.integer("noop_with_empty_axes", 0):
            return inputs[0]
        room(inputs[0].size)
        return function(inputs[0], axis=tuple(axes) if axes else None, keepdims=bool(node.integer("keepdims", 1))).astype(inputs[0].dtype)

    return make


def _clip(node: Node, inputs: list[Any], room: Room) -> Any:
    bounds = [*inputs[1:], None, None][:2]
    low, high = (np.asarray(node.number(name, limit)) if bound is None else bound
                 for bound, name, limit in zip(bounds, ("min", "max"), (-np.inf, np.inf), strict=True))
    room(math.prod(np.broadcast_shapes(inputs[0].shape, low.shape, high.shape)))
    return np.minimum(np.maximum(inputs[0], low), high).astype(inputs[0].dtype)


def _nonzero(_: Node, inputs: list[Any], room: Room) -> Any:
    room(inputs[0].size * max(inputs[0].ndim, 1))
    return np.array(np.nonzero(np.atleast_1d(inputs[0])), np.int64)


OPERATORS: dict[str, Fold] = {
    "Abs": _elementwise(np.abs), "Add": _elementwise(np.add), "And": _elementwise(np.logical_and), "Cast": _cast, "CastLike": _cast,
    "Ceil": _elementwise(np.ceil), "Clip": _clip, "Concat": _concat, "ConstantOfShape": _constant_of_shape,
    "Div": _elementwise(_quotient), "Equal": _elementwise(np.equal), "Exp": _elementwise(np.exp), "Expand": _expand, "Flatten": _flatten,
    "Floor": _elementwise(np.floor), "Gather": _gather, "Greater": _elementwise(np.greater),
    "GreaterOrEqual": _elementwise(np.greater_equal), "Identity": lambda _, inputs, __: inputs[0], "Less": _elementwise(np.less),
    "LessOrEqual": _elementwise(np.less_equal), "Log": _elementwise(np.log), "Max": _chained(np.maximum), "Min": _chained(np.minimum),
    "Mod": _remainder, "Mul": _elementwise(np.multiply), "Neg": _elementwise(np.negative), "NonZero": _nonzero,
    "Not": _elementwise(np.logical_not), "Or": _elementwise(np.logical_or), "Pow": _elementwise(_raised),
    "Range": _range, "Reciprocal": _elementwise(np.reciprocal), "ReduceMax": _reduce(np.max), "ReduceMean": _reduce(np.mean),
    "ReduceMin": _reduce(np.min), "ReduceProd": _reduce(np.prod), "ReduceSum": _reduce(np.sum),
    "Relu": _elementwise(lambda a: np.maximum(a, 0)), "Reshape": _reshape, "Round": _elementwise(np.round), "Shape": _shape,
    "Sign": _elementwise(np.sign), "Size": lambda _, inputs, __: np.array(inputs[0].size, np.int64), "Slice": _slice, "Split": _split,
    "Sqrt": _elementwise(np.sqrt), "Squeeze": _squeeze, "Sub": _elementwise(np.subtract), "Sum": _chained(np.add), "Tile": _tile,
    "Transpose": _transpose, "Unsqueeze": _unsqueeze, "Where": _elementwise(np.where), "Xor": _elementwise(np.logical_xor),
}
LEAST_INPUTS = {**dict.fromkeys(("Add", "And", "CastLike", "Div", "Equal", "Expand", "Gather", "Greater", "GreaterOrEqual", "Less",
                                 "LessOrEqual", "Mod", "Mul", "Or", "Pow", "Reshape", "Sub", "Tile", "Xor"), 2), "Range": 3, "Where": 3}
WITH_OPTIONAL_INPUTS = {"Clip", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum", "Slice", "Split", "Squeeze"}
