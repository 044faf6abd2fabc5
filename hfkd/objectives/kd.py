"""Soft targets (Hinton, Vinyals and Dean 2015, arXiv 1503.02531)."""

from __future__ import annotations

from torch import Tensor

from hfkd.functional import at_least_float32, kl_divergence, two_class_logits
from hfkd.objectives.distillation import Distillation, checked_choice, checked_positive, logits_of
from hfkd.outputs import Batch, Progress, StudentOutput, TeacherOutput

SIDES = ("both", "teacher")


class KD(Distillation):
    """L = (1 - alpha) * CE(y, z_s) + alpha * T^2 * KL(softmax(z_t / T) || softmax(z_s / T)), **summed** over classes.

    temperature_on="both": the equation above, Hinton et al. section 2.1; T^2 keeps the gradients' size.
    temperature_on="teacher": KL(softmax(z_t / T) || softmax(z_s)), the student at temperature 1 and no T^2: the
    convention of Teacher's pet (arXiv 2106.10494, eq. 1; taken from the group's other papers, not verified there).
    With the student equal to the teacher this is 0 only at T = 1.

    Multi-label heads: each label is a problem of two classes (sigmoid), the KL is averaged over labels, as the task term
    is. Regression heads: (z_s - z_t)^2, averaged over outputs; there is no temperature. Token heads: one value a
    labelled token.

    student.logits, teacher.logits: (batch, num_labels) or (batch, tokens, num_labels), before temperature.
    Raises ValueError for a temperature that is not above 0 and for an alpha outside [0, 1].
    """

    paper = "1503.02531"
    equation = (
        r"L = (1 - \alpha) \, \mathrm{CE}(y, z_s) + \alpha \, T^2 \, \mathrm{KL}(\sigma(z_t / T) \| \sigma(z_s / T))"
    )

    def __init__(
        self,
        temperature: float = 2.0,
        alpha: float = 0.5,
        temperature_on: str = "both",
        label_smoothing: float = 0.0,
    ):
        super().__init__(alpha, label_smoothing)
        self.temperature = checked_positive("temperature", temperature)
        self.temperature_on = checked_choice("temperature_on", temperature_on, SIDES)
        if temperature_on == "teacher":
            self.equation = (
                r"L = (1 - \alpha) \, \mathrm{CE}(y, z_s) + \alpha \, \mathrm{KL}(\sigma(z_t / T) \| \sigma(z_s))"
            )

    def distill(
        self, student: StudentOutput, teacher: TeacherOutput, batch: Batch, progress: Progress | None
    ) -> Tensor:
        student_logits, teacher_logits = student.logits, logits_of(teacher, student)
        if self.problem_type == "regression":
            return (at_least_float32(student_logits) - at_least_float32(teacher_logits)).square().mean(-1)
        if self.problem_type == "multi_label_classification":
            return self.divergence(two_class_logits(student_logits), two_class_logits(teacher_logits)).mean(-1)
        return self.divergence(student_logits, teacher_logits)

    def divergence(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """(..., classes) -> (...)."""
        if self.temperature_on == "teacher":
            return kl_divergence(student_logits, at_least_float32(teacher_logits) / self.temperature)
        return self.temperature**2 * kl_divergence(student_logits, teacher_logits, self.temperature)
