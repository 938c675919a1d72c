"""The flat arrays of a prepared data set: what training and evaluation read of it, mapped rather than loaded.

A worker maps `arrays/` as it lies on disk, so that all processes of a node share its pages: 12 bytes an event (13 with
kinds of events), and for a user or an item its id and a few numbers. On s3:// the folder is copied to each node once.
The format is described in docs/format.md.

Shapes: E events · B users · N items.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa

from pixrec import storage
from pixrec.data.ids import IdIndex, hash_ids, sorted_hashes
from pixrec.errors import ArtifactError, InputError, PixRecError

ARRAYS_FOLDER = "arrays"

DTYPES = {
    "item_row": np.int32,
    "timestamp": np.int64,
    "event": np.uint8,
    "user_offset": np.int64,
    "training_count": np.int32,
    "has_image": np.bool_,
    "hash": np.uint64,
    "hash_row": np.int32,
}
ITEM_ID_FILE, USER_ID_FILE = "item_id.arrow", "user_id.arrow"


def file_of(name: str) -> str:
    return f"{name}.npy"


@dataclass(frozen=True)
class Arrays:
    """The arrays in a local folder; each is mapped when it is first asked for."""

    folder: str

    def __getitem__(self, name: str) -> np.ndarray:
        found = storage.map_array(storage.join(self.folder, file_of(name)))
        if found.dtype != DTYPES[name] or found.ndim != 1:
            raise ArtifactError(f"{self.folder}/{file_of(name)} is damaged: it is {found.dtype} {found.shape}")
        return found

    def __contains__(self, name: str) -> bool:
        return storage.exists(storage.join(self.folder, file_of(name)))

    @cached_property
    def item_ids(self) -> pa.Array:
        """(N,)"""
        column = storage.map_column(storage.join(self.folder, ITEM_ID_FILE))
        return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()  # the latter makes a copy

    @cached_property
    def user_ids(self) -> pa.ChunkedArray:
        """(B,)"""
        return storage.map_column(storage.join(self.folder, USER_ID_FILE))

    @cached_property
    def index(self) -> IdIndex:
        """From an item's id to its row."""
        return IdIndex(self.item_ids, self["hash"], self["hash_row"])


def open_arrays(data_uri: str, fingerprint: str) -> Arrays:
    """The arrays of a prepared data set. Raises ArtifactError when they are absent or do not agree."""
    folder = storage.join(data_uri, ARRAYS_FOLDER)
    try:
        if not storage.exists(folder):
            raise ArtifactError(
                f"{data_uri} is no complete data set (no {ARRAYS_FOLDER}/); make it with pixrec prepare"
            )
        arrays = Arrays(storage.node_copy(folder, fingerprint))
        offsets, users = arrays["user_offset"], len(arrays.user_ids)
        events = {len(arrays[name]) for name in ("item_row", "timestamp", "event") if name != "event" or name in arrays}
        items = {len(arrays.item_ids), *(len(arrays[n]) for n in ("training_count", "has_image", "hash", "hash_row"))}
    except InputError as error:
        raise ArtifactError(f"{data_uri} is no complete data set ({error}); make it with pixrec prepare") from None
    if events != {int(offsets[-1])} or len(offsets) != users + 1 or len(items) != 1:
        raise ArtifactError(
            f"{data_uri} is no complete data set ({ARRAYS_FOLDER}/ names {sorted(events)} events of {users} users and "
            f"{sorted(items)} items); make it with pixrec prepare"
        )
    return arrays


def write_flat(folder: str, name: str, length: int, blocks: Iterable[np.ndarray]) -> None:
    """Write one array of `length` values, a block at a time, none of them held after the next."""
    dtype, written = np.dtype(DTYPES[name]), 0
    with storage.new_file(storage.join(folder, file_of(name))) as file:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (length,)}
        np.lib.format.write_array_header_1_0(file, header)
        for block in blocks:
            file.write(np.ascontiguousarray(block, dtype).data)
            written += len(block)
    if written != length:
        raise PixRecError(f"{folder}/{file_of(name)}: {written} values were written of {length}")


def write_ids(folder: str, file: str, blocks: Iterable[pa.Array], *, durable: bool = True) -> None:
    """Write one column of ids, a batch for each block; `durable` as in `storage.new_file`."""
    schema = pa.schema([("id", pa.large_string())])
    batches = (pa.record_batch([block.cast(pa.large_string())], schema=schema) for block in blocks)
    storage.write_batches(storage.join(folder, file), schema, batches, durable=durable)


def write_index(folder: str, item_ids: pa.Array) -> None:
    """Write the items' ids (N,), and the hashes by which a row is found."""
    hashes, rows = sorted_hashes(hash_ids(item_ids))
    write_ids(folder, ITEM_ID_FILE, [item_ids])
    write_flat(folder, "hash", len(rows), [hashes])
    write_flat(folder, "hash_row", len(rows), [rows])


def write_arrays(
    data_uri: str,
    *,
    item_ids: Sequence[str],
    has_image: np.ndarray,
    training_count: np.ndarray,
    user_ids: Sequence[str],
    user_offset: np.ndarray,
    item_row: np.ndarray,
    timestamp: np.ndarray,
    event: np.ndarray | None = None,
) -> None:
    """Write all arrays of a data set that is in memory."""
    folder = storage.join(data_uri, ARRAYS_FOLDER)
    write_index(folder, pa.array(item_ids, pa.large_string()))
    write_ids(folder, USER_ID_FILE, [pa.array(user_ids, pa.large_string())])
    flat = {"has_image": has_image, "training_count": training_count, "user_offset": user_offset}
    flat |= {"item_row": item_row, "timestamp": timestamp} | ({} if event is None else {"event": event})
    for name, values in flat.items():
        write_flat(folder, name, len(values), [values])
