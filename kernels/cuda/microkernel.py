"""The product of a tile: ROWS x DEPTH weights times DEPTH x PLACES numbers, both in shared memory, sums in registers.

A block holds two sums for each of its rows x PLACES results, `one` and `two`. What they are of weights W and numbers b:

    SUM       one = sum of W b
    PAIR      one = sum of W b          two = sum of W+ b                 W+ = max(W, 0), W- = max(-W, 0)
    SIGNED    one = sum of W b          two = sum of W+ b+ + W- b-
    SPLIT     one = sum of W+ b         two = sum of W- b

so that W is stored and read once. Each thread has some of the results, at `row_of` and `place_of`; its sums are a local array that is
indexed by constants alone, once loops are unrolled, and so lies in registers (tests/test_cuda_compiled.py sees to that).

In float32 each thread multiplies by itself. On tensor cores a warp does together, by mma.sync.m16n8k8, whose lane 4 g + q holds of W
(16 x 8) the rows g and g + 8 at depths q and q + 4, of b (8 x 8) place g at depths q and q + 4, and of the result (16 x 8) rows g and g + 8
at places 2 q and 2 q + 1 (PTX ISA, "Matrix Fragments for mma.m16n8k8").
"""

from functools import cache

import numpy as np
from fastdtd.kernels.codes import FP32, TF32X3
from fastdtd.kernels.cuda.jit import part
from numba import config, cuda, float32

SUM, PAIR, SIGNED_PAIR, SPLIT = range(4)

PLACES = 128  # 1 << 7
DEPTH = 16
LARGE_ROWS = 64  # of a tile; a layer with few rows takes tiles of SMALL_ROWS
SMALL_ROWS = 16
NUMBERS_STRIDE = PLACES + 8  # 8 modulo 32: the lanes of a fragment meet 32 banks
_LANES_PLACES = 32  # of a warp's part of a tile
_ZERO = np.float32(0)


def threads_of(rows):
    """Threads of a block with tiles of so many rows."""
    return 256 if rows == LARGE_ROWS else 128


def weights_stride(rows):
    """Floats from one depth of a weights tile to the next."""
    return rows + 8


def sums_of(rows):
    """How many results each thread has."""
    return rows * PLACES // threads_of(rows)


# ---- Tensor cores ------------------------------------------------------------------------------------------------------------------------


if config.ENABLE_CUDASIM:  # threads of the simulator know nothing of warps: `multiply` is another function there

    def _mma(w0, w1, w2, w3, b0, b1, c0, c1, c2, c3):
        raise NotImplementedError

    def _to_tf32(number):
        bits = np.float32(number).view(np.uint32)
        return ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)

    def _copy_later(tile, at, source, index, inside):
        tile[at] = source[index] if inside else _ZERO

    def _copy_four_later(tile, at, source, index):
        tile[at:at + 4] = source[index:index + 4]

    def _end_copies():
        pass

    def _await_copies():
        pass

else:
    from llvmlite import ir
    from numba.cuda import cgutils
    from numba.cuda.extending import intrinsic
    from numba.cuda.types import UniTuple, boolean, int64, uint64, void

    _F32, _I32, _I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
    _QUAD = ir.LiteralStructType([_F32] * 4)

    @intrinsic
    def _mma(typing_context, w0, w1, w2, w3, b0, b1, c0, c1, c2, c3):
        def codegen(context, builder, signature, arguments):
            product = builder.asm(
                ir.FunctionType(_QUAD, [_I32] * 6 + [_F32] * 4),
                "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {$0,$1,$2,$3},{$4,$5,$6,$7},{$8,$9},{$10,$11,$12,$13};",
                "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
                [builder.bitcast(factor, _I32) for factor in arguments[:6]] + list(arguments[6:]), side_effect=False)
            return cgutils.pack_array(builder, [builder.extract_value(product, i) for i in range(4)])

        return UniTuple(float32, 4)(*[float32] * 10), codegen

    @intrinsic
    def _to_tf32(typing_context, number):
        """Rounded to nearest; the tensor core by itself would cut off, which makes sums of positive numbers too small."""
        def codegen(context, builder, signature, arguments):
            rounded = builder.asm(ir.FunctionType(_I32, [_F32]), "cvt.rna.tf32.f32 $0, $1;", "=r,f", arguments, side_effect=False)
            return builder.bitcast(rounded, _F32)

        return float32(float32), codegen

    def _shared_address(context, builder, kind, tile, at):
        data = context.make_array(kind)(context, builder, tile).data
        shared = builder.addrspacecast(data, _F32.as_pointer(3))
        return builder.ptrtoint(builder.gep(shared, [at]), _I32)

    def _global_address(context, builder, kind, source, index):
        return builder.ptrtoint(builder.gep(context.make_array(kind)(context, builder, source).data, [index]), _I64)

    @intrinsic
    def _copy_later(typing_context, tile, at, source, index, inside):
        """tile[at] <- source[index], or 0 if not `inside`; done once _await_copies says so. Needs sm_80."""
        def codegen(context, builder, signature, arguments):
            tile, at, source, index, inside = arguments
            count = builder.select(inside, ir.Constant(_I32, 4), ir.Constant(_I32, 0))
            builder.asm(ir.FunctionType(ir.VoidType(), [_I32, _I64, _I32]),
                        "cp.async.ca.shared.global [$0], [$1], 4, $2;", "r,l,r,~{memory}",
                        [_shared_address(context, builder, signature.args[0], tile, at),
                         _global_address(context, builder, signature.args[2], source, index), count], side_effect=True)
            return context.get_dummy_value()

        return void(tile, int64, source, uint64, boolean), codegen

    @intrinsic
    def _copy_four_later(typing_context, tile, at, source, index):
        """tile[at:at + 4] <- source[index:index + 4], both aligned to four floats."""
        def codegen(context, builder, signature, arguments):
            tile, at, source, index = arguments
            builder.asm(ir.FunctionType(ir.VoidType(), [_I32, _I64]), "cp.async.cg.shared.global [$0], [$1], 16;", "r,l,~{memory}",
                        [_shared_address(context, builder, signature.args[0], tile, at),
                         _global_address(context, builder, signature.args[2], source, index)], side_effect=True)
            return context.get_dummy_value()

        return void(tile, int64, source, uint64), codegen

    @intrinsic
    def _end_copies(typing_context):
        """All copies begun since the last such call are one group."""
        def codegen(context, builder, signature, arguments):
            builder.asm(ir.FunctionType(ir.VoidType(), []), "cp.async.commit_group;", "~{memory}", [], side_effect=True)
            return context.get_dummy_value()

        return void(), codegen

    @intrinsic
    def _await_copies(typing_context):
        """All groups but the last one are there."""
        def codegen(context, builder, signature, arguments):
            builder.asm(ir.FunctionType(ir.VoidType(), []), "cp.async.wait_group 1;", "~{memory}", [], side_effect=True)
            return context.get_dummy_value()

        return void(), codegen


copy_later, copy_four_later, end_copies, await_copies = _copy_later, _copy_four_later, _end_copies, _await_copies


# ---- Which results a thread has ----------------------------------------------------------------------------------------------------------


@cache
def layout(rows, precision):
    """(row_of, place_of): parts of (thread, number of its result)."""
    in_columns = 1 if rows == SMALL_ROWS else 2  # warps below each other
    per_thread = sums_of(rows) // 4

    if precision == FP32:
        @part
        def row_of(t, i):
            return (t >> 5) * per_thread + (i >> 2)

        @part
        def place_of(t, i):
            return (t & 31) + 32 * (i & 3)
    else:
        @part
        def row_of(t, i):
            warp_row = (t >> 5) & (in_columns - 1)
            return warp_row * 32 + (i >> 4) * 16 + ((t & 31) >> 2) + 4 * (i & 2)

        @part
        def place_of(t, i):
            warp_column = (t >> 5) // in_columns
            return warp_column * _LANES_PLACES + ((i >> 2) & 3) * 8 + 2 * (t & 3) + (i & 1)

    return row_of, place_of


# ---- The product -------------------------------------------------------------------------------------------------------------------------


@cache
def multiply_kernel(rows, kind, precision):
    """The part multiply(one, two, tile, numbers, weights, t): one, two += their sums over one tile.

    one, two: thread t's sums. tile: shared memory, in which the numbers (DEPTH, NUMBERS_STRIDE) and weights (DEPTH, weights_stride) begin
    at `numbers` and `weights`. Under SUM two is not touched.
    """
    if precision == FP32:
        return _multiply_alone(rows, kind)
    return (_multiply_simulated if config.ENABLE_CUDASIM else _multiply_together)(rows, kind, precision)


def _multiply_alone(rows, kind):
    stride, per_thread = weights_stride(rows), sums_of(rows) // 4

    @part
    def multiply(one, two, tile, numbers, weights, t):
        at_weights, at_numbers = weights + (t >> 5) * per_thread, numbers + (t & 31)
        for depth in range(DEPTH):
            for i in range(per_thread):
                w = tile[at_weights + depth * stride + i]
                w_for, w_against = max(w, _ZERO), max(-w, _ZERO)
                for j in range(4):
                    b = tile[at_numbers + depth * NUMBERS_STRIDE + 32 * j]
                    if kind == SPLIT:
                        one[4 * i + j] += w_for * b
                        two[4 * i + j] += w_against * b
                    else:
                        one[4 * i + j] += w * b
                        if kind == PAIR:
                            two[4 * i + j] += w_for * b
                        elif kind == SIGNED_PAIR:
                            two[4 * i + j] += w_for * max(b, _ZERO) + w_against * max(-b, _ZERO)

    return multiply


def _multiply_together(rows, kind, precision):
    stride, tiles, in_columns = weights_stride(rows), sums_of(rows) // 16, 1 if rows == SMALL_ROWS else 2
    fragments, needs_parts, needs_negative = 4 * tiles, kind != SUM, kind in (SIGNED_PAIR, SPLIT)

    @part
    def add_small(sums, at, w, m, b0, b1):
        """sums[at:at + 4] += fragment m of w times (b0, b1)."""
        sums[at], sums[at + 1], sums[at + 2], sums[at + 3] = _mma(
            w[4 * m], w[4 * m + 1], w[4 * m + 2], w[4 * m + 3], b0, b1, sums[at], sums[at + 1], sums[at + 2], sums[at + 3])

    @part
    def add(sums, at, w, rest, m, b0, b1):
        """The same for w + rest, which hold what `keep` made of a number."""
        large0, large1 = _to_tf32(b0), _to_tf32(b1)
        if precision == TF32X3:
            add_small(sums, at, rest, m, large0, large1)
            add_small(sums, at, w, m, _to_tf32(b0 - large0), _to_tf32(b1 - large1))
        add_small(sums, at, w, m, large0, large1)

    @part
    def keep(w, rest, i, number):
        w[i] = _to_tf32(number)
        if precision == TF32X3:
            rest[i] = _to_tf32(number - w[i])

    @part
    def multiply(one, two, tile, numbers, weights, t):
        warp, g, q = t >> 5, (t & 31) >> 2, t & 3
        at_weights = weights + q * stride + (warp & (in_columns - 1)) * 32 + g
        at_numbers = numbers + q * NUMBERS_STRIDE + warp // in_columns * _LANES_PLACES + g
        w, rest = cuda.local.array(fragments, float32), cuda.local.array(fragments, float32)
        w_for, rest_for = cuda.local.array(fragments, float32), cuda.local.array(fragments, float32)
        w_against, rest_against = cuda.local.array(fragments, float32), cuda.local.array(fragments, float32)
        for depth in range(0, DEPTH, 8):
            for i in range(4 * tiles):  # fragment i // 4: rows 0, 8, 0, 8, depths 0, 0, 4, 4
                number = tile[at_weights + (depth + 4 * ((i >> 1) & 1)) * stride + (i >> 2) * 16 + 8 * (i & 1)]
                if kind != SPLIT:
                    keep(w, rest, i, number)
                if needs_parts:
                    keep(w_for, rest_for, i, max(number, _ZERO))
                if needs_negative:
                    keep(w_against, rest_against, i, max(-number, _ZERO))
            for n in range(4):
                b0 = tile[at_numbers + depth * NUMBERS_STRIDE + 8 * n]
                b1 = tile[at_numbers + (depth + 4) * NUMBERS_STRIDE + 8 * n]
                for m in range(tiles):
                    at = (4 * m + n) * 4
                    if kind == SPLIT:
                        add(one, at, w_for, rest_for, m, b0, b1)
                        add(two, at, w_against, rest_against, m, b0, b1)
                    else:
                        add(one, at, w, rest, m, b0, b1)
                        if kind == PAIR:
                            add(two, at, w_for, rest_for, m, b0, b1)
                        elif kind == SIGNED_PAIR:
                            add(two, at, w_for, rest_for, m, max(b0, _ZERO), max(b1, _ZERO))
                            add(two, at, w_against, rest_against, m, max(-b0, _ZERO), max(-b1, _ZERO))

    return multiply


def _multiply_simulated(rows, kind, precision):
    """What _multiply_together does, result by result: for the simulator, in which there are no warps."""
    stride = weights_stride(rows)
    row_of, place_of = layout(rows, precision)

    def product(w, b):
        large_w, large_b = _to_tf32(w), _to_tf32(b)
        total = large_w * large_b
        if precision == TF32X3:
            total += _to_tf32(w - large_w) * large_b + large_w * _to_tf32(b - large_b)
        return total

    @part
    def multiply(one, two, tile, numbers, weights, t):
        for i in range(sums_of(rows)):
            for depth in range(DEPTH):
                w = tile[weights + depth * stride + row_of(t, i)]
                b = tile[numbers + depth * NUMBERS_STRIDE + place_of(t, i)]
                w_for, w_against = max(w, _ZERO), max(-w, _ZERO)
                one[i] += product(w_for if kind == SPLIT else w, b)
                if kind == PAIR:
                    two[i] += product(w_for, b)
                elif kind == SIGNED_PAIR:
                    two[i] += product(w_for, max(b, _ZERO)) + product(w_against, max(-b, _ZERO))
                elif kind == SPLIT:
                    two[i] += product(w_against, b)

    return multiply
