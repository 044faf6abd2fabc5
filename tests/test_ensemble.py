"""Several teachers that answer as one: laws against slow loops, and draws that depend on the example alone."""

from __future__ import annotations

import copy
import math
from collections import Counter

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor
from transformers import RobertaForSequenceClassification, RobertaForTokenClassification, RobertaModel

from hfkd.outputs import Progress, TeacherOutput
from hfkd.teachers import CachedTeacher, EnsembleTeacher, ModelTeacher, Teacher
from hfkd.teachers.ensemble import combine_answers, drawn_of_step, keyed_choice, voted
from hfkd.testing import check_teacher, tiny_roberta_config


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def classifier(**overrides):
    return RobertaForSequenceClassification(tiny_roberta_config(num_labels=3, initializer_range=1.0, **overrides))


def named(*names, **overrides):
    return classifier(id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)}, **overrides)


def batch_of(rows=5):
    return {
        "input_ids": torch.randint(5, 50, (rows, 6)),
        "attention_mask": torch.ones(rows, 6, dtype=torch.long),
        "example_id": torch.arange(rows),
    }


class Says(Teacher):
    """Answers a column of the batch."""

    def __init__(self, column: str, config=None):
        self.columns = (column,)
        self.config = config

    def respond(self, batch, progress=None):
        return TeacherOutput(logits=batch[self.columns[0]])


def three(logits: Tensor, combine: str, config=None):
    """An ensemble that answers logits (3, batch, labels) given by hand."""
    names = [f"member_{i}" for i in range(len(logits))]
    return EnsembleTeacher([Says(name, config) for name in names], combine), dict(zip(names, logits, strict=True))


# ---- laws ----


@pytest.mark.parametrize("combine", ["mean", "logits", "vote", "sample"])
def test_an_ensemble_keeps_the_contract(combine):
    """A member with dropout or gradients gives soft targets that move while the student trains."""
    members = [classifier(hidden_dropout_prob=0.5) for _ in range(2)]
    batch = batch_of()
    if combine in ("mean", "logits"):
        check_teacher(EnsembleTeacher(members, combine), batch)
    teacher = EnsembleTeacher(members, combine)
    answer, again = teacher(batch), teacher(batch)
    for one, other in ((answer.logits, again.logits), (answer.labels, again.labels)):
        assert one is None or torch.equal(one, other)
    assert (answer.logits is None) == (combine in ("vote", "sample")) == (answer.labels is not None)


@pytest.mark.parametrize("combine", ["mean", "logits", "vote", "sample"])
def test_an_ensemble_of_one_is_its_member(combine):
    """Were one member not itself, a comparison of ensemble sizes would start from another method."""
    model, batch = classifier(), batch_of()
    alone = ModelTeacher(model)(batch).logits
    answer = EnsembleTeacher([model], combine)(batch)
    if combine == "logits":
        assert torch.equal(answer.logits, alone)
    elif combine == "mean":
        assert torch.allclose(answer.logits, alone.log_softmax(-1), atol=1e-6)
    else:
        assert torch.equal(answer.labels, alone.argmax(-1))


def test_the_mean_is_of_probabilities():
    """The mean of logits is another method; the difference is a few per cent and shows in no smoke test."""
    logits = torch.randn(3, 4, 5, dtype=torch.float64) * 5
    teacher, batch = three(logits, "mean")
    answer = teacher(batch).logits.softmax(-1)
    for i in range(4):
        for c in range(5):
            terms = [math.exp(float(logits[m, i, c])) / sum(math.exp(float(x)) for x in logits[m, i]) for m in range(3)]
            assert float(answer[i, c]) == pytest.approx(sum(terms) / 3, rel=1e-12)


def test_the_mean_of_extreme_logits_is_finite():
    """log(0) of a class that every member rules out is -inf, and 0 * -inf in the loss is NaN."""
    logits = torch.tensor([[[1e4, 0.0, -1e4]], [[1e4, 0.0, -1e4]]])
    for problem_type in ("single_label_classification", "multi_label_classification"):
        teacher, batch = three(logits, "mean", tiny_roberta_config(num_labels=3, problem_type=problem_type))
        assert torch.isfinite(teacher(batch).logits).all()


def test_independent_labels_are_averaged_as_sigmoids():
    """A softmax over independent labels makes them compete."""
    logits = torch.randn(3, 4, 5, dtype=torch.float64) * 3
    config = tiny_roberta_config(num_labels=5, problem_type="multi_label_classification")
    teacher, batch = three(logits, "mean", config)
    assert torch.allclose(teacher(batch).logits.sigmoid(), logits.sigmoid().mean(0), atol=1e-12)


def test_outputs_of_a_regression_are_averaged():
    """A softmax over one output is 1 for every example: the teacher would say the same of everything."""
    logits = torch.randn(3, 4, 1, dtype=torch.float64)
    teacher, batch = three(logits, "mean", tiny_roberta_config(num_labels=1))
    assert torch.allclose(teacher(batch).logits, logits.mean(0), atol=1e-12)


def test_the_students_problem_type_counts_where_the_members_have_none():
    """A teacher's config often leaves problem_type open, and only the student knows that labels are independent."""
    logits = torch.randn(2, 4, 3)
    teacher, batch = three(logits, "mean", tiny_roberta_config(num_labels=3))
    teacher.align_labels(tiny_roberta_config(num_labels=3, problem_type="multi_label_classification"))
    assert torch.allclose(teacher(batch).logits.sigmoid(), logits.sigmoid().mean(0), atol=1e-6)


def test_members_in_bfloat16_are_averaged_in_float32():
    """The mean of three bfloat16 logits, rounded to bfloat16 again, has two digits."""
    teacher, batch = three(torch.randn(3, 4, 5).bfloat16(), "logits")
    assert teacher(batch).logits.dtype == torch.float32


# ---- votes ----


def test_most_votes_win():
    """The mean and the majority differ exactly where a confident minority is wrong."""
    logits = torch.tensor([[[9.0, 0.0, 0.0]], [[0.0, 0.1, 0.0]], [[0.0, 0.1, 0.0]]])
    teacher, batch = three(logits, "vote")
    answer = teacher(batch)
    assert answer.logits is None and answer.labels.tolist() == [1]
    assert EnsembleTeacher(teacher.members)(batch).logits.argmax(-1).tolist() == [0]


def test_ties_go_to_the_more_probable_class():
    """Ties broken by the lowest class number favour class 0 in every ensemble of two."""
    logits = torch.tensor([[[1.0, 0.0, 0.0]], [[0.0, 0.0, 3.0]]])
    assert voted(logits).tolist() == [2]
    assert voted(logits.flip(-1)).tolist() == [0]
    # class 1 has no vote, though the largest sum of probabilities
    assert voted(torch.tensor([[[1.1, 1.0, -9.0]], [[-9.0, 1.0, 1.2]]])).tolist() == [2]


def test_votes_equal_a_slow_count():
    """One vote too many changes pseudo-labels of close examples only, which no accuracy shows."""
    logits = torch.randn(5, 200, 4)
    for i, label in enumerate(voted(logits).tolist()):
        votes = [int(logits[m, i].argmax()) for m in range(5)]
        sums = logits[:, i].double().softmax(-1).sum(0)
        best = max(range(4), key=lambda c: (votes.count(c), float(sums[c])))
        assert label == best


def test_tokens_vote_one_by_one():
    """Token heads have a vote for each token."""
    members = [RobertaForTokenClassification(tiny_roberta_config(num_labels=3)) for _ in range(3)]
    assert EnsembleTeacher(members, "vote")(batch_of()).labels.shape == (5, 6)


# ---- draws ----


def members_that_say_their_number(count):
    """Member m predicts class m for every example, so that a label tells who was drawn."""
    logits = torch.eye(count)[:, None].expand(count, 1000, count)
    return three(logits, "sample")


def test_draws_do_not_depend_on_the_batch():
    """Another batch size, process or order would give an example another pseudo-label: no run could be resumed."""
    teacher, batch = members_that_say_their_number(4)
    ids = torch.randperm(100_000)[:1000]
    batch["example_id"] = ids
    progress = Progress(epoch=2.5, seed=7)
    state = torch.random.get_rng_state()
    labels = dict(zip(ids.tolist(), teacher(batch, progress).labels.tolist(), strict=True))
    assert torch.equal(torch.random.get_rng_state(), state)
    for rows in (torch.tensor([3]), torch.randperm(1000)[:37], torch.arange(999, -1, -1)):
        torch.rand(1)  # the global generator stands elsewhere
        part = {name: column[rows] for name, column in batch.items()}
        for i, label in zip(part["example_id"].tolist(), teacher(part, progress).labels.tolist(), strict=True):
            assert labels[i] == label
    later = Progress(step=9, epoch=2.9, seed=7)  # the same epoch
    assert torch.equal(teacher(batch, later).labels, teacher(batch, progress).labels)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_draws_are_uniform_and_fresh_in_every_epoch(count):
    """A member that is drawn more often, or the same one every epoch, makes the ensemble one teacher per example."""
    ids = torch.arange(20_000)
    epochs = [
        keyed_choice(ids, Progress(epoch=e, seed=s, round=r), count)
        for e, s, r in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))
    ]
    for draws in epochs:
        assert chisquare(torch.bincount(draws, minlength=count).numpy()).pvalue > 1e-4
        pairs = draws[:-1] * count + draws[1:]  # neighbours
        assert chisquare(torch.bincount(pairs, minlength=count**2).numpy()).pvalue > 1e-4
    for i in range(4):
        for j in range(i):
            pairs = epochs[i] * count + epochs[j]
            assert chisquare(torch.bincount(pairs, minlength=count**2).numpy()).pvalue > 1e-4
    huge = keyed_choice(torch.tensor([-1, 2**62, 2**33 + 5]), Progress(), count)
    assert ((huge >= 0) & (huge < count)).all()


def test_a_drawn_label_is_the_drawn_members():
    """A label of nobody is noise, and looks like a harder problem."""
    members = [classifier() for _ in range(3)]
    teacher, batch = EnsembleTeacher(members, "sample"), batch_of(50)
    chosen = keyed_choice(batch["example_id"], Progress(seed=3), 3)
    answers = [ModelTeacher(member)(batch).logits.argmax(-1) for member in members]
    expected = [int(answers[int(chosen[i])][i]) for i in range(50)]
    assert teacher(batch, Progress(seed=3)).labels.tolist() == expected
    assert len(set(chosen.tolist())) == 3


def test_draws_need_example_ids():
    """Drawn by the place in the batch instead, labels would change with every shuffle."""
    teacher, batch = EnsembleTeacher([classifier()], "sample"), batch_of()
    assert "example_id" in teacher.columns and "example_id" in teacher.reads(["example_id", "input_ids"])
    del batch["example_id"]
    with pytest.raises(ValueError, match="example_id.*input_ids"):
        teacher(batch)


# ---- one member for a whole step ----


def test_draws_by_batch_ask_one_member_for_the_whole_step():
    """Asking all members to use one makes RPL as expensive as EPL, and a draw for each micro-batch depends on their size."""
    asked = []

    class Asked(Says):
        def respond(self, batch, progress=None):
            asked.append(self.columns[0])
            return super().respond(batch, progress)

    teacher = EnsembleTeacher([Asked(f"member_{i}") for i in range(4)], "sample", draw="batch")
    batch = {f"member_{i}": torch.eye(4)[i].expand(7, 4) for i in range(4)}  # no example_id
    seen = []
    for step in range(40):
        answers = {
            int(label) for part in range(2) for label in teacher(batch, Progress(step, epoch=part, seed=3)).labels
        }
        assert len(answers) == 1 and set(asked) == {f"member_{i}" for i in answers}
        seen += answers
        asked.clear()
    assert set(seen) == {0, 1, 2, 3} and "example_id" not in teacher.columns
    assert teacher.reads([*batch, "example_id"]) == tuple(sorted(batch))
    assert teacher.facts()["draw"] == "batch"


@pytest.mark.parametrize("count", [2, 3, 5])
def test_draws_by_batch_are_uniform_and_fresh(count):
    """A member that leads more steps than the others is most of the teacher; one order for all seeds is one experiment."""
    runs = [
        torch.tensor([drawn_of_step(Progress(step, seed=s, round=r), count) for step in range(20_000)])
        for s, r in ((0, 0), (1, 0), (0, 1))
    ]
    for draws in runs:
        assert chisquare(torch.bincount(draws, minlength=count).numpy()).pvalue > 1e-4
        pairs = draws[:-1] * count + draws[1:]
        assert chisquare(torch.bincount(pairs, minlength=count**2).numpy()).pvalue > 1e-4
    for i, j in ((0, 1), (0, 2), (1, 2)):
        pairs = runs[i] * count + runs[j]
        assert chisquare(torch.bincount(pairs, minlength=count**2).numpy()).pvalue > 1e-4


def test_an_unknown_or_useless_draw_is_refused():
    """An option that is ignored without a word is an experiment that never happened."""
    with pytest.raises(ValueError, match="example, batch, got 'step'"):
        EnsembleTeacher([classifier()], "sample", draw="step")
    for ask in (lambda: EnsembleTeacher([classifier()], "vote", draw="batch"), lambda: saved("vote", draw="batch")):
        with pytest.raises(ValueError, match="combine='vote' draws nothing"):
            ask()


# ---- soft answers ----


def test_soft_votes_are_what_draws_are_on_average():
    """The link between EPL and RPL: were shares not the draws' frequencies, soft labels would be of another ensemble."""
    logits = torch.randn(5, 1000, 4, dtype=torch.float64)
    teacher, batch = three(logits, "vote")
    shares = EnsembleTeacher(teacher.members, "vote", soft=True)(batch).labels
    for row in range(1000):
        votes = Counter(logits[:, row].argmax(-1).tolist())
        assert shares[row].tolist() == pytest.approx([votes[c] / 5 for c in range(4)], rel=1e-15)
    drawn, batch["example_id"] = EnsembleTeacher(teacher.members, "sample"), torch.arange(1000)
    epochs = torch.stack([drawn(batch, Progress(epoch=epoch)).labels for epoch in range(400)])
    frequencies = torch.nn.functional.one_hot(epochs, 4).double().mean(0)
    deviations = (frequencies - shares) / (shares * (1 - shares) / 400).sqrt().clamp(min=1e-9)
    assert float(deviations.abs().max()) < 5.5
    assert float(deviations[(shares > 0) & (shares < 1)].std()) == pytest.approx(1, abs=0.05)


def test_a_soft_draw_is_the_drawn_members_logits():
    """Soft labels of a mean under the name of a draw are EPL."""
    logits = torch.randn(3, 50, 4)
    teacher, batch = three(logits, "sample")
    batch["example_id"] = torch.arange(50) * 7
    hard, progress = teacher(batch, Progress(epoch=2)), Progress(epoch=2)
    answer = EnsembleTeacher(teacher.members, "sample", soft=True)(batch, progress)
    chosen = keyed_choice(batch["example_id"], progress, 3)
    assert answer.labels is None and torch.equal(answer.logits.argmax(-1), hard.labels)
    assert all(torch.equal(answer.logits[i], logits[int(chosen[i]), i]) for i in range(50))


# ---- saved logits: test-time ensembling ----


def saved(combine, logits=None, **settings):
    return combine_answers(torch.randn(3, 6, 4) if logits is None else logits, combine, **settings)


@pytest.mark.parametrize("combine", ["mean", "logits", "vote", "sample"])
@pytest.mark.parametrize("soft", [False, True])
def test_saved_logits_are_combined_as_the_teacher_combines(combine, soft):
    """The test-time ensemble beside EPL in a table must be the very ensemble that the student learned from."""
    members = [classifier() for _ in range(3)]
    batch, progress = batch_of(40), Progress(step=3, epoch=1.2, seed=5)
    logits = torch.stack([ModelTeacher(member)(batch).logits for member in members])
    for draw in ("example", "batch") if combine == "sample" else ("example",):
        expected = EnsembleTeacher(members, combine, draw=draw, soft=soft)(batch, progress)
        for given in (logits, list(logits), logits.numpy()):
            answer = saved(combine, given, example_ids=batch["example_id"], progress=progress, draw=draw, soft=soft)
            for name in ("logits", "labels"):
                one, other = getattr(answer, name), getattr(expected, name)
                assert (one is None) == (other is None) and (one is None or torch.equal(one, other)), name


def test_saved_sigmoids_are_averaged_too():
    """A multi-label test-time ensemble by softmax reports worse figures than its members."""
    logits = torch.randn(3, 6, 4, dtype=torch.float64)
    answer = saved("mean", logits, problem_type="multi_label_classification")
    assert torch.allclose(answer.logits.sigmoid(), logits.sigmoid().mean(0), atol=1e-12)
    with pytest.raises(ValueError, match="one class an example, this is regression"):
        saved("vote", logits, problem_type="regression")


def test_saved_logits_of_other_rows_are_refused():
    """Members whose logits lie in another order of rows still vote, about different examples."""
    ids = torch.arange(6) + 10
    answer = saved("sample", torch.ones(3, 6, 4), example_ids=torch.stack([ids] * 3))
    assert answer.labels.shape == (6,)
    for other in (torch.stack([ids, ids, ids[[0, 2, 1, 3, 4, 5]]]), np.stack([ids, ids, ids[[0, 2, 1, 3, 4, 5]]])):
        with pytest.raises(ValueError, match="row 1 is example 12 of member 2 and 11 of member 0"):
            saved("vote", example_ids=other)
    with pytest.raises(ValueError, match=r"example_ids are \(2, 6\), the logits of 3 members and 6 rows"):
        saved("vote", example_ids=torch.stack([ids] * 2))
    with pytest.raises(ValueError, match="pass the ids of the rows"):
        saved("sample")


def test_saved_logits_of_other_shapes_are_refused():
    """A stack that fails says nothing of who is wrong, and one that broadcasts says nothing at all."""
    with pytest.raises(ValueError, match=r"member 2 has logits \(6, 5\), member 0 \(6, 4\)"):
        saved("mean", [torch.randn(6, 4), torch.randn(6, 4), torch.randn(6, 5)])
    with pytest.raises(ValueError, match=r"member 1 has logits \(1, 4\), member 0 \(6, 4\)"):
        saved("logits", [torch.randn(6, 4), torch.randn(1, 4)])
    with pytest.raises(ValueError, match=r"member 0 has logits \(4,\)"):
        saved("mean", torch.randn(6, 4))  # one member without its dimension
    for none in ([], torch.zeros(0, 6, 4)):
        with pytest.raises(ValueError, match="at least one member"):
            saved("mean", none)


@pytest.mark.parametrize("combine", ["mean", "logits", "vote", "sample"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_member_that_answers_nan_is_named(combine, bad):
    """argmax takes NaN for the largest value: votes and draws would turn it into a class, and every loss stays finite."""
    logits = torch.randn(3, 6, 4)
    logits[1, [2, 5], 3] = bad
    ids = torch.arange(6) * 100
    with pytest.raises(ValueError, match=r"member 1 are NaN or infinite for examples \[200, 500\] \(2 of 6\)"):
        saved(combine, logits, example_ids=ids)
    teacher, batch = three(logits, combine)
    with pytest.raises(ValueError, match=r"member 1 .* for examples \[200, 500\]"):
        teacher({**batch, "example_id": ids})
    if combine != "sample":
        with pytest.raises(ValueError, match=r"member 1 .* rows of this batch \[2, 5\]"):
            teacher(batch)
    else:
        answered, refused = 0, 0
        drawn = EnsembleTeacher(teacher.members, "sample", draw="batch")
        for step in range(30):
            try:
                answered += len(drawn(batch, Progress(step=step)).labels) == 6
            except ValueError as error:
                refused += "member 1 " in str(error)
        assert answered + refused == 30 and answered and refused


# ---- cached members ----


def test_cached_members_carry_the_view_they_were_asked_about():
    """Plain answers beside augmented images would be learned without a word: the trainer compares views of teachers."""
    cached = [CachedTeacher("teacher_logits_0"), CachedTeacher("teacher_logits_1")]
    assert EnsembleTeacher(cached, "vote").view == "plain"
    assert EnsembleTeacher([classifier()], "vote").view is None
    cached[1].view = "augmented"
    with pytest.raises(ValueError, match="augmented, plain"):
        EnsembleTeacher(cached, "vote")


# ---- classes of members ----


@pytest.mark.parametrize("combine", ["mean", "logits", "vote", "sample"])
def test_each_member_is_matched_by_its_own_names(combine):
    """The mean over members with different orders averages 'entailment' with 'contradiction'."""
    first = named("a", "b", "c")
    second = copy.deepcopy(first)
    second.config.id2label = {0: "C", 1: "A", 2: "B"}
    head = second.classifier.out_proj
    for parameter in (head.weight, head.bias):
        parameter.data = parameter.data[[2, 0, 1]].clone()  # the same function under other numbers
    batch = batch_of(30)
    expected = EnsembleTeacher([first], combine)(batch)
    teacher = EnsembleTeacher([first, second], combine)
    for student, order in ((None, [0, 1, 2]), (named("b", "c", "a").config, [1, 2, 0])):
        if student is not None:
            teacher.align_labels(student)
        answer = teacher(batch)
        if answer.logits is not None:
            assert torch.allclose(answer.logits, expected.logits[:, order], atol=1e-6)
        else:
            assert [order[label] for label in answer.labels.tolist()] == expected.labels.tolist()


def test_members_that_do_not_fit_are_refused():
    """Found by a shape error at step 1, or not at all where the numbers of classes agree."""
    with pytest.raises(ValueError, match=r"members do not match.*joy.*'a'|members do not match.*'a'.*joy"):
        EnsembleTeacher([named("a", "b", "c"), named("joy", "anger", "fear")])
    with pytest.raises(ValueError, match="members do not match.*3 labels.*2"):
        EnsembleTeacher([classifier(), RobertaForSequenceClassification(tiny_roberta_config(num_labels=2))])
    kinds = [classifier(problem_type=kind) for kind in ("multi_label_classification", "regression")]
    with pytest.raises(ValueError, match="different problem types"):
        EnsembleTeacher(kinds)
    with pytest.raises(ValueError, match="one class an example"):
        EnsembleTeacher([classifier(problem_type="multi_label_classification")], "vote")
    with pytest.raises(ValueError, match="'median'"):
        EnsembleTeacher([classifier()], "median")
    with pytest.raises(ValueError, match="at least one"):
        EnsembleTeacher([])
    with pytest.raises(ValueError, match=r"member 0 \(ModelTeacher\) answered no logits"):
        EnsembleTeacher([RobertaModel(tiny_roberta_config())])(batch_of())
    with pytest.raises(ValueError, match="hidden_states"):
        EnsembleTeacher([classifier()]).prepare(None, {"teacher", "hidden_states"}, "cpu")


# ---- memory ----


def test_one_in_memory_answers_the_same(tmp_path):
    """The way to save memory must not be another method."""
    models = [classifier() for _ in range(3)]
    for i, model in enumerate(models):
        model.save_pretrained(tmp_path / str(i))
    batch, folders = batch_of(), [str(tmp_path / str(i)) for i in range(3)]
    expected = EnsembleTeacher(models)(batch).logits
    for members in (folders, [models[0], ModelTeacher(folders[1]), folders[2]]):
        teacher = EnsembleTeacher(members, one_in_memory=True)
        teacher.prepare(None, {"teacher"}, "cpu")
        assert torch.equal(teacher(batch).logits, expected)
        assert teacher.reads(batch) == ("attention_mask", "input_ids")
        assert [m["name"] for m in teacher.facts()["members"]][2] == "2"
        assert len(list(teacher.weights())) == 3


def test_members_on_disk_are_not_kept(tmp_path):
    """An ensemble that keeps what it loaded needs the memory it promised to save."""
    import gc
    import weakref

    classifier().save_pretrained(tmp_path)
    teacher = EnsembleTeacher([tmp_path, tmp_path], one_in_memory=True)
    alive, load = [], ModelTeacher.__init__

    def remembered(self, *args, **kwargs):
        load(self, *args, **kwargs)
        gc.collect()
        assert not any(model() is not None for model in alive), "the member before is still in memory"
        alive.append(weakref.ref(self.model))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelTeacher, "__init__", remembered)
        teacher(batch_of())
    gc.collect()
    assert len(alive) == 2 and not any(model() is not None for model in alive)


def test_columns_of_all_members_are_kept():
    """The trainer drops what nobody names: a member with its own view would read the student's."""
    teacher = EnsembleTeacher([ModelTeacher(classifier(), "first_"), ModelTeacher(classifier(), "second_")])
    assert {"first_input_ids", "second_input_ids"} <= set(teacher.columns)
    assert "example_id" not in teacher.columns
