"""What a trainer knows about its student, for the card and for teacher_manifest.json."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import shlex
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from hfkd.cards import CardFacts
from hfkd.diagnostics.callback import DiagnosticsCallback
from hfkd.outputs import Batch
from hfkd.records import weights_hash
from hfkd.teachers.asking import inputs_of, without_adapter
from hfkd.teachers.labels import class_names
from hfkd.teachers.model import public_name

PACKAGES = ("hfkd", "transformers", "torch", "accelerate", "datasets")
HEADS = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForImageClassification": "image-classification",
    "ForMaskedLM": "fill-mask",
}
# Of what `args` hold: what a stranger needs to repeat the run
BUDGET = (
    *("learning_rate", "weight_decay", "warmup_steps", "num_train_epochs", "max_steps", "lr_scheduler_type", "optim"),
    *("label_smoothing_factor", "seed", "bf16", "fp16"),
)
NO_METRIC = ("_loss", "_runtime", "_per_second", "_agreement")
FROM_FILES = {"csv", "json", "parquet", "text", "imagefolder", "generator", "arrow", "pandas"}  # no names of data sets


installed_version = functools.cache(metadata.version)  # it reads a file in every call, and every checkpoint has a card


def installed_versions() -> dict[str, str]:
    return {name: installed_version(name) for name in PACKAGES}


def command() -> str:
    """How this process was started; redacted on the card."""
    script = Path(sys.argv[0] if sys.argv else "")
    if script.suffix != ".py" or script.stem == "ipykernel_launcher":
        return "python  # interactively: a notebook or a shell"
    here = script.resolve().is_relative_to(Path.cwd())
    shown = script.resolve().relative_to(Path.cwd()) if here else Path(script.name)
    return shlex.join(["python", shown.as_posix(), *sys.argv[1:]])


def pipeline_tag_of(model: Any) -> str:
    name = type(without_adapter(model)).__name__
    return next((tag for head, tag in HEADS.items() if head in name), "")


def code_of(model: Any) -> dict[str, Any]:
    """How the Auto classes come to know its architecture: the card's `remote_code` and `imports`."""
    kind = type(without_adapter(model))
    beside = getattr(kind, "_auto_class", None) is not None  # save_pretrained puts the code beside the weights
    imported = kind.__module__.startswith("hfkd.") and not beside
    return {"remote_code": beside, "imports": [kind.__module__] if imported else []}


def settings_of(trainer: Any, objective: Any) -> dict[str, Any]:
    """The objective's, then those of the budget that are set."""
    args = trainer.args
    budget = {name: getattr(value := getattr(args, name), "value", value) for name in BUDGET}
    if args.max_steps > 0:
        budget["num_train_epochs"] = None  # the steps bound the training, not they
    rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return {
        **objective.settings(),
        "rows_per_step": rows,
        **{name: value for name, value in budget.items() if value not in (None, 0, 0.0, False, -1)},
    }


def last_metrics(history: list[dict[str, Any]]) -> dict[str, float]:
    """Of the last evaluation, of all its data sets, without losses, times and what compares with the teacher."""
    entries = [(entry.get("step"), _metrics_in(entry)) for entry in history]
    last = next((step for step, metrics in reversed(entries) if metrics), None)
    return {name: value for step, metrics in entries if step == last for name, value in metrics.items()}


def _metrics_in(entry: dict[str, Any]) -> dict[str, float]:
    return {
        name.removeprefix("eval_"): float(value)
        for name, value in entry.items()
        if name.startswith("eval_") and not name.endswith(NO_METRIC) and not name.startswith("eval_fidelity_")
        if isinstance(value, int | float) and math.isfinite(value)
    }


def datasets_of(rows: Any) -> list[str]:
    """The name that a data set was loaded by, where it has one."""
    info = getattr(rows, "info", None)
    name = getattr(info, "dataset_name", None)
    if not name or name in FROM_FILES or (getattr(info, "builder_name", None) in FROM_FILES and not _on_hub(info)):
        return []
    return [name]


def _on_hub(info: Any) -> bool:
    return any(str(source).startswith("hf://") for source in getattr(info, "download_checksums", None) or ())


def fidelity_of(trainer: Any) -> dict[str, Any]:
    """The last report of a DiagnosticsCallback, where there is one."""
    watching = [one for one in trainer.callback_handler.callbacks if isinstance(one, DiagnosticsCallback)]
    return next((one.last.to_dict() for one in watching if one.last is not None), {})


# ---- the teacher ----


@dataclasses.dataclass(frozen=True)
class Taught:
    """Who answered. repo: its Hub id, "" where it is not known to be on the Hub."""

    kind: str
    name: str
    repo: str
    revision: str
    dtype: str
    weights: str
    labels: list[str]


def taught_by(teacher: Any) -> Taught | None:
    """Of the Teacher that the objective asks; None without one."""
    if teacher is None:
        return None
    facts = teacher.facts()
    members = facts["members"]
    cached = facts["kind"] == "CachedTeacher" and members and not facts.get("name")
    named = members[0] if cached else facts
    config = teacher.config
    commit = getattr(teacher, "commit", "")
    name = named.get("name") or name_of_group(named)
    return Taught(
        facts["kind"],
        name,
        name if commit else "",
        named.get("revision") or commit,
        named.get("dtype") or "",
        teacher_weights(teacher),
        class_names(config) or [] if config is not None else [],
    )


def name_of_group(facts: dict[str, Any]) -> str:
    """Of several that answer together; of answers without a manifest, what they are."""
    members = [member.get("name") or "" for member in facts.get("members") or []]
    if not members:
        return "cached answers" if facts["kind"] == "CachedTeacher" else facts["kind"]
    named = f": {', '.join(members)}" if all(members) else ""
    return f"the {facts.get('combine', 'ensemble')} of {len(members)} model{'s' * (len(members) > 1)}{named}"


def teacher_weights(teacher: Any) -> str:
    """sha256 over its weights; over the members' hashes where there are several. "" where nobody can tell."""
    try:
        hashes = [weights_hash(weights) for weights in teacher.weights()]
    except ValueError:
        return getattr(teacher, "weights_sha256", "")
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def shown_to_teacher(teacher: Any, batch: Batch) -> tuple[Any, dict[str, Any]] | None:
    """The teacher's model and what it reads of a batch; None where no model is in memory."""
    model = getattr(teacher, "model", None)
    return None if model is None else (model, inputs_of(batch, teacher._inputs, teacher.view))


def manifest_facts(facts: CardFacts, taught: Taught | None, objective: Any, rows: int = 0) -> dict[str, Any]:
    """The content of teacher_manifest.json, but for the hashes of files. objective: None for a model that learned elsewhere.
    rows: those that it was evaluated on."""
    hidden = facts.teacher_private
    teacher = taught and {
        "id": None if hidden else facts.teacher or taught.name,
        "repo": None if hidden else facts.teacher_repo or None,
        "revision": None if hidden else facts.teacher_revision or None,
        "dtype": taught.dtype or None,
        "weights": taught.weights or None,
        "labels": taught.labels,
        "private": bool(hidden),
        "kind": taught.kind,
    }
    stage = facts.stage or facts.student
    return {
        "role": facts.role,
        "teacher": teacher,
        "objective": objective
        and {
            "name": type(objective).__name__,
            "settings": objective.settings(),
            "equation": objective.equation,
            "paper": objective.paper,
        },
        "labels": facts.label_names,
        "task": facts.task or None,
        "metrics": {row["metric"]: row["mean"] for row in facts.results if row.get("stage") in (stage, None)},
        "evaluated_on": {"rows": rows} if rows else None,
        "versions": facts.versions,
    }


def public_start(model: Any) -> str:
    """What the student was before training; "" for weights that were drawn at random.

    A local folder's name is that of a folder: alone it would be taken for somebody's Hub id, and be the card's base_model.
    """
    given = getattr(getattr(model, "config", None), "_name_or_path", "")
    if not given:
        return ""
    name = public_name(model)
    return f"{name}, a local folder" if name != given or Path(given).exists() else name
