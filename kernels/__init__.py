"""Arithmetic only: arrays and integers go in and out. Each device is a package of the same functions."""

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

DEVICES = ("cpu", "cuda")


def load(device: str, on_compile: Callable[[], Any] | None = None,
         on_unkept: Callable[[str], Any] | None = None) -> ModuleType:
    """The kernels of `device`, one of DEVICES.

    on_compile() will be called when a kernel that is not on disk is about to be compiled, on_unkept(reason) when it
    cannot be kept there.
    """
    jit = importlib.import_module(f"{__name__}.{device}.jit")
    jit.on_compile, jit.on_unkept = on_compile or jit.on_compile, on_unkept or jit.on_unkept
    return importlib.import_module(f"{__name__}.{device}")
