"""Hard labels from the teacher (pseudo-labels)."""

from __future__ import annotations

from torch import Tensor

from hfkd.functional import cross_entropy
from hfkd.objectives.distillation import Distillation
from hfkd.outputs import Batch, Progress, StudentOutput, TeacherOutput


class PseudoLabel(Distillation):
    """L = (1 - alpha) * CE(y, z_s) + alpha * CE(c, z_s), c the class that the teacher names.

    c is what the teacher answers as `labels` (`EnsembleTeacher(combine="vote")`, or "sample": one member drawn for each
    example) or else the argmax of its logits. alpha is 1 by default: the method is for unlabelled or wrongly labelled data.
    A student equal to its teacher still has something to learn: confidence.

    student.logits: (batch, num_labels) or (batch, tokens, num_labels); single-label heads only.
    """

    equation = r"L = (1 - \alpha) \, \mathrm{CE}(y, z_s) + \alpha \, \mathrm{CE}(c, z_s)"
    problem_types = ("single_label_classification",)

    def __init__(self, alpha: float = 1.0, label_smoothing: float = 0.0):
        super().__init__(alpha, label_smoothing)

    def distill(
        self, student: StudentOutput, teacher: TeacherOutput, batch: Batch, progress: Progress | None
    ) -> Tensor:
        if teacher.labels is None and teacher.logits is None:
            raise ValueError("the teacher answered neither labels nor logits: use a model with a head, or an ensemble")
        labels = teacher.logits.argmax(-1) if teacher.labels is None else teacher.labels  # type: ignore[union-attr]
        if labels.shape != student.logits.shape[:-1]:
            raise ValueError(
                f"the teacher names {tuple(labels.shape)} classes, the student's logits are {tuple(student.logits.shape)}: both "
                "must have the same labels and, for token heads, the same tokens"
            )
        return cross_entropy(student.logits, labels)
