"""Kernels are compiled when they are first used and kept on disk.

What users are told of that, and how it is done ahead.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import numpy as np

from fastdtd import graph as g
from fastdtd import kernels
from fastdtd.errors import OutputError
from fastdtd.lowering import lower
from fastdtd.plan import Plan
from fastdtd.protocols import AnyDevice
from fastdtd.rules import assign
from fastdtd.threads import Threads

_LOG = logging.getLogger("fastdtd")  # warnings are shown on standard error unless the application says otherwise
_unkept: list[str] = []  # why kernels could not be kept, in this process
_ADVICE = "set NUMBA_CACHE_DIR to a folder that can be written and has free space"


def load_kernels(device: str) -> AnyDevice:
    """The kernels of `device`, which tell of their compilation, once in a process, through the logger "fastdtd"."""
    module: AnyDevice = kernels.load(device, _say_compiling if device == "cpu" else _say_compiling_for_gpus,
                                     _say_unkept)
    return module


@functools.cache
def _say_compiling() -> None:
    _LOG.warning("fastdtd: compiling kernels for this processor, once; this can take half a minute")


@functools.cache
def _say_compiling_for_gpus() -> None:
    _LOG.warning("fastdtd: compiling kernels for the GPU, which each process does; this can take half a minute")


def _say_unkept(reason: str) -> None:
    if not _unkept:
        _LOG.warning("fastdtd: compiled kernels cannot be kept, so each process will compile them (%s); %s", reason,
                     _ADVICE)
    _unkept.append(reason)


def warm_up(device: str = "cpu") -> str:
    """Compile all kernels that any network can need, and keep them on disk.

    Returns
    -------
    str
        The folder in which they are. NUMBA_CACHE_DIR in the environment says where else.

    Raises
    ------
    OutputError
        No folder takes them.
    """
    module = kernels.load(device, _say_compiling, _unkept.append)
    graph = _network()
    rules = assign(graph, {"proportional": "proportional", "normed again": "taylor", "gated": "half",
                           "scores": "epsilon"})
    network = lower(graph, rules, module)
    plan = Plan(network.schedule(batch=1, workers=2), module)
    Plan(network.schedule(batch=1, observed=(graph.output,)), module)  # binding its calls compiles what else it needs
    threads = Threads(1)
    plan.input[:] = 0.5
    plan.forward(threads.submit)
    plan.start[:] = 1
    plan.backward(threads.submit)
    images, one = np.full((1, *graph.input_shape), 0.5, np.float32), np.ones(1, np.float32)
    module.surely_within(np.zeros(3, np.float32), np.ones(3, np.float32), images)
    module.sum_relevance(np.zeros(1), images, np.ones((1, 10), np.float32), np.zeros((1, 1)), one, 0.1)
    if _unkept:
        raise OutputError(f"compiled kernels cannot be kept ({_unkept[0]}); {_ADVICE}")
    return str(module.run_steps.stats.cache_path)


def _network() -> g.Graph:
    """A network that needs every kernel, with layers of many shapes, for the plan picks kernels by shape.

    tests/test_compiling.py sees to it that none is forgotten.
    """

    def conv(name: str, source: str, outputs: int, inputs: int, kernel: int = 3,
             **options: Any) -> tuple[g.Conv2d, g.ReLU]:
        weight = np.full((outputs, inputs, kernel, kernel), 0.01, np.float32)
        bias = np.zeros(outputs, np.float32)
        weight[0], bias[0] = -weight[0], 100  # active though no input contributes to it: something to absorb
        padding = (kernel // 2,) * 4
        return g.Conv2d(name, (source,), weight, bias, padding=padding, **options), g.ReLU(f"{name}/relu", (name,))

    layers = (
        *conv("first", g.INPUT, 64, 3, 7, stride=(2, 2)),
        g.MaxPool2d("winner", ("first/relu",), (3, 3), (2, 2)),
        *conv("plain", "winner", 64, 64),
        *conv("depthwise", "plain/relu", 64, 1, groups=64),
        *conv("grouped", "depthwise/relu", 64, 16, groups=4),
        *conv("pointwise", "grouped/relu", 64, 64, 1),
        *conv("wide", "pointwise/relu", 64, 64, 5, dilation=(2, 2), stride=(2, 1)),
        g.Add("sum", ("pointwise/relu", "winner")),
        g.Concat("twice", ("sum", "sum")),  # only one of the two can lie in its memory
        g.ReLU("positive", ("twice",)),
        g.MaxPool2d("proportional", ("positive",), (2, 2), (2, 2)),
        g.AveragePool2d("average", ("sum",), (2, 2), (2, 2)),  # gives back before "positive" does, to a part of "twice"
        g.LocalResponseNorm("normed", ("wide/relu",), 5),
        g.LocalResponseNorm("normed again", ("normed",), 5),
        g.GroupNorm("group normed", ("normed again",), np.ones(64, np.float32), np.zeros(64, np.float32), 4),
        g.Power("power", ("group normed",), 2),
        g.Rearrange("turned", ("power",), np.arange(64 * 16 * 16 // 8, dtype=np.int32).reshape(8, 16, 16)),
        g.GlobalAveragePool("pooled", ("turned",)),
        g.Activation("gate", ("pooled",), "sigmoid"),
        g.Softmax("softmax", ("gate",)),
        g.Multiply("gated", ("turned", "softmax")),
        g.Resize("resized", ("gated",), *[np.kron(np.eye(8), [[0.5, 0.5]])] * 2),
        g.GlobalAveragePool("mean", ("resized",)),
        g.Flatten("flat", ("proportional",)),
        g.Flatten("flat average", ("average",)),
        g.Concat("joined", ("mean", "flat", "flat average")),
    )
    shape = (3, 64, 64)
    shapes = g.Graph(layers, shape).shapes
    head = g.Dense("scores", ("joined",), np.full((10, shapes["joined"][0]), 0.01))
    return g.Graph((*layers, head), shape, (np.zeros(3, np.float32), np.ones(3, np.float32)))
