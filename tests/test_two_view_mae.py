"""Two views of an image in one call: the same loss, gradients, features and checkpoints as the stock models."""

from __future__ import annotations

import copy
import json
import logging
import math
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import launching
from hfkd.models import two_view_mae
from hfkd.models.two_view import two_view_config, two_view_model
from hfkd.models.two_view_mae import CleanEncoder, ViTMAEForPreTraining, weight_distance
from hfkd.objectives import MaskedImages, SelfDistillImages
from hfkd.teachers import ModelTeacher
from hfkd.testing import check_teacher, tiny_vit_mae_config
from hfkd.trainers.distillation import DistillationTrainer


def two_view(seed: int = 0, **config: Any) -> ViTMAEForPreTraining:
    """In float64, with every weight away from its initial value, so that no bias, scale or position is without effect."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = ViTMAEForPreTraining(tiny_vit_mae_config(**config)).double()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def stock_of(ours: Any, **config: Any) -> Any:
    stock = transformers.ViTMAEForPreTraining(tiny_vit_mae_config(**config)).double()
    stock.load_state_dict(ours.state_dict())
    return stock


def a_batch(rows: int = 4, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(rows, 3, 16, 16, generator=generator, dtype=torch.float64)
    return {"pixel_values": pixels, "noise": torch.rand(rows, 16, generator=generator)}


def scored(objective: Any, output: Any, teacher: Any, batch: dict[str, torch.Tensor], config: Any) -> Any:
    objective.build(config, config, None)
    return DistillationTrainer._means(objective(output, teacher, batch), objective.count(batch), 1)


# ---- equality with the stock models ----


@pytest.mark.parametrize("norm_pix_loss", [True, False])
@pytest.mark.parametrize("mask_ratio", [0.75, 0.5])
def test_masked_loss_and_gradients_equal_the_stock_model(mask_ratio, norm_pix_loss):
    """Other patches than the hidden ones in the loss, or pixels normalised otherwise, are another pre-training."""
    config = {"mask_ratio": mask_ratio, "norm_pix_loss": norm_pix_loss}
    ours = two_view(**config)
    stock, batch = stock_of(ours, **config), a_batch()
    loss = scored(MaskedImages(), ours(**batch), None, batch, ours.config)["pretrain_loss"]
    expected = stock(**batch).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    loss.backward(), expected.backward()
    theirs = dict(stock.named_parameters())
    for name, parameter in ours.named_parameters():
        assert parameter.requires_grad == theirs[name].requires_grad
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=0, atol=1e-12, msg=name)


def test_clean_features_equal_a_vit_with_the_same_weights(tmp_path):
    """Shuffled patches, a missing LayerNorm or a hidden patch would distil another state than the one fine-tuned later."""
    ours, batch = two_view(), a_batch()
    ours.save_pretrained(tmp_path)
    vit, report = transformers.ViTModel.from_pretrained(
        tmp_path, add_pooling_layer=False, dtype=torch.float64, output_loading_info=True
    )
    assert not report["missing_keys"]
    found = ours(batch["pixel_values"], clean=True).features
    torch.testing.assert_close(found, vit.eval()(batch["pixel_values"]).last_hidden_state, rtol=0, atol=1e-10)
    shown_in_float32 = ours.float()(batch["pixel_values"], clean=True).features
    torch.testing.assert_close(shown_in_float32, found.float(), rtol=0, atol=1e-4)
    assert not torch.allclose(found[:, 1:], found[:, 1:].flip(1))


def test_one_call_trains_what_the_two_backward_passes_of_the_paper_train():
    """The authors add the gradients of two losses; a clean view without gradients, or scaled by the width, is not theirs."""
    ours, teacher, batch = two_view(), two_view(seed=5), a_batch()
    answer = ModelTeacher(CleanEncoder(teacher.vit), view="")(batch)
    terms = scored(SelfDistillImages(), ours(**batch, clean=True), answer, batch, ours.config)
    sum(terms.values()).backward()

    stock = stock_of(two_view())
    stock(**batch).loss.backward()
    in_order = torch.arange(16.0).expand(4, -1)  # nothing is shuffled
    for model in (stock, teacher):
        model.config.mask_ratio = 0.0  # nothing is hidden
    with torch.no_grad():
        target = teacher.vit(batch["pixel_values"], noise=in_order).last_hidden_state[:, 0]
    clean = stock.vit(batch["pixel_values"], noise=in_order).last_hidden_state[:, 0]
    distance = torch.nn.MSELoss(reduction="sum")(clean, target) / len(target)
    distance.backward()
    assert terms["distill_loss"].item() == pytest.approx(distance.item(), rel=1e-12)
    theirs = dict(stock.named_parameters())
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=0, atol=1e-10, msg=name)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_the_patches_with_the_lowest_noise_stay_visible():
    """Noise that is read the other way round hides a quarter of an image instead of three quarters."""
    batch = a_batch()
    mask = two_view()(**batch).mask
    ranks = batch["noise"].argsort(1).argsort(1)
    assert torch.equal(mask, (ranks >= 4).to(mask.dtype))


# ---- parts that are left out ----


def test_a_view_that_is_not_asked_for_is_not_computed():
    """Round 0 would pay for a pass over the whole image, and the ablation for the decoder."""
    ours, batch, seen = two_view(), a_batch(), []
    ours.vit.layers[0].register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    ours.decoder.register_forward_hook(lambda module, inputs, output: seen.append("decoder"))
    masked = ours(**batch)
    assert seen == [5, "decoder"] and masked.features is None and masked.logits.shape == (4, 16, 48)
    seen.clear()
    clean = ours(batch["pixel_values"], clean=True)
    assert seen == [17] and clean.logits is None and clean.mask is None and clean.features.shape == (4, 17, 32)
    seen.clear()
    both = ours(**batch, clean=True)
    assert sorted(map(str, seen)) == ["17", "5", "decoder"]
    assert torch.equal(both.logits, masked.logits) and torch.equal(both.features, clean.features)


def test_without_both_it_is_the_parents_own_forward():
    """A user's reconstruction script would break on a trained student."""
    ours = two_view()
    stock, pixels = stock_of(ours), a_batch()["pixel_values"]
    found = []
    for model in (ours, stock):
        torch.manual_seed(3)
        found.append(model(pixels))
    assert torch.equal(found[0].logits, found[1].logits) and torch.equal(found[0].loss, found[1].loss)


def test_weight_distance_is_the_squared_norm_and_pulls_towards_the_anchor():
    """A distance over frozen or decoder weights, or not squared, is another regulariser."""
    ours, other = two_view(), two_view(seed=5)
    distance = ours(a_batch()["pixel_values"], anchor=other.vit.state_dict()).weight_distance
    pairs = [(p, dict(other.vit.named_parameters())[n]) for n, p in ours.vit.named_parameters() if p.requires_grad]
    lists = [(p.flatten().tolist(), q.flatten().tolist()) for p, q in pairs]
    expected = math.fsum((a - b) ** 2 for ours, theirs in lists for a, b in zip(ours, theirs, strict=True))
    assert distance.item() == pytest.approx(expected, rel=1e-10)
    distance.backward()
    for parameter, anchor in pairs:
        torch.testing.assert_close(parameter.grad, 2 * (parameter - anchor), rtol=1e-12, atol=1e-12)
    assert all(parameter.grad is None for parameter in [*ours.decoder.parameters(), *other.parameters()])
    assert weight_distance(ours.vit, ours.vit.state_dict()).item() == 0


# ---- the teacher ----


def test_the_teacher_of_a_round_sees_the_whole_image():
    """A bare ViTMAEModel hides three quarters at random: the target would be another one in every step."""
    ours, batch = two_view(), a_batch()
    teacher = ModelTeacher(CleanEncoder(copy.deepcopy(ours.vit)), view="")
    check_teacher(teacher, batch)
    expected = ours(batch["pixel_values"], clean=True).features
    torch.testing.assert_close(teacher(batch).features, expected.detach(), rtol=0, atol=1e-12)
    pooled = ModelTeacher(CleanEncoder(copy.deepcopy(ours.vit), pool=lambda states: states[:, 0]), view="")
    torch.testing.assert_close(pooled(batch).features, expected[:, 0].detach(), rtol=0, atol=1e-12)


# ---- positions ----


def test_a_new_model_has_the_position_embeddings_of_mae():
    """transformers leaves them at zero in a new model and never trains them: all patches would be the same place."""
    model = ViTMAEForPreTraining(tiny_vit_mae_config())
    for positions in (model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed):
        width = positions.shape[-1]
        assert not positions[0, 0].any()
        for row in range(4):
            for column in range(4):
                expected = []
                for place in (column, row):  # the published code mixed up the two, and its weights rely on it
                    angles = [place / 10_000 ** (4 * i / width) for i in range(width // 4)]
                    expected += [*map(math.sin, angles), *map(math.cos, angles)]
                torch.testing.assert_close(positions[0, 1 + 4 * row + column], torch.tensor(expected))
    assert model.vit.embeddings.cls_token.any() and model.decoder.mask_token.any()


def test_position_embeddings_are_frozen_also_after_loading(tmp_path):
    """transformers makes every loaded parameter trainable: further pre-training would move what MAE keeps fixed."""
    two_view().save_pretrained(tmp_path)
    models = [ViTMAEForPreTraining(tiny_vit_mae_config()), two_view_model(str(tmp_path))]
    models.append(ViTMAEForPreTraining.from_pretrained(tmp_path, output_loading_info=True)[0])
    for model in models:
        frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        assert frozen == {"vit.embeddings.position_embeddings", "decoder.decoder_pos_embed"}


def test_a_model_without_positions_is_warned_of(tmp_path):
    """Started from transformers' own class, a pre-training that cannot see places looks only a little worse."""
    plain = transformers.ViTMAEForPreTraining(tiny_vit_mae_config())
    plain.decoder.decoder_pos_embed.data.zero_()
    plain.save_pretrained(tmp_path / "zeros")
    two_view().save_pretrained(tmp_path / "sound")
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())
    two_view_mae.logger.addHandler(handler)
    try:
        two_view_model(str(tmp_path / "sound"))
        assert not lines
        two_view_model(str(tmp_path / "zeros"))
    finally:
        two_view_mae.logger.removeHandler(handler)
    assert "all zero and frozen" in lines[0]


# ---- checkpoints ----


def test_saved_as_the_plain_model_that_it_is(tmp_path):
    """A student that only loads where hfkd is installed is no use to anybody on the Hub."""
    ours = two_view().float()
    stock = transformers.ViTMAEForPreTraining(tiny_vit_mae_config())
    stock.load_state_dict(ours.state_dict())
    ours.save_pretrained(tmp_path / "ours")
    stock.save_pretrained(tmp_path / "stock")
    assert {p.name for p in (tmp_path / "ours").iterdir()} == {p.name for p in (tmp_path / "stock").iterdir()}
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("ours", "stock")]
    assert configs[0] == configs[1] and configs[0]["architectures"] == ["ViTMAEForPreTraining"]
    saved, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "stock"))
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in saved)
    code = tmp_path / "loads.py"
    code.write_text(
        "import sys; from transformers import AutoModelForPreTraining as Auto\n"
        f"model = Auto.from_pretrained({str(tmp_path / 'ours')!r})\n"
        "assert not any(name.split('.')[0] == 'hfkd' for name in sys.modules)\n"
        "print(type(model).__module__, type(model).__name__)"
    )
    run = launching.run(code, log=tmp_path / "log")
    assert run.returncode == 0, run.stderr
    assert run.stderr.split()[-2:] == ["transformers.models.vit_mae.modeling_vit_mae", "ViTMAEForPreTraining"]


def test_exported_to_a_classifier_with_all_of_its_encoder(tmp_path):
    """Names in files are not the modules' names: an encoder that is not found is fine-tuned from random weights."""
    ours, pixels = two_view().float(), a_batch()["pixel_values"].float()
    ours.save_pretrained(tmp_path)
    classifier, report = transformers.ViTForImageClassification.from_pretrained(
        tmp_path, num_labels=3, output_loading_info=True
    )
    assert set(report["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    assert all(name.startswith("decoder.") for name in report["unexpected_keys"])
    assert not report["mismatched_keys"]
    expected = ours(pixels, clean=True).features
    torch.testing.assert_close(classifier.eval().vit(pixels).last_hidden_state, expected, rtol=0, atol=1e-6)


def test_start_weights_load_whole_in_float32_and_with_the_paper_settings(tmp_path):
    """A bfloat16 student rounds its updates away; without norm_pix_loss the masked loss is not the paper's."""
    stock = stock_of(two_view(norm_pix_loss=False), norm_pix_loss=False)
    stock.bfloat16().save_pretrained(tmp_path)
    model = two_view_model(str(tmp_path), norm_pix_loss=True, mask_ratio=0.5)
    assert type(model) is ViTMAEForPreTraining
    assert model.config.norm_pix_loss is True and model.config.mask_ratio == 0.5
    state = model.state_dict()
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert all(torch.equal(state[name], value.float()) for name, value in stock.state_dict().items())
    batch = a_batch()
    assert model(**{**batch, "pixel_values": batch["pixel_values"].float()}).mask.sum(1).tolist() == [8.0] * 4


# ---- errors ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 18}, "image_size 18 is not a multiple of patch_size 4: choose image_size=16"),
        ({"mask_ratio": 0.97}, "mask_ratio 0.97 leaves 0 of 16 patches visible"),
        ({"mask_ratio": 1.0}, "mask_ratio 1.0 leaves 0 of 16"),
        ({"mask_ratio": 0.0}, "mask_ratio 0.0 leaves 16 of 16"),
        ({"mask_ratio": -0.5}, "mask_ratio -0.5 leaves 24 of 16"),
        ({"image_size": [16, 32]}, "must be one number each"),
    ],
)
def test_patches_that_cannot_be_masked_are_refused_before_any_weights_are_read(tmp_path, settings, message):
    """Nothing to see gives an encoder of one CLS token, nothing to guess a division by zero: both only after a while."""
    tiny_vit_mae_config(**settings).save_pretrained(tmp_path / "saved")
    tiny_vit_mae_config().save_pretrained(tmp_path / "sound")
    with pytest.raises(ValueError, match=message):
        two_view_config(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match=message):
        two_view_config(str(tmp_path / "sound"), **settings)
    with pytest.raises(ValueError, match=message):
        ViTMAEForPreTraining(tiny_vit_mae_config(**settings))


def test_images_of_another_size_are_refused_with_both_sizes():
    """Twice the size has four times the patches, which have no positions."""
    pixels = torch.randn(2, 3, 32, 32)
    for views in ({"clean": True}, {"noise": torch.rand(2, 64)}):
        with pytest.raises(ValueError, match=r"(?s)32.*16"):
            two_view().float()(pixels, **views)


def test_another_vision_model_is_refused_with_the_ones_there_are(tmp_path):
    """Loaded into ViTMAE's class, a BEiT would start from random weights."""
    transformers.BeitConfig(hidden_size=32, num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"'beit'.*roberta, xlm-roberta, bert, vit_mae"):
        two_view_model(str(tmp_path))


# ---- the paper's size ----


def test_one_step_of_self_distillation_at_the_size_of_vit_mae_base():
    """Tiny models hide what depends on width, 196 patches or the decoder's 768 pixels. Depth is cut to 1 of 12 and 8."""
    torch.manual_seed(0)
    config = transformers.ViTMAEConfig(num_hidden_layers=1, decoder_num_hidden_layers=1, norm_pix_loss=True)
    assert (config.image_size, config.patch_size, config.hidden_size, config.mask_ratio) == (224, 16, 768, 0.75)
    student = ViTMAEForPreTraining(config).train()
    teacher = ModelTeacher(CleanEncoder(ViTMAEForPreTraining(config).vit), view="")
    batch = {"pixel_values": torch.randn(2, 3, 224, 224), "noise": torch.rand(2, 196)}
    output = student(**batch, clean=True)
    assert (output.mask == 0).sum(1).tolist() == [49, 49]
    means = scored(SelfDistillImages(), output, teacher(batch), batch, config)
    sum(means.values()).backward()
    # Normalised pixels have variance 1, and an untrained decoder answers little; normalised states are up to 2 * 768 apart
    assert 0.9 < means["pretrain_loss"].item() < 1.6
    assert 100 < means["distill_loss"].item() < 4 * 768
    assert all(bool(torch.isfinite(p.grad).all()) for p in student.parameters() if p.grad is not None)
