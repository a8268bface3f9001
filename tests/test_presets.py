"""Presets named after other packages compute what those packages compute: against numbers that they gave
(tests/recorded).
"""

from pathlib import Path

import numpy as np
import pytest

from fastdtd import Explainer, Model, Preprocessing, RuleError
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
