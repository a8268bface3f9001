"""Convolution and its redistribution: im2col into cache-sized blocks, multiplied tile by tile.

Both directions are one loop. Gather a block, with a column for each place of a regular grid and a row for each number that is summed over;
multiply it with packed weights by the micro-kernel; finish each tile while it is in cache.

    direction       places                           summed over                 one tap of a place reads
    forward         outputs                          input channels x taps       the input at place * stride + offset
    redistribute    inputs of one phase, see below   output channels x taps      ratio * c at place + offset

Under a stride (s, t), the inputs fall into s t phases by the remainder of their position. All inputs of a phase are reached by the same
taps of the kernel, so each phase is a plain convolution of its own and nothing is multiplied by zero.

Shapes: x, c (N, *, OH, OW) and a, c_in (N, *, H, W) are used from a given channel on (a concatenation's inputs are ranges of its channels);
ratio is (N, K, OH, OW). Packed weights are (groups, panels, depth, TILE_ROWS). `taps` holds a row (offset down, offset right) for each tap.
The work is cut into units, numbered image by image; a call does the units first..last-1, so threads can share it.
"""

import numpy as np
from fastdtd.kernels.codes import BOX, NONNEGATIVE, ONES, SIGNED
from fastdtd.kernels.cpu.elementwise import finish, ratio_of
from fastdtd.kernels.cpu.jit import kernel
from fastdtd.kernels.cpu.microkernel import TILE_COLUMNS, TILE_ROWS, multiply_tile

_BLOCK_BYTES = 1 << 18  # a block of gathered columns stays in the second-level cache beside the weights that stream past it
_BLOCK_TILES = 8
_ZERO = np.float32(0)


# ---- Sizes, for the plan ---------------------------------------------------------------------------------------------------------------


def conv2d_tiles_shape():
    """Shape of the scratch array `tiles`."""
    return 2, TILE_ROWS, TILE_COLUMNS


def conv2d_block_columns(depth, places):
    """Columns of the scratch array `block` for a product of this depth over this many places."""
    fitting = max(1, min(_BLOCK_TILES, _BLOCK_BYTES // (4 * depth * TILE_COLUMNS)))
    return TILE_COLUMNS * min(fitting, -(-places // TILE_COLUMNS))


def conv2d_packed_shape(groups, rows, depth):
    """Shape of `packed` for a matrix of (rows, depth) in each group."""
    return groups, -(-rows // TILE_ROWS), depth, TILE_ROWS


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


# ---- Gathering a block of columns ------------------------------------------------------------------------------------------------------


@kernel
def _clear_outside(out, y, x, step, height, width):
    """Columns x, x + step, ... of line y go to out: which is the first inside the plane, which the first behind it; outside out is 0."""
    length = len(out)
    left = min(max(-(x // step), 0), length)
    stop = max(min(-((x - width) // step), length), left)
    if y < 0 or y >= height:
        left = stop = length
    for i in range(left):
        out[i] = _ZERO
    for i in range(stop, length):
        out[i] = _ZERO
    return left, stop


@kernel
def _gather(block, first_row, plane, taps, step_down, step_right, grid_columns, first_place, count, part, low, high):
    """Rows first_row.. of block <- one channel's plane (H, W) as seen by each tap; places outside the plane give 0.

    part says what is taken of each value a: 0: a, 1: max(a, 0), 2: max(-a, 0), 3: a - low, 4: high - a. The last two are 0 where a lies
    beyond its bound, as a mean can by rounding.
    """
    height, width = plane.shape
    padded = -(-count // TILE_COLUMNS) * TILE_COLUMNS
    for tap in range(len(taps)):
        row = block[first_row + tap]
        down, right = taps[tap, 0], taps[tap, 1]
        start = 0
        while start < count:  # one line of places after the other
            line, column = (first_place + start) // grid_columns, (first_place + start) % grid_columns
            length = min(grid_columns - column, count - start)
            out = row[start:start + length]
            start += length
            y = line * step_down + down
            left, stop = _clear_outside(out, y, column * step_right + right, step_right, height, width)
            if stop <= left:
                continue
            x = (column + left) * step_right + right
            inside = out[left:stop]
            source = plane[y, x:x + (stop - left - 1) * step_right + 1]
            if part == 0 and step_right == 1:
                for i in range(len(inside)):
                    inside[i] = source[i]
            elif part == 0:
                for i in range(len(inside)):
                    inside[i] = source[i * step_right]
            elif part == 1:
                for i in range(len(inside)):
                    inside[i] = max(source[i * step_right], _ZERO)
            elif part == 2:
                for i in range(len(inside)):
                    inside[i] = max(-source[i * step_right], _ZERO)
            elif part == 3:
                for i in range(len(inside)):
                    inside[i] = max(source[i * step_right] - low, _ZERO)
            else:
                for i in range(len(inside)):
                    inside[i] = max(high - source[i * step_right], _ZERO)
        for i in range(count, padded):
            row[i] = _ZERO


@kernel
def _gather_product(block, first_row, ratio, c, taps, grid_columns, first_place, count):
    """As _gather with step 1, of the product ratio * c of two planes (H, W)."""
    height, width = ratio.shape
    padded = -(-count // TILE_COLUMNS) * TILE_COLUMNS
    for tap in range(len(taps)):
        row = block[first_row + tap]
        down, right = taps[tap, 0], taps[tap, 1]
        start = 0
        while start < count:
            line, column = (first_place + start) // grid_columns, (first_place + start) % grid_columns
            length = min(grid_columns - column, count - start)
            out = row[start:start + length]
            start += length
            y = line + down
            left, stop = _clear_outside(out, y, column + right, 1, height, width)
            if stop <= left:
                continue
            x = column + left + right
            inside, p, q = out[left:stop], ratio[y, x:x + stop - left], c[y, x:x + stop - left]
            for i in range(len(inside)):
                inside[i] = p[i] * q[i]
        for i in range(count, padded):
            row[i] = _ZERO


# ---- Forward ---------------------------------------------------------------------------------------------------------------------------


@kernel
def conv2d_forward(x, ratio, dead, a, packed_w, packed_v, bias, constant, low, high, taps, block, tiles,
                   x_channel, a_channel, step_down, step_right, features, relu, relevance, first, last):
    """x <- W a + bias, through a ReLU if `relu`; ratio <- |x| / z; dead[n] <- 1 where z = 0 absorbs something (elementwise.ratio_of).

    One gathered block serves both y = W a + bias and z = V u: its first rows hold a, and, where u is not a itself (SIGNED, BOX), the rows
    behind them u. bias is (K,); low, high are bounds of each channel of a, read under BOX; constant (K, OH * OW) is z under ONES, which
    depends on the place alone.
    """
    outputs, places, grid_columns = ratio.shape[1], x.shape[2] * x.shape[3], x.shape[3]
    groups, panels, depth, _ = packed_w.shape
    depth_v, tap_count = packed_v.shape[2], len(taps)
    channels, per_group = depth // tap_count, outputs // groups
    own_features = features in (SIGNED, BOX)
    stride = block.shape[1]
    blocks = -(-places // stride)
    flat_x, flat_ratio = x.reshape(x.shape[0], x.shape[1], places), ratio.reshape(ratio.shape[0], outputs, places)
    sums_y, sums_z = tiles[0], tiles[1]
    p_w, p_v, p_block = packed_w.ctypes.data, packed_v.ctypes.data, block.ctypes.data
    p_features = p_block + 4 * depth * stride if own_features else p_block
    for unit in range(first, last):
        n, first_place = unit // blocks, unit % blocks * stride
        count = min(stride, places - first_place)
        for g in range(groups):
            for channel in range(channels):
                source = g * channels + channel
                plane = a[n, a_channel + source]
                for part in range(3 if own_features else 1):
                    code = part if part == 0 or features == SIGNED else part + 2
                    _gather(block, (part * channels + channel) * tap_count, plane, taps, step_down, step_right, grid_columns, first_place,
                            count, code, low[source], high[source])
            for panel in range(panels):
                rows = min(TILE_ROWS, per_group - panel * TILE_ROWS)
                at = 4 * (g * panels + panel) * TILE_ROWS
                for j in range(0, count, TILE_COLUMNS):
                    multiply_tile(sums_y.ctypes.data, p_w + at * depth, p_block + 4 * j, depth, stride)
                    if features != ONES:
                        multiply_tile(sums_z.ctypes.data, p_v + at * depth_v, p_features + 4 * j, depth_v, stride)
                    start, width = first_place + j, min(TILE_COLUMNS, count - j)
                    for i in range(rows):
                        k = g * per_group + panel * TILE_ROWS + i
                        to_x, to_ratio = flat_x[n, x_channel + k, start:start + width], flat_ratio[n, k, start:start + width]
                        y, z = sums_y[i, :width], constant[k, start:start + width] if features == ONES else sums_z[i, :width]
                        b, absorbs = bias[k], False
                        for q in range(width):
                            value = finish(y[q] + b, relu)
                            r = ratio_of(value, z[q], relevance)
                            to_x[q] = value
                            to_ratio[q] = r
                            absorbs |= r < _ZERO
                        if absorbs:
                            dead[n] = 1


# ---- Redistribute ----------------------------------------------------------------------------------------------------------------------


@kernel
def conv2d_redistribute(c_in, c, ratio, a, packed, low, high, phases, taps, block, tiles,
                        c_in_channel, c_channel, a_channel, groups, stride_down, stride_right, features, relevance, accumulate,
                        first, last):
    """c_in <- V^T (ratio * c), or added to c_in if `accumulate`. If `relevance`, it is multiplied by u: relevance instead of its factor.

    packed is flat: the panels of one phase behind those of another, made of the transposed V; where an input has two features (SIGNED,
    BOX), a phase's panels for the second follow those for the first. phases has a row for each phase: its first input row and column, rows
    and columns of its grid, first and last tap, where its panels begin in packed, and how many units the phases before it have. A phase
    without taps is reached by no output: it gets zero.
    """
    inputs, outputs = len(low), ratio.shape[1]
    per_group, from_group = inputs // groups, outputs // groups
    parts = 2 if features in (SIGNED, BOX) else 1
    panels = -(-per_group // TILE_ROWS)
    stride = block.shape[1]
    end = phases[-1]
    units = end[7] + -(-(end[2] * end[3]) // stride)
    p_packed, p_block = packed.ctypes.data, block.ctypes.data
    for unit in range(first, last):
        n, index = unit // units, 0
        while index + 1 < len(phases) and phases[index + 1, 7] <= unit % units:
            index += 1
        top, left, grid_rows, grid_columns, first_tap, last_tap, begin, units_before = phases[index]
        first_place = (unit % units - units_before) * stride
        count = min(stride, grid_rows * grid_columns - first_place)
        tap_count = last_tap - first_tap
        depth = from_group * tap_count
        for g in range(groups):
            for k in range(from_group):
                source = g * from_group + k
                _gather_product(block, k * tap_count, ratio[n, source], c[n, c_channel + source], taps[first_tap:last_tap], grid_columns,
                                first_place, count)
            for panel in range(panels):
                rows = min(TILE_ROWS, per_group - panel * TILE_ROWS)
                for j in range(0, count, TILE_COLUMNS):
                    for part in range(parts):
                        tile = tiles[part]
                        if depth:
                            at = begin + ((part * groups + g) * panels + panel) * depth * TILE_ROWS
                            multiply_tile(tile.ctypes.data, p_packed + 4 * at, p_block + 4 * j, depth, stride)
                        else:
                            tile[:] = _ZERO
                    width = min(TILE_COLUMNS, count - j)
                    for i in range(rows):
                        channel = g * per_group + panel * TILE_ROWS + i
                        positive, negative = tiles[0, i], tiles[parts - 1, i]
                        line, column = (first_place + j) // grid_columns, (first_place + j) % grid_columns
                        done = 0
                        while done < width:
                            length = min(grid_columns - column, width - done)
                            y, x = top + line * stride_down, left + column * stride_right
                            reach = x + (length - 1) * stride_right + 1
                            out = c_in[n, c_in_channel + channel, y, x:reach]
                            if (features == NONNEGATIVE and not relevance) or features == ONES:  # the tile is the result
                                if accumulate:
                                    for q in range(length):
                                        out[q * stride_right] += positive[done + q]
                                else:
                                    for q in range(length):
                                        out[q * stride_right] = positive[done + q]
                            else:
                                value = a[n, a_channel + channel, y, x:reach]
                                for q in range(length):
                                    v, p, m = value[q * stride_right], positive[done + q], negative[done + q]
                                    if features == BOX:
                                        result = max(v - low[channel], _ZERO) * p + max(high[channel] - v, _ZERO) * m
                                    else:
                                        result = p if v >= _ZERO else m
                                        if relevance:
                                            result *= abs(v)
                                    out[q * stride_right] = result + out[q * stride_right] if accumulate else result
                            done += length
                            line, column = line + 1, 0
