"""Convolutions as products of panels of weights with tiles of positions, on processors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdtd import graph as g
from fastdtd.graph import Array, Graph, Shape
from fastdtd.kernels import codes
from fastdtd.lowering.blocks import Blocks, blocks_of, int_table
from fastdtd.lowering.builder import Builder, in_one_row, read_only
from fastdtd.lowering.conv_geometry import backward_weights, constant_z, is_pointwise, output_offset, phases
from fastdtd.protocols import BlockedDevice
from fastdtd.rules import Term


@dataclass(frozen=True, eq=False)
class Forward:
    """Weights and tables of conv2d_forward for one sum of a layer's rule."""

    features: int
    blocks: Blocks
    weights: Array
    offsets: npt.NDArray[np.int32]
    bounds: npt.NDArray[np.int32]
    taps: npt.NDArray[np.int32]  # where each reads
    copies: int  # of channels of a group; 0: the tensor itself is read
    constant: Array
    pattern: npt.NDArray[np.int64]
    z_min: Array

    def step(self, b: Builder, layer: g.Conv2d, arguments: dict[str, Any]) -> None:
        kernels, blocks, in_place = b.blocked_kernels, self.blocks, self.copies == 0
        _, height, width = b.graph.shapes[layer.name]
        units = blocks.count(*((1, height * width) if in_place else (height, width)))
        groups, chunks, panels, *_ = self.weights.shape
        can_join = units == 1 and self.features in (codes.NONNEGATIVE, codes.SIGNED)
        joined = _joined(b, height * width, blocks.elements(self.copies)) if can_join else 1
        units *= -(-b.batch // joined)
        splits = b.splits(units, groups * panels)
        if in_place:
            arguments |= in_one_row(arguments, ("x", "ratio", "a"))
        sums = kernels.conv2d_sums_elements(len(layer.weight) // groups if chunks > 1 else 0)
        b.step(kernels.conv2d_forward, units * splits, **arguments, packed=self.weights,
               constant=self.constant, pattern=self.pattern, z_min=self.z_min, features=self.features,
               channels=layer.weight.shape[1], stride_h=layer.stride[0], stride_w=layer.stride[1], offsets=self.offsets,
               bounds=self.bounds, taps=self.taps,
               block=b.scratch("block", joined * blocks.elements(self.copies)),
               columns=b.scratch("columns", kernels.conv2d_columns_elements()), sums=b.scratch("sums", sums),
               splits=splits, joined=joined, **blocks.arguments())


@dataclass(frozen=True, eq=False)
class Backward:
    """Weights and tables of conv2d_redistribute for one term of a layer's rule."""

    features: int
    blocks: Blocks
    weights: Array
    panels: int  # of all groups
    offsets: npt.NDArray[np.int32]
    bounds: npt.NDArray[np.int32]
    taps: npt.NDArray[np.int32]
    phases: npt.NDArray[np.int64]
    units: int  # blocks in the layer's input
    copies: int  # of channels of a group; 0: the tensors themselves are read

    def step(self, b: Builder, layer: g.Conv2d, source: str, arguments: dict[str, Any]) -> None:
        kernels, blocks = b.blocked_kernels, self.blocks
        # np.unique by rows would turn Ctrl-C into a TypeError
        grids = sorted({tuple(grid) for grid in self.phases[:, 2:4].tolist()})
        can_join = self.units == len(grids) == 1 and layer.weight.shape[1] > kernels.CONV2D_FEW_ROWS
        joined = _joined(b, math.prod(grids[0]), blocks.elements(self.copies)) if can_join else 1
        units = self.units * -(-b.batch // joined)
        splits = b.splits(units, self.panels)
        if is_pointwise(layer):
            arguments |= in_one_row(arguments, ("c_in", "c", "ratio", "a"))
        sums = kernels.conv2d_redistribute_sums_elements(layer.weight.shape[1], self.features, layer.stride[1],
                                                         blocks.positions(), blocks.columns)
        b.step(kernels.conv2d_redistribute, units * splits, **arguments, packed=self.weights,
               phases=self.phases, features=self.features, groups=layer.groups, stride_h=layer.stride[0],
               stride_w=layer.stride[1], offsets=self.offsets, bounds=self.bounds, taps=self.taps, splits=splits,
               block=b.scratch("block", joined * blocks.elements(self.copies)),
               columns=b.scratch("columns", kernels.conv2d_columns_elements()), sums=b.scratch("sums", sums),
               joined=joined, **blocks.arguments())


def _joined(b: Builder, positions: int, block_floats: int) -> int:
    """Of how many images one unit has the positions: of several where one worker has them all."""
    return b.blocked_kernels.conv2d_joined(b.batch, positions, block_floats) if b.workers == 1 else 1


def pack_forward(layer: g.Conv2d, term: Term, graph: Graph, kernels: BlockedDevice) -> Forward:
    in_shape, out_shape, weight = graph.shapes[layer.inputs[0]], graph.shapes[layer.name], term.w(layer.weight)
    outputs, per_group, *kernel = weight.shape
    # For each copy of the input that the features need: its weights, and which of them add to z. Where none do, z is a
    # constant.
    copies: list[tuple[Array, int]] = {
        codes.NONNEGATIVE: [(weight, 1)],
        codes.SIGNED: [(weight, 1), (weight, -1)],
        codes.BOX: [(weight, 2)],
        codes.ONES: [(weight, 2)],
    }[term.features]
    in_place = is_pointwise(layer) and len(copies) == 1
    if in_place:
        blocks, taps = _in_place(per_group, in_shape, kernels)
    else:
        reach = [(i * layer.dilation[0] - layer.padding[0], j * layer.dilation[1] - layer.padding[1])
                 for i in range(kernel[0]) for j in range(kernel[1])]
        blocks = blocks_of(reach, layer.stride, out_shape[1:], per_group * len(copies), kernels)
        taps = blocks.offsets(per_group * len(copies))
    matrices = np.concatenate([w.reshape(layer.groups, outputs // layer.groups, -1) for w, _ in copies], 2)
    signs = np.repeat(np.array([sign for _, sign in copies]), matrices.shape[2] // len(copies))
    packed = np.empty(kernels.conv2d_packed_shape(layer.groups, outputs // layer.groups, matrices.shape[2], False),
                      np.float32)
    offsets = np.empty(packed.shape[:-1], np.int32)
    bounds = np.empty(kernels.conv2d_bounds_shape(packed.shape), np.int32)
    kernels.conv2d_pack(packed, offsets, bounds, np.ascontiguousarray(matrices), taps, signs)
    constant, pattern, z_min = constant_z(layer, term, graph, is_pointwise(layer), kernels)
    constant = constant[..., np.arange(constant.shape[2] + kernels.CONV2D_REPEATED) % constant.shape[2]]
    return Forward(term.features, blocks, read_only(packed), read_only(offsets), read_only(bounds), read_only(taps),
                   0 if in_place else per_group * len(copies), read_only(constant), pattern, z_min)


def pack_backward(layer: g.Conv2d, term: Term, in_shape: Shape, kernels: BlockedDevice) -> Backward:
    outputs, per_group, _, kernel_w = layer.weight.shape
    from_group = outputs // layer.groups
    in_place = is_pointwise(layer) and per_group > kernels.CONV2D_FEW_ROWS
    grids, taps = phases(layer, in_shape)
    if is_pointwise(layer):
        grids = [(top, left, 1, rows * columns) for top, left, rows, columns in grids]
    if in_place:
        blocks, reads_in_place = _in_place(from_group, in_shape, kernels)
        all_taps = reads_in_place[:, None]
    else:
        reads = [(output_offset(grid[0], i, 0, layer), output_offset(grid[1], j, 1, layer))
                 for grid, own in zip(grids, taps, strict=True) for i, j in own]
        grid_shape = max(grid[2] for grid in grids), max(grid[3] for grid in grids)
        blocks = blocks_of(reads, (1, 1), grid_shape, from_group, kernels)
        all_taps = blocks.offsets(from_group).reshape(from_group, -1)
    v = backward_weights(layer, term)
    side = 1 if term.features in (codes.SIGNED, codes.BOX) else 3  # W+ and -W-, or the other way; else all but zeros

    shapes = [kernels.conv2d_packed_shape(layer.groups, per_group, from_group * len(own), True) for own in taps]
    packed, offsets, bounds = (np.empty(sum(map(math.prod, sizes)), kind) for sizes, kind in (
        (shapes, np.float32), ((shape[:-1] for shape in shapes), np.int32),
        (map(kernels.conv2d_bounds_shape, shapes), np.int32)))
    reads_at, table = np.empty(all_taps.size, np.int32), []
    before = to_packed = to_offsets = to_bounds = to_taps = 0
    for grid, own, shape in zip(grids, taps, shapes, strict=True):
        table.append((*grid, len(own), to_packed, to_offsets, to_bounds, to_taps))
        index = [i * kernel_w + j for i, j in own]
        matrices = np.ascontiguousarray(v[..., index].transpose(0, 2, 1, 3).reshape(layer.groups, per_group, -1))
        bounds_shape = kernels.conv2d_bounds_shape(shape)
        own_packed, own_offsets, own_bounds = (
            to[begin:begin + math.prod(sizes)].reshape(sizes) for to, begin, sizes in (
                (packed, to_packed, shape), (offsets, to_offsets, shape[:-1]), (bounds, to_bounds, bounds_shape)))
        own_reads = reads_at[to_taps:to_taps + matrices.shape[2]]
        own_reads[:] = all_taps[:, before:before + len(own)].ravel()
        kernels.conv2d_pack(own_packed, own_offsets, own_bounds, matrices, own_reads.copy(),
                            np.full(matrices.shape[2], side))
        before += len(own)
        to_packed, to_offsets, to_bounds = (begin + one.size for begin, one in (
            (to_packed, own_packed), (to_offsets, own_offsets), (to_bounds, own_bounds)))
        to_taps += matrices.shape[2]
    rows, columns = max(grid[2] for grid in grids), max(grid[3] for grid in grids)
    return Backward(term.features, blocks, read_only(packed), layer.groups * shapes[0][2], read_only(offsets),
                    read_only(bounds), read_only(reads_at), int_table(table, 9), blocks.count(rows, columns),
                    0 if in_place else from_group)


def _in_place(channels: int, shape: Shape, kernels: BlockedDevice) -> tuple[Blocks, npt.NDArray[np.int32]]:
    """How a 1x1 convolution reads so many channels of a tensor: as one row, each position where it lies."""
    positions = shape[1] * shape[2]
    columns = kernels.conv2d_block_shape(1, positions, 0, 0, channels)[1]
    return Blocks(int_table([], 2), [], 1, columns, 0, 0), np.arange(channels, dtype=np.int32) * np.int32(positions)
