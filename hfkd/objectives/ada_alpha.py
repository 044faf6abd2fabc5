"""Label-dependent trust in the teacher (Lukasik et al. 2022, Teacher's pet, arXiv 2106.10494)."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor

from hfkd.functional import at_least_float32, class_reliability, cross_entropy, is_soft, kl_divergence
from hfkd.objectives.distillation import Distillation, checked_positive, logits_of
from hfkd.objectives.per_class import checked_answers, labels_of, learned, refuse_other_classes, value_of_label
from hfkd.outputs import Batch, Progress, StudentOutput, TeacherOutput, Terms


class AdaAlpha(Distillation):
    """L = (1 - alpha_y) * CE(y, z_s) + alpha_y * KL(softmax(z_t / T) || softmax(z_s)), y the example's true label.

    `fit` learns alpha_y = alpha * max(0, mean of gamma over the dev examples of class y), `functional.class_reliability`:
    where the teacher is no better than a guess, the student learns from the labels alone. The dev examples must not be
    those that the teacher was trained on, of which it is sure whatever it knows. What was learned is `alpha_`,
    (num_labels,), saved with a run; it may also be set by hand (equal entries make this KD with that alpha and
    temperature_on="teacher").

    alpha: the weight of a class on which the teacher is always right and sure. Whether the paper's alpha = 0.2 for
    ImageNet is replaced by alpha_y (alpha=1 here) or scales it (alpha=0.2) is not known. With alpha=0 this is CrossEntropy.
    The paper has a cross-entropy to the teacher where this has the KL divergence, as KD does: they differ by the
    teacher's entropy, which has no gradient, so that the logged loss is lower and training the same.

    The temperature is on the teacher's side only, without T^2, as KD(temperature_on="teacher").

    Reconstruction, not verified: the paper's own text was not at hand. That the one-hot and the distillation loss are
    mixed by gamma, averaged per class on held-out data, is read in a later paper of the same group; the clip at 0 is
    recalled, and that gamma is measured at temperature 1 is a guess.

    Soft labels (batch, num_labels), as mixup makes them: L is linear in the label, so the mean of the losses of all
    labels, weighted by them. student.logits, teacher.logits: (batch, num_labels) or (batch, tokens, num_labels).
    Raises ValueError for a temperature that is not above 0 and an alpha outside [0, 1], RuntimeError before `fit`.
    """

    paper = "2106.10494"
    equation = (
        r"L = (1 - \alpha_y) \, \mathrm{CE}(y, z_s) + \alpha_y \, \mathrm{KL}(\sigma(z_t / T) \| \sigma(z_s)), \quad "
        r"\alpha_y = \alpha \max(0, \bar\gamma_y)"
    )
    problem_types = ("single_label_classification",)
    alpha_: Tensor | None

    def __init__(self, temperature: float = 1.0, alpha: float = 1.0, label_smoothing: float = 0.0):
        super().__init__(alpha, label_smoothing)
        self.temperature = checked_positive("temperature", temperature)
        self.register_buffer("alpha_", None)

    def build(self, student_config: Any, teacher_config: Any, problem_type: str | None) -> None:
        super().build(student_config, teacher_config, problem_type)
        if student_config is not None:
            refuse_other_classes(self, "alpha_", student_config.num_labels)

    def fit(self, teacher_logits: Tensor, labels: Tensor) -> Self:
        """Learn `alpha_` from logits (examples, num_labels), before temperature, of held-out examples, and their labels.

        Examples with the label -100 are left out. Raises ValueError for a class without an example (and names it),
        for labels that name no class, for logits that are not finite and for shapes that do not match.
        """
        reliability = class_reliability(*checked_answers(teacher_logits, labels))
        self.alpha_ = (self.alpha * reliability.clamp(min=0)).float()
        return self

    def forward(
        self,
        student: StudentOutput,
        teacher: TeacherOutput | None,
        batch: Batch,
        progress: Progress | None = None,
    ) -> Terms:
        if self.alpha == 0:
            return super().forward(student, teacher, batch, progress)
        if teacher is None:
            raise ValueError("AdaAlpha needs a teacher's answer: pass teacher=... to the trainer")
        labels = labels_of(self, batch.get("labels"))
        values = self._of_labelled(self.distill(student, teacher, batch, progress), batch)
        alpha = learned(self, "alpha_", student.logits)
        alpha = alpha.to(torch.promote_types(alpha.dtype, values.dtype))  # 1 - alpha is rounded once, as KD's is
        return {
            "task_loss": self._task_term(student.logits, labels, 1 - alpha),
            "distill_loss": value_of_label(alpha, labels).to(values.dtype) * values,
        }

    def distill(
        self, student: StudentOutput, teacher: TeacherOutput, batch: Batch, progress: Progress | None
    ) -> Tensor:
        return kl_divergence(student.logits, at_least_float32(logits_of(teacher, student)) / self.temperature)

    def _task_term(self, logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        """weights[y] * CE(y); soft labels: the sum over y of labels[y] * weights[y] * CE(y)."""
        if not is_soft(labels):
            losses = cross_entropy(logits, labels, self.label_smoothing)
            return value_of_label(weights, labels).to(losses.dtype) * losses
        shares = labels * weights
        total = shares.sum(-1, keepdim=True)
        shares = shares / total.clamp(min=torch.finfo(total.dtype).tiny)  # label smoothing expects rows that sum to 1
        losses = cross_entropy(logits, shares, self.label_smoothing)
        return total.squeeze(-1).to(losses.dtype) * losses
