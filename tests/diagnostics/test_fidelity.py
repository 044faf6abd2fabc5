"""The fidelity report decides whether a student may ship: what would make it say so of the wrong student."""

import copy
import dataclasses
import json
import math
import re

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.special import softmax
from transformers import RobertaForSequenceClassification, ViTConfig, ViTForImageClassification, ViTImageProcessorPil

import hfkd.diagnostics
from hfkd.cards import CardFacts, render_card
from hfkd.data.pixels import PixelView
from hfkd.diagnostics import report, report_of_logits
from hfkd.diagnostics.fidelity import NUMBERS
from hfkd.diagnostics.gates import GateFailed
from hfkd.teachers import CachedTeacher, EnsembleTeacher
from hfkd.testing import tiny_roberta_config, tiny_tokenizer

MOODS = ["calm", "glad", "sad"]


def two_sides(rows=400, classes=4, seed=0):
    """A teacher that is mostly right, a student that exaggerates it and is noisier; labels."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, rows)
    teacher = generator.normal(size=(rows, classes))
    teacher[np.arange(rows), labels] += 2.0
    return 1.5 * teacher + generator.normal(size=teacher.shape), teacher, labels


def probabilities_of(row):
    powers = [math.exp(value - max(row)) for value in row]
    return [power / sum(powers) for power in powers]


# ---- numbers against slow references ----


@settings(max_examples=12)
@given(st.integers(0, 10_000), st.integers(2, 5), st.integers(3, 40), st.integers(1, 20))
def test_calibration_is_that_of_the_definitions(seed, classes, rows, bins):
    """A calibration that is off by a factor, or of bins shifted by one, releases a student that is too sure of itself."""
    student, teacher, labels = two_sides(rows, classes, seed)
    found = report_of_logits(student, teacher, labels, bins=bins, bootstrap=0)
    for side, logits in ((found.student, student), (found.teacher, teacher)):
        brier, likelihood, members = 0.0, 0.0, {}
        for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
            given = probabilities_of(row)
            brier += sum((p - (place == label)) ** 2 for place, p in enumerate(given))
            likelihood -= math.log(given[label])
            number = next(m for m in range(bins) if max(given) <= (m + 1) / bins + 1e-15)
            members.setdefault(number, []).append((max(given), row.index(max(row)) == label))
        assert side.brier_score == pytest.approx(brier / rows)
        assert side.negative_log_likelihood == pytest.approx(likelihood / rows)
        gaps = [abs(sum(right - sure for sure, right in bin)) for bin in members.values()]
        assert side.calibration_error == pytest.approx(sum(gaps) / rows)
        expected = [
            (sum(sure for sure, _ in members[m]), sum(right for _, right in members[m]), len(members[m]))
            for m in sorted(members)
        ]
        drawn = [(bin.confidence * bin.examples, bin.accuracy * bin.examples, bin.examples) for bin in side.reliability]
        assert np.allclose(drawn, expected)
        assert side.confidence == pytest.approx(sum(max(probabilities_of(row)) for row in logits.tolist()) / rows)


def test_fidelity_and_parts_are_those_of_slow_loops():
    """A difference with its sign turned, or a class scored on another's rows, acquits the student that fails a subgroup."""
    student, teacher, labels = two_sides()
    groups = [("day", "night")[i % 7 < 2] for i in range(len(labels))]
    found = report_of_logits(student, teacher, labels, groups=groups, bootstrap=0)
    ours, theirs = [row.index(max(row)) for row in student.tolist()], [row.index(max(row)) for row in teacher.tolist()]
    divergence = 0.0
    for row, other in zip(student.tolist(), teacher.tolist(), strict=True):
        pairs = zip(probabilities_of(row), probabilities_of(other), strict=True)
        divergence += sum(t * math.log(t / s) for s, t in pairs)
    assert found.kl_divergence == pytest.approx(divergence / len(labels))
    assert found.agreement == pytest.approx(sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(labels))
    for parts, of_row in ((found.classes, labels.tolist()), (found.subgroups, groups)):
        for part in parts:
            rows = [i for i, value in enumerate(of_row) if str(value) == part.name]
            assert part.examples == len(rows) > 0
            assert part.student == pytest.approx(sum(ours[i] == labels[i] for i in rows) / len(rows))
            assert part.teacher == pytest.approx(sum(theirs[i] == labels[i] for i in rows) / len(rows))
            assert part.difference == pytest.approx(part.student - part.teacher)
            assert part.agreement == pytest.approx(sum(ours[i] == theirs[i] for i in rows) / len(rows))
    assert sum(part.examples for part in found.classes) == sum(part.examples for part in found.subgroups) == len(labels)
    numbers = found.numbers()
    assert numbers["worst_class_difference"] == min(part.difference for part in found.classes)
    assert numbers["worst_subgroup_difference"] == min(part.difference for part in found.subgroups)
    assert numbers["accuracy_difference"] == found.student.accuracy - found.teacher.accuracy < 0


def test_the_slope_is_that_of_numpy_over_log_odds():
    """A slope of another class, or of student against label, says that a student imitates where it exaggerates."""
    student, teacher, labels = two_sides()
    found = report_of_logits(student, teacher, labels)
    x, y = [], []
    for row, other in zip(student.tolist(), teacher.tolist(), strict=True):
        top = other.index(max(other))
        for values, logits in ((x, other), (y, row)):
            probability = probabilities_of(logits)[top]
            values.append(math.log(probability / (1 - probability)))
    slope, intercept = np.polyfit(x, y, 1)
    assert (found.deviations.slope, found.deviations.intercept) == pytest.approx((slope, intercept))
    tempered = report_of_logits(student, 4.0 * teacher, teacher_temperature=4.0, bootstrap=0)
    assert tempered.deviations.slope == pytest.approx(slope)
    plain = report_of_logits(student, 4.0 * teacher, bootstrap=0)
    assert tempered.kl_divergence == plain.kl_divergence, "the temperatures are those of the line alone"
    assert plain.deviations.slope == pytest.approx(slope / 4, rel=0.2)


def test_a_copy_is_reported_as_one():
    """Where equal sides differ by rounding, a gate of equality stops every release."""
    _, teacher, labels = two_sides()
    found = report_of_logits(teacher, teacher, labels)
    found.require("agreement==1", "kl_divergence==0", "accuracy_difference==0", "worst_class_difference==0")
    assert (found.deviations.slope, found.deviations.intercept) == pytest.approx((1.0, 0.0), abs=1e-12)
    assert found.student == dataclasses.replace(found.teacher, name="student")


# ---- what is missing, and what is wrong ----


def test_without_labels_what_needs_none_is_there():
    """A pool without labels is where fidelity is measured most: an error there, or accuracies of 0, hide it."""
    student, teacher, labels = two_sides()
    whole, found = report_of_logits(student, teacher, labels), report_of_logits(student, teacher)
    for name in ("agreement", "kl_divergence", "slope", "student_confidence", "teacher_never_predicts"):
        assert found.numbers()[name] == whole.numbers()[name]
    assert set(found.numbers()) == set(whole.numbers()) - {
        *(f"{side}_{name}" for side in ("student", "teacher") for name in
          ("accuracy", "calibration_error", "brier_score", "negative_log_likelihood")),
        "accuracy_difference", "worst_class_difference",
    }  # fmt: skip
    assert found.labelled == 0 and "Without labels" in found.markdown()
    assert "nan" not in found.markdown() and "None" not in found.markdown()


def test_rows_without_a_label_count_where_none_is_needed():
    """-1 taken for the last class, or unlabelled rows counted as wrong, lower a score by the share of the unlabelled."""
    student, teacher, labels = two_sides()
    some = np.where(np.arange(len(labels)) % 4, labels, -1)
    found = report_of_logits(student, teacher, some, bootstrap=0)
    known = some >= 0
    alone = report_of_logits(student[known], teacher[known], labels[known], bootstrap=0)
    assert (found.examples, found.labelled) == (400, 300) and "Only 300 of the rows" in found.markdown()
    assert found.student.brier_score == pytest.approx(alone.student.brier_score)
    assert [(part.examples, part.student) for part in found.classes] == [(p.examples, p.student) for p in alone.classes]
    assert found.agreement == report_of_logits(student, teacher, bootstrap=0).agreement != alone.agreement


def test_a_class_never_predicted_or_never_there_is_named():
    """A student that has forgotten a class keeps its accuracy where the class is rare: nobody would see it."""
    student, teacher, labels = two_sides()
    student[:, 2] -= 100.0
    found = report_of_logits(student, teacher, labels, class_names=["a", "b", "c", "d"], bootstrap=0)
    assert found.student.predicted[2] == 0 and "The student never predicts c." in found.notes
    assert found.classes[2].student == 0.0 and found.numbers()["student_never_predicts"] == 1.0
    assert found.failures("student_never_predicts==0", "teacher_never_predicts==0") == [
        "student_never_predicts==0 (student_never_predicts is 1)"
    ]
    absent = report_of_logits(student, teacher, np.where(labels == 3, 0, labels), bootstrap=0)
    part = absent.classes[3]
    assert (part.examples, part.student, part.difference, part.agreement) == (0, None, None, None)
    assert "No row is labelled 3." in absent.notes and "nan" not in absent.markdown()
    assert not math.isnan(absent.numbers()["worst_class_difference"])


def test_a_teacher_that_is_equally_sure_everywhere_has_no_line():
    """A line through one point is any line; an error would withhold the rest of the report."""
    student, _, labels = two_sides()
    constant = np.tile([3.0, 1.0, 0.0, 0.0], (len(labels), 1))
    found = report_of_logits(student, constant, labels)
    assert found.deviations is None and "slope" not in found.numbers()
    assert any("equally sure" in note for note in found.notes) and found.to_dict()["deviations"] is None
    assert found.failures("slope<=2") == ["slope<=2 (not measured: are there labels, subgroups, training rows for it?)"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, t: {"teacher_logits": t[:-1]}, r"one shape .* \(400, 4\) of the student and \(399, 4\)"),
        (lambda s, t: {"teacher_logits": t[:, :3]}, r"one shape"),
        (lambda s, t: {"student_logits": s[..., None], "teacher_logits": t[..., None]}, "one shape"),
        (lambda s, t: {"student_ids": range(400), "teacher_ids": [1, 0, *range(2, 400)]}, "another order, sort them"),
        (lambda s, t: {"student_ids": range(400), "teacher_ids": range(1, 401)}, "the examples differ"),
        (lambda s, t: {"labels": np.full(400, 4)}, "labels run up to 4, the classes from 0 to 3"),
        (lambda s, t: {"labels": np.zeros(399, int)}, "400 rows and 399 labels"),
        (lambda s, t: {"labels": ["sport"] * 400}, "labels are class ids, one a row .* not <U5 of shape"),
        (lambda s, t: {"labels": [None] * 400}, "labels are class ids, one a row .* not object"),
        (lambda s, t: {"labels": np.zeros((400, 1), int)}, r"labels are class ids, one a row .* shape \(400, 1\)"),
        (lambda s, t: {"groups": ["a"] * 399}, "400 rows and 399 groups"),
        (lambda s, t: {"groups": ["a"] * 399 + [None]}, "1 of 400 rows have no subgroup"),
        (lambda s, t: {"class_names": ["a"]}, "4 classes and 1 names"),
    ],
)
def test_sides_that_do_not_fit_are_refused(change, message):
    """Rows of another order give an agreement by chance, and nothing in the number says so."""
    student, teacher, labels = two_sides()
    values = {"student_logits": student, "teacher_logits": teacher, "labels": labels, **change(student, teacher)}
    with pytest.raises(ValueError, match=message):
        report_of_logits(**values)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rows_that_are_not_finite_are_named(bad):
    """One nan makes every mean nan, and the row it came from is lost among thousands."""
    student, teacher, labels = two_sides()
    teacher[[3, 17], 1] = bad
    with pytest.raises(
        ValueError, match=r"the teacher's logits are NaN or infinite for examples \[3, 17\] \(2 of 400\)"
    ):
        report_of_logits(student, teacher, labels)
    ids = [f"doc-{i}" for i in range(400)]
    with pytest.raises(ValueError, match=r"the student's .* examples \['doc-3', 'doc-17'\]"):
        report_of_logits(teacher, student, labels, student_ids=ids, teacher_ids=ids)


def test_rows_that_are_not_finite_cannot_be_named_by_too_few_ids():
    """An IndexError from the error message itself hides that the ids belong to another file."""
    student, teacher, labels = two_sides()
    student[17] = math.nan
    with pytest.raises(ValueError, match="400 rows need 400 ids a side, not 2 and 2"):
        report_of_logits(student, teacher, labels, student_ids=[0, 1], teacher_ids=[0, 1])


@pytest.mark.parametrize("constant", [False, True])
def test_probabilities_in_place_of_logits_are_refused_on_either_side(constant):
    """A softmax of a softmax: every model looks unsure and badly calibrated, also where the teacher has no line."""
    student, teacher, labels = two_sides()
    teacher = np.tile([3.0, 1.0, 0.0, 0.0], (len(labels), 1)) if constant else teacher
    of_both = {"student": (softmax(student, axis=1), teacher), "teacher": (student, softmax(teacher, axis=1))}
    for which, sides in of_both.items():
        with pytest.raises(ValueError, match=f"the {which}'s rows are at least 0 and sum to 1"):
            report_of_logits(*sides, labels)


# ---- gates ----


def test_a_gate_says_which_condition_fails_and_by_how_much():
    """A gate that stops without a name sends someone through all the numbers; one that passes nan lets anything through."""
    found = report_of_logits(*two_sides(), bootstrap=0)
    found.require()
    found.require(
        "agreement>=0.5", " student_accuracy > 0.2 ", "kl_divergence<=9", "slope<3", "student_never_predicts==0"
    )
    with pytest.raises(
        GateFailed, match=r"2 of 3 .*: agreement>=0.99 \(agreement is 0\.\d+\); slope<1 \(slope is 1\.\d+\)"
    ):
        found.require("agreement>=0.99", "kl_divergence>0", "slope<1")
    broken = dataclasses.replace(found, agreement=math.nan)
    assert broken.failures("agreement>=0", "agreement<=1") != []
    unlabelled = report_of_logits(*two_sides()[:2], bootstrap=0)
    assert "not measured" in unlabelled.failures("student_accuracy>=0")[0], "what was not measured must not pass"


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("agreement", "stands in quotes"),
        ("agreement>=", "stands in quotes"),
        ("agreement>=high", "NAME>=NUMBER"),
        ("agreement>=nan", "NAME>=NUMBER"),
        ("agreement=0.9", "NAME>=NUMBER"),
        ("agrement>=0.9", "no number is called 'agrement'; there are agreement, "),
    ],
)
def test_what_is_no_condition_is_refused(condition, message):
    """A misspelt condition that is skipped is a gate that is always open."""
    with pytest.raises(ValueError, match=message):
        report_of_logits(*two_sides(), bootstrap=0).require(condition)


def test_every_number_can_be_named_by_a_gate():
    """A number that is printed and cannot be required is one that CI cannot hold."""
    student, teacher, labels = two_sides()
    found = report_of_logits(student, teacher, labels, groups=labels.tolist(), bootstrap=0)
    found = dataclasses.replace(found, train=found)
    assert set(found.numbers()) == set(NUMBERS)
    assert found.teacher_train_accuracy == found.teacher.accuracy == found.numbers()["train_teacher_accuracy"]


# ---- what is written ----


def test_the_report_is_the_same_in_every_form(tmp_path):
    """A card that says another number than the gate measured cannot be checked by anyone."""
    pytest.importorskip("matplotlib")
    student, teacher, labels = two_sides()
    found = report_of_logits(
        student, teacher, labels, class_names=["a|b", "b", "c", "d"], student="tiny", teacher="big"
    )
    found = dataclasses.replace(found, train=found)
    written = {path.name: path for path in found.save(tmp_path / "report")}
    assert set(written) == {"report.md", "report.json", "reliability.png", "logit_logit.png"}
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == sorted(written), (
        "nothing half-written is left"
    )
    kept = json.loads(written["report.json"].read_text())
    assert kept == found.to_dict()
    assert kept["agreement"] == found.agreement and kept["classes"][1]["difference"] == found.classes[1].difference
    text = written["report.md"].read_text()
    assert f"| accuracy (%) | {100 * found.student.accuracy:.1f} | {100 * found.teacher.accuracy:.1f} |" in text
    assert "a\\|b" in text, "a bar in a class name would shift every later column"
    card = render_card(CardFacts(fidelity={**kept, "figures": ["reliability.png"]}))
    for part in ("## Fidelity to the teacher", "tiny (student) beside big (teacher) on 400 rows", "![reliability.png]"):
        assert part in card
    for value in (found.agreement, found.kl_divergence, found.student.brier_score, found.classes[1].difference):
        assert f"{value:.4f}" in card
    assert "## Fidelity" not in render_card(CardFacts())


def test_a_card_of_a_report_without_labels_has_no_holes():
    """An empty heading, a bare None or a row of dashes makes the whole card look unchecked."""
    card = render_card(CardFacts(fidelity=report_of_logits(*two_sides()[:2]).to_dict()))
    section = card[card.index("## Fidelity") : card.index("## Citation")]
    assert "Brier" not in section and "mean confidence" in section and "Without labels" in section
    assert not re.search(r"\bNone\b|\bnan\b|\| - \|", section) and "\n\n\n" not in section


def test_the_reliability_diagram_shows_each_sides_bins(tmp_path):
    """A diagram with its axes exchanged shows a model that is too sure as one that is too modest."""
    pytest.importorskip("matplotlib")
    from hfkd.diagnostics import plots

    sides = {"student": [(0.3, 0.2, 10), (0.9, 0.8, 30)], "teacher": [(0.95, 0.99, 40)]}
    upper, lower = plots.reliability_diagram(sides, tmp_path / "figure.png").axes
    lines = {line.get_label(): line for line in upper.lines}
    assert list(lines["student"].get_xdata()) == pytest.approx([30, 90])
    assert list(lines["student"].get_ydata()) == pytest.approx([20, 80])
    assert list(lower.lines[0].get_ydata()) == pytest.approx([25, 75])
    assert upper.get_ylabel() == "accuracy of the bin (%)" and lower.get_xlabel() == "mean confidence of the bin (%)"
    with pytest.raises(ValueError, match="bins of confidence"):
        plots.reliability_diagram({"student": []}, tmp_path / "none.png")


# ---- models, each with its own view ----


def classifier(seed=0, names=MOODS, **changes):
    torch.manual_seed(seed)
    maps = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    # As transformers starts it, it would predict one class for all texts
    return RobertaForSequenceClassification(tiny_roberta_config(**maps, initializer_range=0.7, **changes)).eval()


def shuffled_tokenizer(order):
    """tiny_tokenizer with the words' ids exchanged: id order[i] for the word that had i."""
    tokenizer = tiny_tokenizer()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["vocab"] = {word: order[i] for word, i in state["model"]["vocab"].items()}
    return type(tokenizer)(
        tokenizer_object=tokenizer.backend_tokenizer.from_str(json.dumps(state)),
        model_input_names=["input_ids", "attention_mask"], bos_token="<s>", pad_token="<pad>", eos_token="</s>",
        unk_token="<unk>", mask_token="<mask>", cls_token="<s>", sep_token="</s>",
    )  # fmt: skip


def twin(student):
    """The same function with other token ids and other class ids, under names written otherwise; and its tokenizer."""
    order = [*range(5), *reversed(range(5, 50))]
    teacher = copy.deepcopy(student)
    words = student.roberta.embeddings.word_embeddings.weight.data
    teacher.roberta.embeddings.word_embeddings.weight.data[order] = words
    for name in ("weight", "bias"):
        head = getattr(teacher.classifier.out_proj, name)
        head.data = head.data.flip(0)
    teacher.config.id2label = {i: f" {name.upper()}" for i, name in enumerate(reversed(MOODS))}
    return teacher, shuffled_tokenizer(order)


def texts(count=30, **columns):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 12, (count,), generator=generator).tolist()
    words = [torch.randint(5, 50, (n,), generator=generator).tolist() for n in lengths]
    return Dataset.from_dict({"text": [" ".join(f"w{w}" for w in row) for row in words], **columns})


def one_by_one(model, tokenizer, rows):
    with torch.no_grad():
        return np.concatenate([model.eval()(**tokenizer(text, return_tensors="pt")).logits for text in rows["text"]])


def test_each_side_reads_with_its_own_tokenizer_and_its_own_class_order(tmp_path):
    """A teacher that reads the student's tokens, or whose classes stay in its own order, looks like a student that disobeys."""
    student = classifier()
    teacher, own = twin(student)
    for model, tokenizer, name in ((student, tiny_tokenizer(), "tiny"), (teacher, own, "twin")):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    rows = texts(label=[i % 3 for i in range(30)]).cast_column("label", ClassLabel(names=MOODS))
    given = report(
        student, teacher, rows, processing_class=tiny_tokenizer(), teacher_processing_class=own, batch_size=4
    )
    found = report(tmp_path / "tiny", str(tmp_path / "twin"), rows, batch_size=7)
    for each in (given, found):
        assert each.agreement == 1.0 and each.kl_divergence < 1e-9 and each.student.predicted.count(0) < 2
    assert (found.student.name, found.teacher.name, found.class_names) == ("tiny", "twin", tuple(MOODS))
    shared = report(student, teacher, rows, processing_class=tiny_tokenizer())
    assert shared.agreement < 1.0, "the test can tell"


def test_answers_come_back_in_the_order_of_the_rows():
    """Rows are asked by length: left in that order, labels belong to other rows and every score is chance."""
    model, tokenizer, rows = classifier(), tiny_tokenizer(), texts()
    logits = one_by_one(model, tokenizer, rows)
    labelled = rows.add_column("label", logits.argmax(1).tolist())
    assert len(set(labelled["label"])) > 1
    found = report(model, classifier(1), labelled, processing_class=tokenizer, batch_size=4)
    assert found.student.accuracy == 1.0
    expected = report_of_logits(
        logits, one_by_one(classifier(1), tokenizer, rows), labelled["label"], class_names=MOODS
    )
    assert found.numbers() == pytest.approx(expected.numbers(), rel=1e-3, abs=1e-5)


def test_models_are_left_as_they_were_found():
    """A student that comes back frozen or in eval mode trains no further, and nothing says so."""
    student, teacher = classifier(), classifier(1)
    student.train()
    teacher.train().roberta.requires_grad_(False)
    flags = [weight.requires_grad for weight in teacher.parameters()]
    report(student, teacher, texts(), processing_class=tiny_tokenizer())
    assert student.training and student.roberta.encoder.layer[0].training and teacher.training
    assert all(weight.requires_grad for weight in student.parameters())
    assert [weight.requires_grad for weight in teacher.parameters()] == flags


def test_tokens_teachers_of_every_kind_and_training_rows():
    """An ensemble or a cache that answers for other rows is compared with what it never said."""
    student, tokenizer = classifier(), tiny_tokenizer()
    rows = texts(label=[i % 3 for i in range(30)])
    tokens = rows.map(lambda row: tokenizer(row["text"]), remove_columns="text")
    members = [classifier(1), classifier(2)]
    logits = [one_by_one(member, tokenizer, rows) for member in members]
    mean = report(student, EnsembleTeacher(members, "logits"), tokens, train_dataset=rows, processing_class=tokenizer)
    cached = rows.add_column("teacher_logits", ((logits[0] + logits[1]) / 2).tolist())
    again = report(student, CachedTeacher(), cached, processing_class=tokenizer)
    assert again.numbers() == pytest.approx(mean.train.numbers(), rel=1e-3, abs=1e-5)
    names = (name for name in mean.numbers() if not name.startswith("train_"))
    assert all(
        mean.numbers()[f"train_{name}"] == pytest.approx(mean.numbers()[name], rel=1e-3, abs=1e-5) for name in names
    )
    with pytest.raises(ValueError, match="combine='mean' or 'logits'"):
        report(student, EnsembleTeacher(members, "vote"), rows, processing_class=tokenizer)
    with pytest.raises(ValueError, match="tokenizers? .* differ, and the rows have no teacher_input_ids"):
        report(student, twin(student)[0], tokens, processing_class=tokenizer,
               teacher_processing_class=twin(student)[1])  # fmt: skip


def test_labels_are_matched_by_name():
    """Data whose classes stand in another order score a perfect student like a coin."""
    student, tokenizer, rows = classifier(), tiny_tokenizer(), texts()
    right = one_by_one(student, tokenizer, rows).argmax(1).tolist()

    def accuracy(dataset, **settings):
        return report(student, classifier(1), dataset, processing_class=tokenizer, **settings).student.accuracy

    turned = rows.add_column("label", [2 - i for i in right]).cast_column("label", ClassLabel(names=MOODS[::-1]))
    assert accuracy(turned) == 1.0
    assert accuracy(rows.add_column("mood", [MOODS[i].title() for i in right]), label_column="mood") == 1.0
    assert accuracy(rows.add_column("labels", right)) == 1.0
    hidden = rows.add_column("label", [-1] * 30)
    assert accuracy(hidden) is None and accuracy(rows) is None
    for values, message in (
        ([MOODS[0], "angry"] * 15, r"data's classes are \['angry', 'calm'\], the student's \['calm', 'glad', 'sad'\]"),
        ([0, 3] * 15, "labels run up to 3, the student's classes from 0 to 2"),
        ([0.5] * 30, "one class a row"),
        ([[0, 1]] * 30, "one class a row"),
    ):
        with pytest.raises(ValueError, match=message):
            accuracy(rows.add_column("label", values))
    with pytest.raises(ValueError, match="no column 'mood' of labels, only text"):
        accuracy(rows, label_column="mood")


def image_rows(count=10, size=20):
    generator = np.random.default_rng(0)
    pictures = [Image.fromarray(generator.integers(0, 256, (size, size, 3), dtype=np.uint8)) for _ in range(count)]
    return Dataset.from_dict({"image": pictures, "label": [i % 3 for i in range(count)]})


def image_side(seed, size, **settings):
    torch.manual_seed(seed)
    config = ViTConfig(image_size=size, patch_size=size // 4, hidden_size=16, num_hidden_layers=1, num_labels=3,
                       num_attention_heads=2, intermediate_size=32, initializer_range=0.5)  # fmt: skip
    return ViTForImageClassification(config), ViTImageProcessorPil(size={"height": size, "width": size}, **settings)


def test_each_side_sees_pictures_with_its_own_processor(tmp_path):
    """A teacher shown the student's normalisation is another teacher: its disagreement is of our making."""
    student, ours = image_side(0, 8)
    teacher, theirs = image_side(1, 16, image_mean=[0.1, 0.2, 0.3], image_std=[0.3, 0.3, 0.3])
    rows = image_rows()
    with torch.no_grad():
        logits = [
            model.eval()(**processor(rows["image"][:], return_tensors="pt")).logits.numpy()
            for model, processor in ((student, ours), (teacher, theirs))
        ]
    expected = report_of_logits(*logits, rows["label"]).numbers()
    found = report(student, teacher, rows, processing_class=ours, teacher_processing_class=theirs, batch_size=4)
    assert found.numbers() == pytest.approx(expected, rel=1e-2, abs=1e-3)
    for model, processor, name in ((student, ours, "student"), (teacher, theirs, "teacher")):
        model.save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
    assert report(tmp_path / "student", tmp_path / "teacher", rows).numbers() == pytest.approx(found.numbers())
    wrong = report(student, teacher, rows, processing_class=ours, teacher_processing_class=PixelView((16, 16)))
    assert abs(wrong.kl_divergence - found.kl_divergence) > 1e-2, "the test can tell"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda: {"teacher": classifier(1, ["calm", "glad", "angry"])}, "student's classes are .*'sad'.* the teacher's"),
        (lambda: {"teacher": classifier(1, ["a", "b"])}, "the student has 3 labels, the teacher 2"),
        (lambda: {"teacher": classifier(1, vocab_size=60)}, "vocabulary has 50 tokens, the teacher's 60"),
        (lambda: {"student": classifier(problem_type="regression")}, "student's problem_type is 'regression'"),
        (lambda: {"student": "nowhere/at-all"}, "student 'nowhere/at-all' is neither"),
        (lambda: {"processing_class": None}, "rows are texts, .* pass processing_class"),
        (lambda: {"dataset": DatasetDict(train=texts())}, "one split is compared, and there are train"),
        (lambda: {"dataset": texts().select([])}, "no rows"),
        (lambda: {"dataset": iter(())}, "list_iterator|tuple_iterator|not "),
        (lambda: {"dataset": texts().rename_column("text", "body")}, "the rows have body, and the models read"),
        (lambda: {"group_column": "dialect"}, "no column 'dialect' of subgroups, only text"),
        (lambda: {"dataset": texts(dialect=["a", None] * 15), "group_column": "dialect"}, "15 of 30 rows have no subgroup"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_said(given, message):
    """Models of other classes, or rows that are read in a wrong way, give numbers that look like a bad student."""
    values = {
        "student": classifier(),
        "teacher": classifier(1),
        "dataset": texts(),
        "processing_class": tiny_tokenizer(),
    }
    with pytest.raises((ValueError, OSError), match=message):
        report(**{**values, **given()})


def test_a_diverged_model_names_its_rows():
    """ "nan" for a report of 100,000 rows leaves everyone to look for the one input that did it."""
    student, rows = classifier(), texts(example_id=[100 + i for i in range(30)])
    word = int(rows["text"][4].split()[0].removeprefix("w"))
    with torch.no_grad():
        student.roberta.embeddings.word_embeddings.weight[word] = math.nan
    hit = [100 + i for i, text in enumerate(rows["text"]) if f"w{word}" in text.split()][:10]
    with pytest.raises(ValueError, match=re.escape(f"the student's logits are NaN or infinite for examples {hit}")):
        report(student, classifier(1), rows, processing_class=tiny_tokenizer(), batch_size=4)


def test_subgroups_are_of_any_column():
    """A subgroup that is cast to another's name hides the group that pays."""
    rows = texts(label=[i % 3 for i in range(30)], year=[2000 + i % 2 for i in range(30)])
    rows = rows.cast(Features(text=Value("string"), label=Value("int64"), year=Value("int32")))
    found = report(classifier(), classifier(1), rows, group_column="year", processing_class=tiny_tokenizer())
    assert [(part.name, part.examples) for part in found.subgroups] == [("2000", 15), ("2001", 15)]


def test_the_names_are_lazy_and_the_function_is_not_shadowed():
    """`hfkd.diagnostics.report` as a module is an error at the call that the README shows."""
    assert callable(hfkd.diagnostics.report) and hfkd.diagnostics.report is report
    with pytest.raises(AttributeError, match="no attribute 'fidelty'; it has"):
        _ = hfkd.diagnostics.fidelty
