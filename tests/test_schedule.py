"""Schedules as data: what they know without allocating, and what may not be in them."""

from types import SimpleNamespace

import numpy as np
import pytest
from fastdtd.kernels import cpu
from graphs import graphs_and_rules
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastdtd import graph as g
from fastdtd.lowering import lower
from fastdtd.lowering.aliasing import fused_activations, locations
from fastdtd.lowering.builder import Builder
from fastdtd.plan import Plan
from fastdtd.rules import assign
from fastdtd.schedule import Scratch, State, View

quick = settings(max_examples=30, deadline=None,
                 suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


class Counting(SimpleNamespace):
    """The processor's kernels, which count the bytes that they allocate."""

    def __init__(self):
        super().__init__(**vars(cpu), nbytes=0)
        self.empty, self.zeros = self._counted(cpu.empty), self._counted(cpu.zeros)

    def _counted(self, allocate):
        def allocated(*arguments):
            array = allocate(*arguments)
            self.nbytes += array.nbytes
            return array

        return allocated


@quick
@given(graphs_and_rules(signed=True), st.integers(1, 5), st.integers(1, 3), st.booleans())
def test_size_is_known_without_allocating(case, batch, workers, observes):
    graph, rules = case
    kernels = Counting()
    network = lower(graph, assign(graph, rules), kernels)
    kernels.nbytes = 0  # of weights
    schedule = network.schedule(batch, workers, [g.INPUT, graph.output] if observes else ())
    assert kernels.nbytes == 0
    Plan(schedule, kernels)
    assert kernels.nbytes == schedule.nbytes


@quick
@given(graphs_and_rules())
def test_a_schedule_is_data(case):
    """Arguments are views of buffers, scratch, states, numbers, and constants; each buffer is alive for its steps."""
    graph, rules = case
    schedule = lower(graph, assign(graph, rules), cpu).schedule(2, 2)
    names = {layer.name for layer in graph}
    for number, step in enumerate(schedule.steps):
        assert step.layer in names
        assert step.units > 0
        assert (step.condition is None) == (step.name != "absorb_dead_redistribute")
        for argument in step.arguments:
            match argument:
                case View():
                    buffer = schedule.buffers[argument.buffer]
                    assert buffer.first <= number <= buffer.last
                case Scratch(name):
                    assert schedule.scratch[name] >= 0
                case State(name):
                    assert name in schedule.states
                case np.ndarray():
                    assert not argument.flags.writeable
                case _:
                    assert isinstance(argument, (int, float))
    for buffer in schedule.read_by_backward():
        assert buffer.first < schedule.forward_steps < buffer.last
    assert [step.name.endswith("_forward") for step in schedule.steps[:schedule.forward_steps]] == (
        [True] * schedule.forward_steps)


def builder():
    graph = g.Graph((g.ReLU("scores", (g.INPUT,)),), (3, 1, 1))
    return Builder(graph, assign(graph), cpu, {}, locations(graph), fused_activations(graph), 1, 1)


@pytest.mark.parametrize(("arguments", "optional", "message"), [
    ({"width": 3}, {}, r"copy_forward does not take \['width'\]"),
    ({}, {"stride_h": 3}, r"copy_forward does not take \['stride_h'\]"),  # optional, but on no device
    ({"count": None}, {}, r"is not given \['count'\]"),
])
def test_a_step_with_a_name_that_the_kernel_does_not_know(arguments, optional, message):
    view = View(0, (3, 1, 1))
    right = {"x": view, "a": view, "x_begin": 0, "a_begin": 0, "count": 1, "accumulate": False}
    given_ = {name: value for name, value in {**right, **arguments}.items() if value is not None}
    with pytest.raises(TypeError, match=message):
        builder().step(cpu.copy_forward, 1, optional=optional, **given_)


def test_what_another_device_takes_is_no_mistake():
    """A processor's kernel of a pool by its winner takes no kernel size, which a GPU's does."""
    b = builder()
    view = View(b.saved(b.graph.layers[0]).view.buffer, (3, 1, 1))
    b.step(cpu.max_pool2d_redistribute, 1, c_in=view, c=view, winner=view, c_in_channel=0, c_channel=0,
           accumulate=False, optional={"kernel_h": 2, "kernel_w": 2})
    assert len(b) == 1
