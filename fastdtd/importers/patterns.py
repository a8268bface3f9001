"""What sources write as several operators: recognised while the values go from one to the next.

Norms by an image's own statistics are in norms.py.

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

from fastdtd.graph import Power, ReLU
from fastdtd.importers import norms
from fastdtd.importers.builder import Builder
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


COMPUTED = (Tensor, Squares, Sign, Moment)


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

    def operand(self, key: Hashable) -> Tensor | Squares | Sign | Moment | Array:
        """For arithmetic: of `COMPUTED`, or an array."""
        value = self.value(key)
        return value if isinstance(value, COMPUTED) else self.constant(key)

    def moving(self) -> Tensor | Squares:
        """The first input, which may be squares."""
        value = self.value(self.first)
        return value if isinstance(value, Squares) else self.tensor()

    def stepping(self) -> Tensor | Squares | Moment:
        """The first input, which may be squares or a step of a norm."""
        value = self.value(self.first)
        return value if isinstance(value, Moment) else self.moving()

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


def as_tensor(b: Builder, x: Tensor | Squares | Sign | Moment) -> Tensor:
    """Squares, and steps of a norm, as layers that make them."""
    if isinstance(x, Tensor):
        return x
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


def plus(b: Builder, x: Any, y: Any, factor: float = 1.0) -> Tensor | Squares | Moment:
    """x + factor * y, of which one may be a constant."""
    made = norms.minus(b, x, y) if factor == -1 and isinstance(x, Tensor) and isinstance(y, Tensor) else None
    for one, other, times in ((x, y, factor), (y, x, 1.0)):
        if isinstance(one, Moment) and np.size(other) == 1 and not isinstance(other, COMPUTED) and (one is x or
                                                                                                    factor == 1):
            made = norms.plus(b, one, float(np.asarray(other).item()) * times)
    if made is not None:
        return made
    if not isinstance(x, COMPUTED):
        return b.affine(as_tensor(b, y), scale=float(factor), shift=x)
    if isinstance(y, COMPUTED):
        other = as_tensor(b, y)
        other = other if factor == 1 else b.affine(other, scale=float(factor), part="/scaled")
        return b.sum([as_tensor(b, x), other])
    if isinstance(x, Squares) and x.takes(y):
        return replace(x, bias=float(y.item()) * factor)
    return b.affine(as_tensor(b, x), shift=factor * np.asarray(y, np.float64))


def times(b: Builder, x: Any, y: Any) -> Tensor | Squares | Moment:
    """x * y: of a tensor and a constant, a square, a step of a norm, or what a pool by the p-norm is written with."""
    for one, other in ((x, y), (y, x)):
        if isinstance(other, Moment) and isinstance(one, (Tensor, Moment)) and (
                made := norms.normed(b, one, other, norms.INVERSE)) is not None:
            return made
    if isinstance(x, Moment) and x is y and (squares := norms.power(b, x, 2)) is not None:
        return squares
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
    return b.refuse("multiplies two tensors that are computed; required: one, and a constant")


def _is_magnitude(b: Builder, x: Tensor, of: Tensor) -> bool:
    """Whether `x` is |of|, element by element. A ReLU after it, as PyTorch writes one, changes nothing."""
    layer = b.layers.get(x.layer)
    while isinstance(layer, ReLU):
        layer = b.layers.get(layer.inputs[0])
    is_one = isinstance(layer, Power) and layer.exponent == 1 and layer.inputs[0] == of.layer
    return is_one and b.have_one_view(x, of)


def divided(b: Builder, x: Any, y: Any) -> Tensor | Moment:
    """x / y, by a constant, a deviation, or what a local response normalisation divides by."""
    if isinstance(y, Moment):
        is_one = not isinstance(x, COMPUTED) and np.size(x) == 1 and float(np.asarray(x).item()) == 1
        made = norms.inverted(b, y) if is_one else (
            norms.normed(b, x, y, norms.ROOT) if isinstance(x, (Tensor, Moment)) else None)
        if made is not None:
            return made
    if isinstance(x, Tensor) and isinstance(y, Squares):
        if not y.size or y.bias is None or not b.are_same(y.of, x) or not b.are_same(y.view, x):
            b.refuse(f"divides by squares; {_REQUIRED}")
        beta = 1.0 if y.beta is None else y.beta
        return b.local_response_norm(x, size=y.size, alpha=y.alpha, beta=beta, bias=y.bias)
    if isinstance(y, COMPUTED) or not y.all():
        b.refuse("divides by what is computed, or by zero; required: constants other than zero")
    return b.affine(as_tensor(b, x), scale=1 / np.asarray(y, np.float64))


def extreme(b: Builder, x: Any, y: Any, is_max: bool) -> Tensor:
    """The larger or smaller of a tensor and a constant."""
    x, bound = (x, y) if isinstance(x, COMPUTED) else (y, x)
    if isinstance(bound, COMPUTED) or not bound.size or (bound != bound.flat[0]).any():
        b.refuse("compares tensors that are computed, or with several numbers; required: one, and one number")
    value = float(np.asarray(bound).flat[0])
    return b.clip(as_tensor(b, x), *((value, math.inf) if is_max else (-math.inf, value)))


def mean(b: Builder, x: Tensor | Squares | Moment, axes: Sequence[int], keep: bool) -> Tensor | Moment:
    """Over any axes but the batch."""
    if isinstance(x, Squares) and not x.size and b.are_same(x.view, x.of):
        squares = x
        return norms.mean(b, Moment(x.of, (), False, norms.SQUARES, lambda: as_tensor(b, squares)), axes, keep)
    return norms.mean(b, x if isinstance(x, Moment) else as_tensor(b, x), axes, keep)


def power(b: Builder, x: Tensor | Squares | Moment, exponent: float) -> Tensor | Squares | Moment:
    if isinstance(x, Moment) and (made := norms.power(b, x, exponent)) is not None:
        return made
    if isinstance(x, Squares) and x.size and x.beta is None:
        return replace(x, beta=exponent)
    x = as_tensor(b, x)
    if exponent in (1, 2):
        return x if exponent == 1 else Squares(x, x)
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
    if kernel[0] % 2 == 0:
        b.refuse(f"belongs to a local response normalisation over {kernel[0]} channels; required: an odd number")
    half, inner = kernel[0] // 2, b.with_dims(x.of, (1, *x.of.dims))
    if not b.are_same(x.view, b.pad(inner, [(0, 0), (0, 0), (half, half), *[(0, 0)] * (len(x.of.dims) - 1)])):
        b.refuse(f"is no part of a local response normalisation; {_REQUIRED}")
    return replace(x, view=inner, size=kernel[0])
