"""The steps of one explanation as data: which kernel runs, on which memory, for how long each buffer is needed.

A schedule holds constants (weights, tables) but no activations and no addresses. Whoever has one can run it (plan.py),
measure it (benchmarks/) or compile it; its size is known without allocating anything.
"""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_ALIGNMENT = 16  # floats: one cache line
_MAX_BUFFERS_BY_SIZE = 2048  # of more, the time to place them by size, which is quadratic, would be felt

DType = type[np.generic]
Through = tuple[tuple[str, tuple[int, ...]], ...]  # layers, and channels of what they make


@dataclass(frozen=True, slots=True)
class Buffer:
    """Memory in the workspace that is alive from step `first` to step `last`; `offset` and `elements` are in float32
    elements.

    The caller's own writing and reading count as steps: the input is alive from step 0, the result until after the
    last.
    """

    elements: int  # of all its images
    first: int
    last: int
    offset: int
    images: int


@dataclass(frozen=True, slots=True)
class View:
    """An argument: a buffer's memory as an array ``(images, *shape)``. Its views may differ in shape and type."""

    buffer: int  # index into Schedule.buffers
    shape: tuple[int, ...]
    dtype: DType = np.float32
    image: int | None = None  # this one alone, not all of the buffer


@dataclass(frozen=True, slots=True)
class Scratch:
    """An argument: a worker's own scratch memory of that name, one array for all steps that name it."""

    name: str


@dataclass(frozen=True, slots=True)
class State:
    """An argument: an array beside the workspace that outlives the steps, or one row of it; of that, all images or
    one.
    """

    name: str
    row: int | None = None
    image: int | None = None


@dataclass(frozen=True, slots=True)
class Tensor:
    """Where a tensor lies: from channel `channel` on, of a view. Tensors of one concatenation share a view's buffer."""

    view: View
    channel: int
    channels: int


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One kernel call: ``kernel(*arguments, first unit, last unit)``, its units divided among the workers.

    arguments : View, Scratch, State, a constant array, int, float or bool
    layer : which layer it belongs to
    images : how many it is about
    condition : the step has nothing to do where this is all zero; None: it always has
    """

    kernel: Callable[..., None]
    arguments: tuple[Any, ...]
    units: int
    layer: str
    images: int
    condition: State | None = None

    @property
    def name(self) -> str:
        """The kernel's."""
        return str(getattr(self.kernel, "py_func", self.kernel).__name__)


@dataclass(frozen=True, eq=False)
class Schedule:
    """All steps of an explanation of `batch` images by `workers` threads.

    Attributes
    ----------
    steps : tuple of Step
        The first `forward_steps` of them compute the scores, the others are the backward pass.
    buffers : tuple of Buffer
        Of the workspace, which has `workspace_elements` float32 elements.
    scratch : mapping of str to int
        float32 elements of each worker's scratch arrays.
    states : mapping of str to (shape, dtype)
        Arrays beside the workspace: "ledger" (batch, layers), "dead" (rows, batch) with a flag for each image in which
        something is absorbed; by "observed/NAME" the relevance of each tensor of `observed`; by "came/NAME" what came
        to each layer of `through`.
    input, output, start, relevance : Tensor
        What the caller writes before the forward pass, reads after it, writes before the backward pass and reads after
        it.
    starts_with_relevance : bool
        Whether `start` takes relevance R, or the factor c of ``R = |score| c``.
    ledger_layers : tuple of str
        The layer of each column of the ledger.
    through : tuple of (str, tuple of int)
        Layers, and those channels of what they make through which relevance goes on; in others it ends.
    """

    batch: int
    workers: int
    steps: tuple[Step, ...]
    forward_steps: int
    buffers: tuple[Buffer, ...]
    workspace_elements: int
    scratch: Mapping[str, int]
    states: Mapping[str, tuple[tuple[int, ...], DType]]
    input: Tensor
    output: Tensor
    start: Tensor
    relevance: Tensor
    starts_with_relevance: bool
    ledger_layers: tuple[str, ...]
    observed: tuple[str, ...]
    through: Through
    margin: int  # float32 elements that the device wants after each array

    @functools.cached_property
    def nbytes(self) -> int:
        """Bytes that a plan of this schedule allocates: workspace, every worker's scratch, states."""
        scratch = sum(elements + self.margin for elements in self.scratch.values())
        states = sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in self.states.values())
        return 4 * (self.workspace_elements + self.margin + self.workers * scratch) + states

    def read_by_backward(self) -> Iterator[Buffer]:
        """Buffers that the forward pass fills and the backward pass reads: ratios, winners, some activations."""
        return (buffer for buffer in self.buffers if buffer.first < self.forward_steps < buffer.last)


# ---- Laying buffers out ----------------------------------------------------------------------------------------------


def lay_out(lifetimes: Sequence[tuple[int, int, int]]) -> tuple[list[int], int]:
    """The offset of each buffer of (elements, first step, last step), so that those alive together do not overlap, and
    the size of all.

    The large ones are placed first, each as low as it fits; that is within a few percent of what is alive at a time.
    """
    sizes = np.array([-(-elements // _ALIGNMENT) * _ALIGNMENT for elements, _, _ in lifetimes], np.int64)
    if len(lifetimes) > _MAX_BUFFERS_BY_SIZE:
        return _in_order_of_time(sizes.tolist(), lifetimes)
    offsets = [0] * len(lifetimes)
    begins, ends, firsts, lasts = np.zeros((4, len(lifetimes)), np.int64)  # of the buffers placed so far, by offset
    for placed, i in enumerate(sorted(range(len(lifetimes)), key=lambda i: -lifetimes[i][0])):
        _, first, last = lifetimes[i]
        alive = (firsts[:placed] <= last) & (first <= lasts[:placed])
        own_begins, free_from = begins[:placed][alive], np.maximum.accumulate(np.append(0, ends[:placed][alive]))
        fits = np.flatnonzero(free_from[:-1] + sizes[i] <= own_begins)
        offset = int(free_from[fits[0]] if len(fits) else free_from[-1])
        offsets[i] = offset
        at = int(np.searchsorted(begins[:placed], offset))
        for column, value in ((begins, offset), (ends, offset + sizes[i]), (firsts, first), (lasts, last)):
            column[at + 1:placed + 1] = column[at:placed]
            column[at] = value
    return offsets, int(ends.max(initial=0))


def _in_order_of_time(sizes: list[int], lifetimes: Sequence[tuple[int, int, int]]) -> tuple[list[int], int]:
    """As an allocator would, step by step, each buffer in the smallest hole: n log n, some percent more memory."""
    holes: list[tuple[int, int]] = []
    offsets, end, size = [0] * len(sizes), 0, 0
    ending = sorted(range(len(sizes)), key=lambda i: lifetimes[i][2], reverse=True)
    for i in sorted(range(len(sizes)), key=lambda i: lifetimes[i][1]):
        while lifetimes[ending[-1]][2] < lifetimes[i][1]:
            freed = ending.pop()
            end = _free(holes, offsets[freed], offsets[freed] + sizes[freed], end)
        fitting = [hole for hole in holes if hole[1] - hole[0] >= sizes[i]]
        if fitting:
            begin, stop = min(fitting, key=lambda hole: hole[1] - hole[0])
            holes.remove((begin, stop))
            if begin + sizes[i] < stop:
                bisect.insort(holes, (begin + sizes[i], stop))
        else:
            begin = end
            end += sizes[i]
        offsets[i] = begin
        size = max(size, end)
    return offsets, size


def _free(holes: list[tuple[int, int]], begin: int, stop: int, end: int) -> int:
    """Add begin..stop to the holes, joined with its neighbours; returns the new end of what is used."""
    at = bisect.bisect(holes, (begin, stop))
    if at < len(holes) and holes[at][0] == stop:
        stop = holes.pop(at)[1]
    if at and holes[at - 1][1] == begin:
        begin = holes.pop(at - 1)[0]
        at -= 1
    if stop == end:
        return begin
    holes.insert(at, (begin, stop))
    return end
