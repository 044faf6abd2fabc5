"""Asking one model: which columns it reads, what it answers beyond logits."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from hfkd.models.projections import answer_with_query_key_value, count_attention_layers
from hfkd.outputs import Batch, TeacherOutput

logger = logging.get_logger(__name__)
TOKEN_INPUTS = frozenset({"input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds", "bbox"})
SAME_TOKENS = ("clean_",)  # views whose tokens lie where the shared view's do, so that they share its mask


def forward_inputs(model: nn.Module) -> tuple[str, ...]:
    """What its forward takes, but for labels: a teacher needs no loss of its own."""
    return tuple(name for name in inspect.signature(without_adapter(model).forward).parameters if name != "labels")


def without_adapter(model: Any) -> Any:
    """The transformers model inside a compiled model or a PeftModel, adapter layers included; any other as it is."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def chosen_columns(available: Iterable[str], inputs: Sequence[str], view: str) -> dict[str, str]:
    """For each input the column it comes from: the view's own, else the shared one where that fits the view's tokens."""
    columns = set(available)
    own_tokens = f"{view}input_ids" in columns and view not in SAME_TOKENS
    chosen = {}
    for name in inputs:
        if f"{view}{name}" in columns:
            chosen[name] = f"{view}{name}"
        elif name in columns and not (own_tokens and name in TOKEN_INPUTS):
            chosen[name] = name
    return chosen


def inputs_of(batch: Batch, inputs: Sequence[str], view: str) -> dict[str, Any]:
    return {name: batch[column] for name, column in chosen_columns(batch, inputs, view).items()}


def ask(model: Any, inputs: dict[str, Any], needs: frozenset[str]) -> TeacherOutput:
    dtype = model_dtype(model)
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            inputs[name] = value.to(dtype)
    for name in ("hidden_states", "attentions"):
        if name in needs:
            inputs[f"output_{name}"] = True
    with encoder_output(model, wanted="features" in needs) as encoded:
        output = model(**inputs)
    return TeacherOutput(
        logits=output.get("logits"),
        hidden_states=output.get("hidden_states"),
        attentions=output.get("attentions"),
        features=encoded[-1] if encoded else output.get("last_hidden_state"),
        qkv=output.get("qkv"),
    )


@contextmanager
def encoder_output(model: Any, wanted: bool) -> Iterator[list[Tensor]]:
    """Catches the last hidden state inside a model with a head, which answers logits only."""
    caught: list[Tensor] = []
    model = without_adapter(model)
    encoder = getattr(model, "base_model", model)
    if encoder is model or not wanted:
        yield caught
        return
    hook = encoder.register_forward_hook(lambda module, inputs, output: caught.append(output[0]))
    try:
        yield caught
    finally:
        hook.remove()


def answer_attention_maps(model: Any) -> None:
    kind = getattr(model.config, "_attn_implementation", None)
    if kind != "eager":
        logger.info(f"the teacher switches from {kind} to eager attention: attention maps were asked for")
        model.set_attn_implementation("eager")


@contextmanager
def query_key_value_answered(model: nn.Module, wanted: bool) -> Iterator[None]:
    """For one call: hooks that stay would meet those of the next trainer, or of the student that this teacher is."""
    if not wanted:
        yield
        return
    hooks = answer_with_query_key_value(model, range(count_attention_layers(model)))
    try:
        yield
    finally:
        hooks.remove()


def on_students_tokens(answer: TeacherOutput, positions: Tensor | None) -> TeacherOutput:
    """Token-level answers (batch, teacher's tokens, ...) at positions (batch, student's tokens)."""
    if positions is None:
        return answer

    def gathered(values: Any) -> Any:
        if isinstance(values, tuple):
            return tuple(gathered(value) for value in values)
        if values is None or values.dim() != 3:
            return values
        return values.gather(1, positions.clamp(min=0)[..., None].expand(-1, -1, values.shape[-1]))

    return dataclasses.replace(
        answer,
        logits=gathered(answer.logits),
        features=gathered(answer.features),
        hidden_states=gathered(answer.hidden_states),
    )


def answers_classes(model: Any) -> bool:
    """Whether the logits are over labels: neither a bare encoder nor a language model's vocabulary."""
    model = without_adapter(model)
    if not hasattr(model, "base_model"):
        return True
    return model.base_model is not model and model.get_output_embeddings() is None


def model_dtype(model: nn.Module) -> torch.dtype:
    """The type of its first floating weight; float32 for a model without one."""
    return next((weight.dtype for weight in model.parameters() if weight.is_floating_point()), torch.float32)
