"""Layer, group, instance and RMS norm: with the deviation held constant, a linear layer whose weights are scale /
deviation times (identity - 1 / n)."""

from __future__ import annotations

from typing import Any

from fastdtd import graph as g
from fastdtd.kernels import codes
from fastdtd.lowering import linear
from fastdtd.lowering.builder import STATISTICS, Builder, read_only
from fastdtd.rules import Term

_WEIGHTS = {"positive": codes.POSITIVE, "negative": codes.NEGATIVE, "value": codes.AS_IS, "flat": codes.FLAT}


def forward(b: Builder, layer: g.GroupNorm) -> None:
    linear.forward(b, layer, _sum_step)


def backward(b: Builder, layer: g.GroupNorm) -> None:
    linear.backward(b, layer, _term_step)


def _sum_step(b: Builder, layer: g.GroupNorm, index: int, features: int, arguments: dict[str, Any]) -> None:
    rule = b.rule(layer)
    assert rule is not None
    term = rule.sums[index]
    b.step(b.kernels.group_norm_forward, _units(b, layer), **arguments, scale=read_only(term.w(layer.scale)),
           features=features, **_arguments(b, layer), epsilon=layer.epsilon, optional=_sums(b, layer))


def _term_step(b: Builder, layer: g.GroupNorm, part: int, term: Term, source: str, arguments: dict[str, Any]) -> None:
    if b.derives:
        arguments["a"] = b.activation(source)
        arguments["a_channel"] = arguments["a"].channel
    b.step(b.kernels.group_norm_redistribute, _units(b, layer), **arguments, scale=read_only(layer.scale),
           features=term.features, weights=_WEIGHTS[term.weights], **_arguments(b, layer), derivative=b.derives,
           optional=_sums(b, layer))


def _is_per_position(b: Builder, layer: g.GroupNorm) -> bool:
    """Not where there is only one."""
    return layer.per_position and b.graph.shapes[layer.name][1:] != (1, 1)


def _units(b: Builder, layer: g.GroupNorm) -> int:
    return b.batch * (b.graph.shapes[layer.name][1] if _is_per_position(b, layer) else layer.groups)


def _arguments(b: Builder, layer: g.GroupNorm) -> dict[str, Any]:
    per_position = _is_per_position(b, layer)
    positions = b.graph.shapes[layer.name][1:] if per_position else (1, 1)
    statistics = b.saved(layer, STATISTICS, shape=(2 * layer.groups, *positions)).view
    return {
        "statistics": statistics, "groups": layer.groups, "per_position": per_position, "centered": layer.centered
    }


def _sums(b: Builder, layer: g.GroupNorm) -> dict[str, Any]:
    return {"sums": b.scratch("norm sums", b.kernels.group_norm_elements(b.graph.shapes[layer.name][2]))}
