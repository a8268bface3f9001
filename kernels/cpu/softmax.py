"""Softmax over the channels at each position, in gates: it passes relevance on, element by element.

Units are rows of images. Tensors are (N, *, H, W) and used from a given channel on.
"""

import numpy as np
from fastdtd.kernels.cpu.arrays import flat
from fastdtd.kernels.cpu.jit import kernel
from fastdtd.kernels.cpu.scalar import exp


@kernel
def softmax_forward(x, a, x_channel, a_channel, channels, first, last):
    """x <- exp(a) / the sum of exp(a) over the channels."""
    height, width = a.shape[2:]
    positions = height * width
    flat_x, flat_a = flat(x), flat(a)
    for unit in range(first, last):
        n, row = unit // height, unit % height
        for j in range(row * width, (row + 1) * width):
            source, to = (n * a.shape[1] + a_channel) * positions + j, (n * x.shape[1] + x_channel) * positions + j
            largest, total = flat_a[source], np.float64(0)
            for k in range(1, channels):
                largest = max(largest, flat_a[source + k * positions])
            for k in range(channels):
                value = exp(flat_a[source + k * positions] - largest)
                flat_x[to + k * positions] = value
                total += np.float64(value)
            for k in range(channels):
                flat_x[to + k * positions] = np.float32(flat_x[to + k * positions] / total)


@kernel
def softmax_redistribute(c_in, c, x, c_in_channel, c_channel, x_channel, channels, derivative, accumulate, first, last):
    """Relevance c passes as it is: c_in <- c. The derivative: c_in <- x (c - the sum of x c over the channels)."""
    height, width = x.shape[2:]
    positions = height * width
    flat_in, flat_c, flat_x = flat(c_in), flat(c), flat(x)
    for unit in range(first, last):
        n, row = unit // height, unit % height
        for j in range(row * width, (row + 1) * width):
            to = (n * c_in.shape[1] + c_in_channel) * positions + j
            source, made = (n * c.shape[1] + c_channel) * positions + j, (n * x.shape[1] + x_channel) * positions + j
            total = np.float64(0)
            if derivative:
                for k in range(channels):
                    total += np.float64(flat_x[made + k * positions] * flat_c[source + k * positions])
            for k in range(channels):
                result = flat_c[source + k * positions]
                if derivative:
                    result = flat_x[made + k * positions] * (result - np.float32(total))
                flat_in[to + k * positions] = result + flat_in[to + k * positions] if accumulate else result
