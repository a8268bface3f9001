"""Rules with more than one ratio, or another than |x| / z: how ratios follow from a layer's sums.

The formulas are in kernels/cpu/formulas.py. A thread has one output.
"""

import math

import numpy as np
from fastdtd.kernels.codes import ALPHA_BETA, DIRECTION, EPSILON, GAMMA, GRADIENT, IGNORED, SHARED, SIGNS
from fastdtd.kernels.cuda.elementwise import LEAST, SUMMING_THREADS, finish, flat, place_of, sum_of_block, whole_images
from fastdtd.kernels.cuda.jit import kernel, launch, launch_for_each, part
from fastdtd.kernels.cuda.vector_code import split
from numba import cuda, float64

_ZERO = np.float32(0)
_ONE = np.float32(1)
_ROUNDING = np.float32(1e-6)  # of P: a smaller Q, which is found as P - t, is what rounding left


# ---- Kernels -----------------------------------------------------------------------------------------------------------------------------


@part
def _over(number, z, epsilon):
    """number / z, z moved away from zero by epsilon."""
    z += epsilon if z >= _ZERO else -epsilon
    return number / z if abs(z) > LEAST else _ZERO


@part
def _sum_of(ratio):
    """z, from what ratio_of made of it for relevance."""
    return _ONE / ratio if ratio > _ZERO else _ZERO


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
    y = t + bias[k]
    value = finish(y, least, most)
    share = _ONE if relevance else abs(value)
    x[at_x] = value
    if formula == SIGNS:
        p = _sum_of(one[at])
        q = p - t * count
        to_one = _ZERO if value < _ZERO else share / p if p > LEAST else -share
        to_other = _ZERO if value >= _ZERO else share / q if q > max(_ROUNDING * p, LEAST) else -share
        one[at] = to_one
        other[at] = to_other
        if to_one < _ZERO:
            dead[first_image + n] = 1
        if to_other < _ZERO:
            other_dead[first_image + n] = 1
        return
    is_part = kept != IGNORED and (kept != SHARED or even[at] > _ZERO)  # some windows hold padding only
    b = bias[k] if is_part else _ZERO
    b_for, b_against = max(b, _ZERO), max(-b, _ZERO)
    of_bias = _ZERO
    remains = _ZERO
    if formula == EPSILON:
        s = _over(share, t + b, epsilon)
        of_bias = b * s
        remains = share - t * s
        one[at] = s / count
    elif formula == ALPHA_BETA:
        p = _sum_of(one[at])
        q = _sum_of(other[at]) if beta > _ZERO else _ZERO
        s_for = _over(share * factor, p + b_for, epsilon)
        s_against = _over(share * beta, q + b_against, epsilon)
        of_bias = b_for * s_for - b_against * s_against
        remains = share - (p * s_for - q * s_against)
        one[at] = s_for
        if beta > _ZERO:
            other[at] = -s_against
    elif formula == GAMMA:
        p = _sum_of(one[at])
        q, sign = max(p - t, _ZERO), t + b
        more_for = factor if sign > _ZERO else _ZERO
        more_against = factor if sign < _ZERO else _ZERO
        z = sign + more_for * (p + b_for) - more_against * (q + b_against)
        s = _over(share, z, epsilon) if sign != _ZERO else _ZERO
        of_bias = (b + more_for * b_for - more_against * b_against) * s
        remains = share - (t + more_for * p - more_against * q) * s
        one[at] = (_ONE + more_for) * s
        other[at] = -(_ONE + more_against) * s
    elif formula == DIRECTION:
        z = one[at]
        shares = abs(z) > LEAST
        one[at] = share / z if shares else _ZERO
        lost[at] = _ZERO if shares else share
    elif formula == GRADIENT:
        one[at] = (_ONE if least < y < most else _ZERO) / count
    if formula in (EPSILON, ALPHA_BETA, GAMMA):
        if kept == SHARED:
            even[at] *= of_bias
            remains -= of_bias
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
        factor = c[n * c_numbers + c_begin + i]
        out[first + at] = factor if relevance else abs(x[n * x_numbers + x_begin + i]) * factor


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
