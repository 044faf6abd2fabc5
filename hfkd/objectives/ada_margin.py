"""Class margins inside the distillation loss (Lukasik et al. 2022, Teacher's pet, arXiv 2106.10494)."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor

from hfkd.functional import IGNORED, at_least_float32, class_reliability, is_soft, kl_divergence
from hfkd.objectives.distillation import Distillation, checked_choice, checked_positive, checked_weight, logits_of
from hfkd.objectives.per_class import checked_answers, labels_of, learned, refuse_other_classes, value_of_label
from hfkd.outputs import Batch, Progress, StudentOutput, TeacherOutput

VARIANTS = ("logit_adjust", "ldam", "gamma_additive")


class AdaMargin(Distillation):
    """distill_loss = KL(softmax(z_t / T) || softmax(z_s + offset)): a class on which the teacher errs gets a larger margin.

    alpha_y = max(alpha_floor, mean of gamma over the dev examples of class y) (`functional.class_reliability`), s =
    margin_scale. All three variants are **reconstructions, not verified**: that the paper uses this quantity as a margin
    in the distillation loss is read in a later paper of the same group, its place in the loss is not known.

    variant="logit_adjust": offset_y = s * log alpha_y for every class. With s = 1 and but for the teacher's entropy this is
        sum_y p_t(y) * log(1 + sum_{j != y} (alpha_j / alpha_y) * exp(z_j - z_y)), the group's margin loss with the prior
        replaced by alpha.
    variant="ldam": the same offset, for the example's true label only, as LDAM (Cao et al. 2019) has its margin. It needs
        class ids and refuses soft labels.
    variant="gamma_additive": offset_y = s * mean gamma of the class, a margin of at most about s, without a logarithm, so
        that alpha_floor has no effect.

    The offset acts in the distillation term only: the task term, evaluation and predictions use the student's raw logits.
    A student equal to its teacher therefore still has something to learn. margin_scale=0 is KD(temperature_on="teacher").
    alpha is the weight of the whole term and 1 by default: teacher only, as the paper's CIFAR runs. The floor's value and
    the scale are guesses; without a floor log 0 would forbid a class.

    What was learned is `offset_`, (num_labels,), saved with a run. student.logits, teacher.logits: (batch, num_labels) or
    (batch, tokens, num_labels). Raises ValueError for an unknown variant, a temperature that is not above 0, a negative
    margin_scale and a floor outside (0, 1], RuntimeError before `fit`.
    """

    paper = "2106.10494"
    equation = (
        r"L = (1 - \alpha) \, \mathrm{CE}(y, z_s) + "
        r"\alpha \, \mathrm{KL}(\sigma(z_t / T) \| \sigma(z_s + s \log \alpha_y))"
    )
    problem_types = ("single_label_classification",)
    offset_: Tensor | None

    def __init__(
        self,
        temperature: float = 1.0,
        variant: str = "logit_adjust",
        margin_scale: float = 1.0,
        alpha_floor: float = 1e-2,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
    ):
        super().__init__(alpha, label_smoothing)
        self.temperature = checked_positive("temperature", temperature)
        self.variant = checked_choice("variant", variant, VARIANTS)
        self.margin_scale = checked_weight("margin_scale", margin_scale)
        if not 0 < alpha_floor <= 1:
            raise ValueError(f"alpha_floor must lie in (0, 1], got {alpha_floor}: the log of 0 would forbid a class")
        self.alpha_floor = alpha_floor
        self.columns = ("labels",)
        self.register_buffer("offset_", None)
        if variant == "gamma_additive":
            self.equation = self.equation.replace(r"s \log \alpha_y", r"s \, \bar\gamma_y")

    def build(self, student_config: Any, teacher_config: Any, problem_type: str | None) -> None:
        super().build(student_config, teacher_config, problem_type)
        if student_config is not None:
            refuse_other_classes(self, "offset_", student_config.num_labels)

    def fit(self, teacher_logits: Tensor, labels: Tensor) -> Self:
        """Learn `offset_` from logits (examples, num_labels), before temperature, of held-out examples, and their labels.

        Refuses what `AdaAlpha.fit` refuses.
        """
        reliability = class_reliability(*checked_answers(teacher_logits, labels))
        if self.variant != "gamma_additive":
            reliability = reliability.clamp(min=self.alpha_floor).log()
        self.offset_ = (self.margin_scale * reliability).float()
        return self

    def distill(
        self, student: StudentOutput, teacher: TeacherOutput, batch: Batch, progress: Progress | None
    ) -> Tensor:
        student_logits = at_least_float32(student.logits)
        offset = self._offset(student_logits, batch).to(student_logits.dtype)
        return kl_divergence(student_logits + offset, at_least_float32(logits_of(teacher, student)) / self.temperature)

    def _offset(self, student_logits: Tensor, batch: Batch) -> Tensor:
        """(num_labels,), or (..., num_labels) where it depends on the label."""
        offset = learned(self, "offset_", student_logits)
        if self.variant != "ldam":
            return offset
        labels = labels_of(self, batch.get("labels"))
        if is_soft(labels):
            raise ValueError(
                "variant='ldam' has its margin at the labelled class, and the labels are probabilities: leave mixup and "
                "cutmix off, or use variant='logit_adjust'"
            )
        labels = labels.masked_fill(labels == IGNORED, 0).unsqueeze(-1)  # these units are dropped afterwards
        zeros = torch.zeros_like(student_logits, dtype=offset.dtype)
        return zeros.scatter(-1, labels, value_of_label(offset, labels))
