"""HiddenStates against loops over python floats, its maps between widths, and its refusals."""

from __future__ import annotations

import copy
import functools
import math
from types import SimpleNamespace

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree
from transformers.modeling_outputs import SequenceClassifierOutput

from hfkd import ModelTeacher
from hfkd.objectives import HiddenStates
from hfkd.testing import check_objective, hidden_case, tiny_roberta_config

EVERYTHING = torch.arange(8)


def built(objective, case):
    objective.build(case.student_config, case.teacher_config, case.problem_type)
    return objective


def distill_loss(objective, case) -> torch.Tensor:
    """The distillation term as the trainer gets it."""
    built(objective, case)
    student = case.student if objective.attached is None else objective.attached.double()(copy.copy(case.student))
    return objective(student, case.teacher, case.batch)["distill_loss"]


def with_padding(case, extra: int = 3):
    """The same case with more padding, which holds numbers of any size."""
    generator = torch.Generator().manual_seed(9)

    def longer(tokens: torch.Tensor) -> torch.Tensor:
        shape = (len(tokens), extra, *tokens.shape[2:])
        return torch.cat([tokens, 50 * torch.randn(shape, generator=generator, dtype=tokens.dtype)], dim=1)

    def longer_maps(maps: torch.Tensor) -> torch.Tensor:
        rows = torch.rand(*maps.shape[:2], extra, maps.shape[3], generator=generator, dtype=maps.dtype)
        maps = torch.cat([maps, rows / rows.sum(-1, keepdim=True)], dim=2)
        return torch.cat([maps, maps.new_zeros(*maps.shape[:3], extra)], dim=3)

    def longer_inside(output) -> dict:
        return {
            "hidden_states": tuple(longer(state) for state in output.hidden_states),
            "attentions": tuple(longer_maps(maps) for maps in output.attentions),
            "qkv": tuple(tuple(longer(part) for part in triple) for triple in output.qkv),
            "logits": output.logits,
        }

    mask = torch.cat([case.batch["attention_mask"], torch.zeros(len(case.student.logits), extra).long()], dim=1)
    case = copy.copy(case)
    case.student = SimpleNamespace(**longer_inside(case.student))
    case.teacher = SimpleNamespace(**longer_inside(case.teacher))
    case.batch = {**case.batch, "attention_mask": mask}
    return case


def distance_by_loops(ours: list[float], theirs: list[float], loss: str) -> float:
    if loss == "mse":
        return sum((a - b) ** 2 for a, b in zip(ours, theirs, strict=True)) / len(ours)
    product = sum(a * b for a, b in zip(ours, theirs, strict=True))
    return 1 - product / math.sqrt(sum(a * a for a in ours) * sum(b * b for b in theirs))


def by_loops(ours, theirs, mask, pairs, loss: str) -> list[float]:
    """ours, theirs: per layer (batch, tokens, hidden). One value per example."""
    values = []
    for row, length in enumerate(mask.sum(1).tolist()):
        total = 0.0
        for student_layer, teacher_layer in pairs:
            student, teacher = ours[student_layer][row].tolist(), theirs[teacher_layer][row].tolist()
            total += sum(distance_by_loops(student[i], teacher[i], loss) for i in range(length)) / length
        values.append(total / len(pairs))
    return values


# ---- values ----


@pytest.mark.parametrize("loss", ["mse", "cosine"])
@pytest.mark.parametrize(
    ("layers", "teacher_layers", "pairs"),
    [
        (None, 2, [(0, 0), (1, 1), (2, 2)]),
        (None, 4, [(0, 0), (1, 2), (2, 4)]),
        (None, 1, [(0, 0), (1, 0), (2, 1)]),  # round(0.5) = 0
        ({2: 3}, 3, [(2, 3)]),
        ({"1": 0, "2": 3}, 3, [(1, 0), (2, 3)]),  # as JSON has it
    ],
)
def test_hidden_states_equal_loops(loss, layers, teacher_layers, pairs):
    """A wrong layer, padding in a mean or a sum over the hidden dimension trains a student without any error."""
    case = hidden_case(EVERYTHING, teacher_layers=teacher_layers)
    found = distill_loss(HiddenStates(layers, loss, alpha=0.5), case)
    states = case.student.hidden_states, case.teacher.hidden_states
    expected = by_loops(*states, case.batch["attention_mask"], pairs, loss)
    assert found.tolist() == pytest.approx([0.5 * value for value in expected], rel=1e-9)


@pytest.mark.parametrize("loss", ["mse", "cosine"])
def test_other_widths_are_compared_through_linear_maps(loss):
    """One map used for two layers, or the teacher mapped to the student's width, is another method."""
    case = hidden_case(EVERYTHING, width=5, teacher_width=9, teacher_layers=4)
    objective = HiddenStates({1: 2, 2: 4}, loss, alpha=1.0)
    found = distill_loss(objective, case)
    maps = {layer: linear for layer, linear in zip((1, 2), objective.attached.maps, strict=True)}
    mapped = {layer: case.student.hidden_states[layer] @ m.weight.T + m.bias for layer, m in maps.items()}
    expected = by_loops(mapped, case.teacher.hidden_states, case.batch["attention_mask"], [(1, 2), (2, 4)], loss)
    assert found.tolist() == pytest.approx(expected, rel=1e-9)
    assert not torch.equal(maps[1].weight, maps[2].weight)


@pytest.mark.parametrize("loss", ["mse", "cosine"])
@pytest.mark.parametrize("teacher_width", [8, 12])
def test_padding_changes_nothing(loss, teacher_width):
    """What a text was batched with would otherwise decide how much of it is distilled."""
    case = hidden_case(EVERYTHING, teacher_width=teacher_width)
    found = distill_loss(HiddenStates(loss=loss), case)
    if teacher_width == 8:
        torch.testing.assert_close(distill_loss(HiddenStates(loss=loss), with_padding(case)), found, rtol=1e-12, atol=0)
    other = copy.copy(case)
    mask = case.batch["attention_mask"][..., None]
    other.student = copy.copy(case.student)
    other.student["hidden_states"] = tuple(torch.where(mask == 1, s, 7.0) for s in case.student.hidden_states)
    torch.testing.assert_close(distill_loss(HiddenStates(loss=loss), other), found, rtol=1e-12, atol=0)


@given(st.floats(0.1, 10), st.integers(0, 7))
def test_cosine_ignores_length_and_neither_is_negative(factor, row):
    """A cosine that sees the norm would make a student copy what LayerNorm removes afterwards."""
    case = hidden_case(torch.tensor([row]))
    values = distill_loss(HiddenStates(loss="cosine"), case)
    assert 0 <= values.item() <= 1  # alpha 0.5 times a value of at most 2
    assert distill_loss(HiddenStates(), case).item() >= 0
    case.student["hidden_states"] = tuple(factor * state for state in case.student.hidden_states)
    torch.testing.assert_close(distill_loss(HiddenStates(loss="cosine"), case), values, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("loss", ["mse", "cosine"])
@pytest.mark.parametrize("teacher_width", [3, 4])
def test_gradients_are_those_of_the_value(loss, teacher_width):
    """A map that gets no gradient stays random, and the student learns a random projection of its teacher."""
    case = hidden_case(torch.tensor([1, 6]), width=3, teacher_width=teacher_width, layers=1, teacher_layers=1)
    objective = built(HiddenStates({1: 1}, loss, alpha=1.0), case)
    state = case.student.hidden_states[1].requires_grad_(True)
    trained = [] if objective.attached is None else list(objective.attached.double().parameters())

    def value(*tensors: torch.Tensor) -> torch.Tensor:
        student = case.student if objective.attached is None else objective.attached(case.student)
        return objective(student, case.teacher, case.batch)["distill_loss"]

    assert torch.autograd.gradcheck(value, (state, *trained))
    assert len(trained) == (0 if teacher_width == 3 else 2)


def test_images_have_no_mask():
    """Vision models have no attention_mask: every patch counts."""
    case = hidden_case(EVERYTHING)
    whole = copy.copy(case)
    whole.batch = {"labels": case.batch["labels"], "attention_mask": torch.ones(8, 7)}
    case.batch = {"labels": case.batch["labels"]}
    assert torch.equal(distill_loss(HiddenStates(), case), distill_loss(HiddenStates(), whole))
    assert HiddenStates().count({"pixel_values": torch.zeros(8, 3, 4, 4)})["distill_loss"] == 8


# ---- the maps between widths ----


def test_maps_draw_nothing_from_the_global_generator():
    """Else a run with projections sees other batches and masks than one without, and an ablation compares two things."""
    case = hidden_case(EVERYTHING, teacher_width=12)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    first = built(HiddenStates(), case)
    assert torch.equal(torch.rand(4), expected)
    second = built(HiddenStates(), case)
    for one, other in zip(first.attached.parameters(), second.attached.parameters(), strict=True):
        assert torch.equal(one, other)
    assert len(list(first.attached.parameters())) == 2 * 3
    assert set(first.state_dict()) == {f"attached.maps.{i}.{n}" for i in range(3) for n in ("weight", "bias")}


def test_building_again_forgets_the_maps_of_before():
    """A second trainer with the same objective would distil through the maps between two other models."""
    objective = built(HiddenStates(), hidden_case(EVERYTHING, teacher_width=12))
    assert objective.attached is not None
    assert built(objective, hidden_case(EVERYTHING)).attached is None


def test_an_answer_without_hidden_states_passes_through():
    """In evaluation nobody asks for hidden states: the maps must not fail there."""
    attached = built(HiddenStates(), hidden_case(EVERYTHING, teacher_width=12)).attached
    output = SequenceClassifierOutput(logits=torch.ones(2, 5))
    assert attached(output) is output


def test_the_answer_survives_being_taken_apart():
    """DDP takes a model's output apart and rebuilds it: a class without the new field fails in the first step."""
    attached = built(HiddenStates(), hidden_case(EVERYTHING, teacher_width=12)).attached
    states = tuple(torch.ones(2, 7, 8) for _ in range(3))
    output = attached(SequenceClassifierOutput(logits=torch.ones(2, 5), hidden_states=states))
    parts, spec = _pytree.tree_flatten(output)
    again = _pytree.tree_unflatten(parts, spec)
    assert torch.equal(again.logits, torch.ones(2, 5))
    assert [tensor.shape for tensor in again["projected"]] == [(2, 7, 12)] * 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_maps_run_under_autocast_and_on_states_of_any_dtype(dtype):
    """Mixed precision gives bfloat16 states to float32 maps: without a cast the first step fails."""
    case = hidden_case(EVERYTHING, teacher_width=12, dtype=dtype)
    objective = built(HiddenStates(), case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = objective(objective.attached(case.student), case.teacher, case.batch)["distill_loss"]
    assert values.dtype == torch.float32
    assert bool(torch.isfinite(values).all())
    outside = objective(objective.attached(case.student), case.teacher, case.batch)["distill_loss"]
    torch.testing.assert_close(values, outside, rtol=2e-2, atol=2e-2)


def test_real_models_of_two_widths_learn_from_each_other():
    """What transformers returns, not what our cases imitate: hidden_states, DistilBERT's `dim`, a forward hook."""
    torch.manual_seed(0)
    config = transformers.DistilBertConfig(vocab_size=50, dim=8, n_layers=1, n_heads=2, hidden_dim=16)
    student = transformers.DistilBertForSequenceClassification(config)
    teacher = transformers.RobertaForSequenceClassification(tiny_roberta_config(num_labels=2))
    objective = HiddenStates(alpha=1.0)
    objective.build(student.config, teacher.config, None)
    student.add_module("objective_module", objective.attached)
    student.register_forward_hook(lambda module, inputs, output: module.objective_module(output))
    batch = {"input_ids": torch.randint(5, 50, (4, 9)), "attention_mask": torch.ones(4, 9).long()}
    answers = ModelTeacher(teacher)
    answers.needs = objective.needs
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    losses = []
    for _ in range(30):
        loss = objective(student(**batch, output_hidden_states=True), answers(batch), batch)["distill_loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("loss", ["mse", "cosine"])
def test_it_keeps_the_contract_between_models_of_other_shape(loss):
    """The contract is checked where widths and depths differ too, which is where students are."""
    other = functools.partial(hidden_case, width=6, teacher_width=10, teacher_layers=5)
    check_objective(HiddenStates(loss=loss), other)
    deeper = functools.partial(hidden_case, teacher_layers=5)
    check_objective(HiddenStates(loss=loss), deeper, zero_at_teacher=False)


# ---- refusals ----


@pytest.mark.parametrize(
    ("layers", "message"), [({3: 1}, r"student's hidden state 3.* 3 of them, 0 to 2"), ({1: -1}, r"teacher's .* -1")]
)
def test_layers_that_do_not_exist_are_refused_with_both_numbers(layers, message):
    """Python's negative index would compare another layer than the one that was written down."""
    with pytest.raises(ValueError, match=message):
        built(HiddenStates(layers), hidden_case(EVERYTHING))


def test_other_token_counts_are_refused():
    """Two tokenizers give two lengths; compared position by position, words meet other words."""
    case = hidden_case(EVERYTHING)
    case.student["hidden_states"] = tuple(state[:, :5] for state in case.student.hidden_states)
    with pytest.raises(ValueError, match=r"5 tokens, the teacher 7.*one tokenizer"):
        distill_loss(HiddenStates(), case)


def test_missing_states_are_refused_with_advice():
    """Teachers that answer logits only, or a student whose maps did not run, must say so."""
    case = hidden_case(EVERYTHING)
    objective = built(HiddenStates(), case)
    bare = SimpleNamespace(logits=case.student.logits)
    with pytest.raises(ValueError, match=r"student answered no hidden_states"):
        objective(bare, case.teacher, case.batch)
    with pytest.raises(ValueError, match=r"teacher answered no hidden_states.*ModelTeacher"):
        objective(case.student, bare, case.batch)
    wide = hidden_case(EVERYTHING, teacher_width=12)
    with pytest.raises(ValueError, match=r"student answered no projected.*inside its forward"):
        built(HiddenStates(), wide)(wide.student, wide.teacher, wide.batch)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"loss": "l1"}, "mse, cosine.*'l1'"), ({"layers": {}}, "layers is empty"), ({"alpha": 2}, "got 2")],
)
def test_wrong_settings_are_refused_at_once(wrong, message):
    """A mistyped loss found in the first step costs the queue time of a job."""
    with pytest.raises(ValueError, match=message):
        HiddenStates(**wrong)


def test_a_teacher_without_a_configuration_is_refused():
    """A cache of logits has no layers: without the sentence this fails inside getattr."""
    case = hidden_case(EVERYTHING)
    with pytest.raises(ValueError, match=r"teacher's configuration has no num_hidden_layers"):
        HiddenStates().build(case.student_config, None, None)
    HiddenStates(alpha=0.0).build(case.student_config, None, None)  # nothing is compared


def test_feature_maps_of_convolutions_are_refused():
    """(batch, channels, height, width) would be read as tokens."""
    case = hidden_case(EVERYTHING)
    objective = built(HiddenStates({0: 0}), case)
    maps = SimpleNamespace(logits=case.student.logits, hidden_states=(torch.ones(8, 4, 7, 7),))
    with pytest.raises(ValueError, match=r"\(8, 4, 7, 7\)"):
        objective(maps, maps, {"labels": case.batch["labels"]})
