"""hfkd's docstrings are prose for a terminal; this makes Markdown of them: an item a line, code where it is indented."""

from __future__ import annotations

import re
from itertools import groupby
from typing import Any

import griffe

# alpha: ..., or student.logits, teacher.logits: ..., or temperature_on="both": ...; no sentence begins so
ITEM = re.compile(r"(?P<name>[a-z_][\w.]*(?:(?:=|, )[\w.\"']+)*):(?P<text>| .*)")
ENDS = (".", ":", ";", ")")  # what a line ends with before an item; others are cut in the middle of a sentence
BREAKS = ("Raises ", "Returns ")


class Prose(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    paragraphs = [
        list(lines) for blank, lines in groupby(text.splitlines(), lambda line: not line.strip()) if not blank
    ]
    return "\n\n".join(markdown_of(lines) for lines in paragraphs)


def markdown_of(lines: list[str]) -> str:
    """One paragraph: items become a list, what is indented below a colon becomes code."""
    if all(line.startswith("    ") for line in lines):
        return "\n".join(lines)  # indented as a whole: code already
    found: list[str] = []
    item = False  # what the lines that follow belong to
    code = False
    for number, line in enumerate(lines):
        indented, previous = line.startswith("    "), lines[number - 1].rstrip() if number else ""
        opens = previous.endswith(":") and (not item or line.strip().startswith("--"))
        if indented and (code or opens):
            found.append(("" if code else "\n") + ("    " if item else "") + line)
            code = True
            continue
        code = False
        match = ITEM.fullmatch(line)
        if match and (not number or previous.endswith(ENDS)):
            found.append(f"{'' if item else chr(10)}- `{match['name']}`:{match['text']}")
            item = True
        elif (item and not indented and begins_anew(line, previous)) or (
            line.startswith(BREAKS) and previous.endswith(".")
        ):
            found.append(f"\n{line}")
            item = False
        else:
            found.append(f"    {line.strip()}" if item else line)
    return "\n".join(found).strip("\n")


def begins_anew(line: str, previous: str) -> bool:
    """Whether a line after an item is a sentence of its own."""
    return previous.endswith((".", ";")) and line[:1].isupper()
