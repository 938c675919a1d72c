"""Interactions into sequences: sorting out what cannot be used, filtering, holding out, ordering, splitting.

Pure functions on Arrow tables and arrays; faults and rejects as in `tables`.

Shapes: E events.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pixrec.config import PrepareConfig
from pixrec.data.tables import as_text, is_empty, plain, rejects
from pixrec.errors import InputError
from pixrec.schema import INTERACTIONS, ITEM_ID, RATING, SEQUENCES, TIMESTAMP, USER_ID

# Reasons of rejects, `<column> is empty` beside them.
UNKNOWN_ITEM = "item is not in the items table"

_EVENTS_PER_PART = 2_000_000  # keeps the text of a sequences part far below Arrow's 2 GB an array


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
    timestamps = _checked_timestamps(table.column(TIMESTAMP), where)
    reasons = [f"{USER_ID} is empty", f"{ITEM_ID} is empty", f"{TIMESTAMP} is empty"]
    faults = [is_empty(users), is_empty(items), timestamps.is_null().to_numpy(zero_copy_only=False)]
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
        timestamps.to_numpy(zero_copy_only=False)[good].astype(np.int64),
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


def _checked_timestamps(column: pa.ChunkedArray, where: str) -> pa.Array:
    try:
        return pa.concat_arrays([pa.array([], pa.int64()), *column.cast(pa.int64()).chunks])
    except pa.ArrowInvalid:
        raise InputError(
            f"{where}: column {TIMESTAMP!r} holds a value beyond int64; store milliseconds since the epoch as int64"
        ) from None


def _event_keys(users: pa.Array, items: pa.Array, which: np.ndarray) -> pa.Array:
    """`row 7: user_id u1, item_id i9` of each event in question; Arrow's text, as there may be millions of them."""
    mask, kind = pa.array(which), pa.large_string()
    rows = pa.array(np.flatnonzero(which)).cast(kind)
    user, item = (pc.fill_null(ids.filter(mask), "None") for ids in (users, items))
    text = [pa.scalar(part, kind) for part in ("row ", f": {USER_ID} ", f", {ITEM_ID} ", "")]
    return pc.binary_join_element_wise(text[0], rows, text[1], user, text[2], item, text[3])
