"""Where the threads of one plan wait for each other between two steps: a counter in memory, watched without the GIL.

Python's own barrier takes 20 to 50 microseconds, as long as many a step. This one takes less than one where the others arrive soon. Where
they do not (fewer processors than threads), the caller gives the processor away between two looks.

Threads that went back to Python at the same moment would meet again at the GIL, where all but one are put to sleep, for as long. So they
leave one after the other, each when the one before it has had the time to call its next kernel.
"""

from fastdtd.kernels.cpu.jit import kernel
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_LOOKS = 10_000  # some 50 microseconds or more
_APART = 700  # looks, about as long as Python needs to call a kernel


@intrinsic
def _add(typing_context, address, value):
    """Adds to the int64 at an address, in one indivisible step; returns what was there before."""
    def codegen(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", pointer, arguments[1], "seq_cst")

    return types.int64(types.intp, types.int64), codegen


@kernel
def meet(counter, workers, arrival):
    """Arrive at counter (1,) int64, or go on waiting as the arrival of that number (from 1 on; 0: a new one), until as many arrivals of
    this round as there are workers have come. Returns 0 then, or after a while the arrival's number.
    """
    p_counter = counter.ctypes.data
    if arrival == 0:
        arrival = _add(p_counter, 1) + 1
    target = -(-arrival // workers) * workers
    looks = 0
    while looks < _LOOKS and _add(p_counter, 0) < target:
        looks += 1
    if looks == _LOOKS:
        return arrival
    for _ in range((target - arrival) * _APART):
        looks += _add(p_counter, 0) < target
    return 0
