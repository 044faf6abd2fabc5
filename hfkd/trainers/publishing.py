"""What a trainer writes beside every saved student, and what it uploads: a card, a manifest, and an allow-list of files."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from transformers.utils import logging

from hfkd import hub
from hfkd.cards import CardFacts, write_card
from hfkd.diagnostics.cost import cost_of
from hfkd.manifest import write_manifest
from hfkd.outputs import Batch
from hfkd.teachers.labels import class_names
from hfkd.trainers.card import (
    Taught,
    code_of,
    command,
    datasets_of,
    fidelity_of,
    installed_versions,
    last_metrics,
    manifest_facts,
    pipeline_tag_of,
    public_start,
    settings_of,
    shown_to_teacher,
    taught_by,
)
from hfkd.trainers.term_trainer import TermTrainer

logger = logging.get_logger(__name__)
# What `Trainer.push_to_hub` calls them
STOCK_NAMES = {"model_name": "student", "finetuned_from": "start", "dataset": "datasets", "dataset_tags": "datasets"}
TIMED_ROWS = 8
TEACHER_FOLDER = "teacher"


class PublishingTrainer(TermTrainer):
    """Every saved student gets a `README.md` and a `teacher_manifest.json`; `push_to_hub` uploads these, weights,
    configuration and tokenizer or image processor, and nothing else.

    `card_facts` holds what only the caller knows (data, command, results with seeds); what is set there wins over what the
    trainer reads off itself.
    """

    card_template = "student.md"
    hub_model_id: Any
    student_view: Any
    _eval_collator: Any
    teacher: Any
    train_dataset: Any
    model: Any

    def __init__(self, *args: Any, **kwargs: Any):
        self.card_facts = CardFacts()
        self._taught: Taught | None = None
        self._costs: dict[str, Any] = {}
        self._hidden_teacher = False
        self._pushed_teacher: hub.Published | None = None
        super().__init__(*args, **kwargs)

    # ---- beside the weights ----

    def facts(self, folder: Path) -> CardFacts:
        """What the card of the student in `folder` says."""
        found, default = self._facts_read_off(folder), CardFacts()
        given = {item.name: getattr(self.card_facts, item.name) for item in dataclasses.fields(CardFacts)}
        return dataclasses.replace(found, **{n: value for n, value in given.items() if value != getattr(default, n)})

    def _facts_read_off(self, folder: Path) -> CardFacts:
        objective, model = self._objective_in(folder), self._model_in(folder)
        name, tag = self._name_in(folder), pipeline_tag_of(model)
        metrics = self._metrics_in(folder)
        return CardFacts(
            student=name,
            repo_id=self.hub_model_id or "",
            start=public_start(model),
            datasets=datasets_of(self.train_dataset),
            objective=type(objective).__name__,
            equation=objective.equation,
            settings=settings_of(self, objective),
            results=[{"stage": name, "metric": key, "mean": value, "seeds": 1} for key, value in metrics.items()],
            stage=name,
            score_task=tag or "text-classification",
            pipeline_tag=tag,
            fidelity=fidelity_of(self),
            label_names=class_names(model.config) or [],
            problem_type=objective.problem_type,
            **code_of(model),
            command=command(),
            versions=installed_versions(),
            citations=[objective.paper] if objective.paper else [],
            costs=self._costs,
            **self._teacher_facts(folder),
        )

    # What differs where a trainer has several students

    def _name_in(self, folder: Path) -> str:
        return (self.hub_model_id or "").rpartition("/")[2] or folder.resolve().name

    def _model_in(self, folder: Path) -> Any:
        return self.accelerator.unwrap_model(self.model)

    def _objective_in(self, folder: Path) -> Any:
        return self._objective

    def _metrics_in(self, folder: Path) -> dict[str, float]:
        return last_metrics(self.state.log_history)

    def _taught_in(self, folder: Path) -> Taught | None:
        """Who answers; hashed once."""
        if self.teacher is None or "teacher" not in self._objective.needs:
            return None
        self._taught = self._taught or taught_by(self.teacher)
        return self._taught

    def _teacher_facts(self, folder: Path) -> dict[str, Any]:
        taught = self._taught_in(folder)
        if taught is None:
            return {}
        pushed = self._pushed_teacher
        return {
            "teacher": pushed.repo_id if pushed else taught.name,
            "teacher_repo": pushed.repo_id if pushed else taught.repo,
            "teacher_revision": pushed.commit if pushed else taught.revision,
            "teacher_hash": taught.weights,
            "teacher_private": self._hidden_teacher,
        }

    def write_card(self, folder: str | Path, **facts: Any) -> None:
        """Render `README.md` and `teacher_manifest.json` in `folder`; `facts` override those of `card_facts`."""
        folder = Path(folder)
        found = dataclasses.replace(self.facts(folder), **facts)
        write_card(found, folder, self.card_template)
        # Of several data sets nobody knows which one a score is of
        rows: Any = self.eval_dataset if hasattr(self.eval_dataset, "column_names") else []
        taught, objective = self._taught_in(folder), self._objective_in(folder)
        write_manifest(folder, manifest_facts(found, taught, objective, len(rows)))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers, with the same names; writes hfkd's card instead."""
        if self.is_world_process_zero():
            self.write_card(self.args.output_dir, **card_names(kwargs))

    # ---- the Hub ----

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Say now, and not after training, that the token, the name or the repository's owner is wrong."""
        strategy = self.args.hub_strategy.value
        if strategy in ("checkpoint", "all_checkpoints"):
            raise ValueError(
                f"hub_strategy={strategy!r} uploads optimizer states and pickles: choose 'end' or 'every_save' (weights, card "
                "and manifest), and resume from the local output_dir"
            )
        if self.is_world_process_zero():
            name = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
            self.hub_model_id = hub.check_access(name, token=token or self.args.hub_token)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **facts: Any,
    ) -> Any:
        """Save, write the card, and upload the allow-list; the last `hfkd.hub.Published`, None on other processes.

        As in transformers; `facts` are its card names (language, license, tags, dataset, ...) or fields of `CardFacts`. With
        `args.push_teacher` the teacher goes first, into a repository of its own, and both cards link to each other. Returns
        when the upload is done, whatever `blocking` says. Raises what `hfkd.hub.publish` raises; the local files are whole
        whatever happens, and a repeated call goes on where the upload was cut.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token, private = token or self.args.hub_token, self.args.hub_private_repo if private is None else private
        if self.hub_model_id is None:
            self.init_hf_repo(token, private)
        students = self._saved_students()
        if not self.is_world_process_zero():
            return None
        self.measure_costs()
        self._hide_private_teacher(token)
        upload: dict[str, Any] = {"private": private, "token": token, "message": commit_message}
        if getattr(self.args, "push_teacher", False):
            self._pushed_teacher = self._push_teacher(students, upload, card_names(facts))
            self._hide_private_teacher(token)  # what went up may be private too
        named, published = getattr(self.args, "name_private_teacher", False), None
        for folder, repository, branch in students:
            where = revision or branch or self.args.hub_revision
            self._write_published_card(folder, {"repo_id": repository, "branch": where or "", **card_names(facts)})
            published = hub.publish(folder, repository, revision=where, name_private_teacher=named, **upload)
        return published

    def _saved_students(self) -> list[tuple[Path, str, str | None]]:
        """Folder, repository and branch (None: the main one) of every student; on all processes."""
        self.save_model(_internal_call=True)
        return [(Path(self.args.output_dir), self.hub_model_id or "", None)]

    def _write_published_card(self, folder: Path, facts: dict[str, Any]) -> None:
        self.write_card(folder, **facts)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """With hub_strategy "every_save": the student of the checkpoint. A failed upload does not end the training."""
        if not self.is_world_process_zero() or self.args.hub_strategy.value == "end":
            return
        try:
            hub.publish(
                checkpoint_folder,
                self.hub_model_id or "",
                revision=self.args.hub_revision,
                private=self.args.hub_private_repo,
                token=self.args.hub_token,
                message=f"Training in progress, step {self.state.global_step}",
                name_private_teacher=getattr(self.args, "name_private_teacher", False),
                in_progress=True,
            )
        except (OSError, ValueError) as error:
            logger.warning(f"step {self.state.global_step} was not pushed, training goes on: {error}")

    # ---- the teacher ----

    def _hide_private_teacher(self, token: str | None) -> None:
        taught = self._taught_in(Path(self.args.output_dir))
        repository = self._pushed_teacher.repo_id if self._pushed_teacher else taught.repo if taught else ""
        private = bool(repository) and hub.is_private(repository, token)
        self._hidden_teacher = bool(private) and not getattr(self.args, "name_private_teacher", False)

    def refuse_teacher_without_model(self) -> None:
        if not hasattr(getattr(self.teacher, "model", None), "save_pretrained"):
            kind = "no teacher" if self.teacher is None else type(self.teacher).__name__
            raise ValueError(
                f"push_teacher: {kind} has no model in memory to upload; give the trainer the model itself, or push the "
                "teacher from its own training run"
            )

    def _push_teacher(
        self, students: list[tuple[Path, str, str | None]], upload: dict[str, Any], facts: dict[str, Any]
    ) -> hub.Published | None:
        """Into a repository of its own; None where it is on the Hub already."""
        self.refuse_teacher_without_model()
        model, taught = self.teacher.model, self._taught_in(Path(self.args.output_dir))
        if taught is None:
            raise ValueError(
                f"push_teacher: {type(self._objective).__name__} asks no teacher, so none taught the student"
            )
        if taught.repo:
            logger.info(f"the teacher is on the Hub already, as {taught.repo}: only linked")
            return None
        folder = Path(self.args.output_dir) / TEACHER_FOLDER
        model.save_pretrained(folder)
        if (processing := self.teacher.processing_class or self.processing_class) is not None:
            processing.save_pretrained(folder)
        repository = self.args.hub_teacher_id or f"{self.hub_model_id}-teacher"
        ours = {name: facts[name] for name in ("datasets", "language", "license") if name in facts}
        about = dataclasses.replace(self._facts_of_teacher(taught, repository, students), **ours)
        write_card(about, folder, "student.md")
        write_manifest(folder, manifest_facts(about, None, None))
        return hub.publish(folder, repository, **upload)

    def _facts_of_teacher(
        self, taught: Taught, repository: str, students: list[tuple[Path, str, str | None]]
    ) -> CardFacts:
        """What this run knows of a model that it did not train."""
        ours, scores = self.facts(students[0][0]), getattr(self, "teacher_scores", None) or {}
        metric = {"metric": "accuracy on a slice of the training rows", "mean": scores.get("teacher"), "seeds": 1}
        tag = pipeline_tag_of(self.teacher.model)
        return CardFacts(
            role="teacher",
            student=repository.rpartition("/")[2],
            repo_id=repository,
            students=list(dict.fromkeys(name for _, name, _ in students)),
            start=public_start(self.teacher.model),
            datasets=ours.datasets,
            results=[{"stage": "teacher", **metric}] if scores else [],
            stage="teacher",
            score_task=tag or "text-classification",
            pipeline_tag=tag,
            label_names=taught.labels,
            teacher_hash=taught.weights,
            command=ours.command,
            versions=ours.versions,
            citations=[],
            costs={"teacher": ours.costs["teacher"]} if "teacher" in ours.costs else {},
            license=ours.license,
            language=ours.language,
        )

    def measure_costs(self) -> None:
        """Size and speed, for the cards from now on; once."""
        self._costs = self._costs or self._measured_costs()

    def _measured_costs(self) -> dict[str, Any]:
        """Parameters and median time of a forward pass, of both sides on the same rows."""
        batch = self._timed_batch()
        if batch is None:
            return {}
        return {
            "student": cost_of(self._model_in(Path(self.args.output_dir)), self.student_view(batch, training=False)),
            **self._teacher_cost(batch),
        }

    def _teacher_cost(self, batch: Batch) -> dict[str, Any]:
        asked = shown_to_teacher(self.teacher, batch)
        return {} if asked is None else {"teacher": cost_of(*asked)}

    def _timed_batch(self) -> Batch | None:
        """A few rows; None where there are none at hand, or where a forward pass would wait for other processes."""
        rows = self.eval_dataset if hasattr(self.eval_dataset, "column_names") else self.train_dataset
        if self.accelerator.num_processes > 1 or not all(hasattr(rows, name) for name in ("column_names", "__len__")):
            return None
        shown = self._remove_unused_columns(rows)
        return self._prepare_inputs(self._eval_collator([shown[i] for i in range(min(TIMED_ROWS, len(shown)))]))


def card_names(given: dict[str, Any]) -> dict[str, Any]:
    """Stock names of card facts as ours. Raises TypeError for one that neither has."""
    found = {STOCK_NAMES.get(name, name): value for name, value in given.items() if value is not None}
    known = {item.name for item in dataclasses.fields(CardFacts)}
    if odd := sorted(found.keys() - known):
        raise TypeError(f"a card has no {', '.join(odd)}; it has {', '.join(sorted(known))}")
    for name in ("datasets", "tags"):
        if isinstance(found.get(name), str):
            found[name] = [found[name]]
    return found
