"""Fine-tune a text classifier on labels alone: a teacher, or a baseline beside distilled students.

    accelerate launch recipes/train_teacher.py                    # MiniLM-L6 on embedded movie sentences: 83 %, 4 minutes
    accelerate launch recipes/train_teacher.py --task sst2 --model_name_or_path google-bert/bert-base-uncased
    accelerate launch recipes/train_teacher.py --train_file train.csv --test_file test.csv --model_name_or_path M --seeds 3

The trainer and every setting are those of distill_text.py, with the objective CrossEntropy: transformers' own Trainer
scales the loss of several encoders wrongly under gradient accumulation, and a table that mixes the two compares trainers.
Then `recipes/distill_text.py --teacher OUTPUT_DIR/runs/teacher/seed-0/model`.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hfkd import DistillationArguments
from hfkd.trainers.arguments import parse_arguments
from program import HERE, one_sentence, one_source, quiet, say
from publication import Publication, publish, refuse_push_teacher
from run_report import per_seed_csv, percent, write_whole
from runs import Run, Runs
from text_data import DataArguments, load_data, tokenizer_for, view_of
from text_study import classifier, start_weights

OWN_DATA = ("--task", "--dataset_name", "--train_file", "--model_name_or_path", "--config")


@dataclass
class RecipeArguments(DataArguments):
    """Data and model."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Weights to fine-tune: a folder or Hub id; default for embedded tasks: MiniLM-L6."},
    )
    seeds: int = field(default=1, metadata={"help": "Models trained; each is saved."})


def main(arguments: list[str]) -> None:
    run(prepare(arguments))


def prepare(arguments: list[str]) -> tuple[Runs, list[Run]]:
    """Whatever is wrong with the inputs is said here."""
    quiet()
    own_data = any(word.split("=")[0] in OWN_DATA for word in arguments)
    defaults = HERE / "configs" / f"train_teacher_{'task' if own_data else 'demo'}.yaml"
    recipe, args = parse_arguments(RecipeArguments, DistillationArguments, arguments=arguments, defaults=defaults)
    one_source(recipe, arguments)
    if args.names_objective() and args.objective != "cross_entropy":
        raise ValueError(
            "this recipe learns from labels alone: leave objective, temperature and alpha to distill_text.py"
        )
    refuse_push_teacher(args, "what is trained here is the teacher, and --push_to_hub uploads it")
    if recipe.seeds < 1:
        raise ValueError(f"--seeds must be 1 or more, got {recipe.seeds}")
    data = load_data(recipe, args)
    runs = Runs(recipe, args, data)
    start = start_weights(recipe.model_name_or_path, recipe.task, args, "--model_name_or_path")
    view = view_of(data, tokenizer_for(start), recipe.max_length)
    classifier(start, data)  # a wrong id is said now
    kinds = [Run("teacher", seed, lambda: classifier(start, data), view, keep=True) for seed in range(recipe.seeds)]
    return runs, kinds


def run(prepared: tuple[Runs, list[Run]]) -> None:
    started = time.monotonic()
    runs, kinds = prepared
    runs.start()
    results = []
    for kind in kinds:
        say(f"Seed {kind.seed}: {len(kind.view.train):,} texts")
        results.append(runs.result(kind))
    if runs.args.process_index == 0:
        report(runs, results, (time.monotonic() - started) / 60)


def report(runs: Runs, results: list[dict[str, Any]], minutes: float) -> None:
    write_whole(runs.output / "results.csv", per_seed_csv(results))
    for name in (name for name in results[0] if name not in ("run", "seed", "steps", "peak_mib", "seconds_per_step")):
        print(f"{name.replace('_', ' ')} (%): {percent([result[name] for result in results])}")
    print(f"Took {minutes:.1f} minutes. Per seed: {runs.output / 'results.csv'}")
    for result in results:
        print(f"  teacher  {Path(runs.folder('teacher', result['seed'])) / 'model'}")
    metric = runs.data.metric
    scores = {"this model": [result[metric] for result in results]}
    publish(runs, Publication({"this model": runs.folder("teacher", 0) / "model"}, scores, metric))


if __name__ == "__main__":
    with one_sentence():
        prepared = prepare(sys.argv[1:])
    run(prepared)
