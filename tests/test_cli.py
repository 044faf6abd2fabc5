"""`hfkd pull | eval | report | doctor` as people and scripts call them: what is printed, and the exit code."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import RobertaForSequenceClassification, TrainingArguments

from hfkd import evaluation
from hfkd.cli import FAILED, FINE, WRONG_INPUT, main
from hfkd.data.collate import DistillationCollator
from hfkd.data.text import load_text, tokenize
from hfkd.diagnostics.evaluate_metrics import compute_metrics_for
from hfkd.manifest import write_manifest
from hfkd.testing import tiny_roberta_config, tiny_tokenizer
from hfkd.trainers.distillation import DistillationTrainer

MOODS = ("calm", "glad", "sad")
REPO, TEACHER = "tester/student", "tester/teacher"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """student and teacher with a manifest each, train.csv and test.csv."""
    folder = tmp_path_factory.mktemp("models")
    for name, count in (("train", 60), ("test", 48)):
        rows = [f"w{5 + i % 45} w{5 + (7 * i) % 45} w{6 + i % 3},{MOODS[(i * 5 // 2) % 3]}\n" for i in range(count)]
        (folder / f"{name}.csv").write_text("".join(["text,label\n", *rows]))
    for seed, name in enumerate(("student", "teacher")):
        torch.manual_seed(seed)
        names = {"id2label": dict(enumerate(MOODS)), "label2id": {mood: i for i, mood in enumerate(MOODS)}}
        layers = {"num_hidden_layers": 1 + seed, "initializer_range": 0.7}
        RobertaForSequenceClassification(tiny_roberta_config(**names, **layers)).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
        described(folder / name, trained_score(folder, name))
    return folder


def described(place, accuracy, **changes):
    taught = place.name == "student"
    teacher = {
        "id": TEACHER,
        "repo": TEACHER,
        "revision": None,
        "weights": "ab" * 32,
        "labels": list(MOODS),
        "private": False,
    }
    facts = {
        "role": place.name,
        "teacher": teacher if taught else None,
        "objective": {"name": "KD" if taught else "CrossEntropy", "settings": {}, "equation": "", "paper": ""},
        "labels": list(MOODS),
        "task": None,
        "metrics": {"accuracy": accuracy},
        "evaluated_on": {"split": "test", "rows": 48, "hash": None},
        "versions": {},
    }
    write_manifest(place, {**facts, **changes})


def trained_score(folder, name):
    """What a trainer that has just saved this model says of it."""
    splits = load_text(train_file=folder / "train.csv", test_file=folder / "test.csv")
    tokenizer = tiny_tokenizer()
    trainer = DistillationTrainer(
        RobertaForSequenceClassification.from_pretrained(folder / name),
        TrainingArguments(str(folder / "run"), report_to="none", disable_tqdm=True, use_cpu=True),
        DistillationCollator(tokenizer),
        eval_dataset=tokenize(splits["test"], tokenizer, 32),
        compute_metrics=compute_metrics_for("accuracy"),
    )
    return trainer.evaluate()["eval_accuracy"]


@pytest.fixture
def data(folder):
    return ["--train_file", str(folder / "train.csv"), "--test_file", str(folder / "test.csv"), "--max_length", "32"]


@pytest.fixture
def published(hub, folder, monkeypatch):
    """Both on the loopback Hub, and this process connected to it."""
    import huggingface_hub.utils._http as http

    monkeypatch.setattr(http.time, "sleep", lambda seconds: None)  # the client waits before it tries again
    for name in ("student", "teacher"):
        files = {path.name: path.read_bytes() for path in (folder / name).iterdir() if path.is_file()}
        hub.add_repository(f"tester/{name}", files)
    with hub.connected():
        yield hub


# ---- evaluate ----


def test_a_saved_model_scores_what_its_trainer_said(folder):
    """A published score that nobody can repeat is a claim."""
    files = {"train_file": folder / "train.csv", "test_file": folder / "test.csv"}
    found = evaluation.evaluate(folder / "student", **files, max_length=32, batch_size=7)
    assert found == {"accuracy": trained_score(folder, "student")}
    assert 0 < found["accuracy"] < 1  # neither end would tell one order of classes from another


def test_data_that_numbers_its_classes_in_another_order_gives_the_same_score(folder, tmp_path):
    """Ids of the data taken for ids of the model: a good model scores nothing."""
    shutil.copytree(folder / "student", tmp_path / "turned")
    path = tmp_path / "turned" / "config.json"
    config = json.loads(path.read_text())
    turned = ("sad", "calm", "glad")
    config |= {"id2label": dict(enumerate(turned)), "label2id": {mood: i for i, mood in enumerate(turned)}}
    path.write_text(json.dumps(config))
    model = RobertaForSequenceClassification.from_pretrained(tmp_path / "turned")
    with torch.no_grad():
        for weight in (model.classifier.out_proj.weight, model.classifier.out_proj.bias):
            weight.copy_(weight[[2, 0, 1]].clone())
    model.save_pretrained(tmp_path / "turned")
    files = {"train_file": folder / "train.csv", "test_file": folder / "test.csv", "max_length": 32}
    same = [evaluation.evaluate(place, **files) for place in (folder / "student", tmp_path / "turned")]
    assert same[0] == same[1]


def test_texts_beyond_the_positions_are_cut_there(folder, tmp_path):
    """The tokenizer of many a checkpoint knows no limit: an index error, for one long text among thousands."""
    (tmp_path / "long.csv").write_text("text,label\n" + "w5 " * 100 + ",calm\nw6,sad\n")
    found = evaluation.evaluate(
        folder / "student", train_file=folder / "train.csv", test_file=tmp_path / "long.csv", max_length=128
    )
    assert found["accuracy"] in (0.0, 0.5, 1.0)


def test_rows_without_labels_are_refused(folder):
    """A score of nothing."""
    rows = load_text(train_file=folder / "train.csv")["train"].remove_columns("label")
    with pytest.raises(ValueError, match="no labels to score by"):
        evaluation.score_rows(evaluation.saved_model(folder / "student"), tiny_tokenizer(), rows, ("accuracy",))


def test_eval_says_that_a_score_is_the_published_one(folder, data, capsys):
    """A stranger must not have to compare digits."""
    assert main(["eval", str(folder / "student"), *data]) == FINE
    said = capsys.readouterr().out
    assert "published scores (on 48 rows of test)" in said and ": same" in said and "the same as published" in said


def test_eval_fails_where_a_score_differs(folder, data, tmp_path, capsys):
    """A student whose card promises more than it keeps."""
    other = shutil.copytree(folder / "student", tmp_path / "student")
    described(other, trained_score(folder, "student") + 0.05)
    assert main(["eval", str(other), *data]) == FAILED
    assert "differs by -0.0500" in capsys.readouterr().out
    assert main(["eval", str(other), *data, "--json"]) == FAILED
    found = json.loads(capsys.readouterr().out)
    assert found["same"] is False and found["metrics"]["accuracy"] < found["published"]["accuracy"]


def test_eval_of_some_rows_is_not_compared(folder, data, capsys):
    """Twenty rows of other ones score otherwise, and that is no failure."""
    assert main(["eval", str(folder / "student"), *data, "--rows", "20", "--json"]) == FINE
    assert json.loads(capsys.readouterr().out)["same"] is None


def test_eval_of_a_model_without_a_manifest(folder, data, tmp_path, capsys):
    """Any model can be scored, but not compared."""
    other = shutil.copytree(folder / "student", tmp_path / "student")
    (other / "teacher_manifest.json").unlink()
    assert main(["eval", str(other), *data]) == FINE
    assert "nothing is published" in capsys.readouterr().out


def test_eval_takes_the_task_of_the_manifest(folder, tmp_path, capsys):
    """The one who published it knows what it was scored on; classes that do not fit are said."""
    other = shutil.copytree(folder / "student", tmp_path / "student")
    described(other, 0.5, task="digits")
    assert main(["eval", str(other)]) == WRONG_INPUT
    assert "the rows are pictures, and beside student lies no image processor" in capsys.readouterr().err


# ---- pull ----


def test_pull_shows_what_was_published(published, tmp_path, capsys):
    """Who taught it, what its classes are, what it scores: without that a checkpoint is a number of megabytes."""
    assert main(["pull", REPO, "--to", str(tmp_path / "here")]) == FINE
    said = capsys.readouterr().out
    assert f"{REPO}: RobertaForSequenceClassification, " in said and "it loads" in said
    assert "calm, glad, sad" in said and f"{REPO} (student, trained with KD)" in said
    assert f"<- {TEACHER} (teacher, trained with CrossEntropy)" in said and "(on 48 rows of test)" in said
    assert (tmp_path / "here" / "model.safetensors").is_file()


@pytest.mark.launch
def test_pull_in_another_process_and_for_scripts(published):
    """A console that lacks an import, or prints a progress bar into the JSON."""
    run = subprocess.run(
        [sys.executable, "-m", "hfkd.cli", "pull", REPO, "--json"],
        env={**os.environ, **published.environment}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == FINE, run.stderr
    found = json.loads(run.stdout)
    assert found["labels"] == list(MOODS) and found["parameters"] > 1000 and found["metrics"]["accuracy"] > 0
    assert [link["repo_id"] for link in found["lineage"]] == [REPO, TEACHER]


def test_eval_of_a_published_student(published, data, capsys):
    """The number on the card, from the files that a stranger gets."""
    assert main(["eval", REPO, *data]) == FINE
    assert "the same as published" in capsys.readouterr().out


def test_report_and_doctor_of_published_models(published, data, tmp_path, capsys):
    """A gate in CI names Hub ids, not folders."""
    output = ["--output_dir", str(tmp_path / "report"), "--train_rows", "0", "--json"]
    assert main(["report", REPO, TEACHER, *data, *output, "--require", "agreement>=0"]) == FINE
    found = json.loads(capsys.readouterr().out)
    assert found["report"]["student"]["name"] == REPO and found["failed"] == []
    assert main(["doctor", REPO, TEACHER, *data, "--json"]) in (FINE, FAILED)
    assert {finding["check"] for finding in json.loads(capsys.readouterr().out)["findings"]} >= {"labels", "memory"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pull", "tester/nothing"], "no such repository"),
        (["pull", REPO, "--revision", "nowhere"], "no such branch, tag or commit"),
        (["eval", "tester/nothing", "--task", "digits"], "no such repository"),
        (["eval", "./nowhere", "--task", "digits"], "there is no folder ./nowhere"),
        (["eval", REPO, "--task", "digts"], "unknown task 'digts'"),
        (["eval", REPO, "--task", "digits", "--train_file", "a.csv"], "choose one source of data"),
        (["eval", REPO, "--task", "movie_sentences", "--split", "dev"], "there is no dev split"),
    ],
)
def test_wrong_inputs_are_one_sentence(published, capsys, words, message):
    """A stack of calls hides the one word that was misspelt."""
    assert main(words) == WRONG_INPUT
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and said[0].startswith(f"hfkd {words[0]}: ") and message in said[0], said


def test_a_corrupted_download_is_named(published, data, capsys):
    """Weights with one wrong bit load, and answer a little worse."""
    published.fail("resolve", how="corrupt", times=None)
    assert main(["eval", REPO, *data]) == WRONG_INPUT
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and "corrupted" in said[0]


@pytest.mark.parametrize("command", ["pull", "eval", "report", "doctor"])
def test_a_hub_that_cannot_be_reached_is_said_at_once(hub, command, capsys, monkeypatch):
    """The client tries again for half a minute for each file: that looks like a hanging program."""
    import huggingface_hub.utils._http as http

    waited = []
    monkeypatch.setattr(http.time, "sleep", waited.append)
    words = {"report": ["tester/x"], "doctor": ["tester/x"]}.get(command, [])
    flags = [] if command == "pull" else ["--task", "digits"]
    with hub.connected(HF_ENDPOINT="http://127.0.0.1:9"):
        assert main([command, REPO, *words, *flags]) == WRONG_INPUT
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and "cannot be reached" in said[0] and waited == []


# ---- doctor ----


def test_the_exit_code_of_the_doctor(folder, data, capsys):
    """A script must be able to stop before the machine is rented."""
    healthy = main(["doctor", str(folder / "student"), str(folder / "student"), *data, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert healthy == (FAILED if found["errors"] else FINE)
    assert main(["doctor", str(folder / "student"), str(folder / "run"), *data]) == FAILED
    said = capsys.readouterr().out
    assert "error    teacher's weights" in said and "-> " in said and said.strip().splitlines()[-1].endswith(" ok")


# ---- the program ----


def test_help_costs_no_import():
    """Five seconds of torch for a list of four words."""
    code = (
        "import sys\nfrom hfkd.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit as end:\n    assert not end.code\n"
        "print(*sys.modules, file=sys.stderr)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in run.stderr.split()}
    assert not loaded & {"torch", "transformers", "datasets", "numpy", "huggingface_hub"}
    assert all(name in run.stdout for name in ("pull", "eval", "report", "doctor"))


@pytest.mark.parametrize("words", [[], ["dctor"], ["eval"], ["pull", "a/b", "--rows", "x"]])
def test_a_misspelt_line_ends_with_a_sentence(words, capsys):
    """argparse prints three lines of usage before the word that is wrong."""
    assert main(words) == WRONG_INPUT
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and said[0].startswith("hfkd") and "--help" in said[0]


def test_the_console_script_is_this_program():
    """`hfkd` that is not installed with the package is documentation only."""
    import tomllib
    from pathlib import Path

    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"hfkd": "hfkd.cli:main"}
