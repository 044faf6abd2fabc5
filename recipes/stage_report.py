"""What the self-distillation recipes write at the end: one table, per-seed csv, figures."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hfkd.diagnostics import plots
from hfkd.diagnostics.metrics import mean_and_std, paired_difference
from hfkd.records import read_json
from stage_rounds import seconds_of

Results = list[
    dict[str, Any]
]  # one per run of stage_fine_tuning: stage, seed, labelled_rows, metric, score, losses, ...
REFERENCE = "further pre-trained"
COLUMNS = (
    "stage",
    "seed",
    "pretraining_seed",
    "labelled_rows",
    "metric",
    "score",
    "train_loss",
    "test_loss",
    "seconds",
)


def stage_rows(stages: Sequence[dict[str, Path]], results: Results) -> list[dict[str, Any]]:
    """One row per stage: scores and losses by seed, the encoder's L2 distance to the start weights and its cost in seconds,
    both as means over pre-training seeds, each of which has its own `stages`."""
    rows, main = [], [result for result in results if not result["more"]]
    for stage in dict.fromkeys([*stages[0], *(result["stage"] for result in main)]):
        of_stage = [result for result in main if result["stage"] == stage]
        folders = [of_seed[stage.split(",")[0] if stage not in of_seed else stage] for of_seed in stages]
        rows.append(
            {
                "stage": stage,
                "metric": of_stage[0]["metric"] if of_stage else "accuracy",
                "distance": mean_distance(folders) if stage in stages[0] else None,
                "pretraining": mean_seconds(folders),
                "scores": [result["score"] for result in of_stage],
                "seconds": [result["seconds"] for result in of_stage if "seconds" in result],
                **{name: [result[name] for result in of_stage] for name in ("train_loss", "test_loss")},
            }
        )
    return rows


def mean_distance(folders: list[Path]) -> float | None:
    if folders[0].name == "start":
        return 0.0
    done = [read_json(folder / "done.json") for folder in folders]
    return None if None in done else sum(found["distance_to_start"] for found in done) / len(done)


def mean_seconds(folders: list[Path]) -> tuple[float, float] | None:
    """Of all rounds that led there, and of one step of the last one; None where a clock has not run through."""
    found = [seconds_of(folder) for folder in folders]
    known = [seconds for seconds in found if seconds is not None]
    return None if len(known) < len(found) else tuple(sum(part) / len(part) for part in zip(*known, strict=True))


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: score mean +- std, distance to the start, losses and their gap, difference to further pre-training."""
    reference = next((row["scores"] for row in rows if row["stage"] == REFERENCE), [])
    metric = rows[0]["metric"]
    lines = [
        f"| stage | {metric} (%), mean ± std | paired difference to {REFERENCE} [95 %] "
        "| L2 to start | train loss | test loss | gap |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["stage"], *["–"] * 6]
        if row["scores"]:
            mean, std, seeds = mean_and_std(row["scores"])
            train, test = (mean_and_std(row[name])[0] for name in ("train_loss", "test_loss"))
            cells[1] = f"{100 * mean:.2f} ± {100 * std:.2f} (n={seeds})"
            cells[4:] = [f"{train:.3f}", f"{test:.3f}", f"{test - train:.3f}"]
        if len(reference) > 1 and row["stage"] != REFERENCE:
            mean, low, high = (100 * value for value in paired_difference(row["scores"], reference))
            cells[2] = f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"
        if row["distance"] is not None:
            cells[3] = f"{row['distance']:.2f}"
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def time_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: seconds of each method, from the start weights to the fine-tuned model."""
    lines = [
        "| method | pre-training (s) | ms a step of its last round | fine-tuning (s) | both (s) |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        tuned = mean_and_std(row["seconds"])[0] if row["seconds"] else None
        total, step = row["pretraining"] or (None, None)
        both = None if tuned is None or total is None else tuned + total
        cells = [total, 1000 * step if step else None, tuned, both]
        lines.append(f"| {row['stage']} | " + " | ".join("–" if c is None else f"{c:.1f}" for c in cells) + " |")
    return "\n".join(lines)


def label_curves(results: Results, stages: Sequence[str]) -> dict[str, dict[int, list[float]]]:
    """For each of the stages its scores by the number of labelled rows; empty where there was one number only."""
    counts = sorted({result["labelled_rows"] for result in results if result["labelled_rows"] is not None})
    if len(counts) < 2:
        return {}
    return {
        stage: {
            count: [r["score"] for r in results if (r["stage"], r["labelled_rows"]) == (stage, count)]
            for count in counts
        }
        for stage in stages
    }


def label_table(curves: dict[str, dict[int, list[float]]], metric: str) -> str:
    """Markdown: one column for each number of labels; below, the last stage minus further pre-training, paired."""
    counts = list(next(iter(curves.values())))
    lines = [f"| {metric} (%) with labels | " + " | ".join(f"{count:,}" for count in counts) + " |"]
    lines.append("|---|" + "---|" * len(counts))
    for stage, scores in curves.items():
        cells = (mean_and_std([100 * score for score in scores[count]])[:2] for count in counts)
        lines.append(f"| {stage} | " + " | ".join(f"{mean:.2f} ± {std:.2f}" for mean, std in cells) + " |")
    last = list(curves)[-1]
    if last != REFERENCE and len(curves[last][counts[0]]) > 1:
        cells = (paired_difference(curves[last][count], curves[REFERENCE][count]) for count in counts)
        shown = (f"{100 * mean:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]" for mean, low, high in cells)
        lines.append(f"| {last} - {REFERENCE} [95 %] | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def write_csv(results: Results, path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(results)


def card_results(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows as a card lists them."""
    found = []
    for row in (row for row in rows if row["scores"]):
        mean, std, seeds = mean_and_std(row["scores"])
        train, test = (mean_and_std(row[name])[0] for name in ("train_loss", "test_loss"))
        losses = {"train_loss": train, "test_loss": test, "gap": test - train}
        found.append(
            {"stage": row["stage"], "metric": row["metric"], "mean": mean, "std": std, "seeds": seeds, **losses}
        )
    return found


def draw(rows: list[dict[str, Any]], rounds: list[Path], folder: Path, steps: dict[str, int]) -> list[Path]:
    """Every figure that the run has the facts for. `steps`: optimizer steps of further pre-training per stage."""
    folder.mkdir(parents=True, exist_ok=True)
    histories = {path.name: json.loads((path / "trainer_state.json").read_text())["log_history"] for path in rounds}
    if any("pretrain_loss" in entry for history in histories.values() for entry in history):
        plots.loss_curves(histories, folder / "losses.png")
    plots.stage_distances(rows, folder / "distances.png")
    scored = [row for row in rows if row["scores"]]
    if scored:
        plots.stage_scores(scored, folder / "scores.png")
        plots.stage_gaps(scored, folder / "gaps.png")
        by_round = [row for row in scored if row["stage"] == REFERENCE or row["stage"].startswith("self-distilled")]
        draw_against(by_round, list(range(len(by_round))), "round (0 = further pre-training)", folder / "rounds.png")
        by_steps = [row for row in scored if row["stage"] in steps]
        draw_against(
            by_steps, [steps[row["stage"]] for row in by_steps], "further-pre-training steps", folder / "steps.png"
        )
    return sorted(folder.glob("*.png"))


def draw_against(rows: list[dict[str, Any]], x: list[int], label: str, path: Path) -> None:
    if len(rows) > 2:
        means, stds = zip(*[mean_and_std([100 * score for score in row["scores"]])[:2] for row in rows], strict=True)
        plots.against(x, means, stds, label, f"{rows[0]['metric']} (%)", path)
