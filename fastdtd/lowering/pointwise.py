"""What treats each element by itself, or moves it: activations, powers, additions, products and softmax, which makes
gates, joins, rearrangements."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdtd import graph as g
from fastdtd.graph import Graph
from fastdtd.kernels import codes
from fastdtd.lowering import linear
from fastdtd.lowering.builder import Builder, clip_bounds, read_only
from fastdtd.protocols import Device, Kernel
from fastdtd.rules import LayerRule, Term

Piecewise = g.ReLU | g.Clip | g.LeakyReLU
Join = g.Concat | g.Flatten

_FUNCTIONS = {name: getattr(codes, name.upper()) for name in g.ACTIVATIONS}


# ---- Activations -----------------------------------------------------------------------------------------------------


def activation_forward(b: Builder, layer: Piecewise) -> None:
    x, a = b.activation(layer.name), b.activation(layer.inputs[0])
    b.step(b.kernels.activate_forward, b.batch * x.channels, x=x, a=a, x_channel=x.channel, a_channel=a.channel,
           channels=x.channels, **_activation(layer))


def activation_backward(b: Builder, layer: Piecewise) -> None:
    source = layer.inputs[0]
    accumulate = b.accumulates(source)
    c_in, a, c = b.factor(source), b.activation(source), b.factor(layer.name)
    b.step(b.kernels.activate_redistribute, b.batch * a.channels, c_in=c_in, c=c, a=a, c_in_channel=c_in.channel,
           c_channel=c.channel, a_channel=a.channel, channels=a.channels, relevance=b.carries_relevance(source)
           and not b.derives, derivative=b.derives, accumulate=accumulate, **_activation(layer))


def _activation(layer: Piecewise) -> dict[str, Any]:
    low, high = clip_bounds(layer)
    return {"slope": layer.slope if isinstance(layer, g.LeakyReLU) else 1.0, "x_min": low, "x_max": high}


def power_forward(b: Builder, layer: g.Power) -> None:
    x, a = b.activation(layer.name), b.activation(layer.inputs[0])
    b.step(b.kernels.power_forward, b.batch * x.channels, x=x, ratio=b.saved(layer).view, a=a, x_channel=x.channel,
           a_channel=a.channel, exponent=layer.exponent, derivative=b.derives)


def nonlinearity_forward(b: Builder, layer: g.Activation) -> None:
    x, a = b.activation(layer.name), b.activation(layer.inputs[0])
    alpha, beta = (1.0 if value is None else value for value in (layer.alpha, layer.beta))
    b.step(b.kernels.nonlinearity_forward, b.batch * x.channels, x=x, ratio=b.saved(layer).view, a=a,
           x_channel=x.channel, a_channel=a.channel, function=_FUNCTIONS[layer.function], alpha=alpha, beta=beta,
           derivative=b.derives)


def redistribute_by_ratio(b: Builder, layer: g.Power | g.Activation | g.LocalResponseNorm) -> None:
    """Backward where each output is a multiple of its own input: c_in = ratio * c."""
    source = layer.inputs[0]
    accumulate = b.accumulates(source)
    c_in, c = b.factor(source), b.factor(layer.name)
    b.step(b.kernels.normalize_redistribute, b.batch * c_in.channels, c_in=c_in, c=c, ratio=b.saved(layer).view,
           c_in_channel=c_in.channel, c_channel=c.channel, relevance=b.carries_relevance(source) and not b.derives,
           accumulate=accumulate)


# ---- Addition --------------------------------------------------------------------------------------------------------


def add_forward(b: Builder, layer: g.Add) -> None:
    linear.forward(b, layer, _add_sum)


def add_backward(b: Builder, layer: g.Add) -> None:
    linear.backward(b, layer, _add_term)


def _add_sum(b: Builder, layer: g.Add, index: int, features: int, arguments: dict[str, Any]) -> None:
    (low_a, high_a), (low_b, high_b) = map(b.bounds, layer.inputs)
    second = b.activation(layer.inputs[1])
    b.step(b.kernels.add_forward, b.batch * b.graph.shapes[layer.name][0], **arguments, b=second,
           b_channel=second.channel, low_a=low_a, high_a=high_a, low_b=low_b, high_b=high_b, features=features)


def _add_term(b: Builder, layer: g.Add, part: int, term: Term, source: str, arguments: dict[str, Any]) -> None:
    b.step(b.kernels.add_redistribute, b.batch * b.graph.shapes[source][0], **arguments, features=term.features)


# ---- Products --------------------------------------------------------------------------------------------------------


def multiply_forward(b: Builder, layer: g.Multiply) -> None:
    x, (a, gate) = b.activation(layer.name), map(b.activation, layer.inputs)
    b.step(b.kernels.multiply_forward, b.batch * x.channels, x=x, a=a, b=gate, x_channel=x.channel,
           a_channel=a.channel, b_channel=gate.channel, channels=x.channels, gate_channels=gate.channels)


def multiply_backward(b: Builder, layer: g.Multiply) -> None:
    rule, (value, gate) = b.rule(layer), layer.inputs
    assert rule is not None
    sums = b.graph.shapes[gate] != b.graph.shapes[value]
    _factor_backward(b, layer, value, gate, b.kernels.multiply_redistribute, rule)
    if rule.name != "hold":
        kernel = b.kernels.gate_redistribute if sums else b.kernels.multiply_redistribute
        _factor_backward(b, layer, gate, value, kernel, rule)


def _factor_backward(b: Builder, layer: g.Multiply, source: str, other: str, kernel: Kernel, rule: LayerRule) -> None:
    """What one of the factors gets."""
    accumulate = b.accumulates(source)
    c_in, c, held = b.factor(source), b.factor(layer.name), b.activation(other)
    name = "a" if kernel is b.kernels.gate_redistribute else "b"
    named: dict[str, Any] = {name: held, f"{name}_channel": held.channel}
    b.step(kernel, b.batch * c_in.channels, c_in=c_in, c=c, c_in_channel=c_in.channel, c_channel=c.channel,
           channels=c.channels, gate_channels=b.graph.shapes[layer.inputs[1]][0],
           share=0.5 if rule.name == "half" else 1.0, relevance=b.carries_relevance(source) and not b.derives,
           derivative=b.derives, accumulate=accumulate, **named)


def softmax_forward(b: Builder, layer: g.Softmax) -> None:
    x, a = b.activation(layer.name), b.activation(layer.inputs[0])
    b.step(b.kernels.softmax_forward, b.batch * b.graph.shapes[layer.name][1], x=x, a=a, x_channel=x.channel,
           a_channel=a.channel, channels=x.channels)


def softmax_backward(b: Builder, layer: g.Softmax) -> None:
    source = layer.inputs[0]
    accumulate = b.accumulates(source)
    c_in, c, x = b.factor(source), b.factor(layer.name), b.activation(layer.name)
    b.step(b.kernels.softmax_redistribute, b.batch * b.graph.shapes[layer.name][1], c_in=c_in, c=c, x=x,
           c_in_channel=c_in.channel, c_channel=c.channel, x_channel=x.channel, channels=x.channels,
           derivative=b.derives, accumulate=accumulate)


# ---- What only moves elements ----------------------------------------------------------------------------------------


def rearrange_pack(layer: g.Rearrange, graph: Graph,
                   kernels: Device) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """(starts, readers): readers[starts[i]:starts[i + 1]] read element i; those before starts[0] read none."""
    index, elements = layer.index.ravel(), math.prod(graph.shapes[layer.inputs[0]])
    starts = np.searchsorted(np.sort(index), np.arange(elements + 1))
    return read_only(starts.astype(np.int32)), read_only(np.argsort(index, kind="stable").astype(np.int32))


def rearrange_forward(b: Builder, layer: g.Rearrange) -> None:
    x, a = b.activation(layer.name), b.activation(layer.inputs[0])
    b.step(b.kernels.rearrange_forward, b.batch, x=x, a=a, index=read_only(layer.index), x_channel=x.channel,
           a_channel=a.channel)


def rearrange_backward(b: Builder, layer: g.Rearrange) -> None:
    source = layer.inputs[0]
    accumulate = b.accumulates(source)
    c_in, c = b.factor(source), b.factor(layer.name)
    starts, readers = b.weights[layer.name]
    b.step(b.kernels.rearrange_redistribute, b.batch, c_in=c_in, ledger=b.ledger, c=c, starts=starts,
           readers=readers, column=b.columns.get(layer.name, 0), c_in_channel=c_in.channel, c_channel=c.channel,
           relevance=b.carries_relevance(source) and layer.name in b.columns, accumulate=accumulate)


def join_forward(b: Builder, layer: Join) -> None:
    """Copy what does not lie in the result's memory already."""
    for name, offset in _copied_inputs(b, layer):
        b.copy(True, (layer.name, offset), (name, 0), name, False)


def join_backward(b: Builder, layer: Join) -> None:
    for name, offset in _copied_inputs(b, layer):
        b.copy(False, (name, 0), (layer.name, offset), name, b.accumulates(name))


def _copied_inputs(b: Builder, layer: Join) -> list[tuple[str, int]]:
    """Inputs that do not lie in the result's memory, with where in it they belong."""
    copied, offset = [], 0
    for name in layer.inputs:
        if not b.is_in_place(name, layer.name, offset):
            copied.append((name, offset))
        offset += math.prod(b.graph.shapes[name])
    return copied
