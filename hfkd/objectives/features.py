"""What objectives share that compare the inside of two models: layers, tokens that count, one value an example."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hfkd.functional import masked_mean
from hfkd.objectives.distillation import Distillation
from hfkd.outputs import Batch, Counts


class FeatureDistillation(Distillation):
    """distill_loss has one value per **example**, also for token heads and for examples without a label.

    Columns: attention_mask, where the batch has one: (batch, tokens), 0 = padding, which never counts. Images have none.
    """

    def __init__(self, alpha: float, label_smoothing: float, needs: tuple[str, ...] = ()):
        super().__init__(alpha, label_smoothing, needs)
        self.columns = (*self.columns, "attention_mask")

    def count(self, batch: Batch) -> Counts:
        per_example = batch["attention_mask"] if "attention_mask" in batch else next(iter(batch.values()))
        examples = torch.full((), len(per_example), device=per_example.device)
        return {**super().count(batch), "distill_loss": examples}

    def _of_labelled(self, values: Tensor, batch: Batch) -> Tensor:
        return values


Layers = Mapping[int, int] | Mapping[str, int]


def whole_layers(layers: Layers | None) -> dict[int, int] | None:
    """Student layer -> teacher layer as numbers; the keys of a JSON object are strings."""
    if layers is None:
        return None
    if not layers:
        raise ValueError(
            "layers is empty: map at least one layer of the student to one of the teacher, or leave it out"
        )
    return {int(student): int(teacher) for student, teacher in layers.items()}


def even_layers(student_layers: int, teacher_layers: int) -> dict[int, int]:
    """Student layer k of n -> round(k * teacher_layers / n), from the embeddings (0 -> 0) to the last."""
    return {k: round(k * teacher_layers / student_layers) for k in range(student_layers + 1)}


def refuse_missing_layers(layers: Mapping[int, int], student_entries: int, teacher_entries: int, what: str) -> None:
    for whose, numbers, entries in (
        ("student", layers.keys(), student_entries),
        ("teacher", layers.values(), teacher_entries),
    ):
        missing = [number for number in numbers if not 0 <= number < entries]
        if missing:
            raise ValueError(
                f"layers names the {whose}'s {what} {missing[0]}, but it has {entries} of them, 0 to {entries - 1}"
            )


def settings_of(student_config: Any, teacher_config: Any, name: str) -> tuple[int, int]:
    return setting(student_config, name, "student"), setting(teacher_config, name, "teacher")


def setting(config: Any, name: str, whose: str) -> int:
    """A number from a model's configuration."""
    value = getattr(config, name, None)
    if value is None:
        raise ValueError(
            f"the {whose}'s configuration has no {name}, which says what can be compared: use models of transformers "
            "(a CachedTeacher answers logits only)"
        )
    return value


def entries_of(output: Any, name: str, whose: str, advice: str) -> tuple[Any, ...]:
    """output.hidden_states, .attentions or .qkv; raises ValueError where the model gave none."""
    found = getattr(output, name, None)
    if found is None or len(found) == 0:  # attention kernels without maps give an empty tuple
        raise ValueError(f"the {whose} answered no {name}: {advice}")
    return found


def refuse_other_tokens(student: Tensor, teacher: Tensor, token_dim: int) -> None:
    if student.shape[token_dim] != teacher.shape[token_dim]:
        raise ValueError(
            f"the student sees {student.shape[token_dim]} tokens, the teacher {teacher.shape[token_dim]}: this compares "
            "position by position, so both need one tokenizer (for images, one patch size); compare logits otherwise"
        )


def token_mask(batch: Batch, tokens: Tensor, view: str = "") -> Tensor:
    """(batch, tokens), 1 where there is no padding. tokens: (batch, tokens, width). view: "teacher_" for its own tokens."""
    if tokens.dim() != 3:
        raise ValueError(
            f"states must be (batch, tokens, width), got {tuple(tokens.shape)}: no feature maps of convolutions"
        )
    name = f"{view}attention_mask" if f"{view}input_ids" in batch else "attention_mask"
    mask = batch[name] if name in batch else torch.ones_like(tokens[:, :, 0].detach())
    if mask.shape != tokens.shape[:2]:
        raise ValueError(
            f"attention_mask is {tuple(mask.shape)}, the states are {tuple(tokens.shape)}: they must have the same tokens"
        )
    return mask


def token_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens that are not padding. (batch, tokens) -> (batch,)."""
    return masked_mean(values.unsqueeze(-1), mask).squeeze(-1)
