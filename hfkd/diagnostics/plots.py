"""Figures of a run: the only matplotlib import.

Every function draws one question, writes it to `path` (the suffix names the format) and returns the figure, which a
notebook shows. Figures are made without pyplot, so that nothing leaks into or out of the caller's own plots.

`rows` hold one dict per stage, in order: `stage`, and, as far as the figure reads them, `metric`, `scores` (fractions,
one per seed), `distance` (L2, to the start's weights), `train_loss` and `test_loss` (one per seed).
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfkd.diagnostics.logit_logit import LogitLogit, with_interval
from hfkd.diagnostics.metrics import mean_and_std, paired_difference

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]
PathLike = str | os.PathLike[str]

# Okabe and Ito's palette, told apart under the common colour-vision deficiencies; without its yellow, too pale on white.
_PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")  # and in grey print
_DOTS_PER_INCH = 150


def stage_scores(rows: Rows, path: PathLike) -> Figure:
    """Score of every stage, mean ± standard deviation over seeds, each seed drawn over it. One panel per metric."""
    metrics = list(dict.fromkeys(str(row.get("metric", "accuracy")) for row in rows if len(row.get("scores", ()))))
    _need(metrics, "scores")
    width = max(4.2, 1.25 * len(rows) + 1.0)
    figure, panels = _figure(len(metrics), (width * len(metrics), 4.0))
    for axes, metric in zip(panels, metrics, strict=True):
        shown = [row for row in rows if row.get("metric", "accuracy") == metric and len(row.get("scores", ()))]
        _seeds(axes, [_percent(row["scores"]) for row in shown], _PALETTE[0], mean_label="{:.1f}")
        _stage_ticks(axes, shown)
        axes.set_ylabel(f"{_words(metric)} (%)")
        axes.set_title(f"{_words(metric)} per stage{_seed_note([row['scores'] for row in shown])}")
    return _write(figure, path)


def stage_distances(rows: Rows, path: PathLike) -> Figure:
    """L2 distance of every stage's encoder to the start's weights: what self-distillation is meant to shrink."""
    shown = [row for row in rows if row.get("distance") is not None]
    _need(shown, "distance")
    figure, (axes,) = _figure(1, (max(4.2, 1.25 * len(shown) + 1.0), 3.8))
    bars = axes.bar(range(len(shown)), [float(row["distance"]) for row in shown], width=0.6, color=_PALETTE[0])
    axes.bar_label(bars, fmt="{:.2f}", padding=3, fontsize=9)
    axes.margins(y=0.15)
    _stage_ticks(axes, shown)
    axes.set_ylabel("L2 distance over encoder weights")
    axes.set_title("Distance to the start per stage")
    return _write(figure, path)


def stage_gaps(rows: Rows, path: PathLike) -> Figure:
    """Train and test loss of every stage after fine-tuning, and their gap (test minus train), over seeds."""
    shown = [row for row in rows if len(row.get("train_loss", ())) and len(row.get("test_loss", ()))]
    _need(shown, "train_loss and test_loss")
    figure, (losses, gaps) = _figure(2, (2 * max(4.2, 1.25 * len(shown) + 1.0), 4.0))
    _seeds(losses, [row["train_loss"] for row in shown], _PALETTE[0], marker="o", label="train", offset=-0.13)
    _seeds(losses, [row["test_loss"] for row in shown], _PALETTE[1], marker="s", label="test", offset=0.13)
    losses.set_ylabel("loss (nats per example)")
    losses.set_title(f"Loss after fine-tuning{_seed_note([row['test_loss'] for row in shown])}")
    _legend(losses)
    paired = [[test - train for train, test in zip(row["train_loss"], row["test_loss"], strict=True)] for row in shown]
    _seeds(gaps, paired, _PALETTE[2], marker="D", mean_label="{:.3g}")
    gaps.axhline(0.0, color="0.6", linewidth=0.8, zorder=0)
    gaps.set_ylabel("test loss - train loss (nats per example)")
    gaps.set_title("Generalisation gap")
    for axes in (losses, gaps):
        _stage_ticks(axes, shown)
    return _write(figure, path)


def objective_scores(rows: Rows, path: PathLike) -> Figure:
    """Score of every objective (`objective`, `metric`, `scores`), mean ± standard deviation over seeds, each seed drawn
    over it; a line marks the mean of the first one, which the others are compared with."""
    _need(rows, "objective and scores")
    figure, (axes,) = _figure(1, (max(6.0, 1.25 * len(rows) + 1.0), 4.0))
    groups = [_percent(row["scores"]) for row in rows]
    _seeds(axes, groups, _PALETTE[0], mean_label="{:.1f}")
    axes.axhline(mean_and_std(groups[0])[0], color="0.6", linewidth=0.8, linestyle="--", zorder=0)
    names = [
        textwrap.fill(str(row["objective"]).replace(",", ", ").replace(":", ": "), 17, break_long_words=False)
        for row in rows
    ]
    axes.set_xticks(range(len(rows)), names, fontsize=9)
    axes.set_xlabel(f"objective (dashed: mean of {rows[0]['objective']})")
    axes.tick_params(axis="x", length=0)
    axes.set_ylabel(f"{_words(str(rows[0]['metric']))} (%)")
    axes.set_title(f"{_words(str(rows[0]['metric']))} per objective{_seed_note(groups)}")
    return _write(figure, path)


def class_changes(
    changes: Mapping[str, Sequence[Sequence[float]]],
    frequency: Sequence[float],
    reliability: Sequence[float],
    path: PathLike,
) -> Figure:
    """Who pays for the average: each class's change against its frequency (left) and the teacher's reliability (right).

    changes: for each method, by its name, one row a seed, (seeds, classes), of `metrics.per_class_difference` to the
    one-hot student of the same seed: fractions, drawn in percentage points as mean and 95 % interval (Student's t over
    seeds; none for one seed). frequency: training rows of each class, (classes,), on a logarithmic axis. reliability:
    (classes,), of `functional.class_reliability`. A class that is nan anywhere is left out of what it is nan in.
    """
    _need(list(changes), "changes")
    seeds = [len(rows) for rows in changes.values()]
    if any(len(row) != len(frequency) or len(row) != len(reliability) for rows in changes.values() for row in rows):
        raise ValueError(
            f"every seed needs a change for each class, and there are {len(frequency)} frequencies and {len(reliability)} "
            f"reliabilities, but rows of {sorted({len(row) for rows in changes.values() for row in rows})} changes"
        )
    if any(abs(value) > 1.0 for rows in changes.values() for row in rows for value in row):
        raise ValueError("changes are differences of fractions, in [-1, 1]: divide percentage points by 100")
    figure, (left, right) = _figure(2, (11.0, 4.6))
    figure.set_layout_engine("constrained")  # the only one that leaves room for a legend below both panels
    right.sharey(left)
    for axes, places in ((left, frequency), (right, reliability)):
        axes.axhline(0.0, color="0.4", linewidth=0.9, zorder=1)
        for index, (method, rows) in enumerate(changes.items()):
            shift = index - (len(changes) - 1) / 2
            _class_points(axes, _beside(places, shift, axes is left), rows, index, method)
        axes.set_ylabel("change of recall (percentage points)")
    left.set_xscale("log")
    _plain_numbers(left)
    left.set_xlabel("training rows of the class")
    right.set_xlabel("teacher's reliability on the class (mean gamma, held out)")
    left.set_title("Distilled minus one-hot per class, by frequency", fontsize=11)
    right.set_title("Distilled minus one-hot per class, by the teacher's reliability", fontsize=11)
    several = f"mean and 95 % interval, {'-'.join(map(str, sorted(set(seeds))))} seeds"
    figure.suptitle(f"Who pays for the average ({'one seed' if set(seeds) == {1} else several})", fontsize=12)
    figure.legend(
        *left.get_legend_handles_labels(), loc="outside lower center", ncols=min(5, len(changes)), frameon=False
    )
    return _write(figure, path)


def _beside(places: Sequence[float], shift: float, logarithmic: bool) -> list[float]:
    """Methods stand side by side at one class: a little to the left and right of its place."""
    if logarithmic:
        return [float(place) * 1.05**shift for place in places]
    known = [float(place) for place in places if place == place]
    width = (max(known) - min(known) or 1.0) if known else 1.0
    return [float(place) + 0.008 * width * shift for place in places]


def _class_points(
    axes: Axes, places: Sequence[float], rows: Sequence[Sequence[float]], index: int, method: str
) -> None:
    points = []
    for label, place in enumerate(places):
        values = [100.0 * float(row[label]) for row in rows]
        if place != place or any(value != value for value in values):
            continue
        mean, low, high = paired_difference(values, [0.0] * len(values)) if len(values) > 1 else (values[0],) * 3
        points.append((place, mean, mean - low, high - mean))
    if points:
        x, y, below, above = zip(*points, strict=True)
        color, crowded = _PALETTE[index % len(_PALETTE)], len(points) > 30
        if len(rows) > 1:
            faint = 0.25 if crowded else 0.7  # a hundred intervals would hide their means
            axes.errorbar(x, y, [below, above], ecolor=color, elinewidth=0.9, linestyle="none", alpha=faint, zorder=2)
        style: dict[str, Any] = {"color": color, "marker": _MARKERS[index % len(_MARKERS)]}
        axes.plot(x, y, markersize=4 if crowded else 6, linestyle="none", label=method, zorder=3, **style)


def _plain_numbers(axes: Axes) -> None:
    """50, 100, 200 on a logarithmic axis instead of powers of ten: class sizes seldom span three of them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def loss_curves(histories: Mapping[str, Sequence[Mapping[str, Any]]], path: PathLike) -> Figure:
    """Logged `pretrain_loss` and `distill_loss` of every round (name to its Trainer `log_history`) over steps."""
    titles = {"pretrain_loss": "Pre-training loss per round", "distill_loss": "Distillation loss per round"}
    units = {"pretrain_loss": "per masked position", "distill_loss": "squared distance"}
    shown = [name for name in titles if any(name in entry for history in histories.values() for entry in history)]
    _need(shown, "pretrain_loss or distill_loss")
    figure, panels = _figure(len(shown), (5.2 * len(shown), 3.8))
    for axes, name in zip(panels, shown, strict=True):
        for index, (stage, history) in enumerate(histories.items()):
            points = [(entry["step"], entry[name]) for entry in history if name in entry]
            # The colour is the round's in both panels, also where round 0, which distils nothing, draws no line.
            style: dict[str, Any] = {
                "color": _PALETTE[index % len(_PALETTE)],
                "marker": _MARKERS[index % len(_MARKERS)],
            }
            if points:
                every = max(1, len(points) // 8)
                axes.plot(*zip(*points, strict=True), label=stage, markersize=4, markevery=every, **style)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(f"{name} ({units[name]})")
        axes.set_title(titles[name])
        _legend(axes)
    return _write(figure, path)


def against(
    x: Sequence[float], y: Sequence[float], std: Sequence[float] | None, x_label: str, y_label: str, path: PathLike
) -> Figure:
    """One number against another, for ablations: `y` ± `std` (None for a single seed) at each `x`, sorted."""
    if len(x) != len(y) or (std is not None and len(std) != len(x)):
        raise ValueError(
            f"x, y and std must be equally long, not {len(x)}, {len(y)}, {None if std is None else len(std)}"
        )
    _need(x, "x")
    order = sorted(range(len(x)), key=lambda index: x[index])
    bars = None if std is None else [std[index] for index in order]
    figure, (axes,) = _figure(1, (5.4, 3.8))
    axes.errorbar(
        [x[index] for index in order], [y[index] for index in order], bars, color=_PALETTE[0], marker="o", capsize=3
    )
    if all(float(value).is_integer() for value in x):
        from matplotlib.ticker import MaxNLocator

        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))  # there is no half a round
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_title(_words(f"{y_label.split(' (')[0]} against {x_label.split(' (')[0]}"))
    return _write(figure, path)


# ---------------------------------------------------------------------------------------------------- shared by figures


def _figure(panels: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install 'hfkd[plots]'") from error
    figure = Figure(figsize=size, layout="tight")
    FigureCanvasAgg(figure)  # needs no display
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color="0.9", linewidth=0.8)
        panel.set_axisbelow(True)
    return figure, axes


def _seeds(
    axes: Axes,
    groups: Sequence[Sequence[float]],
    color: str,
    *,
    marker: str = "o",
    label: str | None = None,
    offset: float = 0.0,
    mean_label: str | None = None,
) -> None:
    """Mean ± standard deviation per group, with the single seeds as small open points to its right."""
    for place, values in enumerate(groups):
        mean, spread, seeds = mean_and_std(values)
        axes.errorbar(
            place + offset, mean, spread if seeds > 1 else None, color=color, marker=marker, markersize=7, capsize=4,
            linestyle="none", label=label if place == 0 else None, zorder=3,
        )  # fmt: skip
        # Fixed places, not random ones: one run must give one figure.
        places = [place + offset + 0.09 + 0.08 * (index % 2) for index in range(seeds)]
        if seeds > 1:
            axes.scatter(places, list(values), s=14, facecolors="none", edgecolors=color, linewidths=0.9, zorder=2)
        if mean_label:
            axes.annotate(
                mean_label.format(mean), (place + offset, mean), (-9, 0), textcoords="offset points",
                ha="right", va="center", fontsize=9,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0},
            )  # fmt: skip
    axes.set_xlim(-0.6, len(groups) - 0.4)
    axes.margins(y=0.12)


def _stage_ticks(axes: Axes, rows: Rows) -> None:
    names = [textwrap.fill(str(row["stage"]), 17, break_on_hyphens=False) for row in rows]
    axes.set_xticks(range(len(rows)), names, fontsize=9)
    axes.set_xlabel("stage")
    axes.tick_params(axis="x", length=0)


def _seed_note(groups: Sequence[Sequence[float]]) -> str:
    counts = sorted({len(values) for values in groups})
    if counts == [1]:
        return " (one seed)"
    return f" (mean ± std, {' to '.join(map(str, dict.fromkeys((counts[0], counts[-1]))))} seeds)"


def _percent(scores: Sequence[float]) -> list[float]:
    if any(value > 1.0 or value < 0.0 for value in scores):
        raise ValueError(f"scores are fractions in [0, 1], not {list(scores)}: divide percentages by 100")
    return [100.0 * float(value) for value in scores]


def _words(name: str) -> str:
    text = name.replace("_f1", "-F1").replace("_", " ")
    return text[:1].upper() + text[1:]


def _legend(axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.12 * (high - low))  # "best" does not see error bars: give the legend a row of its own
    axes.legend(handles, labels, frameon=False, fontsize=9, loc="upper right", ncols=min(4, len(labels)))


def _need(found: Sequence[Any], what: str) -> None:
    if not len(found):
        raise ValueError(f"nothing to draw: no entry carries {what}")


def _write(figure: Figure, path: PathLike) -> Figure:
    """Whole or not at all: half a figure on a card is worse than none."""
    target = Path(path)
    buffer = BytesIO()
    figure.savefig(buffer, format=target.suffix.lstrip(".") or "png", dpi=_DOTS_PER_INCH)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(buffer.getvalue())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return figure


# ------------------------------------------------------------------------------------- images and their reconstructions


def reconstructions(images: Mapping[str, Any], path: PathLike) -> Figure:
    """One row of pictures for each name, equal pictures below each other: the originals, masked, and as models guess them.

    images: arrays (pictures, height, width, 3) on the scale [0, 1], all of one shape.
    """
    import numpy as np

    _need(list(images), "images")
    shapes = {np.asarray(pictures).shape for pictures in images.values()}
    shape = next(iter(shapes))
    if len(shapes) > 1 or len(shape) != 4 or shape[-1] != 3:
        raise ValueError(f"every row needs as many pictures of one size, (pictures, height, width, 3), got {shapes}")
    count, height, width, _ = shape
    gap = max(1, height // 14)
    grid = np.ones((len(images) * (height + gap) - gap, count * (width + gap) - gap, 3))
    for row, pictures in enumerate(images.values()):
        for column, picture in enumerate(np.asarray(pictures)):
            top, left = row * (height + gap), column * (width + gap)
            grid[top : top + height, left : left + width] = np.clip(picture, 0.0, 1.0)
    figure, (axes,) = _figure(1, (1.1 * count + 1.6, 1.1 * len(images) + 0.4))
    axes.imshow(grid, interpolation="nearest")
    axes.set_yticks([row * (height + gap) + height / 2 for row in range(len(images))])
    axes.set_yticklabels([textwrap.fill(name, 17, break_on_hyphens=False) for name in images], fontsize=9)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    return _write(figure, path)


def curves(lines: Mapping[str, Mapping[float, Sequence[float]]], x_label: str, y_label: str, path: PathLike) -> Figure:
    """One line for each name: mean ± standard deviation over seeds of the values at each x, on a logarithmic axis of x."""
    _need(list(lines), "lines")
    figure, (axes,) = _figure(1, (6.0, 4.0))
    for index, (name, points) in enumerate(lines.items()):
        x = sorted(points)
        means, stds, _ = zip(*[mean_and_std(points[place]) for place in x], strict=True)
        apart = [place * 1.02 ** (index - (len(lines) - 1) / 2) for place in x]
        style: dict[str, Any] = {"color": _PALETTE[index % len(_PALETTE)], "marker": _MARKERS[index % len(_MARKERS)]}
        axes.errorbar(apart, means, stds, label=name, capsize=3, markersize=5, **style)
    axes.set_xscale("log")
    _plain_numbers(axes)
    axes.set_xticks(sorted({place for points in lines.values() for place in points}))
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_title(_words(f"{y_label.split(' (')[0]} against {x_label.split(' (')[0]}"))
    axes.legend(frameon=False, fontsize=9)
    return _write(figure, path)


# ---------------------------------------------------------------------------------- where students leave their teachers


def logit_logit_grid(grid: Mapping[str, Mapping[str, LogitLogit]], path: PathLike) -> Figure:
    """One row of logit-logit plots for each name of `grid`, one column for each name in its rows (splits, students).

    Each panel: the examples (X of the teacher, Y of the student; at most 2,000 of them, evenly spread over the rows), their
    bins' means with the fitted line and its slope, and the dashed line of perfect imitation. Logits have no unit; both axes of
    a panel have one scale. A row without one of the columns leaves its place empty.
    """
    columns = list(dict.fromkeys(name for row in grid.values() for name in row))
    _need(columns, "logit-logit plots")
    size = 2.9
    figure, _ = _figure(1, (size * len(columns) + 0.4, (size + 0.3) * len(grid) + 0.5))
    figure.clear()
    figure.set_layout_engine("constrained")  # else the title of many rows lies on the first one's
    panels = figure.subplots(len(grid), len(columns), squeeze=False)
    for (name, row), places in zip(grid.items(), panels, strict=True):
        for column, axes in zip(columns, places, strict=True):
            if column not in row:
                axes.set_axis_off()
                continue
            _logit_logit_panel(axes, row[column])
            axes.set_title(f"{textwrap.fill(name, 34)}\n{column}", fontsize=9)
    figure.suptitle("What a student does with its teacher's confidence", fontsize=12)
    return _write(figure, path)


def _logit_logit_panel(axes: Axes, found: LogitLogit) -> None:
    step = -(-len(found.x) // 2000)
    low = float(min(found.x.min(), found.y.min()))
    high = float(max(found.x.max(), found.y.max()))
    edge = 0.05 * (high - low)
    axes.scatter(found.x[::step], found.y[::step], s=5, color=_PALETTE[4], alpha=0.5, linewidths=0)
    axes.axline((low, low), slope=1.0, color="0.3", linewidth=0.9, linestyle="--", label="Y = X")
    shown = f"slope {with_interval(found.slope, found.slope_interval)}"
    ends = [float(found.x.min()), float(found.x.max())]
    axes.plot(ends, [found.intercept + found.slope * end for end in ends], color=_PALETTE[1], label=shown)
    means = [(part.mean_x, part.mean_x + part.mean_difference) for part in found.bins]
    axes.plot(*zip(*means, strict=True), color="0.1", marker="o", markersize=3, linestyle="none")
    axes.set(xlim=(low - edge, high + edge), ylim=(low - edge, high + edge))
    axes.set_box_aspect(1)
    axes.grid(color="0.92", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(f"X: teacher's logit of its class{_at(found.teacher_temperature)}", fontsize=8)
    axes.set_ylabel(f"Y: student's logit of it{_at(found.student_temperature)}", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.legend(frameon=False, fontsize=7.5, loc="upper left", handlelength=1.2, borderaxespad=0.1)


def _at(temperature: float) -> str:
    return "" if temperature == 1.0 else f" (temperature {temperature:g})"


# ------------------------------------------------------------------------------------------------ calibration of two sides


def reliability_diagram(sides: Mapping[str, Sequence[Sequence[float]]], path: PathLike) -> Figure:
    """How often each side is right (above) at each confidence, and how many examples it is that sure of (below).

    sides: for each, by its name, its bins: (mean confidence, accuracy, examples), fractions. On the dashed line a model is
    right as often as it says; below it, it is too sure (Guo et al. 2017, arXiv:1706.04599, figure 1).
    """
    _need([bins for bins in sides.values() if len(bins)], "bins of confidence")
    figure, _ = _figure(1, (5.4, 5.6))
    figure.clear()
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.plot([0, 100], [0, 100], color="0.5", linestyle="--", linewidth=0.9, label="as often as it says")
    for index, (name, bins) in enumerate(sides.items()):
        confidence, accuracy, examples = zip(*bins, strict=True)
        place, color = _percent(confidence), _PALETTE[index % len(_PALETTE)]
        marker = _MARKERS[index % len(_MARKERS)]
        upper.plot(place, _percent(accuracy), color=color, marker=marker, markersize=5, label=name)
        share = [100.0 * count / sum(examples) for count in examples]
        lower.plot(place, share, color=color, marker=marker, markersize=4, linewidth=1.2)
    for axes in (upper, lower):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.9", linewidth=0.8)
    upper.set(ylim=(-3, 103), ylabel="accuracy of the bin (%)", title="Reliability: confidence against accuracy")
    upper.legend(frameon=False, fontsize=9, loc="upper left")
    lower.set(xlim=(-3, 103), xlabel="mean confidence of the bin (%)", ylabel="examples (%)")
    lower.set_ylim(bottom=0)
    return _write(figure, path)


# ------------------------------------------------------------------------------------------ label noise: who passes it on


def confusions(matrices: Mapping[str, Any], path: PathLike, labels: Sequence[str] | None = None) -> Figure:
    """One panel for each name: which class the examples of every clean class are predicted as, in percent of the class.

    matrices: (classes, classes) counts or shares, rows the clean class, all on one scale of colours: `confusion` and
    `expected` of a `SamplerReport`, for a teacher, an ensemble and a student side by side. Percentages of 1 or more are
    written into the cells of up to 10 classes. A class without an example has a row of white. labels: names of the classes.
    """
    import numpy as np

    _need(list(matrices), "matrices")
    counts = {name: np.asarray(matrix, dtype=np.float64) for name, matrix in matrices.items()}
    classes = len(next(iter(counts.values())))
    odd = {name: matrix.shape for name, matrix in counts.items() if matrix.shape != (classes, classes)}
    if odd or (labels is not None and len(labels) != classes):
        raise ValueError(f"confusions must all be ({classes}, {classes}), and labels {classes}: got {odd or labels}")
    if not all(np.isfinite(matrix).all() and (matrix >= 0).all() for matrix in counts.values()):
        raise ValueError("confusions are counts or shares: finite, and 0 or more")
    figure, panels = _figure(len(counts), (3.4 * len(counts) + 0.8, 3.8))
    figure.set_layout_engine("constrained")  # a bar for all panels
    for axes, (name, matrix) in zip(panels, counts.items(), strict=True):
        rows = matrix.sum(1, keepdims=True)
        percent = np.divide(100 * matrix, rows, out=np.full_like(matrix, np.nan), where=rows > 0)
        image = axes.imshow(percent, cmap="Blues", vmin=0, vmax=100)
        axes.grid(False)
        if classes <= 10:
            for row, column in np.argwhere(percent >= 1).tolist():
                value = percent[row, column]
                color = "white" if value > 55 else "black"
                axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=7, color=color)
            names = [str(number) for number in range(classes)] if labels is None else list(labels)
            axes.set_xticks(range(classes), names, rotation=0 if labels is None else 90, fontsize=8)
            axes.set_yticks(range(classes), names, fontsize=8)
        axes.set_xlabel("predicted class")
        axes.set_ylabel("clean class")
        axes.set_title(textwrap.fill(name, 30), fontsize=10)
    figure.colorbar(image, ax=panels, shrink=0.8, label="share of the clean class (%)")
    return _write(figure, path)


def trajectories(
    panels: Mapping[str, Mapping[str, Sequence[tuple[Sequence[float], Sequence[float]]]]],
    labels: Mapping[str, tuple[str, str]],
    path: PathLike,
) -> Figure:
    """Where runs of one start go in two directions: at equal x, the exaggerated bias towards the top direction is the lower line.

    panels: by its title, the runs of each panel by their names, each with one curve (x, y) a seed, oldest record first; the
    last record is marked. labels: of each panel's axes, top direction first.
    """
    _need(list(panels), "panels")
    figure, all_axes = _figure(len(panels), (4.6 * len(panels), 4.2))
    for axes, (title, runs) in zip(all_axes, panels.items(), strict=True):
        for index, (name, curves_of_seeds) in enumerate(runs.items()):
            color, marker = _PALETTE[index % len(_PALETTE)], _MARKERS[index % len(_MARKERS)]
            for seed, (x, y) in enumerate(curves_of_seeds):
                axes.plot(
                    x, y, color=color, linewidth=1.4, alpha=0.8, linestyle=("-", "--")[index % 2], marker=marker,
                    markersize=6, markevery=[len(x) - 1], label=name if seed == 0 else None,
                )  # fmt: skip
        axes.set_xlabel(textwrap.fill(labels[title][0], 44))
        axes.set_ylabel(textwrap.fill(labels[title][1], 44))
        axes.set_title(textwrap.fill(title, 44), fontsize=11)
        _legend(axes)
    return _write(figure, path)


# --------------------------------------------------------------------------------------------- what a method hangs on


def score_sweeps(
    panels: Mapping[str, Mapping[str, Mapping[float, Sequence[float]]]],
    levels: Mapping[str, Sequence[float]],
    y_label: str,
    path: PathLike,
) -> Figure:
    """One panel for each label of an x axis, side by side on one y axis: mean ± standard deviation over seeds at each x.

    panels: by its x label, the lines of each panel by their names, {x: values, one a seed}; a name has one colour in all
    panels. Places of an axis stand side by side at equal distances, whatever lies between their numbers. levels: values
    that hang on neither axis, one a seed, drawn as dashed lines at their means.
    """
    _need(list(panels), "panels")
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    figure, all_axes = _figure(len(panels), (1.6 + 4.6 * len(panels), 4.9))
    figure.set_layout_engine("constrained")  # the only one that leaves room for a legend below the panels
    handles: dict[str, Any] = {}
    for axes, (x_label, lines) in zip(all_axes, panels.items(), strict=True):
        places = sorted({place for points in lines.values() for place in points})
        for name, points in lines.items():
            index = names.index(name)
            x = sorted(points)
            means, stds, _ = zip(*[mean_and_std(points[place]) for place in x], strict=True)
            apart = [places.index(place) + 0.06 * (index - (len(names) - 1) / 2) for place in x]
            style: dict[str, Any] = {
                "color": _PALETTE[index % len(_PALETTE)],
                "marker": _MARKERS[index % len(_MARKERS)],
            }
            handles[name] = axes.errorbar(apart, means, stds, capsize=3, markersize=5, linewidth=1.4, **style)
        for number, (name, scores) in enumerate(levels.items()):
            line = axes.axhline(mean_and_std(scores)[0], color="0.35", linewidth=1.1, linestyle=("--", ":")[number % 2])
            handles[name] = line
        axes.set_xticks(range(len(places)), [f"{place:g}" for place in places])
        axes.set_xlim(-0.5, len(places) - 0.5)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
    limits = [axes.get_ylim() for axes in all_axes]
    for axes in all_axes:  # sharey would keep the first panel's, and cut off what lies below it in the others
        axes.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
    counts = {len(values) for lines in panels.values() for points in lines.values() for values in points.values()}
    note = "one seed" if counts == {1} else f"mean ± std, {'-'.join(map(str, sorted(counts)))} seeds"
    figure.suptitle(f"{y_label.split(' (')[0]} ({note})", fontsize=12)
    shown = [*names, *levels]
    figure.legend(
        [handles[name] for name in shown],
        shown,
        loc="outside lower center",
        ncols=1 + len(panels),
        frameon=False,
        fontsize=9,
    )
    return _write(figure, path)


# -------------------------------------------------------------------------------------- what a coordinator has learned


def weight_quartiles(weights: Mapping[str, Mapping[str, Mapping[int, Sequence[float]]]], path: PathLike) -> Figure:
    """How a coordinator's weights of the examples spread over training: one panel for each student, on one y axis.

    weights: by student and by loss, {step: (25 %, 50 %, 75 % quantile)}. A line is the median, its band the middle half.
    """
    _need(list(weights), "weights")
    figure, all_axes = _figure(len(weights), (1.2 + 3.2 * len(weights), 3.9))
    figure.set_layout_engine("constrained")  # the only one that leaves room for a legend below the panels
    parts = list(dict.fromkeys(part for losses in weights.values() for part in losses))
    handles: dict[str, Any] = {}
    for axes, (student, losses) in zip(all_axes, weights.items(), strict=True):
        for part, points in losses.items():
            color, steps = _PALETTE[parts.index(part) % len(_PALETTE)], sorted(points)
            low, middle, high = zip(*[points[step] for step in steps], strict=True)
            axes.fill_between(steps, low, high, color=color, alpha=0.25, linewidth=0)
            (handles[part],) = axes.plot(steps, middle, color=color, linewidth=1.6)
        axes.set_title(student, fontsize=11)
        axes.set_xlabel("step")
    limits = [axes.get_ylim() for axes in all_axes]
    for axes in all_axes:
        axes.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
    all_axes[0].set_ylabel("weight of an example")
    figure.suptitle("Weights over training (line: median, band: middle half of the examples)", fontsize=12)
    names = [f"{part} loss" for part in handles]
    figure.legend(
        list(handles.values()), names, loc="outside lower center", ncols=len(names), frameon=False, fontsize=9
    )
    return _write(figure, path)
