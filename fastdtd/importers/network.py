"""A network while an importer reads it: tensors as views of what layers make, and the layers that they need.

Source formats move numbers about in many ways (reshape, transpose, slice, pad, upsample) that mean nothing to the next operator or undo
each other. So a tensor here is a layer's output and, for each number, where in that output it comes from. What moves numbers changes that
index alone; a layer is made of it, a `Rearrange`, only where an operator needs the numbers in place.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn, Protocol

import numpy as np
import numpy.typing as npt

from fastdtd.graph import (
    INPUT,
    MAX_PADDING,
    MAX_TENSOR_ELEMENTS,
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
    LeakyReLU,
    LocalResponseNorm,
    MaxPool2d,
    Power,
    Rearrange,
    ReLU,
    Shape,
    Softmax,
)
from fastdtd.importers.tensors import NO_PADDING, Padding, sum_of, transposed_convolution

MAX_MOVED = 2**28  # numbers of all indices that one network may take: 1 GiB, most of it for a moment

Index = npt.NDArray[np.int32]
Array = npt.NDArray[Any]


class Node(Protocol):
    """What an importer calls its nodes by."""

    @property
    def layer_name(self) -> str:
        """For a layer that is made of the node."""

    def refuse(self, what: str) -> NoReturn:
        """Raise ConversionError that names the node."""


@dataclass(frozen=True, eq=False)
class Tensor:
    """What a node computes.

    layer, shape : the layer that its numbers are of, and that layer's output shape
    dims : its own shape in the source, without the batch
    index : of shape `dims`; where each number is in the layer's output, in C order, or -1 for a zero. None: all of them, in order
    name : of the layer that puts the numbers in this order, should one be needed
    """

    layer: str
    shape: Shape
    dims: tuple[int, ...]
    index: Index | None = None
    name: str = ""

    @property
    def rank(self) -> int:
        """Number of axes in the source, batch included."""
        return len(self.dims) + 1

    def indices(self) -> Index:
        """`index`, also where that is None."""
        return np.arange(math.prod(self.shape), dtype=np.int32).reshape(self.dims) if self.index is None else self.index

    def equals(self, other: Tensor) -> bool:
        """Whether both are the same numbers in the same order."""
        return self.layer == other.layer and self.dims == other.dims and np.array_equal(self.indices(), other.indices())

    def __str__(self) -> str:
        return f"(N, {', '.join(map(str, self.dims))})" if self.dims else "(N,)"


@dataclass(frozen=True)
class Squares:
    """x * x on its way to be part of a local response normalisation, as PyTorch writes it: at last it is what x is divided by."""

    of: Tensor
    view: Tensor  # what was squared, moved as the squares are
    size: int = 0
    alpha: float = 1.0
    bias: float | None = None
    beta: float | None = None


@dataclass(frozen=True)
class Sign:
    """The sign of a tensor: PyTorch writes a pool by the p-norm with it, where it changes nothing."""

    of: Tensor


def viewed(x: Tensor | Squares, move: Callable[[Tensor], Tensor]) -> Tensor | Squares:
    """`x` moved, also where it is squares."""
    return replace(x, view=move(x.view)) if isinstance(x, Squares) else move(x)


def plain_shape(dims: Sequence[int]) -> Shape:
    """The shape that a tensor of `dims` has between layers; one of a single spatial axis becomes one row."""
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


class Network:
    """The layers made so far, and what several importers make of them."""

    def __init__(self, input_shape: Shape) -> None:
        self.input_shape = input_shape
        self.layers: dict[str, Layer] = {}
        self._plain: dict[Any, tuple[Tensor, Tensor]] = {}
        self._nonnegative: set[str] = set()
        self._weights = self._moved = 0

    def leading_to(self, output: str) -> list[Layer]:
        """The layers that `output` needs."""
        needed, waiting = set(), [output]
        while waiting:
            name = waiting.pop()
            if name != INPUT and name not in needed:
                needed.add(name)
                waiting.extend(self.layers[name].inputs)
        return [layer for name, layer in self.layers.items() if name in needed]

    # Layers, and numbers in place

    def add(self, layer_type: type[Layer], node: Node, inputs: Sequence[Tensor], part: str = "", **fields: Any) -> Tensor:
        """The output of a new layer that reads plain tensors. part: marks one of several layers that one node needs."""
        for value in fields.values():
            self.count_weights(node, value.size if isinstance(value, np.ndarray) else 0)
        name = self._unused(node.layer_name + part)
        layer = layer_type(name, tuple(x.layer for x in inputs), **fields)
        shape = layer.output_shape([x.shape for x in inputs])
        self.layers[name] = layer
        if self._is_nonnegative(layer):
            self._nonnegative.add(name)
        return Tensor(name, shape, _dims_of(shape, inputs[0]))

    def _unused(self, name: str) -> str:
        while name in self.layers or name in (INPUT, ""):
            name += "_"
        return name

    def count_weights(self, node: Node, count: int) -> None:
        """Keep a small file from becoming a large network: nodes may share weights, but what is made of them does not."""
        self._weights += count
        if self._weights > MAX_WEIGHT_ELEMENTS:
            node.refuse(f"brings the network beyond {MAX_WEIGHT_ELEMENTS} weights")

    def _count_moved(self, node: Node, count: int) -> None:
        self._moved += count
        if count > MAX_TENSOR_ELEMENTS or self._moved > MAX_MOVED:
            node.refuse(f"moves {count} numbers; at most {MAX_MOVED} are accepted in all of a network")

    def _is_nonnegative(self, layer: Layer) -> bool:
        """Whether no number can be negative that `layer` makes."""
        inputs = all(name in self._nonnegative for name in layer.inputs)
        match layer:
            case ReLU() | Power() | Softmax():
                return True
            case Clip():
                return layer.low >= 0 or inputs
            case Conv2d() | Dense():
                return inputs and bool((layer.weight >= 0).all()) and (layer.bias is None or bool((layer.bias >= 0).all()))
            case BatchNorm():
                return inputs and bool((layer.scale >= 0).all() and (layer.shift >= 0).all())
        return inputs

    def plain(self, node: Node, x: Tensor) -> Tensor:
        """`x` as a layer's output as it is, with shape `plain_shape(x.dims)`."""
        shape = plain_shape(x.dims)
        if x.index is None and x.shape == shape:
            return x
        key = x.layer, x.dims, id(x.index)
        if key not in self._plain:
            name = self._unused(x.name or node.layer_name)
            if x.index is None and shape[1:] == (1, 1):
                self.layers[name] = Flatten(name, (x.layer,))
            else:
                self._count_moved(node, math.prod(shape))
                self.layers[name] = Rearrange(name, (x.layer,), x.indices().reshape(shape))
            if x.layer in self._nonnegative:
                self._nonnegative.add(name)
            self._plain[key] = Tensor(name, shape, x.dims), x  # x, so that its index keeps its id
        return self._plain[key][0]

    def pointwise(self, layer_type: type[Layer], node: Node, x: Tensor, part: str = "", **fields: Any) -> Tensor:
        """A layer that makes of each number another and leaves zeros as they are: numbers need not be in place for it."""
        base = self.add(layer_type, node, [Tensor(x.layer, x.shape, x.shape)], part, **fields)
        return replace(x, layer=base.layer)

    # Moving numbers. Axes and shapes count the batch, which stays in front.

    def move(self, node: Node, x: Tensor, size: int, change: Callable[[Index], Any]) -> Tensor:
        """`x` after `change` of its index, which makes it `size` numbers."""
        if size < 1:
            node.refuse(f"leaves nothing of a tensor {x}")
        self._count_moved(node, max(size, math.prod(x.dims)))
        index: Index = np.ascontiguousarray(change(x.indices()), np.int32)
        is_all = index.size == math.prod(x.shape) and bool((index.ravel() == np.arange(index.size, dtype=np.int32)).all())
        return Tensor(x.layer, x.shape, index.shape, None if is_all else index, node.layer_name)

    def reshape(self, node: Node, x: Tensor, target: Sequence[int], batch: int) -> Tensor:
        """`target`: a shape where one axis may be -1."""
        total = batch * math.prod(x.dims)
        known = math.prod(n for n in target if n != -1)
        shape = [total // known if n == -1 and known > 0 else n for n in target]
        if not shape or target.count(-1) > 1 or min(shape) < 1 or math.prod(shape) != total:
            node.refuse(f"makes {tuple(target)} of {x}; required: a shape of as many numbers")
        if shape[0] != batch:
            node.refuse(f"makes {tuple(target)} of {x}; required: (N, ...), the batch left in front")
        return self.with_dims(node, x, shape[1:])

    def with_dims(self, node: Node, x: Tensor, dims: Sequence[int]) -> Tensor:
        """`x` with other axes."""
        return replace(x, dims=tuple(dims), index=None if x.index is None else x.index.reshape(dims), name=node.layer_name)

    def axis(self, node: Node, axis: int, rank: int) -> int:
        """An axis from 0, the batch, of one that may count from behind."""
        if not -rank <= axis < rank:
            node.refuse(f"has axis {axis} for a tensor of {rank} axes")
        return axis % rank

    def own_axis(self, node: Node, x: Tensor, axis: int) -> int:
        """The same for an axis that must not be the batch, as an axis of `dims`."""
        if not self.axis(node, axis, x.rank):
            node.refuse(f"works along axis {axis} of {x}, the batch; required: another")
        return axis % x.rank - 1

    def transpose(self, node: Node, x: Tensor, order: Sequence[int]) -> Tensor:
        if sorted(order) != list(range(x.rank)):
            node.refuse(f"has the order {tuple(order)} for {x.rank} axes")
        if order[0] != 0:
            node.refuse(f"moves the batch, {tuple(order)}; required: an order that begins with 0")
        return self.move(node, x, math.prod(x.dims), lambda index: index.transpose([axis - 1 for axis in order[1:]]))

    def squeeze(self, node: Node, x: Tensor, axes: Sequence[int]) -> Tensor:
        chosen = {self.own_axis(node, x, axis) for axis in axes}
        if any(x.dims[axis] != 1 for axis in chosen):
            node.refuse(f"removes axes {tuple(sorted(axis + 1 for axis in chosen))} of {x}; required: axes of length 1")
        return self.with_dims(node, x, [n for axis, n in enumerate(x.dims) if axis not in chosen])

    def unsqueeze(self, node: Node, x: Tensor, axes: Sequence[int]) -> Tensor:
        rank = x.rank + len(axes)
        chosen = {self.axis(node, axis, rank) for axis in axes}
        if 0 in chosen or len(chosen) < len(axes):
            node.refuse(f"puts new axes at {tuple(axes)}; required: each once, and none before the batch")
        old = iter(x.dims)
        return self.with_dims(node, x, [1 if axis in chosen else next(old) for axis in range(1, rank)])

    def flatten(self, node: Node, x: Tensor, first: int = 1, last: int = -1) -> Tensor:
        """Axes `first` to `last` as one."""
        start = self.own_axis(node, x, first)
        stop = self.own_axis(node, x, last) + 1 if x.dims else 0
        return self.with_dims(node, x, [*x.dims[:start], math.prod(x.dims[start:stop]), *x.dims[stop:]])

    def take(self, node: Node, x: Tensor, axis: int, places: Any) -> Tensor:
        """The numbers at `places` along `axis`: a slice, or integers of any shape, which replaces the axis."""
        own = self.own_axis(node, x, axis)
        length, others = x.dims[own], math.prod(x.dims) // x.dims[own]
        if isinstance(places, slice):
            return self.move(node, x, others * len(range(*places.indices(length))),
                             lambda index: index[(slice(None),) * own + (places,)])
        places = np.asarray(places)
        if places.dtype.kind not in "iu" or (places.size and not -length <= places.min() <= places.max() < length):
            node.refuse(f"takes numbers {places.min()} to {places.max()} of an axis of length {length}; required: numbers that there are")
        return self.move(node, x, others * places.size, lambda index: np.take(index, places, own))

    def split(self, node: Node, x: Tensor, axis: int, sizes: Sequence[int]) -> list[Tensor]:
        """Parts of these sizes, one behind the other."""
        own = self.own_axis(node, x, axis)
        if min(sizes, default=0) < 1 or sum(sizes) != x.dims[own]:
            node.refuse(f"splits an axis of length {x.dims[own]} into {tuple(sizes)}; required: sizes from 1 that add up")
        starts = np.cumsum([0, *sizes])
        parts = [self.take(node, x, axis, slice(int(a), int(b))) for a, b in itertools.pairwise(starts)]
        return [replace(part, name=f"{part.name}/{i}") for i, part in enumerate(parts)]

    def pad(self, node: Node, x: Tensor, pads: Sequence[tuple[int, int]], mode: str = "constant") -> Tensor:
        """(before, after) for each axis but the batch; negative ones cut off. mode: constant (zeros), reflect or edge."""
        sizes = [n + before + after for n, (before, after) in zip(x.dims, pads, strict=True)]
        if min(sizes, default=1) < 1:
            node.refuse(f"leaves nothing of a tensor {x}")
        self._count_moved(node, math.prod(sizes))
        more = [(max(before, 0), max(after, 0)) for before, after in pads]
        less = tuple(slice(max(-before, 0), n - max(-after, 0)) for n, (before, after) in zip(x.dims, pads, strict=True))
        if any(part.start >= part.stop for part in less):
            node.refuse(f"leaves nothing of a tensor {x}")
        values: dict[str, Any] = {"constant_values": -1} if mode == "constant" else {}
        return self.move(node, x, math.prod(sizes), lambda index: np.pad(index[less], more, mode, **values))  # type: ignore[call-overload]

    def repeat(self, node: Node, x: Tensor, places: Sequence[Array]) -> Tensor:
        """Nearest resizing: for each axis but the batch, which number comes at each place."""
        size = math.prod(len(chosen) for chosen in places)
        return self.move(node, x, size, lambda index: index[np.ix_(*places)])

    def depth_to_space(self, node: Node, x: Tensor, n: int, channels_first: bool) -> Tensor:
        """n x n channels as a block of pixels; channels_first: where they are next to each other, as in PyTorch's pixel_shuffle."""
        channels, height, width = x.dims
        outputs = channels // (n * n)
        shape, order = ((outputs, n, n), (0, 3, 1, 4, 2)) if channels_first else ((n, n, outputs), (2, 3, 0, 4, 1))
        return self.move(node, x, math.prod(x.dims), lambda index: index.reshape(*shape, height, width).transpose(order)
                         .reshape(outputs, height * n, width * n))

    def expand(self, node: Node, x: Tensor, dims: Sequence[int]) -> Tensor:
        dims = tuple(n if wanted in (-1, 1) else wanted for n, wanted in zip(x.dims, dims, strict=True))
        if any(n not in (1, wanted) for n, wanted in zip(x.dims, dims, strict=True)):
            node.refuse(f"makes {dims} of {x}; required: axes of length 1 where it is longer")
        return self.move(node, x, math.prod(dims), lambda index: np.broadcast_to(index, dims))

    def concat(self, node: Node, parts: Sequence[Tensor], axis: int) -> Tensor:
        own, rank = self.own_axis(node, parts[0], axis), parts[0].rank
        if len({(x.dims[:own], x.dims[own + 1:]) for x in parts}) > 1 or any(x.rank != rank for x in parts):
            node.refuse(f"joins {', '.join(map(str, parts[:5]))} along axis {axis}; required: tensors that differ in that axis alone")
        if len(parts) == 1:
            return parts[0]
        if len({x.layer for x in parts}) == 1 and any(x.index is not None for x in parts):
            size = sum(math.prod(x.dims) for x in parts)
            return self.move(node, parts[0], size, lambda _: np.concatenate([x.indices() for x in parts], own))
        front = [0, own + 1, *(i for i in range(1, rank) if i != own + 1)]
        moved = [x if not own else self.transpose(node, x, front) for x in parts]
        joined = self.add(Concat, node, [self.plain(node, x) for x in moved])
        result = replace(joined, dims=(sum(x.dims[0] for x in moved), *moved[0].dims[1:]))
        return result if not own else self.transpose(node, result, [int(i) for i in np.argsort(front)])

    # Arithmetic

    def affine(self, node: Node, x: Tensor, scale: Any = 1.0, shift: Any = 0.0, part: str = "") -> Tensor:
        """scale * x + shift, constants that broadcast with x, batch included, and do not differ within a channel."""
        numbers = []
        for value, rest in ((scale, 1.0), (shift, 0.0)):
            numbers.append(self._by_channel(node, x, value, rest))
        if numbers[1].any() and x.index is not None and (x.index < 0).any():
            return self.affine(node, self.plain(node, x), scale, shift, part)
        return self.pointwise(BatchNorm, node, x, part, scale=numbers[0], shift=numbers[1])

    def _by_channel(self, node: Node, x: Tensor, value: Any, rest: float) -> Array:
        """`value` as one number for each channel of the layer that x is of; rest: for channels that x has nothing of."""
        value = np.asarray(value, np.float64)
        channels = x.shape[0]
        if value.size == 1:
            return np.full(channels, value.reshape(()))
        refusal = f"has a constant of shape {value.shape} for {channels} channels; required: one number, or one for each channel"
        value = value[(None,) * (x.rank - value.ndim)] if value.ndim < x.rank else value
        if value.ndim > x.rank or value.shape[0] != 1 or any(n not in (1, own) for n, own in zip(value.shape[1:], x.dims, strict=True)):
            node.refuse(refusal)
        if x.index is None and x.dims and x.dims[0] == channels and value.size == value.shape[1]:
            return np.broadcast_to(value.ravel(), channels)
        self._count_moved(node, math.prod(x.shape) + math.prod(x.dims))
        full, index = np.broadcast_to(value[0], x.dims).ravel(), x.indices().ravel()
        each = np.full(math.prod(x.shape), np.nan)
        each[index[index >= 0]] = full[index >= 0]
        by_channel = each.reshape(channels, -1)
        low, high = np.fmin.reduce(by_channel, 1), np.fmax.reduce(by_channel, 1)
        low, high = np.where(np.isnan(low), rest, low), np.where(np.isnan(high), rest, high)
        if not np.isfinite(full).all() or (low != high).any() or (each[index[index >= 0]] != full[index >= 0]).any():
            node.refuse(refusal)
        return low

    def sum(self, node: Node, terms: Sequence[Tensor]) -> Tensor:
        if len({x.dims for x in terms}) > 1:
            node.refuse(f"adds {', '.join(map(str, terms[:5]))}; required: tensors of one shape")
        total = terms[0]
        for i, term in enumerate(terms[1:], 1):
            part = "" if i == len(terms) - 1 else f"/{i}"
            if total.shape == term.shape and (total.index is term.index or np.array_equal(total.indices(), term.indices())):
                both = self.add(Add, node, [replace(x, dims=x.shape, index=None) for x in (total, term)], part)
                total = replace(total, layer=both.layer)
            else:
                both = self.add(Add, node, [self.plain(node, total), self.plain(node, term)], part)
                total = replace(both, dims=total.dims)
        return total

    def power(self, node: Node, x: Tensor | Squares, exponent: float) -> Tensor | Squares:
        if isinstance(x, Squares) and x.size and x.beta is None:
            return replace(x, beta=exponent)
        x = self.unsquared(node, x)
        if exponent in (1, 2):
            return x if exponent == 1 else Squares(x, x)
        if exponent % 2 and x.layer not in self._nonnegative:
            node.refuse(f"raises to {exponent:g} what can be negative; required: an even power, or a ReLU before it")
        return self.pointwise(Power, node, x, exponent=exponent)

    def unsquared(self, node: Node, x: Tensor | Squares) -> Tensor:
        """Squares as a layer that makes them."""
        if isinstance(x, Tensor):
            return x
        if x.size or x.bias is not None or x.beta is not None:
            node.refuse("reads a part of a local response normalisation; required: all of one, as PyTorch computes it")
        return self.pointwise(Power, node, x.view, exponent=2.0)

    def product(self, node: Node, x: Any, y: Any) -> Tensor | Squares:
        """Of two values that are computed: a square, or what a pool by the p-norm is written with."""
        for sign, other in ((x, y), (y, x)):
            if isinstance(sign, Sign) and isinstance(other, Tensor) and self._is_magnitude(other.layer, sign.of.layer):
                return sign.of  # its sign times its magnitude
        if isinstance(x, Tensor) and isinstance(y, Tensor) and x.equals(y):
            return Squares(x, x)
        return node.refuse("multiplies two tensors that are computed; required: one, and a constant")

    def _is_magnitude(self, layer: str, of: str) -> bool:
        while isinstance(made := self.layers.get(layer), (ReLU, Power)):
            if isinstance(made, Power) and made.exponent == 1 and made.inputs[0] == of:
                return True
            layer = made.inputs[0]
        return False

    def magnitude(self, node: Node, x: Tensor) -> Tensor:
        return self.pointwise(Power, node, x, exponent=1.0)

    def normalise(self, node: Node, x: Tensor, by: Squares) -> Tensor:
        """x divided by what a local response normalisation divides by."""
        if not by.size or by.bias is None or not by.of.equals(x) or not by.view.equals(x):
            node.refuse("divides by squares; required: a local response normalisation as PyTorch computes it")
        x = self.plain(node, x)
        return self.add(LocalResponseNorm, node, [x], size=by.size, alpha=by.alpha, beta=1.0 if by.beta is None else by.beta, bias=by.bias)

    def mean_over_channels(self, node: Node, x: Squares, size: int) -> Squares:
        """A pool of `size` channels over squares (N, 1, C, ...) that zeros are put around."""
        if size % 2 == 0:
            node.refuse(f"belongs to a local response normalisation over {size} channels; required: an odd number")
        self._count_moved(node, math.prod(x.view.dims))
        channels = x.of.indices()
        padded = np.pad(channels, [(size // 2, size // 2)] + [(0, 0)] * (channels.ndim - 1), constant_values=-1)
        if x.size or x.bias is not None or x.view.layer != x.of.layer or not np.array_equal(x.view.indices(), padded[None]):
            node.refuse("is no part of a local response normalisation; required: one as PyTorch computes it")
        return replace(x, view=replace(x.of, dims=(1, *x.of.dims), index=None if x.of.index is None else channels[None]), size=size)

    # Layers with windows or weights. Windows have an entry for each spatial axis, of which there may be one or two.

    def spatial(self, node: Node, x: Tensor) -> int:
        """How many spatial axes."""
        if x.rank not in (3, 4):
            node.refuse(f"reads a tensor {x} of {x.rank} axes; required: (N, C, H, W), or (N, C, L)")
        return x.rank - 2

    def _unpadded(self, node: Node, x: Tensor) -> tuple[Tensor, Padding]:
        """`x` without the zeros around it, where it is a layer's output with zeros around it, and how many there are."""
        if x.index is None:
            return self.plain(node, x), NO_PADDING
        index = x.index.reshape(plain_shape(x.dims))
        there = index[0] >= 0
        rows, columns = there.any(1).nonzero()[0], there.any(0).nonzero()[0]
        if rows.size:
            (top, bottom), (left, right) = ((int(places[0]), int(places[-1]) + 1) for places in (rows, columns))
            inner = index[:, top:bottom, left:right]
            padding = top, left, index.shape[1] - bottom, index.shape[2] - right
            if (inner.shape == x.shape and max(padding) <= MAX_PADDING and np.count_nonzero(index >= 0) == inner.size
                    and (inner.ravel() == np.arange(inner.size)).all()):
                return Tensor(x.layer, x.shape, x.shape if x.rank == 4 else (x.shape[0], x.shape[2])), padding
        return self.plain(node, x), NO_PADDING

    def conv(self, node: Node, x: Tensor, weight: Array, bias: Array | None, stride: Sequence[int], padding: Sequence[int],
             dilation: Sequence[int], groups: int) -> Tensor:
        """weight: (K, C / groups, kernel...); padding: all that is before, then all that is behind."""
        axes = self.spatial(node, x)
        if weight.ndim != axes + 2:
            node.refuse(f"has weights of shape {weight.shape}; required: (K, C / group, *kernel_shape), in {axes} dimensions")
        x, around = self._unpadded(node, x)
        return self.add(Conv2d, node, [x], weight=weight.reshape(*weight.shape[:2], *_two(weight.shape[2:], 1)), bias=bias,
                        stride=_two(stride, 1), padding=sum_of(_four(padding), around), dilation=_two(dilation, 1), groups=groups)

    def conv_transpose(self, node: Node, x: Tensor, weight: Array, bias: Array | None, stride: Sequence[int], padding: Sequence[int],
                       dilation: Sequence[int], groups: int, more: Sequence[int]) -> Tensor:
        """weight: (C, K / groups, kernel...); more: what is added at the end of each axis."""
        axes = self.spatial(node, x)
        if weight.ndim != axes + 2 or 0 in weight.shape or groups < 1 or weight.shape[0] % groups:
            node.refuse(f"has weights of shape {weight.shape} in {groups} groups; required: (C, K / group, *kernel_shape), in {axes} "
                        "dimensions, and groups that divide C")
        x = self.plain(node, x)
        outputs = weight.shape[1] * groups
        if x.shape[0] != weight.shape[0] or (bias is not None and bias.shape != (outputs,)):
            node.refuse(f"has weights of shape {weight.shape} and bias of shape {None if bias is None else bias.shape} for a tensor {x}; "
                        f"required: weights for as many channels, and bias ({outputs},)")
        weight = weight.reshape(*weight.shape[:2], *_two(weight.shape[2:], 1))
        stride, dilation, more, cut = _two(stride, 1), _two(dilation, 1), _two(more, 0), _four(padding)
        if not all(1 <= n <= 256 for n in stride) or min(*dilation, 1) < 1 or min(*cut, *more) < 0:
            node.refuse(f"has strides {stride}, dilations {dilation}, pads {cut} and output padding {more}; required: strides from 1 to "
                        "256, dilations from 1, and nothing negative")
        kernel = weight.shape[2:]
        sizes = [(x.shape[1 + i] - 1) * stride[i] + dilation[i] * (kernel[i] - 1) + 1 + more[i] for i in (0, 1)]
        if any(sizes[i] <= cut[i] + cut[i + 2] for i in (0, 1)):
            node.refuse(f"leaves nothing of a tensor {x}")
        reach = math.prod(dilation[i] * (kernel[i] - 1) // stride[i] + 1 for i in (0, 1))
        self.count_weights(node, weight.shape[0] * weight.shape[1] * math.prod(stride) * reach)
        self._count_moved(node, outputs * math.prod(sizes))
        fields, index = transposed_convolution(weight, bias, x.shape, stride, cut, dilation, groups, more)
        base = self.add(Conv2d, node, [replace(x, dims=x.shape)], **fields)
        name = node.layer_name + "/interleaved"
        result = replace(self.move(node, base, index.size, lambda _: index), name=name)
        return result if axes == 2 else replace(self.with_dims(node, result, (result.dims[0], result.dims[2])), name=name)

    def pool(self, node: Node, x: Tensor, is_average: bool, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
             ceil_mode: bool = False, include_pad: bool = False) -> Tensor:
        self.spatial(node, x)
        window: dict[str, Any] = {"kernel": _two(kernel, 1), "stride": _two(stride, 1), "ceil_mode": ceil_mode}
        around, pads = NO_PADDING, _four(padding)
        if not is_average:
            return self.add(MaxPool2d, node, [self.plain(node, x)], padding=pads, **window)
        inner, around = self._unpadded(node, x)
        total = sum_of(pads, around)
        # The zeros of a pad are part of the image and always count; those of the pool itself may not.
        if around != NO_PADDING and (ceil_mode or (pads != NO_PADDING and not include_pad)
                                     or any(total[i] >= window["kernel"][i % 2] for i in range(4))):
            inner, around, total = self.plain(node, x), NO_PADDING, pads
        return self.add(AveragePool2d, node, [inner], padding=total, count_include_pad=include_pad or around != NO_PADDING, **window)

    def norm_pool(self, node: Node, x: Tensor, exponent: float, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
                  ) -> Tensor:
        """The p-norm of each window."""
        self.spatial(node, x)
        sides = _two(kernel, 1)
        self.count_weights(node, x.dims[0] * math.prod(sides))
        powers = self.pointwise(Power, node, x, "/power", exponent=exponent)
        powers, around = self._unpadded(node, powers)
        sums = self.add(Conv2d, node, [powers], "/sum", weight=np.ones((x.dims[0], 1, *sides), np.float32), stride=_two(stride, 1),
                        padding=sum_of(_four(padding), around), groups=x.dims[0])
        return self.pointwise(Power, node, sums, exponent=1 / exponent if exponent else 0.0)

    def adaptive_pool(self, node: Node, x: Tensor, is_average: bool, size: Sequence[int | None]) -> Tensor:
        """To one pixel, or to a size that divides the input's into equal windows."""
        axes = self.spatial(node, x)
        wanted = [own if n is None else n for n, own in zip(size, x.dims[1:], strict=True)]
        if wanted == [1] * axes:
            return self.reduce(node, x, is_average, range(2, axes + 2), keep=True)
        if wanted == list(x.dims[1:]):
            return x
        if any(n < 1 or own % n for n, own in zip(wanted, x.dims[1:], strict=True)):
            node.refuse(f"makes {tuple(wanted)} of {x.dims[1:]}; required: a size that divides it")
        kernel = [own // n for n, own in zip(wanted, x.dims[1:], strict=True)]
        return self.pool(node, x, is_average, kernel, kernel, (0,) * 2 * axes)

    def reduce(self, node: Node, x: Tensor, is_average: bool, axes: Sequence[int], keep: bool) -> Tensor:
        """The mean or the maximum over any axes but the batch."""
        over = sorted({self.own_axis(node, x, axis) for axis in axes})
        rest = [axis for axis in range(len(x.dims)) if axis not in over]
        result = [1 if axis in over else n for axis, n in enumerate(x.dims) if keep or axis not in over]
        if not over:
            return x
        moved = self.transpose(node, x, [0, *(axis + 1 for axis in rest + over)])
        kept = math.prod(x.dims[axis] for axis in rest)
        moved = replace(self.with_dims(node, moved, (kept, math.prod(x.dims) // kept)), name=node.layer_name + "/transposed")
        base = moved if moved.index is None and moved.shape[0] == kept else self.plain(node, moved)
        window: dict[str, Any] = {} if is_average else {"kernel": base.shape[1:]}
        reduced = self.add(GlobalAveragePool if is_average else MaxPool2d, node, [base], **window)
        return Tensor(reduced.layer, reduced.shape, tuple(result))

    def dense(self, node: Node, x: Tensor, weight: Array, bias: Array | None) -> Tensor:
        """weight (K, F) over the last axis."""
        if not x.dims:
            node.refuse(f"reads a tensor {x}; required: (N, F)")
        if x.rank == 2:
            return self.add(Dense, node, [self.plain(node, x)], weight=weight, bias=bias)
        if weight.ndim != 2 or weight.shape[1] != x.dims[-1]:
            node.refuse(f"has weights of shape {weight.shape} (outputs, features) for a tensor {x}; required: as many features as its last "
                        "axis is long")
        front = self.transpose(node, x, [0, x.rank - 1, *range(1, x.rank - 1)])
        made = self.add(Conv2d, node, [self.plain(node, front)], weight=weight[:, :, None, None], bias=bias)
        made = replace(made, dims=(weight.shape[0], *front.dims[1:]))
        return self.transpose(node, made, [0, *range(2, x.rank), 1])

    def prelu(self, node: Node, x: Tensor, slope: Any) -> Tensor:
        """One slope, or one for each channel. Slopes that differ take the positive and the negative part apart."""
        slopes = self._by_channel(node, x, slope, 0.0)
        if (slopes == slopes[0]).all():
            return self.pointwise(LeakyReLU if slopes[0] else ReLU, node, x, **({"slope": slopes[0]} if slopes[0] else {}))
        base = Tensor(x.layer, x.shape, x.shape)
        nothing = np.zeros(len(slopes))
        mirrored = self.add(ReLU, node, [self.add(BatchNorm, node, [base], "/minus", scale=nothing - 1, shift=nothing)], "/negative")
        scaled = self.add(BatchNorm, node, [mirrored], "/scaled", scale=-slopes, shift=nothing)
        whole = self.add(Add, node, [self.add(ReLU, node, [base], "/positive"), scaled])
        return replace(x, layer=whole.layer)

    def clip(self, node: Node, x: Tensor, low: float, high: float) -> Tensor:
        if (low, high) == (0, math.inf):
            return self.pointwise(ReLU, node, x)
        if (low, high) == (-math.inf, math.inf):
            return x
        if not low <= 0 < high:
            node.refuse(f"clips to [{low:g}, {high:g}]; required: a lower bound of 0 or less, and an upper one above 0")
        return self.pointwise(Clip, node, x, low=low, high=high)

    def softmax(self, node: Node, x: Tensor, axis: int) -> Tensor:
        if self.axis(node, axis, x.rank) != 1:
            node.refuse(f"has axis {axis} over {x.rank} axes; required: 1, the classes")
        return self.add(Softmax, node, [self.plain(node, x)])


def _dims_of(shape: Shape, x: Tensor) -> tuple[int, ...]:
    """Own shape of what a layer makes of `x`, with as many axes."""
    if x.rank == 2 and shape[1:] == (1, 1):
        return shape[:1]
    return (shape[0], shape[2]) if x.rank == 3 and shape[1] == 1 else shape


def _two(values: Sequence[int], fill: int) -> tuple[int, int]:
    """Height and width; a single axis is the width."""
    return (int(values[0]), int(values[1])) if len(values) == 2 else (fill, int(values[0]))


def _four(padding: Sequence[int]) -> Padding:
    """Top, left, bottom, right; a single axis is the width."""
    return (padding[0], padding[1], padding[2], padding[3]) if len(padding) == 4 else (0, padding[0], 0, padding[1])


