"""What the importers that follow tensors from node to node have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdtd.graph import Shape

Padding = tuple[int, int, int, int]
NO_PADDING = (0, 0, 0, 0)


@dataclass(frozen=True)
class Tensor:
    """What a node computes: the layer that makes it, its shape there, and its number of axes in the source, batch included."""

    layer: str
    shape: Shape
    rank: int
    pad: Padding = NO_PADDING  # zeros that a pad puts around it, and which the one who reads it has to add


def sum_of(a: Sequence[int], b: Padding) -> Padding:
    """Both paddings together."""
    return a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3]


def transposed_convolution(weight: npt.NDArray[Any], bias: npt.NDArray[Any] | None, shape: Shape, stride: Sequence[int],
                           padding: Padding, dilation: Sequence[int], groups: int, more: Sequence[int] = (0, 0)
                           ) -> tuple[dict[str, Any], npt.NDArray[np.int64]]:
    """Fields of a Conv2d and index of a Rearrange that together are a transposed convolution.

    weight (C, K / groups, kernel height, kernel width) over an input of `shape`; what `padding` says is cut off, and `more` rows and
    columns are added at the end. Outputs fall into stride x stride phases by the remainder of their position. Each phase is a plain
    convolution with the taps that reach it, made as channels of its own; the index interleaves them.
    """
    channels, per_group, *kernel = weight.shape
    sizes, reaches, phases_of = [], [], []
    for axis in (0, 1):
        taps = [divmod(tap * dilation[axis], stride[axis]) for tap in range(kernel[axis])]  # how far back of a place, and which phase
        sizes.append((shape[1 + axis] - 1) * stride[axis] + dilation[axis] * (kernel[axis] - 1) + 1 + more[axis])
        reaches.append(max(back for back, _ in taps))
        phases_of.append(taps)
    phases = stride[0] * stride[1]
    turned = np.zeros((groups, phases, per_group, channels // groups, reaches[0] + 1, reaches[1] + 1), np.float32)
    for i, (up, down) in enumerate(phases_of[0]):
        for j, (left, right) in enumerate(phases_of[1]):
            tap = weight[:, :, i, j].reshape(groups, channels // groups, per_group).swapaxes(1, 2)
            turned[:, down * stride[1] + right, :, :, reaches[0] - up, reaches[1] - left] = tap
    grid = [-(-size // stride[axis]) for axis, size in enumerate(sizes)]
    each = None if bias is None else np.repeat(np.reshape(bias, (groups, 1, per_group)), phases, 1).ravel()
    fields = {"weight": turned.reshape(-1, *turned.shape[3:]), "bias": each, "groups": groups,
              "padding": (reaches[0], reaches[1], grid[0] - shape[1], grid[1] - shape[2])}
    k = np.arange(groups * per_group)
    y, x = np.arange(padding[0], sizes[0] - padding[2]), np.arange(padding[1], sizes[1] - padding[3])
    phase = (y % stride[0])[:, None] * stride[1] + x % stride[1]
    channel = (k // per_group * phases * per_group + k % per_group)[:, None, None] + phase * per_group
    return fields, (channel * grid[0] + (y // stride[0])[:, None]) * grid[1] + x // stride[1]
