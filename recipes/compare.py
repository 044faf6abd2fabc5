"""Compare objectives on one task: the same student, teacher, rows, order and budget; only the objective differs.

    accelerate launch recipes/compare.py --objectives kd dkd dist logit_mse              # embedded movie sentences
    accelerate launch recipes/compare.py --objectives kd:temperature=4,alpha=0.9 kd:temperature=1,alpha=1 --seeds 5
    accelerate launch recipes/compare.py --task sst2 --teacher T --student_layers 3 --objectives kd hidden_states

An objective is a name and, behind a colon, its settings; those not given are the objective's own defaults. Cross-entropy
is always run: the table's differences are paired with it, seed by seed. Teacher's answers are cached where an objective
needs logits only; the others ask the teacher in every step, which is what their seconds per step show. Choose with
`--evaluate_on validation`, then report once on the test split.
"""

from __future__ import annotations

import re
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import yaml

from hfkd import DistillationArguments
from hfkd.diagnostics import plots
from hfkd.diagnostics.metrics import mean_and_std, paired_difference
from hfkd.objectives import Objective
from hfkd.trainers.arguments import parse_arguments
from program import HERE, one_sentence, one_source, quiet, say
from publication import Publication, publish, scores_by
from run_report import per_seed_csv, percent, write_whole
from text_study import Study, StudyArguments

OWN_DATA = ("--task", "--dataset_name", "--train_file", "--config")
REFERENCE = "cross_entropy"


@dataclass
class RecipeArguments(StudyArguments):
    """Data, teacher and student, and what is compared."""

    objectives: list[str] = field(
        default_factory=lambda: ["kd", "dkd"],
        metadata={"help": "Names, each with settings where wanted: kd:temperature=4,alpha=0.9"},
    )


def main(arguments: list[str]) -> None:
    run(*prepare(arguments))


def prepare(arguments: list[str]) -> tuple[RecipeArguments, DistillationArguments, Study]:
    """Whatever is wrong with the inputs is said here."""
    quiet()
    own_data = any(word.split("=")[0] in OWN_DATA for word in arguments)
    defaults = HERE / "configs" / f"compare_{'task' if own_data else 'demo'}.yaml"
    recipe, args = parse_arguments(RecipeArguments, DistillationArguments, arguments=arguments, defaults=defaults)
    one_source(recipe, arguments)
    if args.names_objective():
        raise ValueError("give settings with their objective, as --objectives kd:temperature=4,alpha=0.9, not as flags")
    recipe.objectives = list(dict.fromkeys([REFERENCE, *recipe.objectives]))
    return recipe, args, Study(recipe, args, [objective_of(entry, args) for entry in recipe.objectives])


def objective_of(entry: str, args: DistillationArguments) -> Objective:
    """`name` or `name:setting=value,...`; values are read as YAML. Raises ValueError for what no objective has."""
    name, _, given = entry.partition(":")
    pairs = [pair.partition("=") for pair in re.split(r",(?=\w+=)", given)] if given else []
    if any(not key or not equals for key, equals, _ in pairs):
        raise ValueError(f"--objectives {entry}: settings are name=value pairs, as kd:temperature=4,alpha=0.9")
    fields = {"objective": name, "objective_kwargs": {key: yaml.safe_load(value) for key, _, value in pairs}}
    before = {key: getattr(args, key) for key in fields}
    try:
        for key, value in fields.items():
            setattr(args, key, value)
        return args.make_objective(REFERENCE)
    finally:
        for key, value in before.items():
            setattr(args, key, value)


def run(recipe: RecipeArguments, args: DistillationArguments, study: Study) -> None:
    started = time.monotonic()
    study.runs.start()
    results = []
    for seed in range(recipe.seeds):
        study.teacher(seed)
        for entry in recipe.objectives:
            say(f"Seed {seed}: {entry}")
            objective = None if entry == REFERENCE else objective_of(entry, args)
            results.append({**study.student(folder_name(entry), seed, objective), "run": entry})
    if args.process_index == 0:
        report(study, recipe.objectives, results, (time.monotonic() - started) / 60)


def folder_name(entry: str) -> str:
    return re.sub(r"[^\w.=-]+", "-", entry)


def report(study: Study, entries: list[str], results: list[dict[str, Any]], minutes: float) -> None:
    output, metric = study.runs.output, study.data.metric
    teachers = list(study.teacher_results.values())
    text = table(entries, [*teachers, *results], metric)
    write_whole(output / "results.md", text + "\n")
    write_whole(output / "results.csv", per_seed_csv([*teachers, *results]))
    print(f"\n{text}\n\nTook {minutes:.1f} minutes. Tables: {output / 'results.md'}, {output / 'results.csv'}")
    rows = [{"objective": e, "metric": metric, "scores": scores(results, e, metric)} for e in entries]
    try:
        plots.objective_scores(rows, output / "scores.png")
        print(f"Figure: {output / 'scores.png'}")
    except (ImportError, ValueError) as error:  # matplotlib is an extra; a correlation may be below 0
        print(f"no figure: {error}")
    publish(study.runs, publication(study, entries, [*teachers, *results]))


def publication(study: Study, entries: list[str], results: list[dict[str, Any]]) -> Publication:
    """The objectives in the order of the command line; none is chosen by its score."""
    ordered = [entry for entry in entries if entry != REFERENCE] + [REFERENCE]
    shown = {"teacher": "teacher", **{entry: entry for entry in ordered}}
    return Publication(
        students={entry: study.runs.folder(folder_name(entry), 0) / "model" for entry in ordered},
        scores=scores_by(results, shown, study.data.metric),
        metric=study.data.metric,
        baseline=REFERENCE,
        teacher=("teacher", study.teachers[0][0]),
    )


def scores(results: list[dict[str, Any]], entry: str, name: str) -> list[float]:
    return [row[name] for row in results if row["run"] == entry and row.get(name) is not None]


def table(entries: list[str], results: list[dict[str, Any]], metric: str) -> str:
    """Markdown: score, paired difference to cross-entropy, agreement, calibration, cost."""
    lines = [
        f"| objective | {metric.replace('_', ' ')} (%) | paired difference to {REFERENCE} [95 %] | agreement with the "
        "teacher (%) | calibration error (%) | ms per step | peak memory (MiB) |",
        "|---|---|---|---|---|---|---|",
    ]
    reference = scores(results, REFERENCE, metric)
    for entry in ["teacher", *entries]:
        found = scores(results, entry, metric)
        cells = [percent(found), "–", percent(scores(results, entry, "agreement"))]
        cells.append(percent(scores(results, entry, "calibration_error")))
        if entry not in ("teacher", REFERENCE) and len(reference) > 1:
            mean, low, high = (100 * value for value in paired_difference(found, reference))
            cells[1] = f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"
        cells.append(number(scores(results, entry, "seconds_per_step"), 1000))
        cells.append(number(scores(results, entry, "peak_mib"), 1))
        lines.append("| " + " | ".join([entry, *cells]) + " |")
    return "\n".join(lines)


def number(values: list[float], scale: float) -> str:
    return f"{scale * mean_and_std(values)[0]:,.0f}" if values else "–"


if __name__ == "__main__":
    with one_sentence():
        prepared = prepare(sys.argv[1:])
    run(*prepared)
