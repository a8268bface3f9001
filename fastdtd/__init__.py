"""fastdtd: which pixels a network's prediction comes from, by deep Taylor decomposition with compiled kernels.

>>> model = fastdtd.load("squeezenet1_1")
>>> explainer = fastdtd.Explainer(model)
>>> e = explainer(model.preprocess("cat.jpg"))
>>> e.relevance, e.output, e.target, e.explained, e.ledger
"""

from fastdtd.errors import (
    ConversionError,
    DeviceError,
    FastDTDError,
    InputError,
    ModelError,
    OutputError,
    PictureError,
    RuleError,
)
from fastdtd.explainer import Explainer
from fastdtd.explanation import Explanation
from fastdtd.graph import Graph
from fastdtd.importers import convert, from_torch
from fastdtd.inputs import ExplanationWarning
from fastdtd.model import Model, Preprocessing
from fastdtd.model_file import load, save
from fastdtd.rules import Rule, search_direction

__version__ = "0.1.0"
__all__ = [
    "ConversionError", "DeviceError", "Explainer", "Explanation", "ExplanationWarning", "FastDTDError", "Graph",
    "InputError", "Model", "ModelError", "OutputError", "PictureError", "Preprocessing", "Rule", "RuleError", "convert",
    "from_torch", "load", "save", "search_direction",
]
