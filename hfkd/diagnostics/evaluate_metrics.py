"""The scores of `hfkd.diagnostics.metrics` as `evaluate` metrics, and as the Trainer's `compute_metrics`. No network.

The wheel of evaluate ships no metrics: `evaluate.load("accuracy")` downloads and runs a script from the Hub. The classes
here are ordinary `evaluate.Metric`s, with `add`, `add_batch` and `compute`, for `evaluate.combine` and `evaluate.save`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import evaluate
import numpy as np
from numpy.typing import NDArray

from hfkd.diagnostics.metrics import (
    IGNORED,
    agreement,
    expected_calibration_error,
    multilabel_f1,
    score,
)

if TYPE_CHECKING:
    from transformers import EvalPrediction

ComputeMetrics = Callable[["EvalPrediction"], dict[str, float]]

HUB = "hub:"


# ---- evaluate.Metric ----

# float64 also for class ids: an integer feature would cut a probability of 0.9 to class 0 without a word
_NUMBER = datasets.Value("float64")


class _Score(evaluate.Metric):
    """One of the names that `metrics.score` knows; predictions and references hold one number per example."""

    key = ""
    prediction: Any = _NUMBER

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features(predictions=self.prediction, references=_NUMBER)
        return evaluate.MetricInfo(description=self.__doc__, citation="", inputs_description="", features=features)

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {self.key: score(self.key, predictions, references)}


class Accuracy(_Score):
    """Fraction of class ids that agree."""

    key = "accuracy"


class F1(_Score):
    """F1 over class ids. `F1()` is binary, of class 1; `F1("micro")` and `F1("macro")` run over all classes."""

    def _info(self) -> evaluate.MetricInfo:
        keys = {"default": "f1", "binary": "f1", "micro": "micro_f1", "macro": "macro_f1"}
        if self.config_name not in keys:
            raise ValueError(f"F1 is 'binary', 'micro' or 'macro', not {self.config_name!r}")
        self.key = keys[self.config_name]
        return super()._info()


class MatthewsCorrelation(_Score):
    """Matthews' correlation of class ids; 0.0 where either side holds one class only."""

    key = "matthews_correlation"


class MeanPerClassRecall(_Score):
    """Mean over classes of the fraction of their examples that is predicted rightly."""

    key = "mean_per_class_recall"


class WorstClassAccuracy(_Score):
    """Accuracy on the examples of the class for which it is lowest."""

    key = "worst_class_accuracy"


class Pearson(_Score):
    """Pearson's correlation of numbers; nan where either side is constant."""

    key = "pearson"


class Spearman(_Score):
    """Spearman's rank correlation of numbers; nan where either side is constant."""

    key = "spearmanr"


class Agreement(_Score):
    """Fraction of equal class ids; predictions are the student's, references the teacher's."""

    key = "agreement"

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {self.key: agreement(predictions, references)}


class CalibrationError(_Score):
    """Expected calibration error (Guo et al. 2017); predictions are rows of probabilities, references class ids."""

    key = "expected_calibration_error"
    prediction = datasets.Sequence(_NUMBER)

    def _compute(self, predictions: Any, references: Any, bins: int = 15) -> dict[str, float]:
        return {self.key: expected_calibration_error(predictions, references, bins)}


_OURS: dict[str, tuple[type[_Score], str | None]] = {
    "accuracy": (Accuracy, None),
    "micro_f1": (F1, "micro"),
    "macro_f1": (F1, "macro"),
    "f1": (F1, None),
    "matthews_correlation": (MatthewsCorrelation, None),
    "mean_per_class_recall": (MeanPerClassRecall, None),
    "worst_class_accuracy": (WorstClassAccuracy, None),
    "pearson": (Pearson, None),
    "spearmanr": (Spearman, None),
    "agreement": (Agreement, None),
    "expected_calibration_error": (CalibrationError, None),
}


def load_metric(name: str, **settings: Any) -> Any:
    """An `evaluate` metric: one of ours by its name, or `"hub:<id>"` from the Hub, on this explicit request only.

    settings go to the metric's constructor (`cache_dir`, `keep_in_memory`, ...), for the Hub to `evaluate.load`, which
    **runs code** from there: pass a `revision` that you have read. A result's key is the name.
    Raises ValueError for an unknown name, FileNotFoundError where the Hub has no such metric or is out of reach.
    """
    if name.startswith(HUB):
        return _from_hub(name.removeprefix(HUB), **settings)
    if name not in _OURS:
        raise ValueError(
            f"no metric is called {name!r}; the known ones are {', '.join(_OURS)}. For one from the Hub write '{HUB}{name}'"
        )
    metric, config_name = _OURS[name]
    return metric(config_name, **settings)


def _from_hub(hub_id: str, **settings: Any) -> Any:
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", hub_id) or hub_id.endswith(".py"):
        raise ValueError(f"'{HUB}' takes an id such as 'accuracy' or 'owner/metric', not {hub_id!r}")
    if Path(hub_id).exists():
        raise ValueError(
            f"{Path(hub_id).absolute()} exists, and evaluate would run it instead of the Hub's: start elsewhere"
        )
    try:
        return evaluate.load(hub_id, **settings)
    except OSError as error:
        raise FileNotFoundError(
            f"the Hub gave no metric {hub_id!r}: the id is wrong, or there is no network (or HF_HUB_OFFLINE is set). "
            f"Without a network there are {', '.join(_OURS)}"
        ) from error


# ---- the Trainer's compute_metrics ----

_NAMES = {
    "single_label_classification": (
        *("accuracy", "micro_f1", "macro_f1", "f1", "matthews_correlation"),
        *("mean_per_class_recall", "worst_class_accuracy"),
    ),
    "multi_label_classification": ("micro_f1", "macro_f1"),
    "regression": ("pearson", "spearmanr"),
}


def compute_metrics_for(
    names: str | Sequence[str], problem_type: str = "single_label_classification"
) -> ComputeMetrics:
    """A `compute_metrics` for the Trainer, from logits to {name: score}; the Trainer puts `eval_` before the names.

    - "single_label_classification": logits `(examples, classes)`, or `(examples, tokens, classes)` of a token head, argmax;
      labels of -100 are dropped. Names: accuracy, micro_f1, macro_f1, f1, matthews_correlation, mean_per_class_recall,
      worst_class_accuracy. A token head's scores run over tokens, not over entities.
    - "multi_label_classification": logits and 0/1 labels `(examples, labels)`, threshold 0. Names: micro_f1, macro_f1.
    - "regression": predictions `(examples, 1)` or `(examples,)`. Names: pearson, spearmanr.

    It calls the functions, not the `evaluate` metrics, whose cache files every process would write. It takes all rows at
    once: the Trainer refuses it together with `batch_eval_metrics`.
    Raises ValueError at once for an unknown name; when called, for shapes that do not fit, for nan (the model has diverged)
    and for labels that name no class, such as the -1 of GLUE's test splits.
    """
    names = (names,) if isinstance(names, str) else tuple(names)
    if problem_type not in _NAMES:
        raise ValueError(f"problem_type must be one of {', '.join(_NAMES)}, not {problem_type!r}")
    unknown = [name for name in names if name not in _NAMES[problem_type]]
    if unknown or not names:
        raise ValueError(f"{problem_type} has the metrics {', '.join(_NAMES[problem_type])}, not {unknown or 'none'}")
    scores = {"regression": _regression, "multi_label_classification": _multi_label}.get(problem_type, _single_label)

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        logits = _one_array(prediction.predictions, "predictions")
        labels = _one_array(prediction.label_ids, "label_ids")
        if np.isnan(logits).any():
            raise ValueError(f"{int(np.isnan(logits).sum())} of {logits.size} logits are nan: the model has diverged")
        return scores(names, logits, labels)

    return compute_metrics


def _one_array(arrays: Any, what: str) -> NDArray[Any]:
    """The only array. Of two, such as a student's and a teacher's logits side by side, the first would be a guess."""
    if isinstance(arrays, tuple | list):
        if len(arrays) != 1:
            raise ValueError(
                f"{what} hold {len(arrays)} arrays of shapes {[np.shape(array) for array in arrays]}, and which one to score "
                "is a guess: return the student's logits alone, as ModelOutput(logits=...) from compute_loss, or take them "
                "in preprocess_logits_for_metrics"
            )
        arrays = arrays[0]
    if arrays is None:
        raise ValueError(f"there are no {what}: metrics need a data set with labels")
    return np.asarray(arrays)


def _single_label(names: Sequence[str], logits: NDArray[Any], labels: NDArray[Any]) -> dict[str, float]:
    if logits.ndim not in (2, 3) or logits.shape[:-1] != labels.shape:
        raise _misfit(
            logits,
            labels,
            "(examples, classes) with (examples,) or (examples, tokens, classes) with (examples, tokens)",
        )
    classes = logits.shape[-1]
    if classes < 2:
        raise ValueError(
            "logits of one class are always class 0: pass problem_type='regression', or num_labels=2 to the model"
        )
    labelled = labels != IGNORED
    found, expected = logits.argmax(-1)[labelled], labels[labelled]
    if expected.size and not 0 <= expected.min() <= expected.max() < classes:
        raise ValueError(
            f"labels run from {expected.min()} to {expected.max()}, the classes from 0 to {classes - 1}: score a split with "
            "labels, with the label order of the model"
        )
    return {name: score(name, found, expected) for name in names}


def _multi_label(names: Sequence[str], logits: NDArray[Any], labels: NDArray[Any]) -> dict[str, float]:
    if logits.ndim != 2 or logits.shape != labels.shape:
        raise _misfit(logits, labels, "(examples, labels) on both sides")
    return {name: multilabel_f1(logits > 0, labels, name.removesuffix("_f1")) for name in names}


def _regression(names: Sequence[str], logits: NDArray[Any], labels: NDArray[Any]) -> dict[str, float]:
    values, expected = (array[:, 0] if array.ndim == 2 and array.shape[1] == 1 else array for array in (logits, labels))
    if values.ndim != 1 or values.shape != expected.shape:
        raise _misfit(logits, labels, "(examples, 1) or (examples,) with (examples,)")
    return {name: score(name, values, expected) for name in names}


def _misfit(logits: NDArray[Any], labels: NDArray[Any], wanted: str) -> ValueError:
    return ValueError(
        f"predictions {logits.shape} and labels {labels.shape} do not fit: they must be {wanted}. Set the problem_type of the "
        "model, and leave argmax to this function"
    )
