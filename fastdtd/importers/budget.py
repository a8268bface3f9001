"""How much a conversion may make of its source: bytes of constants, weights and indices, and steps.

Files come from anywhere, and a small one can ask for much. Whatever makes an array asks first, with its size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastdtd.importers.moves import Node

BASE, TIMES = 2**30, 32  # bytes that any source may make, and more for each byte that it holds
INDEX = 16  # bytes for each element of an index: it is moved, compared and kept
STEP = 8192  # bytes that a step counts as, for it takes time even where it makes nothing


class Budget:
    """What is left, in bytes. What was made counts even after it is gone, so that time is limited, too.

    Parameters
    ----------
    held : int
        Bytes of the source: what it holds it may make, many times over.
    limit : int, optional
        Bytes in all, in place of what follows from `held`.
    """

    def __init__(self, held: int = 0, limit: int | None = None) -> None:
        self.limit = BASE + TIMES * held if limit is None else limit
        self._made = 0

    def take(self, node: Node, count: int, size: int = 8) -> None:
        """Count an array of `count` elements of `size` bytes, and a step; ConversionError where it is too much."""
        self._made += count * size + STEP
        self._check(node, f"makes {count} elements")

    def step(self, node: Node, count: int) -> None:
        """Count so many steps, which make nothing."""
        self._made += count * STEP
        self._check(node, f"takes {count} steps more")

    def _check(self, node: Node, what: str) -> None:
        if self._made > self.limit:
            node.refuse(f"{what}; with them, constants, weights, moved elements and steps come to {_size(self._made)}, "
                        f"and at most {_size(self.limit)} are accepted for a source of this size; max_constants= "
                        f"(--max-constants SIZE) sets another limit, such as {_size(2 * self._made)}")


def _size(count: int) -> str:
    """Bytes in a unit that leaves few digits, as the limit may be given; rounded up."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if count >= 10 * unit:
            return f"{-(-count // unit)}{name}"
    return f"{-(-count // 2**10)}KiB"
