"""A network as a frozen value: layers, how they connect, and what follows from that (shapes, input domains).

A tensor is named after the layer that makes it; the network's input is named ``"input"``. The layers are those of
layers.py, which are all here by name too. Values are never changed after they are made.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastdtd.errors import ModelError, shown
from fastdtd.layers import (
    ACTIVATIONS,
    LAYER_TYPES,
    MAX_CONVOLUTION_STRIDE,
    MAX_LAYERS,
    MAX_PADDING,
    MAX_TENSOR_ELEMENTS,
    MAX_WEIGHT_ELEMENTS,
    Activation,
    Add,
    Array,
    AveragePool2d,
    BatchNorm,
    Clip,
    Concat,
    Conv2d,
    Dense,
    Dropout,
    Flatten,
    GlobalAveragePool,
    GroupNorm,
    Layer,
    LeakyReLU,
    LocalResponseNorm,
    MaxPool2d,
    Multiply,
    Pool2d,
    Power,
    Rearrange,
    ReLU,
    Resize,
    Shape,
    Softmax,
    outputs_text,
    shape_text,
)

__all__ = [
    "ACTIVATIONS", "INPUT", "LAYER_TYPES", "MAX_CONVOLUTION_STRIDE", "MAX_LAYERS", "MAX_PADDING", "MAX_TENSOR_ELEMENTS",
    "MAX_WEIGHT_ELEMENTS", "Activation", "Add", "Array", "AveragePool2d", "BatchNorm", "Clip", "Concat", "Conv2d",
    "Dense", "Domain", "Dropout", "Flatten", "GlobalAveragePool", "Graph", "GroupNorm", "Layer", "LeakyReLU",
    "LocalResponseNorm", "MaxPool2d", "Multiply", "Pool2d", "Power", "ReLU", "Rearrange", "Resize", "Shape", "Softmax",
]

INPUT = "input"


@dataclass(frozen=True, eq=False)
class Domain:
    """Which values a tensor can take, and so which rule the layer that reads it gets.

    low, high : (C,) float32 or None
        Bounds of each channel, where they are known.
    hidden : bool
        Whether a layer with weights or a nonlinearity lies between the network's input and this tensor.
    """

    hidden: bool
    nonnegative: bool
    low: Array | None = None
    high: Array | None = None

    def __str__(self) -> str:
        if self.low is not None and self.high is not None:
            return "box"
        return "non-negative" if self.nonnegative else "real"


@dataclass(frozen=True, eq=False, repr=False)
class Graph:
    """A network without cycles, checked when it is made.

    Parameters
    ----------
    layers : iterable of Layer
        In any order; kept in an order in which every layer comes after its inputs.
    input_shape : (C, H, W)
        Of one picture.
    box : (low, high) or None
        Bounds of the input's values, after preprocessing: a number or one for each channel.

    Attributes
    ----------
    shapes : dict of str to (C, H, W)
        Of every tensor, the input included.
    domains : dict of str to Domain
        Of every tensor, the input included.
    output : str
        The one tensor that no layer reads: the class scores, of shape (K, 1, 1), or maps of them.

    Raises
    ------
    ModelError
        Names that repeat or are missing, a cycle, shapes that do not fit, more or less than one output, bounds that are
        no bounds.
    """

    layers: tuple[Layer, ...]
    input_shape: Shape
    box: tuple[Array, Array] | None = None
    output: str = dataclasses.field(init=False)
    shapes: dict[str, Shape] = dataclasses.field(init=False)
    domains: dict[str, Domain] = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        def keep(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        keep("input_shape", _input_shape(self.input_shape))
        keep("box", None if self.box is None else _box(self.box, self.input_shape[0]))
        layers = self.layers if np.iterable(self.layers) else (self.layers, )
        keep("layers", _sorted(tuple(layers)))
        keep("shapes", self._infer_shapes())
        read = {name for layer in self.layers for name in layer.inputs}
        outputs = [layer.name for layer in self.layers if layer.name not in read]
        if len(outputs) != 1:
            raise ModelError(
                f"the network has {len(outputs)} outputs ({', '.join(map(repr, outputs))}); required: one. Remove the "
                "layers that lead to the others")
        keep("output", outputs[0])
        keep("domains", self._infer_domains())

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)

    @property
    def output_shape(self) -> Shape:
        """(K, 1, 1), a score for each class; or (K, H, W), one for each position too."""
        return self.shapes[self.output]

    @property
    def has_maps(self) -> bool:
        """Whether its output has scores at each of several positions."""
        return self.output_shape[1:] != (1, 1)

    @property
    def outputs(self) -> int:
        """Scores in all."""
        return math.prod(self.output_shape)

    @property
    def parameters(self) -> int:
        """Numbers that training gave: those of weights, biases and batch norms."""
        return sum(getattr(layer, field).size for layer in self for field in layer.arrays
                   if field not in layer.integer_arrays and getattr(layer, field) is not None
                   and not isinstance(layer, Resize))

    def __repr__(self) -> str:
        return (
            f"<Graph of {len(self.layers)} layers: {shape_text(self.input_shape)} -> {outputs_text(self.output_shape)} "
            f"scores, {self.parameters:,} parameters>")

    def _infer_shapes(self) -> dict[str, Shape]:
        shapes = {INPUT: self.input_shape}
        for layer in self.layers:
            shape = layer.output_shape([shapes[name] for name in layer.inputs])
            if int(np.prod(shape, dtype=object)) > MAX_TENSOR_ELEMENTS:
                raise ModelError(
                    f"layer {layer.name!r} makes a tensor of shape {shape_text(shape)}; at most {MAX_TENSOR_ELEMENTS} "
                    "elements are accepted")
            shapes[layer.name] = shape
        return shapes

    def _infer_domains(self) -> dict[str, Domain]:
        low, high = self.box if self.box is not None else (None, None)
        domains = {INPUT: Domain(False, low is not None and bool((low >= 0).all()), low, high)}
        with np.errstate(over="ignore", invalid="ignore"):  # explaining over bounds that become infinite is refused
            for layer in self.layers:
                domains[layer.name] = _output_domain(layer, [domains[name] for name in layer.inputs], self.shapes)
        return domains


def inputs_but_gates(layer: Layer) -> tuple[str, ...]:
    """What a layer gives relevance to where gates are held constant."""
    return layer.inputs[:1] if isinstance(layer, Multiply) else layer.inputs


def explained_layers(layers: Sequence[Layer], outputs: Iterable[str],
                     explained_inputs: Callable[[Layer], tuple[str, ...]] = inputs_but_gates) -> set[str]:
    """Names of those, each after its inputs, that have relevance where outputs have, and of the tensors that they read;
    explained_inputs: what a layer gives relevance to."""
    explained = set(outputs)
    for layer in reversed(layers):
        if layer.name in explained:
            explained.update(explained_inputs(layer))
    return explained


def _output_domain(layer: Layer, inputs: list[Domain], shapes: dict[str, Shape]) -> Domain:
    match layer:
        case Conv2d() | Dense() | BatchNorm() | GroupNorm():
            return Domain(hidden=True, nonnegative=False)
        case ReLU() | Softmax():
            return Domain(hidden=True, nonnegative=True)
        case Clip():
            return Domain(hidden=True, nonnegative=layer.low >= 0 or inputs[0].nonnegative)
        case Power():
            return Domain(hidden=True, nonnegative=True)
        case Activation():
            return Domain(hidden=True, nonnegative=not layer.is_zero_at_zero or inputs[0].nonnegative)
        case Multiply():
            return Domain(hidden=True, nonnegative=all(d.nonnegative for d in inputs))
        case LocalResponseNorm() | LeakyReLU():
            return Domain(hidden=True, nonnegative=inputs[0].nonnegative)
        case Rearrange():
            return _rearranged_domain(layer, inputs[0], shapes[layer.inputs[0]])
        case MaxPool2d() | GlobalAveragePool() | Dropout():
            return inputs[0]
        case Concat() | Add():
            hidden, nonnegative = any(d.hidden for d in inputs), all(d.nonnegative for d in inputs)
            lows, highs = [d.low for d in inputs if d.low is not None], [d.high for d in inputs if d.high is not None]
            if hidden or len(lows) < len(inputs):
                return Domain(hidden, nonnegative)
            if isinstance(layer, Concat):
                return Domain(False, nonnegative, np.concatenate(lows), np.concatenate(highs))
            return Domain(False, nonnegative, lows[0] + lows[1], highs[0] + highs[1])
    domain = inputs[0]
    if domain.low is None or domain.high is None:
        return domain
    if isinstance(layer, AveragePool2d) and layer.count_include_pad and any(layer.padding):
        return dataclasses.replace(domain, low=np.minimum(domain.low, 0), high=np.maximum(domain.high, 0))
    if isinstance(layer, Resize):
        (least_down, most_down), (least_across, most_across) = (
            (sums.min(), sums.max()) for sums in (layer.rows.sum(1), layer.columns.sum(1)))
        least, most = least_down * least_across, most_down * most_across
        return dataclasses.replace(domain, low=np.minimum(domain.low * least, domain.low * most),
                                   high=np.maximum(domain.high * least, domain.high * most))
    if isinstance(layer, Flatten):
        _, height, width = shapes[layer.inputs[0]]
        return dataclasses.replace(domain, low=np.repeat(domain.low, height * width),
                                   high=np.repeat(domain.high, height * width))
    return domain


def _rearranged_domain(layer: Rearrange, domain: Domain, shape: Shape) -> Domain:
    """Bounds stay bounds of channels where all elements of a channel come from channels of the same bounds."""
    if domain.low is None or domain.high is None:
        return domain
    index = layer.index.reshape(len(layer.index), -1)
    bounds = []
    for bound in (domain.low, domain.high):
        each = np.where(index < 0, np.float32(0), bound[index // (shape[1] * shape[2])])
        bounds.append((each.min(1), each.max(1)))
    (low, _), (_, high) = bounds
    return dataclasses.replace(domain, low=low, high=high)


def _sorted(layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    """The layers in the given order as far as it goes, each after its inputs."""
    if not layers:
        raise ModelError("the network has no layers")
    if len(layers) > MAX_LAYERS:
        raise ModelError(f"the network has {len(layers)} layers; at most {MAX_LAYERS} are accepted")
    by_name: dict[str, Layer] = {}
    for layer in layers:
        if not isinstance(layer, Layer):
            raise ModelError(f"{shown(layer)} is among the network's layers; required: layers, such as Conv2d(...)")
        if layer.name in by_name or layer.name in (INPUT, ""):
            raise ModelError(
                f"layer name {layer.name!r} is taken or empty; required: a name for each layer that no other has "
                f"({INPUT!r} is the network's input)")
        by_name[layer.name] = layer
    for layer in layers:
        for name in layer.inputs:
            if name not in by_name and name != INPUT:
                raise ModelError(
                    f"layer {layer.name!r} reads {name!r}, which no layer makes; the network's input is {INPUT!r}")
    readers: dict[str, list[Layer]] = {}
    waiting = {layer.name: len(set(layer.inputs) - {INPUT}) for layer in layers}
    for layer in layers:
        for name in set(layer.inputs):
            readers.setdefault(name, []).append(layer)
    position = {layer.name: i for i, layer in enumerate(layers)}
    ready = [position[name] for name, count in waiting.items() if not count]
    heapq.heapify(ready)
    order: list[Layer] = []
    while ready:
        order.append(layers[heapq.heappop(ready)])
        for reader in readers.get(order[-1].name, ()):
            waiting[reader.name] -= 1
            if not waiting[reader.name]:
                heapq.heappush(ready, position[reader.name])
    if len(order) < len(layers):
        stuck = [layer.name for layer in layers if waiting[layer.name]]
        raise ModelError(
            f"the network has a cycle through {', '.join(map(repr, stuck[:5]))}; required: layers that lead forward "
            "only"
        )
    return tuple(order)


def _input_shape(shape: Iterable[int]) -> Shape:
    values = tuple(shape) if np.iterable(shape) else (shape, )
    if any(isinstance(v, bool) or not isinstance(v, (int, np.integer)) for v in values):
        raise ModelError(f"the input has shape {shown(shape)}; required: (channels, height, width), whole numbers")
    values = tuple(map(int, values))
    if len(values) != 3 or min(values) < 1 or int(np.prod(values, dtype=object)) > MAX_TENSOR_ELEMENTS:
        raise ModelError(
            f"the input has shape {shown(values)}; required: (channels, height, width), each 1 or more, and at most "
            f"{MAX_TENSOR_ELEMENTS} elements in all")
    return values[0], values[1], values[2]


def _box(box: tuple[Any, Any], channels: int) -> tuple[Array, Array]:
    try:
        with np.errstate(over="ignore"):
            low, high = (np.ascontiguousarray(np.broadcast_to(np.asarray(bound, np.float32), (channels, )))
                         for bound in box)
    except (ValueError, TypeError, RuntimeError, OverflowError):
        raise ModelError(
            f"the value box {shown(box)} does not fit; required: (low, high), each one number or {channels}, one for "
            "each channel"
        ) from None
    if not (np.isfinite(low).all() and np.isfinite(high).all() and (low < high).all()):
        raise ModelError(
            f"the value box has low {low.tolist()} and high {high.tolist()}; required: finite, and low below high")
    low.flags.writeable = high.flags.writeable = False
    return low, high
