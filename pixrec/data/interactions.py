"""Interactions into sequences: sorting out what cannot be used, ordering, filtering, holding out, splitting.

Pure functions on Arrow tables and arrays; faults and rejects as in `tables`. A table is looked at in slices, and its
events are dealt out by their users to partitions, each of which fits into memory: whoever needs to know of all events
(which items are rare, where time is cut) asks the partitions for counts. Who reads and writes the files in between is
`partitions`.

Shapes: E events of a slice or a partition · B users · N items of the catalog.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pixrec.config import PrepareConfig
from pixrec.data.ids import hash_ids
from pixrec.data.tables import is_empty, plain, rejects
from pixrec.errors import InputError
from pixrec.schema import EVENT, INTERACTIONS, ITEM_ID, RATING, SEQUENCES, SEQUENCES_WITH_EVENTS, TIMESTAMP, USER_ID

# Reasons of rejects, `<column> is empty` beside them.
UNKNOWN_ITEM = "item is not in the items table"

# What becomes of the events of a table; `complete`: with user, item and time; `known`: of an item of the catalog, too.
READ, COMPLETE, KNOWN, BY_RATING, BY_EVENT = "read", "complete", "known", "filtered_rating", "filtered_event"

_EVENTS_PER_PART = 2_000_000  # keeps the text of a sequences part far below Arrow's 2 GB an array
_MOST_KINDS = 255
BINS = 1 << 16


@dataclass(frozen=True)
class Interactions:
    """E events in input order. `user` and `event` are positions in `user_ids` and `kinds`, `item` a row of the
    catalog. Users stand in the order in which they appear."""

    user_ids: pa.Array
    user: np.ndarray  # int32 (E,)
    item: np.ndarray  # int32 (E,)
    timestamp: np.ndarray  # int64 (E,)
    event: np.ndarray | None = None  # uint8 (E,)
    kinds: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.timestamp)

    def only(self, which: np.ndarray | slice) -> Interactions:
        """Some of the events, by a mask (E,), by number, or from one to another."""
        event = None if self.event is None else self.event[which]
        return replace(self, user=self.user[which], item=self.item[which], timestamp=self.timestamp[which], event=event)


class Usable(NamedTuple):
    """The events of a slice that can be used, those that cannot, and how many there are of each kind."""

    interactions: Interactions
    rejects: pa.Table
    counts: dict[str, int]


def usable_interactions(
    table: pa.Table,
    rows_of: Callable[[pa.Array], np.ndarray],
    where: str,
    *,
    first_row: int = 0,
    min_rating: float | None = None,
    wanted: Collection[str] | None = None,
) -> Usable:
    """Sort the events of `table`, whose first is row `first_row` of all, into usable ones and rejects.

    rows_of: ids (U,) to rows of the catalog, -1 for those that it lacks. `wanted`: the kinds of events that are kept,
    where the table tells kinds apart. Raises InputError when a timestamp is none or there are too many kinds.
    """
    (user, users), (item, items) = _encoded(table.column(USER_ID)), _encoded(table.column(ITEM_ID))
    timestamps = _checked_timestamps(table.column(TIMESTAMP), where)
    row = np.append(rows_of(items), np.int32(-1))[item]
    names = [USER_ID, ITEM_ID, TIMESTAMP]
    faults = [_lacks(user, users), _lacks(item, items), timestamps.is_null().to_numpy(zero_copy_only=False)]
    complete = int((~np.logical_or.reduce(faults)).sum())
    kind, kinds = np.zeros(0), pa.array([], pa.string())
    if EVENT in table.column_names:
        kind, kinds = _encoded(table.column(EVENT))
        names, faults = [*names, EVENT], [*faults, _lacks(kind, kinds)]
    reasons, faults = [*(f"{name} is empty" for name in names), UNKNOWN_ITEM], [*faults, row < 0]
    fault = np.select(faults, range(len(faults)), default=-1)
    good = np.flatnonzero(fault < 0)
    number, user_ids = _renumbered(user[good], users)
    found = Interactions(
        user_ids, number, row[good], timestamps.fill_null(0).to_numpy(zero_copy_only=False)[good].astype(np.int64)
    )
    counts = {READ: len(table), COMPLETE: complete, KNOWN: len(good), BY_RATING: 0, BY_EVENT: 0}
    keep = np.ones(len(good), dtype=bool)
    if min_rating is not None:
        rated = pc.fill_null(pc.greater_equal(plain(table.column(RATING)).cast(pa.float64()), min_rating), False)
        keep = rated.to_numpy()[good]
        counts[BY_RATING] = int((~keep).sum())
    if EVENT in table.column_names:
        at, named = _renumbered(kind[good], kinds)
        if len(named) > _MOST_KINDS:
            raise InputError(
                f"{where}: column {EVENT!r} holds more than {_MOST_KINDS} different words; it names kinds of events, "
                "such as view, cart and purchase"
            )
        found = replace(found, event=at.astype(np.uint8), kinds=tuple(named.to_pylist()))
        if wanted is not None:
            chosen = np.isin(at, [number for number, name in enumerate(found.kinds) if name in wanted])
            counts[BY_EVENT] = int((keep & ~chosen).sum())
            keep &= chosen
    bad = np.flatnonzero(fault >= 0)
    keys = _event_keys(first_row + bad, users, user[bad], items, item[bad])
    rejected = rejects(INTERACTIONS, keys, pa.array(reasons).take(pa.array(fault[bad])))
    return Usable(found if keep.all() else found.only(keep), rejected, counts)


def check_usable(counts: dict[str, int], where: str, *, min_rating: float | None = None) -> None:
    """Raise InputError when a table is empty, no event is usable, none names an item of the catalog, or all are rated
    below `min_rating`; `counts` are those of all its slices."""
    read = counts[READ]
    if not read:
        raise InputError(f"{where}: the interactions table is empty; give at least one event")
    if not counts[COMPLETE]:
        raise InputError(f"{where}: none of its {read} events has {USER_ID}, {ITEM_ID} and {TIMESTAMP}")
    if not counts[KNOWN]:
        raise InputError(
            f"{where}: none of its {read} events names an item of the items table; "
            f"check that {ITEM_ID} is spelt the same way in both"
        )
    if counts[BY_RATING] == counts[KNOWN]:
        raise InputError(f"{where}: no event is rated prepare.min_rating {min_rating} or above; lower it")


def check_kinds(found: Collection[str], config: PrepareConfig, where: str) -> None:
    """Raise InputError when the settings name a kind of event that no event has."""
    for name in ("history_events", "target_events"):
        for kind in getattr(config, name) or ():
            if kind not in found:
                has = ", ".join(sorted(found)) or "none"
                raise InputError(f"{where}: no event is a {kind!r}, which prepare.{name} names; there are: {has}")


def seen_items(table: pa.Table, where: str) -> pa.Array:
    """The items of the events of a slice that have user, item and time, in order of appearance."""
    (user, users), (item, items) = _encoded(table.column(USER_ID)), _encoded(table.column(ITEM_ID))
    no_time = _checked_timestamps(table.column(TIMESTAMP), where).is_null().to_numpy(zero_copy_only=False)
    fault = _lacks(user, users) | _lacks(item, items) | no_time
    return _renumbered(item[~fault], items)[1]


def deal_out(interactions: Interactions, partitions: int) -> list[Interactions]:
    """The events of each of so many partitions: a user's lie in one, and which depends on the user's id alone."""
    if partitions == 1:
        return [interactions]
    part_of_user = ((hash_ids(interactions.user_ids) >> np.uint64(32)) * np.uint64(partitions)) >> np.uint64(32)
    part_of_user = part_of_user.astype(np.uint16)
    users = np.argsort(part_of_user, kind="stable")
    user_ends = np.searchsorted(part_of_user[users], np.arange(partitions), side="right")
    user_starts = np.append(0, user_ends[:-1])
    number = np.empty(len(users), np.int32)
    number[users] = np.arange(len(users)) - user_starts[part_of_user[users]]
    part = part_of_user[interactions.user]
    ends = np.cumsum(np.bincount(part, minlength=partitions))
    dealt = interactions.only(np.argsort(part, kind="stable"))
    return [
        replace(
            dealt.only(slice(end - count, end)),
            user_ids=interactions.user_ids.take(pa.array(users[user_starts[p] : user_ends[p]])),
            user=number[dealt.user[end - count : end]],
        )
        for p, (end, count) in enumerate(zip(ends, np.diff(ends, prepend=0), strict=True))
    ]


def gather(pieces: Sequence[Interactions], kinds: Sequence[str] | None = None) -> Interactions:
    """The events of several slices, one after the other; `kinds`: the numbering that their events get."""
    encoded = pa.concat_arrays([piece.user_ids for piece in pieces]).dictionary_encode()
    known, at = encoded.indices.to_numpy(), 0
    users, events = [], []
    for piece in pieces:
        users.append(known[at : at + len(piece.user_ids)][piece.user].astype(np.int32))
        at += len(piece.user_ids)
        if kinds is not None and piece.event is not None:
            number = np.array([kinds.index(kind) if kind in kinds else 0 for kind in piece.kinds], np.uint8)
            events.append(number[piece.event])
    return Interactions(
        encoded.dictionary,
        np.concatenate(users),
        np.concatenate([piece.item for piece in pieces]),
        np.concatenate([piece.timestamp for piece in pieces]),
        None if kinds is None else np.concatenate(events),
        tuple(kinds or ()),
    )


@dataclass(frozen=True)
class Ordered:
    """E events of B users, user by user, oldest first: user b's lie at `offsets[b] .. offsets[b + 1]`, none is without
    any."""

    user_ids: pa.Array
    offsets: np.ndarray  # int64 (B + 1,)
    item: np.ndarray  # int32 (E,)
    timestamp: np.ndarray  # int64 (E,)
    event: np.ndarray | None = None  # uint8 (E,)

    def __len__(self) -> int:
        return len(self.item)

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 (B,)"""
        return np.diff(self.offsets)

    def per_user(self, mask: np.ndarray) -> np.ndarray:
        """int64 (B,): how many of each user's events a mask (E,) holds."""
        return np.add.reduceat(mask, self.offsets[:-1], dtype=np.int64) if len(mask) else np.zeros(0, np.int64)

    def only(self, keep: np.ndarray) -> Ordered:
        """The events where `keep`, bool (E,), is true; users without any leave."""
        if keep.all():
            return self
        lengths = self.per_user(keep)
        some = lengths > 0
        return Ordered(
            self.user_ids.filter(pa.array(some)),
            np.append(0, np.cumsum(lengths[some])),
            self.item[keep],
            self.timestamp[keep],
            None if self.event is None else self.event[keep],
        )


def in_order(interactions: Interactions) -> Ordered:
    """Users in order of appearance, events by time, equal times in input order."""
    order = _stable_order(interactions.timestamp)
    order = order[_stable_order(interactions.user[order])]
    lengths = np.bincount(interactions.user, minlength=len(interactions.user_ids))
    return Ordered(
        interactions.user_ids.filter(pa.array(lengths > 0)),
        np.append(0, np.cumsum(lengths[lengths > 0])),
        interactions.item[order],
        interactions.timestamp[order],
        None if interactions.event is None else interactions.event[order],
    )


def _stable_order(values: np.ndarray) -> np.ndarray:
    """What np.argsort(values, kind="stable") gives. Where value and position fit into 63 bits together they are sorted
    as one number, which NumPy does several times faster."""
    if not len(values):
        return np.zeros(0, np.int64)
    low, high, bits = int(values.min()), int(values.max()), max(int(len(values) - 1).bit_length(), 1)
    if (high - low).bit_length() + bits > 63:
        return np.argsort(values, kind="stable")
    packed = ((values - values.dtype.type(low)).astype(np.int64) << bits) | np.arange(len(values))
    packed.sort()
    return packed & ((1 << bits) - 1)


def is_first(ordered: Ordered) -> np.ndarray:
    """bool (E,): the first event, in input order, of those that agree in user, item, timestamp and kind."""
    new = np.ones(len(ordered), dtype=bool)
    new[1:] = ordered.timestamp[1:] != ordered.timestamp[:-1]
    new[ordered.offsets[:-1]] = True
    moment = np.cumsum(new)
    keys = [moment, ordered.item] if ordered.event is None else [moment, ordered.item, ordered.event]
    order = np.lexsort(keys[::-1])  # stable: the first comes first
    first = np.ones(len(ordered), dtype=bool)
    first[order[1:]] = np.any([key[order][1:] != key[order][:-1] for key in keys], axis=0)
    return first


def survivors(ordered: Ordered, dead: np.ndarray, min_user_events: int) -> np.ndarray:
    """bool (E,): the events that stay when the items `dead`, bool (N,), leave, and then users with too few events."""
    alive = ~dead[ordered.item]
    if min_user_events > 1 and len(ordered):
        alive &= np.repeat(ordered.per_user(alive) >= min_user_events, ordered.lengths)
    return alive


def core(
    count: Callable[[np.ndarray], np.ndarray], num_items: int, min_user_events: int, min_item_events: int
) -> tuple[np.ndarray, np.ndarray]:
    """The k-core: users and items with fewer events leave, again and again until none has fewer.

    count: events (N,) of each item among all `survivors` of a mask of items that have left. Returns that mask,
    bool (N,), and the events that each item keeps. Raises InputError when nobody is left.
    """
    dead = np.zeros(num_items, dtype=bool)
    while True:
        counts = count(dead)
        if not counts.any():
            raise InputError(
                f"no event is left with prepare.min_user_events {min_user_events} and "
                f"prepare.min_item_events {min_item_events}; lower them"
            )
        rare = (counts > 0) & (counts < min_item_events)
        if not rare.any():
            return dead, counts
        dead = dead | rare


def draw_cold_items(counts: np.ndarray, config: PrepareConfig) -> np.ndarray:
    """bool (N,): a random `cold_item_share` of the items with events. Raises InputError when that rounds to no item or
    to all of them."""
    items = np.flatnonzero(counts)
    count = round(config.cold_item_share * len(items))
    if not 0 < count < len(items):
        raise InputError(
            f"prepare.cold_item_share {config.cold_item_share} holds out {count} of {len(items)} items; "
            f"{'raise' if not count else 'lower'} it"
        )
    cold = np.zeros(len(counts), dtype=bool)
    cold[np.random.default_rng(config.seed).choice(items, count, replace=False)] = True
    return cold


class HeldOutItems(NamedTuple):
    """The events that stay when items are held out of training, bool (E,), and how many of their events stay as test
    targets."""

    keep: np.ndarray
    test_targets: int


def hold_out_items(
    ordered: Ordered, cold: np.ndarray, split: dict[str, Any], is_target: np.ndarray | None = None
) -> HeldOutItems:
    """Leave out the events on the items `cold`, bool (N,), except those that are test targets.

    A test target is a user's last event (of those that `is_target`, bool (E,), allows), with an event on another kind
    of item before it, and under a temporal split within the test period. So no held-out item can be in a history or be
    a validation target.
    """
    is_cold = cold[ordered.item]
    if not len(ordered):
        return HeldOutItems(~is_cold, 0)
    positions = np.arange(len(ordered)) if is_target is None else np.where(is_target, np.arange(len(ordered)), -1)
    last = np.maximum.reduceat(positions, ordered.offsets[:-1])
    last = last[(last >= 0) & (ordered.per_user(~is_cold) > 0)]
    last = last[is_cold[last]]
    if split["kind"] == "temporal":
        last = last[ordered.timestamp[last] >= split["test_start_ms"]]
    keep = ~is_cold
    keep[last] = True
    return HeldOutItems(keep, len(last))


def sequences(ordered: Ordered, item_ids: pa.Array, kinds: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """Tables of SEQUENCES, or with `kinds` of SEQUENCES_WITH_EVENTS, which split no user."""
    part_of = ordered.offsets[1:] // _EVENTS_PER_PART
    for part in np.unique(part_of):
        first, last = np.searchsorted(part_of, [part, part + 1])
        low, high = ordered.offsets[first], ordered.offsets[last]
        offsets = pa.array(ordered.offsets[first : last + 1] - low, pa.int32())
        columns = [
            ordered.user_ids[first:last].cast(pa.string()),
            pa.ListArray.from_arrays(offsets, item_ids.take(pa.array(ordered.item[low:high])).cast(pa.string())),
            pa.ListArray.from_arrays(offsets, pa.array(ordered.timestamp[low:high], pa.int64())),
        ]
        if kinds is not None and ordered.event is not None:
            names = pa.array(kinds, pa.string()).take(pa.array(ordered.event[low:high]))
            columns.append(pa.ListArray.from_arrays(offsets, names))
        yield pa.table(columns, schema=SEQUENCES if kinds is None else SEQUENCES_WITH_EVENTS)


def split_block(timestamps: np.ndarray, config: PrepareConfig) -> dict[str, Any]:
    """What dataset.json says of the split; a temporal one cuts at quantiles of all `timestamps` (ms).

    Raises InputError when time is too coarse to cut training, validation and test apart.
    """
    return split_by(len(timestamps), lambda ranks: [int(np.sort(timestamps)[rank]) for rank in ranks], config)


def split_by(count: int, at_ranks: Callable[[list[int]], list[int]], config: PrepareConfig) -> dict[str, Any]:
    """`split_block` of `count` timestamps that are not at hand; `at_ranks` gives those of some ranks, 0 the least."""
    if config.split == "leave_one_out":
        return {"kind": config.split}
    test = int(count * (1 - config.temporal_test_fraction))
    valid = int(count * (1 - config.temporal_test_fraction - config.temporal_valid_fraction))
    start_ms, valid_start_ms, test_start_ms = at_ranks([0, valid, test])
    if not start_ms < valid_start_ms < test_start_ms:
        raise InputError(
            f"the events are at too few different times for prepare.split temporal (training, validation and test "
            f"would begin at {start_ms}, {valid_start_ms} and {test_start_ms}); set prepare.split to leave_one_out"
        )
    return {"kind": config.split, "valid_start_ms": valid_start_ms, "test_start_ms": test_start_ms}


class Window(NamedTuple):
    """`BINS` bins of 2 ** `shift` milliseconds each, the first from `low` on."""

    low: int
    shift: int


def order_statistics(
    ranks: Sequence[int], low: int, high: int, histogram: Callable[[Sequence[Window]], Sequence[np.ndarray]]
) -> list[int]:
    """The timestamps of some ranks, exactly, of timestamps between `low` and `high` that are not at hand.

    histogram: how many of them lie in each bin (BINS,) of some windows. Every round cuts what is left for each rank
    into BINS pieces, so int64 takes four.
    """
    windows = [Window(low, max(0, (high - low).bit_length() - BINS.bit_length() + 1))] * len(ranks)
    left = list(ranks)
    while True:
        distinct = list(dict.fromkeys(windows))
        ends = dict(zip(distinct, (np.cumsum(counts) for counts in histogram(distinct)), strict=True))
        bins = [int(np.searchsorted(ends[w], rank, side="right")) for w, rank in zip(windows, left, strict=True)]
        left = [rank - int(ends[w][b - 1]) if b else rank for w, rank, b in zip(windows, left, bins, strict=True)]
        lows = [window.low + (b << window.shift) for window, b in zip(windows, bins, strict=True)]
        if not any(window.shift for window in windows):
            return lows
        windows = [Window(at, max(0, w.shift - BINS.bit_length() + 1)) for at, w in zip(lows, windows, strict=True)]


def count_bins(timestamps: np.ndarray, window: Window) -> np.ndarray:
    """int64 (BINS,): how many timestamps lie in each bin of the window."""
    past = timestamps.view(np.uint64) - np.uint64(window.low % 2**64)  # what lies before it wraps around, beyond it
    bins = past >> np.uint64(window.shift)
    return np.bincount(bins[bins < BINS].astype(np.int64), minlength=BINS)


def _encoded(column: pa.ChunkedArray) -> tuple[np.ndarray, pa.Array]:
    """Each value's position, int (E,), -1 for a null, among values of large_string, some of which may be unused."""
    if not pa.types.is_dictionary(column.type):
        column = column.cast(pa.large_string()).dictionary_encode()
    if not len(column):
        return np.zeros(0, np.int32), pa.array([], pa.large_string())
    whole = column.unify_dictionaries().combine_chunks()
    whole = whole.chunk(0) if isinstance(whole, pa.ChunkedArray) else whole
    codes = whole.indices.cast(pa.int32()).fill_null(-1).to_numpy()
    return codes, whole.dictionary.cast(pa.large_string())


def _lacks(codes: np.ndarray, values: pa.Array) -> np.ndarray:
    """bool (E,): the values that name nothing."""
    return np.append(is_empty(values), True)[codes]


def _renumbered(codes: np.ndarray, values: pa.Array) -> tuple[np.ndarray, pa.Array]:
    """The codes (E,), int32, by order of appearance, and the values in that order; the unused ones leave."""
    first = np.full(len(values), len(codes))
    first[codes[::-1]] = np.arange(len(codes))[::-1]
    used = np.flatnonzero(first < len(codes))
    used = used[np.argsort(first[used])]
    number = np.empty(len(values), np.int32)
    number[used] = np.arange(len(used))
    return number[codes], values.take(pa.array(used))


def _checked_timestamps(column: pa.ChunkedArray, where: str) -> pa.Array:
    try:
        return pa.concat_arrays([pa.array([], pa.int64()), *column.cast(pa.int64()).chunks])
    except pa.ArrowInvalid:
        raise InputError(
            f"{where}: column {TIMESTAMP!r} holds a value beyond int64; store milliseconds since the epoch as int64"
        ) from None


def _event_keys(rows: np.ndarray, users: pa.Array, user: np.ndarray, items: pa.Array, item: np.ndarray) -> pa.Array:
    """`row 7: user_id u1, item_id i9` of each event in question; Arrow's text, as there may be millions of them."""
    kind = pa.large_string()
    names = [pc.fill_null(ids.take(pa.array(at, mask=at < 0)), "None") for ids, at in ((users, user), (items, item))]
    text = [pa.scalar(part, kind) for part in ("row ", f": {USER_ID} ", f", {ITEM_ID} ", "")]
    row = pa.array(rows).cast(kind)
    return pc.binary_join_element_wise(text[0], row, text[1], names[0], text[2], names[1], text[3])
