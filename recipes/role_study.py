"""The study of role_models.py: noisy teachers that interpolate, their answers about a pool, and students of these.

Of one seed and noise rate, teacher k is trained with the seed 1000 * (seed + 1) + k on the labels that this seed made wrong:
one noisy set for all of them, as in the released code. A number of teachers means the first ones; none is ever selected.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from ensemble_study import NOISES, OWN_ROWS, member_view, refuse_missing_classes, transition_of
from hfkd import DistillationArguments
from hfkd.data.label_noise import with_label_noise
from hfkd.data.splits import MEMBERS, member_rows
from hfkd.diagnostics.metrics import accuracy
from hfkd.diagnostics.sampler import INTERPOLATES
from hfkd.fingerprint import content_hash
from hfkd.objectives import PseudoLabel
from hfkd.records import weights_hash
from hfkd.teachers import CachedTeacher, EnsembleTeacher, ModelTeacher, Teacher
from hfkd.teachers.ensemble import combine_answers
from program import rows_per_step, say
from role_data import POOL, RoleArguments, load, of_rows, without
from runs import Run, Runs, View

TEACHERS_SEED = 1000  # students have the seeds 0, 1, ...: none starts as a teacher did
COMBINE = ("vote", "logits", "mean")
DRAWS = ("example", "batch")
SINGLE, EPL, RPL, OWN_LABELS = "single", "epl", "rpl", "own_labels"


class RoleStudy:
    """Everything that can be wrong with the inputs is said when it is made, before any training."""

    def __init__(self, recipe: Any, args: DistillationArguments):
        self.recipe, self.args = recipe, args
        refuse_wrong_choices(recipe, args)
        found = load(recipe, args)
        self.found, self.data, self.view = found, found.data, found.view
        self.labels = np.asarray(self.view.held_out[""]["label"][:])
        self.transitions = {rate: self.transition(rate) for rate in (0.0, recipe.noise_rate, *recipe.other_rates)}
        self.most = max(*recipe.teachers, recipe.rate_teachers if recipe.other_rates else 1)
        count = len(self.view.train)
        self.rows = member_rows(count, self.most, recipe.rows, recipe.share)
        refuse_missing_classes(self.view.train["label"][:], self.rows, self.data.labels)
        for rate, transition in self.transitions.items():
            if rate:
                with_label_noise(self.view.train, transition)  # a class without a clean label is said now
        self.runs = Runs(recipe, args, self.data)
        # Crops differ from epoch to epoch: then every student asks the models themselves
        self.cached = not found.augmented and "label" in found.pool.column_names
        self.is_trial = is_trial(recipe, args, len(self.rows[0]))

    def transition(self, rate: float) -> Any:
        """(classes, classes). Raises ValueError where another label becomes as frequent as the right one."""
        found = transition_of(dataclasses.replace(self.recipe, noise_rate=rate), len(self.data.labels))
        wrong = (found - np.diag(np.diag(found))).max()
        if wrong >= np.diag(found).min():
            raise ValueError(
                f"a noise rate of {rate} ({self.recipe.noise}) makes a wrong label as frequent as the right one: no vote of any "
                "number of teachers can tell them apart; choose a lower rate"
            )
        return found

    # ---- teachers ----

    def teacher(self, rate: float, seed: int, number: int) -> dict[str, Any]:
        """Trained by labels alone. Raises NotSamplers where it does not fit its noisy labels, unless the run is a trial."""
        say(f"Seed {seed}, noise {rate:g}: teacher {number}")
        run = self.teacher_run(rate, seed, number)
        result = self.runs.result(run)
        logits = self.runs.answers(run.name, run.seed)[OWN_ROWS]
        fitted = accuracy(logits.argmax(-1), np.asarray(run.view.train["label"][:]))
        if fitted < INTERPOLATES and not self.is_trial:
            raise NotSamplers(
                f"teacher {number} (noise rate {rate:g}, seed {seed}) has {100 * fitted:.1f} % of its {len(run.view.train)} "
                f"noisy training labels right, below {100 * INTERPOLATES:.0f} %: teachers that do not interpolate are no "
                "samplers of the noise, and the study would be about something else. Start again with --overwrite and more "
                "--teacher_epochs, a larger network, less weight decay or no augmentation"
            )
        return {**result, "method": "teacher", "rate": rate, "k": 1, "seed": seed, "member": number, "fitted": fitted}

    def teacher_run(self, rate: float, seed: int, number: int) -> Run:
        train = self.view.train
        if rate:
            train = with_label_noise(train, self.transitions[rate], seed)
        held_out = dict(self.view.held_out)
        if self.cached:
            held_out[POOL] = self.found.pool
        noisy = of_rows(self.view, train, held_out, {**self.view.hashes, POOL: self.pool_hash()})
        own = member_view(noisy, self.rows[number], number)
        name, run_seed = f"teacher-{rate:g}", TEACHERS_SEED * (seed + 1) + number
        run = Run(name, run_seed, self.found.new_teacher, own, keep=seed == 0 or not self.cached)
        run.budget = teacher_budget(self.recipe, self.args, len(own.train))
        return run

    def pool_hash(self) -> str:
        if not hasattr(self, "_pool_hash"):
            self._pool_hash = content_hash(self.found.pool, self.found.pool.column_names)[0]
        return self._pool_hash

    def answers(self, rate: float, seed: int, k: int, prefix: str = "") -> np.ndarray:
        """(k, rows, classes) logits of the first k teachers, on the test rows or with POOL on the pool."""
        seeds = [TEACHERS_SEED * (seed + 1) + number for number in range(k)]
        return np.stack([self.runs.answers(f"teacher-{rate:g}", number)[prefix] for number in seeds])

    def ensemble(self, rate: float, seed: int, k: int) -> np.ndarray:
        """(rows,): what the first k teachers together predict on the test rows."""
        return combined(self.answers(rate, seed, k), self.recipe.combine)

    # ---- students ----

    def student(self, method: str, rate: float, seed: int, k: int) -> dict[str, Any]:
        """method: epl or rpl; of one teacher both are the single-teacher student."""
        name = f"{SINGLE if k == 1 else method}-{rate:g}-k{k}"
        say(f"Seed {seed}: {name}")
        run = Run(name, seed, self.found.new_student, self.pool_view(without(self.found.pool, "label")))
        run.objective, run.keep = PseudoLabel(), seed == 0
        combine = "sample" if method == RPL and k > 1 else self.recipe.combine
        draw = self.recipe.draw if combine == "sample" else "example"
        asked: Teacher
        if self.cached:
            rows = with_answers(run.view.train, self.answers(rate, seed, k, POOL))
            members = [CachedTeacher(name) for name in rows.column_names if name.startswith("teacher_logits_")]
            for member in members:
                member.config = SimpleNamespace(**self.data.head())
            asked, digest = EnsembleTeacher(members, combine, draw=draw), content_hash(rows, rows.column_names)[0]
        else:
            rows, folders = run.view.train, self.folders(rate, seed, k)
            models = [ModelTeacher(folder, dtype=self.args.teacher_dtype) for folder in folders]
            hashes = [weights_hash(model.model.state_dict()) for model in models]
            asked = EnsembleTeacher(models, combine, draw=draw)
            digest = hashlib.sha256("".join(hashes).encode()).hexdigest()
        run.teacher_hash = f"{combine} of {k} by {draw}: {digest}"
        run.asked = lambda: (asked, rows)
        shown = SINGLE if k == 1 else method
        return {**self.runs.result(run), "method": shown, "rate": rate, "k": k}

    def folders(self, rate: float, seed: int, k: int) -> list[str]:
        seeds = [TEACHERS_SEED * (seed + 1) + number for number in range(k)]
        return [str(self.runs.folder(f"teacher-{rate:g}", number) / "model") for number in seeds]

    def own_labels(self, seed: int) -> dict[str, Any] | None:
        """The ceiling: a student of the pool's own labels. None where the pool has none."""
        if "label" not in self.found.pool.column_names:
            return None
        say(f"Seed {seed}: student of the pool's own labels")
        run = Run(OWN_LABELS, seed, self.found.new_student, self.pool_view(self.found.pool))
        return {**self.runs.result(run), "method": OWN_LABELS, "rate": 0.0, "k": 0}

    def pool_view(self, rows: Any) -> View:
        hashes = {"train": self.pool_hash(), "held out": self.view.hashes["held out"]}
        return of_rows(self.view, rows, self.view.held_out, hashes)


class NotSamplers(Exception):
    """A teacher that does not fit its noisy training labels."""


def combined(logits: np.ndarray, rule: str) -> np.ndarray:
    """(members, rows, classes) -> (rows,) class ids."""
    answer = combine_answers(torch.from_numpy(logits), rule)
    return (answer.labels if answer.logits is None else answer.logits.argmax(-1)).numpy()


def with_answers(rows: Any, logits: np.ndarray) -> Any:
    """The pool with a column for each teacher; logits: (teachers, rows, classes)."""
    from datasets import Dataset, Features, List, Value, concatenate_datasets

    names = [f"teacher_logits_{number}" for number in range(len(logits))]
    features = Features(dict.fromkeys(names, List(Value("float32"))))
    answers = Dataset.from_dict(dict(zip(names, map(list, logits), strict=True)), features=features)
    return concatenate_datasets([rows, answers], axis=1)


def teacher_budget(recipe: Any, args: DistillationArguments, rows: int) -> dict[str, Any]:
    """The teachers' own epochs, learning rate and milestones; --max_steps bounds them too."""
    budget: dict[str, Any] = {"lr_milestones": recipe.teacher_lr_milestones}
    if recipe.teacher_learning_rate is not None:
        budget["learning_rate"] = recipe.teacher_learning_rate
    if recipe.teacher_epochs is not None:
        steps = math.ceil(recipe.teacher_epochs * math.ceil(rows / rows_per_step(args)))
        budget["num_train_epochs"] = recipe.teacher_epochs
        budget["max_steps"] = min(steps, args.max_steps) if args.max_steps > 0 else -1
    return budget


def is_trial(recipe: Any, args: DistillationArguments, rows: int) -> bool:
    """Whether --max_steps ends the teachers' training early (or has bounded their rows): nobody expects samplers then."""
    epochs, steps = recipe.teacher_epochs or args.num_train_epochs, args.max_steps
    whole = math.ceil(epochs * math.ceil(rows / rows_per_step(args)))
    return steps > 0 and (steps < whole or steps * rows_per_step(args) <= rows)


# ---- what is refused ----


def refuse_wrong_choices(recipe: RoleArguments, args: DistillationArguments) -> None:
    if not recipe.teachers or min(recipe.teachers) < 1:
        raise ValueError(f"--teachers are numbers of teachers, 1 or more each, got {recipe.teachers}")
    for name in ("seeds", "rate_teachers"):
        if getattr(recipe, name) < 1:
            raise ValueError(f"--{name} must be 1 or more, got {getattr(recipe, name)}")
    for name, known in (("combine", COMBINE), ("draw", DRAWS), ("rows", MEMBERS), ("noise", NOISES)):
        if getattr(recipe, name) not in known:
            raise ValueError(f"--{name} {getattr(recipe, name)}: choose {', '.join(known)}")
    if recipe.partners and recipe.noise == "symmetric":
        raise ValueError(f"--partners {recipe.partners} are for --noise partners")
    if recipe.noise_rate == 0:
        raise ValueError("--noise_rate 0 makes no sampler: clean labels are a control of every study anyway")
    if args.names_objective() or args.label_smoothing_factor:
        raise ValueError(
            "students learn hard pseudo-labels and teachers plain labels: leave objective, temperature, alpha and label "
            "smoothing out"
        )
    for whose, start, sizes in (
        ("teacher", recipe.teacher_start, recipe.teacher_config),
        ("student", recipe.student, recipe.student_config),
    ):
        if start and sizes:
            raise ValueError(f"a {whose} starts from weights ({start}) or from sizes ({sizes}): give one")
    epochs = recipe.teacher_epochs or args.num_train_epochs
    stones = recipe.teacher_lr_milestones
    if stones and not (sorted(stones) == list(stones) and 0 < stones[0] <= stones[-1] < epochs):
        raise ValueError(
            f"--teacher_lr_milestones are epochs in ascending order, above 0 and below {epochs:g}, got {stones}"
        )
