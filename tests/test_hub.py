"""A card is public the moment it is pushed: what must never be on it, and what must."""

import os
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfkd import hub
from hfkd.hub import REMOVED, CardFacts, citation, redact, render_card, write_card

HOME, HERE = os.path.expanduser("~"), os.getcwd()
TOKEN, WANDB_KEY, COMMIT = "hf_" + "Ab1" * 8, "0a1b2c3d" * 5, "4b825dc6" * 5


def full_facts() -> CardFacts:
    return CardFacts(
        student="tiny-news",
        repo_id="ann/tiny-news",
        start="ann/tiny-start",
        start_revision=COMMIT,
        teacher="the encoder of round 0",
        teacher_revision="main",
        datasets=["ann/news"],
        objective="SelfDistill",
        settings={"feature": "cls", "optimizer": {"learning_rate": 1e-4, "betas": [0.9, 0.95]}},
        rounds=[
            {"name": "round 0", "distance": 3.0, "losses": {"pretrain_loss": 2.5}, "hash": "ab" * 32},
            {"name": "round 1", "distance": 2.0, "losses": {"pretrain_loss": 2.6, "distill_loss": 0.25}},
        ],
        results=[
            {"stage": "round 0", "metric": "accuracy", "mean": 0.81, "std": 0.02, "seeds": 5},
            {"stage": "round 1", "metric": "accuracy", "mean": 0.83, "std": 0.01, "seeds": 5, "train_loss": 0.25,
             "test_loss": 0.75},
            {"stage": "round 1", "metric": "macro_f1", "mean": 0.79, "std": 0.0, "seeds": 1},
        ],
        command="accelerate launch recipes/self_distill.py --rounds 1",
        versions={"torch": "2.13.0"},
        limits=["Short news texts only."],
        language="en",
        license="apache-2.0",
        tags=["news"],
    )  # fmt: skip


def metadata_of(text: str) -> dict:
    from huggingface_hub import ModelCard

    return ModelCard(text).data.to_dict()


def test_metadata_parses_and_claims_only_this_models_scores():
    """A baseline's score in the model index would be published as this model's."""
    data = metadata_of(render_card(full_facts()))
    assert data["base_model"] == "ann/tiny-start" and data["datasets"] == ["ann/news"]
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "fill-mask"
    assert set(data["tags"]) == {"knowledge-distillation", "hfkd", "self-distillation", "news"}
    (index,) = data["model-index"]
    (result,) = index["results"]
    assert {metric["name"]: metric["value"] for metric in result["metrics"]} == {"accuracy": 0.83, "macro_f1": 0.79}


def test_a_named_stage_selects_its_own_scores():
    """Rows come in any order: the last one need not be the published model."""
    facts = full_facts()
    facts.stage = "round 0"
    (result,) = metadata_of(render_card(facts))["model-index"][0]["results"]
    assert [metric["value"] for metric in result["metrics"]] == [0.81]


def test_local_starts_and_data_stay_out_of_the_metadata(tmp_path, monkeypatch):
    """A local folder named as base model links the card to a stranger's repository of that name."""
    os.makedirs(tmp_path / "runs" / "start")
    monkeypatch.chdir(tmp_path)
    facts = CardFacts(start=str(tmp_path / "runs" / "start"), datasets=["runs/start", "ann/news", "a/b/c.csv"])
    data = metadata_of(render_card(facts))
    assert "base_model" not in data and data["datasets"] == ["ann/news"]


def test_the_body_says_what_happened():
    """Numbers that are in the facts and not on the card cannot be checked by anyone."""
    text = render_card(full_facts())
    assert "ann/tiny-start → round 0 → round 1 (this model)" in text
    assert "| round 1 | 2.0000 | 2.6000 | 0.2500 | - |" in text
    assert "| round 1 | accuracy | 0.8300 ± 0.0100 | 5 | 0.2500 | 0.7500 | 0.5000 |" in text
    assert "| round 1 | macro_f1 | 0.7900 | 1 |" in text, "one seed has no spread: ± 0 would claim certainty"
    assert "| optimizer.betas | [0.9, 0.95] |" in text
    assert COMMIT in text and "summed over the hidden dimension and averaged over the batch" in text
    assert "lee2023selfdistillation" in text


@pytest.mark.parametrize("facts", [CardFacts(), full_facts()], ids=["empty", "full"])
def test_no_template_braces_and_no_empty_headings(facts):
    """A heading over nothing, or a bare `{{ name }}`, makes the whole card look unchecked."""
    text = render_card(facts)
    assert not re.search(r"\{\{|\}\}|\{%|%\}|\bNone\b", text)
    assert not re.search(r"^(#+ .*)\n+(?=#+ |\Z)", text, re.MULTILINE)
    assert "\n\n\n" not in text


def test_missing_facts_leave_their_sections_out():
    """An empty "Results" table reads as a result of nothing; the plain sentence does not."""
    text = render_card(CardFacts())
    for heading in ("Lineage", "Data", "Training command", "Versions", "Limits"):
        assert f"## {heading}" not in text
    assert "No results have been measured" in text and "model-index" not in text


# Where a run's strings carry paths and secrets: alone, in flags, in quotes, in lists of folders, in sentences.
PLACES = st.sampled_from(
    ["{}", "--output_dir={}", "--output_dir {} --seed 1", '"{}"', "'{}'", "({})", "a:{}", "see {}.", "{},b", "`{}`",
     "x\n{}\ny", "file://{}", "[{}]", "{}:12: error", "https://host/x?path={}", "=> {};"]
)  # fmt: skip
LEAVES = ("leaf", "leaf.csv", "a b/leaf", "deep/er/leaf", "")


@st.composite
def injected(draw) -> CardFacts:
    """Every string of every fact replaced by one that holds a path and a secret."""

    def dirty() -> str:
        folder = draw(st.sampled_from([HOME, HERE, "/tmp", "/nowhere/at/all"]))
        leaf = draw(st.sampled_from(LEAVES))
        text = draw(PLACES).format(f"{folder}/{leaf}".rstrip("/"))
        return text + draw(st.sampled_from([f" {TOKEN}", f" --hub_token {TOKEN}", f" WANDB_API_KEY={WANDB_KEY}", ""]))

    def replace(value):
        if isinstance(value, str):
            return dirty()
        if isinstance(value, list):
            return [replace(item) for item in value]
        if isinstance(value, dict):
            return {key: replace(item) for key, item in value.items()}
        return value

    facts = CardFacts(**{name: replace(value) for name, value in vars(full_facts()).items()})
    facts.settings[dirty()] = Path(HOME) / "leaf"
    return facts


@settings(max_examples=25, deadline=None, derandomize=True)
@given(facts=injected())
def test_no_path_and_no_secret_reaches_the_card(facts):
    """A home folder is a person's name, a token is an open account: one leak is published for good."""
    text = render_card(facts)
    for leak in (HOME + "/", HERE, "/tmp", "/nowhere", TOKEN, WANDB_KEY):
        assert leak not in text
    assert not re.search(rf"{re.escape(HOME)}\b", text)
    metadata_of(text)


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
    text = render_card(CardFacts(settings={"hub_token": "abc", "wandb_api_key": "def", "mask_token": "<mask>"}))
    assert "abc" not in text and "def" not in text and "<mask>" in text


def test_template_is_found_in_a_checkout_and_unknown_ones_are_listed():
    """A package that was built without its templates must say so before the card is due, not print an empty one."""
    assert "self_distilled_encoder.md" in {item.name for item in hub._template_folders()[1].iterdir()}
    with pytest.raises(FileNotFoundError, match=r"self_distilled_encoder\.md"):
        render_card(CardFacts(), "no_such_card.md")


def test_write_card_leaves_one_whole_file(tmp_path, monkeypatch):
    """A run killed while writing must keep the card it had."""
    path = write_card(full_facts(), tmp_path / "new")
    assert path.read_text(encoding="utf-8") == render_card(full_facts())
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError):
        write_card(CardFacts(), tmp_path / "new")
    assert os.listdir(tmp_path / "new") == ["README.md"] and "tiny-news" in path.read_text(encoding="utf-8")


def test_citations():
    """A card that credits the wrong paper is worse than one that credits none."""
    for identifier in ("2210.02871", "2106.10494", "2301.12923", "2203.14649"):
        entry = citation(identifier)
        assert f"eprint = {{{identifier}}}" in entry and entry.count("{") == entry.count("}")
    assert "eprint" not in citation("mc-distil")
    with pytest.raises(ValueError, match=r"2210\.02871"):
        citation("0000.00000")
    assert "https://arxiv.org/abs/0000.00000" in render_card(CardFacts(citations=["0000.00000"]))


def test_the_usage_snippet_runs(tmp_path):
    """The snippet is the first thing that a reader copies."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    words = {word: index for index, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", "<mask>", "This", "example"])}
    fast = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast, mask_token="<mask>", unk_token="<unk>", pad_token="<pad>"
    ).save_pretrained(tmp_path)
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    config = transformers.RobertaConfig(vocab_size=len(words), max_position_embeddings=24, **shape)
    transformers.RobertaForMaskedLM(config).save_pretrained(tmp_path)
    for code in re.findall(r"```python\n(.*?)```", render_card(CardFacts()), re.DOTALL):
        exec(code.replace("path/to/this/folder", str(tmp_path)), {})
