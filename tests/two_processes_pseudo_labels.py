"""Runs on pseudo-labels that write down who learned which label in which epoch, for tests/test_laws_pseudo_labels.py.

torchrun --nproc_per_node 2 tests/two_processes_pseudo_labels.py OUTPUT       all of RUNS
python tests/two_processes_pseudo_labels.py OUTPUT --draw batch --killed_at 7 a run of one process, killed after that step
"""

import argparse
import os
import signal
from pathlib import Path

import torch
import transformers
from datasets import Dataset

from hfkd import DistillationArguments, DistillationTrainer
from hfkd.objectives import PseudoLabel
from hfkd.teachers import EnsembleTeacher
from hfkd.testing import tiny_roberta_config, tiny_rows, tiny_tokenizer

# Each is 8 rows an optimizer step on two processes
RUNS = {
    "example": {"per_device_train_batch_size": 4},
    "example accumulated": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    "batch": {"per_device_train_batch_size": 4},
    "batch accumulated": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    "ragged": {"per_device_train_batch_size": 4},
}


class Written(PseudoLabel):
    """Appends a line "epoch example_id label" to a file for every label that is learned from."""

    def __init__(self, path: Path):
        super().__init__()
        self.path = path

    def settings(self):
        return PseudoLabel().settings()

    def forward(self, student, teacher, batch, progress=None):
        with self.path.open("a") as file:
            for number, label in zip(batch["example_id"].tolist(), teacher.labels.tolist(), strict=True):
                file.write(f"{int(progress.epoch)} {number} {label}\n")
        return super().forward(student, teacher, batch, progress)


class Killed(transformers.TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def classifier(seed: int, spread: float = 0.02):
    torch.manual_seed(seed)
    return transformers.RobertaForSequenceClassification(
        tiny_roberta_config(num_labels=3, initializer_range=spread)
    ).double()


def members():
    """Three who disagree about most rows."""
    return [classifier(seed, spread=1.0) for seed in (1, 2, 3)]


def pool(rows: int = 32) -> Dataset:
    return Dataset.from_list(tiny_rows(rows))


def pseudo_trainer(output, settings, draw="example", rows=None, teachers=None, callbacks=None) -> DistillationTrainer:
    values = {
        "output_dir": str(output),
        "num_train_epochs": 3,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **settings,
    }
    args = DistillationArguments(**values)
    output.mkdir(parents=True, exist_ok=True)
    return DistillationTrainer(
        classifier(0),
        args,
        train_dataset=pool() if rows is None else rows,
        processing_class=tiny_tokenizer(),
        callbacks=callbacks,
        teacher=EnsembleTeacher(teachers or members(), "sample", draw=draw),
        objective=Written(output / f"labels-{args.process_index}.txt"),
    )


def run_of_two(output: Path) -> None:
    found: dict = {}
    for name, settings in RUNS.items():
        rows = pool(30) if name == "ragged" else None
        draw = "batch" if name.startswith("batch") else "example"
        trainer = pseudo_trainer(output / name, settings, draw, rows)
        trainer.train()
        found[name] = {key: tensor.clone() for key, tensor in trainer.model.state_dict().items()}
    found["world_size"] = trainer.args.world_size
    torch.save(found, output / f"rank-{trainer.args.process_index}.pt")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("--draw", default="example")
    parser.add_argument("--killed_at", type=int)
    given = parser.parse_args()
    if given.killed_at is None:
        run_of_two(given.output)
    else:
        settings = {"save_strategy": "steps", "save_steps": 3}
        pseudo_trainer(given.output, settings, given.draw, callbacks=[Killed(given.killed_at)]).train()


if __name__ == "__main__":
    main()
