"""Training for the worst group (Sagawa et al. 2020, arXiv 1911.08731): a baseline without a teacher."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
from torch import Tensor

from hfkd.functional import is_soft, labelled_units, task_loss
from hfkd.objectives.cross_entropy import checked_smoothing, refuse_wrong_labels
from hfkd.objectives.distillation import checked_positive
from hfkd.objectives.objective import Objective
from hfkd.outputs import Batch, Progress, StudentOutput, TeacherOutput, Terms


class GroupDRO(Objective):
    """L = sum_g q_g * mean cross-entropy of group g, with q_g <- q_g * exp(step_size * that mean), then normalised.

    Online exponentiated gradient, algorithm 1 of the paper, for batches that hold all groups as in the authors' code (as
    remembered, not verified): a group without an example in the batch keeps its weight but for the normalisation. The
    weights move first, and the loss is taken with the new ones. Without the paper's adjustment for group sizes.

    groups=None: the groups are the classes. groups=n: the column `group`, (batch,), holds numbers from 0 to n - 1.
    The weights are `group_weights_`, (groups,), equal at the start and anew for every student (`build`), saved and resumed
    with a run. They move in training only: where the student's logits carry a gradient.

    Every batch is taken as a whole (`batch_coupled`). Several processes share the group means (one all-reduce of two
    numbers a group), so their weights are equal and the run is that of one process with the whole batch. With gradient
    accumulation each micro-batch is a batch of its own: it moves the weights, has its own group means, and counts in the
    step by its labelled units, so that 2 x 4 is not 1 x 8. One value a unit, weight of its group * units of the batch /
    units of its group * cross-entropy, so that the trainer's sum over units, divided by their number, is L.

    Evaluation is plain cross-entropy. student.logits: (batch, num_labels) or (batch, tokens, num_labels); a token belongs to
    the group of its class. Labels of -100 cost nothing and belong to no group.
    Raises ValueError for a step_size that is not above 0 and for fewer than 2 groups.
    """

    paper = "1911.08731"
    equation = (
        r"L = \sum_g q_g \, \overline{\mathrm{CE}}_g, \quad q_g \propto q_g \exp(\eta \, \overline{\mathrm{CE}}_g)"
    )
    problem_types = ("single_label_classification",)
    batch_coupled = True
    group_weights_: Tensor | None

    def __init__(self, step_size: float = 0.01, groups: int | None = None, label_smoothing: float = 0.0):
        super().__init__()
        if groups is not None and groups < 2:
            raise ValueError(f"groups must be 2 or more (None: the classes are the groups), got {groups}")
        self.step_size = checked_positive("step_size", step_size)
        self.groups = groups
        self.label_smoothing = checked_smoothing(label_smoothing)
        self.columns = ("labels",) if groups is None else ("labels", "group")
        self.register_buffer("group_weights_", None)

    def build(self, student_config: Any, teacher_config: Any, problem_type: str | None) -> None:
        super().build(student_config, teacher_config, problem_type)
        num_labels = getattr(student_config, "num_labels", None)
        refuse_wrong_labels(self.label_smoothing, num_labels or 2, self.problem_type)
        number = self.groups or num_labels  # without either the first batch tells
        self.group_weights_ = torch.full((number,), 1 / number) if number else None

    def forward(
        self,
        student: StudentOutput,
        teacher: TeacherOutput | None,
        batch: Batch,
        progress: Progress | None = None,
    ) -> Terms:
        losses = task_loss(student.logits, batch["labels"], self.problem_type, self.label_smoothing)
        weights = self._weights(student.logits).to(losses.device, losses.dtype)
        units, groups = self._groups(batch, len(weights))
        sums, counts = self._sums(losses.detach() * units, groups, units, len(weights))
        if student.logits.requires_grad:
            weights = self._moved(weights, sums / counts.clamp(min=1))
            self.group_weights_ = weights
        shares = weights * counts.sum() / counts.clamp(min=1)
        return {"task_loss": shares[groups] * units * losses}

    def _weights(self, student_logits: Tensor) -> Tensor:
        if self.group_weights_ is None:
            number = self.groups or student_logits.shape[-1]
            return torch.full((number,), 1 / number, dtype=torch.float64)
        return self.group_weights_

    def _groups(self, batch: Batch, number: int) -> tuple[Tensor, Tensor]:
        """Which units count, and the group of each (0 for the others), of the labels' shape."""
        labels = batch["labels"]
        units = labelled_units(labels, self.problem_type)
        if self.groups is None and is_soft(labels):
            raise ValueError(
                "the classes are the groups, and the labels are probabilities: leave mixup and cutmix off, or give a column "
                "`group` and groups=..."
            )
        groups = labels if self.groups is None else self._column(batch)
        if groups.shape != units.shape:
            raise ValueError(f"the groups have shape {tuple(groups.shape)}, the labelled units {tuple(units.shape)}")
        groups = groups.masked_fill(~units, 0)
        if groups.device.type == "cpu" and bool(
            ((groups < 0) | (groups >= number)).any()
        ):  # elsewhere the host would wait
            raise ValueError(f"groups run from {int(groups.min())} to {int(groups.max())}, not from 0 to {number - 1}")
        return units, groups

    def _column(self, batch: Batch) -> Tensor:
        if "group" not in batch:
            raise ValueError(
                f"groups={self.groups} reads the column `group`, and the batch has only {sorted(batch)}: add it to the data "
                "set, or leave groups out to take the classes"
            )
        return batch["group"]

    def _sums(self, losses: Tensor, groups: Tensor, units: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """Loss and units of each group, (groups,) twice, over all processes."""
        both = torch.stack([losses.flatten(), units.flatten().to(losses.dtype)])
        totals = both.new_zeros(2, number).index_add(1, groups.flatten(), both)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(totals)
        return totals[0], totals[1]

    def _moved(self, weights: Tensor, means: Tensor) -> Tensor:
        """In logarithms, so that a large loss does not overflow; a weight too small for its type can still come back."""
        logs = weights.clamp(min=torch.finfo(weights.dtype).tiny).log()
        return torch.softmax(logs + self.step_size * means, dim=0)
