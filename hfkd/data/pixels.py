"""Images for student and teacher: one set of pixels a batch, shown to each side in its own size and normalisation.

The collator brings every image to one size (the canvas) as bytes and draws what is random about it. Everything else
happens on the device, once for the whole batch: the augmentation that both sides see, and each side's normalisation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hfkd.data.collate import KeyedCollator

if TYPE_CHECKING:
    from PIL.Image import Image

    from hfkd.data.augment import Augmentation

COLUMNS = (
    "image",
    "pixels",
)  # of a data set: pictures, or bytes and uint8 arrays (height, width, 3) of the canvas's size
BILINEAR = 2  # as PIL counts


@dataclass(frozen=True)
class PixelView:
    """What one model wants to see: height and width, mean and deviation of each channel on the scale [0, 1].

    resized: what images are brought to before the centre is cut out, (height, width), or one number for the shorter
    edge. resample: PIL's number of the filter. Neither changes how two views of the same pixels compare.
    """

    size: tuple[int, int]
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    resized: tuple[int, int] | int | None = field(default=None, compare=False)
    resample: int = field(default=BILINEAR, compare=False)

    def __post_init__(self) -> None:
        if min(self.size) < 1 or len(self.size) != 2:
            raise ValueError(f"size is (height, width), each 1 or more, got {self.size}")
        if len(self.mean) != 3 or len(self.std) != 3 or not min(self.std) > 0:
            raise ValueError(
                f"mean and std are three numbers, one a channel, std above 0, got {self.mean} and {self.std}: images are "
                "shown in RGB; give a model for grey images a convolution over three channels"
            )

    @classmethod
    def of(cls, processor: Any) -> PixelView:
        """What an image processor of transformers does. Raises ValueError where it does not name one size."""
        size, crop = sizes_of(getattr(processor, "size", None)), sizes_of(getattr(processor, "crop_size", None))
        if not getattr(processor, "do_resize", True):
            size = None
        if not getattr(processor, "do_center_crop", False):
            crop = None
        final = crop or size
        if final is None:
            raise ValueError(
                f"{type(processor).__name__} names no size (size={getattr(processor, 'size', None)}, do_resize="
                f"{getattr(processor, 'do_resize', None)}): images of one batch must have one; set do_resize and size"
            )
        # Factors of a processor that does not rescale are on the scale of bytes
        scale = 255 * getattr(processor, "rescale_factor", 1 / 255) if getattr(processor, "do_rescale", True) else 255.0
        normalised = getattr(processor, "do_normalize", True)
        mean, std = (processor.image_mean, processor.image_std) if normalised else ((0.0,) * 3, (1.0,) * 3)
        return cls(
            (final, final) if isinstance(final, int) else final,
            tuple(value / scale for value in three(mean)),
            tuple(value / scale for value in three(std)),
            size or final,
            int(getattr(processor, "resample", None) or BILINEAR),
        )

    def __call__(self, pixels: Tensor) -> Tensor:
        """(batch, 3, height, width) on the scale [0, 1], of any size, to what the model reads."""
        if tuple(pixels.shape[-2:]) != self.size:
            pixels = F.interpolate(pixels, self.size, mode="bilinear", antialias=True, align_corners=False)
        gain = torch.tensor([1 / std for std in self.std], dtype=pixels.dtype)
        shift = torch.tensor([-mean / std for mean, std in zip(self.mean, self.std, strict=True)], dtype=pixels.dtype)
        gain, shift = (value[:, None, None].to(pixels.device, non_blocking=True) for value in (gain, shift))
        return torch.addcmul(shift, pixels, gain)

    def fit(self, image: Image) -> np.ndarray:
        """A picture as uint8 (height, width, 3): resized as the processor does, then its centre."""
        from hfkd.data.images import as_rgb

        image = as_rgb(image)
        height, width = self.size
        target = self.size if self.resized is None else self.resized
        if isinstance(target, int):
            shorter = min(image.size)
            target = (round(image.height * target / shorter), round(image.width * target / shorter))
        if (image.height, image.width) != target:
            image = image.resize((target[1], target[0]), resample=self.resample)
        if target != self.size:
            top, left = (target[0] - height) // 2, (target[1] - width) // 2
            image = image.crop((left, top, left + width, top + height))
        return np.asarray(image)


def sizes_of(size: Any) -> tuple[int, int] | int | None:
    """(height, width), or the shorter edge."""
    if size is None or isinstance(size, int):
        return size
    if "height" in size and "width" in size:
        return int(size["height"]), int(size["width"])
    return int(size["shortest_edge"]) if "shortest_edge" in size else None


def three(values: Any) -> tuple[float, ...]:
    values = tuple(values) if isinstance(values, Sequence) else (values,)
    return values * 3 if len(values) == 1 else values


class ImageCollator(KeyedCollator):
    """Pictures (`image`) or decoded rows (`pixels`) to batches that two models can read.

    processor, teacher_processor: an image processor of transformers or a PixelView; without the second both sides see
    the same. augmentation: what is drawn for each example, keyed by (seed, round, epoch, example_id). num_labels: needed
    by mixup and cutmix, whose labels are probabilities.

    Returns  pixels (batch, 3, height, width) uint8, labels (batch,), example_id and every other column of numbers, and,
    with an augmentation, draws (batch, numbers), a numpy array. The trainer then calls `on_device`, which gives
    pixel_values (batch, 3, height, width), teacher_pixel_values where the teacher's view is another, and with mixup or
    cutmix labels (batch, num_labels).

    Raises ValueError for rows without an image and for decoded rows of another size, KeyError for rows without
    `example_id` when it augments.
    """

    columns = COLUMNS

    def __init__(
        self,
        processor: Any,
        teacher_processor: Any = None,
        augmentation: Augmentation | None = None,
        *,
        num_labels: int | None = None,
        seed: int = 0,
    ):
        super().__init__(seed)
        self.student_view = view_of(processor)
        self.teacher_view = None if teacher_processor is None else view_of(teacher_processor)
        self.augmentation = augmentation
        self.num_labels = num_labels
        if augmentation is not None and augmentation.mixes and num_labels is None:
            raise ValueError("mixup and cutmix make labels that are probabilities: pass num_labels=...")

    @property
    def view(self) -> str:  # type: ignore[override]
        return "plain" if self.augmentation is None else "augmented"

    @property
    def canvas(self) -> PixelView:
        """The larger of the two views: images are brought to its size, and augmented there."""
        views = [self.student_view, self.teacher_view or self.student_view]
        return max(views, key=lambda view: math.prod(view.size))

    def for_evaluation(self) -> ImageCollator:
        return type(self)(self.student_view, self.teacher_view, num_labels=self.num_labels, seed=self.seed)

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        pixels = np.stack([self._pixels(feature) for feature in features])
        # Bytes, channels first: a quarter of what floats would cost on their way to the device
        batch: dict[str, Any] = {"pixels": torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())}
        for name in features[0]:
            if name not in COLUMNS:
                batch["labels" if name == "label" else name] = numbers(name, [feature[name] for feature in features])
        if self.augmentation is not None:
            batch["draws"] = np.stack([self._draw(feature) for feature in features])
        return batch

    def _pixels(self, feature: Mapping[str, Any]) -> np.ndarray:
        if "pixels" in feature:
            pixels, wanted = feature["pixels"], (*self.canvas.size, 3)
            stored = isinstance(pixels, bytes)
            pixels = np.frombuffer(pixels, np.uint8) if stored else np.asarray(pixels, np.uint8)
            if pixels.size != math.prod(wanted) or not (stored or pixels.shape == wanted):
                raise ValueError(
                    f"the column 'pixels' has rows of {pixels.size} bytes (shape {pixels.shape}), and the models see "
                    f"{wanted}: decode the images to this size (hfkd.data.images.decoded)"
                )
            return pixels.reshape(wanted)
        if "image" not in feature:
            raise ValueError(f"a row has neither 'image' nor 'pixels', only {sorted(feature)}: rename its column")
        return self.canvas.fit(feature["image"])

    def _draw(self, feature: Mapping[str, Any]) -> np.ndarray:
        assert self.augmentation is not None
        return self.augmentation.draw(self.generator(feature["example_id"]), *self.canvas.size)

    def on_device(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The batch as models read it; as it is where it has no pixels (any more)."""
        shown = {name: value for name, value in batch.items() if name not in ("pixels", "draws")}
        if "pixels" not in batch:
            return shown
        pixels, draws = batch["pixels"].to(torch.float32).div_(255), batch.get("draws")
        if draws is not None and self.augmentation is not None:
            pixels = self.augmentation.apply(pixels, draws)
            if self.augmentation.mixes and "labels" in shown:
                assert self.num_labels is not None
                pixels, shown["labels"] = self.augmentation.mix(pixels, draws, shown["labels"], self.num_labels)
        shown["pixel_values"] = self.student_view(pixels)
        if self.teacher_view is not None and self.teacher_view != self.student_view:
            shown["teacher_pixel_values"] = self.teacher_view(pixels)
        return shown

    def settings(self) -> dict[str, Any]:
        """For the record of a run and its card."""
        found: dict[str, Any] = {"image_size": list(self.student_view.size)}
        return found | ({} if self.augmentation is None else self.augmentation.settings())


def view_of(processor: Any) -> PixelView:
    return processor if isinstance(processor, PixelView) else PixelView.of(processor)


def numbers(name: str, rows: Sequence[Any]) -> Tensor:
    """A column as int64, float32 or bool. Raises ValueError, naming it, for what is no number."""
    try:
        array = np.asarray(rows)
    except ValueError as error:
        raise ValueError(f"the column {name!r} has rows of different shapes: {error}") from error
    if array.dtype.kind not in "iufb":
        raise ValueError(f"the column {name!r} holds {rows[0]!r}, which is no number: remove it before training")
    kind = {"i": np.int64, "u": np.int64, "f": np.float32, "b": np.bool_}[array.dtype.kind]
    return torch.from_numpy(array.astype(kind, copy=False))
