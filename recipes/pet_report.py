"""How teachers_pet.py and adult_forests.py print numbers over seeds: in percent, with Student's t interval of 95 %."""

from __future__ import annotations

from collections.abc import Sequence

from hfkd.diagnostics.metrics import paired_difference


def interval(values: Sequence[float]) -> str:
    """`83.21 [82.90, 83.52]`; one seed has no interval: `83.21 (n=1)`."""
    return _shown(values, [0.0] * len(values), "")


def difference(values: Sequence[float], reference: Sequence[float]) -> str:
    """Paired by seed: `+0.52 [-0.10, +1.14]`."""
    return _shown(values, reference, "+")


def _shown(values: Sequence[float], reference: Sequence[float], sign: str) -> str:
    if not values:
        return "–"
    if len(values) == 1:
        return f"{100 * (values[0] - reference[0]):{sign}.2f} (n=1)"
    mean, low, high = (100 * value for value in paired_difference(values, reference))
    return f"{mean:{sign}.2f} [{low:{sign}.2f}, {high:{sign}.2f}]"
