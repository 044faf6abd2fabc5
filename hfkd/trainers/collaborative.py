"""k students and a coordinator (MC-Distil)."""

from __future__ import annotations

import copy
import dataclasses
import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import EvalPrediction, TrainerCallback

from hfkd.cards import CardFacts
from hfkd.data.rows import numbered_for
from hfkd.diagnostics.cost import cost_of
from hfkd.functional import labelled_units
from hfkd.lookahead import InnerStep, Losses, Params, TrainingLoss, along, outer_gradient, weight_gradients
from hfkd.meta import CNet, Coordinator, trunk_for
from hfkd.models.student_group import StudentGroup, inputs_of
from hfkd.objectives.collaboration import Collaboration, GroupObjective, task_losses
from hfkd.objectives.objective import Objective
from hfkd.outputs import Batch, TeacherOutput, with_entry
from hfkd.records import read_json, write_json
from hfkd.trainers.arguments import CollaborativeArguments
from hfkd.trainers.checkpoints import load_student
from hfkd.trainers.distillation import DistillationTrainer
from hfkd.trainers.meta_check import (
    refuse_shared_meta_rows,
    refuse_unknown_kernels,
    refuse_wrong_group,
    refuse_wrong_meta_rows,
)

GROUP_FILE = "group.json"
WEIGHTS_FILE = "coordinator.safetensors"
OPTIMIZER_FILE = "coordinator_optimizer.pt"
QUARTILES = (0.25, 0.5, 0.75)


class _AroundStep(TrainerCallback):
    """The fused order takes the students' real step as the look-ahead."""

    def __init__(self, trainer: CollaborativeTrainer):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer._seen:
            self.trainer._before_fused_step()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer._seen:
            self.trainer._fused_meta_step()


class CollaborativeTrainer(DistillationTrainer):
    """`transformers.Trainer` for a `StudentGroup`: k students learn from one teacher, each example with weights of its own.

    Same arguments in the same order as DistillationTrainer's; `model` is a StudentGroup or a mapping of names to models, and
    `teacher` is asked once a batch for all students. Then, as keywords:

    objective: a GroupObjective; default Collaboration (Tambat et al., TMLR 2025), with the task term alone without a teacher.
    coordinator: what weights the examples. Default: a CNet on what the students read; ConstantWeights(task=..., distill=...)
        for weights set by hand (then nothing is looked ahead to).
    meta_dataset: labelled rows apart from those of training and evaluation, on which a coordinator that learns is judged:
        every `coordinator_interval` steps it moves down the gradient of the students' cross-entropy there after their next
        optimizer step, which `hfkd.lookahead` computes. Rows of a meta step are drawn by (seed, step), so that resume changes
        nothing. Students, batch-norm statistics, random state and optimizer are untouched in the order "reference".

    Every student is trained as if it were alone: one optimizer with parameter groups of its own, its own clipping. Metrics
    and terms carry its name (`eval_small_accuracy`, `small_distill_loss`), `eval_mean_accuracy` is the mean over students,
    predictions are (rows, students, num_labels), and each is saved as a plain model in a folder of its name. Checkpoints hold
    the coordinator and its optimizer too.

    Raises ValueError for students that do not fit together, without a meta set where one is needed or with one that shares
    rows with training or evaluation data, for optimizers and attention kernels that the look-ahead does not know, for
    weights that become non-finite (with step and student), and for a checkpoint of other students.
    """

    model: Any
    _objective: GroupObjective

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
        teacher: Any = None,
        *,
        objective: Objective | None = None,
        coordinator: Coordinator | None = None,
        meta_dataset: Any = None,
    ):
        args = args or CollaborativeArguments(output_dir="tmp_trainer")
        model = StudentGroup(model) if isinstance(model, Mapping) else model
        refuse_wrong_group(model if model_init is None else None, args, objective, teacher)
        self._metrics_of_one, self._preprocess_one = compute_metrics, preprocess_logits_for_metrics
        self._answers: deque[TeacherOutput | None] = deque()
        self._seen: list[_Seen] = []
        self._fused_step: Any = None
        self._last_weights: Tensor | None = None
        self.meta_seconds = 0.0  # spent in meta steps, on this process
        super().__init__(
            model,
            args,
            data_collator,
            train_dataset,
            eval_dataset,
            processing_class,
            model_init,
            compute_loss_func,
            compute_metrics and self._metrics_of_each,
            callbacks,
            optimizers,
            optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics and self._preprocess_each,
            teacher,
            objective=objective,
        )
        self._set_coordinator(coordinator, meta_dataset)
        self.add_callback(_AroundStep(self))

    # ---- set-up ----

    def _objective_of_arguments(self, with_teacher: bool) -> Objective:
        temperature = 2.0 if self.args.temperature is None else self.args.temperature
        return Collaboration(temperature, pooled=self.args.pooled_student, teacher=with_teacher)

    def _meet_student(self, student: Any) -> None:
        refuse_wrong_group(student, self.args, self._objective, self.teacher)
        self._objective.meet(student.names)
        super()._meet_student(student)
        for _, one in student.items():
            one.config.problem_type = student.config.problem_type

    def _set_coordinator(self, coordinator: Coordinator | None, meta_dataset: Any) -> None:
        group, columns = self.model, list(getattr(self.train_dataset, "column_names", None) or ())
        learned = coordinator is None or coordinator.learns
        with torch.random.fork_rng():  # else the students' dropout would depend on who weights their examples
            if learned:
                refuse_wrong_meta_rows(meta_dataset, self.args.meta_batch_size, self.accelerator.num_processes)
            torch.manual_seed(self.args.seed)
            self.coordinator = coordinator or CNet(trunk_for(group.config, columns))
            if "example_id" in self.coordinator.columns:
                self.train_dataset = numbered_for(self.data_collator, self.train_dataset)
            self.coordinator.build(group.names, self._objective.parts, group.config.num_labels, self._example_ids())
        self.coordinator.to(self.args.device)
        self._signature_columns = None
        self._meta_optimizer: torch.optim.Optimizer | None = None
        self.meta_dataset = meta_dataset
        if not learned:
            return
        for parameter in self.coordinator.parameters():  # the user may have drawn another trunk on each process
            parameter.data = self.accelerator.reduce(parameter.data, "sum") / self.accelerator.num_processes
        self._coordinator_start = copy.deepcopy(self.coordinator.state_dict())
        self._meta_optimizer = self._new_meta_optimizer()
        refuse_unknown_kernels(group, self.args)
        read = group.forward_names | set(getattr(self.data_collator, "columns", ()))
        refuse_shared_meta_rows(meta_dataset, self.train_dataset, self.eval_dataset, read)
        self.meta_dataset = numbered_for(self._eval_collator, meta_dataset) if self.keyed else meta_dataset
        self._meta_rows = self.meta_dataset
        if hasattr(self.meta_dataset, "column_names"):
            self._meta_rows = self._remove_unused_columns(self.meta_dataset, "meta")

    def _example_ids(self) -> Tensor | None:
        names = getattr(self.train_dataset, "column_names", None) or ()
        if "example_id" not in names or not hasattr(self.train_dataset, "__len__"):
            return None
        return torch.as_tensor(np.asarray(self.train_dataset["example_id"][:]))

    def _new_meta_optimizer(self) -> torch.optim.Optimizer:
        return self.coordinator.make_optimizer(self.args.coordinator_learning_rate, self.args.coordinator_weight_decay)

    def create_optimizer(self, model: Any = None) -> Any:
        """One optimizer; a parameter group per student and decay class."""
        if self.optimizer is None:
            kind, settings = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = kind(self._parameter_groups(), **settings)
        if self._meta_optimizer is not None:
            if getattr(self, "_trial", None) is not None:  # a search has changed the arguments since
                self._meta_optimizer = self._new_meta_optimizer()
            self._inner_step()  # an optimizer that cannot be looked ahead of is refused before the first step
        return super().create_optimizer(model)

    def _parameter_groups(self) -> list[dict[str, Any]]:
        groups = []
        for name, student in self.model.items():
            decayed = set(self.get_decay_parameter_names(student))
            trained = {key: p for key, p in student.named_parameters() if p.requires_grad}
            for decays in (True, False):
                chosen = [p for key, p in trained.items() if (key in decayed) == decays]
                if chosen:
                    decay = self.args.weight_decay if decays else 0.0
                    groups.append({"params": chosen, "weight_decay": decay, "student": name})
        return groups

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Each student by its own norm: a large student's gradient must not shrink a small one's step."""
        self.accelerator.unscale_gradients()  # fp16: accelerate's own clip does so too, and may only once a step
        self._norms = [
            nn.utils.clip_grad_norm_(student.parameters(), self.args.max_grad_norm) for _, student in self.model.items()
        ]
        return torch.stack(self._norms).norm()

    @property
    def _forward_names(self) -> set[str]:
        return self.accelerator.unwrap_model(self.model).forward_names

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        coordinator = getattr(self, "coordinator", None)
        more = [*sorted(self._forward_names), *(coordinator.columns if coordinator is not None else ())]
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, *more]))

    def _logits_before_training(self, views: list[dict[str, Any]]) -> list[Tensor]:
        return [logits[:, 0] for logits in super()._logits_before_training(views)]  # the first student's

    # ---- a step ----

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        samples, counts = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._answers.clear()
        self._seen.clear()
        self._is_due = bool(samples) and self._meta_step_is_due()
        if self._is_due and self.args.meta_order == "reference":
            samples = self._meta_step(samples, counts)
        self._counts = counts
        return samples, counts

    def _meta_step_is_due(self) -> bool:
        step, epoch, interval = self.state.global_step, self.state.epoch or 0.0, self.args.coordinator_interval
        if self._meta_optimizer is None or epoch < self.args.warm_start_epochs:
            return False
        if self.args.coordinator_interval_unit == "epochs":  # every step of every interval-th epoch
            return (int(epoch + 1e-9) + 1) % interval == 0
        return step % interval == 0

    def _answer_and_outputs(self, model: nn.Module, inputs: Batch) -> tuple[TeacherOutput | None, Any]:
        answer = self._answers.popleft() if self._answers else self._ask_teacher(inputs)
        fused = self._is_due and self.args.meta_order == "fused"
        state = random_state(self.args.device) if fused else None
        # Other attention kernels of a GPU draw dropout in another way, and the look-ahead repeats this pass with MATH
        with sdpa_kernel(SDPBackend.MATH) if fused and self.args.device.type != "cpu" else nullcontext():
            outputs = model(**self.student_view(inputs, training=True))
        with torch.set_grad_enabled(fused):
            weights = self._weights(inputs, outputs.logits.detach(), answer)
        if fused:
            self._seen.append(_Seen(inputs, answer, state, weights))
        self._last_weights = weights.detach()
        return answer, with_entry(outputs, "weights", self._last_weights)

    def _weights(self, inputs: Batch, logits: Tensor | None, answer: TeacherOutput | None) -> Tensor:
        """(examples, students, losses). Raises ValueError where they are not finite (checked on the CPU: no host waits)."""
        if (self.state.epoch or 0.0) < self.args.warm_start_epochs:
            return self._warm_weights(inputs)
        given = None if answer is None or answer.logits is None else answer.logits.detach()
        with torch.autocast(self.args.device.type, enabled=False):
            weights = self.coordinator(inputs, logits, given)
        if self.args.device.type == "cpu":
            self._refuse_non_finite(weights.detach(), "weights")
        return weights

    def _warm_weights(self, inputs: Batch) -> Tensor:
        """The task alone, as a student that is trained without a teacher."""
        row = [1.0 if part == "task" else 0.0 for part in self._objective.parts]
        return torch.tensor(row, device=self.args.device).expand(len(inputs["labels"]), len(self.model), -1)

    def _refuse_non_finite(self, values: Tensor, what: str) -> None:
        if bool(torch.isfinite(values).all()):
            return
        bad = (~torch.isfinite(values)).flatten(2).any(-1).any(0).nonzero().flatten().tolist()
        raise ValueError(
            f"step {self.state.global_step}: the {what} of {', '.join(self.model.names[k] for k in bad)} are NaN or infinite; "
            "the last checkpoint is whole. Lower learning_rate or coordinator_learning_rate, or take output='sigmoid'"
        )

    # ---- the meta step ----

    def _meta_step(self, samples: list[Any], counts: Any) -> list[Any]:
        """Reference order: the coordinator moves first; returns the batches as the step then sees them."""
        started = time.perf_counter()
        batches = [self._prepare_inputs(sample) for sample in samples]
        answers = [self._ask_teacher(batch) for batch in batches]
        self._answers.extend(answers)
        self.model.train()
        step, draws = self._inner_step(), [self._seeded("train", i) for i in range(len(batches))]
        params = {name: p.detach() for name, p in step.params.items()}
        weights = []
        for batch, answer, draw in zip(batches, answers, draws, strict=True):
            logits = None
            if self.coordinator.reads_logits:
                with torch.no_grad():
                    logits = self._logits(params, batch, draw)
            weights.append(self._weights(batch, logits, answer))
        losses = [self._losses(*seen) for seen in zip(batches, answers, draws, strict=True)]
        training = self._training(losses, weights, counts)
        engine = self.args.meta_engine
        self._move_coordinator(weights, weight_gradients(engine, training, self._validation(), params, step))
        self.meta_seconds += time.perf_counter() - started
        return batches

    def _before_fused_step(self) -> None:
        started = time.perf_counter()
        self._fused_step = self._inner_step()
        self._fused_step.remember()
        self.meta_seconds += time.perf_counter() - started

    def _fused_meta_step(self) -> None:
        """The students have just taken the step: it is the look-ahead. The new weights act from the next batch on."""
        started = time.perf_counter()
        seen, step = self._seen, self._fused_step
        now = {name: p.detach() for name, p in step.params.items()}
        outer = outer_gradient(self._validation(), now, self._add)
        with torch.no_grad():
            direction = step.pull_back(step.before, self._unclipped(step), outer, stepped=True)
        losses = [self._losses(one.inputs, one.answer, one.draw(self)) for one in seen]
        training = self._training(losses, [one.weights for one in seen], self._counts)
        gradients = along(self.args.meta_engine, training, step.before, direction)
        self._move_coordinator([one.weights for one in seen], gradients)
        self._fused_step = None  # the copy of the parameters goes with it
        seen.clear()
        self.meta_seconds += time.perf_counter() - started

    def _inner_step(self) -> InnerStep:
        optimizer: Any = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate's wrapper
        moving = self.model.last_layer_of if self.args.meta_engine == "last_layer" else self.model.parameters_of
        students = {name: moving(name) for name in self.model.names}
        if still := [name for name, params in students.items() if not params]:
            raise ValueError(
                f"{', '.join(still)}: no parameter is trained that meta_engine {self.args.meta_engine!r} could look ahead with; "
                "set requires_grad, leave the student out, or give coordinator=ConstantWeights(...)"
            )
        return InnerStep(optimizer, list(students.values()), self.args.max_grad_norm or 0.0)

    def _unclipped(self, step: InnerStep) -> Params:
        """The gradients before clipping, which has scaled them in place."""
        found: Params = {}
        for number, student in enumerate(step.students):
            grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in student.items()}
            if self.args.max_grad_norm:
                factor = (self.args.max_grad_norm / (self._norms[number] + 1e-6)).clamp(max=1.0)
                grads = {name: gradient / factor for name, gradient in grads.items()}
            found |= grads
        return found

    def _training(self, losses: list[Losses], weights: list[Tensor], counts: Any) -> TrainingLoss:
        dtype = torch.promote_types(self.model.dtype, torch.float32)
        fixed = [given.detach().to(dtype) for given in weights]
        return TrainingLoss(losses, fixed, next(iter(counts.values())).clamp(min=1), self._add)

    def _add(self, values: Params) -> Params:
        return values if self.accelerator.num_processes == 1 else self.accelerator.reduce(values, "sum")

    def _losses(self, inputs: Batch, answer: TeacherOutput | None, draw: Callable[[], Any]) -> Losses:
        given = None if answer is None else answer.logits
        return lambda params: self._objective.losses(self._logits(params, inputs, draw), given, inputs)

    def _validation(self) -> Callable[[Params], Tensor]:
        """This process's part of the sum over students of their mean cross-entropy on a meta batch, with the labels alone."""
        batch, kind = self._meta_batch(), self._objective.problem_type
        labelled = labelled_units(batch["labels"], kind)
        units = self._add({"units": labelled.sum()})["units"].clamp(min=1)
        draw = self._seeded("meta", 0)

        def validation(params: Params) -> Tensor:
            values = task_losses(self._logits(params, batch, draw), batch["labels"], kind)
            return torch.where(labelled[:, None], values, 0.0).sum() / units

        return validation

    def _meta_batch(self) -> dict[str, Any]:
        rows, world = self._meta_rows, self.accelerator.num_processes
        usual = self.args.train_batch_size * self.args.gradient_accumulation_steps * world
        size = min(self.args.meta_batch_size or usual, len(rows))
        drawn = np.random.default_rng((self.args.seed, self.state.global_step)).choice(len(rows), size, replace=False)
        mine = drawn[self.accelerator.process_index :: world]
        collate = self.data_collator if self.args.meta_augmentation else self._eval_collator
        # All at once where the rows can: one by one they cost more than the meta step of a small group
        with self._seeded("meta", 1)():  # a transform of the rows may draw
            shown = rows.__getitems__(mine.tolist()) if hasattr(rows, "__getitems__") else [rows[int(i)] for i in mine]
            return self._prepare_inputs(collate(shown))

    def _logits(self, params: Params, inputs: Batch, draw: Callable[[], Any]) -> Tensor:
        """The group's logits at these parameters, in training mode; the group's own weights and statistics stay as they are."""
        group = self.model
        state = {name: p.detach() for name, p in group.named_parameters()}
        state |= {name: buffer.clone() for name, buffer in group.named_buffers()}  # batch norm writes into them
        # Fused attention has neither a second derivative nor a forward-mode rule
        with draw(), sdpa_kernel(SDPBackend.MATH):
            return functional_call(group, state | params, (), self.student_view(inputs, training=True)).logits

    def _seeded(self, what: str, number: int) -> Callable[[], Any]:
        """Dropout of a meta step: a function of (seed, step, batch, process), the same in every pass over the batch."""
        key = (self.args.seed, self.state.global_step, number, self.args.process_index, what == "meta")
        seed = int(np.random.SeedSequence([int(part) for part in key]).generate_state(1)[0])

        @contextmanager
        def draw() -> Iterator[None]:
            with forked(self.args.device):
                torch.manual_seed(seed)
                yield

        return draw

    def _move_coordinator(self, weights: list[Tensor], gradients: list[Tensor]) -> None:
        assert self._meta_optimizer is not None
        for found in gradients:
            self._refuse_non_finite(found, "meta-gradients")
        torch.autograd.backward(weights, [g.to(w.dtype) for g, w in zip(gradients, weights, strict=True)])
        moved = {name: p for name, p in self.coordinator.named_parameters() if p.requires_grad}
        summed = self._add({name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in moved.items()})
        for name, parameter in moved.items():
            parameter.grad = summed[name]
        self._meta_optimizer.step()
        self._meta_optimizer.zero_grad(set_to_none=True)
        self.coordinator.after_update()

    # ---- logs and evaluation ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the quartiles of the last batch's weights."""
        if "loss" in logs and self._meta_optimizer is not None and self._last_weights is not None:
            levels = torch.tensor(QUARTILES, device=self._last_weights.device)
            found = torch.quantile(self._last_weights.float(), levels, dim=0).tolist()
            for level, students in zip(QUARTILES, found, strict=True):
                for name, values in zip(self.model.names, students, strict=True):
                    for part, value in zip(self._objective.parts, values, strict=True):
                        logs[f"{name}_{part}_weight_q{round(100 * level)}"] = value
        super().log(logs, start_time)

    def _metrics_of_each(self, prediction: EvalPrediction) -> dict[str, float]:
        assert self._metrics_of_one is not None
        named = {}
        for k, name in enumerate(self.model.names):
            own = np.asarray(prediction.predictions)[:, k]
            one = EvalPrediction(own, prediction.label_ids, inputs=prediction.inputs, losses=prediction.losses)
            named[name] = self._metrics_of_one(one)
        found = {f"{name}_{key}": value for name, metrics in named.items() for key, value in metrics.items()}
        shared = set.intersection(*(set(metrics) for metrics in named.values()))
        for key in sorted(shared):
            values = [metrics[key] for metrics in named.values()]
            if all(isinstance(value, int | float | np.number) for value in values):
                found[f"mean_{key}"] = float(np.mean(values))
        return found

    def _preprocess_each(self, logits: Tensor, labels: Tensor) -> Tensor:
        assert self._preprocess_one is not None
        return torch.stack([self._preprocess_one(one, labels) for one in logits.unbind(1)], dim=1)

    def _record_agreement(self, outputs: Any, answer: TeacherOutput, inputs: Batch, name: str = "agreement") -> None:
        for student, logits in zip(self.model.names, outputs.logits.unbind(1), strict=True):
            super()._record_agreement(type(outputs)(logits=logits), answer, inputs, f"{student}_{name}")

    # ---- save and resume ----

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        for name, student in self.model.items():
            student.save_pretrained(folder / name)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder / name)
        if state := self.coordinator.state_dict():
            save_file({key: value.contiguous() for key, value in state.items()}, folder / WEIGHTS_FILE)
        write_json(folder / GROUP_FILE, self._facts())
        for name in self.model.names:
            self.write_card(folder / name)
        token, self.args.hub_token = self.args.hub_token, None
        try:
            torch.save(self.args, folder / "training_args.bin")
        finally:
            self.args.hub_token = token

    # ---- a card for each student ----

    card_template = "collaborative_student.md"

    def _name_in(self, folder: Path) -> str:
        return f"{self.hub_model_id.rpartition('/')[2]}-{folder.name}" if self.hub_model_id else folder.name

    def _model_in(self, folder: Path) -> Any:
        return self.accelerator.unwrap_model(self.model)[folder.name]

    def _metrics_in(self, folder: Path) -> dict[str, float]:
        own, found = f"{folder.name}_", super()._metrics_in(folder)
        return {key.removeprefix(own): value for key, value in found.items() if key.startswith(own)}

    def _facts_read_off(self, folder: Path) -> CardFacts:
        metrics = {name: self._metrics_in(folder.parent / name) for name in self.model.names}
        group = [
            {
                "name": name,
                "repo": self._repository_of(name),
                "parameters": facts["parameters"],
                "accuracy": metrics[name].get("accuracy"),
            }
            for name, facts in self._facts()["students"].items()
        ]
        chosen = ("coordinator_interval", "coordinator_interval_unit", "meta_engine", "meta_order", "warm_start_epochs")
        ours = {"coordinator": type(self.coordinator).__name__, **{name: getattr(self.args, name) for name in chosen}}
        found = super()._facts_read_off(folder)
        return dataclasses.replace(
            found,
            repo_id=self._repository_of(folder.name),
            group=group,
            role="member",
            costs=self._costs.get(folder.name, {}),
            settings={**found.settings, **(ours if self.coordinator.learns else {"coordinator": ours["coordinator"]})},
            citations=found.citations or ["mc-distil"],
        )

    def _repository_of(self, name: str) -> str:
        return f"{self.hub_model_id}-{name}" if self.hub_model_id else ""

    def _saved_students(self) -> list[tuple[Path, str, str | None]]:
        """Every student has a repository of its own, with its name behind the group's."""
        self.save_model(_internal_call=True)
        return [(Path(self.args.output_dir) / name, self._repository_of(name), None) for name in self.model.names]

    def _measured_costs(self) -> dict[str, Any]:
        batch = self._timed_batch()
        if batch is None:
            return {}
        view, teacher = self.student_view(batch, training=False), self._teacher_cost(batch)
        costs = ((name, cost_of(student, inputs_of(student, view))) for name, student in self.model.items())
        return {name: {"student": cost, **teacher} for name, cost in costs}

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Groups are uploaded at the end of training: a checkpoint holds several students."""

    def _facts(self) -> dict[str, Any]:
        """What a checkpoint must agree with."""
        students = {
            name: {"architecture": type(student).__name__, "parameters": sum(p.numel() for p in student.parameters())}
            for name, student in self.model.items()
        }
        return {
            "students": students,
            "parts": list(self._objective.parts),
            "coordinator": {
                "kind": type(self.coordinator).__name__,
                "output": getattr(self.coordinator, "output", None),
            },
        }

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder, ours = Path(resume_from_checkpoint), self._facts()
        theirs = read_json(folder / GROUP_FILE)
        if not isinstance(theirs, dict):
            raise ValueError(f"{folder.name} holds no {GROUP_FILE}: it is no checkpoint of a group of students")
        for key, value in ours.items():
            if json.dumps(theirs.get(key)) != json.dumps(value):  # the students' order counts: C-Net's outputs have it
                raise ValueError(
                    f"{folder.name} was written with other {key}: {json.dumps(theirs.get(key))} there, {json.dumps(value)} "
                    "here; start anew in another output_dir, or resume with those of the checkpoint"
                )
        for name, student in self.model.items():
            load_student(student, folder / name)
        if self.coordinator.state_dict():
            self.coordinator.load_state_dict(load_file(folder / WEIGHTS_FILE, device=str(self.args.device)))

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self._meta_optimizer is not None and self.args.should_save:
            torch.save(self._meta_optimizer.state_dict(), Path(output_dir) / OPTIMIZER_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self._meta_optimizer is not None:
            state = torch.load(Path(checkpoint) / OPTIMIZER_FILE, map_location=self.args.device, weights_only=True)
            self._meta_optimizer.load_state_dict(state)

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        if self.model_init is not None and self._meta_optimizer is not None:  # a new group, and a new coordinator
            self.coordinator.load_state_dict(self._coordinator_start)
            self._meta_optimizer = self._new_meta_optimizer()
        return super().train(resume_from_checkpoint, *args, **kwargs)


class _Seen:
    """A micro-batch of a step that serves as the look-ahead."""

    def __init__(self, inputs: Batch, answer: TeacherOutput | None, state: Any, weights: Tensor):
        self.inputs, self.answer, self.state, self.weights = inputs, answer, state, weights

    def draw(self, trainer: CollaborativeTrainer) -> Callable[[], Any]:
        """The dropout that the step had."""

        @contextmanager
        def again() -> Iterator[None]:
            with forked(trainer.args.device):
                set_random_state(trainer.args.device, self.state)
                yield

        return again


@contextmanager
def forked(device: torch.device) -> Iterator[None]:
    """Whatever is drawn inside leaves the random state of CPU and device as it was."""
    before = random_state(device)
    try:
        yield
    finally:
        set_random_state(device, before)


def random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    on_device = None if device.type == "cpu" else getattr(torch, device.type).get_rng_state(device)
    return torch.get_rng_state(), on_device


def set_random_state(device: torch.device, state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        getattr(torch, device.type).set_rng_state(state[1], device)
