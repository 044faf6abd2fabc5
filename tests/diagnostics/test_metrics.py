"""Scores against plain loops, intervals against scipy."""

import math

import numpy as np
import pytest
from scipy import stats

from hfkd.diagnostics.metrics import accuracy, f1, mean_and_std, paired_difference, score

generator = np.random.default_rng(0)
LABELS = generator.integers(0, 4, 60)
PREDICTIONS = np.where(generator.random(60) < 0.7, LABELS, generator.integers(0, 6, 60))


def loop_f1(predictions, labels, average):
    """Counts by hand, over the classes that occur on either side."""
    classes = sorted(set(map(int, predictions)) | set(map(int, labels)))
    counts = {kind: [0, 0, 0] for kind in classes}
    for found, expected in zip(map(int, predictions), map(int, labels), strict=True):
        if found == expected:
            counts[found][0] += 1
        else:
            counts[found][1] += 1
            counts[expected][2] += 1

    def ratio(hits, wrong, missed):
        return 2 * hits / (2 * hits + wrong + missed)

    if average == "micro":
        return ratio(*(sum(column) for column in zip(*counts.values(), strict=True)))
    return sum(ratio(*count) for count in counts.values()) / len(counts)


def test_accuracy_counts_agreements():
    """A score against shifted or broadcast labels still looks like a score."""
    hits = sum(int(a) == int(b) for a, b in zip(PREDICTIONS, LABELS, strict=True))
    assert accuracy(PREDICTIONS, LABELS) == pytest.approx(hits / 60, abs=1e-15)


@pytest.mark.parametrize("average", ["macro", "micro"])
def test_f1_equals_a_loop(average):
    """Macro where micro was meant moves an imbalanced task by tens of points."""
    assert f1(PREDICTIONS, LABELS, average) == pytest.approx(loop_f1(PREDICTIONS, LABELS, average), abs=1e-12)


def test_a_class_that_is_never_hit_counts_as_zero():
    """Leaving it out would reward a model that gives up on a rare class."""
    assert f1([0, 0, 0, 0], [0, 0, 0, 1]) == pytest.approx((6 / 7 + 0) / 2)


def test_score_dispatches_by_name_and_lists_the_known_names():
    """A metric that silently falls back to accuracy fills a table with the wrong numbers."""
    assert score("accuracy", PREDICTIONS, LABELS) == accuracy(PREDICTIONS, LABELS)
    assert score("micro_f1", PREDICTIONS, LABELS) == f1(PREDICTIONS, LABELS, "micro")
    assert score("macro_f1", PREDICTIONS, LABELS) == f1(PREDICTIONS, LABELS, "macro")
    with pytest.raises(ValueError, match="accuracy, micro_f1, macro_f1"):
        score("f1", PREDICTIONS, LABELS)


@pytest.mark.parametrize("bad", [np.zeros((60, 4)), np.zeros(59), np.zeros((60, 1))])
def test_logits_and_wrong_lengths_are_refused(bad):
    """`(n, 1) == (n,)` broadcasts to n x n agreements: a number near chance that nobody questions."""
    for metric in ("accuracy", "micro_f1", "macro_f1"):
        with pytest.raises(ValueError, match="shape"):
            score(metric, bad, LABELS)


def test_mean_and_std_is_the_sample_deviation():
    """Dividing by n instead of n - 1 makes five seeds look 11 % steadier than they are."""
    values = [0.8, 0.82, 0.79, 0.85]
    mean = sum(values) / 4
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / 3)
    assert mean_and_std(values) == pytest.approx((mean, deviation, 4))
    assert mean_and_std([0.5]) == (0.5, 0.0, 1)
    with pytest.raises(ValueError, match="no values"):
        mean_and_std([])


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_paired_difference_is_students_interval(confidence):
    """A normal quantile at five seeds declares wins that a t quantile does not."""
    a, b = generator.normal(0.83, 0.02, 5), generator.normal(0.81, 0.02, 5)
    expected = stats.ttest_rel(a, b).confidence_interval(confidence)
    assert paired_difference(a, b, confidence) == pytest.approx(((a - b).mean(), expected.low, expected.high))


def test_paired_difference_refuses_what_is_not_paired():
    """Truncating to the shorter list would pair seeds that never belonged together."""
    with pytest.raises(ValueError, match="3 and 2"):
        paired_difference([1.0, 2.0, 3.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="at least 2"):
        paired_difference([1.0], [2.0])
    with pytest.raises(ValueError, match="fraction"):
        paired_difference([1.0, 2.0], [2.0, 1.0], confidence=95)
