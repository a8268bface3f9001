"""Arithmetic only: arrays and integers go in and out. Each device is a package of the same modules, functions and signatures."""

import importlib
from types import ModuleType

DEVICES = ("cpu",)


def load(device: str) -> ModuleType:
    """The kernels of `device`, one of DEVICES."""
    return importlib.import_module(f"{__name__}.{device}")
