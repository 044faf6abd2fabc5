"""Which saved folders are whole.

A folder counts as whole when its manifest, written last and atomically, names the hash of every file in it. Stock
checkpoints are picked by their number, whole or not, so a run that is killed while it saves cannot be resumed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from transformers.utils import logging

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
