"""Build the project's W&B dashboard: for every recipe what its runs log, from the losses to who pays for the average.

    python recipes/wandb_dashboard.py --entity me --project distillation             # saves it and prints its address
    python recipes/wandb_dashboard.py --entity me --project distillation --recipes distill_text compare
    python recipes/wandb_dashboard.py --entity me --project distillation --print     # its JSON, no network

First give recipes `--report_to wandb` and WANDB_PROJECT=distillation. Runs are grouped by study (the name of its output
folder) and then by kind, so that a curve is the mean over seeds. Needs `pip install wandb-workspaces`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import HfArgumentParser

from hfkd.diagnostics.trackers import check_key
from program import one_sentence

Sections = dict[str, list[str]]
LABELS: Sections = {"Task loss": ["train/loss", "train/task_loss", "train/learning_rate"]}
LOSSES: Sections = {
    "Task against distillation": ["train/task_loss", "train/distill_loss", "train/loss"],
    "Schedule": ["train/alpha", "train/learning_rate"],
}
AGREEMENT: Sections = {
    "Like its teacher": [
        *("test/fidelity_agreement", "test/fidelity_slope", "test/fidelity_kl_divergence"),
        *("test/fidelity_student_accuracy", "test/fidelity_teacher_accuracy", "test/fidelity_logit_logit"),
    ],
    "Who pays for the average": ["test/fidelity_worst_class_difference", "test/fidelity_classes"],
    "Calibration": ["test/fidelity_student_calibration_error", "test/fidelity_reliability"],
}
ROUNDS: Sections = {"Rounds": ["train/pretrain_loss", "train/distill_loss", "train/loss", "train/learning_rate"]}
SCORES: Sections = {"Held out": ["test/accuracy", "test/loss"]}
# {student}: one metric for each
PANELS: dict[str, Sections] = {
    "train_teacher": {**LABELS, **SCORES},
    "train_ensemble": {**LABELS, **SCORES},
    "distill_text": {**LOSSES, **AGREEMENT, **SCORES},
    "distill_image": {**LOSSES, **AGREEMENT, **SCORES},
    "compare": {**LOSSES, **AGREEMENT, **SCORES},
    "teachers_pet": {
        **LOSSES,
        **AGREEMENT,
        "Held out": ["test/mean_per_class_recall", "test/worst_class_accuracy", "test/loss"],
    },
    "deviations": {**LOSSES, **AGREEMENT, **SCORES},
    "eigenspace": {**LOSSES, **AGREEMENT, **SCORES},
    "role_models": {**LOSSES, **SCORES},
    "loss_switch": {
        **{"The switch": ["train/first_distill_loss", "train/second_task_loss", "train/loss", "train/switch_weight"]},
        **{"Schedule": ["train/alpha", "train/learning_rate"]},
        **AGREEMENT,
        **SCORES,
    },
    "self_distill_roberta": ROUNDS,
    "self_distill_vit": ROUNDS,
    "mc_distil": {
        "Students": ["train/{student}_task_loss", "train/{student}_distill_loss"],
        "What the coordinator makes of the examples (quartiles)": [
            f"train/{{student}}_{part}_weight_q{level}" for part in ("task", "distill") for level in (25, 50, 75)
        ],
        "Held out": ["test/mean_accuracy", "test/{student}_accuracy"],
    },
}
STUDENTS = (
    "resnet10-xxxs",
    "resnet10-xxs",
    "resnet10-xs",
)  # of mc_distil's demo; their names are in its metrics' names
TABLES, PICTURES = ("_classes",), ("_logit_logit", "_reliability")
STEP = "train/global_step"


@dataclass
class DashboardArguments:
    """Where the dashboard goes, and what is on it."""

    entity: str = field(metadata={"help": "Your W&B user or team."})
    project: str = field(metadata={"help": "The project whose runs it shows (WANDB_PROJECT of these runs)."})
    name: str = field(default="Distillation", metadata={"help": "What the view is called."})
    recipes: list[str] = field(default_factory=list, metadata={"help": f"Of {', '.join(PANELS)}; default: all."})
    students: list[str] = field(
        default_factory=lambda: list(STUDENTS), metadata={"help": "mc_distil: the names of your students."}
    )
    print: bool = field(default=False, metadata={"help": "Print the JSON and save nothing."})


def main(arguments: list[str]) -> None:
    (recipe,) = HfArgumentParser(DashboardArguments).parse_args_into_dataclasses(args=arguments)
    with one_sentence():
        workspace = dashboard(recipe)
        print(as_json(workspace) if recipe.print else saved(workspace))


def dashboard(recipe: DashboardArguments) -> Any:
    """A `wandb_workspaces.workspaces.Workspace`; a recipe's sections stand one below the other, under its name."""
    try:
        import wandb_workspaces.workspaces as ws
    except ImportError as error:
        raise ValueError("the dashboard needs wandb-workspaces: pip install wandb-workspaces") from error
    if odd := sorted(set(recipe.recipes) - PANELS.keys()):
        raise ValueError(f"--recipes {' '.join(odd)}: choose among {', '.join(PANELS)}")
    sections = [
        ws.Section(f"{name}: {title}", panels=panels_of(named(metrics, recipe.students)), is_open=bool(recipe.recipes))
        for name in recipe.recipes or PANELS
        for title, metrics in PANELS[name].items()
    ]
    groups = ws.RunsetSettings(groupby=[ws.Metric("Group"), ws.Metric("JobType")])
    return ws.Workspace(recipe.entity, recipe.project, recipe.name, sections=sections, runset_settings=groups)


def named(metrics: list[str], students: Sequence[str] = STUDENTS) -> list[str]:
    """A metric of every student stands for one of each."""
    return [name.format(student=student) for name in metrics for student in (students if "{" in name else students[:1])]


def panels_of(metrics: list[str]) -> list[Any]:
    """The losses of training in one panel, each other metric in its own: curves, or bars of what a run says once."""
    import wandb_workspaces.reports.v2 as wr

    losses = [name for name in metrics if name.startswith("train/") and name.endswith(("_loss", "/loss"))]
    panels = [wr.LinePlot(title="losses", x=STEP, y=losses)] if losses else []
    for name in (name for name in metrics if name not in losses):
        if name.endswith(TABLES):
            panels.append(wr.WeavePanelSummaryTable(table_name=name))
        elif name.endswith(PICTURES):
            panels.append(wr.MediaBrowser(media_keys=[name]))
        elif name.startswith("test/"):
            panels.append(wr.BarPlot(title=title_of(name), metrics=[name]))
        else:
            panels.append(wr.LinePlot(title=title_of(name), x=STEP, y=[name]))
    return panels


def title_of(metric: str) -> str:
    return metric.partition("/")[2].removeprefix("fidelity_").replace("_", " ")


def as_json(workspace: Any) -> str:
    return workspace._to_model().model_dump_json(by_alias=True, indent=2)  # there is no public way


def saved(workspace: Any) -> str:
    import wandb

    check_key()
    try:
        workspace.save()
    except wandb.errors.Error as error:
        raise ConnectionError(f"W&B did not take the dashboard: {error}") from error
    return workspace.url


if __name__ == "__main__":
    main(sys.argv[1:])
