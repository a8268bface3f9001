"""Local response normalisation: by identity, by its Taylor expansion, or its derivative."""

from __future__ import annotations

from typing import Any

from fastdtd import graph as g
from fastdtd.kernels import codes
from fastdtd.lowering.builder import Builder
from fastdtd.lowering.pointwise import redistribute_by_ratio


def forward(b: Builder, layer: g.LocalResponseNorm) -> None:
    x, a = b.activation(layer.name), b.activation(layer.inputs[0])
    b.step(b.kernels.normalize_forward, b.batch * b.graph.shapes[layer.name][1], x=x, ratio=b.saved(layer).view, a=a,
           x_channel=x.channel, a_channel=a.channel, **_arguments(layer))


def backward(b: Builder, layer: g.LocalResponseNorm) -> None:
    rule, source = b.rule(layer), layer.inputs[0]
    assert rule is not None
    if rule.formula == codes.NORM_IDENTITY:
        redistribute_by_ratio(b, layer)
        return
    accumulate = b.accumulates(source)
    c_in, a, c = b.factor(source), b.activation(source), b.factor(layer.name)
    elements = b.kernels.normalize_taylor_elements(b.batch, b.graph.shapes[source])
    b.step(b.kernels.normalize_taylor_redistribute, b.batch, c_in=c_in, ledger=b.ledger, c=c,
           ratio=b.saved(layer).view, a=a, scratch=b.scratch("results", elements), column=b.columns.get(layer.name, 0),
           c_in_channel=c_in.channel, c_channel=c.channel, a_channel=a.channel, formula=rule.formula,
           epsilon=rule.rule.epsilon, accumulate=accumulate, **_arguments(layer))


def _arguments(layer: g.LocalResponseNorm) -> dict[str, Any]:
    """How far its sums reach before and after an element, whether within the channel, alpha of a sum, beta, bias."""
    summed = layer.size**2 if layer.within_channel else layer.size
    return {
        "before": (layer.size - 1) // 2, "after": layer.size // 2, "within_channel": layer.within_channel,
        "alpha": layer.alpha / summed, "beta": layer.beta, "bias": layer.bias
    }
