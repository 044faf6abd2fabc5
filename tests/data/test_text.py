"""The text loader: every file type, every error, the order of labels, and what `tokenize` gives."""

import json
import logging
from pathlib import Path

import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from hfkd.data import embedded
from hfkd.data.text import TEXT_TASKS, TextTask, label_names, load_text, tokenize

SCHEMAS = Path(__file__).parent / "schemas"
ROWS = [
    {"text": "good", "label": "pos"},
    {"text": 'bad, "really"\tbad', "label": "neg"},
    {"text": "fine", "label": "pos"},
]


def _write(path, rows):
    kind = path.suffix
    frame = Dataset.from_list(rows).to_pandas()
    if kind in (".csv", ".tsv"):
        frame.to_csv(path, index=False, sep="," if kind == ".csv" else "\t")
    elif kind == ".parquet":
        frame.to_parquet(path)
    elif kind == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def train_file(tmp_path):
    return _write(tmp_path / "train.jsonl", ROWS)


@pytest.fixture(scope="module")
def tokenizer():
    try:
        return embedded.byte_level_tokenizer(max_length=64)
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("extension", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_every_file_type_gives_the_same_rows(tmp_path, extension):
    """A file type with its own idea of quoting or label order trains another task under the same name."""
    path = _write(tmp_path / f"data.{extension}", ROWS)
    splits = load_text(train_file=path, test_file=path)
    assert list(splits) == ["train", "test"]
    assert splits["test"]["text"][:] == [row["text"] for row in ROWS]
    assert splits["test"]["label"][:] == [1, 0, 1]
    assert label_names(splits) == label_names(splits["train"]) == ["neg", "pos"]


def test_a_text_file_is_unlabelled(tmp_path):
    """Labels invented for unlabelled lines would be learned."""
    path = tmp_path / "lines.txt"
    path.write_text("first line\n\nsecond line\n")
    splits = load_text(train_file=path, require_labels=False)
    assert splits["train"].column_names == ["text"]
    assert splits["train"]["text"][:] == ["first line", "second line"]
    with pytest.raises(ValueError, match="no named labels: its columns are text"):
        label_names(splits)
    with pytest.raises(ValueError, match=r"fine-tuning needs labels: --label_column; .*columns are text"):
        load_text(train_file=path)


@pytest.mark.parametrize("word", ["None", "NA", "null", "nan"])
def test_words_that_look_like_gaps_are_words(tmp_path, word):
    """Reading the label "None" as a gap loses a whole class of relation data."""
    path = _write(tmp_path / "data.csv", [{"text": word, "label": word}, {"text": "x", "label": "yes"}])
    splits = load_text(train_file=path)
    assert splits["train"]["text"][:] == [word, "x"]
    assert word in label_names(splits)


def test_numbers_are_sorted_as_numbers_and_agree_between_files(tmp_path):
    """Sorted as strings, class 10 comes before class 2 and every published class id is off."""
    rows = [{"text": "a", "label": number} for number in (10, 2, 0)]
    train, test = _write(tmp_path / "train.csv", rows), _write(tmp_path / "test.jsonl", rows[:2])
    splits = load_text(train_file=train, test_file=test)
    assert label_names(splits) == ["0", "2", "10"]
    assert splits["test"]["label"][:] == [2, 1]


def test_other_column_names(tmp_path):
    """A loader that insists on its own names makes people rewrite their files by hand."""
    path = _write(tmp_path / "data.csv", [{"sentence": "a", "class": "x"}, {"sentence": "b", "class": "y"}])
    splits = load_text(train_file=path, text_column="sentence", label_column="class")
    assert splits["train"].column_names == ["text", "label"]
    with pytest.raises(ValueError, match=r"no text column 'text': --text_column; columns are sentence, class"):
        load_text(train_file=path)
    with pytest.raises(ValueError, match=r"fine-tuning needs labels: --label_column; .*columns are sentence, class"):
        load_text(train_file=path, text_column="sentence")
    with pytest.raises(ValueError, match="there is no such column: --label_column"):
        load_text(train_file=path, text_column="sentence", label_column="klass", require_labels=False)


def test_empty_rows_are_dropped_and_counted(tmp_path, caplog):
    """Empty texts train the model on the class prior; dropping them in silence hides a broken file."""
    rows = [*ROWS, {"text": "", "label": "pos"}, {"text": " \n", "label": "neg"}, {"text": None, "label": "pos"}]
    with caplog.at_level(logging.WARNING, logger="hfkd.data.text"):
        splits = load_text(train_file=_write(tmp_path / "data.jsonl", rows))
    assert len(splits["train"]) == 3
    assert "dropped 3 of 6 rows of the train split: their text is empty" in caplog.text
    with pytest.raises(ValueError, match="the train split has no text: all of its 2 rows"):
        load_text(train_file=_write(tmp_path / "empty.jsonl", rows[3:5]))


def test_labels_that_train_does_not_know(tmp_path, train_file):
    """An unknown test label mapped to any id at all makes the score meaningless."""
    test = _write(tmp_path / "test.jsonl", [{"text": "a", "label": "neutral"}])
    with pytest.raises(ValueError, match=r"the test split has labels that train does not: \['neutral'\]; known are"):
        load_text(train_file=train_file, test_file=test)
    train, test = (
        _write(tmp_path / f"{name}.csv", [{"text": "a", "label": n} for n in labels])
        for name, labels in (("t", (0, 1)), ("u", (-1, -1)))
    )
    with pytest.raises(ValueError, match=r"\['-1'\] \(-1 often stands for hidden labels"):
        load_text(train_file=train, test_file=test)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["a", None, "b"], "1 of 3 rows of the train split have no label in 'label', the first is row 1"),
        ([0.25, 0.5, 1.0], "holds 0.25: a label is one class"),
        ([["a"], ["b"], ["a", "b"]], r"holds \['a'\]: a label is one class"),
        (["a", "a", "a"], r"two classes or more: 'label' of the train split has only \['a'\]"),
    ],
)
def test_labels_that_are_not_classes(tmp_path, labels, message):
    """A regression target or a gap taken for a class gives a model that cannot be right."""
    rows = [{"text": "a", "label": label} for label in labels]
    with pytest.raises(ValueError, match=message):
        load_text(train_file=_write(tmp_path / "data.jsonl", rows))


def test_files_that_cannot_be_used(tmp_path, train_file):
    """The builders' own errors name a cache folder instead of the file that is wrong."""
    with pytest.raises(FileNotFoundError, match=r"there is no file .*gone.csv for the train split"):
        load_text(train_file=tmp_path / "gone.csv")
    with pytest.raises(ValueError, match=r"extension '.xlsx' is unknown, known are .csv"):
        load_text(train_file=_write(tmp_path / "data.xlsx", ROWS))
    (tmp_path / "broken.jsonl").write_text('{"text": "a"\n{{{')
    with pytest.raises(ValueError, match=r"broken.jsonl cannot be read as jsonl"):
        load_text(train_file=tmp_path / "broken.jsonl")
    (tmp_path / "void.csv").write_text("")
    with pytest.raises(ValueError, match=r"void.csv cannot be read as csv"):
        load_text(train_file=tmp_path / "void.csv")
    with pytest.raises(ValueError, match=r"holds .*, not text"):
        load_text(train_file=_write(tmp_path / "lists.jsonl", [{"text": ["a"], "label": 0}]))
    with pytest.raises(ValueError, match="--train_file is missing"):
        load_text(test_file=train_file)


def test_sources_that_do_not_go_together(train_file):
    """Two sources at once: one is ignored, and the card names the wrong one."""
    with pytest.raises(ValueError, match="unknown task 'imdb': the known ones are movie_sentences, "):
        load_text("imdb")
    with pytest.raises(ValueError, match="the task movie_sentences brings its own data, and files are given too"):
        load_text("movie_sentences", train_file=train_file)
    with pytest.raises(ValueError, match="choose one source of data"):
        load_text("twitter_emotion", dataset_name="some/id")
    with pytest.raises(ValueError, match="choose one source of data"):
        load_text(dataset_name="some/id", train_file=train_file)
    with pytest.raises(ValueError, match="no data: give --task"):
        load_text()


@pytest.mark.parametrize("task", ["chemprot", "acl_arc", "sci_erc"])
def test_tasks_without_an_id_ask_for_files(task, train_file):
    """A guessed Hub id loads somebody's variant of the data, and the score is compared with the paper's."""
    with pytest.raises(ValueError, match=f"the task {task} needs --train_file and --test_file"):
        load_text(task)
    assert len(load_text(task, train_file=train_file)["train"]) == 3


def test_no_network_names_the_id_and_the_ways_out(monkeypatch):
    """A bare connection error leaves people on a closed machine without a next step."""

    def refuse(*arguments, **options):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(ConnectionError) as caught:
        load_text("twitter_emotion")
    for words in ("cardiffnlp/tweet_eval", "--train_file", "movie_sentences", "local folder", "cache"):
        assert words in str(caught.value)


def test_an_id_that_is_not_there_is_not_blamed_on_the_network(monkeypatch):
    """A typing error reported as a network error costs an afternoon."""

    def refuse(*arguments, **options):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'no/such' doesn't exist on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(FileNotFoundError, match="'no/such' is no folder here and no data set on the Hub"):
        load_text(dataset_name="no/such")


def test_local_folders(tmp_path, monkeypatch):
    """A folder that only one of the two usual writers can fill is no offline way for the other."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "files").mkdir()
    for split in ("train", "test"):
        _write(tmp_path / "files" / f"{split}.csv", ROWS)
    assert list(load_text(dataset_name=str(tmp_path / "files"))) == ["train", "test"]
    splits = DatasetDict(train=Dataset.from_list(ROWS), validation=Dataset.from_list(ROWS))
    splits.save_to_disk(tmp_path / "saved")
    assert list(load_text(dataset_name=str(tmp_path / "saved"))) == ["train", "validation"]
    splits["train"].save_to_disk(tmp_path / "single")
    assert list(load_text(dataset_name=str(tmp_path / "single"))) == ["train"]
    DatasetDict(other=splits["train"]).save_to_disk(tmp_path / "other")
    with pytest.raises(ValueError, match="has no split 'train': its splits are other"):
        load_text(dataset_name=str(tmp_path / "other"))


@pytest.mark.parametrize("task", [task for task, row in TEXT_TASKS.items() if row.path])
def test_rows_with_an_id_work_on_their_schema(task, monkeypatch):
    """A wrong column or class order in the table is found on the first day with a network, in front of a user."""
    row = TEXT_TASKS[task]
    fixture = Dataset.from_json(str(SCHEMAS / f"{task}.jsonl"), keep_in_memory=True)
    names = list(row.label_names or ())
    hub = fixture.cast(Features(text=Value("string"), label=ClassLabel(names=names)))
    calls = []

    def stored(*arguments):
        calls.append(arguments)
        return DatasetDict({split: hub for split in (row.train, row.validation, row.test)})

    monkeypatch.setattr(datasets, "load_dataset", stored)
    splits = load_text(task)
    assert calls == [(row.path, row.name)]
    assert list(splits) == ["train", "validation", "test"]
    assert label_names(splits) == names
    assert splits["test"]["label"][:] == fixture["label"][:]
    assert row.source and set(fixture["label"][:]) == set(range(len(names))) and len(fixture) == 8


@pytest.mark.parametrize("task", [task for task, row in TEXT_TASKS.items() if row.path])
def test_schema_fixtures_load_as_files(task):
    """A fixture that the loader cannot read proves nothing about the row."""
    splits = load_text(train_file=SCHEMAS / f"{task}.jsonl")
    assert (len(splits["train"]), label_names(splits)) == (8, ["0", "1", "2", "3"])


def test_class_names_in_another_order_are_an_error(monkeypatch):
    """Swapped class names give a teacher that is confidently wrong."""
    features = Features(text=Value("string"), label=ClassLabel(names=["joy", "anger", "optimism", "sadness"]))
    wrong = Dataset.from_dict({"text": ["a"], "label": [0]}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments: DatasetDict(train=wrong))
    with pytest.raises(ValueError, match=r"names its classes \['joy', .*the task expects \['anger'"):
        load_text("twitter_emotion")


def test_movie_sentences_are_split_by_movie():
    """A movie in both splits inflates test accuracy."""
    try:
        splits = load_text("movie_sentences")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    groups = [set(splits[split]["group"][:]) for split in ("train", "validation", "test")]
    assert [len(group) for group in groups] == [357, 50, 100]
    assert not (groups[0] & groups[1] or groups[0] & groups[2] or groups[1] & groups[2])
    assert sum(map(len, splits.values())) == 12752
    assert label_names(splits) == ["rotten", "fresh"]
    assert set(load_text("movie_sentences", seed=1)["test"]["group"][:]) != groups[2]


def test_equal_tweets_are_on_one_side():
    """A headline tweeted twice, once in each split, is a test of memory."""
    try:
        splits = load_text("health_tweets")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    assert not set(splits["train"]["text"][:]) & set(splits["test"]["text"][:])
    assert sum(map(len, splits.values())) == 63317
    assert set(splits["test"]["label"][:]) == set(range(16))


def test_tokenize_gives_what_an_encoder_reads(train_file, tokenizer):
    """A column left over reaches forward as an unknown argument; a lost row number unkeys every random choice."""
    train = load_text(train_file=train_file)["train"]
    encoded = tokenize(train, tokenizer, max_length=6)
    assert set(encoded.column_names) == {"input_ids", "attention_mask", "label", "example_id"}
    assert encoded["example_id"][:] == [0, 1, 2]
    assert encoded["label"][:] == [1, 0, 1] and label_names(encoded) == ["neg", "pos"]
    for ids, mask in zip(encoded["input_ids"], encoded["attention_mask"], strict=True):
        assert ids[0] == 0 and ids[-1] == 2 and len(ids) == len(mask) <= 6
    assert encoded[:] == tokenize(train, tokenizer, max_length=6)[:]


def test_tokenize_pads_when_asked_and_works_without_labels(tmp_path, tokenizer):
    """Shapes that change from step to step recompile a compiled model each time."""
    (tmp_path / "lines.txt").write_text("one\ntwo words here\n")
    train = load_text(train_file=tmp_path / "lines.txt", require_labels=False)["train"]
    encoded = tokenize(train, tokenizer, max_length=9, pad_to_max_length=True)
    assert {len(ids) for ids in encoded["input_ids"]} == {9}
    assert [sum(mask) for mask in encoded["attention_mask"]] == [3, 5]
    assert "label" not in encoded.column_names


@pytest.mark.parametrize("max_length", [0, 2, 65])
def test_tokenize_refuses_lengths_the_model_cannot_take(train_file, tokenizer, max_length):
    """A text longer than the position table is an index error deep inside the first step, on the device."""
    with pytest.raises(
        ValueError, match=f"max_length is {max_length}: the tokenizer needs more than 2 and takes at most 64"
    ):
        tokenize(load_text(train_file=train_file)["train"], tokenizer, max_length=max_length)


def test_tasks_of_two_texts_keep_them_apart(tmp_path, monkeypatch, tokenizer):
    """Two texts joined without the separator hide from the model where the question ends."""
    monkeypatch.setitem(TEXT_TASKS, "pairs", TextTask(None, text_columns=("premise", "hypothesis"), source="made up"))
    rows = [{"premise": "a b", "hypothesis": "c", "label": 0}, {"premise": "d", "hypothesis": "e", "label": 1}]
    train = load_text("pairs", train_file=_write(tmp_path / "pairs.jsonl", rows))["train"]
    assert train.column_names == ["text", "text_pair", "label"]
    ids = tokenize(train, tokenizer, max_length=12)["input_ids"][0]
    assert tokenizer.decode(ids) == "<s>a b</s></s>c</s>"
