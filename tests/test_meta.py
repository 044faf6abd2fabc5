"""Coordinators: the weights they may give, what they may see, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hfkd.meta import (
    OUTPUTS,
    CNet,
    ConstantWeights,
    FeatureTrunk,
    ImageTrunk,
    LogitTrunk,
    TextTrunk,
    WeightTable,
    trunk_for,
)
from hfkd.testing import tiny_roberta_config

STUDENTS, PARTS = ("small", "large"), ("task", "distill")


def batch(rows: int = 5) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {
        "pixel_values": torch.randn(rows, 3, 12, 12),
        "input_ids": torch.randint(5, 50, (rows, 7)),
        "attention_mask": torch.ones(rows, 7, dtype=torch.long),
        "features": torch.randn(rows, 2),
        "labels": torch.randint(0, 3, (rows,)),
        "example_id": torch.arange(rows) * 10,
    }


TRUNKS = {
    "image": lambda: ImageTrunk(width=16),
    "text": lambda: TextTrunk(50, 16),
    "features": lambda: FeatureTrunk("features", 2, 16),
    "logits": lambda: LogitTrunk(width=16),
}


def made(trunk: str, **settings) -> CNet:
    torch.manual_seed(0)
    found = CNet(TRUNKS[trunk](), **settings)
    found.build(STUDENTS, PARTS, 3, None)
    return found


def weights(coordinator, rows: int = 5, only: slice = slice(None)):
    torch.manual_seed(2)
    logits, teacher = torch.randn(rows, 2, 3), torch.randn(rows, 3)
    shown = {name: values[only] for name, values in batch(rows).items()}
    return coordinator(shown, logits[only], teacher[only])


@pytest.mark.parametrize("trunk", TRUNKS)
def test_an_examples_weights_are_its_own(trunk):
    """With statistics of the batch, how an example counts would depend on the rows beside it and on the number of GPUs."""
    coordinator = made(trunk)
    whole = weights(coordinator)
    assert whole.shape == (5, 2, 2) and whole.std(0).max() > 0
    torch.testing.assert_close(weights(coordinator, only=slice(1, 3)), whole[1:3])
    whole.sum().backward()
    assert all(parameter.grad is not None for parameter in coordinator.parameters())


def test_padding_is_not_read():
    """The same text would weigh differently beside a longer one."""
    trunk, shown = TextTrunk(50, 16), batch()
    padded = {
        "input_ids": torch.cat([shown["input_ids"], torch.full((5, 4), 1)], 1),
        "attention_mask": torch.cat([shown["attention_mask"], torch.zeros(5, 4, dtype=torch.long)], 1),
    }
    torch.testing.assert_close(trunk(padded), trunk(shown))


@given(scale=st.floats(0.1, 30), output=st.sampled_from(OUTPUTS))
def test_weights_stay_in_their_range(scale, output):
    """A negative weight makes a student maximise its loss."""
    coordinator = made("features", output=output)
    with torch.no_grad():
        coordinator.head.weight.mul_(scale)
    found = weights(coordinator)
    if output == "raw":
        raw = coordinator.head(coordinator.trunk(batch())).view(5, 2, 2)
        torch.testing.assert_close(found, raw)
    else:
        assert (found >= 0).all()
    if output in ("sigmoid", "product"):
        assert (found <= 1).all()
    if output == "product":  # a * b + a * (1 - b) = a
        a = coordinator.head(coordinator.trunk(batch())).view(5, 2, 2)[..., 0].sigmoid()
        torch.testing.assert_close(found.sum(-1), a)


def test_one_pair_for_all_students():
    """The ablation that shares weights must share them."""
    found = weights(made("features", shared=True))
    assert torch.equal(found[:, 0], found[:, 1])


def test_constant_weights_reach_their_student():
    """Weights in another order are another experiment."""
    coordinator = ConstantWeights(distill={"large": 0.9, "small": 0.2}, task=0.5)
    coordinator.build(STUDENTS, PARTS, 3, None)
    assert coordinator(batch())[3].tolist() == [[0.5, 0.2], [0.5, 0.9]] and not coordinator.learns


def test_a_table_is_read_by_the_rows_number():
    """Numbers of rows need not be 0 to n: the weight of another row would be learned."""
    table = WeightTable(learning_rate=1.0)
    table.build(STUDENTS, PARTS, 3, torch.tensor([20, 0, 40, 10, 30]))
    torch.testing.assert_close(table(batch())[0], torch.tensor([[0.1, 0.9]] * 2))
    optimizer = table.make_optimizer(1e-3, 0.0)
    (10 * table({"example_id": torch.tensor([30])})).sum().backward()
    optimizer.step()
    table.after_update()
    found = table(batch())
    assert found[3].max() < 1e-6 and torch.equal(found[[0, 1, 2, 4]], found[:1].expand(4, -1, -1))
    with pytest.raises(ValueError, match=r"\[50\] is not among"):
        table({"example_id": torch.tensor([50])})
    with pytest.raises(ValueError, match="streams"):
        WeightTable().build(STUDENTS, PARTS, 3, None)
    with pytest.raises(ValueError, match="one example_id"):
        WeightTable().build(STUDENTS, PARTS, 3, torch.tensor([1, 1]))


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (torch.tensor([2, -100]), [[0, 0, 1], [0, 0, 0]]),
        (torch.tensor([[0.2, 0.8, 0], [1, 0, 0]]), [[0.2, 0.8, 0], [1, 0, 0]]),
    ],
)
def test_a_label_is_seen_as_it_is(labels, expected):
    """A row without a label, mixup, or several labels stopped the run in the middle of torch; as class 0 it would lie."""
    trunk, ones = LogitTrunk(["label"]), torch.eye(3)
    trunk.build(1, 3)
    trunk.layers = torch.nn.Linear(3, 3, bias=False)
    trunk.layers.weight.data = ones
    assert torch.equal(trunk({"labels": labels}, None, None), torch.tensor(expected).float())


def test_the_default_reads_what_the_students_read():
    """A coordinator of images for texts would fail in the middle of torch."""
    assert isinstance(trunk_for(tiny_roberta_config(), ["input_ids", "label"]), TextTrunk)
    assert isinstance(trunk_for(tiny_roberta_config(), ["image", "label"]), ImageTrunk)
    with pytest.raises(ValueError, match="FeatureTrunk"):
        trunk_for(tiny_roberta_config(), ["numbers"])


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: CNet(ImageTrunk(), output="softmax"), "softmax"),
        (lambda: LogitTrunk(["loss"]), "loss"),
        (lambda: CNet(ImageTrunk(), output="product").build(STUDENTS, ("task",), 3, None), "product"),
        (lambda: ConstantWeights(task=1, mutual=1).build(STUDENTS, PARTS, 3, None), "no loss mutual"),
        (lambda: ConstantWeights(task={"small": 1}).build(STUDENTS, PARTS, 3, None), "small, large"),
        (lambda: weights_without_teacher(), "there is no teacher"),
    ],
)
def test_wrong_coordinators_are_refused(make, says):
    """Each would train: with weights that sum to one over students, or of a loss that nobody computes."""
    with pytest.raises(ValueError, match=says):
        make()


def weights_without_teacher():
    return made("logits")(batch(), torch.randn(5, 2, 3), None)
