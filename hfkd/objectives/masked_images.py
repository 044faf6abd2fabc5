"""Masked images and their self-distillation (Lee et al., ICLR 2023, arXiv 2210.02871), for ViT-MAE."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hfkd.functional import at_least_float32
from hfkd.objectives.objective import Objective
from hfkd.objectives.self_distill import FeatureMatching, checked_feature
from hfkd.outputs import Batch, Counts, Progress, StudentOutput, TeacherOutput, Terms

MATCHING = {  # what is matched: what the teacher is asked for, and the formula
    "features": (
        frozenset({"teacher", "features"}),
        r"\lVert f_\theta(x) - \mathrm{sg}\, f_{\theta_{t-1}}(x) \rVert_2^2",
    ),
    "predictions": (
        frozenset({"teacher"}),
        r"\frac{1}{ZP} \sum_k z_k \lVert g_\theta(\hat{x})_k - \mathrm{sg}\, g_{\theta_{t-1}}(\hat{x})_k \rVert_2^2",
    ),
    "weights": (frozenset({"anchor"}), r"\lVert \theta - \theta_{t-1} \rVert_2^2"),
}


class MaskedImages(Objective):
    """pretrain_loss = mean over the hidden patches of the mean squared error of their pixels (round 0: plain further
    pre-training), the loss of MAE (He et al. 2021, arXiv 2111.06377) as ViTMAE computes it, one value an example.

    With norm_pix_loss in the model's configuration, as in the paper, a patch is first normalised by its own mean and
    (unbiased) variance. student.logits: (batch, patches, patch pixels), student.mask: (batch, patches), 1 where hidden.
    """

    columns: tuple[str, ...] = ("pixel_values", "noise")
    task_columns = columns
    equation = r"L = \frac{1}{ZP} \sum_k z_k \lVert g_\theta(\hat{x})_k - x_k \rVert_2^2"
    patch_size = 0
    patches = 0
    norm_pix_loss = False

    def build(self, student_config: Any, teacher_config: Any, problem_type: str | None) -> None:
        """Takes the patches from the student. Raises ValueError for a student without a decoder of pixels."""
        super().build(student_config, teacher_config, problem_type)
        if not hasattr(student_config, "norm_pix_loss"):
            raise ValueError(
                f"{type(self).__name__} scores the decoder of a ViT-MAE, and the student is a "
                f"{getattr(student_config, 'model_type', None)!r}: load it with hfkd.two_view_model"
            )
        self.patch_size = student_config.patch_size
        self.patches = (student_config.image_size // self.patch_size) ** 2
        self.norm_pix_loss = student_config.norm_pix_loss

    def forward(
        self,
        student: StudentOutput,
        teacher: TeacherOutput | None,
        batch: Batch,
        progress: Progress | None = None,
    ) -> Terms:
        return self.task(student, batch)

    def task(self, student: StudentOutput, batch: Batch) -> Terms:
        target = patches_of(at_least_float32(batch["pixel_values"]), self.patch_size)
        if self.norm_pix_loss:
            target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        return {"pretrain_loss": hidden_patch_error(student.logits, target, student.mask)}

    def count(self, batch: Batch) -> Counts:
        """Examples: every image has the same number of hidden patches. The batch may not be on the device yet."""
        shown = next(batch[name] for name in ("pixel_values", "pixels", "noise") if name in batch)
        return {"pretrain_loss": torch.full((), len(shown), device=shown.device)}


class SelfDistillImages(FeatureMatching, MaskedImages):
    """L = L_MAE + ||f_student(x) - stopgrad f_teacher(x)||^2, the paper's loss of one round, weight 1.

    f is the CLS state after the final LayerNorm, of the **whole** image on both sides; the distance is summed over the
    hidden dimension and averaged over the batch: all of it read in the authors' code. `feature="mean"` (over all tokens)
    and `"tokens"` (averaged over the tokens of the batch) are options of ours.

    `pretrain_loss=False` is the paper's ablation. So is `matching`, but of these only the names are known, and everything
    else is a reconstruction, not verified:

        predictions     the two decoders' guesses at the hidden patches, same masks, with the reduction of the masked loss
        weights         the squared L2 distance of the encoders' trainable weights, the same for every example

    student.features: (batch, 1 + patches, hidden); teacher.features: the same, or (batch, hidden) where it was pooled
    before; student.weight_distance: one number. Raises ValueError for `weights` without the masked loss, whose minimum is
    the teacher itself.
    """

    paper = "2210.02871"

    def __init__(self, feature: str = "cls", pretrain_loss: bool = True, matching: str = "features"):
        super().__init__()
        if matching not in MATCHING:
            raise ValueError(f"matching must be one of {', '.join(MATCHING)}, got {matching!r}")
        if matching == "weights" and not pretrain_loss:
            raise ValueError("matching='weights' without the masked loss only copies the teacher: keep pretrain_loss")
        self.feature = checked_feature(feature)
        self.pretrain_loss = pretrain_loss
        self.matching = matching
        self.needs, formula = MATCHING[matching]
        self.equation = (r"L = L_{\mathrm{MAE}}(\hat{x}) + " if pretrain_loss else "L = ") + formula
        masked = pretrain_loss or matching == "predictions"
        self.columns = MaskedImages.columns if masked else ("pixel_values",)

    def forward(
        self,
        student: StudentOutput,
        teacher: TeacherOutput | None,
        batch: Batch,
        progress: Progress | None = None,
    ) -> Terms:
        terms = self.task(student, batch) if self.pretrain_loss else {}
        return {**terms, "distill_loss": self.distance(student, teacher, batch)}

    def distance(self, student: StudentOutput, teacher: TeacherOutput | None, batch: Batch) -> Tensor:
        if self.matching == "weights":
            return at_least_float32(student.weight_distance).expand(len(batch["pixel_values"]))
        if self.matching == "features":
            every_token = torch.ones(student.features.shape[:2], device=student.features.device)
            return self.feature_distance(student, teacher, every_token)
        if teacher is None or teacher.logits is None:
            raise ValueError("matching='predictions' needs a teacher with a decoder, asked with the student's noise")
        return hidden_patch_error(student.logits, teacher.logits.detach(), student.mask)

    def count(self, batch: Batch) -> Counts:
        counts = super().count(batch)
        tokens = 1 + self.patches if self.matching == "features" and self.feature == "tokens" else 1
        return {**counts, "distill_loss": counts["pretrain_loss"] * tokens}


def hidden_patch_error(predictions: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean over the hidden patches of the mean squared error of their pixels.

    Both (batch, patches, patch pixels); mask: (batch, patches), 1 where hidden. Returns (batch,).
    """
    errors = (at_least_float32(predictions) - at_least_float32(target)).square().mean(-1)
    mask = mask.to(errors.dtype)
    return (errors * mask).sum(1) / mask.sum(1)


def patches_of(pixel_values: Tensor, size: int) -> Tensor:
    """(batch, channels, height, width) -> (batch, patches, size * size * channels), ordered as ViTMAE's decoder orders."""
    rows = pixel_values.unfold(2, size, size).unfold(3, size, size)  # (batch, channels, rows, columns, size, size)
    return rows.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
