"""Which rule each layer gets, and what a rule is: how features u and weights V are made from activations and weights.

The table is that of docs/method.md, after Montavon et al., Pattern Recognition 65 (2017), 4.1 (w2) and 4.2 (z+, zB), and Lapuschkin et al.,
arXiv:1902.10178 (flat).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fastdtd.errors import RuleError
from fastdtd.graph import INPUT, Add, Array, AveragePool2d, Conv2d, Dense, Domain, GlobalAveragePool, Graph, Layer, MaxPool2d, Rearrange
from fastdtd.kernels import codes

LINEAR_RULES = {
    "z+": "shares by a * max(W, 0); for hidden layers",
    "zB": "shares by (a - low) * max(W, 0) + (high - a) * max(-W, 0); for an input with known bounds",
    "w2": "shares by W^2, whatever the input; for an input without bounds",
    "flat": "shares evenly, whatever the input and the weights",
}
POOL_RULES = {
    "winner": "gives all to the largest number of a window",
    "proportional": "shares in proportion to the numbers of a window",
}
PRESETS = {
    "dtd": "by each layer's input domain: z+ in hidden layers, zB at an input with bounds, w2 at one without",
    "innvestigate.deep_taylor": "iNNvestigate's: z+ in every layer, the first too; average pools share evenly; no additions",
    "innvestigate.deep_taylor.bounded": "the same, with zB in layers that read the input",
}
_LARGEST_SQUARED = 1e15
Rules = str | Mapping[str, str]


@dataclass(frozen=True)
class Assigned:
    """The rule of one layer: its name and the code of its features (fastdtd.kernels.codes; None under "winner")."""

    name: str
    features: int | None

    def share_weights(self, weight: Array) -> list[Array]:
        """V >= 0, one array of the shape of `weight` for each feature of an input."""
        positive, negative = np.maximum(weight, 0), np.maximum(-weight, 0)
        match self.name, self.features:
            case "z+", codes.NONNEGATIVE:
                return [positive]
            case "w2", _:
                if weight.size and np.abs(weight).max() > _LARGEST_SQUARED:
                    raise RuleError(f"a weight of {np.abs(weight).max():g} is too large to be squared in float32; use 'flat' here")
                return [weight * weight]
            case "flat", _:
                return [np.ones_like(weight)]
        return [positive, negative]


def assign(graph: Graph, rules: Rules = "dtd") -> dict[str, Assigned]:
    """The rule of each layer that redistributes.

    Parameters
    ----------
    graph : Graph
        In canonical form.
    rules : str, or mapping of str to str
        A preset, one of PRESETS. "dtd" chooses by each layer's input domain: z+ in hidden layers, zB at an input with bounds, w2 at one
        without; all presets give max-pools' relevance to the winner. A mapping from layer names, or patterns such as "conv*", to rules
        changes some of "dtd"; where several match, the last one counts.

    Returns
    -------
    dict of str to Assigned
        By layer name. Layers that only pass relevance on (ReLU, concatenation, flatten) are left out.

    Raises
    ------
    RuleError
        An unknown rule, a pattern that matches no layer with rules, or a rule that does not apply to a layer's kind or domain.
    """
    preset = "dtd"
    if isinstance(rules, str):
        if rules not in PRESETS:
            raise RuleError(f"rules {rules!r} is unknown; required: {', '.join(map(repr, PRESETS))}, or a mapping from layers to rules "
                            f"({', '.join([*LINEAR_RULES, *POOL_RULES])})")
        preset, rules = rules, {}
    if not isinstance(rules, Mapping) or not all(isinstance(text, str) for item in rules.items() for text in item):
        raise RuleError(f"rules {rules!r} given; required: a preset such as 'dtd', or a mapping from layer names or patterns to rules, all "
                        "of them text")
    ruled = [layer for layer in graph if isinstance(layer, (Conv2d, Dense, Add, AveragePool2d, GlobalAveragePool, MaxPool2d))]
    names = {layer.name: _of_preset(preset, layer, input_domain(graph, layer)) for layer in ruled}
    for pattern, rule in rules.items():
        if rule not in LINEAR_RULES and rule not in POOL_RULES:
            raise RuleError(f"rule {rule!r} for {pattern!r} is unknown; required: one of {', '.join([*LINEAR_RULES, *POOL_RULES])}")
        fitting = [name for name in names if name == pattern] or fnmatch.filter(names, pattern)
        if not fitting:
            raise RuleError(f"no layer with a rule is named {pattern!r} or matches it; they are {', '.join(names)}")
        names.update(dict.fromkeys(fitting, rule))
    return {layer.name: _assigned(layer, names[layer.name], input_domain(graph, layer)) for layer in ruled}


def input_domain(graph: Graph, layer: Layer) -> Domain:
    """The domain of what `layer` reads; of both inputs together for an addition."""
    return graph.domains[layer.name if isinstance(layer, Add) else layer.inputs[0]]


def _of_preset(preset: str, layer: Layer, domain: Domain) -> str:
    if isinstance(layer, MaxPool2d):
        return "winner"
    if preset.startswith("innvestigate."):
        if isinstance(layer, Add):
            raise RuleError(f"layer {layer.name!r} is an addition, to both inputs of which iNNvestigate passes all relevance, so that it "
                            "doubles; required: a network without, or rules='dtd'")
        if isinstance(layer, (AveragePool2d, GlobalAveragePool)):
            return "flat"
        return "z+" if domain.hidden or not preset.endswith(".bounded") else "zB"
    if domain.hidden:
        return "z+"
    return "w2" if domain.low is None else "zB"


def _assigned(layer: Layer, rule: str, domain: Domain) -> Assigned:
    allowed = POOL_RULES if isinstance(layer, MaxPool2d) else LINEAR_RULES
    if rule not in allowed:
        raise RuleError(f"rule {rule!r} does not apply to {type(layer).__name__} {layer.name!r}; required: one of {', '.join(allowed)}")
    if rule == "winner":
        return Assigned(rule, None)
    if rule in ("w2", "flat"):
        return Assigned(rule, codes.ONES)
    bounded = domain.low is not None
    if rule == "zB" and not bounded:
        raise RuleError(f"rule 'zB' needs bounds of what layer {layer.name!r} reads, which are known only for the network's input and only "
                        "where the model gives its value box; use 'z+' in hidden layers, or 'w2' at the input")
    if rule == "zB" or (rule == "proportional" and bounded):
        return Assigned(rule, codes.BOX)
    return Assigned(rule, codes.NONNEGATIVE if domain.nonnegative else codes.SIGNED)


def absorbers(graph: Graph, rules: dict[str, Assigned]) -> list[str]:
    """Layers that may keep relevance from going on: those that share by a rule, and zeros of a rearrangement."""
    return [layer.name for layer in graph if (layer.name in rules and rules[layer.name].name != "winner")
            or (isinstance(layer, Rearrange) and layer.index.min() < 0)]


def relevance_carriers(graph: Graph, rules: dict[str, Assigned]) -> set[str]:
    """Tensors that carry relevance back instead of its factor c: the input, what a rule with its own features reads, and what is joined to
    such a tensor by layers that only pass relevance on."""
    joined: dict[str, set[str]] = {name: set() for name in graph.shapes}
    carriers = {INPUT}
    for layer in graph:
        rule = rules.get(layer.name)
        if rule is None or rule.name == "winner":
            for name in layer.inputs:
                joined[name].add(layer.name)
                joined[layer.name].add(name)
        elif rule.features in (codes.BOX, codes.ONES):
            carriers.update(layer.inputs)
    waiting = list(carriers)
    while waiting:
        for name in joined[waiting.pop()] - carriers:
            carriers.add(name)
            waiting.append(name)
    return carriers
