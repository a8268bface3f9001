"""Pools: by winner, by mean, and in proportion. A thread has one window in the forward pass, and one input in the
backward pass.

A tap that falls outside of the input counts for nothing. Parameters and shapes as in kernels/cpu/pool2d.py, but that
windows are given by their geometry.
"""

import math

import numpy as np
from fastdtd.kernels.codes import BOX
from fastdtd.kernels.cuda.elementwise import flat, location, whole_images
from fastdtd.kernels.cuda.jit import kernel, launch, launch_for_each, part
from fastdtd.kernels.cuda.scalar import positive_feature, ratio_of, redistributed
from fastdtd.kernels.cuda.vector_code import load, split
from fastdtd.kernels.scalar import LOWEST, MIN_DENOMINATOR, TIE, ZERO
from numba import cuda, float32

_INFINITY = np.float32(np.inf)
_WARP = 32


# ---- Kernels ---------------------------------------------------------------------------------------------------------


@part
def _first_window(position, kernel_size, stride, padding):
    """The first window that holds a position of an axis."""
    return split(max(position + padding - kernel_size + stride, 0), stride)[0]


@part
def _after_last_window(position, stride, padding, windows):
    return min(split(position + padding, stride)[0] + 1, windows)


@kernel
def _find_winners(x, winner, a, x_elements, x_begin, a_elements, a_begin, rows, columns, height, width, kernel_h,
                  kernel_w, stride_h, stride_w, pad_top, pad_left, elements, count):
    at = cuda.grid(1)
    if at >= count:
        return
    n, i = split(at, elements)
    rest, column = split(i, columns)
    k, row = split(rest, rows)
    plane = n * a_elements + a_begin + k * height * width
    y, z = row * stride_h - pad_top, column * stride_w - pad_left
    largest = limit = LOWEST
    position = max(y, 0) * width + max(z, 0)
    for line in range(max(y, 0), min(y + kernel_h, height)):
        for across in range(max(z, 0), min(z + kernel_w, width)):
            value = load(a, plane, line * width + across)
            if value > limit:
                largest, limit, position = value, value + TIE * abs(value), line * width + across
    x[n * x_elements + x_begin + i] = largest
    winner[at] = position


@kernel
def _redistribute_to_winners(c_in, c, winner, in_elements, in_begin, c_elements, c_begin, rows, columns, height, width,
                             kernel_h, kernel_w, stride_h, stride_w, pad_top, pad_left, elements, count, accumulate):
    at = cuda.grid(1)
    if at >= count:
        return
    n, i = split(at, elements)
    k, position = split(i, height * width)
    line, across = split(position, width)
    windows = (n * split(elements, height * width)[0] + k) * rows * columns
    from_c = n * c_elements + c_begin + k * rows * columns
    to = n * in_elements + in_begin + i
    total = c_in[to] if accumulate else ZERO
    for row in range(_first_window(line, kernel_h, stride_h, pad_top),
                     _after_last_window(line, stride_h, pad_top, rows)):
        for column in range(_first_window(across, kernel_w, stride_w, pad_left),
                            _after_last_window(across, stride_w, pad_left, columns)):
            if load(winner, windows, row * columns + column) == position:
                total += load(c, from_c, row * columns + column)
    c_in[to] = total


@part
def _larger(value, so_far):
    return so_far if so_far > value else value


@part
def _write_window(x, ratio, dead, at_x, at_ratio, n, y, z, divisor, relevance):
    y /= divisor
    own_ratio = ratio_of(y, z, MIN_DENOMINATOR, relevance)
    x[at_x] = y
    ratio[at_ratio] = own_ratio
    if own_ratio < ZERO:
        dead[n] = 1


@kernel
def _reduce_windows(x, ratio, dead, a, low, count_h, count_w, first_image, x_elements, x_begin, a_elements, a_begin,
                    rows, columns, height, width, kernel_h, kernel_w, stride_h, stride_w, pad_top, pad_left, elements,
                    count, maximum, features, relevance):
    at = cuda.grid(1)
    if at >= count:
        return
    n, i = split(at, elements)
    rest, column = split(i, columns)
    k, row = split(rest, rows)
    plane = n * a_elements + a_begin + k * height * width
    first_line, first_column = row * stride_h - pad_top, column * stride_w - pad_left
    shift = low[k] if features == BOX else ZERO
    y, z = -_INFINITY if maximum else ZERO, ZERO
    for line in range(max(first_line, 0), min(first_line + kernel_h, height)):
        for across in range(max(first_column, 0), min(first_column + kernel_w, width)):
            value = load(a, plane, line * width + across)
            y = _larger(value, y) if maximum else y + value
            z += positive_feature(value, features, shift, ZERO)
    _write_window(x, ratio, dead, n * x_elements + x_begin + i, at, first_image + n, y, z,
                  count_h[row] * count_w[column], relevance)


@kernel
def _reduce_planes(x, ratio, dead, a, low, count_h, count_w, first_image, x_elements, x_begin, a_elements, a_begin,
                   channels, positions, maximum, features, relevance):
    """One window that holds the whole plane: a warp for each."""
    sums = cuda.shared.array(_WARP, float32)
    features_sums = cuda.shared.array(_WARP, float32)  # of its own line: the simulator tells arrays apart by that
    t, (n, k) = cuda.threadIdx.x, split(cuda.blockIdx.x, channels)
    plane = n * a_elements + a_begin + k * positions
    shift = low[k] if features == BOX else ZERO
    y, z = -_INFINITY if maximum else ZERO, ZERO
    for i in range(t, positions, _WARP):
        value = a[plane + i]
        y = _larger(value, y) if maximum else y + value
        z += positive_feature(value, features, shift, ZERO)
    sums[t], features_sums[t] = y, z
    cuda.syncthreads()
    width = _WARP // 2
    while width > 0:
        if t < width:
            sums[t] = _larger(sums[t], sums[t + width]) if maximum else sums[t] + sums[t + width]
            features_sums[t] += features_sums[t + width]
        cuda.syncthreads()
        width //= 2
    if t == 0:
        _write_window(x, ratio, dead, n * x_elements + x_begin + k, cuda.blockIdx.x, first_image + n, sums[0],
                      features_sums[0], count_h[0] * count_w[0], relevance)


@kernel
def _redistribute_to_windows(c_in, c, ratio, a, low, in_elements, in_begin, c_elements, c_begin, a_elements, a_begin,
                             rows, columns, height, width, kernel_h, kernel_w, stride_h, stride_w, pad_top, pad_left,
                             elements, count, features, relevance, accumulate):
    at = cuda.grid(1)
    if at >= count:
        return
    n, i = split(at, elements)
    k, position = split(i, height * width)
    line, across = split(position, width)
    windows = (n * split(elements, height * width)[0] + k) * rows * columns
    from_c = n * c_elements + c_begin + k * rows * columns
    total = ZERO
    for row in range(_first_window(line, kernel_h, stride_h, pad_top),
                     _after_last_window(line, stride_h, pad_top, rows)):
        for column in range(_first_window(across, kernel_w, stride_w, pad_left),
                            _after_last_window(across, stride_w, pad_left, columns)):
            total += load(ratio, windows, row * columns + column) * load(c, from_c, row * columns + column)
    to = n * in_elements + in_begin + i
    result = redistributed(total, a[n * a_elements + a_begin + i], features, low[k], ZERO, relevance)
    c_in[to] = result + c_in[to] if accumulate else result


# ---- Launchers -------------------------------------------------------------------------------------------------------


def max_pool2d_forward(x, winner, a, x_channel, a_channel, kernel_h, kernel_w, stride_h, stride_w, pad_top, pad_left,
                       first, last):
    """x <- the largest value of each window; winner (N, C, OH, OW) int32 <- its index in the plane, the first of
    equals."""
    image, end = whole_images(first, last, winner.shape[1])
    elements = math.prod(winner.shape[1:])
    launch_for_each(_find_winners, (end - image) * elements, flat(x), flat(winner[image:end]), flat(a),
                    *location(x, x_channel, image), *location(a, a_channel, image), *winner.shape[2:], *a.shape[2:],
                    kernel_h, kernel_w, stride_h, stride_w, pad_top, pad_left, elements, (end - image) * elements)


def max_pool2d_redistribute(c_in, c, winner, c_in_channel, c_channel, kernel_h, kernel_w, stride_h, stride_w, pad_top,
                            pad_left, accumulate, first, last):
    """c_in <- c for each window's winner, 0 for the others. """
    channels = winner.shape[1]
    image, end = whole_images(first, last, channels)
    elements = channels * math.prod(c_in.shape[2:])
    launch_for_each(_redistribute_to_winners, (end - image) * elements, flat(c_in), flat(c), flat(winner[image:end]),
                    *location(c_in, c_in_channel, image), *location(c, c_channel, image), *winner.shape[2:],
                    *c_in.shape[2:], kernel_h, kernel_w, stride_h, stride_w, pad_top, pad_left, elements,
                    (end - image) * elements, int(accumulate))


def pool2d_forward(x, ratio, dead, a, low, count_h, count_w, x_channel, a_channel, kernel_h, kernel_w, stride_h,
                   stride_w, pad_top, pad_left, maximum, features, relevance, first, last):
    """x <- the largest value (if `maximum`) or the mean of each window; ratio <- |x| / z, z the sum of its features."""
    channels, rows, columns = ratio.shape[1:]
    height, width = a.shape[2:]
    image, end = whole_images(first, last, channels)
    elements = channels * rows * columns
    arrays = (flat(x), flat(ratio[image:end]), dead, flat(a), low, count_h, count_w, image,
              *location(x, x_channel, image), *location(a, a_channel, image))
    if (rows, columns, kernel_h, kernel_w, pad_top, pad_left) == (1, 1, height, width, 0, 0):
        launch(_reduce_planes, (end - image) * channels, _WARP, *arrays, channels, height * width, int(maximum),
               int(features), int(relevance))
        return
    launch_for_each(_reduce_windows, (end - image) * elements, *arrays, rows, columns, height, width, kernel_h,
                    kernel_w, stride_h, stride_w, pad_top, pad_left, elements, (end - image) * elements, int(maximum),
                    int(features), int(relevance))


def pool2d_redistribute(c_in, c, ratio, a, low, c_in_channel, c_channel, a_channel, kernel_h, kernel_w, stride_h,
                        stride_w, pad_top, pad_left, features, relevance, accumulate, first, last):
    """c_in <- the sum of ratio * c over the windows that hold a value, for the features that it has."""
    channels = ratio.shape[1]
    image, end = whole_images(first, last, channels)
    elements = channels * math.prod(a.shape[2:])
    launch_for_each(_redistribute_to_windows, (end - image) * elements, flat(c_in), flat(c), flat(ratio[image:end]),
                    flat(a), low, *location(c_in, c_in_channel, image), *location(c, c_channel, image),
                    *location(a, a_channel, image), *ratio.shape[2:], *a.shape[2:], kernel_h, kernel_w, stride_h,
                    stride_w, pad_top, pad_left, elements, (end - image) * elements, int(features), int(relevance),
                    int(accumulate))


def pool2d_redistribute_elements(kernel_size, stride, padding, in_shape, out_shape):
    """Floats of scratch arrays: none are needed."""
    return 0, 0
