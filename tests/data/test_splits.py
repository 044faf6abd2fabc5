"""Splits: whole groups on one side, every class in a subset, the same rows for the same seed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfkd.data.splits import group_split, load_indices, low_resource_subset, save_indices

groups_of_rows = st.lists(st.integers(0, 12).map(lambda number: f"movie-{number}"), min_size=2, max_size=60).filter(
    lambda groups: len(set(groups)) >= 2
)
labels_of_rows = st.lists(st.integers(0, 5), min_size=1, max_size=80)


@settings(deadline=None, max_examples=60)
@given(groups=groups_of_rows, held_out=st.floats(0.01, 0.6), seed=st.integers(0, 1000))
def test_no_group_is_on_both_sides(groups, held_out, seed):
    """A movie in both splits inflates test accuracy: its names and plot are learned with its verdict."""
    train, test = group_split(groups, held_out, seed)
    assert not {groups[row] for row in train} & {groups[row] for row in test}
    assert sorted(train + test) == list(range(len(groups)))
    assert train and test


@settings(deadline=None, max_examples=40)
@given(groups=groups_of_rows, seed=st.integers(0, 1000), data=st.data())
def test_the_held_out_groups_do_not_depend_on_the_order_of_rows(groups, seed, data):
    """A reordered file that holds out other movies lets a development movie slip into the test."""
    count = data.draw(st.integers(1, len(set(groups)) - 1))
    order = data.draw(st.permutations(range(len(groups))))
    shuffled = [groups[row] for row in order]
    held_out = {groups[row] for row in group_split(groups, count, seed)[1]}
    assert len(held_out) == count
    assert {shuffled[row] for row in group_split(shuffled, count, seed)[1]} == held_out


def test_another_seed_holds_out_other_groups():
    """A seed that is ignored makes five seeds one."""
    groups = [f"movie-{row % 40}" for row in range(200)]
    assert group_split(groups, 10, 0) == group_split(groups, 10, 0)
    assert group_split(groups, 10, 0) != group_split(groups, 10, 1)


@pytest.mark.parametrize("held_out", [0, 3, 4, -1, 0.0, 1.0, 1.5, 0.99])
def test_a_side_without_groups_is_an_error(held_out):
    """An empty side is noticed hours later, as a division by zero in the metric."""
    with pytest.raises(ValueError, match=f"held_out is {held_out} and there are 3 groups"):
        group_split(["a", "b", "c"], held_out)


def test_a_row_without_group_is_an_error():
    """Rows without a group would become one large group of unrelated rows."""
    with pytest.raises(ValueError, match="1 of 3 rows have no group, the first is row 1"):
        group_split(["a", None, "b"], 1)


@settings(deadline=None, max_examples=80)
@given(labels=labels_of_rows, seed=st.integers(0, 1000), data=st.data())
def test_a_subset_has_its_size_and_every_class(labels, seed, data):
    """A class that is missing from 200 labels cannot be predicted at all, which looks like a weak method."""
    size = data.draw(st.integers(len(set(labels)), len(labels)))
    chosen = low_resource_subset(labels, size, seed)
    assert chosen == low_resource_subset(labels, size, seed)
    assert len(set(chosen)) == size and set(chosen) <= set(range(len(labels)))
    assert {labels[row] for row in chosen} == set(labels)


def test_a_subset_keeps_the_shares_of_the_classes():
    """A subset with other shares than the data moves the prior, and accuracy with it."""
    labels = ["fresh"] * 700 + ["rotten"] * 300
    counts = np.unique([labels[row] for row in low_resource_subset(labels, 100, 3)], return_counts=True)[1]
    assert counts.tolist() == [70, 30]
    assert low_resource_subset(labels, 100, 3) != low_resource_subset(labels, 100, 4)


def test_a_subset_that_cannot_be_drawn_names_both_numbers():
    """A silently smaller subset would be reported as the size that was asked for."""
    with pytest.raises(ValueError, match="5 rows is asked for and there are only 3"):
        low_resource_subset([0, 1, 2], 5)
    with pytest.raises(ValueError, match="2 rows cannot show all 3 classes"):
        low_resource_subset([0, 1, 2], 2)


def test_indices_come_back_as_they_were_saved(tmp_path):
    """Splits that cannot be read back make a run impossible to repeat."""
    path = save_indices(tmp_path / "new" / "splits.json", train=np.array([3, 1]), test=[0, 2])
    assert load_indices(path) == {"train": [3, 1], "test": [0, 2]}
    assert [file.name for file in path.parent.iterdir()] == ["splits.json"]


def test_a_failed_save_leaves_the_old_file(tmp_path):
    """A half-written split file after a kill would shift every later run to other rows."""
    path = save_indices(tmp_path / "splits.json", train=[1])
    with pytest.raises(ValueError):
        save_indices(path, train=["not a row"])
    with pytest.raises(ValueError, match="nothing to save"):
        save_indices(path)
    assert load_indices(path) == {"train": [1]}


@pytest.mark.parametrize("content", ["[1, 2]", '{"train": 3}', '{"train": ["1"]}'])
def test_a_file_of_another_kind_is_an_error(tmp_path, content):
    """Row numbers read from a wrong file select wrong rows without a word."""
    (tmp_path / "other.json").write_text(content)
    with pytest.raises(ValueError, match="does not hold lists of row numbers"):
        load_indices(tmp_path / "other.json")
