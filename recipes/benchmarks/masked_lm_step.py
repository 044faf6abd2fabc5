"""Time and memory of one masked-language-model step: hfkd's two-view model beside the stock RobertaForMaskedLM.

    OMP_NUM_THREADS=1 python recipes/benchmarks/masked_lm_step.py        # one core, no network, about 3 minutes

The stock model runs its vocabulary-sized head on every token and throws 85 % of the answers away; hfkd's runs it on the
masked positions. Both sides start from the same weights, read the same batches and take the same optimizer; first it is
checked that their losses and gradients agree. Expect ratios (hfkd / stock) of about 0.50 for the time of a step and
0.48 for the memory it needs, at 6 layers x 384, a vocabulary of 30,522 and 32 rows of 48 tokens.

Time is the median over interleaved steps; its ratio is of the process's CPU time on a CPU, which a busy machine disturbs
least, and of wall time elsewhere. Memory is measured in a process per side: the ratio is of what the steps add at their
peak to a process that holds the weights and the optimizer's states; the peak of the whole process stands beside it. On a
CPU, glibc's malloc keeps freed buffers below a threshold that grows up to 32 MiB; hfkd's logits then lie just below and
the stock model's far above it. So the ratio is taken with the threshold fixed for both sides (every large buffer goes back
when it is freed, as in torch's own count of its tensors), and the two lines "default malloc" show it left as it is
(0.60 to 0.62).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from torch import Tensor

from hfkd import MaskedLMCollator
from hfkd.models.two_view import RobertaForMaskedLM as TwoViewRoberta
from hfkd.objectives import MaskedLM
from hfkd.testing import tiny_roberta_config, tiny_tokenizer

TARGET = 0.60
SIDES = ("stock", "hfkd")
MIB = 2**20
WARM_UP_STEPS = 2
Batch = dict[str, Tensor]


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        write(arguments.json, peak_memory(arguments.memory_of, arguments))
        return
    # Memory first: a child's ru_maxrss starts at the size of the process that started it, which has no model yet
    memory = {side: memory_of(side, arguments.device) for side in SIDES}
    agreement = check_agreement(arguments)
    times = step_times(arguments)
    found = {side: {**times[side], **memory[side]} for side in SIDES}
    ratios = {name: found["hfkd"][name] / found["stock"][name] for name in found["hfkd"]}
    headline = {"step": "cpu_seconds" if arguments.device == "cpu" else "wall_seconds", "memory": "step_bytes"}
    settings = {name: value for name, value in vars(arguments).items() if name not in ("json", "memory_of")}
    print("same loss and gradients: relative differences {loss:.1e}, {gradient:.1e}".format(**agreement))
    print_table(found, ratios, settings)
    print_verdicts(headline, ratios)
    if arguments.json:
        write(
            arguments.json,
            {"settings": settings, **found, "ratios": ratios, "headline": headline, "differences": agreement},
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=8, help="timed steps of each side")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--length", type=int, default=48, help="tokens of every row")
    parser.add_argument("--hidden_size", type=int, default=384)
    parser.add_argument("--num_layers", type=int, default=6)
    parser.add_argument("--vocab_size", type=int, default=30522)
    parser.add_argument("--mlm_probability", type=float, default=0.15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--memory_of", choices=SIDES, help=argparse.SUPPRESS)  # this process measures one side's memory
    return parser.parse_args()


# ---- the two sides ----


def make_model(side: str, arguments: argparse.Namespace) -> Any:
    """Random weights, the same for both sides; dropout as RoBERTa has it."""
    config = tiny_roberta_config(
        vocab_size=arguments.vocab_size,
        hidden_size=arguments.hidden_size,
        num_hidden_layers=arguments.num_layers,
        num_attention_heads=max(arguments.hidden_size // 32, 1),
        intermediate_size=4 * arguments.hidden_size,
        max_position_embeddings=arguments.length + 2,
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1,
    )
    torch.manual_seed(0)
    kind = TwoViewRoberta if side == "hfkd" else transformers.RobertaForMaskedLM
    return kind(config).to(arguments.device).train()


def make_optimizer(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=5e-5, fused=True)  # fused is the Trainer's default


def make_batches(count: int, arguments: argparse.Namespace) -> list[dict[str, Batch]]:
    """Per batch, what each side reads: for the stock model the labels lie on the whole grid, -100 where nothing is lost."""
    generator = torch.Generator().manual_seed(0)
    collator = MaskedLMCollator(tiny_tokenizer(arguments.vocab_size), arguments.mlm_probability)
    batches = []
    for number in range(count):
        words = torch.randint(
            5, arguments.vocab_size, (arguments.batch_size, arguments.length - 2), generator=generator
        )
        rows = [
            {"input_ids": [0, *row, 2], "example_id": number * arguments.batch_size + i}
            for i, row in enumerate(words.tolist())
        ]
        batch = {name: tensor.to(arguments.device) for name, tensor in collator(rows).items()}
        kept = batch["masked_labels"] != -100
        labels = torch.full_like(batch["input_ids"], -100)
        labels.view(-1)[batch["masked_positions"][kept]] = batch["masked_labels"][kept]
        shared = {name: batch[name] for name in ("input_ids", "attention_mask")}
        masked = {name: batch[name] for name in ("masked_positions", "masked_labels")}
        batches.append({"stock": {**shared, "labels": labels}, "hfkd": {**shared, **masked}})
    return batches


def stock_loss(model: Any, batch: Batch) -> Tensor:
    return model(**batch).loss


def hfkd_loss(model: Any, batch: Batch) -> Tensor:
    """As the trainer forms it: the sum over units divided by their number."""
    objective = MaskedLM()
    outputs = model(**{name: value for name, value in batch.items() if name != "masked_labels"})
    counts = objective.count(batch)
    return torch.stack([t.sum() / counts[n].clamp(min=1) for n, t in objective(outputs, None, batch).items()]).sum()


LOSSES: dict[str, Callable[[Any, Batch], Tensor]] = {"stock": stock_loss, "hfkd": hfkd_loss}


def take_step(side: str, model: Any, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    LOSSES[side](model, batch).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


# ---- what is measured ----


def check_agreement(arguments: argparse.Namespace) -> dict[str, float]:
    """The largest relative differences of loss and gradients, without dropout. Raises ValueError above 1e-4."""
    batch = make_batches(1, arguments)[0]
    losses, gradients = {}, {}
    for side in SIDES:
        model = make_model(side, arguments).eval()
        loss = LOSSES[side](model, batch[side])
        loss.backward()
        losses[side] = loss.item()
        gradients[side] = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    if gradients["stock"].keys() != gradients["hfkd"].keys():
        raise ValueError(f"different parameters have gradients: {gradients['stock'].keys() ^ gradients['hfkd'].keys()}")
    # In units of the whole gradient's norm: the keys' biases, whose gradient is 0 but for rounding, have none of their own
    norm = sum(g.double().square().sum() for g in gradients["stock"].values()) ** 0.5
    apart = [(g - gradients["hfkd"][name]).double().square().sum() for name, g in gradients["stock"].items()]
    differences = {
        "loss": abs(losses["hfkd"] / losses["stock"] - 1),
        "gradient": float(sum(apart) ** 0.5 / norm),
    }
    if max(differences.values()) > 1e-4:
        raise ValueError(f"the two sides do not compute the same thing, so their cost does not compare: {differences}")
    return differences


def step_times(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    batches = make_batches(arguments.steps + WARM_UP_STEPS, arguments)
    models = {side: make_model(side, arguments) for side in SIDES}
    optimizers = {side: make_optimizer(model) for side, model in models.items()}
    times: dict[str, list[tuple[float, float]]] = {side: [] for side in SIDES}
    for number, batch in enumerate(batches):
        for side in SIDES if number % 2 else reversed(SIDES):  # whoever comes second finds the caches used
            synchronize(arguments.device)
            wall, cpu = time.perf_counter(), time.process_time()
            take_step(side, models[side], optimizers[side], batch[side])
            synchronize(arguments.device)
            if number >= WARM_UP_STEPS:
                times[side].append((time.process_time() - cpu, time.perf_counter() - wall))
    return {
        side: dict(zip(("cpu_seconds", "wall_seconds"), map(statistics.median, zip(*taken, strict=True)), strict=True))
        for side, taken in times.items()
    }


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def memory_of(side: str, device: str) -> dict[str, int]:
    found = in_a_process_of_its_own(side, {"MALLOC_MMAP_THRESHOLD_": str(128 * 1024)})  # its initial value, fixed
    if device == "cpu":
        found |= {f"default_malloc_{name}": value for name, value in in_a_process_of_its_own(side, {}).items()}
    return found


def in_a_process_of_its_own(side: str, environment: dict[str, str]) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "memory.json"
        command = [
            sys.executable,
            __file__,
            *sys.argv[1:],
            "--memory_of",
            side,
            "--json",
            str(path),
        ]  # the last one wins
        subprocess.run(command, check=True, env={**os.environ, **environment})
        return json.loads(path.read_text(encoding="utf-8"))


def peak_memory(side: str, arguments: argparse.Namespace) -> dict[str, int]:
    """Bytes of a few steps at their peak: of the whole process (on CUDA of the allocator), and over what lay there before.

    Gradients belong to the step; weights and the optimizer's states lie there before.
    """
    batches = make_batches(3, arguments)
    model = make_model(side, arguments)
    optimizer = make_optimizer(model)
    for parameter in model.parameters():  # an empty step allocates the states, without a forward
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    on_cuda = arguments.device == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if on_cuda else psutil.Process().memory_info().rss
    for batch in batches:
        take_step(side, model, optimizer, batch[side])
    peak = torch.cuda.max_memory_allocated() if on_cuda else largest_resident_size()
    return {"peak_bytes": peak, "step_bytes": peak - before}


def largest_resident_size() -> int:
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024


# ---- what is shown ----


LINES = {
    "cpu_seconds": ("CPU time of a step", "ms", 1e-3),
    "wall_seconds": ("wall time of a step", "ms", 1e-3),
    "step_bytes": ("memory the step adds", "MiB", MIB),
    "peak_bytes": ("peak of the process", "MiB", MIB),
    "default_malloc_step_bytes": ("memory the step adds, default malloc", "MiB", MIB),
    "default_malloc_peak_bytes": ("peak of the process, default malloc", "MiB", MIB),
}


def print_table(found: dict[str, dict[str, float]], ratios: dict[str, float], settings: dict[str, Any]) -> None:
    shape = "{num_layers} layers x {hidden_size}, vocabulary {vocab_size:,}, {batch_size} rows x {length} tokens"
    print(f"{shape.format(**settings)}, {settings['threads']} thread(s), {settings['device']}, float32\n")
    print("| | stock | hfkd | ratio |\n|---|---:|---:|---:|")
    for name, (label, unit, size) in LINES.items():
        if name in ratios:
            stock, ours = (found[side][name] / size for side in SIDES)
            print(f"| {label} ({unit}) | {stock:,.0f} | {ours:,.0f} | {ratios[name]:.2f} |")


def print_verdicts(headline: dict[str, str], ratios: dict[str, float]) -> None:
    print()
    for name, line in headline.items():
        verdict = "met" if ratios[line] <= TARGET else "NOT met"
        print(f"{name} ratio {ratios[line]:.2f} ({LINES[line][0]}), target <= {TARGET:.2f}: {verdict}")


def write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
