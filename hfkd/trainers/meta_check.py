"""What is checked about a group of students and its meta set before the first step."""

from __future__ import annotations

from typing import Any

import numpy as np

from hfkd.data.rows import first_row
from hfkd.fingerprint import refuse_shared_rows
from hfkd.functional import IGNORED
from hfkd.models.student_group import StudentGroup
from hfkd.objectives.collaboration import GroupObjective
from hfkd.teachers import AdapterTeacher
from hfkd.trainers.arguments import CollaborativeArguments

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
    if not isinstance(args, CollaborativeArguments):
        raise ValueError(f"a group is trained with CollaborativeArguments, got {type(args).__name__}")
    if args.fsdp or args.deepspeed:
        raise ValueError("students are trained and looked ahead of whole: leave fsdp and deepspeed off")
    if args.batch_eval_metrics:
        raise ValueError(
            "batch_eval_metrics sees one batch of one student: leave it off, metrics are computed per student"
        )


def refuse_unknown_kernels(group: StudentGroup, args: Any) -> None:
    """Raises ValueError for attention, checkpointing and precision that the look-ahead cannot run through."""
    if args.gradient_checkpointing or any(getattr(m, "gradient_checkpointing", False) for m in group.modules()):
        raise ValueError(  # recomputed in the backward pass it would read the students' own weights, not those looked ahead to
            "no meta_engine goes through gradient_checkpointing: leave it off, or give coordinator=ConstantWeights(...)"
        )
    if args.meta_engine == "finite_difference" and (args.bf16 or args.fp16 or group.dtype.itemsize < 4):
        raise ValueError(
            "half precision rounds the displacement of meta_engine 'finite_difference' away: take meta_engine='jvp', or "
            "train in float32"
        )
    if args.meta_engine not in DERIVED:
        return
    for name, student in group.items():
        kernel = getattr(student.config, "_attn_implementation", None)
        if kernel not in KERNELS:
            raise ValueError(
                f"meta_engine {args.meta_engine!r} cannot run through {name}'s attention kernel {kernel!r}, which has no second "
                "derivative: meta_engine='finite_difference' would, or load the student with attn_implementation='sdpa'"
            )


def refuse_wrong_meta_rows(meta: Any, batch_size: int | None, processes: int) -> None:
    """Raises ValueError without rows, for rows without labels, and for a meta batch with fewer rows than processes."""
    if meta is None or not hasattr(meta, "__len__") or not len(meta):
        raise ValueError(
            "a coordinator that learns is judged on held-out rows: pass meta_dataset=... (cut from the training data, apart from "
            "the evaluation data, of a known length), or coordinator=ConstantWeights(task=0.5, distill=0.5)"
        )
    size, row = min(batch_size or len(meta), len(meta)), first_row(meta)
    if size < processes:
        raise ValueError(
            f"a meta batch of {size} rows leaves some of {processes} processes without one: give more rows"
        )
    if not hasattr(row, "keys"):
        return
    name = next((name for name in ("labels", "label", "label_ids") if name in row), None)
    ignored = name in (getattr(meta, "column_names", None) or ()) and np.all(np.asarray(meta[name][:]) == IGNORED)
    if name is None or ignored:
        raise ValueError(
            f"no row of the meta set has a label (its columns are {', '.join(row)}), and students are judged by these"
        )


def refuse_shared_meta_rows(meta: Any, train: Any, evaluation: Any, read: set[str]) -> None:
    """Raises ValueError where rows of the meta set are rows of another set, by the content of what the students read.

    read: the names of what models and collator read; rows with none of these columns are compared by all they share.
    """
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
        shared = set(meta.column_names) & set(rows.column_names) - LABELS
        inputs = sorted(shared & read or {column for column in shared if not column.startswith("teacher_")})
        if inputs:
            refuse_shared_rows(meta, rows, inputs, ("the meta set", name))
