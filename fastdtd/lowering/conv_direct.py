"""Convolutions as products over copied blocks of the input, on processors."""

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
from fastdtd.lowering.builder import Builder, read_only
from fastdtd.lowering.conv_geometry import backward_weights, constant_z, is_pointwise, output_offset, phases
from fastdtd.protocols import BlockedDevice
from fastdtd.rules import Term
from fastdtd.schedule import Tensor, View


@dataclass(frozen=True, eq=False)
class Forward:
    """Weights and tables of conv2d_forward for one sum of a layer's rule."""

    features: int
    blocks: Blocks
    weights: Array
    offsets: npt.NDArray[np.int32]
    bounds: npt.NDArray[np.int32]
    copies: int  # of channels of a group; 0: the tensor itself is read
    constant: Array
    pattern: npt.NDArray[np.int64]
    z_min: Array

    def step(self, b: Builder, layer: g.Conv2d, arguments: dict[str, Any]) -> None:
        kernels, blocks, in_place = b.blocked_kernels, self.blocks, self.copies == 0
        _, height, width = b.graph.shapes[layer.name]
        units = blocks.count(*((1, height * width) if in_place else (height, width)))
        splits = b.splits(b.batch * units, self.weights.shape[0] * self.weights.shape[1])
        if in_place:
            arguments |= _in_one_row(arguments, ("x", "ratio", "a"))
        b.step(kernels.conv2d_forward, b.batch * units * splits, **arguments, packed=self.weights,
               constant=self.constant, pattern=self.pattern, z_min=self.z_min, features=self.features,
               channels=layer.weight.shape[1], stride_h=layer.stride[0], stride_w=layer.stride[1], offsets=self.offsets,
               bounds=self.bounds, block=b.scratch("block", blocks.elements(self.copies)),
               results=b.scratch("results", kernels.conv2d_results_elements(blocks.positions())), splits=splits,
               **blocks.arguments())


@dataclass(frozen=True, eq=False)
class Backward:
    """Weights and tables of conv2d_redistribute for one term of a layer's rule."""

    features: int
    blocks: Blocks
    weights: Array
    panels: int  # of all groups
    offsets: npt.NDArray[np.int32]
    bounds: npt.NDArray[np.int32]
    phases: npt.NDArray[np.int64]
    units: int  # blocks in the layer's input
    copies: int  # of channels of a group

    def step(self, b: Builder, layer: g.Conv2d, source: str, arguments: dict[str, Any]) -> None:
        kernels, blocks = b.blocked_kernels, self.blocks
        splits = b.splits(b.batch * self.units, self.panels)
        if is_pointwise(layer):
            arguments |= _in_one_row(arguments, ("c_in", "c", "ratio", "a"))
        results = kernels.conv2d_redistribute_results_elements(blocks.positions(), blocks.columns, layer.stride[1])
        b.step(kernels.conv2d_redistribute, b.batch * self.units * splits, **arguments, packed=self.weights,
               phases=self.phases, features=self.features, groups=layer.groups, stride_h=layer.stride[0],
               stride_w=layer.stride[1], offsets=self.offsets, bounds=self.bounds, splits=splits,
               block=b.scratch("block", blocks.elements(self.copies)), results=b.scratch("results", results),
               **blocks.arguments())


def pack_forward(layer: g.Conv2d, term: Term, graph: Graph, kernels: BlockedDevice) -> Forward:
    in_shape, out_shape, weight = graph.shapes[layer.inputs[0]], graph.shapes[layer.name], term.w(layer.weight)
    outputs, per_group, *kernel = weight.shape
    # For each copy of the input that the features need: its weights, and which of them add to z. Where none do, z is a
    # constant.
    copies: list[tuple[Array, int]] = {
        codes.NONNEGATIVE: [(weight, 1)],
        codes.SIGNED: [(weight, 1), (weight, -1)],
        codes.BOX: [(weight, 0)],
        codes.ONES: [(weight, 0)],
    }[term.features]
    in_place = is_pointwise(layer) and len(copies) == 1
    if in_place:
        columns = kernels.conv2d_block_shape(1, out_shape[1] * out_shape[2], 0, 0, per_group)[1]
        blocks = Blocks(int_table([], 2), [], 1, columns, 0, 0)
        offsets = np.arange(per_group, dtype=np.int32) * np.int32(in_shape[1] * in_shape[2])
    else:
        reach = [(i * layer.dilation[0] - layer.padding[0], j * layer.dilation[1] - layer.padding[1])
                 for i in range(kernel[0]) for j in range(kernel[1])]
        blocks = blocks_of(reach, layer.stride, out_shape[1:], per_group * len(copies), kernels)
        offsets = blocks.offsets(per_group * len(copies))
    matrices = np.concatenate([w.reshape(layer.groups, outputs // layer.groups, -1) for w, _ in copies], 2)
    signs = np.repeat(np.array([sign for _, sign in copies]), matrices.shape[2] // len(copies))
    packed = np.empty(kernels.conv2d_split_shape(*matrices.shape), np.float32)
    packed_offsets = np.empty(packed.shape[:3], np.int32)
    bounds = np.empty((*packed.shape[:2], kernels.conv2d_split_bounds(packed.shape[3])), np.int32)
    kernels.conv2d_pack_split(packed, packed_offsets, bounds, np.ascontiguousarray(matrices), offsets, signs)
    constant, pattern, z_min = constant_z(layer, term, graph, is_pointwise(layer), kernels)
    return Forward(term.features, blocks, read_only(packed), read_only(packed_offsets), read_only(bounds),
                   0 if in_place else per_group * len(copies), constant, pattern, z_min)


def pack_backward(layer: g.Conv2d, term: Term, in_shape: Shape, kernels: BlockedDevice) -> Backward:
    outputs, per_group, _, kernel_w = layer.weight.shape
    from_group = outputs // layer.groups
    grids, taps = phases(layer, in_shape)
    if is_pointwise(layer):
        grids = [(top, left, 1, rows * columns) for top, left, rows, columns in grids]
    reads = [(output_offset(grid[0], i, 0, layer), output_offset(grid[1], j, 1, layer))
             for grid, own in zip(grids, taps, strict=True) for i, j in own]
    rows, columns = max(grid[2] for grid in grids), max(grid[3] for grid in grids)
    blocks = blocks_of(reads, (1, 1), (rows, columns), from_group, kernels)
    all_offsets = blocks.offsets(from_group).reshape(from_group, -1)
    is_split = term.features in (codes.SIGNED, codes.BOX)  # W+ and -W-, or the other way
    v = backward_weights(layer, term)
    shape_of = kernels.conv2d_split_shape if is_split else kernels.conv2d_packed_shape

    shapes = [shape_of(layer.groups, per_group, from_group * len(own)) for own in taps]
    weights = np.empty(sum(map(math.prod, shapes)), np.float32)
    lines = sum(math.prod(shape[:3]) for shape in shapes) if is_split else from_group * sum(map(len, taps))
    offsets = np.empty(lines, np.int32)
    panels = shapes[0][0] * shapes[0][1]
    classes = kernels.conv2d_split_bounds(shapes[0][3]) if is_split else 0
    bounds = np.empty((len(taps), panels * classes), np.int32)
    table: list[tuple[int, ...]] = []
    before, at, line = 0, 0, 0
    for phase, (grid, own, shape) in enumerate(zip(grids, taps, shapes, strict=True)):
        table.append((*grid, len(own), at, line, phase * bounds.shape[1]))
        index = [i * kernel_w + j for i, j in own]
        matrices = np.ascontiguousarray(v[..., index].transpose(0, 2, 1, 3).reshape(layer.groups, per_group, -1))
        reads_at = np.ascontiguousarray(all_offsets[:, before:before + len(own)].ravel())
        before += len(own)
        packed = weights[at:at + math.prod(shape)].reshape(shape)
        at += packed.size
        if is_split:
            count = math.prod(shape[:3])
            kernels.conv2d_pack_split(packed, offsets[line:line + count].reshape(shape[:3]),
                                      bounds[phase].reshape(*shape[:2], classes), matrices, reads_at,
                                      np.ones(len(reads_at), np.int64))
        else:
            count = len(reads_at)
            kernels.conv2d_pack(packed, matrices)
            offsets[line:line + count] = reads_at
        line += count
    return Backward(term.features, blocks, read_only(weights), panels, read_only(offsets), read_only(bounds.ravel()),
                    int_table(table, 8), blocks.count(rows, columns), from_group)


def _in_one_row(arguments: dict[str, Any], names: tuple[str, ...]) -> dict[str, View]:
    """The same tensors, all positions of a channel in one row."""
    views = {name: value.view if isinstance(value := arguments[name], Tensor) else value for name in names}
    return {
        name: View(view.buffer, (view.shape[0], 1, view.shape[1] * view.shape[2]), view.dtype)
        for name, view in views.items()
    }
