"""Which items hold a value: columns of a catalog turned around, for filters of requests.

A column becomes a table of its distinct values, each with the rows that hold it. All processes of a node can map it
from one Arrow file: 4 bytes an item, and some 20 for each distinct value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pixrec.data.ids import IdIndex, hash_ids, sorted_hashes
from pixrec.errors import InputError

_VALUE, _ROWS, _HASH, _HASH_ROW = "value", "rows", "hash", "hash_row"
RANGE_KEYS = {"min", "max"}


class Filter:
    """One column, from a table that `turned` made."""

    def __init__(self, table: pa.Table) -> None:
        lists = table.column(_ROWS).combine_chunks()
        self._rows, self._offsets = lists.values.to_numpy(), lists.offsets.to_numpy()
        self._values, self._table = table.column(_VALUE), table

    @cached_property
    def _numbers(self) -> np.ndarray | None:
        """The distinct values, ascending, where they are numbers."""
        return None if _HASH in self._table.column_names else self._values.to_numpy()

    @cached_property
    def _texts(self) -> IdIndex:
        return IdIndex(
            self._values.combine_chunks(),
            self._table.column(_HASH).to_numpy(),
            self._table.column(_HASH_ROW).to_numpy(),
        )

    def mask(self, wanted: Sequence[Any], num_rows: int) -> np.ndarray:
        """bool (num_rows,): the rows that hold one of the values; what the column cannot hold is held by none."""
        mask = np.zeros(num_rows, dtype=bool)
        for value in wanted:
            at = self._number(value) if self._numbers is not None else self._texts.get(value)
            if at is not None:
                mask[self._rows[self._offsets[at] : self._offsets[at + 1]]] = True
        return mask

    def range_mask(self, low: float, high: float, num_rows: int) -> np.ndarray:
        """bool (num_rows,): the rows that hold a number from `low` to `high`, both included."""
        assert self._numbers is not None
        mask = np.zeros(num_rows, dtype=bool)
        first = np.searchsorted(self._numbers, low, "left")
        last = np.searchsorted(self._numbers, high, "right")
        if first < last:
            mask[self._rows[self._offsets[first] : self._offsets[last]]] = True
        return mask

    def _number(self, value: Any) -> int | None:
        assert self._numbers is not None
        if not isinstance(value, (bool, int, float)):
            return None
        at = int(np.searchsorted(self._numbers, _comparable(value), "left"))
        return at if at < len(self._numbers) and self._numbers[at] == value else None


def turned(column: pa.ChunkedArray) -> pa.Table:
    """The distinct values of a column (numbers ascending) and the rows that hold each, for `Filter`.

    A text that joins several values with `|` counts as each of them and as a whole; of a list each entry counts.
    """
    values, rows = single_values(column)
    if column.type == pa.string():
        several = pc.fill_null(pc.match_substring(column, "|"), False)
        values = pa.chunked_array([*values.chunks, *pc.filter(column, several).chunks], column.type)
        rows = np.concatenate([rows, np.flatnonzero(several.to_numpy())])
    present = values.is_valid().to_numpy()
    rows, values = rows[present].astype(np.int32), values.drop_null()
    columns: dict[str, Any]
    if values.type == pa.string():
        encoded = values.combine_chunks().dictionary_encode()
        codes, distinct = encoded.indices.to_numpy(), encoded.dictionary
        hashes, hash_rows = sorted_hashes(hash_ids(distinct))
        columns = {_VALUE: distinct, _HASH: hashes, _HASH_ROW: hash_rows}
    else:
        numbers = values.cast(pa.int8()) if pa.types.is_boolean(values.type) else values
        distinct, codes = np.unique(numbers.to_numpy(), return_inverse=True)
        columns = {_VALUE: distinct}
    offsets = np.cumsum([0, *np.bincount(codes, minlength=len(distinct))]).astype(np.int32)
    order = np.argsort(codes, kind="stable")
    return pa.table({**columns, _ROWS: pa.ListArray.from_arrays(offsets, pa.array(rows[order]))})


def single_values(column: pa.ChunkedArray) -> tuple[pa.ChunkedArray, np.ndarray]:
    """The single values of a column and the row of each: list entries, and the parts of a text joined with `|`."""
    if column.type == pa.string():
        column = pc.split_pattern(column, "|")
        return pc.utf8_trim_whitespace(pc.list_flatten(column)), pc.list_parent_indices(column).to_numpy()
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        return pc.list_flatten(column), pc.list_parent_indices(column).to_numpy()
    return column, np.arange(len(column))


def is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


def can_filter(kind: pa.DataType) -> bool:
    """Whether columns of this type can be filtered by."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return kind.value_type == pa.string()
    return kind == pa.string() or is_number(kind) or pa.types.is_boolean(kind)


def bounds_of(name: str, wanted: Mapping[str, Any]) -> tuple[float, float]:
    """The bounds of a range, `{"min": x, "max": y}`, of which one may be absent. Raises InputError on anything else."""
    plain = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in wanted.values())
    if not wanted or not set(wanted) <= RANGE_KEYS or not plain:
        form = '{"min": number, "max": number} or one of the two'
        raise InputError(f"filters: {name!r}: a range is {form}, not {dict(wanted)!r}")
    return _comparable(wanted.get("min", -np.inf)), _comparable(wanted.get("max", np.inf))


def _comparable(value: float) -> float:
    """As NumPy compares it: a whole number beyond 64 bits lies beyond all there are."""
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return np.inf if value > 0 else -np.inf
    return value
