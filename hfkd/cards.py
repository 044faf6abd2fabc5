"""Model and data set cards: facts, then a template.

Everything that reaches a card passes through `hfkd.redaction` first, because a card is public the moment it is pushed.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hfkd.card_words import FILTERS, HUB_ID, cost_table, hub_ids, limits_of, score_table, unique, where, with_gap
from hfkd.citations import card_folders, citation, papers
from hfkd.redaction import redacted

INCOMPLETE = "This card is not complete: it lacks "
HIDDEN = "[private teacher]"
TAGS = ("knowledge-distillation", "hfkd")
# What only cards of one kind say
OF_TEMPLATE: dict[str, dict[str, list[str]]] = {
    "self_distilled_encoder.md": {"tags": ["self-distillation"], "citations": ["2210.02871"]},
    "collaborative_student.md": {"tags": ["collaborative-learning"], "citations": ["mc-distil"]},
    "teacher_logits.md": {"tags": ["teacher-logits"]},
}
KINDS = {
    "text-classification": "A text classifier",
    "token-classification": "A token classifier",
    "image-classification": "An image classifier",
    "fill-mask": "A masked language model",
    "image-feature-extraction": "An image encoder",
}
_BLOCK = r"---[ \t]*\n(.+?)\n---[ \t]*\n"
ENCODERS = ("fill-mask", "image-feature-extraction")  # published without a score of their own
TAUGHT_BY_NOBODY = ("CrossEntropy", "GroupDRO", "MaskedLM", "MaskedImages")


@dataclass
class CardFacts:
    """What a card may say. Every field is optional: the template leaves out the sections it has no facts for, and
    `missing_facts` names what a published card must have.

    What it is: role ("student", "teacher", "member" of a group, or "logits", a data set of a teacher's answers), student (the
    model's name, whatever the role), repo_id and branch (where it will lie), task, label_names in the order of the logits,
    inputs (names of the text columns it reads, two of them for pairs), problem_type, remote_code (its code lies beside the
    weights), imports (modules that register its architecture).
    teacher_private: the teacher's name, in `teacher` or `teacher_repo`, appears nowhere on the card, which says that it is
    private. students: Hub ids, for the card of their teacher. group: a dict per student: `name`, `repo`, `parameters`,
    `accuracy`.
    start_relation: what the Hub calls the way from `start` to this model: finetune, adapter.
    rounds: one dict per stage after the start, in order: `name`, and any of `distance` (L2, to the start's weights), `losses`
    (name to value), `hash`.
    results: one dict per score: `stage`, `metric`, `mean`, and any of `std`, `seeds`, `low`, `high` (95 %), `train_loss`,
    `test_loss`, `gap`, `dataset`, `split`; scores are fractions, not percentages. `stage` names the row that is this model:
    only its scores enter the metadata, or a baseline's score would be claimed. evaluated_on: the rows, in words.
    differences: `name`, `metric`, `mean`, `low`, `high` (95 %), `seeds`, paired by seed.
    costs: "student" and "teacher", each what `hfkd.diagnostics.cost.cost_of` returns.
    fidelity: `FidelityReport.to_dict()` of `hfkd.diagnostics.report`, with `figures`, a list of file names beside the card,
    where there are any.
    Of logits: rows, split, columns (name to what is in it), dtype, view, data_files (a pattern).
    """

    student: str = ""
    role: str = "student"
    repo_id: str = ""
    branch: str = ""
    task: str = ""
    label_names: list[str] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)
    problem_type: str = ""
    remote_code: bool = False
    imports: list[str] = field(default_factory=list)
    start: str = ""
    start_revision: str = ""
    start_relation: str = ""
    teacher: str = ""
    teacher_repo: str = ""
    teacher_revision: str = ""
    teacher_hash: str = ""
    teacher_private: bool = False
    students: list[str] = field(default_factory=list)
    group: list[dict[str, Any]] = field(default_factory=list)
    datasets: list[str] = field(default_factory=list)
    objective: str = ""
    equation: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)
    stage: str = ""
    score_task: str = "text-classification"
    evaluated_on: str = ""
    differences: list[dict[str, Any]] = field(default_factory=list)
    costs: dict[str, dict[str, Any]] = field(default_factory=dict)
    fidelity: dict[str, Any] = field(default_factory=dict)
    rows: int = 0
    split: str = ""
    columns: dict[str, str] = field(default_factory=dict)
    dtype: str = ""
    view: str = ""
    data_files: str = "*.arrow"
    command: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    citations: list[str] = field(default_factory=list)
    limits: list[str] = field(default_factory=list)
    language: str | list[str] = ""
    license: str = ""
    tags: list[str] = field(default_factory=list)
    library_name: str = "transformers"
    pipeline_tag: str = ""


def render_card(facts: CardFacts, template: str = "self_distilled_encoder.md") -> str:
    """The card's text: YAML metadata, then the rendered template. `FileNotFoundError` lists the known templates."""
    facts = _without_private_teacher(facts)
    clean = _redacted(facts)
    extra = OF_TEMPLATE.get(template, {})
    compiled = _environment().get_template(template)
    text = compiled.render(
        facts=clean,
        metadata=_metadata(facts, clean, extra.get("tags", [])),
        incomplete=INCOMPLETE,
        missing=missing_facts(facts),
        what=KINDS.get(clean.pipeline_tag, "A model"),
        where=where(clean),
        folder=clean.repo_id or "path/to/this/folder",
        taught=clean.teacher_private or clean.teacher not in ("", "none"),
        results=[with_gap(row) for row in clean.results],
        score_table=score_table(clean),
        cost_table=cost_table(clean.costs),
        limits=clean.limits or limits_of(clean),
        loss_names=unique(name for row in clean.rounds for name in row.get("losses") or {}),
        citations=[_citation_or_link(identifier) for identifier in clean.citations or extra.get("citations", [])],
    )
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


@functools.cache  # it keeps the compiled templates: compiling them for every checkpoint's card takes longer than its weights
def _environment() -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_template_source),
        undefined=jinja2.StrictUndefined,  # a misspelt fact is an error here, not a hole in a published card
        autoescape=False,  # Markdown, not HTML
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(FILTERS)
    return environment


def write_card(
    facts: CardFacts, directory: str | os.PathLike[str], template: str = "self_distilled_encoder.md"
) -> Path:
    """Write `README.md` into `directory`: whole or not at all, so that a killed run never publishes half a card."""
    text = render_card(facts, template)
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".README.md.{os.getpid()}.tmp"
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, folder / "README.md")
    finally:
        temporary.unlink(missing_ok=True)
    return folder / "README.md"


def missing_facts(facts: CardFacts) -> list[str]:
    """What a published card must have and these facts lack, in words; the fields that hold them in brackets."""
    logits = facts.role == "logits"
    scored = not logits and facts.pipeline_tag not in ENCODERS
    learned = facts.role in ("student", "member")
    known_teacher = facts.teacher or facts.teacher_repo or facts.teacher_private
    alone = facts.role == "teacher" or facts.role == "member" or facts.objective in TAUGHT_BY_NOBODY
    required: dict[str, Any] = {
        "a name (student)": facts.student or facts.repo_id,
        "the task (task or pipeline_tag)": logits or facts.task or facts.pipeline_tag,
        "the data (datasets)": facts.datasets,
        "the objective (objective)": not learned or facts.objective,
        "its equation (equation)": not learned or facts.equation or not facts.objective,
        'the teacher (teacher; "none" where there is none)': known_teacher or alone,
        "results (results)": not scored or facts.results,
        "the number of rows (rows)": not logits or facts.rows,
        "its columns (columns)": not logits or facts.columns,
        "the command (command)": facts.command,
        "versions (versions)": facts.versions,
    }
    return [name for name, present in required.items() if not present]


def check_card(card: str | os.PathLike[str], repo_type: str = "model", *, complete: bool = True) -> None:
    """Raise ValueError, naming every problem, for a card that the Hub would refuse or that misses what a reader needs.

    card: the text, or a file, or the folder it lies in (whose figures are then looked for). Read with huggingface_hub's own
    parser, without a network. complete=False lets a card pass that says itself what it lacks, as during training.
    """
    text, folder = _card_text(card)
    problems = _metadata_problems(text, repo_type) + _figure_problems(text, folder)
    found = re.search(re.escape(INCOMPLETE) + r"(.*?)\.\*\*$", text, re.MULTILINE)
    if found and complete:
        problems.append(f"it lacks {found[1]}: set these fields of the trainer's card_facts, or give them to CardFacts")
    if problems:
        raise ValueError(
            f"the card {folder / 'README.md' if folder else ''} cannot be published: {'; '.join(problems)}"
        )


def _card_text(card: str | os.PathLike[str]) -> tuple[str, Path | None]:
    if isinstance(card, str) and "\n" in card:
        return card, None
    path = Path(card) / "README.md" if Path(card).is_dir() else Path(card)
    if not path.is_file():
        raise ValueError(
            f"there is no card {path}: write one with hfkd.cards.write_card, or save with a trainer of hfkd"
        )
    return path.read_text(encoding="utf-8"), path.parent


def metadata_of(text: str) -> dict[str, Any]:
    """The YAML block of a card as it stands; empty where there is none that can be read."""
    import yaml

    block = re.match(_BLOCK, text, re.DOTALL)
    try:
        found = yaml.safe_load(block[1]) if block else None
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def _metadata_problems(text: str, repo_type: str) -> list[str]:
    import yaml
    from huggingface_hub import DatasetCard, ModelCard

    if not re.match(_BLOCK, text, re.DOTALL):
        return ["it begins with no metadata between two lines of ---"]
    try:
        data = (DatasetCard if repo_type == "dataset" else ModelCard)(text).data
    except (ValueError, yaml.YAMLError) as error:
        return [f"its metadata cannot be read: {' '.join(str(error).split())}"]
    problems = [f"the tag {tag} is missing" for tag in TAGS if tag not in (data.get("tags") or [])]
    if repo_type == "model" and not data.get("pipeline_tag"):
        problems.append("pipeline_tag is missing, by which the Hub finds the widget and the snippet")
    for name in ("base_model", "datasets"):
        for value in _listed(data.get(name)):
            if not HUB_ID.fullmatch(value):
                problems.append(f"{name} names {value!r}, which is no Hub id")
    for result in data.get("eval_results") or []:
        if not isinstance(result.metric_value, int | float) or not math.isfinite(result.metric_value):
            problems.append(f"the score {result.metric_name or result.metric_type} is {result.metric_value!r}")
    return problems


def _figure_problems(text: str, folder: Path | None) -> list[str]:
    shown = re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", text)
    local = [name for name in shown if folder is not None and "://" not in name]
    return [f"it shows {name}, which is not there" for name in local if folder and not (folder / name).is_file()]


def _listed(value: Any) -> list[str]:
    return [] if not value else [value] if isinstance(value, str) else list(map(str, value))


def _redacted(facts: CardFacts) -> CardFacts:
    clean = {item.name: redacted(getattr(facts, item.name), item.name) for item in dataclasses.fields(facts)}
    return CardFacts(**clean)


def _without_private_teacher(facts: CardFacts) -> CardFacts:
    """No string of any fact names it: not the command, not the settings, not the start, if that is the teacher too."""
    if not facts.teacher_private:
        return facts
    names = sorted({facts.teacher, facts.teacher_repo} - {"", "none"}, key=len, reverse=True)
    named = [rf"(?<![\w./-]){re.escape(name)}(?![\w/-]|\.\w)" for name in names]
    flags = r"(?P<flag>--teacher(?:_start)?[ =])\S+"  # of a caller who has not told its name
    pattern = re.compile("|".join([*named, flags]))
    hidden = {item.name: _replaced(getattr(facts, item.name), pattern) for item in dataclasses.fields(facts)}
    return CardFacts(**{**hidden, "teacher": "", "teacher_repo": "", "teacher_revision": ""})


def _replaced(value: Any, pattern: re.Pattern[str]) -> Any:
    if isinstance(value, str):
        return pattern.sub(lambda found: (found["flag"] or "") + HIDDEN, value)
    if isinstance(value, Mapping):
        return {_replaced(key, pattern): _replaced(item, pattern) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_replaced(item, pattern) for item in value]
    return value


# ----------------------------------------------------------------------------------------------------------- metadata


SIZES = ((1e3, "n<1K"), (1e4, "1K<n<10K"), (1e5, "10K<n<100K"), (1e6, "100K<n<1M"), (1e7, "1M<n<10M"))


def _metadata(facts: CardFacts, clean: CardFacts, tags: list[str]) -> str:
    """The YAML block. Names come from the facts as given: what is a local folder here is not a repository there."""
    from huggingface_hub import DatasetCardData, ModelCardData

    languages = [code for code in _listed(clean.language) if code] or None
    shared: dict[str, Any] = {
        "language": languages,
        "license": clean.license or None,
        "tags": unique([*TAGS, *tags, *clean.tags]),
    }
    if clean.role == "logits":
        return DatasetCardData(
            pretty_name=clean.student or None,
            size_categories=next((name for limit, name in SIZES if clean.rows < limit), "n>10M")
            if clean.rows
            else None,
            configs=[{"config_name": "default", "data_files": clean.data_files}],
            **shared,
        ).to_yaml()
    starts = hub_ids([facts.start])
    # The Hub has no field for a teacher: there its page lists the student among the models made from it
    related = unique([*starts, *hub_ids([facts.teacher_repo])])
    evaluation = _eval_results(clean)
    return ModelCardData(
        base_model=related if len(related) > 1 else related[0] if related else None,
        # Of several base models without a relation the Hub says "merge"
        base_model_relation=(clean.start_relation if starts else "") or ("finetune" if len(related) > 1 else None),
        datasets=[name for name in hub_ids(facts.datasets) if "/" in name] or None,
        library_name=clean.library_name or None,
        metrics=unique(result.metric_type for result in evaluation) or None,
        pipeline_tag=clean.pipeline_tag or None,
        model_name=(clean.student or clean.repo_id or "student") if evaluation else None,
        eval_results=evaluation or None,
        **shared,
    ).to_yaml()


def _eval_results(clean: CardFacts) -> list[Any]:
    from huggingface_hub import EvalResult

    stage = clean.stage or (clean.results[-1].get("stage") if clean.results else None)
    found = []
    for row in clean.results:
        dataset = row.get("dataset") or (clean.datasets[0] if clean.datasets else None)
        mean = row.get("mean")
        if row.get("stage") != stage or not dataset or mean is None or not math.isfinite(mean):
            continue
        metric = str(row.get("metric", "score"))
        if not re.fullmatch(r"[\w./-]+", metric):
            continue  # words ("accuracy on training rows"): no score that the Hub could compare with others
        found.append(
            EvalResult(
                task_type=clean.score_task,
                dataset_type=dataset,
                dataset_name=dataset,
                dataset_split=row.get("split"),
                metric_type="f1" if metric.endswith("_f1") else metric,
                metric_name=metric,
                metric_value=float(mean),
            )
        )
    return found


# ----------------------------------------------------------------------------------------------------- the template


def _template_source(name: str) -> str:
    for folder in card_folders():
        if (folder / name).is_file():
            return (folder / name).read_text(encoding="utf-8")
    folders = [folder for folder in card_folders() if folder.is_dir()]
    known = sorted(item.name for folder in folders for item in folder.iterdir() if item.name.endswith(".md"))
    raise FileNotFoundError(f"no card template is called {name!r}; the known ones are {', '.join(known) or 'none'}")


_ARXIV = re.compile(r"\d{4}\.\d{4,5}(?:v\d+)?")


def _citation_or_link(arxiv_id: str) -> dict[str, str]:
    """A day's training must not end in an error because its objective cites a paper of its own."""
    text = f"[arXiv:{arxiv_id}](https://arxiv.org/abs/{arxiv_id})" if _ARXIV.fullmatch(arxiv_id) else arxiv_id
    return {"text": text, "bibtex": citation(arxiv_id) if arxiv_id in papers() else ""}
