"""Images with patches to hide, for ViT-MAE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from hfkd.data.pixels import ImageCollator


class MaskedImageCollator(ImageCollator):
    """Images and, for each, the order in which its patches are hidden, keyed by (seed, round, epoch, example_id).

    processor: an image processor of transformers or a PixelView; patch_size: the model's. There is no augmentation, as in
    the authors' code of the further pre-training stages: images are resized and normalised. How many patches are hidden
    is the model's business (mask_ratio).

    Returns what `ImageCollator` does and

        noise (batch, patches) float32      a permutation of 0/patches, 1/patches, ...; the lowest stay visible

    Raises ValueError for a size that patches do not divide, KeyError for rows without `example_id`.
    """

    view = "masked_image"

    def __init__(self, processor: Any, patch_size: int = 16, *, seed: int = 0):
        super().__init__(processor, seed=seed)
        height, width = self.student_view.size
        if patch_size < 1 or height % patch_size or width % patch_size:
            raise ValueError(
                f"images of {height} x {width} pixels cannot be cut into patches of {patch_size}: set the processor's size to a "
                "multiple of the model's patch_size"
            )
        self.patch_size = patch_size
        self.patches = (height // patch_size) * (width // patch_size)

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        # Ranks, not numbers from [0, 1): no ties, which devices break differently
        ranks = np.stack([self.generator(feature["example_id"]).permutation(self.patches) for feature in features])
        noise = ranks.astype(np.float32) / self.patches
        return {**super().__call__(features), "noise": torch.from_numpy(noise)}

    def for_evaluation(self) -> MaskedImageCollator:
        """It stays at round 0, epoch 0, so that losses of different epochs compare."""
        return type(self)(self.student_view, self.patch_size, seed=self.seed)

    def clean(self) -> ImageCollator:
        """The same images with nothing drawn: what a teacher of whole images is asked about."""
        return ImageCollator(self.student_view)

    def settings(self) -> dict[str, Any]:
        view = self.student_view
        return {"image_size": list(view.size), "image_mean": list(view.mean), "image_std": list(view.std)}
