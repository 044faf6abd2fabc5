"""DIST: relations instead of exact probabilities (Huang et al. 2022, arXiv 2205.10536)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hfkd.functional import at_least_float32, correlation, labelled_units
from hfkd.objectives.distillation import Distillation, checked_positive, checked_weight, logits_of
from hfkd.outputs import Batch, Progress, StudentOutput, TeacherOutput


class DIST(Distillation):
    """distill_loss = T^2 * (inter_weight * (1 - r over classes) + intra_weight * (1 - r over the batch, mean of classes)).

    r is Pearson's correlation between softmax(z_s / T) and softmax(z_t / T): *inter* compares one unit's classes,
    *intra* one class's column over the units of the batch. T^2 on both is read from copies of the authors' code (their
    segmentation loss, which was read itself, has no temperature).

    The intra term belongs to the batch: each of its labelled units carries the same value, so that their mean gives it.
    Hence `batch_coupled` unless intra_weight is 0: gradient accumulation and more processes change the loss, since
    columns are those of one micro-batch; a batch of one has nothing to correlate and costs a constant intra_weight * T^2.
    With **two classes** a row's centred probabilities are (d, -d), so r is exactly +1 or -1: inter has no gradient and only
    intra teaches. Where a row or a column hardly varies (centred norm below 1e-4, as classes that are not in the batch),
    r is damped toward 0, also at student = teacher; the authors add 1e-8 to the product of both norms to the same end.

    student.logits, teacher.logits: (batch, num_labels) or (batch, tokens, num_labels); single-label heads only.
    Raises ValueError for a weight that is negative or not finite and for a temperature that is not above 0.
    """

    paper = "2205.10536"
    equation = (
        r"L = (1 - \alpha) \, \mathrm{CE} + \alpha \, T^2 \, "
        r"(w_{\mathrm{inter}} (1 - \rho_{\mathrm{classes}}) + w_{\mathrm{intra}} (1 - \rho_{\mathrm{batch}}))"
    )
    problem_types = ("single_label_classification",)

    def __init__(
        self,
        inter_weight: float = 1.0,
        intra_weight: float = 1.0,
        temperature: float = 1.0,
        alpha: float = 0.5,
        label_smoothing: float = 0.0,
    ):
        super().__init__(alpha, label_smoothing)
        self.inter_weight = checked_weight("inter_weight", inter_weight)
        self.intra_weight = checked_weight("intra_weight", intra_weight)
        self.temperature = checked_positive("temperature", temperature)
        self.batch_coupled = intra_weight > 0 and alpha > 0

    def distill(
        self, student: StudentOutput, teacher: TeacherOutput, batch: Batch, progress: Progress | None
    ) -> Tensor:
        ours = F.softmax(at_least_float32(student.logits) / self.temperature, dim=-1)
        theirs = F.softmax(at_least_float32(logits_of(teacher, student)) / self.temperature, dim=-1)
        values = self.inter_weight * (1 - correlation(ours, theirs))
        if self.intra_weight > 0:
            values = values + self.intra_weight * self.intra(ours, theirs, batch)
        return self.temperature**2 * values

    def intra(self, ours: Tensor, theirs: Tensor, batch: Batch) -> Tensor:
        """A number, over the labelled units only: padding tokens and unlabelled examples are not part of a column."""
        labelled = torch.ones_like(ours[..., 0])
        if "labels" in batch:
            labelled = labelled_units(batch["labels"], self.problem_type)
        units = labelled.reshape(-1, 1)
        return 1 - correlation(ours.reshape(-1, ours.shape[-1]), theirs.reshape(-1, ours.shape[-1]), 0, units).mean()
