"""Networks that several files of tests explain, and how."""

import contextlib
import threading
import time
import warnings

import numpy as np
from hypothesis import HealthCheck, note, settings

from fastdtd import graph as g
from fastdtd.explainer import Explainer
from fastdtd.inputs import ExplanationWarning
from fastdtd.model import Model, Preprocessing

many = settings(max_examples=150, deadline=None,
                suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


def plans_of(made):
    """Of the first device."""
    return made._executor.devices[0][1]


def bound(plans, batch, workers):
    return plans.bind(plans.schedule(batch, workers))


@contextlib.contextmanager
def taken(plans, batch, workers):
    """A plan as a call has it."""
    call = threading.Lock()
    with call:
        loan = plans.take(plans.schedule(batch, workers), call)
        yield loan.plan
        plans.give_back(loan)


def explainer(graph, rules="dtd", threads=1, memory=None):
    return Explainer(Model(graph, Preprocessing(None)), rules, threads=threads, memory=memory)


def explain(made, batch, target=None):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExplanationWarning)
        return made(batch, target)


def assert_first_of_equals_wins(make):
    """Also where rounding alone made them unequal; make: graph -> explainer."""
    graph = g.Graph((g.MaxPool2d("pool", (g.INPUT,), (2, 2), (2, 2)), g.Flatten("flat", ("pool",)),
                     g.Dense("scores", ("flat",), np.ones((1, 2)))), (1, 2, 4), (0.0, 1.0))
    almost = np.nextafter(np.float32(0.7), np.float32(1))
    for last, wins in ((almost, 0), (np.float32(0.7 * (1 + 2**-20)), 1)):
        e = make(graph)(np.float32([[[0.1, 0.7, 0.2, 0.3], [0.7, last, 0.3, 0.3]]]))
        expected = [[False, not wins, False, True], [False, wins, False, False]]
        np.testing.assert_array_equal(e.relevance[0, 0] > 0, expected)


def describe(graph):
    for layer in graph:
        fields = {k: v for k, v in vars(layer).items() if k not in ("name", "inputs", "weight", "bias")}
        note(f"{layer.name} {type(layer).__name__} {layer.inputs} -> {graph.shapes[layer.name]} {fields}")


def eventually(condition):
    """Whether it comes true, in a thread that may take its time."""
    deadline = time.monotonic() + 30
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.001)
    return condition()


def nothing_is_taken(made):
    return eventually(lambda: plans_of(made).used_bytes == plans_of(made).used_workers == 0)


def one_image(graph, threads=1):
    """What a plan for one image takes."""
    return plans_of(explainer(graph, threads=threads)).nbytes(1, threads)


def small(box=(-1.0, 1.0), bias=None):
    rng = np.random.default_rng(0)
    return g.Graph((
        g.Conv2d("conv", ("input",), rng.standard_normal((4, 2, 3, 3)), bias), g.ReLU("relu", ("conv",)),
        g.GlobalAveragePool("pool", ("relu",)),
        g.Dense("scores", ("pool",), [[1, 1, 1, 1], [-1, -1, -1, -1], [1, 0, 0, 0]]),
    ), (2, 6, 5), box)


def two_layers(box):
    """A convolution in groups with everything off its default, at the input, and a dense layer after it."""
    rng = np.random.default_rng(1)
    weight, bias = rng.standard_normal((6, 2, 3, 2)), rng.standard_normal(6)
    return g.Graph((
        g.Conv2d("conv", (g.INPUT,), weight, bias, (2, 1), (1, 0, 2, 1), (1, 2), 2), g.ReLU("relu", ("conv",)),
        g.Flatten("flat", ("relu",)),
        g.Dense("hidden", ("flat",), rng.standard_normal((7, 6 * 4 * 4)), rng.standard_normal(7)),
        g.ReLU("r", ("hidden",)), g.Dense("scores", ("r",), rng.random((2, 7))),
    ), (4, 7, 5), box)


def to_the_middle(a, w, low, high):
    return (a - (low + high) / 2) * np.sign(w) + 0.25 * w * w
