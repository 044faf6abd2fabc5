"""What the trackers are told beyond the Trainer's scalars: lineage, rounds as runs, the student's files, tables and figures.

The only import of W&B, TensorBoard and Trackio. Each class is the stock callback of transformers and differs where its
docstring says so.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers.integrations.integration_utils import (
    TensorBoardCallback,
    TrackioCallback,
    WandbCallback,
    WandbLogModel,
    default_logdir,
)

from hfkd.records import weights_hash

NO_KEY = (
    "there is no W&B key: set WANDB_MODE=offline, run `wandb login` (or set WANDB_API_KEY), or watch without an account with "
    "--report_to trackio or --report_to tensorboard"
)


class RunName(NamedTuple):
    """What a run is called. W&B sorts runs by group and kind (its job type)."""

    name: str | None
    group: str | None = None
    kind: str | None = None


def run_name(trainer: Any) -> RunName:
    """Of `args.run_name`; one with slashes says GROUP/NAME, and the kind is the name's first part without its number.

    Every round of self-distillation is a run of its own; without a run_name their group is the name of `output_dir`.
    """
    args = trainer.args
    given = [args.run_name] if args.run_name else []
    if hasattr(args, "num_rounds"):
        given = [*(given or [Path(args.output_dir).resolve().name]), f"round-{trainer.round}"]
    group, slash, name = "/".join(given).partition("/")
    if not slash or not group:
        return RunName("/".join(given) or None)
    return RunName(name, group, re.sub(r"-\d+$", "", name.partition("/")[0]))


def lineage(trainer: Any) -> dict[str, Any]:
    """Who taught by which objective. The teacher's weights are hashed."""
    objective = trainer._objective
    found = {"name": type(objective).__name__, "settings": objective.settings()}
    found |= {"equation": objective.equation, "paper": objective.paper}
    return {"teacher": teacher_facts(trainer.teacher), "objective": found}


def teacher_facts(teacher: Any) -> dict[str, Any] | None:
    if teacher is None:
        return None
    try:
        hashes = [weights_hash(weights) for weights in teacher.weights()]
    except ValueError:  # answers that were cached by somebody else, say
        hashes = []
    return {**teacher.facts(), "weights": hashes}


def config_of(model: Any) -> dict[str, Any]:
    config = getattr(model, "config", None)
    return {} if config is None else dict(config.to_dict())


# ---- the runs ----


class WandbRun(WandbCallback):
    """Every training is a run of its own (stock: all of a process share one), named and grouped by `run_name`.

    The config holds the `lineage`. With WANDB_LOG_MODEL=end or checkpoint the student is kept as an artifact of the files
    that would be published; the stock callback takes training_args.bin, optimizer states and all else in the folder.
    A run that was open before (wandb.init(...) of yours) is used as it is, and stays open.

    Raises ValueError without a key, ConnectionError where the server is not reached.
    """

    opened: ClassVar[Any] = None  # the run that one of these has opened last

    def __init__(self, trainer: Any):
        super().__init__()
        self.trainer = trainer
        self._over = False

    def setup(self, args: Any, state: Any, model: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and state.trial_name is None:
            self._open()
        kept, self._log_model = self._log_model, WandbLogModel.FALSE  # it would upload a print of the network
        try:
            super().setup(args, state, model, **kwargs)
        finally:
            self._log_model = kept
        if state.is_world_process_zero:
            self._wandb.config.update(lineage(self.trainer), allow_val_change=True)

    def _open(self) -> None:
        if self._wandb.run is not None and self._wandb.run is not WandbRun.opened:
            return
        self._wandb.finish()
        name, group, kind = run_name(self.trainer)
        try:
            WandbRun.opened = self._wandb.init(
                project=os.getenv("WANDB_PROJECT", "huggingface"),
                name=os.getenv("WANDB_NAME", name),
                group=os.getenv("WANDB_RUN_GROUP", group),
                job_type=os.getenv("WANDB_JOB_TYPE", kind),
            )
        except self._wandb.errors.UsageError as error:
            raise ValueError(NO_KEY) from error
        except self._wandb.errors.CommError as error:
            raise ConnectionError(
                f"W&B is not reached ({error}): set WANDB_MODE=offline and run `wandb sync` later"
            ) from error

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self._over:
            self._initialized = self._over = False
        super().on_train_begin(args, state, control, model=model, **kwargs)

    def on_train_end(
        self, args: Any, state: Any, control: Any, model: Any = None, processing_class: Any = None, **kwargs: Any
    ) -> None:
        self._over = True
        if not (self._log_model.is_enabled and self._initialized):
            return
        with tempfile.TemporaryDirectory() as folder:
            self.trainer.save_model(folder, _internal_call=True)  # on every process: shards are gathered
            self._keep(Path(folder), state, ["final_model"])

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._log_model == WandbLogModel.CHECKPOINT and self._initialized:
            folder = Path(self.trainer._get_output_dir(None)) / f"checkpoint-{state.global_step}"
            self._keep(folder, state, [f"checkpoint_global_step_{state.global_step}"])

    def _keep(self, folder: Path, state: Any, aliases: list[str]) -> None:
        if not state.is_world_process_zero:
            return
        run = self._wandb.run
        name = re.sub(r"[^\w.-]+", "-", f"model-{run.name or run.id}")
        artifact = self._wandb.Artifact(name, type="model", metadata={"step": state.global_step})
        for path in published_files(folder):
            artifact.add_file(str(folder / path), name=path)
        run.log_artifact(artifact, aliases=aliases)


class TrackioRun(TrackioCallback):
    """Named and grouped by `run_name`; the config holds the `lineage`."""

    def __init__(self, trainer: Any):
        super().__init__()
        self.trainer = trainer

    def setup(self, args: Any, state: Any, model: Any, **kwargs: Any) -> None:
        self._initialized = True
        if not state.is_world_process_zero:
            return
        name, group, _ = run_name(self.trainer)
        config = {**config_of(model), **args.to_dict(), **lineage(self.trainer)}
        self._trackio.init(
            project=args.project,
            name=name,
            group=group,
            space_id=args.trackio_space_id,
            resume="allow",
            private=args.hub_private_repo,
            bucket_id=args.trackio_bucket_id,
            config={key: value for key, value in config.items() if not key.startswith("_")},  # refused by Trackio
        )
        self._space_id = self._trackio.context_vars.current_space_id.get()


class TensorBoardRun(TensorBoardCallback):
    """Every round of self-distillation writes into a folder of its own, or their curves would lie on each other."""

    def __init__(self, trainer: Any):
        super().__init__()
        self.trainer = trainer
        self._top: Path | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if hasattr(args, "num_rounds"):
            self._top = self._top or Path(self.logging_dir or Path(args.output_dir) / default_logdir())
            self.logging_dir = str(self._top / f"round-{self.trainer.round}")
        super().on_train_begin(args, state, control, **kwargs)


OURS = {WandbCallback: WandbRun, TrackioCallback: TrackioRun, TensorBoardCallback: TensorBoardRun}


def replace_stock(trainer: Any) -> None:
    """Put the classes above in the places of transformers' own, with what these hold. Subclasses of yours stay.

    Raises ValueError for W&B without a key: now, and not after the teacher has been asked about everything.
    """
    callbacks = trainer.callback_handler.callbacks
    for i, stock in enumerate(callbacks):
        if type(stock) in OURS:
            callbacks[i] = OURS[type(stock)](trainer)
            vars(callbacks[i]).update(vars(stock))
            if type(stock) is WandbCallback:
                refuse_without_key(trainer.args)


def refuse_without_key(args: Any) -> None:
    """Raises ValueError where `args` report to W&B and it has no key, unless it is offline. Nothing is sent."""
    if "wandb" in args.report_to and not args.process_index:
        check_key()


def check_key() -> None:
    import wandb

    if wandb.run is not None or os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return
    try:
        wandb.login(verify=False)
    except wandb.errors.UsageError as error:
        raise ValueError(NO_KEY) from error
    except wandb.errors.AuthenticationError as error:
        raise ValueError(f"W&B's key is refused ({error}): run `wandb login --relogin`") from error


def published_files(folder: Path) -> Iterator[str]:
    """Of a saved student, or of each student of a group, what may be published."""
    from hfkd.publishable import allowed_files

    for part in (folder, *sorted(path for path in folder.iterdir() if path.is_dir())):
        yield from ((part / name).relative_to(folder).as_posix() for name in allowed_files(part))


# ---- tables and figures ----


def log_table(
    callbacks: Sequence[Any], name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int
) -> None:
    """To every tracker among the callbacks that takes one; TensorBoard shows it as text."""
    for tracker in _trackers(callbacks):
        table = tracker.Table(columns=list(columns), data=[list(row) for row in rows])
        tracker.log({name: table, "train/global_step": step})
    log_text(callbacks, name, markdown_table(columns, rows), step)


def log_figure(callbacks: Sequence[Any], name: str, path: str | Path, step: int) -> None:
    """A picture file, to every tracker among the callbacks."""
    for tracker in _trackers(callbacks):
        tracker.log({name: tracker.Image(str(path)), "train/global_step": step})
    for writer in _writers(callbacks):
        writer.add_image(name, pixels(path), step, dataformats="HWC")


def log_text(callbacks: Sequence[Any], name: str, markdown: str, step: int) -> None:
    """To TensorBoard, which renders it; the others have tables."""
    for writer in _writers(callbacks):
        writer.add_text(name, markdown, step)


def _trackers(callbacks: Sequence[Any]) -> Iterator[Any]:
    for callback in callbacks:
        module = getattr(callback, "_wandb", None) or getattr(callback, "_trackio", None)
        if module is not None and getattr(callback, "_initialized", False):
            yield module


def _writers(callbacks: Sequence[Any]) -> Iterator[Any]:
    found = (getattr(callback, "tb_writer", None) for callback in callbacks)
    return (writer for writer in found if writer is not None)


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [columns, ["---"] * len(columns), *([shown(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shown(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def pixels(path: str | Path) -> NDArray[np.uint8]:
    import PIL.Image

    with PIL.Image.open(path) as image:
        return np.asarray(image.convert("RGB"))
