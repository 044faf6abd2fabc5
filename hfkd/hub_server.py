"""A Hugging Face Hub on the loopback interface, for tests: the real clients talk to it, and it can be told to fail.

with HubServer(tmp_path) as hub, hub.connected():
    hub.fail("put", after=1, how="500")  # the second uploaded file
    model.push_to_hub("tester/student")

It serves what `huggingface_hub`, `transformers` and `datasets` ask for when they create, upload, list and download models and
datasets. Status codes, headers and limits follow what the clients' code expects and the Hub's documentation says; they were not
compared with the Hub itself. Not served: Xet storage (switched off), pull requests, organisations, Spaces, gated repositories.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch
from urllib.parse import parse_qs, quote, unquote

import yaml

try:
    import uvicorn
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import FileResponse, JSONResponse, Response
except ImportError as error:
    raise ImportError(f"HubServer needs starlette and uvicorn ({error}): pip install 'hfkd[dev]'") from error

Files = dict[str, str]  # path -> SHA-256 of the content

_REPO, _REVISION = r"(?P<repo>[^/]+(?:/[^/]+)?)", r"(?P<revision>[^/]+)"
_API, _PLAIN = rf"/api/(?P<kind>models|datasets)/{_REPO}", rf"/(?:(?P<kind>datasets)/)?{_REPO}"
_ROUTES = {
    "whoami": ("GET", r"/api/whoami-v2"),
    "create": ("POST", r"/api/repos/create"),
    "validate-yaml": ("POST", r"/api/validate-yaml"),
    "preupload": ("POST", rf"{_API}/preupload/{_REVISION}"),
    "lfs": ("POST", rf"{_PLAIN}\.git/info/lfs/objects/batch"),
    "put": ("PUT", r"/objects/(?P<oid>[0-9a-f]{64})"),
    "commit": ("POST", rf"{_API}/commit/{_REVISION}"),
    "resolve": ("GET HEAD", rf"{_PLAIN}/resolve/{_REVISION}/(?P<path>.+)"),
    "tree": ("GET", rf"{_API}/tree/{_REVISION}(?:/(?P<path>.+))?"),
    "paths-info": ("POST", rf"{_API}/paths-info/{_REVISION}"),
    "refs": ("GET", rf"{_API}/refs"),
    "branch": ("POST DELETE", rf"{_API}/branch/{_REVISION}"),
    "tag": ("POST DELETE", rf"{_API}/tag/{_REVISION}"),
    "info": ("GET", rf"{_API}(?:/revision/{_REVISION})?"),
}
_LARGE = 10 * 2**20  # bytes: the Hub takes larger files through LFS only
_BINARY = re.compile(r".*\.(safetensors|bin|pt|pth|pkl|h5|onnx|msgpack|parquet|arrow|npz|npy|png|jpe?g|zip|gz)")
_WRONG_TOKEN = "Invalid credentials in Authorization header"  # the client looks for these words
_OF_THE_HUB = ".gitattributes"  # every new repository has it


class HubServer:
    """Serves the folder `directory`, in which it keeps its repositories, at a free port of 127.0.0.1 inside `with`.

    url, token (made at run time), user: what a client needs. requests: (method, path) of all that came, in order.
    """

    user = "tester"

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory).resolve()
        self.token = f"hf_{secrets.token_hex(17)}"
        self.url = ""
        self.requests: list[tuple[str, str]] = []
        self._faults: list[_Fault] = []
        self._store = _Store(self.directory)
        self._lock = threading.RLock()  # the server's thread and the test's read and write the same folder

    # ------------------------------------------------------------------------------------------------- start and stop

    def __enter__(self) -> HubServer:
        listening = socket.socket()
        listening.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        config = uvicorn.Config(self._serve, interface="asgi3", loop="asyncio", lifespan="off", log_level="error")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([listening],), daemon=True)
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                raise RuntimeError("the loopback Hub did not start")
            time.sleep(0.005)
        return self

    def __exit__(self, *error: object) -> None:
        self._server.should_exit = self._server.force_exit = True  # forced: a request that hangs would never end
        self._thread.join()

    @property
    def environment(self) -> dict[str, str]:
        """What to add to a child's environment before it starts, so that its libraries use this Hub and a cache here."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": self.token,
            "HF_HOME": str(self.directory / "home"),
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
            "HF_DATASETS_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",
            "NO_PROXY": "127.0.0.1",
        }

    def connected(self, **changes: str) -> contextlib.AbstractContextManager[None]:
        """This process uses the Hub inside `with`; `changes` to `environment`, such as HF_TOKEN="" or another HF_HOME."""
        return connected_to({**self.environment, **changes})

    # ---------------------------------------------------------------------------------------------- for whoever tests

    def fail(self, path: str, *, after: int = 0, times: int | None = 1, how: str = "500") -> None:
        """Let requests fail: `times` of them (None: all that follow), once `after` have passed.

        path: a name of `_ROUTES` ("preupload", "lfs", "put", "commit", "resolve", ...) or a part of the URL's path.
        how: an HTTP status ("500", "429", "401", ...), "cut" (the connection ends half-way), "hang" (no answer until the
        client leaves) or "corrupt" (a download whose last byte is another). Clients try an upload six times.
        """
        if how not in ("cut", "hang", "corrupt") and not re.fullmatch(r"[45]\d\d", how):
            raise ValueError(f"how is an HTTP status from 400 on, 'cut', 'hang' or 'corrupt', not {how!r}")
        self._faults.append(_Fault(path, after, times, how))

    def heal(self) -> None:
        """Forget what `fail` was told."""
        self._faults.clear()

    def add_repository(
        self, repo_id: str, files: dict[str, bytes], private: bool = False, repo_type: str = "model"
    ) -> str:
        """Put a repository there, of whatever owner, and return its commit."""
        with self._lock:
            facts = self._store.create(f"{repo_type}s", repo_id, private)
            kept = {path: self._store.keep(content) for path, content in files.items()}
            return self._store.commit(facts, "main", {**_files_at(facts, "main")[1], **kept})

    def files(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> dict[str, bytes]:
        """Path -> content, without the `.gitattributes` that the Hub itself puts into every repository."""
        with self._lock:
            _, found = _files_at(self._store.load(f"{repo_type}s", repo_id), revision)
            return {path: self._store.read(sha256) for path, sha256 in found.items() if path != _OF_THE_HUB}

    def repositories(self, repo_type: str = "model") -> list[str]:
        return sorted(unquote(file.stem) for file in (self.directory / f"{repo_type}s").glob("*.json"))

    def branches(self, repo_id: str, repo_type: str = "model") -> list[str]:
        return sorted(self._store.load(f"{repo_type}s", repo_id)["branches"])

    def commits(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> list[str]:
        """The commits that led to a revision, newest first; the last one made the repository."""
        facts = self._store.load(f"{repo_type}s", repo_id)
        found: list[str] = []
        commit: str | None = _files_at(facts, revision)[0]
        while commit:
            found.append(commit)
            commit = facts["commits"][commit]["parent"]
        return found

    def is_private(self, repo_id: str, repo_type: str = "model") -> bool:
        return bool(self._store.load(f"{repo_type}s", repo_id)["private"])

    # ------------------------------------------------------------------------------------------------------- requests

    async def _serve(self, scope: Any, receive: Any, send: Any) -> None:
        request, path = Request(scope, receive), unquote(scope["raw_path"].decode())
        self.requests.append((request.method, path))
        name, groups = _route(request.method, scope["raw_path"].decode())
        how = self._fault(name, request.method, path)
        if how == "hang" or (how == "cut" and request.method != "GET"):
            return await _lose(receive, int(request.headers.get("content-length", 0)), hang_up=how == "cut")
        try:
            body = await request.body()
            if how.isdigit():
                raise _failure(int(how))
            with self._lock:
                response = self._answer(name, groups, request, body)
        except ClientDisconnect:
            return
        except _Refused as refused:
            response = refused.response()
        if how in ("cut", "corrupt"):
            return await _spoil(how, response, receive, send)
        await response(scope, receive, send)

    def _fault(self, name: str, method: str, path: str) -> str:
        for fault in self._faults:
            unseen = method == "HEAD" and fault.how in ("cut", "corrupt")  # it has no body to cut or change
            if fault.times == 0 or unseen or not (fault.path == name or fault.path in path):
                continue
            if fault.after > 0:
                fault.after -= 1
                continue
            fault.times = None if fault.times is None else fault.times - 1
            return fault.how
        return ""

    def _answer(self, name: str, groups: dict[str, str], request: Request, body: bytes) -> Response:
        sent, right = request.headers.get("authorization"), f"Bearer {self.token}"
        if sent not in (None, right) and name != "put":  # blobs go to a signed address, without a token
            raise _Refused(401, _WRONG_TOKEN)
        if not name:
            raise _Refused(404, f"the loopback Hub does not serve {request.method} {request.url.path}")
        return getattr(self, f"_{name.replace('-', '_')}")(_Call(request, body, sent == right, **groups))

    def _readable(self, call: _Call) -> dict[str, Any]:
        """What is stored of the repository. Without a token the Hub does not tell a missing one from a private one."""
        facts = self._store.load(call.kind, call.repo, missing_ok=True)
        if facts and (not facts["private"] or (call.member and self._owns(call.repo))):
            return facts
        raise _Refused(404, "Repository not found", "RepoNotFound") if call.member else _stranger()

    def _writable(self, call: _Call) -> dict[str, Any]:
        facts = self._readable(call)
        if not call.member:
            raise _stranger()
        if not self._owns(call.repo):
            raise _Refused(403, f"you have no write permission on {call.repo}")
        return facts

    def _owns(self, repo_id: str) -> bool:
        return repo_id.startswith(f"{self.user}/")

    # ------------------------------------------------------------------------------------- endpoints: account and names

    def _whoami(self, call: _Call) -> Response:
        if not call.member:
            raise _stranger()
        token = {"type": "access_token", "accessToken": {"displayName": "tests", "role": "write"}}
        return JSONResponse({"type": "user", "name": self.user, "orgs": [], "auth": token})

    def _create(self, call: _Call) -> Response:
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id

        if not call.member:
            raise _stranger()
        wish = call.json()
        repo_id, kind = f"{wish.get('organization') or self.user}/{wish['name']}", f"{wish.get('type') or 'model'}s"
        try:
            validate_repo_id(repo_id)
        except HFValidationError as error:
            raise _Refused(400, str(error)) from error
        if repo_id.endswith(".ipynb") or kind not in ("models", "datasets"):  # the client lets these through
            raise _Refused(400, f"{kind} of the name {repo_id!r} are refused")
        if not self._owns(repo_id):
            raise _Refused(403, f"you have no rights to {kind} under the namespace of {repo_id!r}")
        url = f"{call.url}/{'datasets/' if kind == 'datasets' else ''}{repo_id}"
        if self._store.load(kind, repo_id, missing_ok=True):
            return JSONResponse({"error": f"you already created this {kind[:-1]} repo", "url": url}, 409)
        self._store.create(kind, repo_id, private=wish.get("visibility") == "private")
        return JSONResponse({"url": url, "name": repo_id})

    def _validate_yaml(self, call: _Call) -> Response:
        errors, warnings = check_metadata(call.json()["content"])
        said = {"errors": [{"message": text} for text in errors], "warnings": [{"message": text} for text in warnings]}
        return JSONResponse(said, 400 if errors else 200)

    # ------------------------------------------------------------------------------------------------ endpoints: upload

    def _preupload(self, call: _Call) -> Response:
        _, there = _files_at(self._writable(call), call.revision)
        modes = []
        for file in call.json()["files"]:
            large = _is_large(file["path"], file["size"], base64.b64decode(file["sample"]))
            mode = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            modes.append(mode | ({"oid": self._etag(file["path"], there)} if file["path"] in there else {}))
        return JSONResponse({"files": modes})

    def _lfs(self, call: _Call) -> Response:
        self._writable(call)
        objects = []
        for item in call.json()["objects"]:
            upload = {"upload": {"href": f"{call.url}/objects/{item['oid']}"}}
            there = self._store.object(item["oid"]).is_file()
            objects.append({"oid": item["oid"], "size": item["size"], **({} if there else {"actions": upload})})
        return JSONResponse({"transfer": "basic", "objects": objects})

    def _put(self, call: _Call) -> Response:
        if hashlib.sha256(call.body).hexdigest() != call.oid:
            raise _Refused(400, "the content does not have the announced hash")
        self._store.keep(call.body)
        return Response()

    def _commit(self, call: _Call) -> Response:
        facts = self._writable(call)
        if call.revision not in facts["branches"]:
            raise _Refused(404, f"there is no branch {call.revision}", "RevisionNotFound")
        head, files = _files_at(facts, call.revision)
        header, *changes = [json.loads(line) for line in call.body.splitlines()]
        if header["value"].get("parentCommit", head) != head:
            raise _Refused(412, f"{call.revision} is at {head} now")
        for change in changes:
            self._apply(change["key"], change["value"], files)
        commit = self._store.commit(facts, call.revision, files)
        return JSONResponse({"commitOid": commit, "commitUrl": f"{call.url}/{call.repo}/commit/{commit}"})

    def _apply(self, key: str, value: dict[str, Any], files: Files) -> None:
        path = value["path"]
        if key == "file":
            files[path] = self._store.keep(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            if not self._store.object(value["oid"]).is_file():
                raise _Refused(400, f"the content of {path} was not uploaded")
            files[path] = value["oid"]
        else:
            gone = [name for name in files if name == path or name.startswith(path.rstrip("/") + "/")]
            if not gone:
                raise _Refused(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            for name in gone:
                del files[name]

    # ---------------------------------------------------------------------------------------------- endpoints: download

    def _resolve(self, call: _Call) -> Response:
        commit, files = _files_at(self._readable(call), call.revision)
        headers = {"X-Repo-Commit": commit}
        if call.path not in files:
            raise _Refused(404, "Entry not found", "EntryNotFound", headers)
        headers["ETag"] = f'"{self._etag(call.path, files)}"'
        content = self._store.object(files[call.path])
        return FileResponse(content, headers=headers, media_type="application/octet-stream")

    def _etag(self, path: str, files: Files) -> str:
        row = _row(path, self._store.read(files[path]))
        return row["lfs"]["oid"] if "lfs" in row else row["oid"]

    def _info(self, call: _Call) -> Response:
        facts = self._readable(call)
        commit, files = _files_at(facts, call.revision)
        known = {"id": call.repo, "author": call.repo.split("/")[0], "sha": commit, "private": facts["private"]}
        known |= {"createdAt": facts["created"], "lastModified": facts["commits"][commit]["date"]}
        known |= {"gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": []}
        known["siblings"] = [{"rfilename": path} for path in files]
        if "blobs" in call.request.query_params:
            known["siblings"] = [_row(path, self._store.read(sha256)) for path, sha256 in files.items()]
        if "README.md" in files:
            known["cardData"] = _metadata(self._store.read(files["README.md"]).decode()) or {}
            known["tags"] = known["cardData"].get("tags") or []
        return JSONResponse(known)

    def _rows(self, call: _Call) -> dict[str, dict[str, Any]]:
        """Files and folders by path."""
        _, files = _files_at(self._readable(call), call.revision)
        rows: dict[str, dict[str, Any]] = {}
        for path, sha256 in files.items():
            for folder in [str(parent) for parent in reversed(Path(path).parents)][1:]:
                rows[folder] = {"type": "directory", "path": folder, "size": 0, "oid": _git_oid(folder.encode())}
            rows[path] = _row(path, self._store.read(sha256))
        return rows

    def _tree(self, call: _Call) -> Response:
        rows, folder = self._rows(call), f"{call.path}/" if call.path else ""
        if call.path and rows.get(call.path, {}).get("type") != "directory":
            raise _Refused(404, f"{call.path} does not exist on {call.revision}", "EntryNotFound")
        inside = [row for path, row in rows.items() if path.startswith(folder)]
        if call.request.query_params.get("recursive", "").lower() != "true":
            inside = [row for row in inside if "/" not in row["path"].removeprefix(folder)]
        return JSONResponse(inside)

    def _paths_info(self, call: _Call) -> Response:
        rows, asked = self._rows(call), parse_qs(call.body.decode()).get("paths", [])
        return JSONResponse([rows[path] for path in asked if path in rows])

    # -------------------------------------------------------------------------------------- endpoints: branches and tags

    def _refs(self, call: _Call) -> Response:
        facts = self._readable(call)
        refs: dict[str, list[Any]] = {"converts": []}
        for group, place in (("branches", "heads"), ("tags", "tags")):
            names = facts[group].items()
            refs[group] = [{"name": name, "ref": f"refs/{place}/{name}", "targetCommit": at} for name, at in names]
        return JSONResponse(refs)

    def _branch(self, call: _Call) -> Response:
        return self._reference(call, "branches", call.revision, call.json().get("startingPoint") or "main")

    def _tag(self, call: _Call) -> Response:
        return self._reference(call, "tags", call.json().get("tag") or call.revision, call.revision)

    def _reference(self, call: _Call, group: str, name: str, start: str) -> Response:
        facts = self._writable(call)
        if call.request.method == "DELETE":
            if name not in facts[group] or name == "main":
                raise _Refused(404, f"there is no {name} to delete", "RevisionNotFound")
            del facts[group][name]
        elif name in facts[group]:
            raise _Refused(409, f"Reference already exists: {name}")
        else:
            facts[group][name], _ = _files_at(facts, start)
        self._store.save(facts)
        return Response()


# ------------------------------------------------------------------------------------------------------------- storage


class _Store:
    """Contents under objects/ by their SHA-256, and a file of facts for each repository, written whole or not at all."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        for name in ("objects", "models", "datasets", "home"):
            (directory / name).mkdir(parents=True, exist_ok=True)

    def file(self, kind: str, repo_id: str) -> Path:
        return self.directory / kind / f"{quote(repo_id, safe='')}.json"

    def object(self, sha256: str) -> Path:
        return self.directory / "objects" / sha256

    def load(self, kind: str, repo_id: str, missing_ok: bool = False) -> dict[str, Any]:
        file = self.file(kind, repo_id)
        if not file.is_file():
            if missing_ok:
                return {}
            raise ValueError(f"the loopback Hub has no repository {repo_id!r} among its {kind}")
        return json.loads(file.read_text())

    def save(self, facts: dict[str, Any]) -> None:
        _write(self.file(facts["kind"], facts["id"]), json.dumps(facts).encode())

    def create(self, kind: str, repo_id: str, private: bool) -> dict[str, Any]:
        facts: dict[str, Any] = {"kind": kind, "id": repo_id, "private": private, "created": _now()}
        facts |= {"branches": {}, "tags": {}, "commits": {}}
        self.commit(facts, "main", {_OF_THE_HUB: self.keep(b"*.safetensors filter=lfs\n")})
        return facts

    def keep(self, content: bytes) -> str:
        sha256 = hashlib.sha256(content).hexdigest()
        _write(self.object(sha256), content)
        return sha256

    def read(self, sha256: str) -> bytes:
        return self.object(sha256).read_bytes()

    def commit(self, facts: dict[str, Any], branch: str, files: Files) -> str:
        parent = facts["branches"].get(branch)
        facts["commits"][commit := secrets.token_hex(20)] = {"parent": parent, "date": _now(), "files": files}
        facts["branches"][branch] = commit
        self.save(facts)
        return commit


def _write(file: Path, content: bytes) -> None:
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    temporary.write_bytes(content)
    os.replace(temporary, file)


def _files_at(facts: dict[str, Any], revision: str) -> tuple[str, Files]:
    """Commit and files of a branch, a tag or a commit."""
    commit = facts["branches"].get(revision) or facts["tags"].get(revision) or revision
    if commit not in facts["commits"]:
        raise _Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    return commit, dict(facts["commits"][commit]["files"])


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _is_large(path: str, size: int, start: bytes) -> bool:
    """Whether the Hub wants a file through LFS: large ones and those that are not text."""
    return size > 0 and (size > _LARGE or b"\0" in start or _BINARY.fullmatch(path) is not None)


def _row(path: str, content: bytes) -> dict[str, Any]:
    """A file as the tree tells it (path, oid) and as a repository's list tells it (rfilename, blobId, sha256)."""
    row: dict[str, Any] = {"type": "file", "path": path, "rfilename": path, "size": len(content)}
    if _is_large(path, len(content), content[:512]):
        sha256 = hashlib.sha256(content).hexdigest()
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(content)}\n".encode()
        row["lfs"] = {"oid": sha256, "sha256": sha256, "size": len(content), "pointerSize": len(pointer)}
        content = pointer
    return row | {"oid": _git_oid(content), "blobId": _git_oid(content)}


# ------------------------------------------------------------------------------------------------- requests and answers


@dataclass
class _Fault:
    path: str
    after: int
    times: int | None
    how: str


@dataclass
class _Call:
    request: Request
    body: bytes
    member: bool  # it carries the right token
    kind: str = "models"
    repo: str = ""
    revision: str = "main"
    path: str = ""
    oid: str = ""

    @property
    def url(self) -> str:
        return str(self.request.base_url).rstrip("/")

    def json(self) -> dict[str, Any]:
        return json.loads(self.body or b"{}")


@dataclass(eq=False)
class _Refused(Exception):
    status: int
    message: str
    code: str = ""  # from it the clients choose their exception
    headers: dict[str, str] = field(default_factory=dict)

    def response(self) -> Response:
        told = {"X-Error-Message": self.message.replace("\n", " "), "X-Error-Code": self.code, **self.headers}
        return JSONResponse({"error": self.message}, self.status, {name: text for name, text in told.items() if text})


def _stranger() -> _Refused:
    return _Refused(401, "Invalid username or password.")


def _failure(status: int) -> _Refused:
    if status == 429:  # the window is over at once: clients wait t seconds and one more
        limits = {"RateLimit": '"api";r=0;t=0', "RateLimit-Policy": '"fixed window";"api";q=500;w=300'}
        return _Refused(429, "Too many requests", headers=limits)
    return _Refused(status, _WRONG_TOKEN if status == 401 else "told to fail")


def _route(method: str, path: str) -> tuple[str, dict[str, str]]:
    for name, (methods, pattern) in _ROUTES.items():
        found = re.fullmatch(pattern, path)
        if found and method in methods.split():
            return name, {key: unquote(text) for key, text in found.groupdict().items() if text is not None}
    return "", {}


async def _lose(receive: Any, length: int, hang_up: bool) -> None:
    """Take half of a request, which is not stored, and hang up; or take it all and wait until the client leaves."""
    come = 0
    while (message := await receive())["type"] != "http.disconnect":
        come += len(message.get("body", b""))
        if hang_up and come >= length / 2:
            _close(receive)


async def _spoil(how: str, response: Response, receive: Any, send: Any) -> None:
    """Send half of a download and hang up ("cut"), or all of it with another last byte ("corrupt")."""
    whole = Path(response.path).read_bytes() if isinstance(response, FileResponse) else bytes(response.body)
    part = whole[: len(whole) // 2] if how == "cut" else whole[:-1] + bytes([whole[-1] ^ 1])
    headers = {**response.headers, "content-length": str(len(whole))}
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": response.status_code, "headers": raw})
    await send({"type": "http.response.body", "body": part, "more_body": how == "cut"})
    if how == "cut":
        _close(receive)


def _close(receive: Any) -> None:
    receive.__self__.transport.close()  # of uvicorn's cycle; ASGI has no message for it


# ------------------------------------------------------------------------------------------------------- model cards


def _metadata(card: str) -> Any:
    """What the YAML block between two lines of dashes says; None without a block. Raises yaml.YAMLError."""
    block = re.match(r"\s*---[ \t]*\n(.*?)\n?---[ \t]*(?:\n|$)", card.replace("\r\n", "\n"), re.DOTALL)
    return yaml.safe_load(block[1]) if block else None


def check_metadata(card: str) -> tuple[list[str], list[str]]:
    """Errors and warnings about a card's metadata: a part of what the Hub checks, from its documentation."""
    try:
        metadata = _metadata(card)
    except yaml.YAMLError as error:
        return [f"the YAML block cannot be read: {error}"], []
    if not metadata:
        return [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(metadata, dict):
        return ["the YAML block must hold names and values"], []
    errors = []
    for name in ("license", "pipeline_tag", "library_name", "base_model_relation"):
        if not isinstance(metadata.get(name, ""), str):
            errors.append(f'"{name}" must be a string, not {metadata[name]!r}')
    for name in ("tags", "metrics", "language", "datasets", "base_model"):
        value = metadata.get(name, [])
        texts = [value] if isinstance(value, str) and name not in ("tags", "metrics") else value
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            errors.append(f'"{name}" must be a list of strings, not {value!r}')
        elif name in ("datasets", "base_model"):
            wrong = [text for text in texts if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", text)]
            errors += [f'"{name}" with value {text!r} is not valid: use an id of the Hub' for text in wrong]
    return errors + _missing(metadata.get("model-index", []), "model-index"), []


_DEMANDED: dict[str, Any] = {
    "name": {},
    "results": {"task": {"type": {}}, "dataset": {"type": {}, "name": {}}, "metrics": {"type": {}, "value": {}}},
}


def _missing(value: Any, place: str, demanded: dict[str, Any] = _DEMANDED) -> list[str]:
    """What the Hub demands of `model-index` and is not there; every entry of a list must have it."""
    if isinstance(value, list):
        return [text for i, item in enumerate(value) for text in _missing(item, f"{place}[{i}]", demanded)]
    errors = []
    for name, inner in demanded.items():
        found, inside = value.get(name) if isinstance(value, dict) else None, f"{place}.{name}"
        errors += [f'"{inside}" is required'] if found in (None, "") else _missing(found, inside, inner)
    return errors


# ------------------------------------------------------------------------------------------------------- this process


@contextlib.contextmanager
def connected_to(environment: dict[str, str]) -> Iterator[None]:
    """As `HubServer.connected`, also in a process that was forked after the libraries had read their environment.

    They read it once, when they are imported: this sets the copies that they keep, and puts everything back. The clients'
    waits between two attempts are left out. Caches that a library opened before keep their place.
    """
    import datasets.config
    import huggingface_hub
    from huggingface_hub import constants, file_download, hf_api
    from huggingface_hub.utils import _cache_manager, _http
    from transformers.utils import hub as transformers_hub

    url, home = environment["HF_ENDPOINT"], Path(environment["HF_HOME"])
    at_once = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
    of_the_hub: dict[str, Any] = {
        "ENDPOINT": url,
        "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_URL_HOSTS": constants.HF_URL_HOSTS | {"127.0.0.1"},
        "HF_HUB_OFFLINE": environment["HF_HUB_OFFLINE"] == "1",
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": False,
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HUGGINGFACE_HUB_CACHE": str(home / "hub"),
        "HF_ASSETS_CACHE": str(home / "assets"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
    }
    of_datasets: dict[str, Any] = {
        "HF_ENDPOINT": url,
        "HUB_DATASETS_URL": url + "/datasets/{repo_id}/resolve/{revision}/{path}",
        "HF_HUB_OFFLINE": of_the_hub["HF_HUB_OFFLINE"],
        "HF_DATASETS_OFFLINE": of_the_hub["HF_HUB_OFFLINE"],
        "HF_UPDATE_DOWNLOAD_COUNTS": False,
        "HF_DATASETS_CACHE": home / "datasets",
        "DOWNLOADED_DATASETS_PATH": home / "datasets" / "downloads",
        "EXTRACTED_DATASETS_PATH": home / "datasets" / "downloads" / "extracted",
    }
    changes: list[tuple[Any, dict[str, Any]]] = [
        (constants, of_the_hub),
        (datasets.config, of_datasets),
        (hf_api.api, {"endpoint": url}),  # behind huggingface_hub.upload_folder and the other functions
        (transformers_hub, {"_hf_api": None}),
        (_cache_manager, {"HF_HUB_CACHE": of_the_hub["HF_HUB_CACHE"]}),
        (_http, {"time": at_once}),
        (file_download, {"time": at_once}),
    ]
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.dict(os.environ, environment))
        for owner, values in changes:
            stack.enter_context(patch.multiple(owner, **values))
        for forget in (huggingface_hub.close_session, huggingface_hub.HfFileSystem.clear_instance_cache):
            forget()
            stack.callback(forget)
        yield
