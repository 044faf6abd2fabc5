"""Groups of students that tests train: alone, on two processes, and killed.

torchrun --nproc_per_node 2 tests/group_run.py OUTPUT            all of RUNS
python tests/group_run.py OUTPUT --run fused --killed_at 7       a run of one process, killed after that step
"""

import argparse
import os
import signal
from pathlib import Path

import torch
import transformers
from datasets import Dataset

from hfkd import CNet, CollaborativeArguments, CollaborativeTrainer, ConstantWeights
from hfkd.meta import LogitTrunk, TextTrunk
from hfkd.testing import tiny_roberta_config, tiny_rows, tiny_tokenizer

SIZES = {"small": 16, "large": 32}
# Each is 8 rows an optimizer step on two processes; the coordinator moves in every second one
RUNS = {
    "reference": {},
    "fused": {"meta_order": "fused", "max_grad_norm": 0.05},
    "sgd": {"optim": "sgd", "optim_args": "momentum=0.9", "meta_engine": "double_backward", "max_grad_norm": 0.05},
    "last_layer": {"meta_engine": "last_layer"},
    "epochs": {"coordinator_interval": 3, "coordinator_interval_unit": "epochs", "warm_start_epochs": 1},
    "logits": {},
    "fused logits": {"meta_order": "fused"},
    "constant": {},
}


class Killed(transformers.TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def classifier(seed: int, hidden_size: int = 32, dropout: float = 0.0):
    torch.manual_seed(seed)
    return transformers.RobertaForSequenceClassification(
        tiny_roberta_config(
            num_labels=3,
            hidden_size=hidden_size,
            initializer_range=0.2,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
    ).double()


def students(dropout: float = 0.0):
    return {name: classifier(seed, size, dropout) for seed, (name, size) in enumerate(SIZES.items())}


def rows(count: int, first: int = 0) -> Dataset:
    """Labelled, all different, and none of another `first`."""
    found = tiny_rows(first + count)[first:]
    return Dataset.from_list([{**row, "label": sum(row["input_ids"]) % 3} for row in found])


def coordinator(run: str):
    torch.manual_seed(9)
    if run == "constant":
        return ConstantWeights(task={"small": 0.3, "large": 0.6}, distill=0.5)
    trunk = LogitTrunk() if "logits" in run else TextTrunk(tiny_roberta_config().vocab_size, 16)
    return CNet(trunk).double()


def group_trainer(output, settings, run="reference", dropout=0.0, callbacks=None, **given) -> CollaborativeTrainer:
    values = {
        "output_dir": str(output),
        "num_train_epochs": 3,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "coordinator_interval": 2,
        "coordinator_learning_rate": 0.05,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        **RUNS[run],
        **settings,
    }
    trainer = CollaborativeTrainer(
        given.pop("students", None) or students(dropout),
        CollaborativeArguments(**values),
        train_dataset=rows(32),
        processing_class=tiny_tokenizer(),
        callbacks=callbacks,
        teacher=classifier(7),
        **{"coordinator": coordinator(run), "meta_dataset": rows(16, 100), **given},
    )
    trainer.coordinator.double()  # a part of it is made by the trainer
    return trainer


def state_of(trainer) -> dict[str, torch.Tensor]:
    found = {f"student {name}": tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    return found | {f"coordinator {name}": tensor.clone() for name, tensor in trainer.coordinator.state_dict().items()}


def run_of_two(output: Path) -> None:
    found: dict = {}
    for name in RUNS:
        trainer = group_trainer(output / name, {"per_device_train_batch_size": 4}, name)
        trainer.train()
        found[name] = state_of(trainer)
        found[f"{name} logs"] = [entry for entry in trainer.state.log_history if "loss" in entry]
        found[f"{name} evaluated"] = trainer.evaluate(rows(16, 200))
    found["world_size"] = trainer.args.world_size
    torch.save(found, output / f"rank-{trainer.args.process_index}.pt")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("--run", default="reference")
    parser.add_argument("--killed_at", type=int)
    given = parser.parse_args()
    if given.killed_at is None:
        run_of_two(given.output)
    else:
        settings = {"save_strategy": "steps", "save_steps": 3}
        group_trainer(given.output, settings, given.run, 0.2, callbacks=[Killed(given.killed_at)]).train()


if __name__ == "__main__":
    main()
