"""The study of teachers_pet.py: a long tail, a dev split of it, a teacher, and every method at every temperature.

All of a seed's students share rows, order, start weights, steps and trainer, and one teacher. Which part of the training
images the paper's distilled teacher has seen, the part without the dev split (here) or all of it, is not known, nor is
whether its students see the dev split (here not).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml

from hfkd import DistillationArguments
from hfkd.cache import cache_teacher
from hfkd.data.images import IMAGE_TASKS, load_images
from hfkd.data.long_tail import PROFILES, long_tail_subset, read_list_file
from hfkd.data.splits import dev_split, low_resource_subset, save_indices
from hfkd.objectives import KD, CrossEntropy, Objective
from hfkd.objectives.ada_alpha import AdaAlpha
from hfkd.objectives.ada_margin import AdaMargin
from hfkd.objectives.balanced_student import BalancedStudent
from hfkd.objectives.group_dro import GroupDRO
from hfkd.records import weights_hash
from hfkd.teachers import CachedTeacher, ModelTeacher, Teacher
from image_data import ImageArguments, ImageData, augmentation_of, view_of
from image_study import SIZES, TEACHERS_SEED, Network
from program import at_random, rows_per_step, say
from runs import Run, Runs, View

METHODS: dict[str, type[Objective]] = {
    "one_hot": CrossEntropy,
    "kd": KD,
    "ada_alpha": AdaAlpha,
    "ada_margin": AdaMargin,
    "balanced_student": BalancedStudent,
    "group_dro": GroupDRO,
}
DISTILLING = (KD, AdaAlpha, AdaMargin, BalancedStudent)  # their teacher has a temperature
ONE_HOT = "one_hot"
DEV = "dev_"  # the prefix of what is scored on the dev split
CHOSEN_BY = f"{DEV}mean_per_class_recall"


@dataclass
class PetArguments(ImageArguments):
    """Which tail, which split of it, which networks, and what is compared."""

    methods: list[str] = field(
        default_factory=lambda: list(METHODS),
        metadata={"help": f"Of {', '.join(METHODS)}, with settings where wanted: ada_margin:variant=ldam."},
    )
    temperatures: list[float] = field(
        default_factory=lambda: [1.0, 2.0, 3.0, 4.0, 5.0],
        metadata={"help": "The teacher's temperatures; one is chosen for each method, on the dev split."},
    )
    seeds: int = field(
        default=5, metadata={"help": "Teachers, each with its students; a seed fixes weights and order."}
    )
    ratio: float | None = field(
        default=None, metadata={"help": "Make a long tail: the largest class over the smallest; default: no tail."}
    )
    tail: str = field(default="exponential", metadata={"help": f"{' | '.join(PROFILES)}: how classes get rarer."})
    dev_examples: int | None = field(
        default=None, metadata={"help": "Dev images per class (half of a class of at most twice as many)."}
    )
    dev_share: float = field(
        default=0.2, metadata={"help": "Without --dev_examples: the dev split's share of each class."}
    )
    teacher_config: str = field(default="resnet10-s", metadata={"help": f"Starts at random: {SIZES}."})
    student_config: str = field(default="resnet10-xxxs", metadata={"help": "The same choice."})
    image_mean: list[float] | None = field(
        default=None, metadata={"help": "Mean of R, G and B in [0, 1] that both sides subtract; default 0.5."}
    )
    image_std: list[float] | None = field(default=None, metadata={"help": "What both sides divide by; default 0.5."})
    worst_k: int = field(default=3, metadata={"help": "How many of a model's worst classes are averaged."})
    train_list: str | None = field(
        default=None, metadata={"help": "ImageNet-LT's train list (path label); paths are below --data_dir."}
    )
    test_list: str | None = field(default=None, metadata={"help": "ImageNet-LT's test list."})


class PetStudy:
    """Everything that can be wrong with the inputs is said when it is made, before any training."""

    def __init__(self, recipe: PetArguments, args: DistillationArguments):
        self.recipe, self.args = recipe, args
        refuse_wrong_choices(recipe, args)
        self.plan = {method: planned(method, recipe, args) for method in recipe.methods}
        self.data, self.indices = load_data(recipe, args)
        if not 1 <= recipe.worst_k <= len(self.data.labels):
            raise ValueError(f"--worst_k must lie between 1 and {len(self.data.labels)} classes, got {recipe.worst_k}")
        self.runs = Runs(recipe, args, self.data)
        self.augmentation = augmentation_of(recipe)
        if self.augmentation is not None and self.augmentation.mixes:
            raise ValueError(
                "--mixup and --cutmix make labels that are probabilities, and trust, margins and groups here are by class: "
                "leave them out"
            )
        self.teacher_network = self.network(recipe.teacher_config, "teacher")
        self.student_network = self.network(recipe.student_config, "student")
        self.view = self.read()
        self.train_labels, self.dev_labels, self.test_labels = (
            torch.tensor(rows["label"][:])
            for rows in (self.view.train, self.view.held_out[DEV], self.view.held_out[""])
        )
        refuse_missing_classes(self.data.labels, self.train_labels, self.dev_labels, self.test_labels)
        self.teachers: dict[int, tuple[Path, str]] = {}
        self.cached: dict[int, Any] = {}

    def network(self, sizes: str, whose: str) -> Network:
        network = Network(None, sizes, self.recipe)
        network.refuse_wrong_size(network.new(self.data), whose)
        return network

    def read(self) -> View:
        """What both sides see."""
        ours, theirs = self.student_network, self.teacher_network
        if ours.view != theirs.view:
            raise ValueError(
                f"student and teacher see images of {ours.view.size} and {theirs.view.size}: give both the same with "
                "--image_size"
            )
        skip = self.recipe.skip_bad_images
        view = view_of(self.data, ours.processor, self.augmentation, skip_bad_images=skip)
        return view

    def start(self) -> None:
        self.runs.start()
        if self.args.process_index == 0:
            save_indices(self.runs.output / "indices.json", **self.indices)

    # ---- the teacher ----

    def teacher(self, seed: int) -> dict[str, Any]:
        """Trained on the training part alone, by labels alone, on the students' budget; its saved result."""
        say(f"Seed {seed}: teacher, {len(self.view.train):,} images")
        run = Run("teacher", seed, lambda: self.new_teacher(seed), self.view, keep=True)
        result = self.runs.result(run)
        folder = self.runs.folder("teacher", seed) / "model"
        self.teachers[seed] = folder, weights_hash(ModelTeacher(str(folder)).model.state_dict())
        return result

    def new_teacher(self, seed: int) -> Any:
        """From other weights than student `seed`, which in self-distillation would else be its teacher's double."""
        transformers.set_seed(TEACHERS_SEED + seed)
        return self.teacher_network.new(self.data)

    def dev_answers(self, seed: int) -> torch.Tensor:
        """The trained teacher's logits on the dev split, (rows, classes)."""
        return torch.from_numpy(self.runs.answers("teacher", seed)[DEV])

    def asked(self, seed: int) -> tuple[Teacher, Any]:
        """Without augmentation a teacher answers every row once; with it, what the student sees in every step."""
        folder, _ = self.teachers[seed]
        teacher = ModelTeacher(str(folder), dtype=self.args.teacher_dtype)
        if self.augmentation is not None:
            return teacher, self.view.train
        cache = self.runs.output / "teacher_answers" / f"seed-{seed}"
        if seed not in self.cached:
            with self.args.main_process_first(desc="asking the teacher"):
                self.cached[seed] = cache_teacher(
                    self.view.train,
                    teacher,
                    cache,
                    collator=self.view.collator,
                    processing_class=self.view.processing_class,
                    batch_size=self.args.per_device_eval_batch_size,
                    dtype="float32",
                    device=self.args.device,
                )
        return CachedTeacher(cache=cache), self.cached[seed]

    # ---- its students ----

    def student(self, method: str, temperature: float | None, seed: int) -> dict[str, Any]:
        objective = self.fitted(self.plan[method](temperature), seed)
        run = Run(run_name(method, temperature), seed, lambda: self.student_network.new(self.data), self.view)
        run.objective, run.keep, run.answers = objective, seed == 0, self.runs.answers("teacher", seed)
        if "teacher" in objective.needs:
            run.teacher_hash = self.teachers[seed][1]
            run.asked = lambda: self.asked(seed)
        return {**self.runs.result(run), "method": method, "temperature": temperature}

    def fitted(self, objective: Objective, seed: int) -> Objective:
        """Trust in the teacher is learned on the dev split, the classes' frequencies where the student is trained."""
        if isinstance(objective, BalancedStudent):
            return objective.fit(None, self.train_labels)
        return objective.fit(self.dev_answers(seed), self.dev_labels)

    def temperatures(self, method: str) -> list[float | None]:
        """Those to try; [None] for a method without a teacher, or with a temperature of its own."""
        swept = METHODS[method.partition(":")[0]] in DISTILLING and "temperature=" not in method
        return list(dict.fromkeys(self.recipe.temperatures)) if swept else [None]


def chosen_temperature(results: list[dict[str, Any]]) -> float | None:
    """Of one method's results: best mean over seeds of the mean per-class recall on the dev split; the lower of equals."""
    scores: dict[float | None, list[float]] = {}
    for row in results:
        scores.setdefault(row["temperature"], []).append(row[CHOSEN_BY])
    return max(sorted(scores, key=lambda t: t or 0.0), key=lambda t: sum(scores[t]) / len(scores[t]))


def run_name(method: str, temperature: float | None) -> str:
    """The folder of its runs."""
    name = re.sub(r"[^\w.=-]+", "-", method)
    return name if temperature is None else f"{name}-T{temperature:g}"


# ---- methods ----


def planned(method: str, recipe: PetArguments, args: DistillationArguments) -> Callable[[float | None], Objective]:
    """`name` or `name:setting=value,...` as a function of the temperature. ValueError for what no method has."""
    name, _, given = method.partition(":")
    if name not in METHODS:
        raise ValueError(f"--methods {method}: {name!r} is unknown; the known ones are {', '.join(METHODS)}")
    pairs = [pair.partition("=") for pair in re.split(r",(?=\w+=)", given)] if given else []
    if any(not key or not equals for key, equals, _ in pairs):
        raise ValueError(
            f"--methods {method}: settings are name=value pairs, as ada_margin:variant=ldam,margin_scale=0.5"
        )
    settings: dict[str, Any] = {"label_smoothing": args.label_smoothing_factor}
    if METHODS[name] in DISTILLING:
        settings["alpha"] = 1.0 if args.alpha is None else args.alpha
    if METHODS[name] is KD:
        settings["temperature_on"] = "teacher"
    settings |= {key: yaml.safe_load(value) for key, _, value in pairs}

    def objective(temperature: float | None) -> Objective:
        swept = {"temperature": temperature} if temperature is not None and METHODS[name] in DISTILLING else {}
        return METHODS[name](**{**swept, **settings})

    try:
        for temperature in recipe.temperatures:
            objective(temperature)
    except TypeError as error:
        raise ValueError(f"--methods {method}: {error}") from error
    return objective


# ---- data ----


def load_data(recipe: PetArguments, args: DistillationArguments) -> tuple[ImageData, dict[str, list[int]]]:
    """The training part, the dev split and the test split, and their row numbers in the source."""
    with args.main_process_first(desc="loading data"):
        splits = listed_images(recipe) if recipe.train_list else source(recipe)
    wanted = recipe.evaluate_on or ("test" if "test" in splits else "validation")
    if wanted not in splits:
        raise ValueError(
            f"there is no {wanted} split to score on, the data has {', '.join(splits)}: choose with --evaluate_on"
        )
    train = at_random(splits["train"], recipe.train_rows)
    if recipe.ratio is not None:
        train = train.select(long_tail_subset(train["label"][:], recipe.ratio, recipe.tail))
    held_out: int | float = recipe.dev_share if recipe.dev_examples is None else recipe.dev_examples
    parts = dict(zip(("train", "dev"), dev_split(train["label"][:], held_out), strict=True))
    rows = {name: train.select(part) for name, part in parts.items()} | {"test": splits[wanted]}
    rows["train"] = rows["train"].shuffle(
        seed=0
    )  # files are sorted by class, and the trainer tries the teacher on the first
    indices = {name: part["example_id"][:] for name, part in rows.items()}
    # A budget below one epoch bounds every stage: what is trained on and what is answered, with all classes in it
    steps = args.max_steps if args.max_steps > 0 else None
    scored = steps and steps * args.eval_batch_size * args.world_size
    most = {"train": steps and steps * rows_per_step(args), "dev": scored, "test": scored}
    if recipe.evaluation_rows is not None:
        most["test"] = recipe.evaluation_rows
    rows = {name: bounded(part, most[name]) for name, part in rows.items()}
    if len(rows["test"]) < len(splits[wanted]):
        said = f"{len(rows['test']):,} of {len(splits[wanted]):,} test images, drawn once"
        say(f"Scoring on {said}: a short run (--evaluation_rows, --max_steps)")
    return ImageData(
        train=rows["train"],
        validation=rows["dev"] if args.eval_strategy.value != "no" else None,
        held_out={"": rows["test"], DEV: rows["dev"]},
        labels=train.features["label"].names,
        metrics=("mean_per_class_recall", "worst_class_accuracy"),
    ), indices


def source(recipe: PetArguments) -> Any:
    """No validation split is cut from the training images, because the dev split is; one of the source's stays unused."""
    own = recipe.task is None or recipe.task not in IMAGE_TASKS or IMAGE_TASKS[recipe.task].validation is not None
    return load_images(
        recipe.task,
        recipe.data_dir,
        recipe.dataset_name,
        recipe.dataset_config,
        recipe.image_column,
        recipe.label_column,
        validation_share=None if own else 0.0,
    )


def listed_images(recipe: PetArguments) -> dict[str, Any]:
    """The images of two list files, with class numbers for names. ValueError where the lists do not fit together."""
    from datasets import ClassLabel, Dataset, Features, Image, Value

    if recipe.data_dir is None or recipe.test_list is None:
        raise ValueError("--train_list needs --test_list, and --data_dir, below which the listed images lie")
    lists = {"train": read_list_file(recipe.train_list), "test": read_list_file(recipe.test_list)}
    if common := set(lists["train"][0]) & set(lists["test"][0]):
        raise ValueError(
            f"{len(common)} images stand in both lists, such as {min(common)}: the test would be a rehearsal"
        )
    number = max(lists["train"][1]) + 1
    if max(lists["test"][1]) >= number:
        raise ValueError(f"the test list has the class {max(lists['test'][1])}, the train list ends with {number - 1}")
    features = Features(
        image=Image(), label=ClassLabel(names=[str(i) for i in range(number)]), example_id=Value("int64")
    )
    return {
        split: Dataset.from_dict(
            {
                "image": [str(Path(recipe.data_dir, path)) for path in paths],
                "label": labels,
                "example_id": list(range(len(paths))),
            },
            features=features,
        )
        for split, (paths, labels) in lists.items()
    }


def bounded(rows: Any, most: int | None) -> Any:
    """At most that many rows, drawn once, but one of every class that there is."""
    if most is None or most >= len(rows):
        return rows
    if most < 1:
        raise ValueError(f"{most} rows are asked for: at least 1 is needed")
    labels = rows["label"][:]
    return rows.select(low_resource_subset(labels, max(most, len(set(labels)))))


# ---- what is refused ----


def refuse_wrong_choices(recipe: PetArguments, args: DistillationArguments) -> None:
    if recipe.seeds < 1:
        raise ValueError(f"--seeds must be 1 or more, got {recipe.seeds}")
    if not recipe.temperatures or min(recipe.temperatures) <= 0:
        raise ValueError(f"--temperatures must be numbers above 0, got {recipe.temperatures}")
    if recipe.ratio is not None and recipe.train_list:
        raise ValueError(f"--ratio {recipe.ratio} makes a long tail, and --train_list has one: leave --ratio out")
    if recipe.ratio is not None and not recipe.ratio >= 1:
        raise ValueError(f"--ratio is the largest class over the smallest, 1 or above, got {recipe.ratio}")
    named = [name for name in ("objective", "temperature", "objective_kwargs") if getattr(args, name) is not None]
    if named:
        raise ValueError(f"--{named[0]} is for one objective: give --methods and --temperatures instead")


def refuse_missing_classes(names: list[str], *labels: torch.Tensor) -> None:
    """Also where images were damaged and left out."""
    for split, found in zip(("training part", "dev split", "test split"), labels, strict=True):
        counts = Counter(found.tolist())
        if odd := [name for label, name in enumerate(names) if not counts[label]]:
            raise ValueError(
                f"{len(odd)} of {len(names)} classes have no image in the {split} ({', '.join(odd[:10])}): a class is scored, "
                "trusted and weighted by its images; drop such classes or give them more"
            )
