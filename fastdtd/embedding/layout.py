"""Schedule -> Layout: where everything lies that an embedded library reads and writes, in two regions of memory.

The weights are what all calls read: packed weights and tables. The workspace is what one explanation writes: buffers,
scratch, states. An address is a region and an offset; the library adds the region's base for each call.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdtd.errors import InputError
from fastdtd.kernels.cpu import program
from fastdtd.kernels.cpu.steps import kind_of, number_slot
from fastdtd.schedule import Schedule, Scratch, State, Tensor, View

ALIGNMENT = 64
_SLOTS_OF_PACKING = 64  # of a call that packs, at most
_MOST = 2**32 - 1  # bytes of a region
Call = tuple[Callable[..., None], tuple[Any, ...]]  # a kernel and the types of its arguments


@dataclass(frozen=True, eq=False)
class Layout:
    """A schedule's steps as tables, and what they read.

    Attributes
    ----------
    calls : list of (kernel, types)
        What steps call, by number.
    steps : (S, 5) int64
        Of each step: the number of its call, its first slot, its units, and offset and bytes of the flags in the
        workspace which, all zero, say that there is nothing to do.
    slots : (A,) int32
        Arguments, as fastdtd.kernels.cpu.steps.bind lays them out, with offsets (unsigned) in place of addresses.
    regions : (A,) int8
        Of each slot: program.NUMBER, program.WEIGHTS or program.WORKSPACE.
    weights : list of bytes
        The region's content, in pieces.
    arrays : list of (array, offset)
        That the weights are made of, but for those that hold the same as another.
    weights_bytes, workspace_bytes : int
    places : dict of str to int
        Offsets in the workspace, in bytes: input, output, start, relevance, dead, ledger, slots.
    """

    calls: list[Call]
    steps: npt.NDArray[np.int64]
    slots: npt.NDArray[np.int32]
    regions: npt.NDArray[np.int8]
    weights: list[bytes]
    arrays: list[tuple[npt.NDArray[Any], int]]
    weights_bytes: int
    workspace_bytes: int
    places: dict[str, int]

    def with_scratch(self, size: int) -> Layout:
        """The same with so many bytes of the workspace before the slots, for what else is done there."""
        begin = max(self.places["slots"], aligned(size))
        return dataclasses.replace(self, places={**self.places, "slots": begin},
                                   workspace_bytes=begin + self.workspace_bytes - self.places["slots"])


class _Weights:
    """Constant arrays one after the other; of the same content only one."""

    def __init__(self, begin: int) -> None:
        self.pieces: list[bytes] = []
        self.arrays: list[tuple[npt.NDArray[Any], int]] = []
        self.size = begin
        self._places: dict[bytes, int] = {}
        self._known: dict[int, tuple[Any, int]] = {}  # by identity; the array is kept, so that no other gets its number

    def place(self, array: npt.NDArray[Any]) -> int:
        if id(array) not in self._known:
            content = np.ascontiguousarray(array).tobytes()
            key = hashlib.sha256(content).digest() + len(content).to_bytes(8, "little")
            if key not in self._places:
                self._places[key] = self.size
                self.arrays.append((array, self.size))
                self.pieces.append(content + bytes(-len(content) % ALIGNMENT))
                self.size += len(self.pieces[-1])
            self._known[id(array)] = array, self._places[key]
        return self._known[id(array)][1]


def lay_out(schedule: Schedule, header_bytes: int) -> Layout:
    """Of a schedule of one image for one worker. header_bytes: what the weights begin with."""
    assert schedule.batch == schedule.workers == 1
    weights = _Weights(header_bytes)
    at = aligned(4 * (schedule.workspace_elements + schedule.margin))
    scratch, states = {}, {}
    for name, elements in schedule.scratch.items():
        scratch[name], at = at, at + aligned(4 * (elements + schedule.margin))
    for name, (shape, dtype) in schedule.states.items():
        states[name], at = at, at + aligned(math.prod(shape) * np.dtype(dtype).itemsize)

    def state(one: State) -> tuple[int, tuple[int, ...], Any]:
        """Offset, shape, dtype."""
        shape, dtype = schedule.states[one.name]
        if one.row is None:
            return states[one.name], shape, dtype
        return states[one.name] + one.row * math.prod(shape[1:]) * np.dtype(dtype).itemsize, shape[1:], dtype

    def argument(one: Any) -> Iterator[tuple[int, int]]:
        """(value, region) of each slot."""
        match one:
            case View():
                shape: tuple[int, ...] = schedule.batch, *one.shape
                yield 4 * schedule.buffers[one.buffer].offset, program.WORKSPACE
            case Scratch():
                shape = (schedule.scratch[one.name] + schedule.margin,)
                yield scratch[one.name], program.WORKSPACE
            case State():
                offset, shape, _ = state(one)
                yield offset, program.WORKSPACE
            case np.ndarray():
                shape = one.shape
                yield weights.place(one), program.WEIGHTS
            case _:
                yield number_slot(one), program.NUMBER
                return
        yield from ((size, program.NUMBER) for size in shape)

    def kind(one: Any) -> Any:
        match one:
            case View():
                return kind_of((one.dtype, 1 + len(one.shape)))
            case Scratch():
                return kind_of((np.float32, 1))
            case State():
                _, shape, dtype = state(one)
                return kind_of((dtype, len(shape)))
        return kind_of(one)

    calls: dict[Call, int] = {}
    steps, slots, most = [], list[tuple[int, int]](), 0
    for step in schedule.steps:
        number = calls.setdefault((step.kernel, tuple(map(kind, step.arguments))), len(calls))
        flags = (0, 0)
        if step.condition:
            offset, shape, dtype = state(step.condition)
            flags = offset, math.prod(shape) * np.dtype(dtype).itemsize
        first = len(slots)
        for one in step.arguments:
            slots += argument(one)
        steps.append((number, first, step.units, *flags))
        most = max(most, len(slots) - first)
    slots_at, at = at, at + aligned(8 * max(most, _SLOTS_OF_PACKING))

    def place(tensor: Tensor) -> int:
        return 4 * (schedule.buffers[tensor.view.buffer].offset + tensor.channel * math.prod(tensor.view.shape[1:]))

    places = {name: place(getattr(schedule, name)) for name in ("input", "output", "start", "relevance")}
    places |= {"dead": states["dead"], "ledger": states["ledger"], "slots": slots_at}
    values, regions = (np.array(column, np.int64) for column in zip(*slots, strict=True))
    largest = max(weights.size, at, int(values.max()), -int(values.min()))
    if largest > _MOST or abs(values[regions == program.NUMBER]).max() >= _MOST / 2:
        raise InputError(f"weights take {weights.size / 2**30:.1f} GiB and a call's memory {at / 2**30:.1f}; an "
                         "embedded library takes at most 4 of each; required: a smaller network")
    return Layout(list(calls), np.array(steps, np.int64), values.astype(np.uint32).view(np.int32),
                  regions.astype(np.int8), weights.pieces, weights.arrays, weights.size, at, places)


def aligned(size: int) -> int:
    """The next multiple of ALIGNMENT."""
    return -(-size // ALIGNMENT) * ALIGNMENT
