"""Fine-tunes every stage of a self-distillation run on few labels, with every seed, and keeps what is done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tqdm.auto import tqdm
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, PrinterCallback

from hfkd import DistillationArguments, DistillationTrainer, SelfDistillationArguments
from hfkd.data.splits import low_resource_subset
from hfkd.data.text import TEXT_TASKS, label_names, tokenize
from hfkd.diagnostics.metrics import score
from hfkd.records import file_hash, read_json, write_json
from hfkd.regularized import MARS, R3F, RecAdam, noisy_model, recall_groups
from hfkd.trainers.self_distillation import rows_hash

# What a result depends on besides data, weights and seed; a resumed run with other values is refused
SETTINGS = (
    *("labelled_rows", "fine_tuning_epochs", "fine_tuning_batch_size", "fine_tuning_learning_rate", "evaluate_on"),
    *("test_rows", "max_length", "recadam_gamma", "recadam_t0", "mars_bound", "r3f_weight"),
)
WEIGHT_DECAY = 0.01
BASELINES = ("recadam", "mars", "r3f")


class FineTuning:
    """`recipe` is the RecipeArguments of the recipe, `splits` the labelled data, `kept` the stage whose first model is saved."""

    def __init__(self, recipe: Any, args: SelfDistillationArguments, splits: Any, tokenizer: Any, kept: str):
        self.recipe, self.args, self.tokenizer, self.kept = recipe, args, tokenizer, kept
        self.output = Path(args.output_dir)
        self.names = label_names(splits)
        self.train = tokenize(splits["train"], tokenizer, recipe.max_length, recipe.pad_to_max_length)
        held_out = tokenize(splits[recipe.evaluate_on], tokenizer, recipe.max_length, recipe.pad_to_max_length)
        if recipe.test_rows:
            held_out = held_out.select(range(min(recipe.test_rows, len(held_out))))
        # Neighbours of one length need little padding; the order of test rows changes nothing else
        self.held_out = held_out.select(np.argsort([len(ids) for ids in held_out["input_ids"]], kind="stable"))
        self.data = [rows_hash(self.train), rows_hash(self.held_out)]

    def run(self, stages: dict[str, Path]) -> list[dict[str, Any]]:
        """Every stage with every seed; a seed fixes the labelled subset, the head and the order, so that stages pair up."""
        seeds = range(self.recipe.fine_tuning_seeds)
        kinds = [(stage, "none", seed) for seed in seeds for stage in stages]
        kinds += [("start", baseline, seed) for seed in seeds for baseline in self.recipe.baseline]
        labelled = f"{self.recipe.labelled_rows or len(self.train):,} labelled texts"
        if self.args.process_index == 0:
            print(
                f"\n== Fine-tuning on {labelled}, scored on {len(self.held_out):,} held-out ones: {len(kinds)} runs",
                flush=True,
            )
        results = []
        for stage, baseline, seed in tqdm(kinds, desc="fine-tuning", disable=self.args.process_index > 0):
            name = stage if baseline == "none" else f"start, {baseline}"
            results.append({"stage": name, "seed": seed, **self.result(name, stages[stage], baseline, seed)})
        return results

    def result(self, name: str, directory: Path, baseline: str, seed: int) -> dict[str, Any]:
        """The saved result of this run, or a new one. ValueError where the saved one has other settings."""
        path = self.output / "fine_tuning" / name.replace(", ", "-").replace(" ", "-") / f"seed-{seed}.json"
        keep = self.output / "fine_tuned" / directory.name if (name, seed) == (self.kept, 0) else None
        settings = {setting: getattr(self.recipe, setting) for setting in SETTINGS}
        settings |= {"max_steps": self.args.max_steps, "data": self.data}
        settings["weights"] = [file_hash(file) for file in sorted(directory.glob("*.safetensors"))]
        found = read_json(path)
        if found is not None and found["settings"] != settings:
            changed = {k: (found["settings"].get(k), v) for k, v in settings.items() if found["settings"].get(k) != v}
            raise ValueError(
                f"{path} was made with other settings (was, now): {changed}; use --overwrite or another --output_dir"
            )
        if found is None or (keep and not keep.exists()):
            found = {**self.fine_tune(directory, baseline, seed, path.parent, keep), "settings": settings}
            if self.args.process_index == 0:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json(path, found)
        return found

    def fine_tune(self, directory: Path, baseline: str, seed: int, scratch: Path, keep: Path | None) -> dict[str, Any]:
        """One run; the model of the last step is tested, never the best one."""
        recipe, subset = self.recipe, self.train
        if recipe.labelled_rows:
            subset = subset.select(low_resource_subset(subset["label"], recipe.labelled_rows, seed))
        labels = {"id2label": dict(enumerate(self.names)), "label2id": {name: i for i, name in enumerate(self.names)}}
        transformers.set_seed(seed)
        load = noisy_model if baseline == "r3f" else AutoModelForSequenceClassification.from_pretrained
        model = quietly(load, str(directory), num_labels=len(self.names), **labels)
        trainer = DistillationTrainer(
            model,
            self.arguments(scratch, seed),
            DataCollatorWithPadding(self.tokenizer),
            subset,
            processing_class=self.tokenizer,
            objective=R3F(recipe.r3f_weight) if baseline == "r3f" else None,
            callbacks=[MARS(model, recipe.mars_bound)] if baseline == "mars" else None,
            optimizers=(recadam(recipe, model) if baseline == "recadam" else None, None),
        )
        trainer.remove_callback(PrinterCallback)  # the bar over all runs is enough
        trainer.train()
        train_loss = trainer.evaluate(subset)["eval_loss"]
        prediction = trainer.predict(self.held_out)
        if keep:
            trainer.save_model(str(keep))
        metric = TEXT_TASKS[recipe.task].metric if recipe.task else "accuracy"
        value = score(metric, prediction.predictions.argmax(-1), prediction.label_ids)
        return {
            "metric": metric,
            "score": value,
            "train_loss": train_loss,
            "test_loss": prediction.metrics["test_loss"],
        }

    def arguments(self, scratch: Path, seed: int) -> DistillationArguments:
        return stage_arguments(
            self.args,
            scratch,
            seed=seed,
            learning_rate=self.recipe.fine_tuning_learning_rate,
            num_train_epochs=self.recipe.fine_tuning_epochs,
            max_steps=self.args.max_steps if self.args.max_steps > 0 else -1,
            per_device_train_batch_size=max(self.recipe.fine_tuning_batch_size // self.args.world_size, 1),
            weight_decay=WEIGHT_DECAY,
            warmup_steps=0.1,
            train_sampling_strategy=self.args.train_sampling_strategy,
            disable_tqdm=True,
            logging_strategy="no",
        )


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
