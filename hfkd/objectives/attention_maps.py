"""Attention maps, head by head (MiniLM, arXiv 2002.10957; TinyBERT, arXiv 1909.10351)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hfkd.functional import at_least_float32
from hfkd.objectives.distillation import checked_choice
from hfkd.objectives.features import (
    FeatureDistillation,
    Layers,
    entries_of,
    even_layers,
    refuse_missing_layers,
    refuse_other_tokens,
    settings_of,
    token_mask,
    token_mean,
    whole_layers,
)
from hfkd.outputs import Batch, Progress, StudentOutput, TeacherOutput

LOSSES = ("mse", "kl")
TINY = 1e-12  # added inside the logarithms: masked keys have probability 0


class AttentionMaps(FeatureDistillation):
    """distill_loss = mean over mapped layers, heads and an example's query tokens of d(A_s, A_t); padding never counts.

    d is "mse": (A_s - A_t)^2, mean over the keys that are not padding, or "kl": KL(A_t || A_s), summed over keys.
    The maps are distributions (after the softmax). MiniLM compares these by KL, of the **last** layer only:
    layers={student's last: teacher's last}. TinyBERT compares the scores **before** the softmax by MSE, which
    transformers does not return: "mse" here is not its loss, and its values are far smaller.

    transformers returns the maps after dropout: with attention dropout in the student, zeros are compared, and "kl" is
    dominated by them; set attention_probs_dropout_prob=0. Only eager attention computes maps; the trainer switches to it.

    layers: {student's: teacher's}, 0 = the first layer; None maps layer k of n (from 1) to round(k * teacher_layers / n).
    student.attentions: (batch, heads, tokens, tokens) each. Raises ValueError in `build` for layers that a model does not
    have and for unequal numbers of heads, and in a step where a model answered no maps.
    """

    token_by_token = True
    paper = "2002.10957"
    equation = r"L = (1 - \alpha) \, \mathrm{CE} + \alpha \, \mathrm{mean}_{l, h, i} \, d(A^s_{l,h,i}, A^t_{l,h,i})"

    def __init__(
        self, layers: Layers | None = None, loss: str = "mse", alpha: float = 0.5, label_smoothing: float = 0.0
    ):
        super().__init__(alpha, label_smoothing, needs=("attentions",))
        self.loss = checked_choice("loss", loss, LOSSES)
        self.layers = whole_layers(layers)
        self.mapped: dict[int, int] = self.layers or {}

    def build(self, student_config: Any, teacher_config: Any, problem_type: str | None) -> None:
        super().build(student_config, teacher_config, problem_type)
        if self.alpha == 0:
            return
        depths = settings_of(student_config, teacher_config, "num_hidden_layers")
        heads = settings_of(student_config, teacher_config, "num_attention_heads")
        if heads[0] != heads[1]:
            raise ValueError(
                f"the student has {heads[0]} attention heads, the teacher {heads[1]}: maps are compared head by head; "
                "MiniLMRelations splits both into the same number of heads"
            )
        even = {k - 1: max(layer - 1, 0) for k, layer in even_layers(*depths).items() if k > 0}
        self.mapped = self.layers or even
        refuse_missing_layers(self.mapped, *depths, "layer")

    def distill(
        self, student: StudentOutput, teacher: TeacherOutput, batch: Batch, progress: Progress | None
    ) -> Tensor:
        advice = "other kernels than eager compute no maps: model.set_attn_implementation('eager') and output_attentions=True"
        ours = entries_of(student, "attentions", "student", advice)
        theirs = entries_of(teacher, "attentions", "teacher", advice)
        values = []
        for student_layer, teacher_layer in self.mapped.items():
            maps = at_least_float32(ours[student_layer]), at_least_float32(theirs[teacher_layer].detach())
            refuse_other_tokens(*maps, -1)
            mask = token_mask(batch, maps[0][:, 0])
            values.append(token_mean(self.distance(*maps, mask).mean(1), mask))
        return torch.stack(values).mean(0)

    def distance(self, ours: Tensor, theirs: Tensor, mask: Tensor) -> Tensor:
        """(batch, heads, queries, keys), mask (batch, keys) -> (batch, heads, queries)."""
        keys = mask[:, None, None].to(ours.dtype)
        if self.loss == "kl":
            return (keys * theirs * ((theirs + TINY).log() - (ours + TINY).log())).sum(-1)
        return (keys * (ours - theirs).square()).sum(-1) / keys.sum(-1).clamp(min=1)
