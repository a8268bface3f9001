"""Convolution and its redistribution: products of tiles whose numbers are gathered by address, so that im2col is no matrix in memory.

Both directions are one loop. A tile is so many rows (outputs of a group; inputs on the way back) by PLACES places, counted through all
images; its depth runs over the channels and taps that are summed over. Each depth reads `offset` numbers behind a place's own, where that
is inside of the image:

    direction       rows       places                           a tap reads
    forward         outputs    outputs of all images            the input at place * stride + (down, right)
    redistribute    inputs     inputs of all images, a phase    ratio * c at place + (down, right)

Where channels come in whole tiles, a tile's depths are channels of one tap: that is looked up and held against the image's borders once,
and the next number is always one plane further. Elsewhere (a first layer's three channels) a table says for each depth what it reads.

Under a stride (s, t), the inputs of a redistribution fall into s t phases by the remainder of their position. All inputs of a phase are
reached by the same taps of the kernel, so each phase is a plain convolution of its own and nothing is multiplied by zero.

The tile of the next depths is fetched while this one is multiplied. Forward on tensor cores it is copied asynchronously, two tiles ahead.
On the way back, where ratio and c are multiplied on the way in, it passes through registers, as it does in float32.

Layers with few rows in a group and little to sum over (depthwise) would leave most of a tile empty: there each thread sums one result by
itself.

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
    PLACES,
    SIGNED_PAIR,
    SPLIT,
    SUM,
    layout,
    most_registers,
    multiply_kernel,
    pack_tiles,
    sums_of,
    threads_of,
    tile_rows,
)
from fastdtd.kernels.cuda.scalar import clip, ratio_of, redistributed_pair
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

_FEW_ROWS, _FEW_DEPTHS = 4, 64  # of a group, at most: then each thread works for itself
_CHUNK = 16  # rows of a tile that are finished together; 1 << 4
_SHOWN_STRIDE = PLACES + 8
_STAGES = 3  # tiles in shared memory, where they are copied asynchronously: with the largest, all that a block has without asking for more
_FAR = 1 << 15  # no tap reaches so far up or left


# ---- Sizes and tables, for the plan ------------------------------------------------------------------------------------------------------


def conv2d_panel_rows(rows, depth, precision):
    """Rows of a tile for matrices of (rows, depth) in each group; 1: each thread works for itself."""
    return 1 if rows <= _FEW_ROWS and depth <= _FEW_DEPTHS else tile_rows(rows, precision)


def conv2d_packed_shape(groups, rows, depth, panel_rows):
    """Shape of packed weights for such matrices: (groups, panels, depth, rows of a tile)."""
    return groups, -(-rows // panel_rows), depth if panel_rows == 1 else -(-depth // DEPTH) * DEPTH, panel_rows


def conv2d_pack(packed, matrices, precision):
    """packed <- matrices (groups, rows, channels, taps), with zeros to fill the last panel and the last tile's depth. On the host."""
    groups, panels, depth, panel_rows = packed.shape
    _, rows, channels, taps = matrices.shape
    if _in_planes(channels, panel_rows):  # tap after tap of the same channels, which are then still in the cache
        matrices = matrices.reshape(groups, rows, channels // DEPTH, DEPTH, taps).swapaxes(3, 4)
    filled = np.zeros((groups, panels * panel_rows, depth), np.float32)
    filled[:, :rows, :channels * taps] = matrices.reshape(groups, rows, channels * taps)
    panels_first = filled.reshape(groups, panels, panel_rows, depth).swapaxes(2, 3)
    packed[:] = panels_first if panel_rows == 1 else pack_tiles(panels_first, precision)


def conv2d_taps(downs, rights, channels, height, width, panel_rows):
    """taps (int64): what is read, relative to a place, as one number (offset, down, right): of each tile if its depths are the channels of
    one tap, else of each depth, with 0, which is far outside, to fill the last tile. downs, rights: of a channel's taps."""
    channel = np.arange(channels, dtype=np.int64)[:, None]
    each = ((channel * height + downs) * width + rights << 32) + (np.asarray(downs) + _FAR << 16) + (np.asarray(rights) + _FAR)
    if _in_planes(channels, panel_rows):
        return each[::DEPTH].ravel()
    taps = np.zeros(each.size if panel_rows == 1 else -(-each.size // DEPTH) * DEPTH, np.int64)
    taps[:each.size] = each.ravel()
    return taps


def _in_planes(channels, panel_rows):
    """Whether a tile's depths are channels of one tap."""
    return panel_rows > 1 and channels % DEPTH == 0


# ---- Parts of kernels --------------------------------------------------------------------------------------------------------------------


@part
def _is_inside(tap, from_y, from_x, height, width):
    """Whether a tap falls inside of the image; from_y and from_x are _FAR less than the place's own."""
    both = low_half(tap)
    return is_below(from_y + ((both >> 16) & 0xFFFF), height) & is_below(from_x + (both & 0xFFFF), width)


@part
def _finish_output(x, ratio, dead, n, k, place, at_x, at_ratio, y, z, bias, constant, patterns, pattern, least, columns, features, least_x,
                   most_x, relevance):
    """One number of x and of ratio, from its sums y (without bias) and z."""
    if features in (BOX, ONES):
        row, column = split(place, columns)
        z = constant[(k * patterns + pattern[row]) * columns + column]
        if features == BOX:
            z += y
    value = clip(y + load(bias, k, 0), least_x, most_x)
    share = ratio_of(value, z, load(least, k, 0), relevance)
    store(x, at_x, 0, value)
    store(ratio, at_ratio, 0, share)
    if share < ZERO:
        dead[n] = 1


@part
def _finish_input(c_in, a, at_in, at_a, first, second, low, high, features, relevance, accumulate):
    """One number of c_in, from what comes through positive (or all) weights and through negative ones."""
    if features == ONES or (features == NONNEGATIVE and not relevance):
        result = first
    else:
        result = redistributed_pair(first, second, load(a, at_a, 0), features, low, high, relevance)
    if accumulate:
        result += load(c_in, at_in, 0)
    store(c_in, at_in, 0, result)


# ---- Kernels of one thread for one result ------------------------------------------------------------------------------------------------


@kernel
def _sum_outputs(x, ratio, dead, a, packed, taps, bias, constant, pattern, least, images, depth, a_numbers, a_begin, height,
                 width, x_numbers, x_begin, outputs, groups, channels, rows, columns, stride_down, stride_right, patterns, features,
                 least_x, most_x, relevance):
    at = cuda.grid(1)
    places = rows * columns
    if at >= images * outputs * places:
        return
    (both, place), (per_group, _) = split(at, places), split(outputs, groups)
    (n, k), (row, column) = split(both, outputs), split(place, columns)
    from_y, from_x = row * stride_down, column * stride_right
    begin = n * a_numbers + a_begin + split(k, per_group)[0] * channels * height * width + from_y * width + from_x
    y, z, address = ZERO, ZERO, address_of(a, begin)
    for d in range(depth):
        tap = load(taps, 0, d)
        b = load_inside(address, high_half(tap), _is_inside(tap, from_y - _FAR, from_x - _FAR, height, width))
        w = load(packed, k * depth, d)
        y += w * b
        z += max(w, ZERO) * b if features == NONNEGATIVE else max(w, ZERO) * max(b, ZERO) + max(-w, ZERO) * max(-b, ZERO)
    _finish_output(x, ratio, dead, n, k, place, n * x_numbers + x_begin + k * places + place, at, y, z, bias, constant, patterns, pattern,
                   least, columns, features, least_x, most_x, relevance)


@kernel
def _sum_inputs(c_in, c, ratio, a, packed, taps, low, high, images, top, left, rows, columns, depth, packed_begin, taps_begin,
                c_in_numbers, c_in_begin, c_numbers, c_begin, a_numbers, a_begin, height, width, inputs, groups, outputs, c_rows, c_columns,
                stride_down, stride_right, features, relevance, accumulate):
    at = cuda.grid(1)
    places = rows * columns
    if at >= images * inputs * places:
        return
    both, place = split(at, places)
    (n, channel), (i, j) = split(both, inputs), split(place, columns)
    group = split(channel, split(inputs, groups)[0])[0]
    begin = group * split(outputs, groups)[0] * c_rows * c_columns + i * c_columns + j
    ratios, factors = address_of(ratio, n * outputs * c_rows * c_columns + begin), address_of(c, n * c_numbers + c_begin + begin)
    first = second = ZERO
    for d in range(depth):
        tap, w = load(taps, taps_begin, d), load(packed, packed_begin + channel * depth, d)
        inside = _is_inside(tap, i - _FAR, j - _FAR, c_rows, c_columns)
        share = load_inside(ratios, high_half(tap), inside) * load_inside(factors, high_half(tap), inside)
        first += (max(w, ZERO) if features in (BOX, SIGNED) else w) * share
        second += max(-w, ZERO) * share
    own = (channel * height + top + i * stride_down) * width + left + j * stride_right
    _finish_input(c_in, a, n * c_in_numbers + c_in_begin + own, n * a_numbers + a_begin + own, first, second, low[channel], high[channel],
                  features, relevance, accumulate)


# ---- Kernels of a block for a tile -------------------------------------------------------------------------------------------------------


@cache
def _parts_of_tile(rows, precision, in_planes):
    """Parts of the kernels below for tiles of so many rows. In shared memory the weights of a tile lie behind its numbers."""
    threads, sums, numbers = threads_of(rows), sums_of(rows), DEPTH * PLACES
    step = threads // PLACES  # depths that all threads fetch at a time
    swizzles = 4 // step
    fours, all_fetch = -(-DEPTH * rows // (4 * threads)), DEPTH * rows % (4 * threads) == 0  # four weights at a time
    row_of, place_of, swizzle_of = layout(rows, precision)

    @part
    def clear(one, two):
        for i in range(sums):
            one[i] = ZERO
            two[i] = ZERO

    @part
    def own_place(i, t):
        """Where in the numbers of a tile thread t puts the i-th that it fetches."""
        return i * (step * PLACES) + (t >> 7) * PLACES + ((t & 127) ^ swizzle_of((t >> 7) + i % swizzles * step))

    @part
    def fetch_weights(held, packed, at, t):
        for i in range(fours):
            if all_fetch or 4 * t < DEPTH * rows:
                held[4 * i], held[4 * i + 1], held[4 * i + 2], held[4 * i + 3] = load_four(packed, at + 4 * t, 4 * i * threads)

    @part
    def put_weights(tile, begin, held, t):
        for i in range(fours):
            if all_fetch or 4 * t < DEPTH * rows:
                store_four_shared(tile, begin + numbers + 4 * (i * threads + t),
                                  (held[4 * i], held[4 * i + 1], held[4 * i + 2], held[4 * i + 3]))

    @part
    def copy_weights(tile, begin, packed, at, t):
        for i in range(fours):
            if all_fetch or 4 * t < DEPTH * rows:
                copy_four_later(tile, begin + numbers + 4 * (i * threads + t), packed, at + 4 * t, 4 * i * threads)

    @part
    def copy_tile(tile, begin, a, packed, at, taps, number, plane, from_y, from_x, height, width, t):
        """Numbers and weights of one tile, asynchronously."""
        if in_planes:
            tap = load(taps, 0, number)
            inside, offset = _is_inside(tap, from_y, from_x, height, width), high_half(tap) + (t >> 7) * plane
            for i in range(DEPTH // step):
                copy_later(tile, begin + own_place(i, t), a, offset + i * step * plane, inside)
        else:
            for i in range(DEPTH // step):
                tap = load(taps, number * DEPTH + (t >> 7), i * step)
                copy_later(tile, begin + own_place(i, t), a, high_half(tap), _is_inside(tap, from_y, from_x, height, width))
        copy_weights(tile, begin, packed, at + number * DEPTH * rows, t)

    @part
    def show(tile, one, two, chunk, t):
        """The sums of _CHUNK rows of the tile, (2, _CHUNK, _SHOWN_STRIDE), for all threads to see."""
        cuda.syncthreads()
        for i in range(sums):
            row = row_of(t, i)
            if row >> 4 == chunk:
                at = (row & 15) * _SHOWN_STRIDE + place_of(t, i)
                store_shared(tile, at, one[i])
                store_shared(tile, _CHUNK * _SHOWN_STRIDE + at, two[i])
        cuda.syncthreads()

    return clear, own_place, fetch_weights, put_weights, copy_weights, copy_tile, show


def _sizes_of_tile(rows):
    """Depths that all threads fetch at a time, numbers and weights that each thread holds, floats of a tile in shared memory."""
    step = threads_of(rows) // PLACES
    return step, DEPTH // step, max(4, DEPTH * rows // threads_of(rows)), DEPTH * (PLACES + rows)


@cache
def _forward_kernel(rows, kind, precision, in_planes):
    sums, (step, numbers_held, weights_held, stage) = sums_of(rows), _sizes_of_tile(rows)
    multiply = multiply_kernel(rows, kind, precision)
    clear, own_place, fetch_weights, put_weights, _, copy_tile, show = _parts_of_tile(rows, precision, in_planes)
    numbers, asynchronous = DEPTH * PLACES, precision != FP32
    floats = stage * (_STAGES if asynchronous else 2)

    @part
    def fetch(held, a, taps, number, plane, from_y, from_x, height, width, t):
        if in_planes:
            tap = load(taps, 0, number)
            inside, offset = _is_inside(tap, from_y, from_x, height, width), high_half(tap) + (t >> 7) * plane
            for i in range(numbers_held):
                held[i] = load_inside(a, offset + i * step * plane, inside)
        else:
            for i in range(numbers_held):
                tap = load(taps, number * DEPTH + (t >> 7), i * step)
                held[i] = load_inside(a, high_half(tap), _is_inside(tap, from_y, from_x, height, width))

    @part
    def put(tile, begin, held, t):
        for i in range(numbers_held):
            store_shared(tile, begin + own_place(i, t), held[i])

    @part
    def sum_tile(one, two, tile, a, packed, at, taps, tiles, plane, from_y, from_x, height, width, t):
        """All depths, through registers."""
        held, held_weights = cuda.local.array(numbers_held, float32), cuda.local.array(weights_held, float32)
        for number in range(tiles + 1):
            this, before = (number & 1) * stage, (1 - (number & 1)) * stage
            if number < tiles:
                fetch(held, a, taps, number, plane, from_y, from_x, height, width, t)
                fetch_weights(held_weights, packed, at + number * DEPTH * rows, t)
            if number > 0:
                multiply(one, two, tile, before, before + numbers, t)
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
            multiply(one, two, tile, now, now + numbers, t)
            now, then = now + stage if now < (_STAGES - 1) * stage else 0, now
        await_all_copies()

    sum_all = sum_tile_asynchronously if asynchronous else sum_tile

    def convolve(x, ratio, dead, a, packed, taps, bias, constant, pattern, least, images, depth, a_numbers, a_begin, height, width,
                 x_numbers, x_begin, outputs, groups, channels, out_rows, out_columns, stride_down, stride_right, patterns, features,
                 least_x, most_x, relevance):
        tile = cuda.shared.array(floats, float32, ALIGNED)
        one, two = cuda.local.array(sums, float32), cuda.local.array(sums, float32)
        t, block = cuda.threadIdx.x, cuda.blockIdx.x
        per_group = split(outputs, groups)[0]
        panels, places = (per_group + rows - 1) // rows, out_rows * out_columns
        chunk_of_places, panel = split(block, groups * panels)
        group, panel_of_group = split(panel, panels)
        place, first_row = chunk_of_places * PLACES + (t & 127), panel_of_group * rows
        is_place = place < images * places
        n, place = split(place, places)
        row, column = split(place, out_columns)
        from_y, from_x = row * stride_down, column * stride_right
        begin = n * a_numbers + a_begin + group * channels * height * width + from_y * width + from_x
        clear(one, two)
        # No tap of a place that there is not is inside of the image.
        sum_all(one, two, tile, address_of(a, begin), packed, panel * depth * rows, taps, depth // DEPTH,
                height * width, from_y - _FAR if is_place else -2 * _FAR, from_x - _FAR, height, width, t)
        at_x, at_ratio = n * x_numbers + x_begin + place, n * outputs * places + place
        for chunk in range(rows // _CHUNK):
            show(tile, one, two, chunk, t)
            for i in range(_CHUNK // step):
                row = (t >> 7) + i * step
                k = first_row + chunk * _CHUNK + row
                if is_place and k < per_group:
                    k += group * per_group
                    at = row * _SHOWN_STRIDE + (t & 127)
                    _finish_output(x, ratio, dead, n, k, place, at_x + k * places, at_ratio + k * places, load_shared(tile, at),
                                   load_shared(tile, _CHUNK * _SHOWN_STRIDE + at), bias, constant, patterns, pattern, least, out_columns,
                                   features, least_x, most_x, relevance)

    return kernel(convolve, most_registers(rows, kind, precision, in_planes) if rows < LARGE_ROWS else None)


@cache
def _back_kernel(rows, kind, precision, in_planes):
    sums, (step, numbers_held, weights_held, stage) = sums_of(rows), _sizes_of_tile(rows)
    multiply = multiply_kernel(rows, kind, precision)
    clear, own_place, fetch_weights, put_weights, copy_weights, _, show = _parts_of_tile(rows, precision, in_planes)
    numbers, floats, asynchronous = DEPTH * PLACES, 2 * stage, precision != FP32

    @part
    def fetch(ratios, factors, ratio, c, taps, entry, number, from_i, from_j, c_rows, c_columns, t):
        if in_planes:
            tap, plane = load(taps, entry, number), c_rows * c_columns
            inside, offset = _is_inside(tap, from_i, from_j, c_rows, c_columns), high_half(tap) + (t >> 7) * plane
            for i in range(numbers_held):
                ratios[i] = load_inside(ratio, offset + i * step * plane, inside)
                factors[i] = load_inside(c, offset + i * step * plane, inside)
        else:
            for i in range(numbers_held):
                tap = load(taps, entry + number * DEPTH + (t >> 7), i * step)
                inside = _is_inside(tap, from_i, from_j, c_rows, c_columns)
                ratios[i], factors[i] = load_inside(ratio, high_half(tap), inside), load_inside(c, high_half(tap), inside)

    @part
    def put(tile, begin, ratios, factors, t):
        for i in range(numbers_held):
            store_shared(tile, begin + own_place(i, t), ratios[i] * factors[i])

    def give_back(c_in, c, ratio, a, packed, taps, low, high, images, top, left, in_rows, in_columns, depth, packed_begin, taps_begin,
                  c_in_numbers, c_in_begin, c_numbers, c_begin, a_numbers, a_begin, height, width, inputs, groups, outputs, c_rows,
                  c_columns, stride_down, stride_right, features, relevance, accumulate):
        tile = cuda.shared.array(floats, float32, ALIGNED)
        one, two = cuda.local.array(sums, float32), cuda.local.array(sums, float32)
        ratios, factors = cuda.local.array(numbers_held, float32), cuda.local.array(numbers_held, float32)
        held_weights = cuda.local.array(weights_held, float32)
        t, block = cuda.threadIdx.x, cuda.blockIdx.x
        per_group = split(inputs, groups)[0]
        panels, places = (per_group + rows - 1) // rows, in_rows * in_columns
        chunk_of_places, panel = split(block, groups * panels)
        group, panel_of_group = split(panel, panels)
        place, first_row = chunk_of_places * PLACES + (t & 127), panel_of_group * rows
        is_place = place < images * places
        n, place = split(place, places)
        i, j = split(place, in_columns)
        begin = group * split(outputs, groups)[0] * c_rows * c_columns + i * c_columns + j
        own_ratio = address_of(ratio, n * outputs * c_rows * c_columns + begin)
        own_c = address_of(c, n * c_numbers + c_begin + begin)
        at, tiles, far_i = packed_begin + panel * depth * rows, depth // DEPTH, i - _FAR if is_place else -2 * _FAR
        clear(one, two)
        for number in range(tiles + 1):
            this, before = (number & 1) * stage, (1 - (number & 1)) * stage
            if number < tiles:
                fetch(ratios, factors, own_ratio, own_c, taps, taps_begin, number, far_i, j - _FAR, c_rows, c_columns, t)
                if asynchronous:
                    copy_weights(tile, this, packed, at + number * DEPTH * rows, t)
                    end_copies()
                else:
                    fetch_weights(held_weights, packed, at + number * DEPTH * rows, t)
            if number > 0:
                multiply(one, two, tile, before, before + numbers, t)
            if number < tiles:
                put(tile, this, ratios, factors, t)
                if asynchronous:
                    await_all_copies()
                else:
                    put_weights(tile, this, held_weights, t)
            cuda.syncthreads()
        own = (top + i * stride_down) * width + left + j * stride_right
        at_in, at_a = n * c_in_numbers + c_in_begin + own, n * a_numbers + a_begin + own
        for chunk in range(rows // _CHUNK):
            show(tile, one, two, chunk, t)
            for number in range(_CHUNK // step):
                row = (t >> 7) + number * step
                channel = first_row + chunk * _CHUNK + row
                if is_place and channel < per_group:
                    channel += group * per_group
                    shown, to = row * _SHOWN_STRIDE + (t & 127), channel * height * width
                    _finish_input(c_in, a, at_in + to, at_a + to, load_shared(tile, shown),
                                  load_shared(tile, _CHUNK * _SHOWN_STRIDE + shown), load(low, channel, 0), load(high, channel, 0),
                                  features, relevance, accumulate)

    return kernel(give_back, most_registers(rows, kind, precision, in_planes))


# ---- Launchers ---------------------------------------------------------------------------------------------------------------------------


_KINDS = {NONNEGATIVE: PAIR, SIGNED: SIGNED_PAIR, BOX: SUM, ONES: SUM}


def conv2d_forward(x, ratio, dead, a, packed, taps, bias, constant, pattern, least, x_channel, a_channel, stride_down, stride_right,
                   channels, features, precision, least_x, most_x, relevance, first, last):
    """x <- W a + bias, clipped to least_x..most_x; ratio <- |x| / z; dead[n] <- 1 where z = 0 absorbs something (elementwise.ratio_of).

    packed is of conv2d_pack, taps of conv2d_taps, precision one of fastdtd.kernels.codes. channels: of a group. constant, pattern and least
    as on the CPU. Units are images.
    """
    images, (_, outputs, rows, columns) = last - first, ratio.shape
    height, width = a.shape[2:]
    groups, panels, depth, panel_rows = packed.shape
    a_numbers, x_numbers = a.shape[1] * height * width, x.shape[1] * rows * columns
    numbers = (a_numbers, first * a_numbers + a_channel * height * width, height, width,
               x_numbers, first * x_numbers + x_channel * rows * columns, outputs, groups, channels, rows, columns, stride_down,
               stride_right, constant.shape[1], int(features), np.float32(least_x), np.float32(most_x), int(relevance))
    arrays = (x.reshape(x.size), ratio[first:last].reshape(images * outputs * rows * columns), dead[first:last], a.reshape(a.size),
              packed.reshape(packed.size), taps, bias, constant.reshape(constant.size), pattern, least, images)
    if panel_rows == 1:
        launch(_sum_outputs, -(-images * outputs * rows * columns // THREADS), THREADS, *arrays, depth, *numbers)
        return
    blocks = -(-images * rows * columns // PLACES) * groups * panels
    forward_kernel = _forward_kernel(panel_rows, _KINDS[features], precision, _in_planes(channels, panel_rows))
    launch(forward_kernel, blocks, threads_of(panel_rows), *arrays, depth, *numbers)


def conv2d_redistribute(c_in, c, ratio, a, packed, taps, low, high, phases, c_in_channel, c_channel, a_channel, groups, stride_down,
                        stride_right, panel_rows, features, precision, relevance, accumulate, first, last):
    """c_in <- V^T (ratio * c), or added to c_in if `accumulate`. If `relevance`, it is multiplied by u: relevance instead of its factor.

    packed is flat: the panels of one phase behind those of another, made of the transposed V, or of W itself where an input has two
    features (SIGNED, BOX). phases, on the host, has of each phase its grid of inputs (first row and column, rows, columns), its
    depth in whole tiles, and where it begins in packed and taps. Units are images.
    """
    images, (_, outputs, c_rows, c_columns) = last - first, ratio.shape
    height, width = c_in.shape[2:]
    inputs = len(low)
    c_in_numbers, c_numbers, a_numbers = c_in.shape[1] * height * width, c.shape[1] * c_rows * c_columns, a.shape[1] * height * width
    arrays = (c_in.reshape(c_in.size), c.reshape(c.size), ratio[first:last].reshape(images * outputs * c_rows * c_columns),
              a.reshape(a.size), packed, taps, low, high, images)
    numbers = (c_in_numbers, first * c_in_numbers + c_in_channel * height * width, c_numbers,
               first * c_numbers + c_channel * c_rows * c_columns, a_numbers, first * a_numbers + a_channel * height * width, height, width,
               inputs, groups, outputs, c_rows, c_columns, stride_down, stride_right, int(features), int(relevance), int(accumulate))
    for top, left, rows, columns, depth, packed_begin, taps_begin in phases:
        if panel_rows == 1:
            launch(_sum_inputs, -(-images * inputs * rows * columns // THREADS), THREADS, *arrays, top, left, rows, columns, depth,
                   packed_begin, taps_begin, *numbers)
            continue
        kind = SPLIT if features in (BOX, SIGNED) else SUM
        back_kernel = _back_kernel(panel_rows, kind, precision, _in_planes(outputs // groups, panel_rows))
        blocks = -(-images * rows * columns // PLACES) * groups * -(-(inputs // groups) // panel_rows)
        launch(back_kernel, blocks, threads_of(panel_rows), *arrays, top, left, rows, columns, depth, packed_begin, taps_begin, *numbers)

