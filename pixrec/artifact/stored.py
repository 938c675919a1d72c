"""Item vectors as an index stores them: float32, float16 or int8.

Knows Arrow tables of the index schema; knows no file and no version.

Shapes: U items of a block · D width of their vectors · C width of content vectors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa

from pixrec.schema import CONTENT, CONTENT_HASH, EMBEDDING, HAS_IMAGE, ITEM_ID, SCALE, index_schema

_INT8_MOST = 127.0

KEY = pa.binary(16)


def to_table(
    item_ids: Sequence[str],
    vectors: np.ndarray,
    content_hashes: Sequence[str],
    has_image: Sequence[bool | None] | np.ndarray,
    dtype: str,
    content: np.ndarray | None = None,
) -> pa.Table:
    """U rows of the index schema from vectors (U, D), and from content vectors (U, C) where there are any.

    Raises ValueError on a value that is not finite.
    """
    columns = {ITEM_ID: pa.array(item_ids, pa.string()), CONTENT_HASH: pa.array(content_hashes, pa.string())}
    columns[HAS_IMAGE] = pa.array(has_image, pa.bool_())
    if dtype == "int8":
        stored, scale = _to_int8(vectors)
        columns[SCALE] = pa.array(scale)
    else:
        stored = scale = vectors.astype(dtype)
    seen = np.zeros((len(vectors), 0), np.float16) if content is None else content.astype(np.float16)
    if not (np.isfinite(stored).all() and np.isfinite(scale).all() and np.isfinite(seen).all()):
        raise ValueError(f"the vector of an item near {item_ids[0]!r} is not finite")
    width = vectors.shape[1]
    columns[EMBEDDING] = pa.FixedSizeListArray.from_arrays(pa.array(stored.reshape(-1)), width)
    schema = index_schema(width, dtype, seen.shape[1])
    if seen.shape[1]:
        columns[CONTENT] = pa.FixedSizeListArray.from_arrays(pa.array(seen.reshape(-1)), seen.shape[1])
    return pa.table({name: columns[name] for name in schema.names}, schema=schema)


def to_vectors(table: pa.Table) -> np.ndarray:
    """The vectors (U, D) float32 of rows of the index schema."""
    column = table.column(EMBEDDING)
    values = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    vectors = values.reshape(-1, column.type.list_size).astype(np.float32)
    if SCALE in table.column_names:
        vectors *= table.column(SCALE).to_numpy()[:, None]
    return vectors


def to_content(table: pa.Table) -> np.ndarray | None:
    """The content vectors (U, C) float16 of rows of the index schema; None where it has none."""
    if CONTENT not in table.column_names:
        return None
    column = table.column(CONTENT)
    values = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return values.reshape(-1, column.type.list_size)


def dtype_of(schema: pa.Schema) -> str:
    """The name of the type in which a part of this schema holds its vectors."""
    value = schema.field(EMBEDDING).type.value_type
    return {pa.float32(): "float32", pa.float16(): "float16", pa.int8(): "int8"}[value]


def item_keys(item_ids: Iterable[str], content_hashes: Iterable[str]) -> pa.Array:
    """One key of 16 bytes for each item: the hash of its id and its content."""
    pairs = zip(item_ids, content_hashes, strict=True)
    keys = [hashlib.blake2b(f"{item}\0{content}".encode(), digest_size=16).digest() for item, content in pairs]
    return pa.array(keys, KEY)


def _to_int8(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Integers (U, D) and scales (U,) whose product has the direction of the vector, nearly, and exactly its length.

    The largest value of each vector becomes 127. Raises ValueError on a value that is not finite.
    """
    if not np.isfinite(vectors).all():
        raise ValueError("a vector is not finite")
    most = np.abs(vectors).max(1, keepdims=True)
    integers = np.rint(vectors * (_INT8_MOST / np.where(most > 0, most, 1.0)))
    lengths = np.linalg.norm(integers, axis=1)
    scale = np.linalg.norm(vectors, axis=1) / np.where(lengths > 0, lengths, 1.0)
    return integers.astype(np.int8), scale.astype(np.float32)
