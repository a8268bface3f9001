"""Depthwise convolutions, one input and one output channel in each group, on processors. See kernels/cpu/depthwise.py.
"""

from __future__ import annotations

import math
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
_MAX_STRIDE = 2


@dataclass(frozen=True, eq=False)
class _Block:
    """Where a kernel copies its input to, `halo_rows` more rows than positions, the first one `pad_top` above position
    0."""

    rows: int
    width: int
    halo_rows: int
    pad_top: int
    planes: npt.NDArray[np.int64]  # where each begins: phases of rows, even and odd columns
    masks: npt.NDArray[np.int32]
    elements: int

    def offset(self, phase: int, parity: int, down: int, right: int) -> int:
        """From the block's begin to what a tap of position 0 reads: so many rows below a plane's first."""
        return int(self.planes[phase, parity]) + down * self.width + right


@dataclass(frozen=True, eq=False)
class _Depthwise:
    """Weights and tables of one of the kernels."""

    weights: Array
    offsets: npt.NDArray[np.int32]
    bounds: npt.NDArray[np.int32]
    block: _Block

    def _step(self, b: Builder, kernel: Any, values: int, channels: int, layer: g.Conv2d, arguments: dict[str, Any]
              ) -> None:
        """values: what is computed for each position."""
        block = self.block
        results = b.blocked_kernels.depthwise2d_results_elements(block.rows, block.width, values)
        b.step(kernel, b.batch * channels, **arguments, packed=self.weights, offsets=self.offsets,
               bounds=self.bounds, masks=block.masks, planes=block.planes, block=b.scratch("block", block.elements),
               results=b.scratch("results", results), stride_h=layer.stride[0], stride_w=layer.stride[1],
               width=block.width, block_rows=block.rows, halo_rows=block.halo_rows, pad_top=block.pad_top)


@dataclass(frozen=True, eq=False)
class Forward(_Depthwise):
    """For one sum of a layer's rule."""

    features: int

    def step(self, b: Builder, layer: g.Conv2d, arguments: dict[str, Any]) -> None:
        self._step(b, b.blocked_kernels.depthwise2d_forward, 2, len(self.weights), layer,
                   {**arguments, "features": self.features})


@dataclass(frozen=True, eq=False)
class Backward(_Depthwise):
    """For one term of a layer's rule."""

    features: int
    columns_even: int  # columns of taps that reach even inputs

    def step(self, b: Builder, layer: g.Conv2d, source: str, arguments: dict[str, Any]) -> None:
        own = {name: arguments[name] for name in _BACKWARD}
        values = len(self.weights) // len(layer.weight) * math.prod(layer.stride)
        self._step(b, b.blocked_kernels.depthwise2d_redistribute, values, len(layer.weight), layer,
                   {**own, "features": self.features, "columns_even": self.columns_even})


def suits(layer: g.Conv2d) -> bool:
    return len(layer.weight) == layer.groups and layer.weight.shape[1] == 1 and max(layer.stride) <= _MAX_STRIDE


def pack_forward(layer: g.Conv2d, term: Term, graph: Graph, kernels: BlockedDevice) -> Forward | None:
    """None where the layer or the rule's features need another algorithm."""
    if not suits(layer) or term.features not in (codes.NONNEGATIVE, codes.SIGNED):
        return None
    (_, _, in_width), (_, height, width) = graph.shapes[layer.inputs[0]], graph.shapes[layer.name]
    (step_h, step_w), (pad_top, pad_left, *_) = layer.stride, layer.padding
    # Output p reads element p * stride + tap - padding of the input: of one of its phases, element p + shift.
    down, across = ([tap * layer.dilation[axis] for tap in range(layer.weight.shape[2 + axis])] for axis in (0, 1))
    columns = [divmod(right - pad_left, step_w) for right in across]  # shift, parity
    lengths = [-(-(in_width - parity) // step_w) for parity in range(step_w)]
    block = _block([(shift, lengths[parity]) for shift, parity in columns], (height, max(width, lengths[0])),
                   layer.stride, layer.stride, pad_top, down[-1] // step_h, kernels)
    offsets = [block.offset(below % step_h, parity, below // step_h, shift)
               for shift, parity in columns for below in down]
    weight = term.w(layer.weight)[:, 0].swapaxes(1, 2).reshape(len(layer.weight), -1)
    return Forward(read_only(np.stack([weight, np.maximum(weight, 0)], 2)), _int32(offsets),
                   _int32(range(0, len(offsets) + 1, len(down))), block, term.features)


def pack_backward(layer: g.Conv2d, term: Term, graph: Graph, kernels: BlockedDevice) -> Backward | None:
    """None where the layer or the rule's features need another algorithm."""
    if not suits(layer) or term.features == codes.BOX:
        return None
    (_, in_height, in_width), (_, _, width) = graph.shapes[layer.inputs[0]], graph.shapes[layer.name]
    # Inputs p * stride + phase are read by outputs p + shift, through these taps.
    down, across = ([_taps(layer, axis, phase) for phase in range(layer.stride[axis])] for axis in (0, 1))
    columns = [column for phase in across for column in phase]
    shifts = [shift for phase in down for _, shift in phase]
    grid = -(-in_height // layer.stride[0]), max(-(-in_width // layer.stride[1]), width)
    block = _block([(shift, width) for _, shift in columns], grid, layer.stride, (1, 1), -min(shifts),
                   max(shifts) - min(shifts), kernels)
    taps: list[int] = []
    offsets: list[int] = []
    bounds = []
    for phase in down:
        begins = []
        for j, right in columns:
            begins.append(len(taps))
            taps += [i * layer.weight.shape[3] + j for i, _ in phase]
            offsets += [block.offset(0, 0, below - min(shifts), right) for _, below in phase]
        bounds.append([*begins, len(taps)])
    v = backward_weights(layer, term).reshape(len(layer.weight), -1)[:, taps]
    if term.features == codes.SIGNED:
        v = np.concatenate([np.maximum(v, 0), np.minimum(v, 0)])
    return Backward(read_only(v), _int32(offsets), _int32(bounds), block, term.features, len(across[0]))


def _taps(layer: g.Conv2d, axis: int, phase: int) -> list[tuple[int, int]]:
    """(tap, shift) of the taps that reach inputs of one phase."""
    step, found = layer.stride[axis], []
    for tap in range(layer.weight.shape[2 + axis]):
        at = phase + layer.padding[axis] - tap * layer.dilation[axis]
        if at % step == 0:
            found.append((tap, at // step))
    return found


def _block(columns: list[tuple[int, int]], grid: tuple[int, int], stride: tuple[int, int], phases: tuple[int, int],
           pad_top: int, halo_rows: int, kernels: BlockedDevice) -> _Block:
    """columns: how far to the right a column's taps read, in rows of which length. grid: rows of positions, their
    width. phases: of rows and columns, each with a plane of its own."""
    shifts = [shift for shift, _ in columns]
    rows, width = kernels.depthwise2d_block_rows(*grid, math.prod(stride)), grid[1]
    size = (rows + halo_rows) * width + kernels.DEPTHWISE2D_STEP
    begin = max(0, -min(shifts))  # taps of the first position may read before the first plane
    planes = [(at, at + (phases[1] - 1) * size)
              for at in range(begin, begin + math.prod(phases) * size, phases[1] * size)]
    period = -(-kernels.DEPTHWISE2D_STEP // width) * width  # whole rows, so that a step ends in the next period at most
    position = np.arange(period + kernels.DEPTHWISE2D_STEP) % width
    masks = [-((position + shift >= 0) & (position + shift < length)).astype(np.int32) for shift, length in columns]
    return _Block(rows, width, halo_rows, pad_top, int_table(planes, 2), _int32(masks),
                  begin + math.prod(phases) * size + max(0, *shifts))


def _int32(values: Any) -> npt.NDArray[np.int32]:
    return read_only(np.array(values, np.int32))
