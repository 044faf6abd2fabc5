"""A learning rate that falls in steps, as the papers on CIFAR and ImageNet train."""

from __future__ import annotations

from typing import Any

from torch.optim.lr_scheduler import LambdaLR


def milestone_scheduler(args: Any, num_training_steps: int, optimizer: Any) -> LambdaLR:
    """Linear warm-up, then the peak times `lr_milestone_factor` for each of `lr_milestones` that has passed.

    Milestones are epochs of `num_train_epochs`: where `max_steps` cuts training, they are moved by the same share.
    """
    warmup = args.get_warmup_steps(num_training_steps)
    steps = [milestone / args.num_train_epochs * num_training_steps for milestone in args.lr_milestones]

    def factor(step: int) -> float:
        warm = step / warmup if step < warmup else 1.0
        return warm * args.lr_milestone_factor ** sum(step >= milestone for milestone in steps)

    return LambdaLR(optimizer, factor)
