"""What of a folder may be public: an allow-list of files, and what none of them may hold.

The stock Trainer uploads `training_args.bin`, a pickle with the token and local paths inside, and nested checkpoints with
optimizer states. Nothing here asks a network.
"""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from hfkd.cards import check_card, hub_ids, metadata_of
from hfkd.manifest import MANIFEST_FILE, OF_TRAINING, read_manifest
from hfkd.records import file_hash, read_json

WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
TOKENIZERS = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("vocab.txt", "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model"),
)
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
CONFIGURATIONS = ("config.json", "generation_config.json", "adapter_config.json")
BESIDE = ("README.md", MANIFEST_FILE, "metrics.json", "results.csv", "results.md", "*.png", "figures/*.png")
# A pattern without a slash is of files at the top, never of those in checkpoint-*/ or runs/
ALLOWED = {
    "model": (*WEIGHTS, *CONFIGURATIONS, *TOKENIZERS, *PROCESSORS, *BESIDE),
    "dataset": ("*.arrow", "*.parquet", "data/*.parquet", "dataset_info.json", "state.json", "manifest.json", *BESIDE),
}
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
BESIDE_WEIGHTS = {
    "text-classification": (TOKENIZERS, "tokenizer"),
    "token-classification": (TOKENIZERS, "tokenizer"),
    "fill-mask": (TOKENIZERS, "tokenizer"),
    "image-classification": (PROCESSORS, "image processor"),
    "image-feature-extraction": (PROCESSORS, "image processor"),
}
_TOKEN = rb"hf_[A-Za-z0-9]{30,}|wandb_v\d+_\w{20,}"


def is_allowed(path: str, repo_type: str = "model") -> bool:
    """path: inside the folder or repository, with forward slashes. ValueError for a repo_type that is none of ours."""
    if repo_type not in ALLOWED:
        raise ValueError(f"repo_type must be {' or '.join(ALLOWED)}, got {repo_type!r}")
    if path in OF_TRAINING:
        return False
    return any(fnmatchcase(path, name) and path.count("/") == name.count("/") for name in ALLOWED[repo_type])


def allowed_files(folder: str | os.PathLike[str], repo_type: str = "model") -> list[str]:
    """Of what lies in `folder`: paths inside it with forward slashes, sorted."""
    folder = Path(folder)
    present = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    code = code_files(folder) if repo_type == "model" else set()
    return sorted(path for path in present if is_allowed(path, repo_type) or path in code)


def code_files(folder: Path) -> set[str]:
    """The files that config.json tells transformers to load code from (`register_for_auto_class` writes both)."""
    config = read_json(folder / "config.json")
    named = (config.get("auto_map") or {}).values() if isinstance(config, dict) else ()
    return {f"{name.split('.')[0]}.py" for name in named if isinstance(name, str) and "--" not in name}


def check_folder(
    folder: str | os.PathLike[str],
    *,
    repo_type: str = "model",
    secrets: Iterable[str] = (),
    in_progress: bool = False,
) -> list[str]:
    """The files that may be published. in_progress: the card may lack what only the end of training knows.

    Raises ValueError for a folder without whole safetensors weights (or data), without what makes their inputs, without a
    card that can be published, whose files are not those of its manifest, and where a file holds one of `secrets`, another
    token, the home folder or the working folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder} to publish")
    files = allowed_files(folder, repo_type)
    if repo_type == "model":
        _refuse_other_weights(folder, files)
    elif not any(name.endswith((".arrow", ".parquet")) for name in files):
        raise ValueError(f"{folder} holds no .arrow or .parquet file, so it is no data set")
    check_card(folder, repo_type, complete=not in_progress)
    if repo_type == "model":
        _refuse_lonely_weights(folder, files)
        _refuse_other_files(folder)
    for name in files:
        refuse_secrets(folder / name, secrets)
    return files


def _refuse_other_weights(folder: Path, files: list[str]) -> None:
    from safetensors import SafetensorError, safe_open

    weights = [name for name in files if name.endswith(".safetensors")]
    pickles = sorted({path.name for pattern in PICKLES for path in folder.glob(pattern)})
    if not weights:
        found = f"only {', '.join(pickles)}, which may be pickles" if pickles else "none"
        raise ValueError(f"{folder} needs safetensors weights, it holds {found}: write them with save_pretrained")
    if not {"config.json", "adapter_config.json"} & set(files):
        raise ValueError(f"{folder} holds weights without config.json: write both with save_pretrained")
    _refuse_lost_base(folder)
    for name in weights:
        try:
            with safe_open(folder / name, "pt") as file:
                file.keys()
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{folder / name} is no whole safetensors file: {error}") from error
    for index in (name for name in files if name.endswith(".index.json")):
        named = set((read_json(folder / index) or {}).get("weight_map", {}).values())
        if missing := sorted(named - set(weights)):
            raise ValueError(f"{folder / index} names {', '.join(missing)}, which is not there: save the model again")


def _refuse_lost_base(folder: Path) -> None:
    """An adapter is nothing without the model that it was trained on."""
    config = read_json(folder / "adapter_config.json")
    if isinstance(config, dict) and not hub_ids([base := config.get("base_model_name_or_path") or ""]):
        raise ValueError(
            f"{folder} holds an adapter of {base or 'a model without a name'}, which nobody else can load: push that model, and "
            "train the adapter on its Hub id, or save the merged model (merge_and_unload)"
        )


def _refuse_lonely_weights(folder: Path, files: list[str]) -> None:
    task = metadata_of((folder / "README.md").read_text(encoding="utf-8")).get("pipeline_tag")
    needed, kind = BESIDE_WEIGHTS.get(str(task), ((), ""))
    if needed and not set(needed) & set(files):
        raise ValueError(
            f"{folder} holds a model for {task} and no {kind}, so nobody can make its inputs: save the {kind} there, or give "
            "it to the trainer as processing_class"
        )


def _refuse_other_files(folder: Path) -> None:
    manifest = read_manifest(folder)
    if manifest is None:
        raise ValueError(
            f"{folder} has no {MANIFEST_FILE}: save with a trainer of hfkd, or with hfkd.manifest.write_manifest"
        )
    if odd := odd_files(folder, manifest):
        raise ValueError(
            f"{folder}: {', '.join(odd)} changed after {MANIFEST_FILE} was written (sha256 differs, or missing): save again"
        )


def odd_files(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """Files that the manifest has hashes of, and that are missing or other ones."""
    hashes = (manifest.get("files") or {}).items()
    return [name for name, sha in hashes if not (folder / name).is_file() or file_hash(folder / name) != sha]


def refuse_secrets(path: Path, secrets: Iterable[str] = ()) -> None:
    """ValueError where a file holds a token, a key, the home folder or the working folder: says which, not what it is."""
    if not path.stat().st_size:
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for what, pattern in _patterns(secrets):
            if found := re.search(pattern, content):
                raise ValueError(
                    f"{path} holds {what} (byte {found.start()}), which would be public: remove it, save again"
                )


def _patterns(secrets: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    yield "what looks like a token", _TOKEN
    known = {*secrets, *(os.environ.get(name, "") for name in ("HF_TOKEN", "WANDB_API_KEY"))}
    for secret in sorted(value for value in known if len(value) >= 8):
        yield "a token or key of yours", re.escape(secret.encode())
    for what, folder in (("the home folder", os.path.expanduser("~")), ("the working folder", os.getcwd())):
        for name in {folder, os.path.realpath(folder)} - {"/"}:
            # A short one, /root say, is also the end of other paths and a word: only where something follows it
            end = rb"(?![\w-])" if len(Path(name).parts) > 2 else rb"/[\w.-]"
            yield what, rb"(?<![\w.)/-])" + re.escape(name.encode()) + end
