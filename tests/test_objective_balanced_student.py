"""BalancedStudent against loops over python floats, what it is for, and its refusals."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from hfkd.objectives import KD, BalancedStudent, CrossEntropy
from test_functional import kl_by_loops, log_softmax_by_loops
from test_objective_kd import score, two_sides

COUNTS = [50, 20, 8, 2]
LABELS = torch.repeat_interleave(torch.arange(4), torch.tensor(COUNTS))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_both_terms_are_of_the_adjusted_logits(alpha, scale):
    """With the sign turned, or one term on the raw logits, rare classes are predicted even less often."""
    student, teacher = two_sides(5, 4)
    labels = torch.tensor([0, 1, 2, 3, -100])
    terms = score(BalancedStudent(2.0, scale, alpha).fit(None, LABELS), student, teacher, labels)
    for i, label in enumerate(labels.tolist()):
        adjusted = [z + scale * math.log(n / sum(COUNTS)) for z, n in zip(student[i].tolist(), COUNTS, strict=True)]
        if alpha < 1:
            expected = -(1 - alpha) * log_softmax_by_loops(adjusted)[label] if label >= 0 else 0.0
            assert terms["task_loss"][i].item() == pytest.approx(expected, rel=1e-6, abs=1e-12)
        if alpha > 0:
            expected = alpha * kl_by_loops(adjusted, [z / 2.0 for z in teacher[i].tolist()], 1.0) if label >= 0 else 0.0
            assert terms["distill_loss"][i].item() == pytest.approx(expected, rel=1e-5, abs=1e-12)


def test_it_learns_equal_classes_from_unequal_ones():
    """The purpose (Menon et al. 2021, section 4): fitted on a 25 : 1 prior, the raw logits must not know of the prior."""
    logits = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    objective = BalancedStudent(alpha=0.0).fit(None, LABELS)
    optimizer = torch.optim.LBFGS([logits], line_search_fn="strong_wolfe", max_iter=50)

    def closure():
        optimizer.zero_grad()
        loss = score(objective, logits.expand(len(LABELS), 4), None, LABELS)["task_loss"].mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert logits.softmax(-1).flatten().tolist() == pytest.approx([0.25] * 4, abs=1e-4)


def test_without_an_adjustment_it_is_kd():
    """If prior_scale=0 is not KD, a gain over KD may be one of the implementation."""
    student, teacher = two_sides(4, 4)
    labels = torch.tensor([0, 3, -100, 2])
    found = score(BalancedStudent(3.0, 0.0, 0.8, 0.1).fit(None, LABELS), student, teacher, labels)
    expected = score(KD(3.0, 0.8, "teacher", 0.1), student, teacher, labels)
    assert all(torch.equal(found[name], expected[name]) for name in ("task_loss", "distill_loss"))
    even = BalancedStudent(3.0, 1.0, 0.8).fit(None, torch.arange(4))
    same = score(even, student, teacher, labels)["distill_loss"]
    torch.testing.assert_close(same, expected["distill_loss"])


def test_evaluation_is_by_the_raw_logits():
    """Evaluated with the training prior, the adjustment is undone and the method looks useless."""
    student, _ = two_sides(3, 4)
    batch = {"labels": torch.tensor([0, 1, 3])}
    found = BalancedStudent().fit(None, LABELS).task(SimpleNamespace(logits=student), batch)["task_loss"]
    assert torch.equal(found, CrossEntropy().task(SimpleNamespace(logits=student), batch)["task_loss"])


def test_the_prior_is_that_of_the_labelled_rows_and_saved():
    """Unlabelled rows counted as a class, or a prior lost on resume, is another prior."""
    objective = BalancedStudent()
    assert not objective.state_dict()
    objective.fit(None, torch.cat([LABELS, torch.full((7,), -100)]))
    assert objective.log_prior_.exp().tolist() == pytest.approx([n / 80 for n in COUNTS])
    assert list(objective.state_dict()) == ["log_prior_"]
    assert BalancedStudent(alpha=0.0).needs == frozenset(), "Menon et al.'s own loss asks no teacher"


def test_what_gives_no_prior_is_refused():
    """log 0 of a class without a row makes the first batch that shows it infinite."""
    with pytest.raises(ValueError, match=r"1 of 4 classes have no example in the training split \(2\)"):
        BalancedStudent().fit(None, LABELS[LABELS != 2])
    with pytest.raises(ValueError, match="no labels"):
        BalancedStudent().fit(None, torch.full((3,), -100))
    with pytest.raises(ValueError, match="labels run from -1 to 2"):
        BalancedStudent().fit(None, LABELS - 1)
    with pytest.raises(ValueError, match=r"class ids.*float32"):
        BalancedStudent().fit(None, torch.eye(4))


def test_use_before_fit_and_on_other_classes_is_refused():
    """A last class without any row shortens the prior by one: it must not be read one class off."""
    student, teacher = two_sides(3, 4)
    with pytest.raises(RuntimeError, match=r"log_prior_ yet: call fit\(None, labels\)"):
        score(BalancedStudent(), student, teacher)
    short = BalancedStudent().fit(None, LABELS[LABELS != 3])
    with pytest.raises(ValueError, match=r"\(3,\), the student has 4 labels"):
        short.build(SimpleNamespace(num_labels=4), None, None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prior_scale": -1.0}, "prior_scale.*-1"),
        ({"temperature": 0.0}, "temperature.*0.0"),
        ({"alpha": 2.0}, "alpha.*2.0"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    """A negative scale favours the frequent classes twice."""
    with pytest.raises(ValueError, match=message):
        BalancedStudent(**settings)
