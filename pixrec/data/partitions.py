"""The steps of preparing tables that are larger than memory: each reads a few files and writes one of its own.

A step is a function of its piece of the work and of the `Plan`, and writes whole files under names that follow from
these: it may be done twice, anywhere, and what a killed run did is not done again (`once`). Whoever runs the steps
(here, or as tasks on a cluster) sees their answers, which are counts. Knows no Ray.

In the work folder, `data` is what will be published, and `steps` what the steps hand to each other:

    ids/        the items' ids, a file a piece of the items table
    index/      all of them, and from an id to its row: the files of `arrays`
    events/     usable events, a file a piece of the interactions table, a batch a partition
    ordered/    a folder a partition: its users one after the other, their events by time
    counts/     events of each item, a file a round and partition
    flat/       a folder an array, a file a partition

Shapes: E events of a partition · B its users · N items.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pixrec import storage
from pixrec.config import PrepareConfig
from pixrec.data import interactions, tables
from pixrec.data.arrays import ARRAYS_FOLDER, USER_ID_FILE, Arrays, write_flat, write_ids, write_index
from pixrec.data.ids import IdIndex, hash_ids
from pixrec.data.interactions import Interactions, Ordered, Window
from pixrec.data.pictures import open_pictures
from pixrec.data.sequences import PICTURES_FOLDER, REJECTS_FOLDER, SEQUENCES_FOLDER, Events, targets, visible
from pixrec.schema import EVENT, ITEM_ID, RATING, TIMESTAMP, USER_ID

Answer = dict[str, Any]

EVENTS_PER_PARTITION = 8_000_000
"""About 0.7 GB of memory for whoever orders one."""
ROWS_PER_PIECE = 1 << 20
_PARTS_PER_PARTITION = 1000  # more than it has files of sequences, unless one user has a billion events
_MOST_PARTITIONS = 1000

_DEALT = pa.schema(
    [
        ("user_ids", pa.large_list(pa.large_string())),
        ("user", pa.large_list(pa.int32())),
        ("item", pa.large_list(pa.int32())),
        ("timestamp", pa.large_list(pa.int64())),
        ("event", pa.large_list(pa.uint8())),
        ("kinds", pa.large_list(pa.string())),
    ]
)


@dataclass(frozen=True)
class Plan:
    """What all steps of a run know: its folder, its settings, how many partitions there are, and what errors call the
    tables. Later steps know the `kinds` of events and the `split`."""

    work: str
    config: PrepareConfig
    partitions: int
    items: str | None
    interactions: str
    drop_repeats: bool = False
    kinds: tuple[str, ...] | None = None
    split: dict[str, Any] | None = None

    @property
    def data(self) -> str:
        return storage.join(self.work, "data")

    def step(self, *parts: str) -> str:
        """A file that a step hands to the next."""
        return storage.join(self.work, "steps", *parts)

    @property
    def wanted(self) -> frozenset[str] | None:
        """The kinds of events that are kept; None: all."""
        chosen = (self.config.history_events, self.config.target_events)
        return None if None in chosen else frozenset(kind for kinds in chosen for kind in kinds or ())


def num_partitions(events: int) -> int:
    """Of the size of the table alone, so that the result is the same on any number of workers."""
    return min(max(1, -(-events // EVENTS_PER_PARTITION)), _MOST_PARTITIONS)


def once(row: dict[str, Any], *, step: Callable[[dict[str, Any]], Answer], receipts: str) -> Answer:
    """The answer of `step`, which is written down when the step is done."""
    answer = step(row)
    storage.write_json(storage.join(receipts, f"{row['number']:06d}.json"), answer)
    return answer


def answers(receipts: str) -> dict[int, Answer]:
    """What was written down by `once`, by number."""
    files = storage.list_files(receipts, ".json")
    return {int(storage.name(file).removesuffix(".json")): storage.read_json(file) for file in files}


@dataclass(frozen=True)
class Piece:
    """Row groups `first` to `stop` of a Parquet file; its first row is row `row` of the whole table."""

    number: int
    file: str
    first: int
    stop: int
    row: int


@dataclass(frozen=True)
class Number:
    """A partition, or one of some other things that are counted."""

    number: int


def pieces(files: Iterable[str]) -> list[Piece]:
    """A table in pieces of about `ROWS_PER_PIECE` rows, or of one row group where that has more."""
    found: list[Piece] = []
    row = 0
    for file in files:
        first = rows = 0
        groups = storage.row_groups(file)
        for group, (size, _) in enumerate(groups):
            rows += size
            if rows >= ROWS_PER_PIECE or group == len(groups) - 1:
                found.append(Piece(len(found), file, first, group + 1, row))
                first, row, rows = group + 1, row + rows, 0
    return found


def read_ids(row: dict[str, Any], *, plan: Plan) -> Answer:
    """The ids of a piece of the items table; those rows without one are rejects. Answers how many rows it `read`."""
    piece, read, found, rejected = Piece(**row), 0, [], []
    for table in _stream(piece, [ITEM_ID]):
        ids = tables.usable_ids(table.column(ITEM_ID), piece.row + read)
        read += len(table)
        found.append(ids.item_ids)
        rejected.append(ids.rejects)
    _write_rejects(plan, f"items-{piece.number:06d}", rejected)
    write_ids(plan.step("ids"), f"{piece.number:06d}.arrow", found, durable=False)
    return {"read": read, "kept": sum(map(len, found))}


def see_ids(row: dict[str, Any], *, plan: Plan) -> Answer:
    """The items of a piece of the interactions table, in order of appearance."""
    piece = Piece(**row)
    found = [
        interactions.seen_items(table, plan.interactions) for table in _stream(piece, [USER_ID, ITEM_ID, TIMESTAMP])
    ]
    distinct = pa.concat_arrays([pa.array([], pa.large_string()), *found]).unique()
    write_ids(plan.step("ids"), f"{piece.number:06d}.arrow", [distinct], durable=False)
    return {}


def index_ids(row: dict[str, Any], *, plan: Plan, read: int) -> Answer:
    """Number the items and write the way from id to row. Raises InputError when an items table of `read` rows names no
    item or one twice; where there is no such table, an id counts once."""
    found = pa.concat_arrays([pa.array([], pa.large_string()), *_ids(plan)])
    if plan.items is None:
        found = found.unique()
    else:
        tables.check_item_ids(found, hash_ids(found), read, plan.items)
    write_index(plan.step("index"), found)
    return {"items": len(found)}


def read_events(row: dict[str, Any], *, plan: Plan) -> Answer:
    """Sort out the events of a piece of the interactions table, and deal those that can be used out to partitions.

    Answers their counts, the `kinds` that they are of, and into how many `files` they went.
    """
    piece, config, counts, files = Piece(**row), plan.config, Counter[str](), 0
    kinds: set[str] = set()
    rejected: list[pa.Table] = []
    columns = [USER_ID, ITEM_ID, TIMESTAMP, EVENT] + [RATING] * (config.min_rating is not None)
    index = _index(plan.step("index"), storage.name(plan.work))
    for table in _stream(piece, columns, encoded=(USER_ID, ITEM_ID, EVENT)):
        usable = interactions.usable_interactions(
            table,
            index.rows_of,
            plan.interactions,
            first_row=piece.row + counts[interactions.READ],
            min_rating=config.min_rating,
            wanted=plan.wanted,
        )
        counts.update(usable.counts)
        kinds.update(usable.interactions.kinds)
        rejected.append(usable.rejects)
        dealt = interactions.deal_out(usable.interactions, plan.partitions)
        storage.write_batches(_events_file(plan, piece.number, files), _DEALT, map(_batch, dealt), durable=False)
        files += 1
    _write_rejects(plan, f"interactions-{piece.number:06d}", rejected)
    return {**counts, "rejected": sum(map(len, rejected)), "kinds": sorted(kinds), "files": files}


def order_events(row: dict[str, Any], *, plan: Plan, files: Sequence[int]) -> Answer:
    """Bring the events of a partition in order; `files` is how many each piece of the table went into.

    Answers how many `events` these are and how many `repeats` were left out.
    """
    number = row["number"]
    names = [_events_file(plan, piece, file) for piece, count in enumerate(files) for file in range(count)]
    dealt = [_dealt(batch) for name in names for batch in storage.read_batches(name, [number])]
    gathered = interactions.gather(dealt, plan.kinds)
    del dealt
    ordered = interactions.in_order(gathered)
    if plan.drop_repeats:
        ordered = ordered.only(interactions.is_first(ordered))
    folder = plan.step("ordered", f"{number:06d}")
    columns = {"offset": ordered.offsets, "item": ordered.item, "timestamp": ordered.timestamp, "event": ordered.event}
    for name, values in columns.items():
        if values is not None:
            storage.write_array(storage.join(folder, f"{name}.npy"), values, durable=False)
    write_ids(folder, USER_ID_FILE, [ordered.user_ids], durable=False)
    return {"events": len(ordered), "repeats": len(gathered) - len(ordered)}


def count_survivors(row: dict[str, Any], *, plan: Plan, round: int) -> Answer:
    """Count the events of each item in a partition, when the items that have left by this round have left.

    Answers the `low` and the `high` of their timestamps.
    """
    ordered = _ordered(plan, row["number"], users=False)
    keep = interactions.survivors(ordered, _mask(plan, f"dead-{round}"), plan.config.min_user_events)
    _write_counts(plan, f"round-{round}", row["number"], ordered.item[keep])
    times = ordered.timestamp[keep]
    return {"low": int(times.min()), "high": int(times.max())} if len(times) else {}


def count_times(row: dict[str, Any], *, plan: Plan, windows: Sequence[Window]) -> Answer:
    """How many events of a partition's core lie in each bin of some windows of time."""
    ordered = _ordered(plan, row["number"], users=False)
    times = ordered.timestamp[interactions.survivors(ordered, _mask(plan, "dead"), plan.config.min_user_events)]
    return {"bins": [interactions.count_bins(times, Window(*window)).tolist() for window in windows]}


def write_sequences(row: dict[str, Any], *, plan: Plan) -> Answer:
    """Write what is published of a partition, and its share of the arrays.

    Answers the `hashes` of the files of sequences, how many `users` and `events` there are, and how many
    `test_targets` are of items held out of training.
    """
    number, config, split = row["number"], plan.config, plan.split or {}
    ordered = _ordered(plan, number)
    ordered = ordered.only(interactions.survivors(ordered, _mask(plan, "dead"), config.min_user_events))
    test_targets = 0
    if config.cold_item_share:
        is_target = _is_kind(plan, ordered, config.target_events)
        held_out = interactions.hold_out_items(ordered, _mask(plan, "cold"), split, is_target)
        ordered, test_targets = ordered.only(held_out.keep), held_out.test_targets
    masks = [_is_kind(plan, ordered, kinds) for kinds in (config.history_events, config.target_events)]
    events = Events((), ordered.offsets, ordered.item, ordered.timestamp, *masks)
    trained = visible(ordered.offsets, targets(events, split).training) if len(ordered) else np.zeros(0, bool)
    _write_counts(plan, "training", number, ordered.item[trained])
    flat = {"item_row": ordered.item, "timestamp": ordered.timestamp, "event": ordered.event}
    for name, values in {**flat, "user_offset": ordered.lengths}.items():
        if values is not None:
            storage.write_array(_flat_file(plan, name, number), values, durable=False)
    write_ids(plan.step("flat"), f"{number:06d}-{USER_ID_FILE}", [ordered.user_ids], durable=False)
    index = _index(plan.step("index"), storage.name(plan.work))
    hashes = []
    for part, table in enumerate(interactions.sequences(ordered, index.ids, plan.kinds)):
        name = f"part-{number * _PARTS_PER_PARTITION + part:06d}.parquet"
        hashes.append(storage.write_table(storage.join(plan.data, SEQUENCES_FOLDER, name), table))
    return {"hashes": hashes, "users": len(ordered.lengths), "events": len(ordered), "test_targets": test_targets}


def flat_arrays(plan: Plan) -> list[str]:
    """What `join_array` can write, by number."""
    events = ["item_row", "timestamp"] + ["event"] * (plan.kinds is not None)
    return [*events, "user_offset", "user_id", "training_count", "has_image", "index"]


def join_array(row: dict[str, Any], *, plan: Plan, users: int, events: int) -> Answer:
    """Write one of the arrays that are published, from the shares of all partitions."""
    name, folder = flat_arrays(plan)[row["number"]], storage.join(plan.data, ARRAYS_FOLDER)
    parts = range(plan.partitions)
    if name == "user_offset":
        write_flat(folder, name, users + 1, _offsets(storage.read_array(_flat_file(plan, name, p)) for p in parts))
    elif name == "user_id":
        shares = (plan.step("flat", f"{p:06d}-{USER_ID_FILE}") for p in parts)
        write_ids(folder, USER_ID_FILE, (batch.column(0) for share in shares for batch in storage.read_batches(share)))
    elif name == "training_count":
        counts = sum_counts(plan, "training")
        write_flat(folder, name, len(counts), [counts])
    elif name == "has_image":
        present = open_pictures(storage.join(plan.data, PICTURES_FOLDER)).present()
        write_flat(folder, name, len(present), [present])
    elif name == "index":
        for file in storage.list_files(plan.step("index")):
            storage.write_bytes(storage.join(folder, storage.name(file)), storage.read_bytes(file))
    else:
        write_flat(folder, name, events, (storage.read_array(_flat_file(plan, name, p)) for p in parts))
    return {}


def sum_counts(plan: Plan, what: str) -> np.ndarray:
    """int64 (N,): the events of each item in all partitions."""
    counts = np.zeros(len(_index(plan.step("index"), storage.name(plan.work))), np.int64)
    for partition in range(plan.partitions):
        rows, times = storage.read_array(plan.step("counts", what, f"{partition:06d}.npy"))
        counts[rows] += times
    return counts


def write_mask(plan: Plan, name: str, mask: np.ndarray) -> None:
    """Items, bool (N,), that the steps which follow need to know."""
    storage.write_array(plan.step("masks", f"{name}.npy"), mask, durable=False)


def read_items(plan: Plan) -> Iterator[pa.Array]:
    """The ids of all items, a million at a time."""
    ids = _index(plan.step("index"), storage.name(plan.work)).ids
    for start in range(0, len(ids), ROWS_PER_PIECE):
        yield ids.slice(start, ROWS_PER_PIECE)


def _write_counts(plan: Plan, what: str, partition: int, rows: np.ndarray) -> None:
    counts = np.bincount(rows) if len(rows) else np.zeros(0, np.int64)
    some = np.flatnonzero(counts)
    storage.write_array(
        plan.step("counts", what, f"{partition:06d}.npy"), np.stack([some, counts[some]]), durable=False
    )


def _mask(plan: Plan, name: str) -> np.ndarray:
    return storage.read_array(plan.step("masks", f"{name}.npy"))


def _offsets(lengths: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    end = 0
    yield np.zeros(1, np.int64)
    for block in lengths:
        yield end + np.cumsum(block)
        end += int(block.sum())


def _is_kind(plan: Plan, ordered: Ordered, chosen: tuple[str, ...] | None) -> np.ndarray | None:
    """bool (E,): the events of some kinds; None where those are all."""
    if chosen is None or plan.kinds is None or ordered.event is None:
        return None
    return np.isin(ordered.event, [plan.kinds.index(kind) for kind in chosen])


def _flat_file(plan: Plan, name: str, partition: int) -> str:
    return plan.step("flat", name, f"{partition:06d}.npy")


def _events_file(plan: Plan, piece: int, file: int) -> str:
    return plan.step("events", f"{piece:06d}-{file:03d}.arrow")


def _batch(share: Interactions) -> pa.RecordBatch:
    event = np.zeros(0, np.uint8) if share.event is None else share.event
    values = [share.user_ids, share.user, share.item, share.timestamp, event, list(share.kinds)]
    arrays = []
    for field, value in zip(_DEALT, values, strict=True):
        inner = value if isinstance(value, pa.Array) else pa.array(value, field.type.value_type)
        arrays.append(pa.LargeListArray.from_arrays(pa.array([0, len(inner)], pa.int64()), inner))
    return pa.record_batch(arrays, schema=_DEALT)


def _dealt(batch: pa.RecordBatch) -> Interactions:
    user_ids, user, item, timestamp, event, kinds = (column.flatten() for column in batch.columns)
    return Interactions(
        user_ids, user.to_numpy(), item.to_numpy(), timestamp.to_numpy(), event.to_numpy(), tuple(kinds.to_pylist())
    )


def _ordered(plan: Plan, partition: int, *, users: bool = True) -> Ordered:
    folder = plan.step("ordered", f"{partition:06d}")
    columns = ["offset", "item", "timestamp"] + ["event"] * (plan.kinds is not None)
    offsets, item, timestamp, *event = (storage.read_array(storage.join(folder, f"{name}.npy")) for name in columns)
    if users:
        user_ids = next(storage.read_batches(storage.join(folder, USER_ID_FILE))).column(0)
    else:
        user_ids = pa.nulls(len(offsets) - 1)
    return Ordered(user_ids, offsets, item, timestamp, event[0] if event else None)


def _write_rejects(plan: Plan, name: str, rejected: Sequence[pa.Table]) -> None:
    if any(map(len, rejected)):
        table = pa.concat_tables(rejected)
        storage.write_table(storage.join(plan.data, REJECTS_FOLDER, f"{name}.parquet"), table)


def _stream(piece: Piece, columns: list[str], encoded: Sequence[str] = ()) -> Iterator[pa.Table]:
    """The rows of a piece, about `ROWS_PER_PIECE` at a time."""
    waiting: list[pa.Table] = []
    groups = range(piece.first, piece.stop)
    for table in storage.stream_table(piece.file, columns, ROWS_PER_PIECE, groups=groups, encoded=encoded):
        waiting.append(table)
        if sum(map(len, waiting)) >= ROWS_PER_PIECE:
            yield pa.concat_tables(waiting)
            waiting = []
    if waiting:
        yield pa.concat_tables(waiting)


def _ids(plan: Plan) -> Iterator[pa.Array]:
    for file in storage.list_files(plan.step("ids"), ".arrow"):
        for batch in storage.read_batches(file):
            yield batch.column(0)


@functools.lru_cache(maxsize=1)
def _index(folder: str, key: str) -> IdIndex:
    return Arrays(storage.node_copy(folder, f"{key}-index")).index
