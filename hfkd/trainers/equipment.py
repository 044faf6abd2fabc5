"""What an objective needs of the student's forward: eager attention, queries and keys, or a projection that it trains.

All of it runs inside the one call of the wrapped module: a second pass outside leaves gradients unsynchronised under
DDP. It is put on for training (or an evaluation that asks the teacher) and taken off afterwards, so that the student is
the plain model it was before; what the objective learned is saved beside it in `objective.safetensors`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils import logging

from hfkd.models.projections import answer_with_query_key_value, count_attention_layers
from hfkd.objectives.objective import Objective

logger = logging.get_logger(__name__)
ATTACHED = "objective_module"  # its name as a submodule of the student
FILE = "objective.safetensors"


def equip(student: Any, objective: Objective) -> Callable[[], None]:
    """Make the student answer what the objective needs; returns the function that takes everything off again."""
    handles = []
    if "attentions" in objective.needs and student.config._attn_implementation != "eager":
        logger.warning(
            f"{type(objective).__name__} compares attention maps: the student runs with eager attention "
            f"({student.config._attn_implementation} computes no maps), which is slower"
        )
        usual = student.config._attn_implementation
        student.set_attn_implementation("eager")
        handles.append(lambda: student.set_attn_implementation(usual))
    if "qkv" in objective.needs:
        layers = range(count_attention_layers(student))
        handles.append(answer_with_query_key_value(student, layers).remove)
    if objective.attached is not None:
        attached = objective.attached
        student.add_module(ATTACHED, attached)
        # Through the submodule, not the closure: a compiled or sharded student replaces it
        hook = student.register_forward_hook(lambda module, inputs, output: getattr(module, ATTACHED)(output))
        handles += [hook.remove, lambda: delattr(student, ATTACHED)]

    def remove() -> None:
        while handles:
            handles.pop()()

    return remove


def without_attached(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A student's weights as a plain student has them."""
    return {name: tensor for name, tensor in state.items() if not name.startswith(ATTACHED + ".")}


def save_learned(objective: Objective, directory: str | Path) -> None:
    """What it trains, and the values of `fit`: buffers whose names end in `_`."""
    if learned := objective.state_dict():
        save_file({name: tensor.contiguous() for name, tensor in learned.items()}, Path(directory) / FILE)


def load_learned(objective: Objective, directory: str | Path) -> None:
    """Raises FileNotFoundError when the objective learns something and the checkpoint has none of it, ValueError when the
    checkpoint holds what another objective learned."""
    path = Path(directory) / FILE
    if not path.is_file():
        if objective.state_dict():
            raise FileNotFoundError(
                f"{directory} has no {FILE}, but {type(objective).__name__} learns {', '.join(objective.state_dict())}: "
                "resuming would start it anew; the checkpoint is of another objective"
            )
        return
    learned = load_file(path, device="cpu")
    attached = {name: tensor for name, tensor in learned.items() if name.startswith("attached.")}
    buffers = learned.keys() - attached.keys()
    if buffers - objective._buffers.keys() or (attached and objective.attached is None):
        raise ValueError(
            f"{path} holds {', '.join(sorted(learned))}, which {type(objective).__name__} does not learn: the checkpoint is of "
            "another objective; start anew, or pass the objective of that run"
        )
    if objective.attached is not None:
        objective.attached.load_state_dict({name.removeprefix("attached."): t for name, t in attached.items()})
    for name in buffers:  # an objective that is not fitted yet holds None there
        like = getattr(objective, name)
        setattr(objective, name, learned[name] if like is None else learned[name].to(like.device))


def holds_attached(optimizer: Any, objective: Objective) -> bool:
    """Whether the optimizer moves what the objective trains: one that was given does not, one of an earlier run does."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return objective.attached is None or all(id(parameter) in held for parameter in objective.attached.parameters())
