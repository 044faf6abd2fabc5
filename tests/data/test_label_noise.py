"""Label noise: exact counts, the published CIFAR-10 case, clean labels that survive, and inputs that are refused."""

from __future__ import annotations

from fractions import Fraction

import datasets
import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from hfkd.data.label_noise import instance_dependent_labels, noisy_labels, transition_matrix, with_label_noise

CIFAR_10 = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 5000))
OPPOSITE = [(label + 5) % 10 for label in range(10)]
FEATURES = np.random.default_rng(1).normal(size=(600, 2, 3)) * [1.0, 10.0, 100.0] + 5.0
LABELS = np.random.default_rng(2).permutation(np.repeat(np.arange(3), 200))


def confusion(clean, noisy, classes: int) -> np.ndarray:
    found = np.zeros((classes, classes), dtype=int)
    for before, after in zip(clean, noisy, strict=True):
        found[before, after] += 1
    return found


# ---- the published case ----


def test_cifar_10_has_the_released_counts():
    """Other counts than 1,000 of 5,000 a class, y -> y + 5 mod 10, are another data set than the paper's teachers saw."""
    noisy = noisy_labels(CIFAR_10, transition_matrix(10, 0.2, OPPOSITE), seed=0)
    expected = 4000 * np.eye(10, dtype=int) + 1000 * np.eye(10, dtype=int)[OPPOSITE]
    assert (confusion(CIFAR_10, noisy, 10) == expected).all()
    assert noisy.dtype == np.int64 and noisy.shape == CIFAR_10.shape


def test_the_seed_alone_decides_which_rows_are_wrong():
    """Noise that differs between two runs, or depends on other classes' rows, gives every teacher other data."""
    transition = transition_matrix(10, 0.2, OPPOSITE)
    first = noisy_labels(CIFAR_10, transition, seed=3)
    assert (first == noisy_labels(CIFAR_10.tolist(), transition, seed=3)).all()
    other = noisy_labels(CIFAR_10, transition, seed=4)
    both = ((first != CIFAR_10) & (other != CIFAR_10)).sum()
    assert 1700 < both < 2300, "of two seeds' 10,000 wrong labels about 2,000 meet; 10,000 would be one choice"
    some = CIFAR_10 < 3
    assert (noisy_labels(CIFAR_10[some], transition, seed=3) == first[some]).all()


def test_wrong_rows_lie_anywhere_in_their_class():
    """The first rows of a class in place of drawn ones are one camera, one author: noise that depends on the order."""
    labels = np.zeros(1000, dtype=int)
    wrong = np.flatnonzero(noisy_labels(labels, transition_matrix(2, 0.2), seed=0))
    assert len(wrong) == 200 and abs(wrong.mean() - 500) < 80  # 4 standard errors of 20
    ends = noisy_labels(labels, [[0.6, 0.2, 0.2], [0, 1, 0], [0, 0, 1]], seed=0)
    assert abs(np.flatnonzero(ends == 1).mean() - np.flatnonzero(ends == 2).mean()) < 120  # and which wrong label


# ---- exact counts ----


@st.composite
def noise(draw):
    """Labels, a matrix of exact fractions, and a seed."""
    classes = draw(st.integers(2, 6))
    weights = draw(
        st.lists(st.lists(st.integers(0, 20), min_size=classes, max_size=classes), min_size=classes, max_size=classes)
    )
    for label, row in enumerate(weights):
        row[label] += 1
    labels = draw(st.lists(st.integers(0, classes - 1), min_size=1, max_size=300))
    return labels, [[Fraction(weight, sum(row)) for weight in row] for row in weights], draw(st.integers(0, 9))


def largest_remainders(rows: int, shares: list[Fraction], label: int) -> list[int]:
    """In exact fractions; the clean label goes first in a tie, then class label + 1, and so on."""
    seats = [int(rows * share) for share in shares]
    order = [(label + step) % len(shares) for step in range(len(shares))]
    for other in sorted(order, key=lambda other: seats[other] - rows * shares[other])[: rows - sum(seats)]:
        seats[other] += 1
    return seats


@given(noise())
def test_counts_are_exact_for_any_matrix(case):
    """A rate that is met on average only makes a class of 50 rows anything between clean and half wrong."""
    labels, shares, seed = case
    classes = len(shares)
    counts = [labels.count(label) for label in range(classes)]
    expected = [largest_remainders(counts[label], shares[label], label) for label in range(classes)]
    assume(all(expected[label][label] for label in set(labels)))
    found = confusion(labels, noisy_labels(labels, np.array(shares, dtype=float), seed), classes)
    assert found.tolist() == expected
    for label in range(classes):
        assert all(abs(found[label, j] - counts[label] * shares[label][j]) < 1 for j in range(classes))


@given(st.integers(2, 8), st.integers(1, 60), st.integers(0, 99), st.integers(0, 99), st.booleans())
@example(9, 17, 52, 53, False)
def test_a_lower_rate_is_part_of_a_higher_one(classes, rows, first, second, symmetric):
    """A study over rates that draws anew for each shows other rows as well as more of them."""
    low, high = sorted((first / 100, second / 100))
    partners = None if symmetric else [(label + 1) % classes for label in range(classes)]
    labels = np.repeat(np.arange(classes), rows)
    try:
        some, more = (noisy_labels(labels, transition_matrix(classes, rate, partners), 1) for rate in (low, high))
    except ValueError:
        assume(False)
    assert set(np.flatnonzero(some != labels)) <= set(np.flatnonzero(more != labels))


def test_products_that_are_whole_on_paper_stay_whole():
    """100 * 0.29 is 28.999999999999996 in floating point: cut off, a rate of 0.29 becomes 0.28; a tie is none."""
    for percent in range(100):
        noisy = noisy_labels(np.zeros(100, dtype=int), transition_matrix(2, percent / 100))
        assert noisy.sum() == percent
    tie = noisy_labels(np.zeros(5, dtype=int), transition_matrix(2, 0.9))  # 4.5 and 5 * 0.09999999999999998
    assert tie.sum() == 4, "of equal remainders the clean label's goes first"


def test_equal_remainders_do_not_all_go_to_one_class():
    """Extras that always go to class 0 make it more frequent than the others: the noise is no longer symmetric."""
    labels = np.repeat(np.arange(10), 50)
    noisy = noisy_labels(labels, transition_matrix(10, 0.2))
    assert np.bincount(noisy).tolist() == [50] * 10


# ---- matrices ----


@given(st.integers(2, 30), st.floats(0, 0.99), st.integers(0, 9))
def test_rows_of_a_matrix_are_shares(classes, rate, seed):
    """Rows that do not sum to 1 lose rows; a rate that counts right labels too is another noise than it says."""
    for partners in (None, np.random.default_rng(seed).permutation(classes).tolist()):
        transition = transition_matrix(classes, rate, partners)
        assert transition.dtype == np.float64 and (transition >= 0).all()
        assert transition.sum(1) == pytest.approx(1)
        kept = [partners is not None and partners[label] == label for label in range(classes)]
        assert np.diag(transition) == pytest.approx([1.0 if own else 1 - rate for own in kept])


def test_cats_may_be_dogs_while_dogs_stay_dogs():
    """One-way noise (the paper's caption) read as a swap makes a clean class noisy."""
    transition = transition_matrix(3, 0.2, [0, 2, 2])
    assert transition.tolist() == [[1, 0, 0], [0, 0.8, 0.2], [0, 0, 1]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 1.0), "from 0 to below 1, not 1.0: 1 leaves a class without clean labels"),
        ((10, 20), "percentages are divided by 100"),
        ((10, -0.1), "not -0.1"),
        ((10, float("nan")), "not nan"),
        ((1, 0.2), "2 classes or more, not 1"),
        ((3, 0.2, [1, 2]), "3 classes need 3 partners, not 2"),
        ((3, 0.2, [1, 2, 3]), "partners must be whole numbers from 0 to 2; 1 of 3 are not, the first is 3 in row 2"),
    ],
)
def test_settings_that_are_no_noise_are_refused(arguments, message):
    """A rate of 20 for 20 %, or a partner that is no class, is noticed after ten teachers are trained."""
    with pytest.raises(ValueError, match=message):
        transition_matrix(*arguments)


@pytest.mark.parametrize(
    ("transition", "message"),
    [
        ([[0.8, 0.1], [0.2, 0.8]], r"1 of 2 do not \(row: sum\) 0: 0.9"),
        ([[0.8, 0.3], [0.2, 0.8]], r"1 of 2 do not \(row: sum\) 0: 1.1"),
        ([[1.2, -0.2], [0.2, 0.8]], "1 of 2 do not"),
        ([[80, 20], [20, 80]], "in percent"),
        ([[0.8, 0.2]], r"shape \(num_labels, num_labels\), not \(1, 2\)"),
        ([[0.8, 0.2], [np.nan, 1]], r"the transition matrix must be finite: 1 of 2 rows hold nan or inf, rows \[1\]"),
        ([[0.8, 0.2], [1, 0]], r"leaves the classes \[1\] without clean labels"),
    ],
)
def test_a_matrix_that_is_none_is_refused(transition, message):
    """A transposed or unnormalised matrix injects another noise than the report compares with."""
    with pytest.raises(ValueError, match=message):
        noisy_labels([0, 1], transition)


def test_float32_matrices_count_as_exactly():
    """Sums that are 1 to seven digits must neither be refused nor move a row, not even in millions of rows."""
    transition = transition_matrix(10, 0.3).astype(np.float32)
    assert (noisy_labels(CIFAR_10, transition) == noisy_labels(CIFAR_10, transition_matrix(10, 0.3))).all()
    many = noisy_labels(np.zeros(2_500_000, dtype=int), [[0.5000004, 0.5000004], [0.5, 0.5]])
    assert np.bincount(many).tolist() == [1_250_000] * 2


# ---- labels that are refused ----


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, -1, 0], "from 0 to 1; 1 of 4 are not, the first is -1 in row 2: drop unlabelled rows"),
        ([0, 1, 2], "the first is 2 in row 2.*give the matrix a row for every class"),
        ([0, 1, 0.5], "the first is 0.5 in row 2"),
        ([0, float("nan"), 1, float("inf")], r"labels must be finite: 2 of 4 rows hold nan or inf, rows \[1, 3\]"),
        (["cat", "dog"], r"class ids of shape \(rows,\), not <U3"),
        ([[0, 1]], r"of shape \(1, 2\)"),
        ([], r"of shape \(0,\)"),
        ([0, 0, 1], "leaves class 1 without clean labels: of its 1 rows none keeps its label"),
    ],
)
def test_labels_that_cannot_be_made_noisy_are_refused(labels, message):
    """Hidden labels (-1) count from the end of a matrix; a class without one clean label cannot be learned by anybody."""
    with pytest.raises(ValueError, match=message):
        noisy_labels(labels, transition_matrix(2, 0.6))


# ---- noise that depends on the example ----


def test_instance_dependent_counts_are_exact_and_seeded():
    """A rate met on average only, or other rows in every run, makes curves against the noise rate jump."""
    noisy = instance_dependent_labels(FEATURES, LABELS, 0.3, seed=5)
    assert [200 - kept for kept in np.diag(confusion(LABELS, noisy, 3))] == [60] * 3
    assert (noisy == instance_dependent_labels(FEATURES, LABELS, 0.3, seed=5)).all() and noisy.dtype == np.int64
    assert (noisy != instance_dependent_labels(FEATURES, LABELS, 0.3, seed=6)).any()
    less = instance_dependent_labels(FEATURES, LABELS, 0.1, seed=5)
    assert (noisy[less != LABELS] == less[less != LABELS]).all(), "a lower rate is part of a higher one"


def test_similar_examples_go_wrong_alike():
    """Noise that ignores the features is class-dependent noise under another name."""
    features = np.random.default_rng(0).normal(size=(4000, 2))
    noisy = instance_dependent_labels(features, np.zeros(4000, dtype=int), 0.4, seed=1, num_labels=3)
    wrong = noisy != 0
    assert foretold(features, wrong) > 0.1, "whether an example goes wrong"
    assert foretold(features[wrong], noisy[wrong] == 1) > 0.1, "and as which class"
    assert abs(foretold(features, np.random.default_rng(0).permutation(wrong))) < 0.1


def foretold(features, answers) -> float:
    """Correlation of answers on the second half with a linear fit to the first."""
    half, inputs = len(answers) // 2, np.column_stack([features, np.ones(len(features))])
    weights = np.linalg.lstsq(inputs[:half], answers[:half].astype(float))[0]
    return float(np.corrcoef(inputs[half:] @ weights, answers[half:])[0, 1])


def test_the_scale_of_features_does_not_matter():
    """Pixels from 0 to 255 in place of 0 to 1 would make the noise a function of the brightest pixel alone."""
    scaled = FEATURES * [[[2.0, 4.0, 0.5]]] + 8.0
    first, second = (instance_dependent_labels(values, LABELS, 0.3, seed=2) for values in (FEATURES, scaled))
    assert (first == second).mean() > 0.99
    constant = np.concatenate([FEATURES.reshape(600, -1), np.ones((600, 1))], axis=1)
    assert np.isfinite(instance_dependent_labels(constant, LABELS, 0.3)).all()


@pytest.mark.parametrize(
    ("features", "rate", "message"),
    [
        (FEATURES[:599], 0.3, r"600 labels need features of shape \(600, ...\), not \(599, 2, 3\)"),
        (np.ones((600, 2)), 0.3, "the same in every row"),
        (FEATURES, 1.0, "rate is the share"),
        (FEATURES, 0.999, "leaves class 0 without clean labels: of its 200 rows none"),
    ],
)
def test_features_that_say_nothing_are_refused(features, rate, message):
    """Features of other rows put the noise on the wrong examples."""
    with pytest.raises(ValueError, match=message):
        instance_dependent_labels(features, LABELS, rate)


def test_features_that_are_not_finite_are_named():
    """One nan in a column makes every score of it nan, and the rows with nan are always the wrong ones."""
    broken = FEATURES.copy()
    broken[7, 1, 2], broken[400] = np.nan, np.inf
    with pytest.raises(
        ValueError, match=r"the features must be finite: 2 of 600 rows hold nan or inf, rows \[7, 400\]"
    ):
        instance_dependent_labels(broken, LABELS, 0.3)


# ---- data sets ----


def rows(names=("a", "b", "c"), count=30):
    features = datasets.Features(
        text=datasets.Value("string"), label=datasets.ClassLabel(names=list(names)), example_id=datasets.Value("int64")
    )
    values = {
        "text": [f"t{n}" for n in range(count)],
        "label": [n % 3 for n in range(count)],
        "example_id": list(range(count)),
    }
    return datasets.Dataset.from_dict(values, features=features)


def test_a_data_set_keeps_its_clean_labels_names_and_order():
    """Without the clean labels nobody can score a teacher; a label that lost its names is aligned with another model's."""
    transition = transition_matrix(3, 0.3)
    chosen = rows().select(range(3, 27)).with_format("torch", columns=["label"])
    noisy = with_label_noise(chosen, transition, seed=1)
    plain = noisy.with_format(None)
    assert noisy.column_names == ["text", "label", "example_id", "clean_label"]
    assert noisy.features["label"] == noisy.features["clean_label"] == rows().features["label"]
    assert plain["clean_label"][:] == [n % 3 for n in range(3, 27)] and plain["example_id"][:] == list(range(3, 27))
    assert plain["label"][:] == noisy_labels(plain["clean_label"][:], transition, 1).tolist() != plain["clean_label"][:]
    assert chosen.column_names == ["text", "label", "example_id"], "the caller's data set is untouched"


def test_equal_noise_has_an_equal_fingerprint():
    """A fingerprint that changes in every process makes every process build a cache of its own."""
    first, second, other = (
        with_label_noise(rows(), transition_matrix(3, 0.3), seed)._fingerprint for seed in (1, 1, 2)
    )
    assert first == second != other


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda data: data.rename_column("label", "labels"),
            ValueError,
            "noise goes from 'label', which must be there",
        ),
        (lambda data: with_label_noise(data, np.eye(3)), ValueError, "to 'clean_label', which must not"),
        (lambda data: datasets.DatasetDict(train=data, test=data), TypeError, r"one split, not \['train', 'test'\]"),
        (lambda data: data.to_iterable_dataset(), TypeError, "one split, not IterableDataset"),
        (lambda data: rows(names=("a", "b", "c", "d")), ValueError, "matrix has 3 rows, 'label' the classes.*'d'"),
    ],
)
def test_data_sets_that_would_lose_their_clean_labels_are_refused(change, error, message):
    """Noise on noise has another rate and no clean labels; noise in the test split makes every score meaningless."""
    with pytest.raises(error, match=message):
        with_label_noise(change(rows()), transition_matrix(3, 0.3))
