"""A Trainer whose loss is a sum of terms, each divided once, by its units in the whole optimizer step.

The one place where losses are reduced: over units, micro-batches and processes.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer
from transformers.trainer_pt_utils import nested_gather

from hfkd.objectives.objective import Objective
from hfkd.outputs import Counts, Terms


class TermTrainer(Trainer):
    """A subclass sets `objective`, reads it as `_objective`, and in `compute_loss` turns terms into the loss with `reduce_terms`.

    Batch 8 equals 2 x 4 accumulated equals two processes, also where units are tokens and rows are ragged. The logged
    terms sum to the logged loss. The evaluation's loss is the mean over all units, not a mean of batch means.
    """

    args: Any
    _objective: Objective
    loss_is_scaled_for_ga = True  # the loss is already divided by the units of the whole step

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # super().__init__ overwrites it; the models' own losses are not used
        self._term_sums: Terms = {}
        self._eval_sums: dict[tuple[bool, str], Any] = {}
        self._refuse_wrong_launch()

    def _refuse_wrong_launch(self) -> None:
        launched = int(os.environ.get("WORLD_SIZE", 1))
        if launched != self.args.world_size:
            raise ValueError(
                f"the launcher started {launched} processes, but the Trainer sees {self.args.world_size}: they would "
                "train independent models. On machines without an accelerator pass --use_cpu True or set "
                "ACCELERATE_USE_CPU=true"
            )
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{self.args.n_gpu} GPUs in one process would run DataParallel, which splits the loss's units wrongly: "
                "start with `accelerate launch`, or show one GPU with CUDA_VISIBLE_DEVICES=0"
            )

    @property
    def objective(self) -> Any:
        """The Objective; during `hyperparameter_search`, which keeps its score under this name, that score."""
        return self._objective if self.hp_search_backend is None else self._search_score

    @objective.setter
    def objective(self, value: Any) -> None:
        if isinstance(value, Objective):
            self._objective = value
        else:
            self._search_score = value

    # ---- one division ----

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """The micro-batches of one optimizer step, and the units of each term in them over all processes."""
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not samples:
            return samples, None
        counts = [self._objective.count(batch) for batch in samples]
        names = sorted(counts[0])
        totals = torch.stack([torch.stack([count[name] for count in counts]).sum() for name in names]).to(device)
        totals = self.accelerator.reduce(totals, reduction="sum")
        return samples, dict(zip(names, totals.unbind(), strict=True))

    def reduce_terms(self, terms: Terms, counts: Counts) -> torch.Tensor:
        """The loss of a micro-batch; `counts` are those of the whole step over all processes."""
        # DDP averages gradients over processes; the units were counted over all of them
        means = self._means(terms, counts, self.accelerator.num_processes)
        self._record(means)
        return torch.stack(list(means.values())).sum()

    @staticmethod
    def _means(terms: Terms, counts: Counts, scale: int) -> Terms:
        """Sum over units, divided by their number in the step; no unit contributes 0, not NaN."""
        if terms.keys() - counts.keys():
            raise ValueError(
                f"the objective's terms are {sorted(terms)}, but it counts {sorted(counts)}: extend count()"
            )
        return {name: values.sum() * scale / counts[name].clamp(min=1) for name, values in terms.items()}

    def _refuse_unwrapped(self, model: nn.Module) -> None:
        if getattr(self, "is_distributed_loading_by_transformers", False):
            return  # FSDP2 of transformers: the model itself reduces its gradients
        distributed = "MULTI_" in str(self.accelerator.distributed_type)
        if distributed and not isinstance(
            getattr(model, "_orig_mod", model), DistributedDataParallel
        ):  # compiled or not
            raise RuntimeError(
                f"{self.accelerator.num_processes} processes train, but the model is not wrapped, so their gradients would "
                "never be synchronised. evaluate() before train() causes this: use eval_on_start=True instead"
            )

    # ---- logs: the terms sum to the logged loss ----

    def _record(self, means: Terms) -> None:
        if not self._term_sums:
            self._term_start = self.state.global_step
        for name, value in means.items():
            self._term_sums[name] = self._term_sums.get(name, 0.0) + value.detach()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._term_sums:
            steps = max(self.state.global_step - self._term_start, 1)
            sums = torch.stack(list(self._term_sums.values()))
            gathered = nested_gather(sums, self.args.parallel_mode).view(-1, len(sums)).mean(0) / steps
            logs.update(zip(self._term_sums, gathered.tolist(), strict=True))
            self._term_sums = {}
        super().log(logs, start_time)

    # ---- evaluation: the mean over all units, not a mean of batch means ----

    def _record_evaluation(self, terms: Terms, counts: Counts, asked: bool = False) -> None:
        """`asked`: what the teacher was asked for; it stands beside the loss and is not part of it."""
        for name, values in terms.items():
            found = torch.stack([values.sum().detach().double(), counts[name].double()])
            self._eval_sums[asked, name] = self._eval_sums.get((asked, name), 0.0) + found

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """As in transformers, but the loss is the sum over units divided by their number: independent of the batch size.

        On several processes the rows that even out the last batch count twice.
        """
        self._eval_sums = {}
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        metrics, name = output.metrics or {}, f"{metric_key_prefix}_loss"
        if name in metrics and self._eval_sums:
            sums, counts = self.accelerator.reduce(torch.stack(list(self._eval_sums.values())), "sum").unbind(1)
            means = dict(zip(self._eval_sums, (sums / counts.clamp(min=1)).tolist(), strict=True))
            metrics[name] = sum(value for (asked, _), value in means.items() if not asked)
            prefix, several = name.removesuffix("loss"), sum(not asked for asked, _ in means) > 1
            metrics |= {prefix + key: value for (asked, key), value in means.items() if asked or several}
        return output
