"""What a network costs to explain, from its graph alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastdtd.graph import (
    AveragePool2d,
    Conv2d,
    Dense,
    GlobalAveragePool,
    Graph,
    GroupNorm,
    Layer,
    LocalResponseNorm,
    Pool2d,
    Resize,
    Shape,
    Softmax,
)

MAX_MULTIPLY_ADDS = 5e11  # of one image; VGG-16 takes 3.1e10


@dataclass(frozen=True)
class Cost:
    """Of the explanation of one image.

    Attributes
    ----------
    forward, backward : int
        Multiply-adds of the two passes. Each output of a convolution, dense layer, pool or normalisation takes as many
        as its window holds, and so does each input in the backward pass; other layers one for each element.
    activation_bytes : int
        Of all tensors together, the input included, as float32.
    weight_bytes : int
    """

    forward: int
    backward: int
    activation_bytes: int
    weight_bytes: int

    @property
    def multiply_adds(self) -> int:
        return self.forward + self.backward


def cost(graph: Graph) -> Cost:
    """What a graph costs."""
    elements = sum(math.prod(shape) for shape in graph.shapes.values())
    return Cost(sum(multiply_adds(layer, graph) for layer in graph), sum(_backward(layer, graph) for layer in graph),
                4 * elements, 4 * graph.parameters)


def multiply_adds(layer: Layer, graph: Graph) -> int:
    """What a layer of a graph takes in the forward pass."""
    if isinstance(layer, Resize):
        channels, height, _ = graph.shapes[layer.name]
        of_rows, of_columns = (int((weight > 0).sum()) for weight in (layer.rows, layer.columns))
        return channels * (of_rows * int(layer.columns.shape[1]) + height * of_columns)
    outputs, source = math.prod(graph.shapes[layer.name]), graph.shapes[layer.inputs[0]]
    return outputs * _of_an_output(layer, source)


def _backward(layer: Layer, graph: Graph) -> int:
    inputs, outputs = math.prod(graph.shapes[layer.inputs[0]]), math.prod(graph.shapes[layer.name])
    match layer:
        case Conv2d():  # those of a window that the stride leaves out are zeros, which are not computed
            per_input = len(layer.weight) // layer.groups * math.prod(layer.weight.shape[2:])
            return max(inputs, inputs * per_input // math.prod(layer.stride))
        case Resize():
            return max(inputs, multiply_adds(layer, graph))
        case AveragePool2d():
            return max(inputs, inputs * math.prod(layer.kernel) // math.prod(layer.stride))
        case Dense() | LocalResponseNorm() | GroupNorm():
            return multiply_adds(layer, graph)
        case _:
            return max(inputs, outputs)


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
        case GroupNorm() | Softmax():
            return 3  # of the mean, of the variance, and its own; of the maximum, of the sum, and its own
        case _:
            return len(layer.inputs)


def decimal(count: float) -> str:
    """A number for people, before a unit: 349 M, 15.5 G."""
    for unit, name in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if count >= unit:
            return f"{count / unit:.3g}{name}"
    return f"{count:.3g} "
