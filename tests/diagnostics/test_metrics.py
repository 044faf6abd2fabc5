"""Scores against plain loops, scikit-learn and torch; intervals against scipy."""

import math
import warnings

import numpy as np
import pytest
import sklearn.metrics
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import hfkd.functional
from hfkd.diagnostics.metrics import (
    IGNORED,
    accuracy,
    agreement,
    expected_calibration_error,
    f1,
    gap_closed,
    logit_margins,
    matthews_correlation,
    mean_and_std,
    mean_kl_divergence,
    mean_per_class_recall,
    multilabel_f1,
    negative_log_likelihood,
    paired_difference,
    pearson,
    per_class_difference,
    per_class_recall,
    probability_margins,
    score,
    spearman,
    subgroup_accuracy,
    token_accuracy,
    token_f1,
    worst_class_accuracy,
    worst_k,
)

generator = np.random.default_rng(0)
LABELS = generator.integers(0, 4, 60)
PREDICTIONS = np.where(generator.random(60) < 0.7, LABELS, generator.integers(0, 6, 60))
TARGETS = np.round(generator.uniform(0, 5, 60), 1)  # with ties, as in STS-B
VALUES = np.exp(TARGETS / 2) + generator.normal(0, 1, 60)
TAGS = generator.integers(0, 2, (40, 5))
FOUND_TAGS = np.where(generator.random((40, 5)) < 0.7, TAGS, 1 - TAGS)


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
    assert score("matthews_correlation", PREDICTIONS, LABELS) == matthews_correlation(PREDICTIONS, LABELS)
    assert score("f1", PREDICTIONS == 1, LABELS == 1) == f1(PREDICTIONS == 1, LABELS == 1, "binary")
    assert score("mean_per_class_recall", PREDICTIONS, LABELS) == mean_per_class_recall(PREDICTIONS, LABELS)
    assert score("worst_class_accuracy", PREDICTIONS, LABELS) == worst_class_accuracy(PREDICTIONS, LABELS)
    assert score("pearson", VALUES, TARGETS) == pearson(VALUES, TARGETS)
    assert score("spearmanr", VALUES, TARGETS) == spearman(VALUES, TARGETS)
    known = (
        "accuracy, micro_f1, macro_f1, f1, matthews_correlation, mean_per_class_recall, worst_class_accuracy, pearson"
    )
    with pytest.raises(ValueError, match=known):
        score("spearman", VALUES, TARGETS)


@pytest.mark.parametrize("bad", [np.zeros((60, 4)), np.zeros(59), np.zeros((60, 1))])
def test_logits_and_wrong_lengths_are_refused(bad):
    """`(n, 1) == (n,)` broadcasts to n x n agreements: a number near chance that nobody questions."""
    for metric in ("accuracy", "micro_f1", "macro_f1", "f1", "matthews_correlation", "pearson", "spearmanr"):
        with pytest.raises(ValueError, match="shape"):
            score(metric, bad, LABELS)


@pytest.mark.parametrize("metric", [accuracy, f1, matthews_correlation, agreement])
@pytest.mark.parametrize("bad", [0.9, math.nan])
def test_probabilities_are_not_class_ids(metric, bad):
    """0.9 == 1 is False: an accuracy of sigmoid outputs is 0 for the best of models."""
    with pytest.raises(ValueError, match="argmax or a threshold"):
        metric([1.0, bad], [1, 1])


# ---- F1 of class 1, of label sets, of tokens ----


def test_binary_f1_is_that_of_class_one():
    """MRPC's number is the F1 of the paraphrases; the mean over both classes lies several points lower."""
    found, expected = [1, 1, 0, 1, 0, 0], [1, 0, 0, 1, 1, 0]
    assert f1(found, expected, "binary") == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert f1([0, 0, 0], [0, 1, 1], "binary") == 0.0
    assert f1([0, 0], [0, 0], "binary") == 0.0
    with pytest.raises(ValueError, match="0 and 1 only, not 2"):
        f1([0, 1, 2], [0, 1, 1], "binary")
    with pytest.raises(ValueError, match="not 'weighted'"):
        f1(found, expected, "weighted")


@pytest.mark.parametrize("average", ["micro", "macro"])
@pytest.mark.parametrize("kind", [int, float, bool])
def test_multilabel_f1_equals_scikit_learn(average, kind):
    """Float labels are what BCE needs: a score that reads them otherwise than ints would change with the collator."""
    expected = sklearn.metrics.f1_score(TAGS, FOUND_TAGS, average=average)
    assert multilabel_f1(FOUND_TAGS.astype(bool), TAGS.astype(kind), average) == pytest.approx(expected, abs=1e-12)


def test_a_label_that_never_occurs_counts_as_zero_in_every_run():
    """If it counted only once it is predicted, two models would be averaged over different labels."""
    found, expected = np.array([[1, 0], [1, 0]]), np.array([[1, 0], [1, 0]])
    assert multilabel_f1(found, expected, "macro") == 0.5
    assert multilabel_f1(found, expected, "micro") == 1.0


def test_multilabel_f1_refuses_logits_and_single_labels():
    """A column of class ids taken for tags scores class 1 only."""
    with pytest.raises(ValueError, match="0 and 1 only"):
        multilabel_f1(FOUND_TAGS - 0.5, TAGS)
    with pytest.raises(ValueError, match="examples, labels"):
        multilabel_f1(PREDICTIONS, LABELS)
    with pytest.raises(ValueError, match="not 'binary'"):
        multilabel_f1(FOUND_TAGS, TAGS, "binary")


@given(st.integers(0, 2**32 - 1))
def test_unlabelled_tokens_do_not_count(seed):
    """Word pieces and padding carry -100: counted as wrong, they hide half of a tagger's accuracy."""
    draw = np.random.default_rng(seed)
    labels, found = draw.integers(0, 3, (4, 7)), draw.integers(0, 3, (4, 7))
    labels[draw.random((4, 7)) < 0.5] = -100
    labels[0, 0] = 1
    pairs = [(int(f), int(e)) for f, e in zip(found.flat, labels.flat, strict=True) if e != -100]
    ids, references = zip(*pairs, strict=True)
    assert token_accuracy(found, labels) == pytest.approx(sum(f == e for f, e in pairs) / len(pairs))
    for average in ("micro", "macro"):
        assert token_f1(found, labels, average) == pytest.approx(loop_f1(ids, references, average))


def test_tokens_without_any_label_are_no_score():
    """The mean of nothing is nan, which a table prints as a result."""
    with pytest.raises(ValueError, match="no examples"):
        token_accuracy([[0, 1]], [[-100, -100]])
    assert hfkd.functional.IGNORED == IGNORED


# ---- correlations ----


def test_matthews_correlation_is_the_phi_coefficient():
    """CoLA is three quarters one class: accuracy in its place reads 70 points too high."""
    found, expected = PREDICTIONS % 2, LABELS % 2
    assert matthews_correlation(found, expected) == pytest.approx(np.corrcoef(found, expected)[0, 1], abs=1e-12)
    assert matthews_correlation(1 - expected, expected) == pytest.approx(-1.0)


def test_matthews_correlation_of_one_class_is_zero():
    """Early in GLUE a model predicts one class: nan or an error would end the run at its first evaluation."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert matthews_correlation([1, 1, 1, 1], [0, 1, 1, 0]) == 0.0
        assert matthews_correlation([1, 1], [1, 1]) == 0.0


def test_correlations_equal_scipy():
    """Pearson where Spearman was meant rewards a linear scale, and STS-B reports both."""
    assert pearson(VALUES, TARGETS) == pytest.approx(np.corrcoef(VALUES, TARGETS)[0, 1], abs=1e-12)
    assert spearman(VALUES, TARGETS) == pytest.approx(stats.spearmanr(VALUES, TARGETS).statistic, abs=1e-12)
    assert spearman([1, 2, 3], [1, 10, 100]) == pytest.approx(1.0) != pytest.approx(pearson([1, 2, 3], [1, 10, 100]))


@pytest.mark.parametrize("correlation", [pearson, spearman])
def test_a_constant_has_no_correlation(correlation):
    """0 would be a claim about the model, an error the end of the run; nan is neither, and never the best checkpoint."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert math.isnan(correlation([2.5, 2.5, 2.5], [1.0, 2.0, 3.0]))
        assert math.isnan(correlation([1.0, 2.0, 3.0], [0, 0, 0]))
    with pytest.raises(ValueError, match="finite"):
        correlation([1.0, math.nan, 3.0], [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="at least 2"):
        correlation([1.0], [1.0])


# ---- classes and subgroups ----


def test_recalls_are_those_of_scikit_learn():
    """Precision in the place of recall blames the wrong class: the one that others are taken for."""
    expected = sklearn.metrics.recall_score(LABELS, PREDICTIONS, labels=range(4), average=None)
    assert per_class_recall(PREDICTIONS, LABELS).tolist() == pytest.approx(expected.tolist(), abs=1e-15)
    balanced = sklearn.metrics.balanced_accuracy_score(LABELS, np.minimum(PREDICTIONS, 4) % 4)
    assert mean_per_class_recall(np.minimum(PREDICTIONS, 4) % 4, LABELS) == pytest.approx(balanced, abs=1e-12)


def test_a_class_without_examples_has_no_recall_and_does_not_count():
    """A 0 for it makes every model's worst class a class that was never tested."""
    found = per_class_recall([0, 1, 3], [0, 0, 3], num_labels=6)
    np.testing.assert_array_equal(found, [0.5, np.nan, np.nan, 1.0, np.nan, np.nan])
    assert mean_per_class_recall([0, 1, 3], [0, 0, 3]) == 0.75
    assert worst_class_accuracy([0, 1, 3], [0, 0, 3]) == 0.5
    assert worst_k([np.nan, 0.5, 1.0, np.nan], 2) == 0.75


def test_worst_k_is_of_the_model_that_is_scored():
    """The k rarest classes, or those that are worst for the baseline, hide the classes that a method sacrifices."""
    recalls = [0.9, 0.2, 0.7, 0.4]
    assert [worst_k(recalls, k) for k in (1, 2, 3, 4)] == pytest.approx([0.2, 0.3, 1.3 / 3, 0.55])
    found, labels = np.repeat([0, 1, 1, 0], 5), np.repeat([0, 0, 1, 1], 5)
    assert worst_class_accuracy(found, labels) == 0.5
    assert worst_class_accuracy(PREDICTIONS, LABELS, 2) == worst_k(per_class_recall(PREDICTIONS, LABELS), 2)
    for k in (0, 5, -1):
        with pytest.raises(ValueError, match=f"between 1 and the 4 classes that have examples, not {k}"):
            worst_k(recalls, k)
    with pytest.raises(ValueError, match="the 2 classes that have examples, not 3"):
        worst_k([math.nan, 0.5, 1.0], 3)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=40))
def test_accuracy_is_the_mean_of_recalls_by_class_size_and_the_worst_is_the_least(pairs):
    """The law that ties the three numbers of the table together."""
    found, labels = map(np.array, zip(*pairs, strict=True))
    recalls, shares = per_class_recall(found, labels, 5), np.bincount(labels, minlength=5) / len(labels)
    assert np.nansum(recalls * shares) == pytest.approx(accuracy(found, labels))
    known = recalls[~np.isnan(recalls)]
    assert worst_class_accuracy(found, labels) == known.min() <= mean_per_class_recall(found, labels) <= known.max()
    assert worst_k(recalls, len(known)) == pytest.approx(mean_per_class_recall(found, labels))


@pytest.mark.parametrize(("labels", "message"), [([0, 1, -100], "from -100 to 1"), ([0, 1, 4], "from 0 to 4")])
def test_labels_of_no_class_are_refused_in_recalls(labels, message):
    """-100 counted as a class drags the mean down by a class that nobody can predict."""
    with pytest.raises(ValueError, match=f"labels run {message}"):
        per_class_recall([0, 1, 2], labels, num_labels=3)


def test_subgroups_have_their_accuracy_each():
    """A subgroup scored on the rows of another says the opposite of who is harmed."""
    groups = np.array(["b", "a", "c"])[np.arange(60) % 3]
    found = subgroup_accuracy(PREDICTIONS, LABELS, groups)
    assert list(found) == ["a", "b", "c"]
    for name, value in found.items():
        expected = sklearn.metrics.accuracy_score(LABELS[groups == name], PREDICTIONS[groups == name])
        assert value == pytest.approx(expected)
    cells = list(zip(LABELS.tolist(), groups.tolist(), strict=True))
    assert subgroup_accuracy(PREDICTIONS, LABELS, cells)[2, "a"] == pytest.approx(
        np.mean(PREDICTIONS[(LABELS == 2) & (groups == "a")] == 2)
    )
    classes = subgroup_accuracy(PREDICTIONS, LABELS, LABELS)
    assert list(classes.values()) == pytest.approx(per_class_recall(PREDICTIONS, LABELS).tolist())


def test_examples_without_a_group_are_refused():
    """Left out, the rows that nobody assigned are the ones that nobody looks at."""
    with pytest.raises(ValueError, match="1 are missing"):
        subgroup_accuracy([0, 1], [0, 1], ["a", None])
    with pytest.raises(ValueError, match="need 2 groups, not 1"):
        subgroup_accuracy([0, 1], [0, 1], ["a"])


def test_per_class_difference_is_model_minus_reference():
    """With the sign turned, the classes that pay for the average look like those that gain."""
    labels = [0, 0, 1, 1, 3]
    found = per_class_difference([0, 0, 1, 0, 3], [0, 1, 1, 1, 3], labels, num_labels=4)
    np.testing.assert_array_equal(found, [0.5, -0.5, np.nan, 0.0])


def test_probability_margins_are_gamma_and_average_to_the_reliability():
    """Another gamma in the analysis than in the method explains nothing of it."""
    logits = generator.normal(0, 3, (60, 4))
    found = probability_margins(logits, LABELS)
    probabilities = torch.from_numpy(logits).softmax(-1).numpy()
    for value, row, label in zip(found, probabilities, LABELS, strict=True):
        assert value == pytest.approx(row[label] - np.delete(row, label).mean(), abs=1e-12)
    reliability = hfkd.functional.class_reliability(torch.from_numpy(logits), torch.from_numpy(LABELS))
    means = [found[label == LABELS].mean() for label in range(4)]
    assert means == pytest.approx(reliability.tolist(), abs=1e-12)


def test_logit_margins_are_positive_where_the_prediction_is_right():
    """A margin to all classes, the label among them, is never above 0."""
    logits = generator.normal(0, 3, (60, 4))
    found = logit_margins(logits, LABELS)
    expected = [row[label] - np.delete(row, label).max() for row, label in zip(logits, LABELS, strict=True)]
    assert found.tolist() == pytest.approx(expected, abs=1e-9)
    assert ((found > 0) == (logits.argmax(1) == LABELS)).all()


@pytest.mark.parametrize("margins", [probability_margins, logit_margins])
def test_margins_need_classes_and_their_labels(margins):
    """Labels of -1 index the last class."""
    with pytest.raises(ValueError, match="labels run from -1"):
        margins(np.zeros((2, 3)), [0, -1])
    with pytest.raises(ValueError, match="one column"):
        margins(np.zeros((2, 1)), [0, 0])
    with pytest.raises(ValueError, match="diverged"):
        margins(np.full((2, 3), np.nan), [0, 1])


# ---- student beside teacher ----


def test_agreement_counts_shared_mistakes():
    """Agreement that leaves out the wrong answers is an accuracy, and says nothing of fidelity."""
    assert agreement([0, 1, 2, 2], [0, 1, 2, 0]) == 0.75


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1), st.randoms())
def test_agreement_is_symmetric_and_ignores_row_order(pairs, random):
    """A score that depends on who is called the teacher, or on the order of rows, changes with the data loader."""
    student, teacher = zip(*pairs, strict=True)
    assert agreement(student, teacher) == agreement(teacher, student)
    random.shuffle(pairs)
    assert agreement(*zip(*pairs, strict=True)) == agreement(student, teacher)


def test_mean_kl_is_of_the_teacher_over_the_student():
    """The other direction forgives a student that drops half of the teacher's classes."""
    student, teacher = generator.normal(0, 3, (20, 4)), generator.normal(0, 3, (20, 4))
    units = hfkd.functional.kl_divergence(torch.from_numpy(student), torch.from_numpy(teacher))
    assert mean_kl_divergence(student, teacher) == pytest.approx(units.mean().item(), rel=1e-12)
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.25, 0.5])
    by_hand = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert mean_kl_divergence(np.log([q]), np.log([p])) == pytest.approx(by_hand)
    assert mean_kl_divergence(student, student + 7.0) == pytest.approx(0.0, abs=1e-12)


def test_mean_kl_with_excluded_classes():
    """0 * (-inf - -inf) is nan, which would hide the one model that masks classes."""
    masked, free = [[0.0, 0.0, -math.inf]], [[0.0, 0.0, 0.0]]
    assert mean_kl_divergence(masked, masked) == 0.0
    assert mean_kl_divergence(free, masked) == pytest.approx(math.log(3 / 2))
    assert mean_kl_divergence(masked, free) == math.inf
    with pytest.raises(ValueError, match="diverged"):
        mean_kl_divergence([[math.nan, 0.0]], [[0.0, 0.0]])
    with pytest.raises(ValueError, match="one shape"):
        mean_kl_divergence(np.zeros((2, 3)), np.zeros((1, 3)))


def test_negative_log_likelihood_is_the_loss():
    """A report whose likelihood is not the loss of the training log compares nothing."""
    logits = generator.normal(0, 30, (60, 4))
    loss = F.cross_entropy(torch.from_numpy(logits), torch.from_numpy(LABELS))
    assert negative_log_likelihood(logits, LABELS) == pytest.approx(loss.item(), rel=1e-12)
    with pytest.raises(ValueError, match="-1 to 0"):
        negative_log_likelihood([[0.0, 1.0], [1.0, 0.0]], [-1, 0])


@pytest.mark.parametrize(("distilled", "share"), [(0.80, 0.0), (0.85, 0.5), (0.90, 1.0), (0.95, 1.5), (0.75, -0.5)])
def test_gap_closed_is_a_share_of_the_gap(distilled, share):
    """Divided by the teacher's score instead, every distillation closes nine tenths of its gap."""
    assert gap_closed(0.80, distilled, 0.90) == pytest.approx(share)


@pytest.mark.parametrize("teacher", [0.80, 0.70, math.nan])
def test_without_a_gap_no_share_of_it_is_closed(teacher):
    """Below the baseline, both differences are negative: a student that got worse would have closed half of the gap."""
    assert math.isnan(gap_closed(0.80, 0.75, teacher))


# ---- calibration ----


def loop_calibration_error(probabilities, labels, bins):
    """Guo et al. 2017, eq. 3, as it is written: intervals open on the left, closed on the right."""
    total = 0.0
    for m in range(1, bins + 1):
        members = [
            (max(row), list(row).index(max(row)) == label)
            for row, label in zip(probabilities.tolist(), labels, strict=True)
            if (m - 1) / bins < max(row) <= m / bins
        ]
        if members:
            right = sum(hit for _, hit in members) / len(members)
            confidence = sum(value for value, _ in members) / len(members)
            total += len(members) / len(labels) * abs(right - confidence)
    return total


@pytest.mark.parametrize("bins", [1, 2, 10, 15, 100])
def test_calibration_error_equals_a_loop(bins):
    """Bins of equal mass, or an unweighted mean over bins, give another number under the same name."""
    probabilities = generator.dirichlet(np.ones(4), 60)
    expected = loop_calibration_error(probabilities, LABELS, bins)
    assert expected_calibration_error(probabilities, LABELS, bins) == pytest.approx(expected, abs=1e-12)


def test_a_confidence_on_an_edge_belongs_to_the_bin_below():
    """0.75 is the top of bin 3 of 4: moved up it meets other examples, and the errors no longer cancel or add alike."""
    probabilities = np.array([[0.75, 0.25], [0.7, 0.3], [0.8, 0.2]])
    labels = [0, 1, 0]
    by_hand = (abs(1 - 1.45) + abs(1 - 0.8)) / 3
    assert expected_calibration_error(probabilities, labels, 4) == pytest.approx(by_hand)
    assert loop_calibration_error(probabilities, labels, 4) == pytest.approx(by_hand)


@given(st.integers(1, 9), st.integers(1, 30))
def test_a_calibrated_model_has_no_calibration_error(tenths, bins):
    """An estimate that is not 0 where confidence equals accuracy blames the best of models."""
    confidence = max(tenths, 10 - tenths) / 10
    probabilities = np.tile([confidence, 1 - confidence], (10, 1))
    labels = [0] * round(10 * confidence) + [1] * (10 - round(10 * confidence))
    assert expected_calibration_error(probabilities, labels, bins) == pytest.approx(0.0, abs=1e-12)


@given(st.integers(0, 2**32 - 1), st.integers(1, 30))
def test_calibration_error_is_a_fraction_and_ignores_row_order(seed, bins):
    """An error above 1, or one that moves when rows are shuffled, is not the quantity of the paper."""
    draw = np.random.default_rng(seed)
    probabilities, labels = draw.dirichlet(np.full(3, 0.3), 12), draw.integers(0, 3, 12)
    error, order = expected_calibration_error(probabilities, labels, bins), draw.permutation(12)
    assert 0.0 <= error <= 1.0
    assert expected_calibration_error(probabilities[order], labels[order], bins) == pytest.approx(error, abs=1e-12)


def test_calibration_error_of_certainty():
    """Confidence 1 lies in the last bin; one bin further and the surest mistakes are not counted."""
    certain = np.array([[1.0, 0.0]] * 4)
    assert expected_calibration_error(certain, [0, 0, 0, 0]) == 0.0
    assert expected_calibration_error(certain, [1, 1, 1, 1]) == 1.0
    assert expected_calibration_error(certain.astype(np.float32), [0, 1, 0, 1]) == 0.5


@pytest.mark.parametrize(
    ("probabilities", "labels", "message"),
    [
        ([[2.0, -1.0]], [0], "softmax"),
        ([[0.4, 0.4]], [0], "softmax"),
        ([[math.nan, 1.0]], [0], "softmax"),
        ([0.4, 0.6], [0, 1], "shape"),
        ([[0.4, 0.6]], [0, 1], "examples"),
        ([[0.4, 0.6]], [2], "labels run from 2"),
        ([[0.4, 0.6]], [-1], "labels run from -1"),
    ],
)
def test_calibration_error_refuses_what_is_no_probability(probabilities, labels, message):
    """The error of logits is a number too, and a label of -1 counts as a mistake of a sure model."""
    with pytest.raises(ValueError, match=message):
        expected_calibration_error(probabilities, labels)


# ---- over seeds ----


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
