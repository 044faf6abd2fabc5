"""What train_teacher.py, distill_text.py and compare.py read: texts, what is scored on them, and the tokens a model sees.

What is wrong with such inputs is said in one sentence, before any training.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hfkd import DistillationArguments
from hfkd.data.collate import DistillationCollator
from hfkd.data.text import TEXT_TASKS, label_names, load_text, tokenize
from hfkd.fingerprint import content_hash
from hfkd.teachers.model import tokenizer_of
from program import at_random, rows_per_step, say
from runs import View

METRICS = {
    "single_label_classification": ("accuracy",),
    "multi_label_classification": ("micro_f1", "macro_f1"),
    "regression": ("pearson", "spearmanr"),
}


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


# ---- texts ----


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
        files = " or ".join(dict.fromkeys(("--test_file", f"--{wanted}_file")))
        raise ValueError(
            f"there is no {wanted} split to score on, the data has {', '.join(splits)}: give {files}, or choose with "
            "--evaluate_on"
        )
    names = [wanted, *(name for name in splits if name.startswith(f"{wanted}_"))]
    if len(names) == 1:
        return {"": splits[wanted]}
    sources = [source.removeprefix(f"{wanted}_") for source in row.validation]
    return {f"{source}_": splits[name] for source, name in zip(sources, names, strict=True)}


# ---- tokens ----


def view_of(data: TextData, tokenizer: Any, max_length: int, teacher_tokenizer: Any = None) -> View:
    def read(rows: Any) -> Any:
        return tokenize(rows, tokenizer, max_length, teacher_tokenizer=teacher_tokenizer)

    train, held_out = read(data.train), {prefix: read(rows) for prefix, rows in data.held_out.items()}
    return View(
        processing_class=tokenizer,
        settings={"max_length": max_length},
        collator=DistillationCollator(tokenizer, teacher_tokenizer),
        train=train,
        validation=None if data.validation is None else read(data.validation),
        held_out=held_out,
        hashes={
            name or "held out": content_hash(rows, rows.column_names)[0]
            for name, rows in {"train": train, **held_out}.items()
        },
    )


def tokenizer_for(name: str) -> Any:
    tokenizer = tokenizer_of(name)
    if tokenizer is None:
        raise OSError(
            f"{name} has no tokenizer: it is neither a folder with one nor reachable on the Hub (without a network pass a "
            "local folder)"
        )
    return tokenizer
