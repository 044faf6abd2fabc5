"""Compare a student with its teacher: agreement, calibration, classes, deviations. Conditions make it a gate for CI.

    python recipes/fidelity_report.py STUDENT TEACHER --task movie_sentences --require "agreement>=0.8" "slope<=1.5"
    python recipes/fidelity_report.py STUDENT TEACHER --task mnist_5k --train_rows 0
    python recipes/fidelity_report.py STUDENT TEACHER --train_file train.csv --test_file test.csv

STUDENT and TEACHER are folders (`runs/distill_text_demo/runs/distilled/seed-0/model`) or Hub ids; each reads texts with its own
tokenizer and pictures with its own image processor. The conditions stand in quotes, because a shell takes > for a file.
Exit code 1 when a condition is not met, and the last line says which; 2 when it could not be judged, because of the inputs.
"""

from __future__ import annotations

import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from hfkd.data.images import IMAGE_TASKS, load_images
from hfkd.data.text import TEXT_TASKS, load_text
from hfkd.diagnostics.fidelity import NUMBERS, FidelityReport, report
from hfkd.diagnostics.gates import parse_gates
from program import at_random, quiet, say

WRONG_INPUT = 2  # as argparse exits; 1 is a condition that is not met


@dataclass
class RecipeArguments:
    """Which rows, and what is required."""

    task: str | None = field(
        default=None, metadata={"help": f"One of {', '.join([*TEXT_TASKS, *IMAGE_TASKS])} (texts, then images)."}
    )
    dataset_name: str | None = field(default=None, metadata={"help": "Texts: a data set's Hub id or local folder."})
    dataset_config: str | None = field(default=None, metadata={"help": "The data set's configuration."})
    train_file: str | None = field(default=None, metadata={"help": "Texts: csv, tsv, json, jsonl or parquet."})
    validation_file: str | None = field(default=None, metadata={"help": "Same kinds."})
    test_file: str | None = field(default=None, metadata={"help": "Same kinds; to compare on."})
    data_dir: str | None = field(default=None, metadata={"help": "Images: a folder with train/CLASS/*.png and so on."})
    text_column: str | None = field(default=None, metadata={"help": "The column with the text; default: guessed."})
    text_pair_column: str | None = field(default=None, metadata={"help": "The column with a second text."})
    label_column: str | None = field(default=None, metadata={"help": "The column with the label; default: guessed."})
    unlabelled: bool = field(default=False, metadata={"help": "The texts have no labels: compare what needs none."})
    evaluate_on: str | None = field(
        default=None, metadata={"help": "The split to compare on; default: test where there is one, else validation."}
    )
    rows: int | None = field(default=None, metadata={"help": "At most this many of its rows, drawn once."})
    train_rows: int = field(
        default=1000, metadata={"help": "Training rows, drawn once, for the teacher's accuracy there; 0: none."}
    )
    group_column: str | None = field(default=None, metadata={"help": "A column that names the subgroup of each row."})
    require: list[str] = field(
        default_factory=list, metadata={"help": f'Conditions, "NAME>=NUMBER", of {", ".join(NUMBERS)}.'}
    )
    student_temperature: float = field(default=1.0, metadata={"help": "Of the logit-logit line; all else is at 1."})
    teacher_temperature: float = field(default=1.0, metadata={"help": "Likewise."})
    max_length: int = field(default=128, metadata={"help": "Tokens a text (or pair) is cut at, as in training."})
    batch_size: int = field(default=64, metadata={"help": "Rows a model reads at a time."})
    output_dir: str = field(default="runs/fidelity_report", metadata={"help": "For tables, figures and report.json."})


def main(arguments: list[str]) -> int:
    quiet()
    parser = HfArgumentParser(RecipeArguments)
    parser.add_argument("student", help="A folder or Hub id.")
    parser.add_argument("teacher", help="A folder or Hub id.")
    try:
        recipe, models = parser.parse_args_into_dataclasses(arguments)
        gates = parse_gates(recipe.require, NUMBERS)  # a misspelt one is said before the models are asked
        found = compared(recipe, models.student, models.teacher)
        files = written(found, recipe)
    except (ValueError, OSError) as error:
        print(f"fidelity_report.py: {error}", file=sys.stderr)
        return WRONG_INPUT
    except Exception:  # damaged weights, too little memory: Python's own exit code would be that of a failed condition
        traceback.print_exc()
        return WRONG_INPUT
    print(f"\n{found.markdown()}\n{files}")
    failed = found.failures(*gates)
    if failed:
        print(f"{len(failed)} of {len(gates)} conditions are not met: {'; '.join(failed)}", file=sys.stderr)
    elif gates:
        print(f"All conditions are met: {'; '.join(map(str, gates))}")
    return 1 if failed else 0


def compared(recipe: RecipeArguments, student: str, teacher: str) -> FidelityReport:
    splits = load(recipe)
    wanted = recipe.evaluate_on or ("test" if "test" in splits else "validation")
    if wanted not in splits:
        raise ValueError(f"there is no {wanted} split, the data has {', '.join(splits)}: choose with --evaluate_on")
    rows = at_random(splits[wanted], recipe.rows)
    train = at_random(splits["train"], recipe.train_rows) if recipe.train_rows and "train" in splits else None
    say(f"{len(rows):,} {wanted} rows" + (f" and {len(train):,} training rows" if train is not None else ""))
    return report(
        student,
        teacher,
        rows,
        train_dataset=train,
        group_column=recipe.group_column,
        max_length=recipe.max_length if "text" in rows.column_names else None,
        batch_size=recipe.batch_size,
        student_temperature=recipe.student_temperature,
        teacher_temperature=recipe.teacher_temperature,
    )


def load(recipe: RecipeArguments) -> Any:
    if recipe.data_dir is not None or recipe.task in IMAGE_TASKS:
        return load_images(recipe.task, recipe.data_dir, label_column=recipe.label_column)
    return load_text(
        recipe.task,
        recipe.dataset_name,
        recipe.dataset_config,
        recipe.train_file,
        recipe.validation_file,
        recipe.test_file,
        recipe.text_column,
        recipe.label_column,
        require_labels=not recipe.unlabelled,
        text_pair_column=recipe.text_pair_column,
    )


def written(found: FidelityReport, recipe: RecipeArguments) -> str:
    return "\n".join(f"  {path}" for path in found.save(Path(recipe.output_dir)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
