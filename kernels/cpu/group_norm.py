"""Layer, group, instance and RMS norm (fastdtd.layers.GroupNorm) as a linear layer, its deviation held constant.

A unit is a row of an image with all its groups (`per_position`: a group is its channels at each position), or a
group of an image. Sums over a group go line by line of positions, side by side in float64 lanes; where a group is all
positions, the lanes are joined at last. sums is flat scratch. Tensors are (N, *, H, W) and used from a given channel
on.

statistics: (N, 2 groups, H, W), or (N, 2 groups, 1, 1) where a group is all positions: means, then one over the
deviations.
"""

import math

import numpy as np
from fastdtd.kernels.codes import FLAT
from fastdtd.kernels.cpu.arrays import as_float64, flat
from fastdtd.kernels.cpu.elementwise import span
from fastdtd.kernels.cpu.jit import kernel
from fastdtd.kernels.cpu.scalar import (
    clip,
    group_norm_derived,
    group_norm_shares,
    group_norm_sum,
    ratio_of,
    redistributed_pair,
)
from fastdtd.kernels.scalar import MIN_DENOMINATOR, ZERO


def group_norm_elements(width):
    """Floats of `sums`."""
    return 2 * 4 * width


@kernel
def _join(lanes):
    total = 0.0
    for value in lanes:
        total += value
    for j in range(len(lanes)):
        lanes[j] = total


@kernel
def group_norm_forward(x, ratio, dead, a, bias, scale, statistics, sums, x_channel, a_channel, groups, per_position,
                       centered, epsilon, features, x_min, x_max, relevance, first, last):
    """x <- the norm of a, clipped to x_min..x_max; ratio <- |x| / z with z the sums of a's features.

    scale, bias: (C,).
    """
    channels, height, width = ratio.shape[1:]
    size, units = channels // groups, height if per_position else groups
    part = 1.0 / (size if per_position else size * height * width)
    flat_x, flat_ratio, flat_a, flat_statistics = flat(x), flat(ratio), flat(a), flat(statistics)
    lanes = as_float64(flat(sums))
    mean, inverse = span(lanes, 0, width), span(lanes, width, width)
    positive, negative = span(lanes, 2 * width, width), span(lanes, 3 * width, width)
    for unit in range(first, last):
        n, place, absorbs = unit // units, unit % units, False
        begin, end = (place, place + 1) if per_position else (0, height)
        for group in range(0 if per_position else place, groups if per_position else place + 1):
            channel = group * size
            for j in range(width):
                mean[j] = inverse[j] = positive[j] = 0.0
            for k in range(channel, channel + size):
                for row in range(begin, end):
                    value = span(flat_a, ((n * a.shape[1] + a_channel + k) * height + row) * width, width)
                    for j in range(width):
                        mean[j] += value[j]
                        positive[j] += max(value[j], ZERO)
            if not per_position:
                _join(mean)
                _join(positive)
            for j in range(width):
                negative[j] = positive[j] - mean[j]
                mean[j] = mean[j] * part if centered else 0.0
            for k in range(channel, channel + size):
                for row in range(begin, end):
                    value = span(flat_a, ((n * a.shape[1] + a_channel + k) * height + row) * width, width)
                    for j in range(width):
                        deviation = value[j] - mean[j]
                        inverse[j] += deviation * deviation
            if not per_position:
                _join(inverse)
            for j in range(width):
                inverse[j] = 1.0 / math.sqrt(inverse[j] * part + epsilon)
            count, at = width if per_position else 1, (group * height + place) * width if per_position else group
            step = height * width if per_position else 1
            means = span(flat_statistics, n * 2 * groups * step + at, count)
            inverses = span(flat_statistics, (n * 2 + 1) * groups * step + at, count)
            for j in range(count):
                means[j], inverses[j] = mean[j], inverse[j]
            for k in range(channel, channel + size):
                for row in range(begin, end):
                    value = span(flat_a, ((n * a.shape[1] + a_channel + k) * height + row) * width, width)
                    out = span(flat_x, ((n * x.shape[1] + x_channel + k) * height + row) * width, width)
                    to_ratio = span(flat_ratio, ((n * channels + k) * height + row) * width, width)
                    for j in range(width):
                        v = scale[k] * inverse[j]
                        made = clip(np.float32(v * (value[j] - mean[j]) + bias[k]), x_min, x_max)
                        z = group_norm_sum(v, value[j], positive[j], negative[j], part, centered, features)
                        r = ratio_of(made, z, MIN_DENOMINATOR, relevance)
                        out[j], to_ratio[j] = made, r
                        absorbs |= r < ZERO
        if absorbs:
            dead[n] = 1


@kernel
def group_norm_redistribute(c_in, c, ratio, a, scale, statistics, low, high, sums, c_in_channel, c_channel, a_channel,
                            groups, per_position, centered, features, weights, relevance, derivative, accumulate,
                            first, last):
    """c_in <- V^T (ratio * c), for the features that an input has, or the derivative, that of the deviation included.

    weights: what V is of W, as fastdtd.kernels.codes names it.
    """
    channels, height, width = ratio.shape[1:]
    size, units = channels // groups, height if per_position else groups
    part = 1.0 / (size if per_position else size * height * width)
    flat_in, flat_c, flat_ratio, flat_a = flat(c_in), flat(c), flat(ratio), flat(a)
    flat_statistics, lanes = flat(statistics), as_float64(flat(sums))
    mean, inverse = span(lanes, 0, width), span(lanes, width, width)
    positive, negative = span(lanes, 2 * width, width), span(lanes, 3 * width, width)
    for unit in range(first, last):
        n, place = unit // units, unit % units
        begin, end = (place, place + 1) if per_position else (0, height)
        for group in range(0 if per_position else place, groups if per_position else place + 1):
            channel, step = group * size, height * width if per_position else 1
            at = n * 2 * groups * step + ((group * height + place) * width if per_position else group)
            for j in range(width):
                source = at + (j if per_position else 0)
                mean[j], inverse[j] = flat_statistics[source], flat_statistics[source + groups * step]
                positive[j] = negative[j] = 0.0
            for k in range(channel, channel + size):
                for row in range(begin, end):
                    factor = span(flat_c, ((n * c.shape[1] + c_channel + k) * height + row) * width, width)
                    r = span(flat_ratio, ((n * channels + k) * height + row) * width, width)
                    value = span(flat_a, ((n * a.shape[1] + a_channel + k) * height + row) * width, width)
                    for j in range(width):
                        t = r[j] * factor[j]
                        if derivative:
                            g = np.float64(scale[k] * t)
                            positive[j] += g
                            negative[j] += g * ((value[j] - mean[j]) * inverse[j])
                        elif weights == FLAT:
                            positive[j] += t
                        else:
                            v = scale[k] * inverse[j]
                            positive[j] += max(v, ZERO) * t
                            negative[j] += max(-v, ZERO) * t
            if not per_position:
                _join(positive)
                _join(negative)
            for k in range(channel, channel + size):
                for row in range(begin, end):
                    factor = span(flat_c, ((n * c.shape[1] + c_channel + k) * height + row) * width, width)
                    r = span(flat_ratio, ((n * channels + k) * height + row) * width, width)
                    value = span(flat_a, ((n * a.shape[1] + a_channel + k) * height + row) * width, width)
                    out = span(flat_in, ((n * c_in.shape[1] + c_in_channel + k) * height + row) * width, width)
                    for j in range(width):
                        t = r[j] * factor[j]
                        if derivative:
                            result = group_norm_derived(scale[k] * t, value[j], mean[j], inverse[j], positive[j],
                                                        negative[j], part, centered)
                        else:
                            total, total_neg = group_norm_shares(scale[k] * inverse[j], t, positive[j], negative[j],
                                                                 part, centered, weights)
                            result = redistributed_pair(total, total_neg, value[j], features, low[k], high[k],
                                                        relevance)
                        out[j] = result + out[j] if accumulate else result
