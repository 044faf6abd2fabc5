"""A teacher is frozen, in eval mode and reads its own view of the input."""

from __future__ import annotations

import pytest
import torch
from transformers import RobertaForSequenceClassification, RobertaModel

from hfkd.objectives import SelfDistill
from hfkd.teachers import ModelTeacher, Teacher
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
            from hfkd.outputs import TeacherOutput

            return TeacherOutput(logits=batch["input_ids"] * weight)

    assert not Linear()(batch_of("")).logits.requires_grad
