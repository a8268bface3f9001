"""Single layers of the table against the oracle, on every device."""

import naive
import numpy as np
import pytest
from layers import BOX, KEPT, NON_NEGATIVE, REAL, weights

from fastdtd import graph as g
from fastdtd.explainer import Explainer
from fastdtd.model import Model, Preprocessing

TESTED = "tested"


def network(example, domain, signed=False):
    """The example's layer alone, as the first one or after a convolution (and a ReLU), as its input's domain says.

    signed: its negative outputs are read as they are, and by weights of both signs.
    """
    layers, sources = [], [g.INPUT] * example.inputs
    if domain != BOX:
        for i in range(example.inputs):
            weight = np.eye(example.shape[0])[:, :, None, None] - 0.1 * (i + 1) / example.shape[0]
            layers.append(g.Conv2d(f"before{i}", (g.INPUT,), weight))
            if domain == NON_NEGATIVE:
                layers.append(g.ReLU(f"nonnegative{i}", (f"before{i}",)))
            sources[i] = layers[-1].name
    if example.second is not None:
        elements, wanted = np.prod(example.shape), np.prod(example.second)
        last = np.arange(elements - wanted, elements).reshape(example.second)  # the first are zeros
        layers.append(g.Rearrange("second", (sources[1],), last))
        sources[1] = "second"
    tested = example.make(TESTED, *sources)
    features = int(np.prod(tested.output_shape(example.shapes)))
    weight = weights(5, 3, features)
    layers += [tested]
    if isinstance(tested, g.Softmax):
        layers += [g.Multiply("product", (tested.inputs[0], TESTED))]
    if not signed:
        layers += [g.ReLU("relu", (layers[-1].name,))]
    layers.append(g.Flatten("flat", (layers[-1].name,)))
    layers.append(g.Dense("scores", ("flat",), weight if signed else np.abs(weight)))
    return g.Graph(tuple(layers), example.shape, (-1.0, 2.0))


def batch_of(example, count):
    batch = np.random.default_rng(1).uniform(-1, 2, (count, *example.shape)).astype(np.float32)
    if example.shape[1] > 1:
        batch[:, :, :1] = 0  # dead units
    return batch


def check(example, rule, domain, count=2, tolerance=1e-5, **options):
    """A layer under a rule that makes no negative relevance ("": it has none); options of Explainer."""
    graph = network(example, domain)
    rules = {TESTED: rule} if rule else {"product": "half"} if "product" in graph.shapes else "dtd"
    explainer = Explainer(Model(graph, Preprocessing(None)), rules,
                          **{"threads": 1, **options})
    batch = batch_of(example, count)
    e = explainer(batch, 1)
    assert (e.explained > 0).all()
    rules = {name: r.rule for name, r in explainer.rules.items()}
    for i in range(count):
        relevance, scores, absorbed = naive.explain(graph, batch[i], 1, rules)
        np.testing.assert_allclose(e.output[i], scores, rtol=tolerance, atol=tolerance)
        assert np.linalg.norm(e.relevance[i] - relevance) <= tolerance * np.linalg.norm(relevance) + 1e-12
        assert absorbed.keys() == e.ledger.keys()
        for name, lost in absorbed.items():
            assert e.ledger[name][i] == pytest.approx(lost, rel=10 * tolerance, abs=tolerance * scores[1])
    assert e.relevance.min() >= 0


def check_bits_alone(explainer, batch):
    """Images explained together have the bits that each has by itself."""
    together = explainer(batch, 1)
    for i in range(len(batch)):
        alone = explainer(batch[i:i + 1], 1)
        np.testing.assert_array_equal(alone.relevance[0], together.relevance[i])
        np.testing.assert_array_equal(alone.output[0], together.output[i])


def check_signed(example, rule, domain, count=2, tolerance=1e-5, **options):
    """A layer under any rule, with outputs and relevance of both signs."""
    graph = network(example, domain, signed=True)
    explainer = Explainer(Model(graph, Preprocessing(None)), {TESTED: rule, "scores": "epsilon(epsilon=0.5)"},
                          **{"threads": 1, **options})
    batch, start = batch_of(example, count), np.random.default_rng(4).random((count, 3), np.float32)
    e = explainer(batch, start=start)
    rules = {name: r.rule for name, r in explainer.rules.items()}
    for i in range(count):
        relevance, scores, absorbed = naive.explain(graph, batch[i], None, rules, start[i])
        scale = max(np.linalg.norm(relevance), np.abs(scores).max())
        np.testing.assert_allclose(e.output[i], scores, atol=tolerance * scale)
        assert np.linalg.norm(e.relevance[i] - relevance) <= tolerance * scale
        assert absorbed.keys() == e.ledger.keys()
        for name, lost in absorbed.items():
            assert abs(e.ledger[name][i] - lost) <= tolerance * scale
    assert e.relevance.any()


def rules_of_both_signs():
    """(kind, typical example, rule, domain)."""
    return [(kind, entry.typical, rule, domain) for kind, entry in KEPT.items() if entry.signed
            for rule in entry.drawn_rules(signed=True) for domain in (BOX, REAL)]
