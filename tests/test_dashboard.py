"""The W&B dashboard: it is saved as built, and every metric it asks for is one that the recipe's runs log."""

import csv
import importlib
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import yaml
from transformers import RobertaForMaskedLM, RobertaForSequenceClassification, ViTImageProcessorPil

import launching
from hfkd.models.two_view_mae import ViTMAEForPreTraining
from hfkd.testing import tiny_roberta_config, tiny_tokenizer, tiny_vit_mae_config
from wandb_records import read_runs, series

pytest.importorskip("wandb_workspaces")
HERE = Path(__file__).resolve().parent
RECIPES = HERE.parent / "recipes"
# Programs that train but show no training of their own: searches and studies of other recipes' settings, and what they import
HAVE_PANELS = {
    *("train_teacher", "train_ensemble", "distill_text", "distill_image", "compare", "teachers_pet", "deviations"),
    *("eigenspace", "role_models", "loss_switch", "self_distill_roberta", "self_distill_vit", "mc_distil"),
}


@pytest.fixture(scope="module")
def dashboard():
    sys.path.insert(0, str(RECIPES))
    yield importlib.import_module("wandb_dashboard")
    sys.path.remove(str(RECIPES))


# ---- saved ----


class Stub(ThreadingHTTPServer):
    """The two operations of GraphQL that a view is saved with, and what it was saved as."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.views = []
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Answer(BaseHTTPRequestHandler):
    server: Stub

    def do_POST(self):
        asked = (
            json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}") if "graphql" in self.path else {}
        )
        query, answer = asked.get("query", ""), {}
        if "UpsertView" in query:
            self.server.views.append(asked["variables"])
            answer = {"upsertView": {"view": {"id": "v", "name": "nw-v"}, "inserted": True}}
        elif "viewer" in query.lower():
            answer = {"viewer": {"id": "u", "username": "me", "entity": "me", "flags": "{}", "teams": {"edges": []}}}
        body = json.dumps({"data": answer}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    import wandb

    stub = Stub()
    for name in ("WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{stub.server_port}")
    monkeypatch.setenv("WANDB_API_KEY", "local" + 40 * "0")
    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb.teardown()
    yield stub
    wandb.teardown()
    stub.shutdown()


def asked_for(spec):
    """Every metric that a saved view names, whatever panel it stands in."""
    if isinstance(spec, dict):
        return set().union(*(asked_for(value) for value in spec.values()))
    if isinstance(spec, list):
        return set().union(*(asked_for(value) for value in spec))
    return {spec} if isinstance(spec, str) and spec.startswith(("train/", "eval/", "test/")) else set()


def metrics_of(dashboard, recipe):
    return {name for metrics in dashboard.PANELS[recipe].values() for name in dashboard.named(metrics)}


def test_the_dashboard_is_saved_as_it_was_built(dashboard, server, capsys):
    """A view that is built and never arrives, or that lost its panels on the way, is an empty page."""
    dashboard.main(["--entity", "me", "--project", "study"])
    (view,) = server.views
    assert (view["entityName"], view["projectName"], view["displayName"]) == ("me", "study", "Distillation")
    expected = set().union(*(metrics_of(dashboard, recipe) for recipe in dashboard.PANELS))
    spec = json.loads(view["spec"])
    assert asked_for(spec) - {dashboard.STEP} == expected
    names = [section["name"] for section in spec["section"]["panelBankConfig"]["sections"]]
    wanted = [f"{recipe}: {title}" for recipe, sections in dashboard.PANELS.items() for title in sections]
    assert [name for name in names if ":" in name] == wanted
    assert "study" in capsys.readouterr().out


def test_it_is_printed_without_a_network(dashboard, monkeypatch, capsys):
    """A look at what would be saved must not need an account."""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    dashboard.main(["--entity", "me", "--project", "study", "--recipes", "compare", "--print"])
    printed = json.loads(capsys.readouterr().out)
    assert asked_for(printed) - {dashboard.STEP} == metrics_of(dashboard, "compare")


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--recipes", "distil_text"], "--recipes distil_text: choose among"), ([], "there is no W&B key")],
)
def test_wrong_inputs_end_in_a_sentence(dashboard, monkeypatch, tmp_path, words, message):
    """A stack of calls through W&B's client says nothing about a misspelt recipe."""
    import wandb

    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    wandb.teardown()
    with pytest.raises(SystemExit, match=message):
        dashboard.main(["--entity", "me", "--project", "study", *words])


def test_every_recipe_that_trains_has_panels(dashboard):
    """A recipe that nobody remembered is watched by nobody."""
    assert set(dashboard.PANELS) == HAVE_PANELS
    programs = {path.stem for path in RECIPES.glob("*.py") if 'if __name__ == "__main__"' in path.read_text()}
    assert programs >= HAVE_PANELS


# ---- what it asks for is logged ----


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A text model, files for it, and an autoencoder of 8 x 8 pictures."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    RobertaForSequenceClassification(tiny_roberta_config(num_hidden_layers=1)).save_pretrained(folder / "classifier")
    RobertaForMaskedLM(tiny_roberta_config(num_hidden_layers=1)).save_pretrained(folder / "masked")
    ViTMAEForPreTraining(tiny_vit_mae_config(num_hidden_layers=1)).save_pretrained(folder / "mae")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder / "mae")
    for name in ("classifier", "masked"):
        tiny_tokenizer().save_pretrained(folder / name)
    for name, count in (("train", 24), ("test", 24)):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            rows = [[f"w{5 + i % 40} w{5 + 7 * i % 40}", ("bad", "good")[i % 2]] for i in range(count)]
            csv.writer(file).writerows([["text", "label"], *rows])
    setting = {"task": "digits", "image_size": 8, "teacher_config": SMALL, "student_config": SMALL, "alpha": 0.5}
    (folder / "deviations_digits.yaml").write_text(yaml.safe_dump({**setting, "save_strategy": "no"}))
    return folder


SMALL = "resnet10-xxxs"


def words_of(recipe, tiny):
    """The smallest run that shows all the recipe has."""
    texts = {"train_file": tiny / "train.csv", "test_file": tiny / "test.csv", "max_length": 16}
    taught = {**texts, "teacher_start": tiny / "classifier", "student_layers": 1, "alpha": 0.5, "seeds": 1}
    digits = {"task": "digits", "image_size": 8, "per_device_eval_batch_size": 64}
    images = {**digits, "teacher_config": SMALL, "student_config": SMALL, "seeds": 1}
    rounds = {"num_rounds": 1, "fine_tuning_seeds": 0}
    return {
        "train_teacher": {**texts, "model_name_or_path": tiny / "classifier"},
        "train_ensemble": {**digits, "network": SMALL, "members": 1, "validation_share": 0},
        "distill_text": taught,
        "compare": {**taught, "alpha": None, "objectives": "kd:alpha=0.5"},
        "distill_image": {**images, "alpha": 0.5},
        "teachers_pet": {**images, "ratio": 4, "dev_examples": 20, "temperatures": 1, "methods": "kd"},
        "deviations": {"settings": tiny / "deviations_digits.yaml", "seeds": 1, "bootstrap": 10},
        "eigenspace": {**digits, "widths": [12, 10, 4], "directions": [1, 4], "drawn": [1, 4], "learning_rates": [0.1, 0.2, 0.05],
                       "seeds": 1},
        "role_models": {**images, "teacher_rows": 40, "pool_rows": 20, "teachers": 1, "num_train_epochs": 1},
        "loss_switch": {**images, "teacher_epochs": 1, "window": 1, "num_train_epochs": 1, "max_steps": 4, "train_rows": 64,
                        "evaluation_rows": 64, "temperature": 2, "alpha": 1},
        "self_distill_roberta": {**texts, **rounds, "model_name_or_path": tiny / "masked"},
        "self_distill_vit": {"task": "digits", **rounds, "unlabelled_rows": 32, "dataloader_num_workers": 0,
                             "model_name_or_path": tiny / "mae"},
        "mc_distil": {**digits, "train_rows": 40, "meta_rows": 20, "evaluation_rows": 20, "corruption_rows": 10,
                      "teacher_config": "resnet10-xxs", "students": [SMALL, "resnet10-xxs", "resnet10-xs"],
                      "methods": "mc_distil", "seeds": 1, "num_train_epochs": 1, "coordinator_interval": 1},
    }[recipe]  # fmt: skip


COMMON = {
    "max_steps": 2,
    "per_device_train_batch_size": 16,
    "logging_steps": 1,
    "disable_tqdm": True,
    "save_strategy": "no",
}


def flags(**values):
    words = []
    for name, value in values.items():
        words += [] if value is None else [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


@pytest.fixture(scope="module")
def tracked(tiny, tmp_path_factory):
    """The folder of all recipes' runs."""
    folder = tmp_path_factory.mktemp("tracked")
    ours = {"report_to": "wandb", **COMMON}
    words = {
        recipe: flags(**{**ours, **words_of(recipe, tiny), "output_dir": folder / recipe / "study"})
        for recipe in sorted(HAVE_PANELS)
    }
    (folder / "words.json").write_text(json.dumps(words))
    done = launching.run(HERE / "tracked_recipes.py", str(folder), log=folder, timeout=550)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.launch
@pytest.mark.parametrize("recipe", sorted(HAVE_PANELS))
def test_the_runs_of_a_recipe_hold_what_its_panels_ask_for(dashboard, tracked, recipe):
    """A panel of a metric that nobody logs stays empty for ever, and looks like a run that has only begun."""
    error = tracked / recipe / "error.txt"
    assert not error.exists(), error.read_text()[-3000:]
    runs = read_runs(tracked / recipe / "tracked")
    logged = set().union(*(run["names"] for run in runs))
    asked = metrics_of(dashboard, recipe)
    assert asked <= logged, f"asked for {sorted(asked - logged)}, logged are {sorted(logged)}"
    names = [run["run"] for run in runs]
    assert all(group == ("digits" if recipe == "deviations" else "study") and kind for _, group, kind, _ in names)
    assert len(set(names)) == len(names), "every training is a run of its own"
    for run in runs:
        steps = [step for step, _ in series(run, "train/loss")]
        assert steps == sorted(set(steps)), "two trainings in one run"
