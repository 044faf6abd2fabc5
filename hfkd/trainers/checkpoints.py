"""Which saved folders are whole, and how their weights are read back.

A folder counts as whole when its manifest, written last and atomically, names the hash of every file in it. Stock
checkpoints are picked by their number, whole or not, so a run that is killed while it saves cannot be resumed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from hfkd.records import file_hash, read_json, write_json

logger = logging.get_logger(__name__)
MANIFEST = "whole.json"


def mark_whole(directory: Path) -> None:
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != MANIFEST)
    write_json(directory / MANIFEST, {path.relative_to(directory).as_posix(): file_hash(path) for path in files})


def odd_files(directory: Path, hashes: Mapping[str, str]) -> list[str]:
    """The files that are missing or differ from their hash."""
    return [
        name
        for name, expected in hashes.items()
        if not (directory / name).is_file() or file_hash(directory / name) != expected
    ]


def last_whole_checkpoint(directory: Path) -> Path | None:
    """The highest `checkpoint-N` that is whole; every higher one that is not is named in a warning."""
    numbered = [path for path in directory.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    for checkpoint in sorted(numbered, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        hashes = read_json(checkpoint / MANIFEST)
        if not isinstance(hashes, dict):
            logger.warning(f"{checkpoint} was not finished ({MANIFEST} is missing); falling back to the one before it")
            continue
        odd = odd_files(checkpoint, hashes)
        if not odd:
            return checkpoint
        logger.warning(f"{checkpoint}: {', '.join(odd)} is corrupt or truncated; falling back to the one before it")
    return None


def load_renamed_weights(model: Any, directory: str | Path) -> bool:
    """Load weights whose saved names differ from the model's own; False where none differ and nothing was done.

    transformers renames the weights of ViT, DeiT, ViTMAE and others when it saves them, and the stock Trainer reads a
    checkpoint back by name: it resumes, and loads its best model, without the encoder, with no more than a warning.
    """
    saved = saved_names(Path(directory))
    if not isinstance(model, PreTrainedModel) or saved <= model.state_dict().keys():
        return False
    load_student(model, directory, strict=False)  # what an objective trains has a file of its own
    return True


def load_student(student: Any, directory: str | Path, strict: bool = True) -> None:
    """Weights and statistics as `save_pretrained` wrote them, under the names that the model has."""
    stored = type(student).from_pretrained(directory, dtype=student.dtype, use_safetensors=True)
    student.load_state_dict(stored.state_dict(), strict=strict)


def saved_names(directory: Path) -> set[str]:
    index = directory / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file():
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    if not (directory / SAFE_WEIGHTS_NAME).is_file():
        return set()
    with safe_open(directory / SAFE_WEIGHTS_NAME, "pt") as file:
        return set(file.keys())
