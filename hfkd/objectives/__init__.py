"""Objectives, one file each. A new one is a file here and a line in OBJECTIVES (for the command line)."""

from hfkd.objectives.attention_maps import AttentionMaps
from hfkd.objectives.cross_entropy import CrossEntropy
from hfkd.objectives.dist import DIST
from hfkd.objectives.distillation import Distillation
from hfkd.objectives.dkd import DKD
from hfkd.objectives.generalized_jsd import GeneralizedJSD
from hfkd.objectives.hidden_states import HiddenStates
from hfkd.objectives.kd import KD
from hfkd.objectives.logit_mse import LogitMSE
from hfkd.objectives.minilm_relations import MiniLMRelations
from hfkd.objectives.objective import Objective
from hfkd.objectives.pseudo_label import PseudoLabel
from hfkd.objectives.relational_kd import RelationalKD
from hfkd.objectives.self_distill import MaskedLM, SelfDistill

OBJECTIVES: dict[str, type[Objective]] = {
    "cross_entropy": CrossEntropy,
    "kd": KD,
    "dkd": DKD,
    "dist": DIST,
    "logit_mse": LogitMSE,
    "generalized_jsd": GeneralizedJSD,
    "hidden_states": HiddenStates,
    "attention_maps": AttentionMaps,
    "minilm_relations": MiniLMRelations,
    "pseudo_label": PseudoLabel,
    "relational_kd": RelationalKD,
    "masked_lm": MaskedLM,
    "self_distill": SelfDistill,
}

__all__ = [
    "DIST",
    "DKD",
    "KD",
    "OBJECTIVES",
    "AttentionMaps",
    "CrossEntropy",
    "Distillation",
    "GeneralizedJSD",
    "HiddenStates",
    "LogitMSE",
    "MaskedLM",
    "MiniLMRelations",
    "Objective",
    "PseudoLabel",
    "RelationalKD",
    "SelfDistill",
]
