"""What happens to one element at a time: the ratio of every rule, ReLU, addition, normalisation, and what a layer
absorbs.

Tensors are (N, *, H, W) and used from a given channel on; a call does the units first..last-1, one unit being one
channel of one image. The channels of an image lie one after the other in each tensor, so what does not depend on the
channel does all of them in one loop.
"""

from functools import partial

import numpy as np
from fastdtd.kernels.codes import (
    BOX,
    ELU,
    GELU,
    GELU_TANH,
    HARD_SIGMOID,
    HARD_SWISH,
    MISH,
    SIGMOID,
    SILU,
    SOFTPLUS,
    TANH,
)
from fastdtd.kernels.cpu.arrays import flat
from fastdtd.kernels.cpu.jit import kernel, part
from fastdtd.kernels.cpu.scalar import (
    activation,
    activation_redistributed,
    clip,
    gated,
    nonlinearity,
    positive_feature,
    power,
    ratio_of,
    redistributed,
)
from fastdtd.kernels.cpu.vector_code import (
    F32,
    LANES,
    NO_LANE,
    VECTOR,
    ZEROS,
    any_lane,
    combine_lanes,
    lanes_before,
    larger,
    loop_over,
    magnitude,
    pointers,
    splat,
)
from fastdtd.kernels.scalar import MIN_DENOMINATOR, ZERO
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

ABSORBING_PARTS = 16  # of an image, whose sums are added in their order, whoever made them
_DOUBLES = ir.VectorType(ir.DoubleType(), LANES)
LARGEST, ZERO_SUM = np.finfo(np.float32).max, np.float64(0)
_sums = partial(kernel, fastmath={"reassoc"})  # in any order, so in vectors

# ---- Formulas of kernels/scalar.py, for vectors ----------------------------------------------------------------------


class Finish:
    """Emits clip and ratio_of for vectors: (y without bias, z) -> (x, ratio)."""

    def __init__(self, builder, bias, x_min, x_max, relevance, z_min):
        self.builder, self.relevance = builder, relevance
        self.bias, self.x_min, self.x_max, self.z_min = (splat(builder, value) for value in (bias, x_min, x_max, z_min))

    def __call__(self, y, z):
        builder = self.builder
        y = builder.fadd(y, self.bias)
        y = builder.select(builder.fcmp_ordered("<", y, self.x_min), self.x_min, y)
        y = builder.select(builder.fcmp_ordered(">", y, self.x_max), self.x_max, y)
        numerator = builder.select(self.relevance, ir.Constant(VECTOR, [1.0] * LANES), magnitude(builder, y))
        ratio = builder.select(builder.fcmp_ordered(">", z, self.z_min), builder.fdiv(numerator, z),
                               builder.fsub(ZEROS, numerator))
        return y, ratio

    def store(self, y, z, p_x, p_ratio, step, count, store):
        """Store x and ratio; returns which lanes with a value of the row, which has `count`, have a negative ratio."""
        builder = self.builder
        value, ratio = self(y, z)
        store(value, p_x, step)
        store(ratio, p_ratio, step)
        return builder.and_(builder.fcmp_ordered("<", ratio, ZEROS), lanes_before(builder, builder.sub(count, step)))


@intrinsic
def finish_row(typing_context, x, ratio, z, y, count, bias, shifted, x_min, x_max, relevance, z_min):
    """x <- y + bias, clipped to x_min..x_max; ratio <- |x| / z: `count` values from each address. Returns whether a
    ratio is negative.

    z is what is at `z`, and y if `shifted`.
    """
    signature = types.boolean(*[types.intp] * 5, types.float32, types.boolean, *[types.float32] * 2,
                              types.boolean, types.float32)

    def codegen(context, builder, signature, arguments):
        p_x, p_ratio, p_z, p_y = pointers(builder, arguments[:4], F32, F32, F32, F32)
        count, bias, shifted, x_min, x_max, relevance, z_min = arguments[4:]
        finish = Finish(builder, bias, x_min, x_max, relevance, z_min)

        def one_vector(step, found, load, store):
            z, y = load(p_z, step), load(p_y, step)
            z = builder.select(shifted, builder.fadd(z, y), z)
            return [builder.or_(found[0], finish.store(y, z, p_x, p_ratio, step, count, store))]

        return any_lane(builder, loop_over(builder, count, [NO_LANE], one_vector)[0])

    return signature, codegen


@intrinsic
def redistribute_row(typing_context, out, first, second, a, count, low, high, box, relevance, add):
    """out <- what `count` inputs a get of V^T (ratio * c), or added to out if `add`.

    first is what comes through positive weights, second through negative ones (not positive). Both features if `box`,
    max(a - low, 0) first - max(high - a, 0) second; else that of a's sign, times |a| if `relevance`.
    """
    signature = types.void(*[types.intp] * 5, types.float32, types.float32, *[types.boolean] * 3)

    def codegen(context, builder, signature, arguments):
        p_out, p_first, p_second, p_a = pointers(builder, arguments[:4], F32, F32, F32, F32)
        count, box, relevance, add = arguments[4], *arguments[7:]
        low, high = (splat(builder, bound) for bound in arguments[5:7])

        def one_vector(step, nothing, load, store):
            value, pos, neg = load(p_a, step), load(p_first, step), load(p_second, step)
            both = builder.fsub(builder.fmul(larger(builder, builder.fsub(value, low), ZEROS), pos),
                                builder.fmul(larger(builder, builder.fsub(high, value), ZEROS), neg))
            own = builder.select(builder.fcmp_ordered(">=", value, ZEROS), pos, builder.fsub(ZEROS, neg))
            own = builder.select(relevance, builder.fmul(own, magnitude(builder, value)), own)
            result = builder.select(box, both, own)
            store(builder.select(add, builder.fadd(result, load(p_out, step)), result), p_out, step)
            return nothing

        loop_over(builder, count, [], one_vector)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def _absorb(typing_context, ratio, c, count):
    """Minus the sum of ratio * c over the negative ones of `count` ratios, which become 0."""
    def codegen(context, builder, signature, arguments):
        p_ratio, p_c = pointers(builder, arguments[:2], F32, F32)

        def one_vector(step, totals, load, store):
            value = load(p_ratio, step)
            is_negative, before = builder.fcmp_ordered("<", value, ZEROS), builder.block
            with builder.if_then(any_lane(builder, is_negative)):  # which is rare: what is not read need not come
                wide = [builder.fpext(one, _DOUBLES)
                        for one in (builder.select(is_negative, value, ZEROS), load(p_c, step))]
                total = builder.fsub(totals[0], builder.fmul(*wide))
                store(builder.select(is_negative, ZEROS, value), p_ratio, step)
                end = builder.block
            found = builder.phi(_DOUBLES)
            found.add_incoming(totals[0], before)
            found.add_incoming(total, end)
            return [found]

        total, = loop_over(builder, arguments[2], [ir.Constant(_DOUBLES, [0.0] * LANES)], one_vector)
        return combine_lanes(builder, total, ir.IRBuilder.fadd)

    return types.float64(*[types.intp] * 3), codegen


# ---- Kernels ---------------------------------------------------------------------------------------------------------


@kernel
def channels_in_span(unit, last, channels):
    """How many units from this one on are channels of one image."""
    return min(last - unit, channels - unit % channels)


@kernel
def span(flat, begin, count):
    """flat[begin:begin + count]. A loop over it vectorises; one over flat[begin + i] does not, as that may be
    negative."""
    return flat[begin:begin + count]


@kernel
def part_of(elements, index):
    """Begin and end of one of the ABSORBING_PARTS of so many elements."""
    return elements * index // ABSORBING_PARTS, elements * (index + 1) // ABSORBING_PARTS


@kernel
def sum_of_parts(sums, n):
    total = ZERO_SUM
    for i in range(ABSORBING_PARTS):
        total += sums[n, i]
    return total


@kernel
def absorb_dead_redistribute(ledger, sums, ratio, c, dead, column, c_channel, shared, first, last):
    """ledger[n, column] += the relevance of outputs with z = 0, where dead[n]; their ratios become 0.

    Units: images, each in ABSORBING_PARTS parts, whose sums go to sums (N, ABSORBING_PARTS). Where others do some of an
    image's (`shared`), sum_absorbed_redistribute adds them to the ledger.
    """
    elements, positions = ratio.shape[1] * ratio.shape[2] * ratio.shape[3], ratio.shape[2] * ratio.shape[3]
    p_ratio, p_c = ratio.ctypes.data, c.ctypes.data
    for unit in range(first, last):
        n, i = unit // ABSORBING_PARTS, unit % ABSORBING_PARTS
        sums[n, i] = ZERO_SUM
        if not dead[n]:
            continue
        begin, end = part_of(elements, i)
        sums[n, i] = _absorb(p_ratio + 4 * (n * elements + begin),
                             p_c + 4 * ((n * c.shape[1] + c_channel) * positions + begin), end - begin)
        if i == ABSORBING_PARTS - 1 and not shared:
            ledger[n, column] += sum_of_parts(sums, n)


@kernel
def sum_absorbed_redistribute(ledger, sums, column, first, last):
    """ledger[n, column] += what an image's parts absorbed. Units: images."""
    for n in range(first, last):
        ledger[n, column] += sum_of_parts(sums, n)


@kernel
def clear_redistribute(c_in, begin, end, first, last):
    """c_in[n, begin:end] <- 0. Units: images."""
    for n in range(first, last):
        c_in[n, begin:end] = ZERO


@kernel
def activate_forward(x, a, x_channel, a_channel, channels, slope, x_min, x_max, first, last):
    """x <- a clipped to x_min..x_max, negative values times slope before that."""
    positions = a.shape[2] * a.shape[3]
    flat_x, flat_a = flat(x), flat(a)
    unit = first
    while unit < last:
        n, k = unit // channels, unit % channels
        channel_count = channels_in_span(unit, last, channels)
        count = channel_count * positions
        out = span(flat_x, (n * x.shape[1] + x_channel + k) * positions, count)
        value = span(flat_a, (n * a.shape[1] + a_channel + k) * positions, count)
        for i in range(count):
            out[i] = activation(value[i], slope, x_min, x_max)
        unit += channel_count


@kernel
def activate_redistribute(c_in, c, a, c_in_channel, c_channel, a_channel, channels, slope, x_min, x_max, relevance,
                          derivative, accumulate, first, last):
    """Relevance |x| c of an activation is that of what it was made from: c_in <- c |x| / |a|; relevance itself passes
    as it is.

    If `derivative`, c is a derivative, and so is c_in.
    """
    positions = a.shape[2] * a.shape[3]
    flat_in, flat_c, flat_a = flat(c_in), flat(c), flat(a)
    unit = first
    while unit < last:
        n, k = unit // channels, unit % channels
        channel_count = channels_in_span(unit, last, channels)
        count = channel_count * positions
        out = span(flat_in, (n * c_in.shape[1] + c_in_channel + k) * positions, count)
        factor = span(flat_c, (n * c.shape[1] + c_channel + k) * positions, count)
        value = span(flat_a, (n * a.shape[1] + a_channel + k) * positions, count)
        for i in range(count):
            result = activation_redistributed(factor[i], value[i], slope, x_min, x_max, relevance, derivative)
            out[i] = result + out[i] if accumulate else result
        unit += channel_count


@kernel
def power_forward(x, ratio, a, x_channel, a_channel, exponent, derivative, first, last):
    """x <- |a|^exponent, ratio <- x / |a|, which is 0 where a is; the derivative if `derivative`."""
    channels, positions = ratio.shape[1], ratio.shape[2] * ratio.shape[3]
    flat_x, flat_ratio, flat_a = flat(x), flat(ratio), flat(a)
    for unit in range(first, last):
        n, k = unit // channels, unit % channels
        out = span(flat_x, (n * x.shape[1] + x_channel + k) * positions, positions)
        kept = span(flat_ratio, unit * positions, positions)
        value = span(flat_a, (n * a.shape[1] + a_channel + k) * positions, positions)
        for i in range(positions):
            out[i], kept[i] = power(value[i], exponent, derivative)


@part
def _of_each(out, kept, value, function, alpha, beta, derivative):
    """`function` is a constant at each call, for LLVM makes no vector code of a loop with a switch in it."""
    for i in range(len(out)):
        out[i], kept[i] = nonlinearity(value[i], function, alpha, beta, derivative)


@kernel
def nonlinearity_forward(x, ratio, a, x_channel, a_channel, function, alpha, beta, derivative, first, last):
    """x <- f(a), ratio <- x / a, or 1 where f(0) is not 0; the derivative if `derivative`."""
    channels, positions = ratio.shape[1], ratio.shape[2] * ratio.shape[3]
    flat_x, flat_ratio, flat_a = flat(x), flat(ratio), flat(a)
    unit = first
    while unit < last:
        n, k = unit // channels, unit % channels
        channel_count = channels_in_span(unit, last, channels)
        count = channel_count * positions
        out = span(flat_x, (n * x.shape[1] + x_channel + k) * positions, count)
        kept = span(flat_ratio, unit * positions, count)
        value = span(flat_a, (n * a.shape[1] + a_channel + k) * positions, count)
        if function == SILU:
            _of_each(out, kept, value, SILU, alpha, beta, derivative)
        elif function == HARD_SWISH:
            _of_each(out, kept, value, HARD_SWISH, alpha, beta, derivative)
        elif function == GELU:
            _of_each(out, kept, value, GELU, alpha, beta, derivative)
        elif function == GELU_TANH:
            _of_each(out, kept, value, GELU_TANH, alpha, beta, derivative)
        elif function == MISH:
            _of_each(out, kept, value, MISH, alpha, beta, derivative)
        elif function == ELU:
            _of_each(out, kept, value, ELU, alpha, beta, derivative)
        elif function == TANH:
            _of_each(out, kept, value, TANH, alpha, beta, derivative)
        elif function == SIGMOID:
            _of_each(out, kept, value, SIGMOID, alpha, beta, derivative)
        elif function == HARD_SIGMOID:
            _of_each(out, kept, value, HARD_SIGMOID, alpha, beta, derivative)
        else:
            _of_each(out, kept, value, SOFTPLUS, alpha, beta, derivative)
        unit += channel_count


@kernel
def multiply_forward(x, a, b, x_channel, a_channel, b_channel, channels, gate_channels, first, last):
    """x <- a * b, b with a value for each element, channel or pixel."""
    positions, gate_positions = a.shape[2] * a.shape[3], b.shape[2] * b.shape[3]
    flat_x, flat_a, flat_b = flat(x), flat(a), flat(b)
    for unit in range(first, last):
        n, k = unit // channels, unit % channels
        out = span(flat_x, (n * x.shape[1] + x_channel + k) * positions, positions)
        value = span(flat_a, (n * a.shape[1] + a_channel + k) * positions, positions)
        gate = span(flat_b, (n * b.shape[1] + b_channel + k % gate_channels) * gate_positions, gate_positions)
        if gate_positions == positions:
            for i in range(positions):
                out[i] = value[i] * gate[i]
        else:
            for i in range(positions):
                out[i] = value[i] * gate[0]


@kernel
def multiply_redistribute(c_in, c, b, c_in_channel, c_channel, b_channel, channels, gate_channels, share, relevance,
                          derivative, accumulate, first, last):
    """What is multiplied gets of a product: c_in <- share * |b| * c; relevance itself passes as it is.

    If `derivative`, c is a derivative, and so is c_in.
    """
    positions, gate_positions = c.shape[2] * c.shape[3], b.shape[2] * b.shape[3]
    flat_in, flat_c, flat_b = flat(c_in), flat(c), flat(b)
    for unit in range(first, last):
        n, k = unit // channels, unit % channels
        out = span(flat_in, (n * c_in.shape[1] + c_in_channel + k) * positions, positions)
        factor = span(flat_c, (n * c.shape[1] + c_channel + k) * positions, positions)
        gate = span(flat_b, (n * b.shape[1] + b_channel + k % gate_channels) * gate_positions, gate_positions)
        step = 1 if gate_positions == positions else 0
        for i in range(positions):
            result = share * gated(factor[i], gate[i * step], relevance, derivative)
            out[i] = result + out[i] if accumulate else result


@kernel
def gate_redistribute(c_in, c, a, c_in_channel, c_channel, a_channel, channels, gate_channels, share, relevance,
                      derivative, accumulate, first, last):
    """What a gate gets that has one value for several elements of a: c_in <- the sum of share * |a| * c over them.

    Units are channels of the gate.
    """
    positions, gate_positions = c.shape[2] * c.shape[3], c_in.shape[2] * c_in.shape[3]
    flat_in, flat_c, flat_a = flat(c_in), flat(c), flat(a)
    for unit in range(first, last):
        n, k = unit // gate_channels, unit % gate_channels
        out = span(flat_in, (n * c_in.shape[1] + c_in_channel + k) * gate_positions, gate_positions)
        if not accumulate:
            for i in range(gate_positions):
                out[i] = ZERO
        total = ZERO_SUM
        for channel in range(k, channels, gate_channels):
            factor = span(flat_c, (n * c.shape[1] + c_channel + channel) * positions, positions)
            value = span(flat_a, (n * a.shape[1] + a_channel + channel) * positions, positions)
            if gate_positions == positions:
                for i in range(positions):
                    out[i] += share * gated(factor[i], value[i], relevance, derivative)
            else:
                for i in range(positions):
                    total += np.float64(gated(factor[i], value[i], relevance, derivative))
        if gate_positions != positions:
            out[0] += share * np.float32(total)


@kernel
def rearrange_forward(x, a, index, x_channel, a_channel, first, last):
    """x <- a[index], 0 where index (C, H, W) is -1. Units are images."""
    x_positions, a_positions = x.shape[2] * x.shape[3], a.shape[2] * a.shape[3]
    flat_x, flat_a, positions = flat(x), flat(a), flat(index)
    for n in range(first, last):
        out = span(flat_x, (n * x.shape[1] + x_channel) * x_positions, len(positions))
        value = flat_a[(n * a.shape[1] + a_channel) * a_positions:(n + 1) * a.shape[1] * a_positions]
        for i in range(len(positions)):
            out[i] = value[positions[i]] if positions[i] >= 0 else ZERO


@kernel
def rearrange_redistribute(c_in, ledger, c, starts, readers, column, c_in_channel, c_channel, relevance, accumulate,
                           first, last):
    """c_in[i] <- the sum of c over the readers of element i, readers[starts[i]:starts[i + 1]]. Those before starts[0]
    read none: their relevance goes to ledger[n, column]. Units are images."""
    in_positions, positions = c_in.shape[2] * c_in.shape[3], c.shape[2] * c.shape[3]
    flat_in, flat_c = flat(c_in), flat(c)
    for n in range(first, last):
        out = span(flat_in, (n * c_in.shape[1] + c_in_channel) * in_positions, len(starts) - 1)
        factor = flat_c[(n * c.shape[1] + c_channel) * positions:(n + 1) * c.shape[1] * positions]
        for i in range(len(out)):
            total = out[i] if accumulate else ZERO
            for j in range(starts[i], starts[i + 1]):
                total += factor[readers[j]]
            out[i] = total
        if relevance:
            absorbed = np.float64(0)
            for j in range(starts[0]):
                absorbed += np.float64(factor[readers[j]])
            ledger[n, column] = absorbed


@kernel
def copy_forward(x, a, x_begin, a_begin, count, accumulate, first, last):
    """x[n, x_begin:x_begin + count] <- a[n, a_begin:a_begin + count], or added to it. Units: images."""
    flat_x, flat_a = flat(x), flat(a)
    for n in range(first, last):
        out = span(flat_x, n * x.shape[1] + x_begin, count)
        value = span(flat_a, n * a.shape[1] + a_begin, count)
        if accumulate:
            for i in range(count):
                out[i] += value[i]
        else:
            for i in range(count):
                out[i] = value[i]


@kernel
def add_forward(x, ratio, dead, a, b, low_a, high_a, low_b, high_b,
                x_channel, a_channel, b_channel, features, x_min, x_max, relevance, first, last):
    """x <- a + b, clipped to x_min..x_max; ratio <- |x| / z with z the sum of both features."""
    channels, positions = ratio.shape[1], ratio.shape[2] * ratio.shape[3]
    flat_x, flat_ratio, flat_a = flat(x), flat(ratio), flat(a)
    flat_b = flat(b)
    unit = first
    while unit < last:
        n, k = unit // channels, unit % channels
        # each channel has its own bounds
        channel_count = 1 if features == BOX else channels_in_span(unit, last, channels)
        count = channel_count * positions
        out = span(flat_x, (n * x.shape[1] + x_channel + k) * positions, count)
        to_ratio = span(flat_ratio, unit * positions, count)
        p = span(flat_a, (n * a.shape[1] + a_channel + k) * positions, count)
        q = span(flat_b, (n * b.shape[1] + b_channel + k) * positions, count)
        # read in the loop, bounds keep LLVM from making vectors of AVX2 of it
        absorbs, of_a, of_b = False, (low_a[k], high_a[k]), (low_b[k], high_b[k])
        for i in range(count):
            z = positive_feature(p[i], features, *of_a) + positive_feature(q[i], features, *of_b)
            value = clip(p[i] + q[i], x_min, x_max)
            r = ratio_of(value, z, MIN_DENOMINATOR, relevance)
            out[i] = value
            to_ratio[i] = r
            absorbs |= r < ZERO
        if absorbs:
            dead[n] = 1
        unit += channel_count


@kernel
def add_redistribute(c_in, c, ratio, a, low, high,
                     c_in_channel, c_channel, a_channel, features, relevance, accumulate, first, last):
    """What one of the two inputs, a, gets: c_in <- ratio * c, for the features that it has."""
    channels, positions = ratio.shape[1], ratio.shape[2] * ratio.shape[3]
    flat_in, flat_c, flat_ratio = flat(c_in), flat(c), flat(ratio)
    flat_a = flat(a)
    unit = first
    while unit < last:
        n, k = unit // channels, unit % channels
        channel_count = 1 if features == BOX else channels_in_span(unit, last, channels)
        count = channel_count * positions
        out = span(flat_in, (n * c_in.shape[1] + c_in_channel + k) * positions, count)
        factor = span(flat_c, (n * c.shape[1] + c_channel + k) * positions, count)
        r = span(flat_ratio, unit * positions, count)
        value = span(flat_a, (n * a.shape[1] + a_channel + k) * positions, count)
        for i in range(count):
            result = redistributed(r[i] * factor[i], value[i], features, low[k], high[k], relevance)
            out[i] = result + out[i] if accumulate else result
        unit += channel_count


# ---- What a call is given and what it gives, looked at in one go: NumPy takes ten microseconds for each --------------


@_sums
def surely_within(low, high, images):
    """Whether the values of images (N, C, H, W) are from low (C,) to high (C,), and none is NaN."""
    positions, flat_images = images.shape[2] * images.shape[3], flat(images)
    for plane in range(images.shape[0] * images.shape[1]):
        values, inside = span(flat_images, plane * positions, positions), 0
        lowest, highest = low[plane % images.shape[1]], high[plane % images.shape[1]]
        for i in range(positions):
            inside += (values[i] >= lowest) & (values[i] <= highest)
        if inside < positions:
            return False
    return True


@_sums
def sum_relevance(sums, relevance, scores, ledger, explained, loss):
    """sums (N,) float64 of relevance (N, C, H, W). Whether all is surely well: relevance and scores (N, K) are finite,
    and sums and ledger (N, layers) make up what is explained (N,), which is positive, but for a part `loss` of it."""
    elements, flat_relevance = relevance.shape[1] * relevance.shape[2] * relevance.shape[3], flat(relevance)
    is_well = True
    for n in range(len(relevance)):
        values, total, absorbed, finite = span(flat_relevance, n * elements, elements), ZERO_SUM, ZERO_SUM, 0
        for i in range(elements):
            total += np.float64(values[i])
        for i in range(ledger.shape[1]):
            absorbed += ledger[n, i]
        for i in range(scores.shape[1]):
            finite += abs(scores[n, i]) <= LARGEST
        whole = np.float64(explained[n])
        is_well &= whole > 0 and abs(whole - total - absorbed) <= loss * whole and finite == scores.shape[1]
        sums[n] = total
    return is_well
