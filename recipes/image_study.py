"""One teacher and its students on images, on equal budgets: which models, how each sees, and whether they fit together."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import yaml
from transformers import AutoConfig, AutoModelForImageClassification, ViTImageProcessorPil

from hfkd import DistillationArguments
from hfkd.cache import cache_teacher
from hfkd.data.pixels import PixelView
from hfkd.models.cifar_resnet import NETWORKS, cifar_resnet_config
from hfkd.models.student import init_student_from_teacher
from hfkd.objectives import Objective
from hfkd.outputs import Progress, TeacherOutput
from hfkd.records import read_json, weights_hash
from hfkd.teachers import CachedTeacher, ModelTeacher, Teacher
from hfkd.teachers.labels import label_order
from hfkd.teachers.model import image_processor_of
from image_data import ImageArguments, ImageData, augmentation_of, load_data, view_of
from program import HERE, rows_per_step, say
from runs import Run, Runs, predict

SIZES = f"a YAML file with sizes (recipes/configs/image_*.yaml), or one of {', '.join(NETWORKS)}"
READABLE = {"labels", "example_id", "pixel_values", "attention_mask"}  # what an objective may read of a row of images
REHEARSED = {"teacher", "hidden_states"}  # the rest needs hooks or eager attention, which the trainer sets
CIFAR_SIZES = ("layer_type", "embedding_size", "hidden_sizes", "depths")
CIFAR_SIZE, USUAL_SIZE = 32, 224
TEACHERS_SEED = 1000  # of self-distillation, teacher s would else start as student s does, and be the baseline


@dataclass
class StudyArguments(ImageArguments):
    """One teacher and students of it."""

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
    seeds: int = field(default=3, metadata={"help": "Runs of each kind; a seed fixes weights, order and augmentation."})
    teacher: str | None = field(default=None, metadata={"help": "A fine-tuned teacher: folder or Hub id."})
    teacher_start: str | None = field(default=None, metadata={"help": "Weights to fine-tune as the teacher."})
    teacher_config: str | None = field(default=None, metadata={"help": f"A teacher from random weights: {SIZES}."})
    teacher_seeds: int = field(
        default=1, metadata={"help": "Teachers trained; the student of seed s learns from teacher s modulo this."}
    )
    teacher_epochs: float | None = field(default=None, metadata={"help": "Default: the student's budget."})
    teacher_learning_rate: float | None = field(default=None, metadata={"help": "Default: the student's."})
    student: str | None = field(default=None, metadata={"help": "The student's start: a folder or Hub id."})
    student_config: str | None = field(default=None, metadata={"help": f"A student from random weights: {SIZES}."})
    student_layers: int | None = field(
        default=None, metadata={"help": "Start from this many of the teacher's layers, evenly spaced (ViT, DeiT)."}
    )
    cache_teacher: bool = field(
        default=True,
        metadata={
            "help": "Ask the teacher once for every image, where nothing is augmented and the objective needs logits only."
        },
    )


class Study:
    """Students of one teacher (or of a few), on equal budgets: same rows, order, start weights, pixels, steps and trainer."""

    def __init__(self, recipe: StudyArguments, args: DistillationArguments, objectives: list[Objective]):
        """Everything that can be wrong with the inputs is said here, before any training."""
        self.recipe, self.args = recipe, args
        refuse_wrong_choices(recipe)
        self.augmentation = augmentation_of(recipe)
        self.data = load_data(recipe, args, recipe.validation_share)
        self.runs = Runs(recipe, args, self.data)
        self.teacher_network = Network(recipe.teacher or recipe.teacher_start, recipe.teacher_config, recipe)
        self.student_network = self.teacher_network
        if not recipe.student_layers:
            self.student_network = Network(recipe.student, recipe.student_config, recipe)
        self.teachers: dict[int, tuple[str, str]] = {}  # where its weights are, and their hash
        self.teacher_results: dict[int, dict[str, Any]] = {}
        self.cached: dict[int, Any] = {}
        self.check_models(objectives)
        self.teacher_view = self.view = self.read(self.teacher_network.processor)
        if self.student_network.view != self.teacher_network.view:
            self.view = self.read(self.student_network.processor, self.teacher_network.processor)

    def read(self, processor: Any, teacher_processor: Any = None) -> Any:
        view = view_of(
            self.data, processor, self.augmentation, teacher_processor, skip_bad_images=self.recipe.skip_bad_images
        )
        if self.augmentation is not None:  # padding that is too large for the images shows in the first draw
            self.augmentation.draw(np.random.default_rng(0), *view.collator.canvas.size)
        return view

    def check_models(self, objectives: list[Objective]) -> None:
        """Raises ValueError for a teacher of other classes, and for sizes and objectives that do not fit the two models."""
        ready = self.recipe.teacher and self.load_teacher(self.recipe.teacher).model
        if ready and self.order_of(ready.config) is not None and self.recipe.student_layers:
            raise ValueError(
                f"--student_layers copies the head of {self.recipe.teacher}, whose classes are "
                f"{list(ready.config.id2label.values())}, and the data's are {self.data.labels}: give --student or "
                "--student_config, or train the teacher here (--teacher_start, --teacher_config)"
            )
        teacher = ready or self.teacher_network.new(self.data)
        student = self.new_student(lambda: teacher)
        self.parameters = {"teacher": teacher.num_parameters(), "student": student.num_parameters()}
        self.teacher_network.refuse_wrong_size(teacher, "teacher")
        self.student_network.refuse_wrong_size(student, "student")
        for objective in objectives:
            refuse_wrong_objective(objective)
            objective.build(student.config, teacher.config, self.data.problem_type)
            self.rehearse(objective, student, teacher)

    def rehearse(self, objective: Objective, student: Any, teacher: Any) -> None:
        """Scores two grey images once: what does not fit is said before the teacher is trained."""
        inside = "hidden_states" in objective.needs
        ours = self.student_network.answer(student, output_hidden_states=inside)
        theirs = self.teacher_network.answer(teacher, output_hidden_states=inside)
        if inside:
            refuse_feature_maps(objective, ours, theirs)
        if not objective.needs <= REHEARSED:
            return
        classes = len(self.data.labels)
        labels = torch.zeros(2, dtype=torch.long)
        if self.augmentation is not None and self.augmentation.mixes:
            labels = torch.full((2, classes), 1 / classes)
        with torch.no_grad():
            ours = ours if objective.attached is None else objective.attached(ours)
            answer = TeacherOutput(logits=theirs.logits, hidden_states=theirs.get("hidden_states"))
            objective(ours, answer, {"labels": labels}, Progress())

    def load_teacher(self, source: Any) -> ModelTeacher:
        """Anew for every run: what an objective needs of a teacher (attention maps, say) stays switched on."""
        untrained = self.args.allow_untrained_teacher
        teacher = ModelTeacher(str(source), dtype=self.args.teacher_dtype, allow_untrained=untrained)
        teacher.processing_class = self.teacher_network.processor  # that of the folder, or at --image_size
        return teacher

    def order_of(self, teacher_config: Any) -> list[int] | None:
        """For each of the data's classes the teacher's id, or None. Raises ValueError for other classes."""
        return label_order(teacher_config, AutoConfig.for_model("vit", **self.data.head()))

    def new_student(self, teacher: Callable[[], Any]) -> Any:
        """Drawn from torch's generator: set the seed first. `teacher` loads the model whose layers it may start from."""
        if not self.recipe.student_layers:
            return self.student_network.new(self.data)
        student = init_student_from_teacher(teacher(), num_hidden_layers=self.recipe.student_layers)
        student.config.update(self.data.head())
        return student

    # ---- the teacher ----

    def teacher(self, seed: int) -> tuple[str, str]:
        """Where the teacher of this seed is, and its weights' hash; trained and scored where that is not done yet."""
        number = seed % self.recipe.teacher_seeds
        if number not in self.teachers:
            source = str(self.recipe.teacher or self.trained_teacher(number))
            teacher = self.load_teacher(source)
            digest = weights_hash(teacher.model.state_dict())
            if self.recipe.teacher:
                self.teacher_results[number] = self.scored_teacher(teacher, digest)
            self.teachers[number] = (source, digest)
        return self.teachers[number]

    def trained_teacher(self, number: int) -> Path:
        rows, name = len(self.teacher_view.train), self.recipe.teacher_start or self.recipe.teacher_config
        say(f"Teacher {number}: training {Path(str(name)).stem} on {rows:,} images")
        run = Run("teacher", number, lambda: self.new_teacher(number), self.teacher_view, keep=True)
        run.budget = teacher_budget(self.recipe, self.args, rows)
        self.teacher_results[number] = self.runs.result(run)
        return self.runs.folder("teacher", number) / "model"

    def new_teacher(self, number: int) -> Any:
        transformers.set_seed(TEACHERS_SEED + number)
        return self.teacher_network.new(self.data)

    def scored_teacher(self, teacher: ModelTeacher, digest: str) -> dict[str, Any]:
        """A given teacher's scores, its classes in the order of the data's."""
        folder = self.runs.folder("teacher", 0)
        run = Run("teacher", 0, lambda: teacher.model, self.teacher_view)
        self.runs.check_settings(
            folder, {"teacher": digest, "rows": self.teacher_view.hashes, **self.teacher_view.settings}
        )
        if (found := read_json(folder / "result.json")) is not None:
            return found
        say(f"Teacher: scoring {self.recipe.teacher}")
        trainer = self.runs.trainer(run, teacher.model, self.runs.arguments(run, folder))
        order = self.order_of(teacher.config)
        logits = {prefix: predict(trainer, rows) for prefix, rows in self.teacher_view.held_out.items()}
        logits = {prefix: values if order is None else values[:, order] for prefix, values in logits.items()}
        return self.runs.close(run, folder, self.runs.score(run, logits), logits)

    def answers_of(self, number: int, source: str, objective: Objective) -> tuple[Teacher, Any]:
        """The teacher to ask in training, and the rows: with its answers where they need to be given only once."""
        asked_once = self.recipe.cache_teacher and self.augmentation is None and objective.needs == {"teacher"}
        if not asked_once:
            return self.load_teacher(source), self.view.train
        folder = self.runs.output / "teacher_answers" / f"seed-{number}"
        if number not in self.cached:
            say(f"Teacher {number}: answering {len(self.view.train):,} images once")
            with self.args.main_process_first(desc="asking the teacher"):
                self.cached[number] = cache_teacher(
                    self.view.train,
                    self.load_teacher(source),
                    folder,
                    collator=self.view.collator,
                    processing_class=self.teacher_network.processor,
                    batch_size=self.args.per_device_eval_batch_size,
                    dtype="float32",
                    device=self.args.device,
                )
        return CachedTeacher(cache=folder), self.cached[number]

    # ---- its students ----

    def student(self, name: str, seed: int, objective: Objective | None = None) -> dict[str, Any]:
        """The result of one student; without an objective it learns from the labels alone."""
        number = seed % self.recipe.teacher_seeds
        source, digest = self.teacher(seed)
        run = Run(name, seed, lambda: self.new_student(lambda: self.load_teacher(source).model), self.view)
        run.objective, run.keep, run.answers = objective, seed == 0, self.runs.answers("teacher", number)
        if objective is not None and "teacher" in objective.needs:
            run.teacher_hash = digest
            run.asked = lambda: self.answers_of(number, source, objective)
        return self.runs.result(run)


# ---- networks ----


class Network:
    """What one side starts from, and how it sees: pretrained weights (a folder or Hub id), or sizes and random weights.

    processor: the one beside the weights, brought to --image_size where that is given; or a new one, saved with the model.
    Raises OSError for weights without an image processor, and what `read_sizes` raises.
    """

    def __init__(self, weights: str | None, sizes: str | None, recipe: StudyArguments):
        self.weights = weights
        self.sizes = None if sizes is None else read_sizes(sizes)
        self.processor = processor_beside(weights, recipe) if weights else new_processor(self.sizes or {}, recipe)
        self.view = PixelView.of(self.processor)

    def new(self, data: ImageData) -> Any:
        """A classifier of these classes; what is not pretrained is drawn from torch's generator."""
        if self.weights:
            load = AutoModelForImageClassification.from_pretrained
            return quietly(load, self.weights, ignore_mismatched_sizes=True, **data.head())
        return AutoModelForImageClassification.from_config(config_of(self.sizes or {}, self.view.size, data))

    def refuse_wrong_size(self, model: Any, whose: str) -> None:
        """Raises ValueError for images that the model cannot read, or reads without their last rows and columns."""
        (height, width), patch = self.view.size, getattr(model.config, "patch_size", None)
        if isinstance(patch, int) and (height % patch or width % patch):
            raise ValueError(
                f"the {whose}'s images of {height} x {width} are no whole number of its patches of {patch} x {patch}: choose an "
                f"--image_size that is a multiple of {patch}, or another patch_size"
            )
        try:
            self.answer(model)
        except (ValueError, RuntimeError) as error:
            raise ValueError(
                f"the {whose} ({type(model).__name__}) cannot read images of {height} x {width}: {error}; choose --image_size"
            ) from error

    @torch.no_grad()
    def answer(self, model: Any, **wanted: bool) -> Any:
        """To two black images, in eval mode."""
        shown = torch.zeros(2, 3, *self.view.size, dtype=model.dtype, device=model.device)
        return model.eval()(pixel_values=shown, **{name: True for name, is_wanted in wanted.items() if is_wanted})


def processor_beside(name: str, recipe: StudyArguments) -> Any:
    processor = image_processor_of(name)
    if processor is None and recipe.image_size is None:
        raise OSError(
            f"{name} has no image processor: it is neither a folder with a preprocessor_config.json nor reachable on the Hub "
            "(without a network pass a local folder); for a folder without one, --image_size makes one"
        )
    if processor is None:
        return new_processor({}, recipe)
    if recipe.image_size is not None:
        processor.do_resize, processor.do_center_crop = True, False
        processor.size = {"height": recipe.image_size, "width": recipe.image_size}
    return processor


def new_processor(sizes: Mapping[str, Any], recipe: StudyArguments) -> Any:
    """Resizes and normalises as ViT's does; the size is --image_size, else that of the sizes, else the model's usual one."""
    usual = CIFAR_SIZE if sizes.get("model_type") == "cifar_resnet" else sizes.get("image_size", USUAL_SIZE)
    size = recipe.image_size or usual
    return ViTImageProcessorPil(
        size={"height": size, "width": size},
        image_mean=recipe.image_mean or [0.5] * 3,
        image_std=recipe.image_std or [0.5] * 3,
    )


def config_of(sizes: Mapping[str, Any], image_size: tuple[int, int], data: ImageData) -> Any:
    given = {name: value for name, value in sizes.items() if name not in ("model_type", "image_size")}
    if hasattr(AutoConfig.for_model(sizes["model_type"]), "image_size"):
        given["image_size"] = image_size[0]
    return AutoConfig.for_model(sizes["model_type"], **given, **data.head())


def read_sizes(name: str) -> dict[str, Any]:
    """Sizes of a network, by its name or from a file. FileNotFoundError; ValueError for what its architecture has not."""
    if name.lower() in NETWORKS:
        config = cifar_resnet_config(name, num_labels=2)
        return {"model_type": config.model_type, **{key: getattr(config, key) for key in CIFAR_SIZES}}
    file = next((place for place in (Path(name), HERE / "configs" / name) if place.is_file()), None)
    if file is None:
        raise FileNotFoundError(
            f"there is no network {name!r}: give {SIZES}; files are looked for here and in recipes/configs"
        )
    sizes = yaml.safe_load(file.read_text(encoding="utf-8"))  # JSON is YAML
    if not isinstance(sizes, dict) or "model_type" not in sizes:
        raise ValueError(
            f"{file} must hold `name: value` lines, one of them model_type (vit, resnet, cifar_resnet, ...)"
        )
    try:
        known = AutoConfig.for_model(sizes["model_type"])
    except ValueError as error:
        raise ValueError(f"{file}: transformers has no model_type {sizes['model_type']!r}") from error
    if unknown := sorted(key for key in sizes if not hasattr(known, key)):
        raise ValueError(f"{file}: {sizes['model_type']} has no {', '.join(unknown)}")
    return sizes


def quietly(load: Any, *args: Any, **kwargs: Any) -> Any:
    """Without the warning that the classifier is new: that is what fine-tuning is about."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        return load(*args, **kwargs)
    except OSError as error:
        raise OSError(f"{args[0]!r} is neither a local folder nor reachable on the Hub: {error}") from error
    finally:
        transformers.logging.set_verbosity(level)


# ---- what is refused ----


def refuse_wrong_choices(recipe: StudyArguments) -> None:
    one_of(recipe, "teacher", ("teacher", "teacher_start", "teacher_config"))
    one_of(recipe, "student", ("student", "student_config", "student_layers"))
    if recipe.teacher and recipe.teacher_seeds != 1:
        raise ValueError(f"--teacher is one teacher, and --teacher_seeds asks for {recipe.teacher_seeds}: leave it out")
    for name in ("seeds", "teacher_seeds"):
        if getattr(recipe, name) < 1:
            raise ValueError(f"--{name} must be 1 or more, got {getattr(recipe, name)}")
    if recipe.image_size is not None and recipe.image_size < 1:
        raise ValueError(f"--image_size must be 1 or more, got {recipe.image_size}")


def one_of(recipe: StudyArguments, whose: str, names: tuple[str, ...]) -> None:
    given = [f"--{name} {getattr(recipe, name)}" for name in names if getattr(recipe, name) is not None]
    if len(given) != 1:
        raise ValueError(
            f"one {whose} is needed, given: {' and '.join(given) or 'none'}; choose --{whose} (a folder or Hub id) or one of "
            f"{', '.join(f'--{name}' for name in names[1:])}"
        )


def refuse_wrong_objective(objective: Objective) -> None:
    name = type(objective).__name__
    if type(objective).fit is not Objective.fit:
        raise ValueError(
            f"{name} learns something of every class before training, on a dev split: recipes/teachers_pet.py runs it"
        )
    if odd := set(objective.columns) - READABLE:
        raise ValueError(f"{name} reads {', '.join(sorted(odd))}, which rows of image classification do not have")


def refuse_feature_maps(objective: Objective, ours: Any, theirs: Any) -> None:
    """Raises ValueError for hidden states that are no tokens, (batch, tokens, hidden), and for other numbers of tokens."""
    shapes = {"student": tuple(ours.hidden_states[-1].shape), "teacher": tuple(theirs.hidden_states[-1].shape)}
    name = type(objective).__name__
    for whose, shape in shapes.items():
        if len(shape) != 3:
            raise ValueError(
                f"{name} compares tokens, and the {whose}'s hidden states are the maps of a convolutional network: use an "
                'objective of logits (kd, dkd, dist, or relational_kd with --objective_kwargs \'{"feature": "logits"}\')'
            )
    if objective.token_by_token and shapes["student"][1] != shapes["teacher"][1]:
        raise ValueError(
            f"{name} compares token by token, and the student has {shapes['student'][1]} tokens, the teacher "
            f"{shapes['teacher'][1]}: choose the same number of patches, or an objective of logits"
        )


def teacher_budget(recipe: StudyArguments, args: DistillationArguments, rows: int) -> dict[str, Any]:
    """The teacher's own epochs and learning rate; --max_steps bounds it too, and milestones stay at their share."""
    budget: dict[str, Any] = {}
    if recipe.teacher_learning_rate is not None:
        budget["learning_rate"] = recipe.teacher_learning_rate
    if recipe.teacher_epochs is not None:
        steps = math.ceil(recipe.teacher_epochs * math.ceil(rows / rows_per_step(args)))
        budget["num_train_epochs"] = recipe.teacher_epochs
        budget["max_steps"] = min(steps, args.max_steps) if args.max_steps > 0 else -1
        share = recipe.teacher_epochs / args.num_train_epochs
        budget["lr_milestones"] = args.lr_milestones and [share * milestone for milestone in args.lr_milestones]
    return budget
