"""The closed forms against simulated descent, exact arithmetic and an ODE solver; directions and pairs against slow loops."""

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import solve_ivp
from scipy.linalg import expm
from torch import nn

from hfkd.diagnostics.eigenspace import (
    Directions,
    LinearFlow,
    compare,
    covariance_directions,
    layer_directions,
    one_hot_time,
    progress,
)
from hfkd.diagnostics.trajectory import Trajectory

ROWS, WIDTH = 6, 9
# Twelve orders of magnitude, so that one time finds some of them finished, some half-way and some not begun
EIGENVALUES = np.sort(np.concatenate([np.geomspace(1e3, 1e-9, 25), [3.0, 2.9999999, 1e-9 / 7]]))[::-1]
TIMES = [1e-3, 0.4, 1.0, 5.0]
DIGITS = 2300  # exp(-1e3 * 5) = 1e-2171 still counts beside 1


@pytest.fixture(scope="module")
def problem():
    generator = np.random.default_rng(0)
    inputs = generator.normal(size=(ROWS, WIDTH)) * np.geomspace(1, 0.1, WIDTH)
    return inputs, generator.normal(size=ROWS)


def descended(inputs, targets, time, step):
    """Gradient descent on |X theta - y|^2 / 2, one step after the other, from 0."""
    theta = np.zeros(inputs.shape[1])
    for _ in range(round(time / step)):
        theta = theta - step * inputs.T @ (inputs @ theta - targets)
    return theta


# ---- linear regression under gradient flow ----


def test_the_closed_forms_are_the_limit_of_gradient_descent(problem):
    """An oracle that is off by a factor makes every right student look as if it deviated."""
    inputs, targets = problem
    flow, student_time, teacher_time = LinearFlow(inputs, targets), 0.9, 0.5
    errors = []
    for step in (2e-3, 1e-3):
        teacher = descended(inputs, targets, teacher_time, step)
        student = descended(inputs, inputs @ teacher, student_time, step)
        third = descended(inputs, inputs @ student, 1.3, step)
        found = [flow.weights(teacher_time), flow.weights(student_time, teacher_time)]
        found.append(flow.weights(1.3, student_time, teacher_time))
        errors.append([np.abs(a - b).max() for a, b in zip((teacher, student, third), found, strict=True)])
    coarse, fine = np.array(errors)
    assert (fine < 2e-3).all()
    np.testing.assert_allclose(coarse / fine, 2.0, rtol=0.05)  # first order: what is left is the size of the step


def test_the_closed_forms_solve_the_flow(problem):
    """A filter of descent with one step size is not the flow's; a solver of the differential equation tells them apart."""
    inputs, targets = problem
    teacher = LinearFlow(inputs, targets).predictions(0.7)
    exact = (np.eye(ROWS) - expm(-0.7 * inputs @ inputs.T)) @ targets
    np.testing.assert_allclose(teacher, exact, atol=1e-12)
    times = np.array([0.1, 1.0, 4.0])
    solved = solve_ivp(
        lambda _, theta: -inputs.T @ (inputs @ theta - teacher),
        (0, 4),
        np.zeros(WIDTH),
        t_eval=times,
        rtol=1e-10,
        atol=1e-12,
    )
    np.testing.assert_allclose(LinearFlow(inputs, targets).weights(times, 0.7), solved.y.T, atol=1e-8)


def test_times_are_broadcast_and_coefficients_are_projections(problem):
    """A sweep over times that mixes student and teacher times draws another experiment's curve."""
    flow = LinearFlow(*problem)
    student, teacher = np.array([0.2, 3.0]), np.array([[0.5], [1.0], [2.0]])
    found = flow.coefficients(student, teacher)
    assert found.shape == (3, 2, len(flow.eigenvalues)) and flow.predictions(student, teacher).shape == (3, 2, ROWS)
    np.testing.assert_allclose(found[2, 0], flow.coefficients(0.2, 2.0), rtol=1e-14)
    np.testing.assert_allclose(found, flow.weights(student, teacher) @ flow.vectors, atol=1e-12)
    np.testing.assert_allclose(
        flow.predictions(student, teacher), flow.weights(student, teacher) @ problem[0].T, atol=1e-12
    )
    np.testing.assert_allclose(flow.vectors.T @ flow.vectors, np.eye(ROWS), atol=1e-12)


def test_fewer_features_than_rows_and_twice_the_same_row():
    """A zero eigenvalue that is divided by fills the weights with infinity."""
    inputs = np.array([[1.0, 2.0], [1.0, 2.0], [2.0, 4.0]])
    flow = LinearFlow(inputs, [1.0, 2.0, 3.0])
    assert flow.eigenvalues == pytest.approx([30.0])
    np.testing.assert_allclose(flow.weights(1e9), np.linalg.pinv(inputs) @ [1.0, 2.0, 3.0], atol=1e-12)


def exactly(eigenvalue, *times, digits=60):
    """The time of the one-hot run in more digits than the exponentials can saturate."""
    with mpmath.workdps(digits):
        share = mpmath.mpf(1)
        for time in times:
            share *= -mpmath.expm1(-mpmath.mpf(eigenvalue) * mpmath.mpf(time))
        if share < 0.5:
            return -mpmath.log1p(-share) / eigenvalue
        missing = mpmath.mpf(0)  # of 1 - share, without cancelling: 1 - (1 - x)(1 - y) = x + y (1 - x)
        for time in times:
            each = mpmath.exp(-mpmath.mpf(eigenvalue) * mpmath.mpf(time))
            missing += each * (1 - missing)
        return -mpmath.log(missing) / eigenvalue


@pytest.mark.parametrize("student_time", TIMES)
@pytest.mark.parametrize("teacher_time", TIMES)
def test_a_student_falls_behind_in_every_lower_direction(student_time, teacher_time):
    """The paper's inequality for all pairs of eigenvalues. Naive arithmetic violates it where exponentials saturate, and
    what is a rounding would be reported as a counterexample."""
    times = one_hot_time(EIGENVALUES, student_time, teacher_time)
    exact = [exactly(value, student_time, teacher_time, digits=DIGITS) for value in EIGENVALUES.tolist()]
    np.testing.assert_allclose(times, [float(time) for time in exact], rtol=1e-12)
    for i, top in enumerate(EIGENVALUES):
        for j in range(i + 1, len(EIGENVALUES)):
            assert exact[j] < exact[i]
            assert times[j] <= times[i] * (1 + 1e-14), (top, EIGENVALUES[j])
            if exact[j] < exact[i] * (1 - mpmath.mpf(1e-11)):
                # In the words of section 2.4: equal in direction i at the one-hot time, behind in direction j
                assert times[j] < times[i]
                student = progress(EIGENVALUES[[j]], student_time, teacher_time)
                assert student <= progress(EIGENVALUES[[j]], times[i])


VALUES = st.floats(1e-6, 1e6)


@settings(max_examples=200, deadline=None)
@given(VALUES, VALUES, VALUES, VALUES, st.lists(VALUES, max_size=2))
def test_the_inequality_is_a_law(first, second, student_time, teacher_time, further):
    """Also with teachers of teachers: each round adds a factor and must not turn the order round."""
    lower, top = sorted((first, second))
    low, high = one_hot_time([lower, top], student_time, teacher_time, *further)
    assert low <= high * (1 + 1e-13)
    assert high <= min(student_time, teacher_time, *further) * (1 + 1e-13), "one-hot is never slower than any factor"
    np.testing.assert_allclose(float(exactly(top, student_time, teacher_time, *further)), high, rtol=1e-9, atol=1e-300)


def test_one_time_is_the_one_hot_run_itself():
    """If the student of nobody had a delay, all the others' would be too large."""
    np.testing.assert_allclose(one_hot_time(EIGENVALUES, 0.4), 0.4, rtol=1e-14)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: LinearFlow(np.eye(3), [1.0, 2.0]), "3 rows, and targets the shape"),
        (lambda: LinearFlow([[1.0, np.nan], [1.0, 2.0]], [1.0, 2.0]), r"inputs are not finite in 1 of 2 rows: \[0\]"),
        (lambda: LinearFlow(np.eye(2), [1.0, np.inf]), r"targets are not finite in 1 of 2 rows: \[1\]"),
        (lambda: LinearFlow([1.0, 2.0], [1.0, 2.0]), r"\(rows, width\)"),
        (lambda: progress([1.0], -1.0), "times are finite and 0 or above"),
        (lambda: progress([1.0]), "a time is missing"),
        (lambda: one_hot_time([1.0, 0.0], 1.0, 1.0), "above 0"),
        (lambda: covariance_directions([[1.0, 2.0]]), "2 rows or more, not 1"),
        (lambda: covariance_directions([[1.0], [np.inf], [np.nan]]), r"not finite in 2 of 3 rows: \[1, 2\]"),
        (lambda: covariance_directions(np.eye(3)).at([0, 2]), "directions 0 to 1, the rank"),
    ],
)
def test_what_cannot_be_computed_is_said(call, words):
    """A nan among the inputs gives a figure without lines, and nobody knows which row to look at."""
    with pytest.raises(ValueError, match=words):
        call()


# ---- directions ----


def test_directions_are_the_covariances(problem):
    """Directions of the second moment under the covariance's name begin with the mean image."""
    generator = np.random.default_rng(1)
    rows = generator.normal(size=(500, 4)) @ np.diag([1.0, 3.0, 0.5, 0.0]) + [1e4, 0.0, 0.0, 0.0]
    centred, plain = covariance_directions(rows), covariance_directions(rows, centred=False)
    matrix = np.cov(rows.T, bias=True)
    np.testing.assert_allclose(centred.vectors * centred.eigenvalues @ centred.vectors.T, matrix, atol=1e-9)
    assert (np.diff(centred.eigenvalues) <= 0).all() and centred.rank == 3
    assert np.abs(centred.vectors[:, 0]).argmax() == 1 and np.abs(plain.vectors[:, 0]).argmax() == 0
    second = rows.T @ rows / len(rows)
    np.testing.assert_allclose(plain.vectors * plain.eigenvalues @ plain.vectors.T, second, rtol=1e-9, atol=1e-3)
    assert centred.at([2]).eigenvalues == centred.eigenvalues[[2]]
    largest = np.abs(centred.vectors).argmax(0)
    assert (centred.vectors[largest, range(4)] > 0).all(), "one covariance, one set of directions"


class Images(nn.Module):
    def __init__(self, first):
        super().__init__()
        self.first, self.dropout = first, nn.Dropout()

    def forward(self, pixel_values):
        return self.dropout(self.first(pixel_values))


@pytest.mark.parametrize(
    "convolution",
    [
        nn.Conv2d(3, 5, 3),
        nn.Conv2d(3, 5, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
        nn.Conv2d(3, 5, 4, padding="same"),
        nn.Conv2d(3, 5, 4, stride=4),
    ],
    ids=["plain", "odd", "same", "patches"],
)
def test_the_patches_are_what_the_filters_multiply(convolution):
    """Patches in another order than the weights' (or without the padding) give directions of other data."""
    model = Images(convolution).train()
    batches = [{"pixel_values": torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(n))} for n in (4, 1)]
    found = layer_directions(model, "first", batches, centred=False)
    assert model.training and model.dropout.training, "the flags are restored"
    outputs = torch.cat([convolution(batch["pixel_values"]).transpose(0, 1).flatten(1) for batch in batches], 1)
    outputs = (outputs - convolution.bias[:, None]).detach().double().numpy()
    # The second moment of what comes out is W S W^T, with S the one of what goes in
    weight = convolution.weight.detach().double().flatten(1).numpy()
    covariance = found.vectors * found.eigenvalues @ found.vectors.T
    np.testing.assert_allclose(weight @ covariance @ weight.T, outputs @ outputs.T / outputs.shape[1], atol=1e-6)


def test_features_are_the_heads_inputs_in_eval_mode():
    """Features seen through dropout have noise for their lower directions."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"body": nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Dropout(0.5)), "head": nn.Linear(6, 2)})
    model.forward = lambda inputs: model["head"](model["body"](inputs))
    rows = torch.randn(40, 4)
    found = layer_directions(model, "head", [{"inputs": rows[:30]}, {"inputs": rows[30:]}])
    expected = covariance_directions(model["body"].eval()(rows).detach().numpy())
    np.testing.assert_allclose(found.eigenvalues, expected.eigenvalues, atol=1e-9)
    kept = expected.rank
    np.testing.assert_allclose(found.vectors[:, :kept], expected.vectors[:, :kept], atol=1e-5)


def test_layers_without_directions_are_refused():
    """Norms and grouped filters have weights, too, and numbers of them would be drawn without a word."""
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.BatchNorm2d(4), nn.Linear(3, 2))
    for layer, words in (("1", "'1' is BatchNorm2d here.*0, 2"), ("head", "no module"), ("0", "groups=2")):
        with pytest.raises(ValueError, match=words):
            layer_directions(model, layer, [])
    with pytest.raises(ValueError, match="2 rows or more, not 0"):
        layer_directions(model, "2", [])


# ---- pairs ----


def run(curves, **changes):
    curves = np.asarray(curves, dtype=float)
    return Trajectory(np.arange(len(curves)), curves, curves - curves[0], **changes)


def test_the_theory_holds_for_every_pair_and_turned_round_for_none(problem):
    """A sign that is turned, or pairs counted twice, prints 0 % for what the theory says is 100 %."""
    flow, times = LinearFlow(*problem), np.concatenate([[0.0], np.geomspace(1e-3, 1e3, 4000)])
    one_hot, distilled = run(flow.coefficients(times)), run(flow.coefficients(times, 2.0))
    found = compare(one_hot, distilled)
    assert (found.share, found.pairs, found.skipped) == (1.0, ROWS * (ROWS - 1) // 2, 0)
    assert np.isnan(found.gaps[np.tril_indices(ROWS)]).all() and (found.gaps[np.triu_indices(ROWS, 1)] < 0).all()
    assert compare(distilled, one_hot).share == 0.0
    assert compare(one_hot, one_hot).share == 0.0, "equal is not smaller"
    assert compare(one_hot, distilled, moves=True).share == 1.0


def test_a_gap_is_the_mean_height_between_the_curves():
    """c_j at equal times instead of equal c_i compares a fast run with a slow one."""
    one_hot = run([[0, 0], [1, 2], [2, 4], [3, 6]])  # c_j = 2 c_i
    slow = run(
        [[0, 0], [0.5, 0.5], [0.3, 0.9], [2, 2]]
    )  # dips; first passages lie on c_j = c_i, then on a line from the dip
    found = compare(one_hot, slow)
    levels = np.linspace(0, 2, 51)[1:]
    theirs = np.where(levels <= 0.5, levels, 0.9 + (levels - 0.3) * 1.1 / 1.7)
    assert found.gaps[0, 1] == pytest.approx((theirs - 2 * levels).mean())
    assert (found.share, found.pairs) == (1.0, 1)


def test_a_direction_that_never_grows_is_left_out():
    """A pair without a common value of c_i has no gap; counted as a failure it would lower the share."""
    one_hot, distilled = run([[1, 1, 1], [0.5, 2, 3]]), run([[1, 1, 1], [2, 3, 2]])
    found = compare(one_hot, distilled)
    assert (found.pairs, found.skipped) == (1, 2) and np.isnan(found.gaps[0]).all() and found.gaps[1, 2] < 0
    assert np.isnan(compare(run([[1.0, 1.0], [1.0, 1.0]]), run([[1.0, 1.0], [1.0, 1.0]])).share)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.1, 10.0))
def test_units_and_signs_do_not_matter(seed, scale):
    """Eigenvectors have no sign, and weights no unit: a share that moves with them says nothing."""
    generator = np.random.default_rng(seed)
    start = generator.normal(size=(1, 4))
    curves = [np.concatenate([start, start + generator.normal(size=(8, 4))]) for _ in range(2)]
    turned = [curve * np.array([1, -1, 1, -1]) * scale for curve in curves]
    one, other = compare(*map(run, curves)), compare(*map(run, turned))
    np.testing.assert_allclose(one.gaps * scale, other.gaps, atol=1e-9)


def test_runs_that_cannot_be_compared():
    """Other starts or directions give two curves that have nothing to do with each other."""
    first = run([[0.0, 0.0], [1.0, 1.0]])
    for other, words in (
        (run([[0.0, 0.1], [1.0, 1.0]]), "other starts"),
        (run([[0.0, 0.0], [1.0, 1.0]], directions="x"), "other directions"),
        (run([[0.0, 0.0]]), "1 records"),
        (run([[0.0, 0.0], [1.0, np.nan]]), r"distilled run are not finite in 1 of 2 rows: \[1\]"),
    ):
        with pytest.raises(ValueError, match=words):
            compare(first, other)
    with pytest.raises(ValueError, match=r"\(k,\) and \(width, k\)"):
        Directions(np.ones(2), np.ones((3, 3)))
