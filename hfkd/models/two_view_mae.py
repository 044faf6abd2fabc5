"""A ViT-MAE that sees two views of an image in one call: with most of its patches hidden, and whole.

As for texts (`hfkd.models.two_view`), everything that touches trainable parameters happens in ONE call of the module that
DDP or FSDP wraps. The two views have different numbers of tokens, so that the encoder runs twice inside that call.

Only the published image size is read: no interpolation of position embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput, logging

logger = logging.get_logger(__name__)


@dataclass
class TwoViewImageOutput(ModelOutput):
    """logits: (batch, patches, patch pixels), the decoder's guess at every patch. mask: (batch, patches), 1 where a patch
    was hidden. features: (batch, 1 + patches, hidden) of the whole image, patches in their own order. weight_distance: one
    number."""

    logits: Tensor | None = None
    mask: Tensor | None = None
    features: Tensor | None = None
    weight_distance: Tensor | None = None


class ViTMAEForPreTraining(transformers.ViTMAEForPreTraining):
    """Has its parent's name on purpose: `save_pretrained` writes it into config.json, and a saved student must load without
    hfkd.

    pixel_values: (batch, channels, height, width). noise: (batch, patches); the patches with the lowest values stay
    visible, a fixed number, and the others are hidden. clean: answer `features` of the whole image too. anchor: values of
    the encoder's trainable parameters by name; answers `weight_distance`, the squared L2 distance to them.
    What is not asked for is not computed; with none of the three this is the parent's own forward (which draws its own
    noise from the global generator).

    Raises ValueError for an image that patches do not divide, a mask ratio that hides every patch or none, and pixels of
    another size than the model's.
    """

    def __init__(self, config: Any):
        refuse_wrong_patches(config)
        super().__init__(config)
        if self.device.type != "meta":  # there from_pretrained fills everything
            self._draw_tokens_and_positions()

    @torch.no_grad()
    def _draw_tokens_and_positions(self) -> None:
        """As MAE does. transformers 5.23 leaves all four at zero in a new model, and the positions are never trained, so
        that no patch could be told from another."""
        for token in (self.vit.embeddings.cls_token, self.decoder.mask_token):
            token.normal_(std=self.config.initializer_range)
        for positions in self._positions():
            positions.copy_(sine_positions(math.isqrt(count_patches(self.config)), positions.shape[-1]))

    def _positions(self) -> tuple[nn.Parameter, nn.Parameter]:
        return self.vit.embeddings.position_embeddings, self.decoder.decoder_pos_embed

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, but position embeddings stay frozen: loading makes every parameter trainable (5.23)."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        for positions in model._positions():
            positions.requires_grad_(False)
            if not bool(positions.any()):
                logger.warning(
                    f"{args[0]}: position embeddings are all zero and frozen, so this model cannot tell patches apart. Was it "
                    "made new by transformers' own class? Start from hfkd.models.two_view_mae.ViTMAEForPreTraining(config)"
                )
        return loaded

    def forward(
        self,
        pixel_values: Tensor,
        noise: Tensor | None = None,
        clean: bool = False,
        anchor: Mapping[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        if noise is None and not clean and anchor is None:
            return super().forward(pixel_values, **kwargs)
        pixel_values = pixel_values.to(self.dtype)
        output = TwoViewImageOutput()
        if noise is not None:
            visible = self.vit(pixel_values, noise=noise, **kwargs)
            output["logits"] = self.decoder(visible.last_hidden_state, visible.ids_restore).logits
            output["mask"] = visible.mask
        if clean:
            output["features"] = clean_features(self.vit, pixel_values)
        if anchor is not None:
            output["weight_distance"] = weight_distance(self.vit, anchor)
        return output


class CleanEncoder(nn.Module):
    """The encoder of a ViT-MAE, asked about whole images: the teacher of a round. (ViTMAEModel itself hides patches.)

    encoder: a ViTMAEModel. pool: what to keep of the answer, (batch, 1 + patches, hidden) -> (batch, hidden); None keeps all.
    """

    def __init__(self, encoder: Any, pool: Callable[[Tensor], Tensor] | None = None):
        super().__init__()
        self.encoder = encoder
        self.config = encoder.config
        self.pool = pool

    def forward(self, pixel_values: Tensor) -> BaseModelOutput:
        features = clean_features(self.encoder, pixel_values)
        return BaseModelOutput(last_hidden_state=features if self.pool is None else self.pool(features))


def clean_features(encoder: Any, pixel_values: Tensor) -> Tensor:
    """(batch, channels, height, width) -> (batch, 1 + patches, hidden): nothing hidden, nothing shuffled, after the final
    LayerNorm. What `transformers.ViTModel` answers with the same weights."""
    embeddings = encoder.embeddings
    if tuple(pixel_values.shape[-2:]) != tuple(embeddings.image_size):
        raise ValueError(
            f"images of {tuple(pixel_values.shape[-2:])} pixels for a model of {tuple(embeddings.image_size)}: resize them"
        )
    patches = embeddings.patch_embeddings(pixel_values)
    tokens = torch.cat([embeddings.cls_token.expand(len(patches), -1, -1), patches], dim=1)
    tokens = tokens + embeddings.position_embeddings
    for layer in encoder.layers:
        tokens = layer(tokens)
    return encoder.layernorm(tokens)


def weight_distance(encoder: nn.Module, anchor: Mapping[str, Tensor]) -> Tensor:
    """Sum over the trainable parameters of ||parameter - anchor||^2; a 0-dimensional tensor."""
    named = [(name, weight) for name, weight in encoder.named_parameters() if weight.requires_grad]
    return torch.stack([(weight - anchor[name]).square().sum() for name, weight in named]).sum()


def sine_positions(grid: int, width: int) -> Tensor:
    """The fixed embeddings of MAE (He et al. 2021), (1, 1 + grid * grid, width): zeros for CLS, then for each patch, row by
    row, [sin(column), cos(column), sin(row), cos(row)], each at width / 4 frequencies from 1 down to 1 / 10,000.

    Raises ValueError for a width that is not a multiple of 4.
    """
    if width % 4:
        raise ValueError(f"sine positions need a width that is a multiple of 4, got {width}: change the hidden size")
    frequencies = 10_000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)  # (grid, width / 2)
    columns, rows = waves.expand(grid, -1, -1), waves[:, None].expand(-1, grid, -1)
    patches = torch.cat([columns, rows], dim=-1).flatten(0, 1)
    return torch.cat([torch.zeros(1, width), patches])[None]


def count_patches(config: Any) -> int:
    return (config.image_size // config.patch_size) ** 2


def refuse_wrong_patches(config: Any) -> None:
    """Raises ValueError where the patches do not divide the image, or masking leaves nothing to see or nothing to guess."""
    size, patch = config.image_size, config.patch_size
    if not isinstance(size, int) or not isinstance(patch, int):
        raise ValueError(f"image_size {size} and patch_size {patch} must be one number each: ViT-MAE has square images")
    if size % patch:
        raise ValueError(
            f"image_size {size} is not a multiple of patch_size {patch}: choose image_size={size - size % patch or patch}"
        )
    patches = count_patches(config)
    visible = int(patches * (1 - config.mask_ratio))  # as ViTMAE counts them
    if not 0 < visible < patches:
        raise ValueError(
            f"mask_ratio {config.mask_ratio} leaves {visible} of {patches} patches visible: it must hide some and leave some, "
            f"so choose above 0 and at most {1 - 1 / patches:.4g}"
        )
