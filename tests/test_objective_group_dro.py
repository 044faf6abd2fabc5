"""GroupDRO against loops over python floats, over processes, through the trainer, and its refusals."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import torch.distributed
from hypothesis import given
from hypothesis import strategies as st

from hfkd.objectives import CrossEntropy, GroupDRO
from hfkd.testing import check_objective, classification_case
from rounds_run import classifier_trainer
from test_functional import log_softmax_by_loops

LABELS = torch.tensor([0, 0, 0, 2, 2, 0, -100, 2])  # no example of class 1


def logits_of_batch(rows: int = 8, classes: int = 3, seed: int = 0, training: bool = True) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, classes, dtype=torch.float64, generator=generator).requires_grad_(training)


def loss_of(objective: GroupDRO, logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """As the trainer reduces it."""
    terms = objective(SimpleNamespace(logits=logits), None, batch)
    assert terms.keys() == {"task_loss"} and terms["task_loss"].shape == batch["labels"].shape
    return terms["task_loss"].sum() / objective.count(batch)["task_loss"]


def step_by_loops(weights, logits, labels, groups, step_size) -> tuple[list[float], float]:
    """Algorithm 1 for one batch: weights first, loss with the new ones."""
    losses: list[list[float]] = [[] for _ in weights]
    for row, label, group in zip(logits.tolist(), labels.tolist(), groups.tolist(), strict=True):
        if label != -100:
            losses[group].append(-log_softmax_by_loops(row)[label])
    means = [sum(values) / len(values) if values else 0.0 for values in losses]
    moved = [weight * math.exp(step_size * mean) for weight, mean in zip(weights, means, strict=True)]
    moved = [weight / sum(moved) for weight in moved]
    return moved, sum(weight * mean for weight, mean in zip(moved, means, strict=True))


# ---- values ----


@pytest.mark.parametrize("grouped", [False, True])
def test_several_steps_equal_loops(grouped):
    """Means over the batch in place of groups, or weights that lag one step, is plain training under another name."""
    groups = torch.tensor([1, 0, 0, 1, 1, 0, 0, 1]) if grouped else LABELS
    objective = GroupDRO(step_size=0.5, groups=2 if grouped else None)
    objective.build(SimpleNamespace(num_labels=3), None, None)
    batch = {"labels": LABELS, **({"group": groups} if grouped else {})}
    weights = [1 / 2] * 2 if grouped else [1 / 3] * 3
    for step in range(4):
        logits = 3 * logits_of_batch(seed=step)
        weights, expected = step_by_loops(weights, logits.detach(), LABELS, groups, 0.5)
        assert loss_of(objective, logits, batch).item() == pytest.approx(expected, rel=1e-6)
        assert objective.group_weights_.tolist() == pytest.approx(weights, rel=1e-6)


def test_the_gradient_is_the_weighted_one_of_the_groups():
    """A gradient through the weights or the group means would be of another objective than the paper's step."""
    objective = GroupDRO(step_size=0.5)
    logits = logits_of_batch()
    (found,) = torch.autograd.grad(loss_of(objective, logits, {"labels": LABELS}), logits)
    probabilities = logits.detach().softmax(-1)
    for i, label in enumerate(LABELS.tolist()):
        if label == -100:
            assert bool((found[i] == 0).all())
            continue
        share = objective.group_weights_[label] / (label == LABELS).sum()
        torch.testing.assert_close(found[i], share * (probabilities[i] - torch.eye(3, dtype=torch.float64)[label]))


def test_one_group_step_by_equal_weights_is_the_mean_over_classes():
    """With frozen weights the loss is the class-balanced mean: a rare class must not count by its size."""
    objective = GroupDRO()
    logits = logits_of_batch(training=False)
    values = CrossEntropy()(SimpleNamespace(logits=logits), None, {"labels": LABELS})["task_loss"]
    means = [values[label == LABELS].mean().item() for label in (0, 2)]
    assert loss_of(objective, logits, {"labels": LABELS}).item() == pytest.approx(sum(means) / 3)  # class 1 adds 0


def test_it_serves_the_worst_group():
    """The purpose: of two groups that want opposite answers, the large one wins under the mean, and none here."""
    labels = torch.tensor([0] * 9 + [1])
    batch = {"labels": labels}
    shares = []
    for objective in (GroupDRO(step_size=0.2), CrossEntropy()):
        bias = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        for _ in range(400):
            logits = bias.expand(10, 2)
            terms = objective(SimpleNamespace(logits=logits), None, batch)
            (gradient,) = torch.autograd.grad(terms["task_loss"].sum() / 10, bias)
            bias = (bias - 0.2 * gradient).detach().requires_grad_(True)
        shares.append(bias.softmax(-1)[1].item())
    assert shares == pytest.approx([0.5, 0.1], abs=0.02)


@given(st.lists(st.floats(0, 1e5), min_size=3, max_size=3), st.floats(1e-3, 10))
def test_weights_stay_a_distribution_at_any_loss(sizes, step_size):
    """exp of a large loss overflows: one bad batch, and all weights are NaN for the rest of the run."""
    objective = GroupDRO(step_size)
    logits = torch.diag(-torch.tensor(sizes, dtype=torch.float32)).requires_grad_(True)
    for _ in range(3):
        loss = loss_of(objective, logits, {"labels": torch.arange(3)})
        assert bool(torch.isfinite(loss)) and bool((objective.group_weights_ >= 0).all())
        assert objective.group_weights_.sum().item() == pytest.approx(1.0, abs=1e-5)
    again = torch.zeros(3, 3).requires_grad_(True)
    assert bool(torch.isfinite(loss_of(objective, again, {"labels": torch.arange(3)})))


# ---- when the weights move, and what is kept of them ----


def test_weights_move_in_training_only():
    """Evaluated on the test set, they would learn which classes are hard there: the test set trains."""
    objective = GroupDRO(step_size=1.0)
    objective.build(SimpleNamespace(num_labels=3), None, None)
    before = objective.group_weights_.clone()
    batch = {"labels": LABELS}
    with torch.no_grad():
        objective(SimpleNamespace(logits=logits_of_batch() * 1.0), None, batch)
    objective.task(SimpleNamespace(logits=logits_of_batch()), batch)
    assert torch.equal(objective.group_weights_, before)
    loss_of(objective, logits_of_batch(), batch)
    assert not torch.equal(objective.group_weights_, before)
    assert not objective.group_weights_.requires_grad and not list(objective.parameters())


def test_evaluation_is_plain_cross_entropy():
    """A weighted eval_loss moves with the weights and compares with nothing."""
    student, batch = SimpleNamespace(logits=logits_of_batch()), {"labels": LABELS}
    assert torch.equal(GroupDRO().task(student, batch)["task_loss"], CrossEntropy().task(student, batch)["task_loss"])


def test_a_resumed_run_goes_on_and_a_new_student_starts_anew():
    """Weights lost on resume restart the method; weights kept for the next trial give it what another student learned."""
    config, batch = SimpleNamespace(num_labels=3), {"labels": LABELS}
    never_killed, resumed = GroupDRO(0.5), GroupDRO(0.5)
    for objective in (never_killed, resumed):
        objective.build(config, None, None)
    loss_of(never_killed, logits_of_batch(), batch)
    state = {name: value.clone() for name, value in never_killed.state_dict().items()}
    assert list(state) == ["group_weights_"]
    for name, value in state.items():  # as the trainer does
        setattr(resumed, name, value)
    losses = [loss_of(objective, logits_of_batch(seed=1), batch) for objective in (never_killed, resumed)]
    assert torch.equal(*losses)
    resumed.build(config, None, None)
    assert resumed.group_weights_.tolist() == pytest.approx([1 / 3] * 3)


def test_through_the_trainer_weights_are_saved_resumed_and_left_alone_by_evaluation(tmp_path):
    """A resume with equal weights trains on as if no group had ever been the worst."""
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}

    def run(folder, evaluated_on=None):
        more = {"eval_strategy": "steps", "eval_steps": 1} if evaluated_on else {}
        parts = {"objective": GroupDRO(0.5), "eval_dataset": evaluated_on}
        return classifier_trainer(tmp_path / folder, settings | more, **parts)

    without_evaluation, resumed = run("b"), run("c")
    never_killed = run("a", evaluated_on=without_evaluation.train_dataset)
    never_killed.train()
    without_evaluation.train()
    weights = never_killed.objective.group_weights_
    assert len(set(weights.tolist())) == 3
    assert torch.equal(weights, without_evaluation.objective.group_weights_)
    resumed.train(resume_from_checkpoint=tmp_path / "b" / "checkpoint-2")
    assert torch.equal(resumed.objective.group_weights_, weights)
    found, expected = resumed.model.state_dict(), without_evaluation.model.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def accumulated(rows: list[slice]) -> tuple[float, list[float]]:
    objective, logits = GroupDRO(0.5), logits_of_batch()
    total = (LABELS != -100).sum()
    loss = torch.zeros((), dtype=torch.float64)
    for part in rows:
        loss += (
            objective(SimpleNamespace(logits=logits[part]), None, {"labels": LABELS[part]})["task_loss"].sum() / total
        )
    return loss.item(), objective.group_weights_.tolist()


def test_micro_batches_are_batches_of_their_own():
    """What the docstring says of gradient accumulation: each counts by its labelled units and moves the weights."""
    found, weights = accumulated([slice(0, 5), slice(5, 8)])
    expected, by_loops = 0.0, [1 / 3] * 3
    for part, units in ((slice(0, 5), 5), (slice(5, 8), 2)):
        labels = LABELS[part]
        by_loops, loss = step_by_loops(by_loops, logits_of_batch(training=False)[part], labels, labels, 0.5)
        expected += units / 7 * loss
    assert found == pytest.approx(expected, rel=1e-6)
    assert weights == pytest.approx(by_loops, rel=1e-6)
    assert accumulated([slice(0, 8)])[0] != pytest.approx(found, rel=1e-3), "the batch is coupled"


def one_of_two(rank: int, meeting: str, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    objective = GroupDRO(0.5)
    objective.build(SimpleNamespace(num_labels=3), None, None)
    part = (slice(0, 5), slice(5, 8))[rank]
    losses = []
    for step in range(3):
        logits = logits_of_batch(seed=step)
        losses.append(objective(SimpleNamespace(logits=logits[part]), None, {"labels": LABELS[part]})["task_loss"])
    torch.save(
        (torch.stack([values.sum() for values in losses]).detach(), objective.group_weights_), f"{folder}/{rank}"
    )
    torch.distributed.destroy_process_group()


def test_two_processes_are_one_with_the_whole_batch(tmp_path):
    """Weights by each process's own rows diverge: every process would train another objective, and only one is saved."""
    # Forked, not spawned: no second import of everything, and no backward pass runs in there
    places = (str(tmp_path / "meeting"), str(tmp_path))
    torch.multiprocessing.start_processes(one_of_two, places, nprocs=2, start_method="fork")
    (first, weights), (second, others) = (torch.load(tmp_path / str(rank)) for rank in (0, 1))
    objective = GroupDRO(0.5)
    objective.build(SimpleNamespace(num_labels=3), None, None)
    whole = [loss_of(objective, logits_of_batch(seed=step), {"labels": LABELS}).item() for step in range(3)]
    assert torch.equal(weights, others)
    torch.testing.assert_close(weights, objective.group_weights_, rtol=1e-12, atol=0)
    assert ((first + second) / 7).tolist() == pytest.approx(whole, rel=1e-12)


# ---- contract and refusals ----


def group_case(rows, **settings):
    case = classification_case(rows, **settings)
    case.batch["group"] = torch.tensor([0, 1, 1, 0, 0, 1, 0, 1])[rows]
    return case


def test_groups_of_a_column_keep_the_contract():
    """A column that is not declared is dropped by the trainer."""
    check_objective(GroupDRO(groups=2), group_case)
    assert GroupDRO(groups=2).columns == ("labels", "group")


def test_soft_labels_need_a_group_column():
    """A mixed image is of two classes: put into one of them, it moves the wrong weight."""
    logits, soft = logits_of_batch(2), torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    with pytest.raises(ValueError, match="mixup and cutmix off"):
        GroupDRO()(SimpleNamespace(logits=logits), None, {"labels": soft})
    values = GroupDRO(groups=2)(SimpleNamespace(logits=logits), None, {"labels": soft, "group": torch.tensor([0, 1])})
    assert values["task_loss"].shape == (2,)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({}, r"reads the column `group`.*\['labels'\]"),
        ({"group": torch.tensor([0, 1, 2, 0, 0, 0, 0, 0])}, "groups run from 0 to 2, not from 0 to 1"),
        ({"group": torch.tensor([0, -1, 1, 0, 0, 0, 0, 0])}, "groups run from -1 to 1, not from 0 to 1"),
        ({"group": torch.tensor([[0, 1]])}, r"\(1, 2\), the labelled units \(8,\)"),
    ],
)
def test_a_group_column_that_does_not_fit_is_refused(batch, message):
    """-1 indexes the last group, and a group too many fails inside torch, on a GPU without a line number."""
    with pytest.raises(ValueError, match=message):
        GroupDRO(groups=2)(SimpleNamespace(logits=logits_of_batch()), None, {"labels": LABELS, **batch})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"step_size": 0.0}, "step_size must be .*got 0.0"),
        ({"step_size": -1.0}, "step_size must be .*got -1.0"),
        ({"groups": 1}, "groups must be 2 or more .*got 1"),
        ({"label_smoothing": 1.0}, "label_smoothing.*1.0"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    """A negative step size serves the best group."""
    with pytest.raises(ValueError, match=message):
        GroupDRO(**settings)
