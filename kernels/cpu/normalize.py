"""Local response normalisation, x = a (bias + alpha * sum of a^2)^-beta, and the ways back through it.

The sum is over the channels from `before` before to `behind` behind, or over as many rows and columns of the same channel if `within`.
Tensors are (N, *, H, W) and used from a given channel on.
"""

import math

import numpy as np
from fastdtd.kernels.codes import NORM_TAYLOR
from fastdtd.kernels.cpu.elementwise import run, together_from
from fastdtd.kernels.cpu.jit import kernel
from fastdtd.kernels.cpu.scalar import norm_passed, norm_scale, norm_terms
from fastdtd.kernels.scalar import ZERO


@kernel
def _add_squares(sums, value):
    for i in range(len(sums)):
        sums[i] += value[i] * value[i]


@kernel
def normalize_forward(x, ratio, a, x_channel, a_channel, before, behind, within, alpha, beta, bias, first, last):
    """x <- a * ratio, ratio <- (bias + alpha * sum of a^2)^-beta. Units are rows of images.

    The sum is over the channels from `before` before to `behind` behind, or over as many rows and columns if `within`.
    """
    channels, height, width = ratio.shape[1:]
    places = height * width
    flat_x, flat_ratio, flat_a = x.reshape(x.size), ratio.reshape(ratio.size), a.reshape(a.size)
    for unit in range(first, last):
        n, row = unit // height, unit % height
        for k in range(channels):
            scale = run(flat_ratio, (n * channels + k) * places + row * width, width)
            for i in range(width):
                scale[i] = ZERO
            around, end = (row, height) if within else (k, channels)
            for j in range(max(around - before, 0), min(around + behind + 1, end)):
                channel, line = (k, j) if within else (j, row)
                value = run(flat_a, (n * a.shape[1] + a_channel + channel) * places + line * width, width)
                for shift in range(-before if within else 0, behind + 1 if within else 1):
                    left, right = max(-shift, 0), width - max(shift, 0)
                    if left < right:
                        _add_squares(run(scale, left, right - left), run(value, left + shift, right - left))
            own = run(flat_a, (n * a.shape[1] + a_channel + k) * places + row * width, width)
            out = run(flat_x, (n * x.shape[1] + x_channel + k) * places + row * width, width)
            for i in range(width):
                scale[i] = norm_scale(scale[i], alpha, beta, bias)
            for i in range(width):
                out[i] = own[i] * scale[i]


@kernel
def normalize_redistribute(c_in, c, ratio, c_in_channel, c_channel, relevance, accumulate, first, last):
    """Relevance passes: c_in <- c * ratio, for |x| c = |a| ratio c; relevance itself as it is. Units are channels of images."""
    channels, places = ratio.shape[1], ratio.shape[2] * ratio.shape[3]
    flat_in, flat_c, flat_ratio = c_in.reshape(c_in.size), c.reshape(c.size), ratio.reshape(ratio.size)
    unit = first
    while unit < last:
        n, k = unit // channels, unit % channels
        together = together_from(unit, last, channels)
        count = together * places
        out = run(flat_in, (n * c_in.shape[1] + c_in_channel + k) * places, count)
        factor, scale = run(flat_c, (n * c.shape[1] + c_channel + k) * places, count), run(flat_ratio, unit * places, count)
        for i in range(count):
            result = norm_passed(factor[i], scale[i], relevance)
            out[i] = result + out[i] if accumulate else result
        unit += together


@kernel
def _add_around(sums, terms, k, row, channels, height, width, before, behind, within):
    """sums (W,) += for a row of channel k the terms (C, H, W) of all whose window holds a number."""
    around, end = (row, height) if within else (k, channels)
    for j in range(max(around - behind, 0), min(around + before + 1, end)):
        channel, line = (k, j) if within else (j, row)
        value = run(terms, (channel * height + line) * width, width)
        for shift in range(-behind if within else 0, before + 1 if within else 1):
            left, right = max(-shift, 0), width - max(shift, 0)
            for i in range(left, right):
                sums[i] += value[i + shift]


def normalize_shares_elements(images, shape):
    """Floats of the scratch array of normalize_shares_redistribute, which takes one image after the other."""
    return 2 * math.prod(shape) + shape[2]


@kernel
def normalize_shares_redistribute(c_in, ledger, c, ratio, a, scratch, column, c_in_channel, c_channel, a_channel, before, behind, within,
                                  alpha, beta, bias, formula, epsilon, accumulate, first, last):
    """The derivative of the normalisation times c or, under NORM_TAYLOR, relevance c in proportion to its expansion (scalar.norm_terms).

    What epsilon absorbs there goes to ledger[n, column]. scratch holds normalize_shares_elements. Units are images.
    """
    channels, height, width = ratio.shape[1:]
    size, taylor = channels * height * width, formula == NORM_TAYLOR
    flat_in, flat_c, flat_ratio, flat_a = c_in.reshape(c_in.size), c.reshape(c.size), ratio.reshape(ratio.size), a.reshape(a.size)
    terms, own, sums = run(scratch, 0, size), run(scratch, size, size), run(scratch, 2 * size, width)
    for n in range(first, last):
        out = run(flat_in, (n * c_in.shape[1] + c_in_channel) * height * width, size)
        factor, value = run(flat_c, (n * c.shape[1] + c_channel) * height * width, size), run(
            flat_a, (n * a.shape[1] + a_channel) * height * width, size)
        scale = run(flat_ratio, n * size, size)
        lost = np.float64(0)
        for i in range(size):
            terms[i], own[i], kept = norm_terms(value[i], scale[i], factor[i], alpha, beta, bias, taylor, epsilon)
            lost += kept
        for k in range(channels):
            for row in range(height):
                at = (k * height + row) * width
                for i in range(width):
                    sums[i] = ZERO
                _add_around(sums, terms, k, row, channels, height, width, before, behind, within)
                for i in range(width):
                    weight = value[at + i] * value[at + i] if taylor else value[at + i]
                    result = own[at + i] + weight * sums[i]
                    out[at + i] = result + out[at + i] if accumulate else result
        if taylor:
            ledger[n, column] += lost
