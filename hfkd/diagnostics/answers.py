"""The logits of a student and of its teacher on the same rows, each side reading them with a tokenizer or image processor
of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hfkd.data.collate import TOKEN_COLUMNS, DistillationCollator
from hfkd.data.pixels import COLUMNS, ImageCollator
from hfkd.fingerprint import processing_hash
from hfkd.teachers import CachedTeacher, ModelTeacher, Teacher
from hfkd.teachers.model import image_processor_of, public_name, tokenizer_of

Collator = Callable[[list[dict[str, Any]]], Mapping[str, Any]]
UNLIMITED = 10**6  # a tokenizer that does not know how many tokens its model takes says 10^30


class Pair:
    """A student and its teacher. Made and asked inside `left_as_found`.

    student: a module, a folder or a Hub id. teacher: one of these, or a Teacher. processing_class,
    teacher_processing_class: tokenizers or image processors; None: what lies beside the weights, for the teacher else the
    student's. The teacher answers in the student's order of classes.

    Raises ValueError for classes that do not match, and where two tokenizers would have to read one column of tokens.
    """

    def __init__(
        self,
        student: nn.Module | str | Path,
        teacher: Teacher | nn.Module | str | Path,
        processing_class: Any = None,
        teacher_processing_class: Any = None,
        device: torch.device | str | None = None,
    ):
        try:
            self.student = ModelTeacher(student, view="")
        except OSError as error:  # says that it is no teacher
            raise OSError(str(error).replace("teacher", "student", 1)) from error
        self.teacher = teacher if isinstance(teacher, Teacher) else ModelTeacher(teacher)
        self.ours = _processing(student, processing_class)
        self.theirs = teacher_processing_class or getattr(self.teacher, "processing_class", None)
        self.names = public_name(student), name_of(self.teacher)
        self.device = device or _device_of(student)
        self.student.to(self.device)
        self.teacher.prepare(self.student.model, {"teacher"}, self.device)
        self.teacher.align_labels(self.student.config)
        self._refuse_strange_vocabulary()

    def _refuse_strange_vocabulary(self) -> None:
        sizes = [getattr(side.config, "vocab_size", None) for side in (self.student, self.teacher)]
        if self.theirs is None and None not in sizes and sizes[0] != sizes[1]:
            raise ValueError(
                f"the student's vocabulary has {sizes[0]} tokens, the teacher's {sizes[1]}, and the teacher came without a "
                "tokenizer: pass teacher_processing_class=..."
            )

    def logits(
        self, dataset: Any, collator: Collator | None = None, batch_size: int = 64, max_length: int | None = None
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """Both sides' logits, each (rows, classes) in float64, in the order of the rows."""
        found = []
        for side, own in ((self.student, self.ours), (self.teacher, self.theirs or self.ours)):
            kept, chosen = self._view(dataset, side, own, collator, max_length)
            found.append(asked(side, kept, chosen, batch_size, self.device))
        return found[0], found[1]

    def _view(
        self, dataset: Any, side: Teacher, own: Any, collator: Collator | None, max_length: int | None
    ) -> tuple[Any, Collator]:
        """The rows that one side reads, and what makes a batch of them."""
        from transformers import default_data_collator

        columns = dataset.column_names
        if collator is not None:
            return dataset, collator
        if isinstance(side, CachedTeacher):
            return dataset.select_columns(list(side.columns)), default_data_collator
        if "input_ids" in columns:
            return self._tokens(dataset, side)
        if "text" in columns:
            pair = [name for name in ("text_pair",) if name in columns]
            return dataset.select_columns(["text", *pair]), TextCollator(_present(own, "texts"), max_length)
        if pictures := [name for name in COLUMNS if name in columns]:
            theirs = self.theirs if "pixels" in pictures else None  # decoded at the larger of both sizes
            ours = self.ours if "pixels" in pictures else own
            return dataset.select_columns(pictures), ImageCollator(_present(ours, "pictures"), theirs)
        if not side.reads(columns):
            raise ValueError(
                f"the rows have {', '.join(columns)}, and the models read texts (text), pictures (image), input_ids, "
                "pixels or pixel_values: rename a column, or pass collator=..."
            )
        return dataset.select_columns(list(side.reads(columns))), default_data_collator

    def _tokens(self, dataset: Any, side: Teacher) -> tuple[Any, Collator]:
        """Rows that are tokens already: with one tokenizer shared, with two in columns of their own."""
        columns = dataset.column_names
        differ = self.theirs is not None and processing_hash(self.theirs) != processing_hash(self.ours)
        if differ and "teacher_input_ids" not in columns:
            raise ValueError(
                f"the student's tokenizer ({type(self.ours).__name__}) and the teacher's ({type(self.theirs).__name__}) differ, "
                "and the rows have no teacher_input_ids: pass rows with a column text, which each side reads in its own way, "
                "or tokenize with hfkd.data.text.tokenize(..., teacher_tokenizer=...)"
            )
        kept = {*side.reads(columns), *(name for name in (*TOKEN_COLUMNS, "example_id") if name in columns)}
        return dataset.select_columns(sorted(kept)), DistillationCollator(_present(self.ours, "tokens"), self.theirs)


class TextCollator:
    """Rows with `text` (and `text_pair`) to what an encoder reads, padded to the longest of the batch."""

    def __init__(self, tokenizer: Any, max_length: int | None = None):
        own = getattr(tokenizer, "model_max_length", UNLIMITED)
        self.tokenizer = tokenizer
        self.max_length = max_length or (own if own < UNLIMITED else None)

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        pairs = [feature["text_pair"] for feature in features] if "text_pair" in features[0] else None
        return self.tokenizer(
            [feature["text"] for feature in features],
            pairs,
            truncation=self.max_length is not None,
            max_length=self.max_length,
            padding=True,
            return_token_type_ids="token_type_ids" in self.tokenizer.model_input_names,
            return_tensors="pt",
        )


@contextmanager
def left_as_found(*models: Any) -> Iterator[None]:
    """Asking freezes a model; afterwards every training flag and requires_grad is what it was."""
    modules = [model for model in models if isinstance(model, nn.Module)]
    modes = [(part, part.training) for module in modules for part in module.modules()]
    trained = [(weight, weight.requires_grad) for module in modules for weight in module.parameters()]
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
        for weight, flag in trained:
            weight.requires_grad = flag


def refuse_bad_rows(logits: NDArray[Any], whose: str, example_ids: Sequence[Any]) -> None:
    """Raises ValueError, naming the rows, for logits that are NaN or infinite."""
    bad = np.flatnonzero(~np.isfinite(logits).all(-1))
    if len(bad):
        rows = [example_ids[int(row)] for row in bad[:10]]
        raise ValueError(
            f"the {whose}'s logits are NaN or infinite for examples {rows} ({len(bad)} of {len(logits)}): look at these "
            "inputs, and load the model in float32"
        )


def asked(side: Teacher, rows: Any, collator: Collator, batch_size: int, device: Any) -> NDArray[Any]:
    """Longest rows first, so that neighbours need little padding and too little memory shows at once."""
    order, found = _by_length(rows), []
    for start in range(0, len(order), batch_size):
        columns = rows[order[start : start + batch_size].tolist()]
        features = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        batch = {name: _moved(value, device) for name, value in collator(features).items()}
        answer = side(collator.on_device(batch) if hasattr(collator, "on_device") else batch)
        if answer.logits is None or answer.logits.dim() != 2:
            shape = None if answer.logits is None else tuple(answer.logits.shape)
            raise ValueError(
                f"{type(side).__name__} answers logits of shape {shape}, and (rows, classes) is compared: of one label a row; an "
                "ensemble takes combine='mean' or 'logits'"
            )
        found.append(answer.logits.double().cpu().numpy())
    stacked = np.concatenate(found)
    in_order = np.empty_like(stacked)
    in_order[order] = stacked
    return in_order


def _by_length(rows: Any) -> NDArray[Any]:
    name = next((name for name in ("input_ids", "text") if name in rows.column_names), None)
    if name is None:
        return np.arange(len(rows))
    return np.argsort([-len(value) for value in rows.select_columns(name).with_format(None)[name]], kind="stable")


def _moved(value: Any, device: Any) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _processing(model: Any, given: Any) -> Any:
    if given is not None or isinstance(model, nn.Module):
        return given
    return tokenizer_of(str(model)) or image_processor_of(str(model))


def _present(processing_class: Any, what: str) -> Any:
    if processing_class is None:
        raise ValueError(
            f"the rows are {what}, and the model came without a tokenizer or image processor: pass processing_class=... (and "
            "teacher_processing_class=... where the teacher's is another)"
        )
    return processing_class


def name_of(teacher: Teacher) -> str:
    facts = teacher.facts()
    members = [str(member["name"]) for member in facts["members"] if member.get("name")]
    return str(facts["name"] or (f"{facts['kind']} of {', '.join(members)}" if members else facts["kind"]))


def _device_of(model: Any) -> Any:
    weight = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    if weight is not None:
        return weight.device
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
