"""The eigenspace recipe as its users start it: tiny networks on digits, resumed studies, wrong inputs."""

import csv
import importlib
import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file

from hfkd.data import embedded
from hfkd.diagnostics.eigenspace import compare
from hfkd.diagnostics.trajectory import read_trajectory

ROOT = Path(__file__).resolve().parents[1]
RECIPES, CONFIGS = ROOT / "recipes", ROOT / "recipes" / "configs"
KINDS = ("random_features", "mlp", "cnn")
FOLDERS = {"teacher": 1000, "one_hot": 0, "distilled": 0, "control": 2000}


@pytest.fixture(scope="module")
def recipes():
    """The modules by name, imported from the folder as the programs import each other."""
    sys.path.insert(0, str(RECIPES))
    yield {name: importlib.import_module(name) for name in ("eigenspace", "small_networks")}
    sys.path.remove(str(RECIPES))


def flags(**values):
    words = []
    for name, value in values.items():
        words += [] if value is None else [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def tiny(output, **changes):
    """Six steps on 96 of the 8 x 8 digits."""
    values = {
        "task": "digits",
        "image_size": 8,
        "widths": [12, 10, 4],
        "directions": [1, 2, 4, 8, 60],
        "drawn": [1, 8],
        "max_steps": 6,
        "per_device_train_batch_size": 16,
        "learning_rates": [0.1, 0.2, 0.05],
        "seeds": 1,
        "output_dir": output,
        "disable_tqdm": True,
        **changes,
    }
    return flags(**values)


@pytest.fixture(scope="module")
def study(recipes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study") / "run"
    recipes["eigenspace"].main(tiny(folder))
    return folder


def folder_of(study, kind, role, seed=0):
    return study / "runs" / f"{kind}-{role}" / f"seed-{FOLDERS[role] + seed}"


def table(path):
    return list(csv.DictReader(path.open()))


# ---- the study ----


def test_one_hot_distilled_and_control_share_a_start(study):
    """Curves from two starts differ before anything is distilled."""
    for kind in KINDS:
        settings = {role: json.loads((folder_of(study, kind, role) / "settings.json").read_text()) for role in FOLDERS}
        starts = {role: found["start"] for role, found in settings.items()}
        assert starts["one_hot"] == starts["distilled"] == starts["control"]
        # A perceptron that teaches has weights of its own; random features are the data of both sides
        assert (starts["teacher"] == starts["one_hot"]) == (kind == "random_features")
        one_hot, distilled = settings["one_hot"], settings["distilled"]
        assert {n for n in one_hot if one_hot[n] != distilled[n]} == {"objective", "teacher"}
        assert "KD" in distilled["objective"] and "'alpha': 1.0" in distilled["objective"]


def test_records_are_of_every_step_along_the_datas_directions(study, recipes):
    """Directions of other images, or of the test images, are not what the weights learn along."""
    found = load_file(folder_of(study, "mlp", "one_hot") / "directions.safetensors")
    rows = json.loads((study / "splits.json").read_text())["train"]
    source = embedded.digits()
    pixels = np.stack([np.asarray(source[i]["image"], dtype=np.float64).ravel() for i in rows]) / 255
    pixels = (pixels - 0.1307) / 0.3081  # the recipe's own scale
    matrix = np.cov(pixels.T, bias=True)
    values, vectors = found["eigenvalues"], found["vectors"]
    np.testing.assert_allclose(matrix @ vectors, values * vectors, atol=1e-4)
    expected = np.sort(np.linalg.eigvalsh(matrix))[::-1]
    kept = [place for place in (1, 2, 4, 8, 60) if expected[place - 1] > 1e-6 * expected[0]]
    np.testing.assert_allclose(values, expected[[place - 1 for place in kept]], rtol=1e-4)
    for kind in KINDS:
        runs = {
            role: read_trajectory(folder_of(study, kind, role) / "trajectory.safetensors") for role in list(FOLDERS)[1:]
        }
        for run in runs.values():
            assert run.steps.tolist() == list(range(7)) and (run.moves[0] == 0).all() and (run.moves[-1] > 0).all()
        assert not np.array_equal(runs["one_hot"].moves, runs["control"].moves), (
            "the control's rows come in another order"
        )


def test_the_table_is_what_the_records_say(study, recipes):
    """A share of the wrong run, the control's say, under the distilled student's head is the opposite finding."""
    rows = {row["network"]: row for row in table(study / "shares.csv")}
    text = (study / "results.md").read_text()
    for kind in KINDS:
        one_hot, *others = (
            read_trajectory(folder_of(study, kind, role) / "trajectory.safetensors")
            for role in ("one_hot", "distilled", "control")
        )
        cells = []
        for moves, size in ((False, "weights"), (True, "moves")):
            for role, other in zip(("distilled", "control"), others, strict=True):
                found = compare(one_hot, other, moves=moves)
                share = float(rows[kind][f"{role}_{size}"])
                assert share == pytest.approx(found.share, nan_ok=True)
                assert int(rows[kind][f"{role}_{size}_pairs"]) == found.pairs
                cells.append("– (nothing to compare)" if math.isnan(share) else f"{100 * share:.0f} (n=1)")
        line = next(line for line in text.splitlines() if line.startswith(f"| {recipes['eigenspace'].SHOWN[kind]} |"))
        assert line.strip("| ").split(" | ")[2:] == cells
    assert {row["role"] for row in table(study / "results.csv")} == set(FOLDERS)
    assert all(row["train_accuracy"] for row in table(study / "results.csv")), "do the teachers interpolate?"


def test_random_features_stay_and_their_head_starts_at_0(study, recipes):
    """Features that are trained along are another model than the theory's."""
    networks = recipes["small_networks"]
    config = {"kind": "random_features", "image_size": 8, "width": 12, "num_labels": 10}
    torch.manual_seed(0)
    model = networks.SmallClassifier(networks.SmallConfig(**config))
    assert not model.head.weight.any() and model.drawn.std() > 0
    saved = networks.SmallClassifier.from_pretrained(folder_of(study, "random_features", "teacher") / "model")
    assert saved.head.weight.any() and [name for name, _ in saved.named_parameters()] == ["head.weight"]
    start = json.loads((folder_of(study, "random_features", "teacher") / "settings.json").read_text())["start"]
    trained = saved.state_dict() | {"head.weight": torch.zeros_like(saved.head.weight)}
    weights_hash = importlib.import_module("hfkd.records").weights_hash
    assert weights_hash(trained) == start


def test_a_stopped_study_goes_on_to_the_same_table(study, recipes, tmp_path):
    """Records that were made twice, or along directions of their own, change the result of the machine that was stopped."""
    folder = tmp_path / "run"
    shutil.copytree(study, folder)
    for kind, role in (("mlp", "distilled"), ("cnn", "one_hot")):
        for path in folder_of(folder, kind, role).iterdir():
            if path.name != "settings.json":
                path.unlink()
    for name in ("results.csv", "results.md", "shares.csv"):
        (folder / name).unlink()
    kept = folder_of(folder, "mlp", "one_hot") / "result.json"
    before = kept.stat().st_mtime_ns
    recipes["eigenspace"].main(tiny(folder, resume_from_checkpoint=True))
    assert kept.stat().st_mtime_ns == before
    assert (folder / "results.md").read_text() == (study / "results.md").read_text()
    assert (folder / "shares.csv").read_text() == (study / "shares.csv").read_text()


def test_wrong_labels_are_trained_on_and_not_scored_on(recipes, tmp_path):
    """Noise in the test labels lowers every accuracy by the same share and looks like a finding."""
    words = tiny(tmp_path / "run", noise_rate=0.3, max_steps=-1, num_train_epochs=1)
    _, _, made = recipes["eigenspace"].prepare(words)
    source = embedded.digits()["label"][:]
    for rows, wrong in ((made.view.train, 0.3), (made.view.held_out[""], 0.0)):
        labels, clean = np.array(rows["label"][:]), np.array([source[i] for i in rows["example_id"][:]])
        assert np.mean(labels != clean) == pytest.approx(wrong, abs=0.005)
    recipes["eigenspace"].main(
        tiny(tmp_path / "other", noise_rate=0.3, networks=["mlp"], widths=[4], learning_rates=[0.1])
    )


# ---- settings and inputs ----


@pytest.mark.parametrize("profile", ["demo", "study"])
def test_both_profiles_run_two_steps(recipes, tmp_path, profile):
    """A misspelt key is found out after the other networks have been trained."""
    words = ["--profile", profile, *flags(output_dir=tmp_path / "run", max_steps=2, seeds=1, disable_tqdm=True)]
    recipes["eigenspace"].main([*words, *flags(networks=["mlp"], widths=[8], learning_rates=[0.3])])
    given = yaml.safe_load((CONFIGS / f"eigenspace_{profile}.yaml").read_text())
    settings = json.loads((folder_of(tmp_path / "run", "mlp", "distilled") / "settings.json").read_text())
    assert settings["learning_rate"] == 0.3 and "sgd" in str(settings["optim"]), "the network's own rate"
    assert given["alpha"] == 1 and len(given["widths"]) == len(given["learning_rates"]) == len(given["networks"]) == 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"networks": ["mlp", "vit"]}, "--networks mlp vit: choose of random_features, mlp, cnn"),
        (
            {"networks": ["mlp"], "learning_rates": [0.1]},
            r"--widths \[12, 10, 4\]: one of 1 or more is needed for each of mlp",
        ),
        (
            {"learning_rates": [0.1]},
            r"--learning_rates \[0.1\]: one above 0 is needed for each of random_features, mlp, cnn",
        ),
        ({"directions": [1]}, "two or more in ascending order"),
        ({"directions": [2, 1]}, "two or more in ascending order"),
        ({"directions": [0, 1]}, "1 being the top one"),
        ({"drawn": [1, 5]}, r"--drawn \[1, 5\]: name two of --directions"),
        ({"seeds": 0}, "must be 1 or more, got 0 and 1"),
        ({"objective": "cross_entropy", "alpha": None}, "has no|asks no teacher"),
        ({"noise_rate": 1.0}, "rate"),
        ({"profile": "paper"}, "choose demo or study"),
        ({"image_size": 3}, "--image_size 3"),
    ],
)
def test_wrong_choices_are_said_before_training(recipes, tmp_path, changes, words):
    """A study that ends in a traceback after its teachers were trained has cost their time."""
    with pytest.raises(ValueError, match=words):
        recipes["eigenspace"].prepare(tiny(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_shares_have_intervals_that_end_at_0_and_100(recipes):
    """An interval up to 112 % of the pairs tells the reader that nobody has looked."""
    share_of = recipes["eigenspace"].share_of
    assert share_of([1.0, 0.9, 0.95]) == "95 [83, 100]"
    assert share_of([0.5]) == "50 (n=1)" and share_of([math.nan]) == "– (nothing to compare)"
    assert share_of([0.5, math.nan]) == "50 (n=1, 1 seeds without a pair)"
