"""A benchmark that no longer runs leaves a number in the documentation that nobody can check. Nothing here is timed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import launching

BENCHMARKS = Path(__file__).parents[1] / "recipes" / "benchmarks"
SIZES = {"steps": 1, "batch_size": 2, "length": 16, "hidden_size": 32, "num_layers": 1, "vocab_size": 100}
TINY = [*(f"--{name}={value}" for name, value in SIZES.items()), "--device=cpu"]


@pytest.mark.launch
def test_masked_lm_step_compares_both_sides(tmp_path):
    """A ratio without its two sides, or of two sides that compute different things, would be believed all the same."""
    path = tmp_path / "numbers.json"
    command = [sys.executable, str(BENCHMARKS / "masked_lm_step.py"), *TINY, "--json", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    numbers = json.loads(path.read_text(encoding="utf-8"))
    measured = {"cpu_seconds", "wall_seconds", "step_bytes", "peak_bytes"}
    measured |= {"default_malloc_step_bytes", "default_malloc_peak_bytes"}
    assert numbers["stock"].keys() == numbers["hfkd"].keys() == numbers["ratios"].keys() == measured
    for name, ratio in numbers["ratios"].items():
        assert numbers["stock"][name] > 0 and numbers["hfkd"][name] > 0, name
        assert ratio == pytest.approx(numbers["hfkd"][name] / numbers["stock"][name])
    assert max(numbers["differences"].values()) <= 1e-4
    assert set(numbers["headline"].values()) <= measured
    assert "step ratio" in run.stdout and "memory ratio" in run.stdout


@pytest.mark.launch
def test_the_distillation_benchmark_measures_every_side(tmp_path):
    """A benchmark that no longer runs, or compares sides that learn other things, keeps a claim alive that nobody checks."""
    path = tmp_path / "numbers.json"
    tiny = ["--student", "1", "32", "--teacher", "1", "64", "--vocab_size", "30522", "--steps", "2", "--blocks", "1"]
    short = ["--batch_size", "8", "--length", "16", "--rows", "40", "--leak_steps", "20", "--json", str(path)]
    done = launching.run(BENCHMARKS / "distillation_step.py", *tiny, *short, log=tmp_path / "log")
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(path.read_text())
    assert {"copied snippet", "hfkd, online", "hfkd, cached", "hfkd, five cached"} <= found["step"].keys()
    assert all(seconds > 0 for part in ("step", "padding", "cache") for seconds in found[part].values())
    assert found["leak"]["last_fifth_mib"] > 0


@pytest.mark.launch
def test_the_image_benchmark_measures_every_side(tmp_path):
    """The claim that augmenting once costs nothing beside the two models is believed only while this still runs."""
    path = tmp_path / "numbers.json"
    tiny = ["--task", "mnist_5k", "--student", "resnet10-xxxs", "--teacher", "resnet10-xxs", "--vit", "1", "32"]
    short = ["--batch_size", "4", "--steps", "2", "--blocks", "1", "--json", str(path)]
    done = launching.run(BENCHMARKS / "image_step.py", *tiny, *short, log=tmp_path / "log")
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(path.read_text())
    assert {"bare student", "bare teacher's forward", "hfkd, online"} <= found["step"].keys()
    assert {"bare MAE + clean pass", "hfkd, teacher asked", "hfkd, features cached"} <= found["rounds"].keys()
    assert all(seconds > 0 for part in found.values() for seconds in part.values())


@pytest.mark.launch
def test_the_look_ahead_benchmark_compares_sides_that_agree(tmp_path):
    """Two meta steps that compute other gradients have no ratio, and a claim of cheapness would stand on nothing."""
    path = tmp_path / "numbers.json"
    tiny = ["--student", "resnet10-xxxs", "--teacher", "resnet10-xxs", "--encoder", "1", "32", "--vocab_size", "100"]
    short = ["--length", "12", "--image_batch_size", "4", "--text_batch_size", "4", "--overhead_batch_sizes", "4", "4"]
    fewest = ["--repeats", "1", "--runs", "1", "--steps", "20", "--json", str(path)]
    found = {}
    for part in (["--only", "work", "overhead", "group"], ["--only", "memory", "--setting", "text"]):
        done = launching.run(BENCHMARKS / "meta_step.py", *tiny, *short, *fewest, *part, log=tmp_path / "log")
        assert done.returncode == 0, done.stderr[-3000:]
        found |= json.loads(path.read_text())
    for setting in ("image", "text"):
        sides, apart = found["work"][setting]["seconds"], found["work"][setting]["differences"]
        assert {"released", "fused, jvp", "reference order, jvp", "reference order, last_layer"} <= sides.keys()
        assert all(one["cpu"] > 0 and one["wall"] > 0 for one in sides.values())
        assert 0 < apart["fused, jvp"] <= 1e-4 and 0 < apart["reference order, jvp"] <= 1e-4
        assert apart["reference order, last_layer"] > 1e-3  # else another comparison is of a thing with itself
        assert found["overhead"][setting]["ratio"] > 0
    assert found["memory"]["text"]["bytes"].keys() == {"ordinary", "released", "fused"}
    assert {"group of four", "four runs", "the teacher's forward"} <= found["group"]["seconds"].keys()
