"""Splits that hold whole groups or a part of every class out, small stratified subsets, rows for the members of an ensemble, and
their indices on disk.

Seeded and deterministic: the same seed holds out the same groups, whatever the order of the rows.
"""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from collections.abc import Hashable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np


def _held_out_count(held_out: int | float, number: int) -> int:
    count = held_out if isinstance(held_out, int) else max(1, round(held_out * number))
    if not (0 < held_out < 1 or isinstance(held_out, int)) or not 0 < count < number:
        raise ValueError(
            f"held_out is {held_out} and there are {number} groups: give a whole number from 1 to {number - 1}, "
            "or a fraction between 0 and 1 that leaves groups on both sides"
        )
    return count


def group_split(groups: Sequence[Any], held_out: int | float, seed: int = 0) -> tuple[list[int], list[int]]:
    """Row numbers of the two sides, (train, held out), ascending: no group has rows on both.

    `groups` names the group of each row, shape (rows,). `held_out` is a number of groups, or a fraction of the groups
    (not of the rows). Raises `ValueError` when a row has no group, or when one side would be left without any.
    """
    from sklearn.model_selection import GroupShuffleSplit

    missing = [row for row, group in enumerate(groups) if group is None]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(groups)} rows have no group, the first is row {missing[0]}: drop or name them"
        )
    names = {group: number for number, group in enumerate(sorted(set(groups)))}
    splitter = GroupShuffleSplit(n_splits=1, test_size=_held_out_count(held_out, len(names)), random_state=seed)
    numbers = np.array([names[group] for group in groups])
    train, test = next(splitter.split(numbers, groups=numbers))
    return sorted(train.tolist()), sorted(test.tolist())


def _shares(counts: Sequence[int], size: int) -> list[int]:
    """How many rows each class gives: one each, and the rest in proportion to what it has left (largest remainders)."""
    spare = [count - 1 for count in counts]
    wanted = size - len(counts)
    exact = [Fraction(wanted * left, sum(spare) or 1) for left in spare]
    shares = [math.floor(share) for share in exact]
    by_remainder = sorted(range(len(counts)), key=lambda index: (shares[index] - exact[index], index))
    for index in by_remainder[: wanted - sum(shares)]:
        shares[index] += 1
    return [share + 1 for share in shares]


def rows_of_classes(labels: Sequence[Hashable]) -> dict[Hashable, list[int]]:
    """The row numbers of each class, ascending; `labels` has shape (rows,)."""
    rows_of: dict[Hashable, list[int]] = defaultdict(list)
    for row, label in enumerate(labels):
        rows_of[label].append(row)
    return dict(rows_of)


def low_resource_subset(labels: Sequence[Hashable], size: int, seed: int = 0) -> list[int]:
    """Row numbers, ascending, of a stratified subset with `size` rows: every class has one row or more.

    `labels` has shape (rows,). scikit-learn's stratified splitters refuse classes with one row and may leave rare ones
    out, so the shares are counted here. Raises `ValueError` when `size` exceeds the rows or is below the number of
    classes.
    """
    rows_of = rows_of_classes(labels)
    if size > len(labels):
        raise ValueError(f"a subset of {size} rows is asked for and there are only {len(labels)}: ask for fewer")
    if size < max(1, len(rows_of)):
        raise ValueError(
            f"a subset of {size} rows cannot show all {len(rows_of)} classes: ask for {len(rows_of)} or more"
        )
    classes = sorted(rows_of, key=str)
    generator = np.random.default_rng(seed)
    chosen: list[int] = []
    for label, share in zip(classes, _shares([len(rows_of[label]) for label in classes], size), strict=True):
        chosen += generator.choice(rows_of[label], size=share, replace=False).tolist()
    return sorted(chosen)


def dev_split(
    labels: Sequence[Hashable], held_out: int | float = 0.2, seed: int = 0, stratified: bool = True
) -> tuple[list[int], list[int]]:
    """Row numbers of the two sides, (train, dev), ascending; every class has rows on both.

    `labels` has shape (rows,). `held_out` is a fraction of the rows: of each class (rounded, one row at least), or, with
    stratified=False, of all of them, whatever their class. Or it is a number of rows per class, the rule for long tails
    of Lukasik et al. 2022 (arXiv 2106.10494; k = 20 for CIFAR-100-LT, 50 for ImageNet-LT, as reported): a class of at most
    twice as many rows gives half of them, rounded down (a guess).

    A class draws by itself, seeded by (seed, class): what it holds out does not depend on the other classes' rows.
    Raises ValueError for a held_out that is neither, and for a class left without a row on one side, with the counts.
    """
    rows_of = rows_of_classes(labels)
    whole = isinstance(held_out, int)
    if (whole and held_out < 1) or not (whole or 0 < held_out < 1):
        raise ValueError(
            f"held_out is {held_out}: give a fraction between 0 and 1, or a number of rows per class from 1"
        )
    if whole and not stratified:
        raise ValueError(
            f"held_out={held_out} rows per class are a stratified split: give a fraction, or stratified=True"
        )
    if stratified:
        dev = _dev_by_class(rows_of, held_out, seed)
    else:
        size = round(held_out * len(labels))
        dev = np.random.default_rng(seed).permutation(len(labels))[:size].tolist()
    _refuse_one_sided_classes(rows_of, set(dev), held_out)
    return sorted(set(range(len(labels))) - set(dev)), sorted(dev)


def _dev_by_class(rows_of: dict[Hashable, list[int]], held_out: int | float, seed: int) -> list[int]:
    dev: list[int] = []
    for number, label in enumerate(sorted(rows_of, key=str)):
        count = len(rows_of[label])
        if isinstance(held_out, int):
            size = count // 2 if count <= 2 * held_out else held_out
        else:
            size = min(max(1, round(held_out * count)), count - 1)
        dev += np.random.default_rng([seed, number]).permutation(rows_of[label])[:size].tolist()
    return dev


def _refuse_one_sided_classes(rows_of: dict[Hashable, list[int]], dev: set[int], held_out: int | float) -> None:
    held = {label: sum(row in dev for row in rows) for label, rows in rows_of.items()}
    odd = [label for label in sorted(rows_of, key=str) if not 0 < held[label] < len(rows_of[label])]
    if odd or not rows_of:
        named = ", ".join(f"{label!r}: {len(rows_of[label]) - held[label]} and {held[label]}" for label in odd[:10])
        raise ValueError(
            f"held_out={held_out} leaves {len(odd)} of {len(rows_of)} classes without a training or a dev row (training and "
            f"dev rows of {named or 'no class at all'}): drop such classes, or give them more rows; with stratified=False "
            "rare ones are missed by chance"
        )


MEMBERS = ("same", "overlapping", "disjoint")


def member_rows(
    count: int, members: int, how: str = "same", share: float | None = None, seed: int = 0
) -> list[list[int]]:
    """The row numbers, ascending, that each member of an ensemble is trained on: (members, rows), all of one size.

    how: "same", all rows for everyone, so that members differ by their seeds only; "overlapping", a draw of its own for
    each; "disjoint", no row for two of them, which the theory of Bad Models Can Be Good Role Models assumes (Rubinstein et
    al. 2022, arXiv 2203.14649). share: of the rows, for each member; None is a half for overlapping rows and
    1 / members for disjoint ones, of which up to members - 1 rows stay unused. Not stratified.

    With one seed and one share, the first members of a larger ensemble have the rows of a smaller one.
    Raises ValueError for another `how`, and for shares and numbers that leave a member without a row.
    """
    if how not in MEMBERS:
        raise ValueError(f"how must be one of {', '.join(MEMBERS)}, got {how!r}")
    if members < 1 or count < 1:
        raise ValueError(f"an ensemble needs 1 member and 1 row or more, got {members} members and {count} rows")
    if how == "same":
        if share not in (None, 1):
            raise ValueError(
                f"share={share} is for overlapping and disjoint rows: 'same' gives every member all of them"
            )
        return [list(range(count)) for _ in range(members)]
    size = _member_size(count, members, how, share)
    if how == "disjoint":
        order = np.random.default_rng(seed).permutation(count)
        return [sorted(order[first : first + size].tolist()) for first in range(0, members * size, size)]
    draws = [np.random.default_rng([seed, member]) for member in range(members)]
    return [sorted(draw.choice(count, size, replace=False).tolist()) for draw in draws]


def _member_size(count: int, members: int, how: str, share: float | None) -> int:
    parts = members if how == "disjoint" else 2
    size = count // parts if share is None else math.floor(share * count + 1e-9)  # 0.29 * 100 is 28.999...
    most = count // members if how == "disjoint" else count
    if not 1 <= size <= most:
        raise ValueError(
            f"share={share} of {count} rows gives each of {members} {how} members {size}: choose a share that gives 1 to {most}"
        )
    return size


def save_indices(path: str | Path, **splits: Sequence[int]) -> Path:
    """Write the row numbers of each split as JSON (`save_indices(path, train=..., test=...)`) and return the path.

    The file appears whole or not at all. A subset may stand beside the split it is from. Raises `ValueError` without a
    split.
    """
    path = Path(path)
    lists = {name: [int(row) for row in rows] for name, rows in splits.items()}
    if not lists:
        raise ValueError("there is nothing to save: name at least one split, as in save_indices(path, train=rows)")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with partial.open("w", encoding="utf-8") as file:
        json.dump(lists, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    return path


def load_indices(path: str | Path) -> dict[str, list[int]]:
    """The row numbers that `save_indices` wrote, by split. Raises `ValueError` when the file holds anything else."""
    found = json.loads(Path(path).read_text(encoding="utf-8"))
    whole = isinstance(found, dict) and all(
        isinstance(rows, list) and all(isinstance(row, int) for row in rows) for rows in found.values()
    )
    if not whole:
        raise ValueError(f"{path} does not hold lists of row numbers by split: write it with save_indices")
    return found
