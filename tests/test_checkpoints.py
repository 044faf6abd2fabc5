"""Which saved folders are whole: a run that was killed while it saved must go on from the one before."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

from hfkd.records import file_hash, read_json, weights_hash, write_json
from hfkd.trainers import checkpoints
from hfkd.trainers.checkpoints import MANIFEST, last_whole_checkpoint, mark_whole, odd_files


@pytest.fixture
def warnings():
    """The module's warnings; transformers' loggers need not propagate, so a handler of our own collects them."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())
    checkpoints.logger.addHandler(handler)
    yield lines
    checkpoints.logger.removeHandler(handler)


def checkpoint(run: Path, number: int, whole: bool = True) -> Path:
    directory = run / f"checkpoint-{number}"
    (directory / "nested").mkdir(parents=True)
    (directory / "model.safetensors").write_bytes(bytes(range(256)) * number)
    (directory / "nested" / "optimizer.pt").write_bytes(b"moments" * number)
    if whole:
        mark_whole(directory)
    return directory


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


# ---- whole or not ----


def test_the_highest_whole_checkpoint_by_number(tmp_path, warnings):
    """By name, checkpoint-9 comes after checkpoint-100, and the run loses 91 steps without a word."""
    for number in (9, 100, 10):
        checkpoint(tmp_path, number)
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-100"
    (tmp_path / "checkpoint-100" / MANIFEST).unlink()
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    (tmp_path / "checkpoint-10" / MANIFEST).unlink()
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-9"
    assert any("checkpoint-100" in line for line in warnings) and any("checkpoint-10 " in line for line in warnings)


def test_a_checkpoint_without_manifest_was_not_finished(tmp_path, warnings):
    """Killed while it saved: the weights are there, the optimizer's state may not be."""
    checkpoint(tmp_path, 1)
    checkpoint(tmp_path, 2, whole=False)
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-1"
    assert len(warnings) == 1 and "checkpoint-2" in warnings[0] and MANIFEST in warnings[0]


@pytest.mark.parametrize(
    "damage", [truncate, empty, flip, Path.unlink], ids=["truncated", "empty", "flipped", "missing"]
)
@pytest.mark.parametrize("name", ["model.safetensors", "nested/optimizer.pt"])
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_used(tmp_path, warnings, damage, name):
    """A full disk leaves a file of the right name: resumed from it, the run trains on noise."""
    checkpoint(tmp_path, 1)
    damage(checkpoint(tmp_path, 2) / name)
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-1"
    assert len(warnings) == 1 and "checkpoint-2" in warnings[0] and name in warnings[0]


def test_a_truncated_manifest_counts_as_none(tmp_path, warnings):
    """A manifest cut in the middle must not end the resume with a JSON error."""
    checkpoint(tmp_path, 1)
    truncate(checkpoint(tmp_path, 2) / MANIFEST)
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-1"
    assert "checkpoint-2" in warnings[0]


def test_a_sound_run_warns_of_nothing(tmp_path, warnings):
    """Warnings on every resume are no longer read when one matters."""
    for number in (1, 2):
        checkpoint(tmp_path, number)
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert warnings == []


def test_no_whole_checkpoint_is_none(tmp_path):
    """An exception here would stop a run that can start its round again."""
    assert last_whole_checkpoint(tmp_path) is None
    assert last_whole_checkpoint(tmp_path / "nowhere") is None
    checkpoint(tmp_path, 1, whole=False)
    assert last_whole_checkpoint(tmp_path) is None


def test_other_folders_are_no_checkpoints(tmp_path, warnings):
    """A folder that the user named checkpoint-best has no number to compare."""
    checkpoint(tmp_path, 1)
    for name in ("checkpoint-best", "checkpoint-", "tmp-checkpoint-7"):
        (tmp_path / name).mkdir()
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-1"
    assert warnings == []


def test_the_manifest_names_every_file_with_its_hash(tmp_path):
    """A file outside the manifest can be lost without anybody noticing."""
    directory = checkpoint(tmp_path, 3)
    hashes = read_json(directory / MANIFEST)
    assert hashes == {name: file_hash(directory / name) for name in ("model.safetensors", "nested/optimizer.pt")}
    assert odd_files(directory, hashes) == []
    mark_whole(directory)  # a second time: the manifest is not in itself
    assert read_json(directory / MANIFEST) == hashes
    flip(directory / "model.safetensors")
    assert odd_files(directory, hashes) == ["model.safetensors"]


# ---- write_json ----


def test_json_is_written_whole_and_leaves_nothing_behind(tmp_path):
    """A leftover temporary file would be hashed into the manifest and uploaded with the model."""
    path = tmp_path / "done.json"
    write_json(path, {"weights": [1, 2]})
    assert json.loads(path.read_text()) == {"weights": [1, 2]}
    write_json(path, {"weights": []})
    assert read_json(path) == {"weights": []}
    assert [entry.name for entry in tmp_path.iterdir()] == ["done.json"]


def test_a_failing_write_keeps_the_old_content(tmp_path):
    """A record that is half overwritten when a value cannot be written makes a finished round look unfinished."""
    path = tmp_path / "done.json"
    write_json(path, {"round": 1})
    with pytest.raises(TypeError):
        write_json(path, {"round": 2, "weights": torch.ones(2)})
    assert read_json(path) == {"round": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["done.json"]


def test_a_kill_before_the_rename_keeps_the_old_content(tmp_path, monkeypatch):
    """Written in place, a record is empty for as long as the disk takes."""
    path = tmp_path / "done.json"
    write_json(path, {"round": 1})

    def killed(self, target):
        assert json.loads(self.read_text()) == {"round": 2}  # whole before it takes the name
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_json(path, {"round": 2})
    assert read_json(path) == {"round": 1}


@pytest.mark.parametrize("content", [None, "", '{"round": ', b"\xff\xfe"], ids=["missing", "empty", "cut", "binary"])
def test_unreadable_json_is_none(tmp_path, content):
    """A resume must fall back, not end in a traceback about a file the user never wrote."""
    path = tmp_path / "done.json"
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    assert read_json(path) is None


# ---- weights_hash ----


def test_weights_hash_sees_names_values_and_types_but_not_order():
    """Two different start weights with one hash would mix two runs' rounds."""
    weights = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0])}
    first = weights_hash(weights)
    assert first == weights_hash(dict(reversed(weights.items())))
    assert first == weights_hash({name: value.clone().requires_grad_() for name, value in weights.items()})
    others = [
        {"a": weights["a"], "c": weights["b"]},
        {"a": weights["b"], "b": weights["a"]},
        {"a": weights["a"].bfloat16(), "b": weights["b"]},
        {"a": torch.nextafter(weights["a"], torch.tensor(9.0)), "b": weights["b"]},
    ]
    assert len({first, *map(weights_hash, others)}) == 5
    strided = torch.tensor([[1.0, 9.0], [2.0, 9.0]])[:, 0]
    assert weights_hash({"a": strided, "b": weights["b"]}) == first
