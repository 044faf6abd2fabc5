"""RPL: which label an example gets in an epoch is a law of the seed, not of how the run is spread, cut or cached.

Compared is a hash over (epoch, example_id, label) of everything that was learned from, written down inside the objective.
"""

import hashlib
import signal
from pathlib import Path

import pytest
import torch

import launching
from hfkd.cache import cache_members
from hfkd.outputs import Progress
from hfkd.teachers import ModelTeacher
from hfkd.teachers.ensemble import keyed_choice
from two_processes_pseudo_labels import RUNS, members, pool, pseudo_trainer

HERE = Path(__file__).parent
SCRIPT = str(HERE / "two_processes_pseudo_labels.py")


def learned(folder):
    """All (epoch, example_id, label) of all processes, repetitions dropped."""
    lines = [line for path in sorted(folder.glob("labels-*.txt")) for line in path.read_text().splitlines()]
    return {tuple(int(part) for part in line.split()) for line in lines}


def hashes(folder):
    """By epoch, over its examples in order of their ids."""
    found = learned(folder)
    epochs = sorted({epoch for epoch, _, _ in found})
    return {e: hashlib.sha256(repr(sorted(t for t in found if t[0] == e)).encode()).hexdigest() for e in epochs}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process, one batch a step, never killed: by draw."""
    folder, weights = tmp_path_factory.mktemp("alone"), {}
    for draw, rows in (("example", None), ("batch", None), ("ragged", pool(30))):
        trainer = pseudo_trainer(folder / draw, {}, "example" if draw == "ragged" else draw, rows)
        trainer.train()
        weights[draw] = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    return folder, weights


def assert_close(found, expected, tolerance=1e-9):
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}")


def test_labels_are_the_drawn_members_in_every_epoch(alone):
    """Labels of one member for ever are a single teacher's; labels of nobody are noise. Both train without an error."""
    folder, _ = alone
    found, rows = learned(folder / "example"), pool()
    answers = [
        [int(ModelTeacher(member)({"input_ids": torch.tensor([ids])}).logits.argmax()) for ids in rows["input_ids"]]
        for member in members()
    ]
    expected = set()
    for epoch in range(3):
        drawn = keyed_choice(torch.arange(32), Progress(epoch=epoch, seed=42), 3)
        expected |= {(epoch, i, answers[int(drawn[i])][i]) for i in range(32)}
    assert found == expected
    by_epoch = [{(i, label) for e, i, label in found if e == epoch} for epoch in range(3)]
    assert by_epoch[0] != by_epoch[1] != by_epoch[2] != by_epoch[0]


@pytest.mark.parametrize("draw", ["example", "batch"])
def test_accumulation_changes_no_label(alone, draw, tmp_path):
    """A draw for each micro-batch makes a run on a small GPU another experiment than the same run on a large one."""
    folder, weights = alone
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    trainer = pseudo_trainer(tmp_path, settings, draw)
    trainer.train()
    assert hashes(tmp_path) == hashes(folder / draw) and len(hashes(tmp_path)) == 3
    assert_close(trainer.model.state_dict(), weights[draw])


@pytest.mark.launch
@pytest.mark.parametrize("draw", ["example", "batch"])
def test_a_kill_changes_no_label(alone, draw, tmp_path):
    """SIGKILL in the middle of epoch 1: draws from a generator would go on elsewhere, and nobody could repeat the run."""
    folder, weights = alone
    killed = launching.run(SCRIPT, str(tmp_path), "--draw", draw, "--killed_at", "7", log=tmp_path / "log")
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    before = learned(tmp_path)
    assert {epoch for epoch, _, _ in before} == {0, 1} and len(before) == 7 * 8
    trainer = pseudo_trainer(tmp_path, {"save_strategy": "steps", "save_steps": 3}, draw)
    trainer.train(resume_from_checkpoint=True)
    lines = (tmp_path / "labels-0.txt").read_text().splitlines()
    assert len(lines) == 13 * 8  # step 7 was learned from twice, and repetitions are dropped only where they agree
    assert hashes(tmp_path) == hashes(folder / draw)
    assert_close(trainer.model.state_dict(), weights[draw])


@pytest.mark.parametrize("draw", ["example", "batch"])
def test_cached_members_give_the_labels_of_asked_ones(alone, draw, tmp_path):
    """A cache of drawn labels would repeat the first epoch's for ever: RPL with one label an example is another method."""
    folder, weights = alone
    rows, cached = cache_members(pool(), members(), tmp_path / "cache", dtype="float64", batch_size=8)
    trainer = pseudo_trainer(tmp_path / "run", {}, draw, rows, cached)
    trainer.train()
    assert not [member for member in trainer.teacher.members if hasattr(member, "model")]
    assert hashes(tmp_path / "run") == hashes(folder / draw)
    assert_close(trainer.model.state_dict(), weights[draw])


# ---- two processes = one process ----


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    output = tmp_path_factory.mktemp("two")
    done = launching.run(SCRIPT, str(output), log=output / "log", processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    return output, [torch.load(output / f"rank-{rank}.pt") for rank in (0, 1)]


@pytest.mark.launch
@pytest.mark.parametrize("run", RUNS)
def test_two_processes_learn_the_same_labels(alone, ranks, run):
    """Draws by rank, or by the place in the batch, make the number of GPUs a hyper-parameter of the method."""
    output, found = ranks
    assert [rank["world_size"] for rank in found] == [2, 2]
    halves = [set((output / run / f"labels-{rank}.txt").read_text().splitlines()) for rank in (0, 1)]
    assert halves[0] and halves[1] and halves[0] != halves[1]
    folder, weights = alone
    draw = run.split()[0]
    assert hashes(output / run) == hashes(folder / draw) and len(hashes(output / run)) == 3
    assert_close(found[1][run], found[0][run], 0)
    if draw != "ragged":  # the rows that even out the last batch count twice
        assert_close(found[0][run], weights[draw])
