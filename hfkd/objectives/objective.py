"""The contract of an objective, on one screen."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from typing import Any, Self

import torch
from torch import Tensor, nn

from hfkd.functional import labelled_units, task_loss
from hfkd.outputs import Batch, Counts, Progress, StudentOutput, TeacherOutput, Terms

PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")


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
    needs: frozenset[str] = frozenset()  # of {"teacher", "features", "hidden_states", "attentions", "qkv"}
    problem_type: str = "single_label_classification"  # as transformers names it; token heads are single-label
    problem_types: tuple[str, ...] = PROBLEM_TYPES  # those it can score
    token_by_token: bool = False  # True where it compares position by position: both sides need one tokenizer
    batch_coupled: bool = False  # True where one example's value depends on the others, by definition
    paper: str = ""  # arXiv id, printed on the model card
    equation: str = ""  # printed on the model card

    def __init__(self) -> None:
        super().__init__()
        # What it trains, set in `build`: the trainer makes it a submodule of the student and calls it on the student's
        # ModelOutput at the end of the student's forward, so that its gradients are synchronised with the others
        self.attached: nn.Module | None = None

    def build(self, student_config: Any, teacher_config: Any, problem_type: str | None) -> None:
        """Called once, before the optimizer exists; the place to compare widths and to refuse what cannot work.

        Raises ValueError for a problem type that the objective cannot score.
        """
        problem_type = problem_type or "single_label_classification"
        if problem_type not in self.problem_types:
            raise ValueError(
                f"{type(self).__name__} scores {' and '.join(self.problem_types)}, the student's problem_type is "
                f"{problem_type!r}: set model.config.problem_type, or use KD, which scores every head"
            )
        self.problem_type = problem_type

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
        return {"task_loss": task_loss(student.logits, batch["labels"], self.problem_type)}

    def count(self, batch: Batch) -> Counts:
        """Units of each term in this batch: labelled examples or tokens; all examples where the batch has no labels."""
        if "labels" in batch:
            units = labelled_units(batch["labels"], self.problem_type).sum()
        else:
            values = next(iter(batch.values()))
            units = torch.full((), len(values), device=values.device)
        return {"task_loss": units, "distill_loss": units}

    def schedule(self, progress: Progress) -> dict[str, float]:
        """What it weights its terms by at this step, one number a name, for every log; by default its alpha, if it has one.

        The names do not end in `_loss`: those are terms.
        """
        alpha = getattr(self, "alpha", None)
        return {"alpha": float(alpha)} if isinstance(alpha, int | float) else {}

    def settings(self) -> dict[str, Any]:
        """The hyper-parameters, by name, for cards and run records."""
        parameters = inspect.signature(type(self).__init__).parameters.values()
        named = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "self"]
        return {name: getattr(self, name) for name in named}
