"""Convolutions: which algorithm computes each sum and term of a layer's rule.

The choice follows from the layer's shape and rule alone, so that the same image gives the same bits in any batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastdtd import graph as g
from fastdtd.graph import Graph
from fastdtd.lowering import conv_depthwise, conv_direct, conv_implicit, conv_winograd, linear
from fastdtd.lowering.builder import Builder
from fastdtd.protocols import AnyDevice
from fastdtd.rules import Assignment, Term

Forward = conv_depthwise.Forward | conv_direct.Forward | conv_implicit.Forward | conv_winograd.Forward
Backward = conv_depthwise.Backward | conv_direct.Backward | conv_implicit.Backward | conv_winograd.Backward


@dataclass(frozen=True, eq=False)
class Packed:
    """Of each of the rule's sums, and of each of its terms."""

    forward: list[Forward]
    backward: list[Backward | None]  # None: a search direction, whose kernels read the weights themselves


def pack(layer: g.Conv2d, graph: Graph, assignment: Assignment, kernels: AnyDevice, precision: int) -> Packed:
    """precision: of products on tensor cores, where there are any."""
    rule, carries = assignment.rules[layer.name], layer.inputs[0] in assignment.carriers

    def forward(term: Term) -> Forward:
        if kernels.CONVOLUTION == "implicit":
            return conv_implicit.pack_forward(layer, term, graph, kernels, precision)
        return (conv_depthwise.pack_forward(layer, term, graph, kernels)
                or conv_winograd.pack_forward(layer, term, graph, kernels)
                or conv_direct.pack_forward(layer, term, graph, kernels))

    def backward(term: Term) -> Backward | None:
        if term.weights == "direction":
            return None
        if kernels.CONVOLUTION == "implicit":
            return conv_implicit.pack_backward(layer, term, graph, kernels, precision)
        signed = layer.name in assignment.signed
        return (conv_depthwise.pack_backward(layer, term, graph, kernels)
                or conv_winograd.pack_backward(layer, term, graph, carries, signed, kernels)
                or conv_direct.pack_backward(layer, term, graph.shapes[layer.inputs[0]], kernels))

    return Packed([forward(term) for term in rule.sums], [backward(term) for term in rule.terms])


def forward(b: Builder, layer: g.Conv2d) -> None:
    linear.forward(b, layer, _sum_step)


def backward(b: Builder, layer: g.Conv2d) -> None:
    linear.backward(b, layer, _term_step)


def _sum_step(b: Builder, layer: g.Conv2d, index: int, features: int, arguments: dict[str, Any]) -> None:
    b.weights[layer.name].forward[index].step(b, layer, arguments)


def _term_step(b: Builder, layer: g.Conv2d, part: int, term: Term, source: str, arguments: dict[str, Any]) -> None:
    b.weights[layer.name].backward[part].step(b, layer, source, arguments)
