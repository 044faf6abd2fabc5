"""Switching the loss (Nagarajan et al. 2023, On student-teacher deviations, arXiv 2301.12923): from the teacher to the labels
and from the labels to the teacher, in the middle of training, with a teacher that interpolates and one that does not.

    accelerate launch recipes/loss_switch.py                     # embedded MNIST digits, no network, 6 minutes or less
    accelerate launch recipes/loss_switch.py --profile study     # 3 seeds, 23 minutes or less on one core
    accelerate launch recipes/loss_switch.py --teacher_epochs 30 5 1 --switch_at 0.25 --window 50
    accelerate launch recipes/loss_switch.py --config recipes/configs/loss_switch_cifar100.yaml      # the paper's setting

For each of --teacher_epochs one teacher is trained by labels; how it answers on its own training images says whether it
interpolates. Then students on one budget, of the same rows, order, start weights, steps and trainer: by labels alone
(one_hot), and with each teacher by its answers (kd), and by the one and then the other (kd_to_one_hot, one_hot_to_kd). Where
the switch begins is a share of training (--switch_at), how long it takes a number of optimizer steps (--window); a window that
ends after training is refused.

The paper switches both ways over 1,000 steps; when, and how its ramp looks, is not known (hfkd/objectives/switch.py). Its claim,
recalled and not verified: with an interpolating teacher leaving kd for one_hot gives up what kd has gained, with one that does
not interpolate it may help; and coming to kd late recovers much of its gain.

Every run is saved when it is done; `--resume_from_checkpoint True` goes on where a study was stopped. Choose settings with
`--evaluate_on validation`; `--max_steps` bounds every stage (give a --window that fits).
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers

from hfkd import DistillationArguments
from hfkd.cache import cache_teacher
from hfkd.diagnostics import plots
from hfkd.diagnostics.metrics import mean_and_std
from hfkd.objectives import CrossEntropy, Objective, Switch
from hfkd.records import weights_hash
from hfkd.teachers import CachedTeacher, ModelTeacher, Teacher
from hfkd.trainers.arguments import parse_arguments
from image_data import ImageArguments, augmentation_of, load_data, view_of
from image_study import SIZES, TEACHERS_SEED, Network, teacher_budget
from pet_report import difference, interval
from program import HERE, one_sentence, one_source, quiet, rows_per_step, say
from publication import Publication, publish
from run_report import per_seed_csv, write_whole
from runs import Run, Runs

OWN_DATA = ("--task", "--dataset_name", "--data_dir", "--config")
ONE_HOT, KD, LEAVING, COMING = "one_hot", "kd", "kd_to_one_hot", "one_hot_to_kd"
TRAIN = "train_"  # the prefix of what is scored on the training images, as they are
INTERPOLATES = 0.99


@dataclass
class RecipeArguments(ImageArguments):
    """Data, networks, teachers and the switch. `--profile` sets the defaults of a short or long run."""

    profile: str = field(
        default="",
        metadata={"help": "demo | study | task; by default task where data or --config are given, else demo."},
    )
    validation_share: float | None = field(
        default=None, metadata={"help": "Share of train held out, where the data has no validation split."}
    )
    image_mean: list[float] | None = field(
        default=None, metadata={"help": "Mean of R, G and B in [0, 1] that both sides subtract; default 0.5."}
    )
    image_std: list[float] | None = field(default=None, metadata={"help": "What both sides divide by; default 0.5."})
    seeds: int = field(default=3, metadata={"help": "Runs of each kind; a seed fixes weights, order and augmentation."})
    teacher_config: str = field(default="resnet10-m", metadata={"help": f"Starts at random: {SIZES}."})
    student_config: str = field(default="resnet10-xxxs", metadata={"help": "The same choice."})
    teacher_epochs: list[float] = field(
        default_factory=lambda: [15.0, 1.0], metadata={"help": "One teacher each: a short budget does not interpolate."}
    )
    teacher_learning_rate: float | None = field(default=None, metadata={"help": "Default: the student's."})
    switch_at: float = field(default=0.5, metadata={"help": "Share of a student's steps before the window begins."})
    window: int = field(default=1000, metadata={"help": "Optimizer steps from the first loss to the second."})


def main(arguments: list[str]) -> None:
    run(*prepare(arguments))


def prepare(arguments: list[str]) -> tuple[RecipeArguments, DistillationArguments, SwitchStudy]:
    """Whatever is wrong with the inputs is said here."""
    quiet()
    own_data = any(word.split("=")[0] in OWN_DATA for word in arguments)
    only_profile = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    only_profile.add_argument("--profile", default="task" if own_data else "demo")
    profile = only_profile.parse_known_args(arguments)[0].profile
    if profile not in ("demo", "study", "task"):
        raise ValueError(f"--profile {profile}: choose demo, study or task, or give your own values with --config")
    defaults = HERE / "configs" / f"loss_switch_{profile}.yaml"
    recipe, args = parse_arguments(RecipeArguments, DistillationArguments, arguments=arguments, defaults=defaults)
    if recipe.profile not in ("", profile):
        raise ValueError(
            f"profile: {recipe.profile} stands in a YAML file; give it as a flag, because it names a file itself"
        )
    recipe.profile = profile
    one_source(recipe, arguments)
    return recipe, args, SwitchStudy(recipe, args)


def run(recipe: RecipeArguments, args: DistillationArguments, study: SwitchStudy) -> None:
    started = time.monotonic()
    study.runs.start()
    results = []
    for seed in range(recipe.seeds):
        results.append(study.student(ONE_HOT, seed, CrossEntropy(args.label_smoothing_factor)))
        for epochs in recipe.teacher_epochs:
            results.append(study.teacher(epochs, seed))
            for method, objective in study.objectives().items():
                results.append(study.student(method, seed, objective, epochs))
    if args.process_index == 0:
        report(recipe, study, results, (time.monotonic() - started) / 60)


class SwitchStudy:
    """Everything that can be wrong with the inputs is said when it is made, before any training."""

    def __init__(self, recipe: RecipeArguments, args: DistillationArguments):
        self.recipe, self.args = recipe, args
        refuse_wrong_choices(recipe)
        self.augmentation = augmentation_of(recipe)
        self.data = load_data(recipe, args, recipe.validation_share)
        self.runs = Runs(recipe, args, self.data)
        self.steps = steps_of(args, len(self.data.train))
        self.objectives()[LEAVING].refuse_beyond(self.steps)
        self.teacher_network, self.student_network = self.networks()
        skip = recipe.skip_bad_images
        self.view = view_of(self.data, self.student_network.processor, self.augmentation, skip_bad_images=skip)
        self.view.held_out[TRAIN] = self.view.train
        self.teachers: dict[tuple[float, int], tuple[str, str]] = {}  # where its weights are, and their hash
        self.cached: dict[tuple[float, int], Any] = {}

    def networks(self) -> tuple[Network, Network]:
        networks = [
            Network(None, sizes, self.recipe) for sizes in (self.recipe.teacher_config, self.recipe.student_config)
        ]
        for network, whose in zip(networks, ("teacher", "student"), strict=True):
            network.refuse_wrong_size(network.new(self.data), whose)
        if networks[0].view != networks[1].view:
            sizes = " and ".join(str(network.view.size) for network in networks)
            raise ValueError(f"teacher and student see images of {sizes}: give both the same with --image_size")
        return networks[0], networks[1]

    def objectives(self) -> dict[str, Objective]:
        """Of the students with a teacher: the distillation that the arguments name, and the two ways to switch."""
        start, window = round(self.recipe.switch_at * self.steps), self.recipe.window
        pairs = [(self.distillation(), CrossEntropy(self.args.label_smoothing_factor)) for _ in range(2)]
        leaving, coming = Switch(*pairs[0], start, window), Switch(*reversed(pairs[1]), start, window)
        return {KD: self.distillation(), LEAVING: leaving, COMING: coming}

    def distillation(self) -> Objective:
        objective = self.args.make_objective("kd")
        if objective.needs != {"teacher"} or isinstance(objective, Switch) or set(objective.columns) != {"labels"}:
            raise ValueError(
                f"the switch here is between labels and a teacher's logits, and {type(objective).__name__}"
                f"({objective.settings()}) is neither: choose kd, dkd, dist, ... (in Python, hfkd.Switch takes any two)"
            )
        return objective

    # ---- the teachers ----

    def teacher(self, epochs: float, seed: int) -> dict[str, Any]:
        name = f"teacher-{epochs:g}"
        say(f"Seed {seed}: teacher, {epochs:g} epochs on {len(self.view.train):,} images")
        run = Run(name, seed, lambda: self.new_teacher(seed), self.view, keep=True)
        own = SimpleNamespace(teacher_epochs=epochs, teacher_learning_rate=self.recipe.teacher_learning_rate)
        run.budget = teacher_budget(own, self.args, len(self.view.train))
        result = self.runs.result(run)
        folder = str(self.runs.folder(name, seed) / "model")
        teacher = ModelTeacher(folder)
        self.teachers[epochs, seed] = folder, weights_hash(teacher.model.state_dict())
        scores = {"train_accuracy_augmented": self.augmented_accuracy(teacher)} if self.augmentation else {}
        say(f"Seed {seed}: it is right on {100 * result[TRAIN + 'accuracy']:.2f} % of its training images")
        return {**result, **scores, "method": "teacher", "teacher_epochs": epochs}

    def new_teacher(self, seed: int) -> Any:
        """From other weights than student `seed`, which in self-distillation would else be its teacher's double."""
        transformers.set_seed(TEACHERS_SEED + seed)
        return self.teacher_network.new(self.data)

    @torch.no_grad()
    def augmented_accuracy(self, teacher: ModelTeacher) -> float:
        """On the training images as the first epoch shows them; of mixed images the larger part's label counts."""
        rows, collator, size = self.view.train, self.view.collator, self.args.per_device_eval_batch_size
        right, model = 0, teacher.model.to(self.args.device).eval()
        for first in range(0, len(rows), size):
            batch = collator([rows[i] for i in range(first, min(first + size, len(rows)))])
            batch = collator.on_device(
                {name: value.to(self.args.device) if hasattr(value, "to") else value for name, value in batch.items()}
            )
            labels = batch["labels"] if batch["labels"].dim() == 1 else batch["labels"].argmax(-1)
            right += int((model(pixel_values=batch["pixel_values"]).logits.argmax(-1) == labels).sum())
        return right / len(rows)

    def asked(self, epochs: float, seed: int) -> tuple[Teacher, Any]:
        """Without augmentation a teacher answers every row once; with it, what the student sees in every step."""
        teacher = ModelTeacher(self.teachers[epochs, seed][0], dtype=self.args.teacher_dtype)
        if self.augmentation is not None:
            return teacher, self.view.train
        folder = self.runs.output / "teacher_answers" / f"seed-{seed}-{epochs:g}"
        if (epochs, seed) not in self.cached:
            with self.args.main_process_first(desc="asking the teacher"):
                self.cached[epochs, seed] = cache_teacher(
                    self.view.train,
                    teacher,
                    folder,
                    collator=self.view.collator,
                    processing_class=self.view.processing_class,
                    batch_size=self.args.per_device_eval_batch_size,
                    dtype="float32",
                    device=self.args.device,
                )
        return CachedTeacher(cache=folder), self.cached[epochs, seed]

    # ---- the students ----

    def student(self, method: str, seed: int, objective: Objective, epochs: float | None = None) -> dict[str, Any]:
        name = method if epochs is None else f"{method}-{epochs:g}"
        say(f"Seed {seed}: {name}")
        run = Run(name, seed, lambda: self.student_network.new(self.data), self.view, objective, keep=seed == 0)
        if epochs is not None:
            run.answers = self.runs.answers(f"teacher-{epochs:g}", seed)
            run.teacher_hash = self.teachers[epochs, seed][1]
            run.asked = lambda: self.asked(epochs, seed)
        return {**self.runs.result(run), "method": method, "teacher_epochs": epochs}


def steps_of(args: DistillationArguments, rows: int) -> int:
    return (
        args.max_steps
        if args.max_steps > 0
        else math.ceil(args.num_train_epochs * math.ceil(rows / rows_per_step(args)))
    )


def refuse_wrong_choices(recipe: RecipeArguments) -> None:
    if recipe.seeds < 1:
        raise ValueError(f"--seeds must be 1 or more, got {recipe.seeds}")
    if not recipe.teacher_epochs or min(recipe.teacher_epochs) <= 0:
        raise ValueError(f"--teacher_epochs are numbers above 0, one for each teacher, got {recipe.teacher_epochs}")
    if len(set(recipe.teacher_epochs)) < len(recipe.teacher_epochs):
        raise ValueError(f"--teacher_epochs {recipe.teacher_epochs} names a teacher twice")
    if not 0 <= recipe.switch_at <= 1:
        raise ValueError(f"--switch_at is a share of training and must lie in [0, 1], got {recipe.switch_at}")


# ---- report ----


def report(recipe: RecipeArguments, study: SwitchStudy, results: list[dict[str, Any]], minutes: float) -> None:
    output = study.runs.output
    text = "\n".join([table(results, recipe.teacher_epochs), "", *teachers_said(results, recipe.teacher_epochs)])
    write_whole(output / "results.md", text + "\n")
    write_whole(output / "results.csv", per_seed_csv(results))
    start = round(recipe.switch_at * study.steps)
    said = f"students of {study.steps:,} steps, switched from step {start:,} to {start + recipe.window:,}"
    print(
        f"\n{text}\n\n{len(study.data.train):,} training images, {said}. Took {minutes:.1f} minutes ({recipe.profile})."
    )
    if recipe.seeds == 1:
        print("One seed: there are no intervals; 3 or more say how much a difference means.")
    print(f"Tables: {output / 'results.md'}, {output / 'results.csv'}")
    draw(results, recipe.teacher_epochs, output / "scores.png")
    publish(study.runs, publication(study, results))


def publication(study: SwitchStudy, results: list[dict[str, Any]]) -> Publication:
    """The students of the last teacher, that of the switch first, beside the one of the labels."""
    epochs = study.recipe.teacher_epochs[-1]
    methods = dict.fromkeys([LEAVING, *study.objectives()])
    folders = {method: study.runs.folder(f"{method}-{epochs:g}", 0) / "model" for method in methods}
    folders[ONE_HOT] = study.runs.folder(ONE_HOT, 0) / "model"
    found = {method: scores(results, method, epochs) for method in methods}
    found |= {ONE_HOT: scores(results, ONE_HOT, None), "teacher": scores(results, "teacher", epochs)}
    return Publication(folders, found, "accuracy", ONE_HOT, ("teacher", study.teachers[epochs, 0][0]))


def scores(results: list[dict[str, Any]], method: str, epochs: float | None, name: str = "accuracy") -> list[float]:
    found = [row for row in results if row["method"] == method and row["teacher_epochs"] == epochs]
    return [row[name] for row in found if row.get(name) is not None]


def table(results: list[dict[str, Any]], teachers: list[float]) -> str:
    """Markdown: mean over seeds and 95 % interval; differences are paired by seed, in percentage points."""
    heads = ["teacher's epochs", "trained by", "accuracy (%)", "- one_hot", "- kd", "agreement (%)", "on train (%)"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    one_hot = scores(results, ONE_HOT, None)
    rows = [(None, ONE_HOT), *((epochs, method) for epochs in teachers for method in ("teacher", KD, LEAVING, COMING))]
    for epochs, method in rows:
        found, kd = scores(results, method, epochs), scores(results, KD, epochs)
        cells = ["–" if epochs is None else f"{epochs:g}", "labels (the teacher)" if method == "teacher" else method]
        cells += [interval(found), "–" if method in ("teacher", ONE_HOT) else difference(found, one_hot)]
        cells += [difference(found, kd) if method in (LEAVING, COMING) else "–"]
        cells += [interval(scores(results, method, epochs, name)) for name in ("agreement", TRAIN + "accuracy")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def teachers_said(results: list[dict[str, Any]], teachers: list[float]) -> list[str]:
    """Whether each interpolates: what the effect of a switch depends on."""
    lines = []
    for epochs in teachers:
        right = scores(results, "teacher", epochs, TRAIN + "accuracy")
        verdict = "interpolates" if min(right) >= INTERPOLATES else "does not interpolate"
        augmented = scores(results, "teacher", epochs, "train_accuracy_augmented")
        shown = f" as they are, {interval(augmented)} as augmented" if augmented else ""
        lines.append(
            f"Teacher of {epochs:g} epochs, accuracy on its training images (%): {interval(right)}{shown}. It {verdict} "
            f"({100 * INTERPOLATES:.0f} or more with every seed does)."
        )
    return lines


def draw(results: list[dict[str, Any]], teachers: list[float], path: Path) -> None:
    """In percent; teachers that are equally right on their training images share a place."""
    lines: dict[str, dict[float, list[float]]] = {method: {} for method in (KD, LEAVING, COMING, "teacher")}
    for epochs in teachers:
        place = round(100 * mean_and_std(scores(results, "teacher", epochs, TRAIN + "accuracy"))[0], 1)
        for method, points in lines.items():
            points.setdefault(place, []).extend(100 * value for value in scores(results, method, epochs))
    x_label = "teacher's accuracy on its training images (%)"
    levels = {f"{ONE_HOT} (mean)": [100 * value for value in scores(results, ONE_HOT, None)]}
    try:
        plots.score_sweeps({x_label: lines}, levels, "Accuracy on held-out images (%)", path)
        print(f"Figure: {path}")
    except ImportError as error:  # matplotlib is an extra
        print(f"no figure: {error}")


if __name__ == "__main__":
    with one_sentence():
        prepared = prepare(sys.argv[1:])
    run(*prepared)
