"""From finished runs to their cards and, with --push_to_hub, to the Hub.

Every saved student gets a card with the study's table. With --push_to_hub the first student goes to the main branch of
--hub_model_id (default: the output folder's name), the others to branches named after them; --push_teacher uploads the
teacher to a repository of its own, and the cards link to each other.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from hfkd import hub
from hfkd.cards import CardFacts, write_card
from hfkd.data.images import IMAGE_TASKS
from hfkd.data.text import TEXT_TASKS
from hfkd.diagnostics.metrics import mean_and_std, paired_difference
from hfkd.manifest import read_manifest, write_manifest
from hfkd.records import read_json, write_json
from hfkd.teachers.labels import class_names
from hfkd.trainers.card import command
from program import one_sentence

FACTS_FILE = "card_facts.json"  # beside the weights, and not uploaded
TEMPLATES = {"member": "collaborative_student.md"}


@dataclass
class Publication:
    """What a study has to show. students: by shown name, the folders of their saved models, the headline first. scores: by
    shown name, one number a seed, of teacher and baselines too. baseline: whom the others are compared with, paired by seed.
    teacher: its shown name and its folder or Hub id; None where there is none, or several.
    """

    students: dict[str, Path]
    scores: dict[str, list[float]]  # the first is that of the saved model
    metric: str
    baseline: str | None = None
    teacher: tuple[str, str | Path] | None = None


def publish(runs: Any, *studies: Publication) -> None:
    """Write the cards, and upload what the arguments ask for; on the main process. Several studies share one teacher."""
    with one_sentence():  # of a push that failed; the study itself is done and saved
        _publish(runs, *studies)


def _publish(runs: Any, *studies: Publication) -> None:
    args, pushed = runs.args, [(study, *one) for study in studies for one in saved_students(study, runs.repository)]
    repositories = list(dict.fromkeys(repository for *_, repository, _ in pushed if repository))
    place = scored_rows(runs)
    say_what_has_no_facts(studies, runs.repository)
    teacher = named_teacher(args, studies[0], runs.repository, repositories, place)
    group = {folder.name: (repository, study.scores[name]) for study, name, folder, repository, _ in pushed}
    for study, name, folder, repository, branch in pushed:
        facts = with_results(read_facts(folder), study, name, repository)
        place_on_hub = branch or args.hub_revision or ""
        facts = dataclasses.replace(facts, branch=place_on_hub, group=[with_member(one, group) for one in facts.group])
        facts = with_teacher(facts, teacher, study) if facts.teacher else facts
        write_whole_card(folder, facts, own_score(study, name), place)
        if repository:
            uploaded(folder, repository, args, branch)


def say_what_has_no_facts(studies: tuple[Publication, ...], repository: str) -> None:
    """Runs of before there were cards are skipped, and not in silence."""
    folders = [folder for study in studies for folder in study.students.values()]
    old = [folder for folder in folders if folder.is_dir() and not is_saved(folder)]
    leading = [next(iter(study.students.values())) for study in studies]
    if repository and (lost := [folder for folder in old if folder in leading]):  # another would take the main branch
        raise ValueError(
            f"nothing is pushed: {lost[0]} has no {FACTS_FILE}, so it was saved by an earlier version and nobody knows what its "
            "card would say: delete this folder and go on with --resume_from_checkpoint True, which trains it again"
        )
    for folder in old:
        print(f"  no card                {folder} has no {FACTS_FILE}: it was saved by an earlier version")


def with_member(one: dict[str, Any], group: dict[str, tuple[str, list[float]]]) -> dict[str, Any]:
    """Of a group that was trained together: where each lies, and the score of what lies there."""
    repository, scores = group.get(one["name"], ("", []))
    return {**one, "repo": repository, "accuracy": scores[0] if scores else None}


def with_teacher(facts: CardFacts, teacher: dict[str, Any], study: Publication) -> CardFacts:
    """What is known of the teacher after the run, its size and speed too, where they were measured on as many rows."""
    folder = Path(study.teacher[1]) if study.teacher else None
    found = read_facts(folder).costs if folder is not None and is_saved(folder) else {}
    own, other = facts.costs.get("student"), found.get("student")
    alike = own and other and all(own[name] == other[name] for name in ("rows", "device"))
    costs = {"student": own, "teacher": other} if alike else facts.costs
    return dataclasses.replace(facts, costs=costs, **teacher)


def saved_students(study: Publication, repository: str) -> list[tuple[str, Path, str, str | None]]:
    """Shown name, folder, repository and branch (None: the main one); a member of a group has a repository of its own."""
    found = []
    for name, folder in study.students.items():
        if is_saved(folder):
            own = f"{repository}-{folder.name}" if repository and read_facts(folder).role == "member" else repository
            branch = re.sub(r"[^\w.-]+", "-", name).strip("-.") if found else None
            found.append((name, folder, own, branch))
    return found


def uploaded(folder: Path, repository: str, args: Any, branch: str | None = None) -> hub.Published:
    done = hub.publish(
        folder,
        repository,
        revision=branch or args.hub_revision,
        private=args.hub_private_repo,
        token=args.hub_token,
        name_private_teacher=args.name_private_teacher,
    )
    print(f"  pushed                 {done.url}")
    return done


def own_score(study: Publication, name: str) -> dict[str, float]:
    """Of the saved model, which is that of the first seed; the card has the mean over seeds."""
    return {study.metric: study.scores[name][0]} if study.scores.get(name) else {}


def scored_rows(runs: Any) -> dict[str, Any]:
    """Where the scores are from, so that `hfkd eval` finds the same rows."""
    held_out, recipe = next(iter(runs.data.held_out.values())), runs.recipe
    return {
        "split": recipe.evaluate_on,
        "rows": len(held_out),
        "max_length": getattr(recipe, "max_length", None),
    }


def named_teacher(
    args: Any, study: Publication, repository: str, students: list[str], place: dict[str, Any]
) -> dict[str, Any]:
    """What the students' cards say of a teacher that was saved in this run or given; uploaded where that is wanted."""
    if study.teacher is None:
        return {}
    name, source = study.teacher
    folder = Path(source)
    if not folder.is_dir():
        hidden = bool(repository) and not args.name_private_teacher and hub.is_private(str(source), args.hub_token)
        return {"teacher": str(source), "teacher_repo": str(source), "teacher_private": hidden}
    pushed = args.hub_teacher_id or f"{repository}-teacher" if repository and args.push_teacher else ""
    if is_saved(folder):
        facts = with_results(read_facts(folder), study, name, pushed)
        costs = {"teacher": facts.costs["student"]} if "student" in facts.costs else {}
        changes = {
            "role": "teacher",
            "students": students,
            "group": [],
            "costs": costs,
            "branch": args.hub_revision or "",
        }
        facts = dataclasses.replace(facts, **changes)
        write_whole_card(folder, facts, own_score(study, name), place)
    if pushed:
        commit = uploaded(folder, pushed, args).commit
        hidden = not args.name_private_teacher and bool(hub.is_private(pushed, args.hub_token))
        return {"teacher": pushed, "teacher_repo": pushed, "teacher_revision": commit, "teacher_private": hidden}
    kind = (read_json(folder / "config.json") or {}).get("architectures") or ["model"]
    return {"teacher": f"a {kind[0]} that was trained on the same data"}


def with_results(facts: CardFacts, study: Publication, name: str, repository: str) -> CardFacts:
    rows = []
    for shown, scores in study.scores.items():
        if scores:
            mean, std, seeds = mean_and_std(scores)
            row = {"stage": shown, "metric": study.metric, "mean": mean, "std": std, "seeds": seeds}
            rows.append({**row, "dataset": facts.datasets[0] if facts.datasets else None})
    return dataclasses.replace(
        facts,
        student=repository.rpartition("/")[2] or facts.student,
        repo_id=repository,
        stage=name,
        results=rows or facts.results,
        differences=differences(study),
    )


def differences(study: Publication) -> list[dict[str, Any]]:
    """Of every other student to the baseline, where the seeds pair up."""
    reference, found = study.scores.get(study.baseline or "", []), []
    for name in study.students:
        scores = study.scores.get(name, [])
        if name != study.baseline and len(scores) == len(reference) > 1:
            mean, low, high = paired_difference(scores, reference)
            shown = {"name": f"{name} - {study.baseline}", "metric": study.metric, "seeds": len(scores)}
            found.append({**shown, "mean": mean, "low": low, "high": high})
    return found


def push_rounds(trainer: Any, fine_tuned: Path | None) -> None:
    """Every round to a branch, the last one to the main branch; its classifier to a repository of its own."""
    with one_sentence():
        print(f"  pushed                 {trainer.push_to_hub().url}")
        if fine_tuned is not None:
            uploaded(fine_tuned, of_classifier(trainer), trainer.args)


def of_classifier(trainer: Any) -> str:
    """The repository of a round's classifier; "" where nothing is pushed."""
    return f"{trainer.hub_model_id}-fine-tuned" if trainer.hub_model_id else ""


def write_classifier_card(
    trainer: Any, folder: Path, pipeline_tag: str, place: dict[str, Any], results: list[dict[str, Any]], **facts: Any
) -> None:
    """Of a round's classifier: another model, of another class, in another repository.

    place: the rows it was scored on, as `hfkd eval` reads it, or {} where it cannot find the same ones. results: of the
    fine-tuning, the saved model's among them; the card has the mean over seeds, the manifest its own score.
    """
    config, repository = transformers.AutoConfig.from_pretrained(folder), of_classifier(trainer)
    trainer.write_card(
        folder,
        student=repository.rpartition("/")[2] or f"{Path(trainer.args.output_dir).name}, fine-tuned",
        repo_id=repository,
        imports=[],
        label_names=class_names(config) or [],
        problem_type=config.problem_type or "",
        pipeline_tag=pipeline_tag,
        **facts,
    )
    found = {name: value for name, value in (read_manifest(folder) or {}).items() if name not in ("format", "files")}
    own = next(
        row for row in results if (row["stage"], row["seed"]) == (trainer.card_facts.stage, 0) and not row["more"]
    )
    metrics = {own["metric"]: own["score"]} if place else {}
    write_manifest(folder, {**found, "metrics": metrics, "evaluated_on": place or None})


# ---- facts, kept beside the weights until the study is done ----


def known_facts(recipe: Any) -> CardFacts:
    """What a recipe knows before training."""
    task = getattr(recipe, "task", None) or ""
    columns = list(TEXT_TASKS[task].text_columns) if task in TEXT_TASKS else []
    return CardFacts(datasets=data_names(recipe), task=task, inputs=columns, command=command())


def data_names(recipe: Any) -> list[str]:
    """Hub ids, or the name of embedded data, a file or a folder."""
    row = {**TEXT_TASKS, **IMAGE_TASKS}.get(getattr(recipe, "task", None) or "")
    if row is not None:
        return [row.path or recipe.task]
    given = (getattr(recipe, name, None) for name in ("dataset_name", "train_file", "data_dir"))
    return [Path(str(name)).name if Path(str(name)).exists() else str(name) for name in given if name][:1]


def keep_facts(folder: Path, facts: CardFacts) -> None:
    write_json(folder / FACTS_FILE, json.loads(json.dumps(dataclasses.asdict(facts), default=str)))


def read_facts(folder: Path) -> CardFacts:
    return CardFacts(**read_json(folder / FACTS_FILE))


def is_saved(folder: Path) -> bool:
    return (folder / FACTS_FILE).is_file()


def write_whole_card(folder: Path, facts: CardFacts, metrics: dict[str, float], place: dict[str, Any]) -> None:
    """The card, and the manifest with the model's own scores."""
    write_card(facts, folder, TEMPLATES.get(facts.role, "student.md"))
    found = {name: value for name, value in (read_manifest(folder) or {}).items() if name not in ("format", "files")}
    teacher = found.get("teacher")
    if teacher is not None and facts.teacher_private:
        teacher = {**teacher, "id": None, "repo": None, "revision": None, "private": True}
    elif teacher is not None:
        known = {"id": facts.teacher, "repo": facts.teacher_repo, "revision": facts.teacher_revision}
        teacher = {**teacher, **{name: value for name, value in known.items() if value}}
    scores = {"metrics": metrics, "evaluated_on": place}
    write_manifest(folder, {**found, **scores, "role": facts.role, "task": facts.task or None, "teacher": teacher})


def refuse_unpublishable(args: Any, name: str, recipe: Any) -> str:
    """The repository, "" where nothing is pushed. Token, name and owner are checked before anything is trained."""
    if args.push_teacher and not args.push_to_hub:
        raise ValueError("--push_teacher goes with --push_to_hub: the two cards link to each other")
    given = getattr(recipe, "teacher", None)
    if args.push_teacher and given and Path(given).is_dir() and not is_saved(Path(given)):
        raise ValueError(
            f"--push_teacher: {given} has no {FACTS_FILE}, so no recipe saved it and nobody knows what its card would say: push "
            "it from its own training run, and give --teacher its Hub id"
        )
    return hub.check_access(args.hub_model_id or name, token=args.hub_token) if args.push_to_hub else ""


def refuse_push_teacher(args: Any, why: str) -> None:
    """A flag that does nothing is found out after the training."""
    if args.push_teacher:
        raise ValueError(f"leave --push_teacher out: {why}")


def scores_by(
    results: Iterable[dict[str, Any]], shown: dict[str, str], metric: str, key: str = "run"
) -> dict[str, list[float]]:
    """Of rows `{key: name, metric: value}` the values by shown name."""
    rows = [row for row in results if row.get(metric) is not None]
    return {label: [row[metric] for row in rows if row[key] == name] for name, label in shown.items()}
