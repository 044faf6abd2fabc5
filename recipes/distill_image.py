"""Distil an image classifier: a teacher, its student trained on labels alone, and the student that learns from the teacher.

    accelerate launch recipes/distill_image.py                    # embedded digits, no network, 5 minutes or less
    accelerate launch recipes/distill_image.py --profile study    # 5 seeds and 5 teachers, 25 minutes or less on one core
    accelerate launch recipes/distill_image.py --task cifar100 --teacher_config resnet56 --student_config resnet20
    accelerate launch recipes/distill_image.py --data_dir my_images --teacher_start google/vit-base-patch16-224-in21k \
        --student_layers 4                                        # fine-tunes the teacher, too; or --teacher FOLDER
    accelerate launch recipes/distill_image.py --config recipes/configs/distill_image_cifar100_kd.yaml  # a paper's setting

Both students share rows, order, start weights, augmentation, steps and every line of the trainer; only the objective differs.
Teacher and student see the same pixels, each in its own size and normalisation. Where nothing is augmented the teacher
answers every image once, beforehand; else it is asked in every step. `--objective deit_token` wants a student with a token
for the teacher (`architectures` in its configuration, as in recipes/configs/image_deit_tiny.yaml); without a teacher the
same network is trained on the mean of its two heads.

Every run is saved when it is done; `--resume_from_checkpoint True` goes on where a study was stopped. Choose settings with
`--evaluate_on validation`; `--max_steps` bounds every stage.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from hfkd import DistillationArguments
from hfkd.data.splits import save_indices
from hfkd.diagnostics import plots
from hfkd.diagnostics.metrics import gap_closed, mean_and_std, paired_difference
from hfkd.objectives import CrossEntropy
from hfkd.trainers.arguments import parse_arguments
from image_study import Study, StudyArguments
from program import HERE, one_sentence, one_source, quiet, say
from publication import Publication, publish, scores_by
from run_report import COSTS, per_seed_csv, percent, write_whole

OWN_DATA = ("--task", "--dataset_name", "--data_dir", "--config")
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
    objective = args.make_objective("kd")
    if "teacher" not in objective.needs and args.alpha != 0:  # alpha 0 is the check that both sides are the same
        raise ValueError(
            f"--objective {args.objective} asks no teacher: the student on labels alone is trained beside the distilled one "
            "anyway, and recipes/teachers_pet.py has the baselines for rare classes; choose kd, dkd, dist, ..."
        )
    return recipe, args, Study(recipe, args, [CrossEntropy(), objective])


def run(recipe: RecipeArguments, args: DistillationArguments, study: Study) -> None:
    started = time.monotonic()
    study.runs.start()
    if args.process_index == 0:
        save_indices(study.runs.output / "splits.json", **study.data.indices())
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
    if profile not in ("demo", "study", "task"):
        raise ValueError(f"--profile {profile}: choose demo, study or task, or give your own values with --config")
    path = HERE / "configs" / f"distill_image_{profile}.yaml"
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
    train, held_out = len(study.view.train), sum(len(rows) for rows in study.view.held_out.values())
    sizes = " and ".join(f"a {whose} of {count:,} parameters" for whose, count in study.parameters.items())
    print(f"\n{text}\n\nTrained on {train:,} and scored on {held_out:,} held-out images, {sizes}.")
    print(f"Took {minutes:.1f} minutes ({recipe.profile}).")
    for name in ("teacher", BASELINE, DISTILLED):
        folder = study.runs.folder(name, 0) / "model"
        if folder.exists():
            print(f"  {SHOWN[name]:<22} {folder}")
    print(f"  tables                 {output / 'results.md'}, {output / 'results.csv'}")
    try:
        plots.objective_scores(figure_rows(results, metric, study.args.objective or "kd"), output / "scores.png")
        print(f"  figure                 {output / 'scores.png'}")
    except ImportError as error:  # matplotlib is an extra
        print(f"  no figure: {error}")
    publish(study.runs, publication(study, results))


def figure_rows(results: list[dict[str, Any]], metric: str, objective: str) -> list[dict[str, Any]]:
    """The student on labels first: the others are compared with it."""
    names = {BASELINE: "labels only", DISTILLED: f"distilled with {objective}", "teacher": "teacher"}
    scores = {name: [row[metric] for row in results if row["run"] == name] for name in names}
    return [{"objective": names[name], "metric": metric, "scores": values} for name, values in scores.items()]


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
    columns = [*(name for name in results[-1] if name not in cost), "agreement", "calibration_error"]
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
