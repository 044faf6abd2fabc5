"""What two processes do with images, launched once by tests/test_laws_mae.py; writes OUTPUT/rank-N.pt for it to compare."""

import sys
from pathlib import Path

import torch

from rounds_run import image_rounds_trainer

RUNS = {
    "features": {},
    "tokens": {"feature": "tokens"},
    "predictions": {"matching": "predictions"},
    # Biases of keys have no gradient but rounding and the pull of the anchor: AdamW would blow up the former
    "weights": {"matching": "weights", "optim": "sgd", "learning_rate": 0.05},
    "ablation": {"no_pretrain_loss": True},
    "cached": {"cache_teacher_features": True},
}


def main(output: Path) -> None:
    found: dict = {}
    for name, settings in RUNS.items():
        settings = {"per_device_train_batch_size": 4, "num_rounds": 1, "save_strategy": "no", **settings}
        trainer = image_rounds_trainer(output / name, settings, double=True)
        if name == "features":
            found["first_ids"] = next(iter(trainer.get_train_dataloader()))["example_id"]
        trainer.train()
        found[name] = {key: tensor.clone() for key, tensor in trainer.model.state_dict().items()}
    accumulated = image_rounds_trainer(
        output / "accumulated",
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_rounds": 1, "save_strategy": "no"},
        double=True,
    )
    accumulated.train()
    found["accumulated"] = {key: tensor.clone() for key, tensor in accumulated.model.state_dict().items()}
    found["world_size"] = accumulated.args.world_size
    torch.save(found, output / f"rank-{accumulated.args.process_index}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
