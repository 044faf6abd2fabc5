"""What distill_image.py and teachers_pet.py read: pictures, what is scored on them, and the pixels that models see.

What is wrong with such inputs is said in one sentence, before any training.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hfkd import DistillationArguments
from hfkd.data.augment import Augmentation
from hfkd.data.images import IMAGE_TASKS, decoded, load_images, verify_images
from hfkd.data.pixels import ImageCollator, PixelView
from hfkd.fingerprint import content_hash
from program import at_random, rows_per_step, say
from runs import View

MOST_DECODED = 4 * 2**30  # bytes of pixels that are kept beside the pictures; beyond, every epoch decodes them again


@dataclass
class ImageArguments:
    """Which pictures, how they are augmented, and what is scored."""

    task: str | None = field(default=None, metadata={"help": f"One of {', '.join(IMAGE_TASKS)}."})
    dataset_name: str | None = field(default=None, metadata={"help": "A data set's Hub id or local folder."})
    dataset_config: str | None = field(default=None, metadata={"help": "The data set's configuration."})
    data_dir: str | None = field(
        default=None,
        metadata={"help": "A folder with train/CLASS/*.png, and validation/ and test/ where there are any."},
    )
    image_column: str | None = field(default=None, metadata={"help": "The column with the image; default: guessed."})
    label_column: str | None = field(default=None, metadata={"help": "The column with the label; default: guessed."})
    skip_bad_images: bool = field(default=False, metadata={"help": "Leave damaged files out, instead of stopping."})
    image_size: int | None = field(
        default=None, metadata={"help": "Height and width; default: what the models' image processors say."}
    )
    train_rows: int | None = field(
        default=None, metadata={"help": "Train on this many images, drawn once; the rest of the split stays unused."}
    )
    crop: str | None = field(
        default=None, metadata={"help": "pad (shifted by up to --padding pixels) | resized | none."}
    )
    padding: int = field(default=4, metadata={"help": "Pixels of --crop pad."})
    flip: float = field(default=0.0, metadata={"help": "Share of images mirrored (0.5 is usual; never for digits)."})
    randaugment: int = field(default=0, metadata={"help": "Operations of RandAugment an image; needs kornia."})
    magnitude: int = field(default=9, metadata={"help": "Strength of RandAugment, 0 to 30."})
    mixup: float = field(default=0.0, metadata={"help": "Mixup's Beta parameter; 0 mixes nothing."})
    cutmix: float = field(default=0.0, metadata={"help": "Cutmix's Beta parameter; 0 cuts nothing."})
    erasing: float = field(default=0.0, metadata={"help": "Share of images with a random box erased."})
    evaluate_on: str | None = field(
        default=None,
        metadata={
            "help": "test | validation (to choose settings); default: test where it is labelled, else validation."
        },
    )
    evaluation_rows: int | None = field(
        default=None,
        metadata={"help": "Score on this many rows, drawn once (for a short run); --max_steps bounds them too."},
    )
    overwrite: bool = field(default=False, metadata={"help": "Delete the runs that output_dir holds."})


@dataclass(frozen=True)
class ImageData:
    """`train` and the rows to score on, as pictures; `held_out` by the prefix of their metrics' names (here one, "")."""

    train: Any
    validation: Any
    held_out: dict[str, Any]
    labels: list[str]
    problem_type: str = "single_label_classification"
    metrics: tuple[str, ...] = ("accuracy",)

    @property
    def metric(self) -> str:
        return self.metrics[0]

    def indices(self) -> dict[str, list[int]]:
        """Row numbers in the source's splits, of what is used: for `hfkd.data.splits.save_indices`."""
        used = {"train": self.train, "validation": self.validation, **self.held_out}
        return {name or "held_out": rows["example_id"][:] for name, rows in used.items() if rows is not None}

    def head(self) -> dict[str, Any]:
        """What a classifier's configuration says about the labels."""
        names = {"id2label": dict(enumerate(self.labels)), "label2id": {name: i for i, name in enumerate(self.labels)}}
        return {"num_labels": len(self.labels), **names}


def load_data(recipe: ImageArguments, args: DistillationArguments, validation_share: float | None = None) -> ImageData:
    """validation_share: of train, where the data has no validation split; None: the task's own."""
    with args.main_process_first(desc="loading data"):
        splits = load_images(
            recipe.task,
            recipe.data_dir,
            recipe.dataset_name,
            recipe.dataset_config,
            recipe.image_column,
            recipe.label_column,
            validation_share=validation_share,
        )
    wanted = recipe.evaluate_on or ("test" if "test" in splits else "validation")
    if wanted not in splits:
        raise ValueError(
            f"there is no {wanted} split to score on, the data has {', '.join(splits)}: choose with --evaluate_on"
        )
    # A budget below one epoch bounds every stage: what is trained on, what a teacher is asked for, what is scored
    steps = args.max_steps if args.max_steps > 0 else None
    most = steps and steps * args.eval_batch_size * args.world_size
    held_out = at_random(splits[wanted], most if recipe.evaluation_rows is None else recipe.evaluation_rows)
    if len(held_out) < len(splits[wanted]):
        said = f"{len(held_out):,} of {len(splits[wanted]):,} held-out images, drawn once"
        say(f"Scoring on {said}: a short run (--evaluation_rows, --max_steps)")
    train = at_random(splits["train"], recipe.train_rows)
    return ImageData(
        train=at_random(train, steps and steps * rows_per_step(args)),
        validation=splits.get("validation"),
        held_out={"": held_out},
        labels=splits["train"].features["label"].names,
        metrics=IMAGE_TASKS[recipe.task].metrics if recipe.task else ("accuracy",),
    )


def augmentation_of(recipe: ImageArguments) -> Augmentation | None:
    names = ("crop", "padding", "flip", "randaugment", "magnitude", "mixup", "cutmix", "erasing")
    settings = {name: getattr(recipe, name) for name in names}
    settings["crop"] = None if recipe.crop == "none" else recipe.crop  # a flag that a file's crop gives way to
    on = any(settings[name] for name in names if name not in ("padding", "magnitude"))
    return Augmentation(**settings) if on else None


def view_of(
    data: ImageData,
    processor: Any,
    augmentation: Augmentation | None = None,
    teacher_processor: Any = None,
    *,
    skip_bad_images: bool = False,
) -> View:
    """The data as the student sees it, and as the teacher does where it has a size and normalisation of its own."""
    collator = ImageCollator(processor, teacher_processor, augmentation, num_labels=len(data.labels))
    pictures = {"train": data.train, "validation": data.validation, **data.held_out}
    shown = pixels_of(
        {name: rows for name, rows in pictures.items() if rows is not None}, collator.canvas, skip_bad_images
    )
    held_out = {prefix: shown[prefix] for prefix in data.held_out}
    return View(
        processing_class=processor,
        collator=collator,
        train=shown["train"],
        validation=shown.get("validation"),
        held_out=held_out,
        hashes={
            name or "held out": content_hash(rows, rows.column_names)[0]
            for name, rows in {"train": shown["train"], **held_out}.items()
        },
        settings={
            **collator.settings(),
            "student_view": str(collator.student_view),
            "teacher_view": str(teacher_processor and collator.teacher_view),
        },
    )


def pixels_of(rows: Any, canvas: PixelView, skip_bad_images: bool) -> Any:
    """Of one split or of several by name. Every picture is opened now, so that a damaged one is named before training;
    small data stay decoded."""
    height, width = canvas.size
    count = sum(map(len, rows.values())) if isinstance(rows, dict) else len(rows)
    if count * height * width * 3 <= MOST_DECODED:
        return decoded(rows, canvas, skip_bad_images=skip_bad_images)
    return verify_images(rows, skip_bad_images=skip_bad_images)
