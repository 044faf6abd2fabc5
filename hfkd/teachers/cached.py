"""Answers that were given before, as columns of the data."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from hfkd.outputs import Batch, Progress, TeacherOutput
from hfkd.teachers.teacher import Needs, Teacher


class CachedTeacher(Teacher):
    """Answers from dataset columns that `hfkd.cache` wrote (or anything else); no model in memory.

    logits, features: the names of the columns, None where there is none.
    cache: the directory of the cache, whose manifest names the classes; without it they are matched by number.

    Raises ValueError for a directory without a manifest, and when more is needed than the columns hold.
    """

    def __init__(
        self, logits: str | None = "teacher_logits", features: str | None = None, cache: str | Path | None = None
    ):
        self.logits, self.features = logits, features
        self.columns = tuple(name for name in (logits, features) if name is not None)
        self.view = "plain"  # of the collator, while it was cached: the trainer compares it with the collator's
        self._teacher_facts: dict[str, Any] = {}
        self.weights_sha256 = ""  # of whoever gave the answers
        if cache is not None:
            self._read_manifest(Path(cache))

    def _read_manifest(self, directory: Path) -> None:
        path = directory / "manifest.json"
        if not path.is_file():
            raise ValueError(f"{directory} holds no manifest.json, so it is no finished cache: run cache_teacher again")
        manifest = json.loads(path.read_text(encoding="utf-8"))
        self.view, self._teacher_facts = manifest["view"], manifest["teacher"]
        self.weights_sha256 = manifest.get("weights") or ""
        settings = dict(manifest["config"])
        if settings.get("id2label"):  # JSON has no integer keys
            settings["id2label"] = {int(i): name for i, name in settings["id2label"].items()}
        self.config = SimpleNamespace(**settings)

    def prepare(self, student: Any, needs: Needs, device: torch.device | str) -> None:
        held = {"teacher", *(["features"] if self.features else [])}
        if beyond := sorted(set(needs) - held):
            raise ValueError(
                f"the objective needs {', '.join(beyond)}, and cached columns hold {', '.join(self.columns)} only: use a "
                "ModelTeacher (or cache_teacher(features=True) and CachedTeacher(features='teacher_features'))"
            )
        super().prepare(student, needs, device)

    def align_labels(self, student_config: Any) -> None:
        if self.logits is not None:
            super().align_labels(student_config)

    def respond(self, batch: Batch, progress: Progress | None = None) -> TeacherOutput:
        missing = [name for name in self.columns if name not in batch]
        if missing:
            raise ValueError(
                f"the batch has no {', '.join(missing)}, only {sorted(batch)}: attach them with load_cache(...), keep them "
                "in the data set, and take a collator that passes them on"
            )
        return TeacherOutput(
            logits=None if self.logits is None else batch[self.logits],
            features=None if self.features is None else batch[self.features],
        )

    def facts(self) -> dict[str, Any]:
        return {**super().facts(), "members": [self._teacher_facts] if self._teacher_facts else []}
