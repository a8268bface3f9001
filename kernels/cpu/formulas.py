"""Rules with more than one ratio, or another than |x| / z: how ratios follow from a layer's sums.

A layer with such a rule is computed as others are, sum by sum; then `ratios_forward` goes once over what came out. The formulas are in
kernels/scalar.py. What they leave of an output's relevance is absorbed.
"""

import numpy as np
from fastdtd.kernels.codes import SIGNS
from fastdtd.kernels.cpu.elementwise import run
from fastdtd.kernels.cpu.jit import kernel
from fastdtd.kernels.cpu.scalar import clip, relevance_of, rule_ratios, rule_writes, signs_ratios
from fastdtd.kernels.scalar import ZERO


@kernel
def _signs(out, to_one, to_other, bias, counted_down, counted_across, least, most, relevance):
    """The formula SIGNS for one channel."""
    width = len(counted_across)
    for row in range(len(counted_down)):
        for column in range(width):
            i = row * width + column
            value = clip(out[i] + bias, least, most)
            total = out[i] * (counted_down[row] * counted_across[column])
            out[i] = value
            to_one[i], to_other[i] = signs_ratios(value, total, to_one[i], relevance)


@kernel
def ratios_forward(x, one, other, even, lost, dead, other_dead, bias, counted_down, counted_across, x_channel, formula, factor, beta,
                   epsilon, kept, least, most, relevance, first, last):
    """x <- x + bias, clipped to least..most; one, other, even, lost <- the ratios of P, of Q and of a SHARED bias, and what is lost.

    x holds t. one, other, even hold 1 / P, 1 / Q and 1 / (number of inputs) where the formula asks for them, and are the same array
    where it does not. factor is alpha or gamma. counted_down (OH,) and counted_across (OW,): their product divides a mean. dead and
    other_dead as in ratio_of. Units are channels of images.
    """
    channels, height, width = one.shape[1:]
    size = height * width
    flat_x, flat_one, flat_other = x.reshape(x.size), one.reshape(one.size), other.reshape(other.size)
    flat_even, flat_lost = even.reshape(even.size), lost.reshape(lost.size)
    has_other, has_even, has_lost = rule_writes(formula, beta, kept)
    for unit in range(first, last):
        n, k = unit // channels, unit % channels
        out, to_one, to_other = run(flat_x, (n * x.shape[1] + x_channel + k) * size, size), run(flat_one, unit * size, size), run(
            flat_other, unit * size, size)
        to_even, to_lost = run(flat_even, unit * size, size), run(flat_lost, unit * size, size)
        if formula == SIGNS:
            _signs(out, to_one, to_other, bias[k], counted_down, counted_across, least, most, relevance)
            for i in range(size):
                if to_one[i] < ZERO:
                    dead[n] = 1
                if to_other[i] < ZERO:
                    other_dead[n] = 1
            continue
        for i in range(size):
            count = counted_down[i // width] * counted_across[i % width]
            out[i], to_one[i], of_other, of_bias, remains = rule_ratios(
                formula, out[i], bias[k], count, to_one[i], to_other[i], to_even[i], factor, beta, epsilon, kept, least, most, relevance)
            if has_other:
                to_other[i] = of_other
            if has_even:
                to_even[i] *= of_bias
            if has_lost:
                to_lost[i] = remains


@kernel
def lose_redistribute(ledger, lost, c, column, c_channel, first, last):
    """ledger[n, column] += what stabilisers and biases keep of relevance c. Units are images."""
    numbers, places = lost.shape[1] * lost.shape[2] * lost.shape[3], lost.shape[2] * lost.shape[3]
    flat_lost, flat_c = lost.reshape(lost.size), c.reshape(c.size)
    for n in range(first, last):
        part, relevance = run(flat_lost, n * numbers, numbers), run(flat_c, (n * c.shape[1] + c_channel) * places, numbers)
        total = np.float64(0)
        for i in range(numbers):
            total += np.float64(part[i]) * np.float64(relevance[i])
        ledger[n, column] += total


@kernel
def observe_redistribute(out, x, c, x_channel, c_channel, relevance, first, last):
    """out (N, C, H, W) <- the relevance of x, |x| c, or c where that is relevance itself. Units are images."""
    numbers, places = out.shape[1] * out.shape[2] * out.shape[3], out.shape[2] * out.shape[3]
    flat_out, flat_x, flat_c = out.reshape(out.size), x.reshape(x.size), c.reshape(c.size)
    for n in range(first, last):
        to, value = run(flat_out, n * numbers, numbers), run(flat_x, (n * x.shape[1] + x_channel) * places, numbers)
        factor = run(flat_c, (n * c.shape[1] + c_channel) * places, numbers)
        for i in range(numbers):
            to[i] = relevance_of(value[i], factor[i], relevance)
