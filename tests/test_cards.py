"""A card is public the moment it is pushed: what must never be on it, and what must."""

import dataclasses
import os
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfkd.cards import CardFacts, check_card, citation, missing_facts, render_card, write_card
from hfkd.citations import card_folders
from hfkd.diagnostics import report_of_logits
from hfkd.hub_server import check_metadata
from hfkd.objectives import KD, OBJECTIVES
from hfkd.testing import tiny_roberta_config, tiny_tokenizer

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
        pipeline_tag="fill-mask",
    )  # fmt: skip


TEMPLATES = ["self_distilled_encoder.md", "student.md", "collaborative_student.md", "teacher_logits.md"]
CLASSES = ["World", "Sports", "Sci/Tech"]


def fidelity() -> dict:
    generator = np.random.default_rng(0)
    labels, teacher = generator.integers(0, 3, 60), generator.normal(size=(60, 3))
    student = teacher + generator.normal(size=(60, 3))
    names = {"class_names": CLASSES, "student": "tiny-news", "teacher": "ann/big-news"}
    return report_of_logits(student, teacher, labels, bootstrap=20, **names).to_dict()


def student_facts(**changes) -> CardFacts:
    """A student of texts with all that a study knows."""
    facts = CardFacts(
        student="tiny-news",
        repo_id="ann/tiny-news",
        task="ag_news",
        label_names=CLASSES,
        start="ann/tiny-start",
        start_relation="finetune",
        teacher="ann/big-news",
        teacher_repo="ann/big-news",
        teacher_revision=COMMIT,
        teacher_hash="ab" * 32,
        datasets=["ann/news"],
        objective="KD",
        equation=KD().equation,
        settings={"temperature": 4.0, "note": "as ann/big-news"},
        results=[
            {"stage": "teacher", "metric": "accuracy", "mean": 0.94, "std": 0.001, "seeds": 5},
            {"stage": "labels only", "metric": "accuracy", "mean": 0.89, "std": 0.003, "seeds": 5},
            {
                "stage": "tiny-news",
                "metric": "accuracy",
                "mean": 0.91,
                "std": 0.002,
                "seeds": 5,
                "low": 0.9,
                "high": 0.92,
            },
            {"stage": "tiny-news", "metric": "macro_f1", "mean": 0.905, "seeds": 5, "split": "test"},
        ],
        stage="tiny-news",
        evaluated_on="the 7,600 rows of the test split",
        differences=[
            {
                "name": "distilled - labels only",
                "metric": "accuracy",
                "mean": 0.02,
                "low": 0.015,
                "high": 0.025,
                "seeds": 5,
            }
        ],
        costs={
            "student": {"parameters": 4_000_000, "milliseconds": 4.0, "rows": 8, "device": "cpu"},
            "teacher": {"parameters": 100_000_000, "milliseconds": 210.0, "rows": 8, "device": "cpu"},
        },
        group=[
            {"name": "tiny-news", "repo": "ann/tiny-news", "parameters": 4_000_000, "accuracy": 0.91},
            {"name": "other", "repo": "", "parameters": None, "accuracy": None},
        ],
        fidelity=fidelity(),
        command="accelerate launch recipes/distill_text.py --teacher ann/big-news",
        versions={"torch": "2.13.0"},
        citations=["1503.02531"],
        language="en",
        pipeline_tag="text-classification",
    )
    return dataclasses.replace(facts, **changes)


def logits_facts(**changes) -> CardFacts:
    facts = CardFacts(
        role="logits",
        student="answers of big-news",
        repo_id="ann/answers",
        teacher="ann/big-news",
        teacher_revision="main",
        datasets=["ann/news"],
        rows=120_000,
        split="train",
        columns={"example_id": "the row's number", "teacher_logits": "3 numbers, one a class"},
        dtype="float16",
        view="plain",
        label_names=CLASSES,
        command="python recipes/cache_teacher.py --teacher ann/big-news",
        versions={"torch": "2.13.0"},
    )
    return dataclasses.replace(facts, **changes)


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


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("facts", [CardFacts, full_facts, lambda: student_facts(), lambda: logits_facts()])
def test_no_template_braces_and_no_empty_headings(facts, template):
    """A heading over nothing, or a bare `{{ name }}`, makes the whole card look unchecked."""
    text = render_card(facts(), template).split("## Citation")[0]
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

    full = draw(st.sampled_from([full_facts(), student_facts(), logits_facts()]))
    facts = CardFacts(**{name: replace(value) for name, value in vars(full).items()})
    facts.settings[dirty()] = Path(HOME) / "leaf"
    return facts


@settings(max_examples=25, deadline=None, derandomize=True)
@given(facts=injected(), template=st.sampled_from(TEMPLATES))
def test_no_path_and_no_secret_reaches_the_card(facts, template):
    """A home folder is a person's name, a token is an open account: one leak is published for good."""
    text = render_card(facts, template)
    for leak in (HOME + "/", HERE, "/tmp", "/nowhere", TOKEN, WANDB_KEY):
        assert leak not in text
    assert not re.search(rf"{re.escape(HOME)}\b", text)
    metadata_of(text)


def test_template_is_found_in_a_checkout_and_unknown_ones_are_listed():
    """A package that was built without its templates must say so before the card is due, not print an empty one."""
    assert "self_distilled_encoder.md" in {item.name for item in card_folders()[1].iterdir()}
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


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_of_ours_can_be_cited_and_its_equation_stands_as_written(name):
    """Redaction that takes a slash of an equation for a path prints another loss than the one that trained."""
    kind = OBJECTIVES[name]
    assert kind.paper == "" or kind.paper in citation(kind.paper)
    if kind.equation:
        assert kind.equation in render_card(student_facts(equation=kind.equation), "student.md")


# ---- students, teachers, groups, answers ----


def test_a_student_stands_between_baseline_and_teacher():
    """A score without the student that had no teacher says nothing about distillation."""
    text = render_card(student_facts(), "student.md")
    table = [line for line in text.splitlines() if line.startswith(("| teacher |", "| labels only", "| **tiny-news**"))]
    assert table == [
        "| teacher | 0.9400 ± 0.0010 | - | 5 |",
        "| labels only | 0.8900 ± 0.0030 | - | 5 |",
        "| **tiny-news** (this model) | 0.9100 ± 0.0020 [0.9000, 0.9200] | 0.9050 | 5 |",
    ]
    assert "| distilled - labels only | accuracy | +0.0200 | [+0.0150, +0.0250] | 5 |" in text
    assert "| parameters | 4,000,000 | 100,000,000 | 25.0 times smaller |" in text
    assert "| forward pass of 8 rows on cpu (ms) | 4.0 | 210.0 | 52.5 times faster |" in text
    assert "## Fidelity to the teacher" in text and "| World |" in text and "hinton2015distilling" in text
    data = metadata_of(text)
    assert data["base_model"] == ["ann/tiny-start", "ann/big-news"] and data["base_model_relation"] == "finetune"
    assert set(data["tags"]) == {"knowledge-distillation", "hfkd"} and data["metrics"] == ["accuracy", "f1"]
    unsaid = metadata_of(render_card(student_facts(start_relation=""), "student.md"))
    assert unsaid["base_model_relation"] == "finetune", "of two base models without a word the Hub says: merged"
    scores = [m["value"] for result in data["model-index"][0]["results"] for m in result["metrics"]]
    assert scores == [0.91, 0.905]


def test_a_score_of_training_rows_is_no_benchmark():
    """In the metadata it would stand in rankings beside scores of held-out rows."""
    results = [{"stage": "tiny-news", "metric": "accuracy on training rows", "mean": 0.99}]
    text = render_card(student_facts(results=results), "student.md")
    assert "model-index" not in text and "| 0.9900 |" in text


def test_a_student_that_is_larger_or_slower_says_so():
    """ "0.5 times smaller" is read as smaller."""
    costs = {"student": {"parameters": 200, "milliseconds": 3.0, "rows": 8, "device": "cpu"},
             "teacher": {"parameters": 100, "milliseconds": 2.0, "rows": 4, "device": "cuda"}}  # fmt: skip
    text = render_card(student_facts(costs=costs), "student.md")
    assert "2.0 times larger" in text and "1.5 times slower" in text and "of 8 rows" not in text


def test_the_teachers_card_links_back_and_claims_no_teacher():
    """Two cards that do not name each other are two models of nobody."""
    facts = student_facts(
        role="teacher", student="big-news", repo_id="ann/big-news", teacher="", teacher_repo="", objective="", equation="",
        students=["ann/tiny-news"], results=[{"stage": "big-news", "metric": "accuracy", "mean": 0.94}], stage="big-news",
        differences=[], fidelity={}, citations=[],
    )  # fmt: skip
    text = render_card(facts, "student.md")
    assert "the teacher of [ann/tiny-news](https://huggingface.co/ann/tiny-news)" in text
    assert "distilled from" not in text and "## Teacher" not in text and "learned the mistakes" not in text
    check_card(text)
    assert "[ann/big-news](https://huggingface.co/ann/big-news)" in render_card(student_facts(), "student.md")


def test_a_student_without_a_teacher_is_not_called_distilled():
    """The baseline's own card, read as that of a distilled student, is the comparison turned round."""
    facts = student_facts(teacher="", teacher_repo="", objective="CrossEntropy", equation="L = -log p_y", fidelity={})
    text = render_card(facts, "student.md")
    assert (
        "trained on labels, without a teacher on" in text and "distilled from" not in text and not missing_facts(facts)
    )


def test_a_member_of_a_group_names_the_others():
    """A student whose companions nobody can find cannot be trained again."""
    text = render_card(student_facts(role="member", objective="Collaboration"), "collaborative_student.md")
    assert "one of 2 students that were trained together" in text and "A coordinator weighed" in text
    assert "| [ann/tiny-news](https://huggingface.co/ann/tiny-news) (this model) | 4,000,000 | 0.9100 |" in text
    assert "| other | - | - |" in text
    data = metadata_of(text)
    assert "collaborative-learning" in data["tags"] and "self-distillation" not in data["tags"]


def test_answers_say_of_whom_of_what_and_in_which_order():
    """Logits without the order of classes and rows are numbers."""
    text = render_card(logits_facts(), "teacher_logits.md")
    assert (
        "120,000 rows of [ann/news](https://huggingface.co/datasets/ann/news) (train), in the order of its rows" in text
    )
    assert "World, Sports, Sci/Tech" in text and "| `teacher_logits` | 3 numbers, one a class |" in text
    from huggingface_hub import DatasetCard

    data = DatasetCard(text).data.to_dict()
    assert data["configs"] == [{"config_name": "default", "data_files": "*.arrow"}]
    assert data["size_categories"] == "100K<n<1M" and "teacher-logits" in data["tags"]
    check_card(text, "dataset")


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_private_teacher_is_nowhere_on_the_card(template):
    """One flag of the command, or the name of the start, and the unreleased model is known."""
    named = {"teacher": "acme/unreleased", "teacher_repo": "acme/unreleased", "teacher_private": True}
    for facts in (student_facts(**named), logits_facts(**named), student_facts(**named, role="member")):
        facts.start = "acme/unreleased"
        facts.command = "run.py --teacher acme/unreleased --note=acme/unreleased, --seed 1"
        facts.settings = {"note": "as acme/unreleased", "acme/unreleased": {"deep": ["acme/unreleased"]}}
        facts.fidelity = {**fidelity(), "teacher": {**fidelity()["teacher"], "name": "acme/unreleased"}}
        facts.results[:0] = [{"stage": "acme/unreleased", "metric": "accuracy", "mean": 0.9}]
        facts.costs = {}
        text = render_card(facts, template)
        assert "acme" not in text and "unreleased" not in text and COMMIT not in text
        assert template == "self_distilled_encoder.md" or "private" in text
    unnamed = student_facts(
        teacher="", teacher_repo="", teacher_private=True, command="run.py --teacher=acme/x --seed 1"
    )
    assert "--teacher=[private teacher] --seed 1" in render_card(unnamed, "student.md")


def test_a_name_that_holds_the_private_teachers_name_stays():
    """ "bert" hidden in every word that has it leaves a card about nothing."""
    facts = student_facts(teacher="bert", teacher_repo="", teacher_private=True, student="bert-tiny")
    assert "# bert-tiny" in render_card(facts, "student.md")


# ---- what a published card must have ----


def test_complete_facts_lack_nothing():
    """A whole card refused keeps a model back for no reason."""
    for facts in (student_facts(), student_facts(role="member"), logits_facts(), student_facts(teacher="none")):
        assert missing_facts(facts) == []
    encoder = full_facts()
    encoder.equation, encoder.results = "L", []
    assert missing_facts(encoder) == [], "a round of pre-training is published without a score of its own"


@pytest.mark.parametrize(
    ("facts", "changes", "name"),
    [
        (student_facts, {"student": "", "repo_id": ""}, "student"),
        (student_facts, {"task": "", "pipeline_tag": ""}, "task"),
        (student_facts, {"datasets": []}, "datasets"),
        (student_facts, {"objective": ""}, "objective"),
        (student_facts, {"equation": ""}, "equation"),
        (student_facts, {"teacher": "", "teacher_repo": ""}, "teacher"),
        (student_facts, {"results": []}, "results"),
        (student_facts, {"command": ""}, "command"),
        (student_facts, {"versions": {}}, "versions"),
        (logits_facts, {"rows": 0}, "rows"),
        (logits_facts, {"columns": {}}, "columns"),
        (logits_facts, {"teacher": ""}, "teacher"),
    ],
)
def test_each_missing_fact_is_named_and_refused(facts, changes, name):
    """ "The card is invalid" sends the author through twenty fields."""
    found = facts(**changes)
    (missing,) = missing_facts(found)
    assert f"({name}" in missing
    template, kind = ("teacher_logits.md", "dataset") if found.role == "logits" else ("student.md", "model")
    text = render_card(found, template)
    with pytest.raises(ValueError, match=re.escape(missing)):
        check_card(text, kind)
    if name not in ("task",):
        check_card(text, kind, complete=False)


@pytest.mark.parametrize(
    ("before", "after", "sentence"),
    [
        ("---\n", "", "no metadata between"),
        ("library_name: ", "library_name: [", "cannot be read"),
        ("- hfkd\n", "", "the tag hfkd is missing"),
        ("pipeline_tag: text-classification\n", "", "pipeline_tag is missing"),
        ("- ann/tiny-start", "- runs/a/b", "base_model names 'runs/a/b', which is no Hub id"),
        ("- ann/news", "- /data/news", "datasets names '/data/news'"),
        ("value: 0.91\n", "value: .nan\n", "the score accuracy is nan"),
        ("      value: 0.91\n", "", "cannot be read"),
    ],
)
def test_what_the_hub_would_refuse_is_refused_here(before, after, sentence):
    """The server's refusal comes after the weights were sent, and says less."""
    text = render_card(student_facts(), "student.md")
    assert before in text
    with pytest.raises(ValueError, match=re.escape(sentence)):
        check_card(text.replace(before, after, 1))


def test_every_problem_is_named_at_once_and_figures_are_looked_for(tmp_path):
    """Problems told one at a time take as many pushes as there are problems."""
    path = write_card(student_facts(limits=["![a](figures/a.png)"], tags=["x"], command=""), tmp_path, "student.md")
    path.write_text(path.read_text().replace("- hfkd\n", ""))
    with pytest.raises(ValueError, match=r"tag hfkd is missing; it shows figures/a\.png.*; it lacks the command"):
        check_card(tmp_path)
    with pytest.raises(ValueError, match="there is no card"):
        check_card(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("facts", "template"),
    [(student_facts, "student.md"), (student_facts, "collaborative_student.md"), (logits_facts, "teacher_logits.md"),
     (full_facts, "self_distilled_encoder.md")],
)  # fmt: skip
def test_the_metadata_is_what_the_hub_documents(facts, template):
    """Metadata that the Hub refuses stops a push after the training."""
    assert check_metadata(render_card(facts(), template)) == ([], [])


# ---- the snippet ----


def run_snippets(text: str, folder: Path, **names) -> None:
    codes = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert codes
    for code in codes:
        exec(code.replace("path/to/this/folder", str(folder)), names)


@pytest.mark.parametrize(
    ("tag", "head", "changes", "printed"),
    [
        ("fill-mask", "RobertaForMaskedLM", {}, r"\S+\n"),
        ("text-classification", "RobertaForSequenceClassification", {}, "(World|Sports|Sci/Tech)\n"),
        ("text-classification", "RobertaForSequenceClassification", {"inputs": ["premise", "hypothesis"]}, "[WS]"),
        ("text-classification", "RobertaForSequenceClassification", {"problem_type": "regression"}, r"\[-?\d"),
        (
            "text-classification",
            "RobertaForSequenceClassification",
            {"problem_type": "multi_label_classification"},
            r"\[",
        ),
        ("token-classification", "RobertaForTokenClassification", {}, r"\[\('"),
        ("", "RobertaForSequenceClassification", {}, ""),
    ],
)
def test_the_usage_snippet_of_a_text_model_runs(tmp_path, capsys, tag, head, changes, printed):
    """The snippet is the first thing that a reader copies."""
    import transformers

    names = dict(enumerate(CLASSES))
    config = tiny_roberta_config(id2label=names, label2id={name: i for i, name in names.items()})
    getattr(transformers, head)(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    template = "self_distilled_encoder.md" if tag == "fill-mask" else "student.md"
    run_snippets(render_card(student_facts(repo_id="", pipeline_tag=tag, **changes), template), tmp_path)
    assert re.match(printed, capsys.readouterr().out)


@pytest.mark.parametrize("tag", ["image-classification", "image-feature-extraction"])
def test_the_usage_snippet_of_an_image_model_runs(tmp_path, monkeypatch, tag):
    """The snippet is the first thing that a reader copies."""
    import transformers
    from PIL import Image

    sizes = {"image_size": 16, "patch_size": 8, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.ViTConfig(intermediate_size=8, **sizes)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    transformers.ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    Image.new("RGB", (20, 30)).save(tmp_path / "image.png")
    monkeypatch.chdir(tmp_path)
    run_snippets(render_card(student_facts(repo_id="", pipeline_tag=tag), "student.md"), tmp_path)


def test_an_architecture_of_ours_says_what_it_needs(tmp_path, monkeypatch):
    """A CIFAR ResNet is unknown to transformers: a snippet without its code fails with a list of 300 architectures."""
    from PIL import Image
    from transformers import ViTImageProcessorPil

    from hfkd import CifarResNetForImageClassification, cifar_resnet_config

    CifarResNetForImageClassification(cifar_resnet_config("resnet10-xxxs", num_labels=3)).save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    Image.new("RGB", (32, 32)).save(tmp_path / "image.png")
    monkeypatch.chdir(tmp_path)
    facts = student_facts(repo_id="", pipeline_tag="image-classification", imports=["hfkd.models.cifar_resnet"])
    text = render_card(facts, "student.md")
    assert "import hfkd.models.cifar_resnet" in text
    run_snippets(text, tmp_path)
    assert "trust_remote_code=True" in render_card(dataclasses.replace(facts, remote_code=True), "student.md")


def test_the_snippet_of_a_branch_loads_that_branch():
    """The snippet on the card of round 2 that loads round 0 compares a model with itself."""
    text = render_card(student_facts(branch="round-2"), "student.md")
    assert text.count('from_pretrained("ann/tiny-news", revision="round-2")') == 2
