"""GeneralizedJSD against loops over python floats, at its ends, at its limits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hfkd.objectives import KD, GeneralizedJSD
from test_functional import kl_by_loops, logit_pairs
from test_objective_dkd import softmax_by_loops
from test_objective_kd import score, two_sides


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def jsd_by_loops(student: list[float], teacher: list[float], b: float, temperature: float) -> float:
    s, t = softmax_by_loops(student, temperature), softmax_by_loops(teacher, temperature)
    mixture = [b * y + (1 - b) * x for x, y in zip(s, t, strict=True)]
    return b * kl(t, mixture) + (1 - b) * kl(s, mixture)


@given(logit_pairs(), st.sampled_from([0.1, 0.5, 0.8]), st.sampled_from([1.0, 3.0]))
def test_generalized_jsd_equals_loops(pair, interpolation, temperature):
    """With the mixture's weights swapped, 0.1 is 0.9: the figure over the interpolation is mirrored."""
    student, teacher = (torch.tensor(rows, dtype=torch.float64) for rows in pair)
    objective = GeneralizedJSD(interpolation, temperature, alpha=1.0)
    found = score(objective, student, teacher)["distill_loss"]
    for value, ours, theirs in zip(found.tolist(), *pair, strict=True):
        expected = temperature**2 * jsd_by_loops(ours, theirs, interpolation, temperature)
        assert value == pytest.approx(expected, rel=1e-8, abs=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("problem_type", [None, "multi_label_classification"])
def test_zero_is_kd_and_one_the_reverse(temperature, problem_type):
    """TRL's ends: were they swapped, a mode-seeking student would be reported as KD."""
    student, teacher = two_sides(3, 5)
    labels = torch.ones(3, 5) if problem_type else torch.tensor([0, 1, 2])
    forward = score(GeneralizedJSD(0.0, temperature, 0.7), student, teacher, labels, problem_type)
    reverse = score(GeneralizedJSD(1.0, temperature, 0.7), student, teacher, labels, problem_type)
    expected = score(KD(temperature, 0.7), student, teacher, labels, problem_type)
    swapped = score(KD(temperature, 0.7), teacher, student, labels, problem_type)
    assert torch.equal(forward["distill_loss"], expected["distill_loss"])
    assert torch.equal(forward["task_loss"], expected["task_loss"])
    assert torch.equal(reverse["distill_loss"], swapped["distill_loss"])


def test_the_formula_vanishes_at_its_ends():
    """What the docstring warns of: a tiny interpolation is next to no loss, not next to KD."""
    student, teacher = two_sides(1, 5)
    near = score(GeneralizedJSD(1e-6, alpha=1.0), student, teacher)["distill_loss"].item()
    assert near == pytest.approx(1e-6 * kl_by_loops(student[0].tolist(), teacher[0].tolist(), 1.0), rel=0.05)


def test_multi_label_heads_compare_each_label_by_itself():
    """A softmax over independent labels teaches that a text with two topics has half of each."""
    student, teacher = two_sides(2, 3)
    found = score(GeneralizedJSD(0.3, 2.0, 1.0), student, teacher, problem_type="multi_label_classification")
    for value, ours, theirs in zip(found["distill_loss"].tolist(), student.tolist(), teacher.tolist(), strict=True):
        labels = [jsd_by_loops([s, 0.0], [t, 0.0], 0.3, 2.0) for s, t in zip(ours, theirs, strict=True)]
        assert value == pytest.approx(4 * sum(labels) / 3, rel=1e-9)


@given(logit_pairs(), st.floats(0, 1), st.floats(-50, 50))
def test_it_is_a_divergence(pair, interpolation, shift):
    """Between 0 and log 2 for 0.5 (a bound that a wrong mixture breaks), 0 at the teacher, blind to a shift."""
    student, teacher = (torch.tensor(rows, dtype=torch.float64) for rows in pair)
    objective = GeneralizedJSD(interpolation, alpha=1.0)
    values = score(objective, student, teacher)["distill_loss"]
    assert bool((values >= -1e-12).all())
    moved = score(objective, student + shift, teacher - shift)["distill_loss"]
    torch.testing.assert_close(values, moved, rtol=1e-8, atol=1e-8)
    assert float(score(objective, teacher + shift, teacher)["distill_loss"].abs().max()) < 1e-9
    half = score(GeneralizedJSD(0.5, alpha=1.0), student, teacher)["distill_loss"]
    assert bool((half <= math.log(2) + 1e-9).all())


@pytest.mark.parametrize("interpolation", [0.0, 0.3, 1.0])
def test_gradients_are_those_of_the_value(interpolation):
    """A mixture that is detached from the student trains it toward a fixed point that moves."""
    student, teacher = two_sides(3, 4)
    student.requires_grad_(True)
    objective = GeneralizedJSD(interpolation, 2.0, 1.0)
    assert torch.autograd.gradcheck(lambda z: score(objective, z, teacher)["distill_loss"], student)


@pytest.mark.parametrize("interpolation", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sure_logits_stay_finite_with_their_gradient(interpolation, dtype):
    """A probability that underflows gives log(0): one sure example makes all weights NaN."""
    student, teacher = (side.to(dtype) * 1e4 for side in two_sides(6, 5))
    student.requires_grad_(True)
    values = score(GeneralizedJSD(interpolation, alpha=1.0), student, teacher)["distill_loss"]
    values.sum().backward()
    assert values.dtype == torch.float32
    assert bool(torch.isfinite(values).all())
    assert bool(torch.isfinite(student.grad).all())


@pytest.mark.parametrize("interpolation", [-0.1, 1.1, math.nan])
def test_an_interpolation_outside_its_range_is_refused(interpolation):
    """Outside [0, 1] the mixture has negative probabilities."""
    with pytest.raises(ValueError, match=f"interpolation.*got {interpolation}"):
        GeneralizedJSD(interpolation)


def test_regression_and_a_wrong_temperature_are_refused():
    """The softmax of one output is 1: the loss would be 0 whatever the student says."""
    with pytest.raises(ValueError, match=r"GeneralizedJSD scores .*'regression'.*KD"):
        GeneralizedJSD().build(None, None, "regression")
    with pytest.raises(ValueError, match=r"temperature must be .*got -1"):
        GeneralizedJSD(temperature=-1.0)
