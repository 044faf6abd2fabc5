"""A teacher is frozen, in eval mode and reads its own view of the input."""

from __future__ import annotations

import copy
import json
import logging

import pytest
import torch
from torch import nn
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    RobertaForTokenClassification,
    RobertaModel,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.utils import logging as transformers_logging

from hfkd.objectives import SelfDistill
from hfkd.outputs import TeacherOutput
from hfkd.teachers import AdapterTeacher, CachedTeacher, ModelTeacher, Teacher
from hfkd.teachers import model as teachers
from hfkd.teachers.adapter import adapter_off
from hfkd.teachers.labels import label_order
from hfkd.teachers.model import fast_bfloat16
from hfkd.testing import check_teacher, tiny_roberta_config


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def classifier(**overrides):
    """With dropout, so that an answer in training mode shows."""
    return RobertaForSequenceClassification(tiny_roberta_config(num_labels=3, hidden_dropout_prob=0.5, **overrides))


def encoder():
    return RobertaModel(tiny_roberta_config(hidden_dropout_prob=0.5), add_pooling_layer=False)


def batch_of(*views: str) -> dict[str, torch.Tensor]:
    """Different random tokens for each view, one mask; lengths 6, 4 and 2."""
    mask = (torch.arange(6) < torch.tensor([6, 4, 2])[:, None]).long()
    ids = {f"{view}input_ids": torch.where(mask == 1, torch.randint(5, 50, (3, 6)), 1) for view in views}
    return {**ids, "attention_mask": mask}


# ---- our teacher ----


@pytest.mark.parametrize("build", [classifier, encoder])
def test_model_teacher_keeps_the_contract(build):
    """A teacher with dropout or gradients gives soft targets that move while the student trains."""
    check_teacher(ModelTeacher(build()), {**batch_of(""), "labels": torch.tensor([0, 1, 2])})


@pytest.mark.parametrize("view", ["clean_", "teacher_"])
def test_the_teacher_reads_its_own_view(view):
    """A teacher that answers the masked input instead of the clean one teaches the student its own guesses."""
    model, batch = encoder(), batch_of("", view)
    if view == "teacher_":
        batch["teacher_attention_mask"] = batch["attention_mask"]
    answer = ModelTeacher(model, view)(batch).features
    direct = model.eval()(batch[f"{view}input_ids"], batch["attention_mask"]).last_hidden_state
    assert torch.equal(answer, direct)
    shared = model(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    assert not torch.allclose(answer, shared)


def test_the_teacher_falls_back_to_the_shared_view():
    """Without the fallback every user with one tokenizer would have to copy the columns."""
    model, batch = classifier(), batch_of("", "clean_")
    answer = ModelTeacher(model, "teacher_")(batch).logits
    assert torch.equal(answer, model.eval()(batch["input_ids"], batch["attention_mask"]).logits)


def test_the_teachers_own_mask_wins():
    """With another tokenizer the student's mask covers the wrong tokens."""
    model, batch = classifier(), batch_of("", "teacher_")
    batch["teacher_attention_mask"] = torch.ones(3, 6, dtype=torch.long)
    answer = ModelTeacher(model)(batch).logits
    assert torch.equal(answer, model(batch["teacher_input_ids"], batch["teacher_attention_mask"]).logits)


def test_no_token_input_of_the_student_reaches_the_teachers_own_tokens():
    """With two tokenizers the student's mask hides some of the teacher's tokens, or has another length and crashes."""
    model, batch = classifier(), batch_of("")
    batch["teacher_input_ids"] = torch.randint(5, 50, (3, 9))  # longer than the student's 6
    batch["token_type_ids"] = torch.zeros(3, 6, dtype=torch.long)
    answer = ModelTeacher(model)(batch).logits
    assert torch.equal(answer, model(batch["teacher_input_ids"]).logits)
    assert ModelTeacher(model).reads(batch) == ("teacher_input_ids",)


def test_inputs_that_are_no_tokens_stay_shared():
    """A vision teacher whose images are not handed on answers nothing."""
    teachers_inputs = teachers.chosen_columns(
        ["teacher_input_ids", "input_ids", "pixel_values"], ["input_ids", "pixel_values"], "teacher_"
    )
    assert teachers_inputs == {"input_ids": "teacher_input_ids", "pixel_values": "pixel_values"}


def test_answers_lie_on_the_students_tokens():
    """With two tokenizers token i of one is not token i of the other: tags would be distilled onto the wrong words."""
    model = RobertaForTokenClassification(tiny_roberta_config(num_labels=3))
    batch = {"input_ids": torch.randint(5, 50, (2, 4)), "teacher_input_ids": torch.randint(5, 50, (2, 7))}
    positions = torch.tensor([[0, 2, 2, 6], [1, 5, -100, -100]])
    teacher = ModelTeacher(model)
    teacher.needs = frozenset({"teacher", "features", "hidden_states"})
    answer = teacher({**batch, "teacher_positions": positions})
    direct = model.eval()(batch["teacher_input_ids"], output_hidden_states=True)
    for i in range(2):
        for j in range(4):
            k = max(int(positions[i, j]), 0)
            assert torch.equal(answer.logits[i, j], direct.logits[i, k])
            assert torch.equal(answer.features[i, j], direct.hidden_states[-1][i, k])
            assert torch.equal(answer.hidden_states[1][i, j], direct.hidden_states[1][i, k])
    assert "teacher_positions" in teacher.columns and "teacher_positions" in teacher.reads(["teacher_positions"])


def test_columns_name_the_views_that_the_trainer_must_keep():
    """The stock trainer drops columns that the student does not name, and the teacher then reads the student's."""
    teacher = ModelTeacher(classifier(), "teacher_")
    assert {"teacher_input_ids", "teacher_attention_mask"} <= set(teacher.columns)
    assert "labels" not in teacher._inputs


def test_labels_never_reach_the_teacher():
    """A teacher that computes its own loss needs the student's label set and costs memory for nothing."""
    batch = {**batch_of(""), "labels": torch.tensor([7, 8, 9])}  # labels that the teacher does not have
    assert ModelTeacher(classifier())(batch).logits.shape == (3, 3)


def test_hidden_states_are_answered_only_when_needed():
    """All hidden states of all layers fill the memory of a run that never reads them."""
    teacher = ModelTeacher(encoder())
    assert teacher(batch_of("")).hidden_states is None
    teacher.needs = frozenset({"teacher", "hidden_states"})
    assert len(teacher(batch_of("")).hidden_states) == 3  # embeddings and two layers
    assert "features" in SelfDistill.needs and teacher(batch_of("")).features.shape == (3, 6, 16)


def test_a_model_with_a_head_answers_its_encoders_features():
    """Feature distillation from a fine-tuned teacher would find no features and need a second, headless model."""
    model = classifier()
    teacher = ModelTeacher(model)
    assert teacher(batch_of("")).features is None
    teacher.needs = frozenset({"teacher", "features"})
    batch = batch_of("")
    answer = teacher(batch)
    assert torch.equal(answer.features, model.roberta(**batch).last_hidden_state)
    assert not model.roberta._forward_hooks


def test_attention_maps_come_when_they_are_needed():
    """SDPA answers an empty tuple with a warning in a log: attention distillation would train on nothing."""
    teacher, batch = ModelTeacher(classifier()), batch_of("")
    plain = teacher(batch).logits
    teacher.prepare(None, {"teacher", "attentions"}, "cpu")
    answer = teacher(batch)
    assert [maps.shape for maps in answer.attentions] == [(3, 2, 6, 6)] * 2
    assert torch.allclose(answer.attentions[0].sum(-1), torch.ones(3, 2, 6), atol=1e-5)
    assert torch.allclose(answer.logits, plain, atol=1e-5)


def test_queries_keys_and_values_come_when_they_are_needed():
    """Hooks that pile up over trials of a search, or stay, cost memory in every later step."""
    teacher, batch = ModelTeacher(encoder()), batch_of("")
    for _ in range(2):
        teacher.prepare(None, {"teacher", "qkv"}, "cpu")
    answer = teacher(batch)
    assert len(answer.qkv) == 2 and len(answer.qkv[0]) == 3
    layer = teacher.model.encoder.layer[1].attention.self
    embedded = teacher.model(**batch, output_hidden_states=True).hidden_states[1]
    assert torch.equal(answer.qkv[1][1], layer.key(embedded))
    teacher.prepare(None, {"teacher"}, "cpu")
    assert teacher(batch).qkv is None and not layer.key._forward_hooks


# ---- dtype ----


@pytest.fixture
def heard():
    """What transformers' loggers say, at level info."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    root = transformers_logging.get_logger("hfkd.teachers")
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    transformers_logging.warning_once.cache_clear()
    yield lines
    root.removeHandler(handler)
    root.setLevel(level)


@pytest.mark.parametrize("fast", [True, False])
def test_auto_takes_bfloat16_where_it_is_fast_and_says_so_once(fast, heard, monkeypatch):
    """bfloat16 that is emulated makes the teacher several times slower than float32, for worse answers."""
    monkeypatch.setattr(teachers, "fast_bfloat16", lambda device: fast)  # this machine is only one of the two kinds
    teacher = ModelTeacher(classifier(), dtype="auto")
    assert teachers.model_dtype(teacher.model) == torch.float32  # the device is not known yet
    for _ in range(2):
        teacher.prepare(None, {"teacher"}, "cpu")
    assert teacher(batch_of("")).logits.dtype == (torch.bfloat16 if fast else torch.float32)
    assert len(heard) == 1 and ("teacher in bfloat16" in heard[0]) == fast


def test_fast_bfloat16_answers_for_every_device():
    """A device that torch cannot ask about must not stop a run."""
    assert isinstance(fast_bfloat16("cpu"), bool)
    assert fast_bfloat16("xla") and fast_bfloat16("xpu") and not fast_bfloat16("mps")


def test_a_dtype_that_does_not_exist_is_refused():
    """An integer type would truncate every weight to 0."""
    for odd in ("int8", "bf16", torch.int64):
        with pytest.raises(ValueError, match="bfloat16"):
            ModelTeacher(classifier(), dtype=odd)
    assert teachers.model_dtype(ModelTeacher(classifier(), dtype="bfloat16").model) == torch.bfloat16


def test_floating_inputs_are_cast_to_the_teachers_dtype():
    """float32 images and bfloat16 weights are a RuntimeError at the first step, in the models that do not cast them."""
    model = ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_labels=2)
    )
    teacher = ModelTeacher(model, dtype=torch.bfloat16)
    images = torch.randn(2, 3, 8, 8)
    batch = {"pixel_values": images}
    assert teacher(batch).logits.dtype == torch.bfloat16
    assert batch["pixel_values"] is images and images.dtype == torch.float32


def test_a_teacher_with_an_adapter_reads_its_inputs_and_features():
    """PEFT's forward names no input and its base_model is the whole network: logits would pass for features."""
    from peft import LoraConfig, get_peft_model

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    base = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **sizes))
    teacher = ModelTeacher(get_peft_model(base, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)))
    teacher.needs = frozenset({"teacher", "features"})
    answer = teacher({"pixel_values": torch.randn(2, 3, 8, 8)})
    assert answer.logits.shape == (2, 2) and answer.features.shape == (2, 5, 16)
    teacher.align_labels(base.config)


def test_the_teachers_dtype_is_its_own():
    """A float32 teacher beside a bfloat16 student takes twice the memory that was asked for, and the other way round."""
    teacher = ModelTeacher(classifier(), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in teacher.model.parameters()} == {torch.bfloat16}
    assert teacher(batch_of("")).logits.dtype == torch.bfloat16
    assert next(ModelTeacher(classifier()).model.parameters()).dtype == torch.float32


def test_frozen_and_in_eval_mode_even_after_train():
    """A callback that calls train() on every module would switch the teacher's dropout on."""
    teacher, batch = ModelTeacher(classifier()), batch_of("")
    first = teacher(batch).logits
    teacher.model.train()
    assert torch.equal(teacher(batch).logits, first)
    assert not teacher.model.training
    assert not first.requires_grad and not any(p.requires_grad for p in teacher.model.parameters())


# ---- loading by name ----


def test_a_folder_loads_as_the_architecture_that_it_names(tmp_path):
    """A classifier loaded as a bare encoder, or with a fresh head, answers noise."""
    model = classifier()
    model.save_pretrained(tmp_path)
    batch = batch_of("")
    teacher = ModelTeacher(tmp_path)
    assert type(teacher.model) is RobertaForSequenceClassification
    assert torch.equal(teacher(batch).logits, model.eval()(**batch).logits)


def test_an_unreachable_id_names_the_ways_without_a_network():
    """A bare connection error on a cluster node without internet sends people to their proxy settings."""
    with pytest.raises(OSError, match=r"(?s)no-one/no-such-teacher.*local folder.*hf download no-one/no-such-teacher"):
        ModelTeacher("no-one/no-such-teacher")


def test_a_folder_without_weights_says_what_is_missing(tmp_path):
    """'Neither a folder nor reachable' about a folder that is there sends people looking in the wrong place."""
    config = tiny_roberta_config()
    config.architectures = ["RobertaForMaskedLM"]
    config.save_pretrained(tmp_path)
    with pytest.raises(OSError, match="safetensors") as error:
        ModelTeacher(tmp_path)
    assert "neither" not in str(error.value)


def test_a_config_without_architecture_is_refused(tmp_path):
    """Guessing a class would load a model whose head is random."""
    config = tiny_roberta_config()
    config.architectures = None
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="pass the module"):
        ModelTeacher(tmp_path)


def without_head(model, directory):
    """A checkpoint as users have it: the config names a head, and the file has no weights for it."""
    model.save_pretrained(directory)
    bare = model.state_dict()
    bare = {name: tensor for name, tensor in bare.items() if not name.startswith("classifier")}
    model.save_pretrained(directory, state_dict=bare)
    return directory


def test_a_teacher_with_an_untrained_head_is_refused(tmp_path):
    """transformers makes the head up and logs a note: days of training on noise that looks like a teacher."""
    folder = without_head(classifier(), tmp_path)
    with pytest.raises(ValueError, match=r"classifier\.dense\.bias.*train_teacher\.py.*--allow_untrained_teacher"):
        ModelTeacher(folder)
    assert ModelTeacher(folder, allow_untrained=True)(batch_of("")).logits.shape == (3, 3)


@pytest.mark.parametrize("kind", [RobertaForMaskedLM, RobertaForTokenClassification])
def test_a_whole_checkpoint_is_not_called_untrained(kind, tmp_path):
    """Tied weights are in no file and not missing: a check that cries wolf gets switched off."""
    kind(tiny_roberta_config()).save_pretrained(tmp_path)
    assert type(ModelTeacher(tmp_path).model) is kind


def test_an_encoder_without_pooler_is_whole(tmp_path):
    """Sentence encoders are saved without the pooler, which answers nothing here."""
    encoder().save_pretrained(tmp_path)
    assert ModelTeacher(tmp_path)(batch_of("")).features.shape == (3, 6, 16)


def test_facts_name_no_local_path(tmp_path):
    """A model card or a pushed cache with /home/name/... tells strangers who trained where."""
    folder = tmp_path / "private" / "my-teacher"
    classifier().save_pretrained(folder)
    expected = {"kind": "ModelTeacher", "name": "my-teacher", "revision": None, "dtype": "float32", "members": []}
    assert ModelTeacher(folder).facts() == expected
    assert ModelTeacher(RobertaForSequenceClassification.from_pretrained(folder)).facts() == expected
    assert ModelTeacher(classifier()).facts()["name"] == "RobertaForSequenceClassification"
    hub = classifier()
    hub.config._name_or_path = "some-group/some-model"
    assert ModelTeacher(hub).facts()["name"] == "some-group/some-model"


# ---- the order of classes ----

MNLI = ["entailment", "neutral", "contradiction"]  # the data set
FACEBOOK = ["CONTRADICTION", "NEUTRAL", "ENTAILMENT"]  # facebook/bart-large-mnli's order, as roberta-large-mnli's


def named(names, **settings):
    return tiny_roberta_config(
        id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)}, **settings
    )


def test_classes_are_matched_by_name():
    """MNLI teachers and data order their classes differently: distilled by number, entailment becomes contradiction."""
    model, batch = RobertaForSequenceClassification(named(FACEBOOK)), batch_of("")
    teacher = ModelTeacher(model)
    own = teacher(batch).logits
    teacher.align_labels(named(MNLI))
    assert torch.equal(teacher(batch).logits, own[:, [2, 1, 0]])
    assert teacher.label_order.dtype == torch.long
    teacher.align_labels(named(FACEBOOK))
    assert teacher.label_order is None and torch.equal(teacher(batch).logits, own)


@pytest.mark.parametrize("order", [[2, 0, 1], [1, 2, 0], [0, 1, 2]])
def test_labels_are_mapped_the_other_way_round(order):
    """Logits and labels move by inverse permutations; with only a swap to test on, mixing them up stays unseen."""

    class Labels(Teacher):
        config = named([MNLI[i] for i in order])

        def respond(self, batch, progress=None):
            return TeacherOutput(logits=batch["own"], labels=batch["own"].argmax(-1))

    teacher = Labels()
    teacher.align_labels(named(MNLI))
    answer = teacher({"own": torch.randn(20, 3)})
    assert torch.equal(answer.logits.argmax(-1), answer.labels)
    for label in range(3):
        own = torch.zeros(1, 3)
        own[0, order.index(label)] = 1.0  # the teacher says MNLI[label], wherever it keeps that
        assert int(teacher({"own": own}).labels) == label


def test_blanks_and_case_do_not_separate_classes():
    """'Not entailment' and 'not Entailment' are one class, and an error there makes people disable the check."""
    assert label_order(named(["B  c", " a"]), named(["A", "bC"])) == [1, 0]
    assert label_order(named(["a", "A"]), named(["A", "a"])) == [1, 0]  # where only case separates, it does


def test_other_classes_are_refused_with_both_lists():
    """Sentiment and emotion have the same number of classes as often as not."""
    teacher = ModelTeacher(RobertaForSequenceClassification(named(["joy", "anger", "fear"])))
    with pytest.raises(ValueError, match=r"entailment.*neutral.*joy.*anger.*id2label"):
        teacher.align_labels(named(MNLI))
    with pytest.raises(ValueError, match=r"student has 2 labels, the teacher 3"):
        teacher.align_labels(tiny_roberta_config(num_labels=2))


def test_classes_without_names_are_matched_by_number_with_one_warning(heard):
    """Most students are made with num_labels=n and have no names: that must run, and say what it took for granted."""
    teacher = ModelTeacher(RobertaForSequenceClassification(named(FACEBOOK)))
    for _ in range(2):
        teacher.align_labels(tiny_roberta_config(num_labels=3))
    assert teacher.label_order is None
    assert len(heard) == 1 and "CONTRADICTION" in heard[0] and "by number" in heard[0]
    ModelTeacher(classifier()).align_labels(tiny_roberta_config(num_labels=3))
    assert len(heard) == 1  # neither side has names: nothing to say


def test_outputs_of_a_regression_have_no_classes(heard):
    """STS-B's one output is called LABEL_0 by one and 'similarity' by the other."""
    teacher = ModelTeacher(RobertaForSequenceClassification(named(["similarity"])))
    teacher.align_labels(named(["score"]))
    assert teacher.label_order is None and not heard
    with pytest.raises(ValueError, match="student has 3 labels, the teacher 1"):
        teacher.align_labels(named(MNLI))


@pytest.mark.parametrize("model", [encoder(), RobertaForMaskedLM(tiny_roberta_config())])
def test_models_without_a_label_head_have_nothing_to_match(model):
    """Every configuration says num_labels=2, also those of encoders and language models."""
    ModelTeacher(model).align_labels(named(MNLI))


# ---- answers from columns ----


def test_cached_columns_are_the_answer():
    """A cache that changes what it read is no cache."""
    logits, features = torch.randn(2, 3), torch.randn(2, 4, 5)
    teacher = CachedTeacher(features="teacher_features")
    teacher.prepare(None, {"teacher", "features"}, "cpu")
    answer = teacher({"teacher_logits": logits, "teacher_features": features})
    assert answer.logits is logits and answer.features is features
    assert teacher.columns == ("teacher_logits", "teacher_features") and teacher.view == "plain"


def test_a_missing_column_says_how_to_attach_it():
    """A bare KeyError in the first step sends people into the collator's source."""
    with pytest.raises(ValueError, match=r"no teacher_logits.*input_ids.*load_cache"):
        CachedTeacher()({"input_ids": torch.ones(2, 2)})


@pytest.mark.parametrize("need", ["features", "hidden_states", "attentions", "qkv"])
def test_a_cache_refuses_what_it_does_not_hold(need):
    """Found inside the objective, it would be an attribute of None at step 1, after minutes of set-up."""
    with pytest.raises(ValueError, match=f"needs {need}.*ModelTeacher"):
        CachedTeacher().prepare(None, {"teacher", need}, "cpu")


def test_cached_logits_are_matched_by_the_manifests_names(tmp_path):
    """Cached logits lie in their teacher's order, and the teacher is no longer there to ask."""
    config = {"id2label": {i: name for i, name in enumerate(FACEBOOK)}, "num_labels": 3}
    manifest = {"view": "plain", "teacher": {"name": "t"}, "config": config}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    teacher = CachedTeacher(cache=tmp_path)
    teacher.align_labels(named(MNLI))
    assert torch.equal(
        teacher({"teacher_logits": torch.tensor([[1.0, 2.0, 3.0]])}).logits, torch.tensor([[3.0, 2.0, 1.0]])
    )
    with pytest.raises(ValueError, match="no manifest.json"):
        CachedTeacher(cache=tmp_path / "elsewhere")


# ---- a student as its own teacher ----


def adapted(**lora):
    """A base model, and a student with a trained LoRA adapter and a trained copy of the head, both with dropout."""
    from peft import LoraConfig, TaskType, get_peft_model

    base = classifier(attention_probs_dropout_prob=0.3)
    settings = {"r": 2, "lora_dropout": 0.5, "target_modules": ["query", "value"], "modules_to_save": ["classifier"]}
    student = get_peft_model(copy.deepcopy(base), LoraConfig(task_type=TaskType.SEQ_CLS, **{**settings, **lora}))
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=0.1)
    batch = {**batch_of(""), "labels": torch.tensor([0, 1, 2])}
    for _ in range(3):
        student.train()(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return base, student


def flags(student):
    return [m.training for m in student.modules()], [p.requires_grad for p in student.parameters()]


def test_an_adapter_switched_off_is_the_base_model_bit_for_bit():
    """A teacher that keeps a little of the adapter follows the student away from what it knew."""
    base, student = adapted()
    batch, teacher = batch_of(""), AdapterTeacher()
    needs = {"teacher", "hidden_states", "features", "attentions", "qkv"}
    teacher.prepare(student, needs, "cpu")
    reference = ModelTeacher(base)
    reference.prepare(None, needs, "cpu")
    answer, expected = teacher(batch), reference(batch)
    for one, other in [
        ([answer.logits, answer.features], [expected.logits, expected.features]),
        (answer.hidden_states, expected.hidden_states),
        (answer.attentions, expected.attentions),
        (sum(answer.qkv, ()), sum(expected.qkv, ())),
    ]:
        assert len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert not torch.allclose(answer.logits, student.eval()(**batch).logits)
    assert teacher.config.num_labels == 3
    hooks = [str(hook) for module in student.modules() for hook in module._forward_hooks.values()]
    assert not any("hfkd" in hook for hook in hooks), hooks  # transformers leaves hooks of its own


def test_asking_leaves_the_student_as_it_was():
    """PEFT switches requires_grad on again for everything in the adapter: frozen parts start to train, dropout stops."""
    _, student = adapted()
    student.train()
    frozen = next(p for name, p in student.named_parameters() if "lora_A" in name)
    frozen.requires_grad = False  # the user's choice
    next(m for m in student.modules() if isinstance(m, nn.Dropout)).eval()
    batch, before, state = batch_of(""), flags(student), torch.random.get_rng_state()
    AdapterTeacher(student)(batch)
    assert flags(student) == before
    assert torch.equal(torch.random.get_rng_state(), state)

    class Broken(Exception):
        pass

    with pytest.raises(Broken), adapter_off(student):
        raise Broken
    assert flags(student) == before


@pytest.mark.parametrize("autocast", [False, True])
def test_the_students_gradients_do_not_notice_the_teacher(autocast):
    """Weights that autocast has cast and kept without gradients would stop the student's training silently."""
    _, student = adapted()
    batch = {**batch_of(""), "labels": torch.tensor([0, 1, 2])}
    teacher, found = AdapterTeacher(student), []
    for ask_first in (False, True):
        student.train().zero_grad()
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            if ask_first:
                teacher(batch)
            loss = student(**batch).loss
        loss.backward()
        found.append({name: p.grad for name, p in student.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 4
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_an_adapter_teacher_needs_an_adapter():
    """Without one the student would be its own teacher: a loss of 0 that teaches nothing."""
    with pytest.raises(ValueError, match=r"RobertaForSequenceClassification.*peft_config"):
        AdapterTeacher(classifier())
    with pytest.raises(ValueError, match="no student yet"):
        AdapterTeacher().prepare(None, {"teacher"}, "cpu")
    with pytest.raises(ValueError, match="no student yet"):
        AdapterTeacher()(batch_of(""))


@pytest.mark.filterwarnings("ignore:Careful")
def test_a_student_that_trains_its_base_has_no_base_to_ask():
    """bias='all' trains the base model's biases: the 'teacher' would drift with the student."""
    _, student = adapted(bias="all")
    with pytest.raises(ValueError, match=r"bias.*bias='none'"):
        AdapterTeacher(student)


# ---- teachers that break the contract ----


class InTrainingMode(ModelTeacher):
    def respond(self, batch, progress=None):
        self.model.train()
        inputs = {name: batch[name] for name in self._inputs if name in batch}
        return type(super().respond(batch))(logits=self.model.train()(**inputs).logits)


class ChangesTheBatch(ModelTeacher):
    def respond(self, batch, progress=None):
        batch["input_ids"][0, 0] = 3
        return super().respond(batch, progress)


class AddsAColumn(ModelTeacher):
    def respond(self, batch, progress=None):
        answer = super().respond(batch, progress)
        batch["teacher_logits"] = answer.logits
        return answer


class WithGradients(ModelTeacher):
    def respond(self, batch, progress=None):
        self.model.requires_grad_(True)
        with torch.enable_grad():
            return super().respond(batch, progress)


class Trainable(ModelTeacher):
    def __init__(self, model):
        super().__init__(model)
        self.model.requires_grad_(True)


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        (InTrainingMode, "two answers"),
        (ChangesTheBatch, "changed the batch"),
        (AddsAColumn, "columns"),
        (WithGradients, "gradients"),
        (Trainable, "trainable"),
    ],
)
def test_broken_teachers_are_rejected(kind, sentence):
    """A newcomer's teacher with this fault trains a student without an error."""
    with pytest.raises(AssertionError, match=sentence):
        check_teacher(kind(classifier()), batch_of(""))


def test_training_mode_is_rejected_without_dropout_too():
    """Without dropout both modes agree here, and differ on the first model that has some."""
    model = classifier()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    with pytest.raises(AssertionError, match="training mode"):
        check_teacher(InTrainingMode(model), batch_of(""))


def test_a_teacher_must_answer():
    """An empty answer would only be found inside the objective, at step 1."""

    class Silent(ModelTeacher):
        def respond(self, batch, progress=None):
            return type(super().respond(batch))()

    with pytest.raises(AssertionError, match="answered nothing"):
        check_teacher(Silent(classifier()), batch_of(""))


def test_every_teacher_answers_without_gradients():
    """A teacher's activations kept for a backward pass that never comes double the memory of a step."""
    weight = torch.nn.Parameter(torch.ones(3, 6))

    class Linear(Teacher):
        def respond(self, batch, progress=None):
            return TeacherOutput(logits=batch["input_ids"] * weight)

    assert not Linear()(batch_of("")).logits.requires_grad
