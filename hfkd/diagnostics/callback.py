"""The fidelity report during training: numbers into the Trainer's log, from where every tracker has them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import TrainerCallback

from hfkd.diagnostics.answers import name_of
from hfkd.diagnostics.fidelity import FidelityReport, report_of_logits
from hfkd.diagnostics.row_labels import labels_of
from hfkd.diagnostics.trackers import log_figure, log_table, log_text
from hfkd.teachers import EnsembleTeacher
from hfkd.teachers.labels import class_names, problem_type_of
from hfkd.teachers.model import public_name

PREFIX = "eval_fidelity_"
CLASS_COLUMNS = ("class", "rows", "student", "teacher", "difference", "agreement")
NO_LOGITS = "the teacher answers no logits: an ensemble takes combine='mean' or 'logits'"


class DiagnosticsCallback(TrainerCallback):
    """Compares student and teacher after every `every`-th evaluation, in the trainer's own way of reading rows.

        trainer = DistillationTrainer(student, args, ..., teacher=teacher)
        trainer.add_callback(DiagnosticsCallback(trainer, every=2))

    trainer: has a teacher, as DistillationTrainer has. dataset: rows to compare on; None: its eval_dataset. group_column: of
    a value that names each row's subgroup. settings: of `report_of_logits`; bootstrap is 0 unless given, because intervals
    cost more than a small student.

    The report's numbers are logged as `eval_fidelity_agreement` and so on, at the evaluation's step. The whole report lies in
    `output_dir/diagnostics/step-N` (with matplotlib with its figures, which the trackers are
    shown beside a table of the classes) and in `last`. The teacher is asked once. Several processes share the rows, and all of
    them log the same. Training goes on as if it had not been watched: the random state is put back. Evaluations are counted in
    the log, so that a resumed run reports at the steps of one that was never stopped.

    Raises ValueError where there is no teacher or one that names classes only, no data set or several, or another problem
    than one label a row; during training, for logits that are not finite (rows named).
    """

    def __init__(
        self, trainer: Any, dataset: Any = None, *, every: int = 1, group_column: str | None = None, **settings: Any
    ):
        dataset = trainer.eval_dataset if dataset is None else dataset
        if getattr(trainer, "teacher", None) is None:
            raise ValueError("there is no teacher to compare with: pass teacher=... to the DistillationTrainer")
        if isinstance(trainer.teacher, EnsembleTeacher) and trainer.teacher.names_classes:
            raise ValueError(NO_LOGITS)
        if every < 1:
            raise ValueError(f"every counts evaluations, 1 or more, not {every}")
        if isinstance(dataset, dict) or not all(hasattr(dataset, name) for name in ("column_names", "__len__")):
            raise ValueError(
                f"one data set with columns is compared on, not {type(dataset).__name__}: pass dataset=... (or an eval_dataset "
                "to the trainer)"
            )
        config = trainer.model.config
        if problem_type_of(config) not in (None, "single_label_classification"):
            raise ValueError(f"the student's problem_type is {config.problem_type!r}: one label a row is needed")
        if group_column is not None and group_column not in dataset.column_names:
            raise ValueError(
                f"there is no column {group_column!r} of subgroups, only {', '.join(dataset.column_names)}"
            )
        self.trainer, self.dataset, self.every = trainer, dataset, every
        self.group_column, self.settings = group_column, {"bootstrap": 0, **settings}
        self.labels = labels_of(dataset, config)
        self.last: FidelityReport | None = None
        self._teacher_logits: NDArray[Any] | None = None
        self._reported: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._reported = None  # the next trial of a search evaluates at the steps of the one before

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if evaluations(state.log_history) % self.every or self._reported == state.global_step:
            return
        self._reported = state.global_step
        with torch.random.fork_rng():
            self.last = self._compare()
        log_report(self.trainer, self.last, Path(args.output_dir) / "diagnostics" / f"step-{state.global_step}")

    def _compare(self) -> FidelityReport:
        if self._teacher_logits is None:
            self._teacher_logits = teacher_logits(self.trainer, self.dataset)
        plain = self.dataset.with_format(None)
        ids = plain["example_id"][:] if "example_id" in self.dataset.column_names else None
        return report_of_logits(
            student_logits(self.trainer, self.dataset),
            self._teacher_logits,
            self.labels,
            class_names=class_names(self.trainer.model.config),
            groups=None if self.group_column is None else plain[self.group_column][:],
            student_ids=ids,
            teacher_ids=ids,
            student=public_name(self.trainer.accelerator.unwrap_model(self.trainer.model)),
            teacher=name_of(self.trainer.teacher),
            **self.settings,
        )


def evaluations(history: Sequence[dict[str, Any]]) -> int:
    """Steps at which there was an evaluation; one of several data sets is one."""
    return len({entry["step"] for entry in history if any(_ends_evaluation(name) for name in entry)})


def _ends_evaluation(name: str) -> bool:
    return name.startswith("eval_") and name.endswith("_runtime")


def student_logits(trainer: Any, rows: Any) -> NDArray[Any]:
    """(rows, classes), in the order of the rows, on every process. Neither logged nor announced as a test."""
    with _plain_predictions(trainer):
        output = trainer.evaluation_loop(trainer.get_test_dataloader(rows), "Diagnostics", prediction_loss_only=False)
    return np.asarray(output.predictions, dtype=np.float64)


@contextmanager
def _plain_predictions(trainer: Any) -> Iterator[None]:
    """Logits instead of what the user's metrics make of them."""
    usual = trainer.compute_metrics, trainer.preprocess_logits_for_metrics
    trainer.compute_metrics = trainer.preprocess_logits_for_metrics = None
    try:
        yield
    finally:
        trainer.compute_metrics, trainer.preprocess_logits_for_metrics = usual
        for callback in trainer.callback_handler.callbacks:  # the next evaluation needs a bar of its own length
            if (bar := getattr(callback, "prediction_bar", None)) is not None:
                bar.close()
                callback.prediction_bar = None


def teacher_logits(trainer: Any, rows: Any) -> NDArray[Any]:
    """The same of the teacher, each process asking about its share."""
    found = []
    for batch in trainer.get_test_dataloader(rows):
        with torch.no_grad(), trainer.accelerator.autocast():
            answer = trainer.teacher(trainer._prepare_inputs(batch), trainer.progress)
        if answer.logits is None:
            raise ValueError(NO_LOGITS)
        found.append(trainer.accelerator.gather_for_metrics(answer.logits.double()).cpu().numpy())
    return np.concatenate(found)


def log_report(trainer: Any, report: FidelityReport, folder: Path, prefix: str = PREFIX) -> None:
    """Numbers into the Trainer's log, from where every tracker has them; tables and figures to those that take them.

    prefix: "eval_fidelity_", or "test_fidelity_" for rows that no choice was made on. folder: where the whole report is kept.
    """
    trainer.log({f"{prefix}{name}": value for name, value in report.numbers().items()})
    if not trainer.is_world_process_zero():
        return
    callbacks, step = trainer.callback_handler.callbacks, trainer.state.global_step
    name = prefix.replace("_", "/", 1)  # as transformers' callbacks call what begins with eval_ or test_
    log_text(callbacks, name.rstrip("_"), report.markdown(), step)
    log_table(callbacks, f"{name}classes", CLASS_COLUMNS, class_rows(report), step)
    for path in report.save(folder):
        if path.suffix == ".png":
            log_figure(callbacks, f"{name}{path.stem}", path, step)


def class_rows(report: FidelityReport) -> list[list[Any]]:
    """Worst change first."""
    parts = sorted(report.classes, key=lambda part: (part.difference is None, part.difference or 0.0))
    return [[p.name, p.examples, p.student, p.teacher, p.difference, p.agreement] for p in parts]
