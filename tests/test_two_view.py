"""Two views in one call: the same loss, gradients, features and checkpoints as the stock models."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import launching
from hfkd.models.two_view import TWO_VIEWS, two_view_model
from hfkd.objectives import MaskedLM, SelfDistill
from hfkd.teachers import ModelTeacher
from hfkd.testing import tiny_roberta_config
from hfkd.trainers.distillation import DistillationTrainer

KINDS = ("roberta", "bert", "xlm-roberta")


def tiny_config(kind: str) -> Any:
    settings = {k: v for k, v in tiny_roberta_config().to_dict().items() if k not in ("model_type", "architectures")}
    return transformers.CONFIG_MAPPING[kind](**settings)


def pair(kind: str) -> tuple[Any, Any]:
    """A two-view model and the stock model with its weights, in float64 and without dropout."""
    torch.manual_seed(0)
    config = tiny_config(kind)
    ours = TWO_VIEWS[kind](config).double()
    stock = getattr(transformers, type(ours).__name__)(copy.deepcopy(config)).double()
    assert type(stock) is not type(ours)
    stock.load_state_dict(ours.state_dict())
    return ours, stock


def ragged_batch(masked_rows: tuple[int, ...] = (0, 2, 3)) -> dict[str, torch.Tensor]:
    """Four rows of lengths 9, 4, 6 and 2, some tokens of `masked_rows` masked; `full_labels` as the usual collators."""
    generator = torch.Generator().manual_seed(1)
    mask = (torch.arange(9) < torch.tensor([9, 4, 6, 2])[:, None]).long()
    clean = torch.where(mask == 1, torch.randint(5, 50, (4, 9), generator=generator), 1)
    chosen = (torch.rand(4, 9, generator=generator) < 0.4) & (mask == 1)
    chosen[:, 0] = True
    chosen &= torch.isin(torch.arange(4), torch.tensor(masked_rows, dtype=torch.long))[:, None]
    flat = chosen.flatten().nonzero().flatten()
    padding = 16 - len(flat)
    return {
        "input_ids": torch.where(chosen, 4, clean),
        "attention_mask": mask,
        "clean_input_ids": clean,
        "masked_positions": torch.cat([flat, torch.zeros(padding, dtype=torch.long)]),
        "masked_labels": torch.cat([clean.flatten()[flat], torch.full((padding,), -100)]),
        "full_labels": torch.where(chosen, clean, -100),
    }


def view_of(batch: dict[str, torch.Tensor], *names: str) -> dict[str, torch.Tensor]:
    return {name: batch[name] for name in ("input_ids", "attention_mask", *names)}


def masked_loss(model: Any, batch: dict[str, torch.Tensor], *names: str) -> torch.Tensor:
    output = model(**view_of(batch, "masked_positions", *names))
    objective = MaskedLM()
    terms = DistillationTrainer._means(objective(output, None, batch), objective.count(batch), 1)
    return terms["pretrain_loss"]


# ---- equality with the stock models ----


@pytest.mark.parametrize("names", [(), ("clean_input_ids",)], ids=["one view", "two views"])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_equal_the_stock_model(kind, names):
    """A head that reads the wrong positions, or the clean view, trains a model that cannot fill a mask."""
    ours, stock = pair(kind)
    batch = ragged_batch()
    loss = masked_loss(ours.train(), batch, *names)
    expected = stock.train()(**view_of(batch), labels=batch["full_labels"]).loss
    assert loss.item() == pytest.approx(expected.item(), abs=1e-10)
    loss.backward()
    expected.backward()
    theirs = dict(stock.named_parameters())
    assert any(parameter.grad is not None and bool(parameter.grad.any()) for parameter in theirs.values())
    for name, parameter in ours.named_parameters():
        if theirs[name].grad is None:
            assert parameter.grad is None or not parameter.grad.any(), name
        else:
            torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=0, atol=1e-10, msg=name)


@pytest.mark.parametrize("names", [(), ("masked_positions",)], ids=["one view", "two views"])
@pytest.mark.parametrize("kind", KINDS)
def test_features_equal_the_stock_encoder_on_the_clean_input(kind, names):
    """Features of the masked view, or of a row beside it, distil the student's own guesses."""
    ours, stock = pair(kind)
    batch = ragged_batch()
    features = ours(**view_of(batch, "clean_input_ids", *names)).features
    expected = stock.base_model(batch["clean_input_ids"], batch["attention_mask"]).last_hidden_state
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(features[real], expected[real], rtol=0, atol=1e-10)
    masked = stock.base_model(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    assert not torch.allclose(features[real], masked[real])


@pytest.mark.parametrize("kind", KINDS)
def test_the_distillation_gradient_equals_two_separate_passes(kind):
    """One pass over both views must train exactly what a masked and a clean pass would train together."""
    ours, stock = pair(kind)
    batch = ragged_batch()
    answer = torch.randn(4, 9, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    output = ours(**view_of(batch, "masked_positions", "clean_input_ids"))
    (masked_loss(ours, batch) * 0 + (output.features - answer)[:, 0].square().sum() + output.logits[0].sum()).backward()
    clean = stock.base_model(batch["clean_input_ids"], batch["attention_mask"]).last_hidden_state
    logits = stock(**view_of(batch)).logits.flatten(0, 1)[batch["masked_positions"][0]]
    ((clean - answer)[:, 0].square().sum() + logits.sum()).backward()
    theirs = dict(stock.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=0, atol=1e-10, msg=name)


def test_token_types_reach_both_views():
    """BERT's second sentence would count as the first in one of the views."""
    ours, stock = pair("bert")
    ours.bert.embeddings.token_type_embeddings = torch.nn.Embedding(2, 16).double()
    stock.bert.embeddings.token_type_embeddings = copy.deepcopy(ours.bert.embeddings.token_type_embeddings)
    batch = ragged_batch()
    types = (torch.arange(9) > 1).long().expand(4, 9)
    output = ours(**view_of(batch, "masked_positions", "clean_input_ids"), token_type_ids=types)
    clean = {"input_ids": batch["clean_input_ids"], "attention_mask": batch["attention_mask"], "token_type_ids": types}
    torch.testing.assert_close(output.features, stock.bert(**clean).last_hidden_state, rtol=0, atol=1e-10)
    logits = stock(**view_of(batch), token_type_ids=types).logits.flatten(0, 1)[batch["masked_positions"]]
    torch.testing.assert_close(output.logits, logits, rtol=0, atol=1e-10)


# ---- parts that are left out ----


@pytest.mark.parametrize("kind", KINDS)
def test_a_view_that_is_not_asked_for_is_not_computed(kind):
    """Round 0 would pay for a clean pass, and the ablation for the vocabulary-sized head."""
    ours, _ = pair(kind)
    batch, rows = ragged_batch(), []
    ours.base_model.register_forward_hook(lambda module, inputs, output: rows.append(len(output.last_hidden_state)))
    masked = ours(**view_of(batch, "masked_positions"))
    assert masked.features is None and masked.logits.shape == (16, 50)
    clean = ours(**view_of(batch, "clean_input_ids"))
    assert clean.logits is None and clean.features.shape == (4, 9, 16)
    both = ours(**view_of(batch, "masked_positions", "clean_input_ids"))
    assert both.logits.shape == (16, 50) and both.features.shape == (4, 9, 16)
    assert rows == [4, 4, 8]  # one call of the encoder each, or DDP would not synchronise


@pytest.mark.parametrize("kind", KINDS)
def test_without_both_it_is_the_parents_own_forward(kind):
    """A user's fill-mask pipeline and the stock evaluation would break on a trained student."""
    ours, stock = pair(kind)
    batch = ragged_batch()
    found = ours(**view_of(batch), labels=batch["full_labels"])
    expected = stock(**view_of(batch), labels=batch["full_labels"])
    assert found.loss.item() == pytest.approx(expected.loss.item(), abs=1e-12)
    assert torch.equal(found.logits, expected.logits)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_without_masked_tokens_costs_nothing_and_breaks_nothing(kind):
    """0 / 0 in one unlucky batch of short texts makes every weight NaN."""
    ours, _ = pair(kind)
    loss = masked_loss(ours, ragged_batch(masked_rows=()), "clean_input_ids")
    loss.backward()
    assert loss.item() == 0.0
    for name, parameter in ours.named_parameters():
        assert parameter.grad is None or not parameter.grad.any(), name  # NaN counts as any


def test_a_row_without_masked_tokens_changes_no_loss():
    """Short texts often have no masked token: counted as a unit, they would shrink the loss of the others."""
    ours, _ = pair("roberta")
    batch = ragged_batch(masked_rows=(0, 2))
    kept = {name: value[[0, 2]] for name, value in batch.items() if value.dim() == 2}
    flat = (kept["full_labels"] != -100).flatten().nonzero().flatten()
    kept |= {"masked_positions": flat, "masked_labels": kept["full_labels"].flatten()[flat]}
    assert masked_loss(ours, batch).item() == pytest.approx(masked_loss(ours, kept).item(), abs=1e-12)


# ---- checkpoints ----


@pytest.mark.parametrize("kind", KINDS)
def test_saved_as_the_plain_model_that_it_is(kind, tmp_path):
    """A student that only loads where hfkd is installed is no use to anybody on the Hub."""
    ours, stock = pair(kind)
    ours.save_pretrained(tmp_path / "ours")
    stock.save_pretrained(tmp_path / "stock")
    assert {p.name for p in (tmp_path / "ours").iterdir()} == {p.name for p in (tmp_path / "stock").iterdir()}
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("ours", "stock")]
    assert configs[0] == configs[1] and configs[0]["architectures"] == [type(stock).__name__]
    saved, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "stock"))
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in saved)
    loaded, report = type(stock).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert all(torch.equal(value, stock.state_dict()[name]) for name, value in loaded.double().state_dict().items())


def test_a_saved_student_loads_without_hfkd(tmp_path):
    """The class name in config.json must mean something to a transformers that has never seen this package."""
    ours, _ = pair("roberta")
    ours.float().save_pretrained(tmp_path)
    code = tmp_path / "loads.py"
    code.write_text(
        "import sys; from transformers import AutoModelForMaskedLM as Auto\n"
        f"model = Auto.from_pretrained({str(tmp_path)!r})\n"
        "assert not any(name.split('.')[0] == 'hfkd' for name in sys.modules)\n"
        "print(type(model).__module__, type(model).__name__)"
    )
    run = launching.run(code, log=tmp_path / "log")
    assert run.returncode == 0, run.stderr
    assert run.stderr.split()[-2:] == ["transformers.models.roberta.modeling_roberta", "RobertaForMaskedLM"]


@pytest.mark.parametrize("kind", KINDS)
def test_start_weights_load_whole_and_in_float32(kind, tmp_path):
    """A fresh head on top of pre-trained weights drags the body along; a bfloat16 student rounds its updates away."""
    _, stock = pair(kind)
    stock.bfloat16().save_pretrained(tmp_path)
    model = two_view_model(str(tmp_path))
    assert type(model) is TWO_VIEWS[kind]
    state = model.state_dict()
    assert {value.dtype for value in state.values() if value.is_floating_point()} == {torch.float32}
    assert all(torch.equal(state[name], value.to(state[name].dtype)) for name, value in stock.state_dict().items())


# ---- errors ----


def test_another_architecture_is_refused_with_the_ones_there_are(tmp_path):
    """Loading DistilBERT into RoBERTa's class would start from random weights."""
    transformers.DistilBertConfig(dim=16, n_heads=2, n_layers=1, hidden_dim=32, vocab_size=50).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"'distilbert'.*roberta, xlm-roberta, bert"):
        two_view_model(str(tmp_path))


def test_an_unreachable_id_names_the_ways_without_a_network():
    """A bare connection error on a node without internet says nothing about the embedded model or the cache."""
    with pytest.raises(OSError, match=r"(?s)'no-one/none'.*neither.*--model_name_or_path.*hf download no-one/none"):
        two_view_model("no-one/none")


def test_a_folder_without_weights_says_what_is_missing(tmp_path):
    """'Neither a folder nor reachable' about a folder that is there sends people looking in the wrong place."""
    tiny_config("roberta").save_pretrained(tmp_path)
    with pytest.raises(OSError, match="safetensors") as error:
        two_view_model(str(tmp_path))
    assert "neither" not in str(error.value)


# ---- the paper's size ----


def test_one_step_of_self_distillation_at_the_size_of_roberta_base():
    """Tiny models hide what depends on width, 514 positions or the 50,265-word head. Depth is cut to 2 of 12 layers."""
    torch.manual_seed(0)
    config = transformers.RobertaConfig(
        vocab_size=50_265,
        max_position_embeddings=514,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        num_hidden_layers=2,
    )
    assert (config.hidden_size, config.num_attention_heads, config.intermediate_size) == (768, 12, 3072)
    student = TWO_VIEWS["roberta"](config).train()
    teacher = ModelTeacher(transformers.RobertaModel(config, add_pooling_layer=False), view="clean_")
    clean = torch.randint(5, 50_264, (2, 16))
    clean[1, 12:] = 1
    positions = torch.tensor([2, 9, 20, 0])
    batch = {
        "input_ids": clean.flatten().index_fill(0, positions[:3], 50_264).view(2, 16),
        "attention_mask": (clean != 1).long(),
        "clean_input_ids": clean,
        "masked_positions": positions,
        "masked_labels": torch.where(torch.arange(4) < 3, clean.flatten()[positions], -100),
    }
    objective = SelfDistill()
    output = student(**{name: value for name, value in batch.items() if name != "masked_labels"})
    terms = objective(output, teacher(batch), batch)
    means = DistillationTrainer._means(terms, objective.count(batch), 1)
    sum(means.values()).backward()
    # An untrained model guesses among the whole vocabulary, and normalised features are about 2 x 768 apart
    assert means["pretrain_loss"].item() == pytest.approx(torch.tensor(50_265.0).log().item(), rel=0.1)
    assert 768 < means["distill_loss"].item() < 4 * 768
    before = student.lm_head.bias.detach().clone()
    assert all(bool(torch.isfinite(p.grad).all()) for p in student.parameters() if p.grad is not None)
    torch.optim.SGD(student.parameters(), lr=1e-3).step()
    assert not torch.equal(before, student.lm_head.bias)
    assert all(p.grad is None for p in teacher.model.parameters())
