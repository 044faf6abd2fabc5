"""DKD against loops over python floats, its law, its gradient and its refusals."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hfkd.functional import decoupled_divergence, kl_divergence
from hfkd.objectives import DKD, KD
from test_functional import kl_by_loops, logit_pairs
from test_objective_kd import score, two_sides


def softmax_by_loops(row: list[float], temperature: float) -> list[float]:
    top = max(row)
    weights = [math.exp((z - top) / temperature) for z in row]
    return [weight / sum(weights) for weight in weights]


def parts_by_loops(student: list[float], teacher: list[float], label: int, temperature: float) -> tuple[float, float]:
    s, t = softmax_by_loops(student, temperature), softmax_by_loops(teacher, temperature)
    target = t[label] * math.log(t[label] / s[label])
    target += (1 - t[label]) * math.log((1 - t[label]) / (1 - s[label]))
    others = [c for c in range(len(s)) if c != label]
    non_target = 0.0
    for c in others:
        p_t, p_s = t[c] / sum(t[o] for o in others), s[c] / sum(s[o] for o in others)
        non_target += p_t * math.log(p_t / p_s)
    return target, non_target


@pytest.mark.parametrize("weights", [(1.0, 8.0), (0.0, 1.0), (2.0, 0.0)])
@pytest.mark.parametrize("classes", [3, 100])
def test_dkd_equals_loops(classes, weights):
    """Swapped parts, a missing T^2 or the label left among the others is another method under DKD's name."""
    student, teacher = two_sides(4, classes)
    labels = torch.tensor([0, 2, 1, 2])
    found = score(DKD(*weights, temperature=4.0, alpha=0.5), student, teacher, labels)["distill_loss"]
    for i in range(4):
        target, non_target = parts_by_loops(student[i].tolist(), teacher[i].tolist(), int(labels[i]), 4.0)
        expected = 0.5 * 16 * (weights[0] * target + weights[1] * non_target)
        assert found[i].item() == pytest.approx(expected, rel=1e-8)


@given(logit_pairs(), st.sampled_from([1.0, 4.0]))
def test_kl_is_the_sum_of_its_two_parts(pair, temperature):
    """The law of the paper's section 3: parts that do not add up to KD do not decouple it."""
    student, teacher = (torch.tensor(rows, dtype=torch.float64) for rows in pair)
    labels = torch.arange(len(student)) % student.shape[-1]
    target, non_target = decoupled_divergence(student, teacher, labels, temperature)
    rest = 1 - (teacher / temperature).softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
    whole = kl_divergence(student, teacher, temperature)
    torch.testing.assert_close(target + rest * non_target, whole, rtol=1e-9, atol=1e-12)
    expected = [kl_by_loops(s, t, temperature) for s, t in zip(*pair, strict=True)]
    assert whole.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert bool((torch.stack([target, non_target]) >= -1e-12).all())


def test_with_two_classes_only_the_target_part_is_left():
    """Whoever tunes non_target_weight on a binary task tunes nothing; the docstring says so."""
    student, teacher = two_sides(4, 2)
    labels = torch.tensor([0, 1, 1, 0])
    found = score(DKD(1.0, 8.0, 3.0, alpha=1.0), student, teacher, labels)["distill_loss"]
    torch.testing.assert_close(found, score(KD(3.0, 1.0), student, teacher, labels)["distill_loss"])


@given(logit_pairs(), st.floats(-50, 50))
def test_dkd_is_blind_to_a_shift_and_zero_at_the_teacher(pair, shift):
    """Logits that say the same would cost something, and the student would learn the teacher's bias."""
    student, teacher = (torch.tensor(rows, dtype=torch.float64) for rows in pair)
    labels = torch.arange(len(student)) % student.shape[-1]
    values = score(DKD(alpha=1.0), student, teacher, labels)["distill_loss"]
    moved = score(DKD(alpha=1.0), student + shift, teacher - shift, labels)["distill_loss"]
    torch.testing.assert_close(values, moved, rtol=1e-8, atol=1e-8)
    assert float(score(DKD(alpha=1.0), teacher + shift, teacher, labels)["distill_loss"].abs().max()) < 1e-9


def test_gradients_are_those_of_the_value():
    """A masked entry that leaks into the gradient moves the label's logit by what the others say."""
    student, teacher = two_sides(3, 4)
    student.requires_grad_(True)
    labels = torch.tensor([0, -100, 3])
    assert torch.autograd.gradcheck(lambda z: score(DKD(), z, teacher, labels)["distill_loss"], student)


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sure_logits_stay_finite_with_their_gradient(classes, dtype):
    """log(1 - p) of a sure teacher is log(0): one such example makes all weights NaN."""
    student, teacher = (side.to(dtype) * 1e4 for side in two_sides(6, classes))
    student.requires_grad_(True)
    for answer in (teacher, -teacher):
        values = score(DKD(), student, answer, torch.arange(6) % classes)["distill_loss"]
        (gradient,) = torch.autograd.grad(values.sum(), student)
        assert bool(torch.isfinite(values).all())
        assert bool(torch.isfinite(gradient).all())


def test_labels_are_read_at_any_alpha():
    """A trainer that drops the labels column at alpha=1 would fail in the first step, after loading everything."""
    assert DKD(alpha=1.0).columns == ("labels",)
    with pytest.raises(ValueError, match="DKD needs labels"):
        score(DKD(alpha=1.0), *two_sides(3, 5))


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
@pytest.mark.parametrize("name", ["target_weight", "non_target_weight"])
def test_a_wrong_weight_is_refused(name, value):
    """A negative weight drives the student away from its teacher."""
    with pytest.raises(ValueError, match=f"^{name} must be .*got {value}"):
        DKD(**{name: value})


@pytest.mark.parametrize("temperature", [0.0, -2.0, math.nan, math.inf])
def test_a_wrong_temperature_is_refused(temperature):
    """A negative temperature silently inverts the objective."""
    with pytest.raises(ValueError, match=f"temperature must be .*got {temperature}"):
        DKD(temperature=temperature)
