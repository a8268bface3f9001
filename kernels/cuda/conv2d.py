"""Convolution and its redistribution: products of tiles whose numbers are gathered by address, so that im2col is no matrix in memory.

Both directions are one loop. A tile is so many rows (outputs of a group; inputs on the way back) by PLACES places, counted through all
images; its depth runs over the channels and taps that are summed over. Each depth reads `offset` numbers behind a place's own, where that
is inside of the image:

    direction       rows       places                           a tap reads
    forward         outputs    outputs of all images            the input at place * stride + (down, right)
    redistribute    inputs     inputs of all images, a phase    ratio * c at place + (down, right)

Under a stride (s, t), the inputs of a redistribution fall into s t phases by the remainder of their position. All inputs of a phase are
reached by the same taps of the kernel, so each phase is a plain convolution of its own and nothing is multiplied by zero.

The tile of the next depths is fetched while this one is multiplied. Forward on tensor cores it is copied asynchronously, two tiles ahead.
On the way back, where ratio and c are multiplied on the way in, it passes through registers, as it does in float32.

Layers with few rows in a group (depthwise) would leave most of a tile empty: there each thread sums one result by itself.

Shapes as in kernels/cpu/conv2d.py.
"""

from functools import cache

import numpy as np
from fastdtd.kernels.codes import BOX, FP32, NONNEGATIVE, ONES, SIGNED
from fastdtd.kernels.cuda.elementwise import finish, give, ratio_of_least
from fastdtd.kernels.cuda.jit import THREADS, kernel, launch, part
from fastdtd.kernels.cuda.microkernel import (
    DEPTH,
    LARGE_ROWS,
    NUMBERS_STRIDE,
    PAIR,
    PLACES,
    SIGNED_PAIR,
    SMALL_ROWS,
    SPLIT,
    SUM,
    await_copies,
    copy_four_later,
    copy_later,
    end_copies,
    layout,
    multiply_kernel,
    sums_of,
    threads_of,
    weights_stride,
)
from numba import cuda, float32

_ZERO = np.float32(0)
_FEW_ROWS = 4  # of a group, at most: then each thread works for itself
_CHUNK = 16  # rows of a tile that are finished together; 1 << 4
_STAGES = 3  # tiles in shared memory, where they are copied asynchronously
_FAR = 1 << 15  # no tap reaches so far up or left


# ---- Sizes and tables, for the plan ------------------------------------------------------------------------------------------------------


def conv2d_packed_shape(groups, rows, depth):
    """Shape of packed weights for a matrix of (rows, depth) in each group: (groups, panels, depth, rows of a tile)."""
    panel_rows = 1 if rows <= _FEW_ROWS else SMALL_ROWS if rows <= 2 * SMALL_ROWS else LARGE_ROWS
    return groups, -(-rows // panel_rows), -(-depth // DEPTH) * DEPTH, panel_rows


def conv2d_pack(packed, matrices):
    """packed <- matrices (groups, rows, depth), with zeros to fill the last panel and the last tile's depth. On the host."""
    groups, panels, _, panel_rows = packed.shape
    _, rows, depth = matrices.shape
    packed[:] = 0
    for panel in range(panels):
        part_of = matrices[:, panel * panel_rows:(panel + 1) * panel_rows]
        packed[:, panel, :depth, :part_of.shape[1]] = part_of.transpose(0, 2, 1)
    assert groups * rows * depth == matrices.size


def conv2d_taps(offsets, downs, rights):
    """taps (int64): where each depth reads, relative to a place, as one number; 0, which is far outside, to fill the last tile's depth."""
    taps = np.zeros(-(-len(offsets) // DEPTH) * DEPTH, np.int64)
    taps[:len(offsets)] = (np.asarray(offsets, np.int64) << 32) + (np.asarray(downs) + _FAR << 16) + (np.asarray(rights) + _FAR)
    return taps


# ---- Parts of kernels --------------------------------------------------------------------------------------------------------------------


@part
def _is_inside(tap, from_y, from_x, height, width):
    y = from_y + ((tap >> 16) & 0xFFFF) - _FAR
    x = from_x + (tap & 0xFFFF) - _FAR
    return 0 <= y < height and 0 <= x < width


@part
def _finish_output(x, ratio, dead, n, k, place, y, z, outputs, places, x_begin, bias, constant, patterns, pattern, least, columns,
                   features, least_x, most_x, relevance):
    """One number of x and of ratio, from its sums y (without bias) and z."""
    if features in (BOX, ONES):
        row = place // columns
        z = constant[(k * patterns + pattern[row]) * columns + place - row * columns]
        if features == BOX:
            z += y
    value = finish(y + bias[k], least_x, most_x)
    share = ratio_of_least(value, z, relevance, least[k])
    x[x_begin + k * places + place] = value
    ratio[(n * outputs + k) * places + place] = share
    if share < _ZERO:
        dead[n] = 1


@part
def _finish_input(c_in, a, at_in, at_a, first, second, low, high, features, relevance, accumulate):
    """One number of c_in, from what comes through positive (or all) weights and through negative ones."""
    if features == BOX:
        result = max(a[at_a] - low, _ZERO) * first + max(high - a[at_a], _ZERO) * second
    elif features == SIGNED:
        value = a[at_a]
        result = first if value >= _ZERO else second
        if relevance:
            result *= abs(value)
    elif features == ONES or (features == NONNEGATIVE and not relevance):
        result = first
    else:
        result = give(first, a[at_a], features, low, high, relevance)
    c_in[at_in] = result + c_in[at_in] if accumulate else result


# ---- Kernels of one thread for one result ------------------------------------------------------------------------------------------------


@kernel
def _sum_outputs(x, ratio, dead, a, packed, taps, bias, constant, pattern, least, images, depth, a_numbers, a_begin, height,
                 width, x_numbers, x_begin, outputs, groups, channels, rows, columns, stride_down, stride_right, patterns, features,
                 least_x, most_x, relevance):
    at = cuda.grid(1)
    places = rows * columns
    if at >= images * outputs * places:
        return
    n, k, place = at // (outputs * places), at // places % outputs, at % places
    from_y, from_x = place // columns * stride_down, place % columns * stride_right
    begin = n * a_numbers + a_begin + k // (outputs // groups) * channels * height * width + from_y * width + from_x
    y = z = _ZERO
    for d in range(depth):
        tap = taps[d]
        if _is_inside(tap, from_y, from_x, height, width):
            w, b = packed[k * depth + d], a[begin + (tap >> 32)]
            y += w * b
            z += max(w, _ZERO) * b if features == NONNEGATIVE else max(w, _ZERO) * max(b, _ZERO) + max(-w, _ZERO) * max(-b, _ZERO)
    _finish_output(x, ratio, dead, n, k, place, y, z, outputs, places, n * x_numbers + x_begin, bias, constant, patterns, pattern, least,
                   columns, features, least_x, most_x, relevance)


@kernel
def _sum_inputs(c_in, c, ratio, a, packed, taps, low, high, images, top, left, rows, columns, depth, packed_begin, taps_begin,
                c_in_numbers, c_in_begin, c_numbers, c_begin, a_numbers, a_begin, height, width, inputs, groups, outputs, c_rows, c_columns,
                stride_down, stride_right, features, relevance, accumulate):
    at = cuda.grid(1)
    places = rows * columns
    if at >= images * inputs * places:
        return
    n, channel, place = at // (inputs * places), at // places % inputs, at % places
    i, j = place // columns, place % columns
    begin = channel // (inputs // groups) * (outputs // groups) * c_rows * c_columns + i * c_columns + j
    at_ratio, at_c = n * outputs * c_rows * c_columns + begin, n * c_numbers + c_begin + begin
    first = second = _ZERO
    for d in range(depth):
        tap = taps[taps_begin + d]
        if _is_inside(tap, i, j, c_rows, c_columns):
            offset, w = tap >> 32, packed[packed_begin + channel * depth + d]
            share = ratio[at_ratio + offset] * c[at_c + offset]
            first += (max(w, _ZERO) if features in (BOX, SIGNED) else w) * share
            second += max(-w, _ZERO) * share
    own = (channel * height + top + i * stride_down) * width + left + j * stride_right
    _finish_input(c_in, a, n * c_in_numbers + c_in_begin + own, n * a_numbers + a_begin + own, first, second, low[channel], high[channel],
                  features, relevance, accumulate)


# ---- Kernels of a block for a tile -------------------------------------------------------------------------------------------------------


@cache
def _parts_of_tile(rows, precision):
    """Parts of the kernels below for tiles of so many rows."""
    threads, stride, sums = threads_of(rows), weights_stride(rows), sums_of(rows)
    step = threads // PLACES  # depths that all threads fetch at a time
    row_of, place_of = layout(rows, precision)

    @part
    def clear(one, two):
        for i in range(sums):
            one[i] = _ZERO
            two[i] = _ZERO

    @part
    def fetch_weights(held, packed, at, t):
        for i in range(DEPTH * rows // threads):
            held[i] = packed[at + i * threads + t]

    @part
    def put_weights(tile, begin, held, t):
        for i in range(DEPTH * rows // threads):
            at = i * threads + t
            tile[begin + at // rows * stride + at % rows] = held[i]

    @part
    def put_numbers(tile, begin, held, t):
        at = begin + (t >> 7) * NUMBERS_STRIDE + (t & 127)
        for i in range(DEPTH // step):
            tile[at + i * step * NUMBERS_STRIDE] = held[i]

    @part
    def fetch_activations(held, a, begin, taps, entry, from_y, from_x, height, width, is_place, t):
        for i in range(DEPTH // step):
            tap = taps[entry + (t >> 7) + i * step]
            held[i] = _ZERO
            if is_place and _is_inside(tap, from_y, from_x, height, width):
                held[i] = a[begin + (tap >> 32)]

    @part
    def fetch_products(held, ratio, at_ratio, c, at_c, taps, entry, i, j, c_rows, c_columns, is_place, t):
        for number in range(DEPTH // step):
            tap = taps[entry + (t >> 7) + number * step]
            held[number] = _ZERO
            if is_place and _is_inside(tap, i, j, c_rows, c_columns):
                held[number] = ratio[at_ratio + (tap >> 32)] * c[at_c + (tap >> 32)]

    @part
    def copy_tile(tile, begin, a, a_begin, packed, at, taps, entry, from_y, from_x, height, width, is_place, t):
        """Numbers and weights, asynchronously; the weights behind the numbers."""
        to = begin + (t >> 7) * NUMBERS_STRIDE + (t & 127)
        for i in range(DEPTH // step):
            tap = taps[entry + (t >> 7) + i * step]
            inside = is_place and _is_inside(tap, from_y, from_x, height, width)
            copy_later(tile, to + i * step * NUMBERS_STRIDE, a, np.uint64(a_begin + (tap >> 32) if inside else 0), inside)
        if 4 * t < DEPTH * rows:
            to = begin + DEPTH * NUMBERS_STRIDE + 4 * t // rows * stride + 4 * t % rows
            copy_four_later(tile, to, packed, np.uint64(at + 4 * t))

    @part
    def show(tile, one, two, chunk, t):
        """The sums of _CHUNK rows of the tile, (2, _CHUNK, NUMBERS_STRIDE), for all threads to see."""
        cuda.syncthreads()
        for i in range(sums):
            row = row_of(t, i)
            if row >> 4 == chunk:
                at = (row & 15) * NUMBERS_STRIDE + place_of(t, i)
                tile[at] = one[i]
                tile[_CHUNK * NUMBERS_STRIDE + at] = two[i]
        cuda.syncthreads()

    return clear, fetch_weights, put_weights, put_numbers, fetch_activations, fetch_products, copy_tile, show


@cache
def _forward_kernel(rows, kind, precision):
    threads, sums, step = threads_of(rows), sums_of(rows), threads_of(rows) // PLACES
    numbers_held, weights_held = DEPTH // step, DEPTH * rows // threads
    multiply = multiply_kernel(rows, kind, precision)
    clear, fetch_weights, put_weights, put_numbers, fetch_activations, _, copy_tile, show = _parts_of_tile(rows, precision)
    weights, stage = DEPTH * NUMBERS_STRIDE, DEPTH * (NUMBERS_STRIDE + weights_stride(rows))
    asynchronous = precision != FP32
    floats = stage * (_STAGES if asynchronous else 2)

    @part
    def sum_tile(one, two, tile, a, begin, packed, at, taps, tiles, from_y, from_x, height, width, is_place, t):
        """All depths, through registers."""
        held, held_weights = cuda.local.array(numbers_held, float32), cuda.local.array(weights_held, float32)
        fetch_activations(held, a, begin, taps, 0, from_y, from_x, height, width, is_place, t)
        fetch_weights(held_weights, packed, at, t)
        put_numbers(tile, 0, held, t)
        put_weights(tile, weights, held_weights, t)
        cuda.syncthreads()
        for number in range(tiles):
            following = min(number + 1, tiles - 1)
            fetch_activations(held, a, begin, taps, following * DEPTH, from_y, from_x, height, width, is_place, t)
            fetch_weights(held_weights, packed, at + following * DEPTH * rows, t)
            now, then = (number & 1) * stage, (1 - (number & 1)) * stage
            multiply(one, two, tile, now, now + weights, t)
            put_numbers(tile, then, held, t)
            put_weights(tile, then + weights, held_weights, t)
            cuda.syncthreads()

    @part
    def sum_tile_asynchronously(one, two, tile, a, begin, packed, at, taps, tiles, from_y, from_x, height, width, is_place, t):
        for number in range(_STAGES - 1):
            ahead = min(number, tiles - 1)
            copy_tile(tile, number * stage, a, begin, packed, at + ahead * DEPTH * rows, taps, ahead * DEPTH, from_y, from_x, height, width,
                      is_place, t)
            end_copies()
        now, then = 0, (_STAGES - 1) * stage
        for number in range(tiles):
            await_copies()
            cuda.syncthreads()
            ahead = min(number + _STAGES - 1, tiles - 1)
            copy_tile(tile, then, a, begin, packed, at + ahead * DEPTH * rows, taps, ahead * DEPTH, from_y, from_x, height, width,
                      is_place, t)
            end_copies()
            multiply(one, two, tile, now, now + weights, t)
            now, then = now + stage if now < (_STAGES - 1) * stage else 0, now

    sum_all = sum_tile_asynchronously if asynchronous else sum_tile

    @kernel
    def convolve(x, ratio, dead, a, packed, taps, bias, constant, pattern, least, images, depth, a_numbers, a_begin, height, width,
                 x_numbers, x_begin, outputs, groups, channels, out_rows, out_columns, stride_down, stride_right, patterns, features,
                 least_x, most_x, relevance):
        tile = cuda.shared.array(floats, float32)
        one, two = cuda.local.array(sums, float32), cuda.local.array(sums, float32)
        t, block = cuda.threadIdx.x, cuda.blockIdx.x
        per_group = outputs // groups
        panels = (per_group + rows - 1) // rows
        panel, place = block % (groups * panels), block // (groups * panels) * PLACES + (t & 127)
        group, first_row = panel // panels, panel % panels * rows
        places = out_rows * out_columns
        is_place = place < images * places
        n, place = place // places, place % places
        from_y, from_x = place // out_columns * stride_down, place % out_columns * stride_right
        begin = n * a_numbers + a_begin + group * channels * height * width + from_y * width + from_x
        clear(one, two)
        sum_all(one, two, tile, a, begin, packed, panel * depth * rows, taps, depth // DEPTH, from_y, from_x, height, width, is_place, t)
        for chunk in range(rows // _CHUNK):
            show(tile, one, two, chunk, t)
            for i in range(_CHUNK // step):
                row = (t >> 7) + i * step
                k = first_row + chunk * _CHUNK + row
                if is_place and k < per_group:
                    at = row * NUMBERS_STRIDE + (t & 127)
                    _finish_output(x, ratio, dead, n, group * per_group + k, place, tile[at], tile[_CHUNK * NUMBERS_STRIDE + at], outputs,
                                   places, n * x_numbers + x_begin, bias, constant, patterns, pattern, least, out_columns, features,
                                   least_x, most_x, relevance)

    return convolve


@cache
def _back_kernel(rows, kind, precision):
    threads, sums, step = threads_of(rows), sums_of(rows), threads_of(rows) // PLACES
    numbers_held, weights_held = DEPTH // step, DEPTH * rows // threads
    multiply = multiply_kernel(rows, kind, precision)
    clear, fetch_weights, put_weights, put_numbers, _, fetch_products, _, show = _parts_of_tile(rows, precision)
    weights, stage = DEPTH * NUMBERS_STRIDE, DEPTH * (NUMBERS_STRIDE + weights_stride(rows))
    floats = 2 * stage

    @kernel
    def give_back(c_in, c, ratio, a, packed, taps, low, high, images, top, left, in_rows, in_columns, depth, packed_begin, taps_begin,
                  c_in_numbers, c_in_begin, c_numbers, c_begin, a_numbers, a_begin, height, width, inputs, groups, outputs, c_rows,
                  c_columns, stride_down, stride_right, features, relevance, accumulate):
        tile = cuda.shared.array(floats, float32)
        one, two = cuda.local.array(sums, float32), cuda.local.array(sums, float32)
        held, held_weights = cuda.local.array(numbers_held, float32), cuda.local.array(weights_held, float32)
        t, block = cuda.threadIdx.x, cuda.blockIdx.x
        per_group = inputs // groups
        panels = (per_group + rows - 1) // rows
        panel, place = block % (groups * panels), block // (groups * panels) * PLACES + (t & 127)
        group, first_row = panel // panels, panel % panels * rows
        places = in_rows * in_columns
        is_place = place < images * places
        n, place = place // places, place % places
        i, j = place // in_columns, place % in_columns
        begin = group * (outputs // groups) * c_rows * c_columns + i * c_columns + j
        at_ratio, at_c = n * outputs * c_rows * c_columns + begin, n * c_numbers + c_begin + begin
        at, tiles = packed_begin + panel * depth * rows, depth // DEPTH
        clear(one, two)
        if tiles > 0:
            fetch_products(held, ratio, at_ratio, c, at_c, taps, taps_begin, i, j, c_rows, c_columns, is_place, t)
            fetch_weights(held_weights, packed, at, t)
            put_numbers(tile, 0, held, t)
            put_weights(tile, weights, held_weights, t)
            cuda.syncthreads()
        for number in range(tiles):
            following = min(number + 1, tiles - 1)
            fetch_products(held, ratio, at_ratio, c, at_c, taps, taps_begin + following * DEPTH, i, j, c_rows, c_columns, is_place, t)
            fetch_weights(held_weights, packed, at + following * DEPTH * rows, t)
            now, then = (number & 1) * stage, (1 - (number & 1)) * stage
            multiply(one, two, tile, now, now + weights, t)
            put_numbers(tile, then, held, t)
            put_weights(tile, then + weights, held_weights, t)
            cuda.syncthreads()
        own = (top + i * stride_down) * width + left + j * stride_right
        for chunk in range(rows // _CHUNK):
            show(tile, one, two, chunk, t)
            for number in range(_CHUNK // step):
                row = (t >> 7) + number * step
                channel = first_row + chunk * _CHUNK + row
                if is_place and channel < per_group:
                    channel += group * per_group
                    shown, to = row * NUMBERS_STRIDE + (t & 127), channel * height * width + own
                    _finish_input(c_in, a, n * c_in_numbers + c_in_begin + to, n * a_numbers + a_begin + to, tile[shown],
                                  tile[_CHUNK * NUMBERS_STRIDE + shown], low[channel], high[channel], features, relevance, accumulate)

    return give_back


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
    launch(_forward_kernel(panel_rows, _KINDS[features], precision), blocks, threads_of(panel_rows), *arrays, depth, *numbers)


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
        blocks = -(-images * rows * columns // PLACES) * groups * -(-(inputs // groups) // panel_rows)
        launch(_back_kernel(panel_rows, kind, precision), blocks, threads_of(panel_rows), *arrays, top, left, rows, columns, depth,
               packed_begin, taps_begin, *numbers)

