"""What masked auto-encoders see and what they guess, as pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hfkd.data.masked_images import MaskedImageCollator
from hfkd.diagnostics import plots
from hfkd.models.two_view import two_view_model
from hfkd.objectives.masked_images import patches_of

SHOWN = 6
HIDDEN = 0.5  # grey, on the scale of pixels


def draw_reconstructions(stages: Mapping[str, Path], rows: Any, processor: Any, path: Path) -> None:
    """The same images with the same patches hidden, as the model of every stage fills them in; CPU, a few images."""
    models = {stage: two_view_model(str(folder)).eval() for stage, folder in stages.items()}
    collator = MaskedImageCollator(processor, next(iter(models.values())).config.patch_size)
    places = np.linspace(0, len(rows) - 1, min(SHOWN, len(rows))).astype(int)
    columns = [name for name in (*collator.columns, "example_id") if name in rows.column_names]
    batch = collator.on_device(collator([rows.select_columns(columns)[int(place)] for place in places]))
    pictures = {}
    for stage, model in models.items():
        seen, filled = reconstruction(model, batch["pixel_values"], batch["noise"])
        if not pictures:
            pictures["image"], pictures["masked"] = batch["pixel_values"], seen
        pictures[stage] = filled
    view = collator.student_view
    shown = {name: as_pictures(values, view.mean, view.std) for name, values in pictures.items()}
    shown["masked"] = np.where(np.isnan(shown["masked"]), HIDDEN, shown["masked"])
    plots.reconstructions(shown, path)


@torch.no_grad()
def reconstruction(model: Any, pixel_values: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """The images with nan where patches are hidden, and with the model's guess there. All (batch, channels, height, width).

    A model of normalised patches guesses each patch up to its mean and deviation, which are taken from the hidden patch
    itself, as in the figures of MAE (He et al. 2021): brightness and contrast of a guess say nothing about the model.
    """
    output = model(pixel_values, noise=noise)
    patches = patches_of(pixel_values, model.config.patch_size)
    guess = output.logits
    if model.config.norm_pix_loss:
        guess = guess * (patches.var(-1, keepdim=True) + 1e-6).sqrt() + patches.mean(-1, keepdim=True)
    hidden = output.mask[..., None].bool()
    seen, filled = (torch.where(hidden, other, patches) for other in (torch.full_like(patches, torch.nan), guess))
    size = tuple(pixel_values.shape[-2:])
    return model.unpatchify(seen, size), model.unpatchify(filled, size)


def as_pictures(pixel_values: Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Back from the model's scale to (batch, height, width, channels) in [0, 1]."""
    values = pixel_values.permute(0, 2, 3, 1).numpy() * np.asarray(std) + np.asarray(mean)
    return np.clip(values, 0.0, 1.0)
