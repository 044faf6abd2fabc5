"""Splits: whole groups on one side, every class in a subset, the same rows for the same seed."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfkd.data.splits import (
    dev_split,
    group_split,
    load_indices,
    low_resource_subset,
    member_rows,
    rows_of_classes,
    save_indices,
)

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


def test_a_fifth_of_each_class_is_held_out_as_scikit_learn_does_it():
    """A dev split with other shares measures the teacher's reliability on other numbers of examples than it says."""
    from sklearn.model_selection import StratifiedShuffleSplit

    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [503, 250, 48])).tolist()
    _, theirs = next(StratifiedShuffleSplit(1, test_size=0.2, random_state=0).split(labels, labels))
    train, dev = dev_split(labels, 0.2)
    expected, found = Counter(labels[row] for row in theirs), Counter(labels[row] for row in dev)
    assert all(abs(expected[label] - found[label]) <= 1 for label in range(3))
    assert sorted(train + dev) == list(range(801)) and dev == sorted(dev) and train == sorted(train)
    assert found == {0: 101, 1: 50, 2: 10}


@settings(deadline=None, max_examples=80)
@given(labels=labels_of_rows, k=st.integers(1, 12), seed=st.integers(0, 1000))
def test_k_a_class_and_half_of_the_small_ones(labels, k, seed):
    """More than half of a rare class held out leaves it nothing to learn from; one row too few changes every alpha."""
    labels = [label for label in labels for _ in range(2)]
    train, dev = dev_split(labels, k, seed)
    counts, held = Counter(labels), Counter(labels[row] for row in dev)
    for label, count in counts.items():
        assert held[label] == (k if count > 2 * k else count // 2)
    assert sorted(train + dev) == list(range(len(labels)))
    assert (train, dev) == dev_split(labels, k, seed)


@pytest.mark.parametrize("held_out", [0.2, 7])
def test_what_a_class_holds_out_is_its_own_affair(held_out):
    """Were the draw one for all classes, more rows of one class would redraw the dev rows of all others."""
    few, many = (dev_split(["c"] * 50 + ["a"] * size + ["b"] * 30, held_out)[1] for size in (20, 90))
    assert [row for row in few if row < 50] == [row for row in many if row < 50]
    drawn = [[row - start for row in few if 0 <= row - start < 20] for start in (50, 70)]
    assert drawn[0] != drawn[1], "two classes draw the same places"


def test_a_plain_split_counts_rows_and_another_seed_draws_others():
    """A seed that is ignored makes five seeds one."""
    labels = [row % 4 for row in range(400)]
    for stratified in (True, False):
        first, second = (dev_split(labels, 0.2, seed, stratified) for seed in (0, 1))
        assert first == dev_split(labels, 0.2, 0, stratified) != second
        assert [len(side) for side in first] == [len(side) for side in second] == [320, 80]
    assert len(set(Counter(row % 4 for row in dev_split(labels, 0.2, 0, False)[1]).values())) > 1, (
        "plain, not stratified"
    )


def test_a_class_with_one_side_is_named_with_its_counts():
    """alpha of a class without a dev row is a mean over nothing; without a training row it weighs nothing."""
    labels = ["cat"] * 10 + ["dog"] + ["owl"] * 2
    for held_out in (0.2, 3):
        with pytest.raises(ValueError, match=r"1 of 3 classes .*'dog': 1 and 0\)"):
            dev_split(labels, held_out)
    with pytest.raises(ValueError, match=r"3 of 3 classes .*'cat': 10 and 0, 'dog': 0 and 1, 'owl': 2 and 0\)"):
        dev_split(labels, 0.05, stratified=False)
    with pytest.raises(ValueError, match="no class at all"):
        dev_split([], 0.2)


@pytest.mark.parametrize("held_out", [0, -1, 0.0, 1.0, 1.5, float("nan")])
def test_a_size_that_is_none_is_an_error(held_out):
    """1.0 for one row per class would hold out everything."""
    with pytest.raises(ValueError, match=f"held_out is {held_out}"):
        dev_split([0, 0, 1, 1], held_out)


def test_rows_per_class_are_a_stratified_split():
    """stratified=False that is ignored gives another split than was asked for."""
    with pytest.raises(ValueError, match="held_out=2 rows per class"):
        dev_split([0, 0, 1, 1], 2, stratified=False)


def test_rows_of_classes_are_all_rows():
    """A row that belongs to no class is in no split."""
    assert rows_of_classes(["b", "a", "b"]) == {"b": [0, 2], "a": [1]}


@settings(deadline=None, max_examples=60)
@given(
    count=st.integers(1, 60),
    members=st.integers(1, 8),
    seed=st.integers(0, 1000),
    how=st.sampled_from(["overlapping", "disjoint"]),
)
def test_members_have_rows_of_their_own_and_equally_many(count, members, seed, how):
    """A row of two "disjoint" members makes their errors alike, and a member with fewer rows is another teacher."""
    least = members if how == "disjoint" else 2
    if count < least:
        with pytest.raises(ValueError, match=f"share=None of {count} rows gives each of {members} {how} members 0"):
            member_rows(count, members, how, seed=seed)
        return
    rows = member_rows(count, members, how, seed=seed)
    assert [len(own) for own in rows] == [count // least] * members
    assert all(own == sorted(set(own)) and set(own) <= set(range(count)) for own in rows)
    if how == "disjoint":
        assert len(set().union(*map(set, rows))) == members * (count // members)
    assert rows == member_rows(count, members, how, seed=seed)


def test_members_of_the_same_rows_have_all_of_them():
    """Members that miss rows without being asked are compared with students that have all."""
    assert member_rows(4, 3, "same") == [[0, 1, 2, 3]] * 3


@pytest.mark.parametrize("how", ["overlapping", "disjoint"])
def test_more_members_leave_the_first_ones_their_rows(how):
    """Ten teachers resumed from five would otherwise be five teachers of other rows beside five of these."""
    few, many = (member_rows(90, members, how, share=0.1, seed=3) for members in (5, 10))
    assert many[:5] == few and len(few[0]) == 9
    assert few[0] != few[1] and few != member_rows(90, 5, how, share=0.1, seed=4)


def test_overlapping_members_share_rows_by_chance():
    """Draws from one generator without replacement would be disjoint; the same draw for all would be one teacher."""
    rows = member_rows(2000, 40, "overlapping", share=0.5)
    common = [len(set(one) & set(other)) for one, other in pairwise(rows)]
    assert abs(np.mean(common) - 500) < 15  # half of a member's half


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"how": "twice"}, "how must be one of same, overlapping, disjoint, got 'twice'"),
        ({"members": 0}, "1 member and 1 row or more, got 0 members and 9 rows"),
        ({"how": "same", "share": 0.5}, "share=0.5 is for overlapping and disjoint rows"),
        ({"how": "disjoint", "share": 0.5}, "share=0.5 of 9 rows gives each of 3 disjoint members 4: .* 1 to 3"),
        ({"how": "overlapping", "share": 1.5}, "3 overlapping members 13: .* 1 to 9"),
        ({"how": "overlapping", "share": 0.01}, "3 overlapping members 0: .* 1 to 9"),
    ],
)
def test_members_that_cannot_be_given_rows_are_an_error(settings, message):
    """A member without rows, or with another's, is found out after the others have been trained."""
    with pytest.raises(ValueError, match=message):
        member_rows(**{"count": 9, "members": 3, **settings})


def test_a_share_of_rows_is_what_it_is_on_paper():
    """0.29 * 100 is 28.999999999999996: one row less than was asked for, and a record that says otherwise."""
    assert [len(rows) for rows in member_rows(100, 3, "disjoint", share=0.29)] == [29, 29, 29]


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
