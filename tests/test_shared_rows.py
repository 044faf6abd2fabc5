"""A pool of unlabelled rows that overlaps the test data is found by what the rows hold."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import Array3D, ClassLabel, Dataset, Features, Image, List, Value, concatenate_datasets
from hypothesis import given, settings
from hypothesis import strategies as some

from hfkd.fingerprint import refuse_shared_rows, row_hashes


def texts(*values, **columns):
    return Dataset.from_dict({"text": list(values), **columns})


def pictures(count=6, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return Dataset.from_dict({"pixels": list(pixels)}, Features({"pixels": Array3D((4, 4, 3), "uint8")}))


def test_shared_texts_are_counted_and_named():
    """A student that learned from the test rows is the best method of the table, for the wrong reason."""
    pool, test = texts("a", "b", "c", "b", label=[0, 1, 0, 1]), texts("x", "b", "a", label=[1, 1, 1])
    message = (
        r"the unlabelled pool and the test data share 3 rows \(row 0 = row 2, row 1 = row 1, row 3 = row 1;.*by text"
    )
    with pytest.raises(ValueError, match=message):
        refuse_shared_rows(pool, test, ["text"])
    with pytest.raises(ValueError, match=r"^train and dev share 2 rows \(row 1 = row 1, row 3 = row 1;"):
        refuse_shared_rows(pool, test, ["text", "label"], names=("train", "dev"))
    refuse_shared_rows(pool.select([0, 2]), test.select([0, 1]), ["text"])


def test_rows_are_compared_wherever_they_lie():
    """datasets keeps a shuffled set as a list of row numbers: read past it, the rows that are compared are others."""
    whole = pictures(2500)
    pool, test = whole.select(range(2000)).shuffle(seed=1), whole.select(range(2000, 2500)).shuffle(seed=2)
    refuse_shared_rows(pool, test, ["pixels"])
    leaking = concatenate_datasets([pool, test.select([417])])
    with pytest.raises(ValueError, match=r"share 1 rows \(row 2000 = row 417;"):
        refuse_shared_rows(leaking, test, ["pixels"])
    rows = list(row_hashes(whole.shuffle(seed=3), ["pixels"]))
    again = Dataset.from_dict(whole.shuffle(seed=3).to_dict(), whole.features)
    assert rows == list(row_hashes(again, ["pixels"])) and len(set(rows)) == 2500


def test_image_files_are_compared_by_their_bytes(tmp_path):
    """The same picture lies in two folders of most image data."""
    from PIL import Image as Picture

    paths = []
    for name, value in (("a/1.png", 10), ("a/2.png", 20), ("b/9.png", 20)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Picture.fromarray(np.full((4, 4, 3), value, np.uint8)).save(tmp_path / name)
        paths.append(str(tmp_path / name))
    of = lambda *chosen: Dataset.from_dict({"image": list(chosen)}, Features({"image": Image()}))  # noqa: E731
    with pytest.raises(ValueError, match=r"share 1 rows \(row 1 = row 0;"):
        refuse_shared_rows(of(*paths[:2]), of(paths[2]), ["image"])
    refuse_shared_rows(of(paths[0]), of(paths[2]), ["image"])


@settings(deadline=None, max_examples=60)
@given(
    some.lists(some.lists(some.integers(0, 2), max_size=3), min_size=1, max_size=8),
    some.lists(some.lists(some.integers(0, 2), max_size=3), min_size=1, max_size=8),
)
def test_found_is_what_a_slow_comparison_finds(first, second):
    """A hash over values without their lengths takes [1], [] for [], [1]: rows of other data would be thrown away."""
    one, other = (
        Dataset.from_dict(
            {"ids": rows, "more": rows[::-1]}, Features({"ids": List(Value(kind)), "more": List(Value(kind))})
        )
        for rows, kind in ((first, "int64"), (second, "int32"))
    )
    pairs = [list(zip(rows, rows[::-1], strict=True)) for rows in (first, second)]
    shared = [row in pairs[1] for row in pairs[0]]
    if any(shared):
        with pytest.raises(ValueError, match=f"share {sum(shared)} rows"):
            refuse_shared_rows(one, other, ["ids", "more"])
    else:
        refuse_shared_rows(one, other, ["ids", "more"])


@pytest.mark.parametrize("shape", [(3,), (2, 2), (0,), (2, 0)])
def test_rows_beside_rows_of_other_shapes_are_the_same_rows(shape):
    """Pixels are hashed at once where all rows have one shape: hashed otherwise there, no ragged pool overlaps anything."""
    row = np.arange(np.prod(shape)).reshape(shape).tolist()
    other = [row[0], row[0], row[0]] if len(shape) > 1 else [*row, 7]
    for kind in ("int64", "float32", "bool", "string"):
        feature = Value(kind)
        for _ in shape:
            feature = List(feature)
        features = Features({"x": feature})
        alone, ragged = (Dataset.from_dict({"x": rows}, features) for rows in ([row, row], [other, row]))
        with pytest.raises(ValueError, match=r"share 2 rows \(row 0 = row 1, row 1 = row 1"):
            refuse_shared_rows(alone, ragged, ["x"])
    missing = Dataset.from_dict({"x": [None, row]}, features)
    with pytest.raises(ValueError, match=r"share 2 rows \(row 0 = row 1, row 1 = row 1"):
        refuse_shared_rows(alone, missing, ["x"])


def test_values_next_to_each_other_are_not_run_together():
    """'ab' + 'c' and 'a' + 'bc' are two rows; a missing text is not an empty one."""
    columns = ["text", "second"]
    refuse_shared_rows(texts("ab", second=["c"]), texts("a", second=["bc"]), columns)
    refuse_shared_rows(texts("", second=["c"]), texts(None, "x", second=["c", "y"]), columns)
    refuse_shared_rows(Dataset.from_dict({"x": [0.0]}), Dataset.from_dict({"x": [None, 1.0]}), ["x"])


def test_kinds_that_could_never_be_equal_are_refused():
    """A check that cannot find anything is passed by every leak."""
    pixels, floats = pictures(), Dataset.from_dict({"pixels": [[0.5]]})
    files = Dataset.from_dict({"pixels": [np.zeros((4, 4, 3), np.uint8)]}, Features({"pixels": Image()}))
    for other, kind in ((floats, "lists of fractions"), (files, "struct.*")):
        with pytest.raises(
            ValueError, match=f"lists of whole numbers in the unlabelled pool and {kind} in the test data"
        ):
            refuse_shared_rows(pixels, other, ["pixels"])
    nested = Dataset.from_dict({"pixels": pixels.with_format("numpy")["pixels"][:].tolist()})
    with pytest.raises(ValueError, match="share 6 rows"):  # the same numbers, in lists
        refuse_shared_rows(pixels, nested, ["pixels"])
    labels = Dataset.from_dict({"text": ["a"]}), Dataset.from_dict({"text": [0]}, Features({"text": ClassLabel(2)}))
    with pytest.raises(ValueError, match="texts in the unlabelled pool and whole numbers"):
        refuse_shared_rows(*labels, ["text"])


def test_columns_that_are_not_there_are_named():
    """Compared by no column at all, every two rows are equal, or none."""
    with pytest.raises(ValueError, match="the test data has no column text, only sentence"):
        refuse_shared_rows(texts("a"), Dataset.from_dict({"sentence": ["a"]}), ["text"])
    with pytest.raises(ValueError, match="no columns"):
        refuse_shared_rows(texts("a"), texts("a"), [])


def test_a_transform_does_not_hide_a_shared_row():
    """Augmented at random, a picture never equals itself."""
    drawn = np.random.default_rng(0)
    pool = pictures().with_transform(lambda rows: {"pixels": [drawn.random((4, 4, 3)) for _ in rows["pixels"]]})
    with pytest.raises(ValueError, match="share 6 rows"):
        refuse_shared_rows(pool, pictures(), ["pixels"])
