"""teacher_manifest.json: who taught a saved student what, beside its weights, for programs; the card says it to people."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hfkd.records import file_hash, read_json, write_json

MANIFEST_FILE = "teacher_manifest.json"
FORMAT = 1
OF_TRAINING = ("objective.safetensors",)  # projections: training goes on with them, whoever uses the model needs none
HASHED = ("*.safetensors", "*.safetensors.index.json", "config.json")


def write_manifest(folder: str | Path, facts: Mapping[str, Any]) -> Path:
    """Write `facts` and the sha256 of the weights' and configuration's files; whole or not at all.

    facts: role, teacher (id, repo, revision, dtype, weights, labels, private, kind; None without one), objective (name,
    settings, equation, paper), labels, task, metrics, evaluated_on, versions.
    """
    folder = Path(folder)
    files = sorted({path for pattern in HASHED for path in folder.glob(pattern) if path.name not in OF_TRAINING})
    hashes = {path.name: file_hash(path) for path in files}
    write_json(folder / MANIFEST_FILE, {"format": FORMAT, **facts, "files": hashes})
    return folder / MANIFEST_FILE


def read_manifest(folder: str | Path) -> dict[str, Any] | None:
    """The manifest, or None where there is none. ValueError for one of a later format."""
    found = read_json(Path(folder) / MANIFEST_FILE)
    if not isinstance(found, dict):
        return None
    if found.get("format", 0) > FORMAT:
        raise ValueError(
            f"{MANIFEST_FILE} has format {found['format']}, this version of hfkd reads {FORMAT}: upgrade hfkd"
        )
    return found
