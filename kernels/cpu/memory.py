"""Memory of this device: what plans allocate, and what else differs by where numbers lie."""

import numpy as np
from fastdtd.kernels.cpu.conv2d import CONV2D_COLUMNS

COPIES_BLOCKS = True  # convolutions and pools copy blocks of what they read
MARGIN = CONV2D_COLUMNS  # floats behind each allocation: tiles are read beyond the last place


def empty(elements):
    """Room for so many floats, and the margin."""
    return np.empty(elements + MARGIN, np.float32)


def zeros(shape, dtype):
    return np.zeros(shape, dtype)


def constant(array):
    """A NumPy array, where kernels can read it."""
    return array


def to_host(array):
    """What kernels wrote, as a NumPy array; a copy or not."""
    return np.asarray(array)


def may_hold(flags):
    """Whether one of some flags that kernels set may be set."""
    return flags.any()
