"""Dense layers: the weights are streamed from memory once for y and z and once for the way back, for up to 32 images together.

V is made from W in registers, so no second copy of the weights is held. Tensors are flat, (N, *, 1, 1), used from a given feature on;
weight is (K, F).

Memory is what these layers wait for (VGG-16's first has 411 MB of weights), so the products are float32's in every precision. The lanes of
a warp are images on the way forward and inputs on the way back; the warps of a block share out what is summed over, and their sums are
added in one order, whatever the images beside.
"""

from functools import cache

import numpy as np
from fastdtd.kernels.codes import AS_IS, BOX, FLAT, NEGATIVE, NONNEGATIVE, ONES, SIGNED, SQUARED
from fastdtd.kernels.cuda.elementwise import finish, give, ratio_of
from fastdtd.kernels.cuda.jit import kernel, launch, part
from numba import cuda, float32

DENSE_FEATURES = 32  # of one unit of redistribution
_WARPS = 8
_IMAGES = 32
_OUTPUTS = 16
_DEPTH = 64  # features of a tile; each warp has an eighth of them
_RESULTS = _OUTPUTS * _IMAGES
_FORWARD_FLOATS = _WARPS * _RESULTS
_SHARES = _DEPTH * _IMAGES
_BACK_FLOATS = 32 * (_IMAGES + 1)
_ZERO = np.float32(0)
_ONE = np.float32(1)


# ---- Kernels -----------------------------------------------------------------------------------------------------------------------------


@cache
def _forward_kernel(features):
    signed, box, counted = features == SIGNED, features == BOX, features == ONES

    @part
    def z_of(w, value, low, high):
        """What one input adds to z."""
        if signed:
            return max(w, _ZERO) * max(value, _ZERO) + max(-w, _ZERO) * max(-value, _ZERO)
        if box:
            return max(w, _ZERO) * max(value - low, _ZERO) + max(-w, _ZERO) * max(high - value, _ZERO)
        return max(w, _ZERO) * value

    @part
    def add_over_warps(tile, sums, t):
        """(_OUTPUTS, _IMAGES) at the beginning of tile <- the sums of all warps."""
        cuda.syncthreads()
        for i in range(_OUTPUTS):
            tile[((t >> 5) * _OUTPUTS + i) * _IMAGES + (t & 31)] = sums[i]
        cuda.syncthreads()
        for i in range(_OUTPUTS // _WARPS):
            at = t + i * _WARPS * 32
            total = _ZERO
            for warp in range(_WARPS):
                total += tile[warp * _OUTPUTS * _IMAGES + at]
            tile[at] = total  # of the first warp's part only this thread reads this place
        cuda.syncthreads()

    @kernel
    def multiply(x, ratio, dead, a, weight, bias, constant, low, high, images, first_output, last_output, outputs, count, a_numbers,
                 a_begin, x_numbers, x_begin, least, most, relevance):
        tile = cuda.shared.array(_FORWARD_FLOATS, float32)
        results = cuda.shared.array(_RESULTS, float32)
        one, two = cuda.local.array(_OUTPUTS, float32), cuda.local.array(_OUTPUTS, float32)
        t, numbers = cuda.threadIdx.x, _OUTPUTS * (_DEPTH + 1)
        image_tiles = (images + _IMAGES - 1) // _IMAGES
        first_image, first_row = cuda.blockIdx.x % image_tiles * _IMAGES, first_output + cuda.blockIdx.x // image_tiles * _OUTPUTS
        for i in range(_OUTPUTS):
            one[i] = _ZERO
            two[i] = _ZERO
        for begin in range(0, count, _DEPTH):
            feature = begin + (t & 63)
            for i in range(_OUTPUTS // 4):
                row = (t >> 6) + 4 * i
                inside = feature < count and first_row + row < last_output
                tile[row * (_DEPTH + 1) + (t & 63)] = weight[(first_row + row) * count + feature] if inside else _ZERO
            for i in range(_IMAGES // 4):
                image = (t >> 6) + 4 * i
                inside = feature < count and first_image + image < images
                tile[numbers + (t & 63) * (_IMAGES + 1) + image] = \
                    a[(first_image + image) * a_numbers + a_begin + feature] if inside else _ZERO
            cuda.syncthreads()
            for i in range(_DEPTH // _WARPS):
                depth = (t >> 5) * (_DEPTH // _WARPS) + i
                value = tile[numbers + depth * (_IMAGES + 1) + (t & 31)]
                at_bound = min(begin + depth, count - 1) if box else 0
                for row in range(_OUTPUTS):
                    w = tile[row * (_DEPTH + 1) + depth]
                    one[row] += w * value
                    if not counted:
                        two[row] += z_of(w, value, low[at_bound], high[at_bound])
            cuda.syncthreads()
        add_over_warps(tile, one, t)
        for i in range(_OUTPUTS // _WARPS):
            results[t + i * _WARPS * 32] = tile[t + i * _WARPS * 32]
        add_over_warps(tile, two, t)
        for i in range(_OUTPUTS // _WARPS):
            at = t + i * _WARPS * 32
            row, n = first_row + at // _IMAGES, first_image + at % _IMAGES
            if row < last_output and n < images:
                value = finish(results[at] + bias[row], least, most)
                share = ratio_of(value, constant[row] if counted else tile[at], relevance)
                x[n * x_numbers + x_begin + row] = value
                ratio[n * outputs + row] = share
                if share < _ZERO:
                    dead[n] = 1

    return multiply


@cache
def _back_kernel(weights, both):
    @part
    def v_of(w, negative):
        if weights == SQUARED:
            return w * w
        if weights == AS_IS:
            return w
        if weights == FLAT:
            return _ONE
        return max(-w, _ZERO) if negative else max(w, _ZERO)

    @part
    def add_over_warps(tile, sums, t):
        """(32 inputs, _IMAGES + 1) at the beginning of tile <- the sums of all warps."""
        stride = _IMAGES + 1
        for warp in range(_WARPS):
            if t >> 5 == warp:
                for i in range(_IMAGES):
                    at = (t & 31) * stride + i
                    tile[at] = sums[i] + (tile[at] if warp > 0 else _ZERO)
            cuda.syncthreads()

    @kernel
    def multiply(c_in, c, ratio, a, weight, low, high, images, first_input, last_input, outputs, count, c_in_numbers, c_in_begin, c_numbers,
                 c_begin, a_numbers, a_begin, features, relevance, accumulate):
        shares = cuda.shared.array(_SHARES, float32)
        tile = cuda.shared.array(_BACK_FLOATS, float32)
        other = cuda.shared.array(_BACK_FLOATS, float32)
        one, two = cuda.local.array(_IMAGES, float32), cuda.local.array(_IMAGES, float32)
        t = cuda.threadIdx.x
        image_tiles = (images + _IMAGES - 1) // _IMAGES
        first_image, first_feature = cuda.blockIdx.x % image_tiles * _IMAGES, first_input + cuda.blockIdx.x // image_tiles * 32
        feature = min(first_feature + (t & 31), count - 1)
        for i in range(_IMAGES):
            one[i] = _ZERO
            two[i] = _ZERO
        for begin in range(0, outputs, _DEPTH):
            cuda.syncthreads()
            for i in range(_IMAGES // 4):
                image, k = first_image + (t >> 6) + 4 * i, begin + (t & 63)
                inside = image < images and k < outputs
                shares[(t & 63) * _IMAGES + (t >> 6) + 4 * i] = \
                    ratio[image * outputs + k] * c[image * c_numbers + c_begin + k] if inside else _ZERO
            cuda.syncthreads()
            for i in range(_DEPTH // _WARPS):
                depth = (t >> 5) * (_DEPTH // _WARPS) + i
                w = weight[min(begin + depth, outputs - 1) * count + feature]
                first, second = v_of(w, weights == NEGATIVE), v_of(w, weights != NEGATIVE)
                for image in range(_IMAGES):
                    share = shares[depth * _IMAGES + image]
                    one[image] += first * share
                    if both:
                        two[image] += second * share
        add_over_warps(tile, one, t)
        if both:
            add_over_warps(other, two, t)
        for i in range(_IMAGES // _WARPS):
            n, k = first_image + (t >> 5) * (_IMAGES // _WARPS) + i, first_feature + (t & 31)
            if n < images and k < last_input:
                at, to = (t & 31) * (_IMAGES + 1) + n - first_image, n * c_in_numbers + c_in_begin + k
                result, value = tile[at], a[n * a_numbers + a_begin + k]
                if features == BOX:
                    result = max(value - low[k], _ZERO) * result + max(high[k] - value, _ZERO) * other[at]
                elif features == SIGNED:
                    result = result if value >= _ZERO else other[at]
                    if relevance:
                        result *= abs(value)
                elif features != ONES and (relevance or features != NONNEGATIVE):
                    result = give(result, value, features, low[k], high[k], relevance)
                c_in[to] = result + c_in[to] if accumulate else result

    return multiply


# ---- Launchers ---------------------------------------------------------------------------------------------------------------------------


def dense_forward(x, ratio, dead, a, weight, bias, constant, low, high, x_channel, a_channel, features, least, most, relevance,
                  first, last):
    """x <- W a + bias, clipped to least..most; ratio <- |x| / z. Units are outputs.

    constant (K,) is z under ONES, where it does not depend on a.
    """
    images, outputs = ratio.shape[:2]
    blocks = -(-images // _IMAGES) * -(-(last - first) // _OUTPUTS)
    launch(_forward_kernel(int(features)), blocks, _WARPS * 32, x.reshape(x.size), ratio.reshape(ratio.size), dead, a.reshape(a.size),
           weight.reshape(weight.size), bias, constant, low, high, images, first, last, outputs, weight.shape[1], a.shape[1], a_channel,
           x.shape[1], x_channel, np.float32(least), np.float32(most), int(relevance))


def dense_redistribute(c_in, c, ratio, a, weight, low, high, c_in_channel, c_channel, a_channel, features, weights, relevance, accumulate,
                       first, last):
    """c_in <- V^T (ratio * c), or added to c_in if `accumulate`. If `relevance`, it is multiplied by u. Units are DENSE_FEATURES inputs."""
    images, (outputs, count) = ratio.shape[0], weight.shape
    blocks = -(-images // _IMAGES) * (last - first)
    launch(_back_kernel(int(weights), features in (BOX, SIGNED)), blocks, _WARPS * 32, c_in.reshape(c_in.size), c.reshape(c.size),
           ratio.reshape(ratio.size), a.reshape(a.size), weight.reshape(weight.size), low, high, images, first * DENSE_FEATURES,
           min(last * DENSE_FEATURES, count), outputs, count, c_in.shape[1], c_in_channel, c.shape[1], c_channel, a.shape[1], a_channel,
           int(features), int(relevance), int(accumulate))


def dense_forward_elements(images):
    """Floats of scratch arrays: none are needed."""
    return 0


def dense_redistribute_elements(images, outputs):
    """Floats of scratch arrays: none are needed."""
    return 0, 0
