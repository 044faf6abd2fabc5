"""Masks: what they may touch, how many there are, and what they are a function of. Padding: what it leaves alone."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding

from hfkd.data.collate import IGNORED, DistillationCollator, MaskedLMCollator
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


# ---- the plain view of distillation ----

CLASSES, HIDDEN = 3, 2
TEACHER_PAD = 4  # not the student's: whoever pads with the wrong one is seen


def two_tokenizers(student_side: str = "right", teacher_side: str = "right"):
    student, teacher = tiny_tokenizer(), tiny_tokenizer()
    student.padding_side, teacher.padding_side = student_side, teacher_side
    teacher.pad_token = "<mask>"
    return student, teacher


@st.composite
def ragged_rows(draw):
    """Rows with everything a token-level cache can hold, as lists or arrays."""
    as_arrays, rows = draw(st.booleans()), []
    for number in range(draw(st.integers(1, 5))):
        tokens, theirs = draw(st.integers(1, 9)), draw(st.integers(1, 9))
        generator = np.random.default_rng(draw(st.integers(0, 99)))
        row = {
            "input_ids": generator.integers(5, 50, tokens),
            "attention_mask": np.ones(tokens, dtype=np.int64),
            "token_type_ids": generator.integers(0, 2, tokens),
            "teacher_input_ids": generator.integers(5, 50, theirs),
            "teacher_attention_mask": np.ones(theirs, dtype=np.int64),
            "teacher_token_type_ids": generator.integers(0, 2, theirs),
            "teacher_positions": generator.integers(0, theirs, tokens),
            "teacher_logits": generator.normal(size=(tokens, CLASSES)).astype(np.float16),
            "teacher_logits_second": generator.normal(size=CLASSES),
            "teacher_features": generator.normal(size=(tokens, HIDDEN)).astype(np.float32),
            "labels": generator.integers(-1, CLASSES, tokens),
            "example_id": number,
        }
        rows.append(row if as_arrays else {name: np.asarray(value).tolist() for name, value in row.items()})
    return rows


PADDING = {
    "input_ids": 1,
    "teacher_input_ids": TEACHER_PAD,
    "labels": IGNORED,
    **dict.fromkeys(("attention_mask", "token_type_ids", "teacher_attention_mask", "teacher_token_type_ids"), 0),
    **dict.fromkeys(("teacher_positions", "teacher_logits", "teacher_features"), 0),
}
WHOLE = {"teacher_logits_second", "example_id"}


@given(ragged_rows(), st.sampled_from(["left", "right"]), st.sampled_from([None, 4]), st.sampled_from([None, 9]))
def test_without_its_padding_a_batch_is_what_was_put_in(rows, side, multiple, max_length):
    """A cut, shifted or mispadded column pairs the student's token with the teacher's answer to another."""
    before = copy.deepcopy(rows)
    batch = DistillationCollator(*two_tokenizers(side, "right"), multiple, max_length)(rows)
    assert set(batch) == set(rows[0])
    for name, values in batch.items():
        kind = torch.float32 if name.startswith(("teacher_logits", "teacher_features")) else torch.int64
        assert values.dtype == kind and len(values) == len(rows)
        for row, found in zip(rows, values, strict=True):
            expected = np.asarray(row[name])
            if name not in WHOLE:
                teachers = name in ("teacher_input_ids", "teacher_attention_mask", "teacher_token_type_ids")
                left = 0 if side == "right" or teachers else len(found) - len(expected)
                inside = slice(left, left + len(expected))
                padding = np.delete(found.numpy(), np.r_[inside], axis=0)
                assert (padding == PADDING[name]).all()
                found = found[inside]
            assert np.array_equal(found.numpy(), expected.astype(np.float32 if kind.is_floating_point else np.int64))
    widths = {name: batch[name].shape[1] for name in PADDING}
    at_students_width = ("labels", "teacher_positions", "teacher_logits", "teacher_features", "token_type_ids")
    assert {widths[name] for name in at_students_width} == {widths["input_ids"]}
    for width, column in ((widths["input_ids"], "input_ids"), (widths["teacher_input_ids"], "teacher_input_ids")):
        longest = max_length or max(len(row[column]) for row in rows)
        assert width == -(-longest // (multiple or 1)) * (multiple or 1)
    for row, old in zip(rows, before, strict=True):  # a data set in memory hands out its own rows
        assert all(np.array_equal(row[name], old[name]) for name in old) and set(row) == set(old)


@given(ragged_rows(), st.sampled_from(["left", "right"]), st.sampled_from(["left", "right"]))
def test_positions_find_the_teachers_tokens_on_whatever_side_it_pads(rows, student_side, teacher_side):
    """A teacher that pads on the left would answer with the token a few places off."""
    batch = DistillationCollator(*two_tokenizers(student_side, teacher_side))(rows)
    found = batch["teacher_input_ids"].gather(1, batch["teacher_positions"])
    for number, row in enumerate(rows):
        expected = np.asarray(row["teacher_input_ids"])[np.asarray(row["teacher_positions"])]
        real = batch["attention_mask"][number].bool()
        assert found[number][real].tolist() == expected.tolist()


def test_plain_rows_are_collated_as_transformers_does(tokenizer):
    """Another batch than the usual collator's makes a baseline trained with it incomparable."""
    rows = [{**row, "label": number % 3} for number, row in enumerate(tiny_rows(7))]
    expected = DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8)(rows)
    found = DistillationCollator(tokenizer, pad_to_multiple_of=8)(rows)
    assert set(found) == set(expected) == {"input_ids", "attention_mask", "labels", "example_id"}
    for name, values in expected.items():
        assert torch.equal(found[name], values) and found[name].dtype == values.dtype


def test_a_teacher_without_a_tokenizer_reads_the_students_tokens(tokenizer):
    """A teacher's view padded with another id moves RoBERTa's position ids."""
    rows = [{"input_ids": [0, 5, 2], "teacher_input_ids": [0, 5, 2][:n], "example_id": n} for n in (3, 2)]
    batch = DistillationCollator(tokenizer)(rows)
    assert batch["teacher_input_ids"].tolist() == [[0, 5, 2], [0, 5, PAD]]
    assert batch["teacher_attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


def rows_with(name: str, *values: object) -> list[dict]:
    return [{"input_ids": [0, *[5] * number, 2], name: value} for number, value in enumerate(values)]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((2, 0), torch.tensor([2, 0])),
        ((np.int32(2), np.int32(0)), torch.tensor([2, 0])),
        ((2.5, 1.0), torch.tensor([2.5, 1.0])),
        ((1.0, np.float64(0.1)), torch.tensor([1.0, 0.1])),
        (([1.0, 0.0], [0.0, 0.0]), torch.tensor([[1.0, 0.0], [0.0, 0.0]])),
        (([1, 2], [3, IGNORED, 5]), torch.tensor([[1, 2, IGNORED], [3, IGNORED, 5]])),
        ((np.array([1, 2], dtype=np.int8), np.array([3, 4, 5])), torch.tensor([[1, 2, IGNORED], [3, 4, 5]])),
    ],
)
@pytest.mark.parametrize("name", ["label", "labels"])
def test_every_kind_of_label(tokenizer, name, values, expected):
    """transformers picks the loss by the type of the labels: floats for classes are regressed on, and run."""
    batch = DistillationCollator(tokenizer)(rows_with(name, *values))
    assert torch.equal(batch["labels"], expected) and batch["labels"].dtype == expected.dtype
    assert "label" not in batch


@pytest.mark.parametrize("name", ["teacher_logits", "teacher_logits_last", "teacher_features"])
def test_answers_to_whole_texts(tokenizer, name):
    """Half precision from a cache, used as it is, overflows in the softmax at a low temperature."""
    batch = DistillationCollator(tokenizer)(rows_with(name, np.array([1, 2], dtype=np.float16), [3.0, 4.5]))
    assert torch.equal(batch[name], torch.tensor([[1.0, 2.0], [3.0, 4.5]])) and batch[name].dtype == torch.float32


def test_whole_numbers_are_logits_too(tokenizer):
    """Logits that happen to be whole numbers would reach a softmax that only takes floats."""
    assert DistillationCollator(tokenizer)(rows_with("teacher_logits", [1, 2], [3, 4]))[
        "teacher_logits"
    ].is_floating_point()


def test_other_columns_of_one_number(tokenizer):
    """A weight or a subgroup per example that is dropped in silence changes what is trained."""
    rows = [row | {"group": 3, "clean": True} for row in rows_with("weight", 0.5, 1.0)]
    batch = DistillationCollator(tokenizer)(rows)
    assert torch.equal(batch["weight"], torch.tensor([0.5, 1.0]))
    assert batch["group"].tolist() == [3, 3] and batch["clean"].tolist() == [True, True]


def test_no_warning_about_fast_tokenizers(tokenizer, caplog):
    """A warning in every worker of every run teaches people to ignore warnings."""
    tokenizer = copy.deepcopy(tokenizer)
    DistillationCollator(tokenizer)(tiny_rows(2))
    assert not caplog.records and not tokenizer.deprecation_warnings.get("Asking-to-pad-a-fast-tokenizer")


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("text", ("a", "b"), "'text' holds 'a', which is no number: remove the column"),
        ("weight", (1.0, None), "'weight' holds None, which is no number"),
        ("spans", ([1, 2], [3, 4]), r"'spans' has rows of shape \(2,\), which this collator cannot put into a batch"),
        ("teacher_logits", (1.0, 2.0), r"'teacher_logits' has rows of shape \(\)"),
        ("teacher_logits", ([1.0], [1.0, 2.0]), r"'teacher_logits' has rows of shapes \[\(1,\), \(2,\)\]"),
        ("teacher_logits", ([[1.0]] * 2, [[1.0]] * 2), "a row has 3 input_ids and 2 entries in 'teacher_logits'"),
        ("teacher_features", ([[1.0], [1.0, 2.0]], [[1.0]]), "'teacher_features' has a row that is no array"),
        ("teacher_positions", ([0], [0, 1, 2]), "a row has 2 input_ids and 1 entries in 'teacher_positions'"),
        ("label", ([1, 0, 0], [0, 1, 0]), "a row has 2 input_ids and 3 entries in 'label'.*must be floats"),
        ("label", ([1.0], [0.0, 1.0]), r"'label' has rows of shapes"),
    ],
)
def test_columns_that_cannot_stand_in_a_batch(tokenizer, name, values, message):
    """An error of numpy from a worker names neither the column nor the way out."""
    with pytest.raises(ValueError, match=message):
        DistillationCollator(tokenizer)(rows_with(name, *values))


def test_rows_that_are_too_long_or_labelled_twice(tokenizer):
    """Cut silently, the end of a text is never answered; of two labels the last column wins by chance."""
    for column in ("input_ids", "teacher_input_ids"):
        rows = [{"input_ids": [0, 2], "teacher_input_ids": [0, 2], column: [0, 5, 5, 2]}]
        with pytest.raises(ValueError, match=f"a row has 4 {column}, more than max_length=3: truncate"):
            DistillationCollator(tokenizer, max_length=3)(rows)
    with pytest.raises(ValueError, match="a column 'label' and a column 'labels'"):
        DistillationCollator(tokenizer)([{"input_ids": [0, 2], "label": 0, "labels": 1}])


def test_the_view_is_named_plain(tokenizer):
    """A cache that does not know its view is read under another one."""
    rows = tiny_rows(3)
    first, again = (DistillationCollator(tokenizer)(rows) for _ in range(2))
    assert DistillationCollator.view == "plain"
    assert all(torch.equal(first[name], again[name]) for name in first)
