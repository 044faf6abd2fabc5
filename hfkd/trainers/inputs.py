"""The collator that a processing class calls for, where none was given."""

from __future__ import annotations

from typing import Any

from transformers import BaseImageProcessor, PreTrainedTokenizerBase

from hfkd.data.collate import DistillationCollator
from hfkd.data.pixels import COLUMNS, ImageCollator, PixelView
from hfkd.data.rows import first_row


def collator_of(processing_class: Any, rows: Any) -> Any:
    """Text is padded; pictures become pixels, without augmentation. None where neither applies."""
    if isinstance(processing_class, PreTrainedTokenizerBase):
        return DistillationCollator(processing_class)
    if isinstance(processing_class, BaseImageProcessor) and shows_pictures(rows):
        return ImageCollator(processing_class)
    return None


def shows_pictures(rows: Any) -> bool:
    """Whether rows come with a picture, as they are or after a transform, which may make other columns of it."""
    if hasattr(rows, "column_names") and not set(COLUMNS) & set(rows.column_names or COLUMNS):
        return False
    row = first_row(rows)
    return hasattr(row, "keys") and "pixel_values" not in row and bool(set(COLUMNS) & set(row))


def refuse_dispatched_draws(collator: Any, rows: Any, processes: int, dispatched: bool | None) -> None:
    """What augmentation draws stays on the host as numpy, and one process cannot send it to the others.

    dispatched: accelerate's `dispatch_batches`, of which None means "for streams". Raises ValueError.
    """
    stream = not hasattr(rows, "__len__")
    if (
        processes > 1
        and getattr(collator, "augmentation", None) is not None
        and (dispatched or (dispatched is None and stream))
    ):
        raise ValueError(
            f"{processes} processes get their batches from the first one (accelerator_config dispatch_batches={dispatched}, "
            f"rows are {type(rows).__name__}), and augmentation is drawn where rows are read: pass "
            "accelerator_config={'dispatch_batches': False}, so that every process reads its own rows"
        )


def show_teacher(collator: Any, processing_class: Any) -> None:
    """The teacher reads texts with its own tokenizer, and images in its own size and normalisation."""
    if isinstance(collator, DistillationCollator) and isinstance(processing_class, PreTrainedTokenizerBase):
        collator.teacher_tokenizer = processing_class
    if isinstance(collator, ImageCollator) and isinstance(processing_class, BaseImageProcessor):
        collator.teacher_view = PixelView.of(processing_class)
