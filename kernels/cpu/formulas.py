"""Rules with more than one ratio, or another than |x| / z: how ratios follow from a layer's sums.

A layer with such a rule is computed as others are, sum by sum; then `ratios_forward` goes once over what came out. P is the sum of what
speaks for an output (max(W, 0) a, or -W a where a is negative), Q of what speaks against it, both as positive numbers; t = P - Q.

    rule         ratio of P's weights               ratio of Q's weights             b+, b- = max(b, 0), max(-b, 0), or 0 where bias is
    signs        |x| / P where x >= 0               |x| / Q where x < 0              IGNORED
    epsilon      1 / (t + b +- epsilon)             that of W, not of its parts
    alpha-beta   alpha / (P + b+ + epsilon)         -beta / (Q + b- + epsilon)
    gamma        (1 + gamma) / (z +- epsilon)       -1 / (z +- epsilon)              where t + b > 0, z = t + b + gamma (P + b+)
                 1 / (z +- epsilon)                 -(1 + gamma) / (z +- epsilon)    where t + b < 0, z = t + b - gamma (Q + b-)
    direction    1 / z, of z that direction.py has summed
    gradient     1 inside the activation's bounds

Each for relevance R itself; where the output carries c of R = |x| c, the ratios are |x| times these. What they leave of an output's
relevance is its `lost`.
"""

import numpy as np
from fastdtd.kernels.codes import ALPHA_BETA, DIRECTION, EPSILON, GAMMA, GRADIENT, IGNORED, SHARED, SIGNS
from fastdtd.kernels.cpu.elementwise import LEAST, finish, run
from fastdtd.kernels.cpu.jit import kernel

_ZERO = np.float32(0)
_ONE = np.float32(1)
_ROUNDING = np.float32(1e-6)  # of P: a smaller Q, which is found as P - t, is what rounding left


@kernel
def _over(number, z, epsilon):
    """number / z, z moved away from zero by epsilon."""
    z += epsilon if z >= _ZERO else -epsilon
    return number / z if abs(z) > LEAST else _ZERO


@kernel
def _sum_of(ratio):
    """z, from what ratio_of made of it for relevance."""
    return _ONE / ratio if ratio > _ZERO else _ZERO


@kernel
def _signs(out, to_one, to_other, bias, counted_down, counted_across, least, most, relevance):
    """The formula SIGNS for one channel."""
    width = len(counted_across)
    for row in range(len(counted_down)):
        for column in range(width):
            i = row * width + column
            value = finish(out[i] + bias, least, most)
            share, p = _ONE if relevance else abs(value), _sum_of(to_one[i])
            q = p - out[i] * (counted_down[row] * counted_across[column])
            out[i] = value
            to_one[i] = _ZERO if value < _ZERO else share / p if p > LEAST else -share
            to_other[i] = _ZERO if value >= _ZERO else share / q if q > max(_ROUNDING * p, LEAST) else -share


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
    for unit in range(first, last):
        n, k = unit // channels, unit % channels
        out, to_one, to_other = run(flat_x, (n * x.shape[1] + x_channel + k) * size, size), run(flat_one, unit * size, size), run(
            flat_other, unit * size, size)
        to_even, to_lost = run(flat_even, unit * size, size), run(flat_lost, unit * size, size)
        if formula == SIGNS:
            _signs(out, to_one, to_other, bias[k], counted_down, counted_across, least, most, relevance)
            for i in range(size):
                if to_one[i] < _ZERO:
                    dead[n] = 1
                if to_other[i] < _ZERO:
                    other_dead[n] = 1
            continue
        for i in range(size):
            t, count = out[i], counted_down[i // width] * counted_across[i % width]
            y = t + bias[k]
            value = finish(y, least, most)
            out[i] = value
            is_part = kept != IGNORED and (kept != SHARED or to_even[i] > _ZERO)  # some windows hold padding only
            b = bias[k] if is_part else _ZERO
            b_for, b_against = max(b, _ZERO), max(-b, _ZERO)
            of_bias = remains = _ZERO
            share = _ONE if relevance else abs(value)
            if formula == EPSILON:
                s = _over(share, t + b, epsilon)
                of_bias, remains = b * s, share - t * s
                to_one[i] = s / count
            elif formula == ALPHA_BETA:
                p, q = _sum_of(to_one[i]), _sum_of(to_other[i]) if beta > _ZERO else _ZERO
                s_for = _over(share * factor, p + b_for, epsilon)
                s_against = _over(share * beta, q + b_against, epsilon)
                of_bias, remains = b_for * s_for - b_against * s_against, share - (p * s_for - q * s_against)
                to_one[i] = s_for
                if beta > _ZERO:
                    to_other[i] = -s_against
            elif formula == GAMMA:
                p = _sum_of(to_one[i])
                q, sign = max(p - t, _ZERO), t + b
                more_for, more_against = factor if sign > _ZERO else _ZERO, factor if sign < _ZERO else _ZERO
                z = sign + more_for * (p + b_for) - more_against * (q + b_against)
                s = _over(share, z, epsilon) if sign != _ZERO else _ZERO
                of_bias = (b + more_for * b_for - more_against * b_against) * s
                remains = share - (t + more_for * p - more_against * q) * s
                to_one[i], to_other[i] = (_ONE + more_for) * s, -(_ONE + more_against) * s
            elif formula == DIRECTION:
                z = to_one[i]
                shares = abs(z) > LEAST
                to_one[i], to_lost[i] = share / z if shares else _ZERO, _ZERO if shares else share
            elif formula == GRADIENT:
                to_one[i] = (_ONE if least < y < most else _ZERO) / count
            if formula in (EPSILON, ALPHA_BETA, GAMMA):
                if kept == SHARED:
                    to_even[i] *= of_bias
                    remains -= of_bias
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
            to[i] = factor[i] if relevance else abs(value[i]) * factor[i]
