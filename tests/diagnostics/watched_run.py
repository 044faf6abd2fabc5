"""A small watched training run: of the tests, and, as a script on two processes, `watched_run.py OUTPUT`."""

import sys
from pathlib import Path

import datasets
import torch
from transformers import RobertaForSequenceClassification

from hfkd import KD, DistillationArguments, DistillationTrainer
from hfkd.diagnostics import DiagnosticsCallback
from hfkd.testing import tiny_roberta_config, tiny_rows, tiny_tokenizer


def classifier(seed, **changes):
    torch.manual_seed(seed)
    return RobertaForSequenceClassification(
        tiny_roberta_config(num_labels=3, initializer_range=0.5, **changes)
    ).double()


def rows(count=17, labelled=True):
    """17: neither a batch nor two processes divide it."""
    found = tiny_rows(count)
    for i, row in enumerate(found):
        row |= {"label": i % 3, "hour": "day" if i % 4 else "night"} if labelled else {}
    return datasets.Dataset.from_list(found)


def watched(output, every=2, dropout=0.0, compared=None, callback=True, watch=None, **changes):
    values = {"max_steps": 5, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 3, "eval_steps": 1,
              "eval_strategy": "steps", "save_strategy": "no", "learning_rate": 1e-2, "report_to": "none",
              "disable_tqdm": True, "use_cpu": True, **changes}  # fmt: skip
    trainer = DistillationTrainer(
        classifier(0, hidden_dropout_prob=dropout),
        DistillationArguments(output_dir=str(output), **values),
        None,
        rows(32),
        rows(6),
        processing_class=tiny_tokenizer(),
        teacher=classifier(1, hidden_size=24),
        objective=KD(temperature=2.0, alpha=0.5),
    )
    if callback:
        compared = rows() if compared is None else compared
        trainer.add_callback(DiagnosticsCallback(trainer, compared, every=every, **(watch or {})))
    trainer.train()
    return trainer


def logged(trainer):
    return [entry for entry in trainer.state.log_history if "eval_fidelity_agreement" in entry]


if __name__ == "__main__":
    output = Path(sys.argv[1])
    run = watched(output / "run", per_device_train_batch_size=4, watch={"group_column": "hour"})
    torch.save({"logged": logged(run), "weights": run.model.state_dict()}, output / f"rank-{run.args.process_index}.pt")
