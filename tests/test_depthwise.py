"""Depthwise convolutions: which take kernels of their own, and that these write their units, all of them, and nothing
else. What they compute is held to the oracle by test_kernels.py."""

import naive
import numpy as np
import pytest
from fastdtd.kernels import cpu
from layers import BOX, CONVOLUTIONS, NON_NEGATIVE, REAL, weights
from single_layers import TESTED, batch_of, check_bits_alone, network

from fastdtd import graph as g
from fastdtd.explainer import Explainer
from fastdtd.lowering import lower
from fastdtd.model import Model, Preprocessing
from fastdtd.plan import Plan
from fastdtd.rules import assign

EXAMPLES = [name for name in CONVOLUTIONS if name.startswith("depthwise") and "multiplier" not in name]
OWN = ["depthwise2d_forward", "depthwise2d_redistribute"]


def explained(graph, rules, images):
    """A plan that has run, and the numbers of its steps in the tested layer that compute sums."""
    plan = Plan(lower(graph, assign(graph, rules), cpu).schedule(images), cpu)
    rng = np.random.default_rng(1)
    plan.input[:] = rng.uniform(-1, 2, plan.input.shape)
    plan.forward()
    plan.start[:] = rng.random(plan.start.shape)
    plan.backward()
    steps = [i for i, step in enumerate(plan.schedule.steps) if step.layer == TESTED and "2d" in step.name]
    return plan, steps


@pytest.mark.parametrize("domain", [NON_NEGATIVE, REAL])
@pytest.mark.parametrize("name", EXAMPLES)
def test_kernels_are_chosen(name, domain):
    plan, steps = explained(network(CONVOLUTIONS[name], domain), {TESTED: "z+"}, 1)
    assert [plan.schedule.steps[i].name for i in steps] == OWN


@pytest.mark.parametrize(("name", "rule", "domain", "names"), [
    ("depthwise", "zB", BOX, ["conv2d_forward", "conv2d_redistribute"]),
    ("depthwise", "z+", BOX, OWN),  # an input of both signs
    ("depthwise", "w2", NON_NEGATIVE, ["conv2d_forward", OWN[1]]),
    ("depthwise", "epsilon", NON_NEGATIVE, OWN),
    ("depthwise with a multiplier", "z+", NON_NEGATIVE, ["conv2d_forward", "conv2d_redistribute"]),
    ("groups", "z+", NON_NEGATIVE, ["conv2d_forward", "conv2d_redistribute"]),
])
def test_choice_follows_from_layer_and_rule(name, rule, domain, names):
    plan, steps = explained(network(CONVOLUTIONS[name], domain), {TESTED: rule}, 1)
    assert [plan.schedule.steps[i].name for i in steps] == names


@pytest.mark.parametrize(("rule", "domain"), [("z+", NON_NEGATIVE), ("epsilon", NON_NEGATIVE), ("z+", REAL)])
@pytest.mark.parametrize("name", EXAMPLES)
def test_units_write_their_plane_alone(name, rule, domain):
    """Each done by itself: the same bits as all in one call, and nothing before or after the plane."""
    plan, steps = explained(network(CONVOLUTIONS[name], domain), {TESTED: rule}, 2)
    for i in steps:
        step, arguments = plan.schedule.steps[i], list(plan.arguments(i))
        outputs = 2 if step.name.endswith("forward") else 1
        shapes = [argument.shape for argument in arguments[:outputs]]

        def run(first, last, step=step, arguments=arguments, shapes=shapes):
            made = [np.full(2 * cpu.MARGIN + np.prod(shape), np.nan, np.float32) for shape in shapes]
            inner = [one[cpu.MARGIN:-cpu.MARGIN].reshape(shape) for one, shape in zip(made, shapes, strict=True)]
            with np.errstate(invalid="ignore"):
                step.kernel(*inner, *arguments[len(shapes):], first, last)
            return made

        together = run(0, step.units)
        for unit in range(step.units):
            for whole, own, shape in zip(together, run(unit, unit + 1), shapes, strict=True):
                plane = shape[2] * shape[3]
                begin = cpu.MARGIN + unit * plane
                np.testing.assert_array_equal(own[begin:begin + plane], whole[begin:begin + plane])
                assert np.isnan(own[:begin]).all()
                assert np.isnan(own[begin + plane:]).all()
        assert not any(np.isnan(one[cpu.MARGIN:-cpu.MARGIN]).any() for one in together)


@pytest.mark.parametrize("domain", [NON_NEGATIVE, REAL])
@pytest.mark.parametrize("name", ["depthwise", "depthwise, a step and a few positions", "depthwise, several blocks"])
def test_the_same_bits_in_any_batch(name, domain):
    example = CONVOLUTIONS[name]
    explainer = Explainer(Model(network(example, domain), Preprocessing(None)), threads=1)
    check_bits_alone(explainer, batch_of(example, 5))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("rule", ["z+", "epsilon(epsilon=0.5)"])
def test_what_several_layers_give_back_is_added(rule, stride):
    """Both read one tensor, and concatenation has them write to channels of one."""
    def depthwise(name, seed):
        return g.Conv2d(name, ("r",), weights(seed, 4, 1, 3, 3), None, (stride, stride), (1, 1, 1, 1), groups=4)

    layers = (g.Conv2d("before", (g.INPUT,), np.eye(4)[:, :, None, None] - 0.1), g.ReLU("r", ("before",)),
              depthwise("one", 0), depthwise("two", 1), g.ReLU("r1", ("one",)), g.ReLU("r2", ("two",)),
              g.Concat("both", ("r1", "r2")), g.Flatten("flat", ("both",)),
              g.Dense("scores", ("flat",), np.abs(weights(2, 3, 8 * (-(-9 // stride)) * (-(-11 // stride))))))
    graph = g.Graph(layers, (4, 9, 11), (-1.0, 2.0))
    explainer = Explainer(Model(graph, Preprocessing(None)), {"one": rule, "two": rule}, threads=1)
    image = np.random.default_rng(0).uniform(-1, 2, (1, 4, 9, 11)).astype(np.float32)
    found = explainer(image, 1)
    relevance, scores, _ = naive.explain(graph, image[0], 1, {name: r.rule for name, r in explainer.rules.items()})
    np.testing.assert_allclose(found.output[0], scores, rtol=1e-5)
    assert np.linalg.norm(found.relevance[0] - relevance) <= 1e-5 * np.linalg.norm(relevance)


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (9, 16)])
@pytest.mark.parametrize("stride", [1, 2])
def test_all_zeros(size, stride):
    """Every output is active by its bias alone, so all relevance is absorbed; where none is active, none."""
    for bias, dead in ((1.0, 1), (-1.0, 0)):
        layer = g.Conv2d(TESTED, ("r",), weights(0, 2, 1, 3, 3), np.full(2, bias), (stride, stride), (1, 1, 1, 1),
                         groups=2)
        graph = g.Graph((g.ReLU("r", (g.INPUT,)), layer, g.ReLU("s", (TESTED,)), g.Flatten("flat", ("s",))), (2, *size),
                        (-1.0, 2.0))
        plan, (forward, _) = explained(graph, {TESTED: "z+"}, 2)
        plan.input[:] = 0
        plan.forward()
        assert plan.schedule.steps[forward].name == OWN[0]
        np.testing.assert_array_equal(plan.arguments(forward)[2], dead)
        np.testing.assert_array_equal(plan.output, max(bias, 0))
        np.testing.assert_array_equal(plan.arguments(forward)[1], min(-bias, 0) if dead else 0)
