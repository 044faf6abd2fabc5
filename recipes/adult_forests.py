"""Who pays for the average, without a neural network: random forests on UCI Adult, people by label, sex and race.

    python recipes/adult_forests.py                    # embedded data, no network, 1 minute on one core
    python recipes/adult_forests.py --in_bag           # what a teacher teaches about people it was trained on

A large forest is the teacher, a small one of shallow trees the student: a regressor, fitted to (1 - alpha) y + alpha p(x)
with p the teacher's probability of the label 1. The one-hot student is the same with alpha 0: same rows, same bootstrap
draws, so that the two differ by their targets alone. All are scored on the 16,281 people of the test file, by the cells
label x sex x race. Settings are not chosen on them: the teacher's leaf size is the best of 1, 2, 5 and 10 by its
out-of-bag accuracy, the others were set beforehand.

The teacher's probabilities for its own training rows are out-of-bag: each is the vote of the trees that have not seen the
row. A grown tree has its training rows by heart, so that in-bag probabilities are close to the labels, whatever the
teacher knows, and distilling them is little else than training on labels; --in_bag does it.

Reconstruction, not verified: that Teacher's pet (Lukasik et al. 2022, arXiv 2106.10494) has a study of UCI Adult with
random forests is known; its subgroups, forests and numbers are not. Intervals run over seeds, which redraw the forests:
they do not cover that other people might have been asked, which for cells of a few dozen is the larger part.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hfkd.data import embedded
from hfkd.diagnostics import plots
from hfkd.diagnostics.metrics import accuracy, subgroup_accuracy, worst_k
from hfkd.trainers.arguments import parse_arguments
from pet_report import difference, interval
from program import at_random, one_sentence, say
from run_report import per_seed_csv, write_whole

NUMBERS = (
    "age",
    "education_num",
    "capital_gain",
    "capital_loss",
    "hours_per_week",
)  # not fnlwgt, a weight of the census
WORDS = (
    *("workclass", "education", "marital_status", "occupation", "relationship"),
    *("race", "sex", "native_country"),
)
CELL = ("label", "sex", "race")
TEACHER, ONE_HOT, DISTILLED = "teacher", "one-hot student", "distilled student"
MODELS = (TEACHER, ONE_HOT, DISTILLED)


@dataclass
class RecipeArguments:
    """Two forests, and how one teaches the other."""

    output_dir: str = field(default="runs/adult_forests", metadata={"help": "Where table, csv and figure go."})
    seeds: int = field(default=5, metadata={"help": "Teachers and students; a seed fixes what the forests draw."})
    alpha: float = field(
        default=1.0, metadata={"help": "Weight of the teacher's probability; the label gets the rest."}
    )
    in_bag: bool = field(
        default=False, metadata={"help": "Ask all trees about a training row, also those that saw it."}
    )
    teacher_trees: int = field(default=200, metadata={"help": "Trees of the teacher."})
    teacher_leaf: int = field(default=2, metadata={"help": "Training rows in a leaf of the teacher, at least."})
    student_trees: int = field(default=10, metadata={"help": "Trees of the student."})
    student_depth: int = field(default=6, metadata={"help": "Depth of the student's trees."})
    worst: int = field(default=3, metadata={"help": "How many of a model's worst cells are averaged."})
    fewest: int = field(default=30, metadata={"help": "People a cell needs in the test file to be among the worst."})
    train_rows: int | None = field(default=None, metadata={"help": "Train on this many people, drawn once."})


@dataclass
class People:
    """features (people, columns) float32; labels (people,); cells, one (label, sex, race) a person."""

    features: Any
    labels: Any
    cells: list[tuple[str, ...]]


def main(arguments: list[str]) -> None:
    run(*prepare(arguments))


def prepare(arguments: list[str]) -> tuple[RecipeArguments, dict[str, People]]:
    """Whatever is wrong with the inputs is said here."""
    (recipe,) = parse_arguments(RecipeArguments, arguments=arguments)
    for name in ("seeds", "teacher_trees", "teacher_leaf", "student_trees", "student_depth", "worst", "fewest"):
        if getattr(recipe, name) < 1:
            raise ValueError(f"--{name} must be 1 or more, got {getattr(recipe, name)}")
    if not 0 <= recipe.alpha <= 1:
        raise ValueError(f"alpha is the weight of the teacher's probability and must lie in [0, 1], got {recipe.alpha}")
    people = load_people(recipe.train_rows)
    large = [cell for cell, count in Counter(people["test"].cells).items() if count >= recipe.fewest]
    if len(large) < recipe.worst:
        raise ValueError(
            f"--worst {recipe.worst} cells are asked for, and {len(large)} have {recipe.fewest} people or more in the test "
            "file: lower --worst or --fewest"
        )
    return recipe, people


def load_people(train_rows: int | None = None) -> dict[str, People]:
    """Both files of UCI Adult; words become columns of 0 and 1, an unknown word is one of its own."""
    from sklearn.preprocessing import OneHotEncoder

    splits = embedded.adult()
    splits = {"train": at_random(splits["train"], train_rows), "test": splits["test"]}
    encoder = OneHotEncoder(handle_unknown="ignore", sparse_output=False, dtype=np.float32).fit(words(splits["train"]))
    return {
        name: People(
            np.hstack([np.array([rows[c][:] for c in NUMBERS], dtype=np.float32).T, encoder.transform(words(rows))]),
            np.array(rows["label"][:]),
            list(
                zip([embedded.INCOME_LABELS[i] for i in rows["label"][:]], rows["sex"][:], rows["race"][:], strict=True)
            ),
        )
        for name, rows in splits.items()
    }


def words(rows: Any) -> Any:
    """(people, words)."""
    return np.array([[word or "unknown" for word in rows[column][:]] for column in WORDS], dtype=object).T


# ---- forests ----


def train_teacher(recipe: RecipeArguments, people: People, seed: int) -> tuple[Any, Any]:
    """The forest, and its probability of the label 1 for each training row, (people,)."""
    from sklearn.ensemble import RandomForestClassifier

    forest = RandomForestClassifier(
        recipe.teacher_trees, min_samples_leaf=recipe.teacher_leaf, bootstrap=True, random_state=seed
    ).fit(people.features, people.labels)
    if recipe.in_bag:
        return forest, forest.predict_proba(people.features)[:, 1]
    return forest, out_of_bag(forest, people.features)


def out_of_bag(forest: Any, features: Any) -> Any:
    """Mean over the trees that have not seen the row. ValueError where every tree has seen it."""
    total, votes = np.zeros(len(features)), np.zeros(len(features))
    for tree, seen in zip(forest.estimators_, forest.estimators_samples_, strict=True):
        unseen = np.ones(len(features), dtype=bool)
        unseen[seen] = False
        total[unseen] += tree.predict_proba(features[unseen])[:, 1]
        votes[unseen] += 1
    if not votes.all():
        raise ValueError(
            f"{int((votes == 0).sum())} of {len(features)} training rows were seen by each of {len(votes)} trees and have no "
            "out-of-bag probability: give --teacher_trees 50 or more, or --in_bag"
        )
    return total / votes


def train_student(recipe: RecipeArguments, people: People, targets: Any, seed: int) -> Any:
    from sklearn.ensemble import RandomForestRegressor

    forest = RandomForestRegressor(recipe.student_trees, max_depth=recipe.student_depth, random_state=seed)
    return forest.fit(people.features, targets)


def predictions_of_seed(
    recipe: RecipeArguments, people: dict[str, People], seed: int
) -> tuple[dict[str, Any], dict[tuple[str, ...], float]]:
    """Each model's class ids on the test people, and the teacher's reliability on the training people of each cell."""
    train, test = people["train"], people["test"]
    teacher, probability = train_teacher(recipe, train, seed)
    one_hot = train_student(recipe, train, train.labels, seed)
    targets = (1 - recipe.alpha) * train.labels + recipe.alpha * probability
    distilled = train_student(recipe, train, targets, seed)
    found = {
        TEACHER: teacher.predict_proba(test.features)[:, 1],
        ONE_HOT: one_hot.predict(test.features),
        DISTILLED: distilled.predict(test.features),
    }
    return {model: (p > 0.5).astype(int) for model, p in found.items()}, reliability(train, probability)


def reliability(people: People, probability: Any) -> dict[tuple[str, ...], float]:
    """Mean over each cell's people of gamma = p_y - p_(not y), `functional.class_reliability` for two classes."""
    gamma = np.where(people.labels == 1, 2 * probability - 1, 1 - 2 * probability)
    values: dict[tuple[str, ...], list[float]] = {}
    for cell, value in zip(people.cells, gamma.tolist(), strict=True):
        values.setdefault(cell, []).append(value)
    return {cell: float(np.mean(found)) for cell, found in values.items()}


# ---- scores ----


def scores_of_seed(recipe: RecipeArguments, people: dict[str, People], seed: int) -> list[dict[str, Any]]:
    """One row for each model and cell, and one of cell "all" with the averages."""
    test, (found, gamma) = people["test"], predictions_of_seed(recipe, people, seed)
    counts = {name: Counter(split.cells) for name, split in people.items()}
    rows: list[dict[str, Any]] = []
    for model, predictions in found.items():
        cells = subgroup_accuracy(predictions, test.labels, test.cells)
        large = [value for cell, value in cells.items() if counts["test"][cell] >= recipe.fewest]
        whole = {"accuracy": accuracy(predictions, test.labels), "mean_of_cells": float(np.mean(list(cells.values())))}
        worst = {"worst_1": worst_k(large), f"worst_{recipe.worst}": worst_k(large, recipe.worst)}
        rows.append({"model": model, "seed": seed, "label": "all", "sex": "all", "race": "all", **whole, **worst})
        for cell, value in cells.items():
            row = {"model": model, "seed": seed, **dict(zip(CELL, cell, strict=True)), "accuracy": value}
            people_of_cell = {f"{name}_people": counts[name][cell] for name in ("train", "test")}
            rows.append({**row, **people_of_cell, "teacher_reliability": gamma.get(cell, float("nan"))})
    return rows


def run(recipe: RecipeArguments, people: dict[str, People]) -> None:
    started = time.monotonic()
    rows = []
    for seed in range(recipe.seeds):
        say(f"Seed {seed}: a teacher of {recipe.teacher_trees} trees, students of {recipe.student_trees}")
        rows += scores_of_seed(recipe, people, seed)
    report(recipe, rows, (time.monotonic() - started) / 60)


# ---- report ----


def report(recipe: RecipeArguments, rows: list[dict[str, Any]], minutes: float) -> None:
    output = Path(recipe.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    text = f"{averages(recipe, rows)}\n\n{cell_table(rows)}"
    write_whole(output / "results.md", text + "\n")
    write_whole(output / "results.csv", per_seed_csv(rows))
    print(f"\n{text}\n\nTook {minutes:.1f} minutes. Tables: {output / 'results.md'}, {output / 'results.csv'}")
    try:
        draw(recipe, rows, output / "changes.png")
        print(f"Figure: {output / 'changes.png'}")
    except ImportError as error:  # matplotlib is an extra
        print(f"no figure: {error}")


def values(rows: list[dict[str, Any]], model: str, cell: Sequence[str], name: str = "accuracy") -> list[float]:
    """One a seed."""
    return [row[name] for row in rows if row["model"] == model and tuple(row[c] for c in CELL) == tuple(cell)]


def averages(recipe: RecipeArguments, rows: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(("accuracy", "mean_of_cells", "worst_1", f"worst_{recipe.worst}")))
    heads = ["accuracy", "mean of the cells", "worst cell", f"worst {recipe.worst} cells"][: len(names)]
    lines = ["| | " + " | ".join(f"{head} (%)" for head in heads) + " |", "|---|" + "---|" * len(names)]
    every = ("all",) * len(CELL)
    for model in MODELS:
        cells = [interval(values(rows, model, every, name)) for name in names]
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    cells = [difference(*(values(rows, model, every, name) for model in (DISTILLED, ONE_HOT))) for name in names]
    return "\n".join([*lines, "| distilled - one-hot, paired by seed | " + " | ".join(cells) + " |"])


def cell_table(rows: list[dict[str, Any]]) -> str:
    heads = (
        "label",
        "sex",
        "race",
        "people in training / test",
        "teacher's reliability",
        *(f"{m} (%)" for m in MODELS),
    )
    lines = ["| " + " | ".join((*heads, "distilled - one-hot [95 %]")) + " |", "|---|" + "---|" * len(heads)]
    for cell in cells_of(rows):
        first = next(row for row in rows if tuple(row[c] for c in CELL) == cell)
        people = f"{first['train_people']:,} / {first['test_people']:,}"
        shown = [people, f"{np.mean(values(rows, TEACHER, cell, 'teacher_reliability')):+.2f}"]
        shown += [interval(values(rows, model, cell)) for model in MODELS]
        shown.append(difference(values(rows, DISTILLED, cell), values(rows, ONE_HOT, cell)))
        lines.append("| " + " | ".join((*cell, *shown)) + " |")
    return "\n".join(lines)


def cells_of(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    cells = dict.fromkeys(tuple(row[c] for c in CELL) for row in rows)
    return sorted(cell for cell in cells if cell[0] != "all")


def draw(recipe: RecipeArguments, rows: list[dict[str, Any]], path: Path) -> None:
    """The cells that can be the worst: in smaller ones a handful of people moves the change by tens of points."""
    first = {tuple(row[c] for c in CELL): row for row in rows if row["model"] == TEACHER}
    large = [cell for cell in cells_of(rows) if first[cell]["test_people"] >= recipe.fewest]
    cells = [cell for cell in large if first[cell]["train_people"]]
    seeds = len(values(rows, TEACHER, cells[0]))
    pairs = {cell: [values(rows, model, cell) for model in (DISTILLED, ONE_HOT)] for cell in cells}
    changes = [[pairs[cell][0][seed] - pairs[cell][1][seed] for cell in cells] for seed in range(seeds)]
    trusted = [float(np.mean(values(rows, TEACHER, cell, "teacher_reliability"))) for cell in cells]
    plots.class_changes({DISTILLED: changes}, [first[cell]["train_people"] for cell in cells], trusted, path)


if __name__ == "__main__":
    with one_sentence():
        prepared = prepare(sys.argv[1:])
    run(*prepared)
