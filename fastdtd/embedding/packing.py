"""How an embedded library makes packed weights of a network's own, so that its file holds those alone.

Lowering packs weights with kernels, each of which reads a matrix: some layer's weights in another order, and perhaps
only their positive or negative part. Which order that is, is found out by packing numbered weights: where the number
17 turns up in the matrix, the library has to put the weight number 17. So nothing here knows how layers are lowered;
what is no such matrix is stored as it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdtd.embedding.layout import ALIGNMENT, Call, Layout
from fastdtd.graph import Array, Conv2d, Dense, Graph
from fastdtd.kernels.cpu import program
from fastdtd.kernels.cpu.steps import kind_of, number_slot
from fastdtd.lowering import convolution
from fastdtd.rules import Assignment

# Kernels that pack, with how many arrays they write; these come first among their arguments.
_PACKERS = {"conv2d_pack": 3, "sparse2d_pack": 1, "winograd2d_pack": 1}
_MOST_NUMBERED = 1 << 24  # whole numbers that float32 holds


@dataclass(frozen=True, eq=False)
class _Packing:
    """A call of a kernel that packs."""

    kernel: Callable[..., None]
    outputs: tuple[npt.NDArray[Any], ...]
    inputs: tuple[Any, ...]

    @property
    def matrix(self) -> int:
        """Which of the inputs is made of weights."""
        return next(i for i, one in enumerate(self.inputs) if isinstance(one, np.ndarray) and one.dtype == np.float32)


class Recorder:
    """Kernels that note what is packed, and pack it unless `only_notes`."""

    def __init__(self, kernels: Any, only_notes: bool = False) -> None:
        self.packings: list[_Packing] = []
        self._kernels, self._only_notes = kernels, only_notes

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._kernels, name)
        return partial(self._note, found, _PACKERS[name]) if name in _PACKERS else found

    def _note(self, kernel: Callable[..., None], outputs: int, *arguments: Any) -> None:
        if not self._only_notes:
            kernel(*arguments)
        self.packings.append(_Packing(kernel, arguments[:outputs], arguments[outputs:]))


@dataclass(frozen=True, eq=False)
class Compact:
    """A compact weights file, and how the library makes the packed weights of it.

    Attributes
    ----------
    content : list of bytes
        What follows the file's header, in pieces.
    size : int
        Of the file, in bytes.
    operations : (O, program.OPERATION) int64
    calls : list of (kernel, types)
        That pack; their numbers follow those of the layout's.
    slots, regions : (A,) int32, int8
        Of their arguments.
    scratch_bytes : int
        Of the workspace, for matrices.
    """

    content: list[bytes]
    size: int
    operations: npt.NDArray[np.int64]
    calls: list[Call]
    slots: npt.NDArray[np.int32]
    regions: npt.NDArray[np.int8]
    scratch_bytes: int


class _Content:
    def __init__(self, begin: int) -> None:
        self.pieces: list[bytes] = []
        self.size = begin

    def add(self, content: bytes) -> int:
        at = self.size
        self.pieces.append(content + bytes(-len(content) % ALIGNMENT))
        self.size += len(self.pieces[-1])
        return at


def compact(graph: Graph, assignment: Assignment, kernels: Any, packings: Sequence[_Packing], layout: Layout,
            header_bytes: int, half: bool) -> Compact:
    """Of a lowered network (`graph` is the one that was lowered), whose packing was recorded.

    half: the network's weights are stored as float16, which they can be without loss.
    """
    content = _Content(header_bytes)
    raw: dict[str, int] = {}  # where a layer's weights lie in the file
    operations: list[list[int]] = []
    calls: dict[Call, int] = {}
    slots: list[tuple[int, int]] = []
    scratch = 0

    def raw_at(layer: Conv2d | Dense) -> int:
        if layer.name not in raw:
            weight = layer.weight.astype(np.float16 if half else np.float32)
            raw[layer.name] = content.add(np.ascontiguousarray(weight).tobytes())
        return raw[layer.name]

    def slots_of(argument: Any, region: int, at: int) -> list[tuple[int, int]]:
        if not isinstance(argument, np.ndarray):
            return [(number_slot(argument), program.NUMBER)]
        return [(at, region), *((size, program.NUMBER) for size in argument.shape)]

    packed_bytes = np.zeros(len(layout.arrays), np.int64)
    for layer, packing, positive, negative in _with_numbers(graph, assignment, kernels, packings):
        matrix = packing.matrix
        gathered = _gather(layer, packing.inputs[matrix], positive, negative)
        places = [_place(layout, output) for output in packing.outputs]
        if gathered is None or any(place is None for place in places):
            continue
        scratch = max(scratch, packing.inputs[matrix].nbytes)
        operations.append(_operation(program.GATHER, 0, raw_at(layer), packing.inputs[matrix].size, *gathered))
        first = len(slots)
        for output, place in zip(packing.outputs, places, strict=True):
            assert place is not None
            packed_bytes[place[0]] += output.nbytes
            slots += slots_of(output, program.WEIGHTS, place[1])
        for i, argument in enumerate(packing.inputs):
            if i == matrix:
                slots += slots_of(argument, program.WORKSPACE, 0)
            else:
                at = content.add(np.ascontiguousarray(argument).tobytes()) if isinstance(argument, np.ndarray) else 0
                slots += slots_of(argument, program.COMPACT, at)
        call = packing.kernel, tuple(map(kind_of, (*packing.outputs, *packing.inputs)))
        number = len(layout.calls) + calls.setdefault(call, len(calls))
        operations.append(_operation(program.PACK, 0, number, len(slots) - first, first))
    weights = {one.weight.tobytes(): one for one in graph if isinstance(one, (Conv2d, Dense))}
    for (array, to), done in zip(layout.arrays, packed_bytes, strict=True):
        if done == array.nbytes:
            continue
        plain = np.ascontiguousarray(array).tobytes()
        if array.dtype == np.float32 and plain in weights:
            operations.append(_operation(program.WIDEN, to, raw_at(weights[plain]), array.size))
        else:
            operations.append(_operation(program.COPY, to, content.add(plain), len(plain)))
    values = np.array([value for value, _ in slots], np.int64).reshape(-1)
    return Compact(content.pieces, content.size, np.array(operations, np.int64), list(calls),
                   values.astype(np.uint32).view(np.int32), np.array([region for _, region in slots], np.int8), scratch)


def _operation(*values: int) -> list[int]:
    return [*values, *[0] * (program.OPERATION - len(values))]


def _place(layout: Layout, array: npt.NDArray[Any]) -> tuple[int, int] | None:
    """Which of the layout's arrays holds another one's memory, and where in the weights that is."""
    address = array.ctypes.data
    for i, (owner, place) in enumerate(layout.arrays):
        offset = address - owner.ctypes.data
        if 0 <= offset <= owner.nbytes - array.nbytes:
            return i, place + offset
    return None


# ---- Which weight is where -------------------------------------------------------------------------------------------


def _with_numbers(graph: Graph, assignment: Assignment, kernels: Any, packings: Sequence[_Packing]
                  ) -> Iterator[tuple[Conv2d, _Packing, Array, Array]]:
    """Each packing with its layer, and with the matrix that it would read of weights 1, 2, 3, ... and of -1, -2, -3,
    .... Lowering goes through layers in order."""
    rest = iter(packings)
    for layer in graph:
        if not isinstance(layer, Conv2d) or assignment.of(layer) is None:
            continue
        numbers = np.arange(1, layer.weight.size + 1, dtype=np.float32).reshape(layer.weight.shape)
        matrices = []
        for weight in (numbers, -numbers):
            recorder: Any = Recorder(kernels, only_notes=True)
            convolution.pack(dataclasses.replace(layer, weight=weight), graph, assignment, recorder, 0)
            matrices.append([packing.inputs[packing.matrix] for packing in recorder.packings])
        for positive, negative in zip(*matrices, strict=True):
            yield layer, next(rest), positive, negative


def _gather(layer: Conv2d, wanted: Array, positive: Array, negative: Array) -> list[int] | None:
    """How the matrix `wanted` follows from a layer's weights: signs and nested strides, as program.GATHER has them.

    positive, negative: what became of weights 1, 2, 3, ... and -1, -2, -3, ....
    """
    if not wanted.size:  # inputs that no tap reaches
        return [0, 0, 0, *[1] * program.LOOPS, *[0] * program.LOOPS]
    positive, negative = positive.ravel(), negative.ravel()
    either = np.where(positive != 0, np.abs(positive), np.abs(negative))
    if layer.weight.size >= _MOST_NUMBERED or not either.all() or (either != np.floor(either)).any():
        return None
    index = either.astype(np.int64) - 1
    if index.max() >= layer.weight.size:
        return None
    signs = [np.unique(np.divide(part, either)) for part in (positive, -negative)]
    if any(len(sign) != 1 or sign[0] not in (-1, 0, 1) for sign in signs):
        return None
    loops = _loops(index)
    if loops is None or len(loops) > program.LOOPS:
        return None
    weight = layer.weight.ravel()[index]
    by_sign = {1: weight, -1: -weight, 0: np.zeros_like(weight)}
    made = np.where(weight > 0, by_sign[int(signs[0][0])], by_sign[int(signs[1][0])])
    if not np.array_equal(made.view(np.int32), np.ravel(wanted).view(np.int32)):  # the sign of a zero, too
        return None
    sizes, strides = ([loop[i] for loop in loops] + [1 - i] * (program.LOOPS - len(loops)) for i in (0, 1))
    return [int(signs[0][0]), int(signs[1][0]), int(index[0]), *sizes, *strides]


def _loops(index: npt.NDArray[np.int64]) -> list[tuple[int, int]] | None:
    """(size, stride) of nested loops, the innermost first, that run through these numbers; None where there are none
    of few loops."""
    loops = []
    while len(index) > 1:
        stride = int(index[1] - index[0])
        same = np.flatnonzero(np.diff(index) != stride)
        longest = int(same[0]) + 1 if len(same) else len(index)
        for size in range(longest, 1, -1):
            if len(index) % size == 0:
                blocks = index.reshape(-1, size)
                if np.array_equal(blocks - blocks[:, :1], np.broadcast_to(stride * np.arange(size), blocks.shape)):
                    break
        else:
            return None
        loops.append((size, stride))
        index = np.ascontiguousarray(index[::size])
    return loops
