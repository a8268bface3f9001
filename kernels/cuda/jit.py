"""How CUDA kernels are compiled and launched.

What runs on the device stands under the first banner of each file: parts of kernels (`part`) and kernels (`kernel`).
What starts them stands under the second: launchers, plain Python functions with the names and parameters of
kernels/cpu.
"""

import threading

from numba import config, cuda

THREADS = 256  # of a block, unless a kernel needs another number

_of_thread = threading.local()


def on_compile():
    """Called before a kernel is compiled. `kernels.load` replaces it."""


def on_unkept(reason):
    """As on processors; kernels for GPUs are not kept on disk."""


def kernel(function, registers=None):
    """A function that the host starts on the device, with at most so many registers for each thread."""
    if registers is None or config.ENABLE_CUDASIM:
        return cuda.jit(function)
    return cuda.jit(max_registers=registers)(function)


def part(function):
    """A function that kernels call."""
    return cuda.jit(device=True)(function)


def launch(function, blocks, threads, *arguments):
    """Start so many blocks, if any, of so many threads, in the stream of the calling thread."""
    if blocks:
        if not (config.ENABLE_CUDASIM or function.overloads):
            on_compile()
        function[blocks, threads, getattr(_of_thread, "stream", 0)](*arguments)


def launch_for_each(function, count, *arguments):
    """One thread for each of `count` elements, and a few more: kernels check that cuda.grid(1) is below the count.

    MemoryError: 32 bits cannot count them.
    """
    if count >= 1 << 32:
        raise MemoryError(f"{count} numbers at a time; required: fewer than 2^32")
    launch(function, -(-count // THREADS), THREADS, *arguments)


def use_stream(stream):
    """Launches of the calling thread go to this Numba stream; 0 is the default one."""
    _of_thread.stream = stream
