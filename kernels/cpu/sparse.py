"""Redistribution through a convolution, c_in = V^T s with s = ratio * c, that skips the zeros of s.

s is sparse in trained networks: a ratio is zero at inactive units, a max-pool gives to its winners only, one class is
explained. Vectors that run along positions cannot skip a zero. Here they run along input channels: each nonzero s[k] of
a position is multiplied by a row of V, of all channels that it reaches, so a zero costs nothing, and leaves out nothing
but additions of 0. Which images are sparse enough is measured on a part of each (density_redistribute), so it depends
on the image alone, as bits do.

A unit of work is a block of one image's inputs: rows, or positions where kernels are 1x1; or one of `splits` of its
blocks of channels. A call does the units first..last-1, and those of one block together.

1. Lists. Tiles of LANES channels x LANES positions of s are transposed in registers, then each position's channels are
   compressed: an entry is a value and where its row of V begins. Lists lie one behind the other; starts[i] is where
   that of position i begins.
2. Sums. An output's position sums up what it gives to one row of taps and one block of channels: an entry is one
   broadcast and up to SPARSE_VECTORS multiply-adds. The sums are added to scratch rows (positions, channels), at
   position * stride, so all kernels and strides are one loop over a contiguous list, and vectors are full with few
   channels too.
3. Scratch rows are transposed back.
"""

import math

import numpy as np
from fastdtd.kernels.codes import BOX
from fastdtd.kernels.cpu.arrays import as_int32
from fastdtd.kernels.cpu.jit import kernel
from fastdtd.kernels.cpu.planes import own_part
from fastdtd.kernels.cpu.rows import count_nonzero, fetch_to_read, fill_vectors
from fastdtd.kernels.cpu.vector_code import (
    F32,
    I32,
    I64,
    INTEGERS,
    LANES,
    VECTOR,
    ZEROS,
    integer,
    lanes_before,
    larger,
    load_vector,
    loop_range,
    masked_load,
    masked_store,
    multiply_add,
    pointers,
    prefetch,
    progression,
    splat,
    store_vector,
    switch_on,
    transposed,
)
from fastdtd.kernels.scalar import ZERO
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

SPARSE_VECTORS = 12  # accumulators
_PANEL_BYTES = 64 << 10  # of V, for one row of taps; all of them stay in the second-level cache with lists and sums
_LIST_ENTRIES = 1 << 16  # of a block, about
_MOST_POSITIONS = 256  # of a block where kernels are 1x1
_COMPRESS = np.array([([i for i in range(8) if mask >> i & 1] + [0] * 8)[:8] for mask in range(256)], np.uint8)
_MOST_BYTES = 1 << 20  # of V, that each of the workers on an image reads
_ROWS_AHEAD = 8  # of channels, whose rows lie far apart
_I8 = ir.IntType(8)


# ---- Sizes and weights, for the plan ---------------------------------------------------------------------------------


def sparse2d_packed_shape(outputs, channels, kernel_h, kernel_w):
    """Shape of packed weights: blocks of channels, blocks of outputs, rows of taps, outputs, floats of a row of V."""
    most = LANES * max(SPARSE_VECTORS // kernel_w, 1)
    c_blocks = -(-channels // most)
    width = -(-_block_channels(channels, c_blocks) * kernel_w // LANES) * LANES
    most = max(_PANEL_BYTES // (4 * width), LANES)
    k_block = -(-outputs // (-(-outputs // most) * LANES)) * LANES
    return c_blocks, -(-outputs // k_block), kernel_h, k_block, width


@kernel
def _block_channels(channels, blocks):
    """Channels of a block: whole vectors where there are several blocks."""
    return channels if blocks == 1 else -(-channels // (blocks * LANES)) * LANES


@kernel
def sparse2d_pack(packed, weight, both):
    """packed <- weight (K, C, kernel_h, kernel_w): rows of V, taps x channels, filled with zeros; of positive, then of
    negative weights if `both`."""
    outputs, channels, kernel_h, kernel_w = weight.shape
    c_blocks, k_blocks, _, k_block, width = packed.shape
    features = 2 * channels if both else channels
    block_channels = _block_channels(features, c_blocks)
    for b in range(c_blocks):
        for q in range(k_blocks):
            for i in range(kernel_h):
                for own in range(k_block):
                    k = q * k_block + own
                    for at in range(width):
                        j, feature = at // block_channels, b * block_channels + at % block_channels
                        value = ZERO
                        if k < outputs and j < kernel_w and feature < features:
                            value = weight[k, feature % channels, i, j]
                            if both:
                                value = max(value, ZERO) if feature < channels else min(value, ZERO)
                        packed[b, q, i, own, at] = value


def sparse2d_block(outputs, height, across, is_pointwise, parts):
    """Rows and columns of a block of inputs, of which there should be so many `parts` at least."""
    if is_pointwise:
        return 1, min(_MOST_POSITIONS, -(-across // (parts * LANES)) * LANES, across)
    return min(height, max(16, _LIST_ENTRIES // (outputs * across)), -(-height // parts)), across


def sparse2d_splits_channels(packed_shape, workers):
    """Whether so many workers on one image divide its inputs' channels rather than its positions: where V is too large
    for each of them to read all of it, and has as many blocks of channels for each."""
    return packed_shape[0] % workers == 0 and 4 * math.prod(packed_shape) > _MOST_BYTES


def sparse2d_scratch(packed_shape, features, kernel_w, columns, stride_h, block_rows, block_columns):
    """Floats of the scratch arrays lists, tile, sums; features: of V's rows; columns: of an output."""
    c_blocks, k_blocks, kernel_h, k_block, width = packed_shape
    block_channels = _block_channels(features, c_blocks)
    positions = max(columns * ((block_rows + kernel_h) // stride_h + 1), block_columns)
    lists = 2 * (k_blocks * k_block * positions + LANES) + k_blocks * (positions + 1)
    sums = block_rows * ((block_columns + kernel_w - 1) * block_channels + width)
    return lists, _tile_rows(k_block) * (k_block + LANES), sums + (2 * LANES + kernel_w) * block_channels + LANES


def sparse2d_below(features, taps, box, tiles_used):
    """The density of s below which this is faster than what is done otherwise: Winograd's algorithm, of whose tiles the
    share tiles_used lies inside of the planes, or conv2d where that is 0. As measured (docs/kernels.md); 0: never.

    features: of V's rows; box: both of an image's channels.
    """
    if box:
        return 0.25 if features <= LANES and features * taps >= 200 else 0.0
    if tiles_used:
        return 0.2 / tiles_used
    if taps > 1:
        return 0.45
    return 0.3 if features >= 64 else 0.15 if features >= 32 else 0.0


@kernel
def _tile_rows(k_block):
    """Positions that are transposed together: several tiles of a plane in turn, for each plane has pages of its own."""
    return max(LANES, min(64, 4096 // (k_block + LANES)) // LANES * LANES)


# ---- Lists -----------------------------------------------------------------------------------------------------------


@intrinsic
def _transpose_products(typing_context, rows, row_stride, ratio, c, plane, channels, ahead):
    """rows[i, k] <- ratio[k, i] * c[k, i] for LANES channels k, `plane` floats apart, and LANES positions i; 0 where k
    is not one of so many channels. Asks for the positions so many further on, which nobody else foresees."""
    def codegen(context, builder, signature, arguments):
        p_rows, p_ratio, p_c = pointers(builder, [arguments[i] for i in (0, 2, 3)], F32, F32, F32)
        row_stride, plane, channels, ahead = arguments[1], *arguments[4:]
        vectors = []
        for k in range(LANES):
            is_one = builder.icmp_signed("<", integer(k), channels)
            at = builder.select(is_one, builder.mul(plane, integer(k)), integer(0))
            product = builder.fmul(load_vector(builder, p_ratio, at), load_vector(builder, p_c, at))
            for base in (p_ratio, p_c):
                prefetch(builder, builder.gep(base, [builder.add(at, ahead)]))
            vectors.append(builder.select(is_one, product, ZEROS))
        for i, vector in enumerate(transposed(builder, vectors)):
            store_vector(builder, vector, p_rows, builder.mul(row_stride, integer(i)))
        return context.get_dummy_value()

    return types.void(*[types.intp] * 7), codegen


def _named(builder, name, result, *arguments):
    known = builder.module.globals.get(name)
    return known or ir.Function(builder.module, ir.FunctionType(result, arguments), name)


def _emit_append(builder, p_values, p_offsets, p_table, at, value, offset):
    """Store the lanes of value that are not 0, and of offset, from `at` on, and whatever after; the next place."""
    used = builder.fcmp_unordered("!=", value, ZEROS)
    if LANES == 4:  # no instruction that all such processors have
        for lane in range(LANES):
            index = ir.Constant(I32, lane)
            for p_out, vector in ((p_values, value), (p_offsets, offset)):
                builder.store(builder.extract_element(vector, index), builder.gep(p_out, [at])).align = 4
            at = builder.add(at, builder.zext(builder.extract_element(used, index), I64))
        return at
    mask = builder.bitcast(used, ir.IntType(LANES))
    if LANES == 16:
        vectors = []
        for vector, name, kind in ((value, "v16f32", VECTOR), (offset, "v16i32", INTEGERS)):
            compress = _named(builder, f"llvm.x86.avx512.mask.compress.{name}", kind, kind, kind, used.type)
            vectors.append(builder.call(compress, [vector, vector, used]))
    else:
        lanes = builder.load(builder.bitcast(
            builder.gep(p_table, [builder.mul(builder.zext(mask, I64), integer(LANES))]),
            ir.VectorType(_I8, LANES).as_pointer()))
        lanes.align = 1
        lanes = builder.zext(lanes, INTEGERS)
        vectors = [builder.call(_named(builder, f"llvm.x86.avx2.{name}", vector.type, vector.type, INTEGERS),
                                [vector, lanes]) for vector, name in ((value, "permps"), (offset, "permd"))]
    for p_out, vector in zip((p_values, p_offsets), vectors, strict=True):
        store_vector(builder, vector, p_out, at)
    return builder.add(at, builder.ctpop(builder.zext(mask, I64)))


@intrinsic
def _append(typing_context, values, offsets, table, at, row, vectors, step):
    """values[at:], offsets[at:] <- the nonzero ones of row (so many vectors), and their indices times step; returns
    where they end."""
    def codegen(context, builder, signature, arguments):
        p_values, p_offsets, p_table, p_row = pointers(builder, [arguments[i] for i in (0, 1, 2, 4)], F32, I32, _I8,
                                                       F32)
        at, vectors, step = arguments[3], arguments[5], arguments[6]
        further = splat(builder, builder.trunc(builder.mul(step, integer(LANES)), I32), INTEGERS)

        def one_vector(i, state):
            at, offset = state
            at = _emit_append(builder, p_values, p_offsets, p_table, at, load_vector(builder, p_row, i), offset)
            return [at, builder.add(offset, further)]

        first = progression(builder, integer(0), step)
        end = builder.mul(vectors, integer(LANES))
        return loop_range(builder, integer(0), end, LANES, [at, first], one_vector)[0]

    return types.intp(*[types.intp] * 7), codegen


@kernel
def _build_lists(p_values, p_offsets, starts, s, p_tile, ratio, c, n, c_channel, first, last, k_block, width):
    """For each k_block channels the lists of the positions first..last-1 of image n, and for each of these blocks of
    channels one start more than positions, from starts[s] on."""
    outputs, plane = ratio.shape[1], ratio.shape[2] * ratio.shape[3]
    stride, together = k_block + LANES, _tile_rows(k_block)
    p_ratio = ratio.ctypes.data + 4 * n * outputs * plane
    p_c, p_table = c.ctypes.data + 4 * (n * c.shape[1] + c_channel) * plane, _COMPRESS.ctypes.data
    at = 0
    for k_first in range(0, outputs, k_block):
        depth = min(k_block, outputs - k_first)
        for position in range(first, last, together):
            count = min(together, last - position)
            for k in range(0, depth, LANES):
                for i in range(0, count, LANES):
                    source = 4 * ((k_first + k) * plane + position + i)
                    _transpose_products(p_tile + 4 * (i * stride + k), stride, p_ratio + source, p_c + source, plane,
                                        depth - k, together)
            for i in range(count):
                starts[s] = at
                at = _append(p_values, p_offsets, p_table, at, p_tile + 4 * i * stride, -(-depth // LANES), width)
                s += 1
        starts[s] = at
        s += 1


# ---- Sums ------------------------------------------------------------------------------------------------------------


@intrinsic
def _sum_row(typing_context, vectors, to, step, values, offsets, starts, v, count):
    """to (so many vectors) += values[i] * (v + offsets[i]), summed over the entries of a list; then `step` floats on
    for the next list, `count` times."""
    def codegen(context, builder, signature, arguments):
        step, count = arguments[2], arguments[7]
        p_to, p_values, p_offsets, p_starts, p_v = pointers(builder, [arguments[i] for i in (1, 3, 4, 5, 6)], F32, F32,
                                                            I32, I32, F32)

        def emit(number):
            def one_list(x, nothing):
                first, last = (builder.sext(builder.load(builder.gep(p_starts, [builder.add(x, integer(i))])), I64)
                               for i in range(2))

                def one_entry(i, sums):
                    value = splat(builder, builder.load(builder.gep(p_values, [i])))
                    row = builder.gep(p_v, [builder.sext(builder.load(builder.gep(p_offsets, [i])), I64)])
                    return [multiply_add(builder, total, value, load_vector(builder, row, integer(j * LANES)))
                            for j, total in enumerate(sums)]

                own = builder.gep(p_to, [builder.mul(x, step)])
                with builder.if_then(builder.icmp_signed("<", first, last)):
                    for j, total in enumerate(loop_range(builder, first, last, 1, [ZEROS] * number, one_entry)):
                        at = integer(j * LANES)
                        store_vector(builder, builder.fadd(load_vector(builder, own, at), total), own, at)
                return nothing

            loop_range(builder, integer(0), count, 1, [], one_list)
            return integer(0)

        switch_on(builder, arguments[0], SPARSE_VECTORS, I64, emit)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 8), codegen


# ---- Back to planes --------------------------------------------------------------------------------------------------


@intrinsic
def _store_tile(typing_context, out, plane, rows, row_stride, positions, channels, accumulate):
    """out[k, i] <- rows[i, k], or added to it, for so many channels k and positions i, at most LANES of each."""
    def codegen(context, builder, signature, arguments):
        p_out, p_rows = pointers(builder, (arguments[0], arguments[2]), F32, F32)
        plane, row_stride, positions, channels, accumulate = [arguments[i] for i in (1, 3, 4, 5, 6)]
        vectors = transposed(builder, [load_vector(builder, p_rows, builder.mul(row_stride, integer(i)))
                                       for i in range(LANES)])
        mask = lanes_before(builder, positions)
        is_whole = builder.icmp_signed(">=", positions, integer(LANES))
        for k, vector in enumerate(vectors):
            at = builder.mul(plane, integer(k))
            with builder.if_then(builder.icmp_signed("<", integer(k), channels)), \
                    builder.if_else(is_whole) as (whole, part):
                with whole:
                    total = builder.fadd(vector, load_vector(builder, p_out, at))
                    store_vector(builder, builder.select(accumulate, total, vector), p_out, at)
                with part:
                    total = builder.fadd(vector, masked_load(builder, p_out, at, mask))
                    masked_store(builder, builder.select(accumulate, total, vector), p_out, at, mask)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 6, types.boolean), codegen


@intrinsic
def _store_pixels(typing_context, out, plane, rows, row_stride, positions, channels, a, low, high, accumulate):
    """The same of an image's channels: out[k, i] <- max(a - low[k], 0) rows[i, k] - max(high[k] - a, 0)
    rows[i, channels + k]."""
    def codegen(context, builder, signature, arguments):
        p_out, p_rows, p_a, p_low, p_high = pointers(builder, [arguments[i] for i in (0, 2, 6, 7, 8)], *[F32] * 5)
        plane, row_stride, positions, channels, accumulate = [arguments[i] for i in (1, 3, 4, 5, 9)]
        mask = lanes_before(builder, positions)

        def store(count):
            vectors = transposed(builder, [load_vector(builder, p_rows, builder.mul(row_stride, integer(i)))
                                           for i in range(LANES)])
            for k in range(count):
                at, value = builder.mul(plane, integer(k)), masked_load(builder, p_a, builder.mul(plane, integer(k)),
                                                                        mask)
                low, high = (splat(builder, builder.load(builder.gep(bound, [integer(k)])))
                             for bound in (p_low, p_high))
                above, below = (larger(builder, builder.fsub(*pair), ZEROS) for pair in ((value, low), (high, value)))
                vector = builder.fsub(builder.fmul(above, vectors[k]), builder.fmul(below, vectors[count + k]))
                total = builder.fadd(vector, masked_load(builder, p_out, at, mask))
                masked_store(builder, builder.select(accumulate, total, vector), p_out, at, mask)
            return integer(0)

        switch_on(builder, channels, LANES // 2, I64, store)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 9, types.boolean), codegen


# ---- Kernels ---------------------------------------------------------------------------------------------------------


@kernel
def density_redistribute(density, ratio, c, c_channel, first, last):
    """density[n] <- how much of ratio * c is not zero, in one row of each channel. Units are images."""
    outputs, height, width = ratio.shape[1:]
    size = height * width
    for n in range(first, last):
        found = 0
        p_ratio = ratio.ctypes.data + 4 * n * outputs * size
        p_c = c.ctypes.data + 4 * (n * c.shape[1] + c_channel) * size
        for k in range(outputs):
            ahead = 4 * ((k + _ROWS_AHEAD) * size + 7 * (k + _ROWS_AHEAD) % height * width)
            fetch_to_read(p_ratio + ahead, width)
            fetch_to_read(p_c + ahead, width)
            at = 4 * (k * size + 7 * k % height * width)
            found += count_nonzero(p_ratio + at, p_c + at, width)
        density[n] = np.float32(found) / np.float32(outputs * width)


@kernel
def sparse2d_redistribute(c_in, c, ratio, a, density, packed, low, high, lists, tile, sums, c_in_channel, c_channel,
                          a_channel, inputs, kernel_w, stride_h, stride_w, pad_top, pad_left, block_rows, block_columns,
                          splits, features, sparse_below, accumulate, first, last):
    """As conv2d_redistribute for features NONNEGATIVE and BOX, where density[n] is less than sparse_below; no groups.

    packed is of sparse2d_pack; lists, tile and sums are flat scratch (sparse2d_scratch).
    """
    height, across, rows_out, columns_out = c_in.shape[2], c_in.shape[3], ratio.shape[2], ratio.shape[3]
    c_blocks, k_blocks, kernel_h, k_block, width = packed.shape
    channels = 2 * inputs if features == BOX else inputs
    block_channels, panel = _block_channels(channels, c_blocks), k_block * width
    blocks_across = -(-across // block_columns)
    is_whole_rows = blocks_across == 1
    blocks = -(-height // block_rows) * blocks_across
    p_values, p_sums, p_tile, in_size = lists.ctypes.data, sums.ctypes.data, tile.ctypes.data, height * across
    p_in, p_a, p_low, p_high = c_in.ctypes.data, a.ctypes.data, low.ctypes.data, high.ctypes.data
    for block in range(first // splits, -(-last // splits)):
        n, index = block // blocks, block % blocks
        if density[n] >= sparse_below:
            continue
        top, left = index // blocks_across * block_rows, index % blocks_across * block_columns
        bottom, right = min(top + block_rows, height), min(left + block_columns, across)
        # outputs that reach these inputs
        begin = max(0, -((kernel_h - 1 - pad_top - top) // stride_h))
        end = min(rows_out, (bottom - 1 + pad_top) // stride_h + 1)
        columns = columns_out if is_whole_rows else right - left
        positions, at = max(end - begin, 0) * columns, begin * columns_out if is_whole_rows else left
        entries = k_blocks * k_block * positions + LANES
        p_offsets = p_values + 4 * entries
        p_starts = p_offsets + 4 * entries
        _build_lists(p_values, p_offsets, as_int32(lists), 2 * entries, p_tile, ratio, c, n, c_channel, at,
                     at + positions, k_block, width)
        line = (right - left + kernel_w - 1) * block_channels + width
        first_b, last_b = own_part(c_blocks, block, splits, first, last)
        for b in range(first_b, last_b):
            fill_vectors(p_sums, line * (bottom - top), ZERO)
            for q in range(k_blocks):
                for y in range(begin, end):
                    first_tap = top + pad_top - y * stride_h
                    for i in range(max(0, first_tap), min(kernel_h, first_tap + bottom - top)):
                        p_v = packed.ctypes.data + 4 * ((b * k_blocks + q) * kernel_h + i) * panel
                        p_to = p_sums + 4 * (y * stride_h + i - pad_top - top) * line
                        _sum_row(width // LANES, p_to, stride_w * block_channels, p_values, p_offsets,
                                 p_starts + 4 * (q * (positions + 1) + (y - begin) * columns), p_v, columns)
            for y in range(top, bottom):
                p_row = p_sums + 4 * ((y - top) * line + pad_left * block_channels)
                to = 4 * ((n * c_in.shape[1] + c_in_channel + b * block_channels) * in_size + y * across + left)
                for x in range(0, right - left, LANES):
                    count = min(LANES, right - left - x)
                    if features == BOX:
                        value = 4 * ((n * a.shape[1] + a_channel) * in_size + y * across + left + x)
                        _store_pixels(p_in + to + 4 * x, in_size, p_row + 4 * x * block_channels, block_channels, count,
                                      inputs, p_a + value, p_low, p_high, accumulate != 0)
                        continue
                    for channel in range(0, min(block_channels, inputs - b * block_channels), LANES):
                        _store_tile(p_in + to + 4 * (channel * in_size + x), in_size,
                                    p_row + 4 * (x * block_channels + channel), block_channels, count,
                                    min(block_channels, inputs - b * block_channels) - channel, accumulate != 0)
