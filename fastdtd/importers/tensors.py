"""Tensors as views: which elements of a layer's output a tensor of the source has, in which order and shape.

Source formats move elements in many ways (reshape, transpose, slice, pad) that mean nothing to the next operator or
undo each other. So a `Tensor` is a layer's output and a view of it. Most views are strides: an axis steps through the
layer's output, and moving it is arithmetic on a few integers, whatever the tensor's size. Only a view that strides
cannot express is an index with an entry for each element.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from fastdtd.graph import Shape

Index = npt.NDArray[np.int32]
Steps = tuple[tuple[int, int], ...]  # of one axis: (length, stride) of each of its digits, the slowest first
Pads = tuple[tuple[int, int], ...]


@dataclass(frozen=True, eq=False)
class Tensor:
    """What an operator computes.

    Elements of the layer's output are counted in C order. The view is either strides or an index; its methods that
    move elements give None where the result cannot be expressed by strides.

    layer, shape : the layer whose output is viewed, and the shape of that
    axes, offset : by strides, how each axis (the batch left out) steps through the output, and where it begins
    pads : zeros around them, (before, after) each axis
    index : else, where each element is in the output, or -1 for a zero
    name : for the layer that materializes the view, should one be needed
    """

    layer: str
    shape: Shape
    axes: tuple[Steps, ...] = ()
    pads: Pads = ()
    offset: int = 0
    index: Index | None = None
    name: str = ""

    @staticmethod
    def whole(layer: str, shape: Shape, dims: Sequence[int] | None = None, name: str = "") -> Tensor:
        """All elements of a layer's output in order, with axes of lengths `dims` (default: `shape`)."""
        dims = shape if dims is None else dims
        axes = _regrouped(_merged([(math.prod(shape), 1)]), dims)
        assert axes is not None, (shape, dims)
        return Tensor(layer, shape, axes, ((0, 0),) * len(dims), name=name)

    def with_index(self, index: Index, name: str) -> Tensor:
        """Other elements of the same layer."""
        if index.size == math.prod(self.shape) and bool((index.ravel() == np.arange(index.size, dtype=np.int32)).all()):
            return Tensor.whole(self.layer, self.shape, index.shape, name)
        return Tensor(self.layer, self.shape, index=index, name=name)

    @cached_property
    def dims(self) -> tuple[int, ...]:
        """The shape in the source, without the batch."""
        if self.index is not None:
            return self.index.shape
        lengths = [math.prod(length for length, _ in steps) for steps in self.axes]
        return tuple(n + before + after for n, (before, after) in zip(lengths, self.pads, strict=True))

    @property
    def rank(self) -> int:
        """Number of axes in the source, batch included."""
        return len(self.dims) + 1

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def base(self) -> Tensor:
        """The output of the layer as it is."""
        return Tensor.whole(self.layer, self.shape)

    @property
    def is_padded(self) -> bool:
        return any(map(any, self.pads))

    @property
    def has_zeros(self) -> bool:
        return self.is_padded or (self.index is not None and bool((self.index < 0).any()))

    @property
    def is_whole(self) -> bool:
        """Whether it is all elements of the layer's output in order."""
        return (self.index is None and not self.is_padded and self.offset == 0
                and _merged(itertools.chain(*self.axes)) == _merged([(math.prod(self.shape), 1)]))

    def indices(self) -> Index:
        """Where each element is in the layer's output: an array of shape `dims`, made where strides say it."""
        if self.index is not None:
            return self.index
        index = np.full((), self.offset, np.int32)
        for length, stride in itertools.chain(*self.axes):
            index = index[..., None] + stride * np.arange(length, dtype=np.int32)
        inner = index.reshape([n - before - after for n, (before, after) in zip(self.dims, self.pads, strict=True)])
        return np.pad(inner, self.pads, constant_values=-1) if self.is_padded else inner

    def has_view_of(self, other: Tensor) -> bool:
        """Whether both take the same elements of their layers."""
        if (self.shape, self.dims) != (other.shape, other.dims):
            return False
        if self.index is None and other.index is None:
            return (self.axes, self.pads, self.offset) == (other.axes, other.pads, other.offset)
        return self.index is other.index or np.array_equal(self.indices(), other.indices())

    def transposed(self, order: Sequence[int]) -> Tensor | None:
        if self.index is not None:
            return None
        return replace(self, axes=tuple(self.axes[i] for i in order), pads=tuple(self.pads[i] for i in order))

    def reshaped(self, dims: Sequence[int]) -> Tensor | None:
        """With axes of other lengths, of as many elements."""
        if self.index is not None:
            return replace(self, index=self.index.reshape(dims))
        if self.is_padded:  # axes of length 1 may come and go
            long = [i for i, n in enumerate(self.dims) if n != 1]
            if [self.dims[i] for i in long] != [n for n in dims if n != 1]:
                return None
            old = iter(long)
            chosen = [None if n == 1 else next(old) for n in dims]
            return replace(self, axes=tuple(() if i is None else self.axes[i] for i in chosen),
                           pads=tuple((0, 0) if i is None else self.pads[i] for i in chosen))
        axes = _regrouped(tuple(itertools.chain(*self.axes)), dims)
        return None if axes is None else replace(self, axes=axes, pads=((0, 0),) * len(dims))

    def sliced(self, axis: int, part: slice) -> Tensor | None:
        if self.index is not None or len(self.axes[axis]) > 1:
            return None
        start, stop, step = part.indices(self.dims[axis])
        (before, after), ((length, stride),) = self.pads[axis], self.axes[axis] or ((1, 0),)
        if step != 1 and (before or after):
            return None
        pads = max(before - start, 0), max(stop - before - length, 0)
        if step == 1:
            start, stop = max(start - before, 0), min(stop - before, length)
        count = len(range(start, stop, step))
        if count < 1:
            return None
        return replace(self, axes=_put(self.axes, axis, _merged([(count, stride * step)])),
                       pads=_put(self.pads, axis, pads if step == 1 else (0, 0)), offset=self.offset + start * stride)

    def padded(self, pads: Sequence[tuple[int, int]]) -> Tensor | None:
        """With zeros, (before, after) each axis."""
        if self.index is not None:
            return None
        return replace(self, pads=tuple((a + c, b + d) for (a, b), (c, d) in zip(self.pads, pads, strict=True)))

    def unpadded(self) -> Tensor:
        return replace(self, pads=((0, 0),) * len(self.pads))

    def expanded(self, dims: Sequence[int]) -> Tensor | None:
        """Axes of length 1 repeated."""
        if self.index is not None:
            return None
        return replace(self, axes=tuple(steps if n == old else _merged([(n, 0)])
                                        for steps, n, old in zip(self.axes, dims, self.dims, strict=True)))

    def __str__(self) -> str:
        return f"(N, {', '.join(map(str, self.dims))})" if self.dims else "(N,)"


def _put(values: tuple, index: int, value: object) -> tuple:  # type: ignore[type-arg]
    return *values[:index], value, *values[index + 1:]


def _merged(digits: Iterable[tuple[int, int]]) -> Steps:
    """The same steps in as few digits as there can be, so that equal views are equal tuples."""
    result: list[tuple[int, int]] = []
    for length, stride in digits:
        if length == 1:
            continue
        if result and result[-1][1] == length * stride:
            result[-1] = result[-1][0] * length, stride
        else:
            result.append((length, stride))
    return tuple(result)


def _regrouped(digits: Steps, dims: Sequence[int]) -> tuple[Steps, ...] | None:
    """The same steps as axes of lengths `dims`; None where one of them would need a part of a digit."""
    left, axes = list(digits), []
    for wanted in reversed(dims):
        rest, taken = wanted, []
        while rest > 1:
            length, stride = left.pop()
            count = math.gcd(rest, length)
            if count not in (rest, length):
                return None
            if count < length:
                left.append((length // count, stride * count))
            taken.append((count, stride))
            rest //= count
        axes.append(_merged(reversed(taken)))
    return tuple(reversed(axes))


def side_by_side(inputs: Sequence[Tensor]) -> list[Tensor]:
    """Several inputs as views of one, flat, that holds them one after the other; one as it is."""
    if len(inputs) == 1:
        return list(inputs)
    sizes = [math.prod(x.shape) for x in inputs]
    begins = itertools.accumulate(sizes, initial=0)
    return [replace(x, shape=(sum(sizes), 1, 1), offset=x.offset + begin)
            for x, begin in zip(inputs, begins, strict=False)]


def layer_shape(dims: Sequence[int]) -> Shape:
    """The shape that a tensor of `dims` has as a layer's output; one of a single spatial axis becomes one row."""
    match tuple(dims):
        case ():
            return 1, 1, 1
        case (features,):
            return features, 1, 1
        case (channels, length):
            return channels, 1, length
        case (channels, height, width):
            return channels, height, width
        case (first, second, *others):
            return first, second, math.prod(others)
    raise AssertionError(dims)
