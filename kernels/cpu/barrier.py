"""Where the threads of one plan wait for each other between two steps: a counter in memory, watched without the GIL.

Python's own barrier takes 20 to 50 microseconds, as long as many a step. This one takes less than one where the others arrive soon. Where
they do not (fewer processors than threads), the caller gives the processor away between two looks.
"""

from fastdtd.kernels.cpu.jit import kernel
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_LOOKS = 2000  # about 50 microseconds


@intrinsic
def _add(typing_context, address, value):
    """Adds to the int64 at an address, in one indivisible step; returns what was there before."""
    def codegen(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", pointer, arguments[1], "seq_cst")

    return types.int64(types.intp, types.int64), codegen


@kernel
def arrive(counter):
    """counter (1,) int64 += 1; returns which arrival this is, from 1 on."""
    return _add(counter.ctypes.data, 1) + 1


@kernel
def has_come(counter, target):
    """Whether the counter reaches the target while it is watched for a while."""
    looks = 0
    while looks < _LOOKS and _add(counter.ctypes.data, 0) < target:
        looks += 1
    return looks < _LOOKS
