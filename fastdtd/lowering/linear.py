"""Layers that redistribute by sums (convolution, dense, addition, pools in proportion): what is the same for all of
them.

Forward, a layer's output and its rule's sums, and the ratios that follow; backward, what it absorbs, then each term of
its rule. How a sum is computed and a term redistributed is the family's own.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import numpy as np

from fastdtd import graph as g
from fastdtd.errors import RuleError
from fastdtd.graph import Array, Layer
from fastdtd.kernels import codes
from fastdtd.lowering.builder import ABSORBED, Builder, read_only, zeros
from fastdtd.protocols import Kernel
from fastdtd.rules import LayerRule, Rule, Term
from fastdtd.schedule import State, Tensor, View

_BIASES = {"ignored": codes.IGNORED, "absorbed": codes.ABSORBED, "shared": codes.SHARED}


class SumStep(Protocol):
    def __call__(self, b: Builder, layer: Any, index: int, features: int, arguments: dict[str, Any]) -> None:
        """Write down the step of the rule's sum `index`. arguments: what all such kernels take."""


class TermStep(Protocol):
    def __call__(self, b: Builder, layer: Any, part: int, term: Term, source: str, arguments: dict[str, Any]) -> None:
        """Write down what the layer's input `source` gets through the rule's term `part`. arguments: as above."""


def forward(b: Builder, layer: Layer, sum_step: SumStep, window_counts: tuple[Array, Array] | None = None) -> None:
    """window_counts: by how much a mean is divided, along each axis; None: the output is a sum."""
    rule = b.rule(layer)
    assert rule is not None
    result, (low, high) = b.result(layer)
    x = b.activation(result)
    relevance = b.carries_relevance(result)
    if rule.formula is None:
        saved = b.saved(layer)
        _sum(b, layer, rule, 0, sum_step, x, saved.view, saved.dead, (low, high), relevance, _bias(b, layer),
             window_counts)
        return
    views = {term: b.saved(layer, part).view for part, term in enumerate(rule.terms)}
    first, dead = b.saved(layer).view, b.saved(layer).dead
    channels, height, width = b.graph.shapes[layer.name]
    unused = b.state("unused", (), np.uint8)  # the formula finds out what is absorbed
    for index, term in enumerate(rule.sums):
        _sum(b, layer, rule, index, sum_step, x, views.get(term, first), unused, (-math.inf, math.inf), True,
             zeros(channels), window_counts)
    if rule.rule.direction:
        a, (a_low, a_high) = b.activation(layer.inputs[0]), b.bounds(layer.inputs[0])
        b.step(_direction_kernels(b, rule.rule)[0], b.batch * channels, z=first, a=a, low=a_low, high=a_high,
               a_channel=a.channel, **_as_convolution(layer))
    second = next((views[term] for term in rule.terms if term.weights == "negative"), first)
    third = next((views[term] for term in rule.terms[1:] if term.weights == "flat"), first)
    down, across = window_counts or (read_only(np.ones(height, np.float32)), read_only(np.ones(width, np.float32)))
    b.step(
        b.kernels.ratios_forward, b.batch * channels, x=x, ratio_pos=first, ratio_neg=second, ratio_bias=third,
        absorbed=b.saved(layer, ABSORBED).view if rule.retains else first, dead=dead,
        dead_neg=dead if second is first else b.saved(layer, 1).dead, bias=_bias(b, layer), count_h=down,
        count_w=across, x_channel=x.channel, formula=rule.formula, factor=_factor(rule), beta=rule.rule.beta,
        epsilon=rule.rule.epsilon, bias_mode=_BIASES[rule.rule.bias], x_min=low, x_max=high, relevance=relevance)


def _sum(b: Builder, layer: Layer, rule: LayerRule, index: int, sum_step: SumStep, x: Tensor, ratio: View, dead: State,
         clip: tuple[float, float], relevance: bool, bias: Array, window_counts: tuple[Array, Array] | None) -> None:
    a = b.activation(layer.inputs[0])
    arguments: dict[str, Any] = {
        "x": x, "ratio": ratio, "dead": dead, "a": a, "x_channel": x.channel, "a_channel": a.channel,
        "relevance": relevance
    }
    if window_counts is None:
        arguments |= {"x_min": clip[0], "x_max": clip[1]}
    else:  # a pool, with which no activation is fused
        arguments |= {"count_h": window_counts[0], "count_w": window_counts[1]}
    if isinstance(layer, (g.Conv2d, g.Dense, g.GroupNorm)):
        arguments["bias"] = bias
    sum_step(b, layer, index, rule.sums[index].features, arguments)


def backward(b: Builder, layer: Layer, term_step: TermStep) -> None:
    rule = b.rule(layer)
    assert rule is not None
    c = b.factor(b.result(layer)[0])
    if layer.name in b.columns:
        if rule.retains:
            _absorb(b, layer, b.kernels.absorb_remainder_redistribute, absorbed=b.saved(layer, ABSORBED).view)
        elif rule.formula in (None, codes.SIGNS):
            for part in range(len(rule.terms)):
                saved = b.saved(layer, part)
                _absorb(b, layer, b.kernels.absorb_dead_redistribute, condition=saved.dead, ratio=saved.view,
                        dead=saved.dead)
    for part, term in enumerate(rule.terms):
        for source in layer.inputs:
            accumulate = b.accumulates(source) or part > 0  # of several terms, all but the first add to what is there
            c_in, a, (low, high) = b.factor(source), _activation_for(b, term, source), b.bounds(source)
            arguments: dict[str, Any] = {
                "c_in": c_in, "c": c, "ratio": b.saved(layer, part).view, "a": a, "low": low, "high": high,
                "c_in_channel": c_in.channel, "c_channel": c.channel, "a_channel": a.channel,
                "relevance": b.carries_relevance(source), "accumulate": accumulate
            }
            if term.weights == "direction":
                del arguments["relevance"]  # which is what always comes back by a direction
                b.step(
                    _direction_kernels(b, rule.rule)[1], b.batch * b.graph.shapes[source][0], **arguments,
                    **_as_convolution(layer))
            else:
                term_step(b, layer, part, term, source, arguments)


def _absorb(b: Builder, layer: Layer, kernel: Kernel, **arguments: Any) -> None:
    """What a layer keeps goes to the ledger. Workers that share an image have parts of it each, whose sums come after.
    """
    c = b.factor(b.result(layer)[0])
    common: dict[str, Any] = {"ledger": b.ledger, "column": b.columns[layer.name]}
    parts, shared = b.kernels.ABSORBING_PARTS, b.workers > 1
    sums = b.state("sums", (parts,), np.float64)
    b.step(kernel, b.batch * parts, c=c, c_channel=c.channel, optional={"sums": sums, "shared": shared}, **common,
           **arguments)
    if shared:
        b.step(b.blocked_kernels.sum_absorbed_redistribute, b.batch, sums=sums, **common)


def _activation_for(b: Builder, term: Term, name: str) -> Tensor:
    """What the backward pass reads as activation `name`: c itself where the term needs none, to free its memory."""
    unread = term.features == codes.ONES or (term.features == codes.NONNEGATIVE and not b.carries_relevance(name))
    return b.factor(name) if unread else b.activation(name)


def _factor(rule: LayerRule) -> float:
    """The parameter of the formula that ratios_forward takes as `factor`."""
    return {codes.ALPHA_BETA: rule.rule.alpha, codes.GAMMA: rule.rule.gamma}.get(rule.formula or 0, 1.0)


def _bias(b: Builder, layer: Layer) -> Array:
    bias = layer.bias if isinstance(layer, (g.Conv2d, g.Dense)) else getattr(layer, "shift", None)
    return zeros(b.graph.shapes[layer.name][0]) if bias is None else read_only(bias)


def _direction_kernels(b: Builder, rule: Rule) -> tuple[Kernel, Kernel]:
    assert rule.direction is not None
    try:
        return b.kernels.direction_kernels(rule.direction, rule.takes_bounds)
    except TypeError as error:
        raise RuleError(
            f"the direction {rule.direction!r} cannot be compiled: {error}; required: a function of numbers that "
            "returns a number, in Python that Numba can compile") from None


def _as_convolution(layer: Layer) -> dict[str, Any]:
    """What the kernels of a direction read of a convolution or of a dense layer, which is one of one pixel."""
    names = ("groups", "stride_h", "stride_w", "pad_top", "pad_left", "dilation_h", "dilation_w")
    if isinstance(layer, g.Dense):
        return {
            "weight": read_only(layer.weight[..., None, None]), **dict(zip(names, (1, 1, 1, 0, 0, 1, 1), strict=True))
        }
    assert isinstance(layer, g.Conv2d)
    values = layer.groups, *layer.stride, *layer.padding[:2], *layer.dilation
    return {"weight": read_only(layer.weight), **dict(zip(names, values, strict=True))}
