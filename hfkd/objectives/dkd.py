"""Decoupled knowledge distillation (Zhao et al. 2022, arXiv 2203.08679)."""

from __future__ import annotations

from torch import Tensor

from hfkd.functional import IGNORED, decoupled_divergence, is_soft
from hfkd.objectives.distillation import Distillation, checked_positive, checked_weight, logits_of
from hfkd.outputs import Batch, Progress, StudentOutput, TeacherOutput


class DKD(Distillation):
    """distill_loss = T^2 * (target_weight * TCKD + non_target_weight * NCKD), equation 7 of the paper.

    TCKD = KL([p_t(y), 1 - p_t(y)] || [p_s(y), 1 - p_s(y)]): how sure the teacher is of the label.
    NCKD = KL among the classes other than y, renormalised: what it takes the example for if not y. KD weighs it with
    1 - p_t(y): KL = TCKD + (1 - p_t(y)) * NCKD, so that a sure teacher passes on next to nothing of it.

    Weights, T^2 and T = 4 as in the authors' code, which computes NCKD with 1000 subtracted from the label's logit; here
    the label is left out in log space. Their loss is CE + DKD and rises over 20 epochs of warm-up; ours is
    (1 - alpha) * CE + alpha * DKD without warm-up, the same ratio at alpha = 0.5. With **two classes NCKD is 0** and DKD
    is KD times target_weight. Labels are read even with alpha = 1, they say which class is the target.

    student.logits, teacher.logits: (batch, num_labels) or (batch, tokens, num_labels); single-label heads only.
    Raises ValueError for a weight that is negative or not finite and for a temperature that is not above 0.
    """

    paper = "2203.08679"
    equation = (
        r"L = (1 - \alpha) \, \mathrm{CE} + \alpha \, T^2 \, "
        r"(w_{\mathrm{target}} \, \mathrm{TCKD} + w_{\mathrm{rest}} \, \mathrm{NCKD})"
    )
    problem_types = ("single_label_classification",)

    def __init__(
        self,
        target_weight: float = 1.0,
        non_target_weight: float = 8.0,
        temperature: float = 4.0,
        alpha: float = 0.5,
        label_smoothing: float = 0.0,
    ):
        super().__init__(alpha, label_smoothing)
        self.columns = ("labels",)
        self.target_weight = checked_weight("target_weight", target_weight)
        self.non_target_weight = checked_weight("non_target_weight", non_target_weight)
        self.temperature = checked_positive("temperature", temperature)

    def distill(
        self, student: StudentOutput, teacher: TeacherOutput, batch: Batch, progress: Progress | None
    ) -> Tensor:
        if "labels" not in batch:
            raise ValueError(
                f"DKD needs labels at any alpha, and the batch has only {sorted(batch)}: use KD without labels"
            )
        if is_soft(batch["labels"]):
            raise ValueError(
                "DKD splits off the labelled class, and the labels are probabilities: leave mixup and cutmix off, or use KD"
            )
        labels = batch["labels"].masked_fill(batch["labels"] == IGNORED, 0)  # these units are dropped afterwards
        target, non_target = decoupled_divergence(student.logits, logits_of(teacher, student), labels, self.temperature)
        return self.temperature**2 * (self.target_weight * target + self.non_target_weight * non_target)
