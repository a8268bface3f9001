"""Local response normalisation: x = a (bias + alpha * sum of a^2)^-beta, over neighbouring channels or places. A thread has one number."""

import math

import numpy as np
from fastdtd.kernels.codes import NORM_TAYLOR
from fastdtd.kernels.cuda.elementwise import SUMMING_THREADS, flat, place_of, sum_of_block, whole_images
from fastdtd.kernels.cuda.jit import kernel, launch, launch_for_each, part
from fastdtd.kernels.cuda.scalar import norm_passed, norm_scale, norm_terms
from fastdtd.kernels.cuda.vector_code import load, split
from fastdtd.kernels.scalar import ZERO
from numba import cuda, float64

# ---- Kernels -----------------------------------------------------------------------------------------------------------------------------


@part
def _sum_around(numbers, begin, k, row, column, channels, height, width, before, behind, within, squared):
    """The sum of numbers (C, H, W from `begin` on), or of their squares, over the neighbours of one."""
    total = ZERO
    if within:
        for y in range(max(row - before, 0), min(row + behind + 1, height)):
            for x in range(max(column - before, 0), min(column + behind + 1, width)):
                value = load(numbers, begin, (k * height + y) * width + x)
                total += value * value if squared else value
    else:
        for channel in range(max(k - before, 0), min(k + behind + 1, channels)):
            value = load(numbers, begin, (channel * height + row) * width + column)
            total += value * value if squared else value
    return total


@kernel
def _normalize(x, ratio, a, x_numbers, x_begin, a_numbers, a_begin, channels, height, width, count, before, behind, within, alpha, beta,
               bias):
    at = cuda.grid(1)
    if at < count:
        numbers = channels * height * width
        n, i = split(at, numbers)
        rest, column = split(i, width)
        k, row = split(rest, height)
        begin = n * a_numbers + a_begin
        squares = _sum_around(a, begin, k, row, column, channels, height, width, before, behind, within, True)
        scale = norm_scale(squares, alpha, beta, bias)
        ratio[at] = scale
        x[n * x_numbers + x_begin + i] = a[begin + i] * scale


@kernel
def _pass(c_in, c, ratio, in_numbers, in_begin, c_numbers, c_begin, numbers, count, relevance, accumulate):
    at = cuda.grid(1)
    if at < count:
        n, i = split(at, numbers)
        to = n * in_numbers + in_begin + i
        result = norm_passed(c[n * c_numbers + c_begin + i], ratio[at], relevance)
        c_in[to] = result + c_in[to] if accumulate else result


@kernel
def _write_terms(terms, own, c, ratio, a, c_numbers, c_begin, a_numbers, a_begin, numbers, count, alpha, beta, bias, taylor, epsilon):
    at = cuda.grid(1)
    if at < count:
        n, i = split(at, numbers)
        value, factor = a[n * a_numbers + a_begin + i], c[n * c_numbers + c_begin + i]
        terms[at], own[at], _ = norm_terms(value, ratio[at], factor, alpha, beta, bias, taylor, epsilon)


@kernel
def _gather_terms(c_in, terms, own, a, in_numbers, in_begin, a_numbers, a_begin, channels, height, width, count, before, behind, within,
                  taylor, accumulate):
    at = cuda.grid(1)
    if at < count:
        numbers = channels * height * width
        n, i = split(at, numbers)
        rest, column = split(i, width)
        k, row = split(rest, height)
        value, to = a[n * a_numbers + a_begin + i], n * in_numbers + in_begin + i
        # Who is so far behind me has me so far before.
        around = _sum_around(terms, n * numbers, k, row, column, channels, height, width, behind, before, within, False)
        result = own[at] + (value * value if taylor else value) * around
        c_in[to] = result + c_in[to] if accumulate else result


@kernel
def _keep(ledger, c, ratio, a, column, c_numbers, c_begin, a_numbers, a_begin, first, numbers, alpha, beta, bias, epsilon):
    n = cuda.blockIdx.x
    sums, lost = cuda.shared.array(SUMMING_THREADS, float64), np.float64(0)
    for i in range(cuda.threadIdx.x, numbers, SUMMING_THREADS):
        _, _, kept = norm_terms(a[n * a_numbers + a_begin + i], ratio[n * numbers + i], c[n * c_numbers + c_begin + i], alpha, beta, bias, 1,
                             epsilon)
        lost += kept
    total = sum_of_block(sums, lost)
    if cuda.threadIdx.x == 0:
        ledger[first + n, column] += total


# ---- Launchers ---------------------------------------------------------------------------------------------------------------------------


def normalize_forward(x, ratio, a, x_channel, a_channel, before, behind, within, alpha, beta, bias, first, last):
    """x <- a * ratio, ratio <- (bias + alpha * sum of a^2)^-beta. Units are rows of images.

    The sum is over the channels from `before` before to `behind` behind, or over as many rows and columns if `within`.
    """
    image, end = whole_images(first, last, ratio.shape[2])
    count = (end - image) * math.prod(ratio.shape[1:])
    launch_for_each(_normalize, count, flat(x), flat(ratio[image:end]), flat(a), *place_of(x, x_channel, image),
                    *place_of(a, a_channel, image), *ratio.shape[1:], count, before, behind, int(within), np.float32(alpha),
                    np.float32(beta), np.float32(bias))


def normalize_redistribute(c_in, c, ratio, c_in_channel, c_channel, relevance, accumulate, first, last):
    """Relevance passes: c_in <- c * ratio, for |x| c = |a| ratio c; relevance itself as it is. Units are channels of images."""
    image, end = whole_images(first, last, ratio.shape[1])
    numbers = math.prod(ratio.shape[1:])
    launch_for_each(_pass, (end - image) * numbers, flat(c_in), flat(c), flat(ratio[image:end]), *place_of(c_in, c_in_channel, image),
                    *place_of(c, c_channel, image), numbers, (end - image) * numbers, int(relevance), int(accumulate))


def normalize_shares_elements(images, shape):
    """Floats of the scratch array of normalize_shares_redistribute."""
    return 2 * images * math.prod(shape)


def normalize_shares_redistribute(c_in, ledger, c, ratio, a, scratch, column, c_in_channel, c_channel, a_channel, before, behind, within,
                                  alpha, beta, bias, formula, epsilon, accumulate, first, last):
    """The derivative of the normalisation times c or, under NORM_TAYLOR, relevance c in proportion to its expansion (scalar.norm_terms).

    What epsilon absorbs there goes to ledger[n, column]. scratch holds normalize_shares_elements. Units are images.
    """
    images, numbers, taylor = last - first, math.prod(ratio.shape[1:]), int(formula == NORM_TAYLOR)
    count = images * numbers
    terms, own, scales = scratch[:count], scratch[count:2 * count], flat(ratio[first:last])
    of_c, of_a = place_of(c, c_channel, first), place_of(a, a_channel, first)
    parameters = np.float32(alpha), np.float32(beta), np.float32(bias)
    launch_for_each(_write_terms, count, terms, own, flat(c), scales, flat(a), *of_c, *of_a, numbers, count, *parameters, taylor,
                    np.float32(epsilon))
    launch_for_each(_gather_terms, count, flat(c_in), terms, own, flat(a), *place_of(c_in, c_in_channel, first), *of_a, *ratio.shape[1:],
                    count, before, behind, int(within), taylor, int(accumulate))
    if taylor:
        launch(_keep, images, SUMMING_THREADS, ledger, flat(c), scales, flat(a), column, *of_c, *of_a, first, numbers, *parameters,
               np.float32(epsilon))
