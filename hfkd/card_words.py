"""The words, numbers and tables of cards: what the templates are given beside the facts."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

from hfkd.redaction import redact

HUB_ID = re.compile(r"\w[\w.-]*(?:/\w[\w.-]*)?")


def where(facts: Any) -> str:
    """What `from_pretrained` is given."""
    branch = f', revision="{facts.branch}"' if facts.branch and facts.repo_id else ""
    return f'"{facts.repo_id or "path/to/this/folder"}"{branch}'


def score_table(facts: Any) -> dict[str, Any]:
    """One row a model, one column a metric."""
    metrics = unique(str(row.get("metric", "score")) for row in facts.results)
    stages = unique(str(row.get("stage") or facts.student) for row in facts.results)
    rows = []
    for stage in stages:
        scores = {
            row.get("metric", "score"): row for row in facts.results if (row.get("stage") or facts.student) == stage
        }
        seeds = [row["seeds"] for row in scores.values() if row.get("seeds")]
        own = stage == (facts.stage or facts.student) or len(stages) == 1
        cells = [_score(scores[metric]) if metric in scores else "-" for metric in metrics]
        rows.append({"name": stage, "own": own, "scores": cells, "seeds": max(seeds, default="-")})
    return {
        "metrics": metrics,
        "rows": rows,
        "seeds": any(row["seeds"] != "-" for row in rows),
        "spread": any(_has_spread(row) for row in facts.results),
        "intervals": any(row.get("low") is not None for row in facts.results),
    }


def _has_spread(row: Mapping[str, Any]) -> bool:
    return row.get("std") is not None and row.get("seeds") != 1


def _score(row: Mapping[str, Any]) -> str:
    spread = f" ± {_number(row['std'])}" if _has_spread(row) else ""
    return _number(row.get("mean")) + spread + (f" {_interval(row)}" if row.get("low") is not None else "")


def _interval(row: Mapping[str, Any], form: str = "%.4f") -> str:
    ends = row.get("low"), row.get("high")
    return "-" if None in ends else f"[{form % ends[0]}, {form % ends[1]}]"


def cost_table(costs: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Rows of words and numbers: one column a side, then how they compare."""
    sides = list(costs.values())
    if not sides:
        return []
    timed = {f"{side['rows']} rows on {side['device']}" for side in sides}
    where = f" of {timed.pop()}" if len(timed) == 1 else ""
    rows = [
        ["parameters", *(f"{side['parameters']:,}" for side in sides)],
        [f"forward pass{where} (ms)", *(f"{side['milliseconds']:.1f}" for side in sides)],
    ]
    if {"student", "teacher"} <= set(costs):
        for row, name, words in zip(
            rows, ("parameters", "milliseconds"), (("smaller", "larger"), ("faster", "slower")), strict=True
        ):
            row.append(_times(costs["student"][name], costs["teacher"][name], words))
    return rows


def _times(student: float, teacher: float, words: tuple[str, str]) -> str:
    if not student or not teacher:
        return "-"
    factor = teacher / student
    return f"{factor:.1f} times {words[0]}" if factor >= 1 else f"{1 / factor:.1f} times {words[1]}"


def limits_of(facts: Any) -> list[str]:
    """What follows from the facts, where nobody has written more."""
    if facts.role == "logits":
        return ["They are the answers of a model, not labels: where the teacher is wrong, so are they."]
    found = []
    if facts.datasets:
        data = ", ".join(facts.datasets)
        found.append(f"Known of it is what is said above, on {data}; what it does with other inputs is unknown.")
    if facts.role != "teacher" and (facts.teacher_private or facts.teacher not in ("", "none")):
        found.append("It learned the mistakes of its teacher together with what the teacher knows.")
    if facts.results and all(row.get("seeds") in (1, None) for row in facts.results):
        found.append("The scores are of one run: how much they vary with the seed was not measured.")
    worst = min(
        (part for part in facts.fidelity.get("classes") or [] if part.get("difference") is not None),
        key=lambda part: part["difference"],
        default=None,
    )
    if worst and worst["difference"] < 0:
        found.append(
            f"Beside its teacher it is weakest on the class {worst['name']}: {worst['difference']:+.4f} in accuracy."
        )
    return found


def _model_link(name: str) -> str:
    return f"[{name}](https://huggingface.co/{name})" if _linked(name) else str(name)


def _data_link(name: str) -> str:
    return f"[{name}](https://huggingface.co/datasets/{name})" if _linked(name) else str(name)


def _linked(name: str) -> bool:
    return "/" in str(name) and bool(hub_ids([name]))


def _shortened(names: list[str], most: int = 20) -> str:
    more = f", ... ({len(names)} in all)" if len(names) > most else ""
    return ", ".join(_cell(name) for name in names[:most]) + more


def _cell(value: Any) -> str:
    """One cell of a Markdown table: a bar or a line break would shift every later column."""
    return " ".join(str(value).split()).replace("|", "\\|")


def _number(value: Any, digits: int = 4) -> str:
    return "-" if value is None else f"{float(value):.{digits}f}"


def _flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            rows += _flat(value, f"{prefix}{name}.")
        else:
            rows.append((f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value, default=str)))
    return rows


def with_gap(row: Mapping[str, Any]) -> dict[str, Any]:
    empty = dict.fromkeys(("stage", "metric", "mean", "std", "seeds", "train_loss", "test_loss", "gap"))
    full: dict[str, Any] = {**empty, **row}
    if full["gap"] is None and full["train_loss"] is not None and full["test_loss"] is not None:
        full["gap"] = full["test_loss"] - full["train_loss"]
    return full


def unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def hub_ids(names: Iterable[str]) -> list[str]:
    """The names that can be Hub ids: not paths, not folders of this machine."""
    return [
        name for name in map(str, names) if HUB_ID.fullmatch(name) and name == redact(name) and not os.path.isdir(name)
    ]


FILTERS = {
    "cell": _cell,
    "number": _number,
    "flat": _flat,
    "interval": _interval,
    "shortened": _shortened,
    "model_link": _model_link,
    "data_link": _data_link,
}
