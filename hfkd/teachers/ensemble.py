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
DRAWS = ("example", "batch")


class EnsembleTeacher(Teacher):
    """Several teachers that answer as one; each is matched with the student's classes by its own names.

    members: Teachers, modules, folders or Hub ids. combine:
    - "mean": the mean of the members' probabilities at temperature 1, as its logarithm, so that a softmax at
      temperature 1 gives the mean back. Multi-label: the mean of the sigmoids, as its logit. Regression: the mean of the
      outputs. A member alone becomes its log-probabilities: its logits up to a shift, which no softmax sees.
    - "logits": the mean of the logits (a geometric mean of probabilities); a member alone is its own logits.
    - "vote": `labels`, the class that most members predict; ties go to the larger sum of probabilities. No logits.
    - "sample": `labels`, the prediction of one member chosen uniformly. No logits.

    draw, for "sample" only: "example" draws a member for each example, a function of (seed, round, epoch, example_id): the
    same on every process and for every batch composition. The batch needs `example_id`, and all members are asked, because
    a batch needs them all. "batch" draws one member for a whole optimizer step, a function of (seed, round, step), as the
    code released with arXiv 2203.14649 does for each of its batches; only that member is asked. Its micro-batches and
    processes hear the same member, so that accumulation changes nothing either.
    soft, for "vote" and "sample": what PseudoLabel(soft=True) reads instead of class ids. "vote" answers the members' shares
    of the votes, as `labels` (..., num_labels); "sample" the drawn member's own logits. The other two are soft as they are.

    The paper's EPL is PseudoLabel with "vote" (its released code: "logits", and hard), its RPL is PseudoLabel with "sample".

    Results are in float32 or better. problem_type: None takes the members' config's, else the student's, else single-label.
    one_in_memory=True: only one member at a time occupies the device. Members given as modules or Teachers wait in the
    CPU's memory and are moved for every batch; members given by name are loaded for every batch and dropped afterwards,
    which reads every checkpoint from disk in every step: worth it once, for `hfkd.cache`, with large batches.

    Raises ValueError without members, for another `combine` or `draw`, for members of different problem types, for votes
    outside single-label classification, and for needs beyond logits: hidden states of several models have no mean. When
    asked: for members whose logits have other shapes, and for logits that are not finite, naming the member and the rows
    (away from the CPU in the first batch only, because a check makes the host wait for the device).
    """

    def __init__(
        self,
        members: Sequence[Teacher | nn.Module | str | Path],
        combine: str = "mean",
        one_in_memory: bool = False,
        problem_type: str | None = None,
        *,
        draw: str = "example",
        soft: bool = False,
    ):
        _refuse_unknown(combine, draw)
        if not members:
            raise ValueError("an ensemble needs at least one member")
        self.combine, self.draw, self.soft = combine, draw, soft
        self._given_problem_type = problem_type
        self.one_in_memory = one_in_memory
        self.members = [_as_teacher(member, one_in_memory) for member in members]
        self.config = self.members[0].config
        columns = [column for member in self.members for column in member.columns]
        self._draws_examples = combine == "sample" and draw == "example"
        self.columns = tuple(dict.fromkeys([*columns, *(["example_id"] if self._draws_examples else [])]))
        self.view = _cached_view(self.members)
        self._device: torch.device | str = "cpu"
        self._checked = False
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

    @property
    def names_classes(self) -> bool:
        """Whether it answers `labels`, and no logits."""
        return self.combine == "vote" or (self.combine == "sample" and not self.soft)

    def prepare(self, student: Any, needs: Needs, device: torch.device | str) -> None:
        if beyond := sorted(set(needs) - {"teacher"}):
            raise ValueError(f"an ensemble answers logits or labels, the objective needs {', '.join(beyond)} as well")
        self._device, self._checked = device, False
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
        _refuse_votes(self.combine, self.problem_type)

    def to(self, device: torch.device | str) -> Self:
        self._device = device
        if not self.one_in_memory:
            for member in self.members:
                member.to(device)
        return self

    def respond(self, batch: Batch, progress: Progress | None = None) -> TeacherOutput:
        progress, ids = progress or Progress(), batch.get("example_id")
        if self._draws_examples and ids is None:
            raise ValueError(
                f"combine='sample' keys its draws by example_id, and the batch has only {sorted(batch)}: add the row "
                "number as a column example_id and let the collator keep it"
            )
        asked = range(len(self.members))
        if self.combine == "sample" and self.draw == "batch":
            drawn = drawn_of_step(progress, len(self.members))
            asked = range(drawn, drawn + 1)
        logits = _stacked(list(self._members_logits(asked, batch, progress)))
        if logits.device.type == "cpu" or not self._checked:
            _refuse_bad_members(logits, asked, ids)
            self._checked = True
        return _combined(logits, self.combine, self.problem_type, ids, progress, self.draw, self.soft)

    def _members_logits(self, asked: Iterable[int], batch: Batch, progress: Progress) -> Iterator[Tensor]:
        for number in asked:
            member = self.members[number]
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
        own = columns & {"example_id"} if self._draws_examples else set()
        return tuple(sorted(own.union(*(member.reads(columns) for member in self.members))))

    def weights(self) -> Iterator[Mapping[str, Tensor]]:
        for member in self.members:
            yield from member.weights()

    def facts(self) -> dict[str, Any]:
        members = [member.facts() for member in self.members]
        # Only what matters: a cache of means compares facts, and those of earlier versions had no more
        draw = {"draw": self.draw} if self.combine == "sample" else {}
        soft = {"soft": True} if self.soft and self.combine in ("vote", "sample") else {}
        return {**super().facts(), "combine": self.combine, **draw, **soft, "members": members}


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


def _cached_view(members: Sequence[Teacher]) -> str | None:
    """The collator's view that cached members were asked about, which the trainer compares; None where all are models."""
    views = {view for member in members if not hasattr(member, "model") and (view := getattr(member, "view", None))}
    if len(views) > 1:
        raise ValueError(f"the members were cached for different views ({', '.join(sorted(views))}): cache them again")
    return next(iter(views), None)


def combine_answers(
    logits: Tensor | Sequence[Tensor],
    combine: str,
    *,
    problem_type: str = "single_label_classification",
    example_ids: Tensor | Sequence[Any] | None = None,
    progress: Progress | None = None,
    draw: str = "example",
    soft: bool = False,
) -> TeacherOutput:
    """What an `EnsembleTeacher` with these settings answers, from its members' logits: test-time ensembling.

    logits: (members, ..., num_labels) before temperature, or a sequence of members' (..., num_labels); numpy arrays too.
    All with one order of classes, which numbers alone cannot show: `EnsembleTeacher` matches names.
    example_ids: (rows,), which key the draws of "sample"; or (members, rows), what was saved beside each member's logits.
    progress: seed, round, epoch and step that the draws are keyed by; None is the beginning of seed 0.

    Raises ValueError without members, for members of different shapes or with ids in another order, for logits that are
    NaN or infinite (member and rows named), for draws by example without ids, and for votes outside single-label heads.
    """
    _refuse_unknown(combine, draw)
    _refuse_votes(combine, problem_type)
    stacked = _stacked([torch.as_tensor(member) for member in logits])
    ids = _one_order(example_ids, stacked)
    _refuse_bad_members(stacked, range(len(stacked)), ids)
    if combine == "sample" and draw == "example" and ids is None:
        raise ValueError("combine='sample' keys its draws by example_ids: pass the ids of the rows, or draw='batch'")
    if combine == "sample" and draw == "batch":
        drawn = drawn_of_step(progress or Progress(), len(stacked))
        stacked = stacked[drawn : drawn + 1]
    return _combined(stacked, combine, problem_type, ids, progress or Progress(), draw, soft)


def _combined(
    logits: Tensor,
    combine: str,
    problem_type: str,
    example_ids: Tensor | None,
    progress: Progress,
    draw: str,
    soft: bool,
) -> TeacherOutput:
    """logits: (members, ..., num_labels), finite; with draw="batch" of the drawn member alone."""
    if combine == "mean":
        return TeacherOutput(logits=mean_answer(logits, problem_type))
    if combine == "logits":
        return TeacherOutput(logits=logits.mean(0))
    if combine == "vote":
        return TeacherOutput(labels=vote_shares(logits) if soft else voted(logits))
    drawn = logits[0]
    if draw == "example":
        assert example_ids is not None
        chosen = keyed_choice(example_ids, progress, len(logits))
        drawn = logits[chosen, torch.arange(len(chosen), device=chosen.device)]
    return TeacherOutput(logits=drawn) if soft else TeacherOutput(labels=drawn.argmax(-1))


# ---- what is refused ----


def _refuse_unknown(combine: str, draw: str) -> None:
    if combine not in COMBINE:
        raise ValueError(f"combine must be one of {', '.join(COMBINE)}, got {combine!r}")
    if draw not in DRAWS:
        raise ValueError(f"draw must be one of {', '.join(DRAWS)}, got {draw!r}")
    if draw == "batch" and combine != "sample":
        raise ValueError(f"draw='batch' is for combine='sample', and combine={combine!r} draws nothing: leave draw out")


def _refuse_votes(combine: str, problem_type: str) -> None:
    if combine in ("vote", "sample") and problem_type != "single_label_classification":
        raise ValueError(f"combine={combine!r} needs one class an example, this is {problem_type}: 'mean'")


def _stacked(members: list[Tensor]) -> Tensor:
    """(members, ..., num_labels) in float32 or better."""
    if not members:
        raise ValueError("an ensemble needs at least one member's logits, got none")
    for number, member in enumerate(members):
        if member.dim() < 2 or member.shape != members[0].shape:
            raise ValueError(
                f"member {number} has logits {tuple(member.shape)}, member 0 {tuple(members[0].shape)}: all must be of one "
                "shape (rows, ..., num_labels), that is of the same rows (and tokens) and classes"
            )
    return torch.stack([at_least_float32(member) for member in members])


def _one_order(example_ids: Tensor | Sequence[Any] | None, logits: Tensor) -> Tensor | None:
    """(rows,) from (rows,) or (members, rows)."""
    if example_ids is None:
        return None
    if not isinstance(example_ids, Tensor):
        example_ids = torch.stack([torch.as_tensor(part) for part in example_ids])
    if example_ids.shape not in (logits.shape[1:2], logits.shape[:2]):
        raise ValueError(
            f"example_ids are {tuple(example_ids.shape)}, the logits of {len(logits)} members and {logits.shape[1]} rows: "
            f"give ({logits.shape[1]},) or {tuple(logits.shape[:2])}"
        )
    if example_ids.dim() == 1:
        return example_ids.to(logits.device)
    differ = (example_ids != example_ids[0]).nonzero()
    if len(differ):
        member, row = (int(number) for number in differ[0])
        raise ValueError(
            f"row {row} is example {int(example_ids[member, row])} of member {member} and {int(example_ids[0, row])} of member "
            "0: bring all members' logits into one order of rows"
        )
    return example_ids[0].to(logits.device)


def _refuse_bad_members(logits: Tensor, numbers: Sequence[int], example_ids: Tensor | None) -> None:
    """Raise ValueError where logits are not finite: argmax takes NaN for the largest value, and no label shows it."""
    if bool(torch.isfinite(logits).all()):
        return
    bad = ~torch.isfinite(logits.flatten(2)).all(2)
    member = int(bad.any(1).nonzero()[0])
    rows = bad[member].nonzero().flatten()
    named = "rows of this batch" if example_ids is None else "examples"
    shown = [int(row if example_ids is None else example_ids[row]) for row in rows[:10]]
    raise ValueError(
        f"the logits of member {numbers[member]} are NaN or infinite for {named} {shown} ({len(rows)} of {bad.shape[1]}): "
        "look at these inputs, and run the member in float32"
    )


# ---- combining ----


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


def vote_shares(logits: Tensor) -> Tensor:
    """(members, ..., num_labels) -> (..., num_labels): the share of members that predict each class, in logits' dtype.

    What the labels of `keyed_choice` are on average over epochs; no logits, because most shares are 0.
    """
    return F.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype).mean(0)


def keyed_choice(example_ids: Tensor, progress: Progress, choices: int) -> Tensor:
    """One of `choices` numbers for each example, uniformly, a function of (seed, round, epoch, example_id).

    Integer hashing on the device (two rounds of a multiply-and-shift finaliser; the multiplier below 2^27 keeps 64-bit
    products of 32-bit values exact), because a generator for each example would make the host wait for the ids.
    """
    key = zlib.crc32(f"{progress.seed} {progress.round} {int(progress.epoch)}".encode())
    folded = example_ids.long() ^ (example_ids.long() >> 32)
    return _mixed(_mixed(folded & 0xFFFFFFFF) ^ key) % choices


def drawn_of_step(progress: Progress, choices: int) -> int:
    """One of `choices` numbers for a whole optimizer step, uniformly, a function of (seed, round, step)."""
    return _mixed(zlib.crc32(f"step {progress.seed} {progress.round} {progress.step}".encode())) % choices


def _mixed(x: Any) -> Any:
    for _ in range(2):
        x = (((x >> 16) ^ x) * 0x45D9F3B) & 0xFFFFFFFF
    return (x >> 16) ^ x
