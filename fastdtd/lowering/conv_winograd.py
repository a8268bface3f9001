"""3x3 convolutions by Winograd's algorithm F(4x4, 3x3), on processors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastdtd import graph as g
from fastdtd.graph import Array, Graph
from fastdtd.kernels import codes
from fastdtd.lowering.builder import Builder, read_only
from fastdtd.lowering.conv_geometry import backward_weights
from fastdtd.protocols import BlockedDevice
from fastdtd.rules import Term

# Of all that a term's kernel may take.
_BACKWARD = ("c_in", "c", "ratio", "density", "c_in_channel", "c_channel", "sparse_below", "accumulate")


@dataclass(frozen=True, eq=False)
class _Winograd:
    """Transformed weights of winograd2d_forward (two products, of W and of V) or winograd2d_redistribute (one)."""

    weights: Array  # (products, groups * 36, panels, channels, rows)
    channels: int  # of a group that are summed over
    groups: int
    products: int
    padding: tuple[int, int]  # rows, columns

    def _arguments(self, b: Builder, height: int, width: int) -> tuple[int, dict[str, Any]]:
        """Units, and what both kernels take, for an output of this size."""
        kernels, panels = b.blocked_kernels, self.weights.shape[-3]
        tiles = b.batch * kernels.winograd2d_tiles(height, width)
        blocks, block, panels_at_once = kernels.winograd2d_block(panels, self.products, tiles, b.workers)
        splits = b.splits(blocks * self.groups, panels)
        sizes = kernels.winograd2d_scratch(self.channels, self.products * panels_at_once, block, width)
        names = ("lines", "points", "sums", "stage", "seen")
        scratch = {name: b.scratch(f"winograd {name}", size) for name, size in zip(names, sizes, strict=True)}
        offsets = read_only(np.arange(self.channels, dtype=np.int32) * np.int32(block))
        return blocks * self.groups * splits, {
            "offsets": offsets, "groups": self.groups, "pad_top": self.padding[0], "pad_left": self.padding[1],
            "blocks": blocks, "block": block, "panels_at_once": min(panels_at_once, panels), "splits": splits, **scratch
        }


@dataclass(frozen=True, eq=False)
class Forward(_Winograd):
    """For one sum of a layer's rule."""

    source: Array  # the weights as they are

    def step(self, b: Builder, layer: g.Conv2d, arguments: dict[str, Any]) -> None:
        units, own = self._arguments(b, *b.graph.shapes[layer.name][1:])
        b.step(b.blocked_kernels.winograd2d_forward, units, **arguments, weight=self.source, packed=self.weights,
               channels=self.channels, **own)


@dataclass(frozen=True, eq=False)
class Backward(_Winograd):
    """For one term of a layer's rule."""

    def step(self, b: Builder, layer: g.Conv2d, source: str, arguments: dict[str, Any]) -> None:
        channels, height, width = b.graph.shapes[source]
        units, own = self._arguments(b, height, width)
        del own["seen"]
        c_min = -math.inf if layer.name in b.assignment.signed else 0.0  # of what comes back: no rounding below it
        b.step(b.blocked_kernels.winograd2d_redistribute, units, **{name: arguments[name] for name in _BACKWARD},
               packed=self.weights[0], inputs=channels, c_min=c_min, **own)


def suits(layer: g.Conv2d, term: Term) -> bool:
    return (layer.weight.shape[2:] == (3, 3) and layer.stride == layer.dilation == (1, 1)
            and term.features == codes.NONNEGATIVE)


def pack_forward(layer: g.Conv2d, term: Term, graph: Graph, kernels: BlockedDevice) -> Forward | None:
    """None where another algorithm is faster."""
    outputs, channels = len(layer.weight) // layer.groups, layer.weight.shape[1]
    if not suits(layer, term) or not kernels.winograd2d_pays(channels, outputs, *graph.shapes[layer.name][1:], 2):
        return None
    weight = term.w(layer.weight)
    packed = _pack((weight, np.maximum(weight, 0)), layer.groups, kernels)
    return Forward(packed, channels, layer.groups, 2, layer.padding[:2], read_only(weight))


def pack_backward(layer: g.Conv2d, term: Term, graph: Graph, carries: bool, kernels: BlockedDevice) -> Backward | None:
    """None where another algorithm is faster, or has to be taken because relevance is carried."""
    outputs, channels = len(layer.weight) // layer.groups, layer.weight.shape[1]
    _, height, width = graph.shapes[layer.inputs[0]]
    if not suits(layer, term) or carries or not kernels.winograd2d_pays(outputs, channels, height, width, 1):
        return None
    v = backward_weights(layer, term).reshape(layer.groups, outputs, channels, 3, 3)
    packed = _pack((v[..., ::-1, ::-1].swapaxes(1, 2),), layer.groups, kernels)
    return Backward(packed, outputs, layer.groups, 1, (2 - layer.padding[0], 2 - layer.padding[1]))


def _pack(weights: tuple[Array, ...], groups: int, kernels: BlockedDevice) -> Array:
    rows, channels = weights[0].size // (9 * groups * weights[0].shape[-3]), weights[0].shape[-3]
    packed = np.empty((len(weights), *kernels.winograd2d_packed_shape(groups, rows, channels)), np.float32)
    for to, weight in zip(packed, weights, strict=True):
        kernels.winograd2d_pack(to, read_only(weight.reshape(groups, rows, channels, 3, 3)))
    return read_only(packed)
