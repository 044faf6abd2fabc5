"""What the trackers are told, read back from what they have written; nothing here reaches a network."""

import json
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers.integrations import TensorBoardCallback, WandbCallback
from watched_run import classifier, logged, rows, watched

from hfkd import KD, DistillationArguments, DistillationTrainer
from hfkd.diagnostics.trackers import (
    NO_KEY,
    TensorBoardRun,
    WandbRun,
    log_figure,
    log_table,
    refuse_without_key,
    replace_stock,
    run_name,
)
from hfkd.records import weights_hash
from hfkd.testing import tiny_tokenizer
from rounds_run import rounds_trainer
from switch_run import switch_trainer
from wandb_records import read_runs, series

wandb = pytest.importorskip("wandb")


@contextmanager
def offline_runs(folder):
    """Runs go into `folder`; the call of what this gives ends the last one and reads all of them back."""

    def close():
        wandb.finish()
        wandb.teardown()  # the last lines are written by another process
        return read_runs(folder)

    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WANDB_NAME", "WANDB_RUN_GROUP", "WANDB_JOB_TYPE", "WANDB_PROJECT", "WANDB_LOG_MODEL"):
            patch.delenv(name, raising=False)
        for name, value in (("WANDB_DIR", str(folder)), ("WANDB_MODE", "offline"), ("WANDB_SILENT", "true")):
            patch.setenv(name, value)
        wandb.teardown()  # else it keeps the environment of the test before
        try:
            yield close
        finally:
            wandb.finish()
            wandb.teardown()


@pytest.fixture
def offline(tmp_path):
    with offline_runs(tmp_path / "tracked") as close:
        yield close


# ---- W&B ----


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trainer that was watched, the run read back, and where it lies."""
    folder = tmp_path_factory.mktemp("run")
    with offline_runs(folder / "tracked") as close:
        trainer = watched(folder / "run", report_to="wandb", logging_steps=1, run_name="study/kd/seed-0")
        (found,) = close()
    return trainer, found, folder / "tracked"


def test_a_run_holds_every_term_and_the_schedule(run):
    """A term that reaches the console only is missing from every comparison of runs."""
    trainer, found, _ = run
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 5
    for name in ("loss", "task_loss", "distill_loss", "learning_rate"):
        assert series(found, f"train/{name}") == [(entry["step"], entry[name]) for entry in entries]
    assert series(found, "train/alpha") == [(step, 0.5) for step in range(1, 6)]
    assert [step for step, _ in series(found, "eval/loss")] == [1, 2, 3, 4, 5]
    assert series(found, "train/loss")[0][1] == pytest.approx(
        series(found, "train/task_loss")[0][1] + series(found, "train/distill_loss")[0][1]
    )


def test_a_run_holds_the_fidelity_report(run):
    """Agreement and slope beside the loss say whether a falling loss is a better copy; a table of classes, who pays for it."""
    trainer, found, _ = run
    for name in ("agreement", "slope", "worst_class_difference"):
        expected = [(entry["step"], entry[f"eval_fidelity_{name}"]) for entry in logged(trainer)]
        assert len(expected) == 2 and series(found, f"eval/fidelity_{name}") == expected
    tables = [value for _, value in series(found, "eval/fidelity_classes")]
    assert [table["nrows"] for table in tables] == [3, 3] and tables[0]["ncols"] == 6
    for name in ("reliability", "logit_logit"):
        assert [step for step, _ in series(found, f"eval/fidelity_{name}")] == [2, 4]


def test_the_table_has_the_classes_worst_change_first(run):
    """Numbers beside the wrong class's name accuse the wrong one."""
    trainer, _, folder = run
    report = next(c.last for c in trainer.callback_handler.callbacks if hasattr(c, "last"))
    table = json.loads(max(folder.rglob("*.table.json"), key=lambda path: path.stat().st_ctime_ns).read_text())
    assert table["columns"] == ["class", "rows", "student", "teacher", "difference", "agreement"]
    assert [row[4] for row in table["data"]] == sorted(part.difference for part in report.classes)
    assert {row[0]: row[2] for row in table["data"]} == pytest.approx({p.name: p.student for p in report.classes})


def test_the_config_says_who_taught_by_what(run):
    """A run whose teacher nobody can name is of no use a year later."""
    trainer, found, _ = run
    assert found["run"] == ("kd/seed-0", "study", "kd", "huggingface")
    assert found["config"]["teacher"]["weights"] == [weights_hash(trainer.teacher.model.state_dict())]
    assert found["config"]["teacher"]["kind"] == "ModelTeacher" and found["config"]["teacher"]["dtype"] == "float64"
    objective = found["config"]["objective"]
    assert objective["name"] == "KD" and objective["settings"] == trainer._objective.settings()
    assert objective["equation"] == KD().equation and objective["paper"] == "1503.02531"
    assert found["config"]["learning_rate"] == 1e-2, "the arguments stay"


def test_a_switch_shows_its_window(offline, tmp_path):
    """Without the window in the run, its jump in the loss looks like an accident."""
    switch_trainer(tmp_path / "run", {"report_to": "wandb"}, "kd_to_labels").train()
    (found,) = offline()
    weights, alphas = (dict(series(found, f"train/{name}")) for name in ("switch_weight", "alpha"))
    assert weights == pytest.approx({1: 0, 2: 0, 3: 1 / 3, 4: 2 / 3, 5: 1, 6: 1})
    assert alphas == pytest.approx({step: 1 - weight for step, weight in weights.items()})
    gone = [step for step, value in series(found, "train/first_distill_loss") if value == 0]
    assert gone == [5, 6], "the weight that is logged is that of the term beside it"


def test_rounds_are_runs_of_one_group(offline, tmp_path):
    """Rounds in one run draw their curves over each other, and the later ones seem to start from nothing."""
    rounds_trainer(
        tmp_path / "texts", {"num_rounds": 1, "max_steps": 2, "save_strategy": "no", "report_to": "wandb"}
    ).train()
    first, second = offline()
    assert first["run"][:3] == ("round-0", "texts", "round") and second["run"][:3] == ("round-1", "texts", "round")
    assert first["config"]["teacher"] is None and "train/distill_loss" not in first["names"]
    assert second["config"]["teacher"]["kind"] == "ModelTeacher"
    assert [step for step, _ in series(second, "train/distill_loss")] == [1, 2]
    assert second["config"]["objective"]["name"] == "SelfDistill"


def test_every_training_of_a_process_is_a_run_of_its_own(offline, tmp_path):
    """A baseline and its student in one run are one curve that jumps; an evaluation afterwards belongs to its own training."""
    for name in ("baseline", "kd"):
        trainer = watched(
            tmp_path / name, callback=False, max_steps=1, report_to="wandb", run_name=f"study/{name}/seed-0"
        )
        trainer.evaluate()
    trainer.train()
    found = offline()
    assert [one["run"][:3] for one in found] == [
        ("baseline/seed-0", "study", "baseline"), ("kd/seed-0", "study", "kd"), ("kd/seed-0", "study", "kd"),
    ]  # fmt: skip
    assert [len(series(one, "eval/loss")) for one in found] == [2, 2, 1]


def test_a_run_of_the_users_is_used_and_left_open(offline, tmp_path):
    """Two runs where one was opened on purpose, or one that is closed before its last line, lose the user's own numbers."""
    own = wandb.init(project="mine", name="my run")
    watched(tmp_path / "run", callback=False, max_steps=1, report_to="wandb", logging_steps=1)
    assert wandb.run is own
    own.log({"after": 1})
    (found,) = offline()
    assert found["run"][0] == "my run" and {"train/loss", "after"} <= found["names"]


def test_names_in_the_environment_win(offline, tmp_path, monkeypatch):
    """Sweeps and schedulers name runs through W&B's own variables."""
    monkeypatch.setenv("WANDB_RUN_GROUP", "sweep")
    monkeypatch.setenv("WANDB_PROJECT", "project")
    watched(tmp_path / "run", callback=False, max_steps=1, report_to="wandb", run_name="study/kd/seed-0")
    (found,) = offline()
    assert found["run"] == ("kd/seed-0", "sweep", "kd", "project")


def test_the_artifact_is_the_student_and_nothing_else(offline, tmp_path, monkeypatch):
    """training_args.bin holds tokens and local paths, and an optimizer's state is twice the model."""
    monkeypatch.setenv("WANDB_LOG_MODEL", "checkpoint")
    trainer = watched(
        tmp_path / "run", callback=False, max_steps=2, report_to="wandb", save_strategy="steps", save_steps=1,
        run_name="study/kd/seed-0",
    )  # fmt: skip
    (found,) = offline()
    assert (Path(trainer.args.output_dir) / "checkpoint-2" / "training_args.bin").exists(), (
        "there was something to leave out"
    )
    (paths,) = found["artifacts"].values()
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(paths)
    assert not any(path.endswith((".bin", ".pt", ".pth")) or "trainer_state" in path for path in paths)
    assert list(found["artifacts"]) == ["model-kd-seed-0"]


@pytest.mark.parametrize("variables", [{}, {"WANDB_API_KEY": "short"}])
def test_without_a_key_it_is_said_before_training(offline, tmp_path, monkeypatch, variables):
    """An hour of asking the teacher, then a stack of calls about a login."""
    for name, value in {
        "WANDB_MODE": "online",
        "HOME": str(tmp_path),
        "WANDB_CONFIG_DIR": str(tmp_path),
        **variables,
    }.items():
        monkeypatch.setenv(name, value)
    for name in ({"WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"}) - variables.keys():
        monkeypatch.delenv(name, raising=False)
    wandb.teardown()
    arguments = DistillationArguments(output_dir=str(tmp_path), report_to="wandb", use_cpu=True)
    with pytest.raises(ValueError) as caught:
        DistillationTrainer(classifier(0), arguments, None, rows(8), processing_class=tiny_tokenizer())
    assert str(caught.value) == NO_KEY if not variables else "key is refused" in str(caught.value)
    refuse_without_key(DistillationArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True))
    monkeypatch.setenv("WANDB_MODE", "offline")
    refuse_without_key(arguments)


# ---- names and places ----


class Named:
    def __init__(self, run_name, rounds=False):
        self.round, self.args = 3, type("Args", (), {"run_name": run_name, "output_dir": "/home/me/runs/texts"})
        if rounds:
            self.args.num_rounds = 5


@pytest.mark.parametrize(
    ("trainer", "expected"),
    [
        (Named(None), (None, None, None)),
        (Named("plain"), ("plain", None, None)),
        (Named("study/kd"), ("kd", "study", "kd")),
        (Named("study/distilled-2/seed-1"), ("distilled-2/seed-1", "study", "distilled")),
        (Named("/tmp/out"), ("/tmp/out", None, None)),
        (Named(None, rounds=True), ("round-3", "texts", "round")),
        (Named("study/ablation-steps-100", rounds=True), ("ablation-steps-100/round-3", "study", "ablation-steps")),
    ],
)
def test_names(trainer, expected):
    """Runs under a wrong group are averaged with those of another study."""
    assert tuple(run_name(trainer)) == expected


def test_what_the_user_set_up_stays(offline, tmp_path):
    """A writer of the user's that is silently replaced writes into a folder that nobody looks at."""
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    class Mine(WandbCallback):
        pass

    writer = SummaryWriter(str(tmp_path / "mine"))
    trainer = watched(tmp_path / "run", callback=False, max_steps=1)
    trainer.callback_handler.callbacks += [TensorBoardCallback(writer), Mine()]
    replace_stock(trainer)
    ours, mine = trainer.callback_handler.callbacks[-2:]
    assert type(ours) is TensorBoardRun and ours.tb_writer is writer and ours.trainer is trainer
    assert type(mine) is Mine
    trainer.train()
    assert list((tmp_path / "mine").glob("events*")) and not (tmp_path / "run" / "runs").exists()


def test_tracking_changes_nothing(offline, tmp_path):
    """A tracked run with other dropout masks is another run than the one it is compared with."""
    for name in ("wandb", "none"):
        trainer = watched(tmp_path / name, callback=False, dropout=0.2, max_steps=3, report_to=name)
        torch.save(trainer.model.state_dict(), tmp_path / f"{name}.pt")
    found, expected = torch.load(tmp_path / "wandb.pt"), torch.load(tmp_path / "none.pt")
    assert any(type(callback) is WandbRun for callback in watched_callbacks(tmp_path))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def watched_callbacks(tmp_path):
    arguments = DistillationArguments(output_dir=str(tmp_path), report_to="wandb", use_cpu=True)
    trainer = DistillationTrainer(classifier(0), arguments, None, rows(8), processing_class=tiny_tokenizer())
    return trainer.callback_handler.callbacks


# ---- TensorBoard and Trackio ----


def events_of(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()


def test_tensorboard_has_a_folder_for_every_round(tmp_path, monkeypatch):
    """Rounds in one folder are one zigzag."""
    pytest.importorskip("tensorboard")
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    settings = {"num_rounds": 1, "max_steps": 2, "save_strategy": "no", "report_to": "tensorboard"}
    rounds_trainer(tmp_path, settings).train()
    folders = {path.name: events_of(path) for path in tmp_path.glob("runs/*/round-*")}
    assert sorted(folders) == ["round-0", "round-1"]
    assert [event.step for event in folders["round-1"].Scalars("train/distill_loss")] == [1, 2]
    assert "train/distill_loss" not in folders["round-0"].Tags()["scalars"]


def test_tensorboard_shows_tables_and_figures(tmp_path):
    """A table of classes with None for a class that has no row must not end the training."""
    pytest.importorskip("tensorboard")
    import PIL.Image
    from torch.utils.tensorboard import SummaryWriter

    PIL.Image.new("RGB", (4, 2), (255, 0, 0)).save(tmp_path / "red.png")
    callback = TensorBoardCallback(SummaryWriter(str(tmp_path / "events")))
    log_table([callback, object()], "eval/classes", ["class", "student"], [["bus", 0.51239], ["car", None]], 7)
    log_figure([callback, object()], "eval/red", tmp_path / "red.png", 7)
    callback.tb_writer.close()
    events = events_of(tmp_path / "events")
    (table,) = events.Tensors("eval/classes/text_summary")
    expected = "| class | student |\n| --- | --- |\n| bus | 0.5124 |\n| car |  |"
    assert table.step == 7 and table.tensor_proto.string_val[0].decode() == expected
    (image,) = events.Images("eval/red")
    assert (image.step, image.width, image.height) == (7, 4, 2)


def test_trackio_holds_the_same(tmp_path, monkeypatch):
    """Whoever has no account sees less, and does not know."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "tracked"))  # read when it is first imported
    pytest.importorskip("trackio", reason="an extra of its own: it asks for an older pillow")
    import sqlite3

    trainer = watched(tmp_path / "run", report_to="trackio", logging_steps=1, run_name="study/kd/seed-0", project="p")
    settings = {"num_rounds": 1, "max_steps": 2, "save_strategy": "no", "report_to": "trackio", "project": "p"}
    rounds_trainer(tmp_path / "texts", settings).train()
    with sqlite3.connect(tmp_path / "tracked" / "p.db") as database:
        lines = database.execute("select run_name, metrics from metrics").fetchall()
    kd = [json.loads(metrics) for name, metrics in lines if name == "kd/seed-0"]
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [line["train/loss"] for line in kd if "train/loss" in line] == [entry["loss"] for entry in entries]
    assert {"train/alpha", "eval/fidelity_slope", "eval/fidelity_classes", "eval/fidelity_reliability"} <= {
        name for line in kd for name in line
    }
    assert {name for name, _ in lines} == {"kd/seed-0", "round-0", "round-1"}
