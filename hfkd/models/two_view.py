"""Masked models that see two views of an input in one call: the corrupted one and the clean one.

Everything that touches trainable parameters must happen in ONE call of the module that DDP or FSDP wraps: a second
call leaves gradients unsynchronised. So the forward here takes the masked input, the positions that carry loss and the
clean input together, runs the encoder once over both, and runs the vocabulary-sized head on the masked positions only.

Each class has its parent's name on purpose: `save_pretrained` writes the class name into config.json, and a saved
student must load as the plain model it is, without hfkd. Images: `hfkd.models.two_view_mae`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.utils import ModelOutput

from hfkd.models.two_view_mae import ViTMAEForPreTraining, refuse_wrong_patches


@dataclass
class TwoViewOutput(ModelOutput):
    """logits: (positions, vocabulary) at the masked positions. features: (batch, tokens, hidden) of the clean input."""

    logits: Tensor | None = None
    features: Tensor | None = None


class TwoViews:
    """Mixin over a masked language model of transformers. A subclass names its head's attribute.

    input_ids: (batch, tokens), corrupted. clean_input_ids: (batch, tokens). masked_positions: (positions,) indices into
    the flattened (batch x tokens) grid. Without masked_positions the masked view and the head are skipped, without
    clean_input_ids the clean view is; without both, this is the parent's own forward.
    """

    head: str

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        masked_positions: Tensor | None = None,
        clean_input_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if masked_positions is None and clean_input_ids is None:
            extra = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
            return super().forward(input_ids, attention_mask, **extra, **kwargs)  # type: ignore[misc]
        views = [
            ids for ids in (input_ids if masked_positions is not None else None, clean_input_ids) if ids is not None
        ]
        hidden = self._encode(views, attention_mask, token_type_ids, **kwargs)
        logits = None
        if masked_positions is not None:
            # index_select, not a boolean mask: the shape is known beforehand, so the host need not wait for the device
            masked_hidden = hidden[: len(views[0])].flatten(0, 1).index_select(0, masked_positions)
            logits = getattr(self, self.head)(masked_hidden)
        features = None if clean_input_ids is None else hidden[-len(clean_input_ids) :]
        return TwoViewOutput(logits=logits, features=features)

    def _encode(
        self, views: list[Tensor], attention_mask: Tensor | None, token_type_ids: Tensor | None, **kwargs: Any
    ) -> Tensor:
        def repeated(tensor: Tensor | None) -> Tensor | None:
            return tensor if tensor is None or len(views) == 1 else torch.cat([tensor, tensor])

        inputs = {"attention_mask": repeated(attention_mask), "token_type_ids": repeated(token_type_ids), **kwargs}
        inputs = {name: value for name, value in inputs.items() if value is not None}
        encoder: nn.Module = self.base_model  # type: ignore[attr-defined]
        return encoder(torch.cat(views) if len(views) > 1 else views[0], **inputs).last_hidden_state


class RobertaForMaskedLM(TwoViews, transformers.RobertaForMaskedLM):
    head = "lm_head"


class XLMRobertaForMaskedLM(TwoViews, transformers.XLMRobertaForMaskedLM):
    head = "lm_head"


class BertForMaskedLM(TwoViews, transformers.BertForMaskedLM):
    head = "cls"


TWO_VIEWS: dict[str, Any] = {
    "roberta": RobertaForMaskedLM,
    "xlm-roberta": XLMRobertaForMaskedLM,
    "bert": BertForMaskedLM,
    "vit_mae": ViTMAEForPreTraining,
}

SOURCE_OPTIONS = ("revision", "token", "cache_dir", "subfolder", "local_files_only", "force_download")


def two_view_config(name_or_path: str, **kwargs: Any) -> Any:
    """The configuration of start weights that the rounds can train: cheap, so a wrong id or architecture fails early.

    Raises ValueError for an architecture without a two-view form and for patches that cannot be masked, OSError for an id
    that cannot be reached.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(name_or_path, **kwargs)
    except OSError as error:
        if Path(name_or_path).is_dir():
            raise  # transformers names the file that is missing
        raise OSError(
            f"model {name_or_path!r} is neither a local folder nor reachable on the Hub. Without a network: give a local "
            "folder with --model_name_or_path, leave the flag out (the recipe's own start), or fill the Hugging Face cache "
            f"beforehand (hf download {name_or_path})"
        ) from error
    if config.model_type not in TWO_VIEWS:
        raise ValueError(
            f"{name_or_path} is a {config.model_type!r} model; self-distillation has a two-view form for "
            f"{', '.join(TWO_VIEWS)} (a new one for texts is three lines in hfkd/models/two_view.py)"
        )
    if config.model_type == "vit_mae":
        refuse_wrong_patches(config)
    return config


def two_view_model(name_or_path: str, **kwargs: Any) -> Any:
    """Load a masked language model or a ViT-MAE (Hub id or folder) that the rounds of self-distillation can train.

    In float32: a bfloat16 checkpoint would otherwise train in bfloat16, and mixed precision wants float32 weights.
    `kwargs`: where to load from (revision, token, ...), and changes of the configuration (num_hidden_layers=2, say; for
    a ViT-MAE norm_pix_loss=True, which the paper has and the class's default is not, and mask_ratio).
    Raises as `two_view_config` does.
    """
    config = two_view_config(name_or_path, **kwargs)
    source = {name: value for name, value in kwargs.items() if name in SOURCE_OPTIONS}
    kind = TWO_VIEWS[config.model_type]
    return kind.from_pretrained(name_or_path, config=config, dtype=torch.float32, use_safetensors=True, **source)
