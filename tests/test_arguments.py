"""The same fields in Python, as flags and in YAML: files first, flags win, typing errors are errors."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from hfkd.trainers import arguments
from hfkd.trainers.arguments import DistillationArguments, SelfDistillationArguments, parse_arguments

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
CONFIGS = sorted((RECIPES / "configs").glob("*.yaml"))
CONFIGS = [
    path for path in CONFIGS if not path.stem.startswith(("student_", "image_", "mae_"))
]  # sizes of models, no arguments


@dataclass
class Settings:
    """A recipe's own small dataclass, one field of each kind."""

    weight: float = field(default=1.0, metadata={"help": "A number."})
    rows: int | None = field(default=None, metadata={"help": "A number or none."})
    name: str = field(default="plain", metadata={"help": "A string."})
    steps: list[int] = field(default_factory=list, metadata={"help": "Numbers."})
    overwrite: bool = field(default=False, metadata={"help": "A switch."})


@pytest.fixture
def config(tmp_path):
    def write(text: str, name: str = "config.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


def parse(*flags: str, defaults: Path | None = None) -> Settings:
    (settings,) = parse_arguments(Settings, arguments=flags, defaults=defaults)
    return settings


# ---- our fields and defaults ----


def test_defaults_of_ours(tmp_path):
    """The stock NaN filter reports a finite loss for a run that is already dead."""
    args = DistillationArguments(output_dir=str(tmp_path))
    assert args.logging_nan_inf_filter is False
    assert args.ddp_find_unused_parameters is False
    assert args.data_seed == args.seed == 42
    assert DistillationArguments(output_dir=str(tmp_path), seed=3).data_seed == 3
    assert DistillationArguments(output_dir=str(tmp_path), seed=3, data_seed=5).data_seed == 5


def test_defaults_of_rounds(tmp_path):
    """One round, the first token, both terms, no clipping: the authors' code; another default is another method."""
    args = SelfDistillationArguments(output_dir=str(tmp_path))
    assert (args.num_rounds, args.feature, args.no_pretrain_loss, args.max_grad_norm) == (1, "cls", False, 0.0)
    assert DistillationArguments(output_dir=str(tmp_path)).max_grad_norm == 1.0


def test_every_field_of_ours_has_a_help_text():
    """A flag without help is found by reading the source."""
    stock = {f.name for f in dataclasses.fields(DistillationArguments.__base__)}
    for kind in (DistillationArguments, SelfDistillationArguments):
        for entry in dataclasses.fields(kind):
            assert entry.name in stock or entry.metadata.get("help"), entry.name


def test_use_cpu_on_this_machine(tmp_path):
    """Without it, a plain torchrun line on a CPU machine starts independent runs that write into one folder."""
    args = DistillationArguments(output_dir=str(tmp_path))
    assert args.use_cpu == arguments.accelerator_is_absent()
    if not torch.accelerator.is_available() and importlib.util.find_spec("torch_xla") is None:
        assert args.use_cpu is True


@pytest.mark.parametrize("absent", [True, False])
def test_use_cpu_follows_the_accelerator(absent, monkeypatch, tmp_path):
    """Always on, it would leave a GPU idle for a whole study."""
    monkeypatch.setattr(arguments, "accelerator_is_absent", lambda: absent)
    assert DistillationArguments(output_dir=str(tmp_path)).use_cpu is absent
    assert DistillationArguments(output_dir=str(tmp_path), use_cpu=True).use_cpu is True


def test_negative_rounds_are_refused(tmp_path):
    """range(-1 + 1) trains nothing and reports success."""
    with pytest.raises(ValueError, match=r"num_rounds must be 0.*got -1"):
        SelfDistillationArguments(output_dir=str(tmp_path), num_rounds=-1)
    assert SelfDistillationArguments(output_dir=str(tmp_path), num_rounds=0).num_rounds == 0


# ---- files and flags ----


def test_flags_win_over_the_file_and_the_file_over_defaults(config):
    """A file that wins over a flag makes every line of a sweep the same run."""
    defaults = config("weight: 2.0\nname: default\nrows: 7\n", "defaults.yaml")
    path = config("weight: 3.0\nname: file\n")
    assert dataclasses.astuple(parse(defaults=defaults)) == (2.0, 7, "default", [], False)
    assert dataclasses.astuple(parse("--config", str(path), defaults=defaults)) == (3.0, 7, "file", [], False)
    flags = parse("--config", str(path), "--weight", "4", defaults=defaults)
    assert dataclasses.astuple(flags) == (4.0, 7, "file", [], False)
    early = parse("--weight=4", f"--config={path}", defaults=defaults)
    assert early == flags


def test_without_files_the_fields_keep_their_defaults():
    """A parser that demands a file would break every notebook."""
    assert parse() == Settings()
    assert parse("--name", "flag") == Settings(name="flag")


@pytest.mark.parametrize("number", ["1e-4", "1.0e-4", "0.0001", "1E-4"])
def test_numbers_without_a_point_are_numbers(config, number):
    """YAML reads 1e-4 as a string; kept as one, the optimizer fails after the data was tokenized."""
    weight = parse("--config", str(config(f"weight: {number}\n"))).weight
    assert isinstance(weight, float) and weight == 1e-4


def test_types_of_values_from_a_file(config):
    """A number that stays a string, or a string that becomes a number, fails far from the file."""
    found = parse("--config", str(config("weight: 2\nrows: 12\nname: 123\nsteps: [3, 4]\noverwrite: true\n")))
    assert dataclasses.astuple(found) == (2.0, 12, "123", [3, 4], True)
    assert type(found.weight) is float and type(found.rows) is int
    assert parse("--config", str(config("rows: null\nsteps: []\noverwrite: 'false'\n"))) == Settings()


def test_switches_and_lists_as_flags(config):
    """A switch that a file sets must still be one that a flag can take back."""
    path = str(config("overwrite: true\nsteps: [3, 4]\n"))
    assert parse("--config", path, "--overwrite", "false").overwrite is False
    assert parse("--overwrite").overwrite is True
    assert parse("--config", path, "--steps", "5", "6", "7").steps == [5, 6, 7]


def test_unknown_keys_of_a_file_are_errors_with_the_nearest_known(config):
    """A mistyped key that is ignored runs the whole study with the default."""
    with pytest.raises(ValueError, match=r"unknown key 'wieght' \(known and near: .*weight"):
        parse("--config", str(config("wieght: 3.0\n")))
    with pytest.raises(ValueError, match=r"'zzzzzz' .*nothing alike"):
        parse("--config", str(config("zzzzzz: 3.0\n")))


@pytest.mark.parametrize("flags", [("--wieght", "3"), ("--weig", "3")])
def test_unknown_flags_are_errors(flags):
    """A mistyped flag that is ignored runs the whole study with the default."""
    with pytest.raises(ValueError, match=flags[0]):
        parse(*flags)


def test_an_abbreviated_config_flag_is_not_swallowed(config):
    """--conf taken for --config by one parser and not read by the other would run with the defaults."""
    with pytest.raises(ValueError, match="--conf"):
        parse("--conf", str(config("weight: 3.0\n")))


def test_a_missing_file_is_an_error_that_names_it(tmp_path):
    """A mistyped path must not run the defaults."""
    with pytest.raises(ValueError, match=r"nowhere\.yaml: there is no such file"):
        parse("--config", str(tmp_path / "nowhere.yaml"))


def test_a_file_that_is_no_mapping_is_refused(config):
    """A list in the file would fail inside yaml's caller without naming the file."""
    with pytest.raises(ValueError, match=r"config\.yaml must hold .* not a list"):
        parse("--config", str(config("- weight\n")))
    assert parse("--config", str(config("# nothing yet\n"))) == Settings()


def test_a_file_can_give_what_has_no_default(config):
    """A parser that still demands the flag makes the file useless for exactly the fields that matter most."""

    @dataclass
    class Demanding:
        folder: str = field(metadata={"help": "Has no default."})

    path = str(config("folder: here\n"))
    assert parse_arguments(Demanding, arguments=["--config", path])[0].folder == "here"
    assert parse_arguments(Demanding, arguments=["--config", path, "--folder", "there"])[0].folder == "there"
    with pytest.raises(SystemExit):
        parse_arguments(Demanding, arguments=[])


def test_two_dataclasses_share_one_file(config, tmp_path):
    """A key must reach the dataclass that has it, whichever of them that is."""
    path = config(f"output_dir: {tmp_path}\nnum_rounds: 2\nlearning_rate: 2e-5\nweight: 5.0\nfeature: mean\n")
    settings, args = parse_arguments(Settings, SelfDistillationArguments, arguments=["--config", str(path)])
    assert settings.weight == 5.0
    assert (args.num_rounds, args.learning_rate, args.feature) == (2, 2e-5, "mean")


# ---- the recipes' files ----


def recipe_of(path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of the recipe whose name the file's name begins with."""
    scripts = [script for script in RECIPES.glob("*.py") if path.stem.startswith(script.stem)]
    assert scripts, f"{path.name} belongs to no recipe"
    script = max(scripts, key=lambda script: len(script.stem))
    monkeypatch.syspath_prepend(str(RECIPES))
    spec = importlib.util.spec_from_file_location(script.stem, script)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, script.stem, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def readers(recipe: Any, path: Path) -> list[type]:
    """The dataclasses that this file fills: in some recipes they depend on whether it is about texts or images."""
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    kind = getattr(recipe, "SelfDistillationArguments", DistillationArguments)
    if recipe.__name__ == "deviations" and "settings" in values:
        return [recipe.RecipeArguments]  # a list of settings, which are files of their own
    if recipe.__name__ == "deviations":
        study = sys.modules["deviation_study"]
        return [study.SETTINGS[study.modality_of(path)][0], kind]
    if recipe.__name__ in ("role_models", "train_ensemble"):
        prefix = "Text" if recipe.about_texts(["--config", str(path)]) else "Image"
        return [getattr(recipe, f"{prefix}{'Role' if recipe.__name__ == 'role_models' else 'Ensemble'}Arguments"), kind]
    if recipe.__name__ == "mc_distil":
        prefix = "Text" if recipe.about_texts(["--config", str(path)]) else "Image"
        return [getattr(recipe, f"{prefix}McArguments"), recipe.CollaborativeArguments]
    return [recipe.RecipeArguments, kind]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_file_of_the_recipes_reaches_the_fields(path, monkeypatch, tmp_path):
    """A config that no longer parses is found by the first user who runs the README's command."""
    recipe = recipe_of(path, monkeypatch)
    monkeypatch.chdir(tmp_path)
    parsed = parse_arguments(*readers(recipe, path), arguments=["--config", str(path)])
    for name, value in yaml.safe_load(path.read_text(encoding="utf-8")).items():
        found = getattr(next(fields for fields in parsed if hasattr(fields, name)), name)
        found = getattr(found, "value", found)  # transformers' enums
        assert same(found, value), name


def same(found, value):
    if isinstance(found, list):
        given = value if isinstance(value, list) else [value]
        return len(found) == len(given) and all(map(same, found, given))
    if isinstance(found, dict):
        return found == (yaml.safe_load(value) if isinstance(value, str) else value)
    return str(found) == str(value) or float(found) == float(value)


def test_there_are_files_to_check():
    """A moved folder would turn the test above into none."""
    assert len(CONFIGS) >= 3
