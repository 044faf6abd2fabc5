"""Long-tailed subsets of balanced data, and the published lists of ImageNet-LT.

Training rows only: the test set stays balanced, so that its accuracy is the mean over classes.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from hfkd.data.splits import rows_of_classes

PROFILES = ("exponential", "step")


def long_tail_counts(max_count: int, num_classes: int, ratio: float, profile: str = "exponential") -> list[int]:
    """Rows of each class, head first: `max_count` of the first, `max_count / ratio` of the last, cut to whole numbers.

    "exponential": n_c = int(max_count * ratio^(-c / (C - 1))) (Cui et al. 2019, arXiv 1901.05555, as Cao et al. 2019 have
    it). "step": the first half of the classes (one fewer where their number is odd) has max_count, the others
    max_count / ratio (Cao et al. 2019, arXiv 1906.07413). Raises ValueError for a ratio below 1, for a class that would
    be left without a row, and for an unknown profile.
    """
    if num_classes < 1 or max_count < 1:
        raise ValueError(
            f"there must be 1 class and 1 row or more, not {num_classes} classes of up to {max_count} rows"
        )
    counts = [int(max_count / share) for share in _divisors(num_classes, ratio, profile)]
    if not counts[-1]:
        raise ValueError(
            f"at ratio {ratio:g} a largest class of {max_count} rows leaves the smallest without any: ask for a ratio of at "
            f"most {max_count}"
        )
    return counts


def _divisors(num_classes: int, ratio: float, profile: str) -> list[float]:
    """How many times smaller than the first each class is."""
    if not 1 <= ratio < math.inf:
        raise ValueError(
            f"ratio is the largest class over the smallest, a finite number of 1 or above, not {ratio}: for a factor of "
            "0.01 write 100"
        )
    if profile not in PROFILES:
        raise ValueError(f"profile must be one of {', '.join(PROFILES)}, not {profile!r}")
    if profile == "step":
        return [1.0 if label < max(num_classes // 2, 1) else float(ratio) for label in range(num_classes)]
    return [ratio ** (label / max(num_classes - 1, 1)) for label in range(num_classes)]


def long_tail_subset(
    labels: Sequence[Hashable], ratio: float, profile: str = "exponential", seed: int = 0
) -> list[int]:
    """Row numbers, ascending, of a long-tailed subset: the first label in sorted order is the most frequent.

    `labels` has shape (rows,). The counts are those of `long_tail_counts`, with the largest `max_count` for which every
    class has rows enough. Which rows of a class stay is a shuffle of that class, seeded by (seed, class), of which a
    higher ratio keeps fewer: of balanced data the subsets of one seed are nested. The published CIFAR-LT files keep other
    rows.
    Raises ValueError as `long_tail_counts` does, and for labels that hold one class only.
    """
    rows_of = rows_of_classes(labels)
    classes = sorted(rows_of)  # type: ignore[type-var]
    if len(classes) < 2:
        raise ValueError(f"a long tail needs 2 classes or more, the labels hold {classes}")
    divisors = _divisors(len(classes), ratio, profile)
    sizes = [len(rows_of[label]) for label in classes]
    room = sizes[0]  # the first class has a divisor of 1 in both profiles
    while any(int(room / divisor) > size for size, divisor in zip(sizes, divisors, strict=True)):
        room -= 1
    counts = long_tail_counts(room, len(classes), ratio, profile)
    chosen: list[int] = []
    for number, (label, count) in enumerate(zip(classes, counts, strict=True)):
        chosen += np.random.default_rng([seed, number]).permutation(rows_of[label])[:count].tolist()
    return sorted(chosen)


def read_list_file(path: str | Path) -> tuple[list[str], list[int]]:
    """Image paths and labels of a list file, such as ImageNet-LT's `ImageNet_LT_train.txt` (Liu et al. 2019).

    A line is `relative/path label`, with the label, a class number from 0, last; a path may hold blanks. Raises
    ValueError, naming the line, where it is anything else, for a path that leaves the image folder, for a path that
    comes twice, and for a file without a line.
    """
    first_line: dict[str, int] = {}
    labels = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8-sig").splitlines(), start=1):
        if not line.strip():
            continue
        name, label = _read_line(line, f"{path}, line {number}")
        if name in first_line:
            raise ValueError(f"{path}, line {number}: {name} stands in line {first_line[name]} already")
        first_line[name] = number
        labels.append(label)
    if not labels:
        raise ValueError(f"{path} has no line 'relative/path label'")
    return list(first_line), labels


def _read_line(line: str, where: str) -> tuple[str, int]:
    name, _, label = line.strip().rpartition(" ")
    name = name.strip()
    if not name or not (label.isascii() and label.isdigit()):
        raise ValueError(f"{where}: expected 'relative/path label' with a class number from 0, not {line[:80]!r}")
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise ValueError(f"{where}: {name} leaves the image folder: paths must be relative to it")
    return name, int(label)
