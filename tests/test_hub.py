"""What is published and what comes back, with the real clients against the loopback Hub."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import RobertaForSequenceClassification

from hfkd import hub as publishing
from hfkd.cards import CardFacts, write_card
from hfkd.hub import allowed_files, check_access, is_private, lineage, publish, pull
from hfkd.manifest import MANIFEST_FILE, write_manifest
from hfkd.testing import tiny_roberta_config, tiny_tokenizer

REPO, TEACHER = "tester/student", "tester/teacher"
TEXT = "w5 w9 w12"
UPLOADED = ["README.md", "config.json", "model.safetensors", MANIFEST_FILE, "tokenizer.json", "tokenizer_config.json"]


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """The client waits up to 23 seconds before it gives up."""
    import huggingface_hub.utils._http as http

    monkeypatch.setattr(http.time, "sleep", lambda seconds: None)


def facts_of(**changes):
    facts = {
        "student": "tiny-student",
        "repo_id": REPO,
        "teacher": "tiny-teacher",
        "datasets": ["ann/news"],
        "objective": "KD",
        "equation": r"L = \mathrm{KL}(z_t \| z_s)",
        "settings": {"temperature": 4.0},
        "results": [{"stage": "tiny-student", "metric": "accuracy", "mean": 0.75, "seeds": 1}],
        "command": "accelerate launch recipes/distill_text.py",
        "versions": {"torch": "2.13.0"},
        "pipeline_tag": "text-classification",
        "label_names": ["calm", "glad", "sad"],
    }
    return CardFacts(**{**facts, **changes})


def manifest_of(teacher=None, **changes):
    return {"role": "student", "teacher": teacher, "objective": {"name": "KD"}, "labels": ["calm"], **changes}


def teacher_entry(**changes):
    return {"id": "tiny-teacher", "repo": None, "revision": None, "weights": "ab" * 32, "private": False, **changes}


def saved(folder, taught_by=None, seed=0, **facts):
    torch.manual_seed(seed)
    names = {0: "calm", 1: "glad", 2: "sad"}
    model = RobertaForSequenceClassification(
        tiny_roberta_config(num_labels=3, id2label=names, label2id={name: i for i, name in names.items()})
    )
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    write_card(facts_of(**facts), folder, "student.md")
    write_manifest(folder, manifest_of(teacher_entry() if taught_by is None else taught_by))
    return folder


@pytest.fixture
def student(tmp_path):
    """A saved student amid all that the stock Trainer leaves beside it."""
    folder = saved(tmp_path / "run")
    for name in ("training_args.bin", "checkpoint-2/optimizer.pt", "checkpoint-2/model.safetensors", "runs/events.out"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(f"hf_{'a' * 34} {os.getcwd()}".encode())
    for name in ("pytorch_model.bin", "trainer_state.json", "notes.txt", ".README.md.tmp", "card_facts.json"):
        (folder / name).write_bytes(b"private")
    return folder


# ---- what goes up ----


def test_exactly_the_allow_list_goes_up_and_holds_no_secret(hub, student):
    """training_args.bin holds the token: one upload of it and the account is anybody's."""
    (student / "figures").mkdir()
    (student / "figures" / "reliability.png").write_bytes(b"\x89PNG")
    with hub.connected():
        done = publish(student, REPO)
        stored = hub.files(REPO)
    assert (
        sorted(stored) == sorted([*UPLOADED, "figures/reliability.png"]) == list(done.files) == allowed_files(student)
    )
    secrets = (hub.token, os.path.expanduser("~") + "/", os.getcwd(), str(student))
    assert not [(name, secret) for name, blob in stored.items() for secret in secrets if secret.encode() in blob]
    assert (done.repo_id, done.revision, done.commit) == (REPO, "main", hub.commits(REPO)[0])
    assert done.url == f"{hub.url}/{REPO}"


def test_a_push_is_one_commit_and_an_equal_one_none(hub, student):
    """A repository is never half a model: whoever pulls between two commits would get the weights without their tokenizer."""
    with hub.connected():
        first = publish(student, REPO)
        before = hub.commits(REPO)
        assert publish(student, REPO).commit == first.commit
        assert hub.commits(REPO) == before and len(before) == 2  # the first one made the repository


def test_what_the_folder_no_longer_has_is_deleted_and_what_is_not_ours_stays(hub, student):
    """An old shard beside new weights is loaded with them; a licence that somebody added is not ours to delete."""
    with hub.connected():
        (student / "results.md").write_text("old")
        publish(student, REPO)
        import huggingface_hub

        huggingface_hub.HfApi().upload_file(path_or_fileobj=b"MIT", path_in_repo="LICENSE", repo_id=REPO)
        (student / "results.md").unlink()
        publish(student, REPO)
    assert sorted(hub.files(REPO)) == sorted([*UPLOADED, "LICENSE"])


def test_a_branch_leaves_the_main_one_as_it_is(hub, student, tmp_path):
    """Round 1 of self-distillation pushed over round 0 makes the comparison of rounds one of a model with itself."""
    with hub.connected():
        publish(student, REPO)
        main = hub.files(REPO)
        other = saved(tmp_path / "other", seed=1)
        done = publish(other, REPO, revision="round-1")
        assert done.revision == "round-1" and done.url.endswith("/tree/round-1")
        assert hub.branches(REPO) == ["main", "round-1"]
        assert hub.files(REPO) == main != hub.files(REPO, "round-1")
        assert (pull(REPO, revision="round-1") / "model.safetensors").read_bytes() == (
            other / "model.safetensors"
        ).read_bytes()


@pytest.mark.parametrize(("path", "how"), [("put", "500"), ("put", "cut"), ("lfs", "500"), ("preupload", "500"),
                                           ("commit", "500"), ("commit", "cut"), ("commit", "429")])  # fmt: skip
def test_an_interrupted_push_leaves_all_whole_and_repeating_it_ends_the_same(hub, student, tmp_path, path, how):
    """A day's training lost to a broken connection, or a repository that holds half of it."""
    before = {file: file.read_bytes() for file in student.rglob("*") if file.is_file()}
    with hub.connected():
        hub.fail(path, times=None, how=how)
        with pytest.raises(ConnectionError, match="it is whole, and the same call goes on"):
            publish(student, REPO)
        assert {file: file.read_bytes() for file in student.rglob("*") if file.is_file()} == before
        assert hub.files(REPO) == {}
        hub.heal()
        publish(student, REPO)
        publish(student, "tester/never-interrupted")
    assert hub.files(REPO) == hub.files("tester/never-interrupted")


def test_a_push_that_is_killed_and_repeated_ends_the_same(hub, student, tmp_path):
    """A machine that is switched off in the middle of a push must cost the push, not the repository."""
    hub.fail("put", how="hang")
    code = f"from hfkd.hub import publish; publish({str(student)!r}, {REPO!r})"
    environment = {**os.environ, **hub.environment, "PYTHONPATH": str(Path(publishing.__file__).parents[1])}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment)
    try:
        while process.poll() is None and not any(method == "PUT" for method, _ in hub.requests):
            time.sleep(0.02)
        assert process.poll() is None, "it ended before it was killed"
    finally:
        process.kill()
        process.wait()
    assert hub.files(REPO) == {}
    with hub.connected():
        publish(student, REPO)
        publish(student, "tester/never-killed")
    assert hub.files(REPO) == hub.files("tester/never-killed") and len(hub.commits(REPO)) == 2


def test_weights_that_arrived_are_not_sent_again(hub, student):
    """Gigabytes sent twice: with a slow line a push that breaks once a gigabyte never ends."""
    with hub.connected():
        hub.fail("commit", times=None)
        with pytest.raises(ConnectionError):
            publish(student, REPO)
        hub.heal()
        publish(student, REPO)
    assert sum(method == "PUT" for method, _ in hub.requests) == 1


def test_a_data_set_goes_up_and_loads(hub, tmp_path):
    """A cache of answers that nobody can load, or whose rows are no longer compared, is worth less than asking again."""
    from datasets import Dataset, load_dataset

    from hfkd import cache_teacher, load_cache
    from hfkd.testing import tiny_rows

    teacher = saved(tmp_path / "teacher")
    rows = Dataset.from_list(tiny_rows(8))
    cached = cache_teacher(rows, teacher, tmp_path / "answers")
    columns = {"teacher_logits": "(3,)"}
    facts = facts_of(role="logits", student="answers", repo_id="tester/answers", rows=8, columns=columns)
    write_card(facts, tmp_path / "answers", "teacher_logits.md")
    with hub.connected():
        done = publish(tmp_path / "answers", "tester/answers", repo_type="dataset")
        assert done.url == f"{hub.url}/datasets/tester/answers"
        loaded = load_dataset("tester/answers", split="train")
        assert loaded["teacher_logits"] == cached["teacher_logits"]
        folder = pull("tester/answers", repo_type="dataset")
        for code in re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL):
            exec(code, {"rows": rows})  # as a reader of the card would
    assert load_cache(folder, rows)["teacher_logits"][:] == cached["teacher_logits"][:]
    with pytest.raises(ValueError, match="data"):
        load_cache(folder, Dataset.from_list(tiny_rows(8, seed=1)))


# ---- what is refused before anything is sent ----


def spoil_card(folder, **changes):
    write_card(facts_of(**changes), folder, "student.md")


def spoil_with_pickle(folder):
    import pickle

    (folder / "model.safetensors").write_bytes(pickle.dumps({"weight": [1.0]}))
    write_manifest(folder, manifest_of(teacher_entry()))


def only_pickles(folder):
    (folder / "model.safetensors").unlink()


def spoil_shards(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00002-of-00002.safetensors"}}')


SPOILED = {
    "no card": (lambda f: (f / "README.md").unlink(), "there is no card"),
    "missing facts": (lambda f: spoil_card(f, command="", results=[]), r"it lacks results \(results\), the command"),
    "no objective": (lambda f: spoil_card(f, objective=""), r"the objective \(objective\)"),
    "nobody's teacher": (lambda f: spoil_card(f, teacher=""), r"the teacher \(teacher;"),
    "broken metadata": (lambda f: (f / "README.md").write_text("---\n a: [\n---\n\nText\n"), "metadata cannot be read"),
    "a missing figure": (
        lambda f: spoil_card(f, limits=["![x](figures/gone.png)"]),
        "figures/gone.png, which is not there",
    ),
    "a pickle in disguise": (spoil_with_pickle, "no whole safetensors file"),
    "only pickles": (only_pickles, "only pytorch_model.bin, training_args.bin, which may be pickles"),
    "a missing shard": (spoil_shards, "model-00002-of-00002.safetensors, which is not there"),
    "no configuration": (lambda f: (f / "config.json").unlink(), "without config.json"),
    "no tokenizer": (lambda f: [p.unlink() for p in f.glob("tokenizer*")], "no tokenizer"),
    "no manifest": (lambda f: (f / MANIFEST_FILE).unlink(), f"no {MANIFEST_FILE}"),
    "other weights": (
        lambda f: RobertaForSequenceClassification(tiny_roberta_config()).save_pretrained(f),
        "model.safetensors changed after",
    ),
    "a token": (lambda f: (f / "results.md").write_text(f"run with hf_{'x1' * 17}"), "what looks like a token"),
    "the working folder": (lambda f: (f / "results.md").write_text(f"in {os.getcwd()}/runs"), "the working folder"),
    "the home folder": (
        lambda f: (f / "metrics.json").write_text(os.path.expanduser("~/data/news")),
        "the home folder",
    ),
    "no folder": (lambda f: f.rename(f.with_name("elsewhere")), "there is no folder"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_folder_that_must_not_be_public_is_refused_before_anything_is_sent(hub, student, name):
    """What is published cannot be taken back: a token, a stranger's pickle, weights under another model's card."""
    spoil, sentence = SPOILED[name]
    spoil(student)
    with hub.connected(), pytest.raises(ValueError, match=sentence):
        publish(student, REPO)
    assert not hub.requests and not hub.repositories()


def test_the_token_in_use_is_found_whatever_it_looks_like(hub, student):
    """Tokens change their shape over the years; a pattern alone lets the next kind through."""
    (student / "results.csv").write_bytes(b"\x00\xffoddly-shaped-secret\x00")
    with hub.connected(), pytest.raises(ValueError, match=r"results\.csv holds a token or key of yours") as found:
        publish(student, REPO, token="oddly-shaped-secret")
    assert "oddly" not in str(found.value), "the message is logged, and logs are shared"


def test_a_push_during_training_may_lack_what_only_the_end_knows(hub, student):
    """Refusing every push before the first evaluation would end the training that the pushes are to save."""
    spoil_card(student, results=[])
    with hub.connected():
        publish(student, REPO, in_progress=True)
    assert "lacks results" in hub.files(REPO)["README.md"].decode()


# ---- a private teacher ----


def test_a_private_teacher_is_not_named_unless_told_so(hub, tmp_path):
    """The name of a customer's unreleased model on a public card."""
    folder = saved(tmp_path / "run", teacher_entry(id=TEACHER, repo=TEACHER), teacher=TEACHER)
    hub.add_repository(TEACHER, {"README.md": b"secret"}, private=True)
    with hub.connected():
        with pytest.raises(ValueError, match="tester/teacher is private"):
            publish(folder, REPO)
        assert hub.repositories() == [TEACHER]
        publish(folder, "tester/named", name_private_teacher=True)
        assert TEACHER.encode() in hub.files("tester/named")["README.md"]
        hidden = facts_of(teacher=TEACHER, teacher_private=True, command=f"run.py --teacher {TEACHER} --seed 1")
        write_card(hidden, folder, "student.md")
        write_manifest(folder, manifest_of(teacher_entry(id=None, private=True)))
        publish(folder, REPO)
    assert not [name for name, blob in hub.files(REPO).items() if TEACHER.encode() in blob]
    assert [link.role for link in lineage(folder)] == ["student", "teacher"] and lineage(folder)[1].repo_id == ""


def test_who_is_private(hub):
    """None taken for "public" publishes a name that nobody could check."""
    hub.add_repository("tester/open", {"a.txt": b""})
    hub.add_repository("tester/closed", {"a.txt": b""}, private=True)
    hub.add_repository("ann/closed", {"a.txt": b""}, private=True)
    assert is_private("tester/open") is None, "offline, nobody can tell"
    with hub.connected():
        assert is_private("tester/open") is False and is_private("tester/closed") is True
        assert is_private("ann/closed") is None and is_private("tester/none") is None and is_private("no name") is None


# ---- access ----


def test_access_gives_the_whole_name(hub):
    """A push to another name than the card's links every card to nothing."""
    with hub.connected():
        assert check_access("student") == check_access("tester/student") == REPO
        assert not hub.repositories(), "asking makes nothing"


@pytest.mark.parametrize(
    ("repo", "token", "error", "sentence"),
    [
        ("student", "", PermissionError, "there is no token.*hf auth login"),
        ("student", "hf_wrong", PermissionError, "token is wrong or has expired"),
        ("ann/student", None, PermissionError, "belongs to ann; the token is that of tester"),
        ("a/b/c", None, ValueError, "refuses the name 'a/b/c'"),
        ("has blank", None, ValueError, "refuses the name"),
        ("", None, ValueError, "has no name"),
    ],
)
def test_what_cannot_be_written_is_said_at_once(hub, student, repo, token, error, sentence):
    """Found out after a day of training, a wrong token costs the evening on which the model was to be shown."""
    changes = {} if token is None else {"HF_TOKEN": token}
    with hub.connected(**changes):
        with pytest.raises(error, match=sentence) as found:
            check_access(repo)
        assert "\n" not in str(found.value)
        with pytest.raises(error, match=sentence):
            publish(student, repo)


def test_a_name_that_only_the_server_refuses(hub, student):
    """The client's rules for names are not all: the server's refusal must read as one sentence too."""
    with hub.connected(), pytest.raises(ValueError, match=r"not published as tester/student\.ipynb.*refused"):
        publish(student, "tester/student.ipynb")


def test_a_public_repository_is_not_written_as_if_it_were_private(hub, student):
    """`private=True` is silently without effect on a repository that exists: the weights would be public."""
    hub.add_repository(REPO, {"a.txt": b""})
    with hub.connected():
        with pytest.raises(ValueError, match="is public, and private=True"):
            publish(student, REPO, private=True)
        assert sorted(hub.files(REPO)) == ["a.txt"]
        publish(student, "tester/closed", private=True)
    assert hub.is_private("tester/closed")


def test_no_network_and_offline_mode(hub, student):
    """An exception of five chained connection errors does not say that the flag in one's own shell is the reason."""
    with pytest.raises(ConnectionError, match="offline mode.*HF_HUB_OFFLINE"):
        check_access(REPO)
    with hub.connected(HF_ENDPOINT="http://127.0.0.1:9"):
        with pytest.raises(ConnectionError, match="connection failed"):
            publish(student, REPO)
        with pytest.raises(ConnectionError, match="cannot be pulled: the Hub cannot be reached, and the cache"):
            pull(REPO)


# ---- what comes back ----


def test_a_published_student_answers_the_same_where_hfkd_is_not_installed(hub, student, tmp_path):
    """A student that only its maker can load is not published."""
    from transformers import AutoTokenizer

    model = RobertaForSequenceClassification.from_pretrained(student).eval()
    with torch.no_grad():
        expected = model(**AutoTokenizer.from_pretrained(student)(TEXT, return_tensors="pt")).logits
    with hub.connected():
        publish(student, REPO)
    code = (
        "import sys\n"
        "sys.path[:] = [path for path in sys.path if 'main' not in path or 'site-packages' in path]\n"
        "class Nothing:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name.split('.')[0] == 'hfkd': raise ImportError('hfkd is not installed here')\n"
        "sys.meta_path.insert(0, Nothing())\n"
        "import torch\n"
        "from transformers import AutoModelForSequenceClassification, AutoTokenizer\n"
        f"model = AutoModelForSequenceClassification.from_pretrained({REPO!r})\n"
        f"inputs = AutoTokenizer.from_pretrained({REPO!r})({TEXT!r}, return_tensors='pt')\n"
        "with torch.no_grad(): print(model(**inputs).logits[0].tolist())\n"
    )
    environment = {**os.environ, **hub.environment}
    run = subprocess.run(
        [sys.executable, "-I", "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert eval(run.stdout.splitlines()[-1]) == expected[0].tolist()


def test_pull_takes_the_allowed_files_only(hub, tmp_path):
    """A stranger's pickle in the cache is one torch.load away from running."""
    theirs = {
        "config.json": b"{}",
        "pytorch_model.bin": b"p",
        "checkpoint-1/model.safetensors": b"s",
        "figures/a.png": b"f",
    }
    hub.add_repository("ann/model", theirs)
    with hub.connected():
        folder = pull("ann/model", folder=tmp_path / "here")
    found = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    assert sorted(name for name in found if not name.startswith(".cache")) == ["config.json", "figures/a.png"]


@pytest.mark.parametrize("into", ["cache", "folder"])
@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_corrupted_download_is_deleted_and_named(hub, student, tmp_path, name, into):
    """One flipped byte changes predictions and nothing else; kept in the cache, it does so in every later run."""
    folder = None if into == "cache" else tmp_path / "pulled"
    with hub.connected():
        publish(student, REPO)
        hub.fail(f"/{name}", how="corrupt")
        with pytest.raises(OSError, match=rf"corrupted: {name} ") as found:
            pull(REPO, folder=folder)
        assert not isinstance(found.value, ConnectionError)
        again = pull(REPO, folder=folder)
    assert (again / name).read_bytes() == (student / name).read_bytes()


def test_a_download_that_was_cut_goes_on(hub, student):
    """Half a file under the whole file's name loads as a model with random layers."""
    with hub.connected():
        publish(student, REPO)
        hub.fail("model.safetensors", how="cut", times=1)
        assert (pull(REPO) / "model.safetensors").read_bytes() == (student / "model.safetensors").read_bytes()


def test_weights_exchanged_after_publishing_are_noticed(hub, student, tmp_path):
    """The card's scores would be read as those of weights that somebody put there later."""
    import huggingface_hub

    other = saved(tmp_path / "other", seed=1) / "model.safetensors"
    with hub.connected():
        publish(student, REPO)
        huggingface_hub.HfApi().upload_file(path_or_fileobj=other, path_in_repo="model.safetensors", repo_id=REPO)
        with pytest.raises(OSError, match=r"model\.safetensors.*was changed after"):
            pull(REPO)


def test_pull_without_a_network_takes_the_cache(hub, student):
    """A train without a network is where people read what they pulled the evening before."""
    with hub.connected():
        publish(student, REPO)
        folder = pull(REPO)
    with hub.connected(HF_ENDPOINT="http://127.0.0.1:9"):
        assert pull(REPO) == folder
        with pytest.raises(ConnectionError, match="cannot be pulled: the Hub cannot be reached, and the cache"):
            pull("tester/other")


@pytest.mark.parametrize(
    ("repo", "revision", "sentence"),
    [("tester/none", None, "no such repository"), (REPO, "none", "no such branch")],
)
def test_pulling_what_is_not_there(hub, student, repo, revision, sentence):
    """ "404 Client Error" with a URL of the API does not say that the branch is misspelt."""
    with hub.connected():
        publish(student, REPO)
        with pytest.raises(ValueError, match=sentence):
            pull(repo, revision=revision)


# ---- lineage ----


def test_lineage_follows_the_manifests_to_the_start(hub, tmp_path):
    """Whoever audits a model asks what it was taught by, and by what that was taught."""
    grand, teacher, student = "tester/grand", TEACHER, REPO
    with hub.connected():
        made = saved(tmp_path / "grand", {}, role="teacher", repo_id=grand, start="ann/start")
        write_manifest(made, {"role": "teacher", "teacher": None})
        first = publish(made, grand)
        link = teacher_entry(id=grand, repo=grand, revision=first.commit, weights="cd" * 32)
        publish(saved(tmp_path / "teacher", link), teacher)
        publish(saved(tmp_path / "student", teacher_entry(id=teacher, repo=teacher)), student)
        found = lineage(student)
    assert [(link.repo_id, link.revision, link.role, link.found) for link in found] == [
        (student, "", "student", True),
        (teacher, "", "teacher", True),
        (grand, first.commit, "teacher", True),
        ("ann/start", "", "start", False),
    ]
    assert [link.objective for link in found] == ["KD", "KD", "", ""]
    assert [link.weights for link in found] == ["", "ab" * 32, "cd" * 32, ""]


def test_lineage_ends(hub, tmp_path):
    """Two that taught each other are followed for ever; a local folder's name is a stranger's repository on the Hub."""
    hub.add_repository("tester/tiny-teacher", {"README.md": b"a stranger"})
    own = saved(tmp_path / "own", teacher_entry(id=REPO, repo=REPO))
    with hub.connected():
        publish(own, REPO)
        assert [link.repo_id for link in lineage(REPO)] == [REPO]
        local = saved(tmp_path / "local", teacher_entry(id="tiny-teacher"))
        assert [(link.repo_id, link.found) for link in lineage(local)] == [(str(local), True), ("tiny-teacher", False)]
        assert [(link.repo_id, link.found) for link in lineage("tester/none")] == [("tester/none", False)]


def test_publishing_itself_names_only_what_it_offers():
    """A name that is imported from here and moves breaks other people's programs."""
    assert all(hasattr(publishing, name) for name in publishing.__all__) and Path(publishing.__file__).name == "hub.py"
