"""One student, any teacher."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback
from transformers.trainer_pt_utils import nested_gather
from transformers.trainer_utils import rotate_checkpoints
from transformers.utils import ModelOutput

from hfkd.data.collate import KeyedCollator
from hfkd.data.sampler import KeyedLengthSampler
from hfkd.objectives.cross_entropy import CrossEntropy
from hfkd.objectives.objective import Objective
from hfkd.outputs import Batch, Counts, Progress, Terms
from hfkd.teachers import ModelTeacher, Teacher
from hfkd.trainers.checkpoints import last_whole_checkpoint, mark_whole

NO_PUSH = (
    "the stock upload takes training_args.bin, with local paths inside, and every nested checkpoint: leave push_to_hub off "
    "and upload one saved student (hf upload REPO FOLDER --exclude '*training_args.bin' 'checkpoint-*/*')"
)
OPTIONAL_VIEWS = frozenset({"masked_positions", "clean_input_ids"})


class _PlaceKeyed(TrainerCallback):
    """Tells collator and sampler the round and epoch before the epoch's first batch is drawn."""

    def __init__(self, trainer: DistillationTrainer):
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for keyed in self.trainer.keyed:
            keyed.set_position(round=self.trainer.round, epoch=int(state.epoch or 0))


class DistillationTrainer(Trainer):
    """`transformers.Trainer` whose loss is an objective over the student's and the teacher's answers.

    Same arguments in the same order, then `teacher` (a Teacher, a model, a folder or a Hub id), `objective` and
    `peft_config`. Without an objective it trains without a teacher (CrossEntropy), so that the baseline shares every
    other line.

    Each term's loss is the sum over its units divided by the number of its units in the whole optimizer step, over
    micro-batches and processes: batch 8 equals 2 x 4 accumulated equals two processes. The stock Trainer is off by the
    number of accumulation steps for several encoder heads (huggingface/transformers#47688). `eval_loss` is the task
    term alone, so that it compares across objectives.

    Raises ValueError for a `compute_loss_func`, for an objective that needs a teacher when there is none, for several
    GPUs in one process, and where the launcher started more processes than the Trainer sees.
    """

    args: Any
    model: Any
    data_collator: Any
    _signature_columns: Any
    train_dataset: Any
    objective: Objective
    teacher: Teacher | None
    loss_is_scaled_for_ga = True  # the loss below is already divided by the units of the whole step
    round = 0

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Any = None,
        compute_loss_func: Any = None,
        compute_metrics: Any = None,
        callbacks: Any = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: Any = None,
        preprocess_logits_for_metrics: Any = None,
        teacher: Teacher | nn.Module | str | Path | None = None,
        *,
        objective: Objective | None = None,
        peft_config: Any = None,
    ):
        if compute_loss_func is not None:
            raise ValueError("compute_loss_func would bypass the objective: write an Objective and pass objective=...")
        if getattr(args, "push_to_hub", False):
            raise ValueError(NO_PUSH)
        if peft_config is not None:
            if model is None:
                raise ValueError("peft_config goes with model=...; with model_init, return a PeftModel from it")
            from peft import get_peft_model

            model = get_peft_model(model, peft_config)
        super().__init__(
            model,
            args,
            data_collator,
            train_dataset,
            eval_dataset,
            processing_class,
            model_init,
            None,
            compute_metrics,
            callbacks,
            optimizers,
            optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics,
        )
        self.model_accepts_loss_kwargs = False  # super().__init__ overwrites it; the models' own losses are not used
        self._refuse_wrong_launch()
        if objective is not None and self.args.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor={self.args.label_smoothing_factor} acts on the default CrossEntropy only: give "
                f"label smoothing to {type(objective).__name__} itself and set label_smoothing_factor=0"
            )
        self._set_keyed_collator()
        self._term_sums: Terms = {}
        self._eval_sums: Terms = {}
        self._set_objective(objective or CrossEntropy(self.args.label_smoothing_factor), teacher)

    # ---- set-up ----

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

    def _set_keyed_collator(self) -> None:
        self._eval_collator = copy.deepcopy(self.data_collator)  # stays at round 0, epoch 0: eval masks never change
        self.keyed: list[Any] = []
        self.add_callback(_PlaceKeyed(self))
        if not isinstance(self.data_collator, KeyedCollator):
            return
        self.keyed.append(self.data_collator)
        self.train_dataset = with_example_ids(self.train_dataset)
        self.eval_dataset = with_example_ids(self.eval_dataset)

    def _set_objective(self, objective: Objective, teacher: Teacher | nn.Module | str | Path | None) -> None:
        if "teacher" in objective.needs and teacher is None:
            raise ValueError(
                f"{type(objective).__name__} needs a teacher: pass teacher=... (a model, a folder or a Hub id)"
            )
        if teacher is not None and teacher is self.model:
            raise ValueError(
                "teacher and student are one module, and the teacher's weights are frozen: pass a copy.deepcopy"
            )
        if teacher is not None and not isinstance(teacher, Teacher):
            teacher = ModelTeacher(teacher)
        config = getattr(self.model, "config", None)
        objective.build(config, teacher and teacher.config, getattr(config, "problem_type", None))
        if teacher is not None:
            teacher.needs = objective.needs
            teacher.to(self.args.device)
        self.objective = objective.to(self.args.device)
        self.teacher = teacher
        self._signature_columns = None

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the teacher's and the objective's columns, which the student's forward does not name."""
        super()._set_signature_columns_if_needed()
        teacher_columns = self.teacher.columns if self.teacher is not None else ()
        self._signature_columns = list(
            dict.fromkeys([*(self._signature_columns or []), *teacher_columns, *self.objective.columns, "example_id"])
        )

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """As in transformers, but the order of `group_by_length` survives a resume and another number of processes."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length" or not hasattr(dataset, "__len__"):
            return super()._get_train_sampler(train_dataset)
        name = getattr(self.processing_class, "model_input_names", ["input_ids"])[0]
        lengths = (
            [len(row) for row in dataset[name]] if hasattr(dataset, "column_names") else [len(r[name]) for r in dataset]
        )
        rows_per_step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        sampler = KeyedLengthSampler(lengths, rows_per_step, self.args.seed)
        self.keyed = [*(k for k in self.keyed if not isinstance(k, KeyedLengthSampler)), sampler]
        return sampler

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        return self._with_eval_collator(super().get_eval_dataloader, eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        return self._with_eval_collator(super().get_test_dataloader, test_dataset)

    def _with_eval_collator(self, build: Callable[[Any], Any], dataset: Any) -> Any:
        # Prefetching workers of the training loader share the training collator's position: never move that one
        train_collator, self.data_collator = self.data_collator, self._eval_collator
        try:
            return build(with_example_ids(dataset) if isinstance(train_collator, KeyedCollator) else dataset)
        finally:
            self.data_collator = train_collator

    # ---- the loss ----

    @property
    def progress(self) -> Progress:
        state = self.state
        return Progress(state.global_step, state.max_steps, state.epoch or 0.0, self.round, self.args.seed)

    def student_view(self, inputs: Batch, training: bool) -> dict[str, Any]:
        """What the student's forward takes. Labels stay outside, because the objective scores; a second view of the
        input is shown only where the objective reads it, because it costs a second pass."""
        kept_outside = {"label", "label_ids", "example_id", *self.label_names}
        kept_outside |= OPTIONAL_VIEWS - set(self.objective.columns if training else self.objective.task_columns)
        names = self._forward_names - kept_outside
        view: dict[str, Any] = {name: value for name, value in inputs.items() if name in names}
        for name in ("hidden_states", "attentions"):
            if training and name in self.objective.needs:
                view[f"output_{name}"] = True
        return view

    @cached_property
    def _forward_names(self) -> set[str]:
        model = self.accelerator.unwrap_model(self.model)
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        return set(inspect.signature(model.forward).parameters)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Counts | None = None,
    ) -> Any:
        if not model.training:
            outputs = model(**self.student_view(inputs, training=False))
            terms, counts = self.objective.task(outputs, inputs), self.objective.count(inputs)
            self._record_evaluation(terms, counts)
            loss = torch.stack(list(self._means(terms, counts, 1).values())).sum()
            return (loss, ModelOutput(logits=outputs.logits)) if return_outputs else loss
        self._refuse_unwrapped(model)
        answer = None
        if self.teacher is not None and "teacher" in self.objective.needs:
            with self.accelerator.autocast():  # else a bf16 student would be compared with a float32 teacher
                answer = self.teacher(inputs, self.progress)
        outputs = model(**self.student_view(inputs, training=True))
        terms = self.objective(outputs, answer, inputs, self.progress)
        counts = self.objective.count(inputs) if num_items_in_batch is None else num_items_in_batch
        # DDP averages gradients over processes; the units were counted over all of them
        means = self._means(terms, counts, self.accelerator.num_processes)
        self._record(means)
        loss = torch.stack(list(means.values())).sum()
        return (loss, ModelOutput(logits=outputs.logits)) if return_outputs else loss

    @staticmethod
    def _means(terms: Terms, counts: Counts, scale: int) -> Terms:
        """Sum over units, divided by their number in the step; no unit contributes 0, not NaN."""
        if terms.keys() - counts.keys():
            raise ValueError(
                f"the objective's terms are {sorted(terms)}, but it counts {sorted(counts)}: extend count()"
            )
        return {name: values.sum() * scale / counts[name].clamp(min=1) for name, values in terms.items()}

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """The micro-batches of one optimizer step, and the units of each term in them over all processes."""
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not samples:
            return samples, None
        counts = [self.objective.count(batch) for batch in samples]
        names = sorted(counts[0])
        totals = torch.stack([torch.stack([count[name] for count in counts]).sum() for name in names]).to(device)
        totals = self.accelerator.reduce(totals, reduction="sum")
        return samples, dict(zip(names, totals.unbind(), strict=True))

    def _refuse_unwrapped(self, model: nn.Module) -> None:
        distributed = "MULTI_" in str(self.accelerator.distributed_type)
        if distributed and not isinstance(
            getattr(model, "_orig_mod", model), DistributedDataParallel
        ):  # compiled or not
            raise RuntimeError(
                f"{self.accelerator.num_processes} processes train, but the model is not wrapped, so their gradients would "
                "never be synchronised. evaluate() before train() causes this: use eval_on_start=True instead"
            )

    # ---- evaluation: the mean over all units, not a mean of batch means ----

    def _record_evaluation(self, terms: Terms, counts: Counts) -> None:
        for name, values in terms.items():
            found = torch.stack([values.sum().detach().double(), counts[name].double()])
            self._eval_sums[name] = self._eval_sums.get(name, 0.0) + found

    def evaluation_loop(self, dataloader: Any, description: str, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, but the loss is the sum over units divided by their number: independent of the batch size.

        On several processes the rows that even out the last batch count twice.
        """
        self._eval_sums = {}
        output = super().evaluation_loop(dataloader, description, *args, **kwargs)
        metrics = output.metrics or {}
        name = next((name for name in metrics if name.endswith("_loss")), None)
        if name is not None and self._eval_sums:
            sums, counts = self.accelerator.reduce(torch.stack(list(self._eval_sums.values())), "sum").unbind(1)
            metrics[name] = (sums / counts.clamp(min=1)).sum().item()
        return output

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

    # ---- train and save ----

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, but `resume_from_checkpoint=True` takes the last *whole* checkpoint."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole_checkpoint(Path(self.args.output_dir))
            if resume_from_checkpoint is None:
                raise ValueError(f"{self.args.output_dir} holds no whole checkpoint to resume from")
        self._term_sums = {}
        return super().train(str(resume_from_checkpoint) if resume_from_checkpoint else None, *args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # Older checkpoints go only after the new one is marked whole, or a kill in between leaves none
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()  # every process writes its own random state into the folder
        if self.args.should_save:
            folder = self._get_output_dir(trial)
            mark_whole(Path(folder) / f"checkpoint-{self.state.global_step}")
            rotate_checkpoints(folder, limit, self.state.best_model_checkpoint, use_mtime=True)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        # The stock method pickles the arguments beside the weights, token included
        token, self.args.hub_token = self.args.hub_token, None
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.args.hub_token = token

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(NO_PUSH)


def with_example_ids(dataset: Any) -> Any:
    """Rows numbered where they are not: keyed randomness needs a name for every example.

    Raises TypeError for rows that cannot be numbered (a torch data set without `example_id`).
    """
    if dataset is None or isinstance(dataset, str):
        return dataset
    if isinstance(dataset, dict):
        return {name: with_example_ids(part) for name, part in dataset.items()}
    if hasattr(dataset, "column_names"):
        ready = "example_id" in (dataset.column_names or [])
        return dataset if ready else dataset.add_column("example_id", list(range(len(dataset))))
    if hasattr(dataset, "__len__") and "example_id" not in dataset[0]:
        raise TypeError(
            f"rows of {type(dataset).__name__} need an `example_id` (the row number), which keys their random masks: add it, "
            "or pass a datasets.Dataset, where it is added for you"
        )
    return dataset
