"""Convolutions: which algorithm computes each sum and term of a layer's rule.

The choice follows from the layer's shape and rule, and in the backward pass from how sparse an image's relevance is:
from the image alone, so that it gives the same bits in any batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastdtd import graph as g
from fastdtd.graph import Graph
from fastdtd.lowering import conv_depthwise, conv_direct, conv_implicit, conv_sparse, conv_winograd, linear
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
    sparse: list[conv_sparse.Sparse | None]  # for images that are sparse enough, where that can be faster


def pack(layer: g.Conv2d, graph: Graph, assignment: Assignment, kernels: AnyDevice, precision: int) -> Packed:
    """precision: of products on tensor cores, where there are any."""
    rule, carries = assignment.of(layer), layer.inputs[0] in assignment.carriers
    assert rule is not None

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
        return (conv_depthwise.pack_backward(layer, term, graph, kernels)
                or conv_winograd.pack_backward(layer, term, graph, carries, kernels)
                or conv_direct.pack_backward(layer, term, graph.shapes[layer.inputs[0]], kernels))

    def sparse(term: Term, otherwise: Backward | None) -> conv_sparse.Sparse | None:
        winograd = isinstance(otherwise, conv_winograd.Backward)
        if kernels.CONVOLUTION == "implicit" or not (winograd or isinstance(otherwise, conv_direct.Backward)):
            return None
        return conv_sparse.pack(layer, term, graph.shapes[layer.inputs[0]], carries, winograd, kernels)

    terms = () if layer.name in assignment.held else rule.terms
    backward_passes = [backward(term) for term in terms]
    return Packed([forward(term) for term in rule.sums], backward_passes,
                  [sparse(term, way) for term, way in zip(terms, backward_passes, strict=True)])


def forward(b: Builder, layer: g.Conv2d) -> None:
    linear.forward(b, layer, _sum_step)


def backward(b: Builder, layer: g.Conv2d) -> None:
    linear.backward(b, layer, _term_step)


def _sum_step(b: Builder, layer: g.Conv2d, index: int, features: int, arguments: dict[str, Any]) -> None:
    b.weights[layer.name].forward[index].step(b, layer, arguments)


def _term_step(b: Builder, layer: g.Conv2d, part: int, term: Term, source: str, arguments: dict[str, Any]) -> None:
    packed = b.weights[layer.name]
    way, sparse = packed.backward[part], packed.sparse[part]
    if b.kernels.CONVOLUTION == "blocked":
        arguments |= {"density": conv_sparse.density(b), "sparse_below": sparse.below if sparse else 0.0}
    if sparse:
        conv_sparse.density_step(b, arguments)
        sparse.step(b, layer, source, arguments)
    way.step(b, layer, source, arguments)
