"""Pools: by winner, by mean, and in proportion. A thread has one window on the way forward, and one input on the way back.

A tap that falls outside of the input takes no part. Parameters and shapes as in kernels/cpu/pool2d.py, but that windows are given by their
geometry.
"""

import math

import numpy as np
from fastdtd.kernels.codes import BOX
from fastdtd.kernels.cuda.elementwise import flat, place_of, whole_images
from fastdtd.kernels.cuda.jit import kernel, launch, launch_for_each, part
from fastdtd.kernels.cuda.scalar import positive_feature, ratio_of, redistributed
from fastdtd.kernels.cuda.vector_code import load, split
from fastdtd.kernels.scalar import LOWEST, MIN_DENOMINATOR, TIE, ZERO
from numba import cuda, float32

_INFINITY = np.float32(np.inf)
_WARP = 32


# ---- Kernels -----------------------------------------------------------------------------------------------------------------------------


@part
def _first_window(place, kernel_size, stride, padding):
    """The first window that holds a place of an axis."""
    return split(max(place + padding - kernel_size + stride, 0), stride)[0]


@part
def _after_last_window(place, stride, padding, windows):
    return min(split(place + padding, stride)[0] + 1, windows)


@kernel
def _find_winners(x, winner, a, x_numbers, x_begin, a_numbers, a_begin, rows, columns, height, width, kernel_down, kernel_right,
                  stride_down, stride_right, top, left, numbers, count):
    at = cuda.grid(1)
    if at >= count:
        return
    n, i = split(at, numbers)
    rest, column = split(i, columns)
    k, row = split(rest, rows)
    plane = n * a_numbers + a_begin + k * height * width
    y, z = row * stride_down - top, column * stride_right - left
    largest = limit = LOWEST
    place = max(y, 0) * width + max(z, 0)
    for line in range(max(y, 0), min(y + kernel_down, height)):
        for across in range(max(z, 0), min(z + kernel_right, width)):
            value = load(a, plane, line * width + across)
            if value > limit:
                largest, limit, place = value, value + TIE * abs(value), line * width + across
    x[n * x_numbers + x_begin + i] = largest
    winner[at] = place


@kernel
def _give_to_winners(c_in, c, winner, in_numbers, in_begin, c_numbers, c_begin, rows, columns, height, width, kernel_down, kernel_right,
                     stride_down, stride_right, top, left, numbers, count, accumulate):
    at = cuda.grid(1)
    if at >= count:
        return
    n, i = split(at, numbers)
    k, place = split(i, height * width)
    line, across = split(place, width)
    windows = (n * split(numbers, height * width)[0] + k) * rows * columns
    from_c = n * c_numbers + c_begin + k * rows * columns
    to = n * in_numbers + in_begin + i
    total = c_in[to] if accumulate else ZERO
    for row in range(_first_window(line, kernel_down, stride_down, top), _after_last_window(line, stride_down, top, rows)):
        for column in range(_first_window(across, kernel_right, stride_right, left),
                            _after_last_window(across, stride_right, left, columns)):
            if load(winner, windows, row * columns + column) == place:
                total += load(c, from_c, row * columns + column)
    c_in[to] = total


@part
def _larger(value, so_far):
    return so_far if so_far > value else value


@part
def _write_window(x, ratio, dead, at_x, at_ratio, n, y, z, divisor, relevance):
    y /= divisor
    share = ratio_of(y, z, MIN_DENOMINATOR, relevance)
    x[at_x] = y
    ratio[at_ratio] = share
    if share < ZERO:
        dead[n] = 1


@kernel
def _reduce_windows(x, ratio, dead, a, low, counted_down, counted_across, first_image, x_numbers, x_begin, a_numbers, a_begin, rows,
                    columns, height, width, kernel_down, kernel_right, stride_down, stride_right, top, left, numbers, count, maximum,
                    features, relevance):
    at = cuda.grid(1)
    if at >= count:
        return
    n, i = split(at, numbers)
    rest, column = split(i, columns)
    k, row = split(rest, rows)
    plane = n * a_numbers + a_begin + k * height * width
    first_line, first_across = row * stride_down - top, column * stride_right - left
    shift = low[k] if features == BOX else ZERO
    y, z = -_INFINITY if maximum else ZERO, ZERO
    for line in range(max(first_line, 0), min(first_line + kernel_down, height)):
        for across in range(max(first_across, 0), min(first_across + kernel_right, width)):
            value = load(a, plane, line * width + across)
            y = _larger(value, y) if maximum else y + value
            z += positive_feature(value, features, shift, ZERO)
    _write_window(x, ratio, dead, n * x_numbers + x_begin + i, at, first_image + n, y, z, counted_down[row] * counted_across[column],
                  relevance)


@kernel
def _reduce_planes(x, ratio, dead, a, low, counted_down, counted_across, first_image, x_numbers, x_begin, a_numbers, a_begin, channels,
                   places, maximum, features, relevance):
    """One window that holds the whole plane: a warp for each."""
    sums = cuda.shared.array(_WARP, float32)
    features_sums = cuda.shared.array(_WARP, float32)  # of its own line: the simulator tells arrays apart by that
    t, (n, k) = cuda.threadIdx.x, split(cuda.blockIdx.x, channels)
    plane = n * a_numbers + a_begin + k * places
    shift = low[k] if features == BOX else ZERO
    y, z = -_INFINITY if maximum else ZERO, ZERO
    for i in range(t, places, _WARP):
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
        _write_window(x, ratio, dead, n * x_numbers + x_begin + k, cuda.blockIdx.x, first_image + n, sums[0], features_sums[0],
                      counted_down[0] * counted_across[0], relevance)


@kernel
def _give_to_windows(c_in, c, ratio, a, low, in_numbers, in_begin, c_numbers, c_begin, a_numbers, a_begin, rows, columns, height, width,
                     kernel_down, kernel_right, stride_down, stride_right, top, left, numbers, count, features, relevance, accumulate):
    at = cuda.grid(1)
    if at >= count:
        return
    n, i = split(at, numbers)
    k, place = split(i, height * width)
    line, across = split(place, width)
    windows = (n * split(numbers, height * width)[0] + k) * rows * columns
    from_c = n * c_numbers + c_begin + k * rows * columns
    total = ZERO
    for row in range(_first_window(line, kernel_down, stride_down, top), _after_last_window(line, stride_down, top, rows)):
        for column in range(_first_window(across, kernel_right, stride_right, left),
                            _after_last_window(across, stride_right, left, columns)):
            total += load(ratio, windows, row * columns + column) * load(c, from_c, row * columns + column)
    to = n * in_numbers + in_begin + i
    result = redistributed(total, a[n * a_numbers + a_begin + i], features, low[k], ZERO, relevance)
    c_in[to] = result + c_in[to] if accumulate else result


# ---- Launchers ---------------------------------------------------------------------------------------------------------------------------


def max_pool2d_forward(x, winner, a, x_channel, a_channel, kernel_down, kernel_right, stride_down, stride_right, top, left, first, last):
    """x <- the largest number of each window; winner (N, C, OH, OW) int32 <- where in the plane it lies, the first of equals.

    Numbers that rounding may have made unequal count as equal: else in an evenly coloured area noise would pick the winners. Units are
    channels of images.
    """
    image, behind = whole_images(first, last, winner.shape[1])
    numbers = math.prod(winner.shape[1:])
    launch_for_each(_find_winners, (behind - image) * numbers, flat(x), flat(winner[image:behind]), flat(a), *place_of(x, x_channel, image),
                    *place_of(a, a_channel, image), *winner.shape[2:], *a.shape[2:], kernel_down, kernel_right, stride_down, stride_right,
                    top, left, numbers, (behind - image) * numbers)


def max_pool2d_redistribute(c_in, c, winner, c_in_channel, c_channel, kernel_down, kernel_right, stride_down, stride_right, top, left,
                            accumulate, first, last):
    """c_in <- c for each window's winner, 0 for the others. Units are channels of images."""
    channels = winner.shape[1]
    image, behind = whole_images(first, last, channels)
    numbers = channels * math.prod(c_in.shape[2:])
    launch_for_each(_give_to_winners, (behind - image) * numbers, flat(c_in), flat(c), flat(winner[image:behind]),
                    *place_of(c_in, c_in_channel, image), *place_of(c, c_channel, image), *winner.shape[2:], *c_in.shape[2:], kernel_down,
                    kernel_right, stride_down, stride_right, top, left, numbers, (behind - image) * numbers, int(accumulate))


def pool2d_forward(x, ratio, dead, a, low, counted_down, counted_across, x_channel, a_channel, kernel_down, kernel_right, stride_down,
                   stride_right, top, left, maximum, features, relevance, first, last):
    """x <- the largest number (if `maximum`) or the mean of each window; ratio <- |x| / z, z the sum of its features.

    The weights of a window are equal and cancel between z and V^T, so they are left out of both. A mean's divisor is counted_down (OH,)
    times counted_across (OW,), which are 1 for a maximum. Units are channels of images.
    """
    channels, rows, columns = ratio.shape[1:]
    height, width = a.shape[2:]
    image, behind = whole_images(first, last, channels)
    numbers = channels * rows * columns
    arrays = (flat(x), flat(ratio[image:behind]), dead, flat(a), low, counted_down, counted_across, image, *place_of(x, x_channel, image),
              *place_of(a, a_channel, image))
    if (rows, columns, kernel_down, kernel_right, top, left) == (1, 1, height, width, 0, 0):
        launch(_reduce_planes, (behind - image) * channels, _WARP, *arrays, channels, height * width, int(maximum), int(features),
               int(relevance))
        return
    launch_for_each(_reduce_windows, (behind - image) * numbers, *arrays, rows, columns, height, width, kernel_down, kernel_right,
                    stride_down, stride_right, top, left, numbers, (behind - image) * numbers, int(maximum), int(features), int(relevance))


def pool2d_redistribute(c_in, c, ratio, a, low, c_in_channel, c_channel, a_channel, kernel_down, kernel_right, stride_down, stride_right,
                        top, left, features, relevance, accumulate, first, last):
    """c_in <- the sum of ratio * c over the windows that hold a number, for the features that it has. Units are channels of images."""
    channels = ratio.shape[1]
    image, behind = whole_images(first, last, channels)
    numbers = channels * math.prod(a.shape[2:])
    launch_for_each(_give_to_windows, (behind - image) * numbers, flat(c_in), flat(c), flat(ratio[image:behind]), flat(a), low,
                    *place_of(c_in, c_in_channel, image), *place_of(c, c_channel, image), *place_of(a, a_channel, image), *ratio.shape[2:],
                    *a.shape[2:], kernel_down, kernel_right, stride_down, stride_right, top, left, numbers, (behind - image) * numbers,
                    int(features), int(relevance), int(accumulate))


def pool2d_redistribute_elements(kernel_size, stride, padding, in_shape, out_shape):
    """Floats of scratch arrays: none are needed."""
    return 0, 0
