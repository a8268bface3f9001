"""Which tensors share memory, and which activations the layer before them applies. Found once for each graph."""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass

from fastdtd import graph as g
from fastdtd.graph import Graph, Shape


@dataclass(frozen=True, slots=True)
class Location:
    """A tensor's memory: `offset` within the memory of tensor `root`, which has `elements`; all for one image."""

    root: str
    offset: int
    elements: int


def locations(graph: Graph) -> dict[str, Location]:
    """Where each tensor lies.

    A concatenation's inputs and a flatten's input lie in the result's memory, so that nothing is copied, unless they
    lie elsewhere already or their channels would not start at a whole channel of it.
    """
    found: dict[str, Location] = {}

    def location_of(name: str) -> Location:
        return found.setdefault(name, Location(name, 0, math.prod(graph.shapes[name])))

    for layer in reversed(graph.layers):  # readers first, so that where the result lies is final
        result = location_of(layer.name)
        if not isinstance(layer, (g.Concat, g.Flatten)):
            continue
        offset = result.offset
        for name in layer.inputs:
            shape = graph.shapes[name]
            if name not in found and _at_whole_channels(shape, offset, result.elements):
                found[name] = Location(result.root, offset, result.elements)
            offset += math.prod(shape)
    return {name: location_of(name) for name in graph.shapes}


def separate_locations(graph: Graph) -> dict[str, Location]:
    """As `locations`, with memory of its own for each tensor.

    Tensors that share memory share the relevance that comes back to them, so to observe one of them they must not.
    """
    return {name: Location(name, 0, math.prod(shape)) for name, shape in graph.shapes.items()}


def _at_whole_channels(shape: Shape, offset: int, elements: int) -> bool:
    positions = shape[1] * shape[2]
    return offset % positions == 0 and elements % positions == 0


def fused_activations(graph: Graph) -> dict[str, g.ReLU | g.Clip]:
    """Layer's name -> the activation after it, for each that alone reads a layer which can apply it itself."""
    by_name = {layer.name: layer for layer in graph}
    readers: dict[str, int] = {}
    for layer in graph:
        for name in set(layer.inputs):
            readers[name] = readers.get(name, 0) + 1
    return {layer.inputs[0]: layer for layer in graph
            if isinstance(layer, (g.ReLU, g.Clip)) and readers[layer.inputs[0]] == 1
            and isinstance(by_name.get(layer.inputs[0]), (g.Conv2d, g.Dense, g.GroupNorm, g.Add))}


class Intervals:
    """A set of integers as disjoint intervals in order: which part of a buffer is written."""

    def __init__(self) -> None:
        self._edges: list[int] = []  # begin, end, begin, end, ...

    def add(self, begin: int, end: int) -> None:
        low, high = bisect.bisect_left(self._edges, begin), bisect.bisect_right(self._edges, end)
        self._edges[low:high] = ([] if low % 2 else [begin]) + ([] if high % 2 else [end])

    def gaps(self, begin: int, end: int) -> list[tuple[int, int]]:
        """What of begin..end is not in the set."""
        low, high = bisect.bisect_right(self._edges, begin), bisect.bisect_left(self._edges, end)
        inner = ([] if low % 2 else [begin]) + self._edges[low:high] + ([] if high % 2 else [end])
        return [(a, b) for a, b in zip(inner[::2], inner[1::2], strict=True) if a < b]
