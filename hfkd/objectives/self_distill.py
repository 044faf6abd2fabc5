"""Self-distillation for further pre-training (Lee et al., ICLR 2023, arXiv 2210.02871)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hfkd.functional import IGNORED, cross_entropy, masked_mean, squared_distance
from hfkd.objectives.objective import Objective
from hfkd.outputs import Batch, Counts, Progress, StudentOutput, TeacherOutput, Terms

FEATURES = ("cls", "mean", "tokens")


class MaskedLM(Objective):
    """pretrain_loss = -log p(token | corrupted input) at the masked positions only (round 0: plain further pre-training).

    student.logits: (positions, vocabulary), at `masked_positions`; batch["masked_labels"]: (positions,), -100 = padding.
    """

    columns: tuple[str, ...] = ("masked_positions", "masked_labels")
    task_columns = columns
    equation = r"L = -\frac{1}{Z} \sum_k z_k \log p(x_k \mid \hat{x})"

    def forward(
        self,
        student: StudentOutput,
        teacher: TeacherOutput | None,
        batch: Batch,
        progress: Progress | None = None,
    ) -> Terms:
        return self.task(student, batch)

    def task(self, student: StudentOutput, batch: Batch) -> Terms:
        return {"pretrain_loss": cross_entropy(student.logits, batch["masked_labels"])}

    def count(self, batch: Batch) -> Counts:
        return {"pretrain_loss": (batch["masked_labels"] != IGNORED).sum()}


class FeatureMatching:
    """Mixin: ||f_student(x) - stopgrad f_teacher(x)||^2 of the clean input, **summed** over the hidden dimension.

    A subclass sets `feature`, which says what f is: the first token's state, the mean over tokens, or every token's.
    """

    feature: str

    def build(self, student_config: Any, teacher_config: Any, problem_type: str | None) -> None:
        super().build(student_config, teacher_config, problem_type)  # type: ignore[misc]
        student_width = getattr(student_config, "hidden_size", None)
        teacher_width = getattr(teacher_config, "hidden_size", None)
        if None not in (student_width, teacher_width) and student_width != teacher_width:
            raise ValueError(
                f"the student's hidden size is {student_width}, the teacher's {teacher_width}: self-distillation "
                "compares the two states directly, so both must come from the same start weights"
            )

    def feature_distance(self, student: StudentOutput, teacher: TeacherOutput | None, mask: Tensor) -> Tensor:
        """One value an example, or (batch, tokens) for `tokens`. mask: (batch, tokens), 0 for padding."""
        if teacher is None or teacher.features is None:
            raise ValueError(f"{type(self).__name__} needs a teacher with features, such as ModelTeacher(encoder)")
        distance = squared_distance(self.pool(student.features, mask), self.pool(teacher.features.detach(), mask))
        return distance * mask if self.feature == "tokens" else distance

    def pool(self, features: Tensor, mask: Tensor) -> Tensor:
        """(batch, tokens, hidden) -> (batch, hidden), or unchanged for `tokens` and where it was pooled before."""
        if self.feature == "tokens" or features.dim() == 2:
            return features
        return features[:, 0] if self.feature == "cls" else masked_mean(features, mask)


def checked_feature(feature: str) -> str:
    if feature not in FEATURES:
        raise ValueError(f"feature must be one of {', '.join(FEATURES)}, got {feature!r}")
    return feature


class SelfDistill(FeatureMatching, MaskedLM):
    """L = L_MLM + ||f_student(x) - stopgrad f_teacher(x)||^2, the paper's loss of one round, weight 1.

    Both sides read the **clean** input; the distance is summed over the hidden dimension and averaged over the batch
    (over the tokens of the batch for `feature="tokens"`). Read in the authors' code for ViT, where f is the CLS state
    after the final LayerNorm; for text, f = the first token is a reconstruction by analogy, not verified, and `mean`
    and `tokens` are options of ours. A student with dropout against a teacher in eval mode has a non-zero distance
    even at equal weights.

    student.features, teacher.features: (batch, tokens, hidden). `pretrain_loss=False` is the paper's ablation.
    Images: `SelfDistillImages`.
    """

    paper = "2210.02871"
    equation = r"L = L_{\mathrm{MLM}}(\hat{x}) + \lVert f_\theta(x) - \mathrm{sg}\, f_{\theta_{t-1}}(x) \rVert_2^2"
    needs = frozenset({"teacher", "features"})

    def __init__(self, feature: str = "cls", pretrain_loss: bool = True):
        super().__init__()
        self.feature = checked_feature(feature)
        self.pretrain_loss = pretrain_loss
        masked = MaskedLM.columns if pretrain_loss else ()
        self.columns = ("clean_input_ids", "attention_mask", *masked)

    def forward(
        self,
        student: StudentOutput,
        teacher: TeacherOutput | None,
        batch: Batch,
        progress: Progress | None = None,
    ) -> Terms:
        terms = self.task(student, batch) if self.pretrain_loss else {}
        return {**terms, "distill_loss": self.feature_distance(student, teacher, batch["attention_mask"])}

    def count(self, batch: Batch) -> Counts:
        mask = batch["attention_mask"]
        units = mask.sum() if self.feature == "tokens" else torch.full((), len(mask), device=mask.device)
        counts = super().count(batch) if "masked_labels" in batch else {}
        return {**counts, "distill_loss": units}
