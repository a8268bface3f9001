"""Graph -> Graph: the same function with fewer kinds of layers, so that rules, plan and kernels need not know the others.

Dropout goes; a softmax at the end goes, so that what is explained is the class score; batch norm is folded into the convolution or dense
layer before it. The result is a fixed point: canonizing it again changes nothing.
"""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np

from fastdtd.errors import ModelError
from fastdtd.graph import BatchNorm, Conv2d, Dense, Dropout, Graph, Layer, Softmax


def canonize(graph: Graph) -> Graph:
    """The canonical form of `graph`; `graph` itself where it is canonical already.

    Raises
    ------
    ModelError
        A softmax in the middle of the network, or a batch norm with no convolution or dense layer of its own before it.
    """
    if not any(isinstance(layer, (Dropout, Softmax, BatchNorm)) for layer in graph):
        return graph
    instead: dict[str, str] = {}  # a removed layer's name -> the tensor that stands for it
    without: list[Layer] = []
    for layer in graph:
        inputs = tuple(instead.get(name, name) for name in layer.inputs)
        if isinstance(layer, Softmax) and layer.name != graph.output:
            raise ModelError(f"softmax {layer.name!r} is not the last layer; required: a softmax only at the end")
        if isinstance(layer, (Dropout, Softmax)):
            instead[layer.name] = inputs[0]
        else:
            without.append(dataclasses.replace(layer, inputs=inputs))

    readers = Counter(name for layer in without for name in layer.inputs)
    folded: dict[str, str] = {}
    kept: dict[str, Layer] = {}
    for layer in without:
        inputs = tuple(folded.get(name, name) for name in layer.inputs)
        if not isinstance(layer, BatchNorm):
            kept[layer.name] = dataclasses.replace(layer, inputs=inputs)
            continue
        before = kept.get(inputs[0])
        if not isinstance(before, (Conv2d, Dense)) or readers[layer.inputs[0]] != 1:
            raise ModelError(f"batch norm {layer.name!r} cannot be folded: it reads {layer.inputs[0]!r}, which is not a convolution or "
                             "dense layer that it alone reads")
        kept[before.name] = _fold(before, layer)
        folded[layer.name] = before.name
    if not kept:
        raise ModelError("nothing is left of the network once dropout and softmax are dropped")
    return Graph(tuple(kept.values()), graph.input_shape, graph.box)


def _fold(layer: Conv2d | Dense, norm: BatchNorm) -> Conv2d | Dense:
    scale, shift = norm.scale.astype(np.float64), norm.shift.astype(np.float64)
    bias = shift if layer.bias is None else scale * layer.bias + shift
    weight = layer.weight * scale.reshape(-1, *[1] * (layer.weight.ndim - 1))
    with np.errstate(over="ignore"):  # the layer refuses infinity in its own words
        return dataclasses.replace(layer, weight=weight.astype(np.float32), bias=bias.astype(np.float32))
