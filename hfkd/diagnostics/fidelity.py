"""The fidelity report: what a student does like its teacher, what it does otherwise, and how far either can be trusted.

`report(student, teacher, dataset)` asks both models; `report_of_logits` starts from logits that are there already. Fidelity
is not accuracy (Stanton et al. 2021, arXiv:2106.05945): a student can agree with its teacher and be as wrong, or be right
where the teacher is not. For classifiers of one label a row.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import nn

from hfkd.diagnostics import metrics
from hfkd.diagnostics.answers import Collator, Pair, left_as_found, refuse_bad_rows
from hfkd.diagnostics.gates import Gate, GateFailed, failures, parse_gates
from hfkd.diagnostics.logit_logit import LogitLogit, _constant, logit_logit, logit_of_class, with_interval
from hfkd.diagnostics.logit_logit import _refuse_other_rows as refuse_other_rows
from hfkd.diagnostics.logit_logit import _refuse_probabilities as refuse_probabilities
from hfkd.diagnostics.row_labels import labels_of
from hfkd.teachers import Teacher
from hfkd.teachers.labels import class_names, problem_type_of

Array = NDArray[Any]
SIDES = ("student", "teacher")
# What is measured on each side: its words, and what it is multiplied by to be read (percent)
MEASURED = {
    "accuracy": ("accuracy (%)", 100),
    "confidence": ("mean confidence (%)", 100),
    "calibration_error": ("calibration error, ECE (%)", 100),
    "brier_score": ("Brier score (0 to 2)", 1),
    "negative_log_likelihood": ("negative log-likelihood (nats)", 1),
}
OF_BOTH = (
    *("agreement", "kl_divergence", "slope", "intercept", "accuracy_difference"),
    *("worst_class_difference", "worst_subgroup_difference"),
)
_NUMBERS = (*OF_BOTH, *(f"{side}_{name}" for side in SIDES for name in (*MEASURED, "never_predicts")))
NUMBERS = (*_NUMBERS, *(f"train_{name}" for name in _NUMBERS))  # what gates may name


@dataclass(frozen=True)
class Bin:
    """Of a reliability diagram: the mean confidence of its examples, the fraction of them that is right, their number."""

    confidence: float
    accuracy: float
    examples: int


@dataclass(frozen=True)
class Side:
    """One model on the rows. accuracy, calibration and likelihood are None without labels.

    predicted: how many rows it gives each class. confidence: the mean of its largest probabilities. brier_score: mean over
    examples of the squared distance of probabilities and label, summed over classes, from 0 to 2 (Brier 1950; scikit-learn
    halves it for two classes). calibration_error: `metrics.expected_calibration_error`.
    """

    name: str
    predicted: tuple[int, ...]
    confidence: float
    accuracy: float | None = None
    calibration_error: float | None = None
    brier_score: float | None = None
    negative_log_likelihood: float | None = None
    reliability: tuple[Bin, ...] = ()


@dataclass(frozen=True)
class Part:
    """The rows of one class or subgroup: how many, accuracy of both, student minus teacher, agreement. None: no such row,
    or none with a label."""

    name: str
    examples: int
    student: float | None
    teacher: float | None
    agreement: float | None

    @property
    def difference(self) -> float | None:
        return None if self.student is None or self.teacher is None else self.student - self.teacher


@dataclass(frozen=True)
class FidelityReport:
    """What `report` found. Scores are fractions; KL(teacher || student) and likelihoods are in nats, at temperature 1.

    labelled: rows that carry a label, which all that needs one is measured on. classes: rows by their label. deviations: the
    logit-logit line, None where all of the teacher's X are equal. train: the same on training rows, where they were given.
    notes: what a reader must know of these numbers.
    """

    student: Side
    teacher: Side
    examples: int
    labelled: int
    class_names: tuple[str, ...]
    agreement: float
    kl_divergence: float
    classes: tuple[Part, ...] = ()
    subgroups: tuple[Part, ...] = ()
    deviations: LogitLogit | None = None
    train: FidelityReport | None = None
    notes: tuple[str, ...] = ()

    @property
    def teacher_train_accuracy(self) -> float | None:
        """Near 1 where the teacher interpolates its training labels, which decides what disobeying it does (2301.12923)."""
        return self.train.teacher.accuracy if self.train else None

    def numbers(self) -> dict[str, float]:
        """All that is known, by name; those of training rows begin with train_. For logs and gates."""
        found: dict[str, float | None] = {"agreement": self.agreement, "kl_divergence": self.kl_divergence}
        if self.deviations is not None:
            found |= {"slope": self.deviations.slope, "intercept": self.deviations.intercept}
        for which, side in zip(SIDES, (self.student, self.teacher), strict=True):
            found |= {f"{which}_{name}": getattr(side, name) for name in MEASURED}
            found[f"{which}_never_predicts"] = float(side.predicted.count(0))
        if self.student.accuracy is not None and self.teacher.accuracy is not None:
            found["accuracy_difference"] = self.student.accuracy - self.teacher.accuracy
        for name, parts in (("worst_class_difference", self.classes), ("worst_subgroup_difference", self.subgroups)):
            found[name] = min((part.difference for part in parts if part.difference is not None), default=None)
        if self.train is not None:
            found |= {f"train_{name}": value for name, value in self.train.numbers().items()}
        return {name: value for name, value in found.items() if value is not None}

    def failures(self, *conditions: str | Gate) -> list[str]:
        """Those of the conditions (`"agreement>=0.9"`) that are not met, each with its value. A number that could not be
        measured meets none. Raises ValueError for what is no condition, or of no number in `fidelity.NUMBERS`."""
        texts = [str(condition) for condition in conditions]
        return failures(parse_gates(texts, NUMBERS), self.numbers())

    def require(self, *conditions: str | Gate) -> None:
        """Raises GateFailed, naming every condition that is not met."""
        if failed := self.failures(*conditions):
            raise GateFailed(f"{len(failed)} of {len(conditions)} conditions are not met: {'; '.join(failed)}")

    def to_dict(self) -> dict[str, Any]:
        """For JSON and for `CardFacts.fidelity`: None stands for what is not known."""
        whole = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        nested = {name: getattr(self, name) for name in ("deviations", "train")}
        found = {name: _plain(value) for name, value in whole.items() if name not in nested}
        return found | {name: value and value.to_dict() for name, value in nested.items()}

    def markdown(self) -> str:
        """Tables for a reader: both sides, the classes, the subgroups; then the notes."""
        parts = [self._headline(), "", *_table(("", *SIDES, "difference"), self._rows())]
        for title, found in (("class", self.classes), ("subgroup", self.subgroups)):
            if found:
                parts += [
                    "",
                    *_table((title, "rows", *(f"{s} (%)" for s in SIDES), "difference", "agreement (%)"), _of(found)),
                ]
        return "\n".join([*parts, "", *(f"* {note}" for note in self.notes)]).strip() + "\n"

    def _headline(self) -> str:
        text = (
            f"`{self.student.name}` beside its teacher `{self.teacher.name}` on {self.examples:,} rows: they agree on "
            f"{100 * self.agreement:.1f} %, KL(teacher ‖ student) is {self.kl_divergence:.4f} nats"
        )
        if self.deviations is not None:
            slope, interval = self.deviations.slope, self.deviations.slope_interval
            text += f", the slope of the logit-logit line {with_interval(slope, interval)}"
        return text + "."

    def _rows(self) -> Iterator[tuple[str, ...]]:
        for name, (words, factor) in MEASURED.items():
            yield (words, *_compared(getattr(self.student, name), getattr(self.teacher, name), factor))
        if self.train is not None:
            both = self.train.student.accuracy, self.train.teacher.accuracy
            yield (f"accuracy on {self.train.examples:,} training rows (%)", *_compared(*both, 100))

    def save(self, folder: str | Path) -> list[Path]:
        """Write report.md, report.json and, with matplotlib, reliability.png and logit_logit.png; returns what was written."""
        import json

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        texts = {"report.md": self.markdown(), "report.json": json.dumps(self.to_dict(), indent=2) + "\n"}
        for name, text in texts.items():
            partial = folder / f"{name}.tmp"
            partial.write_text(text, encoding="utf-8")
            partial.replace(folder / name)
        return [*(folder / name for name in texts), *self.draw(folder)]

    def draw(self, folder: str | Path) -> list[Path]:
        """The figures that there is something for; none where matplotlib is not installed."""
        import importlib.util

        if importlib.util.find_spec("matplotlib") is None:
            return []
        from hfkd.diagnostics import plots

        drawn = []
        if self.student.reliability and self.teacher.reliability:
            sides = {"student": self.student.reliability, "teacher": self.teacher.reliability}
            rows = {name: [dataclasses.astuple(part) for part in bins] for name, bins in sides.items()}
            drawn.append(Path(folder) / "reliability.png")
            plots.reliability_diagram(rows, drawn[-1])
        lines = {"held out": self.deviations, "training rows": self.train.deviations if self.train else None}
        if given := {name: line for name, line in lines.items() if line is not None}:
            drawn.append(Path(folder) / "logit_logit.png")
            plots.logit_logit_grid({f"{self.student.name} and {self.teacher.name}": given}, drawn[-1])
        return drawn


def report(
    student: nn.Module | str | Path,
    teacher: Teacher | nn.Module | str | Path,
    dataset: Any,
    *,
    train_dataset: Any = None,
    label_column: str | None = None,
    group_column: str | None = None,
    processing_class: Any = None,
    teacher_processing_class: Any = None,
    collator: Collator | None = None,
    batch_size: int = 64,
    max_length: int | None = None,
    device: torch.device | str | None = None,
    **settings: Any,
) -> FidelityReport:
    """Ask both about every row, and compare.

    student: a module, a local folder or a Hub id; teacher: one of these, or a Teacher. Modules are moved to `device` (None:
    where the student is), and have their training flags back afterwards.
    dataset: a datasets.Dataset or a list of dicts with texts (`text`, `text_pair`) or pictures (`image`), of which each side
    makes its input with its own tokenizer or image processor; or with inputs that are ready (`input_ids`, `pixels`,
    `pixel_values`, `teacher_...`). Labels stand in `label_column` (None: label or labels), as class ids or names; a row with
    None or a negative number has none. train_dataset: rows the teacher was trained on, for its accuracy there.
    group_column: of a value that names the subgroup of each row.
    processing_class, teacher_processing_class: None: what lies beside the weights. collator: makes batches for both sides,
    instead of all this. max_length: tokens a text is cut at; None: what the tokenizer says.
    settings: of `report_of_logits` (bins, bootstrap, seed, student_temperature, teacher_temperature).

    Raises ValueError for label maps that do not match (student, teacher and data are compared), logits that are not finite
    (rows named), models that are no classifiers of one label a row, and rows that neither side can read.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
    with left_as_found(student, teacher):
        pair = Pair(student, teacher, processing_class, teacher_processing_class, device)
        _refuse_other_problems(pair)
        ask = (collator, batch_size, max_length)
        found = _report_of(pair, _one_split(dataset), ask, label_column, group_column, settings)
        if train_dataset is None:
            return found
        train = _report_of(pair, _one_split(train_dataset), ask, label_column, None, settings)
    return dataclasses.replace(found, train=train)


def _report_of(
    pair: Pair, rows: Any, ask: tuple[Any, ...], label_column: str | None, group_column: str | None, settings: Any
) -> FidelityReport:
    if group_column is not None and group_column not in rows.column_names:
        raise ValueError(f"there is no column {group_column!r} of subgroups, only {', '.join(rows.column_names)}")
    labels = labels_of(rows, pair.student.config, label_column)
    plain = rows.with_format(None)
    ids = plain["example_id"][:] if "example_id" in rows.column_names else None
    student_logits, teacher_logits = pair.logits(rows, *ask)
    return report_of_logits(
        student_logits,
        teacher_logits,
        labels,
        class_names=class_names(pair.student.config),
        groups=None if group_column is None else plain[group_column][:],
        student_ids=ids,
        teacher_ids=ids,
        student=pair.names[0],
        teacher=pair.names[1],
        **settings,
    )


def report_of_logits(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    labels: ArrayLike | None = None,
    *,
    class_names: Sequence[str] | None = None,
    groups: Sequence[Any] | None = None,
    student_ids: Sequence[Any] | None = None,
    teacher_ids: Sequence[Any] | None = None,
    student: str = "student",
    teacher: str = "teacher",
    bins: int = 15,
    bootstrap: int = 1000,
    seed: int = 0,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
) -> FidelityReport:
    """The report of logits `(examples, classes)` of both sides, rows and classes in one order.

    labels: `(examples,)`, a negative number for none. class_names, groups: a name for each class, for each example. ids: of
    the rows, compared where given for both. student, teacher: their names. bins: of confidence. bootstrap, seed and the
    temperatures are those of `logit_logit`; everything else is measured at temperature 1.

    Raises ValueError for different shapes or row orders, logits that are not finite (rows named), probabilities in their
    place, labels that are no ids of the classes, and groups or names of another number.
    """
    ours, theirs = np.asarray(student_logits, dtype=np.float64), np.asarray(teacher_logits, dtype=np.float64)
    _refuse_other_shapes(ours, theirs)
    refuse_other_rows(len(ours), student_ids, teacher_ids)
    for logits, whose, ids in ((ours, "student", student_ids), (theirs, "teacher", teacher_ids)):
        refuse_bad_rows(logits, whose, range(len(logits)) if ids is None else list(ids))
        refuse_probabilities(logits, whose)
    rows, classes = ours.shape
    names = tuple(class_names or map(str, range(classes)))
    expected = np.full(rows, -1) if labels is None else np.asarray(labels)
    _refuse_other_lengths(ours, names, expected, groups)
    known = expected >= 0
    deviations = None
    if not _constant(logit_of_class(theirs, theirs.argmax(1))):
        scored = expected if known.all() else None
        deviations = logit_logit(ours, theirs, scored, student_temperature, teacher_temperature, bootstrap, seed)
    found = FidelityReport(
        student=_side(student, ours, expected, bins),
        teacher=_side(teacher, theirs, expected, bins),
        examples=rows,
        labelled=int(known.sum()),
        class_names=names,
        agreement=metrics.agreement(ours.argmax(1), theirs.argmax(1)),
        kl_divergence=max(0.0, metrics.mean_kl_divergence(ours, theirs)),  # -1e-17 of equal logits is rounding
        classes=tuple(_parts(ours, theirs, expected, expected, range(classes), names)) if known.any() else (),
        subgroups=() if groups is None else tuple(_subgroups(ours, theirs, expected, groups)),
        deviations=deviations,
    )
    return dataclasses.replace(found, notes=tuple(_notes(found)))


# ---- what is measured ----


def _side(name: str, logits: Array, labels: Array, bins: int) -> Side:
    from scipy.special import softmax

    probabilities, known = softmax(logits, axis=1), labels >= 0
    predicted = tuple(np.bincount(logits.argmax(1), minlength=logits.shape[1]).tolist())
    side = Side(name, predicted, float(probabilities.max(1).mean()))
    if not known.any():
        return side
    labels, logits, probabilities = labels[known], logits[known], probabilities[known]
    return dataclasses.replace(
        side,
        accuracy=metrics.accuracy(logits.argmax(1), labels),
        calibration_error=metrics.expected_calibration_error(probabilities, labels, bins),
        brier_score=_brier_score(probabilities, labels),
        negative_log_likelihood=metrics.negative_log_likelihood(logits, labels),
        reliability=tuple(_reliability(probabilities, labels, bins)),
    )


def _brier_score(probabilities: Array, labels: Array) -> float:
    """As the sum of one two-class score a class, which every version of scikit-learn has."""
    from sklearn.metrics import brier_score_loss

    columns = enumerate(np.minimum(probabilities, 1.0).T)
    return float(sum(brier_score_loss((labels == label).astype(int), column, pos_label=1) for label, column in columns))


def _reliability(probabilities: Array, labels: Array, bins: int) -> Iterator[Bin]:
    """The bins that hold examples, of equal width, in the order of their confidence."""
    from sklearn.calibration import calibration_curve

    confidence = np.minimum(probabilities.max(1), 1.0)
    right = (probabilities.argmax(1) == labels).astype(int)
    accuracy, mean = calibration_curve(right, confidence, pos_label=1, n_bins=bins)
    counts = np.bincount(np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], confidence), minlength=bins)
    for place, score, count in zip(mean, accuracy, counts[counts > 0], strict=True):
        yield Bin(float(place), float(score), int(count))


def _parts(
    student: Array, teacher: Array, labels: Array, of_row: Array, values: Iterable[Any], names: Iterable[str]
) -> Iterator[Part]:
    ours, theirs = student.argmax(1), teacher.argmax(1)
    for value, name in zip(values, names, strict=True):
        rows = of_row == value
        scored = rows & (labels >= 0)
        scores = [metrics.accuracy(found[scored], labels[scored]) if scored.any() else None for found in (ours, theirs)]
        same = metrics.agreement(ours[rows], theirs[rows]) if rows.any() else None
        yield Part(str(name), int(rows.sum()), scores[0], scores[1], same)


def _subgroups(student: Array, teacher: Array, labels: Array, groups: Sequence[Any]) -> Iterator[Part]:
    missing = sum(group is None for group in groups)
    if missing:
        raise ValueError(f"{missing} of {len(groups)} rows have no subgroup (None): name the group of every row")
    names = [str(group) for group in groups]
    values = sorted(set(names))
    yield from _parts(student, teacher, labels, np.array(names, dtype=object), values, values)


def _notes(found: FidelityReport) -> Iterator[str]:
    if found.labelled < found.examples:
        what = (
            "Without labels nothing"
            if not found.labelled
            else f"Only {found.labelled:,} of the rows carry a label; the rest"
        )
        rest = (
            "is said about accuracy and calibration."
            if not found.labelled
            else "count for agreement, KL and slope alone."
        )
        yield f"{what} {rest}"
    for which, side in zip(SIDES, (found.student, found.teacher), strict=True):
        never = [name for name, count in zip(found.class_names, side.predicted, strict=True) if not count]
        if never:
            yield f"The {which} never predicts {', '.join(never)}."
    if absent := [part.name for part in found.classes if not part.examples]:
        yield f"No row is labelled {', '.join(absent)}."
    if found.deviations is None:
        yield "The teacher is equally sure of every row, so that no logit-logit line can be drawn."


# ---- what is refused ----


def _one_split(dataset: Any) -> Any:
    from datasets import Dataset

    if isinstance(dataset, dict):
        raise ValueError(f"one split is compared, and there are {', '.join(map(str, dataset))}: pass one of them")
    if isinstance(dataset, list | tuple):
        dataset = Dataset.from_list(list(dataset))
    if not all(hasattr(dataset, name) for name in ("column_names", "select_columns", "__len__")):
        raise ValueError(f"a datasets.Dataset or a list of dicts is needed, not {type(dataset).__name__}")
    if not len(dataset):
        raise ValueError("the data set has no rows to compare on")
    return dataset


def _refuse_other_problems(pair: Pair) -> None:
    for whose, side in (("student", pair.student), ("teacher", pair.teacher)):
        kind = problem_type_of(side.config)
        if kind not in (None, "single_label_classification"):
            raise ValueError(
                f"the {whose}'s problem_type is {kind!r}: the report compares classifiers of one label a row"
            )


def _refuse_other_shapes(student: Array, teacher: Array) -> None:
    if student.shape != teacher.shape or student.ndim != 2 or student.shape[0] == 0 or student.shape[1] < 2:
        raise ValueError(
            f"both sides need logits of one shape (examples, classes), with two classes or more, not {student.shape} of the "
            f"student and {teacher.shape} of the teacher"
        )


def _refuse_other_lengths(logits: Array, names: Sequence[str], labels: Array, groups: Sequence[Any] | None) -> None:
    rows, classes = logits.shape
    if len(names) != classes:
        raise ValueError(f"there are {classes} classes and {len(names)} names of them")
    for what, values in (("labels", labels), ("groups", groups)):
        if values is not None and len(values) != rows:
            raise ValueError(f"there are {rows} rows and {len(values)} {what}")
    if labels.ndim != 1 or labels.dtype.kind not in "biuf":
        raise ValueError(
            f"labels are class ids, one a row and below 0 where there is none, not {labels.dtype} of shape {labels.shape}"
        )
    if labels.max() >= classes:
        raise ValueError(f"labels run up to {labels.max()}, the classes from 0 to {classes - 1}")


# ---- in words ----


def _compared(student: float | None, teacher: float | None, factor: float) -> tuple[str, str, str]:
    digits = 1 if factor == 100 else 4
    values = [None if value is None else factor * value for value in (student, teacher)]
    shown = ["–" if value is None else f"{value:.{digits}f}" for value in values]
    if values[0] is None or values[1] is None:
        return shown[0], shown[1], "–"
    return shown[0], shown[1], f"{values[0] - values[1]:+.{digits}f}"


def _of(parts: Iterable[Part]) -> Iterator[tuple[str, ...]]:
    for part in parts:
        same = "–" if part.agreement is None else f"{100 * part.agreement:.1f}"
        yield (" ".join(part.name.split()).replace("|", "\\|"), f"{part.examples:,}",
               *_compared(part.student, part.teacher, 100), same)  # fmt: skip


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _plain(value: Any) -> Any:
    """Dataclasses as dicts, the difference of a part beside its numbers; nan as None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        found = {item.name: _plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
        return {**found, "difference": value.difference} if isinstance(value, Part) else found
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
