"""Memory of this device: what plans allocate, and what else depends on where arrays are."""

from contextlib import nullcontext

import numpy as np
from fastdtd.kernels.cpu.conv2d import CONV2D_COLUMNS

CONVOLUTION = POOLING = "blocked"  # how they read their input: copied, block by block, into padded planes
MAX_IMAGES = 32  # of a plan
MAX_PLANS = None  # at a time, on a device: one for each thread
THREADS_SHARE_A_PLAN = True
FILLS_MEMORY = False  # plans of more images than caches hold are not faster
ALLOCATION_MAY_FAIL_AT_RUN_TIME = False
SURVIVES_FORK = True
_LINE = 64  # bytes
MARGIN = CONV2D_COLUMNS  # floats after each allocation: tiles are read beyond the last position


def empty(elements):
    """Memory for so many floats, and the margin, from the beginning of a cache line on."""
    room = np.empty(elements + MARGIN + _LINE // 4, np.float32)
    begin = -room.ctypes.data % _LINE // 4
    return room[begin:begin + elements + MARGIN]


def zeros(shape, dtype):
    return np.zeros(shape, dtype)


def constant(array):
    """A NumPy array, where kernels can read it."""
    return array


def write(to, values):
    """to <- values of the host."""
    to[:] = values


def read(out, values):
    """out <- what kernels wrote."""
    out[:] = values


def namespace(array):
    """The library that an array is of, if this device takes its arrays; else NumPy."""
    return np


def on_device_of(array):
    """While in this context, new arrays are allocated on the device of `array`."""
    return nullcontext()


def on_device(device):
    """While in this context, the calling thread works on that device, and all that it began is done when it leaves."""
    return nullcontext()


def memory_budget(device):
    """Bytes that plans may take on that device; None: whatever is fastest."""
