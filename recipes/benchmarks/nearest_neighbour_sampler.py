"""What the theory of *Bad Models Can Be Good Role Models* (arXiv 2203.14649) says, where everything is known: 1-NN on Gaussians.

    OMP_NUM_THREADS=1 python recipes/benchmarks/nearest_neighbour_sampler.py     # one core, no network, 1 minute

Points of the plane come from six Gaussians on a circle; 20 % of the labels of each class are those of the class opposite. The
Bayes-optimal classifier f* is the nearest mean, and the law D(y|x) of noisy labels has a closed form. Two tables:

    sampler    a 1-NN classifier of m noisy labels draws its answers from D(y|x): mean over x of the total variation between
               the law of its answer over `--draws` training sets and D(.|x), beside a floor, the same for ideal draws.
    students   k such teachers, each with its own m labels, name the classes of an unlabelled pool: all by vote (EPL), or one
               at random for each point (RPL). Columns are errors against f*, P[h(x) != f*(x)], of the vote itself; of
               students that ask 25 neighbours of the pool; of RPL students that interpolate (1 neighbour); and of 25
               neighbours among all k x m noisy labels, without teachers.

Mean and standard deviation over seeds. Beside the vote stands the error of independent teachers with one wrong answer each.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.neighbors import KNeighborsClassifier

from hfkd.data.label_noise import noisy_labels, transition_matrix
from hfkd.diagnostics import plots
from hfkd.diagnostics.metrics import mean_and_std
from hfkd.diagnostics.sampler import sampler_report

CLASSES = 6
Points = NDArray[np.float64]
Labels = NDArray[np.int64]


def main() -> None:
    arguments = parse()
    world = World(arguments.rate, arguments.spread)
    law = {
        size: over_seeds(arguments, lambda seed, m=size: sampling(world, m, arguments, seed))
        for size in arguments.sizes
    }
    show("m", law)
    found = {
        k: over_seeds(arguments, lambda seed, k=k: students(world, k, arguments, seed)) for k in arguments.teachers
    }
    show("k", found)
    print(f"\nOne teacher, seed 0: {report(world, arguments)}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"sampler": law, "students": found}, indent=2) + "\n")
    if arguments.figure:
        names = ("vote of k", "EPL student", "RPL student", "RPL student, interpolating")
        lines = {name: {k: [100 * error for error in found[k][name]] for k in found} for name in names}
        plots.curves(lines, "teachers", "disagreement with Bayes (%)", arguments.figure)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rate", type=float, default=0.2, help="share of wrong labels in each class")
    parser.add_argument(
        "--spread", type=float, default=0.3, help="standard deviation of a class; the circle's radius is 1"
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 500, 2500, 12500], help="labels m, first table")
    parser.add_argument("--draws", type=int, default=100, help="training sets of the first table")
    parser.add_argument("--teachers", type=int, nargs="+", default=[1, 3, 5, 10, 20], help="k, second table")
    parser.add_argument("--labels", type=int, default=500, help="labels m of each teacher, second table")
    parser.add_argument("--pool", type=int, default=40_000, help="unlabelled points")
    parser.add_argument("--neighbours", type=int, default=25, help="of the students that do not interpolate")
    parser.add_argument("--test", type=int, default=2000, help="test points")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the numbers of every seed to this file")
    parser.add_argument("--figure", type=Path, help="draw errors against k to this file")
    return parser.parse_args()


def over_seeds(arguments: argparse.Namespace, measure: Callable[[int], dict[str, float]]) -> dict[str, list[float]]:
    rows = [measure(seed) for seed in range(arguments.seeds)]
    return {name: [row[name] for row in rows] for name in rows[0]}


def show(key: str, found: dict[int, dict[str, list[float]]]) -> None:
    names = list(next(iter(found.values())))
    print(f"\n| {key} | {' | '.join(names)} |\n|---:|{'---:|' * len(names)}")
    for value, row in found.items():
        cells = [mean_and_std(row[name]) for name in names]
        print(f"| {value:,} | {' | '.join(f'{100 * mean:.1f} ± {100 * std:.1f} %' for mean, std, _ in cells)} |")


# ---- a world in which everything is known ----


@dataclass(frozen=True)
class World:
    """Equally likely isotropic Gaussians on the unit circle; `rate` of each class is labelled as the class opposite."""

    rate: float = 0.2
    spread: float = 0.3

    @property
    def transition(self) -> NDArray[np.float64]:
        return transition_matrix(CLASSES, self.rate, [(label + CLASSES // 2) % CLASSES for label in range(CLASSES)])

    @property
    def means(self) -> Points:
        angles = 2 * np.pi * np.arange(CLASSES) / CLASSES
        return np.stack([np.cos(angles), np.sin(angles)], axis=1)

    def draw(self, count: int, generator: np.random.Generator) -> tuple[Points, Labels]:
        """Points `(count, 2)` and the Gaussian each came from, which is its clean label `(count,)`."""
        labels = generator.integers(CLASSES, size=count)
        return self.means[labels] + self.spread * generator.normal(size=(count, 2)), labels

    def bayes(self, points: Points) -> Labels:
        """f*: the nearest mean. Below a rate of 0.5 the noise does not move it: it swaps classes that are far apart."""
        return self.posterior(points).argmax(1)

    def posterior(self, points: Points) -> NDArray[np.float64]:
        """P(clean label | x), `(count, CLASSES)`; times the transition it is D(noisy label | x)."""
        distances = ((points[:, None] - self.means) ** 2).sum(-1)
        weights = np.exp(-(distances - distances.min(1, keepdims=True)) / (2 * self.spread**2))
        return weights / weights.sum(1, keepdims=True)


def nearest(points: Points, labels: Labels, neighbours: int = 1) -> KNeighborsClassifier:
    return KNeighborsClassifier(min(neighbours, len(points))).fit(points, labels)


def noisy_sample(world: World, count: int, seed: list[int]) -> tuple[Points, Labels]:
    generator = np.random.default_rng(seed)
    points, labels = world.draw(count, generator)
    return points, noisy_labels(labels, world.transition, int(generator.integers(2**31)))


# ---- is 1-NN a sampler? ----


def sampling(world: World, size: int, arguments: argparse.Namespace, seed: int) -> dict[str, float]:
    points, _ = world.draw(arguments.test, np.random.default_rng([seed, 0]))
    law = world.posterior(points) @ world.transition
    answers = np.zeros_like(law)
    rows = np.arange(len(points))
    for draw in range(arguments.draws):
        answers[rows, nearest(*noisy_sample(world, size, [seed, 1, draw])).predict(points)] += 1
    ideal = np.random.default_rng([seed, 2]).multinomial(arguments.draws, law)
    distance, floor = (float(np.abs(n / arguments.draws - law).sum(1).mean() / 2) for n in (answers, ideal))
    return {"total variation of 1-NN to D(y given x)": distance, "floor (ideal draws)": floor}


# ---- and its students? ----


def students(world: World, k: int, arguments: argparse.Namespace, seed: int) -> dict[str, float]:
    generator = np.random.default_rng([seed, 3])
    pool, test = (world.draw(count, generator)[0] for count in (arguments.pool, arguments.test))
    samples = [noisy_sample(world, arguments.labels, [seed, 4, member]) for member in range(k)]
    teachers = [nearest(*sample) for sample in samples]
    named = np.stack([teacher.predict(pool) for teacher in teachers])
    random = named[generator.integers(k, size=len(pool)), np.arange(len(pool))]
    answers = {
        "vote of k": vote(np.stack([teacher.predict(test) for teacher in teachers])),
        "EPL student": nearest(pool, vote(named), arguments.neighbours).predict(test),
        "RPL student": nearest(pool, random, arguments.neighbours).predict(test),
        "RPL student, interpolating": nearest(pool, random).predict(test),
        "no teacher, k x m labels": nearest(
            *map(np.concatenate, zip(*samples, strict=True)), arguments.neighbours
        ).predict(test),
    }
    truth = world.bayes(test)
    errors = {name: float(np.mean(answer != truth)) for name, answer in answers.items()}
    return {"independent vote": 1 - majority(1 - world.rate, k), **errors}


def vote(named: Labels) -> Labels:
    """The class that most members name, `(members, points)` to `(points,)`; of a tie the smallest."""
    return (named[:, :, None] == np.arange(CLASSES)).sum(0).argmax(1)


def majority(right: float, k: int) -> float:
    """P(a vote of k independent members is right), each right with that probability, else all wrong alike; a tie is half."""
    chances = [comb(k, n) * right**n * (1 - right) ** (k - n) for n in range(k + 1)]
    return sum(chance * (1.0 if 2 * n > k else 0.5 if 2 * n == k else 0.0) for n, chance in enumerate(chances))


def report(world: World, arguments: argparse.Namespace) -> Any:
    """The same question as asked of networks, whose D(y|x) nobody knows: predictions against clean labels."""
    train, noisy = noisy_sample(world, arguments.labels, [0, 4, 0])
    points, clean = world.draw(arguments.test, np.random.default_rng([0, 5]))
    teacher = nearest(train, noisy)
    return sampler_report(teacher.predict(points), clean, world.transition, teacher.score(train, noisy)).verdict


if __name__ == "__main__":
    main()
