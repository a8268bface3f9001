"""What families of layers write their steps down with: buffers and lifetimes, scratch, states, kernel calls."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdtd import graph as g
from fastdtd.graph import INPUT, Array, Graph, Layer, Shape
from fastdtd.kernels.signatures import SIGNATURES, name_of, parameters
from fastdtd.lowering.aliasing import Intervals, Location
from fastdtd.protocols import AnyDevice, BlockedDevice, Kernel
from fastdtd.rules import Assignment, LayerRule
from fastdtd.schedule import Buffer, DType, Schedule, Scratch, State, Step, Tensor, Through, View, lay_out

_Root = tuple[str, int | None]  # a tensor in whose memory others lie, and of which image it is, if of one alone
ABSORBED = 3  # the saved tensor of what a neuron keeps, after those of its rule's terms
STATISTICS = 4  # of what a norm is computed with
SAVED_PER_LAYER = STATISTICS + 1


@dataclass(frozen=True)
class Saved:
    """What a layer keeps for one term in the backward pass, and the flags of images in which that absorbs some."""

    view: View
    dead: State


class Builder:
    """The steps of one schedule, in the order in which they are written down.

    Parameters
    ----------
    graph, assignment, kernels :
        The network, its rules, and the kernels of a device.
    weights : mapping of str to object
        By layer, what its family's `pack` returned.
    locations : mapping of str to Location
        Where each tensor lies.
    fused : mapping of str to ReLU or Clip
        By layer, the activation that it applies itself.
    batch, workers : int

    Attributes
    ----------
    batch : int
        Images of the steps that are written down: all, or one (`alone`).
    """

    def __init__(self, graph: Graph, assignment: Assignment, kernels: AnyDevice, weights: Mapping[str, Any],
                 locations: Mapping[str, Location], fused: Mapping[str, g.ReLU | g.Clip], batch: int, workers: int
                 ) -> None:
        self.graph, self.assignment, self.kernels, self.weights = graph, assignment, kernels, weights
        self.batch, self.workers = batch, workers
        self.layer = ""  # whose steps are written down
        self._all_images, self._image = batch, None  # type: int, int | None
        self._local: Collection[str] = ()  # roots of which each image has a buffer of its own
        self.columns = {name: column for column, name in enumerate(assignment.absorbers)}
        self._locations, self._fused = locations, fused
        self._steps: list[Step] = []
        self._buffers: list[list[int]] = []  # images, elements of each, first step, last step
        self._activations: dict[_Root, int] = {}  # root of a tensor -> its buffer
        self._factors: dict[_Root, int] = {}
        self._written: dict[str, Intervals] = {}  # of the factors, by root
        self._saved: dict[tuple[str, int, int | None], Saved] = {}
        self._dead_rows: dict[tuple[str, int], int] = {}
        self._scratch: dict[str, int] = {}
        self._states: dict[str, tuple[tuple[int, ...], DType]] = {
            "ledger": ((batch, len(assignment.absorbers)), np.float64),
            # A row for each saved tensor, so that all are cleared at once.
            "dead": ((SAVED_PER_LAYER * len(graph.layers), batch), np.uint8),
        }

    @contextlib.contextmanager
    def alone(self, image: int, local: Collection[str]) -> Iterator[None]:
        """The steps that are written down in the `with` statement are those of one image.

        local: roots of tensors that no other steps know.
        """
        written = copy.deepcopy(self._written)
        self.batch, self._image, self._local = 1, image, local
        yield
        self.batch, self._image, self._local = self._all_images, None, ()
        if image < self._all_images - 1:  # what the next one finds
            self._written = written

    # -- Tensors

    def root(self, name: str) -> str:
        """The tensor in whose memory a tensor lies."""
        return self._locations[name].root

    def activation(self, name: str) -> Tensor:
        """The values of a tensor."""
        return self._tensor(name, self._activations)

    def factor(self, name: str) -> Tensor:
        """What a tensor carries in the backward pass: the factor c, or relevance R if in `assignment.carriers`."""
        return self._tensor(name, self._factors)

    def _tensor(self, name: str, buffers: dict[_Root, int]) -> Tensor:
        location = self._locations[name]
        channels, height, width = self.graph.shapes[name]
        positions = height * width
        view = self._view(location, buffers, (location.elements // positions, height, width))
        return Tensor(view, location.offset // positions, channels)

    def _view(self, location: Location, buffers: dict[_Root, int], shape: tuple[int, ...]) -> View:
        is_local = location.root in self._local
        root = location.root, self._image if is_local else None
        if root not in buffers:
            buffers[root] = self._new_buffer(1 if is_local else self._all_images, location.elements)
        return View(buffers[root], shape, image=None if is_local else self._image)

    def _new_buffer(self, images: int, elements: int) -> int:
        self._buffers.append([images, elements, -1, -1])
        return len(self._buffers) - 1

    def touch(self, tensor: Tensor, step: int) -> None:
        """The caller reads or writes a tensor at this step."""
        self._touch(tensor.view, step)

    def _touch(self, view: View, step: int) -> None:
        buffer = self._buffers[view.buffer]
        buffer[2] = step if buffer[2] < 0 else min(buffer[2], step)
        buffer[3] = max(buffer[3], step)

    def accumulates(self, name: str) -> bool:
        """Whether what comes back to a tensor is added to what is there; what is not written yet is cleared before."""
        location = self._locations[name]
        end = location.offset + math.prod(self.graph.shapes[name])
        if self._gaps(name) == [(location.offset, end)]:
            self.mark_written(name)
            return False
        self.complete(name)
        return True

    def clear_others(self, name: str, channels: Collection[int]) -> None:
        """No relevance goes on from a tensor's other channels."""
        location, (count, height, width) = self._locations[name], self.graph.shapes[name]
        whole = self._view(location, self._factors, (location.elements, 1, 1))
        edges = [-1, *sorted(channels), count]
        for before, after in itertools.pairwise(edges):
            if after - before > 1:
                begin, end = (location.offset + at * height * width for at in (before + 1, after))
                self.step(self.kernels.clear_redistribute, self.batch, c_in=whole, begin=begin, end=end)

    def complete(self, name: str) -> None:
        """Clear what came back to no element of a tensor."""
        location = self._locations[name]
        whole = self._view(location, self._factors, (location.elements, 1, 1))
        for begin, stop in self._gaps(name):
            self.step(self.kernels.clear_redistribute, self.batch, c_in=whole, begin=begin, end=stop)
        self.mark_written(name)

    def _gaps(self, name: str) -> list[tuple[int, int]]:
        """Where in its memory a tensor is not written yet."""
        location = self._locations[name]
        end = location.offset + math.prod(self.graph.shapes[name])
        return self._written.setdefault(location.root, Intervals()).gaps(location.offset, end)

    def mark_written(self, name: str) -> None:
        location = self._locations[name]
        end = location.offset + math.prod(self.graph.shapes[name])
        self._written.setdefault(location.root, Intervals()).add(location.offset, end)

    def saved(self, layer: Layer, part: int = 0, dtype: DType = np.float32, shape: Shape | None = None) -> Saved:
        """What a layer keeps for the backward pass for the term `part` of its rule, what it absorbs (ABSORBED), or what
        it is computed with (STATISTICS). shape: for each image; None: as the layer's output."""
        key = layer.name, part, self._image
        if key not in self._saved:
            shape = shape or self.graph.shapes[layer.name]
            row = self._dead_rows.setdefault(key[:2], len(self._dead_rows))
            view = View(self._new_buffer(self.batch, math.prod(shape)), shape, dtype)
            self._saved[key] = Saved(view, State("dead", row, self._image))
        return self._saved[key]

    def scratch(self, name: str, elements: int) -> Scratch:
        """A worker's scratch array, of at least so many float32 elements."""
        self._scratch[name] = max(self._scratch.get(name, 0), elements)
        return Scratch(name)

    def state(self, name: str, shape: tuple[int, ...], dtype: DType) -> State:
        """An array that outlives the steps, with this shape for each image."""
        self._states[name] = (self._all_images, *shape), dtype
        return State(name, image=self._image)

    @property
    def ledger(self) -> State:
        return State("ledger", image=self._image)

    # -- Facts about layers

    def rule(self, layer: Layer) -> LayerRule | None:
        return self.assignment.of(layer)

    def carries_relevance(self, name: str) -> bool:
        return name in self.assignment.carriers

    @property
    def blocked_kernels(self) -> BlockedDevice:
        """The kernels, of a device whose convolutions and pools copy blocks."""
        assert self.kernels.CONVOLUTION == "blocked"
        return self.kernels

    @property
    def derives(self) -> bool:
        return self.assignment.derivative is not None

    def result(self, layer: Layer) -> tuple[str, tuple[float, float]]:
        """The tensor that a layer makes, and the bounds of the activation fused with it, infinite where none is."""
        after = self._fused.get(layer.name)
        return (layer.name, (-math.inf, math.inf)) if after is None else (after.name, clip_bounds(after))

    def bounds(self, name: str) -> tuple[Array, Array]:
        """Of each channel of a tensor, (C,) each."""
        return bounds_of(self.graph, name)

    def splits(self, blocks: int, panels: int) -> int:
        """Into how many units to cut each of so many blocks, so that all workers have the same to do."""
        splits = 1
        while splits < panels and blocks * splits % self.workers and blocks * splits < 8 * self.workers:
            splits += 1
        return splits

    # -- Steps

    def step(self, kernel: Kernel, units: int, *, condition: State | None = None,
             optional: Mapping[str, Any] | None = None, **arguments: Any) -> None:
        """Write down a call.

        The kernel takes all `arguments` and nothing else but `optional` ones: what only some devices' kernels need,
        such as a processor's scratch.
        """
        names, offered = parameters(kernel), {**arguments, **(optional or {})}
        unknown = (arguments.keys() - set(names)) | (offered.keys() - set(SIGNATURES.get(name_of(kernel), names)))
        missing = set(names) - offered.keys()
        if unknown or missing:
            raise TypeError(f"{name_of(kernel)} does not take {sorted(unknown)}, and is not given {sorted(missing)}")
        values = tuple(value.view if isinstance(value := offered[name], Tensor) else value for name in names)
        for value in values:
            if isinstance(value, View):
                self._touch(value, len(self._steps))
        self._steps.append(Step(kernel, values, units, self.layer, self.batch, condition))

    def __len__(self) -> int:
        """Steps written down so far."""
        return len(self._steps)

    def copy(self, is_forward: bool, to: tuple[str, int], source: tuple[str, int], what: str, add: bool) -> None:
        """Copy as many elements as `what` has, between offsets in two tensors' memory; of activations or factors."""
        buffers, ends = self._activations if is_forward else self._factors, []
        for name, offset in (to, source):
            location = self._locations[name]
            ends.append((self._view(location, buffers, (location.elements, 1, 1)), location.offset + offset))
        (x, x_begin), (a, a_begin) = ends
        self.step(self.kernels.copy_forward, self.batch, x=x, a=a, x_begin=x_begin, a_begin=a_begin,
                  count=math.prod(self.graph.shapes[what]), accumulate=add)

    def is_in_place(self, name: str, result: str, offset: int) -> bool:
        """Whether tensor `name` lies in the memory of `result`, at that offset."""
        inner, outer = self._locations[name], self._locations[result]
        return (inner.root, inner.offset) == (outer.root, outer.offset + offset)

    # -- All of it

    def finish(self, forward_steps: int, observed: tuple[str, ...], through: Through) -> Schedule:
        ends = {"input": self.activation(INPUT), "output": self.activation(self.graph.output),
                "start": self.factor(self.graph.output), "relevance": self.factor(INPUT)}
        alive = [i for i, (_, _, first, _) in enumerate(self._buffers) if first >= 0]
        lifetimes = [(images * elements, first, last)
                     for images, elements, first, last in (self._buffers[i] for i in alive)]
        offsets, size = lay_out(lifetimes)
        new = {old: i for i, old in enumerate(alive)}

        def renumbered(value: Any) -> Any:
            return dataclasses.replace(value, buffer=new[value.buffer]) if isinstance(value, View) else value

        steps = tuple(dataclasses.replace(step, arguments=tuple(map(renumbered, step.arguments)))
                      for step in self._steps)
        tensors = {name: Tensor(renumbered(t.view), t.channel, t.channels) for name, t in ends.items()}
        return Schedule(self.batch, self.workers, steps, forward_steps,
                        tuple(Buffer(*lifetime, offset, self._buffers[i][0])
                              for i, lifetime, offset in zip(alive, lifetimes, offsets, strict=True)), size,
                        self._scratch,
                        self._states, **tensors, starts_with_relevance=self.carries_relevance(self.graph.output),
                        ledger_layers=self.assignment.absorbers, observed=observed, through=through,
                        margin=int(self.kernels.MARGIN))


def clip_bounds(layer: g.ReLU | g.Clip | g.LeakyReLU) -> tuple[float, float]:
    """Between which values an activation's output lies."""
    match layer:
        case g.ReLU():
            return 0.0, math.inf
        case g.Clip():
            return layer.low, layer.high
    return -math.inf, math.inf


def bounds_of(graph: Graph, name: str) -> tuple[Array, Array]:
    """Of each channel of a tensor, (C,) each; zeros where it has none."""
    domain, channels = graph.domains[name], graph.shapes[name][0]
    if domain.low is None or domain.high is None:
        return (zeros(channels),) * 2
    return read_only(domain.low), read_only(domain.high)


def in_one_row(arguments: Mapping[str, Any], names: Sequence[str]) -> dict[str, View]:
    """The same tensors, all positions of a channel in one row."""
    views = {name: value.view if isinstance(value := arguments[name], Tensor) else value for name in names}
    return {
        name: dataclasses.replace(view, shape=(view.shape[0], 1, view.shape[1] * view.shape[2]))
        for name, view in views.items()
    }


def read_only(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A view that kernels cannot write. All constants are of this kind: another would compile kernels anew."""
    view = np.ascontiguousarray(array).view()
    view.flags.writeable = False
    return view


def zeros(count: int) -> Array:
    return read_only(np.zeros(count, np.float32))
