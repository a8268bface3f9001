"""Convolution and its redistribution: products of tiles whose values are gathered by address, so that im2col is no
matrix in memory.

Both directions are one loop. A tile is so many rows (outputs of a group; inputs in the backward pass) by POSITIONS
positions, counted through all images; its depth runs over the channels and taps that are summed over. Each depth reads
`offset` values after a position's own, where that is inside of the image:

    direction       rows       positions                           a tap reads
    forward         outputs    outputs of all images            the input at position * stride + (down, right)
    redistribute    inputs     inputs of all images, a phase    ratio * c at position + (down, right)

Where channels come in whole tiles, a tile's depths are channels of one tap: that is looked up and compared with the
image's borders once, and the next value is always one plane further. Elsewhere (a first layer's three channels) a table
says for each depth what it reads.

Under a stride (s, t), the inputs of a redistribution fall into s t phases by the remainder of their position. All
inputs of a phase are reached by the same taps of the kernel, so each phase is a plain convolution of its own and
nothing is multiplied by zero.

The tile of the next depths is fetched while this one is multiplied. Forward on tensor cores it is copied
asynchronously, two tiles ahead. In the backward pass, where ratio and c are multiplied on the way in, it passes through
registers, as it does in float32.

Layers with few rows in a group and little to sum over (depthwise) would leave most of a tile empty: there each thread
sums one result by itself.

Shapes as in kernels/cpu/conv2d.py.
"""

from functools import cache

import numpy as np
from fastdtd.kernels.codes import BOX, FP32, NONNEGATIVE, ONES, SIGNED
from fastdtd.kernels.cuda.jit import THREADS, kernel, launch, part
from fastdtd.kernels.cuda.microkernel import (
    DEPTH,
    LARGE_ROWS,
    PAIR,
    POSITIONS,
    SIGNED_PAIR,
    SPLIT,
    SUM,
    layout,
    max_registers,
    multiply_kernel,
    pack_tiles,
    sums_of,
    threads_of,
    tile_rows,
)
from fastdtd.kernels.cuda.scalar import clip, ratio_of, redistributed_pair, z_term
from fastdtd.kernels.cuda.vector_code import (
    ALIGNED,
    address_of,
    await_all_copies,
    await_copies,
    copy_four_later,
    copy_later,
    end_copies,
    high_half,
    is_below,
    load,
    load_four,
    load_inside,
    load_shared,
    low_half,
    split,
    store,
    store_four_shared,
    store_shared,
)
from fastdtd.kernels.scalar import ZERO
from numba import cuda, float32

_FEW_ROWS, _FEW_DEPTHS = 4, 64  # of a group, at most: then each thread sums a result by itself
_CHUNK = 16  # rows of a tile that are finished together; 1 << 4
_SHOWN_STRIDE = POSITIONS + 8
# tiles in shared memory, where they are copied asynchronously: with the largest, all that a block has without asking
# for more
_STAGES = 3
_FAR = 1 << 15  # no tap reaches so far up or left


# ---- Sizes and tables, for the plan ----------------------------------------------------------------------------------


def conv2d_panel_rows(rows, depth, precision):
    """Rows of a tile for matrices of (rows, depth) in each group; 1: each thread works for itself."""
    return 1 if rows <= _FEW_ROWS and depth <= _FEW_DEPTHS else tile_rows(rows, precision)


def conv2d_packed_shape(groups, rows, depth, panel_rows):
    """Shape of packed weights for such matrices: (groups, panels, depth, rows of a tile)."""
    return groups, -(-rows // panel_rows), depth if panel_rows == 1 else -(-depth // DEPTH) * DEPTH, panel_rows


def conv2d_pack(packed, matrices, precision):
    """packed <- matrices (groups, rows, channels, taps), panels and depths of tiles filled with zeros. On the host."""
    groups, panels, depth, panel_rows = packed.shape
    _, rows, channels, taps = matrices.shape
    if _in_planes(channels, panel_rows):  # tap after tap of the same channels, which are then still in the cache
        matrices = matrices.reshape(groups, rows, channels // DEPTH, DEPTH, taps).swapaxes(3, 4)
    filled = np.zeros((groups, panels * panel_rows, depth), np.float32)
    filled[:, :rows, :channels * taps] = matrices.reshape(groups, rows, channels * taps)
    panels_first = filled.reshape(groups, panels, panel_rows, depth).swapaxes(2, 3)
    packed[:] = panels_first if panel_rows == 1 else pack_tiles(panels_first, precision)


def conv2d_taps(downs, rights, channels, height, width, panel_rows):
    """taps (int64): what is read, relative to a position, as one integer (offset, down, right): of each tile if its
    depths are the channels of one tap, else of each depth, with 0, which is far outside, to fill the last tile. downs,
    rights: of a channel's taps."""
    channel = np.arange(channels, dtype=np.int64)[:, None]
    offset = (channel * height + downs) * width + rights
    each = (offset << 32) + (np.asarray(downs) + _FAR << 16) + (np.asarray(rights) + _FAR)
    if _in_planes(channels, panel_rows):
        return each[::DEPTH].ravel()
    taps = np.zeros(each.size if panel_rows == 1 else -(-each.size // DEPTH) * DEPTH, np.int64)
    taps[:each.size] = each.ravel()
    return taps


def _in_planes(channels, panel_rows):
    """Whether a tile's depths are channels of one tap."""
    return panel_rows > 1 and channels % DEPTH == 0


# ---- Parts of kernels ------------------------------------------------------------------------------------------------


@part
def _is_inside(tap, from_y, from_x, height, width):
    """Whether a tap falls inside of the image; from_y and from_x are _FAR less than the position's own."""
    both = low_half(tap)
    return is_below(from_y + ((both >> 16) & 0xFFFF), height) & is_below(from_x + (both & 0xFFFF), width)


@part
def _finish_output(x, ratio, dead, n, k, position, at_x, at_ratio, y, z, bias, constant, patterns, pattern, z_min,
                   columns, features, x_min, x_max, relevance):
    """One element of x and of ratio, from its sums y (without bias) and z."""
    if features in (BOX, ONES):
        row, column = split(position, columns)
        z = constant[(k * patterns + pattern[row]) * columns + column]
        if features == BOX:
            z += y
    value = clip(y + load(bias, k, 0), x_min, x_max)
    own_ratio = ratio_of(value, z, load(z_min, k, 0), relevance)
    store(x, at_x, 0, value)
    store(ratio, at_ratio, 0, own_ratio)
    if own_ratio < ZERO:
        dead[n] = 1


@part
def _finish_input(c_in, a, at_in, at_a, first, second, low, high, features, relevance, accumulate):
    """One element of c_in, from what comes through positive (or all) weights and through negative ones."""
    if features == ONES or (features == NONNEGATIVE and not relevance):
        result = first
    else:
        result = redistributed_pair(first, second, load(a, at_a, 0), features, low, high, relevance)
    if accumulate:
        result += load(c_in, at_in, 0)
    store(c_in, at_in, 0, result)


# ---- Kernels of one thread for one result ----------------------------------------------------------------------------


@kernel
def _sum_outputs(x, ratio, dead, a, packed, taps, bias, constant, pattern, z_min, images, depth, a_elements, a_begin,
                 height, width, x_elements, x_begin, outputs, groups, channels, rows, columns, stride_h, stride_w,
                 patterns, features, x_min, x_max, relevance):
    at = cuda.grid(1)
    positions = rows * columns
    if at >= images * outputs * positions:
        return
    (both, position), (per_group, _) = split(at, positions), split(outputs, groups)
    (n, k), (row, column) = split(both, outputs), split(position, columns)
    from_y, from_x = row * stride_h, column * stride_w
    begin = n * a_elements + a_begin + split(k, per_group)[0] * channels * height * width + from_y * width + from_x
    y, z, address = ZERO, ZERO, address_of(a, begin)
    for d in range(depth):
        tap = load(taps, 0, d)
        b = load_inside(address, high_half(tap), _is_inside(tap, from_y - _FAR, from_x - _FAR, height, width))
        w = load(packed, k * depth, d)
        y += w * b
        z += z_term(w, b, NONNEGATIVE if features == NONNEGATIVE else SIGNED, ZERO, ZERO)
    _finish_output(x, ratio, dead, n, k, position, n * x_elements + x_begin + k * positions + position, at, y, z, bias,
                   constant, patterns, pattern, z_min, columns, features, x_min, x_max, relevance)


@kernel
def _sum_inputs(c_in, c, ratio, a, packed, taps, low, high, images, first_y, first_x, rows, columns, depth,
                packed_begin, taps_begin, c_in_elements, c_in_begin, c_elements, c_begin, a_elements, a_begin, height,
                width, inputs, groups, outputs, c_rows, c_columns, stride_h, stride_w, features, relevance, accumulate):
    at = cuda.grid(1)
    positions = rows * columns
    if at >= images * inputs * positions:
        return
    both, position = split(at, positions)
    (n, channel), (i, j) = split(both, inputs), split(position, columns)
    group = split(channel, split(inputs, groups)[0])[0]
    begin = group * split(outputs, groups)[0] * c_rows * c_columns + i * c_columns + j
    ratios = address_of(ratio, n * outputs * c_rows * c_columns + begin)
    factors = address_of(c, n * c_elements + c_begin + begin)
    first = second = ZERO
    for d in range(depth):
        tap, w = load(taps, taps_begin, d), load(packed, packed_begin + channel * depth, d)
        inside = _is_inside(tap, i - _FAR, j - _FAR, c_rows, c_columns)
        contribution = load_inside(ratios, high_half(tap), inside) * load_inside(factors, high_half(tap), inside)
        first += (max(w, ZERO) if features in (BOX, SIGNED) else w) * contribution
        second += max(-w, ZERO) * contribution
    own = (channel * height + first_y + i * stride_h) * width + first_x + j * stride_w
    _finish_input(c_in, a, n * c_in_elements + c_in_begin + own, n * a_elements + a_begin + own, first, second,
                  low[channel], high[channel], features, relevance, accumulate)


# ---- Kernels of a block for a tile -----------------------------------------------------------------------------------


@cache
def _parts_of_tile(rows, precision, in_planes):
    """Parts of the kernels below for tiles of so many rows. In shared memory a tile's weights lie after its values."""
    threads, sums, elements = threads_of(rows), sums_of(rows), DEPTH * POSITIONS
    step = threads // POSITIONS  # depths that all threads fetch at a time
    swizzles = 4 // step
    fours, all_fetch = -(-DEPTH * rows // (4 * threads)), DEPTH * rows % (4 * threads) == 0  # four weights at a time
    row_of, position_of, swizzle_of = layout(rows, precision)

    @part
    def clear(one, two):
        for i in range(sums):
            one[i] = ZERO
            two[i] = ZERO

    @part
    def own_index(i, t):
        """Where in the values of a tile thread t puts the i-th that it fetches."""
        return i * (step * POSITIONS) + (t >> 7) * POSITIONS + ((t & 127) ^ swizzle_of((t >> 7) + i % swizzles * step))

    @part
    def fetch_weights(held, packed, at, t):
        for i in range(fours):
            if all_fetch or 4 * t < DEPTH * rows:
                first = 4 * i
                held[first], held[first + 1], held[first + 2], held[first + 3] = load_four(
                    packed, at + 4 * t, first * threads)

    @part
    def put_weights(tile, begin, held, t):
        for i in range(fours):
            if all_fetch or 4 * t < DEPTH * rows:
                store_four_shared(tile, begin + elements + 4 * (i * threads + t),
                                  (held[4 * i], held[4 * i + 1], held[4 * i + 2], held[4 * i + 3]))

    @part
    def copy_weights(tile, begin, packed, at, t):
        for i in range(fours):
            if all_fetch or 4 * t < DEPTH * rows:
                copy_four_later(tile, begin + elements + 4 * (i * threads + t), packed, at + 4 * t, 4 * i * threads)

    @part
    def copy_tile(tile, begin, a, packed, at, taps, number, plane, from_y, from_x, height, width, t):
        """Values and weights of one tile, asynchronously."""
        if in_planes:
            tap = load(taps, 0, number)
            inside, offset = _is_inside(tap, from_y, from_x, height, width), high_half(tap) + (t >> 7) * plane
            for i in range(DEPTH // step):
                copy_later(tile, begin + own_index(i, t), a, offset + i * step * plane, inside)
        else:
            for i in range(DEPTH // step):
                tap = load(taps, number * DEPTH + (t >> 7), i * step)
                copy_later(tile, begin + own_index(i, t), a, high_half(tap),
                           _is_inside(tap, from_y, from_x, height, width))
        copy_weights(tile, begin, packed, at + number * DEPTH * rows, t)

    @part
    def show(tile, one, two, chunk, t):
        """The sums of _CHUNK rows of the tile, (2, _CHUNK, _SHOWN_STRIDE), for all threads to see."""
        cuda.syncthreads()
        for i in range(sums):
            row = row_of(t, i)
            if row >> 4 == chunk:
                at = (row & 15) * _SHOWN_STRIDE + position_of(t, i)
                store_shared(tile, at, one[i])
                store_shared(tile, _CHUNK * _SHOWN_STRIDE + at, two[i])
        cuda.syncthreads()

    return clear, own_index, fetch_weights, put_weights, copy_weights, copy_tile, show


def _sizes_of_tile(rows):
    """Depths that all threads fetch at a time, values and weights that each thread holds, floats of a tile."""
    step = threads_of(rows) // POSITIONS
    return step, DEPTH // step, max(4, DEPTH * rows // threads_of(rows)), DEPTH * (POSITIONS + rows)


@cache
def _forward_kernel(rows, kind, precision, in_planes):
    sums, (step, elements_held, weights_held, stage) = sums_of(rows), _sizes_of_tile(rows)
    multiply = multiply_kernel(rows, kind, precision)
    clear, own_index, fetch_weights, put_weights, _, copy_tile, show = _parts_of_tile(rows, precision, in_planes)
    elements, asynchronous = DEPTH * POSITIONS, precision != FP32
    floats = stage * (_STAGES if asynchronous else 2)

    @part
    def fetch(held, a, taps, number, plane, from_y, from_x, height, width, t):
        if in_planes:
            tap = load(taps, 0, number)
            inside, offset = _is_inside(tap, from_y, from_x, height, width), high_half(tap) + (t >> 7) * plane
            for i in range(elements_held):
                held[i] = load_inside(a, offset + i * step * plane, inside)
        else:
            for i in range(elements_held):
                tap = load(taps, number * DEPTH + (t >> 7), i * step)
                held[i] = load_inside(a, high_half(tap), _is_inside(tap, from_y, from_x, height, width))

    @part
    def put(tile, begin, held, t):
        for i in range(elements_held):
            store_shared(tile, begin + own_index(i, t), held[i])

    @part
    def sum_tile(one, two, tile, a, packed, at, taps, tiles, plane, from_y, from_x, height, width, t):
        """All depths, through registers."""
        held, held_weights = cuda.local.array(elements_held, float32), cuda.local.array(weights_held, float32)
        for number in range(tiles + 1):
            this, before = (number & 1) * stage, (1 - (number & 1)) * stage
            if number < tiles:
                fetch(held, a, taps, number, plane, from_y, from_x, height, width, t)
                fetch_weights(held_weights, packed, at + number * DEPTH * rows, t)
            if number > 0:
                multiply(one, two, tile, before, before + elements, t)
            if number < tiles:
                put(tile, this, held, t)
                put_weights(tile, this, held_weights, t)
            cuda.syncthreads()

    @part
    def sum_tile_asynchronously(one, two, tile, a, packed, at, taps, tiles, plane, from_y, from_x, height, width, t):
        for number in range(_STAGES - 1):
            if number < tiles:
                copy_tile(tile, number * stage, a, packed, at, taps, number, plane, from_y, from_x, height, width, t)
            end_copies()
        now, then = 0, (_STAGES - 1) * stage
        for number in range(tiles):
            await_copies()
            cuda.syncthreads()
            ahead = number + _STAGES - 1
            if ahead < tiles:
                copy_tile(tile, then, a, packed, at, taps, ahead, plane, from_y, from_x, height, width, t)
            end_copies()
            multiply(one, two, tile, now, now + elements, t)
            now, then = now + stage if now < (_STAGES - 1) * stage else 0, now
        await_all_copies()

    sum_all = sum_tile_asynchronously if asynchronous else sum_tile

    def convolve(x, ratio, dead, a, packed, taps, bias, constant, pattern, z_min, images, depth, a_elements, a_begin,
                 height, width, x_elements, x_begin, outputs, groups, channels, out_rows, out_columns, stride_h,
                 stride_w, patterns, features, x_min, x_max, relevance):
        tile = cuda.shared.array(floats, float32, ALIGNED)
        one, two = cuda.local.array(sums, float32), cuda.local.array(sums, float32)
        t, block = cuda.threadIdx.x, cuda.blockIdx.x
        per_group = split(outputs, groups)[0]
        panels, positions = (per_group + rows - 1) // rows, out_rows * out_columns
        block_of_positions, panel = split(block, groups * panels)
        group, panel_of_group = split(panel, panels)
        position, first_row = block_of_positions * POSITIONS + (t & 127), panel_of_group * rows
        is_valid = position < images * positions
        n, position = split(position, positions)
        row, column = split(position, out_columns)
        from_y, from_x = row * stride_h, column * stride_w
        begin = n * a_elements + a_begin + group * channels * height * width + from_y * width + from_x
        clear(one, two)
        # No tap of a position beyond the last is inside of the image.
        sum_all(one, two, tile, address_of(a, begin), packed, panel * depth * rows, taps, depth // DEPTH,
                height * width, from_y - _FAR if is_valid else -2 * _FAR, from_x - _FAR, height, width, t)
        at_x, at_ratio = n * x_elements + x_begin + position, n * outputs * positions + position
        for chunk in range(rows // _CHUNK):
            show(tile, one, two, chunk, t)
            for i in range(_CHUNK // step):
                row = (t >> 7) + i * step
                k = first_row + chunk * _CHUNK + row
                if is_valid and k < per_group:
                    k += group * per_group
                    at = row * _SHOWN_STRIDE + (t & 127)
                    _finish_output(x, ratio, dead, n, k, position, at_x + k * positions, at_ratio + k * positions,
                                   load_shared(tile, at), load_shared(tile, _CHUNK * _SHOWN_STRIDE + at), bias,
                                   constant, patterns, pattern, z_min, out_columns, features, x_min, x_max, relevance)

    return kernel(convolve, max_registers(rows, kind, precision, in_planes) if rows < LARGE_ROWS else None)


@cache
def _redistribute_kernel(rows, kind, precision, in_planes):
    sums, (step, elements_held, weights_held, stage) = sums_of(rows), _sizes_of_tile(rows)
    multiply = multiply_kernel(rows, kind, precision)
    clear, own_index, fetch_weights, put_weights, copy_weights, _, show = _parts_of_tile(rows, precision, in_planes)
    elements, floats, asynchronous = DEPTH * POSITIONS, 2 * stage, precision != FP32

    @part
    def fetch(ratios, factors, ratio, c, taps, entry, number, from_i, from_j, c_rows, c_columns, t):
        if in_planes:
            tap, plane = load(taps, entry, number), c_rows * c_columns
            inside, offset = _is_inside(tap, from_i, from_j, c_rows, c_columns), high_half(tap) + (t >> 7) * plane
            for i in range(elements_held):
                ratios[i] = load_inside(ratio, offset + i * step * plane, inside)
                factors[i] = load_inside(c, offset + i * step * plane, inside)
        else:
            for i in range(elements_held):
                tap = load(taps, entry + number * DEPTH + (t >> 7), i * step)
                inside = _is_inside(tap, from_i, from_j, c_rows, c_columns)
                ratios[i] = load_inside(ratio, high_half(tap), inside)
                factors[i] = load_inside(c, high_half(tap), inside)

    @part
    def put(tile, begin, ratios, factors, t):
        for i in range(elements_held):
            store_shared(tile, begin + own_index(i, t), ratios[i] * factors[i])

    def redistribute(c_in, c, ratio, a, packed, taps, low, high, images, first_y, first_x, in_rows, in_columns, depth,
                     packed_begin, taps_begin, c_in_elements, c_in_begin, c_elements, c_begin, a_elements, a_begin,
                     height, width, inputs, groups, outputs, c_rows, c_columns, stride_h, stride_w, features, relevance,
                     accumulate):
        tile = cuda.shared.array(floats, float32, ALIGNED)
        one, two = cuda.local.array(sums, float32), cuda.local.array(sums, float32)
        ratios, factors = cuda.local.array(elements_held, float32), cuda.local.array(elements_held, float32)
        held_weights = cuda.local.array(weights_held, float32)
        t, block = cuda.threadIdx.x, cuda.blockIdx.x
        per_group = split(inputs, groups)[0]
        panels, positions = (per_group + rows - 1) // rows, in_rows * in_columns
        block_of_positions, panel = split(block, groups * panels)
        group, panel_of_group = split(panel, panels)
        position, first_row = block_of_positions * POSITIONS + (t & 127), panel_of_group * rows
        is_valid = position < images * positions
        n, position = split(position, positions)
        i, j = split(position, in_columns)
        begin = group * split(outputs, groups)[0] * c_rows * c_columns + i * c_columns + j
        own_ratio = address_of(ratio, n * outputs * c_rows * c_columns + begin)
        own_c = address_of(c, n * c_elements + c_begin + begin)
        at, tiles, far_i = packed_begin + panel * depth * rows, depth // DEPTH, i - _FAR if is_valid else -2 * _FAR
        clear(one, two)
        for number in range(tiles + 1):
            this, before = (number & 1) * stage, (1 - (number & 1)) * stage
            if number < tiles:
                fetch(ratios, factors, own_ratio, own_c, taps, taps_begin, number, far_i, j - _FAR, c_rows, c_columns,
                      t)
                if asynchronous:
                    copy_weights(tile, this, packed, at + number * DEPTH * rows, t)
                    end_copies()
                else:
                    fetch_weights(held_weights, packed, at + number * DEPTH * rows, t)
            if number > 0:
                multiply(one, two, tile, before, before + elements, t)
            if number < tiles:
                put(tile, this, ratios, factors, t)
                if asynchronous:
                    await_all_copies()
                else:
                    put_weights(tile, this, held_weights, t)
            cuda.syncthreads()
        own = (first_y + i * stride_h) * width + first_x + j * stride_w
        at_in, at_a = n * c_in_elements + c_in_begin + own, n * a_elements + a_begin + own
        for chunk in range(rows // _CHUNK):
            show(tile, one, two, chunk, t)
            for number in range(_CHUNK // step):
                row = (t >> 7) + number * step
                channel = first_row + chunk * _CHUNK + row
                if is_valid and channel < per_group:
                    channel += group * per_group
                    shown, to = row * _SHOWN_STRIDE + (t & 127), channel * height * width
                    _finish_input(c_in, a, at_in + to, at_a + to, load_shared(tile, shown),
                                  load_shared(tile, _CHUNK * _SHOWN_STRIDE + shown), load(low, channel, 0),
                                  load(high, channel, 0), features, relevance, accumulate)

    return kernel(redistribute, max_registers(rows, kind, precision, in_planes))


# ---- Launchers -------------------------------------------------------------------------------------------------------


_KINDS = {NONNEGATIVE: PAIR, SIGNED: SIGNED_PAIR, BOX: SUM, ONES: SUM}


def conv2d_forward(x, ratio, dead, a, packed, taps, bias, constant, pattern, z_min, x_channel, a_channel, stride_h,
                   stride_w, channels, features, precision, x_min, x_max, relevance, first, last):
    """x <- W a + bias, clipped to x_min..x_max; ratio <- |x| / z; dead[n] <- 1 where z = 0 absorbs something
    (scalar.ratio_of).

    packed is of conv2d_pack, taps of conv2d_taps, precision one of fastdtd.kernels.codes. channels: of a group.
    constant, pattern and z_min as on the CPU. Units are images.
    """
    images, (_, outputs, rows, columns) = last - first, ratio.shape
    height, width = a.shape[2:]
    groups, panels, depth, panel_rows = packed.shape
    a_elements, x_elements = a.shape[1] * height * width, x.shape[1] * rows * columns
    sizes = (a_elements, first * a_elements + a_channel * height * width, height, width,
             x_elements, first * x_elements + x_channel * rows * columns, outputs, groups, channels, rows, columns,
             stride_h, stride_w, constant.shape[1], int(features), np.float32(x_min), np.float32(x_max), int(relevance))
    arrays = (x.reshape(x.size), ratio[first:last].reshape(images * outputs * rows * columns), dead[first:last],
              a.reshape(a.size), packed.reshape(packed.size), taps, bias, constant.reshape(constant.size), pattern,
              z_min, images)
    if panel_rows == 1:
        launch(_sum_outputs, -(-images * outputs * rows * columns // THREADS), THREADS, *arrays, depth, *sizes)
        return
    blocks = -(-images * rows * columns // POSITIONS) * groups * panels
    forward_kernel = _forward_kernel(panel_rows, _KINDS[features], precision, _in_planes(channels, panel_rows))
    launch(forward_kernel, blocks, threads_of(panel_rows), *arrays, depth, *sizes)


def conv2d_redistribute(c_in, c, ratio, a, packed, taps, low, high, phases, c_in_channel, c_channel, a_channel, groups,
                        stride_h, stride_w, panel_rows, features, precision, relevance, accumulate, first, last):
    """c_in <- V^T (ratio * c), or added to c_in if `accumulate`. If `relevance`, times u.

    packed is flat: the panels of one phase after those of another, made of the transposed V, or of W itself where an
    input has two features (SIGNED, BOX). phases, on the host, has of each phase its grid of inputs (first row and
    column, rows, columns), its depth in whole tiles, and where it begins in packed and taps. Units are images.
    """
    images, (_, outputs, c_rows, c_columns) = last - first, ratio.shape
    height, width = c_in.shape[2:]
    inputs = len(low)
    c_in_elements, c_elements = c_in.shape[1] * height * width, c.shape[1] * c_rows * c_columns
    a_elements = a.shape[1] * height * width
    arrays = (c_in.reshape(c_in.size), c.reshape(c.size),
              ratio[first:last].reshape(images * outputs * c_rows * c_columns), a.reshape(a.size), packed, taps, low,
              high, images)
    sizes = (c_in_elements, first * c_in_elements + c_in_channel * height * width, c_elements,
             first * c_elements + c_channel * c_rows * c_columns, a_elements,
             first * a_elements + a_channel * height * width, height, width, inputs, groups, outputs, c_rows, c_columns,
             stride_h, stride_w, int(features), int(relevance), int(accumulate))
    for first_y, first_x, rows, columns, depth, packed_begin, taps_begin in phases:
        if panel_rows == 1:
            launch(_sum_inputs, -(-images * inputs * rows * columns // THREADS), THREADS, *arrays, first_y, first_x,
                   rows, columns, depth, packed_begin, taps_begin, *sizes)
            continue
        kind = SPLIT if features in (BOX, SIGNED) else SUM
        redistribute_kernel = _redistribute_kernel(panel_rows, kind, precision,
                                                   _in_planes(outputs // groups, panel_rows))
        blocks = -(-images * rows * columns // POSITIONS) * groups * -(-(inputs // groups) // panel_rows)
        launch(redistribute_kernel, blocks, threads_of(panel_rows), *arrays, first_y, first_x, rows, columns, depth,
               packed_begin, taps_begin, *sizes)

