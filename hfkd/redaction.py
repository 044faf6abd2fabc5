"""What must not be public: local paths, home and working folder, tokens and keys.

The strings of a run (commands, settings, names of checkpoints) carry them, and a card is public the moment it is pushed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from numbers import Number
from pathlib import Path
from typing import Any

REMOVED = "[removed]"

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


def redacted(value: Any, name: str = "") -> Any:
    """`value` with every string in it redacted, mappings and lists too; what stands under a secret's name is removed."""
    if value is not None and _SECRET_NAME.search(name):
        return REMOVED
    if value is None or isinstance(value, Number):
        return value
    if isinstance(value, Mapping):
        return {redact(str(key)): redacted(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [redacted(item, name) for item in value]
    return redact(str(value), keep_hashes=_HASH_NAME.search(name) is not None)
