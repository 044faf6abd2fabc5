"""What rounds over texts and rounds over images do differently: two rows of one table."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import BaseImageProcessor

from hfkd.data.collate import MaskedLMCollator
from hfkd.data.masked_images import MaskedImageCollator
from hfkd.data.pixels import COLUMNS, ImageCollator
from hfkd.fingerprint import content_hash
from hfkd.models.two_view_mae import CleanEncoder, count_patches, refuse_wrong_patches
from hfkd.objectives.masked_images import MaskedImages, SelfDistillImages
from hfkd.objectives.objective import Objective
from hfkd.objectives.self_distill import MaskedLM, SelfDistill
from hfkd.teachers import ModelTeacher, Teacher
from hfkd.teachers.model import load_named_architecture


@dataclass(frozen=True)
class RoundKind:
    """One row.

    masked: the objective of round 0, which is also what eval_loss reports.
    distilled: the objective of the rounds after it, from the arguments.
    collator: from the processing class, the student's configuration and the seed.
    before: what the round before gives the next one, from its folder and the objective: the teacher (None where it is
    not asked), and inputs of the student's forward that the batch does not have.
    views: inputs that only a two-view forward takes; it gets those that the objective reads.
    label_names: columns of the batch that the evaluation keeps beside the predictions.
    settings: of collator and student's configuration, what a resumed run may not change.
    check: raises ValueError where arguments, objective, collator, configuration and rows do not fit.
    pipeline_tag: of the model card.
    """

    masked: type[Objective]
    distilled: Callable[[Any], Objective]
    collator: Callable[[Any, Any, int], Any]
    before: Callable[[Path, Objective], tuple[Teacher | None, dict[str, Any]]]
    views: frozenset[str]
    label_names: tuple[str, ...]
    settings: Callable[[Any, Any], dict[str, Any]]
    check: Callable[[Any, Any, Any, Any, Any], None]
    pipeline_tag: str


def kind_of(data_collator: Any, processing_class: Any) -> RoundKind:
    shown = processing_class if data_collator is None else data_collator
    return IMAGES if isinstance(shown, BaseImageProcessor | ImageCollator) else TEXTS


# ---- texts ----


def _text_before(folder: Path, objective: Objective) -> tuple[Teacher | None, dict[str, Any]]:
    encoder: Any = load_named_architecture(str(folder)).base_model
    return ModelTeacher(encoder, view="clean_"), {}


def _text_settings(collator: Any, config: Any) -> dict[str, Any]:
    return {name: getattr(collator, name, None) for name in ("mlm_probability", "max_length")}


def _check_texts(args: Any, objective: Any, collator: Any, config: Any, rows: Any) -> None:
    if args.matching != "features" or args.cache_teacher_features:
        raise ValueError(
            f"matching={args.matching!r} and cache_teacher_features={args.cache_teacher_features} are for images: rounds over "
            "texts match the features of a teacher that is asked in every step"
        )


TEXTS = RoundKind(
    masked=MaskedLM,
    distilled=lambda args: SelfDistill(args.feature, not args.no_pretrain_loss),
    collator=lambda tokenizer, config, seed: MaskedLMCollator(tokenizer, seed=seed),
    before=_text_before,
    views=frozenset({"masked_positions", "clean_input_ids"}),
    label_names=("masked_labels",),
    settings=_text_settings,
    check=_check_texts,
    pipeline_tag="fill-mask",
)

# ---- images ----


def _image_before(folder: Path, objective: Objective) -> tuple[Teacher | None, dict[str, Any]]:
    model: Any = load_named_architecture(str(folder))
    if "features" in objective.needs:
        return ModelTeacher(CleanEncoder(model.base_model), view=""), {"clean": True}
    if "anchor" in objective.needs:
        return None, {"anchor": model.base_model.state_dict()}
    return ModelTeacher(model, view=""), {}


def _image_settings(collator: Any, config: Any) -> dict[str, Any]:
    of_model = ("mask_ratio", "norm_pix_loss", "patch_size")
    return {**collator.settings(), **{name: getattr(config, name) for name in of_model}}


def _check_images(args: Any, objective: Any, collator: Any, config: Any, rows: Any) -> None:
    if not isinstance(collator, MaskedImageCollator):
        raise ValueError(
            f"{type(collator).__name__} draws no patches to hide: leave data_collator out, or pass "
            "hfkd.data.masked_images.MaskedImageCollator"
        )
    refuse_wrong_patches(config)  # it may have been changed since the model was made
    size, wanted = collator.student_view.size, (config.image_size, config.image_size)
    if size != wanted or collator.patches != count_patches(config):
        raise ValueError(
            f"the collator makes images of {size} in {collator.patches} patches, the model reads {wanted} in "
            f"{count_patches(config)}: set the processor's size, and MaskedImageCollator's patch_size={config.patch_size}"
        )
    columns = getattr(rows, "column_names", None) or ()
    if not set(COLUMNS) & set(columns):
        raise ValueError(
            f"rounds over images need a datasets.Dataset with a column {' or '.join(COLUMNS)}, got {type(rows).__name__} with "
            f"{', '.join(columns) or 'no columns'}"
        )
    if args.cache_teacher_features and not _one_vector_an_image(objective):
        raise ValueError(
            "cache_teacher_features keeps one vector an image (feature cls or mean, matching features), and "
            f"{type(objective).__name__}({objective.settings()}) wants more of its teacher: leave it off"
        )


def _one_vector_an_image(objective: Any) -> bool:
    return "features" in objective.needs and getattr(objective, "feature", "tokens") != "tokens"


IMAGES = RoundKind(
    masked=MaskedImages,
    distilled=lambda args: SelfDistillImages(args.feature, not args.no_pretrain_loss, args.matching),
    collator=lambda processor, config, seed: MaskedImageCollator(processor, config.patch_size, seed=seed),
    before=_image_before,
    views=frozenset({"noise", "clean"}),
    label_names=("example_id",),
    settings=_image_settings,
    check=_check_images,
    pipeline_tag="image-feature-extraction",
)


def rows_hash(dataset: Any) -> str:
    """sha256 over images or token ids in row order. `datasets`' own fingerprint hashes file times, so it changes by itself."""
    names = getattr(dataset, "column_names", None)
    if images := [name for name in COLUMNS if name in (names or ())]:
        return content_hash(dataset, images)[0]
    digest = hashlib.sha256()
    rows = (row["input_ids"] for row in dataset) if names is None else dataset["input_ids"]
    for ids in rows:
        digest.update(np.asarray([len(ids), *ids], dtype=np.int64).data)
    return digest.hexdigest()
