"""The method's general rule: each neuron's root point is searched along a direction v(a, w) of the user's.

As kernels/cpu/direction.py, with a thread for each output in the forward pass and for each input in the backward pass.
"""

import math
from functools import cache

from fastdtd.kernels.cuda.elementwise import flat, location, whole_images
from fastdtd.kernels.cuda.jit import kernel, launch_for_each, part
from fastdtd.kernels.cuda.vector_code import split
from fastdtd.kernels.scalar import ZERO, direction_formula
from numba import cuda


@cache
def direction_kernels(direction, bounded):
    """direction_forward and direction_redistribute for a function v(a, w) or, if `bounded`, v(a, w, low, high)."""
    v = direction_formula(direction, bounded, part)

    @kernel
    def sum_contributions(z, a, weight, low, high, a_elements, a_begin, outputs, rows, columns, channels, height, width,
                          taps_h, taps_w, groups, stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w, count):
        at = cuda.grid(1)
        if at >= count:
            return
        all_rows, column = split(at, columns)
        planes, row = split(all_rows, rows)
        n, k = split(planes, outputs)
        total = ZERO
        for channel in range(channels):
            c = k // (outputs // groups) * channels + channel
            for i in range(taps_h):
                y = row * stride_h + i * dilation_h - pad_top
                for j in range(taps_w):
                    x = column * stride_w + j * dilation_w - pad_left
                    if 0 <= y < height and 0 <= x < width:
                        w = weight[((k * channels + channel) * taps_h + i) * taps_w + j]
                        total += v(a[n * a_elements + a_begin + (c * height + y) * width + x], w, low[c], high[c]) * w
        z[at] = total

    @kernel
    def redistribute_contributions(c_in, c, ratio, a, weight, low, high, in_elements, in_begin, c_elements, c_begin,
                                   a_elements, a_begin, outputs, rows, columns, channels, height, width, taps_h, taps_w,
                                   groups, stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w, count,
                                   accumulate):
        at = cuda.grid(1)
        if at >= count:
            return
        elements = channels * groups * height * width
        n, own = split(at, elements)
        own_rows, x = split(own, width)
        c_channel, y = split(own_rows, height)
        value, to = a[n * a_elements + a_begin + own], n * in_elements + in_begin + own
        group, total = c_channel // channels, ZERO
        for i in range(taps_h):
            down = y + pad_top - i * dilation_h
            for j in range(taps_w):
                right = x + pad_left - j * dilation_w
                if down % stride_h == 0 and right % stride_w == 0:
                    row, column = down // stride_h, right // stride_w
                    if 0 <= row < rows and 0 <= column < columns:
                        for k in range(group * (outputs // groups), (group + 1) * (outputs // groups)):
                            w = weight[((k * channels + c_channel % channels) * taps_h + i) * taps_w + j]
                            position = (k * rows + row) * columns + column
                            total += v(value, w, low[c_channel], high[c_channel]) * w * (
                                ratio[n * outputs * rows * columns + position] * c[n * c_elements + c_begin + position])
        c_in[to] = total + c_in[to] if accumulate else total

    def direction_forward(z, a, weight, low, high, a_channel, groups, stride_h, stride_w, pad_top, pad_left, dilation_h,
                          dilation_w, first, last):
        """z (N, K, OH, OW) <- sum of v w. weight (K, C / groups, height, width). Units: channels of images."""
        image, end = whole_images(first, last, z.shape[1])
        count = (end - image) * math.prod(z.shape[1:])
        launch_for_each(sum_contributions, count, flat(z[image:end]), flat(a), flat(weight), low, high,
                        *location(a, a_channel, image), *z.shape[1:], weight.shape[1], *a.shape[2:], *weight.shape[2:],
                        groups, stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w, count)

    def direction_redistribute(c_in, c, ratio, a, weight, low, high, c_in_channel, c_channel, a_channel, groups,
                               stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w, accumulate, first, last):
        """c_in <- sum of v w (ratio * c), or added to c_in if `accumulate`. Units are channels of images."""
        image, end = whole_images(first, last, weight.shape[1] * groups)
        count = (last - first) * math.prod(a.shape[2:])
        launch_for_each(redistribute_contributions, count, flat(c_in), flat(c), flat(ratio[image:end]), flat(a),
                        flat(weight), low, high, *location(c_in, c_in_channel, image), *location(c, c_channel, image),
                        *location(a, a_channel, image), *ratio.shape[1:], weight.shape[1], *a.shape[2:],
                        *weight.shape[2:], groups, stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w, count,
                        int(accumulate))

    return direction_forward, direction_redistribute
