"""What the trainer asks of rows: a number for each, and what their labels look like."""

from __future__ import annotations

from typing import Any


def label_of_first_row(dataset: Any) -> Any:
    """The label of row 0, where the data can be read by number; None otherwise."""
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__") or not len(dataset):
        return None
    row = dataset[0]
    return next((row[name] for name in ("labels", "label") if name in row), None) if hasattr(row, "keys") else None


def is_float(value: Any) -> bool:
    return isinstance(value, float) or "float" in str(getattr(value, "dtype", ""))


def with_example_ids(dataset: Any) -> Any:
    """Rows numbered where they are not: keyed randomness needs a name for every example.

    Raises TypeError for rows that cannot be numbered (a torch data set without `example_id`).
    """
    if dataset is None or isinstance(dataset, str):
        return dataset
    if isinstance(dataset, dict):
        return {name: with_example_ids(part) for name, part in dataset.items()}
    if hasattr(dataset, "column_names"):
        ready = "example_id" in (dataset.column_names or [])
        return dataset if ready else dataset.add_column("example_id", list(range(len(dataset))))
    if hasattr(dataset, "__len__") and "example_id" not in dataset[0]:
        raise TypeError(
            f"rows of {type(dataset).__name__} need an `example_id` (the row number), which keys their random masks: add it, "
            "or pass a datasets.Dataset, where it is added for you"
        )
    return dataset
