"""Rules with more than one ratio, or another than |x| / z: how ratios follow from a layer's sums.

The formulas are in kernels/scalar.py. A thread has one output.
"""

import math

import numpy as np
from fastdtd.kernels.codes import SIGNS
from fastdtd.kernels.cuda.elementwise import SUMMING_THREADS, flat, place_of, sum_of_block, whole_images
from fastdtd.kernels.cuda.jit import kernel, launch, launch_for_each
from fastdtd.kernels.cuda.scalar import clip, relevance_of, rule_ratios, rule_writes, signs_ratios
from fastdtd.kernels.cuda.vector_code import split
from fastdtd.kernels.scalar import ZERO
from numba import cuda, float64

# ---- Kernels -----------------------------------------------------------------------------------------------------------------------------


@kernel
def _ratios(x, one, other, even, lost, dead, other_dead, bias, counted_down, counted_across, first_image, x_numbers, x_begin, places, width,
            numbers, total, formula, factor, beta, epsilon, kept, least, most, relevance):
    at = cuda.grid(1)
    if at >= total:
        return
    n, i = split(at, numbers)
    (k, place), at_x = split(i, places), n * x_numbers + x_begin + i
    row, column = split(place, width)
    at += first_image * numbers
    t, count = x[at_x], counted_down[row] * counted_across[column]
    if formula == SIGNS:
        value = clip(t + bias[k], least, most)
        to_one, to_other = signs_ratios(value, t * count, one[at], relevance)
        x[at_x], one[at], other[at] = value, to_one, to_other
        if to_one < ZERO:
            dead[first_image + n] = 1
        if to_other < ZERO:
            other_dead[first_image + n] = 1
        return
    x[at_x], one[at], to_other, of_bias, remains = rule_ratios(
        formula, t, bias[k], count, one[at], other[at], even[at], factor, beta, epsilon, kept, least, most, relevance)
    has_other, has_even, has_lost = rule_writes(formula, beta, kept)
    if has_other:
        other[at] = to_other
    if has_even:
        even[at] *= of_bias
    if has_lost:
        lost[at] = remains


@kernel
def _lose(ledger, lost, c, column, c_numbers, c_begin, numbers, first):
    n = first + cuda.blockIdx.x
    sums, own = cuda.shared.array(SUMMING_THREADS, float64), np.float64(0)
    for i in range(cuda.threadIdx.x, numbers, SUMMING_THREADS):
        own += np.float64(lost[n * numbers + i]) * np.float64(c[n * c_numbers + c_begin + i])
    total = sum_of_block(sums, own)
    if cuda.threadIdx.x == 0:
        ledger[n, column] += total


@kernel
def _observe(out, x, c, x_numbers, x_begin, c_numbers, c_begin, first, numbers, count, relevance):
    at = cuda.grid(1)
    if at < count:
        n, i = split(at, numbers)
        out[first + at] = relevance_of(x[n * x_numbers + x_begin + i], c[n * c_numbers + c_begin + i], relevance)


# ---- Launchers ---------------------------------------------------------------------------------------------------------------------------


def ratios_forward(x, one, other, even, lost, dead, other_dead, bias, counted_down, counted_across, x_channel, formula, factor, beta,
                   epsilon, kept, least, most, relevance, first, last):
    """x <- x + bias, clipped to least..most; one, other, even, lost <- the ratios of P, of Q and of a SHARED bias, and what is lost.

    x holds t. one, other, even hold 1 / P, 1 / Q and 1 / (number of inputs) where the formula asks for them, and are the same array
    where it does not. factor is alpha or gamma. counted_down (OH,) and counted_across (OW,): their product divides a mean. dead and
    other_dead as in ratio_of. Units are channels of images.
    """
    image, behind = whole_images(first, last, one.shape[1])
    numbers, places = math.prod(one.shape[1:]), math.prod(one.shape[2:])
    launch_for_each(_ratios, (behind - image) * numbers, flat(x), flat(one), flat(other), flat(even), flat(lost), dead, other_dead, bias,
                    counted_down, counted_across, image, *place_of(x, x_channel, image), places, one.shape[3], numbers,
                    (behind - image) * numbers, int(formula), np.float32(factor), np.float32(beta), np.float32(epsilon), int(kept),
                    np.float32(least), np.float32(most), int(relevance))


def lose_redistribute(ledger, lost, c, column, c_channel, first, last):
    """ledger[n, column] += what stabilisers and biases keep of relevance c. Units are images."""
    launch(_lose, last - first, SUMMING_THREADS, ledger, flat(lost), flat(c), column, *place_of(c, c_channel, 0),
           math.prod(lost.shape[1:]), first)


def observe_redistribute(out, x, c, x_channel, c_channel, relevance, first, last):
    """out (N, C, H, W) <- the relevance of x, |x| c, or c where that is relevance itself. Units are images."""
    numbers = math.prod(out.shape[1:])
    launch_for_each(_observe, (last - first) * numbers, flat(out), flat(x), flat(c), *place_of(x, x_channel, first),
                    *place_of(c, c_channel, first), first * numbers, numbers, (last - first) * numbers, int(relevance))
