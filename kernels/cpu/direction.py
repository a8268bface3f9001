"""The method's general rule: each neuron's root point is searched along a direction v(a, w) of the user's.

    R_i = sum over j of  v_ij w_ij / z_j  R_j          z_j = sum over i of v_ij w_ij

(Montavon et al., Pattern Recognition 65 (2017), formula 5.) v depends on an activation and a weight together, so it
cannot be split into features and weights, and each connection is computed. A dense layer is a convolution of one pixel
here.
"""

from functools import cache, partial

from fastdtd.kernels.cpu.jit import kernel
from fastdtd.kernels.scalar import ZERO, direction_formula


@cache
def direction_kernels(direction, bounded):
    """direction_forward and direction_redistribute for a Python function v(a, w) or, if `bounded`, v(a, w, low, high).

    They are compiled for this process alone: nothing on disk tells one function from another. TypeError: it cannot be
    compiled.
    """
    v = direction_formula(direction, bounded, partial(kernel, keep=False))

    def direction_forward(z, a, weight, low, high, a_channel, groups, stride_h, stride_w, pad_top, pad_left, dilation_h,
                          dilation_w, first, last):
        """z (N, K, OH, OW) <- sum of v w. weight (K, C / groups, height, width). Units: channels of images."""
        outputs, rows, columns = z.shape[1:]
        per_group = weight.shape[1]
        for unit in range(first, last):
            n, k = unit // outputs, unit % outputs
            z[n, k] = ZERO
            for channel in range(per_group):
                c = k // (outputs // groups) * per_group + channel
                for i in range(weight.shape[2]):
                    for j in range(weight.shape[3]):
                        w = weight[k, channel, i, j]
                        for row in range(rows):
                            y = row * stride_h + i * dilation_h - pad_top
                            if not 0 <= y < a.shape[2]:
                                continue
                            for column in range(columns):
                                x = column * stride_w + j * dilation_w - pad_left
                                if 0 <= x < a.shape[3]:
                                    z[n, k, row, column] += v(a[n, a_channel + c, y, x], w, low[c], high[c]) * w

    def direction_redistribute(c_in, c, ratio, a, weight, low, high, c_in_channel, c_channel, a_channel, groups,
                               stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w, accumulate, first, last):
        """c_in <- sum of v w (ratio * c), or added to c_in if `accumulate`. Units are channels of images."""
        outputs, rows, columns = ratio.shape[1:]
        per_group = weight.shape[1]
        inputs, outputs_per_group = per_group * groups, outputs // groups
        for unit in range(first, last):
            n, channel = unit // inputs, unit % inputs
            group = channel // per_group
            if not accumulate:
                c_in[n, c_in_channel + channel] = ZERO
            for k in range(group * outputs_per_group, (group + 1) * outputs_per_group):
                for i in range(weight.shape[2]):
                    for j in range(weight.shape[3]):
                        w = weight[k, channel % per_group, i, j]
                        for row in range(rows):
                            y = row * stride_h + i * dilation_h - pad_top
                            if not 0 <= y < a.shape[2]:
                                continue
                            for column in range(columns):
                                x = column * stride_w + j * dilation_w - pad_left
                                if 0 <= x < a.shape[3]:
                                    contribution = v(a[n, a_channel + channel, y, x], w, low[channel],
                                                     high[channel]) * w
                                    c_in[n, c_in_channel + channel, y, x] += (
                                        contribution * (ratio[n, k, row, column] * c[n, c_channel + k, row, column]))

    return kernel(direction_forward, keep=False), kernel(direction_redistribute, keep=False)
