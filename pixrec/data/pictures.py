"""The picture store: the pictures of a catalog by item row, read at random and in order, on local disk and s3://.

A store is a Lance data set: many processes write it at once, Ray Data reads it, and a reader opens its manifest alone,
locally and on s3://, so that no file format and no cache is ours. Others are faster at warm random reads
(`python -m benchmarks.speed.store`), but it is ten times as fast as the decoder behind it, and they need a local copy
or code of ours for s3://.

Each writer puts one part into `data/` and says so in `parts/`; `complete` makes the parts one data set. All paths in a
store are relative to its folder, so that it may be moved and copied whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pixrec import storage
from pixrec.data.rows import Rows, publish, remove_others, write_rows
from pixrec.errors import ArtifactError

PICTURE, PICTURE_HASH, PRESENT = "picture", "picture_hash", "present"
HASH_BYTES = 16
SCHEMA = pa.schema(
    [
        pa.field(PICTURE, pa.large_binary()),
        pa.field(PICTURE_HASH, pa.binary(HASH_BYTES)),  # null where there is no picture
        pa.field(PRESENT, pa.bool_(), nullable=False),
    ]
)
_CURE = "run pixrec prepare again"


def picture_hash(picture: bytes) -> bytes:
    """(16 bytes) the name of a picture: equal bytes, equal name."""
    return hashlib.blake2b(picture, digest_size=HASH_BYTES).digest()


def write_part(uri: str, number: int, pictures: Sequence[bytes | None]) -> str:
    """Store the pictures of consecutive rows; None: the item has none.

    Parts in the order of `number` (0, 1, 2, ...) make up rows 0 .. N-1. May be called from many processes and nodes at
    once; a part that is written twice replaces itself, and is there whole or not at all. Returns a hash of the
    content, the same whatever the run. Raises OutputError when the place cannot be written.
    """
    hashes = [None if picture is None else picture_hash(picture) for picture in pictures]
    columns = [
        pa.array(pictures, pa.large_binary()),
        pa.array(hashes, pa.binary(HASH_BYTES)),
        pa.array([picture is not None for picture in pictures], pa.bool_()),
    ]
    table = pa.Table.from_arrays(columns, schema=SCHEMA)
    storage.write_json(_part(uri, number), {"rows": len(table), "files": write_rows(uri, table)})
    return hashlib.blake2b(b"".join(h or bytes(1) for h in hashes), digest_size=HASH_BYTES).hexdigest()


def complete(uri: str, parts: int) -> int:
    """Make the store readable once all parts 0 .. parts-1 are there; returns the number of rows.

    Reads no picture, and may be called again. What killed and repeated writers left behind is removed, so all writers
    must have ended. Raises ArtifactError when a part is missing.
    """
    said = storage.read_files([_part(uri, number) for number in range(parts)])
    missing = [number for number, data in enumerate(said) if data is None]
    if missing:
        raise ArtifactError(f"{uri} lacks {len(missing)} of its {parts} parts, the first is {missing[0]}; {_CURE}")
    contents: list[dict[str, Any]] = [json.loads(data) for data in said if data is not None]
    files = [file for content in contents for file in content["files"]]
    publish(uri, files, SCHEMA)
    remove_others(uri, files)
    return sum(content["rows"] for content in contents)


def open_pictures(uri: str) -> Pictures:
    """The store at `uri`, open. Raises ArtifactError when there is no complete one."""
    pictures = Pictures(uri)
    len(pictures)
    return pictures


class Pictures:
    """N pictures by row, of which none is in memory. Goes to other processes as its place, and is opened there."""

    def __init__(self, uri: str) -> None:
        self.uri = storage.absolute(uri)
        self._rows: Rows | None = None

    def __reduce__(self) -> tuple[type[Pictures], tuple[str]]:
        return Pictures, (self.uri,)

    def __len__(self) -> int:
        return len(self._open)

    def read(self, rows: Sequence[int] | np.ndarray) -> list[bytes | None]:
        """Pictures of any rows in any order; a row may be asked for twice. Raises IndexError for a row that is none."""
        return self._open.take(rows, PICTURE).to_pylist()

    def read_range(self, start: int, stop: int) -> list[bytes | None]:
        """Pictures of the rows `start` to `stop`, in order."""
        return self.read(np.arange(start, stop))

    def hashes(self, rows: Sequence[int] | np.ndarray) -> list[bytes | None]:
        """`picture_hash` of each row's picture, without reading a picture; None where there is none."""
        return self._open.take(rows, PICTURE_HASH).to_pylist()

    def present(self) -> np.ndarray:
        """(N,) bool: which rows have a picture, without reading a picture."""
        return self._open.column(PRESENT).to_numpy()

    @property
    def _open(self) -> Rows:
        if self._rows is None:
            self._rows = Rows(self.uri, _CURE)
        return self._rows


def _part(uri: str, number: int) -> str:
    return storage.join(uri, "parts", f"{number:06d}.json")
