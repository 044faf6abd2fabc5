"""Queries, keys and values on a model's own output: what the attention works on, with gradients, and nothing left over."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import weakref
from typing import Any

import pytest
import torch
import transformers
from torch.nn.functional import linear

from hfkd.models.projections import QueryKeyValueHooks, answer_with_query_key_value, count_attention_layers
from hfkd.testing import tiny_roberta_config

HEADS, WIDTH, DEPTH = 2, 16, 3
TEXT = {"vocab_size": 50, "max_position_embeddings": 40, "pad_token_id": 1}
SIZES = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS, "intermediate_size": 32}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
DISTIL = {"dim": WIDTH, "n_layers": DEPTH, "n_heads": HEADS, "hidden_dim": 32, "dropout": 0.0, "attention_dropout": 0.0}
SPECIAL = {"bos_token_id": 0, "cls_token_id": 0, "eos_token_id": 2, "sep_token_id": 2}
SETTINGS: dict[str, dict[str, Any]] = {
    "Bert": {**TEXT, **SIZES, **NO_DROPOUT},
    "Roberta": {**TEXT, **SIZES, **NO_DROPOUT},
    "DistilBert": {**TEXT, **DISTIL, "seq_classif_dropout": 0.0},
    "Deberta": {**TEXT, **SIZES, **NO_DROPOUT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "DebertaV2": {**TEXT, **SIZES, **NO_DROPOUT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "ModernBert": {**TEXT, **SIZES, **SPECIAL, "local_attention": 4, "attention_bias": True},
    "ViT": {**SIZES, **NO_DROPOUT, "image_size": 8, "patch_size": 4},
}


def model_of(name: str, **overrides: Any) -> Any:
    """In float64, with weights and biases far from their first values."""
    torch.manual_seed(0)
    head = "ForImageClassification" if name == "ViT" else "ForSequenceClassification"
    config = getattr(transformers, f"{name}Config")(**{**SETTINGS[name], **overrides})
    model = getattr(transformers, name + head)(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def inputs_of(name: str, rows: int = 4, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    if name == "ViT":
        return {"pixel_values": torch.randn(rows, 3, 8, 8, generator=generator, dtype=torch.float64)}
    return {"input_ids": torch.randint(5, 50, (rows, 9), generator=generator)}


def separate(attention: Any, names: str, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
    projections = [getattr(attention, name) for name in names.split()]
    return tuple(linear(hidden, projection.weight, projection.bias) for projection in projections)


def modernbert(layer: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
    weight, bias = layer.attn.Wqkv.weight, layer.attn.Wqkv.bias
    rows = [slice(start, start + WIDTH) for start in (0, WIDTH, 2 * WIDTH)]
    return tuple(linear(layer.attn_norm(hidden), weight[part], bias[part]) for part in rows)


def deberta(layer: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Head by head: in_proj's rows are query, key and value of head 0, then those of head 1."""
    attention, size = layer.attention.self, WIDTH // HEADS
    biases = (attention.q_bias, torch.zeros(WIDTH, dtype=torch.float64), attention.v_bias)
    parts = []
    for position, bias in enumerate(biases):
        starts = [(3 * head + position) * size for head in range(HEADS)]
        heads = [linear(hidden, attention.in_proj.weight[start : start + size]) for start in starts]
        parts.append(torch.cat(heads, dim=-1) + bias)
    return tuple(parts)


BY_HAND: dict[str, Any] = {
    "Bert": lambda layer, hidden: separate(layer.attention.self, "query key value", hidden),
    "Roberta": lambda layer, hidden: separate(layer.attention.self, "query key value", hidden),
    "DistilBert": lambda layer, hidden: separate(layer.attention, "q_lin k_lin v_lin", hidden),
    "Deberta": deberta,
    "DebertaV2": lambda layer, hidden: separate(layer.attention.self, "query_proj key_proj value_proj", hidden),
    "ModernBert": modernbert,
    "ViT": lambda layer, hidden: separate(layer.attention, "q_proj k_proj v_proj", layer.layernorm_before(hidden)),
}
LAYERS_OF: dict[str, Any] = {
    "DistilBert": lambda base: base.transformer.layer,
    "ModernBert": lambda base: base.layers,
    "ViT": lambda base: base.layers,
}


def by_hand(name: str, model: Any, output: Any, layers: tuple[int, ...]) -> list[tuple[torch.Tensor, ...]]:
    stack = LAYERS_OF.get(name, lambda base: base.encoder.layer)(model.base_model)
    return [BY_HAND[name](stack[layer], output.hidden_states[layer]) for layer in layers]


def score(qkv: Any) -> torch.Tensor:
    """Something that depends on every entry of every tensor, per example summed."""
    return sum((tensor * tensor.cos()).sum() for triple in qkv for tensor in triple)


# ---- the right tensors ----


@pytest.mark.parametrize("layers", [(0,), (2, 0), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("name", SETTINGS)
def test_what_is_kept_is_what_the_layer_computes(name, layers):
    """Keys for queries, heads mixed up, a bias or the norm before the attention left out: relations of nothing."""
    model = model_of(name)
    answer_with_query_key_value(model, layers)
    output = model(**inputs_of(name), output_hidden_states=True)
    for kept, expected in zip(output.qkv, by_hand(name, model, output, layers), strict=True):
        for tensor, reference in zip(kept, expected, strict=True):
            assert tensor.shape == (4, output.hidden_states[0].shape[1], WIDTH)
            torch.testing.assert_close(tensor, reference, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "ModernBert"])  # rotates them afterwards
def test_attention_maps_follow_from_queries_and_keys(name):
    """Heads that are cut at the wrong places give relations that no attention of the teacher ever had."""
    plain = {"relative_attention": False, "pos_att_type": []} if name.startswith("Deberta") else {}
    model = model_of(name, attn_implementation="eager", **plain)
    answer_with_query_key_value(model, range(DEPTH))
    output = model(**inputs_of(name), output_attentions=True)
    for (query, key, _), attention in zip(output.qkv, output.attentions, strict=True):
        query, key = (tensor.unflatten(-1, (HEADS, -1)).transpose(1, 2) for tensor in (query, key))
        maps = torch.softmax(query @ key.transpose(-1, -2) / math.sqrt(WIDTH // HEADS), dim=-1)
        torch.testing.assert_close(maps, attention, rtol=0, atol=1e-6)  # the square root of DeBERTa is a float32


@pytest.mark.parametrize("name", SETTINGS)
def test_gradients_are_those_of_the_computation_by_hand(name):
    """A student whose captured tensors are cut off from its weights is not trained, and its loss still varies."""
    model = model_of(name)
    answer_with_query_key_value(model, (1, 2))
    output = model(**inputs_of(name), output_hidden_states=True)
    weights = list(model.parameters())
    expected = torch.autograd.grad(score(by_hand(name, model, output, (1, 2))), weights, allow_unused=True)
    kept = torch.autograd.grad(score(model(**inputs_of(name)).qkv), weights, allow_unused=True)
    assert sum(gradient is not None for gradient in kept) > 15
    for one, other in zip(kept, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_layer_is_counted(name):
    """A count that is off by one compares the student's last layer with another layer of the teacher than was meant."""
    assert count_attention_layers(model_of(name)) == DEPTH


def test_adapters_answer_for_themselves():
    """The base layer's queries do not depend on the adapter: LoRA would train on a constant."""
    import peft

    settings = peft.LoraConfig(target_modules=["query", "value"], init_lora_weights=False, r=2, lora_alpha=4)
    model = peft.get_peft_model(model_of("Bert"), settings)
    answer_with_query_key_value(model, (1,))
    output = model(**inputs_of("Bert"), output_hidden_states=True)
    attention = model.base_model.model.bert.encoder.layer[1].attention.self
    for tensor, projection in zip(output.qkv[0], (attention.query, attention.key, attention.value), strict=True):
        base = getattr(projection, "base_layer", projection)
        reference = linear(output.hidden_states[1], base.weight, base.bias)
        if base is not projection:
            down, up = projection.lora_A["default"].weight, projection.lora_B["default"].weight
            reference = reference + 2.0 * output.hidden_states[1] @ down.T @ up.T
        torch.testing.assert_close(tensor, reference, rtol=0, atol=1e-10)
    score(output.qkv).backward()
    assert float(attention.query.lora_A["default"].weight.grad.abs().sum()) > 0
    model.eval()  # an adapter switched off is the teacher's answer
    with model.disable_adapter():
        off = model(**inputs_of("Bert"), output_hidden_states=True)
    reference = linear(off.hidden_states[1], attention.query.base_layer.weight, attention.query.base_layer.bias)
    torch.testing.assert_close(off.qkv[0][0], reference, rtol=0, atol=1e-10)


# ---- call after call ----


def test_accumulated_gradients_equal_those_of_the_whole_batch():
    """What an earlier micro-batch left behind would be scored, and differentiated, a second time."""
    whole, parts = model_of("Bert"), model_of("Bert")
    batch = inputs_of("Bert")["input_ids"]
    for model, pieces in ((whole, [batch]), (parts, batch.split(1))):
        answer_with_query_key_value(model, (2,))
        for piece in pieces:
            score(model(input_ids=piece).qkv).backward()
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-9)


def test_each_call_answers_for_its_own_input():
    """The tensors of the batch before, in evaluation or after it, are a constant that looks like an answer."""
    model = model_of("Bert")
    answer_with_query_key_value(model, (1,))
    first, second = inputs_of("Bert"), inputs_of("Bert", rows=2, seed=2)
    trained = model(**first)
    with torch.no_grad():
        quiet, other = model.eval()(**first), model(**second)
    again = model.train()(**first)
    assert other.qkv[0][0].shape[0] == 2
    for one, two, three in zip(trained.qkv[0], quiet.qkv[0], again.qkv[0], strict=True):
        assert one.requires_grad and three.requires_grad and not two.requires_grad
        assert torch.equal(one, two) and torch.equal(one, three)


def test_nothing_is_held_after_the_answer_is_gone():
    """One kept tensor holds the whole graph of its step: memory grows by a forward pass until the device is full."""
    model = model_of("Bert")
    answer_with_query_key_value(model, (1,))
    output = model(**inputs_of("Bert"))
    tensors = [weakref.ref(tensor) for tensor in output.qkv[0]]
    score(output.qkv).backward()
    assert all(tensor() is not None for tensor in tensors)
    del output
    gc.collect()
    assert all(tensor() is None for tensor in tensors)


def test_hooks_are_read_once_per_call():
    """A second read that returned the first one's tensors would score a batch that is long gone."""
    model = model_of("Bert")
    hooks = QueryKeyValueHooks(model, (2,))
    output = model(**inputs_of("Bert"), output_hidden_states=True)
    assert "qkv" not in output
    torch.testing.assert_close(hooks.read()[0], by_hand("Bert", model, output, (2,))[0])
    with pytest.raises(RuntimeError, match=r"nothing was kept of attention layers \[2\]"):
        hooks.read()
    model.bert(**inputs_of("Bert"))  # a part of the model
    with pytest.raises(RuntimeError, match="call the very model"):
        hooks.read()


def test_a_call_that_fails_leaves_the_next_one_alone():
    """Half of an interrupted call's tensors must not stand in for the next one's."""
    model = model_of("Bert")
    answer_with_query_key_value(model, (1,))
    with pytest.raises(ValueError):
        model(**inputs_of("Bert"), labels=torch.zeros(3, dtype=torch.long))  # four rows, three labels
    output = model(**inputs_of("Bert"), output_hidden_states=True)
    torch.testing.assert_close(output.qkv[0], by_hand("Bert", model, output, (1,))[0])


@pytest.mark.parametrize("name", SETTINGS)
def test_gradient_checkpointing_changes_nothing(name):
    """Layers that run again in the backward pass would leave their tensors, and their graph, to the next step."""
    plain, saving = model_of(name), model_of(name)
    saving.gradient_checkpointing_enable()
    handles = [answer_with_query_key_value(model, (1,)) for model in (plain, saving)]
    for model in (plain, saving):
        output = model.train()(**inputs_of(name))
        (score(output.qkv) + output.logits.sum()).backward()
    for one, other in zip(plain.parameters(), saving.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-9)
    with pytest.raises(RuntimeError, match="nothing was kept"):
        handles[1].read()


def test_checkpointing_that_hides_the_gradients_is_refused():
    """Reentrant checkpointing runs the layers under no_grad: the relations would be constants and train nothing."""
    model = model_of("Bert").train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    answer_with_query_key_value(model, (1,))
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        model(**inputs_of("Bert"))


# ---- the model stays a model ----


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("name", ["Bert", "Deberta"])
def test_a_copy_answers_for_itself(name, duplicate):
    """A copy, a round's teacher say, that writes where its student reads makes the student its own target."""
    model = model_of(name)
    hooks = QueryKeyValueHooks(model, (1,))
    answers = answer_with_query_key_value(model, (1,))
    expected = model(**inputs_of(name)).qkv
    copied = duplicate(model)  # while `hooks` still hold tensors with a graph
    assert torch.equal(hooks.read()[0][0], expected[0][0])
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(2)
    theirs = copied(**inputs_of(name))
    with pytest.raises(RuntimeError, match="nothing was kept"):
        hooks.read()
    assert not torch.equal(theirs.qkv[0][0], expected[0][0])
    assert torch.equal(model(**inputs_of(name)).qkv[0][2], expected[0][2])
    score(theirs.qkv).backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    answers.remove()
    assert "qkv" in copied(**inputs_of(name)) and "qkv" not in model(**inputs_of(name))


def test_a_saved_model_knows_nothing_of_its_hooks(tmp_path):
    """The published student must load as the plain model that it is."""
    model = model_of("Bert")
    keys = list(model.state_dict())
    answer_with_query_key_value(model, (1,))
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and "qkv" not in loaded(**inputs_of("Bert"))


def test_removed_hooks_leave_no_trace():
    """A hook that stays behind keeps a batch in memory and adds a key that evaluation gathers as predictions."""
    model = model_of("Deberta")
    answer_with_query_key_value(model, (0, 1)).remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert "qkv" not in model(**inputs_of("Deberta"))


def test_the_answer_is_still_the_models_own_output():
    """Trainers index outputs and look at their class: logits that move by one place are another head's."""
    model = model_of("Bert")
    plain = model(**inputs_of("Bert"), labels=torch.tensor([0, 1, 0, 1]))
    answer_with_query_key_value(model, (1,))
    output = model(**inputs_of("Bert"), labels=torch.tensor([0, 1, 0, 1]))
    assert isinstance(output, type(plain)) and list(output) == [*plain, "qkv"]
    assert torch.equal(output[0], plain.loss) and torch.equal(output[1], plain.logits)
    assert output["qkv"] is output.qkv


def test_ddp_can_rebuild_the_answer(tmp_path):
    """With find_unused_parameters, DDP rebuilds the output from its class; a key that the class does not know is an error
    on two processes only."""
    model = model_of("Bert")
    answer_with_query_key_value(model, (1,))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        for _ in range(2):
            output = wrapped(**inputs_of("Bert"))
            score(output.qkv).backward()
    finally:
        torch.distributed.destroy_process_group()
    ddp = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    score(model(**inputs_of("Bert")).qkv).backward()
    for twice, parameter in zip(ddp, model.parameters(), strict=True):
        if parameter.grad is not None:
            torch.testing.assert_close(twice, 2 * parameter.grad, rtol=1e-9, atol=1e-9)


def test_a_compiled_model_answers_in_one_graph():
    """Hooks that break the graph undo torch.compile in every layer, without a word."""
    model = model_of("Bert")
    expected = model(**inputs_of("Bert")).logits
    answer_with_query_key_value(model, (0, 2))
    plain = model(**inputs_of("Bert")).qkv
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for _ in range(2):
        output = compiled(**inputs_of("Bert"))
        torch.testing.assert_close(output.logits, expected)
        torch.testing.assert_close(output.qkv, plain)


# ---- refusals ----


BART = {"d_model": 8, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
BART_HEADS = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 50}
RESNET = {"embedding_size": 4, "hidden_sizes": [4], "depths": [1], "layer_type": "basic"}
UNFIT = {
    "none": (lambda: transformers.ResNetModel(transformers.ResNetConfig(**RESNET)), r"ResNetModel.*found: none"),
    "several": (
        lambda: transformers.BartModel(transformers.BartConfig(**BART, **BART_HEADS)),
        r"BartModel.*decoder.layers.N.encoder_attn, decoder.layers.N.self_attn, encoder.layers.N.self_attn",
    ),
    "crossing": (
        lambda: model_of("Bert", is_decoder=True, add_cross_attention=True),
        r"BertForSequenceClassification.*layer.N.attention.self, .*layer.N.crossattention.self",
    ),
}


@pytest.mark.parametrize("name", UNFIT)
def test_a_class_without_one_stack_of_attention_is_refused_by_name(name):
    """The third attention of a decoder is not its third layer."""
    make, message = UNFIT[name]
    with pytest.raises(ValueError, match=message):
        count_attention_layers(make())
    with pytest.raises(ValueError, match=message):
        answer_with_query_key_value(make(), (0,))


@pytest.mark.parametrize("layers", [(), (3,), (-1,), (1, 1)], ids=str)
def test_layers_that_the_model_does_not_have_are_refused(layers):
    """A layer counted as hidden_states are, from 1, is the layer above the one that was meant."""
    model = model_of("Bert")
    with pytest.raises(ValueError, match=r"give numbers from 0 to 2, each once"):
        answer_with_query_key_value(model, layers)
    assert not any(module._forward_hooks for module in model.modules())


def test_layers_that_share_one_attention_are_refused():
    """ALBERT calls one layer again and again; the last call would pass for all of them."""
    sizes = {"hidden_size": 8, "embedding_size": 4, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = transformers.AlbertConfig(**sizes, intermediate_size=8, vocab_size=50)
    model = transformers.AlbertModel(config)
    answer_with_query_key_value(model, (0,))
    with pytest.raises(RuntimeError, match="attention layer 0 ran twice"):
        model(**inputs_of("Bert"))


def test_what_cannot_carry_the_answer_is_refused():
    """A tuple has no keys, and a second answer would replace the layers of the first."""
    model = transformers.RobertaForSequenceClassification(tiny_roberta_config())
    answer_with_query_key_value(model, (0,))
    with pytest.raises(TypeError, match="return_dict=True"):
        model(**inputs_of("Roberta"), return_dict=False)
    second = answer_with_query_key_value(model, (1,))
    with pytest.raises(RuntimeError, match="qkv already"):
        model(**inputs_of("Roberta"))
    second.remove()
    assert "qkv" in model(**inputs_of("Roberta"))
