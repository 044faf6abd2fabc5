"""Slopes against closed forms, plain loops and scipy; wrong inputs against their sentences."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from hfkd.diagnostics.logit_logit import fit, logit_logit, logit_of_class, with_interval

generator = np.random.default_rng(0)
TEACHER = generator.normal(0, 2, (200, 4))
STUDENT = 0.7 * TEACHER + generator.normal(0, 1, (200, 4))
LABELS = np.where(generator.random(200) < 0.7, TEACHER.argmax(1), generator.integers(0, 4, 200))
# Whole numbers below 30: probabilities up to 1 - 1e-13, and sums of which nothing is lost
LOGITS = arrays(np.float64, st.tuples(st.integers(2, 12), st.integers(2, 5)), elements=st.integers(-15, 15).map(float))


def loop(student, teacher, student_temperature=1.0, teacher_temperature=1.0):
    """X and Y by probabilities, one example at a time."""
    points = []
    for ours, theirs in zip(student.tolist(), teacher.tolist(), strict=True):
        k = max(range(len(theirs)), key=theirs.__getitem__)
        point = []
        for logits, temperature in ((theirs, teacher_temperature), (ours, student_temperature)):
            weights = [math.exp(z / temperature) for z in logits]
            p = weights[k] / math.fsum(weights)
            point.append(math.log(p / (1 - p)))
        points.append(point)
    return np.array(points).T


def varies(teacher):
    return np.ptp(logit_of_class(teacher, teacher.argmax(1))) > 1e-6


# ---- closed forms ----


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_identical_logits_are_the_line_of_imitation(classes):
    """Any other number calls a copy of the teacher a deviation from it."""
    logits = np.random.default_rng(1).normal(0, 3, (50, classes))
    found = logit_logit(logits, logits)
    assert (found.slope, found.intercept) == (pytest.approx(1.0, abs=1e-12), pytest.approx(0.0, abs=1e-12))
    assert found.slope_interval == pytest.approx((1.0, 1.0)) and found.line.share_below == 0.0
    assert not found.underfits_low_confidence and not found.overfits_high_confidence


@pytest.mark.parametrize("factor", [2.0, 0.5])
def test_two_classes_multiply(factor):
    """With two classes phi is the difference of the logits: twice the teacher's must have slope 2, or exaggeration is
    over- or understated."""
    teacher = np.random.default_rng(2).normal(0, 3, (50, 2))
    found = logit_logit(factor * teacher, teacher)
    assert found.slope == pytest.approx(factor, rel=1e-12) and found.intercept == pytest.approx(0.0, abs=1e-12)
    assert found.overfits_high_confidence == (factor > 1)
    assert found.underfits_low_confidence == (factor < 1), (
        "X is at least 0 with two classes: k is the teacher's top one"
    )


def test_a_shift_of_the_odds_is_the_intercept():
    """A student whose odds for the teacher's class are e^3 times the teacher's exaggerates evenly: slope 1, intercept 3."""
    student = TEACHER.copy()
    student[np.arange(200), TEACHER.argmax(1)] += 3.0
    found = logit_logit(student, TEACHER)
    assert (found.slope, found.intercept) == (pytest.approx(1.0), pytest.approx(3.0))
    assert found.line.mean_difference == pytest.approx(3.0) and found.line.share_below == 0.0


def test_certainty_is_not_clipped():
    """Through probabilities, 1 - 1e-40 is 1 and phi infinite: exactly the confident examples would drop out."""
    teacher = np.array([[1000.0, 0.0], [90.0, 0.0], [3.0, 0.0]])
    assert logit_logit(2 * teacher, teacher).x.tolist() == [1000.0, 90.0, 3.0]
    assert logit_logit(2 * teacher, teacher).slope == pytest.approx(2.0)
    single = torch.tensor([[200.0, 0.0], [1.0, 0.0]])  # log-probabilities in float32: 0 and -200
    assert logit_of_class(single.log_softmax(-1), [0, 0]) == pytest.approx([200.0, 1.0], rel=1e-6)


# ---- against slow references ----


def test_x_and_y_are_those_of_the_teachers_class():
    """At the label instead of the teacher's class, or at the student's own class, the plot answers another question."""
    found = logit_logit(STUDENT, TEACHER, student_temperature=1.0, teacher_temperature=4.0)
    x, y = loop(STUDENT, TEACHER, 1.0, 4.0)
    np.testing.assert_allclose(found.x, x, atol=1e-9)
    np.testing.assert_allclose(found.y, y, atol=1e-9)
    assert found.classes.tolist() == TEACHER.argmax(1).tolist()
    expected = stats.linregress(x, y)
    assert (found.slope, found.intercept) == (pytest.approx(expected.slope), pytest.approx(expected.intercept))
    turned = logit_logit(STUDENT, TEACHER, student_temperature=4.0, teacher_temperature=1.0)
    np.testing.assert_allclose(turned.y, loop(STUDENT, TEACHER, 4.0, 1.0)[1], atol=1e-9)


def test_intervals_are_those_of_scipys_bootstrap():
    """Too narrow, they make two seeds of one method into a finding."""
    found = logit_logit(STUDENT, TEACHER, bootstrap=2000)
    expected = stats.bootstrap(
        (found.x, found.y),
        lambda x, y: (lambda line: np.array([line.slope, line.intercept]))(stats.linregress(x, y)),
        paired=True, vectorized=False, n_resamples=2000, method="percentile", rng=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    widths = expected.high - expected.low
    for place, interval in enumerate((found.slope_interval, found.intercept_interval)):
        bounds = (expected.low[place], expected.high[place])
        np.testing.assert_allclose(interval, bounds, atol=0.12 * widths[place])
    assert logit_logit(STUDENT, TEACHER).line == logit_logit(STUDENT, TEACHER).line, "a function of the seed"
    assert logit_logit(STUDENT, TEACHER, seed=1).slope_interval != logit_logit(STUDENT, TEACHER).slope_interval


def test_intervals_cover_the_slope_they_are_about():
    """Intervals that miss the truth more often than they say turn noise into results."""
    draws, truth, covered = np.random.default_rng(0), 1.3, 0
    for turn in range(200):
        x = draws.normal(0, 2, 80)
        line = fit(x, 0.5 + truth * x + draws.normal(0, 1 + 0.3 * np.abs(x)), bootstrap=200, seed=turn)
        covered += line.slope_interval[0] <= truth <= line.slope_interval[1]
    assert 0.88 <= covered / 200 <= 0.99


def test_bins_and_subsets_hold_what_they_say():
    """A share that is read as low-confidence underfitting, of other examples, is an argument about nothing."""
    found = logit_logit(STUDENT, TEACHER, LABELS, bins=5)
    order = np.argsort(found.x)
    for part, rows in zip(found.bins, np.array_split(order, 5), strict=True):
        gap = found.y[rows] - found.x[rows]
        assert part.count == len(rows) == 40 and (part.low, part.high) == (found.x[rows[0]], found.x[rows[-1]])
        assert part.mean_difference == pytest.approx(gap.mean()) and part.share_below == np.mean(gap < 0)
        assert part.mean_x == pytest.approx(found.x[rows].mean())
    right = TEACHER.argmax(1) == LABELS
    for name, chosen in (("right", right), ("wrong", ~right)):
        expected = stats.linregress(found.x[chosen], found.y[chosen])
        assert found.subsets[name].slope == pytest.approx(expected.slope)
        assert found.subsets[name].count == chosen.sum()
    assert logit_logit(STUDENT, TEACHER).subsets == {}


def test_equal_x_share_a_bin():
    """Split by their place in the file, equal examples would show a trend that is the file's order."""
    teacher = np.array([[2.0, 0.0]] * 6 + [[1.0, 0.0]] * 2)
    found = logit_logit(teacher, teacher, bins=4)
    assert [part.count for part in found.bins] == [2, 6]


# ---- properties ----


@settings(max_examples=60, deadline=None)
@given(LOGITS, LOGITS, st.floats(0.5, 8.0), st.floats(-50, 50))
def test_a_shift_of_all_logits_and_a_common_temperature_change_nothing(teacher, student, temperature, shift):
    """Softmax does not see a constant; scaled logits at the same scale of temperature are the same probabilities. A number that
    does see it compares implementations, not models."""
    student = np.resize(student, teacher.shape)
    if not varies(teacher):
        return
    found = logit_logit(student, teacher, bootstrap=0)
    shifted = logit_logit(student + shift, teacher - shift, bootstrap=0)
    scaled = logit_logit(student * temperature, teacher * temperature, None, temperature, temperature, bootstrap=0)
    for other in (shifted, scaled):
        np.testing.assert_allclose(other.x, found.x, atol=1e-8)
        np.testing.assert_allclose(other.y, found.y, atol=1e-8)
        assert other.slope == pytest.approx(found.slope, rel=1e-5, abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(LOGITS, st.randoms(use_true_random=False), st.floats(-3, 3), st.floats(-5, 5))
def test_a_student_on_a_line_has_that_line(teacher, random, slope, intercept):
    """Y = a + b X must give back a and b in any row order, else slopes depend on how a file is sorted."""
    classes = teacher.argmax(1)
    x = logit_of_class(teacher, classes)
    if not varies(teacher):
        return
    # All other classes equal: phi is z_k - z_other - log(C - 1)
    student = np.zeros_like(teacher)
    student[np.arange(len(x)), classes] = intercept + slope * x + math.log(teacher.shape[1] - 1)
    rows = list(range(len(x)))
    random.shuffle(rows)
    found = logit_logit(student[rows], teacher[rows], bootstrap=0)
    assert found.slope == pytest.approx(slope, abs=1e-6) and found.intercept == pytest.approx(intercept, abs=1e-4)
    assert sum(part.count for part in found.bins) == len(x)
    total = sum(part.count * part.mean_difference for part in found.bins)
    assert total == pytest.approx(found.line.mean_difference * len(x), abs=1e-6)


# ---- what is refused ----


@pytest.mark.parametrize(
    ("student", "teacher", "arguments", "sentence"),
    [
        (STUDENT[:, :3], TEACHER, {}, r"one shape, not \(200, 3\) and \(200, 4\)"),
        (STUDENT[:9], TEACHER, {}, r"one shape, not \(9, 4\) and \(200, 4\)"),
        (STUDENT[0], TEACHER[0], {}, r"the student's logits must have shape \(examples, classes\), not \(4,\)"),
        (STUDENT[:0], TEACHER[:0], {}, r"not \(0, 4\)"),
        (STUDENT[:, :1], TEACHER[:, :1], {}, "one class: .* the columns 0 and z"),
        (STUDENT, TEACHER[:1].repeat(200, 0), {}, r"X is .* for all 200 examples: a line needs two"),
        (STUDENT, TEACHER, {"labels": np.full(200, -100)}, "labels run from -100 to -100.*drop"),
        (STUDENT, TEACHER, {"labels": LABELS[:9]}, r"\(200, 4\) and \(9,\)"),
        (STUDENT, TEACHER, {"student_temperature": 0.0}, "student_temperature must be a finite number above 0, not 0.0"),
        (STUDENT, TEACHER, {"teacher_temperature": -2.0}, "teacher_temperature must be .* not -2.0"),
        (STUDENT, TEACHER, {"teacher_temperature": math.inf}, "not inf"),
        (STUDENT, TEACHER, {"bootstrap": -1}, "bootstrap must be 0 or more"),
        (STUDENT, TEACHER, {"bins": 0}, "bins 1 or more"),
        (STUDENT, TEACHER, {"student_ids": range(200)}, "ids of one side"),
        (STUDENT, TEACHER, {"student_ids": range(9), "teacher_ids": range(200)}, "200 rows need 200 ids a side, not 9"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said(student, teacher, arguments, sentence):
    """Broadcast, cut or guessed, each of these gives a slope, and nobody sees that it is of nothing."""
    with pytest.raises(ValueError, match=sentence):
        logit_logit(student, teacher, **arguments)


def test_another_row_order_is_told_from_other_examples():
    """Students and teachers of different rows have slope 0: the worst student there is, by a sorting mistake."""
    ids = np.arange(200)
    turned = ids.copy()
    turned[[3, 5]] = [5, 3]
    assert logit_logit(STUDENT, TEACHER, student_ids=ids, teacher_ids=ids.tolist()).slope > 0.3
    with pytest.raises(ValueError, match="row 3 is example 3 of the student and example 5 .*another order, sort them"):
        logit_logit(STUDENT, TEACHER, student_ids=ids, teacher_ids=turned)
    with pytest.raises(ValueError, match="row 0 is example a0 of the student and example a1 .*the examples differ"):
        logit_logit(STUDENT, TEACHER, student_ids=[f"a{i}" for i in ids], teacher_ids=[f"a{i + 1}" for i in ids])


@pytest.mark.parametrize(
    ("value", "reason"), [(math.nan, "diverged"), (-math.inf, "exactly 0 or 1"), (math.inf, "0 or 1")]
)
def test_rows_that_are_not_finite_are_named(value, reason):
    """One nan makes every slope nan; a user with 100,000 rows must be told which one."""
    broken = STUDENT.copy()
    broken[[7, 42], 2] = value
    with pytest.raises(ValueError, match=rf"student's .* 2 of 200 rows \(7, 42\), row 7 holds .*{reason}"):
        logit_logit(broken, TEACHER)
    broken = TEACHER.copy()
    broken[:, 0] = value
    with pytest.raises(ValueError, match=r"teacher's .* 200 of 200 rows \(0, 1, 2, 3, 4, ...\)"):
        logit_logit(STUDENT, broken)


def test_probabilities_are_refused_and_their_logarithms_are_not():
    """Softmax over probabilities squeezes all slopes towards 1: a plot that looks fine."""
    probabilities = np.exp(TEACHER) / np.exp(TEACHER).sum(1, keepdims=True)
    with pytest.raises(ValueError, match="teacher's rows .* these are probabilities"):
        logit_logit(STUDENT, probabilities)
    with pytest.raises(ValueError, match="student's rows .* these are probabilities"):
        logit_logit(np.eye(4)[LABELS], TEACHER)
    np.testing.assert_allclose(logit_logit(STUDENT, np.log(probabilities)).x, logit_logit(STUDENT, TEACHER).x)
    with np.errstate(divide="ignore"), pytest.raises(ValueError, match=r"row 0 holds -inf: a probability is exactly 0"):
        logit_logit(STUDENT, np.log(np.eye(4)[LABELS]))


# ---- in words ----


def test_a_subset_without_a_line_says_so():
    """A teacher that is right everywhere has no line where it is wrong; 0 or an error would end a report at its best case."""
    found = logit_logit(STUDENT, TEACHER, TEACHER.argmax(1), bootstrap=50)
    assert found.subsets["wrong"].count == 0 and math.isnan(found.subsets["wrong"].slope)
    assert found.to_dict()["subsets"]["wrong"]["slope"] is None
    assert "| teacher wrong | 0 | – | – | – | – |" in found.markdown()
    assert found.subsets["right"] == found.line


def test_the_numbers_survive_json_and_markdown_shows_them():
    """nan is no JSON: a card's reader would stop at it."""
    found = logit_logit(STUDENT, TEACHER, LABELS, bootstrap=0)
    numbers = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert numbers["slope"] == found.slope and numbers["slope_interval"] == [None, None]
    assert len(numbers["bins"]) == 10 and set(numbers["subsets"]) == {"right", "wrong"}
    assert f"| all | 200 | {found.slope:.2f} | {found.intercept:.2f} |" in found.markdown()
    assert with_interval(1.234, (1.1, 1.4)) == "1.23 [1.10, 1.40]" and with_interval(math.nan, (1.1, 1.4)) == "–"


# ---- the figure ----


def test_the_grid_shows_points_lines_and_the_line_of_imitation(tmp_path):
    """On axes of two scales, or without Y = X, exaggeration cannot be seen; in another panel it is another setting's."""
    pytest.importorskip("matplotlib")
    from hfkd.diagnostics import plots

    many = np.random.default_rng(0).normal(0, 3, (5000, 3))
    double = logit_logit(2 * TEACHER, TEACHER, bootstrap=50)
    grid = {"digits": {"train": double, "test": logit_logit(many, many, bootstrap=0)}}
    grid["texts"] = {"test": logit_logit(STUDENT, TEACHER, teacher_temperature=4.0, bootstrap=50)}
    panels = plots.logit_logit_grid(grid, tmp_path / "sub" / "grid.png").axes
    assert (tmp_path / "sub" / "grid.png").read_bytes().startswith(b"\x89PNG")
    assert [panel.get_title() for panel in panels] == ["digits\ntrain", "digits\ntest", "", "texts\ntest"]
    train, test, empty, scaled = panels
    assert not empty.axison and train.get_xlim() == train.get_ylim()
    assert len(train.collections[0].get_offsets()) == 200 and len(test.collections[0].get_offsets()) <= 2000
    np.testing.assert_allclose(train.collections[0].get_offsets(), np.column_stack([double.x, double.y]))
    x, y = train.lines[1].get_data()
    np.testing.assert_allclose(y, double.intercept + double.slope * np.asarray(x))
    assert [text.get_text() for text in train.get_legend().get_texts()][1] == f"slope {with_interval(*ends(double))}"
    assert "temperature 4" in scaled.get_xlabel() and "temperature" not in scaled.get_ylabel()
    with pytest.raises(ValueError, match="logit-logit plots"):
        plots.logit_logit_grid({}, tmp_path / "none.png")


def ends(found):
    return found.slope, found.slope_interval
