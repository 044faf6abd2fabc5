"""What a stack of small members costs: one vmapped forward for all (torch.func), beside the same members one after another.

    OMP_NUM_THREADS=1 python recipes/benchmarks/stacked_members.py         # one core, no network, 3 minutes

Both sides train the same members on the same batches of 28 x 28 digits, crops included, through hfkd's trainers: one by one
as `trainer.train()`, stacked as `member_stack.train_stacked`. Times are CPU seconds of this process (wall-clock seconds with
an accelerator) a step and member, from building the data loader to the trained weights: what a run costs once is part of
it, so that few steps flatter the stack. The last column is the largest difference of a weight between the two sides after
a short training in float64: rounding, or the ratio means nothing. (In float32, Adam turns a gradient that is nothing but
rounding into a whole step, up or down: such weights end apart, the members' scores do not.)
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from transformers import AutoModelForImageClassification, ViTConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the recipes
from hfkd import DistillationArguments, DistillationTrainer
from hfkd.data.augment import Augmentation
from hfkd.data.images import decoded, load_images
from hfkd.data.pixels import ImageCollator, PixelView
from hfkd.models.cifar_resnet import CifarResNetForImageClassification, cifar_resnet_config
from hfkd.trainers.arguments import accelerator_is_absent
from member_stack import train_stacked

VIEW = PixelView((28, 28))
NETWORKS = ("vit-32", "resnet10-xxxs", "resnet10-s")
CHECKED_STEPS = 3


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("hfkd").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    rows = decoded(load_images("mnist_5k")["train"].select(range(arguments.batch_size * arguments.steps)), VIEW)
    print(f"{arguments.members} members, {arguments.steps} steps, {arguments.threads} thread(s)\n")
    print(
        "| network | parameters | images a batch | one by one (ms) | stacked (ms) | stacked / one by one | difference |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|", flush=True)
    found = [compared(arguments, rows, network, batch) for network in arguments.networks for batch in arguments.batches]
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--networks", nargs="+", default=list(NETWORKS), help="vit-WIDTH, or a name of the CIFAR ResNets"
    )
    parser.add_argument("--members", type=int, default=10)
    parser.add_argument("--batches", type=int, nargs="+", default=[16, 64], help="images in a batch of one member")
    parser.add_argument("--steps", type=int, default=30, help="steps of each side in each block")
    parser.add_argument("--blocks", type=int, default=1, help="turns of each side")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    arguments = parser.parse_args()
    arguments.batch_size = max(arguments.batches)
    return arguments


def network_of(name: str) -> Any:
    if not name.startswith("vit-"):
        return CifarResNetForImageClassification(cifar_resnet_config(name, num_labels=10))
    width = int(name.removeprefix("vit-"))
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 4}
    # torch has no vmapped rule for the fused attention of CPUs: without it both sides multiply matrices
    config = ViTConfig(image_size=28, patch_size=7, num_labels=10, attn_implementation="eager", **sizes)
    return AutoModelForImageClassification.from_config(config)


def trainers_of(
    arguments: argparse.Namespace, rows: Any, network: str, batch: int, steps: int, dtype: torch.dtype = torch.float32
) -> list[Any]:
    made = []
    for seed in range(arguments.members):
        torch.manual_seed(seed)
        args = DistillationArguments(
            output_dir=arguments.folder,
            per_device_train_batch_size=batch,
            max_steps=steps,
            learning_rate=1e-3,
            seed=seed,
            data_seed=seed,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_steps=1000,
        )
        collator = ImageCollator(VIEW, augmentation=Augmentation(crop="pad", padding=2), seed=seed)
        trainer = DistillationTrainer(network_of(network).to(dtype), args, collator, rows)
        trainer.remove_callback(transformers.PrinterCallback)
        made.append(trainer)
    return made


def one_by_one(trainers: list[Any]) -> None:
    for trainer in trainers:
        trainer.train()


def compared(arguments: argparse.Namespace, rows: Any, network: str, batch: int) -> dict[str, Any]:
    sides: dict[str, Callable[[list[Any]], Any]] = {"one_by_one": one_by_one, "stacked": train_stacked}
    taken: dict[str, list[float]] = {name: [] for name in sides}
    with tempfile.TemporaryDirectory() as folder:
        arguments.folder = folder
        difference = largest_difference(arguments, rows, network, batch)  # and a warm-up of both
        for block in range(arguments.blocks):
            for name in list(sides)[:: -1 if block % 2 else 1]:
                trainers = trainers_of(arguments, rows, network, batch, arguments.steps)
                taken[name].append(seconds_of(lambda side=sides[name], made=trainers: side(made)))
    count = arguments.steps * arguments.members
    times = {name: statistics.median(seconds) / count for name, seconds in taken.items()}
    parameters = network_of(network).num_parameters()
    found = {"network": network, "parameters": parameters, "batch_size": batch, **times, "difference": difference}
    found["ratio"] = times["stacked"] / times["one_by_one"]
    shown = " | ".join(f"{1000 * times[name]:.2f}" for name in sides)
    print(f"| {network} | {parameters:,} | {batch} | {shown} | {found['ratio']:.2f} | {difference:.0e} |", flush=True)
    return found


def largest_difference(arguments: argparse.Namespace, rows: Any, network: str, batch: int) -> float:
    alone, together = (trainers_of(arguments, rows, network, batch, CHECKED_STEPS, torch.float64) for _ in range(2))
    one_by_one(alone)
    train_stacked(together)
    pairs = [(ours.model.state_dict(), theirs.model.state_dict()) for ours, theirs in zip(together, alone, strict=True)]
    return max(float((a[name].double() - b[name].double()).abs().max()) for a, b in pairs for name in a)


def seconds_of(run: Callable[[], Any]) -> float:
    clock = time.process_time if accelerator_is_absent() else time.perf_counter
    started = clock()
    run()
    return clock() - started


if __name__ == "__main__":
    main()
