"""The table of layers: that it is whole, and that all who read it get something out of it."""

import naive
import numpy as np
import pytest
from graphs import graphs, graphs_and_rules
from hypothesis import HealthCheck, Phase, given, settings
from layers import DOMAINS, KEPT, TABLE, every_example
from single_layers import TESTED, batch_of, network

from fastdtd import graph as g
from fastdtd.canonize import canonize
from fastdtd.rules import assign


def test_every_kind_of_layer_has_an_entry():
    assert TABLE.keys() == g.LAYER_TYPES.keys()


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, entry in TABLE.items() for name in entry.examples])
def test_examples_are_of_their_kind(kind, name):
    example = TABLE[kind].examples[name]
    made = example.make("made", *["source"] * example.inputs)
    assert type(made) is g.LAYER_TYPES[kind]
    assert made.output_shape(example.shapes)
    assert example.on_gpu in ("short", "long", "")


@pytest.mark.parametrize("kind", TABLE)
def test_an_entry_is_whole_or_canonized(kind):
    entry = TABLE[kind]
    assert bool(entry.rules) == bool(entry.draw) == (not entry.canonized)
    assert not entry.signed or entry.typical in entry.examples
    assert entry.canonized or entry.examples[entry.short].on_gpu == "short"
    assert {domain for _, domain in entry.rules} <= set(DOMAINS)


@pytest.mark.parametrize("kind", [kind for kind, entry in TABLE.items() if entry.canonized])
def test_what_is_canonized_goes(kind):
    for example in TABLE[kind].examples.values():
        before = g.Conv2d("before", (g.INPUT,), np.ones((example.shape[0], 1, 1, 1)), groups=example.shape[0])
        layers = [before, example.make("gone", "before")]
        if example.shape[1:] != (1, 1):
            layers += [g.GlobalAveragePool("scores", ("gone",))]
        assert "gone" not in [layer.name for layer in canonize(g.Graph(tuple(layers), example.shape))]


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize(("kind", "name"), every_example())
def test_the_oracle_knows_every_layer(kind, name, domain):
    example = KEPT[kind].examples[name]
    graph = network(example, domain)
    tested = next(layer for layer in graph if layer.name == TESTED)
    assert {str(graph.domains[source]) for source in tested.inputs} == {domain}
    tensors = naive.forward(graph, batch_of(example, 1)[0])
    assert tensors[TESTED].shape == (np.prod(graph.shapes[TESTED]),)
    rules = {name: rule.rule for name, rule in assign(graph).rules.items()}
    relevance, _, absorbed = naive.explain(graph, batch_of(example, 1)[0], 1, rules)
    assert relevance.any() or any(absorbed.values())


@pytest.mark.slow
@pytest.mark.parametrize("like_peers", [False, True])
def test_every_layer_and_rule_is_drawn(like_peers):
    kinds, rules_drawn = set(), set()

    @settings(max_examples=500, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))
    @given(graphs(like_peers=like_peers), graphs_and_rules(like_peers=like_peers, signed=True))
    def draw(graph, case):
        kinds.update(map(type, graph))
        rules_drawn.update(case[1].values())

    draw()
    wanted = {kind: entry for kind, entry in KEPT.items() if entry.in_peers or not like_peers}
    assert kinds == {g.LAYER_TYPES[kind] for kind in wanted}
    with_rules = {kind: wanted[kind] for kind in (("conv2d", "dense") if like_peers else wanted)}
    assert rules_drawn == {rule for entry in with_rules.values() for rule in entry.drawn_rules(signed=True)}
