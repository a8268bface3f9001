"""Keras files: files.py takes them apart, reader.py follows their configuration, operators.py makes layers."""

from fastdtd.importers.keras.reader import parse

__all__ = ["parse"]
