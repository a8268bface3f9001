"""Agreement with zennit, its biases left out, on random networks of every layer that both have."""

import warnings

import numpy as np
from graphs import graphs_and_rules, images
from hypothesis import HealthCheck, assume, given, note, settings
from layers import PLAIN
from networks import averaged
from torch_nets import zennit_relevance

from fastdtd import Explainer, ExplanationWarning, Model, Preprocessing, load
from fastdtd import graph as g
from fastdtd.rules import assign


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(graphs_and_rules(like_peers=True))
def test_random_networks(case):
    graph, rules = case
    for layer in graph:
        note(f"{layer.name} {type(layer).__name__} {layer.inputs} -> {graph.shapes[layer.name]}")
    # zennit gives negative outputs' relevance to positive contributions.
    chosen = {name: PLAIN if rule.name == "z+" else str(rule.rule) for name, rule in assign(graph, rules).rules.items()
              if isinstance(next(layer for layer in graph if layer.name == name), (g.Conv2d, g.Dense))}
    explainer = Explainer(Model(graph, Preprocessing(None)), {**rules, **chosen}, threads=1)
    batch = images(graph, 1, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExplanationWarning)
        e = explainer(batch)
    assume(e.explained[0] > 0)
    theirs, scores = zennit_relevance(graph, {name: rule.name for name, rule in explainer.rules.items()}, batch,
                                      e.target)
    np.testing.assert_allclose(e.output, scores, atol=1e-5 * max(1, np.abs(scores).max()))
    # As shares of the score: that may be what rounding left of large terms, and was compared. Where everything is
    # absorbed the norm is 0: then 1e-4 of the score is the measure.
    shares = theirs / scores[0, e.target[0]]
    assert np.linalg.norm(e.relevance / e.explained[0] - shares) <= 1e-4 * max(np.linalg.norm(shares), 1e-3)


def errors_on(model, photographs):
    explainer = Explainer(model)
    batch = np.stack([model.preprocess(path) for path in photographs])
    e = explainer(batch)
    theirs, _ = zennit_relevance(model.graph, {name: rule.name for name, rule in explainer.rules.items()}, batch,
                                 e.target)
    errors = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(e.relevance, theirs, strict=True)]
    print("relative L2 against zennit in float64:", " ".join(f"{error:.1e}" for error in errors))
    return errors


def test_squeezenet_with_average_pools_on_photographs(photographs):
    model = load("squeezenet1_1")
    assert max(errors_on(Model(averaged(model.graph), model.preprocessing), photographs)) < 1e-5


def test_squeezenet_on_photographs(photographs):
    """Evenly coloured areas give windows of equal numbers, where rounding decides which of them wins: there the two may
    differ.
    """
    errors = errors_on(load("squeezenet1_1"), photographs)
    assert np.median(errors) < 1e-5
    assert max(errors) < 1e-2
