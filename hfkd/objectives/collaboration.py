"""What a group of students learns: every example and every loss of every student with a weight of its own (MC-Distil)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hfkd.functional import at_least_float32, kl_divergence, labelled_units, task_loss, two_class_logits
from hfkd.objectives.distillation import checked_positive
from hfkd.objectives.objective import Objective
from hfkd.outputs import Batch, Counts, Progress, StudentOutput, TeacherOutput, Terms


class GroupObjective(Objective):
    """Scores a `StudentGroup`, whose logits are (batch, students, num_labels). A subclass names `parts` and writes `losses`.

    Terms are `<student>_<part>_loss`: the student's losses times the weights in `student.weights` (batch, students, parts),
    which the trainer gets from its coordinator; not weighted where there are none. The unit is an example.
    """

    parts: tuple[str, ...] = ("task",)
    students: tuple[str, ...] = ()  # set by the trainer

    def meet(self, students: Sequence[str]) -> None:
        self.students = tuple(students)

    @abstractmethod
    def losses(self, logits: Tensor, teacher_logits: Tensor | None, batch: Batch) -> Tensor:
        """(batch, students, parts), not weighted. No gradient to the teacher, nor from one student to another."""

    def forward(
        self, student: StudentOutput, teacher: TeacherOutput | None, batch: Batch, progress: Progress | None = None
    ) -> Terms:
        losses = self.losses(student.logits, None if teacher is None else teacher.logits, batch)
        weights = getattr(student, "weights", None)
        weighted = losses if weights is None else weights.to(losses.dtype) * losses
        return {
            f"{name}_{part}_loss": weighted[:, k, number]
            for k, name in enumerate(self.students)
            for number, part in enumerate(self.parts)
        }

    def task(self, student: StudentOutput, batch: Batch) -> Terms:
        values = task_losses(student.logits, batch["labels"], self.problem_type)
        return {f"{name}_task_loss": values[:, k] for k, name in enumerate(self.students)}

    def count(self, batch: Batch) -> Counts:
        (units,) = set(super().count(batch).values())
        return {f"{name}_{part}_loss": units for name in self.students for part in self.parts}


class Collaboration(GroupObjective):
    """L_k = mean_i [ task_weight_ik CE_ik + distill_weight_ik T^2 KL(softmax(t_i / T) || softmax(z_ik / T)) ], summed over k.

    Tambat et al. (TMLR 2025), from the released code. Students are coupled by their weights alone. teacher=False leaves the
    task term only. pooled=True adds a third term, T^2 KL to the pooled student, detached: its logit is the maximum over
    students for the true class and the minimum for every other (2023 code; whether the paper keeps it is unknown).

    Multi-label and regression heads: as in KD, without a pooled student. Raises ValueError for a temperature that is not
    above 0, for a pooled student on other than single-label heads, and for logits of other shapes.
    """

    equation = (
        r"L_k = \frac{1}{n} \sum_i \left[ \alpha_{ik} \, \mathrm{CE}(y_i, z_{ik}) "
        r"+ \beta_{ik} \, T^2 \, \mathrm{KL}(\mathrm{softmax}(t_i / T) \,\|\, \mathrm{softmax}(z_{ik} / T)) \right], "
        r"\quad L = \sum_k L_k"
    )

    def __init__(self, temperature: float = 2.0, pooled: bool = False, teacher: bool = True):
        super().__init__()
        self.temperature = checked_positive("temperature", temperature)
        self.pooled, self.teacher = pooled, teacher
        if not teacher:
            self.equation = r"L_k = \frac{1}{n} \sum_i \alpha_{ik} \, \mathrm{CE}(y_i, z_{ik}), \quad L = \sum_k L_k"
        self.parts = ("task", *(["distill"] if teacher else []), *(["pooled"] if pooled else []))
        self.needs = frozenset({"teacher"} if teacher else ())

    def build(self, student_config: Any, teacher_config: Any, problem_type: str | None) -> None:
        super().build(student_config, teacher_config, problem_type)
        if self.pooled and self.problem_type != "single_label_classification":
            raise ValueError(
                f"a pooled student needs one true class an example, and the problem is {self.problem_type}"
            )

    def losses(self, logits: Tensor, teacher_logits: Tensor | None, batch: Batch) -> Tensor:
        refuse_other_labels(logits, batch["labels"], self.problem_type)
        found = [task_losses(logits, batch["labels"], self.problem_type)]
        if self.teacher:
            if teacher_logits is None or teacher_logits.shape != logits[:, 0].shape:
                shape = None if teacher_logits is None else tuple(teacher_logits.shape)
                raise ValueError(f"the teacher's logits are {shape}, each student's {tuple(logits[:, 0].shape)}")
            found.append(self.divergence(logits, teacher_logits.detach().unsqueeze(1).expand_as(logits)))
        if self.pooled:
            found.append(self.divergence(logits, pooled_logits(logits, batch["labels"])))
        labelled = labelled_units(batch["labels"], self.problem_type)[:, None, None]
        return torch.where(labelled, torch.stack(found, dim=-1), 0.0)

    def divergence(self, logits: Tensor, targets: Tensor) -> Tensor:
        """T^2 KL(targets || logits), (batch, students); for regression the squared error."""
        if self.problem_type == "regression":
            return (at_least_float32(logits) - at_least_float32(targets)).square().mean(-1)
        if self.problem_type == "multi_label_classification":
            logits, targets = two_class_logits(logits), two_class_logits(targets)
            return self.temperature**2 * kl_divergence(logits, targets, self.temperature).mean(-1)
        return self.temperature**2 * kl_divergence(logits, targets, self.temperature)


class MutualLearning(GroupObjective):
    """Deep mutual learning (Zhang et al. 2018, arXiv 1706.00384): L_k = CE_k + mean_{j != k} KL(p_j || p_k), p_j detached.

    No teacher. All students move at once from the same logits; the paper updates one after the other.
    Raises ValueError for fewer than two students and for other than single-label heads.
    """

    paper = "1706.00384"
    equation = (
        r"L_k = \mathrm{CE}(y, z_k) + \frac{1}{K - 1} \sum_{j \neq k} \mathrm{KL}(p_j \,\|\, p_k), \quad L = \sum_k L_k"
    )
    parts = ("task", "mutual")
    problem_types = ("single_label_classification",)

    def meet(self, students: Sequence[str]) -> None:
        if len(students) < 2:
            raise ValueError(f"students that teach each other are two or more, got {', '.join(students) or 'none'}")
        super().meet(students)

    def losses(self, logits: Tensor, teacher_logits: Tensor | None, batch: Batch) -> Tensor:
        refuse_other_labels(logits, batch["labels"], self.problem_type)
        count = logits.shape[1]
        pairs = kl_divergence(logits.unsqueeze(1), logits.detach().unsqueeze(2))  # (batch, of j, to k)
        pairs = pairs.masked_fill(torch.eye(count, dtype=torch.bool, device=pairs.device), 0.0)
        found = torch.stack([task_losses(logits, batch["labels"]), pairs.sum(1) / (count - 1)], dim=-1)
        return torch.where(labelled_units(batch["labels"])[:, None, None], found, 0.0)


def task_losses(logits: Tensor, labels: Tensor, problem_type: str = "single_label_classification") -> Tensor:
    """Of every example and student: (batch, students), from logits (batch, students, num_labels) and one student's labels."""
    values = [task_loss(one, labels, problem_type) for one in logits.unbind(1)]
    return torch.stack(values, dim=1)


def pooled_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """The same shape, detached: for the true class the maximum over students, for every other the minimum."""
    fixed = logits.detach()
    right = torch.nn.functional.one_hot(labels.clamp(min=0), logits.shape[-1]).bool()
    return torch.where(right, fixed.amax(1), fixed.amin(1)).unsqueeze(1).expand_as(fixed)


def refuse_other_labels(logits: Tensor, labels: Tensor, problem_type: str) -> None:
    if logits.dim() != 3 or (
        problem_type == "single_label_classification" and labels.dim() == 2 and not labels.is_floating_point()
    ):
        raise ValueError(
            f"a group of students classifies whole texts or images: logits (batch, students, num_labels) are "
            f"{tuple(logits.shape)}, labels {tuple(labels.shape)}; token heads are distilled one by one with DistillationTrainer"
        )
