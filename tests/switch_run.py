"""A run that switches objectives, started as a script by the laws that need processes of their own.

python tests/switch_run.py OUTPUT '{"max_steps": 40}' WHICH     one run
python tests/switch_run.py OUTPUT                               every kind, for two processes: writes OUTPUT/rank-N.pt
"""

import json
import sys
from pathlib import Path

import torch
import transformers

from hfkd.objectives import KD, CrossEntropy, HiddenStates, MiniLMRelations, Switch
from hfkd.testing import tiny_roberta_config
from rounds_run import classifier_trainer

# `hidden` has a wider teacher, hence projections, and in its first part no gradient for the head; `inside` never has one
SWITCHES = {
    "kd_to_labels": ("sequence", 16, lambda: Switch(KD(3.0, 1.0), CrossEntropy(), start=1, window=3)),
    "labels_to_kd": ("sequence", 16, lambda: Switch(CrossEntropy(), KD(3.0, 1.0), start=1, window=3)),
    "tokens": ("token", 16, lambda: Switch(KD(3.0, 0.7), CrossEntropy(), start=1, window=3)),
    "hidden": ("sequence", 24, lambda: Switch(HiddenStates(alpha=1.0), KD(3.0, 0.7), start=2, window=3)),
    "inside": ("sequence", 16, lambda: Switch(HiddenStates(alpha=1.0), MiniLMRelations(alpha=1.0), start=2, window=3)),
    "long": ("sequence", 24, lambda: Switch(HiddenStates(alpha=1.0), KD(3.0, 0.7), start=2, window=36)),
}
STEPS = 6


def switch_trainer(output, settings, which, objective=None, **kwargs):
    head, width, made = SWITCHES[which]
    kind = {"sequence": "RobertaForSequenceClassification", "token": "RobertaForTokenClassification"}[head]
    torch.manual_seed(1)
    teacher = getattr(transformers, kind)(tiny_roberta_config(num_labels=3, hidden_size=width)).double()
    settings = {"max_steps": STEPS, **settings}
    return classifier_trainer(output, settings, head=head, teacher=teacher, objective=objective or made(), **kwargs)


def main(output: Path) -> None:
    found: dict = {}
    for which in sorted(set(SWITCHES) - {"long"}):  # the processes in one order
        accumulated = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
        settings = accumulated if which == "kd_to_labels" else {"per_device_train_batch_size": 4}
        trainer = switch_trainer(output / which, settings, which)
        trainer.train()
        state = {**trainer.model.state_dict(), **prefixed(trainer.objective)}
        found[which] = {key: tensor.clone() for key, tensor in state.items()}
    found["world_size"] = trainer.args.world_size
    torch.save(found, output / f"rank-{trainer.args.process_index}.pt")


def prefixed(objective):
    return {f"objective.{name}": tensor for name, tensor in objective.state_dict().items()}


if __name__ == "__main__":
    if len(sys.argv) == 2:
        main(Path(sys.argv[1]))
    else:
        switch_trainer(sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]).train()
