"""A notebook is documentation that claims to have been run: it must still run, and show that it did."""

import ast
import re
from pathlib import Path

import pytest

import launching

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
THROUGH_A_KERNEL = "does_the_student_exaggerate"  # one does: kernels import everything anew, and take most of the time
FORKED = [path for path in NOTEBOOKS if path.stem != THROUGH_A_KERNEL]
# Folders of whoever ran it last; the start of the word keeps "https://" and "and/or" out
ABSOLUTE_PATH = re.compile(r"(?<![\w/.:<])(/(home|Users|root|work|mnt|tmp|var|opt|usr|private)/|[A-Z]:\\)|(?<!\w)~/")
OF_ONE_RUN = re.compile(r"\bhf_\w{20,}|127\.0\.0\.1|localhost|\b20\d\d-\d\d-\d\dT\d\d")
LINK = re.compile(r"\]\(((?!https?:)[^)\s]+)\)")
# A mean with its 95 % interval, as the recipes' page prints it
INTERVAL = re.compile(r"[+-]?\d+\.\d\d \[[+-]?\d+\.\d\d, [+-]?\d+\.\d\d\]")
LARGEST = 200_000  # bytes; figures are the bulk, and every version of them stays in the repository's history
LARGEST_IMAGE = 80_000

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def prose(notebook):
    """One line: an interval or a link may be broken between two."""
    return " ".join(" ".join(cell.source.split()) for cell in notebook.cells if cell.cell_type == "markdown")


def shown(cell):
    """What a reader sees of a cell's outputs as text; images are not text."""
    for output in cell.outputs:
        yield output.get("text", "")
        yield from (str(value) for kind, value in output.get("data", {}).items() if not kind.startswith("image/"))


def imported(notebook):
    """The names that its code imports, with their modules, and the attributes that it reads."""
    lines = "\n".join(cell.source for cell in code_cells(notebook)).splitlines()
    nodes = list(ast.walk(ast.parse("\n".join(line for line in lines if not line.startswith("%")))))  # IPython's own
    names = [name.name for node in nodes if isinstance(node, ast.Import) for name in node.names]
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{name.name}" for name in node.names]
    return names, [node.attr for node in nodes if isinstance(node, ast.Attribute)]


def test_the_notebooks_are_there():
    """An empty list of parameters passes every test below, and a renamed notebook breaks the links to it."""
    questions = {"does_the_student_exaggerate", "first_distillation", "self_distillation", "who_pays_for_the_average"}
    assert {path.stem for path in NOTEBOOKS} == questions


# ---- what is committed ----


@each_notebook
def test_committed_outputs_are_whole_and_clean(path):
    """Half-run notebooks show numbers that no run produced; outputs with paths or tokens tell whose machine it was."""
    notebook = read(path)
    assert [cell.execution_count for cell in code_cells(notebook)] == list(range(1, len(code_cells(notebook)) + 1))
    assert any(cell.outputs for cell in code_cells(notebook)), "no output is committed"
    assert path.stat().st_size < LARGEST
    for cell in code_cells(notebook):
        assert not [o for o in cell.outputs if o.output_type == "error" or o.get("name") == "stderr"], cell.source
        for text in shown(cell):
            found = ABSOLUTE_PATH.search(text) or OF_ONE_RUN.search(text)
            assert found is None, f"an output shows what belongs to one machine or run: {text[found.start() :][:80]!r}"


@each_notebook
def test_no_metadata_of_the_run_is_committed(path):
    """Times of execution and the name of somebody's kernel change with every run: noise in every diff, and stale at once."""
    notebook = read(path)
    assert notebook.metadata.kernelspec == {"display_name": "Python 3", "language": "python", "name": "python3"}
    assert notebook.metadata.keys() == {"kernelspec", "language_info"}
    assert notebook.metadata.language_info == {"name": "python"}
    assert not [cell.metadata for cell in notebook.cells if cell.metadata]


# ---- what a reader follows ----


def anchors(page):
    """Of a Markdown file's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_notebook
def test_links_lead_somewhere(path):
    """A study's section or figure that has moved leaves the reader with the notebook's one seed."""
    for link in LINK.findall(prose(read(path))):
        name, _, anchor = link.partition("#")
        target = (FOLDER / name).resolve()
        assert target.is_file(), f"{link} leads nowhere"
        assert not anchor or anchor in anchors(target), f"{name} has no section #{anchor}"
        assert target.suffix != ".png" or target.stat().st_size < LARGEST_IMAGE


@each_notebook
def test_quoted_results_are_those_of_the_studies(path):
    """A study that is run again leaves its old numbers standing in the notebooks that quote it."""
    study = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8").replace("[95 %: ", "[")
    assert [found for found in INTERVAL.findall(prose(read(path))) if found not in study] == []


def test_the_studies_are_quoted():
    """With a pattern that finds nothing, the test above passes whatever the notebooks say."""
    quoted = {path.stem for path in NOTEBOOKS if INTERVAL.search(prose(read(path)))}
    assert quoted == {path.stem for path in NOTEBOOKS} - {"self_distillation"}


@each_notebook
def test_only_the_public_interface_is_used(path):
    """A notebook is what people copy: recipes are not installed with hfkd, and names with an underscore change unannounced."""
    imports, attributes = imported(read(path))
    ours = {file.stem for folder in ("recipes", "tests") for file in (ROOT / folder).glob("*.py")}
    packages = {name.partition(".")[0] for name in imports}
    assert "hfkd" in packages and not packages & {*ours, "recipes", "tests"}
    assert [name for name in imports if "._" in name or name.startswith("_")] == []
    assert [name for name in attributes if name.startswith("_") and not name.endswith("__")] == []


# ---- it runs ----


@pytest.mark.launch
@pytest.mark.parametrize("path", FORKED, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path):
    """An interface that changed leaves a notebook that fails in its reader's hands."""
    folder = tmp_path / "beside"
    folder.mkdir()
    done = launching.run(Path(__file__).with_name("notebook_run.py"), str(path), str(folder), log=tmp_path / "log")
    assert done.returncode == 0, done.stderr[-3000:]
    assert not list(folder.iterdir()), "the notebook writes beside itself: use a temporary folder"


@pytest.mark.launch
def test_notebook_runs_in_a_kernel(tmp_path, monkeypatch):
    """What Jupyter adds fails nowhere else: magics, figures as outputs, its own warnings. nbclient raises a cell's own error."""
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # The kernel that is running these tests, not whichever one is registered as python3 for the user
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")
    notebook = read(FOLDER / f"{THROUGH_A_KERNEL}.ipynb")
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    assert not list(tmp_path.iterdir()), "the notebook writes beside itself: use a temporary folder"
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    stderr = [output.text for output in outputs if output.get("name") == "stderr"]
    assert not stderr, f"warnings that a reader would wonder about: {stderr[0][:300]}"
    assert [output for output in outputs if "image/png" in output.get("data", {})], "its figure is not shown"
