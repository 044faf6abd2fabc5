"""The README's "write your own" text, followed literally: one file, the contract, a training run."""

import importlib.util
import re
from pathlib import Path

from test_pains import classifier, labelled_rows, losses, our_trainer

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def blocks_of(heading: str) -> list[str]:
    section = README.split(heading, 1)[1].split("\n## ", 1)[0]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


def test_an_objective_written_as_the_readme_says_is_accepted_and_trains(tmp_path):
    """A README whose code does not run is the first thing a newcomer meets."""
    source, proof = blocks_of("### Write your own objective")
    (tmp_path / "confident_kd.py").write_text(source)
    spec = importlib.util.spec_from_file_location("confident_kd", tmp_path / "confident_kd.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    exec(proof, {"ConfidentKD": module.ConfidentKD})
    teacher = classifier(1)
    teacher.classifier.out_proj.weight.data *= 50
    trainer = our_trainer(tmp_path, teacher, module.ConfidentKD(alpha=1.0), max_steps=30)
    found = losses(trainer)
    assert found[-1] < 0.5 * found[0]


def test_the_trainer_block_runs(tmp_path, monkeypatch):
    """Names that moved since the README was written."""
    monkeypatch.chdir(tmp_path)
    classifier(1).save_pretrained("teacher")
    block = blocks_of("## Distil a classifier")[0].replace("your/teacher", "teacher")
    block = block.replace("num_train_epochs=3", "num_train_epochs=1, use_cpu=True, report_to='none'")
    from hfkd.testing import tiny_tokenizer

    names = {"student": classifier(0), "rows": labelled_rows(), "tokenizer": tiny_tokenizer()}
    exec(block, names)
    assert names["trainer"].state.global_step == 4


def test_the_blocks_of_groups_and_reports_run(tmp_path, monkeypatch):
    """Names that moved, and a meta set that the trainer refuses."""
    monkeypatch.chdir(tmp_path)
    classifier(1).save_pretrained("teacher")
    from hfkd.diagnostics.gates import GateFailed
    from hfkd.testing import tiny_tokenizer

    rows = labelled_rows(64)
    names = {"small": classifier(0), "large": classifier(2), "tokenizer": tiny_tokenizer()}
    names |= {"rows": rows.select(range(32)), "held_out_rows": rows.select(range(32, 64))}
    (block,) = blocks_of("## Several students at once")
    block = block.replace("num_train_epochs=30", "num_train_epochs=1, use_cpu=True, report_to='none'")
    exec(block.replace("your/teacher", "teacher"), names)
    assert names["trainer"].state.global_step == 4
    (block,) = blocks_of("## What does the student do like its teacher?")
    names |= {"student": names["trainer"].model["small"], "teacher": classifier(1)}
    try:
        exec(block, names)
    except GateFailed as failed:
        assert "agreement" in str(failed)
    assert 0 <= names["found"].agreement <= 1
