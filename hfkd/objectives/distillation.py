"""What most objectives share: a task term and a distillation term, mixed by alpha."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from hfkd.functional import labelled_units, task_loss
from hfkd.objectives.cross_entropy import checked_smoothing, refuse_wrong_labels
from hfkd.objectives.objective import Objective
from hfkd.outputs import Batch, Progress, StudentOutput, TeacherOutput, Terms


class Distillation(Objective):
    """L = (1 - alpha) * task_loss + alpha * distill_loss. A subclass writes `distill` and stores its hyper-parameters.

    alpha is always the weight of the **distillation** term. With alpha = 1 labels are not needed (token heads read from them
    which tokens count), with alpha = 0 no teacher is asked (this is CrossEntropy). Label smoothing acts on the task term only.

    Raises ValueError for an alpha outside [0, 1] and for a smoothing outside [0, 1).
    """

    def __init__(self, alpha: float = 0.5, label_smoothing: float = 0.0, needs: tuple[str, ...] = ()):
        super().__init__()
        if not 0.0 <= alpha <= 1.0:  # also NaN
            raise ValueError(f"alpha is the weight of the distillation term and must lie in [0, 1], got {alpha}")
        self.alpha = alpha
        self.label_smoothing = checked_smoothing(label_smoothing)
        self.needs = frozenset({"teacher", *needs} if alpha > 0 else ())

    def build(self, student_config: Any, teacher_config: Any, problem_type: str | None) -> None:
        super().build(student_config, teacher_config, problem_type)
        refuse_wrong_labels(self.label_smoothing, getattr(student_config, "num_labels", 2), self.problem_type)

    @abstractmethod
    def distill(
        self, student: StudentOutput, teacher: TeacherOutput, batch: Batch, progress: Progress | None
    ) -> Tensor:
        """One value per unit, not reduced: (batch,), or (batch, tokens) for token heads. No gradient to the teacher."""

    def forward(
        self,
        student: StudentOutput,
        teacher: TeacherOutput | None,
        batch: Batch,
        progress: Progress | None = None,
    ) -> Terms:
        terms = {}
        if self.alpha < 1:
            if "labels" not in batch:
                raise ValueError(
                    f"alpha is {self.alpha}, so the task term needs labels, and the batch has only {sorted(batch)}: add a "
                    "labels column, or set alpha=1 to learn from the teacher alone"
                )
            task = task_loss(student.logits, batch["labels"], self.problem_type, self.label_smoothing)
            terms["task_loss"] = (1 - self.alpha) * task
        if self.alpha > 0:
            if teacher is None:
                raise ValueError(f"{type(self).__name__} needs a teacher's answer: pass teacher=... to the trainer")
            values = self.distill(student, teacher, batch, progress)
            terms["distill_loss"] = self.alpha * self._of_labelled(values, batch)
        return terms

    def _of_labelled(self, values: Tensor, batch: Batch) -> Tensor:
        """Unlabelled units cost nothing: they are not counted either."""
        if "labels" not in batch:
            if values.dim() > 1:
                raise ValueError("token heads need labels even with alpha=1: -100 marks the tokens that do not count")
            return values
        labelled = labelled_units(batch["labels"], self.problem_type)
        return torch.where(labelled, values, torch.zeros_like(values))


def checked_choice(name: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    return value


def checked_positive(name: str, value: float) -> float:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be a finite number above 0, got {value}")
    return value


def checked_weight(name: str, value: float) -> float:
    if not 0 <= value < math.inf:  # also NaN
        raise ValueError(f"{name} must be a finite number, 0 or above, got {value}")
    return value


def logits_of(teacher: TeacherOutput, student: StudentOutput) -> Tensor:
    """The teacher's logits, detached. Raises ValueError where there are none, or of another shape than the student's."""
    if teacher.logits is None:
        raise ValueError(
            "the teacher answered no logits: use a model with a head, a CachedTeacher with logits, or, for an ensemble that "
            "votes or draws labels, the objective PseudoLabel"
        )
    if teacher.logits.shape != student.logits.shape:
        raise ValueError(
            f"the teacher's logits are {tuple(teacher.logits.shape)}, the student's {tuple(student.logits.shape)}: both "
            "must have the same labels and, for token heads, the same tokens (hfkd.data.words aligns two tokenizers)"
        )
    return teacher.logits.detach()
