"""The loopback Hub against the real clients: what they push is what they pull, and what fails leaves the rest whole."""

import contextlib
import hashlib
import importlib.util
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import huggingface_hub
import pytest
import torch
from httpx2 import TransportError
from huggingface_hub import constants, hf_hub_download, snapshot_download, upload_folder
from huggingface_hub.errors import (
    BadRequestError,
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import AutoTokenizer, RobertaForSequenceClassification, Trainer, TrainingArguments

import hfkd.hub_server
import hfkd.testing
from hfkd.hub_server import HubServer, check_metadata
from hfkd.testing import tiny_roberta_config, tiny_tokenizer

REPO = "tester/student"
WEIGHTS = {"one.safetensors": os.urandom(300_000), "two.safetensors": os.urandom(400_000)}
FILES = {**WEIGHTS, "config.json": b'{"a": 1}', "figures/a.txt": b"text", "empty.txt": b""}


@pytest.fixture
def folder(tmp_path):
    for name, content in FILES.items():
        (tmp_path / "student" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "student" / name).write_bytes(content)
    return tmp_path / "student"


def push(folder, **settings):
    huggingface_hub.create_repo(REPO, exist_ok=True)
    return upload_folder(repo_id=REPO, folder_path=folder, **settings)


def sent(hub, content=None):
    """The blobs that clients sent, or how often this one."""
    blobs = [path.rsplit("/", 1)[1] for method, path in hub.requests if method == "PUT"]
    return blobs if content is None else blobs.count(hashlib.sha256(content).hexdigest())


# ---------------------------------------------------------------------------------------------------- push and pull


def test_a_folder_comes_back_as_it_was_pushed(hub, folder):
    """Weights that change on the way would make every published number wrong."""
    with hub.connected():
        info = push(folder)
        pulled = Path(snapshot_download(REPO))
        assert sorted(huggingface_hub.list_repo_files(REPO)) == sorted([*FILES, ".gitattributes"])
        assert huggingface_hub.model_info(REPO).sha == info.oid == hub.commits(REPO)[0]
    assert {name: (pulled / name).read_bytes() for name in FILES} == FILES == hub.files(REPO)
    assert sorted(sent(hub)) == sorted(hashlib.sha256(content).hexdigest() for content in WEIGHTS.values())


def test_an_unchanged_folder_makes_no_commit_and_sends_nothing(hub, folder):
    """A push after every epoch would fill the history with copies."""
    with hub.connected():
        push(folder)
        blobs, commits = sent(hub), hub.commits(REPO)
        push(folder)
        assert (sent(hub), hub.commits(REPO)) == (blobs, commits)
        (folder / "config.json").write_bytes(b"{}")
        (folder / "figures" / "a.txt").unlink()
        push(folder, delete_patterns=["figures/*"])
    assert hub.commits(REPO)[1:] == commits and sent(hub) == blobs
    assert hub.files(REPO) == {**WEIGHTS, "config.json": b"{}", "empty.txt": b""}


def test_a_model_and_its_tokenizer_load_from_the_hub(hub, tmp_path):
    """A student that transformers cannot load without hfkd is not published."""
    model = RobertaForSequenceClassification(tiny_roberta_config()).eval()
    with hub.connected():
        model.push_to_hub(REPO, private=True)
        tiny_tokenizer().push_to_hub(REPO)
        loaded = RobertaForSequenceClassification.from_pretrained(REPO).eval()
        ids = AutoTokenizer.from_pretrained(REPO)("w7 w9", return_tensors="pt")
        before = len(hub.requests)
        RobertaForSequenceClassification.from_pretrained(REPO)
        again = hub.requests[before:]
    assert torch.equal(model(**ids).logits, loaded(**ids).logits)
    assert hub.is_private(REPO)
    assert again and not [path for method, path in again if method == "GET" and "/resolve/" in path], (
        "the cache is warm"
    )


def test_a_data_set_comes_back_row_for_row(hub):
    """Teacher logits that come back in another order would teach every example another one's answer."""
    rows = datasets.Dataset.from_dict({"text": [f"row {i}" for i in range(50)], "logits": [[i, -i] for i in range(50)]})
    with hub.connected():
        rows.push_to_hub("tester/logits", split="validation")
        rows.select([3]).push_to_hub("tester/logits", split="test")
        loaded = datasets.load_dataset("tester/logits")
    assert loaded["validation"].to_dict() == rows.to_dict() and loaded["test"]["text"] == ["row 3"]
    (cached,) = loaded["test"].cache_files
    assert Path(cached["filename"]).is_relative_to(hub.directory), "the user's own cache is left alone"
    assert hub.repositories("dataset") == ["tester/logits"] and hub.repositories() == []


def test_branches_and_tags_keep_their_own_files(hub, folder):
    """Rounds of self-distillation go to branches: one that overwrites another's weights loses a round."""
    with hub.connected():
        first = push(folder).oid
        huggingface_hub.create_branch(REPO, branch="rounds/1")
        (folder / "config.json").write_bytes(b"round 1")
        second = push(folder, revision="rounds/1").oid
        huggingface_hub.create_tag(REPO, tag="v1", revision="rounds/1")
        refs = huggingface_hub.list_repo_refs(REPO)
        assert Path(hf_hub_download(REPO, "config.json", revision="v1")).read_bytes() == b"round 1"
        with pytest.raises(HfHubHTTPError, match="already exists"):
            huggingface_hub.create_branch(REPO, branch="rounds/1")
        huggingface_hub.create_branch(REPO, branch="rounds/1", exist_ok=True)
        with pytest.raises(RevisionNotFoundError):
            snapshot_download(REPO, revision="rounds/2")
    assert {ref.name: ref.target_commit for ref in refs.branches} == {"main": first, "rounds/1": second}
    assert {ref.name: ref.target_commit for ref in refs.tags} == {"v1": second}
    assert hub.branches(REPO) == ["main", "rounds/1"]
    assert hub.files(REPO)["config.json"] == FILES["config.json"]
    assert hub.files(REPO, first) == FILES and hub.files(REPO, "v1")["config.json"] == b"round 1"


def test_the_tree_lists_folders_and_sizes(hub, folder):
    """The clients find sub-folders and skip downloads by what the tree says."""
    with hub.connected():
        push(folder)
        system = huggingface_hub.HfFileSystem()
        assert sorted(system.ls(REPO, detail=False)) == [f"{REPO}/{name}" for name in (".gitattributes", "config.json",
            "empty.txt", "figures", "one.safetensors", "two.safetensors")]  # fmt: skip
        assert system.info(f"{REPO}/one.safetensors")["size"] == 300_000
        found = huggingface_hub.HfApi().get_paths_info(REPO, ["figures", "two.safetensors", "nothing"])
        assert [item.path for item in found] == ["figures", "two.safetensors"]
        assert found[1].lfs.sha256 == hashlib.sha256(WEIGHTS["two.safetensors"]).hexdigest()
        with pytest.raises(RemoteEntryNotFoundError):
            list(huggingface_hub.HfApi().list_repo_tree(REPO, "nothing"))
        with pytest.raises(RemoteEntryNotFoundError):
            hf_hub_download(REPO, "nothing.txt")


def test_a_part_of_a_file_is_that_part(hub, folder):
    """Readers of safetensors headers ask for a range; another range reads as another tensor."""
    with hub.connected():
        push(folder)
        with huggingface_hub.HfFileSystem().open(f"{REPO}/one.safetensors", block_size=1000) as file:
            file.seek(12_345)
            assert file.read(77) == WEIGHTS["one.safetensors"][12_345:12_422]


def test_another_process_sees_the_same_hub(hub, folder, tmp_path):
    """Training and evaluating are two processes; offline settings of the first must not reach the second."""
    code = f"import huggingface_hub as h; print(h.whoami()['name'], h.snapshot_download({REPO!r}))"
    with hub.connected():
        push(folder)
    for environment in (hub.environment, {**hub.environment, "HF_HOME": str(tmp_path / "cold")}):
        done = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=True
        )
        name, pulled = done.stdout.split()
        assert name == "tester" and pulled.startswith(environment["HF_HOME"])
        assert Path(pulled, "two.safetensors").read_bytes() == WEIGHTS["two.safetensors"]


def test_a_hub_that_starts_again_has_what_it_had(tmp_path, folder):
    """What is on disk is what a later session of the same tests sees."""
    with HubServer(tmp_path / "hub") as hub, hub.connected():
        push(folder)
    with HubServer(tmp_path / "hub") as hub, hub.connected():
        assert hub.files(REPO) == FILES
        push(folder)
        assert len(hub.commits(REPO)) == 2 and sent(hub) == []


# -------------------------------------------------------------------------------------------------------------- cards


def test_a_card_is_pushed_and_read_back(hub):
    """The card's metadata is how others find the student's teacher."""
    text = "---\nbase_model: org/teacher\ntags: [hfkd]\ndatasets: [glue]\nlicense: mit\n---\n# A student"
    with hub.connected():
        huggingface_hub.create_repo(REPO)
        huggingface_hub.ModelCard(text).push_to_hub(REPO)
        assert huggingface_hub.ModelCard.load(REPO).data.base_model == "org/teacher"
        assert huggingface_hub.model_info(REPO).card_data.tags == ["hfkd"]
        with pytest.raises(ValueError, match="base_model"):
            huggingface_hub.ModelCard(text.replace("org/teacher", "/home/me/teacher")).push_to_hub(REPO)
    assert len(hub.commits(REPO)) == 2


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        ("tags: [a\n", "cannot be read"),
        ("- a", "names and values"),
        ("tags: a", '"tags" must be'),
        ("datasets: [1]", '"datasets" must be'),
        ("base_model: ../teacher", '"base_model" with value'),
        ("license: [mit]", '"license" must be'),
        ("model-index: [{name: a}]", "model-index[0].results"),
        ("model-index: [{name: a, results: [{dataset: {type: b}, metrics: [{type: c}]}]}]", "results[0].dataset.name"),
        ("model-index: [{name: a, results: [{metrics: [{type: c}]}]}]", "metrics[0].value"),
        ("model-index: 3", "model-index.name"),
    ],
)
def test_metadata_that_the_hub_refuses(metadata, problem):
    """Refused by the Hub after hours of training, and accepted here before: a test that lets it pass is worth nothing."""
    errors, _ = check_metadata(f"---\n{metadata}\n---\ntext")
    assert any(problem in error for error in errors), errors


def test_a_stock_trainer_can_push(hub, tmp_path):
    """Our trainers push through the stock one's methods: a Hub that refuses its card refuses them all."""
    rows = datasets.Dataset.from_list([{"input_ids": [0, 7, 2], "labels": i % 2} for i in range(4)])
    arguments = TrainingArguments(
        str(tmp_path / "out"),
        push_to_hub=True,
        hub_model_id=REPO,
        max_steps=2,
        save_steps=1,
        report_to="none",
        use_cpu=True,
    )
    with hub.connected():
        trainer = Trainer(RobertaForSequenceClassification(tiny_roberta_config()), arguments, train_dataset=rows)
        trainer.train()
        trainer.push_to_hub()
    assert {"model.safetensors", "config.json", "README.md"} < set(hub.files(REPO))


def test_metadata_that_the_hub_takes():
    """A check that refuses good cards would stop every push."""
    result = huggingface_hub.EvalResult("text-classification", "glue", "GLUE", "accuracy", 0.0)
    card = huggingface_hub.ModelCardData(
        base_model="a/b", datasets=["glue"], tags=["hfkd"], license="mit", language="en", model_name="s", eval_results=[result]
    )  # fmt: skip
    assert check_metadata(f"---\n{card}\n---\n# A student") == ([], [])
    assert check_metadata("# No block")[1]


# ------------------------------------------------------------------------------------------------------------ failures


def test_a_server_error_on_the_second_file_leaves_no_half_a_repository(hub, folder):
    """A commit without its weights would be a published student that nobody can load."""
    hub.fail("put", after=1, times=None, how="500")
    with hub.connected():
        with pytest.raises(RuntimeError, match="safetensors"):
            push(folder)
        assert hub.files(REPO) == {}
        (first,) = {blob for blob in sent(hub) if (hub.directory / "objects" / blob).exists()}
        hub.heal()
        push(folder)
    assert hub.files(REPO) == FILES
    assert sent(hub).count(first) == 1, "what had come was sent again"


def test_one_server_error_is_tried_again(hub, folder):
    """An upload of an hour must not end at one hiccup."""
    hub.fail("put", after=1)
    with hub.connected():
        push(folder)
    assert hub.files(REPO) == FILES and len(sent(hub)) == 3


def test_a_push_cut_in_the_middle_of_a_file_goes_on_where_it_was(hub, folder):
    """Gigabytes of weights are sent again and again on a bad line."""
    hub.fail(hashlib.sha256(WEIGHTS["two.safetensors"]).hexdigest(), times=None, how="cut")
    with hub.connected():
        with pytest.raises(RuntimeError, match="two.safetensors") as raised:
            push(folder)
        assert isinstance(raised.value.__cause__, OSError | TransportError)
        assert hub.files(REPO) == {} and sent(hub, WEIGHTS["one.safetensors"]) == 1
        hub.heal()
        push(folder)
    assert hub.files(REPO) == FILES and sent(hub, WEIGHTS["one.safetensors"]) == 1
    assert {file.name[0] for file in hub.directory.glob("objects/*")} != {"."}


def test_a_push_killed_before_its_last_file_goes_on_where_it_was(hub, folder):
    """A job that ends at its time limit while it uploads must not cost the upload, let alone the model."""
    two = hashlib.sha256(WEIGHTS["two.safetensors"]).hexdigest()
    hub.fail(two, how="hang")
    code = f"import huggingface_hub as h; h.create_repo({REPO!r}); h.upload_folder(repo_id={REPO!r}, folder_path={str(folder)!r})"
    child = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, **hub.environment}, stderr=subprocess.DEVNULL
    )
    one = hub.directory / "objects" / hashlib.sha256(WEIGHTS["one.safetensors"]).hexdigest()
    while not (one.exists() and two in sent(hub)):
        assert child.poll() is None
        time.sleep(0.01)
    child.kill()
    child.wait()
    with hub.connected():
        assert hub.files(REPO) == {}
        push(folder)
    assert hub.files(REPO) == FILES and sent(hub, WEIGHTS["one.safetensors"]) == 1 and len(hub.commits(REPO)) == 2


def test_a_failed_commit_is_no_commit(hub, folder):
    """The clients do not try a commit again: whoever repeats the push must find the repository as it was."""
    hub.fail("commit", how="cut")
    hub.fail("commit", how="500")
    with hub.connected():
        for error in (TransportError, HfHubHTTPError):
            with pytest.raises(error):
                push(folder)
            assert hub.files(REPO) == {}
        push(folder)
    assert hub.files(REPO) == FILES and len(sent(hub)) == 2


def test_a_commit_on_top_of_another_state_is_refused(hub, folder):
    """Two runs that push to one repository must not undo each other's files unseen; nor may a blob have another hash."""
    with hub.connected():
        first = push(folder).oid
        (folder / "config.json").write_bytes(b"another run")
        push(folder)
        (folder / "config.json").write_bytes(b"this run")
        with pytest.raises(HfHubHTTPError, match="412"):
            push(folder, parent_commit=first)
        with pytest.raises(RevisionNotFoundError):
            push(folder, revision="round-1")
        answer = huggingface_hub.get_session().put(f"{hub.url}/objects/{'0' * 64}", content=b"something else")
    assert answer.status_code == 400 and hub.files(REPO)["config.json"] == b"another run"


def test_a_server_stops_while_a_request_hangs(tmp_path):
    """A client that waits for ever would keep the whole run of tests waiting."""
    with HubServer(tmp_path) as hub, hub.connected():
        hub.fail("whoami", how="hang")
        with contextlib.suppress(HfHubHTTPError, TransportError), ThreadPoolExecutor() as pool:
            waiting = pool.submit(huggingface_hub.whoami)
            while not hub.requests:
                time.sleep(0.01)
            hub.__exit__()
            waiting.result(timeout=20)


def test_a_download_that_was_cut_continues_with_the_missing_part(hub, folder):
    """A file put together wrongly has the right size and the wrong weights."""
    hub.fail("resolve/main/one.safetensors", how="cut")
    with hub.connected():
        push(folder)
        assert Path(hf_hub_download(REPO, "one.safetensors")).read_bytes() == WEIGHTS["one.safetensors"]
    assert [method for method, path in hub.requests if path.endswith("one.safetensors")] == ["HEAD", "GET", "GET"]


def test_a_corrupted_download_differs_in_its_last_byte(hub, folder):
    """The clients do not compare hashes: without a check of our own, wrong weights are used."""
    hub.fail("one.safetensors", how="corrupt")
    with hub.connected():
        push(folder)
        came = Path(hf_hub_download(REPO, "one.safetensors")).read_bytes()
    assert came[:-1] == WEIGHTS["one.safetensors"][:-1] and came[-1] != WEIGHTS["one.safetensors"][-1]


def test_a_rate_limit_is_waited_for_and_then_told(hub, folder):
    """A push that gives up at the first 429 fails for everybody who has many repositories."""
    hub.fail("preupload", times=2, how="429")
    with hub.connected():
        push(folder)
        assert hub.files(REPO) == FILES
        hub.fail("whoami", how="429")
        with pytest.raises(HfHubHTTPError, match="rate limit"):
            huggingface_hub.whoami()


# -------------------------------------------------------------------------------------------------------- permissions


def test_a_wrong_token_and_none(hub, folder):
    """Who has no right to a repository must hear so, and not that it does not exist."""
    with hub.connected():
        push(folder)
    with hub.connected(HF_TOKEN="hf_wrong"):
        with pytest.raises(HfHubHTTPError, match="Invalid user token") as raised:
            huggingface_hub.whoami()
        assert raised.value.response.status_code == 401
        with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
            huggingface_hub.model_info(REPO)
    with hub.connected(HF_TOKEN=""):
        with pytest.raises(LocalTokenNotFoundError):
            huggingface_hub.whoami()
        assert huggingface_hub.model_info(REPO).private is False, "everybody may read what is public"
        with pytest.raises(HfHubHTTPError):
            upload_folder(repo_id=REPO, folder_path=folder)
    assert hub.token not in repr(hub.requests)


def test_what_belongs_to_another(hub, folder):
    """A push into another's repository must fail before the weights are sent."""
    hub.add_repository("other/open", {"config.json": b"{}"})
    hub.add_repository("other/secret", {"config.json": b"{}"}, private=True)
    with hub.connected():
        assert huggingface_hub.model_info("other/open").author == "other"
        with pytest.raises(HfHubHTTPError, match="403 Forbidden"):
            upload_folder(repo_id="other/open", folder_path=folder)
        with pytest.raises(HfHubHTTPError, match="403 Forbidden"):
            huggingface_hub.create_repo("other/new")
        for missing in ("other/secret", "other/nothing", "tester/nothing"):
            with pytest.raises(RepositoryNotFoundError):
                snapshot_download(missing)
        with pytest.raises(OSError, match="is not a valid model identifier"):
            RobertaForSequenceClassification.from_pretrained("other/secret")
    assert hub.files("other/open") == {"config.json": b"{}"} and sent(hub) == []


@pytest.mark.parametrize("name", ["tester/student.ipynb", "student.ipynb"])
def test_names_that_only_the_hub_refuses(hub, name):
    """The client's own check lets them through: the answer comes after the training."""
    with hub.connected(), pytest.raises(BadRequestError, match="refused"):
        huggingface_hub.create_repo(name)
    assert hub.repositories() == []


@pytest.mark.parametrize("name", ["a--b", "a..b", "-a", "a.git", "x" * 97, "a b"])
def test_names_that_everybody_refuses(hub, name):
    """Another client than ours, or none, must hear the same."""
    with hub.connected():
        session = huggingface_hub.get_session()
        token = {"authorization": f"Bearer {hub.token}"}
        answer = session.post(f"{hub.url}/api/repos/create", json={"name": name}, headers=token)
    assert answer.status_code == 400 and answer.json()["error"]


# --------------------------------------------------------------------------------------------------- what is left over


def test_a_process_is_as_before_after_it_was_connected(hub):
    """A test that stays connected sends the next one's pushes to a server that is gone, or to the Hub itself."""

    def now():  # fmt: skip
        return [
            dict(vars(constants)),
            dict(vars(datasets.config)),
            dict(os.environ),
            huggingface_hub.hf_api.api.endpoint,
        ]

    before = now()
    with pytest.raises(KeyError), hub.connected():
        assert huggingface_hub.whoami()["name"] == "tester" and now() != before
        raise KeyError
    assert now() == before
    with pytest.raises(OfflineModeIsEnabled):
        huggingface_hub.model_info(REPO)


def test_without_the_packages_of_the_server(monkeypatch):
    """Who writes an objective imports hfkd.testing and has no need of a web server."""
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    spec = importlib.util.spec_from_file_location("another_hub_server", hfkd.hub_server.__file__)
    with pytest.raises(ImportError, match=r"pip install 'hfkd\[dev\]'"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert hfkd.testing.HubServer is HubServer
    with pytest.raises(AttributeError, match="no_such"):
        _ = hfkd.testing.no_such
    monkeypatch.delitem(sys.modules, "hfkd.hub_server")
    another = importlib.util.module_from_spec(
        importlib.util.spec_from_file_location("another_testing", hfkd.testing.__file__)
    )
    monkeypatch.setitem(sys.modules, "another_testing", another)
    another.__spec__.loader.exec_module(another)
    with pytest.raises(ImportError, match="uvicorn"):
        _ = another.HubServer


def test_a_fault_that_does_not_exist(hub):
    """A misspelt fault fails nothing, and its test passes."""
    with pytest.raises(ValueError, match="'explode'"):
        hub.fail("put", how="explode")
