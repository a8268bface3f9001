"""Resizing: weighted means along both axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastdtd import graph as g
from fastdtd.graph import Array
from fastdtd.lowering import linear
from fastdtd.lowering.builder import Builder, read_only
from fastdtd.protocols import Device
from fastdtd.rules import LayerRule, Term


@dataclass(frozen=True)
class Packed:
    """Lists of the weights: by sum of the rule, and by term for the backward pass."""

    sums: Sequence[dict[str, Any]]
    terms: Sequence[dict[str, Any]]


def pack(layer: g.Resize, rule: LayerRule, kernels: Device) -> Packed:
    def lists(term: Term, is_backward: bool) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for axis, weight in (("row", layer.rows), ("column", layer.columns)):
            own = weight.T if is_backward else weight
            positions = [np.flatnonzero(line) for line in own]
            values = [line[chosen] for line, chosen in zip(own, positions, strict=True)]
            starts = np.cumsum([0, *map(len, positions)])
            found[f"{axis}_starts"], found[f"{axis}_sources"] = (
                kernels.constant(read_only(np.asarray(array, np.int32)))
                for array in (starts, np.concatenate(positions)))
            flat = np.concatenate(values)
            if not is_backward:
                found[f"{axis}_weights"] = kernels.constant(read_only(flat))
            found[f"{axis}_v"] = kernels.constant(read_only(_v(term, flat)))
        return found

    return Packed([lists(term, False) for term in rule.sums], [lists(term, True) for term in rule.terms])


def _v(term: Term, weights: Array) -> Array:
    """No weight is negative, so "negative" (of a negative output) is the same V for the features' other sign."""
    return term.v(weights)[0] if term.weights in ("squared", "flat") else weights


def forward(b: Builder, layer: g.Resize) -> None:
    linear.forward(b, layer, _sum_step)


def backward(b: Builder, layer: g.Resize) -> None:
    linear.backward(b, layer, _term_step)


def _sum_step(b: Builder, layer: g.Resize, index: int, features: int, arguments: dict[str, Any]) -> None:
    low, high = b.bounds(layer.inputs[0])
    b.step(b.kernels.resize_forward, b.batch * b.graph.shapes[layer.name][0], **arguments, low=low, high=high,
           features=features, **b.weights[layer.name].sums[index], optional=_lines(b, layer))


def _term_step(b: Builder, layer: g.Resize, part: int, term: Term, source: str, arguments: dict[str, Any]) -> None:
    b.step(b.kernels.resize_redistribute, b.batch * b.graph.shapes[source][0], **arguments, features=term.features,
           **b.weights[layer.name].terms[part], optional=_lines(b, layer))


def _lines(b: Builder, layer: g.Resize) -> dict[str, Any]:
    elements = b.kernels.resize_elements(layer.columns.shape[1], layer.columns.shape[0])
    return {"lines": b.scratch("lines", elements)}
