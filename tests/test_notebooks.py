"""A notebook is documentation that claims to have been run: it must still run, and show that it did."""

import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
# Folders of whoever ran it last; the start of the word keeps "https://" and "and/or" out
ABSOLUTE_PATH = re.compile(r"(?<![\w/.:<])(/(home|Users|root|work|mnt|tmp|var|opt|usr|private)/|[A-Z]:\\)|(?<!\w)~/")
LARGEST = 400_000  # bytes; figures are the bulk, and every version of them stays in the repository's history


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def shown(cell):
    """What a reader sees of a cell's outputs as text; images are not text."""
    for output in cell.outputs:
        yield output.get("text", "")
        yield from (str(value) for kind, value in output.get("data", {}).items() if not kind.startswith("image/"))


def test_there_are_notebooks():
    """An empty list of parameters passes every test below."""
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_outputs_are_whole_and_clean(path):
    """Half-run notebooks show numbers that no run produced; outputs with paths tell whose machine it was."""
    notebook = read(path)
    assert [cell.execution_count for cell in code_cells(notebook)] == list(range(1, len(code_cells(notebook)) + 1))
    assert any(cell.outputs for cell in code_cells(notebook)), "no output is committed"
    assert path.stat().st_size < LARGEST
    for cell in code_cells(notebook):
        assert not [o for o in cell.outputs if o.output_type == "error" or o.get("name") == "stderr"], cell.source
        for text in shown(cell):
            found = ABSOLUTE_PATH.search(text)
            assert found is None, f"an output shows a path of a machine: {text[found.start() :][:80]!r}"


@pytest.mark.launch
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path, monkeypatch):
    """An interface that changed leaves a notebook that fails in its reader's hands. nbclient raises the cell's own error."""
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # The kernel that is running these tests, not whichever one is registered as python3 for the user
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")
    notebook = read(path)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    assert not list(tmp_path.iterdir()), "the notebook writes beside itself: use a temporary folder"
    stderr = [o.text for cell in code_cells(notebook) for o in cell.outputs if o.get("name") == "stderr"]
    assert not stderr, f"warnings that a reader would wonder about: {stderr[0][:300]}"
