"""Objectives, one file each. A new one is a file here and a line in OBJECTIVES (for the command line)."""

from hfkd.objectives.cross_entropy import CrossEntropy
from hfkd.objectives.objective import Objective
from hfkd.objectives.self_distill import MaskedLM, SelfDistill

OBJECTIVES: dict[str, type[Objective]] = {
    "cross_entropy": CrossEntropy,
    "masked_lm": MaskedLM,
    "self_distill": SelfDistill,
}

__all__ = ["OBJECTIVES", "CrossEntropy", "MaskedLM", "Objective", "SelfDistill"]
