"""Pools and their redistribution: windows side by side in the lanes of a vector.

Forward, windows read padded planes through a table of offsets, as the taps of a convolution do (conv2d.py): a tap of
neighbouring windows is neighbouring values. In the backward pass each input sums the contributions of the windows that
hold it. Under a stride t, the inputs of a row whose windows are side by side are every t-th: its phases.

Tensors are (N, *, H, W) and used from a given channel on; a call does the units first..last-1, one unit being one
channel of one image. Every window holds at least one value that is not padding (graph.py sees to it). block and results
are flat scratch.
"""

import numpy as np
from fastdtd.kernels.codes import BOX, NEGATED, ONES, SIGNED, VALUE
from fastdtd.kernels.cpu.arrays import flat
from fastdtd.kernels.cpu.elementwise import Finish
from fastdtd.kernels.cpu.jit import kernel
from fastdtd.kernels.cpu.planes import copy_plane, copy_product
from fastdtd.kernels.cpu.rows import add_at, copy_exactly, fill_exactly, spread
from fastdtd.kernels.cpu.scalar import ratio_of
from fastdtd.kernels.cpu.vector_code import (
    F32,
    I32,
    I64,
    INTEGERS,
    LANES,
    NO_LANE,
    VECTOR,
    ZEROS,
    any_lane,
    combine_lanes,
    integer,
    larger,
    load_second,
    load_vector,
    loop_over,
    loop_range,
    magnitude,
    multiply_add,
    pointers,
    positive,
    progression,
    splat,
)
from fastdtd.kernels.scalar import LOWEST, MIN_DENOMINATOR, TIE, ZERO
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_NEVER = np.float32(-np.inf)  # around the input of a maximum
# around that of a sum: a NaN that no arithmetic makes, so that real ones are not lost
_PADDING = np.uint32(0xffffffff).view(np.float32)
_ALL_BITS = ir.Constant(INTEGERS, [-1] * LANES)


# ---- Vector code -----------------------------------------------------------------------------------------------------


def _make_find_winners(spacing):
    @intrinsic
    def find_winners(typing_context, x, winner, block, offsets, positions, taps, count, first, step):
        def codegen(context, builder, signature, arguments):
            p_x, p_winner, p_block, p_offsets, p_places = pointers(builder, arguments[:5], F32, I32, F32, I32, I32)
            taps, count, first, stride = arguments[5:]
            nowhere = ir.Constant(INTEGERS, [0] * LANES)
            tie, lowest = ir.Constant(VECTOR, [float(TIE)] * LANES), ir.Constant(VECTOR, [float(LOWEST)] * LANES)

            def one_vector(step, nothing, load, store):
                def one_tap(tap, so_far):
                    largest, limit, position = so_far
                    value = _load_tap(builder, p_block, p_offsets, tap, step, spacing)
                    wins = builder.fcmp_ordered(">", value, limit)
                    # need not wait for the taps before
                    own_limit = multiply_add(builder, value, tie, magnitude(builder, value))
                    here = splat(builder, builder.load(builder.gep(p_places, [tap])), INTEGERS)
                    return [builder.select(wins, new, old) for new,
                            old in ((value, largest), (own_limit, limit), (here, position))]

                largest, _, position = loop_range(builder, integer(0), taps, 1, [lowest, lowest, nowhere], one_tap)
                own_positions = progression(builder, builder.add(first, builder.mul(step, stride)), stride)
                store(largest, p_x, step)
                store(builder.add(position, own_positions), p_winner, step)
                return nothing

            loop_over(builder, count, [], one_vector)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 9), codegen

    return find_winners


# (x, winner, block, offsets, positions, taps, count, first, step): x <- the largest value of each window, winner
# (int32) <- its position: `count` windows.
#
# Window i reads block[offsets[t] + i], of the second block[offsets[t] + 2 * i], for each tap t; that value's position
# is first + i * step + positions[t]. offsets, positions: int32. A value has to exceed those before it by more than the
# last bit, or the first of them wins.
_find_winners, _find_winners_apart = _make_find_winners(1), _make_find_winners(2)


def _load_tap(builder, p_block, p_offsets, tap, step, spacing=1):
    offset = builder.sext(builder.load(builder.gep(p_offsets, [tap])), I64)
    if spacing == 1:
        return load_vector(builder, p_block, builder.add(step, offset))
    return load_second(builder, p_block, builder.add(builder.shl(step, integer(1)), offset))


class _Window:
    """The sum or the largest of a window's values, and z, the sum of max(value - shift, 0) or how many there are."""

    def __init__(self, builder, shift, counted, maximum):
        self.builder, self.shift, self.counted, self.maximum = builder, splat(builder, shift), counted, maximum
        self.empty = [builder.select(maximum, ir.Constant(VECTOR, [float("-inf")] * LANES), ZEROS), ZEROS]
        self.no_number = builder.bitcast(_ALL_BITS, VECTOR)

    def add(self, so_far, value):
        builder, (y, z) = self.builder, so_far
        is_number = builder.icmp_signed("!=", builder.bitcast(value, INTEGERS), _ALL_BITS)
        one = builder.select(is_number, ir.Constant(VECTOR, [1.0] * LANES), ZEROS)
        feature = builder.select(self.counted, one, positive(builder, builder.fsub(value, self.shift)))
        total = builder.fadd(y, builder.select(is_number, value, ZEROS))
        return [builder.select(self.maximum, larger(builder, value, y), total), builder.fadd(z, feature)]


@intrinsic
def _reduce_windows(typing_context, x, ratio, block, offsets, taps, count, down, across, shift, counted, maximum,
                    relevance):
    """x <- the sum (or maximum) of each window over down * across[i] (float32), ratio <- |x| / z: `count` windows that
    read as those of _find_winners. Returns whether a ratio is negative."""
    signature = types.boolean(*[types.intp] * 6, types.float32, types.intp, types.float32, *[types.boolean] * 3)

    def codegen(context, builder, signature, arguments):
        p_x, p_ratio, p_block, p_offsets, p_across = pointers(builder, [*arguments[:4], arguments[7]], F32, F32, F32,
                                                              I32, F32)
        taps, count, down, shift, counted, maximum, relevance = [arguments[i] for i in (4, 5, 6, 8, 9, 10, 11)]
        window, down = _Window(builder, shift, counted, maximum), splat(builder, down)
        constants = [ir.Constant(F32, value) for value in (0.0, float("-inf"), float("inf"), float(MIN_DENOMINATOR))]
        finish = Finish(builder, *constants[:3], relevance, constants[3])

        def one_vector(step, found, load, store):
            y, z = loop_range(builder, integer(0), taps, 1, window.empty,
                         lambda tap, so_far: window.add(so_far, _load_tap(builder, p_block, p_offsets, tap, step)))
            mean = builder.fdiv(y, builder.fmul(down, load(p_across, step)))
            return [builder.or_(found[0], finish.store(mean, z, p_x, p_ratio, step, count, store))]

        return any_lane(builder, loop_over(builder, count, [NO_LANE], one_vector)[0])

    return signature, codegen


@intrinsic
def _reduce_plane(typing_context, y, z, plane, count, shift, counted, maximum):
    """y <- the sum (or maximum) of `count` values, z <- the sum of their features."""
    def codegen(context, builder, signature, arguments):
        p_y, p_z, p_plane = pointers(builder, arguments[:3], F32, F32, F32)
        window, maximum = _Window(builder, *arguments[4:]), arguments[6]
        y, z = loop_over(builder, arguments[3], window.empty,
                         lambda step, so_far, load, store: window.add(so_far, load(p_plane, step, window.no_number)))
        total, largest = combine_lanes(builder, y, ir.IRBuilder.fadd), combine_lanes(builder, y, larger)
        builder.store(builder.select(maximum, largest, total), p_y)
        builder.store(combine_lanes(builder, z, ir.IRBuilder.fadd), p_z)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4, types.float32, types.boolean, types.boolean), codegen


@intrinsic
def _sum_contributions(typing_context, out, contributions, down, width, across, count, add):
    """out <- the sum of `down` rows (`width` apart) of `across` values, all of them backwards from `contributions`, or
    added to out if `add`.

    For `count` inputs side by side.
    """
    def codegen(context, builder, signature, arguments):
        p_out, p_contributions = pointers(builder, arguments[:2], F32, F32)
        down, width, across, count, add = arguments[2:]

        def one_vector(step, nothing, load, store):
            def one_row(i, total):
                row = builder.sub(step, builder.mul(i, width))

                def one_window(j, total):
                    return [builder.fadd(total[0], load_vector(builder, p_contributions, builder.sub(row, j)))]

                return loop_range(builder, integer(0), across, 1, total, one_window)

            total, = loop_range(builder, integer(0), down, 1, [ZEROS], one_row)
            store(builder.select(add, builder.fadd(load(p_out, step), total), total), p_out, step)
            return nothing

        loop_over(builder, count, [], one_vector)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 6, types.boolean), codegen


@intrinsic
def _redistribute_features(typing_context, out, results, a, count, shift, negate, whole, gate, add):
    """out <- results * max(a - shift, 0), a negated before if `negate`, of either sign if `whole`; or, if `gate`,
    results where that is not negative, else 0; or added to out if `add`: `count` values."""
    def codegen(context, builder, signature, arguments):
        p_out, p_results, p_a = pointers(builder, arguments[:3], F32, F32, F32)
        count, shift, negate, whole, gate, add = arguments[3], splat(builder, arguments[4]), *arguments[5:]

        def one_vector(step, nothing, load, store):
            result, value = load(p_results, step), load(p_a, step)
            value = builder.select(negate, builder.fsub(ZEROS, value), value)
            gated = builder.select(builder.fcmp_ordered("<", value, ZEROS), ZEROS, result)
            value = builder.fsub(value, shift)
            scaled = builder.fmul(result, builder.select(whole, value, positive(builder, value)))
            result = builder.select(gate, gated, scaled)
            store(builder.select(add, builder.fadd(load(p_out, step), result), result), p_out, step)
            return nothing

        loop_over(builder, count, [], one_vector)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4, types.float32, *[types.boolean] * 4), codegen


# ---- Max-pools by winner ---------------------------------------------------------------------------------------------


@kernel
def max_pool2d_forward(x, winner, a, planes, offsets, positions, block, x_channel, a_channel, stride_h, stride_w,
                       block_rows, block_columns, halo_rows, halo_columns, first, last):
    """x <- the largest value of each window; winner (N, C, OH, OW) int32 <- its index in the plane, the first of
    equals.

    Values that rounding may have made unequal count as equal: else in an evenly coloured area noise would pick the
    winners. planes (P, 2) is where each plane begins relative to a window's own position, offsets (T,) where each tap
    lies in the block, from a window's own position on, positions (T,) where in the plane of a. With no planes windows
    read the tensor itself: all are inside, and stride_w is 1 or 2.
    """
    channels, height, across = winner.shape[1:]
    width, plane_rows = block_columns + halo_columns, block_rows + halo_rows
    plane, size, a_size = plane_rows * width, height * across, a.shape[2] * a.shape[3]
    p_x, p_winner, p_a, p_block = x.ctypes.data, winner.ctypes.data, a.ctypes.data, block.ctypes.data
    for unit in range(first, last):
        n, k = unit // channels, unit % channels
        p_plane = p_a + 4 * (n * a.shape[1] + a_channel + k) * a_size
        to_x, to_winner = p_x + 4 * (n * x.shape[1] + x_channel + k) * size, p_winner + 4 * unit * size
        for row in range(0 if len(planes) else height):
            own, to = row * stride_h * a.shape[3], 4 * row * across
            if stride_w == 1:
                _find_winners(to_x + to, to_winner + to, p_plane + 4 * own, offsets.ctypes.data, positions.ctypes.data,
                              len(offsets), across, own, 1)
            else:
                _find_winners_apart(to_x + to, to_winner + to, p_plane + 4 * own, offsets.ctypes.data,
                                    positions.ctypes.data, len(offsets), across, own, 2)
        for y in range(0, height if len(planes) else 0, block_rows):
            for left in range(0, across, block_columns):
                for i in range(len(planes)):
                    copy_plane(p_block + 4 * i * plane, plane_rows, width, p_plane, a.shape[2], a.shape[3],
                               y * stride_h + planes[i, 0], left * stride_w + planes[i, 1], stride_h, stride_w, _NEVER)
                for row in range(min(block_rows, height - y)):
                    to = 4 * ((y + row) * across + left)
                    _find_winners(to_x + to, to_winner + to, p_block + 4 * row * width, offsets.ctypes.data,
                                  positions.ctypes.data, len(offsets), min(block_columns, across - left),
                                  (y + row) * stride_h * a.shape[3] + left * stride_w, stride_w)


@kernel
def max_pool2d_redistribute(c_in, c, winner, c_in_channel, c_channel, accumulate, first, last):
    """c_in <- c for each window's winner, 0 for the others."""
    channels, positions, size = winner.shape[1], winner.shape[2] * winner.shape[3], c_in.shape[2] * c_in.shape[3]
    p_in, p_c, p_winner = c_in.ctypes.data, c.ctypes.data, winner.ctypes.data
    for unit in range(first, last):
        n, k = unit // channels, unit % channels
        to = p_in + 4 * (n * c_in.shape[1] + c_in_channel + k) * size
        if not accumulate:
            fill_exactly(to, ZERO, size, False)
        add_at(to, p_winner + 4 * unit * positions, p_c + 4 * (n * c.shape[1] + c_channel + k) * positions, positions)


# ---- Averages, and max-pools in proportion ---------------------------------------------------------------------------


@kernel
def pool2d_forward(x, ratio, dead, a, low, planes, offsets, count_h, count_w, block, x_channel, a_channel,
                   stride_h, stride_w, block_rows, block_columns, halo_rows, halo_columns, maximum, features, relevance,
                   first, last):
    """x <- the largest value (if `maximum`) or the mean of each window; ratio <- |x| / z, z the sum of its features.

    The weights of a window are equal and cancel between z and V^T, so they are left out of both. A mean's divisor is
    count_h (OH,) times count_w (OW,), which are 1 for a maximum. planes and offsets as in max_pool2d_forward; no
    planes: the one window holds all.
    """
    channels, height, across = ratio.shape[1:]
    width, plane_rows = block_columns + halo_columns, block_rows + halo_rows
    plane, size, a_size = plane_rows * width, height * across, a.shape[2] * a.shape[3]
    flat_x, flat_ratio = flat(x), flat(ratio)
    p_x, p_ratio, p_a, p_block = x.ctypes.data, ratio.ctypes.data, a.ctypes.data, block.ctypes.data
    counted, largest = features == ONES, maximum != 0
    for unit in range(first, last):
        n, k = unit // channels, unit % channels
        p_plane = p_a + 4 * (n * a.shape[1] + a_channel + k) * a_size
        to_x, to_ratio = (n * x.shape[1] + x_channel + k) * size, unit * size
        shift = low[k] if features == BOX else ZERO
        absorbs = False
        if len(planes) == 0:
            _reduce_plane(p_x + 4 * to_x, p_ratio + 4 * to_ratio, p_plane, a_size, shift, counted, largest)
            flat_x[to_x] /= count_h[0] * count_w[0]
            flat_ratio[to_ratio] = ratio_of(flat_x[to_x], flat_ratio[to_ratio], MIN_DENOMINATOR, relevance)
            absorbs = flat_ratio[to_ratio] < ZERO
        for y in range(0, height if len(planes) else 0, block_rows):
            for left in range(0, across, block_columns):
                for i in range(len(planes)):
                    copy_plane(p_block + 4 * i * plane, plane_rows, width, p_plane, a.shape[2], a.shape[3],
                               y * stride_h + planes[i, 0], left * stride_w + planes[i, 1], stride_h, stride_w,
                               _PADDING)
                for row in range(min(block_rows, height - y)):
                    to = (y + row) * across + left
                    absorbs |= _reduce_windows(p_x + 4 * (to_x + to), p_ratio + 4 * (to_ratio + to),
                                               p_block + 4 * row * width, offsets.ctypes.data, len(offsets),
                                               min(block_columns, across - left), count_h[y + row],
                                               count_w.ctypes.data + 4 * left, shift, counted, largest, relevance != 0)
        if absorbs:
            dead[n] = 1


@kernel
def _is_whole(rows, columns, height, width, kernel_h, kernel_w, pad_top, pad_left):
    """Whether the one window is the whole plane."""
    return rows * columns == 1 and kernel_h == height and kernel_w == width and pad_top == pad_left == 0


@kernel
def _block_of_contributions(positions, size, kernel_size, stride, padding):
    """Along one axis: how many zeros precede the contributions, for windows that do not exist, and the block's
    length."""
    before = (kernel_size - 1) // stride
    return before, before + max(positions, (size - 1 + padding) // stride + 1)


def pool2d_redistribute_elements(kernel_size, stride, padding, in_shape, out_shape):
    """Floats of the scratch arrays `block` and `results` of pool2d_redistribute."""
    down, across = (_block_of_contributions(out_shape[axis], in_shape[axis], kernel_size[axis], stride[axis],
                                            padding[axis])[1] for axis in (0, 1))
    return down * (across + LANES) + LANES, in_shape[0] * in_shape[1] + in_shape[1] + 2 * LANES


@kernel
def pool2d_redistribute(c_in, c, ratio, a, low, block, results, c_in_channel, c_channel, a_channel, kernel_h, kernel_w,
                        stride_h, stride_w, pad_top, pad_left, features, relevance, accumulate, first, last):
    """c_in <- the sum of ratio * c over the windows that hold a value, for the features that it has."""
    channels, rows, columns = ratio.shape[1:]
    height, width = a.shape[2:]
    size, positions = height * width, rows * columns
    whole = _is_whole(rows, columns, height, width, kernel_h, kernel_w, pad_top, pad_left)
    before_down, block_rows = _block_of_contributions(rows, height, kernel_h, stride_h, pad_top)
    before_across, block_width = _block_of_contributions(columns, width, kernel_w, stride_w, pad_left)
    block_width += LANES
    as_it_is = features == ONES or (features not in (SIGNED, NEGATED) and not relevance)
    straight = as_it_is and (whole or stride_w == 1)  # from the sums into c_in
    flat_c, flat_ratio, add = flat(c), flat(ratio), accumulate != 0
    p_in, p_block, p_row = c_in.ctypes.data, block.ctypes.data, results.ctypes.data
    p_ratio, p_c, p_a, p_phase = ratio.ctypes.data, c.ctypes.data, a.ctypes.data, p_row + 4 * (size + LANES)
    lines, length = (1, size) if whole else (height, width)
    for unit in range(first, last):
        n, k = unit // channels, unit % channels
        at_c, at_a = (n * c.shape[1] + c_channel + k) * positions, (n * a.shape[1] + a_channel + k) * size
        to = (n * c_in.shape[1] + c_in_channel + k) * size
        shift = low[k] if features == BOX else ZERO
        if not whole:
            copy_product(p_block, block_rows, block_width, p_ratio + 4 * unit * positions, p_c + 4 * at_c, rows,
                         columns, -before_down, -before_across, ZERO)
        for line in range(lines):
            p_line = p_in + 4 * (to + line * width)
            p_sums, adds = (p_line, add) if straight else (p_row, False)
            row, first_tap = (line + pad_top) // stride_h + before_down, (line + pad_top) % stride_h
            down = (max(kernel_h - first_tap, 0) + stride_h - 1) // stride_h
            if whole:
                fill_exactly(p_sums, flat_ratio[unit] * flat_c[at_c], size, adds)
            elif stride_w == 1:
                _sum_contributions(p_sums, p_block + 4 * (row * block_width + pad_left + before_across), down,
                                   block_width, kernel_w, width, adds)
            else:
                for phase in range(stride_w):
                    begin = (phase - pad_left) % stride_w
                    count = (max(width - begin, 0) + stride_w - 1) // stride_w
                    across = (max(kernel_w - phase, 0) + stride_w - 1) // stride_w
                    contributions = row * block_width + (begin + pad_left) // stride_w + before_across
                    _sum_contributions(p_phase, p_block + 4 * contributions, down, block_width, across, count, False)
                    spread(p_row + 4 * begin, p_phase, stride_w, count)
            if as_it_is and not straight:
                copy_exactly(p_line, p_row, length, add)
            elif not as_it_is:
                _redistribute_features(p_line, p_row, p_a + 4 * (at_a + line * width), length, shift,
                                       features == NEGATED, features == VALUE, not relevance, add)
