"""Memory of this device: what plans allocate, and what else depends on where arrays are.

CuPy supplies the memory, from its pool. In Numba's simulator, where there is no device, NumPy does.
"""

import threading
from contextlib import contextmanager

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
        """An array of the device as Numba's kernels take it. Nothing is waited for: streams are in order."""
        return cuda.as_cuda_array(array, sync=False)

CONVOLUTION, POOLING = "implicit", "gathered"  # how they read their input: by address
MAX_IMAGES = 64  # of a plan
MAX_PLANS = 2  # at a time, on a device: one copies while the other computes
THREADS_SHARE_A_PLAN = False
FILLS_MEMORY = True  # larger plans are faster
ALLOCATION_MAY_FAIL_AT_RUN_TIME = True  # others use the device's memory too
SURVIVES_FORK = False
MARGIN = 0  # floats after each allocation: nothing is read there
_MEMORY_FRACTION = 0.8  # of what is free: other libraries and copies need some too
_NO_MEMORY = "cudaErrorMemoryAllocation", "CUDA_ERROR_OUT_OF_MEMORY"

_of_thread = threading.local()


def empty(elements):
    """Memory for so many floats."""
    return arrays.empty(elements, np.float32)


def zeros(shape, dtype):
    return arrays.zeros(shape, dtype)


def constant(array):
    """A NumPy array, where kernels can read it."""
    return arrays.asarray(array)


def write(to, values):
    """to <- values of the host, through page-locked memory, so that the copy is asynchronous; or of a device."""
    if cupy is None or isinstance(values, cupy.ndarray):
        to[:] = values
        return
    stream, staged = cupy.cuda.get_current_stream(), _page_locked(values.size).reshape(values.shape)
    staged[:] = values
    if to.flags.c_contiguous:  # always, but where the tensor lies in a concatenation's memory
        to.set(staged, stream)
    else:
        on_device_of = cupy.empty(values.shape, np.float32)
        on_device_of.set(staged, stream)
        to[:] = on_device_of


def read(out, values):
    """out <- what kernels wrote; out is the host's, which waits for what the thread began, or a device's."""
    if cupy is None or isinstance(out, cupy.ndarray):
        out[:] = values
    elif values.dtype == np.float32:
        stream, staged = cupy.cuda.get_current_stream(), _page_locked(values.size).reshape(values.shape)
        cupy.ascontiguousarray(values).get(stream, out=staged, blocking=False)
        stream.synchronize()
        out[:] = staged
    else:
        out[:] = cupy.asnumpy(values)


def _page_locked(elements):
    """Floats of the calling thread's page-locked memory. What is there from before is overwritten: `write` is followed
    by a `read` to the host, or the end of `on_device`, which wait, before the thread writes again."""
    if getattr(_of_thread, "staged", np.empty(0)).size < elements:
        cupy.cuda.get_current_stream().synchronize()  # a copy out of the memory that is given up may be under way
        _of_thread.staged = np.frombuffer(cupy.cuda.alloc_pinned_memory(4 * elements), np.float32)
    return _of_thread.staged[:elements]


def namespace(array):
    """The library that an array is of, if this device takes its arrays; else NumPy."""
    return cupy if cupy is not None and isinstance(array, cupy.ndarray) else np


@contextmanager
def on_device_of(array):
    """While in this context, new arrays are allocated on the device of `array`. When it is left, what the caller's
    stream had begun there is done, for streams of `on_device` do not wait for it: `array` is computed, and nobody else
    uses the memory of the new ones."""
    if namespace(array) is np:
        yield
        return
    with array.device:
        yield
        cupy.cuda.get_current_stream().synchronize()


@contextmanager
def on_device(device):
    """While in this context, the calling thread works on that device, and all that it began is done when it leaves.

    It does so in a stream of its own, so that the copies of one thread go on while kernels of another compute. The one
    error for a lack of memory is MemoryError.
    """
    if cupy is None:
        yield
        return
    try:
        # CuPy's first, so that it finds, and brings back, the device that was the caller's.
        with cupy.cuda.Device(device), cuda.gpus[device]:
            streams = vars(_of_thread).setdefault("streams", {})
            if device not in streams:
                streams[device] = cupy.cuda.Stream(non_blocking=True)
            with streams[device]:
                try:
                    yield
                finally:
                    streams[device].synchronize()
    # CuPy's pool raises MemoryError; CUDA's runtime and driver, and Numba, have kinds of their own
    except Exception as error:
        if isinstance(error, MemoryError) or not any(name in str(error) for name in _NO_MEMORY):
            raise
        raise MemoryError(str(error)) from None


def memory_budget(device):
    """Bytes that plans may take on that device."""
    if cupy is None:
        return 1 << 30
    with cupy.cuda.Device(device):
        free, _ = cupy.cuda.runtime.memGetInfo()
        return int(_MEMORY_FRACTION * (free + cupy.get_default_memory_pool().free_bytes()))
