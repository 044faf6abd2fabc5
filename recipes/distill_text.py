"""Distil a text classifier: a teacher, its student trained on labels alone, and the student that learns from the teacher.

    accelerate launch recipes/distill_text.py                     # embedded movie sentences, no network, 8 minutes or less
    accelerate launch recipes/distill_text.py --profile study     # 5 seeds and 5 teachers, 39 minutes on one core
    accelerate launch recipes/distill_text.py --task sst2 --student google/bert_uncased_L-2_H-128_A-2 \
        --teacher runs/train_teacher/runs/teacher/seed-0/model    # made by train_teacher.py; or a Hub id
    accelerate launch recipes/distill_text.py --train_file train.csv --test_file test.csv \
        --teacher_start google-bert/bert-base-uncased --student_layers 3     # fine-tunes the teacher, too
    accelerate launch recipes/distill_text.py --config recipes/configs/distill_text_mnli.yaml        # a paper's setting

To expect from the first: test accuracy 83.1 for the teacher, 74.1 and 77.7 for the two students, 39 % of the gap closed,
calibration error 16 without and 3 with the teacher (10 minutes on one thread, 7.8 on two cores that were not always free).

Both students share rows, order, start weights, dropout, steps and every line of the trainer; only the objective differs. The
teacher answers every row once, beforehand (`--cache_teacher False` asks it in every step), unless the objective needs
more than logits. Every run is saved when it is done; `--resume_from_checkpoint True` goes on where a study was stopped.
Choose settings with `--evaluate_on validation`; `--max_steps` bounds every stage.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from hfkd import DistillationArguments
from hfkd.diagnostics.metrics import gap_closed, mean_and_std, paired_difference
from hfkd.objectives import CrossEntropy
from hfkd.trainers.arguments import parse_arguments
from program import HERE, one_sentence, one_source, quiet, say
from publication import Publication, publish, scores_by
from run_report import COSTS, per_seed_csv, percent, write_whole
from text_study import Study, StudyArguments

OWN_DATA = ("--task", "--dataset_name", "--train_file", "--config")
BASELINE, DISTILLED = "baseline", "distilled"
SHOWN = {"teacher": "teacher", BASELINE: "student, labels only", DISTILLED: "student, distilled"}


@dataclass
class RecipeArguments(StudyArguments):
    """Data, teacher and student. `--profile` sets the defaults of a short or long run."""

    profile: str = field(
        default="",
        metadata={"help": "demo | study | task; by default task where data or --config are given, else demo."},
    )


def main(arguments: list[str]) -> None:
    recipe, args, study = prepare(arguments)
    run(recipe, args, study)


def prepare(arguments: list[str]) -> tuple[RecipeArguments, DistillationArguments, Study]:
    """Whatever is wrong with the inputs is said here."""
    quiet()
    recipe, args = parse(arguments)
    if args.objective == "cross_entropy":
        raise ValueError("--objective cross_entropy asks no teacher; recipes/train_teacher.py trains a model that way")
    return recipe, args, Study(recipe, args, [CrossEntropy(), args.make_objective("kd")])


def run(recipe: RecipeArguments, args: DistillationArguments, study: Study) -> None:
    started = time.monotonic()
    study.runs.start()
    results = []
    for seed in range(recipe.seeds):
        study.teacher(seed)
        say(f"Seed {seed}: student, labels only")
        results.append(study.student(BASELINE, seed))
        say(f"Seed {seed}: student, distilled with {args.objective or 'kd'}")
        results.append(study.student(DISTILLED, seed, args.make_objective("kd")))
    results = [*study.teacher_results.values(), *results]
    if args.process_index == 0:
        report(recipe, study, results, (time.monotonic() - started) / 60)


def parse(arguments: list[str]) -> tuple[RecipeArguments, DistillationArguments]:
    own_data = any(word.split("=")[0] in OWN_DATA for word in arguments)
    only_profile = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    only_profile.add_argument("--profile", default="task" if own_data else "demo")
    profile = only_profile.parse_known_args(arguments)[0].profile
    path = HERE / "configs" / f"distill_text_{profile}.yaml"
    if profile not in ("demo", "study", "task"):
        raise ValueError(f"--profile {profile}: choose demo, study or task, or give your own values with --config")
    recipe, args = parse_arguments(RecipeArguments, DistillationArguments, arguments=arguments, defaults=path)
    if recipe.profile not in ("", profile):
        raise ValueError(
            f"profile: {recipe.profile} stands in a YAML file; give it as a flag, because it names a file itself"
        )
    recipe.profile = profile
    one_source(recipe, arguments)
    return recipe, args


# ---- report ----


def report(recipe: RecipeArguments, study: Study, results: list[dict[str, Any]], minutes: float) -> None:
    output, metric = study.runs.output, study.data.metric
    text = table(results, metric)
    write_whole(output / "results.md", text + "\n")
    write_whole(output / "results.csv", per_seed_csv(results))
    held_out = sum(len(rows) for rows in study.data.held_out.values())
    print(f"\n{text}\n\nScored on {held_out:,} held-out texts. Took {minutes:.1f} minutes ({recipe.profile}).")
    for name in ("teacher", BASELINE, DISTILLED):
        folder = study.runs.folder(name, 0) / "model"
        if folder.exists():
            print(f"  {SHOWN[name]:<22} {folder}")
    print(f"  tables                 {output / 'results.md'}, {output / 'results.csv'}")
    publish(study.runs, publication(study, results))


def publication(study: Study, results: list[dict[str, Any]]) -> Publication:
    return Publication(
        students={SHOWN[name]: study.runs.folder(name, 0) / "model" for name in (DISTILLED, BASELINE)},
        scores=scores_by(results, SHOWN, study.data.metric),
        metric=study.data.metric,
        baseline=SHOWN[BASELINE],
        teacher=(SHOWN["teacher"], study.teachers[0][0]),
    )


def table(results: list[dict[str, Any]], metric: str) -> str:
    """Markdown: every metric as mean ± std over seeds, then the paired difference and the gap closed in words."""
    cost = {"run", "seed", "agreement", "calibration_error", *COSTS}
    columns = [name for name in results[-1] if name not in cost]
    columns += [name for name in ("agreement", "calibration_error") if name in results[-1]]
    heads = {"agreement": "agreement with the teacher", "calibration_error": "calibration error (ECE)"}
    lines = ["| | " + " | ".join(f"{heads.get(name, name.replace('_', ' '))} (%)" for name in columns) + " |"]
    lines.append("|---|" + "---|" * len(columns))
    for run, shown in SHOWN.items():
        cells = [percent([row[name] for row in results if row["run"] == run and name in row]) for name in columns]
        lines.append(f"| {shown} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *comparison(results, metric)])


def comparison(results: list[dict[str, Any]], metric: str) -> list[str]:
    teacher, baseline, distilled = ([row[metric] for row in results if row["run"] == run] for run in SHOWN)
    means = [mean_and_std(values)[0] for values in (baseline, distilled, teacher)]
    closed = gap_closed(*means)
    share = "there is no gap: the teacher is not above the student" if math.isnan(closed) else f"{100 * closed:.0f} %"
    lines = [f"gap to the teacher closed ({metric.replace('_', ' ')}, of the means): {share}"]
    if len(baseline) > 1:
        mean, low, high = (100 * value for value in paired_difference(distilled, baseline))
        lines.append(f"distilled - labels only, paired by seed: {mean:+.2f} [95 %: {low:+.2f}, {high:+.2f}] points")
    return lines


if __name__ == "__main__":
    with one_sentence():
        prepared = prepare(sys.argv[1:])
    run(*prepared)
