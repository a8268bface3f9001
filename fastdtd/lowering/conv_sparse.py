"""The backward pass of a convolution that skips zeros, on processors, for images whose ratio * c has few others."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastdtd import graph as g
from fastdtd.graph import Array, Shape
from fastdtd.kernels import codes
from fastdtd.lowering.builder import Builder, in_one_row, read_only
from fastdtd.lowering.conv_geometry import backward_weights, is_pointwise
from fastdtd.protocols import BlockedDevice
from fastdtd.rules import Term

# Of all that a term's kernel may take.
_ARGUMENTS = ("c_in", "c", "ratio", "a", "low", "high", "c_in_channel", "c_channel", "a_channel", "accumulate")


@dataclass(frozen=True, eq=False)
class Sparse:
    """Weights of sparse2d_redistribute for one term of a layer's rule, and below which density it takes an image."""

    weights: Array
    features: int
    of_inputs: int  # features of all inputs
    below: float

    def step(self, b: Builder, layer: g.Conv2d, source: str, arguments: dict[str, Any]) -> None:
        kernels, (inputs, height, across), columns = b.blocked_kernels, b.graph.shapes[source], b.graph.shapes[
            layer.name][2]
        arguments = {name: arguments[name] for name in _ARGUMENTS}
        if is_pointwise(layer):
            height, across = 1, height * across
            arguments |= in_one_row(arguments, ("c_in", "c", "ratio", "a"))
        parts = splits = 1
        if b.workers > b.batch == 1 and kernels.sparse2d_splits_channels(self.weights.shape, b.workers):
            splits = b.workers
        elif b.workers > 1:
            parts = -(-2 * b.workers // b.batch)
        block = kernels.sparse2d_block(len(layer.weight), height, across, is_pointwise(layer), parts)
        kernel_w = layer.weight.shape[3]
        sizes = kernels.sparse2d_scratch(self.weights.shape, self.of_inputs, kernel_w, columns, layer.stride[0], *block)
        lists, tile, sums = (b.scratch(f"sparse {name}", size)
                             for name, size in zip(("lists", "tile", "sums"), sizes, strict=True))
        units = b.batch * -(-height // block[0]) * -(-across // block[1]) * splits
        b.step(kernels.sparse2d_redistribute, units, **arguments, density=density(b), packed=self.weights, lists=lists,
               tile=tile, sums=sums, inputs=inputs, kernel_w=kernel_w, stride_h=layer.stride[0],
               stride_w=layer.stride[1], pad_top=layer.padding[0], pad_left=layer.padding[1], block_rows=block[0],
               block_columns=block[1], splits=splits, features=self.features, sparse_below=self.below)


def density(b: Builder) -> Any:
    """How much of a layer's ratio * c is not zero, by image."""
    return b.state("density", (), np.float32)


def density_step(b: Builder, arguments: dict[str, Any]) -> None:
    b.step(b.blocked_kernels.density_redistribute, b.batch, density=density(b),
           **{name: arguments[name] for name in ("ratio", "c", "c_channel")})


def pack(layer: g.Conv2d, term: Term, in_shape: Shape, carries: bool, winograd: bool, kernels: BlockedDevice
         ) -> Sparse | None:
    """None where it is never faster than what is done otherwise, such as Winograd's algorithm.

    carries: whether relevance is carried, not its factor.
    """
    outputs, inputs, *kernel = layer.weight.shape
    box = term.features == codes.BOX
    top, left, bottom, right = layer.padding
    if (layer.groups > 1 or layer.dilation != (1, 1) or top + bottom >= kernel[0] or left + right >= kernel[1]
            or not (box or term.features == codes.ONES or (term.features == codes.NONNEGATIVE and not carries))):
        return None
    features = 2 * inputs if box else inputs
    _, height, width = in_shape
    tiles_used = height * width / (16 * kernels.winograd2d_tiles(height, width)) if winograd else 0.0
    below = kernels.sparse2d_below(features, kernel[0] * kernel[1], box, tiles_used)
    if below <= 0:
        return None
    shape = kernels.sparse2d_packed_shape(outputs, features, *kernel)
    packed = kernels.empty(math.prod(shape))[:math.prod(shape)].reshape(shape)  # a row that crosses lines loads twice
    kernels.sparse2d_pack(packed, read_only(backward_weights(layer, term).reshape(layer.weight.shape)), box)
    return Sparse(read_only(packed), term.features, features, below)
