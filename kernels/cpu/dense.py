"""Dense layers: the weights are streamed from memory once for y and z and once for the way back, for all images together.

V is made from W in registers, so no second copy of the weights is held. Tensors are flat, (N, *, 1, 1), used from a given feature on;
weight is (K, F).
"""

import numpy as np
from fastdtd.kernels.codes import BOX, FLAT, NONNEGATIVE, ONES, POSITIVE, SQUARED
from fastdtd.kernels.cpu.elementwise import finish, ratio_of
from fastdtd.kernels.cpu.jit import kernel, kernel_reordering
from fastdtd.kernels.cpu.microkernel import DENSE_DOTS, DENSE_ROWS, LANES, add_four_shares

DENSE_FEATURES = 2048  # of one unit of redistribution: a piece of a weight row and of c_in stay in the first-level cache

_ZERO = np.float32(0)
_DOTS_1, _DOTS_2 = DENSE_DOTS


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
def dense_forward(x, ratio, dead, a, weight, bias, constant, low, high, sums, x_channel, a_channel, features, relu, relevance, first, last):
    """x <- W a + bias, through a ReLU if `relu`; ratio <- |x| / z. Units are DENSE_ROWS outputs.

    constant (K,) is z under ONES, where it does not depend on a; sums is scratch.
    """
    images, (outputs, count) = ratio.shape[0], weight.shape
    flat = a.reshape(a.shape[0], a.shape[1])
    whole = count // LANES * LANES
    for unit in range(first, last):
        begin, end = unit * DENSE_ROWS, min((unit + 1) * DENSE_ROWS, outputs)
        fast = features == NONNEGATIVE and end - begin == DENSE_ROWS and whole > 0
        for n in range(images):
            if fast and n % 2 == 0:
                p_a, p_w = flat[n, a_channel:].ctypes.data, weight[begin].ctypes.data
                if n + 1 < images:
                    _DOTS_2(sums.ctypes.data, p_w, count, p_a, flat.shape[1], whole)
                else:
                    _DOTS_1(sums.ctypes.data, p_w, count, p_a, 0, whole)
            together = 2 if n // 2 * 2 + 1 < images else 1
            for k in range(begin, end):
                w, values = weight[k], flat[n, a_channel:a_channel + count]
                if fast:
                    at = 2 * ((k - begin) * together + n % 2)
                    y, z = sums[at], sums[at + 1]
                    for i in range(whole, count):
                        y += w[i] * values[i]
                        z += max(w[i], _ZERO) * values[i]
                elif features == BOX:
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
def _speaks(ratio, c, c_channel, k):
    """Whether output k has anything to redistribute in any image: true of few, of those behind a ReLU and of one class of many."""
    speaks = False
    for n in range(ratio.shape[0]):
        speaks |= ratio[n, k, 0, 0] * c[n, c_channel + k, 0, 0] != _ZERO
    return speaks


@kernel
def _add_rows(flat_in, c_in_channel, ratio, c, c_channel, weight, begin, end):
    """flat_in[n] += the rows of V = max(W, 0), times ratio * c, in the order of outputs; features begin..end-1. Four rows at a time."""
    images, (outputs, count) = ratio.shape[0], weight.shape
    whole = (end - begin) // LANES * LANES
    k = 0
    while True:
        k_0 = k
        while k_0 < outputs and not _speaks(ratio, c, c_channel, k_0):
            k_0 += 1
        if k_0 >= outputs:
            return
        k_1 = k_0 + 1
        while k_1 < outputs and not _speaks(ratio, c, c_channel, k_1):
            k_1 += 1
        k_2 = k_1 + 1
        while k_2 < outputs and not _speaks(ratio, c, c_channel, k_2):
            k_2 += 1
        k_3 = k_2 + 1
        while k_3 < outputs and not _speaks(ratio, c, c_channel, k_3):
            k_3 += 1
        k = k_3 + 1
        p_w, p_in = weight.ctypes.data + 4 * begin, flat_in.ctypes.data
        w_0 = p_w + 4 * k_0 * count  # a row that is not there is row k_0, times nothing
        w_1 = p_w + 4 * k_1 * count if k_1 < outputs else w_0
        w_2 = p_w + 4 * k_2 * count if k_2 < outputs else w_0
        w_3 = p_w + 4 * k_3 * count if k_3 < outputs else w_0
        for n in range(images):
            s_0 = ratio[n, k_0, 0, 0] * c[n, c_channel + k_0, 0, 0]
            s_1 = ratio[n, k_1, 0, 0] * c[n, c_channel + k_1, 0, 0] if k_1 < outputs else _ZERO
            s_2 = ratio[n, k_2, 0, 0] * c[n, c_channel + k_2, 0, 0] if k_2 < outputs else _ZERO
            s_3 = ratio[n, k_3, 0, 0] * c[n, c_channel + k_3, 0, 0] if k_3 < outputs else _ZERO
            to = n * flat_in.shape[1] + c_in_channel + begin
            add_four_shares(p_in + 4 * to, w_0, w_1, w_2, w_3, s_0, s_1, s_2, s_3, whole)
            for i in range(begin + whole, end):
                total = flat_in[n, c_in_channel + i] + s_0 * max(weight[k_0, i], _ZERO)
                if k_1 < outputs:
                    total += s_1 * max(weight[k_1, i], _ZERO)
                if k_2 < outputs:
                    total += s_2 * max(weight[k_2, i], _ZERO)
                if k_3 < outputs:
                    total += s_3 * max(weight[k_3, i], _ZERO)
                flat_in[n, c_in_channel + i] = total


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
        if features == NONNEGATIVE and weights == POSITIVE and not relevance:
            _add_rows(flat_in, c_in_channel, ratio, c, c_channel, weight, begin, end)
            continue
        for k in range(outputs):
            for n in range(images):
                s = ratio[n, k, 0, 0] * c[n, c_channel + k, 0, 0]
                if s != _ZERO:  # true of few: outputs behind a ReLU, and one class of many
                    _add_share(flat_in[n, c_in_channel + begin:c_in_channel + end], s, weight[k, begin:end],
                               flat_a[n, a_channel + begin:a_channel + end], low[begin:end], high[begin:end], features, weights, relevance)
