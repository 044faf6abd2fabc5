"""MC-Distil's study as users start the recipe: tiny networks on digits, every method, every YAML, wrong inputs."""

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
from PIL import Image as Picture
from safetensors.torch import load_file
from transformers import RobertaForSequenceClassification

import image_hub
from hfkd.data.splits import load_indices
from hfkd.outputs import TeacherOutput
from hfkd.testing import tiny_roberta_config, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[1]
RECIPES, CONFIGS = ROOT / "recipes", ROOT / "recipes" / "configs"
MODULES = ("mc_data", "mc_study", "mc_baselines", "mc_distil", "mc_search", "corruptions", "group_runs", "runs")
LITERATURE = ("cifar100", "instance_cifar100", "tiny_imagenet", "imagenet", "iwildcam", "clothing1m")
STUDENTS = ["resnet10-xxxs", "resnet10-xxs"]


@pytest.fixture(scope="module")
def recipes():
    """The modules by name, imported from the folder as the programs import each other."""
    sys.path.insert(0, str(RECIPES))
    yield {name: importlib.import_module(name) for name in MODULES}
    sys.path.remove(str(RECIPES))


def flags(**values):
    words = []
    for name, value in values.items():
        words += [] if value is None else [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def tiny(output, **changes):
    """A trial on the 8 x 8 digits: two steps."""
    values = {
        "task": "digits",
        "image_size": 8,
        "train_rows": 90,
        "meta_rows": 30,
        "evaluation_rows": 40,
        "corruption_rows": 10,
        "teacher_config": "resnet10-xxs",
        "students": STUDENTS,
        "seeds": 1,
        "output_dir": output,
        "max_steps": 2,
        "num_train_epochs": 3,
        "per_device_train_batch_size": 20,
        "per_device_eval_batch_size": 40,
        "optim": "sgd",
        "optim_args": "momentum=0.9",
        "learning_rate": 0.05,
        "coordinator_interval": 1,
        "amal_interval": 1,
        "logging_steps": 1,
        "disable_tqdm": True,
        "save_strategy": "no",
        "report_to": "none",
        **changes,
    }
    return flags(**values)


@pytest.fixture(scope="module")
def study(recipes, tmp_path_factory):
    """Every method once, two seeds, wrong labels too."""
    folder = tmp_path_factory.mktemp("study") / "run"
    words = tiny(
        folder, methods=list(recipes["mc_study"].METHODS), seeds=2, noise_rate=0.2, noise_methods=["kd", "mc_distil"]
    )
    recipes["mc_distil"].main(words)
    return folder, words


def per_seed(folder):
    return list(csv.DictReader((folder / "results.csv").open()))


def settings_of(folder, name, seed=0):
    return json.loads((folder / "runs" / name / f"seed-{seed}" / "settings.json").read_text())


def logits_of(folder, name, seed=0, prefix=""):
    return load_file(folder / "runs" / name / f"seed-{seed}" / "logits.safetensors")[f"{prefix}logits"]


def resumed(recipes, words, **changes):
    return recipes["mc_distil"].prepare([*words, "--resume_from_checkpoint", "True", *flags(**changes)])


# ---- every YAML ----


@pytest.mark.parametrize("name", LITERATURE)
def test_every_yaml_runs_two_steps(recipes, monkeypatch, tmp_path, name):
    """A paper's setting with a misspelt key or a task that is gone is found out on the GPU that was rented for it."""
    monkeypatch.setattr(datasets, "load_dataset", image_hub.load)
    path = CONFIGS / f"mc_distil_{name}.yaml"
    given = yaml.safe_load(path.read_text())
    changes = {"students": STUDENTS, "teacher_config": STUDENTS[0]}
    changes["per_device_train_batch_size"] = 4 if given["image_size"] < 200 else 2
    changes |= {"max_steps": 2, "seeds": 1, "evaluation_rows": 4, "corruption_rows": 2, "save_strategy": "no"}
    changes |= {"output_dir": tmp_path / "run", "disable_tqdm": True, "report_to": "none", "dataloader_num_workers": 0}
    changes |= {"methods": None, "noise_methods": ["mc_distil"], "coordinator_interval": 1, "warm_start": "none"}
    changes |= {"methods": ["mc_distil"]} if given["methods"] else {}
    if given["image_size"] > 100:  # a stem for large images, or this is half of the file's time
        sizes = {"model_type": "resnet", "layer_type": "basic", "embedding_size": 4, "depths": [1, 1]}
        for number in (4, 8):
            (tmp_path / f"s{number}.yaml").write_text(yaml.safe_dump({**sizes, "hidden_sizes": [number, number]}))
        changes |= {"students": [tmp_path / "s4.yaml", tmp_path / "s8.yaml"], "teacher_config": tmp_path / "s8.yaml"}
    if given["meta_rows"]:
        changes["meta_rows"] = 4
    if name in ("iwildcam", "clothing1m"):
        changes["data_dir"] = class_folders(tmp_path, 182 if name == "iwildcam" else 14)
    recipes["mc_distil"].main(["--config", str(path), *flags(**changes)])
    run = "mc_distil" if given["methods"] else "mc_distil-noise0.2"
    settings, logits = settings_of(tmp_path / "run", run), logits_of(tmp_path / "run", run)
    classes = {"tiny_imagenet": 200, "imagenet": 1000, "iwildcam": 182, "clothing1m": 14}.get(name, 100)
    assert logits.shape == (4, 2, classes) and settings["image_size"] == [given["image_size"]] * 2
    for key in ("learning_rate", "weight_decay", "optim_args", "flip", "crop", "max_grad_norm"):
        assert settings[key] == given[key], key


def class_folders(folder, classes):
    """One picture of every class in train, two in validation and test of the first."""
    picture = Picture.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    for split in ("train", "validation", "test"):
        for number in range(classes):
            place = folder / "data" / split / f"class{number:03d}"
            place.mkdir(parents=True)
            for row in range(1 if number else 4):
                pixel = picture.copy()
                pixel.putpixel((0, 0), (number % 256, row, len(split)))  # no row stands in two splits
                pixel.save(place / f"{row}.png")
    return folder / "data"


def test_the_papers_settings_are_the_papers():
    """A changed temperature or budget under a paper's name reports another experiment as a replication."""
    solver = {"temperature": 2, "per_device_train_batch_size": 400, "optim": "sgd", "lr_scheduler_type": "cosine"}
    solver |= {"learning_rate": 0.05, "weight_decay": 1e-4, "optim_args": "momentum=0.95", "kd_alpha": 0.5}
    solver |= {"coordinator_interval": 20, "coordinator_learning_rate": 1e-3, "coordinator_weight_decay": 1e-4}
    epochs = {"imagenet": 100, "iwildcam": 100}
    for name in LITERATURE:
        given = yaml.safe_load((CONFIGS / f"mc_distil_{name}.yaml").read_text())
        assert {key: given[key] for key in solver} == solver and given["warm_start"] == "ce"
        assert given["num_train_epochs"] == epochs.get(name, 300)


def test_the_study_is_the_demo_with_more(recipes):
    """Two files that drift apart: the settings that were chosen for one would be reported of the other."""
    demo, study = (yaml.safe_load((CONFIGS / f"mc_distil_{name}.yaml").read_text()) for name in ("demo", "study"))
    differ = {name for name in demo.keys() | study.keys() if demo.get(name) != study.get(name)}
    assert differ == {"output_dir", "seeds", "students", "methods", "noise_rate"} and study["seeds"] >= 3
    assert set(study["methods"]) == set(recipes["mc_study"].METHODS) and len(study["students"]) == 4


# ---- rows ----


def test_train_meta_and_test_share_no_row(recipes, study):
    """A coordinator that is judged on training or test rows learns to flatter the table."""
    saved = load_indices(study[0] / "splits.json")
    train, meta, test, validation = (set(saved[name]) for name in ("train", "meta", "held_out", "validation"))
    assert len(train) == 40 and len(meta) == 30 and len(test) == 40
    assert not (train & meta or train & test or meta & test or validation & (train | meta | test))


def test_baselines_leave_the_meta_rows_alone_unless_told(recipes, study, tmp_path):
    """A baseline with a tenth more rows, or a tenth fewer than the table says, is not the same budget."""
    prepared = resumed(recipes, study[1])
    rows = {method: len(prepared.rows(method, 0.0, 0).train) for method in ("ce", "kd", "mc_distil", "warm", "teacher")}
    assert set(rows.values()) == {40}
    prepared = recipes["mc_distil"].prepare(tiny(tmp_path / "run", baselines_use_meta_rows=True))
    rows = {method: len(prepared.rows(method, 0.0, 0).train) for method in ("ce", "kd", "amal", "warm", "teacher")}
    assert rows == {"ce": 70, "kd": 70, "amal": 40, "warm": 40, "teacher": 40}


def test_wrong_labels_are_counted_and_meta_and_test_stay_right(recipes, study):
    """Wrong labels in the meta set, or in the test set, turn the robustness that is reported upside down."""
    prepared = resumed(recipes, study[1])
    clean, noisy = (np.asarray(prepared.rows("kd", rate, 1).train["label"][:]) for rate in (0.0, 0.2))
    wrong = clean != noisy
    assert [wrong[clean == c].sum() for c in range(10)] == [round(0.2 * (clean == c).sum()) for c in range(10)]
    assert noisy.tolist() != prepared.rows("kd", 0.2, 0).train["label"][:], "another seed has other wrong labels"
    np.testing.assert_array_equal(noisy, prepared.rows("mc_distil", 0.2, 1).train["label"][:])
    np.testing.assert_array_equal(noisy, prepared.rows("teacher", 0.2, 1).train["label"][:])
    for method in ("kd", "mc_distil"):
        assert prepared.rows(method, 0.2, 1).held_out == prepared.view.held_out
    run = prepared.run("mc_distil", 0.2, 1)
    assert run.meta is prepared.found.meta and set(run.meta["label"][:]) == set(range(10))


# ---- methods ----


def test_every_method_of_every_seed_and_student(study):
    """A student that is missing from the table, or stands there twice, is not noticed among so many."""
    found = [(row["method"], float(row["noise_rate"]), row["seed"], row["student"]) for row in per_seed(study[0])]
    clean = ("warm", "ce", "kd", "mc_distil", "meta_k1", "dml", "takd", "dgkd", "amal", "fixed")
    blocks = {0.0: clean, 0.2: ("warm", "kd", "mc_distil")}
    expected = {(m, rate, s, name) for rate, ms in blocks.items() for m in ms for s in "01" for name in STUDENTS}
    expected |= {("teacher", rate, seed, "teacher") for rate in blocks for seed in "01"}
    assert len(found) == len(set(found)) and set(found) == expected


def test_methods_share_everything_but_the_method(study):
    """Another start, order, budget or optimizer for one method would be reported as its effect."""
    folder, _ = study
    own = {"objective", "teacher", "teacher_dtype", "weights"}
    moved = {
        "coordinator_interval",
        "coordinator_interval_unit",
        "coordinator_learning_rate",
        "coordinator_weight_decay",
    }
    moved |= {"meta_engine", "meta_order", "meta_batch_size", "meta_augmentation", "meta_rows"}
    for seed in range(2):
        first = settings_of(folder, "ce", seed)
        for name in ("kd", "mc_distil", "meta_k1", "dml", "dgkd", "amal", "fixed"):
            other = settings_of(folder, name, seed)
            differ = {key for key in first.keys() | other.keys() if first.get(key) != other.get(key)}
            assert differ <= (own | moved if name in ("mc_distil", "meta_k1", "amal") else own), name
        chain = settings_of(folder, "takd-resnet10-xxxs", seed)
        assert {key for key in first if first[key] != chain[key]} == {
            "objective",
            "teacher",
            "weights",
            "students",
            "start",
        }
    assert settings_of(folder, "ce", 0)["start"] != settings_of(folder, "ce", 1)["start"]


def test_all_start_from_the_warm_students(recipes, study):
    """A method that starts anew while the baseline goes on has half of its budget."""
    prepared = resumed(recipes, study[1])
    start = prepared.run("mc_distil", 0.0, 1).model().state_dict()
    for name in STUDENTS:
        saved = load_file(study[0] / "runs/warm/seed-1/model" / name / "model.safetensors")
        assert saved and all(torch.equal(start[f"students.{name}.{key}"], value) for key, value in saved.items())
    alone = prepared.start(0.0, 1, STUDENTS[1:]).state_dict()
    assert all(torch.equal(start[key], value) for key, value in alone.items())


def test_a_group_of_constant_weights_is_the_separate_run(recipes, study):
    """If a student's KD depended on who else is in the group, the table would compare groups, not methods."""
    folder, words = study
    prepared = resumed(recipes, words)
    run = prepared.run("kd", 0.0, 0)
    whole = logits_of(folder, "kd")
    alone = prepared.group_run("kd-alone", 0.0, 0, STUDENTS[1:])
    alone.objective, alone.asked, alone.teacher_hash = prepared.objective("kd"), run.asked, run.teacher_hash
    alone.weights, alone.weighted_by = run.weights, run.weighted_by
    prepared.runs.result(alone)
    torch.testing.assert_close(logits_of(folder, "kd-alone")[:, 0], whole[:, 1], rtol=1e-5, atol=1e-5)


def test_students_with_coordinators_apart_do_not_teach_each_other(recipes, study):
    """meta_k1 is the ablation of the collaboration: one shared number would leave half of it on."""
    folder, words = study
    prepared = resumed(recipes, words)
    whole = logits_of(folder, "meta_k1")
    run, alone = prepared.run("meta_k1", 0.0, 0), prepared.group_run("meta-alone", 0.0, 0, STUDENTS[:1])
    alone.objective, alone.asked, alone.teacher_hash = prepared.objective("meta_k1"), run.asked, run.teacher_hash
    alone.weights, alone.weighted_by, alone.meta = lambda: prepared.network(0, 0), "one", run.meta
    prepared.runs.result(alone)
    torch.testing.assert_close(logits_of(folder, "meta-alone")[:, 0], whole[:, 0], rtol=1e-5, atol=1e-5)
    together = logits_of(folder, "mc_distil")
    assert not torch.allclose(together[:, 1], whole[:, 1], rtol=1e-6, atol=1e-6), (
        "a shared coordinator is another method"
    )


def test_dgkd_is_the_sum_over_teacher_and_larger_students(recipes):
    """A target of a smaller student, or the labels' loss once instead of n_k times, is another method under this name."""
    generator = torch.Generator().manual_seed(0)
    batch, students, classes, temperature, a = 3, 3, 4, 2.0, 0.3
    ours, guides = (torch.randn(batch, students, classes, generator=generator, dtype=torch.float64) for _ in range(2))
    given = torch.randn(batch, classes, generator=generator, dtype=torch.float64)
    larger = [[False, True, True], [False, False, True], [False, False, False]]
    objective = recipes["mc_baselines"].DenselyGuided(temperature, larger)
    objective.meet(["a", "b", "c"])
    labels, counts = torch.tensor([1, 0, 3]), [3, 2, 1]
    weights = torch.tensor([[n * (1 - a), a] for n in counts], dtype=torch.float64).expand(batch, -1, -1)
    student = type("Output", (), {"logits": ours, "weights": weights})
    terms = objective(student, TeacherOutput(logits=given, features=guides), {"labels": labels})
    for k, name in enumerate("abc"):
        for i in range(batch):
            targets = [given[i], *(guides[i, j] for j in range(students) if larger[k][j])]
            assert len(targets) == counts[k]
            loss = -counts[k] * (1 - a) * torch.log(ours[i, k].exp() / ours[i, k].exp().sum())[labels[i]]
            q = (ours[i, k] / temperature).exp() / (ours[i, k] / temperature).exp().sum()
            for target in targets:
                p = (target / temperature).exp() / (target / temperature).exp().sum()
                loss = loss + a * temperature**2 * sum(p[c] * (p[c] / q[c]).log() for c in range(classes))
            found = terms[f"{name}_task_loss"][i] + terms[f"{name}_distill_loss"][i]
            torch.testing.assert_close(found, loss, rtol=1e-12, atol=1e-12)


def test_dgkds_guides_are_the_warm_students_and_the_teacher(recipes, study):
    """Guides that are still random, or that move with the students, teach noise under a method's name."""
    prepared = resumed(recipes, study[1])
    teacher, _ = prepared.run("dgkd", 0.0, 0).asked()
    collator = prepared.view.collator
    batch = collator.on_device(collator([prepared.view.held_out[""][i] for i in range(40)]))
    teacher.prepare(prepared.start(0.0, 0, STUDENTS), {"teacher"}, "cpu")
    answer = teacher(batch)
    torch.testing.assert_close(answer.logits, logits_of(study[0], "teacher", 1000)[:, 0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(answer.features, logits_of(study[0], "warm"), rtol=1e-4, atol=1e-4)
    assert prepared.larger() == [[False, True], [False, False]]
    assert prepared.constants("dgkd") == {"task": {STUDENTS[0]: 1.0, STUDENTS[1]: 0.5}, "distill": 0.5}


def test_takd_is_a_chain(recipes, study):
    """A smallest student that is distilled from the teacher itself is plain KD under another name."""
    folder, words = study
    kd = folder / "runs/kd/seed-0/model/resnet10-xxs"
    prepared = resumed(recipes, words)
    digest = recipes["mc_study"].digest_of(prepared.load(str(kd)))
    assert settings_of(folder, "takd-resnet10-xxxs")["teacher"] == digest
    rows = {(r["method"], r["student"]): r for r in per_seed(folder) if r["seed"] == "0" and r["noise_rate"] == "0.0"}
    assert rows["takd", "resnet10-xxs"]["accuracy"] == rows["kd", "resnet10-xxs"]["accuracy"]


def test_amal_moves_its_table_by_the_last_layer(recipes, study):
    """A table that never moves is the method of hand-set weights, which stands beside it."""
    folder, _ = study
    table = load_file(folder / "runs/amal/seed-0/model/coordinator.safetensors")["table"]
    assert table.shape == (40, 2, 2) and settings_of(folder, "amal")["meta_engine"] == "last_layer"
    start = torch.tensor([0.1, 0.9])
    assert not torch.equal(table, start.expand_as(table)) and float(table.min()) >= 0 and float(table.max()) <= 2
    assert (
        settings_of(folder, "fixed")["weights"]
        == f"constant { ({'task': dict.fromkeys(STUDENTS, 1 - 0.9), 'distill': dict.fromkeys(STUDENTS, 0.9)}) }"
    )


# ---- scores ----


def test_scores_are_recounted(recipes, study):
    """Logits of another student in a column, or top-5 of the wrong end, rank the methods at random."""
    folder, words = study
    prepared = resumed(recipes, words)
    labels, few = (torch.tensor(prepared.view.held_out[name]["label"][:]) for name in ("", "jpeg_"))
    for row in per_seed(folder):
        if row["method"] in ("teacher", "takd"):
            continue
        run = row["method"] + ("" if row["noise_rate"] == "0.0" else "-noise0.2")
        found = logits_of(folder, run, int(row["seed"]))[:, STUDENTS.index(row["student"])]
        assert float(row["accuracy"]) == pytest.approx((found.argmax(-1) == labels).double().mean().item())
        rank = (found > found.gather(1, labels[:, None])).sum(1)
        assert float(row["top5"]) == pytest.approx((rank < 5).double().mean().item())
        damaged = logits_of(folder, run, int(row["seed"]), "jpeg_")[:, STUDENTS.index(row["student"])]
        assert float(row["jpeg_accuracy"]) == pytest.approx((damaged.argmax(-1) == few).double().mean().item())


def test_the_tables_equal_the_per_seed_csv(study):
    """A mean over the wrong students, or a gain that is not paired by seed, is a claim the data do not make."""
    folder, _ = study
    rows, text = per_seed(folder), (folder / "results.md").read_text()
    first = text.split("\n\n")[0].splitlines()

    def mean(method, student=None):
        kept = [
            r for r in rows if (r["method"], r["noise_rate"]) == (method, "0.0") and student in (None, r["student"])
        ]
        return statistics.mean(100 * float(r["accuracy"]) for r in kept)

    assert split(first[0]) == ["top-1 (%)", *STUDENTS, "mean", "- kd"] and len(first) == 12
    for line in first[3:]:
        method, *cells = split(line)
        shown = [mean(method, name) for name in STUDENTS] + [mean(method)]
        for cell, value in zip(cells, shown, strict=False):
            assert float(cell.split(" ± ")[0]) == pytest.approx(value, abs=0.005001)
        if method != "kd":
            assert float(cells[-1].split(" [")[0]) == pytest.approx(mean(method) - mean("kd"), abs=0.0051)
    assert split(first[4])[-1] == "–", "the difference of kd to itself"
    assert "top-5 (%), 20 % of the training labels wrong" in text and "Gaussian noise, std 0.26" in text


def split(line):
    return line.strip("| ").split(" | ")


def test_what_the_coordinator_costs_is_reported(study):
    """An overhead that is not measured in the same run is another machine's."""
    folder, _ = study
    rows = [row for row in per_seed(folder) if row["noise_rate"] == "0.0"]
    for row in rows:
        assert bool(row["meta_seconds_per_step"]) == (row["method"] in ("mc_distil", "meta_k1", "amal"))
        if row["method"] == "mc_distil":
            assert 0 < float(row["meta_seconds_per_step"]) < float(row["seconds_per_step"])
    assert (
        "The coordinator of mc_distil (every 1 steps, order reference, engine jvp)"
        in (folder / "results.md").read_text()
    )


def test_figures_are_drawn(study):
    """A study of an hour without its figure is run again."""
    for name in ("scores", "weights", "scores_noise0.2", "weights_noise0.2"):
        with Picture.open(study[0] / f"{name}.png") as picture:
            assert min(picture.size) > 300


def test_the_weights_figure_shows_the_quartiles(recipes, tmp_path):
    """Bands that are swapped, or a panel on its own scale, show a coordinator that tells students apart where it does not."""
    from hfkd.diagnostics import plots

    points = {1: (0.1, 0.2, 0.4), 5: (0.3, 0.5, 0.9)}
    figure = plots.weight_quartiles({"a": {"task": points}, "b": {"distill": {1: (0.0, 0.1, 0.2)}}}, tmp_path / "a.png")
    left, right = figure.axes
    assert left.get_ylim() == right.get_ylim() and left.lines[0].get_ydata().tolist() == [0.2, 0.5]
    assert sorted({round(y, 3) for _, y in left.collections[0].get_paths()[0].vertices}) == [0.1, 0.3, 0.4, 0.9]
    assert left.lines[0].get_color() != right.lines[0].get_color()
    with pytest.raises(ValueError, match="weights"):
        plots.weight_quartiles({}, tmp_path / "b.png")
    logs = [[{"step": 1, "s_task_weight_q25": 0.1, "s_task_weight_q50": 0.2, "s_task_weight_q75": 0.3}, {"step": 2}]]
    logs += [[{"step": 1, "s_task_weight_q25": 0.3, "s_task_weight_q50": 0.4, "s_task_weight_q75": 0.5}]]
    assert recipes["mc_distil"].quartiles(logs, "s_task_weight") == {1: pytest.approx((0.2, 0.3, 0.4))}


def test_damage_is_what_its_name_says(recipes):
    """A corruption that leaves images as they are reports a robustness that nobody has."""
    corruptions = recipes["corruptions"]
    pixels = np.full((2, 14, 14, 3), 128, np.uint8)
    pixels[:, 4:9, 4:9] = 230
    changed = {kind: corruptions.corrupted(pixels, kind) for kind in corruptions.SEVERITIES}
    for kind, found in changed.items():
        assert found.dtype == np.uint8 and found.shape == pixels.shape and (found != pixels).any(), kind
        np.testing.assert_array_equal(found, corruptions.corrupted(pixels, kind))
    inside = changed["contrast"][0, 6, 6, 0] - changed["contrast"][0, 0, 0, 0]
    assert inside == pytest.approx(0.3 * (230 - 128), abs=1.0)
    flat = np.full((1, 200, 200, 3), 128, np.uint8)
    above = np.quantile(corruptions.corrupted(flat, "noise") / 255, 0.8413)  # one standard deviation
    assert above - 128 / 255 == pytest.approx(0.26, abs=0.01)
    edge = np.zeros((1, 31, 31, 3), np.uint8)
    edge[:, :, 16:] = 255
    blurred = corruptions.corrupted(edge, "blur")[0, 15, :, 0] / 255
    exact = [0.5 * (1 + torch.erf(torch.tensor((x - 15.5) / 2**0.5)).item()) for x in range(31)]
    np.testing.assert_allclose(blurred, exact, atol=0.02)


# ---- resume ----


def test_a_stopped_study_trains_only_what_is_missing(recipes, study, monkeypatch):
    """Runs that are trained again cost the afternoon that resuming is for."""
    folder, words = study
    before = (folder / "results.csv").read_text()
    (folder / "runs/meta_k1/seed-1/result.json").unlink()
    trained, train = [], recipes["runs"].Runs.train

    def counted(self, run, model, place):
        trained.append((run.name, run.seed))
        return train(self, run, model, place)

    monkeypatch.setattr(recipes["runs"].Runs, "train", counted)
    more = [*words, "--resume_from_checkpoint", "True"]
    recipes["mc_distil"].main(more)
    assert trained == [("meta_k1", 1)]
    costs = ("seconds_per_step", "peak_mib", "meta_seconds_per_step")
    old = [{n: v for n, v in r.items() if n not in costs} for r in csv.DictReader(before.splitlines())]
    now = [{n: v for n, v in r.items() if n not in costs} for r in per_seed(folder)]
    assert old == now, "what was trained again is what it was"
    with pytest.raises(ValueError, match="other settings"):
        recipes["mc_distil"].main([*more, "--coordinator_output", "raw"])


# ---- other ways in ----


def test_a_given_teacher_is_scored_and_not_trained(recipes, study, tmp_path):
    """A teacher that is trained on while it is scored is another one than was given."""
    folder = study[0] / "runs/teacher/seed-1000/model/teacher"
    words = tiny(tmp_path / "run", teacher_config=None, teacher=folder, methods=["kd"], warm_start="none")
    recipes["mc_distil"].main(words)
    row = next(row for row in per_seed(tmp_path / "run") if row["method"] == "teacher")
    first = next(r for r in per_seed(study[0]) if (r["method"], r["seed"], r["noise_rate"]) == ("teacher", "0", "0.0"))
    assert row["accuracy"] == first["accuracy"] and not list((tmp_path / "run/runs/teacher").glob("*/model"))
    assert {row["method"] for row in per_seed(tmp_path / "run")} == {"teacher", "kd"}


def test_the_papers_grid_is_searched(recipes, tmp_path, capsys):
    """A momentum that never reaches the optimizer makes a search of 24 settings one of 6."""
    seen = []
    step = torch.optim.SGD.step

    def noted(self, *args, **kwargs):
        seen.append((self.param_groups[0]["momentum"], self.param_groups[0]["weight_decay"]))
        return step(self, *args, **kwargs)

    torch.optim.SGD.step = noted
    try:
        recipes["mc_distil"].main(
            tiny(tmp_path / "run", methods=["mc_distil"], search=3, warm_start="none", train_rows=70)
        )
    finally:
        torch.optim.SGD.step = step
    found = json.loads((tmp_path / "run/search.json").read_text())["mc_distil"]
    grid = recipes["mc_search"].GRID
    tried = {pair for pair in seen if pair[0] != 0.9}  # the teacher's
    assert len(tried) > 1 and all(m in grid["momentum"] and d in grid["weight_decay"] for m, d in tried)
    assert found["settings"].keys() == grid.keys() and 0 <= found["accuracy"] <= 1
    assert "momentum" in capsys.readouterr().out and not (tmp_path / "run/results.csv").exists()


def test_texts(recipes, tmp_path):
    """The recipe is said to be for texts too."""
    words = [f"w{number}" for number in np.random.default_rng(0).integers(5, 45, 80 * 12)]
    rows = [(" ".join(words[12 * i : 12 * i + 4 + i % 8]), i % 2) for i in range(80)]
    for name, part in {"train": rows[:60], "test": rows[60:]}.items():
        lines = ["text,label", *(f"{text},{label}" for text, label in part)]
        (tmp_path / f"{name}.csv").write_text("\n".join(lines))
    RobertaForSequenceClassification(tiny_roberta_config()).save_pretrained(tmp_path / "start")
    tiny_tokenizer().save_pretrained(tmp_path / "start")
    for name in ("small", "large"):
        sizes = {"num_hidden_layers": 1, "hidden_size": 8 if name == "small" else 16, "num_attention_heads": 2}
        (tmp_path / f"{name}.yaml").write_text(
            yaml.safe_dump({"model_type": "roberta", "intermediate_size": 16, **sizes})
        )
    none = dict.fromkeys(("task", "image_size", "teacher_config"))
    changes = {"train_rows": 50, "meta_rows": 10, "evaluation_rows": 20, "methods": ["dgkd", "mc_distil"]}
    files = {"train_file": tmp_path / "train.csv", "test_file": tmp_path / "test.csv"}
    students = [tmp_path / "small.yaml", tmp_path / "large.yaml"]
    words = tiny(tmp_path / "run", **none, **changes, **files, teacher_start=tmp_path / "start", students=students)
    recipes["mc_distil"].main([*words, "--train_sampling_strategy", "group_by_length"])
    found = {(row["method"], row["student"]) for row in per_seed(tmp_path / "run")}
    assert {(method, name) for method in ("dgkd", "mc_distil") for name in ("small", "large")} <= found
    assert "top-5" not in (tmp_path / "run/results.md").read_text()


WRONG = {
    "method": ({"methods": ["kd", "boosting"]}, "--methods boosting: choose of ce, kd, mc_distil"),
    "twice": ({"students": ["resnet10-xs", "resnet10-xs"]}, "each once"),
    "alone": ({"students": ["resnet10-xs"], "methods": ["dml", "kd"]}, "dml: students that learn from each other"),
    "network": ({"students": ["resnet10-xs", "resnet9"]}, "no network 'resnet9'"),
    "teachers": ({"teacher": "somewhere"}, "one teacher is needed, given: teacher and teacher_config"),
    "meta rows": ({"meta_rows": 90}, "--meta_rows 90: of 90 training rows 1 to 80"),
    "few meta rows": ({"meta_rows": 3}, "--meta_rows 3: .*10 or more"),
    "validation": ({"meta_rows": 0, "evaluate_on": "validation"}, "scored on too"),
    "weights": ({"fixed_distill": [0.1, 0.2, 0.3]}, "--fixed_distill is one number"),
    "share": ({"kd_alpha": 1.5}, "teacher's share"),
    "start": ({"warm_start": "hot"}, "--warm_start hot: choose ce or none"),
    "output": ({"coordinator_output": "tanh"}, "output must be one of sigmoid"),
    "third loss": (
        {"coordinator_output": "product", "pooled_student": True},
        "the objective has task, distill, pooled",
    ),
    "precision": ({"meta_engine": "finite_difference", "bf16": True}, "meta_engine='jvp'"),
    "optimizer": ({"optim": "adafactor", "optim_args": None}, "knows SGD, Adam and AdamW, not"),
    "noise": ({"noise_rate": 1.0}, "--noise_rate is a share"),
    "interval": ({"coordinator_interval": 0}, "coordinator_interval must be 1 or more"),
    "profile": ({"profile": "quick"}, "--profile quick: choose demo, study, task"),
    "search": ({"search": 2, "optim": "adamw_torch", "optim_args": None}, "give --optim sgd"),
    "mixed": ({"mixup": 0.2}, "leave out"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_inputs_are_said_before_any_training(recipes, tmp_path, name):
    """A setting that is refused after the teacher is trained costs that training."""
    changes, sentence = WRONG[name]
    with pytest.raises((ValueError, OSError), match=sentence):
        recipes["mc_distil"].prepare(tiny(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()
