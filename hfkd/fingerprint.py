"""What cached answers depend on, as hashes of values: rows and preprocessing (weights: `hfkd.records`)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

if TYPE_CHECKING:
    from datasets import Dataset

TEXTS = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)


def processing_hash(processing_class: Any) -> str | None:
    """sha256 of what a tokenizer or image processor does to its input. None for None.

    Truncation and padding are left out: every call of a fast tokenizer sets them, and the rows' values show them.
    """
    if processing_class is None:
        return None
    if getattr(processing_class, "backend_tokenizer", None) is not None:
        settings = json.loads(processing_class.backend_tokenizer.to_str())
        settings |= {"truncation": None, "padding": None}
    elif hasattr(processing_class, "get_vocab"):
        settings = {"vocabulary": processing_class.get_vocab(), "class": type(processing_class).__name__}
    else:
        settings = {name: value for name, value in processing_class.to_dict().items() if not name.startswith("_")}
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def content_hash(dataset: Dataset, columns: Sequence[str]) -> tuple[str, dict[str, np.ndarray]]:
    """sha256 over the values of these columns in row order, and the length of each row in those that hold lists.

    Never the data set's own fingerprint, which changes with file times. Hashed in slices of a fixed number of rows, so that
    neither the chunks of the table nor an indices mapping matters; whole numbers of any width are the same numbers.
    """
    digest = hashlib.sha256()
    lengths: dict[str, list[np.ndarray]] = {name: [] for name in columns}
    digest.update(json.dumps([list(columns), len(dataset)]).encode())
    for table in _tables(dataset, columns):
        for name in columns:
            array = one_array(table[name])
            _update(digest, array)
            if is_list(array.type):
                lengths[name].append(list_lengths(array))
    return digest.hexdigest(), {name: np.concatenate(parts) for name, parts in lengths.items() if parts}


def refuse_shared_rows(
    first: Dataset,
    second: Dataset,
    columns: Sequence[str],
    names: tuple[str, str] = ("the unlabelled pool", "the test data"),
) -> None:
    """Raise ValueError where a row of one data set has the same values in these columns as a row of the other.

    columns: what makes a row what it is, its text or its picture, without labels and numbers of rows. Equal means equal to
    the last bit: a picture saved again in another format, or a text with another space, is not found.
    At most 0.1 ms a row and column (a text, a picture of 32 x 32 pixels), and 100 bytes of memory a row of `second`.

    The message counts the shared rows and names the first ones by their numbers in both. Raises ValueError as well for
    columns that are missing or of two kinds (an image file here and an array of pixels there), which could never be equal.
    """
    _refuse_unlike(first, second, columns, names)
    places = {row: number for number, row in reversed(list(enumerate(row_hashes(second, columns))))}
    shared = [(number, places[row]) for number, row in enumerate(row_hashes(first, columns)) if row in places]
    if shared:
        shown = ", ".join(f"row {one} = row {other}" for one, other in shared[:5])
        raise ValueError(
            f"{names[0]} and {names[1]} share {len(shared)} rows ({shown}{', ...' if len(shared) > 5 else ''}; compared by "
            f"{', '.join(columns)}): a student that learns from them is tested on what it has seen. Remove them from "
            f"{names[0]} with select(...), or cut the splits again"
        )


def row_hashes(dataset: Dataset, columns: Sequence[str]) -> Iterator[bytes]:
    """16 bytes for each row, in order: sha256 over the row's values in these columns."""
    for table in _tables(dataset, columns):
        digests = [hashlib.sha256() for _ in range(len(table))]
        for name in columns:
            _update_each(digests, one_array(table[name]))
        yield from (digest.digest()[:16] for digest in digests)


def _update_each(digests: Sequence[Any], array: pa.Array) -> None:
    """`_update` of each row's own digest; ten times as fast where all rows are numbers of one shape, as pixels are."""
    shape, inner = b"", array.storage if isinstance(array, pa.ExtensionArray) else array
    cells = 1
    while is_list(inner.type) and not inner.null_count and len(set(list_lengths(inner).tolist())) == 1:
        length = int(list_lengths(inner)[0])
        shape += b"list" + np.full(cells, length).tobytes()
        cells, inner = cells * length, inner.flatten()
    numbers = None if inner.null_count else _numbers(inner)
    if numbers is None or not cells:
        for row, digest in enumerate(digests):
            _update(digest, array.slice(row, 1))
        return
    for digest, values in zip(digests, numbers.reshape(-1, cells), strict=True):
        digest.update(shape + numbers.dtype.kind.encode() + values.tobytes())


def _refuse_unlike(first: Dataset, second: Dataset, columns: Sequence[str], names: tuple[str, str]) -> None:
    if not columns:
        raise ValueError(f"no columns to compare {names[0]} with {names[1]} by: name those that make a row what it is")
    for dataset, name in zip((first, second), names, strict=True):
        if missing := [column for column in columns if column not in dataset.column_names]:
            raise ValueError(f"{name} has no column {', '.join(missing)}, only {', '.join(dataset.column_names)}")
    for column in columns:
        kinds = [_kind(dataset.features.arrow_schema.field(column).type) for dataset in (first, second)]
        if kinds[0] != kinds[1]:
            raise ValueError(
                f"column {column} holds {kinds[0]} in {names[0]} and {kinds[1]} in {names[1]}, so that no row could be found "
                "in both: cast one like the other"
            )


def _kind(kind: pa.DataType) -> str:
    if isinstance(kind, pa.ExtensionType):
        return _kind(kind.storage_type)
    if is_list(kind):
        return f"lists of {_kind(kind.value_type)}".replace("lists of lists", "lists")
    if pa.types.is_dictionary(kind):
        return _kind(kind.value_type)
    if any(is_text(kind) for is_text in TEXTS):
        return "texts"
    if pa.types.is_boolean(kind) or pa.types.is_integer(kind):
        return "whole numbers"
    return "fractions" if pa.types.is_floating(kind) else str(kind)


def _tables(dataset: Dataset, columns: Sequence[str]) -> Iterator[pa.Table]:
    """A thousand rows at a time, without the data set's format; image files as their bytes, not their paths."""
    from datasets import Image
    from datasets.table import embed_table_storage

    plain = dataset.select_columns(list(columns)).with_format("arrow")
    images = any(isinstance(feature, Image) for feature in plain.features.values())
    for table in plain.iter(1000):
        yield embed_table_storage(table) if images else table


def _update(digest: Any, array: pa.Array) -> None:
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    kind = array.type
    if array.null_count:
        digest.update(b"missing" + np.packbits(array.is_valid().to_numpy(zero_copy_only=False)).tobytes())
    if pa.types.is_struct(kind):
        # An image is its bytes; its path says where it once lay
        names = [field.name for field in kind]
        for name in ["bytes"] if set(names) == {"bytes", "path"} else names:
            digest.update(name.encode())
            _update(digest, pc.struct_field(array, name))
    elif pa.types.is_dictionary(kind):
        _update(digest, array.dictionary_decode())
    elif is_list(kind):
        digest.update(b"list" + list_lengths(array).tobytes())
        _update(digest, array.flatten())
    elif any(is_text(kind) for is_text in TEXTS):
        values = array.cast(pa.large_binary()).fill_null(b"")
        offsets = np.frombuffer(values.buffers()[1], np.int64)[values.offset : values.offset + len(values) + 1]
        data = values.buffers()[2]
        digest.update(b"text" + np.diff(offsets).tobytes())
        digest.update(b"" if data is None else data[int(offsets[0]) : int(offsets[-1])])
    elif pa.types.is_null(kind):
        digest.update(f"null {len(array)}".encode())
    else:
        _update_numbers(digest, array)


def _update_numbers(digest: Any, array: pa.Array) -> None:
    numbers = _numbers(array)
    if numbers is None:  # dates, decimals
        _update(digest, array.cast(pa.string()))
        return
    digest.update(numbers.dtype.kind.encode() + numbers.tobytes())


def _numbers(array: pa.Array) -> np.ndarray | None:
    """float64 or int64, 0 where one is missing; None for what is neither floating, whole nor boolean."""
    kind = array.type
    if pa.types.is_boolean(kind):
        array = array.cast(pa.uint8())
    if pa.types.is_floating(kind):
        return array.fill_null(0).to_numpy(zero_copy_only=False).astype(np.float64)
    if pa.types.is_boolean(kind) or pa.types.is_integer(kind):
        return array.fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    return None


def is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def one_array(column: Any) -> pa.Array:
    combined = column.combine_chunks()
    return combined if isinstance(combined, pa.Array) else pa.concat_arrays(combined.chunks)


def list_lengths(array: pa.Array) -> np.ndarray:
    return pc.list_value_length(array).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
