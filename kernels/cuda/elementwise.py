"""What happens to one number at a time: the ratio of every rule, ReLU, addition, rearrangement, and what a layer absorbs.

A thread has one number. Tensors are (N, *, H, W) and used from a given channel on; numbers of a call are counted through the channels that
it does, one behind the other.
"""

import math

import numpy as np
from fastdtd.kernels.cuda.jit import kernel, launch, launch_for_each, part
from fastdtd.kernels.cuda.scalar import (
    activation,
    activation_redistributed,
    clip,
    positive_feature,
    power,
    ratio_of,
    redistributed,
)
from fastdtd.kernels.cuda.vector_code import load, split, store
from fastdtd.kernels.scalar import MIN_DENOMINATOR, ZERO
from numba import cuda, float32, float64

SUMMING_THREADS = 512  # of the block that sums over an image
_AT_ONCE = 16


# ---- Parts of kernels --------------------------------------------------------------------------------------------------------------------


@part
def sum_of_block(sums, own):
    """The sum of `own` over a block of SUMMING_THREADS, in one order, for all its threads; sums is shared memory, a float64 for each."""
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


# ---- Kernels -----------------------------------------------------------------------------------------------------------------------------


@kernel
def _absorb(ledger, ratio, c, dead, column, c_numbers, c_begin, numbers, first):
    n = first + cuda.blockIdx.x
    if dead[n] == 0:
        return
    sums, lost = cuda.shared.array(SUMMING_THREADS, float64), np.float64(0)
    held, t, step = cuda.local.array(_AT_ONCE, float32), cuda.threadIdx.x, SUMMING_THREADS
    begin, begin_c = n * numbers, n * c_numbers + c_begin
    for i in range(t, numbers, _AT_ONCE * step):  # one block has an image to itself, so each thread asks for several numbers at a time
        for j in range(_AT_ONCE):
            held[j] = load(ratio, begin, min(i + j * step, numbers - 1))
        for j in range(_AT_ONCE):
            at = i + j * step
            if held[j] < ZERO and at < numbers:
                lost -= np.float64(held[j]) * np.float64(load(c, begin_c, at))
                store(ratio, begin, at, ZERO)
    total = sum_of_block(sums, lost)
    if t == 0:
        ledger[n, column] += total


@kernel
def _clear(c_in, numbers, begin, count, first, images):
    at = cuda.grid(1)
    if at < images * count:
        n, i = split(at, count)
        c_in[(first + n) * numbers + begin + i] = ZERO


@kernel
def _activate(x, a, x_numbers, x_begin, a_numbers, a_begin, numbers, count, slope, least, most):
    at = cuda.grid(1)
    if at < count:
        n, i = split(at, numbers)
        x[n * x_numbers + x_begin + i] = activation(a[n * a_numbers + a_begin + i], slope, least, most)


@kernel
def _give_through_activation(c_in, c, a, in_numbers, in_begin, c_numbers, c_begin, a_numbers, a_begin, numbers, count, slope, least, most,
                             relevance, derive, accumulate):
    at = cuda.grid(1)
    if at < count:
        n, i = split(at, numbers)
        value, to = a[n * a_numbers + a_begin + i], n * in_numbers + in_begin + i
        result = activation_redistributed(c[n * c_numbers + c_begin + i], value, slope, least, most, relevance, derive)
        c_in[to] = result + c_in[to] if accumulate else result


@kernel
def _power(x, ratio, a, x_numbers, x_begin, a_numbers, a_begin, numbers, count, exponent, derive):
    at = cuda.grid(1)
    if at < count:
        n, i = split(at, numbers)
        x[n * x_numbers + x_begin + i], ratio[at] = power(a[n * a_numbers + a_begin + i], exponent, derive)


@kernel
def _rearrange(x, a, index, x_numbers, x_begin, a_numbers, a_begin, numbers, count):
    at = cuda.grid(1)
    if at < count:
        n, i = split(at, numbers)
        x[n * x_numbers + x_begin + i] = a[n * a_numbers + a_begin + index[i]] if index[i] >= 0 else ZERO


@kernel
def _give_back_places(c_in, c, starts, readers, in_numbers, in_begin, c_numbers, c_begin, numbers, count, accumulate):
    at = cuda.grid(1)
    if at < count:
        n, i = split(at, numbers)
        to = n * in_numbers + in_begin + i
        total = c_in[to] if accumulate else ZERO
        for j in range(starts[i], starts[i + 1]):
            total += c[n * c_numbers + c_begin + readers[j]]
        c_in[to] = total


@kernel
def _lose_zeros(ledger, c, starts, readers, column, c_numbers, c_begin, first):
    n = first + cuda.blockIdx.x
    sums, lost = cuda.shared.array(SUMMING_THREADS, float64), np.float64(0)
    for j in range(cuda.threadIdx.x, starts[0], SUMMING_THREADS):
        lost += np.float64(c[n * c_numbers + c_begin + readers[j]])
    total = sum_of_block(sums, lost)
    if cuda.threadIdx.x == 0:
        ledger[n, column] = total


@kernel
def _copy(x, a, x_numbers, x_begin, a_numbers, a_begin, numbers, count, accumulate):
    at = cuda.grid(1)
    if at < count:
        n, i = split(at, numbers)
        to, value = n * x_numbers + x_begin + i, a[n * a_numbers + a_begin + i]
        x[to] = x[to] + value if accumulate else value


@kernel
def _add(x, ratio, dead, a, b, low_a, high_a, low_b, high_b, x_numbers, x_begin, a_numbers, a_begin, b_numbers, b_begin, first, places,
         numbers, count, features, least, most, relevance):
    at = cuda.grid(1)
    if at < count:
        n, i = split(at, numbers)
        k, _ = split(i, places)
        p, q = a[n * a_numbers + a_begin + i], b[n * b_numbers + b_begin + i]
        z = positive_feature(p, features, low_a[k], high_a[k]) + positive_feature(q, features, low_b[k], high_b[k])
        value = clip(p + q, least, most)
        r = ratio_of(value, z, MIN_DENOMINATOR, relevance)
        x[n * x_numbers + x_begin + i] = value
        ratio[at + first] = r
        if r < ZERO:
            dead[split(first, numbers)[0] + n] = 1


@kernel
def _give_to_summand(c_in, c, ratio, a, low, high, in_numbers, in_begin, c_numbers, c_begin, a_numbers, a_begin, places, numbers, count,
                     features, relevance, accumulate):
    at = cuda.grid(1)
    if at < count:
        n, i = split(at, numbers)
        (k, _), to = split(i, places), n * in_numbers + in_begin + i
        result = redistributed(ratio[at] * c[n * c_numbers + c_begin + i], a[n * a_numbers + a_begin + i], features, low[k], high[k], relevance)
        c_in[to] = result + c_in[to] if accumulate else result


# ---- Launchers ---------------------------------------------------------------------------------------------------------------------------


def flat(tensor):
    """All numbers of a tensor in a row."""
    return tensor.reshape(tensor.size)


def place_of(tensor, channel, first_image):
    """(numbers of an image, where a channel of the first image begins), in a flat tensor."""
    numbers = math.prod(tensor.shape[1:])
    return numbers, first_image * numbers + channel * math.prod(tensor.shape[2:])


def whole_images(first, last, channels):
    """The images that the channels first..last-1 are: plans have all channels of an image done by one call."""
    assert first % channels == last % channels == 0
    return first // channels, last // channels


def absorb_redistribute(ledger, ratio, c, dead, column, c_channel, first, last):
    """ledger[n, column] += what z = 0 kept from being redistributed, where dead[n]; those ratios become 0. Units are images."""
    launch(_absorb, last - first, SUMMING_THREADS, ledger, flat(ratio), flat(c), dead, column, *place_of(c, c_channel, 0),
           math.prod(ratio.shape[1:]), first)


def clear_redistribute(c_in, begin, end, first, last):
    """c_in[n, begin:end] <- 0. Units are images."""
    launch_for_each(_clear, (last - first) * (end - begin), flat(c_in), c_in.shape[1], begin, end - begin, first, last - first)


def activate_forward(x, a, x_channel, a_channel, channels, slope, least, most, first, last):
    """x <- a clipped to least..most, negative numbers times slope before. Units are channels of images."""
    image, behind = whole_images(first, last, channels)
    numbers = channels * math.prod(a.shape[2:])
    launch_for_each(_activate, (behind - image) * numbers, flat(x), flat(a), *place_of(x, x_channel, image), *place_of(a, a_channel, image),
                    numbers, (behind - image) * numbers, np.float32(slope), np.float32(least), np.float32(most))


def activate_redistribute(c_in, c, a, c_in_channel, c_channel, a_channel, channels, slope, least, most, relevance, derive, accumulate,
                          first, last):
    """Relevance |x| c of an activation is that of what it was made from: c_in <- c |x| / |a|; relevance itself passes as it is.

    If `derive`, c is a derivative, and so is c_in.
    """
    image, behind = whole_images(first, last, channels)
    numbers = channels * math.prod(a.shape[2:])
    launch_for_each(_give_through_activation, (behind - image) * numbers, flat(c_in), flat(c), flat(a),
                    *place_of(c_in, c_in_channel, image),
                    *place_of(c, c_channel, image), *place_of(a, a_channel, image), numbers, (behind - image) * numbers,
                    np.float32(slope), np.float32(least), np.float32(most), int(relevance), int(derive), int(accumulate))


def power_forward(x, ratio, a, x_channel, a_channel, exponent, derive, first, last):
    """x <- |a|^exponent, ratio <- x / |a|, which is 0 where a is; the derivative if `derive`. Units are channels of images."""
    image, behind = whole_images(first, last, ratio.shape[1])
    numbers = math.prod(ratio.shape[1:])
    launch_for_each(_power, (behind - image) * numbers, flat(x), flat(ratio[image:behind]), flat(a), *place_of(x, x_channel, image),
                    *place_of(a, a_channel, image), numbers, (behind - image) * numbers, np.float32(exponent), int(derive))


def rearrange_forward(x, a, index, x_channel, a_channel, first, last):
    """x <- a[index], 0 where index (C, H, W) is -1. Units are images."""
    launch_for_each(_rearrange, (last - first) * index.size, flat(x), flat(a), flat(index), *place_of(x, x_channel, first),
                    *place_of(a, a_channel, first), index.size, (last - first) * index.size)


def rearrange_redistribute(c_in, ledger, c, starts, readers, column, c_in_channel, c_channel, relevance, accumulate, first, last):
    """c_in[i] <- the sum of c over what reads number i: readers[starts[i]:starts[i + 1]]. Those before starts[0] read none: relevance
    that they have goes to ledger[n, column]. Units are images."""
    numbers = starts.size - 1
    launch_for_each(_give_back_places, (last - first) * numbers, flat(c_in), flat(c), starts, readers, *place_of(c_in, c_in_channel, first),
                    *place_of(c, c_channel, first), numbers, (last - first) * numbers, int(accumulate))
    if relevance:
        launch(_lose_zeros, last - first, SUMMING_THREADS, ledger, flat(c), starts, readers, column, *place_of(c, c_channel, 0), first)


def copy_forward(x, a, x_begin, a_begin, count, accumulate, first, last):
    """x[n, x_begin:x_begin + count] <- a[n, a_begin:a_begin + count], or added to it. Tensors are (N, *, 1, 1); units are images."""
    launch_for_each(_copy, (last - first) * count, flat(x), flat(a), x.shape[1], first * x.shape[1] + x_begin, a.shape[1],
                    first * a.shape[1] + a_begin, count, (last - first) * count, int(accumulate))


def add_forward(x, ratio, dead, a, b, low_a, high_a, low_b, high_b, x_channel, a_channel, b_channel, features, least, most, relevance,
                first, last):
    """x <- a + b, clipped to least..most; ratio <- |x| / z with z the sum of both features. Units are channels of images."""
    image, behind = whole_images(first, last, ratio.shape[1])
    numbers, places = math.prod(ratio.shape[1:]), math.prod(ratio.shape[2:])
    launch_for_each(_add, (behind - image) * numbers, flat(x), flat(ratio), dead, flat(a), flat(b), low_a, high_a, low_b, high_b,
                    *place_of(x, x_channel, image), *place_of(a, a_channel, image), *place_of(b, b_channel, image), image * numbers, places,
                    numbers, (behind - image) * numbers, int(features), np.float32(least), np.float32(most), int(relevance))


def add_redistribute(c_in, c, ratio, a, low, high, c_in_channel, c_channel, a_channel, features, relevance, accumulate, first, last):
    """The share of one of the two inputs, a: c_in <- ratio * c, for the features that it has. Units are channels of images."""
    image, behind = whole_images(first, last, ratio.shape[1])
    numbers, places = math.prod(ratio.shape[1:]), math.prod(ratio.shape[2:])
    launch_for_each(_give_to_summand, (behind - image) * numbers, flat(c_in), flat(c), flat(ratio[image:behind]), flat(a), low, high,
                    *place_of(c_in, c_in_channel, image), *place_of(c, c_channel, image), *place_of(a, a_channel, image), places, numbers,
                    (behind - image) * numbers, int(features), int(relevance), int(accumulate))
