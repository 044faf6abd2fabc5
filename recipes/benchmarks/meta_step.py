"""What a coordinator costs: hfkd's look-ahead beside the released algorithm of MC-Distil, and beside plain KD.

    OMP_NUM_THREADS=1 python recipes/benchmarks/meta_step.py              # one core, no network, 12 minutes
    OMP_NUM_THREADS=1 python recipes/benchmarks/meta_step.py --quick      # 4 minutes, and wider spreads

Two settings: `image` (ResNet10-s from ResNet10-l, 200 images of 32 x 32, 100 classes) and `text` (RoBERTa 4 layers x 256
from another, vocabulary 30,522, 32 rows x 64 tokens, no dropout); rows and weights are random. Students are trained by SGD
with momentum, the only optimizer of the released code. Four parts:

    work      CPU time of a meta step beyond the ordinary step. The released side is written out below, independently of
              hfkd.lookahead: for every student a copy is built and loaded, the teacher is asked again, the copy takes a
              step with a graph of its gradient, and a second-order backward leads from the held-out loss to the
              coordinator. Beside it hfkd in the fused order with jvp (the real step is the look-ahead; one backward on
              the meta batch, one forward-mode pass), and the reference order with every engine. All sides look at the
              same students, optimizer, coordinator and batches in one training run, and their coordinator gradients are
              compared.                                    fused + jvp / released <= 0.45 (image), 0.62 (text)
              The table has a second column, against the released side without the teacher's second forward.
    memory    peak of a process that takes an ordinary step and then one with a meta step, above what it held between
              them (weights, optimizer, imports).          fused + jvp / released <= 0.70 (image), 0.55 (text)
              malloc's threshold is fixed, so that freed buffers count for nothing, as in masked_lm_step.py.
    overhead  whole trainings, interval 20, fused order, against plain KD of the same group (ConstantWeights), both through
              CollaborativeTrainer: CPU time of 40 steps, of which two are meta steps; medians of runs in turns.
                                                           <= 1.07 (image), 1.09 (text)
    group     ResNet10-xxxs, -xxs, -xs and -s learn from ResNet10-l in one process, against four runs of
              DistillationTrainer with the same loss, augmentation included. <= 0.80

Figures are CPU seconds of this process, which a busy machine disturbs least, with wall seconds beside them.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import psutil
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import RobertaForSequenceClassification, TrainerCallback

from hfkd import (
    CollaborativeArguments,
    CollaborativeTrainer,
    ConstantWeights,
    DistillationArguments,
    DistillationTrainer,
)
from hfkd.data.augment import Augmentation
from hfkd.data.collate import DistillationCollator
from hfkd.data.pixels import ImageCollator, PixelView
from hfkd.models.cifar_resnet import CifarResNetForImageClassification, cifar_resnet_config
from hfkd.objectives import KD
from hfkd.testing import tiny_roberta_config, tiny_tokenizer

MIB = 2**20
PARTS = ("memory", "work", "overhead", "group")
SETTINGS = ("image", "text")
TARGETS = {
    "work": {"image": 0.45, "text": 0.62},
    "memory": {"image": 0.70, "text": 0.55},
    "overhead": {"image": 1.07, "text": 1.09},
}
GROUP_TARGET = 0.8
GROUP = ("resnet10-xxxs", "resnet10-xxs", "resnet10-xs", "resnet10-s")
SIDES = ("ordinary", "released", "fused")  # of the memory part
ENGINES = ("jvp", "double_backward", "finite_difference", "last_layer")
EXACT = ("fused, jvp", "reference order, jvp", "reference order, double_backward")
TEMPERATURE = 2.0
INTERVAL = 20
WARM_UP_STEPS = 2
VIEW = PixelView((32, 32), (0.5,) * 3, (0.25,) * 3)
Seconds = np.ndarray  # CPU and wall


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("hfkd").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    if arguments.memory_of:
        write(arguments.json, peak_memory(arguments.memory_of, setting_of(arguments.setting[0], arguments)))
        return
    found: dict[str, Any] = {"settings": settings_of(arguments)}
    for part in (part for part in PARTS if part in arguments.only):  # memory first: see memory_of
        if part == "group":
            found[part] = group(arguments)
        else:
            run = {"memory": memory, "work": work, "overhead": overhead}[part]
            found[part] = {name: run(setting_of(name, arguments), arguments) for name in arguments.setting}
    if arguments.json:
        write(arguments.json, found)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--setting", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument(
        "--repeats", type=int, default=7, help="meta steps of each side; steps of each block of `group`"
    )
    parser.add_argument("--runs", type=int, default=7, help="trainings of each side of `overhead`")
    parser.add_argument("--steps", type=int, default=40, help="timed steps of each of them, a multiple of the interval")
    parser.add_argument("--image_batch_size", type=int, default=200)
    parser.add_argument("--text_batch_size", type=int, default=32)
    parser.add_argument("--overhead_batch_sizes", type=int, nargs=2, default=(64, 8), metavar=("IMAGE", "TEXT"))
    parser.add_argument("--student", default="resnet10-s")
    parser.add_argument("--teacher", default="resnet10-l")
    parser.add_argument("--encoder", type=int, nargs=2, default=(4, 256), metavar=("LAYERS", "WIDTH"))
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--vocab_size", type=int, default=30522)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--memory_of", choices=SIDES, help=argparse.SUPPRESS)  # this process measures one side's memory
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.repeats, arguments.runs, arguments.steps = 3, 3, INTERVAL
    if arguments.steps % INTERVAL:
        parser.error(f"--steps must be a multiple of {INTERVAL}, or the share of meta steps is wrong")
    return arguments


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(arguments).items() if name not in ("json", "memory_of")}


# ---- models and rows ----


@dataclass
class Setting:
    """What is trained on what. student, teacher: make a model; rows: so many of them, by a seed."""

    name: str
    student: Callable[[], Any]
    teacher: Callable[[], Any]
    rows: Callable[[int, int], datasets.Dataset]
    collator: Callable[[], Any]
    batch_size: int
    arguments: argparse.Namespace


def setting_of(name: str, arguments: argparse.Namespace) -> Setting:
    if name == "image":
        return Setting(
            name,
            lambda: resnet(arguments.student, seed=0),
            lambda: resnet(arguments.teacher, seed=1),
            image_rows,
            lambda: ImageCollator(VIEW),
            arguments.image_batch_size,
            arguments,
        )
    return Setting(
        name,
        lambda: encoder(arguments, seed=0),
        lambda: encoder(arguments, seed=1),
        lambda count, seed: text_rows(count, seed, arguments),
        lambda: DistillationCollator(tiny_tokenizer(arguments.vocab_size)),
        arguments.text_batch_size,
        arguments,
    )


def resnet(name: str, seed: int) -> Any:
    torch.manual_seed(seed)
    return CifarResNetForImageClassification(cifar_resnet_config(name, num_labels=100))


def encoder(arguments: argparse.Namespace, seed: int) -> Any:
    torch.manual_seed(seed)
    layers, width = arguments.encoder
    config = tiny_roberta_config(
        vocab_size=arguments.vocab_size,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=max(width // 32, 1),
        intermediate_size=4 * width,
        max_position_embeddings=arguments.length + 2,
        num_labels=4,
    )
    return RobertaForSequenceClassification(config)


def image_rows(count: int, seed: int) -> datasets.Dataset:
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    labels = generator.integers(0, 100, count).tolist()
    return datasets.Dataset.from_dict({"pixels": [image.tobytes() for image in pixels], "label": labels})


def text_rows(count: int, seed: int, arguments: argparse.Namespace) -> datasets.Dataset:
    generator = np.random.default_rng(seed)
    words = generator.integers(5, arguments.vocab_size, (count, arguments.length - 2))
    ones = [[1] * arguments.length] * count
    rows = {"input_ids": [[0, *row, 2] for row in words.tolist()], "attention_mask": ones}
    return datasets.Dataset.from_dict({**rows, "label": generator.integers(0, 4, count).tolist()})


def settings_for(batch_size: int, steps: int, folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder / f"run-{time.monotonic_ns()}"),
        "per_device_train_batch_size": batch_size,
        "max_steps": steps,
        "optim": "sgd",
        "optim_args": "momentum=0.9",
        "learning_rate": 0.01,
        "weight_decay": 1e-4,
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1000,
        "use_cpu": True,
    }


# ---- the released algorithm ----


def released_meta_step(
    student: Any, teacher: Any, optimizer: Any, coordinator: nn.Module, batch: Any, meta_batch: Any, clock: Clock
) -> list[Tensor]:
    """The gradient of the held-out loss in the coordinator's parameters, as train_mcdistil.py computes it for one student.

    batch, meta_batch: of pixel_values or of input_ids and attention_mask, with labels. Reconstructed from a description of
    the code; the network of the coordinator and its sigmoid are hfkd's on both sides.
    """
    view, meta_view = (
        {name: one[name] for name in ("pixel_values", "input_ids", "attention_mask") if name in one}
        for one in (batch, meta_batch)
    )
    looking_ahead = type(student)(copy.deepcopy(student.config))
    looking_ahead.load_state_dict(student.state_dict())
    looking_ahead.train()
    with torch.no_grad(), clock("the teacher again"):
        teacher_logits = teacher(**view).logits
    weights = coordinator(batch)[:, 0]
    # The default kernel of attention has no second derivative
    with sdpa_kernel(SDPBackend.MATH):
        logits = looking_ahead(**view).logits
        losses = torch.stack(
            [F.cross_entropy(logits, batch["labels"], reduction="none"), soft(logits, teacher_logits)], 1
        )
        params = dict(looking_ahead.named_parameters())
        grads = torch.autograd.grad((weights * losses).sum(1).mean(), list(params.values()), create_graph=True)
        stepped = sgd_step(params, grads, student, optimizer)
        answer = functional_call(looking_ahead, stepped, (), meta_view).logits
        held_out = F.cross_entropy(answer, meta_batch["labels"])
        return list(torch.autograd.grad(held_out, list(coordinator.parameters())))


def soft(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    targets = F.softmax(teacher_logits / TEMPERATURE, dim=-1)
    return TEMPERATURE**2 * F.kl_div(F.log_softmax(logits / TEMPERATURE, -1), targets, reduction="none").sum(-1)


def sgd_step(params: dict[str, Tensor], grads: Any, student: Any, optimizer: Any) -> dict[str, Tensor]:
    """With a graph; learning rate, momentum, its buffers (copied) and weight decay are the real optimizer's."""
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    stepped = {}
    for (name, param), gradient, real in zip(params.items(), grads, student.parameters(), strict=True):
        group, state = groups[id(real)], optimizer.state.get(real, {})
        moving = gradient + group["weight_decay"] * param
        if (buffer := state.get("momentum_buffer")) is not None:
            moving = group["momentum"] * buffer.clone() + moving
        stepped[name] = param - group["lr"] * moving
    return stepped


# ---- one training run, all sides ----


class Clock:
    """Seconds by name, of the step that runs now."""

    def __init__(self) -> None:
        self.now: dict[str, Seconds] = defaultdict(lambda: np.zeros(2))

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        before = seconds()
        yield
        self.now[name] += seconds() - before


def seconds() -> Seconds:
    return np.array([time.process_time(), time.perf_counter()])


class AllSides(CollaborativeTrainer):
    """Trains in the fused order; before every step the other sides compute their coordinator gradients from the same state.

    others: of "released" and the engines. Every step but the first is a meta step; `steps` has the seconds of each side,
    `gradients` those of the last step.
    """

    def __init__(self, setting: Setting, folder: Path, steps: int, others: tuple[str, ...], fused: bool = True):
        self.clock, self.others, self.fused = Clock(), others, fused
        self.steps: list[dict[str, Seconds]] = []
        self.gradients: dict[str, list[Tensor]] = {}
        self.side = "fused, jvp"
        args = CollaborativeArguments(
            **settings_for(setting.batch_size, steps, folder),
            meta_order="fused",
            meta_engine="jvp",
            temperature=TEMPERATURE,
        )
        count = setting.batch_size * steps
        self.teacher_model = setting.teacher().eval()
        super().__init__(
            {"student": setting.student()},
            args,
            setting.collator(),
            setting.rows(count, 0),
            teacher=self.teacher_model,
            meta_dataset=setting.rows(setting.batch_size, 1),
        )
        assert self._meta_optimizer is not None
        self._meta_optimizer.register_step_pre_hook(self._keep_gradients)
        self.remove_callback(transformers.PrinterCallback)
        self.add_callback(_StepOf(self))

    def _keep_gradients(self, *args: Any) -> None:
        self.gradients[self.side] = [p.grad.clone() for p in self.coordinator.parameters()]

    def _meta_step_is_due(self) -> bool:
        return self.state.global_step > 0

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        self.clock.now.clear()
        samples, counts = super().get_batch_samples(*args, **kwargs)
        if samples and self._is_due:
            start = self.state.global_step % max(len(self.others), 1)  # nobody always comes first
            for side in self.others[start:] + self.others[:start]:
                self._other_side(side, samples, counts)
        self.side = "fused, jvp"
        self._is_due = self._is_due and self.fused
        return samples, counts

    def _other_side(self, side: str, samples: list[Any], counts: Any) -> None:
        coordinator = copy.deepcopy(self.coordinator.state_dict())
        if side == "released":
            self._released(samples[0])
        else:
            self.side, usual = f"reference order, {side}", self.args.meta_engine
            self.args.meta_engine = side
            with self.clock(self.side):
                self._meta_step(samples, counts)
            self.args.meta_engine = usual
            self.clock.now[self.side] -= self.clock.now.pop("the step's own teacher")
            self._answers.clear()
        self.coordinator.load_state_dict(coordinator)

    def _released(self, sample: Any) -> None:
        batch, meta_batch = self._prepare_inputs(sample), self._meta_batch()
        twin = copy.deepcopy(self.coordinator)
        optimizer = torch.optim.Adam(twin.parameters(), lr=1e-3, weight_decay=1e-4)
        with self.clock("released"):
            found = released_meta_step(
                self.model["student"], self.teacher_model, self.optimizer.optimizer, twin, batch, meta_batch, self.clock
            )
            for parameter, gradient in zip(twin.parameters(), found, strict=True):
                parameter.grad = gradient
            optimizer.step()
        self.gradients["released"] = found

    def _ask_teacher(self, inputs: Any) -> Any:
        """A reference order's answer serves the ordinary step too: no cost of the meta step."""
        with self.clock("the step's own teacher"):
            return super()._ask_teacher(inputs)

    def _before_fused_step(self) -> None:
        with self.clock("fused, jvp"):
            super()._before_fused_step()

    def _fused_meta_step(self) -> None:
        with self.clock("fused, jvp"):
            super()._fused_meta_step()


class _StepOf(TrainerCallback):
    def __init__(self, trainer: AllSides):
        self.trainer = trainer

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.began = seconds()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        now = dict(self.trainer.clock.now)
        now["ordinary step"] = seconds() - self.began - now.get("fused, jvp", np.zeros(2))
        self.trainer.steps.append(now)


def work(setting: Setting, arguments: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        steps = arguments.repeats + WARM_UP_STEPS
        trainer = AllSides(setting, Path(folder), steps, ("released", *ENGINES))
        trainer.train()
    taken = trainer.steps[WARM_UP_STEPS:]
    for step in taken:
        step["released, teacher's answer shared"] = step["released"] - step["the teacher again"]
    names = [name for name in taken[0] if name != "the step's own teacher"]
    found = {name: spread([step[name] for step in taken]) for name in names}
    differences = {name: distance(trainer.gradients["released"], of) for name, of in trainer.gradients.items()}
    if (worst := max(differences[name] for name in EXACT)) > 1e-4:
        raise ValueError(f"the sides compute different gradients ({worst:.1e}), so their cost does not compare")
    print_work(setting, found, differences)
    return {"seconds": found, "differences": differences}


def distance(expected: list[Tensor], found: list[Tensor]) -> float:
    """Of two gradients, relative, as one vector."""
    one, other = (torch.cat([value.flatten() for value in values]).double() for values in (expected, found))
    return float((one - other).norm() / one.norm())


def spread(taken: list[Seconds]) -> dict[str, float]:
    cpu, wall = zip(*taken, strict=True)
    return {"cpu": statistics.median(cpu), "lowest": min(cpu), "highest": max(cpu), "wall": statistics.median(wall)}


def print_work(setting: Setting, found: dict[str, dict[str, float]], differences: dict[str, float]) -> None:
    whole, shared = found["released"]["cpu"], found["released, teacher's answer shared"]["cpu"]
    print(f"\nmeta work beyond the ordinary step, {setting.name}, {setting.batch_size} rows\n")
    print("| side | CPU ms (lowest to highest) | wall ms | / released | / released, teacher shared | gradient apart |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, one in sorted(found.items(), key=lambda pair: -pair[1]["cpu"]):
        times = f"{1000 * one['cpu']:,.0f} ({1000 * one['lowest']:,.0f} to {1000 * one['highest']:,.0f})"
        apart = f"{differences[name]:.0e}" if name in differences else ""
        print(
            f"| {name} | {times} | {1000 * one['wall']:,.0f} | {one['cpu'] / whole:.2f} | {one['cpu'] / shared:.2f} | {apart} |"
        )
    print()
    target = TARGETS["work"][setting.name]
    verdict(f"{setting.name}: fused + jvp / released", found["fused, jvp"]["cpu"] / whole, target)
    verdict(f"{setting.name}: the same, teacher's answer shared", found["fused, jvp"]["cpu"] / shared, target)


def verdict(name: str, ratio: float, target: float) -> None:
    print(f"{name}: {ratio:.3f} (target {target:.2f}: {'met' if ratio <= target else 'NOT met'})")


# ---- memory ----


def memory(setting: Setting, arguments: argparse.Namespace) -> dict[str, Any]:
    found = {side: in_a_process_of_its_own(side, setting.name) for side in SIDES}
    print(f"\nmemory that a step adds at its peak, {setting.name}, {setting.batch_size} rows\n")
    print("| step | MiB |\n|---|---:|")
    for side, size in found.items():
        print(f"| {side} | {size / MIB:,.0f} |")
    ratio = found["fused"] / found["released"]
    print()
    verdict(f"{setting.name}: peak, fused + jvp / released", ratio, TARGETS["memory"][setting.name])
    return {"bytes": found, "ratio": ratio}


def in_a_process_of_its_own(side: str, setting: str) -> int:
    """ru_maxrss of a child starts at the size of the process that started it, which has no model yet."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "memory.json"
        more = ["--setting", setting, "--memory_of", side, "--json", str(path)]  # the last ones win
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(128 * 1024)}  # its initial value, fixed
        subprocess.run([sys.executable, __file__, *sys.argv[1:], *more], check=True, env=environment)
        return json.loads(path.read_text(encoding="utf-8"))["bytes"]


def peak_memory(side: str, setting: Setting) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        others = ("released",) if side == "released" else ()
        trainer = AllSides(setting, Path(folder), 2, others, fused=side == "fused")
        between = _Between()
        trainer.add_callback(between)
        torch.func.jvp(torch.sin, (torch.ones(1),), (torch.ones(1),))  # torch loads 20 MiB of formulas on its first use
        trainer.train()
    return {"bytes": largest_resident_size() - between.size}


class _Between(TrainerCallback):
    size = 0

    def on_step_end(self, args: Any, state: Any, *more: Any, **kwargs: Any) -> None:
        self.size = self.size or psutil.Process().memory_info().rss  # after the first step


def largest_resident_size() -> int:
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024


# ---- whole trainings ----


class Watch(TrainerCallback):
    """Seconds from the end of one step to the end of the next: loading included."""

    def __init__(self) -> None:
        self.taken: list[Seconds] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        now = seconds()
        if hasattr(self, "last"):
            self.taken.append(now - self.last)
        self.last = now


def overhead(setting: Setting, arguments: argparse.Namespace) -> dict[str, Any]:
    batch_size = arguments.overhead_batch_sizes[SETTINGS.index(setting.name)]
    count = arguments.steps + WARM_UP_STEPS + 1
    rows, meta = setting.rows(batch_size * count, 0), setting.rows(4 * batch_size, 1)
    by_hand = {"coordinator": ConstantWeights(task=0.5, distill=0.5)}
    taken: dict[str, list[Seconds]] = {"plain KD": [], "coordinator": []}

    def train(side: str, folder: Path) -> None:
        settings = settings_for(batch_size, count, folder)
        args = CollaborativeArguments(**settings, meta_order="fused", coordinator_interval=INTERVAL)
        more = by_hand if side == "plain KD" else {"meta_dataset": meta}
        steps = trained(
            CollaborativeTrainer,
            {"student": setting.student()},
            args,
            setting.collator(),
            rows,
            setting.teacher(),
            **more,
        )
        taken[side].append(steps[-arguments.steps :].sum(0))

    with tempfile.TemporaryDirectory() as folder:
        for run in range(arguments.runs):
            for side in taken if run % 2 else reversed(taken):
                train(side, Path(folder))
    found = {side: spread(runs) for side, runs in taken.items()}
    title = f"{arguments.steps} steps of a whole training, interval {INTERVAL}, {setting.name}, {batch_size} rows"
    print_sides(title, found, "plain KD")
    ratio = found["coordinator"]["cpu"] / found["plain KD"]["cpu"]
    verdict(f"{setting.name}: coordinator / plain KD", ratio, TARGETS["overhead"][setting.name])
    return {"seconds": found, "ratio": ratio}


def trained(kind: Any, model: Any, args: Any, collator: Any, rows: Any, teacher: Any, **more: Any) -> np.ndarray:
    """(steps - 1, 2): CPU and wall seconds of every step but the first."""
    watch = Watch()
    trainer = kind(model, args, collator, rows, callbacks=[watch], teacher=teacher.eval(), **more)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return np.stack(watch.taken)


def print_sides(title: str, found: dict[str, dict[str, float]], reference: str) -> None:
    print(f"\n{title}\n\n| side | CPU ms (lowest to highest) | wall ms | / {reference} |\n|---|---:|---:|---:|")
    for name, one in found.items():
        times = f"{1000 * one['cpu']:,.0f} ({1000 * one['lowest']:,.0f} to {1000 * one['highest']:,.0f})"
        print(f"| {name} | {times} | {1000 * one['wall']:,.0f} | {one['cpu'] / found[reference]['cpu']:.3f} |")
    print()


# ---- a group in one process ----


def group(arguments: argparse.Namespace) -> dict[str, Any]:
    batch_size, count = arguments.image_batch_size, arguments.repeats + WARM_UP_STEPS
    rows = image_rows(batch_size * count, 0)

    def collator() -> ImageCollator:
        return ImageCollator(VIEW, augmentation=Augmentation(crop="pad", flip=0.5))

    def together(folder: Path) -> np.ndarray:
        args = CollaborativeArguments(**settings_for(batch_size, count, folder), temperature=TEMPERATURE)
        students, teacher = {name: resnet(name, 0) for name in GROUP}, resnet(arguments.teacher, 1)
        return trained(
            CollaborativeTrainer,
            students,
            args,
            collator(),
            rows,
            teacher,
            coordinator=ConstantWeights(task=0.5, distill=0.5),
        )

    def alone(name: str, folder: Path) -> np.ndarray:
        args = DistillationArguments(**settings_for(batch_size, count, folder))
        objective, teacher = KD(temperature=TEMPERATURE, alpha=0.5), resnet(arguments.teacher, 1)
        return trained(DistillationTrainer, resnet(name, 0), args, collator(), rows, teacher, objective=objective)

    @torch.no_grad()
    def teacher_alone(folder: Path) -> np.ndarray:
        teacher, pixels = resnet(arguments.teacher, 1).eval(), torch.randn(batch_size, 3, 32, 32)
        taken = [seconds()]
        for _ in range(count):
            teacher(pixels)
            taken.append(seconds())
        return np.diff(taken, axis=0)

    sides: dict[str, Callable[[Path], np.ndarray]] = {
        "group of four": together,
        **{f"{name} alone": lambda folder, name=name: alone(name, folder) for name in GROUP},  # type: ignore[misc]
        "the teacher's forward": teacher_alone,
    }
    taken: dict[str, list[Seconds]] = {name: [] for name in sides}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(2):
            for name in sides if turn % 2 else reversed(sides):
                taken[name] += list(sides[name](Path(folder))[WARM_UP_STEPS - 1 :])
    found = {name: spread(steps) for name, steps in taken.items()}
    found["four runs"] = {key: sum(found[f"{name} alone"][key] for name in GROUP) for key in found["group of four"]}
    print_sides(f"a step of {len(GROUP)} students, {batch_size} images, crop and flip", found, "four runs")
    ratio = found["group of four"]["cpu"] / found["four runs"]["cpu"]
    verdict("group of four / four runs", ratio, GROUP_TARGET)
    share = found["the teacher's forward"]["cpu"]
    print(
        f"the teacher is {100 * share / found['group of four']['cpu']:.0f} % of the group's step and "
        f"{100 * len(GROUP) * share / found['four runs']['cpu']:.0f} % of the four runs'"
    )
    return {"seconds": found, "ratio": ratio}


def write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
