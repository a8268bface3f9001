"""How kernels that copy blocks of their input (convolutions and pools on processors) cut it up.

See kernels/cpu/conv2d.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdtd.lowering.builder import read_only
from fastdtd.protocols import BlockedDevice

MAX_TAPS = 2**16  # of a window: tables have an entry for each


@dataclass(frozen=True, eq=False)
class Blocks:
    """How one product (a direction of a layer, a phase of its backward pass) reads its input.

    planes (P, 2) are where each plane begins, `shifts` holds for each tap the plane that it reads and how many rows and
    columns from a position on. A block has `rows` x `columns` positions, its planes halo_rows and halo_columns beyond
    that.
    """

    planes: npt.NDArray[np.int64]
    shifts: list[tuple[int, int, int]]
    rows: int
    columns: int
    halo_rows: int
    halo_columns: int

    def offsets(self, copies: int) -> npt.NDArray[np.int32]:
        """Of each row of the product, (copies, taps) one after the other, in scratch of so many copies of planes."""
        width = self.columns + self.halo_columns
        size = (self.rows + self.halo_rows) * width
        taps = np.array([plane * size + row * width + column for plane, row, column in self.shifts], np.int64)
        return (np.arange(copies)[:, None] * (len(self.planes) * size) + taps).ravel().astype(np.int32)

    def elements(self, copies: int) -> int:
        """Of the scratch array that holds so many copies of all planes."""
        return copies * len(self.planes) * (self.rows + self.halo_rows) * (self.columns + self.halo_columns)

    def positions(self) -> int:
        """Of a block, counted along the rows of its planes."""
        return self.rows * (self.columns + self.halo_columns)

    def count(self, rows: int, columns: int) -> int:
        """Blocks in a plane of this size."""
        return -(-rows // self.rows) * -(-columns // self.columns)

    def arguments(self) -> dict[str, Any]:
        """What kernels take of it."""
        return {
            "planes": self.planes, "block_rows": self.rows, "block_columns": self.columns, "halo_rows": self.halo_rows,
            "halo_columns": self.halo_columns
        }


def blocks_of(taps: list[tuple[int, int]], stride: tuple[int, int], grid: tuple[int, int], channels: int,
              kernels: BlockedDevice) -> Blocks:
    """For positions (rows, columns) whose taps read the input at position * stride + tap, in so many channels."""
    if not taps:
        rows, columns = kernels.conv2d_block_shape(*grid, 0, 0, 1)
        return Blocks(int_table([], 2), [], rows, columns, 0, 0)
    # Taps of one remainder share a plane, which begins at the first of them.
    first: dict[tuple[int, int], tuple[int, int]] = {}
    for y, x in taps:
        remainder = y % stride[0], x % stride[1]
        top, left = first.get(remainder, (y, x))
        first[remainder] = min(y, top), min(x, left)
    number = {remainder: i for i, remainder in enumerate(first)}
    shifts = []
    for y, x in taps:
        remainder = y % stride[0], x % stride[1]
        top, left = first[remainder]
        shifts.append((number[remainder], (y - top) // stride[0], (x - left) // stride[1]))
    halo_rows, halo_columns = max(row for _, row, _ in shifts), max(column for _, _, column in shifts)
    rows, columns = grid
    height, width = rows + halo_rows, columns + halo_columns
    hold_too_much = len(first) * height * width > len(taps) * rows * columns
    if hold_too_much or (rows > 1 and 2 * width > 3 * columns):
        first = dict(enumerate(taps))  # type: ignore[arg-type]  # a plane for each tap
        shifts = [(i, 0, 0) for i in range(len(taps))]
        halo_rows = halo_columns = 0
    rows, columns = kernels.conv2d_block_shape(rows, columns, halo_rows, halo_columns, channels * len(first))
    return Blocks(int_table(list(first.values()), 2), shifts, rows, columns, halo_rows, halo_columns)


def int_table(rows: Sequence[tuple[int, ...]], columns: int) -> npt.NDArray[np.int64]:
    return read_only(np.array(rows, np.int64).reshape(-1, columns))
