"""Losses as mathematics: pure functions, one value per unit (an example, or a token that carries a label).

Nothing here reduces over units. Reduction happens in exactly one place, the trainer, because only the trainer knows
how many units the whole optimizer step has over micro-batches and processes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # transformers' label for "no loss here"


def at_least_float32(x: Tensor) -> Tensor:
    """Losses are computed in float32 or better: in bfloat16 a sum over 768 dimensions keeps two digits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """-log softmax(logits)[label], 0 where the label is -100; for soft labels the mean over classes, weighted by them.

    logits: (..., num_labels); labels: (...) integers, or (..., num_labels) probabilities (mixup). Returns (...).
    """
    if is_soft(labels):
        probabilities = labels.to(at_least_float32(logits).dtype).reshape(-1, logits.shape[-1])
        flat = at_least_float32(logits).reshape(-1, logits.shape[-1])
        losses = F.cross_entropy(flat, probabilities, reduction="none", label_smoothing=label_smoothing)
        return losses.view(labels.shape[:-1])
    flat = F.cross_entropy(
        at_least_float32(logits).reshape(-1, logits.shape[-1]),
        labels.reshape(-1),
        ignore_index=IGNORED,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    return flat.view(labels.shape)


def is_soft(labels: Tensor) -> bool:
    """Whether labels of a single-label head are probabilities, (..., num_labels), and not class ids, (...)."""
    return labels.is_floating_point() and labels.dim() > 1


def kl_divergence(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) of softmax(logits / temperature), summed over classes, without a factor temperature^2.

    Both (..., num_labels). Returns (...). Computed from log-probabilities, so that logits of any size stay finite.
    """
    student = F.log_softmax(at_least_float32(student_logits) / temperature, dim=-1)
    teacher = F.log_softmax(at_least_float32(teacher_logits) / temperature, dim=-1)
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)


def generalized_jsd(
    student_logits: Tensor, teacher_logits: Tensor, interpolation: float = 0.5, temperature: float = 1.0
) -> Tensor:
    """b KL(t || m) + (1 - b) KL(s || m) with m = b t + (1 - b) s and b = interpolation, without a factor temperature^2.

    b = 0 is KL(t || s) and b = 1 is KL(s || t): cases of their own, because the formula itself vanishes at both ends.
    Both (..., num_labels). Returns (...). The mixture is taken of log-probabilities, so that nothing underflows to log(0).
    """
    if interpolation == 0:
        return kl_divergence(student_logits, teacher_logits, temperature)
    if interpolation == 1:
        return kl_divergence(teacher_logits, student_logits, temperature)
    student = F.log_softmax(at_least_float32(student_logits) / temperature, dim=-1)
    teacher = F.log_softmax(at_least_float32(teacher_logits) / temperature, dim=-1)
    mixture = torch.logaddexp(teacher + math.log(interpolation), student + math.log1p(-interpolation))
    of_teacher = F.kl_div(mixture, teacher, reduction="none", log_target=True).sum(-1)
    of_student = F.kl_div(mixture, student, reduction="none", log_target=True).sum(-1)
    return interpolation * of_teacher + (1 - interpolation) * of_student


def decoupled_divergence(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """KL(teacher || student) in two parts, target class against the rest, and among the rest (Zhao et al. 2022, eq. 5).

    KL = first + (1 - p_teacher(label)) * second. Logits (..., num_labels), labels (...), each a class id. Returns (...)
    twice. With two classes the second part is 0: nothing is left to compare among the rest.
    """
    is_target = F.one_hot(labels, student_logits.shape[-1]).bool()
    student, student_rest = _target_and_rest(at_least_float32(student_logits) / temperature, is_target)
    teacher, teacher_rest = _target_and_rest(at_least_float32(teacher_logits) / temperature, is_target)
    target = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    non_target = F.kl_div(student_rest, teacher_rest, reduction="none", log_target=True).sum(-1)
    return target, non_target


def _target_and_rest(logits: Tensor, is_target: Tensor) -> tuple[Tensor, Tensor]:
    """log [p(label), 1 - p(label)] and the log-probabilities among the other classes (0 at the label: it adds nothing)."""
    log_probabilities = F.log_softmax(logits, dim=-1)
    target = log_probabilities.masked_fill(~is_target, 0.0).sum(-1)
    rest = log_probabilities.masked_fill(is_target, -math.inf)
    log_rest = torch.logsumexp(rest, dim=-1)
    among_rest = F.log_softmax(logits.masked_fill(is_target, -math.inf), dim=-1).masked_fill(is_target, 0.0)
    return torch.stack([target, log_rest], dim=-1), among_rest


def correlation(x: Tensor, y: Tensor, dim: int = -1, weights: Tensor | None = None, eps: float = 1e-4) -> Tensor:
    """Pearson's correlation along `dim`; weights: 0 or 1, of x's shape or broadcast to it. Returns x's shape without `dim`.

    A centred norm below `eps` counts as `eps`: where nothing varies the correlation is 0, and its gradient stays finite.
    """
    weights = torch.ones_like(x) if weights is None else weights.to(x.dtype).expand_as(x)
    total = weights.sum(dim, keepdim=True).clamp(min=1)
    x = (x - (x * weights).sum(dim, keepdim=True) / total) * weights
    y = (y - (y * weights).sum(dim, keepdim=True) / total) * weights
    return (F.normalize(x, dim=dim, eps=eps) * F.normalize(y, dim=dim, eps=eps)).sum(dim)


def task_loss(
    logits: Tensor, labels: Tensor, problem_type: str = "single_label_classification", label_smoothing: float = 0.0
) -> Tensor:
    """What a labelled unit costs without a teacher, as the heads of transformers define it, but one value per unit.

    single_label_classification: cross-entropy; logits (..., num_labels), labels (...) class ids, -100 costs 0, or
        (..., num_labels) probabilities.
    multi_label_classification: binary cross-entropy, averaged over labels; logits and labels (batch, num_labels).
    regression: squared error, averaged over outputs; logits (batch, outputs), labels (batch,) or (batch, outputs).
    """
    if problem_type == "single_label_classification":
        return cross_entropy(logits, labels, label_smoothing)
    logits = at_least_float32(logits)
    labels = labels.to(logits.dtype).reshape(logits.shape)
    if problem_type == "regression":
        return (logits - labels).square().mean(-1)
    return F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(-1)


def two_class_logits(logits: Tensor) -> Tensor:
    """Each label of a multi-label head as a problem of two classes: (..., num_labels) -> (..., num_labels, 2).

    softmax([z, 0] / temperature)_0 = sigmoid(z / temperature), so that whatever compares distributions over classes
    compares independent labels as well.
    """
    return torch.stack([logits, torch.zeros_like(logits)], dim=-1)


def labelled_units(labels: Tensor, problem_type: str = "single_label_classification") -> Tensor:
    """Which units carry a label: (batch,) or, for token heads, (batch, tokens); booleans."""
    if problem_type == "single_label_classification" and not is_soft(labels):
        return labels != IGNORED
    if problem_type == "single_label_classification":
        return torch.ones(labels.shape[:-1], dtype=torch.bool, device=labels.device)
    return torch.ones(len(labels), dtype=torch.bool, device=labels.device)


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


def class_reliability(teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """How far a teacher may be trusted on each class: the mean of gamma over the examples with that label, (num_labels,).

    gamma = p_y - mean of the other classes' p = (m p_y - 1) / (m - 1) for m classes, p at temperature 1; from -1 / (m - 1)
    to 1, and 0 for a teacher that guesses. No maximum over the other classes: this is not the usual margin.
    teacher_logits: (examples, num_labels), labels: (examples,) class ids. A class without an example is NaN.
    The formula is read in a later paper of the same group, which attributes it to Lukasik et al. 2022 (arXiv 2106.10494).
    """
    classes = teacher_logits.shape[-1]
    probabilities = F.softmax(at_least_float32(teacher_logits), dim=-1)
    gamma = (classes * probabilities.gather(-1, labels[:, None]).squeeze(-1) - 1) / (classes - 1)
    nothing = gamma.new_zeros(classes)
    return nothing.index_add(0, labels, gamma) / nothing.index_add(0, labels, torch.ones_like(gamma))
