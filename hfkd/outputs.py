"""What passes between teacher, objective and trainer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass, make_dataclass
from typing import Any

from torch import Tensor

Batch = Mapping[str, Tensor]
StudentOutput = Any  # a ModelOutput of transformers; which fields it has depends on the model
Terms = dict[str, Tensor]  # one value per unit, already weighted, under a name that ends in `_loss`
Counts = dict[str, Tensor]  # the number of units of each term, a 0-dimensional tensor


@dataclass(frozen=True)
class TeacherOutput:
    """A teacher's answer to one batch; a teacher fills what it has.

    logits: (batch, num_labels) or (batch, tokens, num_labels), before temperature, never probabilities.
    labels: (batch,) pseudo-labels, for teachers that vote or sample.
    hidden_states, attentions: one tensor per layer, as transformers returns them.
    features: (batch, tokens, hidden), the encoder's last hidden state after its final normalisation.
    qkv: one (query, key, value) triple per layer, each (batch, tokens, width), before it is split into heads.
    """

    logits: Tensor | None = None
    labels: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    features: Tensor | None = None
    qkv: tuple[tuple[Tensor, Tensor, Tensor], ...] | None = None


@dataclass(frozen=True)
class Progress:
    """Where training stands, counted in optimizer steps; schedules and draws read this and nothing else."""

    step: int = 0
    max_steps: int = 0
    epoch: float = 0.0
    round: int = 0
    seed: int = 0


_WIDER: dict[tuple[type, str], Any] = {}  # not functools.cache, which torch.compile warns of


def with_entry(output: Any, name: str, value: Any) -> Any:
    """A ModelOutput with one entry more, of a class that declares it: DDP and torch.compile take outputs apart and
    rebuild them from the fields of their class."""
    kind = type(output)
    if not is_dataclass(kind):
        return kind(**output, **{name: value})
    if (kind, name) not in _WIDER:
        _WIDER[kind, name] = make_dataclass(f"{kind.__name__}With_{name}", [(name, "Any", None)], bases=(kind,))
    return _WIDER[kind, name](**output, **{name: value})
