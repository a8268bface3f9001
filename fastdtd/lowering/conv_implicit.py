"""Convolutions as implicit products, which gather their input by address, on GPUs. See kernels/cuda/conv2d.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fastdtd import graph as g
from fastdtd.graph import Graph
from fastdtd.lowering.builder import Builder
from fastdtd.lowering.conv_geometry import backward_weights, constant_z, output_offset, phases
from fastdtd.protocols import ImplicitDevice
from fastdtd.rules import Term


@dataclass(frozen=True, eq=False)
class Forward:
    """Weights and tables of conv2d_forward for one sum of a layer's rule."""

    features: int
    weights: Any
    taps: Any
    constant: Any
    pattern: Any
    z_min: Any
    precision: int

    def step(self, b: Builder, layer: g.Conv2d, arguments: dict[str, Any]) -> None:
        b.step(
            b.kernels.conv2d_forward, b.batch, **arguments, packed=self.weights, taps=self.taps, constant=self.constant,
            pattern=self.pattern, z_min=self.z_min, features=self.features, channels=layer.weight.shape[1],
            stride_h=layer.stride[0], stride_w=layer.stride[1], precision=self.precision)


@dataclass(frozen=True, eq=False)
class Backward:
    """Weights and tables of conv2d_redistribute for one term of a layer's rule."""

    features: int
    weights: Any  # those of the phases one after the other, flat
    panel_rows: int
    taps: Any
    phases: tuple[tuple[int, ...], ...]
    precision: int

    def step(self, b: Builder, layer: g.Conv2d, source: str, arguments: dict[str, Any]) -> None:
        b.step(b.kernels.conv2d_redistribute, b.batch, **arguments, packed=self.weights, taps=self.taps,
               phases=self.phases, panel_rows=self.panel_rows, features=self.features, groups=layer.groups,
               stride_h=layer.stride[0], stride_w=layer.stride[1], precision=self.precision)


def pack_forward(layer: g.Conv2d, term: Term, graph: Graph, kernels: ImplicitDevice, precision: int) -> Forward:
    outputs, channels, *kernel = layer.weight.shape
    i, j = (index.ravel() for index in np.indices(kernel))
    matrices = term.w(layer.weight).reshape(layer.groups, outputs // layer.groups, channels, -1)
    panel_rows = kernels.conv2d_panel_rows(matrices.shape[1], channels * len(i), precision)
    packed = np.empty(kernels.conv2d_packed_shape(*matrices.shape[:2], channels * len(i), panel_rows), np.float32)
    kernels.conv2d_pack(packed, matrices, precision)
    taps = kernels.conv2d_taps(i * layer.dilation[0] - layer.padding[0], j * layer.dilation[1] - layer.padding[1],
                               channels, *graph.shapes[layer.inputs[0]][1:], panel_rows)
    constant, pattern, z_min = (kernels.constant(array) for array in constant_z(layer, term, graph, False, kernels))
    return Forward(term.features, kernels.constant(packed), kernels.constant(taps), constant, pattern, z_min, precision)


def pack_backward(layer: g.Conv2d, term: Term, graph: Graph, kernels: ImplicitDevice, precision: int) -> Backward:
    _, rows, columns = graph.shapes[layer.name]
    from_group, per_group = len(layer.weight) // layer.groups, layer.weight.shape[1]
    v = backward_weights(layer, term)
    panel_rows = kernels.conv2d_panel_rows(per_group, from_group * v.shape[3], precision)
    weights, taps, table = [np.zeros(0, np.float32)], [np.zeros(0, np.int64)], []
    for grid, own in zip(*phases(layer, graph.shapes[layer.inputs[0]]), strict=True):
        row_offsets, column_offsets = (
            np.array([output_offset(grid[axis], tap[axis], axis, layer) for tap in own], np.int64) for axis in (0, 1))
        matrices = v[..., [i * layer.weight.shape[3] + j for i, j in own]].swapaxes(1, 2)
        depth = from_group * len(own)
        packed = np.empty(kernels.conv2d_packed_shape(layer.groups, per_group, depth, panel_rows), np.float32)
        kernels.conv2d_pack(packed, matrices, precision)
        table.append((*grid, packed.shape[2], sum(part.size for part in weights), sum(part.size for part in taps)))
        weights.append(packed.ravel())
        taps.append(kernels.conv2d_taps(row_offsets, column_offsets, from_group, rows, columns, panel_rows))
    return Backward(term.features, kernels.constant(np.concatenate(weights)), panel_rows,
                    kernels.constant(np.concatenate(taps)), tuple(table), precision)
