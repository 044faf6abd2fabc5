"""What one answer of a model costs: its size and the time of a forward pass."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hfkd.diagnostics.answers import left_as_found


def cost_of(model: nn.Module, batch: Mapping[str, Any], repeats: int = 5) -> dict[str, Any]:
    """Parameters, and the median time of `repeats` forward passes after one that warms up, in eval mode, without gradients.

        {"parameters": 125_000_000, "milliseconds": 41.2, "rows": 8, "device": "cpu"}

    batch: what `model` is called with; its tensors are moved to the model's device beforehand. rows: of the batch. Of this
    machine, with as many threads as torch has, and of a batch of this size and length: compare only what was measured
    side by side. Training flags and the random state are what they were.

    Raises ValueError for repeats below 1 and for a batch without tensors.
    """
    tensors = [value for value in batch.values() if isinstance(value, Tensor)]
    if repeats < 1 or not tensors:
        raise ValueError(
            f"a time needs 1 pass or more and a batch with tensors, got repeats={repeats} and {len(tensors)} tensors"
        )
    device = next(model.parameters()).device
    inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    devices = [] if device.type == "cpu" else [device]
    with left_as_found(model), torch.no_grad(), torch.random.fork_rng(devices, device_type=_generators(device)):
        model.eval()
        times = [_seconds(model, inputs, device) for _ in range(repeats + 1)][1:]
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "milliseconds": 1000 * statistics.median(times),
        "rows": len(tensors[0]),
        "device": device.type,
    }


def _seconds(model: nn.Module, inputs: Mapping[str, Any], device: torch.device) -> float:
    _wait_for(device)
    started = time.perf_counter()
    model(**inputs)
    _wait_for(device)
    return time.perf_counter() - started


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)  # the host only queues the work


def _generators(device: torch.device) -> str:
    return (
        "cuda" if device.type == "cpu" else device.type
    )  # the CPU's own is always kept; no other device is listed then
