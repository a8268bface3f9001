"""PyTorch modules: reader.py exports and reads them, operators.py makes layers."""

from fastdtd.importers.pytorch.reader import input_channels, load_weights, made_by, parse

__all__ = ["input_channels", "load_weights", "made_by", "parse"]
