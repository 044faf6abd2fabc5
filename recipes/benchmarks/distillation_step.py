"""What a distillation step costs: hfkd beside the copied snippet, the stock Trainer and a bare loop.

    OMP_NUM_THREADS=1 python recipes/benchmarks/distillation_step.py              # one core, no network, 6 minutes
    OMP_NUM_THREADS=1 python recipes/benchmarks/distillation_step.py --leak_steps 1000 --only leak

Nobody wastes much around the step; the teacher's forward is what there is to save. So the sides differ in the teacher:
online in float32, online in the dtype that `teacher_dtype="auto"` chooses on this machine, from a cache, five from a cache.
All sides train the same student on the same rows (4 layers x 256, teacher 6 x 384, vocabulary 30,522, 32 rows x 48 tokens).

Figures are CPU seconds of this process (a busy machine disturbs them least), median over steps; the sides take turns in
short blocks. Ratios and targets:

    online, teacher_dtype=auto / snippet            <= 0.75 where the hardware multiplies bfloat16 fast, else about 1
    cached / stock Trainer without a teacher         <= 1.02, five cached teachers the same
    grouped by length, padded per batch / snippet padded to 48, on the movie sentences
    bare length-sorted inference / cache_teacher    >= 0.95
    resident memory over the steps                   flat
"""

from __future__ import annotations

import argparse
import copy
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
import psutil
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
from transformers import DataCollatorWithPadding, Trainer, TrainerCallback, TrainingArguments

from hfkd import DistillationArguments, DistillationTrainer
from hfkd.cache import cache_teacher
from hfkd.data.text import load_text, tokenize
from hfkd.objectives import KD
from hfkd.teachers import CachedTeacher, EnsembleTeacher, ModelTeacher
from hfkd.teachers.model import fast_bfloat16
from hfkd.testing import tiny_roberta_config, tiny_tokenizer

WARM_UP_STEPS = 2
PARTS = ("step", "padding", "cache", "leak", "agreement")


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("hfkd").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    parts = {"step": step, "padding": padding, "cache": cache, "leak": leak, "agreement": agreement}
    chosen = arguments.only or [name for name in PARTS if name not in ("leak", "agreement")]
    if arguments.leak_steps and "leak" not in chosen:
        chosen.append("leak")
    found = {}
    for name in chosen:
        with tempfile.TemporaryDirectory() as folder:
            found[name] = parts[name](arguments, Path(folder))
    if arguments.json:
        arguments.json.write_text(json.dumps({"settings": settings_of(arguments), **found}, indent=2) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, help="default: step padding cache")
    parser.add_argument("--steps", type=int, default=6, help="timed steps of each side in each block")
    parser.add_argument("--blocks", type=int, default=3, help="turns of each side")
    parser.add_argument("--rows", type=int, default=768, help="movie sentences for padding and cache")
    parser.add_argument("--leak_steps", type=int, default=0, help="steps of the memory check")
    parser.add_argument("--model", help="the fine-tuned teacher of `agreement`")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--length", type=int, default=48)
    parser.add_argument("--student", type=int, nargs=2, default=(4, 256), metavar=("LAYERS", "WIDTH"))
    parser.add_argument("--teacher", type=int, nargs=2, default=(6, 384), metavar=("LAYERS", "WIDTH"))
    parser.add_argument("--vocab_size", type=int, default=30522)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    return parser.parse_args()


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(arguments).items() if name not in ("json", "only")}


# ---- models, rows, trainers ----


def classifier(layers: int, width: int, arguments: argparse.Namespace, seed: int) -> Any:
    torch.manual_seed(seed)
    config = tiny_roberta_config(
        vocab_size=arguments.vocab_size,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        intermediate_size=4 * width,
        max_position_embeddings=arguments.length + 2,
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1,
    )
    return transformers.RobertaForSequenceClassification(config)


def student_of(arguments: argparse.Namespace) -> Any:
    return classifier(*arguments.student, arguments, seed=0)


def teacher_of(arguments: argparse.Namespace, seed: int = 1) -> Any:
    return classifier(*arguments.teacher, arguments, seed).eval()


def random_rows(count: int, arguments: argparse.Namespace) -> datasets.Dataset:
    """Rows of one length, as the measurement that the targets come from has them."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(5, arguments.vocab_size, (count, arguments.length - 2), generator=generator)
    rows = [[0, *row, 2] for row in words.tolist()]
    ones = [[1] * arguments.length] * count
    return datasets.Dataset.from_dict(
        {"input_ids": rows, "attention_mask": ones, "labels": [i % 2 for i in range(count)]}
    )


class Snippet(Trainer):
    """The copied class, with the fourth argument that transformers now demands."""

    def __init__(self, *args: Any, teacher_model: Any = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.teacher = teacher_model.eval()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs_student = model(**inputs)
        student_loss = outputs_student.loss
        with torch.no_grad():
            outputs_teacher = self.teacher(**inputs)
        loss_function = nn.KLDivLoss(reduction="batchmean")
        soft = F.log_softmax(outputs_student.logits / 2.0, dim=-1)
        loss_logits = loss_function(soft, F.softmax(outputs_teacher.logits / 2.0, dim=-1)) * 4.0
        loss = 0.5 * student_loss + 0.5 * loss_logits
        return (loss, outputs_student) if return_outputs else loss


class Watch(TrainerCallback):
    """CPU time from the end of one step to the end of the next: data loading and logging included."""

    def __init__(self) -> None:
        self.taken: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        now = time.process_time()
        if hasattr(self, "last"):
            self.taken.append(now - self.last)
        self.last = now


def trained(kind: Any, rows: Any, arguments: argparse.Namespace, folder: Path, steps: int, **more: Any) -> list[float]:
    """CPU seconds of each step of a short run of one side."""
    settings = {
        "output_dir": str(folder / "run"),
        "per_device_train_batch_size": arguments.batch_size,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1000,
        "use_cpu": True,
        "max_steps": steps + WARM_UP_STEPS,
        **more.pop("settings", {}),
    }
    ours = issubclass(kind, DistillationTrainer)
    args = (DistillationArguments if ours else TrainingArguments)(**settings)
    tokenizer = more.pop("tokenizer", None) or tiny_tokenizer(arguments.vocab_size)
    collator = {} if ours else {"data_collator": DataCollatorWithPadding(tokenizer)}
    watch = Watch()
    trainer = kind(
        student_of(arguments),
        args,
        train_dataset=rows,
        processing_class=tokenizer,
        callbacks=[watch],
        **collator,
        **more,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return watch.taken[WARM_UP_STEPS - 1 :]


def bare_steps(arguments: argparse.Namespace, rows: Any, steps: int, teacher: Any = None) -> list[float]:
    """No Trainer at all: forward, backward, step."""
    student = student_of(arguments).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=5e-5, fused=True)
    columns = {name: torch.tensor(rows[name][:]) for name in ("input_ids", "attention_mask", "labels")}
    taken = []
    for step in range(steps + WARM_UP_STEPS):
        started = time.process_time()
        batch = {
            name: column.roll(-step * arguments.batch_size, 0)[: arguments.batch_size]
            for name, column in columns.items()
        }
        outputs = student(**batch)
        loss = outputs.loss
        if teacher is not None:
            with torch.no_grad():
                answer = teacher(**batch).logits
            soft = F.log_softmax(outputs.logits / 2, -1)
            loss = 0.5 * loss + 2 * F.kl_div(
                soft, F.log_softmax(answer / 2, -1), reduction="batchmean", log_target=True
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        taken.append(time.process_time() - started)
    return taken[WARM_UP_STEPS:]


# ---- the step ----


def check_same_loss(arguments: argparse.Namespace, rows: Any, teacher: Any) -> float:
    """The relative difference of the two sides' losses on one batch, without dropout. Raises ValueError above 1e-5."""
    batch = {
        name: torch.tensor(rows[name][: arguments.batch_size]) for name in ("input_ids", "attention_mask", "labels")
    }
    student = student_of(arguments).eval()
    theirs = Snippet.compute_loss(argparse.Namespace(teacher=teacher), student, batch).item()
    answer = ModelTeacher(teacher)({name: values for name, values in batch.items() if name != "labels"})
    terms = KD(temperature=2.0, alpha=0.5)(student(**batch), answer, batch)
    ours = sum(values.sum().item() for values in terms.values()) / arguments.batch_size
    if abs(ours / theirs - 1) > 1e-5:
        raise ValueError(f"the sides do not compute the same loss, so their cost does not compare: {ours} and {theirs}")
    return abs(ours / theirs - 1)


def step(arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    rows = random_rows(arguments.batch_size * (arguments.steps + WARM_UP_STEPS), arguments)
    teacher, steps = teacher_of(arguments), arguments.steps
    print(f"same loss on one batch: relative difference {check_same_loss(arguments, rows, teacher):.1e}")
    cached = with_logits(rows, [teacher_of(arguments, seed) for seed in range(1, 6)], folder, arguments)
    five = EnsembleTeacher([CachedTeacher(f"teacher_logits_{number}") for number in range(5)], combine="logits")
    auto = {"teacher_dtype": "auto"}

    def ours(data: Any, teacher: Any, **settings: Any) -> list[float]:
        return trained(
            DistillationTrainer, data, arguments, folder, steps, teacher=teacher, objective=KD(), settings=settings
        )

    sides: dict[str, Callable[[], list[float]]] = {
        "bare student": lambda: bare_steps(arguments, rows, steps),
        "bare student and teacher": lambda: bare_steps(arguments, rows, steps, teacher),
        "stock Trainer, no teacher": lambda: trained(Trainer, rows, arguments, folder, steps),
        "copied snippet": lambda: trained(Snippet, rows, arguments, folder, steps, teacher_model=teacher),
        "hfkd, online": lambda: ours(rows, teacher_of(arguments)),
        "hfkd, online, teacher_dtype=auto": lambda: ours(rows, teacher_of(arguments), **auto),
        "hfkd, cached": lambda: ours(cached, CachedTeacher("teacher_logits_0")),
        "hfkd, five cached": lambda: ours(cached, five),
    }
    found = in_turns(sides, arguments.blocks)
    snippet, stock = found["copied snippet"], found["stock Trainer, no teacher"]
    shape = f"student {arguments.student[0]} x {arguments.student[1]}, teacher {arguments.teacher[0]} x {arguments.teacher[1]}"
    print(
        f"\n{shape}, vocabulary {arguments.vocab_size:,}, {arguments.batch_size} rows x {arguments.length} tokens, ",
        end="",
    )
    print(f"{arguments.threads} thread(s)\n")
    print("| side | CPU ms a step | / copied snippet | / stock Trainer, no teacher |\n|---|---:|---:|---:|")
    for name, seconds in found.items():
        print(f"| {name} | {1000 * seconds:,.0f} | {seconds / snippet:.3f} | {seconds / stock:.3f} |")
    fast = fast_bfloat16(torch.device("cpu"))
    print(f"\nteacher_dtype=auto is {'bfloat16' if fast else 'float32: this CPU does not multiply bfloat16 fast'}")
    verdict("online, auto / snippet", found["hfkd, online, teacher_dtype=auto"] / snippet, 0.75)
    verdict("cached / stock Trainer", found["hfkd, cached"] / stock, 1.02)
    verdict("five cached / cached", found["hfkd, five cached"] / found["hfkd, cached"], 1.02)
    return found


def in_turns(sides: dict[str, Callable[[], list[float]]], blocks: int) -> dict[str, float]:
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for block in range(blocks):
        for name in sides if block % 2 else reversed(sides):  # whoever comes second finds the caches used
            taken[name] += sides[name]()
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def with_logits(rows: Any, teachers: list[Any], folder: Path, arguments: argparse.Namespace) -> Any:
    for number, teacher in enumerate(teachers):
        cached = cache_teacher(
            rows,
            ModelTeacher(teacher),
            folder / f"cache-{number}",
            processing_class=tiny_tokenizer(arguments.vocab_size),
        )
        rows = cached.rename_column("teacher_logits", f"teacher_logits_{number}")
    return rows


# ---- padding ----


def sentences(arguments: argparse.Namespace, pad: bool) -> tuple[Any, Any]:
    from hfkd.data.embedded import _embedded_wordpiece

    tokenizer = _embedded_wordpiece()
    texts = load_text("movie_sentences")["train"].select(range(arguments.rows))
    return tokenizer, tokenize(texts, tokenizer, arguments.length, pad_to_max_length=pad)


def padding(arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    tokenizer, fixed = sentences(arguments, pad=True)
    _, ragged = sentences(arguments, pad=False)
    teacher, steps = teacher_of(arguments), arguments.rows // arguments.batch_size - WARM_UP_STEPS
    grouped = {"train_sampling_strategy": "group_by_length"}
    fixed = fixed.remove_columns("example_id").rename_column("label", "labels")

    def ours(settings: dict[str, Any]) -> list[float]:
        kwargs = {"teacher": teacher_of(arguments), "objective": KD(), "settings": settings, "tokenizer": tokenizer}
        return trained(DistillationTrainer, ragged, arguments, folder, steps, **kwargs)

    def snippet() -> list[float]:
        return trained(Snippet, fixed, arguments, folder, steps, teacher_model=teacher, tokenizer=tokenizer)

    sides = {
        f"copied snippet, padded to {arguments.length}": lambda: [statistics.fmean(snippet())],
        "hfkd, padded per batch": lambda: [statistics.fmean(ours({}))],
        "hfkd, grouped by length, padded per batch": lambda: [statistics.fmean(ours(grouped))],
    }
    found = in_turns(sides, 2)  # means, because grouped batches differ in length
    base = next(iter(found.values()))
    print(f"\n{arguments.rows} movie sentences, one epoch, online float32 teacher\n")
    print("| side | CPU ms a step, mean | ratio |\n|---|---:|---:|")
    for name, seconds in found.items():
        print(f"| {name} | {1000 * seconds:,.0f} | {seconds / base:.3f} |")
    return found


# ---- the cache ----


def cache(arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    tokenizer, rows = sentences(arguments, pad=False)
    teacher, size = teacher_of(arguments), 64

    def bare() -> list[float]:
        started = time.process_time()
        order = sorted(range(len(rows)), key=lambda i: -len(lengths[i]))
        for first in range(0, len(order), size):
            batch = tokenizer.pad({"input_ids": [lengths[i] for i in order[first : first + size]]}, return_tensors="pt")
            with torch.no_grad():
                teacher(**batch)
        return [time.process_time() - started]

    def ours() -> list[float]:
        with tempfile.TemporaryDirectory(dir=folder) as directory:
            started = time.process_time()
            cache_teacher(
                rows, ModelTeacher(teacher), Path(directory) / "cache", processing_class=tokenizer, batch_size=size
            )
            return [time.process_time() - started]

    lengths = rows["input_ids"][:]
    found = in_turns({"bare length-sorted inference": bare, "cache_teacher": ours}, 3)
    rates = {name: len(rows) / seconds for name, seconds in found.items()}
    print(f"\n{len(rows)} movie sentences, batches of {size}\n")
    print("| side | rows per CPU second |\n|---|---:|")
    for name, rate in rates.items():
        print(f"| {name} | {rate:,.1f} |")
    ratio = rates["cache_teacher"] / rates["bare length-sorted inference"]
    print(f"\ncaching speed {ratio:.3f} of bare inference, target >= 0.95: {'met' if ratio >= 0.95 else 'NOT met'}")
    return {**rates, "ratio": ratio}


# ---- memory, and what bfloat16 changes ----


class Resident(TrainerCallback):
    def __init__(self) -> None:
        self.sizes: list[int] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.sizes.append(psutil.Process().memory_info().rss)


def leak(arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Resident memory of a small pair over many steps, with every kind of answer kept alive for one step only."""
    steps = arguments.leak_steps or 1000
    tokenizer, rows = sentences(arguments, pad=False)
    small = argparse.Namespace(**{**vars(arguments), "student": (2, 64), "teacher": (2, 128)})
    resident = Resident()
    settings = {"output_dir": str(folder), "max_steps": steps, "per_device_train_batch_size": 8, "logging_steps": 10}
    quiet = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    trainer = DistillationTrainer(
        student_of(small),
        DistillationArguments(**settings, **quiet, train_sampling_strategy="group_by_length"),
        train_dataset=rows,
        processing_class=tokenizer,
        teacher=teacher_of(small),
        objective=KD(),
        callbacks=[resident],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    first, last = (
        statistics.median(part) / 2**20
        for part in (resident.sizes[steps // 5 : 2 * steps // 5], resident.sizes[-steps // 5 :])
    )
    print(f"\nresident memory over {steps} steps: {first:,.1f} MiB in the second fifth, {last:,.1f} MiB in the last")
    verdict("last / second fifth", last / first, 1.01)
    return {"second_fifth_mib": first, "last_fifth_mib": last}


def agreement(arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    """The same predictions in bfloat16 as in float32? A fine-tuned teacher on all 12,752 movie sentences."""
    from hfkd.data.embedded import movie_sentences

    if arguments.model is None:
        raise SystemExit("agreement needs --model, a fine-tuned teacher: python recipes/train_teacher.py trains one")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(arguments.model).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.model)
    rows = tokenize(movie_sentences(), tokenizer, arguments.length)
    logits = {}
    for name, dtype in (("float32", None), ("bfloat16", torch.bfloat16)):
        cached = cache_teacher(
            rows,
            ModelTeacher(copy.deepcopy(model), dtype=dtype),
            folder / name,
            processing_class=tokenizer,
            dtype="float32",
        )
        logits[name] = torch.tensor(cached["teacher_logits"][:])
    same = logits["float32"].argmax(-1) == logits["bfloat16"].argmax(-1)
    margin = (logits["float32"][:, 0] - logits["float32"][:, 1]).abs()
    worst = float(margin[~same].max()) if bool((~same).any()) else 0.0
    apart = float((logits["float32"] - logits["bfloat16"]).abs().max())
    print(f"\nargmax agrees on {100 * same.float().mean():.3f} % of {len(rows):,} rows, logits within {apart:.4f};")
    print(f"the largest float32 margin of a row that changes its class is {worst:.4f}")
    return {"agreement": float(same.float().mean()), "largest_margin": worst, "largest_difference": apart}


def verdict(name: str, ratio: float, target: float) -> None:
    print(f"{name}: {ratio:.3f}, target <= {target:.2f}: {'met' if ratio <= target else 'NOT met'}")


if __name__ == "__main__":
    main()
