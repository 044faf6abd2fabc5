"""The evaluate metrics through evaluate's own interface, `compute_metrics_for` on real EvalPredictions and a Trainer run."""

import json
import math
import subprocess
import sys

import evaluate
import numpy as np
import pytest
import sklearn.metrics
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from transformers import EvalPrediction, RobertaForSequenceClassification, Trainer, TrainingArguments

from hfkd.diagnostics.evaluate_metrics import (
    F1,
    Accuracy,
    Agreement,
    CalibrationError,
    MatthewsCorrelation,
    compute_metrics_for,
    load_metric,
)
from hfkd.testing import tiny_roberta_config

generator = np.random.default_rng(0)
LABELS = generator.integers(0, 2, 40)
FOUND = np.where(generator.random(40) < 0.7, LABELS, 1 - LABELS)
NAMES = (
    *("accuracy", "micro_f1", "macro_f1", "f1", "matthews_correlation"),
    *("mean_per_class_recall", "worst_class_accuracy", "pearson", "spearmanr", "agreement"),
)


def by_scikit_learn(name, found, expected):
    return {
        "accuracy": lambda: sklearn.metrics.accuracy_score(expected, found),
        "agreement": lambda: sklearn.metrics.accuracy_score(expected, found),
        "micro_f1": lambda: sklearn.metrics.f1_score(expected, found, average="micro"),
        "macro_f1": lambda: sklearn.metrics.f1_score(expected, found, average="macro"),
        "f1": lambda: sklearn.metrics.f1_score(expected, found),
        "matthews_correlation": lambda: sklearn.metrics.matthews_corrcoef(expected, found),
        "mean_per_class_recall": lambda: sklearn.metrics.balanced_accuracy_score(expected, found),
        "worst_class_accuracy": lambda: min(sklearn.metrics.recall_score(expected, found, average=None)),
        "pearson": lambda: np.corrcoef(found, expected)[0, 1],
        "spearmanr": lambda: stats.spearmanr(found, expected).statistic,
    }[name]()


# ---- evaluate.Metric ----


@pytest.mark.parametrize("name", NAMES)
def test_every_name_loads_without_a_network_and_returns_its_own_key(name, tmp_path):
    """A key other than the name leaves `metric_for_best_model` pointing at nothing."""
    metric = load_metric(name, cache_dir=str(tmp_path))
    assert isinstance(metric, evaluate.Metric)
    expected = pytest.approx(by_scikit_learn(name, FOUND, LABELS), abs=1e-12)
    assert metric.compute(predictions=FOUND, references=LABELS) == {name: expected}


def test_batches_add_up_to_the_whole(tmp_path):
    """F1 is not a mean over batches: averaged so, it depends on the batch size."""
    metric = load_metric("f1", cache_dir=str(tmp_path))
    for start in range(0, 30, 10):
        metric.add_batch(predictions=FOUND[start : start + 10], references=LABELS[start : start + 10])
    for found, label in zip(FOUND[30:], LABELS[30:], strict=True):
        metric.add(prediction=found, reference=label)
    assert metric.compute() == {"f1": pytest.approx(by_scikit_learn("f1", FOUND, LABELS))}
    assert metric.compute(predictions=[1, 0], references=[1, 0]) == {"f1": 1.0}  # nothing is left of the first rows


def test_metrics_combine_and_save(tmp_path):
    """Two F1s under one key: the second overwrites the first, and the file holds a macro-F1 called F1."""
    kinds = [Accuracy(cache_dir=str(tmp_path)), *(F1(kind, cache_dir=str(tmp_path)) for kind in ("binary", "macro"))]
    found = evaluate.combine(kinds).compute(predictions=FOUND, references=LABELS)
    assert found == {
        name: pytest.approx(by_scikit_learn(name, FOUND, LABELS)) for name in ("accuracy", "f1", "macro_f1")
    }
    saved = json.loads(evaluate.save(tmp_path / "result.json", **found).read_text())
    assert {name: saved[name] for name in found} == found


def test_a_probability_is_not_cut_to_class_zero(tmp_path):
    """With evaluate's usual integer features 0.9 becomes class 0, silently, and a good model scores like a bad one."""
    with pytest.raises(ValueError, match="argmax or a threshold"):
        Accuracy(cache_dir=str(tmp_path)).compute(predictions=[0.9, 1.0], references=[1, 1])
    with pytest.raises(ValueError, match="expected format"):
        Accuracy(cache_dir=str(tmp_path)).compute(predictions=np.eye(2), references=[1, 1])


def test_an_error_leaves_the_metric_usable(tmp_path):
    """Rows that stay behind after an error would be scored with the next epoch's."""
    metric = MatthewsCorrelation(cache_dir=str(tmp_path))
    with pytest.raises(ValueError, match="argmax"):
        metric.compute(predictions=[0.5, 1.0], references=[1, 0])
    assert metric.compute(predictions=[1, 0], references=[1, 0]) == {"matthews_correlation": pytest.approx(1.0)}


def test_agreement_reads_student_and_teacher(tmp_path):
    """Agreement with the labels in the teacher's place is an accuracy under another name."""
    assert Agreement(cache_dir=str(tmp_path)).compute(predictions=[0, 1, 2, 2], references=[0, 1, 1, 2]) == {
        "agreement": 0.75
    }


def test_calibration_error_takes_rows_of_probabilities(tmp_path):
    """Its bins are part of the number: a setting that is not passed on compares 15 bins with 1."""
    metric = load_metric("expected_calibration_error", cache_dir=str(tmp_path))
    assert isinstance(metric, CalibrationError)
    rows = np.array([[0.9, 0.1], [0.6, 0.4]])
    apart = metric.compute(predictions=rows, references=[0, 1])
    assert apart == {"expected_calibration_error": pytest.approx((0.1 + 0.6) / 2)}
    together = metric.compute(predictions=rows, references=[0, 1], bins=1)
    assert together == {"expected_calibration_error": pytest.approx(0.25)}


def test_unknown_names_never_reach_the_hub():
    """A misspelt name that becomes a download runs somebody's code."""
    with pytest.raises(ValueError, match="'hub:bleu'"):
        load_metric("bleu")
    with pytest.raises(ValueError, match="'weighted'"):
        F1("weighted")


def test_the_hub_is_out_of_reach_and_says_so():
    """evaluate's own message names a script in the current folder, which nobody has looked for."""
    with pytest.raises(FileNotFoundError, match=r"HF_HUB_OFFLINE.*accuracy, micro_f1"):
        load_metric("hub:hfkd/no_such_metric")


@pytest.mark.parametrize("hub_id", ["", "./here", "/tmp/metric", "../metric", "a/b/c", "accuracy.py", "here"])
def test_the_hub_is_not_a_folder_of_this_machine(hub_id, tmp_path, monkeypatch):
    """evaluate.load runs here/here.py before it asks the Hub: code that nobody meant to start."""
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "here.py").write_text("raise SystemExit('ran')")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="takes an id|exists"):
        load_metric(f"hub:{hub_id}")


def test_the_functions_do_not_import_evaluate():
    """Seconds of import for whoever only wants a mean over seeds."""
    code = "import hfkd.diagnostics.metrics, sys; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"evaluate", "torch", "transformers", "sklearn", "scipy"} & set(run.stdout.split())


# ---- compute_metrics_for ----


def test_single_label_takes_argmax():
    """A threshold on the first logit in place of argmax looks like a model that learnt little."""
    logits, labels = generator.normal(size=(30, 3)), generator.integers(0, 3, 30)
    found = compute_metrics_for(["accuracy", "macro_f1", "matthews_correlation"])(EvalPrediction(logits, labels))
    expected = {
        name: pytest.approx(by_scikit_learn(name, [max(range(3), key=row.__getitem__) for row in logits], labels))
        for name in ("accuracy", "macro_f1", "matthews_correlation")
    }
    assert found == expected
    assert all(type(value) is float for value in found.values())  # trainer_state.json takes nothing else


def test_a_token_head_is_scored_where_it_has_labels():
    """Padding counted as right or wrong moves a tagger's score with the length of its batch."""
    labels = np.array([[1, 2, -100], [0, -100, -100]])
    logits = np.full((2, 3, 3), -100.0)  # what the Trainer pads logits with
    logits[0, 0], logits[0, 1], logits[1, 0] = [0, 9, 1], [9, 0, 1], [9, 1, 0]
    found = compute_metrics_for(("accuracy", "micro_f1"))(EvalPrediction(logits, labels))
    assert found == {"accuracy": pytest.approx(2 / 3), "micro_f1": pytest.approx(2 / 3)}


@given(st.integers(0, 2**32 - 1))
def test_a_token_head_equals_a_loop(seed):
    """A mask on the wrong axis pairs predictions with the labels of other tokens."""
    draw = np.random.default_rng(seed)
    logits, labels = draw.normal(size=(3, 5, 4)), draw.integers(0, 4, (3, 5))
    labels[draw.random((3, 5)) < 0.4] = -100
    labels[2, 4] = 3
    places = [place for place in np.ndindex(3, 5) if labels[place] != -100]
    hits = sum(int(np.argmax(logits[place])) == int(labels[place]) for place in places)
    assert compute_metrics_for("accuracy")(EvalPrediction(logits, labels)) == {
        "accuracy": pytest.approx(hits / len(places))
    }


def test_multi_label_takes_the_threshold_zero():
    """0.5 is the threshold of probabilities: on logits it drops every label between 0.5 and 0.62."""
    logits = np.array([[0.3, -0.2, 2.0], [-1.0, 0.1, -3.0], [0.4, -0.1, -0.3]], dtype=np.float32)
    labels = np.array([[1, 0, 1], [0, 1, 1], [0, 0, 0]], dtype=np.float32)
    found = compute_metrics_for(["micro_f1", "macro_f1"], "multi_label_classification")(EvalPrediction(logits, labels))
    decided = [[1, 0, 1], [0, 1, 0], [1, 0, 0]]
    assert found == {
        f"{kind}_f1": pytest.approx(sklearn.metrics.f1_score(labels, decided, average=kind))
        for kind in ("micro", "macro")
    }


@pytest.mark.parametrize("shape", [(30,), (30, 1)])
def test_regression_squeezes_the_one_column(shape):
    """(n, 1) against (n,) broadcasts to n x n pairs."""
    values, labels = generator.normal(size=30), generator.normal(size=30).astype(np.float32)
    found = compute_metrics_for(["pearson", "spearmanr"], "regression")(EvalPrediction(values.reshape(shape), labels))
    assert found["pearson"] == pytest.approx(np.corrcoef(values, labels)[0, 1])
    assert found["spearmanr"] == pytest.approx(stats.spearmanr(values, labels).statistic)


def test_a_model_that_predicts_one_class_ends_no_run():
    """The first evaluation of CoLA and STS-B: an error there throws the run away."""
    one_class = EvalPrediction(np.tile([0.0, 1.0], (4, 1)), np.array([0, 1, 1, 0]))
    assert compute_metrics_for(["matthews_correlation", "f1"])(one_class) == {
        "matthews_correlation": 0.0,
        "f1": pytest.approx(2 / 3),
    }
    constant = EvalPrediction(np.ones((4, 1)), np.array([0.0, 1.0, 2.5, 4.0]))
    assert math.isnan(compute_metrics_for("pearson", "regression")(constant)["pearson"])


def test_two_arrays_of_logits_are_refused():
    """The teacher's logits beside the student's: whichever is taken, the other is published under its name."""
    student, teacher = np.zeros((8, 2)), np.ones((8, 2))
    compute = compute_metrics_for("accuracy")
    with pytest.raises(ValueError, match=r"2 arrays of shapes \[\(8, 2\), \(8, 2\)\].*ModelOutput\(logits=...\)"):
        compute(EvalPrediction((student, teacher), np.zeros(8, dtype=int)))
    with pytest.raises(ValueError, match=r"label_ids hold 2 arrays"):
        compute(EvalPrediction(student, (np.zeros(8, dtype=int), np.zeros(8, dtype=int))))
    assert compute(EvalPrediction((student,), np.zeros(8, dtype=int))) == {"accuracy": 1.0}


@pytest.mark.parametrize(
    ("problem_type", "logits", "labels", "message"),
    [
        ("single_label_classification", (8, 2), (7,), r"\(8, 2\) and labels \(7,\)"),
        ("single_label_classification", (8,), (8,), "leave argmax"),
        ("single_label_classification", (8, 2), (8, 2), "do not fit"),
        ("single_label_classification", (8, 5, 2), (8,), "do not fit"),
        ("single_label_classification", (8, 1), (8,), "always class 0"),
        ("multi_label_classification", (8, 3), (8,), "do not fit"),
        ("multi_label_classification", (8,), (8,), "do not fit"),
        ("regression", (8, 2), (8,), "do not fit"),
        ("regression", (8, 1), (7,), "do not fit"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(problem_type, logits, labels, message):
    """A head under the wrong problem_type broadcasts into a number, or scores class 0 throughout."""
    name = {"regression": "pearson"}.get(problem_type, "micro_f1")
    with pytest.raises(ValueError, match=message):
        compute_metrics_for(name, problem_type)(EvalPrediction(np.zeros(logits), np.zeros(labels, dtype=int)))


def test_labels_of_a_test_split_are_refused():
    """GLUE's test labels are -1: an accuracy of 0.0 on them is published as a result."""
    compute = compute_metrics_for("accuracy")
    for labels in ([-1, -1], [0, 2]):
        with pytest.raises(ValueError, match=f"labels run from {labels[0]} to {labels[1]}"):
            compute(EvalPrediction(np.zeros((2, 2)), np.array(labels)))
    with pytest.raises(ValueError, match="no label_ids"):
        compute(EvalPrediction(np.zeros((2, 2)), None))
    with pytest.raises(ValueError, match="no examples"):
        compute(EvalPrediction(np.zeros((2, 2)), np.array([-100, -100])))


@pytest.mark.parametrize("problem_type", ["single_label_classification", "regression"])
def test_a_model_that_diverged_has_no_score(problem_type):
    """argmax of nan is 0: a dead model scores the share of class 0, above a bad live one."""
    name = {"regression": "pearson"}.get(problem_type, "accuracy")
    logits = np.full((3, 1 if problem_type == "regression" else 2), np.nan)
    with pytest.raises(ValueError, match="diverged"):
        compute_metrics_for(name, problem_type)(EvalPrediction(logits, np.array([0, 0, 1])))


@pytest.mark.parametrize(
    ("names", "problem_type", "message"),
    [
        (["accuracy", "auc"], "single_label_classification", "not \\['auc'\\]"),
        ("pearson", "single_label_classification", "not \\['pearson'\\]"),
        ("accuracy", "multi_label_classification", "micro_f1, macro_f1"),
        ([], "regression", "not none"),
        ("accuracy", "token", "problem_type must be one of"),
    ],
)
def test_a_wrong_name_is_an_error_before_training(names, problem_type, message):
    """Found at the first evaluation, a misspelt metric costs the epoch before it."""
    with pytest.raises(ValueError, match=message):
        compute_metrics_for(names, problem_type)


def tiny_trainer(tmp_path, **arguments):
    rows = Dataset.from_list([{"input_ids": [0, 5 + row, 6, 2], "labels": row % 2} for row in range(6)])
    model = RobertaForSequenceClassification(tiny_roberta_config(num_labels=2))
    args = TrainingArguments(
        str(tmp_path), max_steps=2, eval_strategy="steps", eval_steps=1, report_to="none", use_cpu=True, **arguments
    )
    names = ["matthews_correlation", "accuracy"]
    return Trainer(model, args, train_dataset=rows, eval_dataset=rows, compute_metrics=compute_metrics_for(names))


def test_a_trainer_logs_the_scores(tmp_path):
    """Scores under another key, or none, and `metric_for_best_model` fails after the first epoch."""
    best = {"metric_for_best_model": "accuracy", "load_best_model_at_end": True, "save_steps": 1}
    trainer = tiny_trainer(tmp_path, per_device_eval_batch_size=4, **best)
    trainer.train()
    logged = [log["eval_accuracy"] for log in trainer.state.log_history if "eval_accuracy" in log]
    assert len(logged) == 2
    assert trainer.state.best_metric == max(logged)
    prediction = trainer.predict(trainer.eval_dataset)
    hits = (prediction.predictions.argmax(-1) == np.array([0, 1] * 3)).mean()
    assert prediction.metrics["test_accuracy"] == pytest.approx(hits)


def test_a_trainer_refuses_scores_by_batch(tmp_path):
    """Called batch by batch, it would report the last batch's F1 as the data set's."""
    with pytest.raises(ValueError, match="batch_eval_metrics"):
        tiny_trainer(tmp_path, batch_eval_metrics=True)
