"""The contract of a teacher, on one screen."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Self

import torch
from torch import Tensor

from hfkd.outputs import Batch, Progress, TeacherOutput
from hfkd.teachers.labels import label_order

Needs = Iterable[str]  # what the objective wants answered


class Teacher(ABC):
    """Answers a batch. Never in the optimizer, never in the student's checkpoint, never wrapped by DDP.

    A subclass writes `respond`. For `hfkd.cache` it also says which columns it `reads` and yields its `weights`.
    """

    columns: tuple[str, ...] = ()  # dataset columns it reads beyond the student's
    needs: frozenset[str] = frozenset()  # what the objective wants answered; set by the trainer
    config: Any = None  # the model's configuration, where there is one
    processing_class: Any = None  # its tokenizer or image processor, where it is known
    label_order: Tensor | None = None  # at place i the teacher's id of the student's class i; None when they are equal
    aligned_to: Any = None  # the configuration that `align_labels` was given last
    _student_ids: Tensor | None = None  # the inverse of label_order

    def __call__(self, batch: Batch, progress: Progress | None = None) -> TeacherOutput:
        with torch.no_grad():
            return self._in_students_order(self.respond(batch, progress))

    @abstractmethod
    def respond(self, batch: Batch, progress: Progress | None = None) -> TeacherOutput:
        """The answer in the teacher's own order of classes."""

    def to(self, device: torch.device | str) -> Self:
        return self

    def prepare(self, student: Any, needs: Needs, device: torch.device | str) -> None:
        """Called when the student exists, and again for every student that model_init makes."""
        self.needs = frozenset(needs)
        self.to(device)

    def align_labels(self, student_config: Any) -> None:
        """Match classes by name, so that `__call__` answers in the student's order.

        Names are compared without regard to case and blanks. Where a side has only transformers' default names (LABEL_0,
        ...) or none, classes are matched by number. Raises ValueError for different numbers or names of classes.
        """
        self.aligned_to = student_config
        order = label_order(self.config, student_config)
        self.label_order = None if order is None else torch.tensor(order)
        self._student_ids = None if order is None else torch.tensor(order).argsort()

    def _in_students_order(self, answer: TeacherOutput) -> TeacherOutput:
        if self.label_order is None or self._student_ids is None:
            return answer
        given = answer.logits if answer.logits is not None else answer.labels
        if given is not None and given.device != self.label_order.device:  # once: later answers find it there
            self.label_order, self._student_ids = self.label_order.to(given.device), self._student_ids.to(given.device)
        return dataclasses.replace(
            answer,
            logits=None if answer.logits is None else answer.logits.index_select(-1, self.label_order),
            labels=None if answer.labels is None else self._student_ids[answer.labels],
        )

    def reads(self, available: Iterable[str]) -> tuple[str, ...]:
        """Which of these dataset columns the answer depends on, in order of name."""
        return tuple(sorted(set(available) & set(self.columns)))

    def weights(self) -> Iterator[Mapping[str, Tensor]]:
        """The weights of each model behind the answers, one after another."""
        raise ValueError(
            f"{type(self).__name__} does not say which weights are behind its answers, so that a cache of them could "
            "not be told from another teacher's: define weights(), or cache the model with ModelTeacher"
        )

    def facts(self) -> dict[str, Any]:
        """Who answers, for cards and manifests; local folders only by their last name."""
        return {"kind": type(self).__name__, "name": None, "revision": None, "dtype": None, "members": []}
