"""Diagnostics during training: into every tracker, of all rows, and without a trace in the training itself."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback
from watched_run import classifier, logged, rows, watched

import launching
from hfkd import DistillationArguments, DistillationTrainer
from hfkd.diagnostics import DiagnosticsCallback, report
from hfkd.diagnostics.callback import evaluations
from hfkd.teachers import EnsembleTeacher
from hfkd.testing import tiny_tokenizer

HERE = Path(__file__).parent


def callback_of(trainer):
    return next(one for one in trainer.callback_handler.callbacks if isinstance(one, DiagnosticsCallback))


class Tracker(TrainerCallback):
    """As trackers do: hears of what is logged, and when."""

    def __init__(self):
        self.heard, self.tests = [], 0

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.heard.append((state.global_step, dict(logs)))

    def on_predict(self, args, state, control, metrics, **kwargs):
        self.tests += 1


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return watched(tmp_path_factory.mktemp("run"), watch={"group_column": "hour"})


def test_every_second_evaluation_is_reported_as_report_would(run):
    """Numbers in the tracker that `report` does not give of the same weights are of no model."""
    assert [entry["step"] for entry in logged(run)] == [2, 4]
    last = watched(Path(run.args.output_dir) / "short", max_steps=4)
    found = report(last.model, run.teacher, rows(), processing_class=tiny_tokenizer(), bootstrap=0)
    shown = {name.removeprefix("eval_fidelity_"): value for name, value in logged(last)[-1].items()}
    assert {name: shown[name] for name in found.numbers()} == pytest.approx(found.numbers(), rel=1e-6, abs=1e-9)
    assert all(math.isfinite(value) for value in shown.values())


def test_trackers_hear_numbers_of_the_right_step_and_no_test(tmp_path):
    """What does not pass through the Trainer's log reaches no tracker; the eval rows announced as a test are a false claim."""
    tracker = Tracker()
    trainer = watched(tmp_path, callback=False, max_steps=2)
    trainer.add_callback(tracker)
    trainer.add_callback(DiagnosticsCallback(trainer))
    trainer.evaluate()
    (step, logs) = tracker.heard[-1]
    assert step == 2 and logs["eval_fidelity_agreement"] == callback_of(trainer).last.agreement
    assert all(isinstance(value, float) for name, value in logs.items() if name.startswith("eval_fidelity_"))
    assert tracker.tests == 0
    assert callback_of(trainer).last.examples == 6, "by default on the trainer's eval_dataset"
    trainer.evaluate()
    assert len([1 for _, logs in tracker.heard if "eval_fidelity_agreement" in logs]) == 1, "once for one state"


def test_the_report_lies_in_the_output_folder(run):
    """A number in a tracker without the table behind it cannot be asked why."""
    folder = Path(run.args.output_dir) / "diagnostics"
    assert sorted(path.name for path in folder.iterdir()) == ["step-2", "step-4"]
    kept = json.loads((folder / "step-4" / "report.json").read_text())
    assert kept["agreement"] == logged(run)[-1]["eval_fidelity_agreement"]
    assert [part["name"] for part in kept["subgroups"]] == ["day", "night"]
    assert (folder / "step-4" / "report.md").read_text() == callback_of(run).last.markdown()


def test_watching_changes_nothing(tmp_path):
    """A watched run with other dropout masks is another run: diagnostics that are switched on for a look move the result."""
    for name, values in (("watched", {"every": 1}), ("alone", {"callback": False})):
        torch.save(
            watched(tmp_path / name, dropout=0.2, max_steps=3, **values).model.state_dict(), tmp_path / f"{name}.pt"
        )
    found, expected = torch.load(tmp_path / "watched.pt"), torch.load(tmp_path / "alone.pt")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_resumed_run_reports_at_the_same_steps(tmp_path):
    """Counted anew after every restart, a run that is killed often is never reported on."""
    whole = watched(tmp_path / "whole", every=3, max_steps=6)
    watched(tmp_path / "killed", every=3, max_steps=6, save_strategy="steps", save_steps=2)
    resumed = DistillationTrainer(
        classifier(0), DistillationArguments(**{**whole.args.to_dict(), "output_dir": str(tmp_path / "killed")}),
        None, rows(32), rows(6), processing_class=tiny_tokenizer(), teacher=classifier(1, hidden_size=24),
        objective=whole.objective,
    )  # fmt: skip
    resumed.add_callback(DiagnosticsCallback(resumed, rows(), every=3))
    resumed.train(resume_from_checkpoint=str(tmp_path / "killed" / "checkpoint-4"))
    assert [entry["step"] for entry in logged(resumed)] == [entry["step"] for entry in logged(whole)] == [3, 6]
    assert logged(resumed)[-1] == pytest.approx(logged(whole)[-1], rel=1e-6, abs=1e-9)


def test_training_again_is_reported_again(tmp_path):
    """The trials of a search all evaluate at the same steps: only the first would be reported, and `last` be of its student."""
    trainer = watched(tmp_path, every=1, max_steps=1)
    first = callback_of(trainer).last
    trainer.train()
    assert logged(trainer) and callback_of(trainer).last is not first


def test_evaluations_of_several_data_sets_count_once():
    """A trainer with two eval data sets would be reported on twice as often as asked."""
    history = [
        {"step": 1, "eval_a_runtime": 1.0}, {"step": 1, "eval_b_runtime": 1.0}, {"step": 1, "loss": 1.0},
        {"step": 2, "eval_runtime": 1.0}, {"step": 3, "eval_fidelity_agreement": 1.0}, {"step": 4, "train_runtime": 1.0},
    ]  # fmt: skip
    assert evaluations(history) == 2


def test_without_labels_and_with_logits_that_are_no_metric(tmp_path):
    """A user's own preprocess_logits_for_metrics turns logits into classes, of which no divergence can be taken."""
    trainer = watched(tmp_path / "a", callback=False, max_steps=1)
    trainer.preprocess_logits_for_metrics = lambda logits, labels: logits.argmax(-1)
    trainer.compute_metrics = lambda prediction: {"shape": float(prediction.predictions.ndim)}
    trainer.add_callback(DiagnosticsCallback(trainer, rows(labelled=False)))
    assert trainer.evaluate()["eval_shape"] == 1.0
    found = callback_of(trainer).last
    assert found.labelled == 0 and found.examples == 17 and "eval_fidelity_student_accuracy" not in logged(trainer)[-1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda t: DiagnosticsCallback(t, every=0), "every counts evaluations, 1 or more, not 0"),
        (lambda t: DiagnosticsCallback(t, {"a": rows()}), "one data set with columns is compared on, not dict"),
        (lambda t: DiagnosticsCallback(t, group_column="dialect"), "no column 'dialect' of subgroups"),
        (lambda t: DiagnosticsCallback(_without_teacher(t)), "no teacher to compare with"),
        (lambda t: _asked_of_votes(t), "combine='mean' or 'logits'"),
    ],
)
def test_what_cannot_work_is_said(make, message, run):
    """An error in the middle of a night's training, for what was wrong before it began."""
    with pytest.raises(ValueError, match=message):
        make(run)


def _without_teacher(trainer):
    arguments = DistillationArguments(output_dir=trainer.args.output_dir, report_to="none", use_cpu=True)
    return DistillationTrainer(classifier(0), arguments, None, rows(8), rows(8), processing_class=tiny_tokenizer())


def _asked_of_votes(trainer):
    usual, trainer.teacher = trainer.teacher, EnsembleTeacher([classifier(1), classifier(2)], "vote")
    try:
        DiagnosticsCallback(trainer)
    finally:
        trainer.teacher = usual


def test_tensorboard_is_shown_numbers_tables_and_figures(tmp_path):
    """The wrong step, or a figure without its colours, is noticed only by someone who looks."""
    pytest.importorskip("tensorboard")
    pytest.importorskip("matplotlib")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = watched(tmp_path, report_to=["tensorboard"])
    (folder,) = (tmp_path / "runs").iterdir()
    events = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    scalars = events.Scalars("eval/fidelity_agreement")
    assert [event.step for event in scalars] == [2, 4]
    assert [event.value for event in scalars] == pytest.approx([e["eval_fidelity_agreement"] for e in logged(run)])
    for name in ("reliability", "logit_logit"):
        assert [event.step for event in events.Images(f"eval/fidelity_{name}")] == [2, 4]
    text = events.Tensors("eval/fidelity/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert "| Brier score (0 to 2) |" in text


@pytest.mark.launch
def test_two_processes_report_what_one_does(tmp_path):
    """Rows counted twice to even out the last batch, or each process's own half, are other numbers under the same name."""
    done = launching.run(HERE / "watched_run.py", str(tmp_path), log=tmp_path / "log", processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"rank-{rank}.pt") for rank in (0, 1)]
    alone = watched(tmp_path / "alone", watch={"group_column": "hour"})
    for rank in ranks:
        assert [entry["step"] for entry in rank["logged"]] == [2, 4]
        for found, expected in zip(rank["logged"], logged(alone), strict=True):
            assert found == pytest.approx(expected, rel=1e-6, abs=1e-8)
    assert len(list((tmp_path / "run" / "diagnostics").iterdir())) == 2
