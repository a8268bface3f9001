"""ONNX files: reader.py takes them apart, constants.py computes what needs no input, operators.py makes layers."""

from fastdtd.importers.onnx.reader import CHANNELS_LAST, parse

__all__ = ["CHANNELS_LAST", "parse"]
