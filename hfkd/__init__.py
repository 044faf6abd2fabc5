"""hfkd: knowledge distillation for Hugging Face encoders and vision models.

A teacher answers, an objective scores, a trainer moves the student. The names below are loaded when they are first
used, so that `import hfkd` costs milliseconds and does not import torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "AdaAlpha": "hfkd.objectives",
    "AdaMargin": "hfkd.objectives",
    "AttentionMaps": "hfkd.objectives",
    "BalancedStudent": "hfkd.objectives",
    "CrossEntropy": "hfkd.objectives",
    "DIST": "hfkd.objectives",
    "DKD": "hfkd.objectives",
    "DeiTToken": "hfkd.objectives",
    "Distillation": "hfkd.objectives",
    "GeneralizedJSD": "hfkd.objectives",
    "GroupDRO": "hfkd.objectives",
    "HiddenStates": "hfkd.objectives",
    "KD": "hfkd.objectives",
    "LogitMSE": "hfkd.objectives",
    "MiniLMRelations": "hfkd.objectives",
    "Objective": "hfkd.objectives",
    "PseudoLabel": "hfkd.objectives",
    "RelationalKD": "hfkd.objectives",
    "SelfDistill": "hfkd.objectives",
    "Switch": "hfkd.objectives",
    "Collaboration": "hfkd.objectives",
    "MutualLearning": "hfkd.objectives",
    "Progress": "hfkd.outputs",
    "TeacherOutput": "hfkd.outputs",
    "AdapterTeacher": "hfkd.teachers",
    "CachedTeacher": "hfkd.teachers",
    "EnsembleTeacher": "hfkd.teachers",
    "ModelTeacher": "hfkd.teachers",
    "Teacher": "hfkd.teachers",
    "cache_members": "hfkd.cache",
    "cache_teacher": "hfkd.cache",
    "load_cache": "hfkd.cache",
    "verify_cache": "hfkd.cache",
    "DistillationArguments": "hfkd.trainers.arguments",
    "DistillationTrainingArguments": "hfkd.trainers.arguments",
    "SelfDistillationArguments": "hfkd.trainers.arguments",
    "DistillationTrainer": "hfkd.trainers.distillation",
    "SelfDistillationTrainer": "hfkd.trainers.self_distillation",
    "DistillationCollator": "hfkd.data.collate",
    "MaskedLMCollator": "hfkd.data.collate",
    "CifarResNetConfig": "hfkd.models.cifar_resnet",
    "CifarResNetForImageClassification": "hfkd.models.cifar_resnet",
    "cifar_resnet_config": "hfkd.models.cifar_resnet",
    "init_student_from_teacher": "hfkd.models.student",
    "StudentGroup": "hfkd.models.student_group",
    "CNet": "hfkd.meta",
    "ConstantWeights": "hfkd.meta",
    "WeightTable": "hfkd.meta",
    "CollaborativeArguments": "hfkd.trainers.arguments",
    "CollaborativeTrainer": "hfkd.trainers.collaborative",
    "two_view_model": "hfkd.models.two_view",
}
__all__ = ["__version__", *_HOME]

if TYPE_CHECKING:
    from hfkd.cache import cache_members as cache_members
    from hfkd.cache import cache_teacher as cache_teacher
    from hfkd.cache import load_cache as load_cache
    from hfkd.cache import verify_cache as verify_cache
    from hfkd.data.collate import DistillationCollator as DistillationCollator
    from hfkd.data.collate import MaskedLMCollator as MaskedLMCollator
    from hfkd.meta import CNet as CNet
    from hfkd.meta import ConstantWeights as ConstantWeights
    from hfkd.meta import WeightTable as WeightTable
    from hfkd.models.cifar_resnet import CifarResNetConfig as CifarResNetConfig
    from hfkd.models.cifar_resnet import CifarResNetForImageClassification as CifarResNetForImageClassification
    from hfkd.models.cifar_resnet import cifar_resnet_config as cifar_resnet_config
    from hfkd.models.student import init_student_from_teacher as init_student_from_teacher
    from hfkd.models.student_group import StudentGroup as StudentGroup
    from hfkd.models.two_view import two_view_model as two_view_model
    from hfkd.objectives import DIST as DIST
    from hfkd.objectives import DKD as DKD
    from hfkd.objectives import KD as KD
    from hfkd.objectives import AdaAlpha as AdaAlpha
    from hfkd.objectives import AdaMargin as AdaMargin
    from hfkd.objectives import AttentionMaps as AttentionMaps
    from hfkd.objectives import BalancedStudent as BalancedStudent
    from hfkd.objectives import Collaboration as Collaboration
    from hfkd.objectives import CrossEntropy as CrossEntropy
    from hfkd.objectives import DeiTToken as DeiTToken
    from hfkd.objectives import Distillation as Distillation
    from hfkd.objectives import GeneralizedJSD as GeneralizedJSD
    from hfkd.objectives import GroupDRO as GroupDRO
    from hfkd.objectives import HiddenStates as HiddenStates
    from hfkd.objectives import LogitMSE as LogitMSE
    from hfkd.objectives import MiniLMRelations as MiniLMRelations
    from hfkd.objectives import MutualLearning as MutualLearning
    from hfkd.objectives import Objective as Objective
    from hfkd.objectives import PseudoLabel as PseudoLabel
    from hfkd.objectives import RelationalKD as RelationalKD
    from hfkd.objectives import SelfDistill as SelfDistill
    from hfkd.objectives import Switch as Switch
    from hfkd.outputs import Progress as Progress
    from hfkd.outputs import TeacherOutput as TeacherOutput
    from hfkd.teachers import AdapterTeacher as AdapterTeacher
    from hfkd.teachers import CachedTeacher as CachedTeacher
    from hfkd.teachers import EnsembleTeacher as EnsembleTeacher
    from hfkd.teachers import ModelTeacher as ModelTeacher
    from hfkd.teachers import Teacher as Teacher
    from hfkd.trainers.arguments import CollaborativeArguments as CollaborativeArguments
    from hfkd.trainers.arguments import DistillationArguments as DistillationArguments
    from hfkd.trainers.arguments import DistillationTrainingArguments as DistillationTrainingArguments
    from hfkd.trainers.arguments import SelfDistillationArguments as SelfDistillationArguments
    from hfkd.trainers.collaborative import CollaborativeTrainer as CollaborativeTrainer
    from hfkd.trainers.distillation import DistillationTrainer as DistillationTrainer
    from hfkd.trainers.self_distillation import SelfDistillationTrainer as SelfDistillationTrainer


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'hfkd' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
