"""Bad models can be good role models: students of teachers that have learned wrong labels by heart (arXiv 2203.14649).

    accelerate launch recipes/role_models.py                     # embedded digits, no network, 10 minutes or less
    accelerate launch recipes/role_models.py --profile study     # 10 teachers, 4 noise rates, 3 seeds, 60 minutes on one core
    accelerate launch recipes/role_models.py --config recipes/configs/role_models_movies.yaml        # texts, no network
    accelerate launch recipes/role_models.py --config recipes/configs/role_models_cifar10_code.yaml  # the released code's
    accelerate launch recipes/role_models.py --task my_task --teacher_config resnet18 --student_config resnet18 --pool FOLDER

Of every class 20 % of the training labels are made wrong. Teachers that fit them perfectly pass the noise on to new examples:
they are samplers, and bad classifiers. An unlabelled pool is labelled by them: EPL students learn the ensemble's label, RPL
students in every epoch that of one teacher drawn for each example (k teachers; of one teacher both are one student). Beside
them stand the teachers alone, their ensemble at test time, and two controls: a model trained on the clean labels, and a
student of the pool's own labels, the ceiling. Everything is scored on clean test labels, which no model was chosen by.

Teachers must have 99 % of their noisy training labels right, or the run stops: they are no samplers then. A --max_steps that
ends their training early is a trial, which says so and goes on. A pool that shares a row with the test data is refused.
Where nothing is augmented a teacher answers the pool once; else every student asks the models about the crops it sees.
Every model is saved when it is done; `--resume_from_checkpoint True` goes on where a study was stopped, also with more
--teachers, --other_rates or --seeds. Choose settings with `--evaluate_on validation`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from hfkd import DistillationArguments
from hfkd.diagnostics import plots
from hfkd.diagnostics.metrics import accuracy
from hfkd.diagnostics.sampler import SamplerReport, sampler_report
from hfkd.records import write_json
from hfkd.trainers.arguments import parse_arguments
from pet_report import difference, interval
from program import HERE, one_sentence, one_source, quiet, say
from publication import Publication, publish, refuse_push_teacher
from role_data import ImageRoleArguments, TextRoleArguments
from role_study import EPL, OWN_LABELS, RPL, SINGLE, NotSamplers, RoleStudy
from run_report import per_seed_csv, write_whole
from train_ensemble import about_texts

OWN_DATA = ("--task", "--dataset_name", "--data_dir", "--train_file", "--config")
PROFILES = ("demo", "study", "task")
CLEAN, TEACHER, ENSEMBLE = "clean_labels", "teacher", "ensemble"
SHOWN = {
    CLEAN: "a model of the clean labels",
    TEACHER: "single teacher",
    ENSEMBLE: "test-time ensemble",
    SINGLE: "student of a single teacher",
    EPL: "EPL student",
    RPL: "RPL student",
    OWN_LABELS: "student of the pool's own labels",
}


def main(arguments: list[str]) -> None:
    run(prepare(arguments))


def prepare(arguments: list[str]) -> RoleStudy:
    """Whatever is wrong with the inputs is said here."""
    quiet()
    own_data = any(word.split("=")[0] in OWN_DATA for word in arguments)
    only_profile = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    only_profile.add_argument("--profile", default="task" if own_data else "demo")
    found, others = only_profile.parse_known_args(arguments)
    if found.profile not in PROFILES:
        raise ValueError(f"--profile {found.profile}: choose {', '.join(PROFILES)}, or give your values with --config")
    defaults = HERE / "configs" / f"role_models_{found.profile}.yaml"
    kind = TextRoleArguments if about_texts(others) else ImageRoleArguments
    recipe, args = parse_arguments(kind, DistillationArguments, arguments=others, defaults=defaults)
    one_source(recipe, others)
    refuse_push_teacher(args, "the students learn from many teachers, and none of them is the teacher of this study")
    return RoleStudy(recipe, args)


def run(study: RoleStudy) -> None:
    started = time.monotonic()
    study.runs.start()
    recipe, results = study.recipe, []
    for seed in range(recipe.seeds):
        results.append({**study.teacher(0.0, seed, 0), "method": CLEAN})
        results += with_teachers(study, recipe.noise_rate, seed, recipe.teachers)
        results += [row for row in [study.own_labels(seed)] if row]
        for rate in recipe.other_rates:
            results += with_teachers(study, rate, seed, [1, recipe.rate_teachers])
        if recipe.other_rates and recipe.rate_teachers not in recipe.teachers:
            results += with_teachers(study, recipe.noise_rate, seed, [recipe.rate_teachers])
    if study.args.process_index == 0:
        report(study, results, (time.monotonic() - started) / 60)


def with_teachers(study: RoleStudy, rate: float, seed: int, counts: list[int]) -> list[dict[str, Any]]:
    """The teachers, and for every number of them the ensemble and the students."""
    results = [study.teacher(rate, seed, number) for number in range(max(counts))]
    for k in sorted({1, *counts}):
        if k > 1:
            predictions = study.ensemble(rate, seed, k)
            score = accuracy(predictions, study.labels)
            results.append({"method": ENSEMBLE, "rate": rate, "k": k, "seed": seed, "accuracy": score})
        results += [study.student(method, rate, seed, k) for method in ((EPL, RPL) if k > 1 else (EPL,))]
    return results


# ---- report ----


def report(study: RoleStudy, results: list[dict[str, Any]], minutes: float) -> None:
    recipe, output = study.recipe, study.runs.output
    results = unique(results)
    samplers = reports(study, results)
    text = "\n\n".join(
        filter(None, [table(results, recipe, samplers), rates_table(results, recipe), verdicts(samplers)])
    )
    write_whole(output / "results.md", text + "\n")
    write_whole(output / "results.csv", per_seed_csv(results))
    write_json(
        output / "sampler.json", [{**dict(zip(KEY, key, strict=True)), **r.to_dict()} for key, r in samplers.items()]
    )
    rows = f"{len(study.rows[0]):,} rows a teacher ({recipe.rows}), a pool of {len(study.found.pool):,}"
    print(
        f"\n{text}\n\n{rows}, scored on {len(study.labels):,} test rows with clean labels. Took {minutes:.1f} minutes."
    )
    if study.is_trial:
        fitted = min(row["fitted"] for row in results if row["method"] == TEACHER)
        print(f"A trial: teachers have {100 * fitted:.1f} % of their noisy labels right and are no samplers.")
    print(f"  tables                 {output / 'results.md'}, {output / 'results.csv'}, {output / 'sampler.json'}")
    draw(lambda path: draw_scores(results, recipe, path), output / "scores.png")
    draw(lambda path: draw_confusions(study, samplers, path), output / "confusions.png")
    publish(study.runs, publication(study, results))


def publication(study: RoleStudy, results: list[dict[str, Any]]) -> Publication:
    """The students of the most teachers, beside those of one and of the pool's own labels."""
    rate, most = study.recipe.noise_rate, max(study.recipe.teachers)
    keys = [(RPL, most), (EPL, most)] if most > 1 else []
    keys += [(SINGLE, 1), (OWN_LABELS, 0)]
    names = {key: OWN_LABELS if key[0] == OWN_LABELS else f"{key[0]}-{rate:g}-k{key[1]}" for key in keys}
    folders = {SHOWN[key[0]]: study.runs.folder(name, 0) / "model" for key, name in names.items()}
    scores = {
        SHOWN[method]: values(results, method, 0.0 if method in (CLEAN, OWN_LABELS) else rate, k)
        for method, k in (*keys, (ENSEMBLE, most), (TEACHER, 1), (CLEAN, 1))
    }
    return Publication(folders, scores, "accuracy", SHOWN[SINGLE])


KEY = ("method", "rate", "k", "seed")


def unique(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Teachers that serve two sweeps are one row."""
    return list({(*(row[name] for name in KEY), row.get("member")): row for row in results}.values())


def values(results: list[dict[str, Any]], method: str, rate: float, k: int) -> list[float]:
    """One accuracy a seed; of single teachers the mean over all of that seed's, because none is selected."""
    if method == TEACHER:
        k = 1
    found: dict[int, list[float]] = {}
    for row in results:
        if (row["method"], row["rate"], row["k"]) == (method, rate, k):
            found.setdefault(row["seed"], []).append(row["accuracy"])
    return [float(np.mean(found[seed])) for seed in sorted(found)]


def lines_of(results: list[dict[str, Any]], rate: float) -> list[tuple[str, float, int]]:
    """(method, rate, k) of the first table, in the order of SHOWN."""
    there = dict.fromkeys((row["method"], row["rate"], row["k"]) for row in results)
    kept = [key for key in there if key[1] == rate or key[0] in (CLEAN, OWN_LABELS)]
    return sorted(kept, key=lambda key: (list(SHOWN).index(key[0]), key[2]))


def table(results: list[dict[str, Any]], recipe: Any, samplers: dict[Any, SamplerReport]) -> str:
    """Markdown: mean over seeds and 95 % interval; differences are paired by seed, in percentage points."""
    heads = ["", "teachers", "accuracy (%)", "- single teacher", "TV to the noise", "noise partner (%)"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    single = values(results, TEACHER, recipe.noise_rate, 1)
    for method, rate, k in lines_of(results, recipe.noise_rate):
        own = values(results, method, rate, k)
        found = [r for (name, at, number, _), r in samplers.items() if (name, at, number) == (method, rate, k)]
        cells = [SHOWN[method], str(k or "–"), interval(own)]
        cells.append("–" if method == TEACHER else difference(own, single))
        cells.append(f"{np.mean([r.total_variation for r in found]):.3f}" if found else "–")
        cells.append(f"{100 * np.mean([r.partner_mass for r in found]):.1f}" if found else "–")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def rates_table(results: list[dict[str, Any]], recipe: Any) -> str:
    """Accuracy at every noise rate, of as many teachers; empty where there is one rate."""
    if not recipe.other_rates:
        return ""
    rates, k = rates_of(recipe), recipe.rate_teachers
    heads = [f"accuracy (%), {k} teachers", *(f"noise {100 * rate:g} %" for rate in rates)]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for method in swept(k):
        cells = [interval(values(results, method, rate, 1 if method == SINGLE else k)) for rate in rates]
        lines.append("| " + " | ".join([SHOWN[method], *cells]) + " |")
    return "\n".join(lines)


def rates_of(recipe: Any) -> list[float]:
    return sorted({recipe.noise_rate, *recipe.other_rates})


def swept(k: int) -> tuple[str, ...]:
    return (TEACHER, ENSEMBLE, SINGLE, EPL, RPL) if k > 1 else (TEACHER, SINGLE)


# ---- are they samplers? ----


def reports(study: RoleStudy, results: list[dict[str, Any]]) -> dict[Any, SamplerReport]:
    """By (method, rate, k, seed): the first teacher, the ensembles and the students of every noise rate."""
    found, refused = {}, []
    for row in results:
        if not row["rate"] or row.get("member"):
            continue
        predictions = predictions_of(study, row)
        try:
            key = tuple(row[name] for name in KEY)
            found[key] = sampler_report(predictions, study.labels, study.transitions[row["rate"]], row.get("fitted"))
        except ValueError as error:  # a short run has learned too little
            refused.append(f"{row['method']}, seed {row['seed']}. {error}")
    if refused:
        say(f"{len(refused)} of {len(refused) + len(found)} models have no sampler report, the first is {refused[0]}")
    return found


def predictions_of(study: RoleStudy, row: dict[str, Any]) -> Any:
    """(test rows,) class ids."""
    if row["method"] == ENSEMBLE:
        return study.ensemble(row["rate"], row["seed"], row["k"])
    if row["method"] == TEACHER:
        return study.answers(row["rate"], row["seed"], 1)[0].argmax(-1)
    return study.runs.answers(row["run"], row["seed"])[""].argmax(-1)


def verdicts(samplers: dict[Any, SamplerReport]) -> str:
    """A sentence for the first teacher of every noise rate, and for the students of most teachers, all of seed 0."""
    shown = {}
    for (method, rate, k, seed), found in samplers.items():
        if seed == 0:
            shown[method, rate] = (
                f"* {SHOWN[method]}{f' of {k}' if k > 1 else ''}, noise {100 * rate:g} %: {found.verdict}"
            )
    return "\n".join(shown.values())


# ---- figures ----


def draw(figure: Callable[[Path], None], path: Path) -> None:
    try:
        figure(path)
        print(f"  figure                 {path}")
    except (ImportError, ValueError) as error:  # matplotlib is an extra; a trial may have nothing to draw
        print(f"  no {path.stem}: {error}")


def draw_scores(results: list[dict[str, Any]], recipe: Any, path: Path) -> None:
    """Accuracy against the number of teachers and against the noise rate, beside the two controls."""
    rate, k = recipe.noise_rate, recipe.rate_teachers
    counts = sorted({1, *recipe.teachers})
    panels = {
        "number of teachers": {SHOWN[m]: by_count(results, m, rate, counts) for m in (TEACHER, ENSEMBLE, EPL, RPL)}
    }
    if recipe.other_rates:
        panels[f"noise rate (%), {k} teachers"] = {
            SHOWN[m]: {100 * r: percent(values(results, m, r, 1 if m == SINGLE else k)) for r in rates_of(recipe)}
            for m in swept(k)
        }
    controls = {SHOWN[m]: percent(values(results, m, 0.0, n)) for m, n in ((CLEAN, 1), (OWN_LABELS, 0))}
    plots.score_sweeps(panels, {name: scores for name, scores in controls.items() if scores}, "test accuracy (%)", path)


def by_count(results: list[dict[str, Any]], method: str, rate: float, counts: list[int]) -> dict[float, list[float]]:
    """At 1 the line of a student starts from the student of a single teacher, an ensemble's from that teacher."""
    at_one = {EPL: SINGLE, RPL: SINGLE, ENSEMBLE: TEACHER}
    found = {k: values(results, at_one.get(method, method) if k == 1 else method, rate, k) for k in counts}
    return {float(k): percent(scores) for k, scores in found.items() if scores}


def percent(scores: list[float]) -> list[float]:
    return [100 * score for score in scores]


def draw_confusions(study: RoleStudy, samplers: dict[Any, SamplerReport], path: Path) -> None:
    """The paper's figure 1: a teacher, the ensemble and a student of most teachers, seed 0, beside what was injected."""
    recipe, most = study.recipe, max(study.recipe.teachers)
    keys = [(TEACHER, 1), (ENSEMBLE, most), (RPL if most > 1 else SINGLE, most)]
    found = {(m, k): samplers[m, recipe.noise_rate, k, 0] for m, k in keys if (m, recipe.noise_rate, k, 0) in samplers}
    if not found:
        raise ValueError("no sampler report")
    shown = {f"{SHOWN[method]}{f' of {k}' if k > 1 else ''}": one.confusion for (method, k), one in found.items()}
    plots.confusions({"an ideal sampler": next(iter(found.values())).expected, **shown}, path, study.data.labels)


if __name__ == "__main__":
    with one_sentence():
        prepared = prepare(sys.argv[1:])
    try:
        run(prepared)
    except NotSamplers as error:
        raise SystemExit(f"role_models.py: {error}") from error
