"""One learned value per class: what is refused when it is learned from data, and how a batch reads it."""

from __future__ import annotations

import torch
from torch import Tensor

from hfkd.functional import IGNORED, is_soft
from hfkd.objectives.objective import Objective

ADVICE = "call fit(teacher_logits, labels) with a teacher's logits on a dev split, which it was not trained on"


def checked_answers(teacher_logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The labelled examples, logits in float64, on the CPU. Raises ValueError for what `fit` cannot learn from."""
    logits, labels = teacher_logits.detach().to("cpu", torch.float64), labels.detach().to("cpu")
    if logits.dim() != 2 or logits.shape[1] < 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"fit takes logits (examples, num_labels) of two classes or more and labels (examples,), got "
            f"{tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    labels, kept = checked_class_ids(labels)
    bad = ((~torch.isfinite(logits)).any(1) & kept).nonzero().flatten()
    if len(bad):
        raise ValueError(
            f"{len(bad)} of {len(labels)} examples have teacher logits that are not finite, the first is example "
            f"{int(bad[0])}: the teacher has diverged, or its cache is broken"
        )
    logits = logits[kept]
    refuse_empty_classes(labels, logits.shape[1], "on the dev split")
    return logits, labels


def checked_class_ids(labels: Tensor) -> tuple[Tensor, Tensor]:
    """The labels that are class ids, and where they stand: those of -100 are dropped."""
    if labels.is_floating_point():
        raise ValueError(f"fit takes class ids, and the labels are {labels.dtype}: take them before mixup or cutmix")
    kept = labels != IGNORED
    return labels[kept].long(), kept


def refuse_empty_classes(labels: Tensor, classes: int, where: str) -> None:
    """Raises ValueError for labels that name no class, and for classes that have no example; names both."""
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(
            f"labels run from {int(labels.min())} to {int(labels.max())}, the classes from 0 to {classes - 1}: both sides "
            "must have the same labels"
        )
    empty = (torch.bincount(labels, minlength=classes) == 0).nonzero().flatten()
    if len(empty):
        named = ", ".join(str(int(label)) for label in empty[:10]) + (", ..." if len(empty) > 10 else "")
        raise ValueError(
            f"{len(empty)} of {classes} classes have no example {where} ({named}), so nothing can be learned of them: hold out "
            "by class (hfkd.data.splits.dev_split), or drop the classes"
        )


def learned(objective: Objective, name: str, student_logits: Tensor, advice: str = ADVICE) -> Tensor:
    """The buffer `name`, (num_labels,), where the logits are. Raises RuntimeError before `fit`, ValueError after another."""
    values = getattr(objective, name)
    if values is None:
        raise RuntimeError(f"{type(objective).__name__} has not learned {name} yet: {advice}")
    refuse_other_classes(objective, name, student_logits.shape[-1])
    return values.to(student_logits.device)


def refuse_other_classes(objective: Objective, name: str, num_labels: int) -> None:
    """Raises ValueError where `fit` saw other classes than the student has."""
    values = getattr(objective, name)
    if values is not None and values.shape != (num_labels,):
        raise ValueError(
            f"{type(objective).__name__}.{name} has shape {tuple(values.shape)}, the student has {num_labels} labels: fit it "
            "with logits and labels of the student's classes, in their order"
        )


def value_of_label(values: Tensor, labels: Tensor) -> Tensor:
    """(num_labels,) -> one value a unit, that of its label; for soft labels the mean, weighted by them."""
    if is_soft(labels):
        return (labels.to(torch.promote_types(labels.dtype, values.dtype)) * values).sum(-1)
    return values[labels.masked_fill(labels == IGNORED, 0)]  # whatever these cost, they are not counted


def labels_of(objective: Objective, labels: Tensor | None) -> Tensor:
    if labels is None:
        raise ValueError(f"{type(objective).__name__} reads the labels at any alpha, and the batch has none: use KD")
    return labels
