"""DIST against numpy's correlations, its gradient and its edges."""

from __future__ import annotations

import math

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hfkd.functional import correlation
from hfkd.objectives import DIST
from test_functional import logit_pairs
from test_objective_dkd import softmax_by_loops
from test_objective_kd import score, two_sides


def dist_by_numpy(student, teacher, inter_weight: float, intra_weight: float, temperature: float) -> float:
    """The loss of a whole batch, with numpy's corrcoef of each row and each column."""
    s, t = (numpy.array([softmax_by_loops(row, temperature) for row in side.tolist()]) for side in (student, teacher))
    inter = 1 - numpy.mean([numpy.corrcoef(a, b)[0, 1] for a, b in zip(s, t, strict=True)])
    intra = 1 - numpy.mean([numpy.corrcoef(a, b)[0, 1] for a, b in zip(s.T, t.T, strict=True)])
    return temperature**2 * (inter_weight * inter + intra_weight * intra)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (2.0, 0.5), (0.0, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_mean_over_units_is_the_papers_loss(weights, temperature):
    """An intra term that is summed over the batch grows with the batch size; rows and columns swap unnoticed."""
    student, teacher = two_sides(6, 4)
    values = score(DIST(*weights, temperature, alpha=1.0), student, teacher)["distill_loss"]
    assert values.shape == (6,)
    assert values.mean().item() == pytest.approx(dist_by_numpy(student, teacher, *weights, temperature), rel=1e-9)


def test_columns_hold_labelled_units_only():
    """Padding tokens in a class's column make the loss depend on how long the longest text is."""
    student, teacher = two_sides(3, 4, 5)
    labels = torch.tensor([[1, -100, 2, 0], [-100, -100, -100, -100], [4, 3, -100, -100]])
    values = score(DIST(1.0, 3.0, 2.0, alpha=1.0), student, teacher, labels)["distill_loss"]
    units = labels != -100
    expected = dist_by_numpy(student[units], teacher[units], 1.0, 3.0, 2.0)
    assert (values.sum() / units.sum()).item() == pytest.approx(expected, rel=1e-9)
    assert bool((values[~units] == 0).all())


def test_without_intra_examples_are_independent():
    """A loss that is declared coupled without need loses gradient accumulation."""
    assert DIST().batch_coupled
    assert not DIST(intra_weight=0.0).batch_coupled
    assert not DIST(alpha=0.0).batch_coupled


@given(logit_pairs(), st.floats(-50, 50))
def test_dist_is_not_negative_and_blind_to_a_shift(pair, shift):
    """A correlation above 1 or one of logits instead of probabilities would show here."""
    student, teacher = (torch.tensor(rows, dtype=torch.float64) for rows in pair)
    values = score(DIST(alpha=1.0), student, teacher)["distill_loss"]
    assert bool((values >= -1e-12).all())
    assert bool((values <= 4 + 1e-12).all())
    moved = score(DIST(alpha=1.0), student + shift, teacher - shift)["distill_loss"]
    torch.testing.assert_close(values, moved, rtol=1e-7, atol=1e-7)


def test_gradients_are_those_of_the_value():
    """A detached mean or norm leaves the value right and trains in another direction."""
    student, teacher = two_sides(4, 3)
    student.requires_grad_(True)
    labels = torch.tensor([0, 1, -100, 2])
    assert torch.autograd.gradcheck(lambda z: score(DIST(temperature=2.0), z, teacher, labels)["distill_loss"], student)


@pytest.mark.parametrize("uniform", ["student", "teacher", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniform_probabilities_are_no_nan(uniform, dtype):
    """A new head answers the same for every class: 0 / 0 in the first step makes all weights NaN, and a tiny norm
    in the denominator makes one step of 1e8."""
    student, teacher = (side.to(dtype) for side in two_sides(4, 3))
    student = torch.full_like(student, 0.3) if uniform != "teacher" else student
    teacher = torch.zeros_like(teacher) if uniform != "student" else teacher
    student.requires_grad_(True)
    values = score(DIST(alpha=1.0), student, teacher)["distill_loss"]
    assert values.detach().tolist() == pytest.approx([2.0] * 4, abs=1e-2)
    values.mean().backward()
    assert bool(torch.isfinite(student.grad).all())
    assert float(student.grad.abs().max()) < 1e4


def test_a_batch_of_one_has_no_columns():
    """One row is no sample: its correlation is 0 / 0, so intra must be a constant without gradient."""
    student, teacher = two_sides(1, 4)
    student.requires_grad_(True)
    value = score(DIST(0.0, 1.0, alpha=1.0), student, teacher)["distill_loss"]
    assert value.item() == 1.0
    value.backward()
    assert bool((student.grad == 0).all())


def test_two_classes_leave_inter_without_a_gradient():
    """The docstring says that on a binary task only intra teaches; were it not so, someone would switch intra off."""
    student, teacher = two_sides(4, 2)
    student.requires_grad_(True)
    values = score(DIST(1.0, 0.0, alpha=1.0), student, teacher)["distill_loss"]
    for value in values.tolist():
        assert min(abs(value), abs(value - 2)) < 1e-12
    values.sum().backward()
    assert float(student.grad.abs().max()) < 1e-12


@given(st.integers(2, 6), st.integers(0, 3))
def test_correlation_is_numpys(length, seed):
    """A covariance without one of its means is another similarity."""
    x, y = two_sides(length, seed=seed)
    assert correlation(x, y).item() == pytest.approx(numpy.corrcoef(x, y)[0, 1], rel=1e-9)
    weights = torch.cat([torch.ones(length), torch.zeros(2)])
    padded = [torch.cat([side, torch.full((2,), 1e3, dtype=side.dtype)]) for side in (x, y)]
    assert correlation(*padded, 0, weights).item() == pytest.approx(numpy.corrcoef(x, y)[0, 1], rel=1e-9)


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
@pytest.mark.parametrize("name", ["inter_weight", "intra_weight"])
def test_a_wrong_weight_is_refused(name, value):
    """A negative weight asks for the opposite of the teacher's relations."""
    with pytest.raises(ValueError, match=f"^{name} must be .*got {value}"):
        DIST(**{name: value})


def test_a_wrong_temperature_is_refused():
    """A temperature of 0 divides by it."""
    with pytest.raises(ValueError, match=r"temperature must be .*got 0"):
        DIST(temperature=0.0)
