"""Lists of launches, captured once as a graph of the device and replayed: no launch then passes through Python.

The first time that a list is walked through its kernels are compiled; the second time it is captured. Graphs belong to the plan whose
memory they name.
"""

import numpy as np
from fastdtd.kernels.cuda.jit import use_stream
from fastdtd.kernels.cuda.memory import as_device_array, constant, cupy
from numba import cuda

BROKEN = 1 << 62


def bind(function, arguments):
    """(launcher, arguments on the device)."""
    return function, [_on_device(argument) for argument in arguments]


def _on_device(argument):
    if isinstance(argument, np.ndarray):
        argument = constant(argument)
    return as_device_array(argument) if hasattr(argument, "shape") else argument


class _Launches:
    """What run_steps walks through."""

    def __init__(self, calls):
        self.calls = calls
        self.runs = {}  # steps wanted -> how often they were launched one by one, or the graph of them


def table(calls):
    """What run_steps walks through, from calls that have `code` and `slots` of `bind`, and `first` and `last` of their units."""
    return _Launches([(call.code, call.slots, call.first, call.last) for call in calls])


def run_steps(steps, wanted, progress, counter, workers):
    """Launch the calls steps[i] for each i in wanted, in the calling thread's stream; True: all are launched.

    A list on a device has one worker, for threads have nothing to share out: progress, counter and workers are those of processors.
    """
    assert workers == 1
    key = wanted.tobytes()
    run = steps.runs.get(key, 0)
    if run == 0 or cupy is None:
        _launch(steps, wanted)
        steps.runs[key] = 1
        return True
    if run == 1:
        stream = cupy.cuda.get_current_stream()
        stream.begin_capture(cupy.cuda.runtime.streamCaptureModeThreadLocal)
        try:
            _launch(steps, wanted)
        finally:
            run = stream.end_capture()
        steps.runs[key] = run
    run.launch()
    return True


def _launch(steps, wanted):
    if cupy is not None:
        use_stream(cuda.external_stream(cupy.cuda.get_current_stream().ptr))
    for step in wanted:
        launcher, arguments, first, last = steps.calls[step]
        launcher(*arguments, first, last)
