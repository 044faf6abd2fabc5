"""Small members of an ensemble trained side by side: their weights stacked, one vmapped forward for all (torch.func).

A small network spends most of a step on launching operations, and a stack launches each of them once for all members. Batches,
order, augmentation, optimizer, schedule and clipping are those of each member's own trainer, so that every member ends where
it would have ended alone, to rounding. recipes/benchmarks/stacked_members.py measures whether that is faster.

What works: networks without random draws (dropout) and without decisions that depend on values. Batch norm does, because
running means are stacked like weights (seen with torch 2.13; torch's own advice is to leave batch norm out). The encoders of
transformers for text do not: they look into the attention mask to choose a kernel.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from transformers.utils import ModelOutput

from hfkd import DistillationTrainer
from hfkd.objectives import CrossEntropy

ELEMENTWISE = ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop")  # a stack's step is its members' steps
Batches = list[dict[str, Any]]


def train_stacked(trainers: Sequence[DistillationTrainer]) -> int:
    """Trains the models of all trainers, each on its own rows, as `trainer.train()` would; returns the number of steps.

    Nothing is logged, evaluated or saved on the way. Raises what `refuse_unstackable` raises.
    """
    refuse_unstackable(trainers)
    first = trainers[0]
    loaders = [trainer.get_train_dataloader() for trainer in trainers]
    epochs, *_, steps = first.set_initial_training_values(first.args, loaders[0])
    stack = stacked([trainer.model.train() for trainer in trainers])
    optimizer = first.create_optimizer(stack)
    scheduler = first.create_scheduler(steps, optimizer)
    for step, batches in enumerate(steps_of(trainers, loaders, epochs), start=1):
        losses(first, stack, batches).sum().backward()
        clip_each(stack, first.args.max_grad_norm)
        optimizer.step()
        scheduler.step()
        stack.zero_grad()
        if step == steps:
            break
    unstack(stack, [trainer.model for trainer in trainers])
    return steps


# ---- weights ----


def stacked(models: Sequence[nn.Module]) -> nn.Module:
    """A copy of the first model whose parameters and buffers are those of all: (members, *shape), under the same names."""
    stack = copy.deepcopy(models[0])
    for name, parameter in stack.named_parameters():
        parameter.data = torch.stack([model.get_parameter(name).detach() for model in models])
    for name, buffer in stack.named_buffers():
        buffer.data = torch.stack([model.get_buffer(name) for model in models])
    return stack


@torch.no_grad()
def unstack(stack: nn.Module, models: Sequence[nn.Module]) -> None:
    for number, model in enumerate(models):
        for name, parameter in stack.named_parameters():
            model.get_parameter(name).copy_(parameter[number])
        for name, buffer in stack.named_buffers():
            model.get_buffer(name).copy_(buffer[number])


# ---- a step ----


def steps_of(
    trainers: Sequence[DistillationTrainer], loaders: Sequence[Any], epochs: int
) -> Iterator[list[tuple[Any, Any]]]:
    """For each step what every member reads in it, (student view, batch): its own order and augmentation."""
    for epoch in range(epochs):
        for trainer, loader in zip(trainers, loaders, strict=True):
            for keyed in trainer.keyed:
                keyed.set_position(round=trainer.round, epoch=epoch)
            loader.set_epoch(epoch)
        for batches in zip(*loaders, strict=True):
            prepared = [trainer._prepare_inputs(batch) for trainer, batch in zip(trainers, batches, strict=True)]
            yield [
                (trainer.student_view(batch, training=True), batch)
                for trainer, batch in zip(trainers, prepared, strict=True)
            ]


def losses(trainer: DistillationTrainer, stack: nn.Module, batches: Sequence[tuple[Any, Any]]) -> Tensor:
    """(members,): the mean over each member's units, by the trainer's objective."""
    views = {name: torch.stack([view[name] for view, _ in batches]) for name in batches[0][0]}
    labels = torch.stack([batch["labels"] for _, batch in batches])
    logits = answers(stack, views)
    whole = {"labels": labels.flatten(0, 1)}
    terms = trainer.objective(ModelOutput(logits=logits.flatten(0, 1)), None, whole, trainer.progress)
    counts = torch.stack([trainer.objective.count(batch)["task_loss"] for _, batch in batches])
    return terms["task_loss"].view(len(batches), -1).sum(1) / counts.clamp(min=1)


def answers(stack: nn.Module, views: dict[str, Tensor]) -> Tensor:
    """views: (members, batch, ...) each; logits: (members, batch, num_labels). Running means are updated in place."""

    def answer(parameters: Any, buffers: Any, view: Any) -> Tensor:
        return functional_call(stack, (parameters, buffers), kwargs=view).logits

    return vmap(answer)(dict(stack.named_parameters()), dict(stack.named_buffers()), views)


@torch.no_grad()
def clip_each(stack: nn.Module, max_norm: float) -> None:
    """The gradient of each member by its own norm, as torch.nn.utils.clip_grad_norm_ does for one model."""
    gradients = [parameter.grad for parameter in stack.parameters() if parameter.grad is not None]
    if not max_norm > 0:
        return
    norms = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients]).norm(dim=0)
    factors = (max_norm / (norms + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(factors.view(-1, *[1] * (gradient.ndim - 1)))


# ---- what is refused ----


def refuse_unstackable(trainers: Sequence[DistillationTrainer]) -> None:
    """Raises ValueError for trainers whose members cannot be stacked, or would not end as they do alone."""
    first, args = trainers[0], trainers[0].args
    sizes = sorted({len(trainer.train_dataset) for trainer in trainers})
    if len(sizes) > 1:
        raise ValueError(f"stacked members step together, and theirs are {sizes} rows: give all the same number")
    if type(first.objective) is not CrossEntropy:
        raise ValueError(f"stacked members learn from labels (CrossEntropy), not with {type(first.objective).__name__}")
    wrong = {
        "gradient_accumulation_steps": args.gradient_accumulation_steps != 1,
        "bf16": args.bf16,
        "fp16": args.fp16,
        "optim": args.optim not in ELEMENTWISE,
        "world_size": args.world_size != 1,
        "save_strategy": str(args.save_strategy.value) != "no",
        "eval_strategy": str(args.eval_strategy.value) != "no",
    }
    if odd := [f"{name}={getattr(args, name)}" for name, is_odd in wrong.items() if is_odd]:
        raise ValueError(
            f"{', '.join(odd)}: stacked members train in one process and in float32, without accumulation, with an optimizer "
            f"that works element by element ({', '.join(ELEMENTWISE)}), and nothing is saved or evaluated on the way"
        )
    rehearse(trainers)


def rehearse(trainers: Sequence[DistillationTrainer]) -> None:
    """One forward in training mode, of copies. Raises ValueError where torch.func cannot run this network."""
    models = [copy.deepcopy(trainer.model).train() for trainer in trainers[:2]]
    batches = []
    for trainer in trainers[:2]:
        rows = trainer._remove_unused_columns(trainer.train_dataset)
        batch = trainer._prepare_inputs(trainer._eval_collator([rows[0], rows[0]]))
        batches.append((trainer.student_view(batch, training=True), batch))
    try:
        with torch.random.fork_rng():
            losses(trainers[0], stacked(models), batches)
    except RuntimeError as error:
        raise ValueError(
            f"{type(models[0]).__name__} cannot be stacked ({str(error).split('.')[0]}): it draws random numbers (dropout: "
            "set it to 0) or decides by values; train its members one after another"
        ) from error
