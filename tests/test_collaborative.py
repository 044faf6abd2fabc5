"""CollaborativeTrainer: groups of students, what couples them, and what must not."""

from __future__ import annotations

import copy
import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForSequenceClassification

import launching
from group_run import RUNS, SIZES, classifier, coordinator, group_trainer, rows, state_of, students
from hfkd import (
    KD,
    CNet,
    CollaborativeArguments,
    CollaborativeTrainer,
    ConstantWeights,
    DistillationArguments,
    DistillationTrainer,
    MutualLearning,
    StudentGroup,
    WeightTable,
)
from hfkd.meta import FeatureTrunk, LogitTrunk
from hfkd.models.cifar_resnet import CifarResNetForImageClassification, cifar_resnet_config
from hfkd.teachers import ModelTeacher
from hfkd.testing import tiny_tokenizer
from hfkd.trainers.meta_check import refuse_wrong_meta_rows

HERE = Path(__file__).parent


def assert_close(found, expected, tolerance=1e-9):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}")


def single_run(model, output, settings, alpha=0.5):
    """The same student with DistillationTrainer."""
    values = {
        **{"output_dir": str(output), "num_train_epochs": 3, "per_device_train_batch_size": 8, "learning_rate": 1e-2},
        **{"save_strategy": "no", "report_to": "none", "disable_tqdm": True},
        **settings,
    }
    trainer = DistillationTrainer(
        model,
        DistillationArguments(**values),
        train_dataset=rows(32),
        processing_class=tiny_tokenizer(),
        teacher=classifier(7),
        objective=KD(temperature=2.0, alpha=alpha),
    )
    trainer.train()
    return trainer.model.state_dict()


# ---- laws of groups ----


@pytest.mark.parametrize("settings", [{}, {"optim": "sgd", "gradient_accumulation_steps": 2, "weight_decay": 0.1}])
def test_a_group_of_one_is_a_distillation(settings, tmp_path):
    """Bit for bit, with dropout: else every table that sets a group beside KD compares two trainers."""
    alone = single_run(classifier(0, dropout=0.2), tmp_path / "alone", settings, alpha=0.7)
    trainer = group_trainer(
        tmp_path / "group",
        settings,
        students={"only": classifier(0, dropout=0.2)},
        coordinator=ConstantWeights(task=1 - 0.7, distill=0.7),
    )
    trainer.train()
    for name, tensor in trainer.model["only"].state_dict().items():
        assert torch.equal(tensor, alone[name]), name


@pytest.mark.parametrize("settings", [{"max_grad_norm": 0.05}, {"optim": "sgd", "optim_args": "momentum=0.9"}])
def test_a_group_of_three_is_three_runs(settings, tmp_path):
    """One clipped norm for all, or one student's decay, and the small student learns otherwise because a large one is there."""
    made = {name: classifier(seed, size) for seed, (name, size) in enumerate({"a": 16, "b": 32, "c": 48}.items())}
    trainer = group_trainer(
        tmp_path / "group",
        settings | {"weight_decay": 0.1},
        students=copy.deepcopy(made),
        coordinator=ConstantWeights(task=0.5, distill=0.5),
    )
    trainer.train()
    for name, model in made.items():
        alone = single_run(model, tmp_path / name, settings | {"weight_decay": 0.1})
        assert_close(trainer.model[name].state_dict(), alone)


@pytest.mark.parametrize("run", RUNS)
def test_accumulation_changes_nothing(run, tmp_path):
    """A look-ahead of one micro-batch would make a run on a small GPU another experiment."""
    whole = group_trainer(tmp_path / "whole", {}, run)
    whole.train()
    parts = group_trainer(tmp_path / "parts", {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}, run)
    parts.train()
    assert_close(state_of(parts), state_of(whole))


def test_the_engines_lead_to_the_same_coordinator(tmp_path):
    """An engine is a way to compute, not another method."""
    found = {}
    for engine in ("jvp", "double_backward", "finite_difference"):
        trainer = group_trainer(tmp_path / engine, {"meta_engine": engine})
        trainer.train()
        found[engine] = state_of(trainer)
    assert_close(found["jvp"], found["double_backward"], 1e-7)  # Adam divides by small numbers
    start = coordinator("reference").trunk.state_dict()
    moved = {name: found["jvp"][f"coordinator trunk.{name}"] - value for name, value in start.items()}
    for name, value in moved.items():
        other = found["finite_difference"][f"coordinator trunk.{name}"] - start[name]
        assert value.norm() > 1e-3 and (other - value).norm() < 0.1 * value.norm(), name


# ---- the algorithm, written out ----


def plain_loop(trainer, batches, meta_batches, steps, interval, momentum, rate, decay):
    """MC-Distil as its released code has it, with torch alone: look ahead with a graph, move C-Net, then the real step."""
    models = [copy.deepcopy(student).train() for _, student in trainer.model.items()]
    cnet, teacher = copy.deepcopy(trainer.coordinator), classifier(7).eval()
    optimizers = [torch.optim.SGD(model.parameters(), lr=rate, momentum=momentum) for model in models]
    outer = torch.optim.Adam(cnet.parameters(), lr=0.05, weight_decay=decay)
    for number in range(steps):
        rate_now = rate * (steps - number) / steps  # linear schedule
        batch, seen = batches[number], {n: batches[number][n] for n in ("input_ids", "attention_mask")}
        with torch.no_grad():
            soft = (teacher(**seen).logits / 2).softmax(-1)

        def losses(logits, labels=batch["labels"], soft=soft):
            kl = 4 * (soft * (soft.log() - (logits / 2).log_softmax(-1))).sum(-1)
            return torch.stack([F.cross_entropy(logits, labels, reduction="none"), kl], -1)

        if number % interval == 0:
            weights, value = cnet(batch), 0.0
            meta = meta_batches[number]
            with sdpa_kernel(SDPBackend.MATH):
                for k, model in enumerate(models):
                    names, params = zip(*model.named_parameters(), strict=True)
                    loss = (weights[:, k] * losses(model(**seen).logits)).sum() / len(batch["labels"])
                    moved = {}
                    grads = torch.autograd.grad(
                        loss, params, create_graph=True, allow_unused=True, materialize_grads=True
                    )
                    for name, p, g in zip(names, params, grads, strict=True):
                        buffer = optimizers[k].state[p].get("momentum_buffer")
                        moved[name] = p - rate_now * (g if buffer is None else momentum * buffer + g)
                    shown = {n: meta[n] for n in ("input_ids", "attention_mask")}
                    value = value + F.cross_entropy(functional_call(model, moved, (), shown).logits, meta["labels"])
            outer.zero_grad()
            for p, g in zip(cnet.parameters(), torch.autograd.grad(value, list(cnet.parameters())), strict=True):
                p.grad = g
            outer.step()
        weights = cnet(batch).detach()
        for k, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            optimizer.param_groups[0]["lr"] = rate_now
            optimizer.zero_grad()
            ((weights[:, k] * losses(model(**seen).logits)).sum() / len(batch["labels"])).backward()
            optimizer.step()
    return models, cnet


def test_training_is_the_released_algorithm(tmp_path):
    """Learning rates of the step before, a batch of the step after, a sum for a mean: all of them train without an error."""
    settings = {"optim": "sgd", "optim_args": "momentum=0.9", "max_grad_norm": 0.0, "coordinator_weight_decay": 1e-4}
    trainer = group_trainer(tmp_path, settings | {"learning_rate": 0.1})
    start = copy.deepcopy(trainer.model), copy.deepcopy(trainer.coordinator)
    batches, meta_batches = [], {}
    own_forward, own_meta = trainer._ask_teacher, trainer._meta_batch
    trainer._ask_teacher = lambda inputs: batches.append(inputs) or own_forward(inputs)

    def meta_batch():
        meta_batches[trainer.state.global_step] = found = own_meta()
        return found

    trainer._meta_batch = meta_batch
    trainer.train()
    assert len(batches) == 12 and sorted(meta_batches) == list(range(0, 12, 2)), "the teacher is asked once a batch"
    ended, learned = state_of(trainer), trainer.coordinator
    trainer.model, trainer.coordinator = start
    models, cnet = plain_loop(trainer, batches, meta_batches, 12, 2, 0.9, 0.1, 1e-4)
    for name, model in zip(SIZES, models, strict=True):
        for key, tensor in model.state_dict().items():
            torch.testing.assert_close(ended[f"student students.{name}.{key}"], tensor, rtol=0, atol=1e-8)
    assert_close(learned.state_dict(), cnet.state_dict(), 1e-7)
    assert not torch.allclose(cnet.head.weight, start[1].head.weight, atol=1e-3), "the coordinator never moved"


def test_a_meta_step_touches_nothing_else(tmp_path):
    """Looking ahead with the students' own statistics, moments or random state trains them on held-out rows unnoticed."""
    torch.manual_seed(0)
    pixels = np.random.default_rng(0).normal(size=(48, 3, 8, 8)).astype(np.float32)
    data = Dataset.from_dict({"pixel_values": list(pixels), "label": (np.arange(48) % 3).tolist()}).with_format("torch")
    made = {
        name: CifarResNetForImageClassification(cifar_resnet_config(f"resnet10-{name}", 3)) for name in ("xxxs", "xxs")
    }
    args = CollaborativeArguments(
        **{"output_dir": str(tmp_path), "max_steps": 3, "per_device_train_batch_size": 8, "coordinator_interval": 1},
        **{"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "optim": "adamw_torch"},
    )
    trainer = CollaborativeTrainer(
        made, args, train_dataset=data.select(range(32)), teacher=copy.deepcopy(made["xxs"]),
        meta_dataset=data.select(range(32, 48)),
    )  # fmt: skip
    seen = []
    own = trainer._meta_step

    def watched(samples, counts):
        def all_of_it():
            moments = [value.clone() for state in trainer.optimizer.state.values() for value in state.values()]
            modules = [module.training for module in trainer.model.modules()]
            grads = [p.grad for p in trainer.model.parameters()]
            return (
                [value.clone() for value in trainer.model.state_dict().values()],
                moments,
                torch.get_rng_state(),
                modules,
                grads,
            )

        before, head = all_of_it(), trainer.coordinator.head.weight.clone()
        found = own(samples, counts)
        after = all_of_it()
        for one, other in zip(before[:2], after[:2], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
        assert torch.equal(before[2], after[2]) and (not seen or before[3:] == after[3:])
        assert not torch.equal(head, trainer.coordinator.head.weight)
        seen.append(len(before[1]))
        return found

    trainer._meta_step = watched
    trainer.train()
    assert len(seen) == 3 and seen[-1] > 0


def test_the_coordinator_disturbs_no_dropout(tmp_path):
    """A student whose masks depend on who weights its examples cannot be compared with one of constant weights."""
    fixed = group_trainer(tmp_path / "a", {}, dropout=0.3, coordinator=ConstantWeights(task=1.0))
    fixed.train()

    class Ones(CNet):
        def forward(self, *args):
            found = super().forward(*args)
            return found * 0 + torch.tensor([1.0, 0.0])

    ones = Ones(coordinator("reference").trunk).double()
    learned = group_trainer(tmp_path / "b", {"coordinator_interval": 1}, dropout=0.3, coordinator=ones)
    learned.train()
    assert_close(learned.model.state_dict(), fixed.model.state_dict(), 1e-12)


# ---- what is learned ----


def toy(seed: int, noise: str):
    """Points of the plane, two classes; 40 % of the labels wrong, in a region or at random."""
    draw = np.random.default_rng(seed)

    def points(count):
        x = draw.uniform(-1, 1, (count, 2)).astype(np.float32)
        return x, (x[:, 0] > 0).astype(int)

    x, y = points(400)
    wrong = (x[:, 1] > 0.2) if noise == "region" else draw.random(400) < 0.4
    train = Dataset.from_dict({"features": x, "label": np.where(wrong, 1 - y, y), "example_id": np.arange(400)})
    x, y = points(400)
    return train.with_format("torch"), Dataset.from_dict({"features": x, "label": y}).with_format("torch"), wrong


class Perceptron(torch.nn.Module):
    """Registered nowhere: a PreTrainedModel around two layers."""


def perceptron_student(seed: int):
    from transformers import PreTrainedConfig, PreTrainedModel
    from transformers.utils import ModelOutput

    class Config(PreTrainedConfig):
        model_type = "toy_perceptron"

    class Model(PreTrainedModel):
        config_class = Config
        main_input_name = "features"

        def __init__(self, config):
            super().__init__(config)
            self.layers = torch.nn.Sequential(torch.nn.Linear(2, 32), torch.nn.Tanh(), torch.nn.Linear(32, 2))
            self.post_init()

        def forward(self, features):
            return ModelOutput(logits=self.layers(features))

    torch.manual_seed(seed)
    return Model(Config(num_labels=2))


def toy_weights(seed, noise, made, tmp_path, **settings):
    """Mean task weight of the rows whose labels are wrong, and of the others; accuracy on held-out clean rows."""
    train, meta, wrong = toy(seed, noise)
    args = CollaborativeArguments(
        **{
            **{"output_dir": str(tmp_path), "num_train_epochs": 40, "per_device_train_batch_size": 100, "optim": "sgd"},
            **{"learning_rate": 0.5, "lr_scheduler_type": "constant", "coordinator_interval": 1, "seed": seed},
            **{"coordinator_learning_rate": 0.02, "save_strategy": "no", "report_to": "none", "disable_tqdm": True},
            **{"meta_batch_size": 200, "max_grad_norm": 0.0},
            **settings,
        }
    )
    trainer = CollaborativeTrainer(
        {"only": perceptron_student(seed)}, args, train_dataset=train, coordinator=made, meta_dataset=meta
    )
    trainer.train()
    with torch.no_grad():
        weights = trainer.coordinator({"features": train["features"][:], "example_id": torch.arange(400)})[:, 0, 0]
        _, held_out, _ = toy(seed + 100, noise)
        right = trainer.model["only"](held_out["features"][:]).logits.argmax(-1) == held_out["label"][:]
    return float(weights[wrong].mean()), float(weights[~wrong].mean()), float(right.float().mean())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_labels_that_are_wrong_in_a_region_are_found(seed, tmp_path):
    """What the coordinator is for: with the sign or the batch mixed up it would learn nothing here, and nobody would know."""
    wrong, right, accuracy = toy_weights(seed, "region", CNet(FeatureTrunk("features", 2)), tmp_path)
    assert wrong < 0.5 * right and accuracy > 0.95, (wrong, right, accuracy)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_labels_flipped_at_random_need_a_table(seed, tmp_path):
    """A network that sees the input alone cannot tell them apart, and a report that it does would be a leak of labels."""
    short = {"num_train_epochs": 20}  # by then the network of the test above tells its region apart as 1 to 50
    network, table = CNet(FeatureTrunk("features", 2)), WeightTable(learning_rate=200.0, task=0.5)
    wrong, right, _ = toy_weights(seed, "random", network, tmp_path / "network", **short)
    assert abs(wrong - right) < 0.1, (wrong, right)
    wrong, right, _ = toy_weights(seed, "random", table, tmp_path / "table", **short)
    assert wrong < 0.5 * right, (wrong, right)


# ---- resume, several processes ----


@pytest.mark.launch
@pytest.mark.parametrize("run", ["reference", "fused", "logits"])
def test_a_killed_run_goes_on_as_if_it_had_not_been(run, tmp_path):
    """With dropout: a coordinator or its moments that start anew make a resumed run another one, silently."""
    whole = group_trainer(tmp_path / "whole", {}, run, 0.2)
    whole.train()
    words = [str(tmp_path / "cut"), "--run", run, "--killed_at", "7"]
    killed = launching.run(HERE / "group_run.py", *words, log=tmp_path)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    resumed = group_trainer(tmp_path / "cut", {"save_strategy": "steps", "save_steps": 3}, run, 0.2)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.log_history[0]["step"] == 1 and resumed.state.global_step == 12
    assert_close(state_of(resumed), state_of(whole), 1e-12)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    output = tmp_path_factory.mktemp("two")
    done = launching.run(HERE / "group_run.py", str(output), log=output, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(output / f"rank-{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.mark.launch
@pytest.mark.parametrize("run", RUNS)
def test_two_processes_are_one(run, ranks, tmp_path):
    """A look-ahead from one process's rows, or a coordinator that differs between processes, drifts without an error."""
    assert [found["world_size"] for found in ranks] == [2, 2]
    assert_close(ranks[1][run], ranks[0][run], 0)
    alone = group_trainer(tmp_path, {}, run)
    alone.train()
    assert_close(ranks[0][run], state_of(alone))
    expected = [entry for entry in alone.state.log_history if "loss" in entry]
    for found, entry in zip(ranks[0][f"{run} logs"], expected, strict=True):
        names = [name for name in entry if name.endswith("loss")]
        assert len(names) == 5
        assert [found[name] for name in names] == pytest.approx([entry[name] for name in names], abs=1e-6)
    evaluated, other = alone.evaluate(rows(16, 200)), ranks[0][f"{run} evaluated"]
    assert other["eval_small_task_loss"] == pytest.approx(evaluated["eval_small_task_loss"], abs=1e-8)


# ---- what users see ----


def test_metrics_logs_and_folders_go_by_name(tmp_path):
    """Whoever cannot tell which student a number belongs to publishes the wrong one."""

    def metrics(prediction):
        assert prediction.predictions.shape == (16, 3)
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    trainer = group_trainer(
        tmp_path, {"eval_strategy": "epoch", "eval_teacher": True}, compute_metrics=metrics, eval_dataset=rows(16, 200)
    )
    trainer.train()
    evaluated = trainer.evaluate()
    for name in SIZES:
        student = DistillationTrainer(
            copy.deepcopy(trainer.model[name]),
            DistillationArguments(output_dir=str(tmp_path / name), report_to="none", eval_teacher=True),
            processing_class=tiny_tokenizer(),
            compute_metrics=metrics,
            teacher=classifier(7),
            train_dataset=rows(32),
        )
        alone = student.evaluate(rows(16, 200))
        assert evaluated[f"eval_{name}_accuracy"] == alone["eval_accuracy"]
        assert evaluated[f"eval_{name}_task_loss"] == pytest.approx(alone["eval_loss"])
        assert evaluated[f"eval_{name}_agreement"] == pytest.approx(alone["eval_agreement"])
    accuracies = [evaluated[f"eval_{name}_accuracy"] for name in SIZES]
    assert evaluated["eval_mean_accuracy"] == pytest.approx(np.mean(accuracies))
    assert evaluated["eval_loss"] == pytest.approx(sum(evaluated[f"eval_{name}_task_loss"] for name in SIZES))
    logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
    parts = [f"{name}_{part}_loss" for name in SIZES for part in ("task", "distill")]
    assert logged["loss"] == pytest.approx(sum(logged[part] for part in parts))
    assert 0 < logged["large_distill_weight_q25"] <= logged["large_distill_weight_q75"] < 1
    assert trainer.predict(rows(16, 200)).predictions.shape == (16, 2, 3)
    trainer.save_model(str(tmp_path / "saved"))
    for name, student in trainer.model.items():
        plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved" / name, dtype=torch.float64)
        assert plain.state_dict().keys() == student.state_dict().keys()
        assert all(torch.equal(plain.state_dict()[key], value) for key, value in student.state_dict().items())
        assert (tmp_path / "saved" / name / "tokenizer.json").is_file()
    assert StudentGroup.from_pretrained(tmp_path / "saved").names == list(SIZES)


def test_the_best_group_is_loaded_at_the_end(tmp_path):
    """The stock method looks for one model's file, finds none, and keeps the last students with a warning."""
    settings = {
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "load_best_model_at_end": True,
        "learning_rate": 3e-2,
        "num_train_epochs": 8,
    }
    trainer = group_trainer(tmp_path, settings, eval_dataset=rows(16, 200))
    trainer.train()
    best = min(entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)
    last = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry][-1]
    assert best < last
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best)


def test_students_teach_each_other(tmp_path):
    """Deep mutual learning without a teacher and without labels: all that is left is to agree."""
    settings = {"max_steps": 30, "report_to": "none", "save_strategy": "no", "logging_steps": 1, "learning_rate": 1e-2}
    trainer = CollaborativeTrainer(
        students(),
        CollaborativeArguments(output_dir=str(tmp_path), disable_tqdm=True, **settings),
        train_dataset=rows(32),
        processing_class=tiny_tokenizer(),
        objective=MutualLearning(),
        coordinator=ConstantWeights(mutual=1.0),
    )
    trainer.train()
    found = [entry["small_mutual_loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert found[-1] < 0.2 * found[0] and trainer.state.log_history[0]["large_task_loss"] == 0


def test_a_search_starts_every_trial_anew(tmp_path):
    """A second trial that goes on with the first one's students and coordinator measures the order of trials."""
    made = []

    def model_init(trial=None):
        made.append(StudentGroup(students()))
        return made[-1]

    args = CollaborativeArguments(
        output_dir=str(tmp_path), max_steps=4, report_to="none", save_strategy="no", coordinator_interval=1
    )
    trainer = CollaborativeTrainer(
        None,
        args,
        train_dataset=rows(32),
        processing_class=tiny_tokenizer(),
        model_init=model_init,
        teacher=ModelTeacher(classifier(7)),
        coordinator=coordinator("reference"),
        meta_dataset=rows(16, 100),
    )
    ends = []
    for _ in range(2):
        trainer.train()
        ends.append(state_of(trainer))
    assert_close(ends[1], ends[0], 0)


def test_a_search_moves_the_coordinators_settings(tmp_path):
    """Each trial would run with the learning rate of the trial before it, and the best one be reported of another."""
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    trainer = CollaborativeTrainer(
        None,
        CollaborativeArguments(output_dir=str(tmp_path), max_steps=1, report_to="none", save_strategy="no"),
        train_dataset=rows(32),
        eval_dataset=rows(8, 200),
        processing_class=tiny_tokenizer(),
        model_init=lambda: StudentGroup(students()),
        teacher=ModelTeacher(classifier(7)),
        coordinator=coordinator("reference"),
        meta_dataset=rows(16, 100),
    )
    trainer.coordinator.double()
    used, own = [], trainer._meta_step
    trainer._meta_step = lambda *given: used.append(trainer._meta_optimizer.param_groups[0]["lr"]) or own(*given)
    rates = [0.2, 0.4]
    trainer.hyperparameter_search(
        hp_space=lambda trial: {"coordinator_learning_rate": rates[trial.number]},
        compute_objective=lambda metrics: metrics["eval_loss"],
        n_trials=2,
        direction="minimize",
        backend="optuna",
    )
    assert used == rates


def test_scaled_gradients_are_unscaled_once_a_step(tmp_path):
    """With fp16 every group of two students or more would stop in its first step: torch unscales once."""
    trainer = group_trainer(tmp_path, {"max_steps": 1}, "constant")
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    scaler.scale(torch.zeros(()))
    trainer.accelerator.unscale_gradients = lambda optimizer=None: scaler.unscale_(trainer.optimizer.optimizer)
    trainer.train()
    assert trainer.state.global_step == 1


def test_rows_that_draw_leave_the_random_state_alone(tmp_path):
    """Meta rows that are augmented as they are read would give students other dropout than without a coordinator."""

    def draws(row):
        torch.rand(1)
        return row

    trainer = group_trainer(tmp_path, {}, meta_dataset=rows(16, 100).with_transform(draws))
    before = torch.get_rng_state()
    trainer._meta_batch()
    assert torch.equal(torch.get_rng_state(), before)


def test_checkpointing_of_students_without_a_look_ahead(tmp_path):
    """What the message about the look-ahead advises must run."""
    settings = {"max_steps": 1, "gradient_checkpointing": True}
    trainer = group_trainer(tmp_path, settings, "constant")
    trainer.train()
    assert all(
        any(getattr(m, "gradient_checkpointing", False) for m in one.modules()) for _, one in trainer.model.items()
    )


def test_metrics_see_inputs_and_losses(tmp_path):
    """Asked for by include_for_metrics; a metric per input would be computed on None."""
    seen = []
    trainer = group_trainer(
        tmp_path,
        {"include_for_metrics": ["inputs", "loss"]},
        compute_metrics=lambda found: seen.append((len(found.inputs), len(found.losses))) or {"note": "text"},
        eval_dataset=rows(16, 200),
    )
    trainer.evaluate()
    assert seen == [(16, 16)] * 2


# ---- bad input ----


def test_wrong_groups_are_refused():
    """Two students in one folder overwrite each other; students of other labels learn another task."""
    one, other = classifier(0), classifier(1)
    with pytest.raises(ValueError, match="two students are called a"):
        StudentGroup([("a", one), ("a", other)])
    with pytest.raises(ValueError, match="share parameters"):
        StudentGroup({"a": one, "b": one})
    with pytest.raises(ValueError, match="'x/y'"):
        StudentGroup({"x/y": one})
    with pytest.raises(ValueError, match="'half'.*method"):
        StudentGroup({"half": one})
    with pytest.raises(ValueError, match="one student or more"):
        StudentGroup({})
    other.config.id2label = {0: "x", 1: "y", 2: "z"}
    with pytest.raises(ValueError, match=r"LABEL_0.*'x'"):
        StudentGroup({"a": one, "b": other})
    with pytest.raises(TypeError, match="Linear"):
        StudentGroup({"a": torch.nn.Linear(2, 2)})


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"meta_dataset": None}, "meta_dataset="),
        ({"meta_dataset": rows(0)}, "meta_dataset="),
        ({"meta_dataset": rows(8, 100).to_iterable_dataset()}, "of a known length"),
        ({"meta_dataset": rows(8, 100).remove_columns("label")}, "no row of the meta set has a label"),
        ({"meta_dataset": rows(8, 100).map(lambda row: {"label": -100})}, "no row of the meta set has a label"),
        ({"meta_dataset": rows(8)}, "the meta set and the training data share 8 rows"),
        ({"meta_dataset": rows(8, 200), "eval_dataset": rows(8, 204)}, "the evaluation data share 4 rows"),
        ({"meta_dataset": rows(8, 200), "eval_dataset": {"one": rows(8, 204)}}, "evaluation data 'one' share 4 rows"),
        ({"coordinator": ConstantWeights(task={"small": 1.0})}, "small, large"),
        ({"coordinator": ConstantWeights(mutual=1.0)}, "no loss mutual"),
        ({"objective": KD()}, "KD scores one student"),
        ({"objective": MutualLearning(), "students": {"only": classifier(0)}}, "two or more"),
        ({"coordinator": CNet(LogitTrunk(["teacher"])), "teacher": None}, "there is no teacher"),
        ({"students": classifier(0)}, "StudentGroup"),
    ],
)
def test_wrong_inputs_are_refused(given, says, tmp_path):
    """A meta set that is also trained on, or tested on, makes every number of the run worthless."""
    given = {"coordinator": coordinator("reference"), "teacher": classifier(7), "meta_dataset": rows(16, 100), **given}
    model = given.pop("students", None) or students()
    with pytest.raises(ValueError, match=says):
        CollaborativeTrainer(
            model,
            CollaborativeArguments(output_dir=str(tmp_path), max_steps=1, report_to="none"),
            train_dataset=rows(32),
            processing_class=tiny_tokenizer(),
            **given,
        ).train()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"coordinator_interval": 0}, "coordinator_interval"),
        ({"meta_engine": "magic"}, "jvp"),
        ({"meta_order": "fused", "meta_engine": "double_backward"}, "reference only"),
        ({"optim": "adafactor"}, "Adafactor"),
        ({"gradient_checkpointing": True, "meta_engine": "finite_difference"}, "ConstantWeights"),
        ({"bf16": True, "meta_engine": "finite_difference"}, "rounds the displacement"),
        ({"objective": "kd"}, "ConstantWeights"),
    ],
)
def test_wrong_settings_are_refused(settings, says, tmp_path):
    """Found after hours, or never: a coordinator that cannot learn looks like one that has nothing to say."""
    with pytest.raises(ValueError, match=says):
        group_trainer(tmp_path, settings).train()


def test_other_arguments_are_refused(tmp_path):
    """A missing attribute of TrainingArguments does not say what to write instead."""
    args = DistillationArguments(output_dir=str(tmp_path), report_to="none")
    with pytest.raises(ValueError, match="CollaborativeArguments, got DistillationArguments"):
        CollaborativeTrainer(students(), args, train_dataset=rows(8), coordinator=ConstantWeights(task=1.0))


def test_rows_are_compared_by_what_students_read(tmp_path):
    """Numbers of rows that differ between two sets would hide that the rows do not."""
    args = CollaborativeArguments(output_dir=str(tmp_path), report_to="none")
    with pytest.raises(ValueError, match="share 8 rows"):
        CollaborativeTrainer(
            students(),
            args,
            train_dataset=rows(32).add_column("idx", list(range(32))),
            meta_dataset=rows(8).add_column("idx", list(range(100, 108))),
            processing_class=tiny_tokenizer(),
        )


def test_every_process_has_a_meta_row():
    """An empty batch on one process ends in the collator there, and in a wait without end on the others."""
    refuse_wrong_meta_rows(rows(2), None, 2)
    for meta, size in ((rows(1), None), (rows(8), 1)):
        with pytest.raises(ValueError, match="1 rows leaves some of 2 processes"):
            refuse_wrong_meta_rows(meta, size, 2)


@pytest.mark.parametrize("settings", [{}, {"meta_order": "fused"}, {"meta_engine": "last_layer"}])
def test_a_student_that_does_not_move_is_refused(settings, tmp_path):
    """Its name is needed: torch says that a list is empty, after the teacher has been asked."""
    made = students()
    (made["large"].classifier if settings.get("meta_engine") else made["large"]).requires_grad_(False)
    with pytest.raises(ValueError, match="large: no parameter is trained"):
        group_trainer(tmp_path, settings, students=made).train()


def test_kernels_without_a_derivative_are_refused(tmp_path):
    """A message out of the middle of torch does not say which engine would run."""
    made = students()
    made["large"].config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match=r"large's attention kernel.*finite_difference"):
        group_trainer(tmp_path, {}, students=made)


def test_weights_that_explode_stop_the_run(tmp_path):
    """Hours of training on NaN; the last checkpoint must be there and the sentence must name the step and the student."""
    trainer = group_trainer(tmp_path, {"save_strategy": "steps", "save_steps": 1})

    class Explodes(type(trainer.callback_handler.callbacks[0])):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 3:
                with torch.no_grad():
                    trainer.coordinator.head.bias[2] = float("nan")

    trainer.add_callback(Explodes())
    with pytest.raises(ValueError, match=r"step 3: the weights of large are NaN"):
        trainer.train()
    resumed = group_trainer(tmp_path, {"save_strategy": "steps", "save_steps": 1})
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 12


def test_a_checkpoint_of_other_students_is_refused(tmp_path):
    """Weights read into the wrong student, or half of the students fresh: both train on."""
    group_trainer(tmp_path, {"save_strategy": "steps", "save_steps": 6}).train()
    for made in ({"small": classifier(0, 16)}, {"small": classifier(0, 32), "large": classifier(1, 32)}):
        trainer = group_trainer(tmp_path, {"save_strategy": "steps"}, students=made)
        with pytest.raises(ValueError, match=r"other students.*there.*here"):
            trainer.train(resume_from_checkpoint=True)
    assert json.loads((tmp_path / "checkpoint-6" / "group.json").read_text())["parts"] == ["task", "distill"]


def test_a_checkpoint_is_resumed_by_the_same_order_and_coordinator(tmp_path):
    """Students that change places get each other's weights and moments; a coordinator without its file starts anew."""
    made = {"one": classifier(0, 16), "two": classifier(1, 16)}
    group_trainer(tmp_path, {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}, students=made).train()
    turned = group_trainer(tmp_path, {}, students=dict(reversed(made.items())))
    with pytest.raises(ValueError, match="other students"):
        turned.train(resume_from_checkpoint=True)
    (tmp_path / "checkpoint-1" / "coordinator.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="coordinator.safetensors"):
        group_trainer(tmp_path, {}, students=made).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
