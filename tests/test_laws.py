"""The laws: equalities of values or of training trajectories. Two processes: tests/test_two_processes.py."""

import copy
import json
import time
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

import launching
from hfkd import DistillationArguments, DistillationTrainer, MaskedLMCollator, ModelTeacher
from hfkd.functional import cross_entropy, kl_divergence
from hfkd.objectives import MaskedLM, Objective
from hfkd.testing import tiny_rows, tiny_tokenizer
from rounds_run import classifier_trainer, distilled_trainer, rounds_trainer, start_model

HERE = Path(__file__).parent


def assert_same_weights(found, expected, tolerance=0.0):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if tolerance:
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=tolerance)
        else:
            assert torch.equal(found[name], tensor), name


# ---- batch 8 = 2 x 4 accumulated ----


@pytest.mark.parametrize("feature", ["cls", "mean", "tokens"])
def test_rounds_with_accumulation_equal_one_batch(tmp_path, feature):
    """With ragged masks, a mean of micro-batch means weights tokens by chance: the students differ."""
    settings = {"feature": feature, "save_strategy": "no"}
    whole = rounds_trainer(tmp_path / "8x1", settings, double=True)
    parts = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    parts = rounds_trainer(tmp_path / "2x4", {**settings, **parts}, double=True)
    whole.train(), parts.train()
    assert_same_weights(parts.model.state_dict(), whole.model.state_dict(), 1e-9)


@pytest.mark.parametrize("head", ["sequence", "token"])
def test_classifiers_with_accumulation_equal_one_batch(tmp_path, head):
    """The stock Trainer's gradient is 4 times too large here (transformers#47688)."""
    whole = classifier_trainer(tmp_path / "a", {}, head=head)
    parts = classifier_trainer(
        tmp_path / "b", {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}, head=head
    )
    whole.train(), parts.train()
    assert_same_weights(parts.model.state_dict(), whole.model.state_dict(), 1e-9)
    norms = [[e["grad_norm"] for e in t.state.log_history if "grad_norm" in e] for t in (whole, parts)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)


def test_a_step_without_a_masked_token_trains_nothing_and_is_not_nan(tmp_path):
    """0 / 0 in one rare batch turns every weight into NaN."""
    rows = tiny_rows(16)
    for row in rows:
        row["input_ids"] = [0, 2]  # nothing maskable
        row["attention_mask"] = [1, 1]
    trainer = rounds_trainer(tmp_path, {"num_rounds": 0, "weight_decay": 0.0, "max_steps": 1}, double=True)
    trainer.train_dataset = transformers.trainer.datasets.Dataset.from_list(rows)
    trainer.train()
    assert_same_weights(trainer.model.state_dict(), start_model(double=True).state_dict())


# ---- logs ----


def test_logged_terms_sum_to_the_logged_loss(tmp_path):
    """Terms that do not add up send people looking for the wrong bug in their curves."""
    settings = {"logging_steps": 3, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    trainer = rounds_trainer(tmp_path, settings)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 2
    for entry in entries:
        assert {"pretrain_loss", "distill_loss"} <= entry.keys()
        assert entry["pretrain_loss"] + entry["distill_loss"] == pytest.approx(entry["loss"], rel=1e-5)


# ---- rounds ----


def test_zero_rounds_are_plain_further_pre_training_bit_for_bit(tmp_path):
    """If the baseline of the paper were another computation, every comparison with it would be unfair."""
    rounds = rounds_trainer(tmp_path / "rounds", {"num_rounds": 0}, dropout=0.1)
    rounds.train()
    plain = DistillationTrainer(
        args=plain_arguments(rounds.args, tmp_path / "plain"),
        data_collator=MaskedLMCollator(tiny_tokenizer(), seed=rounds.args.seed),
        train_dataset=rounds.train_dataset,
        model_init=lambda: start_model(0.1),
        objective=MaskedLM(),
    )
    plain.train()
    assert_same_weights(rounds.model.state_dict(), plain.model.state_dict())


def plain_arguments(args, output):
    names = (
        "max_steps",
        "per_device_train_batch_size",
        "learning_rate",
        "report_to",
        "disable_tqdm",
        "max_grad_norm",
        "seed",
    )
    return DistillationArguments(output_dir=str(output), **{name: getattr(args, name) for name in names})


def test_round_0_equals_the_stock_trainer_on_the_same_masks(tmp_path):
    """An independent reference: stock RobertaForMaskedLM over all positions, stock Trainer, same masks."""
    rounds = rounds_trainer(tmp_path / "rounds", {"num_rounds": 0, "max_steps": 4}, double=True)  # one epoch
    rounds.train()
    inner = MaskedLMCollator(tiny_tokenizer(), seed=rounds.args.seed)

    def full_labels(features):
        batch = inner(features)
        labels = torch.full_like(batch["input_ids"], -100).flatten()
        real = batch["masked_labels"] != -100
        labels[batch["masked_positions"][real]] = batch["masked_labels"][real]
        return {
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"],
            "labels": labels.view_as(batch["input_ids"]),
        }

    class Stock(transformers.Trainer):
        loss_is_scaled_for_ga = True

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model(**inputs).loss

    model = transformers.RobertaForMaskedLM(start_model().config).double()
    model.load_state_dict(start_model(double=True).state_dict())
    args = plain_arguments(rounds.args, tmp_path / "stock")
    args.remove_unused_columns = False
    stock = Stock(model, args, full_labels, rounds.train_dataset)
    stock.train()
    assert_same_weights(rounds.model.state_dict(), model.state_dict(), 1e-9)


class Witness(transformers.TrainerCallback):
    """Notes the student at the start of every round, and the teacher before and after."""

    def __init__(self):
        self.starts, self.before, self.after, self.optimised = [], [], [], []

    def attach(self, trainer):
        self.trainer = trainer
        trainer.add_callback(self)

    def teacher_state(self):
        teacher = self.trainer.teacher
        return None if teacher is None else copy.deepcopy(teacher.model.state_dict())

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.starts.append(copy.deepcopy(model.state_dict()))
        self.before.append(self.teacher_state())
        self.optimised.append({id(p) for group in optimizer.param_groups for p in group["params"]})

    def on_train_end(self, args, state, control, **kwargs):
        self.after.append(self.teacher_state())


def test_rounds_restart_distil_from_the_round_before_and_leave_the_teacher_alone(tmp_path):
    """The paper's algorithm 1: a student that goes on from its teacher, or a teacher that moves, is another method."""
    witness = Witness()
    trainer = rounds_trainer(tmp_path, {"num_rounds": 2}, dropout=0.1)
    witness.attach(trainer)
    trainer.train()
    for start in witness.starts:
        assert_same_weights(start, start_model(0.1).state_dict())
    assert witness.before[0] is None
    for number in (1, 2):
        assert_same_weights(witness.after[number], witness.before[number])
        saved = load_file(tmp_path / f"round-{number - 1}" / "model.safetensors")
        encoder = {n.removeprefix("roberta."): t for n, t in saved.items() if n.startswith("roberta.")}
        assert_same_weights(witness.before[number], encoder)
    teacher_ids = {id(parameter) for parameter in trainer.teacher.model.parameters()}
    assert not teacher_ids & witness.optimised[-1]
    assert all(parameter.grad is None for parameter in trainer.teacher.model.parameters())
    assert (tmp_path / "round-2" / "model.safetensors").read_bytes() != (
        tmp_path / "round-1" / "model.safetensors"
    ).read_bytes()


def test_distillation_from_the_start_itself_begins_at_zero(tmp_path):
    """Teacher = student without dropout: a first distance above 0 means that the two sides see different inputs."""
    trainer = rounds_trainer(tmp_path, {"num_rounds": 1, "max_steps": 1}, double=True)
    trainer.train()
    trainer._set_objective(trainer.round_objective, ModelTeacher(start_model(double=True).base_model, view="clean_"))
    model = start_model(double=True).train()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    answer = trainer.teacher(batch)
    terms = trainer.objective(model(**trainer.student_view(batch, training=True)), answer, batch)
    assert float(terms["distill_loss"].detach().abs().max()) < 1e-20


def test_saved_keys_are_those_of_a_plain_student(tmp_path):
    """A teacher, a second view or a wrapper inside the checkpoint breaks everyone who loads it without hfkd."""
    trainer = rounds_trainer(tmp_path, {"num_rounds": 1})
    trainer.train()
    transformers.RobertaForMaskedLM(start_model().config).save_pretrained(tmp_path / "plain")
    expected = load_file(tmp_path / "plain" / "model.safetensors").keys()
    for folder in ("round-0", "round-1", "round-1/checkpoint-6", "start"):
        assert load_file(tmp_path / folder / "model.safetensors").keys() == expected
        assert json.loads((tmp_path / folder / "config.json").read_text())["architectures"] == ["RobertaForMaskedLM"]
    _, info = transformers.RobertaForMaskedLM.from_pretrained(tmp_path / "round-1", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_distance_to_the_start_is_the_norm_over_encoder_weights(tmp_path):
    """The paper's analysis is about the encoder; the head moves much more and would hide it."""
    trainer = rounds_trainer(tmp_path, {"num_rounds": 1})
    trainer.train()
    start = start_model().base_model.state_dict()
    for done in trainer.finished_rounds():
        saved = load_file(tmp_path / f"round-{done['round']}" / "model.safetensors")
        squares = sum(((saved[f"roberta.{n}"] - t).double() ** 2).sum().item() for n, t in start.items())
        assert done["distance_to_start"] == pytest.approx(squares**0.5, rel=1e-9)
        assert done["distance_to_start"] > 0


# ---- any teacher ----


class Mixed(Objective):
    """A minimal two-term objective of this test: cross-entropy and KL, half each."""

    needs = frozenset({"teacher"})

    def forward(self, student, teacher, batch, progress=None):
        kl = kl_divergence(student.logits, teacher.logits)
        return {"task_loss": 0.5 * cross_entropy(student.logits, batch["labels"]), "distill_loss": 0.5 * kl}


def test_a_model_teacher_stays_bit_identical_and_accumulation_holds(tmp_path):
    """A teacher in training mode or in the optimizer drifts, and the target with it."""
    students = []
    for name, settings in (("a", {}), ("b", {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4})):
        torch.manual_seed(1)
        config = classifier_trainer(tmp_path / "c", {}).model.config
        teacher = transformers.RobertaForSequenceClassification(config).double().train()
        before = copy.deepcopy(teacher.state_dict())
        trainer = classifier_trainer(tmp_path / name, settings, teacher=teacher, objective=Mixed())
        trainer.train()
        assert_same_weights(teacher.state_dict(), before)
        assert not teacher.training
        students.append(trainer.model.state_dict())
    assert_same_weights(students[1], students[0], 1e-9)


# ---- resume after a kill = never killed ----


def start_process(output, settings, *flags):
    words = [str(output), json.dumps(settings), "--dropout", "0.1", *flags]
    (process,) = launching.started(HERE / "rounds_run.py", *words, log=output.with_name(output.name + "-log"))
    return process


@pytest.mark.launch
@pytest.mark.parametrize("sampling", ["random", "group_by_length"])
def test_a_killed_run_goes_on_as_if_never_killed(tmp_path, sampling):
    """SIGKILL in the middle of round 1: finished rounds are kept, and the rest is the same to the last bit."""
    settings = {"max_steps": 14, "save_steps": 3, "train_sampling_strategy": sampling, "num_rounds": 2}
    process = start_process(tmp_path / "killed", settings)
    marker = tmp_path / "killed" / "round-1" / "checkpoint-6" / "whole.json"
    deadline = time.monotonic() + 120
    while not marker.exists() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    process.join()
    assert marker.exists() and not (tmp_path / "killed" / "round-2" / "done.json").exists()
    done_before = (tmp_path / "killed" / "round-0" / "done.json").stat().st_mtime_ns

    resumed = rounds_trainer(tmp_path / "killed", settings, dropout=0.1)
    resumed.train(resume_from_checkpoint=True)
    never = rounds_trainer(tmp_path / "never", settings, dropout=0.1)
    never.train()

    assert (tmp_path / "killed" / "round-0" / "done.json").stat().st_mtime_ns == done_before
    for number in range(3):
        folders = [tmp_path / run / f"round-{number}" / "model.safetensors" for run in ("killed", "never")]
        assert_same_weights(load_file(folders[0]), load_file(folders[1]))


@pytest.mark.launch
def test_a_killed_run_keeps_its_projections(tmp_path):
    """Projections that start anew on resume throw the student back: the loss jumps and nobody knows why."""
    settings = {"max_steps": 40, "save_strategy": "steps", "save_steps": 4, "save_total_limit": 2}
    process = start_process(tmp_path / "killed", settings, "--double", "--distilled", "hidden")
    deadline = time.monotonic() + 120
    whole = lambda: list((tmp_path / "killed").glob("checkpoint-*/whole.json"))  # noqa: E731
    while not whole() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    process.join()
    assert whole() and not (tmp_path / "killed" / "checkpoint-40").exists()

    resumed = distilled_trainer(tmp_path / "killed", settings, "hidden")
    fresh = {name: tensor.clone() for name, tensor in resumed.objective.state_dict().items()}
    resumed.train(resume_from_checkpoint=True)
    never = distilled_trainer(tmp_path / "never", settings, "hidden")
    never.train()
    # Not to the last bit: where the loaded weights lie in memory decides in which order a product is summed
    assert_same_weights(resumed.model.state_dict(), never.model.state_dict(), 1e-10)
    assert_same_weights(resumed.objective.state_dict(), never.objective.state_dict(), 1e-10)
    assert any(not torch.equal(tensor, fresh[name]) for name, tensor in resumed.objective.state_dict().items())
    saved = load_file(tmp_path / "never" / "checkpoint-40" / "model.safetensors").keys()
    assert not [name for name in saved if "objective" in name]
    assert load_file(tmp_path / "never" / "checkpoint-40" / "objective.safetensors").keys()


def test_the_student_is_plain_after_training(tmp_path):
    """model.save_pretrained after training must not write hooks, projections or another attention."""
    for which in ("hidden", "maps", "relations"):
        trainer = distilled_trainer(tmp_path / which, {"max_steps": 2}, which)
        plain = trainer.model.state_dict().keys()
        attention = trainer.model.config._attn_implementation
        trainer.train()
        assert trainer.model.state_dict().keys() == plain
        assert trainer.model.config._attn_implementation == attention
        assert not trainer.model._forward_hooks
        trainer.save_model(str(tmp_path / which / "saved"))
        assert (tmp_path / which / "saved" / "objective.safetensors").exists() == (which == "hidden")


def test_the_adapters_base_teaches_as_a_second_copy_does(tmp_path):
    """One model in two roles: adapters left on, dropout or a frozen parameter left over makes it a teacher of nothing."""
    students = []
    for name, itself in (("itself", True), ("copy", False)):
        trainer = distilled_trainer(tmp_path / name, {}, "adapter", adapter_teacher=itself)
        trainer.train()
        students.append(trainer.model.state_dict())
    assert_same_weights(students[0], students[1], 1e-12)
    assert trainer.state.log_history[0]["distill_loss"] > 0


def test_projections_without_their_file_are_not_started_anew(tmp_path):
    """A checkpoint of another objective resumes silently with random projections."""
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    distilled_trainer(tmp_path, settings, "kd").train()
    with pytest.raises(FileNotFoundError, match="objective.safetensors"):
        distilled_trainer(tmp_path, {**settings, "max_steps": 6}, "hidden").train(resume_from_checkpoint=True)


def test_a_run_killed_after_its_last_step_is_closed_as_it_is(tmp_path):
    """Killed while the finished model is scored: the stock loop trains one step beyond the budget, at a learning rate of 0 or
    not, and the table of a study that was resumed has another student than one that was not."""
    settings = {"max_steps": 5, "save_strategy": "steps", "save_steps": 5, "lr_scheduler_type": "constant"}
    never = distilled_trainer(tmp_path, settings, "hidden")
    never.train()
    assert never.state.epoch % 1, "at an epoch's end the stock loop has nothing left to train"
    resumed = distilled_trainer(tmp_path, settings, "hidden")
    assert resumed.train(resume_from_checkpoint=True).global_step == 5
    assert_same_weights(resumed.model.state_dict(), never.model.state_dict())
    longer = distilled_trainer(tmp_path, {**settings, "max_steps": 6}, "hidden")
    assert longer.train(resume_from_checkpoint=True).global_step == 6
