"""Queries, keys and values of a model's self-attention, which transformers does not return.

MiniLM (Wang et al. 2021, MiniLMv2, arXiv 2012.15828) compares the relations between them: the student's last layer with
one of the teacher's. They are read with forward hooks from the layers' projections and put on the model's own output, so
that all of it happens inside the one call that DDP wraps.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hfkd.outputs import with_entry

QueryKeyValue = tuple[Tensor, Tensor, Tensor]

SEPARATE: tuple[tuple[str, str, str], ...] = (
    ("query", "key", "value"),  # BERT, RoBERTa
    ("q_lin", "k_lin", "v_lin"),  # DistilBERT
    ("query_proj", "key_proj", "value_proj"),  # DeBERTa-v2
    ("q_proj", "k_proj", "v_proj"),  # ViT
)


def _three_blocks(attention: nn.Module, fused: Tensor) -> QueryKeyValue:
    """ModernBERT: [query | key | value], each over all heads."""
    query, key, value = fused.chunk(3, dim=-1)
    return query, key, value


def _three_blocks_per_head(attention: Any, fused: Tensor) -> QueryKeyValue:
    """DeBERTa (the first): [query | key | value] of head 0, then of head 1, ...; biases of query and value added after."""
    heads = fused.unflatten(-1, (attention.num_attention_heads, 3, -1))
    query, key, value = (part.flatten(-2) for part in heads.unbind(-2))
    return query + attention.q_bias, key, value + attention.v_bias


FUSED: dict[str, Callable[[Any, Tensor], QueryKeyValue]] = {
    "Wqkv": _three_blocks,
    "in_proj": _three_blocks_per_head,
}


class QueryKeyValueHooks:
    """Keeps what the projections of some layers answer in a call of the model, until it is read.

    `layers` counts from 0. What is kept is what the attention works on, before it is split into heads, rotated (ModernBERT)
    or scaled, with its gradients; from adapters (LoRA), their own output, so wrap the model first and hook it afterwards.
    Nothing is kept of calls of the model's parts, nor of the recomputation of gradient checkpointing in the backward pass.
    The hooks are part of the model: torch.compile it after this, and a deepcopy of it keeps for itself, never in here.

    Raises ValueError where the class has no projections of a known name, or several kinds of attention (a decoder's),
    and for layers that the model does not have.
    """

    def __init__(self, model: nn.Module, layers: Sequence[int]) -> None:
        found = _attentions(model)
        self._kept = _Kept(_checked(layers, len(found)))
        self._handles = [model.register_forward_pre_hook(self._kept.begin)]
        for place, layer in enumerate(layers):
            attention, names = found[layer]
            for position, name in enumerate(names):
                split = functools.partial(FUSED[name], attention) if name in FUSED else None
                hook = functools.partial(self._kept.keep, place, position, split)
                self._handles.append(getattr(attention, name).register_forward_hook(hook))
        self._handles.append(model.register_forward_hook(self._kept.end))

    def read(self) -> tuple[QueryKeyValue, ...]:
        """One (query, key, value) per layer, in the order of `layers`, each (batch, tokens, width); read once per call.

        Raises RuntimeError when the model has not been called since.
        """
        return self._kept.take()

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._kept.clear()


def answer_with_query_key_value(model: nn.Module, layers: Sequence[int]) -> QueryKeyValueHooks:
    """Let model(**inputs) answer with its ModelOutput and one key more: `qkv`, what `QueryKeyValueHooks.read` returns.

    The answer is a subclass of the model's own output class. Undo it with `.remove()` of what this returns.
    """
    hooks = QueryKeyValueHooks(model, layers)
    hooks._handles.append(model.register_forward_hook(hooks._kept.answer))
    return hooks


def count_attention_layers(model: nn.Module) -> int:
    """How many layers `QueryKeyValueHooks` finds; raises ValueError as it does."""
    return len(_attentions(model))


class _Kept:
    """The tensors of one call. The hooks are its bound methods, so that a deepcopy of the model takes its own along."""

    def __init__(self, layers: list[int]) -> None:
        self.layers = layers
        self.clear()

    def clear(self) -> None:
        self.open = False
        self.with_gradients = False
        self.tensors: dict[tuple[int, int], Tensor] = {}

    def begin(self, model: nn.Module, arguments: Any) -> None:
        self.clear()
        self.open = True
        self.with_gradients = torch.is_grad_enabled()

    def keep(self, place: int, position: int, split: Any, module: nn.Module, arguments: Any, output: Tensor) -> None:
        if not self.open:
            return  # the recomputation of gradient checkpointing, or a call of a part of the model
        if self.with_gradients and not torch.is_grad_enabled():
            raise RuntimeError(
                "queries, keys and values have no gradients: the layers run without them although the model does not; "
                "gradient checkpointing needs use_reentrant=False"
            )
        if (place, position) in self.tensors:
            raise RuntimeError(f"attention layer {self.layers[place]} ran twice in one call of the model: whose is it?")
        for offset, tensor in enumerate((output,) if split is None else split(output)):
            self.tensors[place, position + offset] = tensor

    def end(self, model: nn.Module, arguments: Any, output: Any) -> None:
        self.open = False

    def take(self) -> tuple[QueryKeyValue, ...]:
        tensors, self.tensors = self.tensors, {}
        missing = [layer for place, layer in enumerate(self.layers) if any((place, i) not in tensors for i in range(3))]
        if missing:
            raise RuntimeError(
                f"nothing was kept of attention layers {missing}: call the very model that has the hooks (the wrapped one "
                "of PEFT), once before each read"
            )
        return tuple((tensors[place, 0], tensors[place, 1], tensors[place, 2]) for place in range(len(self.layers)))

    def answer(self, model: nn.Module, arguments: Any, output: Any) -> Any:
        if not isinstance(output, dict):
            raise TypeError(f"{type(model).__name__} answered {type(output).__name__}: qkv needs return_dict=True")
        if "qkv" in output:
            raise RuntimeError("the model answers with qkv already: remove() the earlier hooks first")
        return with_entry(output, "qkv", self.take())

    def __reduce__(self) -> Any:
        # copies start empty: tensors that are part of a graph can be neither copied nor pickled
        return type(self), (self.layers,)


def _attentions(model: nn.Module) -> list[tuple[nn.Module, tuple[str, ...]]]:
    """Each layer's self-attention and the names of its projections, in the order of the layers."""
    found = {}
    for path, module in model.named_modules():
        children = dict(module.named_children())
        names: tuple[str, ...] = next((names for names in SEPARATE if set(names) <= children.keys()), ())
        if "Wqkv" in children:
            names = ("Wqkv",)
        elif "in_proj" in children and hasattr(module, "q_bias"):
            names = ("in_proj",)
        if names:
            found[path] = (module, names)
    kinds = {re.sub(r"\b\d+\b", "N", path) for path in found}
    if len(kinds) != 1:
        known = ", ".join("/".join(names) for names in [*SEPARATE, *((name,) for name in FUSED)])
        raise ValueError(
            f"{type(model).__name__} must have one stack of self-attention layers with projections named {known}; "
            f"found: {', '.join(sorted(kinds)) or 'none'}"
        )
    return list(found.values())


def _checked(layers: Sequence[int], depth: int) -> list[int]:
    numbers = list(layers)
    if not numbers or len(set(numbers)) < len(numbers) or not all(0 <= number < depth for number in numbers):
        raise ValueError(f"layers is {numbers}: give numbers from 0 to {depth - 1}, each once")
    return numbers
