"""What the importers that follow tensors from node to node have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

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


def by_channel(value: Any, x: Tensor, refuse: Callable[[str], NoReturn]) -> npt.NDArray[Any]:
    """`value`, which is combined with `x`, as one number for each channel."""
    try:
        return np.broadcast_to(value, (1, x.shape[0]) + (1,) * (x.rank - 2)).reshape(-1)
    except ValueError:
        refuse(f"has a constant of shape {np.shape(value)} for {x.shape[0]} channels; required: one number, or one for each channel")
