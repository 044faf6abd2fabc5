"""Words and pieces: where a label stands, which words both sides answer, and which pieces a model sees."""

from __future__ import annotations

import copy

import pytest
from datasets import ClassLabel, Dataset, Features, List, Value

from hfkd.data import embedded
from hfkd.data.collate import IGNORED, DistillationCollator
from hfkd.data.words import tokenize_words
from hfkd.testing import tiny_tokenizer

SENTENCES = [
    ["Hello", "unbelievably", "internationalised", "world", "!"],
    ["Reykjavik", "lies", "north", "of", "Ouagadougou", ",", "as", "everybody", "knows", "."],
    ["Yes"],
]


@pytest.fixture(scope="module")
def tokenizers():
    try:
        return {"wordpiece": embedded._embedded_wordpiece(), "byte level": embedded.byte_level_tokenizer(64)}
    except FileNotFoundError as error:
        pytest.skip(str(error))


def _rows(sentences, labels=None, column="ner_tags"):
    labels = labels or [list(range(1, len(words) + 1)) for words in sentences]  # each word has a label of its own
    features = Features({"tokens": List(Value("string")), column: List(ClassLabel(num_classes=12))})
    return Dataset.from_dict({"tokens": sentences, column: labels}, features=features)


@pytest.mark.parametrize("name", ["wordpiece", "byte level"])
def test_pieces_are_those_of_the_running_text(tokenizers, name):
    """Byte-level pieces without their spaces are other words: the model would be fed text it has never seen."""
    tokenizer = tokenizers[name]
    encoded = tokenize_words(_rows(SENTENCES), tokenizer, max_length=64)
    assert encoded["input_ids"][:] == tokenizer([" ".join(words) for words in SENTENCES])["input_ids"]
    assert set(encoded.column_names) == {"input_ids", "attention_mask", "labels", "example_id"}
    assert encoded["example_id"][:] == [0, 1, 2]


@pytest.mark.parametrize("name", ["wordpiece", "byte level"])
def test_a_word_is_labelled_on_its_first_piece_and_nowhere_else(tokenizers, name):
    """Labels on later pieces count long words more often, and a label on <s> trains a class on nothing."""
    tokenizer = tokenizers[name]
    encoded = tokenize_words(_rows(SENTENCES), tokenizer, max_length=64)
    for words, ids, labels in zip(SENTENCES, encoded["input_ids"], encoded["labels"], strict=True):
        lengths = [len(tokenizer.tokenize(" " * (place > 0) + word)) for place, word in enumerate(words)]
        expected = [IGNORED]
        for label, length in enumerate(lengths, start=1):
            expected += [label] + [IGNORED] * (length - 1)
        assert labels == [*expected, IGNORED] and len(labels) == len(ids)
        assert max(lengths) > 1 or len(words) == 1  # else the test says nothing about later pieces


@pytest.mark.parametrize("student, teacher", [("wordpiece", "byte level"), ("byte level", "wordpiece")])
@pytest.mark.parametrize("max_length", [64, 9, 7, 3])
def test_both_sides_answer_the_same_words(tokenizers, student, teacher, max_length):
    """A position off by one distils the neighbour's class; a word that one side lost distils whatever stands there."""
    ours, theirs = tokenizers[student], tokenizers[teacher]
    both = tokenize_words(_rows(SENTENCES), ours, max_length, teacher_tokenizer=theirs)
    alone = {
        name: tokenize_words(_rows(SENTENCES), one, max_length)
        for name, one in (("student", ours), ("teacher", theirs))
    }
    assert both["input_ids"][:] == alone["student"]["input_ids"][:]
    assert both["teacher_input_ids"][:] == alone["teacher"]["input_ids"][:]
    assert both["teacher_attention_mask"][:] == alone["teacher"]["attention_mask"][:]
    for row in range(len(SENTENCES)):
        on_student, on_teacher = (set(alone[name]["labels"][row]) - {IGNORED} for name in ("student", "teacher"))
        labels, positions = both["labels"][row], both["teacher_positions"][row]
        assert set(labels) - {IGNORED} == on_student & on_teacher
        for label, position in zip(labels, positions, strict=True):
            # alone, each word's label is its own: the teacher's token at the position starts the word of that label
            assert position == 0 if label == IGNORED else alone["teacher"]["labels"][row][position] == label


def test_words_are_cut_off_on_both_sides(tokenizers):
    """Above, a cut that never falls on different words would leave the rule for it untested."""
    ours, theirs = tokenizers["byte level"], tokenizers["wordpiece"]
    words = [["one", "two", "Schwarzenegger", "three", "four"]]  # 4 and 3 pieces
    long_teacher = tokenize_words(_rows(words), ours, 7, teacher_tokenizer=theirs)["labels"][0]
    long_student = tokenize_words(_rows(words), theirs, 7, teacher_tokenizer=ours)["labels"][0]
    alone = [set(tokenize_words(_rows(words), one, 7)["labels"][0]) for one in (ours, theirs)]
    assert alone[0] != alone[1]
    assert set(long_teacher) == set(long_student) == alone[0] & alone[1]


def test_a_word_without_a_piece_is_nobodys(tokenizers):
    """A control character is no piece for the one and a byte for the other: all words after it would be mismatched."""
    words = [["one", "\u0000", "", "two"]]
    both = tokenize_words(_rows(words), tokenizers["byte level"], 16, teacher_tokenizer=tokenizers["wordpiece"])
    assert [label for label in both["labels"][0] if label != IGNORED] == [1, 4]
    assert [position for position in both["teacher_positions"][0] if position] == [1, 2]


def test_rows_without_words(tokenizers):
    """One empty sentence in a corpus must not end the run, nor be trained on."""
    encoded = tokenize_words(
        _rows([["one"], []]), tokenizers["wordpiece"], 8, teacher_tokenizer=tokenizers["byte level"]
    )
    assert encoded["labels"][1] == [IGNORED, IGNORED] and encoded["teacher_positions"][1] == [0, 0]


def test_token_types_where_a_model_reads_them(tokenizers):
    """A teacher that reads token types answers another question without them."""
    teacher = copy.deepcopy(tokenizers["wordpiece"])
    teacher.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    encoded = tokenize_words(_rows(SENTENCES), tokenizers["wordpiece"], 16, teacher_tokenizer=teacher)
    assert encoded["teacher_token_type_ids"][2] == [0, 0, 0] and "token_type_ids" not in encoded.column_names


def test_a_column_called_labels(tokenizers):
    """The type of the old column, class ids from 0, must not be forced on labels that hold -100."""
    encoded = tokenize_words(_rows(SENTENCES, column="labels"), tokenizers["wordpiece"], 16, label_column="labels")
    assert encoded["labels"][2] == [IGNORED, 1, IGNORED]


def test_what_comes_out_goes_into_the_collator(tokenizers):
    """Padding that does not know teacher_positions would move the teacher's answers between words."""
    ours, theirs = tokenizers["byte level"], tokenizers["wordpiece"]
    rows = tokenize_words(_rows(SENTENCES), ours, 32, teacher_tokenizer=theirs)
    batch = DistillationCollator(ours, theirs)(list(rows))
    there = batch["labels"] != IGNORED
    found = batch["teacher_input_ids"].gather(1, batch["teacher_positions"])[there]
    first_pieces = [theirs.tokenize(word)[0] for words in SENTENCES for word in words]
    assert theirs.convert_ids_to_tokens(found) == first_pieces


# ---- errors ----


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            {"words": [["a"]], "ner_tags": [[0]]},
            "word_column is 'tokens', and the data has no such column: .* words, ner",
        ),
        ({"tokens": [["a"]], "tags": [[0]]}, "label_column is 'ner_tags', and the data has no such column"),
        ({"tokens": [["a"], ["b", "c"]], "ner_tags": [[0], [1]]}, "row 1 has 2 words and 1 labels in 'ner_tags'"),
        (
            {"tokens": [["a"]], "ner_tags": [["O"]]},
            "row 0 has the label 'O' in 'ner_tags': labels of words are class ids",
        ),
    ],
)
def test_data_that_cannot_be_used(rows, message):
    """Labels shifted by one word in one row are learned like all others."""
    with pytest.raises(ValueError, match=message):
        tokenize_words(Dataset.from_dict(rows), tiny_tokenizer(), max_length=8)


def test_tokenizers_that_cannot_be_used():
    """A text longer than the position table is an index error deep inside the first step, on the device."""
    rows, short = Dataset.from_dict({"tokens": [["w5"]], "ner_tags": [[0]]}), tiny_tokenizer()
    short.model_max_length = 8
    with pytest.raises(
        ValueError, match="max_length is 9: the teacher's tokenizer needs more than 2 and takes at most 8"
    ):
        tokenize_words(rows, tiny_tokenizer(), max_length=9, teacher_tokenizer=short)
    with pytest.raises(ValueError, match="max_length is 2: the tokenizer needs more than 2"):
        tokenize_words(rows, tiny_tokenizer(), max_length=2)
