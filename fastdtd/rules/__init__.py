"""Rules: what they are (rule.py), the named sets of them (presets.py), and which layer gets which (assign.py)."""

from fastdtd.rules.assign import Assignment, Rules, assign, input_domain
from fastdtd.rules.presets import DERIVATIVES, PRESETS, Preset
from fastdtd.rules.rule import (
    BIASES,
    GROUP_NORM_RULES,
    LINEAR_RULES,
    NORM_RULES,
    PARAMETERS,
    POOL_RULES,
    PRODUCT_RULES,
    LayerRule,
    Rule,
    Term,
    search_direction,
)

__all__ = [
    "BIASES", "DERIVATIVES", "GROUP_NORM_RULES", "LINEAR_RULES", "NORM_RULES", "PARAMETERS", "POOL_RULES", "PRESETS",
    "PRODUCT_RULES", "Assignment", "LayerRule", "Preset", "Rule", "Rules", "Term", "assign", "input_domain",
    "search_direction",
]
