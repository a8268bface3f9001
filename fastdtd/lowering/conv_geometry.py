"""Which outputs read which inputs of a convolution, and what z is where it does not depend on the input."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fastdtd import graph as g
from fastdtd.graph import Array, Graph, Shape
from fastdtd.kernels import codes
from fastdtd.lowering.blocks import int_table
from fastdtd.lowering.builder import bounds_of, read_only
from fastdtd.protocols import Device
from fastdtd.rules import Term

Grid = tuple[int, int, int, int]  # first row, first column, rows, columns
Taps = list[tuple[int, int]]


def is_pointwise(layer: g.Conv2d) -> bool:
    """Whether each output reads the one position of the input that it lies at."""
    return layer.weight.shape[2:] == (1, 1) and layer.stride == (1, 1) and layer.padding == (0, 0, 0, 0)


def backward_weights(layer: g.Conv2d, term: Term) -> Array:
    """V, or what has both features' V as its positive and negative part: (groups, outputs, inputs, taps), outputs and
    inputs of a group.
    """
    first, *second = term.v(layer.weight)
    v = first - second[0] if second else first
    return v.reshape(layer.groups, len(layer.weight) // layer.groups, layer.weight.shape[1], -1)


def phases(layer: g.Conv2d, in_shape: Shape) -> tuple[list[Grid], list[Taps]]:
    """Grids of inputs that the same taps reach, and these taps of the kernel: one phase for each remainder by the
    stride.
    """
    grids, taps = [], []
    for remainder_y in range(layer.stride[0]):
        for remainder_x in range(layer.stride[1]):
            top, rows, tap_rows = _phase(remainder_y, 0, layer, in_shape[1])
            left, columns, tap_columns = _phase(remainder_x, 1, layer, in_shape[2])
            if rows * columns:
                grids.append((top, left, rows, columns))
                taps.append([(i, j) for i in tap_rows for j in tap_columns])
    return grids, taps


def _phase(remainder: int, axis: int, layer: g.Conv2d, size: int) -> tuple[int, int, list[int]]:
    """Inputs i of one axis with (i + padding) mod stride = remainder: the first, how many, and the taps that reach
    them.
    """
    stride, padding, dilation = layer.stride[axis], layer.padding[axis], layer.dilation[axis]
    first = (remainder - padding) % stride
    count = max(0, -((first - size) // stride))
    return first, count, [tap for tap in range(layer.weight.shape[2 + axis]) if tap * dilation % stride == remainder]


def output_offset(first: int, tap: int, axis: int, layer: g.Conv2d) -> int:
    """Which output, relative to an input's index within its phase, reads that input through this tap."""
    return (first + layer.padding[axis] - tap * layer.dilation[axis]) // layer.stride[axis]


def constant_z(layer: g.Conv2d, term: Term, graph: Graph, in_one_row: bool, kernels: Device
               ) -> tuple[Array, npt.NDArray[np.int64], Array]:
    """z under ONES, z - y under BOX: (K, patterns, OW), which pattern each row has (OH,), and the smallest valid z of
    each output (K,).

    They depend on the position alone, by the taps that fall inside the input. Most rows are alike. in_one_row: all
    positions of a channel count as one row.
    """
    in_shape, (outputs, rows, columns) = graph.shapes[layer.inputs[0]], graph.shapes[layer.name]
    if term.features not in (codes.BOX, codes.ONES):
        z_min = np.full(outputs, kernels.MIN_DENOMINATOR, np.float32)
        return read_only(np.zeros((1, 1, 1), np.float32)), int_table([(0,)] * rows, 1).ravel(), read_only(z_min)
    v = term.v(layer.weight)
    if term.features == codes.ONES:
        each = v[0].sum(1, dtype=np.float64)
    else:
        bounds = [bound.astype(np.float64).reshape(layer.groups, -1) for bound in bounds_of(graph, layer.inputs[0])]
        low, high = (bound.repeat(outputs // layer.groups, 0)[..., None, None] for bound in bounds)
        each = (v[1] * high - v[0] * low).sum(1)
    inside = []
    for axis in (0, 1):
        tap, position = np.ogrid[:layer.weight.shape[2 + axis], :(rows, columns)[axis]]
        at = position * layer.stride[axis] + tap * layer.dilation[axis] - layer.padding[axis]
        inside.append(((at >= 0) & (at < in_shape[1 + axis])).astype(np.float64))
    if in_one_row:
        inside = [np.ones((1, 1)), np.ones((1, rows * columns))]
    patterns, pattern = np.unique(inside[0], axis=1, return_inverse=True)
    sums = np.einsum("kix,iy->kyx", np.einsum("kij,jx->kix", each, inside[1]), patterns)
    # What rounding leaves of a z that is a difference may not be divided by.
    rounded_off = 1e-6 * np.abs(sums).max((1, 2)) if term.features == codes.BOX else 0
    z_min = np.maximum(rounded_off, kernels.MIN_DENOMINATOR) * np.ones(outputs)
    pattern = pattern.reshape(-1).astype(np.int64)
    return read_only(sums.astype(np.float32)), read_only(pattern), read_only(z_min.astype(np.float32))
