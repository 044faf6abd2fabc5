"""The recorder inside real Trainers: what it writes, what survives a kill, and what it refuses."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import RobertaForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from hfkd import DistillationArguments, DistillationTrainer
from hfkd.diagnostics.eigenspace import compare, layer_directions
from hfkd.diagnostics.trajectory import TrajectoryRecorder, read_trajectory
from hfkd.testing import tiny_roberta_config, tiny_rows, tiny_tokenizer

LAYER = "classifier.dense"
ROWS = [{**row, "labels": i % 3} for i, row in enumerate(tiny_rows(24))]


class Kill(TrainerCallback):
    """As a machine that is gone right after a checkpoint was marked whole; no callback sees the end of the run."""

    def __init__(self, step):
        self.step = step

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def student():
    torch.manual_seed(0)
    return RobertaForSequenceClassification(tiny_roberta_config(num_hidden_layers=1, num_labels=3))


def vectors(model=None):
    keys = ("input_ids", "attention_mask")
    batches = [{k: torch.tensor([row[k]]) for k in keys} for row in ROWS]
    return layer_directions(model or student(), LAYER, batches).vectors[:, [0, 1, 5]]


def trainer(folder, recorder, *callbacks, **changes):
    settings = {"max_steps": 8, "save_steps": 3, "save_strategy": "steps", "learning_rate": 1e-2, **changes}
    args = DistillationArguments(
        str(folder), per_device_train_batch_size=4, lr_scheduler_type="constant", disable_tqdm=True, **settings
    )
    callbacks = [recorder, *callbacks]
    return DistillationTrainer(student(), args, None, ROWS, processing_class=tiny_tokenizer(), callbacks=callbacks)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    trainer(folder, TrajectoryRecorder(LAYER, vectors(), folder / "trajectory.safetensors", every=2)).train()
    return folder


def test_records_are_the_weights_of_their_step(whole):
    """Weights of the step before, or of another layer, show a curve that no training has followed."""
    found = read_trajectory(whole / "trajectory.safetensors")
    assert found.steps.tolist() == [0, 2, 4, 6, 8] and found.projections.shape == found.moves.shape == (5, 3)
    start = student().state_dict()[f"{LAYER}.weight"].double().numpy()
    saved = load_file(whole / "checkpoint-6" / "model.safetensors")[f"{LAYER}.weight"].double().numpy()
    for record, weight in ((0, start), (3, saved)):
        np.testing.assert_allclose(found.projections[record], np.linalg.norm(weight @ vectors(), axis=0), rtol=1e-12)
        np.testing.assert_allclose(
            found.moves[record], np.linalg.norm((weight - start) @ vectors(), axis=0), atol=1e-12
        )
    assert (found.moves[1:] > 0).all() and not list(whole.glob("*.tmp"))


@pytest.mark.parametrize(("kill", "strategy"), [(3, "steps"), (6, "epoch")])
def test_a_killed_run_goes_on_with_its_records(whole, tmp_path, kill, strategy):
    """A resumed run that starts its records anew compares the second half of one run with the whole of the other."""
    path = tmp_path / "trajectory.safetensors"
    with pytest.raises(KeyboardInterrupt):
        recorder = TrajectoryRecorder(LAYER, vectors(), path, every=2)
        trainer(tmp_path, recorder, Kill(kill), save_strategy=strategy).train()
    recorder = TrajectoryRecorder(LAYER, vectors(), path, every=2)
    trainer(tmp_path, recorder, save_strategy=strategy).train(resume_from_checkpoint=True)
    one, other = read_trajectory(whole / "trajectory.safetensors"), read_trajectory(path)
    assert one.steps.tolist() == other.steps.tolist() and one.directions == other.directions
    np.testing.assert_array_equal(one.projections, other.projections)
    np.testing.assert_array_equal(one.moves, other.moves)


def test_records_after_the_checkpoint_are_dropped(whole, tmp_path):
    """A run that went on from step 3 while the file was at step 8 would have every step twice."""
    path = tmp_path / "trajectory.safetensors"
    trainer(tmp_path, TrajectoryRecorder(LAYER, vectors(), path, every=2)).train()
    again = trainer(tmp_path, TrajectoryRecorder(LAYER, vectors(), path, every=2))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert read_trajectory(path).steps.tolist() == [0, 2, 4, 6, 8]
    np.testing.assert_array_equal(read_trajectory(path).moves, read_trajectory(whole / "trajectory.safetensors").moves)


def test_a_resumed_run_needs_its_own_records(whole, tmp_path):
    """Records of other directions, or with a hole, would be drawn as one curve."""
    path, axes = whole / "trajectory.safetensors", vectors()
    cases = {
        "is missing": TrajectoryRecorder(LAYER, axes, tmp_path / "none.safetensors", every=2),
        "other directions": TrajectoryRecorder(LAYER, axes[:, ::-1], path, every=2),
        "every=1": TrajectoryRecorder(LAYER, axes, path, every=1),
    }
    for words, recorder in cases.items():
        with pytest.raises(ValueError, match=words):
            trainer(whole, recorder, max_steps=9).train(resume_from_checkpoint=str(whole / "checkpoint-6"))


def test_the_stock_trainer_and_a_linear_head(tmp_path):
    """One output has a signed coordinate, v . w; its size alone hides that two runs go opposite ways."""
    torch.manual_seed(0)
    config = tiny_roberta_config(num_hidden_layers=1, num_labels=1, problem_type="regression")
    model, axes = RobertaForSequenceClassification(config), np.eye(16)[:, :4]
    rows = [{**row, "labels": 1.0} for row in ROWS]
    args = TrainingArguments(
        str(tmp_path), max_steps=2, learning_rate=0.1, report_to="none", use_cpu=True, disable_tqdm=True
    )
    recorder = TrajectoryRecorder("classifier.out_proj", axes, tmp_path / "t.safetensors")
    Trainer(model, args, None, rows, processing_class=tiny_tokenizer(), callbacks=[recorder]).train()
    found = read_trajectory(tmp_path / "t.safetensors")
    assert found.steps.tolist() == [0, 1, 2]
    expected = model.classifier.out_proj.weight.detach().double().numpy()[0, :4]
    np.testing.assert_allclose(found.projections[-1], expected, rtol=1e-12)
    np.testing.assert_allclose(found.moves[-1], found.projections[-1] - found.projections[0], rtol=1e-12)
    assert len({*np.sign(found.projections[0])}) == 2


def test_two_runs_of_the_recorder_can_be_compared(whole, tmp_path):
    """Files that `compare` refuses are records for nobody."""
    path = tmp_path / "trajectory.safetensors"
    trainer(tmp_path, TrajectoryRecorder(LAYER, vectors(), path, every=2), learning_rate=2e-2).train()
    runs = [read_trajectory(folder / "trajectory.safetensors") for folder in (whole, tmp_path)]
    assert compare(*runs, moves=True).pairs == 3 and compare(runs[0], runs[0]).share == 0.0


def test_what_the_recorder_cannot_record_is_said_before_the_first_step(tmp_path):
    """An error after training costs the training."""
    for recorder, words in (
        (TrajectoryRecorder("classifier.hidden", vectors(), tmp_path / "t"), "no module here.*classifier.dense"),
        (TrajectoryRecorder(LAYER, np.eye(7), tmp_path / "t"), "rows of 16 numbers, and the vectors have 7"),
    ):
        started = trainer(tmp_path / "run", recorder)
        with pytest.raises(ValueError, match=words):
            started.train()
        assert started.state.global_step == 0
    for change, words in (({"every": 0}, "1 or more, got 0"), ({"vectors": [1.0]}, "finite columns")):
        with pytest.raises(ValueError, match=words):
            TrajectoryRecorder(**{"layer": LAYER, "vectors": np.eye(2), "path": tmp_path / "t", **change})


def test_the_figure_shows_every_seed_and_names_both_axes(tmp_path):
    """Axes that are swapped turn the side of the top direction into the other one."""
    pytest.importorskip("matplotlib")
    from hfkd.diagnostics import plots

    seeds = [([0.0, 1.0, 2.0], [0.0, 0.5, 2.0]), ([0.0, 2.0], [0.0, 1.0])]
    panels = {"MLP": {"one-hot": seeds, "distilled": seeds[:1]}, "CNN": {"one-hot": seeds[:1]}}
    labels = {name: (f"{name} top", f"{name} lower") for name in panels}
    figure = plots.trajectories(panels, labels, tmp_path / "figure.png")
    assert [(axes.get_title(), axes.get_xlabel(), axes.get_ylabel()) for axes in figure.axes] == [
        ("MLP", "MLP top", "MLP lower"),
        ("CNN", "CNN top", "CNN lower"),
    ]
    drawn = [(list(line.get_xdata()), list(line.get_ydata())) for line in figure.axes[0].lines]
    assert drawn == [*seeds, seeds[0]]
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["one-hot", "distilled"]
    with pytest.raises(ValueError, match="panels"):
        plots.trajectories({}, {}, tmp_path / "none.png")
