"""`hfkd pull | eval | report | doctor`: a published student, on a command line.

    hfkd doctor STUDENT TEACHER --task movie_sentences          before the run: what would waste it
    hfkd report STUDENT TEACHER --task movie_sentences --require "agreement>=0.8"
    hfkd pull USER/STUDENT                                      who taught it, what it scores, does it load
    hfkd eval USER/STUDENT --task movie_sentences               does it still score what its manifest says

Models are folders or Hub ids. Exit code 0: fine; 1: a condition is not met, a score differs, the doctor found an error; 2: the
inputs are wrong, in one sentence. `--json` prints one JSON object for scripts. Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from hfkd import __version__

FINE, FAILED, WRONG_INPUT = 0, 1, 2  # argparse's code for wrong input is 2 as well
SAME = 1e-4  # a score on ten thousand rows may differ by one of them: another machine rounds differently
TOKENS = 128
DATA = (
    *("data_dir", "dataset_name", "dataset_config", "train_file", "validation_file", "test_file"),
    *("text_column", "text_pair_column", "image_column", "label_column"),
)


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; {self.prog} --help shows what there is")


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    program = " ".join(["hfkd", *(word for word in given[:1] if word in COMMANDS)])
    try:
        chosen = parser(given[0] if given else None).parse_args(given)
        return COMMANDS[chosen.command][2](chosen)
    except (ValueError, OSError) as error:
        print(f"{program}: {' '.join(str(error).split())}", file=sys.stderr)
    except Exception:  # damaged weights, too little memory: Python's own exit code would be that of a failed condition
        traceback.print_exc()
    return WRONG_INPUT


def parser(command: str | None) -> Parser:
    """Only the command that is asked for gets its flags: their help names tasks, and to know those costs an import."""
    whole = Parser(prog="hfkd", description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    whole.add_argument("--version", action="version", version=f"hfkd {__version__}")
    commands = whole.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (line, flags, _) in COMMANDS.items():
        one = commands.add_parser(name, help=line, description=line, allow_abbrev=False)
        one.add_argument("--json", action="store_true", help="Print one JSON object, for scripts.")
        if name == command:
            flags(one)
    return whole


def _data_flags(one: Parser) -> None:
    from hfkd.data.images import IMAGE_TASKS
    from hfkd.data.text import TEXT_TASKS

    one.add_argument("--task", help=f"One of {', '.join([*TEXT_TASKS, *IMAGE_TASKS])} (texts, then images).")
    one.add_argument("--dataset_name", help="Instead of a task: a data set's Hub id or local folder.")
    one.add_argument("--dataset_config", help="The data set's configuration.")
    for split in ("train", "validation", "test"):
        one.add_argument(f"--{split}_file", help="Texts: csv, tsv, json, jsonl or parquet.")
    one.add_argument("--data_dir", help="Images: a folder with train/CLASS/*.png and so on.")
    one.add_argument("--text_column", help="The column with the text; default: guessed.")
    one.add_argument("--text_pair_column", help="The column with a second text.")
    one.add_argument("--image_column", help="Of a --dataset_name: the column with the pictures.")
    one.add_argument("--label_column", help="The column with the label; default: guessed.")
    one.add_argument(
        "--max_length",
        type=int,
        help=f"Tokens a text is cut at, as in training; default: what is published, else {TOKENS}.",
    )


def _data_of(chosen: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(chosen, name) for name in DATA}


def _quiet() -> None:
    import datasets
    from transformers.utils import logging

    logging.disable_progress_bar()
    datasets.disable_progress_bars()


def _at_hand(source: str, revision: str | None = None) -> Path:
    """A folder as it is; a Hub id downloaded and its hashes compared, once. Where the Hub cannot be reached and the cache
    has nothing that is said at once: transformers would try again for half a minute, for each of its files."""
    from hfkd import hub

    if Path(source).is_dir():
        return Path(source)
    if source.count("/") > 1 or source.startswith((".", "/", "~")):
        raise FileNotFoundError(f"there is no folder {source}, and a Hub id has one slash at most")
    return hub.pull(source, revision=revision)


def _printed(as_json: bool, found: dict[str, Any], text: str) -> None:
    print(json.dumps(found, indent=2) if as_json else text)


# ---- pull ----


def _pull_flags(one: Parser) -> None:
    one.add_argument("repo", help="A Hub id.")
    one.add_argument("--revision", help="A branch, tag or commit.")
    one.add_argument("--to", help="A folder to put it into; default: the Hugging Face cache.")


def pull(chosen: argparse.Namespace) -> int:
    from hfkd import hub
    from hfkd.manifest import read_manifest

    folder = hub.pull(chosen.repo, revision=chosen.revision, folder=chosen.to)
    _quiet()
    from hfkd.teachers.labels import class_names
    from hfkd.teachers.model import load_named_architecture

    model: Any = load_named_architecture(str(folder))
    manifest = read_manifest(folder) or {}
    links = _lineage(chosen.repo, folder)
    found = {
        "repo": chosen.repo,
        "folder": str(folder),
        "model": type(model).__name__,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "labels": class_names(model.config),
        "lineage": links,
        "metrics": manifest.get("metrics") or {},
        "evaluated_on": manifest.get("evaluated_on"),
    }
    _printed(chosen.json, found, _about(found))
    return FINE


def _lineage(repo: str, folder: Path) -> list[dict[str, Any]]:
    """From what was pulled, which may be a branch; the first link is then called by its name again."""
    import dataclasses

    from hfkd import hub

    links = [dataclasses.asdict(link) for link in hub.lineage(folder)]
    return [{**link, "repo_id": repo if link["repo_id"] == str(folder) else link["repo_id"]} for link in links]


def _about(found: dict[str, Any]) -> str:
    lines = [
        f"{found['repo']}: {found['model']}, {found['parameters']:,} parameters in {found['dtype']}, it loads",
        f"  folder   {found['folder']}",
        f"  labels   {', '.join(found['labels']) if found['labels'] else 'without names'}",
    ]
    for place, link in enumerate(found["lineage"]):
        lines.append(f"  {'lineage' if not place else '':<8} {'  ' * place}{'<- ' if place else ''}{_link(link)}")
    scores = [f"{name} {value:.4g}" for name, value in found["metrics"].items()]
    lines.append(f"  metrics  {', '.join(scores) or 'none published'}{_on(found['evaluated_on'])}")
    return "\n".join(lines)


def _link(link: dict[str, Any]) -> str:
    said = [link["role"], link["objective"] and f"trained with {link['objective']}"]
    said += [
        link["revision"] and f"revision {link['revision'][:12]}",
        "" if link["found"] else "not on the Hub, or hidden",
    ]
    return f"{link['repo_id'] or 'a private teacher'} ({', '.join(part for part in said if part)})"


def _on(evaluated_on: dict[str, Any] | None) -> str:
    known = {name: value for name, value in (evaluated_on or {}).items() if value is not None}
    parts = [f"{known['rows']:,} rows" if "rows" in known else "", known.get("split", "")]
    return f" (on {' of '.join(part for part in parts if part)})" if any(parts) else ""


# ---- eval ----


def _eval_flags(one: Parser) -> None:
    one.add_argument("source", metavar="REPO", help="A folder or a Hub id.")
    one.add_argument("--revision", help="A branch, tag or commit.")
    _data_flags(one)
    one.add_argument("--split", help="Default: test where it is labelled, else validation.")
    one.add_argument("--rows", type=int, help="Score on so many rows, drawn once.")
    one.add_argument("--batch_size", type=int, default=64, help="Rows the model reads at a time.")


def evaluate(chosen: argparse.Namespace) -> int:
    from hfkd.manifest import read_manifest

    folder = _at_hand(chosen.source, chosen.revision)
    _quiet()
    from hfkd import evaluation

    manifest = read_manifest(folder) or {}
    place = manifest.get("evaluated_on") or {}
    data: dict[str, Any] = {**_data_of(chosen), "rows": chosen.rows or place.get("rows")}  # the same ones, if drawn
    data["max_length"] = chosen.max_length or place.get("max_length") or TOKENS
    task = chosen.task or (None if any(_data_of(chosen).values()) else manifest.get("task"))
    split = chosen.split or place.get("split")  # as published
    scores = evaluation.evaluate(folder, task, split, chosen.batch_size, **data)
    published = manifest.get("metrics") or {}
    said = {name: compared(value, published.get(name)) for name, value in scores.items()}
    other_rows = chosen.rows is not None or (chosen.split and place.get("split") not in (None, chosen.split))
    found = {"source": chosen.source, "metrics": scores, "published": published, "evaluated_on": place or None,
             "same": None if other_rows else _same(said)}  # fmt: skip
    rows = [f"  {name:<24} {value:.4f}   {said[name]}" for name, value in scores.items()]
    note = "not compared: the published scores are of other rows" if other_rows else _WORDS[found["same"]]
    _printed(chosen.json, found, "\n".join([f"{chosen.source}, published scores{_on(place)}", *rows, f"  {note}"]))
    return FAILED if found["same"] is False else FINE


_WORDS = {
    True: "the same as published",
    False: "differs from what is published: other rows, another max_length, or other weights",
    None: "nothing is published to compare with",
}


def compared(value: float, published: float | None) -> str:
    if published is None:
        return "not published"
    return f"published {published:.4f}: " + (
        "same" if abs(value - published) <= SAME else f"differs by {value - published:+.4f}"
    )


def _same(said: dict[str, str]) -> bool | None:
    known = [words for words in said.values() if words != "not published"]
    return all(words.endswith("same") for words in known) if known else None


# ---- report ----


def _report_flags(one: Parser) -> None:
    from hfkd.diagnostics.fidelity import NUMBERS

    one.add_argument("student", help="A folder or a Hub id.")
    one.add_argument("teacher", help="A folder or a Hub id.")
    _data_flags(one)
    one.add_argument("--unlabelled", action="store_true", help="The texts have no labels: compare what needs none.")
    one.add_argument("--split", help="The split to compare on; default: test where there is one, else validation.")
    one.add_argument("--rows", type=int, help="At most this many of its rows, drawn once.")
    one.add_argument(
        "--train_rows",
        type=int,
        default=1000,
        help="Training rows, drawn once, for the teacher's accuracy there; 0: none.",
    )
    one.add_argument("--group_column", help="A column that names the subgroup of each row.")
    one.add_argument("--require", nargs="+", default=[], help=f'Conditions, "NAME>=NUMBER", of {", ".join(NUMBERS)}.')
    one.add_argument(
        "--student_temperature", type=float, default=1.0, help="Of the logit-logit line; all else is at 1."
    )
    one.add_argument("--teacher_temperature", type=float, default=1.0, help="Likewise.")
    one.add_argument("--batch_size", type=int, default=64, help="Rows a model reads at a time.")
    one.add_argument("--output_dir", default="runs/fidelity_report", help="For tables, figures and report.json.")


def report(chosen: argparse.Namespace) -> int:
    from hfkd.diagnostics.fidelity import NUMBERS
    from hfkd.diagnostics.gates import parse_gates

    gates = parse_gates(chosen.require, NUMBERS)  # a misspelt one is said before the models are asked
    for source in (chosen.student, chosen.teacher):
        _at_hand(source)
    _quiet()
    found = _report(chosen)
    files = [str(path) for path in found.save(Path(chosen.output_dir))]
    failed = found.failures(*gates)
    text = "\n".join(["", found.markdown(), *(f"  {path}" for path in files)])
    _printed(chosen.json, {"report": found.to_dict(), "failed": failed, "files": files}, text)
    if failed:
        print(f"{len(failed)} of {len(gates)} conditions are not met: {'; '.join(failed)}", file=sys.stderr)
    elif gates and not chosen.json:
        print(f"All conditions are met: {'; '.join(map(str, gates))}")
    return FAILED if failed else FINE


def _report(chosen: argparse.Namespace) -> Any:
    from hfkd import evaluation
    from hfkd.diagnostics import fidelity

    splits = evaluation.load_splits(chosen.task, **_data_of(chosen), require_labels=not chosen.unlabelled)
    wanted = evaluation.split_named(splits, chosen.split)
    rows = evaluation.drawn(splits[wanted], chosen.rows)
    train = evaluation.drawn(splits["train"], chosen.train_rows) if chosen.train_rows else None
    beside = "" if train is None else f" and {len(train):,} training rows"
    print(f"== {len(rows):,} {wanted} rows{beside}", file=sys.stderr, flush=True)
    return fidelity.report(
        chosen.student,
        chosen.teacher,
        rows,
        train_dataset=train,
        group_column=chosen.group_column,
        max_length=(chosen.max_length or TOKENS) if "text" in rows.column_names else None,
        batch_size=chosen.batch_size,
        student_temperature=chosen.student_temperature,
        teacher_temperature=chosen.teacher_temperature,
    )


# ---- doctor ----


def _doctor_flags(one: Parser) -> None:
    one.add_argument("student", help="A folder or a Hub id.")
    one.add_argument("teacher", help="A folder or a Hub id.")
    _data_flags(one)
    one.add_argument("--cache", help="A folder of cached teacher answers to the training rows.")
    one.add_argument("--batch_size", type=int, default=8, help="Rows of a micro-batch, for the memory of a step.")
    one.add_argument("--rows", type=int, default=256, help="Held-out rows that are looked at.")


def doctor(chosen: argparse.Namespace) -> int:
    import dataclasses
    import os

    for source in (chosen.student, chosen.teacher):
        _at_hand(source)
    _quiet()
    from hfkd.doctor import ERROR, WARNING, examine

    settings = {name: getattr(chosen, name) for name in ("cache", "batch_size", "rows")}
    settings["max_length"] = chosen.max_length or TOKENS
    findings = examine(chosen.student, chosen.teacher, chosen.task, **settings, **_data_of(chosen))
    levels = [finding.level for finding in findings]
    counts = {"errors": levels.count(ERROR), "warnings": levels.count(WARNING)}
    lines = []
    for finding in findings:
        lines.append(f"{finding.level:<8} {finding.check:<18} {finding.what}")
        lines += [f"{'':<27} -> {finding.remedy}"] if finding.remedy else []
    lines.append(f"{counts['errors']} errors, {counts['warnings']} warnings, {levels.count('ok')} ok")
    if int(os.environ.get("RANK", 0)) == 0:
        _printed(chosen.json, {"findings": [dataclasses.asdict(one) for one in findings], **counts}, "\n".join(lines))
    return FAILED if counts["errors"] else FINE


Command = tuple[str, Callable[[Parser], None], Callable[[argparse.Namespace], int]]
COMMANDS: dict[str, Command] = {
    "pull": ("Download a published student, load it, show who taught it.", _pull_flags, pull),
    "eval": ("Score a saved model on a task, beside what its manifest says.", _eval_flags, evaluate),
    "report": ("The fidelity report of a student and its teacher, with gates for CI.", _report_flags, report),
    "doctor": ("Look for what would waste a run: labels, inputs, weights, memory, processes.", _doctor_flags, doctor),
}


if __name__ == "__main__":
    sys.exit(main())
