"""A network while it is read: the layers made so far, and what moves elements.

What moves elements only changes a tensor's view (tensors.py); a layer is made of it, a `Flatten` or `Rearrange`, where
an operator needs the elements in order. Axes and shapes that methods take count the batch, which is the first axis and
stays there.

Files come from anywhere, so sizes are checked before anything of that size is allocated.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt

from fastdtd import graph
from fastdtd.errors import ConversionError
from fastdtd.graph import INPUT, MAX_TENSOR_ELEMENTS, Layer, Shape
from fastdtd.importers.budget import INDEX, Budget
from fastdtd.importers.tensors import Index, Tensor, layer_shape

MAX_AXES = 32  # what NumPy 1 holds

Array = npt.NDArray[Any]


class Node:
    """An operator of a source with its arguments, which are checked as they are asked for; each source has its kind.

    A subclass says by `str` which node it is, and by `layer_name` what a layer is called that is made of it.
    """

    layer_name = ""

    def refuse(self, what: str) -> NoReturn:
        """Raise ConversionError that names the node."""
        raise ConversionError(f"{self} {what}")

    def refuse_unread(self, what: str, default: object = None) -> NoReturn:
        """The same of what the node says and nobody reads. default: what it may be, None where it may not be there."""
        self.refuse(f"has {what}, which is not supported; required: {'none' if default is None else default}")


class Ending(NamedTuple):
    """What makes probabilities of scores. kind: softmax, log_softmax or sigmoid, of a tensor along an axis of its dims;
    node: what said so."""

    kind: str
    of: Tensor
    node: Node
    axis: int = 0


class Moves:
    """The layers made so far, and what several sources make of operators.

    node : the one that is being read; it names the layers that are made, and the errors
    batch : the batch size in the source's own shapes
    budget : what may be made
    """

    def __init__(self, budget: Budget, batch: int = 1) -> None:
        self.budget, self.batch = budget, batch
        self.layers: dict[str, Layer] = {}
        self.node = Node()
        self.squared: dict[Any, Tensor] = {}  # what patterns.Squares, curves and moments are where elements are needed
        self.means: dict[str, tuple[Tensor, tuple[int, ...], Tensor]] = {}  # by layer: of what, over which axes, and it
        self.responses: dict[str, tuple[Tensor, Tensor]] = {}  # by layer: a tensor and its responses, multiplied
        self.ending: Ending | None = None  # what the source makes of its scores at last, which are kept as they are
        self.output: Tensor | None = None  # the source's output, as a view of the scores
        self._endings: dict[str, Ending] = {}
        self._materialized: dict[Any, tuple[Tensor, Tensor]] = {}
        self._nonnegative: set[str] = set()

    @contextlib.contextmanager
    def at(self, node: Node) -> Iterator[None]:
        """While `node` is read."""
        outer, self.node = self.node, node
        try:
            yield
        finally:
            self.node = outer

    def refuse(self, what: str) -> NoReturn:
        self.node.refuse(what)

    def leading_to(self, *outputs: Tensor) -> list[Layer]:
        """The layers that these need, those that materialize them included."""
        needed, waiting = set(), [self.materialize(output).layer for output in outputs]
        while waiting:
            name = waiting.pop()
            if name != INPUT and name not in needed:
                needed.add(name)
                waiting.extend(self.layers[name].inputs)
        found = [layer for name, layer in self.layers.items() if name in needed]
        return self.finished(found, [self.materialize(output).layer for output in outputs])

    def ends_in(self, kind: str, x: Tensor, axis: int, part: str = "") -> Tensor:
        """softmax or log_softmax of `x`, by a layer that is left out where it is the last, and which `finished` puts
        others in the place of where it is a gate."""
        if self.has_zeros(x):
            x = self.materialize(x)
        made = self.pointwise(graph.Softmax, x, part)
        self._endings[made.layer] = Ending(kind, x, self.node, axis)
        return made

    def is_softmax(self, name: str) -> bool:
        return name in self._endings and self._endings[name].kind == "softmax"

    def may_end_in(self, kind: str, made: Tensor) -> Tensor:
        """The layer of `made` is left out where it is the last, and computed elsewhere."""
        self._endings[made.layer] = Ending(kind, made, self.node)
        return made

    def scores(self, output: Tensor) -> Tensor:
        """`output` as it is before the probabilities that are made of it: in order, but for maps, whose channels come
        first."""
        self.ending = self._endings.get(output.layer)
        if self.ending:
            last = self.layers[output.layer]
            if not any(last.name in layer.inputs for layer in self.layers.values()):
                del self.layers[last.name]
            output = replace(output, layer=last.inputs[0])
        self.output = output
        if output.rank == 4 and not (output.is_whole and output.shape == output.dims):
            first = self.channels_first(output)
            if first.is_whole:
                return first
        return self.materialize(output)

    def finished(self, layers: Sequence[Layer], outputs: Iterable[str]) -> list[Layer]:
        """All layers of a network, of which none may make probabilities but those in gates."""
        explained, found = graph.explained_layers(layers, outputs), list[Layer]()
        for layer in layers:
            if not isinstance(layer, graph.Softmax):
                found.append(layer)
                continue
            kind = self._endings[layer.name].kind
            if layer.name in explained or kind != "softmax":
                gates = ", or in a gate, which multiplies another tensor" if kind == "softmax" else ""
                raise ConversionError(f"{kind} {layer.name!r} is not the last layer; required: a {kind} only at the "
                                      f"end, where it is left out, and the score before it explained{gates}; output= "
                                      "(--output) ends the network at another tensor")
            found += self._softmax_over_channels(layer, self._endings[layer.name])
        return found

    def _softmax_over_channels(self, layer: Layer, ending: Ending) -> list[Layer]:
        """A softmax in a gate: elements are moved so that its axis is the channels, and back."""
        x, (source,) = ending.of, layer.inputs
        with self.at(ending.node):
            self.spend_index(x.elements + math.prod(x.shape))
            index = np.moveaxis(x.indices(), ending.axis, 0).reshape(x.dims[ending.axis], 1, -1)
            order, flat = np.arange(index.size, dtype=np.int32), index.ravel()
            if len(index) == x.shape[0] and np.array_equal(flat, np.arange(math.prod(x.shape))):
                return [layer]
            back = np.full(math.prod(x.shape), -1, np.int32)
            back[flat] = order
            if not np.array_equal(back[flat], order):
                self.refuse("is a softmax of a tensor that has elements several times; required: each once")
        moved, made = (self._unused(f"{layer.name}/{part}") for part in ("channels first", "softmax"))
        return [graph.Rearrange(moved, (source,), index), graph.Softmax(made, (moved,)),
                graph.Rearrange(layer.name, (made,), back.reshape(x.shape))]

    # Layers, and elements in order

    def add(self, layer_type: type[Layer], inputs: Sequence[Tensor], part: str = "", **fields: Any) -> Tensor:
        """The output of a new layer that reads whole tensors. part: marks one of several layers that one node needs."""
        self.spend(sum(value.size for value in fields.values() if isinstance(value, np.ndarray)), 4)
        name = self._unused(self.node.layer_name + part)
        layer = layer_type(name, tuple(x.layer for x in inputs), **fields)
        shape = layer.output_shape([x.shape for x in inputs])
        self.layers[name] = layer
        if self._is_nonnegative(layer):
            self._nonnegative.add(name)
        return Tensor.whole(name, shape, _dims_of(shape, inputs[0]))

    def _unused(self, name: str) -> str:
        while name in self.layers or name in (INPUT, ""):
            name += "_"
        return name

    def spend(self, count: int, size: int = 8) -> None:
        """Ask for an array of `count` elements of `size` bytes before it is made: nodes may share weights, say, but
        their layers do not.
        """
        self.budget.take(self.node, count, size)

    def check_size(self, count: int) -> None:
        if count > MAX_TENSOR_ELEMENTS:
            self.refuse(f"makes a tensor of {count} elements; at most {MAX_TENSOR_ELEMENTS} are accepted")

    def spend_index(self, count: int) -> None:
        """Ask for an index of `count` elements, or to compare two."""
        self.check_size(count)
        self.spend(count, INDEX)

    def _is_nonnegative(self, layer: Layer) -> bool:
        """Whether no element can be negative that `layer` makes."""
        inputs = all(name in self._nonnegative for name in layer.inputs)
        match layer:
            case graph.ReLU() | graph.Power() | graph.Softmax():
                return True
            case graph.Clip():
                return layer.low >= 0 or inputs
            case graph.Activation():
                return not layer.is_zero_at_zero or inputs
            case graph.Conv2d() | graph.Dense():
                bias = layer.bias is None or bool((layer.bias >= 0).all())
                return inputs and bias and bool((layer.weight >= 0).all())
            case graph.BatchNorm():
                return inputs and bool((layer.scale >= 0).all() and (layer.shift >= 0).all())
        return inputs

    def is_nonnegative(self, x: Tensor) -> bool:
        return x.layer in self._nonnegative

    def materialize(self, x: Tensor) -> Tensor:
        """`x` as a layer's whole output, with shape `layer_shape(x.dims)`."""
        shape = layer_shape(x.dims)
        if x.is_whole and x.shape == shape:
            return x
        key = x.layer, x.dims, x.axes, x.pads, x.offset, id(x.index)
        if key not in self._materialized:
            name = self._unused(x.name or self.node.layer_name)
            if x.is_whole and shape[1:] == (1, 1):
                self.layers[name] = graph.Flatten(name, (x.layer,))
            else:
                self.spend_index(math.prod(shape))
                self.layers[name] = graph.Rearrange(name, (x.layer,), x.indices().reshape(shape))
            if x.layer in self._nonnegative:
                self._nonnegative.add(name)
            self._materialized[key] = Tensor.whole(name, shape, x.dims), x  # x, so that its index keeps its id
        return self._materialized[key][0]

    def pointwise(self, layer_type: type[Layer], x: Tensor, part: str = "", **fields: Any) -> Tensor:
        """A layer that maps each element alone, and zero to zero: it can come before whatever moves elements."""
        return replace(x, layer=self.add(layer_type, [x.base], part, **fields).layer)

    def has_zeros(self, x: Tensor) -> bool:
        """Whether padding is among the elements of `x`."""
        if x.index is not None:
            self.spend(x.elements, 1)  # for it is gone through
        return x.has_zeros

    def have_one_view(self, x: Tensor, y: Tensor) -> bool:
        """Whether both take the same elements of their layers."""
        if x.index is not y.index:
            self.spend_index(x.elements)  # for they are compared
        return x.has_view_of(y)

    def are_same(self, x: Tensor, y: Tensor) -> bool:
        """Whether both are the same elements of one layer in the same order."""
        return x.layer == y.layer and self.have_one_view(x, y)

    # Moving elements

    def move(self, x: Tensor, count: int, change: Callable[[Index], Any], moved: Tensor | None = None) -> Tensor:
        """`x` after `change` of its index, which makes it `count` elements; `moved` instead, where that is known."""
        if count < 1:
            self.refuse(f"leaves nothing of a tensor {x}")
        self.check_size(count)
        if moved is None:
            self.spend_index(max(count, x.elements))
            moved = x.with_index(np.ascontiguousarray(change(x.indices()), np.int32), "")
        else:
            self.budget.step(self.node, 1)
        return replace(moved, name=self.node.layer_name)

    def with_dims(self, x: Tensor, dims: Sequence[int], part: str = "") -> Tensor:
        """`x` with axes of other lengths."""
        if len(dims) >= MAX_AXES:
            self.refuse(f"makes a tensor of {len(dims) + 1} axes; at most {MAX_AXES} are accepted")
        result = self.move(x, x.elements, lambda index: index.reshape(dims), x.reshaped(dims))
        return replace(result, name=self.node.layer_name + part)

    def reshape(self, x: Tensor, target: Sequence[int]) -> Tensor:
        """`target`: a shape where one axis may be -1."""
        total = self.batch * x.elements
        known = math.prod(n for n in target if n != -1)
        shape = [total // known if n == -1 and known > 0 else n for n in target]
        if not shape or target.count(-1) > 1 or min(shape) < 1 or math.prod(shape) != total:
            self.refuse(f"makes {tuple(target)} of {x}; required: a shape of as many elements")
        if shape[0] != self.batch:
            self.refuse(f"makes {tuple(target)} of {x}; required: (N, ...), the batch left in front")
        return self.with_dims(x, shape[1:])

    def axis(self, axis: int, rank: int) -> int:
        """An axis from 0, the batch, of one that may count from the end."""
        if not -rank <= axis < rank:
            self.refuse(f"has axis {axis} for a tensor of {rank} axes")
        return axis % rank

    def own_axis(self, x: Tensor, axis: int) -> int:
        """The same for an axis that must not be the batch, as an axis of `dims`."""
        if not self.axis(axis, x.rank):
            self.refuse(f"works along axis {axis} of {x}, the batch; required: another")
        return axis % x.rank - 1

    def transpose(self, x: Tensor, order: Sequence[int]) -> Tensor:
        if sorted(order) != list(range(x.rank)):
            self.refuse(f"has the order {tuple(order)} for {x.rank} axes")
        if order[0] != 0:
            self.refuse(f"moves the batch, {tuple(order)}; required: an order that begins with 0 (where this is "
                        "attention: docs/method.md#attention)")
        own = [axis - 1 for axis in order[1:]]
        return self.move(x, x.elements, lambda index: index.transpose(own), x.transposed(own))

    def channels_first(self, x: Tensor) -> Tensor:
        """(N, H, W, C) as (N, C, H, W); a layer that materializes it keeps its name."""
        moved = self.transpose(x, [0, x.rank - 1, *range(1, x.rank - 1)]) if x.rank > 2 else x
        return replace(moved, name=x.name)

    def channels_last(self, x: Tensor) -> Tensor:
        """(N, C, H, W) as (N, H, W, C), the same."""
        moved = self.transpose(x, [0, *range(2, x.rank), 1]) if x.rank > 2 else x
        return replace(moved, name=x.name)

    def squeeze(self, x: Tensor, axes: Sequence[int]) -> Tensor:
        chosen = {self.own_axis(x, axis) for axis in axes}
        if any(x.dims[axis] != 1 for axis in chosen):
            self.refuse(f"removes axes {tuple(sorted(a + 1 for a in chosen))} of {x}; required: axes of length 1")
        return self.with_dims(x, [n for axis, n in enumerate(x.dims) if axis not in chosen])

    def unsqueeze(self, x: Tensor, axes: Sequence[int]) -> Tensor:
        rank = x.rank + len(axes)
        chosen = {self.axis(axis, rank) for axis in axes}
        if 0 in chosen or len(chosen) < len(axes):
            self.refuse(f"puts new axes at {tuple(axes)}; required: each once, and none before the batch")
        old = iter(x.dims)
        return self.with_dims(x, [1 if axis in chosen else next(old) for axis in range(1, rank)])

    def flatten(self, x: Tensor, first: int = 1, last: int = -1, part: str = "") -> Tensor:
        """Axes `first` to `last` as one."""
        start = self.own_axis(x, first)
        stop = self.own_axis(x, last) + 1 if x.dims else 0
        return self.with_dims(x, [*x.dims[:start], math.prod(x.dims[start:stop]), *x.dims[stop:]], part)

    def take(self, x: Tensor, axis: int, positions: Any) -> Tensor:
        """The elements at `positions` along `axis`: a slice, or integers of any shape, which replaces the axis."""
        if isinstance(positions, slice) and not self.axis(axis, x.rank):
            if positions.indices(self.batch) != (0, self.batch, 1):
                self.refuse("takes a part of the batch; required: all of it")
            return x
        own = self.own_axis(x, axis)
        length, others = x.dims[own], x.elements // x.dims[own]
        if isinstance(positions, slice):
            count = others * len(range(*positions.indices(length)))
            return self.move(x, count, lambda index: index[(slice(None),) * own + (positions,)],
                             x.sliced(own, positions))
        positions = np.asarray(positions)
        if positions.dtype.kind not in "iu":
            self.refuse(f"takes elements by numbers of type {positions.dtype}; required: whole numbers")
        if positions.size and not -length <= positions.min() <= positions.max() < length:
            self.refuse(f"takes elements {positions.min()} to {positions.max()} of an axis of length {length}; "
                        "required: elements that there are")
        if positions.ndim == 0:
            at = int(positions) % length
            return self.squeeze(self.take(x, axis, slice(at, at + 1)), [axis])
        return self.move(x, others * positions.size, lambda index: np.take(index, positions, own))

    def split(self, x: Tensor, axis: int, sizes: Sequence[int]) -> list[Tensor]:
        """Parts of these sizes, one after the other."""
        own = self.own_axis(x, axis)
        if min(sizes, default=0) < 1 or sum(sizes) != x.dims[own]:
            self.refuse(f"splits an axis of length {x.dims[own]} into {tuple(sizes)}; required: sizes from 1 that add "
                        "up")
        starts = itertools.accumulate(sizes, initial=0)
        parts = [self.take(x, axis, slice(a, b)) for a, b in itertools.pairwise(starts)]
        return [replace(part, name=f"{part.name}/{i}") for i, part in enumerate(parts)]

    def pad(self, x: Tensor, pads: Sequence[tuple[int, int]], mode: str = "constant") -> Tensor:
        """(before, after) for each axis; negative ones cut off. mode: constant (zeros), reflect, edge."""
        if len(pads) != x.rank or pads[0] != (0, 0):
            self.refuse(f"has pads {tuple(pads)} for {x}; required: as many, and none for the batch")
        for axis, (before, after) in enumerate(pads):
            if min(before, after) < 0:
                n = x.dims[axis - 1]
                x = self.take(x, axis, slice(max(-before, 0), max(n - max(-after, 0), 0)))
        more = [(max(before, 0), max(after, 0)) for before, after in pads[1:]]
        count = math.prod(n + before + after for n, (before, after) in zip(x.dims, more, strict=True))
        zeros: dict[str, Any] = {"constant_values": -1} if mode == "constant" else {}
        return self.move(x, count, lambda index: np.pad(index, more, mode, **zeros),  # type: ignore[call-overload]
                         x.padded(more) if mode == "constant" or not any(map(any, more)) else None)

    def repeat(self, x: Tensor, positions: Sequence[Array]) -> Tensor:
        """Nearest resizing: for each axis but the batch, which element comes at each position."""
        return self.move(x, math.prod(map(len, positions)), lambda index: index[np.ix_(*positions)])

    def tile(self, x: Tensor, times: Sequence[int]) -> Tensor:
        if len(times) != x.rank or times[0] != 1 or min(times) < 1:
            self.refuse(f"repeats {x} by {tuple(times)}; required: a number from 1 for each axis, and 1 for the batch")
        return self.move(x, x.elements * math.prod(times), lambda index: np.tile(index, times[1:]))

    def expand(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        """Axes of length 1 repeated; -1 leaves one as it is."""
        if len(shape) != x.rank or shape[0] not in (-1, 1, self.batch):
            self.refuse(f"makes {tuple(shape)} of {x}; required: as many axes, and the batch as it is")
        dims = tuple(n if wanted in (-1, 1) else wanted for n, wanted in zip(x.dims, shape[1:], strict=True))
        if any(n not in (1, wanted) for n, wanted in zip(x.dims, dims, strict=True)):
            self.refuse(f"makes {dims} of {x}; required: axes of length 1 where it is longer")
        return self.move(x, math.prod(dims), lambda index: np.broadcast_to(index, dims), x.expanded(dims))

    def shuffle(self, x: Tensor, split: Sequence[int], order: Sequence[int], dims: Sequence[int]) -> Tensor:
        """Axes split to lengths `split`, put in `order` (from 0, the batch left out), and joined to `dims`."""
        return self.with_dims(self.transpose(self.with_dims(x, split), [0, *(i + 1 for i in order)]), dims)

    def depth_to_space(self, x: Tensor, n: int, channels_first: bool) -> Tensor:
        """n x n channels as a block of pixels; channels_first: where they follow each other, as in PyTorch."""
        channels, height, width = x.dims
        outputs = channels // (n * n)
        split, order = ((outputs, n, n), (0, 3, 1, 4, 2)) if channels_first else ((n, n, outputs), (2, 3, 0, 4, 1))
        return self.shuffle(x, (*split, height, width), order, (outputs, height * n, width * n))

    def space_to_depth(self, x: Tensor, n: int, channels_first: bool) -> Tensor:
        channels, height, width = x.dims
        if n < 1 or height % n or width % n:
            self.refuse(f"makes blocks of {n} x {n} of {x}; required: a size that divides it")
        order = (0, 2, 4, 1, 3) if channels_first else (2, 4, 0, 1, 3)
        return self.shuffle(x, (channels, height // n, n, width // n, n), order,
                            (channels * n * n, height // n, width // n))

    def concat(self, parts: Sequence[Tensor], axis: int) -> Tensor:
        own, rank = self.own_axis(parts[0], axis), parts[0].rank
        if len({(x.dims[:own], x.dims[own + 1:]) for x in parts}) > 1 or any(x.rank != rank for x in parts):
            self.refuse(f"joins {', '.join(map(str, parts[:5]))} along axis {axis}; required: tensors that differ in "
                        "that axis alone")
        if len(parts) == 1:
            return parts[0]
        front = [0, own + 1, *(i for i in range(1, rank) if i != own + 1)]
        moved = [x if not own else self.transpose(x, front) for x in parts]
        in_order = any(all(x.is_whole for x in each) for each in (parts, moved))
        if len({x.layer for x in parts}) == 1 and not in_order:
            return self.move(parts[0], sum(x.elements for x in parts),
                             lambda _: np.concatenate([x.indices() for x in parts], own))
        joined = self.add(graph.Concat, [self.materialize(x) for x in moved])
        result = Tensor.whole(joined.layer, joined.shape, (joined.shape[0], *moved[0].dims[1:]))
        return result if not own else self.transpose(result, [int(i) for i in np.argsort(front)])


def _dims_of(shape: Shape, x: Tensor) -> tuple[int, ...]:
    """Own shape of what a layer makes of `x`, with as many axes."""
    if x.rank == 2 and shape[1:] == (1, 1):
        return shape[:1]
    return (shape[0], shape[2]) if x.rank == 3 and shape[1] == 1 else shape
