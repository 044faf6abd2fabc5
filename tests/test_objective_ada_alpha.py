"""AdaAlpha against loops over python floats, its two laws (KD, cross-entropy), what it learns, and its refusals."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import RobertaForSequenceClassification

from hfkd.functional import class_reliability
from hfkd.objectives import KD, AdaAlpha, AdaMargin, BalancedStudent, CrossEntropy, GroupDRO
from hfkd.outputs import TeacherOutput
from hfkd.testing import check_objective, tiny_roberta_config
from rounds_run import classifier_trainer
from test_functional import kl_by_loops, log_softmax_by_loops, logit_pairs
from test_objective_kd import score, two_sides

ALPHA = torch.tensor([0.9, 0.0, 0.35, 1.0], dtype=torch.float64)


def with_alpha(alpha: torch.Tensor, **settings) -> AdaAlpha:
    objective = AdaAlpha(**settings)
    objective.alpha_ = alpha
    return objective


def dev_answers(classes: int, each: int = 7, seed: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """A teacher that knows the first classes well and the last not at all."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes).repeat(each)
    skill = torch.linspace(4, -1, classes, dtype=torch.float64)
    logits = torch.randn(len(labels), classes, generator=generator, dtype=torch.float64)
    return logits + skill[labels, None] * torch.eye(classes, dtype=torch.float64)[labels], labels


def reliability_by_loops(logits: torch.Tensor, labels: torch.Tensor) -> list[float]:
    """The definition as it is written: p_y minus the mean of the others, averaged over a class; no affine shortcut."""
    found: dict[int, list[float]] = {}
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        p = [math.exp(value) for value in log_softmax_by_loops(row)]
        others = [value for index, value in enumerate(p) if index != label]
        found.setdefault(label, []).append(p[label] - sum(others) / len(others))
    return [sum(found[label]) / len(found[label]) for label in range(logits.shape[1])]


# ---- values ----


@pytest.mark.parametrize("temperature", [1.0, 0.9, 4.0])
def test_ada_alpha_equals_loops(temperature):
    """Trust by the teacher's class, a temperature on the student's side, or T^2 is another method under this name."""
    student, teacher = two_sides(6, 4)
    labels = torch.tensor([0, 1, 2, 3, 3, -100])
    terms = score(with_alpha(ALPHA, temperature=temperature), student, teacher, labels)
    for i, label in enumerate(labels.tolist()):
        alpha = ALPHA[max(label, 0)].item()
        ours, theirs = student[i].tolist(), [z / temperature for z in teacher[i].tolist()]
        task = -(1 - alpha) * log_softmax_by_loops(ours)[label] if label >= 0 else 0.0
        distill = alpha * kl_by_loops(ours, theirs, 1.0) if label >= 0 else 0.0
        assert terms["task_loss"][i].item() == pytest.approx(task, rel=1e-10, abs=1e-14)
        assert terms["distill_loss"][i].item() == pytest.approx(distill, rel=1e-10, abs=1e-14)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_soft_labels_are_the_mean_over_hard_ones(smoothing):
    """Mixed images scored with the trust of one of their two classes are trained on the wrong teacher half the time."""
    student, teacher = two_sides(3, 4)
    soft = torch.tensor([[0.7, 0.0, 0.3, 0.0], [0.0, 1.0, 0.0, 0.0], [0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)
    objective = with_alpha(ALPHA, temperature=2.0, label_smoothing=smoothing)
    found = score(objective, student, teacher, soft)
    for name, values in found.items():
        hard = [score(objective, student, teacher, torch.full((3,), label))[name] for label in range(4)]
        torch.testing.assert_close(values, (soft * torch.stack(hard, dim=1)).sum(1), rtol=1e-12, atol=1e-14)
    assert objective.count({"labels": soft})["distill_loss"] == 3


def test_token_heads_take_the_trust_of_each_tokens_class():
    """One value for the row would trust the teacher on a rare tag as on the common one."""
    student, teacher = two_sides(2, 3, 4)
    labels = torch.tensor([[1, -100, 2], [-100, 0, 3]])
    terms = score(with_alpha(ALPHA), student, teacher, labels)
    rows = score(with_alpha(ALPHA), student.flatten(0, 1), teacher.flatten(0, 1), labels.flatten())
    for name, values in terms.items():
        assert torch.equal(values.flatten(), rows[name])
        assert bool((values[labels == -100] == 0).all())


# ---- laws ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@given(logit_pairs(), st.floats(0, 1), st.sampled_from([0.9, 1.0, 5.0]), st.booleans())
def test_a_constant_alpha_is_kd_bit_for_bit(dtype, pair, alpha, temperature, smoothed):
    """If the two differ at all, a table that compares AdaAlpha with KD compares two implementations."""
    smoothing = 0.1 if smoothed else 0.0
    student, teacher = (torch.tensor(rows, dtype=torch.float64).to(dtype) for rows in pair)
    labels = torch.arange(len(student)) % student.shape[1]
    labels[-1] = -100
    constant = torch.full((student.shape[1],), alpha, dtype=torch.float64)
    found = score(with_alpha(constant, temperature=temperature, label_smoothing=smoothing), student, teacher, labels)
    expected = score(KD(temperature, alpha, "teacher", smoothing), student, teacher, labels)
    for name, values in expected.items():
        assert torch.equal(found[name], values), name
    assert all(bool((found[name] == 0).all()) for name in found.keys() - expected.keys())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_learned_constant_is_kd_bit_for_bit(dtype):
    """The law must hold for what `fit` stores as well, or it holds only where nobody uses it."""
    logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 2.0]])
    objective = AdaAlpha(alpha=0.7).fit(logits, torch.arange(3))
    alpha = objective.alpha_[0].item()
    assert objective.alpha_.tolist() == [alpha] * 3
    student, teacher = (side.to(dtype) for side in two_sides(5, 3))
    labels = torch.tensor([0, 1, 2, -100, 1])
    expected = score(KD(1.0, alpha, "teacher"), student, teacher, labels)
    found = score(objective, student, teacher, labels)
    assert all(torch.equal(found[name], expected[name]) for name in ("task_loss", "distill_loss"))


def test_alpha_one_and_zero_are_the_teacher_alone_and_one_hot():
    """A class that is not trusted must train as in the baseline, gradient included, or the baseline is not one."""
    labels = torch.tensor([0, 1, 2, -100])
    for value, other in ((1.0, KD(3.0, 1.0, "teacher")), (0.0, CrossEntropy())):
        gradients = []
        for objective in (with_alpha(torch.full((4,), value), temperature=3.0), other):
            student, teacher = two_sides(4, 4)
            student.requires_grad_(True)
            loss = torch.stack([term.sum() for term in score(objective, student, teacher, labels).values()]).sum()
            (gradient,) = torch.autograd.grad(loss, student)
            gradients.append((loss.detach(), gradient))
        assert torch.equal(gradients[0][0], gradients[1][0])
        assert torch.equal(gradients[0][1], gradients[1][1])


def test_a_constant_alpha_trains_as_kd_and_a_resume_keeps_what_was_learned(tmp_path):
    """The law over a whole run; and a resumed run that is not fitted again must find its alpha, or stop."""
    torch.manual_seed(7)
    teacher = RobertaForSequenceClassification(tiny_roberta_config(num_labels=3)).double()
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    constant = torch.full((3,), 0.3, dtype=torch.float64)
    ours = classifier_trainer(tmp_path / "ada", settings, teacher=teacher, objective=with_alpha(constant))
    kd = classifier_trainer(tmp_path / "kd", settings, teacher=teacher, objective=KD(1.0, 0.3, "teacher"))
    resumed = classifier_trainer(tmp_path / "again", settings, teacher=teacher, objective=AdaAlpha())
    ours.train()
    kd.train()
    resumed.train(resume_from_checkpoint=tmp_path / "ada" / "checkpoint-2")
    expected = kd.model.state_dict()
    for trainer in (ours, resumed):
        found = trainer.model.state_dict()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert torch.equal(resumed.objective.alpha_, constant)


def test_the_setting_alpha_zero_asks_no_teacher_and_needs_no_fit():
    """The baseline of a sweep over alpha must not pay for a teacher, nor fail for want of a dev split."""
    student, teacher = two_sides(3, 4)
    labels = torch.tensor([0, 1, -100])
    objective = AdaAlpha(alpha=0.0)
    found, expected = score(objective, student, teacher, labels), score(CrossEntropy(), student, None, labels)
    assert found.keys() == expected.keys() and torch.equal(found["task_loss"], expected["task_loss"])
    assert objective.needs == frozenset()


def test_the_gradient_is_that_of_the_papers_cross_entropy():
    """KL in place of cross-entropy is free only if it moves the student alike."""
    teacher = two_sides(3, 4)[1]
    labels = torch.tensor([0, 2, 3])
    gradients = []
    for papers in (False, True):
        student = two_sides(3, 4)[0].requires_grad_(True)
        if papers:
            p = (teacher / 2.0).softmax(-1)
            one_hot = torch.eye(4, dtype=torch.float64)[labels]
            target = (1 - ALPHA[labels, None]) * one_hot + ALPHA[labels, None] * p
            loss = -(target * student.log_softmax(-1)).sum()
        else:
            terms = score(with_alpha(ALPHA, temperature=2.0), student, teacher, labels)
            loss = terms["task_loss"].sum() + terms["distill_loss"].sum()
        gradients.append(torch.autograd.grad(loss, student)[0])
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def test_predictions_and_evaluation_do_not_see_alpha():
    """An eval_loss that is weighted by trust does not compare across objectives."""
    student, _ = two_sides(3, 4)
    batch = {"labels": torch.tensor([0, 1, 2])}
    found = with_alpha(ALPHA).task(SimpleNamespace(logits=student), batch)["task_loss"]
    assert torch.equal(found, CrossEntropy().task(SimpleNamespace(logits=student), batch)["task_loss"])


# ---- what is learned ----


@pytest.mark.parametrize("classes", [2, 5, 100])
def test_reliability_equals_the_definition(classes):
    """p_y minus the largest other probability, the usual margin, or a mean that weighs classes by size, is another alpha."""
    logits, labels = dev_answers(classes)
    kept = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    kept = torch.cat([kept[: len(kept) // 2], torch.arange(classes)])  # classes of several sizes, in mixed order
    found = class_reliability(logits[kept], labels[kept])
    assert found.tolist() == pytest.approx(reliability_by_loops(logits[kept], labels[kept]), rel=1e-9, abs=1e-12)


@given(logit_pairs())
def test_reliability_is_affine_in_the_probability_of_the_label_and_bounded(pair):
    """The closed form (m p - 1) / (m - 1): a wrong m gives a guessing teacher some trust."""
    logits = torch.tensor(pair[0], dtype=torch.float64)
    classes = logits.shape[1]
    for label in range(classes):
        labels = torch.full((len(logits),), label)
        found = class_reliability(logits, labels)
        mean = logits.softmax(-1)[:, label].mean().item()
        assert found[label].item() == pytest.approx((classes * mean - 1) / (classes - 1), rel=1e-9, abs=1e-12)
        assert -1 / (classes - 1) - 1e-12 <= found[label].item() <= 1 + 1e-12
        assert bool(torch.isnan(found[torch.arange(classes) != label]).all()), "an absent class has no reliability"


def test_fit_clips_at_zero_and_scales():
    """A negative alpha drives the student away from its teacher; a scale that is dropped gives ImageNet five times 0.2."""
    logits, labels = dev_answers(5)
    expected = [max(0.0, value) for value in reliability_by_loops(logits, labels)]
    assert expected[-1] == 0.0 < expected[0], "the case must have a class that is clipped"
    assert AdaAlpha().fit(logits, labels).alpha_.tolist() == pytest.approx(expected, abs=1e-6)
    scaled = AdaAlpha(alpha=0.2).fit(logits, labels).alpha_.tolist()
    assert scaled == pytest.approx([0.2 * value for value in expected], abs=1e-6)


def test_fit_reads_logits_at_temperature_one_whatever_the_order_and_the_unlabelled():
    """If alpha depended on the temperature or on the order of the dev split, a sweep would change two things at once."""
    logits, labels = dev_answers(4)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
    unlabelled = torch.cat([logits[order], torch.full((3, 4), 9.0, dtype=torch.float64)])
    with_ignored = torch.cat([labels[order], torch.full((3,), -100)])
    expected = AdaAlpha(temperature=1.0).fit(logits, labels).alpha_
    torch.testing.assert_close(AdaAlpha(temperature=5.0).fit(unlabelled, with_ignored).alpha_, expected)


def test_what_was_learned_is_in_the_state_and_nothing_before():
    """A resumed run with another alpha, or with none, trains on with another loss."""
    objective = AdaAlpha()
    assert not objective.state_dict()
    objective.fit(*dev_answers(4))
    state = objective.state_dict()
    assert list(state) == ["alpha_"] and torch.equal(state["alpha_"], objective.alpha_)
    again = AdaAlpha().fit(*dev_answers(4, seed=9))
    assert not torch.equal(again.alpha_, objective.alpha_)
    again.load_state_dict(state)
    assert torch.equal(again.alpha_, objective.alpha_)
    assert not list(objective.parameters()), "the optimizer must not move what was measured"


def test_a_fitted_objective_keeps_the_contract():
    """What the check fits by itself is not what a user passes in."""
    check_objective(AdaAlpha(temperature=1.0, alpha=0.5).fit(*dev_answers(5)))


@pytest.mark.parametrize("kind", [AdaAlpha, AdaMargin, BalancedStudent, GroupDRO])
def test_a_step_asks_the_host_nothing_and_follows_the_logits_device(kind):
    """What was fitted on the CPU fails on a GPU, or a hidden read of a value makes it wait in every step; the meta device
    holds no values and refuses both."""
    objective = kind().fit(*dev_answers(4))
    logits = torch.zeros(3, 4, device="meta", requires_grad=True)
    batch = {"labels": torch.zeros(3, dtype=torch.long, device="meta")}
    terms = objective(SimpleNamespace(logits=logits), TeacherOutput(logits=logits.detach()), batch)
    assert all(values.device.type == "meta" and values.shape == (3,) for values in terms.values())


# ---- refusals ----


def test_use_before_fit_says_what_to_do():
    """An alpha of None fails inside torch, after the models are loaded, without a word on dev splits."""
    student, teacher = two_sides(3, 4)
    with pytest.raises(RuntimeError, match=r"call fit\(teacher_logits, labels\).*dev split"):
        score(AdaAlpha(), student, teacher, torch.tensor([0, 1, 2]))


def test_a_class_without_dev_example_is_named():
    """NaN for a rare class makes all weights NaN in the first step that shows it."""
    logits, labels = dev_answers(5)
    kept = (labels != 1) & (labels != 3)
    with pytest.raises(ValueError, match=r"2 of 5 classes have no example.*\(1, 3\)"):
        AdaAlpha().fit(logits[kept], labels[kept])
    with pytest.raises(ValueError, match=r"5 of 5 classes"):
        AdaAlpha().fit(logits, torch.full_like(labels, -100))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda z, y: (z.index_fill(0, torch.tensor([4]), math.nan), y), "1 of 28 .* example 4"),
        (lambda z, y: (z.index_fill(0, torch.tensor([4]), math.inf), y), "1 of 28 .* example 4"),
        (lambda z, y: (z[:-1], y), r"\(27, 4\) and \(28,\)"),
        (lambda z, y: (z[0], y), r"\(4,\) and \(28,\)"),
        (lambda z, y: (z[:, :1], y * 0), "two classes or more"),
        (lambda z, y: (z, y + 1), "labels run from 1 to 4, the classes from 0 to 3"),
        (lambda z, y: (z, y - 1), "labels run from -1 to 2"),
        (lambda z, y: (z, y.double()), "class ids.*float64"),
        (lambda z, y: (z, torch.eye(4)[y]), r"\(28, 4\)"),
    ],
)
def test_what_cannot_be_learned_from_is_refused(spoil, message):
    """A diverged teacher, other labels or shuffled files give some alpha, and the run looks sound."""
    with pytest.raises(ValueError, match=message):
        AdaAlpha().fit(*spoil(*dev_answers(4)))


def test_other_classes_than_the_students_are_refused_when_built_and_when_used():
    """An alpha of ten classes under a student of four is read at the wrong places without a word."""
    objective = AdaAlpha().fit(*dev_answers(10))
    with pytest.raises(ValueError, match=r"\(10,\), the student has 4 labels"):
        objective.build(SimpleNamespace(num_labels=4), None, None)
    student, teacher = two_sides(3, 4)
    with pytest.raises(ValueError, match=r"\(10,\), the student has 4 labels"):
        objective(SimpleNamespace(logits=student), TeacherOutput(logits=teacher), {"labels": torch.arange(3)})


def test_missing_labels_and_a_missing_teacher_are_refused():
    """At alpha=1 KD needs no labels: AdaAlpha does, and must say so and not fail with a KeyError."""
    student, teacher = two_sides(3, 4)
    with pytest.raises(ValueError, match="AdaAlpha reads the labels"):
        score(with_alpha(ALPHA), student, teacher)
    with pytest.raises(ValueError, match="AdaAlpha needs a teacher"):
        with_alpha(ALPHA)(SimpleNamespace(logits=student), None, {"labels": torch.arange(3)})
    with pytest.raises(ValueError, match=r"\(3, 3\).*\(3, 4\)"):
        score(with_alpha(ALPHA), student, teacher[:, :3], torch.arange(3))


@pytest.mark.parametrize("temperature", [0.0, -2.0, math.nan, math.inf])
def test_a_wrong_temperature_is_refused(temperature):
    """A negative temperature silently inverts the objective."""
    with pytest.raises(ValueError, match=f"temperature must be .*got {temperature}"):
        AdaAlpha(temperature)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan])
def test_a_wrong_alpha_is_refused(alpha):
    """An alpha above 1 trains the student away from the labels."""
    with pytest.raises(ValueError, match=f"alpha.*got {alpha}"):
        AdaAlpha(alpha=alpha)
