"""The innermost products, written as LLVM vector instructions, and the vector arithmetic that finishes their tiles.

Numba's own vectoriser leaves half of the chip unused on these loops; these instructions reach about 90 % of it (docs/kernels.md). A tile's
size follows the processor's vector width, so everything that packs operands reads the sizes from here.

Rows of the second factor b are found through a table of offsets. So b need not be a matrix in memory: the taps of a convolution read one
padded plane from different places, and the columns of a tile are neighbouring places (see conv2d.py).

Two products:

MULTIPLY_TILE    A^T B, a tile of TILE_ROWS x TILE_COLUMNS.
MULTIPLY_SPLIT   P = max(A, 0)^T B and N = min(A, 0)^T B at once, a tile of SPLIT_ROWS x SPLIT_COLUMNS each, in the time of one product:
                 every weight belongs to P or to N, never to both. Entries of A are sorted by which of the rows they are positive in, so
                 that each of the 2^SPLIT_ROWS classes is a loop which knows the accumulators that it adds to.
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


LANES, TILE_ROWS, TILE_VECTORS = _tile()
TILE_COLUMNS = LANES * TILE_VECTORS
SPLIT_ROWS, SPLIT_VECTORS = 4, 3  # 12 accumulators in use at a time
SPLIT_COLUMNS = LANES * SPLIT_VECTORS
ROW_VECTORS = TILE_ROWS * TILE_VECTORS // 3
SPLIT_ORDER = tuple(i ^ i >> 1 for i in range(2**SPLIT_ROWS))  # from class to class one row changes sides: few registers are exchanged
_UNROLL = 4
_LINE = 16  # floats of a cache line
_AHEAD = 1024  # floats of the weights to come, which are often too many for the second-level cache

_F32, _I32, _I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_VECTOR = ir.VectorType(_F32, LANES)
_UNDEFINED = ir.Constant(_VECTOR, ir.Undefined)
_LANE_ZERO = ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES)
_ZEROS = ir.Constant(_VECTOR, [0.0] * LANES)


def _number(value):
    return ir.Constant(_I64, value)


def _vector_at(builder, base, offset):
    return builder.bitcast(builder.gep(base, [offset]), _VECTOR.as_pointer())


def _load(builder, base, offset):
    value = builder.load(_vector_at(builder, base, offset))
    value.align = 4
    return value


def _store(builder, value, base, offset):
    builder.store(value, _vector_at(builder, base, offset)).align = 4


def _splat(builder, scalar):
    return builder.shuffle_vector(builder.insert_element(_UNDEFINED, scalar, ir.Constant(_I32, 0)), _UNDEFINED, _LANE_ZERO)


def _multiply_add(builder, total, a, b):
    # "contract" makes one fused multiply-add where the processor has it, and works where it has not.
    return builder.fadd(total, builder.fmul(a, b, flags=("contract",)), flags=("contract",))


def _prefetch(builder, pointer):
    kind = ir.FunctionType(ir.VoidType(), [pointer.type, _I32, _I32, _I32])
    function = builder.module.declare_intrinsic("llvm.prefetch", [pointer.type], kind)
    builder.call(function, [pointer, ir.Constant(_I32, 0), ir.Constant(_I32, 3), ir.Constant(_I32, 1)])


def _loop(builder, first, last, stride, values, body):
    """for step in range(first, last, stride): values = body(step, values). Skipped where first >= last; returns the values behind it."""
    before = builder.block
    inside, after = builder.append_basic_block(), builder.append_basic_block()
    builder.cbranch(builder.icmp_signed("<", first, last), inside, after)
    builder.position_at_end(inside)
    step = builder.phi(_I64)
    step.add_incoming(first, before)
    phis = []
    for value in values:
        phis.append(builder.phi(value.type))
        phis[-1].add_incoming(value, before)
    results = body(step, phis)
    end = builder.block
    following = builder.add(step, _number(stride))
    step.add_incoming(following, end)
    for phi, value in zip(phis, results, strict=True):
        phi.add_incoming(value, end)
    builder.cbranch(builder.icmp_signed("<", following, last), inside, after)
    builder.position_at_end(after)
    merged = []
    for old, new in zip(values, results, strict=True):
        merged.append(builder.phi(old.type))
        merged[-1].add_incoming(old, before)
        merged[-1].add_incoming(new, end)
    return merged


def _pointers(builder, addresses, *kinds):
    return [builder.inttoptr(address, kind.as_pointer()) for address, kind in zip(addresses, kinds, strict=True)]


# ---- Products --------------------------------------------------------------------------------------------------------------------------


def _make_multiply_tile(rows, vectors):
    @intrinsic
    def multiply(typing_context, tile, tile_stride, a, offsets, b, depth):
        def codegen(context, builder, signature, arguments):
            tile, tile_stride, a, offsets, b, depth = arguments
            p_tile, p_a, p_offsets, p_b = _pointers(builder, (tile, a, offsets, b), _F32, _F32, _I32, _F32)

            def one_step(step, sums):
                row_a = builder.mul(step, _number(rows))
                row_b = builder.sext(builder.load(builder.gep(p_offsets, [step])), _I64)
                columns = [_load(builder, p_b, builder.add(row_b, _number(j * LANES))) for j in range(vectors)]
                result = []
                for i in range(rows):
                    weight = _splat(builder, builder.load(builder.gep(p_a, [builder.add(row_a, _number(i))])))
                    result += [_multiply_add(builder, sums[i * vectors + j], weight, columns[j]) for j in range(vectors)]
                return result

            def several_steps(step, sums):
                for line in range(0, _UNROLL * rows, _LINE):
                    ahead = builder.add(builder.mul(step, _number(rows)), _number(line + _AHEAD))
                    _prefetch(builder, builder.gep(p_a, [ahead]))
                for i in range(_UNROLL):
                    sums = one_step(builder.add(step, _number(i)), sums)
                return sums

            whole = builder.sub(depth, builder.srem(depth, _number(_UNROLL)))
            sums = _loop(builder, _number(0), whole, _UNROLL, [_ZEROS] * (rows * vectors), several_steps)
            sums = _loop(builder, whole, depth, 1, sums, one_step)
            for i in range(rows):
                for j in range(vectors):
                    place = builder.add(builder.mul(tile_stride, _number(i)), _number(j * LANES))
                    _store(builder, sums[i * vectors + j], p_tile, place)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 6), codegen

    multiply.__doc__ = f"""tile ({rows}, {vectors * LANES}) = a (depth, {rows})^T times b.

    Rows of tile are tile_stride floats apart; row d of b starts offsets[d] (int32) floats behind b. tile, a, offsets and b are addresses.
    Each number of the tile is one chain of multiply-adds in the order of depth, so it does not depend on where in a tile, or in which
    tile, a column lies.
    """
    return multiply


def _make_multiply_split(rows, vectors):
    @intrinsic
    def multiply(typing_context, tiles, tile_stride, a, offsets, bounds, b):
        def codegen(context, builder, signature, arguments):
            tiles, tile_stride, *others = arguments
            p_tiles, p_a, p_offsets, p_bounds, p_b = _pointers(builder, (tiles, *others), _F32, _F32, _I32, _I32, _F32)
            sums = [_ZEROS] * (2 * rows * vectors)

            def bound(i):
                return builder.sext(builder.load(builder.gep(p_bounds, [_number(i)])), _I64)

            first = bound(0)
            for i, positive_rows in enumerate(SPLIT_ORDER[:2**rows]):
                in_use = [(row + (0 if positive_rows >> row & 1 else rows)) * vectors + j for row in range(rows) for j in range(vectors)]

                def one_step(step, part):
                    row_a = builder.mul(step, _number(rows))
                    _prefetch(builder, builder.gep(p_a, [builder.add(row_a, _number(_AHEAD))]))
                    row_b = builder.sext(builder.load(builder.gep(p_offsets, [step])), _I64)
                    columns = [_load(builder, p_b, builder.add(row_b, _number(j * LANES))) for j in range(vectors)]
                    result = []
                    for row in range(rows):
                        weight = _splat(builder, builder.load(builder.gep(p_a, [builder.add(row_a, _number(row))])))
                        result += [_multiply_add(builder, part[row * vectors + j], weight, columns[j]) for j in range(vectors)]
                    return result

                last = bound(i + 1)
                for place, value in zip(in_use, _loop(builder, first, last, 1, [sums[place] for place in in_use], one_step), strict=True):
                    sums[place] = value
                first = last
            for i in range(2 * rows):
                for j in range(vectors):
                    place = builder.add(builder.mul(tile_stride, _number(i)), _number(j * LANES))
                    _store(builder, sums[i * vectors + j], p_tiles, place)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 6), codegen

    multiply.__doc__ = f"""tiles (2, {rows}, {vectors * LANES}) = P and N; rows are tile_stride floats apart.

    Entries of a (depth, {rows}) are sorted by class: those from bounds[i] to bounds[i + 1] (int32) are added to P in the rows whose
    bits are set in SPLIT_ORDER[i], to N in the others. Addresses and offsets as in multiply_tile, and sums too: one chain each.
    """
    return multiply


MULTIPLY_TILE = tuple(_make_multiply_tile(TILE_ROWS, vectors) for vectors in range(1, TILE_VECTORS + 1))
MULTIPLY_SPLIT = tuple(_make_multiply_split(SPLIT_ROWS, vectors) for vectors in range(1, SPLIT_VECTORS + 1))
SIX_VECTORS = TILE_ROWS * TILE_VECTORS // 6
MULTIPLY_SIX = tuple(_make_multiply_tile(6, vectors) for vectors in (1, SIX_VECTORS))  # both features of three channels: pictures
MULTIPLY_TWO = tuple(_make_multiply_tile(2, vectors) for vectors in (2, ROW_VECTORS))  # and of one
MULTIPLY_ROW = tuple(_make_multiply_tile(1, vectors) for vectors in (2, ROW_VECTORS))  # for a matrix of one row: depthwise convolution
MULTIPLY_SPLIT_ROW = tuple(_make_multiply_split(1, vectors) for vectors in (2, ROW_VECTORS))


# ---- Finishing -------------------------------------------------------------------------------------------------------------------------


_BITS = ir.VectorType(ir.IntType(1), LANES)
_NOTHING = ir.Constant(_BITS, [0] * LANES)


def _any(builder, bits):
    return builder.icmp_unsigned("!=", builder.bitcast(bits, ir.IntType(LANES)), ir.Constant(ir.IntType(LANES), 0))


class _Finish:
    """elementwise.finish and ratio_of for vectors: (y without bias, z) -> (x, ratio)."""

    def __init__(self, builder, bias, relu, relevance, least):
        undefined = ir.Constant(_BITS, ir.Undefined)
        relu = builder.shuffle_vector(builder.insert_element(undefined, relu, ir.Constant(_I32, 0)), undefined, _LANE_ZERO)
        self.builder, self.relu, self.relevance = builder, relu, relevance
        self.bias, self.least = _splat(builder, bias), _splat(builder, least)

    def __call__(self, y, z):
        builder, integers = self.builder, ir.VectorType(_I32, LANES)
        y = builder.fadd(y, self.bias)
        y = builder.select(builder.and_(builder.fcmp_ordered("<", y, _ZEROS), self.relu), _ZEROS, y)
        magnitude = builder.and_(builder.bitcast(y, integers), ir.Constant(integers, [0x7fffffff] * LANES))
        share = builder.select(self.relevance, ir.Constant(_VECTOR, [1.0] * LANES), builder.bitcast(magnitude, _VECTOR))
        ratio = builder.select(builder.fcmp_ordered(">", z, self.least), builder.fdiv(share, z), builder.fsub(_ZEROS, share))
        return y, ratio


@intrinsic
def finish_vectors(typing_context, x, ratio, positive, negative, count, bias, split, shifted, relu, relevance, least):
    """x <- y + bias, through a ReLU if relu; ratio <- |x| / z.

    z = positive (+ y if shifted) and y = negative (+ positive if split).

    As elementwise.finish and ratio_of; `count` numbers from each address, rounded up to LANES. Returns whether a ratio is negative.
    """
    signature = types.boolean(*[types.intp] * 5, types.float32, *[types.boolean] * 4, types.float32)

    def codegen(context, builder, signature, arguments):
        p_x, p_ratio, p_positive, p_negative = _pointers(builder, arguments[:4], _F32, _F32, _F32, _F32)
        count, bias, split, shifted, relu, relevance, least = arguments[4:]
        finish = _Finish(builder, bias, relu, relevance, least)

        def one_step(step, found):
            z, y = _load(builder, p_positive, step), _load(builder, p_negative, step)
            value, ratio = finish(builder.select(split, builder.fadd(z, y), y), builder.select(shifted, builder.fadd(z, y), z))
            _store(builder, value, p_x, step)
            _store(builder, ratio, p_ratio, step)
            return [builder.or_(found[0], builder.fcmp_ordered("<", ratio, _ZEROS))]

        return _any(builder, _loop(builder, _number(0), count, LANES, [_NOTHING], one_step)[0])

    return signature, codegen


def _make_vector_loop(operation, inputs):
    @intrinsic
    def loop(typing_context, out, p, q, count):
        def codegen(context, builder, signature, arguments):
            p_out, *sources = _pointers(builder, arguments[:3], _F32, _F32, _F32)

            def one_step(step, nothing):
                _store(builder, operation(builder, *(_load(builder, source, step) for source in sources[:inputs])), p_out, step)
                return nothing

            _loop(builder, _number(0), arguments[3], LANES, [], one_step)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 4), codegen

    return loop


# out <- p, p + q, p * q: `count` numbers from each address, rounded up to LANES: what is behind them must not matter.
copy_vectors = _make_vector_loop(lambda builder, p: p, 1)
add_vectors = _make_vector_loop(ir.IRBuilder.fadd, 2)
multiply_vectors = _make_vector_loop(ir.IRBuilder.fmul, 2)


@intrinsic
def copy_every_second(typing_context, out, values, count):
    """out <- values[0], values[2], ...: `count` numbers, rounded up to LANES."""
    def codegen(context, builder, signature, arguments):
        p_out, p_values = _pointers(builder, arguments[:2], _F32, _F32)

        def one_step(step, nothing):
            source = builder.shl(step, _number(1))
            pair = [_load(builder, p_values, builder.add(source, _number(j * LANES))) for j in range(2)]
            _store(builder, _pick(builder, *pair, list(range(0, 2 * LANES, 2))), p_out, step)
            return nothing

        _loop(builder, _number(0), arguments[2], LANES, [], one_step)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 3), codegen


@intrinsic
def copy_exactly(typing_context, out, values, count, add):
    """out <- values, or added to out if `add`: `count` numbers from each address and none behind them."""
    def codegen(context, builder, signature, arguments):
        p_out, p_values = _pointers(builder, arguments[:2], _F32, _F32)
        count, add = arguments[2:]
        first = _number(0)
        for lanes in (LANES, 4, 1):
            kind = ir.VectorType(_F32, lanes) if lanes > 1 else _F32

            def at(base, step, kind=kind):
                return builder.bitcast(builder.gep(base, [step]), kind.as_pointer())

            def one_step(step, nothing, at=at):
                value, old = builder.load(at(p_values, step)), builder.load(at(p_out, step))
                value.align = old.align = 4
                builder.store(builder.select(add, builder.fadd(old, value), value), at(p_out, step)).align = 4
                return nothing

            last = builder.sub(count, builder.srem(count, _number(lanes)))
            _loop(builder, first, last, lanes, [], one_step)
            first = last
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp, types.boolean), codegen


# ---- Dense layers ------------------------------------------------------------------------------------------------------------------------

DENSE_ROWS = 4 if LANES == 16 else 2


def _total(builder, vector):
    """The sum of a vector's lanes."""
    lanes = LANES
    while lanes > 1:
        lanes //= 2
        low, high = (_pick(builder, vector, vector, list(range(first, first + lanes))) for first in (0, lanes))
        vector = builder.fadd(low, high)
    return builder.extract_element(vector, ir.Constant(_I32, 0))


def _make_dense_dots(images):
    @intrinsic
    def dots(typing_context, sums, w, w_stride, a, a_stride, count):
        def codegen(context, builder, signature, arguments):
            sums, w, w_stride, a, a_stride, count = arguments
            p_sums, p_w, p_a = _pointers(builder, (sums, w, a), _F32, _F32, _F32)

            def one_step(step, totals):
                values = [_load(builder, p_a, builder.add(builder.mul(a_stride, _number(n)), step)) for n in range(images)]
                result = []
                for k in range(DENSE_ROWS):
                    place = builder.add(builder.mul(w_stride, _number(k)), step)
                    weight = _load(builder, p_w, place)
                    _prefetch(builder, builder.gep(p_w, [builder.add(place, _number(_AHEAD))]))
                    positive = builder.select(builder.fcmp_ordered(">", weight, _ZEROS), weight, _ZEROS)
                    for n in range(images):
                        at = 2 * (k * images + n)
                        result += [_multiply_add(builder, totals[at], weight, values[n]),
                                   _multiply_add(builder, totals[at + 1], positive, values[n])]
                return result

            totals = _loop(builder, _number(0), count, LANES, [_ZEROS] * (2 * DENSE_ROWS * images), one_step)
            for i, total in enumerate(totals):
                builder.store(_total(builder, total), builder.gep(p_sums, [_number(i)]))
            return context.get_dummy_value()

        return types.void(*[types.intp] * 6), codegen

    dots.__doc__ = f"""sums (DENSE_ROWS, {images}, 2) <- w a and max(w, 0) a for rows of w and {images} rows of a, over `count` numbers.

    Addresses; rows are w_stride and a_stride floats apart; count is a multiple of LANES. Each sum has one order, whatever the others are.
    """
    return dots


DENSE_DOTS = tuple(_make_dense_dots(images) for images in (1, 2))


@intrinsic
def add_four_shares(typing_context, out, w_0, w_1, w_2, w_3, s_0, s_1, s_2, s_3, count):
    """out += s_0 max(w_0, 0) + ... + s_3 max(w_3, 0), one after the other; `count` numbers from each address, a multiple of LANES."""
    def codegen(context, builder, signature, arguments):
        p_out, *p_w = _pointers(builder, arguments[:5], *[_F32] * 5)
        shares = [_splat(builder, share) for share in arguments[5:9]]

        def one_step(step, nothing):
            total = _load(builder, p_out, step)
            for pointer, share in zip(p_w, shares, strict=True):
                weight = _load(builder, pointer, step)
                total = _multiply_add(builder, total, share, builder.select(builder.fcmp_ordered(">", weight, _ZEROS), weight, _ZEROS))
            _store(builder, total, p_out, step)
            return nothing

        _loop(builder, _number(0), arguments[9], LANES, [], one_step)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 5, *[types.float32] * 4, types.intp), codegen


# ---- Max-pools ---------------------------------------------------------------------------------------------------------------------------


@intrinsic
def max_windows(typing_context, best, winner, block, offsets, places, taps, count, first, step):
    """best <- the largest number of each window, winner (int32) <- its place: `count` windows, rounded up to LANES.

    Window i reads block[offsets[t] + i] for each tap t; that number's place is first + i * step + places[t]. offsets, places: int32. A
    number must exceed those before it by more than rounding does, or the first of them wins.
    """
    def codegen(context, builder, signature, arguments):
        best, winner, block, offsets, places, taps, count, first, step_right = arguments
        p_best, p_winner, p_block, p_offsets, p_places = _pointers(builder, (best, winner, block, offsets, places), _F32, _I32, _F32, _I32,
                                                                   _I32)
        integers = ir.VectorType(_I32, LANES)
        magnitude = ir.Constant(integers, [0x7fffffff] * LANES)

        def splat(value):
            undefined = ir.Constant(integers, ir.Undefined)
            return builder.shuffle_vector(builder.insert_element(undefined, value, ir.Constant(_I32, 0)), undefined, _LANE_ZERO)

        lanes = builder.mul(ir.Constant(integers, list(range(LANES))), splat(builder.trunc(step_right, _I32)))

        def one_vector(step, nothing):
            def one_tap(tap, so_far):
                largest, place = so_far
                offset = builder.sext(builder.load(builder.gep(p_offsets, [tap])), _I64)
                value = _load(builder, p_block, builder.add(offset, step))
                size = builder.bitcast(builder.and_(builder.bitcast(largest, integers), magnitude), _VECTOR)
                larger = builder.fcmp_ordered(">", builder.fsub(value, largest), _combine(builder, (_TIE, size)))
                here = splat(builder.load(builder.gep(p_places, [tap])))
                return [builder.select(larger, value, largest), builder.select(larger, here, place)]

            start = [ir.Constant(_VECTOR, [_LOWEST] * LANES), ir.Constant(integers, [0] * LANES)]
            largest, place = _loop(builder, _number(0), taps, 1, start, one_tap)
            base = splat(builder.trunc(builder.add(first, builder.mul(step, step_right)), _I32))
            _store(builder, largest, p_best, step)
            pointer = builder.bitcast(builder.gep(p_winner, [step]), integers.as_pointer())
            builder.store(builder.add(place, builder.add(base, lanes)), pointer).align = 4
            return nothing

        _loop(builder, _number(0), count, LANES, [], one_vector)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 9), codegen


_TIE = 2.0**-23  # the last bit: more would choose otherwise than exact arithmetic more often than it helps
_LOWEST = -3.4028234663852886e38


# ---- Winograd's transforms, for a vector of tiles ----------------------------------------------------------------------------------------


def _combine(builder, *terms):
    """The sum of factor * value over the terms (factor, value), multiplied and added in this order."""
    total = None
    for factor, value in terms:
        scaled = value if abs(factor) == 1 else builder.fmul(value, ir.Constant(_VECTOR, [float(abs(factor))] * LANES), flags=("contract",))
        if total is None:
            total = scaled if factor > 0 else builder.fsub(_ZEROS, scaled, flags=("contract",))
        else:
            total = (builder.fadd if factor > 0 else builder.fsub)(total, scaled, flags=("contract",))
    return total


def _transform_input(builder, d):
    """B^T d: six inputs of a line -> their six points."""
    p, q = _combine(builder, (1, d[4]), (-4, d[2])), _combine(builder, (1, d[3]), (-4, d[1]))
    r, s = _combine(builder, (1, d[4]), (-1, d[2])), _combine(builder, (1, d[3]), (-1, d[1]))
    return [_combine(builder, (1, d[4]), (4, d[0]), (-5, d[2])), _combine(builder, (1, p), (1, q)), _combine(builder, (1, p), (-1, q)),
            _combine(builder, (1, r), (2, s)), _combine(builder, (1, r), (-2, s)), _combine(builder, (1, d[5]), (4, d[1]), (-5, d[3]))]


def _transform_output(builder, m):
    """A^T m: six points of a line -> its four outputs."""
    p, q = _combine(builder, (1, m[1]), (1, m[2])), _combine(builder, (1, m[1]), (-1, m[2]))
    r, s = _combine(builder, (1, m[3]), (1, m[4])), _combine(builder, (1, m[3]), (-1, m[4]))
    return [_combine(builder, (1, m[0]), (1, p), (1, r)), _combine(builder, (1, q), (2, s)), _combine(builder, (1, p), (4, r)),
            _combine(builder, (1, m[5]), (1, q), (8, s))]


def _pick(builder, a, b, places):
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, len(places)), places))


@intrinsic
def winograd_input(typing_context, points, stride, lines, width):
    """points (36, LANES, `stride` floats apart) <- LANES tiles side by side in lines (6, `width`): tile t reads columns 4 t to 4 t + 5."""
    def codegen(context, builder, signature, arguments):
        p_points, p_lines = _pointers(builder, (arguments[0], arguments[2]), _F32, _F32)
        stride, width = arguments[1], arguments[3]
        # Down the columns first, on rows as they lie in memory; then across, tiles in lanes.
        columns = []
        for j in range(5):
            rows = [_load(builder, p_lines, builder.add(builder.mul(width, _number(i)), _number(j * LANES))) for i in range(6)]
            columns.append(_transform_input(builder, rows))
        half = [4 * i for i in range(LANES // 2)]
        for i in range(6):
            line = [columns[j][i] for j in range(5)]
            d = []
            for k in range(4):
                left, right = (_pick(builder, line[j], line[j + 1], [k + place for place in half]) for j in (0, 2))
                d.append(_pick(builder, left, right, list(range(LANES))))
            for k in range(2):  # columns 4 and 5 of a tile are 0 and 1 of the next
                d.append(_pick(builder, d[k], line[4], [*range(1, LANES), LANES + k]))
            for j, point in enumerate(_transform_input(builder, d)):
                _store(builder, point, p_points, builder.mul(stride, _number(6 * i + j)))
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4), codegen


def _outputs(builder, p_sums, stride):
    """The 4 x 4 outputs of LANES tiles from sums (36, LANES, `stride` floats apart): line by line, as functions to call when needed."""
    across = []
    for j in range(6):
        across.append(_transform_output(builder, [_load(builder, p_sums, builder.mul(stride, _number(6 * i + j))) for i in range(6)]))
    return [[across[j][i] for j in range(6)] for i in range(4)]


def _interleave(builder, four):
    """Four vectors, tiles in lanes -> four vectors in the order of columns."""
    low = [_pick(builder, four[k], four[k + 1], [v for i in range(LANES // 2) for v in (i, LANES + i)]) for k in (0, 2)]
    high = [_pick(builder, four[k], four[k + 1], [v for i in range(LANES // 2, LANES) for v in (i, LANES + i)]) for k in (0, 2)]
    result = []
    for left, right in (low, high):
        for begin in (0, LANES // 2):
            places = [v for i in range(begin, begin + LANES // 2, 2) for v in (i, i + 1, LANES + i, LANES + i + 1)]
            result.append(_pick(builder, left, right, places))
    return result


@intrinsic
def winograd_output(typing_context, stage, sums, stride):
    """stage (4, 4 LANES) <- the outputs of LANES tiles from sums (36, LANES, `stride` floats apart), no less than 0."""
    def codegen(context, builder, signature, arguments):
        p_stage, p_sums = _pointers(builder, arguments[:2], _F32, _F32)
        for i, line in enumerate(_outputs(builder, p_sums, arguments[2])):
            outputs = _transform_output(builder, line)
            outputs = [builder.select(builder.fcmp_ordered("<", value, _ZEROS), _ZEROS, value) for value in outputs]
            for j, vector in enumerate(_interleave(builder, outputs)):
                _store(builder, vector, p_stage, _number((4 * i + j) * LANES))
        return context.get_dummy_value()

    return types.void(*[types.intp] * 3), codegen


@intrinsic
def winograd_finish(typing_context, stage, sums, sums_of_v, stride, bias, relu, relevance, least):
    """stage (2, 4, 4 LANES) <- x and ratio of LANES tiles (see finish_vectors) from the points of y and of z, `stride` floats apart.

    A ratio that rounding may have spoilt is NaN: one that is large, of a z far below others of its tile. Returns 1 where a ratio is
    negative, plus 2 where one is NaN.
    """
    signature = types.int64(*[types.intp] * 4, types.float32, types.boolean, types.boolean, types.float32)

    def codegen(context, builder, signature, arguments):
        p_stage, p_y, p_z = _pointers(builder, arguments[:3], _F32, _F32, _F32)
        stride, bias, relu, relevance, least = arguments[3:]
        finish = _Finish(builder, bias, relu, relevance, least)
        all_z = [_transform_output(builder, line) for line in _outputs(builder, p_z, stride)]
        largest = all_z[0][0]
        for z in (z for line in all_z for z in line):
            largest = builder.select(builder.fcmp_ordered(">", z, largest), z, largest)
        small = _combine(builder, (2.0**-8, largest))
        found = doubtful = _NOTHING
        for i, (line_y, line_z) in enumerate(zip(_outputs(builder, p_y, stride), all_z, strict=True)):
            results = []
            for y, z in zip(_transform_output(builder, line_y), line_z, strict=True):
                x, ratio = finish(y, z)
                found = builder.or_(found, builder.fcmp_ordered("<", ratio, _ZEROS))
                doubt = builder.and_(builder.fcmp_ordered("<", z, small), builder.fcmp_ordered(">", x, _combine(builder, (8, z))))
                doubtful = builder.or_(doubtful, doubt)
                results.append((x, builder.select(doubt, ir.Constant(_VECTOR, [float("nan")] * LANES), ratio)))
            for part in range(2):
                for j, vector in enumerate(_interleave(builder, [result[part] for result in results])):
                    _store(builder, vector, p_stage, _number((16 * part + 4 * i + j) * LANES))
        found, doubtful = builder.zext(_any(builder, found), _I64), builder.zext(_any(builder, doubtful), _I64)
        return builder.add(found, builder.shl(doubtful, _number(1)))

    return signature, codegen
