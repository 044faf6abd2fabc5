"""LogitMSE against loops over python floats."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hfkd.objectives import KD, LogitMSE
from test_functional import logit_pairs
from test_objective_kd import score, two_sides


@given(logit_pairs(), st.sampled_from(["single_label_classification", "multi_label_classification", "regression"]))
def test_logit_mse_equals_loops(pair, problem_type):
    """A sum over classes instead of their mean is 1,000 times stronger on ImageNet."""
    student, teacher = (torch.tensor(rows, dtype=torch.float64) for rows in pair)
    found = score(LogitMSE(alpha=1.0), student, teacher, problem_type=problem_type)["distill_loss"]
    for value, ours, theirs in zip(found.tolist(), *pair, strict=True):
        squares = [(s - t) ** 2 for s, t in zip(ours, theirs, strict=True)]
        assert value == pytest.approx(sum(squares) / len(squares), rel=1e-12)


def test_a_shift_of_all_logits_costs():
    """What the docstring says of the mean logit: KD is blind to it, this loss is not."""
    student, _ = two_sides(3, 5)
    found = score(LogitMSE(alpha=1.0), student + 3, student)["distill_loss"]
    assert found.tolist() == pytest.approx([9.0] * 3)


def test_kd_at_high_temperature_tends_to_it_on_centred_logits():
    """Kim et al., section 3: the factor between the two losses, without which their alphas do not compare."""
    student, teacher = (side - side.mean(-1, keepdim=True) for side in two_sides(3, 5))
    hot = score(KD(1e3, 1.0), student, teacher)["distill_loss"]
    torch.testing.assert_close(hot, score(LogitMSE(alpha=1.0), student, teacher)["distill_loss"] / 2, rtol=1e-2, atol=0)


def test_gradients_are_those_of_the_value():
    """A detached teacher and a live student: the other way round nothing is learned."""
    student, teacher = two_sides(3, 4)
    student.requires_grad_(True)
    values = score(LogitMSE(alpha=1.0), student, teacher)["distill_loss"]
    values.sum().backward()
    torch.testing.assert_close(student.grad, (student.detach() - teacher) / 2, rtol=1e-12, atol=0)


def test_unlabelled_tokens_cost_nothing():
    """Distillation on padding trains the student toward what the teacher says of nothing."""
    student, teacher = two_sides(1, 2, 5)
    values = score(LogitMSE(), student, teacher, torch.tensor([[3, -100]]))["distill_loss"]
    assert values[0, 1] == 0
    assert values[0, 0] > 0
