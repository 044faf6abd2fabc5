"""What must never import what, and what `import hfkd` must not cost."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import hfkd

PACKAGE = Path(hfkd.__file__).resolve().parent
REPOSITORY = PACKAGE.parent
EVERYTHING = ("",)

# Row: a module or folder of hfkd. It may import from hfkd what is named here; a folder may import its own files.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "": (),  # the public names, loaded when they are first used
    "functional": (),
    "outputs": (),
    "data": (),
    "models": ("outputs",),
    "lookahead": (),
    "meta": ("functional", "outputs"),
    "redaction": (),
    "citations": (),
    "manifest": ("records",),
    "card_words": ("redaction",),
    "cards": ("card_words", "redaction", "citations"),
    "publishable": ("cards", "redaction", "manifest", "records"),
    "hub": ("cards", "publishable", "manifest", "records"),
    "memory": (),
    "hub_server": (),
    "evaluation": EVERYTHING,
    "doctor": EVERYTHING,
    "cli": EVERYTHING,
    "objectives": ("functional", "outputs"),
    "teachers": ("outputs", "functional", "models.projections", "models.cifar_resnet"),
    "cache": ("teachers", "outputs", "fingerprint", "records"),
    "fingerprint": (),
    "records": (),
    "regularized": ("functional", "outputs", "objectives"),
    "diagnostics": (
        *("functional", "outputs", "teachers", "fingerprint", "records", "publishable", "data.collate", "data.pixels"),
    ),
    "testing": EVERYTHING,
    "trainers": (
        *("objectives", "teachers", "hub", "cards", "manifest", "outputs", "functional"),
        *("models.projections", "models.two_view_mae"),
        *("lookahead", "meta", "models.student_group"),
        *("records", "fingerprint", "cache", "data.masked_images"),
        *("data.collate", "data.pixels", "data.rows", "data.sampler", "data.text"),
        *("diagnostics.callback", "diagnostics.trackers", "diagnostics.cost"),
    ),
}
MUST_NOT_IMPORT = {"testing": ("trainers",)}
ONLY_IN = {
    "huggingface_hub": ("hub", "cards", "hub_server"),
    "matplotlib": ("diagnostics.plots",),
    "wandb": ("diagnostics.trackers",),
    "tensorboard": ("diagnostics.trackers",),
    "trackio": ("diagnostics.trackers",),
    "recipes": (),
    "tests": (),
    "notebooks": (),
}
SAYS_NOTHING = {"utils", "util", "base", "common", "helpers", "misc", "core"}
# Each makes the host wait for the device, or fails on another accelerator
HOST_SYNCS = {"cuda", "item", "tolist", "numpy", "cpu"}


def name_of(path: Path) -> str:
    """hfkd/data/collate.py -> data.collate; hfkd/data/__init__.py -> data; hfkd/__init__.py -> the empty name."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def lies_in(module: str, place: str) -> bool:
    return place == "" or module == place or module.startswith(place + ".")


def row_of(module: str) -> str | None:
    top = module.split(".")[0]
    return top if top in MAY_IMPORT else None


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports(tree: ast.AST, package: str, *, type_checking: bool = True) -> Iterator[str]:
    """Absolute names of everything imported below `tree`, also inside functions. `package` resolves relative imports."""
    for node in ast.iter_child_nodes(tree):
        if is_type_checking(node) and not type_checking:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                module = ".".join([*above, module] if module else above)
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in (
            "import_module",
            "__import__",
        ):
            yield from (
                word.value for word in node.args if isinstance(word, ast.Constant) and isinstance(word.value, str)
            )
        yield from imports(node, package, type_checking=type_checking)


def package_of(module: str, path: Path) -> str:
    """The package that a relative import in this file starts from."""
    whole = f"hfkd.{module}".rstrip(".")
    return whole if path.name == "__init__.py" else whole.rpartition(".")[0]


def imports_of(module: str) -> set[str]:
    path = FILES[module]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return set(imports(tree, package_of(module, path), type_checking=module != ""))


def own_imports(module: str) -> set[str]:
    """The modules of hfkd that a module imports; a name that a module defines counts as that module."""
    found = set()
    for name in imports_of(module):
        top, _, rest = name.partition(".")
        if top == "hfkd":
            while rest and rest not in FILES:
                rest = rest.rpartition(".")[0]
            found.add(rest)
    return found


# ---- the table ----


@pytest.mark.parametrize("module", FILES, ids=lambda module: module or "hfkd")
def test_imports_keep_to_the_table(module):
    """An objective that imports a trainer, or a loss that imports a model, can no longer be tested or read alone."""
    row = row_of(module)
    assert row is not None, f"hfkd/{module}.py has no row in MAY_IMPORT: decide what it may import"
    allowed = [*MAY_IMPORT[row], *([row] if row else [])]
    for imported in own_imports(module):
        # "" as an import is the package root, which would load any layer; only `testing` may reach everything
        good = any(lies_in(imported, place) for place in allowed) and (imported != "" or "" in allowed)
        assert good, f"hfkd.{module} imports hfkd.{imported}; it may import {allowed}"
        assert not any(lies_in(imported, place) for place in MUST_NOT_IMPORT.get(row, ())), f"{module}: {imported}"


def test_every_row_is_of_a_module_that_exists():
    """A row for a module that is gone permits what nobody decided."""
    tops = {module.split(".")[0] for module in FILES}
    assert set(MAY_IMPORT) <= tops


@pytest.mark.parametrize("module", FILES, ids=lambda module: module or "hfkd")
def test_outside_packages_stay_in_their_one_place(module):
    """A second huggingface_hub import is a second way to push tokens; matplotlib makes `import hfkd` need a font cache."""
    tops = {name.split(".")[0] for name in imports_of(module)}
    for package, places in ONLY_IN.items():
        assert package not in tops or module in places, f"hfkd.{module} imports {package}; only {places} may"


def test_the_checks_above_see_every_kind_of_import():
    """An import inside a function, relative or by name that slips through makes the table a decoration."""
    source = (
        "import hfkd.trainers.arguments as a\n"
        "from hfkd import hub\n"
        "from hfkd.data.collate import IGNORED\n"
        "def late():\n    from ..teachers import Teacher\n    from . import objective\n"
        "class Inner:\n    def f(self):\n        import matplotlib.pyplot\n"
        "m = importlib.import_module('hfkd.regularized')\n"
        "if TYPE_CHECKING:\n    from hfkd.testing import Case\n"
    )
    found = set(imports(ast.parse(source), "hfkd.objectives"))
    assert found == {
        "hfkd.trainers.arguments",
        "hfkd.hub",
        "hfkd.data.collate.IGNORED",
        "hfkd.teachers.Teacher",
        "hfkd.objectives.objective",
        "matplotlib.pyplot",
        "hfkd.regularized",
        "hfkd.testing.Case",
    }
    without = set(imports(ast.parse(source), "hfkd.objectives", type_checking=False))
    assert found - without == {"hfkd.testing.Case"}


# ---- names and calls ----


def test_no_file_has_a_name_that_says_nothing():
    """What lies in utils.py is found by searching, and everything ends up there."""
    places = [FILES.values(), *((REPOSITORY / name).rglob("*.py") for name in ("recipes", "tests"))]
    odd = [path for paths in places for path in paths if {path.stem, path.parent.name} & SAYS_NOTHING]
    assert not odd


@pytest.mark.parametrize("top", ["objectives", "models", "teachers"])
def test_no_host_sync_in_a_training_step(top):
    """One .item() in a loss makes the host wait for the device in every step, and .cuda() refuses every other device."""
    modules = [module for module in FILES if row_of(module) == top]
    assert modules
    for module in modules:
        for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                assert node.func.attr not in HOST_SYNCS, f"hfkd/{module}.py:{node.lineno}: .{node.func.attr}()"


# ---- the package root ----


def test_importing_hfkd_loads_nothing_heavy():
    """`import hfkd` in a command line that prints its help must not cost seconds of torch."""
    code = "import hfkd, sys; hfkd.__version__; dir(hfkd); print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in run.stdout.split()}
    assert "hfkd" in loaded
    assert not loaded & {"torch", "transformers", "datasets", "numpy", "matplotlib", "huggingface_hub"}
    assert [name for name in run.stdout.split() if name.startswith("hfkd")] == ["hfkd"]


@pytest.mark.parametrize("name", hfkd.__all__)
def test_every_public_name_resolves(name):
    """A lazy name is only found to be wrong by the user who needs it."""
    found = getattr(hfkd, name)
    assert name in dir(hfkd)
    assert name == "__version__" or found.__name__ == name


def test_editors_see_the_names_that_are_loaded_late():
    """A name missing under TYPE_CHECKING is Any for every type checker and has no completion."""
    tree = ast.parse(FILES[""].read_text(encoding="utf-8"))
    both = set(imports(tree, "hfkd"))
    typed = {name for name in both - set(imports(tree, "hfkd", type_checking=False)) if name.startswith("hfkd.")}
    assert typed == {f"{home}.{name}" for name, home in hfkd._HOME.items()}


def test_an_unknown_name_is_an_error_that_lists_the_known_ones():
    """`from hfkd import KD` must say what there is."""
    with pytest.raises(AttributeError, match=r"'KnowledgeDistiller'.*SelfDistill"):
        _ = hfkd.KnowledgeDistiller
