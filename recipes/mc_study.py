"""The study of mc_distil.py: one teacher a seed, a warm start, and every method as a group that starts from it.

A group shares a batch and the teacher's answer, and equals separate runs wherever its students' weights do not depend on each
other (tests/test_collaborative.py), so that every method has the same rows, order, steps, start and optimizer settings.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, Trainer

from group_runs import GroupRun, GroupRuns
from hfkd import CollaborativeArguments
from hfkd.data.label_noise import instance_dependent_labels
from hfkd.fingerprint import content_hash
from hfkd.lookahead import kind_of
from hfkd.meta import CNet, ConstantWeights, LogitTrunk, WeightTable, trunk_for
from hfkd.models.student_group import StudentGroup
from hfkd.objectives.collaboration import Collaboration, MutualLearning
from hfkd.records import read_json, weights_hash
from hfkd.teachers import ModelTeacher, Teacher
from hfkd.teachers.labels import label_order
from hfkd.trainers.meta_check import refuse_unknown_kernels
from mc_baselines import Apart, Assisted, DenselyGuided
from mc_data import McArguments, TextMcArguments, load
from program import rows_per_step, say
from runs import View, predict

CE, KD, MC_DISTIL, META, DML, TAKD, DGKD, AMAL, FIXED = METHODS = (
    *("ce", "kd", "mc_distil", "meta_k1", "dml", "takd", "dgkd", "amal", "fixed"),
)
LEARNED = (MC_DISTIL, META, AMAL)  # weights are learned on the meta rows
SEVERAL = (DML, TAKD, DGKD)  # need two students or more
TEACHER, WARM = "teacher", "warm"
TEACHERS_SEED = 1000  # no student starts as its teacher did


class McStudy:
    """Everything that can be wrong with the inputs is said when it is made, before any training."""

    def __init__(self, recipe: Any, args: CollaborativeArguments):
        self.recipe, self.args = recipe, args
        refuse_wrong_choices(recipe, args)
        self.found = load(recipe, args)
        self.data, self.view = self.found.data, self.found.view
        self.runs = GroupRuns(recipe, args, self.data)
        self.names = list(self.found.new_students)
        self.sizes = {name: new().num_parameters() for name, new in self.found.new_students.items()}
        self.temperature = 2.0 if args.temperature is None else args.temperature
        self.views: dict[Any, View] = {}
        self.order = None
        if recipe.teacher:
            self.order = label_order(self.load(recipe.teacher).config, AutoConfig.for_model("vit", **self.data.head()))
        group = StudentGroup(self.fresh(self.names))  # names and labels that make no group are refused
        parts = self.objective(MC_DISTIL).parts
        self.network(0).build(self.names, parts, group.config.num_labels, None)  # and a coordinator that cannot be
        if {*LEARNED} & {*recipe.methods, *(recipe.noise_methods if recipe.noise_rate else ())}:
            refuse_unknown_kernels(group, args)  # and students that cannot be looked ahead of

    # ---- rows ----

    def rows(self, method: str, rate: float, seed: int) -> View:
        """Without the meta rows, but for baselines where --baselines_use_meta_rows says so; their labels stay right."""
        everything = self.recipe.baselines_use_meta_rows and method not in (*LEARNED, TEACHER, WARM)
        key = (rate, seed if rate else None, everything)
        if key not in self.views:
            train = self.view.train if not rate else with_labels(self.view.train, self.wrong_labels(rate, seed))
            if everything:
                from datasets import concatenate_datasets

                train = concatenate_datasets([train, self.found.meta])
            hashes = {**self.view.hashes, "train": content_hash(train, train.column_names)[0]}
            self.views[key] = dataclasses.replace(self.view, train=train, hashes=hashes)
        return self.views[key]

    def wrong_labels(self, rate: float, seed: int) -> np.ndarray:
        labels = self.view.train["label"][:]
        return instance_dependent_labels(self.found.thumbnails(), labels, rate, seed, len(self.data.labels or ()))

    # ---- the teacher ----

    def teacher(self, rate: float, seed: int) -> dict[str, Any]:
        """Trained on the labels of this rate, without the meta rows; or the given one, which is scored."""
        if self.recipe.teacher:
            return self.given_teacher()
        say(f"Seed {seed}{noted(rate)}: teacher")
        return self.runs.result(self.teacher_run(rate, seed))

    def teacher_run(self, rate: float, seed: int) -> GroupRun:
        view = self.rows(TEACHER, rate, seed)
        name, new = named(TEACHER, rate), self.found.new_teacher
        run = GroupRun(name, TEACHERS_SEED + seed, lambda: StudentGroup({TEACHER: new()}), view, students=[TEACHER])
        run.objective, run.keep = Collaboration(teacher=False), True
        run.budget = self.budget(self.recipe.teacher_epochs, view)
        if self.recipe.teacher_learning_rate is not None:
            run.budget["learning_rate"] = self.recipe.teacher_learning_rate
        return run

    def given_teacher(self) -> dict[str, Any]:
        run = self.teacher_run(0.0, 0)
        folder, teacher = self.runs.folder(run.name, run.seed), self.load(self.recipe.teacher)
        digest = weights_hash(teacher.model.state_dict())
        self.runs.check_settings(folder, {"teacher": digest, "rows": run.view.hashes, **run.view.settings})
        if (found := read_json(folder / "result.json")) is not None:
            return found
        say(f"Teacher: scoring {self.recipe.teacher}")
        teacher.model.config.update(self.data.head())
        trainer = self.runs.trainer(run, StudentGroup({TEACHER: teacher.model}), self.runs.arguments(run, folder))
        logits = {prefix: predict(trainer, rows) for prefix, rows in run.view.held_out.items()}
        if self.order is not None:
            logits = {prefix: np.ascontiguousarray(values[..., self.order]) for prefix, values in logits.items()}
        return self.runs.close(run, folder, self.runs.score(run, logits), logits)

    def teacher_folder(self, rate: float, seed: int) -> str:
        return str(self.recipe.teacher or self.folder(TEACHER, rate, TEACHERS_SEED + seed) / TEACHER)

    def load(self, source: str) -> ModelTeacher:
        untrained = self.args.allow_untrained_teacher
        return ModelTeacher(source, dtype=self.args.teacher_dtype, allow_untrained=untrained)

    def folder(self, method: str, rate: float, seed: int) -> Path:
        return self.runs.folder(named(method, rate), seed) / "model"

    # ---- the students ----

    def warm(self, rate: float, seed: int) -> dict[str, Any]:
        """Students trained on the labels alone: what every method starts from, and DGKD's assistants."""
        say(f"Seed {seed}{noted(rate)}: students on labels, where the methods start from")
        run = self.group_run(WARM, rate, seed, self.names)
        run.model = lambda: StudentGroup(self.fresh(self.names))
        run.objective, run.budget = Collaboration(teacher=False), self.budget(self.recipe.warm_epochs, run.view)
        return self.runs.result(run)

    def result(self, method: str, rate: float, seed: int) -> dict[str, Any]:
        """`{"students": {name: metrics}, ...}`; teacher and warm start must be there."""
        say(f"Seed {seed}{noted(rate)}: {method}")
        return self.takd(rate, seed) if method == TAKD else self.runs.result(self.run(method, rate, seed))

    def run(self, method: str, rate: float, seed: int) -> GroupRun:
        """Every method but takd, as one group."""
        run = self.group_run(method, rate, seed, self.names)
        run.objective = self.objective(method)
        if method in LEARNED:
            run.weights, run.weighted_by = self.coordinator(method, seed), self.described(method)
            run.meta = self.found.meta
        else:
            weights = self.constants(method)
            run.weights, run.weighted_by = lambda: ConstantWeights(**weights), f"constant {weights}"
        if method == AMAL:
            run.budget |= {"meta_engine": "last_layer", "meta_order": "reference"}
            run.budget |= {"coordinator_interval": self.recipe.amal_interval, "coordinator_interval_unit": "epochs"}
        if "teacher" in run.objective.needs:
            self.ask(run, self.assisted(rate, seed) if method == DGKD else self.load(self.teacher_folder(rate, seed)))
        return run

    def objective(self, method: str) -> Any:
        if method == CE:
            return Collaboration(teacher=False)
        if method == DML:
            return MutualLearning()
        if method == DGKD:
            return DenselyGuided(self.temperature, self.larger())
        return Collaboration(self.temperature, pooled=method == MC_DISTIL and self.args.pooled_student)

    def constants(self, method: str) -> dict[str, Any]:
        """Of the losses, for all students or for each; dgkd: as many labels' losses as there are teachers."""
        a, given = self.recipe.kd_alpha, self.recipe.fixed_distill
        fixed = dict(zip(self.names, given if len(given) > 1 else given * len(self.names), strict=True))
        targets = {name: 1 + sum(row) for name, row in zip(self.names, self.larger(), strict=True)}
        return {
            CE: {"task": 1.0},
            KD: {"task": 1 - a, "distill": a},
            DML: {"task": 1.0, "mutual": 1.0},
            DGKD: {"task": {name: count * (1 - a) for name, count in targets.items()}, "distill": a},
            FIXED: {"task": {name: 1 - weight for name, weight in fixed.items()}, "distill": fixed},
        }[method]

    def takd(self, rate: float, seed: int) -> dict[str, Any]:
        """A chain over decreasing sizes: each is distilled from the next larger one that was. The largest is that of kd."""
        chain = sorted(self.names, key=lambda name: -self.sizes[name])
        found = {chain[0]: self.runs.result(self.run(KD, rate, seed))["students"][chain[0]]}
        above = self.folder(KD, rate, seed) / chain[0]
        for name in chain[1:]:
            run = self.group_run(f"{TAKD}-{name}", rate, seed, [name])
            weights = self.constants(KD)
            run.objective, run.weighted_by = self.objective(KD), f"constant {weights}"
            run.weights = lambda weights=weights: ConstantWeights(**weights)
            self.ask(run, self.load(str(above)))
            found[name] = self.runs.result(run)["students"][name]
            above = self.folder(f"{TAKD}-{name}", rate, seed) / name
        return {"students": found}

    def group_run(self, method: str, rate: float, seed: int, names: list[str]) -> GroupRun:
        view = self.rows(method.split("-")[0], rate, seed)
        return GroupRun(
            named(method, rate), seed, lambda: self.start(rate, seed, names), view, students=names, keep=True
        )

    def start(self, rate: float, seed: int, names: list[str]) -> StudentGroup:
        if self.recipe.warm_start == "none":
            return StudentGroup(self.fresh(names))
        return StudentGroup.from_pretrained({name: self.folder(WARM, rate, seed) / name for name in names})

    def fresh(self, names: list[str]) -> dict[str, Any]:
        """All are drawn, so that a student starts alike with and without the others."""
        drawn = {name: new() for name, new in self.found.new_students.items()}
        return {name: drawn[name] for name in names}

    def ask(self, run: GroupRun, teacher: Teacher) -> None:
        run.teacher_hash = digest_of(teacher)
        run.asked = lambda: (teacher, run.view.train)

    def assisted(self, rate: float, seed: int) -> Assisted:
        """The students of the labels alone: those of the warm start, else those of ce."""
        method = WARM if self.recipe.warm_start == "ce" else CE
        if method == CE:
            self.runs.result(self.run(CE, rate, seed))
        sources = {name: self.folder(method, rate, seed) / name for name in self.names}
        return Assisted(self.load(self.teacher_folder(rate, seed)), StudentGroup.from_pretrained(sources))

    def larger(self) -> list[list[bool]]:
        """For each student, which of all are larger."""
        return [[self.sizes[one] > self.sizes[name] for one in self.names] for name in self.names]

    def budget(self, epochs: float | None, view: View) -> dict[str, Any]:
        """Epochs of their own; --max_steps bounds them too."""
        if epochs is None:
            return {}
        steps = math.ceil(epochs * math.ceil(len(view.train) / rows_per_step(self.args)))
        return {
            "num_train_epochs": epochs,
            "max_steps": min(steps, self.args.max_steps) if self.args.max_steps > 0 else -1,
        }

    # ---- coordinators ----

    def coordinator(self, method: str, seed: int) -> Any:
        if method == AMAL:
            return WeightTable
        if method == META:
            return lambda: Apart([self.network(seed, number) for number in range(len(self.names))])
        return lambda: self.network(seed)

    def network(self, seed: int, number: int = 0) -> CNet:
        with torch.random.fork_rng():
            torch.manual_seed(1000 * number + seed)
            logits = self.recipe.coordinator_input == "logits"
            config = next(iter(self.found.new_students.values()))().config
            trunk = LogitTrunk() if logits else trunk_for(config, self.view.train.column_names)
            return CNet(trunk, self.recipe.coordinator_output, self.recipe.shared_weights)

    def described(self, method: str) -> str:
        if method == AMAL:
            return "WeightTable()"
        recipe = self.recipe
        return f"CNet({recipe.coordinator_input}, {recipe.coordinator_output}, shared={recipe.shared_weights})"


# ---- names and rows ----


def named(method: str, rate: float) -> str:
    return f"{method}-noise{rate:g}" if rate else method


def noted(rate: float) -> str:
    return f", {100 * rate:g} % of labels wrong" if rate else ""


def with_labels(rows: Any, labels: np.ndarray) -> Any:
    """The rows with other labels, of the same type and at the same place."""
    order, feature = rows.column_names, rows.features["label"]
    return rows.remove_columns("label").add_column("label", labels, feature=feature).select_columns(order)


def digest_of(teacher: Teacher) -> str:
    return " and ".join(weights_hash(weights) for weights in teacher.weights())


# ---- what is refused ----


def refuse_wrong_choices(recipe: McArguments, args: CollaborativeArguments) -> None:
    for name in ("methods", "noise_methods"):
        if odd := [method for method in getattr(recipe, name) if method not in METHODS]:
            raise ValueError(f"--{name} {' '.join(odd)}: choose of {', '.join(METHODS)}")
    if not recipe.methods and not recipe.noise_rate:
        raise ValueError(f"--methods names none: choose of {', '.join(METHODS)}")
    refuse_wrong_students(recipe)
    given = [name for name in ("teacher", "teacher_start", "teacher_config") if getattr(recipe, name) is not None]
    if given not in (["teacher"], ["teacher_start"], ["teacher_config"]) and not isinstance(recipe, TextMcArguments):
        raise ValueError(
            f"one teacher is needed, given: {' and '.join(given) or 'none'}; choose --teacher or --teacher_config"
        )
    for name, known in (("warm_start", (CE, "none")), ("coordinator_input", ("input", "logits"))):
        if getattr(recipe, name) not in known:
            raise ValueError(f"--{name} {getattr(recipe, name)}: choose {' or '.join(known)}")
    for name in ("seeds", "amal_interval"):
        if getattr(recipe, name) < 1:
            raise ValueError(f"--{name} must be 1 or more, got {getattr(recipe, name)}")
    for name in ("search", "corruption_rows"):
        if getattr(recipe, name) < 0:
            raise ValueError(f"--{name} must be 0 or more, got {getattr(recipe, name)}")
    if not 0 <= recipe.noise_rate < 1:
        raise ValueError(f"--noise_rate is a share of labels, from 0 to below 1, got {recipe.noise_rate}")
    weights = [recipe.kd_alpha, *recipe.fixed_distill]
    if not all(0 <= weight <= 1 for weight in weights):
        raise ValueError(f"--kd_alpha and --fixed_distill are the teacher's share, 0 to 1, got {weights}")
    refuse_unknown_steps(args)


def refuse_wrong_students(recipe: McArguments) -> None:
    names = [Path(name).stem for name in recipe.students]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"--students names networks, each once, got {', '.join(recipe.students) or 'none'}")
    asked = {*recipe.methods, *(recipe.noise_methods if recipe.noise_rate else ())}
    if len(names) == 1 and (found := [method for method in SEVERAL if method in asked]):
        raise ValueError(
            f"{' and '.join(found)}: students that learn from each other are two or more, got {names[0]} alone"
        )
    if len(recipe.fixed_distill) not in (1, len(names)):
        raise ValueError(
            f"--fixed_distill is one number for all students or one for each of {len(names)}, got {recipe.fixed_distill}"
        )


def refuse_unknown_steps(args: CollaborativeArguments) -> None:
    """An optimizer that no look-ahead knows is found out now, not when teacher and warm start are trained."""
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(args)
    kind_of(kind([torch.zeros(1, requires_grad=True)], **settings))
