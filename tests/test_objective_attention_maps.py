"""AttentionMaps against loops over python floats, padding, real models."""

from __future__ import annotations

import copy
import functools
import math
from types import SimpleNamespace

import pytest
import torch
import transformers

from hfkd import ModelTeacher
from hfkd.objectives import AttentionMaps
from hfkd.testing import check_objective, hidden_case, tiny_roberta_config
from test_objective_hidden_states import built, distill_loss, with_padding

EVERYTHING = torch.arange(8)


def by_loops(ours, theirs, mask, pairs, loss: str) -> list[float]:
    """ours, theirs: per layer (batch, heads, tokens, tokens). One value per example."""
    values = []
    for row, n in enumerate(mask.sum(1).tolist()):
        found = []
        for student_layer, teacher_layer in pairs:
            for s, t in zip(ours[student_layer][row].tolist(), theirs[teacher_layer][row].tolist(), strict=True):
                for i in range(n):
                    keys = [(s[i][j], t[i][j]) for j in range(n)]
                    if loss == "mse":
                        found.append(sum((a - b) ** 2 for a, b in keys) / n)
                    else:
                        found.append(sum(b * math.log(b / a) for a, b in keys))
        values.append(sum(found) / len(found))  # all layers have the same heads and queries
    return values


@pytest.mark.parametrize("loss", ["mse", "kl"])
@pytest.mark.parametrize(
    ("layers", "teacher_layers", "pairs"),
    [
        (None, 2, [(0, 0), (1, 1)]),
        (None, 4, [(0, 1), (1, 3)]),
        (None, 1, [(0, 0), (1, 0)]),
        ({"1": 2}, 3, [(1, 2)]),
    ],
)
def test_attention_maps_equal_loops(loss, layers, teacher_layers, pairs):
    """A KL the wrong way round, a mean over padded keys or a layer too high is another objective on the card."""
    case = hidden_case(EVERYTHING, teacher_layers=teacher_layers)
    found = distill_loss(AttentionMaps(layers, loss, alpha=0.5), case)
    maps = case.student.attentions, case.teacher.attentions
    expected = by_loops(*maps, case.batch["attention_mask"], pairs, loss)
    assert found.tolist() == pytest.approx([0.5 * value for value in expected], rel=1e-8, abs=1e-12)


@pytest.mark.parametrize("loss", ["mse", "kl"])
def test_padding_changes_nothing(loss):
    """The mean over keys would shrink with every token of padding, so that short texts in long batches teach less."""
    case = hidden_case(EVERYTHING)
    found = distill_loss(AttentionMaps(loss=loss), case)
    torch.testing.assert_close(
        distill_loss(AttentionMaps(loss=loss), with_padding(case)), found, rtol=1e-12, atol=1e-15
    )
    assert bool((found >= 0).all())


@pytest.mark.parametrize("loss", ["mse", "kl"])
def test_gradients_are_those_of_the_value(loss):
    """A gradient that ends at masked keys trains what nobody sees."""
    case = hidden_case(torch.tensor([1, 6]), layers=1, teacher_layers=1)
    objective = built(AttentionMaps(loss=loss, alpha=1.0), case)
    mask = case.batch["attention_mask"][:, None, None]
    scores = torch.randn(
        2, 2, 7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(5), requires_grad=True
    )

    def value(scores: torch.Tensor) -> torch.Tensor:
        maps = scores.masked_fill(mask == 0, -torch.inf).softmax(-1)
        student = SimpleNamespace(logits=case.student.logits, attentions=(maps,))
        return objective(student, case.teacher, case.batch)["distill_loss"]

    assert torch.autograd.gradcheck(value, scores)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_probabilities_stay_finite_with_their_gradient(dtype):
    """Attention on one token is 0 on all others: log(0) there makes all weights NaN."""
    case = hidden_case(EVERYTHING, scale=1e4, dtype=dtype)
    objective = built(AttentionMaps(loss="kl", alpha=1.0), case)
    maps = [layer.requires_grad_(True) for layer in case.student.attentions]
    values = objective(case.student, case.teacher, case.batch)["distill_loss"]
    values.sum().backward()
    assert bool((values > 1).any())
    assert all(bool(torch.isfinite(layer.grad).all()) for layer in maps)


@pytest.mark.parametrize("loss", ["mse", "kl"])
def test_it_keeps_the_contract_between_models_of_other_shape(loss):
    """Depths and widths of students and teachers differ; only the number of heads must not."""
    other = functools.partial(hidden_case, teacher_layers=5, teacher_width=10, heads=4)
    check_objective(AttentionMaps(loss=loss), other, zero_at_teacher=False)
    check_objective(AttentionMaps(loss=loss), hidden_case)


def test_maps_of_real_models_and_none_from_other_kernels():
    """SDPA computes no maps and answers an empty tuple: the mean over no layer is NaN, or nothing at all."""
    torch.manual_seed(0)
    student, teacher = (
        transformers.RobertaForSequenceClassification(tiny_roberta_config(num_hidden_layers=n)) for n in (1, 2)
    )
    objective = AttentionMaps(loss="kl", alpha=1.0)
    objective.build(student.config, teacher.config, None)
    batch = {"input_ids": torch.randint(5, 50, (3, 6)), "attention_mask": torch.ones(3, 6).long()}
    batch["attention_mask"][0, 4:] = 0
    answers = ModelTeacher(teacher)
    answers.needs = objective.needs
    with pytest.raises(ValueError, match=r"student answered no attentions.*eager"):
        objective(student(**batch, output_attentions=True), answers(batch), batch)
    student.set_attn_implementation("eager")
    with pytest.raises(ValueError, match=r"teacher answered no attentions.*eager"):
        objective(student(**batch, output_attentions=True), answers(batch), batch)
    teacher.set_attn_implementation("eager")
    output = student(**batch, output_attentions=True)
    values = objective(output, answers(batch), batch)["distill_loss"]
    expected = by_loops(output.attentions, answers(batch).attentions, batch["attention_mask"], [(0, 1)], "kl")
    assert values.tolist() == pytest.approx(expected, rel=1e-3, abs=1e-6)
    values.sum().backward()
    assert student.roberta.encoder.layer[0].attention.self.query.weight.grad.abs().max() > 0


def test_other_numbers_of_heads_are_refused_with_advice():
    """Heads have no order: comparing the first 2 of 4 would look like a method."""
    case = hidden_case(EVERYTHING)
    case.teacher_config.num_attention_heads = 4
    with pytest.raises(ValueError, match=r"student has 2 attention heads, the teacher 4.*MiniLMRelations"):
        built(AttentionMaps(), case)


def test_layers_and_tokens_that_do_not_fit_are_refused():
    """Negative indices would compare other layers, other tokenizers other words."""
    case = hidden_case(EVERYTHING)
    with pytest.raises(ValueError, match=r"student's layer 2.* 2 of them, 0 to 1"):
        built(AttentionMaps({2: 1}), case)
    case.student["attentions"] = tuple(maps[..., :5, :5] for maps in case.student.attentions)
    with pytest.raises(ValueError, match=r"5 tokens, the teacher 7"):
        distill_loss(AttentionMaps(), case)


def test_an_unknown_loss_is_refused():
    """A mistyped loss found in the first step costs the queue time of a job."""
    with pytest.raises(ValueError, match=r"mse, kl.*'js'"):
        AttentionMaps(loss="js")


def test_a_mask_of_other_tokens_is_refused():
    """A model that prepends tokens has longer maps than its mask: shifted by one, padding would count."""
    case = hidden_case(EVERYTHING)
    other = copy.copy(case)
    other.batch = {**case.batch, "attention_mask": case.batch["attention_mask"][:, :6]}
    with pytest.raises(ValueError, match=r"attention_mask is \(8, 6\)"):
        distill_loss(AttentionMaps(), other)
