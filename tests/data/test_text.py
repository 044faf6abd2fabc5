"""The text loader: every file type, every error, the order of labels, and what `tokenize` gives."""

import json
import logging
from pathlib import Path

import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from hfkd.data import embedded
from hfkd.data.text import TEXT_TASKS, TextTask, label_names, load_text, same_tokenizer, tokenize
from hfkd.testing import tiny_tokenizer

SCHEMAS = Path(__file__).parent / "schemas"
# What the Hub declares for each id of the table, written down apart from it
DECLARED = json.loads((SCHEMAS / "declared.json").read_text())
HUB_TASKS = [task for task, row in TEXT_TASKS.items() if row.path]
GLUE_TASKS = [task for task, row in TEXT_TASKS.items() if row.path == "nyu-mll/glue"]
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
    path = _write(tmp_path / "data.csv", [{"phrase": "a", "kind": "x"}, {"phrase": "b", "kind": "y"}])
    splits = load_text(train_file=path, text_column="phrase", label_column="kind")
    assert splits["train"].column_names == ["text", "label"]
    with pytest.raises(ValueError, match=r"no text column 'text' \(or sentence, review, content\): --text_column; col"):
        load_text(train_file=path)
    with pytest.raises(ValueError, match=r"fine-tuning needs labels: --label_column; .*columns are phrase, kind"):
        load_text(train_file=path, text_column="phrase")
    with pytest.raises(ValueError, match="there is no such column: --label_column"):
        load_text(train_file=path, text_column="phrase", label_column="klass", require_labels=False)


@pytest.mark.parametrize(
    ("text", "label"), [("text", "labels"), ("sentence", "label"), ("review", "class"), ("content", "category")]
)
def test_usual_column_names_are_found(tmp_path, text, label):
    """The first try on one's own file ends in an error about a column that anybody can see."""
    path = _write(tmp_path / "data.jsonl", [{text: "a", label: "x"}, {text: "b", label: "y"}])
    train = load_text(train_file=path)["train"]
    assert train[:] == {"text": ["a", "b"], "label": [0, 1]}
    assert load_text(train_file=path, test_file=path)["test"][:] == train[:]


def test_two_columns_that_fit_are_a_question_and_not_a_guess(tmp_path):
    """A model trained on the wrong one of two columns looks merely bad."""
    rows = [{"review": "a", "content": "b", "class": "x", "category": "u"} for _ in range(2)]
    rows[1] |= {"class": "y", "category": "v"}
    path = _write(tmp_path / "data.jsonl", rows)
    with pytest.raises(ValueError, match="the text column may be review or content: choose with --text_column"):
        load_text(train_file=path)
    with pytest.raises(ValueError, match="the label column may be class or category: choose with --label_column"):
        load_text(train_file=path, text_column="review")
    named = load_text(train_file=path, text_column="content", label_column="category")["train"]
    assert named["text"][:] == ["b", "b"] and label_names(named) == ["u", "v"]
    unlabelled = load_text(train_file=path, text_column="review", require_labels=False)["train"]
    assert unlabelled.column_names == ["text"]  # pre-training asks for no label, so there is nothing to choose


def test_the_canonical_column_wins_over_the_usual_ones(tmp_path):
    """A file that worked must not stop working because it has one more column."""
    path = _write(tmp_path / "data.jsonl", [{"text": "a", "review": "b", "label": n, "category": "c"} for n in (0, 1)])
    assert load_text(train_file=path)["train"][:] == {"text": ["a", "a"], "label": [0, 1]}


@pytest.mark.parametrize(
    "pair",
    [("premise", "hypothesis"), ("question1", "question2"), ("question", "sentence"), ("text", "text_pair")],
)
def test_pairs_in_files_are_found_and_half_a_pair_is_refused(tmp_path, pair):
    """A model of two texts that is given one of them learns the bias of the other and scores far above chance."""
    rows = [{pair[0]: "a", pair[1]: "b", "label": n} for n in (0, 1)]
    path = _write(tmp_path / "data.jsonl", rows)
    found = load_text(train_file=path)["train"]
    assert found[:] == {"text": ["a", "a"], "text_pair": ["b", "b"], "label": [0, 1]}
    named = load_text(train_file=path, text_column=pair[1], text_pair_column=pair[0])["train"]
    assert named["text"][:] == ["b", "b"] and named["text_pair"][:] == ["a", "a"]
    both = f"--text_column {pair[0]} --text_pair_column {pair[1]}"
    for column in pair:
        with pytest.raises(ValueError, match=f"pairs of texts, and only --text_column {column} is named: .*{both}"):
            load_text(train_file=path, text_column=column)


def test_half_of_a_tasks_pair_and_half_a_choice_are_refused(monkeypatch, tmp_path):
    """MNLI on hypotheses alone is another task under the same name."""
    path = _write(tmp_path / "data.jsonl", [{"a": "x", "b": "y", "label": n} for n in (0, 1)])
    for first in (None, "b"):
        with pytest.raises(ValueError, match="--text_pair_column b is the second of two texts: name the first"):
            load_text(train_file=path, text_column=first, text_pair_column="b")
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments: _hub("mnli"))
    with pytest.raises(ValueError, match="only --text_column hypothesis.*--text_pair_column hypothesis"):
        load_text("mnli", text_column="hypothesis")


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
        ([0.25, 0.5, 1.0], "holds 0.25: a label is one class.* give problem_type=regression"),
        ([["a"], ["b"], ["a", "b"]], r"holds \['a'\]: a label is one class.*problem_type=multi_label_classification"),
        (["a", "a", "a"], r"two classes or more: 'label' of the train split has only \['a'\]"),
    ],
)
def test_labels_that_are_not_classes(tmp_path, labels, message):
    """A regression target or a gap taken for a class gives a model that cannot be right."""
    rows = [{"text": "a", "label": label} for label in labels]
    with pytest.raises(ValueError, match=message):
        load_text(train_file=_write(tmp_path / "data.jsonl", rows))


def test_scores_in_csv_are_not_taken_for_classes(tmp_path):
    """A csv of 5,000 different scores gives a classifier of 5,000 classes, one example each."""
    path = _write(tmp_path / "data.csv", [{"text": "a", "label": score} for score in (1.0, 2.5, 3.0)])
    with pytest.raises(ValueError, match="holds 2.5: .* give problem_type=regression"):
        load_text(train_file=path)


@pytest.mark.parametrize("extension", ["csv", "jsonl", "parquet"])
def test_numbers_for_regression(tmp_path, extension):
    """A score rounded to a class, or shifted by the sorting of classes, is another target."""
    path = _write(tmp_path / f"data.{extension}", [{"text": "a", "label": score} for score in (1.0, 2.5, -3.25)])
    splits = load_text(train_file=path, problem_type="regression")
    assert splits["train"]["label"][:] == [1.0, 2.5, -3.25]
    assert splits["train"].features["label"] == Value("float32")
    with pytest.raises(ValueError, match="no named labels"):
        label_names(splits)


def test_targets_that_cannot_be_regressed_on(tmp_path, train_file, monkeypatch):
    """One NaN target makes every weight NaN; hidden test labels of -1 give a correlation of nothing."""
    with pytest.raises(ValueError, match="holds 'pos': regression needs finite numbers"):
        load_text(train_file=train_file, problem_type="regression")
    with pytest.raises(ValueError, match="holds 'nan': regression needs finite numbers"):
        nan = _write(tmp_path / "nan.csv", [{"text": "a", "label": "nan"}])
        load_text(train_file=nan, problem_type="regression")
    train, test = (
        _write(tmp_path / f"{name}.jsonl", [{"text": "a", "label": score}] * 2)
        for name, score in (("t", 2.5), ("u", -1))
    )
    with pytest.raises(ValueError, match="all labels of the test split are -1, which stands for hidden labels"):
        load_text(train_file=train, test_file=test, problem_type="regression")
    with pytest.raises(ValueError, match="unknown problem_type 'ranking': choose among single_label_classification"):
        load_text(train_file=train, problem_type="ranking")
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments: _hub("cola"))
    with pytest.raises(ValueError, match=r"holds the classes \['unacceptable', .*cannot be regressed on"):
        load_text("cola", problem_type="regression")


@pytest.mark.parametrize("extension", ["json", "parquet"])
@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([["b", "a"], [], ["c"]], ["a", "b", "c"]),
        ([[10, 2], [], [30]], ["2", "10", "30"]),
        ([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]], ["0", "1", "2"]),
    ],
)
def test_several_classes_a_text(tmp_path, extension, labels, names):
    """A class left out of a list, or moved to another place in it, is trained as its contrary."""
    path = _write(tmp_path / f"data.{extension}", [{"text": "a", "labels": label} for label in labels])
    splits = load_text(train_file=path, test_file=path, problem_type="multi_label_classification")
    assert splits["test"]["label"][:] == [[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
    assert splits["train"].features["label"].feature == Value("float32")
    assert label_names(splits) == names
    tokens = tokenize(splits["test"], tiny_tokenizer(), max_length=8)
    assert tokens["label"][2] == [0.0, 0.0, 1.0] and label_names(tokens.select([0])) == names


def test_several_classes_that_cannot_be_used(tmp_path):
    """A list of class ids read as ones and zeros, or the other way round, trains nonsense without a word."""

    def load(labels, **files):
        path = _write(tmp_path / "data.jsonl", [{"text": "a", "label": label} for label in labels])
        return load_text(train_file=path, problem_type="multi_label_classification", **files)

    with pytest.raises(ValueError, match="holds 'a,b': several classes are a list, in json or parquet"):
        load(["a,b", "a"])
    with pytest.raises(ValueError, match=r"holds \[1.0\]: one 0.0 or 1.0 for each of 2 classes is needed"):
        load([[1.0, 0.0], [1.0]])
    with pytest.raises(ValueError, match=r"holds \[0.5, 0.0\]: one 0.0 or 1.0"):
        load([[1.0, 0.0], [0.5, 0.0]])
    test = _write(tmp_path / "test.jsonl", [{"text": "a", "label": ["c"]}])
    with pytest.raises(ValueError, match=r"the test split has labels that train does not: \['c'\]"):
        load([["a"], ["b"]], test_file=test)


@pytest.mark.parametrize(
    ("name", "content"), [("a.csv", "text,label\n"), ("b.jsonl", ""), ("c.json", "[]"), ("d.txt", "")]
)
def test_files_without_a_row(tmp_path, name, content):
    """An empty file is found in the first epoch, as a division by zero."""
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"{name} cannot be read as .*: it holds no row"):
        load_text(train_file=tmp_path / name, require_labels=False)


def test_an_empty_split(monkeypatch):
    """An empty split of a data set is found in the first evaluation, after the training."""
    splits = DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS).select([]))
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments: splits)
    with pytest.raises(ValueError, match=r"the test split is empty: it has columns \['text', 'label'\] and no row"):
        load_text(dataset_name="some/id")


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
    with pytest.raises(ValueError, match="unknown task 'imbd': the known ones are movie_sentences, "):
        load_text("imbd")
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


def _hub(task):
    """The data set as the Hub declares it: the fixture's rows in every split, the split's name behind each text."""
    declared = DECLARED[task]
    rows = Dataset.from_json(str(SCHEMAS / f"{task}.jsonl"), keep_in_memory=True)
    names, texts = declared["label_names"], [name for name, kind in rows.features.items() if kind == Value("string")]
    features = rows.features | {"label": ClassLabel(names=names) if names else Value("float32")}
    splits = DatasetDict()
    for split in declared["splits"]:
        columns = rows[:] | {text: [f"{value} ({split})" for value in rows[text]] for text in texts}
        if split in declared["hidden"]:
            columns["label"] = [-1] * len(rows)
        splits[split] = Dataset.from_dict(columns, features=Features(features))
    return splits


@pytest.mark.parametrize("task", HUB_TASKS)
def test_rows_with_an_id_work_on_their_schema(task, monkeypatch):
    """A wrong column or class order in the table is found on the first day with a network, in front of a user."""
    row, declared, calls = TEXT_TASKS[task], DECLARED[task], []

    def stored(*arguments):
        calls.append(arguments)
        return _hub(task)

    monkeypatch.setattr(datasets, "load_dataset", stored)
    splits = load_text(task)
    assert calls == [(declared["path"], declared["name"])]
    assert splits["train"].column_names == ["text", "text_pair", "label"][:: 3 - len(row.text_columns)]
    fixture = Dataset.from_json(str(SCHEMAS / f"{task}.jsonl"), keep_in_memory=True)
    assert row.source and len(fixture) == 8
    last = list(splits)[-1]
    assert splits[last]["label"][:] == pytest.approx(fixture["label"][:])
    for canonical, column in zip(("text", "text_pair"), row.text_columns, strict=False):
        assert [text.rpartition(" (")[0] for text in splits[last][canonical]] == fixture[column][:]
    if declared["label_names"]:
        assert label_names(splits) == declared["label_names"] == list(row.label_names)
        assert set(fixture["label"][:]) == set(range(len(row.label_names)))


@pytest.mark.parametrize("task", HUB_TASKS)
def test_schema_fixtures_load_as_files(task):
    """A fixture that the loader cannot read proves nothing about the row."""
    row = TEXT_TASKS[task]
    train = load_text(train_file=SCHEMAS / f"{task}.jsonl", problem_type=row.problem_type)["train"]
    assert len(train) == 8 and ("text_pair" in train.features) == (len(row.text_columns) == 2)
    if row.label_names:
        assert label_names(train) == [str(number) for number in range(len(row.label_names))]


@pytest.mark.parametrize("task", GLUE_TASKS)
def test_the_hidden_labels_of_glue_are_never_a_test(task, monkeypatch):
    """A score on labels that are all -1 is 0 for a perfect model, and looks like one."""
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments: _hub(task))
    splits = load_text(task)
    assert "test" not in splits and list(splits)[:2] == ["train", "validation"]
    for split, dataset in splits.items():
        assert -1 not in dataset["label"][:]
        origin = {"validation": TEXT_TASKS[task].validation[0]}.get(split, split)
        assert all(text.endswith(f" ({origin})") for text in dataset["text"])


def test_mnli_keeps_its_two_evaluations_and_its_class_order(monkeypatch):
    """A teacher whose classes stand in another order is confidently wrong; one split in place of the other is unseen."""
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments: _hub("mnli"))
    splits = load_text("mnli")
    assert list(splits) == ["train", "validation", "validation_mismatched"]
    assert splits["validation"]["text"][0].endswith("(validation_matched)")
    assert label_names(splits) == ["entailment", "neutral", "contradiction"]
    assert splits["validation_mismatched"]["label"][:] == [0, 0, 0, 1, 1, 1, 2, 2]


def test_the_similarities_of_stsb_survive(monkeypatch):
    """A similarity of 3.6 cut to class 3 takes away what the correlation is measured on."""
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments: _hub("stsb"))
    train = tokenize(load_text("stsb")["train"], tiny_tokenizer(), max_length=12)
    assert train["label"][:] == pytest.approx([5.0, 4.2, 3.6, 2.75, 1.4, 1.0, 0.0, 3.8])
    assert train.features["label"] == Value("float32")
    assert TEXT_TASKS["stsb"].problem_type == "regression"


@pytest.mark.parametrize("task", ["ag_news", "imdb"])
def test_settings_are_chosen_on_texts_held_out_of_train(task, monkeypatch):
    """Settings chosen on the test split make its score a training score; a repeated text makes validation a memory test."""
    names = DECLARED[task]["label_names"]
    features = Features(text=Value("string"), label=ClassLabel(names=names))
    texts = [f"text {number % 80}" for number in range(100)]  # 20 texts occur twice
    train = Dataset.from_dict({"text": texts, "label": [n % len(names) for n in range(100)]}, features=features)
    hub = DatasetDict(train=train, test=_hub(task)["test"])
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments: hub)
    splits = load_text(task)
    assert list(splits) == ["train", "validation", "test"]
    assert splits["test"]["text"][:] == hub["test"]["text"][:]
    kept, held_out = set(splits["train"]["text"]), set(splits["validation"]["text"])
    assert not kept & held_out and len(kept) == 72 and len(held_out) == 8
    assert load_text(task)["validation"][:] == splits["validation"][:]
    assert load_text(task, seed=1)["validation"][:] != splits["validation"][:]


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


def _wordpiece(**settings):
    try:
        tokenizer = embedded._embedded_wordpiece()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    for name, value in settings.items():
        setattr(tokenizer, name, value)
    return tokenizer


def _with_token_types():
    return _wordpiece(model_input_names=["input_ids", "token_type_ids", "attention_mask"])


def test_token_types_reach_the_models_that_read_them(tmp_path, tokenizer):
    """BERT without token types reads two texts as one; RoBERTa with them looks up a row its table does not have."""
    path = _write(tmp_path / "data.jsonl", [{"text": "a b", "text_pair": "c", "label": n} for n in (0, 1)])
    train = load_text(train_file=path)["train"]
    assert tokenize(train, _with_token_types(), max_length=8)["token_type_ids"][0] == [0, 0, 0, 0, 1, 1]
    assert "token_type_ids" not in tokenize(train, tokenizer, max_length=8).column_names


@pytest.mark.parametrize("padded", [False, True])
def test_the_teacher_reads_the_same_texts_with_its_own_tokenizer(train_file, padded):
    """A teacher that is fed the student's ids answers for another text, and confidently."""
    train, tokenizer, teacher = load_text(train_file=train_file)["train"], tiny_tokenizer(), _with_token_types()
    both = tokenize(train, tokenizer, max_length=9, pad_to_max_length=padded, teacher_tokenizer=teacher)
    student_alone, teacher_alone = (
        tokenize(train, one, max_length=9, pad_to_max_length=padded) for one in (tokenizer, teacher)
    )
    assert both.select_columns(student_alone.column_names)[:] == student_alone[:]
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        assert both[f"teacher_{name}"][:] == teacher_alone[name][:]
    assert "teacher_label" not in both.column_names and "teacher_example_id" not in both.column_names


def test_a_length_the_teacher_cannot_take(train_file, tokenizer):
    """A text longer than the teacher's position table is an index error deep inside the first step, on the device."""
    train = load_text(train_file=train_file)["train"]
    with pytest.raises(
        ValueError, match="max_length is 20: the teacher's tokenizer needs more than 2 and takes at most 16"
    ):
        tokenize(train, tokenizer, max_length=20, teacher_tokenizer=_wordpiece(model_max_length=16))


def test_same_tokenizer_tells_when_a_teacher_may_read_the_students_tokens(tokenizer, tmp_path):
    """Two tokenizers wrongly taken for one: the teacher reads noise. Settings of padding are no difference in ids."""
    wordpiece, again = _wordpiece(), _wordpiece()
    again("a longer text", padding="max_length", truncation=True, max_length=7)
    again.save_pretrained(tmp_path)
    assert same_tokenizer(wordpiece, again) and same_tokenizer(wordpiece, type(again).from_pretrained(tmp_path))
    assert same_tokenizer(tokenizer, tokenizer) and same_tokenizer(tiny_tokenizer(), tiny_tokenizer())
    assert not same_tokenizer(wordpiece, tokenizer)
    assert not same_tokenizer(tiny_tokenizer(50), tiny_tokenizer(51))


def test_same_tokenizer_sees_what_the_vocabulary_does_not_show():
    """A cased and an uncased model may share every piece, and read other ids for every name."""
    from tokenizers import normalizers, processors

    changed = {name: _wordpiece() for name in ("normalizer", "special tokens", "padding")}
    changed["normalizer"].backend_tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    changed["special tokens"].backend_tokenizer.post_processor = processors.BertProcessing(
        ("[SEP]", 102), ("[MASK]", 103)
    )
    changed["padding"].pad_token = "[UNK]"
    for other in changed.values():
        assert not same_tokenizer(_wordpiece(), other) and not same_tokenizer(other, _wordpiece())


def test_same_tokenizer_asks_for_token_types_of_pairs_only():
    """DistilBERT's teacher without token types reads two texts as one; refused for single texts, it could never teach."""
    without, with_types = _wordpiece(), _with_token_types()
    assert same_tokenizer(without, with_types) and same_tokenizer(with_types, without, pair=True)
    assert not same_tokenizer(without, with_types, pair=True)
    assert same_tokenizer(with_types, _with_token_types(), pair=True)
