"""One student, any teacher."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import warnings
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_utils import rotate_checkpoints
from transformers.utils import ModelOutput

from hfkd.data.collate import KeyedCollator
from hfkd.data.rows import label_of_first_row, lengths_of, numbered_for, problem_type_of_label
from hfkd.data.sampler import KeyedLengthSampler
from hfkd.diagnostics.trackers import replace_stock
from hfkd.functional import labelled_units
from hfkd.objectives.cross_entropy import CrossEntropy
from hfkd.objectives.objective import Objective
from hfkd.outputs import Batch, Counts, Progress, TeacherOutput
from hfkd.teachers import ModelTeacher, Teacher
from hfkd.trainers.arguments import DistillationArguments, objective_of_other_arguments
from hfkd.trainers.checkpoints import last_whole_checkpoint, load_renamed_weights, mark_whole
from hfkd.trainers.equipment import equip, holds_attached, load_learned, save_learned, without_attached
from hfkd.trainers.inputs import collator_of, refuse_dispatched_draws, show_teacher
from hfkd.trainers.publishing import PublishingTrainer
from hfkd.trainers.schedule import milestone_scheduler
from hfkd.trainers.teacher_check import (
    SLICE,
    any_labelled,
    logits_in_eval_mode,
    refuse_bad_logits,
    refuse_other_pixels,
    refuse_other_problem,
    refuse_other_shapes,
    refuse_stale_view,
    refuse_too_few_rows,
    refuse_wrong_view,
    report,
    score,
)

FEATURES = frozenset({"hidden_states", "attentions", "qkv", "features"})
OPTIONAL_VIEWS = frozenset({"masked_positions", "clean_input_ids"})


class _PlaceKeyed(TrainerCallback):
    """Tells collator and sampler the round and epoch before the epoch's first batch is drawn."""

    def __init__(self, trainer: DistillationTrainer):
        self.trainer = trainer
        self.epoch = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.epoch = int(state.epoch or 0)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Counted: over a stream `state.epoch` is still below 1 when the second pass begins
        for keyed in self.trainer.keyed:
            keyed.set_position(round=self.trainer.round, epoch=self.epoch)
        self.epoch += 1


class DistillationTrainer(PublishingTrainer):
    """`transformers.Trainer` whose loss is an objective over the student's and the teacher's answers.

    Same arguments in the same order, then `teacher` (a Teacher, a model, a folder or a Hub id), `objective` and
    `peft_config`. Without an objective the fields of `args` name one, and otherwise it is KD with a teacher and
    CrossEntropy without, so that the baseline shares every other line. (`teacher_model=` of the copied snippet works and
    warns.)

    Each term's loss is the sum over its units divided by the number of its units in the whole optimizer step, over
    micro-batches and processes: batch 8 equals 2 x 4 accumulated equals two processes. The stock Trainer is off by the
    number of accumulation steps for several encoder heads (huggingface/transformers#47688). `eval_loss` is the task
    term alone, so that it compares across objectives; `eval_teacher=True` adds the distillation terms and the agreement
    of the two sides' predicted classes. Before the first step the teacher is scored on a slice of the data, beside the
    student and a constant answer (`teacher_scores`).

    Raises ValueError for a `compute_loss_func`, for an objective that needs a teacher when there is none, for labels or
    tokenizers of teacher and student that do not match, for teacher logits that are not finite, for several GPUs in one
    process, and where the launcher started more processes than the Trainer sees.
    """

    args: Any
    model: Any
    data_collator: Any
    _signature_columns: Any
    train_dataset: Any
    teacher: Teacher | None
    _same_labels = True
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
        teacher_model: Any = None,
    ):
        if teacher_model is not None:
            warnings.warn("teacher_model=... is called teacher=... here", FutureWarning, stacklevel=2)
            teacher = teacher_model
        args = args or DistillationArguments(output_dir="tmp_trainer")
        if compute_loss_func is not None:
            raise ValueError("compute_loss_func would bypass the objective: write an Objective and pass objective=...")
        if peft_config is not None:
            if model is None:
                raise ValueError("peft_config goes with model=...; with model_init, return a PeftModel from it")
            from peft import get_peft_model

            model = get_peft_model(model, peft_config)
        self._default_collator = data_collator is None and collator_of(processing_class, train_dataset)
        data_collator = self._default_collator or data_collator
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
        named = isinstance(self.args, DistillationArguments) and self.args.names_objective()
        if objective is not None and named:
            raise ValueError(
                f"objective={type(objective).__name__}(...) is given, and args name {self.args.objective or 'settings'} too "
                "(objective, temperature, alpha, objective_kwargs): keep one of the two"
            )
        if objective is not None and self.args.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor={self.args.label_smoothing_factor} acts on the default CrossEntropy only: give "
                f"label smoothing to {type(objective).__name__} itself and set label_smoothing_factor=0"
            )
        self.label_names = self.label_names or ["labels"]  # DeiT's head with a teacher and others name none
        self._unequip: Callable[[], None] | None = None
        self.teacher_scores: dict[str, float] | None = None
        self._objective_from_arguments = objective is None
        objective = objective or self._objective_of_arguments(teacher is not None)
        self._set_keyed_collator(numbered=teacher is not None)
        processes, dispatched = self.accelerator.num_processes, self.accelerator.dispatch_batches
        refuse_dispatched_draws(self.data_collator, self.train_dataset, processes, dispatched)
        self._set_objective(objective, teacher)
        replace_stock(self)

    # ---- set-up ----

    def _objective_of_arguments(self, with_teacher: bool) -> Objective:
        if isinstance(self.args, DistillationArguments):
            return self.args.make_objective("kd" if with_teacher else "cross_entropy")
        if with_teacher:
            return objective_of_other_arguments(self.args)
        return CrossEntropy(self.args.label_smoothing_factor)

    def _set_keyed_collator(self, numbered: bool) -> None:
        for_evaluation = getattr(self.data_collator, "for_evaluation", lambda: copy.deepcopy(self.data_collator))
        self._eval_collator = for_evaluation()  # stays at round 0, epoch 0: eval masks never change
        self.keyed: list[Any] = []
        self.add_callback(_PlaceKeyed(self))
        if isinstance(self.data_collator, KeyedCollator):
            self.keyed.append(self.data_collator)
            self.eval_dataset = numbered_for(self._eval_collator, self.eval_dataset)
        if (
            self.keyed or numbered
        ):  # numbers are a must for keyed randomness, and else a name for a bad teacher's answer
            self.train_dataset = numbered_for(self.data_collator, self.train_dataset)

    def _set_objective(self, objective: Objective, teacher: Teacher | nn.Module | str | Path | None) -> None:
        if "teacher" in objective.needs and teacher is None:
            raise ValueError(
                f"{type(objective).__name__} needs a teacher: pass teacher=... (a model, a folder or a Hub id)"
            )
        if teacher is not None and teacher is self.model:
            raise ValueError(
                "teacher and student are one module, and the teacher's weights are frozen: pass a copy.deepcopy, or "
                "AdapterTeacher() for a student with a PEFT adapter"
            )
        self.objective = objective
        self.teacher = teacher if teacher is None or isinstance(teacher, Teacher) else self._load_teacher(teacher)
        if self.args.push_to_hub and getattr(self.args, "push_teacher", False):
            self.refuse_teacher_without_model()  # said after training, it costs the training
        self._meet_student(self.model)
        for collator in (self.data_collator, self._eval_collator) if self._default_collator else ():
            show_teacher(collator, getattr(self.teacher, "processing_class", None))
        if self.teacher is not None:
            self._refuse_wrong_inputs(self.teacher)
        if objective.needs & FEATURES and getattr(objective, "alpha", 0) == 1:
            # The head gets no gradient, and DDP would wait for it
            self.accelerator.ddp_handler.find_unused_parameters = True
        self._signature_columns = None

    def _load_teacher(self, teacher: nn.Module | str | Path) -> ModelTeacher:
        return ModelTeacher(
            teacher,
            dtype=getattr(self.args, "teacher_dtype", None),
            allow_untrained=getattr(self.args, "allow_untrained_teacher", False),
        )

    def _meet_student(self, student: Any) -> None:
        """Objective and teacher learn what student they have: once, and again for every student that model_init makes."""
        config = getattr(student, "config", None)
        problem_type = self._problem_type(config)
        if config is not None and problem_type != "single_label_classification":
            config.problem_type = problem_type  # as the heads of transformers note it: pipelines read it
        if self.teacher is not None:
            self.teacher.prepare(student, self._objective.needs, self.args.device)
        self._objective.build(config, self.teacher and self.teacher.config, problem_type)
        self._objective.to(self.args.device)
        if self._objective.attached is not None:  # before a checkpoint is read into it, or digits would be lost
            self._objective.attached.to(student.dtype)
        if self.teacher is None or "teacher" not in self._objective.needs:
            return
        try:
            refuse_other_problem(problem_type, getattr(self.teacher.config, "problem_type", None))
            self.teacher.align_labels(config)
            self._same_labels = True
        except ValueError:
            if not self._objective.needs & FEATURES:
                raise
            self._same_labels = False  # what is compared inside two models does not depend on their labels

    def _problem_type(self, config: Any) -> str:
        """As transformers' heads guess it from labels, but before the first batch."""
        if getattr(config, "problem_type", None):
            return config.problem_type
        if getattr(config, "num_labels", 2) == 1:
            return "regression"
        return problem_type_of_label(label_of_first_row(self.train_dataset, self.eval_dataset))

    def _refuse_wrong_inputs(self, teacher: Teacher) -> None:
        refuse_stale_view(teacher, self.data_collator)
        if "teacher" not in self._objective.needs:
            return
        rows, token_by_token = self.train_dataset, self._objective.token_by_token
        config = getattr(self.model, "config", None)
        for member in (one for one in getattr(teacher, "members", [teacher]) if hasattr(one, "model")):
            refuse_other_pixels(member, self.processing_class, self.data_collator, rows)
            if all(hasattr(rows, name) for name in ("column_names", "__len__")):
                refuse_wrong_view(member, self.processing_class, self.data_collator, rows, config, token_by_token)

    def call_model_init(self, trial: Any = None) -> Any:
        student = super().call_model_init(trial)
        if hasattr(self, "_objective"):  # a search makes a student per trial; the teacher is loaded once
            self._meet_student(student)
        return student

    def create_optimizer(self, model: Any = None) -> Any:
        """The last moment before the optimizer looks for parameters: what the objective trains is put on the student."""
        if getattr(self, "_trial", None) is not None:
            self._renew_objective()
        if self.optimizer is not None and not holds_attached(self.optimizer, self._objective):
            raise ValueError(
                f"{type(self._objective).__name__} trains a projection between the two widths, which the given optimizer does "
                "not hold: pass optimizer_cls_and_kwargs instead of optimizers"
            )
        if self._objective.attached is not None and self.is_fsdp_enabled:
            raise ValueError(
                f"{type(self._objective).__name__} trains a projection, whose gradients accelerate's FSDP would not synchronise: "
                "load the student with transformers' DistributedConfig(fsdp_size=...), or take DDP"
            )
        self._check_teacher()
        self._equip()
        return super().create_optimizer(model)

    def _renew_objective(self) -> None:
        """A search has changed the arguments after the student was made."""
        if self._objective_from_arguments:
            self.objective = self._objective_of_arguments(self.teacher is not None)
            self._meet_student(self.model)
        elif isinstance(self.args, DistillationArguments) and self.args.names_objective():
            raise ValueError(
                "the search changes alpha, temperature or another setting of the objective, but objective=... was given to "
                "the trainer: name it in the arguments instead (DistillationArguments(objective='kd', ...))"
            )

    def _equip(self) -> None:
        if self._unequip is None:
            self._unequip = equip(self.accelerator.unwrap_model(self.model), self._objective)

    def _take_off(self) -> None:
        if self._unequip is not None:
            self._unequip()
            self._unequip = None

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """As in transformers, or in steps at `lr_milestones`."""
        if self.lr_scheduler is None and getattr(self.args, "lr_milestones", None):
            self.lr_scheduler = milestone_scheduler(self.args, num_training_steps, optimizer or self.optimizer)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the teacher's and the objective's columns, which the student's forward does not name."""
        super()._set_signature_columns_if_needed()
        teacher_columns = self.teacher.columns if self.teacher is not None else ()
        self._signature_columns = list(
            dict.fromkeys(
                [
                    *(self._signature_columns or []),
                    *teacher_columns,
                    *self._objective.columns,
                    *getattr(self.data_collator, "columns", ()),
                    "example_id",
                ]
            )
        )

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """As in transformers, but the order of `group_by_length` survives a resume and another number of processes."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length" or not hasattr(dataset, "__len__"):
            return super()._get_train_sampler(train_dataset)
        name = getattr(self.processing_class, "model_input_names", ["input_ids"])[0]
        lengths = lengths_of(dataset, name, self.args.length_column_name)
        rows_per_step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        sampler = KeyedLengthSampler(lengths, rows_per_step, self.args.seed)
        self.keyed = [*(k for k in self.keyed if not isinstance(k, KeyedLengthSampler)), sampler]
        return sampler

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        """In the order of the rows: the stock sampler groups them by length too, and predictions come back shuffled."""
        if self.args.train_sampling_strategy == "group_by_length" and hasattr(eval_dataset, "__len__"):
            return torch.utils.data.SequentialSampler(eval_dataset)
        return super()._get_eval_sampler(eval_dataset)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        return self._with_eval_collator(super().get_eval_dataloader, eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        return self._with_eval_collator(super().get_test_dataloader, test_dataset)

    def _with_eval_collator(self, build: Callable[[Any], Any], dataset: Any) -> Any:
        # Prefetching workers of the training loader share the training collator's position: never move that one
        train_collator, self.data_collator = self.data_collator, self._eval_collator
        try:
            return build(
                numbered_for(self.data_collator, dataset) if isinstance(train_collator, KeyedCollator) else dataset
            )
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
        kept_outside |= OPTIONAL_VIEWS - set(self._objective.columns if training else self._objective.task_columns)
        names = self._forward_names - kept_outside
        view: dict[str, Any] = {name: value for name, value in inputs.items() if name in names}
        for name in ("hidden_states", "attentions"):
            if training and name in self._objective.needs:
                view[f"output_{name}"] = True
        return view

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """On the device, images are augmented and normalised there, once for both sides."""
        inputs = super()._prepare_inputs(inputs)
        return self.data_collator.on_device(inputs) if hasattr(self.data_collator, "on_device") else inputs

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        shown = {"pixel_values": inputs["pixels"]} if "pixels" in inputs else inputs  # not on the device yet
        return super().floating_point_ops(shown)

    def _ask_teacher(self, inputs: Batch) -> TeacherOutput | None:
        if self.teacher is None or "teacher" not in self._objective.needs:
            return None
        with self.accelerator.autocast():  # else a bf16 student would be compared with a float32 teacher
            answer = self.teacher(inputs, self.progress)
        if self.args.device.type == "cpu":  # elsewhere the host would wait for the device: there a slice is checked
            refuse_bad_logits(answer, inputs)
        return answer

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
            return self._evaluation_loss(model, inputs, return_outputs)
        self._refuse_unwrapped(model)
        answer, outputs = self._answer_and_outputs(model, inputs)
        terms = self._objective(outputs, answer, inputs, self.progress)
        counts = self._objective.count(inputs) if num_items_in_batch is None else num_items_in_batch
        loss = self.reduce_terms(terms, counts)
        return (loss, ModelOutput(logits=outputs.logits)) if return_outputs else loss

    def _answer_and_outputs(self, model: nn.Module, inputs: Batch) -> tuple[TeacherOutput | None, Any]:
        answer = self._ask_teacher(inputs)
        return answer, model(**self.student_view(inputs, training=True))

    def _evaluation_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool) -> Any:
        answer = self._ask_teacher(inputs) if self._asks_in_evaluation else None
        outputs = model(**self.student_view(inputs, training=answer is not None))
        terms, counts = self._objective.task(outputs, inputs), self._objective.count(inputs)
        loss = torch.stack(list(self._means(terms, counts, 1).values())).sum()
        self._record_evaluation(terms, counts)
        if answer is not None:
            scored = self._objective(outputs, answer, inputs, self.progress)
            beyond = {name: values for name, values in scored.items() if name not in terms}
            self._record_evaluation(beyond, counts, asked=True)
            self._record_agreement(outputs, answer, inputs)
        # Logits alone: whatever else the outputs hold would reach compute_metrics as predictions
        return (loss, ModelOutput(logits=outputs.logits)) if return_outputs else loss

    @property
    def _asks_in_evaluation(self) -> bool:
        return bool(getattr(self.args, "eval_teacher", False)) and self.teacher is not None

    def _record_agreement(self, outputs: Any, answer: TeacherOutput, inputs: Batch, name: str = "agreement") -> None:
        """Share of units for which both sides predict one class; multi-label: share of labels."""
        if not self._same_labels or answer.logits is None or "labels" not in inputs:
            return
        units = labelled_units(inputs["labels"], self._objective.problem_type)
        if self._objective.problem_type == "single_label_classification":
            same = (outputs.logits.argmax(-1) == answer.logits.argmax(-1)) & units
        elif self._objective.problem_type == "multi_label_classification":
            same = ((outputs.logits > 0) == (answer.logits > 0)).float().mean(-1)
        else:
            return  # two numbers never agree exactly; distill_loss is their distance
        self._record_evaluation({name: same}, {name: units.sum()}, asked=True)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        equipped = self._unequip is not None
        if self._asks_in_evaluation:
            self._equip()
        try:
            return super().evaluation_loop(*args, **kwargs)
        finally:
            if not equipped:
                self._take_off()

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        """As in transformers, but unlabelled rows keep the teacher's columns and example_id out of the student."""
        inputs = self._prepare_inputs(inputs)
        if any(inputs.get(name) is None for name in self.label_names):
            inputs = self.student_view(inputs, training=False)
            usual = getattr(self.model.config, "keys_to_ignore_at_inference", ["past_key_values"])
            ignore_keys = [*(ignore_keys or usual), *FEATURES, "projected"]
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds what the objective weighs its terms by at this step (alpha, the weights of a switch)."""
        if "loss" in logs:
            last = dataclasses.replace(
                self.progress, step=max(self.state.global_step - 1, 0)
            )  # whose terms stand there
            logs |= self._objective.schedule(last)
        super().log(logs, start_time)

    # ---- train and save ----

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, but `resume_from_checkpoint=True` takes the last *whole* checkpoint."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole_checkpoint(Path(self.args.output_dir))
            if resume_from_checkpoint is None:
                raise ValueError(f"{self.args.output_dir} holds no whole checkpoint to resume from")
        refuse_too_few_rows(self.train_dataset, self.args)
        self._term_sums = {}
        self.teacher_scores = None
        if self.args.push_to_hub and self.is_world_process_zero():  # saves in between are uploaded too
            self._hide_private_teacher(self.args.hub_token)
        try:
            return super().train(str(resume_from_checkpoint) if resume_from_checkpoint else None, *args, **kwargs)
        finally:
            self._take_off()

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers, but a run that was killed after its last step is closed as it is: the stock loop looks only
        after a step whether it was the last, and would resume with one more."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _check_teacher(self) -> None:
        """Score the teacher on a slice of the training rows, without a data loader: that would draw random numbers."""
        data = self.train_dataset
        if (
            self.teacher_scores is not None
            or self.teacher is None
            or "teacher" not in self._objective.needs
            or not hasattr(data, "__len__")
        ):
            return
        size, count = self.args.per_device_eval_batch_size, min(SLICE, len(data))
        shown = self._remove_unused_columns(data) if hasattr(data, "column_names") else data
        with torch.random.fork_rng():  # a transform of the rows may draw; a resumed run must not see that
            # Evenly spread: the first rows of sorted data are of one class, which a constant answer gets right
            rows = [shown[i * len(data) // count] for i in range(count)]
        batches = [self._prepare_inputs(self._eval_collator(rows[i : i + size])) for i in range(0, len(rows), size)]
        theirs = []  # logits only: the hidden states of a whole slice need not lie in memory
        for batch in batches:
            answer = self.teacher(batch, self.progress)
            if answer.logits is None:
                return
            refuse_bad_logits(answer, batch)
            theirs.append(answer.logits)
        kind = self._objective.problem_type
        unlabelled = any("labels" not in batch for batch in batches) or not any_labelled(batches, kind)
        if self._objective.needs & FEATURES or unlabelled:
            return  # its logits are not what is learned from, or there is nothing to score them by
        ours = self._logits_before_training([self.student_view(batch, training=False) for batch in batches])
        refuse_other_shapes(ours, theirs)
        self.teacher_scores = report(score(theirs, batches, kind), score(ours, batches, kind), len(rows), kind)

    def _logits_before_training(self, views: list[dict[str, Any]]) -> list[torch.Tensor]:
        return logits_in_eval_mode(self.model, views)

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
        if self._objective.attached is not None and self._unequip is not None:
            state_dict = without_attached(state_dict or self.accelerator.unwrap_model(self.model).state_dict())
        # The stock method pickles the arguments beside the weights, token included
        token, self.args.hub_token = self.args.hub_token, None
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.args.hub_token = token
        if self.args.should_save:
            save_learned(self._objective, output_dir or self.args.output_dir)
            self.write_card(output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self._load_renamed(resume_from_checkpoint, model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        load_learned(self._objective, resume_from_checkpoint)

    def _load_renamed(self, checkpoint: str, model: Any = None) -> bool:
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        student = self.accelerator.unwrap_model(self.model if model is None else model)
        return not sharded and load_renamed_weights(student, checkpoint)

    def _load_best_model(self) -> None:
        self._take_off()  # what is on the student has a file of its own, and would be reported as missing
        if not self._load_renamed(str(self.state.best_model_checkpoint)):
            super()._load_best_model()
        load_learned(self._objective, str(self.state.best_model_checkpoint))
