"""ONNX files: reader.py takes them apart, constants.py computes what needs no input, operators.py makes layers."""

from fastdtd.importers.onnx.reader import parse

__all__ = ["parse"]
