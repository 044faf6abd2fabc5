"""The vision recipe as its users start it: a folder of images, embedded digits, wrong inputs, killed, on two processes."""

import csv
import importlib
import json
import re
import shutil
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, ViTImageProcessorPil

import image_hub
import launching
from hfkd.models.two_view import two_view_model
from hfkd.models.two_view_mae import ViTMAEForPreTraining
from hfkd.testing import tiny_roberta_config, tiny_vit_mae_config

ROOT = Path(__file__).resolve().parents[1]
RECIPES, CONFIGS = ROOT / "recipes", ROOT / "recipes" / "configs"
RECIPE = RECIPES / "self_distill_vit.py"
MOODS = ("calm", "glad", "sad")


@pytest.fixture(scope="module")
def recipe():
    sys.path.insert(0, str(RECIPES))
    yield importlib.import_module("self_distill_vit")
    sys.path.remove(str(RECIPES))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A tiny ViT-MAE with its processor, and folders of generated pictures, grey and colour, as a user would bring them."""
    folder = tmp_path_factory.mktemp("inputs")
    torch.manual_seed(0)
    # As facebook/vit-mae-base: its configuration says norm_pix_loss false, and the paper's rounds say true
    ViTMAEForPreTraining(tiny_vit_mae_config(num_hidden_layers=1, norm_pix_loss=False)).save_pretrained(
        folder / "model"
    )
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder / "model")
    generator = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 4)):
        for number, mood in enumerate(MOODS):
            (folder / "images" / split / mood).mkdir(parents=True)
            for picture in range(count):
                pixels = generator.integers(0, 256, (20, 18) if picture == 0 else (20, 18, 3)) // (number + 1)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / split / mood / f"{picture}.png")
    return folder


def flags(inputs, output, **changes):
    values = {
        "model_name_or_path": inputs / "model",
        "data_dir": inputs / "images",
        "output_dir": output,
        "max_steps": 2,
        "per_device_train_batch_size": 8,
        "fine_tuning_batch_size": 8,
        "fine_tuning_seeds": 2,
        "learning_rate": 1e-3,
        "dataloader_num_workers": 0,
        "logging_steps": 1,
        "disable_tqdm": True,
        **changes,
    }
    words = []
    for name, value in values.items():
        words += [] if value is None else [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def run(recipe, words):
    recipe.run(*recipe.prepare(list(map(str, words))))


def rows_of(folder):
    return list(csv.DictReader((folder / "results.csv").open()))


def weights(folder):
    return load_file(folder / "model.safetensors")


def test_own_folder_from_images_to_a_fine_tuned_student(recipe, inputs, tmp_path, capsys):
    """The one command people come for: if an image, a label or a stage is lost on the way, the table says nothing."""
    out = tmp_path / "run"
    # gamma x learning rate below 1, or RecAdam diverges and says so
    words = flags(inputs, out, baseline=["recadam", "mars", "r3f"], recadam_gamma=10, ablation_steps=[1])
    words += ["--ablation_no_pretrain_loss", "--ablation_matching", "predictions", "weights"]
    words += ["--labelled_rows", "12", "6", "--pretraining_seeds", "2"]
    run(recipe, words)
    table = (out / "results.md").read_text()
    stages = ["start", "further pre-trained", "self-distilled 1", "further pre-trained, 1 steps", "no masked loss"]
    stages += ["matching predictions", "matching weights", "start, recadam", "start, mars", "start, r3f"]
    for stage in stages:
        assert f"| {stage} |" in table and f"| {stage} |" in (out / "seconds.md").read_text()
    assert "2 runs of all rounds" in table and "run s modulo 2" in table
    rows = rows_of(out)
    assert len(rows) == len(stages) * 2 + 3 * 2, "all stages with 12 labels, the rounds' stages with 6 as well"
    assert {row["labelled_rows"] for row in rows} == {"12", "6"}
    assert {(row["seed"], row["pretraining_seed"]) for row in rows} == {("0", "0"), ("1", "1")}
    labels = (out / "labels.md").read_text()
    assert "| 6 | 12 |" in labels and "self-distilled 1 - further pre-trained" in labels
    model = AutoModelForImageClassification.from_pretrained(out / "fine_tuned" / "round-1")
    assert model.config.id2label == dict(enumerate(MOODS)) and model.config.hidden_dropout_prob == 0.1
    for name in ("losses", "distances", "scores", "gaps", "steps", "labels", "reconstructions"):
        assert (out / "figures" / f"{name}.png").stat().st_size > 4000
    for name, said in (
        ("round-1", "ViTModel.from_pretrained"),
        ("fine_tuned/round-1", "AutoModelForImageClassification"),
    ):
        card = (out / name / "README.md").read_text()
        assert "self-distilled 1" in card and said in card and str(tmp_path) not in card
        assert "task:\n      type: image-classification" in card and "| mask_ratio | 0.75 |" in card
        run_snippets(card, out / name, inputs / "images" / "test" / "sad" / "0.png")
    printed = capsys.readouterr().out
    assert table.strip() in printed and "fine_tuned" in printed

    # resumed: nothing is trained again but what is missing
    seed, other = (out / "fine_tuning" / "start" / f"seed-{number}.json" for number in (1, 0))
    kept = [other, *(out.glob("**/round-*/model.safetensors"))]
    assert len(kept) > 8
    before, times = json.loads(seed.read_text()), [path.stat().st_mtime_ns for path in kept]
    seed.unlink()
    run(recipe, [*words, "--resume_from_checkpoint", "True"])
    assert json.loads(seed.read_text()) == before
    assert [path.stat().st_mtime_ns for path in kept] == times
    assert (out / "results.md").read_text() == table

    # other settings are not averaged into the same row
    with pytest.raises(ValueError, match="fine_tuning_warmup_steps"):
        run(recipe, [*words, "--resume_from_checkpoint", "True", "--fine_tuning_warmup_steps", "1"])
    with pytest.raises(ValueError, match="flip"):
        run(recipe, [*words, "--resume_from_checkpoint", "True", "--flip", "0.25"])
    # another run does not touch it, unless it is told to, and all its inputs are right
    with pytest.raises(FileExistsError, match="--overwrite"):
        run(recipe, words)
    for wrong in ({"mask_ratio": 0.99}, {"num_rounds": -1}, {"label_smoothing_factor": 0.1}):
        with pytest.raises(ValueError):
            run(recipe, [*flags(inputs, out, **wrong), "--overwrite"])
    assert seed.exists()
    run(recipe, [*flags(inputs, out, fine_tuning_seeds=0), "--overwrite"])
    assert not seed.exists() and not (out / "pretraining-seed-1").exists()


def run_snippets(card, folder, image):
    """The snippets are the first thing that a reader copies; AutoModel would load an encoder that hides most patches."""
    snippets = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert snippets
    for code in snippets:
        names = {}
        exec(code.replace("path/to/this/folder", str(folder)).replace("image.png", str(image)), names)
        assert "features" not in names or names["features"].shape == (1, 32)


def test_zero_rounds_are_the_baseline(recipe, inputs, tmp_path):
    """Plain further pre-training that differs from round 0 would make every comparison one of two things at once."""
    run(recipe, flags(inputs, tmp_path / "none", num_rounds=0))
    run(recipe, flags(inputs, tmp_path / "one", fine_tuning_seeds=0))
    assert not (tmp_path / "none" / "round-1").exists()
    plain, first = (weights(tmp_path / name / "round-0") for name in ("none", "one"))
    assert all(torch.equal(plain[name], first[name]) for name in first)
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "none" / "fine_tuned" / "round-0")
    assert "self-distilled" not in (tmp_path / "none" / "results.md").read_text()


def test_seeds_are_whole_runs(recipe, inputs, tmp_path):
    """Fine-tuning seeds that share one encoder, or one draw of images, show a spread that is too small."""
    words = flags(
        inputs, tmp_path / "run", pretraining_seeds=2, fine_tuning_seeds=3, unlabelled_rows=9, labelled_rows=[9]
    )
    recipe_arguments, args, pictures, written = recipe.prepare(words)
    drawn = [pictures.of_seed(recipe_arguments, number)["example_id"][:] for number in (0, 1)]
    assert [len(ids) for ids in drawn] == [9, 9] and set(drawn[0]) != set(drawn[1])
    recipe.run(recipe_arguments, args, pictures, written)
    encoders = [tmp_path / "run" / "round-1", tmp_path / "run" / "pretraining-seed-1" / "round-1"]
    assert not torch.equal(*(next(iter(weights(folder).values())) for folder in encoders))
    records = [json.loads((folder.parent / "rounds.json").read_text()) for folder in encoders]
    for name in ("seed", "data_seed"):
        assert records[1][name] == records[0][name] + 1, "the same order and masks for other images are half a run"
    hashes = []
    for seed in range(3):
        saved = json.loads((tmp_path / "run" / "fine_tuning" / "self-distilled-1" / f"seed-{seed}.json").read_text())
        hashes.append(saved["settings"]["weights"])
    assert hashes[0] == hashes[2] != hashes[1]
    assert "intervals are too narrow" in (tmp_path / "run" / "results.md").read_text()


def test_cached_answers_are_the_teachers(recipe, inputs, tmp_path):
    """A kept answer that differs from the asked one trains another student, whatever time it saves."""
    for name, cached in (("kept", True), ("asked", False)):
        run(recipe, flags(inputs, tmp_path / name, fine_tuning_seeds=0, max_steps=4, cache_teacher_features=cached))
    kept, asked = (weights(tmp_path / name / "round-1") for name in ("kept", "asked"))
    assert all(torch.allclose(kept[name], asked[name], rtol=0, atol=1e-6) for name in asked)
    _, args = recipe.parse(flags(inputs, tmp_path / "any"))
    assert args.cache_teacher_features and recipe.caching_is_equal(args), "on where nothing else is said"
    for wrong in ({"matching": "predictions"}, {"feature": "tokens"}, {"bf16": True}):
        _, args = recipe.parse(flags(inputs, tmp_path / "any", **wrong))
        assert not recipe.caching_is_equal(args), wrong


# ---- the paper's settings ----


def test_the_paper_profile_has_the_papers_numbers(recipe, inputs, tmp_path):
    """A default of ours in the place of a published number runs another experiment under the paper's name."""
    found, args = recipe.parse(["--data_dir", str(inputs / "images"), "--output_dir", str(tmp_path)])
    assert (found.profile, found.model_name_or_path) == ("paper", "facebook/vit-mae-base")
    assert (found.mask_ratio, found.pretrain_steps, args.per_device_train_batch_size) == (0.75, 20_000, 64)
    assert (args.learning_rate, args.adam_beta1, args.adam_beta2, args.weight_decay) == (1.5e-4, 0.9, 0.95, 0.01)
    assert (args.lr_scheduler_type, args.warmup_steps, args.max_grad_norm) == ("linear", 0, 0.0)
    assert not args.dataloader_drop_last and (args.num_rounds, args.feature, args.matching) == (1, "cls", "features")
    assert (found.fine_tuning_steps, found.fine_tuning_warmup_steps, found.fine_tuning_batch_size) == (10_000, 500, 32)
    assert (found.fine_tuning_learning_rate, found.flip, found.crop, found.fine_tuning_seeds) == (1e-4, 0.5, None, 5)


def test_both_optimizers_are_those_of_the_authors_code(recipe, inputs, tmp_path):
    """Decayed biases or a trained position embedding are small, silent and in every number."""
    words = flags(inputs, tmp_path / "run", max_steps=None)
    recipe_arguments, args, pictures, _ = recipe.prepare(words)
    trainer = recipe.rounds_trainer(recipe_arguments, args, str(inputs / "model"), pictures, 0, tmp_path / "run")
    assert trainer.model.config.norm_pix_loss, "the paper's target, whatever the checkpoint's configuration says"
    decayed, names = decayed_names(trainer.create_optimizer(), trainer.model)
    assert decayed == {name for name, p in trainer.model.named_parameters() if p.ndim > 1 and "pos" not in name}
    assert not any("pos" in name for name in names), "position embeddings are frozen"
    assert {"vit.embeddings.cls_token", "decoder.mask_token"} <= decayed

    tuning = recipe.FineTuning(
        recipe_arguments, args, recipe.labelled_images(recipe_arguments, args, pictures), "start"
    )
    model = tuning.labelled.load(inputs / "model", tuning.labelled.labels(), noisy=False)
    assert model.config.hidden_dropout_prob == 0.1 and model.config.attention_probs_dropout_prob == 0.0
    optimizer = tuning.optimizer(model, "none")
    decayed, names = decayed_names(optimizer, model)
    assert names == {name for name, _ in model.named_parameters()} and "vit.embeddings.position_embeddings" in names
    assert decayed == {name for name in names if name.endswith("weight")} and "vit.layernorm.weight" in decayed
    assert all(group["betas"] == (0.9, 0.999) and group["lr"] == 1e-4 for group in optimizer.param_groups)
    settings = tuning.arguments(tmp_path, seed=3)
    assert (settings.max_grad_norm, settings.max_steps, settings.warmup_steps) == (1.0, 10_000, 500)
    assert (settings.lr_scheduler_type, settings.seed) == ("linear", 3)


def decayed_names(optimizer, model):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = optimizer.param_groups
    decayed = {names[id(p)] for group in groups if group["weight_decay"] == 0.01 for p in group["params"]}
    assert {group["weight_decay"] for group in groups} == {0.01, 0.0}
    return decayed, {names[id(p)] for group in groups for p in group["params"]}


def test_rounds_see_plain_images_and_fine_tuning_mirrored_ones(recipe, inputs, tmp_path):
    """The authors augment in fine-tuning alone; and a mirror image that is the same for every seed is none."""
    recipe_arguments, args, pictures, _ = recipe.prepare(flags(inputs, tmp_path / "run"))
    trainer = recipe.rounds_trainer(recipe_arguments, args, str(inputs / "model"), pictures, 0, tmp_path / "run")
    rows = [trainer.train_dataset[row] for row in range(16)]
    assert "label" not in rows[0]
    plain = trainer.data_collator.on_device(trainer.data_collator(rows))["pixel_values"]
    labelled = recipe.labelled_images(recipe_arguments, args, pictures)
    mirrored = []
    for seed in (0, 1):
        collator = labelled.collator(seed)
        shown = collator.on_device(collator(rows))["pixel_values"]
        flipped = [bool(torch.equal(shown[i], plain[i].flip(-1))) for i in range(16)]
        assert all(flip or torch.equal(shown[i], plain[i]) for i, flip in enumerate(flipped))
        assert 2 < sum(flipped) < 14
        mirrored.append(flipped)
    assert mirrored[0] != mirrored[1]
    held_out = labelled.collator(0).for_evaluation()
    assert torch.equal(held_out.on_device(held_out(rows))["pixel_values"], plain)


def test_reconstructions_are_on_the_scale_of_the_image(recipe, inputs):
    """A picture of normalised guesses pasted beside pixels shows grey noise, and says that a good model is a bad one."""
    module = importlib.import_module("reconstructions")
    torch.manual_seed(0)
    model = two_view_model(str(inputs / "model"), norm_pix_loss=True).double()
    pixels = torch.randn(2, 3, 16, 16, dtype=torch.float64) * 3 + 1
    noise = torch.rand(2, 16).argsort(1) / 16
    targets = torch.zeros(2, 16, 48, dtype=torch.float64)
    for picture in range(2):
        for number in range(16):
            top, left = 4 * (number // 4), 4 * (number % 4)
            patch = pixels[picture, :, top : top + 4, left : left + 4].permute(1, 2, 0).flatten()
            targets[picture, number] = (patch - patch.mean()) / (patch.var() + 1e-6) ** 0.5

    class Perfect(torch.nn.Module):
        config, unpatchify = model.config, model.unpatchify

        def forward(self, pixel_values, noise):
            answer = model(pixel_values, noise=noise)
            answer["logits"] = targets
            return answer

    seen, filled = module.reconstruction(Perfect(), pixels, noise)
    torch.testing.assert_close(filled, pixels, rtol=0, atol=1e-10)
    hidden = torch.isnan(seen)
    assert torch.equal(seen[~hidden], pixels[~hidden]) and int(hidden.sum()) == 2 * 12 * 48
    assert hidden[0, :, :4, :4].all() == (noise[0, 0] * 16 >= 4), "the lowest stay visible"
    pictures = module.as_pictures(torch.zeros(1, 3, 2, 2), (0.25, 0.5, 0.75), (0.5, 0.5, 0.5))
    assert pictures.shape == (1, 2, 2, 3) and pictures[0, 0, 0].tolist() == [0.25, 0.5, 0.75]


# ---- wrong inputs ----


def bad_image(folder):
    (folder / "train" / "glad" / "3.png").write_bytes(b"\x89PNG\r\n\x1a\n cut short")


def other_classes(folder):
    (folder / "test" / "sad").rename(folder / "test" / "gloomy")


WRONG = {
    "mask ratio": ({"mask_ratio": 0.99}, ValueError, r"mask_ratio 0.99 leaves 0 of 16 patches"),
    "mask ratio of the own start": ({"mask_ratio": 0.0, "model_name_or_path": None}, ValueError, "leaves 16 of 16"),
    "image size": ({"image_size": 30, "model_name_or_path": None}, ValueError, "image_size 30 is not a multiple of"),
    "another image size": ({"image_size": 32}, ValueError, "--image_size 32, and .* reads 16"),
    "baseline": ({"baseline": ["dropout"]}, ValueError, "recadam, mars, r3f"),
    "profile": ({"profile": "huge"}, ValueError, "demo, study or paper"),
    "matching": ({"ablation_matching": ["features"]}, ValueError, "choose among predictions, weights"),
    "labels": ({"labelled_rows": [500], "max_steps": None}, ValueError, "500 rows .* only 24"),
    "too few labels": ({"labelled_rows": [2]}, ValueError, "cannot show all 3 classes"),
    "labels beyond the rounds'": (
        {"labelled_rows": [9], "unlabelled_rows": 6},
        ValueError,
        "9 with --unlabelled_rows 6",
    ),
    "runs": ({"pretraining_seeds": 3}, ValueError, "--pretraining_seeds 3 with --fine_tuning_seeds 2"),
    "steps": ({"ablation_steps": [0]}, ValueError, "steps must be 1 or more"),
    "resume": ({"resume_from_checkpoint": "round-0"}, ValueError, "takes True"),
    "folder": ({"data_dir": "nowhere"}, FileNotFoundError, "nowhere"),
    "hub id": ({"model_name_or_path": "no-such/model"}, OSError, "no-such/model"),
    "split": ({"evaluate_on": "dev"}, ValueError, "no dev split"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_inputs_say_what_to_do(recipe, inputs, tmp_path, case):
    """An error an hour into the run, or one that names a tensor shape, sends people back to copied snippets."""
    changes, kind, message = WRONG[case]
    own_start = {"profile": "demo"} if "model_name_or_path" in changes and "no-such" not in message else {}
    words = flags(inputs, tmp_path / "run", **own_start, **changes)
    with pytest.raises(kind, match=f"(?s){message}"):
        recipe.prepare(words)
    assert not list((tmp_path / "run").glob("*")), "an early error leaves nothing behind"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (bad_image, r"1 of 36 images cannot be read: .*glad.3\.png"),
        (other_classes, r"\['sad'\] are missing, \['gloomy'\] are unknown"),
    ],
)
def test_wrong_folders_are_named(recipe, inputs, tmp_path, damage, message):
    """One broken file among thousands, or a misspelt class, must be found before the start weights are even loaded."""
    shutil.copytree(inputs / "images", tmp_path / "images")
    damage(tmp_path / "images")
    with pytest.raises(ValueError, match=f"(?s){message}"):
        recipe.prepare(flags(inputs, tmp_path / "run", data_dir=tmp_path / "images", max_steps=None))


def test_wrong_start_weights_are_named(recipe, inputs, tmp_path):
    """A text model, or a model that nobody knows how to show images to, would fail in the first batch."""
    from hfkd.models.two_view import RobertaForMaskedLM

    RobertaForMaskedLM(tiny_roberta_config()).save_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match="'roberta' model: a ViT-MAE"):
        recipe.prepare(flags(inputs, tmp_path / "run", model_name_or_path=tmp_path / "text"))
    shutil.copytree(inputs / "model", tmp_path / "blind")
    (tmp_path / "blind" / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match="no image processor"):
        recipe.prepare(flags(inputs, tmp_path / "run", model_name_or_path=tmp_path / "blind"))
    shutil.copytree(inputs / "model", tmp_path / "odd")
    config = json.loads((tmp_path / "odd" / "config.json").read_text())
    (tmp_path / "odd" / "config.json").write_text(json.dumps({**config, "patch_size": 5}))
    with pytest.raises(ValueError, match="not a multiple of patch_size 5"):
        recipe.prepare(flags(inputs, tmp_path / "run", model_name_or_path=tmp_path / "odd"))


# ---- YAML files and embedded data ----


def test_embedded_digits_and_a_start_made_once(recipe, tmp_path, capsys):
    """The run without arguments, cut to one step a stage: real digits, no network; the start is not paid for twice."""
    words = ["--max_steps", "1", "--evaluation_rows", "16", "--disable_tqdm", "True", "--pretraining_seeds", "1"]
    words += ["--fine_tuning_seeds", "1", "--output_dir"]
    run(recipe, [*words, tmp_path / "demo"])
    printed = capsys.readouterr().out
    assert "smoke test" in printed and "Pre-training the start" in printed
    (start,) = (tmp_path / "cache").glob("vit-mae-mnist-1-*/round-0/model.safetensors")
    made = start.stat().st_mtime_ns
    run(recipe, [*words, tmp_path / "again"])
    assert "Pre-training the start" not in capsys.readouterr().out and start.stat().st_mtime_ns == made
    one, two = (weights(tmp_path / name / "round-1") for name in ("demo", "again"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert (tmp_path / "demo" / "results.md").read_text() == (tmp_path / "again" / "results.md").read_text()
    assert "mnist" in (tmp_path / "demo" / "round-1" / "README.md").read_text().lower()


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.glob("self_distill_vit_*.yaml")))
def test_every_yaml_runs_two_steps(recipe, inputs, tmp_path, monkeypatch, name):
    """A file with a key, task or column that is not there fails on the user's machine, after the download."""
    monkeypatch.setattr(datasets, "load_dataset", image_hub.load)
    written = yaml.safe_load((CONFIGS / name).read_text())
    words = ["--config", CONFIGS / name, "--model_name_or_path", inputs / "model", "--max_steps", "2"]
    words += ["--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "8", "--fine_tuning_seeds", "1"]
    words += ["--pretraining_seeds", "1", "--dataloader_num_workers", "0", "--disable_tqdm", "True"]
    words += [] if "task" in written else ["--task", "beans"]
    words += ["--recadam_gamma", "10", "--output_dir", tmp_path / "run"]
    run(recipe, words)
    assert "| self-distilled 1 |" in (tmp_path / "run" / "results.md").read_text()
    assert written["output_dir"].startswith("runs/"), "what a run writes is ignored by git"


def test_validation_rows_are_trained_on_where_nothing_is_chosen_by_them(recipe, inputs, tmp_path, monkeypatch):
    """The paper trains on all that is no test; but rows that settings are chosen by must stay unseen."""
    monkeypatch.setattr(datasets, "load_dataset", image_hub.load)
    words = flags(inputs, tmp_path / "run", data_dir=None, max_steps=None)
    for task, rows in (("beans", 16), ("cifar100", 8)):  # eight of each split; one split that is cut
        _, _, pictures, _ = recipe.prepare([*words, "--task", task])
        assert len(pictures.train) == len(set(pictures.train["example_id"])) == rows
    _, _, pictures, _ = recipe.prepare([*words, "--task", "beans", "--evaluate_on", "validation"])
    assert (len(pictures.train), len(pictures.held_out)) == (8, 8)


# ---- started as programs ----


def start(words, log, processes=1):
    done = launching.run(RECIPE, *map(str, words), log=log, processes=processes)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


@pytest.mark.launch
def test_a_killed_run_goes_on_with_what_is_missing(inputs, tmp_path):
    """Rounds of days are stopped by schedulers; a resume that starts over, or ends elsewhere, costs them all."""
    words = {"max_steps": 30, "save_strategy": "steps", "save_steps": 5, "fine_tuning_seeds": 1, "fine_tuning_steps": 2}
    whole, killed = (flags(inputs, tmp_path / name, **words) for name in ("whole", "killed"))
    start(whole, tmp_path / "log")
    (run,) = launching.started(RECIPE, *map(str, killed), log=tmp_path / "log")
    deadline = time.monotonic() + 300
    while not list((tmp_path / "killed" / "round-1").glob("checkpoint-*/whole*")):
        assert run.is_alive() and time.monotonic() < deadline, "it never came to a checkpoint of round 1"
        time.sleep(0.02)
    run.kill()
    run.join()
    assert not (tmp_path / "killed" / "round-1" / "done.json").exists(), "it was killed in the middle of round 1"
    first = (tmp_path / "killed" / "round-0" / "model.safetensors").stat().st_mtime_ns
    start([*killed, "--resume_from_checkpoint", "True"], tmp_path / "log")
    assert (tmp_path / "killed" / "round-0" / "model.safetensors").stat().st_mtime_ns == first
    for round in ("round-0", "round-1"):
        one, two = (weights(tmp_path / name / round) for name in ("whole", "killed"))
        assert all(torch.equal(one[name], two[name]) for name in one)
    assert (tmp_path / "whole" / "results.md").read_text() == (tmp_path / "killed" / "results.md").read_text()


@pytest.mark.launch
def test_two_processes_equal_one(inputs, tmp_path):
    """Two silent single-process runs, or a loss scaled by the number of processes, look fine until they are compared."""
    # Dropout is drawn by each process for its own rows
    same = {"fine_tuning_dropout": 0, "fine_tuning_warmup_steps": 0}
    start(flags(inputs, tmp_path / "one", **same), tmp_path / "log")
    printed = start(flags(inputs, tmp_path / "two", per_device_train_batch_size=4, **same), tmp_path / "log", 2)
    assert printed.count("| stage |") == 1, "only one process reports"
    for round in ("round-0", "round-1"):
        one, two = (weights(tmp_path / name / round) for name in ("one", "two"))
        for name, tensor in one.items():
            if not name.endswith("key.bias"):  # its gradient is rounding alone (softmax), which Adam makes a step of
                torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-6)
    for left, right in zip(rows_of(tmp_path / "one"), rows_of(tmp_path / "two"), strict=True):
        assert float(left["test_loss"]) == pytest.approx(float(right["test_loss"]), abs=1e-4)
