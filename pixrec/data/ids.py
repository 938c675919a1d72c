"""Ids without Python objects: columns of them that may be mapped from a file, and the way from an id to its row.

Shapes: U ids of a question · N items of a catalog.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_MIX, _FINISH = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93)  # odd, half of their bits set
_MIX_1, _FINISH_1, _ONES = int(_MIX), int(_FINISH), (1 << 64) - 1
_MASKS = np.array([(1 << 8 * size) - 1 for size in range(9)], np.uint64)
_BATCH = 100_000


class Ids(Sequence[str]):
    """The ids of an Arrow column, or of some of its rows, each made a Python string when it is asked for."""

    def __init__(self, column: pa.Array | pa.ChunkedArray, rows: np.ndarray | None = None) -> None:
        self._column, self._rows = column, rows

    def __len__(self) -> int:
        return len(self._column) if self._rows is None else len(self._rows)

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> Ids: ...
    def __getitem__(self, at: int | slice) -> str | Ids:
        if isinstance(at, slice):
            return self.only(np.arange(len(self))[at])
        return self._column[int(at) if self._rows is None else int(self._rows[at])].as_py()

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), _BATCH):
            yield from self._taken(slice(start, start + _BATCH)).to_pylist()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __arrow_array__(self, type: pa.DataType | None = None) -> pa.Array:
        taken = self._taken(slice(None)).cast(type or pa.string())
        return pa.concat_arrays(taken.chunks) if isinstance(taken, pa.ChunkedArray) and taken.num_chunks else taken

    def only(self, rows: np.ndarray) -> Ids:
        """Some of them, by number."""
        return Ids(self._column, rows if self._rows is None else self._rows[rows])

    def _taken(self, at: slice) -> pa.Array | pa.ChunkedArray:
        return self._column[at] if self._rows is None else self._column.take(pa.array(self._rows[at]))


def only(ids: Sequence[str], rows: np.ndarray) -> Sequence[str]:
    """Some of the ids, by number."""
    return ids.only(rows) if isinstance(ids, Ids) else [ids[row] for row in rows]


def sorted_order(ids: Sequence[str]) -> np.ndarray:
    """int32 (N,): the numbers of the ids in the order of the ids, which is that of their UTF-8 bytes."""
    column = pa.array(ids, pa.large_string())
    if pc.all(pc.less_equal(column[:-1], column[1:])).as_py() in (True, None):
        return np.arange(len(column), dtype=np.int32)
    return pc.sort_indices(column).to_numpy().astype(np.int32)


def hash_ids(ids: pa.Array) -> np.ndarray:
    """uint64 (U,): a hash of the UTF-8 bytes of each id, the same on every machine and in every version.

    The words of 8 bytes are mixed in one after the other by multiplication and shift, as the finalizer of MurmurHash3
    (A. Appleby) does it.
    """
    ids = ids.cast(pa.large_binary())
    if not len(ids):
        return np.zeros(0, np.uint64)
    _, offsets_at, data_at = ids.buffers()
    offsets = np.frombuffer(offsets_at, np.int64)[ids.offset : ids.offset + len(ids) + 1]
    lengths = np.diff(offsets)
    data = np.zeros(int(offsets[-1] - offsets[0]) + 8, np.uint8)
    if data_at is not None and len(data) > 8:
        data[:-8] = np.frombuffer(data_at, np.uint8)[offsets[0] : offsets[-1]]
    words = np.ndarray(len(data) - 7, "<u8", data, strides=(1,))  # one begins at every byte
    starts, hashes = offsets[:-1] - offsets[0], lengths.astype(np.uint64) * _MIX
    for at in range(0, int(lengths.max()), 8):
        left = np.flatnonzero(lengths > at) if at >= lengths.min() else slice(None)
        word = words[starts[left] + at] & _MASKS[np.minimum(lengths[left] - at, 8)]
        mixed = (hashes[left] ^ word) * _MIX
        hashes[left] = (mixed ^ (mixed >> np.uint64(32))) * _FINISH
    return hashes ^ (hashes >> np.uint64(29))


def hash_id(item_id: str) -> int:
    """What `hash_ids` gives for a single id, without arrays. Raises UnicodeEncodeError for half a surrogate pair."""
    data = item_id.encode()
    found = len(data) * _MIX_1 & _ONES
    for at in range(0, len(data), 8):
        mixed = (found ^ int.from_bytes(data[at : at + 8], "little")) * _MIX_1 & _ONES
        found = (mixed ^ mixed >> 32) * _FINISH_1 & _ONES
    return found ^ found >> 29


class IdIndex(Mapping[str, int]):
    """From an id to its row, by binary search among sorted hashes, which may be mapped from a file.

    What has the hash of an id is compared with it, so that a row is never somebody else's.
    """

    def __init__(self, ids: pa.Array | pa.ChunkedArray, hashes: np.ndarray, rows: np.ndarray) -> None:
        """ids (N,) · hashes: uint64 (N,), ascending · rows: int32 (N,), the row of each hash."""
        self.ids, self._hashes, self._rows = ids, hashes, rows

    @classmethod
    def of(cls, ids: pa.Array) -> IdIndex:
        return cls(ids, *sorted_hashes(hash_ids(ids)))

    @cached_property
    def digest(self) -> str:
        """A hash of which ids there are and in which order."""
        digest = hashlib.blake2b(np.ascontiguousarray(self._hashes).data, digest_size=16)
        digest.update(np.ascontiguousarray(self._rows).data)
        return digest.hexdigest()

    def rows_of(self, ids: pa.Array) -> np.ndarray:
        """int32 (U,): the row of each id; -1 where it is none of them, or null."""
        ids = ids.cast(pa.large_string())
        wanted = hash_ids(ids)
        order = np.argsort(wanted)  # neighbours in the question are neighbours in memory
        at, found = np.empty(len(ids), np.int64), np.full(len(ids), -1, np.int32)
        at[order] = np.searchsorted(self._hashes, wanted[order])
        left = np.flatnonzero(ids.is_valid().to_numpy(zero_copy_only=False))
        while len(left):
            left = left[at[left] < len(self._hashes)]
            left = left[self._hashes[at[left]] == wanted[left]]
            rows = self._rows[at[left]]
            same = pc.equal(self.ids.take(pa.array(rows)).cast(pa.large_string()), ids.take(pa.array(left)))
            is_same = np.asarray(same).astype(bool)
            found[left[is_same]] = rows[is_same]
            left = left[~is_same]
            at[left] += 1
        return found

    def __getitem__(self, item_id: str) -> int:
        try:
            wanted = hash_id(item_id)
        except (UnicodeEncodeError, AttributeError):  # half a surrogate pair, or no text: no id is such
            raise KeyError(item_id) from None
        at = int(np.searchsorted(self._hashes, np.uint64(wanted)))
        while at < len(self._hashes) and int(self._hashes[at]) == wanted:
            row = int(self._rows[at])
            if self.ids[row].as_py() == item_id:
                return row
            at += 1
        raise KeyError(item_id)

    def __contains__(self, item_id: object) -> bool:
        return isinstance(item_id, str) and self.get(item_id) is not None

    def __iter__(self) -> Iterator[str]:
        return iter(Ids(self.ids))

    def __len__(self) -> int:
        return len(self.ids)


def sorted_hashes(hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The hashes (N,) in ascending order, and the row, int32, that each had."""
    order = np.argsort(hashes, kind="stable")
    return hashes[order], order.astype(np.int32)
