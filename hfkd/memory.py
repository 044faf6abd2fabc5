"""What a training step takes of memory: an estimate, before a batch is chosen.

Weights, gradients and optimizer states are counted. What the student's forward keeps for the backward pass is measured on
one row and on two, and goes on along that line. The peak of what torch allocates in a step lies within a factor of 1.25 of
the estimate (tests/test_doctor.py: encoders on the CPU, with and without dropout). Not in it: Python and the libraries
(half a GiB), the buckets of several processes, and what an allocator keeps of freed memory (on the CPU the process had
grown by up to 1.5 times the estimate). Other attention kernels keep less, and long texts then take less than it says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ADAM_STATES = 2  # moments, each as large as the weights


@dataclass(frozen=True)
class StepMemory:
    """Bytes. activations: of the whole batch; teacher: its weights, and the largest layer of its forward."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    teacher: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.teacher


def step_memory(
    student: nn.Module,
    inputs: Callable[[int], Mapping[str, Any]],
    batch_size: int,
    teacher: nn.Module | None = None,
    teacher_inputs: Callable[[int], Mapping[str, Any]] | None = None,
) -> StepMemory:
    """An estimate for one step of AdamW on `batch_size` rows. inputs: what a model reads, for a number of rows.

    The models' modes, and the state of the random generator, are what they were afterwards.
    """
    one, two = (kept_for_backward(student, inputs(rows)) for rows in (1, 2))
    trained = [weight for weight in student.parameters() if weight.requires_grad]
    beside = 0
    if teacher is not None:
        wide = largest_layer(teacher, (teacher_inputs or inputs)(1)) * batch_size
        beside = bytes_of([*teacher.parameters(), *teacher.buffers()]) + wide
    return StepMemory(
        weights=bytes_of([*student.parameters(), *student.buffers()]),
        gradients=bytes_of(trained),
        optimizer=ADAM_STATES * bytes_of(trained),
        activations=one + (batch_size - 1) * max(two - one, 0),
        teacher=beside,
    )


def bytes_of(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def kept_for_backward(model: nn.Module, inputs: Mapping[str, Any]) -> int:
    """Bytes that a forward in training mode keeps: every memory once, the weights' own not at all."""
    own = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, Any] = {}  # held, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.random.fork_rng(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = model.train()(**inputs)  # dropout keeps its masks
            output.logits.float().logsumexp(-1).sum()
            return sum(storage.nbytes() for address, storage in kept.items() if address not in own)
    finally:
        for module, mode in modes:
            module.training = mode


@torch.no_grad()
def largest_layer(model: nn.Module, inputs: Mapping[str, Any]) -> int:
    """Bytes of the layer whose input and output are largest: the most that a forward without gradients holds, about."""
    sizes = [0]

    def note(module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        sizes.append(bytes_of([part for part in (*given, output) if isinstance(part, Tensor)]))

    leaves = [module for module in model.modules() if not list(module.children())]
    hooks = [module.register_forward_hook(note) for module in leaves]
    try:
        model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return max(sizes)


def free_memory() -> int | None:
    """Bytes that are free on the accelerator, or in the machine without one; None where nobody tells."""
    if torch.accelerator.is_available():
        told = getattr(torch.accelerator, "get_memory_info", None)
        return int(told()[0]) if told is not None else None
    lines = Path("/proc/meminfo")
    if not lines.exists():
        return None
    found = [line.split()[1] for line in lines.read_text().splitlines() if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None
