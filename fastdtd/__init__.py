"""fastdtd: which pixels a network's prediction comes from, by deep Taylor decomposition with compiled kernels.

>>> import fastdtd
>>> explainer = fastdtd.Explainer(fastdtd.load("squeezenet1_1"))
>>> e = explainer("cat.jpg")
>>> print(e)
Explanation of 1 image, 3x227x227
  0  285 Egyptian cat  score ..., relevance ..., absorbed 0
>>> e.relevance.shape
(1, 3, 227, 227)
"""

from fastdtd.analysis import Analysis, analyze
from fastdtd.embedding import Embedded, embed
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
from fastdtd.evaluation import Evaluation, evaluate
from fastdtd.explainer import Explainer
from fastdtd.explanation import Explanation
from fastdtd.graph import Graph
from fastdtd.importers import convert, from_torch
from fastdtd.inputs import ExplanationWarning
from fastdtd.model import Model, Preprocessing
from fastdtd.model_file import load, save
from fastdtd.quantus import explain_func
from fastdtd.results import Results, open_results
from fastdtd.rules import Rule, search_direction

__version__ = "0.1.0"
__all__ = [
    "Analysis", "ConversionError", "DeviceError", "Embedded", "Evaluation", "Explainer", "Explanation",
    "ExplanationWarning", "FastDTDError", "Graph", "InputError", "Model", "ModelError", "OutputError", "PictureError",
    "Preprocessing", "Results", "Rule", "RuleError", "analyze", "convert", "embed", "evaluate", "explain_func",
    "from_torch", "load", "open_results", "save", "search_direction",
]
