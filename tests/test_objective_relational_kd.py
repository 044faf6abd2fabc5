"""RelationalKD against loops over pairs and triples, its edges and its gradient."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hfkd.objectives import RelationalKD
from hfkd.outputs import TeacherOutput
from hfkd.testing import check_objective, classification_case, hidden_case
from test_objective_hidden_states import distill_loss, with_padding

EVERYTHING = torch.arange(8)


def huber(difference: float) -> float:
    return 0.5 * difference**2 if abs(difference) < 1 else abs(difference) - 0.5


def length(vector: list[float]) -> float:
    return math.sqrt(sum(x * x for x in vector))


def minus(a: list[float], b: list[float]) -> list[float]:
    return [x - y for x, y in zip(a, b, strict=True)]


def distances_by_loops(rows: list[list[float]]) -> list[list[float]]:
    n = len(rows)
    found = [[length(minus(a, b)) for b in rows] for a in rows]
    mean = sum(map(sum, found)) / (n * (n - 1))
    return [[value / mean for value in row] for row in found]


def cosine_by_loops(a: list[float], at: list[float], b: list[float]) -> float:
    one, other = minus(a, at), minus(b, at)
    if length(one) == 0 or length(other) == 0:
        return 0.0
    return sum(x * y for x, y in zip(one, other, strict=True)) / (length(one) * length(other))


def rkd_by_loops(student, teacher, distance_weight: float, angle_weight: float) -> float:
    """The loss of a whole batch: the mean over all n^2 pairs and all n^3 triples, as the authors take it."""
    s, t = student.tolist(), teacher.tolist()
    n = len(s)
    s_distances, t_distances = distances_by_loops(s), distances_by_loops(t)
    distance = sum(huber(s_distances[i][j] - t_distances[i][j]) for i in range(n) for j in range(n)) / n**2
    triples = [(i, j, k) for i in range(n) for j in range(n) for k in range(n)]
    angles = [cosine_by_loops(s[j], s[i], s[k]) - cosine_by_loops(t[j], t[i], t[k]) for i, j, k in triples]
    return distance_weight * distance + angle_weight * sum(map(huber, angles)) / n**3


def of_logits(objective, student, teacher) -> torch.Tensor:
    objective.build(None, None, None)
    return objective(SimpleNamespace(logits=student), TeacherOutput(logits=teacher), {})["distill_loss"]


def two_clouds(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, n, 4, generator=generator, dtype=torch.float64) ** 3
    return student, teacher


# ---- values ----


@pytest.mark.parametrize("weights", [(1.0, 2.0), (25.0, 0.0), (0.0, 1.0)])
@pytest.mark.parametrize("feature", ["cls", "mean", "logits"])
def test_the_mean_over_examples_is_the_authors_loss(feature, weights):
    """Shares that do not add up to the loss make its weight depend on the batch size."""
    case = hidden_case(EVERYTHING, teacher_width=12)
    found = distill_loss(RelationalKD(*weights, feature, alpha=1.0), case)
    assert found.shape == (8,)
    sides = []
    for output in (case.student, case.teacher):
        last, mask = output.hidden_states[-1], case.batch["attention_mask"]
        means = torch.stack([row[:n].mean(0) for row, n in zip(last, mask.sum(1).tolist(), strict=True)])
        sides.append({"cls": last[:, 0], "mean": means, "logits": output.logits}[feature])
    assert found.mean().item() == pytest.approx(rkd_by_loops(*sides, *weights), rel=1e-9)


@given(st.integers(2, 5), st.integers(0, 4))
def test_hubers_loss_is_used_on_both_sides_of_its_corner(n, seed):
    """Squares of large differences would let one odd pair decide the step."""
    student, teacher = two_clouds(n, seed)
    values = of_logits(RelationalKD(feature="logits", alpha=1.0), student, teacher)
    assert values.mean().item() == pytest.approx(rkd_by_loops(student, teacher, 1.0, 2.0), rel=1e-9)
    assert bool((values >= 0).all())


@given(st.floats(0.1, 10), st.floats(-5, 5))
def test_it_sees_neither_size_nor_place_nor_rotation(factor, shift):
    """What makes it relational: a student whose space is scaled, moved or turned has learned everything."""
    _, teacher = two_clouds(5)
    rotation = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64))[0]
    values = of_logits(RelationalKD(feature="logits", alpha=1.0), factor * teacher @ rotation + shift, teacher)
    assert float(values.abs().max()) < 1e-12


def test_padding_changes_nothing():
    """A mean over padding makes an example's place among the others depend on the longest text."""
    case = hidden_case(EVERYTHING)
    for feature in ("cls", "mean"):
        found = distill_loss(RelationalKD(feature=feature), case)
        torch.testing.assert_close(distill_loss(RelationalKD(feature=feature), with_padding(case)), found)


# ---- edges ----


def test_a_batch_of_one_costs_nothing():
    """One example has no relations: 0 / 0 in a last batch of one makes all weights NaN."""
    student, teacher = two_clouds(1)
    student.requires_grad_(True)
    values = of_logits(RelationalKD(feature="logits", alpha=1.0), student, teacher)
    assert values.tolist() == [0.0]
    values.sum().backward()
    assert bool((student.grad == 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("equal", [2, 4])
def test_equal_examples_have_no_infinite_gradient(equal, dtype):
    """The same text twice in a batch: the root of a distance of 0 has an infinite gradient, and one of 1e12 with an eps."""
    student, teacher = (side.to(dtype) for side in two_clouds(4))
    student[:equal] = student[0]
    student.requires_grad_(True)
    values = of_logits(RelationalKD(feature="logits", alpha=1.0), student, teacher)
    values.sum().backward()
    assert bool(torch.isfinite(values).all())
    assert float(student.grad.abs().max()) < 100


def test_gradients_are_those_of_the_value():
    """A detached mean distance leaves the value right and lets the student shrink its whole space."""
    student, teacher = two_clouds(4)
    student.requires_grad_(True)
    objective = RelationalKD(feature="logits", alpha=1.0)
    assert torch.autograd.gradcheck(lambda z: of_logits(objective, z, teacher), student)


def test_coupling_is_declared():
    """A coupled loss that says it is not would be trained with accumulation, as another loss."""
    assert RelationalKD().batch_coupled
    assert not RelationalKD(alpha=0.0).batch_coupled
    assert RelationalKD(feature="logits").needs == {"teacher"}
    assert RelationalKD().needs == {"teacher", "hidden_states"}


@pytest.mark.parametrize("feature", ["cls", "mean", "logits"])
def test_it_keeps_the_contract(feature):
    """The contract for every feature; logits need no inside of a model."""
    check_objective(RelationalKD(feature=feature), hidden_case)
    if feature == "logits":
        check_objective(RelationalKD(feature=feature), classification_case)


# ---- refusals ----


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
@pytest.mark.parametrize("name", ["distance_weight", "angle_weight"])
def test_a_wrong_weight_is_refused(name, value):
    """A negative weight drives the student's relations away from the teacher's."""
    with pytest.raises(ValueError, match=f"^{name} must be .*got {value}"):
        RelationalKD(**{name: value})


def test_what_cannot_be_compared_is_refused():
    """Token heads have no one vector per example; a teacher without hidden states none at all."""
    with pytest.raises(ValueError, match=r"cls, mean, logits.*'pooled'"):
        RelationalKD(feature="pooled")
    tokens = torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match=r"student answered \(2, 3, 4\)"):
        of_logits(RelationalKD(feature="logits", alpha=1.0), tokens, tokens)
    case = hidden_case(EVERYTHING)
    with pytest.raises(ValueError, match=r"teacher answered no hidden_states.*logits"):
        RelationalKD()(case.student, TeacherOutput(logits=case.teacher.logits), case.batch)


def test_feature_maps_are_refused():
    """The hidden states of a network of convolutions have no tokens: a row of pixels would be taken for the first of them."""
    maps = SimpleNamespace(logits=torch.randn(4, 3), hidden_states=(torch.randn(4, 8, 2, 2),))
    with pytest.raises(ValueError, match=r"the student answered \(4, 8, 2, 2\).*feature='logits'"):
        RelationalKD()(maps, maps, {"labels": torch.zeros(4, dtype=torch.long)})
