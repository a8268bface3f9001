"""What sources write as several operators: recognised while the values go from one to the next.

Functions of one element are in curves.py, norms by an image's own statistics in norms.py.

x * x that is moved, averaged, scaled and raised, and at last divides x, is a local response normalisation. The sign of
a tensor times its magnitude is the tensor, as in a pool by the p-norm. Until it is known what they will be, such
values are `Squares` and `Sign`; the functions here take them as well as tensors and constants.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fastdtd.graph import Clip, Power, ReLU
from fastdtd.importers import curves, norms
from fastdtd.importers.builder import Builder
from fastdtd.importers.curves import Curve
from fastdtd.importers.moves import Array, Node
from fastdtd.importers.norms import Moment
from fastdtd.importers.tensors import Tensor

_REQUIRED = "required: a local response normalisation as PyTorch computes it"


@dataclass(frozen=True)
class Squares:
    """x * x that may become part of a local response normalisation: at last it is what x is divided by."""

    of: Tensor
    view: Tensor  # what was squared, moved as the squares are
    size: int = 0
    has_more_before: bool = False  # of an even size: PyTorch's windows, where ONNX's and Caffe's have more after
    alpha: float = 1.0
    bias: float | None = None
    beta: float | None = None

    def takes(self, constant: Any) -> bool:
        """Whether it is averaged, and neither added to nor raised yet, and the constant is one number."""
        is_number = np.size(constant) == 1 and np.ndim(constant) <= self.view.rank
        return is_number and self.size > 0 and self.bias is None and self.beta is None


@dataclass(frozen=True)
class Sign:
    """The sign of a tensor: PyTorch writes a pool by the p-norm with it, where it changes nothing."""

    of: Tensor

    @property
    def view(self) -> Tensor:
        return self.of


COMPUTED = (Tensor, Squares, Sign, Curve, Moment)


class ValueNode(Node):
    """A node whose inputs are computed or constant, and named by keys: positions in ONNX, parameters in PyTorch."""

    builder: Builder
    first: Any = 0  # key of the input that most operators read

    def value(self, key: Any) -> Any:
        """Of `COMPUTED`, or a constant in the source's own words."""
        raise NotImplementedError

    def label(self, key: Any) -> str:
        """What messages call an input."""
        raise NotImplementedError

    def array(self, value: Any) -> Array:
        """A constant in the source's words as an array."""
        raise NotImplementedError

    def is_computed(self, key: Hashable) -> bool:
        return isinstance(self.value(key), COMPUTED)

    def operand(self, key: Hashable) -> Tensor | Squares | Sign | Curve | Moment | Array:
        """For arithmetic: of `COMPUTED`, or an array."""
        value = self.value(key)
        return value if isinstance(value, COMPUTED) else self.constant(key)

    def moving(self) -> Tensor | Squares:
        """The first input, which may be squares."""
        value = self.value(self.first)
        return value if isinstance(value, Squares) else self.tensor()

    def pointwise(self) -> Tensor | Squares | Curve:
        """The first input, which may be a function of one element."""
        value = self.value(self.first)
        return value if isinstance(value, Curve) else self.moving()

    def stepping(self) -> Tensor | Squares | Curve | Moment:
        """The first input, which may be a function of one element, or a step of a norm."""
        value = self.value(self.first)
        return value if isinstance(value, Moment) else self.pointwise()

    def tensor(self, key: Any = None) -> Tensor:
        key = self.first if key is None else key
        value = self.value(key)
        if not isinstance(value, COMPUTED):
            self.refuse(f"has a constant as {self.label(key)}; required: a tensor that depends on the network's input")
        return as_tensor(self.builder, value)

    def constant(self, key: Hashable) -> Array:
        value = self.value(key)
        if isinstance(value, COMPUTED):
            self.refuse(f"computes its {self.label(key)}; required: a constant")
        return self.array(value)

    def single(self, key: Hashable, default: float) -> float:
        """A constant that is one number."""
        if self.value(key) is None:
            return default
        value = self.constant(key)
        if value.size != 1:
            self.refuse(f"has {self.label(key)} of shape {value.shape}; required: one number")
        return float(value.item())


def as_tensor(b: Builder, x: Tensor | Squares | Sign | Curve | Moment) -> Tensor:
    """Squares, functions of one element, and steps of a norm, as layers that make them."""
    if isinstance(x, Tensor):
        return x
    if isinstance(x, Curve):
        if x not in b.squared:
            b.squared[x] = curves.as_activation(b, x)
        return b.squared[x]
    if isinstance(x, Moment):
        return norms.tensor_of(b, x)
    if isinstance(x, Sign):
        b.refuse("reads the sign of a tensor; required: one as part of a pool by the p-norm only")
    if x.size:
        b.refuse("reads a part of a local response normalisation; required: all of one, as PyTorch computes it")
    if x not in b.squared:
        b.squared[x] = b.pointwise(Power, x.view, exponent=2.0)
    return b.squared[x]


def moving(function: Callable[[Builder, Any, Tensor], Tensor]) -> Callable[[Builder, Any], Tensor | Squares]:
    """The operator that moves its first input as `function` does, also where that is squares."""
    def operator(b: Builder, node: Any) -> Tensor | Squares:
        x = node.moving()
        return replace(x, view=function(b, node, x.view)) if isinstance(x, Squares) else function(b, node, x)

    return operator


def activation(b: Builder, x: Any, function: str, **fields: Any) -> Tensor | Curve:
    """One of `graph.ACTIVATIONS`."""
    if isinstance(x, Curve):
        return x.map(b, curves.reference(function, **fields))
    return b.activation(as_tensor(b, x), function, **fields)


def curve(b: Builder, x: Any, function: Callable[[Array], Array]) -> Curve:
    """A function that no layer has, of a tensor: it has to become part of one that a layer has."""
    return curves.curve_of(b, x if isinstance(x, Curve) else as_tensor(b, x)).map(b, function)


def _with_number(b: Builder, x: Any, y: Any, function: Callable[[Array, Array], Array]) -> Curve | None:
    """function(x, y) of a curve and a number."""
    if isinstance(x, Curve) and not isinstance(y, COMPUTED) and np.size(y) == 1:
        return x.map(b, lambda values: function(values, np.asarray(y, np.float64).reshape(1)))
    if isinstance(y, Curve) and not isinstance(x, COMPUTED) and np.size(x) == 1:
        return y.map(b, lambda values: function(np.asarray(x, np.float64).reshape(1), values))
    return None


def _of_one(b: Builder, parts: Sequence[Any], function: Callable[..., Array]) -> Curve | None:
    """function(*parts) of functions of one tensor's elements; None where they are none."""
    return curves.combined(b, [one if isinstance(one, Curve) else as_tensor(b, one) for one in parts], function)


def chosen(b: Builder, condition: Any, x: Any, y: Any) -> Curve:
    """x where the condition holds, else y: PyTorch's softplus is x itself from a threshold on."""
    made = _of_one(b, (condition, x, y), np.where) if isinstance(condition, Curve) else None
    return b.refuse("chooses among what is computed; required: functions of one tensor") if made is None else made


def greater(b: Builder, x: Any, y: Any) -> Curve:
    """Whether x > y, where that is a part of an activation."""
    if isinstance(x, COMPUTED) and not isinstance(y, COMPUTED) and np.size(y) == 1:
        return curve(b, x, lambda values: values > np.reshape(y, 1))
    return b.refuse("compares what is computed; required: a tensor and one number")


def _scaled_clip(b: Builder, x: Any, y: Any, function: Callable[[Array, Array], Array]) -> Curve | None:
    """relu6(x + 3) / 6."""
    if not isinstance(x, Tensor) or isinstance(y, COMPUTED) or not isinstance(b.layers.get(x.layer), Clip):
        return None
    made = _with_number(b, curves.curve_of(b, x), y, function)
    found = None if made is None else curves.recognized(made)
    return made if found is not None and (found.function, found.scale, found.shift) == ("hard_sigmoid", 1, 0) else None


def plus(b: Builder, x: Any, y: Any, factor: float = 1.0) -> Tensor | Squares | Curve | Moment:
    """x + factor * y, of which one may be a constant."""
    def add(one: Array, other: Array) -> Array:
        return one + factor * other

    step = norms.minus(b, x, y) if factor == -1 and isinstance(x, Tensor) and isinstance(y, Tensor) else None
    for one, other, scale in ((x, y, factor), (y, x, 1.0)):
        if isinstance(one, Moment) and np.size(other) == 1 and not isinstance(other, COMPUTED) and (one is x or
                                                                                                    factor == 1):
            step = norms.plus(b, one, float(np.asarray(other).item()) * scale)
    if step is not None:
        return step
    if (made := _with_number(b, x, y, add)) is not None:
        return made
    if isinstance(x, COMPUTED) and isinstance(y, COMPUTED) and (isinstance(x, Curve) or isinstance(y, Curve)) and (
            made := _of_one(b, (x, y), add)) is not None:
        return made
    if not isinstance(x, COMPUTED):
        return b.affine(as_tensor(b, y), scale=float(factor), shift=x)
    if isinstance(y, COMPUTED):
        other, one = as_tensor(b, y), as_tensor(b, x)
        if factor != 1:
            return b.sum([one, b.affine(other, scale=float(factor), part="/scaled")])
        normed = norms.with_input(b, one, other)
        normed = norms.with_input(b, other, one) if normed is None else normed
        return b.sum([one, other]) if normed is None else normed
    if isinstance(x, Squares) and x.takes(y):
        return replace(x, bias=float(y.item()) * factor)
    return b.affine(as_tensor(b, x), shift=factor * np.asarray(y, np.float64))


def times(b: Builder, x: Any, y: Any) -> Tensor | Squares | Curve | Moment:
    """x * y: of a tensor and a constant, a square, what a pool by the p-norm is written with, a step of a norm, a part
    of an activation, or a gate."""
    for one, other in ((x, y), (y, x)):
        if isinstance(other, Moment) and isinstance(one, (Tensor, Moment)) and (
                normed := norms.normed(b, one, other, norms.INVERSE)) is not None:
            return normed
        if isinstance(one, (Tensor, Curve)) and isinstance(other, Moment) and other.step == norms.RESPONSE and (
                responded := norms.responded(b, as_tensor(b, one), other)) is not None:
            return responded
    if isinstance(x, Curve) and x is y and curves.recognized(x):
        return power(b, x, 2.0)
    if isinstance(x, Moment) and x is y and (squares := norms.power(b, x, 2)) is not None:
        return squares
    for one, other in ((x, y), (y, x)):
        made = _with_number(b, one, other, np.multiply) or _scaled_clip(b, one, other, np.multiply)
        if made is not None:
            return made
    for one, other in ((x, y), (y, x)):
        if isinstance(other, COMPUTED):
            if isinstance(one, Sign) and isinstance(other, Tensor) and _is_magnitude(b, other, one.of):
                return one.of
        elif isinstance(one, Squares) and one.takes(other):
            return replace(one, alpha=one.alpha * float(other.item()))
        else:
            return b.affine(as_tensor(b, one), scale=other)
    if isinstance(x, Tensor) and isinstance(y, Tensor) and b.are_same(x, y):
        return Squares(x, x)
    if isinstance(x, Sign) or isinstance(y, Sign):
        b.refuse("multiplies two tensors that are computed, one of them the sign of a tensor; required: the sign times "
                 "the magnitude, in a pool by the p-norm")
    made = _of_one(b, (x, y), np.multiply)
    if made is not None and curves.recognized(made) is not None:
        return made
    is_gated = isinstance(x, Tensor) and isinstance(y, Tensor) and (b.is_gate(x) or b.is_gate(y))
    return made if made is not None and not is_gated else b.gated(as_tensor(b, x), as_tensor(b, y))


def _is_magnitude(b: Builder, x: Tensor, of: Tensor) -> bool:
    """Whether `x` is |of|, element by element. A ReLU after it, as PyTorch writes one, changes nothing."""
    layer = b.layers.get(x.layer)
    while isinstance(layer, ReLU):
        layer = b.layers.get(layer.inputs[0])
    is_one = isinstance(layer, Power) and layer.exponent == 1 and layer.inputs[0] == of.layer
    return is_one and b.have_one_view(x, of)


def divided(b: Builder, x: Any, y: Any) -> Tensor | Curve | Moment:
    """x / y, by a constant, a deviation, what a local response normalisation divides by, or as a part of an activation.
    """
    if isinstance(y, Moment):
        is_one = not isinstance(x, COMPUTED) and np.size(x) == 1 and float(np.asarray(x).item()) == 1
        step = norms.inverted(b, y) if is_one else (
            norms.normed(b, x, y, norms.ROOT) if isinstance(x, (Tensor, Moment)) else None)
        if isinstance(x, Moment):
            step = norms.response(b, x, y) or step
        if step is not None:
            return step
    made = _with_number(b, x, y, np.divide) or _scaled_clip(b, x, y, np.divide)
    if made is not None:
        return made
    if isinstance(y, Curve) and isinstance(x, COMPUTED) and (made := _of_one(b, (x, y), np.divide)) is not None:
        return made
    if isinstance(x, Tensor) and isinstance(y, Squares):
        if not y.size or y.bias is None or not b.are_same(y.of, x) or not b.are_same(y.view, x):
            b.refuse(f"divides by squares; {_REQUIRED}")
        beta = 1.0 if y.beta is None else y.beta
        fields = {"size": y.size, "alpha": y.alpha, "beta": beta, "bias": y.bias}
        if not y.has_more_before:
            return b.local_response_norm(x, **fields)
        backwards = slice(None, None, -1)
        return b.take(b.local_response_norm(b.take(x, 1, backwards), **fields), 1, backwards)
    if isinstance(y, COMPUTED) or not y.all():
        b.refuse("divides by what is computed, or by zero; required: constants other than zero")
    return b.affine(as_tensor(b, x), scale=1 / np.asarray(y, np.float64))


def extreme(b: Builder, x: Any, y: Any, is_max: bool) -> Tensor | Curve:
    """The larger or smaller of a tensor and a constant."""
    x, bound = (x, y) if isinstance(x, COMPUTED) else (y, x)
    if isinstance(bound, COMPUTED) or not bound.size or (bound != bound.flat[0]).any():
        b.refuse("compares tensors that are computed, or with several numbers; required: one, and one number")
    value = float(np.asarray(bound).flat[0])
    return clip(b, x, *((value, math.inf) if is_max else (-math.inf, value)))


def clip(b: Builder, x: Any, low: float, high: float) -> Tensor | Curve:
    return x.map(b, lambda values: np.clip(values, low, high)) if isinstance(x, Curve) else b.clip(
        as_tensor(b, x), low, high)


def mean(b: Builder, x: Tensor | Squares | Curve | Moment, axes: Sequence[int], keep: bool) -> Tensor | Moment:
    """Over any axes but the batch."""
    if isinstance(x, Squares) and not x.size and b.are_same(x.view, x.of):
        squares = x
        return norms.mean(b, Moment(x.of, (), False, norms.SQUARES, lambda: as_tensor(b, squares)), axes, keep)
    return norms.mean(b, x if isinstance(x, Moment) else as_tensor(b, x), axes, keep)


def square_sum(b: Builder, x: Tensor | Squares, axes: Sequence[int], keep: bool) -> Tensor | Moment:
    """Of a tensor's squares, or of squares; over any axes but the batch."""
    of = x.of if isinstance(x, Squares) and not x.size and b.are_same(x.view, x.of) else None
    if of is None and isinstance(x, Squares):
        return b.reduce(as_tensor(b, x), "sum", axes, keep)
    return norms.square_sum(b, of or as_tensor(b, x), axes, keep)


def length(b: Builder, x: Tensor, axes: Sequence[int], keep: bool) -> Tensor | Moment:
    """The Euclidean norm over any axes but the batch."""
    made = power(b, square_sum(b, x, axes, keep), 0.5)
    assert isinstance(made, (Tensor, Moment))
    return made


def power(b: Builder, x: Tensor | Squares | Curve | Moment, exponent: float) -> Tensor | Squares | Curve | Moment:
    if isinstance(x, Curve) and not (exponent == 2 and curves.recognized(x)):  # of an activation, squares are all
        return x.map(b, lambda values: values**exponent)
    if isinstance(x, Moment) and (made := norms.power(b, x, exponent)) is not None:
        return made
    if isinstance(x, Squares) and x.size and x.beta is None:
        return replace(x, beta=exponent)
    x = as_tensor(b, x)
    if exponent in (1, 2):
        return x if exponent == 1 else Squares(x, x)
    if exponent == 3 and not b.is_nonnegative(x):
        return curve(b, x, lambda values: values**3)  # of GELU's approximation
    if exponent % 2 and not b.is_nonnegative(x):
        b.refuse(f"raises to {exponent:g} what can be negative; required: an even power, or a ReLU before it")
    return b.pointwise(Power, x, exponent=exponent)


def mean_over_channels(b: Builder, x: Any, kernel: tuple[int, ...], stride: tuple[int, ...], is_plain: bool) -> Squares:
    """A pool in three dimensions over squares (N, 1, C, ...) that zeros are put around, as part of a normalisation.

    is_plain: whether it is an average, without zeros of its own
    """
    is_plain = is_plain and kernel[1:] == (1, 1) and stride == (1, 1, 1)
    if not isinstance(x, Squares) or x.size or x.of.rank != 4 or not is_plain:
        b.refuse(f"is no part of a local response normalisation; {_REQUIRED}")
    inner = b.with_dims(x.of, (1, *x.of.dims))
    less, more = (kernel[0] - 1) // 2, kernel[0] // 2
    for around in {(less, more), (more, less)}:
        if b.are_same(x.view, b.pad(inner, [(0, 0), (0, 0), around, *[(0, 0)] * (len(x.of.dims) - 1)])):
            return replace(x, view=inner, size=kernel[0], has_more_before=around[0] > around[1])
    return b.refuse(f"is no part of a local response normalisation; {_REQUIRED}")
