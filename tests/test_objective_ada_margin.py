"""AdaMargin: its two forms, each variant against loops over python floats, its laws and its refusals."""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hfkd.objectives import KD, AdaMargin, CrossEntropy
from hfkd.objectives.ada_margin import VARIANTS
from hfkd.outputs import TeacherOutput
from hfkd.testing import check_objective, classification_case
from test_functional import kl_by_loops, log_softmax_by_loops, logit_pairs
from test_objective_ada_alpha import dev_answers, reliability_by_loops
from test_objective_kd import score, two_sides


def with_offset(offset: torch.Tensor, **settings) -> AdaMargin:
    objective = AdaMargin(**settings)
    objective.offset_ = offset
    return objective


def margin_form_by_loops(student: list[float], teacher: list[float], alpha: list[float]) -> float:
    """sum_y p_t(y) log(1 + sum_{j != y} (alpha_j / alpha_y) exp(z_j - z_y)), as the notes on the paper write it."""
    total = 0.0
    for y, log_p in enumerate(log_softmax_by_loops(teacher)):
        others = (alpha[j] / alpha[y] * math.exp(student[j] - student[y]) for j in range(len(student)) if j != y)
        total += math.exp(log_p) * math.log1p(sum(others))
    return total


def entropy_by_loops(teacher: list[float]) -> float:
    return -sum(math.exp(log_p) * log_p for log_p in log_softmax_by_loops(teacher))


# ---- values ----


@given(logit_pairs(), st.floats(0.5, 5), st.data())
def test_the_two_forms_are_one(pair, temperature, data):
    """A sign turned in log alpha gives unreliable classes a smaller margin, the opposite of the method."""
    classes = len(pair[0][0])
    alpha = data.draw(st.lists(st.floats(0.01, 1), min_size=classes, max_size=classes))
    student, teacher = (torch.tensor(rows, dtype=torch.float64) for rows in pair)
    objective = with_offset(torch.tensor(alpha, dtype=torch.float64).log(), temperature=temperature)
    found = score(objective, student, teacher)["distill_loss"].tolist()
    for value, ours, theirs in zip(found, *pair, strict=True):
        softened = [z / temperature for z in theirs]
        expected = margin_form_by_loops(ours, softened, alpha) - entropy_by_loops(softened)
        assert value == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_variant_equals_loops_from_fit_to_loss(variant):
    """Variants that are not what their names say would be compared as three methods and be one."""
    student, teacher = two_sides(5, 4)
    labels = torch.tensor([0, 1, 2, 3, 3])
    logits, dev_labels = dev_answers(4)
    objective = AdaMargin(2.0, variant, margin_scale=1.5, alpha_floor=0.05).fit(logits, dev_labels)
    found = score(objective, student, teacher, labels)["distill_loss"]
    reliability = reliability_by_loops(logits, dev_labels)
    assert min(reliability) < 0.05 < max(reliability), "the case must have a class at the floor"
    for i, label in enumerate(labels.tolist()):
        moved = student[i].tolist()
        for c, gamma in enumerate(reliability):
            if variant == "gamma_additive":
                moved[c] += 1.5 * gamma
            elif variant == "logit_adjust" or c == label:
                moved[c] += 1.5 * math.log(max(0.05, gamma))
        expected = kl_by_loops(moved, [z / 2.0 for z in teacher[i].tolist()], 1.0)
        assert found[i].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_unreliable_class_is_pushed_further(variant):
    """A student that answers like its teacher must be asked for more on the class that the teacher errs on, not less."""
    objective = AdaMargin(variant=variant).fit(*dev_answers(4))
    gradients = []
    for label in (0, 3):  # the teacher knows class 0 best and class 3 not at all
        logits = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
        teacher = 3 * torch.eye(4, dtype=torch.float64)[label : label + 1]
        value = score(objective, logits, teacher, torch.tensor([label]))["distill_loss"].sum()
        gradients.append(torch.autograd.grad(value, logits)[0][0, label].item())
    assert gradients[1] < gradients[0] < 0


# ---- laws ----


@pytest.mark.parametrize("variant", VARIANTS)
def test_without_a_margin_it_is_kd_bit_for_bit(variant):
    """If margin_scale=0 is not KD, a gain of the method may be a gain of its implementation."""
    student, teacher = two_sides(4, 5)
    labels = torch.tensor([0, 4, -100, 2])
    objective = AdaMargin(3.0, variant, margin_scale=0.0, alpha=0.8, label_smoothing=0.1).fit(*dev_answers(5))
    found = score(objective, student, teacher, labels)
    expected = score(KD(3.0, 0.8, "teacher", 0.1), student, teacher, labels)
    assert all(torch.equal(found[name], expected[name]) for name in ("task_loss", "distill_loss"))


@pytest.mark.parametrize("variant", ["logit_adjust", "gamma_additive"])
def test_equally_reliable_classes_have_no_margin(variant):
    """One offset for all classes is blind to softmax: a loss that sees it is not a margin between classes."""
    student, teacher = two_sides(4, 5)
    objective = AdaMargin(variant=variant).fit(2 * torch.eye(5), torch.arange(5))
    assert bool((objective.offset_ != 0).all())
    found = score(objective, student, teacher)["distill_loss"]
    torch.testing.assert_close(found, score(KD(1.0, 1.0, "teacher"), student, teacher)["distill_loss"])


def test_task_term_and_evaluation_use_the_raw_logits():
    """Evaluated with the offset, the unreliable classes would never be predicted, and eval_loss compare with nothing."""
    student, teacher = two_sides(3, 5)
    labels = torch.tensor([0, 4, 2])
    objective = AdaMargin(alpha=0.25).fit(*dev_answers(5))
    plain = CrossEntropy().task(SimpleNamespace(logits=student), {"labels": labels})["task_loss"]
    assert torch.equal(objective.task(SimpleNamespace(logits=student), {"labels": labels})["task_loss"], plain)
    assert torch.equal(score(objective, student, teacher, labels)["task_loss"], 0.75 * plain)
    kept = student.clone()
    objective(SimpleNamespace(logits=student), TeacherOutput(logits=teacher), {"labels": labels})
    assert torch.equal(student, kept), "the logits that are predicted from were moved in place"


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_keeps_the_contract_also_when_one_class_is_worthless(variant):
    """log 0 without a floor makes the loss infinite as soon as the teacher misses a class, as it does on long tails."""
    objective = AdaMargin(variant=variant, alpha=0.5).fit(*dev_answers(5))
    check_objective(objective, zero_at_teacher=False)
    check_objective(objective, functools.partial(classification_case, num_labels=5), zero_at_teacher=False)


@pytest.mark.parametrize("variant", ["logit_adjust", "gamma_additive"])
def test_soft_labels_reach_the_task_term_only(variant):
    """Mixed labels are no reason to leave the margins out: they belong to the classes, not to the label."""
    student, teacher = two_sides(3, 4)
    soft = torch.tensor([[0.7, 0.0, 0.3, 0.0], [0.0, 1.0, 0.0, 0.0], [0.1, 0.2, 0.3, 0.4]])
    objective = AdaMargin(variant=variant, alpha=0.5).fit(*dev_answers(4))
    found = score(objective, student, teacher, soft)
    hard = score(objective, student, teacher, torch.tensor([0, 1, 2]))
    assert torch.equal(found["distill_loss"], hard["distill_loss"])
    torch.testing.assert_close(found["task_loss"], -0.5 * (soft.double() * student.log_softmax(-1)).sum(-1))


def test_token_heads_take_the_margin_of_each_tokens_class():
    """LDAM's margin of the row's first label on all tokens would train tags against each other."""
    student, teacher = two_sides(2, 3, 4)
    labels = torch.tensor([[1, -100, 2], [-100, 0, 3]])
    objective = AdaMargin(variant="ldam").fit(*dev_answers(4))
    found = score(objective, student, teacher, labels)["distill_loss"]
    rows = score(objective, student.flatten(0, 1), teacher.flatten(0, 1), labels.flatten())["distill_loss"]
    assert torch.equal(found.flatten(), rows)
    assert bool((found[labels == -100] == 0).all())


def test_what_was_learned_is_in_the_state():
    """A resumed run with other margins trains on with another loss."""
    objective = AdaMargin()
    assert not objective.state_dict()
    state = objective.fit(*dev_answers(4)).state_dict()
    assert list(state) == ["offset_"] and not list(objective.parameters())
    assert objective.settings().keys() == {
        *("temperature", "variant", "margin_scale", "alpha_floor", "alpha", "label_smoothing")
    }


# ---- refusals ----


def test_use_before_fit_and_on_other_classes_is_refused():
    """Without the sentence nobody knows that margins are learned from a dev split."""
    student, teacher = two_sides(3, 4)
    with pytest.raises(RuntimeError, match="AdaMargin has not learned offset_ yet: call fit"):
        score(AdaMargin(), student, teacher)
    with pytest.raises(ValueError, match=r"\(6,\), the student has 4 labels"):
        AdaMargin().fit(*dev_answers(6)).build(SimpleNamespace(num_labels=4), None, None)
    with pytest.raises(ValueError, match="1 of 4 classes have no example"):
        logits, labels = dev_answers(4)
        AdaMargin().fit(logits[labels != 2], labels[labels != 2])


def test_ldam_says_that_it_needs_class_ids():
    """The margin of the larger part of a mixed image would be a method that nobody described."""
    student, teacher = two_sides(3, 4)
    objective = AdaMargin(variant="ldam").fit(*dev_answers(4))
    with pytest.raises(ValueError, match="mixup and cutmix off"):
        score(objective, student, teacher, torch.full((3, 4), 0.25))
    with pytest.raises(ValueError, match="AdaMargin reads the labels"):
        score(objective, student, teacher)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variant": "cosface"}, "logit_adjust, ldam, gamma_additive, got 'cosface'"),
        ({"margin_scale": -1.0}, "margin_scale must be .*got -1"),
        ({"margin_scale": math.nan}, "margin_scale must be .*got nan"),
        ({"alpha_floor": 0.0}, "alpha_floor must lie .*got 0.0"),
        ({"alpha_floor": 1.5}, "alpha_floor must lie .*got 1.5"),
        ({"alpha_floor": math.nan}, "alpha_floor must lie .*got nan"),
        ({"temperature": -2.0}, "temperature must be .*got -2.0"),
        ({"alpha": 1.1}, "alpha.*got 1.1"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    """A negative scale gives reliable classes the larger margin, and a floor of 0 forbids a class."""
    with pytest.raises(ValueError, match=message):
        AdaMargin(**settings)
