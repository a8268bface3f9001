"""Norms that sources write as several operators, (x - mean) / sqrt(variance + epsilon), recognised step by step; global
response norm, by G / (mean of G + epsilon) with G the norm of each channel, too.

Until the division, or the product with the inverse, says that it is one, each step is a `Moment`: as a tensor it is
what the operators say, one by one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fastdtd.graph import BatchNorm, GlobalAveragePool, GroupNorm, Multiply, Power
from fastdtd.importers.builder import Builder
from fastdtd.importers.tensors import Tensor

DEVIATION, SQUARES, VARIANCE, STABLE, ROOT, INVERSE = range(6)
SQUARE_SUM, LENGTH, MEAN_LENGTH, STABLE_LENGTH, RESPONSE = range(6, 11)  # of global response norm


@dataclass(frozen=True, eq=False)
class Moment:
    """A step on the way from x to its norm over some of its axes.

    of, axes : x, and over which of its axes, the batch not counted; none yet of squares that are not centered
    centered : whether the mean was subtracted
    step : DEVIATION x - mean; SQUARES; VARIANCE, their mean; STABLE, that and epsilon; ROOT; INVERSE of the root; or of
        a global response norm: SQUARE_SUM; LENGTH, its root; MEAN_LENGTH, its mean over the other axes, the channels;
        STABLE_LENGTH, that and epsilon; RESPONSE, length / that
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
        squares = length = x
        if keep and x.step == LENGTH and sorted(own + x.axes) == list(range(len(x.of.dims))):
            return replace(x, step=MEAN_LENGTH, plain=lambda: b.reduce(tensor_of(b, length), "mean", axes, keep))
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
    if x.step not in (VARIANCE, MEAN_LENGTH):
        return None
    step = STABLE if x.step == VARIANCE else STABLE_LENGTH
    return replace(x, step=step, epsilon=number, plain=lambda: b.affine(tensor_of(b, x), shift=number))


def power(b: Builder, x: Moment, exponent: float) -> Moment | None:
    if x.step == DEVIATION and exponent == 2:
        return replace(x, step=SQUARES, plain=lambda: b.pointwise(Power, tensor_of(b, x), exponent=2.0))
    if x.step == STABLE and exponent in (0.5, -0.5):
        step = ROOT if exponent > 0 else INVERSE
        return replace(x, step=step, plain=lambda: _root(b, x, exponent))
    if x.step == SQUARE_SUM and exponent == 0.5:
        return replace(x, step=LENGTH, plain=lambda: _root(b, x, exponent))
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


# ---- Global response norm --------------------------------------------------------------------------------------------


def square_sum(b: Builder, x: Tensor, axes: Sequence[int], keep: bool) -> Tensor | Moment:
    """The sum of squares over any axes but the batch, which axes count."""
    def plain() -> Tensor:
        return b.reduce(b.pointwise(Power, x, "/squares", exponent=2.0), "sum", axes, keep)

    own = tuple(sorted({b.own_axis(x, axis) for axis in axes}))
    return Moment(x, own, False, SQUARE_SUM, plain) if keep and len(own) == len(x.dims) - 1 else plain()


def response(b: Builder, x: Moment, y: Moment) -> Moment | None:
    """x / y, where that is a length by the mean of all."""
    if (x.step, y.step) != (LENGTH, STABLE_LENGTH) or x.axes != y.axes or not b.are_same(x.of, y.of):
        return None
    return replace(y, step=RESPONSE, plain=lambda: _responses(b, y)[1])


def _responses(b: Builder, y: Moment) -> tuple[Tensor, Tensor]:
    """What y is of with the channels first; and its responses, each channel's one, with as many axes as it has.

    G / (mean of G + epsilon) is r^2, with r the root mean square norm of sqrt(G): its squares are G. Instead of G it is
    the root of the mean, not of the sum of squares, for what both differ by is divided away, but of epsilon.
    """
    order = _channel_first(y)
    base = b.materialize(b.transpose(y.of, [0, *(axis + 1 for axis in order)]))
    channels, ones = base.shape[0], np.ones(base.shape[0])
    squares = b.add(Power, [base], "/squares", exponent=2.0)
    root = b.add(Power, [b.add(GlobalAveragePool, [squares], "/mean")], "/root", exponent=0.25)
    epsilon = y.epsilon / math.sqrt(base.shape[1] * base.shape[2])
    norm = b.add(GroupNorm, [root], "/norm", scale=ones, shift=0 * ones, epsilon=epsilon, centered=False)
    made = b.add(Power, [norm], "/response", exponent=2.0)
    dims = [channels if axis == order[0] else 1 for axis in range(len(order))]
    return base, Tensor.whole(made.layer, made.shape, dims)


def _channel_first(y: Moment) -> list[int]:
    """The axes of what y is of: the one that y is not over, and the others."""
    return [*(axis for axis in range(len(y.of.dims)) if axis not in y.axes), *y.axes]


def responded(b: Builder, x: Tensor, y: Moment) -> Tensor | None:
    """x times its own response y, which is held constant as the deviation of other norms is."""
    if not b.are_same(x, y.of):
        return None
    base, gate = _responses(b, y)
    made = b.add(Multiply, [base, gate.base], "/product")
    b.responses[made.layer] = base, gate.base
    order = _channel_first(y)
    moved = Tensor.whole(made.layer, made.shape, [x.dims[axis] for axis in order])
    return b.transpose(moved, [0, *(order.index(axis) + 1 for axis in range(len(order)))])


def with_input(b: Builder, x: Tensor, y: Tensor) -> Tensor | None:
    """x + y, where x is gamma * (y times its response) + beta: one product, y (1 + gamma response), and beta."""
    name, scale, shift = x.layer, np.ones(1), np.zeros(1)
    while isinstance(layer := b.layers.get(name), BatchNorm):
        name, scale, shift = layer.inputs[0], scale * layer.scale, shift + scale * layer.shift
    if name not in b.responses or y.layer != b.responses[name][0].layer or not b.have_one_view(x, y):
        return None
    base, gate = b.responses[name]
    ones = np.ones(gate.shape[0])
    gate = b.add(BatchNorm, [gate], "/gate", scale=scale * ones, shift=ones)
    made = b.add(Multiply, [base, gate], "/product" if np.any(shift) else "")
    if np.any(shift):
        made = b.add(BatchNorm, [made], scale=ones, shift=shift * ones)
    return replace(x, layer=made.layer)
