"""KD against loops over python floats, its gradient, and its refusals."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hfkd.objectives import KD, CrossEntropy
from hfkd.outputs import TeacherOutput
from test_functional import kl_by_loops, log_softmax_by_loops, logit_pairs


def score(objective, student, teacher, labels=None, problem_type=None) -> dict[str, torch.Tensor]:
    objective.build(SimpleNamespace(num_labels=student.shape[-1]), None, problem_type)
    batch = {} if labels is None else {"labels": labels}
    return objective(SimpleNamespace(logits=student), TeacherOutput(logits=teacher), batch)


def two_sides(*shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = 3 * torch.randn(2, *shape, dtype=torch.float64, generator=generator)
    return student, teacher


# ---- values ----


@pytest.mark.parametrize("side", ["both", "teacher"])
@pytest.mark.parametrize("classes", [2, 1000])
def test_kd_equals_loops_and_sums_over_classes(side, classes):
    """A mean over classes makes soft targets 1,000 times weaker on ImageNet; without T^2 they fade as T grows."""
    student, teacher = two_sides(3, classes)
    temperature, alpha = 4.0, 0.7
    labels = torch.tensor([0, 1, 1])
    terms = score(KD(temperature, alpha, side), student, teacher, labels)
    for i, (ours, theirs) in enumerate(zip(student.tolist(), teacher.tolist(), strict=True)):
        if side == "both":
            expected = alpha * temperature**2 * kl_by_loops(ours, theirs, temperature)
        else:
            expected = alpha * kl_by_loops(ours, [z / temperature for z in theirs], 1.0)
        assert terms["distill_loss"][i].item() == pytest.approx(expected, rel=1e-10)
        task = -(1 - alpha) * log_softmax_by_loops(ours)[labels[i]]
        assert terms["task_loss"][i].item() == pytest.approx(task, rel=1e-10)


def binary_kl(student: float, teacher: float) -> float:
    s, t = 1 / (1 + math.exp(-student)), 1 / (1 + math.exp(-teacher))
    return t * math.log(t / s) + (1 - t) * math.log((1 - t) / (1 - s))


@pytest.mark.parametrize("side", ["both", "teacher"])
def test_multi_label_heads_compare_each_label_by_itself(side):
    """A softmax over independent labels teaches that a text with two topics has half of each."""
    student, teacher = two_sides(4, 3)
    labels = torch.randint(2, (4, 3), generator=torch.Generator().manual_seed(0)).double()
    found = score(KD(2.0, 1.0, side), student, teacher, labels, "multi_label_classification")["distill_loss"]
    for value, ours, theirs in zip(found.tolist(), student.tolist(), teacher.tolist(), strict=True):
        pairs = zip(ours, theirs, strict=True)
        both = [4 * binary_kl(s / 2, t / 2) if side == "both" else binary_kl(s, t / 2) for s, t in pairs]
        assert value == pytest.approx(sum(both) / 3, rel=1e-10)


@pytest.mark.parametrize("outputs", [1, 3])
def test_regression_heads_compare_numbers(outputs):
    """A softmax over the one output of a regression head is always 1, so nothing would be distilled."""
    student, teacher = two_sides(4, outputs)
    labels = torch.zeros(4, outputs).squeeze(-1)
    terms = score(KD(alpha=0.25), student, teacher, labels, "regression")
    for i in range(4):
        pairs = list(zip(student[i].tolist(), teacher[i].tolist(), strict=True))
        assert terms["distill_loss"][i].item() == pytest.approx(0.25 * sum((s - t) ** 2 for s, t in pairs) / outputs)
        assert terms["task_loss"][i].item() == pytest.approx(0.75 * sum(s**2 for s, _ in pairs) / outputs)


def test_token_heads_score_labelled_tokens_only():
    """Distillation on padding trains the student toward what the teacher says of nothing."""
    student, teacher = two_sides(2, 3, 5)
    student.requires_grad_(True)
    labels = torch.tensor([[1, -100, 2], [-100, -100, 0]])
    terms = score(KD(3.0, 0.5), student, teacher, labels)
    for name, values in terms.items():
        assert values.shape == labels.shape
        assert bool((values[labels == -100] == 0).all()), name
    assert bool((terms["distill_loss"][labels != -100] > 0).all())
    torch.stack([values.sum() for values in terms.values()]).sum().backward()
    assert bool((student.grad[labels == -100] == 0).all())
    assert KD().count({"labels": labels})["distill_loss"] == 3


def test_unlabelled_examples_cost_nothing():
    """A value on a row that is not counted makes the loss of the labelled rows too large."""
    student, teacher = two_sides(3, 5)
    terms = score(KD(), student, teacher, torch.tensor([0, -100, 4]))
    assert terms["distill_loss"][1] == 0
    assert terms["task_loss"][1] == 0


# ---- laws ----


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_alpha_zero_is_cross_entropy(smoothing):
    """The baseline of every table is KD with alpha 0; it must also not pay for a teacher."""
    student, teacher = two_sides(3, 5)
    labels = torch.tensor([0, -100, 4])
    objective = KD(alpha=0.0, label_smoothing=smoothing)
    found = score(objective, student, teacher, labels)
    expected = score(CrossEntropy(smoothing), student, None, labels)
    assert found.keys() == expected.keys()
    assert torch.equal(found["task_loss"], expected["task_loss"])
    assert objective.needs == frozenset()


def test_alpha_one_needs_no_labels():
    """Unlabelled text is what a teacher is for."""
    student, teacher = two_sides(3, 5)
    objective = KD(alpha=1.0)
    assert score(objective, student, teacher).keys() == {"distill_loss"}
    assert objective.count({"input_ids": torch.zeros(3, 7)})["distill_loss"] == 3


def test_label_smoothing_acts_on_the_task_term_only():
    """Smoothed soft targets are another teacher than the one on the card."""
    student, teacher = two_sides(3, 5)
    labels = torch.tensor([0, 1, 4])
    plain, smooth = (score(KD(label_smoothing=s), student, teacher, labels) for s in (0.0, 0.2))
    assert torch.equal(plain["distill_loss"], smooth["distill_loss"])
    uniform = torch.tensor([-sum(log_softmax_by_loops(row)) / 5 for row in student.tolist()], dtype=torch.float64)
    torch.testing.assert_close(smooth["task_loss"], 0.8 * plain["task_loss"] + 0.2 * 0.5 * uniform)


@given(logit_pairs(), st.floats(-50, 50), st.sampled_from([1.0, 4.0]))
def test_kd_is_not_negative_and_blind_to_a_shift(pair, shift, temperature):
    """A loss below 0, or one that sees a constant added to the logits, compares no distributions."""
    student, teacher = (torch.tensor(rows, dtype=torch.float64) for rows in pair)
    values = score(KD(temperature, 1.0), student, teacher)["distill_loss"]
    assert bool((values >= -1e-12).all())
    moved = score(KD(temperature, 1.0), student + shift, teacher - shift)["distill_loss"]
    torch.testing.assert_close(values, moved, rtol=1e-9, atol=1e-9)
    assert float(score(KD(temperature, 1.0), teacher, teacher)["distill_loss"].abs().max()) < 1e-12


@pytest.mark.parametrize("side", ["both", "teacher"])
@pytest.mark.parametrize("problem_type", ["single_label_classification", "multi_label_classification", "regression"])
def test_gradients_are_those_of_the_value(side, problem_type):
    """A detached factor leaves the value right and trains in another direction."""
    student, teacher = two_sides(3, 4)
    student.requires_grad_(True)
    objective = KD(3.0, 1.0, side)
    assert torch.autograd.gradcheck(
        lambda z: score(objective, z, teacher, problem_type=problem_type)["distill_loss"], student
    )


def test_at_high_temperature_the_gradient_is_the_difference_of_centred_logits():
    """Hinton et al., section 2.1: with T^2 the gradient keeps its size, (z_s - z_t) / classes; without it, it vanishes."""
    student, teacher = two_sides(2, 5)
    student.requires_grad_(True)
    score(KD(1e4, 1.0), student, teacher)["distill_loss"].sum().backward()
    difference = student.detach() - teacher
    torch.testing.assert_close(student.grad, (difference - difference.mean(-1, keepdim=True)) / 5, rtol=1e-3, atol=1e-3)


# ---- refusals ----


@pytest.mark.parametrize("temperature", [0.0, -2.0, math.nan, math.inf])
def test_a_wrong_temperature_is_refused(temperature):
    """A negative temperature silently inverts the objective, and an infinite one makes every teacher uniform."""
    with pytest.raises(ValueError, match=f"temperature must be .*got {temperature}"):
        KD(temperature)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan])
def test_a_wrong_alpha_is_refused(alpha):
    """An alpha above 1 trains the student away from the labels."""
    with pytest.raises(ValueError, match=f"alpha.*got {alpha}"):
        KD(alpha=alpha)


def test_an_unknown_side_is_refused():
    """A mistyped side would be another paper's objective."""
    with pytest.raises(ValueError, match=r"both, teacher.*'student'"):
        KD(temperature_on="student")


def test_missing_labels_are_refused_while_there_is_a_task_term():
    """Without the sentence, unlabelled data fails with a KeyError that does not say that alpha=1 would do."""
    student, teacher = two_sides(3, 5)
    with pytest.raises(ValueError, match=r"needs labels.*alpha=1"):
        score(KD(alpha=0.9), student, teacher)
    with pytest.raises(ValueError, match="token heads need labels"):
        score(KD(alpha=1.0), *two_sides(2, 3, 5))


def test_a_teacher_that_does_not_fit_is_refused():
    """Logits over other classes broadcast, or fail inside torch, far from the cause."""
    student, teacher = two_sides(3, 5)
    labels = torch.tensor([0, 1, 4])
    with pytest.raises(ValueError, match=r"\(3, 4\).*\(3, 5\)"):
        score(KD(), student, teacher[:, :4], labels)
    with pytest.raises(ValueError, match=r"\(3, 1\).*\(3, 5\)"):
        score(KD(), student, teacher[:, :1], labels)
    with pytest.raises(ValueError, match="no logits"):
        score(KD(), student, None, labels)
    with pytest.raises(ValueError, match=r"KD needs a teacher"):
        KD()(SimpleNamespace(logits=student), None, {"labels": labels})
