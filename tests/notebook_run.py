"""The code cells of a notebook, one after the other in one namespace, without a kernel: its imports alone take seconds.

python tests/notebook_run.py NOTEBOOK FOLDER

FOLDER is where it runs. Ends with an error where a cell does, and where something was written to stderr.
"""

import contextlib
import io
import os
import sys

import nbformat


def run(notebook: str, folder: str) -> None:
    os.chdir(folder)
    warned = io.StringIO()
    namespace = {"__name__": "__main__"}
    with contextlib.redirect_stderr(warned):
        for number, cell in enumerate(nbformat.read(notebook, as_version=4).cells):
            if cell.cell_type == "code":
                lines = ["" if line.startswith("%") else line for line in cell.source.splitlines()]  # IPython's own
                exec(compile("\n".join(lines), f"cell {number}", "exec"), namespace)
    if warned.getvalue():
        raise SystemExit(f"warnings that a reader would wonder about: {warned.getvalue()[:300]}")


if __name__ == "__main__":
    run(*sys.argv[1:])
