"""Coordinators: what gives every training example its own weights for every student and every loss (MC-Distil's C-Net).

A coordinator sees a batch and answers weights (examples, students, losses). `CNet` is a network that learns them on
held-out data; `WeightTable` holds one entry per training example (AMAL); `ConstantWeights` are set by hand. The losses and
their order are the group objective's `parts`: task, distill and, where it is asked for, pooled.

After the released code of MC-Distil (Tambat et al., TMLR 2025), as far as it is known; what the paper's text says about the
output function, the input and the interval could not be read. Two things differ on purpose. Weights are sigmoids by default:
the released network's raw outputs start near 0 and may turn negative, so that a student maximises a loss. The image network
has group norms, so that the weights of an example do not depend on its batch.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hfkd.functional import at_least_float32, masked_mean
from hfkd.outputs import Batch

OUTPUTS = ("sigmoid", "softplus", "raw", "product")
SOURCES = ("student", "teacher", "label")


class Coordinator(nn.Module, ABC):
    """Weights of every example, student and loss. `build` is called once, by the trainer, before the optimizer exists."""

    columns: tuple[str, ...] = ()  # what it reads from the batch
    learns: bool = True  # whether a meta set is needed
    reads_logits: bool = False

    def build(self, students: Sequence[str], parts: Sequence[str], num_labels: int, example_ids: Tensor | None) -> None:
        """students: their names. parts: the losses' names. example_ids: (rows,) of the training data, where they are known."""
        self.students, self.parts = tuple(students), tuple(parts)

    @abstractmethod
    def forward(
        self, batch: Batch, student_logits: Tensor | None = None, teacher_logits: Tensor | None = None
    ) -> Tensor:
        """Returns (examples, students, losses). Logits: (examples, students, num_labels) detached, (examples, num_labels)."""

    def make_optimizer(self, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=learning_rate, weight_decay=weight_decay)

    def after_update(self) -> None:
        """Called after every step of its optimizer."""


class ConstantWeights(Coordinator):
    """Weights set by hand: a number for all students, or one for each, by name. Losses that are not named weigh 0.

    `ConstantWeights(task=1 - alpha, distill=alpha)` is plain KD of every student. Raises ValueError for names of losses or
    students that there are not, and for students without a number.
    """

    learns = False
    table: Tensor

    def __init__(self, **weights: float | Mapping[str, float]):
        super().__init__()
        self.weights = weights or {"task": 0.5, "distill": 0.5}

    def build(self, students: Sequence[str], parts: Sequence[str], num_labels: int, example_ids: Tensor | None) -> None:
        super().build(students, parts, num_labels, example_ids)
        if odd := sorted(self.weights.keys() - set(parts)):
            raise ValueError(f"there is no loss {', '.join(odd)} to weight; the objective has {', '.join(parts)}")
        for part, given in self.weights.items():
            if isinstance(given, Mapping) and given.keys() != set(students):
                raise ValueError(
                    f"{part} has weights for {', '.join(given)}, and the students are {', '.join(students)}"
                )
        table = [[_of_student(self.weights.get(part, 0.0), name) for part in parts] for name in students]
        self.register_buffer("table", torch.tensor(table, dtype=torch.float64), persistent=False)

    def forward(
        self, batch: Batch, student_logits: Tensor | None = None, teacher_logits: Tensor | None = None
    ) -> Tensor:
        return self.table.expand(rows_of(batch), -1, -1)


def _of_student(given: float | Mapping[str, float], name: str) -> float:
    return given[name] if isinstance(given, Mapping) else given


class WeightTable(Coordinator):
    """A free weight for every training example, student and loss (AMAL, the single-student ancestor), kept in [1e-7, 2 - 1e-7].

    It finds wrong labels that no function of the input can tell apart, and generalises to no other example. start: the
    first values, by loss. learning_rate: plain gradient steps; gradients are those of a mean over a batch, hence the size.
    AMAL's code repeats each update 5 times on 3 batches and one validation batch of 1,000; here an update is one step.

    Raises ValueError where training rows have no example_id, and for one that was not there when it was built.
    """

    columns = ("example_id",)
    ids: Tensor

    def __init__(self, learning_rate: float = 1500.0, **start: float):
        super().__init__()
        self.learning_rate, self.start = learning_rate, start or {"task": 0.1, "distill": 0.9}

    def build(self, students: Sequence[str], parts: Sequence[str], num_labels: int, example_ids: Tensor | None) -> None:
        super().build(students, parts, num_labels, example_ids)
        if example_ids is None:
            raise ValueError("a table of weights needs to know the training rows: streams have no fixed number of them")
        ids = example_ids.sort().values
        if len(ids.unique()) != len(ids):
            raise ValueError("two training rows have one example_id, so a table cannot hold a weight for each")
        row = torch.tensor([[self.start.get(part, 0.0) for part in parts] for _ in students])
        self.register_buffer("ids", ids, persistent=False)
        self.table = nn.Parameter(row.repeat(len(ids), 1, 1))

    def forward(
        self, batch: Batch, student_logits: Tensor | None = None, teacher_logits: Tensor | None = None
    ) -> Tensor:
        given = batch["example_id"]
        rows = torch.searchsorted(self.ids, given).clamp(max=len(self.ids) - 1)
        if given.device.type == "cpu" and bool((self.ids[rows] != given).any()):
            raise ValueError(f"example_id {given[self.ids[rows] != given][:5].tolist()} is not among the training rows")
        return self.table[rows]

    def make_optimizer(self, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate)

    def after_update(self) -> None:
        with torch.no_grad():
            self.table.clamp_(1e-7, 2 - 1e-7)


class CNet(Coordinator):
    """A network that weights examples by what they look like. trunk: batch -> (examples, trunk.width).

    output: "sigmoid" (0 to 1), "softplus" (0 or more), "raw" (any number, as released: students may be pushed to maximise a
    loss), or "product": a * b for the task and a * (1 - b) for the distillation, a and b sigmoids (the 2023 form for one
    student). shared: one set of weights for all students.

    A network that sees the input alone can find labels that are wrong in a region of inputs, and cannot tell labels that
    were flipped at random: for these take a `LogitTrunk` with the label, or a `WeightTable`.
    Raises ValueError for another output, and for "product" with losses other than task and distill.
    """

    def __init__(self, trunk: nn.Module, output: str = "sigmoid", shared: bool = False):
        super().__init__()
        if output not in OUTPUTS:
            raise ValueError(f"output must be one of {', '.join(OUTPUTS)}, got {output!r}")
        self.trunk, self.output, self.shared = trunk, output, shared
        self.columns = tuple(getattr(trunk, "columns", ()))
        self.reads_logits = bool(getattr(trunk, "reads_logits", False))

    def build(self, students: Sequence[str], parts: Sequence[str], num_labels: int, example_ids: Tensor | None) -> None:
        super().build(students, parts, num_labels, example_ids)
        if self.output == "product" and tuple(parts) != ("task", "distill"):
            raise ValueError(f"output='product' weights task and distill, and the objective has {', '.join(parts)}")
        if isinstance(self.trunk, LogitTrunk):
            self.trunk.build(len(students), num_labels)
        width: Any = self.trunk.width
        dtype = next((parameter.dtype for parameter in self.trunk.parameters()), None)
        self.head = nn.Linear(width, len(parts) * (1 if self.shared else len(students)), dtype=dtype)

    def forward(
        self, batch: Batch, student_logits: Tensor | None = None, teacher_logits: Tensor | None = None
    ) -> Tensor:
        seen = self.trunk(batch, student_logits, teacher_logits) if self.reads_logits else self.trunk(batch)
        raw = self.head(seen).view(len(seen), -1, len(self.parts)).expand(-1, len(self.students), -1)
        if self.output == "sigmoid":
            return raw.sigmoid()
        if self.output == "softplus":
            return F.softplus(raw)
        if self.output == "product":
            a, b = raw.sigmoid().unbind(-1)
            return torch.stack([a * b, a * (1 - b)], dim=-1)
        return raw


class ImageTrunk(nn.Module):
    """Three convolutions of stride 2 with group norms on pixel_values (examples, channels, height, width), and their mean."""

    columns = ()  # pixel_values are the students' own

    def __init__(self, num_channels: int = 3, width: int = 64):
        super().__init__()
        self.width = width
        sizes = [num_channels, width // 4, width // 2, width]
        self.layers = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1, bias=False), nn.GroupNorm(4, b), nn.ReLU())
                for a, b in itertools.pairwise(sizes)
            )
        )

    def forward(self, batch: Batch) -> Tensor:
        dtype = next(self.parameters()).dtype
        return self.layers(batch["pixel_values"].to(dtype)).mean((-2, -1))


class TextTrunk(nn.Module):
    """Embeddings of input_ids (examples, tokens), a convolution over three tokens, and the mean over what is no padding."""

    columns = ()

    def __init__(self, vocab_size: int, width: int = 64):
        super().__init__()
        self.width = width
        self.embeddings = nn.Embedding(vocab_size, width)
        self.convolution = nn.Conv1d(width, width, 3, padding=1)
        nn.init.normal_(self.embeddings.weight, std=0.1)

    def forward(self, batch: Batch) -> Tensor:
        ids = batch["input_ids"]
        mask = batch.get("attention_mask", torch.ones_like(ids))
        embedded = self.embeddings(ids) * mask.unsqueeze(-1)
        mixed = F.gelu(self.convolution(embedded.transpose(1, 2))).transpose(1, 2)
        return masked_mean(mixed, mask)


class FeatureTrunk(nn.Module):
    """A perceptron on one column of the batch, (examples, size): features of any kind."""

    def __init__(self, column: str, size: int, width: int = 64):
        super().__init__()
        self.column, self.columns, self.width = column, (column,), width
        self.layers = nn.Sequential(nn.Linear(size, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())

    def forward(self, batch: Batch) -> Tensor:
        return self.layers(batch[self.column].flatten(1).to(next(self.parameters()).dtype))


class LogitTrunk(nn.Module):
    """A perceptron on log-probabilities of the students, of the teacher, and on the label: it sees which labels surprise.

    sources: of student, teacher, label. The students' logits are those of the same batch, detached.
    Raises ValueError for other sources, and when asked for a teacher's logits that there are not.
    """

    reads_logits = True

    def __init__(self, sources: Sequence[str] = SOURCES, width: int = 64):
        super().__init__()
        if not sources or set(sources) - set(SOURCES):
            raise ValueError(f"sources must be some of {', '.join(SOURCES)}, got {sources}")
        self.sources, self.width = tuple(sources), width
        self.columns = ("labels",) if "label" in sources else ()

    def build(self, students: int, num_labels: int) -> None:
        self.num_labels = num_labels
        size = num_labels * sum({"student": students, "teacher": 1, "label": 1}[source] for source in self.sources)
        self.layers = nn.Sequential(
            nn.Linear(size, self.width), nn.ReLU(), nn.Linear(self.width, self.width), nn.ReLU()
        )

    def forward(self, batch: Batch, student_logits: Tensor | None, teacher_logits: Tensor | None) -> Tensor:
        given: dict[str, Tensor | None] = {
            "student": None if student_logits is None else log_probabilities(student_logits).flatten(1),
            "teacher": None if teacher_logits is None else log_probabilities(teacher_logits),
            "label": label_shares(batch["labels"], self.num_labels) if "label" in self.sources else None,
        }
        seen = [given[source] for source in self.sources]
        if any(one is None for one in seen):
            raise ValueError(
                "the coordinator reads the teacher's logits, and there is no teacher: leave 'teacher' out of sources"
            )
        return self.layers(torch.cat(seen, dim=-1).to(next(self.layers.parameters()).dtype))  # type: ignore[arg-type]


def label_shares(labels: Tensor, num_labels: int) -> Tensor:
    """(examples, num_labels): 1 at the label, nothing where it is -100; probabilities, several labels and numbers as they are."""
    if labels.is_floating_point():
        return labels.reshape(len(labels), num_labels).float()
    return F.one_hot(labels.clamp(min=0), num_labels).float() * (labels >= 0).unsqueeze(-1)


def log_probabilities(logits: Tensor) -> Tensor:
    return F.log_softmax(at_least_float32(logits), dim=-1)


def rows_of(batch: Batch) -> int:
    """How many examples a batch has."""
    return len(next(iter(batch.values())))


def trunk_for(config: Any, batch_columns: Sequence[str]) -> nn.Module:
    """The image or the text network, by what the students read. Raises ValueError for neither."""
    if "input_ids" in batch_columns:
        return TextTrunk(config.vocab_size)
    if {"pixel_values", "pixels", "image", "images", "img"} & set(batch_columns):
        return ImageTrunk(getattr(config, "num_channels", 3))
    raise ValueError(
        f"the rows have {', '.join(batch_columns) or 'no columns'}, neither text nor images: pass "
        "coordinator=CNet(FeatureTrunk(column, size)) or another one"
    )
