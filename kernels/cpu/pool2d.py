"""Pools and their redistribution: one output row at a time, one tap of the window after the other, so that inner loops run along rows.

Tensors are (N, *, H, W) and used from a given channel on; a call does the units first..last-1, one unit being one channel of one image.
Every window holds at least one number that is not padding (graph.py sees to it).
"""

import numpy as np
from fastdtd.kernels.codes import NONNEGATIVE
from fastdtd.kernels.cpu.conv2d import _copy_plane
from fastdtd.kernels.cpu.elementwise import feature_sum, give, ratio_of
from fastdtd.kernels.cpu.jit import kernel, kernel_reordering
from fastdtd.kernels.cpu.microkernel import LANES, copy_exactly, max_windows

_ZERO = np.float32(0)
_NOTHING = np.float32(-np.inf)  # beside the input


@kernel
def _first_place(offset, stride):
    """The first place whose tap at this offset from place * stride is not before the input."""
    return max(-(offset // stride), 0)


@kernel
def _end_place(offset, stride, size, places):
    """One behind the last place whose tap at this offset is not behind the input."""
    return min(-((offset - size) // stride), places)


@kernel
def _is_whole(rows, columns, kernel_down, kernel_right, height, width, top, left):
    """Whether the one window is the whole plane."""
    return rows == columns == 1 and kernel_down == height and kernel_right == width and top == left == 0


@kernel_reordering
def _total(flat, begin, count):
    total = _ZERO
    for i in range(begin, begin + count):
        total += flat[i]
    return total


@kernel
def max_pool2d_forward(x, winner, a, planes, offsets, places, block, x_channel, a_channel, step_down, step_right, block_rows, block_columns,
                       more_rows, more_columns, first, last):
    """x <- the largest number of each window; winner (N, C, OH, OW) int32 <- where in the plane it lies, the first of equals.

    Numbers that rounding may have made unequal count as equal: else in an evenly coloured area noise would pick the winners. Windows read
    planes as the taps of a convolution do (conv2d.py): offsets (T,) is where each tap lies in the block, from a window's own place on,
    places (T,) where in the plane of a. block is flat scratch.
    """
    channels, height, across = winner.shape[1:]
    width, plane_rows = block_columns + more_columns, block_rows + more_rows
    used = len(planes) * plane_rows * width + LANES
    p_best, p_place = block.ctypes.data + 4 * used, block.ctypes.data + 4 * (used + block_columns + LANES)
    for unit in range(first, last):
        n, k = unit // channels, unit % channels
        to_x, to_winner = (n * x.shape[1] + x_channel + k) * height * across, unit * height * across
        for y in range(0, height, block_rows):
            for left in range(0, across, block_columns):
                rows, columns = min(block_rows, height - y), min(block_columns, across - left)
                for i in range(len(planes)):
                    _copy_plane(block, i * plane_rows * width, plane_rows, width, a, n * a.shape[1] + a_channel + k,
                                y * step_down + planes[i, 0], left * step_right + planes[i, 1], step_down, step_right, 0, _NOTHING)
                for row in range(rows):
                    to = (y + row) * across + left
                    max_windows(p_best, p_place, block.ctypes.data + 4 * row * width, offsets.ctypes.data, places.ctypes.data, len(offsets),
                                columns, (y + row) * step_down * a.shape[3] + left * step_right, step_right)
                    copy_exactly(x.ctypes.data + 4 * (to_x + to), p_best, columns, False)
                    copy_exactly(winner.ctypes.data + 4 * (to_winner + to), p_place, columns, False)


def max_pool2d_elements(planes, rows, columns, block_columns):
    """Floats of max_pool2d_forward's scratch array for so many planes."""
    return planes * rows * columns + LANES + 2 * (block_columns + LANES)


@kernel
def max_pool2d_redistribute(c_in, c, winner, c_in_channel, c_channel, accumulate, first, last):
    """c_in <- c for each window's winner, 0 for the others."""
    channels, places = winner.shape[1], winner.shape[2] * winner.shape[3]
    flat = c_in.reshape(c_in.shape[0], c_in.shape[1], c_in.shape[2] * c_in.shape[3])
    for unit in range(first, last):
        n, k = unit // channels, unit % channels
        out, place, factor = flat[n, c_in_channel + k], winner[n, k].reshape(places), c[n, c_channel + k].reshape(places)
        if not accumulate:
            out[:] = _ZERO
        for i in range(places):
            out[place[i]] += factor[i]


@kernel
def pool2d_forward(x, ratio, dead, a, low, high, x_channel, a_channel, kernel_down, kernel_right, stride_down, stride_right,
                   top, left, bottom, right, maximum, count_padding, features, relevance, first, last):
    """x <- the largest number (if `maximum`) or the mean of each window; ratio <- |x| / z, z the sum of its features.

    The weights of a window are equal and cancel between z and V^T, so they are left out of both. count_padding: the mean's divisor counts
    padding, though nothing beyond it.
    """
    channels, rows, columns = ratio.shape[1:]
    height, width = a.shape[2:]
    flat_a = a.reshape(a.size)
    for unit in range(first, last):
        n, k = unit // channels, unit % channels
        absorbs = False
        if features == NONNEGATIVE and not maximum and _is_whole(rows, columns, kernel_down, kernel_right, height, width, top, left):
            z_all = _total(flat_a, (n * a.shape[1] + a_channel + k) * height * width, height * width)
            x[n, x_channel + k, 0, 0] = z_all / np.float32(height * width)
            ratio[n, k, 0, 0] = ratio_of(x[n, x_channel + k, 0, 0], z_all, relevance)
            if ratio[n, k, 0, 0] < _ZERO:
                dead[n] = 1
            continue
        for y in range(rows):
            out, z = x[n, x_channel + k, y], ratio[n, k, y]
            out[:] = -np.inf if maximum else _ZERO
            z[:] = _ZERO
            lines = 0
            for i in range(kernel_down):
                line = y * stride_down + i - top
                lines += line < height + bottom if count_padding else 0 <= line < height
                if line < 0 or line >= height:
                    continue
                source = a[n, a_channel + k, line]
                for j in range(kernel_right):
                    begin, end = _first_place(j - left, stride_right), _end_place(j - left, stride_right, width, columns)
                    for q in range(begin, end):
                        value = source[q * stride_right + j - left]
                        out[q] = max(out[q], value) if maximum else out[q] + value
                        z[q] += feature_sum(value, features, low[k], high[k])
            for q in range(columns):
                if not maximum:
                    start = q * stride_right - left
                    if count_padding:
                        across = min(start + kernel_right, width + right) - start
                    else:
                        across = min(start + kernel_right, width) - max(start, 0)
                    out[q] /= np.float32(lines * across)
                z[q] = ratio_of(out[q], z[q], relevance)
                absorbs |= z[q] < _ZERO
        if absorbs:
            dead[n] = 1


@kernel
def pool2d_redistribute(c_in, c, ratio, a, low, high, c_in_channel, c_channel, a_channel, kernel_down, kernel_right,
                        stride_down, stride_right, top, left, features, relevance, accumulate, first, last):
    """c_in <- the sum of ratio * c over the windows that hold a number, for the features that it has.

    ratio * c is written over ratio: it is read once for each tap.
    """
    channels, rows, columns = ratio.shape[1:]
    height, width = a.shape[2:]
    flat_in = c_in.reshape(c_in.size)
    for unit in range(first, last):
        n, k = unit // channels, unit % channels
        if features == NONNEGATIVE and not relevance and not accumulate and _is_whole(rows, columns, kernel_down, kernel_right, height,
                                                                                      width, top, left):
            begin = (n * c_in.shape[1] + c_in_channel + k) * height * width
            everywhere = ratio[n, k, 0, 0] * c[n, c_channel + k, 0, 0]
            for i in range(begin, begin + height * width):
                flat_in[i] = everywhere
            continue
        for y in range(rows):
            share, factor = ratio[n, k, y], c[n, c_channel + k, y]
            for q in range(columns):
                share[q] *= factor[q]
        if not accumulate:
            for y in range(height):
                c_in[n, c_in_channel + k, y] = _ZERO
        for y in range(rows):
            share = ratio[n, k, y]
            for i in range(kernel_down):
                line = y * stride_down + i - top
                if line < 0 or line >= height:
                    continue
                out, value = c_in[n, c_in_channel + k, line], a[n, a_channel + k, line]
                for j in range(kernel_right):
                    begin, end = _first_place(j - left, stride_right), _end_place(j - left, stride_right, width, columns)
                    for q in range(begin, end):
                        column = q * stride_right + j - left
                        out[column] += give(share[q], value[column], features, low[k], high[k], relevance)
