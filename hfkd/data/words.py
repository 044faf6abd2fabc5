"""Token classification: words with one label each, as student and teacher read them.

Two tokenizers cut the same words into different pieces. Both answer for a word on its first piece, so the word is what
a student's logits and a teacher's are matched on: `teacher_positions` says where the teacher's answer to the same word
stands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hfkd.data.collate import IGNORED
from hfkd.data.text import check_max_length, encoded_rows, tokens_of

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


def tokenize_words(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    word_column: str = "tokens",
    label_column: str = "ner_tags",
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
) -> Dataset:
    """Rows of words and class ids (lists of one length) as an encoder for token classification reads them.

    input_ids, attention_mask (and token_type_ids where the model reads them): lists of `max_length` ints or fewer.
    labels: one per token, the word's class id on the word's first piece, -100 on its other pieces and special tokens.
    example_id: the row number. With a `teacher_tokenizer` also teacher_input_ids, teacher_attention_mask (and
    teacher_token_type_ids), and teacher_positions: for each token of the student that carries a label, the index of the
    teacher's token that starts the same word, 0 elsewhere. Other columns are dropped.

    A word that one of the two does not see, because its text is cut there or has no piece for it, has no label: both
    always answer the same words. The pieces are those of the words joined by single spaces, so that byte-level
    tokenizers see the spaces that they have learned.

    Raises `ValueError` for missing columns, labels that are no class ids or not one per word, a `max_length` that does
    not fit, and tokenizers written in Python, which do not tell which word a piece is from.
    """
    _check_columns(dataset, word_column, label_column)
    tokenizers = {"the tokenizer": tokenizer}
    if teacher_tokenizer is not None:
        tokenizers["the teacher's tokenizer"] = teacher_tokenizer
    for whose, one in tokenizers.items():
        check_max_length(one, max_length, whose=whose)
        if not one.is_fast:
            raise ValueError(f"{whose}, {type(one).__name__}, does not tell which word a piece is from: use a fast one")

    def encode(rows: Mapping[str, list], numbers: list[int]) -> dict[str, list]:
        words = [_in_running_text(row) for row in rows[word_column]]
        encoded = tokens_of(tokenizer, words, is_split_into_words=True, max_length=max_length)
        starts = [_first_pieces(encoded.word_ids(row)) for row in range(len(words))]
        theirs, their_starts = None, starts
        if teacher_tokenizer is not None:
            theirs = tokens_of(teacher_tokenizer, words, is_split_into_words=True, max_length=max_length)
            their_starts = [_first_pieces(theirs.word_ids(row)) for row in range(len(words))]
        columns: dict[str, list] = {**encoded, "example_id": numbers, "labels": []}
        positions = []
        for row, labels in enumerate(rows[label_column]):
            _check_labels(labels, rows[word_column][row], numbers[row], label_column)
            shared = {word: place for word, place in starts[row].items() if word in their_starts[row]}
            length = len(encoded["input_ids"][row])
            columns["labels"].append(_spread({place: labels[word] for word, place in shared.items()}, length, IGNORED))
            positions.append(_spread({place: their_starts[row][word] for word, place in shared.items()}, length, 0))
        if theirs is not None:
            columns |= {f"teacher_{name}": values for name, values in theirs.items()}
            columns["teacher_positions"] = positions
        return columns

    return encoded_rows(dataset, encode, dataset.column_names)


def _in_running_text(words: Sequence[str]) -> list[str]:
    """Each word but the first with the space before it. Alone, byte-level tokenizers would read it as glued to the last."""
    return [f" {word}" if place and word else word for place, word in enumerate(words)]


def _first_pieces(word_ids: Sequence[int | None]) -> dict[int, int]:
    """For each word that has a piece, the index of its first."""
    first: dict[int, int] = {}
    for place, word in enumerate(word_ids):
        if word is not None:
            first.setdefault(word, place)
    return first


def _spread(values: Mapping[int, int], length: int, fill: int) -> list[int]:
    return [values.get(place, fill) for place in range(length)]


def _check_columns(dataset: Dataset, word_column: str, label_column: str) -> None:
    for name, column in (("word_column", word_column), ("label_column", label_column)):
        if column not in dataset.features:
            there = ", ".join(dataset.column_names)
            raise ValueError(f"{name} is {column!r}, and the data has no such column: its columns are {there}")


def _check_labels(labels: Sequence[Any], words: Sequence[str], row: int, column: str) -> None:
    if len(labels) != len(words):
        raise ValueError(f"row {row} has {len(words)} words and {len(labels)} labels in {column!r}: one each is needed")
    wrong = next((label for label in labels if not isinstance(label, int)), None)
    if wrong is not None:
        raise ValueError(
            f"row {row} has the label {wrong!r} in {column!r}: labels of words are class ids, whole numbers"
        )
