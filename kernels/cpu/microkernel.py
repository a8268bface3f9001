"""The innermost products, written as LLVM vector instructions.

Numba's own vectoriser leaves half of the chip unused on these loops; these instructions reach about 90 % of it
(docs/kernels.md). A tile's size follows the processor's vector width, so everything that packs operands reads the sizes
from here.

Rows of the second factor b are found through a table of offsets. So b need not be a matrix in memory: the taps of a
convolution read one padded plane from different positions, and the columns of a tile are neighbouring positions (see
conv2d.py).

Two products:

MULTIPLY_TILE    A^T B, a tile of TILE_ROWS x TILE_COLUMNS.
MULTIPLY_SPLIT   P = max(A, 0)^T B and N = min(A, 0)^T B at once, a tile of SPLIT_ROWS x SPLIT_COLUMNS each, in the time
                 of one product: every weight belongs to P or to N, never to both. Entries of A are sorted by which of
                 the rows they are positive in, so that each of the 2^SPLIT_ROWS classes is a loop which knows the
                 accumulators that it adds to.

Both come by the number of vectors across a tile, and as strips: tile after tile, for matrices of fewer rows than a tile
has.
"""

from fastdtd.kernels.cpu.vector_code import (
    F32,
    I32,
    I64,
    LANES,
    REGISTERS,
    ZEROS,
    integer,
    load_vector,
    loop_range,
    multiply_add,
    pointers,
    prefetch,
    splat,
    store_vector,
)
from numba import types
from numba.extending import intrinsic

# Rows of a tile and vectors across it: as many accumulators as the registers hold with the operands.
# 24 of 32 registers; 12 of 16; of four lanes, which are slow in any case, 8 of 16 for less code
TILE_ROWS, TILE_VECTORS = (8, 3) if REGISTERS == 32 else (6, 2) if LANES == 8 else (4, 2)
TILE_COLUMNS = LANES * TILE_VECTORS
SPLIT_ROWS, SPLIT_VECTORS = 4, 3  # 12 accumulators in use at a time
SPLIT_COLUMNS = LANES * SPLIT_VECTORS
ROW_VECTORS = TILE_ROWS * TILE_VECTORS // 3
# from class to class one row changes sides: few registers are exchanged
SPLIT_ORDER = tuple(i ^ i >> 1 for i in range(2**SPLIT_ROWS))
_UNROLL = 4
_LINE = 16  # floats of a cache line
_AHEAD = 1024  # floats of the weights to come, which are often too many for the second-level cache


class _Product:
    """Emits the code of one tile. a (depth, rows); row d of b starts offsets[d] floats after b."""

    def __init__(self, builder, rows, a, offsets):
        self.builder, self.rows, (self.p_a, self.p_offsets) = builder, rows, pointers(builder, (a, offsets), F32, I32)

    def add_step(self, step, sums, p_b, vectors):
        """sums (rows, vectors) + row `step` of a times that of b."""
        builder, row_a = self.builder, self.builder.mul(step, integer(self.rows))
        row_b = builder.sext(builder.load(builder.gep(self.p_offsets, [step])), I64)
        columns = [load_vector(builder, p_b, builder.add(row_b, integer(j * LANES))) for j in range(vectors)]
        result = []
        for i in range(self.rows):
            weight = splat(builder, builder.load(builder.gep(self.p_a, [builder.add(row_a, integer(i))])))
            result += [multiply_add(builder, sums[i * vectors + j], weight, columns[j]) for j in range(vectors)]
        return result

    def fetch(self, step, floats):
        """Ask for so many weights that will be read _AHEAD floats after those of `step`."""
        for line in range(0, floats, _LINE):
            ahead = self.builder.add(self.builder.mul(step, integer(self.rows)), integer(line + _AHEAD))
            prefetch(self.builder, self.builder.gep(self.p_a, [ahead]))

    def store(self, sums, p_tile, tile_stride, vectors):
        for index, vector in enumerate(sums):
            at = self.builder.add(self.builder.mul(tile_stride, integer(index // vectors)),
                                  integer(index % vectors * LANES))
            store_vector(self.builder, vector, p_tile, at)


def _emit_tile(builder, rows, vectors, p_tile, p_b, tile_stride, a, offsets, depth):
    product = _Product(builder, rows, a, offsets)

    def one_step(step, sums):
        return product.add_step(step, sums, p_b, vectors)

    def several_steps(step, sums):
        product.fetch(step, _UNROLL * rows)
        for i in range(_UNROLL):
            sums = one_step(builder.add(step, integer(i)), sums)
        return sums

    whole = builder.sub(depth, builder.srem(depth, integer(_UNROLL)))
    sums = loop_range(builder, integer(0), whole, _UNROLL, [ZEROS] * (rows * vectors), several_steps)
    product.store(loop_range(builder, whole, depth, 1, sums, one_step), p_tile, tile_stride, vectors)


def _emit_split(builder, rows, vectors, p_tile, p_b, tile_stride, a, offsets, bounds):
    product, (p_bounds,) = _Product(builder, rows, a, offsets), pointers(builder, (bounds,), I32)
    sums = [ZEROS] * (2 * rows * vectors)

    def one_step(step, part):
        product.fetch(step, 1)
        return product.add_step(step, part, p_b, vectors)

    def bound(i):
        return builder.sext(builder.load(builder.gep(p_bounds, [integer(i)])), I64)

    first = bound(0)
    for i, positive_rows in enumerate(SPLIT_ORDER[:2**rows]):
        in_use = [(row + (0 if positive_rows >> row & 1 else rows)) * vectors + j for row in range(rows)
                  for j in range(vectors)]
        last = bound(i + 1)
        for index, value in zip(in_use, loop_range(builder, first, last, 1, [sums[index] for index in in_use],
                                                   one_step), strict=True):
            sums[index] = value
        first = last
    product.store(sums, p_tile, tile_stride, vectors)


def _make_tile(emit, rows, vectors):
    @intrinsic
    def multiply(typing_context, tile, tile_stride, a, offsets, b, end):
        def codegen(context, builder, signature, arguments):
            tile, tile_stride, a, offsets, b, end = arguments
            emit(builder, rows, vectors, *pointers(builder, (tile, b), F32, F32), tile_stride, a, offsets, end)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 6), codegen

    return multiply


def _make_strip(emit, rows, wide, narrow):
    @intrinsic
    def multiply(typing_context, tile, tile_stride, a, offsets, b, end, columns):
        def codegen(context, builder, signature, arguments):
            tile, tile_stride, a, offsets, b, end, columns = arguments
            p_tile, p_b = pointers(builder, (tile, b), F32, F32)

            def strip(first, last, vectors):
                def one_tile(column, nothing):
                    emit(builder, rows, vectors, builder.gep(p_tile, [column]), builder.gep(p_b, [column]), tile_stride,
                         a, offsets, end)
                    return nothing

                loop_range(builder, first, last, vectors * LANES, [], one_tile)

            whole = builder.sub(columns, builder.srem(columns, integer(wide * LANES)))
            strip(integer(0), whole, wide)
            strip(whole, columns, narrow)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 7), codegen

    return multiply


# (tile, tile_stride, a, offsets, b, depth): tile (rows, vectors * LANES) <- a (depth, rows)^T times b.
#
# Rows of tile are tile_stride floats apart; row d of b starts offsets[d] (int32) floats after b. tile, a, offsets and b
# are addresses. Each value of the tile is one chain of multiply-adds in the order of depth, so it does not depend on
# where in a tile, or in which tile, a column lies.
MULTIPLY_TILE = tuple(_make_tile(_emit_tile, TILE_ROWS, vectors) for vectors in range(1, TILE_VECTORS + 1))
# (tiles, tile_stride, a, offsets, b, bounds): tiles (2, rows, vectors * LANES) <- P and N, one chain each.
#
# Entries of a are sorted by class: those from bounds[i] to bounds[i + 1] (int32) are added to P in the rows whose bits
# are set in SPLIT_ORDER[i], to N in the others.
MULTIPLY_SPLIT = tuple(_make_tile(_emit_split, SPLIT_ROWS, vectors) for vectors in range(1, SPLIT_VECTORS + 1))
# The same for so many columns (a last argument), rounded up to whole tiles.
multiply_row = _make_strip(_emit_tile, 1, ROW_VECTORS, 2)  # depthwise convolutions
multiply_split_row = _make_strip(_emit_split, 1, ROW_VECTORS, 2)  # and back to grey images
multiply_split_three = _make_strip(_emit_split, 3, 4, 1)  # back to images in colour
