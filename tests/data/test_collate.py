"""Masks: what they may touch, how many there are, and what they are a function of."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from hfkd.data.collate import IGNORED, MaskedLMCollator
from hfkd.testing import tiny_rows, tiny_tokenizer

MASK, PAD = 4, 1


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def full_labels(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The labels of the usual collators, from positions and labels; padded positions are left out."""
    labels = torch.full_like(batch["input_ids"], IGNORED)
    real = batch["masked_labels"] != IGNORED
    labels.view(-1)[batch["masked_positions"][real]] = batch["masked_labels"][real]
    return labels


def corruption_of(batch: dict[str, torch.Tensor], row: int) -> tuple[list[int], list[int]]:
    """Corrupted tokens and labels of one row, without its padding."""
    length = int(batch["attention_mask"][row].sum())
    return batch["input_ids"][row, :length].tolist(), full_labels(batch)[row, :length].tolist()


def long_rows(count: int) -> list[dict]:
    return tiny_rows(count, length=400, seed=3)


# ---- what a batch holds ----


@given(st.integers(1, 6), st.integers(0, 10_000), st.sampled_from([0.05, 0.15, 0.9]))
def test_the_clean_view_is_what_the_usual_collators_allow_to_recover(tokenizer, count, seed, rate):
    """The distillation term on anything but the clean text distils guesses; a wrong label trains wrong words."""
    rows = tiny_rows(count, seed=seed)
    batch = MaskedLMCollator(tokenizer, rate, seed=seed)(rows)
    labels = full_labels(batch)
    assert torch.equal(batch["clean_input_ids"], torch.where(labels != IGNORED, labels, batch["input_ids"]))
    width = max(len(row["input_ids"]) for row in rows)
    for i, row in enumerate(rows):
        ids, padding = row["input_ids"], width - len(row["input_ids"])
        assert batch["clean_input_ids"][i].tolist() == ids + [PAD] * padding
        assert batch["attention_mask"][i].tolist() == [1] * len(ids) + [0] * padding
    positions = batch["masked_positions"][batch["masked_labels"] != IGNORED]
    assert len(positions) == len(positions.unique()) == int((labels != IGNORED).sum())


def test_special_tokens_and_padding_are_never_masked(tokenizer):
    """A masked <s> destroys the feature that is distilled; masked padding is trained as if it were text."""
    batch = MaskedLMCollator(tokenizer, 0.99)(tiny_rows(64))
    special = torch.isin(batch["clean_input_ids"], torch.tensor(tokenizer.all_special_ids))
    labels = full_labels(batch)
    assert bool((labels[special] == IGNORED).all())
    assert torch.equal(batch["input_ids"][special], batch["clean_input_ids"][special])
    assert bool((labels[batch["attention_mask"] == 0] == IGNORED).all())
    assert (labels[~special] != IGNORED).float().mean() > 0.95


def test_rate_and_fate_of_masked_tokens(tokenizer):
    """Another rate, or masks without the 10 % of random and 10 % of unchanged tokens, is another pre-training task."""
    batch = MaskedLMCollator(tokenizer, 0.15, seed=7)(long_rows(200))  # about 40,000 tokens
    labels, corrupted = full_labels(batch), batch["input_ids"]
    ordinary = batch["clean_input_ids"] > MASK
    chosen = labels != IGNORED
    assert chosen.sum() / ordinary.sum() == pytest.approx(0.15, abs=0.01)
    masked = (corrupted == MASK)[chosen].float().mean()
    unchanged = (corrupted == labels)[chosen].float().mean()
    assert masked == pytest.approx(0.8, abs=0.025)
    assert unchanged == pytest.approx(0.1 + 0.1 / 45, abs=0.02)  # a random token is the same one in 1 of 45
    assert 1 - masked - unchanged == pytest.approx(0.1 - 0.1 / 45, abs=0.02)
    replaced = corrupted[chosen & (corrupted != MASK) & (corrupted != labels)]
    assert replaced.min() == 5 and replaced.max() == 49 and len(replaced.unique()) == 45


def test_random_replacements_are_never_special_tokens(tokenizer):
    """A random padding id in the middle of a text shifts RoBERTa's position ids from there on."""
    batch = MaskedLMCollator(tokenizer, 0.9)(long_rows(50))
    changed = batch["input_ids"] != batch["clean_input_ids"]
    replacements = batch["input_ids"][changed & (batch["input_ids"] != MASK)]
    special = [i for i in tokenizer.all_special_ids if i != MASK]
    assert len(replacements) > 500
    assert not torch.isin(replacements, torch.tensor(special)).any()


def test_a_batch_without_masked_tokens(tokenizer):
    """A batch of very short texts must carry padding labels only, or token 0 is trained toward a word."""
    rows = [{"input_ids": [0, 2], "example_id": i} for i in range(3)]
    batch = MaskedLMCollator(tokenizer)(rows)
    assert batch["masked_labels"].tolist() == [IGNORED] * 64
    assert batch["masked_positions"].tolist() == [0] * 64
    assert torch.equal(batch["input_ids"], batch["clean_input_ids"])


# ---- shapes ----


@pytest.mark.parametrize("multiple", [1, 8, 64])
def test_positions_come_in_multiples(tokenizer, multiple):
    """Every new shape costs a compiled step on a TPU and a cuBLAS choice on a GPU."""
    collator = MaskedLMCollator(tokenizer, positions_multiple=multiple)
    sizes = set()
    for seed in range(20):
        batch = collator(tiny_rows(16, seed=seed))
        sizes.add(len(batch["masked_positions"]))
        assert len(batch["masked_positions"]) == len(batch["masked_labels"])
    assert all(size % multiple == 0 and size > 0 for size in sizes)
    assert multiple == 1 or len(sizes) <= 64 // multiple


@pytest.mark.parametrize("rate", [0.05, 0.15, 0.5, 0.95])
def test_one_static_shape_with_max_length(tokenizer, rate):
    """One batch above the bound recompiles the whole step in the middle of a run."""
    collator = MaskedLMCollator(tokenizer, rate, max_length=48, positions_multiple=8)
    shapes = set()
    for seed in range(150):
        full = [{"input_ids": [0, *range(5, 50), 5, 2], "example_id": seed * 8 + i} for i in range(8)]
        rows = full if seed % 5 else tiny_rows(8, length=20, seed=seed)
        batch = collator(rows)
        shapes.add(tuple((name, tuple(value.shape)) for name, value in sorted(batch.items())))
    assert len(shapes) == 1
    assert dict(next(iter(shapes)))["input_ids"] == (8, 48)


# ---- keyed randomness ----


def test_a_mask_is_a_function_of_the_example_alone(tokenizer):
    """Masks that depend on neighbours, order or padding differ between one process and two, and after a resume."""
    collator = MaskedLMCollator(tokenizer, 0.4, seed=5)
    rows = tiny_rows(8)
    together = [corruption_of(collator(rows), i) for i in range(8)]
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002
    backwards = [corruption_of(collator(rows[::-1]), 7 - i) for i in range(8)]
    alone = [corruption_of(collator([row]), 0) for row in rows]
    wide = MaskedLMCollator(tokenizer, 0.4, seed=5, max_length=40)
    assert together == backwards == alone == [corruption_of(wide(rows), i) for i in range(8)]


def test_masks_differ_between_seeds_rounds_epochs_and_examples(tokenizer):
    """The same masks in every epoch train on 15 % of the text; the same for every example follow token positions."""
    row = long_rows(1)[0]
    found = {}
    for seed, round, epoch, example in itertools.product(range(2), repeat=4):
        collator = MaskedLMCollator(tokenizer, 0.4, seed=seed)
        collator.set_position(round=round, epoch=epoch)
        key = (seed, round, epoch, example)
        found[key] = tuple(corruption_of(collator([{**row, "example_id": example}]), 0)[1])
    assert len(set(found.values())) == 16


def test_another_view_draws_other_numbers(tokenizer):
    """Two random views of one example that share their draws are one view."""

    class Other(MaskedLMCollator):
        view = "other"

    rows = long_rows(1)
    assert corruption_of(MaskedLMCollator(tokenizer)(rows), 0) != corruption_of(Other(tokenizer)(rows), 0)


def test_setting_the_position_back_gives_the_same_masks(tokenizer):
    """A resumed epoch with other masks is not the run that was killed."""
    collator, rows = MaskedLMCollator(tokenizer, 0.4), tiny_rows(4)
    collator.set_position(round=1, epoch=2)
    first = collator(rows)
    collator.set_position(round=0, epoch=0)
    collator(rows)
    collator.set_position(round=1, epoch=2)
    again = collator(rows)
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_the_global_generators_are_left_alone(tokenizer):
    """A collator that draws from them makes dropout depend on the number of data-loader workers."""
    rows, state = tiny_rows(4), torch.get_rng_state()
    numpy_state = np.random.get_state()[1].copy()  # noqa: NPY002
    MaskedLMCollator(tokenizer)(rows)
    assert torch.equal(state, torch.get_rng_state())
    assert np.array_equal(numpy_state, np.random.get_state()[1])  # noqa: NPY002


def test_persistent_workers_see_the_new_epoch(tokenizer):
    """Workers keep a copy of the collator: without shared memory every epoch has the masks of the first."""
    rows, collator = tiny_rows(12), MaskedLMCollator(tokenizer, 0.4, seed=1)
    here = MaskedLMCollator(tokenizer, 0.4, seed=1)
    loader = DataLoader(rows, batch_size=3, collate_fn=collator, num_workers=2, persistent_workers=True)
    seen = []
    for round, epoch in ((0, 0), (0, 1), (2, 0)):
        collator.set_position(round=round, epoch=epoch)
        here.set_position(round=round, epoch=epoch)
        batches = [batch["input_ids"] for batch in loader]
        expected = [here(rows[start : start + 3])["input_ids"] for start in range(0, 12, 3)]
        assert all(torch.equal(a, b) for a, b in zip(batches, expected, strict=True))
        seen.append(torch.cat([batch.flatten() for batch in batches]).tolist())
    assert seen[0] != seen[1] != seen[2] != seen[0]


# ---- errors ----


def test_a_tokenizer_without_mask_token_is_refused(tokenizer):
    """With None as the mask token, numpy would fail deep inside a worker."""
    other = copy.deepcopy(tokenizer)
    other.mask_token = None
    with pytest.raises(ValueError, match=r"no mask token.*add_special_tokens"):
        MaskedLMCollator(other)


def test_a_row_above_max_length_is_refused(tokenizer):
    """Cut silently, the end of every long text would never be trained."""
    with pytest.raises(ValueError, match=r"9 tokens.*max_length=8"):
        MaskedLMCollator(tokenizer, max_length=8)([{"input_ids": [0, *range(5, 12), 2], "example_id": 0}])


def test_rows_without_example_id_are_refused(tokenizer):
    """Without an id the masks could only depend on the place in the batch."""
    with pytest.raises(KeyError, match="example_id"):
        MaskedLMCollator(tokenizer)([{"input_ids": [0, 5, 2]}])


@pytest.mark.parametrize(
    ("settings", "value"),
    [
        ({"mlm_probability": 0.0}, "0.0"),
        ({"mlm_probability": 15.0}, "15.0"),
        ({"positions_multiple": 0}, "0"),
        ({"seed": -1}, "-1"),
    ],
)
def test_settings_outside_their_range_are_refused(tokenizer, settings, value):
    """A probability of 15 instead of 0.15 would mask everything, and 0 would train nothing, for days."""
    with pytest.raises(ValueError, match=value):
        MaskedLMCollator(tokenizer, **settings)
