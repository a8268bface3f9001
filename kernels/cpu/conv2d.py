"""Convolution and its redistribution: blocks of padded planes, multiplied tile by tile through a table of offsets.

Both directions are one loop. Copy the part of the input that a block of positions reads into a small padded copy;
multiply it with packed weights by the micro-kernel; finish each tile while it is in cache.

    direction       positions                           summed over                 one tap of a position reads
    forward         outputs                          input channels x taps       the input at position * stride + offset
    redistribute    inputs of one phase, see below   output channels x taps      ratio * c at position + offset

There is no im2col matrix. The copied block holds planes of row width `width`, a little wider than the block of
positions is. Positions are counted along those rows too, so the tap (i, j) of 48 neighbouring positions is 48
neighbouring values of the plane, shifted by i * width + j: a row of the matrix is an offset. Positions at the end of
each row are computed for nothing and not stored. Under a stride, values are sorted into planes by the remainder of
their position, so that it is the same again. Where this would be wasteful (a far dilation), each tap has a plane of its
own, which is im2col. A 1x1 convolution reads the tensor itself.

Under a stride (s, t), the inputs of a redistribution fall into s t phases by the remainder of their position. All
inputs of a phase are reached by the same taps of the kernel, so each phase is a plain convolution of its own and
nothing is multiplied by zero.

Shapes: x, c (N, *, OH, OW) and a, c_in (N, *, H, W) are used from a given channel on (a concatenation's inputs are
ranges of its channels); ratio is (N, K, OH, OW). The work is cut into units: image by image, block by block, and within
a block by `splits` of its outputs; a call does the units first..last-1, so that threads divide them.
"""

import numpy as np
from fastdtd.kernels.codes import BOX, NONNEGATIVE, ONES, SIGNED
from fastdtd.kernels.cpu.elementwise import finish_row, redistribute_row
from fastdtd.kernels.cpu.jit import kernel
from fastdtd.kernels.cpu.microkernel import (
    MULTIPLY_SPLIT,
    MULTIPLY_TILE,
    ROW_VECTORS,
    SPLIT_COLUMNS,
    SPLIT_ORDER,
    SPLIT_ROWS,
    TILE_COLUMNS,
    TILE_ROWS,
    multiply_row,
    multiply_split_row,
    multiply_split_three,
)
from fastdtd.kernels.cpu.planes import copy_plane, copy_product
from fastdtd.kernels.cpu.rows import copy_exactly, fill_vectors, interleave_vectors, keep_sign_vectors, spread
from fastdtd.kernels.cpu.vector_code import LANES
from fastdtd.kernels.scalar import ZERO

# of a tile; tiles read this far beyond the last position
CONV2D_COLUMNS = max(SPLIT_COLUMNS, TILE_COLUMNS, ROW_VECTORS * LANES)
_BLOCK_BYTES = 1 << 18  # a block of planes fits the second-level cache with the weights that stream past it
_BLOCK_POSITIONS = 1536  # and so do its results
_FEW_POSITIONS = 8 * SPLIT_COLUMNS  # fewer are not worth a pass over all weights
_BITS = np.array(SPLIT_ORDER, np.int64)


# ---- Sizes, for the plan ---------------------------------------------------------------------------------------------


def conv2d_results_elements(positions):
    """Floats of `results` of conv2d_forward, for blocks of so many positions, counted along rows of planes."""
    return (positions + 2 * CONV2D_COLUMNS) * 2 * SPLIT_ROWS


def conv2d_redistribute_results_elements(positions, columns, stride_w):
    """And of conv2d_redistribute, for blocks so many columns wide."""
    return stride_w * _product_elements(positions) + (2 * _line_elements(columns, stride_w) if stride_w > 1 else 0)


@kernel
def _product_elements(positions):
    return (positions + CONV2D_COLUMNS) * max(TILE_ROWS, 2 * SPLIT_ROWS)


@kernel
def _line_elements(columns, stride_w):
    return columns * stride_w + 2 * LANES


def conv2d_block_shape(rows, columns, halo_rows, halo_columns, planes):
    """Rows and columns of a block of a grid (rows, columns) of positions that reads so many planes, larger by the
    halo."""
    fitting = _BLOCK_BYTES // (4 * planes)
    across = columns
    if columns > _FEW_POSITIONS and (columns > _BLOCK_POSITIONS
                                     or (1 + halo_rows) * (columns + halo_columns) > fitting):
        across = min(max(_FEW_POSITIONS, fitting // (1 + halo_rows) - halo_columns), _BLOCK_POSITIONS)
        across = -(-columns // -(-columns // across))
        across = min(-(-across // LANES) * LANES, columns)
    width = across + halo_columns
    down = max(fitting // width - halo_rows, -(-_FEW_POSITIONS // width))
    down = max(min(down, rows, _BLOCK_POSITIONS // width), 1)
    return -(-rows // -(-rows // down)), across  # blocks of equal height


def conv2d_packed_shape(groups, rows, depth):
    """Shape of packed weights for a matrix (rows, depth) in each group: a panel has a tile's rows, or only one."""
    panel_rows = 1 if rows == 1 else TILE_ROWS
    return groups, -(-rows // panel_rows), depth, panel_rows


def conv2d_split_shape(groups, rows, depth):
    """Shape of the weights of conv2d_pack_split."""
    panel_rows = rows if rows in (1, 3) else SPLIT_ROWS
    return groups, -(-rows // panel_rows), depth, panel_rows


def conv2d_split_bounds(panel_rows):
    """How many bounds each of their panels has."""
    return 1 + 2**panel_rows


# ---- Packing weights -------------------------------------------------------------------------------------------------


@kernel
def conv2d_pack(packed, matrices):
    """packed (groups, panels, depth, panel rows) <- matrices (groups, rows, depth), the last panel filled with
    zeros."""
    groups, rows, depth = matrices.shape
    panel_rows = packed.shape[3]
    for g in range(groups):
        for panel in range(packed.shape[1]):
            for i in range(panel_rows):
                row = panel * panel_rows + i
                for d in range(depth):
                    packed[g, panel, d, i] = matrices[g, row, d] if row < rows else ZERO


@kernel
def conv2d_pack_split(packed, packed_offsets, bounds, matrices, offsets, sides):
    """Sort each panel's entries by class for multiply_split: packed (groups, panels, depth, panel rows), packed_offsets
    (.., depth) and bounds (groups, panels, 1 + classes) <- matrices (groups, rows, depth) and offsets (depth,).

    sides (depth,) says what of an entry is positive: 1: positive weights, -1: negative ones, 2: all, 0: none.
    """
    groups, rows, depth = matrices.shape
    panel_rows = packed.shape[3]
    for g in range(groups):
        for panel in range(packed.shape[1]):
            to, bounds[g, panel, 0] = 0, 0
            for i in range(1 << panel_rows):
                for d in range(depth):
                    positive_rows = 0
                    for row in range(panel_rows):
                        k = panel * panel_rows + row
                        weight = matrices[g, k, d] if k < rows else ZERO
                        if sides[d] == 2 or sides[d] * weight > ZERO:
                            positive_rows |= 1 << row
                    if positive_rows == _BITS[i]:
                        for row in range(panel_rows):
                            k = panel * panel_rows + row
                            packed[g, panel, to, row] = matrices[g, k, d] if k < rows else ZERO
                        packed_offsets[g, panel, to] = offsets[d]
                        to += 1
                bounds[g, panel, i + 1] = to


# ---- Tiles -----------------------------------------------------------------------------------------------------------


_SPLIT_1, _SPLIT_2, _SPLIT_3 = MULTIPLY_SPLIT
_TILE_1, _TILE_2, _TILE_3 = (*MULTIPLY_TILE, MULTIPLY_TILE[-1])[:3]


@kernel
def _tile_width(positions, max_columns):
    """Columns of each tile but the last where all are about as wide, in whole vectors: narrow tiles are slow."""
    tiles = -(-positions // max_columns)
    return -(-positions // (tiles * LANES)) * LANES


@kernel
def _multiply_split(results, stride, a, offsets, bounds, b, positions, panel_rows):
    """P and N of one panel for so many positions, (2, panel_rows, stride) from the address `results` on."""
    if panel_rows == 1:
        multiply_split_row(results, stride, a, offsets, b, bounds, positions)
        return
    if panel_rows == 3:
        multiply_split_three(results, stride, a, offsets, b, bounds, positions)
        return
    width = _tile_width(positions, SPLIT_COLUMNS)
    for j in range(0, positions, width):
        columns = min(width, positions - j)
        if columns <= LANES:
            _SPLIT_1(results + 4 * j, stride, a, offsets, b + 4 * j, bounds)
        elif columns <= 2 * LANES:
            _SPLIT_2(results + 4 * j, stride, a, offsets, b + 4 * j, bounds)
        else:
            _SPLIT_3(results + 4 * j, stride, a, offsets, b + 4 * j, bounds)


@kernel
def _multiply_tile(results, stride, a, offsets, b, depth, positions, panel_rows):
    """The product of one panel for so many positions, (panel_rows, stride) from the address `results` on."""
    if panel_rows == 1:
        multiply_row(results, stride, a, offsets, b, depth, positions)
        return
    width = _tile_width(positions, TILE_COLUMNS)
    for j in range(0, positions, width):
        columns = min(width, positions - j)
        if columns <= LANES:
            _TILE_1(results + 4 * j, stride, a, offsets, b + 4 * j, depth)
        elif columns <= 2 * LANES:
            _TILE_2(results + 4 * j, stride, a, offsets, b + 4 * j, depth)
        else:
            _TILE_3(results + 4 * j, stride, a, offsets, b + 4 * j, depth)


# ---- Forward ---------------------------------------------------------------------------------------------------------


@kernel
def conv2d_forward(x, ratio, dead, a, packed, offsets, bounds, bias, constant, pattern, z_min, planes, block, results,
                   x_channel, a_channel, stride_h, stride_w, block_rows, block_columns, halo_rows, halo_columns,
                   channels, splits, features, x_min, x_max, relevance, first, last):
    """x <- W a + bias, clipped to x_min..x_max; ratio <- |x| / z; dead[n] <- 1 where z = 0 absorbs something
    (scalar.ratio_of).

    packed, offsets, bounds are of conv2d_pack_split. Its depth runs over the copies that the features need (two of both
    signs under SIGNED, else one), the channels of a group (`channels`), the taps. planes (P, 2) holds where each plane
    of a channel begins, relative to a position; with none the tensor itself is read. bias is (K,).

    Under ONES z depends on the position alone, and under BOX (W+ (a - low) - W- (high - a) = W a - W+ low - W- high) it
    is y without its bias and such a constant: constant (K, patterns, OW), pattern (OH,) says which of them a row has. A
    z up to z_min (K,) counts as zero. block and results are flat scratch.
    """
    outputs, height, across = ratio.shape[1], x.shape[2], x.shape[3]
    size = height * across
    groups, panels, depth, panel_rows = packed.shape
    per_group, copies = outputs // groups, 2 if features == SIGNED else 1
    split = features in (NONNEGATIVE, SIGNED)
    direct = len(planes) == 0
    width, plane_rows = block_columns + halo_columns, block_rows + halo_rows
    blocks_across = -(-across // block_columns)
    blocks = -(-height // block_rows) * blocks_across
    p_x, p_ratio, p_constant, p_results = x.ctypes.data, ratio.ctypes.data, constant.ctypes.data, results.ctypes.data
    p_a, p_block = a.ctypes.data, block.ctypes.data
    copied = -1
    for unit in range(first, last):
        n, within = unit // (blocks * splits), unit % (blocks * splits)
        split_index, index = within % splits, within // splits
        y, left = index // blocks_across * block_rows, index % blocks_across * block_columns
        rows, columns = min(block_rows, height - y), min(block_columns, across - left)
        positions = (rows - 1) * width + columns
        stride = positions + CONV2D_COLUMNS
        absorbs = False
        for panel in range(groups * panels * split_index // splits, groups * panels * (split_index + 1) // splits):
            g, within_group = panel // panels, panel % panels
            if unit // splits * groups + g != copied and not direct:
                copied = unit // splits * groups + g
                at = 0
                for copy in range(copies):
                    for channel in range(g * channels, (g + 1) * channels):
                        for i in range(len(planes)):
                            p_plane = p_a + 4 * (n * a.shape[1] + a_channel + channel) * a.shape[2] * a.shape[3]
                            copy_plane(p_block + 4 * at, plane_rows, width, p_plane, a.shape[2], a.shape[3],
                                       y * stride_h + planes[i, 0], left * stride_w + planes[i, 1], stride_h, stride_w,
                                       ZERO)
                            if copies == 2:
                                keep_sign_vectors(p_block + 4 * at, plane_rows * width, copy == 0)
                            at += plane_rows * width
            p_b = p_block
            if direct:
                p_b = p_a + 4 * ((n * a.shape[1] + a_channel + g * channels) * a.shape[2] * a.shape[3] + left)
            _multiply_split(p_results, stride, packed.ctypes.data + 4 * panel * depth * panel_rows,
                            offsets.ctypes.data + 4 * panel * depth, bounds.ctypes.data + 4 * panel * bounds.shape[2],
                            p_b, positions, panel_rows)
            for i in range(min(panel_rows, per_group - within_group * panel_rows)):
                k = g * per_group + within_group * panel_rows + i
                for row in range(rows):
                    to = (y + row) * across + left
                    positive = i * stride + row * width
                    negative = positive + panel_rows * stride
                    at_x, at_ratio = (n * x.shape[1] + x_channel + k) * size + to, (n * outputs + k) * size + to
                    at_constant = (k * constant.shape[1] + pattern[y + row]) * across + left
                    p_z = p_results + 4 * positive if split else p_constant + 4 * at_constant
                    absorbs |= finish_row(p_x + 4 * at_x, p_ratio + 4 * at_ratio, p_z, p_results + 4 * negative,
                                          columns, bias[k], split, features == BOX, x_min, x_max, relevance != 0,
                                          z_min[k])
        if absorbs:
            dead[n] = 1


# ---- Redistribute ----------------------------------------------------------------------------------------------------


@kernel
def _join_phases(p_line, p_row, phases, group, end, product, left, block_columns, stride_w):
    """A row of inputs from the rows of its phases' products, `product` floats apart."""
    if stride_w == 2 and end - group == 2:
        even = phases[group, 1]  # 0, or 1 where the padding is odd
        columns = min(block_columns, max(phases[group, 3], phases[group + 1, 3]) - left)
        interleave_vectors(p_line, p_row + 4 * even * product, p_row + 4 * (1 - even) * product, columns)
        return
    for phase in range(group, end):
        columns = min(block_columns, phases[phase, 3] - left)
        spread(p_line + 4 * phases[phase, 1], p_row + 4 * (phase - group) * product, stride_w, columns)


@kernel
def conv2d_redistribute(c_in, c, ratio, a, packed, offsets, bounds, low, high, phases, planes, block, results,
                        c_in_channel, c_channel, a_channel, groups, stride_h, stride_w, block_rows, block_columns,
                        halo_rows, halo_columns, splits, features, relevance, accumulate, first, last):
    """c_in <- V^T (ratio * c), or added to c_in if `accumulate`. If `relevance`, times u.

    packed is flat: the panels of one phase after those of another, made of the transposed V. Where an input has two
    features (SIGNED, BOX), whose V are W+ and -W-, it is made of the transposed W by conv2d_pack_split, so that both
    cost one product; offsets and bounds are flat like packed then. A phase without taps is reached by no output: it
    gets zero.

    phases has a row for each phase: of its grid of inputs the first row and column, rows, columns; its number of taps;
    where it begins in packed, offsets and bounds. All phases read the same planes; a block is so many positions of each
    phase. block and results are flat scratch.
    """
    inputs, outputs = len(low), ratio.shape[1]
    height, across = c_in.shape[2], c_in.shape[3]
    per_group, from_group = inputs // groups, outputs // groups
    parts = 2 if features in (SIGNED, BOX) else 1
    panel_rows = 1 if per_group == 1 else TILE_ROWS
    if parts == 2:
        panel_rows = per_group if per_group in (1, 3) else SPLIT_ROWS
    panels = -(-per_group // panel_rows)
    blocks_down = blocks_across = 1
    for phase in range(len(phases)):
        blocks_down = max(blocks_down, -(-phases[phase, 2] // block_rows))
        blocks_across = max(blocks_across, -(-phases[phase, 3] // block_columns))
    blocks = blocks_down * blocks_across
    width, plane_rows = block_columns + halo_columns, block_rows + halo_rows
    as_it_is, plane_positions = (features == NONNEGATIVE and not relevance) or features == ONES, block_rows * width
    stride, product = plane_positions + CONV2D_COLUMNS, _product_elements(plane_positions)
    line = _line_elements(block_columns, stride_w)
    p_in, p_a, p_results = c_in.ctypes.data, a.ctypes.data, results.ctypes.data
    p_packed, p_offsets, p_bounds = packed.ctypes.data, offsets.ctypes.data, bounds.ctypes.data
    p_line = p_results + 4 * stride_w * product
    p_ratio, p_c, p_block, size = ratio.ctypes.data, c.ctypes.data, block.ctypes.data, c.shape[2] * c.shape[3]
    copied = -1
    for unit in range(first, last):
        n, within = unit // (blocks * splits), unit % (blocks * splits)
        split_index, index = within % splits, within // splits
        y, left = index // blocks_across * block_rows, index % blocks_across * block_columns
        for panel in range(groups * panels * split_index // splits, groups * panels * (split_index + 1) // splits):
            g, within_group = panel // panels, panel % panels
            if unit // splits * groups + g != copied:
                copied = unit // splits * groups + g
                at = 0
                for k in range(g * from_group, (g + 1) * from_group):
                    for i in range(len(planes)):
                        copy_product(p_block + 4 * at, plane_rows, width, p_ratio + 4 * (n * outputs + k) * size,
                                     p_c + 4 * (n * c.shape[1] + c_channel + k) * size, c.shape[2], c.shape[3],
                                     y + planes[i, 0], left + planes[i, 1], ZERO)
                        at += plane_rows * width
            group = 0
            while group < len(phases):  # a group of phases is one row of inputs, then the next below at stride_h
                first_y, rows, end = phases[group, 0], min(block_rows, phases[group, 2] - y), group + 1
                while end < len(phases) and phases[end, 0] == first_y:
                    end += 1
                for phase in range(group, end if rows > 0 else group):
                    columns, depth, begin = phases[phase, 3] - left, from_group * phases[phase, 4], phases[phase, 5]
                    to = p_results + 4 * (phase - group) * product
                    positions = (rows - 1) * width + min(block_columns, columns)
                    weights = p_packed + 4 * (begin + panel * depth * panel_rows)
                    if columns > 0 and depth == 0:
                        fill_vectors(to, parts * panel_rows * stride - CONV2D_COLUMNS, ZERO)
                    elif columns > 0 and parts == 1:
                        _multiply_tile(to, stride, weights, p_offsets + 4 * phases[phase, 6], p_block, depth, positions,
                                       panel_rows)
                    elif columns > 0:
                        _multiply_split(to, stride, weights, p_offsets + 4 * (phases[phase, 6] + panel * depth),
                                        p_bounds + 4 * (phases[phase, 7] + panel * (1 + (1 << panel_rows))), p_block,
                                        positions, panel_rows)
                for i in range(min(panel_rows, per_group - within_group * panel_rows)):
                    channel = g * per_group + within_group * panel_rows + i
                    for row in range(rows):
                        p_pos = p_results + 4 * (i * stride + row * width)
                        p_neg = p_pos + 4 * (parts - 1) * panel_rows * stride
                        if stride_w > 1:
                            _join_phases(p_line, p_pos, phases, group, end, product, left, block_columns, stride_w)
                            if parts > 1:
                                _join_phases(p_line + 4 * line, p_neg, phases, group, end, product, left, block_columns,
                                             stride_w)
                            p_pos, p_neg = p_line, p_line + 4 * (parts - 1) * line
                        position = (first_y + (y + row) * stride_h) * across + left * stride_w
                        count = min(across - left * stride_w, block_columns * stride_w)
                        to = p_in + 4 * ((n * c_in.shape[1] + c_in_channel + channel) * height * across + position)
                        if as_it_is:
                            copy_exactly(to, p_pos, count, accumulate != 0)
                        else:
                            value = p_a + 4 * ((n * a.shape[1] + a_channel + channel) * height * across + position)
                            redistribute_row(to, p_pos, p_neg, value, count, low[channel], high[channel],
                                             features == BOX, relevance != 0, accumulate != 0)
                group = end
