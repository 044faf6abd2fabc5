"""DeiTToken against loops over python floats, its refusals, and a tiny DeiT and a tiny LeViT that train with it."""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from transformers import (
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    LevitConfig,
    LevitForImageClassificationWithTeacher,
    TrainerCallback,
    ViTConfig,
)
from transformers.utils import ModelOutput

from hfkd import CachedTeacher, DistillationArguments, DistillationTrainer
from hfkd.objectives import DeiTToken
from hfkd.outputs import TeacherOutput
from hfkd.testing import check_objective, two_head_case
from test_functional import kl_by_loops, log_softmax_by_loops

LABELS = 4


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def sides(rows: int = 6) -> tuple[ModelOutput, TeacherOutput]:
    first, second, teacher = 2 * torch.randn(3, rows, LABELS, dtype=torch.float64)
    student = ModelOutput(logits=(first + second) / 2, cls_logits=first, distillation_logits=second)
    return student, TeacherOutput(logits=teacher)


def score(objective, student, teacher, labels):
    objective.build(SimpleNamespace(num_labels=LABELS), None, None)
    return objective(student, teacher, {"labels": labels})


# ---- values ----


def task_by_loops(logits: list[float], target: list[float]) -> float:
    return -sum(p * log_p for p, log_p in zip(target, log_softmax_by_loops(logits), strict=True))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("soft_labels", [False, True])
@pytest.mark.parametrize(("kind", "alpha"), [("hard", None), ("hard", 0.3), ("soft", None), ("soft", 0.7)])
def test_deit_token_equals_loops(kind, alpha, soft_labels, smoothing):
    """The teacher's term on the labels' head, or on the mean of both, is plain KD under the paper's name."""
    student, teacher = sides()
    ids = torch.tensor([0, 3, 1, 2, 2, 0])
    targets = torch.nn.functional.one_hot(ids, LABELS).double()
    if soft_labels:  # as mixup makes them
        targets = 0.7 * targets + 0.3 * targets.flip(0)
    objective = DeiTToken(kind, temperature=3.0, alpha=alpha, label_smoothing=smoothing)
    found = score(objective, student, teacher, targets if soft_labels else ids)
    weight = {"hard": 0.5, "soft": 0.1}[kind] if alpha is None else alpha
    for row, theirs in enumerate(teacher.logits.tolist()):
        smoothed = [(1 - smoothing) * p + smoothing / LABELS for p in targets[row].tolist()]
        task = (1 - weight) * task_by_loops(student.cls_logits[row].tolist(), smoothed)
        assert found["task_loss"][row].item() == pytest.approx(task, rel=1e-9)
        second = student.distillation_logits[row].tolist()
        if kind == "hard":
            distilled = -log_softmax_by_loops(second)[theirs.index(max(theirs))]
        else:
            distilled = 9 * kl_by_loops(second, theirs, 3.0)
        assert found["distill_loss"][row].item() == pytest.approx(weight * distilled, rel=1e-9)
    assert objective.count({"labels": targets if soft_labels else ids}) == {"task_loss": 6, "distill_loss": 6}


def test_unlabelled_examples_cost_nothing():
    """A value on a row that is not counted makes the loss of the labelled rows too large."""
    student, teacher = sides(3)
    terms = score(DeiTToken(), student, teacher, torch.tensor([1, -100, 2]))
    assert all(values[1] == 0 and values[0] > 0 for values in terms.values())


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_each_term_moves_its_own_head(kind):
    """The two tokens only learn different things because each sees one target."""
    student, teacher = sides()
    for logits in (student.cls_logits, student.distillation_logits):
        logits.requires_grad_(True)
    terms = score(DeiTToken(kind), student, teacher, torch.tensor([0, 1, 2, 3, 0, 1]))
    heads = [student.cls_logits, student.distillation_logits]
    of_task = torch.autograd.grad(terms["task_loss"].sum(), heads, allow_unused=True)
    of_teacher = torch.autograd.grad(terms["distill_loss"].sum(), heads, allow_unused=True)
    assert of_task[1] is None and bool(of_task[0].abs().any())
    assert of_teacher[0] is None and bool(of_teacher[1].abs().any())


def test_a_vote_is_taken_at_its_word():
    """An ensemble that voted has no logits to take the largest of, and its labels are the teacher's hard decision."""
    student, _ = sides(2)
    found = score(DeiTToken(), student, TeacherOutput(labels=torch.tensor([3, 0])), torch.tensor([0, 0]))
    for row, label in enumerate([3, 0]):
        expected = -0.5 * log_softmax_by_loops(student.distillation_logits[row].tolist())[label]
        assert found["distill_loss"][row].item() == pytest.approx(expected, rel=1e-9)


def test_evaluation_scores_the_mean_of_both_heads():
    """What is deployed predicts with both heads; one head's loss would not compare with another objective's."""
    student, _ = sides()
    labels = torch.tensor([0, 3, 1, 2, 2, 0])
    found = DeiTToken().task(student, {"labels": labels})["task_loss"]
    mean = ((student.cls_logits + student.distillation_logits) / 2).tolist()
    expected = [-log_softmax_by_loops(row)[label] for row, label in zip(mean, labels.tolist(), strict=True)]
    assert found.tolist() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_deit_token_keeps_the_contract(kind):
    """An objective that breaks it trains a wrong student without a word."""
    check_objective(DeiTToken(kind), two_head_case, zero_at_teacher=kind == "soft")
    check_objective(DeiTToken(kind), functools.partial(two_head_case, num_labels=2), zero_at_teacher=kind == "soft")


def test_the_check_sees_which_head_learns_from_the_teacher():
    """With the teacher's answer on the wrong head, check_objective would call every sound objective of two heads broken."""
    check_objective(DeiTToken("soft"), two_head_case)
    with pytest.raises(AssertionError, match="not 0 for a student equal to its teacher"):
        check_objective(DeiTToken("hard"), two_head_case)


def test_settings_name_the_equation():
    """A card that prints the other kind's equation describes another run."""
    hard, soft = DeiTToken(), DeiTToken("soft", alpha=0.2)
    assert hard.settings() == {"kind": "hard", "temperature": 3.0, "alpha": 0.5, "label_smoothing": 0.0}
    assert soft.settings() == {"kind": "soft", "temperature": 3.0, "alpha": 0.2, "label_smoothing": 0.0}
    assert "arg" in hard.equation and "KL" not in hard.equation and "KL" in soft.equation


# ---- refusals ----


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1, math.nan])
def test_an_alpha_that_leaves_a_head_untrained_is_refused(alpha):
    """A head at its initial weights counts half in every prediction, and nothing says so."""
    with pytest.raises(ValueError, match=f"alpha must lie between 0 and 1.*got {alpha}"):
        DeiTToken(alpha=alpha)


@pytest.mark.parametrize("settings", [{"kind": "medium"}, {"kind": "medium", "alpha": 0.5}])
def test_an_unknown_kind_is_refused(settings):
    """Taken for soft, it would train another method than the card says."""
    with pytest.raises(ValueError, match="kind must be one of hard, soft, got 'medium'"):
        DeiTToken(**settings)


@pytest.mark.parametrize("temperature", [0.0, -2.0, math.inf])
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_a_wrong_temperature_is_refused(kind, temperature):
    """A negative temperature silently inverts the objective."""
    with pytest.raises(ValueError, match=f"temperature must be .*got {temperature}"):
        DeiTToken(kind, temperature)


def test_a_student_of_another_kind_is_refused_before_training():
    """Found in the first step, it costs the loading of a teacher and of a data set."""
    with pytest.raises(ValueError, match=r"'vit' model.*DeiTFor\w+WithTeacher or LevitFor\w+WithTeacher"):
        DeiTToken().build(ViTConfig(num_labels=4), None, None)
    for config in (DeiTConfig(num_labels=4), LevitConfig(num_labels=4), SimpleNamespace(model_type="my_own"), None):
        DeiTToken().build(config, None, None)


def test_a_student_without_the_two_heads_is_refused():
    """DeiT's plain classifier has the same configuration, so only its answer tells."""
    student = DeiTForImageClassification(tiny_deit().config)
    with pytest.raises(ValueError, match="cls_logits and distillation_logits.*ImageClassifierOutput.*WithTeacher"):
        score(DeiTToken(), student(torch.randn(2, 3, 16, 16)), sides(2)[1], torch.tensor([0, 1]))


# ---- models of transformers ----


def tiny_deit():
    config = DeiTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=16,
        patch_size=8,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=LABELS,
    )
    return DeiTForImageClassificationWithTeacher(config)


def tiny_levit():
    config = LevitConfig(
        image_size=64,
        hidden_sizes=(16, 24, 32),
        num_attention_heads=(2, 2, 2),
        depths=(1, 1, 1),
        key_dim=(8, 8, 8),
        num_labels=LABELS,
    )
    return LevitForImageClassificationWithTeacher(config)


class SeesGradients(TrainerCallback):
    """The gradient norm of each head's weights before every step."""

    def __init__(self, *heads: str):
        self.heads, self.norms = heads, []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.norms.append([model.get_submodule(head).weight.grad.norm().item() for head in self.heads])


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


MODELS = {
    "deit": (tiny_deit, 16, ("cls_classifier", "distillation_classifier")),
    "levit": (tiny_levit, 64, ("classifier.linear", "classifier_distill.linear")),
}


@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize("name", MODELS)
def test_both_heads_of_a_real_student_train(name, kind, tmp_path):
    """transformers calls these two classes inference-only: a head without gradient still counts in the prediction."""
    build, size, heads = MODELS[name]
    student = build()
    images = torch.randn(16, 3, size, size)
    classes = torch.arange(16) // LABELS  # of another opinion than the labels
    columns = {"teacher_logits": (4.0 * torch.nn.functional.one_hot(classes, LABELS)).tolist()}
    columns |= {"pixel_values": images.tolist(), "labels": [i % LABELS for i in range(16)]}
    rows = datasets.Dataset.from_dict(columns)
    arguments = DistillationArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=16,
        max_steps=20,
        learning_rate=0.01,
        logging_steps=1,
        label_names=["labels"],
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    seen = SeesGradients(*heads)
    trainer = DistillationTrainer(
        student,
        arguments,
        None,
        rows,
        rows,
        compute_metrics=accuracy,
        callbacks=[seen],
        teacher=CachedTeacher(),
        objective=DeiTToken(kind, alpha=0.5),
    )
    trainer.train()
    assert len(seen.norms) == 20 and min(map(min, seen.norms)) > 0
    logs = [entry for entry in trainer.state.log_history if "distill_loss" in entry]
    for term in ("task_loss", "distill_loss"):
        assert logs[-1][term] < 0.9 * logs[0][term], term
    check_evaluation(trainer, student, images)
    trainer.save_model()
    check_saved(student, tmp_path, images)


def check_evaluation(trainer, student, images):
    with torch.no_grad():
        answer = student.eval()(images)
    mean = ((answer.cls_logits + answer.distillation_logits) / 2).double()
    labels = torch.arange(16) % LABELS
    found = trainer.predict(trainer.eval_dataset)
    np.testing.assert_allclose(found.predictions, mean, rtol=1e-4, atol=1e-5)
    expected = [-log_softmax_by_loops(row)[label] for row, label in zip(mean.tolist(), labels.tolist(), strict=True)]
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(sum(expected) / 16, rel=1e-4)
    assert metrics["eval_accuracy"] == float((mean.argmax(-1) == labels).float().mean())


def check_saved(student, folder, images):
    loaded = type(student).from_pretrained(folder)
    assert torch.equal(loaded(images).logits, student(images).logits)
