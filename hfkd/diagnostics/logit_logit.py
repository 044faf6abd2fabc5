"""Where a student deviates from its teacher: logit-logit plots and their slopes (arXiv 2301.12923, "Does it pay to disobey?").

For every example let k be the *teacher's* most probable class (not the label). With phi(p) = log(p / (1 - p)),

    X = phi(teacher's probability of k)        Y = phi(student's probability of the same k).

Perfect imitation is the line Y = X. The slope of the least-squares line Y ~ intercept + slope * X sums the deviation up: above 1
the student exaggerates the teacher's confidence, by underfitting where the teacher is unsure (Y < X where X is small),
overfitting where it is sure (Y > X where X is large), or both. The paper itself calls the slope an imperfect summary that can
miss what the plot shows, in language most of all: look at the bins and at `plots.logit_logit_grid` as well.

Known from the paper: X, Y, k, the line and its reading. Reconstructions, not verified: the bins and their criterion of under-
and overfitting, the intervals, the subsets, and at which temperature the paper plots. Where a loss divides only the teacher's
logits, plot what it matches: teacher_temperature that of the loss, student_temperature 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hfkd.diagnostics.metrics import _labels_of

Array = NDArray[np.float64]
Interval = tuple[float, float]
UNKNOWN = (math.nan, math.nan)
MOST_NAMED = 5  # rows in an error; one diverged model can fill a screen


@dataclass(frozen=True)
class Line:
    """Least-squares line of Y on X over some examples. Intervals are 95 % percentile bootstraps over examples.

    nan where two different X are needed and not there. The intervals know nothing of other seeds: training anew moves a
    slope by more than they say. mean_difference: of Y - X; share_below: fraction of Y < X.
    """

    count: int
    slope: float
    intercept: float
    slope_interval: Interval
    intercept_interval: Interval
    mean_difference: float
    share_below: float


@dataclass(frozen=True)
class Bin:
    """The examples whose X lies between two quantiles: how many, mean X, mean of Y - X, fraction of Y < X."""

    low: float
    high: float
    count: int
    mean_x: float
    mean_difference: float
    share_below: float


@dataclass(frozen=True)
class LogitLogit:
    """X and Y, both `(examples,)`, the teacher's classes, the line over all of them, the bins from small to large X, and
    the lines where the teacher is "right" and "wrong" (none without labels)."""

    x: Array
    y: Array
    classes: NDArray[np.int64]
    line: Line
    bins: tuple[Bin, ...]
    subsets: dict[str, Line]
    student_temperature: float = 1.0
    teacher_temperature: float = 1.0

    @property
    def slope(self) -> float:
        return self.line.slope

    @property
    def intercept(self) -> float:
        return self.line.intercept

    @property
    def slope_interval(self) -> Interval:
        return self.line.slope_interval

    @property
    def intercept_interval(self) -> Interval:
        return self.line.intercept_interval

    @property
    def underfits_low_confidence(self) -> bool:
        """Mean Y - X below 0 in the bin of the smallest X (our criterion: the paper's is not known)."""
        return self.bins[0].mean_difference < 0

    @property
    def overfits_high_confidence(self) -> bool:
        """Mean Y - X above 0 in the bin of the largest X (our criterion: the paper's is not known)."""
        return self.bins[-1].mean_difference > 0

    def to_dict(self) -> dict[str, Any]:
        """The numbers without X and Y, for JSON: None stands for what is not known (nan)."""
        return _for_json(
            {
                **asdict(self.line),
                "underfits_low_confidence": self.underfits_low_confidence,
                "overfits_high_confidence": self.overfits_high_confidence,
                "student_temperature": self.student_temperature,
                "teacher_temperature": self.teacher_temperature,
                "bins": [asdict(part) for part in self.bins],
                "subsets": {name: asdict(line) for name, line in self.subsets.items()},
            }
        )

    def markdown(self) -> str:
        """Two tables: the lines of all examples and of the subsets, and the bins."""
        head = ["examples", "count", "slope [95 %]", "intercept [95 %]", "mean Y - X", "share of Y < X"]
        lines = {"all": self.line, **{f"teacher {name}": line for name, line in self.subsets.items()}}
        rows = [[name, f"{line.count:,}", *_cells(line)] for name, line in lines.items()]
        bins = [[f"{b.low:.2f} to {b.high:.2f}", f"{b.count:,}", *_shares(b)] for b in self.bins]
        return _table(head, rows) + "\n\n" + _table(["X (teacher)", "count", *head[-2:]], bins)


def logit_logit(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    labels: ArrayLike | None = None,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    bootstrap: int = 1000,
    seed: int = 0,
    student_ids: Sequence[Any] | NDArray[Any] | None = None,
    teacher_ids: Sequence[Any] | NDArray[Any] | None = None,
    bins: int = 10,
) -> LogitLogit:
    """X, Y, their line and bins. Logits `(examples, classes)`, labels and ids `(examples,)`; both sides in one row order.

    Every logit is divided by its side's temperature. bootstrap: resamples of the examples (0: intervals of nan). ids: of
    the rows, given for both sides, are compared. bins: X-quantiles; equal X share a bin, so that there may be fewer. Where
    the teacher's largest logits tie, k is the first.

    Raises ValueError for other shapes, one class, rows in another order, probabilities in place of logits, logits that are not
    finite (rows named; -inf is a probability of exactly 0), labels outside the classes, and an X that is the same for all
    examples: no line goes through it.
    """
    student, teacher = _logits(student_logits, "student"), _logits(teacher_logits, "teacher")
    if student.shape != teacher.shape:
        raise ValueError(f"student and teacher need logits of one shape, not {student.shape} and {teacher.shape}")
    _refuse_other_rows(len(student), student_ids, teacher_ids)
    for name, value in (("student_temperature", student_temperature), ("teacher_temperature", teacher_temperature)):
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be a finite number above 0, not {value}")
    if bootstrap < 0 or bins < 1:
        raise ValueError(f"bootstrap must be 0 or more and bins 1 or more, not {bootstrap} and {bins}")
    classes = teacher.argmax(1)
    x, y = _phi(teacher / teacher_temperature, classes), _phi(student / student_temperature, classes)
    if _constant(x):
        raise ValueError(f"the teacher's X is {x[0]:.4g} for all {len(x)} examples: a line needs two different ones")
    subsets = {}
    if labels is not None:
        right = classes == _labels_of(teacher, labels)
        subsets = {name: fit(x[rows], y[rows], bootstrap, seed) for name, rows in (("right", right), ("wrong", ~right))}
    line = fit(x, y, bootstrap, seed)
    return LogitLogit(
        x, y, classes, line, _bins(x, y, bins), subsets, float(student_temperature), float(teacher_temperature)
    )


def logit_of_class(logits: ArrayLike, classes: ArrayLike) -> Array:
    """phi of the probability of one class per example, `(examples,)`; logits `(examples, classes)`, classes `(examples,)`.

    log(p / (1 - p)) = z_k - log sum over the others of exp(z): exact also where p rounds to 1, and nothing is clipped.
    """
    found = _logits(logits, "model")
    return _phi(found, _labels_of(found, classes))


def _phi(logits: Array, classes: NDArray[np.int64]) -> Array:
    from scipy.special import logsumexp

    rows = np.arange(len(logits))
    others = logits.copy()
    others[rows, classes] = -np.inf
    difference: Array = logits[rows, classes] - logsumexp(others, axis=1)
    return difference


def fit(x: Array, y: Array, bootstrap: int = 1000, seed: int = 0) -> Line:
    """The line of y on x, both `(examples,)`, with intervals from `bootstrap` resamples of the pairs."""
    slope, intercept = _least_squares(x, y)
    drawn = np.full((2, max(bootstrap, 1)), np.nan)
    generator = np.random.default_rng(seed)
    if not math.isnan(slope):
        for turn in range(bootstrap):
            rows = generator.integers(0, len(x), len(x))
            drawn[:, turn] = _least_squares(x[rows], y[rows])
    gap = y - x
    means = (float(gap.mean()), float((gap < 0).mean())) if len(x) else UNKNOWN
    return Line(len(x), slope, intercept, _interval(drawn[0]), _interval(drawn[1]), *means)


def _least_squares(x: Array, y: Array) -> Interval:
    if _constant(x):
        return UNKNOWN
    mean_x, mean_y = x.mean(), y.mean()
    centred = x - mean_x
    slope = float(centred @ (y - mean_y) / (centred @ centred))
    return slope, float(mean_y - slope * mean_x)


def _constant(x: Array) -> bool:
    """Rounding apart: sums of the same logits in another order differ in their last digits."""
    return len(x) < 2 or bool(np.ptp(x) <= 1e-12 * max(1.0, float(np.abs(x).max())))


def _interval(values: Array) -> Interval:
    """nan where most resamples have no line, too."""
    known = values[~np.isnan(values)]
    if 2 * len(known) < len(values) or not len(known):
        return UNKNOWN
    low, high = np.percentile(known, [2.5, 97.5])
    return float(low), float(high)


def _bins(x: Array, y: Array, count: int) -> tuple[Bin, ...]:
    edges = np.quantile(x, np.linspace(0, 1, count + 1))
    of_example = np.digitize(x, edges[1:-1], right=True)
    members = [np.flatnonzero(of_example == number) for number in np.unique(of_example)]
    return tuple(
        Bin(float(x[rows].min()), float(x[rows].max()), len(rows), *map(float, _means(x[rows], y[rows])))
        for rows in members
    )


def _means(x: Array, y: Array) -> tuple[Any, Any, Any]:
    return x.mean(), (y - x).mean(), (y < x).mean()


# ---- what is refused ----


def _logits(logits: ArrayLike, whose: str) -> Array:
    found = np.asarray(logits, dtype=np.float64)
    if found.ndim != 2 or len(found) == 0:
        raise ValueError(f"the {whose}'s logits must have shape (examples, classes), not {found.shape}")
    if found.shape[1] < 2:
        raise ValueError(
            f"the {whose}'s logits have one class: phi compares a class with the others; write a single score z of a binary "
            "classifier as the columns 0 and z"
        )
    _refuse_not_finite(found, whose)
    _refuse_probabilities(found, whose)
    return found


def _refuse_probabilities(logits: Array, whose: str) -> None:
    if bool((logits >= 0).all()) and bool((np.abs(logits.sum(1) - 1) < 1e-3).all()):
        raise ValueError(
            f"the {whose}'s rows are at least 0 and sum to 1: these are probabilities, and logits are needed; their logarithms "
            "will do where none is exactly 0"
        )


def _refuse_not_finite(logits: Array, whose: str) -> None:
    rows = np.flatnonzero(~np.isfinite(logits).all(1))
    if not len(rows):
        return
    named = ", ".join(map(str, rows[:MOST_NAMED])) + (", ..." if len(rows) > MOST_NAMED else "")
    odd = logits[rows[0]][~np.isfinite(logits[rows[0]])][0]
    reason = "the model has diverged" if np.isnan(odd) else "a probability is exactly 0 or 1, whose phi is infinite"
    raise ValueError(
        f"the {whose}'s logits are not finite in {len(rows)} of {len(logits)} rows ({named}), row {rows[0]} holds {odd}: "
        f"{reason}; give the logits themselves, before softmax, or leave these rows out on both sides"
    )


def _refuse_other_rows(count: int, student_ids: Any, teacher_ids: Any) -> None:
    if student_ids is None and teacher_ids is None:
        return
    if student_ids is None or teacher_ids is None:
        raise ValueError("ids of one side only compare nothing: give both student_ids and teacher_ids")
    student, teacher = list(np.asarray(student_ids).tolist()), list(np.asarray(teacher_ids).tolist())
    if (len(student), len(teacher)) != (count, count):
        raise ValueError(f"{count} rows need {count} ids a side, not {len(student)} and {len(teacher)}")
    odd = next((row for row in range(count) if student[row] != teacher[row]), None)
    if odd is not None:
        same = sorted(student, key=repr) == sorted(teacher, key=repr)
        raise ValueError(
            f"row {odd} is example {student[odd]} of the student and example {teacher[odd]} of the teacher: "
            + ("both hold the same examples in another order, sort them by id" if same else "the examples differ")
        )


# ---- in words ----


def _for_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _for_json(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_for_json(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cells(line: Line) -> list[str]:
    return [
        with_interval(line.slope, line.slope_interval),
        with_interval(line.intercept, line.intercept_interval),
        *_shares(line),
    ]


def _shares(part: Line | Bin) -> list[str]:
    return [f"{part.mean_difference:+.2f}", f"{100 * part.share_below:.0f} %"] if part.count else ["–", "–"]


def with_interval(value: float, interval: Interval) -> str:
    """1.23 [1.20, 1.26], or a dash for what is not known."""
    if math.isnan(value):
        return "–"
    return f"{value:.2f}" if math.isnan(interval[0]) else f"{value:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
