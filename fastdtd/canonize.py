"""Graph -> Graph: the same function with fewer kinds of layers, so that rules, plan and kernels need not know the
others.

Dropout goes; a softmax at the end goes, so that what is explained is the class score, and one in a gate stays; batch
norm is folded into the convolution, dense layer or group norm before it or, failing that, into the convolution or dense
layer after it; where neither can be, it becomes a convolution of 1 x 1, each channel a group. The result is a fixed
point: canonizing it again changes nothing.
"""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np

from fastdtd.errors import ModelError
from fastdtd.graph import (
    INPUT,
    AveragePool2d,
    BatchNorm,
    Conv2d,
    Dense,
    Dropout,
    Flatten,
    GlobalAveragePool,
    Graph,
    GroupNorm,
    Layer,
    Softmax,
    explained_layers,
)


def canonize(graph: Graph) -> Graph:
    """The canonical form of `graph`; `graph` itself where it is canonical already.

    Raises
    ------
    ModelError
        A softmax in the middle of the network but in gates, or nothing but layers that are dropped.
    """
    explained = explained_layers(graph.layers, [graph.output])
    if not any(isinstance(layer, (Dropout, BatchNorm)) or (isinstance(layer, Softmax) and layer.name in explained)
               for layer in graph):
        return graph
    instead: dict[str, str] = {}  # a removed layer's name -> the tensor that stands for it
    without: list[Layer] = []
    for layer in graph:
        inputs = tuple(instead.get(name, name) for name in layer.inputs)
        if isinstance(layer, Softmax) and layer.name in explained and layer.name != graph.output:
            raise ModelError(f"softmax {layer.name!r} is not the last layer; required: a softmax only at the end, or "
                             "in a gate, the second input of a product")
        if isinstance(layer, Dropout) or (isinstance(layer, Softmax) and layer.name == graph.output):
            instead[layer.name] = inputs[0]
        else:
            without.append(dataclasses.replace(layer, inputs=inputs))

    readers = Counter(name for layer in without for name in layer.inputs)
    reader = {name: layer for layer in without for name in layer.inputs}
    folded: dict[str, str] = {}
    fold_into_next: dict[str, BatchNorm] = {}  # by the name of the layer that they are folded into
    kept: dict[str, Layer] = {}
    for layer in without:
        inputs = tuple(folded.get(name, name) for name in layer.inputs)
        if layer.name in fold_into_next:
            assert isinstance(layer, (Conv2d, Dense))
            kept[layer.name] = dataclasses.replace(_fold_into_next(fold_into_next[layer.name], layer), inputs=inputs)
        elif not isinstance(layer, BatchNorm):
            kept[layer.name] = dataclasses.replace(layer, inputs=inputs)
        else:
            before, following = kept.get(inputs[0]), reader.get(layer.name)
            if isinstance(before, (Conv2d, Dense, GroupNorm)) and readers[layer.inputs[0]] == 1:
                kept[before.name] = _fold(before, layer)
                folded[layer.name] = before.name
            elif readers[layer.name] == 1 and following is not None and _takes_in(following, layer):
                fold_into_next[following.name] = layer
                folded[layer.name] = inputs[0]
            else:
                weight = layer.scale.reshape(-1, 1, 1, 1)
                kept[layer.name] = Conv2d(layer.name, inputs, weight, layer.shift, groups=len(weight), batch_norm=True)
    if not kept:
        raise ModelError("nothing is left of the network once dropout and softmax are dropped")
    return Graph(tuple(kept.values()), graph.input_shape, graph.box)


def with_complement(graph: Graph) -> Graph:
    """A binary classifier's network of one output y (a channel, where it is a map) with two, -y and y.

    Raises
    ------
    ModelError
        It does not end in a dense layer or convolution, but for pools and a flatten after it.
    """
    by_name = {layer.name: layer for layer in graph}
    scored = by_name[graph.output]
    while isinstance(scored, (GlobalAveragePool, AveragePool2d, Flatten)) and scored.inputs[0] != INPUT:
        scored = by_name[scored.inputs[0]]
    readers = sum(scored.name in layer.inputs for layer in graph)
    if not isinstance(scored, (Dense, Conv2d)) or graph.shapes[scored.name][0] != 1 or readers > 1:
        raise ModelError(
            f"two classes are named for the one output {graph.output!r}, which gets a complement only where it comes "
            "from a dense layer or convolution with one output; required: such a network, or one name")
    bias = None if scored.bias is None else np.concatenate([-scored.bias, scored.bias])
    both = dataclasses.replace(scored, weight=np.concatenate([-scored.weight, scored.weight]), bias=bias)
    return Graph(tuple(both if layer is scored else layer for layer in graph), graph.input_shape, graph.box)


def _takes_in(layer: Layer, norm: BatchNorm) -> bool:
    """Whether `norm` can be folded into the layer that reads it: where zeros are padded, only if it shifts nothing."""
    return isinstance(layer, Dense) or (isinstance(layer, Conv2d) and (not any(layer.padding) or not norm.shift.any()))


def _fold_into_next(norm: BatchNorm, layer: Conv2d | Dense) -> Conv2d | Dense:
    groups = layer.groups if isinstance(layer, Conv2d) else 1
    outputs, per_group = len(layer.weight), layer.weight.shape[1]
    # (outputs, channels of the output's group, 1...), as the weight lies
    scale, shift = (np.repeat(values.astype(np.float64).reshape(groups, per_group), outputs // groups, 0)
                    .reshape(outputs, per_group, *[1] * (layer.weight.ndim - 2)) for values in (norm.scale, norm.shift))
    bias = (layer.weight * shift).reshape(outputs, -1).sum(1) + (0 if layer.bias is None else layer.bias)
    with np.errstate(over="ignore"):
        return dataclasses.replace(layer, weight=(layer.weight * scale).astype(np.float32),
                                   bias=bias.astype(np.float32), batch_norm=True)


def _fold(layer: Conv2d | Dense | GroupNorm, norm: BatchNorm) -> Conv2d | Dense | GroupNorm:
    scale, shift = norm.scale.astype(np.float64), norm.shift.astype(np.float64)
    if isinstance(layer, GroupNorm):
        with np.errstate(over="ignore"):
            return dataclasses.replace(layer, scale=(layer.scale * scale).astype(np.float32),
                                       shift=(layer.shift * scale + shift).astype(np.float32))
    bias = shift if layer.bias is None else scale * layer.bias + shift
    weight = layer.weight * scale.reshape(-1, *[1] * (layer.weight.ndim - 1))
    with np.errstate(over="ignore"):  # the layer refuses infinity in its own words
        return dataclasses.replace(layer, weight=weight.astype(np.float32), bias=bias.astype(np.float32),
                                   batch_norm=True)
