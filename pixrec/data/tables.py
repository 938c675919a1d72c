"""Raw tables into items and sequences: checking, rejecting, filtering, ordering, splitting.

Pure functions on Arrow tables. A table that cannot be meant is an InputError naming file, column and cure; a row that
cannot be used becomes a reject (source, key, reason) and the rest goes on. Knows no file system and no pictures'
insides. Rows are counted from 0 over all files of a table in name order.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pixrec.config import PrepareConfig
from pixrec.errors import InputError
from pixrec.schema import (
    BRAND,
    CATEGORY,
    DESCRIPTION,
    IMAGE,
    IMAGE_STATUS,
    IMAGE_URI,
    INTERACTIONS,
    ITEM_ID,
    ITEMS,
    PREPARED_ITEM_FIELDS,
    PRICE,
    RATING,
    REJECTS,
    SEQUENCES,
    TIMESTAMP,
    TITLE,
    USER_ID,
)

# Reasons of rejects, `<column> is empty` beside them.
UNKNOWN_ITEM = "item is not in the items table"

_EVENTS_PER_PART = 2_000_000  # keeps the text of a sequences part far below Arrow's 2 GB an array


class _Kind(NamedTuple):
    words: str
    fits: Callable[[pa.DataType], bool]
    cure: str


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


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

_ITEM_COLUMNS = {
    ITEM_ID: _TEXT,
    TITLE: _TEXT,
    BRAND: _TEXT,
    CATEGORY: _TEXT,
    DESCRIPTION: _TEXT,
    PRICE: _NUMBER,
    IMAGE: _BYTES,
    IMAGE_URI: _TEXT,
}
_INTERACTION_COLUMNS = {USER_ID: _TEXT, ITEM_ID: _TEXT, TIMESTAMP: _MOMENT, RATING: _NUMBER}


def check_items_schema(schema: pa.Schema, where: str) -> None:
    """Raise InputError unless `schema` is that of an items table; `where` names its file."""
    _check_schema(schema, where, "an items table", _ITEM_COLUMNS, (ITEM_ID, TITLE))


def check_items_agree(schemas: Iterable[pa.Schema], where: str) -> None:
    """Raise InputError when the further columns of an items table's files cannot stand in one table."""
    stored = [prepared_items(schema.empty_table(), [], []) for schema in schemas]
    try:
        pa.concat_tables(stored, promote_options="permissive")
    except pa.ArrowException as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{where}: its files disagree about a column: {reason}; give it one type in all") from None


def check_interactions_schema(schema: pa.Schema, where: str, *, min_rating: float | None = None) -> None:
    """Raise InputError unless `schema` is that of an interactions table; `min_rating` makes `rating` necessary."""
    _check_schema(schema, where, "an interactions table", _INTERACTION_COLUMNS, (USER_ID, ITEM_ID, TIMESTAMP))
    if min_rating is not None and RATING not in schema.names:
        raise InputError(f"{where}: no column {RATING!r}, which prepare.min_rating {min_rating} needs; leave that out")


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
    """The usable ids of an items table, in row order, and the rows without one."""

    item_ids: pa.Array
    rejects: pa.Table


def check_item_ids(column: pa.ChunkedArray, where: str) -> CheckedIds:
    """Raise InputError when the items table is empty, names no item, or names one twice."""
    if len(column) == 0:
        raise InputError(f"{where}: the items table is empty; give at least one item")
    ids = as_text(column)
    empty = _is_empty(ids)
    kept = ids.filter(pa.array(~empty))
    if len(kept) == 0:
        raise InputError(f"{where}: column {ITEM_ID!r} is empty in all {len(ids)} rows; give every item an id")
    counts = kept.value_counts()
    repeated = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(repeated):
        value, times = repeated[0]["values"].as_py(), repeated[0]["counts"].as_py()
        raise InputError(
            f"{where}: {ITEM_ID} {value!r} occurs {times} times, and {len(repeated)} ids occur more than once; "
            "keep one row for each"
        )
    rows = np.flatnonzero(empty)
    return CheckedIds(kept, rejects(ITEMS, [f"row {row}" for row in rows], [f"{ITEM_ID} is empty"] * len(rows)))


def with_id(table: pa.Table) -> pa.Table:
    """The rows of an items table that `check_item_ids` keeps."""
    return table.filter(pa.array(~_is_empty(as_text(table.column(ITEM_ID)))))


def prepared_items(table: pa.Table, images: list[bytes | None], statuses: list[str]) -> pa.Table:
    """Items as they are stored: the known columns in their types, then the catalog's own further ones.

    `images` and `statuses` stand beside the rows of `table`.
    """
    made = {IMAGE: pa.array(images, pa.binary()), IMAGE_STATUS: pa.array(statuses, pa.string())}
    columns: dict[str, Any] = {}
    for name, kind in PREPARED_ITEM_FIELDS:
        if name in made:
            columns[name] = made[name]
        elif name in table.column_names:
            columns[name] = plain(table.column(name)).cast(kind)
        else:
            columns[name] = pa.nulls(len(table), kind)
    for name in table.column_names:
        if name not in columns and name != IMAGE_URI:
            columns[name] = plain(table.column(name))
    return pa.table(columns)


@dataclass(frozen=True)
class Interactions:
    """E events in input order. `user` and `item` are positions in `user_ids` and `item_ids`."""

    user_ids: pa.Array
    item_ids: pa.Array
    user: np.ndarray
    item: np.ndarray
    timestamp: np.ndarray

    def __len__(self) -> int:
        return len(self.timestamp)

    def only(self, keep: np.ndarray) -> Interactions:
        """The events where `keep`, bool (E,), is true."""
        return replace(self, user=self.user[keep], item=self.item[keep], timestamp=self.timestamp[keep])


class Usable(NamedTuple):
    """The events of an interactions table that can be used, those that cannot, and how many a rating left out."""

    interactions: Interactions
    rejects: pa.Table
    filtered_rating: int


def usable_interactions(
    table: pa.Table, item_ids: pa.Array | None, where: str, *, min_rating: float | None = None
) -> Usable:
    """Sort the events of `table` into usable ones and rejects.

    `item_ids` is the catalog; without one it is the set of ids seen, in order of appearance. Raises InputError when
    the table is empty, no event is usable, none names an item of the catalog, or all are rated below `min_rating`.
    """
    if len(table) == 0:
        raise InputError(f"{where}: the interactions table is empty; give at least one event")
    users, items = as_text(table.column(USER_ID)), as_text(table.column(ITEM_ID))
    moments = _moments(table.column(TIMESTAMP), where)
    reasons = [f"{USER_ID} is empty", f"{ITEM_ID} is empty", f"{TIMESTAMP} is empty"]
    faults = [_is_empty(users), _is_empty(items), moments.is_null().to_numpy(zero_copy_only=False)]
    if np.logical_or.reduce(faults).all():
        raise InputError(f"{where}: none of its {len(table)} events has {USER_ID}, {ITEM_ID} and {TIMESTAMP}")
    if item_ids is None:
        item_ids = items.filter(pa.array(~np.logical_or.reduce(faults))).unique()
    item = pc.index_in(items, value_set=item_ids)
    faults, reasons = [*faults, item.is_null().to_numpy(zero_copy_only=False)], [*reasons, UNKNOWN_ITEM]
    fault = np.select(faults, range(len(faults)), default=-1)
    good = fault < 0
    if not good.any():
        raise InputError(
            f"{where}: none of its {len(table)} events names an item of the items table; "
            f"check that {ITEM_ID} is spelt the same way in both"
        )
    encoded = users.filter(pa.array(good)).dictionary_encode()
    interactions = Interactions(
        encoded.dictionary,
        item_ids,
        encoded.indices.to_numpy(),
        item.to_numpy(zero_copy_only=False)[good].astype(np.int64),
        moments.to_numpy(zero_copy_only=False)[good].astype(np.int64),
    )
    rejected = rejects(INTERACTIONS, _event_keys(users, items, ~good), pa.array(reasons).take(pa.array(fault[~good])))
    if min_rating is None:
        return Usable(interactions, rejected, 0)
    rated = pc.fill_null(pc.greater_equal(plain(table.column(RATING)).cast(pa.float64()), min_rating), False)
    keep = rated.to_numpy()[good]
    if not keep.any():
        raise InputError(f"{where}: no event is rated prepare.min_rating {min_rating} or above; lower it")
    return Usable(interactions.only(keep), rejected, int((~keep).sum()))


def without_repeats(interactions: Interactions) -> Interactions:
    """The first event of those that agree in user, item and timestamp, in input order."""
    order = np.lexsort((interactions.timestamp, interactions.item, interactions.user))  # stable: the first comes first
    columns = (interactions.user[order], interactions.item[order], interactions.timestamp[order])
    is_first = np.ones(len(order), dtype=bool)
    is_first[1:] = np.logical_or.reduce([column[1:] != column[:-1] for column in columns])
    keep = np.empty(len(order), dtype=bool)
    keep[order] = is_first
    return interactions.only(keep)


def core(interactions: Interactions, min_user_events: int, min_item_events: int) -> Interactions:
    """The k-core: users and items with fewer events leave, again and again until none has fewer.

    Raises InputError when nobody is left.
    """
    while True:
        user_events = np.bincount(interactions.user)[interactions.user]
        item_events = np.bincount(interactions.item)[interactions.item]
        keep = (user_events >= min_user_events) & (item_events >= min_item_events)
        if keep.all():
            return interactions
        interactions = interactions.only(keep)
        if not len(interactions):
            raise InputError(
                f"no event is left with prepare.min_user_events {min_user_events} and "
                f"prepare.min_item_events {min_item_events}; lower them"
            )


class HeldOutItems(NamedTuple):
    """The events that stay when items are held out of training, how many items that is, and how many of their events
    stay as test targets."""

    interactions: Interactions
    items: int
    test_targets: int


def hold_out_items(interactions: Interactions, config: PrepareConfig, split: dict[str, Any]) -> HeldOutItems:
    """Leave out the events on a random `cold_item_share` of the items with events, except those that are test targets.

    A test target is a user's last event, with an event on another kind of item before it, and under a temporal split
    within the test period; `split` is what `split_block` said of all events. So no held-out item can be in a history
    or be a validation target. Raises InputError when the share rounds to no item or to all of them.
    """
    if not config.cold_item_share:
        return HeldOutItems(interactions, 0, 0)
    items = np.unique(interactions.item)
    count = round(config.cold_item_share * len(items))
    if not 0 < count < len(items):
        raise InputError(
            f"prepare.cold_item_share {config.cold_item_share} holds out {count} of {len(items)} items; "
            f"{'raise' if not count else 'lower'} it"
        )
    drawn = np.random.default_rng(config.seed).choice(items, count, replace=False)
    is_cold = np.isin(interactions.item, drawn)
    has_history = np.zeros(len(interactions.user_ids), dtype=bool)
    has_history[interactions.user[~is_cold]] = True
    is_target = is_cold & _is_last(interactions) & has_history[interactions.user]
    if split["kind"] == "temporal":
        is_target &= interactions.timestamp >= split["test_start_ms"]
    return HeldOutItems(interactions.only(~is_cold | is_target), count, int(is_target.sum()))


def _is_last(interactions: Interactions) -> np.ndarray:
    """bool (E,): the last event of each user, in the order of `sequences`."""
    order = np.lexsort((interactions.timestamp, interactions.user))
    user, last = interactions.user[order], np.zeros(len(order), dtype=bool)
    last[order[np.append(user[1:] != user[:-1], True)]] = True
    return last


def sequences(interactions: Interactions) -> Iterator[pa.Table]:
    """Tables of SEQUENCES, users in order of appearance, events by time, equal times in input order."""
    order = np.lexsort((interactions.timestamp, interactions.user))  # stable
    user, item, moment = interactions.user[order], interactions.item[order], interactions.timestamp[order]
    starts = np.flatnonzero(np.diff(user, prepend=-1))
    ends = np.append(starts[1:], len(user))
    part_of = ends // _EVENTS_PER_PART
    for part in np.unique(part_of):
        first, last = np.searchsorted(part_of, [part, part + 1])
        low, high = starts[first], ends[last - 1]
        offsets = pa.array(np.append(starts[first:last], high) - low, pa.int32())
        yield pa.table(
            [
                interactions.user_ids.take(pa.array(user[starts[first:last]])).cast(pa.string()),
                pa.ListArray.from_arrays(
                    offsets, interactions.item_ids.take(pa.array(item[low:high])).cast(pa.string())
                ),
                pa.ListArray.from_arrays(offsets, pa.array(moment[low:high], pa.int64())),
            ],
            schema=SEQUENCES,
        )


def split_block(timestamps: np.ndarray, config: PrepareConfig) -> dict[str, Any]:
    """What dataset.json says of the split; a temporal one cuts at quantiles of all `timestamps` (ms).

    Raises InputError when time is too coarse to cut training, validation and test apart.
    """
    if config.split == "leave_one_out":
        return {"kind": config.split}
    ordered = np.sort(timestamps)
    test = int(len(ordered) * (1 - config.temporal_test_fraction))
    valid = int(len(ordered) * (1 - config.temporal_test_fraction - config.temporal_valid_fraction))
    valid_start_ms, test_start_ms = int(ordered[valid]), int(ordered[test])
    if not ordered[0] < valid_start_ms < test_start_ms:
        raise InputError(
            f"the events are at too few different times for prepare.split temporal (training, validation and test "
            f"would begin at {ordered[0]}, {valid_start_ms} and {test_start_ms}); set prepare.split to leave_one_out"
        )
    return {"kind": config.split, "valid_start_ms": valid_start_ms, "test_start_ms": test_start_ms}


def rejects(source: str, keys: list[str] | pa.Array, reasons: list[str] | pa.Array) -> pa.Table:
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
    if (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and _is_text(kind.value_type):
        return column.cast(pa.list_(pa.string()))
    return column.cast(pa.binary()) if _is_bytes(kind) else column


def _is_empty(ids: pa.Array) -> np.ndarray:
    return pc.fill_null(pc.equal(ids, ""), True).to_numpy(zero_copy_only=False)


def _moments(column: pa.ChunkedArray, where: str) -> pa.Array:
    try:
        return pa.concat_arrays([pa.array([], pa.int64()), *column.cast(pa.int64()).chunks])
    except pa.ArrowInvalid:
        raise InputError(f"{where}: column {TIMESTAMP!r} holds a value beyond int64; {_MOMENT.cure}") from None


def _event_keys(users: pa.Array, items: pa.Array, which: np.ndarray) -> pa.Array:
    """`row 7: user_id u1, item_id i9` of each event in question; Arrow's text, as there may be millions of them."""
    mask, kind = pa.array(which), pa.large_string()
    rows = pa.array(np.flatnonzero(which)).cast(kind)
    user, item = (pc.fill_null(ids.filter(mask), "None") for ids in (users, items))
    text = [pa.scalar(part, kind) for part in ("row ", f": {USER_ID} ", f", {ITEM_ID} ", "")]
    return pc.binary_join_element_wise(text[0], rows, text[1], user, text[2], item, text[3])
