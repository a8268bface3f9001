"""Transposed convolutions in terms of layers that there are: a convolution, and a Rearrange of what it makes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdtd.graph import Shape


def transposed_convolution(
        weight: npt.NDArray[Any], bias: npt.NDArray[Any] | None, shape: Shape, stride: Sequence[int],
        padding: Sequence[int], dilation: Sequence[int], groups: int, extra: Sequence[int],
) -> tuple[dict[str, Any], npt.NDArray[np.int64]]:
    """Fields of a Conv2d and index of a Rearrange that together are a transposed convolution.

    weight (C, K / groups, kernel_h, kernel_w) over an input of `shape`; what `padding` says is cut off, and `extra`
    rows and columns are added at the end. Outputs fall into stride_h x stride_w phases by the remainder of their
    position. Each phase is a convolution with the taps that reach it, made as channels of its own; the index
    interleaves them.
    """
    channels, per_group, *kernel = weight.shape
    sizes, reaches, phases_of = [], [], []
    for axis in (0, 1):
        taps = [divmod(tap * dilation[axis], stride[axis]) for tap in range(kernel[axis])]  # (distance, phase)
        sizes.append((shape[1 + axis] - 1) * stride[axis] + dilation[axis] * (kernel[axis] - 1) + 1 + extra[axis])
        reaches.append(max(distance for distance, _ in taps))
        phases_of.append(taps)
    phases = stride[0] * stride[1]
    turned = np.zeros((groups, phases, per_group, channels // groups, reaches[0] + 1, reaches[1] + 1), np.float32)
    for i, (distance_h, phase_h) in enumerate(phases_of[0]):
        for j, (distance_w, phase_w) in enumerate(phases_of[1]):
            tap = weight[:, :, i, j].reshape(groups, channels // groups, per_group).swapaxes(1, 2)
            turned[:, phase_h * stride[1] + phase_w, :, :, reaches[0] - distance_h, reaches[1] - distance_w] = tap
    grid = [-(-size // stride[axis]) for axis, size in enumerate(sizes)]
    biases = None if bias is None else np.repeat(np.reshape(bias, (groups, 1, per_group)), phases, 1).ravel()
    fields = {"weight": turned.reshape(-1, *turned.shape[3:]), "bias": biases, "groups": groups,
              "padding": (reaches[0], reaches[1], grid[0] - shape[1], grid[1] - shape[2])}
    k = np.arange(groups * per_group)
    y, x = np.arange(padding[0], sizes[0] - padding[2]), np.arange(padding[1], sizes[1] - padding[3])
    phase = (y % stride[0])[:, None] * stride[1] + x % stride[1]
    channel = (k // per_group * phases * per_group + k % per_group)[:, None, None] + phase * per_group
    return fields, (channel * grid[0] + (y // stride[0])[:, None]) * grid[1] + x // stride[1]
