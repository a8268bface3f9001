"""Local response normalisation: x = a (bias + alpha * sum of a^2)^-beta, over neighbouring channels or positions. A
thread has one element."""

import math

import numpy as np
from fastdtd.kernels.codes import NORM_TAYLOR
from fastdtd.kernels.cuda.elementwise import SUMMING_THREADS, flat, location, sum_of_block, whole_images
from fastdtd.kernels.cuda.jit import kernel, launch, launch_for_each, part
from fastdtd.kernels.cuda.scalar import norm_passed, norm_scale, norm_terms
from fastdtd.kernels.cuda.vector_code import load, split
from fastdtd.kernels.scalar import ZERO
from numba import cuda, float64

# ---- Kernels ---------------------------------------------------------------------------------------------------------


@part
def _sum_around(elements, begin, k, row, column, channels, height, width, before, after, within_channel, squared):
    """The sum of values (C, H, W from `begin` on), or of their squares, over the neighbours of one."""
    total = ZERO
    if within_channel:
        for y in range(max(row - before, 0), min(row + after + 1, height)):
            for x in range(max(column - before, 0), min(column + after + 1, width)):
                value = load(elements, begin, (k * height + y) * width + x)
                total += value * value if squared else value
    else:
        for channel in range(max(k - before, 0), min(k + after + 1, channels)):
            value = load(elements, begin, (channel * height + row) * width + column)
            total += value * value if squared else value
    return total


@kernel
def _normalize(x, ratio, a, x_elements, x_begin, a_elements, a_begin, channels, height, width, count, before, after,
               within_channel, alpha, beta, bias):
    at = cuda.grid(1)
    if at < count:
        elements = channels * height * width
        n, i = split(at, elements)
        rest, column = split(i, width)
        k, row = split(rest, height)
        begin = n * a_elements + a_begin
        squares = _sum_around(a, begin, k, row, column, channels, height, width, before, after, within_channel, True)
        scale = norm_scale(squares, alpha, beta, bias)
        ratio[at] = scale
        x[n * x_elements + x_begin + i] = a[begin + i] * scale


@kernel
def _pass_through(c_in, c, ratio, in_elements, in_begin, c_elements, c_begin, elements, count, relevance, accumulate):
    at = cuda.grid(1)
    if at < count:
        n, i = split(at, elements)
        to = n * in_elements + in_begin + i
        result = norm_passed(c[n * c_elements + c_begin + i], ratio[at], relevance)
        c_in[to] = result + c_in[to] if accumulate else result


@kernel
def _write_terms(terms, own, c, ratio, a, c_elements, c_begin, a_elements, a_begin, elements, count, alpha, beta, bias,
                 taylor, epsilon):
    at = cuda.grid(1)
    if at < count:
        n, i = split(at, elements)
        value, factor = a[n * a_elements + a_begin + i], c[n * c_elements + c_begin + i]
        terms[at], own[at], _ = norm_terms(value, ratio[at], factor, alpha, beta, bias, taylor, epsilon)


@kernel
def _gather_terms(c_in, terms, own, a, in_elements, in_begin, a_elements, a_begin, channels, height, width, count,
                  before, after, within_channel, taylor, accumulate):
    at = cuda.grid(1)
    if at < count:
        elements = channels * height * width
        n, i = split(at, elements)
        rest, column = split(i, width)
        k, row = split(rest, height)
        value, to = a[n * a_elements + a_begin + i], n * in_elements + in_begin + i
        # An output whose window reaches so far before reads inputs so far after: the reverse.
        around = _sum_around(terms, n * elements, k, row, column, channels, height, width, after, before,
                             within_channel, False)
        result = own[at] + (value * value if taylor else value) * around
        c_in[to] = result + c_in[to] if accumulate else result


@kernel
def _absorb_norm(ledger, c, ratio, a, column, c_elements, c_begin, a_elements, a_begin, first, elements, alpha, beta,
                 bias, epsilon):
    n = cuda.blockIdx.x
    sums, absorbed = cuda.shared.array(SUMMING_THREADS, float64), np.float64(0)
    for i in range(cuda.threadIdx.x, elements, SUMMING_THREADS):
        _, _, part = norm_terms(a[n * a_elements + a_begin + i], ratio[n * elements + i],
                                c[n * c_elements + c_begin + i], alpha, beta, bias, 1, epsilon)
        absorbed += part
    total = sum_of_block(sums, absorbed)
    if cuda.threadIdx.x == 0:
        ledger[first + n, column] += total


# ---- Launchers -------------------------------------------------------------------------------------------------------


def normalize_forward(x, ratio, a, x_channel, a_channel, before, after, within_channel, alpha, beta, bias, first, last):
    """x <- a * ratio, ratio <- (bias + alpha * sum of a^2)^-beta. Units are rows of images."""
    image, end = whole_images(first, last, ratio.shape[2])
    count = (end - image) * math.prod(ratio.shape[1:])
    launch_for_each(_normalize, count, flat(x), flat(ratio[image:end]), flat(a), *location(x, x_channel, image),
                    *location(a, a_channel, image), *ratio.shape[1:], count, before, after, int(within_channel),
                    np.float32(alpha), np.float32(beta), np.float32(bias))


def normalize_redistribute(c_in, c, ratio, c_in_channel, c_channel, relevance, accumulate, first, last):
    """Relevance passes: c_in <- c * ratio, for |x| c = |a| ratio c; relevance itself as it is."""
    image, end = whole_images(first, last, ratio.shape[1])
    elements = math.prod(ratio.shape[1:])
    launch_for_each(_pass_through, (end - image) * elements, flat(c_in), flat(c), flat(ratio[image:end]),
                    *location(c_in, c_in_channel, image), *location(c, c_channel, image), elements,
                    (end - image) * elements, int(relevance), int(accumulate))


def normalize_taylor_elements(images, shape):
    """Floats of the scratch array of normalize_taylor_redistribute."""
    return 2 * images * math.prod(shape)


def normalize_taylor_redistribute(c_in, ledger, c, ratio, a, scratch, column, c_in_channel, c_channel, a_channel,
                                  before, after, within_channel, alpha, beta, bias, formula, epsilon, accumulate, first,
                                  last):
    """The derivative of the normalisation times c or, under NORM_TAYLOR, relevance c in proportion to its expansion
    (scalar.norm_terms)."""
    images, elements, taylor = last - first, math.prod(ratio.shape[1:]), int(formula == NORM_TAYLOR)
    count = images * elements
    terms, own, scales = scratch[:count], scratch[count:2 * count], flat(ratio[first:last])
    of_c, of_a = location(c, c_channel, first), location(a, a_channel, first)
    parameters = np.float32(alpha), np.float32(beta), np.float32(bias)
    launch_for_each(_write_terms, count, terms, own, flat(c), scales, flat(a), *of_c, *of_a, elements, count,
                    *parameters, taylor, np.float32(epsilon))
    launch_for_each(_gather_terms, count, flat(c_in), terms, own, flat(a), *location(c_in, c_in_channel, first), *of_a,
                    *ratio.shape[1:], count, before, after, int(within_channel), taylor, int(accumulate))
    if taylor:
        launch(_absorb_norm, images, SUMMING_THREADS, ledger, flat(c), scales, flat(a), column, *of_c, *of_a, first,
               elements, *parameters, np.float32(epsilon))
