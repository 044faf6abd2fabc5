"""What mc_distil.py reads: training rows, a meta set cut out of them, test rows, and the networks of teacher and students.

Images or texts; from here on both are views of tokens or pixels, which the study treats alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import image_data
import text_data
from corruptions import SEVERITIES, corrupted_rows
from hfkd import CollaborativeArguments
from hfkd.data.images import IMAGE_TASKS, decoded, load_images
from hfkd.data.splits import low_resource_subset
from hfkd.data.text import TEXT_TASKS, load_text, tokenize
from hfkd.fingerprint import content_hash
from image_data import ImageArguments, ImageData
from image_study import SIZES, Network
from program import at_random, rows_per_step, say
from runs import View
from text_data import DataArguments, TextData, tokenizer_for
from text_study import classifier, classifier_from_sizes, read_sizes, start_weights

THUMBNAIL = 16  # pixels; label noise follows images of this size
TEXT_SIZES = "for texts recipes/configs/student_*.yaml"


@dataclass
class McArguments:
    """Methods, students, the teacher, the meta set and what is tested besides."""

    methods: list[str] = field(
        default_factory=lambda: ["ce", "kd", "mc_distil"],
        metadata={"help": "Of ce, kd, mc_distil, meta_k1, dml, takd, dgkd, amal, fixed."},
    )
    students: list[str] = field(
        default_factory=list, metadata={"help": f"Students from random weights: {SIZES}; {TEXT_SIZES}."}
    )
    teacher: str | None = field(default=None, metadata={"help": "A fine-tuned teacher: folder or Hub id."})
    teacher_start: str | None = field(
        default=None, metadata={"help": "Weights to fine-tune as the teacher; default for embedded texts: MiniLM-L6."}
    )
    teacher_config: str | None = field(default=None, metadata={"help": "A teacher from random weights, as students."})
    teacher_epochs: float | None = field(default=None, metadata={"help": "Default: num_train_epochs."})
    teacher_learning_rate: float | None = field(default=None, metadata={"help": "Default: learning_rate."})
    warm_start: str = field(
        default="ce",
        metadata={"help": "ce (every method goes on from students trained on labels, as in the released code) | none."},
    )
    warm_epochs: float | None = field(default=None, metadata={"help": "Of the warm start; default: num_train_epochs."})
    kd_alpha: float = field(default=0.5, metadata={"help": "Weight of the teacher in kd, takd and dgkd."})
    fixed_distill: list[float] = field(
        default_factory=lambda: [0.9],
        metadata={
            "help": "The method fixed: weight of the teacher, one for all or one a student; the labels get the rest."
        },
    )
    amal_interval: int = field(default=10, metadata={"help": "The table of amal moves in every so-manieth epoch."})
    coordinator_output: str = field(default="sigmoid", metadata={"help": "sigmoid | softplus | raw | product."})
    coordinator_input: str = field(
        default="input", metadata={"help": "input (image or text) | logits (of students and teacher, and the label)."}
    )
    shared_weights: bool = field(default=False, metadata={"help": "One pair of weights for all students."})
    meta_rows: int = field(
        default=200,
        metadata={
            "help": "Rows cut out of train, by class, on which coordinators are judged; 0: the validation split."
        },
    )
    baselines_use_meta_rows: bool = field(
        default=False, metadata={"help": "Methods without a coordinator train on the meta rows too."}
    )
    noise_rate: float = field(
        default=0.0,
        metadata={
            "help": "Share of every class's training labels made wrong, by what the image looks like; 0: no block."
        },
    )
    noise_methods: list[str] = field(
        default_factory=lambda: ["ce", "kd", "mc_distil"], metadata={"help": "Methods that are run with wrong labels."}
    )
    corruption_rows: int = field(
        default=2000, metadata={"help": "Damage this many test images, drawn once, in four ways; 0: none."}
    )
    search: int = field(
        default=0,
        metadata={"help": "Instead of a study: score this many settings of the paper's grid for each method (optuna)."},
    )
    seeds: int = field(default=3, metadata={"help": "Studies: teacher, students, order and wrong labels drawn anew."})


@dataclass
class ImageMcArguments(McArguments, ImageArguments):
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
class TextMcArguments(McArguments, DataArguments):
    """Models that read texts."""

    train_rows: int | None = field(default=None, metadata={"help": "Of train, use this many rows, drawn once."})


@dataclass(frozen=True)
class McData:
    """view: train without the meta rows. meta: labelled rows as the students see them. thumbnails: (train rows, ...) numbers
    that wrong labels follow. held_out has the test rows under "", damaged ones under "noise_" and so on."""

    data: ImageData | TextData
    view: View
    meta: Any
    thumbnails: Callable[[], np.ndarray]
    new_teacher: Callable[[], Any]
    new_students: dict[str, Callable[[], Any]]


def load(recipe: Any, args: CollaborativeArguments) -> McData:
    found = of_images(recipe, args) if isinstance(recipe, ImageMcArguments) else of_texts(recipe, args)
    sizes = {
        name: f"{new().num_parameters():,}"
        for name, new in {"teacher": found.new_teacher, **found.new_students}.items()
    }
    say(f"Parameters: {', '.join(f'{name} {size}' for name, size in sizes.items())}")
    return found


# ---- images ----


def of_images(recipe: ImageMcArguments, args: CollaborativeArguments) -> McData:
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
    train, meta, test = parts(recipe, args, splits)
    metrics = dict.fromkeys(("accuracy", *(IMAGE_TASKS[recipe.task].metrics if recipe.task else ())))
    labels = splits["train"].features["label"].names
    data = ImageData(train, chosen_on(recipe, splits), {"": test}, labels, metrics=tuple(metrics))
    teacher = Network(recipe.teacher or recipe.teacher_start, recipe.teacher_config, recipe)
    students = {Path(name).stem: Network(None, name, recipe) for name in recipe.students}
    for name, network in {"teacher": teacher, **students}.items():
        network.refuse_wrong_size(network.new(data), name)
        if network.view != teacher.view:
            raise ValueError(
                f"{name} sees images of {network.view.size} and the teacher of {teacher.view.size}, or normalises them "
                "otherwise: give all the same with --image_size (and --image_mean, --image_std)"
            )
    augmentation, skip = image_data.augmentation_of(recipe), recipe.skip_bad_images
    if augmentation is not None and augmentation.mixes:
        raise ValueError(
            "--mixup and --cutmix make labels that are probabilities, and a group learns classes: leave out"
        )
    if augmentation is not None:  # padding that is too large for the images shows in the first draw
        augmentation.draw(np.random.default_rng(0), *teacher.view.size)
    view = image_data.view_of(data, teacher.processor, augmentation, skip_bad_images=skip)
    shown = apart(image_data.pixels_of(meta, view.collator.canvas, skip), view)
    damage(view, test, recipe)
    return McData(
        data,
        view,
        shown,
        lambda: thumbnails_of(train, skip),
        lambda: teacher.new(data),
        {name: maker(network, data) for name, network in students.items()},
    )


def maker(network: Network, data: ImageData) -> Callable[[], Any]:
    return lambda: network.new(data)


def damage(view: View, test: Any, recipe: ImageMcArguments) -> None:
    """Adds the test rows once more for each corruption."""
    if not recipe.corruption_rows:
        return
    shown = decoded(
        at_random(test, recipe.corruption_rows), view.collator.canvas, skip_bad_images=recipe.skip_bad_images
    )
    for kind, severity in SEVERITIES.items():
        rows = corrupted_rows(shown, view.collator.canvas.size, kind)
        view.held_out[f"{kind}_"] = rows
        view.hashes[f"{kind}_"] = content_hash(rows, rows.column_names)[0]
        view.settings[kind] = severity


def thumbnails_of(train: Any, skip_bad_images: bool) -> np.ndarray:
    """(rows, 16 * 16 * 3) in [0, 255]: what wrong labels follow."""
    small = decoded(train, THUMBNAIL, skip_bad_images=skip_bad_images)
    return np.stack([np.frombuffer(row, np.uint8) for row in small["pixels"]])


# ---- texts ----


def of_texts(recipe: TextMcArguments, args: CollaborativeArguments) -> McData:
    row = TEXT_TASKS.get(recipe.task or "")
    kind = recipe.problem_type or (row.problem_type if row else "single_label_classification")
    if kind != "single_label_classification":
        raise ValueError(f"the methods compare classifiers of one class a row, and this is {kind}")
    if recipe.noise_rate:
        raise ValueError("--noise_rate makes labels wrong by what an image looks like: leave it out for texts")
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
    train, meta, test = parts(recipe, args, splits)
    metrics = tuple(dict.fromkeys(("accuracy", *(row.metrics if row else ()))))
    data = TextData(train, chosen_on(recipe, splits), {"": test}, train.features["label"].names, kind, metrics)
    flags = "--teacher, --teacher_start, or --teacher_config with --teacher_start for its tokenizer"
    start = recipe.teacher or start_weights(recipe.teacher_start, recipe.task, args, flags)
    tokenizer = tokenizer_for(start)
    sizes = {Path(name).stem: read_sizes(name) for name in recipe.students}
    teacher = read_sizes(recipe.teacher_config) if recipe.teacher_config else None
    view = text_data.view_of(data, tokenizer, recipe.max_length)
    return McData(
        data,
        view,
        apart(tokenize(meta, tokenizer, recipe.max_length), view),
        lambda: np.zeros(0),
        lambda: classifier(start, data) if teacher is None else classifier_from_sizes(teacher, tokenizer, data),
        {name: text_maker(found, tokenizer, data) for name, found in sizes.items()},
    )


def text_maker(sizes: dict[str, Any], tokenizer: Any, data: TextData) -> Callable[[], Any]:
    return lambda: classifier_from_sizes(sizes, tokenizer, data)


# ---- rows ----


def parts(recipe: Any, args: CollaborativeArguments, splits: Any) -> tuple[Any, Any, Any]:
    """Training rows, meta rows and test rows. A --max_steps below one epoch bounds what is trained on and scored."""
    wanted = recipe.evaluate_on or ("test" if "test" in splits else "validation")
    if wanted not in splits:
        raise ValueError(
            f"there is no {wanted} split to score on, the data has {', '.join(splits)}: choose with --evaluate_on"
        )
    train, meta = with_meta(recipe, splits, wanted)
    steps = args.max_steps if args.max_steps > 0 else None
    most = steps and steps * args.eval_batch_size * args.world_size
    test = at_random(splits[wanted], most if recipe.evaluation_rows is None else recipe.evaluation_rows)
    if len(test) < len(splits[wanted]):
        said = f"{len(test):,} of {len(splits[wanted]):,} {wanted} rows, drawn once"
        say(f"Scoring on {said}: a short run (--evaluation_rows, --max_steps)")
    return at_random(train, steps and steps * rows_per_step(args)), meta, test


def apart(meta: Any, view: View) -> Any:
    """Without what a training or test row shows too: data sets hold rows twice, and the trainer refuses shared ones."""
    name = next((name for name in ("pixels", "input_ids") if name in meta.column_names), None)
    if name is None:  # pictures that memory does not hold
        return meta
    seen = {
        bytes(row) if name == "pixels" else tuple(row) for rows in (view.train, view.held_out[""]) for row in rows[name]
    }
    own = [bytes(row) if name == "pixels" else tuple(row) for row in meta[name]]
    kept = [number for number, row in enumerate(own) if row not in seen]
    if len(kept) < len(meta):
        say(f"{len(meta) - len(kept)} of {len(meta)} meta rows show what a training or test row shows: left out")
    if not kept:
        raise ValueError("every meta row is in the training or test data too: remove the copies, or give other rows")
    return meta.select(kept)


def chosen_on(recipe: Any, splits: Any) -> Any:
    """The validation split, where it is not the meta set."""
    return splits.get("validation") if recipe.meta_rows else None


def with_meta(recipe: Any, splits: Any, wanted: str) -> tuple[Any, Any]:
    rows = at_random(splits["train"], recipe.train_rows)
    if recipe.meta_rows == 0:
        if wanted == "validation" or "validation" not in splits:
            raise ValueError(
                "--meta_rows 0 takes the validation split as the meta set, and "
                + ("that is scored on too" if "validation" in splits else "the data has none")
                + ": cut rows out of train with --meta_rows 200, say"
            )
        return rows, splits["validation"]
    chosen = meta_rows_of(rows["label"][:], recipe.meta_rows)
    return rows.select(sorted(set(range(len(rows))) - set(chosen))), rows.select(chosen)


def meta_rows_of(labels: list[int], size: int) -> list[int]:
    """Row numbers, by class. The first row of every class stays for training. Raises ValueError for more than there are."""
    first = {label: row for row, label in reversed(list(enumerate(labels)))}
    spare = [row for row, label in enumerate(labels) if row != first[label]]
    if not 0 < size <= len(spare):
        raise ValueError(
            f"--meta_rows {size}: of {len(labels)} training rows 1 to {len(spare)} can be set apart, one of each class stays"
        )
    try:
        found = low_resource_subset([labels[row] for row in spare], size)
    except ValueError as error:
        raise ValueError(f"--meta_rows {size}: {error}") from error
    return [spare[number] for number in found]
