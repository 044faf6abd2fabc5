"""The fidelity report (`hfkd report`, and the recipe of its name) as CI starts it: models in folders, texts and pictures,
conditions and their exit codes."""

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import RobertaForSequenceClassification, ViTConfig, ViTForImageClassification, ViTImageProcessorPil

import launching
from hfkd.cli import WRONG_INPUT, main
from hfkd.testing import tiny_roberta_config, tiny_tokenizer

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
MOODS = ("calm", "glad", "sad")


def report(words):
    return main(["report", *words])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Student, teacher, a teacher of other classes, text files; pictures of two sizes' models."""
    folder = tmp_path_factory.mktemp("models")
    for seed, (name, moods) in enumerate((("student", MOODS), ("teacher", MOODS), ("other", ("a", "b", "c")))):
        torch.manual_seed(seed)
        maps = {"id2label": dict(enumerate(moods)), "label2id": {mood: i for i, mood in enumerate(moods)}}
        config = tiny_roberta_config(**maps, initializer_range=0.7)
        RobertaForSequenceClassification(config).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    generator = np.random.default_rng(0)
    for name, count in (("train", 30), ("test", 24)):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["sentence", "class"])
            for i in range(count):
                words = generator.integers(5, 50, generator.integers(1, 12))
                writer.writerow([" ".join(f"w{word}" for word in words), MOODS[i % 3]])
    (folder / "unlabelled.csv").write_text("text\n" + "".join(f"w{5 + i} w{9 + i}\n" for i in range(12)))
    for name, size in (("small", 8), ("large", 16)):
        torch.manual_seed(size)
        config = ViTConfig(image_size=size, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                           intermediate_size=32, num_labels=2, initializer_range=0.5)  # fmt: skip
        ViTForImageClassification(config).save_pretrained(folder / name)
        ViTImageProcessorPil(size={"height": size, "width": size}).save_pretrained(folder / name)
    for number in range(20):
        path = folder / "pictures" / ("train", "test")[number % 2] / ("cat", "dog")[number % 4 // 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(path)
    return folder


def words(folder, output, *more, teacher="teacher", **changes):
    values = {"train_file": folder / "train.csv", "test_file": folder / "test.csv", "output_dir": output,
              "max_length": 16, **changes}  # fmt: skip
    flags = [
        word
        for name, value in values.items()
        if value is not None
        for word in ((f"--{name}",) if value is True else (f"--{name}", str(value)))
    ]
    return [str(folder / "student"), str(folder / teacher), *flags, *more]


def test_texts_are_compared_and_the_tables_lie_there(folder, tmp_path, capsys):
    """A report of the training split, or without the teacher's training accuracy, answers another question."""
    assert report(words(folder, tmp_path / "out")) == 0
    kept = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (kept["examples"], kept["labelled"], kept["train"]["examples"]) == (24, 24, 30)
    assert kept["class_names"] == list(MOODS) and kept["student"]["name"] == "student"
    printed = capsys.readouterr().out
    assert (tmp_path / "out" / "report.md").read_text().strip() in printed
    assert "accuracy on 30 training rows (%)" in printed and str(tmp_path / "out" / "reliability.png") in printed


def test_rows_are_bounded_and_the_split_is_chosen(folder, tmp_path):
    """Without bounds a quick look at a large task takes hours."""
    flags = {"rows": 9, "train_rows": 0, "split": "train"}
    assert report(words(folder, tmp_path, **flags)) == 0
    kept = json.loads((tmp_path / "report.json").read_text())
    assert kept["examples"] == 9 and kept["train"] is None


def test_texts_without_labels_are_compared_where_that_is_said(folder, tmp_path, capsys):
    """Labels that are not found must not turn a gate on accuracy into a report without it."""
    flags = {"train_file": folder / "unlabelled.csv", "test_file": folder / "unlabelled.csv", "train_rows": 0}
    assert report(words(folder, tmp_path, **flags)) == WRONG_INPUT
    assert "label" in capsys.readouterr().err
    assert report(words(folder, tmp_path, unlabelled=True, **flags)) == 0
    assert json.loads((tmp_path / "report.json").read_text())["labelled"] == 0
    assert report(words(folder, tmp_path, "--require", "student_accuracy>=0", unlabelled=True, **flags)) == 1
    assert "student_accuracy>=0 (not measured" in capsys.readouterr().err


def test_pictures_are_compared(folder, tmp_path):
    """A recipe that reads texts alone leaves image students without a gate."""
    models = [str(folder / "small"), str(folder / "large")]
    assert report([*models, "--data_dir", str(folder / "pictures"), "--output_dir", str(tmp_path)]) == 0
    kept = json.loads((tmp_path / "report.json").read_text())
    assert kept["examples"] == 10 and kept["teacher"]["name"] == "large" and kept["train"]["labelled"] > 0


@pytest.mark.launch
def test_the_exit_code_of_the_program_says_that_a_condition_is_not_met(folder, tmp_path):
    """A CI that reads 0 ships the student, whatever the text above says."""
    line = words(folder, tmp_path, "--require", "agreement>=0", "agreement>1", "train_teacher_accuracy>=2", rows=8)
    failed = launching.run(RECIPES / "fidelity_report.py", *line, log=tmp_path / "log")
    assert failed.returncode == 1
    last = failed.stderr.strip().splitlines()[-1]
    assert last.startswith("2 of 3 conditions are not met: agreement>1 (agreement is ")
    assert "train_teacher_accuracy>=2 (train_teacher_accuracy is " in last and "agreement>=0" not in last


def test_conditions_that_are_met_are_said(folder, tmp_path, capsys):
    """A gate that says nothing when it passes cannot be told from one that was never read."""
    assert report(words(folder, tmp_path, "--require", "agreement>=0", "kl_divergence<=1e9", train_rows=0)) == 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last == "All conditions are met: agreement>=0; kl_divergence<=1e+09"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"more": ("--require", "agreement")}, "stands in quotes"),
        ({"more": ("--require", "agrement>=1")}, "no number is called 'agrement'"),
        ({"teacher": "other"}, "student's classes are .*the teacher's"),
        ({"teacher": "nowhere"}, "there is no folder .*nowhere"),
        ({"split": "validation"}, "there is no validation split, the data has train, test"),
        ({"train_file": None, "test_file": None}, "task|train_file"),
        ({"task": "mnist"}, "mnist"),
        ({"group_column": "dialect"}, "no column 'dialect' of subgroups"),
        ({"rows": 0}, "at least 1"),
        ({"batch_size": 0}, "batch_size must be 1 or more, got 0"),
        ({"more": ("--requre", "agreement>=1")}, "unrecognized arguments: --requre agreement>=1"),
    ],
)
def test_wrong_inputs_end_with_a_sentence_and_another_code(folder, tmp_path, capsys, changes, message):
    """A stack of calls, or the code of a failed condition, blames the student for a misspelt flag."""
    more = changes.pop("more", ())
    assert report(words(folder, tmp_path, *more, **changes)) == WRONG_INPUT == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("hfkd report: ") and re.search(message, said), said
    assert not (tmp_path / "report.json").exists()


def test_what_nobody_foresaw_is_not_the_code_of_a_failed_condition(folder, tmp_path, capsys):
    """Weights that were cut off while they were copied: a CI that reads 1 says that the student has left its teacher."""
    shutil.copytree(folder / "teacher", tmp_path / "damaged")
    weights = tmp_path / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    given = words(folder, tmp_path, "--require", "agreement>=0", teacher=tmp_path / "damaged")
    assert report(given) == WRONG_INPUT and "Error" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert report(words(folder, tmp_path / "file", "--require", "agreement>=0", rows=8)) == WRONG_INPUT


def test_help_names_every_number(capsys):
    """A condition cannot be written by someone who cannot find the names."""
    with pytest.raises(SystemExit):
        report(["--help"])
    assert "train_worst_subgroup_difference" in "".join(capsys.readouterr().out.split())
