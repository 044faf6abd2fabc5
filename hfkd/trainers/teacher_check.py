"""What is checked about a teacher before the first step: a wrong teacher costs a whole run and looks like "KD does not help"."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import BaseImageProcessor, DataCollatorWithPadding, PreTrainedTokenizerBase
from transformers.utils import logging

from hfkd.data.pixels import PixelView
from hfkd.data.text import same_tokenizer
from hfkd.functional import labelled_units
from hfkd.outputs import Batch, TeacherOutput

logger = logging.get_logger(__name__)
SLICE = 256  # rows the teacher is scored on


def refuse_bad_logits(answer: TeacherOutput, batch: Batch) -> None:
    """Raise ValueError with the row ids where the teacher's logits are not finite. Makes the host wait for the device."""
    if answer.logits is None or bool(torch.isfinite(answer.logits).all()):
        return
    bad = ~torch.isfinite(answer.logits.flatten(1)).all(1)
    rows = batch["example_id"][bad] if "example_id" in batch else bad.nonzero().flatten()
    what = "examples" if "example_id" in batch else "rows of this batch:"
    raise ValueError(
        f"the teacher's logits are NaN or infinite for {what} {rows[:10].tolist()} ({int(bad.sum())} of {len(bad)}): "
        "try teacher_dtype=float32, and look at these inputs"
    )


def refuse_wrong_view(
    teacher: Any, processing_class: Any, collator: Any, rows: Any, student_config: Any, token_by_token: bool
) -> None:
    """Two tokenizers need two views of a text, and a collator that pads both. Raises ValueError otherwise.

    rows: the data set, with `column_names`. token_by_token: the objective compares positions, so both need one tokenizer.
    """
    columns = set(rows.column_names)
    own_view = any(column.startswith("teacher_") and column.endswith("_ids") for column in columns)
    if own_view and type(collator) is DataCollatorWithPadding:
        raise ValueError(
            "DataCollatorWithPadding pads the student's columns only, and the rows have teacher_input_ids: leave "
            "data_collator out, or pass hfkd.data.collate.DistillationCollator(tokenizer, teacher_tokenizer)"
        )
    if own_view and token_by_token:
        raise ValueError(
            "the rows have teacher_input_ids, so teacher and student see other tokens at the same position, and the objective "
            "compares position by position: take a teacher with the student's tokenizer, or an objective of logits"
        )
    if own_view or "input_ids" not in columns:
        return
    theirs, ours = getattr(teacher, "processing_class", None), processing_class
    if isinstance(theirs, PreTrainedTokenizerBase) and isinstance(ours, PreTrainedTokenizerBase):
        if not same_tokenizer(ours, theirs, pair=holds_pairs(rows, ours)):
            raise ValueError(
                f"the student's tokenizer ({type(ours).__name__}, {len(ours)} tokens) and the teacher's "
                f"({type(theirs).__name__}, {len(theirs)}) differ, and the rows have no teacher_input_ids: tokenize with "
                "hfkd.data.text.tokenize(..., teacher_tokenizer=...)"
            )
        return
    sizes = getattr(student_config, "vocab_size", None), getattr(teacher.config, "vocab_size", None)
    if None not in sizes and sizes[0] != sizes[1]:
        raise ValueError(
            f"the student's vocabulary has {sizes[0]} tokens, the teacher's {sizes[1]}, and the rows have no "
            "teacher_input_ids: for classification tokenize with hfkd.data.text.tokenize(..., teacher_tokenizer=...); "
            "language-model heads need one vocabulary: choose a teacher with the student's tokenizer"
        )


def refuse_other_pixels(teacher: Any, processing_class: Any, collator: Any, rows: Any) -> None:
    """Two normalisations or sizes need two views of an image. Raises ValueError where the teacher would read the student's."""
    theirs, ours = getattr(teacher, "processing_class", None), getattr(collator, "student_view", None)
    columns = getattr(rows, "column_names", None) or ()  # a torch data set names none
    if not isinstance(theirs, BaseImageProcessor) or "teacher_pixel_values" in columns:
        return
    if ours is None and isinstance(processing_class, BaseImageProcessor) and "pixel_values" in columns:
        ours = PixelView.of(processing_class)
    if ours is None:
        return
    shown, wanted = getattr(collator, "teacher_view", None) or ours, PixelView.of(theirs)
    if shown != wanted:
        exchanged = "" if shown.bgr == wanted.bgr else ", red and blue exchanged"
        raise ValueError(
            f"the teacher was trained on images of size {wanted.size}, mean {wanted.mean}, std {wanted.std}, and would see "
            f"{shown.size}, {shown.mean}, {shown.std}{exchanged}: pass data_collator=ImageCollator(processor, "
            "teacher.processing_class)"
        )


def holds_pairs(rows: Any, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the texts are pairs: only there do tokenizers differ that have token types from those that have none."""
    if "token_type_ids" in rows.column_names or not len(rows):
        return False  # the types are there for whoever reads them
    first = rows.select_columns("input_ids")[:32]["input_ids"]
    return any(list(ids).count(tokenizer.sep_token_id) > 1 for ids in first)


def refuse_other_problem(student: str, teacher: str | None) -> None:
    if teacher is not None and teacher != student:
        raise ValueError(
            f"the student's problem_type is {student!r}, the teacher's {teacher!r}: a sigmoid of one and a softmax of the other "
            "do not compare; set config.problem_type of both to what the labels are"
        )


def refuse_stale_view(teacher: Any, collator: Any) -> None:
    """Cached answers belong to one view of the inputs. Raises ValueError where the collator makes another."""
    cached = getattr(teacher, "view", None) if not hasattr(teacher, "model") else None
    view = getattr(collator, "view", "plain")
    if cached is not None and cached != view:
        raise ValueError(
            f"the teacher's answers were cached for the view {cached!r}, and the collator makes {view!r}: random masks and "
            "augmentation change the input, so its cached answer would be wrong; use the collator of the cache, or a "
            "ModelTeacher"
        )


def refuse_too_few_rows(rows: Any, args: Any) -> None:
    """Raises ValueError where there would be no batch: the stock Trainer ends after 0 steps and saves what it was given."""
    if not hasattr(rows, "__len__"):
        return
    if not len(rows):
        raise ValueError("train_dataset has no rows: nothing to learn from (were all of them filtered out?)")
    batch = args.train_batch_size
    if args.dataloader_drop_last and len(rows) < batch:
        raise ValueError(
            f"train_dataset has {len(rows)} rows, a batch {batch}, and dataloader_drop_last leaves out what fills none: nothing "
            "would be learned; set it to False, or take smaller batches"
        )


def score(logits_of_batches: list[Tensor], batches: list[dict[str, Tensor]], problem_type: str) -> tuple[float, float]:
    """Score of one side on labelled batches, and what a constant answer reaches: accuracy and the share of the most
    frequent class; for regression minus the mean squared error, and minus the labels' variance."""
    right, labels = [], []
    for logits, batch in zip(logits_of_batches, batches, strict=True):
        units = labelled_units(batch["labels"], problem_type)
        if problem_type == "single_label_classification":
            right.append((logits.argmax(-1) == batch["labels"])[units])
            labels.append(batch["labels"][units])
        else:
            right.append(logits.float())
            labels.append(batch["labels"].float().reshape(logits.shape))
    answers, expected = torch.cat(right), torch.cat(labels)
    if problem_type == "single_label_classification":
        return float(answers.float().mean()), float(expected.bincount().max() / len(expected))
    if problem_type == "regression":
        return -float((answers - expected).square().mean()), -float(expected.var(unbiased=False))
    frequent = torch.maximum(expected.mean(0), 1 - expected.mean(0)).mean()
    return float(((answers > 0) == (expected > 0.5)).float().mean()), float(frequent)


def any_labelled(batches: list[dict[str, Tensor]], problem_type: str) -> bool:
    return any(bool(labelled_units(batch["labels"], problem_type).any()) for batch in batches)


def report(
    teacher: tuple[float, float], student: tuple[float, float], rows: int, problem_type: str
) -> dict[str, float]:
    """Say the three figures; warn where the teacher is no better than a constant answer."""
    found = {"teacher": teacher[0], "student": student[0], "chance": teacher[1]}
    name = "negative squared error" if problem_type == "regression" else "accuracy"
    line = (
        f"{name} on {rows} rows before training: teacher {teacher[0]:.4f}, student {student[0]:.4f}, a constant answer "
        f"{teacher[1]:.4f}"
    )
    if teacher[0] <= teacher[1]:
        logger.warning(
            f"{line}: the teacher knows no more than a constant answer. Are its weights loaded, its labels in the "
            "student's order, its inputs its own?"
        )
    else:
        logger.info(line)
    return found


@torch.no_grad()
def logits_in_eval_mode(model: nn.Module, views: list[dict[str, Any]]) -> list[Tensor]:
    modes = [(module, module.training) for module in model.modules()]  # some may be kept in eval mode on purpose
    try:
        return [model.eval()(**view).logits for view in views]
    finally:
        for module, mode in modes:
            module.training = mode
            reshard: Any = getattr(module, "reshard", None)
            if reshard is not None:  # FSDP2 leaves the outermost weights whole: an optimizer made now would hold copies
                reshard()


def refuse_other_shapes(student: list[Tensor], teacher: list[Tensor]) -> None:
    for ours, theirs in zip(student, teacher, strict=True):
        if ours.shape != theirs.shape:
            raise ValueError(
                f"the student's logits are {tuple(ours.shape)}, the teacher's {tuple(theirs.shape)}: the teacher must have a "
                "head for the student's labels; train one with recipes/train_teacher.py"
            )
