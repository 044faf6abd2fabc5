"""Switch: at both ends it is one of its objectives to the last bit, and the number of optimizer steps alone moves it."""

from __future__ import annotations

import functools
import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hfkd
import launching
from hfkd import DistillationArguments
from hfkd.objectives import (
    KD,
    AdaAlpha,
    CrossEntropy,
    GroupDRO,
    HiddenStates,
    MiniLMRelations,
    PseudoLabel,
    RelationalKD,
    SelfDistill,
    Switch,
)
from hfkd.outputs import Progress
from hfkd.testing import check_objective, classification_case, hidden_case, regression_case, token_case
from hfkd.trainers.arguments import parse_arguments
from switch_run import STEPS, SWITCHES, prefixed, switch_trainer

HERE = Path(__file__).parent
EVERYTHING = torch.arange(8)
LINE = '{"first": {"kd": {"alpha": 1, "temperature": 4}}, "second": "cross_entropy", "start": 40, "window": 10}'


def score(objective, case, step, max_steps=0):
    return objective(case.student, case.teacher, case.batch, Progress(step=step, max_steps=max_steps))


def assert_same(found, expected, tolerance=0.0):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


# ---- values ----


@pytest.mark.parametrize("window", [0, 1, 7])
def test_it_is_the_first_before_and_the_second_after(window):
    """A baseline inside of a switch that is not the baseline makes both directions incomparable with it."""
    case = classification_case(EVERYTHING)
    first, second = KD(4.0, 0.7), CrossEntropy(0.1)
    switch = Switch(first, second, start=5, window=window)
    progress = Progress()
    alone = {"first": first(case.student, case.teacher, case.batch, progress)}
    alone["second"] = second(case.student, case.teacher, case.batch, progress)
    for step, place in [(0, "first"), (4, "first"), (5 + window, "second"), (10**6, "second")]:
        terms = score(switch, case, step)
        for name, values in alone[place].items():
            assert torch.equal(terms[f"{place}_{name}"], values)
        others = [values for name, values in terms.items() if not name.startswith(place)]
        assert others and all(bool((values == 0).all()) for values in others)


@given(st.integers(0, 50), st.integers(1, 40), st.integers(0, 120))
def test_in_between_it_is_the_weighted_sum(start, window, step):
    """A ramp that jumps, or that sums to more than 1, is a change of the learning rate in disguise."""
    weight = 0.0 if step < start else 1.0 if step > start + window else (step - start) / window
    case = classification_case(EVERYTHING)
    ours, theirs = case.student.logits.tolist(), case.teacher.logits.tolist()
    terms = score(Switch(KD(1.0, 1.0), CrossEntropy(), start, window), case, step)
    for row, label in enumerate(case.batch["labels"].tolist()):
        p, q = (torch.tensor(side[row], dtype=torch.float64).softmax(0).tolist() for side in (theirs, ours))
        divergence = sum(a * (torch.tensor(a).log() - torch.tensor(b).log()).item() for a, b in zip(p, q, strict=True))
        assert terms["first_distill_loss"][row].item() == pytest.approx((1 - weight) * divergence, abs=1e-5)
        entropy = -torch.tensor(q[label], dtype=torch.float64).log().item()
        assert terms["second_task_loss"][row].item() == pytest.approx(weight * entropy, abs=1e-12)


@pytest.mark.parametrize("step", [1, 3, 6])
@pytest.mark.parametrize("turned", [False, True])
def test_it_keeps_the_contract(step, turned, monkeypatch):
    """Terms that are reduced, miscounted or leak a gradient to the teacher break training for both objectives at once."""
    monkeypatch.setattr("hfkd.testing.Progress", lambda **given: Progress(step=step, max_steps=10))
    pair = (CrossEntropy(), KD(2.0, 0.5)) if turned else (KD(2.0, 0.5), CrossEntropy())
    zero = {"expected_zero": f"{'second' if turned else 'first'}_distill_loss"}
    check_objective(Switch(*pair, start=1, window=5), **zero)
    check_objective(Switch(*pair, start=1, window=5), regression_case, **zero)
    check_objective(Switch(*pair, start=1, window=5), placed(token_case), **zero)
    inside = (HiddenStates(), KD()) if turned else (MiniLMRelations(), HiddenStates())
    check_objective(Switch(*inside, start=1, window=5), hidden_case, expected_zero="first_distill_loss")
    wider = functools.partial(hidden_case, teacher_width=12)
    check_objective(Switch(HiddenStates(), KD(), start=1, window=5), wider)


def placed(case_of):
    """The same case, its units under the names that a switch gives the terms."""

    def built(rows, **settings):
        case = case_of(rows, **settings)
        return replace(case, unit_rows={f"{p}_{n}": u for p in ("first", "second") for n, u in case.unit_rows.items()})

    return built


def test_each_term_keeps_its_own_units():
    """A value per example divided by the number of tokens, once the other objective counts tokens, shrinks with the texts."""
    case = hidden_case(EVERYTHING)
    tokens = token_case(EVERYTHING, tokens=7)
    batch = {**case.batch, **tokens.batch}
    counts = Switch(HiddenStates(), KD(), start=0).count(batch)
    labelled = int((tokens.batch["labels"] != -100).sum())
    assert int(counts["first_distill_loss"]) == 8 != labelled
    assert int(counts["second_distill_loss"]) == int(counts["first_task_loss"]) == int(counts["task_loss"]) == labelled


def test_needs_and_columns_are_unions():
    """What only the second objective reads is dropped from the batch, and missing when its turn comes."""
    switch = Switch(CrossEntropy(), HiddenStates(), start=0)
    assert switch.needs == {"teacher", "hidden_states"} and switch.token_by_token and not switch.batch_coupled
    assert switch.columns == ("labels", "attention_mask")
    assert Switch(RelationalKD(), KD(), start=0).batch_coupled
    assert Switch(CrossEntropy(), CrossEntropy(0.1), start=0).needs == frozenset()
    assert Switch(PseudoLabel(), CrossEntropy(), start=0).needs == PseudoLabel().needs


def test_settings_tell_two_switches_apart():
    """A resumed study takes a run at temperature 1 for one at temperature 4 where its record shows neither."""
    found = Switch(KD(4.0, 1.0), CrossEntropy(), start=3).settings()
    assert found["first"]["KD"]["temperature"] == 4.0 and found["second"] == {"CrossEntropy": {"label_smoothing": 0.0}}
    assert (found["start"], found["window"]) == (3, 1000), "the paper's window is the default"
    assert json.loads(json.dumps(found)) == found


# ---- command line ----


def test_the_command_line_names_both(tmp_path):
    """An objective that can only be built in Python cannot be run from the paper's YAML."""
    words = ["--output_dir", str(tmp_path), "--objective", "switch", "--objective_kwargs", LINE]
    (args,) = parse_arguments(DistillationArguments, arguments=words)
    switch = args.make_objective("kd")
    assert isinstance(switch, hfkd.Switch) and isinstance(switch.first, KD) and isinstance(switch.second, CrossEntropy)
    assert (switch.first.alpha, switch.first.temperature, switch.start, switch.window) == (1, 4, 40, 10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"first": "kdd"}, "first objective 'kdd' is unknown; .*cross_entropy"),
        ({"first": None}, "first objective None is unknown"),
        ({"second": {"kd": {"temprature": 4}}}, "second objective, kd, takes temperature, .*temprature"),
        ({"second": {"kd": 4}}, "second objective, kd, takes temperature"),
        ({"first": {"kd": {}, "dkd": {}}}, "one objective with its settings"),
        ({"start": None}, "start is a whole number of optimizer steps.*None"),
        ({"start": 0.5}, "start is a whole number of optimizer steps.*0.5"),
        ({"window": -1}, "window is a whole number.*-1"),
        ({"first": AdaAlpha()}, "AdaAlpha, learns alpha_, .*train with it alone"),
        ({"second": GroupDRO()}, "GroupDRO, learns group_weights_"),
    ],
)
def test_wrong_settings_end_in_a_sentence(changes, message):
    """A misspelt setting that is ignored trains hours of another method."""
    with pytest.raises(ValueError, match=message):
        Switch(**{"first": "kd", "second": "cross_entropy", "start": 1, **changes})


def test_two_projections_are_refused():
    """The second one's would be applied to neither, or saved over the first one's."""
    case = hidden_case(EVERYTHING, teacher_width=12)
    switch = Switch(HiddenStates(), HiddenStates(loss="cosine"), start=0)
    with pytest.raises(ValueError, match=r"both train a projection.*one of them"):
        switch.build(case.student_config, case.teacher_config, None)


# ---- training ----


@pytest.mark.parametrize(("start", "window"), [(0, 1000), (4, 3), (6, 0), (5, 1)])
def test_a_window_longer_than_training_stops_before_the_first_step(tmp_path, start, window):
    """The run ends half-way between two objectives, and is reported as the switch."""
    objective = Switch(KD(), CrossEntropy(), start=start, window=window)
    trainer = switch_trainer(tmp_path, {}, "kd_to_labels", objective)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"ends at step {start + window:,}, but training has {STEPS} steps"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert_same(trainer.model.state_dict(), before)


def test_a_window_that_fits_is_trained(tmp_path):
    """A check that is too strict forbids fading over the whole of training, or a switch for the last step alone."""
    for start, window in ((0, STEPS), (STEPS - 1, 0), (STEPS - 2, 2)):
        Switch(KD(), CrossEntropy(), start, window).refuse_beyond(STEPS)
    with pytest.raises(ValueError, match="pass progress"):
        case = classification_case(EVERYTHING)
        Switch(KD(), CrossEntropy(), 0, 1)(case.student, case.teacher, case.batch)


@pytest.mark.parametrize(("start", "window", "place"), [(40, 10, 0), (0, 0, 1)])
def test_a_student_of_one_part_is_that_objectives(tmp_path, start, window, place):
    """The other objective, at weight 0, must not leave a trace: not in momentum, clipping or dropout's draws."""
    pair, settings = (KD(3.0, 0.7), CrossEntropy()), {"max_steps": 5, "weight_decay": 0.1}
    switched = switch_trainer(tmp_path / "a", settings, "kd_to_labels", Switch(*pair, start, window))
    switched.objective.refuse_beyond = lambda max_steps: None
    alone = switch_trainer(tmp_path / "b", settings, "kd_to_labels", pair[place])
    switched.train(), alone.train()
    assert_same(switched.model.state_dict(), alone.model.state_dict())


def test_the_log_shows_the_fade_and_sums_to_the_loss(tmp_path):
    """Terms that do not add up send people looking for the wrong bug in their curves."""
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "eval_teacher": True}
    trainer = switch_trainer(tmp_path, settings, "kd_to_labels")
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == STEPS
    for step, entry in enumerate(entries):
        first, second = entry["first_distill_loss"], entry["second_task_loss"]
        assert first + second == pytest.approx(entry["loss"], rel=1e-5)
        assert (first == 0) == (step >= 4) and (second == 0) == (step <= 1)
    metrics = trainer.evaluate(trainer.train_dataset)
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_second_task_loss"]), "trained to its end: labels alone"


@pytest.mark.parametrize("step", [0, 5, 8, 12, 15, 99])
def test_its_schedule_is_what_the_terms_are_weighted_by(step):
    """A drawn window that lies beside the one that was trained sends people to the wrong step."""
    case, both = classification_case(EVERYTHING), (KD(3.0, 0.8), KD(1.0, 0.2))
    found = Switch(*both, start=5, window=10).schedule(Progress(step=step))
    terms = score(Switch(*both, start=5, window=10), case, step)
    whole = {f"{place}_{name}": values for place, objective in zip(("first", "second"), both, strict=True)
             for name, values in objective(case.student, case.teacher, case.batch).items()}  # fmt: skip
    share = {name: float((terms[name].sum() / whole[name].sum()).detach()) for name in terms}
    for name, values in share.items():
        expected = found["switch_weight"] if name.startswith("second_") else 1 - found["switch_weight"]
        assert values == pytest.approx(expected, abs=1e-6)
    both = 0.8 * share["first_distill_loss"] + 0.2 * share["second_distill_loss"]
    assert found["alpha"] == pytest.approx(both, abs=1e-6)


def test_its_schedule_falls_to_zero_where_the_labels_take_over():
    """Cross-entropy distils nothing; an objective whose weights are no single number must not be drawn as if it had one."""
    switch = Switch(KD(3.0, 0.8), CrossEntropy(), start=5, window=10)
    found = [switch.schedule(Progress(step=step)) for step in (0, 10, 15)]
    assert [one["alpha"] for one in found] == pytest.approx([0.8, 0.4, 0.0])
    hidden = Switch(SelfDistill(), CrossEntropy(), start=5, window=10).schedule(Progress(step=10))
    assert hidden == {"switch_weight": 0.5}


@pytest.mark.parametrize("which", sorted(set(SWITCHES) - {"long"}))
def test_accumulation_changes_nothing(tmp_path, which):
    """A window counted in micro-batches ends four times too early."""
    whole = switch_trainer(tmp_path / "8x1", {}, which)
    parts = switch_trainer(
        tmp_path / "2x4", {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}, which
    )
    whole.train(), parts.train()
    assert_same(parts.model.state_dict(), whole.model.state_dict(), 1e-9)
    assert_same(parts.objective.state_dict(), whole.objective.state_dict(), 1e-9)
    assert all(name.startswith("attached.") for name in whole.objective.state_dict()), "one tensor of two names"


@pytest.mark.launch
def test_a_killed_run_goes_on_inside_its_window(tmp_path):
    """A ramp that starts anew on resume gives the first objective twice its share; a lost projection starts from noise."""
    settings = {"max_steps": 40, "save_strategy": "steps", "save_steps": 4, "save_total_limit": 2}
    words = [str(tmp_path / "killed"), json.dumps(settings), "long"]
    (process,) = launching.started(HERE / "switch_run.py", *words, log=tmp_path / "log")
    deadline = time.monotonic() + 120
    whole = lambda: list((tmp_path / "killed").glob("checkpoint-*/whole.json"))  # noqa: E731
    while not whole() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    process.join()
    assert whole() and not (tmp_path / "killed" / "checkpoint-40").exists()

    resumed = switch_trainer(tmp_path / "killed", settings, "long")
    resumed.train(resume_from_checkpoint=True)
    never = switch_trainer(tmp_path / "never", settings, "long")
    never.train()
    assert_same(resumed.model.state_dict(), never.model.state_dict(), 1e-10)
    assert_same(resumed.objective.state_dict(), never.objective.state_dict(), 1e-10)
    assert list(never.objective.state_dict()) and all(n.startswith("attached.") for n in never.objective.state_dict())


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    output = tmp_path_factory.mktemp("two")
    done = launching.run(HERE / "switch_run.py", str(output), log=output / "log", processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(output / f"rank-{rank}.pt") for rank in (0, 1)]


@pytest.mark.launch
@pytest.mark.parametrize("which", sorted(set(SWITCHES) - {"long"}))
def test_two_processes_equal_one(ranks, which, tmp_path):
    """Processes that disagree about the step train two losses; a head without a gradient makes DDP wait for ever."""
    assert [rank["world_size"] for rank in ranks] == [2, 2]
    alone = switch_trainer(tmp_path, {}, which)
    alone.train()
    expected = {**alone.model.state_dict(), **prefixed(alone.objective)}
    assert_same(ranks[0][which], ranks[1][which])
    assert_same(ranks[0][which], expected, 1e-9)
