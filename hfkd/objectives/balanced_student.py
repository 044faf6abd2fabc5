"""Logit-adjusted distillation, a baseline for long-tailed data (Menon et al. 2021, arXiv 2007.07314)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Self

import torch
from torch import Tensor

from hfkd.functional import at_least_float32, kl_divergence
from hfkd.objectives.distillation import Distillation, checked_positive, checked_weight, logits_of
from hfkd.objectives.per_class import checked_class_ids, learned, refuse_empty_classes, refuse_other_classes
from hfkd.outputs import Batch, Progress, StudentOutput, TeacherOutput, Terms

ADVICE = "call fit(None, labels) with the labels of the training split"


class BalancedStudent(Distillation):
    """L = (1 - alpha) * CE(y, z) + alpha * KL(softmax(z_t / T) || softmax(z)) with z = z_s + prior_scale * log prior.

    The prior is what the training labels make of it (`fit(None, labels)`); predictions use the raw z_s, which are then those
    of a student for equally frequent classes. Evaluation is by z_s too. alpha=1, the default, is the "balanced student" of
    Teacher's pet's group, which takes labels from the teacher; alpha=0 is Menon et al.'s logit-adjusted loss, equation 10
    with their tau = prior_scale, and asks no teacher. KL instead of their cross-entropy: the gradient is the same.

    Reconstruction, not verified: whether the group's runs adjust both terms where they mix them is not known, and a
    temperature on the teacher's side only, without T^2, is their convention elsewhere.

    What was learned is `log_prior_`, (num_labels,), saved with a run. student.logits, teacher.logits: (batch, num_labels) or
    (batch, tokens, num_labels). Raises ValueError for a temperature that is not above 0, an alpha outside [0, 1] and a
    negative prior_scale, RuntimeError before `fit`.
    """

    paper = "2007.07314"
    equation = (
        r"L = (1 - \alpha) \, \mathrm{CE}(y, z) + \alpha \, \mathrm{KL}(\sigma(z_t / T) \| \sigma(z)), \quad "
        r"z = z_s + s \log \pi"
    )
    problem_types = ("single_label_classification",)
    log_prior_: Tensor | None

    def __init__(
        self,
        temperature: float = 1.0,
        prior_scale: float = 1.0,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
    ):
        super().__init__(alpha, label_smoothing)
        self.temperature = checked_positive("temperature", temperature)
        self.prior_scale = checked_weight("prior_scale", prior_scale)
        self.register_buffer("log_prior_", None)

    def build(self, student_config: Any, teacher_config: Any, problem_type: str | None) -> None:
        super().build(student_config, teacher_config, problem_type)
        if student_config is not None:
            refuse_other_classes(self, "log_prior_", student_config.num_labels)

    def fit(self, teacher_logits: Tensor | None, labels: Tensor) -> Self:
        """Learn the prior from the training labels (examples,); those of -100 are left out, the logits are not read.

        Raises ValueError for a class without an example (log 0), and for labels that are no class ids.
        """
        labels, _ = checked_class_ids(labels.detach().to("cpu"))
        if not len(labels):
            raise ValueError("there are no labels to take the prior from")
        refuse_empty_classes(labels, max(int(labels.max()) + 1, 2), "in the training split")
        self.log_prior_ = (torch.bincount(labels).double() / len(labels)).log().float()
        return self

    def forward(
        self,
        student: StudentOutput,
        teacher: TeacherOutput | None,
        batch: Batch,
        progress: Progress | None = None,
    ) -> Terms:
        logits = at_least_float32(student.logits)
        adjusted = logits + self.prior_scale * learned(self, "log_prior_", logits, ADVICE).to(logits.dtype)
        return super().forward(SimpleNamespace(logits=adjusted), teacher, batch, progress)

    def distill(
        self, student: StudentOutput, teacher: TeacherOutput, batch: Batch, progress: Progress | None
    ) -> Tensor:
        return kl_divergence(student.logits, at_least_float32(logits_of(teacher, student)) / self.temperature)
