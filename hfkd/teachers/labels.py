"""Classes of teacher and student, matched by name."""

from __future__ import annotations

from typing import Any

from transformers.utils import logging

logger = logging.get_logger(__name__)


def class_names(config: Any) -> list[str] | None:
    """In the order of their ids; None where there are none, or only transformers' defaults or the ids themselves."""
    names = getattr(config, "id2label", None)
    if not names:
        return None
    ordered = [str(names[i]) for i in sorted(names, key=int)]
    nameless = ([f"LABEL_{i}" for i in range(len(ordered))], [str(i) for i in range(len(ordered))])
    return None if ordered in nameless else ordered


def label_order(teacher_config: Any, student_config: Any) -> list[int] | None:
    """For each of the student's classes the teacher's id; None where they are the same or have no names to match."""
    sizes = [getattr(config, "num_labels", None) for config in (student_config, teacher_config)]
    if None not in sizes and sizes[0] != sizes[1]:
        raise ValueError(
            f"the student has {sizes[0]} labels, the teacher {sizes[1]}: load the student with num_labels={sizes[1]}, or "
            "take a teacher of the student's task"
        )
    if 1 in sizes or any(problem_type_of(config) == "regression" for config in (student_config, teacher_config)):
        return None
    ours, theirs = class_names(student_config), class_names(teacher_config)
    if ours is None or theirs is None:
        if ours is not theirs and student_config is not None:
            named, unnamed = ("student", "teacher") if ours else ("teacher", "student")
            logger.warning_once(
                f"only the {named} names its classes ({', '.join((ours or theirs or [])[:6])}): they are matched with the "
                f"{unnamed}'s by number. Set id2label of the {unnamed} if its order is another"
            )
        return None
    return None if ours == theirs else matched(ours, theirs)


def matched(ours: list[str], theirs: list[str]) -> list[int]:
    if set(ours) != set(theirs):
        plain_ours, plain_theirs = (["".join(name.split()).casefold() for name in names] for names in (ours, theirs))
    else:
        plain_ours, plain_theirs = ours, theirs
    distinct = len(set(plain_ours)) == len(ours) and len(set(plain_theirs)) == len(theirs)
    if not distinct or set(plain_ours) != set(plain_theirs):
        raise ValueError(
            f"the student's classes are {ours}, the teacher's {theirs}: give both configs the same names in id2label, or "
            "take a teacher of the student's task"
        )
    return [plain_theirs.index(name) for name in plain_ours]


def problem_type_of(config: Any) -> str | None:
    if getattr(config, "problem_type", None):
        return config.problem_type
    return "regression" if getattr(config, "num_labels", None) == 1 else None
