"""Collators with keyed randomness.

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
