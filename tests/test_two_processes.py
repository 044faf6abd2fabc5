"""Process parity, from one launch of two processes with gloo."""

from pathlib import Path

import pytest
import torch

import launching
from rounds_run import DISTILLED, classifier_trainer, distilled_trainer, rounds_trainer

pytestmark = pytest.mark.launch
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    output = tmp_path_factory.mktemp("two")
    done = launching.run(HERE / "two_processes.py", str(output), log=output / "log", processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(output / f"rank-{rank}.pt") for rank in (0, 1)]


def assert_close(found, expected):
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=0, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_two_processes_really_train_together(ranks):
    """A launch that silently runs two independent trainings doubles the bill and halves the batch."""
    assert [rank["world_size"] for rank in ranks] == [2, 2]
    assert not torch.equal(ranks[0]["first_ids"], ranks[1]["first_ids"])


@pytest.mark.parametrize("run", ["rounds", "accumulated", "ablation", "sequence", "token", *DISTILLED])
def test_parameters_are_equal_on_both_ranks(ranks, run):
    """Unsynchronised gradients let the ranks drift apart, and rank 0's drift is what gets saved."""
    for name, tensor in ranks[0][run].items():
        assert torch.equal(tensor, ranks[1][run][name]), name


@pytest.mark.parametrize("run", ["rounds", "accumulated"])
def test_rounds_equal_one_process(ranks, run, tmp_path):
    """A mean of the processes' means weights a masked token by how few its neighbours on that process are."""
    alone = rounds_trainer(tmp_path / "one", {}, double=True)
    alone.train()
    assert_close(ranks[0][run], alone.model.state_dict())


def test_ablation_without_masked_loss_equals_one_process(ranks, tmp_path):
    """The head gets no gradient there: DDP waits for it for ever, or stops, unless it is told."""
    alone = rounds_trainer(tmp_path / "one", {"num_rounds": 1, "no_pretrain_loss": True}, double=True)
    alone.train()
    assert_close(ranks[0]["ablation"], alone.model.state_dict())


@pytest.mark.parametrize("head", ["sequence", "token"])
def test_classifiers_equal_one_process(ranks, head, tmp_path):
    """The stock Trainer scores these heads wrongly by the number of processes (transformers#47688)."""
    alone = classifier_trainer(tmp_path / "one", {}, head=head)
    alone.train()
    assert_close(ranks[0][head], alone.model.state_dict())


@pytest.mark.parametrize("which", DISTILLED)
def test_distillation_equals_one_process(ranks, which, tmp_path):
    """A teacher asked, a projection trained or a term divided by process is another objective for every cluster size."""
    alone = distilled_trainer(tmp_path / "one", {"eval_teacher": True}, which)
    alone.train()
    assert_close(ranks[0][which], alone.model.state_dict())
    assert_close(ranks[0][which], {f"objective.{name}": t for name, t in alone.objective.state_dict().items()})
    metrics = alone.evaluate(alone.train_dataset)
    names = {"eval_loss", "eval_distill_loss", *(["eval_agreement"] if which in ("kd", "kd_token", "adapter") else [])}
    for name in names:
        assert ranks[0][f"{which} evaluated"][name] == pytest.approx(metrics[name], rel=1e-6)
        assert ranks[1][f"{which} evaluated"][name] == pytest.approx(metrics[name], rel=1e-6)


def test_logged_terms_are_those_of_all_processes(ranks, tmp_path):
    """A log of rank 0's terms alone would not sum to the logged loss, which is averaged over processes."""
    for entry in ranks[0]["logs"]:
        terms = [value for name, value in entry.items() if name.endswith("_loss")]
        assert sum(terms) == pytest.approx(entry["loss"], rel=1e-5)


def test_evaluating_before_training_is_refused(ranks):
    """evaluate() first leaves the model unwrapped, and every rank then trains alone."""
    assert "eval_on_start" in ranks[0]["evaluate_first"]
