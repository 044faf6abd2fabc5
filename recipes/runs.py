"""Runs that are kept once they are done: one model trained with one objective and one seed, `output_dir/runs/NAME/seed-N`.

`settings.json` is written before training and `result.json` last, so that a resumed study skips what is done, goes on from
the last whole checkpoint of what is not, and refuses runs that were made with other settings.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file, save_file
from scipy.special import softmax
from transformers import EvalPrediction, PrinterCallback

from hfkd import DistillationArguments, DistillationTrainer
from hfkd.data.collate import KeyedCollator
from hfkd.diagnostics import FidelityReport, report_of_logits
from hfkd.diagnostics.callback import log_report
from hfkd.diagnostics.evaluate_metrics import compute_metrics_for
from hfkd.diagnostics.metrics import agreement, expected_calibration_error
from hfkd.diagnostics.trackers import refuse_without_key
from hfkd.objectives import Objective
from hfkd.records import read_json, weights_hash, write_json
from hfkd.teachers import Teacher
from hfkd.teachers.labels import class_names
from hfkd.trainers.checkpoints import last_whole_checkpoint
from hfkd.trainers.self_distillation import RECORDED
from program import rows_per_step
from publication import keep_facts, known_facts, refuse_unpublishable


@dataclass
class View:
    """The data as one tokenizer or image processor reads it, the teacher's own view beside it where it has one.

    settings: what was done to the rows on their way; runs with others are not resumed.
    """

    processing_class: Any
    collator: Any
    train: Any
    validation: Any
    held_out: dict[str, Any]
    hashes: dict[str, str]
    settings: dict[str, Any]


@dataclass
class Run:
    """One model to train. `objective` None is cross-entropy; `answers` are the teacher's logits on the held-out rows."""

    name: str
    seed: int
    model: Callable[[], Any]
    view: View
    objective: Objective | None = None
    asked: Callable[[], tuple[Teacher, Any]] | None = None  # the teacher, and rows with its answers if they are cached
    teacher_hash: str | None = None
    answers: dict[str, Any] | None = None
    budget: dict[str, Any] = field(default_factory=dict)
    keep: bool = False


class Runs:
    """Trains and scores runs in `output_dir/runs`, or finds them there.

    recipe: says `overwrite`. data: has `metrics`, `problem_type` and `validation` (None where there is none).
    """

    def __init__(self, recipe: Any, args: DistillationArguments, data: Any):
        self.recipe, self.args, self.data = recipe, args, data
        self.output = Path(args.output_dir)
        self.resumes = resumes(args)
        self.found = earlier_runs(self.output)
        refuse_unusable(args, data)
        self.repository = refuse_unpublishable(args, self.output.name, recipe)
        if self.found and not (self.resumes or recipe.overwrite):
            raise FileExistsError(
                f"{self.output} holds another study ({', '.join(path.name for path in self.found)}): go on with it with "
                "--resume_from_checkpoint True, delete it with --overwrite, or choose another --output_dir"
            )

    def start(self) -> None:
        """Only now, when all inputs have proved right, an earlier study is deleted."""
        if self.args.process_index == 0 and self.recipe.overwrite and not self.resumes:
            for path in self.found:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        wait_for_everyone()

    def folder(self, name: str, seed: int) -> Path:
        return self.output / "runs" / name / f"seed-{seed}"

    def result(self, run: Run) -> dict[str, Any]:
        """The saved result of this run, or a new one. ValueError where the saved one has other settings."""
        folder = self.folder(run.name, run.seed)
        transformers.set_seed(run.seed)
        model = run.model()
        self.check_settings(folder, {**self.settings(run), "start": weights_hash(model.state_dict())})
        found = read_json(folder / "result.json")
        done = found is not None and (not run.keep or (folder / "model").is_dir())
        wait_for_everyone()
        return found if done else self.train(run, model, folder)

    def settings(self, run: Run) -> dict[str, Any]:
        args = self.arguments(run, Path())
        recorded = {name: getattr(args, name) for name in RECORDED}
        objective = run.objective or args.make_objective("cross_entropy")
        return {
            **{name: getattr(value, "value", value) for name, value in recorded.items()},
            "rows_per_step": rows_per_step(args),
            **run.view.settings,
            "objective": f"{type(objective).__name__}({objective.settings()})",
            "teacher": run.teacher_hash,
            "teacher_dtype": args.teacher_dtype if run.teacher_hash else None,
            "rows": run.view.hashes,
        }

    def check_settings(self, folder: Path, settings: dict[str, Any]) -> None:
        settings, found = json.loads(json.dumps(settings)), read_json(folder / "settings.json")
        if found is not None and found != settings:
            names = sorted(settings.keys() | found.keys())
            changed = {n: (found.get(n), settings.get(n)) for n in names if found.get(n) != settings.get(n)}
            raise ValueError(
                f"{folder} was made with other settings (was, now): {changed}; use --overwrite or another --output_dir"
            )
        wait_for_everyone()
        if self.args.process_index == 0 and found is None:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "settings.json", settings)

    def train(self, run: Run, model: Any, folder: Path) -> dict[str, Any]:
        """Train, score the last step's model (never the best one), save."""
        trainer = self.trainer(run, model, self.arguments(run, folder))
        checkpoint = last_whole_checkpoint(folder)
        memory = Memory(self.args.device)
        done = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        steps = trainer.state.global_step
        taken = steps - (int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0)
        seconds = done.metrics["train_runtime"] / max(taken, 1)
        costs = {"steps": steps, "seconds_per_step": seconds, "peak_mib": memory.peak()}
        logits = {prefix: predict(trainer, rows) for prefix, rows in run.view.held_out.items()}
        trainer.card_facts = known_facts(self.recipe)
        if run.answers and self.data.problem_type == "single_label_classification":
            found = self.compared(trainer, run, logits)
            trainer.card_facts.fidelity = found.to_dict()
            if trainer.args.report_to:
                log_report(trainer, found, folder / "fidelity", "test_fidelity_")
        if run.keep:
            self.save(trainer, folder)
        return self.close(run, folder, {**self.score(run, logits), **costs}, logits)

    def compared(self, trainer: Any, run: Run, logits: dict[str, Any]) -> FidelityReport:
        """How like its teacher the student is, on the first held-out split: for the card and the trackers."""
        first = next(iter(logits))
        labels, names = run.view.held_out[first]["label"][:], class_names(trainer.model.config)
        settings = {"class_names": names, "student": run.name, "bootstrap": 0}
        return report_of_logits(logits[first], run.answers[first], labels, **settings)

    def close(self, run: Run, folder: Path, found: dict[str, Any], logits: dict[str, Any]) -> dict[str, Any]:
        result = {"run": run.name, "seed": run.seed, **found}
        if self.args.process_index == 0:
            partial = folder / "logits.partial"
            # save_file writes the bytes as they lie: columns in another order would be read back mixed up
            save_file({f"{prefix}logits": np.ascontiguousarray(values) for prefix, values in logits.items()}, partial)
            partial.replace(folder / "logits.safetensors")
            write_json(folder / "result.json", result)
            for checkpoint in folder.glob("checkpoint-*"):
                shutil.rmtree(checkpoint)
        wait_for_everyone()
        return result

    def trainer(self, run: Run, model: Any, args: DistillationArguments) -> DistillationTrainer:
        teacher, rows = run.asked() if run.asked else (None, run.view.train)
        trainer = DistillationTrainer(
            model,
            args,
            seeded(run.view.collator, run.seed),
            rows,
            run.view.validation if str(args.eval_strategy.value) != "no" else None,
            processing_class=run.view.processing_class,
            compute_metrics=compute_metrics_for(self.data.metrics, self.data.problem_type),
            teacher=teacher,
            objective=run.objective,
        )
        if args.disable_tqdm:
            trainer.remove_callback(PrinterCallback)
        return trainer

    def arguments(self, run: Run, folder: Path) -> DistillationArguments:
        """Those of the command line, for one run: only seed, objective and (for a teacher) the budget differ."""
        args = copy.copy(self.args)
        changes = {"objective": None, "temperature": None, "alpha": None, "objective_kwargs": None, **run.budget}
        changes |= {"output_dir": str(folder), "seed": run.seed, "data_seed": run.seed, "resume_from_checkpoint": None}
        changes["run_name"] = f"{self.output.name}/{run.name}/seed-{run.seed}"  # study, kind and seed in a tracker
        changes["push_to_hub"] = False  # the study is published when it is done
        if run.objective is not None:
            changes["label_smoothing_factor"] = 0.0  # the objective has it already
        for name, value in changes.items():
            setattr(args, name, value)
        return args

    def save(self, trainer: DistillationTrainer, folder: Path) -> None:
        partial = folder / "model.partial"
        trainer.save_model(str(partial))
        wait_for_everyone()
        trainer.measure_costs()
        if self.args.process_index == 0:
            for student in self.saved(partial):
                keep_facts(student, trainer.facts(student))
            shutil.rmtree(folder / "model", ignore_errors=True)
            partial.rename(folder / "model")
        wait_for_everyone()

    def saved(self, folder: Path) -> list[Path]:
        """The folders of the models that `save` has put there."""
        return [folder]

    def score(self, run: Run, logits: dict[str, Any]) -> dict[str, Any]:
        """Metrics of every held-out split; agreement with the teacher and calibration on the first one."""
        metrics = compute_metrics_for(self.data.metrics, self.data.problem_type)
        labels = {prefix: np.asarray(rows["label"][:]) for prefix, rows in run.view.held_out.items()}
        found = {}
        for prefix, values in logits.items():
            scores = metrics(EvalPrediction(predictions=values, label_ids=labels[prefix]))
            found |= {f"{prefix}{name}": score for name, score in scores.items()}
        if self.data.problem_type != "single_label_classification":
            return found
        first = next(iter(logits))
        if run.answers is not None:
            found["agreement"] = agreement(logits[first].argmax(-1), run.answers[first].argmax(-1))
        found["calibration_error"] = expected_calibration_error(softmax(logits[first], axis=-1), labels[first])
        return found

    def answers(self, name: str, seed: int) -> dict[str, Any]:
        """The saved logits on the held-out rows, by prefix."""
        found = load_file(self.folder(name, seed) / "logits.safetensors")
        return {key.removesuffix("logits"): values for key, values in found.items()}


def seeded(collator: Any, seed: int) -> Any:
    """Crops, flips and masks of the run's own seed; a collator that draws nothing is returned as it is."""
    if not isinstance(collator, KeyedCollator):
        return collator
    own = copy.copy(collator)
    own.seed = seed
    return own


def predict(trainer: DistillationTrainer, rows: Any) -> Any:
    """Logits (rows, labels) in the order of the rows; neighbours of one length need little padding meanwhile."""
    if "input_ids" not in rows.column_names:
        return np.asarray(trainer.predict(rows).predictions, dtype=np.float32)
    order = np.argsort([len(ids) for ids in rows["input_ids"]], kind="stable")
    found = np.asarray(trainer.predict(rows.select(order)).predictions, dtype=np.float32)
    logits = np.empty_like(found)
    logits[order] = found
    return logits


class Memory:
    """Peak memory from now on, in MiB: the accelerator's, or the process's resident size where the kernel counts it.

    The latter includes what earlier runs of the process have left in malloc: a bound, not a measurement of one run.
    """

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        elif (clear := Path("/proc/self/clear_refs")).exists():
            with suppress(OSError):  # where it is not allowed, the peak is that of the whole process
                clear.write_text("5")

    def peak(self) -> float | None:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        if not (status := Path("/proc/self/status")).exists():
            return None
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024


def earlier_runs(output: Path) -> list[Path]:
    """What an earlier study has written, and nothing else that lies beside it."""
    runs = [path.parent for path in output.glob("runs/*/seed-*/settings.json")]
    answers = list(output.glob("teacher_answers/seed-*"))
    names = ("results.csv", "results.md", "scores.png", "splits.json")
    files = [path for name in names for path in output.glob(name)]
    return sorted([*runs, *answers, *(files if runs else [])])


def resumes(args: DistillationArguments) -> bool:
    if args.resume_from_checkpoint not in (None, "True", "true", True, "False", "false"):
        raise ValueError(
            f"--resume_from_checkpoint takes True here (runs resume from output_dir), not {args.resume_from_checkpoint}"
        )
    return args.resume_from_checkpoint in ("True", "true", True)


def refuse_unusable(args: DistillationArguments, data: Any) -> None:
    refuse_without_key(args)
    if args.load_best_model_at_end:
        raise ValueError("runs are scored at their last step: leave load_best_model_at_end off")
    if args.eval_strategy.value != "no" and data.validation is None:
        raise ValueError(
            f"eval_strategy is {args.eval_strategy.value}, and the data has no validation split: leave it off"
        )


def wait_for_everyone() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
