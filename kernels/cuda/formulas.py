"""Rules with more than one ratio, or another than |x| / z: how ratios follow from a layer's sums.

The formulas are in kernels/scalar.py. A thread has one output.
"""

import math

import numpy as np
from fastdtd.kernels.codes import SIGNS
from fastdtd.kernels.cuda.elementwise import SUMMING_THREADS, flat, location, sum_of_block, whole_images
from fastdtd.kernels.cuda.jit import kernel, launch, launch_for_each
from fastdtd.kernels.cuda.scalar import clip, relevance_of, rule_ratios, rule_writes, signs_ratios
from fastdtd.kernels.cuda.vector_code import split
from fastdtd.kernels.scalar import ZERO
from numba import cuda, float64

# ---- Kernels ---------------------------------------------------------------------------------------------------------


@kernel
def _ratios(x, ratio_pos, ratio_neg, ratio_bias, absorbed, dead, dead_neg, bias, count_h, count_w, first_image,
            x_elements, x_begin, positions, width, elements, total, formula, factor, beta, epsilon, bias_mode, x_min,
            x_max, relevance):
    at = cuda.grid(1)
    if at >= total:
        return
    n, i = split(at, elements)
    (k, position), at_x = split(i, positions), n * x_elements + x_begin + i
    row, column = split(position, width)
    at += first_image * elements
    t, count = x[at_x], count_h[row] * count_w[column]
    if formula == SIGNS:
        value = clip(t + bias[k], x_min, x_max)
        new_pos, new_neg = signs_ratios(value, t * count, ratio_pos[at], relevance)
        x[at_x], ratio_pos[at], ratio_neg[at] = value, new_pos, new_neg
        if new_pos < ZERO:
            dead[first_image + n] = 1
        if new_neg < ZERO:
            dead_neg[first_image + n] = 1
        return
    x[at_x], ratio_pos[at], new_neg, to_bias, new_absorbed = rule_ratios(
        formula, t, bias[k], ratio_pos[at], ratio_neg[at], ratio_bias[at], factor, beta, epsilon, bias_mode,
        x_min, x_max, relevance)
    has_neg, has_bias, has_absorbed, is_for_sum = rule_writes(formula, beta, bias_mode)
    if is_for_sum:
        ratio_pos[at] /= count
    if has_neg:
        ratio_neg[at] = new_neg
    if has_bias:
        ratio_bias[at] *= to_bias
    if has_absorbed:
        absorbed[at] = new_absorbed


@kernel
def _absorb_remainder(ledger, absorbed, c, column, c_elements, c_begin, elements, first):
    n = first + cuda.blockIdx.x
    sums, own = cuda.shared.array(SUMMING_THREADS, float64), np.float64(0)
    for i in range(cuda.threadIdx.x, elements, SUMMING_THREADS):
        own += np.float64(absorbed[n * elements + i]) * np.float64(c[n * c_elements + c_begin + i])
    total = sum_of_block(sums, own)
    if cuda.threadIdx.x == 0:
        ledger[n, column] += total


@kernel
def _relevance(out, x, c, x_elements, x_begin, c_elements, c_begin, first, elements, count, relevance):
    at = cuda.grid(1)
    if at < count:
        n, i = split(at, elements)
        out[first + at] = relevance_of(x[n * x_elements + x_begin + i], c[n * c_elements + c_begin + i], relevance)


# ---- Launchers -------------------------------------------------------------------------------------------------------


def ratios_forward(x, ratio_pos, ratio_neg, ratio_bias, absorbed, dead, dead_neg, bias, count_h, count_w, x_channel,
                   formula, factor, beta, epsilon, bias_mode, x_min, x_max, relevance, first, last):
    """x <- x + bias, clipped to x_min..x_max; ratio_pos, ratio_neg, ratio_bias, absorbed <- of P, of Q, of a SHARED
    bias, and what none of them gets."""
    image, end = whole_images(first, last, ratio_pos.shape[1])
    elements, positions = math.prod(ratio_pos.shape[1:]), math.prod(ratio_pos.shape[2:])
    launch_for_each(_ratios, (end - image) * elements, flat(x), flat(ratio_pos), flat(ratio_neg), flat(ratio_bias),
                    flat(absorbed), dead, dead_neg, bias, count_h, count_w, image, *location(x, x_channel, image),
                    positions, ratio_pos.shape[3], elements, (end - image) * elements, int(formula), np.float32(factor),
                    np.float32(beta), np.float32(epsilon), int(bias_mode), np.float32(x_min), np.float32(x_max),
                    int(relevance))


def absorb_remainder_redistribute(ledger, absorbed, c, column, c_channel, first, last):
    """ledger[n, column] += what stabilisers and biases absorb of relevance c. Units are images."""
    launch(_absorb_remainder, last - first, SUMMING_THREADS, ledger, flat(absorbed), flat(c), column,
           *location(c, c_channel, 0), math.prod(absorbed.shape[1:]), first)


def relevance_redistribute(out, x, c, x_channel, c_channel, relevance, first, last):
    """out (N, C, H, W) <- the relevance of x, |x| c, or c where that is relevance itself. Units are images."""
    elements = math.prod(out.shape[1:])
    launch_for_each(_relevance, (last - first) * elements, flat(out), flat(x), flat(c), *location(x, x_channel, first),
                    *location(c, c_channel, first), first * elements, elements, (last - first) * elements,
                    int(relevance))
