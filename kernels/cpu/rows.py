"""Arithmetic on rows of values, from address to address.

"..._vectors" do whole vectors: they write (and read) up to LANES - 1 values after the last, and what is there must not
matter. The others touch nothing after the last.
"""

from fastdtd.kernels.cpu.vector_code import (
    F32,
    I32,
    I64,
    LANES,
    LINE,
    NO_LANE,
    ZEROS,
    any_lane,
    integer,
    larger,
    load_second,
    load_vector,
    loop_over,
    loop_range,
    negative,
    pick,
    pointers,
    positive,
    prefetch,
    splat,
    store_vector,
)
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

# ---- Whole vectors ---------------------------------------------------------------------------------------------------


def _make_vector_loop(operation, inputs):
    @intrinsic
    def loop(typing_context, out, p, q, count):
        def codegen(context, builder, signature, arguments):
            p_out, *sources = pointers(builder, arguments[:3], F32, F32, F32)

            def one_step(step, nothing):
                store_vector(builder,
                             operation(builder, *(load_vector(builder, source, step) for source in sources[:inputs])),
                             p_out, step)
                return nothing

            loop_range(builder, integer(0), arguments[3], LANES, [], one_step)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 4), codegen

    return loop


# out <- p, p * q, the larger of p and q: `count` values from each address.
copy_vectors = _make_vector_loop(lambda builder, p: p, 1)
multiply_vectors, larger_vectors = _make_vector_loop(ir.IRBuilder.fmul, 2), _make_vector_loop(larger, 2)


@intrinsic
def copy_second_vectors(typing_context, out, values, count):
    """out <- values[0], values[2], ...: `count` values."""
    def codegen(context, builder, signature, arguments):
        p_out, p_values = pointers(builder, arguments[:2], F32, F32)

        def one_step(step, nothing):
            store_vector(builder, load_second(builder, p_values, builder.shl(step, integer(1))), p_out, step)
            return nothing

        loop_range(builder, integer(0), arguments[2], LANES, [], one_step)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 3), codegen


@intrinsic
def split_vectors(typing_context, even, odd, values, count):
    """even <- values[0], values[2], ..., odd <- values[1], values[3], ...: `count` values of each."""
    def codegen(context, builder, signature, arguments):
        p_even, p_odd, p_values = pointers(builder, arguments[:3], F32, F32, F32)

        def one_step(step, nothing):
            source = builder.shl(step, integer(1))
            pair = [load_vector(builder, p_values, builder.add(source, integer(j * LANES))) for j in range(2)]
            for first, to in enumerate((p_even, p_odd)):
                store_vector(builder, pick(builder, *pair, list(range(first, 2 * LANES, 2))), to, step)
            return nothing

        loop_range(builder, integer(0), arguments[3], LANES, [], one_step)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4), codegen


@intrinsic
def interleave_vectors(typing_context, out, even, odd, count):
    """out[0], out[2], ... <- even, out[1], out[3], ... <- odd: `count` values of each."""
    def codegen(context, builder, signature, arguments):
        p_out, p_even, p_odd = pointers(builder, arguments[:3], F32, F32, F32)

        def one_step(step, nothing):
            pair = load_vector(builder, p_even, step), load_vector(builder, p_odd, step)
            for half in range(2):
                indices = [index for i in range(half * LANES // 2, (half + 1) * LANES // 2) for index in (i, LANES + i)]
                at = builder.add(builder.shl(step, integer(1)), integer(half * LANES))
                store_vector(builder, pick(builder, *pair, indices), p_out, at)
            return nothing

        loop_range(builder, integer(0), arguments[3], LANES, [], one_step)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4), codegen


@intrinsic
def fill_vectors(typing_context, out, count, value):
    """out <- value: `count` values."""
    def codegen(context, builder, signature, arguments):
        (p_out,), vector = pointers(builder, arguments[:1], F32), splat(builder, arguments[2])

        def one_step(step, nothing):
            store_vector(builder, vector, p_out, step)
            return nothing

        loop_range(builder, integer(0), arguments[1], LANES, [], one_step)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.float32), codegen


@intrinsic
def keep_sign_vectors(typing_context, row, count, plus):
    """row <- max(row, 0) if `plus`, else min(row, 0): `count` values."""
    def codegen(context, builder, signature, arguments):
        p_row, = pointers(builder, arguments[:1], F32)

        def one_step(step, nothing):
            value = load_vector(builder, p_row, step)
            store_vector(builder, builder.select(arguments[2], positive(builder, value), negative(builder, value)),
                         p_row, step)
            return nothing

        loop_range(builder, integer(0), arguments[1], LANES, [], one_step)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.boolean), codegen


# ---- What will be read or written ------------------------------------------------------------------------------------


def _make_fetch(is_written):
    @intrinsic
    def fetch(typing_context, values, count):
        def codegen(context, builder, signature, arguments):
            p_values, = pointers(builder, arguments[:1], F32)

            def one_line(step, nothing):
                prefetch(builder, builder.gep(p_values, [step]), is_written)
                return nothing

            # a run that does not begin a line ends in one more
            loop_range(builder, integer(0), builder.add(arguments[1], integer(LINE - 1)), LINE, [], one_line)
            return context.get_dummy_value()

        return types.void(types.intp, types.intp), codegen

    return fetch


# Ask for the lines of `count` values of a row that lies where no processor foresees it: far from the row before.
fetch_to_read, fetch_to_write = _make_fetch(False), _make_fetch(True)

# ---- Exactly so many values ------------------------------------------------------------------------------------------


@intrinsic
def copy_exactly(typing_context, out, values, count, add):
    """out <- values, or added to out if `add`: `count` values."""
    def codegen(context, builder, signature, arguments):
        p_out, p_values = pointers(builder, arguments[:2], F32, F32)

        def one_vector(step, nothing, load, store):
            value = load(p_values, step)
            store(builder.select(arguments[3], builder.fadd(load(p_out, step), value), value), p_out, step)
            return nothing

        loop_over(builder, arguments[2], [], one_vector)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp, types.boolean), codegen


@intrinsic
def any_negative(typing_context, values, count):
    """Whether one of `count` values is."""
    def codegen(context, builder, signature, arguments):
        (p_values,) = pointers(builder, arguments[:1], F32)

        def one_vector(step, found, load, store):
            return [builder.or_(found[0], builder.fcmp_ordered("<", load(p_values, step), ZEROS))]

        return any_lane(builder, loop_over(builder, arguments[1], [NO_LANE], one_vector)[0])

    return types.boolean(types.intp, types.intp), codegen


@intrinsic
def count_nonzero(typing_context, p, q, count):
    """How many of `count` products p * q are not zero."""
    def codegen(context, builder, signature, arguments):
        p_p, p_q = pointers(builder, arguments[:2], F32, F32)

        def one_vector(step, found, load, store):
            product = builder.fmul(load(p_p, step), load(p_q, step))
            mask = builder.bitcast(builder.fcmp_unordered("!=", product, ZEROS), ir.IntType(LANES))
            return [builder.add(found[0], builder.ctpop(builder.zext(mask, I64)))]

        return loop_over(builder, arguments[2], [integer(0)], one_vector)[0]

    return types.intp(*[types.intp] * 3), codegen


@intrinsic
def fill_exactly(typing_context, out, value, count, add):
    """out <- value, or added to out if `add`: `count` values."""
    def codegen(context, builder, signature, arguments):
        (p_out,), value, add = pointers(builder, arguments[:1], F32), splat(builder, arguments[1]), arguments[3]

        def one_vector(step, nothing, load, store):
            store(builder.select(add, builder.fadd(load(p_out, step), value), value), p_out, step)
            return nothing

        loop_over(builder, arguments[2], [], one_vector)
        return context.get_dummy_value()

    return types.void(types.intp, types.float32, types.intp, types.boolean), codegen


@intrinsic
def copy_strided(typing_context, out, values, stride, count):
    """out <- values[0], values[stride], ...: `count` values."""
    def codegen(context, builder, signature, arguments):
        p_out, p_values = pointers(builder, arguments[:2], F32, F32)

        def one_step(step, nothing):
            builder.store(builder.load(builder.gep(p_values, [builder.mul(step, arguments[2])])),
                          builder.gep(p_out, [step]))
            return nothing

        loop_range(builder, integer(0), arguments[3], 1, [], one_step)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4), codegen


@intrinsic
def spread(typing_context, out, values, stride, count):
    """out[i * stride] <- values[i]: `count` values."""
    def codegen(context, builder, signature, arguments):
        p_out, p_values = pointers(builder, arguments[:2], F32, F32)

        def one_value(i, nothing):
            builder.store(builder.load(builder.gep(p_values, [i])), builder.gep(p_out, [builder.mul(i, arguments[2])]))
            return nothing

        loop_range(builder, integer(0), arguments[3], 1, [], one_value)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4), codegen


@intrinsic
def add_at(typing_context, out, indices, values, count):
    """out[indices[i]] += values[i], indices int32, `count` of them."""
    def codegen(context, builder, signature, arguments):
        p_out, p_indices, p_values = pointers(builder, arguments[:3], F32, I32, F32)

        def one_value(i, nothing):
            pointer = builder.gep(p_out, [builder.sext(builder.load(builder.gep(p_indices, [i])), I64)])
            builder.store(builder.fadd(builder.load(pointer), builder.load(builder.gep(p_values, [i]))), pointer)
            return nothing

        loop_range(builder, integer(0), arguments[3], 1, [], one_value)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4), codegen
