"""The method's general rule: each neuron's root point is looked for along a direction v(a, w) that the user gives.

As kernels/cpu/direction.py, with a thread for each output on the way forward and for each input on the way back.
"""

import math
from functools import cache

from fastdtd.kernels.cuda.elementwise import flat, place_of, whole_images
from fastdtd.kernels.cuda.jit import kernel, launch_for_each, part
from fastdtd.kernels.cuda.vector_code import split
from fastdtd.kernels.scalar import ZERO, direction_formula
from numba import cuda


@cache
def direction_kernels(direction, bounded):
    """direction_forward and direction_redistribute for a Python function v(a, w) or, if `bounded`, v(a, w, low, high).

    TypeError: it cannot be compiled.
    """
    v = direction_formula(direction, bounded, part)

    @kernel
    def sum_shares(z, a, weight, low, high, a_numbers, a_begin, outputs, rows, columns, channels, height, width, taps_down, taps_right,
                   groups, stride_down, stride_right, top, left, dilate_down, dilate_right, count):
        at = cuda.grid(1)
        if at >= count:
            return
        all_rows, column = split(at, columns)
        planes, row = split(all_rows, rows)
        n, k = split(planes, outputs)
        total = ZERO
        for channel in range(channels):
            c = k // (outputs // groups) * channels + channel
            for i in range(taps_down):
                y = row * stride_down + i * dilate_down - top
                for j in range(taps_right):
                    x = column * stride_right + j * dilate_right - left
                    if 0 <= y < height and 0 <= x < width:
                        w = weight[((k * channels + channel) * taps_down + i) * taps_right + j]
                        total += v(a[n * a_numbers + a_begin + (c * height + y) * width + x], w, low[c], high[c]) * w
        z[at] = total

    @kernel
    def give_shares(c_in, c, ratio, a, weight, low, high, in_numbers, in_begin, c_numbers, c_begin, a_numbers, a_begin, outputs, rows,
                    columns, channels, height, width, taps_down, taps_right, groups, stride_down, stride_right, top, left, dilate_down,
                    dilate_right, count, accumulate):
        at = cuda.grid(1)
        if at >= count:
            return
        numbers = channels * groups * height * width
        n, own = split(at, numbers)
        own_rows, x = split(own, width)
        c_channel, y = split(own_rows, height)
        value, to = a[n * a_numbers + a_begin + own], n * in_numbers + in_begin + own
        group, total = c_channel // channels, ZERO
        for i in range(taps_down):
            down = y + top - i * dilate_down
            for j in range(taps_right):
                right = x + left - j * dilate_right
                if down % stride_down == 0 and right % stride_right == 0:
                    row, column = down // stride_down, right // stride_right
                    if 0 <= row < rows and 0 <= column < columns:
                        for k in range(group * (outputs // groups), (group + 1) * (outputs // groups)):
                            w = weight[((k * channels + c_channel % channels) * taps_down + i) * taps_right + j]
                            place = (k * rows + row) * columns + column
                            total += v(value, w, low[c_channel], high[c_channel]) * w * (
                                ratio[n * outputs * rows * columns + place] * c[n * c_numbers + c_begin + place])
        c_in[to] = total + c_in[to] if accumulate else total

    def direction_forward(z, a, weight, low, high, a_channel, groups, stride_down, stride_right, top, left, dilate_down, dilate_right,
                          first, last):
        """z (N, K, OH, OW) <- sum of v w. weight (K, C / groups, kernel height, width). Units are channels of images."""
        image, behind = whole_images(first, last, z.shape[1])
        count = (behind - image) * math.prod(z.shape[1:])
        launch_for_each(sum_shares, count, flat(z[image:behind]), flat(a), flat(weight), low, high, *place_of(a, a_channel, image),
                        *z.shape[1:], weight.shape[1], *a.shape[2:], *weight.shape[2:], groups, stride_down, stride_right, top, left,
                        dilate_down, dilate_right, count)

    def direction_redistribute(c_in, c, ratio, a, weight, low, high, c_in_channel, c_channel, a_channel, groups, stride_down, stride_right,
                               top, left, dilate_down, dilate_right, accumulate, first, last):
        """c_in <- sum of v w (ratio * c), or added to c_in if `accumulate`. Units are channels of images."""
        image, behind = whole_images(first, last, weight.shape[1] * groups)
        count = (last - first) * math.prod(a.shape[2:])
        launch_for_each(give_shares, count, flat(c_in), flat(c), flat(ratio[image:behind]), flat(a), flat(weight), low, high,
                        *place_of(c_in, c_in_channel, image), *place_of(c, c_channel, image), *place_of(a, a_channel, image),
                        *ratio.shape[1:], weight.shape[1], *a.shape[2:], *weight.shape[2:], groups, stride_down, stride_right, top, left,
                        dilate_down, dilate_right, count, int(accumulate))

    return direction_forward, direction_redistribute
