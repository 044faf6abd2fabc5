"""Figures are written whole, say what their axes mean, and are the same every time."""

import os

import pytest

pytest.importorskip("matplotlib")

from hfkd.diagnostics import plots

ROWS = [
    {"stage": "fine-tuning only", "metric": "accuracy", "scores": [0.78, 0.8], "distance": 0.0,
     "train_loss": [0.1, 0.12], "test_loss": [0.6, 0.62]},
    {"stage": "self-distillation round 1", "metric": "accuracy", "scores": [0.82, 0.85], "distance": 3.5,
     "train_loss": [0.14, 0.15], "test_loss": [0.5, 0.55]},
]  # fmt: skip
OBJECTIVES = [
    {"objective": "cross_entropy", "metric": "accuracy", "scores": [0.75, 0.77]},
    {"objective": "kd:temperature=4,alpha=0.9", "metric": "accuracy", "scores": [0.78, 0.79]},
]
HISTORIES = {
    "round 0": [{"step": 10, "pretrain_loss": 3.0}, {"step": 20, "pretrain_loss": 2.5}, {"train_runtime": 1.0}],
    "round 1": [{"step": 10, "pretrain_loss": 3.1, "distill_loss": 8.0}, {"step": 20, "distill_loss": 4.0}],
}
DRAW = {
    "stage_scores": (lambda path: plots.stage_scores(ROWS, path), [("stage", "Accuracy (%)")]),
    "stage_distances": (
        lambda path: plots.stage_distances(ROWS, path),
        [("stage", "L2 distance over encoder weights")],
    ),
    "stage_gaps": (
        lambda path: plots.stage_gaps(ROWS, path),
        [("stage", "loss (nats per example)"), ("stage", "test loss - train loss (nats per example)")],
    ),
    "objective_scores": (
        lambda path: plots.objective_scores(OBJECTIVES, path),
        [("objective (dashed: mean of cross_entropy)", "Accuracy (%)")],
    ),
    "loss_curves": (
        lambda path: plots.loss_curves(HISTORIES, path),
        [
            ("optimizer step", "pretrain_loss (per masked position)"),
            ("optimizer step", "distill_loss (squared distance)"),
        ],
    ),
    "against": (
        lambda path: plots.against([2, 0, 1], [0.84, 0.8, 0.83], [0.01] * 3, "rounds", "accuracy (fraction)", path),
        [("rounds", "accuracy (fraction)")],
    ),
}


@pytest.mark.parametrize("name", DRAW)
def test_a_figure_is_written_whole_with_its_units(name, tmp_path):
    """An axis without a unit is read as the reader's own: percent for fraction, sum for mean."""
    draw, labels = DRAW[name]
    figure = draw(tmp_path / "sub" / "figure.png")
    assert (tmp_path / "sub" / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert os.listdir(tmp_path / "sub") == ["figure.png"], "no temporary file is left to be pushed"
    assert [(axes.get_xlabel(), axes.get_ylabel()) for axes in figure.axes] == labels
    assert all(axes.get_title() for axes in figure.axes)


def test_objectives_stand_against_the_mean_of_the_first(tmp_path):
    """A line at another height shows a gain where there is none."""
    (axes,) = plots.objective_scores(OBJECTIVES, tmp_path / "figure.png").axes
    (line,) = [line for line in axes.lines if line.get_linestyle() == "--"]
    assert list(line.get_ydata()) == pytest.approx([76.0, 76.0])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["cross_entropy", "kd:\ntemperature=4,\nalpha=0.9"]
    with pytest.raises(ValueError, match="fractions"):
        plots.objective_scores([{**OBJECTIVES[0], "scores": [75.0]}], tmp_path / "percent.png")


def test_the_same_rows_give_the_same_bytes(tmp_path):
    """Random jitter would make every push of an unchanged run a new figure."""
    plots.stage_scores(ROWS, tmp_path / "a.png")
    plots.stage_scores(ROWS, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_every_seed_is_drawn_and_the_gap_is_test_minus_train(tmp_path):
    """A mean alone hides the one seed that diverged; a gap with its sign turned says the opposite."""
    axes = plots.stage_scores(ROWS, tmp_path / "a.png").axes[0]
    drawn = [[float(height) for _, height in points.get_offsets()] for points in axes.collections]
    assert [seeds for seeds in drawn if len(seeds) == 2] == [[78.0, 80.0], [82.0, 85.0]]
    gaps = plots.stage_gaps(ROWS, tmp_path / "b.png").axes[1]
    means = [line.get_ydata()[0] for line in gaps.lines if line.get_marker() == "D"]
    assert means == pytest.approx([0.5, 0.38])


def test_against_sorts_by_x(tmp_path):
    """Runs finish in any order: an unsorted line zigzags through the ablation."""
    figure = DRAW["against"][0](tmp_path / "a.png")
    assert list(figure.axes[0].lines[0].get_xdata()) == [0, 1, 2]


def test_round_colours_agree_between_panels(tmp_path):
    """Round 1 in round 0's colour would show the wrong round as the one that distils."""
    left, right = plots.loss_curves(HISTORIES, tmp_path / "a.png").axes
    colours = {line.get_label(): line.get_color() for line in left.lines}
    assert [colours[line.get_label()] for line in right.lines] == [line.get_color() for line in right.lines]


def test_nothing_to_draw_and_percentages_are_said(tmp_path):
    """An empty figure on a card passes for a result; 8000 % for a bug of the reader."""
    with pytest.raises(ValueError, match="scores"):
        plots.stage_scores([{"stage": "start"}], tmp_path / "a.png")
    with pytest.raises(ValueError, match="distance"):
        plots.stage_distances([{"stage": "start"}], tmp_path / "a.png")
    with pytest.raises(ValueError, match="fractions"):
        plots.stage_scores([{"stage": "start", "scores": [81.0]}], tmp_path / "a.png")
    with pytest.raises(ValueError, match="equally long"):
        plots.against([1, 2], [1], None, "x", "y", tmp_path / "a.png")
    assert not os.listdir(tmp_path)
