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
CHANGES = {  # of two seeds and three classes; the last class has no test example
    "KD": [[0.02, -0.10, float("nan")], [0.04, -0.06, float("nan")]],
    "AdaAlpha": [[0.01, -0.01, float("nan")], [0.01, 0.03, float("nan")]],
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
    "class_changes": (
        lambda path: plots.class_changes(CHANGES, [400, 40, 4], [0.9, 0.5, 0.1], path),
        [
            ("training rows of the class", "change of recall (percentage points)"),
            ("teacher's reliability on the class (mean gamma, held out)", "change of recall (percentage points)"),
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


def test_class_changes_show_each_class_at_its_place_with_its_interval(tmp_path):
    """Points at another class's frequency, or standard deviations for intervals, blame and acquit the wrong classes."""
    from scipy import stats

    left, right = DRAW["class_changes"][0](tmp_path / "a.png").axes
    assert left.get_xscale() == "log" and right.get_xscale() == "linear"
    for axes, places in ((left, [400, 40]), (right, [0.9, 0.5])):
        drawn = {line.get_label(): line for line in axes.lines if line.get_label() in CHANGES}
        assert list(drawn) == list(CHANGES)
        assert list(drawn["KD"].get_ydata()) == pytest.approx([3.0, -8.0]), "points, not fractions; nan is left out"
        assert list(drawn["AdaAlpha"].get_ydata()) == pytest.approx([1.0, 1.0])
        assert list(drawn["KD"].get_xdata()) == pytest.approx(places, rel=0.03)
        bars = axes.collections[0].get_segments()
        expected = stats.t.interval(0.95, 1, loc=-8.0, scale=2.0)
        assert [end[1] for end in bars[1]] == pytest.approx(expected)
        assert any(list(line.get_ydata()) == [0.0, 0.0] for line in axes.lines), "the line of no change"
    nowhere = [
        0.9,
        float("nan"),
        0.1,
    ]  # without the class that loses most, the right panel's own scale would be another
    left, right = plots.class_changes(CHANGES, [400, 40, 4], nowhere, tmp_path / "b.png").axes
    assert left.get_ylim() == right.get_ylim()


def test_class_changes_of_one_seed_have_no_interval_and_wrong_sizes_are_said(tmp_path):
    """An interval of one seed is made up; percentage points times 100 are off the chart."""
    one = {"KD": [[0.02, -0.10]]}
    figure = plots.class_changes(one, [9, 9], [0.5, 0.5], tmp_path / "one.png")
    assert not any(axes.collections for axes in figure.axes) and "one seed" in figure.get_suptitle()
    with pytest.raises(ValueError, match=r"3 frequencies and 3 reliabilities, but rows of \[2\]"):
        plots.class_changes(one, [1, 2, 3], [0.1, 0.2, 0.3], tmp_path / "a.png")
    with pytest.raises(ValueError, match="divide percentage points by 100"):
        plots.class_changes({"KD": [[2.0, -10.0]]}, [1, 2], [0.1, 0.2], tmp_path / "a.png")
    with pytest.raises(ValueError, match="changes"):
        plots.class_changes({}, [], [], tmp_path / "a.png")


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


def test_reconstructions_stand_below_each_other(tmp_path):
    """A picture beside another one's reconstruction compares two images, and nobody sees it."""
    import numpy as np

    rows = {"image": np.zeros((2, 4, 4, 3)), "masked": np.full((2, 4, 4, 3), 0.5), "start": np.full((2, 4, 4, 3), 2.0)}
    rows["masked"][1] = 0.25
    (axes,) = plots.reconstructions(rows, tmp_path / "a.png").axes
    shown = np.asarray(axes.images[0].get_array())
    assert shown.shape == (3 * 4 + 2, 2 * 4 + 1, 3)
    for (top, left), value in {(0, 0): 0.0, (0, 5): 0.0, (5, 0): 0.5, (5, 5): 0.25, (10, 5): 1.0}.items():
        assert (shown[top : top + 4, left : left + 4] == value).all()
    assert (shown[4] == 1.0).all() and (shown[:, 4] == 1.0).all(), "gaps are white"
    assert [label.get_text() for label in axes.get_yticklabels()] == list(rows)
    with pytest.raises(ValueError, match="as many pictures of one size"):
        plots.reconstructions({"image": np.zeros((2, 4, 4, 3)), "start": np.zeros((3, 4, 4, 3))}, tmp_path / "b.png")


def test_curves_are_means_over_seeds(tmp_path):
    """A line through single seeds, or through unsorted numbers, is not the curve that the text speaks of."""
    lines = {"start": {200: [60.0, 70.0], 50: [40.0, 42.0]}, "round 1": {50: [50.0], 200: [80.0]}}
    (axes,) = plots.curves(lines, "labels", "accuracy (%)", tmp_path / "a.png").axes
    assert [
        list(line.get_ydata()) for line in axes.lines if len(line.get_ydata()) == 2 and line.get_linestyle() == "-"
    ] == [
        [41.0, 65.0],
        [50.0, 80.0],
    ]
    assert (axes.get_xscale(), axes.get_xlabel(), axes.get_ylabel()) == ("log", "labels", "accuracy (%)")
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["start", "round 1"]
