"""What role_models.py reads: the rows of the noisy teachers, an unlabelled pool, and test rows with clean labels.

Images or texts; from here on both are views of tokens or pixels, which the study treats alike.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import image_data
import text_data
from hfkd import DistillationArguments
from hfkd.data.cifar5m import cifar5m_files, load_cifar5m
from hfkd.data.images import IMAGE_FILES, IMAGE_TASKS, load_images
from hfkd.data.splits import low_resource_subset
from hfkd.data.text import TEXT_TASKS, load_text, tokenize
from hfkd.fingerprint import refuse_shared_rows
from image_data import ImageArguments, ImageData
from image_study import SIZES, Network
from program import at_random, rows_per_step, say
from runs import View
from text_data import DataArguments, TextData, tokenizer_for
from text_study import classifier, classifier_from_sizes, read_sizes, start_weights

POOL = "pool_"  # the prefix of what teachers answer about the pool


@dataclass
class RoleArguments:
    """Noise, teachers, pool and students."""

    teachers: list[int] = field(
        default_factory=lambda: [1, 3],
        metadata={"help": "Numbers of teachers to compare; the most of them are trained, once for each seed."},
    )
    noise_rate: float = field(default=0.2, metadata={"help": "Share of every class's training labels that is wrong."})
    noise: str = field(
        default="partners", metadata={"help": "partners (class c becomes its partner) | symmetric (any other class)."}
    )
    partners: list[int] | None = field(
        default=None,
        metadata={"help": "The partner of each class; default: c + classes / 2, as in the paper's CIFAR-10."},
    )
    other_rates: list[float] = field(
        default_factory=list, metadata={"help": "Further noise rates, each with --rate_teachers teachers and students."}
    )
    rate_teachers: int = field(default=3, metadata={"help": "The number of teachers that noise rates are compared at."})
    combine: str = field(
        default="vote",
        metadata={"help": "The ensemble's label: vote (the theory's) | logits (the released code's) | mean."},
    )
    draw: str = field(
        default="example", metadata={"help": "RPL's random teacher: for each example | batch (the released code's)."}
    )
    rows: str = field(
        default="same",
        metadata={"help": "Training rows of the teachers: same (as in the code) | overlapping | disjoint."},
    )
    share: float | None = field(
        default=None,
        metadata={"help": "Of the rows, for each teacher; default: half (overlapping), 1 / most (disjoint)."},
    )
    teacher_rows: int | None = field(
        default=None,
        metadata={
            "help": "Labelled rows of the teachers; the rest of train is the pool. Default: half, with --pool all."
        },
    )
    pool: str | None = field(
        default=None,
        metadata={
            "help": "An unlabelled pool of its own: a folder with CIFAR-5m's files or with images, or a file of texts."
        },
    )
    pool_rows: int | None = field(default=None, metadata={"help": "Use this many rows of the pool, drawn once."})
    seeds: int = field(default=3, metadata={"help": "Studies: wrong labels, teachers and students drawn anew."})
    teacher_start: str | None = field(default=None, metadata={"help": "Weights that every teacher starts from."})
    teacher_config: str | None = field(
        default=None,
        metadata={"help": f"Teachers from random weights: {SIZES}; for texts recipes/configs/student_*.yaml."},
    )
    teacher_epochs: float | None = field(default=None, metadata={"help": "Default: the students' budget."})
    teacher_learning_rate: float | None = field(default=None, metadata={"help": "Default: the students'."})
    teacher_lr_milestones: list[float] | None = field(
        default=None, metadata={"help": "Epochs at which the teachers' learning rate falls by lr_milestone_factor."}
    )
    student: str | None = field(default=None, metadata={"help": "Weights that every student starts from."})
    student_config: str | None = field(default=None, metadata={"help": "Students from random weights: as teachers."})


@dataclass
class ImageRoleArguments(RoleArguments, ImageArguments):
    """Models that look at images."""

    validation_share: float | None = field(
        default=None,
        metadata={"help": "Share of train held out, where the data has no validation split; 0: train on all of it."},
    )
    image_mean: list[float] | None = field(
        default=None, metadata={"help": "Mean of R, G and B in [0, 1], for models that start from sizes; default 0.5."}
    )
    image_std: list[float] | None = field(
        default=None, metadata={"help": "Their standard deviation, for models that start from sizes; default 0.5."}
    )


@dataclass
class TextRoleArguments(RoleArguments, DataArguments):
    """Models that read texts."""


@dataclass(frozen=True)
class RoleData:
    """Everything before noise: what students and teachers see of the same rows, and how either is made.

    view: train holds the teachers' rows with clean labels; held_out only the test rows. pool: as its models see it, with a
    column label where the pool has labels, for the control. data: what `Runs` asks, and the heads of the models.
    """

    data: ImageData | TextData
    view: View
    pool: Any
    augmented: bool
    new_teacher: Callable[[], Any]
    new_student: Callable[[], Any]


def load(recipe: Any, args: DistillationArguments) -> RoleData:
    """Raises ValueError for a pool that shares rows with the test data, and for what no model or data has."""
    found = of_images(recipe, args) if isinstance(recipe, ImageRoleArguments) else of_texts(recipe, args)
    new = found.new_teacher(), found.new_student()
    say(f"Teachers of {new[0].num_parameters():,} parameters, students of {new[1].num_parameters():,}")
    return found


# ---- images ----


def of_images(recipe: ImageRoleArguments, args: DistillationArguments) -> RoleData:
    with args.main_process_first(desc="loading data"):
        splits = load_images(
            recipe.task,
            recipe.data_dir,
            recipe.dataset_name,
            recipe.dataset_config,
            recipe.image_column,
            recipe.label_column,
            validation_share=recipe.validation_share,
        )
        splits["train"] = at_random(splits["train"], recipe.train_rows)
        own = recipe.pool and pool_of_images(recipe.pool, splits["train"].features["label"].names, args)
    train, pool, test = parts(recipe, args, splits, own)
    metrics = dict.fromkeys(("accuracy", *(IMAGE_TASKS[recipe.task].metrics if recipe.task else ())))
    data = ImageData(train, None, {"": test}, train.features["label"].names, metrics=tuple(metrics))
    teacher = Network(recipe.teacher_start, recipe.teacher_config, recipe)
    student = Network(recipe.student, recipe.student_config, recipe)
    for whose, network in (("teacher", teacher), ("student", student)):
        network.refuse_wrong_size(network.new(data), whose)
    augmentation = image_data.augmentation_of(recipe)
    if augmentation is not None and augmentation.mixes:
        raise ValueError(
            "--mixup and --cutmix make labels that are probabilities, and teachers here name classes: leave out"
        )
    if augmentation is not None:  # padding that is too large for the images shows in the first draw
        augmentation.draw(np.random.default_rng(0), *student.view.size)
    if student.view != teacher.view:
        raise ValueError(
            f"students and teachers see images of {student.view.size} and {teacher.view.size}, or normalise them otherwise: "
            "give both the same with --image_size"
        )
    skip = recipe.skip_bad_images
    view = image_data.view_of(data, student.processor, augmentation, skip_bad_images=skip)
    pool = pool_pixels(pool, view.collator.canvas, skip)
    refuse_overlap(pool, view.held_out[""], "pixels" if "pixels" in pool.column_names else "image")
    return RoleData(data, view, pool, augmentation is not None, lambda: teacher.new(data), lambda: student.new(data))


def pool_of_images(folder: str, names: list[str], args: DistillationArguments) -> Any:
    """CIFAR-5m's files, a folder with a folder for each class, or images without classes."""
    from datasets import Dataset, Image

    path = Path(folder)
    if not path.is_dir():
        raise FileNotFoundError(f"--pool {folder}: there is no such folder")
    if cifar5m_files(path):
        pool = load_cifar5m(path, cache_dir=Path(args.output_dir).parent / "cache" / "cifar5m")
    elif flat := sorted(str(file.absolute()) for file in path.iterdir() if file.suffix.lower() in IMAGE_FILES):
        return Dataset.from_dict({"image": flat, "example_id": list(range(len(flat)))}).cast_column("image", Image())
    else:
        pool = load_images(data_dir=path, validation_share=0)["train"]
    if pool.features["label"].names != names:
        raise ValueError(
            f"--pool {folder} has the classes {pool.features['label'].names}, the training data {names}: only the control on "
            "the pool's own labels needs classes, images directly in a folder have none"
        )
    return pool


def pool_pixels(pool: Any, canvas: Any, skip_bad_images: bool) -> Any:
    if "pixels" not in pool.column_names:
        return image_data.pixels_of(pool, canvas, skip_bad_images)
    if canvas.size != (32, 32):
        raise ValueError(f"CIFAR-5m's images are 32 x 32, and the models see {canvas.size}: --image_size 32")
    return pool


# ---- texts ----


def of_texts(recipe: TextRoleArguments, args: DistillationArguments) -> RoleData:
    row = TEXT_TASKS.get(recipe.task or "")
    with args.main_process_first(desc="loading data"):
        splits = load_text(
            recipe.task,
            recipe.dataset_name,
            recipe.dataset_config,
            recipe.train_file,
            recipe.validation_file,
            recipe.test_file,
            recipe.text_column,
            recipe.label_column,
            text_pair_column=recipe.text_pair_column,
            problem_type=recipe.problem_type,
        )
        own = recipe.pool and pool_of_texts(recipe)
    kind = recipe.problem_type or (row.problem_type if row else "single_label_classification")
    if kind != "single_label_classification":
        raise ValueError(f"teachers name one class a row here, and this is {kind}: choose a task with one label a text")
    train, pool, test = parts(recipe, args, splits, own)
    refuse_overlap(pool, test, *(name for name in ("text", "text_pair") if name in test.column_names))
    metrics = tuple(dict.fromkeys(("accuracy", *(row.metrics if row else ()))))
    data = TextData(train, None, {"": test}, train.features["label"].names, kind, metrics)
    starts = {
        whose: None if sizes else start_weights(start, recipe.task, args, f"--{whose}_start or --{whose}_config")
        for whose, start, sizes in (
            ("teacher", recipe.teacher_start, recipe.teacher_config),
            ("student", recipe.student, recipe.student_config),
        )
    }
    flags = "--teacher_start (its tokenizer is everybody's)"
    tokenizer = tokenizer_for(starts["teacher"] or start_weights(recipe.teacher_start, recipe.task, args, flags))

    def maker(start: str | None, sizes: str | None) -> Callable[[], Any]:
        if start is not None:
            return lambda: classifier(start, data)
        known = read_sizes(str(sizes))
        return lambda: classifier_from_sizes(known, tokenizer, data)

    view = text_data.view_of(data, tokenizer, recipe.max_length)
    pool = tokenize(pool, tokenizer, recipe.max_length)
    makers = maker(starts["teacher"], recipe.teacher_config), maker(starts["student"], recipe.student_config)
    return RoleData(data, view, pool, False, *makers)


def pool_of_texts(recipe: TextRoleArguments) -> Any:
    """Without its labels, which would have to be named and ordered like the training data's."""
    loaded = load_text(
        train_file=recipe.pool,
        text_column=recipe.text_column,
        text_pair_column=recipe.text_pair_column,
        require_labels=False,
    )["train"]
    return loaded.select_columns([name for name in ("text", "text_pair") if name in loaded.column_names])


# ---- rows ----


def parts(recipe: Any, args: DistillationArguments, splits: Any, pool: Any) -> tuple[Any, Any, Any]:
    """The teachers' rows, the pool and the test rows. A --max_steps below one epoch bounds all three."""
    wanted = recipe.evaluate_on or ("test" if "test" in splits else "validation")
    if wanted not in splits:
        raise ValueError(
            f"there is no {wanted} split to score on, the data has {', '.join(splits)}: choose with --evaluate_on"
        )
    train, labels = splits["train"], splits["train"]["label"][:]
    count = recipe.teacher_rows or (len(train) if pool is not None else len(train) // 2)
    chosen = low_resource_subset(labels, count)
    if pool is None:
        pool = train.select(sorted(set(range(len(train))) - set(chosen)))
    if not len(pool):
        raise ValueError(
            f"all {len(train)} training rows are the teachers', and no row is left for the pool: fewer --teacher_rows, or --pool"
        )
    steps = args.max_steps if args.max_steps > 0 else None
    scored = steps and steps * args.eval_batch_size * args.world_size
    test = at_random(splits[wanted], scored if recipe.evaluation_rows is None else recipe.evaluation_rows)
    if len(test) < len(splits[wanted]):
        said = f"{len(test):,} of {len(splits[wanted]):,} {wanted} rows, drawn once"
        say(f"Scoring on {said}: a short run (--evaluation_rows, --max_steps)")
    teachers = train.select(chosen)
    most = steps and max(steps * rows_per_step(args), len(set(labels)))
    if most is not None and most < len(teachers):
        teachers = teachers.select(low_resource_subset(teachers["label"][:], most))
    pool = at_random(at_random(pool, recipe.pool_rows), steps and steps * rows_per_step(args))
    return teachers, pool, test


def refuse_overlap(pool: Any, test: Any, *columns: str) -> None:
    refuse_shared_rows(pool, test, columns)


def without(rows: Any, *columns: str) -> Any:
    return rows.remove_columns([name for name in columns if name in rows.column_names])


def of_rows(view: View, train: Any, held_out: dict[str, Any], hashes: dict[str, str]) -> View:
    """The same view of other rows."""
    return dataclasses.replace(view, train=train, held_out=held_out, hashes=hashes)
