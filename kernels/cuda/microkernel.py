"""The product of a tile: ROWS x DEPTH weights times DEPTH x POSITIONS values, both in shared memory, sums in registers.

A block holds two sums for each of its rows x POSITIONS results, `one` and `two`. What they are of weights W and values
b:

    SUM       one = sum of W b
    PAIR      one = sum of W b          two = sum of W+ b                 W+ = max(W, 0), W- = max(-W, 0)
    SIGNED    one = sum of W b          two = sum of W+ b+ + W- b-
    SPLIT     one = sum of W+ b         two = sum of W- b

so that W is stored and read once. Each thread has some of the results, at `row_of` and `position_of`; its sums are a
local array that is indexed by constants alone, once loops are unrolled, and so lies in registers
(tests/test_cuda_compiled.py sees to that).

In float32 each thread multiplies by itself. On tensor cores a warp does together, by mma.m16n8k8. Its lane 4 g + q
holds of W (16 x 8) the rows g, g + 8, g, g + 8 at depths q, q, q + 4, q + 4; of b (8 x 8) position g at depths q and q
+ 4; of the result (16 x 8) the rows g, g, g + 8, g + 8 at positions 2 q, 2 q + 1, 2 q, 2 q + 1 (PTX ISA, "Matrix
Fragments for mma.m16n8k8"). Weights are packed in that order, so a lane reads its four at once. A warp has 32
positions, and 16, 32 or 64 of the rows: with more rows, each value that is read serves more products.

In shared memory, depth d of the values is a row of POSITIONS in which position p lies at p ^ swizzle_of(d): else the
lanes of a fragment, which read four depths, would conflict in the same banks.
"""

from functools import cache

import numpy as np
from fastdtd.kernels.codes import FP32, TF32, TF32X3
from fastdtd.kernels.cuda.jit import part
from fastdtd.kernels.cuda.vector_code import load_four_shared, load_shared, mma, round_for_mma, truncate
from fastdtd.kernels.scalar import ZERO
from numba import cuda, float32

SUM, PAIR, SIGNED_PAIR, SPLIT = range(4)

POSITIONS = 128  # 1 << 7
DEPTH = 16
SMALL_ROWS, MIDDLE_ROWS, LARGE_ROWS = 16, 64, 128  # of a tile
_FRAGMENT = 16 * 8  # weights of one mma


def tile_rows(rows, precision):
    """Rows of the tiles for a layer with so many: large ones where they are as full; only TF32 leaves registers for
    these."""
    if rows <= 2 * SMALL_ROWS:
        return SMALL_ROWS
    fills = -(-rows // LARGE_ROWS) * 2 == -(-rows // MIDDLE_ROWS)
    return LARGE_ROWS if fills and precision == TF32 else MIDDLE_ROWS


def threads_of(rows):
    """Threads of a block with tiles of so many rows."""
    return 128 if rows == SMALL_ROWS else 256


def sums_of(rows):
    """How many results each thread has."""
    return rows * POSITIONS // threads_of(rows)


def max_registers(rows, kind, precision, in_planes):
    """Of a thread: so many that two blocks fit on a multiprocessor; None where they would not do."""
    if precision != TF32 or kind in (SIGNED_PAIR, SPLIT) or (kind == PAIR and rows == LARGE_ROWS):
        return None
    return 128 if rows < LARGE_ROWS or in_planes else None


def pack_tiles(panels, precision):
    """Weights (..., depth, rows of a tile) in the order in which tiles lie in shared memory. On the host."""
    if precision == FP32:
        return panels
    *outer, depth, rows = panels.shape
    split = panels.reshape(*outer, depth // 8, 2, 4, rows // 16, 2, 8)  # depth by 8, 4, 1, then rows by 16, 8, 1
    axes = len(outer)
    fragments = split.transpose(*range(axes), axes, axes + 3, axes + 5, axes + 2, axes + 1, axes + 4)
    packed = np.ascontiguousarray(fragments, np.float32).reshape(panels.shape)
    if precision == TF32:
        packed.view(np.uint32)[...] = (packed.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return packed


# ---- Which results a thread has --------------------------------------------------------------------------------------


def _in_columns(rows):
    """Warps below each other."""
    return 1 if rows == SMALL_ROWS else 2


@cache
def layout(rows, precision):
    """(row_of, position_of, swizzle_of): parts of (thread, number of its result), the same, and a depth."""
    in_columns, per_thread = _in_columns(rows), sums_of(rows) // 4
    warp_rows = rows // in_columns

    if precision == FP32:
        @part
        def row_of(t, i):
            return (t >> 5) * per_thread + (i >> 2)

        @part
        def position_of(t, i):
            return (t & 31) + 32 * (i & 3)

        @part
        def swizzle_of(depth):
            return 0
    else:
        @part
        def row_of(t, i):
            return ((t >> 5) & (in_columns - 1)) * warp_rows + (i >> 4) * 16 + ((t & 31) >> 2) + 4 * (i & 2)

        @part
        def position_of(t, i):
            return (t >> 5) // in_columns * 32 + ((i >> 2) & 3) * 8 + 2 * (t & 3) + (i & 1)

        @part
        def swizzle_of(depth):
            return (depth & 3) << 3

    return row_of, position_of, swizzle_of


# ---- The product -----------------------------------------------------------------------------------------------------


@cache
def multiply_kernel(rows, kind, precision):
    """The part multiply(one, two, tile, values, weights, t): one, two += their sums over one tile.

    one, two: thread t's sums. tile: shared memory, in which the values (DEPTH, POSITIONS) and weights (DEPTH * rows)
    begin at `values` and `weights`. Under SUM two is not touched.
    """
    return _multiply_alone(rows, kind) if precision == FP32 else _multiply_together(rows, kind, precision)


def _multiply_alone(rows, kind):
    fours = sums_of(rows) // 16

    @part
    def multiply(one, two, tile, elements, weights, t):
        at_weights, at_elements = weights + (t >> 5) * 4 * fours, elements + (t & 31)
        b = cuda.local.array(4, float32)
        for depth in range(DEPTH):
            for j in range(4):
                b[j] = load_shared(tile, at_elements + depth * POSITIONS + 32 * j)
            for four in range(fours):
                w = load_four_shared(tile, at_weights + depth * rows + 4 * four)
                for i in range(4):
                    w_for, w_against = max(w[i], ZERO), max(-w[i], ZERO)
                    for j in range(4):
                        at = (4 * four + i) * 4 + j
                        if kind == SPLIT:
                            one[at] += w_for * b[j]
                            two[at] += w_against * b[j]
                        else:
                            one[at] += w[i] * b[j]
                            if kind == PAIR:
                                two[at] += w_for * b[j]
                            elif kind == SIGNED_PAIR:
                                two[at] += w_for * max(b[j], ZERO) + w_against * max(-b[j], ZERO)

    return multiply


def _multiply_together(rows, kind, precision):
    tiles, in_columns = sums_of(rows) // 16, _in_columns(rows)
    both = precision == TF32X3  # each factor as the sum of two, the second what rounding left of it

    @part
    def add(sums, at, w, w_rest, b, b_rest, n):
        """sums[at:at + 4] += fragment w times fragment n of b."""
        if both:
            # Tensor cores may cut off where they add; over a whole sum that would tell.
            c = mma(w_rest[0], w_rest[1], w_rest[2], w_rest[3], b[2 * n], b[2 * n + 1], ZERO, ZERO, ZERO, ZERO)
            c = mma(w[0], w[1], w[2], w[3], b_rest[2 * n], b_rest[2 * n + 1], c[0], c[1], c[2], c[3])
            c = mma(w[0], w[1], w[2], w[3], b[2 * n], b[2 * n + 1], c[0], c[1], c[2], c[3])
            for i in range(4):
                sums[at + i] += c[i]
        else:
            sums[at], sums[at + 1], sums[at + 2], sums[at + 3] = mma(
                w[0], w[1], w[2], w[3], b[2 * n], b[2 * n + 1], sums[at], sums[at + 1], sums[at + 2], sums[at + 3])

    @part
    def keep(parts, rests, i, number):
        parts[i] = round_for_mma(number)
        if both:
            parts[i] = truncate(parts[i])
            rests[i] = round_for_mma(number - parts[i])

    @part
    def multiply(one, two, tile, elements, weights, t):
        warp, lane, q = t >> 5, t & 31, t & 3
        at_weights = weights + (warp & (in_columns - 1)) * (tiles * _FRAGMENT) + 4 * lane
        at_elements = elements + q * POSITIONS + warp // in_columns * 32 + (lane >> 2)
        b, b_rest = cuda.local.array(8, float32), cuda.local.array(8, float32)
        b_for, b_for_rest = cuda.local.array(8, float32), cuda.local.array(8, float32)
        b_against, b_against_rest = cuda.local.array(8, float32), cuda.local.array(8, float32)
        w, w_rest = cuda.local.array(4, float32), cuda.local.array(4, float32)
        w_for, w_for_rest = cuda.local.array(4, float32), cuda.local.array(4, float32)
        w_against, w_against_rest = cuda.local.array(4, float32), cuda.local.array(4, float32)
        for depth in range(0, DEPTH, 8):
            for i in range(8):  # fragment i // 2, depths q and q + 4
                number = load_shared(tile, at_elements + (depth + 4 * (i & 1)) * POSITIONS + (((i >> 1) ^ q) << 3))
                keep(b, b_rest, i, number)
                if kind == SIGNED_PAIR:
                    keep(b_for, b_for_rest, i, max(number, ZERO))
                    keep(b_against, b_against_rest, i, max(-number, ZERO))
            for m in range(tiles):
                given = load_four_shared(tile, at_weights + (depth * (rows // 16) // 8 + m) * _FRAGMENT)
                for i in range(4):
                    w[i] = given[i]  # of TF32, rounded when it was packed
                    if both:
                        keep(w, w_rest, i, given[i])
                    w_for[i], w_against[i] = max(w[i], ZERO), max(-w[i], ZERO)
                    if both:
                        w_for_rest[i] = w_rest[i] if given[i] > ZERO else ZERO
                        w_against_rest[i] = ZERO if given[i] > ZERO else -w_rest[i]
                for n in range(4):
                    at = (4 * m + n) * 4
                    if kind == SPLIT:
                        add(one, at, w_for, w_for_rest, b, b_rest, n)
                        add(two, at, w_against, w_against_rest, b, b_rest, n)
                    else:
                        add(one, at, w, w_rest, b, b_rest, n)
                        if kind == PAIR:
                            add(two, at, w_for, w_for_rest, b, b_rest, n)
                        elif kind == SIGNED_PAIR:
                            add(two, at, w_for, w_for_rest, b_for, b_for_rest, n)
                            add(two, at, w_against, w_against_rest, b_against, b_against_rest, n)

    return multiply
