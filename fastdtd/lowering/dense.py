"""Dense layers: their weights, the forward and the backward step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fastdtd import graph as g
from fastdtd.graph import Array
from fastdtd.kernels import codes
from fastdtd.lowering import linear
from fastdtd.lowering.builder import Builder, read_only
from fastdtd.protocols import Device
from fastdtd.rules import LayerRule, Term

_WEIGHTS = {
    "positive": codes.POSITIVE, "negative": codes.NEGATIVE, "value": codes.AS_IS, "squared": codes.SQUARED,
    "flat": codes.FLAT
}


@dataclass(frozen=True, eq=False)
class Packed:
    """The weights; and of each of the rule's sums its weights, and z where that depends on nothing else."""

    weight: Any
    sums: list[tuple[Any, Array]]


def pack(layer: g.Dense, rule: LayerRule, kernels: Device) -> Packed:
    weight = kernels.constant(read_only(layer.weight))
    return Packed(weight, [_pack_sum(layer, term, weight, kernels) for term in rule.sums])


def _pack_sum(layer: g.Dense, term: Term, weight: Any, kernels: Device) -> tuple[Any, Array]:
    z = np.zeros(len(layer.weight))
    if term.features == codes.ONES:
        z = term.v(layer.weight)[0].sum(1, dtype=np.float64)
    own = kernels.constant(read_only(term.w(layer.weight))) if term.weights == "negative" else weight
    return own, read_only(z.astype(np.float32))


def forward(b: Builder, layer: g.Dense) -> None:
    linear.forward(b, layer, _sum_step)


def backward(b: Builder, layer: g.Dense) -> None:
    linear.backward(b, layer, _term_step)


def _sum_step(b: Builder, layer: g.Dense, index: int, features: int, arguments: dict[str, Any]) -> None:
    weight, constant = b.weights[layer.name].sums[index]
    low, high = b.bounds(layer.inputs[0])
    sums = b.scratch("results", b.kernels.dense_forward_elements(b.batch))
    b.step(b.kernels.dense_forward, len(layer.weight), **arguments, weight=weight, constant=constant, low=low,
           high=high, features=features, optional={"sums": sums})


def _term_step(b: Builder, layer: g.Dense, part: int, term: Term, source: str, arguments: dict[str, Any]) -> None:
    sums, products = b.kernels.dense_redistribute_elements(b.batch, len(layer.weight))
    b.step(b.kernels.dense_redistribute, -(-b.graph.shapes[source][0] // b.kernels.DENSE_FEATURES), **arguments,
           weight=b.weights[layer.name].weight, features=term.features, weights=_WEIGHTS[term.weights],
           optional={"sums": b.scratch("results", sums), "contributions": b.scratch("block", products)})
