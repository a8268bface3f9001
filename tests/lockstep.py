"""Numba's CUDA simulator, fast and strict: the threads of a block are greenlets that run in turns, from one barrier to
the next.

Numba starts a thread of Python for each thread of CUDA and polls them, which takes half a second for a block of 256.
Here a block takes as long as its arithmetic. And it finds what the other would not: shared memory holds NaN at first,
and a barrier that only some of a block's threads reach is an error, and so are copies that nobody waited for. `install`
puts it in the place of Numba's.
"""

import sys
from contextlib import contextmanager

import numpy as np
from fastdtd.kernels.cuda import vector_code
from greenlet import getcurrent, greenlet
from numba import cuda
from numba.cuda.simulator import kernel, kernelapi


class _Thread(greenlet):
    """A thread of CUDA; what the simulator finds out of the current thread of Python otherwise."""

    def __init__(self, function, arguments, block, number):
        super().__init__(lambda: function(*arguments))
        self.blockIdx, self.threadIdx, self.thread_id = kernelapi.Dim3(*block), kernelapi.Dim3(number, 0, 0), number

    def syncthreads(self):
        self.parent.switch()


def _run_block(manager, block, *arguments):
    count, *others = manager._block_dim
    assert others == [1, 1]
    for shared in _now.allocations():
        shared.fill(np.nan)
    running = [_Thread(manager._f, arguments, block, number) for number in range(count)]
    while running:
        for thread in running:
            thread.switch()
        left = [thread for thread in running if not thread.dead]
        gone = len(running) - len(left)
        assert gone in (0, len(running)), f"{gone} of {len(running)} threads left before a barrier"
        running = left[::-1]  # the last is first: what no barrier orders is run in both orders
    waiting = [copies for groups in vector_code.begun.values() for copies in groups]
    assert not any(waiting), "copies that nobody waited for"


class _Now:
    """The kernel that runs: what `cuda` means in all modules of kernels meanwhile."""

    module = None

    def allocations(self):
        return self.module._shared._allocations.values()


_now = _Now()


@contextmanager
def _as_cuda(function, fake):
    """Where Numba swaps `cuda` for a function and back, which goes wrong while its threads take turns, swap it once for
    all."""
    if _now.module is not None:
        yield
        return
    swapped = [(module, name) for module in list(sys.modules.values())
               if getattr(module, "__name__", "").startswith("fastdtd.kernels.cuda") for name,
               value in vars(module).items() if value is cuda]
    _now.module = fake
    for module, name in swapped:
        setattr(module, name, fake)
    try:
        yield
    finally:
        _now.module = None
        for module, name in swapped:
            setattr(module, name, cuda)


class _Threading:
    Lock = kernelapi.threading.Lock

    @staticmethod
    def current_thread():
        return getcurrent()


def install():
    kernel.swapped_cuda_module = _as_cuda
    kernel.BlockManager.run = _run_block
    kernelapi.threading = _Threading
