"""Pages that are made of the code: one an objective, with its equation, and the tests that a promise is held to."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
# Objectives that no command line names: a trainer of groups makes them
OF_GROUPS = {"collaboration": "Collaboration", "mutual_learning": "MutualLearning"}
SETTINGS = {"deit_token": ("hard", "soft")}  # the class has no one equation: it depends on its first argument
GROUP_EQUATIONS = {  # of student k, example i
    "collaboration": r"L_k = \frac{1}{n} \sum_i \left( w^{\mathrm{task}}_{ik} \, \mathrm{CE}(y_i, z_{ik}) + "
    r"w^{\mathrm{distill}}_{ik} \, T^2 \, \mathrm{KL}(\sigma(t_i / T) \| \sigma(z_{ik} / T)) \right)",
    "mutual_learning": r"L_k = \mathrm{CE}_k + \frac{1}{K - 1} \sum_{j \neq k} \mathrm{KL}(p_j \| p_k)",
}
CITED = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")
ARGUMENTS = re.compile(r"\[\[arguments: (\w+)\]\]")
PAPER = "[arXiv {0}](https://arxiv.org/abs/{0})"


def objectives() -> dict[str, type]:
    """The name of each page, and the class it is about."""
    import hfkd.objectives as found

    return {**found.OBJECTIVES, **{name: getattr(found, kind) for name, kind in OF_GROUPS.items()}}


def equations(name: str, kind: type) -> dict[str, str]:
    """What the page shows above the docstring, in LaTeX: one equation, or one a setting."""
    if name in SETTINGS:
        return {f"`{setting}`:": kind(setting).equation for setting in SETTINGS[name]}
    return {"": kind.equation or GROUP_EQUATIONS[name]}


def as_mathml(latex: str) -> str:
    """Browsers draw MathML by themselves: no script, and no fonts of another host."""
    return convert(latex.replace(r"\arg", r"\mathrm{arg}\,"), display="block")  # it does not know \arg


def objective_page(name: str, kind: type) -> str:
    shown = [
        f"{label}\n\n{in_box(latex)}" if label else in_box(latex) for label, latex in equations(name, kind).items()
    ]
    module = inspect.getmodule(kind).__name__
    paper = f"\nPaper: {PAPER.format(kind.paper)}." if kind.paper else ""
    start = "its trainer makes it" if name in OF_GROUPS else f"`--objective {name}`"
    return "\n\n".join(
        [
            f"# {kind.__name__}",
            *shown,
            f"```python\n{call_of(kind)}\n```",
            f"In Python `hfkd.objectives.{kind.__name__}`; on a command line {start}.{paper}",
            f"::: {module}.{kind.__name__}\n    options:\n      show_root_heading: false\n      show_root_toc_entry: false",
        ]
    )


def call_of(kind: type) -> str:
    """The class with its settings and their defaults."""
    settings = [value for name, value in inspect.signature(kind.__init__).parameters.items() if name != "self"]
    plain = [
        str(value.replace(annotation=inspect.Parameter.empty)) for value in settings if value.kind != value.VAR_KEYWORD
    ]
    return f"{kind.__name__}({', '.join(plain)})"


def in_box(latex: str) -> str:
    return f'<div class="equation">{as_mathml(latex)}</div>'


def objective_table() -> str:
    """A row an objective: what its docstring says first."""
    rows = ["| objective | name on a command line | paper |", "|---|---|---|"]
    for name, kind in objectives().items():
        paper = PAPER.format(kind.paper) if kind.paper else "–"
        option = "–" if name in OF_GROUPS else f"`{name}`"
        rows.append(f"| [{kind.__name__}]({name}.md) | {option} | {paper} |")
    return "\n".join(rows)


def argument_table(name: str) -> str:
    """The fields that a class of arguments has beyond the one it extends."""
    import hfkd

    kind = getattr(hfkd, name)
    inherited = {field.name: field for field in dataclasses.fields(kind.__mro__[1])}
    rows = ["| argument | default | |", "|---|---|---|"]
    for field in dataclasses.fields(kind):
        if field.init and inherited.get(field.name) is not field and "help" in field.metadata:
            text = field.metadata["help"].replace("|", "\\|")
            choices = field.metadata.get("choices")
            known = f" One of {', '.join(f'`{choice}`' for choice in choices)}." if choices else ""
            rows.append(f"| `{field.name}` | `{field.default!r}` | {text}{known} |")
    return "\n".join(rows)


# ---- promises and their tests ----


def cited_tests(text: str) -> list[tuple[str, str]]:
    return list(dict.fromkeys(CITED.findall(text)))


def source_of(path: str, function: str) -> str:
    """The test as it stands. Raises ValueError for one that is not there: a promise without a test is an opinion."""
    file = ROOT / path
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef) and node.name == function:
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            return "\n".join(text.splitlines()[first - 1 : node.end_lineno])
    raise ValueError(f"{path} has no test {function}: the page of guarantees names one that is gone")


def tests_page(text: str) -> str:
    parts = ["# The tests behind the guarantees\n\nAs they stand in the repository; `make test` runs them."]
    for path, function in cited_tests(text):
        parts.append(f"## {function} {{ #{function} }}\n\n`{path}`\n\n```python\n{source_of(path, function)}\n```")
    return "\n\n".join(parts)


# ---- what MkDocs calls ----


def made_pages() -> Iterator[tuple[str, str]]:
    for name, kind in objectives().items():
        yield f"objectives/{name}.md", objective_page(name, kind)
    yield "tests.md", tests_page((ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8"))


def on_config(config: Any) -> Any:
    for part in config.nav:
        if isinstance(part, dict) and "Objectives" in part:
            part["Objectives"] += [{kind.__name__: f"objectives/{name}.md"} for name, kind in objectives().items()]
        if isinstance(part, dict) and "Guides" in part:
            part["Guides"].append({"The tests": "tests.md"})
    return config


def on_files(files: Files, config: Any) -> Files:
    for path, text in made_pages():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    if page.file.src_uri == "objectives/index.md":
        return markdown.replace("[[objectives]]", objective_table())
    markdown = ARGUMENTS.sub(lambda found: argument_table(found[1]), markdown)
    if page.file.src_uri == "guarantees.md":
        return CITED.sub(
            lambda found: f"[`{found[1].removeprefix('tests/')}::{found[2]}`](tests.md#{found[2]})", markdown
        )
    return markdown
