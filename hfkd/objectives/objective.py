"""The contract of an objective, on one screen."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from typing import Any, Self

from torch import Tensor, nn

from hfkd.functional import IGNORED, cross_entropy
from hfkd.outputs import Batch, Counts, Progress, StudentOutput, TeacherOutput, Terms


class Objective(nn.Module, ABC):
    """Scores one batch and owns no model.

    A term holds one value per *unit* (an example, or a token that carries a label), already weighted, under a name
    that ends in `_loss`. The trainer divides the sum of each term by the number of its units (`count`) in the whole
    optimizer step, over micro-batches and processes, and adds the terms up. Nothing in here reduces over units.

    `__init__` stores hyper-parameters under their own names; learned values come from `fit` and end in `_`.
    `hfkd.testing.check_objective` checks the contract.
    """

    columns: tuple[str, ...] = ("labels",)  # what it reads from the batch
    task_columns: tuple[str, ...] = ("labels",)  # what `task` reads
    needs: frozenset[str] = frozenset()  # of {"teacher", "features", "hidden_states", "attentions"}
    batch_coupled: bool = False  # True where one example's value depends on the others, by definition
    paper: str = ""  # arXiv id, printed on the model card
    equation: str = ""  # printed on the model card

    def build(self, student_config: Any, teacher_config: Any, problem_type: str | None) -> None:
        """Called once, before the optimizer exists; the place to compare widths and to refuse what cannot work."""

    def fit(self, teacher_logits: Tensor, labels: Tensor) -> Self:
        """Learn what is learned from data before training (class margins, say); most objectives learn nothing."""
        return self

    @abstractmethod
    def forward(
        self,
        student: StudentOutput,
        teacher: TeacherOutput | None,
        batch: Batch,
        progress: Progress | None = None,
    ) -> Terms: ...

    def task(self, student: StudentOutput, batch: Batch) -> Terms:
        """The part that needs no teacher: what `eval_loss` reports, so that it compares across objectives."""
        return {"task_loss": cross_entropy(student.logits, batch["labels"])}

    def count(self, batch: Batch) -> Counts:
        """Units of each term in this batch."""
        labelled = (batch["labels"] != IGNORED).sum()
        return {"task_loss": labelled, "distill_loss": labelled}

    def settings(self) -> dict[str, Any]:
        """The hyper-parameters, by name, for cards and run records."""
        parameters = inspect.signature(type(self).__init__).parameters.values()
        named = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "self"]
        return {name: getattr(self, name) for name in named}
