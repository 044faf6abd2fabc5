"""Augmentation: against PIL and slow loops, its statistics, what it is a function of, and what it refuses."""

from __future__ import annotations

import itertools
import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from scipy import stats

from hfkd.data.augment import GEOMETRIC, OPERATIONS, Augmentation

HEIGHT, WIDTH = 24, 20
EVERYTHING = {"flip": 0.5, "randaugment": 2, "erasing": 0.5, "mixup": 0.8, "cutmix": 1.0}
SETTINGS = {
    "flip": {"flip": 0.5},
    "pad": {"crop": "pad", "padding": 5},
    "pad and flip": {"crop": "pad", "flip": 0.5},
    "resized": {"crop": "resized"},
    "resized and flip": {"crop": "resized", "scale": (0.3, 0.6), "flip": 0.5},
    "erasing": {"erasing": 0.6},
    "randaugment": {"randaugment": 2},
    "everything": {"crop": "resized", **EVERYTHING},
    "everything, padded": {"crop": "pad", **EVERYTHING},
}


def images(count: int, height: int = HEIGHT, width: int = WIDTH, seed: int = 0) -> torch.Tensor:
    """Smooth colours with noise, all of them levels of bytes, (count, 3, height, width) in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    smooth = F.interpolate(coarse, (height, width), mode="bilinear") * 0.8 + 0.1
    noisy = smooth + 0.1 * torch.rand(count, 3, height, width, generator=generator) - 0.05
    return (noisy * 255).round().to(torch.uint8).float() / 255


def draws_of(augmentation: Augmentation, count: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    return np.stack([augmentation.draw(np.random.default_rng((7, i)), height, width) for i in range(count)])


def bytes_of(pixels: torch.Tensor) -> Image.Image:
    """(3, height, width) in [0, 1] as a picture."""
    return Image.fromarray((pixels * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())


def levels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).transpose(2, 0, 1).astype(float)


# ---- what a result is a function of ----


@pytest.mark.parametrize("name", SETTINGS)
def test_an_example_does_not_see_its_batch(name):
    """A run resumed or split over two processes would train on other pixels, and a cached teacher answer for others."""
    augmentation = Augmentation(**SETTINGS[name])
    pixels, draws = images(11), draws_of(augmentation, 11)
    whole = augmentation.apply(pixels, draws)
    order = np.random.default_rng(0).permutation(11)
    assert torch.equal(augmentation.apply(pixels[order], draws[order]), whole[order])
    pieces = [augmentation.apply(pixels[rows], draws[rows]) for rows in (slice(0, 1), slice(1, 7), slice(7, 11))]
    assert torch.equal(torch.cat(pieces), whole)
    assert not torch.equal(whole, pixels)


@pytest.mark.parametrize("name", SETTINGS)
def test_draws_are_a_function_of_the_generator(name):
    """Draws that vary in length cannot be stacked; draws from elsewhere make a resumed run another run."""
    augmentation = Augmentation(**SETTINGS[name])
    draws = draws_of(augmentation, 200)
    assert draws.dtype == np.float64 and draws.ndim == 2
    assert np.array_equal(draws, draws_of(augmentation, 200))
    assert len(np.unique(draws, axis=0)) > 1


@pytest.mark.parametrize("name", SETTINGS)
def test_global_generators_and_arguments_stay_as_they_were(name):
    """Dropout would differ between runs with and without augmentation; the teacher's own view would change in place."""
    augmentation = Augmentation(**SETTINGS[name])
    torch_state, (_, numpy_state, *position) = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
    pixels, labels, draws = images(6), torch.arange(6), draws_of(augmentation, 6)
    before = pixels.clone(), labels.clone(), draws.copy()
    augmentation.mix(augmentation.apply(pixels, draws), draws, labels, 6)
    augmentation.mix(pixels, draws, labels, 6)
    assert torch.equal(pixels, before[0]) and torch.equal(labels, before[1]) and np.array_equal(draws, before[2])
    _, numpy_after, *position_after = np.random.get_state()  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(numpy_after, numpy_state) and position_after == position


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_type_and_range_are_kept(name, dtype):
    """A model in bfloat16 refuses float32 pixels; pixels beyond [0, 1] are no image for the next operation."""
    augmentation = Augmentation(**SETTINGS[name])
    pixels, draws = images(8).to(dtype), draws_of(augmentation, 8)
    changed = augmentation.apply(pixels, draws)
    mixed, _ = augmentation.mix(changed, draws, torch.zeros(8, dtype=torch.int64), 2)
    for result in (changed, mixed):
        assert result.dtype == dtype and result.shape == pixels.shape
        assert result.min() >= -1e-6 and result.max() <= 1 + 1e-6
    exact = augmentation.apply(images(8).double(), draws)
    if "randaugment" not in SETTINGS[name]:  # whose thresholds turn a difference of rounding into one of levels
        assert (changed.double() - exact).abs().max() < (1e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("name", SETTINGS)
def test_nothing_is_read_back_from_the_device(name):
    """The host would wait for the device in every step. A meta tensor has no values: to read one is an error."""
    augmentation = Augmentation(**SETTINGS[name])
    draws = draws_of(augmentation, 40)
    pixels, labels = torch.empty(40, 3, HEIGHT, WIDTH, device="meta"), torch.zeros(40, device="meta").long()
    changed = augmentation.apply(pixels, draws)
    mixed, probabilities = augmentation.mix(changed, draws, labels, 3)
    assert changed.device == mixed.device == probabilities.device == pixels.device
    assert changed.shape == mixed.shape == pixels.shape


def test_nothing_asked_for_is_nothing_done():
    """A baseline without augmentation must see its images as they are."""
    augmentation = Augmentation()
    pixels, draws, labels = images(3), draws_of(Augmentation(), 3), torch.tensor([2, 0, 1])
    assert draws.shape == (3, 0) and not augmentation.mixes and augmentation.settings() == {}
    assert torch.equal(augmentation.apply(pixels, draws), pixels)
    mixed, unchanged = augmentation.mix(pixels, draws, labels, None)
    assert torch.equal(mixed, pixels) and torch.equal(unchanged, labels)


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_say_all_that_acts(name):
    """A card that leaves out a setting describes a run that nobody can repeat."""
    augmentation = Augmentation(**SETTINGS[name])
    again = Augmentation(**json.loads(json.dumps(augmentation.settings())))
    pixels, draws = images(6), draws_of(augmentation, 6)
    assert np.array_equal(draws_of(again, 6), draws)
    assert torch.equal(again.apply(pixels, draws), augmentation.apply(pixels, draws))
    assert again.settings() == augmentation.settings() and augmentation.settings()


# ---- crop, flip, erasing: against one image at a time ----


@pytest.mark.parametrize(("padding", "flip"), list(itertools.product([0, 1, 4], [0.0, 0.5, 1.0])))
def test_padded_crops_are_those_of_a_loop(padding, flip):
    """A window off by one, or flips that follow another example, train on other images than the paper's."""
    augmentation = Augmentation(crop="pad", padding=padding, flip=flip)
    pixels, draws = images(32), draws_of(augmentation, 32)
    result = augmentation.apply(pixels, draws)
    for image, numbers, changed in zip(pixels.numpy(), draws, result.numpy(), strict=True):
        top, left = numbers[:2].astype(int)
        bordered = np.zeros((3, HEIGHT + 2 * padding, WIDTH + 2 * padding), dtype=np.float32)
        bordered[:, padding : padding + HEIGHT, padding : padding + WIDTH] = image
        expected = bordered[:, top : top + HEIGHT, left : left + WIDTH]
        assert np.array_equal(changed, expected[:, :, ::-1] if flip and numbers[2] else expected)


def test_flips_alone_mirror_left_and_right():
    """Digits upside down are other digits."""
    augmentation = Augmentation(flip=0.5)
    pixels, draws = images(32), draws_of(augmentation, 32)
    expected = [np.asarray(ImageOps.mirror(bytes_of(image)) if flip else bytes_of(image)) for image, (flip,) in
                zip(pixels, draws, strict=True)]  # fmt: skip
    result = augmentation.apply(pixels, draws)
    assert all(
        np.array_equal(np.asarray(bytes_of(image)), other) for image, other in zip(result, expected, strict=True)
    )
    assert 8 < draws.sum() < 24


@pytest.mark.parametrize("size", [(24, 20), (9, 31)])
@pytest.mark.parametrize("flip", [0.0, 0.5])
def test_resized_crops_are_those_of_pil(size, flip):
    """An image shifted by half a pixel, or with a border from outside the crop, is no longer the same view as elsewhere."""
    augmentation = Augmentation(crop="resized", flip=flip)
    pixels, draws = images(24, *size), draws_of(augmentation, 24, *size)
    result = augmentation.apply(pixels, draws).numpy()
    for image, numbers, changed in zip(pixels.numpy(), draws, result, strict=True):
        top, left, height, width = numbers[:4]
        for channel, other in zip(image, changed, strict=True):
            cut = Image.fromarray(channel).crop((left, top, left + width, top + height))
            expected = np.asarray(cut.resize((size[1], size[0]), Image.Resampling.BILINEAR))
            expected = expected[:, ::-1] if flip and numbers[4] else expected
            np.testing.assert_allclose(other, expected, atol=2e-6)


def test_a_crop_of_everything_changes_nothing():
    """A model that is fine-tuned without crops must see its own training images."""
    augmentation = Augmentation(crop="resized", scale=(1.0, 1.0), ratio=(1.0, 1.0))
    pixels = images(3, 16, 16)
    torch.testing.assert_close(augmentation.apply(pixels, draws_of(augmentation, 3, 16, 16)), pixels, atol=1e-6, rtol=0)


def test_erasing_is_that_of_a_loop():
    """A box beside the drawn place erases nothing of what the rate promises, or twice."""
    augmentation = Augmentation(erasing=0.5)
    pixels, draws = images(32), draws_of(augmentation, 32)
    result = augmentation.apply(pixels, draws).numpy()
    for image, (top, left, height, width, *colour), changed in zip(pixels.numpy(), draws, result, strict=True):
        expected = image.copy()
        for y, x in itertools.product(range(HEIGHT), range(WIDTH)):
            if top <= y < top + height and left <= x < left + width:
                expected[:, y, x] = colour
        assert np.array_equal(changed, expected)


def test_crop_then_flip_then_erase():
    """Erased boxes that are cropped away afterwards erase less than the rate says."""
    augmentation = Augmentation(crop="pad", flip=0.5, erasing=1.0)
    pixels, draws = images(16), draws_of(augmentation, 16)
    one_by_one = Augmentation(crop="pad").apply(pixels, draws[:, :2])
    one_by_one = Augmentation(flip=0.5).apply(one_by_one, draws[:, 2:3])
    one_by_one = Augmentation(erasing=1.0).apply(one_by_one, draws[:, 3:])
    assert torch.equal(augmentation.apply(pixels, draws), one_by_one)


# ---- RandAugment: against PIL ----


def changed_by(operation: str, direction: int, magnitude: int, pixels: torch.Tensor) -> np.ndarray:
    """Levels of bytes after one operation."""
    draws = np.tile([float(OPERATIONS.index(operation)), float(direction)], (len(pixels), 1))
    return Augmentation(randaugment=1, magnitude=magnitude).apply(pixels, draws).numpy() * 255


def recoloured_by_pil(operation: str, direction: int, magnitude: int, picture: Image.Image) -> Image.Image:
    share = magnitude / 30
    if operation in ("Brightness", "Color", "Contrast", "Sharpness"):
        return getattr(ImageEnhance, operation)(picture).enhance(1 + direction * 0.9 * share)
    if operation == "Posterize":
        return ImageOps.posterize(picture, round(8 - 4 * share))
    if operation == "Solarize":
        return ImageOps.solarize(picture, 255 * (1 - share))
    return {"Identity": Image.Image.copy, "AutoContrast": ImageOps.autocontrast, "Equalize": ImageOps.equalize}[
        operation
    ](picture)


EXACT = ("Identity", "Posterize", "Solarize", "Equalize")


@pytest.mark.parametrize("operation", [name for name in OPERATIONS if name not in GEOMETRIC])
@pytest.mark.parametrize(("direction", "magnitude"), [(1, 9), (-1, 9), (1, 30), (-1, 30), (1, 0)])
def test_colours_are_those_of_pil(operation, direction, magnitude):
    """Another brightness than the published recipes' is another recipe (kornia's usual one adds, PIL multiplies)."""
    pixels = images(4, 32, 32)
    result = changed_by(operation, direction, magnitude, pixels)
    expected = np.stack(
        [levels(recoloured_by_pil(operation, direction, magnitude, bytes_of(image))) for image in pixels]
    )
    # PIL rounds to bytes, in Contrast also the mean, in Sharpness also the smoothed image
    assert np.abs(result - expected).max() <= (1e-3 if operation in EXACT else 2.0)
    assert np.abs(result - expected).mean() <= (1e-3 if operation in EXACT else 0.75)


def warped_by_pil(operation: str, direction: int, magnitude: int, picture: Image.Image) -> Image.Image:
    share = direction * magnitude / 30
    if operation == "Rotate":
        return picture.rotate(30 * share, Image.Resampling.BILINEAR)
    right, down = int(150 / 331 * picture.width * share), int(150 / 331 * picture.height * share)
    where_from = {
        "ShearX": (1, 0.3 * share, 0, 0, 1, 0),
        "ShearY": (1, 0, 0, 0.3 * share, 1, 0),
        "TranslateX": (1, 0, -right, 0, 1, 0),
        "TranslateY": (1, 0, 0, 0, 1, -down),
    }[operation]
    return picture.transform(picture.size, Image.Transform.AFFINE, where_from, Image.Resampling.BILINEAR)


@pytest.mark.parametrize("operation", GEOMETRIC)
@pytest.mark.parametrize(("direction", "magnitude"), [(1, 9), (-1, 9), (1, 30), (-1, 30), (1, 0)])
def test_places_are_those_of_pil(operation, direction, magnitude):
    """A turn about the corner or a shift that grows with nothing throws the object out of the image."""
    pixels = images(4, 32, 40)
    result = changed_by(operation, direction, magnitude, pixels)
    expected = np.stack([levels(warped_by_pil(operation, direction, magnitude, bytes_of(image))) for image in pixels])
    # Where PIL looks inside of the image; on its edge PIL repeats half a pixel that is black here
    white = Image.new("RGB", (40, 32), (255, 255, 255))
    inside = levels(warped_by_pil(operation, direction, magnitude, white)) == 255
    inside &= changed_by(operation, direction, magnitude, torch.ones(1, 3, 32, 40))[0] > 254.99
    assert inside.mean() > 0.5
    assert np.abs(result - expected)[:, inside].max() <= 1.01
    outside = levels(warped_by_pil(operation, direction, magnitude, white)) == 0
    assert np.abs(result[:, outside]).max(initial=0.0) < 255 * 0.51  # half a pixel of the edge, else black


def test_a_constant_channel_survives_the_stretching_of_contrast():
    """An image of one colour that turns black (as kornia's min-max does) is a label without an image."""
    grey = torch.full((1, 3, 8, 8), 0.5)
    assert np.allclose(changed_by("AutoContrast", 1, 9, grey), 127.5)
    assert np.allclose(changed_by("Equalize", 1, 9, grey), 127.5)


def test_operations_go_to_their_own_examples_in_their_order():
    """An operation on another example's row, or the second before the first, breaks the key of every draw."""
    augmentation = Augmentation(randaugment=2, magnitude=20)
    pixels, draws = images(64), draws_of(augmentation, 64)
    result = augmentation.apply(pixels, draws)
    single = Augmentation(randaugment=1, magnitude=20)
    for i in range(64):
        first = single.apply(pixels[i : i + 1], draws[i : i + 1, [0, 2]])
        assert torch.equal(result[i : i + 1], single.apply(first, draws[i : i + 1, [1, 3]]))


def test_without_kornia_only_randaugment_asks_for_it(monkeypatch):
    """A user without the extra learns it after hours of a teacher's training, or cannot even crop."""
    for name in ["kornia", *(name for name in sys.modules if name.startswith("kornia."))]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"pip install 'hfkd\[vision\]'"):
        Augmentation(randaugment=1)
    settings = {name: value for name, value in EVERYTHING.items() if name != "randaugment"}
    augmentation = Augmentation(crop="resized", **settings)
    augmentation.apply(images(4), draws_of(augmentation, 4))


# ---- the statistics of what is drawn ----

LIKELY = 1e-3  # the seeds are fixed: a p-value below is a wrong distribution, not bad luck


def test_padded_crops_and_flips_are_uniform():
    """Offsets that never reach a border are a smaller augmentation than the one that the card names."""
    draws = draws_of(Augmentation(crop="pad", padding=4, flip=0.3), 4000)
    for offsets in draws[:, :2].T:
        assert stats.chisquare(np.bincount(offsets.astype(int), minlength=9)).pvalue > LIKELY
        assert offsets.max() == 8
    assert abs(stats.pearsonr(draws[:, 0], draws[:, 1]).statistic) < 0.05
    assert stats.binomtest(int(draws[:, 2].sum()), 4000, 0.3).pvalue > LIKELY


def test_resized_crops_have_the_areas_and_shapes_asked_for():
    """Shares of the side instead of the area cut out a tenth of what the recipe shows."""
    augmentation = Augmentation(crop="resized", scale=(0.1, 0.5))
    draws = draws_of(augmentation, 3000, 512, 512)
    top, left, height, width = draws.T
    assert stats.kstest(height * width / 512**2, stats.uniform(0.1, 0.4).cdf).pvalue > LIKELY
    shapes = stats.uniform(np.log(3 / 4), np.log(16 / 9))
    assert stats.kstest(np.log(width / height), shapes.cdf).pvalue > LIKELY
    assert stats.kstest(top / (512 - height), stats.uniform().cdf).pvalue > LIKELY
    assert stats.kstest(left / (512 - width), stats.uniform().cdf).pvalue > LIKELY


@pytest.mark.parametrize(("size", "expected"), [((10, 90), (0, 38, 10, 13)), ((90, 10), (38, 0, 13, 10))])
def test_where_no_box_fits_the_crop_is_the_largest_central_one(size, expected):
    """A long image for which nothing is found must neither loop for ever nor be squeezed."""
    augmentation = Augmentation(crop="resized", scale=(1.0, 1.0))
    assert tuple(augmentation.draw(np.random.default_rng(0), *size)) == expected


def test_erasing_happens_at_its_rate_within_the_image():
    """A rate that is a share of the boxes that fit is another regularisation on each size of image."""
    draws = draws_of(Augmentation(erasing=0.25), 4000)
    top, left, height, width = draws[:, :4].T
    erased = height > 0
    assert stats.binomtest(int(erased.sum()), 4000, 0.25).pvalue > LIKELY
    assert (top + height <= HEIGHT).all() and (left + width <= WIDTH).all()
    shares = (height * width)[erased] / (HEIGHT * WIDTH)
    assert 0.01 < shares.min() < 0.03 and 0.3 < shares.max() < 0.36
    assert stats.kstest(draws[erased, 4:].ravel(), stats.uniform().cdf).pvalue > LIKELY


def test_operations_and_directions_are_uniform():
    """An operation that is never drawn, or always in one direction, is missing from the recipe."""
    draws = draws_of(Augmentation(randaugment=3), 3000)
    operations, directions = draws[:, :3].astype(int), draws[:, 3:]
    for column in operations.T:
        assert stats.chisquare(np.bincount(column, minlength=14)).pvalue > LIKELY
    assert set(directions.ravel()) == {-1.0, 1.0}
    assert stats.binomtest(int((directions > 0).sum()), directions.size, 0.5).pvalue > LIKELY


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_mixup_draws_its_beta(alpha):
    """One share for all, or the larger of two, mixes less than the alpha on the card says."""
    draws = draws_of(Augmentation(mixup=alpha), 3000)
    assert stats.kstest(draws[:, 0], stats.beta(alpha, alpha).cdf).pvalue > LIKELY
    assert not draws[:, 1:].any()


def test_cutmix_draws_its_beta_before_the_border_cuts():
    """A side in the place of an area pastes half of what it should."""
    draws = draws_of(Augmentation(cutmix=2.0), 3000, 400, 400)
    kept, top, left, height, width = draws.T
    assert np.array_equal(kept, 1 - height * width / 400**2)
    uncut = (top > 0) & (left > 0) & (top + height < 400) & (left + width < 400)
    small = uncut & (kept > 0.75)  # large boxes are cut more often: compare where few are
    expected = stats.beta(2, 2)
    weight = lambda share: expected.pdf(share) * (1 - np.sqrt(1 - share)) ** 2  # noqa: E731 (the chance to be uncut)
    grid = np.linspace(0.75, 1, 2001)
    cumulative = np.cumsum(weight(grid)) / weight(grid).sum()
    assert small.sum() > 100
    assert stats.kstest(kept[small], lambda share: np.interp(share, grid, cumulative)).pvalue > LIKELY


def test_with_both_each_example_draws_which():
    """One of the two that is never drawn is missing from the recipe; one for the whole batch would not be keyed."""
    draws = draws_of(Augmentation(mixup=0.8, cutmix=1.0), 3000)
    pasted = draws[:, 1:].any(axis=1)
    # A cutmix whose box is empty shows as a share of exactly 1
    pasted |= draws[:, 0] == 1.0
    assert stats.binomtest(int(pasted.sum()), 3000, 0.5).pvalue > LIKELY
    assert stats.kstest(draws[~pasted, 0], stats.beta(0.8, 0.8).cdf).pvalue > LIKELY


# ---- mixing ----

MIXES = {"mixup": {"mixup": 0.8}, "cutmix": {"cutmix": 1.0}, "both": {"mixup": 0.8, "cutmix": 1.0}}


@pytest.mark.parametrize("name", MIXES)
def test_pixels_and_labels_have_the_same_shares(name):
    """A label whose share is not that of the pixels teaches a wrong probability in every step."""
    augmentation = Augmentation(**MIXES[name])
    batch = 64
    draws = draws_of(augmentation, batch)
    codes = torch.arange(batch) / 2  # image i is the number i / 2 everywhere, its partner i - 1's
    pixels = codes.double()[:, None, None, None].expand(-1, 3, HEIGHT, WIDTH)
    labels = torch.arange(batch)
    mixed, probabilities = augmentation.mix(pixels, draws, labels, batch)
    assert probabilities.dtype == torch.float32
    torch.testing.assert_close(probabilities.sum(1), torch.ones(batch))
    expected = (probabilities.double() * codes).sum(1)
    torch.testing.assert_close(mixed.mean((1, 2, 3)), expected, atol=1e-5, rtol=0)
    if name == "cutmix":
        own = (mixed == pixels)[:, 0].double().mean((1, 2))
        torch.testing.assert_close(own, probabilities[labels, labels].double(), atol=1e-7, rtol=0)
        assert ((mixed == pixels) | (mixed == pixels.roll(1, 0))).all()
        assert 0 < own.min() < 0.5 < own.max() <= 1


@pytest.mark.parametrize("name", MIXES)
def test_soft_labels_weigh_two_cross_entropies(name):
    """A soft loss that is not lam * CE(a) + (1 - lam) * CE(b) is another objective than mixup's."""
    augmentation = Augmentation(**MIXES[name])
    draws, logits = draws_of(augmentation, 32), torch.randn(32, 5, generator=torch.Generator().manual_seed(0)).double()
    labels = torch.randint(0, 5, (32,), generator=torch.Generator().manual_seed(1))
    _, probabilities = augmentation.mix(images(32), draws, labels, 5)
    partner = labels[[-1, *range(31)]]
    own_share = torch.from_numpy(draws[:, 0])
    expected = own_share * F.cross_entropy(logits, labels, reduction="none") + (1 - own_share) * F.cross_entropy(
        logits, partner, reduction="none"
    )
    torch.testing.assert_close(
        F.cross_entropy(logits, probabilities.double(), reduction="none"), expected, atol=1e-6, rtol=0
    )


def test_mixup_and_cutmix_are_those_of_a_loop():
    """A box of the partner at another place, or of another partner, is a picture for which no label is right."""
    augmentation = Augmentation(mixup=0.8, cutmix=1.0)
    pixels, draws = images(24), draws_of(augmentation, 24)
    mixed, _ = augmentation.mix(pixels, draws, torch.arange(24), 24)
    for i, (kept, *box) in enumerate(draws):
        own, partner = pixels[i].numpy(), pixels[i - 1].numpy()
        top, left, height, width = (int(value) for value in box)
        expected = own.copy() if height * width else kept * own + (1 - kept) * partner
        expected[:, top : top + height, left : left + width] = partner[:, top : top + height, left : left + width]
        np.testing.assert_allclose(mixed[i].numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("name", MIXES)
def test_a_batch_of_one_is_itself(name):
    """The last batch of an epoch often has one row: darkened or lightened by its own mixture, it is no image of its class."""
    augmentation = Augmentation(**MIXES[name])
    pixels = images(1)
    for i in range(20):
        draws = augmentation.draw(np.random.default_rng(i), HEIGHT, WIDTH)[None]
        mixed, probabilities = augmentation.mix(pixels, draws, torch.tensor([2]), 4)
        assert torch.equal(mixed, pixels) and probabilities.tolist() == [[0.0, 0.0, 1.0, 0.0]]


@pytest.mark.parametrize(
    ("labels", "num_labels", "message"),
    [
        (torch.tensor([0, -100, 1]), 3, "from -100 to 1: remove examples without a label"),
        (torch.tensor([0, 3, 1]), 3, "class ids between 0 and 2 (num_labels=3), got labels from 0 to 3"),
        (torch.rand(3, 3), 3, "one class id an example, got labels (3, 3) of torch.float32"),
        (torch.rand(3), 3, "one class id an example, got labels (3,) of torch.float32"),
        (torch.zeros(3, 2, dtype=torch.int64), 3, "got labels (3, 2) of torch.int64"),
        (torch.tensor([0, 1, 1]), None, "pass num_labels"),
    ],
)
@pytest.mark.parametrize("name", MIXES)
def test_labels_that_cannot_be_mixed_are_refused(name, labels, num_labels, message):
    """A row without a label would get its partner's with a share; probabilities read as ids would be all class 0."""
    augmentation = Augmentation(**MIXES[name])
    with pytest.raises(ValueError) as error:
        augmentation.mix(images(3), draws_of(augmentation, 3), labels, num_labels)
    assert message in str(error.value)


# ---- bad input ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop": "random"}, "crop must be one of (None, 'pad', 'resized'), got 'random'"),
        ({"crop": "pad", "padding": -1}, "padding is a whole number, 0 or more, got -1"),
        ({"padding": 1.5}, "padding is a whole number, 0 or more, got 1.5"),
        ({"flip": 1.5}, "flip is a probability, between 0 and 1, got 1.5"),
        ({"flip": float("nan")}, "flip is a probability"),
        ({"erasing": -0.1}, "erasing is a probability, between 0 and 1, got -0.1"),
        ({"scale": (0.9, 0.1)}, "the smaller first, got (0.9, 0.1)"),
        (
            {"scale": (0.5, 1.2)},
            "no crop is larger than the image: above 0 and up to 1, the smaller first, got (0.5, 1.2)",
        ),
        ({"scale": (0.0, 1.0)}, "above 0 and up to 1"),
        ({"scale": (0.5,)}, "scale is (lowest, highest)"),
        ({"ratio": (2.0, 0.5)}, "ratio is (lowest, highest), width / height of the crop"),
        ({"ratio": (0.5, float("inf"))}, "ratio is (lowest, highest)"),
        ({"randaugment": -1}, "randaugment is a whole number, 0 or more, got -1"),
        ({"randaugment": 2, "magnitude": 31}, "magnitude is a whole number, from 0 to 30, got 31"),
        ({"randaugment": 2, "magnitude": -1}, "magnitude is a whole number, from 0 to 30, got -1"),
        ({"mixup": -0.2}, "mixup is the alpha of a Beta distribution, above 0, or 0 for none, got -0.2"),
        ({"cutmix": float("inf")}, "cutmix is the alpha of a Beta distribution"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_once(settings, message):
    """A typing error that is found in the first batch has cost the download and the teacher's loading."""
    with pytest.raises(ValueError) as error:
        Augmentation(**settings)
    assert message in str(error.value)


def test_padding_beyond_the_image_is_refused():
    """A window that lies in the black border shows a label and no image."""
    augmentation = Augmentation(crop="pad", padding=4)
    augmentation.draw(np.random.default_rng(0), 5, 9)
    with pytest.raises(ValueError, match="padding=4 for images of 9 x 4.*choose less than 4"):
        augmentation.draw(np.random.default_rng(0), 9, 4)


@pytest.mark.parametrize(
    "pixels", [torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.rand(2, 1, 8, 8), torch.rand(3, 8, 8)]
)
def test_pixels_of_another_kind_are_refused(pixels):
    """Bytes are 0 to 255: every threshold on the scale [0, 1] would make them white."""
    augmentation = Augmentation(flip=0.5)
    with pytest.raises(ValueError, match=r"pixels must be \(batch, 3, height, width\), floats between 0 and 1, got"):
        augmentation.apply(pixels, draws_of(augmentation, 2))


def test_draws_of_another_augmentation_are_refused():
    """Columns read under other names flip by a colour and crop by an angle, and nothing looks wrong."""
    with pytest.raises(ValueError, match=r"draws must be \(batch, numbers\) = \(2, 1\), got \(2, 2\)"):
        Augmentation(flip=0.5).apply(images(2), draws_of(Augmentation(crop="pad"), 2))
