"""Pieces of LLVM code for the intrinsics that the kernels are made of: vectors, loops, and what is left at the end of a
row.

Numba's own vectoriser leaves half of the chip unused on products, and more on short rows. Intrinsics work on addresses
and integers: an array that is sliced or passed to a function is a counted reference in Numba, and counting takes longer
than a short loop.
"""

import os

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import cgutils, config


def _cpu_features():
    """What Numba compiles for, as LLVM writes it: by NUMBA_CPU_NAME and NUMBA_CPU_FEATURES, else this processor."""
    if config.CPU_FEATURES is not None:
        return config.CPU_FEATURES
    return "" if config.CPU_NAME == "generic" else llvm.get_host_cpu_features().flatten()


def _vectors():
    """Floats in a vector, and how many vectors there are registers for."""
    if told := os.environ.get("FASTDTD_VECTORS"):  # as in "4x32": code is made for another processor than this one
        lanes, _, registers = told.partition("x")
        return int(lanes), int(registers)
    features = _cpu_features().split(",")
    if "+avx512f" in features:
        return 16, 32
    if "+avx2" in features:
        return 8, 16
    # SSE2, NEON and whatever else LLVM maps four lanes to
    return 4, 32 if llvm.get_process_triple().startswith(("aarch64", "arm64")) else 16


LANES, REGISTERS = _vectors()
LINE = 16  # floats of a cache line

F32, I32, I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
VECTOR, INTEGERS, BITS = (ir.VectorType(kind, LANES) for kind in (F32, I32, ir.IntType(1)))
ZEROS = ir.Constant(VECTOR, [0.0] * LANES)
NO_LANE = ir.Constant(BITS, [0] * LANES)
_LANE_INDICES = ir.Constant(INTEGERS, list(range(LANES)))


# ---- Values and vectors ----------------------------------------------------------------------------------------------


def integer(value):
    return ir.Constant(I64, value)


def pointers(builder, addresses, *kinds):
    return [builder.inttoptr(address, kind.as_pointer()) for address, kind in zip(addresses, kinds, strict=True)]


def vector_at(builder, base, offset):
    kind = ir.VectorType(base.type.pointee, LANES)
    return builder.bitcast(builder.gep(base, [offset]), kind.as_pointer())


def load_vector(builder, base, offset, align=4):
    value = builder.load(vector_at(builder, base, offset))
    value.align = align
    return value


def load_second(builder, base, offset):
    """Every second of the values from `offset` on, a vector of them."""
    pair = [load_vector(builder, base, builder.add(offset, integer(j * LANES))) for j in range(2)]
    return pick(builder, *pair, list(range(0, 2 * LANES, 2)))


def store_vector(builder, value, base, offset):
    builder.store(value, vector_at(builder, base, offset)).align = 4


def splat(builder, value, kind=VECTOR):
    """A vector with `value` in each lane."""
    undefined = ir.Constant(kind, ir.Undefined)
    first = builder.insert_element(undefined, value, ir.Constant(I32, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(INTEGERS, [0] * LANES))


def progression(builder, first, step):
    """The integers (of 64 bits) first, first + step, ... as a vector of 32 bits."""
    first, step = (splat(builder, builder.trunc(value, I32), INTEGERS) for value in (first, step))
    return builder.add(first, builder.mul(_LANE_INDICES, step))


def lanes_before(builder, count):
    """Which lanes have an index less than `count`, a positive integer of 64 bits."""
    return builder.icmp_signed("<", _LANE_INDICES, splat(builder, builder.trunc(count, I32), INTEGERS))


def lanes_of(builder, number):
    """Which lanes have their bit in a number of 32 bits."""
    return builder.bitcast(builder.trunc(number, ir.IntType(LANES)), BITS)


def larger(builder, a, b):
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def magnitude(builder, vector):
    bits = builder.and_(builder.bitcast(vector, INTEGERS), ir.Constant(INTEGERS, [0x7fffffff] * LANES))
    return builder.bitcast(bits, VECTOR)


def positive(builder, vector):
    return larger(builder, vector, ZEROS)


def negative(builder, vector):
    return builder.select(builder.fcmp_ordered("<", vector, ZEROS), vector, ZEROS)


def pick(builder, a, b, order):
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(order)), order))


def transposed(builder, rows):
    """LANES vectors of LANES: blocks of 4 x 4 change places, then each is transposed."""
    rows, lanes = list(rows), range(LANES)
    distance = LANES // 2
    while distance >= 4:
        for i in (i for i in lanes if not i & distance):
            a, b = rows[i], rows[i + distance]
            rows[i] = pick(builder, a, b, [LANES + lane - distance if lane & distance else lane for lane in lanes])
            rows[i + distance] = pick(builder, a, b, [LANES + lane if lane & distance else lane + distance
                                                      for lane in lanes])
        distance //= 2
    for i in range(0, LANES, 4):
        for width in (1, 2):  # pairs of numbers, then pairs of pairs, of the low and the high half of each four
            order = [[first + half * 2 + lane % width + (LANES if lane // width % 2 else 0) + lane // (2 * width)
                      for first in range(0, LANES, 4) for lane in range(4)] for half in range(2)]
            pairs = ((0, 1), (2, 3)) if width == 1 else ((0, 2), (1, 3))
            rows[i:i + 4] = [pick(builder, rows[i + p], rows[i + q], half) for p, q in pairs for half in order]
    return rows


def keep_lanes(builder, vector, mask):
    """Zero where the integers of `mask` are 0, which are -1 elsewhere."""
    return builder.bitcast(builder.and_(builder.bitcast(vector, INTEGERS), mask), VECTOR)


def any_lane(builder, bits):
    return builder.icmp_unsigned("!=", builder.bitcast(bits, ir.IntType(LANES)), ir.Constant(ir.IntType(LANES), 0))


def combine_lanes(builder, vector, operation):
    """One value of all lanes: operation(builder, half, other half) until one is left."""
    lanes = LANES
    while lanes > 1:
        lanes //= 2
        undefined, kind = ir.Constant(vector.type, ir.Undefined), ir.VectorType(I32, lanes)
        halves = [builder.shuffle_vector(vector, undefined, ir.Constant(kind, list(range(first, first + lanes))))
                  for first in (0, lanes)]
        vector = operation(builder, *halves)
    return builder.extract_element(vector, ir.Constant(I32, 0))


def multiply_add(builder, total, a, b):
    # "contract" makes one fused multiply-add where the processor has it, and works where it has not.
    return builder.fadd(total, builder.fmul(a, b, flags=("contract",)), flags=("contract",))


def prefetch(builder, pointer, is_written=False):
    kind = ir.FunctionType(ir.VoidType(), [pointer.type, I32, I32, I32])
    function = builder.module.declare_intrinsic("llvm.prefetch", [pointer.type], kind)
    builder.call(function, [pointer, ir.Constant(I32, int(is_written)), ir.Constant(I32, 3), ir.Constant(I32, 1)])


# ---- Loops -----------------------------------------------------------------------------------------------------------


def _not_unrolled(module):
    """What LLVM's manual calls metadata of a loop: a node of its own, so its first operand is itself."""
    disable = module.add_metadata([ir.MetaDataString(module, "llvm.loop.unroll.disable")])
    loop = ir.MDValue(module, [], name=str(len(module.metadata)))
    loop.operands = (loop, disable)  # no method of llvmlite's makes such a node
    return loop


def loop_range(builder, first, last, stride, values, body, is_unrolled=True):
    """for step in range(first, last, stride): values = body(step, values). Returns the last values.

    is_unrolled: whether LLVM may do several steps at a time, and what is left over by itself, which is one more branch.
    """
    before = builder.block
    inside, after = builder.append_basic_block(), builder.append_basic_block()
    builder.cbranch(builder.icmp_signed("<", first, last), inside, after)
    builder.position_at_end(inside)
    step = builder.phi(I64)
    step.add_incoming(first, before)
    phis = []
    for value in values:
        phis.append(builder.phi(value.type))
        phis[-1].add_incoming(value, before)
    results = body(step, phis)
    end = builder.block
    next_step = builder.add(step, integer(stride))
    step.add_incoming(next_step, end)
    for phi, value in zip(phis, results, strict=True):
        phi.add_incoming(value, end)
    again = builder.cbranch(builder.icmp_signed("<", next_step, last), inside, after)
    if not is_unrolled:
        again.set_metadata("llvm.loop", _not_unrolled(builder.module))
    builder.position_at_end(after)
    merged = []
    for old, new in zip(values, results, strict=True):
        merged.append(builder.phi(old.type))
        merged[-1].add_incoming(old, before)
        merged[-1].add_incoming(new, end)
    return merged


def switch_on(builder, number, most, kind, emit):
    """emit(n) for the one n, from 1 to `most`, that the integer `number` is, and its value of type `kind`."""
    after, switch, results = builder.append_basic_block(), builder.block, []
    for n in range(1, most + 1):
        begin = builder.append_basic_block()
        builder.position_at_end(begin)
        results.append((begin, emit(n), builder.block))
        builder.branch(after)
    builder.position_at_end(switch)
    choice = builder.switch(number, results[-1][0])
    for n, (begin, _, _) in enumerate(results[:-1], 1):
        choice.add_case(integer(n), begin)
    builder.position_at_end(after)
    value = builder.phi(kind)
    for _, result, end in results:
        value.add_incoming(result, end)
    return value


def loop_over(builder, count, values, body):
    """values = body(step, values, load, store) for each vector of `count` values; returns the last values.

    load(base, offset, outside=zeros) reads a vector, with lanes of the vector `outside` after the last value;
    store(vector, base, offset) writes nothing there.
    """
    def load_whole(base, offset, outside=ZEROS):
        return load_vector(builder, base, offset)

    def store_whole(vector, base, offset):
        store_vector(builder, vector, base, offset)

    def last_step(step, values):
        mask = lanes_before(builder, builder.sub(count, step))
        return body(step, values, lambda base, offset,
                    outside=ZEROS: masked_load(builder, base, offset, mask, outside), lambda vector, base,
                    offset: masked_store(builder, vector, base, offset, mask))

    whole = builder.sub(count, builder.srem(count, integer(LANES)))
    values = loop_range(builder, integer(0), whole, LANES, values, lambda step,
                        values: body(step, values, load_whole, store_whole))
    return loop_range(builder, whole, count, LANES, values, last_step)


def masked_load(builder, base, offset, mask, outside=ZEROS):
    pointer = vector_at(builder, base, offset)
    function = _masked(builder, "load", VECTOR, [pointer.type, I32, BITS, VECTOR], VECTOR)
    return builder.call(function, [pointer, ir.Constant(I32, 4), mask, outside])


def masked_store(builder, vector, base, offset, mask):
    pointer = vector_at(builder, base, offset)
    function = _masked(builder, "store", ir.VoidType(), [vector.type, pointer.type, I32, BITS], vector.type)
    builder.call(function, [vector, pointer, ir.Constant(I32, 4), mask])


def _masked(builder, name, result, arguments, vector):
    kind = f"v{LANES}{'f32' if vector == VECTOR else 'i32'}"
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, arguments),
                                          f"llvm.masked.{name}.{kind}.p0{kind}")
