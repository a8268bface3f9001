"""Dense layers: the weights are streamed from memory once for y and z and once for the backward pass, for up to 32
images together.

V is made from W in registers, so no second copy of the weights is held. Tensors are flat, (N, *, 1, 1), used from a
given feature on; weight is (K, F).

Memory is what these layers wait for (VGG-16's first has 411 MB of weights), so the products are float32's in every
precision. The lanes of a warp are images in the forward pass and inputs in the backward pass; the warps of a block
divide what is summed over, and their sums are added in one order, whatever the other images.
"""

from functools import cache

import numpy as np
from fastdtd.kernels.codes import AS_IS, BOX, FLAT, NEGATIVE, ONES, SIGNED, SQUARED
from fastdtd.kernels.cuda.jit import kernel, launch, part
from fastdtd.kernels.cuda.scalar import clip, ratio_of, redistributed_pair, z_term
from fastdtd.kernels.cuda.vector_code import (
    ALIGNED,
    address_of,
    load,
    load_four_shared,
    load_inside,
    load_shared,
    store_shared,
)
from fastdtd.kernels.scalar import MIN_DENOMINATOR, ONE, ZERO
from numba import cuda, float32

DENSE_FEATURES = 32  # of one unit of redistribution
_WARPS = 8
_IMAGES = 32
_OUTPUTS = 16
_DEPTH = 64  # features of a tile; each warp has an eighth of them
_ROWS_STRIDE = _OUTPUTS + 4  # of a tile's weights, depth by depth: four are read at once
_RESULTS = _OUTPUTS * _IMAGES
_FORWARD_FLOATS = _WARPS * _RESULTS
_CONTRIBUTIONS_STRIDE = _IMAGES + 4
_CONTRIBUTIONS = _DEPTH * _CONTRIBUTIONS_STRIDE
_REDISTRIBUTE_FLOATS = 32 * (_IMAGES + 1)


# ---- Kernels ---------------------------------------------------------------------------------------------------------


@cache
def _forward_kernel(features):
    box, counted = features == BOX, features == ONES

    @part
    def add_over_warps(tile, sums, t):
        """(_OUTPUTS, _IMAGES) at the beginning of tile <- the sums of all warps."""
        cuda.syncthreads()
        for i in range(_OUTPUTS):
            tile[((t >> 5) * _OUTPUTS + i) * _IMAGES + (t & 31)] = sums[i]
        cuda.syncthreads()
        for i in range(_OUTPUTS // _WARPS):
            at = t + i * _WARPS * 32
            total = ZERO
            for warp in range(_WARPS):
                total += tile[warp * _OUTPUTS * _IMAGES + at]
            tile[at] = total  # of the first warp's part only this thread reads this element
        cuda.syncthreads()

    @kernel
    def multiply(x, ratio, dead, a, weight, bias, constant, low, high, images, first_output, last_output, outputs,
                 count, a_elements, a_begin, x_elements, x_begin, x_min, x_max, relevance):
        tile = cuda.shared.array(_FORWARD_FLOATS, float32, ALIGNED)
        results = cuda.shared.array(_RESULTS, float32)
        one, two = cuda.local.array(_OUTPUTS, float32), cuda.local.array(_OUTPUTS, float32)
        t, elements = cuda.threadIdx.x, _DEPTH * _ROWS_STRIDE
        image_tiles = (images + _IMAGES - 1) // _IMAGES
        first_image = cuda.blockIdx.x % image_tiles * _IMAGES
        first_row = first_output + cuda.blockIdx.x // image_tiles * _OUTPUTS
        for i in range(_OUTPUTS):
            one[i] = ZERO
            two[i] = ZERO
        own_weight = address_of(weight, (first_row + (t >> 6)) * count + (t & 63))
        own_a = address_of(a, (first_image + (t >> 6)) * a_elements + a_begin + (t & 63))
        for begin in range(0, count, _DEPTH):
            is_feature = begin + (t & 63) < count
            for i in range(_OUTPUTS // 4):
                row = (t >> 6) + 4 * i
                store_shared(tile, (t & 63) * _ROWS_STRIDE + row,
                             load_inside(own_weight, begin + 4 * i * count,
                                         is_feature & (first_row + row < last_output)))
            for i in range(_IMAGES // 4):
                image = (t >> 6) + 4 * i
                store_shared(tile, elements + (t & 63) * (_IMAGES + 1) + image,
                             load_inside(own_a, begin + 4 * i * a_elements,
                                         is_feature & (first_image + image < images)))
            cuda.syncthreads()
            for i in range(_DEPTH // _WARPS):
                depth = (t >> 5) * (_DEPTH // _WARPS) + i
                value = load_shared(tile, elements + depth * (_IMAGES + 1) + (t & 31))
                at_bound = min(begin + depth, count - 1) if box else 0
                for row in range(0, _OUTPUTS, 4):
                    w = load_four_shared(tile, depth * _ROWS_STRIDE + row)
                    for j in range(4):
                        one[row + j] += w[j] * value
                        if not counted:
                            two[row + j] += z_term(w[j], value, features, low[at_bound], high[at_bound])
            cuda.syncthreads()
        add_over_warps(tile, one, t)
        for i in range(_OUTPUTS // _WARPS):
            results[t + i * _WARPS * 32] = tile[t + i * _WARPS * 32]
        add_over_warps(tile, two, t)
        for i in range(_OUTPUTS // _WARPS):
            at = t + i * _WARPS * 32
            row, n = first_row + at // _IMAGES, first_image + at % _IMAGES
            if row < last_output and n < images:
                value = clip(results[at] + bias[row], x_min, x_max)
                own_ratio = ratio_of(value, constant[row] if counted else tile[at], MIN_DENOMINATOR, relevance)
                x[n * x_elements + x_begin + row] = value
                ratio[n * outputs + row] = own_ratio
                if own_ratio < ZERO:
                    dead[n] = 1

    return multiply


@cache
def _redistribute_kernel(weights, both):
    @part
    def v_of(w, negative):
        if weights == SQUARED:
            return w * w
        if weights == AS_IS:
            return w
        if weights == FLAT:
            return ONE
        return max(-w, ZERO) if negative else max(w, ZERO)

    @part
    def add_over_warps(tile, sums, t):
        """(32 inputs, _IMAGES + 1) at the beginning of tile <- the sums of all warps."""
        stride = _IMAGES + 1
        for warp in range(_WARPS):
            if t >> 5 == warp:
                for i in range(_IMAGES):
                    at = (t & 31) * stride + i
                    tile[at] = sums[i] + (tile[at] if warp > 0 else ZERO)
            cuda.syncthreads()

    @kernel
    def multiply(c_in, c, ratio, a, weight, low, high, images, first_input, last_input, outputs, count, c_in_elements,
                 c_in_begin, c_elements, c_begin, a_elements, a_begin, features, relevance, accumulate):
        contributions = cuda.shared.array(_CONTRIBUTIONS, float32, ALIGNED)
        tile = cuda.shared.array(_REDISTRIBUTE_FLOATS, float32)
        other = cuda.shared.array(_REDISTRIBUTE_FLOATS, float32)
        one, two = cuda.local.array(_IMAGES, float32), cuda.local.array(_IMAGES, float32)
        t = cuda.threadIdx.x
        image_tiles = (images + _IMAGES - 1) // _IMAGES
        first_image = cuda.blockIdx.x % image_tiles * _IMAGES
        first_feature = first_input + cuda.blockIdx.x // image_tiles * 32
        feature = min(first_feature + (t & 31), count - 1)
        for i in range(_IMAGES):
            one[i] = ZERO
            two[i] = ZERO
        own_ratio = address_of(ratio, (first_image + (t >> 6)) * outputs + (t & 63))
        own_c = address_of(c, (first_image + (t >> 6)) * c_elements + c_begin + (t & 63))
        for begin in range(0, outputs, _DEPTH):
            cuda.syncthreads()
            for i in range(_IMAGES // 4):
                inside = (first_image + (t >> 6) + 4 * i < images) & (begin + (t & 63) < outputs)
                contribution = load_inside(own_ratio, begin + 4 * i * outputs,
                                           inside) * load_inside(own_c, begin + 4 * i * c_elements, inside)
                store_shared(contributions, (t & 63) * _CONTRIBUTIONS_STRIDE + (t >> 6) + 4 * i, contribution)
            cuda.syncthreads()
            for i in range(_DEPTH // _WARPS):
                depth = (t >> 5) * (_DEPTH // _WARPS) + i
                w = load(weight, feature, min(begin + depth, outputs - 1) * count)
                first, second = v_of(w, weights == NEGATIVE), v_of(w, weights != NEGATIVE)
                for image in range(0, _IMAGES, 4):
                    contribution = load_four_shared(contributions, depth * _CONTRIBUTIONS_STRIDE + image)
                    for j in range(4):
                        one[image + j] += first * contribution[j]
                        if both:
                            two[image + j] += second * contribution[j]
        add_over_warps(tile, one, t)
        if both:
            add_over_warps(other, two, t)
        for i in range(_IMAGES // _WARPS):
            n, k = first_image + (t >> 5) * (_IMAGES // _WARPS) + i, first_feature + (t & 31)
            if n < images and k < last_input:
                at, to = (t & 31) * (_IMAGES + 1) + n - first_image, n * c_in_elements + c_in_begin + k
                value = a[n * a_elements + a_begin + k]
                result = redistributed_pair(tile[at], other[at] if both else ZERO, value, features, low[k], high[k],
                                            relevance)
                c_in[to] = result + c_in[to] if accumulate else result

    return multiply


# ---- Launchers -------------------------------------------------------------------------------------------------------


def dense_forward(x, ratio, dead, a, weight, bias, constant, low, high, x_channel, a_channel, features, x_min, x_max,
                  relevance, first, last):
    """x <- W a + bias, clipped to x_min..x_max; ratio <- |x| / z. Units are outputs."""
    images, outputs = ratio.shape[:2]
    blocks = -(-images // _IMAGES) * -(-(last - first) // _OUTPUTS)
    launch(_forward_kernel(int(features)), blocks, _WARPS * 32, x.reshape(x.size), ratio.reshape(ratio.size), dead,
           a.reshape(a.size), weight.reshape(weight.size), bias, constant, low, high, images, first, last, outputs,
           weight.shape[1], a.shape[1], a_channel, x.shape[1], x_channel, np.float32(x_min), np.float32(x_max),
           int(relevance))


def dense_redistribute(c_in, c, ratio, a, weight, low, high, c_in_channel, c_channel, a_channel, features, weights,
                       relevance, accumulate, first, last):
    """c_in <- V^T (ratio * c), or added to c_in if `accumulate`. If `relevance`, it is multiplied by u. Units are
    DENSE_FEATURES inputs."""
    images, (outputs, count) = ratio.shape[0], weight.shape
    blocks = -(-images // _IMAGES) * (last - first)
    launch(_redistribute_kernel(int(weights), features in (BOX, SIGNED)), blocks, _WARPS * 32, c_in.reshape(c_in.size),
           c.reshape(c.size), ratio.reshape(ratio.size), a.reshape(a.size), weight.reshape(weight.size), low, high,
           images, first * DENSE_FEATURES, min(last * DENSE_FEATURES, count), outputs, count, c_in.shape[1],
           c_in_channel, c.shape[1], c_channel, a.shape[1], a_channel, int(features), int(relevance), int(accumulate))


def dense_forward_elements(images):
    """Floats of scratch arrays: none are needed."""
    return 0


def dense_redistribute_elements(images, outputs):
    """Floats of scratch arrays: none are needed."""
    return 0, 0
