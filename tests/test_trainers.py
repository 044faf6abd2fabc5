"""What the trainers refuse, and what they recover from."""

import json
import logging

import datasets
import pytest
import torch
import transformers
from safetensors.torch import load_file

from hfkd import DistillationTrainer, ModelTeacher, SelfDistill, SelfDistillationTrainer
from hfkd.objectives import MaskedLM
from hfkd.testing import tiny_roberta_config, tiny_rows, tiny_tokenizer
from rounds_run import classifier_trainer, rounds_trainer, start_model


@pytest.fixture
def warnings_of_hfkd(caplog):
    logger = logging.getLogger("hfkd.trainers")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


# ---- DistillationTrainer ----


def test_arguments_keep_the_order_of_the_stock_trainer():
    """People pass the first arguments by position; another order feeds a data set to the collator."""
    import inspect

    stock = list(inspect.signature(transformers.Trainer.__init__).parameters)
    for trainer in (DistillationTrainer, SelfDistillationTrainer):
        ours = list(inspect.signature(trainer.__init__).parameters)
        assert ours[: len(stock)] == stock
        snippets = ["teacher_model"] if trainer is DistillationTrainer else []
        assert ours[len(stock) :] == ["teacher", "objective", "peft_config", *snippets]


def test_refusals_of_the_distillation_trainer(tmp_path, monkeypatch):
    """Each of these would train something else than what was asked for, without a word."""
    with pytest.raises(ValueError, match="write an Objective"):
        classifier_trainer(tmp_path, {}, compute_loss_func=lambda *a, **k: 0)
    with pytest.raises(ValueError, match="needs a teacher"):
        classifier_trainer(tmp_path, {}, objective=SelfDistill())
    model = transformers.RobertaForSequenceClassification(tiny_roberta_config())
    with pytest.raises(ValueError, match="one module"):
        DistillationTrainer(model, rounds_trainer(tmp_path, {}).args, teacher=model, objective=SelfDistill())
    with pytest.raises(ValueError, match="label_smoothing"):
        classifier_trainer(tmp_path, {"label_smoothing_factor": 0.1}, objective=MaskedLM())
    with pytest.raises(OSError, match="no-such/teacher.*local"):
        classifier_trainer(tmp_path, {}, teacher="no-such/teacher")


def test_more_launched_processes_than_the_trainer_sees(tmp_path, monkeypatch):
    """Two independent trainings that each believe they are alone overwrite each other's files."""
    trainer = classifier_trainer(tmp_path, {})
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="started 2 processes, but the Trainer sees 1"):
        trainer._refuse_wrong_launch()


def test_a_term_without_a_count_is_named(tmp_path):
    """Dividing by a made-up number of units would rescale the term silently."""

    class Uncounted(MaskedLM):
        columns = ("labels",)

        def forward(self, student, teacher, batch, progress=None):
            return {"extra_loss": student.logits.sum(-1)}

        def count(self, batch):
            return {"task_loss": batch["labels"].sum()}

    with pytest.raises(ValueError, match=r"extra_loss.*task_loss"):
        classifier_trainer(tmp_path, {}, objective=Uncounted()).train()


def test_eval_loss_is_the_mean_cross_entropy_without_smoothing(tmp_path):
    """Were the teacher's term or the smoothing part of it, no two objectives could be compared."""
    trainer = classifier_trainer(tmp_path, {"label_smoothing_factor": 0.3, "per_device_eval_batch_size": 32})
    found = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    batch = trainer.data_collator([dict(row) for row in trainer.train_dataset.remove_columns("example_id")])
    with torch.no_grad():
        logits = trainer.model.eval()(batch["input_ids"], batch["attention_mask"]).logits
    assert found == pytest.approx(torch.nn.functional.cross_entropy(logits, batch["labels"]).item(), rel=1e-6)


def test_label_smoothing_acts_in_training(tmp_path):
    """transformers' own smoother finds no labels here: without ours the setting would do nothing."""
    plain, smooth = (classifier_trainer(tmp_path, {"label_smoothing_factor": f, "max_steps": 1}) for f in (0.0, 0.3))
    assert plain.train().training_loss != pytest.approx(smooth.train().training_loss, rel=1e-4)


def test_predictions_and_metrics_go_through(tmp_path):
    """A Trainer whose compute_metrics sees hidden states or nothing cannot be tuned."""
    trainer = classifier_trainer(tmp_path, {}, compute_metrics=lambda p: {"shape": p.predictions.shape[1]})
    assert trainer.evaluate(trainer.train_dataset)["eval_shape"] == 3
    assert trainer.predict(trainer.train_dataset).predictions.shape == (32, 3)


def test_peft_student_trains_and_saves_its_adapter_alone(tmp_path):
    """A whole base model inside every adapter checkpoint defeats its purpose."""
    from peft import LoraConfig

    config = LoraConfig(task_type="SEQ_CLS", target_modules=["query"], r=2)
    trainer = classifier_trainer(tmp_path, {}, double=False, peft_config=config)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    assert "lora" in " ".join(load_file(tmp_path / "adapter" / "adapter_model.safetensors"))


def test_hidden_evaluation_masks_never_change(tmp_path):
    """Masks that move with the epoch make the eval loss a random walk."""
    trainer = rounds_trainer(tmp_path, {"num_rounds": 0})
    before = next(iter(trainer.get_eval_dataloader(trainer.train_dataset)))["masked_positions"]
    trainer.train()
    after = next(iter(trainer.get_eval_dataloader(trainer.train_dataset)))["masked_positions"]
    assert torch.equal(before, after)
    losses = [trainer.evaluate(trainer.train_dataset)["eval_loss"] for _ in range(2)]
    assert losses[0] == losses[1]


def test_eval_loss_does_not_depend_on_the_batch_size(tmp_path):
    """A mean of batch means lets a batch with one masked token count as much as one with forty."""
    losses = []
    for size in (2, 5, 32):
        trainer = rounds_trainer(
            tmp_path / str(size), {"num_rounds": 0, "per_device_eval_batch_size": size}, double=True
        )
        losses.append(trainer.evaluate(trainer.train_dataset)["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-9) == pytest.approx(losses[2], rel=1e-9)


def test_predicting_uses_fixed_masks_too(tmp_path):
    """Test losses of two epochs could not be compared."""
    trainer = rounds_trainer(tmp_path, {"num_rounds": 0})
    trainer.data_collator.set_position(round=3, epoch=7)
    batches = [
        next(iter(get(trainer.train_dataset))) for get in (trainer.get_eval_dataloader, trainer.get_test_dataloader)
    ]
    assert torch.equal(batches[0]["masked_positions"], batches[1]["masked_positions"])


def test_no_token_is_pickled(tmp_path):
    """The stock Trainer keeps it in training_args.bin, which people upload by hand."""
    trainer = rounds_trainer(tmp_path, {"num_rounds": 0, "hub_token": "hf_" + "a" * 20})
    trainer.train()
    files = list(tmp_path.rglob("training_args.bin"))
    assert files and not any(b"hf_aaaa" in path.read_bytes() for path in files)
    assert trainer.args.hub_token


def test_the_older_checkpoint_stays_until_the_new_one_is_whole(tmp_path, monkeypatch):
    """Killed between the two with save_total_limit=1, a run would have no checkpoint at all."""
    from hfkd.trainers import distillation

    trainer = rounds_trainer(tmp_path, {"num_rounds": 0, "save_total_limit": 1})
    real = distillation.mark_whole

    def killed(directory):
        if directory.name == "checkpoint-4":
            raise KeyboardInterrupt
        real(directory)

    monkeypatch.setattr(distillation, "mark_whole", killed)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert distillation.last_whole_checkpoint(tmp_path / "round-0").name == "checkpoint-2"
    monkeypatch.undo()
    rounds_trainer(tmp_path, {"num_rounds": 0, "save_total_limit": 1}).train(resume_from_checkpoint=True)
    assert [path.name for path in (tmp_path / "round-0").glob("checkpoint-*")] == ["checkpoint-6"]


# ---- SelfDistillationTrainer ----


def test_refusals_of_the_rounds(tmp_path):
    """Each of these would be another method, or rounds that share an optimizer."""
    model = start_model()
    with pytest.raises(ValueError, match="num_rounds must be 0"):
        rounds_trainer(tmp_path, {"num_rounds": -1})
    for setting in ("load_best_model_at_end", "save_only_model"):
        with pytest.raises(ValueError, match="their last step"):
            rounds_trainer(tmp_path, {setting: True, "eval_strategy": "steps", "save_steps": 2, "eval_steps": 2})
    with pytest.raises(ValueError, match="dispatch_batches"):
        rounds_trainer(tmp_path, {"accelerator_config": {"dispatch_batches": True}})
    with pytest.raises(ValueError, match="global generator"):
        rounds_trainer(tmp_path, {}, data_collator=transformers.DataCollatorForLanguageModeling(tiny_tokenizer()))
    with pytest.raises(ValueError, match="SelfDistillationArguments"):
        SelfDistillationTrainer(model, processing_class=tiny_tokenizer())
    with pytest.raises(ValueError, match="the round before it"):
        rounds_trainer(tmp_path, {}, teacher=ModelTeacher(model))
    with pytest.raises(ValueError, match="optimizer_cls_and_kwargs"):
        rounds_trainer(tmp_path, {}, optimizers=(torch.optim.SGD(model.parameters(), 0.1), None))
    with pytest.raises(ValueError, match="feature must be one of cls, mean, tokens, got 'first'"):
        rounds_trainer(tmp_path, {"feature": "first"})
    with pytest.raises(ValueError, match="two_view_model"):
        SelfDistillationTrainer(
            transformers.RobertaForMaskedLM(tiny_roberta_config()),
            rounds_trainer(tmp_path, {}).args,
            train_dataset=datasets.Dataset.from_list(tiny_rows(8)),
            processing_class=tiny_tokenizer(),
        )
    with pytest.raises(ValueError, match="rounds resume with True"):
        rounds_trainer(tmp_path, {}).train(resume_from_checkpoint="round-0/checkpoint-2")


def test_a_model_given_directly_is_the_start_of_every_round(tmp_path):
    """Going on from the trained weights of the round before would not be the paper's method."""
    first = rounds_trainer(tmp_path / "a", {})
    first.train()
    second = SelfDistillationTrainer(
        start_model(),
        rounds_trainer(tmp_path / "b", {}).args,
        train_dataset=first.train_dataset,
        processing_class=tiny_tokenizer(),
    )
    second.train()
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name]), name


def test_another_runs_rounds_are_not_touched(tmp_path):
    """Overwriting a week of rounds by starting the next run is how results are lost."""
    rounds_trainer(tmp_path, {"num_rounds": 0}).train()
    before = (tmp_path / "round-0" / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="round-0"):
        rounds_trainer(tmp_path, {"num_rounds": 0}).train()
    assert (tmp_path / "round-0" / "model.safetensors").read_bytes() == before


def test_resuming_with_other_settings_names_the_difference(tmp_path):
    """Rounds of two learning rates in one folder belong to no experiment."""
    rounds_trainer(tmp_path, {"num_rounds": 0}).train()
    other_rows = rounds_trainer(tmp_path, {"num_rounds": 1})
    other_rows.train_dataset = datasets.Dataset.from_list(tiny_rows(32, seed=1))
    with pytest.raises(ValueError, match="rows was"):
        other_rows.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="learning_rate was 0.001, now 0.002"):
        rounds_trainer(tmp_path, {"num_rounds": 1, "learning_rate": 2e-3}).train(resume_from_checkpoint=True)
    longer = rounds_trainer(tmp_path, {"num_rounds": 1})
    longer.train(resume_from_checkpoint=True)  # more rounds are no other run
    assert len(longer.finished_rounds()) == 2


def test_a_finished_run_resumes_to_its_last_round(tmp_path):
    """Training again what is done wastes it; returning an untrained model is worse."""
    first = rounds_trainer(tmp_path, {"num_rounds": 1})
    output = first.train()
    again = rounds_trainer(tmp_path, {"num_rounds": 1})
    assert again.train(resume_from_checkpoint=True).global_step == output.global_step
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name


def test_a_damaged_record_is_not_taken_for_a_new_run(tmp_path):
    """Without its record nobody can tell whether the rounds there belong to this run."""
    rounds_trainer(tmp_path, {"num_rounds": 0}).train()
    (tmp_path / "rounds.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        rounds_trainer(tmp_path, {"num_rounds": 0}).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_round_is_named_and_trained_again(tmp_path, warnings_of_hfkd, damage):
    """A teacher read from half a file is a teacher nobody trained."""
    first = rounds_trainer(tmp_path, {"num_rounds": 1})
    first.train()
    path = tmp_path / "round-0" / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100] if damage == "truncated" else whole[:-1] + bytes([whole[-1] ^ 1]))
    again = rounds_trainer(tmp_path, {"num_rounds": 1})
    again.train(resume_from_checkpoint=True)
    assert "round-0: model.safetensors is corrupt or truncated" in warnings_of_hfkd.text
    assert path.read_bytes() == whole


def test_a_damaged_checkpoint_falls_back_to_the_whole_one_before(tmp_path, warnings_of_hfkd):
    """The checkpoint that was being written when the machine died has the highest number."""
    first = rounds_trainer(tmp_path, {"num_rounds": 0}, dropout=0.1)
    first.train()
    whole = (tmp_path / "round-0" / "model.safetensors").read_bytes()
    (tmp_path / "round-0" / "done.json").unlink()
    (tmp_path / "round-0" / "checkpoint-6" / "whole.json").unlink()
    broken = tmp_path / "round-0" / "checkpoint-4" / "optimizer.pt"
    broken.write_bytes(broken.read_bytes()[:50])
    again = rounds_trainer(tmp_path, {"num_rounds": 0}, dropout=0.1)
    again.train(resume_from_checkpoint=True)
    assert "checkpoint-6 was not finished" in warnings_of_hfkd.text
    assert "checkpoint-4: optimizer.pt is corrupt or truncated" in warnings_of_hfkd.text
    assert (tmp_path / "round-0" / "model.safetensors").read_bytes() == whole


def test_a_run_killed_between_the_last_checkpoint_and_done(tmp_path):
    """The last steps are all trained; the round must only be closed, not trained again or lost."""
    first = rounds_trainer(tmp_path, {"num_rounds": 0})
    first.train()
    whole = (tmp_path / "round-0" / "model.safetensors").read_bytes()
    (tmp_path / "round-0" / "done.json").unlink()
    again = rounds_trainer(tmp_path, {"num_rounds": 0})
    again.train(resume_from_checkpoint=True)
    assert (tmp_path / "round-0" / "model.safetensors").read_bytes() == whole
    assert json.loads((tmp_path / "round-0" / "done.json").read_text())["global_step"] == 6


def test_the_ablation_leaves_the_head_at_its_start(tmp_path):
    """Without the masked loss nothing may move the head but a bug (weight decay, say)."""
    trainer = rounds_trainer(tmp_path, {"num_rounds": 1, "no_pretrain_loss": True, "weight_decay": 0.1})
    trainer.train()
    start = start_model().state_dict()
    for name, tensor in trainer.model.state_dict().items():
        moved = not torch.equal(tensor, start[name])
        if name.startswith("lm_head") and "decoder.weight" not in name:
            assert not moved, name
    assert "pretrain_loss" not in trainer.state.log_history[0] and "distill_loss" in trainer.state.log_history[0]


def test_every_save_renders_a_card(tmp_path):
    """A folder without a card is a model nobody can place a year later; one with local paths tells too much."""
    trainer = rounds_trainer(tmp_path, {"num_rounds": 1})
    trainer.train()
    for folder, objective in (
        ("round-0", "MaskedLM"),
        ("round-1", "SelfDistill"),
        ("round-1/checkpoint-4", "SelfDistill"),
    ):
        text = (tmp_path / folder / "README.md").read_text()
        assert f"`{objective}`" in text and str(tmp_path) not in text
    assert "with self-distillation" not in (tmp_path / "round-0" / "README.md").read_text().split("Round 0 is")[0]
    final = (tmp_path / "round-1" / "README.md").read_text()
    for done in trainer.finished_rounds():
        assert f"{done['distance_to_start']:.4f}" in final
