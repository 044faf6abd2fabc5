"""The members of an ensemble on images or texts: which rows and which wrong labels each is trained on, and the training.

Member k is the run `member` of seed k: start weights, order and augmentation are functions of k, whoever trains it, alone,
in a stack or in a process of its own.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import transformers

import image_data
import text_data
from hfkd import DistillationArguments
from hfkd.data.label_noise import transition_matrix, with_label_noise
from hfkd.data.pixels import ImageCollator
from hfkd.data.splits import MEMBERS, member_rows
from hfkd.fingerprint import content_hash
from hfkd.records import read_json, weights_hash
from image_data import ImageArguments
from image_study import SIZES, Network
from member_stack import refuse_unstackable, train_stacked
from program import say
from runs import Memory, Run, Runs, View, predict, wait_for_everyone
from text_data import DataArguments, tokenizer_for
from text_study import classifier, classifier_from_sizes, read_sizes, start_weights

MEMBER = "member"
NOISES = ("partners", "symmetric")
OWN_ROWS = "train_"  # prefix of what is scored on a member's own training rows, with the labels it was trained on


@dataclass
class MemberArguments:
    """How many members, what each is trained on, and where."""

    members: int = field(default=3, metadata={"help": "Models trained; member k has the seed k."})
    rows: str = field(
        default="same",
        metadata={"help": "Training rows of the members: same (other seeds only) | overlapping | disjoint."},
    )
    share: float | None = field(
        default=None,
        metadata={"help": "Of the rows, for each member; default: half (overlapping), 1 / members (disjoint)."},
    )
    noise_rate: float = field(
        default=0.0, metadata={"help": "Share of wrong training labels, one noisy set for all members."}
    )
    noise: str = field(
        default="partners", metadata={"help": "partners (class c becomes its partner) | symmetric (any other class)."}
    )
    partners: list[int] | None = field(
        default=None,
        metadata={"help": "The partner of each class; default: c + classes / 2, as in the paper's CIFAR-10."},
    )
    draw_seed: int = field(default=0, metadata={"help": "Draws the wrong labels and the members' rows."})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Weights that every member starts from: a folder or Hub id."}
    )
    network: str | None = field(
        default=None,
        metadata={"help": f"Members from random weights: {SIZES}; for texts recipes/configs/student_*.yaml."},
    )
    stack: int = field(
        default=1,
        metadata={"help": "Members trained side by side as one batch of networks; for small ones (torch.func)."},
    )
    processes: int = field(
        default=1, metadata={"help": "Processes that the members are spread over, whole members each."}
    )
    only: list[int] | None = field(
        default=None,
        metadata={"help": "Train these members (numbers from 0) and no others: for machines that share a disk."},
    )


@dataclass
class ImageEnsembleArguments(MemberArguments, ImageArguments):
    """Members that look at images."""

    validation_share: float | None = field(
        default=None,
        metadata={"help": "Share of train held out, where the data has no validation split; 0: train on all of it."},
    )
    image_mean: list[float] | None = field(
        default=None, metadata={"help": "Mean of R, G and B in [0, 1], for members that start from sizes; default 0.5."}
    )
    image_std: list[float] | None = field(
        default=None, metadata={"help": "Their standard deviation, for members that start from sizes; default 0.5."}
    )


@dataclass
class TextEnsembleArguments(MemberArguments, DataArguments):
    """Members that read texts."""


class Ensemble:
    """Everything that can be wrong with the inputs is said here, before any training."""

    def __init__(self, recipe: Any, args: DistillationArguments):
        self.recipe, self.args = recipe, args
        refuse_wrong_choices(recipe, args)
        looks = isinstance(recipe, ImageEnsembleArguments)
        self.data = (
            image_data.load_data(recipe, args, recipe.validation_share) if looks else text_data.load_data(recipe, args)
        )
        refuse_other_heads(self.data)
        self.transition = transition_of(recipe, len(self.data.labels)) if recipe.noise_rate else None
        self.rows = member_rows(len(self.data.train), recipe.members, recipe.rows, recipe.share, recipe.draw_seed)
        self.runs = Runs(recipe, args, self.data)
        view, self.new_member = (self.of_images if looks else self.of_texts)()
        if self.transition is not None:
            noisy = with_label_noise(view.train, self.transition, recipe.draw_seed)
            view = dataclasses.replace(view, train=noisy)
        if args.max_steps < 1:  # a budget in steps may leave few rows, for a quick try
            refuse_missing_classes(view.train["label"][:], self.rows, self.data.labels)
        numbers = recipe.only or range(recipe.members)
        self.kinds = [Run(MEMBER, k, self.new_member, member_view(view, self.rows[k], k), keep=True) for k in numbers]
        self.parameters = self.new_member().num_parameters()
        if recipe.stack > 1:
            self.refuse_wrong_stack()

    def of_images(self) -> tuple[View, Any]:
        recipe = self.recipe
        network = Network(recipe.model_name_or_path, recipe.network, recipe)
        network.refuse_wrong_size(network.new(self.data), "member")
        augmentation = image_data.augmentation_of(recipe)
        if augmentation is not None:  # padding that is too large for the images shows in the first draw
            augmentation.draw(np.random.default_rng(0), *network.view.size)
        skip = recipe.skip_bad_images
        view = image_data.view_of(self.data, network.processor, augmentation, skip_bad_images=skip)
        if len(view.train) != len(self.data.train):
            raise ValueError(
                f"{len(self.data.train) - len(view.train)} training images were skipped, and members' rows are counted before: "
                "remove the damaged files instead of --skip_bad_images"
            )
        return view, lambda: network.new(self.data)

    def of_texts(self) -> tuple[View, Any]:
        recipe = self.recipe
        start = start_weights(recipe.model_name_or_path, recipe.task, self.args, "--model_name_or_path")
        tokenizer = tokenizer_for(start)  # also of members that start from sizes
        view = text_data.view_of(self.data, tokenizer, recipe.max_length)
        if recipe.network is None:
            classifier(start, self.data)  # a wrong id is said now
            return view, lambda: classifier(start, self.data)
        sizes = read_sizes(recipe.network)
        return view, lambda: classifier_from_sizes(sizes, tokenizer, self.data)

    def refuse_wrong_stack(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            kinds = [(run, self.runs.arguments(run, Path(folder))) for run in self.kinds[:2]]
            refuse_unstackable([self.runs.trainer(run, run.model(), args) for run, args in kinds])

    # ---- training ----

    def refuse_other_settings(self) -> None:
        """Before members are trained beside those that are there, in a stack or in processes of their own."""
        for run in self.kinds:
            if (self.runs.folder(run.name, run.seed) / "settings.json").is_file():
                self.checked_model(run)
        wait_for_everyone()

    def checked_model(self, run: Run) -> Any:
        """Its start. Raises ValueError where the folder is of other settings."""
        transformers.set_seed(run.seed)
        model = run.model()
        settings = {**self.runs.settings(run), "start": weights_hash(model.state_dict())}
        self.runs.check_settings(self.runs.folder(run.name, run.seed), settings)
        return model

    def train(self) -> list[dict[str, Any]]:
        """The members' results: of those that are done as they were found, of the others after training them."""
        missing = [run for run in self.kinds if not self.is_done(run)]
        for first in range(0, len(missing) if self.recipe.stack > 1 else 0, self.recipe.stack):
            self.train_side_by_side(missing[first : first + self.recipe.stack])
        results = []
        for run in self.kinds:
            if not self.is_done(run):
                say(f"Member {run.seed}: training on {len(run.view.train):,} rows")
            results.append(self.runs.result(run))
        return results

    def is_done(self, run: Run) -> bool:
        folder = self.runs.folder(run.name, run.seed)
        return read_json(folder / "result.json") is not None and (folder / "model").is_dir()

    def train_side_by_side(self, kinds: Sequence[Run]) -> None:
        """As `Runs.result` does with each, to rounding. A stack that is stopped begins anew."""
        say(f"Members {', '.join(str(run.seed) for run in kinds)}: training side by side")
        folders = [self.runs.folder(run.name, run.seed) for run in kinds]
        trainers = []
        for run, folder in zip(kinds, folders, strict=True):
            model = self.checked_model(run)
            trainers.append(self.runs.trainer(run, model, self.runs.arguments(run, folder)))
        memory, started = Memory(self.args.device), time.monotonic()
        steps = train_stacked(trainers)
        seconds = (time.monotonic() - started) / steps / len(kinds)
        costs = {"steps": steps, "seconds_per_step": seconds, "peak_mib": memory.peak()}
        for run, folder, trainer in zip(kinds, folders, trainers, strict=True):
            logits = {prefix: predict(trainer, rows) for prefix, rows in run.view.held_out.items()}
            self.runs.save(trainer, folder)
            self.runs.close(run, folder, {**self.runs.score(run, logits), **costs}, logits)


# ---- rows and labels ----


def transition_of(recipe: MemberArguments, classes: int) -> Any:
    """(classes, classes). The default partners are those of the paper's released labels: (c + 5) mod 10."""
    if recipe.noise == "symmetric":
        return transition_matrix(classes, recipe.noise_rate)
    partners = recipe.partners or [(label + classes // 2) % classes for label in range(classes)]
    return transition_matrix(classes, recipe.noise_rate, partners)


def member_view(view: View, rows: Sequence[int], member: int) -> View:
    """Its own rows to train on, and to score beside the held-out ones: does it fit its (noisy) labels? Its own crops."""
    collator = view.collator
    if isinstance(collator, ImageCollator):
        augmentation, classes = collator.augmentation, collator.num_labels
        collator = ImageCollator(collator.student_view, None, augmentation, num_labels=classes, seed=member)
    train = view.train if len(rows) == len(view.train) else view.train.select(rows)
    held_out = {**view.held_out, OWN_ROWS: train}
    hashes = {**view.hashes, "train": content_hash(train, train.column_names)[0]}
    return dataclasses.replace(view, train=train, held_out=held_out, hashes=hashes, collator=collator)


# ---- what is refused ----


def refuse_wrong_choices(recipe: MemberArguments, args: DistillationArguments) -> None:
    """Raises ValueError for numbers of members, processes and stacks that cannot be, and for noise without a rate."""
    if args.names_objective() and args.objective != "cross_entropy":
        raise ValueError(
            "members learn from labels alone: leave objective, temperature and alpha to recipes with a teacher"
        )
    for name in ("members", "processes", "stack"):
        if getattr(recipe, name) < 1:
            raise ValueError(f"--{name} must be 1 or more, got {getattr(recipe, name)}")
    if recipe.rows not in MEMBERS:
        raise ValueError(f"--rows {recipe.rows}: choose {', '.join(MEMBERS)}")
    if recipe.noise not in NOISES:
        raise ValueError(f"--noise {recipe.noise}: choose {' or '.join(NOISES)}")
    if recipe.partners and (recipe.noise == "symmetric" or not recipe.noise_rate):
        raise ValueError(f"--partners {recipe.partners} are for --noise partners with a --noise_rate above 0")
    if odd := [number for number in recipe.only or () if not 0 <= number < recipe.members]:
        raise ValueError(f"--only {odd}: the {recipe.members} members have the numbers 0 to {recipe.members - 1}")
    if recipe.processes > 1 and args.world_size > 1:
        raise ValueError(
            f"--processes {recipe.processes} starts processes of its own, and a launcher has started {args.world_size}: start "
            "with python, or leave --processes out (then all processes train one member together)"
        )


def refuse_other_heads(data: Any) -> None:
    if data.problem_type != "single_label_classification":
        raise ValueError(
            f"votes, label noise and samplers need one class a row, and this is {data.problem_type}: train such members with "
            "recipes/train_teacher.py --seeds"
        )


def refuse_missing_classes(labels: Sequence[int], rows: Sequence[Sequence[int]], names: Sequence[str]) -> None:
    """Raises ValueError for a member that would never see a class, and could only vote against it."""
    found = np.asarray(labels)
    for member, own in enumerate(rows):
        if missing := sorted(set(range(len(names))) - set(found[list(own)].tolist())):
            raise ValueError(
                f"member {member} has {len(own)} rows and none of {', '.join(names[label] for label in missing[:10])}: choose a "
                "larger --share, fewer members, or another --draw_seed"
            )
