"""Training without a teacher: the baseline, so that baseline and student share every other line."""

from __future__ import annotations

from typing import Any

from hfkd.functional import labelled_units, task_loss
from hfkd.objectives.objective import Objective
from hfkd.outputs import Batch, Counts, Progress, StudentOutput, TeacherOutput, Terms


class CrossEntropy(Objective):
    """task_loss = -log softmax(z)[y], for sequence, image and token classification; token labels of -100 cost nothing.

    Heads that are no single-label classifiers get what transformers gives them: multi-label heads binary cross-entropy,
    averaged over labels; regression heads the squared error. Label smoothing acts in training; `eval_loss` is without.

    student.logits: (batch, num_labels) or (batch, tokens, num_labels). Raises ValueError for a smoothing outside [0, 1),
    for smoothing on other heads, and for a single-label head with one label.
    """

    equation = r"L = -\log \mathrm{softmax}(z)_y"

    def __init__(self, label_smoothing: float = 0.0):
        super().__init__()
        self.label_smoothing = checked_smoothing(label_smoothing)

    def build(self, student_config: Any, teacher_config: Any, problem_type: str | None) -> None:
        super().build(student_config, teacher_config, problem_type)
        refuse_wrong_labels(self.label_smoothing, getattr(student_config, "num_labels", 2), self.problem_type)

    def forward(
        self,
        student: StudentOutput,
        teacher: TeacherOutput | None,
        batch: Batch,
        progress: Progress | None = None,
    ) -> Terms:
        return {"task_loss": task_loss(student.logits, batch["labels"], self.problem_type, self.label_smoothing)}

    def count(self, batch: Batch) -> Counts:
        return {"task_loss": labelled_units(batch["labels"], self.problem_type).sum()}


def checked_smoothing(label_smoothing: float) -> float:
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing must lie in [0, 1), got {label_smoothing}")
    return label_smoothing


def refuse_wrong_labels(label_smoothing: float, num_labels: int, problem_type: str) -> None:
    single = problem_type == "single_label_classification"
    if label_smoothing and not single:
        raise ValueError(f"label_smoothing={label_smoothing} smooths class ids, but the head is for {problem_type}")
    if single and num_labels < 2:
        raise ValueError(
            f"the student has {num_labels} label(s) and problem_type {problem_type!r}, so cross-entropy is always 0: set "
            "model.config.problem_type='regression', or num_labels to the number of classes"
        )
