"""Scores and what may be said about them: arrays in, numbers out.

Scores are fractions in [0, 1] (correlations in [-1, 1]), not percentages. Class ids are whole numbers; probabilities and
logits in their place are refused, because they would give a number that looks like a score.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

IGNORED = -100  # transformers' label for "no label here"; hfkd.functional has the same, and costs an import of torch


def accuracy(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Fraction of class ids that agree, both of shape `(examples,)`."""
    found, expected = _class_ids(predictions, labels)
    return float(np.mean(found == expected))


def f1(predictions: ArrayLike, labels: ArrayLike, average: str = "macro") -> float:
    """F1 over class ids of shape `(examples,)`; `average` is "macro", "micro" or "binary".

    Macro-F1 runs over the classes that occur in the predictions or the labels: a class that occurs in neither has no F1
    and does not count; one that is never predicted rightly counts as 0. With one label per example micro-F1 is accuracy.
    Binary F1 (GLUE's MRPC and QQP) is that of class 1 alone and takes ids 0 and 1; it is 0 where class 1 occurs nowhere.
    """
    from sklearn.metrics import f1_score

    if average not in ("macro", "micro", "binary"):
        raise ValueError(f"average must be 'macro', 'micro' or 'binary', not {average!r}")
    found, expected = _class_ids(predictions, labels)
    if average == "binary":
        _refuse_other_than_zero_and_one(found, expected)
    return float(f1_score(expected, found, average=average, zero_division=0.0))


def multilabel_f1(predictions: ArrayLike, labels: ArrayLike, average: str = "micro") -> float:
    """F1 over 0/1 arrays of shape `(examples, labels)`; `average` is "micro" (all decisions pooled) or "macro".

    Macro-F1 is the mean over all columns; one that occurs in neither array counts as 0, as in scikit-learn, so that the
    mean runs over the same labels whatever the model predicts.
    """
    from sklearn.metrics import f1_score

    if average not in ("macro", "micro"):
        raise ValueError(f"average must be 'macro' or 'micro', not {average!r}")
    found, expected = _same_shape(predictions, labels, ("examples", "labels"))
    _refuse_other_than_zero_and_one(found, expected)
    scores = [f1_score(e, f, average="binary", zero_division=0.0) for f, e in zip(found.T, expected.T, strict=True)]
    return float(np.mean(scores)) if average == "macro" else f1(found.ravel(), expected.ravel(), "binary")


def token_accuracy(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Accuracy over the tokens that carry a label. Class ids of shape `(examples, tokens)`; a label of -100 is none."""
    return accuracy(*_labelled_tokens(predictions, labels))


def token_f1(predictions: ArrayLike, labels: ArrayLike, average: str = "macro") -> float:
    """`f1` over the tokens that carry a label, in the shapes of `token_accuracy`.

    Every token counts by itself, the class "O" included: this is not the F1 over whole entities of CoNLL.
    """
    return f1(*_labelled_tokens(predictions, labels), average)


def matthews_correlation(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Matthews' correlation of class ids of shape `(examples,)`, in [-1, 1], for two or more classes (GLUE's CoLA).

    0.0 where either side holds one class only, as a model early in training does: it knows no more than chance.
    """
    from sklearn.metrics import matthews_corrcoef

    found, expected = _class_ids(predictions, labels)
    constant = np.ptp(found) == 0 or np.ptp(expected) == 0
    return 0.0 if constant else float(matthews_corrcoef(expected, found))


def pearson(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Pearson's correlation of numbers of shape `(examples,)`, in [-1, 1] (GLUE's STS-B).

    nan where either side is constant: the correlation is undefined there, 0 would be a claim, and an error would end a
    training run at its first evaluation. The Trainer never takes nan for the best checkpoint.
    """
    from scipy import stats

    found, expected = _numbers(predictions, labels)
    constant = np.ptp(found) == 0 or np.ptp(expected) == 0
    return math.nan if constant else float(stats.pearsonr(found, expected).statistic)


def spearman(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Spearman's rank correlation: `pearson` of the ranks, ties at their mean rank. nan where either side is constant."""
    from scipy import stats

    found, expected = _numbers(predictions, labels)
    return pearson(stats.rankdata(found), stats.rankdata(expected))


# ---- classes and subgroups ----


def per_class_recall(predictions: ArrayLike, labels: ArrayLike, num_labels: int | None = None) -> NDArray[np.float64]:
    """Accuracy on the examples of each class, `(num_labels,)`; nan for a class without an example.

    predictions, labels: class ids from 0, `(examples,)`. num_labels is by default the largest label plus 1: give it where
    the last class may have no example, or two models are compared over different classes.
    """
    found, expected = _class_ids(predictions, labels)
    number = int(expected.max()) + 1 if num_labels is None else num_labels
    if expected.min() < 0 or expected.max() >= number:
        raise ValueError(
            f"labels run from {expected.min()} to {expected.max()}, the classes from 0 to {number - 1}: drop unlabelled "
            "examples first"
        )
    expected = expected.astype(np.int64)
    hits = np.bincount(expected, weights=found == expected, minlength=number)
    counts = np.bincount(expected, minlength=number)
    return np.divide(hits, counts, out=np.full(number, np.nan), where=counts > 0)


def mean_per_class_recall(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Mean of `per_class_recall` over the classes that have examples (balanced accuracy): every class counts alike.

    It is the accuracy where all classes have equally many examples.
    """
    return float(np.nanmean(per_class_recall(predictions, labels)))


def worst_k(recalls: ArrayLike, k: int = 1) -> float:
    """Mean of the k smallest of one model's recalls `(num_labels,)`; nan (a class without an example) is left out.

    Each model is scored on its own worst classes, not on the rarest ones, nor on those of another model.
    """
    known = np.asarray(recalls, dtype=np.float64)
    known = np.sort(known[~np.isnan(known)])
    if not 1 <= k <= known.size:
        raise ValueError(f"k must lie between 1 and the {known.size} classes that have examples, not {k}")
    return float(known[:k].mean())


def worst_class_accuracy(predictions: ArrayLike, labels: ArrayLike, k: int = 1) -> float:
    """`worst_k` of `per_class_recall`. With few examples in a class it is noisy: over seeds, prefer a k of several."""
    return worst_k(per_class_recall(predictions, labels), k)


def subgroup_accuracy(
    predictions: ArrayLike, labels: ArrayLike, groups: Sequence[Any] | NDArray[Any]
) -> dict[Any, float]:
    """Accuracy of each group, by the group's name, in sorted order; all three of shape `(examples,)`.

    A group is any value that sorts: a word, a number, a tuple such as (label, sex). Raises `ValueError` for an example
    without a group (None).
    """
    found, expected = _class_ids(predictions, labels)
    names = list(groups)
    if len(names) != len(expected) or any(name is None for name in names):
        raise ValueError(
            f"{len(expected)} examples need {len(expected)} groups, not {len(names)}, of which "
            f"{sum(name is None for name in names)} are missing: name the group of every example"
        )
    hits: dict[Any, list[bool]] = {}
    for name, hit in zip(names, (found == expected).tolist(), strict=True):
        hits.setdefault(name, []).append(hit)
    return {name: sum(hits[name]) / len(hits[name]) for name in sorted(hits)}


def per_class_difference(
    predictions: ArrayLike, reference_predictions: ArrayLike, labels: ArrayLike, num_labels: int | None = None
) -> NDArray[np.float64]:
    """`per_class_recall` of a model minus that of a reference run, on the same examples; above 0 where the model gains.

    `(num_labels,)`; nan for a class without an example. The reference of distillation is the same student on labels alone.
    """
    model = per_class_recall(predictions, labels, num_labels)
    return model - per_class_recall(reference_predictions, labels, num_labels)


def probability_margins(logits: ArrayLike, labels: ArrayLike) -> NDArray[np.float64]:
    """gamma of each example: p_y minus the mean of the other classes' p, in [-1 / (m - 1), 1] for m classes; `(examples,)`.

    logits: `(examples, num_labels)`, labels: `(examples,)`. Its mean per class is `hfkd.functional.class_reliability`.
    """
    probabilities = np.exp(_log_probabilities(logits))
    expected, classes = _labels_of(probabilities, labels), probabilities.shape[-1]
    _refuse_one_class(classes)
    return (classes * probabilities[np.arange(len(expected)), expected] - 1) / (classes - 1)


def logit_margins(logits: ArrayLike, labels: ArrayLike) -> NDArray[np.float64]:
    """z_y minus the largest other logit, `(examples,)`: above 0 where the prediction is right, unbounded."""
    found = _log_probabilities(logits)  # shifted by a constant per example, which the difference does not see
    expected = _labels_of(found, labels)
    _refuse_one_class(found.shape[-1])
    rows = np.arange(len(expected))
    others = found.copy()
    others[rows, expected] = -np.inf
    return found[rows, expected] - others.max(1)


def _refuse_one_class(classes: int) -> None:
    if classes < 2:
        raise ValueError("a margin is to other classes, and the logits have one column")


# ---- by name ----

_METRICS: dict[str, Callable[[ArrayLike, ArrayLike], float]] = {
    "accuracy": accuracy,
    "micro_f1": lambda predictions, labels: f1(predictions, labels, "micro"),
    "macro_f1": lambda predictions, labels: f1(predictions, labels, "macro"),
    "f1": lambda predictions, labels: f1(predictions, labels, "binary"),
    "matthews_correlation": matthews_correlation,
    "mean_per_class_recall": mean_per_class_recall,
    "worst_class_accuracy": worst_class_accuracy,
    "pearson": pearson,
    "spearmanr": spearman,
}


def score(metric: str, predictions: ArrayLike, labels: ArrayLike) -> float:
    """The metric of that name; `ValueError` lists the known ones."""
    if metric not in _METRICS:
        raise ValueError(f"no metric is called {metric!r}; the known ones are {', '.join(_METRICS)}")
    return _METRICS[metric](predictions, labels)


# ---- student beside teacher ----


def agreement(student_predictions: ArrayLike, teacher_predictions: ArrayLike) -> float:
    """Fraction of examples with the same class id on both sides, right or wrong. Both of shape `(examples,)`.

    Top-1 agreement of Stanton et al. 2021 (arXiv:2106.05945): the fidelity of a student, which accuracy does not show.
    """
    return accuracy(student_predictions, teacher_predictions)


def mean_kl_divergence(student_logits: ArrayLike, teacher_logits: ArrayLike) -> float:
    """Mean over units of KL(teacher || student) in nats, at temperature 1. Both of shape `(..., num_labels)`.

    Predictive KL of Stanton et al. 2021. Computed from log-probabilities; a logit of -inf is a probability of 0, and the
    result inf where the student excludes what the teacher does not.
    """
    student, teacher = _log_probabilities(student_logits), _log_probabilities(teacher_logits)
    if student.shape != teacher.shape:
        raise ValueError(f"student and teacher need logits of one shape, not {student.shape} and {teacher.shape}")
    possible = np.isfinite(teacher)
    gap = np.subtract(teacher, student, out=np.zeros_like(teacher), where=possible)
    return float((np.exp(teacher) * gap).sum(-1).mean())


def negative_log_likelihood(logits: ArrayLike, labels: ArrayLike) -> float:
    """Mean over examples of -log softmax(logits)[label] in nats. Logits `(examples, num_labels)`, labels `(examples,)`."""
    found = _log_probabilities(logits)
    expected = _labels_of(found, labels)
    return float(-found[np.arange(len(expected)), expected].mean())


def expected_calibration_error(probabilities: ArrayLike, labels: ArrayLike, bins: int = 15) -> float:
    """Distance of confidence from accuracy, in [0, 1]: Guo et al. 2017 (arXiv:1706.04599), eq. 3.

    probabilities: `(examples, num_labels)`, rows that sum to 1; labels: `(examples,)`. The confidence is the largest
    probability of a row; bin m of M holds the confidences in ((m - 1) / M, m / M], and the error is the mean over
    examples of |accuracy - mean confidence| of their bin. The number depends on `bins`, and with few examples it is biased
    upwards: compare it at equal bins and equal examples only. A row's ties go to the first class.
    """
    found = _probabilities(probabilities)
    expected = _labels_of(found, labels)
    if bins < 1:
        raise ValueError(f"bins must be at least 1, not {bins}")
    confidence, right = found.max(1), found.argmax(1) == expected
    bin_of = np.digitize(confidence, np.arange(1, bins) / bins, right=True)
    surplus = np.bincount(bin_of, weights=right - confidence)  # (accuracy - confidence) times the examples of the bin
    return float(np.abs(surplus).sum() / len(expected))


def gap_closed(baseline: float, distilled: float, teacher: float) -> float:
    """(distilled - baseline) / (teacher - baseline): the share of the gap to the teacher that distillation closes.

    Three scores of which more is better, `baseline` being the same student trained without a teacher. Below 0 where
    distillation hurts, above 1 where the student passes its teacher. nan where the teacher is not above the baseline:
    there is no gap, and a negative one would turn a loss into a gain. Over a small gap the share is mostly noise.
    """
    return (distilled - baseline) / (teacher - baseline) if teacher > baseline else math.nan


# ---- over seeds ----


def mean_and_std(values: Sequence[float] | NDArray[Any]) -> tuple[float, float, int]:
    """Mean, standard deviation over seeds (n - 1 in the denominator) and n.

    One value has no spread to estimate: its 0.0 means "unknown", so print n beside it.
    """
    numbers = np.asarray(values, dtype=np.float64).ravel()
    if numbers.size == 0:
        raise ValueError("no values: a mean over zero seeds says nothing")
    spread = float(numbers.std(ddof=1)) if numbers.size > 1 else 0.0
    return float(numbers.mean()), spread, int(numbers.size)


def paired_difference(
    a: Sequence[float] | NDArray[Any], b: Sequence[float] | NDArray[Any], confidence: float = 0.95
) -> tuple[float, float, float]:
    """Mean of `a - b` over pairs (the same seed on both sides) and Student's t interval around it: mean, low, high.

    The interval assumes roughly normal differences; with five seeds read it as a size of uncertainty, not as a proof.
    """
    from scipy import stats

    first, second = np.asarray(a, dtype=np.float64).ravel(), np.asarray(b, dtype=np.float64).ravel()
    if first.size != second.size:
        raise ValueError(
            f"pairs need equal lengths, not {first.size} and {second.size}: use the same seeds on both sides"
        )
    if first.size < 2:
        raise ValueError(f"an interval needs at least 2 pairs, not {first.size}: run more seeds")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence is a fraction between 0 and 1, not {confidence}")
    mean, spread, pairs = mean_and_std(first - second)
    half = float(stats.t.ppf(0.5 + confidence / 2.0, pairs - 1)) * spread / math.sqrt(pairs)
    return mean, mean - half, mean + half


# ---- what is refused ----


def _same_shape(
    predictions: ArrayLike, labels: ArrayLike, axes: tuple[str, ...] = ("examples",)
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Both as arrays of one shape. Logits against labels would broadcast into a number that looks like a score."""
    found, expected = np.asarray(predictions), np.asarray(labels)
    if found.ndim != len(axes) or found.shape != expected.shape:
        raise ValueError(
            f"predictions and labels must both have shape ({', '.join(axes)}{',' * (len(axes) == 1)}), not {found.shape} and "
            f"{expected.shape}; for logits take argmax over the last dimension first"
        )
    if found.size == 0:
        raise ValueError("no examples to score")
    return found, expected


def _class_ids(predictions: ArrayLike, labels: ArrayLike) -> tuple[NDArray[Any], NDArray[Any]]:
    found, expected = _same_shape(predictions, labels)
    return _whole(found, "predictions"), _whole(expected, "labels")


def _whole(ids: NDArray[Any], what: str) -> NDArray[Any]:
    if np.issubdtype(ids.dtype, np.floating):
        odd = ids[ids != np.floor(ids)]  # nan as well
        if odd.size:
            raise ValueError(f"{what} must be class ids, not {odd[0]}: take argmax or a threshold first")
    return ids


def _labelled_tokens(predictions: ArrayLike, labels: ArrayLike) -> tuple[NDArray[Any], NDArray[Any]]:
    found, expected = _same_shape(predictions, labels, ("examples", "tokens"))
    labelled = expected != IGNORED
    return found[labelled], expected[labelled]


def _refuse_other_than_zero_and_one(*arrays: NDArray[Any]) -> None:
    for ids in arrays:
        odd = ids[(ids != 0) & (ids != 1)]
        if odd.size:
            raise ValueError(f"this F1 takes 0 and 1 only, not {odd[0]}: for more classes use macro_f1 or micro_f1")


def _numbers(predictions: ArrayLike, labels: ArrayLike) -> tuple[NDArray[Any], NDArray[Any]]:
    found, expected = (array.astype(np.float64) for array in _same_shape(predictions, labels))
    if found.size < 2:
        raise ValueError("a correlation needs at least 2 examples, not 1")
    if not (np.isfinite(found).all() and np.isfinite(expected).all()):
        raise ValueError("a correlation needs finite numbers: the predictions or labels hold nan or inf")
    return found, expected


def _log_probabilities(logits: ArrayLike) -> NDArray[Any]:
    from scipy.special import log_softmax

    found = np.asarray(logits, dtype=np.float64)
    if found.ndim < 2 or found.size == 0:
        raise ValueError(f"logits must have shape (..., num_labels) with at least one unit, not {found.shape}")
    if np.isnan(found).any():
        raise ValueError("the logits hold nan: the model has diverged")
    return log_softmax(found, axis=-1)


def _probabilities(probabilities: ArrayLike) -> NDArray[Any]:
    found = np.asarray(probabilities, dtype=np.float64)
    if found.ndim != 2 or found.size == 0:
        raise ValueError(f"probabilities must have shape (examples, num_labels), not {found.shape}")
    sums = found.sum(1)
    if not (np.all(found >= 0) and np.all(np.abs(sums - 1) < 0.01)):  # 0.01: what a softmax in bfloat16 is off by
        raise ValueError(
            f"rows of probabilities must be at least 0 and sum to 1, not from {found.min():.3g} and to {sums.min():.3g} up to "
            f"{sums.max():.3g}: for logits take softmax first"
        )
    return found


def _labels_of(scores: NDArray[Any], labels: ArrayLike) -> NDArray[Any]:
    """Labels `(examples,)` that index the columns of `scores`, `(examples, num_labels)`; -1 would index the last."""
    expected = _whole(np.asarray(labels), "labels")
    if scores.ndim != 2 or expected.shape != scores.shape[:1]:
        raise ValueError(
            f"scores (examples, num_labels) need labels (examples,), not {scores.shape} and {expected.shape}"
        )
    if expected.min() < 0 or expected.max() >= scores.shape[1]:
        raise ValueError(
            f"labels run from {expected.min()} to {expected.max()}, the classes from 0 to {scores.shape[1] - 1}: drop "
            "unlabelled examples first"
        )
    return expected.astype(np.int64)
