"""Weights as kernels read them: packed once for each model and rules, and shared by all plans.

Here it is decided by which algorithm a convolution goes, forward and back, from its shape and rule alone, so that the same picture gives
the same bits in any batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdtd import graph as g
from fastdtd.graph import Array, Graph, Shape
from fastdtd.kernels import codes
from fastdtd.rules import Assigned, Term, relevance_carriers


def pack(graph: Graph, rules: dict[str, Assigned], kernels: ModuleType, precision: int = codes.TF32) -> dict[str, Any]:
    """For each convolution its PackedConv2d, for each dense layer its PackedDense; for each rearrangement (starts, readers): number i of
    its input is read by outputs readers[starts[i]:starts[i + 1]], none by those before.

    precision: of products on tensor cores (fastdtd.kernels.codes), where there are any.
    """
    carriers = relevance_carriers(graph, rules)
    packed: dict[str, Any] = {}
    for layer in graph:
        if isinstance(layer, g.Conv2d):
            packed[layer.name] = _pack_conv2d(layer, graph, rules[layer.name], layer.inputs[0] in carriers, kernels, precision)
        elif isinstance(layer, g.Dense):
            weight = kernels.constant(read_only(layer.weight))
            packed[layer.name] = PackedDense(weight, [_pack_dense(layer, term, weight, kernels) for term in rules[layer.name].sums])
        elif isinstance(layer, g.Rearrange):
            index, inputs = layer.index.ravel(), int(np.prod(graph.shapes[layer.inputs[0]]))
            starts = np.searchsorted(np.sort(index), np.arange(inputs + 1))
            readers = np.argsort(index, kind="stable")
            packed[layer.name] = read_only(starts.astype(np.int32)), read_only(readers.astype(np.int32))
    return packed


def read_only(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A view that kernels cannot write; all constants are of this kind, for Numba compiles a kernel anew for another."""
    view = np.ascontiguousarray(array).view()
    view.flags.writeable = False
    return view


# ---- What a convolution's kernels read besides tensors -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Blocks:
    """How one convolution (a direction of a layer, a phase of its way back) reads its input: see kernels/cpu/conv2d.py.

    planes (P, 2) are where each plane begins, `shifts` holds for each tap the plane that it reads and how far down and right of a place.
    A block has `rows` x `columns` places, its planes more_rows and more_columns beyond that.
    """

    planes: npt.NDArray[np.int64]
    shifts: list[tuple[int, int, int]]
    rows: int
    columns: int
    more_rows: int
    more_columns: int

    def offsets(self, copies: int) -> npt.NDArray[np.int32]:
        """Of each row of the product, (copies, taps) one behind the other, in a scratch array of that many copies of all planes."""
        width = self.columns + self.more_columns
        size = (self.rows + self.more_rows) * width
        taps = np.array([plane * size + down * width + right for plane, down, right in self.shifts], np.int64)
        return (np.arange(copies)[:, None] * (len(self.planes) * size) + taps).ravel().astype(np.int32)

    def elements(self, copies: int) -> int:
        return copies * len(self.planes) * (self.rows + self.more_rows) * (self.columns + self.more_columns)

    def places(self) -> int:
        """Of a block, counted along the rows of its planes."""
        return self.rows * (self.columns + self.more_columns)


@dataclass(frozen=True, eq=False)
class DirectForward:
    """For conv2d_forward."""

    features: int
    blocks: Blocks
    weights: Array
    offsets: npt.NDArray[np.int32]
    bounds: npt.NDArray[np.int32]
    copies: int  # of channels of a group; 0: the tensor itself is read
    constant: Array
    pattern: npt.NDArray[np.int64]
    least: Array

    def units(self, rows: int, columns: int) -> int:
        """Blocks in the layer's output."""
        return -(-rows // self.blocks.rows) * -(-columns // self.blocks.columns)


@dataclass(frozen=True, eq=False)
class DirectBack:
    """For conv2d_redistribute."""

    features: int
    blocks: Blocks
    weights: Array
    panels: int  # of all groups
    offsets: npt.NDArray[np.int32]
    bounds: npt.NDArray[np.int32]
    phases: npt.NDArray[np.int64]
    units: int  # blocks in the layer's input
    copies: int  # of channels of a group


@dataclass(frozen=True, eq=False)
class Winograd:
    """For winograd2d_forward (two products, of W and of V) and winograd2d_redistribute (one)."""

    source: Array | None  # forward, the weights as they are
    weights: Array  # (products, groups * 36, panels, channels, rows)
    channels: int  # of a group that are summed over
    groups: int
    products: int
    padding: tuple[int, int]  # top, left

    def offsets(self, block: int) -> npt.NDArray[np.int32]:
        return read_only(np.arange(self.channels, dtype=np.int32) * np.int32(block))


@dataclass(frozen=True, eq=False)
class ImplicitForward:
    """For conv2d_forward of a device that gathers by address: see kernels/cuda/conv2d.py."""

    features: int
    weights: Any
    taps: Any
    constant: Any
    pattern: Any
    least: Any
    precision: int


@dataclass(frozen=True, eq=False)
class ImplicitBack:
    """For conv2d_redistribute of such a device."""

    features: int
    weights: Any  # the phases' one behind the other, flat
    panel_rows: int
    taps: Any
    phases: tuple[tuple[int, ...], ...]
    precision: int


@dataclass(frozen=True, eq=False)
class PackedConv2d:
    """Of each of the rule's sums, and of each of its terms."""

    forward: list[DirectForward | ImplicitForward | Winograd]
    back: list[DirectBack | ImplicitBack | Winograd | None]  # None: a direction, whose kernels read the weights themselves


@dataclass(frozen=True, eq=False)
class PackedDense:
    """The weights, and of each of the rule's sums its weights and z where that depends on nothing else."""

    weight: Any
    sums: list[tuple[Any, Array]]


# ---- Packing -----------------------------------------------------------------------------------------------------------------------------


def _pack_dense(layer: g.Dense, term: Term, weight: Any, kernels: ModuleType) -> tuple[Any, Array]:
    sums = np.zeros(len(layer.weight))
    if term.features == codes.ONES:
        sums = term.share_weights(layer.weight)[0].sum(1, dtype=np.float64)
    signed = kernels.constant(read_only(_signed(layer.weight, term))) if term.weights == "negative" else weight
    return signed, read_only(sums.astype(np.float32))


def _signed(weight: Array, term: Term) -> Array:
    """What to sum over for a term: z of -W under the positive part is what the negative part of W has."""
    return -weight if term.weights == "negative" else weight


def _pack_conv2d(layer: g.Conv2d, graph: Graph, rule: Assigned, carries: bool, kernels: ModuleType, precision: int) -> PackedConv2d:
    if kernels.CONVOLUTION == "implicit":
        return PackedConv2d([_pack_implicit(layer, graph, term, kernels, precision) for term in rule.sums],
                            [_pack_implicit_back(layer, graph, term, kernels, precision) for term in rule.terms])
    return PackedConv2d([_pack_sum(layer, graph, term, kernels) for term in rule.sums],
                        [_pack_term(layer, graph, term, carries, kernels) for term in rule.terms])


def _suits_winograd(layer: g.Conv2d, term: Term) -> bool:
    return (layer.weight.shape[2:] == (3, 3) and layer.stride == layer.dilation == (1, 1)
            and term.features == codes.NONNEGATIVE)


def _pack_sum(layer: g.Conv2d, graph: Graph, term: Term, kernels: ModuleType) -> DirectForward | Winograd:
    out_shape, outputs = graph.shapes[layer.name], len(layer.weight) // layer.groups
    weight = _signed(layer.weight, term)
    if _suits_winograd(layer, term) and kernels.winograd2d_pays(layer.weight.shape[1], outputs, *out_shape[1:]):
        return _pack_winograd(weight, (weight, np.maximum(weight, 0)), layer.groups, layer.padding[:2], kernels)
    return _pack_forward(layer, term, weight, graph, kernels)


def _pack_term(layer: g.Conv2d, graph: Graph, term: Term, carries: bool, kernels: ModuleType) -> DirectBack | Winograd | None:
    if term.weights == "direction":
        return None
    in_shape = graph.shapes[layer.inputs[0]]
    outputs, channels = len(layer.weight) // layer.groups, layer.weight.shape[1]
    if _suits_winograd(layer, term) and not carries and kernels.winograd2d_pays(outputs, channels, *in_shape[1:]):
        turned = _of_back(layer, term).reshape(layer.groups, outputs, channels, 3, 3)[..., ::-1, ::-1].swapaxes(1, 2)
        return _pack_winograd(None, (turned,), layer.groups, (2 - layer.padding[0], 2 - layer.padding[1]), kernels)
    return _pack_back(layer, term, in_shape, kernels)


def _pack_winograd(source: Array | None, weights: tuple[Array, ...], groups: int, padding: tuple[int, int], kernels: ModuleType
                   ) -> Winograd:
    rows, channels = weights[0].size // (9 * groups * weights[0].shape[-3]), weights[0].shape[-3]
    packed = np.empty((len(weights), *kernels.winograd2d_packed_shape(groups, rows, channels)), np.float32)
    for to, weight in zip(packed, weights, strict=True):
        kernels.winograd2d_pack(to, read_only(weight.reshape(groups, rows, channels, 3, 3)))
    return Winograd(None if source is None else read_only(source), read_only(packed), channels, groups, len(weights), padding)


def _pack_forward(layer: g.Conv2d, term: Term, weight: Array, graph: Graph, kernels: ModuleType) -> DirectForward:
    in_shape, out_shape = graph.shapes[layer.inputs[0]], graph.shapes[layer.name]
    outputs, per_group, *kernel = weight.shape
    # For each copy of the input that the features need: its weights, and which of them add to z. Where none do, z comes of a constant.
    copies: list[tuple[Array, int]] = {
        codes.NONNEGATIVE: [(weight, 1)],
        codes.SIGNED: [(weight, 1), (weight, -1)],
        codes.BOX: [(weight, 0)],
        codes.ONES: [(weight, 0)],
    }[term.features]
    in_place = reads_in_place(layer) and len(copies) == 1
    if in_place:
        columns = kernels.conv2d_block_shape(1, out_shape[1] * out_shape[2], 0, 0, per_group)[1]
        blocks = Blocks(_table([], 2), [], 1, columns, 0, 0)
        offsets = np.arange(per_group, dtype=np.int32) * np.int32(in_shape[1] * in_shape[2])
    else:
        reach = [(i * layer.dilation[0] - layer.padding[0], j * layer.dilation[1] - layer.padding[1])
                 for i in range(kernel[0]) for j in range(kernel[1])]
        blocks = _blocks(reach, layer.stride, out_shape[1:], per_group * len(copies), kernels)
        offsets = blocks.offsets(per_group * len(copies))
    matrices = np.concatenate([w.reshape(layer.groups, outputs // layer.groups, -1) for w, _ in copies], 2)
    packed = np.empty(kernels.conv2d_split_shape(*matrices.shape), np.float32)
    packed_offsets = np.empty(packed.shape[:3], np.int32)
    bounds = np.empty((*packed.shape[:2], kernels.conv2d_split_bounds(packed.shape[3])), np.int32)
    sides = np.repeat(np.array([side for _, side in copies]), matrices.shape[2] // len(copies))
    kernels.conv2d_pack_split(packed, packed_offsets, bounds, np.ascontiguousarray(matrices), offsets, sides)
    constant, pattern, least = _constant(layer, term, graph, reads_in_place(layer), kernels)
    return DirectForward(term.features, blocks, read_only(packed), read_only(packed_offsets), read_only(bounds),
                         0 if in_place else per_group * len(copies), constant, pattern, least)


def _pack_back(layer: g.Conv2d, term: Term, in_shape: Shape, kernels: ModuleType) -> DirectBack:
    outputs, per_group, *kernel = layer.weight.shape
    from_group = outputs // layer.groups
    in_place = reads_in_place(layer)
    grids, taps = _phases(layer, in_shape)
    if in_place:
        grids = [(top, left, 1, rows * columns) for top, left, rows, columns in grids]
    reads = [(_offset(grid[0], i, 0, layer), _offset(grid[1], j, 1, layer)) for grid, own in zip(grids, taps, strict=True) for i, j in own]
    rows, columns = max(grid[2] for grid in grids), max(grid[3] for grid in grids)
    blocks = _blocks(reads, (1, 1), (rows, columns), from_group, kernels)
    all_offsets = blocks.offsets(from_group).reshape(from_group, -1)
    split = term.features in (codes.SIGNED, codes.BOX)  # W+ and -W-, or the other way
    v = _of_back(layer, term)
    shape_of = kernels.conv2d_split_shape if split else kernels.conv2d_packed_shape

    weights, offsets, bounds = [np.zeros(0, np.float32)], [np.zeros(0, np.int32)], [np.zeros(0, np.int32)]
    phases: list[tuple[int, ...]] = []
    before = 0
    for grid, own in zip(grids, taps, strict=True):
        phases.append((*grid, len(own), *(sum(part.size for part in parts) for parts in (weights, offsets, bounds))))
        index = [i * kernel[1] + j for i, j in own]
        matrices = np.ascontiguousarray(v[..., index].transpose(0, 2, 1, 3).reshape(layer.groups, per_group, -1))
        reads_at = np.ascontiguousarray(all_offsets[:, before:before + len(own)].ravel())
        before += len(own)
        packed = np.empty(shape_of(*matrices.shape), np.float32)
        if split:
            packed_offsets = np.empty(packed.shape[:3], np.int32)
            packed_bounds = np.empty((*packed.shape[:2], kernels.conv2d_split_bounds(packed.shape[3])), np.int32)
            kernels.conv2d_pack_split(packed, packed_offsets, packed_bounds, matrices, reads_at, np.ones(len(reads_at), np.int64))
            offsets.append(packed_offsets.ravel())
            bounds.append(packed_bounds.ravel())
        else:
            kernels.conv2d_pack(packed, matrices)
            offsets.append(reads_at)
        weights.append(packed.ravel())
    groups, panels = shape_of(layer.groups, per_group, 1)[:2]
    units = -(-rows // blocks.rows) * -(-columns // blocks.columns)
    return DirectBack(term.features, blocks, read_only(np.concatenate(weights)), groups * panels, read_only(np.concatenate(offsets)),
                      read_only(np.concatenate(bounds)), _table(phases, 8), units, from_group)


def _pack_implicit(layer: g.Conv2d, graph: Graph, term: Term, kernels: ModuleType, precision: int) -> ImplicitForward:
    outputs, channels, *kernel = layer.weight.shape
    i, j = (index.ravel() for index in np.indices(kernel))
    matrices = _signed(layer.weight, term).reshape(layer.groups, outputs // layer.groups, channels, -1)
    panel_rows = kernels.conv2d_panel_rows(matrices.shape[1], channels * len(i), precision)
    packed = np.empty(kernels.conv2d_packed_shape(*matrices.shape[:2], channels * len(i), panel_rows), np.float32)
    kernels.conv2d_pack(packed, matrices, precision)
    taps = kernels.conv2d_taps(i * layer.dilation[0] - layer.padding[0], j * layer.dilation[1] - layer.padding[1], channels,
                               *graph.shapes[layer.inputs[0]][1:], panel_rows)
    constant, pattern, least = (kernels.constant(array) for array in _constant(layer, term, graph, False, kernels))
    return ImplicitForward(term.features, kernels.constant(packed), kernels.constant(taps), constant, pattern, least, precision)


def _pack_implicit_back(layer: g.Conv2d, graph: Graph, term: Term, kernels: ModuleType, precision: int) -> ImplicitBack | None:
    if term.weights == "direction":
        return None
    _, rows, columns = graph.shapes[layer.name]
    from_group, per_group = len(layer.weight) // layer.groups, layer.weight.shape[1]
    v = _of_back(layer, term)
    panel_rows = kernels.conv2d_panel_rows(per_group, from_group * v.shape[3], precision)
    weights, taps, phases = [np.zeros(0, np.float32)], [np.zeros(0, np.int64)], []
    for grid, own in zip(*_phases(layer, graph.shapes[layer.inputs[0]]), strict=True):
        downs, rights = (np.array([_offset(grid[axis], tap[axis], axis, layer) for tap in own], np.int64) for axis in (0, 1))
        matrices = v[..., [i * layer.weight.shape[3] + j for i, j in own]].swapaxes(1, 2)
        packed = np.empty(kernels.conv2d_packed_shape(*matrices.shape[:2], from_group * len(own), panel_rows), np.float32)
        kernels.conv2d_pack(packed, matrices, precision)
        phases.append((*grid, packed.shape[2], sum(part.size for part in weights), sum(part.size for part in taps)))
        weights.append(packed.ravel())
        taps.append(kernels.conv2d_taps(downs, rights, from_group, rows, columns, panel_rows))
    return ImplicitBack(term.features, kernels.constant(np.concatenate(weights)), panel_rows, kernels.constant(np.concatenate(taps)),
                        tuple(phases), precision)


def _of_back(layer: g.Conv2d, term: Term) -> Array:
    """V, or what has both features' V as its positive and negative part: (groups, outputs, inputs, taps), outputs and inputs of a group."""
    first, *second = term.share_weights(layer.weight)
    return (first - second[0] if second else first).reshape(layer.groups, len(layer.weight) // layer.groups, layer.weight.shape[1], -1)


def _phases(layer: g.Conv2d, in_shape: Shape) -> tuple[list[tuple[int, int, int, int]], list[list[tuple[int, int]]]]:
    """Grids of inputs that the same taps reach (first row and column, rows, columns), and these taps of the kernel."""
    grids, taps = [], []
    for down in range(layer.stride[0]):
        for right in range(layer.stride[1]):
            phase = [_phase(remainder, axis, layer, in_shape[1 + axis]) for axis, remainder in enumerate((down, right))]
            (top, rows, tap_rows), (left, columns, tap_columns) = phase
            if rows * columns:
                grids.append((top, left, rows, columns))
                taps.append([(i, j) for i in tap_rows for j in tap_columns])
    return grids, taps


def reads_in_place(layer: g.Conv2d) -> bool:
    """Whether each output reads the one place of the input that it lies at."""
    return layer.weight.shape[2:] == (1, 1) and layer.stride == (1, 1) and layer.padding == (0, 0, 0, 0)


def _blocks(taps: list[tuple[int, int]], stride: tuple[int, int], grid: tuple[int, int], channels: int, kernels: ModuleType) -> Blocks:
    """For places (rows, columns) whose taps read the input at place * stride + tap, in so many channels."""
    if not taps:
        rows, columns = kernels.conv2d_block_shape(*grid, 0, 0, 1)
        return Blocks(_table([], 2), [], rows, columns, 0, 0)
    first: dict[tuple[int, int], tuple[int, int]] = {}  # taps of one remainder share a plane, which begins at the least of them
    for y, x in taps:
        remainder = y % stride[0], x % stride[1]
        top, left = first.get(remainder, (y, x))
        first[remainder] = min(y, top), min(x, left)
    number = {remainder: i for i, remainder in enumerate(first)}
    shifts = []
    for y, x in taps:
        remainder = y % stride[0], x % stride[1]
        top, left = first[remainder]
        shifts.append((number[remainder], (y - top) // stride[0], (x - left) // stride[1]))
    more_rows, more_columns = max(down for _, down, _ in shifts), max(right for _, _, right in shifts)
    rows, columns = grid
    taller, wider = rows + more_rows, columns + more_columns
    if len(first) * taller * wider > len(taps) * rows * columns or (rows > 1 and 2 * wider > 3 * columns):  # planes would hold too much
        first = dict(enumerate(taps))  # type: ignore[arg-type]  # a plane for each tap
        shifts = [(i, 0, 0) for i in range(len(taps))]
        more_rows = more_columns = 0
    rows, columns = kernels.conv2d_block_shape(rows, columns, more_rows, more_columns, channels * len(first))
    return Blocks(_table(list(first.values()), 2), shifts, rows, columns, more_rows, more_columns)


def window_blocks(layer: g.Pool2d, graph: Graph, kernels: ModuleType) -> tuple[Blocks, npt.NDArray[np.int32]]:
    """How a forward pool reads its input, and where in a plane each tap of a window lies, from the window's place on."""
    taps = [(i - layer.padding[0], j - layer.padding[1]) for i in range(layer.kernel[0]) for j in range(layer.kernel[1])]
    blocks = _blocks(taps, layer.stride, graph.shapes[layer.name][1:], 1, kernels)
    return blocks, read_only(np.array([i * graph.shapes[layer.inputs[0]][2] + j for i, j in taps], np.int32))


def _table(rows: Sequence[tuple[int, ...]], columns: int) -> npt.NDArray[np.int64]:
    return read_only(np.array(rows, np.int64).reshape(-1, columns))


def _phase(remainder: int, axis: int, layer: g.Conv2d, size: int) -> tuple[int, int, list[int]]:
    """Inputs i of one axis with (i + padding) mod stride = remainder: the first, how many, and the taps of the kernel that reach them."""
    stride, padding, dilation = layer.stride[axis], layer.padding[axis], layer.dilation[axis]
    first = (remainder - padding) % stride
    count = max(0, -((first - size) // stride))
    return first, count, [tap for tap in range(layer.weight.shape[2 + axis]) if tap * dilation % stride == remainder]


def _offset(first: int, tap: int, axis: int, layer: g.Conv2d) -> int:
    """Which output, relative to an input's number within its phase, reads that input through this tap."""
    return (first + layer.padding[axis] - tap * layer.dilation[axis]) // layer.stride[axis]


def _constant(layer: g.Conv2d, term: Term, graph: Graph, in_a_row: bool, kernels: ModuleType
              ) -> tuple[Array, npt.NDArray[np.int64], Array]:
    """z under ONES, z - y under BOX: (K, patterns, OW), which pattern each row has (OH,), and the least z of each output (K,).

    They depend on the place alone, by the taps that fall inside the input. Most rows are alike. in_a_row: all places of a channel count as
    one row.
    """
    in_shape, (outputs, rows, columns) = graph.shapes[layer.inputs[0]], graph.shapes[layer.name]
    if term.features not in (codes.BOX, codes.ONES):
        least = np.full(outputs, kernels.MIN_DENOMINATOR, np.float32)
        return read_only(np.zeros((1, 1, 1), np.float32)), _table([(0,)] * rows, 1).ravel(), read_only(least)
    shares = term.share_weights(layer.weight)
    if term.features == codes.ONES:
        each = shares[0].sum(1, dtype=np.float64)
    else:
        low, high = (np.asarray(bound, np.float64).reshape(layer.groups, -1).repeat(outputs // layer.groups, 0)[..., None, None]
                     for bound in bounds_of(graph, layer.inputs[0]))
        each = (shares[1] * high - shares[0] * low).sum(1)
    inside = []
    for axis in (0, 1):
        tap, place = np.ogrid[:layer.weight.shape[2 + axis], :(rows, columns)[axis]]
        at = place * layer.stride[axis] + tap * layer.dilation[axis] - layer.padding[axis]
        inside.append(((at >= 0) & (at < in_shape[1 + axis])).astype(np.float64))
    if in_a_row:
        inside = [np.ones((1, 1)), np.ones((1, rows * columns))]
    patterns, pattern = np.unique(inside[0], axis=1, return_inverse=True)
    sums = np.einsum("kix,iy->kyx", np.einsum("kij,jx->kix", each, inside[1]), patterns)
    # What rounding leaves of a z that is a difference may not be divided by.
    least = np.maximum(1e-6 * np.abs(sums).max((1, 2)) if term.features == codes.BOX else 0, kernels.MIN_DENOMINATOR) * np.ones(outputs)
    return read_only(sums.astype(np.float32)), read_only(pattern.reshape(-1).astype(np.int64)), read_only(least.astype(np.float32))


def bounds_of(graph: Graph, name: str) -> tuple[Array, Array]:
    """Of each channel of a tensor, (C,) each; zeros where it has none."""
    domain, channels = graph.domains[name], graph.shapes[name][0]
    if domain.low is None or domain.high is None:
        return (read_only(np.zeros(channels, np.float32)),) * 2
    return read_only(domain.low), read_only(domain.high)
