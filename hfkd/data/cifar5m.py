"""CIFAR-5m (Nakkiran et al. 2020, arXiv 2010.08127): about six million generated images of CIFAR-10's classes, as rows.

Its makers publish six files `cifar5m_part0.npz` to `cifar5m_part5.npz` with the arrays X (rows, 32, 32, 3) uint8 and Y (rows,).
The code released with Bad Models Can Be Good Role Models (arXiv 2203.14649) reads a copy of it, one file a class, `class0.npy`
to `class9.npy` of (rows, 32, 32, 3) uint8, and takes the first 509,716 rows of each. That code's labels are raw numbers
under an .npy name; class files without a header are therefore read too, as bytes in that order of axes (an assumption).
No file of CIFAR-5m was at hand: all of this is tested on small files of these shapes, not verified on the real ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hfkd.data.images import IMAGE_TASKS

if TYPE_CHECKING:
    from datasets import Dataset

LABELS = IMAGE_TASKS["cifar10"].label_names or ()
SHAPE = (32, 32, 3)
ROWS_PER_CLASS = 509_716  # what the released code takes: the smallest class, as far as is known
HEADER = b"\x93NUMPY"


def cifar5m_files(folder: str | Path) -> list[Path]:
    """The ten files of the classes or, without any, the npz parts, in order; none where the folder holds neither.

    Raises ValueError where only some of the ten classes are there.
    """
    classes = [Path(folder) / f"class{label}.npy" for label in range(len(LABELS))]
    missing = [path.name for path in classes if not path.is_file()]
    if 0 < len(missing) < len(classes):
        raise ValueError(f"{folder} lacks {', '.join(missing)}: students would never see these classes")
    return sorted(Path(folder).glob("cifar5m_part*.npz")) if missing else classes


def load_cifar5m(
    folder: str | Path, rows_per_class: int | None = None, cache_dir: str | Path | None = None, in_memory: bool = False
) -> Dataset:
    """The columns pixels (3,072 bytes, as `hfkd.data.images.decoded` makes them), label (CIFAR-10's names) and example_id.

    rows_per_class: at most this many of each class, the first ones of the files; None takes all. Class files come one
    after the other, so that rows are sorted by class; the trainer shuffles. example_id is the row number. The rows are written
    to `cache_dir` (None: datasets' own cache) once, 15 GB for all of them, and mapped into memory from there; `in_memory`
    keeps them in memory instead, for small subsets.

    Raises FileNotFoundError for a folder without these files; ValueError, naming the file, for arrays of other shapes or
    types, for labels beyond the classes, and for a class of which there are fewer than `rows_per_class`.
    """
    from datasets import ClassLabel, Dataset, Features, Value

    files = cifar5m_files(folder)
    if not files:
        raise FileNotFoundError(
            f"{folder} holds neither cifar5m_part0.npz, ... nor class0.npy, ...: download CIFAR-5m and name its folder"
        )
    if rows_per_class is not None and rows_per_class < 1:
        raise ValueError(f"rows_per_class must be 1 or more, got {rows_per_class}")
    features = Features(pixels=Value("binary"), label=ClassLabel(names=list(LABELS)), example_id=Value("int64"))
    # The cache is keyed by them. A tuple: datasets calls the generator once for each item of a list, and each would count anew
    facts = tuple((str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files)
    given = {"facts": facts, "rows_per_class": rows_per_class}
    place = None if cache_dir is None else str(cache_dir)
    try:
        return Dataset.from_generator(
            _rows, features, cache_dir=place, keep_in_memory=in_memory, gen_kwargs=given, split="train"
        )
    except Exception as error:  # datasets wraps what a generator raises
        if isinstance(error.__cause__, ValueError):
            raise error.__cause__ from None
        raise


def _rows(facts: Sequence[tuple[str, int, int]], rows_per_class: int | None) -> Iterator[dict[str, Any]]:
    taken = np.zeros(len(LABELS), dtype=np.int64)
    most = math.inf if rows_per_class is None else rows_per_class
    number = 0
    for path, *_ in facts:
        images, labels = _images_and_labels(Path(path))
        for image, label in zip(images, labels.tolist(), strict=True):
            if taken[label] < most:
                yield {"pixels": image.tobytes(), "label": label, "example_id": number}
                taken[label] += 1
                number += 1
            elif (taken >= most).all():
                return
    if short := {LABELS[label]: int(taken[label]) for label in np.flatnonzero(taken < most)} if rows_per_class else {}:
        raise ValueError(f"{rows_per_class} rows of each class are asked for, and there are fewer of {short}")


def _images_and_labels(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """(rows, 32, 32, 3) uint8 and (rows,) of one file; class files are mapped, parts are read."""
    if path.suffix == ".npz":
        with np.load(path) as part:
            if missing := {"X", "Y"} - set(part.files):
                raise ValueError(f"{path} has no array {' and '.join(sorted(missing))}, only {', '.join(part.files)}")
            images, labels = part["X"], part["Y"]
    else:
        images = _class_file(path)
        labels = np.full(len(images), int(path.stem.removeprefix("class")))
    if images.shape[1:] != SHAPE or images.dtype != np.uint8:
        raise ValueError(
            f"{path} holds images {images.shape} of {images.dtype}, and (rows, 32, 32, 3) of uint8 are needed"
        )
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        raise ValueError(f"{path} holds labels {labels.shape} of {labels.dtype} for {len(images)} images")
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(LABELS):
        raise ValueError(f"{path} holds labels from {labels.min()} to {labels.max()}, and the classes are 0 to 9")
    return images, labels


def _class_file(path: Path) -> np.ndarray:
    with path.open("rb") as file:
        if file.read(len(HEADER)) == HEADER:
            return np.load(path, mmap_mode="r")
    size = path.stat().st_size
    if size == 0 or size % math.prod(SHAPE):
        raise ValueError(
            f"{path} has no header and {size} bytes, which are no whole number of images of {math.prod(SHAPE)}: it is damaged"
        )
    return np.memmap(path, dtype=np.uint8, mode="r").reshape(-1, *SHAPE)
