"""Teacher's pet and the forests of Adult as their users start them: tiny networks on digits, tiny forests, wrong inputs."""

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
from scipy import stats
from transformers import AutoModelForImageClassification

from hfkd import DistillationArguments
from hfkd.data import embedded
from hfkd.data.long_tail import long_tail_counts

ROOT = Path(__file__).resolve().parents[1]
RECIPES, CONFIGS = ROOT / "recipes", ROOT / "recipes" / "configs"
SCHEMAS = json.loads((Path(__file__).parent / "data" / "schemas" / "images.json").read_text())
METHODS = ["one_hot", "kd", "ada_alpha", "ada_margin", "balanced_student", "group_dro"]
SWEPT = METHODS[1:5]
PAPER = ["cifar100", "cifar100_lt", "imagenet", "imagenet_lt"]


@pytest.fixture(scope="module")
def recipes():
    """The modules by name, imported from the folder as the programs import each other."""
    sys.path.insert(0, str(RECIPES))
    names = ("pet_study", "pet_report", "teachers_pet", "adult_forests", "image_study", "image_data")
    yield {name: importlib.import_module(name) for name in names}
    sys.path.remove(str(RECIPES))


def flags(**values):
    words = []
    for name, value in values.items():
        words += [] if value is None else [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def bounds():
    return {"max_steps": 2, "per_device_train_batch_size": 16, "per_device_eval_batch_size": 64, "disable_tqdm": True}


def tiny(output, **changes):
    """A study of the 8 x 8 digits: a tail of 4, half of a class or 20 images held out."""
    values = {
        "task": "digits",
        "image_size": 8,
        "ratio": 4,
        "dev_examples": 20,
        "teacher_config": "resnet10-xxxs",
        "student_config": "resnet10-xxxs",
        "output_dir": output,
        "seeds": 2,
        "temperatures": [1, 4],
        "learning_rate": 0.05,
        **bounds(),
        **changes,
    }
    return flags(**values)


def per_seed(folder, name="results.csv"):
    return list(csv.DictReader((folder / name).open()))


def long_study(folder):
    """Enough steps, on all test rows, that seeds and methods score differently."""
    return tiny(folder, max_steps=12, evaluation_rows=359)


@pytest.fixture(scope="module")
def study(recipes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study") / "run"
    recipes["teachers_pet"].main(long_study(folder))
    return folder


# ---- the data ----


def test_the_dev_split_is_in_neither_other_part(recipes, tmp_path):
    """A dev image that was trained on makes every class reliable; a test image among them makes the choice a leak."""
    _, _, study = recipes["teachers_pet"].prepare(tiny(tmp_path / "run", max_steps=-1, num_train_epochs=1))
    study.start()
    parts = json.loads((tmp_path / "run" / "indices.json").read_text())
    assert {name: len(set(rows)) for name, rows in parts.items()} == {name: len(rows) for name, rows in parts.items()}
    assert not set(parts["dev"]) & set(parts["train"]) and not set(parts["test"]) & (
        set(parts["train"]) | set(parts["dev"])
    )
    views = {"train": study.view.train, "dev": study.view.held_out["dev_"], "test": study.view.held_out[""]}
    source = embedded.digits()
    for name, rows in views.items():  # what is trained on, answered and scored is what the file says
        numbers = rows["example_id"][:]
        assert sorted(numbers) == sorted(parts[name])
        assert rows["label"][:] == [source[i]["label"] for i in numbers]
        shown = np.frombuffer(bytes(rows[0]["pixels"]), np.uint8).reshape(8, 8, 3)
        np.testing.assert_array_equal(shown[..., 0], np.asarray(source[numbers[0]]["image"]))


def test_the_tail_is_cut_from_the_training_images_alone(recipes, tmp_path):
    """A long-tailed test split hides the rare classes in the average; dev images beyond k starve them."""
    _, _, study = recipes["teachers_pet"].prepare(tiny(tmp_path / "run", max_steps=-1, num_train_epochs=1))
    train, dev, test = (torch.bincount(x).tolist() for x in (study.train_labels, study.dev_labels, study.test_labels))
    whole = [one + other for one, other in zip(train, dev, strict=True)]
    assert whole == long_tail_counts(whole[0], 10, 4) and 130 < whole[0] <= 146
    assert dev == [20 if count > 40 else count // 2 for count in whole]
    assert 35 <= min(test) <= max(test) <= 37, "balanced, as the source is (174 to 183 a class, a fifth of it)"


def test_every_class_stays_in_a_bounded_run(recipes, tmp_path):
    """`--max_steps 2` that loses a rare class ends in an error about trust in it, after the teacher is paid for."""
    _, _, study = recipes["teachers_pet"].prepare(tiny(tmp_path / "run", per_device_train_batch_size=1))
    assert len(study.train_labels) == 10 and len(study.dev_labels) <= 128 and len(study.test_labels) == 128
    assert all(len(set(x.tolist())) == 10 for x in (study.train_labels, study.dev_labels, study.test_labels))


# ---- the study ----


def test_every_method_at_every_temperature(study):
    """A method that was left out, or a temperature that was not tried, is missing from the table without a word."""
    rows = per_seed(study)
    tried = {(row["method"], row["temperature"]) for row in rows}
    assert tried == {(m, t) for m in SWEPT for t in ("1.0", "4.0")} | {
        (m, "") for m in ("teacher", "one_hot", "group_dro")
    }
    assert len(rows) == 2 * len(tried) and len({tuple(sorted(row.items())) for row in rows}) == len(rows)
    for method in ("teacher", *METHODS):
        chosen = [row for row in rows if row["method"] == method and row["chosen"] == "True"]
        assert len(chosen) == 2 and len({row["temperature"] for row in chosen}) == 1


def test_students_share_everything_but_the_objective(study):
    """Another start, budget or part of the data for one method would be reported as its effect."""
    starts = set()
    for seed in range(2):
        settings = {
            path.parent.parent.name: json.loads(path.read_text())
            for path in (study / "runs").glob(f"*/seed-{seed}/settings.json")
        }
        teacher, one_hot = settings.pop("teacher"), settings["one_hot"]
        for other in settings.values():
            differ = {name for name in one_hot if one_hot[name] != other[name]}
            assert differ <= {"objective", "teacher", "teacher_dtype"}
        assert {name for name in one_hot if one_hot[name] != teacher[name]} <= {"start", "objective"}
        assert teacher["start"] != one_hot["start"], "a twin of the teacher is no student"
        starts.add(one_hot["start"])
    assert len(starts) == 2


def test_what_is_learned_comes_from_the_right_split(recipes, study, tmp_path):
    """Trust measured where the teacher was trained is 1 for every class; a prior of the dev split is another one."""
    _, _, prepared = recipes["teachers_pet"].prepare(long_study(tmp_path / "other"))
    model = AutoModelForImageClassification.from_pretrained(study / "runs/teacher/seed-0/model").double().eval()
    dev = prepared.view.held_out["dev_"]
    sums, counts = [0.0] * 10, [0] * 10
    for row in dev:  # one image at a time: no batches, no order
        pixels = np.frombuffer(bytes(row["pixels"]), np.uint8).reshape(8, 8, 3).transpose(2, 0, 1) / 255
        with torch.no_grad():
            logits = model(torch.from_numpy((pixels - 0.5) / 0.5)[None]).logits[0]
        chance = torch.softmax(logits, 0).tolist()
        label = row["label"]
        sums[label] += chance[label] - (sum(chance) - chance[label]) / 9
        counts[label] += 1
    gamma = [total / count for total, count in zip(sums, counts, strict=True)]
    learned = {
        name: load_file(study / f"runs/{name}/seed-0/model/objective.safetensors")
        for name in ("ada_alpha-T1", "ada_alpha-T4", "ada_margin-T1", "balanced_student-T1")
    }
    for name in ("ada_alpha-T1", "ada_alpha-T4"):  # the temperature is for training, not for measuring
        np.testing.assert_allclose(learned[name]["alpha_"], [max(0.0, g) for g in gamma], atol=1e-5)
    np.testing.assert_allclose(
        learned["ada_margin-T1"]["offset_"], np.log([max(0.01, g) for g in gamma]), rtol=1e-4, atol=1e-5
    )
    trained = torch.bincount(prepared.train_labels).double()
    np.testing.assert_allclose(learned["balanced_student-T1"]["log_prior_"], (trained / trained.sum()).log(), atol=1e-6)
    assert max(gamma) - min(gamma) > 0.05, "equal values would hide a wrong order of classes"


def test_the_table_equals_the_per_seed_csv(study):
    """A mean of runs at other temperatures, or an interval that is not paired by seed, is a claim the data do not make."""
    rows, text = per_seed(study), (study / "results.md").read_text()
    lines, tried = (part.splitlines() for part in text.strip().split("\n\n"))
    found = {
        method: {
            name: [100 * float(row[name]) for row in rows if row["method"] == method and row["chosen"] == "True"]
            for name in ("average", "worst_1", "worst_3")
        }
        for method in ("teacher", *METHODS)
    }
    for line in lines[2:]:
        method, _, *cells = line.strip("| ").split(" | ")
        expected = []
        for name in ("average", "worst_1", "worst_3"):
            values = found[method][name]
            low, high = interval(values)
            expected.append(f"{statistics.mean(values):.2f} [{low:.2f}, {high:.2f}]")
        for reference in ("one_hot", "kd"):
            for name in ("average", "worst_3"):
                changes = [a - b for a, b in zip(found[method][name], found[reference][name], strict=True)]
                low, high = interval(changes)
                shown = f"{statistics.mean(changes):+.2f} [{low:+.2f}, {high:+.2f}]"
                expected.append("–" if method in ("teacher", reference) else shown)
        assert [cell.replace("-0.00", "0.00").replace("+0.00", "0.00") for cell in cells] == [
            cell.replace("-0.00", "0.00").replace("+0.00", "0.00") for cell in expected
        ]
    for method, line in zip(METHODS, tried[2:], strict=True):
        dev = {row["temperature"]: [] for row in rows if row["method"] == method}
        for row in rows:
            if row["method"] == method:
                dev[row["temperature"]].append(100 * float(row["dev_mean_per_class_recall"]))
        assert all(f"{statistics.mean(values):.2f}" in line for values in dev.values())
        if method in SWEPT:
            best = max(dev, key=lambda t: statistics.mean(dev[t]))
            assert best in [row["temperature"] for row in rows if row["method"] == method and row["chosen"] == "True"]
    assert len(lines) == 2 + 7 and found["one_hot"]["average"] != found["one_hot"]["average"][::-1]


def interval(values):
    if min(values) == max(values):
        return values[0], values[0]
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return statistics.mean(values) - half, statistics.mean(values) + half


def test_scores_are_recounted_from_the_saved_logits(recipes, study, tmp_path):
    """Worst-k over the rarest classes, or over another model's worst, is another number under the same name."""
    _, _, prepared = recipes["teachers_pet"].prepare(long_study(tmp_path / "other"))
    labels, classes = prepared.test_labels.tolist(), per_seed(study, "classes.csv")
    for row in per_seed(study):
        logits = load_file(study / "runs" / row["run"] / f"seed-{row['seed']}" / "logits.safetensors")["logits"]
        hits = {label: [] for label in range(10)}
        for answer, label in zip(logits.argmax(1).tolist(), labels, strict=True):
            hits[label].append(answer == label)
        recalls = [sum(hits[label]) / len(hits[label]) for label in range(10)]
        assert float(row["average"]) == pytest.approx(sum(recalls) / 10)
        assert float(row["worst_1"]) == pytest.approx(min(recalls))
        assert float(row["worst_3"]) == pytest.approx(sum(sorted(recalls)[:3]) / 3)
        if row["chosen"] == "True":
            own = [r for r in classes if (r["method"], r["seed"]) == (row["method"], row["seed"])]
            assert [float(r["recall"]) for r in own] == pytest.approx(recalls)
    trained = torch.bincount(prepared.train_labels).tolist()
    assert [int(row["train_images"]) for row in classes[:10]] == trained
    assert (study / "class_changes.png").stat().st_size > 10_000


def test_test_labels_have_no_say_in_the_temperature(recipes, tmp_path, monkeypatch):
    """A temperature chosen on the test split is reported as a gain of the method."""
    small = {"methods": ["kd"], "seeds": 1, "max_steps": 6, "evaluation_rows": 359}
    recipes["teachers_pet"].main(tiny(tmp_path / "true", **small))
    rows = {row["run"]: row for row in per_seed(tmp_path / "true") if row["method"] == "kd"}
    (rejected,) = (run for run, row in rows.items() if row["chosen"] == "False")
    logits = load_file(tmp_path / "true" / "runs" / rejected / "seed-0" / "logits.safetensors")["logits"]
    original = recipes["pet_study"].load_data

    def with_test_labels_of_the_rejected_run(recipe, args):
        data, indices = original(recipe, args)
        test, first = data.held_out[""], {}
        for row, label in enumerate(test["label"][:]):
            first.setdefault(label, row)  # keeps its label: every class must have an image
        labels = [
            label if first[label] == row else int(logits[row].argmax()) for row, label in enumerate(test["label"][:])
        ]
        test = test.remove_columns("label").add_column("label", labels)
        data.held_out[""] = test.cast_column("label", data.train.features["label"])
        return data, indices

    monkeypatch.setattr(recipes["pet_study"], "load_data", with_test_labels_of_the_rejected_run)
    recipes["teachers_pet"].main(tiny(tmp_path / "other", **small))
    after = {row["run"]: row for row in per_seed(tmp_path / "other") if row["method"] == "kd"}
    (taken,) = (run for run, row in after.items() if row["chosen"] == "True")
    assert float(after[rejected]["average"]) > float(after[taken]["average"]), (
        "the test split would have chosen otherwise"
    )
    assert rows[taken]["chosen"] == "True"


def test_the_temperature_is_that_of_the_best_mean_on_dev(recipes):
    """One lucky seed, or the test split's score, must not choose; a tie must not depend on the order of runs."""
    choose = recipes["pet_study"].chosen_temperature

    def results(scores):
        return [
            {"temperature": t, "dev_mean_per_class_recall": dev, "mean_per_class_recall": 1 - dev}
            for t, seeds in scores.items()
            for dev in seeds
        ]

    assert choose(results({1.0: [0.5, 0.5], 2.0: [0.9, 0.2], 3.0: [0.4, 0.5]})) == 2.0
    assert choose(results({1.0: [0.5, 0.5], 2.0: [0.9, 0.0], 3.0: [0.4, 0.5]})) == 1.0
    assert choose(results({5.0: [0.5], 2.0: [0.5], 3.0: [0.4]})) == 2.0
    assert choose(results({None: [0.1]})) is None


def test_a_resumed_study_trains_only_what_is_missing(recipes, tmp_path):
    """Hours are paid twice, or runs of two settings are averaged into one row."""
    words = tiny(tmp_path / "run", methods=["kd", "group_dro"], seeds=1)
    recipes["teachers_pet"].main(words)
    with pytest.raises(FileExistsError, match="--resume_from_checkpoint True"):
        recipes["teachers_pet"].main(words)
    gone = tmp_path / "run" / "runs" / "kd-T4" / "seed-0" / "result.json"
    others = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("result.json") if path != gone}
    before = json.loads(gone.read_text())
    gone.unlink()
    recipes["teachers_pet"].main([*words, "--resume_from_checkpoint", "True"])
    after = json.loads(gone.read_text())
    assert {n: after[n] for n in before if n not in ("seconds_per_step", "peak_mib")} == {
        n: before[n] for n in before if n not in ("seconds_per_step", "peak_mib")
    }
    assert {path: path.stat().st_mtime_ns for path in others} == others and len(others) == 4
    longer = [*words, "--resume_from_checkpoint", "True", "--temperatures", "1", "4", "5"]
    recipes["teachers_pet"].main(longer)  # another temperature is a run more, not a study anew
    assert {path: path.stat().st_mtime_ns for path in others} == others
    for changes, name in (({"dev_examples": 10}, "rows"), ({"learning_rate": 0.01}, "learning_rate")):
        other = tiny(tmp_path / "run", methods=["kd", "group_dro"], seeds=1, **changes)
        with pytest.raises(ValueError, match=rf"(?s)made with other settings.*{name}"):
            recipes["teachers_pet"].main([*other, "--resume_from_checkpoint", "True"])


def test_cached_answers_equal_a_teacher_asked_in_every_step(recipes, tmp_path):
    """Answers to other rows, or to pixels that the student does not see, are learned just as readily."""
    logits, one = [], {"methods": ["kd"], "seeds": 1, "temperatures": 2, "max_steps": 6}
    recipes["teachers_pet"].main(tiny(tmp_path / "cached", **one))
    recipes["teachers_pet"].main(tiny(tmp_path / "asked", **one, crop="pad", padding=0))  # drawn, but the same pixels
    for name in ("cached", "asked"):
        logits.append(load_file(tmp_path / name / "runs/kd-T2/seed-0/logits.safetensors")["logits"])
    assert (tmp_path / "cached" / "teacher_answers").is_dir() and not (tmp_path / "asked" / "teacher_answers").exists()
    torch.testing.assert_close(logits[0], logits[1], atol=1e-4, rtol=1e-4)


def test_settings_of_a_method(recipes, tmp_path):
    """A variant that runs as the default would be compared with itself; KD with both temperatures is another method."""
    methods = ["kd:temperature=2,alpha=0.5", "ada_margin:variant=ldam", "ada_alpha"]
    words = tiny(tmp_path / "run", methods=methods, seeds=1, temperatures=3, alpha=0.2, label_smoothing_factor=0.1)
    recipes["teachers_pet"].main(words)
    folders = {path.parent.parent.name: json.loads(path.read_text()) for path in tmp_path.rglob("settings.json")}
    assert set(folders) == {
        "teacher",
        "one_hot",
        "kd-temperature=2-alpha=0.5",
        "ada_margin-variant=ldam-T3",
        "ada_alpha-T3",
    }
    kd = folders["kd-temperature=2-alpha=0.5"]["objective"]
    assert "'temperature': 2," in kd and "'alpha': 0.5" in kd and "'temperature_on': 'teacher'" in kd
    margin = folders["ada_margin-variant=ldam-T3"]["objective"]
    assert "'variant': 'ldam'" in margin and "'temperature': 3.0" in margin and "'alpha': 0.2" in margin
    assert all("'label_smoothing': 0.1" in found["objective"] for found in folders.values())
    assert "One seed" not in (tmp_path / "run" / "results.md").read_text()
    assert "(n=1)" in (tmp_path / "run" / "results.md").read_text()


# ---- every YAML ----


def stored(task, per_class):
    """The splits that the Hub has, with an image or more of every class: 8 x 8 noise."""
    declared = SCHEMAS[task]
    names = [f"class {number:04d}" for number in range(declared["classes"])]
    features = Features({declared["image"]: Image(), declared["label"]: ClassLabel(names=names)})
    picture = Picture.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    splits = DatasetDict()
    for split in declared["splits"]:
        counts = per_class if split == "train" else [1] * len(names)
        labels = [label for label, count in enumerate(counts) for _ in range(count)]
        labels = [-1] * len(labels) if split in declared["hidden"] else labels
        columns = {declared["image"]: [picture] * len(labels), declared["label"]: labels}
        splits[split] = Dataset.from_dict(columns, features=features)
    return splits


@pytest.fixture
def hub(monkeypatch):
    sizes = {"cifar100": long_tail_counts(200, 100, 100), "imagenet_1k": [2] * 1000}
    paths = {SCHEMAS[task]["path"]: task for task in sizes}
    monkeypatch.setattr(datasets, "load_dataset", lambda path, name=None: stored(paths[path], sizes[paths[path]]))


def listed(folder, per_class=(6, 4, 2)):
    """ImageNet-LT's two lists of three classes, and the images below `folder`."""
    for split, counts in (("train", per_class), ("val", (2, 2, 2))):
        lines = []
        for label, count in enumerate(counts):
            (folder / split / f"n{label}").mkdir(parents=True, exist_ok=True)
            for number in range(count):
                name = f"{split}/n{label}/{number}.JPEG"
                pixels = np.random.default_rng([label, number]).integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Picture.fromarray(pixels).save(folder / name)
                lines.append(f"{name} {label}\n")
        (folder / f"{split}.txt").write_text("".join(lines))
    return {"train_list": folder / "train.txt", "test_list": folder / "val.txt", "data_dir": folder}


@pytest.mark.parametrize("name", ["demo", "study", "task", *PAPER])
def test_every_yaml_runs_two_steps(recipes, hub, tmp_path, name):
    """A paper's setting with a misspelt key or a class without images is found out on the GPU that was rented for it."""
    models = {"teacher_config": "resnet10-xxxs", "student_config": "resnet10-xxxs", "image_size": 8}
    changes = {**models, **bounds(), "seeds": 1, "dataloader_num_workers": 0, "output_dir": tmp_path / "run"}
    if name == "task":
        changes |= {"task": "digits"}
    if name == "imagenet_lt":
        changes |= {**listed(tmp_path / "images"), "worst_k": 2}
    given = yaml.safe_load((CONFIGS / f"teachers_pet_{name}.yaml").read_text())
    few = {"methods": ["ada_alpha", "group_dro"], "temperatures": given.get("temperatures", [1])[-1:]}
    recipes["teachers_pet"].main(flags(config=CONFIGS / f"teachers_pet_{name}.yaml", **changes, **few))
    rows = per_seed(tmp_path / "run")
    assert [row["method"] for row in rows] == ["teacher", "one_hot", "ada_alpha", "group_dro"]
    assert {row["steps"] for row in rows} <= {"1", "2"}
    recipe, args = recipes["pet_study"].PetArguments(), DistillationArguments(str(tmp_path / "run"))
    for method in given.get("methods", METHODS):
        assert recipes["pet_study"].planned(method, recipe, args)(2.0)
    settings = json.loads((tmp_path / "run" / "runs" / "group_dro" / "seed-0" / "settings.json").read_text())
    for key in ("learning_rate", "weight_decay", "optim_args", "num_train_epochs", "lr_scheduler_type"):
        assert settings[key] == given[key] or float(settings[key]) == float(given[key])
    assert settings["lr_milestones"] == given.get("lr_milestones")


def test_the_papers_settings_are_the_papers():
    """A changed budget under a paper's name reports another experiment as a replication."""
    found = {name: yaml.safe_load((CONFIGS / f"teachers_pet_{name}.yaml").read_text()) for name in PAPER}
    for name, given in found.items():
        assert given["per_device_train_batch_size"] == 1024 and "nesterov=True" in given["optim_args"]
        cifar = name.startswith("cifar")
        expected = {
            "num_train_epochs": 450 if cifar else 90,
            "learning_rate": 1.0 if cifar else 0.8,
            "max_grad_norm": 0,
        }
        expected |= {"alpha": 1.0 if cifar else 0.2, "temperatures": [1, 2, 3, 4, 5] if cifar else [0.9]}
        expected |= {"teacher_config": "resnet56", "student_config": "resnet56"} if cifar else {}
        assert {key: given[key] for key in expected} == expected
        assert float(given["weight_decay"]) == (1e-4 if cifar else 0.5e-4)
        epochs = given["num_train_epochs"]
        assert round(given["warmup_steps"] * epochs, 3) == (15 if cifar else 5)
    assert (found["cifar100"]["lr_milestones"], found["imagenet"]["lr_milestones"]) == ([200, 300, 400], [30, 60, 80])
    assert found["cifar100"]["dev_share"] == found["imagenet"]["dev_share"] == 0.2
    assert {name: found[name]["dev_examples"] for name in PAPER[1::2]} == {"cifar100_lt": 20, "imagenet_lt": 50}
    assert all(found[name]["lr_scheduler_type"] == "cosine" for name in PAPER[1::2])
    assert found["cifar100_lt"]["ratio"] == 100


@pytest.mark.parametrize(("name", "parameters"), [("resnet18", 11_689_512), ("resnet50", 25_557_032)])
def test_the_imagenet_networks_are_those_of_the_table(recipes, name, parameters):
    """A ResNet of other sizes trains for days under the paper's name."""
    recipe = recipes["pet_study"].PetArguments(image_size=224)
    data = recipes["image_data"].ImageData(None, None, {}, [str(label) for label in range(1000)])
    with torch.device("meta"):
        model = recipes["image_study"].Network(None, f"image_{name}.yaml", recipe).new(data)
    assert model.num_parameters() == parameters


def test_published_lists_name_images_below_the_folder(recipes, tmp_path):
    """Labels beside the wrong image, or a test image that was trained on, cannot be seen in any score."""
    lists = listed(tmp_path / "images")
    recipe = recipes["pet_study"].PetArguments(**{name: str(path) for name, path in lists.items()})
    splits = recipes["pet_study"].listed_images(recipe)
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 12, "test": 6}
    for row in splits["train"]:
        label, number = row["label"], row["example_id"] - [0, 6, 10][row["label"]]
        expected = np.asarray(Picture.open(tmp_path / "images" / "train" / f"n{label}" / f"{number}.JPEG"))
        np.testing.assert_array_equal(np.asarray(row["image"]), expected)
    (tmp_path / "images" / "val.txt").write_text((tmp_path / "images" / "train.txt").read_text())
    with pytest.raises(ValueError, match="12 images stand in both lists"):
        recipes["pet_study"].listed_images(recipe)


# ---- wrong inputs ----

WRONG = {
    "ratio": ({"ratio": 0.01}, ValueError, "--ratio is the largest class over the smallest, 1 or above, got 0.01"),
    "ratio beyond the rows": ({"ratio": 1000}, ValueError, "leaves the smallest without any"),
    "class without a dev image": ({"ratio": 140}, ValueError, "(?s)without a training or a dev row.*9: 1 and 0"),
    "no dev images": ({"dev_examples": 0}, ValueError, "held_out is 0"),
    "dev share": ({"dev_examples": None, "dev_share": 1.5}, ValueError, "held_out is 1.5"),
    "method": ({"methods": ["kd", "nope"]}, ValueError, "'nope' is unknown; the known ones are one_hot, kd"),
    "setting": ({"methods": ["ada_margin:variety=ldam"]}, ValueError, "(?s)ada_margin:variety=ldam.*variety"),
    "value of a setting": ({"methods": ["ada_margin:variant=x"]}, ValueError, "variant must be one of"),
    "no pair": ({"methods": ["kd:alpha"]}, ValueError, "settings are name=value pairs"),
    "temperature": ({"temperatures": [1, 0]}, ValueError, r"--temperatures must be numbers above 0, got \[1.0, 0.0\]"),
    "one objective": ({"temperature": 2}, ValueError, "give --methods and --temperatures"),
    "alpha": ({"alpha": 2}, ValueError, r"must lie in \[0, 1\], got 2"),
    "worst": ({"worst_k": 11}, ValueError, "--worst_k must lie between 1 and 10"),
    "seeds": ({"seeds": 0}, ValueError, "--seeds must be 1 or more, got 0"),
    "network": ({"student_config": "resnet21"}, OSError, "no network 'resnet21'"),
    "mixup": ({"mixup": 0.2}, ValueError, "leave them out"),
    "tail": ({"tail": "steep"}, ValueError, "profile must be one of exponential, step"),
    "list without a folder": ({"train_list": "train.txt", "ratio": None}, ValueError, "--train_list needs --test_list"),
    "a tail of a tail": ({"train_list": "train.txt"}, ValueError, "leave --ratio out"),
    "task": ({"task": "nope"}, ValueError, "unknown task 'nope'"),
    "profile": ({"profile": "huge"}, ValueError, "demo, study or task"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_inputs_say_what_to_do(recipes, tmp_path, case):
    """An error after the teachers are trained, or one that names a tensor shape, costs the study."""
    changes, kind, message = WRONG[case]
    with pytest.raises(kind, match=message):
        recipes["teachers_pet"].prepare(tiny(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir()), "nothing is left behind"


# ---- Adult ----


@pytest.fixture(scope="module")
def forests(recipes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adult") / "run"
    words = flags(output_dir=folder, seeds=2, train_rows=1500, teacher_trees=40, student_trees=3, student_depth=4)
    recipes["adult_forests"].main(words)
    return folder


def test_one_cell_recounted_by_hand(recipes, forests):
    """Predictions of other people, or a cell of the training file, would be reported as somebody's accuracy."""
    from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor

    people = recipes["adult_forests"].load_people(1500)
    train, test, rows = people["train"], people["test"], embedded.adult()["test"]
    groups = [
        (embedded.INCOME_LABELS[i], *other)
        for i, *other in zip(*(rows[name][:] for name in ("label", "sex", "race")), strict=True)
    ]
    teacher = RandomForestClassifier(40, min_samples_leaf=2, oob_score=True, random_state=1).fit(
        train.features, train.labels
    )
    targets = {"one-hot student": train.labels, "distilled student": teacher.oob_decision_function_[:, 1]}
    found = {"teacher": teacher.predict_proba(test.features)[:, 1]}
    for name, values in targets.items():
        student = RandomForestRegressor(3, max_depth=4, random_state=1).fit(train.features, values)
        found[name] = student.predict(test.features)
    for cell in ((">50K", "Female", "White"), ("<=50K", "Male", "Black")):
        for model, probability in found.items():
            own = [i for i, group in enumerate(groups) if group == cell]
            hits = [(probability[i] > 0.5) == (cell[0] == ">50K") for i in own]
            (row,) = [
                row
                for row in per_seed(forests)
                if (row["model"], row["seed"], row["label"], row["sex"], row["race"]) == (model, "1", *cell)
            ]
            assert float(row["accuracy"]) == pytest.approx(sum(hits) / len(hits)) and int(row["test_people"]) == len(
                hits
            )


def test_out_of_bag_is_sklearns(recipes):
    """A teacher that has its rows by heart teaches the labels again; sklearn's own count is the reference."""
    from sklearn.ensemble import RandomForestClassifier

    people = recipes["adult_forests"].load_people(600)["train"]
    forest = RandomForestClassifier(60, oob_score=True, random_state=0).fit(people.features, people.labels)
    found = recipes["adult_forests"].out_of_bag(forest, people.features)
    np.testing.assert_allclose(found, forest.oob_decision_function_[:, 1], atol=1e-12)
    in_bag = forest.predict_proba(people.features)[:, 1]
    assert np.abs(in_bag - people.labels).mean() < 0.5 * np.abs(found - people.labels).mean()
    few = RandomForestClassifier(2, random_state=0).fit(people.features, people.labels)
    with pytest.raises(ValueError, match="no out-of-bag probability"):
        recipes["adult_forests"].out_of_bag(few, people.features)


def test_alpha_0_is_the_one_hot_student(recipes):
    """If the distilled forest differs where nothing is distilled, the comparison measures the recipe."""
    module = recipes["adult_forests"]
    people = module.load_people(500)
    recipe = module.RecipeArguments(alpha=0.0, teacher_trees=30, student_trees=3)
    found, _ = module.predictions_of_seed(recipe, people, seed=0)
    np.testing.assert_array_equal(found[module.DISTILLED], found[module.ONE_HOT])
    taught, _ = module.predictions_of_seed(module.RecipeArguments(teacher_trees=30, student_trees=3), people, seed=0)
    assert (taught[module.DISTILLED] != taught[module.ONE_HOT]).any()


def test_the_adult_table_equals_its_csv(forests):
    """A worst cell of three people, or averages of another model, would be the headline."""
    rows, text = per_seed(forests), (forests / "results.md").read_text()
    for model in ("teacher", "one-hot student", "distilled student"):
        worst, means = [], []
        for seed in ("0", "1"):
            own = [r for r in rows if (r["model"], r["seed"]) == (model, seed) and r["label"] != "all"]
            assert len(own) == 20 and sum(int(r["test_people"]) for r in own) == 16_281
            large = sorted(float(r["accuracy"]) for r in own if int(r["test_people"]) >= 30)
            worst.append(100 * sum(large[:3]) / 3)
            means.append(100 * statistics.mean(float(r["accuracy"]) for r in own))
        line = next(line for line in text.splitlines() if line.startswith(f"| {model} |"))
        for cell, values in zip(line.strip("| ").split(" | ")[2::2], (means, worst), strict=True):
            low, high = interval(values)
            assert cell == f"{statistics.mean(values):.2f} [{low:.2f}, {high:.2f}]"
    assert (forests / "changes.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": 1.5}, r"must lie in \[0, 1\], got 1.5"),
        ({"seeds": 0}, "--seeds must be 1 or more, got 0"),
        ({"fewest": 100_000}, "lower --worst or --fewest"),
        ({"train_rows": 0}, "at least 1 is needed"),
        ({"config": "nowhere.yaml"}, "there is no such file"),
    ],
)
def test_wrong_inputs_of_the_forests(recipes, tmp_path, changes, message):
    """A wrong share of the teacher, or no cell to be worst, must not cost the forests first."""
    with pytest.raises(ValueError, match=message):
        recipes["adult_forests"].prepare(flags(output_dir=tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()
