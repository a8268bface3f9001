"""Which rule each layer of a network gets, and what follows from that for the backward pass."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastdtd.errors import RuleError, shown
from fastdtd.graph import (
    INPUT,
    LAYER_TYPES,
    Activation,
    Add,
    AveragePool2d,
    BatchNorm,
    Clip,
    Concat,
    Conv2d,
    Dense,
    Domain,
    Flatten,
    GlobalAveragePool,
    Graph,
    GroupNorm,
    Layer,
    LeakyReLU,
    LocalResponseNorm,
    MaxPool2d,
    Multiply,
    Power,
    Rearrange,
    Resize,
    Softmax,
    explained_layers,
    inputs_but_gates,
)
from fastdtd.kernels import codes
from fastdtd.rules.presets import DERIVATIVES, PRESETS
from fastdtd.rules.rule import (
    GROUP_NORM_RULES,
    LINEAR_RULES,
    NORM_RULES,
    POOL_RULES,
    PRODUCT_RULES,
    LayerRule,
    Rule,
    Term,
)

Rules = str | Mapping[str, str | Rule] | Sequence[str | Mapping[str, str | Rule]]

# Of layers whose values alone are needed: one sum, of whatever is quick.
_UNEXPLAINED = {
    MaxPool2d: LayerRule(Rule("winner")), LocalResponseNorm: LayerRule(Rule("identity"), (), codes.NORM_IDENTITY),
    Multiply: LayerRule(Rule("hold"))
}
_UNEXPLAINED_SUM = LayerRule(Rule("z+"), (Term(codes.NONNEGATIVE, "positive"),))
_NORM_FORMULAS = {"identity": codes.NORM_IDENTITY, "taylor": codes.NORM_TAYLOR, "gradient": codes.NORM_GRADIENT}


@dataclass(frozen=True, eq=False)
class Assignment:
    """The rules of a network's layers, and what follows from them.

    Attributes
    ----------
    rules : mapping of str to LayerRule
        Of each layer that redistributes, by name. Layers that only pass relevance on (ReLU, concatenation) have none,
        nor have those that are `held`.
    held : frozenset of str
        Layers that lead to nothing but gates which are held constant: no relevance comes back to them.
    unexplained : mapping of str to LayerRule
        What their outputs are computed with.
    carriers : frozenset of str
        Tensors that carry relevance R in the backward pass, not its factor c in ``R = |a| c``: the input, what a rule
        with features of its own reads, and what is joined to such a tensor by layers that only pass relevance on; all
        where derivatives are computed.
    signed : frozenset of str
        Tensors whose relevance can be negative, because of the rule of a layer that they lead to, or of the score.
    absorbers : tuple of str
        Layers that may keep relevance from going on, in order: those that redistribute by a rule, and zeros of a
        rearrangement.
    derivative : str or None
        "gradient", "gradient*input" or "sensitivity" where relevance is not redistributed.
    signed_scores : bool
        Whether negative scores are explained as positive ones are: by derivatives, and by rules that decompose both.
    """

    rules: Mapping[str, LayerRule]
    held: frozenset[str]
    unexplained: Mapping[str, LayerRule]
    carriers: frozenset[str]
    signed: frozenset[str]
    absorbers: tuple[str, ...]
    derivative: str | None
    signed_scores: bool

    def of(self, layer: Layer) -> LayerRule | None:
        """What a layer is computed with; None where it only passes relevance on."""
        return self.rules.get(layer.name, self.unexplained.get(layer.name))


def assign(graph: Graph, rules: Rules = "dtd") -> Assignment:
    """The rule of each layer that redistributes.

    Parameters
    ----------
    graph : Graph
        In canonical form.
    rules : str, mapping of str to str or Rule, or sequence of these
        A preset, one of PRESETS. "dtd" chooses by each layer's input domain: z+ in hidden layers, zB at an input with
        bounds, w2 at one without; all presets give max-pools' relevance to the winner. A mapping changes rules of
        "dtd", or of the preset before it in a sequence: from a layer's name, a pattern such as "conv*", or a type such
        as "type:dense" to a `Rule` or its text, as in "epsilon(epsilon=0.25)"; where several match, the last one
        counts.

    Returns
    -------
    Assignment

    Raises
    ------
    RuleError
        An unknown rule, a pattern that matches no layer with rules, or a rule that does not apply to a layer's kind or
        domain.
    """
    preset, changes = _parsed(rules)
    _check_preset(preset, graph)
    chosen = {layer.name: _of_preset(preset, layer, input_domain(graph, layer)) for layer in graph if _choices(layer)}
    by_name = set[str]()
    types = {layer.name: f"type:{name}" for layer in graph for name, kind in LAYER_TYPES.items() if type(layer) is kind}
    for pattern, rule in changes:
        matches = [name for name in chosen if pattern in (name, types[name])] or fnmatch.filter(chosen, pattern)
        if not matches:
            raise RuleError(f"no layer with a rule is named {pattern!r} or matches it; they are {', '.join(chosen)}")
        chosen.update(dict.fromkeys(matches, rule))
        by_name.update(matches)
    _check_first(preset, [layer for layer in graph if layer.name not in by_name], graph)
    held = _held(graph, chosen)
    unexplained = {name: _UNEXPLAINED.get(type(layer), _UNEXPLAINED_SUM) for layer in graph
                   if (name := layer.name) in held and name in chosen}
    chosen = {name: rule for name, rule in chosen.items() if name not in held}
    layers = [layer for layer in graph if layer.name not in held]
    derivative = _derivative(layers, chosen, preset)
    signed = _signed_carriers(graph, layers, chosen)
    assigned = {layer.name: _layer_rule(layer, chosen[layer.name], input_domain(graph, layer), layer.name in signed)
                for layer in layers if layer.name in chosen}
    carriers = set(graph.shapes) if derivative else _carriers(layers, assigned)
    absorbers = tuple(layer.name for layer in layers if _absorbs(layer, assigned.get(layer.name), derivative))
    signed_scores = derivative is not None or _decomposes_negative_scores(graph, assigned)
    return Assignment(assigned, held, unexplained, frozenset(carriers),
                      _signed(graph, layers, assigned, signed_scores), absorbers, derivative, signed_scores)


def _held(graph: Graph, chosen: dict[str, Rule]) -> frozenset[str]:
    explained = explained_layers(graph.layers, [graph.output],
                                 lambda layer: _explained_inputs(layer, chosen.get(layer.name)))
    return frozenset(layer.name for layer in graph if layer.name not in explained)


def _explained_inputs(layer: Layer, rule: Rule | LayerRule | None) -> tuple[str, ...]:
    """What a layer gives relevance to."""
    return inputs_but_gates(layer) if rule is not None and rule.name == "hold" else layer.inputs


def _parsed(rules: Rules) -> tuple[str, list[tuple[str, Rule]]]:
    """A preset, and (pattern, rule) of what is to be changed in it, in order."""
    is_one = isinstance(rules, (str, bytes, bytearray, Mapping)) or not isinstance(rules, Sequence)
    given: list[object] = [rules] if is_one else list(rules)
    preset = given.pop(0) if given and isinstance(given[0], str) else "dtd"
    if not isinstance(preset, str) or preset not in PRESETS:
        raise RuleError(
            f"rules {shown(preset)} is unknown; required: {', '.join(map(repr, PRESETS))}, or a mapping from layers to "
            f"rules ({', '.join([*LINEAR_RULES, *POOL_RULES])})")
    changes = []
    for part in given:
        if not isinstance(part, Mapping):
            raise RuleError(
                f"rules {shown(rules)} given; required: a preset such as 'dtd', or mappings from layer names or "
                "patterns to rules")
        for pattern, rule in part.items():
            if not isinstance(pattern, str) or not isinstance(rule, (str, Rule)):
                raise RuleError(
                    f"rules {shown(rules)} given; required: a preset such as 'dtd', or a mapping from layer names or "
                    "patterns to rules, all of them text")
            try:
                changes.append((pattern, rule if isinstance(rule, Rule) else Rule.parse(rule)))
            except RuleError as error:
                raise RuleError(f"for {pattern!r}: {error}") from None
    return preset, changes


def input_domain(graph: Graph, layer: Layer) -> Domain:
    """The domain of what `layer` reads; of both inputs together for an addition."""
    return graph.domains[layer.name if isinstance(layer, Add) else layer.inputs[0]]


def _choices(layer: Layer) -> dict[str, str]:
    """The rules that a layer of this kind can have; none where it only passes relevance on."""
    match layer:
        case Conv2d() | Dense() | Add() | AveragePool2d() | GlobalAveragePool() | Resize():
            return LINEAR_RULES
        case MaxPool2d():
            return POOL_RULES
        case GroupNorm():
            return GROUP_NORM_RULES
        case LocalResponseNorm():
            return NORM_RULES
        case Multiply():
            return PRODUCT_RULES
    return {}


def _check_preset(preset: str, graph: Graph) -> None:
    for layer in graph:
        refused = PRESETS[preset].refused
        is_scaled = isinstance(layer, (Conv2d, Dense)) and layer.batch_norm
        if why := refused.get(type(layer)) or (refused.get(BatchNorm) if is_scaled else None):
            raise RuleError(f"layer {layer.name!r} is {why}; required: a network without, or rules='dtd'")


def _check_first(preset: str, layers: list[Layer], graph: Graph) -> None:
    """An error where the original's rule for the first layer goes to another layer than the preset's, or to one of
    several; layers: those that the preset chooses the rules of."""
    if not PRESETS[preset].only_first:
        return
    rules = PRESETS[preset].first
    first = [layer for layer in layers if type(layer) in rules and not input_domain(graph, layer).hidden]
    later = [layer for layer in first if isinstance(layer, (Conv2d, Dense)) and layer.registered_later]
    if len(first) > 1 or later:
        one = (later or first)[0].name
        found = "and the module registers another layer before it" if later else f"and so does {first[1].name!r}"
        rule = str(rules[type(first[0])])
        raise RuleError(f"layer {one!r} reads the input, {found}, while zennit has the rule {rule!r} for the layer "
                        f"alone that is registered first; required: rules by name for those that read the input, as in "
                        f"[{preset!r}, {{{one!r}: {rule!r}}}], or rules='dtd'")


def _of_preset(name: str, layer: Layer, domain: Domain) -> Rule:
    return PRESETS[name].rule(type(layer), domain.hidden, domain.low is not None)


def _derivative(layers: list[Layer], chosen: dict[str, Rule], preset: str) -> str | None:
    derived = {name for name, rule in chosen.items() if rule.name == "gradient"}
    others = [layer.name for layer in layers if layer.name not in derived and "gradient" in _choices(layer)]
    if derived and others:
        raise RuleError(
            f"layer {others[0]!r} has a rule that redistributes relevance, others the rule 'gradient', which does not; "
            "required: 'gradient' for all layers, as rules='gradient', or for none")
    if preset in DERIVATIVES and not others:
        return preset
    return "gradient" if derived else None


def _layer_rule(layer: Layer, rule: Rule, domain: Domain, signed: bool) -> LayerRule:
    """signed: whether negative outputs of the layer can have relevance."""
    allowed = _choices(layer)
    has_weights = isinstance(layer, (Conv2d, Dense, GroupNorm))  # of both signs, and a bias
    if rule.name not in allowed and not (rule.direction and isinstance(layer, (Conv2d, Dense))):
        raise RuleError(f"rule {rule.name!r} does not apply to {type(layer).__name__} {layer.name!r}; required: one of "
                        f"{', '.join(allowed)}")
    if isinstance(layer, LocalResponseNorm):
        return LayerRule(rule, (), _NORM_FORMULAS[rule.name])
    if isinstance(layer, Multiply):
        return LayerRule(rule, (), codes.GRADIENT if rule.name == "gradient" else None)
    bounded = domain.low is not None
    hidden_features = codes.NONNEGATIVE if domain.nonnegative else codes.SIGNED
    positive, value = Term(hidden_features, "positive"), Term(codes.VALUE, "value")
    negative = Term(hidden_features if has_weights else codes.NEGATED, "negative")
    bias = (Term(codes.ONES, "flat"),) if rule.bias == "shared" and has_weights else ()
    match rule.name:
        case "winner":
            return LayerRule(rule)
        case "w2":
            return LayerRule(rule, (Term(codes.ONES, "squared"),))
        case "flat":
            return LayerRule(rule, (Term(codes.ONES, "flat"),))
        case "zB" if not bounded:
            raise RuleError(
                f"rule 'zB' needs bounds of what layer {layer.name!r} reads, which are known only for the network's "
                "input and only where the model gives its value box; use 'z+' in hidden layers, or 'w2' at the input")
        case "zB":
            return LayerRule(rule, (Term(codes.BOX, "positive"),))
        case "proportional":
            return LayerRule(rule, (Term(codes.BOX if bounded else hidden_features, "positive"),))
        case "direction":
            if rule.takes_bounds and not bounded:
                raise RuleError(
                    f"the direction of layer {layer.name!r} takes bounds of the layer's input, which are known only "
                    "for the network's input and only where the model gives its value box; required: a function of "
                    "(a, w)")
            return LayerRule(rule, (Term(codes.VALUE, "direction"),), codes.DIRECTION)
        case "gradient":
            return LayerRule(rule, (Term(codes.ONES, "value"),), codes.GRADIENT)
        case "epsilon":
            return LayerRule(rule, (value, *bias), codes.EPSILON)
        case "z+" if rule.epsilon == 0 and rule.bias == "ignored":
            if signed and (has_weights or not domain.nonnegative):
                return LayerRule(rule, (positive, negative), codes.SIGNS)
            return LayerRule(rule, (positive,))
    if rule.name == "alpha-beta" and (rule.alpha, rule.beta, rule.epsilon, rule.bias) == (1, 0, 0, "ignored"):
        return LayerRule(rule, (positive,))
    if not has_weights:
        raise RuleError(
            f"rule {rule} does not apply to {type(layer).__name__} {layer.name!r}, which has no weights; required: one "
            "of z+ (without parameters), zB, w2, flat, epsilon, gradient")
    if rule.name == "gamma":
        return LayerRule(rule, (positive, negative, *bias), codes.GAMMA)
    return LayerRule(rule, (positive, *((negative,) if rule.beta else ()), *bias), codes.ALPHA_BETA)


def _signed_carriers(graph: Graph, layers: list[Layer], rules: dict[str, Rule]) -> set[str]:
    """Tensors whose negative values can have relevance, because of the layers that read them.

    Scores are none of them: only positive contributions to a class are explained.
    """
    signed: set[str] = set()
    for layer in reversed(layers):
        rule = rules.get(layer.name)
        match layer:
            case Power() | Conv2d() | Dense() | GroupNorm() | Softmax():
                passes_on = True
            case Activation() if not layer.is_zero_at_zero:
                passes_on = True
            case Multiply() if not all(graph.domains[name].nonnegative for name in layer.inputs):
                passes_on = True  # a product's sign may be either
            case Clip(low=0.0) | LeakyReLU(slope=0.0):
                passes_on = False
            case MaxPool2d() if rule and rule.name == "proportional":
                passes_on = False
            case Add() | AveragePool2d() | GlobalAveragePool() | Resize() if rule and rule.name not in (
                    "z+", "alpha-beta"):
                passes_on = True
            case Add() | AveragePool2d() | GlobalAveragePool() | Resize() | MaxPool2d() | Concat() | Flatten() | \
                    Rearrange() | LocalResponseNorm() | LeakyReLU() | Clip() | Activation() | Multiply():
                passes_on = layer.name in signed
            case _:
                passes_on = False
        if passes_on:
            signed.update(_explained_inputs(layer, rule))
    return {name for name in signed if not graph.domains[name].nonnegative}


def _decomposes_negative_scores(graph: Graph, rules: dict[str, LayerRule]) -> bool:
    """Whether all layers that are the first to redistribute a score decompose negative ones."""
    reached, found = {graph.output}, []
    for layer in reversed(graph.layers):
        if layer.name in reached:
            rule = rules.get(layer.name)
            if rule is not None and rule.terms:
                found.append(rule.decomposes_negative)
            else:
                reached.update(_explained_inputs(layer, rule))
    return bool(found) and all(found)


def _signed(graph: Graph, layers: list[Layer], rules: dict[str, LayerRule], signed_scores: bool) -> frozenset[str]:
    signed = {graph.output} if signed_scores else set()
    for layer in reversed(layers):
        rule = rules.get(layer.name)
        if layer.name in signed or (rule is not None and rule.makes_negative):
            signed.update(_explained_inputs(layer, rule))
    return frozenset(signed)


def _absorbs(layer: Layer, rule: LayerRule | None, derivative: str | None) -> bool:
    if isinstance(layer, Rearrange):
        return bool(layer.index.min() < 0) and derivative is None
    return rule is not None and rule.name not in ("winner", "identity", "gradient", "hold", "half")


def _carriers(layers: list[Layer], rules: dict[str, LayerRule]) -> set[str]:
    joined: dict[str, set[str]] = {name: set() for name in (INPUT, *(layer.name for layer in layers))}
    carriers = {INPUT}
    for layer in layers:
        rule = rules.get(layer.name)
        # What is not 0 at 0 has relevance there, which is no multiple of a.
        if (rule is not None and rule.needs_relevance) or isinstance(layer, Softmax) or (
                isinstance(layer, Activation) and not layer.is_zero_at_zero):
            carriers.update(layer.inputs)
        if rule is None or not rule.terms:
            for name in _explained_inputs(layer, rule):
                joined[name].add(layer.name)
                joined[layer.name].add(name)
    waiting = list(carriers)
    while waiting:
        for name in joined[waiting.pop()] - carriers:
            carriers.add(name)
            waiting.append(name)
    return carriers
