"""Whole explanations: against the oracle, and what must hold for every network (conservation, no negative relevance,
the same bits).
"""

import math
import pickle
import warnings
from dataclasses import replace

import naive
import numpy as np
import pytest
from explaining import (
    assert_first_of_equals_wins,
    describe,
    explain,
    explainer,
    many,
    nothing_is_taken,
    small,
    to_the_middle,
    two_layers,
)
from graphs import graphs, graphs_and_rules, images
from hypothesis import given, note, settings
from hypothesis import strategies as st

import fastdtd
from fastdtd import graph as g
from fastdtd.errors import FastDTDError, InputError, RuleError
from fastdtd.explainer import Explainer
from fastdtd.inputs import ExplanationWarning
from fastdtd.lowering import pooling
from fastdtd.model import Model, Preprocessing
from fastdtd.rules import search_direction


@many
@given(graphs_and_rules(), st.integers(1, 4))
def test_agrees_with_the_oracle(case, count):
    graph, rules = case
    describe(graph)
    made, batch = explainer(graph, rules), images(graph, count)
    e = explain(made, batch)
    names = {name: rule.rule for name, rule in made.rules.items()}
    for i, image in enumerate(batch):
        if naive.has_ties(graph, image):
            continue
        relevance, scores, absorbed = naive.explain(graph, image, e.target[i], names)
        scale = max(1.0, np.abs(scores).max())
        np.testing.assert_allclose(e.output[i], scores, atol=2e-5 * scale)
        # A neuron whose z is 1e-7 of its terms' size may count as none in one precision: compare with the score's
        # scale.
        assert np.linalg.norm(e.relevance[i] - relevance) <= 2e-5 * max(np.linalg.norm(relevance), scale)
        for name, lost in absorbed.items():
            assert abs(e.ledger[name][i] - lost) <= 2e-5 * scale


@many
@given(graphs_and_rules(signed=True), st.integers(1, 4), st.integers(1, 2))
def test_signed_rules_agree_with_the_oracle_and_conserve(case, count, threads):
    graph, rules = case
    describe(graph)
    note(rules)
    made, batch = explainer(graph, rules, threads), images(graph, count)
    e = explain(made, batch)
    for i, image in enumerate(batch):
        if naive.has_ties(graph, image):
            continue
        relevance, scores, absorbed = naive.explain(graph, image, e.target[i],
                                                    {name: rule.rule for name, rule in made.rules.items()})
        scale = max(1.0, np.abs(scores).max())
        assert np.linalg.norm(e.relevance[i] - relevance) <= 1e-4 * max(np.linalg.norm(relevance), scale)
        for name, lost in absorbed.items():
            assert abs(e.ledger[name][i] - lost) <= 1e-4 * max(np.linalg.norm(relevance), scale)
        kept = np.sum([abs(lost[i]) for lost in e.ledger.values()]) + np.abs(e.relevance[i]).sum(dtype=np.float64)
        assert abs(e.relevance[i].sum(dtype=np.float64) + e.absorbed[i]
                   - e.explained[i]) <= 1e-5 * max(kept, e.explained[i])


@settings(many, max_examples=80)
@given(st.booleans().flatmap(lambda signed: graphs_and_rules(signed=signed)), st.integers(0, 2**32))
def test_any_start_agrees_with_the_oracle(case, seed):
    graph, rules = case
    describe(graph)
    made, batch = explainer(graph, rules, threads=2), images(graph, 3)
    scores = explain(made, batch).output
    start = np.random.default_rng(seed).random(scores.shape, np.float32) * (np.abs(scores) > 1e-3)
    if naive.explains_negative(graph, {name: rule.rule for name, rule in made.rules.items()}, graph.output):
        start -= np.float32(0.5) * (start != 0)
    e = made(batch, start=start)
    np.testing.assert_allclose(e.explained, start.sum(1), atol=1e-6)
    assert (e.target == np.abs(start).argmax(1)).all()
    names = {name: rule.rule for name, rule in made.rules.items()}
    for i, image in enumerate(batch):
        if naive.has_ties(graph, image):
            continue
        relevance, _, absorbed = naive.explain(graph, image, 0, names, start[i])
        scale = max(np.linalg.norm(relevance), *map(abs, absorbed.values()), 1.0)
        assert np.linalg.norm(e.relevance[i] - relevance) <= 1e-4 * scale
        for name, lost in absorbed.items():
            assert abs(e.ledger[name][i] - lost) <= 1e-4 * scale


@settings(many, max_examples=100)
@given(st.booleans().flatmap(lambda signed: graphs_and_rules(signed=signed)), st.integers(0, 5))
def test_what_targets_are_held_against_agrees_with_the_oracle(case, which):
    """One pass from a start of both signs, whatever the rules; the oracle's difference of two."""
    graph, rules = case
    describe(graph)
    made, batch = explainer(graph, rules, threads=2), images(graph, 3)
    outputs = graph.shapes[graph.output][0]
    if outputs == 1:
        with pytest.raises(InputError, match="one output"):
            made(batch, against=0)
        return
    against = ["others", "softmax-gradient", "runner-up", 0, [outputs - 1, 0], list(range(outputs))][which]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExplanationWarning)
        e = made(batch, against=against)
    names = {name: rule.rule for name, rule in made.rules.items()}
    for i, image in enumerate(batch):
        if naive.has_ties(graph, image):
            continue
        held = np.argsort(-e.output[i], kind="stable")[1:2].tolist() if against == "runner-up" else against
        held = [held] if held == 0 else held
        # shares of a score of nearly zero, and what a softmax gives it over it, are of any size and of rounding's sign
        if which < 2 and np.abs(e.output[i]).min() < 1e-3:
            continue
        relevance, absorbed = naive.contrast(graph, image, e.target[i], held, names)
        scale = max(np.linalg.norm(relevance), np.abs(e.output[i]).max(), *map(abs, absorbed.values()), 1)
        assert np.linalg.norm(e.relevance[i] - relevance) <= 1e-4 * scale
        for name, lost in absorbed.items():
            assert abs(e.ledger[name][i] - lost) <= 1e-4 * scale
        turnover = sum(abs(lost[i]) for lost in e.ledger.values()) + np.abs(e.relevance[i]).sum(dtype=np.float64)
        assert abs(e.sum[i] + e.absorbed[i] - e.explained[i]) <= 1e-5 * max(turnover, scale)


@settings(many, max_examples=100)
@given(st.booleans().flatmap(lambda signed: graphs_and_rules(signed=signed)), st.integers(1, 4), st.data())
def test_relevance_through_channels_agrees_with_the_oracle(case, count, data):
    graph, rules = case
    describe(graph)
    made, batch = explainer(graph, rules, threads=2), images(graph, count)
    through = {}
    for name in data.draw(st.lists(st.sampled_from(list(graph.shapes)[1:]), min_size=1, max_size=2, unique=True)):
        channels = st.integers(0, graph.shapes[name][0] - 1)
        through[name] = sorted(data.draw(st.lists(channels, min_size=1, max_size=4, unique=True)))
    note(through)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExplanationWarning)
        e = made(batch, through=through)
    names = {name: rule.rule for name, rule in made.rules.items()}
    for i, image in enumerate(batch):
        if naive.has_ties(graph, image):
            continue
        relevance, scores, absorbed = naive.relevances(graph, image, e.target[i], names, None, through.items())
        relevance = relevance["input"].reshape(graph.input_shape)
        scale = max(1.0, np.abs(scores).max(), np.linalg.norm(relevance), *map(abs, absorbed.values()))
        assert np.linalg.norm(e.relevance[i] - relevance) <= 1e-4 * scale
        for name, lost in absorbed.items():
            ours = e.cut[name.removeprefix("through ")] if name.startswith("through ") else e.ledger[name]
            assert abs(ours[i] - lost) <= 1e-4 * scale
        turnover = np.abs(e.relevance[i]).sum() + sum(abs(of[i]) for of in (*e.ledger.values(), *e.cut.values()))
        assert abs(e.sum[i] + e.absorbed[i] + sum(of[i] for of in e.cut.values())
                   - e.explained[i]) <= 1e-5 * max(turnover, scale)


def mixed():
    """Two of three classes with positive scores, whose maps differ, over 3x3 convolutions by any algorithm."""
    rng = np.random.default_rng(5)
    weights = [rng.standard_normal(shape) / 8 for shape in ((32, 3, 3, 3), (32, 32, 3, 3), (32, 32, 3, 3))]
    layers = []
    for i, weight in enumerate(weights):
        layers += [g.Conv2d(f"c{i}", (f"r{i - 1}" if i else g.INPUT,), weight, padding=(1,) * 4),
                   g.ReLU(f"r{i}", (f"c{i}",))]
    last = np.abs(rng.standard_normal((4, 32))) * [[1], [0.8], [0.5], [-1]]
    return g.Graph((*layers, g.GlobalAveragePool("pool", ("r2",)), g.Dense("scores", ("pool",), last)), (3, 24, 24),
                   (-1.0, 1.0))


def test_held_against_classes():
    graph = mixed()
    made = Explainer(Model(graph, Preprocessing(None), ("cat", "dog", "fowl", "stone")), threads=1)
    batch = images(graph, 2)
    first, *others = (explain(made, batch, target) for target in range(4))
    size = np.abs(first.relevance).max()
    for against, maps in (("dog", others[:1]), (["dog", 2], others[:2]), ("runner-up", others[:1])):
        e = made(batch, "cat", against=against)
        np.testing.assert_allclose(e.relevance, first.relevance - np.mean([one.relevance for one in maps], 0),
                                   atol=2e-6 * size)
        np.testing.assert_allclose(e.explained, first.explained - np.mean([one.explained for one in maps], 0),
                                   rtol=1e-5)
        np.testing.assert_allclose(e.sum + e.absorbed, e.explained, rtol=1e-4)
        assert (e.relevance < 0).any()
        np.testing.assert_allclose(e.at("input"), e.relevance, atol=2e-6 * size)
        assert (made(batch[:1], "cat", against=against).relevance[0] == e.relevance[0]).all()
    assert "0 cat  score" in str(e)
    assert " against dog, explained " in str(e)
    assert e.against_name(1) == "dog"
    assert made(batch, 0, against=[1, 2]).against_name() == "dog; fowl"
    assert explain(made, batch).against_name() == ""
    with pytest.warns(ExplanationWarning, match="nothing is held against the targets of 2 of 2 images, .*'stone'"):
        e = made(batch, "cat", against="stone")
    np.testing.assert_allclose(e.relevance, first.relevance, atol=2e-6 * size)
    with pytest.warns(ExplanationWarning, match="or is the target itself"):
        assert not made(batch, "cat", against="cat").relevance.any()
    with pytest.warns(ExplanationWarning, match="nothing to decompose; the first is image 0, 'stone'"):
        e = made(batch, "stone", against="cat")
    np.testing.assert_allclose(e.relevance, -first.relevance, atol=2e-6 * size)


def test_channels_add_up():
    """What goes through each channel of a layer is, together, the whole; in any batch, and held against a class."""
    graph = mixed()
    made, batch = explainer(graph), images(graph, 3)
    for options in ({}, {"against": 1}):
        whole = made(batch, 0, **options)
        parts = [made(batch, 0, through={"c1": list(range(rest, 32, 4))}, **options) for rest in range(4)]
        size = np.abs(whole.relevance).max()
        np.testing.assert_allclose(sum(part.relevance for part in parts), whole.relevance, atol=4e-6 * size)
        for part in parts:
            np.testing.assert_allclose(part.sum + part.cut["c1"], part.explained, rtol=1e-4)
    one = made(batch, 0, through={"c1": 5})
    assert (made(batch[1:2], 0, through={"c1": np.array([5])}).relevance[0] == one.relevance[1]).all()
    kept = one.at("r1")
    assert kept[:, 5].any()
    assert not np.delete(kept, 5, 1).any()
    np.testing.assert_allclose(kept[:, 5], made(batch, 0).at("r1")[:, 5], rtol=1e-6)
    assert ", cut at c1 " in str(one)
    both = made(batch, 0, through={"c1": [5, 6], "r1": 5})  # relevance comes to the activation first
    np.testing.assert_array_equal(both.relevance, one.relevance)
    np.testing.assert_array_equal(both.cut["r1"], one.cut["c1"])
    assert not both.cut["c1"].any()
    both = made(batch, 0, through={"c1": 5, "r1": [5, 6]})
    np.testing.assert_allclose(both.cut["r1"] + both.cut["c1"], one.cut["c1"], rtol=1e-6)
    assert both.cut["c1"].all()
    assert both.cut["r1"].all()


@pytest.mark.parametrize(("through", "message"), [
    ({"conv9": 1}, "no layer 'conv9'; it has conv, relu"), ({"input": 0}, "no layer 'input'"),
    ({"conv": 4}, "channel 4"),
    ({"conv": []}, "no channels"), ({"conv": [True]}, "channel True"), ({"conv": "1"}, "channel '1'"),
    (["conv"], "required: a mapping"), ({"conv": [0, -1]}, "channel -1"), ({"conv": 1.0}, "from 0 to 3"),
])
def test_no_such_channels(through, message):
    with pytest.raises(InputError, match=message):
        explainer(small())(images(small(), 1), through=through)
    with pytest.raises(InputError, match="the rules derive"):
        explainer(small(), "gradient")(images(small(), 1), through={"conv": 1})


def test_held_against_all_others():
    graph = mixed()
    made, batch = explainer(graph), images(graph, 2)
    y = np.exp(np.float64(made.predict(batch)))
    y /= y.sum(1, keepdims=True)
    for against, start in (("others", made.predict(batch)[:, :1] * [1, -1 / 3, -1 / 3, -1 / 3]),
                           ("softmax-gradient", y[:, :1] * ([[1, 0, 0, 0]] - y))):
        e = made(batch, 0, against=against)
        positive, negative = (made(batch, start=side) for side in (np.maximum(start, 0), np.maximum(-start, 0)))
        size = np.abs(positive.relevance).max()
        np.testing.assert_allclose(e.relevance, positive.relevance - negative.relevance, atol=2e-6 * size)
        np.testing.assert_allclose(e.explained, 0, atol=1e-6 * start.max())


@pytest.mark.parametrize(("rules", "options", "message"), [
    ("gradient", {"against": 1}, "the rules derive"), ("dtd", {"against": 9}, "target 9 is not an output"),
    ("dtd", {"against": "everything"}, "everything"), ("dtd", {"against": []}, "there are no classes"),
    ("dtd", {"against": 1, "start": [1, 0, 0]}, "a start and classes"), ("dtd", {"against": b"others"}, "target"),
    ("dtd", {"against": True}, "target True"),
])
def test_what_a_target_cannot_be_held_against(rules, options, message):
    made = explainer(small(), rules)
    with pytest.raises(InputError, match=message):
        made(images(small(), 1), **options)


@pytest.mark.slow
@settings(many, max_examples=60)
@given(graphs_and_rules(signed=True))
def test_relevance_at_every_layer(case):
    graph, rules = case
    describe(graph)
    made, batch = explainer(graph, rules, threads=2), images(graph, 2)
    e = explain(made, batch)
    rules = {name: rule.rule for name, rule in made.rules.items()}
    oracle = [naive.relevances(graph, image, e.target[i], rules)[0] for i, image in enumerate(batch)]
    for name, shape in graph.shapes.items():
        ours = e.at(name)
        assert ours.shape == (2, *shape)
        for i in range(2):
            expected = oracle[i][name].reshape(shape)
            scale = max(np.linalg.norm(expected), np.abs(e.output[i]).max(), 1)
            assert np.linalg.norm(ours[i] - expected) <= 1e-4 * scale
    # What several layers give back to a tensor is added in another order where tensors do not share memory.
    scale = max(1, np.abs(e.relevance).max(), np.abs(e.output).max())
    np.testing.assert_allclose(e.at("input"), e.relevance, atol=1e-5 * scale)
    assert {name: came.tolist() for name, came in e.flow().items()} == {
        name: e.at(name).sum((1, 2, 3), dtype=np.float64).tolist() for name in e.ledger}


def test_derivatives_by_rules_of_layers_are_those_of_the_preset():
    batch = images(small(), 2)
    preset, by_layer = (explain(explainer(small(), rules), batch)
                        for rules in ("gradient", {"conv": "gradient", "[ps]*": "gradient"}))
    assert preset.relevance.any()
    assert (preset.relevance == by_layer.relevance).all()
    assert (preset.explained == by_layer.explained).all()


def test_no_such_layer_and_no_network():
    e = explain(explainer(small()), images(small(), 1))
    with pytest.raises(InputError, match="has no layer 'conv9'; it has input, conv, relu, pool, scores"):
        e.at("conv9")
    derived = explain(explainer(small(), "gradient"), images(small(), 1))
    assert derived.at("relu").shape == (1, 4, 4, 3)
    with pytest.raises(InputError, match=r"by what layer 'conv' makes is not kept, .* such as 'relu'"):
        derived.at("conv")
    kept = pickle.loads(pickle.dumps(e))
    assert (kept.relevance == e.relevance).all()
    with pytest.raises(InputError, match="pickled, without the network"):
        kept.at("conv")


def z_plus(a, w):
    return a if w > 0 else 0


def z_plus_on_reals(a, w):
    return a if a * w > 0 else 0


def w2(a, w):
    return w


def z_b(a, w, low, high):
    return a - low if w > 0 else a - high


@pytest.mark.slow
@pytest.mark.parametrize(("direction", "layer", "rule"),
                         [
    (z_plus, "hidden", "z+"), (z_plus_on_reals, "conv", "z+"), (w2, "conv", "w2"), (z_b, "conv", "zB"),
    (w2, "hidden", "w2"), (lambda a, w: 1 / w if w != 0 else 0, "hidden", "flat"),
    (lambda a, w: a, "hidden", "epsilon(epsilon=0, bias=ignored)"),
])
def test_named_rules_follow_from_their_search_direction(direction, layer, rule):
    graph = two_layers((-1.0, 2.0))
    batch = images(graph, 3)
    named, general = (explain(explainer(graph, {layer: given}, threads=2), batch)
                      for given in (rule, search_direction(direction)))
    assert (named.explained > 0).all()
    np.testing.assert_allclose(general.relevance, named.relevance, atol=2e-5 * np.abs(named.relevance).max())
    np.testing.assert_allclose(general.ledger[layer], named.ledger[layer], atol=2e-5 * named.explained.max())


@pytest.mark.slow
@pytest.mark.parametrize(("direction", "layer"), [
    (to_the_middle, "conv"), (lambda a, w: np.exp(-a) * w, "hidden"), (lambda a, w: w if a > 0.3 else 0, "conv"),
])
def test_any_search_direction_agrees_with_the_oracle(direction, layer):
    graph = two_layers((-1.0, 2.0))
    made, batch = explainer(graph, {layer: search_direction(direction)}), images(graph, 3)
    e = explain(made, batch)
    for i, image in enumerate(batch):
        if naive.has_ties(graph, image):
            continue
        relevance, _, absorbed = naive.explain(graph, image, e.target[i],
                                               {name: rule.rule for name, rule in made.rules.items()})
        np.testing.assert_allclose(e.relevance[i], relevance, atol=1e-4 * max(np.abs(relevance).max(), e.explained[i]))
        assert abs(e.ledger[layer][i] - absorbed[layer]) <= 1e-4 * e.explained[i]


@pytest.mark.parametrize(("direction", "layer", "message"),
                         [
    (lambda a: a, "conv", "required: a function of"), ("v", "conv", "required: a function of"),
    (lambda a, w: a.sign(w), "conv", "cannot be compiled"),
    (lambda a, w: "far", "conv", "cannot be compiled: it returns"),
    (z_b, "hidden", "takes bounds of the layer's input"), (w2, "relu", "no layer with a rule is named 'relu'"),
])
def test_search_directions_that_are_refused(direction, layer, message):
    with pytest.raises(RuleError, match=message):
        explainer(two_layers((-1.0, 2.0)), {layer: search_direction(direction)})


def test_starts():
    made = explainer(small())
    batch = images(made.model.graph, 3)
    of_target = explain(made, batch, 2)
    one = made(batch, start=of_target.explained[:, None] * [0, 0, 1])
    np.testing.assert_allclose(one.relevance, of_target.relevance, rtol=1e-6)
    assert one.target.tolist() == [2, 2, 2]
    np.testing.assert_allclose(made(batch, start=[1, 0, 0.5]).explained, 1.5)
    assert not made(batch, start=[0, 0, 0]).relevance.any()
    for bad in ([1, 2], np.ones((2, 3)), [-1, 0, 0], [np.nan, 0, 0], [np.inf, 0, 0], "abc", [[1], [1, 2], [3]],
                None.__class__):
        with pytest.raises(InputError, match="start"):
            made(batch, start=bad)
    with pytest.raises(InputError, match="a target and a start"):
        made(batch, 1, [1, 0, 0])
    layers = g.Dense("dense", (g.INPUT,), np.eye(2)), g.ReLU("scores", ("dense",))
    dead = explainer(g.Graph(layers, (2, 1, 1), (-1, 1)))
    with pytest.raises(InputError, match="output 1 of image 1 has the score 0"):
        dead(np.float32([[1, 0.5], [1, -1]])[:, :, None, None], start=[1, 1])
    assert nothing_is_taken(made)


@many
@given(graphs_and_rules(), st.integers(1, 3))
def test_conserves_and_is_never_negative(case, count):
    graph, rules = case
    describe(graph)
    e = explain(explainer(graph, rules), images(graph, count))
    assert (e.relevance >= 0).all()
    sums = e.relevance.sum((1, 2, 3), dtype=np.float64)
    np.testing.assert_allclose(sums + e.absorbed, e.explained, rtol=1e-5)


def scaled(graph, inputs, weights):
    """A network whose bounds and weights are multiplied."""
    with np.errstate(all="ignore"):
        layers = [replace(layer, weight=layer.weight * np.float32(weights))
                  if isinstance(layer, (g.Conv2d, g.Dense)) else layer for layer in graph]
        box = None if graph.box is None else tuple(np.float32(bound * np.float64(inputs)) for bound in graph.box)
    return g.Graph(tuple(layers), graph.input_shape, box)


@pytest.mark.filterwarnings("error::RuntimeWarning")
@many
@given(graphs_and_rules(), st.integers(-45, 38), st.integers(-45, 38))
def test_balances_or_refuses_over_the_whole_range_of_float32(case, inputs, weights):
    graph, rules = case
    describe(graph)
    with np.errstate(all="ignore"):
        batch = (images(graph, 2) * np.float64(10.0**inputs)).astype(np.float32)
    try:
        e = explain(explainer(scaled(graph, 10.0**inputs, 10.0**weights), rules), batch)
    except FastDTDError:
        assert inputs or weights
        return
    assert np.isfinite(e.relevance).all()
    assert (e.relevance >= 0).all()
    np.testing.assert_allclose(e.sum + e.absorbed, e.explained, rtol=1e-3)


@pytest.mark.parametrize("middle", [
    g.LocalResponseNorm("middle", ("relu",), 3), g.LocalResponseNorm("middle", ("relu",), 3, within_channel=True),
    g.Power("middle", ("relu",), 0.5), g.Power("middle", ("relu",), 2), g.Power("middle", ("relu",), 3),
    g.MaxPool2d("middle", ("relu",), (2, 2), (1, 1)), g.AveragePool2d("middle", ("relu",), (2, 2), (1, 1)),
    g.Add("middle", ("relu", "relu")),
], ids=lambda layer: f"{type(layer).__name__} {getattr(layer, 'exponent', '')}")
def test_what_is_lost_below_the_range_of_float32_is_refused(middle):
    rng = np.random.default_rng(0)
    layers = (g.Conv2d("conv", (g.INPUT,), rng.standard_normal((4, 2, 3, 3))), g.ReLU("relu", ("conv",)), middle,
              g.Conv2d("last", ("middle",), rng.standard_normal((6, 4, 2, 2))), g.ReLU("positive", ("last",)),
              g.GlobalAveragePool("pool", ("positive",)), g.Dense("scores", ("pool",), rng.standard_normal((3, 6))))
    graph = g.Graph(layers, (2, 6, 5), (-1, 1))
    values, balanced, refused = rng.uniform(-1, 1, (1, 2, 6, 5)), 0, 0
    for inputs in (-45, -38, -30, -20, -10, 0, 10, 20, 30, 38):
        for weights in (-45, -38, -30, -20, -10, 0, 10, 20, 30, 38):
            made = explainer(scaled(graph, 10.0**inputs, 10.0**weights))
            with np.errstate(all="ignore"):
                batch = (values * 10.0**inputs).astype(np.float32)
            try:
                e = explain(made, batch)
            except InputError:
                assert abs(inputs) + abs(weights) >= 10
                refused += 1
                continue
            assert (e.relevance >= 0).all()
            np.testing.assert_allclose(e.sum + e.absorbed, e.explained, rtol=1e-3)
            balanced += 1
    assert balanced > 20
    assert refused > 3


@settings(many, max_examples=40)
@given(graphs())
def test_same_bits_whatever_the_batch_and_the_threads(graph):
    describe(graph)
    batch = images(graph, 5)
    alone, threaded = explainer(graph), explainer(graph, threads=2)
    together = explain(alone, batch)
    for i in range(5):
        for made in (alone, threaded):
            one = explain(made, batch[i:i + 1])
            assert (one.relevance[0] == together.relevance[i]).all()
            assert (one.output[0] == together.output[i]).all()
            assert (made.predict(batch[i]) == together.output[i]).all()
    assert (threaded.predict(batch) == together.output).all()
    shuffled = explain(threaded, batch[::-1])
    assert (shuffled.relevance[::-1] == together.relevance).all()


def test_the_first_of_equals_wins():
    assert_first_of_equals_wins(explainer)


@many
@given(st.data())
def test_large_max_pools_are_split_and_have_the_same_winners(data):
    size = [data.draw(st.integers(1, 12)) for _ in range(2)]
    kernel = tuple(data.draw(st.integers(1, n)) for n in size)
    padding = tuple(data.draw(st.integers(0, kernel[i % 2] - 1)) for i in range(4))
    stride, ceil_mode = tuple(data.draw(st.integers(1, 4)) for _ in range(2)), data.draw(st.booleans())
    pool = g.MaxPool2d("pool", ("conv",), kernel, stride, padding, ceil_mode)
    rng = np.random.default_rng(0)
    _, *pooled = pool.output_shape([(4, *size)])
    layers = (g.Conv2d("conv", (g.INPUT,), rng.standard_normal((4, 2, 1, 1))), pool, g.Flatten("flat", ("pool",)),
              g.Dense("scores", ("flat",), rng.standard_normal((3, 4 * math.prod(pooled)))))
    graph = g.Graph(layers, (2, *size), (-1, 1))
    batch = np.round(images(graph, 2) * 3) / np.float32(3)  # with many equal values
    rules = {"scores": data.draw(st.sampled_from(["z+", "epsilon", "gradient"]))}
    rules = "gradient" if "gradient" in rules.values() else rules
    at_once = explain(explainer(graph, rules), batch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pooling, "_ALWAYS_SPLIT_FROM", 0)
        split = explainer(graph, rules)
    assert ("pool/rows" in split._executor.devices[0][1]._network.graph.shapes) == (min(kernel) > 1)
    # The same winners; what one wins in several windows is added up in another order.
    np.testing.assert_array_equal(explain(split, batch).output, at_once.output)
    np.testing.assert_allclose(explain(split, batch).at("conv"), at_once.at("conv"), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(explain(split, batch).at("pool"), at_once.at("pool"))


def test_windows_of_thousands_of_elements():
    """Tables, and the time, grow by rows and columns, not by their product."""
    size = 400
    pool = g.MaxPool2d("pool/rows", (g.INPUT,), (size - 3, size - 2))
    layers = pool, g.MaxPool2d("pool", ("pool/rows",), (4, 3)), g.Flatten("scores", ("pool",))
    image = np.random.default_rng(0).random((1, 1, size, size), np.float32)
    e = explain(explainer(g.Graph(layers, (1, size, size), (0, 1))), image)
    assert e.relevance[0, 0].argmax() == image[0, 0].argmax()
    assert e.relevance.sum() == image.max()
    for layer in (g.AveragePool2d("pool", (g.INPUT,), (size - 3, size - 2)),
                  g.Conv2d("pool", (g.INPUT,), np.ones((1, 1, size - 3, size - 2)))):
        graph = g.Graph((layer, g.GlobalAveragePool("scores", ("pool",))), (1, size, size), (0, 1))
        with pytest.raises(InputError, match=r"'pool' .* has a window of 397x398; at most 65536 elements are accepted"):
            explainer(graph)
    whole = g.AveragePool2d("pool", (g.INPUT,), (size, size))
    e = explain(explainer(g.Graph((whole, g.Flatten("scores", ("pool",))), (1, size, size), (0, 1))), image)
    assert e.sum[0] == pytest.approx(image.mean(), rel=1e-5)


@pytest.mark.parametrize("rules", ["dtd", {"conv": "w2"}, ["zennit.epsilon_plus", {"scores": "flat"}]])
def test_explainers_are_pickled(rules):
    model = Model(small(), Preprocessing(None), ("n01 cat, house cat", "dog", "cat fish"), {"source": "numbers"})
    made = Explainer(model, rules, threads=2, memory="100MiB")
    again = pickle.loads(pickle.dumps(made))
    batch = images(model.graph, 3, seed=0)
    np.testing.assert_array_equal(again(batch, "dog").relevance, made(batch, "dog").relevance)
    assert (again.rules, again.threads, again.batch) == (made.rules, made.threads, made.batch)
    assert again.model.classes == model.classes
    assert again.model.provenance == model.provenance


def test_targets():
    made = Explainer(Model(small(), Preprocessing(None), ("n01 cat, house cat", "dog", "cat fish")))
    batch = images(made.model.graph, 3)
    assert explain(made, batch).target.tolist() == [0, 0, 0]
    assert explain(made, batch, 2).target.tolist() == [2, 2, 2]
    assert explain(made, batch, [0, 2, 0]).target.tolist() == [0, 2, 0]
    assert explain(made, batch, np.array([2, 2, 0])).target.tolist() == [2, 2, 0]
    assert explain(made, batch, "House cat").target.tolist() == [0, 0, 0]
    assert explain(made, batch, ["cat", "cat fish", "n01"]).target.tolist() == [0, 2, 0]
    for bad in (3, -1, 1.5, "bird", True, [0, 1], [[0, 1, 2]], [[1, 2], [3]], {"a": 1}, object(), [],
                np.array([0.0, 1.0, 2.0]), np.array(1.5), np.array(True), np.array([[0, 1], [1, 2]]),
                np.array([[0.7], [1.2], [1.0]])):
        with pytest.raises(InputError):
            explain(made, batch, bad)


def test_a_score_that_is_not_positive_has_nothing_to_decompose():
    made = explainer(small())
    with pytest.warns(ExplanationWarning, match=r"3 of 3 targets have a score that is not positive"):
        e = made(images(made.model.graph, 3), 1)
    assert (e.output[:, 1] <= 0).all()
    assert (e.explained == 0).all()
    assert (e.relevance == 0).all()


@pytest.mark.parametrize("rules", ["zennit.epsilon_plus", "zennit.epsilon_gamma_box", "zennit.excitation_backprop",
                                   "captum.lrp", {"scores": "epsilon"}, {"scores": "alpha-beta"}], ids=str)
def test_a_negative_score_is_decomposed_by_rules_of_both_signs(rules):
    *layers, scores = small()
    graph = g.Graph((*layers, replace(scores, weight=[[1, 1, 1, 1], [-1, 0.1, -1, -1], [1, 0, 0, 0]])), (2, 6, 5),
                    (-1.0, 1.0))
    made, batch = explainer(graph, rules), images(graph, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        e = made(batch, 1)
    assert (e.explained < 0).all()
    assert (e.explained == e.output[:, 1]).all()
    assert e.relevance.any()
    np.testing.assert_allclose(e.sum + e.absorbed, e.explained, rtol=1e-5)
    again = made(batch, start=e.explained[:, None] * [0, 1, 0])
    np.testing.assert_allclose(again.relevance, e.relevance, rtol=1e-5, atol=1e-7)
    assert again.target.tolist() == [1, 1, 1]
    assert (made(batch, start=[1, 1, 0]).target == 0).all()


def test_a_score_of_zero_has_nothing_to_decompose():
    graph = g.Graph((g.Flatten("flat", (g.INPUT,)), g.Dense("scores", ("flat",), [[1.0, -1.0]])), (2, 1, 1))
    with pytest.warns(ExplanationWarning, match="1 of 2 targets have a score of zero"):
        e = explainer(graph, {"scores": "epsilon"})(np.float32([[1, 2], [1, 1]]).reshape(2, 2, 1, 1))
    assert e.relevance[0].ravel() == pytest.approx([1, -2], rel=1e-5)
    assert not e.relevance[1].any()


def test_inner_layers_are_those_of_the_images_as_they_were_given():
    graph = g.Graph((g.Flatten("flat", (g.INPUT,)), g.Dense("scores", ("flat",), np.ones((1, 2)))), (2, 1, 1))
    batch = np.array([[[[1]], [[2]]]], np.float32)
    e = explain(explainer(graph), batch)
    batch[:] = 7
    assert e.at("flat").sum() == e.explained.sum() == 3


SECOND_IS_NAN = np.zeros((3, 2, 6, 5), np.float32)
SECOND_IS_NAN[1, 1, 3, 2] = np.nan


@pytest.mark.parametrize(("batch", "message"), [
    (SECOND_IS_NAN, "image 1 holds NaN"), (np.zeros((1, 2, 5, 6)), "has shape"), (np.zeros((6, 5)), "has shape"),
    (np.zeros(()), "has shape"), (np.full((2, 2, 6, 5), np.nan), "image 0 holds NaN"),
    (np.full((1, 2, 6, 5), 1e300), "image 0 holds NaN or infinity"), (np.array(["a"]), "has type"),
    ([[1, 2], [3]], "no array of one shape"), (np.zeros((1, 2, 6, 5), complex), "has type"), (None, "has type"),
])
def test_bad_batches(batch, message):
    made = explainer(small())
    for call in (made, made.predict):
        with pytest.raises(InputError, match=message):
            call(batch)


def test_an_empty_batch_gives_an_empty_explanation():
    made, batch = explainer(small()), np.zeros((0, 2, 6, 5), np.float32)
    e = made(batch)
    assert e.relevance.shape == (0, 2, 6, 5)
    assert e.output.shape == made.predict(batch).shape == (0, 3)


def test_values_beyond_the_box_are_clipped_and_it_says_so():
    made = explainer(small())
    batch = images(made.model.graph, 2)
    with pytest.warns(ExplanationWarning, match="2 of 2 images have values beyond"):
        e = made(batch * 5)
    with pytest.warns(ExplanationWarning, match="2 of 2 images have values beyond"):
        assert (made.predict(batch * 5) == e.output).all()
    assert (e.relevance == explain(made, np.clip(batch * 5, -1, 1)).relevance).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made(np.clip(batch, -1, 1) * np.float32(1 + 1e-6))  # rounding of a preprocessing is no reason to speak


def test_overflow_is_an_error():
    layers = (g.Conv2d("a", ("input",), np.full((1, 1, 1, 1), 1e30)), g.ReLU("r", ("a",)), g.Flatten("f", ("r",)),
              g.Dense("d", ("f",), np.full((1, 1), 1e30)))
    graph = g.Graph(layers, (1, 1, 1), (0, 1))
    made, batch = explainer(graph), np.float32([0, 1, 0, 1]).reshape(4, 1, 1, 1)
    for call in (made, made.predict):
        with pytest.raises(InputError, match=r"image 1 gives scores .*beyond float32") as raised:
            call(batch)
        assert list(raised.value.reasons) == [1, 3]
    assert not made.predict(batch[::2]).any()


def test_a_bias_without_support_is_in_the_ledger():
    """relu(b) with b > 0 and only negative weights: active, and no input to thank for it."""
    graph = g.Graph((g.Dense("hidden", ("input",), [[1.0], [-1.0]], [0.0, 3.0]), g.ReLU("relu", ("hidden",)),
                     g.Dense("scores", ("relu",), [[1.0, 1.0]])), (1, 1, 1), (0, 1))
    e = explainer(graph, {"hidden": "z+"})(np.full((1, 1, 1, 1), 0.5, np.float32))
    assert e.explained[0] == pytest.approx(3.0)  # 0.5 + relu(3 - 0.5)
    assert e.relevance.ravel() == pytest.approx([0.5])
    assert e.ledger["hidden"] == pytest.approx([2.5])
    assert e.ledger["scores"] == pytest.approx([0])


def test_a_mean_that_is_rounded_beyond_its_bound_makes_no_negative_relevance():
    for seed in range(60):
        rng = np.random.default_rng(seed)
        low = -rng.random(2)
        layers = (g.AveragePool2d("pool", (g.INPUT,), (3, 3)),
                  g.Conv2d("conv", ("pool",), rng.standard_normal((3, 2, 2, 2)), [1.0] * 3),
                  g.ReLU("relu", ("conv",)), g.Flatten("flat", ("relu",)),
                  g.Dense("scores", ("flat",), np.ones((1, 12))))
        graph = g.Graph(layers, (2, 5, 5), (low, low + 0.7))
        batch = np.broadcast_to(np.float32(low)[:, None, None], (1, 2, 5, 5))
        for rules in ("dtd", {"pool": "flat"}):
            e = explain(explainer(graph, rules), batch)
            assert (e.relevance >= 0).all()
            assert all((lost >= 0).all() for lost in e.ledger.values())
            assert e.relevance.sum(dtype=np.float64) + e.absorbed[0] == pytest.approx(e.explained[0], rel=1e-5)


@pytest.mark.parametrize("options", [{"device": "tpu"}, {"precision": "tf32"}, {"precision": 32}, {"threads": 0},
                                     {"threads": True}, {"threads": 1.5}])
def test_bad_options(options):
    with pytest.raises(InputError):
        Explainer(Model(small(), Preprocessing(None)), **options)


def test_where_the_machine_has_no_memory(monkeypatch, tmp_path):
    """Whatever finds that out, the error is ours."""
    def fail(*arguments):
        raise MemoryError

    graph = two_layers(None)
    made, batch = Explainer(Model(graph, Preprocessing(None))), np.zeros((1, *graph.input_shape), np.float32)
    path = tmp_path / "net.h5"
    fastdtd.save(made.model, path)
    for owner, name, call in (("fastdtd.explainer.Explainer", "_run", lambda: made(batch)),
                              ("fastdtd.explainer", "Executor", lambda: Explainer(made.model)),
                              ("fastdtd.model_file", "_read", lambda: fastdtd.load(path))):
        with monkeypatch.context() as patched:
            patched.setattr(f"{owner}.{name}", fail)
            with pytest.raises(FastDTDError, match="the machine has no memory left for it"):
                call()


def test_warnings_name_the_line_that_called():
    graph = two_layers((0.0, 1.0))
    batch = np.full((1, *graph.input_shape), 2, np.float32)
    made = Explainer(Model(graph, Preprocessing(None)))
    for call in (made, made.predict):
        with pytest.warns(ExplanationWarning) as found:
            call(batch)
        assert {warning.filename for warning in found} == {__file__}
