"""From a trained student to its repository and back, through a Hub on loopback and the real clients."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from datasets import ClassLabel, Dataset
from safetensors.torch import load

import launching
from group_run import group_trainer
from hfkd import KD, DistillationArguments, DistillationTrainer, cli
from hfkd.cards import CardFacts, check_card, metadata_of
from hfkd.hub import pull
from hfkd.records import weights_hash
from hfkd.testing import tiny_roberta_config, tiny_rows, tiny_tokenizer
from rounds_run import rounds_trainer

ROOT = Path(__file__).resolve().parents[1]
LABELS = ("angry", "calm", "glad")
# A student, and not one file more: no pickle, no optimizer, no arguments with a token in them
STUDENT = {
    *("README.md", "config.json", "model.safetensors", "teacher_manifest.json"),
    *("tokenizer.json", "tokenizer_config.json"),
}
OF_THE_HUB = {".gitattributes"}
FACTS = {"datasets": ["tester/moods"], "command": "python train.py", "task": "moods"}


def names(hub, repository):
    return set(hub.files(repository)) - OF_THE_HUB


def model(seed, **settings):
    torch.manual_seed(seed)
    named = {"id2label": dict(enumerate(LABELS)), "label2id": {name: i for i, name in enumerate(LABELS)}}
    return transformers.RobertaForSequenceClassification(tiny_roberta_config(**named, **settings))


def rows(count=24):
    found = Dataset.from_list([{**row, "label": sum(row["input_ids"]) % 3} for row in tiny_rows(count)])
    return found.cast_column("label", ClassLabel(names=list(LABELS)))


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def trainer_of(folder, facts=FACTS, teacher=None, **settings):
    values = {"max_steps": 2, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", **settings}
    trainer = DistillationTrainer(
        model(1, num_hidden_layers=1),
        DistillationArguments(output_dir=str(folder), per_device_train_batch_size=8, **values),
        train_dataset=rows(),
        eval_dataset=rows(8),
        processing_class=tiny_tokenizer(),
        compute_metrics=accuracy,
        teacher=model(7) if teacher is None else teacher,
        objective=KD(temperature=2.0),
    )
    trainer.card_facts = CardFacts(**facts)
    return trainer


def trained(folder, **settings):
    trainer = trainer_of(folder, **settings)
    trainer.train()
    trainer.evaluate()
    return trainer


# ---- one student ----

STRANGER = """
import sys, json
try:
    from hfkd import KD  # an editable install leaves a folder of templates behind, which is no package
except ImportError:
    pass
else:
    raise SystemExit("hfkd is there: this shows nothing")
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
name = sys.argv[1]
model, tokenizer = AutoModelForSequenceClassification.from_pretrained(name), AutoTokenizer.from_pretrained(name)
inputs = tokenizer(["w5 w6 w7", "w30 w31"], padding=True, return_tensors="pt")
with torch.no_grad():
    logits = model(**inputs).logits
print(json.dumps([logits.tolist(), model.config.id2label]))
"""


@pytest.mark.launch
def test_a_pushed_student_answers_the_same_for_a_stranger_without_hfkd(hub, tmp_path):
    """A student that only loads where it was trained is not published."""
    with hub.connected():
        trainer = trained(tmp_path / "run", push_to_hub=True, hub_model_id="moods-small")
        done = trainer.push_to_hub()
    assert done.repo_id == "tester/moods-small" and names(hub, "tester/moods-small") == STUDENT
    script = tmp_path / "stranger.py"
    script.write_text(STRANGER)
    # -I: neither the folder nor PYTHONPATH is looked in; -S leaves out what an editable install adds to the path
    packages = next(path for path in sys.path if path.endswith("site-packages"))
    start = f"import sys; sys.path.append({packages!r}); sys.argv[:] = sys.argv[1:]; exec(open({str(script)!r}).read())"
    run = subprocess.run(
        [sys.executable, "-I", "-S", "-c", start, "stranger", "tester/moods-small"],
        cwd=tmp_path,
        env={**os.environ, **hub.environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    logits, labels = json.loads(run.stdout.splitlines()[-1])
    inputs = tiny_tokenizer()(["w5 w6 w7", "w30 w31"], padding=True, return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(logits), trainer.model.eval()(**inputs).logits)
    assert list(labels.values()) == list(LABELS)


def test_card_and_manifest_say_who_taught_what(hub, tmp_path):
    """A card of another teacher, objective or score is worse than none."""
    with hub.connected():
        trainer = trained(tmp_path / "run", push_to_hub=True, hub_model_id="tester/moods-small")
        trainer.push_to_hub(language="en", license="apache-2.0")
        folder = pull("tester/moods-small")
    card, manifest = (folder / "README.md").read_text(), json.loads((folder / "teacher_manifest.json").read_text())
    check_card(card)
    score = next(entry["eval_accuracy"] for entry in trainer.state.log_history if "eval_accuracy" in entry)
    assert f"{score:.4f}" in card and "language:\n- en" in card and "KD" in card
    assert manifest["objective"]["settings"]["temperature"] == 2.0 and manifest["metrics"] == {"accuracy": score}
    assert manifest["teacher"]["weights"] == weights_hash(trainer.teacher.model.state_dict())
    assert manifest["teacher"]["labels"] == list(LABELS) == manifest["labels"]
    assert str(trainer.teacher.model.num_parameters()) in card.replace(",", "")  # size against the teacher


def test_nothing_uploaded_holds_token_or_folders(hub, tmp_path):
    """The stock push takes training_args.bin, with the token inside, and every nested checkpoint."""
    with hub.connected():
        trainer = trained(
            tmp_path / "run",
            save_strategy="steps",
            save_steps=1,
            push_to_hub=True,
            hub_model_id="tester/moods-small",
            hub_token=hub.token,
            facts={**FACTS, "command": f"python {tmp_path}/train.py --hub_token {hub.token}"},
        )
        trainer.push_to_hub()
    assert (tmp_path / "run" / "checkpoint-1" / "optimizer.pt").is_file()
    assert (tmp_path / "run" / "training_args.bin").is_file()
    files = hub.files("tester/moods-small")
    assert set(files) - OF_THE_HUB == STUDENT
    for name, content in files.items():
        for secret in (hub.token, str(Path.home()), str(tmp_path), os.getcwd()):
            assert secret.encode() not in content, (name, secret)


def test_a_push_that_was_cut_goes_on_and_the_student_is_still_there(hub, tmp_path):
    """An hour of upload, or the model itself, lost to a bad connection."""
    with hub.connected():
        trainer = trained(tmp_path / "run", hub_model_id="tester/moods-small")
        hub.fail("commit", times=None, how="cut")
        with pytest.raises(ConnectionError, match="whole"):
            trainer.push_to_hub()
        assert "README.md" not in hub.files("tester/moods-small")
        hub.heal()
        before = sum(method == "PUT" for method, _ in hub.requests)
        trainer.push_to_hub()
        assert sum(method == "PUT" for method, _ in hub.requests) == before  # the weights had arrived
    assert names(hub, "tester/moods-small") == STUDENT
    local = (tmp_path / "run" / "model.safetensors").read_bytes()
    assert hub.files("tester/moods-small")["model.safetensors"] == local


def test_pushes_in_between_do_not_stop_a_training(hub, tmp_path, caplog):
    """Ten hours of training must not end with the network's first hiccup."""
    with hub.connected():
        trainer = trainer_of(tmp_path / "run", save_strategy="steps", save_steps=1, push_to_hub=True, hub_model_id="m")
        hub.fail("commit", times=None, how="401")
        trainer.train()
        assert trainer.state.global_step == 2 and "README.md" not in hub.files("tester/m")
        hub.heal()
        trainer = trainer_of(
            tmp_path / "other", save_strategy="steps", save_steps=1, push_to_hub=True, hub_model_id="m"
        )
        trainer.train()
    assert names(hub, "tester/m") == STUDENT


# ---- refused, before an hour is wasted ----


@pytest.mark.parametrize(
    ("settings", "changes", "error", "said"),
    [
        ({"hub_model_id": "somebody/else"}, {}, PermissionError, "belongs to somebody.*tester"),
        ({"hub_model_id": "a--b"}, {}, ValueError, "refuses the name"),
        ({"hub_model_id": "m"}, {"HF_TOKEN": "hf_" + "x" * 34}, PermissionError, "token"),
        ({"hub_model_id": "m"}, {"HF_TOKEN": ""}, PermissionError, "hf auth login"),
        ({"hub_model_id": "m", "hub_strategy": "all_checkpoints"}, {}, ValueError, "optimizer states"),
    ],
    ids=["foreign", "name", "wrong token", "no token", "strategy"],
)
def test_what_cannot_be_pushed_is_refused_before_training(hub, tmp_path, settings, changes, error, said):
    """Said after training, it costs the training."""
    with hub.connected(**changes), pytest.raises(error, match=said):
        trainer_of(tmp_path / "run", push_to_hub=True, **settings)


def test_no_network_is_said_before_training(tmp_path):
    """Twenty-three seconds of retries and a stack of calls say nothing."""
    with pytest.raises(ConnectionError, match="offline"):
        trainer_of(tmp_path / "run", push_to_hub=True, hub_model_id="m")


def test_a_card_with_missing_facts_names_them(hub, tmp_path):
    """A published model of unknown data is a model nobody can use."""
    with hub.connected():
        trainer = trained(tmp_path / "run", facts={}, hub_model_id="m")
        with pytest.raises(ValueError, match="the data"):
            trainer.push_to_hub()
        with pytest.raises(TypeError, match="colour"):
            trainer.push_to_hub(colour="blue")
        trainer.card_facts.command = "python train.py"
        trainer.push_to_hub(dataset="tester/moods")
    assert b"tester/moods" in hub.files("tester/m")["README.md"]


# ---- the teacher ----


def test_the_teacher_goes_up_too_and_both_cards_link(hub, tmp_path):
    """A lineage that can be read in one direction only is lost with the other card."""
    with hub.connected():
        trainer = trained(tmp_path / "run", hub_model_id="tester/moods-small", push_teacher=True)
        trainer.push_to_hub()
    teacher, student = (hub.files(f"tester/moods-small{end}")["README.md"].decode() for end in ("-teacher", ""))
    assert "tester/moods-small-teacher" in student and "tester/moods-small)" in teacher
    check_card(teacher)
    manifest = json.loads(hub.files("tester/moods-small")["teacher_manifest.json"])
    assert manifest["teacher"]["repo"] == "tester/moods-small-teacher"
    assert json.loads(hub.files("tester/moods-small-teacher")["teacher_manifest.json"])["role"] == "teacher"


@pytest.mark.parametrize("named", [False, True])
def test_a_private_teacher_is_hidden_unless_told_otherwise(hub, tmp_path, named):
    """The name of a private model is a secret of its owner."""
    model(7).save_pretrained(tmp_path / "teacher")
    tiny_tokenizer().save_pretrained(tmp_path / "teacher")
    files = {path.name: path.read_bytes() for path in (tmp_path / "teacher").iterdir()}
    hub.add_repository("tester/secret-teacher", files, private=True)
    with hub.connected():
        in_between = {"push_to_hub": True, "save_strategy": "steps", "save_steps": 1}
        trainer = trained(
            tmp_path / "run",
            teacher="tester/secret-teacher",
            hub_model_id="m",
            name_private_teacher=named,
            **in_between,
        )
        assert (b"secret-teacher" in hub.files("tester/m")["README.md"]) == named
        trainer.push_to_hub()
    for name, content in hub.files("tester/m").items():
        if name in ("README.md", "teacher_manifest.json"):
            assert (b"secret-teacher" in content) == named, name
    manifest = json.loads(hub.files("tester/m")["teacher_manifest.json"])
    assert manifest["teacher"]["private"] == (not named)
    assert not named or re.fullmatch(r"[0-9a-f]{40}", manifest["teacher"]["revision"])


def test_a_teacher_without_a_model_cannot_be_pushed(hub, tmp_path):
    """A silent skip leaves a card that links to nothing."""
    from hfkd import EnsembleTeacher

    with hub.connected():
        trainer = trained(
            tmp_path / "run", teacher=EnsembleTeacher([model(7), model(8)]), hub_model_id="m", push_teacher=True
        )
        with pytest.raises(ValueError, match="EnsembleTeacher has no model"):
            trainer.push_to_hub()


# ---- rounds and groups ----


def test_every_round_has_a_branch_and_the_last_is_the_main_one(hub, tmp_path):
    """Whoever compares rounds needs them apart, and whoever loads the model the last."""
    with hub.connected():
        trainer = rounds_trainer(tmp_path / "rounds", {"num_rounds": 1, "hub_model_id": "tester/rounds"})
        trainer.card_facts = CardFacts(**FACTS)
        trainer.train()
        trainer.push_to_hub()
    assert {"main", "round-0", "round-1"} <= set(hub.branches("tester/rounds"))
    weights = [hub.files("tester/rounds", name)["model.safetensors"] for name in ("round-0", "round-1", "main")]
    assert weights[1] == weights[2] != weights[0]
    cards = [hub.files("tester/rounds", name)["README.md"].decode() for name in ("round-0", "main")]
    assert "MaskedLM" in cards[0] and "SelfDistill" in cards[1] and "| round 1 |" not in cards[0]
    manifest = json.loads(hub.files("tester/rounds")["teacher_manifest.json"])
    assert manifest["teacher"]["revision"] == "round-0" and manifest["teacher"]["repo"] == "tester/rounds"


def test_every_student_of_a_group_has_a_repository(hub, tmp_path):
    """Two architectures cannot share one configuration file."""
    with hub.connected():
        settings = {"hub_model_id": "tester/group", "num_train_epochs": 1}
        trainer = group_trainer(tmp_path / "group", settings, eval_dataset=None)
        trainer.card_facts = CardFacts(**FACTS, results=[{"stage": "x", "metric": "accuracy", "mean": 0.5, "seeds": 1}])
        trainer.train()
        trainer.push_to_hub()
    for name in ("small", "large"):
        files = hub.files(f"tester/group-{name}")
        assert set(files) - OF_THE_HUB == STUDENT
        card = files["README.md"].decode()
        assert "tester/group-small" in card and "tester/group-large" in card and "CNet" in card
        assert json.loads(files["teacher_manifest.json"])["role"] == "member"


# ---- recipes ----


@pytest.mark.launch
def test_a_recipe_pushes_student_baseline_and_teacher(hub, tmp_path, capsys):
    """The card that a recipe uploads has the study's table; the flag that does nothing is found by its first user."""
    model(0).save_pretrained(tmp_path / "start")
    tiny_tokenizer().save_pretrained(tmp_path / "start")
    for name in ("train", "test"):
        lines = [f"w{5 + 7 * i % 50} w{5 + i % 50},{LABELS[i % 3]}" for i in range(24)]
        (tmp_path / f"{name}.csv").write_text("text,label\n" + "\n".join(lines) + "\n")
    words = ["--train_file", str(tmp_path / "train.csv"), "--test_file", str(tmp_path / "test.csv"), "--max_steps", "2"]
    words += [
        "--teacher_start",
        str(tmp_path / "start"),
        "--student_layers",
        "1",
        "--seeds",
        "2",
        "--report_to",
        "none",
    ]
    words += ["--output_dir", str(tmp_path / "study"), "--push_to_hub", "True", "--push_teacher", "True"]
    words += ["--hub_model_id", "tester/study"]
    run = launching.run(
        Path(__file__).parent / "connected_recipe.py",
        json.dumps(hub.environment),
        str(ROOT / "recipes" / "distill_text.py"),
        *words,
        log=tmp_path / "log",
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert set(hub.repositories()) >= {"tester/study", "tester/study-teacher"}
    card = hub.files("tester/study")["README.md"].decode()
    assert "student, labels only" in card and "student, distilled" in card and "tester/study-teacher" in card
    assert "student-labels-only" in hub.branches("tester/study") and "recipes/distill_text.py" in card
    check_card(card)
    assert names(hub, "tester/study") == STUDENT == names(hub, "tester/study-teacher")
    assert "student against teacher" in card and "95 % interval" in card
    taught = json.loads(hub.files("tester/study")["teacher_manifest.json"])["teacher"]
    assert taught["weights"] == weights_hash(load(hub.files("tester/study-teacher")["model.safetensors"]))
    assert "base_model" not in metadata_of(hub.files("tester/study-teacher")["README.md"].decode())  # it was a folder
    data = ["--train_file", str(tmp_path / "train.csv"), "--test_file", str(tmp_path / "test.csv"), "--json"]
    with hub.connected():
        for name in ("tester/study", "tester/study-teacher"):
            assert cli.main(["eval", name, *data]) == 0 and json.loads(capsys.readouterr().out)["same"]


def test_a_cache_of_answers_goes_up_as_a_data_set_and_comes_back(hub, tmp_path, monkeypatch):
    """A cache that only its maker can read is asked for again, row by row, by everybody else."""
    from datasets import load_dataset

    import hfkd
    import hfkd.data.text

    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    import cache_teacher

    model(7).save_pretrained(tmp_path / "teacher")
    tiny_tokenizer().save_pretrained(tmp_path / "teacher")
    (tmp_path / "train.csv").write_text("text,label\n" + "\n".join(f"w{5 + i} w{9 + i},calm" for i in range(12)) + "\n")
    words = ["--teacher", str(tmp_path / "teacher"), "--train_file", str(tmp_path / "train.csv"), "--dtype", "float32"]
    words += ["--output_dir", str(tmp_path / "cache"), "--push_to_hub", "True", "--hub_dataset_id", "tester/answers"]
    with hub.connected():
        cache_teacher.main(words)
        answers = load_dataset("tester/answers", split="train")
        folder = pull("tester/answers", repo_type="dataset")
    card = hub.files("tester/answers", repo_type="dataset")["README.md"].decode()
    check_card(card, "dataset")
    assert len(answers) == 12 and "12 rows" in card and str(tmp_path) not in card
    texts = hfkd.data.text.load_text(None, None, train_file=str(tmp_path / "train.csv"), require_labels=False)["train"]
    rows = hfkd.data.text.tokenize(texts, tiny_tokenizer(), 128)
    attached = hfkd.load_cache(folder, rows, processing_class=tiny_tokenizer())
    assert attached["teacher_logits"][:] == answers["teacher_logits"][:]


# ---- what broke once ----


def test_projections_stay_at_home_and_a_pulled_student_is_whole(hub, tmp_path):
    """A manifest that hashes a file nobody uploads calls every download corrupted."""
    from hfkd.objectives import HiddenStates

    with hub.connected():
        values = {"max_steps": 2, "report_to": "none", "disable_tqdm": True, "hub_model_id": "tester/m"}
        trainer = DistillationTrainer(
            model(1, num_hidden_layers=1),
            DistillationArguments(output_dir=str(tmp_path / "run"), save_strategy="no", **values),
            train_dataset=rows(),
            eval_dataset=rows(8),
            processing_class=tiny_tokenizer(),
            compute_metrics=accuracy,
            teacher=model(7, hidden_size=24),
            objective=HiddenStates(),
        )
        trainer.card_facts = CardFacts(**FACTS)
        trainer.train()
        trainer.evaluate()
        trainer.push_to_hub()
        assert (tmp_path / "run" / "objective.safetensors").is_file()
        assert names(hub, "tester/m") == STUDENT
        pull("tester/m")


def test_a_teacher_that_goes_up_private_is_hidden_too(hub, tmp_path):
    """A push that ends in a refusal of what it has just made itself."""
    with hub.connected():
        trainer = trained(tmp_path / "run", hub_model_id="m", push_teacher=True, hub_private_repo=True)
        trainer.push_to_hub()
    assert hub.is_private("tester/m-teacher") and hub.is_private("tester/m")
    assert b"m-teacher" not in hub.files("tester/m")["README.md"] + hub.files("tester/m")["teacher_manifest.json"]


def test_the_teacher_of_a_group_goes_up_and_links_to_every_student(hub, tmp_path):
    """A group has no student in its own folder: the push ended in a KeyError after the training."""
    with hub.connected():
        settings = {"hub_model_id": "tester/group", "num_train_epochs": 1, "push_teacher": True}
        trainer = group_trainer(tmp_path / "group", settings, eval_dataset=None)
        trainer.card_facts = CardFacts(**FACTS, results=[{"stage": "x", "metric": "accuracy", "mean": 0.5, "seeds": 1}])
        trainer.train()
        trainer.push_to_hub()
    card = hub.files("tester/group-teacher")["README.md"].decode()
    assert "tester/group-small)" in card and "tester/group-large)" in card and "tester/group)" not in card


def test_a_teacher_without_a_model_is_refused_before_training(hub, tmp_path):
    """Said after training, it costs the training."""
    from hfkd import EnsembleTeacher

    with hub.connected(), pytest.raises(ValueError, match="EnsembleTeacher has no model"):
        teacher = EnsembleTeacher([model(7), model(8)])
        trainer_of(tmp_path / "run", teacher=teacher, push_to_hub=True, hub_model_id="m", push_teacher=True)


def test_a_local_start_is_nobodys_hub_id(hub, tmp_path):
    """A folder called gpt2 made the student a fine-tuned GPT-2."""
    model(3, num_hidden_layers=1).save_pretrained(tmp_path / "gpt2")
    start = transformers.RobertaForSequenceClassification.from_pretrained(tmp_path / "gpt2")
    with hub.connected():
        trainer = trained(tmp_path / "run", hub_model_id="m", hub_revision="v2")
        trainer.model.config._name_or_path = start.config._name_or_path
        trainer.push_to_hub()
    card = hub.files("tester/m", "v2")["README.md"].decode()
    assert "gpt2, a local folder" in card and "base_model" not in metadata_of(card)
    assert 'from_pretrained("tester/m", revision="v2")' in card  # the main branch holds nothing


def test_an_adapter_of_a_local_folder_is_not_published(hub, tmp_path):
    """It names a path of this machine, and nobody else can load it."""
    peft = pytest.importorskip("peft")
    model(3).save_pretrained(tmp_path / "base")
    base = transformers.RobertaForSequenceClassification.from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"])
    with hub.connected():
        trainer = trained(tmp_path / "run", hub_model_id="m")
        trainer.model = peft.get_peft_model(base, config)
        for name in ("model.safetensors", "config.json"):
            (tmp_path / "run" / name).unlink(missing_ok=True)
        with pytest.raises(ValueError, match="nobody else can load"):
            trainer.push_to_hub()


def test_every_data_set_of_an_evaluation_is_on_the_card():
    """Of two data sets only the last one's score was there, under a name that hid it."""
    from hfkd.trainers.card import last_metrics

    history = [
        {"step": 1, "eval_a_accuracy": 0.1, "eval_c_accuracy": 0.9},
        *(
            {"step": 2, f"eval_{name}_accuracy": value, f"eval_{name}_loss": 1.0}
            for name, value in (("a", 0.2), ("b", 0.3))
        ),
        {"step": 2, "train_loss": 0.5},
    ]
    assert last_metrics(history) == {"a_accuracy": 0.2, "b_accuracy": 0.3}


def test_several_teachers_and_nameless_answers_have_a_name():
    """`vote of 1: None` on a published card."""
    from hfkd import CachedTeacher, EnsembleTeacher
    from hfkd.trainers.card import taught_by

    answers = [CachedTeacher(f"teacher_logits_{number}") for number in range(2)]
    for one in answers:
        one.config = model(0).config
    assert taught_by(EnsembleTeacher(answers, "vote")).name == "the vote of 2 models"
    assert taught_by(answers[0]).name == "cached answers"
