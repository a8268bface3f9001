"""Memory of this device: what plans allocate, and what else differs by where numbers lie."""

from contextlib import nullcontext

import numpy as np
from fastdtd.kernels.cpu.conv2d import CONV2D_COLUMNS

COPIES_BLOCKS = True  # convolutions and pools copy blocks of what they read
MOST_IMAGES = 32  # at a time
PLANS_AT_ONCE = None  # on a device: as many as threads
MARGIN = CONV2D_COLUMNS  # floats behind each allocation: tiles are read beyond the last place


def empty(elements):
    """Room for so many floats, and the margin."""
    return np.empty(elements + MARGIN, np.float32)


def zeros(shape, dtype):
    return np.zeros(shape, dtype)


def constant(array):
    """A NumPy array, where kernels can read it."""
    return array


def write(to, numbers):
    """to <- numbers of the host."""
    to[:] = numbers


def read(out, numbers):
    """out <- what kernels wrote."""
    out[:] = numbers


def namespace(array):
    """The library that an array is of, if this device takes its arrays; else NumPy."""
    return np


def beside(array):
    """While in this context, new arrays lie where `array` does."""
    return nullcontext()


def on_device(number):
    """While in this context, the calling thread works on the device of that number, and all that it began is done when it leaves."""
    return nullcontext()


def room(number):
    """Bytes that plans may take on the device of that number; None: whatever is fastest."""


def may_hold(flags):
    """Whether one of some flags that kernels set may be set."""
    return flags.any()
