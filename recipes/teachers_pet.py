"""Teacher's pet: who pays for the average of a distilled student (Lukasik et al. 2022, arXiv 2106.10494), and two remedies.

    accelerate launch recipes/teachers_pet.py                     # embedded long-tailed digits, no network, 8 minutes or less
    accelerate launch recipes/teachers_pet.py --profile study     # 5 seeds, 5 temperatures, 40 minutes on one core
    accelerate launch recipes/teachers_pet.py --methods kd ada_margin ada_margin:variant=ldam ada_margin:variant=gamma_additive
    accelerate launch recipes/teachers_pet.py --config recipes/configs/teachers_pet_cifar100_lt.yaml    # a paper's setting

Of the training images a dev split is held out. A teacher is trained on the rest by labels, then students on the same rows
and budget: by labels alone (one_hot), by the teacher's answers (kd), with less trust in it (ada_alpha) or larger margins
(ada_margin) for the classes on which it is unreliable on the dev split, and two baselines: balanced_student (distillation
with logits adjusted to the classes' frequencies) and group_dro (labels alone, weighted to the worst class). The temperature is on
the teacher's side only; for each method the one with the best mean per-class recall on the dev split is taken. The test
split is balanced, is touched by none of this, and is reported on.

The objectives are reconstructions, not verified (see their files). The paper reports no seeds; here each has a teacher of
its own. The tail and the dev split are the same for all seeds, and saved in `indices.json`.
Every run is saved when it is done; `--resume_from_checkpoint True` goes on where a study was stopped, and trains only what
is missing. `--max_steps` bounds every stage.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hfkd import DistillationArguments
from hfkd.diagnostics import plots
from hfkd.diagnostics.metrics import per_class_recall, worst_k
from hfkd.functional import class_reliability
from hfkd.trainers.arguments import parse_arguments
from pet_report import difference, interval
from pet_study import CHOSEN_BY, ONE_HOT, PetArguments, PetStudy, chosen_temperature, run_name
from program import HERE, one_sentence, one_source, quiet, say
from publication import Publication, publish
from run_report import per_seed_csv, write_whole

OWN_DATA = ("--task", "--dataset_name", "--data_dir", "--train_list", "--config")
KD, TEACHER = "kd", "teacher"


@dataclass
class RecipeArguments(PetArguments):
    """Data, tail, networks and methods. `--profile` sets the defaults of a short or long run."""

    profile: str = field(
        default="",
        metadata={"help": "demo | study | task; by default task where data or --config are given, else demo."},
    )


def main(arguments: list[str]) -> None:
    run(*prepare(arguments))


def prepare(arguments: list[str]) -> tuple[RecipeArguments, DistillationArguments, PetStudy]:
    """Whatever is wrong with the inputs is said here."""
    quiet()
    own_data = any(word.split("=")[0] in OWN_DATA for word in arguments)
    only_profile = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    only_profile.add_argument("--profile", default="task" if own_data else "demo")
    profile = only_profile.parse_known_args(arguments)[0].profile
    if profile not in ("demo", "study", "task"):
        raise ValueError(f"--profile {profile}: choose demo, study or task, or give your own values with --config")
    defaults = HERE / "configs" / f"teachers_pet_{profile}.yaml"
    recipe, args = parse_arguments(RecipeArguments, DistillationArguments, arguments=arguments, defaults=defaults)
    if recipe.profile not in ("", profile):
        raise ValueError(
            f"profile: {recipe.profile} stands in a YAML file; give it as a flag, because it names a file itself"
        )
    recipe.profile = profile
    one_source(recipe, arguments)
    recipe.methods = list(dict.fromkeys([ONE_HOT, *recipe.methods]))
    return recipe, args, PetStudy(recipe, args)


def run(recipe: RecipeArguments, args: DistillationArguments, study: PetStudy) -> None:
    started = time.monotonic()
    study.start()
    results = []
    for seed in range(recipe.seeds):
        results.append({**study.teacher(seed), "method": TEACHER, "temperature": None})
        for method in recipe.methods:
            for temperature in study.temperatures(method):
                say(f"Seed {seed}: {run_name(method, temperature)}")
                results.append(study.student(method, temperature, seed))
    if args.process_index == 0:
        report(recipe, study, results, (time.monotonic() - started) / 60)


# ---- report ----


def report(recipe: RecipeArguments, study: PetStudy, results: list[dict[str, Any]], minutes: float) -> None:
    output = study.runs.output
    rows = scored(recipe, study, results)
    text = f"{table(rows, recipe.methods, recipe.worst_k)}\n\n{dev_table(rows, recipe)}"
    write_whole(output / "results.md", text + "\n")
    write_whole(
        output / "results.csv", per_seed_csv([{n: v for n, v in row.items() if n != "recalls"} for row in rows])
    )
    reliability = reliabilities(study, recipe.seeds)
    counts = np.bincount(study.train_labels, minlength=len(study.data.labels)).tolist()
    write_whole(output / "classes.csv", per_seed_csv(by_class(study, rows, counts, reliability)))
    test = f"{len(study.test_labels):,} test images, dev split of {len(study.dev_labels):,}"
    print(f"\n{text}\n\nScored on {test}. Took {minutes:.1f} minutes ({recipe.profile}).")
    if recipe.seeds == 1:
        print("One seed: there are no intervals; 3 or more say how much a difference means.")
    print(f"Tables: {output / 'results.md'}, {output / 'results.csv'}, {output / 'classes.csv'}")
    draw(rows, recipe.methods, counts, reliability, output / "class_changes.png")
    publish(study.runs, publication(study, recipe.methods, [row for row in rows if row["chosen"]]))


def publication(study: PetStudy, methods: list[str], rows: list[dict[str, Any]]) -> Publication:
    """Every method at the temperature that the dev split chose; the first one that asks a teacher leads."""
    ordered = sorted(methods, key=lambda method: {ONE_HOT: 2, KD: 1}.get(method, 0))
    chosen = {row["method"]: row["temperature"] for row in rows}
    folders = {m: study.runs.folder(run_name(m, chosen[m]), 0) / "model" for m in ordered}
    scores = {m: [row["average"] for row in rows if row["method"] == m] for m in (*ordered, TEACHER)}
    baseline = KD if KD in methods else ONE_HOT
    return Publication(folders, scores, "mean_per_class_recall", baseline, (TEACHER, study.teachers[0][0]))


def scored(recipe: RecipeArguments, study: PetStudy, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs' rows with average and worst-k of the test split, and whether the run's temperature is the chosen one."""
    chosen = {m: chosen_temperature([r for r in results if r["method"] == m]) for m in (TEACHER, *recipe.methods)}
    rows = []
    for result in results:
        logits = study.runs.answers(result["run"], result["seed"])[""]
        recalls = per_class_recall(logits.argmax(-1), study.test_labels.numpy(), len(study.data.labels))
        own = {name: result[name] for name in ("method", "temperature", "run", "seed")}
        own["chosen"] = result["temperature"] == chosen[result["method"]]
        scores = {"average": float(recalls.mean()), "worst_1": worst_k(recalls)}
        scores |= {f"worst_{recipe.worst_k}": worst_k(recalls, recipe.worst_k), "recalls": recalls}
        renamed = {"mean_per_class_recall", "worst_class_accuracy"}  # average and worst_1 have them
        rows.append({**own, **scores, **{n: v for n, v in result.items() if n not in own and n not in renamed}})
    return rows


def reliabilities(study: PetStudy, seeds: int) -> list[float]:
    """Mean over the seeds' teachers of gamma on the dev split, (classes,)."""
    found = [class_reliability(study.dev_answers(seed).double(), study.dev_labels).numpy() for seed in range(seeds)]
    return np.mean(found, axis=0).tolist()


def by_class(study: PetStudy, rows: list[dict[str, Any]], counts: list[int], reliability: list[float]) -> list[Any]:
    """One row for each chosen run and class."""
    return [
        {
            **{name: row[name] for name in ("method", "temperature", "seed")},
            "class": name,
            "train_images": counts[label],
            "teacher_reliability": reliability[label],
            "recall": float(row["recalls"][label]),
        }
        for row in rows
        if row["chosen"]
        for label, name in enumerate(study.data.labels)
    ]


def values(rows: list[dict[str, Any]], method: str, name: str) -> list[Any]:
    """One a seed, of the runs at the chosen temperature."""
    return [row[name] for row in rows if row["method"] == method and row["chosen"]]


def table(rows: list[dict[str, Any]], methods: list[str], k: int) -> str:
    """Markdown: mean over seeds and 95 % interval; differences are paired by seed, in percentage points."""
    names = list(dict.fromkeys(("average", "worst_1", f"worst_{k}")))
    compared = [reference for reference in (ONE_HOT, KD) if reference in methods]
    heads = ["", "T", *(f"{name.replace('_', '-')} (%)" for name in names)]
    heads += [f"{name.replace('_', '-')} - {reference}" for reference in compared for name in (names[0], names[-1])]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for method in (TEACHER, *methods):
        temperature = values(rows, method, "temperature")[0]
        cells = [method, "–" if temperature is None else f"{temperature:g}"]
        cells += [interval(values(rows, method, name)) for name in names]
        for reference in compared:
            for name in (names[0], names[-1]):
                pair = values(rows, method, name), values(rows, reference, name)
                cells.append("–" if method in (TEACHER, reference) else difference(*pair))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def dev_table(rows: list[dict[str, Any]], recipe: RecipeArguments) -> str:
    """What the temperatures were chosen by: a mean over seeds for each."""
    heads = ["mean per-class recall on the dev split (%)", *(f"T = {t:g}" for t in recipe.temperatures)]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for method in recipe.methods:
        tried: dict[float | None, list[float]] = {}
        for row in rows:
            if row["method"] == method:
                tried.setdefault(row["temperature"], []).append(row[CHOSEN_BY])
        cells = [f"{100 * np.mean(tried[t]):.2f}" if t in tried else "–" for t in recipe.temperatures]
        if None in tried:
            cells[0] = f"{100 * np.mean(tried[None]):.2f} (without a temperature)"
        lines.append("| " + " | ".join([method, *cells]) + " |")
    return "\n".join(lines)


def draw(
    rows: list[dict[str, Any]], methods: list[str], counts: list[int], reliability: list[float], path: Path
) -> None:
    reference = values(rows, ONE_HOT, "recalls")
    changes = {
        method: [(own - other).tolist() for own, other in zip(values(rows, method, "recalls"), reference, strict=True)]
        for method in methods
        if method != ONE_HOT
    }
    try:
        plots.class_changes(changes, counts, reliability, path)
        print(f"Figure: {path}")
    except (ImportError, ValueError) as error:  # matplotlib is an extra; one_hot alone changes nothing
        print(f"no figure: {error}")


if __name__ == "__main__":
    with one_sentence():
        prepared = prepare(sys.argv[1:])
    run(*prepared)
