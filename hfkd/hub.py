"""Model cards: facts, then a template; and the only place that imports huggingface_hub.

Everything that reaches a card passes through `redact` first, because the strings of a run (commands, settings, names of
checkpoints) carry local paths and tokens, and a card is public the moment it is pushed.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import resources
from numbers import Number
from pathlib import Path
from typing import Any

REMOVED = "[removed]"
TAGS = ("knowledge-distillation", "hfkd", "self-distillation")


@dataclass
class CardFacts:
    """What a card may say. Every field is optional: the template leaves out the sections it has no facts for.

    `rounds` holds one dict per stage after the start, in order: `name`, and any of `distance` (L2, to the start's
    weights), `losses` (name to value), `hash`. `results` holds one dict per table row: `stage`, `metric`, `mean`, and
    any of `std`, `seeds`, `train_loss`, `test_loss`, `gap`, `dataset`; scores are fractions, not percentages. `stage`
    names the row that is this model: only its scores enter the metadata, or a baseline's score would be claimed.
    `fidelity` is `FidelityReport.to_dict()` of `hfkd.diagnostics.report`, with `figures`, a list of file names beside the
    card, where there are any.
    """

    student: str = ""
    repo_id: str = ""
    start: str = ""
    start_revision: str = ""
    teacher: str = ""
    teacher_revision: str = ""
    datasets: list[str] = field(default_factory=list)
    objective: str = ""
    equation: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)
    stage: str = ""
    score_task: str = "text-classification"
    fidelity: dict[str, Any] = field(default_factory=dict)
    command: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    citations: list[str] = field(default_factory=lambda: ["2210.02871"])
    limits: list[str] = field(default_factory=list)
    language: str | list[str] = ""
    license: str = ""
    tags: list[str] = field(default_factory=list)
    library_name: str = "transformers"
    pipeline_tag: str = "fill-mask"


def render_card(facts: CardFacts, template: str = "self_distilled_encoder.md") -> str:
    """The card's text: YAML metadata, then the rendered template. `FileNotFoundError` lists the known templates."""
    import jinja2

    clean = _redacted(facts)
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_template_source),
        undefined=jinja2.StrictUndefined,  # a misspelt fact is an error here, not a hole in a published card
        autoescape=False,  # Markdown, not HTML
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(cell=_cell, number=_number, flat=_flat)
    text = environment.get_template(template).render(
        facts=clean,
        metadata=_metadata(facts, clean),
        results=[_with_gap(row) for row in clean.results],
        loss_names=_unique(name for row in clean.rounds for name in row.get("losses") or {}),
        citations=[_citation_or_link(identifier) for identifier in clean.citations],
    )
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


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


# ---------------------------------------------------------------------------------------------------------- redaction

# What ends a path in running text. ":" is one, for lists of folders and for line numbers after a file.
_PATH = r"""(?:\\\ |[^\s"'`<>|,;:()\[\]{}*?])*"""
_ABSOLUTE = re.compile(
    rf"""
    (?P<url>\b(?!file:)[a-z][a-z0-9+.-]*://[^\s"'<>,;=]*)        # kept; "=" ends it: ?path=/home/... is a path again
  | (?P<tag></\w+>)                                              # kept: "</s>" is a token of many tokenizers
  | (?P<quoted>(?<=["'])(?:file:)?(?:/|~/|[A-Za-z]:[\\/])[^"'\n]+(?=["']))     # quotes may hold blanks
  | (?P<path>
        \bfile:/+{_PATH}
      | (?<![\w.~)\]}}|/\\])/+(?=[^\s/]){_PATH}                  # "org/name", "1/n", "(a)/b", "../x" are no local paths
      | (?<!\w)~\w*/{_PATH}
      | (?<![A-Za-z])[A-Za-z]:[\\/]{_PATH}
      | \\\\\w[\w.-]*\\{_PATH}                                   # a Windows share; "\\frac" in an equation has no third
    )
    """,
    re.VERBOSE,
)
_HOME = re.compile(r"/root|/(?:home|Users)/[^/]+|[A-Za-z]:/Users/[^/]+|~\w*", re.IGNORECASE)
_CREDENTIALS = re.compile(r"(?<=://)[^/\s@]+@")  # https://name:password@host
_TOKEN = re.compile(r"hf_\w{8,}|wandb_v\d+_\w{8,}")
_SECRET_NAME = re.compile(
    r"api[_-]?key|(?:hf|hub|auth|access)[_-]?token|wandb[_-]?key|secret|password|^token$", re.IGNORECASE
)
_SECRET = re.compile(
    r"""(?P<name>
        --?(?:token|[\w-]*(?:api[_-]?key|(?:hf|hub|auth|access)[_-]token|wandb[_-]key|secret|password))(?:\s+|=)
      | [\w.-]*(?:api[_-]?key|(?:hf|hub|auth|access)[_-]?token|wandb[_-]?key|secret|password)["']?\s*[=:]\s*
    )["']?[^\s"',;}]+["']?""",
    re.IGNORECASE | re.VERBOSE,
)
_FORTY_HEX = re.compile(r"(?<![0-9A-Za-z])[0-9a-f]{40}(?![0-9A-Za-z])")  # a W&B key, or a commit: the name decides
_HASH_NAME = re.compile(r"(?:revision|commit|hash|sha\d*|tree|blob|resolve|@)\W{0,4}$", re.IGNORECASE)


def redact(text: str, *, keep_hashes: bool = False) -> str:
    """`text` without local paths (their last component stays), home or working folder, tokens and keys.

    Forty hexadecimal digits are a W&B key or a commit: they stay after a word such as "revision" or "commit", and with
    `keep_hashes`. An absolute path is what starts with a slash after something that is no word: " /n" reads as a path
    in an equation, " / n" does not.
    """
    for secret in _secrets_of_the_environment():
        text = text.replace(secret, REMOVED)
    text = _SECRET.sub(lambda found: found["name"] + REMOVED, text)
    text = _TOKEN.sub(REMOVED, _CREDENTIALS.sub("", text))
    if not keep_hashes:
        text = _FORTY_HEX.sub(lambda found: found[0] if _HASH_NAME.search(text[: found.start()]) else REMOVED, text)
    for folder in _own_folders():
        # Known folders go first and whole: a blank inside them would end a path in the pattern below.
        text = re.sub(re.escape(folder) + rf"(?![\w-]|\.\w)(?:[/\\]{_PATH})?", lambda found: _last(found[0]), text)
    return _ABSOLUTE.sub(lambda found: found[0] if found["url"] or found["tag"] else _last(found[0]), text)


def _secrets_of_the_environment() -> Iterator[str]:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY"):
        value = os.environ.get(name, "").strip()
        if len(value) >= 8:
            yield value


def _own_folders() -> list[str]:
    """Working and home folder, longest first. "/root" could be half of "org/root": left to the pattern."""
    folders = {os.getcwd(), os.path.expanduser("~")}
    folders |= {os.path.realpath(folder) for folder in folders}
    return sorted((folder for folder in folders if len(Path(folder).parts) > 2), key=len, reverse=True)


def _last(path: str) -> str:
    """The last component of a path; a home folder's would be a person's name, the working folder's tells nothing."""
    whole = path.removeprefix("file:").replace("\\ ", " ").replace("\\", "/").rstrip("/")
    whole = re.sub(r"^/+", "/", whole)
    if whole in {folder.replace("\\", "/") for folder in (os.path.expanduser("~"), os.getcwd())}:
        return "~" if whole == os.path.expanduser("~").replace("\\", "/") else "."
    return "~" if _HOME.fullmatch(whole) else whole.rsplit("/", 1)[-1]


def _redacted(facts: CardFacts) -> CardFacts:
    return CardFacts(**{item.name: _clean(getattr(facts, item.name), item.name) for item in dataclasses.fields(facts)})


def _clean(value: Any, name: str = "") -> Any:
    if value is not None and _SECRET_NAME.search(name):
        return REMOVED
    if value is None or isinstance(value, Number):
        return value
    if isinstance(value, Mapping):
        return {redact(str(key)): _clean(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_clean(item, name) for item in value]
    return redact(str(value), keep_hashes=_HASH_NAME.search(name) is not None)


# ----------------------------------------------------------------------------------------------------------- metadata


def _metadata(facts: CardFacts, clean: CardFacts) -> str:
    """The YAML block. Names come from the facts as given: what is a local folder here is not a repository there."""
    from huggingface_hub import ModelCardData

    language = [clean.language] if isinstance(clean.language, str) else list(clean.language)
    starts = _hub_ids([facts.start])
    evaluation = _eval_results(clean)
    return ModelCardData(
        base_model=starts[0] if starts else None,
        datasets=_hub_ids(facts.datasets) or None,
        language=[code for code in language if code] or None,
        library_name=clean.library_name or None,
        license=clean.license or None,
        pipeline_tag=clean.pipeline_tag or None,
        tags=_unique([*TAGS, *clean.tags]),
        model_name=(clean.student or clean.repo_id or "student") if evaluation else None,
        eval_results=evaluation or None,
    ).to_yaml()


def _hub_ids(names: Iterable[str]) -> list[str]:
    """The names that can be Hub ids: not paths, not folders of this machine."""
    shape = re.compile(r"[\w.-]+(?:/[\w.-]+)?")
    return [
        name for name in map(str, names) if shape.fullmatch(name) and name == redact(name) and not os.path.isdir(name)
    ]


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
        found.append(
            EvalResult(
                task_type=clean.score_task,
                dataset_type=dataset,
                dataset_name=dataset,
                metric_type="f1" if metric.endswith("_f1") else metric,
                metric_name=metric,
                metric_value=float(mean),
            )
        )
    return found


# ---------------------------------------------------------------------------------------------- template and its words


def _template_source(name: str) -> str:
    for folder in _template_folders():
        if (folder / name).is_file():
            return (folder / name).read_text(encoding="utf-8")
    known = sorted(item.name for folder in _template_folders() if folder.is_dir() for item in folder.iterdir())
    raise FileNotFoundError(f"no card template is called {name!r}; the known ones are {', '.join(known) or 'none'}")


def _template_folders() -> list[Any]:
    """Inside an installed package, or, in a checkout, beside it."""
    return [resources.files("hfkd") / "hub_cards", Path(__file__).resolve().parent.parent / "hub_cards"]


def _cell(value: Any) -> str:
    """One cell of a Markdown table: a bar or a line break would shift every later column."""
    return " ".join(str(value).split()).replace("|", "\\|")


def _number(value: Any, digits: int = 4) -> str:
    return "-" if value is None else f"{float(value):.{digits}f}"


def _flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            rows += _flat(value, f"{prefix}{name}.")
        else:
            rows.append((f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value, default=str)))
    return rows


def _with_gap(row: Mapping[str, Any]) -> dict[str, Any]:
    empty = dict.fromkeys(("stage", "metric", "mean", "std", "seeds", "train_loss", "test_loss", "gap"))
    full: dict[str, Any] = {**empty, **row}
    if full["gap"] is None and full["train_loss"] is not None and full["test_loss"] is not None:
        full["gap"] = full["test_loss"] - full["train_loss"]
    return full


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


# ---------------------------------------------------------------------------------------------------------- citations

_PAPERS: dict[str, dict[str, str]] = {
    "2210.02871": {
        "kind": "inproceedings",
        "key": "lee2023selfdistillation",
        "title": "Self-Distillation for Further Pre-training of Transformers",
        "author": "Lee, Seanie and Kang, Minki and Lee, Juho and Hwang, Sung Ju and Kawaguchi, Kenji",
        "booktitle": "International Conference on Learning Representations",
        "year": "2023",
    },
    "2106.10494": {
        "kind": "article",
        "key": "lukasik2022teacherspet",
        "title": "Teacher's pet: understanding and mitigating biases in distillation",
        "author": "Lukasik, Michal and Bhojanapalli, Srinadh and Menon, Aditya Krishna and Kumar, Sanjiv",
        "journal": "Transactions on Machine Learning Research",
        "year": "2022",
    },
    "2301.12923": {
        "kind": "inproceedings",
        "key": "nagarajan2023deviations",
        "title": "On student-teacher deviations in distillation: does it pay to disobey?",
        "author": "Nagarajan, Vaishnavh and Menon, Aditya Krishna and Bhojanapalli, Srinadh and Mobahi, Hossein "
        "and Kumar, Sanjiv",
        "booktitle": "Advances in Neural Information Processing Systems",
        "year": "2023",
    },
    "2203.14649": {
        "kind": "inproceedings",
        "key": "kaplun2022badmodels",
        "title": "Knowledge Distillation: Bad Models Can Be Good Role Models",
        "author": "Kaplun, Gal and Malach, Eran and Nakkiran, Preetum and Shalev-Shwartz, Shai",
        "booktitle": "Advances in Neural Information Processing Systems",
        "year": "2022",
    },
    # No arXiv id is known for this one: it is asked for by the method's name.
    "mc-distil": {
        "kind": "article",
        "key": "tambat2025unifiedwisdom",
        "title": "Unified Wisdom: Harnessing Collaborative Learning to Improve Efficacy of Knowledge Distillation",
        "author": "Tambat, Atharva Abhijit and S, Durga and Ramakrishnan, Ganesh and Shenoy, Pradeep",
        "journal": "Transactions on Machine Learning Research",
        "year": "2025",
    },
}

_ARXIV = re.compile(r"\d{4}\.\d{4,5}(?:v\d+)?")


def citation(arxiv_id: str) -> str:
    """BibTeX of a paper that hfkd implements; `ValueError` lists the known ids ("mc-distil" has no arXiv id)."""
    paper = _PAPERS.get(arxiv_id)
    if paper is None:
        raise ValueError(f"no citation is known for {arxiv_id!r}; the known ids are {', '.join(_PAPERS)}")
    fields = {name: text for name, text in paper.items() if name not in ("kind", "key")}
    if arxiv_id[0].isdigit():
        fields |= {"eprint": arxiv_id, "archivePrefix": "arXiv"}
    lines = ",\n".join(f"  {name} = {{{text}}}" for name, text in fields.items())
    return f"@{paper['kind']}{{{paper['key']},\n{lines}\n}}"


def _citation_or_link(arxiv_id: str) -> dict[str, str]:
    """A day's training must not end in an error because its objective cites a paper of its own."""
    text = f"[arXiv:{arxiv_id}](https://arxiv.org/abs/{arxiv_id})" if _ARXIV.fullmatch(arxiv_id) else arxiv_id
    return {"text": text, "bibtex": citation(arxiv_id) if arxiv_id in _PAPERS else ""}
