"""Runs of groups: students that are trained together, kept and resumed as `runs.py` does with one model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PrinterCallback, TrainerCallback

from hfkd import CollaborativeArguments, CollaborativeTrainer
from hfkd.diagnostics.evaluate_metrics import compute_metrics_for
from hfkd.fingerprint import content_hash
from hfkd.meta import ConstantWeights, Coordinator
from hfkd.records import write_json
from runs import Run, Runs, seeded

MOVED_BY = (  # what a coordinator that learns depends on, beside the students' own settings
    *("coordinator_interval", "coordinator_interval_unit", "coordinator_learning_rate", "coordinator_weight_decay"),
    *("meta_engine", "meta_order", "meta_batch_size", "meta_augmentation"),
)
TOP = 5


@dataclass
class GroupRun(Run):
    """A group to train: `model` makes a StudentGroup, `objective` is a GroupObjective.

    students: their names. weights: makes the coordinator, and `weighted_by` says which one it is, for the record. meta: the
    rows that a coordinator that learns is judged on.
    """

    students: list[str] = dataclasses.field(default_factory=list)
    weights: Callable[[], Coordinator] = lambda: ConstantWeights(task=1.0)
    weighted_by: str = "ConstantWeights(task=1.0)"
    meta: Any = None


class GroupRuns(Runs):
    """Results are `{"students": {name: {metric: value}}, "meta_seconds_per_step": ..., costs}`."""

    args: CollaborativeArguments

    def settings(self, run: Run) -> dict[str, Any]:
        assert isinstance(run, GroupRun)
        found = {**super().settings(run), "students": run.students, "weights": run.weighted_by}
        if run.meta is not None:
            args = self.arguments(run, Path())
            found |= {name: getattr(args, name) for name in MOVED_BY}
            found["meta_rows"] = content_hash(run.meta, run.meta.column_names)[0]
        return found

    def trainer(self, run: Run, model: Any, args: Any) -> CollaborativeTrainer:
        assert isinstance(run, GroupRun)
        teacher, rows = run.asked() if run.asked else (None, run.view.train)
        self.place = StartOfTraining()
        self.trained = CollaborativeTrainer(
            model,
            args,
            seeded(run.view.collator, run.seed),
            rows,
            run.view.validation if str(args.eval_strategy.value) != "no" else None,
            processing_class=run.view.processing_class,
            compute_metrics=compute_metrics_for(self.data.metrics, self.data.problem_type),
            callbacks=[self.place],
            teacher=teacher,
            objective=run.objective,
            coordinator=run.weights(),
            meta_dataset=run.meta,
        )
        if args.disable_tqdm:
            self.trained.remove_callback(PrinterCallback)
        return self.trained

    def score(self, run: Run, logits: dict[str, Any]) -> dict[str, Any]:
        """Of every student all that `Runs.score` finds, and top-5 accuracy where there are more than five classes."""
        assert isinstance(run, GroupRun)
        found = {}
        for k, name in enumerate(run.students):
            own = {prefix: values[:, k] for prefix, values in logits.items()}
            found[name] = super().score(run, own)
            for prefix, values in own.items():
                if values.shape[-1] > TOP and self.data.problem_type == "single_label_classification":
                    labels = np.asarray(run.view.held_out[prefix]["label"][:])
                    found[name][f"{prefix}top{TOP}"] = top_accuracy(values, labels)
        return {"students": found}

    def saved(self, folder: Path) -> list[Path]:
        return [folder / name for name in self.trained.model.names]

    def close(self, run: Run, folder: Path, found: dict[str, Any], logits: dict[str, Any]) -> dict[str, Any]:
        state = self.trained.state
        steps = max(state.global_step - self.place.step, 1)
        seen = [entry for entry in state.log_history if any("_weight_q" in name for name in entry)]
        if self.args.process_index == 0 and seen:
            write_json(folder / "weights.json", seen)
        if getattr(run, "meta", None) is not None:
            found["meta_seconds_per_step"] = self.trained.meta_seconds / steps
        return super().close(run, folder, found, logits)


class StartOfTraining(TrainerCallback):
    """The step at which training started here: seconds are counted from there, also of a run that goes on."""

    step = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step = state.global_step


def top_accuracy(logits: np.ndarray, labels: np.ndarray, k: int = TOP) -> float:
    """Share of rows whose label is among the k largest logits; (rows, classes), (rows,)."""
    best = torch.from_numpy(logits).topk(k, dim=-1).indices
    return float((best == torch.from_numpy(labels)[:, None]).any(-1).double().mean())
