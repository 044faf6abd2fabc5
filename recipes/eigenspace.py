"""Does a distilled student learn the data's top eigendirections even faster than training on labels does?

    python recipes/eigenspace.py                       # embedded digits, no network, 5 minutes or less
    python recipes/eigenspace.py --profile study       # 5 seeds, 10 minutes or less on one core
    python recipes/eigenspace.py --noise_rate 0.2      # wrong labels for a fifth of the training images
    python recipes/eigenspace.py --data_dir my_images --image_size 32

Three kinds of network (`--networks`): random features with a trained linear head, a perceptron, a small CNN. Of each, and
for every seed: a teacher on labels; a student on labels alone (one-hot); a student on the teacher's answers alone, from the
*same* start, in the same order of rows; and as the control the one-hot student again in another order of rows. The weights
of one layer are projected on the eigenvectors v_k of the covariance of what it reads (features, pixels, patches of 5 x 5) at
every step: c_k = |W v_k|. Exaggerated bias means that at equal c_i (a top direction) the distilled student has the smaller
c_j (a lower one). The table has the share of the pairs (i, j) for which that is so, and the same share for the control, which
says what an accident looks like.

Reconstruction, not verified, of an experiment of *On student-teacher deviations in distillation* (Nagarajan et al. 2023,
arXiv 2301.12923): random features and perceptrons on MNIST and a small CNN are recalled; its widths, sample sizes,
directions, learning rates and how it counts are not known. Training is plain SGD, whose bias the theory is about, and the
theory is about small steps: where the distilled student's curve jumps, the learning rate is too large for it (the answers
are matched times the temperature's square), and what it learns along the top direction is thrown away again.

Every run is saved when it is done, with its records; `--resume_from_checkpoint True` goes on where the study was stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers
from safetensors.numpy import load_file, save_file

from hfkd import DistillationArguments, DistillationTrainer
from hfkd.data.label_noise import transition_matrix, with_label_noise
from hfkd.data.splits import save_indices
from hfkd.diagnostics import plots
from hfkd.diagnostics.eigenspace import Comparison, Directions, compare, layer_directions
from hfkd.diagnostics.metrics import paired_difference
from hfkd.diagnostics.trajectory import Trajectory, TrajectoryRecorder, read_trajectory
from hfkd.objectives import CrossEntropy, Distillation
from hfkd.records import weights_hash
from hfkd.teachers import ModelTeacher
from hfkd.trainers.arguments import parse_arguments
from image_data import ImageArguments, ImageData, load_data, view_of
from image_study import new_processor
from program import HERE, one_sentence, one_source, quiet, say
from run_report import per_seed_csv, percent, write_whole
from runs import Run, Runs
from small_networks import FOLLOWED, SmallClassifier, SmallConfig

OWN_DATA = ("--task", "--dataset_name", "--data_dir", "--config")
TEACHER, ONE_HOT, DISTILLED, CONTROL = "teacher", "one_hot", "distilled", "control"
OTHER_SEEDS = {TEACHER: 1000, CONTROL: 2000}  # of row orders, and of a teacher's start
SHOWN = {"random_features": "random features", "mlp": "MLP", "cnn": "CNN"}
BATCH = 250


@dataclass
class RecipeArguments(ImageArguments):
    """Data, networks, and the directions that are followed. `--profile` sets the defaults of a short or long run."""

    profile: str = field(default="", metadata={"help": "demo | study; a default for everything that is not given."})
    networks: list[str] = field(default_factory=lambda: list(FOLLOWED), metadata={"help": f"Of {', '.join(FOLLOWED)}."})
    widths: list[int] = field(
        default_factory=lambda: [512, 128, 16], metadata={"help": "Of each network, in the order of --networks."}
    )
    learning_rates: list[float] | None = field(
        default=None,
        metadata={"help": "Of each network, in the order of --networks; default: --learning_rate for all."},
    )
    directions: list[int] = field(
        default_factory=lambda: [1, 2, 3, 5, 8, 13, 21, 34, 55],
        metadata={"help": "Which eigenvectors are followed, 1 the top one; those beyond the data's rank are left out."},
    )
    drawn: list[int] = field(
        default_factory=lambda: [1, 13], metadata={"help": "The pair of directions that the figure shows."}
    )
    centred: bool = field(
        default=True, metadata={"help": "Of the covariance; False: of the second moment, as in the linear theory."}
    )
    every: int = field(default=1, metadata={"help": "Record after every so many optimizer steps."})
    noise_rate: float = field(default=0.0, metadata={"help": "Share of each class's training labels made wrong."})
    seeds: int = field(default=3, metadata={"help": "Starts, each with its teacher and students."})
    teacher_epochs: float | None = field(default=None, metadata={"help": "Default: the students' budget."})
    image_mean: list[float] | None = field(
        default=None, metadata={"help": "Mean of R, G and B in [0, 1]; default 0.5."}
    )
    image_std: list[float] | None = field(default=None, metadata={"help": "Standard deviation; default 0.5."})


def main(arguments: list[str]) -> None:
    run(*prepare(arguments))


def prepare(arguments: list[str]) -> tuple[RecipeArguments, DistillationArguments, EigenStudy]:
    """Whatever is wrong with the inputs is said here."""
    quiet()
    only_profile = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    only_profile.add_argument("--profile", default="demo")
    profile = only_profile.parse_known_args(arguments)[0].profile
    if profile not in ("demo", "study"):
        raise ValueError(f"--profile {profile}: choose demo or study, or give your own values with --config")
    defaults = HERE / "configs" / f"eigenspace_{profile}.yaml"
    recipe, args = parse_arguments(RecipeArguments, DistillationArguments, arguments=arguments, defaults=defaults)
    if recipe.profile not in ("", profile):
        raise ValueError(
            f"profile: {recipe.profile} stands in a YAML file; give it as a flag, because it names a file itself"
        )
    recipe.profile = profile
    one_source(recipe, arguments)
    return recipe, args, EigenStudy(recipe, args)


class RecordedRuns(Runs):
    """Runs of networks whose followed layer is recorded along directions that are computed once for each start."""

    def __init__(self, study: EigenStudy):
        super().__init__(study.recipe, study.args, study.data)
        self.study = study

    def trainer(self, run: Run, model: Any, args: DistillationArguments) -> DistillationTrainer:
        trainer = super().trainer(run, model, args)
        kind, _, role = run.name.partition("-")
        if role != TEACHER:
            vectors = self.study.directions(kind, run.seed % 1000).vectors
            path = self.folder(run.name, run.seed) / "trajectory.safetensors"
            trainer.add_callback(TrajectoryRecorder(FOLLOWED[kind], vectors, path, self.recipe.every))
        return trainer


class EigenStudy:
    """Everything that can be wrong with the inputs is said when it is made, before any training."""

    def __init__(self, recipe: RecipeArguments, args: DistillationArguments):
        self.recipe, self.args = recipe, args
        self.objective = args.make_objective("kd")
        if args.push_to_hub:
            raise ValueError(
                "the networks here are this study's own two layers, which no library loads: leave --push_to_hub out"
            )
        refuse_wrong_choices(recipe, self.objective)
        self.data = noisy(load_data(recipe, args), recipe.noise_rate)
        self.processor = new_processor({"image_size": 28}, recipe)
        self.runs = RecordedRuns(self)
        self.view = view_of(self.data, self.processor, skip_bad_images=recipe.skip_bad_images)
        self.view.held_out["train_"] = self.view.train  # do teachers and students interpolate?
        self.view.settings |= {
            name: getattr(recipe, name) for name in ("directions", "centred", "every", "noise_rate", "widths")
        }

    def new(self, kind: str, start: int) -> SmallClassifier:
        transformers.set_seed(start)
        width = self.recipe.widths[self.recipe.networks.index(kind)]
        size = self.view.collator.student_view.size[0]
        return SmallClassifier(SmallConfig(kind=kind, image_size=size, width=width, **self.data.head()))

    def trained(self, kind: str, role: str, seed: int, **changes: Any) -> dict[str, Any]:
        """All start alike, but a network that teaches has weights of its own; random features are the same data for all."""
        own_start = role == TEACHER and kind != "random_features"
        order = OTHER_SEEDS.get(role, 0) + seed
        start = order if own_start else seed
        say(f"Seed {seed}: {SHOWN[kind]}, {role.replace('_', '-')}")
        run = Run(f"{kind}-{role}", order, lambda: self.new(kind, start), self.view, CrossEntropy(), **changes)
        if self.recipe.learning_rates:
            run.budget["learning_rate"] = self.recipe.learning_rates[self.recipe.networks.index(kind)]
        if role == DISTILLED:
            run.objective = self.objective
        return {"network": kind, "role": role, **self.runs.result(run), "seed": seed}

    def teach(self, kind: str, seed: int) -> tuple[dict[str, Any], Path]:
        budget = {} if self.recipe.teacher_epochs is None else {"num_train_epochs": self.recipe.teacher_epochs}
        result = self.trained(kind, TEACHER, seed, keep=True, budget=budget)
        return result, self.runs.folder(f"{kind}-{TEACHER}", OTHER_SEEDS[TEACHER] + seed) / "model"

    def distil(self, kind: str, seed: int, source: Path) -> dict[str, Any]:
        teacher = SmallClassifier.from_pretrained(source)
        changes = {
            "asked": lambda: (ModelTeacher(teacher), self.view.train),
            "teacher_hash": weights_hash(teacher.state_dict()),
            "answers": self.runs.answers(f"{kind}-{TEACHER}", OTHER_SEEDS[TEACHER] + seed),
        }
        return self.trained(kind, DISTILLED, seed, **changes)

    # ---- directions and records ----

    def directions(self, kind: str, seed: int) -> Directions:
        """Beside the one-hot run: two computations of one covariance need not agree in the last digit, and are compared."""
        path = self.runs.folder(f"{kind}-{ONE_HOT}", seed) / "directions.safetensors"
        with self.args.main_process_first(desc="directions"):
            if not path.is_file():
                found = layer_directions(
                    self.new(kind, seed), FOLLOWED[kind], self.batches(), centred=self.recipe.centred
                )
                kept = found.at([place - 1 for place in self.recipe.directions if place <= found.rank])
                partial = path.with_suffix(".partial")
                save_file({"eigenvalues": kept.eigenvalues, "vectors": kept.vectors.copy()}, partial)
                partial.replace(path)
        return Directions(**load_file(path))

    def batches(self) -> Any:
        collator, rows = self.view.collator, self.view.train
        for start in range(0, len(rows), BATCH):
            batch = collator([rows[i] for i in range(start, min(start + BATCH, len(rows)))])
            yield {"pixel_values": collator.on_device(batch)["pixel_values"]}

    def trajectory(self, kind: str, role: str, seed: int) -> Trajectory:
        folder = self.runs.folder(f"{kind}-{role}", OTHER_SEEDS.get(role, 0) + seed)
        return read_trajectory(folder / "trajectory.safetensors")


def noisy(data: ImageData, rate: float) -> ImageData:
    if not rate:
        return data
    return dataclasses.replace(data, train=with_label_noise(data.train, transition_matrix(len(data.labels), rate)))


def refuse_wrong_choices(recipe: RecipeArguments, objective: Any) -> None:
    unknown = [kind for kind in recipe.networks if kind not in FOLLOWED]
    if unknown or not recipe.networks or len(set(recipe.networks)) < len(recipe.networks):
        raise ValueError(f"--networks {' '.join(recipe.networks)}: choose of {', '.join(FOLLOWED)}, each once")
    if len(recipe.widths) != len(recipe.networks) or min(recipe.widths) < 1:
        raise ValueError(
            f"--widths {recipe.widths}: one of 1 or more is needed for each of {', '.join(recipe.networks)}"
        )
    rates = recipe.learning_rates or [1.0] * len(recipe.networks)
    if len(rates) != len(recipe.networks) or min(rates) <= 0:
        raise ValueError(f"--learning_rates {rates}: one above 0 is needed for each of {', '.join(recipe.networks)}")
    if len(recipe.directions) < 2 or recipe.directions != sorted(set(recipe.directions)) or recipe.directions[0] < 1:
        raise ValueError(f"--directions {recipe.directions}: name two or more in ascending order, 1 being the top one")
    if (
        len(recipe.drawn) != 2
        or recipe.drawn != sorted(recipe.drawn)
        or not set(recipe.drawn) <= set(recipe.directions)
    ):
        raise ValueError(f"--drawn {recipe.drawn}: name two of --directions {recipe.directions}, the upper one first")
    if recipe.seeds < 1 or recipe.every < 1:
        raise ValueError(f"--seeds and --every must be 1 or more, got {recipe.seeds} and {recipe.every}")
    if recipe.image_size is not None and recipe.image_size < 4:
        raise ValueError(f"--image_size {recipe.image_size}: the CNN halves images twice, 4 pixels are the least")
    if not isinstance(objective, Distillation):
        raise ValueError(f"{type(objective).__name__} asks no teacher: choose kd, dkd, dist, ... with --objective")


def run(recipe: RecipeArguments, args: DistillationArguments, study: EigenStudy) -> None:
    started = time.monotonic()
    study.runs.start()
    if args.process_index == 0:
        save_indices(study.runs.output / "splits.json", **study.data.indices())
    results, shares = [], []
    for kind in recipe.networks:
        for seed in range(recipe.seeds):
            result, source = study.teach(kind, seed)
            results += [result, study.trained(kind, ONE_HOT, seed), study.trained(kind, CONTROL, seed)]
            results.append(study.distil(kind, seed, source))
            shares.append({"network": kind, "seed": seed, **compared(study, kind, seed)})
    if args.process_index == 0:
        report(recipe, study, results, shares, (time.monotonic() - started) / 60)


def compared(study: EigenStudy, kind: str, seed: int) -> dict[str, Any]:
    one_hot = study.trajectory(kind, ONE_HOT, seed)
    found: dict[str, Any] = {}
    for role in (DISTILLED, CONTROL):
        other = study.trajectory(kind, role, seed)
        for name, moves in (("weights", False), ("moves", True)):
            comparison: Comparison = compare(one_hot, other, moves=moves)
            found[f"{role}_{name}"] = comparison.share
            found[f"{role}_{name}_pairs"] = comparison.pairs
            found[f"{role}_{name}_skipped"] = comparison.skipped
    return found


# ---- report ----


def report(
    recipe: RecipeArguments,
    study: EigenStudy,
    results: list[dict[str, Any]],
    shares: list[dict[str, Any]],
    minutes: float,
) -> None:
    output = study.runs.output
    text = f"{share_table(recipe, shares)}\n\n{accuracy_table(recipe, results)}"
    write_whole(output / "results.md", text + "\n")
    write_whole(output / "results.csv", per_seed_csv(results))
    write_whole(output / "shares.csv", per_seed_csv(shares))
    print(f"\n{text}\n\nTrained on {len(study.view.train):,} images. Took {minutes:.1f} minutes ({recipe.profile}).")
    if recipe.seeds == 1:
        print("One seed: there are no intervals; 3 or more say how much a share means.")
    print(f"Tables: {output / 'results.md'}, {output / 'results.csv'}, {output / 'shares.csv'}")
    try:
        draw(recipe, study, shares, output / "trajectories.png")
        print(f"Figure: {output / 'trajectories.png'}")
    except ImportError as error:  # matplotlib is an extra
        print(f"no figure: {error}")


def share_of(values: list[float]) -> str:
    """Percent, with Student's t interval over seeds, cut at 0 and 100 (a share goes no further)."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return "– (nothing to compare)"
    left_out = f", {len(values) - len(known)} seeds without a pair" if len(known) < len(values) else ""
    if len(known) == 1:
        return f"{100 * known[0]:.0f} (n=1{left_out})"
    mean, low, high = paired_difference(known, [0.0] * len(known))
    return f"{100 * mean:.0f} [{100 * max(low, 0.0):.0f}, {100 * min(high, 1.0):.0f}]{left_out}"


def share_table(recipe: RecipeArguments, shares: list[dict[str, Any]]) -> str:
    heads = ["share of pairs on the top direction's side (%)", "pairs", "distilled, |W v|", "control, |W v|"]
    heads += ["distilled, |(W - W_start) v|", "control, |(W - W_start) v|"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for kind in recipe.networks:
        rows = [row for row in shares if row["network"] == kind]
        counts = sorted({row["distilled_weights_pairs"] for row in rows})
        cells = [SHOWN[kind], " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))]
        cells += [
            share_of([row[f"{role}_{name}"] for row in rows])
            for name in ("weights", "moves")
            for role in (DISTILLED, CONTROL)
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def accuracy_table(recipe: RecipeArguments, results: list[dict[str, Any]]) -> str:
    heads = ["accuracy (%)", "teacher, train", *(f"{role}, test" for role in ("teacher", "one-hot", "distilled"))]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    wanted = ((TEACHER, "train_accuracy"), (TEACHER, "accuracy"), (ONE_HOT, "accuracy"), (DISTILLED, "accuracy"))
    for kind in recipe.networks:
        cells = [
            percent([row[name] for row in results if (row["network"], row["role"]) == (kind, role)])
            for role, name in wanted
        ]
        lines.append("| " + " | ".join([SHOWN[kind], *cells]) + " |")
    return "\n".join(lines)


def draw(recipe: RecipeArguments, study: EigenStudy, shares: list[dict[str, Any]], path: Path) -> None:
    panels, labels = {}, {}
    for kind in recipe.networks:
        followed = len(study.directions(kind, 0).eigenvalues)
        upper, lower = (min(recipe.directions.index(place), followed - 1) for place in recipe.drawn)
        share = share_of([row["distilled_moves"] for row in shares if row["network"] == kind])
        title = f"{SHOWN[kind]}: {share} % of pairs"
        panels[title] = {
            name: [
                (found.moves[:, upper], found.moves[:, lower])
                for found in (study.trajectory(kind, role, seed) for seed in range(recipe.seeds))
            ]
            for name, role in (("one-hot", ONE_HOT), ("distilled", DISTILLED))
        }
        numbers = [recipe.directions[place] for place in (upper, lower)]
        labels[title] = tuple(f"direction {number}: |(W - W_start) v|" for number in numbers)
    plots.trajectories(panels, labels, path)


if __name__ == "__main__":
    with one_sentence():
        prepared = prepare(sys.argv[1:])
    run(*prepared)
