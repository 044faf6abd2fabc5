"""Damaged test images, at one fixed severity each: noise, blur, JPEG and contrast, as in ImageNet-C and CIFAR-10-C.

After Hendrycks and Dietterich 2019 (arXiv 1903.12261); the values lie within theirs as recalled, and were not verified.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Each with its number, on the pixels' scale [0, 1]: standard deviation, sigma in pixels, quality, factor
SEVERITIES: dict[str, float] = {"noise": 0.26, "blur": 1.0, "jpeg": 10, "contrast": 0.3}
SHOWN = {
    "noise": "Gaussian noise, std {:g}",
    "blur": "Gaussian blur, sigma {:g} px",
    "jpeg": "JPEG, quality {:g}",
    "contrast": "contrast x {:g}",
}


def corrupted_rows(rows: Any, size: tuple[int, int], kind: str) -> Any:
    """The same rows (pixels, label, example_id) with their pixels damaged; the same damage in every call.

    rows: as `hfkd.data.images.decoded` returns them, of `size` (height, width).
    """
    from datasets import Dataset

    stored = np.stack([np.frombuffer(row, np.uint8).reshape(*size, 3) for row in rows["pixels"]])
    changed = corrupted(stored, kind)
    columns = {name: rows[name][:] for name in rows.column_names if name != "pixels"}
    features = rows.features.copy()
    return Dataset.from_dict({**columns, "pixels": [one.tobytes() for one in changed]}, features=features)


def corrupted(pixels: np.ndarray, kind: str) -> np.ndarray:
    """uint8 (rows, height, width, 3) -> the same shape. Raises ValueError where kornia is missing."""
    if kind == "jpeg":
        return np.stack([as_jpeg(one, int(SEVERITIES[kind])) for one in pixels])
    shown = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()).float() / 255
    changed = {"noise": noisy, "blur": blurred, "contrast": flattened}[kind](shown, SEVERITIES[kind])
    return (changed.clamp(0, 1) * 255).round().byte().numpy().transpose(0, 2, 3, 1)


def as_jpeg(pixels: np.ndarray, quality: int) -> np.ndarray:
    """By Pillow: kornia's codec is differentiable, and no files are written with it."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="JPEG", quality=quality)
    return np.asarray(Image.open(file))


def noisy(pixels: Tensor, deviation: float) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return pixels + deviation * torch.randn(pixels.shape, generator=generator)


def blurred(pixels: Tensor, sigma: float) -> Tensor:
    reach = min(2 * int(np.ceil(3 * sigma)) + 1, *(2 * side - 1 for side in pixels.shape[-2:]))
    return of_kornia().filters.gaussian_blur2d(pixels, (reach, reach), (sigma, sigma))


def flattened(pixels: Tensor, factor: float) -> Tensor:
    return of_kornia().enhance.adjust_contrast_with_mean_subtraction(pixels, factor)


def of_kornia() -> Any:
    try:
        import kornia
    except ImportError as error:
        raise ValueError(
            "corrupted test images need kornia: pip install 'hfkd[vision]', or leave them out with --corruption_rows 0"
        ) from error
    return kornia


def named(kind: str) -> str:
    return SHOWN[kind].format(SEVERITIES[kind])
