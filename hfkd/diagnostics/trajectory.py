"""Where a layer's weights go during training, along the directions of what it reads: a callback for any Trainer."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from safetensors import safe_open
from safetensors.numpy import save_file
from transformers import TrainerCallback

from hfkd.diagnostics.eigenspace import layer_of

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Trajectory:
    """Records of one run, oldest first.

    steps: (records,) optimizer steps, of which the first is the start. projections: (records, k), |W v_k| over the layer's
    outputs, and v_k . w with its sign where it has one output. moves: the same of W - W_start. directions: the hash of the
    vectors, by which runs along other ones are told apart.
    """

    steps: NDArray[np.int64]
    projections: Array
    moves: Array
    directions: str = ""


class TrajectoryRecorder(TrainerCallback):
    """Records the projections of a layer's weights on directions, at the start and after every `every` optimizer steps.

    layer: the module's name, whose weight is (outputs, ...). vectors: (width, k), those of `eigenspace.layer_directions(model,
    layer, batches)`. path: the file that `read_trajectory` reads; it is written before each checkpoint and at the end, by
    the first process. A run that goes on from a checkpoint continues the file, whatever was recorded after it is dropped.

        directions = layer_directions(model, "classifier", batches).at([0, 3, 15])
        Trainer(..., callbacks=[TrajectoryRecorder("classifier", directions.vectors, "runs/mine/trajectory.safetensors")])

    The weights must be whole on each process: plain and DDP, not FSDP or DeepSpeed's stage 3. Each record brings `width x k`
    numbers to the host. Raises ValueError, before the first step, for a layer that the model has not or that the vectors do not
    fit, and when a resumed run's file is missing, of other directions, or lacks records.
    """

    def __init__(self, layer: str, vectors: ArrayLike, path: str | Path, every: int = 1):
        if every < 1:
            raise ValueError(f"every counts optimizer steps, 1 or more, got {every}")
        self.layer, self.path, self.every = layer, Path(path), every
        self.vectors = np.ascontiguousarray(vectors, dtype=np.float64)
        if self.vectors.ndim != 2 or not np.isfinite(self.vectors).all():
            raise ValueError(f"vectors must be finite columns, (width, k), got the shape {self.vectors.shape}")
        self.start: Array = np.zeros((0, 0))  # W v_k of every output, (outputs, k)
        self.steps: list[int] = []
        self.projections: list[Array] = []
        self.moves: list[Array] = []

    # ---- what the Trainer calls ----

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        along = self._along(model)  # on every process: what is wrong is said by all
        if not state.is_world_process_zero:
            return
        if state.global_step:
            self._go_on(state.global_step)
        else:
            self.steps, self.projections, self.moves, self.start = [], [], [], along
            self._record(0, along)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and state.global_step % self.every == 0:
            self._record(state.global_step, self._along(model))
        self._write_before_checkpoint(state, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._write_before_checkpoint(state, control)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._write()

    # ---- records ----

    def _along(self, model: Any) -> Array:
        """W v_k, (outputs, k)."""
        weight = layer_of(model, self.layer).weight.detach().flatten(1)
        if weight.shape[1] != len(self.vectors):
            raise ValueError(
                f"{self.layer} reads rows of {weight.shape[1]} numbers, and the vectors have {len(self.vectors)}: take them from "
                "layer_directions of this layer"
            )
        return weight.cpu().double().numpy() @ self.vectors

    def _record(self, step: int, along: Array) -> None:
        self.steps.append(step)
        self.projections.append(_sizes(along))
        self.moves.append(_sizes(along - self.start))

    def _write_before_checkpoint(self, state: Any, control: Any) -> None:
        """Else a run that is killed right after its checkpoint would go on without the records before it."""
        if control.should_save and state.is_world_process_zero:
            self._write()

    def _write(self) -> None:
        arrays = {
            "steps": np.asarray(self.steps, dtype=np.int64),
            "projections": np.stack(self.projections),
            "moves": np.stack(self.moves),
            "start": np.ascontiguousarray(self.start),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(self.path.name + ".tmp")
        save_file(arrays, partial, metadata={"directions": self._hash()})
        partial.replace(self.path)

    def _hash(self) -> str:
        return hashlib.sha256(f"{self.vectors.shape}".encode() + self.vectors.tobytes()).hexdigest()

    def _go_on(self, step: int) -> None:
        if not self.path.is_file():
            raise ValueError(
                f"the run goes on at step {step}, and {self.path} with its records is missing: train it anew"
            )
        found = read_trajectory(self.path)
        if found.directions != self._hash():
            raise ValueError(f"{self.path} was recorded along other directions: train anew, or give the first ones")
        kept = found.steps <= step
        wanted = np.arange(0, step + 1, self.every)
        if not np.array_equal(found.steps[kept], wanted):
            raise ValueError(
                f"{self.path} has the steps {found.steps[kept].tolist()[-5:]} up to {step}, and every={self.every} wants "
                f"{wanted.tolist()[-5:]}: train anew, or record as before"
            )
        self.steps = wanted.tolist()
        self.projections, self.moves = list(found.projections[kept]), list(found.moves[kept])
        with safe_open(self.path, "numpy") as file:
            self.start = file.get_tensor("start")


def read_trajectory(path: str | Path) -> Trajectory:
    with safe_open(path, "numpy") as file:
        arrays = {name: file.get_tensor(name) for name in ("steps", "projections", "moves")}
        return Trajectory(**arrays, directions=(file.metadata() or {}).get("directions", ""))


def _sizes(along: Array) -> Array:
    return along[0].copy() if len(along) == 1 else np.linalg.norm(along, axis=0)
