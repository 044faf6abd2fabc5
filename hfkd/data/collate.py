"""Collators: the plain view of distillation, and corrupted views with keyed randomness.

Every random choice about an example is a function of (seed, round, epoch, example_id, view), never of the global
generator: only then are resumed runs equal to uninterrupted ones, two processes equal to one, and the masks of two
processes different (`set_seed` gives all ranks the same generator).
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

IGNORED = -100
TOKEN_COLUMNS = ("input_ids", "attention_mask", "token_type_ids", "special_tokens_mask")


class KeyedCollator:
    """Holds the seed, and where training stands in memory that data-loader workers share."""

    view: str  # names the random view; a cache stores it, and "plain" means deterministic

    def __init__(self, seed: int = 0):
        if seed < 0:
            raise ValueError(f"seed must be 0 or more, got {seed}")
        self.seed = seed
        # Shared memory, because persistent workers keep a copy of the collator over all epochs
        self._where = torch.zeros(2, dtype=torch.int64).share_memory_()

    def set_position(self, *, round: int, epoch: int) -> None:
        self._where[0], self._where[1] = round, epoch

    def generator(self, example_id: int) -> np.random.Generator:
        """The one source of randomness for this example in this epoch."""
        where = self._where.tolist()
        return np.random.default_rng((self.seed, *where, int(example_id), zlib.crc32(self.view.encode())))


class MaskedLMCollator(KeyedCollator):
    """Masks tokens for language modelling and says where, so that the head runs on the masked positions only.

    Each maskable token is chosen with probability `mlm_probability`; of the chosen, 80 % become the mask token, 10 % a
    random token, 10 % stay (the usual corruption; that the paper's text runs used it is a guess).

    features: dicts with `input_ids`, `example_id` and optionally `attention_mask`. Returns tensors
        input_ids (batch, tokens)       corrupted
        attention_mask (batch, tokens)
        clean_input_ids (batch, tokens) equal to where(labels != -100, labels, input_ids) of the usual collators
        masked_positions (positions,)   indices into the flattened batch x tokens grid, padded with 0
        masked_labels (positions,)      the tokens to predict there, padded with -100

    `positions` is a multiple of `positions_multiple`, so that few shapes occur; with `max_length` every row is padded to
    it and `positions` is at least what masking practically never exceeds (mean + 6 standard deviations): one static shape.

    Raises ValueError for a tokenizer without a mask token and KeyError for rows without `example_id`.
    """

    view = "masked_lm"

    def __init__(
        self,
        tokenizer: Any,
        mlm_probability: float = 0.15,
        *,
        max_length: int | None = None,
        positions_multiple: int = 64,
        seed: int = 0,
    ):
        super().__init__(seed)
        if tokenizer.mask_token_id is None:
            raise ValueError(
                f"{type(tokenizer).__name__} has no mask token, so it cannot serve masked pre-training: use the tokenizer "
                "of a masked language model, or tokenizer.add_special_tokens({'mask_token': '<mask>'}) and resize the model"
            )
        if not 0.0 < mlm_probability < 1.0:
            raise ValueError(f"mlm_probability must lie strictly between 0 and 1, got {mlm_probability}")
        if positions_multiple < 1:
            raise ValueError(f"positions_multiple must be 1 or more, got {positions_multiple}")
        self.tokenizer = tokenizer
        self.mlm_probability = mlm_probability
        self.max_length = max_length
        self.positions_multiple = positions_multiple
        self._special = np.array(sorted(tokenizer.all_special_ids))
        # Random replacements are ordinary tokens: a random padding id would shift RoBERTa's position ids
        self._ordinary = np.setdiff1d(np.arange(len(tokenizer)), self._special)

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        rows = [np.asarray(feature["input_ids"], dtype=np.int64) for feature in features]
        width = self.max_length or max(len(row) for row in rows)
        clean = np.full((len(rows), width), self.tokenizer.pad_token_id, dtype=np.int64)
        corrupted, attention = clean.copy(), np.zeros_like(clean)
        chosen = np.zeros_like(clean, dtype=bool)
        for i, (row, feature) in enumerate(zip(rows, features, strict=True)):
            if len(row) > width:
                raise ValueError(f"a row has {len(row)} tokens, more than max_length={width}: truncate when tokenizing")
            n = len(row)
            clean[i, :n] = row
            attention[i, :n] = feature.get("attention_mask", 1)
            corrupted[i, :n], chosen[i, :n] = self._corrupt(row, self.generator(feature["example_id"]))
        positions, labels = self._positions(clean, chosen)
        arrays = {
            "input_ids": corrupted,
            "attention_mask": attention,
            "clean_input_ids": clean,
            "masked_positions": positions,
            "masked_labels": labels,
        }
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def _corrupt(self, row: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        chance, fate = generator.random(len(row)), generator.random(len(row))
        random_tokens = generator.choice(self._ordinary, len(row))
        chosen = (chance < self.mlm_probability) & ~np.isin(row, self._special)
        corrupted = np.where(chosen & (fate < 0.8), self.tokenizer.mask_token_id, row)
        return np.where(chosen & (fate >= 0.8) & (fate < 0.9), random_tokens, corrupted), chosen

    def _positions(self, clean: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        flat = np.flatnonzero(chosen)
        size = max(len(flat), self._static_bound(clean.size) if self.max_length else 1)
        padded = -(-size // self.positions_multiple) * self.positions_multiple
        positions = np.zeros(padded, dtype=np.int64)
        labels = np.full(padded, IGNORED, dtype=np.int64)
        positions[: len(flat)] = flat
        labels[: len(flat)] = clean.reshape(-1)[flat]
        return positions, labels

    def _static_bound(self, cells: int) -> int:
        p = self.mlm_probability
        return min(cells, int(np.ceil(cells * p + 6 * np.sqrt(cells * p * (1 - p)))))


class DistillationCollator:
    """Pads what student and teacher read and what a cache answers. Deterministic: nothing is drawn.

    features: dicts that all have the same columns, as lists or arrays; they are not changed. Returns tensors

        input_ids, attention_mask, ... (batch, tokens)      padded by the tokenizer, on its side
        teacher_input_ids, ... (batch, teacher tokens)      padded by the teacher's tokenizer (default: the student's)
        teacher_positions (batch, tokens)                   indices of teacher's tokens, padded with 0
        teacher_logits... (batch, num_labels)               float32, from rows of (num_labels,)
                          (batch, tokens, num_labels)       float32, from rows of (tokens, num_labels), padded with 0
        teacher_features  (batch, hidden) or (batch, tokens, hidden), likewise
        labels            (batch,) int64 or float32         from whole numbers, or from fractions (regression)
                          (batch, num_labels) float32       from lists of floats (several classes a text)
                          (batch, tokens) int64             from lists of ints, one per token, padded with -100
        example_id and every other column of one number per row: (batch,) int64, float32 or bool

    `label` is returned as `labels`. With `max_length` every row is padded to it, on both sides; `pad_to_multiple_of`
    rounds the number of tokens up. Raises ValueError, naming the column, for what cannot become such a tensor.
    """

    view = "plain"

    def __init__(
        self,
        tokenizer: Any,
        teacher_tokenizer: Any = None,
        pad_to_multiple_of: int | None = None,
        max_length: int | None = None,
    ):
        self.tokenizer = tokenizer
        self.teacher_tokenizer = tokenizer if teacher_tokenizer is None else teacher_tokenizer
        self.pad_to_multiple_of = pad_to_multiple_of
        self.max_length = max_length

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        batch = self._tokens(self.tokenizer, features, "")
        if "teacher_input_ids" in features[0]:
            batch |= self._tokens(self.teacher_tokenizer, features, "teacher_")
        width = batch["input_ids"].shape[1]
        if "label" in features[0] and "labels" in features[0]:
            raise ValueError(
                "the rows have a column 'label' and a column 'labels', and both would be labels: remove one"
            )
        for name in (name for name in features[0] if name not in batch):
            rows = _arrays(name, [feature[name] for feature in features])
            if name == "teacher_positions":
                rows = self._shifted(rows, features, batch)
            if _one_per_token(name, rows[0]):
                rows = self._padded(name, rows, features, width)
            if len({row.shape for row in rows}) > 1:
                raise ValueError(f"the column {name!r} has rows of shapes {sorted({row.shape for row in rows})}")
            batch["labels" if name == "label" else name] = torch.from_numpy(np.stack(rows))
        return batch

    def _tokens(self, tokenizer: Any, features: Sequence[Mapping[str, Any]], prefix: str) -> dict[str, Tensor]:
        from transformers.data.data_collator import pad_without_fast_tokenizer_warning

        known = dict.fromkeys((*TOKEN_COLUMNS, *tokenizer.model_input_names))
        names = {name: f"{prefix}{name}" for name in known if f"{prefix}{name}" in features[0]}
        longest = max(len(feature[f"{prefix}input_ids"]) for feature in features)
        if self.max_length is not None and longest > self.max_length:
            raise ValueError(
                f"a row has {longest} {prefix}input_ids, more than max_length={self.max_length}: truncate when tokenizing"
            )
        padded = pad_without_fast_tokenizer_warning(
            tokenizer,
            {name: [_as_list(feature[column]) for feature in features] for name, column in names.items()},
            padding="longest" if self.max_length is None else "max_length",
            max_length=self.max_length,
            pad_to_multiple_of=self.pad_to_multiple_of,
            return_tensors="np",  # tensors from nested lists take twice as long
        )
        return {f"{prefix}{name}": torch.from_numpy(values) for name, values in padded.items()}

    def _shifted(
        self, positions: Sequence[np.ndarray], features: Sequence[Mapping[str, Any]], batch: Mapping[str, Tensor]
    ) -> list[np.ndarray]:
        """A teacher's tokenizer that pads on the left moves its tokens to the right."""
        if self.teacher_tokenizer.padding_side != "left" or "teacher_input_ids" not in batch:
            return list(positions)
        width = batch["teacher_input_ids"].shape[1]
        return [
            row + width - len(feature["teacher_input_ids"]) for row, feature in zip(positions, features, strict=True)
        ]

    def _padded(
        self, name: str, rows: Sequence[np.ndarray], features: Sequence[Mapping[str, Any]], width: int
    ) -> list[np.ndarray]:
        """Rows of (tokens, ...) brought to the student's width, on the side its tokenizer pads."""
        fill = IGNORED if name in ("label", "labels") else 0
        padded = []
        for row, feature in zip(rows, features, strict=True):
            tokens = len(feature["input_ids"])
            if len(row) != tokens:
                raise ValueError(
                    f"a row has {tokens} input_ids and {len(row)} entries in {name!r}, which are one per token"
                    + (" (lists of 0 and 1, one per class, must be floats)" if fill == IGNORED else "")
                )
            full = np.full((width, *row.shape[1:]), fill, dtype=row.dtype)
            start = width - tokens if self.tokenizer.padding_side == "left" else 0
            full[start : start + tokens] = row
            padded.append(full)
        return padded


def _one_per_token(name: str, row: np.ndarray) -> bool:
    """Whether a row has one entry per token of the student, to be padded. Raises `ValueError` for a row that can neither
    be padded nor stand in a batch as it is."""
    per_token = {0: False}
    if name.startswith("teacher_logits") or name == "teacher_features":
        per_token = {1: False, 2: True}
    elif name == "teacher_positions":
        per_token = {1: True}
    elif name in ("label", "labels"):
        per_token = {0: False, 1: row.dtype.kind != "f"}  # floats: one per class
    if row.ndim not in per_token:
        raise ValueError(
            f"the column {name!r} has rows of shape {row.shape}, which this collator cannot put into a batch: remove it "
            "before training"
        )
    return per_token[row.ndim]


def _as_list(values: Any) -> list:
    return values if isinstance(values, list) else values.tolist()


def _arrays(name: str, rows: Sequence[Any]) -> list[np.ndarray]:
    """The rows with one of the types int64, float32 and bool. Raises `ValueError` for text, gaps and ragged rows."""
    try:
        arrays = [np.asarray(row) for row in rows]
    except ValueError as error:
        raise ValueError(f"the column {name!r} has a row that is no array: {error}") from error
    kinds = {array.dtype.kind for array in arrays}
    if not kinds <= set("iufb"):
        bad = next(row for row, array in zip(rows, arrays, strict=True) if array.dtype.kind not in "iufb")
        raise ValueError(f"the column {name!r} holds {bad!r}, which is no number: remove the column before training")
    kind = np.float32 if "f" in kinds or name.startswith("teacher_logits") else np.int64 if kinds != {"b"} else np.bool_
    return [array.astype(kind, copy=False) for array in arrays]
