"""The innermost products, written as LLVM vector instructions.

Numba's own vectoriser leaves half of the chip unused on these loops; these instructions reach about 90 % of it
(docs/kernels.md). A tile's size follows the processor's vector width, so everything that packs operands reads the sizes
from here.

MULTIPLY_TILE    A^T B, a tile of TILE_ROWS x TILE_COLUMNS: Winograd's points.
Panels           products of two rows (PANEL_ROWS) with up to PANEL_VECTORS vectors of packed columns: convolutions;
                 of three (FEW_ROWS) with columns where they lie: back to images, where packing would take longer.

The entries of a panel are sorted by class: in which of its rows they count. With two rows there are four classes, so
each is a long loop, even where little is summed, that knows its accumulators. What it means to count is up to who
packs:

SPLIT            P = max(A, 0)^T B and N = min(A, 0)^T B at once, in the time of one product, as every weight belongs to
                 P or to N and never to both: an entry counts in a row for P, else for N.
NONZERO          A^T B of an A that is half zeros, in little more than half the time: what does not count is left out.

Columns are packed: up to PANEL_DEPTH rows of PANEL_COLUMNS positions, PANEL_PITCH floats apart and aligned, so that the
first-level cache holds them and no load crosses one of its lines. A longer depth is cut into chunks, and the sums wait
in memory.
"""

from fastdtd.kernels.cpu.elementwise import Finish
from fastdtd.kernels.cpu.vector_code import (
    F32,
    I32,
    I64,
    LANES,
    LINE,
    NO_LANE,
    REGISTERS,
    ZEROS,
    any_lane,
    integer,
    load_vector,
    loop_range,
    multiply_add,
    pointers,
    prefetch,
    splat,
    store_vector,
    switch_on,
)
from fastdtd.kernels.scalar import MIN_DENOMINATOR
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

# Rows of a tile and vectors across it: as many accumulators as the registers hold with the operands.
# 24 of 32 registers; 12 of 16; of four lanes, which are slow in any case, 8 of 16 for less code
TILE_ROWS, TILE_VECTORS = (8, 3) if REGISTERS == 32 else (6, 2) if LANES == 8 else (4, 2)
TILE_COLUMNS = LANES * TILE_VECTORS
# 12 sums in use at a time, 2 weights and 1 column are 15 of 16 registers; all 28 sums and these are 31 of 32
PANEL_ROWS, PANEL_VECTORS = 2, 7 if REGISTERS == 32 else 6
PANEL_COLUMNS = LANES * PANEL_VECTORS
PANEL_PITCH = PANEL_COLUMNS + LANES  # a last piece of columns may be a vector longer
PANEL_DEPTH = 1024 // LANES  # 28 KB of columns, 32 of seven vectors
FEW_ROWS, FEW_VECTORS = 3, 4
# by rows; bit r is set where row r counts; from class to class one row changes sides
CLASSES = {rows: tuple(i ^ i >> 1 for i in range(1 << rows)) for rows in (1, PANEL_ROWS, FEW_ROWS)}
_UNROLL = 4
_AHEAD = 1024  # floats of the weights to come, which are often too many for the second-level cache


# ---- Tiles -----------------------------------------------------------------------------------------------------------


def _make_tile(vectors):
    @intrinsic
    def multiply(typing_context, tile, tile_stride, a, offsets, b, depth):
        def codegen(context, builder, signature, arguments):
            tile_stride, depth = arguments[1], arguments[5]
            p_tile, p_a, p_offsets, p_b = pointers(builder, [arguments[i] for i in (0, 2, 3, 4)], F32, F32, I32, F32)

            def one_step(step, sums):
                row_a = builder.mul(step, integer(TILE_ROWS))
                row_b = builder.sext(builder.load(builder.gep(p_offsets, [step])), I64)
                columns = [load_vector(builder, p_b, builder.add(row_b, integer(j * LANES))) for j in range(vectors)]
                result = []
                for i in range(TILE_ROWS):
                    weight = splat(builder, builder.load(builder.gep(p_a, [builder.add(row_a, integer(i))])))
                    result += [multiply_add(builder, sums[i * vectors + j], weight, columns[j]) for j in range(vectors)]
                return result

            def several_steps(step, sums):
                for line in range(0, _UNROLL * TILE_ROWS, LINE):
                    ahead = builder.add(builder.mul(step, integer(TILE_ROWS)), integer(line + _AHEAD))
                    prefetch(builder, builder.gep(p_a, [ahead]))
                for i in range(_UNROLL):
                    sums = one_step(builder.add(step, integer(i)), sums)
                return sums

            whole = builder.sub(depth, builder.srem(depth, integer(_UNROLL)))
            sums = loop_range(builder, integer(0), whole, _UNROLL, [ZEROS] * (TILE_ROWS * vectors), several_steps)
            for index, vector in enumerate(loop_range(builder, whole, depth, 1, sums, one_step)):
                at = builder.add(builder.mul(tile_stride, integer(index // vectors)), integer(index % vectors * LANES))
                store_vector(builder, vector, p_tile, at)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 6), codegen

    return multiply


# By vectors across: (tile, tile_stride, a, offsets, b, depth): tile (rows, vectors * LANES) <- a (depth, rows)^T b.
#
# Rows of tile are tile_stride floats apart; row d of b starts offsets[d] (int32) floats after b. tile, a, offsets and b
# are addresses. Each value of the tile is one chain of multiply-adds in the order of depth, so it does not depend on
# where in a tile, or in which tile, a column lies.
MULTIPLY_TILE = tuple(_make_tile(vectors) for vectors in range(1, TILE_VECTORS + 1))


# ---- Panels ----------------------------------------------------------------------------------------------------------


_SPLIT, _NONZERO = (True, PANEL_ROWS, 4 * LANES), (False, PANEL_ROWS, 4 * LANES)  # alignment of columns, in bytes


class _Panel:
    """Emits the code of one panel: entries, weights (entries, rows) and offsets of columns, between bounds."""

    def __init__(self, builder, kind, vectors, weights, offsets, bounds, columns):
        (self.is_split, self.panel_rows, self.align), self.builder, self.vectors = kind, builder, vectors
        self.p_weights, self.p_offsets, self.p_bounds, self.p_columns = pointers(
            builder, (weights, offsets, bounds, columns), F32, I32, I32, F32)
        self.rows = 2 * self.panel_rows if self.is_split else self.panel_rows

    def start(self, p_start, stride):
        return [load_vector(self.builder, p_start, self._at(stride, row, j)) for row in range(self.rows)
                for j in range(self.vectors)]

    def store(self, sums, p_out, stride):
        for index, value in enumerate(sums):
            store_vector(self.builder, value, p_out, self._at(stride, index // self.vectors, index % self.vectors))

    def fetch_rows(self, p_out, stride):
        """Ask for lines that will be written: a panel's rows lie far apart, and nobody else foresees them."""
        for row in range(self.panel_rows):
            for line in range(0, LANES * self.vectors + LINE, LINE):
                at = self.builder.add(self.builder.mul(stride, integer(row)), integer(line))
                prefetch(self.builder, self.builder.gep(p_out, [at]), is_written=True)

    def fetch_entries(self):
        """Ask for the entries of panels to come, which may be too many for the caches."""
        entries = 4 * PANEL_DEPTH
        for base, floats in ((self.p_weights, self.panel_rows), (self.p_offsets, 1)):
            for line in range(entries * floats, (entries + PANEL_DEPTH) * floats, LINE):
                prefetch(self.builder, self.builder.gep(base, [integer(line)]))

    def add(self, sums):
        """What all entries add to sums (rows, vectors)."""
        sums, first, count = list(sums), self._bound(0), self.panel_rows
        for i, counting in enumerate(CLASSES[count]):
            last = self._bound(i + 1)
            # (row, where its sums are) of those that this class adds to
            rows = [(row, row if counting >> row & 1 else count + row) for row in range(count)
                    if self.is_split or counting >> row & 1]
            if rows:
                in_use = [to * self.vectors + j for _, to in rows for j in range(self.vectors)]
                values = loop_range(self.builder, first, last, 1, [sums[index] for index in in_use],
                                    lambda step, part, rows=rows: self._add_entry(step, part, [row for row, _ in rows]),
                                    is_unrolled=False)  # how many entries a class has nobody can predict
                for index, value in zip(in_use, values, strict=True):
                    sums[index] = value
            first = last
        return sums

    def _add_entry(self, step, sums, rows):
        """Weights first, then column by column: the other way round spills with 16 registers."""
        builder, result = self.builder, list(sums)
        column = builder.sext(builder.load(builder.gep(self.p_offsets, [step])), I64)
        entry = builder.mul(step, integer(self.panel_rows))
        weights = [splat(builder, builder.load(builder.gep(self.p_weights, [builder.add(entry, integer(row))])))
                   for row in rows]
        for j in range(self.vectors):
            value = load_vector(builder, self.p_columns, builder.add(column, integer(j * LANES)), self.align)
            for i, weight in enumerate(weights):
                at = i * self.vectors + j
                result[at] = multiply_add(builder, sums[at], weight, value)
        return result

    def _bound(self, i):
        return self.builder.sext(self.builder.load(self.builder.gep(self.p_bounds, [integer(i)])), I64)

    def _at(self, stride, row, j):
        return self.builder.add(self.builder.mul(stride, integer(row)), integer(j * LANES))


def _make_add(kind, most):
    @intrinsic
    def add(typing_context, vectors, out, stride, start, start_stride, weights, offsets, bounds, columns, soon,
            soon_stride):
        def codegen(context, builder, signature, arguments):
            stride, start_stride, soon_stride = arguments[2], arguments[4], arguments[10]
            p_out, p_start, p_soon = pointers(builder, [arguments[i] for i in (1, 3, 9)], F32, F32, F32)

            def emit(number):
                panel = _Panel(builder, kind, number, *arguments[5:9])
                panel.fetch_entries()
                panel.fetch_rows(p_soon, soon_stride)
                panel.store(panel.add(panel.start(p_start, start_stride)), p_out, stride)
                return integer(0)

            switch_on(builder, arguments[0], most, I64, emit)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 11), codegen

    return add


# (vectors, out, stride, start, start_stride, weights, offsets, bounds, columns, soon, soon_stride): out <- start + what
# a panel adds, for so many vectors of columns. Rows from `soon` on will be written to, of the next panel or of this.
#
# out and start have a row for each row of the panel, so many floats apart; of SPLIT those of P, then those of N.
# weights (entries, rows); the column of entry i begins offsets[i] (int32) floats after `columns`; class j of
# CLASSES has the entries from bounds[j] to bounds[j + 1] (int32). All others are addresses. Each sum is one chain
# in the order of entries, so it does not depend on where a column lies.
add_split, add_nonzero = _make_add(_SPLIT, PANEL_VECTORS), _make_add(_NONZERO, PANEL_VECTORS)
# The same for FEW_ROWS and up to FEW_VECTORS, or one row and up to PANEL_VECTORS, with columns that are not aligned.
add_split_few, add_nonzero_few = (_make_add((is_split, FEW_ROWS, 4), FEW_VECTORS) for is_split in (True, False))
add_split_one, add_nonzero_one = (_make_add((is_split, 1, 4), PANEL_VECTORS) for is_split in (True, False))


@intrinsic
def finish_split(typing_context, vectors, x, ratio, stride, start, start_stride, weights, offsets, bounds, columns,
                 soon_x, soon_ratio, soon_stride, bias, second_bias, x_min, x_max, relevance):
    """As add_split for the last entries, with x and ratio (elementwise.Finish) of y = P + N and z = P as results: rows
    `stride` floats apart. Returns whether a ratio is negative."""
    signature = types.boolean(*[types.intp] * 13, *[types.float32] * 4, types.boolean)

    def codegen(context, builder, signature, arguments):
        p_x, p_ratio, p_start, *soon = pointers(builder, [arguments[i] for i in (1, 2, 4, 10, 11)], *[F32] * 5)
        stride, biases, (x_min, x_max, relevance) = arguments[3], arguments[13:15], arguments[15:]

        def emit(number):
            panel = _Panel(builder, _SPLIT, number, *arguments[6:10])
            for p_out in soon:
                panel.fetch_rows(p_out, arguments[12])
            sums, found, results = panel.add(panel.start(p_start, arguments[5])), NO_LANE, []
            for row in range(PANEL_ROWS):
                finish = Finish(builder, biases[row], x_min, x_max, relevance,
                                ir.Constant(F32, float(MIN_DENOMINATOR)))
                for index in range(row * number, (row + 1) * number):
                    z = sums[index]
                    results.append(finish(builder.fadd(z, sums[PANEL_ROWS * number + index]), z))
                    found = builder.or_(found, builder.fcmp_ordered("<", results[-1][1], ZEROS))
            for p_out, values in zip((p_x, p_ratio), zip(*results, strict=True), strict=True):
                panel.store(values, p_out, stride)
            return any_lane(builder, found)

        return switch_on(builder, arguments[0], PANEL_VECTORS, ir.IntType(1), emit)

    return signature, codegen


@intrinsic
def finish_constant(typing_context, vectors, x, ratio, stride, start, start_stride, weights, offsets, bounds, columns,
                    soon_x, soon_ratio, soon_stride, constant, constant_stride, is_box, bias, second_bias, z_min,
                    second_z_min, x_min, x_max, relevance):
    """As finish_split, of NONZERO: y is what the panel sums, z what is at `constant`, in rows constant_stride floats
    apart, and y if is_box."""
    signature = types.boolean(*[types.intp] * 15, types.boolean, *[types.float32] * 6, types.boolean)

    def codegen(context, builder, signature, arguments):
        p_x, p_ratio, p_start, *soon, p_constant = pointers(
            builder, [arguments[i] for i in (1, 2, 4, 10, 11, 13)], *[F32] * 6)
        stride, is_box, (x_min, x_max, relevance) = arguments[3], arguments[15], arguments[20:]

        def emit(number):
            panel = _Panel(builder, _NONZERO, number, *arguments[6:10])
            for p_out in soon:
                panel.fetch_rows(p_out, arguments[12])
            sums = panel.add(panel.start(p_start, arguments[5]))
            constants, found, results = panel.start(p_constant, arguments[14]), NO_LANE, []
            for row in range(PANEL_ROWS):
                finish = Finish(builder, arguments[16 + row], x_min, x_max, relevance, arguments[18 + row])
                for index in range(row * number, (row + 1) * number):
                    z = builder.select(is_box, builder.fadd(constants[index], sums[index]), constants[index])
                    results.append(finish(sums[index], z))
                    found = builder.or_(found, builder.fcmp_ordered("<", results[-1][1], ZEROS))
            for p_out, values in zip((p_x, p_ratio), zip(*results, strict=True), strict=True):
                panel.store(values, p_out, stride)
            return any_lane(builder, found)

        return switch_on(builder, arguments[0], PANEL_VECTORS, ir.IntType(1), emit)

    return signature, codegen


# ---- Columns ---------------------------------------------------------------------------------------------------------


def _make_pack(sources):
    @intrinsic
    def pack(typing_context, vectors, columns, a, c, taps, depth):
        def codegen(context, builder, signature, arguments):
            p_columns, p_a, p_c, p_taps = pointers(builder, arguments[1:5], F32, F32, F32, I32)

            def emit(number):
                def one_row(d, nothing):
                    tap = builder.sext(builder.load(builder.gep(p_taps, [d])), I64)
                    rows = [builder.gep(source, [tap]) for source in (p_a, p_c)[:sources]]
                    to = builder.gep(p_columns, [builder.mul(d, integer(PANEL_PITCH))])
                    for line in range(0, LANES * number, LINE):
                        for row in rows:
                            prefetch(builder, builder.gep(row, [integer(LANES * number + line)]))
                    for j in range(number):
                        values = [load_vector(builder, row, integer(j * LANES)) for row in rows]
                        store_vector(builder, builder.fmul(*values) if sources == 2 else values[0], to,
                                     integer(j * LANES))
                    return nothing

                loop_range(builder, integer(0), arguments[5], 1, [], one_row)
                return integer(0)

            switch_on(builder, arguments[0], PANEL_VECTORS, I64, emit)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 6), codegen

    return pack


# (vectors, columns, a, c, taps, depth): columns (depth, PANEL_PITCH) <- so many vectors from a + taps[d] (int32,
# floats) on; and these times those from c + taps[d]. The next ones are asked for: the rows of a tensor lie far apart.
pack_columns, pack_products = _make_pack(1), _make_pack(2)
