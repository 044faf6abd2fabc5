"""MiniLMRelations against loops over python floats, padding, refusals."""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace

import pytest
import torch

from hfkd.objectives import MiniLMRelations
from hfkd.testing import check_objective, hidden_case
from test_objective_hidden_states import built, distill_loss, with_padding

EVERYTHING = torch.arange(8)


def relation_by_loops(vectors: list[list[float]], head: int, heads: int, i: int) -> list[float]:
    """softmax over j of <v_i, v_j> / sqrt(d), with the entries of one relation head."""
    size = len(vectors[0]) // heads
    part = [vector[head * size : (head + 1) * size] for vector in vectors]
    scores = [sum(a * b for a, b in zip(part[i], other, strict=True)) / math.sqrt(size) for other in part]
    weights = [math.exp(score - max(scores)) for score in scores]
    return [weight / sum(weights) for weight in weights]


def by_loops(ours, theirs, mask, heads: int) -> list[float]:
    """ours, theirs: (query, key, value), each (batch, tokens, width)."""
    values = []
    for row, n in enumerate(mask.sum(1).tolist()):
        total = 0.0
        for student, teacher in zip(ours, theirs, strict=True):
            s, t = student[row, :n].tolist(), teacher[row, :n].tolist()
            for head in range(heads):
                for i in range(n):
                    pairs = zip(relation_by_loops(s, head, heads, i), relation_by_loops(t, head, heads, i), strict=True)
                    total += sum(b * math.log(b / a) for a, b in pairs) / (heads * n)
        values.append(total)
    return values


@pytest.mark.parametrize(
    ("settings", "layers", "heads"),
    [
        ({}, (1, 2), 2),  # the student's heads, both last layers
        ({"student_layer": 0, "teacher_layer": 1, "relation_heads": 4}, (0, 1), 4),
        ({"teacher_layer": -2, "relation_heads": 1}, (1, 1), 1),
    ],
)
def test_relations_equal_loops(settings, layers, heads):
    """A mean instead of the sum of three relations, a scale by the width of all heads, or another layer is no MiniLM."""
    case = hidden_case(EVERYTHING, teacher_width=12, teacher_layers=3)
    found = distill_loss(MiniLMRelations(**settings), case)
    triples = case.student.qkv[layers[0]], case.teacher.qkv[layers[1]]
    expected = by_loops(*triples, case.batch["attention_mask"], heads)
    assert found.tolist() == pytest.approx(expected, rel=1e-8, abs=1e-12)


def test_padding_changes_nothing():
    """Relations to padding are relations to nothing: they would depend on what a text was batched with."""
    case = hidden_case(EVERYTHING)
    found = distill_loss(MiniLMRelations(), case)
    torch.testing.assert_close(distill_loss(MiniLMRelations(), with_padding(case)), found, rtol=1e-12, atol=1e-14)
    assert bool((found >= 0).all())


def test_a_row_of_nothing_but_padding_is_no_nan():
    """The last batch may be filled up with empty rows."""
    case = hidden_case(EVERYTHING)
    case.batch["attention_mask"][2] = 0
    states = case.student.qkv[1][0].requires_grad_(True)
    values = distill_loss(MiniLMRelations(), case)
    values.sum().backward()
    assert values[2] == 0
    assert bool(torch.isfinite(values).all())
    assert bool(torch.isfinite(states.grad).all())


def test_gradients_are_those_of_the_value():
    """Each vector is query and key of its relation: half of the gradient is easily lost."""
    case = hidden_case(torch.tensor([1, 6]), width=4, teacher_width=6, layers=1, teacher_layers=1)
    objective = built(MiniLMRelations(), case)
    triple = tuple(part.requires_grad_(True) for part in case.student.qkv[0])

    def value(*triple: torch.Tensor) -> torch.Tensor:
        student = SimpleNamespace(logits=case.student.logits, qkv=(triple,))
        return objective(student, case.teacher, case.batch)["distill_loss"]

    assert torch.autograd.gradcheck(value, triple)


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_it_keeps_the_contract_between_models_of_other_shape(alpha):
    """Widths, depths and heads of students and teachers differ: that is what the method is for."""
    other = functools.partial(hidden_case, width=6, teacher_width=12, teacher_layers=5)
    check_objective(MiniLMRelations(relation_heads=3, alpha=alpha), other, zero_at_teacher=False)
    check_objective(MiniLMRelations(alpha=alpha), hidden_case)


def test_widths_that_heads_do_not_divide_are_refused_with_the_numbers():
    """Split unevenly, the last head would hold what belongs to another."""
    case = hidden_case(EVERYTHING, teacher_width=9)
    with pytest.raises(ValueError, match=r"teacher's width 9 .*2 relation heads"):
        built(MiniLMRelations(), case)
    with pytest.raises(ValueError, match=r"student's width 8 .*3 relation heads"):
        built(MiniLMRelations(relation_heads=3), case)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        MiniLMRelations(relation_heads=0)


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("layer", [2, -3])
def test_layers_that_do_not_exist_are_refused(side, layer):
    """An index error in the first step costs the queue time of a job."""
    with pytest.raises(ValueError, match=f"{side}_layer is {layer}, but the {side} has 2 layers"):
        built(MiniLMRelations(**{f"{side}_layer": layer}), hidden_case(EVERYTHING))


def test_missing_vectors_and_other_tokens_are_refused():
    """transformers returns no queries: without the trainer's hooks there is nothing to compare."""
    case = hidden_case(EVERYTHING)
    objective = built(MiniLMRelations(), case)
    bare = SimpleNamespace(logits=case.student.logits)
    with pytest.raises(ValueError, match=r"student answered no qkv.*hooks"):
        objective(bare, case.teacher, case.batch)
    with pytest.raises(ValueError, match=r"teacher answered no qkv.*hooks"):
        objective(case.student, bare, case.batch)
    short = SimpleNamespace(qkv=tuple(tuple(part[:, :5] for part in triple) for triple in case.student.qkv))
    with pytest.raises(ValueError, match=r"5 tokens, the teacher 7"):
        objective(short, case.teacher, case.batch)
