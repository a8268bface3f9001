"""Arrays of borrowed memory: made of an address and a shape, or of another array.

A slice or a reshape is a counted reference in Numba. Counting takes longer than a short loop, and calls a run-time
library that an embedded program does not have.
"""

from fastdtd.kernels.cpu.vector_code import F32, I32, I64
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic


def borrowed(context, builder, kind, pointer, shape):
    """A C-contiguous array of memory that somebody else owns, as Numba's functions take it."""
    item = context.get_abi_sizeof(context.get_data_type(kind.dtype))
    strides, below = [], ir.Constant(I64, item)
    for size in reversed(shape):
        strides.insert(0, below)
        below = builder.mul(below, size)
    array = context.make_array(kind)(context, builder)
    array.meminfo = cgutils.get_null_value(array.meminfo.type)
    array.parent = cgutils.get_null_value(array.parent.type)
    array.data = pointer
    array.itemsize = ir.Constant(I64, item)
    array.nitems = builder.sdiv(below, array.itemsize)
    array.shape, array.strides = (cgutils.pack_array(builder, values, I64) for values in (shape, strides))
    return array._getvalue()


@intrinsic
def flat(typing_context, array):
    """All elements of a C-contiguous array, as array.reshape(array.size) gives them."""
    kind = types.Array(array.dtype, 1, "C", readonly=not array.mutable)

    def codegen(context, builder, signature, arguments):
        source = context.make_array(array)(context, builder, arguments[0])
        return borrowed(context, builder, kind, source.data, [source.nitems])

    return kind(array), codegen


@intrinsic
def as_int32(typing_context, array):
    """The memory of an array (N,) of float32 as integers."""
    kind = types.Array(types.int32, 1, "C", readonly=not array.mutable)

    def codegen(context, builder, signature, arguments):
        source = context.make_array(array)(context, builder, arguments[0])
        return borrowed(context, builder, kind, builder.bitcast(source.data, I32.as_pointer()), [source.nitems])

    return kind(array), codegen


@intrinsic
def as_float64(typing_context, array):
    """The memory of an array (2 N,) of float32 as N numbers."""
    kind = types.Array(types.float64, 1, "C", readonly=not array.mutable)

    def codegen(context, builder, signature, arguments):
        source = context.make_array(array)(context, builder, arguments[0])
        pointer = builder.bitcast(source.data, ir.DoubleType().as_pointer())
        return borrowed(context, builder, kind, pointer, [builder.sdiv(source.nitems, ir.Constant(I64, 2))])

    return kind(array), codegen


def _make_reader(result, given, kind):
    @intrinsic
    def read(typing_context, value):
        def codegen(context, builder, signature, arguments):
            return builder.bitcast(arguments[0], kind)

        return result(given), codegen

    return read


# The same bits as a number of another type.
float32_of = _make_reader(types.float32, types.int32, F32)
bits32_of = _make_reader(types.int32, types.float32, I32)
float_of = _make_reader(types.float64, types.int64, ir.DoubleType())
bits_of = _make_reader(types.int64, types.float64, I64)


def _make_array_at(dtype):
    kind = types.Array(dtype, 1, "C")

    @intrinsic
    def array_at(typing_context, address, count):
        def codegen(context, builder, signature, arguments):
            pointer = builder.inttoptr(arguments[0], context.get_value_type(dtype).as_pointer())
            return borrowed(context, builder, kind, pointer, [arguments[1]])

        return kind(types.intp, types.intp), codegen

    return array_at


# (address, count): an array of so many elements from there on.
int8_at, uint8_at, int32_at, int64_at, float32_at, float64_at = map(_make_array_at, (
    types.int8, types.uint8, types.int32, types.int64, types.float32, types.float64))
