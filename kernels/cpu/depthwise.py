"""Depthwise convolution, each output of one input channel, and its redistribution: planes as single runs of positions.

A block of rows is copied into the first-level cache, rows joined with nothing between them: position (y, x) is number
y * width + x, and a tap that lies (i, j) away is i * width + j numbers away. So vectors run on over the ends of rows,
and no row is short: the 49 positions of 7 x 7 fill seven vectors of eight. Only where a tap's neighbour is beside the
plane, at the ends of rows, is what it reads another row's. There each column of taps has a mask, which repeats from row
to row, so that one of few rows serves all blocks of all planes.

    direction       positions                                    a tap reads
    forward         outputs                                   one of the input's phases by the stride, planes each
    redistribute    inputs by the stride, phase by phase      ratio * c

Where input and output differ in width, positions have the larger one, and rows are cut as they are stored. The sum of a
position is one chain of multiply-adds in the order of the taps, column by column, so it does not depend on where
the position lies. A unit is a plane.

Where the input may be negative (features SIGNED), z sums what is positive of the products that y sums; and back there
are two sums, by the positive and by the negative weights, of which the input's sign chooses one.
"""

from fastdtd.kernels.codes import NONNEGATIVE, ONES, SIGNED
from fastdtd.kernels.cpu.elementwise import Finish, finish_row, redistribute_row
from fastdtd.kernels.cpu.jit import kernel, part
from fastdtd.kernels.cpu.planes import copy_product, copy_product_run, copy_run
from fastdtd.kernels.cpu.rows import copy_exactly, copy_vectors, fill_vectors, split_vectors
from fastdtd.kernels.cpu.vector_code import (
    F32,
    I32,
    I64,
    LANES,
    NO_LANE,
    ZEROS,
    any_lane,
    integer,
    keep_lanes,
    larger,
    load_vector,
    loop_range,
    multiply_add,
    pick,
    pointers,
    splat,
    store_vector,
)
from fastdtd.kernels.scalar import MIN_DENOMINATOR, ZERO
from numba import types
from numba.extending import intrinsic

_VECTORS = 4  # at a time: two sums and a mask each, two weights and what they multiply are 15 registers
DEPTHWISE2D_STEP = _VECTORS * LANES  # positions at a time; so many are read and written beyond the last
_BLOCK_FLOATS = 2048  # of a block, which stays in the first-level cache beside what is written


# ---- Sizes, for the plan ---------------------------------------------------------------------------------------------


def depthwise2d_block_rows(rows, width, inputs):
    """Rows of positions of each block, where each position stands for so many inputs."""
    blocks = -(-rows * width * inputs // _BLOCK_FLOATS)
    return -(-rows // min(blocks, rows))


def depthwise2d_results_elements(rows, width, values):
    """Floats of `results`, for blocks of so many rows of positions, each with so many values: y and z forward, back the
    inputs that it stands for, twice under SIGNED."""
    return values * (rows * width + DEPTHWISE2D_STEP)


# ---- Sums over taps --------------------------------------------------------------------------------------------------


class _Sums:
    """Emits sums over a window's taps for the positions first..last-1 of a block.

    Taps are sorted by columns of the window: those of column j are bounds[j]..bounds[j + 1] - 1. Tap t of position p is
    the float p + offsets[t] of the block. packed (taps, products) holds weights, masks (columns, period +
    DEPTHWISE2D_STEP) which positions have a column's taps; position `period` is like position 0.
    """

    KIND = (types.intp, ) * 8

    def __init__(self, builder, block, packed, offsets, bounds, masks, period, first, last):
        self.builder, self.period, self.first, self.last = builder, period, first, last
        self.p_block, self.p_packed, self.p_offsets, self.p_bounds, self.p_masks = pointers(
            builder, (block, packed, offsets, bounds, masks), F32, F32, I32, I32, I32)

    def of_columns(self, first, last, position, column, vectors, products, signed=False):
        """Sums [product][vector] over columns first..last-1, from a position on, which lies in that column of a row.

        signed: instead of a second product, what is positive of the first one.
        """
        builder, mask_length = self.builder, self.builder.add(self.period, integer(DEPTHWISE2D_STEP))

        def index(pointer, at):
            return builder.sext(builder.load(builder.gep(pointer, [at])), I64)

        def one_column(j, sums):
            at = builder.add(builder.mul(j, mask_length), column)
            masks = [load_vector(builder, self.p_masks, builder.add(at, integer(v * LANES))) for v in range(vectors)]

            def one_tap(tap, sums):
                source = builder.add(position, index(self.p_offsets, tap))
                weights = []
                for i in range(1 if signed else products):
                    at = builder.add(builder.mul(tap, integer(products)), integer(i))
                    weights.append(splat(builder, builder.load(builder.gep(self.p_packed, [at]))))
                sums = list(sums)
                for v in range(vectors):
                    value = load_vector(builder, self.p_block, builder.add(source, integer(v * LANES)))
                    value = keep_lanes(builder, value, masks[v])
                    if signed:
                        product = builder.fmul(weights[0], value)
                        sums[v] = builder.fadd(sums[v], product)
                        sums[vectors + v] = builder.fadd(sums[vectors + v], larger(builder, product, ZEROS))
                        continue
                    for i in range(products):
                        sums[i * vectors + v] = multiply_add(builder, sums[i * vectors + v], weights[i], value)
                return sums

            return loop_range(builder, index(self.p_bounds, j), index(self.p_bounds, builder.add(j, integer(1))), 1,
                              sums, one_tap)

        sums = loop_range(builder, first, last, 1, [ZEROS] * (products * vectors), one_column)
        return [sums[i * vectors:(i + 1) * vectors] for i in range(products)]

    def for_each(self, values, body):
        """values = body(position, column, vectors, values) for every step of so many vectors of positions; the last is
        whole too."""
        builder = self.builder
        column, first = builder.srem(self.first, self.period), self.first
        for vectors in (_VECTORS, 1):
            step = vectors * LANES

            def one_step(position, carried, vectors=vectors, step=step):
                column, *values = carried
                values = body(position, column, vectors, values)
                column = builder.add(column, integer(step))
                past = builder.icmp_signed(">=", column, self.period)
                return [builder.select(past, builder.sub(column, self.period), column), *values]

            # as many at a time, as long as more than half of them count
            rest = builder.srem(builder.sub(self.last, first), integer(step))
            more = builder.icmp_signed(">", rest, integer(step // 2 if vectors > 1 else 0))
            last = builder.add(builder.sub(self.last, rest), builder.select(more, integer(step), integer(0)))
            column, *values = loop_range(builder, first, last, step, [column, *values], one_step)
            first = last
        return values


def _forward_sums(signed):
    """(_sum_pairs, _finish_positions) for features SIGNED or NONNEGATIVE."""
    @intrinsic
    def sum_pairs(typing_context, y, z, columns, block, packed, offsets, bounds, masks, period, first, last):
        """y, z <- W a and V u of positions first..last-1, from these addresses on; whole vectors."""
        def codegen(context, builder, signature, arguments):
            p_y, p_z = pointers(builder, arguments[:2], F32, F32)
            sums = _Sums(builder, *arguments[3:])

            def one_step(position, column, vectors, nothing):
                pair = sums.of_columns(integer(0), arguments[2], position, column, vectors, 2, signed)
                for pointer, values in zip((p_y, p_z), pair, strict=True):
                    for v, value in enumerate(values):
                        store_vector(builder, value, pointer, builder.add(position, integer(v * LANES)))
                return nothing

            sums.for_each([], one_step)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 3, *_Sums.KIND), codegen

    @intrinsic
    def finish_positions(typing_context, x, ratio, columns, block, packed, offsets, bounds, masks, period, first, last,
                         bias, x_min, x_max, relevance, z_min):
        """x, ratio <- those of whole vectors of positions first..last-1 (elementwise.Finish). Returns whether a ratio
        is negative."""
        def codegen(context, builder, signature, arguments):
            p_x, p_ratio = pointers(builder, arguments[:2], F32, F32)
            sums, finish = _Sums(builder, *arguments[3:11]), Finish(builder, *arguments[11:])

            def one_step(position, column, vectors, found):
                found, = found
                y, z = sums.of_columns(integer(0), arguments[2], position, column, vectors, 2, signed)
                for v in range(vectors):
                    at = builder.add(position, integer(v * LANES))
                    value, share = finish(y[v], z[v])
                    store_vector(builder, value, p_x, at)
                    store_vector(builder, share, p_ratio, at)
                    found = builder.or_(found, builder.fcmp_ordered("<", share, ZEROS))
                return [found]

            return any_lane(builder, sums.for_each([NO_LANE], one_step)[0])

        return (types.boolean(*[types.intp] * 3, *_Sums.KIND, *[types.float32] * 3, types.boolean, types.float32),
                codegen)

    return sum_pairs, finish_positions


(_sum_pairs, _finish_positions), (_sum_signed_pairs, _finish_signed_positions) = map(_forward_sums, (False, True))


@intrinsic
def _sum_positions(typing_context, out, columns, add, block, packed, offsets, bounds, masks, period, first, last):
    """out <- V^T (ratio * c) of positions first..last-1, or added to out if `add`; whole vectors."""
    def codegen(context, builder, signature, arguments):
        p_out, = pointers(builder, arguments[:1], F32)
        sums = _Sums(builder, *arguments[3:])

        def one_step(position, column, vectors, nothing):
            values, = sums.of_columns(integer(0), arguments[1], position, column, vectors, 1)
            for v, value in enumerate(values):
                at = builder.add(position, integer(v * LANES))
                total = builder.fadd(value, load_vector(builder, p_out, at))
                store_vector(builder, builder.select(arguments[2], total, value), p_out, at)
            return nothing

        sums.for_each([], one_step)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.boolean, *_Sums.KIND), codegen


@intrinsic
def _sum_even_and_odd(typing_context, out, columns_even, columns, block, packed, offsets, bounds, masks, period, first,
                      last):
    """out[2 p], out[2 p + 1] <- V^T (ratio * c) of the two inputs of positions p = first..last-1: the sums of the first
    columns, columns_even of them, and of the others; whole vectors."""
    def codegen(context, builder, signature, arguments):
        p_out, = pointers(builder, arguments[:1], F32)
        sums = _Sums(builder, *arguments[3:])

        def one_step(position, column, vectors, nothing):
            even, = sums.of_columns(integer(0), arguments[1], position, column, vectors, 1)
            odd, = sums.of_columns(arguments[1], arguments[2], position, column, vectors, 1)
            for v in range(vectors):
                for half in range(2):
                    order = [lane for i in range(half * LANES // 2, (half + 1) * LANES // 2) for lane in (i, LANES + i)]
                    at = builder.add(builder.shl(position, integer(1)), integer((2 * v + half) * LANES))
                    store_vector(builder, pick(builder, even[v], odd[v], order), p_out, at)
            return nothing

        sums.for_each([], one_step)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 3, *_Sums.KIND), codegen


@part
def _copy_rows(p_block, planes, rows, width, plane, height, across, first_y, stride_h, stride_w):
    """Rows of a plane (height, across) from first_y on to the block's planes, `rows` rows each: row i to plane
    i % stride_h, and of stride_w = 2 its even and odd columns apart. What is right of a row's end is not set."""
    even, to_odd = p_block + 4 * planes[0, 0], 4 * (planes[0, 1] - planes[0, 0])
    to_next, source = 4 * (planes[stride_h - 1, 0] - planes[0, 0]), plane + 4 * first_y * across
    for y in range(first_y, first_y + rows * stride_h, stride_h):
        for i in range(stride_h):
            to = even + i * to_next
            if y + i < 0 or y + i >= height:
                fill_vectors(to, width, ZERO)
                fill_vectors(to + to_odd, width, ZERO)
            elif stride_w == 1:
                copy_vectors(to, source, 0, across)
            else:
                split_vectors(to, to + to_odd, source, (across + 1) // 2)
            source += 4 * across
        even += 4 * width


@kernel
def _whole_steps(positions):
    """How many of them the sums above would do without any beyond the last."""
    rest = positions % DEPTHWISE2D_STEP
    return positions - (rest if rest > DEPTHWISE2D_STEP // 2 else positions % LANES)


# ---- Kernels ---------------------------------------------------------------------------------------------------------


@kernel
def depthwise2d_forward(x, ratio, dead, a, packed, offsets, bounds, masks, bias, planes, block, results,
                        x_channel, a_channel, stride_h, stride_w, width, block_rows, halo_rows, pad_top, features,
                        x_min, x_max, relevance, first, last):
    """As conv2d_forward for features NONNEGATIVE or SIGNED and one input and output in a group: x <- W a + bias,
    clipped to x_min..x_max; ratio <- |x| / z.

    packed (C, taps, 2) holds W and V (which SIGNED does not read), taps sorted by columns of the window; those of
    column j are bounds[j]..bounds[j + 1] - 1. Tap t of position p is the float p + offsets[t] of the block. masks
    (columns, period + DEPTHWISE2D_STEP, int32) is -1 where a column's taps lie inside the input; period is rows of
    `width` positions. The block has a plane for every phase of the input's rows, with `halo_rows` more than the
    outputs: planes says where its even columns (all, where stride_w is 1) and its odd ones begin. block and results are
    flat scratch.
    """
    outputs, height, across = ratio.shape[1], x.shape[2], x.shape[3]
    columns, period = masks.shape[0], masks.shape[1] - DEPTHWISE2D_STEP
    in_height, in_across = a.shape[2], a.shape[3]
    is_joined = stride_h == 1 and stride_w == 1 and width == in_across  # rows of input and positions alike
    p_block, p_y, p_offsets = block.ctypes.data, results.ctypes.data, offsets.ctypes.data
    p_bounds, p_masks = bounds.ctypes.data, masks.ctypes.data
    for unit in range(first, last):
        n, k = unit // outputs, unit % outputs
        absorbs = False
        p_plane = a.ctypes.data + 4 * (n * a.shape[1] + a_channel + k) * in_height * in_across
        p_packed = packed.ctypes.data + 8 * k * len(offsets)
        for top in range(0, height, block_rows):
            rows = min(block_rows, height - top)
            if is_joined:
                copy_run(p_block + 4 * planes[0, 0], (rows + halo_rows) * width, p_plane, in_height * width,
                         (top - pad_top) * width)
            else:
                _copy_rows(p_block, planes, rows + halo_rows, width, p_plane, in_height, in_across,
                           top * stride_h - pad_top, stride_h, stride_w)
            to_x = x.ctypes.data + 4 * ((n * x.shape[1] + x_channel + k) * height + top) * across
            to_ratio = ratio.ctypes.data + 4 * (unit * height + top) * across
            # whole vectors as they are; what is left, and rows that have to be cut, by way of `results`
            positions = rows * width
            done = _whole_steps(positions) if width == across else 0
            if features == SIGNED:
                absorbs |= _finish_signed_positions(to_x, to_ratio, columns, p_block, p_packed, p_offsets, p_bounds,
                                                    p_masks, period, 0, done, bias[k], x_min, x_max, relevance != 0,
                                                    MIN_DENOMINATOR)
            else:
                absorbs |= _finish_positions(to_x, to_ratio, columns, p_block, p_packed, p_offsets, p_bounds, p_masks,
                                             period, 0, done, bias[k], x_min, x_max, relevance != 0, MIN_DENOMINATOR)
            if done < positions:
                p_z = p_y + 4 * (positions + DEPTHWISE2D_STEP)
                if features == SIGNED:
                    _sum_signed_pairs(p_y, p_z, columns, p_block, p_packed, p_offsets, p_bounds, p_masks, period, done,
                                      positions)
                else:
                    _sum_pairs(p_y, p_z, columns, p_block, p_packed, p_offsets, p_bounds, p_masks, period, done,
                               positions)
                length = positions - done if width == across else across
                for row in range(1 if width == across else rows):
                    to, position = 4 * (done + row * across), 4 * (done + row * width)
                    absorbs |= finish_row(to_x + to, to_ratio + to, p_z + position, p_y + position, length,
                                          bias[k], False, x_min, x_max, relevance != 0, MIN_DENOMINATOR)
        if absorbs:
            dead[n] = 1


@kernel
def depthwise2d_redistribute(c_in, c, ratio, a, packed, offsets, bounds, masks, planes, block, results,
                             c_in_channel, c_channel, a_channel, stride_h, stride_w, width, block_rows, halo_rows,
                             pad_top, columns_even, features, relevance, accumulate, first, last):
    """As conv2d_redistribute for inputs of one feature or SIGNED, one input and output in a group: c_in <- V^T (ratio *
    c), or added to c_in if `accumulate`. If `relevance`, times u.

    packed (C, taps) holds V; under SIGNED (2 C, taps), the positive and then the negative part of W. Position (y, x)
    stands for inputs (stride_h y + i, stride_w x + j), each phase (i, j) with taps of its own: bounds (stride_h,
    columns + 1) has a row for each i, of columns of the window; the first columns_even of them belong to j = 0, the
    others to j = 1. The block is one plane, ratio * c, whose first row is `pad_top` above that of position 0. Else as
    depthwise2d_forward.
    """
    outputs, height, across = ratio.shape[1], c_in.shape[2], c_in.shape[3]
    columns, period = masks.shape[0], masks.shape[1] - DEPTHWISE2D_STEP
    out_height, out_across = c.shape[2], c.shape[3]
    as_it_is = (features == NONNEGATIVE and not relevance) or features == ONES
    whole = stride_h == 1 and stride_w == 1 and width == across  # inputs are positions, row after row
    p_offsets, p_masks, p_results = offsets.ctypes.data, masks.ctypes.data, results.ctypes.data
    p_block, grid_rows = block.ctypes.data, -(-height // stride_h)
    room = stride_w * (block_rows * width + DEPTHWISE2D_STEP)
    parts = 2 if features == SIGNED else 1
    second = 4 * stride_h * room * (parts - 1)  # from one part's results to the other's
    for unit in range(first, last):
        n, k = unit // outputs, unit % outputs
        p_ratio = ratio.ctypes.data + 4 * unit * out_height * out_across
        p_c = c.ctypes.data + 4 * (n * c.shape[1] + c_channel + k) * out_height * out_across
        p_in = c_in.ctypes.data + 4 * (n * c_in.shape[1] + c_in_channel + k) * height * across
        p_a = a.ctypes.data + 4 * (n * a.shape[1] + a_channel + k) * height * across
        p_packed = packed.ctypes.data + 4 * k * len(offsets)
        for top in range(0, grid_rows, block_rows):
            rows = min(block_rows, grid_rows - top)
            to, plane_rows = p_block + 4 * planes[0, 0], rows + halo_rows
            if width == out_across:
                copy_product_run(to, plane_rows * width, p_ratio, p_c, out_height * width, (top - pad_top) * width)
            else:
                copy_product(to, plane_rows, width, p_ratio, p_c, out_height, out_across, top - pad_top, 0, ZERO)
            # whole vectors as they are; what is left, and rows that have to be cut, by way of `results`
            positions, begin = rows * width, 4 * top * stride_h * across
            done = _whole_steps(positions) if whole and as_it_is else 0
            for i in range(stride_h):
                p_bounds = bounds.ctypes.data + 4 * i * bounds.shape[1]
                if done > 0:
                    _sum_positions(p_in + begin, columns, accumulate != 0, p_block, p_packed, p_offsets, p_bounds,
                                   p_masks, period, 0, done)
                for sign in range(parts):
                    to, p_own = p_results + sign * second + 4 * i * room, p_packed + 4 * sign * outputs * len(offsets)
                    if stride_w == 1:
                        _sum_positions(to, columns, False, p_block, p_own, p_offsets, p_bounds, p_masks, period, done,
                                       positions)
                    else:
                        _sum_even_and_odd(to, columns_even, columns, p_block, p_own, p_offsets, p_bounds, p_masks,
                                          period, 0, positions)
            for y in range(1 if whole else min(rows * stride_h, height - top * stride_h)):
                row, i = y // stride_h, y % stride_h
                at = begin + 4 * (done if whole else y * across)
                values = p_results + 4 * (i * room + done + row * width * stride_w)
                length = positions - done if whole else across
                if as_it_is:
                    copy_exactly(p_in + at, values, length, accumulate != 0)
                else:
                    redistribute_row(p_in + at, values, values + second, p_a + at, length, ZERO, ZERO, False,
                                     relevance != 0, accumulate != 0)
