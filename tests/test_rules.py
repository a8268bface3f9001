"""Which rule each layer gets: by its domain, by name and by pattern; and which rules are refused."""

import numpy as np
import pytest
from fastdtd.kernels import codes

from fastdtd import graph as g
from fastdtd.errors import ModelError, RuleError
from fastdtd.rules import Rule, assign


def network(box=None):
    """input -> conv1 -> relu -> conv[2] -> {max, average} -> sum -> mean -> scores"""
    weight = np.ones((2, 2, 1, 1))
    layers = (g.Conv2d("conv1", (g.INPUT, ), weight), g.ReLU("relu",
                                                             ("conv1", )), g.Conv2d("conv[2]", ("relu", ), weight),
              g.MaxPool2d("max", ("conv[2]", ), (2, 2)), g.AveragePool2d("average", ("conv[2]", ),
                                                                         (2, 2)), g.Add("sum", ("max", "average")),
              g.GlobalAveragePool("mean", ("sum", )), g.Dense("scores", ("mean", ), np.ones((3, 2))))
    return g.Graph(layers, (2, 4, 4), box)


def pools(box):
    """Pools and an addition straight at the input, and a layer after them."""
    layers = (g.MaxPool2d("max", (g.INPUT, ), (2, 2)), g.AveragePool2d("average", (g.INPUT, ),
                                                                       (2, 2)), g.Add("sum", ("max", "average")),
              g.GlobalAveragePool("mean", ("sum", )), g.Dense("scores", ("mean", ), np.ones((3, 2))))
    return g.Graph(layers, (2, 4, 4), box)


def names(graph, rules="dtd"):
    return {name: rule.name for name, rule in assign(graph, rules).rules.items()}


HIDDEN = {"conv[2]": "z+", "max": "winner", "average": "z+", "sum": "z+", "mean": "z+", "scores": "z+"}


@pytest.mark.parametrize(("box", "first"), [((0, 1), "zB"), (None, "w2")])
def test_defaults_follow_the_domain(box, first):
    assert names(network(box)) == {"conv1": first, **HIDDEN}
    assert names(network(box), {}) == names(network(box))
    assert names(pools(box)) == {"max": "winner", "average": first, "sum": first, "mean": first, "scores": first}


def test_features_follow_the_domain():
    assigned = assign(network((0, 1)), {"max": "proportional"}).rules
    features = {name: rule.terms[0].features for name, rule in assigned.items()}
    signed = dict.fromkeys(("max", "average", "sum", "mean", "scores"),
                           codes.SIGNED)  # nothing but conv1 is after a ReLU
    assert features == {"conv1": codes.BOX, "conv[2]": codes.NONNEGATIVE, **signed}
    assert assign(network()).rules["max"].terms == ()
    for rules, box, expected in [({"max": "proportional"}, (0, 1), codes.BOX),
                                 ({"max": "proportional"}, None, codes.SIGNED),
                                 ({"average": "z+"}, (0, 1), codes.NONNEGATIVE),
                                 ({"average": "z+"}, (-1, 1), codes.SIGNED), ({"average": "w2"}, (0, 1), codes.ONES),
                                 ({"average": "flat"}, (0, 1), codes.ONES)]:
        assert assign(pools(box), rules).rules[next(iter(rules))].terms[0].features == expected


@pytest.mark.parametrize(
    ("rules", "changed"),
    [({"conv1": "flat"}, {"conv1": "flat"}), ({"conv*": "w2"}, {"conv1": "w2", "conv[2]": "w2"}),
     ({"[cas]*": "flat", "conv1": "w2", "max": "proportional"
       }, dict.fromkeys(("conv[2]", "average", "sum", "scores"), "flat") | {"max": "proportional"}),
     ({"max": "proportional", "m[ae]*": "winner", "mean": "flat"}, {"mean": "flat"
                                                                    }),  # the last that matches counts, exact or not
     ({"conv1": "flat", "conv?": "w2"}, {"conv1": "w2"}),
     ({"conv[2]": "flat"}, {"conv[2]": "flat"}),  # a name before it is a pattern, which would be conv2
     ({"conv[[]*": "flat"}, {"conv[2]": "flat"}), ({"conv[12]": "flat"}, {"conv1": "flat"}),
     ({"type:conv2d": "flat", "type:dense": "epsilon(epsilon=0.25)"
       }, {"conv1": "flat", "conv[2]": "flat", "scores": "epsilon"}),
     (["dtd", {"mean": "epsilon"}, {"sum": "flat"}], {"mean": "epsilon", "sum": "flat"}), ])
def test_overrides(rules, changed):
    assert names(network(), rules) == {"conv1": "w2", **HIDDEN, **changed}


def test_a_name_that_is_a_pattern_of_another():
    layers = (g.Dense("a[1]", (g.INPUT,), [[1]]), g.Dense("a1", ("a[1]",), [[1]]), g.Dense("a*", ("a1",), [[1]]))
    graph = g.Graph(layers, (1, 1, 1))
    assert names(graph, {"a[1]": "flat"}) == {"a[1]": "flat", "a1": "z+", "a*": "z+"}
    assert names(graph, {"a*": "flat"}) == {"a[1]": "w2", "a1": "z+", "a*": "flat"}


@pytest.mark.parametrize(("rules", "message"), [
    ("lrp",
     "rules 'lrp' is unknown; required: 'dtd', 'innvestigate.deep_taylor', .* or a mapping from layers to rules"),
    (None, "rules None given; required: a preset such as 'dtd', or mappings from layer names"),
    ({"conv1": ["flat"]}, "required: a preset such as 'dtd', or a mapping"),
    ({1: "flat"}, "required: a preset such as 'dtd', or a mapping"),
    ({"conv1": "lrp"
      }, "for 'conv1': rule 'lrp' is unknown; required: one of z\\+, zB, w2, flat, epsilon, .*, winner, proportional"),
    ({"conv1": "epsilon(0.1)"}, r"for 'conv1': rule 'epsilon\(0.1\)' has a parameter '0.1'; required: epsilon or bias"),
    ({"conv1": "flat(epsilon=1)"}, "has a parameter 'epsilon'; required: none"),
    ({"conv1": "epsilon(epsilon=-1)"}, "has epsilon '-1'; required: a number from 0 to 1e\\+06"),
    ({"conv1": "epsilon(epsilon=nan)"}, "has epsilon 'nan'; required: a number"),
    ({"conv1": "gamma(bias=kept)"}, "has bias 'kept'; required: one of ignored, absorbed, shared"),
    ({"conv1": "epsilon(epsilon=1"}, "is unknown; required: one of"),
    ({"average": "gamma"}, "rule gamma does not apply to AveragePool2d 'average', which has no weights"),
    ({"conv1": "gradient"}, "layer 'conv\\[2\\]' has a rule that redistributes relevance, others the rule 'gradient'"),
    ({"type:conv1d": "flat"}, "no layer with a rule is named 'type:conv1d'"),
    (["dtd", "dtd"], "required: a preset such as 'dtd', or mappings"),
    ({"conv9": "flat"}, "no layer with a rule is named 'conv9' or matches it; they are conv1, "),
    ({"relu": "flat"}, "no layer with a rule is named 'relu'"),
    ({"conv*": "winner"
      }, "rule 'winner' does not apply to Conv2d 'conv1'; required: one of z\\+, zB, w2, .*, gradient$"),
    ({"scores": "proportional"}, "rule 'proportional' does not apply to Dense 'scores'"),
    ({"max": "z+"}, "rule 'z\\+' does not apply to MaxPool2d 'max'; required: one of winner, proportional$"),
    ({"*": "flat"}, "rule 'flat' does not apply to MaxPool2d 'max'"),
    ({"conv1": "zB"}, "rule 'zB' needs bounds of what layer 'conv1' reads"),
    ({"sum": "zB"}, "rule 'zB' needs bounds of what layer 'sum' reads"),
])
def test_rules_that_are_refused(rules, message):
    with pytest.raises(RuleError, match=message):
        assign(network(), rules)


def test_a_hidden_layer_has_no_box():
    with pytest.raises(RuleError,
                       match="needs bounds of what layer 'scores' reads, which are known only for the network's input"):
        assign(network((0, 1)), {"scores": "zB"})


def test_weights_of_terms():
    weight = np.array([[2, -3]], np.float32)
    graph = g.Graph((g.Dense("first", (g.INPUT,), weight),), (2, 1, 1), (0, 1))

    def v(rule):
        return [weights.tolist() for weights in assign(graph, {"first": rule}).rules["first"].terms[0].v(weight)]

    assert v("z+") == [[[2, 0]]]
    assert v("zB") == [[[2, 0]], [[0, 3]]]
    assert v("w2") == [[[4, 9]]]
    assert v("flat") == [[[1, 1]]]
    signed = assign(network()).rules["scores"]
    assert [v.tolist() for v in signed.terms[0].v(weight)] == [[[2, 0]], [[0, 3]]]
    with pytest.raises(RuleError, match="a weight of 3e\\+15 is too large to be squared in float32; use 'flat' here"):
        assign(graph, {"first": "w2"}).rules["first"].terms[0].v(weight * np.float32(1e15))


@pytest.mark.parametrize("text", [
    "z+", "epsilon", "epsilon(epsilon=0.25)", "gamma(gamma=2, bias=shared)",
    "alpha-beta(alpha=1, beta=0, epsilon=0, bias=ignored)", "z+(bias=absorbed)", "taylor", "winner"
])
def test_a_rule_is_its_text(text):
    assert str(Rule.parse(text)) == text
    assert Rule.parse(f" {text.replace(',', ' , ')} ") == Rule.parse(text)


def test_negative_outputs_have_ratios_of_their_own_where_they_can_have_relevance():
    formulas = {name: rule.formula for name, rule in assign(network()).rules.items()}
    # What the dense layer reads can be negative, and so all before it up to the ReLU.
    signed = {name for name, formula in formulas.items() if formula == codes.SIGNS}
    assert signed == {"conv[2]", "average", "sum", "mean"}
    assert formulas["scores"] is None


@pytest.mark.parametrize(("arguments", "message"), [
    ({"name": "lrp"}, "rule 'lrp' is unknown; required: one of z"),
    ({"name": "direction"}, "rule 'direction' is unknown"),
    ({"name": "z+", "direction": lambda a, w: w}, "rule 'z.' has a direction; required: search_direction"),
    ({"name": "flat", "epsilon": 0.5}, "rule 'flat' has a parameter 'epsilon'; required: none"),
    ({"name": "epsilon", "alpha": 2}, "rule 'epsilon' has a parameter 'alpha'; required: epsilon or bias"),
    ({"name": "epsilon", "epsilon": -1}, "has epsilon -1; required: a number from 0 to"),
    ({"name": "epsilon", "epsilon": None, "bias": "kept"}, "has bias 'kept'; required: one of ignored"),
    ({"name": "epsilon", "epsilon": [1]}, "has epsilon .1.; required: a number"),
])
def test_rules_that_cannot_be_made(arguments, message):
    with pytest.raises(RuleError, match=message):
        Rule(**arguments)


def test_a_rule_has_its_defaults():
    assert Rule("epsilon") == Rule.parse("epsilon") == Rule("epsilon", epsilon=1e-6, bias="absorbed")
    assert Rule("gamma", gamma=2) == Rule.parse("gamma(gamma=2)")
    assert repr(Rule("epsilon", epsilon=0.25)) == "Rule('epsilon(epsilon=0.25)')"
    assert names(network(), {"scores": Rule("epsilon", epsilon=0.25)})["scores"] == "epsilon"


def normed(**fields):
    layers = (g.Conv2d("conv", (g.INPUT,), np.ones((4, 1, 1, 1))),
              g.GroupNorm("norm", ("conv",), np.ones(4), np.zeros(4), **fields), g.Flatten("flat", ("norm",)),
              g.Dense("scores", ("flat",), np.ones((2, 16))))
    return g.Graph(layers, (1, 2, 2))


@pytest.mark.parametrize("preset", ["zennit.epsilon_plus", "captum.lrp", "innvestigate.deep_taylor"])
def test_presets_that_do_not_conserve_a_norm_refuse_it(preset):
    with pytest.raises(RuleError, match="layer 'norm' is a normalisation by the image's own statistics"):
        assign(normed(), preset)


@pytest.mark.parametrize("rule", ["zB", "w2", "flat", "winner", "taylor"])
def test_rules_that_a_norm_has_not(rule):
    with pytest.raises(RuleError, match=rf"rule '{rule}' does not apply to GroupNorm 'norm'; required: one of z\+"):
        assign(normed(), {"norm": rule})


@pytest.mark.parametrize(("fields", "message"), [
    ({"groups": 3}, "has 4 channels in 3 groups"), ({"groups": 0}, "in 0 groups"), ({"epsilon": 0}, "has epsilon 0;"),
    ({"epsilon": float("inf")}, "has epsilon inf"),
])
def test_norms_that_cannot_be(fields, message):
    with pytest.raises(ModelError, match=message):
        normed(**fields)
