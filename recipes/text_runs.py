"""What train_teacher.py, distill_text.py and compare.py share: data, models, and runs that are kept once they are done.

A run is one model trained with one objective and one seed. It lies in `output_dir/runs/NAME/seed-N`: `settings.json` is
written before training and `result.json` last, so that a resumed study skips what is done, goes on from the last whole
checkpoint of what is not, and refuses runs that were made with other settings.
"""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
import yaml
from safetensors.numpy import load_file, save_file
from scipy.special import softmax
from transformers import AutoConfig, AutoModelForSequenceClassification, EvalPrediction, PrinterCallback

from hfkd import DistillationArguments, DistillationTrainer
from hfkd.cache import cache_teacher
from hfkd.data import embedded
from hfkd.data.collate import DistillationCollator
from hfkd.data.text import TEXT_TASKS, label_names, load_text, same_tokenizer, tokenize
from hfkd.diagnostics.evaluate_metrics import compute_metrics_for
from hfkd.diagnostics.metrics import agreement, expected_calibration_error
from hfkd.fingerprint import content_hash
from hfkd.models.student import init_student_from_teacher
from hfkd.objectives import Objective
from hfkd.records import read_json, weights_hash, write_json
from hfkd.teachers import CachedTeacher, ModelTeacher, Teacher
from hfkd.teachers.labels import label_order
from hfkd.teachers.model import tokenizer_of
from hfkd.trainers.checkpoints import last_whole_checkpoint
from hfkd.trainers.self_distillation import RECORDED

HERE = Path(__file__).resolve().parent
METRICS = {
    "single_label_classification": ("accuracy",),
    "multi_label_classification": ("micro_f1", "macro_f1"),
    "regression": ("pearson", "spearmanr"),
}
TEACHERS = (
    "--teacher (a fine-tuned folder or Hub id, see recipes/train_teacher.py) or --teacher_start (weights to fine-tune)"
)
# Of these one is given; a flag takes the place of what stands in a file
ONE_OF = (
    ("task", "dataset_name", "train_file"),
    ("teacher", "teacher_start"),
    ("student", "student_config", "student_layers"),
)
READABLE = {"labels", "example_id", "input_ids", "attention_mask"}  # what an objective may read of a row of text


@dataclass
class DataArguments:
    """Which texts, and what they are scored on."""

    task: str | None = field(default=None, metadata={"help": f"One of {', '.join(TEXT_TASKS)}."})
    dataset_name: str | None = field(default=None, metadata={"help": "A data set's Hub id or local folder."})
    dataset_config: str | None = field(default=None, metadata={"help": "The data set's configuration."})
    train_file: str | None = field(default=None, metadata={"help": "csv, tsv, json, jsonl or parquet."})
    validation_file: str | None = field(default=None, metadata={"help": "Same kinds; to choose settings on."})
    test_file: str | None = field(default=None, metadata={"help": "Same kinds; to report on."})
    text_column: str | None = field(default=None, metadata={"help": "The column with the text; default: guessed."})
    text_pair_column: str | None = field(default=None, metadata={"help": "The column with a second text."})
    label_column: str | None = field(default=None, metadata={"help": "The column with the label; default: guessed."})
    problem_type: str | None = field(
        default=None, metadata={"help": f"{', '.join(METRICS)}; default: the task's, else the first."}
    )
    max_length: int = field(default=128, metadata={"help": "Tokens a text (or pair) is cut at."})
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


def one_source(recipe: Any, arguments: list[str]) -> None:
    """Flags win over files, also where they choose something else: --train_file takes the place of a file's task."""
    flags = {word.split("=")[0].removeprefix("--") for word in arguments if word.startswith("--")}
    for names in ONE_OF:
        for name in names:
            if flags & set(names) and name not in flags and hasattr(recipe, name):
                setattr(recipe, name, None)


# ---- data ----


@dataclass(frozen=True)
class TextData:
    """`train` and the rows to score on, not tokenised; `held_out` by the prefix of their metrics' names."""

    train: Any
    validation: Any
    held_out: dict[str, Any]
    labels: list[str] | None
    problem_type: str
    metrics: tuple[str, ...]

    @property
    def metric(self) -> str:
        """The one that settings are chosen by and tables compare."""
        return next(iter(self.held_out)) + self.metrics[0]

    def head(self) -> dict[str, Any]:
        """What a classifier's configuration says about the labels."""
        if self.labels is None:
            return {"num_labels": 1, "problem_type": self.problem_type}
        names = {"id2label": dict(enumerate(self.labels)), "label2id": {name: i for i, name in enumerate(self.labels)}}
        return {"num_labels": len(self.labels), "problem_type": self.problem_type, **names}


def load_data(recipe: DataArguments, args: DistillationArguments) -> TextData:
    row = TEXT_TASKS.get(recipe.task or "")
    problem_type = recipe.problem_type or (row.problem_type if row else "single_label_classification")
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
    # A budget below one epoch bounds every stage: what is trained on, what a teacher is asked for, what is scored
    steps = args.max_steps if args.max_steps > 0 else None
    most = steps and steps * args.eval_batch_size * args.world_size
    most = most if recipe.evaluation_rows is None else recipe.evaluation_rows
    whole = scored(recipe, splits, row)
    held_out = {prefix: at_random(rows, most) for prefix, rows in whole.items()}
    if held_out != whole:
        scores, there = (sum(len(rows) for rows in part.values()) for part in (held_out, whole))
        say(
            f"Scoring on {scores:,} of {there:,} held-out texts, drawn once: a short run (--evaluation_rows, --max_steps)"
        )
    return TextData(
        train=at_random(splits["train"], steps and steps * rows_per_step(args)),
        validation=splits.get("validation"),
        held_out=held_out,
        labels=None if problem_type == "regression" else label_names(splits),
        problem_type=problem_type,
        metrics=row.metrics if row and problem_type == row.problem_type else METRICS[problem_type],
    )


def scored(recipe: DataArguments, splits: Any, row: Any) -> dict[str, Any]:
    """The splits to score on by the prefix of their metrics: "" for one, matched_ and mismatched_ for MNLI."""
    wanted = recipe.evaluate_on or ("test" if "test" in splits else "validation")
    if wanted not in splits:
        raise ValueError(
            f"there is no {wanted} split to score on, the data has {', '.join(splits)}: give --{wanted}_file, or choose with "
            "--evaluate_on"
        )
    names = [wanted, *(name for name in splits if name.startswith(f"{wanted}_"))]
    if len(names) == 1:
        return {"": splits[wanted]}
    sources = [source.removeprefix(f"{wanted}_") for source in row.validation]
    return {f"{source}_": splits[name] for source, name in zip(sources, names, strict=True)}


def at_random(rows: Any, count: int | None) -> Any:
    """At most `count` rows, the same for every seed: the first ones of a file are often of one class."""
    if count is None or count >= len(rows):
        return rows
    if count < 1:
        raise ValueError(f"{count} rows are asked for: at least 1 is needed")
    chosen = np.random.default_rng(0).choice(len(rows), count, replace=False)
    return rows.select(sorted(chosen.tolist()))


def rows_per_step(args: DistillationArguments) -> int:
    return args.train_batch_size * args.gradient_accumulation_steps * args.world_size


@dataclass
class View:
    """The data as one tokenizer reads it, the teacher's tokens beside it where the teacher has a tokenizer of its own."""

    tokenizer: Any
    collator: Any
    train: Any
    validation: Any
    held_out: dict[str, Any]
    hashes: dict[str, str]


def view_of(data: TextData, tokenizer: Any, max_length: int, teacher_tokenizer: Any = None) -> View:
    def read(rows: Any) -> Any:
        return tokenize(rows, tokenizer, max_length, teacher_tokenizer=teacher_tokenizer)

    train, held_out = read(data.train), {prefix: read(rows) for prefix, rows in data.held_out.items()}
    return View(
        tokenizer=tokenizer,
        collator=DistillationCollator(tokenizer, teacher_tokenizer),
        train=train,
        validation=None if data.validation is None else read(data.validation),
        held_out=held_out,
        hashes={
            name or "held out": content_hash(rows, rows.column_names)[0]
            for name, rows in {"train": train, **held_out}.items()
        },
    )


# ---- models ----


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


# ---- runs ----


@dataclass
class Run:
    """One model to train. `objective` None is cross-entropy; `answers` are the teacher's logits on the held-out rows."""

    name: str
    seed: int
    model: Callable[[], Any]
    view: View
    objective: Objective | None = None
    asked: Callable[[], tuple[Teacher, Any]] | None = None  # the teacher, and rows with its answers if they are cached
    teacher_hash: str | None = None
    answers: dict[str, Any] | None = None
    budget: dict[str, Any] = field(default_factory=dict)
    keep: bool = False


class Runs:
    """Trains and scores runs in `output_dir/runs`, or finds them there."""

    def __init__(self, recipe: DataArguments, args: DistillationArguments, data: TextData):
        self.recipe, self.args, self.data = recipe, args, data
        self.output = Path(args.output_dir)
        self.resumes = resumes(args)
        self.found = earlier_runs(self.output)
        refuse_unusable(args, data)
        if self.found and not (self.resumes or recipe.overwrite):
            raise FileExistsError(
                f"{self.output} holds another study ({', '.join(path.name for path in self.found)}): go on with it with "
                "--resume_from_checkpoint True, delete it with --overwrite, or choose another --output_dir"
            )

    def start(self) -> None:
        """Only now, when all inputs have proved right, an earlier study is deleted."""
        if self.args.process_index == 0 and self.recipe.overwrite and not self.resumes:
            for path in self.found:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        wait_for_everyone()

    def folder(self, name: str, seed: int) -> Path:
        return self.output / "runs" / name / f"seed-{seed}"

    def result(self, run: Run) -> dict[str, Any]:
        """The saved result of this run, or a new one. ValueError where the saved one has other settings."""
        folder = self.folder(run.name, run.seed)
        transformers.set_seed(run.seed)
        model = run.model()
        self.check_settings(folder, {**self.settings(run), "start": weights_hash(model.state_dict())})
        found = read_json(folder / "result.json")
        done = found is not None and (not run.keep or (folder / "model").is_dir())
        wait_for_everyone()
        return found if done else self.train(run, model, folder)

    def settings(self, run: Run) -> dict[str, Any]:
        args = self.arguments(run, Path())
        recorded = {name: getattr(args, name) for name in RECORDED}
        objective = run.objective or args.make_objective("cross_entropy")
        return {
            **{name: getattr(value, "value", value) for name, value in recorded.items()},
            "rows_per_step": rows_per_step(args),
            "max_length": self.recipe.max_length,
            "objective": f"{type(objective).__name__}({objective.settings()})",
            "teacher": run.teacher_hash,
            "teacher_dtype": args.teacher_dtype if run.teacher_hash else None,
            "rows": run.view.hashes,
        }

    def check_settings(self, folder: Path, settings: dict[str, Any]) -> None:
        settings, found = json.loads(json.dumps(settings)), read_json(folder / "settings.json")
        if found is not None and found != settings:
            names = sorted(settings.keys() | found.keys())
            changed = {n: (found.get(n), settings.get(n)) for n in names if found.get(n) != settings.get(n)}
            raise ValueError(
                f"{folder} was made with other settings (was, now): {changed}; use --overwrite or another --output_dir"
            )
        wait_for_everyone()
        if self.args.process_index == 0 and found is None:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "settings.json", settings)

    def train(self, run: Run, model: Any, folder: Path) -> dict[str, Any]:
        """Train, score the last step's model (never the best one), save."""
        trainer = self.trainer(run, model, self.arguments(run, folder))
        checkpoint = last_whole_checkpoint(folder)
        memory = Memory(self.args.device)
        done = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        steps = trainer.state.global_step
        taken = steps - (int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0)
        seconds = done.metrics["train_runtime"] / max(taken, 1)
        costs = {"steps": steps, "seconds_per_step": seconds, "peak_mib": memory.peak()}
        logits = {prefix: predict(trainer, rows) for prefix, rows in run.view.held_out.items()}
        if run.keep:
            self.save(trainer, folder)
        return self.close(run, folder, {**self.score(run, logits), **costs}, logits)

    def close(self, run: Run, folder: Path, found: dict[str, Any], logits: dict[str, Any]) -> dict[str, Any]:
        result = {"run": run.name, "seed": run.seed, **found}
        if self.args.process_index == 0:
            partial = folder / "logits.partial"
            # save_file writes the bytes as they lie: columns in another order would be read back mixed up
            save_file({f"{prefix}logits": np.ascontiguousarray(values) for prefix, values in logits.items()}, partial)
            partial.replace(folder / "logits.safetensors")
            write_json(folder / "result.json", result)
            for checkpoint in folder.glob("checkpoint-*"):
                shutil.rmtree(checkpoint)
        wait_for_everyone()
        return result

    def trainer(self, run: Run, model: Any, args: DistillationArguments) -> DistillationTrainer:
        teacher, rows = run.asked() if run.asked else (None, run.view.train)
        trainer = DistillationTrainer(
            model,
            args,
            run.view.collator,
            rows,
            run.view.validation if str(args.eval_strategy.value) != "no" else None,
            processing_class=run.view.tokenizer,
            compute_metrics=compute_metrics_for(self.data.metrics, self.data.problem_type),
            teacher=teacher,
            objective=run.objective,
        )
        if args.disable_tqdm:
            trainer.remove_callback(PrinterCallback)
        return trainer

    def arguments(self, run: Run, folder: Path) -> DistillationArguments:
        """Those of the command line, for one run: only seed, objective and (for a teacher) the budget differ."""
        args = copy.copy(self.args)
        changes = {"objective": None, "temperature": None, "alpha": None, "objective_kwargs": None, **run.budget}
        changes |= {"output_dir": str(folder), "seed": run.seed, "data_seed": run.seed, "resume_from_checkpoint": None}
        if run.objective is not None:
            changes["label_smoothing_factor"] = 0.0  # the objective has it already
        for name, value in changes.items():
            setattr(args, name, value)
        return args

    def save(self, trainer: DistillationTrainer, folder: Path) -> None:
        partial = folder / "model.partial"
        trainer.save_model(str(partial))
        wait_for_everyone()
        if self.args.process_index == 0:
            shutil.rmtree(folder / "model", ignore_errors=True)
            partial.rename(folder / "model")
        wait_for_everyone()

    def score(self, run: Run, logits: dict[str, Any]) -> dict[str, Any]:
        """Metrics of every held-out split; agreement with the teacher and calibration on the first one."""
        metrics = compute_metrics_for(self.data.metrics, self.data.problem_type)
        labels = {prefix: np.asarray(rows["label"][:]) for prefix, rows in run.view.held_out.items()}
        found = {}
        for prefix, values in logits.items():
            scores = metrics(EvalPrediction(predictions=values, label_ids=labels[prefix]))
            found |= {f"{prefix}{name}": score for name, score in scores.items()}
        if self.data.problem_type != "single_label_classification":
            return found
        first = next(iter(logits))
        if run.answers is not None:
            found["agreement"] = agreement(logits[first].argmax(-1), run.answers[first].argmax(-1))
        found["calibration_error"] = expected_calibration_error(softmax(logits[first], axis=-1), labels[first])
        return found

    def answers(self, name: str, seed: int) -> dict[str, Any]:
        """The saved logits on the held-out rows, by prefix."""
        found = load_file(self.folder(name, seed) / "logits.safetensors")
        return {key.removesuffix("logits"): values for key, values in found.items()}


def predict(trainer: DistillationTrainer, rows: Any) -> Any:
    """Logits (rows, labels) in the order of the rows; neighbours of one length need little padding meanwhile."""
    order = np.argsort([len(ids) for ids in rows["input_ids"]], kind="stable")
    # transformers shuffles evaluation rows too where training groups by length, and its predictions come shuffled
    strategy, trainer.args.train_sampling_strategy = trainer.args.train_sampling_strategy, "random"
    found = np.asarray(trainer.predict(rows.select(order)).predictions, dtype=np.float32)
    trainer.args.train_sampling_strategy = strategy
    logits = np.empty_like(found)
    logits[order] = found
    return logits


class Memory:
    """Peak memory from now on, in MiB: the accelerator's, or the process's resident size where the kernel counts it.

    The latter includes what earlier runs of the process have left in malloc: a bound, not a measurement of one run.
    """

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        elif (clear := Path("/proc/self/clear_refs")).exists():
            with suppress(OSError):  # where it is not allowed, the peak is that of the whole process
                clear.write_text("5")

    def peak(self) -> float | None:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        if not (status := Path("/proc/self/status")).exists():
            return None
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024


def earlier_runs(output: Path) -> list[Path]:
    """What an earlier study has written, and nothing else that lies beside it."""
    runs = [path.parent for path in output.glob("runs/*/seed-*/settings.json")]
    answers = list(output.glob("teacher_answers/seed-*"))
    files = [path for name in ("results.csv", "results.md", "scores.png") for path in output.glob(name)]
    return sorted([*runs, *answers, *(files if runs else [])])


def resumes(args: DistillationArguments) -> bool:
    if args.resume_from_checkpoint not in (None, "True", "true", True, "False", "false"):
        raise ValueError(
            f"--resume_from_checkpoint takes True here (runs resume from output_dir), not {args.resume_from_checkpoint}"
        )
    return args.resume_from_checkpoint in ("True", "true", True)


def refuse_unusable(args: DistillationArguments, data: TextData) -> None:
    if args.load_best_model_at_end:
        raise ValueError("runs are scored at their last step: leave load_best_model_at_end off")
    if args.eval_strategy.value != "no" and data.validation is None:
        raise ValueError(
            f"eval_strategy is {args.eval_strategy.value}, and the data has no validation split: leave it off"
        )


# ---- one teacher and its students ----


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


def start_weights(name: str | None, task: str | None, args: DistillationArguments, flags: str) -> str:
    """What is fine-tuned as the teacher: the embedded tasks have an embedded default."""
    if name:
        return name
    row = TEXT_TASKS.get(task or "")
    if row is None or row.embedded is None:
        raise ValueError(f"no model to start from: give {flags}")
    with args.main_process_first(desc="embedded model"):
        return str(embedded.save_embedded_roberta(Path(args.output_dir).parent / "cache" / "roberta-minilm"))


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


def tokenizer_for(name: str) -> Any:
    tokenizer = tokenizer_of(name)
    if tokenizer is None:
        raise OSError(
            f"{name} has no tokenizer: it is neither a folder with one nor reachable on the Hub (without a network pass a "
            "local folder)"
        )
    return tokenizer


# ---- as programs ----


def say(text: str) -> None:
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"\n== {text}", flush=True)


def wait_for_everyone() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def quiet() -> None:
    transformers.utils.logging.disable_progress_bar()  # of loading and saving; training keeps its own
    datasets.disable_progress_bars()


@contextmanager
def one_sentence() -> Iterator[None]:
    """Wrong inputs end a program with their sentence, not with a stack of calls."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise SystemExit(f"{Path(sys.argv[0]).name}: {error}") from error
