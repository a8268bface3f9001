"""Random networks for property tests: every layer of the table, every connection, awkward shapes."""

import numpy as np
from hypothesis import strategies as st
from layers import KEPT, random_weights

from fastdtd import graph as g

KIND_OF = {layer: kind for kind, layer in g.LAYER_TYPES.items()}


class NothingToRead(Exception):
    """No tensor is what a layer needs."""


class Sketch:
    """A network in the making, to which the table's entries add layers.

    shapes, nonnegative: of every tensor by name; read: the names of those that a layer reads.
    """

    def __init__(self, draw, rng, shape, like_peers):
        self._draw, self.rng, self.like_peers = draw, rng, like_peers
        self.layers, self.shapes, self.nonnegative, self.read = [], {g.INPUT: shape}, {g.INPUT: False}, set()

    def add(self, layer, nonnegative):
        self.shapes[layer.name] = layer.output_shape([self.shapes[name] for name in layer.inputs])
        self.layers.append(layer)
        self.nonnegative[layer.name] = nonnegative
        self.read.update(layer.inputs)
        return layer.name

    def pick(self, flat=False, nonnegative=False):
        """One of the last tensors; flat: also of those of one position."""
        names = [n for n, shape in self.shapes.items()
                 if (flat or shape[1:] != (1, 1) or n == g.INPUT) and (not nonnegative or self.nonnegative[n])]
        if not names:
            raise NothingToRead
        return self.one_of(names[-4:])

    def integer(self, low, high):
        return self._draw(st.integers(low, high))

    def boolean(self):
        return self._draw(st.booleans())

    def one_of(self, values):
        return self._draw(st.sampled_from(values))


@st.composite
def graphs(draw, layers=6, like_peers=False, maximum_size=9):
    """A Graph of up to `layers` layers and a head.

    like_peers keeps averages and additions after ReLUs, for zennit redistributes to values of both signs by their sign,
    and paddings to PyTorch's.
    """
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    shape = tuple(draw(st.integers(1, n)) for n in (4, maximum_size, maximum_size))
    box = draw(st.sampled_from([None, (-1.0, 2.0), (0.0, 1.0), "channels"]))
    if box == "channels":
        low = -rng.random(shape[0])
        box = (low, low + 0.5 + rng.random(shape[0]))
    net = Sketch(draw, rng, shape, like_peers)
    kinds = [kind for kind, entry in KEPT.items() if entry.in_peers or not like_peers for _ in range(entry.often)]
    for number in range(draw(st.integers(1, layers))):
        kind = net.one_of(kinds)
        try:
            KEPT[kind].draw(net, f"{kind}{number}")
        except NothingToRead:
            continue

    flat = [net.add(g.Flatten(f"{name}/flat", (name,)), net.nonnegative[name])
            for name in list(net.shapes) if name not in net.read]
    if not net.layers:
        flat = [net.add(g.Flatten("flat", (g.INPUT,)), False)]
    joined = net.add(g.Concat("join", tuple(flat)), all(net.nonnegative[n] for n in flat)) if len(flat) > 1 else flat[0]
    net.add(g.Dense("scores", (joined,), random_weights(rng, draw(st.integers(1, 4)), net.shapes[joined][0], dead=0)),
            False)
    return g.Graph(tuple(net.layers), shape, box)


@st.composite
def graphs_and_rules(draw, like_peers=False, signed=False):
    """A Graph, and rules for some of its layers; like_peers: for none but those with weights; signed: for most, also
    such that can make negative relevance.
    """
    graph = draw(graphs(like_peers=like_peers))
    rules = {}
    for layer in graph:
        left_alone = draw(st.integers(0, 4)) > (3 if signed else 0)
        if left_alone or (like_peers and not isinstance(layer, (g.Conv2d, g.Dense))):
            continue
        if choices := KEPT[KIND_OF[type(layer)]].drawn_rules(signed):
            rules[layer.name] = draw(st.sampled_from(choices))
    return graph, rules


def images(graph, count, seed=0):
    """(count, C, H, W) float32 inside the graph's box; the second is all zero (or the lower bound), the third holds the
    bounds only.

    Where a mean or sum of the input has bounds, the images keep off them: there a - low of a mean is what rounding
    left.
    """
    rng = np.random.default_rng(seed)
    low, high = (b[:, None, None] for b in graph.box) if graph.box is not None else (-2.0, 2.0)
    sums = g.AveragePool2d, g.GlobalAveragePool, g.Add, g.Resize
    if any(isinstance(layer, sums) and not graph.domains[layer.name].hidden for layer in graph):
        low, high = low + 0.01 * (high - low), high - 0.01 * (high - low)
    batch = low + (high - low) * rng.random((count, *graph.input_shape))
    if count > 1:
        batch[1] = 0 if graph.box is None else low
    if count > 2:
        batch[2] = np.where(rng.random(graph.input_shape) < 0.5, low, high)
    if any(isinstance(layer, (g.GroupNorm, g.Resize)) for layer in graph):
        # Means of equal values differ by rounding, and so would maxima and the signs of differences.
        middle = (low + high) / 2
        batch[1:3] = middle + (batch[1:3] - middle) * (1 - 0.1 * rng.random(batch[1:3].shape))
    return batch.astype(np.float32)
