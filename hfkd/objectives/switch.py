"""One objective fades into another (Nagarajan et al. 2023, On student-teacher deviations, arXiv 2301.12923)."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hfkd.objectives.objective import Objective
from hfkd.outputs import Batch, Counts, Progress, StudentOutput, TeacherOutput, Terms

FIRST, SECOND = "first_", "second_"

Named = Objective | str | Mapping[str, Mapping[str, Any]]


class Switch(Objective):
    """L = (1 - w) * first + w * second, with w = clip((s - start) / window, 0, 1) after s optimizer steps.

    The first `start` steps are the first objective's alone, those after start + window the second's; window=0 switches at once.
    Only the count of optimizer steps decides, so that accumulation, a resumed run and several processes change nothing.

    first, second: Objectives. On command lines and in YAML their names, with settings where wanted:
        --objective switch --objective_kwargs '{"first": {"kd": {"alpha": 1, "temperature": 4}}, "second": "cross_entropy",
        "start": 4000}'

    Each term keeps its own units and is logged under its objective's place: `first_distill_loss`, `second_task_loss`. Both
    objectives are scored in every step, also at weight 0, so that what is wrong with the second (a column that is missing, a
    teacher without logits) is said in the first step and not when its turn comes; the teacher is asked throughout.
    `eval_loss` is the second's task term.

    That the paper's losses are blended over 1,000 steps is known. Reconstruction, not verified: that the ramp is linear, that
    it begins at the switch and is not centred there, and what it acts on; when the paper switches is not known.

    Raises ValueError for a start or window that is no number of steps, for objectives that learn values from data or batches
    (no checkpoint of this one holds them), in `build` for two that both train a projection, and in the first step where the
    window ends after training.
    """

    paper = "2301.12923"
    equation = r"L = (1 - w_s) \, L_1 + w_s \, L_2, \quad w_s = \mathrm{clip}((s - s_0) / n, 0, 1)"

    def __init__(  # a command line may leave out what has no default; that is said in a sentence then
        self, first: Named | None = None, second: Named | None = None, start: int | None = None, window: int = 1000
    ):
        super().__init__()
        self.first, self.second = named_objective("first", first), named_objective("second", second)
        self.start, self.window = checked_steps("start", start), checked_steps("window", window)
        both = self.first, self.second
        self.columns = tuple(dict.fromkeys([*self.first.columns, *self.second.columns]))
        self.task_columns = self.second.task_columns
        self.needs = self.first.needs | self.second.needs
        self.token_by_token = any(objective.token_by_token for objective in both)
        self.batch_coupled = any(objective.batch_coupled for objective in both)
        # The trainer reads from it whether the head ever gets a gradient: at weight 0 it gets one of 0
        self.alpha = min(getattr(objective, "alpha", 0.0) for objective in both)

    def build(self, student_config: Any, teacher_config: Any, problem_type: str | None) -> None:
        super().build(student_config, teacher_config, problem_type)
        for objective in (self.first, self.second):
            objective.build(student_config, teacher_config, problem_type)
        if self.first.attached is not None and self.second.attached is not None:
            raise ValueError(
                f"{type(self.first).__name__} and {type(self.second).__name__} both train a projection to the teacher's width, "
                "and a student carries one: take a teacher of the student's width, or an objective of logits for one of them"
            )
        self.attached = self.second.attached if self.first.attached is None else self.first.attached

    def weight(self, step: int) -> float:
        """Of the second objective, after `step` optimizer steps; that of the first is 1 minus it."""
        if not self.window:
            return float(step >= self.start)
        return min(max((step - self.start) / self.window, 0.0), 1.0)

    def refuse_beyond(self, max_steps: int) -> None:
        """Raises ValueError where training ends before the window does, or before the second objective had any weight."""
        if self.start + self.window > max_steps or not self.weight(max_steps - 1):
            raise ValueError(
                f"the switch begins at step {self.start:,} and its window of {self.window:,} steps ends at step "
                f"{self.start + self.window:,}, but training has {max_steps:,} steps: train longer, start earlier or shorten "
                "the window"
            )

    def forward(
        self,
        student: StudentOutput,
        teacher: TeacherOutput | None,
        batch: Batch,
        progress: Progress | None = None,
    ) -> Terms:
        if progress is None:
            raise ValueError("Switch weights its objectives by the optimizer step: pass progress=Progress(step=...)")
        if progress.max_steps:  # 0: nothing is trained
            self.refuse_beyond(progress.max_steps)
        weight = self.weight(progress.step)
        first = self.first(student, teacher, batch, progress)
        second = self.second(student, teacher, batch, progress)
        return {
            **{FIRST + name: (1 - weight) * values for name, values in first.items()},
            **{SECOND + name: weight * values for name, values in second.items()},
        }

    def schedule(self, progress: Progress) -> dict[str, float]:
        """`switch_weight` is the second objective's; `alpha` is what the distillation terms of both weigh together."""
        weight = self.weight(progress.step)
        first, second = (alpha_of(objective, progress) for objective in (self.first, self.second))
        if first is None or second is None:
            return {"switch_weight": weight}
        return {"switch_weight": weight, "alpha": (1 - weight) * first + weight * second}

    def task(self, student: StudentOutput, batch: Batch) -> Terms:
        return self.second.task(student, batch)

    def count(self, batch: Batch) -> Counts:
        """The units of each term; those of the second under their own names too, for `task`."""
        first, second = self.first.count(batch), self.second.count(batch)
        return {
            **second,
            **{FIRST + name: count for name, count in first.items()},
            **{SECOND + name: count for name, count in second.items()},
        }

    def settings(self) -> dict[str, Any]:
        both = {"first": self.first, "second": self.second}
        named = {name: {type(objective).__name__: objective.settings()} for name, objective in both.items()}
        return {**named, "start": self.start, "window": self.window}

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """A projection stands in it once, as of this objective: two names of one tensor cannot be saved."""
        state: dict[str, Tensor] = super().state_dict(*args, **kwargs)
        for name in [name for name in state if name.startswith(("first.attached.", "second.attached."))]:
            del state[name]
        return state


def named_objective(place: str, given: Named | None) -> Objective:
    """The objective itself, or the one that `"kd"` or `{"kd": {"temperature": 4}}` names."""
    objective = given if isinstance(given, Objective) else objective_of(place, given)
    learned = [name for name, _ in objective.named_buffers()] + [n for n in objective._buffers if n.endswith("_")]
    if learned:
        raise ValueError(
            f"the {place} objective, {type(objective).__name__}, learns {learned[0].rpartition('.')[2]}, which no checkpoint "
            "of a switch holds: train with it alone, or choose one that learns nothing of the data"
        )
    return objective


def alpha_of(objective: Objective, progress: Progress) -> float | None:
    """None where it has no such number; 0 where it asks no teacher."""
    if "teacher" not in objective.needs:
        return 0.0
    return objective.schedule(progress).get("alpha")


def objective_of(place: str, given: str | Mapping[str, Mapping[str, Any]] | None) -> Objective:
    from hfkd.objectives import OBJECTIVES  # which holds this class, too

    if isinstance(given, Mapping) and len(given) != 1:
        raise ValueError(
            f'{place} names one objective with its settings, as {{"kd": {{"alpha": 1}}}}, got {dict(given)}'
        )
    name, settings = next(iter(given.items())) if isinstance(given, Mapping) else (given, {})
    if name not in OBJECTIVES:
        raise ValueError(f"the {place} objective {name!r} is unknown; the known ones are {', '.join(OBJECTIVES)}")
    known = [key for key in inspect.signature(OBJECTIVES[name].__init__).parameters if key != "self"]
    if not isinstance(settings, Mapping) or settings.keys() - set(known):
        raise ValueError(
            f"the {place} objective, {name}, takes {', '.join(known) or 'nothing'} by name, got {settings}"
        )
    return OBJECTIVES[name](**settings)


def checked_steps(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name} is a whole number of optimizer steps, 0 or more, got {value!r}")
    return value
