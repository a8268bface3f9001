"""What a rule is: how a layer redistributes the relevance of its outputs among its inputs.

Sources: Montavon et al., Pattern Recognition 65 (2017), 4.1 (w2) and 4.2 (z+, zB); Lapuschkin et al., arXiv:1902.10178
(flat); Bach et al., PLOS ONE 10 (2015), formulas 58 and 60 (epsilon, alpha-beta); Montavon et al., LNCS 11700 (2019),
10.2 (gamma). docs/method.md has the formulas.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fastdtd.errors import RuleError, shown
from fastdtd.graph import Array
from fastdtd.kernels import codes

LINEAR_RULES = {
    "z+": "in proportion to a * max(W, 0); for hidden layers",
    "zB": "in proportion to (a - low) * max(W, 0) + (high - a) * max(-W, 0); for an input with known bounds",
    "w2": "in proportion to W^2, whatever the input; for an input without bounds",
    "flat": "evenly, whatever the input and the weights",
    "epsilon": "in proportion to a * W, over their sum and epsilon; relevance can be negative",
    "gamma": "in proportion to a * W, positive contributions counting 1 + gamma times; relevance can be negative",
    "alpha-beta": "alpha times by positive contributions less beta times by negative ones; relevance can be negative",
    "gradient": "no redistribution: the derivative of the output; for all layers or none",
}
GROUP_NORM_RULES = {name: LINEAR_RULES[name] for name in ("z+", "epsilon", "gamma", "alpha-beta", "gradient")}
POOL_RULES = {
    "winner": "all to the largest value of a window",
    "proportional": "in proportion to the values of a window",
}
NORM_RULES = {
    "identity": "passes relevance on: each value is scaled by its own denominator",
    "taylor": "by a first-order expansion in which neighbours take part; relevance can be negative",
    "gradient": "no redistribution: the derivative",
}
PRODUCT_RULES = {
    "hold": "all to what the gate multiplies, with the gate held constant",
    "half": "half to it, half to the gate",
    "gradient": "no redistribution: the derivative",
}
BIASES = {
    "ignored": "left out of the sums that relevance is redistributed by",
    "absorbed": "part of these sums; its part of the relevance goes to the ledger",
    "shared": "part of these sums; its part of the relevance goes to all inputs evenly",
}
PARAMETERS: dict[str, dict[str, float | str]] = {
    "z+": {"bias": "ignored", "epsilon": 0.0},
    "epsilon": {"epsilon": 1e-6, "bias": "absorbed"},
    "gamma": {"gamma": 0.25, "epsilon": 1e-6, "bias": "absorbed"},
    "alpha-beta": {"alpha": 2.0, "beta": 1.0, "epsilon": 1e-6, "bias": "absorbed"},
    "taylor": {"epsilon": 1e-6},
}  # that a rule takes, and their defaults
_NEUTRAL: dict[str, float | str] = {"alpha": 1.0, "beta": 0.0, "gamma": 0.0, "epsilon": 0.0, "bias": "ignored"}
_NAMES = {**LINEAR_RULES, **POOL_RULES, **NORM_RULES, **PRODUCT_RULES}
_MAX_SQUARED = 1e15
_MAX_PARAMETER = 1e6


@dataclass(frozen=True)
class Rule:
    """A rule and its parameters.

    Parameters
    ----------
    name : str
        One of those that `fastdtd rules` lists.
    alpha, beta, gamma, epsilon : float, optional
        From 0 to 1e6; epsilon is added to the magnitude of a denominator. Default: the rule's own.
    bias : {"ignored", "absorbed", "shared"}, optional
        What the bias is in the sums that relevance is redistributed by. Default: the rule's own.
    direction : callable, optional
        See `search_direction`.

    Raises
    ------
    RuleError
        An unknown rule, a parameter that it does not have, or a value out of range.

    Examples
    --------
    >>> import fastdtd
    >>> fastdtd.Rule("epsilon", epsilon=0.25)
    Rule('epsilon(epsilon=0.25)')
    """

    name: str
    alpha: float = None  # type: ignore[assignment]  # None: the default of the rule, put in its place when made
    beta: float = None  # type: ignore[assignment]
    gamma: float = None  # type: ignore[assignment]
    epsilon: float = None  # type: ignore[assignment]
    bias: str = None  # type: ignore[assignment]
    direction: Callable[..., float] | None = None

    def __post_init__(self) -> None:
        if self.direction is not None and self.name != "direction":
            raise RuleError(f"rule {self.name!r} has a direction; required: search_direction(function), a rule")
        if self.direction is None and (not isinstance(self.name, str) or self.name not in _NAMES):
            raise RuleError(
                f"rule {shown(self.name)} is unknown; required: one of {', '.join(_NAMES)}, with parameters as in "
                "'epsilon(epsilon=0.25)'")
        own = PARAMETERS.get(self.name, {})
        for key, neutral in _NEUTRAL.items():
            value = getattr(self, key)
            if value is None:
                object.__setattr__(self, key, own.get(key, neutral))
            elif key not in own:
                raise RuleError(f"rule {self.name!r} has a parameter {key!r}; required: {' or '.join(own) or 'none'}")
            elif key == "bias":
                if not isinstance(value, str) or value not in BIASES:
                    raise RuleError(f"rule {self.name!r} has bias {shown(value)}; required: one of {', '.join(BIASES)}")
            else:
                object.__setattr__(self, key, self._number(key, value))

    def _number(self, key: str, value: object) -> float:
        try:
            number = float(value)  # type: ignore[arg-type]  # what it is not is refused here
        except (TypeError, ValueError, OverflowError, RuntimeError):
            number = math.nan
        if not 0 <= number <= _MAX_PARAMETER:
            raise RuleError(
                f"rule {self.name!r} has {key} {shown(value)}; required: a number from 0 to {_MAX_PARAMETER:g}")
        return number

    @classmethod
    def parse(cls, text: str) -> Rule:
        """A rule from its name and, in parentheses, parameters: "epsilon(epsilon=0.25)"."""
        match = re.fullmatch(r"\s*([\w+*-]+)\s*(?:\((.*)\))?\s*", text, re.DOTALL)
        if match is None:
            return cls(text)  # which says what is wrong with it
        given: dict[str, str] = {}
        for part in filter(str.strip, (match[2] or "").split(",")):
            key, _, value = (piece.strip() for piece in part.partition("="))
            if key not in _NEUTRAL:
                own = " or ".join(PARAMETERS.get(match[1], {})) or "none"
                raise RuleError(f"rule {text!r} has a parameter {key!r}; required: {own}")
            given[key] = value
        return cls(match[1], **given)  # type: ignore[arg-type]  # numbers are made of text

    @property
    def takes_bounds(self) -> bool:
        """Whether `direction` is a function of (a, w, low, high)."""
        return self.direction is not None and len(inspect.signature(self.direction).parameters) == 4

    def __str__(self) -> str:
        """As `parse` reads it."""
        parameters = PARAMETERS.get(self.name, {})
        given = [f"{name}={value if isinstance(value, str) else format(value, 'g')}"
                 for name, default in parameters.items() if (value := getattr(self, name)) != default]
        return f"{self.name}({', '.join(given)})" if given else self.name

    def __repr__(self) -> str:
        return f"Rule({str(self)!r})" if self.direction is None else f"search_direction({self.direction!r})"


def search_direction(function: Callable[..., float]) -> Rule:
    """The method's general rule, for a convolution or dense layer: R_i = sum over j of v_ij w_ij / (sum over i of v_ij
    w_ij) R_j.

    Parameters
    ----------
    function : callable
        v(a, w), the direction in which a neuron's root point lies, from an activation and a weight; or
        v(a, w, low, high), with the bounds of what the layer reads. Two or four numbers in, one out, in Python that
        Numba can compile. Relevance of an output whose z is 0 goes to the ledger.

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
    >>> import fastdtd
    >>> z_plus = fastdtd.search_direction(lambda a, w: a if w > 0 else 0)
    >>> w2 = fastdtd.search_direction(lambda a, w: w)
    >>> z_b = fastdtd.search_direction(lambda a, w, low, high: a - low if w > 0 else a - high)
    >>> explainer = fastdtd.Explainer(fastdtd.load("squeezenet1_1"), {"conv1": z_b})

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


@dataclass(frozen=True)
class Term:
    """A product of the backward pass: c_in <- V^T (ratio * c), for the features u (fastdtd.kernels.codes) of the
    layer's input.

    weights says what V is of W: its "positive" or "negative" part, its "value", "squared", "flat" (1); "direction": V
    depends on a too.
    """

    features: int
    weights: str

    def v(self, weight: Array) -> list[Array]:
        """V, one array of the shape of `weight` for each feature of an input."""
        positive, negative = np.maximum(weight, 0), np.maximum(-weight, 0)
        match self.weights:
            case "value":
                return [weight]
            case "squared":
                if weight.size and np.abs(weight).max() > _MAX_SQUARED:
                    raise RuleError(
                        f"a weight of {np.abs(weight).max():g} is too large to be squared in float32; use 'flat' here")
                return [weight * weight]
            case "flat":
                return [np.ones_like(weight)]
        both = [positive, negative] if self.weights == "positive" else [negative, positive]
        return both if self.features in (codes.SIGNED, codes.BOX) else both[:1]

    def w(self, weight: Array) -> Array:
        """What z is summed over, next to V: z of the negative part of W is that of the positive part of -W."""
        return -weight if self.weights == "negative" else weight


@dataclass(frozen=True)
class LayerRule:
    """The rule of one layer, and how it is computed.

    terms : tuple of Term
        Products of the backward pass, each with a ratio of its own; none for what is no product (the winner of a
        window).
    formula : int or None
        How the ratios follow from the layer's sums (fastdtd.kernels.codes). None: one ratio, ``|x| / z``, z the sum of
        u V.
    """

    rule: Rule
    terms: tuple[Term, ...] = ()
    formula: int | None = None

    @property
    def name(self) -> str:
        return self.rule.name

    @property
    def sums(self) -> tuple[Term, ...]:
        """What is summed forward, beside the layer's output: the z of each term. The last one is over W itself."""
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
    def needs_relevance(self) -> bool:
        """Whether the layer's input has to carry relevance R, here no multiple of a, instead of the factor c."""
        return (self.formula not in (None, codes.SIGNS, codes.NORM_IDENTITY)
                or any(term.features in (codes.BOX, codes.ONES) for term in self.terms))

    @property
    def makes_negative(self) -> bool:
        """Whether the layer's input may get negative relevance of positive."""
        if self.formula == codes.ALPHA_BETA:
            return self.rule.beta > 0
        return self.formula in (codes.EPSILON, codes.GAMMA, codes.DIRECTION, codes.GRADIENT, codes.NORM_TAYLOR,
                                codes.NORM_GRADIENT)

    @property
    def decomposes_negative(self) -> bool:
        """Whether it is a rule of layer-wise relevance propagation, which decomposes negative relevance as it does
        positive. A deep Taylor decomposition is one of positive values."""
        return self.formula in (codes.EPSILON, codes.GAMMA, codes.ALPHA_BETA)

    @property
    def retains(self) -> bool:
        """Whether a stabiliser or a bias may keep relevance."""
        return self.formula in (codes.EPSILON, codes.GAMMA, codes.ALPHA_BETA, codes.DIRECTION, codes.NORM_TAYLOR)
