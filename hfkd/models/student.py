"""A shallower student that starts from some of its teacher's layers.

DistilBERT (Sanh et al. 2019, arXiv 1910.01108, section 2) starts from every other layer of BERT-base, and its extraction
script takes layers 0, 2, 4, 7, 9 and 11: evenly spaced, the first and the last included. The widths stay the teacher's,
so embeddings and head are copied too and hidden states can be compared without a projection.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn

PER_LAYER_SETTINGS = ("layer_types", "mlp_layer_types")  # lists in a configuration with one entry a layer


def init_student_from_teacher(
    teacher: Any, num_hidden_layers: int | None = None, layers: Sequence[int] | None = None
) -> Any:
    """A model of the teacher's class and widths with some of its layers; everything else is copied whole.

    Give exactly one: `layers`, the teacher's layer numbers (from 0) in the student's order, or `num_hidden_layers`, that
    many evenly spaced ones with the first and the last (12 to 6: 0, 2, 4, 7, 9, 11; to 1: the first).
    The student is in training mode, trainable as a new model of its class is, on the teacher's device, and in the
    teacher's dtype but at least float32: a bfloat16 student would lose small updates. It shares nothing with the teacher,
    which stays as it is, and loads with `from_pretrained`; its configuration no longer names the teacher's checkpoint.

    Raises ValueError for layers that the teacher does not have, and where the class cannot be cut: no stack of layers or
    several, a layer that is another network at its new place, weights that the configuration does not describe.
    """
    if (num_hidden_layers is None) == (layers is None):
        raise ValueError(f"give num_hidden_layers or layers, not {'both' if layers is not None else 'neither'}")
    if not isinstance(teacher, transformers.PreTrainedModel):
        raise ValueError(
            f"{type(teacher).__name__} is no model of transformers; of one with an adapter, give merge_and_unload()"
        )
    stack, depth = _stack_of(teacher)
    numbers = _evenly_spaced(depth, num_hidden_layers) if layers is None else _checked(depth, layers)
    student: Any = type(teacher)(_config_for(teacher, depth, numbers))
    if len(_stack_at(student, stack)) != len(numbers):
        raise ValueError(f"{type(teacher).__name__} does not take its depth from num_hidden_layers; cut it by hand")
    _check_same_networks(_stack_at(student, stack), _stack_at(teacher, stack), numbers, type(teacher).__name__)
    student.to(device=teacher.device, dtype=student.config.dtype)
    _load(student, _weights_of(teacher, stack, numbers))
    return student


def _stack_of(model: Any) -> tuple[str, int]:
    """The name and the length of the one ModuleList that holds the hidden layers."""
    depth = getattr(model.config, "num_hidden_layers", None)
    stacks = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    names = [name for name, module in stacks.items() if len(module) == depth]
    if len(names) != 1:
        found = ", ".join(names) if names else "none"
        raise ValueError(
            f"{type(model).__name__} must have one ModuleList with its {depth} hidden layers to copy from; found: {found}"
        )
    return names[0], len(stacks[names[0]])


def _stack_at(model: Any, name: str) -> nn.ModuleList:
    return model.get_submodule(name)


def _evenly_spaced(depth: int, count: int | None) -> list[int]:
    if count is None or not 1 <= count <= depth:
        raise ValueError(f"num_hidden_layers is {count}, but the teacher has {depth} layers: give 1 to {depth}")
    return [round(i * (depth - 1) / max(count - 1, 1)) for i in range(count)]


def _checked(depth: int, layers: Sequence[int]) -> list[int]:
    numbers = list(layers)
    if not numbers:
        raise ValueError("layers is empty: a student needs at least one of its teacher's layers")
    outside = [number for number in numbers if not 0 <= number < depth]
    if outside:
        raise ValueError(f"layers has {outside}, but the teacher has layers 0 to {depth - 1}")
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"layers has a layer twice: {numbers}")
    return numbers


def _config_for(teacher: Any, depth: int, numbers: list[int]) -> Any:
    config = copy.deepcopy(teacher.config)
    config.num_hidden_layers = len(numbers)
    for name in PER_LAYER_SETTINGS:
        entries = getattr(config, name, None)
        if entries is not None and len(entries) == depth:
            setattr(config, name, [entries[number] for number in numbers])
    config.dtype = torch.promote_types(teacher.dtype, torch.float32)
    config._name_or_path = ""  # an adapter of the student would otherwise name the teacher as its base model
    return config


def _check_same_networks(student: nn.ModuleList, teacher: nn.ModuleList, numbers: list[int], name: str) -> None:
    """Weights fit by their shapes alone; a layer that attends locally can get those of one that attends globally."""
    for place, number in enumerate(numbers):
        new, old = _settings(student[place]), _settings(teacher[number])
        wrong = [key for key in new.keys() & old.keys() if new[key] != old[key]]
        if wrong:
            key = min(wrong)
            raise ValueError(
                f"layer {number} of the teacher cannot be layer {place} of a {name}: its {key} is {old[key]}, but {name} "
                f"builds {new[key]} there. Where layer 0 differs from all others, `layers` must start with 0 (now {numbers})"
            )


def _settings(layer: nn.Module) -> dict[str, Any]:
    """The class of each module, and the kinds and switches that its forward reads; of numbers only that they are some."""
    found: dict[str, Any] = {}
    for name, module in layer.named_modules():
        found[f"{name or 'layer'} class"] = type(module).__name__
        for key, value in vars(module).items():
            if key.startswith("_") or key in ("training", "gradient_checkpointing"):
                continue
            if isinstance(value, str | bool | int | None):
                number = isinstance(value, int) and not isinstance(value, bool)  # layers know their own number
                found[f"{name}.{key}".lstrip(".")] = "a number" if number else value
    return found


def _weights_of(teacher: Any, stack: str, numbers: list[int]) -> dict[str, Tensor]:
    """The teacher's weights under the student's names. Modules' names: files may carry others (ViT in transformers 5)."""
    place_of = {number: place for place, number in enumerate(numbers)}
    weights = {}
    for key, weight in teacher.state_dict().items():
        if not key.startswith(f"{stack}."):
            weights[key] = weight
            continue
        number, _, rest = key.removeprefix(f"{stack}.").partition(".")
        if int(number) in place_of:
            weights[f"{stack}.{place_of[int(number)]}.{rest}"] = weight
    return weights


def _load(student: Any, weights: dict[str, Tensor]) -> None:
    try:
        student.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise ValueError(
            f"the teacher's configuration does not describe its weights, so no {type(student).__name__} can be built for "
            f"them (adapters: merge them first; options of the class, such as add_pooling_layer, are not in it): {error}"
        ) from error
