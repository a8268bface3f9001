"""Dense layers: the weights are streamed from memory once for y and z and once for the way back, for all images together.

V is made from W in registers, so no second copy of the weights is held. Tensors are flat, (N, *, 1, 1), used from a given feature on;
weight is (K, F).
"""

import numpy as np
from fastdtd.kernels.codes import BOX, FLAT, NONNEGATIVE, ONES, SQUARED
from fastdtd.kernels.cpu.elementwise import finish, ratio_of
from fastdtd.kernels.cpu.jit import kernel, kernel_reordering

DENSE_FEATURES = 2048  # of one unit of redistribution: a piece of a weight row and of c_in stay in the first-level cache

_ZERO = np.float32(0)


@kernel_reordering
def _dot(w, a):
    y = _ZERO
    for i in range(len(a)):
        y += w[i] * a[i]
    return y


@kernel_reordering
def _dot_signed(w, a):
    """(sum of w a, sum of its positive terms): the latter is z for non-negative and for signed features alike."""
    y, z = _ZERO, _ZERO
    for i in range(len(a)):
        term = w[i] * a[i]
        y += term
        z += max(term, _ZERO)
    return y, z


@kernel_reordering
def _dot_box(w, a, low, high):
    y, z = _ZERO, _ZERO
    for i in range(len(a)):
        y += w[i] * a[i]
        z += w[i] * (max(a[i] - low[i], _ZERO) if w[i] > _ZERO else min(a[i] - high[i], _ZERO))
    return y, z


@kernel
def dense_forward(x, ratio, dead, a, weight, bias, constant, low, high, x_channel, a_channel, features, relu, relevance, first, last):
    """x <- W a + bias, through a ReLU if `relu`; ratio <- |x| / z. Units are outputs.

    constant (K,) is z under ONES, where it does not depend on a.
    """
    images, count = ratio.shape[0], weight.shape[1]
    flat = a.reshape(a.shape[0], a.shape[1])
    for k in range(first, last):
        w = weight[k]
        for n in range(images):
            values = flat[n, a_channel:a_channel + count]
            if features == BOX:
                y, z = _dot_box(w, values, low, high)
            elif features == ONES:
                y, z = _dot(w, values), constant[k]
            else:
                y, z = _dot_signed(w, values)
            value = finish(y + bias[k], relu)
            x[n, x_channel + k, 0, 0] = value
            ratio[n, k, 0, 0] = ratio_of(value, z, relevance)
            if ratio[n, k, 0, 0] < _ZERO:
                dead[n] = 1


@kernel
def _add_share(out, s, w, a, low, high, features, weights, relevance):
    """out += s * V's row, for the features that each input has."""
    if weights == SQUARED:
        for i in range(len(out)):
            out[i] += s * (w[i] * w[i])
    elif weights == FLAT:
        for i in range(len(out)):
            out[i] += s
    elif features == BOX:
        for i in range(len(out)):
            out[i] += s * w[i] * (max(a[i] - low[i], _ZERO) if w[i] > _ZERO else min(a[i] - high[i], _ZERO))
    elif relevance:
        for i in range(len(out)):
            out[i] += s * max(w[i] * a[i], _ZERO)
    elif features == NONNEGATIVE:
        for i in range(len(out)):
            out[i] += s * max(w[i], _ZERO)
    else:
        for i in range(len(out)):
            out[i] += s * max(w[i] if a[i] >= _ZERO else -w[i], _ZERO)


@kernel
def dense_redistribute(c_in, c, ratio, a, weight, low, high, c_in_channel, c_channel, a_channel, features, weights, relevance,
                       accumulate, first, last):
    """c_in <- V^T (ratio * c), or added to c_in if `accumulate`. If `relevance`, it is multiplied by u. Units are DENSE_FEATURES inputs."""
    images, outputs, count = ratio.shape[0], weight.shape[0], weight.shape[1]
    flat_a, flat_in = a.reshape(a.shape[0], a.shape[1]), c_in.reshape(c_in.shape[0], c_in.shape[1])
    for unit in range(first, last):
        begin, end = unit * DENSE_FEATURES, min((unit + 1) * DENSE_FEATURES, count)
        if not accumulate:
            for n in range(images):
                flat_in[n, c_in_channel + begin:c_in_channel + end] = _ZERO
        for k in range(outputs):
            for n in range(images):
                s = ratio[n, k, 0, 0] * c[n, c_channel + k, 0, 0]
                if s != _ZERO:  # true of few: outputs behind a ReLU, and one class of many
                    _add_share(flat_in[n, c_in_channel + begin:c_in_channel + end], s, weight[k, begin:end],
                               flat_a[n, a_channel + begin:a_channel + end], low[begin:end], high[begin:end], features, weights, relevance)
