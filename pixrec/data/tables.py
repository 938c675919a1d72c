"""Raw tables: checking their columns, and the items as they are stored.

Pure functions on Arrow tables. A table that cannot be meant is an InputError naming file, column and cure; a row that
cannot be used becomes a reject (source, key, reason) and the rest goes on. Knows no file system and no pictures'
insides. Rows are counted from 0 over all files of a table in name order.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pixrec.errors import InputError
from pixrec.schema import (
    BRAND,
    CATEGORY,
    DESCRIPTION,
    EVENT,
    IMAGE,
    IMAGE_STATUS,
    IMAGE_URI,
    IMAGE_URIS,
    ITEM_ID,
    ITEMS,
    PREPARED_ITEM_FIELDS,
    PRICE,
    RATING,
    REJECTS,
    TIMESTAMP,
    TITLE,
    USER_ID,
)


class _Kind(NamedTuple):
    words: str
    fits: Callable[[pa.DataType], bool]
    cure: str


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_texts(kind: pa.DataType) -> bool:
    return (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and _is_text(kind.value_type)


def _is_bytes(kind: pa.DataType) -> bool:
    return (
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_binary_view(kind)
        or pa.types.is_fixed_size_binary(kind)
    )


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)


_TEXT = _Kind("string", _is_text, "cast it to string")
_BYTES = _Kind("binary", _is_bytes, "store each picture's encoded bytes")
_NUMBER = _Kind("double", _is_number, "cast it to double")
_MOMENT = _Kind("int64", pa.types.is_integer, "store milliseconds since the epoch as int64")

_TEXTS = _Kind("a list of strings", _is_texts, "cast it to a list of strings")

_ITEM_COLUMNS = {
    ITEM_ID: _TEXT,
    TITLE: _TEXT,
    BRAND: _TEXT,
    CATEGORY: _TEXT,
    DESCRIPTION: _TEXT,
    PRICE: _NUMBER,
    IMAGE: _BYTES,
    IMAGE_URI: _TEXT,
    IMAGE_URIS: _TEXTS,
}
_INTERACTION_COLUMNS = {USER_ID: _TEXT, ITEM_ID: _TEXT, TIMESTAMP: _MOMENT, RATING: _NUMBER, EVENT: _TEXT}


def check_items_schema(schema: pa.Schema, where: str) -> None:
    """Raise InputError unless `schema` is that of an items table; `where` names its file."""
    _check_schema(schema, where, "an items table", _ITEM_COLUMNS, (ITEM_ID, TITLE))


def check_items_agree(schemas: Iterable[pa.Schema], where: str) -> None:
    """Raise InputError when the further columns of an items table's files cannot stand in one table."""
    stored = [prepared_items(schema.empty_table(), []) for schema in schemas]
    try:
        pa.concat_tables(stored, promote_options="permissive")
    except pa.ArrowException as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{where}: its files disagree about a column: {reason}; give it one type in all") from None


def check_interactions_schema(
    schema: pa.Schema, where: str, *, min_rating: float | None = None, needs_event: str | None = None
) -> None:
    """Raise InputError unless `schema` is that of an interactions table; `min_rating` makes `rating` necessary, and
    the setting `needs_event` makes `event` so."""
    _check_schema(schema, where, "an interactions table", _INTERACTION_COLUMNS, (USER_ID, ITEM_ID, TIMESTAMP))
    if min_rating is not None and RATING not in schema.names:
        raise InputError(f"{where}: no column {RATING!r}, which prepare.min_rating {min_rating} needs; leave that out")
    if needs_event is not None and EVENT not in schema.names:
        raise InputError(f"{where}: no column {EVENT!r}, which prepare.{needs_event} needs; leave that out")


def _check_schema(schema: pa.Schema, where: str, what: str, columns: dict[str, _Kind], required: Iterable[str]) -> None:
    for name in required:
        if name not in schema.names:
            others = [other for other in schema.names if other not in columns]
            near = difflib.get_close_matches(name, others, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}? Rename it" if near else f"it has {', '.join(schema.names) or 'none'}"
            raise InputError(f"{where}: no column {name!r}, which {what} needs; {hint}")
    for field in schema:
        if schema.names.count(field.name) > 1:
            raise InputError(f"{where}: column {field.name!r} occurs more than once; keep one")
        if field.name not in columns or pa.types.is_null(field.type):
            continue
        kind = columns[field.name]
        if not kind.fits(field.type):
            raise InputError(f"{where}: column {field.name!r} is {field.type}, must be {kind.words}; {kind.cure}")


class CheckedIds(NamedTuple):
    """The usable ids of a slice of an items table, in row order, and the rows without one."""

    item_ids: pa.Array
    rejects: pa.Table


def usable_ids(column: pa.ChunkedArray, first_row: int = 0) -> CheckedIds:
    """Sort the ids of a slice, whose first is row `first_row` of the table, into usable ones and rejects."""
    ids = as_text(column)
    empty = is_empty(ids)
    rows = first_row + np.flatnonzero(empty)
    rejected = rejects(ITEMS, [f"row {row}" for row in rows], [f"{ITEM_ID} is empty"] * len(rows))
    return CheckedIds(ids.filter(pa.array(~empty)), rejected)


def check_item_ids(item_ids: pa.Array, hashes: np.ndarray, read: int, where: str) -> None:
    """Raise InputError when the items table is empty, names no item, or names one twice.

    item_ids: the usable ids (N,) of its `read` rows · hashes: uint64 (N,), of each.
    """
    if not read:
        raise InputError(f"{where}: the items table is empty; give at least one item")
    if not len(item_ids):
        raise InputError(f"{where}: column {ITEM_ID!r} is empty in all {read} rows; give every item an id")
    order = np.argsort(hashes, kind="stable")
    alike = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
    rows = np.unique(np.append(order[alike], order[alike + 1]))
    counts = item_ids.take(pa.array(rows)).value_counts()
    repeated = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(repeated):
        value, times = repeated[0]["values"].as_py(), repeated[0]["counts"].as_py()
        raise InputError(
            f"{where}: {ITEM_ID} {value!r} occurs {times} times, and {len(repeated)} ids occur more than once; "
            "keep one row for each"
        )


def with_id(table: pa.Table) -> pa.Table:
    """The rows of an items table that `check_item_ids` keeps."""
    return table.filter(pa.array(~is_empty(as_text(table.column(ITEM_ID)))))


def prepared_items(table: pa.Table, statuses: list[str]) -> pa.Table:
    """Items as they are stored, without their pictures: the known columns in their types, then `image_uris` and the
    catalog's own further ones. `statuses` stand beside the rows of `table`."""
    columns: dict[str, Any] = {}
    for name, kind in PREPARED_ITEM_FIELDS:
        if name == IMAGE:
            continue
        if name == IMAGE_STATUS:
            columns[name] = pa.array(statuses, pa.string())
        elif name in table.column_names:
            columns[name] = plain(table.column(name)).cast(kind)
        else:
            columns[name] = pa.nulls(len(table), kind)
    for name in table.column_names:
        if name not in columns and name not in (IMAGE, IMAGE_URI):
            columns[name] = plain(table.column(name))
    return pa.table(columns)


def rejects(source: str, keys: list[str] | pa.Array, reasons: list[str] | pa.Array) -> pa.Table:
    """A table of REJECTS, a row a key."""
    columns = (pa.repeat(source, len(keys)), keys, reasons)
    return pa.table([pa.array(column).cast(pa.string()) for column in columns], schema=REJECTS)


def as_text(column: pa.ChunkedArray) -> pa.Array:
    """One array whatever kind of string the file holds; large, so that ids beyond 2 GB in all still fit."""
    return pa.concat_arrays([pa.array([], pa.large_string()), *column.cast(pa.large_string()).chunks])


def plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The same values in the plainest type: no dictionaries, no views, no large variants of string, list of
    strings and binary."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        return plain(column.cast(kind.value_type))
    if _is_text(kind):
        return column.cast(pa.string())
    if _is_texts(kind):
        return column.cast(pa.list_(pa.string()))
    return column.cast(pa.binary()) if _is_bytes(kind) else column


def is_empty(ids: pa.Array) -> np.ndarray:
    """bool (U,): the ids that name nothing."""
    return pc.fill_null(pc.equal(ids, ""), True).to_numpy(zero_copy_only=False)
