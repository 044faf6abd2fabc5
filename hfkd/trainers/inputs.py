"""The collator that a processing class calls for, where none was given."""

from __future__ import annotations

from typing import Any

from transformers import BaseImageProcessor, PreTrainedTokenizerBase

from hfkd.data.collate import DistillationCollator
from hfkd.data.pixels import COLUMNS, ImageCollator, PixelView


def collator_of(processing_class: Any, rows: Any) -> Any:
    """Text is padded; pictures become pixels, without augmentation. None where neither applies."""
    if isinstance(processing_class, PreTrainedTokenizerBase):
        return DistillationCollator(processing_class)
    holds_images = set(COLUMNS) & set(getattr(rows, "column_names", None) or ())
    if isinstance(processing_class, BaseImageProcessor) and holds_images:
        return ImageCollator(processing_class)
    return None


def show_teacher(collator: Any, processing_class: Any) -> None:
    """The teacher reads texts with its own tokenizer, and images in its own size and normalisation."""
    if isinstance(collator, DistillationCollator) and isinstance(processing_class, PreTrainedTokenizerBase):
        collator.teacher_tokenizer = processing_class
    if isinstance(collator, ImageCollator) and isinstance(processing_class, BaseImageProcessor):
        collator.teacher_view = PixelView.of(processing_class)
