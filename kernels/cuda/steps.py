"""Lists of launches, captured once as a graph of the device and replayed: no launch then passes through Python.

The first time that a list is walked through its kernels are compiled and loaded, which must not happen while it is
captured; the second time it is captured. Graphs belong to the plan whose memory they name.
"""

import threading
import warnings

import numpy as np
from fastdtd.kernels.cuda.jit import use_stream
from fastdtd.kernels.cuda.memory import arrays, as_device_array, constant, cupy
from numba import config, cuda

BROKEN, NO_STEP = 1 << 62, -1  # for several workers, which there are none of here

# Two threads that need the same kernel at once would make two of it, and find the other's, which is not loaded, in the
# next walk.
_walking = threading.Lock()


def bind(function, arguments):
    """(launcher, arguments on the device)."""
    return function, [_on_device(argument) for argument in arguments]


def _on_device(argument):
    if isinstance(argument, np.ndarray):
        argument = constant(argument)
    return as_device_array(argument) if isinstance(argument, arrays.ndarray) else argument


class _Launches:
    """What run_steps walks through."""

    def __init__(self, calls):
        self.calls = calls
        self.walked = set()  # lists of steps whose kernels are loaded
        self.graphs = {}  # steps wanted -> the graph of their launches; None where they cannot be captured


def table(calls):
    """What run_steps walks through, from calls that have `code`, `slots` (of `bind`), `first` and `last`."""
    return _Launches([(call.code, call.slots, call.first, call.last) for call in calls])


def run_steps(steps, wanted, progress, counter, workers):
    """Launch the calls steps[i] for each i in wanted, in the calling thread's stream; True: all are launched.

    A list on a device has one worker, for a GPU's threads are its own: progress, counter and workers are those of
    processors.
    """
    assert workers == 1
    key = wanted.tobytes()
    if cupy is not None and key in steps.walked and key not in steps.graphs:
        steps.graphs[key] = _capture(steps, wanted)
    graph = steps.graphs.get(key)
    if graph is None:
        _launch(steps, wanted)
        steps.walked.add(key)
    else:
        graph.launch()
    return True


def _capture(steps, wanted):
    """The graph of these launches, or None."""
    stream = cupy.cuda.get_current_stream()
    try:
        # other threads may allocate and compile meanwhile
        stream.begin_capture(cupy.cuda.runtime.streamCaptureModeThreadLocal)
        try:
            _launch(steps, wanted)
        finally:
            graph = stream.end_capture()
    except Exception as error:  # of CUDA, CuPy or Numba; what is wrong with the calls themselves, launching them tells
        warnings.warn(f"kernels are launched one by one, which is slower, for they cannot be captured: {error}",
                      RuntimeWarning, stacklevel=2)
        return None
    return graph


def _launch(steps, wanted):
    with _walking:
        if cupy is not None:
            use_stream(cuda.external_stream(cupy.cuda.get_current_stream().ptr))
        # Numba warns of each launch of few blocks. These are what the layer has.
        told, config.CUDA_LOW_OCCUPANCY_WARNINGS = config.CUDA_LOW_OCCUPANCY_WARNINGS, 0
        try:
            for step in wanted:
                launcher, arguments, first, last = steps.calls[step]
                launcher(*arguments, first, last)
        finally:
            config.CUDA_LOW_OCCUPANCY_WARNINGS = told
