"""Local response normalisation, x = a (bias + alpha * sum of a^2)^-beta, and its backward passes.

The sum is over the channels from `before` before to `after` after, or over as many rows and columns of the same channel
if `within_channel`. Tensors are (N, *, H, W) and used from a given channel on.
"""

import math

import numpy as np
from fastdtd.kernels.codes import NORM_TAYLOR
from fastdtd.kernels.cpu.arrays import flat
from fastdtd.kernels.cpu.elementwise import channels_in_span, span
from fastdtd.kernels.cpu.jit import kernel
from fastdtd.kernels.cpu.scalar import norm_passed, norm_scale, norm_terms
from fastdtd.kernels.scalar import ZERO


@kernel
def _add_squares(sums, value):
    for i in range(len(sums)):
        sums[i] += value[i] * value[i]


@kernel
def normalize_forward(x, ratio, a, x_channel, a_channel, before, after, within_channel, alpha, beta, bias, first, last):
    """x <- a * ratio, ratio <- (bias + alpha * sum of a^2)^-beta. Units are rows of images.

    The sum is over the channels from `before` before to `after` after, or over as many rows and columns if
    `within_channel`.
    """
    channels, height, width = ratio.shape[1:]
    positions = height * width
    flat_x, flat_ratio, flat_a = flat(x), flat(ratio), flat(a)
    for unit in range(first, last):
        n, row = unit // height, unit % height
        for k in range(channels):
            scale = span(flat_ratio, (n * channels + k) * positions + row * width, width)
            for i in range(width):
                scale[i] = ZERO
            around, end = (row, height) if within_channel else (k, channels)
            for j in range(max(around - before, 0), min(around + after + 1, end)):
                channel, line = (k, j) if within_channel else (j, row)
                value = span(flat_a, (n * a.shape[1] + a_channel + channel) * positions + line * width, width)
                for shift in range(-before if within_channel else 0, after + 1 if within_channel else 1):
                    left, right = max(-shift, 0), width - max(shift, 0)
                    if left < right:
                        _add_squares(span(scale, left, right - left), span(value, left + shift, right - left))
            own = span(flat_a, (n * a.shape[1] + a_channel + k) * positions + row * width, width)
            out = span(flat_x, (n * x.shape[1] + x_channel + k) * positions + row * width, width)
            for i in range(width):
                scale[i] = norm_scale(scale[i], alpha, beta, bias)
            for i in range(width):
                out[i] = own[i] * scale[i]


@kernel
def normalize_redistribute(c_in, c, ratio, c_in_channel, c_channel, relevance, accumulate, first, last):
    """Relevance passes: c_in <- c * ratio, for |x| c = |a| ratio c; relevance itself as it is."""
    channels, positions = ratio.shape[1], ratio.shape[2] * ratio.shape[3]
    flat_in, flat_c, flat_ratio = flat(c_in), flat(c), flat(ratio)
    unit = first
    while unit < last:
        n, k = unit // channels, unit % channels
        channel_count = channels_in_span(unit, last, channels)
        count = channel_count * positions
        out = span(flat_in, (n * c_in.shape[1] + c_in_channel + k) * positions, count)
        factor = span(flat_c, (n * c.shape[1] + c_channel + k) * positions, count)
        scale = span(flat_ratio, unit * positions, count)
        for i in range(count):
            result = norm_passed(factor[i], scale[i], relevance)
            out[i] = result + out[i] if accumulate else result
        unit += channel_count


@kernel
def _add_around(sums, terms, k, row, channels, height, width, before, after, within_channel):
    """sums (W,) += for a row of channel k the terms (C, H, W) of all whose window holds a value."""
    around, end = (row, height) if within_channel else (k, channels)
    for j in range(max(around - after, 0), min(around + before + 1, end)):
        channel, line = (k, j) if within_channel else (j, row)
        value = span(terms, (channel * height + line) * width, width)
        for shift in range(-after if within_channel else 0, before + 1 if within_channel else 1):
            left, right = max(-shift, 0), width - max(shift, 0)
            for i in range(left, right):
                sums[i] += value[i + shift]


def normalize_taylor_elements(images, shape):
    """Floats of the scratch array of normalize_taylor_redistribute, which takes one image after the other."""
    return 2 * math.prod(shape) + shape[2]


@kernel
def normalize_taylor_redistribute(c_in, ledger, c, ratio, a, scratch, column, c_in_channel, c_channel, a_channel,
                                  before, after, within_channel, alpha, beta, bias, formula, epsilon, accumulate, first,
                                  last):
    """The derivative of the normalisation times c or, under NORM_TAYLOR, relevance c in proportion to its expansion
    (scalar.norm_terms).

    What epsilon absorbs there goes to ledger[n, column]. scratch holds normalize_taylor_elements. Units are images.
    """
    channels, height, width = ratio.shape[1:]
    size, taylor = channels * height * width, formula == NORM_TAYLOR
    flat_in, flat_c, flat_ratio = flat(c_in), flat(c), flat(ratio)
    flat_a = flat(a)
    terms, own, sums = span(scratch, 0, size), span(scratch, size, size), span(scratch, 2 * size, width)
    for n in range(first, last):
        out = span(flat_in, (n * c_in.shape[1] + c_in_channel) * height * width, size)
        factor = span(flat_c, (n * c.shape[1] + c_channel) * height * width, size)
        value = span(flat_a, (n * a.shape[1] + a_channel) * height * width, size)
        scale = span(flat_ratio, n * size, size)
        absorbed = np.float64(0)
        for i in range(size):
            terms[i], own[i], part = norm_terms(value[i], scale[i], factor[i], alpha, beta, bias, taylor, epsilon)
            absorbed += part
        for k in range(channels):
            for row in range(height):
                at = (k * height + row) * width
                for i in range(width):
                    sums[i] = ZERO
                _add_around(sums, terms, k, row, channels, height, width, before, after, within_channel)
                for i in range(width):
                    weight = value[at + i] * value[at + i] if taylor else value[at + i]
                    result = own[at + i] + weight * sums[i]
                    out[at + i] = result + out[at + i] if accumulate else result
        if taylor:
            ledger[n, column] += absorbed
