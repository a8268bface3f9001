"""Presets named after zennit and Captum compute what those compute, and derivatives what PyTorch does."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import test_presets
import torch
from captum.attr import LRP
from captum.attr._utils.lrp_rules import EpsilonRule
from conftest import TABLES, TABLES_FILE, table_in
from graphs import graphs, images
from hypothesis import HealthCheck, assume, given, settings
from torch import nn
from torch_nets import COMPOSITES, Gradient, Net, module_of, zennit_relevance

from fastdtd import Explainer, Model, Preprocessing, RuleError, from_torch, load, save
from fastdtd import graph as g


def network(seed, add=True):
    """Every kind of layer that the presets tell apart, biases of both signs, and hidden layers that can be negative."""
    rng = np.random.default_rng(seed)

    def conv(name, source, outputs, inputs, kernel, **fields):
        weight = rng.standard_normal((outputs, inputs, kernel, kernel)) / kernel / np.sqrt(inputs)
        return g.Conv2d(name, (source,), weight, 0.2 * rng.standard_normal(outputs), **fields)

    layers = [
        conv("a", g.INPUT, 8, 3, 3, padding=(1, ) * 4),
        g.ReLU("a+", ("a", )),
        g.MaxPool2d("max", ("a+", ), (2, 2), (2, 2)),
        conv("b", "max", 8, 4, 3, padding=(1, ) * 4, groups=2),
        g.ReLU("b+", ("b", )), *((g.Add("sum", ("b+", "max")), ) if add else ()),
        conv("c", "sum" if add else "b+", 12, 8, 1),
        conv("d", "c", 10, 12, 3, stride=(2, 2)),
        g.ReLU("d+", ("d", )),
        g.AveragePool2d("mean", ("d+", ), (2, 2), (1, 1)),
        g.Flatten("flat", ("mean", )),
        g.Dense("e", ("flat", ),
                rng.standard_normal((20, 20)) / 4, 0.2 * rng.standard_normal(20)),
        g.ReLU("e+", ("e", )),
        g.Dense("f", ("e+", ),
                rng.standard_normal((5, 20)) / 4, 0.2 * rng.standard_normal(5)),
    ]
    return g.Graph(tuple(layers), (3, 12, 15), (-1.0, 1.5))


RECORDED = Path(test_presets.__file__).parent / "recorded"


def with_negative_winners(graph):
    *layers, last = graph
    return g.Graph((*layers, replace(last, bias=last.bias - np.float32(8))), graph.input_shape, graph.box)


def explanation(graph, preset, count=4):
    batch = images(graph, count, seed=3)
    return batch, Explainer(Model(graph, Preprocessing(None)), preset, threads=1)(batch)


def compare(ours, theirs):
    """The largest relative difference of a picture's relevance."""
    assert np.linalg.norm(theirs) > 0.01  # the sum over pixels is about 1
    worst = max(np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(ours, theirs, strict=True))
    assert worst <= 1e-5
    return worst


def note(rows, preset, original, distances):
    rows["presets"].append([f"`{preset}`", original, f"{max(distances):.0e}"])


@pytest.mark.parametrize("preset", ["deep_taylor", "deep_taylor.bounded"])
def test_innvestigate(preset, rows):
    recorded = dict(np.load(RECORDED / "innvestigate.npz"))
    graph = test_presets.network(recorded)
    e = Explainer(Model(graph, Preprocessing(None)), f"innvestigate.{preset}")(recorded["pictures"],
                                                                               int(recorded["target"]))
    note(rows, f"innvestigate.{preset}", "iNNvestigate 2.1.2, recorded", [compare(e.relevance, recorded[preset])])


@pytest.mark.parametrize("name", COMPOSITES)
def test_zennit(name, rows):
    note(rows, f"zennit.{name}", f"zennit 0.5.1, {COMPOSITES[name].__name__}",
         [distance_to_zennit(name, seed) for seed in range(5)])


@pytest.mark.parametrize("name", COMPOSITES)
def test_zennit_on_negative_winners(name):
    for seed in range(3):
        distance_to_zennit(name, seed, is_negative=True)


def distance_to_zennit(name, seed, is_negative=False):
    graph = with_negative_winners(network(seed)) if is_negative else network(seed)
    batch, e = explanation(graph, f"zennit.{name}")
    assert ((e.explained < 0) == is_negative).all()
    theirs, _ = zennit_relevance(graph, name, batch, e.target)
    lost = np.array(list(e.ledger.values())).sum(0)
    np.testing.assert_allclose(e.relevance.sum((1, 2, 3), dtype=np.float64) + lost, e.explained, rtol=1e-5, atol=1e-5)
    return compare(e.relevance, theirs)


class LaterFirst(nn.Module):
    """Registers its convolutions in another order than it calls them."""

    def __init__(self):
        super().__init__()
        self.second, self.first = nn.Conv2d(6, 5, 3), nn.Conv2d(3, 6, 3)
        self.relu, self.flat, self.scores = nn.ReLU(), nn.Flatten(), nn.Linear(5 * 16, 4)

    def forward(self, x):
        return self.scores(self.flat(self.relu(self.second(self.relu(self.first(x))))))


def test_zennits_first_layer_is_registered_first(tmp_path):
    torch.manual_seed(0)
    module, x = LaterFirst().eval(), torch.rand(2, 3, 8, 8)
    module.scores.weight.data *= 10
    save(from_torch(module, x[:1], box=(0, 1)), tmp_path / "net.h5")
    model = load(tmp_path / "net.h5")
    for preset in ("zennit.epsilon_plus_flat", "zennit.epsilon_gamma_box"):
        with pytest.raises(RuleError, match="layer 'first' reads the input, and the module registers another"):
            Explainer(model, preset)
    e = Explainer(model, ["zennit.epsilon_plus", {"second": "flat"}])(x.numpy())
    composite = COMPOSITES["epsilon_plus_flat"]()
    with Gradient(model=module.double(), composite=composite) as attributor:
        start = torch.eye(4, dtype=torch.float64)[e.target] * module(x.double())
        _, theirs = attributor(x.double(), start.detach())
    compare(e.relevance, theirs.numpy())
    in_order = from_torch(nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 4)), x[:1])
    Explainer(in_order, "zennit.epsilon_plus_flat")


def test_captum_of_batch_norm():
    """Its epsilon rule for the norm and that for the convolution before it are one for both together."""
    torch.manual_seed(1)
    norm = nn.BatchNorm2d(6)
    norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2), nn.init.normal_(norm.bias)
    module = nn.Sequential(nn.Conv2d(3, 6, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 4)).eval()
    x = torch.rand(2, 3, 8, 8)
    e = Explainer(from_torch(module, x[:1]), "captum.lrp")(x.numpy())
    module[3].rule = EpsilonRule()
    inputs = x.double().requires_grad_()
    compare(e.relevance, LRP(module.double()).attribute(inputs, target=torch.tensor(e.target)).detach().numpy())


def test_captum(rows):
    note(rows, "captum.lrp", "Captum 0.9.0, LRP", map(distance_to_captum, range(5)))


def test_captum_on_negative_winners():
    for seed in range(3):
        distance_to_captum(seed, is_negative=True)


def distance_to_captum(seed, is_negative=False):
    graph = network(seed, add=False)
    if is_negative:
        graph = with_negative_winners(graph)
    batch, e = explanation(graph, "captum.lrp")
    assert ((e.explained < 0) == is_negative).all()
    parts = [
        nn.Flatten() if isinstance(layer, g.Flatten) else module_of(layer, graph.shapes[layer.inputs[0]])
        for layer in graph
    ]
    for part in parts:
        if isinstance(part, nn.Flatten):  # the only one here without a rule of its own
            part.rule = EpsilonRule()
    lrp = LRP(nn.Sequential(*parts).double().eval())
    x = torch.tensor(batch, dtype=torch.float64, requires_grad=True)
    return compare(e.relevance, lrp.attribute(x, target=torch.tensor(e.target)).detach().numpy())


def test_gradient(rows):
    def distance(seed):
        graph = network(seed)
        batch, e = explanation(graph, "gradient")
        x = torch.tensor(batch, dtype=torch.float64, requires_grad=True)
        theirs, = torch.autograd.grad(Net(graph).double()(x)[torch.arange(len(batch)), torch.tensor(e.target)].sum(), x)
        return compare(e.relevance, theirs.numpy())

    note(rows, "gradient", "PyTorch, autograd", map(distance, range(5)))


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(graphs(like_peers=True))
def test_derivatives(graph):
    batch = images(graph, 2, seed=1)[:1]
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


def test_the_table_is_of_these_presets():
    table = table_in(TABLES_FILE, "presets")
    assert table.startswith(TABLES["presets"])
    names = [line.split("|")[1].strip(" `") for line in table.splitlines()[2:]]
    assert names == [
        "innvestigate.deep_taylor", "innvestigate.deep_taylor.bounded", *(f"zennit.{name}" for name in COMPOSITES),
        "captum.lrp", "gradient"
    ]
