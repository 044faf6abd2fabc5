"""Conditions that numbers must meet, for a CI that shall stop where a student has moved away from its teacher."""

from __future__ import annotations

import operator
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

_SIGNS = {">=": operator.ge, "<=": operator.le, "==": operator.eq, ">": operator.gt, "<": operator.lt}
_CONDITION = re.compile(r"\s*(?P<name>\w+)\s*(?P<sign>[<>=]=|[<>])\s*(?P<bound>\S+)\s*")


class GateFailed(Exception):
    """A condition is not met; the message names all that are not, each with its value."""


@dataclass(frozen=True)
class Gate:
    """`agreement>=0.9`: the name of a number, a comparison (>=, <=, >, <, ==) and what it is compared with."""

    name: str
    sign: str
    bound: float

    def __str__(self) -> str:
        return f"{self.name}{self.sign}{self.bound:g}"

    def holds(self, value: float) -> bool:
        """nan meets no condition."""
        return bool(_SIGNS[self.sign](value, self.bound))


def parse_gates(conditions: Iterable[str], known: Collection[str]) -> list[Gate]:
    """Raises ValueError for what is no condition, and for a name that is not among the known ones."""
    return [_gate(condition, known) for condition in conditions]


def _gate(condition: str, known: Collection[str]) -> Gate:
    found = _CONDITION.fullmatch(condition)
    try:
        bound = float(found["bound"]) if found else None
    except ValueError:
        bound = None
    if found is None or bound is None or bound != bound:
        raise ValueError(
            f"a condition is NAME>=NUMBER (or <=, >, <, ==), not {condition!r}: on a command line it stands in quotes, because "
            "a shell takes > for a file"
        )
    if found["name"] not in known:
        raise ValueError(f"{condition!r}: no number is called {found['name']!r}; there are {', '.join(known)}")
    return Gate(found["name"], found["sign"], bound)


def failures(gates: Iterable[Gate], numbers: Mapping[str, float]) -> list[str]:
    """The conditions that are not met, each with its value. A number that is not there meets none."""
    found = []
    for gate in gates:
        if gate.name not in numbers:
            found.append(f"{gate} (not measured: are there labels, subgroups, training rows for it?)")
        elif not gate.holds(numbers[gate.name]):
            found.append(f"{gate} ({gate.name} is {numbers[gate.name]:.4g})")
    return found
