"""Each loss against plain loops over python floats, and by its gradient."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hfkd.functional import (
    cross_entropy,
    generalized_jsd,
    kl_divergence,
    labelled_units,
    masked_mean,
    squared_distance,
    task_loss,
    two_class_logits,
    weight_distance,
)


def log_softmax_by_loops(row: list[float]) -> list[float]:
    top = max(row)
    log_sum = top + math.log(sum(math.exp(value - top) for value in row))
    return [value - log_sum for value in row]


def kl_by_loops(student: list[float], teacher: list[float], temperature: float) -> float:
    log_student = log_softmax_by_loops([value / temperature for value in student])
    log_teacher = log_softmax_by_loops([value / temperature for value in teacher])
    return sum(math.exp(t) * (t - s) for s, t in zip(log_student, log_teacher, strict=True))


@st.composite
def logit_pairs(draw) -> tuple[list[list[float]], list[list[float]]]:
    """Student and teacher logits of one to four examples with two to six classes."""
    classes = draw(st.integers(2, 6))
    row = st.lists(st.floats(-30, 30), min_size=classes, max_size=classes)
    pairs = draw(st.lists(st.tuples(row, row), min_size=1, max_size=4))
    return [student for student, _ in pairs], [teacher for _, teacher in pairs]


# ---- cross_entropy ----


@given(logit_pairs(), st.sampled_from([0.0, 0.1, 0.7]))
def test_cross_entropy_equals_loops(pair, smoothing):
    """A wrong log-softmax, or smoothing spread over the wrong number of classes, moves every table of the toolkit."""
    logits = pair[0]
    labels = [i % len(logits[0]) for i in range(len(logits))]
    found = cross_entropy(torch.tensor(logits, dtype=torch.float64), torch.tensor(labels), smoothing)
    for value, row, label in zip(found.tolist(), logits, labels, strict=True):
        log_probabilities = log_softmax_by_loops(row)
        uniform = sum(log_probabilities) / len(row)
        expected = -(1 - smoothing) * log_probabilities[label] - smoothing * uniform
        assert value == pytest.approx(expected, rel=1e-10, abs=1e-10)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_unlabelled_tokens_carry_no_loss(smoothing):
    """Loss on -100 tokens trains the model on padding; a reduced value hides how many tokens were labelled."""
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = torch.tensor([[1, -100, 4], [-100, -100, -100]])
    values = cross_entropy(logits, labels, smoothing)
    assert values.shape == (2, 3)
    assert torch.equal(values == 0, labels == -100)
    values.sum().backward()
    assert bool((logits.grad[labels == -100] == 0).all()) and bool((logits.grad[0, 0] != 0).all())


def test_cross_entropy_gradient_is_softmax_minus_one_hot():
    """A detached or doubled path would still give the right value while training moves the wrong way."""
    logits = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    labels = torch.tensor([0, 4, 2, 2])
    cross_entropy(logits, labels).sum().backward()
    expected = logits.detach().softmax(-1) - torch.nn.functional.one_hot(labels, 5)
    torch.testing.assert_close(logits.grad, expected, rtol=0, atol=1e-12)


# ---- kl_divergence ----


@given(logit_pairs(), st.sampled_from([0.5, 1.0, 4.0]))
def test_kl_divergence_equals_loops(pair, temperature):
    """The reverse divergence, a temperature on one side only or a hidden T^2 all look like a plausible loss."""
    student, teacher = pair
    found = kl_divergence(
        torch.tensor(student, dtype=torch.float64), torch.tensor(teacher, dtype=torch.float64), temperature
    )
    expected = [kl_by_loops(s, t, temperature) for s, t in zip(student, teacher, strict=True)]
    assert found.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_kl_divergence_gradient_is_the_difference_of_soft_targets():
    """The gradient per logit is (softmax_student - softmax_teacher) / T: a missing 1/T multiplies the learning rate."""
    generator = torch.Generator().manual_seed(2)
    student = torch.randn(3, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    teacher = torch.randn(3, 4, dtype=torch.float64, generator=generator)
    kl_divergence(student, teacher, 2.0).sum().backward()
    expected = ((student.detach() / 2).softmax(-1) - (teacher / 2).softmax(-1)) / 2
    torch.testing.assert_close(student.grad, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 10.0])
def test_extreme_logits_stay_finite(temperature):
    """A probability that underflows to 0 before its logarithm is taken makes the whole step NaN."""
    student = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4]], requires_grad=True)
    teacher = torch.tensor([[-1e4, 1e4, 0.0], [1e4, -1e4, -1e4]])
    values = kl_divergence(student, teacher, temperature)
    (values.sum() + cross_entropy(student, torch.tensor([1, 0])).sum()).backward()
    assert bool(torch.isfinite(values).all()) and bool(torch.isfinite(student.grad).all())
    assert values[0].item() == pytest.approx(2e4 / temperature)


def test_equal_logits_have_nothing_to_distil():
    """A constant offset of the loss would be reported as a distance between student and teacher."""
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(3))
    shifted = logits + 3.0  # softmax does not see a shift
    assert kl_divergence(logits, shifted).abs().max() < 1e-6
    assert bool((squared_distance(logits, logits) == 0).all())


# ---- bfloat16 ----


def test_bfloat16_answers_are_scored_in_float32():
    """In bfloat16 a loss keeps two digits, and a sum over 768 dimensions stops growing once the addends round away."""
    generator = torch.Generator().manual_seed(4)
    student, teacher = (torch.randn(3, 768, generator=generator).bfloat16() for _ in range(2))
    labels, mask = torch.tensor([0, 5, 700]), torch.ones(1, 3)
    for loss in (
        lambda s, t: cross_entropy(s, labels),
        lambda s, t: kl_divergence(s, t, 2.0),
        squared_distance,
        lambda s, t: masked_mean(s[None], mask),
    ):
        found = loss(student, teacher)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, loss(student.float(), teacher.float()), rtol=0, atol=0)


def test_masked_mean_counts_long_rows_in_float32():
    """bfloat16 cannot count to 301, so a mean over 301 tokens would be divided by 300."""
    features = (torch.arange(400) < 150).bfloat16().view(1, 400, 1)
    mask = (torch.arange(400) < 301).long()[None]
    assert masked_mean(features, mask).item() == pytest.approx(150 / 301, rel=1e-6)


# ---- squared_distance ----


def test_squared_distance_is_hidden_times_the_usual_mse():
    """A mean over the hidden dimension makes the distillation loss 768 times too small."""
    generator = torch.Generator().manual_seed(5)
    student, teacher = (torch.randn(4, 768, dtype=torch.float64, generator=generator) for _ in range(2))
    found = squared_distance(student, teacher)
    assert found.shape == (4,)
    per_row = torch.nn.functional.mse_loss(student, teacher, reduction="none").mean(-1)
    torch.testing.assert_close(found, 768 * per_row, rtol=1e-12, atol=0)
    assert squared_distance(torch.ones(1, 768), torch.zeros(1, 768)).item() == 768


def test_squared_distance_gradient_is_twice_the_difference():
    """A root over the sum, or a halved square, changes the strength of distillation beside the masked loss."""
    generator = torch.Generator().manual_seed(6)
    student = torch.randn(2, 3, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    teacher = torch.randn(2, 3, 5, dtype=torch.float64, generator=generator)
    squared_distance(student, teacher).sum().backward()
    torch.testing.assert_close(student.grad, 2 * (student.detach() - teacher), rtol=0, atol=1e-12)


# ---- task_loss ----


@given(logit_pairs())
def test_task_loss_of_single_labels_is_cross_entropy(pair):
    """One task term for all objectives: a second definition would make their baselines differ."""
    logits = torch.tensor(pair[0], dtype=torch.float64)
    labels = torch.arange(len(logits)) % logits.shape[-1]
    assert torch.equal(task_loss(logits, labels, label_smoothing=0.1), cross_entropy(logits, labels, 0.1))


@given(logit_pairs())
def test_task_loss_of_multi_label_heads_equals_loops(pair):
    """A sum over labels, or labels as class ids, is a silently wrong loss for multi-label heads."""
    logits, labels = torch.tensor(pair[0], dtype=torch.float64), (torch.tensor(pair[1]) > 0).int()
    found = task_loss(logits, labels, "multi_label_classification")
    for value, row, wanted in zip(found.tolist(), pair[0], labels.tolist(), strict=True):
        losses = [math.log1p(math.exp(-z)) if y else math.log1p(math.exp(z)) for z, y in zip(row, wanted, strict=True)]
        assert value == pytest.approx(sum(losses) / len(row), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("outputs", [1, 3])
def test_task_loss_of_regression_is_the_squared_error(outputs):
    """(batch, 1) minus (batch,) broadcasts to (batch, batch): every example is compared with every label."""
    logits = torch.arange(4.0 * outputs).reshape(4, outputs)
    labels = torch.ones(4) if outputs == 1 else torch.ones(4, 3)
    found = task_loss(logits, labels, "regression")
    expected = [sum((z - 1) ** 2 for z in row) / outputs for row in logits.tolist()]
    assert found.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("problem_type", ["single_label_classification", "multi_label_classification", "regression"])
def test_task_loss_is_computed_in_float32(problem_type):
    """In bfloat16 a mean over labels keeps two digits."""
    labels = torch.tensor([0, 1]) if problem_type[:6] == "single" else torch.ones(2, 4)
    values = task_loss(torch.randn(2, 4).bfloat16(), labels, problem_type)
    assert values.dtype == torch.float32
    assert values.shape == (2,)


def test_labelled_units_are_tokens_or_examples():
    """Floats of a multi-label row are not units, and a regression label of -100 is a number."""
    assert labelled_units(torch.tensor([[1, -100], [0, 2]])).tolist() == [[True, False], [True, True]]
    assert labelled_units(torch.tensor([-100.0, 2.0]), "regression").tolist() == [True, True]
    assert labelled_units(torch.zeros(2, 5), "multi_label_classification").tolist() == [True, True]


@given(st.floats(-30, 30), st.sampled_from([1.0, 3.0]))
def test_two_class_logits_are_a_sigmoid(logit, temperature):
    """[z, -z] instead of [z, 0] would be a sigmoid of 2z: twice as sure as the model."""
    pair = two_class_logits(torch.tensor([logit], dtype=torch.float64))
    assert pair.shape == (1, 2)
    expected = 1 / (1 + math.exp(-logit / temperature))
    assert (pair / temperature).softmax(-1)[0, 0].item() == pytest.approx(expected, rel=1e-12)


# ---- generalized_jsd ----


@given(logit_pairs(), st.floats(0.01, 0.99))
def test_generalized_jsd_swaps_with_its_interpolation(pair, interpolation):
    """JSD_b(t, s) = JSD_{1-b}(s, t): a weight on the wrong side breaks it for every b but 0.5."""
    student, teacher = (torch.tensor(rows, dtype=torch.float64) for rows in pair)
    one = generalized_jsd(student, teacher, interpolation, 2.0)
    other = generalized_jsd(teacher, student, 1 - interpolation, 2.0)
    torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-12)


# ---- masked_mean ----


@given(st.lists(st.integers(0, 5), min_size=1, max_size=4))
def test_masked_mean_equals_loops(lengths):
    """Padding in the mean makes a short text's features depend on what it was batched with."""
    generator = torch.Generator().manual_seed(7)
    features = torch.randn(len(lengths), 5, 3, dtype=torch.float64, generator=generator)
    mask = (torch.arange(5) < torch.tensor(lengths)[:, None]).long()
    for row, length, found in zip(features.tolist(), lengths, masked_mean(features, mask).tolist(), strict=True):
        sums = [sum(token[d] for token in row[:length]) for d in range(3)]
        assert found == pytest.approx([value / max(length, 1) for value in sums])  # no token at all: 0, not NaN


# ---- weight_distance ----


def test_weight_distance_is_over_all_floating_entries_in_float64():
    """An average of per-tensor distances, or integer buffers in the sum, is not the distance the paper plots."""
    start = {"a": torch.tensor([0.0, 0.0]), "b": torch.tensor([[1.0]]), "positions": torch.tensor([0, 1])}
    weights = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([[5.0]]), "positions": torch.tensor([9, 9])}
    assert weight_distance(weights, start) == 5.0
    assert weight_distance(start, start) == 0.0
    # float32 cannot tell 2^24 + 1 from 2^24
    assert weight_distance({"a": torch.tensor([2.0**24])}, {"a": torch.tensor([-1.0])}) == 2.0**24 + 1


@pytest.mark.parametrize("missing", ["weights", "start"])
def test_weight_distance_refuses_different_names(missing):
    """A distance over the names that happen to match looks like a small one."""
    both = {"weights": {"a": torch.ones(1), "b": torch.ones(1)}, "start": {"a": torch.ones(1), "b": torch.ones(1)}}
    del both[missing]["b"]
    with pytest.raises(KeyError, match="b"):
        weight_distance(both["weights"], both["start"])
