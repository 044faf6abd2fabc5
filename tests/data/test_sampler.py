"""Batches of similar length, in an order that a resumed run can repeat."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from hfkd.data.sampler import KeyedLengthSampler

LENGTHS = random.Random(0).choices(range(3, 129), k=1003)
ROWS_PER_STEP = 16


def order(seed: int = 0, epoch: int = 0, round: int = 0) -> list[int]:
    sampler = KeyedLengthSampler(LENGTHS, ROWS_PER_STEP, seed)
    sampler.set_position(round=round, epoch=epoch)
    return list(sampler)


def padding(indices: list[int]) -> int:
    """Tokens of padding when rows are padded to the longest of their batch."""
    batches = [indices[start : start + ROWS_PER_STEP] for start in range(0, len(indices), ROWS_PER_STEP)]
    return sum(max(LENGTHS[i] for i in batch) * len(batch) - sum(LENGTHS[i] for i in batch) for batch in batches)


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_every_row_once(epoch):
    """Rows that an epoch repeats or leaves out change the weight of texts without a trace."""
    assert sorted(order(epoch=epoch)) == list(range(len(LENGTHS)))
    assert len(KeyedLengthSampler(LENGTHS, ROWS_PER_STEP, 0)) == len(LENGTHS)


def test_the_order_is_a_function_of_seed_and_epoch():
    """An order from the global generator differs after a resume, which restores it only after the first batches."""
    first = order(3, 2)
    torch.manual_seed(1234)
    random.seed(1234)
    assert order(3, 2) == first
    state = torch.get_rng_state()
    order(3, 2)
    assert torch.equal(state, torch.get_rng_state())


def test_epochs_and_seeds_have_other_orders():
    """The same batches in every epoch are fewer data than they look."""
    orders = [order(seed, epoch) for seed in range(3) for epoch in range(3)]
    assert len({tuple(indices) for indices in orders}) == 9


def test_setting_the_epoch_back_gives_the_same_order():
    """A sampler that counts its own calls is one epoch off after a resume."""
    sampler = KeyedLengthSampler(LENGTHS, ROWS_PER_STEP, 0)
    first = list(sampler)
    assert list(sampler) == first
    sampler.set_position(round=0, epoch=1)
    assert list(sampler) != first
    sampler.set_position(round=0, epoch=0)
    assert list(sampler) == first


def test_batches_of_similar_length_save_padding():
    """Without grouping about half of a step's computation goes into padding."""
    shuffled = list(range(len(LENGTHS)))
    random.Random(1).shuffle(shuffled)
    assert padding(order()) < 0.2 * padding(shuffled)


def test_batches_are_not_sorted_over_the_epoch():
    """From long to short over the whole epoch is a curriculum nobody asked for."""
    batches = [order()[start : start + ROWS_PER_STEP] for start in range(0, 992, ROWS_PER_STEP)]
    means = [sum(LENGTHS[i] for i in batch) / len(batch) for batch in batches]
    falls = sum(later <= earlier for earlier, later in itertools.pairwise(means))
    assert falls < len(means) - 1
