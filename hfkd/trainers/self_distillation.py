"""The same, in rounds: self-distillation for further pre-training (Lee et al., ICLR 2023, arXiv 2210.02871)."""

from __future__ import annotations

import copy
import dataclasses
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerState, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from hfkd.cache import COLUMNS, cache_teacher
from hfkd.cards import CardFacts
from hfkd.data.collate import KeyedCollator
from hfkd.functional import weight_distance
from hfkd.objectives.objective import Objective
from hfkd.objectives.self_distill import SelfDistill
from hfkd.outputs import Batch
from hfkd.records import file_hash, read_json, weights_hash, write_json
from hfkd.teachers import CachedTeacher, Teacher
from hfkd.trainers.arguments import SelfDistillationArguments
from hfkd.trainers.card import Taught
from hfkd.trainers.checkpoints import last_whole_checkpoint, load_renamed_weights, odd_files
from hfkd.trainers.distillation import DistillationTrainer
from hfkd.trainers.round_kinds import kind_of, rows_hash

logger = logging.get_logger(__name__)
DONE = "done.json"
RECORD = "rounds.json"
# What a resumed run may not change: another value would make rounds that do not belong together
RECORDED = (
    *("seed", "max_steps", "num_train_epochs", "learning_rate", "weight_decay", "warmup_steps"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "lr_scheduler_type", "optim", "bf16", "fp16"),
    *("data_seed", "train_sampling_strategy", "dataloader_drop_last"),
    *("optim_args", "lr_milestones", "lr_milestone_factor"),
)


class SelfDistillationTrainer(DistillationTrainer):
    """Algorithm 1 of the paper (rounds above 1 and the text form are recalled, the single image round was read in code).

    Round 0 is plain further pre-training. Round t restarts encoder and head from the start weights and adds the squared
    distance between its features and those of round t-1's encoder on the clean input, frozen. `num_rounds=0` is the
    baseline of the paper, bit for bit.

    `model` or `model_init` gives the start weights (`hfkd.two_view_model`). With a tokenizer as `processing_class` (or a
    MaskedLMCollator) the rounds are over texts, with an image processor (or a MaskedImageCollator) over images. Every
    round lies in `output_dir/round-t` as the plain masked model it is, and is done when `done.json` there names its
    weights' hash; the start lies in `output_dir/start`. `train(resume_from_checkpoint=True)` goes on where the run was
    killed. The predictions of an evaluation over images are the decoder's patches, its label_ids the example_id.

    Raises ValueError for a teacher (the rounds are their own), for `optimizers=` (a new optimizer is made each round:
    `optimizer_cls_and_kwargs`), for a model without a two-view forward, and on resuming with other settings;
    FileExistsError when `output_dir` holds another run's rounds.
    """

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Any = None,
        compute_loss_func: Any = None,
        compute_metrics: Any = None,
        callbacks: Any = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: Any = None,
        preprocess_logits_for_metrics: Any = None,
        teacher: Any = None,
        *,
        objective: Objective | None = None,
        peft_config: Any = None,
    ):
        refuse_wrong_arguments(args, data_collator, train_dataset, processing_class, optimizers, teacher, peft_config)
        if model is not None and model_init is None:
            start = copy.deepcopy(model)
            model, model_init = None, lambda: copy.deepcopy(start)
        self.kind = kind_of(data_collator, processing_class)
        self._own_collator = data_collator is None
        super().__init__(
            model,
            args,
            data_collator,
            train_dataset,
            eval_dataset,
            processing_class,
            model_init,
            compute_loss_func,
            compute_metrics,
            callbacks,
            optimizers,
            optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics,
            objective=self.kind.masked(),
        )
        if self.accelerator.dispatch_batches and "masked_positions" in self.kind.views:
            raise ValueError(
                "dispatch_batches cuts a collated batch by rows, but masked positions count over the whole batch"
            )
        missing = self.kind.views - self._forward_names
        if missing:
            raise ValueError(
                f"{type(self.model).__name__}.forward does not take {sorted(missing)}: load the start weights with "
                "hfkd.two_view_model(name_or_path)"
            )
        self.label_names = list(self.kind.label_names)
        self._beside_batch: Any = {}  # inputs of the student's forward that the round before gives
        self.round_objective: Any = objective or self.kind.distilled(self.args)
        self.kind.check(self.args, self.round_objective, self.data_collator, self.model.config, self.train_dataset)

    def _set_keyed_collator(self, numbered: bool) -> None:
        if self._own_collator:  # only now there is a model, which knows its patches
            self.data_collator = self.kind.collator(self.processing_class, self.model.config, self.args.seed)
        super()._set_keyed_collator(numbered)

    # ---- rounds ----

    _head_is_scored = True

    def train(self, resume_from_checkpoint: bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train every round that is not done. `True` resumes; anything else wants an output_dir without rounds."""
        if resume_from_checkpoint not in (None, False, True):
            raise ValueError(
                f"rounds resume with True, from {self.args.output_dir}, not from {resume_from_checkpoint!r}"
            )
        self._open_run(bool(resume_from_checkpoint))
        for round in range(self.args.num_rounds + 1):
            output = self._finished_output(round) or self._train_round(round, *args, **kwargs)
        return output

    def round_directory(self, round: int) -> Path:
        return Path(self.args.output_dir) / f"round-{round}"

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.round_directory(self.round))  # checkpoints of a round lie inside the round

    def _open_run(self, resume: bool) -> None:
        """Refuse another run's rounds, then save the start weights and the settings that a resumed run must share."""
        directory = Path(self.args.output_dir)
        rounds = sorted(path.name for path in directory.glob("round-*"))
        if rounds and not resume:
            raise FileExistsError(
                f"{directory} holds the rounds of another run ({', '.join(rounds)}): resume it with "
                "resume_from_checkpoint=True, or choose another output_dir, or delete them"
            )
        set_seed(self.args.seed)
        start: Any = self.call_model_init()
        record = self._record_of_run(start)
        before = read_json(directory / RECORD) if rounds else None
        if before is None and rounds and (directory / RECORD).exists():
            raise ValueError(
                f"{directory / RECORD} is damaged, so nobody can tell which run its rounds belong to: delete both"
            )
        if before is not None:
            changed = {name: (before.get(name), record[name]) for name in record if before.get(name) != record[name]}
            if changed:
                lines = "; ".join(f"{name} was {old!r}, now {new!r}" for name, (old, new) in changed.items())
                raise ValueError(f"{directory} was started with other settings, so its rounds cannot go on: {lines}")
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            start.save_pretrained(directory / "start")
            if self.processing_class is not None:
                self.processing_class.save_pretrained(directory / "start")
            write_json(directory / RECORD, record)
        self.accelerator.wait_for_everyone()

    def _record_of_run(self, start: Any) -> dict[str, Any]:
        objective = f"{type(self.round_objective).__name__}({self.round_objective.settings()})"
        return {
            **self._settings(RECORDED),
            "objective": objective,
            **self.kind.settings(self.data_collator, start.config),
            "rows": rows_hash(self.train_dataset),
            "rows_per_step": self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size,
            "start": weights_hash(start.state_dict()),
        }

    def _settings(self, names: tuple[str, ...]) -> dict[str, Any]:
        values = {name: getattr(self.args, name) for name in names}
        return {name: getattr(value, "value", value) for name, value in values.items()}  # enums by their value

    def _finished_output(self, round: int) -> TrainOutput | None:
        """What a finished round reported, with its weights loaded; None when it is not done or its weights are damaged."""
        directory = self.round_directory(round)
        done = read_json(directory / DONE)
        if not done:
            return None
        self.round = round
        odd = odd_files(directory, done["weights"])
        if odd:
            logger.warning(
                f"{directory}: {', '.join(odd)} is corrupt or truncated (its hash differs from {DONE}); "
                "the round is trained again from its last whole checkpoint"
            )
            return None
        if round == self.args.num_rounds:
            self._load(directory)
        return TrainOutput(done["global_step"], done["metrics"].get("train_loss", 0.0), done["metrics"])

    def _train_round(self, round: int, *args: Any, **kwargs: Any) -> TrainOutput:
        self.round = round
        directory = self.round_directory(round)
        self._beside_batch = {}
        if round == 0:
            self._set_objective(self.kind.masked(), None)
        else:
            teacher, beside = self.kind.before(self.round_directory(round - 1), self.round_objective)
            self._beside_batch = self._prepare_input(beside)
            if teacher is not None and self.args.cache_teacher_features:
                teacher = self._cached(teacher)
            self._set_objective(self.round_objective, teacher)
        self._head_is_scored = set(self.kind.masked.columns) <= set(self.objective.columns)
        logger.info(f"round {round} of {self.args.num_rounds}: {type(self.objective).__name__}")
        checkpoint = last_whole_checkpoint(directory)
        output = self._trained_already(checkpoint) or super().train(checkpoint, *args, **kwargs)
        self._close_round(directory, output)
        return output

    def _cached(self, teacher: Any) -> Teacher:
        """The teacher's features of every image, asked once and read from a column: what it sees never changes.

        In float32 whatever the precision of training is; of a bfloat16 run an asked teacher would answer in bfloat16.
        """
        objective, name = self.round_objective, COLUMNS["features"]
        teacher.model.pool = lambda states: objective.pool(states, torch.ones(states.shape[:2], device=states.device))
        rows = self.train_dataset
        rows = rows.remove_columns(name) if name in rows.column_names else rows  # of the round before
        directory = self._features_directory()
        with self.args.main_process_first(local=False, desc="asking the teacher about every image"):
            self.train_dataset = cache_teacher(
                rows,
                teacher,
                directory,
                collator=self.data_collator.clean(),
                batch_size=self.args.per_device_eval_batch_size,
                features=True,
                dtype="float32",
                device=self.args.device,
            )
        cached = CachedTeacher(logits=None, features=name, cache=directory)
        cached.view = self.data_collator.view  # it draws which patches are hidden; the whole images are the plain ones
        return cached

    def _features_directory(self) -> Path:
        return self.round_directory(self.round) / COLUMNS["features"]

    def _trained_already(self, checkpoint: Path | None) -> TrainOutput | None:
        """A run killed after its last step is closed as it is: the stock Trainer would resume with one step more."""
        if checkpoint is None:
            return None
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        if state.global_step < state.max_steps:
            return None
        self.state = state
        self._load(checkpoint)
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        mean = sum(losses) / max(len(losses), 1)
        return TrainOutput(state.global_step, mean, {"train_loss": mean})

    def _load(self, directory: Path) -> None:
        self.model = self.model_wrapped = self.call_model_init()
        if not load_renamed_weights(self.model, directory):
            self.model.load_state_dict(saved_weights(directory), strict=False)  # tied weights are saved once
            self.model.tie_weights()
        self._move_model_to_device(self.model, self.args.device)

    def call_model_init(self, trial: Any = None) -> Any:
        """The start weights; a head without a loss is frozen, because DDP waits for the gradient of every parameter."""
        model: Any = super().call_model_init(trial)
        if not self._head_is_scored:
            encoder = set(model.base_model.parameters())  # among them what a tied head shares with it
            for parameter in set(model.parameters()) - encoder:
                parameter.requires_grad_(False)
        return model

    # ---- what a two-view student is shown ----

    def student_view(self, inputs: Batch, training: bool) -> dict[str, Any]:
        """As in DistillationTrainer; and what the round before left for the student's forward (its weights, say)."""
        view = super().student_view(inputs, training)
        scored = self.objective.columns if training else self.objective.task_columns
        view = {name: value for name, value in view.items() if name in scored or name not in self.kind.views}
        return {**view, **self._beside_batch} if training else view

    def _check_teacher(self) -> None:
        """There is nothing to score the encoder of the round before by."""

    def _close_round(self, directory: Path, output: TrainOutput) -> None:
        self.save_model(str(directory), _internal_call=True)  # nothing is pushed before the last round is done
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            self.state.save_to_json(str(directory / "trainer_state.json"))
            done = {
                "round": self.round,
                "global_step": output.global_step,
                "distance_to_start": self._distance_to_start(directory),
                "metrics": output.metrics,
                "weights": {
                    path.name: file_hash(path) for path in [*directory.glob("*.safetensors"), directory / "config.json"]
                },
            }
            write_json(directory / DONE, done)
            self.write_card(directory)  # with this round in it; a kill in between leaves the card of the save
            shutil.rmtree(self._features_directory(), ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def finished_rounds(self) -> list[dict[str, Any]]:
        """The facts of the rounds that are done: distance to the start (L2 over the encoder), metrics, hashes."""
        found = (read_json(self.round_directory(round) / DONE) for round in range(self.args.num_rounds + 1))
        return [done for done in found if done is not None]

    def _distance_to_start(self, directory: Path) -> float:
        prefix = self.accelerator.unwrap_model(self.model).base_model_prefix + "."
        sets = (saved_weights(directory), saved_weights(Path(self.args.output_dir) / "start"))
        round_weights, start = ({n: w for n, w in s.items() if n.startswith(prefix)} for s in sets)
        return weight_distance(round_weights, start)

    # ---- cards ----

    card_template = "self_distilled_encoder.md"

    def _round_in(self, folder: Path) -> int:
        number = folder.name.removeprefix("round-")
        return int(number) if number.isdigit() and folder == self.round_directory(int(number)) else self.round

    def _name_in(self, folder: Path) -> str:
        return folder.resolve().name

    def _objective_in(self, folder: Path) -> Any:
        return self.round_objective if self._round_in(folder) else self.kind.masked()

    def _metrics_in(self, folder: Path) -> dict[str, float]:
        return {}  # what an encoder is good for is measured after fine-tuning, by whoever does it

    def _taught_in(self, folder: Path) -> Taught | None:
        before = self._round_in(folder) - 1
        if before < 0:
            return None
        done = read_json(self.round_directory(before) / DONE) or {"weights": {}}
        weights = next((digest for name, digest in done["weights"].items() if name.endswith(".safetensors")), "")
        branch = f"round-{before}" if self.hub_model_id else ""
        return Taught(
            "ModelTeacher", f"the encoder of round {before}", self.hub_model_id or "", branch, "", weights, []
        )

    def _facts_read_off(self, folder: Path) -> CardFacts:
        rounds, objective = self.finished_rounds()[: self._round_in(folder) + 1], self._objective_in(folder)
        settings = {
            **objective.settings(),
            **without_none(self.kind.settings(self.data_collator, self.model.config)),
            **without_none(self._settings(("num_rounds", *RECORDED))),
        }
        return dataclasses.replace(
            super()._facts_read_off(folder),
            rounds=[_stage(done) for done in rounds],
            settings=settings,
            pipeline_tag=self.kind.pipeline_tag,
            # What is scored is a classifier that starts from the encoder
            score_task="image-classification" if self.kind.pipeline_tag.startswith("image") else "text-classification",
            label_names=[],
            citations=[SelfDistill.paper],
        )

    def _saved_students(self) -> list[tuple[Path, str, str | None]]:
        """Every round has a branch of its own; the last one is the main branch too."""
        rounds, name = [done["round"] for done in self.finished_rounds()], self.hub_model_id or ""
        if not rounds:
            raise ValueError(f"{self.args.output_dir} holds no finished round to push: train() first")
        branches = [(self.round_directory(round), name, f"round-{round}") for round in rounds]
        return [*branches, (branches[-1][0], name, None)]

    def _write_published_card(self, folder: Path, facts: dict[str, Any]) -> None:
        """The results are the last round's: the rounds before it claim none."""
        number = self._round_in(folder)
        claims = {} if number == self.args.num_rounds else {"stage": f"round {number}"}
        super()._write_published_card(folder, {**claims, **facts})


def _stage(done: dict[str, Any]) -> dict[str, Any]:
    """A finished round as a card lists it."""
    return {
        "name": f"round {done['round']}",
        "distance": done["distance_to_start"],
        "losses": {name: value for name, value in done["metrics"].items() if name.endswith("_loss")},
        "hash": next(iter(done["weights"].values()), ""),
    }


def without_none(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}


def refuse_wrong_arguments(
    args: Any,
    data_collator: Any,
    train_dataset: Any,
    processing_class: Any,
    optimizers: tuple[Any, Any],
    teacher: Any,
    peft_config: Any,
) -> None:
    """Say what is wrong before any model is loaded."""
    if not isinstance(args, SelfDistillationArguments):
        raise ValueError(f"args must be SelfDistillationArguments(output_dir=...), got {type(args).__name__}")
    if teacher is not None or peft_config is not None:
        raise ValueError(
            "the teacher of a round is the encoder of the round before it: leave teacher and peft_config out"
        )
    if optimizers != (None, None):
        raise ValueError("every round starts with a new optimizer: pass optimizer_cls_and_kwargs instead of optimizers")
    if processing_class is None and data_collator is None:
        raise ValueError(
            "masking needs the tokenizer or the image processor: pass processing_class=AutoTokenizer.from_pretrained(...) or "
            "AutoImageProcessor.from_pretrained(...)"
        )
    if data_collator is not None and not isinstance(data_collator, KeyedCollator):
        raise ValueError(
            f"{type(data_collator).__name__} draws its masks from the global generator and does not say where they are: "
            "leave data_collator out, or pass hfkd.MaskedLMCollator or hfkd.data.masked_images.MaskedImageCollator"
        )
    if not hasattr(train_dataset, "__len__") or not len(train_dataset):
        raise ValueError(f"rounds need a train_dataset with rows and a length, got {type(train_dataset).__name__}")


def saved_weights(directory: Path) -> dict[str, Tensor]:
    """All tensors of a saved model, sharded or not, by their saved names."""
    return {
        name: tensor for path in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(path).items()
    }
