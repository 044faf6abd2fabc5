"""The site: it builds without a warning, its code runs, and what it promises is tested."""

import importlib.util
import os
import re
import subprocess
import sys
import textwrap
from contextlib import nullcontext
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest
import torch
import transformers

import hfkd
import hfkd.objectives
from hfkd.testing import classification_case, tiny_tokenizer
from test_pains import classifier, labelled_rows

pytest.importorskip("mkdocs")
pytest.importorskip("latex2mathml")

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


def module_of_site(name: str):
    spec = importlib.util.spec_from_file_location(f"site_{name}", DOCS / "site" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


pages, docstrings = module_of_site("pages"), module_of_site("docstrings")


# ---- the pages that are made of the code ----


def test_every_objective_has_a_page():
    """A method without a page is one that nobody finds; its equation is read there and nowhere else."""
    classes = {getattr(hfkd.objectives, name) for name in hfkd.objectives.__all__ if name != "OBJECTIVES"}
    concrete = {kind for kind in classes if not kind.__abstractmethods__}
    assert set(pages.objectives().values()) == concrete
    assert {*hfkd.objectives.OBJECTIVES} < {*pages.objectives()}


@pytest.mark.parametrize("name", pages.objectives())
def test_an_objectives_page_shows_its_equation(name):
    """A command that the converter does not know is printed as it is, with its backslash."""
    kind = pages.objectives()[name]
    equations = list(pages.equations(name, kind).values())
    page = pages.objective_page(name, kind)
    assert all(equations) and page.count("<math") == len(equations)
    assert all("\\" not in pages.as_mathml(latex) for latex in equations)
    assert (kind.paper in page) and f"{kind.__name__}(" in page


@pytest.mark.parametrize("name", ["DistillationArguments", "SelfDistillationArguments", "CollaborativeArguments"])
def test_the_table_of_arguments_is_complete(name):
    """A flag that is on no page exists for its author only."""
    table = pages.argument_table(name)
    own = getattr(hfkd, name).__annotations__
    assert all(f"| `{field}` |" in table for field in own if not field.startswith("_"))


def test_every_public_name_is_on_a_page():
    """What `from hfkd import ...` offers and no page mentions is found by reading the source only."""
    text = "".join((DOCS / page).read_text() for page in PAGES) + "".join(text for _, text in pages.made_pages())
    missing = [name for name in hfkd.__all__ if name != "__version__" and not re.search(rf"\b{name}\b", text)]
    assert not missing


# ---- prose into Markdown ----


@pytest.mark.parametrize(
    ("prose", "markdown"),
    [
        ("A sentence that\ngoes on.", "A sentence that\ngoes on."),
        ("What.\nalpha: the weight,\n    of a term.", "What.\n\n- `alpha`: the weight,\n    of a term."),
        ('loss="mse": squared.\nloss="kl": other.', '- `loss="mse"`: squared.\n- `loss="kl"`: other.'),
        ("a, b: two.\nRaises ValueError.", "- `a, b`: two.\n\nRaises ValueError."),
        ("Use it:\n    run --fast\n    stop", "Use it:\n\n    run --fast\n    stop"),
        ("It lies on the student's\ntokens: without a mask.", "It lies on the student's\ntokens: without a mask."),
        ("combine:\n    - one", "- `combine`:\n    - one"),
        ("KL instead of theirs: the same.", "KL instead of theirs: the same."),
        ("Text.\n\n    code\n    more", "Text.\n\n    code\n    more"),
    ],
)
def test_docstrings_become_markdown(prose, markdown):
    """Items run together into one paragraph, and a command line in the middle of a sentence, cannot be read."""
    assert docstrings.as_markdown(prose) == markdown


# ---- promises ----


def test_every_guarantee_names_a_test_that_is_there():
    """A promise whose test was renamed or removed is an advertisement."""
    text = (DOCS / "guarantees.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("|") and "---" not in line and "| test |" not in line]
    assert len(rows) > 20
    for row in rows:
        cited = pages.cited_tests(row)
        assert cited, f"no test: {row}"
        for path, function in cited:
            assert '"""' in pages.source_of(path, function), function
    with pytest.raises(ValueError, match="no test test_of_nothing"):
        pages.source_of("tests/test_laws.py", "test_of_nothing")


def test_commands_on_pages_name_files_that_are_there():
    """A command that fails at its first word is the first thing a reader tries."""
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", (DOCS / page).read_text(), re.DOTALL):
            for word in re.findall(r"(?:recipes|tests)/\S+", block):
                assert (ROOT / word).is_file(), f"{page}: {word}"


# ---- the code on the pages ----


def blocks_of(page: str) -> list[str]:
    """Python blocks, also those inside tabs; not those with a title, which are somebody else's or want a launcher."""
    text = (DOCS / page).read_text()
    found = re.findall(r"^( *)```python\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(block) for _, block in found]


WITH_CODE = [page for page in PAGES if blocks_of(page)]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of the copied snippet, which is on the page because of it
@pytest.mark.parametrize("page", WITH_CODE)
def test_the_code_of_a_page_runs(page, hub, tmp_path, monkeypatch):
    """Documentation that does not run costs each reader the hour that its author saved."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    classifier(1).save_pretrained("your/teacher")
    tiny_tokenizer().save_pretrained("your/teacher")
    rows = labelled_rows(64)
    names = {
        "student": classifier(0),
        "large": classifier(2, num_hidden_layers=2),
        "teacher": classifier(1),
        "tokenizer": tiny_tokenizer(),
        "collator": transformers.DataCollatorWithPadding(tiny_tokenizer()),
        "rows": rows.select(range(32)),
        "held_out_rows": rows.select(range(32, 64)),
        "__name__": "page",
    }
    with hub.connected() if page == "publish.md" else nullcontext():
        for number, block in enumerate(blocks_of(page)):
            exec(compile(block, f"{page}[{number}]", "exec"), names)


def test_textbrewers_weights_are_translated():
    """A weight that is translated wrongly trains without an error, on another loss than the one that was left."""
    names = {}
    exec(re.search(r"def alpha_of.*?\n\n", "\n".join(blocks_of("migration.md")), re.DOTALL)[0], names)
    hard, soft, temperature = 1.5, 0.5, 8.0
    case = classification_case(torch.arange(8))
    logits, teacher, labels = case.student.logits.requires_grad_(True), case.teacher.logits, case.batch["labels"]
    # TextBrewer: cross-entropy to the teacher at temperature T, no T^2, weights as they are
    targets = torch.softmax(teacher / temperature, -1)
    to_teacher = -(targets * torch.log_softmax(logits / temperature, -1)).sum(-1).mean()
    theirs = hard * torch.nn.functional.cross_entropy(logits, labels) + soft * to_teacher
    objective = hfkd.KD(temperature=temperature, alpha=names["alpha_of"](hard, soft, temperature))
    ours = sum(values.mean() for values in objective(case.student, case.teacher, case.batch).values())
    found, expected = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (ours, theirs))
    torch.testing.assert_close(found / found.norm(), expected / expected.norm())


def test_sparsemls_hardness_is_alpha():
    """The page says that both have one formula: T^2, a sum over classes, a mean over examples."""
    case = classification_case(torch.arange(8))
    student, teacher = case.student.logits, case.teacher.logits
    soft = torch.nn.functional.kl_div(
        torch.log_softmax(student / 2, -1), torch.log_softmax(teacher / 2, -1), log_target=True, reduction="sum"
    )
    theirs = 0.7 * torch.nn.functional.cross_entropy(student, case.batch["labels"]) + 0.3 * soft * 2**2 / len(student)
    ours = hfkd.KD(temperature=2.0, alpha=0.3)(case.student, case.teacher, case.batch)
    torch.testing.assert_close(sum(values.mean() for values in ours.values()), theirs)


# ---- the site ----


class Links(HTMLParser):
    """What a page loads, where it leads, and where it can be led to."""

    def __init__(self, text: str):
        super().__init__()
        self.loads, self.leads, self.anchors = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, given):
        given = dict(given)
        if tag in ("script", "img", "iframe", "source") and given.get("src"):
            self.loads.append(given["src"])
        if tag == "link" and "canonical" not in given.get("rel", "") and given.get("href"):
            self.loads.append(given["href"])
        if tag == "a" and given.get("href"):
            self.leads.append(given["href"])
        self.anchors |= {given[name] for name in ("id", "name") if given.get(name)}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    values = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # an advertisement of the theme's
    done = subprocess.run(command, cwd=ROOT, env=values, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "WARNING" not in done.stderr, done.stderr[-3000:]
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*.html"))}, folder


@pytest.mark.launch
def test_every_page_is_built_and_every_link_leads_somewhere(site):
    """A reader who clicks on "tested" and lands on nothing believes the rest less."""
    built, folder = site
    read = {path.resolve(): Links(path.read_text()) for path in built.values() if path.name != "404.html"}
    assert len(read) >= len(PAGES) + len(pages.objectives()) + 1
    for path, found in read.items():
        for link in [*found.leads, *found.loads]:
            address, anchor = urldefrag(unquote(link))
            if ":" in address or address.startswith("//"):
                continue
            target = (path.parent / address).resolve() if address else path
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), f"{path.relative_to(folder)}: {link}"
            if anchor and target in read and not anchor.startswith("__"):
                assert anchor in read[target].anchors, f"{path.relative_to(folder)}: {link}"


@pytest.mark.launch
def test_no_page_loads_anything_from_another_host(site):
    """Fonts and scripts of other hosts tell them who reads what, and are missing without a network."""
    built, folder = site
    for name, path in built.items():
        foreign = [address for address in Links(path.read_text()).loads if re.match(r"(https?:)?//", address)]
        assert not foreign, (name, foreign)
    styles = "".join(path.read_text() for path in folder.rglob("*.css"))
    assert not re.search(r"url\([\"']?(https?:)?//", styles) and "@import" not in styles


@pytest.mark.launch
def test_docstrings_are_rendered_whole(site):
    """An underscore that is taken for emphasis eats the names in an equation."""
    built, _ = site
    text = re.sub(r"<[^>]+>", "", built["objectives/kd/index.html"].read_text()).replace("&#39;", "'")
    for shown in (
        "KL(softmax(z_t / T) || softmax(z_s / T))",
        "student.logits, teacher.logits",
        "temperature_on='both'",
    ):
        assert shown in text, shown
    assert "`" not in re.sub(r"(?s)<(code|pre).*?</\1>", "", built["trainers/distillation/index.html"].read_text())
