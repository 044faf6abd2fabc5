"""Scores and what may be said about them: arrays in, numbers out. Scores are fractions in [0, 1], not percentages."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


def accuracy(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Fraction of class ids that agree, both of shape `(examples,)`."""
    found, expected = _class_ids(predictions, labels)
    return float(np.mean(found == expected))


def f1(predictions: ArrayLike, labels: ArrayLike, average: str = "macro") -> float:
    """F1 over class ids of shape `(examples,)`; `average` is "macro" or "micro".

    Macro-F1 runs over the classes that occur in the predictions or the labels: a class that occurs in neither has no F1
    and does not count; one that is never predicted rightly counts as 0. With one label per example micro-F1 is accuracy.
    """
    from sklearn.metrics import f1_score

    if average not in ("macro", "micro"):
        raise ValueError(f"average must be 'macro' or 'micro', not {average!r}")
    found, expected = _class_ids(predictions, labels)
    return float(f1_score(expected, found, average=average, zero_division=0.0))


_METRICS: dict[str, Callable[[ArrayLike, ArrayLike], float]] = {
    "accuracy": accuracy,
    "micro_f1": lambda predictions, labels: f1(predictions, labels, "micro"),
    "macro_f1": lambda predictions, labels: f1(predictions, labels, "macro"),
}


def score(metric: str, predictions: ArrayLike, labels: ArrayLike) -> float:
    """The metric of that name; `ValueError` lists the known ones."""
    if metric not in _METRICS:
        raise ValueError(f"no metric is called {metric!r}; the known ones are {', '.join(_METRICS)}")
    return _METRICS[metric](predictions, labels)


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


def _class_ids(predictions: ArrayLike, labels: ArrayLike) -> tuple[NDArray[Any], NDArray[Any]]:
    """Both as arrays of one shape. Logits against labels would broadcast into a number that looks like a score."""
    found, expected = np.asarray(predictions), np.asarray(labels)
    if found.ndim != 1 or found.shape != expected.shape:
        raise ValueError(
            f"predictions and labels must both have shape (examples,), not {found.shape} and {expected.shape}; "
            "for logits take argmax over the last dimension first"
        )
    if found.size == 0:
        raise ValueError("no examples to score")
    return found, expected
