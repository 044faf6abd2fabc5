"""The laws for rounds over images: equalities of values or of training trajectories."""

import json
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

import launching
from hfkd import DistillationTrainer, ModelTeacher, two_view_model
from hfkd.data.masked_images import MaskedImageCollator
from hfkd.data.pixels import ImageCollator
from hfkd.models.two_view_mae import CleanEncoder, ViTMAEForPreTraining
from hfkd.objectives import MaskedImages, SelfDistillImages
from hfkd.testing import tiny_vit_mae_config
from rounds_run import image_processor, image_rounds_trainer, image_rows, start_image_model
from test_laws import Witness, assert_same_weights, plain_arguments, start_process
from two_processes_mae import RUNS

HERE = Path(__file__).parent
QUICK = {"num_rounds": 1, "save_strategy": "no"}


def saved_model(folder):
    """With transformers alone, as a user would load it."""
    return transformers.ViTMAEForPreTraining.from_pretrained(folder, dtype="auto")


# ---- batch 8 = 2 x 4 accumulated ----


@pytest.mark.parametrize("run", ["features", "tokens", "predictions", "weights"])
def test_rounds_with_accumulation_equal_one_batch(tmp_path, run):
    """A loss that is divided by micro-batches trains with another learning rate for every memory size."""
    settings = RUNS[run]
    whole = image_rounds_trainer(tmp_path / "8x1", {**QUICK, **settings}, double=True)
    parts = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    parts = image_rounds_trainer(tmp_path / "2x4", {**QUICK, **settings, **parts}, double=True)
    whole.train(), parts.train()
    assert_same_weights(parts.model.state_dict(), whole.model.state_dict(), 1e-9)


# ---- rounds ----


def test_zero_rounds_are_plain_further_pre_training_bit_for_bit(tmp_path):
    """If the baseline of the paper were another computation, every comparison with it would be unfair."""
    rounds = image_rounds_trainer(tmp_path / "rounds", {"num_rounds": 0})
    rounds.train()
    plain = DistillationTrainer(
        args=plain_arguments(rounds.args, tmp_path / "plain"),
        data_collator=MaskedImageCollator(image_processor(), 4, seed=rounds.args.seed),
        train_dataset=image_rows(),
        model_init=lambda: start_image_model(),
        objective=MaskedImages(),
    )
    plain.train()
    assert_same_weights(rounds.model.state_dict(), plain.model.state_dict())


def test_round_0_equals_the_stock_trainer_on_the_same_masks(tmp_path):
    """An independent reference: stock ViTMAEForPreTraining with its own loss, stock Trainer, same noise."""
    rounds = image_rounds_trainer(tmp_path / "rounds", {"num_rounds": 0, "max_steps": 4}, double=True)  # one epoch
    rounds.train()
    inner = MaskedImageCollator(image_processor(), 4, seed=rounds.args.seed)

    def collate(features):
        batch = inner.on_device(inner(features))
        return {"pixel_values": batch["pixel_values"].double(), "noise": batch["noise"]}

    class Stock(transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model(**inputs).loss

    model = transformers.ViTMAEForPreTraining(tiny_vit_mae_config()).double()
    model.load_state_dict(start_image_model(double=True).state_dict())
    args = plain_arguments(rounds.args, tmp_path / "stock")
    args.remove_unused_columns = False
    Stock(model, args, collate, rounds.train_dataset).train()
    # Not closer: the objective takes the pixels to reconstruct in float32, as they come
    assert_same_weights(rounds.model.state_dict(), model.state_dict(), 1e-6)
    start = start_image_model(double=True).state_dict()
    assert max(float((tensor - start[name]).abs().max()) for name, tensor in model.state_dict().items()) > 1e-3


@pytest.mark.parametrize("matching", ["features", "predictions", "weights"])
def test_rounds_restart_distil_from_the_round_before_and_leave_the_teacher_alone(tmp_path, matching):
    """The paper's algorithm 1: a decoder that goes on from its teacher's, or a teacher that moves, is another method."""
    witness = Witness()
    trainer = image_rounds_trainer(tmp_path, {"num_rounds": 2, "matching": matching})
    witness.attach(trainer)
    trainer.train()
    start = start_image_model().state_dict()
    assert any(name.startswith("decoder.") for name in start)
    for weights in witness.starts:
        assert_same_weights(weights, start)
    assert witness.before[0] is None
    saved = saved_model(tmp_path / "round-1")
    assert not torch.equal(saved.vit.layernorm.weight, start["vit.layernorm.weight"])
    if matching == "weights":
        anchor = trainer._beside_batch["anchor"]
        assert_same_weights(anchor, saved.vit.state_dict())
        assert trainer.teacher is None and not any(tensor.requires_grad for tensor in anchor.values())
        return
    kept = saved.vit if matching == "features" else saved
    assert_same_weights(witness.after[2], witness.before[2])
    teacher = {name.removeprefix("encoder."): tensor for name, tensor in witness.before[2].items()}
    assert_same_weights(teacher, kept.state_dict())
    assert not {id(parameter) for parameter in trainer.teacher.model.parameters()} & witness.optimised[-1]
    assert all(parameter.grad is None for parameter in trainer.teacher.model.parameters())


def test_distillation_from_the_start_itself_begins_at_zero(tmp_path):
    """Teacher = student without dropout: a first distance above 0 means that the two sides see different images."""
    trainer = image_rounds_trainer(tmp_path, {"num_rounds": 1, "max_steps": 1}, double=True)
    trainer.train()
    batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[i] for i in range(8)]))
    for objective, teacher, beside in (
        (SelfDistillImages(), CleanEncoder(start_image_model(double=True).vit), {"clean": True}),
        (SelfDistillImages("tokens"), CleanEncoder(start_image_model(double=True).vit), {"clean": True}),
        (SelfDistillImages(matching="predictions"), start_image_model(double=True), {}),
        (SelfDistillImages(matching="weights"), None, {"anchor": start_image_model(double=True).vit.state_dict()}),
    ):
        trainer._beside_batch = beside
        trainer._set_objective(objective, teacher and ModelTeacher(teacher, view=""))
        output = start_image_model(double=True).train()(**trainer.student_view(batch, training=True))
        terms = objective(output, trainer._ask_teacher(batch), batch)
        assert float(terms["distill_loss"].detach().abs().max()) < 1e-20
        assert float(terms["pretrain_loss"].detach().min()) > 0.1


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {5, 17}),
        ({"no_pretrain_loss": True}, {17}),
        ({"matching": "predictions"}, {5}),
        ({"matching": "weights"}, {5}),
        ({"cache_teacher_features": True}, {5, 17}),
    ],
)
def test_a_round_pays_only_for_the_views_it_scores(tmp_path, settings, expected):
    """A pass over the whole image costs four times the masked one: no round may run it for nothing, nor an evaluation."""
    seen = []  # tokens the encoder was shown; 5 of a masked image, 17 of a whole one

    def watched():
        model = start_image_model()
        model.vit.layers[0].register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
        return model

    zero = image_rounds_trainer(tmp_path / "zero", {**QUICK, "num_rounds": 0, "max_steps": 2}, model_init=watched)
    zero.train()
    assert seen == [5, 5]
    trainer = image_rounds_trainer(tmp_path / "one", {**QUICK, "max_steps": 2, **settings}, model_init=watched)
    trainer.train()
    assert len(seen) == 4 + 2 * len(expected) and set(seen[4:]) == expected
    seen.clear()
    trainer.evaluate(trainer.train_dataset)
    assert set(seen) == {5}


def test_the_label_is_not_read(tmp_path):
    """Further pre-training on labels would leak the test of a benchmark into its pre-training."""
    labelled = image_rounds_trainer(tmp_path / "a", QUICK)
    without = image_rounds_trainer(tmp_path / "b", QUICK, train_dataset=image_rows().remove_columns("label"))
    labelled.train(), without.train()
    assert_same_weights(without.model.state_dict(), labelled.model.state_dict())


def test_pictures_train_as_their_decoded_pixels_do(tmp_path):
    """Two ways to hold one data set that train two models make every comparison depend on the cache."""
    pixels = image_rows()
    pictures = [{"image": np.asarray(row["pixels"], dtype=np.uint8), "label": row["label"]} for row in pixels]
    shown = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(2)})
    pictures = datasets.Dataset.from_list(pictures, features=shown)
    decoded = image_rounds_trainer(tmp_path / "pixels", QUICK)
    fresh = image_rounds_trainer(tmp_path / "image", QUICK, train_dataset=pictures)
    decoded.train(), fresh.train()
    assert_same_weights(fresh.model.state_dict(), decoded.model.state_dict())


def test_the_ablation_leaves_the_decoder_and_the_positions_at_their_start(tmp_path):
    """Without the masked loss nothing may move the decoder, and what MAE keeps fixed stays fixed in every round."""
    settings = {"num_rounds": 1, "no_pretrain_loss": True, "weight_decay": 0.1}
    trainer = image_rounds_trainer(tmp_path, settings)
    trainer.train()
    start = start_image_model().state_dict()
    for name, tensor in trainer.model.state_dict().items():
        fixed = name.startswith("decoder.") or name.endswith("position_embeddings")
        assert torch.equal(tensor, start[name]) == fixed, name
    assert "pretrain_loss" not in trainer.state.log_history[0] and "distill_loss" in trainer.state.log_history[0]


# ---- cached ----


@pytest.mark.parametrize("feature", ["cls", "mean"])
def test_a_cached_teacher_trains_as_one_that_is_asked_in_every_step(tmp_path, feature):
    """Answers about other rows, or of the masked view, would still look like a loss that falls."""
    settings = {"num_rounds": 2, "save_strategy": "no", "feature": feature}
    asked = image_rounds_trainer(tmp_path / "asked", settings, double=True)
    cached = image_rounds_trainer(tmp_path / "cached", {**settings, "cache_teacher_features": True}, double=True)
    asked.train(), cached.train()
    assert not hasattr(cached.teacher, "model")
    logs = [
        [entry["distill_loss"] for entry in t.state.log_history if "distill_loss" in entry] for t in (asked, cached)
    ]
    assert len(logs[0]) == 6 and logs[0] == pytest.approx(logs[1], rel=1e-4)
    # Answers are stored in float32
    assert_same_weights(cached.model.state_dict(), asked.model.state_dict(), 1e-5)
    assert not list((tmp_path / "cached").rglob("teacher_features*"))  # as large as the data, and of no use afterwards


def test_cached_features_are_one_vector_an_image(tmp_path):
    """Every patch's state of every image would be 200 times the disk, and of predictions there is no fixed one."""
    for settings in ({"feature": "tokens"}, {"matching": "predictions"}, {"matching": "weights"}):
        with pytest.raises(ValueError, match="cache_teacher_features keeps one vector an image"):
            image_rounds_trainer(tmp_path, {"cache_teacher_features": True, **settings})


# ---- evaluation ----


def test_evaluation_reports_the_masked_loss_of_fixed_masks_and_predicts_patches(tmp_path):
    """A loss of other masks each time is a random walk; predictions without their image cannot be drawn."""
    losses = []
    for size in (3, 32):
        settings = {"num_rounds": 0, "per_device_eval_batch_size": size}
        trainer = image_rounds_trainer(tmp_path / str(size), settings, double=True)
        losses.append(trainer.evaluate(trainer.train_dataset)["eval_loss"])
    trainer.train()
    trainer.data_collator.set_position(round=3, epoch=7)
    start = start_image_model(double=True).eval()
    collator = MaskedImageCollator(image_processor(), 4, seed=trainer.args.seed)
    batch = collator.on_device(collator([trainer.train_dataset[i] for i in range(32)]))
    expected = start(batch["pixel_values"], noise=batch["noise"])
    stock = transformers.ViTMAEForPreTraining(tiny_vit_mae_config()).double()
    stock.load_state_dict(start.state_dict())
    assert losses == pytest.approx(
        [stock(batch["pixel_values"].double(), noise=batch["noise"]).loss.item()] * 2, rel=1e-6
    )
    trainer.model = trainer.model_wrapped = start
    predicted = trainer.predict(trainer.train_dataset)
    assert predicted.label_ids.tolist() == list(range(32))
    np.testing.assert_allclose(predicted.predictions, expected.logits.detach(), atol=1e-6)


# ---- saved folders ----


def test_saved_folders_are_a_plain_students(tmp_path):
    """A teacher, a second view or a cache inside the checkpoint breaks everyone who loads it without hfkd."""
    trainer = image_rounds_trainer(tmp_path, {"num_rounds": 1})
    trainer.train()
    transformers.ViTMAEForPreTraining(tiny_vit_mae_config()).save_pretrained(tmp_path / "plain")
    expected = load_file(tmp_path / "plain" / "model.safetensors").keys()
    for folder in ("round-0", "round-1", "round-1/checkpoint-6", "start"):
        assert load_file(tmp_path / folder / "model.safetensors").keys() == expected
        config = json.loads((tmp_path / folder / "config.json").read_text())
        assert config["architectures"] == ["ViTMAEForPreTraining"] and config["norm_pix_loss"] is True
        assert (tmp_path / folder / "preprocessor_config.json").is_file()
    assert_same_weights(saved_model(tmp_path / "round-1").state_dict(), trainer.model.state_dict())
    classifier, report = transformers.ViTForImageClassification.from_pretrained(
        tmp_path / "round-1", num_labels=3, output_loading_info=True
    )
    assert set(report["missing_keys"]) == {"classifier.weight", "classifier.bias"} and not report["mismatched_keys"]
    pixels = torch.randn(2, 3, 16, 16)
    expected_states = trainer.model.eval()(pixels, clean=True).features
    torch.testing.assert_close(classifier.eval().vit(pixels).last_hidden_state, expected_states, rtol=0, atol=1e-6)
    again = two_view_model(str(tmp_path / "round-1"))
    assert_same_weights(again.state_dict(), trainer.model.state_dict())


def test_distance_to_the_start_is_the_norm_over_encoder_weights(tmp_path):
    """The paper's analysis is about the encoder; the decoder moves much more and would hide it."""
    trainer = image_rounds_trainer(tmp_path, {"num_rounds": 1})
    trainer.train()
    start = start_image_model().vit.state_dict()
    for done in trainer.finished_rounds():
        saved = saved_model(tmp_path / f"round-{done['round']}").vit.state_dict()
        squares = sum(((saved[name] - tensor).double() ** 2).sum().item() for name, tensor in start.items())
        assert done["distance_to_start"] == pytest.approx(squares**0.5, rel=1e-9)
        assert done["distance_to_start"] > 0


# ---- the paper's optimizer ----


def test_the_optimizer_of_the_paper_is_reached_by_arguments(tmp_path):
    """The Trainer clips and has other betas; LayerNorm that decays, or a CLS token that does not, is another recipe."""
    paper = {"learning_rate": 1.5e-4, "adam_beta2": 0.95, "weight_decay": 0.01}
    trainer = image_rounds_trainer(tmp_path, paper)
    assert trainer.args.max_grad_norm == 0 and trainer.args.warmup_steps == 0
    assert not trainer.args.dataloader_drop_last
    trainer.create_optimizer_and_scheduler(num_training_steps=10)
    decay = {id(p): group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]}
    for name, parameter in trainer.model.named_parameters():
        if name.endswith(("position_embeddings", "decoder_pos_embed")):
            assert id(parameter) not in decay
        else:  # timm's rule
            one_dimensional = parameter.ndim == 1 or name.endswith(".bias")
            assert decay[id(parameter)] == (0.0 if one_dimensional else 0.01), name
    tokens = [trainer.model.vit.embeddings.cls_token, trainer.model.decoder.mask_token]
    assert [decay[id(token)] for token in tokens] == [0.01, 0.01]
    assert isinstance(trainer.optimizer, torch.optim.AdamW)
    assert {group["betas"] for group in trainer.optimizer.param_groups} == {(0.9, 0.95)}
    share_of_rate = trainer.lr_scheduler.lr_lambdas[0]
    assert trainer.lr_scheduler.base_lrs == [1.5e-4, 1.5e-4]
    assert [share_of_rate(step) for step in range(10)] == pytest.approx([1 - step / 10 for step in range(10)])


# ---- what is refused ----


def test_refusals_of_rounds_over_images(tmp_path):
    """Each of these would be another method, or an error without a cause an hour later."""
    with pytest.raises(ValueError, match="draws no patches to hide"):
        image_rounds_trainer(tmp_path, {}, data_collator=ImageCollator(image_processor()))
    with pytest.raises(ValueError, match=r"images of \(32, 32\) in 64 patches, the model reads \(16, 16\) in 16"):
        image_rounds_trainer(tmp_path, {}, processing_class=image_processor(32))
    with pytest.raises(ValueError, match=r"in 4 patches, the model reads \(16, 16\) in 16"):
        image_rounds_trainer(tmp_path, {}, data_collator=MaskedImageCollator(image_processor(), 8))
    with pytest.raises(ValueError, match="'clean'.*two_view_model"):
        plain = transformers.ViTMAEForPreTraining(tiny_vit_mae_config())
        image_rounds_trainer(tmp_path, {}, model_init=None, model=plain)
    with pytest.raises(ValueError, match="a column image or pixels"):
        image_rounds_trainer(tmp_path, {}, train_dataset=image_rows().rename_column("pixels", "picture"))
    with pytest.raises(ValueError, match="matching must be one of"):
        image_rounds_trainer(tmp_path, {"matching": "logits"})
    with pytest.raises(ValueError, match="the tokenizer or the image processor"):
        image_rounds_trainer(tmp_path, {}, processing_class=None)


def test_options_for_images_are_refused_for_texts(tmp_path):
    """An option that is ignored without a word is an experiment that never happened."""
    from rounds_run import rounds_trainer

    for settings in ({"matching": "weights"}, {"cache_teacher_features": True}):
        with pytest.raises(ValueError, match="are for images"):
            rounds_trainer(tmp_path, settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_init": lambda: start_image_model(mask_ratio=0.5)}, "mask_ratio was 0.75, now 0.5"),
        ({"model_init": lambda: start_image_model(norm_pix_loss=False)}, "norm_pix_loss was True, now False"),
        ({"data_collator": "bright"}, r"image_mean was \[0.5, 0.5, 0.5\], now \[0.1, 0.5, 0.5\]"),
        ({"train_dataset": image_rows(seed=1)}, "rows was"),
        ({"settings": {"matching": "predictions"}}, "objective was"),
        ({"model_init": lambda: two_sizes(32), "processing_class": image_processor(32)}, r"image_size was \[16, 16\]"),
    ],
)
def test_resuming_with_other_images_or_masks_names_the_difference(tmp_path, change, message):
    """Rounds of two mask ratios or normalisations in one folder belong to no experiment."""
    settings = {"num_rounds": 0, "max_steps": 2}
    image_rounds_trainer(tmp_path, settings).train()
    change = dict(change)
    settings |= change.pop("settings", {})
    if change.get("data_collator") == "bright":
        processor = transformers.ViTImageProcessorPil(size={"height": 16, "width": 16}, image_mean=[0.1, 0.5, 0.5])
        change["data_collator"] = MaskedImageCollator(processor, 4, seed=42)
    with pytest.raises(ValueError, match=message):
        image_rounds_trainer(tmp_path, settings, **change).train(resume_from_checkpoint=True)


def two_sizes(size):
    torch.manual_seed(0)
    return ViTMAEForPreTraining(tiny_vit_mae_config(image_size=size, patch_size=size // 4))


def test_cards_name_the_objective_and_what_was_matched(tmp_path):
    """A card of the wrong loss is worse than none."""
    trainer = image_rounds_trainer(tmp_path, {"num_rounds": 1, "matching": "predictions"})
    trainer.train()
    texts = [(tmp_path / f"round-{number}" / "README.md").read_text() for number in (0, 1)]
    assert "`MaskedImages`" in texts[0] and "`SelfDistillImages`" in texts[1]
    assert "| matching | predictions |" in texts[1] and "fill-mask" not in texts[0] + texts[1]
    assert SelfDistillImages(matching="predictions").equation in texts[1]
    assert str(tmp_path) not in texts[1]


def test_an_own_objective_takes_the_place_of_the_rounds_own(tmp_path):
    """Whoever writes an objective for images must not lose its settings to those of the arguments."""
    trainer = image_rounds_trainer(tmp_path, QUICK, objective=SelfDistillImages("mean"))
    trainer.train()
    assert trainer.objective.feature == "mean"


# ---- resume after a kill = never killed ----


@pytest.mark.launch
@pytest.mark.parametrize("cached", [False, True])
def test_a_killed_run_goes_on_as_if_never_killed(tmp_path, cached):
    """SIGKILL in the middle of round 1. Files name ViT's weights otherwise than its modules do: the stock Trainer resumes
    with most weights at their start, and only warns."""
    settings = {"max_steps": 14, "save_steps": 3, "num_rounds": 2, "cache_teacher_features": cached}
    process = start_process(tmp_path / "killed", settings, "--images")
    marker = tmp_path / "killed" / "round-1" / "checkpoint-6" / "whole.json"
    deadline = time.monotonic() + 120
    while not marker.exists() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    process.join()
    assert marker.exists() and not (tmp_path / "killed" / "round-2" / "done.json").exists()
    done_before = (tmp_path / "killed" / "round-0" / "done.json").stat().st_mtime_ns

    image_rounds_trainer(tmp_path / "killed", settings).train(resume_from_checkpoint=True)
    image_rounds_trainer(tmp_path / "never", settings).train()
    assert (tmp_path / "killed" / "round-0" / "done.json").stat().st_mtime_ns == done_before
    for number in range(3):
        folders = [tmp_path / run / f"round-{number}" / "model.safetensors" for run in ("killed", "never")]
        assert_same_weights(load_file(folders[0]), load_file(folders[1]))


def test_a_finished_run_resumes_to_the_weights_of_its_last_round(tmp_path):
    """Returning an untrained model after a resume is worse than training again."""
    first = image_rounds_trainer(tmp_path, QUICK)
    first.train()
    again = image_rounds_trainer(tmp_path, QUICK)
    again.train(resume_from_checkpoint=True)
    assert_same_weights(again.model.state_dict(), first.model.state_dict())


# ---- two processes = one process ----


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    output = tmp_path_factory.mktemp("two")
    done = launching.run(HERE / "two_processes_mae.py", str(output), log=output / "log", processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(output / f"rank-{rank}.pt") for rank in (0, 1)]


@pytest.mark.launch
@pytest.mark.parametrize("run", [*RUNS, "accumulated"])
def test_two_processes_equal_one(ranks, run, tmp_path):
    """Unsynchronised gradients let the ranks drift apart, and rank 0's drift is what gets saved."""
    assert [rank["world_size"] for rank in ranks] == [2, 2]
    assert not set(ranks[0]["first_ids"].tolist()) & set(ranks[1]["first_ids"].tolist())
    assert_same_weights(ranks[0][run], ranks[1][run])
    alone = image_rounds_trainer(tmp_path, {**QUICK, **RUNS.get(run, {})}, double=True)
    alone.train()
    assert_same_weights(ranks[0][run], alone.model.state_dict(), 1e-6 if run == "cached" else 1e-9)


def test_a_mask_ratio_that_was_changed_in_memory_is_checked(tmp_path):
    """A model that sees no patch at all trains on: it learns the mean picture, and no error says so."""

    def blind():
        model = start_image_model()
        model.config.mask_ratio = 1.0
        return model

    with pytest.raises(ValueError, match="mask_ratio 1.0 leaves 0 of 16"):
        image_rounds_trainer(tmp_path, QUICK, model_init=blind)
