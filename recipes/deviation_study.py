"""The settings of deviations.py: a teacher, and students that learn from labels or from it alone, on text or images.

A setting is a YAML file with the values of distill_text.py or distill_image.py, and of the fields below. What is trained and
asked is theirs; here wrong labels come in, training rows are scored as well, and logits become points and lines.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

import image_study
import text_study
from hfkd import DistillationArguments
from hfkd.data.images import IMAGE_TASKS
from hfkd.data.label_noise import transition_matrix, with_label_noise
from hfkd.data.text import TEXT_TASKS
from hfkd.diagnostics.logit_logit import LogitLogit, logit_logit
from hfkd.diagnostics.metrics import accuracy, agreement
from hfkd.fingerprint import content_hash
from hfkd.objectives import CrossEntropy, Distillation
from hfkd.trainers.arguments import parse_arguments
from program import HERE, at_random, one_source, say
from runs import View

TEACHER, ONE_HOT, KD, CONTROL = "teacher", "one_hot", "kd", "control"
TRAIN = "train_"  # the prefix of what is scored on training rows
CONTROLS_SEED = (
    5000  # a control shares its start with no one-hot student, nor with a teacher (image_study.TEACHERS_SEED)
)


@dataclass
class Noise:
    """Beside the study's own fields."""

    modality: str | None = field(default=None, metadata={"help": "text | image; default: that of the task."})
    noise_rate: float = field(
        default=0.0, metadata={"help": "Share of training labels made wrong, evenly over the other classes."}
    )
    scored_train_rows: int = field(
        default=5000, metadata={"help": "Training rows that are scored too, drawn once, without augmentation."}
    )
    student_temperature: float = field(
        default=1.0, metadata={"help": "Of the plots, not of the loss: divides the distilled student's logits."}
    )
    teacher_temperature: float | None = field(
        default=None,
        metadata={"help": "The same for its teacher's logits; default 1, or the loss's where that has it on one side."},
    )


@dataclass
class ImageSetting(Noise, image_study.StudyArguments):
    """A setting on images."""


@dataclass
class TextSetting(Noise, text_study.StudyArguments):
    """A setting on texts."""

    train_rows: int | None = field(default=None, metadata={"help": "Train on this many texts, drawn once."})


SETTINGS: dict[str, tuple[type, type]] = {
    "image": (ImageSetting, image_study.Study),
    "text": (TextSetting, text_study.Study),
}


class Deviations:
    """One setting. Everything that can be wrong with the inputs is said when it is made, before any training."""

    def __init__(self, file: str, output: Path, seeds: int, flags: list[str]):
        path = find(file)
        self.name = path.stem.removeprefix("deviations_").removeprefix("distill_")
        kind, study = SETTINGS[modality_of(path)]
        words = [*flags, "--seeds", str(seeds), "--output_dir", str(output / self.name)]
        self.recipe, self.args = parse_arguments(kind, DistillationArguments, arguments=words, defaults=path)
        one_source(self.recipe, flags)
        if self.args.hub_model_id:  # every setting has a repository of its own
            self.args.hub_model_id = f"{self.args.hub_model_id}-{self.name.replace('_', '-')}"
        self.recipe.teacher_seeds = 1 if self.recipe.teacher else seeds
        self.objective = self.args.make_objective("kd")
        if not isinstance(self.objective, Distillation):
            raise ValueError(
                f"{path.name}: --objective {self.args.objective} asks no teacher; choose kd, dkd, dist, ..."
            )
        self.study: Any = study(self.recipe, self.args, [CrossEntropy(), self.objective])
        if self.study.data.problem_type != "single_label_classification":
            raise ValueError(
                f"{path.name}: {self.study.data.problem_type} has no most probable class to plot; choose a task with one label "
                "per example"
            )
        same = self.study.teacher_view is self.study.view
        self.study.view = self.observed(self.study.view)
        self.study.teacher_view = self.study.view if same else self.observed(self.study.teacher_view)

    def observed(self, view: View) -> View:
        """The view with wrong labels in its training rows, some of which are scored: on the labels that models were given."""
        train = at_random(view.train, self.recipe.train_rows)
        if self.recipe.noise_rate != 0:
            transition = transition_matrix(len(self.study.data.labels), self.recipe.noise_rate)
            train = with_label_noise(train, transition).remove_columns("clean_label")
        held_out = {**view.held_out, TRAIN: at_random(train, self.recipe.scored_train_rows)}
        hashes = {name: content_hash(rows, rows.column_names)[0] for name, rows in {"train": train, **held_out}.items()}
        return replace(view, train=train, held_out=held_out, hashes=hashes)

    def train(self, seed: int) -> None:
        say(f"{self.name}, seed {seed}: teacher")
        self.study.teacher(seed)
        for name, runs_seed in self.students(seed).items():
            say(f"{self.name}, seed {seed}: {name.replace('_', '-')} student")
            objective = self.args.make_objective("kd") if name == KD else None
            self.study.student(name, runs_seed, objective)

    def students(self, seed: int) -> dict[str, int]:
        """Each kind's own seed; the teacher is that of `seed` for all of them."""
        return {ONE_HOT: seed, KD: seed, CONTROL: seed + CONTROLS_SEED * self.recipe.teacher_seeds}

    # ---- what came out ----

    def rows(self, seed: int) -> list[dict[str, Any]]:
        """Accuracy of every run on both splits, on the training rows by the labels that it was given; agreement with its
        teacher."""
        teacher = self.logits(TEACHER, seed % self.recipe.teacher_seeds)
        found = []
        for name, runs_seed in {TEACHER: seed % self.recipe.teacher_seeds, **self.students(seed)}.items():
            logits = self.logits(name, runs_seed)
            scores = {f"{split}_accuracy": self.accuracy(split, logits) for split in ("train", "test")}
            same = {
                f"{split}_agreement": agreement(logits[split].argmax(1), teacher[split].argmax(1)) for split in logits
            }
            found.append(
                {"setting": self.name, "run": name, "seed": seed, **scores, **({} if name == TEACHER else same)}
            )
        return found

    def logits(self, name: str, seed: int) -> dict[str, Any]:
        """Of the training rows and of the first split that is held out."""
        found = self.study.runs.answers(name, seed)
        return {"train": found[TRAIN], "test": found[self.prefix("test")]}

    def prefix(self, split: str) -> str:
        return TRAIN if split == "train" else next(iter(self.study.view.held_out))

    def accuracy(self, split: str, logits: dict[str, Any]) -> float:
        return accuracy(logits[split].argmax(1), self.labels(split))

    def labels(self, split: str) -> np.ndarray:
        return np.asarray(self.study.view.held_out[self.prefix(split)]["label"][:])

    def deviations(self, seed: int, bootstrap: int) -> dict[tuple[str, str], LogitLogit]:
        """By student and split. The control has learned no temperature, so that its teacher's logits stay whole."""
        teacher, found = self.logits(TEACHER, seed % self.recipe.teacher_seeds), {}
        for name, runs_seed in self.students(seed).items():
            logits = self.logits(name, runs_seed)
            ours, theirs = self.temperatures() if name == KD else (1.0, 1.0)
            for split in ("train", "test"):
                found[name, split] = logit_logit(
                    logits[split],
                    teacher[split],
                    self.labels(split),
                    ours,
                    theirs,
                    bootstrap=bootstrap,
                    student_ids=self.ids(self.study.view, split),
                    teacher_ids=self.ids(self.study.teacher_view, split),
                )
        return found

    def temperatures(self) -> tuple[float, float]:
        """Of student and teacher, as the loss matches them."""
        one_sided = getattr(self.objective, "temperature_on", "both") == "teacher"
        usual = float(getattr(self.objective, "temperature", 1.0)) if one_sided else 1.0
        given = self.recipe.teacher_temperature
        return self.recipe.student_temperature, usual if given is None else given

    def ids(self, view: View, split: str) -> list[int]:
        return view.held_out[self.prefix(split)]["example_id"][:]


def find(file: str) -> Path:
    places = (Path(file), HERE / "configs" / file)
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise FileNotFoundError(f"--settings {file}: there is no such file, neither here nor in recipes/configs")
    return found


def modality_of(path: Path) -> str:
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold `name: value` lines, not a {type(values).__name__}")
    task = values.get("task")
    known = "image" if task in IMAGE_TASKS else "text" if task in TEXT_TASKS else None
    found = values.get("modality", known)
    if found not in SETTINGS:
        raise ValueError(
            f"{path}: no telling whether {task or 'its data'} is text or images; add modality: text | image"
        )
    return str(found)
