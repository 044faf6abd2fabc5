"""A teacher's answers to a whole data set, computed once and kept beside a manifest that says whose they are.

Every later run reads columns instead of running the teacher. What can go wrong is a cache of something else (another
teacher, other rows, other preprocessing), so that everything the answers depend on is hashed and compared.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn
from transformers.utils import logging

from hfkd.fingerprint import content_hash, is_list, list_lengths, one_array, processing_hash
from hfkd.outputs import Progress, TeacherOutput
from hfkd.records import file_hash, read_json, weights_hash, write_json
from hfkd.teachers import CachedTeacher, EnsembleTeacher, ModelTeacher, Teacher
from hfkd.teachers.asking import answers_classes

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.get_logger(__name__)
FORMAT = 1
MANIFEST = "manifest.json"
CHUNK_ROWS = 512  # rows that a kill can cost
MOST_CHUNKS = 500  # each is an open file while the cache is put together
COLUMNS = {"logits": "teacher_logits", "features": "teacher_features"}
DTYPES = ("float16", "float32", "float64")
# What counts as the same answer, relative to the row's largest: batches of other rows round differently
TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "float16": 2e-3, "bfloat16": 5e-2}
SAME = (
    *("format", "teacher", "weights", "processing", "shown", "columns", "rows", "data", "dtype", "features", "view"),
    "config",
)


def cache_teacher(
    dataset: Dataset,
    teacher: Teacher | nn.Module | str | Path,
    directory: str | Path,
    *,
    collator: Callable[[list[dict[str, Any]]], Mapping[str, Tensor]] | None = None,
    processing_class: Any = None,
    batch_size: int = 64,
    features: bool = False,
    dtype: str = "float16",
    device: torch.device | str | None = None,
    columns: Sequence[str] | None = None,
) -> Dataset:
    """Ask the teacher about every row once; returns the data set with the answers attached as columns.

        teacher_logits    (num_labels,), for token heads (tokens, num_labels) without padding
        teacher_features  (tokens, hidden) without padding, with features=True

    The directory is a data set of its own (`datasets.load_from_disk`), in row order, with the row number as example_id, and
    holds no local path. Classes stand in the teacher's order; `CachedTeacher(cache=directory)` knows their names. A call
    that was killed goes on where it was; a finished cache of the same teacher, rows and preprocessing is returned at once.
    Several processes of one machine may call this: one works, the others wait for it.

    teacher: a Teacher, a module, a folder or a Hub id.
    collator: must be deterministic; None pads numbers with what the tokenizer (or the teacher's config) pads with.
    processing_class: the tokenizer or image processor that made the inputs; its settings are part of the manifest, as is
    what an ImageCollator shows.
    batch_size: of rows with similar numbers of tokens, longest first, so that too little memory fails at once.
    dtype: float16, float32 or float64, of what is stored. columns: those the teacher's answer depends on; None takes
    the teacher's inputs.

    Raises TypeError for anything but one Dataset, and ValueError for an empty one, for answers that are NaN, infinite or
    too large for `dtype`, for inputs that are random, and for a directory that holds another teacher's cache, finished or
    not, or anything else, and for an ensemble that votes or draws: `cache_members` is for it.
    """
    from datasets import Dataset

    directory = Path(directory)
    teacher = teacher if isinstance(teacher, Teacher) else ModelTeacher(teacher)
    if not isinstance(dataset, Dataset):
        raise TypeError(f"cache_teacher takes one datasets.Dataset, got {type(dataset).__name__}: give one split of it")
    _refuse_labels(teacher)
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if not len(dataset):
        raise ValueError("the data set has no rows: there is nothing to ask the teacher")
    _refuse_present(dataset, features)
    inputs = _Inputs(dataset, teacher, collator, processing_class, columns)
    with _asked(teacher, features, device) as answer:
        expected = {
            **_about_teacher(teacher),
            "format": FORMAT,
            "processing": processing_hash(processing_class),
            "shown": getattr(collator, "shown", None),
            "columns": list(inputs.columns),
            "rows": len(dataset),
            "data": inputs.content,
            "dtype": dtype,
            "features": features,
            "view": "plain",
        }
        if not _is_finished(directory, expected):
            with _working_folder(directory) as folder:
                if not _is_finished(directory, expected):  # another process may have been faster
                    inputs.refuse_random(batch_size)
                    _begin(folder, {**expected, "batch_size": batch_size})
                    chunks = _write_chunks(folder, inputs, answer, batch_size, dtype)
                    _assemble(folder, chunks, directory, expected)
    return _attach(dataset, directory)


def cache_members(
    dataset: Dataset,
    members: Sequence[Teacher | nn.Module | str | Path],
    directory: str | Path,
    **settings: Any,
) -> tuple[Dataset, list[CachedTeacher]]:
    """Ask each member of an ensemble about every row once; returns the data set with all answers, and who gives them.

        teacher_logits_0, teacher_logits_1, ...    as `teacher_logits` of `cache_teacher`, one column a member

    Votes and draws are made on the fly from members' logits, `EnsembleTeacher(cached, "sample")`, so that every epoch has
    its own draws, and so that one cache serves every combination and any number of members (`cached[:2]`).

    Each member has a cache of its own, directory/member-N, by `cache_teacher` with these settings: a call that was killed
    goes on where it was. float16, the default, changes the label of an example whose two best classes are as close as
    one part in a thousand: pass dtype="float32" where runs are to equal those with models to the label.

    Raises ValueError without members, for columns that are there already, and what `cache_teacher` raises.
    """
    if not members:
        raise ValueError("an ensemble needs at least one member, got none to cache")
    attached, cached = dataset, []
    for number, member in enumerate(members):
        folder = Path(directory) / f"member-{number}"
        cache_teacher(dataset, member, folder, **settings)
        attached = _attach(attached, folder, f"_{number}")
        cached.append(CachedTeacher(f"{COLUMNS['logits']}_{number}", cache=folder))
    return attached, cached


def load_cache(
    directory: str | Path, dataset: Dataset, *, teacher: Teacher | None = None, processing_class: Any = None
) -> Dataset:
    """The data set with the cached columns, after checking that they are of these rows and, where given, of this teacher
    and this tokenizer or image processor.

    Raises ValueError, naming the field and both values, for every difference, and for a cache that is unfinished or
    damaged. A teacher is moved to the accelerator where there is one, as for the caching.
    """
    directory = Path(directory)
    manifest = _finished_manifest(directory)
    _refuse_present(dataset, manifest["features"])
    found: dict[str, Any] = {"rows": len(dataset), "columns": [n for n in manifest["columns"] if n in dataset.features]}
    _refuse_different(directory, manifest, found)
    found["data"] = content_hash(dataset, manifest["columns"])[0]
    if processing_class is not None:
        found["processing"] = processing_hash(processing_class)
    if teacher is not None:
        with _asked(teacher, manifest["features"], None):
            about = _about_teacher(teacher)
        found |= {name: about[name] for name in ("teacher", "weights", "config")}
    _refuse_different(directory, manifest, found)
    return _attach(dataset, directory)


def verify_cache(
    directory: str | Path,
    dataset: Dataset,
    teacher: Teacher,
    rows: int = 64,
    collator: Callable[[list[dict[str, Any]]], Mapping[str, Tensor]] | None = None,
    seed: int = 0,
    processing_class: Any = None,
) -> float:
    """Ask the teacher about some rows again, drawn by `seed`; returns the largest absolute difference.

    Raises ValueError with the first row that differs by more than the coarser of the two dtypes explains, both values.
    """
    directory = Path(directory)
    manifest = _finished_manifest(directory)
    cached = _load(directory)
    _refuse_different(directory, manifest, {"rows": len(dataset)})
    inputs = _Inputs(dataset, teacher, collator, processing_class, manifest["columns"])
    chosen = np.sort(np.random.default_rng(seed).choice(len(dataset), min(rows, len(dataset)), replace=False))
    dtypes = [manifest["dtype"], *_dtypes(manifest["teacher"])]
    tolerance = max(TOLERANCE.get(name, TOLERANCE["float32"]) for name in dtypes)
    largest = 0.0
    with _asked(teacher, manifest["features"], None) as answer:
        for part in np.array_split(chosen, -(-len(chosen) // 16)):
            for name, (values, lengths) in _of_rows(answer(inputs.batch(part)), inputs.tokens(part)).items():
                ends = np.arange(1, len(part) + 1) if lengths is None else np.cumsum(lengths)
                for row, again in zip(part, np.split(values, ends[:-1]), strict=True):
                    stored = np.asarray(cached[int(row)][name], dtype=np.float64).reshape(-1, values.shape[-1])
                    largest = max(largest, _difference(int(row), name, stored, again, tolerance))
    return largest


# ---- what the answers depend on ----


def _refuse_labels(teacher: Teacher) -> None:
    combine = teacher.combine if isinstance(teacher, EnsembleTeacher) else None
    if combine in ("vote", "sample"):
        raise ValueError(
            f"an ensemble with combine={combine!r} is not cached: votes or draws are labels, and draws would be one epoch's for "
            "ever. cache_members(dataset, members, directory) keeps each member's logits, and "
            f"EnsembleTeacher(cached, {combine!r}) makes labels of them on the fly"
        )


def _about_teacher(teacher: Teacher) -> dict[str, Any]:
    hashes = [weights_hash(weights) for weights in teacher.weights()]
    config = {} if not answers_classes(getattr(teacher, "model", None)) else _class_settings(teacher.config)
    if getattr(teacher.config, "hidden_size", None) is not None:
        config["hidden_size"] = teacher.config.hidden_size
    return {
        "teacher": teacher.facts(),
        "weights": hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest(),
        "config": config,
        "hfkd": importlib.metadata.version("hfkd"),
        "transformers": importlib.metadata.version("transformers"),
    }


def _class_settings(config: Any) -> dict[str, Any]:
    names = getattr(config, "id2label", None)
    found = {
        "id2label": names and {str(i): name for i, name in names.items()},
        "num_labels": getattr(config, "num_labels", None),
        "problem_type": getattr(config, "problem_type", None),
    }
    return {name: value for name, value in found.items() if value is not None}


def _dtypes(facts: Mapping[str, Any]) -> list[str]:
    return [facts["dtype"], *(name for member in facts["members"] for name in _dtypes(member))]


# ---- batches ----


class _Inputs:
    """Rows as the teacher sees them: which columns, in which batches, and how many tokens an answer has."""

    def __init__(
        self, dataset: Any, teacher: Teacher, collator: Any, processing_class: Any, columns: Sequence[str] | None
    ):
        # What a collator of images reads is not what the teacher does
        made_of = [name for name in getattr(collator, "columns", ()) if name in dataset.column_names]
        self.columns = tuple(sorted(columns or made_of or teacher.reads(dataset.column_names)))
        if not self.columns or set(self.columns) - set(dataset.column_names):
            raise ValueError(
                f"columns to cache: {', '.join(self.columns) or 'none'}; the data set has {', '.join(dataset.column_names)}: "
                "tokenize first, or name those that the collator turns into the teacher's inputs (columns=('image',))"
            )
        view = getattr(collator, "view", "plain")
        if view != "plain":
            raise ValueError(
                f"the collator makes the view {view!r}: cached answers would be compared with other random inputs in every "
                "epoch; cache with a deterministic collator (view 'plain'), or use ModelTeacher in the training loop"
            )
        self.content, self.lengths = content_hash(dataset, self.columns)
        self.collator = collator
        self.transformed = (dataset.format["type"] or "") == "custom"
        self.dataset = dataset if self.transformed else dataset.select_columns(list(self.columns))
        if collator is None and not self.transformed:
            self.dataset = self.dataset.with_format("arrow")
        self.padding = getattr(processing_class, "pad_token_id", None)
        if self.padding is None:
            self.padding = getattr(teacher.config, "pad_token_id", None)
        side = getattr(processing_class, "padding_side", "right") if collator is not None else "right"
        self.pads_left = side == "left"

    def order(self) -> np.ndarray:
        """Row numbers, longest row first."""
        tokens = next((self.lengths[name] for name in self.lengths if name.endswith("input_ids")), None)
        return np.arange(len(self.dataset)) if tokens is None else np.argsort(-tokens, kind="stable")

    def tokens(self, rows: np.ndarray) -> tuple[np.ndarray | None, bool]:
        """How many tokens the answer of each row has, None where rows are no lists; and whether they stand on the right."""
        for ending in ("positions", "input_ids"):  # at given positions, there are as many answers as positions
            for name, lengths in self.lengths.items():
                if name.endswith(ending):
                    return lengths[rows], self.pads_left and ending == "input_ids"
        return None, False

    def batch(self, rows: np.ndarray) -> Mapping[str, Tensor]:
        values = self.dataset[rows.tolist()]
        if self.collator is None and not self.transformed:
            return self._padded(values)
        examples = [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]
        if self.collator is not None:
            batch = self.collator(examples)
            return self.collator.on_device(batch) if hasattr(self.collator, "on_device") else batch
        from transformers import default_data_collator

        return default_data_collator(examples)

    def _padded(self, table: pa.Table) -> dict[str, Tensor]:
        arrays = {name: one_array(table[name]) for name in self.columns}
        batch = {}
        for name, array in arrays.items():
            fill = self.padding if name.endswith("input_ids") else 0
            values = _dense(array, fill)
            if values.dtype == object:
                raise ValueError(
                    f"column {name} holds {array.type}, no numbers: pass the collator that makes them inputs"
                )
            batch[name] = torch.from_numpy(values)
            mask = name.removesuffix("input_ids") + "attention_mask"
            if name.endswith("input_ids") and mask not in arrays:
                batch[mask] = torch.from_numpy(
                    (np.arange(values.shape[1]) < list_lengths(array)[:, None]).astype(np.int64)
                )
        return batch

    def refuse_random(self, batch_size: int) -> None:
        """Raises ValueError when the first batch is not the same twice."""
        rows = self.order()[:batch_size]
        first, second = self.batch(rows), self.batch(rows)
        odd = [name for name in first if not _equal(first[name], second.get(name))]
        if odd:
            raise ValueError(
                f"{', '.join(odd)} differ when the same rows are collated twice: random masks or augmentation cannot be "
                "cached, because the student will see other inputs than the teacher did; take the evaluation transform"
            )


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and bool(torch.equal(one, other))
    return bool(one == other)


def _dense(array: pa.Array, fill: int | None) -> np.ndarray:
    """Nested lists as one array (rows, ...); shorter lists are filled up on the right."""
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    if not is_list(array.type):
        numbers = array.to_numpy(zero_copy_only=False)
        return numbers.astype(np.int64) if numbers.dtype.kind in "iu" else numbers.copy()
    lengths, inner = list_lengths(array), _dense(array.flatten(), fill)
    if len(set(lengths.tolist())) == 1:
        return inner.reshape(len(lengths), int(lengths[0]), *inner.shape[1:])
    if fill is None:
        raise ValueError(
            "rows have different lengths and nothing says what to pad with: pass processing_class or collator"
        )
    filled = np.full((len(lengths), int(lengths.max()), *inner.shape[1:]), fill, dtype=inner.dtype)
    filled[np.arange(filled.shape[1]) < lengths[:, None]] = inner
    return filled


# ---- answers ----


@contextmanager
def _asked(teacher: Teacher, features: bool, device: Any) -> Iterator[Callable[[Mapping[str, Tensor]], TeacherOutput]]:
    """A function from a batch to the answer, with classes in the teacher's own order; afterwards in the order before."""
    if device is None:
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    teacher.prepare(None, {"teacher", *(["features"] if features else [])}, device)
    aligned_to = teacher.aligned_to
    teacher.align_labels(teacher.config)

    def answer(batch: Mapping[str, Tensor]) -> TeacherOutput:
        on_device = {n: value.to(device) if isinstance(value, Tensor) else value for n, value in batch.items()}
        found = teacher(on_device, Progress())
        if found.logits is None and not features:
            raise ValueError(
                f"{type(teacher).__name__} answered no logits to cache: a bare encoder has features only (features=True), "
                "and votes or draws are labels"
            )
        if features and found.features is None:
            raise ValueError(f"{type(teacher).__name__} answered no features to cache: leave features=False")
        return TeacherOutput(logits=found.logits, features=found.features if features else None)

    try:
        yield answer
    finally:
        teacher.align_labels(aligned_to)


def _of_rows(
    answer: TeacherOutput, tokens: tuple[np.ndarray | None, bool]
) -> dict[str, tuple[np.ndarray, np.ndarray | None]]:
    """By column name: values (rows, n) and None, or (tokens of all rows, n) and the number of tokens of each row."""
    found: dict[str, tuple[np.ndarray, np.ndarray | None]] = {}
    for kind, name in COLUMNS.items():
        tensor = getattr(answer, kind)
        if tensor is None:
            continue
        values = tensor.to(torch.promote_types(tensor.dtype, torch.float32)).cpu().numpy()
        if values.ndim == 2:
            found[name] = (values, None)
            continue
        if values.ndim != 3:
            raise ValueError(f"{kind} of shape {values.shape} cannot be cached: (batch, n) or (batch, tokens, n) can")
        width = values.shape[1]
        lengths, on_the_right = tokens
        if lengths is None:
            lengths = np.full(len(values), width)
        if lengths.max() > width:
            raise ValueError(f"a row has {lengths.max()} tokens, its answer {width}: the collator must not cut rows")
        places = np.arange(width)
        kept = places >= width - lengths[:, None] if on_the_right else places < lengths[:, None]
        found[name] = (values[kept], lengths)
    return found


def _stored(values: np.ndarray, owners: np.ndarray, name: str, dtype: str) -> np.ndarray:
    """Cast to what is stored. owners: the row number of each value."""
    finite = np.isfinite(values).all(1)
    if not finite.all():
        bad = np.unique(owners[~finite])
        raise ValueError(
            f"{name} is NaN or infinite for rows {bad[:10].tolist()} ({len(bad)} in this batch): look at these inputs, or "
            "run the teacher in float32"
        )
    largest = float(np.abs(values).max(initial=0))
    if largest > float(np.finfo(dtype).max):
        raise ValueError(f"{name} reaches {largest:g}, more than {dtype} holds: pass dtype='float32'")
    return values.astype(dtype)


def _record_batch(rows: np.ndarray, found: Mapping[str, Any], dtype: str) -> pa.RecordBatch:
    arrays = {"example_id": pa.array(rows, pa.int64())}
    for name, (values, lengths) in found.items():
        owners = rows if lengths is None else np.repeat(rows, lengths)
        flat = pa.array(_stored(values, owners, name, dtype).reshape(-1))
        array = pa.FixedSizeListArray.from_arrays(flat, values.shape[-1])
        if lengths is not None:
            array = pa.ListArray.from_arrays(pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32()), array)
        arrays[name] = array
    return pa.RecordBatch.from_pydict(arrays)


def _difference(row: int, name: str, stored: np.ndarray, again: np.ndarray, tolerance: float) -> float:
    if stored.shape != again.shape:
        raise ValueError(f"row {row}: the cached {name} has shape {stored.shape}, the teacher's answer {again.shape}")
    largest = float(np.abs(stored - again).max(initial=0))
    if not largest <= tolerance * max(1.0, float(np.abs(stored).max(initial=0))):
        raise ValueError(
            f"row {row}: the cached {name} is {_shown(stored)}, this teacher answers {_shown(again)} to these inputs "
            f"(difference {largest:g}): another teacher, other rows or other preprocessing; cache again"
        )
    return largest


def _shown(values: np.ndarray) -> str:
    flat = values.reshape(-1)
    return f"[{', '.join(f'{value:.4g}' for value in flat[:6])}{', ...' if len(flat) > 6 else ''}]"


# ---- files ----


def _unfinished(directory: Path) -> Path:
    return directory.with_name(directory.name + ".unfinished")


@contextmanager
def _working_folder(directory: Path) -> Iterator[Path]:
    """Beside the directory, for one process at a time; what lies in it outlives a kill, and goes when the cache is done."""
    from filelock import FileLock

    folder = _unfinished(directory)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Not in the folder: a lock that goes with the folder is one that two processes can hold
    name = hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:16]
    with FileLock(Path(tempfile.gettempdir()) / f"hfkd-{name}.lock"):
        folder.mkdir(exist_ok=True)
        try:
            yield folder
        except BaseException:
            if not any(folder.glob("rows-*.arrow")):
                shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(folder, ignore_errors=True)


def _begin(folder: Path, expected: dict[str, Any]) -> None:
    """Raises ValueError when the folder holds finished chunks of another cache."""
    found = read_json(folder / MANIFEST)
    if found is not None and any(folder.glob("rows-*.arrow")):
        _refuse_different(folder, found, {name: expected[name] for name in (*SAME, "batch_size")})
        return
    for path in folder.glob("rows-*"):
        path.unlink()
    write_json(folder / MANIFEST, expected)


def _write_chunks(folder: Path, inputs: _Inputs, answer: Any, batch_size: int, dtype: str) -> list[Path]:
    order = inputs.order()
    size = -(-max(CHUNK_ROWS, len(order) // MOST_CHUNKS) // batch_size) * batch_size
    paths = []
    with logging.tqdm(total=len(order), desc="asking the teacher", unit="row") as bar:
        for number, start in enumerate(range(0, len(order), size)):
            rows = order[start : start + size]
            paths.append(folder / f"rows-{number:05d}.arrow")
            if not _holds(paths[-1], rows):
                _write_chunk(paths[-1], rows, inputs, answer, batch_size, dtype)
            bar.update(len(rows))
    return paths


def _write_chunk(path: Path, rows: np.ndarray, inputs: _Inputs, answer: Any, batch_size: int, dtype: str) -> None:
    """Batch by batch to a temporary name, flushed to disk, renamed: the chunk is there whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        writer = None
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            records = _record_batch(part, _of_rows(answer(inputs.batch(part)), inputs.tokens(part)), dtype)
            writer = writer or pa.ipc.new_stream(file, records.schema)
            writer.write_batch(records)
        assert writer is not None
        writer.close()
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _holds(path: Path, rows: np.ndarray) -> bool:
    if not path.is_file():
        return False
    try:
        with pa.memory_map(str(path)) as source:
            found = pa.ipc.open_stream(source).read_all()["example_id"].to_numpy()
    except (OSError, pa.ArrowInvalid):
        return False
    return np.array_equal(found, rows)


def _assemble(folder: Path, chunks: list[Path], directory: Path, expected: dict[str, Any]) -> None:
    """In row order, a thousand rows in memory at a time, under a temporary name; then renamed, so that the directory is
    a whole cache or not there."""
    from datasets import Dataset, concatenate_datasets

    whole = concatenate_datasets([Dataset.from_file(str(path)) for path in chunks])
    numbers = whole.data.column("example_id").to_numpy()
    order = np.argsort(numbers, kind="stable")
    if not np.array_equal(numbers[order], np.arange(expected["rows"])):
        raise ValueError(f"{folder} does not hold every row once: delete it and cache again")
    final = folder / "final"
    shutil.rmtree(final, ignore_errors=True)
    whole.select(order).save_to_disk(final)
    files = sorted(path for path in final.iterdir())
    write_json(final / MANIFEST, {**expected, "files": {path.name: file_hash(path) for path in files}})
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    if directory.exists():
        directory.rmdir()  # empty, as was checked
    final.rename(directory)


def _is_finished(directory: Path, expected: dict[str, Any]) -> bool:
    """Raises ValueError when the directory holds something else."""
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return False
    if not (directory / MANIFEST).is_file():
        raise ValueError(f"{directory} holds other files: choose another directory for the cache")
    _refuse_different(directory, _finished_manifest(directory), {name: expected[name] for name in SAME})
    shutil.rmtree(_unfinished(directory), ignore_errors=True)  # of a call that was killed in its last moment
    return True


def _finished_manifest(directory: Path) -> dict[str, Any]:
    """Raises ValueError for a cache that is not there, unfinished or damaged."""
    manifest = read_json(directory / MANIFEST)
    if manifest is None and _unfinished(directory).is_dir():
        raise ValueError(f"{directory} is unfinished: call cache_teacher again with the same arguments, it goes on")
    if manifest is None:
        raise ValueError(
            f"{directory} holds no readable {MANIFEST}: it is no cache of hfkd; make one with cache_teacher"
        )
    if manifest["format"] != FORMAT:
        raise ValueError(f"{directory} has format {manifest['format']}, this hfkd reads {FORMAT}: cache again")
    for name, digest in manifest["files"].items():
        path = directory / name
        if not path.is_file() or file_hash(path) != digest:
            what = "damaged or truncated" if path.is_file() else "missing"
            raise ValueError(f"{directory}: {name} is {what}: delete the directory and cache again")
    return manifest


def _refuse_different(place: Path, manifest: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    said = {"data": "the rows' content", "weights": "the teacher's weights", "processing": "the tokenizer or processor"}
    said["shown"] = "the size and normalisation of the images"
    for name, value in found.items():
        stored: Any = manifest.get(name)
        if name == "teacher":  # a copy under another name is the same teacher
            stored, value = _without_names(stored), _without_names(value)
        if stored != value:
            raise ValueError(
                f"{place} was made for something else. {said.get(name, name)} ({name}): {stored} there, {value} here. Delete "
                "it, or choose another directory"
            )


def _without_names(facts: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in facts.items() if name not in ("name", "revision")}
    return {**kept, "members": [_without_names(member) for member in facts["members"]]}


def _refuse_present(dataset: Dataset, features: bool) -> None:
    present = [name for name in COLUMNS.values() if name in dataset.column_names]
    if present:
        raise ValueError(f"the data set has {', '.join(present)} already: remove_columns({present}) first")


def _load(directory: Path) -> Dataset:
    from datasets import Dataset

    return Dataset.load_from_disk(str(directory))


def _attach(dataset: Dataset, directory: Path, ending: str = "") -> Dataset:
    from datasets import concatenate_datasets

    answers = _load(directory).remove_columns("example_id")
    if ending:
        answers = answers.rename_columns({name: f"{name}{ending}" for name in answers.column_names})
        if present := sorted(set(answers.column_names) & set(dataset.column_names)):
            raise ValueError(f"the data set has {', '.join(present)} already: remove_columns({present}) first")
    attached = concatenate_datasets([dataset.with_format(None), answers], axis=1)
    if dataset.format["type"] is None:
        return attached
    # Joining columns forgets the format, and with it the transform that makes the inputs
    columns = [*dataset.format["columns"], *answers.column_names]
    kept = {"columns": columns, "output_all_columns": dataset.format["output_all_columns"]}
    return attached.with_format(dataset.format["type"], **kept, **dataset.format["format_kwargs"])
