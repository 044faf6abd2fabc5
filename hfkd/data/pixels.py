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
ALIKE = 0.02  # of the range from black to white, on average: filters and backends round differently
LONGEST = 64  # times the model's pixels: strips that would become larger are cut before they are resized
WARPED_FROM = 384  # ConvNeXt's processors resize to a square from here on, without a crop


@dataclass(frozen=True)
class PixelView:
    """What one model wants to see: height and width, mean and deviation of each channel on the scale [0, 1].

    resized: what images are brought to before the centre is cut out, (height, width), or one number for the shorter
    edge. resample: PIL's number of the filter. Neither changes how two views of the same pixels compare. bgr: the model
    reads blue first (MobileViT); mean and std are in its order.
    """

    size: tuple[int, int]
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    resized: tuple[int, int] | int | None = field(default=None, compare=False)
    resample: int = field(default=BILINEAR, compare=False)
    bgr: bool = False

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
        """What an image processor of transformers does.

        Raises ValueError where it does not name one size, and where it does more to a picture than a view can.
        """
        final, resized = final_and_resized(processor)
        mean, std = mean_and_deviation(processor)
        resample = getattr(processor, "resample", None)
        view = cls(
            (final, final) if isinstance(final, int) else final,
            mean,
            std,
            resized,
            BILINEAR if resample is None else int(resample),  # 0 is a filter too
            bool(getattr(processor, "do_flip_channel_order", False)),
        )
        view._refuse_other_steps(processor)
        return view

    def _refuse_other_steps(self, processor: Any) -> None:
        """Both are shown one picture of smooth colours. Raises ValueError where the answers are not about the same."""
        height, width = self.size[0] + self.size[0] // 2, 2 * self.size[1]  # another shape than the model's
        ramps = np.linspace(0, 255, width)[None], np.linspace(255, 0, height)[:, None], np.linspace(64, 0, width)[None]
        picture = as_picture(np.stack(np.broadcast_arrays(*ramps), -1).astype(np.uint8))
        made = torch.from_numpy(np.array(processor(picture)["pixel_values"][0], dtype=np.float32))
        ours = self(torch.from_numpy(self.fit(picture).copy()).permute(2, 0, 1)[None] / 255)[0]
        if made.shape != ours.shape or float((made - ours).abs().mean() * min(self.std)) > ALIKE:
            raise ValueError(
                f"{type(processor).__name__} does more than to resize, cut out the centre, rescale and normalise: of a test "
                f"picture it makes {tuple(made.shape)} with mean {float(made.mean()):.4g}, these steps make "
                f"{tuple(ours.shape)} with mean {float(ours.mean()):.4g}. Pass a PixelView with what the model shall see, or "
                "make pixel_values in the data set (with_transform)"
            )

    def __call__(self, pixels: Tensor) -> Tensor:
        """(batch, 3, height, width) on the scale [0, 1], of any size, to what the model reads."""
        if tuple(pixels.shape[-2:]) != self.size:
            pixels = F.interpolate(pixels, self.size, mode="bilinear", antialias=True, align_corners=False)
        pixels = pixels.flip(1) if self.bgr else pixels
        factors = [1 / std for std in self.std], [-mean / std for mean, std in zip(self.mean, self.std, strict=True)]
        # On the host first, also where a model is being made on another default device
        made = (torch.tensor(values, dtype=pixels.dtype, device="cpu") for values in factors)
        gain, shift = (value[:, None, None].to(pixels.device, non_blocking=True) for value in made)
        return torch.addcmul(shift, pixels, gain)

    def fit(self, image: Image) -> np.ndarray:
        """A picture as uint8 (height, width, 3): resized as the processor does, then its centre."""
        from hfkd.data.images import as_rgb

        image = as_rgb(image)
        height, width = self.size
        target = self.size if self.resized is None else self.resized
        if isinstance(target, int):
            shorter = min(image.size)
            target = (int(target * image.height / shorter), int(target * image.width / shorter))  # cut, as there
        if min(target[0] - height, target[1] - width) >= 0 and math.prod(target) > LONGEST * math.prod(self.size):
            return self._centre_of_a_strip(image, target)
        if (image.height, image.width) != target:
            image = image.resize((target[1], target[0]), resample=self.resample)
        if target != self.size:
            top, left = (target[0] - height) // 2, (target[1] - width) // 2
            image = image.crop((left, top, left + width, top + height))
        return np.asarray(image)

    def _centre_of_a_strip(self, image: Image, target: tuple[int, int]) -> np.ndarray:
        """Cut out first, then resized: a picture of 1 x 20,000 pixels would otherwise become one of 4 GB on the way."""
        height, width = self.size
        top, left = (target[0] - height) // 2, (target[1] - width) // 2
        y, x = image.height / target[0], image.width / target[1]
        box = (left * x, top * y, min((left + width) * x, image.width), min((top + height) * y, image.height))
        return np.asarray(image.resize((width, height), resample=self.resample, box=box))


def final_and_resized(processor: Any) -> tuple[tuple[int, int] | int, tuple[int, int] | int]:
    """The size that a model reads, and the one that a picture has before the centre is cut out."""
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
    if size is None:
        return final, final
    return final, resized_before_crop(processor, size, crop is not None)


def resized_before_crop(processor: Any, size: tuple[int, int] | int, crops: bool) -> tuple[int, int] | int:
    """Some processors resize to more than the size they name, by a factor of theirs."""
    share = getattr(processor, "crop_pct", None)  # ConvNeXt's (ResNet's, RegNet's, ...) and PoolFormer's
    if share is not None and not crops:
        return int(size / share) if isinstance(size, int) and size < WARPED_FROM else size_of_both(size)
    if share is not None:
        if isinstance(size, int) or size[0] == size[1]:
            return int((size if isinstance(size, int) else size[0]) / share)
        return int(size[0] / share), int(size[1] / share)
    if isinstance(size, int) and type(processor).__name__.startswith("Levit"):
        return int(256 / 224 * size)
    return size


def size_of_both(size: tuple[int, int] | int) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def mean_and_deviation(processor: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Of each channel on the scale [0, 1]."""
    # Factors of a processor that does not rescale are on the scale of bytes
    scale = 255 * getattr(processor, "rescale_factor", 1 / 255) if getattr(processor, "do_rescale", True) else 255.0
    offset = float(getattr(processor, "rescale_offset", False))  # EfficientNet's: subtracted after rescaling
    mean, std, gain = three(0.0), three(1.0), three(1.0)
    if getattr(processor, "do_normalize", True):
        mean, std = named_three(processor, "image_mean"), named_three(processor, "image_std")
    if getattr(processor, "include_top", False):  # EfficientNet's: the deviation divides once more
        gain = named_three(processor, "image_std")
    return (
        tuple((value + offset) / scale for value in mean),
        tuple(value * more / scale for value, more in zip(std, gain, strict=True)),
    )


def named_three(processor: Any, name: str) -> tuple[float, ...]:
    values = getattr(processor, name, None)
    if values is None:
        raise ValueError(
            f"{type(processor).__name__} normalises (do_normalize) without {name}: set it, or do_normalize=False"
        )
    return three(values)


def as_picture(pixels: np.ndarray) -> Image:
    import PIL.Image

    return PIL.Image.fromarray(pixels)


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

    Raises ValueError for rows without an image, with two columns of labels, and for decoded rows of another size, KeyError
    for rows without `example_id` when it augments.
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

    @property
    def shown(self) -> str:
        """What the answers of a teacher to these pixels depend on: a cache stores and compares it."""
        return f"student {self.student_view}, teacher {self.teacher_view or 'the same'}"

    def for_evaluation(self) -> ImageCollator:
        return type(self)(self.student_view, self.teacher_view, num_labels=self.num_labels, seed=self.seed)

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        if "label" in features[0] and "labels" in features[0]:
            raise ValueError(
                "the rows have a column 'label' and a column 'labels', and both would be labels: remove one"
            )
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
        if not hasattr(feature["image"], "convert"):
            raise ValueError(
                f"the column 'image' holds a {type(feature['image']).__name__}, and not a picture of PIL: leave the data set "
                "without a format (with_format(None)), cast the column to datasets.Image(), and drop rows without an image"
            )
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
            pixels, labels = self.augmentation.mix(pixels, draws, shown.get("labels"), self.num_labels)
            shown |= {} if labels is None else {"labels": labels}
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
        bad = next((row for row in rows if np.asarray(row).dtype.kind not in "iufb"), rows[0])
        raise ValueError(
            f"the column {name!r} holds {bad!r}, which is no number: remove "
            f"{'the column' if name not in ('label', 'labels') else 'such rows, or make class ids of them,'} before training"
        )
    kind = {"i": np.int64, "u": np.int64, "f": np.float32, "b": np.bool_}[array.dtype.kind]
    return torch.from_numpy(array.astype(kind, copy=False))
