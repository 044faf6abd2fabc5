"""Augmentation of images: drawn on the host, once for each example, and applied on the device, once for the whole batch.

An example's numbers come from its own generator, so its pixels are the same in every batch, and teacher and student see
the same ones. The numbers stay on the host as numpy: which operation hits which example is known there, and nothing is
ever read back from the device. Only small tensors of parameters travel to it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

CROPS = (None, "pad", "resized")
OPERATIONS = (
    *("Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast"),
    *("Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize"),
)
GEOMETRIC = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
HIGHEST_MAGNITUDE = 30  # of torchvision's 31 bins
ERASED_SCALE, ERASED_RATIO = (0.02, 0.33), (0.3, 3.3)  # Zhong et al. 2017, torchvision's values
ATTEMPTS = 10  # at a box that fits, as in torchvision


class Augmentation:
    """Crop, flip, RandAugment, erasing, then mixup or cutmix, in this order, each only where it is asked for.

    crop        "pad": black borders of `padding` pixels, then a window of the image's size at a random place (CIFAR).
                "resized": a box of a share `scale` of the area and of width / height `ratio`, enlarged to the image's
                size, bilinear (torchvision's RandomResizedCrop). The box is cut from the image as the collator has sized
                it, not from the original file: small boxes are blurrier than in pipelines that crop first.
    flip        probability of a left-right flip
    randaugment operations per image, each one of OPERATIONS at `magnitude` of 0 to 30 (Cubuk et al. 2020, 1909.13719;
                torchvision's v2 table with 31 bins and random signs). Bilinear, black outside, not rounded to bytes
                in between. Needs kornia: pip install 'hfkd[vision]'.
    erasing     probability that a box of 2 to 33 % of the area gets one random colour (Zhong et al. 2017, 1708.04896,
                who draw one colour a pixel: that would be as many numbers as the image has)
    mixup       alpha of the Beta(alpha, alpha) of the share that an image keeps (Zhang et al. 2018, 1710.09412)
    cutmix      the same for the area outside a box pasted from the partner (Yun et al. 2019, 1905.04899); the share is
                counted from the real box, which the image's border may cut. With both, each example draws which, 1 : 1.

    Mixing comes after erasing (as where timm's Mixup or torchvision's reference mix a collated batch): everything before
    it depends on one example only, and an erased box goes with the image it belongs to, whose label it counts for.
    Pixels need no normalisation before: mixing is linear.

    Raises ValueError for settings that cannot work and ImportError where RandAugment has no kornia.
    """

    def __init__(
        self,
        crop: str | None = None,
        padding: int = 4,
        scale: Sequence[float] = (0.08, 1.0),
        ratio: Sequence[float] = (3 / 4, 4 / 3),
        flip: float = 0.0,
        randaugment: int = 0,
        magnitude: int = 9,
        erasing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
    ):
        if crop not in CROPS:
            raise ValueError(f"crop must be one of {CROPS}, got {crop!r}")
        _check_whole("padding", padding, None)
        _check_whole("randaugment", randaugment, None)
        _check_whole("magnitude", magnitude, HIGHEST_MAGNITUDE)
        _check_range("scale", scale, "shares of the image's area, and no crop is larger than the image", 1.0)
        _check_range("ratio", ratio, "width / height of the crop", math.inf)
        for name, value in (("flip", flip), ("erasing", erasing)):
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} is a probability, between 0 and 1, got {value}")
        for name, value in (("mixup", mixup), ("cutmix", cutmix)):
            if not 0.0 <= value < math.inf:
                raise ValueError(f"{name} is the alpha of a Beta distribution, above 0, or 0 for none, got {value}")
        self.crop, self.padding, self.flip = crop, padding, flip
        self.scale, self.ratio = (scale[0], scale[1]), (ratio[0], ratio[1])
        self.randaugment, self.magnitude, self.erasing = randaugment, magnitude, erasing
        self.mixup, self.cutmix = mixup, cutmix
        if randaugment:
            _require_kornia()

    @property
    def mixes(self) -> bool:
        """Whether `mix` changes anything, and labels become probabilities."""
        return self.mixup > 0 or self.cutmix > 0

    def settings(self) -> dict[str, Any]:
        """What acts, under the names of the arguments, for records and cards: `Augmentation(**settings)` is the same."""
        found: dict[str, Any] = {}
        if self.crop is not None:
            found["crop"] = self.crop
        if self.crop == "pad":
            found["padding"] = self.padding
        if self.crop == "resized":
            found |= {"scale": list(self.scale), "ratio": list(self.ratio)}
        if self.randaugment:
            found |= {"randaugment": self.randaugment, "magnitude": self.magnitude}
        single = {"flip": self.flip, "erasing": self.erasing, "mixup": self.mixup, "cutmix": self.cutmix}
        return found | {name: value for name, value in single.items() if value}

    # ---------------------------------------------------------------------------------------------------- on the host

    def draw(self, generator: np.random.Generator, height: int, width: int) -> np.ndarray:
        """Everything that is random about one example of this size, (K,) float64; `_parts` names the numbers.

        Raises ValueError where a window of "pad" could miss the image.
        """
        drawn: list[float] = []
        if self.crop == "pad":
            if self.padding >= min(height, width):
                raise ValueError(
                    f"padding={self.padding} for images of {height} x {width}: a crop could lie outside the image; "
                    f"choose less than {min(height, width)}"
                )
            drawn += [float(generator.integers(0, 2 * self.padding + 1)) for _ in range(2)]  # faster than size=2
        elif self.crop == "resized":
            box = _draw_box(generator, height, width, self.scale, self.ratio)
            drawn += box or _central_box(height, width, self.ratio)
        if self.flip:
            drawn.append(generator.random() < self.flip)
        if self.randaugment:
            drawn += generator.integers(0, len(OPERATIONS), size=self.randaugment).tolist()
            drawn += (2 * generator.integers(0, 2, size=self.randaugment) - 1).tolist()
        if self.erasing:
            drawn += self._draw_erased(generator, height, width)
        if self.mixes:
            drawn += self._draw_mix(generator, height, width)
        return np.array(drawn, dtype=np.float64)

    def _draw_erased(self, generator: np.random.Generator, height: int, width: int) -> list[float]:
        if generator.random() >= self.erasing:
            return [0.0] * 7
        box = _draw_box(generator, height, width, ERASED_SCALE, ERASED_RATIO) or [0.0] * 4
        return [*box, *generator.random(3)]

    def _draw_mix(self, generator: np.random.Generator, height: int, width: int) -> list[float]:
        """The share an example keeps, then the box it gets from its partner: an empty one under mixup."""
        pastes = self.cutmix > 0 and (self.mixup == 0 or generator.random() < 0.5)
        alpha = self.cutmix if pastes else self.mixup
        kept = generator.beta(alpha, alpha)
        if not pastes:
            return [kept, 0.0, 0.0, 0.0, 0.0]
        side = math.sqrt(1.0 - kept)
        top, bottom = _span(int(generator.integers(0, height)), int(height * side), height)
        left, right = _span(int(generator.integers(0, width)), int(width * side), width)
        area = (bottom - top) * (right - left)
        return [1.0 - area / (height * width), top, left, bottom - top, right - left]

    def _parts(self, draws: np.ndarray, pixels: Tensor) -> dict[str, np.ndarray]:
        """The columns of a batch of draws by name. Raises ValueError where pixels or draws have another shape or type."""
        widths = {
            "crop": {None: 0, "pad": 2, "resized": 4}[self.crop],
            "flip": 1 if self.flip else 0,
            "operations": self.randaugment,
            "directions": self.randaugment,
            "erased": 4 if self.erasing else 0,
            "colour": 3 if self.erasing else 0,
            "kept": 1 if self.mixes else 0,
            "pasted": 4 if self.mixes else 0,
        }
        if pixels.ndim != 4 or pixels.shape[1] != 3 or not pixels.is_floating_point():
            raise ValueError(
                f"pixels must be (batch, 3, height, width), floats between 0 and 1, got {tuple(pixels.shape)} of "
                f"{pixels.dtype}: bytes are divided by 255, grey images repeated three times"
            )
        if draws.shape != (len(pixels), sum(widths.values())):
            raise ValueError(
                f"draws must be (batch, numbers) = {(len(pixels), sum(widths.values()))}, got {draws.shape}: stack what "
                "`draw` of this augmentation returns for each example"
            )
        ends = np.cumsum(list(widths.values()))
        return dict(zip(widths, np.split(draws, ends[:-1], axis=1), strict=True))

    # -------------------------------------------------------------------------------------------------- on the device

    def apply(self, pixels: Tensor, draws: np.ndarray) -> Tensor:
        """Everything but mixing. pixels (batch, 3, height, width) in [0, 1]; draws (batch, K). Same shape, type, device.

        A row of the result depends on this row of both arguments only (to rounding, where a device's convolutions do).
        """
        parts = self._parts(draws, pixels)
        changed = pixels.to(torch.promote_types(pixels.dtype, torch.float32))  # bfloat16 misses places by pixels
        if self.crop == "resized":
            changed = _resized_crop(changed, parts["crop"], parts["flip"])
        elif self.crop == "pad" or self.flip:
            changed = _shifted_crop(changed, self.padding if self.crop else 0, parts["crop"], parts["flip"])
        for operations, directions in zip(parts["operations"].T, parts["directions"].T, strict=True):
            changed = _randaugment(changed, operations.astype(int), directions, self.magnitude)
        if self.erasing:
            erased = _inside(_to(changed, parts["erased"]), *changed.shape[2:])
            changed = torch.where(erased, _to(changed, parts["colour"])[:, :, None, None], changed)
        return changed.to(pixels.dtype)

    def mix(
        self, pixels: Tensor, draws: np.ndarray, labels: Tensor | None, num_labels: int | None
    ) -> tuple[Tensor, Tensor | None]:
        """Mixup or cutmix of every row with the row before it, the first with the last.

        pixels (batch, 3, height, width); draws (batch, K); labels (batch,) class ids. Returns pixels and labels (batch,
        num_labels), float32 probabilities; both unchanged where the augmentation does not mix. Without labels (a teacher alone
        says what is in a picture) the pixels are mixed just the same.

        The partner is another row of the same (micro-)batch, so what an example is mixed with, unlike how much, depends
        on the batch it is in. A batch of one is mixed with itself: its pixels stay.

        Raises ValueError for labels that are probabilities already, without `num_labels`, and for ids outside of 0 to
        num_labels - 1 (-100: no label) on the CPU; elsewhere the device itself refuses them, as reading them here would
        make the host wait.
        """
        parts = self._parts(draws, pixels)
        if not self.mixes:
            return pixels, labels
        own = None if labels is None else _one_hot(labels, num_labels)
        kept, pasted = (_to(pixels, parts[name], torch.float32) for name in ("kept", "pasted"))
        everywhere = torch.where(pasted[:, 2:3] * pasted[:, 3:4] > 0, 1.0, kept)  # cutmix keeps all outside its box
        weights = everywhere[:, :, None, None].masked_fill(_inside(pasted, *pixels.shape[2:]), 0.0)
        # lerp, as it gives exactly the same back where both sides are the same
        mixed = torch.lerp(pixels.roll(1, 0), pixels, weights.to(pixels.dtype))
        return mixed, None if own is None else torch.lerp(own.roll(1, 0), own, kept)


# ---------------------------------------------------------------------------------------------------------------- boxes


def _draw_box(
    generator: np.random.Generator, height: int, width: int, scale: Sequence[float], ratio: Sequence[float]
) -> list[float] | None:
    """Top, left, height, width of a box: area uniform in `scale` of the image's, width / height log-uniform in `ratio`,
    its place uniform. None where no attempt fits."""
    logarithms = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(ATTEMPTS):
        area = height * width * generator.uniform(scale[0], scale[1])
        aspect = math.exp(generator.uniform(logarithms[0], logarithms[1]))
        rows, columns = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < rows <= height and 0 < columns <= width:
            top, left = generator.integers(0, height - rows + 1), generator.integers(0, width - columns + 1)
            return [float(top), float(left), float(rows), float(columns)]
    return None


def _central_box(height: int, width: int, ratio: Sequence[float]) -> list[float]:
    """The largest centred box whose width / height is in `ratio`."""
    rows = min(height, max(1, round(width / ratio[0])))
    columns = min(width, max(1, round(height * ratio[1])))
    return [float((height - rows) // 2), float((width - columns) // 2), float(rows), float(columns)]


def _span(centre: int, length: int, limit: int) -> tuple[int, int]:
    return max(centre - length // 2, 0), min(centre + length // 2, limit)


def _inside(boxes: Tensor, height: int, width: int) -> Tensor:
    """(batch, 4) boxes to (batch, 1, height, width): whether a pixel lies in its example's box."""
    top, left, rows, columns = (boxes[:, i : i + 1] for i in range(4))
    y = torch.arange(height, device=boxes.device)
    x = torch.arange(width, device=boxes.device)
    in_rows, in_columns = (y >= top) & (y < top + rows), (x >= left) & (x < left + columns)
    return in_rows[:, None, :, None] & in_columns[:, None, None, :]


# ---------------------------------------------------------------------------------------------------------------- crops


def _shifted_crop(pixels: Tensor, padding: int, offsets: np.ndarray, flipped: np.ndarray) -> Tensor:
    """Windows of the padded images, mirrored where asked for: one gather for the whole batch."""
    batch, channels, height, width = pixels.shape
    offsets = offsets if offsets.shape[1] else np.zeros((batch, 2))
    rows = _to(pixels, offsets[:, :1] + np.arange(height), torch.int64)
    columns = _to(pixels, offsets[:, 1:] + _mirrored(np.arange(width), flipped, width - 1), torch.int64)
    places = rows[:, :, None] * (width + 2 * padding) + columns[:, None, :]
    padded = F.pad(pixels, (padding,) * 4).flatten(2)
    return padded.gather(2, places.view(batch, 1, -1).expand(-1, channels, -1)).view(pixels.shape)


def _resized_crop(pixels: Tensor, boxes: np.ndarray, flipped: np.ndarray) -> Tensor:
    """Boxes enlarged to the whole image, bilinear. A crop is never larger than the image, so nothing needs smoothing."""
    height, width = pixels.shape[2:]
    top, left, rows, columns = (boxes[:, i : i + 1] for i in range(4))
    y = _to(pixels, _samples(top, rows, height, np.arange(height)))
    x = _to(pixels, _samples(left, columns, width, _mirrored(np.arange(width), flipped, width - 1)))
    grid = torch.stack([x[:, None, :].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)], dim=-1)
    return F.grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _mirrored(positions: np.ndarray, flipped: np.ndarray, last: int) -> np.ndarray:
    """(width,) to (batch, width), or to (1, width) where nothing is ever flipped."""
    return np.where(flipped > 0, last - positions, positions) if flipped.shape[1] else positions[None]


def _samples(start: np.ndarray, length: np.ndarray, size: int, positions: np.ndarray) -> np.ndarray:
    """Where in [-1, 1] of an axis the output's pixels look, not beyond the centres of the box's outer pixels."""
    centres = np.clip((positions + 0.5) * length / size, 0.5, length - 0.5) + start
    return 2 * centres / size - 1


# ---------------------------------------------------------------------------------------------------------- RandAugment


def _randaugment(pixels: Tensor, operations: np.ndarray, directions: np.ndarray, magnitude: int) -> Tensor:
    """One operation an example, (batch,) indices of OPERATIONS and signs: one call for all examples of an operation."""
    names = np.array(OPERATIONS)[operations]
    groups = np.where(np.isin(names, GEOMETRIC), "Affine", names)
    changed = pixels.clone()
    for group in sorted(set(groups) - {"Identity"}):
        rows = np.flatnonzero(groups == group)
        index = _to(pixels, rows, torch.int64)
        chosen = pixels.index_select(0, index)
        if group == "Affine":
            result = _warped(chosen, names[rows], directions[rows], magnitude)
        else:
            result = _recoloured(chosen, group, directions[rows], magnitude)
        changed.index_copy_(0, index, result)
    return changed


def _warped(pixels: Tensor, names: np.ndarray, directions: np.ndarray, magnitude: int) -> Tensor:
    """Shears about the top left corner, whole-pixel shifts to the right and down, turns about the centre to the left."""
    from kornia.geometry.transform import warp_affine

    height, width = pixels.shape[2:]
    matrices = [
        _matrix(name, direction * magnitude / HIGHEST_MAGNITUDE, height, width)
        for name, direction in zip(names, directions, strict=True)
    ]
    return warp_affine(pixels, _to(pixels, np.stack(matrices)), (height, width), align_corners=True)


def _matrix(name: str, share: float, height: int, width: int) -> np.ndarray:
    """(2, 3): where a pixel goes, counted from the centre of the first one. share: of the highest magnitude, signed."""
    if name == "ShearX":  # of PIL and torchvision: the lower, the further to the left
        return np.array([[1.0, -0.3 * share, -0.15 * share], [0.0, 1.0, 0.0]])
    if name == "ShearY":
        return np.array([[1.0, 0.0, 0.0], [-0.3 * share, 1.0, -0.15 * share]])
    if name == "TranslateX":
        return np.array([[1.0, 0.0, int(150 / 331 * width * share)], [0.0, 1.0, 0.0]])
    if name == "TranslateY":
        return np.array([[1.0, 0.0, 0.0], [0.0, 1.0, int(150 / 331 * height * share)]])
    cosine, sine = math.cos(math.radians(30 * share)), math.sin(math.radians(30 * share))
    x, y = (width - 1) / 2, (height - 1) / 2
    return np.array([[cosine, sine, x - cosine * x - sine * y], [-sine, cosine, y + sine * x - cosine * y]])


def _recoloured(pixels: Tensor, name: str, directions: np.ndarray, magnitude: int) -> Tensor:
    """kornia's operations; kornia has none that leaves a constant channel alone when it stretches contrast."""
    from kornia import enhance

    share = magnitude / HIGHEST_MAGNITUDE
    if name == "AutoContrast":
        low, high = pixels.amin((2, 3), keepdim=True), pixels.amax((2, 3), keepdim=True)
        return torch.where(high > low, (pixels - low) / (high - low), pixels)
    if name == "Equalize":
        return enhance.equalize(pixels)
    # One number an image: kornia copies a bare number to the device in a way that waits for it
    if name == "Posterize":
        return enhance.posterize(pixels, _to(pixels, np.full(len(pixels), round(8 - 4 * share)), torch.int64))
    if name == "Solarize":
        return enhance.solarize(pixels, _to(pixels, np.full(len(pixels), 1.0 - share)))
    blend = {
        "Brightness": enhance.adjust_brightness_accumulative,  # `adjust_brightness` adds; PIL multiplies
        "Color": enhance.adjust_saturation_with_gray_subtraction,
        "Contrast": enhance.adjust_contrast_with_mean_subtraction,
        "Sharpness": enhance.sharpness,
    }[name]
    return blend(pixels, _to(pixels, 1.0 + 0.9 * share * directions))


def _require_kornia() -> None:
    try:
        import kornia  # noqa: F401
    except ImportError as error:
        raise ImportError("RandAugment (randaugment above 0) needs kornia: pip install 'hfkd[vision]'") from error


# --------------------------------------------------------------------------------------------------- tensors and checks


def _to(like: Tensor, values: np.ndarray, dtype: torch.dtype | None = None) -> Tensor:
    """Numbers of the host on the device of `like`, converted first: not every device has float64."""
    return torch.from_numpy(values).to(dtype or like.dtype).to(like.device, non_blocking=True)


def _one_hot(labels: Tensor, num_labels: int | None) -> Tensor:
    if num_labels is None:
        raise ValueError("mixup and cutmix make labels that are probabilities: pass num_labels")
    if labels.ndim != 1 or labels.is_floating_point():
        raise ValueError(
            f"mixup and cutmix need one class id an example, got labels {tuple(labels.shape)} of {labels.dtype}: "
            "labels that are probabilities, several classes or numbers cannot be mixed; switch mixup and cutmix off"
        )
    if labels.device.type == "cpu" and ((labels < 0) | (labels >= num_labels)).any():
        raise ValueError(
            f"mixup and cutmix need class ids between 0 and {num_labels - 1} (num_labels={num_labels}), got labels from "
            f"{labels.min()} to {labels.max()}: remove examples without a label (-100), or correct num_labels"
        )
    return F.one_hot(labels.long(), num_labels).to(torch.float32)


def _check_whole(name: str, value: Any, highest: int | None) -> None:
    if not isinstance(value, int) or value < 0 or (highest is not None and value > highest):
        raise ValueError(
            f"{name} is a whole number, {'0 or more' if highest is None else f'from 0 to {highest}'}, got {value}"
        )


def _check_range(name: str, values: Sequence[float], meaning: str, highest: float) -> None:
    if len(values) != 2 or not 0.0 < values[0] <= values[1] <= highest or math.isinf(values[1]):
        limit = "" if math.isinf(highest) else f" and up to {highest:g}"
        raise ValueError(
            f"{name} is (lowest, highest), {meaning}: above 0{limit}, the smaller first, got {tuple(values)}"
        )
