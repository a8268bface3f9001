"""Memory of this device: what plans allocate, and what else differs by where numbers lie.

CuPy supplies the memory, from its pool. In Numba's simulator, where there is no device, NumPy does.
"""

import numpy as np
from numba import config, cuda

if config.ENABLE_CUDASIM:
    from numba.cuda.simulator.cudadrv.devicearray import FakeCUDAArray as as_device_array

    cupy = None
    arrays = np
else:
    import cupy

    arrays = cupy

    def as_device_array(array):
        """An array of the device as Numba's kernels take it. Nothing is waited for: what came before in the same stream is done before."""
        return cuda.as_cuda_array(array, sync=False)

COPIES_BLOCKS = False  # convolutions and pools gather what they read by address
MARGIN = 0  # floats behind each allocation: nothing is read there


def empty(elements):
    """Room for so many floats."""
    return arrays.empty(elements, np.float32)


def zeros(shape, dtype):
    return arrays.zeros(shape, dtype)


def constant(array):
    """A NumPy array, where kernels can read it."""
    return arrays.asarray(array)


def to_host(array):
    """What kernels wrote, as a NumPy array; a copy or not. Waits for the stream of the calling thread."""
    return array if cupy is None else cupy.asnumpy(array)


def may_hold(flags):
    """Whether one of some flags that kernels set may be set. To look would be to wait for the device, so: yes."""
    return True
