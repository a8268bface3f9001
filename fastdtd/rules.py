"""Which rule each layer gets, and what a rule is: how relevance is shared among the numbers that a layer reads.

The table is that of docs/method.md, after Montavon et al., Pattern Recognition 65 (2017), 4.1 (w2) and 4.2 (z+, zB); Lapuschkin et al.,
arXiv:1902.10178 (flat); Bach et al., PLOS ONE 10 (2015), formulas 58 and 60 (epsilon, alpha-beta); Montavon et al., LNCS 11700 (2019), 10.2
(gamma).
"""

from __future__ import annotations

import dataclasses
import fnmatch
import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fastdtd.errors import RuleError
from fastdtd.graph import (
    INPUT,
    LAYER_TYPES,
    Add,
    Array,
    AveragePool2d,
    Clip,
    Concat,
    Conv2d,
    Dense,
    Domain,
    Flatten,
    GlobalAveragePool,
    Graph,
    Layer,
    LeakyReLU,
    LocalResponseNorm,
    MaxPool2d,
    Power,
    Rearrange,
)
from fastdtd.kernels import codes

# Each rule's text, and the parameters that it takes beside their defaults.
LINEAR_RULES = {
    "z+": "shares by a * max(W, 0); for hidden layers",
    "zB": "shares by (a - low) * max(W, 0) + (high - a) * max(-W, 0); for an input with known bounds",
    "w2": "shares by W^2, whatever the input; for an input without bounds",
    "flat": "shares evenly, whatever the input and the weights",
    "epsilon": "shares by a * W over their sum and epsilon; relevance can be negative",
    "gamma": "shares by a * W, what speaks for the output counting 1 + gamma times; relevance can be negative",
    "alpha-beta": "shares alpha times what speaks for the output less beta times what speaks against it; relevance can be negative",
    "gradient": "no sharing: the derivative of the output; for all layers or none",
}
POOL_RULES = {
    "winner": "gives all to the largest number of a window",
    "proportional": "shares in proportion to the numbers of a window",
}
NORM_RULES = {
    "identity": "passes relevance on: each number is scaled by its own denominator",
    "taylor": "shares by a first-order expansion that neighbours take part in; relevance can be negative",
    "gradient": "no sharing: the derivative",
}
PRESETS = {
    "dtd": "by each layer's input domain: z+ in hidden layers, zB at an input with bounds, w2 at one without",
    "innvestigate.deep_taylor": "iNNvestigate's: z+ in every layer, the first too; average pools share evenly; no additions",
    "innvestigate.deep_taylor.bounded": "the same, with zB in layers that read the input",
    "zennit.epsilon_plus": "zennit's EpsilonPlus: z+ with positive biases in convolutions, epsilon in dense layers",
    "zennit.epsilon_plus_flat": "the same, flat in the first",
    "zennit.epsilon_alpha2_beta1": "zennit's EpsilonAlpha2Beta1: alpha 2, beta 1 in convolutions, epsilon in dense layers",
    "zennit.epsilon_gamma_box": "zennit's EpsilonGammaBox: gamma in convolutions, epsilon in dense layers, zB in the first",
    "zennit.excitation_backprop": "zennit's ExcitationBackprop: z+ with positive biases in every layer",
    "captum.lrp": "Captum's LRP: epsilon in every layer",
    "gradient": "the derivative of the score",
    "gradient*input": "the derivative of the score times the input",
    "sensitivity": "the square of the score's derivative, to compare with",
}
DERIVATIVES = ("gradient", "gradient*input", "sensitivity")
BIASES = {
    "ignored": "left out of the sums that relevance is shared by",
    "absorbed": "part of these sums; its share goes to the ledger",
    "shared": "part of these sums; its share goes to all inputs evenly",
}
PARAMETERS: dict[str, dict[str, float | str]] = {
    "z+": {"bias": "ignored", "epsilon": 0.0},
    "epsilon": {"epsilon": 1e-6, "bias": "absorbed"},
    "gamma": {"gamma": 0.25, "epsilon": 1e-6, "bias": "absorbed"},
    "alpha-beta": {"alpha": 2.0, "beta": 1.0, "epsilon": 1e-6, "bias": "absorbed"},
    "taylor": {"epsilon": 1e-6},
}
_NORM_FORMULAS = {"identity": codes.NORM_IDENTITY, "taylor": codes.NORM_TAYLOR, "gradient": codes.NORM_GRADIENT}
_PLAIN = "alpha-beta(alpha=1, beta=0, epsilon=0, bias=ignored)"
_LARGEST_SQUARED = 1e15
_LARGEST_NUMBER = 1e6


@dataclass(frozen=True)
class Rule:
    """A rule and its parameters; those that it does not have are at what makes no difference.

    epsilon is added to the size of a denominator. bias is one of BIASES.
    """

    name: str
    alpha: float = 1.0
    beta: float = 0.0
    gamma: float = 0.0
    epsilon: float = 0.0
    bias: str = "ignored"
    direction: Callable[..., float] | None = None

    @property
    def asks_for_bounds(self) -> bool:
        """Whether `direction` is a function of (a, w, low, high)."""
        return self.direction is not None and len(inspect.signature(self.direction).parameters) == 4

    def __str__(self) -> str:
        """As `rule_of` reads it."""
        parameters = PARAMETERS.get(self.name, {})
        given = [f"{name}={value if isinstance(value, str) else format(value, 'g')}" for name, default in parameters.items()
                 if (value := getattr(self, name)) != default]
        return f"{self.name}({', '.join(given)})" if given else self.name


def search_direction(function: Callable[..., float]) -> Rule:
    """The method's general rule, for a convolution or dense layer: R_i = sum over j of v_ij w_ij / (sum over i of v_ij w_ij) R_j.

    Parameters
    ----------
    function : callable
        v(a, w), the direction in which a neuron's root point lies, from an activation and a weight; or v(a, w, low, high), with the bounds
        of what the layer reads. Two or four numbers in, one out, in Python that Numba can compile. What of an output's relevance meets
        z = 0 goes to the ledger.

    Returns
    -------
    Rule
        To be given as a layer's rule. It computes connection by connection, which takes longer than the named rules.

    Raises
    ------
    RuleError
        What was given is no function of two or four numbers.

    Examples
    --------
    >>> z_plus = search_direction(lambda a, w: a if w > 0 else 0)
    >>> w2 = search_direction(lambda a, w: w)
    >>> z_b = search_direction(lambda a, w, low, high: a - low if w > 0 else a - high)
    >>> Explainer(model, {"conv1": z_b})

    References
    ----------
    Montavon et al., Pattern Recognition 65 (2017), formula 5 and the rules that follow from it.
    """
    try:
        count = len(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        count = 0
    if count not in (2, 4):
        raise RuleError(f"direction {function!r} given; required: a function of (a, w) or of (a, w, low, high)")
    return Rule("direction", direction=function)


def rule_of(text: str) -> Rule:
    """A rule from its text: a name, and in parentheses the parameters that differ from their defaults, as in "epsilon(epsilon=0.25)"."""
    match = re.fullmatch(r"\s*([\w+*-]+)\s*(?:\((.*)\))?\s*", text, re.DOTALL)
    name = match[1] if match else text
    if match is None or name not in {**LINEAR_RULES, **POOL_RULES, **NORM_RULES}:
        raise RuleError(f"rule {text!r} is unknown; required: one of {', '.join({**LINEAR_RULES, **POOL_RULES, **NORM_RULES})}, with "
                        "parameters as in 'epsilon(epsilon=0.25)'")
    values = dict(PARAMETERS.get(name, {}))
    for part in filter(str.strip, (match[2] or "").split(",")):
        key, _, value = (piece.strip() for piece in part.partition("="))
        if key not in values:
            raise RuleError(f"rule {text!r} has a parameter {key!r}; required: {' or '.join(values) or 'none'}")
        if key == "bias":
            if value not in BIASES:
                raise RuleError(f"rule {text!r} has bias {value!r}; required: one of {', '.join(BIASES)}")
            values[key] = value
            continue
        try:
            values[key] = number = float(value)
        except ValueError:
            number = math.nan
        if not 0 <= number <= _LARGEST_NUMBER:
            raise RuleError(f"rule {text!r} has {key} {value!r}; required: a number from 0 to {_LARGEST_NUMBER:g}")
    return dataclasses.replace(Rule(name), **values)  # type: ignore[arg-type]


Rules = str | Mapping[str, str | Rule] | Sequence[str | Mapping[str, str | Rule]]


@dataclass(frozen=True)
class Term:
    """A product on the way back: c_in <- V^T (ratio * c), for the features u (fastdtd.kernels.codes) of what is read.

    weights says what V is of W: "positive" and "negative" parts, "value", "squared", "flat" (1); "direction": V depends on a too.
    """

    features: int
    weights: str

    def share_weights(self, weight: Array) -> list[Array]:
        """V, one array of the shape of `weight` for each feature of an input."""
        positive, negative = np.maximum(weight, 0), np.maximum(-weight, 0)
        match self.weights:
            case "value":
                return [weight]
            case "squared":
                if weight.size and np.abs(weight).max() > _LARGEST_SQUARED:
                    raise RuleError(f"a weight of {np.abs(weight).max():g} is too large to be squared in float32; use 'flat' here")
                return [weight * weight]
            case "flat":
                return [np.ones_like(weight)]
        both = [positive, negative] if self.weights == "positive" else [negative, positive]
        return both if self.features in (codes.SIGNED, codes.BOX) else both[:1]


@dataclass(frozen=True)
class Assigned:
    """The rule of one layer, and how it is computed.

    terms : tuple of Term
        Products on the way back, each with a ratio of its own; none for what is no product (the winner of a window).
    formula : int or None
        How the ratios follow from the layer's sums (fastdtd.kernels.codes). None: one ratio, |x| / z, z the sum of u V.
    """

    rule: Rule
    terms: tuple[Term, ...] = ()
    formula: int | None = None

    @property
    def name(self) -> str:
        return self.rule.name

    @property
    def sums(self) -> tuple[Term, ...]:
        """What is summed forward, beside the layer's output: of each term its z. The last one is over W itself."""
        match self.formula:
            case None:
                return self.terms
            case codes.SIGNS | codes.GAMMA:
                main = self.terms[0]
            case codes.ALPHA_BETA:
                main = self.terms[0]
                return (*self.terms[1:], main)
            case _:
                main = Term(codes.NONNEGATIVE, "positive")
        return (*(term for term in self.terms if term.weights == "flat"), main)

    @property
    def carries_relevance(self) -> bool:
        """Whether what the layer reads has to carry relevance R, which is no multiple of a here."""
        return (self.formula not in (None, codes.SIGNS, codes.NORM_IDENTITY)
                or any(term.features in (codes.BOX, codes.ONES) for term in self.terms))

    @property
    def loses(self) -> bool:
        """Whether a stabiliser or a bias may keep relevance."""
        return self.formula in (codes.EPSILON, codes.GAMMA, codes.ALPHA_BETA, codes.DIRECTION, codes.NORM_TAYLOR)


def assign(graph: Graph, rules: Rules = "dtd") -> dict[str, Assigned]:
    """The rule of each layer that redistributes.

    Parameters
    ----------
    graph : Graph
        In canonical form.
    rules : str, mapping of str to str or Rule, or sequence of these
        A preset, one of PRESETS. "dtd" chooses by each layer's input domain: z+ in hidden layers, zB at an input with bounds, w2 at one
        without; all presets give max-pools' relevance to the winner. A mapping changes rules of "dtd", or of the preset before it in a
        sequence: from a layer's name, a pattern such as "conv*", or a type such as "type:dense" to a rule as `rule_of` reads it or
        `search_direction` makes it; where several match, the last one counts.

    Returns
    -------
    dict of str to Assigned
        By layer name. Layers that only pass relevance on (ReLU, concatenation, flatten) are left out.

    Raises
    ------
    RuleError
        An unknown rule, a pattern that matches no layer with rules, or a rule that does not apply to a layer's kind or domain.
    """
    given = [rules] if isinstance(rules, (str, Mapping)) else list(rules) if isinstance(rules, Sequence) else [rules]
    preset = given.pop(0) if given and isinstance(given[0], str) else "dtd"
    if not isinstance(preset, str) or preset not in PRESETS:
        raise RuleError(f"rules {preset!r} is unknown; required: {', '.join(map(repr, PRESETS))}, or a mapping from layers to rules "
                        f"({', '.join([*LINEAR_RULES, *POOL_RULES])})")
    if not all(isinstance(part, Mapping) and all(isinstance(pattern, str) and isinstance(rule, (str, Rule))
                                                 for pattern, rule in part.items()) for part in given):
        raise RuleError(f"rules {rules!r} given; required: a preset such as 'dtd', or a mapping from layer names or patterns to rules, all "
                        "of them text")
    ruled = [layer for layer in graph if _choices(layer)]
    chosen = {layer.name: rule_of(_of_preset(preset, layer, input_domain(graph, layer))) for layer in ruled}
    types = {layer.name: f"type:{name}" for layer in ruled for name, kind in LAYER_TYPES.items() if type(layer) is kind}
    for part in given:
        assert isinstance(part, Mapping)
        for pattern, text in part.items():
            try:
                rule = text if isinstance(text, Rule) else rule_of(text)
            except RuleError as error:
                raise RuleError(f"for {pattern!r}: {error}") from None
            fitting = [name for name in chosen if pattern in (name, types[name])] or fnmatch.filter(chosen, pattern)
            if not fitting:
                raise RuleError(f"no layer with a rule is named {pattern!r} or matches it; they are {', '.join(chosen)}")
            chosen.update(dict.fromkeys(fitting, rule))
    derived = {name for name, rule in chosen.items() if rule.name == "gradient"}
    if derived and (plain := [layer.name for layer in ruled if layer.name not in derived and "gradient" in _choices(layer)]):
        raise RuleError(f"layer {plain[0]!r} has a rule that shares relevance, others the rule 'gradient', which does not; required: "
                        "'gradient' for all layers, as rules='gradient', or for none")
    signed = _signed_carriers(graph, chosen)
    return {layer.name: _assigned(layer, chosen[layer.name], input_domain(graph, layer), layer.name in signed) for layer in ruled}


def derived_from(rules: Rules) -> str | None:
    """What is derived and not shared, by the name of the preset: "gradient", "gradient*input" or "sensitivity"; None for other rules."""
    first, *others = [rules] if isinstance(rules, (str, Mapping)) else list(rules) or ["dtd"]
    if isinstance(first, str) and first in DERIVATIVES:
        return first
    given = {str(rule) for part in (first, *others) if isinstance(part, Mapping) for rule in part.values()}
    return "gradient" if "gradient" in given else None


def input_domain(graph: Graph, layer: Layer) -> Domain:
    """The domain of what `layer` reads; of both inputs together for an addition."""
    return graph.domains[layer.name if isinstance(layer, Add) else layer.inputs[0]]


def _choices(layer: Layer) -> dict[str, str]:
    """The rules that a layer of this kind can have; none where it only passes relevance on."""
    match layer:
        case Conv2d() | Dense() | Add() | AveragePool2d() | GlobalAveragePool():
            return LINEAR_RULES
        case MaxPool2d():
            return POOL_RULES
        case LocalResponseNorm():
            return NORM_RULES
    return {}


def _of_preset(preset: str, layer: Layer, domain: Domain) -> str:
    if isinstance(layer, MaxPool2d):
        return "winner"
    if preset in DERIVATIVES:
        return "gradient"
    if isinstance(layer, LocalResponseNorm):
        return "identity"
    has_weights, first = isinstance(layer, (Conv2d, Dense)), not domain.hidden
    package, _, name = preset.partition(".")
    match package:
        case "innvestigate":
            if isinstance(layer, Add):
                raise RuleError(f"layer {layer.name!r} is an addition, to both inputs of which iNNvestigate passes all relevance, so that "
                                "it doubles; required: a network without, or rules='dtd'")
            if not has_weights:
                return "flat"
            return "zB" if first and name == "deep_taylor.bounded" else _PLAIN
        case "captum":
            return "epsilon(epsilon=1e-9)"
        case "zennit" if not has_weights:
            return "epsilon(epsilon=1e-6)"
        case "zennit" if first and name == "epsilon_plus_flat":
            return "flat"
        case "zennit" if first and isinstance(layer, Conv2d) and name == "epsilon_gamma_box":
            return "zB"
        case "zennit" if isinstance(layer, Dense) and name != "excitation_backprop":
            return "epsilon(epsilon=1e-6)"
        case "zennit":
            of_convolutions = {"epsilon_alpha2_beta1": "alpha-beta(alpha=2, beta=1)", "epsilon_gamma_box": "gamma(gamma=0.25)"}
            return of_convolutions.get(name, "z+(bias=absorbed, epsilon=1e-6)")
    if domain.hidden:
        return "z+"
    return "w2" if domain.low is None else "zB"


def _assigned(layer: Layer, rule: Rule, domain: Domain, signed: bool) -> Assigned:
    """signed: whether negative numbers that the layer makes can have relevance."""
    allowed = _choices(layer)
    has_weights = isinstance(layer, (Conv2d, Dense))
    if rule.name not in allowed and not (rule.direction and has_weights):
        raise RuleError(f"rule {rule.name!r} does not apply to {type(layer).__name__} {layer.name!r}; required: one of "
                        f"{', '.join(allowed)}")
    if isinstance(layer, LocalResponseNorm):
        return Assigned(rule, (), _NORM_FORMULAS[rule.name])
    bounded = domain.low is not None
    hidden_features = codes.NONNEGATIVE if domain.nonnegative else codes.SIGNED
    positive, value = Term(hidden_features, "positive"), Term(codes.VALUE, "value")
    negative = Term(hidden_features if has_weights else codes.NEGATED, "negative")
    bias = (Term(codes.ONES, "flat"),) if rule.bias == "shared" and has_weights else ()
    match rule.name:
        case "winner":
            return Assigned(rule)
        case "w2":
            return Assigned(rule, (Term(codes.ONES, "squared"),))
        case "flat":
            return Assigned(rule, (Term(codes.ONES, "flat"),))
        case "zB" if not bounded:
            raise RuleError(f"rule 'zB' needs bounds of what layer {layer.name!r} reads, which are known only for the network's input and "
                            "only where the model gives its value box; use 'z+' in hidden layers, or 'w2' at the input")
        case "zB":
            return Assigned(rule, (Term(codes.BOX, "positive"),))
        case "proportional":
            return Assigned(rule, (Term(codes.BOX if bounded else hidden_features, "positive"),))
        case "direction":
            if rule.asks_for_bounds and not bounded:
                raise RuleError(f"the direction of layer {layer.name!r} asks for bounds of what it reads, which are known only for the "
                                "network's input and only where the model gives its value box; required: a function of (a, w)")
            return Assigned(rule, (Term(codes.VALUE, "direction"),), codes.DIRECTION)
        case "gradient":
            return Assigned(rule, (Term(codes.ONES, "value"),), codes.GRADIENT)
        case "epsilon":
            return Assigned(rule, (value, *bias), codes.EPSILON)
        case "z+" if rule.epsilon == 0 and rule.bias == "ignored":
            if signed and (has_weights or not domain.nonnegative):
                return Assigned(rule, (positive, negative), codes.SIGNS)
            return Assigned(rule, (positive,))
    if rule.name == "alpha-beta" and (rule.alpha, rule.beta, rule.epsilon, rule.bias) == (1, 0, 0, "ignored"):
        return Assigned(rule, (positive,))
    if not has_weights:
        raise RuleError(f"rule {rule} does not apply to {type(layer).__name__} {layer.name!r}, which has no weights; required: one of "
                        "z+ (without parameters), zB, w2, flat, epsilon, gradient")
    if rule.name == "gamma":
        return Assigned(rule, (positive, negative, *bias), codes.GAMMA)
    return Assigned(rule, (positive, *((negative,) if rule.beta else ()), *bias), codes.ALPHA_BETA)


def _signed_carriers(graph: Graph, rules: dict[str, Rule]) -> set[str]:
    """Tensors whose negative numbers can have relevance, because of what reads them. The scores are none: only what speaks for a class
    is explained."""
    signed: set[str] = set()
    for layer in reversed(graph.layers):
        rule = rules.get(layer.name)
        match layer:
            case Power() | Conv2d() | Dense():
                gives = True
            case Clip(low=0.0) | LeakyReLU(slope=0.0):
                gives = False
            case MaxPool2d() if rule and rule.name == "proportional":
                gives = False
            case Add() | AveragePool2d() | GlobalAveragePool() if rule and rule.name not in ("z+", "alpha-beta"):
                gives = True
            case Add() | AveragePool2d() | GlobalAveragePool() | MaxPool2d() | Concat() | Flatten() | Rearrange() | LocalResponseNorm() | \
                    LeakyReLU() | Clip():
                gives = layer.name in signed
            case _:
                gives = False
        if gives:
            signed.update(layer.inputs)
    return {name for name in signed if not graph.domains[name].nonnegative}


def absorbers(graph: Graph, rules: dict[str, Assigned]) -> list[str]:
    """Layers that may keep relevance from going on: those that share by a rule, and zeros of a rearrangement."""
    def absorbs(layer: Layer) -> bool:
        if isinstance(layer, Rearrange):
            return bool(layer.index.min() < 0) and not any(rule.name == "gradient" for rule in rules.values())
        rule = rules.get(layer.name)
        return rule is not None and rule.name not in ("winner", "identity", "gradient")

    return [layer.name for layer in graph if absorbs(layer)]


def relevance_carriers(graph: Graph, rules: dict[str, Assigned]) -> set[str]:
    """Tensors that carry relevance back instead of its factor c: the input, what a rule with its own features reads, and what is joined to
    such a tensor by layers that only pass relevance on. All where derivatives go back instead."""
    if any(rule.name == "gradient" for rule in rules.values()):
        return set(graph.shapes)
    joined: dict[str, set[str]] = {name: set() for name in graph.shapes}
    carriers = {INPUT}
    for layer in graph:
        rule = rules.get(layer.name)
        if rule is not None and rule.carries_relevance:
            carriers.update(layer.inputs)
        if rule is None or not rule.terms:
            for name in layer.inputs:
                joined[name].add(layer.name)
                joined[layer.name].add(name)
    waiting = list(carriers)
    while waiting:
        for name in joined[waiting.pop()] - carriers:
            carriers.add(name)
            waiting.append(name)
    return carriers
