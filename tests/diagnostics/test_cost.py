"""The size and speed that a card sets beside the teacher's."""

import pytest
import torch
from torch import nn
from transformers import RobertaForSequenceClassification

from hfkd.diagnostics import cost
from hfkd.diagnostics.cost import cost_of
from hfkd.testing import tiny_roberta_config


class Slow(nn.Module):
    """Each call takes the next of `seconds` on its own clock; it draws a number, as a masked auto-encoder does."""

    def __init__(self, seconds):
        super().__init__()
        self.seconds, self.now, self.modes = list(seconds), 0.0, []
        self.weight = nn.Parameter(torch.zeros(3, 2))
        self.frozen = nn.Parameter(torch.zeros(5), requires_grad=False)

    def forward(self, x):
        self.modes.append(self.training)
        torch.rand(3)
        self.now += self.seconds.pop(0)
        return x @ self.weight.T


def test_it_is_the_median_of_the_passes_after_the_first(monkeypatch):
    """The first pass allocates: a card with its time would call every student slow."""
    model = Slow([9.0, 0.002, 0.001, 5.0])
    monkeypatch.setattr(cost.time, "perf_counter", lambda: model.now)
    found = cost_of(model, {"x": torch.ones(4, 2)}, repeats=3)
    assert found.pop("milliseconds") == pytest.approx(2.0)
    assert found == {"parameters": 11, "rows": 4, "device": "cpu"} and model.seconds == []


def test_measuring_leaves_training_as_it_was():
    """A number drawn, or dropout left off, after measuring makes a run that was timed another run than one that was not."""
    model = Slow([0.0] * 3).train()
    model.weight.grad = None
    state = torch.get_rng_state()
    cost_of(model, {"x": torch.ones(4, 2)}, repeats=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and model.modes == [False] * 3 and model.weight.grad is None
    assert model.weight.requires_grad and not model.frozen.requires_grad


def test_shared_weights_count_once():
    """A tied head counted twice makes a student look larger than its file."""
    from transformers import RobertaForMaskedLM

    model = RobertaForMaskedLM(tiny_roberta_config())
    ids = torch.randint(5, 50, (2, 6))
    unique = {id(parameter): parameter.numel() for parameter in model.parameters()}
    assert cost_of(model, {"input_ids": ids}, repeats=1)["parameters"] == sum(unique.values())
    classifier = RobertaForSequenceClassification(tiny_roberta_config())
    assert cost_of(classifier, {"input_ids": ids, "return_dict": True}, repeats=1)["rows"] == 2


@pytest.mark.parametrize(("batch", "repeats"), [({}, 5), ({"x": "text"}, 5), ({"x": torch.ones(2, 2)}, 0)])
def test_what_cannot_be_timed_is_refused(batch, repeats):
    """A median of nothing is NaN on a public card."""
    with pytest.raises(ValueError, match="a time needs"):
        cost_of(Slow([0.0]), batch, repeats)
