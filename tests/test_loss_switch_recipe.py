"""Switching the loss as its users start it: tiny networks on the 8 x 8 digits, and wrong inputs."""

import csv
import importlib
import json
import statistics
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from PIL import Image as Picture
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

ROOT = Path(__file__).resolve().parents[1]
RECIPES, CONFIGS = ROOT / "recipes", ROOT / "recipes" / "configs"
CIFAR100 = json.loads((Path(__file__).parent / "data" / "schemas" / "images.json").read_text())["cifar100"]
METHODS = ["kd", "kd_to_one_hot", "one_hot_to_kd"]


@pytest.fixture(scope="module")
def recipe():
    """The module, imported from the folder as the programs import each other."""
    sys.path.insert(0, str(RECIPES))
    yield importlib.import_module("loss_switch")
    sys.path.remove(str(RECIPES))


def flags(**values):
    words = []
    for name, value in values.items():
        words += [] if value is None else [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def tiny(output, **changes):
    values = {
        "task": "digits",
        "image_size": 8,
        "teacher_config": "resnet10-xxxs",
        "student_config": "resnet10-xxxs",
        "teacher_epochs": [12, 1],
        "output_dir": output,
        "seeds": 2,
        "temperature": 2,
        "alpha": 1,
        "window": 4,
        "train_rows": 64,
        "num_train_epochs": 4,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 64,
        "evaluation_rows": 128,
        "learning_rate": 0.05,
        "lr_scheduler_type": "cosine",
        "optim": "sgd",
        "disable_tqdm": True,
        **changes,
    }
    return flags(**values)


def per_seed(folder):
    return list(csv.DictReader((folder / "results.csv").open()))


@pytest.fixture(scope="module")
def study(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study") / "run"
    recipe.main(tiny(folder))
    return folder


def test_every_teacher_has_its_students_on_one_budget(study):
    """Another start, length or part of the data for one way of switching would be reported as its effect."""
    for seed in range(2):
        found = {
            path.parent.parent.name: json.loads(path.read_text())
            for path in (study / "runs").glob(f"*/seed-{seed}/settings.json")
        }
        expected = {"one_hot", "teacher-12", "teacher-1", *(f"{m}-{epochs}" for m in METHODS for epochs in (12, 1))}
        assert set(found) == expected
        one_hot = found.pop("one_hot")
        for name, other in found.items():
            differ = {key for key in one_hot if one_hot[key] != other[key]}
            mayhap = {"start", "num_train_epochs", "objective"} if "teacher" in name else {"objective", "teacher"}
            assert differ <= mayhap | {"teacher_dtype", "max_steps"}, name
        teachers = {name: found[name]["teacher"] for name in found if "teacher" not in name}
        assert len({teachers[f"{method}-12"] for method in METHODS}) == 1
        assert teachers["kd-12"] != teachers["kd-1"] and found["teacher-12"]["start"] != one_hot["start"]


def test_the_switch_goes_both_ways_in_the_middle(study):
    """Both directions under one name, or one of them twice, and the table's difference is noise."""
    for method, order in (("kd_to_one_hot", ("KD", "CrossEntropy")), ("one_hot_to_kd", ("CrossEntropy", "KD"))):
        objective = json.loads((study / f"runs/{method}-12/seed-0/settings.json").read_text())["objective"]
        assert objective.startswith("Switch(") and objective.index(order[0]) < objective.index(order[1])
        assert "'start': 8, 'window': 4" in objective and "'temperature': 2.0, 'alpha': 1.0" in objective


def test_students_differ_as_their_losses_do(study):
    """A switch that never happens is a second kd."""
    for epochs in (12, 1):
        found = [load_file(study / f"runs/{m}-{epochs}/seed-0/logits.safetensors")["logits"] for m in METHODS]
        found.append(load_file(study / "runs/one_hot/seed-0/logits.safetensors")["logits"])
        distances = [(one - other).abs().max() for i, one in enumerate(found) for other in found[:i]]
        assert min(distances) > 1e-2


def test_train_accuracy_is_recounted_and_decides_what_interpolates(study):
    """A teacher said to interpolate that does not turns the paper's claim round."""
    source, rows = importlib.import_module("hfkd.data.embedded").digits(), per_seed(study)
    model = AutoModelForImageClassification.from_pretrained(study / "runs/teacher-12/seed-0/model").eval()
    trained = [row for row in rows if row["run"] == "teacher-12" and row["seed"] == "0"]
    logits = load_file(study / "runs/teacher-12/seed-0/logits.safetensors")
    assert len(logits["train_logits"]) == 64
    right = 0
    splits = importlib.import_module("hfkd.data.images").load_images("digits")["train"]
    chosen = sorted(np.random.default_rng(0).choice(len(splits), 64, replace=False).tolist())
    for number in splits.select(chosen)["example_id"][:]:
        pixels = np.repeat(np.asarray(source[number]["image"])[None], 3, axis=0) / 255
        shown = torch.tensor((pixels - 0.5) / 0.5, dtype=torch.float32)[None]
        with torch.no_grad():
            right += int(model(shown).logits.argmax()) == source[number]["label"]
    assert float(trained[0]["train_accuracy"]) == pytest.approx(right / 64)
    for line, epochs in zip((study / "results.md").read_text().splitlines()[-2:], ("12", "1"), strict=True):
        found = [float(row["train_accuracy"]) for row in rows if row["run"] == f"teacher-{epochs}"]
        assert line.startswith(f"Teacher of {epochs} epochs") and f"(%): {100 * statistics.mean(found):.2f} [" in line


def test_one_seed_that_does_not_interpolate_is_enough(recipe):
    """A mean of 99 % over seeds may hide one teacher that never fitted its labels."""
    for right, said in (((1.0, 0.99), "It interpolates"), ((1.0, 0.985), "It does not interpolate")):
        rows = [{"method": "teacher", "teacher_epochs": 3.0, "train_accuracy": value} for value in right]
        (line,) = recipe.teachers_said(rows, [3.0])
        assert said in line


def test_the_table_equals_the_per_seed_csv(study):
    """A difference to another teacher's student, or one that is not paired by seed, is a claim the data do not make."""
    rows, text = per_seed(study), (study / "results.md").read_text()
    accuracy = {(row["method"], row["teacher_epochs"], row["seed"]): 100 * float(row["accuracy"]) for row in rows}
    found = {}
    for line in text.split("\n\n")[0].splitlines()[2:]:
        epochs, method, *cells = line.strip("| ").split(" | ")
        found[method, epochs] = [cell.split(" [")[0] for cell in cells]
    for epochs in ("12", "1"):
        for method in METHODS:
            values = [accuracy[method, f"{epochs}.0", seed] for seed in "01"]
            others = {"one_hot": [accuracy["one_hot", "", s] for s in "01"]}
            others["kd"] = [accuracy["kd", f"{epochs}.0", s] for s in "01"]
            cells = found[method, epochs]
            assert float(cells[0]) == pytest.approx(statistics.mean(values), abs=0.006)
            assert float(cells[1]) == pytest.approx(
                statistics.mean(values) - statistics.mean(others["one_hot"]), abs=0.006
            )
            if method != "kd":
                assert float(cells[2]) == pytest.approx(
                    statistics.mean(values) - statistics.mean(others["kd"]), abs=0.006
                )
    assert len(found) == 1 + 2 * 4 and (study / "scores.png").stat().st_size > 10_000


def test_a_resumed_study_trains_only_what_is_missing(recipe, tmp_path):
    """Hours are paid twice, or runs of two windows are averaged into one row."""
    words = tiny(tmp_path / "run", seeds=1, teacher_epochs=1)
    recipe.main(words)
    gone = tmp_path / "run/runs/one_hot_to_kd-1/seed-0/result.json"
    before, others = json.loads(gone.read_text()), {}
    for path in (tmp_path / "run").rglob("result.json"):
        others |= {path: path.stat().st_mtime_ns} if path != gone else {}
    gone.unlink()
    with pytest.raises(FileExistsError, match="--resume_from_checkpoint True"):
        recipe.main(words)
    recipe.main([*words, "--resume_from_checkpoint", "True"])
    after = json.loads(gone.read_text())
    costs = {"seconds_per_step", "peak_mib"}
    assert {n: after[n] for n in before.keys() - costs} == {n: before[n] for n in before.keys() - costs}
    assert {path: path.stat().st_mtime_ns for path in others} == others and len(others) == 4
    with pytest.raises(ValueError, match=r"(?s)made with other settings.*'window': 2"):
        recipe.main([*words, "--resume_from_checkpoint", "True", "--window", "2"])


def test_with_augmentation_the_teacher_is_asked_in_every_step(recipe, tmp_path):
    """Cached answers to images that the student does not see; a train accuracy that is not that of what is learned."""
    recipe.main(tiny(tmp_path / "run", seeds=1, teacher_epochs=12, crop="pad", padding=2))
    assert not (tmp_path / "run" / "teacher_answers").exists()
    (row,) = (row for row in per_seed(tmp_path / "run") if row["method"] == "teacher")
    assert row["train_accuracy_augmented"] != row["train_accuracy"]
    assert "as augmented" in (tmp_path / "run" / "results.md").read_text()
    recipe.main(
        tiny(tmp_path / "same", seeds=1, teacher_epochs=12, crop="pad", padding=0)
    )  # drawn, but the same pixels
    (row,) = (row for row in per_seed(tmp_path / "same") if row["method"] == "teacher")
    assert row["train_accuracy_augmented"] == row["train_accuracy"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 9}, r"window of 9 steps ends at step 17, but training has 16 steps"),
        ({"switch_at": 1}, r"begins at step 16.*training has 16 steps"),
        ({"max_steps": 2}, r"window of 4 steps ends at step 5, but training has 2 steps"),
        ({"switch_at": 1.5}, r"--switch_at is a share of training"),
        ({"window": -1}, r"window is a whole number"),
        ({"seeds": 0}, r"--seeds must be 1 or more"),
        ({"teacher_epochs": [3, 3]}, r"names a teacher twice"),
        ({"teacher_epochs": [3, 0]}, r"numbers above 0"),
        ({"alpha": 0}, r"teacher's logits, and KD\(.*'alpha': 0.0.* is neither"),
        ({"objective": "ada_alpha"}, r"AdaAlpha, learns alpha_"),
        ({"student_config": "resnet20000"}, r"there is no network 'resnet20000'"),
        ({"profile": "long"}, r"choose demo, study or task"),
    ],
)
def test_wrong_inputs_are_refused_before_training(recipe, tmp_path, changes, message):
    """A study that stops after its teachers has cost what it was to save."""
    with pytest.raises((ValueError, OSError), match=message):
        recipe.prepare(tiny(tmp_path / "run", **changes))
    assert not (tmp_path / "run" / "runs").exists()


def stored(path, name=None):
    """CIFAR-100 as the Hub has it, two images of every class: 8 x 8 noise."""
    assert path == CIFAR100["path"]
    names = [f"class {number:03d}" for number in range(100)]
    features = Features({CIFAR100["image"]: Image(), CIFAR100["label"]: ClassLabel(names=names)})
    picture = Picture.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    columns = {CIFAR100["image"]: [picture] * 200, CIFAR100["label"]: [*range(100)] * 2}
    return DatasetDict({split: Dataset.from_dict(columns, features=features) for split in CIFAR100["splits"]})


@pytest.mark.parametrize("name", ["demo", "study", "task", "cifar100"])
def test_every_yaml_runs_two_steps(recipe, monkeypatch, tmp_path, name):
    """A paper's setting with a misspelt key is found out on the GPU that was rented for it."""
    monkeypatch.setattr(datasets, "load_dataset", stored)
    given = yaml.safe_load((CONFIGS / f"loss_switch_{name}.yaml").read_text())
    small = {"teacher_config": "resnet10-xxxs", "student_config": "resnet10-xxxs", "image_size": 8}
    bounds = {"max_steps": 2, "window": 0, "per_device_train_batch_size": 16, "per_device_eval_batch_size": 64}
    changes = {**small, **bounds, "seeds": 1, "output_dir": tmp_path / "run", "disable_tqdm": True}
    changes |= {"task": "digits"} if name == "task" else {}
    changes |= {"teacher_epochs": given["teacher_epochs"][-1]}
    recipe.main(flags(config=CONFIGS / f"loss_switch_{name}.yaml", **changes))
    rows = per_seed(tmp_path / "run")
    assert [row["method"] for row in rows] == ["one_hot", "teacher", *METHODS] and all(
        int(row["steps"]) <= 2 for row in rows
    )


def test_without_arguments_it_is_the_offline_demo(recipe, tmp_path, monkeypatch):
    """The first thing that people try must neither reach for a network nor last an hour."""
    monkeypatch.chdir(tmp_path)
    found, args, study = recipe.prepare([])
    assert (found.profile, found.task, found.seeds, study.steps) == ("demo", "mnist_5k", 1, 480)
    assert found.teacher_epochs == [15, 2] and study.objectives()["kd_to_one_hot"].start == 240
    assert args.alpha == 1
