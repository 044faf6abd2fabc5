"""recipes/deviations.py as its users start it: a noisy image setting and a text setting with tiny networks, wrong inputs, and
the paper's YAML files."""

import csv
import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file
from scipy import stats
from transformers import RobertaModel

from hfkd import DistillationArguments
from hfkd.diagnostics.logit_logit import logit_of_class
from hfkd.testing import tiny_roberta_config, tiny_tokenizer
from hfkd.trainers.arguments import parse_arguments

ROOT = Path(__file__).resolve().parents[1]
RECIPES, CONFIGS = ROOT / "recipes", ROOT / "recipes" / "configs"
RUNS = ("teacher", "one_hot", "kd", "control")
PAPER_IMAGES = ["cifar10", "cifar100", "cifar100_small", "cifar100_noisy", "tiny_imagenet", "imagenet"]
IMAGE = {
    "task": "digits",
    "noise_rate": 0.25,
    "image_size": 8,
    "teacher_config": "resnet10-xxxs",
    "student_config": "resnet10-xxxs",
    "temperature": 4.0,
    "alpha": 1.0,
    "learning_rate": 0.05,
    "per_device_train_batch_size": 20,
    "per_device_eval_batch_size": 40,
    "save_strategy": "no",
}


@pytest.fixture(scope="module")
def recipes():
    """The modules by name, imported from the folder as the programs import each other."""
    sys.path.insert(0, str(RECIPES))
    yield {name: importlib.import_module(name) for name in ("deviation_study", "deviations")}
    sys.path.remove(str(RECIPES))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Two settings, and the text setting's model and files."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    RobertaModel(tiny_roberta_config(num_hidden_layers=1)).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    for name, count in (("train", 24), ("test", 24)):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            writer.writerows([f"w{5 + i % 40} w{5 + 7 * i % 40}", ("bad", "good")[i % 2]] for i in range(count))
    text = {"train_file": str(folder / "train.csv"), "test_file": str(folder / "test.csv"), "modality": "text"}
    text |= {"teacher_start": str(folder / "model"), "student": str(folder / "model"), "max_length": 16}
    text |= {"objective_kwargs": {"temperature_on": "teacher"}, "temperature": 3.0, "save_strategy": "no"}
    (folder / "words.yaml").write_text(yaml.safe_dump(text))
    (folder / "deviations_digits.yaml").write_text(yaml.safe_dump(IMAGE))
    return folder


def flags(**values):
    words = []
    for name, value in values.items():
        words += [] if value is None else [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def both(tiny, output, **changes):
    values = {
        "settings": [tiny / "deviations_digits.yaml", tiny / "words.yaml"],
        "seeds": 2,
        "bootstrap": 50,
        "output_dir": output,
        "max_steps": 3,
        "disable_tqdm": True,
        **changes,
    }
    return flags(**values)


@pytest.fixture(scope="module")
def study(recipes, tiny, tmp_path_factory):
    """One whole study, and the settings it was made of."""
    folder = tmp_path_factory.mktemp("study") / "run"
    recipe, settings = recipes["deviations"].prepare(both(tiny, folder))
    recipes["deviations"].run(recipe, settings)
    return folder, settings


def settings_of(folder, setting, run, seed):
    return json.loads((folder / setting / "runs" / run / f"seed-{seed}" / "settings.json").read_text())


def logits_of(folder, setting, run, seed):
    return load_file(folder / setting / "runs" / run / f"seed-{seed}" / "logits.safetensors")


def test_slopes_are_those_of_the_saved_logits(study):
    """A table about the wrong split, seed or teacher looks exactly like one about the right ones."""
    folder, _ = study
    rows = list(csv.DictReader((folder / "results.csv").open()))
    kinds = {(row["setting"], row["run"], row["seed"]) for row in rows}
    assert kinds == {(s, run, seed) for s in ("digits", "words") for run in RUNS for seed in "01"}
    for row in rows:
        if row["run"] == "teacher":
            continue
        setting, seed = row["setting"], int(row["seed"])
        own_seed = seed + 10_000 * (row["run"] == "control")
        teacher, student = logits_of(folder, setting, "teacher", seed), logits_of(folder, setting, row["run"], own_seed)
        # The text loss has the temperature on the teacher's side only, and the plot shows what it matches
        temperature = 3.0 if (setting, row["run"]) == ("words", "kd") else 1.0
        for split, name in (("train", "train_logits"), ("test", "logits")):
            classes = teacher[name].argmax(1)
            x = logit_of_class(teacher[name].astype(float) / temperature, classes)
            expected = stats.linregress(x, logit_of_class(student[name], classes))
            assert float(row[f"{split}_slope"]) == pytest.approx(expected.slope, rel=1e-4)
            assert float(row[f"{split}_intercept"]) == pytest.approx(expected.intercept, rel=1e-3, abs=1e-4)
            same = np.mean(student[name].argmax(1) == classes)
            assert float(row[f"{split}_agreement"]) == pytest.approx(same)
            assert float(row[f"{split}_slope_low"]) <= float(row[f"{split}_slope"]) <= float(row[f"{split}_slope_high"])


def test_training_labels_are_wrong_and_test_labels_are_not(study):
    """Scored on wrong test labels, the student that learned the noise wins; clean training labels hide interpolation."""
    folder, (digits, words) = study
    clean = digits.study.data
    assert (np.array(digits.labels("test")) == np.array(clean.held_out[""]["label"][:])).all()
    given, true = np.array(digits.study.view.train["label"][:]), np.array(clean.train["label"][:])
    assert digits.study.view.train["example_id"][:] == clean.train["example_id"][:]
    expected = sum(round(0.25 * np.sum(true == label)) for label in range(10))
    assert abs(np.sum(given != true) - expected) <= 10 and np.sum(given != true) >= 5
    assert (np.array(digits.labels("train")) == given).all(), "accuracy on what the models were given"
    assert (np.array(words.labels("train")) == np.array(words.study.data.train["label"][:])).all()
    for row in csv.DictReader((folder / "results.csv").open()):
        if (row["setting"], row["run"]) == ("digits", "teacher"):
            logits = logits_of(folder, "digits", "teacher", int(row["seed"]))["train_logits"]
            assert float(row["train_accuracy"]) == pytest.approx(np.mean(logits.argmax(1) == given))


def test_the_control_is_nobodys_twin(study):
    """A control that starts as its teacher did copies it: slope 1 without distillation, and no deviation anywhere."""
    folder, _ = study
    for setting in ("digits", "words"):
        starts = {run: settings_of(folder, setting, run, 0)["start"] for run in ("teacher", "one_hot", "kd")}
        starts["control"] = settings_of(folder, setting, "control", 10_000)["start"]
        assert starts["one_hot"] == starts["kd"], "gain is between equal starts"
        assert starts["control"] not in (starts["one_hot"], starts["teacher"])
    others = [settings_of(folder, "digits", run, seed)["start"] for run in ("teacher", "one_hot") for seed in (0, 1)]
    assert len(set(others)) == 4
    kd = settings_of(folder, "digits", "kd", 1)
    assert "KD" in kd["objective"] and "'alpha': 1.0" in kd["objective"].replace('"', "'")
    assert settings_of(folder, "digits", "kd", 0)["teacher"] != kd["teacher"], "every seed has a teacher of its own"


def test_the_report_is_written_whole(study):
    """A summary without intervals, or a figure of one setting, is what the paper's readers complain of."""
    folder, _ = study
    text = (folder / "results.md").read_text()
    for head in (
        "teacher, train",
        "gain: distilled - one-hot",
        "distilled - control, test",
        "lowest tenth of X, train",
    ):
        assert head in text
    assert text.count("| digits |") == text.count("| words |") == 3
    assert "of 2" in text.splitlines()[-1]
    numbers = json.loads((folder / "deviations.json").read_text())
    assert len(numbers) == 2 * 2 * 3 * 2 and {n["split"] for n in numbers} == {"train", "test"}
    assert all(n["slope_interval"][0] <= n["slope"] <= n["slope_interval"][1] for n in numbers)
    assert [n["teacher_temperature"] for n in numbers if (n["setting"], n["student"]) == ("words", "kd")] == [3.0] * 4
    assert {n["teacher_temperature"] for n in numbers if n["student"] == "control"} == {1.0}
    pytest.importorskip("matplotlib")
    assert (folder / "logit_logit.png").read_bytes().startswith(b"\x89PNG")


def test_a_study_goes_on_and_refuses_other_settings(recipes, tiny, study):
    """Hours of runs are not trained again, nor mixed with runs of other noise."""
    folder, _ = study
    results = sorted(folder.glob("*/runs/*/*/result.json"))
    before = {path: path.stat().st_mtime_ns for path in results}
    text = (folder / "results.csv").read_text()
    recipes["deviations"].main(both(tiny, folder, resume_from_checkpoint=True))
    assert {path: path.stat().st_mtime_ns for path in results} == before and len(results) == 16
    assert (folder / "results.csv").read_text() == text
    with pytest.raises(FileExistsError, match="another study"):
        recipes["deviations"].main(both(tiny, folder))
    with pytest.raises(ValueError, match="made with other settings"):
        recipes["deviations"].main(both(tiny, folder, resume_from_checkpoint=True, noise_rate=0.5))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"settings": ["nowhere.yaml"]}, "--settings nowhere.yaml: there is no such file"),
        ({"seeds": 0}, "--seeds and --bootstrap 1 or more"),
        ({"profile": "long"}, "--profile long: choose demo or study"),
        ({"noise_rate": 1.0}, "rate is the share of wrong labels"),
        ({"teacher_temperature_": 2.0}, "teacher_temperature_"),
    ],
)  # fmt: skip
def test_wrong_inputs_are_said_before_any_training(recipes, tiny, tmp_path, changes, sentence):
    """Said after the teachers are trained, a typing mistake costs hours."""
    with pytest.raises((ValueError, OSError), match=sentence):
        recipes["deviations"].prepare(both(tiny, tmp_path / "run", **changes))
    assert not list(tmp_path.glob("run/**/result.json"))


def test_settings_that_cannot_be_told_apart_or_plotted_are_refused(recipes, tiny, tmp_path):
    """Two settings in one folder would score each other's runs; numbers and several labels have no top class."""
    prepare = recipes["deviations"].prepare
    file = tiny / "deviations_digits.yaml"
    with pytest.raises(ValueError, match="two settings are called digits"):
        prepare(both(tiny, tmp_path / "run", settings=[file, file]))
    other = tmp_path / "mine.yaml"
    alone = {name: value for name, value in IMAGE.items() if name not in ("temperature", "alpha")}
    other.write_text(yaml.safe_dump({**alone, "objective": "cross_entropy"}))
    with pytest.raises(ValueError, match="mine.yaml: --objective cross_entropy asks no teacher"):
        prepare(both(tiny, tmp_path / "run", settings=[other]))
    other.write_text("data_dir: pictures\n")
    with pytest.raises(ValueError, match="add modality: text | image"):
        prepare(both(tiny, tmp_path / "run", settings=[other]))
    other.write_text("- a\n")
    with pytest.raises(ValueError, match="name: value"):
        prepare(both(tiny, tmp_path / "run", settings=[other]))
    numbers = tmp_path / "numbers.csv"
    numbers.write_text("text,label\n" + "".join(f"w{5 + i},{i / 7}\n" for i in range(20)))
    values = yaml.safe_load((tiny / "words.yaml").read_text())
    values |= {"train_file": str(numbers), "test_file": str(numbers), "problem_type": "regression"}
    other.write_text(yaml.safe_dump(values))
    with pytest.raises(ValueError, match="regression has no most probable class"):
        prepare(both(tiny, tmp_path / "run", settings=[other]))


# ---- YAML ----


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("deviations_*.yaml")), ids=lambda path: path.stem)
def test_every_file_is_read(recipes, path):
    """A key that no program knows stops a study on the cluster, not here."""
    study = recipes["deviation_study"]
    values = yaml.safe_load(path.read_text())
    if "settings" in values:
        (recipe,) = parse_arguments(recipes["deviations"].RecipeArguments, arguments=[], defaults=path)
        assert all(study.find(file).is_file() for file in recipe.settings)
        return
    kind, _ = study.SETTINGS[study.modality_of(path)]
    recipe, args = parse_arguments(kind, DistillationArguments, arguments=["--output_dir", "x"], defaults=path)
    assert args.make_objective("kd").alpha == 1.0, "the paper's students learn from the teacher alone"


def test_the_papers_settings_have_its_values(recipes):
    """A batch or temperature of ours under the paper's name is a failed reproduction that nobody can find."""
    study, found = recipes["deviation_study"], {}
    lists = {name: CONFIGS / f"deviations_paper_{name}.yaml" for name in ("images", "text")}
    for path in lists.values():
        for file in yaml.safe_load(path.read_text())["settings"]:
            kind, _ = study.SETTINGS[study.modality_of(study.find(file))]
            found[Path(file).stem] = parse_arguments(
                kind, DistillationArguments, arguments=["--output_dir", "x"], defaults=study.find(file)
            )
    assert list(found)[:6] == [f"deviations_{name}" for name in PAPER_IMAGES]
    for name in PAPER_IMAGES[:5]:
        recipe, args = found[f"deviations_{name}"]
        assert (args.per_device_train_batch_size, args.num_train_epochs, args.learning_rate) == (1024, 450, 1.0)
        assert (args.weight_decay, args.warmup_steps, args.lr_milestone_factor) == (
            5e-4,
            pytest.approx(15 / 450, abs=1e-5),
            0.1,
        )
        assert (args.optim_args, args.temperature) == ("momentum=0.9,nesterov=True", 4.0)
        assert recipe.noise_rate == (0.2 if "noisy" in name else 0.0)
    for task, temperature in (("mnli", 2.0), ("imdb", 16.0), ("qqp", 1.0), ("ag_news", 1.0)):
        recipe, args = found[f"distill_text_{task}"]
        assert (recipe.task, args.temperature, args.alpha) == (task, temperature, 1.0)
        assert (args.max_steps, args.per_device_train_batch_size) == (25_000, 64)
        assert (args.learning_rate, args.warmup_steps) == (1e-5, 1000)
