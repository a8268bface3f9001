"""Softmax over the channels at each position, in gates. A thread has a position.
Parameters as in kernels/cpu/softmax.py.
"""

import math

import numpy as np
from fastdtd.kernels.cuda.elementwise import flat, location, whole_images
from fastdtd.kernels.cuda.jit import kernel, launch_for_each
from fastdtd.kernels.cuda.scalar import exp
from fastdtd.kernels.cuda.vector_code import split
from numba import cuda

# ---- Kernels ---------------------------------------------------------------------------------------------------------


@kernel
def _softmax(x, a, x_elements, x_begin, a_elements, a_begin, channels, positions, count):
    at = cuda.grid(1)
    if at < count:
        n, j = split(at, positions)
        source, to = n * a_elements + a_begin + j, n * x_elements + x_begin + j
        largest, total = a[source], np.float64(0)
        for k in range(1, channels):
            largest = max(largest, a[source + k * positions])
        for k in range(channels):
            value = exp(a[source + k * positions] - largest)
            x[to + k * positions] = value
            total += np.float64(value)
        for k in range(channels):
            x[to + k * positions] = np.float32(x[to + k * positions] / total)


@kernel
def _redistribute_softmax(c_in, c, x, in_elements, in_begin, c_elements, c_begin, x_elements, x_begin, channels,
                          positions, count, derivative, accumulate):
    at = cuda.grid(1)
    if at < count:
        n, j = split(at, positions)
        to, source = n * in_elements + in_begin + j, n * c_elements + c_begin + j
        made, total = n * x_elements + x_begin + j, np.float64(0)
        if derivative:
            for k in range(channels):
                total += np.float64(x[made + k * positions] * c[source + k * positions])
        for k in range(channels):
            result = c[source + k * positions]
            if derivative:
                result = x[made + k * positions] * (result - np.float32(total))
            c_in[to + k * positions] = result + c_in[to + k * positions] if accumulate else result


# ---- Launchers -------------------------------------------------------------------------------------------------------


def softmax_forward(x, a, x_channel, a_channel, channels, first, last):
    """x <- exp(a) / the sum of exp(a) over the channels."""
    image, end = whole_images(first, last, a.shape[2])
    positions = math.prod(a.shape[2:])
    launch_for_each(_softmax, (end - image) * positions, flat(x), flat(a), *location(x, x_channel, image),
                    *location(a, a_channel, image), channels, positions, (end - image) * positions)


def softmax_redistribute(c_in, c, x, c_in_channel, c_channel, x_channel, channels, derivative, accumulate, first, last):
    """Relevance c passes as it is: c_in <- c. The derivative: c_in <- x (c - the sum of x c over the channels)."""
    image, end = whole_images(first, last, x.shape[2])
    positions = math.prod(x.shape[2:])
    launch_for_each(_redistribute_softmax, (end - image) * positions, flat(c_in), flat(c), flat(x),
                    *location(c_in, c_in_channel, image), *location(c, c_channel, image),
                    *location(x, x_channel, image), channels, positions, (end - image) * positions, int(derivative),
                    int(accumulate))
