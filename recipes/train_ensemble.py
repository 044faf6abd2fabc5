"""Train many teachers on labels alone, wrong ones if you like: members of an `EnsembleTeacher`, and a report on them.

    python recipes/train_ensemble.py                               # 3 that fit 20 % wrong labels of digits: 3 minutes or less
    python recipes/train_ensemble.py --members 10 --processes 2    # whole members in each process
    accelerate launch recipes/train_ensemble.py --task cifar10 --network resnet18 --members 10 --noise_rate 0.2
    python recipes/train_ensemble.py --task health_tweets --network student_2x128.yaml --rows disjoint --noise_rate 0.2
    python recipes/train_ensemble.py --members 10 --stack 10       # small ones side by side (torch.func)

Members differ by their seed only (--rows same), or also by their rows: --rows overlapping draws a --share of them for each,
--rows disjoint gives no row to two. --noise_rate makes exactly that share of every class's training labels wrong, the same
ones for all members; what is scored stays clean. Under `accelerate launch` with several processes, all of them train one
member after the other together; --processes N starts N processes that train whole members.

Every member is saved when it is done; `--resume_from_checkpoint True` trains those that are missing, also when --members has
grown. For a member alone, `--teacher OUTPUT_DIR/runs/member/seed-0/model` in other recipes; for all, in Python,
`EnsembleTeacher(sorted(glob("OUTPUT_DIR/runs/member/seed-*/model")), combine="vote")`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from ensemble_study import MEMBER, OWN_ROWS, Ensemble, ImageEnsembleArguments, TextEnsembleArguments
from hfkd import DistillationArguments
from hfkd.data.splits import save_indices
from hfkd.data.text import TEXT_TASKS
from hfkd.diagnostics import plots
from hfkd.diagnostics.metrics import accuracy
from hfkd.diagnostics.sampler import SamplerReport, sampler_report
from hfkd.records import write_json
from hfkd.teachers.ensemble import combine_answers
from hfkd.trainers.arguments import parse_arguments
from program import HERE, one_sentence, one_source, quiet, say
from publication import Publication, publish, refuse_push_teacher
from run_report import per_seed_csv, percent, write_whole

OWN_DATA = ("--task", "--dataset_name", "--data_dir", "--train_file", "--config")
RULES = {"mean": "mean of probabilities", "logits": "mean of logits", "vote": "vote"}


def main(arguments: list[str]) -> None:
    run(prepare(arguments), arguments)


def prepare(arguments: list[str]) -> Ensemble:
    """Whatever is wrong with the inputs is said here."""
    quiet()
    own_data = any(word.split("=")[0] in OWN_DATA for word in arguments)
    defaults = HERE / "configs" / f"train_ensemble_{'task' if own_data else 'demo'}.yaml"
    kind = TextEnsembleArguments if about_texts(arguments) else ImageEnsembleArguments
    recipe, args = parse_arguments(kind, DistillationArguments, arguments=arguments, defaults=defaults)
    one_source(recipe, arguments)
    for name, other in (("network", "model_name_or_path"), ("model_name_or_path", "network")):
        if f"--{name}" in arguments and f"--{other}" not in arguments:
            setattr(recipe, other, None)  # a flag takes the place of what stands in a file
    refuse_push_teacher(args, "the members are the teachers, and --push_to_hub uploads each to a branch")
    return Ensemble(recipe, args)


def about_texts(arguments: list[str]) -> bool:
    """By the source of the data, or by a flag that only texts have; both may stand in a file, and flags win."""
    sources = ("task", "dataset_name", "train_file", "data_dir")
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("config", "text_column", *sources):
        parser.add_argument(f"--{name}")
    flags = {name: value for name, value in vars(parser.parse_known_args(arguments)[0]).items() if value is not None}
    path = Path(flags.get("config", ""))
    found = (yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None) or {}
    if set(flags) & set(sources):
        found = {name: value for name, value in found.items() if name not in sources}
    found |= flags
    return found.get("task") in TEXT_TASKS or "train_file" in found or "text_column" in found


def run(ensemble: Ensemble, arguments: list[str]) -> None:
    started = time.monotonic()
    ensemble.runs.start()
    ensemble.refuse_other_settings()
    main_process = ensemble.args.process_index == 0
    if main_process and not ensemble.recipe.only:
        used = ensemble.data.indices() if hasattr(ensemble.data, "indices") else {}
        members = {f"{MEMBER}_{k}": rows for k, rows in enumerate(original_rows(ensemble))}
        save_indices(ensemble.runs.output / "splits.json", **used, **members)
    if ensemble.recipe.processes > 1:
        spread(ensemble, arguments)
    results = ensemble.train()
    if main_process and not ensemble.recipe.only:
        report(ensemble, results, (time.monotonic() - started) / 60)


def original_rows(ensemble: Ensemble) -> list[list[int]]:
    """Row numbers in the source's split where the rows have them, else in the rows that are used."""
    train = ensemble.data.train
    numbers = np.asarray(train["example_id"][:] if "example_id" in train.column_names else range(len(train)))
    return [numbers[rows].tolist() for rows in ensemble.rows]


# ---- processes ----


def spread(ensemble: Ensemble, arguments: list[str]) -> None:
    """Whole members in processes of their own; whoever fails, the others' members are kept."""
    missing = [kind.seed for kind in ensemble.kinds if not ensemble.is_done(kind)]
    shares = [share for k in range(ensemble.recipe.processes) if (share := missing[k :: ensemble.recipe.processes])]
    say(f"Members {', '.join(map(str, missing)) or 'none'}: training in {len(shares)} processes")
    for_each = [
        "--processes",
        "1",
        "--overwrite",
        "False",
        "--resume_from_checkpoint",
        "True",
        "--disable_tqdm",
        "True",
    ]
    started = []
    try:
        for number, share in enumerate(shares):
            words = [*arguments, *for_each, "--only", *map(str, share)]
            command = [sys.executable, str(Path(__file__).resolve()), *words]
            started.append(subprocess.Popen(command, env=environment_of(number, len(shares))))
        codes = [process.wait() for process in started]
    finally:
        for process in started:
            process.kill()  # those that still run, where this one was stopped
    if failed := [share for share, code in zip(shares, codes, strict=True) if code]:
        raise SystemExit(
            f"train_ensemble.py: the processes of members {failed} stopped, their last lines say why; what is done is kept: "
            "--resume_from_checkpoint True trains the rest"
        )


def environment_of(number: int, processes: int) -> dict[str, str]:
    """Its share of the cores, and one of the GPUs where there are several (not tried: no machine with two was at hand)."""
    threads = max(1, (os.cpu_count() or 1) // processes)
    found = {"OMP_NUM_THREADS": str(threads), **os.environ}
    if torch.cuda.device_count() > 1:
        shown = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        found["CUDA_VISIBLE_DEVICES"] = shown.split(",")[number % torch.cuda.device_count()]
    return found


# ---- report ----


def report(ensemble: Ensemble, results: list[dict[str, Any]], minutes: float) -> None:
    output, prefix = ensemble.runs.output, next(iter(ensemble.data.held_out))
    labels = np.asarray(ensemble.data.held_out[prefix]["label"][:])
    logits = np.stack([ensemble.runs.answers(MEMBER, result["seed"])[prefix] for result in results])
    predictions = {
        f"member {result['seed']}": answer.argmax(-1) for result, answer in zip(results, logits, strict=True)
    }
    predictions |= {f"ensemble, {shown}": combined(logits, rule) for rule, shown in RULES.items()}
    fitted = {f"member {result['seed']}": result[f"{OWN_ROWS}accuracy"] for result in results}
    samplers = reports(predictions, labels, ensemble.transition, fitted)
    text = table(predictions, labels, fitted, samplers)
    write_whole(output / "results.md", text + "\n")
    write_whole(output / "results.csv", per_seed_csv(results))
    write_json(output / "sampler.json", {name: found.to_dict() for name, found in samplers.items()})
    rows = len(ensemble.kinds[0].view.train)
    print(f"\n{text}\n\n{len(results)} members of {ensemble.parameters:,} parameters, each trained on {rows:,} rows")
    print(f"({ensemble.recipe.rows}), scored on {len(labels):,} with clean labels. Took {minutes:.1f} minutes.")
    print(f"  members                {output / 'runs' / MEMBER / 'seed-*' / 'model'}")
    print(f"  tables                 {output / 'results.md'}, {output / 'results.csv'}, {output / 'sampler.json'}")
    draw(samplers, output / "confusions.png", ensemble.data.labels)
    publish(ensemble.runs, publication(ensemble, results, f"{prefix}{ensemble.data.metric}"))


def publication(ensemble: Ensemble, results: list[dict[str, Any]], metric: str) -> Publication:
    """Every member is a branch; the first one is the main branch too."""
    names = {result["seed"]: f"member {result['seed']}" for result in results}
    folders = {name: ensemble.runs.folder(MEMBER, number) / "model" for number, name in names.items()}
    return Publication(folders, {names[result["seed"]]: [result[metric]] for result in results}, metric)


def combined(logits: Any, rule: str) -> Any:
    """(members, rows, labels) -> (rows,): what an `EnsembleTeacher` with combine=rule predicts."""
    answer = combine_answers(torch.as_tensor(logits), rule)
    return (answer.labels if answer.logits is None else answer.logits.argmax(-1)).numpy()


def reports(
    predictions: dict[str, Any], labels: Any, transition: Any, fitted: dict[str, float]
) -> dict[str, SamplerReport]:
    """None without noise, and none where a class is never predicted, which is said: a short run has learned too little."""
    found = {}
    for name, ids in predictions.items() if transition is not None else ():
        try:
            found[name] = sampler_report(ids, labels, transition, fitted.get(name))
        except ValueError as error:
            print(f"\n{name}: no sampler report. {error}")
    return found


def table(
    predictions: dict[str, Any], labels: Any, fitted: dict[str, float], samplers: dict[str, SamplerReport]
) -> str:
    """Markdown: a line for each member and rule, then the members' mean and each one's verdict."""
    lines = [
        "| | accuracy (%) | on its own training labels (%) | TV to the noise | of ideal samplers, below | noise partner (%) |",
        "|---|---|---|---|---|---|",
    ]
    for name, ids in predictions.items():
        own = f"{100 * fitted[name]:.2f}" if name in fitted else "–"
        lines.append(f"| {name} | {100 * accuracy(ids, labels):.2f} | {own} | {sampler_cells(samplers.get(name))} |")
    members = [accuracy(predictions[name], labels) for name in fitted]
    lines += [
        "",
        f"mean of the members: {percent(members)}; on their own training labels: {percent(list(fitted.values()))}",
    ]
    return "\n".join(
        [*lines, *(["", *(f"* {name}: {found.verdict}" for name, found in samplers.items())] if samplers else [])]
    )


def sampler_cells(found: SamplerReport | None) -> str:
    if found is None:
        return "– | – | –"
    return f"{found.total_variation:.3f} | {found.floor:.3f} | {100 * found.partner_mass:.1f}"


def draw(samplers: dict[str, SamplerReport], path: Path, names: list[str]) -> None:
    """The first member, the vote of all, and what an ideal sampler does."""
    shown = {name: samplers[name].confusion for name in ("member 0", f"ensemble, {RULES['vote']}") if name in samplers}
    if not shown:
        path.unlink(missing_ok=True)  # of an earlier run with noise
        return
    try:
        plots.confusions({**shown, "an ideal sampler": next(iter(samplers.values())).expected}, path, names)
        print(f"  figure                 {path}")
    except ImportError as error:  # matplotlib is an extra
        print(f"  no figure: {error}")


if __name__ == "__main__":
    with one_sentence():
        prepared = prepare(sys.argv[1:])
    run(prepared, sys.argv[1:])
