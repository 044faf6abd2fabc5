"""Tests run on one thread, without a network, and draw the same examples every time."""

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # hard: a test that reaches the Hub passes here and fails elsewhere
for name, value in {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_MODE": "offline",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}.items():
    os.environ.setdefault(name, value)

import hypothesis
import pytest
import torch

torch.set_num_threads(1)
hypothesis.settings.register_profile("hfkd", deadline=None, derandomize=True, max_examples=25)
hypothesis.settings.load_profile("hfkd")


@pytest.fixture(autouse=True, scope="module")
def what_is_imported_is_not_searched_for_garbage():
    """The Trainer collects garbage after every run: over all that is imported, that is half of a tiny run's time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def quiet_transformers():
    from transformers.utils import logging

    logging.disable_progress_bar()


@pytest.fixture
def hub(tmp_path):
    """A Hub of its own for each test; `with hub.connected():` makes this process use it."""
    from hfkd.hub_server import HubServer

    with HubServer(tmp_path / "hub") as server:
        yield server
