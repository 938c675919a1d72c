"""A prepared data set in memory, and who may see which event. Knows rows and time; knows no model.

The only place that tells training, validation and test apart: whoever trains asks `training_histories`, whoever
measures asks `held_out`, and no event is a target of one and visible to the other.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Literal, NamedTuple, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pixrec import storage
from pixrec.data.items import ItemTable, load_items
from pixrec.errors import ArtifactError, InputError
from pixrec.schema import ITEM_IDS, SEQUENCES, TIMESTAMPS, USER_ID

ONE_STEP_SHARE = 0.9
"""Where so many of the steps between events are of one length, timestamps tell the order and nothing else."""

CONTENT_NAMES = {"interactions", "events", "ratings", "reviews", "sequences"}
"""File names that say what is in the file and not whose it is."""

DATASET_MARKER = "dataset.json"
ITEMS_FOLDER, SEQUENCES_FOLDER, REJECTS_FOLDER = "items", "sequences", "rejects"

Part = Literal["valid", "test"]


class Histories(Sequence[np.ndarray]):
    """B pieces of one long array, each a view made when it is asked for: piece b is `values[starts[b] : ends[b]]`.

    So the histories of millions of users cost 16 bytes a user beside the array, which may be mapped from a file.
    """

    def __init__(self, values: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> None:
        self.values, self.starts, self.ends = values, starts, ends

    @classmethod
    def of(cls, pieces: Iterable[np.ndarray]) -> Histories:
        """A copy of separate arrays, or the histories themselves."""
        if isinstance(pieces, Histories):
            return pieces
        arrays = [np.asarray(piece) for piece in pieces]
        ends = np.cumsum([len(array) for array in arrays], dtype=np.int64)
        values = np.concatenate(arrays) if arrays else np.zeros(0, dtype=np.int64)
        return cls(values, np.concatenate([[0], ends[:-1]]).astype(np.int64)[: len(ends)], ends)

    def __len__(self) -> int:
        return len(self.starts)

    @overload
    def __getitem__(self, at: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, at: slice) -> Histories: ...
    def __getitem__(self, at: int | slice) -> np.ndarray | Histories:
        if isinstance(at, slice):
            return Histories(self.values, self.starts[at], self.ends[at])
        return self.values[self.starts[at] : self.ends[at]]

    @property
    def lengths(self) -> np.ndarray:
        """int64 (B,)"""
        return self.ends - self.starts

    def only(self, which: np.ndarray) -> Histories:
        """Some of them, by number or by a mask (B,)."""
        return Histories(self.values, self.starts[which], self.ends[which])


class Users(NamedTuple):
    """B users to recommend to: what a scorer may know of them, and so nothing of what comes next."""

    user_ids: Sequence[str]
    histories: Sequence[np.ndarray]
    """Rows of each user's items, oldest first, never empty."""
    timestamps: Sequence[np.ndarray] | None = None
    """When each event of the histories was, in milliseconds; None where that is unknown."""


class HeldOut(NamedTuple):
    """B users to measure on: given `histories` (rows, oldest first, never empty), each `targets` row is next."""

    user_ids: Sequence[str]
    histories: Sequence[np.ndarray]
    targets: np.ndarray
    timestamps: Sequence[np.ndarray] | None = None
    """When each event of the histories was, in milliseconds; None where that is unknown. The targets' are not told."""

    @property
    def users(self) -> Users:
        """The users without their targets."""
        return Users(self.user_ids, self.histories, self.timestamps)

    def only(self, users: np.ndarray) -> HeldOut:
        """Some of the users, by number."""
        return HeldOut(
            [self.user_ids[i] for i in users],
            Histories.of(self.histories).only(users),
            self.targets[users],
            None if self.timestamps is None else Histories.of(self.timestamps).only(users),
        )


@dataclass(frozen=True)
class Events:
    """All events of B users, user by user, oldest first: user b's lie at `offsets[b] .. offsets[b + 1]`."""

    user_ids: list[str]
    offsets: np.ndarray  # int64 (B + 1,)
    rows: np.ndarray  # int64 (E,), rows of the item table
    timestamps: np.ndarray  # int64 (E,), milliseconds since the epoch

    def before(self, moment_ms: int) -> np.ndarray:
        """int64 (B,): how many events each user had before `moment_ms`."""
        earlier = np.concatenate([[0], np.cumsum(self.timestamps < moment_ms)])
        return earlier[self.offsets[1:]] - earlier[self.offsets[:-1]]

    def tell_time(self) -> bool:
        """False where the timestamps are an order only: where most steps from a user's event to a later one are of one
        length, as in tables whose events were numbered. A million steps are looked at."""
        later = np.arange(1, len(self.rows), max(1, len(self.rows) // 1_000_000))
        later = later[self.offsets[np.searchsorted(self.offsets, later)] != later]  # first events have no step before
        steps = self.timestamps[later] - self.timestamps[later - 1]
        counts = np.unique(steps[steps > 0], return_counts=True)[1]
        return bool(len(counts) and counts.max() < ONE_STEP_SHARE * counts.sum())


@dataclass
class Dataset:
    """A prepared data set. `info` is its dataset.json."""

    uri: str
    items: ItemTable
    info: dict[str, Any]
    events: Events = field(repr=False)

    @property
    def name(self) -> str:
        """What people call it."""
        return str(self.info.get("name") or storage.name(self.uri))

    def training_histories(self, *, with_validation: bool = False) -> Histories:
        """Each user's rows visible to training, oldest first; users without any are left out.

        `with_validation`: everything before the test, for a model whose settings are chosen already.
        """
        lengths = self._lengths_before_test() if with_validation else self._training_lengths()
        return self._first(self.events.rows, lengths)

    def training_timestamps(self) -> Histories:
        """When each event of `training_histories` was, in milliseconds, in the same order.

        Raises InputError where the timestamps tell the order of the events and nothing else.
        """
        if not self.tells_time:
            raise InputError(
                f"{self.uri}: the timestamps tell the order of the events and not their time (they go on by equal "
                "steps), so there is nothing to learn from; set model.compact.time to none or give real timestamps"
            )
        return self._first(self.events.timestamps, self._training_lengths())

    @functools.cached_property
    def tells_time(self) -> bool:
        """Whether the timestamps are moments, and not an order only."""
        return self.events.tell_time()

    def training_visible(self) -> np.ndarray:
        """bool (E,): the events visible to training."""
        visible = np.repeat(self._training_lengths(), np.diff(self.events.offsets))
        position = np.arange(len(self.events.rows)) - np.repeat(self.events.offsets[:-1], np.diff(self.events.offsets))
        return position < visible

    def training_counts(self) -> np.ndarray:
        """int64 (N,): events per item visible to training."""
        return np.bincount(self.events.rows[self.training_visible()], minlength=len(self.items))

    def held_out(self, part: Part) -> HeldOut:
        """Users to validate or test on. A history holds every event before its target, later parts never."""
        target = self._target_positions(part)
        users = np.flatnonzero(target >= 1)  # a target needs a history
        starts = self.events.offsets[:-1][users]
        ends = starts + target[users]
        return HeldOut(
            [self.events.user_ids[user] for user in users],
            Histories(self.events.rows, starts, ends),
            self.events.rows[ends],
            Histories(self.events.timestamps, starts, ends) if self.tells_time else None,
        )

    def _first(self, values: np.ndarray, lengths: np.ndarray) -> Histories:
        """The values (E,) of each user's first `lengths` (B,) events; users without any are left out."""
        starts, ends = self.events.offsets[:-1], self.events.offsets[:-1] + lengths
        some = ends > starts
        return Histories(values, starts[some], ends[some])

    def _training_lengths(self) -> np.ndarray:
        lengths, split = np.diff(self.events.offsets), self.info["split"]
        if split["kind"] == "temporal":
            return self.events.before(split["valid_start_ms"])
        return np.maximum(lengths - 2, 1)  # one or two events: the first is training's

    def _lengths_before_test(self) -> np.ndarray:
        lengths, split = np.diff(self.events.offsets), self.info["split"]
        if split["kind"] == "temporal":
            return self.events.before(split["test_start_ms"])
        return np.maximum(lengths - 1, 1)

    def _target_positions(self, part: Part) -> np.ndarray:
        """int64 (B,): position of each user's target in the user's own events; below 1 where there is none."""
        lengths, split = np.diff(self.events.offsets), self.info["split"]
        if split["kind"] == "leave_one_out":
            return lengths - 1 if part == "test" else lengths - 2
        ends = lengths if part == "test" else self.events.before(split["test_start_ms"])
        starts = self.events.before(split["test_start_ms"] if part == "test" else split["valid_start_ms"])
        return np.where(ends > starts, ends - 1, -1)


def source_name(interactions_uri: str) -> str:
    """What to call a data set without a name: the interactions' file or folder, or, where that is only called what it
    holds (`interactions.parquet`), the folder that it lies in."""
    path = PurePosixPath(storage.absolute(interactions_uri))
    stem = path.name.partition(".")[0]
    return path.parent.name if stem.lower() in CONTENT_NAMES and path.parent.name else stem


def sample_users(held_out: HeldOut, max_users: int | None, seed: int) -> HeldOut:
    """At most `max_users` of the users, drawn at random by `seed`, in their old order; all of them for None."""
    if max_users is None or max_users >= len(held_out.targets):
        return held_out
    return held_out.only(np.sort(np.random.default_rng(seed).choice(len(held_out.targets), max_users, replace=False)))


def load_dataset(uri: str) -> Dataset:
    """Read a prepared data set. Raises ArtifactError when it is absent, incomplete, or does not agree with itself."""
    marker = storage.join(uri, DATASET_MARKER)
    if not storage.exists(marker):
        raise ArtifactError(f"{uri} holds no {DATASET_MARKER}: no complete data set; make it with pixrec prepare")
    info = storage.read_json(marker, ("split",))
    items = load_items(uri)
    try:
        table = storage.read_table(storage.join(uri, SEQUENCES_FOLDER), SEQUENCES.names)
    except InputError as error:
        raise ArtifactError(f"{uri} is no complete data set ({error}); make it with pixrec prepare") from None
    return Dataset(uri, items, info, _events(uri, items, table))


def _events(uri: str, items: ItemTable, table: pa.Table) -> Events:
    known = pa.array(items.item_ids, pa.string())
    rows = pc.index_in(_flat(table.column(ITEM_IDS), pa.string()), value_set=known)
    if rows.null_count:
        raise ArtifactError(f"{uri}: sequences/ name {rows.null_count} items that items/ lacks; make it again")
    lengths = pc.list_value_length(table.column(ITEM_IDS)).to_numpy()
    timestamps = _flat(table.column(TIMESTAMPS), pa.int64()).to_numpy()
    return Events(
        table.column(USER_ID).to_pylist(),
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        rows.to_numpy().astype(np.int64),
        timestamps,
    )


def _flat(lists: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    return pa.chunked_array([chunk.flatten() for chunk in lists.chunks], kind)
