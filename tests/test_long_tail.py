"""Long tails: the published sizes of CIFAR-LT, nested subsets, and list files that say which line is wrong."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hfkd.data.long_tail import long_tail_counts, long_tail_subset, read_list_file
from hfkd.data.splits import dev_split

CIFAR_10 = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 5000)).tolist()
CIFAR_100 = np.random.default_rng(1).permutation(np.repeat(np.arange(100), 500)).tolist()


def counts_of(labels, rows) -> list[int]:
    found = Counter(labels[row] for row in rows)
    return [found[label] for label in sorted(set(labels))]


# ---- counts ----


def test_cifar_lt_has_the_published_counts():
    """A tail cut at other places is another data set: no number of the literature compares with it."""
    assert long_tail_counts(5000, 10, 100) == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    hundred = long_tail_counts(500, 100, 100)
    assert hundred[:4] == [500, 477, 455, 434] and hundred[-6:] == [6, 6, 5, 5, 5, 5]
    assert (sum(long_tail_counts(5000, 10, 100)), sum(hundred)) == (12406, 10847)


@given(st.integers(100, 6000), st.integers(2, 60), st.integers(1, 100))
@example(147, 3, 49)
def test_the_ends_are_exact_and_no_class_is_larger_than_the_one_before(largest, classes, ratio):
    """147 * (1 / 49) is below 3 in floating point: a last class one short of max / ratio is another data set."""
    for profile in ("exponential", "step"):
        counts = long_tail_counts(largest, classes, ratio, profile)
        assert (counts[0], counts[-1]) == (largest, largest // ratio)
        assert counts == sorted(counts, reverse=True) and len(counts) == classes


@given(st.integers(2, 40), st.floats(1, 200))
def test_the_exponential_profile_is_the_formula(classes, ratio):
    """A tail with another exponent (c / C in place of c / (C - 1)) is too mild."""
    for label, count in enumerate(long_tail_counts(5000, classes, ratio)):
        exact = 5000 * (1 / ratio) ** (label / (classes - 1))
        assert count in (int(exact - 1e-6), int(exact + 1e-6))


def test_the_step_profile_has_two_sizes():
    """Cao et al.'s step: half of the classes are rare, and all of these equally."""
    assert long_tail_counts(500, 4, 10, "step") == [500, 500, 50, 50]
    assert long_tail_counts(500, 5, 10, "step") == [500, 500, 50, 50, 50]
    assert long_tail_counts(500, 1, 1, "step") == long_tail_counts(500, 1, 10, "step") == [500]


@pytest.mark.parametrize("ratio", [0.01, 0.99, 0, -1, float("nan"), float("inf")])
def test_a_ratio_below_one_is_an_error(ratio):
    """0.01 for 100 is the convention of half of the papers: taken as it is, the head would be the tail."""
    for build in (lambda: long_tail_counts(500, 10, ratio), lambda: long_tail_subset([0, 1] * 50, ratio)):
        with pytest.raises(ValueError, match=f"finite number of 1 or above, not {ratio}"):
            build()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((50, 10, 100), "ratio 100 a largest class of 50 rows leaves the smallest without any.*at most 50"),
        ((500, 0, 10), "0 classes of up to 500"),
        ((0, 10, 10), "10 classes of up to 0"),
        ((500, 10, 10, "linear"), "exponential, step, not 'linear'"),
    ],
)
def test_counts_that_make_no_data_set_are_an_error(arguments, message):
    """A class without a row is noticed in the metrics, as a class that no method can learn."""
    with pytest.raises(ValueError, match=message):
        long_tail_counts(*arguments)


# ---- subsets ----


def test_subsets_of_cifars_labels_have_the_published_sizes():
    """12,406 and 10,847 rows: what the group's own code has."""
    for labels, size, largest in ((CIFAR_10, 12406, 5000), (CIFAR_100, 10847, 500)):
        rows = long_tail_subset(labels, 100, "exponential", 0)
        assert len(rows) == len(set(rows)) == size and rows == sorted(rows)
        assert counts_of(labels, rows) == long_tail_counts(largest, len(set(labels)), 100)


def test_the_dev_rule_on_cifar_100_lt():
    """The split that alpha is learned on: 1,451 dev rows and 9,396 to train, 2 and 3 of the smallest class."""
    labels = [CIFAR_100[row] for row in long_tail_subset(CIFAR_100, 100)]
    train, dev = dev_split(labels, 20)
    assert (len(train), len(dev)) == (9396, 1451)
    assert (counts_of(labels, dev)[-1], counts_of(labels, train)[-1]) == (2, 3)
    assert sum(count < 40 for count in counts_of(labels, range(len(labels)))) == 45
    assert counts_of(labels, dev) == [min(20, n // 2) for n in counts_of(labels, range(len(labels)))]


def test_seeds_differ_and_ratios_are_nested():
    """One shuffle per seed: a study over ratios that draws anew changes the images as well as their number."""
    mild, steep = (set(long_tail_subset(CIFAR_100, ratio, seed=3)) for ratio in (10, 100))
    assert steep < mild
    assert long_tail_subset(CIFAR_100, 100, seed=3) == sorted(steep)
    other = set(long_tail_subset(CIFAR_100, 100, seed=4))
    assert len(other) == len(steep) and other != steep
    head = [row for row in mild if CIFAR_100[row] == 50]
    assert head != [row for row, label in enumerate(CIFAR_100) if label == 50][: len(head)], "the first rows, not drawn"


@given(st.lists(st.integers(20, 60), min_size=2, max_size=8), st.sampled_from([1.0, 3.0, 10.0]), st.integers(0, 99))
def test_unequal_classes_give_the_largest_tail_that_fits(sizes, ratio, seed):
    """A class that cannot give its share would end the tail early, silently."""
    labels = [label for label, size in enumerate(sizes) for _ in range(size)]
    for profile in ("exponential", "step"):
        counts = counts_of(labels, long_tail_subset(labels, ratio, profile, seed))
        assert counts == long_tail_counts(counts[0], len(sizes), ratio, profile)
        assert all(count <= size for count, size in zip(counts, sizes, strict=True))
        larger = long_tail_counts(counts[0] + 1, len(sizes), ratio, profile)
        assert any(count > size for count, size in zip(larger, sizes, strict=True))


def test_one_class_has_no_tail():
    """A column of one value is the wrong column."""
    with pytest.raises(ValueError, match=r"2 classes or more, the labels hold \[7\]"):
        long_tail_subset([7, 7, 7], 1)


# ---- list files ----


def test_a_list_file_is_read_as_it_is_published(tmp_path):
    """A label off by one, or a path cut at a blank, loads another image for every row."""
    path = tmp_path / "list.txt"
    path.write_text("train/n01440764/n01440764_190.JPEG 0\ntrain/a b/x 1.JPEG 999\r\n\ntrain/c.JPEG  3\n", "utf-8")
    names = ["train/n01440764/n01440764_190.JPEG", "train/a b/x 1.JPEG", "train/c.JPEG"]
    assert read_list_file(path) == (names, [0, 999, 3])
    path.write_text("a.JPEG 4\n", "utf-8-sig")
    assert read_list_file(str(path)) == (["a.JPEG"], [4]), "a byte-order mark is no part of the first path"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("a.JPEG 0\nb.JPEG\n", r"list.txt, line 2: expected 'relative/path label'.*'b.JPEG'"),
        ("a.JPEG 0\n\n7\n", "line 3: expected"),
        ("a.JPEG -1\n", "line 1: expected.*from 0"),
        ("a.JPEG 1.0\n", "line 1: expected"),
        ("a.JPEG cat\n", "line 1: expected"),
        ("a.JPEG ²\n", "line 1: expected"),
        ("a.JPEG,0\n", "line 1: expected"),
        ("a.JPEG 0\n/etc/passwd 1\n", "line 2: /etc/passwd leaves the image folder"),
        ("../a.JPEG 0\n", "line 1: .*leaves the image folder"),
        ("a.JPEG 0\nb.JPEG 1\na.JPEG 1\n", "line 3: a.JPEG stands in line 1 already"),
        ("\n", "has no line"),
    ],
)
def test_a_line_that_is_no_row_is_named(tmp_path, lines, message):
    """A list of 115,846 lines with one bad one: without its number nobody finds it."""
    path = tmp_path / "list.txt"
    path.write_text(lines, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_list_file(path)
