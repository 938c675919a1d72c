"""Stand-in of the picture store: a file of pictures a part. To be replaced."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from pixrec import storage


def write_part(uri: str, number: int, pictures: Sequence[bytes | None]) -> str:
    """Store the pictures of consecutive rows; parts 0, 1, 2, ... make up rows 0 .. N-1. Returns a content hash."""
    table = pa.table({"picture": pa.array(pictures, pa.binary())})
    storage.write_table(storage.join(uri, f"part-{number:06d}.parquet"), table)
    content = hashlib.blake2b(digest_size=16)
    for picture in pictures:
        content.update(b"\0" if picture is None else len(picture).to_bytes(8, "big") + picture)
    return content.hexdigest()


def complete(uri: str, parts: int) -> int:
    """Check that all parts are there; returns the number of rows."""
    return len(open_pictures(uri))


class Pictures:
    def __init__(self, column: pa.ChunkedArray) -> None:
        self._column = column

    def __len__(self) -> int:
        return len(self._column)

    def read(self, rows: Sequence[int] | np.ndarray) -> list[bytes | None]:
        return self._column.take(pa.array(np.asarray(rows, np.int64))).to_pylist()

    def read_range(self, start: int, stop: int) -> list[bytes | None]:
        return self._column[start:stop].to_pylist()

    def present(self) -> np.ndarray:
        """bool (N,)"""
        return self._column.is_valid().to_numpy().astype(bool)


def open_pictures(uri: str) -> Pictures:
    return Pictures(storage.read_table(uri).column("picture"))
