"""Memory of this device: what plans allocate, and what else differs by where numbers lie.

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
        """An array of the device as Numba's kernels take it. Nothing is waited for: what came before in the same stream is done before."""
        return cuda.as_cuda_array(array, sync=False)

COPIES_BLOCKS = False  # convolutions and pools gather what they read by address
MOST_IMAGES = 64  # at a time
PLANS_AT_ONCE = 2  # on a device: one copies while the other computes
MARGIN = 0  # floats behind each allocation: nothing is read there
_SHARE_OF_MEMORY = 0.8  # of what is free: other libraries, and what is copied, want some too
_NO_MEMORY = "cudaErrorMemoryAllocation", "CUDA_ERROR_OUT_OF_MEMORY"

_of_thread = threading.local()


def empty(elements):
    """Room for so many floats."""
    return arrays.empty(elements, np.float32)


def zeros(shape, dtype):
    return arrays.zeros(shape, dtype)


def constant(array):
    """A NumPy array, where kernels can read it."""
    return arrays.asarray(array)


def write(to, numbers):
    """to <- numbers of the host, through page-locked memory, so that the copy is asynchronous; or of a device."""
    if cupy is None or isinstance(numbers, cupy.ndarray):
        to[:] = numbers
        return
    stream, staged = cupy.cuda.get_current_stream(), _page_locked(numbers.size).reshape(numbers.shape)
    staged[:] = numbers
    if to.flags.c_contiguous:  # always, but where the tensor lies in a concatenation's memory
        to.set(staged, stream)
    else:
        beside = cupy.empty(numbers.shape, np.float32)
        beside.set(staged, stream)
        to[:] = beside


def read(out, numbers):
    """out <- what kernels wrote; out is the host's or a device's. Waits for what the calling thread began if it is the host's."""
    if cupy is None or isinstance(out, cupy.ndarray):
        out[:] = numbers
    elif numbers.dtype == np.float32:
        stream, staged = cupy.cuda.get_current_stream(), _page_locked(numbers.size).reshape(numbers.shape)
        cupy.ascontiguousarray(numbers).get(stream, out=staged, blocking=False)
        stream.synchronize()
        out[:] = staged
    else:
        out[:] = cupy.asnumpy(numbers)


def _page_locked(elements):
    """Floats of the calling thread's page-locked memory. What is there from before is overwritten: `write` is followed by a `read` to the
    host, or the end of `on_device`, which wait, before the thread writes again."""
    if getattr(_of_thread, "staged", np.empty(0)).size < elements:
        cupy.cuda.get_current_stream().synchronize()  # a copy out of the memory that is given up may be under way
        _of_thread.staged = np.frombuffer(cupy.cuda.alloc_pinned_memory(4 * elements), np.float32)
    return _of_thread.staged[:elements]


def namespace(array):
    """The library that an array is of, if this device takes its arrays; else NumPy."""
    return cupy if cupy is not None and isinstance(array, cupy.ndarray) else np


@contextmanager
def beside(array):
    """While in this context, new arrays lie where `array` does. When it is left, what the caller's stream had begun there is done, for
    streams of `on_device` do not wait for it: `array` is computed, and nobody else uses the memory of the new ones."""
    if namespace(array) is np:
        yield
        return
    with array.device:
        yield
        cupy.cuda.get_current_stream().synchronize()


@contextmanager
def on_device(number):
    """While in this context, the calling thread works on the device of that number, and all that it began is done when it leaves.

    It does so in a stream of its own, so that the copies of one thread go on while kernels of another compute. The one error for a lack
    of memory is MemoryError.
    """
    if cupy is None:
        yield
        return
    try:
        # CuPy's first, so that it finds, and brings back, the device that was the caller's.
        with cupy.cuda.Device(number), cuda.gpus[number]:
            streams = vars(_of_thread).setdefault("streams", {})
            if number not in streams:
                streams[number] = cupy.cuda.Stream(non_blocking=True)
            with streams[number]:
                try:
                    yield
                finally:
                    streams[number].synchronize()
    except Exception as error:  # CuPy's pool raises MemoryError; CUDA's runtime and driver, and Numba, have kinds of their own
        if isinstance(error, MemoryError) or not any(name in str(error) for name in _NO_MEMORY):
            raise
        raise MemoryError(str(error)) from None


def room(number):
    """Bytes that plans may take on the device of that number."""
    if cupy is None:
        return 1 << 30
    with cupy.cuda.Device(number):
        free, _ = cupy.cuda.runtime.memGetInfo()
        return int(_SHARE_OF_MEMORY * (free + cupy.get_default_memory_pool().free_bytes()))


def may_hold(flags):
    """Whether one of some flags that kernels set may be set. To look would be to wait for the device, so: yes."""
    return True
