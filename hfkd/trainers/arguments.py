"""Fields beyond `transformers.TrainingArguments`; the same names in Python, on the command line and in YAML."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.utils import is_torch_xla_available

from hfkd.lookahead import ENGINES
from hfkd.objectives import KD, OBJECTIVES, Objective


def accelerator_is_absent() -> bool:
    return not (torch.accelerator.is_available() or is_torch_xla_available())


@dataclass
class DistillationArguments(TrainingArguments):
    """TrainingArguments for one student and any teacher.

    `objective`, `temperature`, `alpha` and `objective_kwargs` name an objective of `hfkd.objectives.OBJECTIVES` and its
    settings, for command lines and YAML; None leaves the objective's own default. In Python pass `objective=KD(...)` to the
    trainer instead. alpha is the weight of the **distillation** term everywhere in hfkd.

    Defaults of ours: `use_cpu` when the machine has no accelerator (a plain `accelerate launch` or torchrun line would
    otherwise start independent single-process runs), no NaN filter (it hides NaN losses and makes the host wait for
    the device in every step), and no search for unused parameters under DDP, because all are used.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "objective_kwargs"]  # noqa: RUF012

    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Hide NaN and infinite losses from the logs (costs a host sync per step)."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Let DDP search for parameters without a gradient in every step."}
    )
    objective: str | None = field(
        default=None,
        metadata={"help": f"One of {', '.join(OBJECTIVES)}; default: kd with a teacher, else cross_entropy."},
    )
    temperature: float | None = field(default=None, metadata={"help": "Softens both sides' logits; above 0."})
    alpha: float | None = field(
        default=None, metadata={"help": "Weight of the distillation term, 0 to 1; the task term gets 1 - alpha."}
    )
    objective_kwargs: dict | str | None = field(
        default=None,
        metadata={"help": """Further settings of the objective as JSON: '{"temperature_on": "teacher"}'."""},
    )
    teacher_dtype: str | None = field(
        default=None,
        metadata={
            "help": "The teacher's dtype: bfloat16, ..., or auto (bfloat16 where the hardware multiplies it fast)."
        },
    )
    allow_untrained_teacher: bool = field(
        default=False, metadata={"help": "Accept a teacher whose head is freshly initialised."}
    )
    lr_milestones: list[float] | None = field(
        default=None,
        metadata={
            "help": "Epochs at which the learning rate falls by lr_milestone_factor (instead of lr_scheduler_type)."
        },
    )
    lr_milestone_factor: float = field(default=0.1, metadata={"help": "What the learning rate is multiplied by there."})
    eval_teacher: bool = field(
        default=False, metadata={"help": "Evaluation asks the teacher too: adds distill_loss and agreement."}
    )
    push_teacher: bool = field(
        default=False, metadata={"help": "Upload the teacher too, into a repository of its own; both cards link."}
    )
    hub_teacher_id: str | None = field(
        default=None, metadata={"help": "The teacher's repository; default: the student's with -teacher."}
    )
    name_private_teacher: bool = field(
        default=False, metadata={"help": "Name a private teacher on the student's public card and in its manifest."}
    )

    def __post_init__(self) -> None:
        self.use_cpu = self.use_cpu or accelerator_is_absent()
        if self.data_seed is None:
            self.data_seed = self.seed  # else the order of rows depends on what drew from the global generator before
        refuse_wrong_milestones(self.lr_milestones, self.lr_milestone_factor, self.num_train_epochs)
        super().__post_init__()

    def make_objective(self, default: str) -> Objective:
        """The objective that the fields name. Raises ValueError for an unknown name and for a setting it does not have."""
        name = self.objective or default
        if name not in OBJECTIVES:
            raise ValueError(f"objective {name!r} is unknown; the known ones are {', '.join(OBJECTIVES)}")
        fields = {"temperature": self.temperature, "alpha": self.alpha}
        if self.label_smoothing_factor:
            fields["label_smoothing"] = self.label_smoothing_factor
        settings = {**self._objective_kwargs(), **{key: value for key, value in fields.items() if value is not None}}
        known = [key for key in inspect.signature(OBJECTIVES[name].__init__).parameters if key != "self"]
        odd = sorted(settings.keys() - set(known))
        if odd:
            raise ValueError(f"the objective {name} has no {', '.join(odd)}; it takes {', '.join(known) or 'nothing'}")
        return OBJECTIVES[name](**settings)

    def _objective_kwargs(self) -> dict[str, Any]:
        if isinstance(self.objective_kwargs, str):
            raise ValueError(
                f"objective_kwargs must be a JSON object such as '{{\"beta\": 1}}', got {self.objective_kwargs!r}"
            )
        return self.objective_kwargs or {}

    def names_objective(self) -> bool:
        return any(value is not None for value in (self.objective, self.temperature, self.alpha, self.objective_kwargs))


def refuse_wrong_milestones(milestones: list[float] | None, factor: float, epochs: float) -> None:
    if milestones and not (sorted(milestones) == list(milestones) and 0 < milestones[0] <= milestones[-1] < epochs):
        raise ValueError(
            f"lr_milestones are epochs in ascending order, above 0 and below num_train_epochs={epochs}, got {milestones}"
        )
    if not 0 < factor < 1:
        raise ValueError(f"lr_milestone_factor must lie between 0 and 1, got {factor}")


class DistillationTrainingArguments(DistillationArguments):
    """The arguments of the snippet that many projects copy; its alpha weights the **task** term: alpha is 1 - alpha here.

    Deprecated: use `DistillationArguments(objective="kd", alpha=..., temperature=...)`.
    """

    def __init__(self, *args: Any, alpha: float | None = 0.5, temperature: float | None = 2.0, **kwargs: Any):
        if kwargs.get("objective") is None:  # else a copy (dataclasses.replace), whose alpha is turned round already
            alpha, temperature = 0.5 if alpha is None else alpha, 2.0 if temperature is None else temperature
            warnings.warn(said_of_snippet(alpha, temperature), FutureWarning, stacklevel=2)
            kwargs, alpha = {**kwargs, "objective": "kd"}, 1 - alpha
        kwargs |= {"alpha": alpha, "temperature": temperature}
        super().__init__(*args, **kwargs)


def said_of_snippet(alpha: float, temperature: float) -> str:
    return (
        f"alpha={alpha} weights the task term, as the copied snippet has it: taken as "
        f"DistillationArguments(objective='kd', alpha={1 - alpha:g}, temperature={temperature}), where alpha weights the "
        "distillation term"
    )


def objective_of_other_arguments(args: Any) -> Objective:
    """KD for arguments that are not ours: the copied snippet's own class, or stock TrainingArguments."""
    given = {name: getattr(args, name) for name in ("alpha", "temperature") if getattr(args, name, None) is not None}
    if given:
        alpha, temperature = given.get("alpha", 0.5), given.get("temperature", 2.0)
        warnings.warn(said_of_snippet(alpha, temperature), FutureWarning, stacklevel=2)
        given = {"alpha": 1 - alpha, "temperature": temperature}
    return KD(label_smoothing=args.label_smoothing_factor, **given)


@dataclass
class SelfDistillationArguments(DistillationArguments):
    """Arguments of the rounds. The budget (`max_steps` or `num_train_epochs`) is that of **one** round.

    Gradients are not clipped by default, as in the authors' code for the further pre-training stages.
    """

    num_rounds: int = field(
        default=1, metadata={"help": "Rounds of self-distillation after round 0; 0 is plain further pre-training."}
    )
    feature: str = field(
        default="cls",
        metadata={
            "help": "What the distillation term compares on the clean input.",
            "choices": ["cls", "mean", "tokens"],
        },
    )
    no_pretrain_loss: bool = field(
        default=False, metadata={"help": "Ablation: rounds after round 0 train on the distillation term alone."}
    )
    matching: str = field(
        default="features",
        metadata={
            "help": "Ablation, images only: match the decoder's predictions or the encoder's weights instead.",
            "choices": ["features", "predictions", "weights"],
        },
    )
    cache_teacher_features: bool = field(
        default=False,
        metadata={
            "help": "Images only: ask the teacher once a round about every image, not in every step (feature cls, mean)."
        },
    )
    max_grad_norm: float = field(default=0.0, metadata={"help": "Largest gradient norm; 0 clips nothing."})

    def __post_init__(self) -> None:
        if self.names_objective() or self.teacher_dtype or self.eval_teacher:
            raise ValueError(
                "the rounds have their own objective and teacher: leave objective, temperature, alpha, objective_kwargs, "
                "teacher_dtype and eval_teacher out (the trainer takes objective=... in Python)"
            )
        if self.num_rounds < 0:
            raise ValueError(
                f"num_rounds must be 0 (plain further pre-training) or more rounds of self-distillation, got {self.num_rounds}"
            )
        if self.load_best_model_at_end or self.save_only_model:
            raise ValueError(
                "rounds end with their last step and resume from whole checkpoints: leave load_best_model_at_end and "
                "save_only_model off"
            )
        super().__post_init__()


@dataclass
class CollaborativeArguments(DistillationArguments):
    """Arguments of a group of students and their coordinator (MC-Distil; Tambat et al., TMLR 2025).

    The coordinator moves every `coordinator_interval` steps, 20 as in the released code; the paper is quoted as saying 20
    *epochs*, and `coordinator_interval_unit="epochs"` moves it at every step of every 20th epoch.
    """

    coordinator_interval: int = field(default=20, metadata={"help": "The coordinator moves once in so many steps."})
    coordinator_interval_unit: str = field(
        default="steps",
        metadata={"help": "Or at every step of every so-manieth epoch.", "choices": ["steps", "epochs"]},
    )
    coordinator_learning_rate: float = field(default=1e-3, metadata={"help": "Of the coordinator's Adam."})
    coordinator_weight_decay: float = field(default=1e-4, metadata={"help": "Of the coordinator's Adam."})
    meta_engine: str = field(
        default="jvp", metadata={"help": "How the meta-gradient is computed.", "choices": list(ENGINES)}
    )
    meta_order: str = field(
        default="reference",
        metadata={
            "help": "reference: look ahead, move the coordinator, then step with its new weights. fused: the real step is the "
            "look-ahead, and new weights act from the next batch on; cheaper.",
            "choices": ["reference", "fused"],
        },
    )
    meta_batch_size: int | None = field(
        default=None, metadata={"help": "Rows of a meta step over all processes; default: those of a training step."}
    )
    meta_augmentation: bool = field(
        default=False, metadata={"help": "Augment the meta rows as the training rows (the released code does)."}
    )
    warm_start_epochs: float = field(
        default=0.0, metadata={"help": "Epochs on the labels alone before the teacher and the coordinator count."}
    )
    pooled_student: bool = field(
        default=False, metadata={"help": "A third term: towards the best logits of all students (2023 code)."}
    )

    def __post_init__(self) -> None:
        if self.objective or self.alpha is not None or self.objective_kwargs or self.label_smoothing_factor:
            raise ValueError(
                "a group learns Collaboration, whose weights come from the coordinator: leave objective, alpha, objective_kwargs "
                "and label_smoothing_factor out (in Python pass objective=... and coordinator=ConstantWeights(...))"
            )
        if self.coordinator_interval < 1:
            raise ValueError(f"coordinator_interval must be 1 or more, got {self.coordinator_interval}")
        if self.meta_batch_size is not None and self.meta_batch_size < 1:
            raise ValueError(f"meta_batch_size must be 1 or more rows, got {self.meta_batch_size}")
        if not self.warm_start_epochs >= 0:
            raise ValueError(f"warm_start_epochs must be 0 or more, got {self.warm_start_epochs}")
        choices = {
            "meta_engine": ENGINES,
            "meta_order": ("reference", "fused"),
            "coordinator_interval_unit": ("steps", "epochs"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.meta_order == "fused" and self.meta_engine in ("double_backward", "last_layer"):
            raise ValueError(
                f"meta_engine {self.meta_engine} looks ahead by itself: it runs in meta_order reference only"
            )
        if self.fp16 and self.meta_order == "fused":
            raise ValueError(
                "fp16 skips steps whose gradients overflow, which no look-ahead can be: use bf16, or the order reference"
            )
        if self.save_only_model:
            raise ValueError("save_only_model leaves out the coordinator's optimizer: turn it off")
        super().__post_init__()


def parse_arguments(
    *dataclass_types: Any, arguments: Sequence[str] | None = None, defaults: str | Path | None = None
) -> tuple[Any, ...]:
    """Fields from YAML files and flags: `defaults` first, then `--config file.yaml`, and flags win over both.

    Returns one instance of each dataclass. Raises ValueError for keys in a file that no dataclass has, with the nearest
    known ones, and for flags that no dataclass has.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = HfArgumentParser(dataclass_types, allow_abbrev=False)  # --conf would be taken, and the file not read
    parser.add_argument("--config", help="A YAML file with values for any of these fields; flags win over it.")
    only_config = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    only_config.add_argument("--config")
    known, _ = only_config.parse_known_args(words)
    fields = {field.name for kind in dataclass_types for field in dataclasses.fields(kind) if field.init}
    for path in filter(None, (defaults, known.config)):
        values = _read_yaml(Path(path), fields)
        for action in parser._actions:
            if action.nargs in ("+", "*") and values.get(action.dest) is not None:
                given = values[action.dest]  # argparse types no list defaults; `baseline: mars` is a list of one
                kind: Any = action.type or str
                values[action.dest] = [kind(item) for item in (given if isinstance(given, list) else [given])]
        parser.set_defaults(**values)
        for action in parser._actions:  # a value in a file counts as given
            action.required = action.required and action.dest not in values
    *parsed, _ = parser.parse_args_into_dataclasses(words)
    return tuple(parsed)


def _read_yaml(path: Path, fields: set[str]) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"--config {path}: there is no such file")
    values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold `name: value` lines, not a {type(values).__name__}")
    for name in values.keys() - fields:
        near = ", ".join(difflib.get_close_matches(str(name), fields)) or "nothing alike"
        raise ValueError(f"{path}: unknown key {name!r} (known and near: {near})")
    # Strings go through the field's own type, as flags do: YAML reads 1e-4 as a string, and `save_strategy: no` as False
    values |= {name: "no" for name, value in values.items() if name.endswith("_strategy") and value is False}
    return {
        name: str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value
        for name, value in values.items()
    }
