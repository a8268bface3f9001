"""Resizing: a thread has one output in the forward pass, and one input in the backward pass. Parameters as in
kernels/cpu/resize.py.
"""

import math

import numpy as np
from fastdtd.kernels.cuda.elementwise import flat, location, whole_images
from fastdtd.kernels.cuda.jit import kernel, launch_for_each
from fastdtd.kernels.cuda.scalar import clip, positive_feature, ratio_of, redistributed
from fastdtd.kernels.cuda.vector_code import load, split
from fastdtd.kernels.scalar import MIN_DENOMINATOR, ZERO
from numba import cuda


@kernel
def _resize(x, ratio, dead, a, low, high, row_starts, row_sources, row_weights, row_v, column_starts, column_sources,
            column_weights, column_v, first_image, x_elements, x_begin, a_elements, a_begin, height, across, rows,
            width, elements, count, features, x_min, x_max, relevance):
    at = cuda.grid(1)
    if at >= count:
        return
    n, i = split(at, elements)
    rest, column = split(i, across)
    k, row = split(rest, height)
    plane = n * a_elements + a_begin + k * rows * width
    total, z = ZERO, ZERO
    for t in range(column_starts[column], column_starts[column + 1]):
        own, own_z = ZERO, ZERO
        for s in range(row_starts[row], row_starts[row + 1]):
            value = load(a, plane, row_sources[s] * width + column_sources[t])
            own += row_weights[s] * value
            own_z += row_v[s] * positive_feature(value, features, low[k], high[k])
        total += column_weights[t] * own
        z += column_v[t] * own_z
    total = clip(total, x_min, x_max)
    own_ratio = ratio_of(total, z, MIN_DENOMINATOR, relevance)
    x[n * x_elements + x_begin + i] = total
    ratio[at] = own_ratio
    if own_ratio < ZERO:
        dead[first_image + n] = 1


@kernel
def _redistribute(c_in, c, ratio, a, low, high, row_starts, row_sources, row_v, column_starts, column_sources, column_v,
                  in_elements, in_begin, c_elements, c_begin, a_elements, a_begin, height, across, rows, width,
                  elements, count, features, relevance, accumulate):
    at = cuda.grid(1)
    if at >= count:
        return
    n, i = split(at, elements)
    rest, column = split(i, width)
    k, row = split(rest, rows)
    outputs = (n * split(elements, rows * width)[0] + k) * height * across
    from_c = n * c_elements + c_begin + k * height * across
    total = ZERO
    for t in range(column_starts[column], column_starts[column + 1]):
        own = ZERO
        for s in range(row_starts[row], row_starts[row + 1]):
            position = row_sources[s] * across + column_sources[t]
            own += row_v[s] * (load(ratio, outputs, position) * load(c, from_c, position))
        total += column_v[t] * own
    to = n * in_elements + in_begin + i
    result = redistributed(total, a[n * a_elements + a_begin + i], features, low[k], high[k], relevance)
    c_in[to] = result + c_in[to] if accumulate else result


def resize_forward(x, ratio, dead, a, low, high, row_starts, row_sources, row_weights, row_v, column_starts,
                   column_sources, column_weights, column_v, x_channel, a_channel, features, x_min, x_max, relevance,
                   first, last):
    """x <- the weighted sums of a, clipped to x_min..x_max; ratio <- |x| / z with z the sums of a's features, by the
    weights v."""
    image, end = whole_images(first, last, ratio.shape[1])
    elements = math.prod(ratio.shape[1:])
    launch_for_each(_resize, (end - image) * elements, flat(x), flat(ratio[image:end]), dead, flat(a), low, high,
                    row_starts, row_sources, row_weights, row_v, column_starts, column_sources, column_weights,
                    column_v, image, *location(x, x_channel, image), *location(a, a_channel, image), *ratio.shape[2:],
                    *a.shape[2:], elements, (end - image) * elements, int(features), np.float32(x_min),
                    np.float32(x_max), int(relevance))


def resize_redistribute(c_in, c, ratio, a, low, high, row_starts, row_sources, row_v, column_starts, column_sources,
                        column_v, c_in_channel, c_channel, a_channel, features, relevance, accumulate, first, last):
    """c_in <- V^T (ratio * c), for the features that an input has. The lists are those of the transposed weights."""
    channels = ratio.shape[1]
    image, end = whole_images(first, last, channels)
    elements = channels * math.prod(a.shape[2:])
    launch_for_each(_redistribute, (end - image) * elements, flat(c_in), flat(c), flat(ratio[image:end]), flat(a), low,
                    high, row_starts, row_sources, row_v, column_starts, column_sources, column_v,
                    *location(c_in, c_in_channel, image), *location(c, c_channel, image),
                    *location(a, a_channel, image), *ratio.shape[2:], *a.shape[2:], elements, (end - image) * elements,
                    int(features), int(relevance), int(accumulate))


def resize_elements(in_width, out_width):
    """Floats of scratch: none are needed."""
    return 0
