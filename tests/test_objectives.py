"""The contract of an objective: ours keep it, and `check_objective` catches those that do not."""

from __future__ import annotations

import functools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.loss.loss_utils import ForSequenceClassificationLoss

from hfkd.functional import cross_entropy, squared_distance
from hfkd.objectives import KD, OBJECTIVES, CrossEntropy, HiddenStates, MaskedLM, Objective, SelfDistill
from hfkd.outputs import Progress, TeacherOutput
from hfkd.testing import (
    check_objective,
    classification_case,
    hidden_case,
    masked_image_case,
    multi_label_case,
    regression_case,
    token_case,
    two_head_case,
    two_view_case,
)

INSIDE = ("attention_maps", "hidden_states", "minilm_relations", "relational_kd")
CASE_OF = {
    **dict.fromkeys(("masked_lm", "self_distill"), two_view_case),
    **dict.fromkeys(INSIDE, hidden_case),
    "deit_token": two_head_case,
    **dict.fromkeys(("masked_images", "self_distill_images"), masked_image_case),
}
# Confidence, or a margin, is left to learn; a switch names its terms otherwise (tests/test_objective_switch.py)
NEVER_ZERO = {"pseudo_label", "deit_token", "ada_margin", "balanced_student", "switch"}
HEADS = {
    "single_label_classification": classification_case,
    "multi_label_classification": multi_label_case,
    "regression": regression_case,
}

# ---- ours keep the contract ----


def made(name):
    """With its defaults; when to switch has none."""
    given = {"first": "kd", "second": "cross_entropy", "start": 0, "window": 4}
    return OBJECTIVES[name](**given if name == "switch" else {})


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_of_the_command_line_keeps_the_contract(name):
    """An objective that the command line offers but nobody checks trains a wrong student without a word."""
    check_objective(made(name), CASE_OF.get(name, classification_case), zero_at_teacher=name not in NEVER_ZERO)


@pytest.mark.parametrize(
    "name", sorted(set(OBJECTIVES) - {"masked_lm", "self_distill", "masked_images", "self_distill_images"})
)
def test_every_objective_scores_the_heads_it_names_and_refuses_the_others(name):
    """A head outside of what a loss is defined for would train on numbers that mean nothing."""
    for problem_type, head in HEADS.items():
        case_of = functools.partial(inside_case, head) if name in INSIDE else CASE_OF.get(name, head)
        if problem_type in OBJECTIVES[name].problem_types:
            check_objective(made(name), case_of, zero_at_teacher=name not in NEVER_ZERO)
        else:
            with pytest.raises(ValueError, match=problem_type):
                made(name).build(None, None, problem_type)


def inside_case(head, rows, **settings):
    """The inside of a model under another head."""
    inside, outside = hidden_case(rows, **settings), head(rows, **settings)
    inside.student["logits"] = outside.student.logits
    configs = {"student_config": inside.student_config, "teacher_config": inside.teacher_config}
    teacher = replace(inside.teacher, logits=outside.teacher.logits)
    batch = {**inside.batch, **outside.batch}
    return replace(outside, student=inside.student, teacher=teacher, batch=batch, **configs)


TOKEN_HEADS = ["cross_entropy", "kd", "dkd", "dist", "logit_mse", "generalized_jsd"]
TOKEN_HEADS += ["ada_alpha", "ada_margin", "balanced_student", "group_dro"]


@pytest.mark.parametrize("name", TOKEN_HEADS)
def test_logit_objectives_score_labelled_tokens(name):
    """A value on unlabelled tokens, or a mean within a row, weights words by how long their sentence is."""
    check_objective(OBJECTIVES[name](), token_case, zero_at_teacher=name not in NEVER_ZERO)


@pytest.mark.parametrize("name", INSIDE)
def test_feature_objectives_have_one_value_an_example_under_token_heads(name):
    """Divided by the number of labelled tokens, a value per example would shrink with the length of the texts."""
    check_objective(OBJECTIVES[name](), functools.partial(inside_token_case))


def inside_token_case(rows, **settings):
    case = inside_case(functools.partial(token_case, tokens=7), rows, **settings)
    return replace(case, unit_rows={"task_loss:tokens": case.unit_rows["task_loss:tokens"]})


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_keeps_the_contract(smoothing):
    """A baseline that breaks the parity laws makes every comparison with it unfair."""
    check_objective(CrossEntropy(smoothing))


def test_masked_lm_keeps_the_contract():
    """Round 0 is both the baseline and the first teacher, so a fault there is in every later round."""
    check_objective(MaskedLM(), two_view_case)


@pytest.mark.parametrize("pretrain_loss", [True, False])
@pytest.mark.parametrize("feature", ["cls", "mean", "tokens"])
def test_self_distill_keeps_the_contract(feature, pretrain_loss):
    """A feature that mixes rows or trains the teacher would still lower the loss."""
    check_objective(SelfDistill(feature, pretrain_loss), two_view_case)


# ---- objectives that break it, one damage each ----


class Sound(Objective):
    """What every broken one below is, apart from its damage."""

    needs = frozenset({"teacher"})

    def __init__(self, weight: float = 2.0):
        super().__init__()
        self.weight = weight

    def values(self, student, teacher, batch):
        return squared_distance(student, teacher.detach())

    def forward(self, student, teacher, batch, progress=None):
        return {"distill_loss": self.weight * self.values(student.logits, teacher.logits, batch)}


class Reduces(Sound):
    def values(self, student, teacher, batch):
        return super().values(student, teacher, batch).mean()


class ReducesInDisguise(Sound):
    def values(self, student, teacher, batch):
        return super().values(student, teacher, batch).mean().expand(len(student))


class NamesNoLoss(Sound):
    def forward(self, student, teacher, batch, progress=None):
        return {"distillation": self.values(student.logits, teacher.logits, batch)}


class Coupled(Sound):
    def values(self, student, teacher, batch):
        return squared_distance(student - student.mean(0), (teacher - teacher.mean(0)).detach())


class DeclaresCoupling(Sound):
    batch_coupled = True


class TrainsTheTeacher(Sound):
    def values(self, student, teacher, batch):
        return squared_distance(student, teacher)


class TrainsNobody(Sound):
    def values(self, student, teacher, batch):
        return squared_distance(student.detach(), teacher.detach())


class ReadsInSecret(Sound):
    columns = ()

    def values(self, student, teacher, batch):
        return super().values(student, teacher, batch) * (batch["labels"] >= 0)


class ReadsInSecretIfThere(Sound):
    columns = ()

    def values(self, student, teacher, batch):
        values = super().values(student, teacher, batch)
        return values * batch["labels"] if "labels" in batch else values


class ForgetsItsWeight(Sound):
    def __init__(self, weight: float = 2.0, margin: float = 0.5):
        super().__init__(weight)
        self.chosen_margin = margin


class ScoresInBfloat16(Sound):
    def values(self, student, teacher, batch):
        return (student - teacher.detach()).square().sum(-1)


class CountsWrongly(Sound):
    def count(self, batch):
        return {"distill_loss": torch.tensor(1)}


class CountsNothing(Sound):
    def count(self, batch):
        return {"task_loss": torch.tensor(8)}


class Overflows(Sound):
    def values(self, student, teacher, batch):
        return squared_distance(student.exp(), teacher.detach().exp())


class NeverSatisfied(Sound):
    def values(self, student, teacher, batch):
        return super().values(student, teacher, batch) + student.square().sum(-1)


class Draws(Sound):
    def values(self, student, teacher, batch):
        return super().values(student, teacher, batch) * torch.rand(len(student), dtype=student.dtype)


class ScoresNothing(Sound):
    def forward(self, student, teacher, batch, progress=None):
        return {}


BROKEN = {
    Reduces: "do not reduce",
    ReducesInDisguise: "half of the batch",
    NamesNoLoss: "must end in '_loss'",
    Coupled: "half of the batch",
    DeclaresCoupling: "batch_coupled is True, but",
    TrainsTheTeacher: "a gradient reaches the teacher",
    TrainsNobody: "no gradient reaches the student",
    ReadsInSecret: "columns",
    ReadsInSecretIfThere: "columns",
    ForgetsItsWeight: "'margin'",
    ScoresInBfloat16: "computed in torch.bfloat16",
    CountsWrongly: "count.. says 1",
    CountsNothing: "no entry for distill_loss",
    Overflows: "not finite",
    NeverSatisfied: "not 0 for a student equal to its teacher",
    Draws: "two calls",
    ScoresNothing: "no terms",
}


def test_the_sound_objective_is_accepted():
    """Without this, each rejection below could have another reason than its damage."""
    check_objective(Sound())


@pytest.mark.parametrize("kind", BROKEN, ids=lambda kind: kind.__name__)
def test_broken_objectives_are_rejected(kind):
    """A newcomer's objective with this fault trains without an error, and its numbers end up in a paper."""
    with pytest.raises(AssertionError, match=BROKEN[kind]):
        check_objective(kind())


def test_declared_coupling_is_accepted():
    """Relational losses are coupled by definition: refusing them would shut out a family of methods."""

    class Declared(Coupled):
        batch_coupled = True

    check_objective(Declared())


def test_methods_that_never_stop_learning_can_opt_out():
    """A method without a zero at its teacher could otherwise never use the check, and would skip the rest of it."""
    check_objective(NeverSatisfied(), zero_at_teacher=False)


def test_loss_on_padding_is_rejected():
    """Tokens of padding in the sum make the loss depend on what a row was batched with."""

    class Padded(SelfDistill):
        def forward(self, student, teacher, batch, progress=None):
            return {"distill_loss": squared_distance(student.features, teacher.features.detach())}

    with pytest.raises(AssertionError, match="padding must contribute 0"):
        check_objective(Padded("tokens", pretrain_loss=False), two_view_case)


class TrainsTheTeachersQueries(Sound):
    needs = frozenset({"teacher", "qkv"})

    def forward(self, student, teacher, batch, progress=None):
        return {"distill_loss": squared_distance(student.qkv[1][0].mean(1), teacher.qkv[1][0].mean(1))}


def test_a_gradient_into_nested_tuples_of_the_teacher_is_found():
    """Queries and keys lie two tuples deep: unseen there, an objective could train its teacher."""
    with pytest.raises(AssertionError, match="a gradient reaches the teacher"):
        check_objective(TrainsTheTeachersQueries(), hidden_case)


class CountsLabels(KD):
    def count(self, batch):
        return dict.fromkeys(("task_loss", "distill_loss"), (batch["labels"] != -100).sum())


@pytest.mark.parametrize("case_of", [multi_label_case, functools.partial(regression_case, outputs=3)])
def test_counting_labels_instead_of_examples_is_rejected(case_of):
    """A multi-label loss divided by examples times labels is num_labels times too small."""
    with pytest.raises(AssertionError, match="count.. says"):
        check_objective(CountsLabels(), case_of)


def test_what_an_objective_trains_runs_on_the_students_output():
    """Without it no objective with a projection could ever be checked."""
    objective = HiddenStates()
    check_objective(objective, functools.partial(hidden_case, teacher_width=12))
    assert objective.attached is not None


def test_cases_with_fewer_rows_are_rows_of_the_whole_case():
    """A case that redraws its rows would reject every sound objective, or accept a coupled one."""
    half = torch.tensor([1, 4])
    for case_of in (classification_case, multi_label_case, regression_case, token_case, hidden_case, two_head_case):
        whole, part = case_of(torch.arange(8)), case_of(half)
        assert torch.equal(whole.student.logits[half], part.student.logits)
        assert torch.equal(whole.teacher.logits[half], part.teacher.logits)
        assert all(torch.equal(whole.batch[name][half], part.batch[name]) for name in whole.batch)


# ---- SelfDistill by hand ----


def batch_by_hand() -> dict[str, torch.Tensor]:
    """Two rows of two tokens; the second token of the second row is padding. One masked token, one padded position."""
    return {
        "clean_input_ids": torch.tensor([[5, 6], [7, 1]]),
        "attention_mask": torch.tensor([[1, 1], [1, 0]]),
        "masked_positions": torch.tensor([1, 0]),
        "masked_labels": torch.tensor([2, -100]),
    }


def loss_of(objective: Objective, student, teacher, batch) -> dict[str, float]:
    """Each term's loss as the trainer takes it: sum over units, divided by their number."""
    terms, counts = objective(student, teacher, batch), objective.count(batch)
    return {name: (values.sum() / counts[name]).item() for name, values in terms.items()}


@pytest.mark.parametrize(
    ("feature", "expected"),
    [
        ("cls", ((1 + 4 + 4) + (0 + 0 + 1)) / 2),  # rows
        # row 0: ((1, 2, 2) + (3, 0, 0)) / 2 = (2, 1, 1); row 1 has one token
        ("mean", ((4 + 1 + 1) + (0 + 0 + 1)) / 2),
        ("tokens", ((1 + 4 + 4) + (9 + 0 + 0) + (0 + 0 + 1)) / 3),  # tokens that are not padding
    ],
)
def test_self_distill_equals_the_sum_by_hand(feature, expected):
    """A feature of the wrong token, a mean over hidden, or padding in the mean changes the method silently."""
    difference = torch.tensor([[[1.0, 2.0, 2.0], [3.0, 0.0, 0.0]], [[0.0, 0.0, 1.0], [50.0, 60.0, 70.0]]])
    answer = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(0))
    student = SimpleNamespace(features=answer + difference, logits=torch.zeros(2, 4))
    losses = loss_of(SelfDistill(feature), student, TeacherOutput(features=answer), batch_by_hand())
    assert losses["distill_loss"] == pytest.approx(expected, rel=1e-5)
    assert losses["pretrain_loss"] == pytest.approx(torch.log(torch.tensor(4.0)).item(), rel=1e-6)


def test_self_distill_carries_the_factor_hidden():
    """A mean over the hidden dimension makes the distillation loss 768 times too small beside the masked loss."""
    student = SimpleNamespace(features=torch.ones(2, 2, 768), logits=torch.zeros(2, 4))
    losses = loss_of(SelfDistill(), student, TeacherOutput(features=torch.zeros(2, 2, 768)), batch_by_hand())
    assert losses["distill_loss"] == 768


def test_pretrain_loss_can_be_left_out():
    """The ablation without the masked loss would otherwise measure the full method under another name."""
    objective = SelfDistill(pretrain_loss=False)
    assert not {"masked_positions", "masked_labels"} & set(objective.columns)
    features = torch.ones(2, 2, 3)
    terms = objective(
        SimpleNamespace(features=features, logits=None), TeacherOutput(features=features), batch_by_hand()
    )
    assert set(terms) == {"distill_loss"}


def test_masked_lm_ignores_padded_positions():
    """Padded positions point at the first token: scored, they would train it toward nothing."""
    logits = torch.randn(2, 4, generator=torch.Generator().manual_seed(1))
    terms = MaskedLM()(SimpleNamespace(logits=logits), None, batch_by_hand())
    assert terms["pretrain_loss"][1] == 0
    assert terms["pretrain_loss"][0] == cross_entropy(logits[:1], torch.tensor([2]))[0]
    assert MaskedLM().count(batch_by_hand())["pretrain_loss"] == 1


# ---- errors and settings ----


def test_unknown_feature_is_refused_at_once():
    """A mistyped feature found in the first step costs the queue time of a job."""
    with pytest.raises(ValueError, match=r"cls, mean, tokens.*'pooled'"):
        SelfDistill("pooled")


def test_widths_that_differ_are_refused_with_both_values():
    """Without both numbers nobody can tell which of the two models is the wrong one."""
    with pytest.raises(ValueError, match=r"(?s)student.* 16.*teacher.* 24"):
        SelfDistill().build(SimpleNamespace(hidden_size=16), SimpleNamespace(hidden_size=24), None)
    SelfDistill().build(SimpleNamespace(hidden_size=16), SimpleNamespace(hidden_size=16), None)


@pytest.mark.parametrize("teacher", [None, TeacherOutput(logits=torch.zeros(2, 4))])
def test_a_teacher_without_features_is_refused_with_advice(teacher):
    """Distilling from a classifier's logits by mistake must say what to pass, not fail inside torch."""
    student = SimpleNamespace(features=torch.ones(2, 2, 3), logits=torch.zeros(2, 4))
    with pytest.raises(ValueError, match="ModelTeacher"):
        SelfDistill()(student, teacher, batch_by_hand())


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, 1.5])
def test_label_smoothing_outside_its_range_is_refused(smoothing):
    """Negative smoothing rewards over-confidence, and 1 trains on nothing but the uniform distribution."""
    with pytest.raises(ValueError, match=str(smoothing)):
        CrossEntropy(smoothing)


@pytest.mark.parametrize("case_of", [*HEADS.values(), functools.partial(regression_case, outputs=3)])
def test_cross_entropy_is_the_loss_of_the_heads_of_transformers(case_of):
    """A silently wrong loss for multi-label and regression heads: no baseline would compare with a plain Trainer's."""
    case = case_of(torch.arange(8), dtype=torch.float32)
    outputs = case.student.logits.shape[-1]
    objective = CrossEntropy()
    objective.build(SimpleNamespace(num_labels=outputs), None, case.problem_type)
    found = loss_of(objective, case.student, None, case.batch)["task_loss"]
    config = SimpleNamespace(num_labels=outputs, problem_type=case.problem_type or "single_label_classification")
    expected = ForSequenceClassificationLoss(case.batch["labels"], case.student.logits, config)
    assert found == pytest.approx(expected.item(), rel=1e-6)


def test_an_unknown_problem_type_is_refused():
    """A misspelt problem_type would be scored as single-label."""
    with pytest.raises(ValueError, match=r"'multi_label'.*problem_type"):
        CrossEntropy().build(None, None, "multi_label")


@pytest.mark.parametrize("kind", [CrossEntropy, KD])
def test_one_class_and_smoothed_numbers_are_refused(kind):
    """Cross-entropy over one class is always 0: a regression head left as a classifier would learn nothing."""
    with pytest.raises(ValueError, match=r"1 label.*regression"):
        kind().build(SimpleNamespace(num_labels=1), None, None)
    kind().build(SimpleNamespace(num_labels=1), None, "regression")
    with pytest.raises(ValueError, match=r"label_smoothing=0.1.*regression"):
        kind(label_smoothing=0.1).build(SimpleNamespace(num_labels=1), None, "regression")


def test_settings_are_the_hyper_parameters():
    """A card that omits the feature or the ablation describes another run than the one it belongs to."""
    assert SelfDistill("tokens", False).settings() == {"feature": "tokens", "pretrain_loss": False}
    assert CrossEntropy(0.1).settings() == {"label_smoothing": 0.1}
    assert MaskedLM().settings() == {}
    assert all(isinstance(made(name), nn.Module) for name in OBJECTIVES)


def test_a_schedule_is_the_alpha_where_there_is_one():
    """A curve of alpha that is not the weight of the logged term explains the wrong run."""
    assert made("kd").schedule(Progress()) == {"alpha": made("kd").alpha}
    assert KD(alpha=1).schedule(Progress()) == {"alpha": 1.0}
    for name in OBJECTIVES:
        found = made(name).schedule(Progress(step=7, max_steps=2000))
        assert all(type(value) is float and not key.endswith("_loss") for key, value in found.items())
    assert CrossEntropy().schedule(Progress()) == MaskedLM().schedule(Progress()) == {}


def test_eval_loss_is_without_smoothing():
    """A smoothed eval loss does not compare with that of any other objective."""
    logits, labels = torch.tensor([[2.0, 0.0]]), torch.tensor([0])
    terms = CrossEntropy(0.5).task(SimpleNamespace(logits=logits), {"labels": labels})
    assert torch.equal(terms["task_loss"], cross_entropy(logits, labels))
