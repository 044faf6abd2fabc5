"""Image data sets as the Hub declares them, for a machine without a network: eight generated images in every split.

`tests/data/schemas/images.json` holds columns, splits with their real sizes, and class names (or their number), written
down apart from the table of tasks.
"""

import json
import zlib
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as Picture

DECLARED = json.loads((Path(__file__).parent / "data" / "schemas" / "images.json").read_text())


def class_names(task):
    classes = DECLARED[task]["classes"]
    return [f"class {number:04d}" for number in range(classes)] if isinstance(classes, int) else classes


def labels(task):
    """Four of the first class and four of the last; the classes between them have no image here."""
    return [0] * 4 + [len(class_names(task)) - 1] * 4


def pictures(task, split):
    """Eight images of noise, the same for the same task and split."""
    mode = DECLARED[task]["mode"]
    generator = np.random.default_rng(zlib.crc32(f"{task} {split}".encode()))
    arrays = generator.integers(0, 256, (8, 12, 16) + ((3,) if mode == "RGB" else ()), dtype=np.uint8)
    return [Picture.fromarray(array) for array in arrays]


def stored(task):
    """The splits that the Hub has."""
    declared, splits = DECLARED[task], DatasetDict()
    features = {declared["image"]: Image(), declared["label"]: ClassLabel(names=class_names(task))}
    features |= {name: Value("string") for name in declared["others"]}
    for split in declared["splits"]:
        columns = {declared["image"]: pictures(task, split), declared["label"]: labels(task)}
        if split in declared["hidden"]:
            columns[declared["label"]] = [-1] * 8
        columns |= {name: ["something"] * 8 for name in declared["others"]}
        splits[split] = Dataset.from_dict(columns, features=Features(features))
    return splits


def load(path, name=None, **settings):
    """Stands in for `datasets.load_dataset`."""
    found = [task for task, declared in DECLARED.items() if (declared["path"], declared["name"]) == (path, name)]
    return stored(found[0])
