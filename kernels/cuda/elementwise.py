"""What happens to one element at a time: the ratio of every rule, ReLU, addition, rearrangement, and what a layer
absorbs.

A thread has one element. Tensors are (N, *, H, W) and used from a given channel on; elements of a call are counted
through the channels that it does.
"""

import math

import numpy as np
from fastdtd.kernels.cuda.jit import kernel, launch, launch_for_each, part
from fastdtd.kernels.cuda.memory import read
from fastdtd.kernels.cuda.scalar import (
    activation,
    activation_redistributed,
    clip,
    gated,
    nonlinearity,
    positive_feature,
    power,
    ratio_of,
    redistributed,
)
from fastdtd.kernels.cuda.vector_code import load, split, store
from fastdtd.kernels.scalar import MIN_DENOMINATOR, ZERO
from numba import cuda, float32, float64

ABSORBING_PARTS = 1
SUMMING_THREADS = 512  # of the block that sums over an image
_AT_ONCE = 16


# ---- Parts of kernels ------------------------------------------------------------------------------------------------


@part
def sum_of_block(sums, own):
    """The sum of `own` over a block of SUMMING_THREADS, in one order; sums (SUMMING_THREADS,) is shared memory."""
    t = cuda.threadIdx.x
    cuda.syncthreads()
    sums[t] = own
    cuda.syncthreads()
    width = SUMMING_THREADS // 2
    while width > 0:
        if t < width:
            sums[t] += sums[t + width]
        cuda.syncthreads()
        width //= 2
    return sums[0]


# ---- Kernels ---------------------------------------------------------------------------------------------------------


@kernel
def _absorb_dead(ledger, ratio, c, dead, column, c_elements, c_begin, elements, first):
    n = first + cuda.blockIdx.x
    if dead[n] == 0:
        return
    sums, absorbed = cuda.shared.array(SUMMING_THREADS, float64), np.float64(0)
    held, t, step = cuda.local.array(_AT_ONCE, float32), cuda.threadIdx.x, SUMMING_THREADS
    begin, begin_c = n * elements, n * c_elements + c_begin
    # one block has an image to itself, so each thread requests several at a time
    for i in range(t, elements, _AT_ONCE * step):
        for j in range(_AT_ONCE):
            held[j] = load(ratio, begin, min(i + j * step, elements - 1))
        for j in range(_AT_ONCE):
            at = i + j * step
            if held[j] < ZERO and at < elements:
                absorbed -= np.float64(held[j]) * np.float64(load(c, begin_c, at))
                store(ratio, begin, at, ZERO)
    total = sum_of_block(sums, absorbed)
    if t == 0:
        ledger[n, column] += total


@kernel
def _clear(c_in, elements, begin, count, first, images):
    at = cuda.grid(1)
    if at < images * count:
        n, i = split(at, count)
        c_in[(first + n) * elements + begin + i] = ZERO


@kernel
def _activate(x, a, x_elements, x_begin, a_elements, a_begin, elements, count, slope, x_min, x_max):
    at = cuda.grid(1)
    if at < count:
        n, i = split(at, elements)
        x[n * x_elements + x_begin + i] = activation(a[n * a_elements + a_begin + i], slope, x_min, x_max)


@kernel
def _redistribute_activation(c_in, c, a, in_elements, in_begin, c_elements, c_begin, a_elements, a_begin, elements,
                             count, slope, x_min, x_max, relevance, derivative, accumulate):
    at = cuda.grid(1)
    if at < count:
        n, i = split(at, elements)
        value, to = a[n * a_elements + a_begin + i], n * in_elements + in_begin + i
        result = activation_redistributed(c[n * c_elements + c_begin + i], value, slope, x_min, x_max, relevance,
                                          derivative)
        c_in[to] = result + c_in[to] if accumulate else result


@kernel
def _power(x, ratio, a, x_elements, x_begin, a_elements, a_begin, elements, count, exponent, derivative):
    at = cuda.grid(1)
    if at < count:
        n, i = split(at, elements)
        x[n * x_elements + x_begin + i], ratio[at] = power(a[n * a_elements + a_begin + i], exponent, derivative)


@kernel
def _nonlinearity(x, ratio, a, x_elements, x_begin, a_elements, a_begin, elements, count, function, alpha, beta,
                  derivative):
    at = cuda.grid(1)
    if at < count:
        n, i = split(at, elements)
        value = a[n * a_elements + a_begin + i]
        x[n * x_elements + x_begin + i], ratio[at] = nonlinearity(value, function, alpha, beta, derivative)


@kernel
def _multiply(x, a, b, x_elements, x_begin, a_elements, a_begin, b_elements, b_begin, positions, per_channel, per_pixel,
              elements, count):
    at = cuda.grid(1)
    if at < count:
        n, i = split(at, elements)
        k, position = split(i, positions)
        s = b[n * b_elements + b_begin + k * per_channel + position * per_pixel]
        x[n * x_elements + x_begin + i] = a[n * a_elements + a_begin + i] * s


@kernel
def _redistribute_product(c_in, c, b, in_elements, in_begin, c_elements, c_begin, b_elements, b_begin, positions,
                          per_channel, per_pixel, elements, count, share, relevance, derivative, accumulate):
    at = cuda.grid(1)
    if at < count:
        n, i = split(at, elements)
        (k, position), to = split(i, positions), n * in_elements + in_begin + i
        s = b[n * b_elements + b_begin + k * per_channel + position * per_pixel]
        result = share * gated(c[n * c_elements + c_begin + i], s, relevance, derivative)
        c_in[to] = result + c_in[to] if accumulate else result


@kernel
def _redistribute_gate(c_in, c, a, in_elements, in_begin, c_elements, c_begin, a_elements, a_begin, gate_elements,
                       gate_positions, channels, gate_channels, positions, share, relevance, derivative, accumulate):
    n, i = split(cuda.blockIdx.x, gate_elements)  # a block has a value of the gate
    sums, t = cuda.shared.array(SUMMING_THREADS, float64), cuda.threadIdx.x
    (k, position), total = split(i, gate_positions), np.float64(0)
    across = positions // gate_positions
    for j in range(t, (channels // gate_channels) * across, SUMMING_THREADS):
        step, pixel = split(j, across)
        at = (k + step * gate_channels) * positions + position + pixel
        total += np.float64(gated(c[n * c_elements + c_begin + at], a[n * a_elements + a_begin + at], relevance,
                                  derivative))
    total = sum_of_block(sums, total)
    if t == 0:
        to, result = n * in_elements + in_begin + i, share * np.float32(total)
        c_in[to] = result + c_in[to] if accumulate else result


@kernel
def _rearrange(x, a, index, x_elements, x_begin, a_elements, a_begin, elements, count):
    at = cuda.grid(1)
    if at < count:
        n, i = split(at, elements)
        x[n * x_elements + x_begin + i] = a[n * a_elements + a_begin + index[i]] if index[i] >= 0 else ZERO


@kernel
def _redistribute_rearranged(c_in, c, starts, readers, in_elements, in_begin, c_elements, c_begin, elements, count,
                             accumulate):
    at = cuda.grid(1)
    if at < count:
        n, i = split(at, elements)
        to = n * in_elements + in_begin + i
        total = c_in[to] if accumulate else ZERO
        for j in range(starts[i], starts[i + 1]):
            total += c[n * c_elements + c_begin + readers[j]]
        c_in[to] = total


@kernel
def _absorb_unread(ledger, c, starts, readers, column, c_elements, c_begin, first):
    n = first + cuda.blockIdx.x
    sums, absorbed = cuda.shared.array(SUMMING_THREADS, float64), np.float64(0)
    for j in range(cuda.threadIdx.x, starts[0], SUMMING_THREADS):
        absorbed += np.float64(c[n * c_elements + c_begin + readers[j]])
    total = sum_of_block(sums, absorbed)
    if cuda.threadIdx.x == 0:
        ledger[n, column] = total


@kernel
def _copy(x, a, x_elements, x_begin, a_elements, a_begin, elements, count, accumulate):
    at = cuda.grid(1)
    if at < count:
        n, i = split(at, elements)
        to, value = n * x_elements + x_begin + i, a[n * a_elements + a_begin + i]
        x[to] = x[to] + value if accumulate else value


@kernel
def _add(x, ratio, dead, a, b, low_a, high_a, low_b, high_b, x_elements, x_begin, a_elements, a_begin, b_elements,
         b_begin, first, positions, elements, count, features, x_min, x_max, relevance):
    at = cuda.grid(1)
    if at < count:
        n, i = split(at, elements)
        k, _ = split(i, positions)
        p, q = a[n * a_elements + a_begin + i], b[n * b_elements + b_begin + i]
        z = positive_feature(p, features, low_a[k], high_a[k]) + positive_feature(q, features, low_b[k], high_b[k])
        value = clip(p + q, x_min, x_max)
        r = ratio_of(value, z, MIN_DENOMINATOR, relevance)
        x[n * x_elements + x_begin + i] = value
        ratio[at + first] = r
        if r < ZERO:
            dead[split(first, elements)[0] + n] = 1


@kernel
def _redistribute_summand(c_in, c, ratio, a, low, high, in_elements, in_begin, c_elements, c_begin, a_elements, a_begin,
                          positions, elements, count, features, relevance, accumulate):
    at = cuda.grid(1)
    if at < count:
        n, i = split(at, elements)
        (k, _), to = split(i, positions), n * in_elements + in_begin + i
        result = redistributed(ratio[at] * c[n * c_elements + c_begin + i], a[n * a_elements + a_begin + i], features,
                               low[k], high[k], relevance)
        c_in[to] = result + c_in[to] if accumulate else result


# ---- Launchers -------------------------------------------------------------------------------------------------------


def flat(tensor):
    """All elements of a tensor in a row."""
    return tensor.reshape(tensor.size)


def location(tensor, channel, first_image):
    """(elements of an image, where a channel of the first image begins), in a flat tensor."""
    elements = math.prod(tensor.shape[1:])
    return elements, first_image * elements + channel * math.prod(tensor.shape[2:])


def whole_images(first, last, channels):
    """The images that the channels first..last-1 are: plans have all channels of an image done by one call."""
    assert first % channels == last % channels == 0
    return first // channels, last // channels


def absorb_dead_redistribute(ledger, ratio, c, dead, column, c_channel, first, last):
    """ledger[n, column] += the relevance of outputs with z = 0, where dead[n]; their ratios become 0. Units: images."""
    launch(_absorb_dead, last - first, SUMMING_THREADS, ledger, flat(ratio), flat(c), dead, column,
           *location(c, c_channel, 0), math.prod(ratio.shape[1:]), first)


def clear_redistribute(c_in, begin, end, first, last):
    """c_in[n, begin:end] <- 0. Units: images."""
    launch_for_each(_clear, (last - first) * (end - begin), flat(c_in), c_in.shape[1], begin, end - begin, first,
                    last - first)


def activate_forward(x, a, x_channel, a_channel, channels, slope, x_min, x_max, first, last):
    """x <- a clipped to x_min..x_max, negative values times slope before that."""
    image, end = whole_images(first, last, channels)
    elements = channels * math.prod(a.shape[2:])
    launch_for_each(_activate, (end - image) * elements, flat(x), flat(a), *location(x, x_channel, image),
                    *location(a, a_channel, image), elements, (end - image) * elements, np.float32(slope),
                    np.float32(x_min), np.float32(x_max))


def activate_redistribute(c_in, c, a, c_in_channel, c_channel, a_channel, channels, slope, x_min, x_max, relevance,
                          derivative, accumulate, first, last):
    """Relevance |x| c of an activation is that of what it was made from: c_in <- c |x| / |a|; relevance itself passes
    as it is."""
    image, end = whole_images(first, last, channels)
    elements = channels * math.prod(a.shape[2:])
    launch_for_each(_redistribute_activation, (end - image) * elements, flat(c_in), flat(c), flat(a),
                    *location(c_in, c_in_channel, image),
                    *location(c, c_channel, image), *location(a, a_channel, image), elements, (end - image) * elements,
                    np.float32(slope), np.float32(x_min), np.float32(x_max), int(relevance), int(derivative),
                    int(accumulate))


def power_forward(x, ratio, a, x_channel, a_channel, exponent, derivative, first, last):
    """x <- |a|^exponent, ratio <- x / |a|, which is 0 where a is; the derivative if `derivative`."""
    image, end = whole_images(first, last, ratio.shape[1])
    elements = math.prod(ratio.shape[1:])
    launch_for_each(_power, (end - image) * elements, flat(x), flat(ratio[image:end]), flat(a),
                    *location(x, x_channel, image), *location(a, a_channel, image), elements, (end - image) * elements,
                    np.float32(exponent), int(derivative))


def nonlinearity_forward(x, ratio, a, x_channel, a_channel, function, alpha, beta, derivative, first, last):
    """x <- f(a), ratio <- x / a, or 1 where f(0) is not 0; the derivative if `derivative`."""
    image, end = whole_images(first, last, ratio.shape[1])
    elements = math.prod(ratio.shape[1:])
    launch_for_each(_nonlinearity, (end - image) * elements, flat(x), flat(ratio[image:end]), flat(a),
                    *location(x, x_channel, image), *location(a, a_channel, image), elements, (end - image) * elements,
                    int(function), np.float32(alpha), np.float32(beta), int(derivative))


def multiply_forward(x, a, b, x_channel, a_channel, b_channel, channels, gate_channels, first, last):
    """x <- a * b, b with a value for each element, channel or pixel."""
    image, end = whole_images(first, last, channels)
    elements = channels * math.prod(a.shape[2:])
    launch_for_each(_multiply, (end - image) * elements, flat(x), flat(a), flat(b), *location(x, x_channel, image),
                    *location(a, a_channel, image), *location(b, b_channel, image), *_steps(a, b, gate_channels),
                    elements, (end - image) * elements)


def multiply_redistribute(c_in, c, b, c_in_channel, c_channel, b_channel, channels, gate_channels, share, relevance,
                          derivative, accumulate, first, last):
    """What is multiplied gets of a product: c_in <- share * |b| * c; relevance itself passes as it is."""
    image, end = whole_images(first, last, channels)
    elements = channels * math.prod(c.shape[2:])
    launch_for_each(_redistribute_product, (end - image) * elements, flat(c_in), flat(c), flat(b),
                    *location(c_in, c_in_channel, image), *location(c, c_channel, image),
                    *location(b, b_channel, image), *_steps(c, b, gate_channels), elements, (end - image) * elements,
                    np.float32(share), int(relevance), int(derivative), int(accumulate))


def _steps(a, b, gate_channels):
    """Pixels of a channel, and by how many elements the gate goes on with a channel and with a pixel."""
    positions, gate_positions = math.prod(a.shape[2:]), math.prod(b.shape[2:])
    return positions, gate_positions if gate_channels > 1 else 0, int(gate_positions > 1)


def gate_redistribute(c_in, c, a, c_in_channel, c_channel, a_channel, channels, gate_channels, share, relevance,
                      derivative, accumulate, first, last):
    """What a gate gets that has one value for several elements of a: c_in <- the sum of share * |a| * c over them.

    Units are channels of the gate.
    """
    image, end = whole_images(first, last, gate_channels)
    gate_positions = math.prod(c_in.shape[2:])
    launch(_redistribute_gate, (end - image) * gate_channels * gate_positions, SUMMING_THREADS, flat(c_in), flat(c),
           flat(a), *location(c_in, c_in_channel, image), *location(c, c_channel, image),
           *location(a, a_channel, image), gate_channels * gate_positions, gate_positions, channels, gate_channels,
           math.prod(c.shape[2:]), np.float32(share), int(relevance), int(derivative), int(accumulate))


def rearrange_forward(x, a, index, x_channel, a_channel, first, last):
    """x <- a[index], 0 where index (C, H, W) is -1. Units are images."""
    launch_for_each(_rearrange, (last - first) * index.size, flat(x), flat(a), flat(index),
                    *location(x, x_channel, first), *location(a, a_channel, first), index.size,
                    (last - first) * index.size)


def rearrange_redistribute(c_in, ledger, c, starts, readers, column, c_in_channel, c_channel, relevance, accumulate,
                           first, last):
    """c_in[i] <- the sum of c over the readers of element i, readers[starts[i]:starts[i + 1]]. Those before starts[0]
    read none: their relevance goes to ledger[n, column]. Units are images."""
    elements = starts.size - 1
    launch_for_each(_redistribute_rearranged, (last - first) * elements, flat(c_in), flat(c), starts, readers,
                    *location(c_in, c_in_channel, first), *location(c, c_channel, first), elements,
                    (last - first) * elements, int(accumulate))
    if relevance:
        launch(_absorb_unread, last - first, SUMMING_THREADS, ledger, flat(c), starts, readers, column,
               *location(c, c_channel, 0), first)


def copy_forward(x, a, x_begin, a_begin, count, accumulate, first, last):
    """x[n, x_begin:x_begin + count] <- a[n, a_begin:a_begin + count], or added to it. Units: images."""
    launch_for_each(_copy, (last - first) * count, flat(x), flat(a), x.shape[1], first * x.shape[1] + x_begin,
                    a.shape[1], first * a.shape[1] + a_begin, count, (last - first) * count, int(accumulate))


def add_forward(x, ratio, dead, a, b, low_a, high_a, low_b, high_b, x_channel, a_channel, b_channel, features, x_min,
                x_max, relevance, first, last):
    """x <- a + b, clipped to x_min..x_max; ratio <- |x| / z with z the sum of both features."""
    image, end = whole_images(first, last, ratio.shape[1])
    elements, positions = math.prod(ratio.shape[1:]), math.prod(ratio.shape[2:])
    launch_for_each(_add, (end - image) * elements, flat(x), flat(ratio), dead, flat(a), flat(b), low_a, high_a, low_b,
                    high_b, *location(x, x_channel, image), *location(a, a_channel, image),
                    *location(b, b_channel, image), image * elements, positions, elements, (end - image) * elements,
                    int(features), np.float32(x_min), np.float32(x_max), int(relevance))


def add_redistribute(c_in, c, ratio, a, low, high, c_in_channel, c_channel, a_channel, features, relevance, accumulate,
                     first, last):
    """What one of the two inputs, a, gets: c_in <- ratio * c, for the features that it has."""
    image, end = whole_images(first, last, ratio.shape[1])
    elements, positions = math.prod(ratio.shape[1:]), math.prod(ratio.shape[2:])
    launch_for_each(_redistribute_summand, (end - image) * elements, flat(c_in), flat(c), flat(ratio[image:end]),
                    flat(a), low, high, *location(c_in, c_in_channel, image), *location(c, c_channel, image),
                    *location(a, a_channel, image), positions, elements, (end - image) * elements, int(features),
                    int(relevance), int(accumulate))


# ---- What a call is given and what it gives: whether all is well has to be found out otherwise -----------------------


def surely_within(low, high, images):
    return False


def sum_relevance(sums, relevance, scores, ledger, explained, loss):
    with np.errstate(invalid="ignore"):  # where some are infinite
        read(sums, relevance.sum((1, 2, 3), dtype=np.float64))
    return False
