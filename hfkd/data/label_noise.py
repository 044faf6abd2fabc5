"""Wrong labels on purpose: counted exactly, drawn from a seed, with the clean ones kept beside them.

For training rows only: models are scored on clean labels. `transition[c, j]` is the share of the rows of class c that is
labelled j. At one seed, the rows that a lower rate of `transition_matrix` makes wrong are among those of a higher rate: a
study over rates changes the rate and nothing else (with symmetric noise also which wrong label some of these rows have).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from datasets import Dataset

Ids = NDArray[np.int64]
Matrix = NDArray[np.float64]


# ---- matrices ----


def transition_matrix(num_labels: int, rate: float, partners: Sequence[int] | None = None) -> Matrix:
    """Shares `(num_labels, num_labels)` of a noise that makes `rate` of every class's labels wrong; rows sum to 1.

    Without partners the noise is symmetric, rate / (num_labels - 1) to each other class; papers whose rate counts redrawn
    labels, right ones among them, mean num_labels / (num_labels - 1) times ours. With partners, class c becomes partners[c]:
    a permutation or not, and a class that is its own partner stays clean. The released labels of *Bad Models Can Be Good
    Role Models* (arXiv 2203.14649) are rate 0.2 with partners (c + 5) mod 10; its wrong rows are
    others than those of our seeds.

    From 0.5 with partners, or 1 - 1 / num_labels without, a wrong label is as frequent as the right one, and no vote of
    however many teachers finds it: allowed, and seldom meant. Raises ValueError for a rate outside of [0, 1) (1 leaves no
    clean label) and for partners that are not one class for each class.
    """
    if num_labels < 2:
        raise ValueError(f"label noise needs 2 classes or more, not {num_labels}")
    if not 0 <= rate < 1:  # nan as well
        raise ValueError(
            f"rate is the share of wrong labels, from 0 to below 1, not {rate}: 1 leaves a class without clean labels, and "
            "percentages are divided by 100"
        )
    if partners is None:
        transition = np.full((num_labels, num_labels), rate / (num_labels - 1))
        np.fill_diagonal(transition, 1 - rate)
        return transition
    others = _class_ids(partners, num_labels, "partners")
    if len(others) != num_labels:
        raise ValueError(
            f"{num_labels} classes need {num_labels} partners, not {len(others)}: name a class's own id to skip it"
        )
    transition = np.diag(np.full(num_labels, 1.0 - rate))
    transition[np.arange(num_labels), others] += rate
    return transition


def _checked(transition: ArrayLike) -> Matrix:
    shares = np.asarray(transition, dtype=np.float64)
    if shares.ndim != 2 or shares.shape[0] != shares.shape[1] or not shares.size:
        raise ValueError(f"a transition matrix has shape (num_labels, num_labels), not {shares.shape}")
    _refuse_non_finite(shares, "the transition matrix")
    sums = shares.sum(1)
    odd = np.flatnonzero((np.abs(sums - 1) > 1e-6) | (shares < 0).any(1))
    if odd.size:
        named = ", ".join(f"{row}: {sums[row]:.6g}" for row in odd[:10])
        raise ValueError(
            f"every row of a transition matrix holds shares of 0 or more that sum to 1; {odd.size} of {len(shares)} do not "
            f"(row: sum) {named}. Row c is what becomes of class c: is the matrix transposed, or in percent?"
        )
    dirty = np.flatnonzero(np.diag(shares) == 0)
    if dirty.size:
        raise ValueError(
            f"the noise leaves the classes {dirty[:10].tolist()} without clean labels: their diagonal is 0"
        )
    return shares / sums[:, None]  # a sum of 1.0000005 would share out one row too many in a million


# ---- labels ----


def noisy_labels(labels: ArrayLike, transition: ArrayLike, seed: int = 0) -> Ids:
    """The labels `(rows,)` with noise: of the n rows of class c, n * transition[c, j] become j, in exact counts.

    Counts are rounded by largest remainders, so that they sum to n and each is off by less than 1; of equal remainders the
    clean label's goes first, then that of class c + 1, and so on. Which rows change is a shuffle of the class, keyed by
    (seed, class): the rows of other classes do not matter.
    Raises ValueError for a matrix whose rows are not shares that sum to 1, for labels that are no class ids of it, and for
    counts that leave a class without one clean label.
    """
    shares = _checked(transition)
    clean = _class_ids(labels, len(shares), "labels")
    noisy = clean.copy()
    for label in np.unique(clean).tolist():
        rows = np.flatnonzero(clean == label)
        counts = _counts(len(rows), shares[label], label)
        _refuse_no_clean_labels(label, len(rows), counts[label])
        # One shuffle for all rates, in order of class: what a lower rate makes wrong stays wrong at a higher one
        rows = np.random.default_rng([seed, label]).permutation(rows)
        noisy[rows] = np.repeat(np.arange(len(shares)), counts)
    return noisy


def _counts(rows: int, shares: Matrix, label: int) -> Ids:
    exact = rows * shares
    counts = np.floor(exact).astype(np.int64)
    # Rounded: 100 * 0.29 is 28.999999999999996, and what is a tie on paper must be one here
    remainders = np.round(exact - counts, 9)
    from_clean = (np.arange(len(shares)) - label) % len(shares)
    largest = np.lexsort((from_clean, -remainders))
    counts[largest[: rows - counts.sum()]] += 1
    return counts


def instance_dependent_labels(
    features: ArrayLike, labels: ArrayLike, rate: float, seed: int = 0, num_labels: int | None = None
) -> Ids:
    """The labels `(rows,)` with noise that follows the features `(rows, ...)`: similar rows go wrong alike.

    After Xia et al. 2020 (arXiv 2006.07836, algorithm 2, recalled and not verified): each class c has a random projection
    W_c of the features onto classes, and a wrong row's label is drawn from softmax(x W_c) over the other classes. Two things
    are ours: columns are standardised and x is divided by the root of their number, so that the scale of features does not
    matter; and of each class exactly round(rate * n) rows are wrong, drawn without replacement with odds of
    sum over j != c of exp(x W_c)_j (Gumbel noise on every score; the rows with the largest maxima). In the paper every row
    has a rate of its own, independent of x, and the number is right on average only.

    num_labels is by default the largest label plus 1. What is drawn for a class is keyed by (seed, class). Raises ValueError
    for features that are not finite (rows named), not as many as labels, or the same in every row, and for a rate that
    leaves a class without clean labels.
    """
    clean = _class_ids(labels, num_labels, "labels")
    classes = int(clean.max()) + 1 if num_labels is None else num_labels
    transition_matrix(classes, rate)  # says what is wrong with the rate
    inputs = _standardised(features, len(clean))
    noisy = clean.copy()
    for label in np.unique(clean).tolist():
        rows = np.flatnonzero(clean == label)
        wrong = round(rate * len(rows))
        _refuse_no_clean_labels(label, len(rows), len(rows) - wrong)
        generator = np.random.default_rng([seed, label])
        scores = inputs[rows] @ generator.normal(size=(inputs.shape[1], classes))
        scores += generator.gumbel(size=scores.shape)
        scores[:, label] = -np.inf
        chosen = np.argsort(-scores.max(1), kind="stable")[:wrong]
        noisy[rows[chosen]] = scores[chosen].argmax(1)
    return noisy


def _standardised(features: ArrayLike, rows: int) -> Matrix:
    inputs = np.asarray(features, dtype=np.float64)
    if inputs.ndim < 2 or len(inputs) != rows or not inputs.size:
        raise ValueError(f"{rows} labels need features of shape ({rows}, ...), not {inputs.shape}")
    inputs = inputs.reshape(rows, -1)
    _refuse_non_finite(inputs, "the features")
    spread = inputs.std(0)
    if not spread.any():
        raise ValueError("the features are the same in every row: no noise can depend on them; use transition_matrix")
    centred = np.divide(inputs - inputs.mean(0), spread, out=np.zeros_like(inputs), where=spread > 0)
    return centred / np.sqrt(inputs.shape[1])


# ---- data sets ----


def with_label_noise(
    dataset: Dataset, transition: ArrayLike, seed: int = 0, column: str = "label", clean_column: str = "clean_label"
) -> Dataset:
    """The data set with `noisy_labels` in `column`, at its place and of its type, and the clean ones in `clean_column`, last.

    Raises ValueError where the column is missing, where `clean_column` is there already (noise on noise has no clean labels
    and another rate), and where the data set names more or fewer classes than the matrix has; TypeError for several splits at
    once and for a stream, whose classes cannot be counted.
    """
    if isinstance(dataset, dict) or not hasattr(dataset, "__len__"):
        found = list(dataset) if isinstance(dataset, dict) else type(dataset).__name__
        raise TypeError(
            f"noise needs the rows of one split, not {found}: the labels that models are scored on stay clean"
        )
    if column not in dataset.column_names or clean_column in dataset.column_names:
        raise ValueError(
            f"noise goes from {column!r}, which must be there, to {clean_column!r}, which must not; the columns are "
            f"{dataset.column_names}"
        )
    feature, order = dataset.features[column], dataset.column_names
    names = getattr(feature, "names", None)
    if names and len(names) != len(np.asarray(transition)):
        raise ValueError(
            f"the transition matrix has {len(np.asarray(transition))} rows, {column!r} the classes {names}"
        )
    clean = dataset.with_format(None)[column][:]
    noisy = noisy_labels(clean, transition, seed)
    changed = dataset.remove_columns(column).add_column(column, noisy, feature=feature)
    return changed.add_column(clean_column, clean, feature=feature).select_columns([*order, clean_column])


# ---- what is refused ----


def _class_ids(ids: ArrayLike, num_labels: int | None, what: str) -> Ids:
    found = np.asarray(ids)
    if found.ndim != 1 or not found.size or found.dtype.kind not in "iuf":
        raise ValueError(f"{what} must be class ids of shape (rows,), not {found.dtype} of shape {found.shape}")
    _refuse_non_finite(found, what)
    odd = np.flatnonzero((found != np.floor(found)) | (found < 0) | (num_labels is not None and found >= num_labels))
    if odd.size:
        top = "" if num_labels is None else f" to {num_labels - 1}"
        raise ValueError(
            f"{what} must be whole numbers from 0{top}; {odd.size} of {len(found)} are not, the first is {found[odd[0]]} in "
            f"row {odd[0]}: drop unlabelled rows (-1, -100), or give the matrix a row for every class"
        )
    return found.astype(np.int64)


def _refuse_non_finite(values: NDArray[Any], what: str) -> None:
    odd = np.flatnonzero(~np.isfinite(values).reshape(len(values), -1).all(1))
    if odd.size:
        raise ValueError(
            f"{what} must be finite: {odd.size} of {len(values)} rows hold nan or inf, rows {odd[:10].tolist()}"
            f"{' and more' if odd.size > 10 else ''}"
        )


def _refuse_no_clean_labels(label: int, rows: int, clean: int) -> None:
    if clean < 1:
        raise ValueError(
            f"the noise leaves class {label} without clean labels: of its {rows} rows none keeps its label. Lower the rate, or "
            "give the class more rows"
        )
