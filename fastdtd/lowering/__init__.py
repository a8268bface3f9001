"""(graph, rules, kernels) -> the steps of an explanation. One module for each family of layers has its weights and its
steps side by side.

R = |a| c is the relevance of an activation a. In the backward pass most tensors carry the factor c; a tensor that some
layer reads under a rule whose relevance is no multiple of a (zB, w2, flat) carries R itself, and so does the network's
input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fastdtd import graph as g
from fastdtd.errors import InputError
from fastdtd.graph import INPUT, Graph, Layer
from fastdtd.kernels import codes
from fastdtd.lowering import convolution, dense, group_norm, normalization, pointwise, pooling, resizing
from fastdtd.lowering.aliasing import Location, fused_activations, locations, separate_locations
from fastdtd.lowering.blocks import MAX_TAPS
from fastdtd.lowering.builder import Builder
from fastdtd.protocols import AnyDevice
from fastdtd.rules import Assignment
from fastdtd.schedule import Schedule, Through

_LARGE_TENSORS = 1 << 16  # elements of what a layer reads and writes for an image

Steps = Callable[[Builder, Any], None]  # writes down the steps of a layer, forward or backward

_FAMILIES: dict[type[Layer], tuple[Steps, Steps]] = {
    g.Conv2d: (convolution.forward, convolution.backward),
    g.Dense: (dense.forward, dense.backward),
    g.MaxPool2d: (pooling.forward, pooling.backward),
    g.AveragePool2d: (pooling.forward, pooling.backward),
    g.GlobalAveragePool: (pooling.forward, pooling.backward),
    g.Resize: (resizing.forward, resizing.backward),
    g.GroupNorm: (group_norm.forward, group_norm.backward),
    g.LocalResponseNorm: (normalization.forward, normalization.backward),
    g.ReLU: (pointwise.activation_forward, pointwise.activation_backward),
    g.Clip: (pointwise.activation_forward, pointwise.activation_backward),
    g.LeakyReLU: (pointwise.activation_forward, pointwise.activation_backward),
    g.Power: (pointwise.power_forward, pointwise.redistribute_by_ratio),
    g.Activation: (pointwise.nonlinearity_forward, pointwise.redistribute_by_ratio),
    g.Softmax: (pointwise.softmax_forward, pointwise.softmax_backward),
    g.Multiply: (pointwise.multiply_forward, pointwise.multiply_backward),
    g.Add: (pointwise.add_forward, pointwise.add_backward),
    g.Rearrange: (pointwise.rearrange_forward, pointwise.rearrange_backward),
    g.Concat: (pointwise.join_forward, pointwise.join_backward),
    g.Flatten: (pointwise.join_forward, pointwise.join_backward),
}


@dataclass(frozen=True, eq=False)
class Lowered:
    """A network with its weights packed for a device: all that its schedules, for any batch, have in common."""

    graph: Graph
    assignment: Assignment
    kernels: AnyDevice
    weights: Mapping[str, Any]
    fused: Mapping[str, g.ReLU | g.Clip]
    locations: Mapping[str, Location]

    def schedule(self, batch: int, workers: int = 1, observed: Sequence[str] = (), signed: bool = False,
                 through: Through = ()) -> Schedule:
        """The steps of an explanation of `batch` images by `workers` threads. Nothing is allocated but tables.

        observed: tensors whose relevance is kept; signed: whether that of outputs may be negative whatever the rules;
        through: layers, and the channels of what they make that alone pass relevance on.
        """
        graph, kernels = self.graph, self.kernels
        assignment = replace(self.assignment, signed=frozenset(graph.shapes)) if signed else self.assignment
        b = Builder(graph, assignment, kernels, self.weights,
                    separate_locations(graph) if observed or through else self.locations, self.fused, batch, workers)
        fused = {layer.name for layer in self.fused.values()}
        layers = [layer for layer in graph if layer.name not in fused]
        channels = dict(through)
        first_late = _early_layers(graph, layers) if batch > 1 and kernels.CONVOLUTION == "blocked" else 0
        early, late = layers[:first_late], layers[first_late:]
        local = _roots(b, early) - _roots(b, late) - {b.root(INPUT), b.root(graph.output)}

        def forward(layers: Sequence[Layer]) -> None:
            for layer in layers:
                b.layer = layer.name
                _FAMILIES[type(layer)][0](b, layer)

        def backward(layers: Sequence[Layer]) -> None:
            for layer in reversed(layers):
                b.layer = layer.name
                result, _ = b.result(layer)
                names = dict.fromkeys((result, layer.name))  # relevance comes to a fused activation first
                for name in names:
                    if name in channels:
                        _keep_relevance(b, f"came/{name}", result)
                        b.clear_others(result, channels[name])
                for name in names:
                    if name in observed:
                        _keep_relevance(b, f"observed/{name}", result)
                if layer.name not in assignment.held:
                    _FAMILIES[type(layer)][1](b, layer)

        b.touch(b.activation(INPUT), 0)
        for image in range(batch if early else 0):
            with b.alone(image, local):
                forward(early)
        forward(late)
        forward_steps = len(b)
        b.touch(b.activation(graph.output), forward_steps)
        b.touch(b.factor(graph.output), forward_steps)
        b.mark_written(graph.output)
        backward(late)
        for image in range(batch if early else 0):
            with b.alone(image, local):
                backward(early)
        if INPUT in observed:
            _keep_relevance(b, f"observed/{INPUT}", INPUT)
        b.touch(b.factor(INPUT), len(b))
        return b.finish(forward_steps, tuple(observed), through)


def _early_layers(graph: Graph, layers: Sequence[Layer]) -> int:
    """How many of the first layers are computed image by image, each in the memory, still in cache, that the one before
    used: those whose tensors are large, and so much larger than their weights that these may be read each time.
    """
    for i, layer in enumerate(layers):
        tensors = sum(math.prod(graph.shapes[name]) for name in (layer.name, *layer.inputs))
        weights = layer.weight.size if isinstance(layer, (g.Conv2d, g.Dense)) else 0
        if tensors < max(_LARGE_TENSORS, 10 * weights):
            return i
    return len(layers)


def _roots(b: Builder, layers: Sequence[Layer]) -> set[str]:
    """Of all tensors that these layers read or write."""
    return {b.root(name) for layer in layers for name in (b.result(layer)[0], layer.name, *layer.inputs)}


def lower(graph: Graph, assignment: Assignment, kernels: AnyDevice, precision: int = codes.TF32) -> Lowered:
    """Pack the network's weights as the kernels read them; the current device gets them.

    precision: of products on tensor cores (fastdtd.kernels.codes), where there are any. Raises InputError for a window
    that is too large.
    """
    graph, assignment = pooling.split_large(graph, assignment)
    for layer in graph:
        _check_window(layer, graph)
    weights: dict[str, Any] = {}
    with np.errstate(all="ignore"):  # what becomes infinite is refused with the scores or the relevance
        for layer in graph:
            rule = assignment.of(layer)
            match layer:
                case g.Conv2d() if rule:
                    weights[layer.name] = convolution.pack(layer, graph, assignment, kernels, precision)
                case g.Dense() if rule:
                    weights[layer.name] = dense.pack(layer, rule, kernels)
                case g.Resize() if rule:
                    weights[layer.name] = resizing.pack(layer, rule, kernels)
                case g.Rearrange():
                    weights[layer.name] = pointwise.rearrange_pack(layer, graph, kernels)
    return Lowered(graph, assignment, kernels, weights, fused_activations(graph), locations(graph))


def _check_window(layer: Layer, graph: Graph) -> None:
    match layer:
        case g.Conv2d():
            window = layer.weight.shape[2:]
        case g.Pool2d() if not pooling.holds_all(layer, graph):
            window = layer.kernel
        case _:
            return
    if math.prod(window) > MAX_TAPS:
        raise InputError(
            f"layer {layer.name!r} ({type(layer).__name__}) has a window of {window[0]}x{window[1]}; at most "
            f"{MAX_TAPS} elements are accepted, but for pools of the whole input. A dense layer has no such limit")


def _keep_relevance(b: Builder, state: str, name: str) -> None:
    """Write down the relevance of a tensor, once all its readers gave it theirs."""
    b.complete(name)
    x, c = b.activation(name), b.factor(name)
    out = b.state(state, b.graph.shapes[name], np.float32)
    b.step(b.kernels.relevance_redistribute, b.batch, out=out, x=x, c=c, x_channel=x.channel, c_channel=c.channel,
           relevance=b.carries_relevance(name))
