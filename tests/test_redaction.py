"""What a run's strings carry that must not be public, and what is no secret and must stay."""

import os

import pytest

from hfkd.redaction import REMOVED, redact, redacted

HOME, HERE = os.path.expanduser("~"), os.getcwd()
TOKEN, WANDB_KEY, COMMIT = "hf_" + "Ab1" * 8, "0a1b2c3d" * 5, "4b825dc6" * 5


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/data/sets/news.csv", "news.csv"),
        (f"{HOME}/x/y", "y"),
        (HERE, "."),
        ("/home/ann and /Users/ann", "~ and ~"),
        ("C:\\Users\\ann\\news.csv", "news.csv"),
        ("'/data/my sets/news.csv' --x", "'news.csv' --x"),
        ("PATH=/a/b:/c/d", "PATH=b:d"),
        ("wandb login " + WANDB_KEY, f"wandb login {REMOVED}"),
        ("https://ann:secret1@host/x", "https://host/x"),
    ],
)
def test_redact_keeps_the_last_component(text, expected):
    """Removing the whole path would leave a command that nobody can read."""
    assert redact(text) == expected


@pytest.mark.parametrize(
    "text",
    ["ann/news", "https://arxiv.org/abs/2210.02871", "</s>", "sum(x)/n, 1/2, a / b", f"--revision {COMMIT}",
     "../runs/x", "\\frac{1}{B}", "L = L_MLM + || f_student(x) - f_teacher(x) ||^2", "mask_token: <mask>", "ab" * 32]
)  # fmt: skip
def test_redact_leaves_what_is_no_path(text):
    """A repository id or an equation that loses its slashes is a wrong fact on the card."""
    assert redact(text) == text


def test_secrets_of_the_environment_and_secret_settings(monkeypatch):
    """Tokens change their shape over the years; the one in use is known exactly."""
    monkeypatch.setenv("HF_TOKEN", "oddly-shaped-token")
    assert redact("x oddly-shaped-token y") == f"x {REMOVED} y"
    clean = redacted({"hub_token": "abc", "nested": [{"wandb_api_key": "def"}], "mask_token": "<mask>"})
    assert clean == {"hub_token": REMOVED, "nested": [{"wandb_api_key": REMOVED}], "mask_token": "<mask>"}
