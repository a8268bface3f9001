"""Rules with more than one ratio, or another than |x| / z: how ratios follow from a layer's sums.

A layer with such a rule is computed as others are, sum by sum; then `ratios_forward` goes once over what came out. The
formulas are in kernels/scalar.py. What they leave of an output's relevance is absorbed.
"""

import numpy as np
from fastdtd.kernels.codes import ALPHA_BETA, DIRECTION, EPSILON, GAMMA, GRADIENT, SIGNS
from fastdtd.kernels.cpu.arrays import flat
from fastdtd.kernels.cpu.elementwise import ABSORBING_PARTS, part_of, span, sum_of_parts
from fastdtd.kernels.cpu.jit import kernel
from fastdtd.kernels.cpu.rows import any_negative
from fastdtd.kernels.cpu.scalar import clip, relevance_of, rule_ratios, rule_writes, signs_ratios


@kernel
def _signs(out, out_pos, out_neg, bias, x_min, x_max, relevance):
    """The formula SIGNS for one channel."""
    for i in range(len(out)):
        total = out[i]
        out[i] = clip(total + bias, x_min, x_max)
        out_pos[i], out_neg[i] = signs_ratios(out[i], total, out_pos[i], relevance)


@kernel
def _signs_of_mean(out, out_pos, out_neg, bias, count_h, count_w, x_min, x_max, relevance):
    """The same of a mean, whose sum is `count_h` times `count_w` as large."""
    width = len(count_w)
    for row in range(len(count_h)):
        for column in range(width):
            i = row * width + column
            total = out[i] * (count_h[row] * count_w[column])
            out[i] = clip(out[i] + bias, x_min, x_max)
            out_pos[i], out_neg[i] = signs_ratios(out[i], total, out_pos[i], relevance)


def _make_channel(formula):
    @kernel
    def channel(out, out_pos, out_neg, out_bias, out_absorbed, bias, factor, beta, epsilon, bias_mode, x_min, x_max,
                relevance):
        """The same for another formula; a mean's ratio is left to be divided."""
        has_neg, has_bias, has_absorbed, _ = rule_writes(formula, beta, bias_mode)
        for i in range(len(out)):
            out[i], out_pos[i], new_neg, to_bias, new_absorbed = rule_ratios(
                formula, out[i], bias, out_pos[i], out_neg[i], out_bias[i], factor, beta, epsilon, bias_mode, x_min,
                x_max, relevance)
            if has_neg:
                out_neg[i] = new_neg
            if has_bias:
                out_bias[i] *= to_bias
            if has_absorbed:
                out_absorbed[i] = new_absorbed

    return channel


# One for each formula, so that it is a loop without branches.
_epsilon, _alpha_beta, _gamma, _gradient, _direction = (
    _make_channel(formula) for formula in (EPSILON, ALPHA_BETA, GAMMA, GRADIENT, DIRECTION))


@kernel
def _divide_by_counts(out, count_h, count_w):
    for row in range(len(count_h)):
        for column in range(len(count_w)):
            out[row * len(count_w) + column] /= count_h[row] * count_w[column]


@kernel
def _largest(values):
    largest = values[0]
    for value in values:
        largest = max(largest, value)
    return largest


@kernel
def ratios_forward(x, ratio_pos, ratio_neg, ratio_bias, absorbed, dead, dead_neg, bias, count_h, count_w, x_channel,
                   formula, factor, beta, epsilon, bias_mode, x_min, x_max, relevance, first, last):
    """x <- x + bias, clipped to x_min..x_max; ratio_pos, ratio_neg, ratio_bias, absorbed <- of P, of Q, of a SHARED
    bias, and what none of them gets.

    x holds t; the ratios hold 1 / P, 1 / Q and 1 / (number of inputs) where the formula asks for them, and are one
    array where it does not. factor is alpha or gamma. count_h (OH,) and count_w (OW,): their product divides a mean.
    dead and dead_neg as in conv2d_forward. Units are channels of images.
    """
    channels, height, width = ratio_pos.shape[1:]
    size = height * width
    flat_x, flat_pos, flat_neg = flat(x), flat(ratio_pos), flat(ratio_neg)
    flat_bias, flat_absorbed = flat(ratio_bias), flat(absorbed)
    is_mean = _largest(count_h) > 1 or _largest(count_w) > 1
    divides = is_mean and rule_writes(formula, beta, bias_mode)[3]
    for unit in range(first, last):
        n, k, at = unit // channels, unit % channels, unit * size
        out = span(flat_x, (n * x.shape[1] + x_channel + k) * size, size)
        out_pos, out_neg, out_bias = span(flat_pos, at, size), span(flat_neg, at, size), span(flat_bias, at, size)
        out_absorbed = span(flat_absorbed, at, size)
        if formula == SIGNS:
            if is_mean:
                _signs_of_mean(out, out_pos, out_neg, bias[k], count_h, count_w, x_min, x_max, relevance)
            else:
                _signs(out, out_pos, out_neg, bias[k], x_min, x_max, relevance)
            if any_negative(ratio_pos.ctypes.data + 4 * at, size):
                dead[n] = 1
            if any_negative(ratio_neg.ctypes.data + 4 * at, size):
                dead_neg[n] = 1
        elif formula == EPSILON:
            _epsilon(out, out_pos, out_neg, out_bias, out_absorbed, bias[k], factor, beta, epsilon, bias_mode, x_min,
                     x_max, relevance)
        elif formula == ALPHA_BETA:
            _alpha_beta(out, out_pos, out_neg, out_bias, out_absorbed, bias[k], factor, beta, epsilon, bias_mode, x_min,
                        x_max, relevance)
        elif formula == GAMMA:
            _gamma(out, out_pos, out_neg, out_bias, out_absorbed, bias[k], factor, beta, epsilon, bias_mode, x_min,
                   x_max, relevance)
        elif formula == GRADIENT:
            _gradient(out, out_pos, out_neg, out_bias, out_absorbed, bias[k], factor, beta, epsilon, bias_mode, x_min,
                      x_max, relevance)
        elif formula == DIRECTION:
            _direction(out, out_pos, out_neg, out_bias, out_absorbed, bias[k], factor, beta, epsilon, bias_mode, x_min,
                       x_max, relevance)
        if divides:
            _divide_by_counts(out_pos, count_h, count_w)


@kernel
def absorb_remainder_redistribute(ledger, sums, absorbed, c, column, c_channel, shared, first, last):
    """ledger[n, column] += what stabilisers and biases absorb of relevance c. Units, sums and `shared` as in
    absorb_dead_redistribute."""
    elements = absorbed.shape[1] * absorbed.shape[2] * absorbed.shape[3]
    positions = absorbed.shape[2] * absorbed.shape[3]
    flat_absorbed, flat_c = flat(absorbed), flat(c)
    for unit in range(first, last):
        n, part = unit // ABSORBING_PARTS, unit % ABSORBING_PARTS
        begin, end = part_of(elements, part)
        kept = span(flat_absorbed, n * elements + begin, end - begin)
        relevance = span(flat_c, (n * c.shape[1] + c_channel) * positions + begin, end - begin)
        total = np.float64(0)
        for i in range(end - begin):
            total += np.float64(kept[i]) * np.float64(relevance[i])
        sums[n, part] = total
        if part == ABSORBING_PARTS - 1 and not shared:
            ledger[n, column] += sum_of_parts(sums, n)


@kernel
def relevance_redistribute(out, x, c, x_channel, c_channel, relevance, first, last):
    """out (N, C, H, W) <- the relevance of x, |x| c, or c where that is relevance itself. Units are images."""
    elements, positions = out.shape[1] * out.shape[2] * out.shape[3], out.shape[2] * out.shape[3]
    flat_out, flat_x, flat_c = flat(out), flat(x), flat(c)
    for n in range(first, last):
        to = span(flat_out, n * elements, elements)
        value = span(flat_x, (n * x.shape[1] + x_channel) * positions, elements)
        factor = span(flat_c, (n * c.shape[1] + c_channel) * positions, elements)
        for i in range(elements):
            to[i] = relevance_of(value[i], factor[i], relevance)
