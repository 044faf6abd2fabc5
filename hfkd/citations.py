"""BibTeX of the papers that hfkd implements: the entries of `papers.bib`, beside the templates of cards."""

from __future__ import annotations

import re
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

WITHOUT_ARXIV = {"tambat2025unifiedwisdom": "mc-distil"}  # no arXiv id is known: asked for by the method's name


def citation(arxiv_id: str) -> str:
    """BibTeX of a paper that hfkd implements; `ValueError` lists the known ids ("mc-distil" has no arXiv id)."""
    if arxiv_id not in papers():
        raise ValueError(f"no citation is known for {arxiv_id!r}; the known ids are {', '.join(papers())}")
    return papers()[arxiv_id]


@cache
def papers() -> dict[str, str]:
    """Entry by arXiv id."""
    (file, *_) = [folder / "papers.bib" for folder in card_folders() if (folder / "papers.bib").is_file()]
    found = {}
    for entry in re.split(r"\n\n+", file.read_text(encoding="utf-8").strip()):
        key, eprint = re.match(r"@\w+\{([^,]+),", entry), re.search(r"eprint = \{([^}]+)\}", entry)
        name = eprint[1] if eprint else WITHOUT_ARXIV[key[1] if key else ""]
        found[name] = entry
    return found


def card_folders() -> list[Any]:
    """What cards are made from lies inside an installed package, or, in a checkout, beside it."""
    return [resources.files("hfkd") / "hub_cards", Path(__file__).resolve().parent.parent / "hub_cards"]
