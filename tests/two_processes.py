"""What two processes do, launched once by tests/test_two_processes.py; writes OUTPUT/rank-N.pt for it to compare."""

import sys
from pathlib import Path

import torch

from rounds_run import DISTILLED, classifier_trainer, distilled_trainer, rounds_trainer


def main(output: Path) -> None:
    found: dict = {}
    trainer = rounds_trainer(output / "rounds", {"per_device_train_batch_size": 4}, double=True)
    found["world_size"] = trainer.args.world_size
    batch = next(iter(trainer.get_train_dataloader()))
    found["first_ids"] = batch["clean_input_ids"]
    trainer.train()
    found["rounds"] = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    found["logs"] = [entry for entry in trainer.state.log_history if "loss" in entry]

    accumulated = rounds_trainer(
        output / "accumulated", {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}, double=True
    )
    accumulated.train()
    found["accumulated"] = {name: tensor.clone() for name, tensor in accumulated.model.state_dict().items()}

    ablation = rounds_trainer(
        output / "ablation", {"per_device_train_batch_size": 4, "num_rounds": 1, "no_pretrain_loss": True}, double=True
    )
    ablation.train()
    found["ablation"] = {name: tensor.clone() for name, tensor in ablation.model.state_dict().items()}

    for head in ("sequence", "token"):
        classifier = classifier_trainer(output / head, {"per_device_train_batch_size": 4}, head=head)
        classifier.train()
        found[head] = {name: tensor.clone() for name, tensor in classifier.model.state_dict().items()}

    for which in DISTILLED:
        student = distilled_trainer(output / which, {"per_device_train_batch_size": 4, "eval_teacher": True}, which)
        student.train()
        found[which] = {name: tensor.clone() for name, tensor in student.model.state_dict().items()}
        found[which] |= {f"objective.{name}": tensor for name, tensor in student.objective.state_dict().items()}
        found[f"{which} evaluated"] = student.evaluate(student.train_dataset)

    evaluated = classifier_trainer(output / "evaluated", {"per_device_train_batch_size": 4})
    evaluated.evaluate(evaluated.train_dataset)
    try:
        evaluated.train()
        found["evaluate_first"] = "trained"
    except RuntimeError as error:
        found["evaluate_first"] = str(error)
    torch.save(found, output / f"rank-{trainer.args.process_index}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
