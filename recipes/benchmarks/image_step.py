"""What a step on images costs: hfkd beside a bare loop that does the same work.

    OMP_NUM_THREADS=1 python recipes/benchmarks/image_step.py              # one core, no network, 5 minutes

Two parts, on Fashion-MNIST (Debian's dataset-fashion-mnist; HFKD_FASHION_MNIST names another folder), 32 x 32 in colour:

    step     ResNet-20 learns from ResNet-56, 64 images, crop and flip drawn anew in every epoch. The bare loop reads,
             augments and normalises with the same collator, then runs the student alone; beside it a bare forward of the
             teacher.     hfkd / (bare student step + bare teacher forward) <= 1.03
             A third bare loop does both, as a copied snippet does: two networks by turns find less in the caches.
    rounds   a small ViT-MAE in a round of self-distillation, 64 images. The bare loop takes a plain MAE step (of
             transformers' own class) and then one clean pass of the student, forward and backward.
                          hfkd, cached teacher features / (bare MAE + clean pass) <= 1.03; and what the cache saves

Figures are CPU seconds of this process (a busy machine disturbs them least), median over steps; the sides take turns in
short blocks. Loading and collating are counted on both sides.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
import torch.nn.functional as F
import transformers
from torch.utils.data import DataLoader
from transformers import TrainerCallback, ViTMAEConfig

from hfkd import DistillationArguments, DistillationTrainer, SelfDistillationArguments, SelfDistillationTrainer
from hfkd.data.augment import Augmentation
from hfkd.data.images import decoded, load_images
from hfkd.data.masked_images import MaskedImageCollator
from hfkd.data.pixels import ImageCollator, PixelView
from hfkd.models.cifar_resnet import CifarResNetForImageClassification, cifar_resnet_config
from hfkd.models.two_view_mae import ViTMAEForPreTraining, clean_features
from hfkd.objectives import KD

WARM_UP_STEPS = 2
VIEW = PixelView((32, 32), (0.286,) * 3, (0.353,) * 3)
Sides = dict[str, Callable[[], list[float]]]


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("hfkd").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    rows = images(arguments)
    found = {}
    for part in arguments.only:
        with tempfile.TemporaryDirectory() as folder:
            found[part] = {"step": step, "rounds": rounds}[part](arguments, rows, Path(folder))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=("step", "rounds"), default=["step", "rounds"])
    parser.add_argument("--task", default="fashion_mnist_local", help="the images; mnist_5k needs no Debian package")
    parser.add_argument("--steps", type=int, default=8, help="timed steps of each side in each block")
    parser.add_argument("--blocks", type=int, default=4, help="turns of each side")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--student", default="resnet20")
    parser.add_argument("--teacher", default="resnet56")
    parser.add_argument("--vit", type=int, nargs=2, default=(6, 96), metavar=("LAYERS", "WIDTH"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    return parser.parse_args()


def images(arguments: argparse.Namespace) -> datasets.Dataset:
    count = arguments.batch_size * (arguments.steps + WARM_UP_STEPS)
    return decoded(load_images(arguments.task)["train"].select(range(count)), VIEW)


class Watch(TrainerCallback):
    """CPU time from the end of one step to the end of the next: data loading and logging included."""

    def __init__(self) -> None:
        self.taken: list[float] = []
        self.last: float | None = None

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.taken, self.last = [], None  # of the last round

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        now = time.process_time()
        if self.last is not None:
            self.taken.append(now - self.last)
        self.last = now


def settings_of(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder / f"run-{time.monotonic_ns()}"),
        "per_device_train_batch_size": arguments.batch_size,
        "max_steps": arguments.steps + WARM_UP_STEPS,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1000,
        "use_cpu": True,
    }


def bare(
    arguments: argparse.Namespace,
    model: Any,
    collator: Any,
    rows: Any,
    loss_of: Callable[[Any, dict[str, Any]], torch.Tensor],
) -> list[float]:
    """No Trainer: read, collate, augment, forward, backward, step."""
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], fused=True)
    batches = iter(DataLoader(rows, arguments.batch_size, collate_fn=collator))
    taken = []
    for _ in range(arguments.steps + WARM_UP_STEPS):
        started = time.process_time()
        loss_of(model, collator.on_device(next(batches))).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        taken.append(time.process_time() - started)
    return taken[WARM_UP_STEPS:]


def in_turns(sides: Sides, blocks: int) -> dict[str, float]:
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for block in range(blocks):
        for name in sides if block % 2 else reversed(sides):  # whoever comes second finds the caches used
            taken[name] += sides[name]()
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def show(found: dict[str, float], reference: str) -> None:
    print(f"| side | CPU ms a step | / {reference} |\n|---|---:|---:|")
    for name, seconds in found.items():
        print(f"| {name} | {1000 * seconds:,.1f} | {seconds / found[reference]:.3f} |")


def verdict(name: str, ratio: float, target: float) -> None:
    print(f"{name}: {ratio:.3f} (target {target}: {'met' if ratio <= target else 'not met'})")


# ---- a distillation step ----


def classifier(name: str, seed: int) -> Any:
    torch.manual_seed(seed)
    return CifarResNetForImageClassification(cifar_resnet_config(name, num_labels=10))


def step(arguments: argparse.Namespace, rows: Any, folder: Path) -> dict[str, float]:
    augmentation = Augmentation(crop="pad", flip=0.5)
    teacher = classifier(arguments.teacher, seed=1).eval()
    collator = ImageCollator(VIEW, augmentation=augmentation)
    numbered = rows if "example_id" in rows.column_names else rows.add_column("example_id", list(range(len(rows))))

    def loss_of(model: Any, batch: dict[str, Any]) -> torch.Tensor:
        return F.cross_entropy(model(batch["pixel_values"]).logits, batch["labels"])

    @torch.no_grad()
    def teacher_alone() -> list[float]:
        pixels, taken = torch.randn(arguments.batch_size, 3, *VIEW.size), []
        for _ in range(arguments.steps + WARM_UP_STEPS):
            started = time.process_time()
            teacher(pixels)
            taken.append(time.process_time() - started)
        return taken[WARM_UP_STEPS:]

    def hfkd() -> list[float]:
        watch, args = Watch(), DistillationArguments(**settings_of(arguments, folder))
        fresh = ImageCollator(VIEW, augmentation=augmentation)
        trainer = DistillationTrainer(
            classifier(arguments.student, 0), args, fresh, rows, callbacks=[watch], teacher=teacher, objective=KD()
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        return watch.taken[WARM_UP_STEPS - 1 :]

    def with_teacher(model: Any, batch: dict[str, Any]) -> torch.Tensor:
        with torch.no_grad():
            answer = teacher(batch["pixel_values"]).logits
        logits = model(batch["pixel_values"]).logits
        divergence = F.kl_div(
            F.log_softmax(logits, -1), F.log_softmax(answer, -1), log_target=True, reduction="batchmean"
        )
        return (F.cross_entropy(logits, batch["labels"]) + divergence) / 2

    sides: Sides = {
        "bare student": lambda: bare(arguments, classifier(arguments.student, 0).train(), collator, numbered, loss_of),
        "bare teacher's forward": teacher_alone,
        "bare, both in one loop": lambda: bare(
            arguments, classifier(arguments.student, 0).train(), collator, numbered, with_teacher
        ),
        "hfkd, online": hfkd,
    }
    found = in_turns(sides, arguments.blocks)
    found["bare, sum"] = found["bare student"] + found["bare teacher's forward"]
    print(f"\n{arguments.student} from {arguments.teacher}, {arguments.batch_size} images of 32 x 32, crop and flip\n")
    show(found, "bare, sum")
    verdict("\nhfkd / (bare student + bare teacher's forward)", found["hfkd, online"] / found["bare, sum"], 1.03)
    print(f"hfkd / (bare, both in one loop): {found['hfkd, online'] / found['bare, both in one loop']:.3f}")
    return found


# ---- a round ----


def masked_autoencoder(arguments: argparse.Namespace, kind: Any) -> Any:
    torch.manual_seed(0)
    layers, width = arguments.vit
    config = ViTMAEConfig(
        image_size=32,
        patch_size=4,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        intermediate_size=4 * width,
        decoder_hidden_size=width // 2,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=2 * width,
        norm_pix_loss=True,
    )
    return kind(config)


def rounds(arguments: argparse.Namespace, rows: Any, folder: Path) -> dict[str, float]:
    collator = MaskedImageCollator(VIEW, patch_size=4)
    numbered = rows if "example_id" in rows.column_names else rows.add_column("example_id", list(range(len(rows))))
    target = torch.zeros(arguments.vit[1])

    def masked_loss(model: Any, batch: dict[str, Any]) -> torch.Tensor:
        return transformers.ViTMAEForPreTraining.forward(model, batch["pixel_values"], noise=batch["noise"]).loss

    def and_clean_pass(model: Any, batch: dict[str, Any]) -> torch.Tensor:
        features = clean_features(model.vit, batch["pixel_values"])[:, 0]
        return masked_loss(model, batch) + (features - target).square().sum(-1).mean()

    def plain(loss_of: Any) -> Callable[[], list[float]]:
        return lambda: bare(arguments, masked_autoencoder(arguments, ViTMAEForPreTraining), collator, numbered, loss_of)

    def hfkd(cached: bool) -> list[float]:
        watch = Watch()
        args = SelfDistillationArguments(
            **settings_of(arguments, folder), num_rounds=1, cache_teacher_features=cached, max_grad_norm=1.0
        )
        trainer = SelfDistillationTrainer(
            None,
            args,
            MaskedImageCollator(VIEW, patch_size=4),
            rows,
            model_init=lambda: masked_autoencoder(arguments, ViTMAEForPreTraining),
            callbacks=[watch],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()  # the last round's steps stay in the watch
        return watch.taken[WARM_UP_STEPS - 1 :]

    sides: Sides = {
        "bare MAE": plain(masked_loss),
        "bare MAE + clean pass": plain(and_clean_pass),
        "hfkd, teacher asked": lambda: hfkd(cached=False),
        "hfkd, features cached": lambda: hfkd(cached=True),
    }
    found = in_turns(sides, arguments.blocks)
    layers, width = arguments.vit
    print(f"\nViT-MAE {layers} x {width}, {arguments.batch_size} images of 32 x 32, patches of 4, 75 % hidden\n")
    show(found, "bare MAE + clean pass")
    cached = found["hfkd, features cached"]
    verdict("\nhfkd, features cached / (bare MAE + clean pass)", cached / found["bare MAE + clean pass"], 1.03)
    saved = 1 - cached / found["hfkd, teacher asked"]
    print(
        f"the cache saves {100 * saved:.0f} % of a step; the teacher's answers are asked for once a round, beforehand"
    )
    return found


if __name__ == "__main__":
    main()
