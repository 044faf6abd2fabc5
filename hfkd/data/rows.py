"""What the trainer asks of rows: a number for each, their lengths, and what their labels look like."""

from __future__ import annotations

from typing import Any


def label_of_first_row(*datasets: Any) -> Any:
    """The label of the first row of the first data set that shows one; None where none does.

    A torch IterableDataset is not looked into: its rows may not come twice.
    """
    for dataset in datasets:
        row = first_row(next(iter(dataset.values()), None) if isinstance(dataset, dict) else dataset)
        found = next((row[name] for name in ("labels", "label") if name in row), None) if hasattr(row, "keys") else None
        if found is not None:
            return found
    return None


def first_row(dataset: Any) -> Any:
    if hasattr(dataset, "__len__"):
        return dataset[0] if len(dataset) else None
    return next(iter(dataset), None) if hasattr(dataset, "column_names") else None  # a stream of `datasets`


def problem_type_of_label(label: Any) -> str:
    """As transformers' heads guess it from a batch: several floats are several labels (one number is regression only
    where the head has one output, which its configuration says)."""
    several = isinstance(label, list | tuple) or getattr(label, "ndim", 0) == 1
    floats = several and len(label) and (isinstance(label[0], float) or "float" in str(getattr(label[0], "dtype", "")))
    return "multi_label_classification" if floats else "single_label_classification"


def lengths_of(dataset: Any, name: str, length_column: str | None = None) -> list[int]:
    """Tokens of each row: of the column `name`, or what `length_column` says where the data has it."""
    columns = getattr(dataset, "column_names", None) or []
    if length_column in columns:
        return list(dataset[length_column])
    if name in columns:
        return [len(row) for row in dataset.select_columns(name).with_format(None)[name]]
    row = first_row(dataset)
    if row is None or name not in row:
        raise ValueError(
            f"group_by_length needs a column {name!r} or {length_column!r}, the rows have {sorted(row or ())}: pictures of one "
            "size have no lengths; set train_sampling_strategy='random'"
        )
    return [len(row[name]) for row in dataset]  # made on the fly, by a transform


def numbered_for(collator: Any, dataset: Any) -> Any:
    """Numbered rows where the collator draws something for each of them, and elsewhere where numbers cost nothing."""
    if isinstance(dataset, dict):
        return {name: numbered_for(collator, part) for name, part in dataset.items()}
    countable = hasattr(dataset, "column_names") and hasattr(dataset, "__len__")
    draws = getattr(collator, "view", "plain") != "plain"
    return with_example_ids(dataset) if draws or countable else dataset


def with_example_ids(dataset: Any) -> Any:
    """Rows numbered where they are not: keyed randomness needs a name for every example.

    Raises TypeError for rows that cannot be numbered (a torch data set or a stream without `example_id`).
    """
    if dataset is None or isinstance(dataset, str):
        return dataset
    if isinstance(dataset, dict):
        return {name: with_example_ids(part) for name, part in dataset.items()}
    if hasattr(dataset, "column_names") and hasattr(dataset, "__len__"):
        ready = "example_id" in dataset.column_names
        return dataset if ready else dataset.add_column("example_id", list(range(len(dataset))))
    row = first_row(dataset)
    if hasattr(row, "keys") and "example_id" not in row:
        raise TypeError(
            f"rows of {type(dataset).__name__} need an `example_id` (the row number), which keys what is drawn for them: add "
            "it, or pass a datasets.Dataset, where it is added for you"
        )
    return dataset
