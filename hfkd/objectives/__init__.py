"""Objectives, one file each. A new one is a file here and a line in OBJECTIVES (for the command line)."""

from hfkd.objectives.ada_alpha import AdaAlpha
from hfkd.objectives.ada_margin import AdaMargin
from hfkd.objectives.attention_maps import AttentionMaps
from hfkd.objectives.balanced_student import BalancedStudent
from hfkd.objectives.collaboration import Collaboration, GroupObjective, MutualLearning
from hfkd.objectives.cross_entropy import CrossEntropy
from hfkd.objectives.deit_token import DeiTToken
from hfkd.objectives.dist import DIST
from hfkd.objectives.distillation import Distillation
from hfkd.objectives.dkd import DKD
from hfkd.objectives.generalized_jsd import GeneralizedJSD
from hfkd.objectives.group_dro import GroupDRO
from hfkd.objectives.hidden_states import HiddenStates
from hfkd.objectives.kd import KD
from hfkd.objectives.logit_mse import LogitMSE
from hfkd.objectives.masked_images import MaskedImages, SelfDistillImages
from hfkd.objectives.minilm_relations import MiniLMRelations
from hfkd.objectives.objective import Objective
from hfkd.objectives.pseudo_label import PseudoLabel
from hfkd.objectives.relational_kd import RelationalKD
from hfkd.objectives.self_distill import MaskedLM, SelfDistill
from hfkd.objectives.switch import Switch

OBJECTIVES: dict[str, type[Objective]] = {
    "cross_entropy": CrossEntropy,
    "kd": KD,
    "dkd": DKD,
    "dist": DIST,
    "deit_token": DeiTToken,
    "logit_mse": LogitMSE,
    "generalized_jsd": GeneralizedJSD,
    "hidden_states": HiddenStates,
    "attention_maps": AttentionMaps,
    "minilm_relations": MiniLMRelations,
    "pseudo_label": PseudoLabel,
    "relational_kd": RelationalKD,
    "ada_alpha": AdaAlpha,
    "ada_margin": AdaMargin,
    "balanced_student": BalancedStudent,
    "group_dro": GroupDRO,
    "switch": Switch,
    "masked_lm": MaskedLM,
    "self_distill": SelfDistill,
    "masked_images": MaskedImages,
    "self_distill_images": SelfDistillImages,
}

__all__ = [
    "DIST",
    "DKD",
    "KD",
    "OBJECTIVES",
    "AdaAlpha",
    "AdaMargin",
    "AttentionMaps",
    "BalancedStudent",
    "Collaboration",
    "CrossEntropy",
    "DeiTToken",
    "Distillation",
    "GeneralizedJSD",
    "GroupDRO",
    "GroupObjective",
    "HiddenStates",
    "LogitMSE",
    "MaskedImages",
    "MaskedLM",
    "MiniLMRelations",
    "MutualLearning",
    "Objective",
    "PseudoLabel",
    "RelationalKD",
    "SelfDistill",
    "SelfDistillImages",
    "Switch",
]
