"""Presets named after other packages compute what those packages compute: against numbers that they gave
(tests/recorded).
"""

from pathlib import Path

import numpy as np
import pytest

from fastdtd import Explainer, Model, Preprocessing, RuleError, load, save
from fastdtd import graph as g
from fastdtd.rules import DERIVATIVES, PRESETS, assign

RECORDED = Path(__file__).parent / "recorded"


@pytest.fixture(scope="module")
def recorded():
    return dict(np.load(RECORDED / "innvestigate.npz"))


def network(r):
    """That of recorded/record_innvestigate.py."""
    def layer(name, source, **fields):
        return g.Conv2d(name, (source,), r[name], r[f"{name} bias"], **fields), g.ReLU(f"{name}+", (name,))

    layers = (*layer("a", g.INPUT, stride=(2, 2)), *layer("b", "a+", padding=(0, 1, 1, 1)),
              g.Concat("ab", ("a+", "b+")), g.MaxPool2d("max", ("ab", ), (2, 2)),
              g.AveragePool2d("average", ("max", ), (3, 2)), *layer("c", "average"), g.Flatten("flat", ("c+", )),
              g.Dense("d", ("flat", ), r["d"],
                      r["d bias"]), g.ReLU("d+", ("d", )), g.Dense("e", ("d+", ), r["e"], r["e bias"]))
    return g.Graph(layers, r["pictures"].shape[1:], (r["low"], r["high"]))


@pytest.mark.parametrize("preset", ["deep_taylor", "deep_taylor.bounded"])
def test_innvestigate(recorded, preset):
    explainer = Explainer(Model(network(recorded), Preprocessing(None)), f"innvestigate.{preset}")
    e = explainer(recorded["pictures"], int(recorded["target"]))
    np.testing.assert_allclose(e.output, recorded["scores"], atol=1e-5)
    assert len(e.output) > 1
    for ours, theirs in zip(e.relevance, recorded[preset], strict=True):
        assert np.linalg.norm(ours - theirs) <= 1e-5 * np.linalg.norm(theirs)


def test_each_preset_differs_from_the_others(recorded):
    chosen = [{name: str(rule.rule) for name, rule in assign(network(recorded), preset).rules.items()}
              for preset in PRESETS
              if preset not in DERIVATIVES[1:]]  # these differ in what is done with the derivative
    assert all(a != b for i, a in enumerate(chosen) for b in chosen[:i])


def test_an_addition_is_refused_for_it_would_double_relevance():
    graph = g.Graph((g.Add("sum", (g.INPUT, g.INPUT)), g.Flatten("scores", ("sum",))), (2, 1, 1), (0, 1))
    with pytest.raises(RuleError, match=r"'sum'.*doubles"):
        assign(graph, "innvestigate.deep_taylor")


@pytest.mark.parametrize("place", ["after", "before", "alone"])
@pytest.mark.parametrize("preset", ["innvestigate.deep_taylor", "innvestigate.deep_taylor.bounded"])
def test_batch_norm_is_refused_for_innvestigate_has_a_rule_for_it(place, preset, tmp_path):
    """Wherever it goes, and from a model file; other presets are as they were."""
    norm = {"scale": [2, 1], "shift": [0, 1]}
    conv = {"after": (g.Conv2d("conv", (g.INPUT,), np.ones((2, 2, 1, 1))), g.BatchNorm("norm", ("conv",), **norm)),
            "before": (g.BatchNorm("norm", (g.INPUT,), **norm), g.Conv2d("conv", ("norm",), np.ones((2, 2, 1, 1)))),
            "alone": (g.BatchNorm("conv", (g.INPUT,), **norm),)}[place]
    layers = (*conv, g.ReLU("relu", (conv[-1].name,)), g.GlobalAveragePool("scores", ("relu",)))
    model = Model(g.Graph(layers, (2, 3, 3), (0, 1)), Preprocessing(None))
    save(model, tmp_path / "net.h5")
    for one in (model, load(tmp_path / "net.h5")):
        with pytest.raises(RuleError, match=r"'conv' is one that a batch norm.*not computed here; .*rules='dtd'"):
            Explainer(one, preset)
        for other in ("dtd", "zennit.epsilon_plus", "captum.lrp"):
            Explainer(one, other)


def branches(names=("a", "b"), **fields):
    """Convolutions that read the input, all of them."""
    convolutions = [g.Conv2d(name, (g.INPUT,), np.ones((1, 2, 1, 1)), **fields) for name in names]
    layers = (*convolutions, g.Concat("both", names), g.GlobalAveragePool("mean", ("both",)),
              g.Dense("scores", ("mean",), np.ones((3, len(names)))))
    return g.Graph(layers, (2, 3, 3), (0, 1))


@pytest.mark.parametrize(("preset", "rule"), [("zennit.epsilon_plus_flat", "flat"), ("zennit.epsilon_gamma_box", "zB")])
def test_zennits_first_layer_is_one(preset, rule):
    for graph, found in ((branches(), "and so does 'b'"),
                         (branches(("a",), registered_later=True), "and the module registers another layer before it")):
        with pytest.raises(RuleError, match=f"layer 'a' reads the input, {found}, while zennit has the rule '{rule}'"):
            assign(graph, preset)
        assert assign(graph, [preset, {"a": rule}]).rules["a"].rule.name == rule
        assign(graph, "zennit.epsilon_plus")
    assert assign(branches(("a",)), preset).rules["a"].rule.name == rule
