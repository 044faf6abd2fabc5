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
