"""Losses as mathematics: pure functions, one value per unit (an example, or a token that carries a label).

Nothing here reduces over units. Reduction happens in exactly one place, the trainer, because only the trainer knows
how many units the whole optimizer step has over micro-batches and processes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # transformers' label for "no loss here"


def at_least_float32(x: Tensor) -> Tensor:
    """Losses are computed in float32 or better: in bfloat16 a sum over 768 dimensions keeps two digits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """-log softmax(logits)[label], 0 where the label is -100.

    logits: (..., num_labels); labels: (...) integers. Returns (...).
    """
    flat = F.cross_entropy(
        at_least_float32(logits).reshape(-1, logits.shape[-1]),
        labels.reshape(-1),
        ignore_index=IGNORED,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    return flat.view(labels.shape)


def kl_divergence(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) of softmax(logits / temperature), summed over classes, without a factor temperature^2.

    Both (..., num_labels). Returns (...). Computed from log-probabilities, so that logits of any size stay finite.
    """
    student = F.log_softmax(at_least_float32(student_logits) / temperature, dim=-1)
    teacher = F.log_softmax(at_least_float32(teacher_logits) / temperature, dim=-1)
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)


def squared_distance(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """||student - teacher||^2, **summed** over the last dimension. Both (..., hidden). Returns (...).

    Lee et al. 2023, the distillation loss: a mean over the hidden dimension would be `hidden` times too small.
    """
    return (at_least_float32(student_features) - at_least_float32(teacher_features)).square().sum(-1)


def masked_mean(features: Tensor, attention_mask: Tensor) -> Tensor:
    """Mean over the tokens that are not padding. (batch, tokens, hidden), (batch, tokens) -> (batch, hidden)."""
    features = at_least_float32(features)
    weights = attention_mask.to(features.dtype).unsqueeze(-1)
    return (features * weights).sum(1) / weights.sum(1).clamp(min=1)


def weight_distance(weights: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> float:
    """L2 distance between two sets of weights with the same names, over all floating-point entries, in float64.

    Raises KeyError when the names differ: a distance over a part of the weights would look like a small one.
    """
    if weights.keys() != start.keys():
        odd = sorted(weights.keys() ^ start.keys())
        raise KeyError(f"the two sets of weights name different tensors: {odd[:6]} (in all {len(odd)})")
    unlike = [name for name in weights if weights[name].shape != start[name].shape]
    if unlike:
        name = unlike[0]
        raise ValueError(f"{name} has shape {tuple(weights[name].shape)}, at the start {tuple(start[name].shape)}")
    total = sum(
        (tensor.double() - start[name].double()).square().sum().item()
        for name, tensor in weights.items()
        if tensor.is_floating_point()
    )
    return total**0.5
