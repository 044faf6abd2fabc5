"""The sampler report: its numbers against slow ones, its verdict on models whose law is known, and the 1-NN toy of the theory."""

from __future__ import annotations

import json
import os
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import launching
from hfkd.data.label_noise import noisy_labels, transition_matrix
from hfkd.diagnostics.sampler import sampler_report

BENCHMARK = Path(__file__).parents[2] / "recipes" / "benchmarks" / "nearest_neighbour_sampler.py"
PARTNERS = [(label + 5) % 10 for label in range(10)]
SWAPS = transition_matrix(10, 0.2, PARTNERS)
CLEAN = np.repeat(np.arange(10), 500)


def ideal(seed: int, transition=SWAPS, clean=CLEAN) -> np.ndarray:
    """A noisy label drawn for each example: the number of steps of its row's distribution function below a uniform."""
    steps = transition.cumsum(1)[clean][:, :-1]
    return (np.random.default_rng(seed).random((len(clean), 1)) > steps).sum(1)


def with_own_errors(predictions, share: float, seed: int = 9) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return np.where(
        generator.random(len(predictions)) < share, generator.integers(0, 10, len(predictions)), predictions
    )


# ---- numbers ----


@given(st.integers(2, 5), st.integers(20, 80), st.integers(0, 1000))
def test_numbers_agree_with_a_slow_count(classes, examples, seed):
    """A confusion that is transposed or normalised by rows gives another distance, and reads as a better sampler."""
    generator = np.random.default_rng(seed)
    transition = generator.dirichlet(np.ones(classes), classes)
    clean = np.concatenate([np.arange(classes), generator.integers(0, classes, examples)])
    found = np.concatenate([np.arange(classes), generator.integers(0, classes, examples)])
    report = sampler_report(found, clean, transition, bootstrap=2)
    distance = mass = expected_mass = 0.0
    for label in range(classes):
        partner = max((j for j in range(classes) if j != label), key=lambda j: transition[label, j])
        for j in range(classes):
            here = sum(c == label and f == j for c, f in zip(clean, found, strict=True)) / len(clean)
            due = sum(c == label for c in clean) / len(clean) * transition[label, j]
            assert report.confusion[label, j] == pytest.approx(here) and report.expected[label, j] == pytest.approx(due)
            distance += abs(here - due) / 2
            mass, expected_mass = mass + here * (j == partner), expected_mass + due * (j == partner)
    assert report.total_variation == pytest.approx(distance)
    assert (report.partner_mass, report.expected_partner_mass) == pytest.approx((mass, expected_mass))
    assert report.clean_accuracy == pytest.approx(np.mean(clean == found))
    assert report.transition_estimate.sum(1) == pytest.approx(1)


def test_exact_noise_has_distance_zero_and_the_injected_numbers():
    """With the injector's own counts nothing is left to explain: 0.8 accuracy, 0.2 on partners, as the paper's teachers."""
    report = sampler_report(noisy_labels(CLEAN, SWAPS), CLEAN, SWAPS, 1.0)
    assert report.total_variation == pytest.approx(0, abs=1e-12)
    assert (report.partner_mass, report.clean_accuracy, report.noise_rate) == pytest.approx((0.2, 0.8, 0.2))
    assert report.transition_estimate == pytest.approx(SWAPS) and report.interpolates


def test_the_floor_is_what_ideal_samplers_reach():
    """A floor too low calls no model a sampler, one too high calls all of them so: 5 % of ideal ones lie above it."""
    clean = np.repeat(np.arange(4), 50)
    transition = transition_matrix(4, 0.3)
    reports = [sampler_report(ideal(seed, transition, clean), clean, transition, bootstrap=2000) for seed in range(300)]
    above = np.mean([report.total_variation > report.floor for report in reports])
    assert 0.02 < above < 0.09, "0.05, give or take three standard errors of 0.0126"
    assert len({report.floor for report in reports}) == 1, "a function of labels, noise and seed, not of the model"
    more = sampler_report(np.tile(clean, 16), np.tile(clean, 16), transition, bootstrap=2000).floor
    assert more == pytest.approx(reports[0].floor / 4, rel=0.15), "it shrinks with the root of the examples"


def test_symmetric_noise_has_every_wrong_class_as_partner():
    """One of nine equal classes taken as the partner shows a ninth of the noise: every sampler would look like a denoiser."""
    transition = transition_matrix(10, 0.3)
    report = sampler_report(ideal(1, transition), CLEAN, transition)
    assert report.expected_partner_mass == pytest.approx(0.3) and report.partner_mass == pytest.approx(0.3, abs=0.03)
    assert report.verdict.startswith("A sampler:")


# ---- the verdict ----


@pytest.mark.parametrize(
    ("predictions", "beginning"),
    [
        (ideal(0), "A sampler: its predictions cannot be told"),
        (with_own_errors(ideal(0), 0.15), "A sampler with errors of its own"),
        (CLEAN, "The noise is mostly removed"),
        (with_own_errors(CLEAN, 0.1), "The noise is mostly removed"),
        (with_own_errors(CLEAN, 1.0), "Neither a sampler nor a denoiser"),
        (np.array(PARTNERS)[CLEAN], "Neither a sampler nor a denoiser"),
    ],
    ids=["sampler", "worse sampler", "Bayes", "good classifier", "chance", "the noise alone"],
)
def test_the_verdict_on_models_of_known_law(predictions, beginning):
    """A verdict of "sampler" on a denoiser, or on chance, sends the wrong teachers into a study of days."""
    report = sampler_report(predictions, CLEAN, SWAPS)
    assert report.verdict.startswith(beginning) and report.verdict.count(".\n") == 0 and report.verdict.endswith(".")


@given(st.integers(0, 1000))
def test_noise_that_counts_as_removed_is_mostly_gone(seed):
    """ "Mostly removed" of a model that passes on more than half of the noise would be believed."""
    generator = np.random.default_rng(seed)
    kept = ideal(seed, transition_matrix(10, generator.uniform(0, 0.2), PARTNERS))
    report = sampler_report(with_own_errors(kept, generator.uniform(0, 0.3)), CLEAN, SWAPS, bootstrap=2)
    if report.verdict.startswith("The noise is mostly removed"):
        assert report.partner_mass < report.expected_partner_mass / 2
    if report.verdict.startswith("A sampler with"):
        assert report.partner_mass >= report.expected_partner_mass / 2


def test_a_model_that_does_not_fit_its_noisy_labels_is_said_so():
    """Early stopping destroys the sampler: without this the reader looks for the reason in the network."""
    report = sampler_report(with_own_errors(CLEAN, 0.1), CLEAN, SWAPS, noisy_train_accuracy=0.873)
    assert report.verdict.endswith("it does not interpolate, with 87.3 % on its noisy training labels.")
    assert report.interpolates is False and sampler_report(CLEAN, CLEAN, SWAPS).interpolates is None
    assert "interpolate" not in sampler_report(CLEAN, CLEAN, SWAPS, noisy_train_accuracy=0.99).verdict
    assert "no noise to sample" in sampler_report(CLEAN, CLEAN, np.eye(10)).verdict


def test_the_report_is_plain_json_and_a_table():
    """An array in a card's facts, or in a tracker's log, fails when everything is trained."""
    report = sampler_report(ideal(0), CLEAN, SWAPS, 1.0)
    values = json.loads(json.dumps(report.to_dict()))
    assert np.array(values["confusion"]) == pytest.approx(report.confusion) and values["examples"] == 5000
    assert values["floor"] == report.floor and values["verdict"] == report.verdict
    lines = report.markdown().splitlines()
    assert lines[0] == report.verdict and {line.count("|") for line in lines[2:]} == {4}
    assert (
        f"| total variation to the injected noise | {report.total_variation:.3f} | below {report.floor:.3f} |" in lines
    )
    assert "| accuracy on its noisy training labels | 100.0 % | 99 % or more |" in lines


def test_the_figure_shows_percent_of_the_clean_class(tmp_path):
    """Rows and columns turned, or a scale per panel, show a denoiser and a sampler as the same picture."""
    pytest.importorskip("matplotlib")
    from hfkd.diagnostics import plots

    report = sampler_report(noisy_labels(CLEAN[500:], SWAPS), CLEAN[500:], SWAPS)  # no example of class 0
    one_way = {"ideal": report.expected, "teacher": 5000 * report.confusion}
    *panels, bar = plots.confusions(one_way, tmp_path / "a.png", labels=[f"class {n}" for n in range(10)]).axes
    assert [axes.get_title() for axes in panels] == list(one_way)
    assert all((axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "clean class") for axes in panels)
    assert bar.get_ylabel() == "share of the clean class (%)"
    for axes in panels:
        shown = axes.images[0]
        assert np.asarray(shown.get_array())[1:] == pytest.approx(100 * SWAPS[1:]) and shown.get_clim() == (0, 100)
        assert np.ma.getmaskarray(shown.get_array())[0].all() or np.isnan(shown.get_array()[0]).all()
        written = {text.get_position(): text.get_text() for text in axes.texts}
        assert written[(6, 1)] == "20" and written[(1, 1)] == "80" and len(written) == 18
    for matrices, labels, message in [
        ({}, None, "nothing to draw"),
        ({"a": np.eye(3), "b": np.eye(4)}, None, r"must all be \(3, 3\), and labels 3: got .'b': \(4, 4\)"),
        ({"a": np.eye(3)}, ["x"], r"labels 3: got \['x'\]"),
        ({"a": -np.eye(3)}, None, "finite, and 0 or more"),
    ]:
        with pytest.raises(ValueError, match=message):
            plots.confusions(matrices, tmp_path / "b.png", labels)
    assert os.listdir(tmp_path) == ["a.png"]


# ---- what is refused ----


NAN = np.where(np.isin(np.arange(5000), [3, 4000]), np.nan, CLEAN)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"predictions": CLEAN % 9}, r"1 of 10 classes are never predicted.*: 9 \(500\)\. The model has collapsed"),
        ({"predictions": np.zeros(5000, int)}, "9 of 10 classes are never predicted"),
        (
            {"predictions": NAN},
            r"predictions must be class ids from 0 to 9: 2 of 5000 are not, rows \[3, 4000\], .* nan",
        ),
        ({"clean_labels": NAN}, r"clean labels must be class ids from 0 to 9: 2 of 5000 are not, rows \[3, 4000\]"),
        ({"predictions": CLEAN - 1}, "the first is -1"),
        ({"clean_labels": CLEAN + 1}, "the first is 10"),
        ({"predictions": CLEAN + 0.5}, "the first is 0.5"),
        ({"predictions": np.eye(10)[CLEAN]}, r"not \(5000, 10\) and \(5000,\); for logits take argmax"),
        ({"predictions": CLEAN[:99]}, r"not \(99,\) and \(5000,\)"),
        ({"predictions": [], "clean_labels": []}, r"not \(0,\) and \(0,\)"),
        ({"predictions": CLEAN.astype(str)}, "class ids, not <U"),
        ({"transition": SWAPS * 0.9}, r"do not \(row: sum\): 0: 0.9, 1: 0.9"),
        ({"transition": np.where(np.eye(10) == 1, np.nan, 0.1)}, r"\(row: sum\): 0: nan"),
        ({"transition": SWAPS[:9]}, r"not \(9, 10\)"),
        ({"noisy_train_accuracy": 99.5}, "a fraction in .0, 1., not 99.5"),
        ({"bootstrap": 0}, "at least 1, not 0"),
    ],
)
def test_what_cannot_be_compared_is_refused(change, message):
    """A collapsed model has 10 % on every class, its distance a number like any other; nan rows would be class 0."""
    usual = {"predictions": CLEAN, "clean_labels": CLEAN, "transition": SWAPS}
    with pytest.raises(ValueError, match=message):
        sampler_report(**{**usual, **change})


def test_a_class_may_be_missing_by_chance():
    """Ten test images of ten classes leave some unpredicted by any model: that is no collapse."""
    few = np.arange(10)
    assert sampler_report(np.where(few == 9, 4, few), few, SWAPS).examples == 10
    rare = sampler_report([0] * 40 + [1] * 40, [0] * 40 + [1] * 40, transition_matrix(3, 0.1, [1, 0, 2]))
    assert np.isnan(rare.transition_estimate[2]).all(), "a class without a test example"


# ---- the theory's toy: 1-NN is a sampler, and a good teacher ----


@pytest.fixture(scope="module")
def toy():
    sys.path.insert(0, str(BENCHMARK.parent))
    import nearest_neighbour_sampler

    sys.path.remove(str(BENCHMARK.parent))
    return nearest_neighbour_sampler


@pytest.fixture(scope="module")
def students_of(toy):
    arguments = Namespace(labels=150, pool=6000, test=1000, neighbours=15)
    world = toy.World(rate=0.2, spread=0.1)  # classes hardly overlap: what is wrong is the noise
    return {k: toy.students(world, k, arguments, seed=0) for k in (1, 15)}


def test_a_nearest_neighbour_draws_from_the_law_of_noisy_labels(toy):
    """The definition of a sampler on the one model where it can be computed: if this fails, the report measures nothing."""
    arguments = Namespace(test=300, draws=60)
    near, far = (
        toy.sampling(toy.World(0.2, 0.1), 400, arguments, 0),
        toy.sampling(toy.World(0.2, 0.6), 30, arguments, 0),
    )
    distances = [tuple(found.values()) for found in (near, far)]
    assert distances[0][0] < 1.1 * distances[0][1], "as near as ideal draws"
    assert distances[1][0] > 1.1 * distances[1][1], "with 30 labels on classes that overlap it is not yet one"


def test_the_report_calls_one_nearest_neighbour_a_sampler(toy):
    """Where the truth is known the verdict must be right: the teacher samples, its vote and its students do not."""
    world, generator = toy.World(0.2, 0.1), np.random.default_rng(0)
    points, clean = world.draw(1500, generator)
    teachers = [toy.nearest(*toy.noisy_sample(world, 2000, [1, member])) for member in range(9)]
    named = np.stack([teacher.predict(points) for teacher in teachers])
    alone = sampler_report(named[0], clean, world.transition, noisy_train_accuracy=1.0)
    assert alone.verdict.startswith("A sampler:")
    assert sampler_report(toy.vote(named), clean, world.transition).verdict.startswith("The noise is mostly removed")


def test_students_of_many_samplers_approach_bayes(students_of):
    """The paper's claim: bad models are good role models. One teacher passes its noise on, fifteen do not."""
    one, many = students_of[1], students_of[15]
    assert one["EPL student"] == one["RPL student"] > 0.1, "one teacher's student has kept most of the 20 %"
    assert many["vote of k"] < 0.02 and many["EPL student"] < 0.02 and many["RPL student"] < 0.04
    assert many["RPL student, interpolating"] > 0.15, "a student that interpolates drawn labels is a sampler again"


def test_a_vote_errs_as_independent_teachers_do(toy, students_of):
    """The published sizes of the effect: 89.6, 94.2, 98.0 and 99.8 % for 3, 5, 10 and 20 teachers at 20 % noise."""
    assert [round(100 * toy.majority(0.8, k), 1) for k in (3, 5, 10, 20)] == [89.6, 94.2, 98.0, 99.8]
    generator = np.random.default_rng(0)
    for k in (3, 4):
        right = (generator.random((200_000, k)) < 0.8).sum(1)
        simulated = np.mean(right * 2 > k) + np.mean(right * 2 == k) / 2
        assert toy.majority(0.8, k) == pytest.approx(simulated, abs=0.004)
    assert students_of[15]["vote of k"] == pytest.approx(students_of[15]["independent vote"], abs=0.012)


def test_the_best_classifier_of_the_toy_is_the_best(toy):
    """An f* that is not Bayes-optimal for the noisy law makes errors of students that have none."""
    world, generator = toy.World(0.3, 0.4), np.random.default_rng(0)
    points, clean = world.draw(4000, generator)
    noisy = noisy_labels(clean, world.transition)
    best = world.bayes(points)
    assert (best == (world.posterior(points) @ world.transition).argmax(1)).mean() > 0.97
    for labels in (clean, noisy):
        model = toy.nearest(points[:3000], labels[:3000], neighbours=50)
        assert np.mean(best[3000:] == labels[3000:]) > np.mean(model.predict(points[3000:]) == labels[3000:]) - 0.01


@pytest.mark.launch
def test_the_benchmark_runs(tmp_path):
    """A benchmark that no longer runs leaves numbers in the documentation that nobody can check."""
    tiny = ["--sizes", "40", "--draws", "5", "--teachers", "1", "4", "--labels", "40", "--pool", "300", "--test", "60"]
    files = ["--seeds", "2", "--json", str(tmp_path / "numbers.json"), "--figure", str(tmp_path / "figure.png")]
    run = launching.run(BENCHMARK, *tiny, *files, log=tmp_path / "log")
    assert run.returncode == 0, run.stderr
    found = json.loads((tmp_path / "numbers.json").read_text())
    assert list(found["students"]) == ["1", "4"] and list(found["sampler"]) == ["40"]
    assert all(len(values) == 2 and 0 <= min(values) <= max(values) <= 1 for values in found["students"]["4"].values())
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG") and "One teacher" in run.stderr
