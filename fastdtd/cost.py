"""What a network costs to explain, from its graph alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastdtd.graph import Conv2d, Dense, GlobalAveragePool, Graph, Layer, LocalResponseNorm, Pool2d, Shape

MAX_MULTIPLY_ADDS = 3e11  # of one image; VGG-16 takes 1.5e10


@dataclass(frozen=True)
class Cost:
    """Of the forward pass of one image; the backward pass takes as much, or twice that.

    Attributes
    ----------
    multiply_adds : int
        Of convolutions and dense layers; for each output of a pool, and of a normalisation, what its window holds;
        else one for each element.
    activation_bytes : int
        Of all tensors together, the input included, as float32.
    weight_bytes : int
    """

    multiply_adds: int
    activation_bytes: int
    weight_bytes: int


def cost(graph: Graph) -> Cost:
    """What a graph costs."""
    elements = sum(math.prod(shape) for shape in graph.shapes.values())
    return Cost(sum(multiply_adds(layer, graph) for layer in graph), 4 * elements, 4 * graph.parameters)


def multiply_adds(layer: Layer, graph: Graph) -> int:
    """What a layer of a graph costs."""
    outputs, source = math.prod(graph.shapes[layer.name]), graph.shapes[layer.inputs[0]]
    return outputs * _of_an_output(layer, source)


def _of_an_output(layer: Layer, source: Shape) -> int:
    match layer:
        case Conv2d() | Dense():
            return math.prod(layer.weight.shape[1:])
        case Pool2d():
            return math.prod(layer.kernel)
        case GlobalAveragePool():
            return source[1] * source[2]
        case LocalResponseNorm():
            return layer.size**2 if layer.within_channel else layer.size
        case _:
            return len(layer.inputs)


def decimal(count: float) -> str:
    """A number for people, before a unit: 349 M, 15.5 G."""
    for unit, name in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if count >= unit:
            return f"{count / unit:.3g}{name}"
    return f"{count:.3g} "
