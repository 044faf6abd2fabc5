"""Hard labels of a teacher, or of an ensemble that votes or draws."""

import math

import pytest
import torch
from transformers.utils import ModelOutput

from hfkd.objectives import KD, PseudoLabel
from hfkd.outputs import TeacherOutput
from hfkd.testing import check_objective, token_case


def test_the_loss_is_the_cross_entropy_of_the_teachers_class():
    """Soft targets under the name of hard ones are another method: averaged soft labels do not denoise as a vote does."""
    torch.manual_seed(0)
    student, teacher = torch.randn(6, 4).double(), torch.randn(6, 4).double()
    found = PseudoLabel()(ModelOutput(logits=student), TeacherOutput(logits=teacher), {})["distill_loss"]
    for row in range(6):
        named = max(range(4), key=lambda c: teacher[row, c].item())
        exps = [math.exp(z) for z in student[row].tolist()]
        assert found[row].item() == pytest.approx(-math.log(exps[named] / sum(exps)), rel=1e-12)


def test_labels_win_over_logits():
    """An ensemble that voted is not asked for its argmax again."""
    student = torch.tensor([[2.0, 0.0], [2.0, 0.0]])
    answer = TeacherOutput(logits=torch.tensor([[9.0, 0.0], [9.0, 0.0]]), labels=torch.tensor([1, 0]))
    found = PseudoLabel()(ModelOutput(logits=student), answer, {})["distill_loss"]
    assert found[0] > 2 and found[1] < 0.2


def test_soft_targets_of_a_vote_are_refused_with_the_way_out():
    """A vote has no logits: the error must name the objective that reads labels."""
    answer = TeacherOutput(labels=torch.tensor([1, 0]))
    with pytest.raises(ValueError, match="PseudoLabel"):
        KD(alpha=1.0)(ModelOutput(logits=torch.randn(2, 2)), answer, {})
    with pytest.raises(ValueError, match="neither"):
        PseudoLabel()(ModelOutput(logits=torch.randn(2, 2)), TeacherOutput(), {})


# ---- soft ----


@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_soft_labels_keep_the_contract(alpha):
    """A soft loss that averages over classes or leaks gradients to the teacher still falls."""
    check_objective(PseudoLabel(alpha, soft=True), zero_at_teacher=False)
    check_objective(PseudoLabel(alpha, soft=True), token_case, zero_at_teacher=False)


def test_soft_labels_are_the_teachers_probabilities():
    """A divergence, a mean over classes or a temperature would be another weight of the term."""
    torch.manual_seed(0)
    student, teacher = torch.randn(6, 4).double(), torch.randn(6, 4).double()
    found = PseudoLabel(soft=True)(ModelOutput(logits=student), TeacherOutput(logits=teacher), {})["distill_loss"]
    for row in range(6):
        ours, theirs = ([math.exp(z) for z in side[row].tolist()] for side in (student, teacher))
        expected = -sum(t / sum(theirs) * math.log(s / sum(ours)) for s, t in zip(ours, theirs, strict=True))
        assert found[row].item() == pytest.approx(expected, rel=1e-12)


def test_soft_labels_have_the_gradient_of_kd_at_temperature_1():
    """The docstring says so, and whoever compares the two relies on it."""
    torch.manual_seed(0)
    teacher, gradients = TeacherOutput(logits=torch.randn(6, 4).double()), []
    for objective in (PseudoLabel(soft=True), KD(temperature=1.0, alpha=1.0)):
        student = torch.linspace(-2, 2, 24, dtype=torch.float64).view(6, 4).requires_grad_()
        objective(ModelOutput(logits=student), teacher, {})["distill_loss"].sum().backward()
        gradients.append(student.grad)
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


def test_shares_of_votes_cost_what_hard_labels_cost_on_average():
    """EPL's soft limit of RPL: the two must differ in noise only, not in the loss."""
    torch.manual_seed(0)
    student = ModelOutput(logits=torch.randn(6, 3).double())
    votes = torch.randint(3, (5, 6))
    shares = torch.nn.functional.one_hot(votes, 3).double().mean(0)
    soft = PseudoLabel(soft=True)(student, TeacherOutput(labels=shares), {})["distill_loss"]
    hard = [PseudoLabel()(student, TeacherOutput(labels=labels), {})["distill_loss"] for labels in votes]
    torch.testing.assert_close(soft, torch.stack(hard).mean(0), rtol=0, atol=1e-12)


def test_hard_and_soft_are_not_mixed_up():
    """Probabilities rounded to class ids are all class 0; class ids taken for probabilities are no distribution."""
    student = ModelOutput(logits=torch.randn(4, 3))
    with pytest.raises(ValueError, match=r"PseudoLabel\(soft=True\)"):
        PseudoLabel()(student, TeacherOutput(labels=torch.full((4, 3), 1 / 3)), {})
    with pytest.raises(ValueError, match=r"EnsembleTeacher\(..., soft=True\)"):
        PseudoLabel(soft=True)(student, TeacherOutput(labels=torch.tensor([0, 1, 2, 0])), {})
    with pytest.raises(ValueError, match=r"\(4, 5\).*\(4, 3\)"):
        PseudoLabel(soft=True)(student, TeacherOutput(logits=torch.randn(4, 5)), {})
    with pytest.raises(ValueError, match="neither"):
        PseudoLabel(soft=True)(student, TeacherOutput(), {})


def test_soft_is_on_the_record():
    """A card that does not say hard or soft describes two methods."""
    assert PseudoLabel(soft=True).settings() == {"alpha": 1.0, "label_smoothing": 0.0, "soft": True}
    assert PseudoLabel().paper == "2203.14649"
