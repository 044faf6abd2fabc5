"""What the recipes share as programs: what they say and when, which choice wins, how many rows a step has."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import transformers

from hfkd import DistillationArguments
from hfkd.evaluation import drawn

HERE = Path(__file__).resolve().parent
at_random = drawn  # so that `hfkd eval` finds the rows that a recipe was scored on
# Of these one is given; a flag takes the place of what stands in a file
ONE_OF = (
    ("task", "dataset_name", "train_file", "data_dir"),
    ("teacher", "teacher_start", "teacher_config"),
    ("student", "student_config", "student_layers"),
)


def one_source(recipe: Any, arguments: list[str]) -> None:
    """Flags win over files, also where they choose something else: --train_file takes the place of a file's task."""
    flags = {word.split("=")[0].removeprefix("--") for word in arguments if word.startswith("--")}
    for names in ONE_OF:
        for name in names:
            if flags & set(names) and name not in flags and hasattr(recipe, name):
                setattr(recipe, name, None)


def rows_per_step(args: DistillationArguments) -> int:
    return args.train_batch_size * args.gradient_accumulation_steps * args.world_size


def say(text: str) -> None:
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"\n== {text}", flush=True)


def quiet() -> None:
    transformers.utils.logging.disable_progress_bar()  # of loading and saving; training keeps its own
    datasets.disable_progress_bars()


@contextmanager
def one_sentence() -> Iterator[None]:
    """Wrong inputs end a program with their sentence, not with a stack of calls."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise SystemExit(f"{Path(sys.argv[0]).name}: {error}") from error
