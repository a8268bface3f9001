"""Norms that sources write as several operators, (x - mean) / sqrt(variance + epsilon), recognised step by step.

Until the division, or the product with the inverse, says that it is one, each step is a `Moment`: as a tensor it is
what the operators say, one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from fastdtd.graph import Power
from fastdtd.importers.builder import Builder
from fastdtd.importers.tensors import Tensor

DEVIATION, SQUARES, VARIANCE, STABLE, ROOT, INVERSE = range(6)


@dataclass(frozen=True, eq=False)
class Moment:
    """A step on the way from x to its norm over some of its axes.

    of, axes : x, and over which of its axes, the batch not counted; none yet of squares that are not centered
    centered : whether the mean was subtracted
    step : DEVIATION x - mean; SQUARES; VARIANCE, their mean; STABLE, that and epsilon; ROOT; INVERSE of the root
    plain : makes a tensor of it
    """

    of: Tensor
    axes: tuple[int, ...]
    centered: bool
    step: int
    plain: Callable[[], Tensor]
    epsilon: float = 0.0

    @property
    def view(self) -> Tensor:
        """A tensor of as many elements, or more."""
        return self.of


def tensor_of(b: Builder, x: Moment) -> Tensor:
    if x not in b.squared:
        b.squared[x] = x.plain()
    return b.squared[x]


def mean(b: Builder, x: Tensor | Moment, axes: Sequence[int], keep: bool) -> Tensor | Moment:
    """axes count the batch. A mean is remembered, in case it is subtracted."""
    own = tuple(sorted(b.own_axis(x if isinstance(x, Tensor) else x.of, axis) for axis in axes))
    if isinstance(x, Moment):
        squares = x
        if keep and x.step == SQUARES and (own == x.axes or not x.centered):
            return replace(x, axes=own, step=VARIANCE,
                           plain=lambda: b.reduce(tensor_of(b, squares), "mean", axes, keep))
        x = tensor_of(b, x)
    made = b.reduce(x, "mean", axes, keep)
    if keep and own:
        b.means[made.layer] = x, own, made
    return made


def minus(b: Builder, x: Tensor, y: Tensor) -> Moment | None:
    """x - y, where that is a deviation from the mean."""
    of, axes, known = b.means.get(y.layer, (None, (), None))
    if of is None or known is None or not b.are_same(of, x) or not b.are_same(known, y):
        return None

    def plain() -> Tensor:
        return b.sum([x, b.affine(b.expand(y, (-1, *x.dims)), scale=-1.0, part="/minus")])

    return Moment(x, axes, True, DEVIATION, plain)


def plus(b: Builder, x: Moment, number: float) -> Moment | None:
    if x.step != VARIANCE:
        return None
    return replace(x, step=STABLE, epsilon=number, plain=lambda: b.affine(tensor_of(b, x), shift=number))


def power(b: Builder, x: Moment, exponent: float) -> Moment | None:
    if x.step == DEVIATION and exponent == 2:
        return replace(x, step=SQUARES, plain=lambda: b.pointwise(Power, tensor_of(b, x), exponent=2.0))
    if x.step == STABLE and exponent in (0.5, -0.5):
        step = ROOT if exponent > 0 else INVERSE
        return replace(x, step=step, plain=lambda: _root(b, x, exponent))
    return None


def inverted(b: Builder, x: Moment) -> Moment | None:
    """1 / x."""
    return replace(x, step=INVERSE, plain=lambda: _root(b, x, -0.5)) if x.step == ROOT else None


def _root(b: Builder, x: Moment, exponent: float) -> Tensor:
    if exponent < 0:
        b.refuse("divides by a deviation something else than what it is of; required: (x - mean) / sqrt(variance + "
                 "epsilon)")
    return b.pointwise(Power, tensor_of(b, x), exponent=exponent)


def normed(b: Builder, x: Tensor | Moment, y: Moment, step: int) -> Tensor | None:
    """x divided by the root y, or times the inverse y, where that is a norm."""
    is_deviation = isinstance(x, Moment) and x.step == DEVIATION and x.axes == y.axes
    of = x.of if isinstance(x, Moment) else x
    if y.step != step or y.centered != is_deviation or not (is_deviation or isinstance(x, Tensor)) or (
            not b.are_same(of, y.of)):
        return None
    rest = [axis for axis in range(len(of.dims)) if axis not in y.axes]
    order = [*rest, *y.axes]
    moved = b.transpose(of, [0, *(axis + 1 for axis in order)])
    made = b.layer_norm(moved, len(y.axes), None, None, y.epsilon, y.centered)
    return b.transpose(made, [0, *(order.index(axis) + 1 for axis in range(len(order)))])
