"""Images with hidden patches: what the noise is a function of, and the losses against slow loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import transformers
from torch.utils.data import DataLoader

from hfkd.data.masked_images import MaskedImageCollator
from hfkd.data.pixels import PixelView
from hfkd.objectives import MaskedImages, SelfDistillImages
from hfkd.objectives.masked_images import hidden_patch_error, patches_of
from hfkd.outputs import TeacherOutput
from hfkd.testing import check_objective, masked_image_case, tiny_vit_mae_config

VIEW = PixelView((16, 16), (0.5, 0.4, 0.3), (0.5, 0.25, 0.2))


def image_rows(count: int = 6) -> list[dict]:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    return [{"pixels": image, "label": i % 2, "example_id": i} for i, image in enumerate(pixels)]


def noise_of(rows: list[dict], seed: int = 0, round: int = 0, epoch: int = 0) -> torch.Tensor:
    collator = MaskedImageCollator(VIEW, 4, seed=seed)
    collator.set_position(round=round, epoch=epoch)
    return collator(rows)["noise"]


# ---- the collator ----


def test_noise_is_a_ranking_of_every_patch_without_ties():
    """Ties are broken differently by every device, and then two machines hide different patches."""
    noise = noise_of(image_rows())
    assert noise.shape == (6, 16) and noise.dtype == torch.float32
    assert torch.equal(noise.sort(1).values, torch.arange(16).expand(6, -1) / 16)


def test_noise_depends_on_the_example_and_not_on_its_batch():
    """Otherwise two processes, or a resumed run, hide other patches than one that was never stopped."""
    rows = image_rows()
    whole = noise_of(rows)
    assert torch.equal(noise_of(rows[::-1]), whole.flip(0))
    assert torch.equal(noise_of(rows[3:5]), whole[3:5])
    assert len({tuple(row) for row in whole.tolist()}) == 6


@pytest.mark.parametrize("change", [{"seed": 1}, {"round": 1}, {"epoch": 1}])
def test_noise_is_drawn_anew_for_every_seed_round_and_epoch(change):
    """The same patches in every epoch would teach the encoder to fill exactly these."""
    assert not torch.equal(noise_of(image_rows(), **change), noise_of(image_rows()))


def test_no_patch_is_hidden_more_often_than_another():
    """A draw that favours the corners trains the middle of the image only."""
    rows = [{**row, "example_id": i} for i, row in enumerate(image_rows(1) * 4000)]
    hidden = (noise_of(rows) >= 0.25).float().mean(0)
    assert (hidden - 0.75).abs().max() < 5 * math.sqrt(0.75 * 0.25 / 4000)


def test_the_batch_holds_the_clean_pixels_in_the_models_normalisation():
    """Pixels that were normalised twice, or an image of the row beside it, are another picture to reconstruct."""
    rows, collator = image_rows(), MaskedImageCollator(VIEW, 4)
    raw = collator(rows)
    assert raw["pixels"].dtype == torch.uint8 and raw["labels"].tolist() == [0, 1, 0, 1, 0, 1]
    shown = collator.on_device(raw)
    assert torch.equal(shown["noise"], raw["noise"]) and "pixels" not in shown
    for i, row in enumerate(rows):
        for c in range(3):
            expected = (row["pixels"][:, :, c] / 255 - VIEW.mean[c]) / VIEW.std[c]
            np.testing.assert_allclose(shown["pixel_values"][i, c].numpy(), expected, atol=1e-5)


def test_evaluation_hides_the_same_patches_in_every_epoch():
    """Masks that move with the epoch make the eval loss a random walk."""
    collator = MaskedImageCollator(VIEW, 4, seed=3)
    collator.set_position(round=2, epoch=5)
    held = collator.for_evaluation()
    assert torch.equal(held(image_rows())["noise"], noise_of(image_rows(), seed=3))
    collator.set_position(round=2, epoch=6)
    assert torch.equal(held(image_rows())["noise"], noise_of(image_rows(), seed=3))


def test_workers_follow_the_position():
    """Persistent workers keep a copy of the collator: they would hide the same patches in every epoch."""
    collator = MaskedImageCollator(VIEW, 4)
    loader = DataLoader(image_rows(), 6, collate_fn=collator, num_workers=1, persistent_workers=True)
    for epoch in (0, 1):
        collator.set_position(round=0, epoch=epoch)
        assert torch.equal(next(iter(loader))["noise"], noise_of(image_rows(), epoch=epoch))


def test_the_clean_collator_draws_nothing():
    """Cached answers belong to images that are the same in every epoch."""
    clean = MaskedImageCollator(VIEW, 4).clean()
    assert clean.view == "plain" and "noise" not in clean(image_rows())
    both = [c.on_device(c(image_rows()))["pixel_values"] for c in (clean, MaskedImageCollator(VIEW, 4))]
    assert torch.equal(*both)


def test_sizes_that_patches_do_not_divide_are_refused():
    """A border of pixels that belongs to no patch would never be seen."""
    with pytest.raises(ValueError, match="16 x 16 pixels cannot be cut into patches of 5"):
        MaskedImageCollator(VIEW, 5)
    with pytest.raises(ValueError, match="patches of 0"):
        MaskedImageCollator(VIEW, 0)


def test_rows_without_a_number_are_refused():
    """Without a name an example's masks cannot be drawn again after a resume."""
    with pytest.raises(KeyError, match="example_id"):
        MaskedImageCollator(VIEW, 4)([{"pixels": row["pixels"]} for row in image_rows()])


# ---- the objectives ----


def built(objective, case):
    objective.build(case.student_config, case.teacher_config, None)
    return objective


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_masked_loss_equals_a_slow_loop(norm_pix_loss):
    """A mean that counts visible patches, or variance over the image instead of the patch, is easier and teaches less."""
    case = masked_image_case(torch.arange(8))
    case.student_config.norm_pix_loss = norm_pix_loss
    found = built(MaskedImages(), case)(case.student, None, case.batch)["pretrain_loss"]
    for i in range(8):
        errors = []
        for k in range(4):
            top, left = 2 * (k // 2), 2 * (k % 2)
            image = case.batch["pixel_values"][i].double()
            patch = [image[c, top + y, left + x].item() for y in range(2) for x in range(2) for c in range(3)]
            if norm_pix_loss:
                mean = sum(patch) / 12
                variance = sum((value - mean) ** 2 for value in patch) / 11
                patch = [(value - mean) / math.sqrt(variance + 1e-6) for value in patch]
            if case.student.mask[i, k]:
                guess = case.student.logits[i, k].tolist()
                errors.append(sum((a - b) ** 2 for a, b in zip(guess, patch, strict=True)) / 12)
        assert len(errors) == 3
        assert found[i].item() == pytest.approx(sum(errors) / 3, rel=1e-5)


def test_patches_are_ordered_as_transformers_orders_them():
    """Rows and columns swapped, the decoder learns a transposed picture."""
    pixels = torch.randn(2, 3, 16, 16)
    stock = transformers.ViTMAEForPreTraining(tiny_vit_mae_config())
    assert torch.equal(patches_of(pixels, 4), stock.patchify(pixels))


def test_the_distance_is_summed_over_the_width_and_not_averaged():
    """Averaged over the hidden dimension, the paper's loss would be 768 times smaller."""
    case = masked_image_case(torch.arange(8), width=6)
    found = built(SelfDistillImages(), case)(case.student, case.teacher, case.batch)["distill_loss"]
    ours, theirs = case.student.features[:, 0], case.teacher.features[:, 0]
    torch.testing.assert_close(found, 6 * torch.nn.functional.mse_loss(ours, theirs, reduction="none").mean(-1))


@pytest.mark.parametrize("feature", ["cls", "mean"])
def test_a_teacher_that_was_pooled_before_is_compared_as_it_is(feature):
    """A cached vector that is pooled again would be a single number of it."""
    case = masked_image_case(torch.arange(8))
    objective = built(SelfDistillImages(feature), case)
    expected = objective(case.student, case.teacher, case.batch)["distill_loss"]
    pooled = TeacherOutput(features=objective.pool(case.teacher.features, torch.ones(8, 5)))
    assert pooled.features.shape == (8, 6)
    assert torch.equal(objective(case.student, pooled, case.batch)["distill_loss"], expected)


def test_matching_predictions_equals_a_slow_loop_over_the_hidden_patches():
    """Visible patches are reconstructed almost for free, and would hide what the decoders disagree about."""
    case = masked_image_case(torch.arange(8))
    found = built(SelfDistillImages(matching="predictions"), case)(case.student, case.teacher, case.batch)
    for i in range(8):
        hidden = [k for k in range(4) if case.student.mask[i, k]]
        squares = [((case.student.logits[i, k] - case.teacher.logits[i, k]) ** 2).mean().item() for k in hidden]
        assert found["distill_loss"][i].item() == pytest.approx(sum(squares) / 3, rel=1e-6)
    same = hidden_patch_error(case.student.logits, case.student.logits, case.student.mask)
    assert not same.any()


def test_matching_weights_counts_once_whatever_the_batch_size():
    """Added up over examples, the pull to the teacher would grow with the batch."""
    for rows in (2, 8):
        case = masked_image_case(torch.arange(rows))
        objective = built(SelfDistillImages(matching="weights"), case)
        values = objective(case.student, None, case.batch)["distill_loss"]
        assert (values.sum() / objective.count(case.batch)["distill_loss"]).item() == case.student.weight_distance


VARIANTS = [
    *({"feature": feature} for feature in ("cls", "mean", "tokens")),
    *({"feature": feature, "pretrain_loss": False} for feature in ("cls", "tokens")),
    {"matching": "predictions"},
    {"matching": "predictions", "pretrain_loss": False},
    {"matching": "weights"},
]


@pytest.mark.parametrize("settings", VARIANTS, ids=lambda settings: " ".join(map(str, settings.values())))
def test_every_variant_keeps_the_contract(settings):
    """A feature that mixes rows or trains the teacher would still lower the loss."""
    check_objective(SelfDistillImages(**settings), masked_image_case)


@pytest.mark.parametrize("feature", ["cls", "tokens"])
def test_units_are_counted_before_the_pixels_are_on_the_device(feature):
    """The trainer divides by the units of the whole step before it has prepared a single batch."""
    config = tiny_vit_mae_config()
    objective = SelfDistillImages(feature)
    objective.build(config, config, None)
    collator = MaskedImageCollator(VIEW, 4)
    raw = collator(image_rows())
    expected = {"pretrain_loss": 6, "distill_loss": 6 * (17 if feature == "tokens" else 1)}
    for batch in (raw, collator.on_device(raw)):
        assert {name: int(count) for name, count in objective.count(batch).items()} == expected


def test_wrong_settings_are_refused():
    """Each of these would train something that nobody asked for."""
    with pytest.raises(ValueError, match="matching must be one of features, predictions, weights, got 'logits'"):
        SelfDistillImages(matching="logits")
    with pytest.raises(ValueError, match="feature must be one of cls, mean, tokens, got 'last'"):
        SelfDistillImages("last")
    with pytest.raises(ValueError, match="only copies the teacher"):
        SelfDistillImages(pretrain_loss=False, matching="weights")
    with pytest.raises(ValueError, match="'vit'.*two_view_model"):
        MaskedImages().build(transformers.ViTConfig(), None, None)
    wide = tiny_vit_mae_config(hidden_size=64)
    with pytest.raises(ValueError, match="hidden size is 32, the teacher's 64"):
        SelfDistillImages().build(tiny_vit_mae_config(), wide, None)
    case = masked_image_case(torch.arange(8))
    for settings in ({}, {"matching": "predictions"}):
        with pytest.raises(ValueError, match="needs a teacher"):
            built(SelfDistillImages(**settings), case)(case.student, TeacherOutput(), case.batch)
