"""Students cut from their teacher: the same computation as the teacher's own layers, a checkpoint of its own."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from hfkd.models.student import init_student_from_teacher
from hfkd.models.two_view import TWO_VIEWS
from hfkd.testing import tiny_roberta_config

DEPTH = 5  # ModernBERT's layers 0 and 3 then attend to everything, 1, 2 and 4 to their neighbours
LABELS = {"id2label": {0: "no", 1: "yes", 2: "both"}, "label2id": {"no": 0, "yes": 1, "both": 2}}
DISENTANGLED = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 0}
SETTINGS: dict[str, dict[str, Any]] = {
    "Bert": {},
    "Roberta": {},
    "DistilBert": {"dim": 16, "n_layers": DEPTH, "n_heads": 2, "hidden_dim": 32, "vocab_size": 50},
    "Deberta": DISENTANGLED,
    "DebertaV2": {**DISENTANGLED, "position_buckets": 4, "norm_rel_ebd": "layer_norm", "conv_kernel_size": 3},
    "ModernBert": {"local_attention": 4, "cls_token_id": 0, "sep_token_id": 2, "classifier_dropout": 0.0},
    "ViT": {"image_size": 8, "patch_size": 4},
}
TEXT_HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForMaskedLM")
KINDS = [*(name + head for name in SETTINGS if name != "ViT" for head in TEXT_HEADS), "ViTForImageClassification"]
STACKS = {
    "Bert": "bert.encoder.layer",
    "Roberta": "roberta.encoder.layer",
    "DistilBert": "distilbert.transformer.layer",
    "Deberta": "deberta.encoder.layer",
    "DebertaV2": "deberta.encoder.layer",
    "ModernBert": "model.layers",
    "ViT": "vit.layers",
}


def scrambled(model: Any) -> Any:
    """Weights large enough that every layer, and every key of a layer, changes the answer."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def teacher_of(kind: str, **overrides: Any) -> Any:
    """In float64 and eval mode."""
    name, _, _ = kind.partition("For")
    common = {k: v for k, v in tiny_roberta_config().to_dict().items() if k not in ("model_type", "architectures")}
    common = {} if name in ("DistilBert", "ViT") else common
    sizes = {"hidden_size": 16, "num_hidden_layers": DEPTH, "num_attention_heads": 2, "intermediate_size": 32}
    sizes = {} if name == "DistilBert" else sizes
    config = getattr(transformers, f"{name}Config")(**{**common, **sizes, **LABELS, **SETTINGS[name], **overrides})
    return scrambled(getattr(transformers, kind)(config)).double().eval()


def inputs_of(model: Any) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64)}
    mask = (torch.arange(9) < torch.tensor([9, 6])[:, None]).long()
    return {"input_ids": torch.randint(5, 50, (2, 9), generator=generator), "attention_mask": mask}


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**inputs_of(model)).logits


def cut_by_hand(teacher: Any, layers: tuple[int, ...]) -> Any:
    model = copy.deepcopy(teacher)
    path, _, last = STACKS[type(teacher).__name__.partition("For")[0]].rpartition(".")
    parent = model.get_submodule(path)
    setattr(parent, last, torch.nn.ModuleList(getattr(parent, last)[number] for number in layers))
    return model


# ---- the same computation ----


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_with_all_layers_is_its_teacher(kind):
    """A student that lost its embeddings or its head on the way starts from noise, and distillation hides it."""
    teacher = teacher_of(kind)
    student = init_student_from_teacher(teacher, layers=range(DEPTH))
    assert type(student) is type(teacher)
    assert torch.equal(logits_of(student), logits_of(teacher))


@pytest.mark.parametrize("layers", [(0,), (0, 3), (0, 4, 3, 1)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_student_computes_what_the_chosen_layers_compute(kind, layers):
    """Layers in the wrong place, or a local layer that now attends to everything, start training far from the teacher."""
    teacher = teacher_of(kind)
    student = logits_of(init_student_from_teacher(teacher, layers=layers))
    torch.testing.assert_close(student, logits_of(cut_by_hand(teacher, layers)), rtol=0, atol=1e-12)
    assert float((student - logits_of(teacher)).abs().max()) > 1e-3


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "ModernBert" not in kind])
def test_a_student_need_not_start_with_the_first_layer(kind):
    """A cut that quietly puts layer 0 first trains another student than the one asked for."""
    teacher = teacher_of(kind)
    student = init_student_from_teacher(teacher, layers=(3, 1))
    torch.testing.assert_close(logits_of(student), logits_of(cut_by_hand(teacher, (3, 1))), rtol=0, atol=1e-12)


def test_a_two_view_teacher_gives_a_two_view_student():
    """Rounds of self-distillation need the two-view forward; a plain student fails at its first step."""
    teacher = TWO_VIEWS["roberta"](tiny_roberta_config())
    student = init_student_from_teacher(teacher, 1)
    assert type(student) is TWO_VIEWS["roberta"] and len(student.roberta.encoder.layer) == 1


# ---- a checkpoint of its own ----


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_student_loads_whole(kind, tmp_path):
    """A configuration that tells another depth or kind of layers loads with random weights and a log line."""
    student = init_student_from_teacher(teacher_of(kind), layers=(0, 3, 1))
    student.save_pretrained(tmp_path)
    loaded, info = type(student).from_pretrained(tmp_path, output_loading_info=True, dtype=torch.float64)
    assert not any(info.values()), info
    assert loaded.config.num_hidden_layers == 3
    weights, saved = loaded.state_dict(), student.state_dict()
    assert weights.keys() == saved.keys() and all(torch.equal(weights[key], saved[key]) for key in saved)
    # not equal to the last bit: matrix products depend on where in memory a file's weights lie
    torch.testing.assert_close(logits_of(loaded), logits_of(student), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "MaskedLM" in kind])
def test_tied_weights_stay_tied(kind):
    """An untied vocabulary matrix trains twice as many weights, half of which are lost when it is saved."""
    student = init_student_from_teacher(teacher_of(kind), 2)
    assert student.get_output_embeddings().weight is student.get_input_embeddings().weight


def test_untied_weights_stay_untied():
    """A head that becomes the embeddings has lost what the teacher learned in it."""
    teacher = teacher_of("BertForMaskedLM", tie_word_embeddings=False)
    student = init_student_from_teacher(teacher, 2)
    assert torch.equal(student.get_output_embeddings().weight, teacher.get_output_embeddings().weight)
    assert not torch.equal(student.get_output_embeddings().weight, student.get_input_embeddings().weight)


@pytest.mark.parametrize("kind", KINDS)
def test_the_teacher_is_left_alone(kind):
    """A teacher that shares storage with its student moves along with it, and the student chases itself."""
    teacher = teacher_of(kind).requires_grad_(False)
    before, settings = copy.deepcopy(teacher.state_dict()), teacher.config.to_dict()
    student = init_student_from_teacher(teacher, layers=(0, 2))
    places = {weight.untyped_storage().data_ptr() for weight in [*teacher.parameters(), *teacher.buffers()]}
    assert not places & {weight.untyped_storage().data_ptr() for weight in [*student.parameters(), *student.buffers()]}
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    student.config.num_hidden_layers = 17
    student.config.id2label[0] = "changed"
    after = teacher.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert teacher.config.to_dict() == settings
    assert not teacher.training and not any(parameter.requires_grad for parameter in teacher.parameters())


def test_a_student_of_a_frozen_teacher_can_train():
    """A student that inherits requires_grad=False or eval mode trains without an error and never moves."""
    student = init_student_from_teacher(teacher_of("BertForSequenceClassification").requires_grad_(False), 2)
    assert student.training and all(module.training for module in student.modules())
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_the_teachers_training_flag_is_kept():
    """A teacher switched to eval mode in the middle of its own training loses its dropout."""
    teacher = teacher_of("BertForSequenceClassification").train()
    init_student_from_teacher(teacher, 2)
    assert teacher.training


def test_labels_and_attention_implementation_are_kept():
    """Classes in another order turn the teacher's answers into noise; sdpa returns no attentions to distil."""
    teacher = teacher_of("BertForSequenceClassification", problem_type="multi_label_classification")
    teacher.set_attn_implementation("eager")
    config = init_student_from_teacher(teacher, 2).config
    assert (config.id2label, config.label2id) == (LABELS["id2label"], LABELS["label2id"])
    assert config.problem_type == "multi_label_classification"
    assert config._attn_implementation == "eager"


def test_the_student_does_not_pass_for_the_teachers_checkpoint():
    """peft writes this name into adapters: loaded again, they would sit on the deep teacher instead of the student."""
    teacher = teacher_of("BertForSequenceClassification", _name_or_path="org/the-teacher")
    assert teacher.name_or_path == "org/the-teacher"
    assert init_student_from_teacher(teacher, 2).name_or_path == ""


@pytest.mark.parametrize(
    ("given", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
    ids=str,
)
def test_a_student_trains_in_float32_at_least(given, expected):
    """In bfloat16, updates below one part in 256 of a weight are lost: the loss stops falling without a reason."""
    teacher = teacher_of("BertForSequenceClassification").to(given)
    student = init_student_from_teacher(teacher, 2)
    assert {parameter.dtype for parameter in student.parameters()} == {expected}
    assert student.config.dtype == expected
    assert torch.equal(student.classifier.weight, teacher.classifier.weight.to(expected))


# ---- which layers ----


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6, 7, 11, 12])
def test_layers_are_evenly_spaced(count):
    """Another spacing than DistilBERT's is another student than the one that the literature reports."""
    sizes = {"num_hidden_layers": 12, "hidden_size": 4, "intermediate_size": 4, "num_attention_heads": 1}
    teacher = teacher_of("BertForSequenceClassification", **sizes)
    for number, layer in enumerate(teacher.bert.encoder.layer):
        layer.output.dense.bias.data.fill_(number)
    student = init_student_from_teacher(teacher, num_hidden_layers=count)
    copied = [int(layer.output.dense.bias[0]) for layer in student.bert.encoder.layer]
    assert copied == np.rint(np.linspace(0, 11, count)).astype(int).tolist()
    if count == 6:
        assert copied == [0, 2, 4, 7, 9, 11]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "not neither"),
        ({"num_hidden_layers": 2, "layers": (0, 1)}, "not both"),
        ({"num_hidden_layers": 6}, "num_hidden_layers is 6, but the teacher has 5 layers"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"layers": ()}, "layers is empty"),
        ({"layers": (0, 5, 7)}, r"layers has \[5, 7\], but the teacher has layers 0 to 4"),
        ({"layers": (0, -1)}, r"layers has \[-1\]"),
        ({"layers": (0, 2, 2)}, r"a layer twice: \[0, 2, 2\]"),
        ({"layers": (0, 1, 2, 3, 4, 5)}, r"layers has \[5\]"),
    ],
)
def test_a_choice_that_cannot_be_is_refused(arguments, message):
    """-1 as Python counts would copy the last layer where a typing error was meant to be seen."""
    with pytest.raises(ValueError, match=message):
        init_student_from_teacher(teacher_of("BertForSequenceClassification"), **arguments)


# ---- classes that cannot be cut ----


@pytest.mark.parametrize("layers", [(1, 2), (3,), (2, 0)], ids=str)
def test_modernbert_starts_with_its_first_layer(layers):
    """Its layer 0 has no attn_norm: elsewhere it would get a random one, and another layer in its place would lose its own."""
    with pytest.raises(ValueError, match=r"attn_norm.*must start with 0"):
        init_student_from_teacher(teacher_of("ModernBertForMaskedLM"), layers=layers)


def test_a_kind_of_layer_that_no_list_describes_is_refused():
    """GPT-Neo's weights fit by shape, so a local layer would silently become a global one."""
    sizes = {"num_layers": 4, "hidden_size": 16, "num_heads": 2, "vocab_size": 50, "window_size": 2}
    config = transformers.GPTNeoConfig(**sizes, attention_types=[[["global", "local"], 2]], max_position_embeddings=20)
    teacher = transformers.GPTNeoModel(config)
    with pytest.raises(ValueError, match=r"layer 1 of the teacher cannot be layer 0.*attention_type is local"):
        init_student_from_teacher(teacher, layers=(1, 2))
    assert len(init_student_from_teacher(teacher, layers=(2, 3)).h) == 2


def small(name: str, **settings: Any) -> Any:
    return getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**settings))


def without_pooler() -> Any:
    return transformers.BertModel(tiny_roberta_config(model_type="bert"), add_pooling_layer=False)


def with_adapter() -> Any:
    import peft

    model = transformers.RobertaForSequenceClassification(tiny_roberta_config())
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["query"]))


BART = {"d_model": 8, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
BART_HEADS = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 50}
SWIN = {"image_size": 16, "patch_size": 2, "embed_dim": 4, "depths": [1, 1], "num_heads": [1, 1], "window_size": 4}
ALBERT = {"hidden_size": 8, "embedding_size": 4, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 50}
UNFIT = {
    "two stacks": (lambda: small("Bart", **BART, **BART_HEADS), r"BartModel.*encoder.layers, decoder.layers"),
    "no stack": (lambda: small("Albert", **ALBERT, intermediate_size=8), r"AlbertModel.*3 hidden layers.*none"),
    "depth from elsewhere": (lambda: small("Swin", **SWIN), "SwinModel does not take its depth"),
    "options of the class": (without_pooler, r"BertModel.*add_pooling_layer.*\n.*pooler.dense.weight"),
    "adapter": (with_adapter, "PeftModel.*merge_and_unload"),
    "adapter inside": (lambda: with_adapter().base_model.model, r"adapters: merge them first"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_a_class_that_cannot_be_cut_is_refused_by_name(name):
    """A half-copied student has random weights that nobody notices."""
    make, message = UNFIT[name]
    with pytest.raises(ValueError, match=message):
        init_student_from_teacher(make(), layers=(0,))
