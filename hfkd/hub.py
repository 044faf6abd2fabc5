"""Publishing to the Hugging Face Hub, and pulling from it: the only file of hfkd that talks to a network.

What goes up and what comes down is the allow-list of `hfkd.publishable`.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hfkd.cards import metadata_of
from hfkd.manifest import MANIFEST_FILE, read_manifest
from hfkd.publishable import ALLOWED, allowed_files, check_folder, is_allowed, odd_files
from hfkd.records import file_hash

__all__ = ["ALLOWED", "Link", "Published", "allowed_files", "check_access", "is_private", "lineage", "publish", "pull"]


@dataclass(frozen=True)
class Published:
    """Where it lies. commit: that of the upload, or the last one where nothing had changed."""

    repo_id: str
    url: str
    revision: str
    commit: str
    files: tuple[str, ...]


@dataclass(frozen=True)
class Link:
    """One model of a lineage. role: "student", "teacher" or "start". objective: what it was trained with; weights: the sha256
    that its student's manifest has of it; "" where nobody says. found: there is such a folder or repository."""

    repo_id: str
    revision: str
    role: str
    objective: str
    weights: str
    found: bool


# ---- may this be uploaded there? ----


def check_access(
    repo_id: str, *, token: str | None = None, private: bool | None = None, repo_type: str = "model"
) -> str:
    """The whole name, "user/name", of a repository that this token may write to, whether or not it is there already.

    Raises ConnectionError without a network and in offline mode; PermissionError without a token, for one that is wrong or may
    only read, and for a repository of somebody else; ValueError for a name that the Hub refuses, and with private=True for
    a repository that is public.
    """
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    if not repo_id:
        raise ValueError("the repository has no name: give one, such as hub_model_id='user/name'")
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"the Hub refuses the name {repo_id!r}: {error}") from error
    if constants.is_offline_mode():
        raise ConnectionError(f"{repo_id} cannot be reached in offline mode: unset HF_HUB_OFFLINE, or do not push")
    token = token or get_token()
    if not token:
        raise PermissionError(f"there is no token to write {repo_id} with: `hf auth login`, or set HF_TOKEN")
    with one_sentence(f"nobody can tell whether {repo_id} may be written"):
        account = HfApi(token=token).whoami()
        repo_id = _own_name(repo_id, account)
        if private and is_private(repo_id, token, repo_type) is False:
            raise ValueError(
                f"{repo_id} is public, and private=True was asked for: make it private, or choose another name"
            )
    return repo_id


def _own_name(repo_id: str, account: dict[str, Any]) -> str:
    user, organisations = account["name"], [entry["name"] for entry in account.get("orgs") or []]
    owner, name = repo_id.split("/") if "/" in repo_id else (user, repo_id)
    if (account.get("auth") or {}).get("accessToken", {}).get("role") == "read":
        raise PermissionError(f"the token of {user} may only read: make one that may write to {owner}/{name}")
    if owner not in (user, *organisations):
        others = f" and the organisations {', '.join(organisations)}" if organisations else ""
        raise PermissionError(f"{repo_id} belongs to {owner}; the token is that of {user}{others}")
    return f"{owner}/{name}"


def is_private(repo_id: str, token: str | None = None, repo_type: str = "model") -> bool | None:
    """None: it is not on the Hub, or nobody can tell (no network, or this token cannot see it)."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    try:
        return bool(HfApi(token=token).repo_info(repo_id, repo_type=repo_type).private)
    except (HTTPError, OSError, ValueError):  # ValueError: no name that a repository can have
        return None


# ---- up ----


def publish(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    revision: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    repo_type: str = "model",
    message: str | None = None,
    name_private_teacher: bool = False,
    in_progress: bool = False,
) -> Published:
    """Upload the allow-list of `folder` in one commit: after it the repository holds all of it, before it nothing.

    revision: a branch, made where it is missing. private: None leaves an existing repository as it is. in_progress: the card
    may lack what only the end of training knows. Files of an earlier upload that the folder no longer has are deleted; equal
    content makes no new commit. After a failure the folder is whole, and a repeated call goes on: weights that arrived are
    not sent again.

    Raises ValueError, before anything is sent, for what `hfkd.publishable.check_folder` refuses and for a private teacher
    that card and manifest name; what `check_access` raises; and ConnectionError or PermissionError for an upload that failed.
    """
    from huggingface_hub import get_token

    folder = Path(folder)
    secrets = [secret for secret in (token, get_token()) if secret]
    files = check_folder(folder, repo_type=repo_type, secrets=secrets, in_progress=in_progress)
    if not name_private_teacher:
        refuse_named_private_teacher(folder, token)
    repo_id = check_access(repo_id, token=token, private=private, repo_type=repo_type)
    with one_sentence(
        f"{folder} is not published as {repo_id}; it is whole, and the same call goes on where this one ended"
    ):
        commit = _upload(folder, files, repo_id, revision, private, token, repo_type, message or "Upload with hfkd")
    return Published(repo_id, _url(repo_id, revision, repo_type), revision or "main", commit, tuple(files))


def refuse_named_private_teacher(folder: Path, token: str | None = None) -> None:
    teacher = (read_manifest(folder) or {}).get("teacher") or {}
    names = {name for name in (teacher.get("repo"), teacher.get("id")) if name}
    for name in sorted(names):
        if teacher.get("private") or ("/" in name and is_private(name, token)):
            raise ValueError(
                f"the teacher {name} is private, and the card and {MANIFEST_FILE} name it: write them with "
                "card_facts.teacher_private=True, which hides it, or pass name_private_teacher=True to name it"
            )


def _upload(
    folder: Path,
    files: list[str],
    repo_id: str,
    revision: str | None,
    private: bool | None,
    token: str | None,
    repo_type: str,
    message: str,
) -> str:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, repo_type=repo_type, exist_ok=True)
    if revision not in (None, "main"):
        api.create_branch(repo_id, branch=revision, repo_type=repo_type, exist_ok=True)
    there = api.list_repo_files(repo_id, revision=revision, repo_type=repo_type)
    gone = [path for path in there if is_allowed(path, repo_type) and path not in files]
    # create_commit, and not upload_folder, which makes several commits where hf_xet is installed
    done = api.create_commit(
        repo_id,
        operations=[
            *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in files),
            *(CommitOperationDelete(path_in_repo=name) for name in gone),
        ],
        commit_message=message,
        revision=revision,
        repo_type=repo_type,
    )
    return done.oid


def _url(repo_id: str, revision: str | None, repo_type: str) -> str:
    from huggingface_hub import constants

    kind = "datasets/" if repo_type == "dataset" else ""
    branch = f"/tree/{revision}" if revision not in (None, "main") else ""
    return f"{constants.ENDPOINT}/{kind}{repo_id}{branch}"


# ---- down ----


def pull(
    repo_id: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    folder: str | os.PathLike[str] | None = None,
    repo_type: str = "model",
) -> Path:
    """Download the allowed files into the cache of huggingface_hub, or into `folder`; returns where they lie.

    Every file is compared with the Hub's hash of it, and those that `teacher_manifest.json` names with the manifest's. Without
    a network: what the cache has.

    Raises ConnectionError where it cannot be reached and is not in the cache, ValueError for a repository, branch or commit
    that is not there, PermissionError for one that the token may not read, and OSError, naming the files, for a download that
    is corrupted; those files are deleted.
    """
    from huggingface_hub import snapshot_download

    with one_sentence(f"{repo_id} cannot be pulled"):
        remote = _remote_files(repo_id, revision, token, repo_type)
        wanted = [name for name in remote if is_allowed(name, repo_type)] if remote else list(ALLOWED[repo_type])
        found = snapshot_download(
            repo_id,
            revision=revision,
            token=token,
            repo_type=repo_type,
            local_dir=None if folder is None else Path(folder),
            allow_patterns=[glob.escape(name) for name in wanted] if remote else wanted,
            local_files_only=remote is None,
        )
    path = Path(found)
    manifest = read_manifest(path) or {}
    odd = sorted({*(_unlike_the_hub(path, remote) if remote else []), *odd_files(path, manifest)})
    for name in odd:
        _delete(path / name)
    if odd:
        raise OSError(
            f"the download of {repo_id} is corrupted: {', '.join(odd)} (sha256 differs, or missing). Deleted; pull again. If it "
            f"stays so, {repo_id} was changed after {MANIFEST_FILE} was written"
        )
    return path


def _remote_files(repo_id: str, revision: str | None, token: str | None, repo_type: str) -> dict[str, Any] | None:
    """Name to what the Hub knows of a file; None without a network."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    if constants.is_offline_mode():
        return None
    try:
        about: Any = HfApi(token=token).repo_info(repo_id, revision=revision, repo_type=repo_type, files_metadata=True)
        return {file.rfilename: file for file in about.siblings or []}
    except HfHubHTTPError:
        raise
    except (HTTPError, ConnectionError):
        return None


def _unlike_the_hub(path: Path, remote: dict[str, Any]) -> Iterator[str]:
    from huggingface_hub.utils.sha import git_hash

    for name, about in remote.items():
        file = path / name
        if file.is_file():
            same = file_hash(file) == about.lfs.sha256 if about.lfs else git_hash(file.read_bytes()) == about.blob_id
            if not same:
                yield name


def _delete(file: Path) -> None:
    """In a cache a file is a link to its content, which has to go as well."""
    file.resolve().unlink(missing_ok=True)
    file.unlink(missing_ok=True)


# ---- who taught whom ----


def lineage(source: str | os.PathLike[str], *, token: str | None = None) -> list[Link]:
    """The model, its teacher, the teacher's teacher and so on, as the manifests say; without one, the base model of the card.

    source: a folder or a Hub id. Ends at a teacher that is hidden or was a local folder, at what is not found, and before what
    came already.
    """
    links: list[Link] = []
    link: Link | None = Link(str(source), "", "student", "", "", found=True)
    while link and (link.repo_id, link.revision) not in [(before.repo_id, before.revision) for before in links]:
        folder = _described(link, token) if link.found else None  # until now: whether it can be looked for
        manifest = (read_manifest(folder) or {}) if folder else {}
        role = link.role if links else manifest.get("role") or link.role
        objective = (manifest.get("objective") or {}).get("name") or ""
        links.append(replace(link, role=role, objective=objective, found=folder is not None))
        link = _before(folder, manifest) if folder else None
    return links


def _before(folder: Path, manifest: dict[str, Any]) -> Link | None:
    """Who taught it, or what it was before training. A teacher that was a local folder has a name, but no repository."""
    if teacher := manifest.get("teacher"):
        repo, name = teacher.get("repo") or "", teacher.get("id") or ""
        known = {"revision": teacher.get("revision") or "", "weights": teacher.get("weights") or ""}
        return Link(repo or name, role="teacher", objective="", found=bool(repo), **known)
    card = folder / "README.md"
    start = metadata_of(card.read_text(encoding="utf-8")).get("base_model") if card.is_file() else None
    start = start[0] if isinstance(start, list) and start else start
    return Link(start, "", "start", "", "", found=True) if isinstance(start, str) else None


def _described(link: Link, token: str | None) -> Path | None:
    """A folder with manifest and card of it; None where there is no such folder or repository, or no network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError

    if Path(link.repo_id).is_dir():
        return Path(link.repo_id)
    try:
        small = [MANIFEST_FILE, "README.md"]
        return Path(snapshot_download(link.repo_id, revision=link.revision or None, token=token, allow_patterns=small))
    except (HTTPError, OSError, ValueError):
        return None


# ---- failures in one sentence ----


@contextmanager
def one_sentence(what: str) -> Iterator[None]:
    """What the clients of the Hub raise, as one sentence and one of three kinds."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        kind = PermissionError if isinstance(error, GatedRepoError) else ValueError
        missing = "no such branch, tag or commit" if isinstance(error, RevisionNotFoundError) else "no such repository"
        raise kind(f"{what}: {missing}, or this token cannot see it") from error
    except LocalEntryNotFoundError as error:
        raise ConnectionError(f"{what}: the Hub cannot be reached, and the cache does not have it") from error
    except HfHubHTTPError as error:
        raise _refusal(what, error) from error
    except HTTPError as error:
        raise ConnectionError(f"{what}: the connection failed ({type(error).__name__}: {error})") from error
    except RuntimeError as error:  # of an upload that was cut
        cause = error.__cause__
        if isinstance(cause, HfHubHTTPError):
            raise _refusal(what, cause) from error
        raise ConnectionError(f"{what}: {_first_line(error)} ({_first_line(cause or error)})") from error


def _refusal(what: str, error: Any) -> Exception:
    status = error.response.status_code
    said = error.server_message or _first_line(error)
    if status == 401:
        return PermissionError(f"{what}: the token is wrong or has expired ({said}): `hf auth login`, or set HF_TOKEN")
    if status == 403:
        return PermissionError(f"{what}: the token may not do this ({said})")
    if status == 429:
        return ConnectionError(f"{what}: too many requests, wait a while ({said})")
    return (
        ValueError(f"{what}: refused ({said})")
        if 400 <= status < 500
        else ConnectionError(f"{what}: {status} ({said})")
    )


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
