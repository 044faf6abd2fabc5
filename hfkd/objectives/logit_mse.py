"""Logits, matched directly (Ba and Caruana 2014, arXiv 1312.6184; Kim et al. 2021, arXiv 2105.08919)."""

from __future__ import annotations

from torch import Tensor

from hfkd.functional import at_least_float32
from hfkd.objectives.distillation import Distillation, logits_of
from hfkd.outputs import Batch, Progress, StudentOutput, TeacherOutput


class LogitMSE(Distillation):
    """distill_loss = mean over classes of (z_s - z_t)^2.

    Both papers sum over classes (Ba and Caruana with a factor 1/2; Kim et al. show that KD at a high temperature tends to
    this loss on centred logits); the **mean is a convention of ours**, so that the size does not grow with the number of
    classes: num_labels times smaller than their sum (reconstruction from the equations, their code was not read). Unlike
    KD it also matches the mean logit, which no probability depends on: a shift of all of a row's logits costs.

    student.logits, teacher.logits: (batch, num_labels) or (batch, tokens, num_labels), any kind of head.
    """

    paper = "1312.6184"
    equation = r"L = (1 - \alpha) \, \mathrm{CE} + \alpha \, \frac{1}{C} \lVert z_s - z_t \rVert_2^2"

    def __init__(self, alpha: float = 0.5, label_smoothing: float = 0.0):
        super().__init__(alpha, label_smoothing)

    def distill(
        self, student: StudentOutput, teacher: TeacherOutput, batch: Batch, progress: Progress | None
    ) -> Tensor:
        teacher_logits = logits_of(teacher, student)
        return (at_least_float32(student.logits) - at_least_float32(teacher_logits)).square().mean(-1)
