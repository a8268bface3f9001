"""Resizing: each output is a weighted mean along both axes, by weights (H', H) and (W', W) that are mostly zero and
never negative. Those above zero are lists: of output i from starts[i] to starts[i + 1], what they read in `sources`.

Each row of the output is first the weighted rows of the input, side by side in vectors, then the weighted columns of
that; backward the same with the lists of the transposed weights. Tensors are (N, *, H, W) and used from a given channel
on; a unit is one channel of one image. lines is flat scratch.
"""

from fastdtd.kernels.cpu.arrays import flat
from fastdtd.kernels.cpu.elementwise import span
from fastdtd.kernels.cpu.jit import kernel
from fastdtd.kernels.cpu.scalar import clip, positive_feature, ratio_of, redistributed
from fastdtd.kernels.scalar import MIN_DENOMINATOR, ZERO


def resize_elements(in_width, out_width):
    """Floats of `lines`."""
    return 2 * max(in_width, out_width)


@kernel
def resize_forward(x, ratio, dead, a, low, high, row_starts, row_sources, row_weights, row_v, column_starts,
                   column_sources, column_weights, column_v, lines, x_channel, a_channel, features, x_min, x_max,
                   relevance, first, last):
    """x <- the weighted sums of a, clipped to x_min..x_max; ratio <- |x| / z with z the sums of a's features, by the
    weights v.

    starts (H' + 1,), (W' + 1,) and sources are int32, the weights float32.
    """
    channels, height, across = ratio.shape[1:]
    rows, width = a.shape[2:]
    flat_x, flat_ratio, flat_a = flat(x), flat(ratio), flat(a)
    sums, features_sums = span(flat(lines), 0, width), span(flat(lines), width, width)
    for unit in range(first, last):
        n, k = unit // channels, unit % channels
        plane, absorbs = (n * a.shape[1] + a_channel + k) * rows * width, False
        for y in range(height):
            for i in range(width):
                sums[i] = features_sums[i] = ZERO
            for t in range(row_starts[y], row_starts[y + 1]):
                source = span(flat_a, plane + row_sources[t] * width, width)
                weight, v = row_weights[t], row_v[t]
                for i in range(width):
                    sums[i] += weight * source[i]
                    features_sums[i] += v * positive_feature(source[i], features, low[k], high[k])
            out = span(flat_x, ((n * x.shape[1] + x_channel + k) * height + y) * across, across)
            to_ratio = span(flat_ratio, (unit * height + y) * across, across)
            for j in range(across):
                total, z = ZERO, ZERO
                for t in range(column_starts[j], column_starts[j + 1]):
                    total += column_weights[t] * sums[column_sources[t]]
                    z += column_v[t] * features_sums[column_sources[t]]
                value = clip(total, x_min, x_max)
                r = ratio_of(value, z, MIN_DENOMINATOR, relevance)
                out[j], to_ratio[j] = value, r
                absorbs |= r < ZERO
        if absorbs:
            dead[n] = 1


@kernel
def resize_redistribute(c_in, c, ratio, a, low, high, row_starts, row_sources, row_v, column_starts, column_sources,
                        column_v, lines, c_in_channel, c_channel, a_channel, features, relevance, accumulate, first,
                        last):
    """c_in <- V^T (ratio * c), for the features that an input has. The lists are those of the transposed weights."""
    channels, height, across = ratio.shape[1:]
    rows, width = c_in.shape[2:]
    flat_in, flat_c, flat_ratio, flat_a = flat(c_in), flat(c), flat(ratio), flat(a)
    sums = span(flat(lines), 0, across)
    for unit in range(first, last):
        n, k = unit // channels, unit % channels
        for y in range(rows):
            for j in range(across):
                sums[j] = ZERO
            for t in range(row_starts[y], row_starts[y + 1]):
                r = span(flat_ratio, (unit * height + row_sources[t]) * across, across)
                factor = span(flat_c, ((n * c.shape[1] + c_channel + k) * height + row_sources[t]) * across, across)
                v = row_v[t]
                for j in range(across):
                    sums[j] += v * (r[j] * factor[j])
            out = span(flat_in, ((n * c_in.shape[1] + c_in_channel + k) * rows + y) * width, width)
            value = span(flat_a, ((n * a.shape[1] + a_channel + k) * rows + y) * width, width)
            for i in range(width):
                total = ZERO
                for t in range(column_starts[i], column_starts[i + 1]):
                    total += column_v[t] * sums[column_sources[t]]
                result = redistributed(total, value[i], features, low[k], high[k], relevance)
                out[i] = result + out[i] if accumulate else result
