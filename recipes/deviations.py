"""Where students leave their teachers (Nagarajan et al. 2023, arXiv 2301.12923): slopes of logit-logit plots, and what they gain.

    accelerate launch recipes/deviations.py                       # embedded digits and sentences, 8 minutes or less
    accelerate launch recipes/deviations.py --profile study       # 3 seeds, more settings, 60 minutes or less on one core
    accelerate launch recipes/deviations.py --settings deviations_mnist.yaml deviations_mnist_noisy.yaml --temperature 8
    accelerate launch recipes/deviations.py --settings distill_text_mnli.yaml distill_text_imdb.yaml        # the paper's
    accelerate launch recipes/deviations.py --config recipes/configs/deviations_paper_images.yaml           # text: _text

A setting is a YAML file of distill_text.py or distill_image.py, with `noise_rate` where training labels are made wrong. In each,
for every seed: a teacher by labels, and three students. The one-hot student learns from labels alone; the distilled one (kd)
from the teacher, same start weights, rows, order and steps; the control is a one-hot student with a seed of its own.

Slopes of the distilled student against its teacher show how it deviates, those of the control how far any network of that kind
is from that teacher: a slope that the control has, too, is not distillation's work. Read `hfkd/diagnostics/logit_logit.py`
for what the paper says of slopes and what is reconstructed. Flags that this program does not have go to every setting.
Every run is saved when it is done; `--resume_from_checkpoint True` goes on where a study was stopped.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deviation_study import CONTROL, KD, ONE_HOT, TEACHER, Deviations
from hfkd.diagnostics import plots
from hfkd.diagnostics.logit_logit import LogitLogit, with_interval
from hfkd.diagnostics.metrics import paired_difference
from hfkd.records import write_json
from hfkd.trainers.arguments import parse_arguments
from pet_report import difference, interval
from program import HERE, one_sentence, quiet, say
from publication import Publication, publish
from run_report import per_seed_csv, write_whole

SPLITS = ("train", "test")
Found = dict[tuple[str, int], dict[tuple[str, str], LogitLogit]]  # by setting and seed; by student and split


@dataclass
class RecipeArguments:
    """What is run; flags of a setting (--max_steps, --overwrite, --temperature, ...) go to all of them."""

    settings: list[str] = field(
        default_factory=list, metadata={"help": "YAML files, here or in recipes/configs, one for each setting."}
    )
    seeds: int = field(default=1, metadata={"help": "Teachers with their students, in every setting."})
    output_dir: str = field(default="runs/deviations", metadata={"help": "A folder of each setting lies below it."})
    bootstrap: int = field(default=1000, metadata={"help": "Resamples for the intervals of a single slope."})
    profile: str = field(default="demo", metadata={"help": "demo | study: sets the defaults of a short or long run."})


def main(arguments: list[str]) -> None:
    run(*prepare(arguments))


def prepare(arguments: list[str]) -> tuple[RecipeArguments, list[Deviations]]:
    """Whatever is wrong with the inputs of any setting is said here."""
    quiet()
    recipe, flags = parse(arguments)
    output = Path(recipe.output_dir)
    settings = [Deviations(file, output, recipe.seeds, flags) for file in recipe.settings]
    names = [setting.name for setting in settings]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two settings are called {', '.join(twice)}, and share a folder: rename one file")
    return recipe, settings


def parse(arguments: list[str]) -> tuple[RecipeArguments, list[str]]:
    """This program's own arguments, and the flags for all settings."""
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--settings", nargs="+")
    for name in ("seeds", "output_dir", "bootstrap", "profile", "config"):
        own.add_argument(f"--{name}")
    given, flags = own.parse_known_args(arguments)
    words = ["--help"] if {"-h", "--help"} & set(flags) else []
    for name, value in vars(given).items():
        if value is not None:
            words += [f"--{name}", *(value if isinstance(value, list) else [value])]
    profile = given.profile or "demo"
    if profile not in ("demo", "study"):
        raise ValueError(f"--profile {profile}: choose demo or study, or give your own settings with --settings")
    (recipe,) = parse_arguments(
        RecipeArguments, arguments=words, defaults=HERE / "configs" / f"deviations_{profile}.yaml"
    )
    if recipe.seeds < 1 or recipe.bootstrap < 1 or not recipe.settings:
        raise ValueError(
            f"--settings needs one file or more, --seeds and --bootstrap 1 or more, got {recipe.settings}, {recipe.seeds}, "
            f"{recipe.bootstrap}"
        )
    return recipe, flags


def run(recipe: RecipeArguments, settings: list[Deviations]) -> None:
    started = time.monotonic()
    for setting in settings:
        setting.study.runs.start()
    for setting in settings:
        for seed in range(recipe.seeds):
            setting.train(seed)
    if settings[0].args.process_index == 0:
        report(recipe, settings, (time.monotonic() - started) / 60)


# ---- report ----


def report(recipe: RecipeArguments, settings: list[Deviations], minutes: float) -> None:
    say("Slopes and their intervals")
    output, seeds = Path(recipe.output_dir), range(recipe.seeds)
    rows = [row for setting in settings for seed in seeds for row in setting.rows(seed)]
    found = {(s.name, seed): s.deviations(seed, recipe.bootstrap) for s in settings for seed in seeds}
    for row in rows:
        row |= numbers(found[row["setting"], row["seed"]], row["run"])
    names = [setting.name for setting in settings]
    text = "\n\n".join(
        [accuracies(names, rows), slopes(names, found), confidences(names, found), verdict(names, found)]
    )
    write_whole(output / "results.md", text + "\n")
    write_whole(output / "results.csv", per_seed_csv(rows))
    write_json(output / "deviations.json", as_json(found))
    said = "95 % intervals over seeds" if recipe.seeds > 1 else "one seed: intervals over examples only, none for gains"
    print(f"\n{text}\n\n{said}. Took {minutes:.1f} minutes ({recipe.profile}).")
    print(f"Tables: {', '.join(str(output / name) for name in ('results.md', 'results.csv', 'deviations.json'))}")
    draw(names, found, output / "logit_logit.png")
    for setting in settings:
        publish(setting.study.runs, publication(setting, [row for row in rows if row["setting"] == setting.name]))


def publication(setting: Deviations, rows: list[dict[str, Any]]) -> Publication:
    runs = setting.study.runs
    names = (KD, ONE_HOT, TEACHER)
    return Publication(
        students={name: runs.folder(name, 0) / "model" for name in (KD, ONE_HOT)},
        scores={name: [row["test_accuracy"] for row in rows if row["run"] == name] for name in names},
        metric="accuracy",
        baseline=ONE_HOT,
        teacher=(TEACHER, setting.study.teachers[0][0]),
    )


def numbers(found: dict[tuple[str, str], LogitLogit], student: str) -> dict[str, float]:
    """A run's columns of results.csv."""
    columns = {}
    for split in SPLITS if student != TEACHER else ():
        line = found[student, split]
        columns |= {f"{split}_slope": line.slope, f"{split}_intercept": line.intercept}
        columns |= dict(zip((f"{split}_slope_low", f"{split}_slope_high"), line.slope_interval, strict=True))
        columns |= {f"{split}_lowest_bin": line.bins[0].mean_difference}
        columns |= {f"{split}_highest_bin": line.bins[-1].mean_difference}
    return columns


def table(heads: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (heads, ["---"] * len(heads), *rows))


def accuracies(names: list[str], rows: list[dict[str, Any]]) -> str:
    """Who learned what: does the teacher interpolate its training labels, and does its student gain by it?"""
    lines = []
    for name in names:

        def of(run: str, score: str, setting: str = name) -> list[float]:
            return [row[score] for row in rows if (row["setting"], row["run"]) == (setting, run)]

        test = {run: of(run, "test_accuracy") for run in (TEACHER, ONE_HOT, KD, CONTROL)}
        cells = [interval(of(TEACHER, "train_accuracy")), *(interval(values) for values in test.values())]
        lines.append([name, *cells, difference(test[KD], test[ONE_HOT]), interval(of(KD, "test_agreement"))])
    heads = ["accuracy (%)", "teacher, train", "teacher, test", "one-hot, test", "distilled, test", "control, test"]
    return table([*heads, "gain: distilled - one-hot", "agreement, test"], lines)


def slopes(names: list[str], found: Found) -> str:
    heads = ["slope", *(f"{who}, {split}" for who in ("distilled", "control") for split in SPLITS)]
    lines = []
    for name in names:
        lines.append(
            [name, *(one_slope(of_seeds(found, name), run, split) for run in (KD, CONTROL) for split in SPLITS)]
        )
        lines[-1] += [paired(found, name, split, lambda line: line.slope) for split in SPLITS]
    return table([*heads, *(f"distilled - control, {split}" for split in SPLITS)], lines)


def confidences(names: list[str], found: Found) -> str:
    """Mean Y - X of the distilled student where its teacher is least and most sure."""
    heads = [
        "mean Y - X of the distilled",
        *(f"{end} tenth of X, {split}" for split in SPLITS for end in ("lowest", "highest")),
    ]
    lines = []
    for name in names:
        cells = [
            over_seeds([seed[KD, split].bins[end].mean_difference for seed in of_seeds(found, name)])
            for split in SPLITS
            for end in (0, -1)
        ]
        lines.append([name, *cells])
    return table(heads, lines)


def of_seeds(found: Found, name: str) -> list[dict[tuple[str, str], LogitLogit]]:
    return [lines for (setting, _), lines in found.items() if setting == name]


def one_slope(seeds: list[dict[tuple[str, str], LogitLogit]], run: str, split: str) -> str:
    """Over seeds; of one seed with the interval over examples."""
    if len(seeds) == 1:
        return with_interval(seeds[0][run, split].slope, seeds[0][run, split].slope_interval)
    return over_seeds([seed[run, split].slope for seed in seeds])


def over_seeds(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.2f}"
    mean, low, high = paired_difference(values, [0.0] * len(values))
    return with_interval(mean, (low, high))


def paired(found: Found, name: str, split: str, number: Callable[[LogitLogit], float]) -> str:
    seeds = of_seeds(found, name)
    return over_seeds([number(seed[KD, split]) - number(seed[CONTROL, split]) for seed in seeds])


def verdict(names: list[str], found: Found) -> str:
    """The paper's count, over settings by the mean over seeds. Its criterion is not known; ours is the mean of Y - X."""
    words = []
    for split in SPLITS:
        under = sum(mean(found, name, lambda line: line.bins[0].mean_difference, split) < 0 for name in names)
        above = sum(mean(found, name, lambda line: line.slope, split) > 1 for name in names)
        words.append(
            f"on {split} rows low-confidence underfitting in {under} and slopes above 1 in {above} of {len(names)}"
        )
    paper = "underfitting in 18 of 18 image settings on test and 13 on train, slopes above 1 in 7 of 12 text settings on test"
    return f"Settings: {'; '.join(words)} (the paper: {paper})."


def mean(found: Found, name: str, number: Callable[[LogitLogit], float], split: str) -> float:
    return math.fsum(number(seed[KD, split]) for seed in of_seeds(found, name)) / len(of_seeds(found, name))


def as_json(found: Found) -> list[dict[str, Any]]:
    return [
        {"setting": name, "seed": seed, "student": student, "split": split, **line.to_dict()}
        for (name, seed), lines in found.items()
        for (student, split), line in lines.items()
    ]


def draw(names: list[str], found: Found, path: Path) -> None:
    """Of the first seed."""
    shown = {f"distilled, {split}": (KD, split) for split in SPLITS} | {"one-hot control, test": (CONTROL, "test")}
    grid = {name: {head: found[name, 0][key] for head, key in shown.items()} for name in names}
    try:
        plots.logit_logit_grid(grid, path)
        print(f"Figure: {path}")
    except ImportError as error:  # matplotlib is an extra
        print(f"no figure: {error}")


if __name__ == "__main__":
    with one_sentence():
        prepared = prepare(sys.argv[1:])
    run(*prepared)
