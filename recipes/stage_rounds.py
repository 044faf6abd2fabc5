"""What the recipes of self-distillation do alike around their rounds: bounds, folders, ablations, and how long a step took."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from hfkd import SelfDistillationArguments, SelfDistillationTrainer
from hfkd.records import read_json, write_json
from program import say

WRITTEN = ("round-*", "ablation-*", "pretraining-seed-*", "fine_tuning", "fine_tuned", "start", "rounds.json")


def bounded(steps: int, args: SelfDistillationArguments) -> int:
    return steps if args.max_steps <= 0 else min(steps, args.max_steps)


def resumes(args: SelfDistillationArguments) -> bool:
    if args.resume_from_checkpoint not in (None, "True", "true", True, "False", "false"):
        raise ValueError(
            f"--resume_from_checkpoint takes True here (rounds resume from output_dir), not {args.resume_from_checkpoint}"
        )
    return args.resume_from_checkpoint in ("True", "true", True)


def earlier_run(recipe: Any, args: SelfDistillationArguments) -> list[Path]:
    """What --overwrite deletes: the stages of an earlier run and nothing else. Two runs in one folder are refused."""
    output = Path(args.output_dir)
    written = sorted(path for name in WRITTEN for path in output.glob(name))
    if resumes(args) or not written:
        return []
    if not recipe.overwrite:
        raise FileExistsError(
            f"{output} holds another run ({', '.join(path.name for path in written)}): go on with it with "
            "--resume_from_checkpoint True, delete it with --overwrite, or choose another --output_dir"
        )
    return written


def delete(written: list[Path], trainer: SelfDistillationTrainer) -> None:
    if trainer.is_world_process_zero():
        for path in written:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    trainer.accelerator.wait_for_everyone()


# ---- ablations ----


def ablations(
    recipe: Any, args: SelfDistillationArguments, output: Path, new_trainer: Callable[..., SelfDistillationTrainer]
) -> dict[str, Path]:
    """The paper's: other numbers of further-pre-training steps, no masked loss, another thing to match.

    `new_trainer(folder, **changes of the arguments)` makes the trainer of one. Each lies in a folder of its own.
    """
    stages = {}
    for steps in recipe.ablation_steps:
        say(f"Ablation: {steps} steps of further pre-training")
        folder, changes = output / f"ablation-steps-{steps}", {"num_rounds": 0, "max_steps": bounded(steps, args)}
        stages[f"further pre-trained, {steps} steps"] = one_ablation(folder, changes, new_trainer)
    if recipe.ablation_no_pretrain_loss:
        say("Ablation: one round without the masked loss")
        folder, changes = output / "ablation-no-pretrain-loss", {"num_rounds": 1, "no_pretrain_loss": True}
        reuse_round_0(output / "round-0", folder / "round-0")
        stages["no masked loss"] = one_ablation(folder, changes, new_trainer)
    for matching in getattr(recipe, "ablation_matching", []):
        say(f"Ablation: one round that matches {matching}")
        folder, changes = output / f"ablation-{matching}", {"num_rounds": 1, "matching": matching}
        reuse_round_0(output / "round-0", folder / "round-0")
        stages[f"matching {matching}"] = one_ablation(folder, changes, new_trainer)
    return stages


def one_ablation(folder: Path, changes: dict[str, Any], new_trainer: Callable[..., SelfDistillationTrainer]) -> Path:
    trainer = new_trainer(folder, **changes)
    trainer.train(resume_from_checkpoint=True)
    return trainer.round_directory(changes["num_rounds"])


def reuse_round_0(source: Path, target: Path) -> None:
    """The ablation differs from round 1 on, so further pre-training is not paid for twice."""
    if target.exists() or int(os.environ.get("RANK", 0)):
        return
    temporary = target.with_name("copying")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary, ignore=shutil.ignore_patterns("checkpoint-*"))
    temporary.rename(target)


# ---- time ----

SECONDS = "seconds.json"


class Clock(TrainerCallback):
    """Leaves in every round's folder how long a step took, over the steps since the round was started or resumed.

    What is done before the first step (a teacher asked about every image once) is not counted.
    """

    def __init__(self, trainer: SelfDistillationTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begun, self.first = time.monotonic(), state.global_step

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        taken = state.global_step - self.first
        if taken and self.trainer.is_world_process_zero():
            per_step = (time.monotonic() - self.begun) / taken
            folder = self.trainer.round_directory(self.trainer.round)
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / SECONDS, {"steps": state.global_step, "per_step": per_step})


def seconds_of(directory: Path) -> tuple[float, float] | None:
    """Seconds of all rounds that led to this one, itself included, and seconds a step of this one; None where unknown."""
    if not directory.name.startswith("round-"):
        return 0.0, 0.0
    last = int(directory.name.removeprefix("round-"))
    found = [read_json(directory.with_name(f"round-{number}") / SECONDS) for number in range(last + 1)]
    known = [seconds for seconds in found if seconds is not None]
    if len(known) < len(found):
        return None
    return sum(seconds["steps"] * seconds["per_step"] for seconds in known), known[-1]["per_step"]
