"""Presets named after zennit and Captum compute what those compute, and derivatives what PyTorch does."""

import numpy as np
import pytest
import torch
from captum.attr import LRP
from captum.attr._utils.lrp_rules import EpsilonRule
from graphs import graphs, pictures
from hypothesis import HealthCheck, assume, given, settings
from torch import nn
from torch_nets import Net, module_of, zennit_composite
from zennit.attribution import Gradient
from zennit.composites import EpsilonAlpha2Beta1, EpsilonGammaBox, EpsilonPlus, EpsilonPlusFlat, ExcitationBackprop

from fastdtd import Explainer, Model, Preprocessing
from fastdtd import graph as g

COMPOSITES = {"epsilon_plus": EpsilonPlus, "epsilon_plus_flat": EpsilonPlusFlat, "epsilon_alpha2_beta1": EpsilonAlpha2Beta1,
              "epsilon_gamma_box": EpsilonGammaBox, "excitation_backprop": ExcitationBackprop}


def network(seed, add=True):
    """Every kind of layer that the presets tell apart, biases of both signs, and hidden layers that can be negative."""
    rng = np.random.default_rng(seed)

    def conv(name, source, outputs, inputs, kernel, **fields):
        weight = rng.standard_normal((outputs, inputs, kernel, kernel)) / kernel / np.sqrt(inputs)
        return g.Conv2d(name, (source,), weight, 0.2 * rng.standard_normal(outputs), **fields)

    layers = [
        conv("a", g.INPUT, 8, 3, 3, padding=(1,) * 4), g.ReLU("a+", ("a",)), g.MaxPool2d("max", ("a+",), (2, 2), (2, 2)),
        conv("b", "max", 8, 4, 3, padding=(1,) * 4, groups=2), g.ReLU("b+", ("b",)),
        *((g.Add("sum", ("b+", "max")),) if add else ()),
        conv("c", "sum" if add else "b+", 12, 8, 1), conv("d", "c", 10, 12, 3, stride=(2, 2)), g.ReLU("d+", ("d",)),
        g.AveragePool2d("mean", ("d+",), (2, 2), (1, 1)), g.Flatten("flat", ("mean",)),
        g.Dense("e", ("flat",), rng.standard_normal((20, 20)) / 4, 0.2 * rng.standard_normal(20)), g.ReLU("e+", ("e",)),
        g.Dense("f", ("e+",), rng.standard_normal((5, 20)) / 4, 0.2 * rng.standard_normal(5)),
    ]
    return g.Graph(tuple(layers), (3, 12, 15), (-1.0, 1.5))


def explanation(graph, preset, count=4):
    batch = pictures(graph, count, seed=3)
    return batch, Explainer(Model(graph, Preprocessing(None)), preset, threads=1)(batch)


@pytest.mark.parametrize("name", COMPOSITES)
@pytest.mark.parametrize("seed", range(5))
def test_zennit(name, seed):
    graph = network(seed)
    batch, e = explanation(graph, f"zennit.{name}")
    assert (e.explained > 0).all()
    module = Net(graph).double()
    x = torch.tensor(batch, dtype=torch.float64, requires_grad=True)
    with Gradient(module, zennit_composite(COMPOSITES[name], graph)) as attribute:
        chosen = nn.functional.one_hot(torch.tensor(e.target), 5)
        _, theirs = attribute(x, lambda y: chosen * y)
    theirs = theirs.detach().numpy()
    assert np.linalg.norm(theirs) > 0.01  # the sum over pixels is about 1
    for ours, their in zip(e.relevance, theirs, strict=True):
        assert np.linalg.norm(ours - their) <= 1e-5 * np.linalg.norm(their)
    lost = np.array(list(e.ledger.values())).sum(0)
    np.testing.assert_allclose(e.relevance.sum((1, 2, 3), dtype=np.float64) + lost, e.explained, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_captum(seed):
    graph = network(seed, add=False)
    batch, e = explanation(graph, "captum.lrp")
    parts = [nn.Flatten() if isinstance(layer, g.Flatten) else module_of(layer, graph.shapes[layer.inputs[0]]) for layer in graph]
    for part in parts:
        if isinstance(part, nn.Flatten):  # the only one here without a rule of its own
            part.rule = EpsilonRule()
    lrp = LRP(nn.Sequential(*parts).double().eval())
    x = torch.tensor(batch, dtype=torch.float64, requires_grad=True)
    theirs = lrp.attribute(x, target=torch.tensor(e.target)).detach().numpy()
    for ours, their in zip(e.relevance, theirs, strict=True):
        # Relevance is signed and its sum no bound of its size: outputs near zero amplify float32's rounding.
        assert np.linalg.norm(ours - their) <= 1e-5 * np.linalg.norm(their)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(graphs(like_peers=True))
def test_derivatives(graph):
    batch = pictures(graph, 2, seed=1)[:1]
    model = Model(graph, Preprocessing(None))
    e = Explainer(model, "gradient", threads=1)(batch)
    x = torch.tensor(batch, dtype=torch.float64, requires_grad=True)
    module = Net(graph).double()
    scores = module(x)
    derivative, = torch.autograd.grad(scores[0, int(e.target[0])], x)
    theirs = derivative.numpy()
    assume(np.linalg.norm(theirs) < 1e6)
    close = {"rtol": 1e-4, "atol": 1e-5 * max(1, np.abs(theirs).max())}
    np.testing.assert_allclose(e.explained, e.output[[0], e.target])
    np.testing.assert_allclose(e.relevance, theirs, **close)
    np.testing.assert_allclose(Explainer(model, "gradient*input", threads=1)(batch).relevance, theirs * batch, **close)
    np.testing.assert_allclose(Explainer(model, "sensitivity", threads=2)(batch).relevance, theirs**2, **close | {
        "atol": 1e-5 * max(1, (theirs**2).max())})
    assert not e.absorbed.any()
