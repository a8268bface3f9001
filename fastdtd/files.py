"""Output that is whole or not there: written beside its place and renamed into it."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any


def replace(path: Path, write: Callable[[Path], Any]) -> None:
    """`path` as `write` makes it, or as it was before: whatever happens, no half of it is ever to be seen.

    Raises
    ------
    OSError
        And whatever `write` raises; what was written beside is removed then.
    """
    beside = path.with_name(f".{path.name[-50:]}.{uuid.uuid4().hex}")  # within a file system's 255 bytes
    try:
        write(beside)
        with open(beside, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError, ValueError):
            os.unlink(beside)
        raise
