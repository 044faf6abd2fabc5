"""Hard labels of a teacher, or of an ensemble that votes or draws."""

import math

import pytest
import torch
from transformers.utils import ModelOutput

from hfkd.objectives import KD, PseudoLabel
from hfkd.outputs import TeacherOutput


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
