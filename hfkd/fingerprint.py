"""What cached answers depend on, as hashes of values: rows and preprocessing (weights: `hfkd.records`)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
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
    from datasets import Image
    from datasets.table import embed_table_storage

    digest = hashlib.sha256()
    lengths: dict[str, list[np.ndarray]] = {name: [] for name in columns}
    plain = dataset.select_columns(list(columns)).with_format("arrow")
    images = any(isinstance(feature, Image) for feature in plain.features.values())
    digest.update(json.dumps([list(columns), len(dataset)]).encode())
    for table in plain.iter(1000):
        if images:
            table = embed_table_storage(table)  # an image file's bytes, not its path
        for name in columns:
            array = one_array(table[name])
            _update(digest, array)
            if is_list(array.type):
                lengths[name].append(list_lengths(array))
    return digest.hexdigest(), {name: np.concatenate(parts) for name, parts in lengths.items() if parts}


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
    kind = array.type
    if pa.types.is_boolean(kind):
        array = array.cast(pa.uint8())
    if pa.types.is_floating(kind):
        numbers = array.fill_null(0).to_numpy(zero_copy_only=False).astype(np.float64)
    elif pa.types.is_boolean(kind) or pa.types.is_integer(kind):
        numbers = array.fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    else:  # dates, decimals
        _update(digest, array.cast(pa.string()))
        return
    digest.update(numbers.dtype.kind.encode() + numbers.tobytes())


def is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def one_array(column: Any) -> pa.Array:
    combined = column.combine_chunks()
    return combined if isinstance(combined, pa.Array) else pa.concat_arrays(combined.chunks)


def list_lengths(array: pa.Array) -> np.ndarray:
    return pc.list_value_length(array).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
