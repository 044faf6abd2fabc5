"""Labels of any data set as class ids with names, numbers, or one 0.0 or 1.0 per class: the values of one column, by split."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset


def present_labels(dataset: Dataset, split: str, column: str) -> list[Any]:
    """The column's values as they are. Raises `ValueError` when a row has none."""
    values = dataset[column][:]
    missing = [number for number, value in enumerate(values) if value is None or str(value).strip() == ""]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(values)} rows of the {split} split have no label in {column!r}, the first is row "
            f"{missing[0]}: label them, or remove them"
        )
    return values


def declared_names(train: Dataset, column: str, row_names: Sequence[str] | None) -> list[str] | None:
    """The class names of the data set or the task. Raises `ValueError` when the two do not agree."""
    feature = train.features[column]
    declared = getattr(getattr(feature, "feature", feature), "names", None)
    if declared and row_names and list(declared) != list(row_names):
        raise ValueError(f"the data set names its classes {list(declared)} and the task expects {list(row_names)}")
    return list(declared or row_names or ()) or None


def class_labels(
    raw: Mapping[str, list], column: str, declared: list[str] | None, required: bool, problem_type: str
) -> tuple[Any, dict[str, list], list[str] | None]:
    """The type of the column label, its values by split, and the class names in the order of their ids, if any."""
    from datasets import ClassLabel, List, Value

    if problem_type == "regression":
        return Value("float32"), _numbers(raw, column, declared), None
    if problem_type == "multi_label_classification":
        return List(Value("float32")), *_several_classes(raw, column, declared)
    found = {split: [_label_name(value, column, declared) for value in values] for split, values in raw.items()}
    names = declared or _sorted_names(found["train"], column)
    if required and len(names) < 2:
        raise ValueError(f"fine-tuning needs two classes or more: {column!r} of the train split has only {names}")
    ids = {split: _class_ids(labels, split, names) for split, labels in found.items()}
    return ClassLabel(names=names), ids, names


def _numbers(raw: Mapping[str, list], column: str, declared: list[str] | None) -> dict[str, list[float]]:
    if declared:
        raise ValueError(f"the column {column!r} holds the classes {declared}, which cannot be regressed on")
    numbers = {split: [_number(value, column) for value in values] for split, values in raw.items()}
    for split, values in numbers.items():
        if split != "train" and set(values) == {-1.0}:
            raise ValueError(f"all labels of the {split} split are -1, which stands for hidden labels: leave it out")
    return numbers


def _number(value: Any, column: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"the column {column!r} holds {value!r}: regression needs finite numbers")
    return number


def _several_classes(
    raw: Mapping[str, list], column: str, declared: list[str] | None
) -> tuple[dict[str, list[list[float]]], list[str]]:
    """Rows of one 0.0 or 1.0 per class, by split, and the class names."""
    for value in (value for values in raw.values() for value in values):
        if not isinstance(value, list):
            raise ValueError(f"the column {column!r} holds {value!r}: several classes are a list, in json or parquet")
    if any(isinstance(entry, float) for value in raw["train"] for entry in value):
        names = declared or [str(number) for number in range(len(raw["train"][0]))]
        return {split: [_multi_hot(value, column, names) for value in values] for split, values in raw.items()}, names
    named = {
        split: [[_label_name(entry, column, declared) for entry in value] for value in values]
        for split, values in raw.items()
    }
    names = declared or _sorted_names([name for value in named["train"] for name in value], column)
    if not names:
        raise ValueError(f"no row of the train split has a class in {column!r}")
    chosen = {split: [set(_class_ids(value, split, names)) for value in values] for split, values in named.items()}
    numbers = range(len(names))
    return {split: [[float(n in ids) for n in numbers] for ids in rows] for split, rows in chosen.items()}, names


def _multi_hot(value: list, column: str, names: Sequence[str]) -> list[float]:
    if len(value) != len(names) or not set(value) <= {0.0, 1.0}:
        raise ValueError(
            f"the column {column!r} holds {value!r}: one 0.0 or 1.0 for each of {len(names)} classes is needed; class "
            "ids are whole numbers"
        )
    return value


def _label_name(value: Any, column: str, names: Sequence[str] | None) -> str:
    """The class name of a label. A class id is looked up in the names that the data set or the task declares."""
    if isinstance(value, list | dict):
        raise ValueError(
            f"the column {column!r} holds {value!r}: a label is one class, a whole number or a string; for several "
            "classes a text give problem_type=multi_label_classification"
        )
    if isinstance(value, float) and not value.is_integer():
        raise ValueError(
            f"the column {column!r} holds {value!r}: a label is one class, a whole number or a string; to predict a "
            "number give problem_type=regression"
        )
    if isinstance(value, float):
        value = int(value)  # parquet written from a table with gaps stores class ids as 1.0
    is_id = isinstance(value, int) and not isinstance(value, bool) and names is not None
    return names[value] if is_id and names is not None and 0 <= value < len(names) else str(value)


def _sorted_names(found: Sequence[str], column: str) -> list[str]:
    names = sorted(set(found))
    if all(re.fullmatch(r"-?\d+", name) for name in names):
        return sorted(names, key=int)
    if all(re.fullmatch(r"-?\d+(\.\d+)?", name) for name in names):
        for name in names:  # csv holds numbers as text: a fraction among them is refused here
            _label_name(float(name), column, None)
    return names


def _class_ids(labels: Sequence[str], split: str, names: Sequence[str]) -> list[int]:
    ids = {name: number for number, name in enumerate(names)}
    unknown = sorted(set(labels) - set(ids))
    if unknown:
        hint = " (-1 often stands for hidden labels, which cannot be scored)" if "-1" in unknown else ""
        raise ValueError(f"the {split} split has labels that train does not: {unknown}{hint}; known are {list(names)}")
    return [ids[label] for label in labels]
