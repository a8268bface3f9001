"""Layer, group, instance and RMS norm. A thread has a group at one position, or a block one at all positions.
Parameters as in kernels/cpu/group_norm.py.
"""

import math

import numpy as np
from fastdtd.kernels.codes import FLAT
from fastdtd.kernels.cuda.elementwise import SUMMING_THREADS, flat, location, sum_of_block, whole_images
from fastdtd.kernels.cuda.jit import kernel, launch, launch_for_each, part
from fastdtd.kernels.cuda.scalar import (
    clip,
    group_norm_derived,
    group_norm_shares,
    group_norm_sum,
    ratio_of,
    redistributed_pair,
)
from fastdtd.kernels.scalar import MIN_DENOMINATOR, ZERO
from numba import cuda, float64

# ---- Kernels ---------------------------------------------------------------------------------------------------------


@part
def _group(positions, groups, size, per_position):
    """Which group of which image is this thread's, where its first element lies in the image, that of its statistics
    among the image's, and how far its elements are from one to the next."""
    if per_position:
        at = cuda.grid(1)
        cell, position = at // positions, at % positions
        n, group = cell // groups, cell % groups
        return n, group, group * size * positions + position, group * positions + position, positions
    n, group = cuda.blockIdx.x // groups, cuda.blockIdx.x % groups
    return n, group, group * size * positions, group, 1


@kernel
def _norm(x, ratio, dead, a, bias, scale, statistics, first_image, x_elements, x_begin, a_elements, a_begin, groups,
          size, positions, count, per_position, centered, epsilon, features, x_min, x_max, relevance):
    sums = cuda.shared.array(SUMMING_THREADS, float64)
    if per_position and cuda.grid(1) >= count:
        return
    n, group, begin, place, step = _group(positions, groups, size, per_position)
    thread, threads = (0, 1) if per_position else (cuda.threadIdx.x, SUMMING_THREADS)
    elements = size if per_position else size * positions
    fraction, source = np.float64(1) / elements, n * a_elements + a_begin + begin
    total, positive = np.float64(0), np.float64(0)
    for i in range(thread, elements, threads):
        value = a[source + i * step]
        total += value
        positive += max(value, ZERO)
    if not per_position:
        total, positive = sum_of_block(sums, total), sum_of_block(sums, positive)
    negative, mean, squares = positive - total, np.float64(0), np.float64(0)
    if centered:
        mean = total * fraction
    for i in range(thread, elements, threads):
        deviation = a[source + i * step] - mean
        squares += deviation * deviation
    if not per_position:
        squares = sum_of_block(sums, squares)
    inverse = np.float64(1) / math.sqrt(squares * fraction + np.float64(epsilon))
    if thread == 0:
        cells = groups * (positions if per_position else 1)
        statistics[2 * n * cells + place] = np.float32(mean)
        statistics[(2 * n + 1) * cells + place] = np.float32(inverse)
    for i in range(thread, elements, threads):
        k = group * size + (i if per_position else i // positions)
        value, v = a[source + i * step], scale[k] * inverse
        made = clip(np.float32(v * (value - mean) + bias[k]), x_min, x_max)
        z = group_norm_sum(v, value, positive, negative, fraction, centered, features)
        own_ratio = ratio_of(made, z, MIN_DENOMINATOR, relevance)
        x[n * x_elements + x_begin + begin + i * step] = made
        ratio[n * groups * size * positions + begin + i * step] = own_ratio
        if own_ratio < ZERO:
            dead[first_image + n] = 1


@kernel
def _redistribute(c_in, c, ratio, a, scale, statistics, low, high, in_elements, in_begin, c_elements, c_begin,
                  a_elements, a_begin, groups, size, positions, count, per_position, centered, features, weights,
                  relevance, derivative, accumulate):
    sums = cuda.shared.array(SUMMING_THREADS, float64)
    if per_position and cuda.grid(1) >= count:
        return
    n, group, begin, place, step = _group(positions, groups, size, per_position)
    thread, threads = (0, 1) if per_position else (cuda.threadIdx.x, SUMMING_THREADS)
    elements, cells = size if per_position else size * positions, groups * (positions if per_position else 1)
    fraction = np.float64(1) / elements
    mean = np.float64(statistics[2 * n * cells + place])
    inverse = np.float64(statistics[(2 * n + 1) * cells + place])
    of_a, of_c = n * a_elements + a_begin + begin, n * c_elements + c_begin + begin
    of_ratio, to = n * groups * size * positions + begin, n * in_elements + in_begin + begin
    positive, negative = np.float64(0), np.float64(0)
    for i in range(thread, elements, threads):
        k = group * size + (i if per_position else i // positions)
        t = ratio[of_ratio + i * step] * c[of_c + i * step]
        if derivative:
            g = np.float64(scale[k] * t)
            positive += g
            negative += g * ((a[of_a + i * step] - mean) * inverse)
        elif weights == FLAT:
            positive += t
        else:
            v = scale[k] * inverse
            positive += max(v, ZERO) * t
            negative += max(-v, ZERO) * t
    if not per_position:
        positive, negative = sum_of_block(sums, positive), sum_of_block(sums, negative)
    for i in range(thread, elements, threads):
        k = group * size + (i if per_position else i // positions)
        value, t = a[of_a + i * step], ratio[of_ratio + i * step] * c[of_c + i * step]
        if derivative:
            result = group_norm_derived(scale[k] * t, value, mean, inverse, positive, negative, fraction, centered)
        else:
            total, total_neg = group_norm_shares(scale[k] * inverse, t, positive, negative, fraction, centered, weights)
            result = redistributed_pair(total, total_neg, value, features, low[k], high[k], relevance)
        c_in[to + i * step] = result + c_in[to + i * step] if accumulate else result


# ---- Launchers: units as on processors -------------------------------------------------------------------------------


def group_norm_elements(width):
    """Floats of `sums`, of which there are none."""
    return 0


def _launch(function, ratio, groups, per_position, first, last, arguments_of):
    """arguments_of(image, end): those before and after the sizes of groups."""
    channels, height, width = ratio.shape[1:]
    image, end = whole_images(first, last, height if per_position else groups)
    before, after = arguments_of(image, end)
    cells = (end - image) * groups * (height * width if per_position else 1)
    sizes = groups, channels // groups, height * width, cells, int(per_position)
    if per_position:
        launch_for_each(function, cells, *before, *sizes, *after)
    else:
        launch(function, cells, SUMMING_THREADS, *before, *sizes, *after)


def group_norm_forward(x, ratio, dead, a, bias, scale, statistics, x_channel, a_channel, groups, per_position, centered,
                       epsilon, features, x_min, x_max, relevance, first, last):
    """x <- the norm of a, clipped to x_min..x_max; ratio <- |x| / z with z the sums of a's features."""
    def arguments_of(image, end):
        before = (flat(x), flat(ratio[image:end]), dead, flat(a), bias, scale, flat(statistics[image:end]), image,
                  *location(x, x_channel, image), *location(a, a_channel, image))
        after = (int(centered), np.float32(epsilon), features, np.float32(x_min), np.float32(x_max), int(relevance))
        return before, after

    _launch(_norm, ratio, groups, per_position, first, last, arguments_of)


def group_norm_redistribute(c_in, c, ratio, a, scale, statistics, low, high, c_in_channel, c_channel, a_channel, groups,
                            per_position, centered, features, weights, relevance, derivative, accumulate, first, last):
    """c_in <- V^T (ratio * c), for the features that an input has, or the derivative, the deviation's included."""
    def arguments_of(image, end):
        before = (flat(c_in), flat(c), flat(ratio[image:end]), flat(a), scale, flat(statistics[image:end]), low, high,
                  *location(c_in, c_in_channel, image), *location(c, c_channel, image), *location(a, a_channel, image))
        return before, (int(centered), features, weights, int(relevance), int(derivative), int(accumulate))

    _launch(_redistribute, ratio, groups, per_position, first, last, arguments_of)
