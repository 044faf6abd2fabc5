"""What the page on scaling out promises, as far as a machine without an accelerator can show it.

Jobs that need packages beyond the development ones are switched on by an environment variable that names their Python:
HFKD_DEEPSPEED_PYTHON=/path/to/venv/bin/python, HFKD_XLA_PYTHON=/path/to/venv/bin/python (docs/scaling.md).
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

import launching
import scaling_run

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "recipes" / "accelerate_configs"
KINDS = {
    "cpu": "MULTI_GPU",
    "ddp": "MULTI_GPU",
    "fsdp2": "FSDP",
    "deepspeed_zero2": "DEEPSPEED",
    "tpu": "XLA",
}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def launched(command: list[str], **environment: str) -> subprocess.CompletedProcess:
    values = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, cwd=ROOT, env=values, capture_output=True, text=True, timeout=500)


def accelerate_launch(config: str, *words: str, python: str = sys.executable, **environment: str) -> None:
    """`accelerate launch --config_file ... tests/scaling_run.py ...`, on a free port."""
    port = ["--main_process_port", str(free_port())] if config != "tpu" else []
    command = [python, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{config}.yaml"), *port]
    done = launched([*command, "tests/scaling_run.py", *words], **environment)
    assert done.returncode == 0, done.stderr[-3000:]


def found_in(folder: Path, which: str = "kd") -> dict:
    return json.loads((folder / "found.json").read_text())[which]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same training in this process."""
    output = tmp_path_factory.mktemp("alone")
    return output, {which: scaling_run.found(scaling_run.distil(output, which)) for which in ("kd", "hidden")}


def assert_same_run(found: dict, expected: dict, within: float = 1e-5) -> None:
    assert found["losses"] == pytest.approx(expected["losses"], rel=within)
    assert found["norms"] == pytest.approx(expected["norms"], rel=10 * within)


def assert_same_student(folder: Path, expected: Path) -> None:
    """Files of a plain student: the same names, and logits that agree."""
    ours, theirs = (load_file(place / "model.safetensors") for place in (folder, expected))
    assert ours.keys() == theirs.keys()
    words = {"input_ids": torch.tensor([[0, 5, 6, 7, 2]])}
    answers = [
        AutoModelForSequenceClassification.from_pretrained(place)(**words).logits for place in (folder, expected)
    ]
    torch.testing.assert_close(*answers, rtol=0, atol=1e-4)


# ---- the files ----


def test_every_config_has_a_row_here():
    """A configuration that nobody parses is one that nobody can launch."""
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_accelerate_reads_every_config(name):
    """A field that accelerate renamed stops the launch on the cluster, after the wait in the queue."""
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert config.distributed_type.name == KINDS[name]
    assert config.num_processes > 1 and config.main_training_function == "main"
    assert config.downcast_bf16 in (True, False), "accelerate takes 'no' for true"


def test_the_settings_of_deepspeed_are_beside_their_config():
    """A path that leads nowhere is found out by every process at once."""
    from accelerate.commands.config.config_args import load_config_from_file

    named = load_config_from_file(str(CONFIGS / "deepspeed_zero2.yaml")).deepspeed_config["deepspeed_config_file"]
    settings = json.loads((ROOT / named).read_text())
    assert settings["zero_optimization"]["stage"] == 2
    # Fixed here, they would disagree with the arguments of the Trainer, which stops
    assert settings["train_micro_batch_size_per_gpu"] == settings["gradient_accumulation_steps"] == "auto"


@pytest.mark.parametrize("name", KINDS)
def test_every_launch_line_names_files_that_exist(name):
    """The first lines of a configuration are what people copy."""
    lines = [line for line in (CONFIGS / f"{name}.yaml").read_text().splitlines() if "accelerate launch" in line]
    assert lines
    for word in lines[0].split():
        if "/" in word:
            assert (ROOT / word).is_file(), word


# ---- launches ----


@pytest.mark.launch
def test_ddp_by_its_config_equals_one_process(alone, tmp_path):
    """`accelerate launch --cpu` starts one process and says nothing: half the batch, twice the bill."""
    accelerate_launch("ddp", str(tmp_path))
    found, (folder, expected) = found_in(tmp_path), alone
    assert found["world_size"] == 2 and found["distributed"].endswith("MULTI_CPU")
    assert_same_run(found, expected["kd"])
    assert_same_student(tmp_path / "kd" / "student", folder / "kd" / "student")


@pytest.mark.launch
def test_fsdp2_equals_one_process(alone, tmp_path):
    """An optimizer that holds unsharded copies moves nothing: the loss stays where it began, and the run ends well."""
    scaling_run.classifier(0).save_pretrained(tmp_path / "start")
    words = (str(tmp_path), "--fsdp", "--runs", "kd", "hidden")
    done = launching.run(ROOT / "tests" / "scaling_run.py", *words, log=tmp_path / "log", processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    folder, expected = alone
    for which in ("kd", "hidden"):
        found = found_in(tmp_path, which)
        assert found["world_size"] == 2 and found["parameter"] == "DTensor"
        assert_same_run(found, expected[which])
        assert_same_student(tmp_path / which / "student", folder / which / "student")


def python_of(variable: str, what: str) -> str:
    if variable not in os.environ:
        pytest.skip(f"opt-in: {variable}=/path/to/python of an environment with hfkd and {what}")
    return os.environ[variable]


@pytest.mark.launch
@pytest.mark.parametrize("accumulation", [1, 2])
def test_zero_2_equals_one_process(alone, tmp_path, accumulation):
    """DeepSpeed divides by accumulation steps by itself, unless it is told not to: half the gradient."""
    python = python_of("HFKD_DEEPSPEED_PYTHON", "deepspeed")
    path = os.pathsep.join([str(Path(python).parent), os.environ["PATH"]])  # deepspeed starts ninja by name
    words = (str(tmp_path), "--accumulation", str(accumulation))
    accelerate_launch("deepspeed_zero2", *words, python=python, DS_ACCELERATOR="cpu", PATH=path)
    found, (folder, expected) = found_in(tmp_path), alone
    assert found["world_size"] == 2 and found["distributed"].endswith("DEEPSPEED")
    assert_same_run(found, expected["kd"])
    assert_same_student(tmp_path / "kd" / "student", folder / "kd" / "student")


@pytest.mark.launch
def test_one_xla_device_equals_the_cpu(alone, tmp_path):
    """Lazy tensors that are read back in the middle of a step make it slow; kernels without a rule make it wrong."""
    python = python_of("HFKD_XLA_PYTHON", "torch_xla")
    done = launched([python, "tests/scaling_run.py", str(tmp_path)], PJRT_DEVICE="CPU")
    assert done.returncode == 0, done.stderr[-3000:]
    found, (folder, expected) = found_in(tmp_path), alone
    assert found["device"].startswith("xla")
    assert_same_run(found, expected["kd"], within=1e-4)
    assert_same_student(tmp_path / "kd" / "student", folder / "kd" / "student")
