"""The labels of rows, as ids in the order of a model's classes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hfkd.teachers.labels import class_names

LABELS = ("label", "labels")


def labels_of(dataset: Any, student_config: Any, column: str | None = None) -> NDArray[np.int64] | None:
    """Class ids in the student's order, `(examples,)`, -1 for a row without a label; None where no row has one.

    Names (of a ClassLabel, or text) are matched with the student's as a teacher's are; numbers are ids.
    Raises ValueError for a named column that is not there, and for labels that are no class of the student's.
    """
    if column is not None and column not in dataset.column_names:
        raise ValueError(f"there is no column {column!r} of labels, only {', '.join(dataset.column_names)}")
    column = column or next((name for name in LABELS if name in dataset.column_names), None)
    if column is None:
        return None
    values, theirs = dataset.with_format(None)[column][:], class_names(student_config)
    names = list(getattr(dataset.features[column], "names", None) or ()) or None
    if any(isinstance(value, str) for value in values):
        names = sorted({value for value in values if value is not None})
        values = [None if value is None else names.index(value) for value in values]
        if theirs is None:
            raise ValueError(
                f"the labels are names ({', '.join(names[:6])}), and the student's config has none: set id2label"
            )
    found = np.array([_class_id(value, column) for value in values], dtype=np.int64)
    return _in_students_order(found, names, theirs, student_config) if (found >= 0).any() else None


def _class_id(value: Any, column: str) -> int:
    if value is None:
        return -1
    if isinstance(value, list | tuple) or value != int(value):
        raise ValueError(f"the column {column!r} holds {value!r}: the report takes one class a row, an id or a name")
    return max(int(value), -1)


def _in_students_order(
    found: NDArray[np.int64], names: list[str] | None, theirs: list[str] | None, student_config: Any
) -> NDArray[np.int64]:
    nameless = names is None or names == [str(number) for number in range(len(names))]
    if theirs is None or names is None or nameless:
        classes = getattr(student_config, "num_labels", None) or found.max() + 1
        if found.max() >= classes:
            raise ValueError(f"labels run up to {found.max()}, the student's classes from 0 to {classes - 1}")
        return found
    return np.array([*_ids_by_name(names, theirs), -1])[found]


def _ids_by_name(names: list[str], theirs: list[str]) -> list[int]:
    """Text files may lack a class that the student knows; a label that it does not know is an error."""
    known = {"".join(name.split()).casefold(): number for number, name in enumerate(theirs)}
    plain = ["".join(name.split()).casefold() for name in names]
    if set(plain) - set(known):
        raise ValueError(
            f"the data's classes are {names}, the student's {theirs}: label maps that differ cannot be compared; rename the "
            "classes of one, or take data of the student's task"
        )
    return [known[name] for name in plain]
