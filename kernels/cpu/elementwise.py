"""What happens to one number at a time: the ratio of every rule, ReLU and addition, and what a layer absorbs.

Tensors are (N, *, H, W) and used from a given channel on; a call does the units first..last-1, one unit being one channel of one image.
"""

import numpy as np
from fastdtd.kernels.codes import BOX, NONNEGATIVE, ONES, SIGNED
from fastdtd.kernels.cpu.jit import kernel

_ZERO = np.float32(0)
_ONE = np.float32(1)
LEAST = np.float32(1e-30)  # a smaller sum counts as none: 1 / z and its products stay within float32


# ---- Parts of other kernels, for one number --------------------------------------------------------------------------------------------


@kernel
def finish(y, relu):
    """The layer's output from its sum."""
    return max(y, _ZERO) if relu else y


@kernel
def ratio_of(x, z, relevance):
    """|x| / z, what the way back multiplies c by; if `relevance`, the way back carries relevance R = |x| c and the ratio is 1 / z.

    Where z is zero nothing can be redistributed. What is lost there is kept as a negative number, -|x| or -1, for `absorb`.
    """
    return ratio_of_least(x, z, relevance, LEAST)


@kernel
def ratio_of_least(x, z, relevance, least):
    """As ratio_of, where a z up to `least` counts as zero."""
    share = _ONE if relevance else abs(x)
    return share / z if z > least else -share


@kernel
def feature_sum(a, features, low, high):
    """Features of one number that weigh in where all weights are positive: the first of u."""
    if features == NONNEGATIVE:
        return a
    if features == SIGNED:
        return max(a, _ZERO)
    if features == BOX:
        return max(a - low, _ZERO)
    return _ONE


@kernel
def give(result, a, features, low, high, relevance):
    """What one number gets of V^T (ratio * c) where all weights are positive."""
    if features == SIGNED and a < _ZERO:
        return _ZERO
    if relevance and features != ONES:
        return result * feature_sum(a, features, low, high)
    return result


# ---- Kernels ---------------------------------------------------------------------------------------------------------------------------


@kernel
def absorb_redistribute(ledger, ratio, c, dead, column, c_channel, first, last):
    """ledger[n, column] <- what z = 0 kept from being redistributed, where dead[n]; those ratios become 0. Units are images."""
    channels, places = ratio.shape[1], ratio.shape[2] * ratio.shape[3]
    for n in range(first, last):
        if not dead[n]:
            continue
        lost = np.float64(0)
        for k in range(channels):
            r, factor = ratio[n, k].reshape(places), c[n, c_channel + k].reshape(places)
            for i in range(places):
                if r[i] < _ZERO:
                    lost -= np.float64(r[i]) * np.float64(factor[i])
                    r[i] = _ZERO
        ledger[n, column] = lost


@kernel
def clear_redistribute(c_in, begin, end, first, last):
    """c_in[n, begin:end] <- 0. Units are images."""
    for n in range(first, last):
        c_in[n, begin:end] = _ZERO


@kernel
def relu_forward(x, a, x_channel, a_channel, channels, first, last):
    """x <- max(a, 0)."""
    places = a.shape[2] * a.shape[3]
    for unit in range(first, last):
        n, k = unit // channels, unit % channels
        out, value = x[n, x_channel + k].reshape(places), a[n, a_channel + k].reshape(places)
        for i in range(places):
            out[i] = max(value[i], _ZERO)


@kernel
def relu_redistribute(c_in, c, a, c_in_channel, c_channel, a_channel, channels, relevance, accumulate, first, last):
    """c_in <- c where a > 0, else 0; relevance passes everywhere."""
    places = a.shape[2] * a.shape[3]
    for unit in range(first, last):
        n, k = unit // channels, unit % channels
        out, value = c_in[n, c_in_channel + k].reshape(places), a[n, a_channel + k].reshape(places)
        factor = c[n, c_channel + k].reshape(places)
        for i in range(places):
            result = factor[i] if relevance or value[i] > _ZERO else _ZERO
            out[i] = result + out[i] if accumulate else result


@kernel
def copy_forward(x, a, x_begin, a_begin, count, accumulate, first, last):
    """x[n, x_begin:x_begin + count] <- a[n, a_begin:a_begin + count], or added to it. Tensors are (N, *, 1, 1); units are images."""
    flat_x, flat_a = x.reshape(x.shape[0], x.shape[1]), a.reshape(a.shape[0], a.shape[1])
    for n in range(first, last):
        out, value = flat_x[n, x_begin:x_begin + count], flat_a[n, a_begin:a_begin + count]
        if accumulate:
            for i in range(count):
                out[i] += value[i]
        else:
            for i in range(count):
                out[i] = value[i]


@kernel
def add_forward(x, ratio, dead, a, b, low_a, high_a, low_b, high_b,
                x_channel, a_channel, b_channel, features, relu, relevance, first, last):
    """x <- a + b, through a ReLU if `relu`; ratio <- |x| / z with z the sum of both features."""
    channels, places = ratio.shape[1], ratio.shape[2] * ratio.shape[3]
    for unit in range(first, last):
        n, k = unit // channels, unit % channels
        out, to_ratio = x[n, x_channel + k].reshape(places), ratio[n, k].reshape(places)
        p, q = a[n, a_channel + k].reshape(places), b[n, b_channel + k].reshape(places)
        absorbs = False
        for i in range(places):
            z = feature_sum(p[i], features, low_a[k], high_a[k]) + feature_sum(q[i], features, low_b[k], high_b[k])
            value = finish(p[i] + q[i], relu)
            r = ratio_of(value, z, relevance)
            out[i] = value
            to_ratio[i] = r
            absorbs |= r < _ZERO
        if absorbs:
            dead[n] = 1


@kernel
def add_redistribute(c_in, c, ratio, a, low, high,
                     c_in_channel, c_channel, a_channel, features, relevance, accumulate, first, last):
    """The share of one of the two inputs, a: c_in <- ratio * c, for the features that it has."""
    channels, places = ratio.shape[1], ratio.shape[2] * ratio.shape[3]
    for unit in range(first, last):
        n, k = unit // channels, unit % channels
        out, value = c_in[n, c_in_channel + k].reshape(places), a[n, a_channel + k].reshape(places)
        factor, r = c[n, c_channel + k].reshape(places), ratio[n, k].reshape(places)
        for i in range(places):
            result = give(r[i] * factor[i], value[i], features, low[k], high[k], relevance)
            out[i] = result + out[i] if accumulate else result
