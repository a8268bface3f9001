"""Depthwise convolutions, on processors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdtd import graph as g
from fastdtd.graph import Array, Graph
from fastdtd.kernels import codes
from fastdtd.lowering.blocks import int_table
from fastdtd.lowering.builder import Builder, read_only
from fastdtd.lowering.conv_geometry import backward_weights
from fastdtd.protocols import BlockedDevice
from fastdtd.rules import Term

_BACKWARD = ("c_in", "c", "ratio", "a", "c_in_channel", "c_channel", "a_channel", "relevance", "accumulate")


@dataclass(frozen=True, eq=False)
class _Tables:
    """How a kernel lays out its block, and which of a column's taps lie inside what is read."""

    width: int  # of a row of places
    block_rows: int
    halo_rows: int
    pad_top: int
    planes: npt.NDArray[np.int64]
    masks: npt.NDArray[np.int32]
    block_elements: int

    def offset(self, phase: int, parity: int, down: int, right: int) -> int:
        """From the first place of a block to what a tap of it reads: so many rows below a plane's first."""
        return int(self.planes[phase, parity]) + down * self.width + right


@dataclass(frozen=True, eq=False)
class _Depthwise:
    """Weights and tables of one of the kernels."""

    weights: Array
    offsets: npt.NDArray[np.int32]
    bounds: npt.NDArray[np.int32]
    tables: _Tables

    def _arguments(self, b: Builder, layer: g.Conv2d) -> dict[str, Any]:
        tables = self.tables
        results = b.blocked_kernels.depthwise2d_results_elements(tables.block_rows, tables.width)
        return {
            "packed": self.weights, "offsets": self.offsets, "bounds": self.bounds, "masks": tables.masks,
            "planes": tables.planes, "width": tables.width, "block_rows": tables.block_rows, "halo_rows": tables.halo_rows, "pad_top": tables.pad_top, "stride_h": layer.stride[0],
            "stride_w": layer.stride[1], "block": b.scratch("block", tables.block_elements),
            "results": b.scratch("results", results)
        }


@dataclass(frozen=True, eq=False)
class Forward(_Depthwise):
    """For one sum of a layer's rule."""

    def step(self, b: Builder, layer: g.Conv2d, arguments: dict[str, Any]) -> None:
        b.step(b.blocked_kernels.depthwise2d_forward, b.batch * len(self.weights), **arguments,
               **self._arguments(b, layer))


@dataclass(frozen=True, eq=False)
class Backward(_Depthwise):
    """For one term of a layer's rule."""

    features: int
    columns_even: int  # columns of taps that reach even inputs

    def step(self, b: Builder, layer: g.Conv2d, source: str, arguments: dict[str, Any]) -> None:
        b.step(b.blocked_kernels.depthwise2d_redistribute, b.batch * len(self.weights),
               **{name: arguments[name] for name in _BACKWARD}, features=self.features, columns_even=self.columns_even,
               **self._arguments(b, layer))


def suits(layer: g.Conv2d, graph: Graph, kernels: BlockedDevice) -> bool:
    """Whether a layer is one of those that the kernels are for, and faster by them."""
    _, height, width = graph.shapes[layer.name]
    return (len(layer.weight) == layer.groups and layer.weight.shape[1] == 1 and max(layer.stride) <= 2
            and kernels.depthwise2d_pays(layer.weight[0].size, height, width))


def pack_forward(layer: g.Conv2d, term: Term, graph: Graph, kernels: BlockedDevice) -> Forward | None:
    """None where another algorithm is faster, or the rule's features need it."""
    if term.features != codes.NONNEGATIVE or not suits(layer, graph, kernels):
        return None
    (_, _, in_width), (_, height, width) = graph.shapes[layer.inputs[0]], graph.shapes[layer.name]
    (step_h, step_w), (pad_top, pad_left, *_), kernel = layer.stride, layer.padding, layer.weight.shape[2:]
    # A tap reads the input at place * stride + tap - padding: element place + (tap - padding) // stride of a phase.
    down = [i * layer.dilation[0] for i in range(kernel[0])]
    across = [j * layer.dilation[1] - pad_left for j in range(kernel[1])]
    lengths = [-(-(in_width - parity) // step_w) for parity in range(step_w)]
    tables = _tables([(right // step_w, lengths[right % step_w]) for right in across], (height, max(width, *lengths)),
                     layer.stride, pad_top, down[-1] // step_h, kernels)
    offsets = [tables.offset(below % step_h, right % step_w, below // step_h, right // step_w)
               for right in across for below in down]
    weight = term.w(layer.weight)[:, 0].swapaxes(1, 2).reshape(len(layer.weight), -1)
    return Forward(read_only(np.stack([weight, np.maximum(weight, 0)], 2)), _int32(offsets),
                   _int32(range(0, len(offsets) + 1, len(down))), tables)


def pack_backward(layer: g.Conv2d, term: Term, graph: Graph, kernels: BlockedDevice) -> Backward | None:
    """None where another algorithm is faster, or the rule's features need it."""
    if term.features in (codes.SIGNED, codes.BOX) or not suits(layer, graph, kernels):
        return None
    (_, in_height, in_width), (_, _, width) = graph.shapes[layer.inputs[0]], graph.shapes[layer.name]
    # Place p is inputs p * stride + phase; what reads them through a tap is output p + shift.
    down, across = (
        [[(tap, (phase + before - tap * apart) // step) for tap in range(count)
          if (phase + before - tap * apart) % step == 0] for phase in range(step)]
        for step, apart, before, count in zip(layer.stride, layer.dilation, layer.padding[:2], layer.weight.shape[2:],
                                              strict=True))
    columns = [column for phase in across for column in phase]
    above = -min(shift for phase in down for _, shift in phase)
    halo = above + max(shift for phase in down for _, shift in phase)
    tables = _tables([(right, width) for _, right in columns],
                     (-(-in_height // layer.stride[0]), max(-(-in_width // layer.stride[1]), width)), (1, 1), above, halo,
                     kernels)
    taps, offsets, bounds = [], [], []
    for phase in down:
        begins = []
        for j, right in columns:
            begins.append(len(taps))
            taps += [(i, j) for i, _ in phase]
            offsets += [tables.offset(0, 0, below + above, right) for _, below in phase]
        bounds.append([*begins, len(taps)])
    v = backward_weights(layer, term).reshape(len(layer.weight), -1)
    return Backward(read_only(v[:, [i * layer.weight.shape[3] + j for i, j in taps]]), _int32(offsets), _int32(bounds), tables,
                    term.features, len(across[0]))


def _tables(columns: list[tuple[int, int]], grid: tuple[int, int], phases: tuple[int, int], pad_top: int,
            halo_rows: int, kernels: BlockedDevice) -> _Tables:
    """columns: how far to the right a column's taps read, in rows of which length. grid: rows of places, their width.
    phases: of rows and of columns, each with a plane of its own."""
    rows, width = grid
    shifts = [shift for shift, _ in columns]
    block_rows = kernels.depthwise2d_block_rows(rows, width, phases[0] * phases[1])
    size = (block_rows + halo_rows) * width + kernels.DEPTHWISE2D_STEP
    before = max(0, -min(shifts))  # taps of the first place may read before the first plane
    planes = [tuple(before + (row * phases[1] + parity % phases[1]) * size for parity in range(2))
              for row in range(phases[0])]
    period = -(-kernels.DEPTHWISE2D_STEP // width) * width  # whole rows, so that a step ends in the next one at most
    place = np.arange(period + kernels.DEPTHWISE2D_STEP) % width
    masks = [-((place + shift >= 0) & (place + shift < length)).astype(np.int32) for shift, length in columns]
    return _Tables(width, block_rows, halo_rows, pad_top, int_table(planes, 2), _int32(masks),
                   before + phases[0] * phases[1] * size + max(0, *shifts))


def _int32(values: Any) -> npt.NDArray[np.int32]:
    return read_only(np.array(values, np.int32))
