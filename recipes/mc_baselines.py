"""What the baselines of mc_distil.py need: a coordinator for each student alone, and DGKD's loss and its many teachers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hfkd.functional import labelled_units
from hfkd.meta import Coordinator
from hfkd.models.student_group import StudentGroup
from hfkd.objectives.collaboration import Collaboration, task_losses
from hfkd.outputs import Batch, Progress, StudentOutput, TeacherOutput, Terms
from hfkd.teachers import ModelTeacher, Teacher


class Apart(Coordinator):
    """A coordinator of its own for every student: k studies of one student, side by side on the same batches.

    A student's weights depend on its own coordinator only, and the meta loss is a sum over students: nothing couples two.
    """

    def __init__(self, each: list[Coordinator]):
        super().__init__()
        self.each = nn.ModuleList(each)
        self.columns, self.reads_logits = each[0].columns, each[0].reads_logits

    def build(self, students: Any, parts: Any, num_labels: int, example_ids: Tensor | None) -> None:
        super().build(students, parts, num_labels, example_ids)
        for name, one in zip(students, self.each, strict=True):
            one.build([name], parts, num_labels, example_ids)

    def forward(
        self, batch: Batch, student_logits: Tensor | None = None, teacher_logits: Tensor | None = None
    ) -> Tensor:
        found = []
        for k, one in enumerate(self.each):
            own = None if student_logits is None else student_logits[:, k : k + 1]
            found.append(one(batch, own, teacher_logits))
        return torch.cat(found, dim=1)


class DenselyGuided(Collaboration):
    """DGKD (Son et al. 2021) as MC-Distil's code has it: student k matches the teacher and all larger students, frozen.

    The distillation term is the sum over these n_k targets of T^2 KL; with weights a and n_k (1 - a) the loss is
    n_k (1 - a) CE + a sum_j T^2 KL_j. The original drops targets at random, which that code does not. An `Assisted` answers.
    larger: for each student, which of the assistants are larger than it.
    """

    def __init__(self, temperature: float, larger: list[list[bool]]):
        super().__init__(temperature)
        self.larger = larger

    def forward(
        self, student: StudentOutput, teacher: TeacherOutput | None, batch: Batch, progress: Progress | None = None
    ) -> Terms:
        assert teacher is not None and teacher.logits is not None and teacher.features is not None
        targets = torch.cat([teacher.logits.unsqueeze(1), teacher.features], dim=1)
        return super().forward(student, TeacherOutput(logits=targets), batch, progress)

    def losses(self, logits: Tensor, teacher_logits: Tensor | None, batch: Batch) -> Tensor:
        """teacher_logits: (batch, 1 + assistants, num_labels), the teacher's first. Returns (batch, students, 2)."""
        assert teacher_logits is not None
        counted = torch.tensor([[True, *row] for row in self.larger], device=logits.device)
        pairs = self.divergence(
            logits.unsqueeze(2).expand(-1, -1, teacher_logits.shape[1], -1),
            teacher_logits.detach().unsqueeze(1).expand(-1, logits.shape[1], -1, -1),
        )
        found = torch.where(counted, pairs, 0.0).sum(-1)
        labelled = labelled_units(batch["labels"], self.problem_type)[:, None, None]
        return torch.where(labelled, torch.stack([task_losses(logits, batch["labels"]), found], dim=-1), 0.0)


class Assisted(Teacher):
    """A teacher and frozen students that answer beside it: logits (batch, num_labels), features (batch, students, num_labels)."""

    def __init__(self, teacher: ModelTeacher, students: StudentGroup):
        self.members = [teacher]
        self.students = students.eval().requires_grad_(False)
        self.config, self.columns = teacher.config, teacher.columns
        self.processing_class = teacher.processing_class

    def respond(self, batch: Batch, progress: Progress | None = None) -> TeacherOutput:
        shown = {name: batch[name] for name in self.students.forward_names - {"labels"} if name in batch}
        answer = self.members[0].respond(batch, progress)
        return TeacherOutput(logits=answer.logits, features=self.students(**shown).logits)

    def prepare(self, student: Any, needs: Any, device: Any) -> None:
        self.members[0].prepare(student, needs, device)
        self.students.to(device)
        super().prepare(student, needs, device)

    def weights(self) -> Iterator[Mapping[str, Tensor]]:
        yield from self.members[0].weights()
        yield self.students.state_dict()
