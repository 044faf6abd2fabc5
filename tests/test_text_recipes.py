"""The text recipes as their users start them: every task, every YAML, files of their own, wrong inputs, resumed studies.

In-process with tiny models; real data sets are stood in for by their schema fixtures (columns, splits, label order).
"""

import csv
import importlib
import json
import re
import statistics
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from datasets import ClassLabel, Dataset, DatasetDict, Value
from safetensors.numpy import load_file
from scipy import stats
from transformers import AutoModelForSequenceClassification, RobertaForSequenceClassification, RobertaModel

import launching
from hfkd.data.text import TEXT_TASKS
from hfkd.testing import tiny_roberta_config, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[1]
RECIPES, CONFIGS = ROOT / "recipes", ROOT / "recipes" / "configs"
SCHEMAS = Path(__file__).parent / "data" / "schemas"
DECLARED = json.loads((SCHEMAS / "declared.json").read_text())
STUDIES = sorted(path.name for path in CONFIGS.glob("distill_text_*.yaml"))
NAMED = ["RobertaForSequenceClassification"]
MOODS = ("glad", "sad", "calm")


@pytest.fixture(scope="module")
def recipes():
    """The modules by name, imported from the folder as the programs import each other."""
    sys.path.insert(0, str(RECIPES))
    names = ("text_data", "runs", "text_study", "run_report", "distill_text", "compare", "train_teacher")
    yield {name: importlib.import_module(name) for name in names}
    sys.path.remove(str(RECIPES))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A model folder, a trained-looking teacher, and files with string labels in a column that must be guessed."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    RobertaForSequenceClassification(tiny_roberta_config(num_hidden_layers=1)).save_pretrained(folder / "model")
    names = {"id2label": dict(enumerate(sorted(MOODS))), "label2id": {mood: i for i, mood in enumerate(sorted(MOODS))}}
    RobertaForSequenceClassification(tiny_roberta_config(**names)).save_pretrained(folder / "teacher")
    odd = {"id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
    RobertaForSequenceClassification(tiny_roberta_config(**odd)).save_pretrained(folder / "other_labels")
    RobertaModel(tiny_roberta_config()).save_pretrained(folder / "encoder")
    config = json.loads((folder / "encoder" / "config.json").read_text())
    (folder / "encoder" / "config.json").write_text(json.dumps({**config, "architectures": NAMED}))
    for name in ("model", "teacher", "other_labels", "encoder"):
        tiny_tokenizer().save_pretrained(folder / name)
    sizes = {"model_type": "roberta", "num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2}
    (folder / "student.yaml").write_text(yaml.safe_dump({**sizes, "intermediate_size": 32}))
    generator = torch.Generator().manual_seed(0)
    for name, count in (("train", 48), ("validation", 24), ("test", 24)):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["sentence", "class"])
            for i in range(count):
                count_of_words = 3 + (7 * i) % 10  # ragged, so that an order by length is another order
                low = 5 + 8 * (i % 3)  # the classes overlap, so that seeds score differently
                words = torch.randint(low, low + 28, (count_of_words,), generator=generator).tolist()
                writer.writerow([" ".join(f"w{w}" for w in words), MOODS[i % 3]])
    (folder / "empty.csv").write_text("sentence,class\n")
    (folder / "nothing.csv").write_text("")
    (folder / "pair.csv").write_text("premise,hypothesis,label\nw5,w6,x\nw7,w8,y\n")
    return folder


def flags(**values):
    words = []
    for name, value in values.items():
        words += [] if value is None else [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def own(tiny, output, **changes):
    """A study on files, three classes, two seeds."""
    values = {
        "train_file": tiny / "train.csv",
        "test_file": tiny / "test.csv",
        "teacher_start": tiny / "model",
        "student_config": tiny / "student.yaml",
        "output_dir": output,
        "seeds": 2,
        **bounds(),
        **changes,
    }
    return flags(**values)


def bounds():
    return {"max_steps": 2, "max_length": 16, "per_device_train_batch_size": 8, "disable_tqdm": True}


def stored(task):
    """The splits that the Hub has, from the schema fixture of the task."""
    declared = DECLARED[task]
    rows = Dataset.from_json(str(SCHEMAS / f"{task}.jsonl"), keep_in_memory=True)
    if declared["label_names"]:
        rows = rows.cast_column("label", ClassLabel(names=declared["label_names"]))
    hidden = rows.remove_columns("label").add_column("label", [-1] * len(rows))
    hidden = hidden.cast_column("label", Value("int64"))
    return DatasetDict({split: hidden if split in declared["hidden"] else rows for split in declared["splits"]})


@pytest.fixture
def hub(monkeypatch):
    """Data sets come from their schema fixtures; local files are read as they are."""
    from_files = datasets.load_dataset

    def load(path, name=None, **settings):
        tasks = [t for t, declared in DECLARED.items() if (declared["path"], declared["name"]) == (path, name)]
        return stored(tasks[0]) if tasks else from_files(path, name, **settings)

    monkeypatch.setattr(datasets, "load_dataset", load)


def per_seed(folder):
    return list(csv.DictReader((folder / "results.csv").open()))


# ---- every task and every YAML ----


@pytest.mark.parametrize("task", TEXT_TASKS)
def test_every_task_runs_two_steps(recipes, tiny, hub, tmp_path, task):
    """A row of the table that no run has seen fails after the teacher has been paid for."""
    row, files = TEXT_TASKS[task], {}
    if not row.path and not row.embedded:
        files = {
            "train_file": tiny / "train.csv",
            "validation_file": tiny / "validation.csv",
            "text_column": "sentence",
        }
        files["label_column"] = "class"
    words = flags(task=task, teacher_start=tiny / "model", student_layers=1, output_dir=tmp_path / "run", seeds=1)
    recipes["distill_text"].main([*words, *flags(evaluation_rows=16, **files, **bounds())])
    rows = per_seed(tmp_path / "run")
    assert [row["run"] for row in rows] == ["teacher", "baseline", "distilled"]
    scores = [name for name in rows[0] if any(name.endswith(metric) for metric in row.metrics)]
    expected = {f"{prefix}{metric}" for metric in row.metrics for prefix in prefixes(task)}
    assert set(scores) == expected and all(row[name] for row in rows for name in scores)
    assert {row["steps"] for row in rows} <= {"1", "2"}


def prefixes(task):
    return ("matched_", "mismatched_") if task == "mnli" else ("",)


@pytest.mark.parametrize("config", STUDIES)
def test_every_study_yaml_runs_two_steps(recipes, tiny, hub, tmp_path, config):
    """A paper's setting with a misspelt key or a task that is gone is found out on the GPU that was rented for it."""
    words = ["--config", str(CONFIGS / config)]
    if "task:" not in (CONFIGS / config).read_text():
        words += flags(task="sst2")
    changes = {"teacher_start": tiny / "model", "student_config": tiny / "student.yaml", "output_dir": tmp_path / "run"}
    recipes["distill_text"].main([*words, *flags(seeds=1, evaluation_rows=16, **changes, **bounds())])
    settings = json.loads((tmp_path / "run" / "runs" / "distilled" / "seed-0" / "settings.json").read_text())
    assert {row["steps"] for row in per_seed(tmp_path / "run")} <= {"1", "2"}, "--max_steps bounds every stage"
    given = yaml.safe_load((CONFIGS / config).read_text())
    assert settings["learning_rate"] == given["learning_rate"]
    if "temperature" in given:
        assert f"'temperature': {float(given['temperature'])}" in settings["objective"]
        assert f"'alpha': {float(given['alpha'])}" in settings["objective"]


@pytest.mark.parametrize("task", ["mnli", "imdb", "qqp", "ag_news"])
def test_the_papers_settings_are_the_papers(task):
    """A changed temperature or budget under a paper's name reports another experiment as a replication."""
    found = yaml.safe_load((CONFIGS / f"distill_text_{task}.yaml").read_text())
    temperatures = {"mnli": 2.0, "imdb": 16.0, "qqp": 1.0, "ag_news": 1.0}
    expected = {"alpha": 1.0, "max_steps": 25000, "learning_rate": 1e-5, "warmup_steps": 1000, "task": task}
    expected |= {"per_device_train_batch_size": 64, "lr_scheduler_type": "linear", "temperature": temperatures[task]}
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("student_*.yaml")), ids=lambda path: path.stem)
def test_every_student_config_builds_its_sizes(recipes, path):
    """A size that the architecture does not know would be dropped without a word, and another student trained."""
    study = recipes["text_study"]
    data = recipes["text_data"].TextData(
        None, None, {"": None}, ["a", "b", "c"], "single_label_classification", ("accuracy",)
    )
    with torch.device("meta"):
        model = study.classifier_from_sizes(study.read_sizes(str(path)), tiny_tokenizer(), data)
    sizes = yaml.safe_load(path.read_text())
    assert {name: getattr(model.config, name) for name in sizes} == sizes
    assert len(model.roberta.encoder.layer) == sizes["num_hidden_layers"]
    assert model.config.vocab_size == len(tiny_tokenizer()) and model.config.id2label == {0: "a", 1: "b", 2: "c"}


# ---- a study on files ----


@pytest.fixture(scope="module")
def study(recipes, tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study") / "run"
    recipes["distill_text"].main(own(tiny, folder, max_steps=30, learning_rate=1e-2, seeds=3, alpha=0.9, temperature=2))
    return folder


def test_columns_are_guessed_and_models_saved(study):
    """A student that cannot be loaded, or whose labels have lost their names, is no result."""
    for name in ("teacher", "baseline", "distilled"):
        model = AutoModelForSequenceClassification.from_pretrained(study / "runs" / name / "seed-0" / "model")
        assert model.config.id2label == {0: "calm", 1: "glad", 2: "sad"}
    assert (
        not list(study.rglob("*.partial")) and not list(study.rglob("*.tmp")) and not list(study.rglob("checkpoint-*"))
    )
    assert not (study / "runs" / "baseline" / "seed-1" / "model").exists()


def test_both_students_share_everything_but_the_objective(study):
    """Another start, order or budget of one side would be reported as the effect of distillation."""
    starts = set()
    for seed in range(3):
        baseline, distilled = (
            json.loads((study / "runs" / name / f"seed-{seed}" / "settings.json").read_text())
            for name in ("baseline", "distilled")
        )
        differ = {name for name in baseline if baseline[name] != distilled[name]}
        assert differ == {"objective", "teacher", "teacher_dtype"}
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
            if not values:
                assert cell == "–"
            elif len(values) == 1:
                assert cell == f"{values[0]:.2f} (n=1)"
            else:
                assert cell == f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f} (n={len(values)})"
    teacher, baseline, distilled = (
        [100 * float(row["accuracy"]) for row in rows if row["run"] == run] for run in shown
    )
    assert baseline != baseline[::-1], "equal scores would hide a wrong pairing"
    test = stats.ttest_rel(distilled, baseline)
    low, high = test.confidence_interval(0.95)
    mean = statistics.mean(distilled) - statistics.mean(baseline)
    assert f"paired by seed: {mean:+.2f} [95 %: {low:+.2f}, {high:+.2f}] points" in text
    gap = statistics.mean(teacher) - statistics.mean(baseline)
    closed = f"{100 * mean / gap:.0f} %" if gap > 0 else "there is no gap"
    assert re.search(rf"of the means\): {re.escape(closed)}", text)


def test_scores_equal_those_of_the_saved_models(study, tiny):
    """Logits in another order than the labels give chance accuracy, and agreement with another text's answer."""
    texts, labels = zip(
        *((row["sentence"], row["class"]) for row in csv.DictReader((tiny / "test.csv").open())), strict=True
    )
    tokenizer, logits = tiny_tokenizer(), {}
    for name in ("teacher", "baseline", "distilled"):
        folder = study / "runs" / name / "seed-0"
        model = AutoModelForSequenceClassification.from_pretrained(folder / "model").eval()
        with torch.no_grad():  # one text at a time: no padding, no order
            answers = [
                model(**tokenizer(t, truncation=True, max_length=16, return_tensors="pt")).logits[0] for t in texts
            ]
        logits[name] = torch.stack(answers).numpy()
        saved = load_file(folder / "logits.safetensors")["logits"]
        np.testing.assert_allclose(saved, logits[name], atol=1e-5)
    for row in (row for row in per_seed(study) if row["seed"] == "0"):
        found = logits[row["run"]].argmax(1)
        assert float(row["accuracy"]) == np.mean([model.config.id2label[i] for i in found] == np.array(labels))
        if row["run"] != "teacher":
            assert float(row["agreement"]) == np.mean(found == logits["teacher"].argmax(1))


def test_alpha_0_is_the_baseline_bit_for_bit(recipes, tiny, tmp_path):
    """If the distilled side differs where nothing is distilled, the comparison measures the recipe."""
    recipes["distill_text"].main(own(tiny, tmp_path / "run", alpha=0, seeds=1))
    one, other = (
        load_file(tmp_path / "run" / "runs" / name / "seed-0" / "logits.safetensors")["logits"]
        for name in ("baseline", "distilled")
    )
    assert np.array_equal(one, other)


def test_cached_answers_equal_a_teacher_asked_in_every_step(recipes, tiny, tmp_path):
    """Answers of other rows, or of another order of classes, would be learned just as readily."""
    logits = []
    for cache in (True, False):
        words = own(
            tiny, tmp_path / str(cache), teacher=tiny / "teacher", teacher_start=None, cache_teacher=cache, seeds=1
        )
        recipes["distill_text"].main([*words, "--learning_rate", "1e-2", "--alpha", "1", "--max_steps", "6"])
        logits.append(load_file(tmp_path / str(cache) / "runs/distilled/seed-0/logits.safetensors")["logits"])
    assert (tmp_path / "True" / "teacher_answers" / "seed-0").is_dir()
    assert not (tmp_path / "False" / "teacher_answers").exists()
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-5)


def test_a_resumed_study_trains_only_what_is_missing(recipes, tiny, study, tmp_path):
    """Hours are paid twice, or two settings are averaged into one row."""
    import shutil

    shutil.copytree(study, tmp_path / "run")
    words = own(tiny, tmp_path / "run", max_steps=30, learning_rate=1e-2, seeds=3, alpha=0.9, temperature=2)
    with pytest.raises(FileExistsError, match="--resume_from_checkpoint True, delete it with --overwrite"):
        recipes["distill_text"].main(words)
    gone = tmp_path / "run" / "runs" / "distilled" / "seed-1" / "result.json"
    others = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("result.json") if path != gone}
    before = json.loads(gone.read_text())
    gone.unlink()
    recipes["distill_text"].main([*words, "--resume_from_checkpoint", "True"])
    after = json.loads(gone.read_text())
    assert {name: after[name] for name in ("accuracy", "agreement")} == {
        n: before[n] for n in ("accuracy", "agreement")
    }
    assert {path: path.stat().st_mtime_ns for path in others} == others
    with pytest.raises(ValueError, match=r"made with other settings.*learning_rate.*0.01, 0.02"):
        recipes["distill_text"].main([*words, "--resume_from_checkpoint", "True", "--learning_rate", "2e-2"])
    with pytest.raises(ValueError, match=r"made with other settings.*objective.*0.9.*0.5"):
        recipes["distill_text"].main([*words, "--resume_from_checkpoint", "True", "--alpha", "0.5"])
    keep = tmp_path / "run" / "notes.txt"
    keep.write_text("mine")
    with pytest.raises(FileNotFoundError):  # a wrong input beside --overwrite deletes nothing
        recipes["distill_text"].main([*words, "--overwrite", "--train_file", "nowhere.csv"])
    assert gone.exists()
    recipes["distill_text"].main([*words, "--overwrite", "--seeds", "1", "--max_steps", "1"])
    assert keep.read_text() == "mine" and not (tmp_path / "run" / "runs" / "baseline" / "seed-1").exists()


def test_a_run_goes_on_from_its_last_whole_checkpoint(recipes, tiny, tmp_path, monkeypatch):
    """A stopped run that starts anew under the same name loses its hours; one that resumes wrongly, its result."""
    steps, stop_at = [], [None]

    class Watched(recipes["runs"].DistillationTrainer):
        def training_step(self, *args, **kwargs):
            steps.append(self.state.global_step)
            return super().training_step(*args, **kwargs)

        def _save_checkpoint(self, *args):
            super()._save_checkpoint(*args)
            if self.state.global_step == stop_at[0]:
                raise KeyboardInterrupt

    monkeypatch.setattr(recipes["runs"], "DistillationTrainer", Watched)
    settings = {"seeds": 1, "max_steps": 6, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}
    whole, stopped = (teacher_words(own(tiny, tmp_path / name, **settings), tiny) for name in ("whole", "stopped"))
    recipes["train_teacher"].main(whole)
    stop_at[0] = 4
    with pytest.raises(KeyboardInterrupt):
        recipes["train_teacher"].main(stopped)
    folder = tmp_path / "stopped" / "runs" / "teacher" / "seed-0"
    assert (folder / "checkpoint-4").is_dir() and not (folder / "result.json").exists()
    stop_at[0] = None
    steps.clear()
    recipes["train_teacher"].main([*stopped, "--resume_from_checkpoint", "True"])
    assert steps == [4, 5]
    one, other = (
        load_file(tmp_path / name / "runs" / "teacher" / "seed-0" / "logits.safetensors")["logits"]
        for name in ("whole", "stopped")
    )
    np.testing.assert_allclose(one, other, atol=1e-6)
    assert not list(folder.glob("checkpoint-*"))


def teacher_words(words, tiny):
    drop = {"--teacher_start", "--student_config"}
    kept = [w for i, w in enumerate(words) if w not in drop and (i == 0 or words[i - 1] not in drop)]
    return [*kept, "--model_name_or_path", str(tiny / "model")]


@pytest.mark.parametrize(
    ("kind", "label", "metrics"),
    [
        ("multi_label_classification", lambda i: [MOODS[i % 3], "long"][: 1 + i % 2], ["micro_f1", "macro_f1"]),
        ("regression", lambda i: i % 5 / 2, ["pearson", "spearmanr"]),
    ],
)
def test_other_heads_on_files(recipes, tiny, tmp_path, kind, label, metrics):
    """A head for one class on texts with several, or on scores, trains without an error and means nothing."""
    rows = [{"text": f"w{5 + i} w{20 + i % 9}", "label": label(i)} for i in range(24)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"train_file": tmp_path / "rows.jsonl", "test_file": tmp_path / "rows.jsonl", "problem_type": kind}
    recipes["distill_text"].main(own(tiny, tmp_path / "run", seeds=1, **changes))
    found = per_seed(tmp_path / "run")
    assert all(row[name] for row in found for name in metrics) and "agreement" not in found[0]
    model = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "run" / "runs" / "distilled" / "seed-0" / "model"
    )
    assert (model.config.problem_type, model.config.num_labels) == (kind, 1 if kind == "regression" else 4)


def test_a_teacher_with_its_own_tokenizer(recipes, tiny, tmp_path):
    """A teacher that reads the student's tokens with another vocabulary answers noise."""
    tiny_tokenizer(60).save_pretrained(tmp_path / "teacher")
    names = {"id2label": dict(enumerate(sorted(MOODS))), "label2id": {mood: i for i, mood in enumerate(sorted(MOODS))}}
    RobertaForSequenceClassification(tiny_roberta_config(vocab_size=60, **names)).save_pretrained(tmp_path / "teacher")
    changes = {
        "teacher": tmp_path / "teacher",
        "teacher_start": None,
        "student_config": None,
        "student": tiny / "model",
    }
    recipes["distill_text"].main(own(tiny, tmp_path / "run", seeds=1, **changes))
    manifest = json.loads((tmp_path / "run" / "teacher_answers" / "seed-0" / "manifest.json").read_text())
    assert "teacher_input_ids" in manifest["columns"]


def test_the_teachers_classes_in_another_order(recipes, tiny, tmp_path):
    """A teacher that names the classes in another order would teach every student the wrong ones."""
    names = ["sad", "calm", "glad"]
    torch.manual_seed(0)
    first = RobertaForSequenceClassification.from_pretrained(tiny / "teacher")
    order = [names.index(mood) for mood in sorted(MOODS)]
    second = RobertaForSequenceClassification(
        tiny_roberta_config(id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)})
    )
    second.load_state_dict(first.state_dict())
    with torch.no_grad():
        for parameter, original in (
            (second.classifier.out_proj.weight, first.classifier.out_proj.weight),
            (second.classifier.out_proj.bias, first.classifier.out_proj.bias),
        ):
            parameter[order] = original
    second.save_pretrained(tmp_path / "permuted")
    tiny_tokenizer().save_pretrained(tmp_path / "permuted")
    found = []
    for teacher in (tiny / "teacher", tmp_path / "permuted"):
        output = tmp_path / f"run-{teacher.name}"
        recipes["distill_text"].main(own(tiny, output, teacher=teacher, teacher_start=None, seeds=1, alpha=1))
        found.append(
            [load_file(output / f"runs/{n}/seed-0/logits.safetensors")["logits"] for n in ("teacher", "distilled")]
        )
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    with pytest.raises(ValueError, match=r"--student_layers copies the head.*\['sad', 'calm', 'glad'\]"):
        words = own(tiny, tmp_path / "cut", teacher=tmp_path / "permuted", teacher_start=None, student_config=None)
        recipes["distill_text"].main([*words, "--student_layers", "1"])


# ---- wrong inputs ----

WRONG = {
    "unknown task": ({"task": "nope", "train_file": None, "test_file": None}, ValueError, "unknown task 'nope'"),
    "pair with one column": (
        {"train_file": "pair.csv", "text_column": "premise"},
        ValueError,
        "pairs of texts.*--text_pair",
    ),
    "missing file": ({"train_file": "nowhere.csv"}, FileNotFoundError, "nowhere.csv"),
    "empty file": ({"train_file": "empty.csv"}, ValueError, "train split is empty|no row|not be read"),
    "file of nothing": ({"train_file": "nothing.csv"}, ValueError, "nothing.csv"),
    "alpha": ({"alpha": 2}, ValueError, r"alpha .* must lie in \[0, 1\], got 2"),
    "temperature": ({"temperature": 0}, ValueError, "temperature must be .* above 0, got 0"),
    "other labels": (
        {"teacher": "other_labels", "teacher_start": None},
        ValueError,
        "student's classes are.*teacher's",
    ),
    "no teacher": ({"teacher_start": None}, ValueError, "--teacher_start"),
    "two teachers": ({"teacher": "teacher"}, ValueError, "is ready"),
    "teacher without a head": (
        {"teacher": "encoder", "teacher_start": None},
        ValueError,
        "lacks weights.*train_teacher.py",
    ),
    "hub id": ({"teacher": "no-such/model", "teacher_start": None}, OSError, "no-such/model"),
    "no student": ({"student_config": None}, ValueError, "one student is needed, given: none"),
    "two students": (
        {"student_layers": 1},
        ValueError,
        "one student is needed, given: .*student.yaml and --student_layers 1",
    ),
    "unknown size": ({"student_config": "odd.yaml"}, ValueError, "roberta has no num_layerz"),
    "no such sizes": ({"student_config": "nowhere.yaml"}, FileNotFoundError, "nowhere.yaml"),
    "split": ({"evaluate_on": "validation"}, ValueError, "no validation split.*--validation_file"),
    "profile": ({"profile": "huge"}, ValueError, "demo, study or task"),
    "seeds": ({"seeds": 0}, ValueError, "--seeds must be 1 or more, got 0"),
    "objective": ({"objective": "nope"}, ValueError, "objective 'nope' is unknown"),
    "masked": ({"objective": "masked_lm"}, ValueError, "MaskedLM reads .*masked_positions"),
    "labels alone": ({"objective": "cross_entropy"}, ValueError, "asks no teacher"),
    "best model": ({"load_best_model_at_end": True, "eval_strategy": "steps"}, ValueError, "last step"),
    "resume": ({"resume_from_checkpoint": "checkpoint-5"}, ValueError, "takes True"),
    "length": ({"max_length": 2}, ValueError, "max_length is 2"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_inputs_say_what_to_do(recipes, tiny, tmp_path, case):
    """An error an hour into the run, or one that names a tensor shape, sends people back to copied snippets."""
    changes, kind, message = WRONG[case]
    (tmp_path / "odd.yaml").write_text("model_type: roberta\nnum_layerz: 3\n")
    places = {"pair.csv": tiny, "empty.csv": tiny, "nothing.csv": tiny, "other_labels": tiny, "teacher": tiny}
    places["encoder"] = tiny
    places["odd.yaml"] = tmp_path
    changes = {n: places[v] / v if isinstance(v, str) and v in places else v for n, v in changes.items()}
    with pytest.raises(kind, match=f"(?s){message}"):
        recipes["distill_text"].prepare(own(tiny, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir()), "nothing is left behind"


def test_a_flag_takes_the_place_of_a_files_choice(recipes, tiny):
    """`--profile demo --student X` that trains the demo's own student reports another model than the command names."""
    words = flags(profile="demo", student=tiny / "model", train_file=tiny / "train.csv")
    recipe, args = recipes["distill_text"].parse(words)
    assert (recipe.task, recipe.student_config, recipe.student) == (None, None, str(tiny / "model"))
    assert recipe.max_length == 48 and args.alpha is not None


# ---- compare ----


def test_compare_pairs_every_objective_with_cross_entropy(recipes, tiny, tmp_path):
    """A difference that is not paired by seed, or an objective that ran with other settings than its name says."""
    entries = ["kd:temperature=4,alpha=0.9", "kd", "hidden_states"]
    words = own(tiny, tmp_path / "run", objectives=entries, student_config=None, student_layers=1, learning_rate=1e-2)
    recipes["compare"].main(words)
    rows, text = per_seed(tmp_path / "run"), (tmp_path / "run" / "results.md").read_text()
    assert {row["run"] for row in rows} == {"teacher", "cross_entropy", *entries} and len(rows) == 1 + 4 * 2
    settings = json.loads((tmp_path / "run/runs/kd-temperature=4-alpha=0.9/seed-1/settings.json").read_text())
    assert "'temperature': 4" in settings["objective"] and "'alpha': 0.9" in settings["objective"]
    reference, other = (
        [float(row["accuracy"]) for row in rows if row["run"] == run] for run in ("cross_entropy", "kd")
    )
    low, high = stats.ttest_rel(other, reference).confidence_interval(0.95) if reference != other else (0.0, 0.0)
    mean = statistics.mean(other) - statistics.mean(reference)
    line = next(line for line in text.splitlines() if line.startswith("| kd |"))
    assert f"{100 * mean:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]" in line
    assert (tmp_path / "run" / "scores.png").stat().st_size > 5000
    assert all(float(row["seconds_per_step"]) > 0 for row in rows)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objectives": ["kd:temperature"]}, "settings are name=value pairs"),
        ({"objectives": ["kd:temprature=2"]}, "the objective kd has no temprature"),
        ({"objectives": ["kd:alpha=2"]}, "alpha"),
        ({"objectives": ["nope"]}, "objective 'nope' is unknown"),
        ({"alpha": 0.5}, "give settings with their objective"),
    ],
)
def test_compare_refuses_wrong_settings_before_training(recipes, tiny, tmp_path, changes, message):
    """The last of ten objectives with a misspelt setting costs the other nine."""
    with pytest.raises(ValueError, match=message):
        recipes["compare"].prepare(own(tiny, tmp_path / "run", **changes))


@pytest.mark.parametrize("name", ["compare", "train_teacher"])
@pytest.mark.parametrize("kind", ["demo", "task"])
def test_the_other_yamls_run_two_steps(recipes, tiny, hub, tmp_path, name, kind):
    """A default that no dataclass knows any more breaks the command of the documentation."""
    models = {"compare": {"teacher_start": tiny / "model", "student_layers": 1, "objectives": ["kd"]}}
    models["train_teacher"] = {"model_name_or_path": tiny / "model"}
    words = flags(config=CONFIGS / f"{name}_{kind}.yaml", output_dir=tmp_path / "run", seeds=1, evaluation_rows=16)
    words += flags(**models[name], **bounds()) + (flags(task="cola") if kind == "task" else [])
    recipes[name].main(words)
    assert all(row["steps"] in ("1", "2") for row in per_seed(tmp_path / "run"))


# ---- as programs ----


@pytest.mark.launch
def test_a_program_and_a_wrong_input(tiny, tmp_path):
    """What works in-process may still fail as a program; a stack of calls hides the one sentence that helps."""
    words = own(tiny, tmp_path / "run")
    done = launching.run(RECIPES / "distill_text.py", *words, log=tmp_path / "log")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "| student, distilled |" in done.stderr and "paired by seed" in done.stderr
    words = own(tiny, tmp_path / "run", alpha=2, overwrite=True)
    wrong = launching.run(RECIPES / "distill_text.py", *words, log=tmp_path / "log")
    last = wrong.stderr.strip().splitlines()[-1]
    assert wrong.returncode == 1 and last.startswith("distill_text.py: alpha is the weight")
    assert "Traceback" not in wrong.stderr and (tmp_path / "run" / "results.csv").exists()
