"""Convolution and its redistribution: blocks of padded planes, multiplied tile by tile through a table of offsets.

Both directions are one loop. Copy the part of the input that a block of places reads into a small padded copy; multiply it with packed
weights by the micro-kernel; finish each tile while it is in cache.

    direction       places                           summed over                 one tap of a place reads
    forward         outputs                          input channels x taps       the input at place * stride + offset
    redistribute    inputs of one phase, see below   output channels x taps      ratio * c at place + offset

There is no im2col matrix. The copied block holds planes of row width `width`, a little wider than the block of places is. Places are
counted along those rows too, so the tap (i, j) of 48 neighbouring places is 48 neighbouring numbers of the plane, shifted by i * width + j:
a row of the matrix is an offset. Places at the end of each row are computed for nothing and not stored. Under a stride, numbers are sorted
into planes by the remainder of their position, so that it is the same again. Where this would be wasteful (a far dilation), each tap has a
plane of its own, which is im2col. A 1x1 convolution reads the tensor itself.

Under a stride (s, t), the inputs of a redistribution fall into s t phases by the remainder of their position. All inputs of a phase are
reached by the same taps of the kernel, so each phase is a plain convolution of its own and nothing is multiplied by zero.

Shapes: x, c (N, *, OH, OW) and a, c_in (N, *, H, W) are used from a given channel on (a concatenation's inputs are ranges of its channels);
ratio is (N, K, OH, OW). The work is cut into units: image by image, block by block, and within a block by `shares` of its outputs; a call
does the units first..last-1, so threads can share it.
"""

import numpy as np
from fastdtd.kernels.codes import BOX, NONNEGATIVE, ONES, SIGNED
from fastdtd.kernels.cpu.elementwise import LEAST, finish, ratio_of
from fastdtd.kernels.cpu.jit import kernel
from fastdtd.kernels.cpu.microkernel import (
    LANES,
    MULTIPLY_SPLIT,
    MULTIPLY_TILE,
    SPLIT_COLUMNS,
    SPLIT_ORDER,
    SPLIT_ROWS,
    TILE_COLUMNS,
    TILE_ROWS,
    finish_vectors,
)

CONV2D_COLUMNS = max(SPLIT_COLUMNS, TILE_COLUMNS)  # of a tile; tiles read this far beyond the last place
_BLOCK_BYTES = 1 << 18  # a block of planes stays in the second-level cache beside the weights that stream past it
_ZERO = np.float32(0)
_BITS = np.array(SPLIT_ORDER, np.int64)


# ---- Sizes, for the plan ---------------------------------------------------------------------------------------------------------------


def conv2d_tiles_elements():
    """Floats of the scratch array `tiles`: vectors are read beyond a tile's end."""
    return 2 * SPLIT_ROWS * SPLIT_COLUMNS + 2 * TILE_ROWS * TILE_COLUMNS + CONV2D_COLUMNS


def conv2d_block_shape(rows, columns, more_rows, more_columns, planes):
    """Places of a block (down, across) for a grid of places (rows, columns) that reads so many planes, so much taller and wider."""
    fitting = _BLOCK_BYTES // (4 * planes)
    across = columns
    if columns > 2 * CONV2D_COLUMNS and (1 + more_rows) * (columns + more_columns) > fitting:
        across = max(2 * CONV2D_COLUMNS, fitting // (1 + more_rows) - more_columns)
        across = -(-across // CONV2D_COLUMNS) * CONV2D_COLUMNS
    down = max(fitting // (across + more_columns) - more_rows, -(-2 * CONV2D_COLUMNS // (across + more_columns)))
    down = -(-rows // -(-rows // min(down, rows)))  # blocks of equal height
    return down, min(across, columns)


def conv2d_packed_shape(groups, rows, depth):
    """Shape of packed weights for a matrix of (rows, depth) in each group."""
    return groups, -(-rows // TILE_ROWS), depth, TILE_ROWS


def conv2d_split_panels(rows):
    """How many panels conv2d_pack_split makes of so many rows."""
    return -(-rows // SPLIT_ROWS)


# ---- Packing weights -------------------------------------------------------------------------------------------------------------------


@kernel
def conv2d_pack(packed, matrices):
    """packed (groups, panels, depth, TILE_ROWS) <- matrices (groups, rows, depth), with rows of zeros to fill the last panel."""
    groups, rows, depth = matrices.shape
    for g in range(groups):
        for panel in range(packed.shape[1]):
            for i in range(TILE_ROWS):
                row = panel * TILE_ROWS + i
                for d in range(depth):
                    packed[g, panel, d, i] = matrices[g, row, d] if row < rows else _ZERO


@kernel
def conv2d_pack_split(packed, packed_offsets, bounds, matrices, offsets, sides):
    """Sort each panel's entries by class for multiply_split: packed (groups, panels, depth, SPLIT_ROWS), packed_offsets (.., depth) and
    bounds (groups, panels, 1 + classes) <- matrices (groups, rows, depth) and offsets (depth,).

    sides (depth,) says what of an entry is positive: 1: positive weights, -1: negative ones, 2: all, 0: none.
    """
    groups, rows, depth = matrices.shape
    for g in range(groups):
        for panel in range(packed.shape[1]):
            to, bounds[g, panel, 0] = 0, 0
            for i in range(len(_BITS)):
                for d in range(depth):
                    positive_rows = 0
                    for row in range(SPLIT_ROWS):
                        k = panel * SPLIT_ROWS + row
                        weight = matrices[g, k, d] if k < rows else _ZERO
                        if sides[d] == 2 or sides[d] * weight > _ZERO:
                            positive_rows |= 1 << row
                    if positive_rows == _BITS[i]:
                        for row in range(SPLIT_ROWS):
                            k = panel * SPLIT_ROWS + row
                            packed[g, panel, to, row] = matrices[g, k, d] if k < rows else _ZERO
                        packed_offsets[g, panel, to] = offsets[d]
                        to += 1
                bounds[g, panel, i + 1] = to


# ---- Copying a block of planes -----------------------------------------------------------------------------------------------------------


@kernel
def _inside(first, step, size, count):
    """Of the positions first, first + step, ... (count of them): the number of the first inside 0..size-1, and of the first behind it."""
    begin = min(max(-(first // step), 0), count)
    return begin, max(min(-((first - size) // step), count), begin)


@kernel
def _copy_plane(out, a, first_y, first_x, step_down, step_right, part, low, high):
    """out (rows, width) <- a (H, W) at first + index * step, 0 outside.

    part says what is taken of each value a: 0: a, 1: max(a, 0), 2: min(a, 0), 3: a - low, 4: high - a. The last two are 0 where a lies
    beyond its bound, as a mean can by rounding.
    """
    rows, width = out.shape
    top, bottom = _inside(first_y, step_down, a.shape[0], rows)
    left, right = _inside(first_x, step_right, a.shape[1], width)
    for r in range(rows):
        line = out[r]
        if r < top or r >= bottom or right <= left:
            line[:] = _ZERO
            continue
        line[:left] = _ZERO
        line[right:] = _ZERO
        begin = first_x + left * step_right
        source, to = a[first_y + r * step_down, begin:begin + (right - left - 1) * step_right + 1], line[left:right]
        if part == 0 and step_right == 1:
            for i in range(len(to)):
                to[i] = source[i]
        elif part == 0 and step_right == 2:
            for i in range(len(to)):
                to[i] = source[2 * i]
        elif part == 0:
            for i in range(len(to)):
                to[i] = source[i * step_right]
        elif part == 1:
            for i in range(len(to)):
                to[i] = max(source[i * step_right], _ZERO)
        elif part == 2:
            for i in range(len(to)):
                to[i] = min(source[i * step_right], _ZERO)
        elif part == 3:
            for i in range(len(to)):
                to[i] = max(source[i * step_right] - low, _ZERO)
        else:
            for i in range(len(to)):
                to[i] = max(high - source[i * step_right], _ZERO)


@kernel
def _copy_product(out, ratio, c, first_y, first_x):
    """As _copy_plane with step 1, of the product ratio * c of two planes (H, W)."""
    rows, width = out.shape
    top, bottom = _inside(first_y, 1, c.shape[0], rows)
    left, right = _inside(first_x, 1, c.shape[1], width)
    for r in range(rows):
        line = out[r]
        if r < top or r >= bottom or right <= left:
            line[:] = _ZERO
            continue
        line[:left] = _ZERO
        line[right:] = _ZERO
        to, y, x = line[left:right], first_y + r, first_x + left
        p, q = ratio[y, x:x + len(to)], c[y, x:x + len(to)]
        for i in range(len(to)):
            to[i] = p[i] * q[i]


# ---- Tiles -------------------------------------------------------------------------------------------------------------------------------


_SPLIT_1, _SPLIT_2, _SPLIT_3 = MULTIPLY_SPLIT
_TILE_1, _TILE_2, _TILE_3 = (*MULTIPLY_TILE, MULTIPLY_TILE[-1])[:3]


@kernel
def _multiply_split(tiles, a, offsets, bounds, b, columns):
    """The narrowest product that covers so many columns."""
    if columns <= LANES:
        _SPLIT_1(tiles, a, offsets, bounds, b)
    elif columns <= 2 * LANES:
        _SPLIT_2(tiles, a, offsets, bounds, b)
    else:
        _SPLIT_3(tiles, a, offsets, bounds, b)


@kernel
def _multiply_tile(tile, a, offsets, b, depth, columns):
    if columns <= LANES:
        _TILE_1(tile, a, offsets, b, depth)
    elif columns <= 2 * LANES:
        _TILE_2(tile, a, offsets, b, depth)
    else:
        _TILE_3(tile, a, offsets, b, depth)


@kernel
def _segment(place, end, width, across):
    """The first stored places at or behind `place` (as they are counted: rows of `width`, `across` of them stored): row, column, length."""
    row, column = place // width, place % width
    if column >= across:
        row, column = row + 1, 0
    return row, column, min(across - column, end - (row * width + column))


# ---- Forward ---------------------------------------------------------------------------------------------------------------------------


@kernel
def conv2d_forward(x, ratio, dead, a, packed, offsets, bounds, bias, constant, low, high, planes, block, tiles,
                   x_channel, a_channel, step_down, step_right, block_rows, block_columns, more_rows, more_columns, shares,
                   features, relu, relevance, first, last):
    """x <- W a + bias, through a ReLU if `relu`; ratio <- |x| / z; dead[n] <- 1 where z = 0 absorbs something (elementwise.ratio_of).

    packed, offsets, bounds are of conv2d_pack_split. Its depth runs over the copies that the features need (a; its two signs; a and its
    distances from both bounds), the channels of a group, the taps. planes (P, 2) holds where each plane of a channel begins, relative to a
    place's own position; with none the tensor itself is read. bias is (K,); low, high are bounds of each channel of a, read under BOX;
    constant (K, OH * OW) is z under ONES, which depends on the place alone.
    """
    outputs, height, across = ratio.shape[1], x.shape[2], x.shape[3]
    groups, panels = packed.shape[:2]
    channels, per_group = len(low) // groups, outputs // groups
    copies = 3 if features == BOX else 2 if features == SIGNED else 1
    direct = len(planes) == 0
    width = block_columns + more_columns
    blocks_across = -(-across // block_columns)
    blocks = -(-height // block_rows) * blocks_across
    flat_x, flat_ratio = x.reshape(x.shape[0], x.shape[1], height * across), ratio.reshape(ratio.shape[0], outputs, height * across)
    p_tile = tiles.ctypes.data
    p_negative = p_tile + 4 * SPLIT_ROWS * SPLIT_COLUMNS
    for unit in range(first, last):
        n, within = unit // (blocks * shares), unit % (blocks * shares)
        share, index = within % shares, within // shares
        y, x0 = index // blocks_across * block_rows, index % blocks_across * block_columns
        rows, columns = min(block_rows, height - y), min(block_columns, across - x0)
        places = (rows - 1) * width + columns
        # Vectors may be stored beyond a segment's end where this unit stores what belongs there afterwards.
        limit = (y + rows) * across if columns == across else 0
        absorbs, copied = False, -1
        for panel in range(groups * panels * share // shares, groups * panels * (share + 1) // shares):
            g, within_group = panel // panels, panel % panels
            if g != copied:
                copied = g
                at = 0
                for copy in range(copies if not direct else 0):
                    part = copy if copies == 1 or (features == BOX and copy == 0) else copy + (2 if features == BOX else 1)
                    for channel in range(g * channels, (g + 1) * channels):
                        for plane in range(len(planes)):
                            _copy_plane(block[at], a[n, a_channel + channel], y * step_down + planes[plane, 0],
                                        x0 * step_right + planes[plane, 1], step_down, step_right, part, low[channel], high[channel])
                            at += 1
            p_b = a[n, a_channel + g * channels].ctypes.data + 4 * x0 if direct else block.ctypes.data
            p_packed, p_offsets = packed[g, within_group].ctypes.data, offsets[g, within_group].ctypes.data
            p_bounds = bounds[g, within_group].ctypes.data
            first_output = g * per_group + within_group * SPLIT_ROWS
            for j in range(0, places, SPLIT_COLUMNS):
                end = min(j + SPLIT_COLUMNS, places)
                _multiply_split(p_tile, p_packed, p_offsets, p_bounds, p_b + 4 * j, end - j)
                for i in range(min(SPLIT_ROWS, per_group - within_group * SPLIT_ROWS)):
                    k = first_output + i
                    row, column, length = _segment(j, end, width, columns)
                    while length > 0:
                        lane, to = row * width + column - j + i * SPLIT_COLUMNS, (y + row) * across + x0 + column
                        whole = -(-length // LANES) * LANES
                        if to + whole > limit:
                            whole = length // LANES * LANES
                        z = constant[k, to:].ctypes.data if features == ONES else p_tile + 4 * lane
                        absorbs |= finish_vectors(flat_x[n, x_channel + k, to:].ctypes.data, flat_ratio[n, k, to:].ctypes.data, z,
                                                  p_negative + 4 * lane, whole, bias[k], features in (NONNEGATIVE, SIGNED), relu != 0,
                                                  relevance != 0, LEAST)
                        for q in range(whole, length):
                            z_here = constant[k, to + q] if features == ONES else tiles[lane + q]
                            value = tiles[SPLIT_ROWS * SPLIT_COLUMNS + lane + q]
                            if features in (NONNEGATIVE, SIGNED):
                                value += z_here
                            value = finish(value + bias[k], relu)
                            r = ratio_of(value, z_here, relevance)
                            flat_x[n, x_channel + k, to + q] = value
                            flat_ratio[n, k, to + q] = r
                            absorbs |= r < _ZERO
                        row, column, length = _segment(row * width + column + length, end, width, columns)
        if absorbs:
            dead[n] = 1


# ---- Redistribute ----------------------------------------------------------------------------------------------------------------------

@kernel
def conv2d_redistribute(c_in, c, ratio, a, packed, offsets, low, high, phases, planes, block, tiles,
                        c_in_channel, c_channel, a_channel, groups, stride_down, stride_right, shares, features, relevance, accumulate,
                        first, last):
    """c_in <- V^T (ratio * c), or added to c_in if `accumulate`. If `relevance`, it is multiplied by u: relevance instead of its factor.

    packed is flat: the panels of one phase behind those of another, made of the transposed V; where an input has two features (SIGNED,
    BOX), a phase's panels for the second follow those for the first. A phase without taps is reached by no output: it gets zero.

    phases has a row for each phase: of its grid of inputs the first row and column, rows, columns; its range in `planes`; its number of
    taps; where its weights begin in packed and its rows in offsets; rows and columns of its blocks and what their planes have more of
    each; how many blocks the phases before it have.
    """
    inputs, outputs = len(low), ratio.shape[1]
    per_group, from_group = inputs // groups, outputs // groups
    parts = 2 if features in (SIGNED, BOX) else 1
    panels = -(-per_group // TILE_ROWS)
    end_phase = phases[-1]
    blocks_of_image = end_phase[13] + -(-end_phase[2] // end_phase[9]) * -(-end_phase[3] // end_phase[10])
    as_it_is = (features == NONNEGATIVE and not relevance) or features == ONES
    tile_size = TILE_ROWS * TILE_COLUMNS
    for unit in range(first, last):
        n, within = unit // (blocks_of_image * shares), unit % (blocks_of_image * shares)
        share, index, phase = within % shares, within // shares, 0
        while phase + 1 < len(phases) and phases[phase + 1, 13] <= index:
            phase += 1
        (top, left, grid_rows, grid_columns, first_plane, last_plane, taps, begin, begin_offsets, block_rows, block_columns, more_rows,
         more_columns, before) = phases[phase]
        blocks_across = -(-grid_columns // block_columns)
        y = (index - before) // blocks_across * block_rows
        x = (index - before) % blocks_across * block_columns
        rows, columns = min(block_rows, grid_rows - y), min(block_columns, grid_columns - x)
        width = block_columns + more_columns
        places = (rows - 1) * width + columns
        depth, copied = from_group * taps, -1
        plane_size = (block_rows + more_rows) * width
        for panel in range(groups * panels * share // shares, groups * panels * (share + 1) // shares):
            g, within_group = panel // panels, panel % panels
            if g != copied:
                copied = g
                at = 0
                for k in range(g * from_group, (g + 1) * from_group):
                    for plane in range(first_plane, last_plane):
                        out = block[at:at + plane_size].reshape(block_rows + more_rows, width)
                        _copy_product(out, ratio[n, k], c[n, c_channel + k], y + planes[plane, 0], x + planes[plane, 1])
                        at += plane_size
            for j in range(0, places, TILE_COLUMNS):
                end = min(j + TILE_COLUMNS, places)
                for part in range(parts):
                    if depth:
                        weights = begin + ((part * groups + g) * panels + within_group) * depth * TILE_ROWS
                        _multiply_tile(tiles.ctypes.data + 4 * part * tile_size, packed.ctypes.data + 4 * weights,
                                       offsets.ctypes.data + 4 * begin_offsets, block.ctypes.data + 4 * j, depth, end - j)
                    else:
                        tiles[part * tile_size:(part + 1) * tile_size] = _ZERO
                for i in range(min(TILE_ROWS, per_group - within_group * TILE_ROWS)):
                    channel = g * per_group + within_group * TILE_ROWS + i
                    row, column, length = _segment(j, end, width, columns)
                    while length > 0:
                        lane = row * width + column - j + i * TILE_COLUMNS
                        to_y, to_x = top + (y + row) * stride_down, left + (x + column) * stride_right
                        reach = to_x + (length - 1) * stride_right + 1
                        out = c_in[n, c_in_channel + channel, to_y, to_x:reach]
                        positive = tiles[lane:lane + length]
                        if as_it_is and stride_right == 1:
                            if accumulate:
                                for q in range(length):
                                    out[q] += positive[q]
                            else:
                                for q in range(length):
                                    out[q] = positive[q]
                        elif as_it_is:
                            for q in range(length):
                                out[q * stride_right] = positive[q] + (out[q * stride_right] if accumulate else _ZERO)
                        else:
                            value = a[n, a_channel + channel, to_y, to_x:reach]
                            negative = tiles[(parts - 1) * tile_size + lane:(parts - 1) * tile_size + lane + length]
                            for q in range(length):
                                v, p, m = value[q * stride_right], positive[q], negative[q]
                                if features == BOX:
                                    result = max(v - low[channel], _ZERO) * p + max(high[channel] - v, _ZERO) * m
                                else:
                                    result = p if v >= _ZERO else m
                                    if relevance:
                                        result *= abs(v)
                                out[q * stride_right] = result + out[q * stride_right] if accumulate else result
                        row, column, length = _segment(row * width + column + length, end, width, columns)
