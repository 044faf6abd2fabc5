"""MC-Distil: students of different sizes learn together from one teacher, each example with weights of its own (TMLR 2025).

    accelerate launch recipes/mc_distil.py                     # embedded digits, no network, 10 minutes or less
    accelerate launch recipes/mc_distil.py --profile study     # 4 students, every method, wrong labels, 60 minutes
    accelerate launch recipes/mc_distil.py --config recipes/configs/mc_distil_movies.yaml    # texts, no network
    accelerate launch recipes/mc_distil.py --config recipes/configs/mc_distil_cifar100.yaml  # the released code's values
    accelerate launch recipes/mc_distil.py --search 8 --methods kd mc_distil                 # the paper's grid, by optuna

Methods (--methods): ce (labels alone), kd (equal weights of labels and teacher), mc_distil (a coordinator weights every example
for every student and both losses, and is judged by the students' next step on the meta rows), meta_k1 (the same, a coordinator
for each student alone), dml (students teach each other, no teacher), takd (a chain of ever smaller students), dgkd (teacher and
all larger students at once), amal (a table of weights, one for each example) and fixed (weights set by hand).

All start from the same students, trained on the labels (--warm_start ce, as in the released code), and take the same steps on
the same rows with the same optimizer; no method but mc_distil, meta_k1 and amal sees the meta rows (--baselines_use_meta_rows).
Everything is scored on test rows that chose nothing, and on damaged ones; --noise_rate repeats --noise_methods with training
labels, the teacher's too, that are wrong where images look alike; the meta rows' stay right. Every run is kept when it is done:
`--resume_from_checkpoint True` goes on where a study was stopped. Choose settings with `--evaluate_on validation`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from corruptions import SEVERITIES, named
from group_runs import TOP
from hfkd import CollaborativeArguments
from hfkd.data.splits import save_indices
from hfkd.diagnostics import plots
from hfkd.diagnostics.metrics import mean_and_std
from hfkd.records import read_json
from hfkd.trainers.arguments import parse_arguments
from mc_data import ImageMcArguments, TextMcArguments
from mc_search import refuse_wrong_search, search
from mc_study import KD, MC_DISTIL, TAKD, TEACHER, WARM, McStudy
from mc_study import named as run_named
from pet_report import difference
from program import HERE, one_sentence, one_source, quiet
from publication import Publication, publish
from run_report import per_seed_csv, write_whole
from train_ensemble import about_texts

OWN_DATA = ("--task", "--dataset_name", "--data_dir", "--train_file", "--config")
PROFILES = ("demo", "study", "task")
ALL = None  # students: the mean over them
Rows = list[dict[str, Any]]


def main(arguments: list[str]) -> None:
    run(prepare(arguments))


def prepare(arguments: list[str]) -> McStudy:
    """Whatever is wrong with the inputs is said here."""
    quiet()
    own_data = any(word.split("=")[0] in OWN_DATA for word in arguments)
    only_profile = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    only_profile.add_argument("--profile", default="task" if own_data else "demo")
    found, others = only_profile.parse_known_args(arguments)
    if found.profile not in PROFILES:
        raise ValueError(f"--profile {found.profile}: choose {', '.join(PROFILES)}, or give your values with --config")
    defaults = HERE / "configs" / f"mc_distil_{found.profile}.yaml"
    kind = TextMcArguments if about_texts(others) else ImageMcArguments
    recipe, args = parse_arguments(kind, CollaborativeArguments, arguments=others, defaults=defaults)
    one_source(recipe, others)
    study = McStudy(recipe, args)
    if recipe.search:
        refuse_wrong_search(study)
    return study


def run(study: McStudy) -> None:
    started = time.monotonic()
    study.runs.start()
    if study.recipe.search:
        return search(study)
    results: Rows = []
    for seed in range(study.recipe.seeds):
        for rate, methods in blocks(study.recipe).items():
            results += rows_of(study.teacher(rate, seed), TEACHER, rate, seed)
            if study.recipe.warm_start == "ce":
                results += rows_of(study.warm(rate, seed), WARM, rate, seed)
            for method in methods:
                results += rows_of(study.result(method, rate, seed), method, rate, seed)
    if study.args.process_index == 0:
        report(study, results, (time.monotonic() - started) / 60)


def blocks(recipe: Any) -> dict[float, list[str]]:
    """The methods of every noise rate."""
    found = {0.0: recipe.methods, recipe.noise_rate: recipe.noise_methods if recipe.noise_rate else recipe.methods}
    return {rate: methods for rate, methods in found.items() if methods}


def rows_of(result: dict[str, Any], method: str, rate: float, seed: int) -> Rows:
    """One for each student; costs are those of the group."""
    costs = {name: result.get(name) for name in ("meta_seconds_per_step", "steps", "seconds_per_step", "peak_mib")}
    head = {"method": method, "noise_rate": rate, "seed": seed}
    return [{**head, "student": name, **metrics, **costs} for name, metrics in result["students"].items()]


# ---- report ----


def report(study: McStudy, results: Rows, minutes: float) -> None:
    output = study.runs.output
    text = "\n\n".join(filter(None, sections(study, results)))
    write_whole(output / "results.md", text + "\n")
    write_whole(output / "results.csv", per_seed_csv(results))
    used = study.data.indices() if hasattr(study.data, "indices") else {}
    if used:
        save_indices(output / "splits.json", **used, meta=study.found.meta["example_id"][:])
    print(f"\n{text}\n\n{about_rows(study)} Took {minutes:.1f} minutes.")
    print(f"  tables                 {output / 'results.md'}, {output / 'results.csv'}")
    for rate, methods in blocks(study.recipe).items():
        ending = f"_noise{rate:g}" if rate else ""
        draw(lambda path, of=(rate, methods): draw_scores(results, *of, path), output / f"scores{ending}.png")
        if MC_DISTIL in methods:
            draw(lambda path, rate=rate: draw_weights(study, rate, path), output / f"weights{ending}.png")
    publish(study.runs, *(publication(study, results, name) for name in study.names))


def publication(study: McStudy, results: Rows, name: str) -> Publication:
    """One student of the group: that of MC-Distil, or of the first method that ran, beside the same student of the others."""
    rate, methods = next(iter(blocks(study.recipe).items()))
    leading = MC_DISTIL if MC_DISTIL in methods else methods[0]
    scores = {shown(method): values(results, method, rate, "accuracy", name) for method in (leading, *methods)}
    scores["teacher"] = values(results, TEACHER, rate, "accuracy")
    folder = study.folder(f"{TAKD}-{name}" if leading == TAKD else leading, rate, 0) / name
    baseline = shown(KD) if KD in methods and leading != KD else None
    return Publication(
        {shown(leading): folder}, scores, "accuracy", baseline, ("teacher", study.teacher_folder(rate, 0))
    )


def sections(study: McStudy, results: Rows) -> list[str]:
    found = []
    for rate, methods in blocks(study.recipe).items():
        found += [table(study, results, rate, methods, "accuracy")]
        if any(f"top{TOP}" in row for row in results):
            found += [table(study, results, rate, methods, f"top{TOP}")]
    return [*found, corruption_table(study, results), costs_table(study, results), overhead(study, results)]


def about_rows(study: McStudy) -> str:
    recipe, both = study.recipe, study.recipe.baselines_use_meta_rows
    trained = "which the baselines train on too" if both else "which no student trains on"
    return (
        f"{len(study.view.train):,} training rows; {len(study.found.meta):,} meta rows, {trained}; scored on "
        f"{len(study.view.held_out['']):,} {recipe.evaluate_on or 'test'} rows, which chose nothing."
    )


def values(results: Rows, method: str, rate: float, metric: str, student: str | None = ALL) -> list[float]:
    """One a seed; without a student the mean over all of that seed's."""
    found: dict[int, list[float]] = {}
    for row in results:
        here = (row["method"], row["noise_rate"]) == (method, rate) and student in (ALL, row["student"])
        if here and row.get(metric) is not None:
            found.setdefault(row["seed"], []).append(row[metric])
    return [float(np.mean(found[seed])) for seed in sorted(found)]


def table(study: McStudy, results: Rows, rate: float, methods: list[str], metric: str) -> str:
    """Markdown: mean ± std over seeds; the gain over KD is that of the mean over students, paired by seed, with 95 %."""
    title = {"accuracy": "top-1 (%)"}.get(metric, f"top-{TOP} (%)")
    title += f", {100 * rate:g} % of the training labels wrong" if rate else ""
    heads = [title, *study.names, "mean", "- kd"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    reference = values(results, KD, rate, metric)
    warm = [WARM] if study.recipe.warm_start == "ce" else []
    for method in [*warm, *methods]:
        own = values(results, method, rate, metric)
        cells = [spread(values(results, method, rate, metric, name)) for name in study.names]
        gain = difference(own, reference) if reference and method != KD else "–"
        lines.append("| " + " | ".join([shown(method), *cells, spread(own), gain]) + " |")
    teacher = spread(values(results, TEACHER, rate, metric))
    return "\n".join([*lines, "", f"Teacher: {teacher}. {seeds_of(reference or own)}"])


def shown(method: str) -> str:
    return "(warm start)" if method == WARM else method


def seeds_of(scores: list[float]) -> str:
    if len(scores) < 2:
        return "One seed: there is no interval."
    return f"Mean ± standard deviation over {len(scores)} seeds; - kd: of the means, with its 95 % interval, paired by seed."


def spread(scores: list[float]) -> str:
    if not scores:
        return "–"
    mean, std, seeds = mean_and_std([100 * score for score in scores])
    return f"{mean:.2f} ± {std:.2f}" if seeds > 1 else f"{mean:.2f}"


def corruption_table(study: McStudy, results: Rows) -> str:
    """Accuracy on damaged test images, the mean over students."""
    kinds = [kind for kind in SEVERITIES if f"{kind}_" in study.view.held_out]
    if not kinds or not study.recipe.methods:
        return ""
    heads = ["mean of the students (%)", *map(named, kinds), "mean", "- kd"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]

    def mean(method: str) -> list[float]:
        found = [values(results, method, 0.0, f"{kind}_accuracy") for kind in kinds]
        return [float(np.mean(scores)) for scores in zip(*found, strict=True)]

    for method in study.recipe.methods:
        cells = [spread(values(results, method, 0.0, f"{kind}_accuracy")) for kind in kinds]
        gain = difference(mean(method), mean(KD)) if method != KD and mean(KD) else "–"
        lines.append("| " + " | ".join([method, *cells, spread(mean(method)), gain]) + " |")
    return "\n".join(lines)


# ---- costs ----


def costs_table(study: McStudy, results: Rows) -> str:
    """Milliseconds of a step of the whole group, the mean over seeds."""
    rate, methods = next(iter(blocks(study.recipe).items()))
    lines = ["| a step of the group (ms) | all | of it meta steps |", "|---|---|---|"]
    for method in methods:
        whole, meta = (
            milliseconds(results, method, rate, name) for name in ("seconds_per_step", "meta_seconds_per_step")
        )
        lines.append(f"| {method} | {whole} | {meta} |")
    return "\n".join(lines)


def milliseconds(results: Rows, method: str, rate: float, name: str) -> str:
    found = values(results, method, rate, name)
    return f"{1000 * np.mean(found):.1f}" if found else "–"


def overhead(study: McStudy, results: Rows) -> str:
    """What the coordinator costs, measured in two ways; other work on the machine shows in the first."""
    rate, methods = next(iter(blocks(study.recipe).items()))
    ours, kd = (values(results, method, rate, "seconds_per_step") for method in (MC_DISTIL, KD))
    meta = values(results, MC_DISTIL, rate, "meta_seconds_per_step")
    if not {MC_DISTIL, KD} <= set(methods) or not meta:
        return ""
    ratio = np.median([one / other for one, other in zip(ours, kd, strict=True)])
    args = study.args
    return (
        f"The coordinator of mc_distil (every {args.coordinator_interval} {args.coordinator_interval_unit}, order "
        f"{args.meta_order}, engine {args.meta_engine}): a step takes {100 * (ratio - 1):+.1f} % longer than one of kd in the "
        f"same group (median over seeds); meta steps are {100 * np.sum(meta) / np.sum(ours):.1f} % of its time."
    )


# ---- figures ----


def draw(figure: Callable[[Path], None], path: Path) -> None:
    try:
        figure(path)
        print(f"  figure                 {path}")
    except (ImportError, ValueError) as error:  # matplotlib is an extra; a trial may have nothing to draw
        print(f"  no {path.stem}: {error}")


def draw_scores(results: Rows, rate: float, methods: list[str], path: Path) -> None:
    order = [KD, *(method for method in methods if method != KD)] if KD in methods else methods
    rows = [{"objective": m, "metric": "accuracy", "scores": values(results, m, rate, "accuracy")} for m in order]
    plots.objective_scores(rows, path)


def draw_weights(study: McStudy, rate: float, path: Path) -> None:
    """Quartiles over a batch's examples, the mean over seeds."""
    logs = [
        read_json(study.runs.folder(run_named(MC_DISTIL, rate), seed) / "weights.json")
        for seed in range(study.recipe.seeds)
    ]
    found: dict[str, dict[str, dict[int, tuple[float, float, float]]]] = {}
    for name in study.names:
        parts = [
            part
            for part in ("task", "distill", "pooled")
            if any(f"{name}_{part}_weight_q50" in e for e in (logs[0] or []))
        ]
        found[name] = {part: quartiles([log for log in logs if log], f"{name}_{part}_weight") for part in parts}
    plots.weight_quartiles({name: parts for name, parts in found.items() if parts}, path)


def quartiles(logs: list[Rows], name: str) -> dict[int, tuple[float, float, float]]:
    """By step: the 25, 50 and 75 % quantiles, each the mean over the seeds that logged it."""
    found: dict[int, list[list[float]]] = {}
    for entry in (entry for log in logs for entry in log if f"{name}_q50" in entry):
        found.setdefault(entry["step"], []).append([entry[f"{name}_q{level}"] for level in (25, 50, 75)])
    return {step: tuple(np.mean(levels, axis=0).tolist()) for step, levels in sorted(found.items())}


if __name__ == "__main__":
    with one_sentence():
        prepared = prepare(sys.argv[1:])
    run(prepared)
