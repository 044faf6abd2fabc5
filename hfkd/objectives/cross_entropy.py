"""Training without a teacher: the baseline, so that baseline and student share every other line."""

from __future__ import annotations

from typing import Any

from hfkd.functional import IGNORED, cross_entropy
from hfkd.objectives.objective import Objective
from hfkd.outputs import Batch, Counts, Progress, StudentOutput, TeacherOutput, Terms


class CrossEntropy(Objective):
    """task_loss = -log softmax(z)[y], for sequence, image and token classification.

    Token labels of -100 carry no loss. Label smoothing acts in training; `eval_loss` is without it.
    """

    equation = r"L = -\log \mathrm{softmax}(z)_y"

    def __init__(self, label_smoothing: float = 0.0):
        super().__init__()
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"label_smoothing must lie in [0, 1), got {label_smoothing}")
        self.label_smoothing = label_smoothing

    def build(self, student_config: Any, teacher_config: Any, problem_type: str | None) -> None:
        number = getattr(student_config, "num_labels", 2)
        if problem_type in ("regression", "multi_label_classification") or number < 2:
            raise ValueError(
                f"CrossEntropy scores one label among several; the student has {number} and problem_type {problem_type!r}: "
                "set model.config.problem_type='single_label_classification' or use another objective"
            )

    def forward(
        self,
        student: StudentOutput,
        teacher: TeacherOutput | None,
        batch: Batch,
        progress: Progress | None = None,
    ) -> Terms:
        return {"task_loss": cross_entropy(student.logits, batch["labels"], self.label_smoothing)}

    def count(self, batch: Batch) -> Counts:
        return {"task_loss": (batch["labels"] != IGNORED).sum()}
