"""What is checked about a group of students and its meta set before the first step."""

from __future__ import annotations

from typing import Any

from hfkd.fingerprint import refuse_shared_rows
from hfkd.models.student_group import StudentGroup
from hfkd.objectives.collaboration import GroupObjective
from hfkd.teachers import AdapterTeacher

LABELS = {"label", "labels", "label_ids", "example_id"}
KERNELS = {None, "eager", "sdpa"}
DERIVED = ("jvp", "double_backward", "last_layer")  # engines that differentiate more than once


def refuse_wrong_group(group: Any, args: Any, objective: Any, teacher: Any) -> None:
    if group is not None and not isinstance(group, StudentGroup):
        raise ValueError(
            f"CollaborativeTrainer trains a StudentGroup or a mapping of names to models, got a {type(group).__name__}: for one "
            "student take DistillationTrainer, or StudentGroup({'student': model})"
        )
    if objective is not None and not isinstance(objective, GroupObjective):
        raise ValueError(
            f"{type(objective).__name__} scores one student: a group's objective is Collaboration, MutualLearning or another "
            "GroupObjective"
        )
    if isinstance(teacher, AdapterTeacher):
        raise ValueError("AdapterTeacher answers with the student's own base, and a group has several: pass a model")
    if getattr(args, "batch_eval_metrics", False):
        raise ValueError(
            "batch_eval_metrics sees one batch of one student: leave it off, metrics are computed per student"
        )


def refuse_unknown_kernels(group: StudentGroup, args: Any) -> None:
    """Raises ValueError for attention, checkpointing and sharding that the look-ahead cannot run through."""
    if args.meta_engine not in DERIVED:
        return
    for name, student in group.items():
        kernel = getattr(student.config, "_attn_implementation", None)
        if kernel not in KERNELS:
            raise ValueError(
                f"meta_engine {args.meta_engine!r} cannot run through {name}'s attention kernel {kernel!r}, which has no second "
                "derivative: meta_engine='finite_difference' would, or load the student with attn_implementation='sdpa'"
            )
    if args.gradient_checkpointing:
        raise ValueError(
            f"meta_engine {args.meta_engine!r} does not go through gradient_checkpointing: leave it off, or take "
            "meta_engine='finite_difference'"
        )


def refuse_shared_meta_rows(meta: Any, train: Any, evaluation: Any) -> None:
    """Raises ValueError where rows of the meta set are rows of another set, by the content of what the students read."""
    others = {"the training data": train}
    if isinstance(evaluation, dict):
        others |= {f"the evaluation data {name!r}": rows for name, rows in evaluation.items()}
    else:
        others["the evaluation data"] = evaluation
    for name, rows in others.items():
        if rows is meta:
            raise ValueError(f"the meta set is {name} itself: cut it from the training data, apart from all others")
        if rows is None or not all(hasattr(one, "column_names") and hasattr(one, "__len__") for one in (meta, rows)):
            continue
        columns = sorted(set(meta.column_names) & set(rows.column_names) - LABELS)
        inputs = [column for column in columns if not column.startswith("teacher_")]
        if inputs:
            refuse_shared_rows(meta, rows, inputs, ("the meta set", name))
