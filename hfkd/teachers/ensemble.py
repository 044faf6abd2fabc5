"""Several teachers that answer as one."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hfkd.functional import at_least_float32
from hfkd.outputs import Batch, Progress, TeacherOutput
from hfkd.teachers.asking import answers_classes, chosen_columns
from hfkd.teachers.labels import class_names, problem_type_of
from hfkd.teachers.model import ModelTeacher
from hfkd.teachers.teacher import Needs, Teacher

COMBINE = ("mean", "logits", "vote", "sample")


class EnsembleTeacher(Teacher):
    """Several teachers that answer as one; each is matched with the student's classes by its own names.

    members: Teachers, modules, folders or Hub ids. combine:
    - "mean": the mean of the members' probabilities at temperature 1, as its logarithm, so that a softmax at
      temperature 1 gives the mean back. Multi-label: the mean of the sigmoids, as its logit. Regression: the mean of the
      outputs. A member alone becomes its log-probabilities: its logits up to a shift, which no softmax sees.
    - "logits": the mean of the logits (a geometric mean of probabilities); a member alone is its own logits.
    - "vote": `labels`, the class that most members predict; ties go to the larger sum of probabilities. No logits.
    - "sample": `labels`, the prediction of one member chosen uniformly for each example, a function of (seed, round,
      epoch, example_id): the same on every process and for every batch composition. No logits; the batch needs
      `example_id`. All members are asked, because a batch needs them all.

    Results are in float32 or better. problem_type: None takes the members' config's, else the student's, else single-label.
    one_in_memory=True: only one member at a time occupies the device. Members given as modules or Teachers wait in the
    CPU's memory and are moved for every batch; members given by name are loaded for every batch and dropped afterwards,
    which reads every checkpoint from disk in every step: worth it once, for `hfkd.cache`, with large batches.

    Raises ValueError without members, for another `combine`, for members of different problem types, for votes outside
    single-label classification, and for needs beyond logits: hidden states of several models have no mean.
    """

    def __init__(
        self,
        members: Sequence[Teacher | nn.Module | str | Path],
        combine: str = "mean",
        one_in_memory: bool = False,
        problem_type: str | None = None,
    ):
        if combine not in COMBINE:
            raise ValueError(f"combine must be one of {', '.join(COMBINE)}, got {combine!r}")
        if not members:
            raise ValueError("an ensemble needs at least one member")
        self.combine = combine
        self._given_problem_type = problem_type
        self.one_in_memory = one_in_memory
        self.members = [_as_teacher(member, one_in_memory) for member in members]
        self.config = self.members[0].config
        columns = [column for member in self.members for column in member.columns]
        self.columns = tuple(dict.fromkeys([*columns, *(["example_id"] if combine == "sample" else [])]))
        self._device: torch.device | str = "cpu"
        named = [class_names(member.config) is not None for member in self.members]
        if any(named) and not all(named):
            raise ValueError(
                f"member {named.index(True)} names its classes and member {named.index(False)} does not, so nobody can tell "
                "whether their orders agree: set id2label of every member's config"
            )
        try:
            self.align_labels(self.config)
        except ValueError as error:
            raise ValueError(f"the members do not match (member 0 in the student's place): {error}") from error

    def prepare(self, student: Any, needs: Needs, device: torch.device | str) -> None:
        if beyond := sorted(set(needs) - {"teacher"}):
            raise ValueError(f"an ensemble answers logits or labels, the objective needs {', '.join(beyond)} as well")
        self._device = device
        for member in self.members:
            member.prepare(student, needs, device)
            if self.one_in_memory:
                member.to("cpu")
        super().prepare(student, needs, device)

    def align_labels(self, student_config: Any) -> None:
        """Each member by its own names; until a student is known, by those of the first member."""
        self.aligned_to = student_config
        for member in self.members:
            member.align_labels(student_config)
        types = {problem_type_of(member.config) for member in self.members} - {None}
        if len(types) > 1:
            raise ValueError(f"the members have different problem types ({', '.join(sorted(map(str, types)))})")
        found = self._given_problem_type or next(iter(types), None) or problem_type_of(student_config)
        self.problem_type = found or "single_label_classification"
        if self.combine in ("vote", "sample") and self.problem_type != "single_label_classification":
            raise ValueError(
                f"combine={self.combine!r} needs one class an example, this is {self.problem_type}: 'mean'"
            )

    def to(self, device: torch.device | str) -> Self:
        self._device = device
        if not self.one_in_memory:
            for member in self.members:
                member.to(device)
        return self

    def respond(self, batch: Batch, progress: Progress | None = None) -> TeacherOutput:
        logits = torch.stack([at_least_float32(answer) for answer in self._members_logits(batch, progress)])
        if self.combine == "mean":
            return TeacherOutput(logits=mean_answer(logits, self.problem_type))
        if self.combine == "logits":
            return TeacherOutput(logits=logits.mean(0))
        if self.combine == "vote":
            return TeacherOutput(labels=voted(logits))
        if "example_id" not in batch:
            raise ValueError(
                f"combine='sample' keys its draws by example_id, and the batch has only {sorted(batch)}: add the row "
                "number as a column example_id and let the collator keep it"
            )
        chosen = keyed_choice(batch["example_id"], progress or Progress(), len(logits))
        return TeacherOutput(labels=logits.argmax(-1)[chosen, torch.arange(len(chosen), device=chosen.device)])

    def _members_logits(self, batch: Batch, progress: Progress | None) -> Iterator[Tensor]:
        for number, member in enumerate(self.members):
            if self.one_in_memory:
                member.to(self._device)
            answer = member(batch, progress).logits
            if self.one_in_memory:
                member.to("cpu")
            if answer is None:
                raise ValueError(f"member {number} ({type(member).__name__}) answered no logits to combine")
            yield answer

    def reads(self, available: Iterable[str]) -> tuple[str, ...]:
        columns = set(available)
        own = columns & {"example_id"} if self.combine == "sample" else set()
        return tuple(sorted(own.union(*(member.reads(columns) for member in self.members))))

    def weights(self) -> Iterator[Mapping[str, Tensor]]:
        for member in self.members:
            yield from member.weights()

    def facts(self) -> dict[str, Any]:
        members = [member.facts() for member in self.members]
        return {**super().facts(), "combine": self.combine, "members": members}


class _ModelOnDisk(Teacher):
    """A checkpoint that is in memory only while it answers."""

    def __init__(self, name: str):
        self.name = name
        self.device: torch.device | str = "cpu"
        loaded = self._load()
        self.config, self.columns, self._facts = loaded.config, loaded.columns, loaded.facts()
        self._inputs, self._has_classes = loaded._inputs, answers_classes(loaded.model)

    def _load(self) -> ModelTeacher:
        return ModelTeacher(self.name)

    def to(self, device: torch.device | str) -> Self:
        self.device = device
        return self

    def align_labels(self, student_config: Any) -> None:
        if self._has_classes:
            super().align_labels(student_config)

    def respond(self, batch: Batch, progress: Progress | None = None) -> TeacherOutput:
        return self._load().to(self.device).respond(batch, progress)

    def reads(self, available: Iterable[str]) -> tuple[str, ...]:
        return tuple(sorted(chosen_columns(available, self._inputs, "teacher_").values()))

    def weights(self) -> Iterator[Mapping[str, Tensor]]:
        yield from self._load().weights()

    def facts(self) -> dict[str, Any]:
        return self._facts


def _as_teacher(member: Teacher | nn.Module | str | Path, one_in_memory: bool) -> Teacher:
    if isinstance(member, Teacher):
        return member
    if one_in_memory and not isinstance(member, nn.Module):
        return _ModelOnDisk(str(member))
    return ModelTeacher(member)


def mean_answer(logits: Tensor, problem_type: str) -> Tensor:
    """(members, ..., num_labels) -> (..., num_labels); in log space, so that tiny probabilities do not become 0."""
    if problem_type == "regression":
        return logits.mean(0)
    if problem_type == "multi_label_classification":
        return F.logsigmoid(logits).logsumexp(0) - F.logsigmoid(-logits).logsumexp(0)
    members = torch.full((), len(logits), dtype=logits.dtype, device=logits.device)
    return F.log_softmax(logits, dim=-1).logsumexp(0) - members.log()


def voted(logits: Tensor) -> Tensor:
    """(members, ..., num_labels) -> (...): the most frequent prediction; among equals the most probable in sum."""
    votes = F.one_hot(logits.argmax(-1), logits.shape[-1]).sum(0)
    tied = votes == votes.amax(-1, keepdim=True)
    return logits.softmax(-1).sum(0).masked_fill(~tied, -1.0).argmax(-1)


def keyed_choice(example_ids: Tensor, progress: Progress, choices: int) -> Tensor:
    """One of `choices` numbers for each example, uniformly, a function of (seed, round, epoch, example_id).

    Integer hashing on the device (two rounds of a multiply-and-shift finaliser; the multiplier below 2^27 keeps 64-bit
    products of 32-bit values exact), because a generator for each example would make the host wait for the ids.
    """
    key = zlib.crc32(f"{progress.seed} {progress.round} {int(progress.epoch)}".encode())
    folded = example_ids.long() ^ (example_ids.long() >> 32)
    return _mixed(_mixed(folded & 0xFFFFFFFF) ^ key) % choices


def _mixed(x: Tensor) -> Tensor:
    for _ in range(2):
        x = (((x >> 16) ^ x) * 0x45D9F3B) & 0xFFFFFFFF
    return (x >> 16) ^ x
