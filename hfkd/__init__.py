"""hfkd: knowledge distillation for Hugging Face encoders and vision models.

A teacher answers, an objective scores, a trainer moves the student. The names below are loaded when they are first
used, so that `import hfkd` costs milliseconds and does not import torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "CrossEntropy": "hfkd.objectives",
    "Objective": "hfkd.objectives",
    "SelfDistill": "hfkd.objectives",
    "Progress": "hfkd.outputs",
    "TeacherOutput": "hfkd.outputs",
    "ModelTeacher": "hfkd.teachers",
    "Teacher": "hfkd.teachers",
    "DistillationArguments": "hfkd.trainers.arguments",
    "SelfDistillationArguments": "hfkd.trainers.arguments",
    "DistillationTrainer": "hfkd.trainers.distillation",
    "SelfDistillationTrainer": "hfkd.trainers.self_distillation",
    "MaskedLMCollator": "hfkd.data.collate",
    "two_view_model": "hfkd.models.two_view",
}
__all__ = ["__version__", *_HOME]

if TYPE_CHECKING:
    from hfkd.data.collate import MaskedLMCollator as MaskedLMCollator
    from hfkd.models.two_view import two_view_model as two_view_model
    from hfkd.objectives import CrossEntropy as CrossEntropy
    from hfkd.objectives import Objective as Objective
    from hfkd.objectives import SelfDistill as SelfDistill
    from hfkd.outputs import Progress as Progress
    from hfkd.outputs import TeacherOutput as TeacherOutput
    from hfkd.teachers import ModelTeacher as ModelTeacher
    from hfkd.teachers import Teacher as Teacher
    from hfkd.trainers.arguments import DistillationArguments as DistillationArguments
    from hfkd.trainers.arguments import SelfDistillationArguments as SelfDistillationArguments
    from hfkd.trainers.distillation import DistillationTrainer as DistillationTrainer
    from hfkd.trainers.self_distillation import SelfDistillationTrainer as SelfDistillationTrainer


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'hfkd' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
