"""Fine-tunes every stage of a self-distillation run on few labels, with every seed, and keeps what is done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm.auto import tqdm
from transformers import PrinterCallback

from hfkd import DistillationArguments, DistillationTrainer, SelfDistillationArguments
from hfkd.data.splits import low_resource_subset
from hfkd.diagnostics.metrics import score
from hfkd.records import file_hash, read_json, write_json
from hfkd.regularized import MARS, R3F, RecAdam, recall_groups
from program import say

# What a result depends on besides data, weights and seed; a resumed run with other values is refused
SETTINGS = (
    *("fine_tuning_batch_size", "fine_tuning_learning_rate", "evaluate_on"),
    *("recadam_gamma", "recadam_t0", "mars_bound", "r3f_weight"),
)
WEIGHT_DECAY = 0.01
BASELINES = ("recadam", "mars", "r3f")


@dataclass
class Labelled:
    """The labelled data, and all that fine-tuning does differently for texts and for images.

    train: the labelled rows that runs of a seed may draw from. held_out: what is scored, in any order. load: a model with a
    fresh head from a stage's folder and the settings of its labels, in the noisy form of R3F where asked for. collator:
    for a seed. budget: changes of the arguments. settings: beside SETTINGS, what a resumed run may not change. decays: says
    of a parameter by its name whether it decays; None leaves that to the Trainer.
    """

    noun: str
    train: Callable[[int], Any]
    held_out: Any
    names: list[str]
    metric: str
    load: Callable[..., Any]
    collator: Callable[[int], Any]
    processing_class: Any
    budget: dict[str, Any]
    settings: dict[str, Any]
    data: list[str]
    decays: Callable[[str, Any], bool] | None = None

    def labels(self) -> dict[str, Any]:
        """What a classifier's configuration says about them."""
        names = {"id2label": dict(enumerate(self.names)), "label2id": {name: i for i, name in enumerate(self.names)}}
        return {"num_labels": len(self.names), **names}


@dataclass(frozen=True)
class Kind:
    """One run of fine-tuning. labelled_rows: how many, None for all that there are; more: it is not of the main table."""

    stage: str
    baseline: str
    seed: int
    labelled_rows: int | None
    more: bool = False

    @property
    def name(self) -> str:
        return self.stage if self.baseline == "none" else f"{self.stage}, {self.baseline}"


class FineTuning:
    """`recipe` is the RecipeArguments of the recipe, `kept` the stage whose first model is saved."""

    def __init__(self, recipe: Any, args: SelfDistillationArguments, labelled: Labelled, kept: str):
        self.recipe, self.args, self.labelled, self.kept = recipe, args, labelled, kept
        self.output = Path(args.output_dir)

    def run(self, stages: Sequence[dict[str, Path]], labelled_rows: Sequence[int | None]) -> list[dict[str, Any]]:
        """Every stage with every seed; a seed fixes the labelled subset, the head and the order, so that stages pair up.

        stages: one dict for each pre-training seed, of which fine-tuning seed s takes number s modulo their number.
        labelled_rows: the first number is the table's; the others are for the stages of the rounds only.
        """
        kinds = self.kinds(list(stages[0]), labelled_rows)
        rows = " or ".join(f"{count or len(self.labelled.train(0)):,}" for count in labelled_rows)
        noun = f"labelled {self.labelled.noun}"
        say(f"Fine-tuning on {rows} {noun}, scored on {len(self.labelled.held_out):,} held-out ones: {len(kinds)} runs")
        results = []
        for kind in tqdm(kinds, desc="fine-tuning", disable=self.args.process_index > 0):
            number = kind.seed % len(stages)
            result = self.result(kind, stages[number][kind.stage])
            own = {"stage": kind.name, "seed": kind.seed, "pretraining_seed": number, "more": kind.more}
            results.append({**own, "labelled_rows": kind.labelled_rows, **result})
        return results

    def kinds(self, names: list[str], labelled_rows: Sequence[int | None]) -> list[Kind]:
        seeds, (first, *others) = range(self.recipe.fine_tuning_seeds), labelled_rows
        kinds = [Kind(stage, "none", seed, first) for seed in seeds for stage in names]
        kinds += [Kind("start", baseline, seed, first) for seed in seeds for baseline in self.recipe.baseline]
        shown = names[: names.index(self.kept) + 1]
        return kinds + [Kind(s, "none", seed, count, True) for count in others for seed in seeds for s in shown]

    def result(self, kind: Kind, directory: Path) -> dict[str, Any]:
        """The saved result of this run, or a new one. ValueError where the saved one has other settings."""
        folder = self.output / "fine_tuning" / kind.name.replace(", ", "-").replace(" ", "-")
        folder = folder / f"labels-{kind.labelled_rows}" if kind.more else folder
        path = folder / f"seed-{kind.seed}.json"
        first = (kind.name, kind.seed, kind.more) == (self.kept, 0, False)
        keep = self.output / "fine_tuned" / directory.name if first else None
        settings = {**self.settings(kind), "weights": weights_of(directory)}
        found = read_json(path)
        if found is not None and found["settings"] != settings:
            changed = {k: (found["settings"].get(k), v) for k, v in settings.items() if found["settings"].get(k) != v}
            raise ValueError(
                f"{path} was made with other settings (was, now): {changed}; use --overwrite or another --output_dir"
            )
        clock = folder / f"seconds-{kind.seed}.json"  # apart: everything else is the same whenever it is run
        if found is None or (keep and not keep.exists()):
            found, seconds = self.fine_tune(kind, directory, folder, keep)
            found["settings"] = settings
            if self.args.process_index == 0:
                folder.mkdir(parents=True, exist_ok=True)
                write_json(clock, {"seconds": seconds})
                write_json(path, found)
        return {**found, **(read_json(clock) or {})}

    def settings(self, kind: Kind) -> dict[str, Any]:
        settings = {setting: getattr(self.recipe, setting) for setting in SETTINGS} | self.labelled.settings
        return settings | {
            "labelled_rows": kind.labelled_rows,
            "max_steps": self.args.max_steps,
            "data": self.labelled.data,
        }

    def fine_tune(self, kind: Kind, directory: Path, scratch: Path, keep: Path | None) -> tuple[dict[str, Any], float]:
        """One run and its seconds; the model of the last step is tested, never the best one."""
        recipe, labelled, baseline = self.recipe, self.labelled, kind.baseline
        subset = labelled.train(kind.seed)
        if kind.labelled_rows:
            subset = subset.select(low_resource_subset(subset["label"], kind.labelled_rows, kind.seed))
        transformers.set_seed(kind.seed)
        model = quietly(labelled.load, directory, labelled.labels(), noisy=baseline == "r3f")
        trainer = DistillationTrainer(
            model,
            self.arguments(scratch, kind.seed),
            labelled.collator(kind.seed),
            subset,
            processing_class=labelled.processing_class,
            objective=R3F(recipe.r3f_weight) if baseline == "r3f" else None,
            callbacks=[MARS(model, recipe.mars_bound)] if baseline == "mars" else None,
            optimizers=(self.optimizer(model, baseline), None),
        )
        trainer.remove_callback(PrinterCallback)  # the bar over all runs is enough
        done = trainer.train()
        fitted, prediction = trainer.predict(subset), trainer.predict(labelled.held_out)
        if keep:
            trainer.save_model(str(keep))
        found = {
            "metric": labelled.metric,
            "score": score(labelled.metric, prediction.predictions.argmax(-1), prediction.label_ids),
            "train_loss": loss_of(fitted),
            "test_loss": loss_of(prediction),
        }
        return found, done.metrics["train_runtime"]

    def optimizer(self, model: Any, baseline: str) -> torch.optim.Optimizer | None:
        """None for the Trainer's own."""
        recipe, decays = self.recipe, self.labelled.decays
        rate = recipe.fine_tuning_learning_rate
        if baseline == "recadam":
            groups = recall_groups(model, WEIGHT_DECAY, decays) if decays else recall_groups(model, WEIGHT_DECAY)
            return RecAdam(groups, lr=rate, gamma=recipe.recadam_gamma, t0=recipe.recadam_t0)
        return torch.optim.AdamW(decay_groups(model, decays), lr=rate) if decays else None

    def arguments(self, scratch: Path, seed: int) -> DistillationArguments:
        return stage_arguments(
            self.args,
            scratch,
            seed=seed,
            learning_rate=self.recipe.fine_tuning_learning_rate,
            per_device_train_batch_size=max(self.recipe.fine_tuning_batch_size // self.args.world_size, 1),
            weight_decay=WEIGHT_DECAY,
            train_sampling_strategy=self.args.train_sampling_strategy,
            disable_tqdm=True,
            logging_strategy="no",
            **self.labelled.budget,
        )


def loss_of(prediction: Any) -> float:
    """From the answers, which are one a row; on several processes the Trainer's own counts rows that fill up its batches."""
    logits, labels = torch.from_numpy(prediction.predictions).double(), torch.from_numpy(prediction.label_ids)
    return torch.nn.functional.cross_entropy(logits, labels.long()).item()


def weights_of(directory: Path) -> list[str]:
    return [file_hash(file) for file in sorted(directory.glob("*.safetensors"))]


def decay_groups(model: Any, decays: Callable[[str, Any], bool]) -> list[dict[str, Any]]:
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    sides = {decayed: [p for name, p in named if decays(name, p) == decayed] for decayed in (True, False)}
    return [{"params": side, "weight_decay": WEIGHT_DECAY if decayed else 0.0} for decayed, side in sides.items()]


def stage_arguments(args: SelfDistillationArguments, directory: Path, **changes: Any) -> DistillationArguments:
    """Arguments of a stage other than the rounds: the machine's settings are shared, the budget and the folder are not."""
    shared = ("use_cpu", "bf16", "fp16", "tf32", "dataloader_num_workers", "per_device_eval_batch_size", "disable_tqdm")
    values = {name: getattr(args, name) for name in shared}
    own = {"output_dir": str(directory), "save_strategy": "no", "report_to": "none", "logging_steps": 50}
    return DistillationArguments(**{**values, **own, **changes})


def recadam(recipe: Any, model: Any) -> RecAdam:
    groups = recall_groups(model, weight_decay=WEIGHT_DECAY)
    return RecAdam(groups, lr=recipe.fine_tuning_learning_rate, gamma=recipe.recadam_gamma, t0=recipe.recadam_t0)


def check_baselines(recipe: Any) -> None:
    """Settings out of range are said now, not after the rounds have been trained."""
    unknown = set(recipe.baseline) - set(BASELINES)
    if unknown:
        raise ValueError(f"--baseline {' '.join(sorted(unknown))}: choose among {', '.join(BASELINES)}")
    if "recadam" in recipe.baseline:
        group = {"params": [torch.nn.Parameter(torch.zeros(1, 1))], "recall": True}
        RecAdam([group], lr=recipe.fine_tuning_learning_rate, gamma=recipe.recadam_gamma, t0=recipe.recadam_t0)
    if "r3f" in recipe.baseline:
        R3F(recipe.r3f_weight)
    if "mars" in recipe.baseline and not recipe.mars_bound > 0:
        raise ValueError(f"--mars_bound is a distance and must be above 0, got {recipe.mars_bound}")


def quietly(load: Any, *args: Any, **kwargs: Any) -> Any:
    """Without the warning that the classifier is new: that is what fine-tuning is about."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        return load(*args, **kwargs)
    finally:
        transformers.logging.set_verbosity(level)
