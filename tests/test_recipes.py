"""The recipe as its users start it: on files of their own, on the embedded data, with wrong inputs, on two processes."""

import csv
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

import launching
from hfkd.models.two_view import RobertaForMaskedLM
from hfkd.testing import tiny_roberta_config, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "recipes" / "self_distill_roberta.py"


@pytest.fixture(scope="module")
def recipe():
    sys.path.insert(0, str(RECIPE.parent))
    spec = importlib.util.spec_from_file_location("self_distill_roberta", RECIPE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(RECIPE.parent))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A tiny model and csv files with string labels, as a user would bring them; two rows are empty."""
    folder = tmp_path_factory.mktemp("inputs")
    torch.manual_seed(0)
    config = tiny_roberta_config(num_hidden_layers=1)
    RobertaForMaskedLM(config).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    generator = torch.Generator().manual_seed(0)
    for name, count in (("train", 48), ("test", 24)):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["sentence", "mood"])
            for i in range(count):
                words = torch.randint(5, 50, (8,), generator=generator).tolist()
                writer.writerow([" ".join(f"w{w}" for w in words), ("glad", "sad", "calm")[i % 3]])
            writer.writerow(["   ", "sad"])
    return folder


def flags(inputs, output, **changes):
    values = {
        "model_name_or_path": inputs / "model",
        "train_file": inputs / "train.csv",
        "test_file": inputs / "test.csv",
        "text_column": "sentence",
        "label_column": "mood",
        "output_dir": output,
        "max_steps": 2,
        "max_length": 12,
        "per_device_train_batch_size": 8,
        "fine_tuning_batch_size": 8,
        "fine_tuning_seeds": 2,
        "logging_steps": 1,
        "save_strategy": "steps",
        "disable_tqdm": True,
        **changes,
    }
    words = []
    for name, value in values.items():
        words += [] if value is None else [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def run(recipe, monkeypatch, words):
    monkeypatch.setattr(sys, "argv", ["self_distill_roberta.py", *words])
    recipe.main()


def test_own_files_from_text_to_a_fine_tuned_student(recipe, inputs, tmp_path, monkeypatch, capsys):
    """The one command people come for: if a file, label or stage is lost on the way, the table says nothing."""
    words = flags(inputs, tmp_path / "run", baseline=["recadam", "mars", "r3f"], recadam_gamma=10, ablation_steps=[1])
    run(recipe, monkeypatch, [*words, "--ablation_no_pretrain_loss"])
    table = (tmp_path / "run" / "results.md").read_text()
    stages = ["start", "further pre-trained", "self-distilled 1", "further pre-trained, 1 steps", "no masked loss"]
    for stage in [*stages, "start, recadam", "start, mars", "start, r3f"]:
        assert f"| {stage} |" in table
    rows = list(csv.DictReader((tmp_path / "run" / "results.csv").open()))
    assert len(rows) == 8 * 2 and {row["seed"] for row in rows} == {"0", "1"}
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "fine_tuned" / "round-1")
    assert model.config.id2label == {0: "calm", 1: "glad", 2: "sad"}
    for name in ("losses", "distances", "scores", "gaps", "steps"):
        assert (tmp_path / "run" / "figures" / f"{name}.png").stat().st_size > 5000
    card = (tmp_path / "run" / "round-1" / "README.md").read_text()
    assert "self-distilled 1" in card and str(tmp_path) not in card and str(Path.home()) not in card
    assert "task:\n      type: text-classification" in card  # no score of filled masks
    printed = capsys.readouterr().out
    assert table.strip() in printed and "fine_tuned" in printed

    # resumed: nothing is trained again but what is missing
    seed = tmp_path / "run" / "fine_tuning" / "start" / "seed-1.json"
    other = tmp_path / "run" / "fine_tuning" / "start" / "seed-0.json"
    weights = tmp_path / "run" / "round-1" / "model.safetensors"
    before, times = json.loads(seed.read_text()), (other.stat().st_mtime_ns, weights.stat().st_mtime_ns)
    seed.unlink()
    run(recipe, monkeypatch, [*words, "--ablation_no_pretrain_loss", "--resume_from_checkpoint", "True"])
    assert json.loads(seed.read_text()) == before
    assert (other.stat().st_mtime_ns, weights.stat().st_mtime_ns) == times
    assert (tmp_path / "run" / "results.md").read_text() == table

    # other settings are not averaged into the same row
    with pytest.raises(ValueError, match="fine_tuning_epochs"):
        changed = [
            *words,
            "--ablation_no_pretrain_loss",
            "--resume_from_checkpoint",
            "True",
            "--fine_tuning_epochs",
            "3",
        ]
        run(recipe, monkeypatch, changed)

    # another run does not touch it, unless it is told to
    with pytest.raises(FileExistsError, match="--overwrite"):
        run(recipe, monkeypatch, words)
    for wrong in ({"text_column": "txt"}, {"mlm_probability": 2}, {"label_smoothing_factor": 0.1}):
        with pytest.raises(ValueError):  # a wrong input beside --overwrite deletes nothing
            run(recipe, monkeypatch, [*flags(inputs, tmp_path / "run", **wrong), "--overwrite"])
    assert seed.exists()
    run(recipe, monkeypatch, [*flags(inputs, tmp_path / "run", fine_tuning_seeds=0), "--overwrite"])
    assert not seed.exists()


WRONG = {
    "unknown task": ({"task": "nope", "train_file": None, "test_file": None}, ValueError, "unknown task 'nope'"),
    "missing file": ({"train_file": "nowhere.csv"}, FileNotFoundError, "nowhere.csv"),
    "text column": ({"text_column": "txt"}, ValueError, "no text column 'txt'.*sentence"),
    "label column": ({"label_column": "label"}, ValueError, "fine-tuning needs labels"),
    "no test split": ({"test_file": None}, ValueError, "--test_file"),
    "rounds": ({"num_rounds": -1}, ValueError, "num_rounds must be 0"),
    "baseline": ({"baseline": ["dropout"]}, ValueError, "recadam, mars, r3f"),
    "profile": ({"profile": "huge"}, ValueError, "demo, study or paper"),
    "too many labels asked": ({"labelled_rows": 500}, ValueError, "500.*48"),
    "hub id": ({"model_name_or_path": "no-such/model"}, OSError, "no-such/model.*--model_name_or_path"),
    "hub data": ({"train_file": None, "test_file": None, "dataset_name": "no-such/data"}, OSError, "no-such/data"),
    "resume": ({"resume_from_checkpoint": "round-0"}, ValueError, "takes True"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_inputs_say_what_to_do(recipe, inputs, tmp_path, monkeypatch, case):
    """An error an hour into the run, or one that names a tensor shape, sends people back to copied snippets."""
    changes, kind, message = WRONG[case]
    with pytest.raises(kind, match=f"(?s){message}"):
        run(recipe, monkeypatch, flags(inputs, tmp_path / "run", **changes))
    assert not list((tmp_path / "run").glob("*")), "an early error leaves nothing behind"


def test_a_tokenizer_without_a_mask_token(recipe, inputs, tmp_path, monkeypatch):
    """Masking with None as the token would train on garbage, or stop with an index error."""
    import shutil

    shutil.copytree(inputs / "model", tmp_path / "model")
    settings = tmp_path / "model" / "tokenizer_config.json"
    content = json.loads(settings.read_text())
    content.pop("mask_token", None)
    settings.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="no mask token"):
        run(recipe, monkeypatch, flags(inputs, tmp_path / "run", model_name_or_path=tmp_path / "model"))


def test_yaml_config_with_flags_on_top(recipe, inputs, tmp_path, monkeypatch):
    """A flag that loses against the file runs another experiment than its command line says."""
    config = tmp_path / "own.yaml"
    config.write_text("num_rounds: 2\nlearning_rate: 1e-3\nfine_tuning_seeds: 0\n")
    words = flags(inputs, tmp_path / "run", fine_tuning_seeds=None, config=config, num_rounds=0)
    run(recipe, monkeypatch, words)
    record = json.loads((tmp_path / "run" / "rounds.json").read_text())
    assert record["learning_rate"] == 1e-3
    assert not (tmp_path / "run" / "round-1").exists()
    config.write_text("num_round: 2\n")
    with pytest.raises(ValueError, match=r"num_round.*num_rounds"):
        run(recipe, monkeypatch, flags(inputs, tmp_path / "other", config=config))


# ---- started as programs ----


def start(*words, log, processes=1):
    done = launching.run(RECIPE, *words, log=log, processes=processes)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def accelerate_launch(*words):
    """The one recipe that the tests start as the documentation does: each such start imports for ten seconds and more."""
    command = [str(Path(sys.executable).with_name("accelerate")), "launch", str(RECIPE), *words]
    values = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=values, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.launch
def test_two_processes_equal_one_and_accelerate_launch_is_right(inputs, tmp_path):
    """Two silent single-process runs, or a loss scaled by the number of processes, look fine until they are compared."""
    accelerate_launch(*flags(inputs, tmp_path / "one", per_device_train_batch_size=8))
    words = flags(inputs, tmp_path / "two", per_device_train_batch_size=4)
    printed = start(*words, log=tmp_path / "log", processes=2)
    assert printed.count("| stage |") == 1, "only one process reports"
    for round in ("round-0", "round-1"):
        one, two = (load_file(tmp_path / run / round / "model.safetensors") for run in ("one", "two"))
        for name, tensor in one.items():
            torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-6)
    rows = [list(csv.DictReader((tmp_path / run / "results.csv").open())) for run in ("one", "two")]
    for left, right in zip(*rows, strict=True):
        assert float(left["test_loss"]) == pytest.approx(float(right["test_loss"]), abs=1e-4)


@pytest.mark.launch
def test_the_demo_on_embedded_data(tmp_path):
    """`make demo` cut to one step a stage: real text, real weights, no network, no arguments but the bounds."""
    words = ["--output_dir", str(tmp_path / "demo"), "--max_steps", "1", "--per_device_train_batch_size", "8"]
    words += ["--labelled_rows", "32", "--test_rows", "16", "--fine_tuning_seeds", "1"]
    printed = start(*words, log=tmp_path / "log")
    assert "smoke test" in printed
    for stage in ("start", "further pre-trained", "self-distilled 1"):
        assert f"| {stage} |" in printed
    assert (tmp_path / "demo" / "round-1" / "README.md").exists()
    assert (tmp_path / "cache" / "roberta-minilm-head-1-48-0.15" / "whole").exists()
