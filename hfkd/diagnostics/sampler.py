"""Is a model a sampler of its noisy training labels? Its predictions on clean test labels against the noise that was injected.

A network that interpolates noisy labels tends to predict, on new examples, what a noisy label would have been: a bad
classifier and a good teacher (*Bad Models Can Be Good Role Models*, arXiv 2203.14649, figure 1; feature calibration of
Nakkiran and Bansal, arXiv 2009.08092; both recalled, not verified).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

INTERPOLATES = 0.99  # accuracy on its own noisy training labels, from which a model is said to fit them
_LEVEL = 0.95
_FEWEST = 5.0  # predictions that a sampler would make of a class: none of them by chance is rarer than 1 in 100

Matrix = NDArray[np.float64]


@dataclass(frozen=True, eq=False)  # arrays have no one truth value
class SamplerReport:
    """What `sampler_report` found. Shares are fractions of all examples, in [0, 1]."""

    confusion: Matrix  # (C, C) joint: share of examples of clean class c that are predicted as j; sums to 1
    expected: Matrix  # (C, C) the same of an ideal sampler: share of class c times transition[c, j]
    total_variation: float  # half the sum of |confusion - expected|
    floor: float  # what an ideal sampler stays below in 95 % of draws, on as many examples
    partner_mass: float  # share of examples predicted as the class that the noise makes of theirs most often
    expected_partner_mass: float  # the same of an ideal sampler
    clean_accuracy: float
    noise_rate: float  # share of wrong labels that the noise makes of these examples
    noisy_train_accuracy: float | None  # as given
    examples: int
    verdict: str  # one sentence

    @property
    def transition_estimate(self) -> Matrix:
        """`(C, C)`, rows that sum to 1: P(prediction j | clean class c); nan for a class without an example."""
        shares = self.confusion.sum(1, keepdims=True)
        return np.divide(self.confusion, shares, out=np.full_like(self.confusion, np.nan), where=shares > 0)

    @property
    def interpolates(self) -> bool | None:
        """Whether the noisy training labels are fitted, to 99 % or more; None where their accuracy was not given."""
        return None if self.noisy_train_accuracy is None else self.noisy_train_accuracy >= INTERPOLATES

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, for JSON."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in values.items()}

    def markdown(self) -> str:
        """The verdict and a table of the numbers."""
        train = "–" if self.noisy_train_accuracy is None else f"{100 * self.noisy_train_accuracy:.1f} %"
        rows = [
            ("total variation to the injected noise", f"{self.total_variation:.3f}", f"below {self.floor:.3f}"),
            ("predicted as the noise partner", *_percent(self.partner_mass, self.expected_partner_mass)),
            ("accuracy on clean labels", *_percent(self.clean_accuracy, 1 - self.noise_rate)),
            ("accuracy on its noisy training labels", train, f"{100 * INTERPOLATES:.0f} % or more"),
        ]
        lines = [f"| {name} | {found} | {ideal} |" for name, found, ideal in rows]
        head = f"| {self.examples:,} examples | model | ideal sampler |\n|---|---:|---:|"
        return "\n".join([self.verdict, "", head, *lines])


def sampler_report(
    predictions: ArrayLike,
    clean_labels: ArrayLike,
    transition: ArrayLike,
    noisy_train_accuracy: float | None = None,
    bootstrap: int = 200,
    seed: int = 0,
) -> SamplerReport:
    """Compare predictions on examples that were not trained on with what the injected noise would have made of them.

    predictions and clean_labels: class ids `(examples,)`. transition: `(C, C)`, rows that sum to 1, of
    `hfkd.data.label_noise`. noisy_train_accuracy: the model's on the labels it was trained on, a fraction; models that do
    not fit these are no samplers. The floor is the 95 % quantile of the total variation over `bootstrap` ideal samplers,
    which draw a noisy label for each of the same clean ones: a parametric bootstrap, keyed by seed.

    Total variation counts the model's own errors as well as missing noise, so that on hard data a sampler lies well above
    the floor. The verdict is therefore one of: a sampler (below the floor), a sampler with errors of its own (at least half
    of the noise partner's mass, and nearer to the noise than a perfect classifier), noise removed (nearer to the clean
    labels than to the noise), neither. The last three are our rule of thumb, not the paper's.

    Raises ValueError for predictions, labels or a matrix that are not finite (rows named) or do not fit each other, and for a
    class that is never predicted where a sampler would predict it 5 times or more: a model that has collapsed, or whose
    classes have another order.
    """
    shares = _transition(transition)
    found, clean = (_class_ids(ids, len(shares), what) for ids, what in _named(predictions, clean_labels))
    if noisy_train_accuracy is not None and not 0 <= noisy_train_accuracy <= 1:
        raise ValueError(f"noisy_train_accuracy is a fraction in [0, 1], not {noisy_train_accuracy}")
    counts = np.bincount(clean, minlength=len(shares))
    expected = counts[:, None] / len(clean) * shares
    confusion = np.zeros_like(shares)
    np.add.at(confusion, (clean, found), 1 / len(clean))
    _refuse_never_predicted(found, expected)
    partners = _partners(shares)
    numbers = {
        "total_variation": _total_variation(confusion, expected),
        "floor": _floor(counts, shares, bootstrap, seed),
        "partner_mass": float(confusion[partners].sum()),
        "expected_partner_mass": float(expected[partners].sum()),
        "clean_accuracy": float(np.mean(found == clean)),
        "noise_rate": float(1 - np.trace(expected)),
    }
    sentence = _verdict(**numbers, noisy_train_accuracy=noisy_train_accuracy)
    return SamplerReport(
        confusion, expected, **numbers, noisy_train_accuracy=noisy_train_accuracy, examples=len(clean), verdict=sentence
    )


# ---- numbers ----


def _total_variation(first: Matrix, second: Matrix) -> float:
    return float(np.abs(first - second).sum() / 2)


def _floor(counts: NDArray[np.int64], shares: Matrix, bootstrap: int, seed: int) -> float:
    if bootstrap < 1:
        raise ValueError(f"bootstrap is a number of ideal samplers, at least 1, not {bootstrap}")
    draws = np.random.default_rng(seed).multinomial(counts, shares, size=(bootstrap, len(shares)))
    distances = np.abs(draws - counts[:, None] * shares).sum((1, 2)) / (2 * counts.sum())
    return float(np.quantile(distances, _LEVEL))


def _partners(shares: Matrix) -> NDArray[np.bool_]:
    """`(C, C)`: the wrong class that a class becomes most often; all wrong ones where the noise is symmetric."""
    wrong = shares * (1 - np.eye(len(shares)))
    most = wrong.max(1, keepdims=True)
    return (wrong > most - 1e-9) & (most > 0)


# ---- a sentence ----


def _verdict(
    total_variation: float,
    floor: float,
    partner_mass: float,
    expected_partner_mass: float,
    clean_accuracy: float,
    noise_rate: float,
    noisy_train_accuracy: float | None,
) -> str:
    distance = f"total variation {total_variation:.3f}, ideal samplers stay below {floor:.3f}"
    partner = f"{100 * partner_mass:.1f} % predicted as the noise partner, {100 * expected_partner_mass:.1f} % injected"
    if noise_rate < 1e-9:
        kind = f"There is no noise to sample; its accuracy is {100 * clean_accuracy:.1f} %"
    elif total_variation <= floor:
        kind = f"A sampler: its predictions cannot be told from the noisy labels ({distance})"
    elif 1 - clean_accuracy < total_variation:
        kind = f"The noise is mostly removed: nearer to the clean labels than to the noisy ones ({partner})"
    elif total_variation <= noise_rate and partner_mass >= expected_partner_mass / 2:
        kind = f"A sampler with errors of its own: it passes the noise on ({partner}; {distance})"
    else:
        kind = f"Neither a sampler nor a denoiser: its own errors outweigh the noise ({partner}; {distance})"
    if noisy_train_accuracy is None or noisy_train_accuracy >= INTERPOLATES:
        return f"{kind}."
    return f"{kind}; it does not interpolate, with {100 * noisy_train_accuracy:.1f} % on its noisy training labels."


def _percent(*shares: float) -> tuple[str, ...]:
    return tuple(f"{100 * share:.1f} %" for share in shares)


# ---- what is refused ----


def _transition(transition: ArrayLike) -> Matrix:
    shares = np.asarray(transition, dtype=np.float64)
    if shares.ndim != 2 or shares.shape[0] != shares.shape[1] or not shares.size:
        raise ValueError(f"a transition matrix has shape (num_labels, num_labels), not {shares.shape}")
    sums = shares.sum(1)
    odd = np.flatnonzero(~(np.abs(sums - 1) <= 1e-6) | ~(shares >= 0).all(1))  # nan as well
    if odd.size:
        named = ", ".join(f"{row}: {sums[row]:.6g}" for row in odd[:10])
        raise ValueError(
            f"every row of a transition matrix holds shares of 0 or more that sum to 1, and these do not (row: sum): {named}; "
            "row c is what becomes of class c"
        )
    return shares / sums[:, None]


def _named(predictions: ArrayLike, clean_labels: ArrayLike) -> list[tuple[NDArray[Any], str]]:
    found, clean = np.asarray(predictions), np.asarray(clean_labels)
    if found.ndim != 1 or found.shape != clean.shape or not found.size:
        raise ValueError(
            f"predictions and clean labels must be class ids of one shape (examples,), not {found.shape} and {clean.shape}; for "
            "logits take argmax over the last dimension first"
        )
    if found.dtype.kind not in "iuf" or clean.dtype.kind not in "iuf":
        raise ValueError(f"predictions and clean labels must be class ids, not {found.dtype} and {clean.dtype}")
    return [(found, "predictions"), (clean, "clean labels")]


def _class_ids(ids: NDArray[Any], num_labels: int, what: str) -> NDArray[np.int64]:
    odd = np.flatnonzero(~((ids >= 0) & (ids < num_labels)) | (ids != np.floor(ids)))  # nan is none of these
    if odd.size:
        raise ValueError(
            f"{what} must be class ids from 0 to {num_labels - 1}: {odd.size} of {len(ids)} are not, rows {odd[:10].tolist()}, "
            f"the first is {ids[odd[0]]}"
        )
    return ids.astype(np.int64)


def _refuse_never_predicted(found: NDArray[np.int64], expected: Matrix) -> None:
    due = expected.sum(0) * len(found)
    never = [label for label in np.flatnonzero(due >= _FEWEST).tolist() if not (found == label).any()]
    if never:
        named = ", ".join(f"{label} ({math.floor(due[label])})" for label in never[:10])
        raise ValueError(
            f"{len(never)} of {len(due)} classes are never predicted, each with the predictions of an ideal sampler: {named}. "
            "The model has collapsed or is untrained, or its classes stand in another order: compare its label2id"
        )
