"""The innermost product: one tile of C = A^T B in vector registers, written as LLVM vector instructions.

Numba's own vectoriser leaves half of the chip unused on this loop; these instructions reach about 90 % of it (docs/kernels.md). The tile's
size follows the processor's vector width, so everything that packs operands reads TILE_ROWS and TILE_COLUMNS from here.
"""

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import config
from numba.extending import intrinsic


def _cpu_features():
    """What Numba compiles for, as LLVM writes it: the environment's word (NUMBA_CPU_NAME, NUMBA_CPU_FEATURES), else this processor."""
    if config.CPU_FEATURES is not None:
        return config.CPU_FEATURES
    return "" if config.CPU_NAME == "generic" else llvm.get_host_cpu_features().flatten()


def _tile():
    """Floats in a vector, rows of the tile, vectors across it: as many accumulators as the registers hold beside the operands."""
    features = _cpu_features().split(",")
    if "+avx512f" in features:
        return 16, 8, 3  # 24 accumulators of 32 registers
    if "+avx2" in features:
        return 8, 6, 2  # 12 of 16
    return 4, 4, 2  # 8 of 16: SSE2, NEON and whatever else LLVM maps four lanes to


_LANES, TILE_ROWS, _VECTORS = _tile()
TILE_COLUMNS = _LANES * _VECTORS
_UNROLL = 4


@intrinsic
def multiply_tile(typing_context, tile, a, b, depth, b_stride):
    """tile (TILE_ROWS, TILE_COLUMNS) = a (depth, TILE_ROWS)^T times b (depth, TILE_COLUMNS), rows of b lying b_stride floats apart.

    tile, a and b are addresses of float32, depth is 1 or more. Each number of the tile is one chain of multiply-adds in the order of depth,
    so it does not depend on where in a tile, or in which tile, a column lies.
    """
    signature = types.void(*[types.intp] * 5)

    def codegen(context, builder, signature, arguments):
        tile, a, b, depth, b_stride = arguments
        f32, i32, i64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
        vector = ir.VectorType(f32, _LANES)
        undefined = ir.Constant(vector, ir.Undefined)
        lane_zero = ir.Constant(ir.VectorType(i32, _LANES), [0] * _LANES)
        p_tile, p_a, p_b = (builder.inttoptr(address, f32.as_pointer()) for address in (tile, a, b))

        def number(value):
            return ir.Constant(i64, value)

        def vector_at(base, offset):
            return builder.bitcast(builder.gep(base, [offset]), vector.as_pointer())

        def one_step(step, accumulators):
            row_a, row_b = builder.mul(step, number(TILE_ROWS)), builder.mul(step, b_stride)
            columns = []
            for j in range(_VECTORS):
                columns.append(builder.load(vector_at(p_b, builder.add(row_b, number(j * _LANES)))))
                columns[-1].align = 4
            result = []
            for i in range(TILE_ROWS):
                scalar = builder.load(builder.gep(p_a, [builder.add(row_a, number(i))]))
                lone = builder.insert_element(undefined, scalar, ir.Constant(i32, 0))
                splat = builder.shuffle_vector(lone, undefined, lane_zero)
                # "contract" makes one fused multiply-add where the processor has it, and works where it has not.
                result += [builder.fadd(accumulators[i * _VECTORS + j], builder.fmul(splat, columns[j], flags=("contract",)),
                                        flags=("contract",)) for j in range(_VECTORS)]
            return result

        def loop(name, first, last, stride, accumulators):
            """for step in range(first, last, stride): `stride` steps of depth. Skipped where first >= last."""
            before = builder.block
            body, after = builder.append_basic_block(name), builder.append_basic_block(name + ".end")
            builder.cbranch(builder.icmp_signed("<", first, last), body, after)
            builder.position_at_end(body)
            step = builder.phi(i64)
            step.add_incoming(first, before)
            phis = []
            for value in accumulators:
                phis.append(builder.phi(vector))
                phis[-1].add_incoming(value, before)
            sums = phis
            for i in range(stride):
                sums = one_step(builder.add(step, number(i)), sums)
            following = builder.add(step, number(stride))
            step.add_incoming(following, body)
            for phi, value in zip(phis, sums, strict=True):
                phi.add_incoming(value, body)
            builder.cbranch(builder.icmp_signed("<", following, last), body, after)
            builder.position_at_end(after)
            results = []
            for old, new in zip(accumulators, sums, strict=True):
                results.append(builder.phi(vector))
                results[-1].add_incoming(old, before)
                results[-1].add_incoming(new, body)
            return results

        whole = builder.sub(depth, builder.srem(depth, number(_UNROLL)))
        sums = [ir.Constant(vector, [0.0] * _LANES)] * (TILE_ROWS * _VECTORS)
        sums = loop("unrolled", number(0), whole, _UNROLL, sums)
        sums = loop("rest", whole, depth, 1, sums)
        for i in range(TILE_ROWS):
            for j in range(_VECTORS):
                builder.store(sums[i * _VECTORS + j], vector_at(p_tile, number(i * TILE_COLUMNS + j * _LANES))).align = 4
        return context.get_dummy_value()

    return signature, codegen
