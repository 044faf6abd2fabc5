"""Recipes one after the other, each watched by an offline W&B: `tracked_recipes.py FOLDER`, which holds words.json.

In one process, because what they import takes longer than what they do here. Of one that fails the error is kept.
"""

import gc
import json
import os
import runpy
import sys
import traceback
from pathlib import Path

import wandb

RECIPES = Path(__file__).resolve().parents[1] / "recipes"


def main(folder: Path) -> None:
    sys.path.insert(0, str(RECIPES))
    for name in ("WANDB_NAME", "WANDB_RUN_GROUP", "WANDB_JOB_TYPE", "WANDB_PROJECT", "WANDB_LOG_MODEL"):
        os.environ.pop(name, None)
    for recipe, words in json.loads((folder / "words.json").read_text()).items():
        tracked = folder / recipe / "tracked"
        tracked.mkdir(parents=True)
        os.environ |= {"WANDB_DIR": str(tracked), "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
        sys.argv = [str(RECIPES / f"{recipe}.py"), *words]
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except (Exception, SystemExit):
            (folder / recipe / "error.txt").write_text(traceback.format_exc())
        wandb.finish()
        wandb.teardown()  # the next one has a folder of its own
        gc.freeze()  # the Trainer collects garbage after every run, which is half of a tiny run's time


if __name__ == "__main__":
    main(Path(sys.argv[1]))
