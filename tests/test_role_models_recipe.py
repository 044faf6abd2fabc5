"""Bad models as role models, as users start the recipe: tiny networks on digits and sentences, wrong inputs."""

import csv
import importlib
import json
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image as Picture
from safetensors.torch import load_file

from hfkd.data.label_noise import noisy_labels, transition_matrix
from hfkd.outputs import Progress
from hfkd.testing import tiny_roberta_config, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[1]
RECIPES, CONFIGS = ROOT / "recipes", ROOT / "recipes" / "configs"
SIZES = {"model_type": "cifar_resnet", "embedding_size": 8, "hidden_sizes": [16, 64], "depths": [1, 1]}


@pytest.fixture(scope="module")
def recipes():
    """The modules by name, imported from the folder as the programs import each other."""
    sys.path.insert(0, str(RECIPES))
    yield {name: importlib.import_module(name) for name in ("role_data", "role_study", "role_models", "runs")}
    sys.path.remove(str(RECIPES))


def flags(**values):
    words = []
    for name, value in values.items():
        words += [] if value is None else [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def tiny(output, **changes):
    """A trial on the 8 x 8 digits: two steps, after which nothing is fitted."""
    values = {
        "task": "digits",
        "image_size": 8,
        "teacher_rows": 100,
        "pool_rows": 60,
        "teacher_config": "resnet10-xxxs",
        "student_config": "resnet10-xxxs",
        "teachers": [1, 3],
        "seeds": 2,
        "output_dir": output,
        "max_steps": 2,
        "num_train_epochs": 3,
        "per_device_train_batch_size": 20,
        "per_device_eval_batch_size": 100,
        "learning_rate": 0.05,
        "disable_tqdm": True,
        "save_strategy": "no",
        "report_to": "none",
        **changes,
    }
    return flags(**values)


def fitting(output, **changes):
    """Fifty images that a network of one stage has by heart in a few seconds."""
    return tiny(
        output,
        **{
            "teacher_rows": 50,
            "teacher_epochs": 25,
            "per_device_train_batch_size": 25,
            "max_steps": None,
            "num_train_epochs": 2,
            "learning_rate": 0.03,
            "optim": "adamw_torch",
            "weight_decay": 0,
            "evaluation_rows": 359,
            **changes,
        },
    )


@pytest.fixture(scope="module")
def sizes(tmp_path_factory):
    path = tmp_path_factory.mktemp("sizes") / "network.yaml"
    path.write_text(yaml.safe_dump(SIZES))
    return path


@pytest.fixture(scope="module")
def study(recipes, sizes, tmp_path_factory):
    """Teachers that interpolate, two seeds, two noise rates."""
    folder = tmp_path_factory.mktemp("study") / "run"
    words = fitting(folder, teacher_config=sizes, student_config=sizes, other_rates=[0.1], rate_teachers=2)
    recipes["role_models"].main(words)
    return folder, words


def per_seed(folder):
    return list(csv.DictReader((folder / "results.csv").open()))


def settings_of(folder, name, seed):
    return json.loads((folder / "runs" / name / f"seed-{seed}" / "settings.json").read_text())


def logits_of(folder, name, seed, prefix=""):
    return load_file(folder / "runs" / name / f"seed-{seed}" / "logits.safetensors")[f"{prefix}logits"]


# ---- the data ----


def test_teachers_pool_and_test_share_no_row(recipes, tmp_path):
    """A pool of the teachers' own rows is labelled by heart, and a test row in it makes the score a rehearsal."""
    study = recipes["role_models"].prepare(tiny(tmp_path / "run", max_steps=None, pool_rows=None))
    train, pool = (set(rows["example_id"][:]) for rows in (study.view.train, study.found.pool))
    assert len(train) == 100 and not train & pool and len(train | pool) == 1258
    assert len(study.view.held_out[""]) == 359


def test_students_do_not_see_the_pools_labels(recipes, monkeypatch, tmp_path):
    """A label that reaches a student of pseudo-labels turns the method into its own ceiling."""
    prepared = recipes["role_models"].prepare([*fitting(tmp_path / "other"), "--teachers", "1"])
    seen = []
    monkeypatch.setattr(prepared.runs, "result", lambda run: seen.append(run) or {"accuracy": 0.5})
    monkeypatch.setattr(prepared, "answers", lambda *args: np.zeros((args[2], 60, 10), np.float32))
    prepared.student("epl", 0.2, 0, 1)
    prepared.own_labels(0)
    student, control = seen
    assert "label" not in student.asked()[1].column_names and "label" not in student.view.train.column_names
    assert "label" in control.view.train.column_names and control.objective is None


def test_the_noise_is_counted_and_one_set_for_all_teachers(recipes, study, tmp_path):
    """Noise drawn for each teacher anew is averaged away, and shows an effect that the paper does not have."""
    _, words = study
    prepared = recipes["role_models"].prepare([*words, "--resume_from_checkpoint", "True"])
    clean = np.asarray(prepared.view.train["label"][:])
    rows = [prepared.teacher_run(0.2, 1, number).view.train for number in range(3)]
    for noisy in rows:
        np.testing.assert_array_equal(noisy["clean_label"][:], clean)
        expected = noisy_labels(clean, transition_matrix(10, 0.2, [(c + 5) % 10 for c in range(10)]), seed=1)
        np.testing.assert_array_equal(noisy["label"][:], expected)
    wrong = np.asarray(rows[0]["label"][:]) != clean
    assert [wrong[clean == c].sum() for c in range(10)] == [1] * 10, "a fifth of 5 rows a class"
    other = prepared.teacher_run(0.2, 0, 0).view.train["label"][:]
    assert other != rows[0]["label"][:], "another seed has other wrong labels"
    assert prepared.teacher_run(0.0, 1, 0).view.train["label"][:] == clean.tolist()


# ---- the study ----


def test_every_method_of_every_number_and_rate(study):
    """A student that is missing from the table, or stands there twice, is not noticed among so many."""
    rows = per_seed(study[0])
    found = [(r["method"], float(r["rate"]), int(r["k"]), int(r["seed"]), r["member"]) for r in rows]
    assert len(set(found)) == len(found)
    expected = set()
    for seed in range(2):
        expected |= {("clean_labels", 0.0, 1, seed, "0"), ("own_labels", 0.0, 0, seed, "")}
        for rate, counts, teachers in ((0.2, (2, 3), 3), (0.1, (2,), 2)):
            expected |= {("teacher", rate, 1, seed, str(number)) for number in range(teachers)}
            expected |= {("single", rate, 1, seed, "")}
            expected |= {(m, rate, k, seed, "") for m in ("ensemble", "epl", "rpl") for k in counts}
    assert set(found) == expected


def test_teachers_fit_their_noisy_labels_and_are_told_by_them(study, recipes):
    """Scored against the clean labels, a teacher that interpolates looks like one that fails; against none, the reverse."""
    folder, _ = study
    for row in (row for row in per_seed(folder) if row["method"] == "teacher"):
        run_seed = 1000 * (int(row["seed"]) + 1) + int(row["member"])
        own = logits_of(folder, row["run"], run_seed, "train_")
        assert row["run"] == f"teacher-{float(row['rate']):g}" and len(own) == 50
        assert float(row["fitted"]) >= 0.99 and float(row["fitted"]) == float(row["train_accuracy"])


def test_teachers_are_trained_once_and_have_seeds_of_their_own(study):
    """Two teachers of one seed are twins, whose vote is one vote; a student that starts as its teacher is its copy."""
    folder, _ = study
    names = {path.parent.parent.name: 0 for path in (folder / "runs").glob("*/*/result.json")}
    for path in (folder / "runs").glob("*/*/result.json"):
        names[path.parent.parent.name] += 1
    assert (names["teacher-0.2"], names["teacher-0.1"], names["teacher-0"]) == (6, 4, 2)
    starts = [settings_of(folder, "teacher-0.2", 1000 * (s + 1) + k)["start"] for s in range(2) for k in range(3)]
    starts += [settings_of(folder, "single-0.2-k1", seed)["start"] for seed in range(2)]
    assert len(set(starts)) == 8
    clean, noisy = (settings_of(folder, name, 1000) for name in ("teacher-0", "teacher-0.2"))
    assert {name for name in clean if clean[name] != noisy[name]} == {"rows"}, "the control differs in its labels only"


def test_students_share_everything_but_the_answers(study):
    """Another start, order or budget for one method would be reported as its effect."""
    folder, _ = study
    for seed in range(2):
        first = settings_of(folder, "own_labels", seed)
        for name in ("single-0.2-k1", "epl-0.2-k3", "rpl-0.2-k3", "epl-0.2-k2", "rpl-0.1-k2"):
            own = settings_of(folder, name, seed)
            assert {key for key in own if own[key] != first[key]} == {"objective", "teacher"}
    told = {settings_of(folder, n, 0)["teacher"] for n in ("single-0.2-k1", "epl-0.2-k3", "rpl-0.2-k3", "rpl-0.2-k2")}
    assert len(told) == 4


def test_pseudo_labels_are_recounted_from_the_teachers_logits(recipes, study, tmp_path):
    """Columns of other teachers, of other rows, or a draw that never changes are pseudo-labels of another method."""
    folder, words = study
    prepared = recipes["role_models"].prepare([*words, "--resume_from_checkpoint", "True"])
    asked = []
    prepared.runs.result = lambda run: asked.append(run.asked()) or {}
    for method in ("epl", "rpl"):
        prepared.student(method, 0.2, 0, 3)
    named = [logits_of(folder, "teacher-0.2", 1000 + k, "pool_").argmax(1).tolist() for k in range(3)]
    epochs = {}
    for method, (teacher, rows) in zip(("epl", "rpl"), asked, strict=True):
        collator = prepared.view.collator
        batch = collator.on_device(collator([rows[i] for i in range(len(rows))]))
        for epoch in range(2):
            epochs[method, epoch] = teacher(batch, Progress(epoch=epoch, seed=0)).labels.tolist()
    votes = [statistics.multimode(three) for three in zip(*named, strict=True)]
    assert all(label in vote for label, vote in zip(epochs["epl", 0], votes, strict=True))
    assert sum(len(vote) == 1 for vote in votes) > 30
    assert all(label in three for label, *three in zip(epochs["rpl", 0], *named, strict=True))
    assert epochs["epl", 0] == epochs["epl", 1] and epochs["rpl", 0] != epochs["rpl", 1] != epochs["epl", 0]


def test_scores_are_recounted_on_clean_test_labels(recipes, study):
    """Scored on noisy or other rows' labels, a sampler is a perfect classifier."""
    folder, words = study
    prepared = recipes["role_models"].prepare([*words, "--resume_from_checkpoint", "True"])
    labels = prepared.view.held_out[""]["label"][:]
    for row in per_seed(folder):
        if row["method"] == "ensemble":
            seeds = [1000 * (int(row["seed"]) + 1) + number for number in range(int(row["k"]))]
            votes = torch.stack([logits_of(folder, f"teacher-{float(row['rate']):g}", seed) for seed in seeds])
            # ties go to the larger sum of probabilities
            counts = torch.nn.functional.one_hot(votes.argmax(-1), 10).sum(0) + votes.softmax(-1).mean(0) / 2
            predicted = counts.argmax(-1).tolist()
        else:
            seed = int(row["seed"])
            seed = 1000 * (seed + 1) + int(row["member"]) if row["member"] else seed
            predicted = logits_of(folder, row["run"], seed).argmax(-1).tolist()
        right = sum(one == other for one, other in zip(predicted, labels, strict=True)) / len(labels)
        assert float(row["accuracy"]) == pytest.approx(right)


def test_the_tables_equal_the_per_seed_csv(study):
    """The best teacher in place of the mean, or a difference that is not paired by seed, is a claim the data do not make."""
    folder, _ = study
    rows, text = per_seed(folder), (folder / "results.md").read_text()
    first, second, _ = text.strip().split("\n\n")

    def by_seed(method, rate, k):
        kept = [r for r in rows if (r["method"], float(r["rate"]), int(r["k"])) == (method, rate, k)]
        return [statistics.mean(100 * float(r["accuracy"]) for r in kept if r["seed"] == s) for s in ("0", "1")]

    single = by_seed("teacher", 0.2, 1)
    shown = {(cells[0], cells[1]): cells[2:] for cells in map(split, first.splitlines()[2:])}
    for name, k, method, rate in (
        ("a model of the clean labels", "1", "clean_labels", 0.0),
        ("single teacher", "1", "teacher", 0.2),
        ("test-time ensemble", "3", "ensemble", 0.2),
        ("student of a single teacher", "1", "single", 0.2),
        ("EPL student", "3", "epl", 0.2),
        ("RPL student", "2", "rpl", 0.2),
        ("student of the pool's own labels", "–", "own_labels", 0.0),
    ):
        own = by_seed(method, rate, 0 if k == "–" else int(k))
        assert shown[name, k][0].startswith(f"{statistics.mean(own):.2f} [")
        change = statistics.mean(a - b for a, b in zip(own, single, strict=True))
        expected = "–" if method == "teacher" else f"{change:+.2f} ["
        assert shown[name, k][1].replace("-0.00", "+0.00").startswith(expected.replace("-0.00", "+0.00"))
    assert len(shown) == 10
    lines = {cells[0]: cells[1:] for cells in map(split, second.splitlines()[2:])}
    for name, method, k in (("single teacher", "teacher", 1), ("EPL student", "epl", 2), ("RPL student", "rpl", 2)):
        for cell, rate in zip(lines[name], (0.1, 0.2), strict=True):
            assert cell.startswith(f"{statistics.mean(by_seed(method, rate, k)):.2f}")


def split(line):
    return line.strip("| ").split(" | ")


def test_the_sampler_report_is_that_of_the_first_teacher(study):
    """A report of a student under the teacher's name says that teachers do not pass noise on."""
    folder, _ = study
    found = json.loads((folder / "sampler.json").read_text())
    keys = {(r["method"], r["rate"], r["k"], r["seed"]) for r in found}
    assert {("teacher", rate, 1, seed) for rate in (0.1, 0.2) for seed in range(2)} <= keys
    assert {("ensemble", 0.2, 3, seed) for seed in range(2)} <= keys
    for report in (r for r in found if r["method"] == "teacher"):
        row = next(
            r
            for r in per_seed(folder)
            if (r["method"], float(r["rate"]), r["seed"], r["member"])
            == ("teacher", report["rate"], str(report["seed"]), "0")
        )
        assert report["clean_accuracy"] == pytest.approx(float(row["accuracy"]))
        assert report["noisy_train_accuracy"] == float(row["fitted"]) and report["examples"] == 359
    assert "single teacher, noise 20 %:" in (folder / "results.md").read_text()


def test_figures_are_drawn(study):
    """A study of an hour without its figure is run again."""
    for name in ("scores.png", "confusions.png"):
        with Picture.open(study[0] / name) as picture:
            assert min(picture.size) > 300


def test_no_panel_cuts_off_what_another_shows(tmp_path):
    """Axes shared too late hide the single teachers, and the method looks as if there were nothing to gain."""
    from hfkd.diagnostics import plots

    low, high = {"teacher": {10.0: [50.0, 52.0], 40.0: [20.0, 21.0]}}, {"student": {1.0: [90.0], 3.0: [95.0]}}
    figure = plots.score_sweeps({"k": high, "rate": low}, {"ceiling": [97.0]}, "accuracy (%)", tmp_path / "a.png")
    left, right = figure.axes
    assert left.get_ylim() == right.get_ylim() and left.get_ylim()[0] < 20 and left.get_ylim()[1] > 97
    assert [tick.get_text() for tick in right.get_xticklabels()] == ["10", "40"]
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert shown == ["student", "teacher", "ceiling"] and (tmp_path / "a.png").stat().st_size > 5_000
    with pytest.raises(ValueError, match="panels"):
        plots.score_sweeps({}, {}, "accuracy (%)", tmp_path / "b.png")


def test_a_stopped_study_trains_only_what_is_missing(recipes, study, capsys, monkeypatch):
    """Ten teachers that are trained again for one more number of them cost the afternoon that resuming is for."""
    folder, words = study
    before = (folder / "results.csv").read_text()
    (folder / "runs/rpl-0.2-k3/seed-1/result.json").unlink()
    trained, train = [], recipes["runs"].Runs.train

    def counted(self, run, model, place):
        trained.append((run.name, run.seed))
        return train(self, run, model, place)

    monkeypatch.setattr(recipes["runs"].Runs, "train", counted)
    more = [*words, "--resume_from_checkpoint", "True", "--teachers", "1", "3", "4"]
    recipes["role_models"].main(more)
    new = {(f"{m}-0.2-k4", s) for m in ("epl", "rpl") for s in range(2)} | {
        ("teacher-0.2", 1003),
        ("teacher-0.2", 2003),
    }
    assert set(trained) == new | {("rpl-0.2-k3", 1)} and len(trained) == 7
    costs = ("seconds_per_step", "peak_mib")
    old = [{n: v for n, v in r.items() if n not in costs} for r in csv.DictReader(before.splitlines())]
    now = [{n: v for n, v in r.items() if n not in costs} for r in per_seed(folder)]
    assert all(row in now for row in old), "what was trained again is what it was"
    with pytest.raises(ValueError, match="other settings"):
        recipes["role_models"].main([*more, "--noise", "symmetric"])


# ---- teachers that are no samplers ----


def test_teachers_that_do_not_interpolate_stop_the_run(recipes, tmp_path):
    """Students of teachers that have not learned the noise show an effect that is not the paper's."""
    words = tiny(tmp_path / "run", max_steps=None, num_train_epochs=1)
    with pytest.raises(recipes["role_study"].NotSamplers, match=r"teacher 0 .* of its 100 .* below 99 %"):
        recipes["role_models"].main(words)
    assert not (tmp_path / "run" / "results.md").exists()


def test_a_trial_says_that_it_is_one(recipes, tmp_path, capsys):
    """Numbers of a run of two steps that look like a study's are quoted as one."""
    recipes["role_models"].main(tiny(tmp_path / "run", seeds=1, teachers=[1, 2]))
    assert "A trial: teachers have" in capsys.readouterr().out
    rows = per_seed(tmp_path / "run")
    assert {row["steps"] for row in rows if row["method"] != "ensemble"} == {"2"}


# ---- other data and other ways to ask ----


def test_with_crops_students_ask_the_models(recipes, tmp_path, monkeypatch):
    """Answers about the plain image, cached, would be taught beside another crop of it."""
    words = tiny(tmp_path / "run", seeds=1, teachers=[1, 2], crop="pad", padding=1, combine="logits", draw="batch")
    module, kinds = recipes["role_study"], []

    class Spied(module.EnsembleTeacher):
        def __init__(self, members, *args, **kwargs):
            kinds.append(({type(member).__name__ for member in members}, *args, kwargs["draw"]))
            super().__init__(members, *args, **kwargs)

    monkeypatch.setattr(module, "EnsembleTeacher", Spied)
    recipes["role_models"].main(words)
    models = {"ModelTeacher"}
    assert kinds == [(models, "logits", "example"), (models, "logits", "example"), (models, "sample", "batch")]
    settings = settings_of(tmp_path / "run", "teacher-0.2", 1000)
    assert settings["augmentation"] if "augmentation" in settings else settings["crop"] == "pad"


def test_texts_and_an_unlabelled_file_of_them(recipes, tmp_path, capsys):
    """The recipe is said to be for texts too; a pool without labels has no ceiling, and must not need one."""
    rows = [(f"good film {i}" if i % 2 else f"bad plot {i}", i % 2) for i in range(80)]
    for name, part in {"train": rows[:60], "test": rows[60:]}.items():
        lines = ["text,label", *(f"{text},{label}" for text, label in part)]
        (tmp_path / f"{name}.csv").write_text("\n".join(lines))
    (tmp_path / "pool.txt").write_text("\n".join(f"a good or bad film, take {i}" for i in range(40)))
    tokenizer, config = tiny_tokenizer(), tiny_roberta_config()
    start = tmp_path / "start"
    from transformers import RobertaForSequenceClassification

    RobertaForSequenceClassification(config).save_pretrained(start)
    tokenizer.save_pretrained(start)
    words = tiny(
        tmp_path / "run",
        **dict.fromkeys(("task", "image_size", "teacher_config", "student_config", "pool_rows", "teacher_rows")),
        seeds=1,
        teachers=[1, 2],
        train_file=tmp_path / "train.csv",
        test_file=tmp_path / "test.csv",
        pool=tmp_path / "pool.txt",
        teacher_start=start,
        student=start,
        max_length=16,
    )
    recipes["role_models"].main(words)
    methods = [row["method"] for row in per_seed(tmp_path / "run")]
    assert methods == ["clean_labels", "teacher", "teacher", "single", "ensemble", "epl", "rpl"]


def test_a_pool_of_cifar5m_for_the_published_settings(recipes, tmp_path):
    """A setting that names data its loader cannot read is found out on the machine with the GPU."""
    rng = np.random.default_rng(0)
    for label in range(10):
        np.save(tmp_path / f"class{label}.npy", rng.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8))
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    for split, count in (("train", 4), ("test", 2)):
        for name in names:
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Picture.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    words = flags(
        config=CONFIGS / "role_models_cifar10_code.yaml",
        data_dir=tmp_path / "data",
        pool=tmp_path,
        teacher_config="resnet10-xxxs",
        student_config="resnet10-xxxs",
        teachers=[1, 2],
        output_dir=tmp_path / "run",
        max_steps=1,
        per_device_train_batch_size=10,
        per_device_eval_batch_size=20,
        disable_tqdm=True,
        report_to="none",
    )
    recipes["role_models"].main(words)
    assert {row["method"] for row in per_seed(tmp_path / "run")} >= {"epl", "rpl", "own_labels"}


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.glob("role_models_*.yaml")))
def test_every_setting_is_read(recipes, name, monkeypatch):
    """A key that no argument has, or a value that argparse cannot read, is an error on the user's side only."""
    module, made = recipes["role_models"], []
    monkeypatch.setattr(module, "RoleStudy", lambda recipe, args: made.append((recipe, args)))
    if name in ("role_models_demo.yaml", "role_models_study.yaml"):
        module.prepare(["--profile", name[12:-5]])
    else:
        module.prepare(["--config", str(CONFIGS / name)])
    recipe, args = made[0]
    recipes["role_study"].refuse_wrong_choices(recipe, args)
    assert args.weight_decay == (5e-4 if "cifar10" in name else 0)
    if name == "role_models_cifar10_paper.yaml":
        budget = recipes["role_study"].teacher_budget(recipe, args, 50_000)
        assert (budget["num_train_epochs"], budget["lr_milestones"], args.num_train_epochs) == (200, [100, 150], 1)


# ---- wrong inputs ----


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"teachers": [0]}, "1 or more each"),
        ({"noise_rate": 0.5}, "as frequent as the right one"),
        ({"noise_rate": 1.0}, "no clean|without clean|below 1|as frequent"),
        ({"noise_rate": 0}, "makes no sampler"),
        ({"noise": "pairs"}, "choose partners, symmetric"),
        ({"partners": [1, 0]}, "partners"),
        ({"combine": "sample"}, "choose vote, logits, mean"),
        ({"draw": "epoch"}, "choose example, batch"),
        ({"seeds": 0}, "1 or more, got 0"),
        ({"teacher_rows": 1258}, "no row is left for the pool"),
        ({"teacher_rows": 5}, "cannot show all 10"),
        ({"objective": "kd"}, "leave objective"),
        ({"mixup": 0.2}, "name classes"),
        ({"pool": "nowhere"}, "no such folder"),
        ({"teacher_config": "resnet9000"}, "no network"),
        ({"rows": "disjoint", "teachers": [40]}, "none of"),
        ({"teacher_lr_milestones": [3]}, "below 3"),
    ],
)
def test_wrong_inputs_are_refused_before_training(recipes, tmp_path, changes, said):
    """What is found out after ten teachers costs ten teachers."""
    with pytest.raises((ValueError, OSError), match=said):
        recipes["role_models"].prepare(tiny(tmp_path / "run", **changes))
    assert not (tmp_path / "run" / "runs").exists()


def test_a_pool_with_a_test_row_is_refused(recipes, tmp_path):
    """Students that learn test images are scored on a rehearsal; the file's name does not give it away."""
    from hfkd.data import embedded

    found = recipes["role_models"].prepare(tiny(tmp_path / "run", max_steps=None))
    held_out = found.view.held_out[""]["example_id"][:]
    source = embedded.digits()
    (tmp_path / "pool").mkdir()
    for number in (held_out[7], *found.view.train["example_id"][:5]):
        source[number]["image"].save(tmp_path / "pool" / f"{number}.png")
    with pytest.raises(ValueError, match="share 1 rows"):
        recipes["role_models"].prepare(tiny(tmp_path / "run", max_steps=None, pool=tmp_path / "pool", pool_rows=None))
