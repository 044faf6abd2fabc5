"""RecAdam, MARS and R3F against slow re-computations of the equations in their docstrings."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import BertConfig, Trainer, TrainerControl, TrainerState, TrainingArguments

from hfkd import regularized
from hfkd.regularized import (
    MARS,
    R3F,
    NoisyOutput,
    RecAdam,
    encoder_parameters,
    noisy_model,
    project_rows,
    recall_groups,
)
from hfkd.testing import Case, check_objective, classification_case, tiny_roberta_config, tiny_vit_mae_config

CONTROL = TrainerControl()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def tiny_classifier(**overrides: Any) -> Any:
    torch.manual_seed(0)
    return transformers.RobertaForSequenceClassification(tiny_roberta_config(num_labels=3, **overrides))


def noisy_classifier(noise: str = "uniform", noise_size: float = 1e-5, **overrides: Any) -> Any:
    """With the weights of `tiny_classifier()`."""
    config = tiny_roberta_config(num_labels=3, **overrides)
    model = regularized.RobertaForSequenceClassification(config, noise=noise, noise_size=noise_size)
    model.load_state_dict(tiny_classifier(**overrides).state_dict())
    return model


def tiny_image_classifier(noisy: bool = False, **noise: Any) -> Any:
    """The same weights with and without a noisy view."""
    torch.manual_seed(0)
    sizes = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.ViTConfig(**sizes, intermediate_size=32, num_labels=3)
    plain = transformers.ViTForImageClassification(config)
    if not noisy:
        return plain
    model = regularized.ViTForImageClassification(config, **noise)
    model.load_state_dict(plain.state_dict())
    return model


def padded_batch() -> dict[str, torch.Tensor]:
    """Four rows of lengths 9, 4, 6 and 2, the second padded on the left."""
    ids = torch.randint(5, 50, (4, 9))
    mask = (torch.arange(9) < torch.tensor([9, 4, 6, 2])[:, None]).long()
    mask[1] = mask[1].flip(0)
    return {"input_ids": torch.where(mask == 1, ids, 1), "attention_mask": mask}


def training_rows(count: int = 24) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 50, (count, 8), generator=generator).tolist()
    return [{"input_ids": row, "attention_mask": [1] * 8, "labels": i % 3} for i, row in enumerate(ids)]


def trainer_arguments(folder: Any, **overrides: Any) -> TrainingArguments:
    given_settings = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "report_to": "none"}
    given_settings |= {"use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "max_grad_norm": 0.0}
    return TrainingArguments(str(folder), **{**given_settings, **overrides})


# ---- RecAdam ----

SETTINGS = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.03, "gamma": 40.0, "k": 0.4, "t0": 8.0}


def recadam_by_hand(
    theta: list, start: list | None, grads: list[list], lr, betas, eps, weight_decay, gamma, k, t0
) -> list:
    """The docstring's equation, one entry at a time, in Python floats."""
    theta, first, second = list(theta), [0.0] * len(theta), [0.0] * len(theta)
    for t, grad in enumerate(grads, start=1):
        weight = 1.0 if start is None else 1 / (1 + math.exp(-k * (t - t0)))
        for i, g in enumerate(grad):
            first[i] = betas[0] * first[i] + (1 - betas[0]) * g
            second[i] = betas[1] * second[i] + (1 - betas[1]) * g**2
            adam = (first[i] / (1 - betas[0] ** t)) / (math.sqrt(second[i] / (1 - betas[1] ** t)) + eps)
            pull = 0.0 if start is None else (1 - weight) * gamma * (theta[i] - start[i])
            theta[i] = theta[i] - lr * (weight * adam + pull + weight_decay * theta[i])
    return theta


def parameter(size: int = 5) -> nn.Parameter:
    return nn.Parameter(torch.randn(size, dtype=torch.float64))


def walk(optimizer: torch.optim.Optimizer, grads: torch.Tensor) -> None:
    """grads: (steps, parameters, size)."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for step in grads:
        for p, grad in zip(parameters, step, strict=True):
            p.grad = grad.clone()
        optimizer.step()


def test_recadam_follows_its_equation():
    """A wrong lambda schedule or a recall inside Adam's preconditioner trains another method under RecAdam's name."""
    body, head, given_start = parameter(), parameter(), torch.randn(5, dtype=torch.float64)
    other = parameter()
    before = [p.detach().clone().tolist() for p in (body, other, head)]
    groups = [{"params": [body], "recall": True}, {"params": [other], "start": [given_start]}, {"params": [head]}]
    grads = torch.randn(20, 3, 5, dtype=torch.float64)
    walk(RecAdam(groups, **SETTINGS), grads)
    starts = [before[0], given_start.tolist(), None]
    for i, p in enumerate((body, other, head)):
        expected = recadam_by_hand(before[i], starts[i], grads[:, i].tolist(), **SETTINGS)
        np.testing.assert_allclose(p.detach().numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", ["lambda is 1", "recall off"])
def test_recadam_reduces_to_adamw(case: str):
    """A baseline that differs from AdamW in more than the method would make the comparison of the two unfair."""
    ours, theirs, recalled = parameter(), None, parameter()
    theirs = nn.Parameter(ours.detach().clone())
    common = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.05}
    if case == "lambda is 1":
        optimizer = RecAdam([ours], **common, k=50.0, t0=-100.0, recall=True)
    else:
        optimizer = RecAdam(
            [{"params": [ours], "gamma": 0.0}, {"params": [recalled], "recall": True}], **common, gamma=1.0
        )
    grads = torch.randn(20, 1, 5, dtype=torch.float64)
    walk(optimizer, grads.expand(-1, len(optimizer.param_groups), -1))
    walk(torch.optim.AdamW([theirs], **common), grads)
    assert (ours - theirs).abs().max() < 1e-10


def test_recadam_resumes_as_if_never_stopped():
    """A resume that takes the resumed weights for the start recalls the wrong weights, without a word."""
    grads = torch.randn(20, 1, 5, dtype=torch.float64)
    whole = parameter()
    stopped = nn.Parameter(whole.detach().clone())
    walk(RecAdam([whole], recall=True, **SETTINGS), grads)
    first = RecAdam([stopped], recall=True, **SETTINGS)
    walk(first, grads[:7])
    saved = copy.deepcopy(first.state_dict())
    resumed = nn.Parameter(stopped.detach().clone())
    second = RecAdam([resumed], recall=True, **SETTINGS)  # snapshots the resumed weights ...
    second.load_state_dict(saved)  # ... and gets the original start back
    walk(second, grads[7:])
    assert torch.equal(whole, resumed)


def test_recadam_refuses_the_state_of_another_optimizer():
    """A checkpoint of AdamW would drop the start weights, and the run would go on as plain AdamW."""
    p = parameter()
    plain = torch.optim.AdamW([p])
    walk(plain, torch.randn(1, 1, 5, dtype=torch.float64))
    with pytest.raises(ValueError, match="not saved by RecAdam"):
        RecAdam([p], lr=1e-5, recall=True).load_state_dict(plain.state_dict())


def test_recadam_at_its_start_stays_there():
    """Rounding in the recall would let parameters without a gradient drift away from the start."""
    p = nn.Parameter(torch.randn(1000))
    before = p.detach().clone()
    walk(RecAdam([p], lr=1e-5, recall=True), torch.zeros(10, 1, 1000))
    assert torch.equal(p.detach(), before)


def test_recadam_refuses_a_diverging_recall():
    """gamma 5000 with a learning rate of 1e-3 multiplies the distance to the start by 4 in every step."""
    p = parameter()
    before = p.detach().clone()
    optimizer = RecAdam([p], lr=1e-3, gamma=5000.0, recall=True)
    with pytest.raises(ValueError, match=r"lr 0\.001, gamma 5000"):
        walk(optimizer, torch.ones(1, 1, 5, dtype=torch.float64))
    assert torch.equal(p.detach(), before)


def test_a_steep_schedule_stays_finite():
    """exp(-k (t - t0)) overflows in Python where k t0 is above 709."""
    assert regularized.task_weight(1, 1.0, 1000.0) < 1e-300
    assert regularized.task_weight(2000, 1.0, 0.0) == 1.0
    assert regularized.task_weight(250, 0.5, 250.0) == 0.5


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"lr": -1.0}, "lr must be .* got -1.0"),
        ({"eps": -1e-8}, "eps must"),
        ({"gamma": -5.0}, "gamma must .* got -5.0"),
        ({"gamma": math.nan}, "gamma must .* got nan"),
        ({"k": -0.5}, "k must .* got -0.5"),
        ({"t0": math.inf}, "t0 must .* got inf"),
        ({"weight_decay": -0.1}, "weight_decay must"),
        ({"betas": (0.9, 1.0)}, r"betas must .* got \(0.9, 1.0\)"),
        ({"recall": False}, "plain AdamW"),
    ],
)
def test_recadam_names_the_wrong_value(wrong: dict, match: str):
    """A negative gamma drives the weights away from the start; a k below 0 shifts from the task to the recall."""
    with pytest.raises(ValueError, match=match):
        RecAdam([parameter()], **{"lr": 1e-5, "recall": True, **wrong})


def test_recadam_refuses_starts_of_other_shapes():
    """Start weights in another order than the parameters would pull each matrix to another one's start."""
    with pytest.raises(ValueError, match="1 tensors for 2 parameters"):
        RecAdam([{"params": [parameter(), parameter()], "start": [torch.zeros(5)]}], lr=1e-5)
    with pytest.raises(ValueError, match=r"\(\(4,\), \(5,\)\)"):
        RecAdam([{"params": [parameter()], "start": [torch.zeros(4)]}], lr=1e-5)


def test_groups_recall_the_encoder_and_decay_as_the_trainer_does(tmp_path):
    """Recalling the fresh head pins it to random weights; another split of weight decay is another baseline."""
    model = tiny_classifier()
    groups = recall_groups(model, weight_decay=0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    recalled = {names[id(p)] for group in groups if group["recall"] for p in group["params"]}
    decayed = {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}
    assert recalled == {name for name in names.values() if name.startswith("roberta.")}
    assert decayed == set(Trainer(model, trainer_arguments(tmp_path)).get_decay_parameter_names(model))
    assert sum(len(group["params"]) for group in groups) == len(names)


def test_recall_groups_take_the_decay_of_another_recipe():
    """RecAdam that decays other weights than the plain run beside it differs in more than the method."""
    model = tiny_image_classifier()
    undecayed = ("bias", "position_embeddings", "cls_token")
    groups = recall_groups(model, 0.1, lambda name, parameter: not name.endswith(undecayed))
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in decayed}
    assert names == {name for name, _ in model.named_parameters() if name.endswith("weight")}
    assert any("layernorm" in name for name in names) and "classifier.weight" in names


def recadam_trainer(folder: Any, model: Any, **overrides: Any) -> Trainer:
    arguments = trainer_arguments(folder, max_steps=4, learning_rate=1e-3, **overrides)
    own = {"params": recall_groups(model, 0.01), "lr": arguments.learning_rate, "gamma": 300.0, "k": 0.5, "t0": 3}
    return Trainer(model, arguments, train_dataset=training_rows(), optimizer_cls_and_kwargs=(RecAdam, own))


def test_recadam_resumes_under_the_trainer(tmp_path):
    """The Trainer loads the checkpoint's weights before it builds the optimizer: a fresh snapshot would be wrong."""
    whole, resumed = tiny_classifier(), tiny_classifier()
    recadam_trainer(tmp_path, whole, save_strategy="steps", save_steps=2).train()
    second = recadam_trainer(tmp_path, resumed)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for (name, one), other in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other), name
    state = second.optimizer.optimizer.state
    start = dict(tiny_classifier().named_parameters())
    for name, p in encoder_parameters(resumed).items():
        assert torch.equal(state[p]["start"], start[name]), name


# ---- MARS ----


def project_by_hand(weight: list[list], start: list[list], bound: float) -> list[list]:
    rows = []
    for row, row_start in zip(weight, start, strict=True):
        distance = sum(abs(w - w0) for w, w0 in zip(row, row_start, strict=True))
        factor = 1.0 if distance <= bound else bound / distance
        rows.append([w0 + factor * (w - w0) for w, w0 in zip(row, row_start, strict=True)])
    return rows


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 6),
    columns=st.integers(1, 9),
    spread=st.floats(0, 5),
    bound=st.floats(1e-3, 20),
)
def test_projection(seed: int, rows: int, columns: int, spread: float, bound: float):
    """A projection that leaves rows outside, or that moves rows inside, changes what the bound means."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    before = start + spread * torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    weight = before.clone()
    project_rows(weight, start, bound)
    np.testing.assert_allclose(
        weight.numpy(), project_by_hand(before.tolist(), start.tolist(), bound), rtol=0, atol=1e-12
    )
    assert (weight - start).abs().sum(1).max() <= bound + 1e-12
    inside = (before - start).abs().sum(1) <= bound
    assert torch.equal(weight[inside], before[inside])
    again = weight.clone()
    project_rows(again, start, bound)
    assert torch.allclose(again, weight, rtol=0, atol=1e-12)


def test_projection_of_a_kernel_and_of_an_untouched_weight():
    """A kernel's row is an output channel; a row at its start divides by a distance of 0 and must not become NaN."""
    start = torch.randn(3, 2, 4, 4)
    weight = start + torch.tensor([0.0, 0.001, 1.0]).view(3, 1, 1, 1)
    before = weight.clone()
    project_rows(weight, start, 0.5)
    assert torch.equal(weight[:2], before[:2])
    assert (weight[2] - start[2]).abs().sum().item() == pytest.approx(0.5, rel=1e-5)


def mars_run(folder: Any, bound: float, **overrides: Any) -> tuple[Any, MARS]:
    model = tiny_classifier()
    mars = MARS(model, bound)
    arguments = trainer_arguments(folder, **overrides)
    Trainer(model, arguments, train_dataset=training_rows(), callbacks=[mars]).train()
    return model, mars


def test_mars_keeps_the_encoder_in_the_ball_and_leaves_the_head_free(tmp_path):
    """A bounded head could not learn the task; an unbounded encoder is plain fine-tuning."""
    model, mars = mars_run(tmp_path, bound=0.05)
    start, weights = dict(tiny_classifier().named_parameters()), dict(model.named_parameters())
    expected = {name for name, p in weights.items() if name.startswith("roberta.") and p.ndim == 2}
    assert set(mars.start) == expected
    distances = {n: (weights[n] - start[n]).abs().sum(-1).max().item() for n in weights}
    for name in expected:
        assert 0 < distances[name] <= 0.05 + 1e-5, name
    assert distances["classifier.dense.weight"] > 0.1
    free, _ = mars_run(tmp_path, bound=1e6)
    unbounded = tiny_classifier()
    Trainer(unbounded, trainer_arguments(tmp_path), train_dataset=training_rows()).train()
    assert all(torch.equal(a, b) for a, b in zip(free.parameters(), unbounded.parameters(), strict=True))


def test_mars_resumes_around_the_original_start(tmp_path):
    """A ball around the resumed weights lets every resume wander one more bound away from the pre-trained ones."""
    whole, _ = mars_run(tmp_path, 0.05, max_steps=4, save_strategy="steps", save_steps=2)
    resumed = tiny_classifier()
    trainer = Trainer(resumed, trainer_arguments(tmp_path, max_steps=4), train_dataset=training_rows())
    trainer.add_callback(MARS(resumed, 0.05))
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_mars_refuses_a_model_that_does_not_start_at_its_start():
    """MARS of one model in the trainer of another would throw the weights back to the first one's."""
    mars, other = MARS(tiny_classifier(), 0.1), tiny_classifier()
    with torch.no_grad():
        other.roberta.encoder.layer[0].output.dense.weight.add_(1.0)
    with pytest.raises(ValueError, match="before the first step"):
        mars.on_train_begin(None, TrainerState(), CONTROL, model=other)
    with pytest.raises(ValueError, match="another shape"):
        mars.on_train_begin(None, TrainerState(), CONTROL, model=tiny_classifier(intermediate_size=24))


@pytest.mark.parametrize("bound", [0.0, -1.0, math.inf, math.nan])
def test_mars_names_the_wrong_bound(bound: float):
    """A bound of 0 freezes the encoder, an infinite one does nothing."""
    with pytest.raises(ValueError, match=f"got {bound}"):
        MARS(tiny_classifier(), bound)


def test_a_wrapped_model_is_refused():
    """A PEFT or DDP wrapper hides which parameters are the head: all of them would be bounded."""
    with pytest.raises(TypeError, match="got Sequential"):
        MARS(nn.Sequential(nn.Linear(2, 2)), 1.0)


# ---- R3F ----


def noisy_case(rows: torch.Tensor, **kwargs: Any) -> Case:
    case = classification_case(rows, **kwargs)
    student = NoisyOutput(logits=case.student.logits, noisy_logits=case.teacher.logits.clone())
    return Case(student, case.teacher, case.batch)


def log_softmax_by_hand(logits: list[float]) -> list[float]:
    top = max(logits)
    total = top + math.log(sum(math.exp(z - top) for z in logits))
    return [z - total for z in logits]


def test_r3f_follows_its_equation():
    """One-sided divergence, or a mean over classes, is another regulariser with another size."""
    case = noisy_case(torch.arange(8))
    objective = R3F(weight=0.7)
    terms = objective(case.student, None, case.batch)
    for i in range(8):
        clean = log_softmax_by_hand(case.student.logits[i].tolist())
        noisy = log_softmax_by_hand(case.student.noisy_logits[i].tolist())
        forward = sum(math.exp(p) * (p - q) for p, q in zip(clean, noisy, strict=True))
        backward = sum(math.exp(q) * (q - p) for p, q in zip(clean, noisy, strict=True))
        assert terms["smoothness_loss"][i].item() == pytest.approx(0.7 * (forward + backward), abs=1e-12)
        assert terms["task_loss"][i].item() == pytest.approx(-clean[case.batch["labels"][i]], abs=1e-12)
    assert {name: int(n) for name, n in objective.count(case.batch).items()} == {"task_loss": 8, "smoothness_loss": 8}
    assert objective.settings() == {"weight": 0.7, "label_smoothing": 0.0}


def test_r3f_keeps_the_contract_of_objectives():
    """bfloat16 logits, or logits of size 1e4, must not give NaN; no example may depend on the others."""
    check_objective(R3F(), noisy_case)


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_r3f_names_the_wrong_weight(weight: float):
    """A negative weight rewards answers that change under noise."""
    with pytest.raises(ValueError, match=f"got {weight}"):
        R3F(weight)


def test_r3f_refuses_a_plain_model():
    """Without the noisy answers R3F would silently be plain fine-tuning."""
    case = classification_case(torch.arange(8))
    with pytest.raises(ValueError, match="noisy_model"):
        R3F()(case.student, None, case.batch)


@pytest.mark.parametrize(("wrong", "match"), [({"noise": "gauss"}, "'gauss'"), ({"noise_size": -1e-5}, "got -1e-05")])
def test_the_noise_is_checked(wrong: dict, match: str):
    """An unknown noise would fail in the first step, after the data was prepared."""
    with pytest.raises(ValueError, match=match):
        noisy_classifier(**wrong)


def test_clean_half_is_the_parents_forward():
    """RoBERTa counts positions over padding when it is given embeddings: padded rows would get other answers."""
    batch, parent = padded_batch(), tiny_classifier().train()
    for noise in regularized.NOISES:
        model = noisy_classifier(noise=noise, noise_size=0.1).train()
        output = model(**batch)
        assert torch.allclose(output.logits, parent(**batch).logits, rtol=0, atol=1e-6)
        assert (output.noisy_logits - output.logits).abs().min() > 0
    by_embeddings = model(inputs_embeds=model.get_input_embeddings()(batch["input_ids"]))
    embeddings = parent.get_input_embeddings()(batch["input_ids"])
    assert torch.allclose(by_embeddings.logits, parent(inputs_embeds=embeddings).logits, rtol=0, atol=1e-6)


def test_bert_answers_two_views_too():
    """Token types must be doubled with the batch, and given position ids must not."""
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=50, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=3, **shape)
    parent = transformers.BertForSequenceClassification(config).train()
    model = regularized.BertForSequenceClassification(config, noise_size=0.1).train()
    model.load_state_dict(parent.state_dict())
    batch = {**padded_batch(), "token_type_ids": torch.randint(2, (4, 9)), "position_ids": torch.arange(9)[None]}
    assert torch.allclose(model(**batch).logits, parent(**batch).logits, rtol=0, atol=1e-6)


def test_images_answer_two_views_too():
    """Noise on both halves, or on pixels, would be another regulariser; eval must stay what tables report."""
    pixels, parent = torch.randn(4, 3, 8, 8), tiny_image_classifier().train()
    model = tiny_image_classifier(noisy=True, noise_size=0.1).train()
    output = model(pixel_values=pixels)
    assert torch.allclose(output.logits, parent(pixels).logits, rtol=0, atol=1e-6)
    assert (output.noisy_logits - output.logits).abs().min() > 0
    labels = torch.tensor([0, 1, 2, 0])
    assert torch.equal(model.eval()(pixels, labels=labels).loss, parent.eval()(pixels, labels=labels).loss)
    still = tiny_image_classifier(noisy=True, noise_size=0.0).double().train()(pixels.double())
    assert torch.allclose(still.logits, still.noisy_logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize("view", ["logits", "noisy_logits"])
def test_gradients_reach_an_image_model_through_both_halves(view: str):
    """As for words: the noisy half moves everything but what makes the embeddings."""
    model = tiny_image_classifier(noisy=True, noise_size=0.1).train()
    model(torch.randn(4, 3, 8, 8))[view].square().sum().backward()
    for name, p in model.named_parameters():
        reached = p.grad is not None and bool(p.grad.abs().sum() > 0)
        expected = "patch_embeddings" not in name or view == "logits"
        assert reached == expected or "k_proj.bias" in name, name


def test_a_noisy_image_model_starts_from_a_masked_auto_encoder(tmp_path):
    """The folder says vit_mae; without the given configuration there is no classifier to load."""
    masked = transformers.ViTMAEForPreTraining(tiny_vit_mae_config())
    masked.save_pretrained(tmp_path)
    sizes = {name: getattr(masked.config, name) for name in ("image_size", "patch_size", "hidden_size")}
    sizes |= {name: getattr(masked.config, name) for name in ("num_hidden_layers", "num_attention_heads")}
    config = transformers.ViTConfig(**sizes, intermediate_size=masked.config.intermediate_size, num_labels=5)
    model = noisy_model(str(tmp_path), noise_size=0.2, config=config)
    assert (type(model), model.noise_size) == (regularized.ViTForImageClassification, 0.2)
    encoder = masked.vit.state_dict()
    assert all(torch.equal(tensor, encoder[name]) for name, tensor in model.vit.state_dict().items())


def test_eval_mode_is_the_parents_forward():
    """Noise or a missing loss at evaluation would change the numbers that tables report."""
    batch = {**padded_batch(), "labels": torch.tensor([0, 1, 2, 0])}
    output, expected = noisy_classifier(noise_size=1.0).eval()(**batch), tiny_classifier().eval()(**batch)
    assert torch.equal(output.logits, expected.logits)
    assert torch.equal(output.loss, expected.loss)
    assert "noisy_logits" not in output


def test_no_noise_is_perfectly_smooth():
    """A smoothness above 0 without noise and dropout means that the two halves saw different inputs."""
    batch = padded_batch()
    output = noisy_classifier(noise_size=0.0).double().train()(**batch)
    terms = R3F()(output, None, {"labels": torch.tensor([0, 1, 2, 0])})
    assert terms["smoothness_loss"].abs().max() < 1e-12


@pytest.mark.parametrize("noise", regularized.NOISES)
def test_noise_has_the_size_it_says(noise: str):
    """Noise of 1e-5 and noise of 1e-2 are different regularisers."""
    drawn = noisy_classifier(noise=noise, noise_size=1e-3)._draw(torch.zeros(100, 100))
    assert drawn.mean().abs() < 1e-4
    expected = 1e-3 if noise == "normal" else 1e-3 / math.sqrt(3)
    assert drawn.std().item() == pytest.approx(expected, rel=0.05)
    assert noise == "normal" or drawn.abs().max() <= 1e-3


@pytest.mark.parametrize("view", ["logits", "noisy_logits"])
def test_gradients_reach_the_model_through_both_halves(view: str):
    """A noisy view without gradients is a fixed target: half of the regulariser's pull would be missing."""
    model = noisy_classifier(noise_size=0.1).train()
    model(**padded_batch())[view].square().sum().backward()
    for name, p in model.named_parameters():
        reached = p.grad is not None and bool(p.grad.abs().sum() > 0)
        # As in the authors' code, the noisy half is detached from the word embedding table
        expected = "word_embeddings" not in name or view == "logits"
        assert reached == expected or name.endswith("key.bias"), name


def test_a_saved_model_is_the_parents(tmp_path):
    """A class name of ours in config.json could not be loaded without hfkd."""
    noisy_classifier(noise="normal").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["RobertaForSequenceClassification"]
    assert not {"noise", "noise_size"} & config.keys()
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(plain) is transformers.RobertaForSequenceClassification
    loaded = noisy_model(str(tmp_path), noise="normal", noise_size=1e-4, num_labels=3)
    assert (loaded.noise, loaded.noise_size, loaded.dtype) == ("normal", 1e-4, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), loaded.parameters(), strict=True))


def test_an_architecture_without_a_noisy_form_is_refused(tmp_path):
    """Falling back to the plain model would train without the regulariser."""
    transformers.DistilBertConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'distilbert'"):
        noisy_model(str(tmp_path))


def test_r3f_trains_under_the_distillation_trainer(tmp_path):
    """Terms without a count, or pruned columns, would stop the run in its first step."""
    from hfkd.trainers.distillation import DistillationTrainer

    arguments = trainer_arguments(tmp_path, logging_steps=1, eval_strategy="steps", eval_steps=3)
    trainer = DistillationTrainer(
        noisy_classifier(noise_size=0.1),
        arguments,
        train_dataset=training_rows(),
        eval_dataset=training_rows(6),
        objective=R3F(),
    )
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "smoothness_loss" in entry]
    assert len(logged) == 3
    assert all(entry["smoothness_loss"] > 0 for entry in logged)
    assert any("eval_loss" in entry for entry in trainer.state.log_history)
