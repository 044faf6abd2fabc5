"""Batches of similar length whose order is a function of (seed, epoch), so that a resumed run sees the same batches."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler, get_length_grouped_indices


class KeyedLengthSampler(LengthGroupedSampler):
    """`rows_per_step` counts all processes and micro-batches, so that one process and several see the same order.

    The stock sampler draws from the global generator, which a resumed run restores only after its first batches.
    """

    def __init__(self, lengths: list[int], rows_per_step: int, seed: int):
        super().__init__(rows_per_step, lengths=lengths)
        self.seed, self.epoch = seed, 0

    def set_position(self, *, round: int, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))
