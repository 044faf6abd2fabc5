"""distill_image.py as its users start it: every YAML, folders of their own, every kind of network, wrong inputs, resumes.

In-process with tiny models; data sets of the Hub are stood in for by generated images under their real columns and classes.
"""

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
from PIL import Image
from safetensors.numpy import load_file
from scipy import stats
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    ViTModel,
)

import image_hub
import launching
from hfkd.data.augment import Augmentation
from hfkd.data.pixels import ImageCollator, PixelView
from hfkd.data.splits import load_indices

ROOT = Path(__file__).resolve().parents[1]
RECIPES, CONFIGS = ROOT / "recipes", ROOT / "recipes" / "configs"
STUDIES = sorted(path.name for path in CONFIGS.glob("distill_image_*.yaml"))
BIRDS = ("crow", "finch", "owl")
RUNS = ("teacher", "baseline", "distilled")


@pytest.fixture(scope="module")
def recipes():
    """The modules by name, imported from the folder as the programs import each other."""
    sys.path.insert(0, str(RECIPES))
    yield {name: importlib.import_module(name) for name in ("image_data", "image_study", "distill_image", "runs")}
    sys.path.remove(str(RECIPES))


def processor(size, mean=0.5, std=0.5):
    return ViTImageProcessorPil(size={"height": size, "width": size}, image_mean=[mean] * 3, image_std=[std] * 3)


def vit_config(names=None, **changes):
    sizes = {"image_size": 16, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 32, "hidden_dropout_prob": 0.0}
    if names is not None:
        sizes |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    return ViTConfig(**{**sizes, **changes})


def save(folder, config, seen=None, kind=ViTForImageClassification):
    torch.manual_seed(0)
    kind(config).save_pretrained(folder)
    (seen or processor(16)).save_pretrained(folder)


def picture(number, bird, size=(20, 18)):
    """Noise around a colour of the class: the classes overlap, so that seeds score differently."""
    generator = np.random.default_rng(100 * bird + number)
    pixels = generator.normal(128, 60, (*size, 3))
    pixels[..., bird] += 25
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write_birds(folder, counts, birds=BIRDS):
    for offset, (split, count) in enumerate(counts.items()):
        for bird, name in enumerate(birds):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                picture(1000 * offset + number, bird).save(folder / split / name / f"{number:03d}.png")
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Model folders, a folder of birds, and sizes of students."""
    folder = tmp_path_factory.mktemp("tiny")
    save(folder / "model", vit_config(num_hidden_layers=1))
    save(folder / "teacher", vit_config(BIRDS))
    save(folder / "other_labels", vit_config(("a", "b", "c")))
    save(folder / "encoder", vit_config(), kind=ViTModel)
    config = json.loads((folder / "encoder" / "config.json").read_text())
    (folder / "encoder" / "config.json").write_text(
        json.dumps({**config, "architectures": ["ViTForImageClassification"]})
    )
    ViTForImageClassification(vit_config(BIRDS)).save_pretrained(folder / "blind")
    write_birds(folder / "birds", {"train": 16, "test": 8})
    vit = {"model_type": "vit", "image_size": 16, "patch_size": 8, "hidden_size": 8, "num_hidden_layers": 1}
    vit |= {"num_attention_heads": 2, "intermediate_size": 16}
    deit = {**vit, "model_type": "deit", "architectures": ["DeiTForImageClassificationWithTeacher"]}
    levit = {"model_type": "levit", "architectures": ["LevitForImageClassificationWithTeacher"], "image_size": 32}
    levit |= {"hidden_sizes": [16, 24, 32], "num_attention_heads": [2, 2, 2], "depths": [1, 1, 1], "key_dim": [8, 8, 8]}
    resnet = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    resnet |= {"layer_type": "basic"}
    sizes = {"vit": vit, "deit": deit, "levit": levit, "resnet": resnet, "patches": {**vit, "patch_size": 5}}
    sizes |= {"odd": {"model_type": "vit", "num_layerz": 1}, "unknown": {"model_type": "nope"}}
    for name, values in sizes.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
    return folder


def flags(**values):
    words = []
    for name, value in values.items():
        words += [] if value is None else [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def own(tiny, output, **changes):
    """A study on the birds, three classes, one seed."""
    values = {
        "data_dir": tiny / "birds",
        "teacher_start": tiny / "model",
        "student_config": tiny / "vit.yaml",
        "output_dir": output,
        "seeds": 1,
        **bounds(),
        **changes,
    }
    return flags(**values)


def bounds():
    return {"max_steps": 2, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 16, "disable_tqdm": True}


def per_seed(folder):
    return list(csv.DictReader((folder / "results.csv").open()))


def settings_of(folder, name, seed=0):
    return json.loads((folder / "runs" / name / f"seed-{seed}" / "settings.json").read_text())


def logits_of(folder, name, seed=0):
    return load_file(folder / "runs" / name / f"seed-{seed}" / "logits.safetensors")["logits"]


def saved_model(folder, name, seed=0):
    return AutoModelForImageClassification.from_pretrained(folder / "runs" / name / f"seed-{seed}" / "model").eval()


# ---- every YAML ----


@pytest.mark.parametrize("config", STUDIES)
def test_every_study_yaml_runs_two_steps(recipes, tiny, monkeypatch, tmp_path, config):
    """A paper's setting with a misspelt key or a task that is gone is found out on the GPU that was rented for it."""
    monkeypatch.setattr(datasets, "load_dataset", image_hub.load)
    given = yaml.safe_load((CONFIGS / config).read_text())
    words = ["--config", str(CONFIGS / config)] + ([] if "task" in given else flags(task="beans"))
    student = "deit" if given.get("objective") == "deit_token" else "vit"
    changes = {"teacher_start": tiny / "model", "student_config": tiny / f"{student}.yaml", "image_size": 16}
    changes |= {"seeds": 1, "evaluation_rows": 16, "output_dir": tmp_path / "run", "dataloader_num_workers": 0}
    recipes["distill_image"].main([*words, *flags(**changes, **bounds())])
    rows, settings = per_seed(tmp_path / "run"), settings_of(tmp_path / "run", "distilled")
    assert [row["run"] for row in rows] == list(RUNS)
    assert {row["steps"] for row in rows} <= {"1", "2"}, "--max_steps bounds every stage"
    for name in (
        "learning_rate",
        "weight_decay",
        "lr_milestones",
        "optim_args",
        "flip",
        "mixup",
        "crop",
        "max_grad_norm",
    ):
        assert name not in given or settings[name] == given[name]
    for name in ("temperature", "alpha"):
        assert name not in given or f"'{name}': {float(given[name])}" in settings["objective"]


def test_the_papers_settings_are_the_papers():
    """A changed temperature or budget under a paper's name reports another experiment as a replication."""
    kd, dkd, own = (
        yaml.safe_load((CONFIGS / f"distill_image_cifar100_{name}.yaml").read_text())
        for name in ("kd", "dkd", "self_kd")
    )
    solver = {"num_train_epochs": 240, "per_device_train_batch_size": 64, "learning_rate": 0.05, "weight_decay": 5e-4}
    solver |= {
        "lr_milestones": [150, 180, 210],
        "lr_milestone_factor": 0.1,
        "optim": "sgd",
        "optim_args": "momentum=0.9",
    }
    solver |= {"teacher_config": "resnet32x4", "student_config": "resnet8x4", "crop": "pad", "padding": 4, "flip": 0.5}
    for found in (kd, dkd):
        assert {name: found[name] for name in solver} == solver and found["validation_share"] == 0
    assert (kd["objective"], kd["temperature"], kd["alpha"]) == ("kd", 4, 0.9)  # 0.1 CE + 0.9 T^2 KL
    weights, alpha = json.loads(dkd["objective_kwargs"]), dkd["alpha"]
    assert (dkd["objective"], dkd["temperature"]) == ("dkd", 4) and 1 - alpha == pytest.approx(1, abs=0.011)
    assert [alpha * weights[name] for name in ("target_weight", "non_target_weight")] == pytest.approx([1, 8])
    expected = {
        "num_train_epochs": 450,
        "per_device_train_batch_size": 1024,
        "learning_rate": 1.0,
        "weight_decay": 1e-4,
    }
    expected |= {"lr_milestones": [200, 300, 400], "optim_args": "momentum=0.9,nesterov=True", "alpha": 1}
    expected |= {"teacher_config": "resnet56", "student_config": "resnet56"}
    assert {name: own[name] for name in expected} == expected
    assert json.loads(own["objective_kwargs"]) == {"temperature_on": "teacher"}
    assert own["warmup_steps"] * 450 == pytest.approx(15, abs=1e-3) and dkd["warmup_steps"] * 240 == pytest.approx(
        20, abs=0.1
    )


def test_the_study_is_the_demo_with_more_seeds():
    """Two files that drift apart: the settings that were chosen for one would be reported of the other."""
    demo, study = (yaml.safe_load((CONFIGS / f"distill_image_{name}.yaml").read_text()) for name in ("demo", "study"))
    differ = {name for name in demo.keys() | study.keys() if demo.get(name) != study.get(name)}
    assert differ == {"output_dir", "seeds", "teacher_seeds"} and study["seeds"] == study["teacher_seeds"] == 5


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("image_*.yaml")), ids=lambda path: path.stem)
def test_every_config_of_sizes_builds_them(recipes, path):
    """A size that the architecture does not know would be dropped without a word, and another student trained."""
    study = recipes["image_study"]
    recipe = study.StudyArguments()
    network = study.Network(None, str(path), recipe)
    with torch.device("meta"):
        model = network.new(recipes["image_data"].ImageData(None, None, {"": None}, list(BIRDS)))
    sizes = yaml.safe_load(path.read_text())
    named = sizes.pop("architectures", [type(model).__name__])
    assert {name: getattr(model.config, name) for name in sizes} == sizes and type(model).__name__ == named[0]
    side = sizes.get("image_size", 32 if model.config.model_type == "cifar_resnet" else 224)
    assert model.config.id2label == dict(enumerate(BIRDS)) and network.view.size == (side,) * 2


# ---- a study on a folder ----


@pytest.fixture(scope="module")
def study(recipes, tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study") / "run"
    changes = {"max_steps": 30, "learning_rate": 1e-2, "seeds": 3, "alpha": 0.9, "temperature": 2, "crop": "pad"}
    recipes["distill_image"].main(own(tiny, folder, **changes, padding=2, flip=0.5))
    return folder


def test_the_rows_of_every_split_are_saved(study):
    """Without its rows nobody can check that a published score was made on images that training had not seen."""
    saved = load_indices(study / "splits.json")
    assert {name: len(rows) for name, rows in saved.items()} == {"train": 43, "validation": 5, "held_out": 24}
    assert not set(saved["train"]) & set(saved["validation"])  # cut from one split: numbers of the same rows


def test_models_are_saved_with_their_view_and_classes(study):
    """A student that cannot be loaded, that is shown other pixels, or whose classes have no names is no result."""
    for name in RUNS:
        assert saved_model(study, name).config.id2label == dict(enumerate(BIRDS))
        seen = AutoImageProcessor.from_pretrained(study / "runs" / name / "seed-0" / "model", backend="pil")
        assert (dict(seen.size), list(seen.image_mean)) == ({"height": 16, "width": 16}, [0.5] * 3)
    assert not [path for kind in ("*.partial", "*.tmp", "checkpoint-*") for path in study.rglob(kind)]
    assert not (study / "runs" / "baseline" / "seed-1" / "model").exists()
    assert not (study / "teacher_answers").exists(), "an augmented image is another one in every epoch"
    assert (study / "scores.png").stat().st_size > 5000


def test_both_students_share_everything_but_the_objective(study):
    """Another start, order, augmentation or budget of one side would be reported as the effect of distillation."""
    starts = set()
    for seed in range(3):
        baseline, distilled = (settings_of(study, name, seed) for name in ("baseline", "distilled"))
        differ = {name for name in baseline if baseline[name] != distilled[name]}
        assert differ == {"objective", "teacher", "teacher_dtype"} and baseline["crop"] == "pad"
        starts.add(baseline["start"])
    assert len(starts) == 3, "every seed starts from weights of its own"


def test_the_table_equals_the_per_seed_csv(study):
    """A mean of the wrong rows, or an interval that is not paired, is a claim that the data do not make."""
    text, rows = (study / "results.md").read_text(), per_seed(study)
    shown = {"teacher": "teacher", "baseline": "student, labels only", "distilled": "student, distilled"}
    columns = ["accuracy", "agreement", "calibration_error"]
    for run, name in shown.items():
        line = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
        for cell, column in zip(line.strip("| ").split(" | ")[1:], columns, strict=True):
            values = [100 * float(row[column]) for row in rows if row["run"] == run and row[column]]
            mean = f"{statistics.mean(values):.2f}" if values else "–"
            many = f"{mean} ± {statistics.stdev(values):.2f} (n=3)" if len(values) > 1 else f"{mean} (n=1)"
            assert cell == (many if values else "–")
    teacher, baseline, distilled = (
        [100 * float(row["accuracy"]) for row in rows if row["run"] == run] for run in shown
    )
    low, high = stats.ttest_rel(distilled, baseline).confidence_interval(0.95)
    mean = statistics.mean(distilled) - statistics.mean(baseline)
    assert f"paired by seed: {mean:+.2f} [95 %: {low:+.2f}, {high:+.2f}] points" in text
    gap = statistics.mean(teacher) - statistics.mean(baseline)
    assert f"of the means): {f'{100 * mean / gap:.0f} %' if gap > 0 else 'there is no gap'}" in text


def one_by_one(folder, name, images):
    """Logits of a saved model, with its saved processor, one file at a time."""
    model = saved_model(folder, name)
    seen = AutoImageProcessor.from_pretrained(folder / "runs" / name / "seed-0" / "model", backend="pil")
    with torch.no_grad():
        answers = [model(**seen(Image.open(path).convert("RGB"), return_tensors="pt")).logits[0] for path in images]
    return torch.stack(answers).numpy()


def test_scores_equal_those_of_the_saved_models(study, tiny):
    """Logits in another order than the labels give chance accuracy, and agreement with another image's answer."""
    images = sorted((tiny / "birds" / "test").rglob("*.png"))
    names = np.array([path.parent.name for path in images])
    logits = {name: one_by_one(study, name, images) for name in RUNS}
    for row in (row for row in per_seed(study) if row["seed"] == "0"):
        found = logits[row["run"]]
        np.testing.assert_allclose(logits_of(study, row["run"]), found, atol=1e-4)
        assert float(row["accuracy"]) == np.mean(np.array(BIRDS)[found.argmax(1)] == names)
        if row["run"] != "teacher":
            assert float(row["agreement"]) == np.mean(found.argmax(1) == logits["teacher"].argmax(1))


def test_alpha_0_is_the_baseline_bit_for_bit(recipes, tiny, tmp_path):
    """If the distilled side differs where nothing is distilled, the comparison measures the recipe."""
    augmented = {"crop": "resized", "flip": 0.5, "mixup": 0.5, "erasing": 0.5}
    recipes["distill_image"].main(own(tiny, tmp_path / "run", alpha=0, max_steps=4, learning_rate=1e-2, **augmented))
    assert np.array_equal(logits_of(tmp_path / "run", "baseline"), logits_of(tmp_path / "run", "distilled"))


def test_cached_answers_equal_a_teacher_asked_in_every_step(recipes, tiny, tmp_path):
    """Answers to other rows, or to other pixels, would be learned just as readily."""
    logits = []
    for cache in (True, False):
        changes = {"teacher": tiny / "teacher", "teacher_start": None, "cache_teacher": cache, "alpha": 1}
        recipes["distill_image"].main(own(tiny, tmp_path / str(cache), **changes, learning_rate=1e-2, max_steps=6))
        logits.append(logits_of(tmp_path / str(cache), "distilled"))
    assert (tmp_path / "True" / "teacher_answers" / "seed-0").is_dir()
    assert not (tmp_path / "False" / "teacher_answers").exists()
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-5)


@pytest.mark.parametrize("flip", [0, 0.5])
def test_a_teacher_with_a_size_and_normalisation_of_its_own(recipes, tiny, tmp_path, flip):
    """A teacher that is shown the student's pixels answers noise, with and without a cache."""
    save(tmp_path / "teacher", vit_config(BIRDS, image_size=32), processor(32, mean=0.2, std=0.7))
    changes = {"teacher": tmp_path / "teacher", "teacher_start": None, "student_config": "resnet10-xxxs", "flip": flip}
    recipes["distill_image"].main(
        own(tiny, tmp_path / "run", image_mean=[0.1, 0.2, 0.3], image_std=[1, 1, 1], **changes)
    )
    images = sorted((tiny / "birds" / "test").rglob("*.png"))
    seen = AutoImageProcessor.from_pretrained(tmp_path / "teacher", backend="pil")
    model = ViTForImageClassification.from_pretrained(tmp_path / "teacher").eval()
    with torch.no_grad():
        expected = torch.stack([model(**seen(Image.open(path), return_tensors="pt")).logits[0] for path in images])
    np.testing.assert_allclose(logits_of(tmp_path / "run", "teacher"), expected.numpy(), atol=1e-4)
    settings = settings_of(tmp_path / "run", "distilled")
    assert "size=(32, 32), mean=(0.1, 0.2, 0.3)" in settings["student_view"]
    assert "mean=(0.2, 0.2, 0.2), std=(0.7, 0.7, 0.7)" in settings["teacher_view"]
    if not flip:
        answers = datasets.load_from_disk(tmp_path / "run" / "teacher_answers" / "seed-0")
        rows = sorted((tiny / "birds" / "train").rglob("*.png"))
        shown = recipes["image_data"].at_random(datasets.Dataset.from_dict({"path": list(map(str, rows))}), 16)
        with torch.no_grad():
            first = model(**seen(Image.open(shown[0]["path"]), return_tensors="pt")).logits[0]
        np.testing.assert_allclose(answers[0]["teacher_logits"], first.numpy(), atol=1e-4)


def test_the_teachers_classes_in_another_order(recipes, tiny, tmp_path):
    """A teacher that names the classes in another order would teach every student the wrong ones."""
    names = ["owl", "crow", "finch"]
    order = [names.index(bird) for bird in BIRDS]
    first = ViTForImageClassification.from_pretrained(tiny / "teacher")
    second = ViTForImageClassification(vit_config(names))
    second.load_state_dict(first.state_dict())
    with torch.no_grad():
        second.classifier.weight[order] = first.classifier.weight
        second.classifier.bias[order] = first.classifier.bias
    second.save_pretrained(tmp_path / "permuted")
    processor(16).save_pretrained(tmp_path / "permuted")
    found = []
    for teacher in (tiny / "teacher", tmp_path / "permuted"):
        output = tmp_path / f"run-{teacher.name}"
        recipes["distill_image"].main(own(tiny, output, teacher=teacher, teacher_start=None, alpha=1))
        found.append([logits_of(output, name) for name in ("teacher", "distilled")])
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    with pytest.raises(ValueError, match=r"--student_layers copies the head.*\['owl', 'crow', 'finch'\]"):
        words = own(tiny, tmp_path / "cut", teacher=tmp_path / "permuted", teacher_start=None, student_config=None)
        recipes["distill_image"].main([*words, "--student_layers", "1"])


# ---- kinds of networks and objectives ----


@pytest.mark.parametrize("kind", ["deit", "levit"])
@pytest.mark.parametrize("labels", ["hard", "soft"])
def test_a_token_for_the_teacher(recipes, tiny, tmp_path, kind, labels):
    """A head that gets no gradient stays random and halves the prediction; without a teacher both must learn, too."""
    changes = {"student_config": tiny / f"{kind}.yaml", "objective": "deit_token", "mixup": 0.5}
    changes |= {
        "objective_kwargs": json.dumps({"kind": labels}),
        "teacher_config": "resnet10-xxxs",
        "teacher_start": None,
    }
    recipes["distill_image"].main(own(tiny, tmp_path / "run", learning_rate=1e-2, image_size=32, **changes))
    study = recipes["distill_image"].prepare(own(tiny, tmp_path / "again", image_size=32, **changes))[2]
    recipes["image_study"].transformers.set_seed(0)
    start = study.new_student(lambda: None).state_dict()
    for name in ("baseline", "distilled"):
        model = saved_model(tmp_path / "run", name)
        assert type(model).__name__.endswith("ForImageClassificationWithTeacher")
        weights = model.state_dict()
        heads = [key for key in weights if "classifier" in key and key.endswith("weight")]
        assert len(heads) >= 2 and all(not torch.equal(weights[key], start[key]) for key in heads)
    assert f"'kind': '{labels}'" in settings_of(tmp_path / "run", "distilled")["objective"]


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"student_config": "resnet10-xxxs"}, "CifarResNetForImageClassification"),
        ({"student_config": "resnet.yaml", "objective": "dist"}, "ResNetForImageClassification"),
        ({"student_config": None, "student_layers": 1, "objective": "hidden_states"}, "ViTForImageClassification"),
        ({"objective": "hidden_states"}, "ViTForImageClassification"),  # other widths: with a projection
        ({"student_config": None, "student": "model", "objective": "attention_maps"}, "ViTForImageClassification"),
        ({"objective": "relational_kd"}, "ViTForImageClassification"),
        ({"objective": "minilm_relations"}, "ViTForImageClassification"),
        ({"objective": "pseudo_label", "cutmix": 1}, "ViTForImageClassification"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_networks_and_objectives(recipes, tiny, tmp_path, changes, kind):
    """What the first screen promises of networks and objectives fails in front of its first user."""
    places = {name: tiny / name for name in ("model", "resnet.yaml")}
    changes = {name: places.get(value, value) for name, value in changes.items()}
    teacher = {"teacher": tiny / "teacher", "teacher_start": None, "image_size": 16}
    recipes["distill_image"].main(own(tiny, tmp_path / "run", **teacher, **changes))
    model = saved_model(tmp_path / "run", "distilled")
    assert type(model).__name__ == kind and model.config.id2label == dict(enumerate(BIRDS))
    assert np.isfinite(logits_of(tmp_path / "run", "distilled")).all()


def test_self_distillation_starts_from_other_weights_than_its_teacher(recipes, tiny, tmp_path):
    """The student on labels only would be the teacher itself: agreement of 100 %, and a gap of 0 in every run."""
    changes = {"teacher_start": None, "teacher_config": "ResNet10-xxxs", "student_config": "resnet10-xxxs"}
    recipes["distill_image"].main(own(tiny, tmp_path / "run", **changes, max_steps=1))
    starts = [settings_of(tmp_path / "run", name)["start"] for name in RUNS]
    assert starts[1] == starts[2] != starts[0]


def test_sgd_with_momentum_and_milestones_reaches_the_optimizer(recipes, tiny, tmp_path, monkeypatch):
    """Momentum that is parsed and dropped, or milestones of another budget, train another network than the paper's."""
    seen = {}

    class Watched(recipes["runs"].DistillationTrainer):
        def training_step(self, *args, **kwargs):
            group = self.optimizer.param_groups[0]
            name = Path(self.args.output_dir).parent.name
            seen.setdefault(name, []).append(group["lr"])
            seen["optimizer"] = (type(self.optimizer.optimizer).__name__, group["momentum"], group["nesterov"])
            return super().training_step(*args, **kwargs)

    monkeypatch.setattr(recipes["runs"], "DistillationTrainer", Watched)
    changes = {"optim": "sgd", "optim_args": "momentum=0.9,nesterov=True", "learning_rate": 0.1, "max_steps": -1}
    changes |= {"num_train_epochs": 4, "teacher_epochs": 2, "teacher_learning_rate": 0.2, "lr_milestones": [1, 3]}
    words = own(tiny, tmp_path / "run", **changes, warmup_steps=0, train_rows=16)
    recipes["distill_image"].main(words)
    assert seen["optimizer"] == ("SGD", 0.9, True)
    assert seen["distilled"] == seen["baseline"] == pytest.approx([0.1] * 2 + [0.01] * 4 + [0.001] * 2)
    assert seen["teacher"] == pytest.approx([0.2] + [0.02] * 2 + [0.002])
    resumed = [*words, "--resume_from_checkpoint", "True"]
    with pytest.raises(ValueError, match=r"made with other settings.*optim_args.*momentum=0.5"):
        recipes["distill_image"].main([*resumed, "--optim_args", "momentum=0.5"])
    with pytest.raises(ValueError, match=r"made with other settings.*lr_milestones.*\[0.8, 1.6\]"):
        recipes["distill_image"].main([*resumed, "--lr_milestones", "2", "4", "--num_train_epochs", "5"])


def test_a_resumed_study_trains_only_what_is_missing(recipes, tiny, study, tmp_path):
    """Hours are paid twice, or two augmentations are averaged into one row."""
    import shutil

    shutil.copytree(study, tmp_path / "run")
    changes = {"max_steps": 30, "learning_rate": 1e-2, "seeds": 3, "alpha": 0.9, "temperature": 2, "crop": "pad"}
    words = own(tiny, tmp_path / "run", **changes, padding=2, flip=0.5)
    with pytest.raises(FileExistsError, match="--resume_from_checkpoint True, delete it with --overwrite"):
        recipes["distill_image"].main(words)
    gone = tmp_path / "run" / "runs" / "distilled" / "seed-1" / "result.json"
    others = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("result.json") if path != gone}
    before = json.loads(gone.read_text())
    gone.unlink()
    recipes["distill_image"].main([*words, "--resume_from_checkpoint", "True"])
    after = json.loads(gone.read_text())
    assert all(after[name] == before[name] for name in ("accuracy", "agreement", "calibration_error"))
    assert {path: path.stat().st_mtime_ns for path in others} == others
    with pytest.raises(ValueError, match=r"made with other settings.*padding.*2, 3"):
        recipes["distill_image"].main([*words, "--resume_from_checkpoint", "True", "--padding", "3"])


# ---- images as they come ----


def test_grey_transparent_and_damaged_images(recipes, tiny, tmp_path, caplog):
    """One damaged file of thousands ends a run at its last epoch, or is left out without a word."""
    birds = write_birds(tmp_path / "birds", {"train": 8, "test": 4})
    picture(0, 0).convert("L").save(birds / "train" / "owl" / "000.png")
    picture(1, 0).convert("RGBA").save(birds / "train" / "owl" / "001.png")
    whole = (birds / "test" / "crow" / "002.png").read_bytes()
    (birds / "test" / "crow" / "002.png").write_bytes(whole[: len(whole) // 2])
    words = own(tiny, tmp_path / "run", data_dir=birds, max_steps=3)
    with pytest.raises(ValueError, match=r"(?s)1 of \d+ images cannot be read.*crow/002.png.*--skip_bad_images"):
        recipes["distill_image"].prepare(words)
    assert not (tmp_path / "run").exists()
    recipes["distill_image"].main([*words, "--skip_bad_images"])
    assert {len(logits_of(tmp_path / "run", name)) for name in RUNS} == {11}
    assert "crow/002.png" in caplog.text and "1 of mode L" in caplog.text and "1 of mode RGBA" in caplog.text


# ---- wrong inputs ----

WRONG = {
    "no data": ({"data_dir": None, "profile": "task"}, ValueError, "no data: give --task"),
    "unknown task": ({"data_dir": None, "task": "nope"}, ValueError, "unknown task 'nope'"),
    "missing folder": ({"data_dir": "nowhere"}, FileNotFoundError, "no folder nowhere"),
    "classes differ": ({"data_dir": "differ"}, ValueError, r"class folders of test differ.*\['owl'\].*\['raven'\]"),
    "two students": (
        {"student_layers": 1},
        ValueError,
        "one student is needed, given: .*vit.yaml and --student_layers 1",
    ),
    "no student": ({"student_config": None}, ValueError, "one student is needed, given: none; choose --student"),
    "two teachers": ({"teacher": "teacher"}, ValueError, "one teacher is needed, given: .*--teacher_start"),
    "no teacher": ({"teacher_start": None}, ValueError, "one teacher is needed, given: none.*--teacher_config"),
    "other classes": (
        {"teacher": "other_labels", "teacher_start": None},
        ValueError,
        "student's classes are.*teacher's",
    ),
    "teacher without a head": ({"teacher": "encoder", "teacher_start": None}, ValueError, "lacks weights"),
    "no processor": ({"teacher": "blind", "teacher_start": None}, OSError, "no image processor.*--image_size"),
    "hub id": ({"teacher": "no-such/model", "teacher_start": None}, OSError, "no-such/model.*nor reachable"),
    "patches": ({"student_config": "patches.yaml"}, ValueError, "16 x 16 are no whole number of its patches of 5 x 5"),
    "pretrained at another size": (
        {"image_size": 24},
        ValueError,
        r"teacher \(ViTFor.*cannot read images of 24 x 24.*16",
    ),
    "size": ({"image_size": 0}, ValueError, "--image_size must be 1 or more, got 0"),
    "unknown size": ({"student_config": "odd.yaml"}, ValueError, "vit has no num_layerz"),
    "unknown model type": ({"student_config": "unknown.yaml"}, ValueError, "no model_type 'nope'"),
    "no such network": ({"student_config": "resnet21"}, FileNotFoundError, "no network 'resnet21'.*resnet20"),
    "split": ({"evaluate_on": "validation", "validation_share": 0}, ValueError, "no validation split"),
    "alpha": ({"alpha": 2}, ValueError, r"alpha .* must lie in \[0, 1\], got 2"),
    "objective": ({"objective": "nope"}, ValueError, "objective 'nope' is unknown"),
    "labels alone": ({"objective": "cross_entropy"}, ValueError, "asks no teacher"),
    "class margins": ({"objective": "ada_margin"}, ValueError, "AdaMargin learns .* recipes/teachers_pet.py"),
    "class weights": ({"objective": "group_dro"}, ValueError, "group_dro asks no teacher.*teachers_pet.py"),
    "words": ({"objective": "masked_lm"}, ValueError, "masked_lm asks no teacher"),
    "one head": ({"objective": "deit_token"}, ValueError, "DeiTToken needs a student that answers cls_logits"),
    "mixed labels": ({"objective": "dkd", "mixup": 1}, ValueError, "DKD .* leave mixup and cutmix off"),
    "feature maps": (
        {"objective": "relational_kd", "student_config": "resnet10-xxxs"},
        ValueError,
        "RelationalKD compares tokens, and the student's .* convolutional",
    ),
    "no layers": (
        {"objective": "hidden_states", "student_config": "resnet10-xxxs"},
        ValueError,
        "no num_hidden_layers",
    ),
    "tokens": (
        {"objective": "hidden_states", "student_config": "vit.yaml", "image_size": None, "teacher": "large"},
        ValueError,
        "the student has 5 tokens, the teacher 17",
    ),
    "crop": ({"crop": "random"}, ValueError, "crop must be one of"),
    "padding": ({"crop": "pad", "padding": 40}, ValueError, "padding=40"),
    "flip": ({"flip": 2}, ValueError, "flip is a probability"),
    "seeds": ({"seeds": 0}, ValueError, "--seeds must be 1 or more, got 0"),
    "milestones": ({"lr_milestones": [300]}, ValueError, "lr_milestones are epochs in ascending order"),
    "profile": ({"profile": "huge"}, ValueError, "demo, study or task"),
    "resume": ({"resume_from_checkpoint": "checkpoint-5"}, ValueError, "takes True"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_inputs_say_what_to_do(recipes, tiny, tmp_path, case):
    """An error an hour into the run, or one that names a tensor shape, sends people back to copied snippets."""
    changes, kind, message = WRONG[case]
    if case == "classes differ":
        write_birds(tmp_path / "differ", {"train": 2})
        write_birds(tmp_path / "differ", {"test": 2}, ("crow", "finch", "raven"))
    if case == "tokens":
        save(tmp_path / "large", vit_config(BIRDS, image_size=32), processor(32))
        changes = {**changes, "teacher_start": None}
    places = {path.name: path for folder in (tiny, tmp_path) for path in folder.iterdir()}
    changes = {name: places.get(value, value) if isinstance(value, str) else value for name, value in changes.items()}
    with pytest.raises(kind, match=f"(?s){message}"):
        recipes["distill_image"].prepare(own(tiny, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir()), "nothing is left behind"


def test_a_flag_takes_the_place_of_a_files_choice(recipes, tiny):
    """`--profile demo --teacher X` that trains the demo's own teacher reports another model than the command names."""
    words = flags(
        profile="demo", teacher=tiny / "teacher", student=tiny / "model", data_dir=tiny / "birds", crop="none"
    )
    recipe, args = recipes["distill_image"].parse(words)
    assert (recipe.task, recipe.teacher_config, recipe.student_config) == (None, None, None)
    assert (recipe.teacher, recipe.student) == (str(tiny / "teacher"), str(tiny / "model"))
    assert recipes["image_data"].augmentation_of(recipe) is None and args.alpha is not None


# ---- as programs ----


@pytest.mark.launch
def test_a_program_and_a_wrong_input(tiny, tmp_path):
    """What works in-process may still fail as a program; a stack of calls hides the one sentence that helps."""
    words = own(tiny, tmp_path / "run", seeds=2)
    done = launching.run(RECIPES / "distill_image.py", *words, log=tmp_path / "log")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "| student, distilled |" in done.stderr and "paired by seed" in done.stderr
    words = own(tiny, tmp_path / "run", alpha=2, overwrite=True)
    wrong = launching.run(RECIPES / "distill_image.py", *words, log=tmp_path / "log")
    last = wrong.stderr.strip().splitlines()[-1]
    assert wrong.returncode == 1 and last.startswith("distill_image.py: alpha is the weight")
    assert "Traceback" not in wrong.stderr and (tmp_path / "run" / "results.csv").exists()


def test_every_seed_draws_crops_of_its_own(recipes):
    """Seeds that share their crops look more alike than runs are, and the intervals of every table come out too narrow."""
    seeded = recipes["runs"].seeded
    augmenting = ImageCollator(PixelView((8, 8)), augmentation=Augmentation(crop="pad", padding=2))
    rows = [{"image": Image.new("RGB", (8, 8)), "example_id": number} for number in range(8)]
    draws = [seeded(augmenting, seed)(rows)["draws"] for seed in (0, 1, 1)]
    assert not np.array_equal(draws[0], draws[1]) and np.array_equal(draws[1], draws[2])
    assert augmenting.seed == 0
