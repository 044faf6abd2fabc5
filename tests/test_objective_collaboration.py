"""Objectives of groups against slow loops in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.utils import ModelOutput

from hfkd import KD, Collaboration, CrossEntropy, MutualLearning, TeacherOutput
from hfkd.outputs import with_entry

NAMES = ("a", "b", "c")


def case(rows=4, classes=3, seed=0):
    torch.manual_seed(seed)
    logits = 3 * torch.randn(rows, len(NAMES), classes, dtype=torch.float64)
    return logits, 3 * torch.randn(rows, classes, dtype=torch.float64), torch.randint(0, classes, (rows,))


def softmax(values, temperature=1.0):
    exponents = [math.exp(value / temperature) for value in values]
    return [value / sum(exponents) for value in exponents]


def kl(target, student):
    return sum(q * (math.log(q) - math.log(p)) for q, p in zip(target, student, strict=True))


def met(objective, names=NAMES):
    objective.meet(names)
    objective.build(None, None, None)
    return objective


@given(temperature=st.floats(0.5, 8), seed=st.integers(0, 50))
def test_losses_are_those_of_the_equation(temperature, seed):
    """A mean over classes for a sum, or a forgotten T^2, is a weight that nobody set."""
    logits, teacher, labels = case(seed=seed)
    found = met(Collaboration(temperature, pooled=True)).losses(logits, teacher, {"labels": labels})
    for i in range(4):
        z, t, y = logits[i].tolist(), teacher[i].tolist(), int(labels[i])
        pool = [max(s[c] for s in z) if c == y else min(s[c] for s in z) for c in range(3)]
        for k in range(3):
            p = softmax(z[k], temperature)
            expected = [
                -math.log(softmax(z[k])[y]),
                temperature**2 * kl(softmax(t, temperature), p),
                temperature**2 * kl(softmax(pool, temperature), p),
            ]
            assert found[i, k].tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)


@given(seed=st.integers(0, 50))
def test_mutual_learning_is_that_of_the_equation(seed):
    """KL the other way round teaches a student to be sure where the others are."""
    logits, _, labels = case(seed=seed)
    found = met(MutualLearning()).losses(logits, None, {"labels": labels})
    for i in range(4):
        p = [softmax(one) for one in logits[i].tolist()]
        for k in range(3):
            expected = sum(kl(p[j], p[k]) for j in range(3) if j != k) / 2
            assert found[i, k].tolist() == pytest.approx([-math.log(p[k][labels[i]]), expected], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("objective", [Collaboration(pooled=True), MutualLearning()])
def test_no_gradient_from_one_student_to_another(objective):
    """A student that is pulled towards its pupils learns from itself."""
    logits, teacher, labels = case()
    logits.requires_grad_()
    losses = met(objective).losses(logits, teacher, {"labels": labels})
    for k in range(3):
        (gradient,) = torch.autograd.grad(losses[:, k].sum(), logits, retain_graph=True)
        others = [j for j in range(3) if j != k]
        assert gradient[:, k].abs().max() > 0 and gradient[:, others].abs().max() == 0


def test_weights_and_names_belong_together():
    """A term under the wrong student's name is a table of wrong numbers."""
    logits, teacher, labels = case()
    objective, weights = met(Collaboration()), torch.rand(4, 3, 2, dtype=torch.float64)
    outputs = with_entry(ModelOutput(logits=logits), "weights", weights)
    terms = objective(outputs, TeacherOutput(logits=teacher), {"labels": labels})
    assert list(terms) == [f"{name}_{part}_loss" for name in NAMES for part in ("task", "distill")]
    assert terms.keys() == objective.count({"labels": labels}).keys()
    for k, name in enumerate(NAMES):
        one, batch = ModelOutput(logits=logits[:, k]), {"labels": labels}
        task = CrossEntropy()(one, None, batch)["task_loss"]
        distill = KD(2.0, alpha=1.0)(one, TeacherOutput(logits=teacher), batch)["distill_loss"]
        torch.testing.assert_close(terms[f"{name}_task_loss"], weights[:, k, 0] * task)
        torch.testing.assert_close(terms[f"{name}_distill_loss"], weights[:, k, 1] * distill)
        torch.testing.assert_close(objective.task(outputs, batch)[f"{name}_task_loss"], task)


def test_unlabelled_examples_cost_nothing():
    """Label -100 would index a class from the end, or a NaN would reach every student."""
    logits, teacher, labels = case()
    labels[1] = -100
    for objective in (met(Collaboration(pooled=True)), met(MutualLearning())):
        losses = objective.losses(logits, teacher, {"labels": labels})
        assert torch.isfinite(losses).all() and losses[1].abs().max() == 0
        assert {int(units) for units in objective.count({"labels": labels}).values()} == {3}


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_other_heads_are_those_of_kd(problem):
    """Sigmoids and squared errors, not a softmax over independent labels."""
    logits, teacher, _ = case()
    labels = torch.rand(4, 3).round()
    objective, kd = Collaboration(3.0), KD(3.0, alpha=1.0)
    objective.meet(NAMES)
    for one in (objective, kd):
        one.build(None, None, problem)
    losses = objective.losses(logits, teacher, {"labels": labels})
    for k in range(3):
        terms = kd(ModelOutput(logits=logits[:, k]), TeacherOutput(logits=teacher), {"labels": labels})
        torch.testing.assert_close(losses[:, k, 1], terms["distill_loss"])
    with pytest.raises(ValueError, match="pooled"):
        Collaboration(pooled=True).build(None, None, problem)


def test_shapes_that_do_not_fit_are_refused():
    """Broadcasting a teacher over classes or tokens trains without an error."""
    logits, teacher, labels = case()
    objective = met(Collaboration())
    for wrong in (None, teacher[:, :2], teacher[:2]):
        with pytest.raises(ValueError, match="teacher's logits are"):
            objective.losses(logits, wrong, {"labels": labels})
    with pytest.raises(ValueError, match="token heads"):
        objective.losses(logits.unsqueeze(2), teacher, {"labels": labels})
    with pytest.raises(ValueError, match="two or more"):
        MutualLearning().meet(["a"])
    with pytest.raises(ValueError, match="temperature"):
        Collaboration(temperature=0)
