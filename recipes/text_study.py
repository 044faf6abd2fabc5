"""One teacher and its students, on equal budgets: which models, from which weights or sizes, and whether they fit together."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers
import yaml
from transformers import AutoConfig, AutoModelForSequenceClassification

from hfkd import DistillationArguments
from hfkd.cache import cache_teacher
from hfkd.data import embedded
from hfkd.data.text import TEXT_TASKS, same_tokenizer
from hfkd.models.student import init_student_from_teacher
from hfkd.objectives import Objective
from hfkd.records import read_json, weights_hash
from hfkd.teachers import CachedTeacher, ModelTeacher, Teacher
from hfkd.teachers.labels import label_order
from program import HERE, rows_per_step, say
from runs import Run, Runs, predict
from text_data import DataArguments, TextData, load_data, tokenizer_for, view_of

TEACHERS = (
    "--teacher (a fine-tuned folder or Hub id, see recipes/train_teacher.py) or --teacher_start (weights to fine-tune)"
)
READABLE = {"labels", "example_id", "input_ids", "attention_mask"}  # what an objective may read of a row of text


@dataclass
class StudyArguments(DataArguments):
    """One teacher and students of it."""

    seeds: int = field(default=3, metadata={"help": "Runs of each kind; a seed fixes weights, order and dropout."})
    teacher: str | None = field(default=None, metadata={"help": "A fine-tuned teacher: folder or Hub id."})
    teacher_start: str | None = field(
        default=None, metadata={"help": "Weights to fine-tune as the teacher; default for embedded tasks: MiniLM-L6."}
    )
    teacher_seeds: int = field(
        default=1, metadata={"help": "Teachers fine-tuned; the student of seed s learns from teacher s modulo this."}
    )
    teacher_epochs: float | None = field(default=None, metadata={"help": "Default: the student's budget."})
    teacher_learning_rate: float | None = field(default=None, metadata={"help": "Default: the student's."})
    student: str | None = field(default=None, metadata={"help": "The student's start: a folder or Hub id."})
    student_config: str | None = field(
        default=None, metadata={"help": "YAML or JSON with sizes (recipes/configs/student_*.yaml): starts at random."}
    )
    student_layers: int | None = field(
        default=None, metadata={"help": "Start from this many of the teacher's layers, evenly spaced."}
    )
    cache_teacher: bool = field(
        default=True, metadata={"help": "Ask the teacher once for every row, where the objective needs logits only."}
    )


class Study:
    """Students of one teacher (or of a few), on equal budgets: same rows, order, start weights, steps and trainer."""

    def __init__(self, recipe: StudyArguments, args: DistillationArguments, objectives: list[Objective]):
        """Everything that can be wrong with the inputs is said here, before any training."""
        self.recipe, self.args = recipe, args
        refuse_wrong_choices(recipe)
        self.data = load_data(recipe, args)
        self.runs = Runs(recipe, args, self.data)
        self.sizes = read_sizes(recipe.student_config) if recipe.student_config else None
        self.start = None if recipe.teacher else start_weights(recipe.teacher_start, recipe.task, args, TEACHERS)
        self.teacher_tokenizer = tokenizer_for(recipe.teacher or str(self.start))
        self.tokenizer = tokenizer_for(recipe.student) if recipe.student else self.teacher_tokenizer
        self.teachers: dict[int, tuple[str, str]] = {}  # where its weights are, and their hash
        self.teacher_results: dict[int, dict[str, Any]] = {}
        self.cached: dict[int, Any] = {}
        self.check_models(objectives)
        self.teacher_view = self.view = view_of(self.data, self.teacher_tokenizer, recipe.max_length)
        if not same_tokenizer(self.tokenizer, self.teacher_tokenizer):
            self.view = view_of(self.data, self.tokenizer, recipe.max_length, self.teacher_tokenizer)

    def check_models(self, objectives: list[Objective]) -> None:
        """Raises ValueError for a teacher of other labels, and for objectives that do not fit the two models."""
        teacher = self.load_teacher(self.recipe.teacher).model if self.recipe.teacher else None
        if teacher is not None and self.order_of(teacher.config) is not None and self.recipe.student_layers:
            raise ValueError(
                f"--student_layers copies the head of {self.recipe.teacher}, whose classes are "
                f"{list(teacher.config.id2label.values())}, and the data's are {self.data.labels}: give --student or "
                "--student_config, or train the teacher with recipes/train_teacher.py"
            )
        teacher = teacher or classifier(str(self.start), self.data)
        student = self.new_student(lambda: teacher)
        for objective in objectives:
            name = type(objective).__name__
            if odd := set(objective.columns) - READABLE:
                raise ValueError(
                    f"{name} reads {', '.join(sorted(odd))}, which rows of text classification do not have"
                )
            objective.build(student.config, teacher.config, self.data.problem_type)

    def load_teacher(self, source: Any) -> ModelTeacher:
        """Anew for every run: what an objective needs of a teacher (attention maps, say) stays switched on."""
        untrained = self.args.allow_untrained_teacher
        return ModelTeacher(str(source), dtype=self.args.teacher_dtype, allow_untrained=untrained)

    def order_of(self, teacher_config: Any) -> list[int] | None:
        """For each of the data's classes the teacher's id, or None. Raises ValueError for other classes."""
        return label_order(teacher_config, AutoConfig.for_model("roberta", **self.data.head()))

    def new_student(self, teacher: Callable[[], Any]) -> Any:
        """Drawn from torch's generator: set the seed first. `teacher` loads the model whose layers it may start from."""
        if self.sizes is not None:
            return classifier_from_sizes(self.sizes, self.tokenizer, self.data)
        if self.recipe.student:
            return classifier(self.recipe.student, self.data)
        student = init_student_from_teacher(teacher(), num_hidden_layers=self.recipe.student_layers)
        student.config.update(self.data.head())
        return student

    # ---- the teacher ----

    def teacher(self, seed: int) -> tuple[str, str]:
        """Where the teacher of this seed is, and its weights' hash; fine-tuned and scored where that is not done yet."""
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
        start, rows = str(self.start), len(self.teacher_view.train)
        say(f"Teacher {number}: fine-tuning {Path(start).name} on {rows:,} texts")
        run = Run("teacher", number, lambda: classifier(start, self.data), self.teacher_view, keep=True)
        run.budget = teacher_budget(self.recipe, self.args, rows)
        self.teacher_results[number] = self.runs.result(run)
        return self.runs.folder("teacher", number) / "model"

    def scored_teacher(self, teacher: ModelTeacher, digest: str) -> dict[str, Any]:
        """A given teacher's scores, its classes in the order of the data's."""
        folder = self.runs.folder("teacher", 0)
        run = Run("teacher", 0, lambda: teacher.model, self.teacher_view)
        self.runs.check_settings(folder, {"teacher": digest, "rows": self.teacher_view.hashes})
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
        if not self.recipe.cache_teacher or objective.needs != {"teacher"}:
            return self.load_teacher(source), self.view.train
        folder = self.runs.output / "teacher_answers" / f"seed-{number}"
        if number not in self.cached:
            say(f"Teacher {number}: answering {len(self.view.train):,} texts once")
            with self.args.main_process_first(desc="asking the teacher"):
                self.cached[number] = cache_teacher(
                    self.view.train,
                    self.load_teacher(source),
                    folder,
                    processing_class=self.teacher_tokenizer,
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


def refuse_wrong_choices(recipe: StudyArguments) -> None:
    students = {name: getattr(recipe, name) for name in ("student", "student_config", "student_layers")}
    given = [f"--{name} {value}" for name, value in students.items() if value is not None]
    if len(given) != 1:
        raise ValueError(
            f"one student is needed, given: {' and '.join(given) or 'none'}; choose --student (a folder or Hub id), "
            "--student_config (a file of sizes) or --student_layers (of the teacher)"
        )
    if recipe.teacher and recipe.teacher_start:
        raise ValueError(
            f"--teacher {recipe.teacher} is ready, --teacher_start {recipe.teacher_start} is not: give one"
        )
    if recipe.teacher and recipe.teacher_seeds != 1:
        raise ValueError(f"--teacher is one teacher, and --teacher_seeds asks for {recipe.teacher_seeds}: leave it out")
    for name in ("seeds", "teacher_seeds"):
        if getattr(recipe, name) < 1:
            raise ValueError(f"--{name} must be 1 or more, got {getattr(recipe, name)}")


def teacher_budget(recipe: StudyArguments, args: DistillationArguments, rows: int) -> dict[str, Any]:
    """The teacher's own epochs and learning rate; --max_steps bounds it too."""
    budget: dict[str, Any] = {}
    if recipe.teacher_learning_rate is not None:
        budget["learning_rate"] = recipe.teacher_learning_rate
    if recipe.teacher_epochs is not None:
        steps = math.ceil(recipe.teacher_epochs * math.ceil(rows / rows_per_step(args)))
        budget["num_train_epochs"] = recipe.teacher_epochs
        budget["max_steps"] = min(steps, args.max_steps) if args.max_steps > 0 else -1
    return budget


# ---- models ----


def start_weights(name: str | None, task: str | None, args: DistillationArguments, flags: str) -> str:
    """What is fine-tuned as the teacher: the embedded tasks have an embedded default."""
    if name:
        return name
    row = TEXT_TASKS.get(task or "")
    if row is None or row.embedded is None:
        raise ValueError(f"no model to start from: give {flags}")
    with args.main_process_first(desc="embedded model"):
        return str(embedded.save_embedded_roberta(Path(args.output_dir).parent / "cache" / "roberta-minilm"))


def classifier(name: str, data: TextData) -> Any:
    """Pretrained weights with a head for these labels."""
    load = AutoModelForSequenceClassification.from_pretrained
    return quietly(load, name, ignore_mismatched_sizes=True, **data.head())  # a head for other labels is replaced


def classifier_from_sizes(sizes: Mapping[str, Any], tokenizer: Any, data: TextData) -> Any:
    """A model that starts at random; what a tokenizer decides (vocabulary, special tokens, positions) follows it."""
    kind, given = sizes["model_type"], {name: value for name, value in sizes.items() if name != "model_type"}
    positions = min(tokenizer.model_max_length, 512) + tokenizer.pad_token_id + 1  # RoBERTa counts from behind padding
    read_off = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": positions,
        "type_vocab_size": 1 + ("token_type_ids" in tokenizer.model_input_names),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.cls_token_id,
        "eos_token_id": tokenizer.sep_token_id,
    }
    return AutoModelForSequenceClassification.from_config(
        AutoConfig.for_model(kind, **{**read_off, **given, **data.head()})
    )


def read_sizes(path: str) -> dict[str, Any]:
    """Sizes of a student. Raises FileNotFoundError, and ValueError for what is no size of its architecture."""
    file = next((place for place in (Path(path), HERE / "configs" / path) if place.is_file()), None)
    if file is None:
        raise FileNotFoundError(f"--student_config {path}: there is no such file, neither here nor in recipes/configs")
    sizes = yaml.safe_load(file.read_text(encoding="utf-8"))  # JSON is YAML
    if not isinstance(sizes, dict) or "model_type" not in sizes:
        raise ValueError(f"{file} must hold `name: value` lines, one of them model_type (roberta, bert, ...)")
    try:
        known = AutoConfig.for_model(sizes["model_type"])
    except ValueError as error:
        raise ValueError(f"{file}: transformers has no model_type {sizes['model_type']!r}") from error
    if unknown := sorted(name for name in sizes if not hasattr(known, name)):
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
