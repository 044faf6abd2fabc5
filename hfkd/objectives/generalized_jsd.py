"""Between forward and reverse KL (Agarwal et al. 2024, arXiv 2306.13649)."""

from __future__ import annotations

from torch import Tensor

from hfkd.functional import generalized_jsd, two_class_logits
from hfkd.objectives.distillation import Distillation, checked_positive, logits_of
from hfkd.outputs import Batch, Progress, StudentOutput, TeacherOutput


class GeneralizedJSD(Distillation):
    """distill_loss = T^2 * (b KL(p_t || m) + (1 - b) KL(p_s || m)), m = b p_t + (1 - b) p_s, summed over classes.

    b = `interpolation` is on the teacher, in the mixture too, as in the paper's equation 1 and in TRL's
    `generalized_jsd_loss` (its beta), which was read. As there, 0 is KL(p_t || p_s), exactly `KD`, and 1 the reverse,
    KL(p_s || p_t), which seeks one mode of the teacher; the formula itself goes to 0 at both ends, so 0.01 is a weak loss
    and not almost KD. TRL has **no T^2**: its value is ours divided by T^2.

    Multi-label heads: each label is a problem of two classes (sigmoid), averaged over labels. Regression has no
    distributions and is refused.

    student.logits, teacher.logits: (batch, num_labels) or (batch, tokens, num_labels).
    Raises ValueError for an interpolation outside [0, 1] and for a temperature that is not above 0.
    """

    paper = "2306.13649"
    equation = (
        r"L = (1 - \alpha) \, \mathrm{CE} + \alpha \, T^2 \, "
        r"(\beta \, \mathrm{KL}(p_t \| m) + (1 - \beta) \, \mathrm{KL}(p_s \| m)), \; m = \beta p_t + (1 - \beta) p_s"
    )
    problem_types = ("single_label_classification", "multi_label_classification")

    def __init__(
        self,
        interpolation: float = 0.5,
        temperature: float = 1.0,
        alpha: float = 0.5,
        label_smoothing: float = 0.0,
    ):
        super().__init__(alpha, label_smoothing)
        if not 0.0 <= interpolation <= 1.0:  # also NaN
            raise ValueError(
                f"interpolation must lie in [0, 1] (0: KL to the student, 1: reverse), got {interpolation}"
            )
        self.interpolation = interpolation
        self.temperature = checked_positive("temperature", temperature)

    def distill(
        self, student: StudentOutput, teacher: TeacherOutput, batch: Batch, progress: Progress | None
    ) -> Tensor:
        student_logits, teacher_logits = student.logits, logits_of(teacher, student)
        if self.problem_type == "multi_label_classification":
            pair = two_class_logits(student_logits), two_class_logits(teacher_logits)
            return self.temperature**2 * generalized_jsd(*pair, self.interpolation, self.temperature).mean(-1)
        return self.temperature**2 * generalized_jsd(
            student_logits, teacher_logits, self.interpolation, self.temperature
        )
