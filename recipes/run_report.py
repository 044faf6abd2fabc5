"""What the recipes of runs write: mean and spread in words, per-seed csv, whole files."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from hfkd.diagnostics.metrics import mean_and_std

COSTS = ("steps", "seconds_per_step", "peak_mib")


def percent(values: list[float]) -> str:
    if not values:
        return "–"
    mean, std, seeds = mean_and_std(values)
    return f"{100 * mean:.2f} ± {100 * std:.2f} (n={seeds})" if seeds > 1 else f"{100 * mean:.2f} (n=1)"


def per_seed_csv(results: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in results for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, [*(n for n in names if n not in COSTS), *(n for n in COSTS if n in names)])
    writer.writeheader()
    writer.writerows(results)
    return text.getvalue()


def write_whole(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(text, encoding="utf-8", newline="")
    partial.replace(path)
