"""What the self-distillation recipes write at the end: one table, per-seed csv, figures."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from hfkd.diagnostics import plots
from hfkd.diagnostics.metrics import mean_and_std, paired_difference

Results = list[dict[str, Any]]  # one per stage and seed: stage, seed, metric, score, train_loss, test_loss
REFERENCE = "further pre-trained"


def stage_rows(stages: dict[str, Path], results: Results) -> list[dict[str, Any]]:
    """One row per stage: scores and losses by seed, and the encoder's L2 distance to the start weights."""
    rows = []
    for stage in dict.fromkeys([*stages, *(result["stage"] for result in results)]):
        of_stage = [result for result in results if result["stage"] == stage]
        done = stages[stage] / "done.json" if stage in stages else None
        distance = 0.0 if stage == "start" else None
        if done is not None and done.exists():
            distance = json.loads(done.read_text())["distance_to_start"]
        rows.append(
            {
                "stage": stage,
                "metric": of_stage[0]["metric"] if of_stage else "accuracy",
                "distance": distance,
                "scores": [result["score"] for result in of_stage],
                **{name: [result[name] for result in of_stage] for name in ("train_loss", "test_loss")},
            }
        )
    return rows


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


def write_csv(results: Results, path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(
            file, ["stage", "seed", "metric", "score", "train_loss", "test_loss"], extrasaction="ignore"
        )
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
