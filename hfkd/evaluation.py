"""Score a saved model on the held-out rows of a task: a folder or a Hub id, texts or pictures, by the trainers' metrics.

The model is asked as whoever downloads it would ask it: with the tokenizer or image processor that lies beside its weights.
A student of pictures that was scored on rows decoded at a larger teacher's size can differ by a few rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from hfkd.data.images import IMAGE_TASKS, load_images
from hfkd.data.pixels import COLUMNS, ImageCollator, PixelView
from hfkd.data.text import TEXT_TASKS, load_text
from hfkd.diagnostics.answers import TextCollator, asked
from hfkd.diagnostics.evaluate_metrics import compute_metrics_for
from hfkd.diagnostics.metrics import IGNORED
from hfkd.diagnostics.row_labels import labels_of
from hfkd.teachers import ModelTeacher
from hfkd.teachers.labels import class_names, problem_type_of

MAX_LENGTH = 128  # tokens a text is cut at where nothing else is said, as in the recipes
METRICS = {
    "single_label_classification": ("accuracy",),
    "multi_label_classification": ("micro_f1", "macro_f1"),
    "regression": ("pearson", "spearmanr"),
}


# ---- rows ----


def load_splits(
    task: str | None = None,
    *,
    data_dir: str | Path | None = None,
    dataset_name: str | None = None,
    dataset_config: str | None = None,
    train_file: str | Path | None = None,
    validation_file: str | Path | None = None,
    test_file: str | Path | None = None,
    text_column: str | None = None,
    text_pair_column: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    require_labels: bool = True,
) -> Any:
    """The splits of a task, a folder of pictures (`data_dir`), a data set (pictures where `image_column` names them, else
    texts) or files of texts. Raises what `load_text` and `load_images` raise."""
    if task in IMAGE_TASKS or data_dir is not None or image_column is not None:
        files = {"train_file": train_file, "validation_file": validation_file, "test_file": test_file}
        if given := [f"--{name} {file}" for name, file in files.items() if file is not None]:
            raise ValueError(f"{', '.join(given)} is for texts, and pictures are asked for: choose one source of data")
        return load_images(task, data_dir, dataset_name, dataset_config, image_column, label_column)
    if task is not None and task not in TEXT_TASKS:
        raise ValueError(
            f"unknown task {task!r}: the known ones are {', '.join([*TEXT_TASKS, *IMAGE_TASKS])} (texts, then images)"
        )
    return load_text(
        task,
        dataset_name,
        dataset_config,
        train_file,
        validation_file,
        test_file,
        text_column,
        label_column,
        require_labels=require_labels,
        text_pair_column=text_pair_column,
    )


def split_named(splits: Mapping[str, Any], split: str | None = None) -> str:
    """None: test where there is one, else validation. Raises ValueError for a split that is not there."""
    wanted = split or ("test" if "test" in splits else "validation")
    if wanted not in splits:
        raise ValueError(f"there is no {wanted} split, the data has {', '.join(splits)}: choose with --split")
    return wanted


def held_out(splits: Mapping[str, Any], task: str | None = None, split: str | None = None) -> dict[str, Any]:
    """The rows to score on by the prefix of their metrics' names: "" for one split, matched_ and mismatched_ for MNLI."""
    wanted = split_named(splits, split)
    names = [wanted, *(name for name in splits if split is None and name.startswith(f"{wanted}_"))]
    if len(names) == 1:
        return {"": splits[wanted]}
    sources = [source.removeprefix(f"{wanted}_") for source in TEXT_TASKS[task or ""].validation]
    return {f"{source}_": splits[name] for source, name in zip(sources, names, strict=True)}


def load_rows(task: str | None = None, split: str | None = None, *, rows: int | None = None, **data: Any) -> Any:
    """One split, or `rows` of it, drawn once. data: of `load_splits`."""
    splits = load_splits(task, **data)
    return drawn(splits[split_named(splits, split)], rows)


def drawn(dataset: Any, rows: int | None) -> Any:
    """At most so many rows, the same ones every time: the first ones of a file are often of one class."""
    if rows is None or rows >= len(dataset):
        return dataset
    if rows < 1:
        raise ValueError(f"{rows} rows are asked for: at least 1 is needed")
    chosen = np.random.default_rng(0).choice(len(dataset), rows, replace=False)
    return dataset.select(sorted(chosen.tolist()))


# ---- scores ----


def evaluate(
    source: str | Path | nn.Module,
    task: str | None = None,
    split: str | None = None,
    batch_size: int = 64,
    *,
    rows: int | None = None,
    max_length: int | None = MAX_LENGTH,
    processing_class: Any = None,
    revision: str | None = None,
    device: torch.device | str | None = None,
    **data: Any,
) -> dict[str, float]:
    """The metrics of a saved model on held-out rows, by name, as the trainers compute them (without `eval_`).

    source: a folder, a Hub id, or a module (moved, frozen, with its `processing_class`). split: None takes test where it
    is labelled, else validation; of MNLI's both, as matched_accuracy and mismatched_accuracy. rows: score on so many, drawn
    once. max_length: tokens a text is cut at, at most what the model has positions for. data: of `load_splits`.

    Raises OSError for a model that is not there, ValueError for label maps of model and data that do not match, for rows
    without labels and for weights that are missing.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
    parts = held_out(load_splits(task, **data), task, split)
    model = saved_model(source, revision)
    processing = processing_class or getattr(model, "processing_class", None)
    found: dict[str, float] = {}
    for prefix, part in parts.items():
        scores = score_rows(
            model, processing, drawn(part, rows), metrics_of(task, model), batch_size, max_length, device
        )
        found |= {f"{prefix}{name}": value for name, value in scores.items()}
    return found


def saved_model(source: str | Path | nn.Module, revision: str | None = None) -> ModelTeacher:
    """Asked, frozen and checked for missing weights as a teacher is. OSError where it is not there."""
    try:
        return ModelTeacher(source, view="", revision=revision)
    except OSError as error:  # says that it is no teacher
        raise OSError(str(error).replace("teacher", "model", 1)) from error


def metrics_of(task: str | None, model: ModelTeacher) -> tuple[str, ...]:
    """The task's own, where the model is of the task's kind."""
    kind, row = kind_of(model), TEXT_TASKS.get(task or "") or IMAGE_TASKS.get(task or "")
    same = row is not None and getattr(row, "problem_type", "single_label_classification") == kind
    return row.metrics if row is not None and same else METRICS[kind]


def kind_of(model: ModelTeacher) -> str:
    return problem_type_of(model.config) or "single_label_classification"


def score_rows(
    model: ModelTeacher,
    processing: Any,
    rows: Any,
    metrics: Sequence[str],
    batch_size: int = 64,
    max_length: int | None = MAX_LENGTH,
    device: torch.device | str | None = None,
) -> dict[str, float]:
    from transformers import EvalPrediction

    logits = logits_of(model, processing, rows, batch_size, max_length, device)
    labels = expected_labels(rows, model)
    return compute_metrics_for(metrics, kind_of(model))(EvalPrediction(predictions=logits, label_ids=labels))


def logits_of(
    model: ModelTeacher,
    processing: Any,
    rows: Any,
    batch_size: int = 64,
    max_length: int | None = MAX_LENGTH,
    device: torch.device | str | None = None,
) -> NDArray[Any]:
    """(rows, classes) in float64, in the order of the rows. Raises ValueError for rows that the model cannot read."""
    if device is None:
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    model.prepare(None, {"teacher"}, device or "cpu")
    columns = [name for name in ("text", "text_pair", *COLUMNS) if name in rows.column_names]
    if not columns:
        raise ValueError(f"the rows have no column text, image or pixels, only {', '.join(rows.column_names)}")
    texts = "text" in columns
    _refuse_other_processing(processing, texts, model.name)
    collator: Any = TextCollator(processing, cut_at(max_length, model)) if texts else ImageCollator(processing)
    return asked(model, rows.select_columns(columns), collator, batch_size, device)


def _refuse_other_processing(processing: Any, texts: bool, name: str) -> None:
    from transformers import BaseImageProcessor, PreTrainedTokenizerBase

    fits = isinstance(processing, PreTrainedTokenizerBase if texts else (BaseImageProcessor, PixelView))
    if not fits:
        rows, wanted = ("texts", "tokenizer") if texts else ("pictures", "image processor")
        raise ValueError(
            f"the rows are {rows}, and beside {name} lies no {wanted}: save it there, pass processing_class=..., or take a "
            "task of the model's kind"
        )


def cut_at(max_length: int | None, model: ModelTeacher) -> int | None:
    limits = [limit for limit in (max_length, positions_of(model.model)) if limit]
    return min(limits, default=None)


def positions_of(model: Any) -> int | None:
    """Tokens that a text model has positions for; None where that is not limited, or not known.

    RoBERTa and its kind number positions from behind the padding id, so that a table of 514 is for 512 tokens.
    """
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    return getattr(getattr(model, "config", None), "max_position_embeddings", None)


def expected_labels(rows: Any, model: ModelTeacher) -> NDArray[Any]:
    """In the order of the model's classes. Raises ValueError for rows without labels, and for other classes."""
    kind = kind_of(model)
    if kind == "single_label_classification":
        found = labels_of(rows, model.config)
        if found is None:
            raise ValueError("the rows have no labels to score by: name their column with --label_column")
        return np.where(found < 0, IGNORED, found)
    if "label" not in rows.column_names:
        raise ValueError(f"the rows have no labels to score by, only {', '.join(rows.column_names)}: --label_column")
    values = np.asarray(rows.with_format(None)["label"][:], dtype=np.float64)
    return values if kind == "regression" else values[:, _order(rows, model.config)]


def _order(rows: Any, config: Any) -> list[int]:
    from hfkd.data.text import label_names
    from hfkd.teachers.labels import matched

    ours, theirs = class_names(config), label_names(rows)
    named = ours is not None and theirs != [str(number) for number in range(len(theirs))]
    return matched(ours, theirs) if ours is not None and named else list(range(config.num_labels))
