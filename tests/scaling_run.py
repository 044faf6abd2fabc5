"""A student distilled by whatever launched this script; rank 0 writes OUTPUT/found.json and OUTPUT/student.

accelerate launch --config_file recipes/accelerate_configs/ddp.yaml tests/scaling_run.py OUTPUT
torchrun --nproc_per_node 2 tests/scaling_run.py OUTPUT --fsdp
"""

import argparse
import json
import os
from pathlib import Path

import torch
import transformers
from datasets import Dataset

from hfkd import KD, DistillationArguments, DistillationTrainer, HiddenStates
from hfkd.testing import tiny_roberta_config, tiny_rows, tiny_tokenizer

ROWS_A_STEP = 8


def classifier(seed: int, hidden_size: int = 32) -> transformers.RobertaForSequenceClassification:
    """Large weights: with the usual ones two of these answer nearly the same, and there is nothing to learn."""
    torch.manual_seed(seed)
    config = tiny_roberta_config(num_labels=3, hidden_size=hidden_size, initializer_range=0.2)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    return transformers.RobertaForSequenceClassification(config)


def start_of_student(output: Path, fsdp: bool) -> transformers.PreTrainedModel:
    """The same weights in every run. `fsdp`: from OUTPUT/start, sharded while they are loaded."""
    if not fsdp:
        return classifier(0)
    from transformers.distributed import DistributedConfig

    sharded = DistributedConfig(fsdp_size=int(os.environ["WORLD_SIZE"]))
    return transformers.RobertaForSequenceClassification.from_pretrained(output / "start", distributed_config=sharded)


def distil(output: Path, which: str = "kd", fsdp: bool = False, accumulation: int = 1) -> DistillationTrainer:
    """`which`: kd, or hidden, whose projections train beside the student."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    rows = [{**row, "labels": number % 3} for number, row in enumerate(tiny_rows(32))]
    args = DistillationArguments(
        output_dir=str(output / which),
        per_device_train_batch_size=ROWS_A_STEP // processes // accumulation,
        gradient_accumulation_steps=accumulation,
        max_steps=4,
        learning_rate=1e-2,
        max_grad_norm=0.05,  # small enough that every step is clipped
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = DistillationTrainer(
        start_of_student(output, fsdp),
        args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
        teacher=classifier(1, 32 if which == "kd" else 64),
        objective=KD(temperature=3.0) if which == "kd" else HiddenStates(),
    )
    trainer.train()
    trainer.save_model(str(output / which / "student"))
    return trainer


def found(trainer: DistillationTrainer) -> dict:
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "losses": [entry["loss"] for entry in logs],
        "norms": [entry["grad_norm"] for entry in logs],
        "world_size": trainer.args.world_size,
        "device": str(trainer.args.device),
        "distributed": str(trainer.accelerator.distributed_type),
        "parameter": type(next(trainer.model.parameters())).__name__,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("--fsdp", action="store_true")
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--runs", nargs="+", default=["kd"])
    given = parser.parse_args()
    runs = {which: found(distil(given.output, which, given.fsdp, given.accumulation)) for which in given.runs}
    if int(os.environ.get("RANK", 0)) == 0:
        (given.output / "found.json").write_text(json.dumps(runs))


if __name__ == "__main__":
    main()
