"""Self-attention relations (MiniLMv2: Wang et al. 2021, arXiv 2012.15828)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hfkd.functional import at_least_float32, kl_divergence
from hfkd.objectives.features import (
    FeatureDistillation,
    entries_of,
    refuse_other_tokens,
    setting,
    token_mask,
    token_mean,
)
from hfkd.outputs import Batch, Progress, StudentOutput, TeacherOutput


class MiniLMRelations(FeatureDistillation):
    """distill_loss = sum over A in {Q, K, V} of mean over heads r and tokens of KL(R(A_t,r) || R(A_s,r)).

    R(A_r) = softmax(A_r A_r^T / sqrt(d_r)) over the example's tokens, where the queries (keys, values) of one layer, all
    heads side by side, are split anew into `relation_heads` of size d_r = width / relation_heads. So heads and widths of
    the two models may differ, and nothing has to be projected. Padding is neither a key nor a query.

    The three relations have weight 1 each. The authors released models, not this loss: it is written from the equations
    (a reconstruction; checked against Bloomberg's reimplementation, which leaves the weights to its user, 1/3 in its
    example). They take more relation heads than attention heads (48 for base and 64 for large teachers, not verified) and
    an upper middle layer of large teachers; the defaults here, the student's number of attention heads and the last
    layers, are conventions of ours. alpha is 1 by default: the method is for pre-training and has no task term.

    student_layer, teacher_layer: index into `qkv`, 0 = the first, -1 = the last. student["qkv"], teacher.qkv: per layer
    (query, key, value), each (batch, tokens, width). Raises ValueError in `build` for layers that a model does not have
    and for a width that relation_heads does not divide.
    """

    token_by_token = True
    paper = "2012.15828"
    equation = (
        r"L = (1 - \alpha) \, \mathrm{CE} + \alpha \sum_{A \in \{Q, K, V\}} \mathrm{mean}_{r, i} \, "
        r"\mathrm{KL}(\sigma(A^t_r A_r^{t\top} / \sqrt{d_t})_i \| \sigma(A^s_r A_r^{s\top} / \sqrt{d_s})_i)"
    )

    def __init__(
        self,
        student_layer: int = -1,
        teacher_layer: int = -1,
        relation_heads: int | None = None,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
    ):
        super().__init__(alpha, label_smoothing, needs=("qkv",))
        if relation_heads is not None and relation_heads < 1:
            raise ValueError(f"relation_heads must be at least 1, got {relation_heads}")
        self.student_layer = student_layer
        self.teacher_layer = teacher_layer
        self.relation_heads = relation_heads
        self.heads = relation_heads or 1

    def build(self, student_config: Any, teacher_config: Any, problem_type: str | None) -> None:
        super().build(student_config, teacher_config, problem_type)
        if self.alpha == 0:
            return
        self.heads = self.relation_heads or setting(student_config, "num_attention_heads", "student")
        sides = (("student", student_config, self.student_layer), ("teacher", teacher_config, self.teacher_layer))
        for whose, config, layer in sides:
            depth, width = setting(config, "num_hidden_layers", whose), setting(config, "hidden_size", whose)
            if not -depth <= layer < depth:
                raise ValueError(f"{whose}_layer is {layer}, but the {whose} has {depth} layers, 0 to {depth - 1}")
            if width % self.heads:
                raise ValueError(
                    f"the {whose}'s width {width} cannot be split into {self.heads} relation heads: choose relation_heads "
                    "so that it divides both widths"
                )

    def distill(
        self, student: StudentOutput, teacher: TeacherOutput, batch: Batch, progress: Progress | None
    ) -> Tensor:
        advice = "queries, keys and values are read by hooks, which DistillationTrainer sets"
        ours = entries_of(student, "qkv", "student", advice)[self.student_layer]
        theirs = entries_of(teacher, "qkv", "teacher", advice)[self.teacher_layer]
        values = []
        for student_vectors, teacher_vectors in zip(ours, theirs, strict=True):
            refuse_other_tokens(student_vectors, teacher_vectors, 1)
            mask = token_mask(batch, student_vectors)
            scores = self.scores(student_vectors, mask), self.scores(teacher_vectors.detach(), mask)
            values.append(token_mean(kl_divergence(*scores).mean(1), mask))
        return torch.stack(values).sum(0)

    def scores(self, vectors: Tensor, mask: Tensor) -> Tensor:
        """(batch, tokens, width) -> (batch, heads, tokens, tokens), before the softmax over the last."""
        heads = at_least_float32(vectors).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        scores = heads @ heads.transpose(-1, -2) / math.sqrt(heads.shape[-1])
        # Not -inf: a row without any token would be NaN
        return scores.masked_fill(mask[:, None, None] == 0, torch.finfo(scores.dtype).min)
