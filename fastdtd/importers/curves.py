"""Functions of one element that sources write as several operators: x sigmoid(x), x relu6(x + 3) / 6, 0.5 x (1 + erf(x
/ sqrt(2))), in whatever order.

While it is not known what they will be, they are a `Curve`: the values that the function takes on a grid. In the end
these are compared with those of the functions that layers have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from fastdtd import graph
from fastdtd.graph import ACTIVATIONS, Layer
from fastdtd.importers.builder import Builder
from fastdtd.importers.moves import Array, Node
from fastdtd.importers.tensors import Tensor

_GRID = np.concatenate([np.linspace(-8, 8, 97), [-0.01, 0.01, -20.0, 20.0]])
_CLOSE = 2e-4  # less than what tells GELU from its approximation, more than what constants in half precision do
_MAX_LAYERS = 8  # that a tensor's history is followed through

erf = np.vectorize(math.erf, [float])


@dataclass(frozen=True, eq=False)
class Curve:
    """A function of each element of a tensor: its values where the tensor has those of the grid.

    of : the tensors that it can be said of, by layer, the nearest first, with these values
    node : what made it
    """

    of: Mapping[str, tuple[Tensor, Array]]
    node: Node

    @property
    def view(self) -> Tensor:
        """A tensor of as many elements."""
        return next(iter(self.of.values()))[0]

    def map(self, b: Builder, function: Callable[[Array], Array]) -> Curve:
        """function(curve), element by element."""
        return Curve({name: (x, function(values)) for name, (x, values) in self.of.items()}, b.node)


def curve_of(b: Builder, x: Tensor | Curve) -> Curve:
    """A tensor as a function of itself, and of those that it was made of element by element."""
    if isinstance(x, Curve):
        return x
    found, functions = {x.layer: (x, _GRID)}, list[Callable[[Array], Array]]()
    for _ in range(_MAX_LAYERS):
        layer = b.layers.get(x.layer)
        function = None if layer is None else _function_of(layer)
        if layer is None or function is None:
            break
        x, functions = replace(x, layer=layer.inputs[0]), [function, *functions]
        values = _GRID
        for each in functions:
            values = each(values)
        found[x.layer] = x, values
    b.budget.step(b.node, len(_GRID) * len(found))
    return Curve(found, b.node)


def combined(b: Builder, parts: Sequence[Tensor | Curve], function: Callable[..., Array]) -> Curve | None:
    """function(*parts), where all are functions of one tensor's elements; else None."""
    first, *others = (curve_of(b, part).of for part in parts)
    common = [name for name in first
              if all(name in other and b.have_one_view(first[name][0], other[name][0]) for other in others)]
    if not common:
        return None
    made = {name: (first[name][0], function(*(curve[name][1] for curve in (first, *others)))) for name in common}
    return Curve(made, b.node)


class Recognized(NamedTuple):
    """A curve that is scale * f(x) + shift, f one of `ACTIVATIONS` with these parameters."""

    x: Tensor
    function: str
    fields: dict[str, float]
    scale: float = 1.0
    shift: float = 0.0


def recognized(curve: Curve) -> Recognized | None:
    """The nearest tensor that the curve can be said of, and without a shift where that can be."""
    for is_shifted in (False, True):
        for x, values in curve.of.values():
            for name, fields in _candidates(values):
                known = reference(name, **fields)(_GRID)
                if is_shifted:
                    scale, shift = np.polyfit(known, values, 1).tolist()
                else:
                    scale, shift = float(values @ known / (known @ known)), 0.0
                    scale = 1.0 if abs(scale - 1) < 5 * _CLOSE else scale
                # where a function's own parameters could be anything, a factor might make it anything as well
                if np.abs(values - scale * known - shift).max() <= _CLOSE * abs(scale) and (scale == 1 or not fields):
                    return Recognized(x, name, fields, scale, shift)
    return None


def as_activation(b: Builder, curve: Curve) -> Tensor:
    """The layer that computes a curve."""
    found = recognized(curve)
    with b.at(curve.node):
        if found is None:
            b.refuse(f"makes a function of each element that no layer has; required: one of {', '.join(ACTIVATIONS)}")
        x, name, fields, scale, shift = found
        if (scale, shift) == (1, 0):
            return b.activation(x, name, "", **fields)
        return b.affine(b.activation(x, name, "/activation", **fields), scale, shift)


def reference(name: str, **fields: float) -> Callable[[Array], Array]:
    """A function of `ACTIVATIONS`, for arrays."""
    p = ACTIVATIONS[name] | fields
    functions: dict[str, Callable[[Array], Array]] = {
        "elu": lambda y: p["beta"] * np.where(y > 0, y, p["alpha"] * np.expm1(np.minimum(y, 0))),
        "gelu": lambda y: y * 0.5 * (1 + erf(y * math.sqrt(0.5))),
        "gelu_tanh": lambda y: y * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3))),
        "hard_sigmoid": lambda y: np.clip(p["alpha"] * y + p["beta"], 0, 1),
        "hard_swish": lambda y: y * np.clip(p["alpha"] * y + p["beta"], 0, 1),
        "mish": lambda y: y * np.tanh(np.logaddexp(0, y)),
        "sigmoid": lambda y: 1 / (1 + np.exp(-y)),
        "silu": lambda y: y / (1 + np.exp(-p["alpha"] * y)),
        "softplus": lambda y: np.logaddexp(0, y),
        "tanh": np.tanh,
    }
    return functions[name]


def _candidates(values: Array) -> list[tuple[str, dict[str, float]]]:
    """Functions that a curve of these values may be."""
    at_one = values[np.argmin(np.abs(_GRID - 1))]
    found: list[tuple[str, dict[str, float]]] = [(name, {}) for name in ACTIVATIONS]
    found.append(("hard_swish", {"alpha": 0.2}))
    if 0.5 < at_one < 1:  # x sigmoid(alpha x)
        found.append(("silu", {"alpha": float(-np.log(1 / at_one - 1))}))
    return found


def _function_of(layer: Layer) -> Callable[[Array], Array] | None:
    """What a layer makes of each element alone, the same for all; None where it does something else."""
    match layer:
        case graph.BatchNorm() if (layer.scale == layer.scale[0]).all() and (layer.shift == layer.shift[0]).all():
            scale, shift = float(layer.scale[0]), float(layer.shift[0])
            return lambda y: scale * y + shift
        case graph.ReLU():
            return lambda y: np.maximum(y, 0)
        case graph.Clip():
            low, high = layer.low, layer.high
            return lambda y: np.clip(y, low, high)
        case graph.LeakyReLU():
            slope = layer.slope
            return lambda y: np.where(y > 0, y, slope * y)
        case graph.Power():
            exponent = layer.exponent
            return lambda y: np.abs(y)**exponent
        case graph.Activation():
            fields: dict[str, Any] = {name: getattr(layer, name) for name in ACTIVATIONS[layer.function]}
            return reference(layer.function, **fields)
    return None
