"""A prepared data set, mapped, and who may see which event. Knows rows and time; knows no model.

The only place that tells training, validation and test apart: whoever trains asks `training_histories`, whoever
measures asks `held_out`, and no event is a target of one and visible to the other.

Shapes: B users · E events · N items.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Literal, NamedTuple, overload

import numpy as np

from pixrec import storage
from pixrec.data.arrays import Arrays, open_arrays
from pixrec.data.ids import Ids, only
from pixrec.data.items import DATASET_MARKER, FORMAT, PICTURES_FOLDER, ItemTable, open_items, read_info
from pixrec.errors import InputError

__all__ = [
    "DATASET_MARKER",
    "FORMAT",
    "ITEMS_FOLDER",
    "PICTURES_FOLDER",
    "REJECTS_FOLDER",
    "SEQUENCES_FOLDER",
    "Dataset",
    "Events",
    "HeldOut",
    "Histories",
    "Part",
    "Targets",
    "load_dataset",
    "sample_users",
    "targets",
]

EVENTS_AT_A_TIME = 4_000_000

ONE_STEP_SHARE = 0.9
"""Where so many of the steps between events are of one length, timestamps tell the order and nothing else."""

CONTENT_NAMES = {"interactions", "events", "ratings", "reviews", "sequences"}
"""File names that say what is in the file and not whose it is."""
ITEMS_FOLDER, SEQUENCES_FOLDER, REJECTS_FOLDER = "items", "sequences", "rejects"

Part = Literal["valid", "test"]


class Histories(Sequence[np.ndarray]):
    """B pieces of one long array, each a view made when it is asked for: piece b is `values[starts[b] : ends[b]]`.

    So the histories of millions of users cost 16 bytes a user beside the array, which may be mapped from a file.
    `is_target`, bool beside `values`, says which events may be a target of training; None: all.
    """

    def __init__(
        self, values: np.ndarray, starts: np.ndarray, ends: np.ndarray, is_target: np.ndarray | None = None
    ) -> None:
        self.values, self.starts, self.ends, self.is_target = values, starts, ends, is_target

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
            return Histories(self.values, self.starts[at], self.ends[at], self.is_target)
        return self.values[self.starts[at] : self.ends[at]]

    @property
    def lengths(self) -> np.ndarray:
        """int64 (B,)"""
        return self.ends - self.starts

    def only(self, which: np.ndarray) -> Histories:
        """Some of them, by number or by a mask (B,)."""
        return Histories(self.values, self.starts[which], self.ends[which], self.is_target)

    @property
    def marks(self) -> Histories | None:
        """`is_target` of each piece."""
        return None if self.is_target is None else Histories(self.is_target, self.starts, self.ends)

    def blocks(self) -> Iterator[Histories]:
        """All of them, a block of some million events at a time."""
        bounds = np.flatnonzero(np.diff(np.cumsum(self.lengths) // EVENTS_AT_A_TIME, prepend=0))
        for start, stop in itertools.pairwise([0, *bounds.tolist(), len(self)]):
            if start < stop:
                yield self[start:stop]

    def flat(self) -> np.ndarray:
        """The events of all of them, one piece after the other."""
        lengths = self.lengths
        shifts = self.starts - (np.cumsum(lengths) - lengths)
        return self.values[np.repeat(shifts, lengths) + np.arange(lengths.sum())]


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
            only(self.user_ids, users),
            Histories.of(self.histories).only(users),
            self.targets[users],
            None if self.timestamps is None else Histories.of(self.timestamps).only(users),
        )


@dataclass(frozen=True)
class Events:
    """All events of B users, user by user, oldest first: user b's lie at `offsets[b] .. offsets[b + 1]`."""

    user_ids: Sequence[str]
    offsets: np.ndarray  # int64 (B + 1,)
    rows: np.ndarray  # int32 (E,), rows of the item table
    timestamps: np.ndarray  # int64 (E,), milliseconds since the epoch
    is_history: np.ndarray | None = None
    """bool (E,): the events that a history may hold; None: all."""
    is_target: np.ndarray | None = None
    """bool (E,): the events that may be a target; None: all."""

    def before(self, moment_ms: int) -> np.ndarray:
        """int64 (B,): how many events each user had before `moment_ms`."""
        return _count(self.timestamps < moment_ms, self.offsets)

    def tell_time(self) -> bool:
        """False where the timestamps are an order only: where most steps from a user's event to a later one are of one
        length, as in tables whose events were numbered. A million steps are looked at."""
        later = np.arange(1, len(self.rows), max(1, len(self.rows) // 1_000_000))
        later = later[self.offsets[np.searchsorted(self.offsets, later)] != later]  # first events have no step before
        steps = self.timestamps[later] - self.timestamps[later - 1]
        counts = np.unique(steps[steps > 0], return_counts=True)[1]
        return bool(len(counts) and counts.max() < ONE_STEP_SHARE * counts.sum())


class Targets(NamedTuple):
    """The position of each user's validation and test target among the user's own events, int64 (B,), -1 where there
    is none; and how many of the first events are training's, and how many lie before the test, int64 (B,)."""

    valid: np.ndarray
    test: np.ndarray
    training: np.ndarray
    before_test: np.ndarray


def targets(events: Events, split: Mapping[str, Any]) -> Targets:
    """What the `split` of dataset.json makes of each user's events. A target needs an event of a history before it."""
    lengths = np.diff(events.offsets)
    if split["kind"] == "temporal":
        valid_start, test_start = events.before(split["valid_start_ms"]), events.before(split["test_start_ms"])
        test, valid = _last_target(events, test_start, lengths), _last_target(events, valid_start, test_start)
        return Targets(valid, test, valid_start, test_start)
    none = np.zeros(len(lengths), np.int64)
    test = _last_target(events, none, lengths)
    before_test = np.where(test >= 0, test, lengths)
    valid = np.where(test >= 0, _last_target(events, none, before_test), -1)
    return Targets(valid, test, np.where(valid >= 0, valid, before_test), before_test)


def _last_target(events: Events, start: np.ndarray, stop: np.ndarray) -> np.ndarray:
    """int64 (B,): the last event from `start` to `stop`, positions within each user's, that may be a target and has a
    history; -1 where there is none."""
    last = stop - 1
    if events.is_target is not None:
        marked = np.where(events.is_target, np.arange(len(events.is_target)), -1)
        marked = np.maximum.accumulate(marked)  # the newest target at or before each event
        ends = events.offsets[:-1] + stop
        last = np.where(stop > 0, marked[ends - 1] - events.offsets[:-1], -1)
    first = np.zeros(len(start), np.int64)
    if events.is_history is not None:
        place = np.where(events.is_history, 0, 1)
        first = _leading(place, events.offsets)
    return np.where((last >= start) & (last > first), last, -1)


def _leading(ones: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """int64 (B,): how many ones each user's values (E,) begin with."""
    zeros = np.append(np.flatnonzero(ones == 0), offsets[-1])
    return np.minimum(zeros[np.searchsorted(zeros, offsets[:-1])], offsets[1:]) - offsets[:-1]


def _count(mask: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """int64 (B,): how many of each user's values (E,) are true. No user is without any."""
    if not len(mask):
        return np.zeros(len(offsets) - 1, np.int64)
    return np.add.reduceat(mask, offsets[:-1], dtype=np.int64)


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

        `with_validation`: everything before the test, for a model whose settings are chosen already. Events of the
        kinds of `prepare.target_events` are marked as targets; where no history holds any, all events may be one.
        """
        lengths = self._lengths_before_test() if with_validation else self._training_lengths()
        histories = self._first(self.events.rows, lengths)
        if self.events.is_target is None:
            return histories
        marks = self._first(self.events.is_target, lengths)
        none = not any(block.flat().any() for block in marks.blocks())
        return Histories(histories.values, histories.starts, histories.ends, None if none else marks.values)

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

    @functools.cached_property
    def targets(self) -> Targets:
        """Where each user's targets are."""
        return targets(self.events, self.info["split"])

    def training_visible(self) -> np.ndarray:
        """bool (E,): the events visible to training."""
        return visible(self.events.offsets, self._training_lengths())

    def training_counts(self) -> np.ndarray:
        """int64 (N,): events per item visible to training."""
        counts = np.zeros(len(self.items), dtype=np.int64)
        for block in self.training_events()[0].blocks():
            counts += np.bincount(block.flat(), minlength=len(counts))
        return counts

    def training_events(self) -> tuple[Histories, Histories]:
        """Rows and timestamps of each user's events visible to training, those that no history may hold among them."""
        starts = self.events.offsets[:-1]
        ends = starts + self._training_lengths()
        return Histories(self.events.rows, starts, ends), Histories(self.events.timestamps, starts, ends)

    def held_out(self, part: Part) -> HeldOut:
        """Users to validate or test on. A history holds every event before its target, later parts never."""
        target = self.targets.test if part == "test" else self.targets.valid
        users = np.flatnonzero(target >= 0)
        starts = self.events.offsets[:-1][users]
        ends = starts + target[users]
        return HeldOut(
            only(self.events.user_ids, users),
            self._histories(self.events.rows, starts, ends),
            self.events.rows[ends].astype(np.int64),
            self._histories(self.events.timestamps, starts, ends) if self.tells_time else None,
        )

    def _training_lengths(self) -> np.ndarray:
        return self.targets.training

    def _lengths_before_test(self) -> np.ndarray:
        return self.targets.before_test

    def _first(self, values: np.ndarray, lengths: np.ndarray) -> Histories:
        """The values (E,) of each user's first `lengths` (B,) events; users without any are left out."""
        starts = self.events.offsets[:-1]
        histories = self._histories(values, starts, starts + lengths)
        return histories.only(histories.lengths > 0)

    def _histories(self, values: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> Histories:
        """Pieces of the values (E,), without those of events that no history may hold."""
        if self.events.is_history is None:
            return Histories(values, starts, ends)
        kept = np.flatnonzero(self.events.is_history)
        return Histories(values[kept], np.searchsorted(kept, starts), np.searchsorted(kept, ends))


def visible(offsets: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """bool (E,): the first `lengths` (B,) events of each user."""
    mask = np.zeros(int(offsets[-1]) + 1, np.int8)
    np.add.at(mask, offsets[:-1], np.int8(1))
    np.add.at(mask, offsets[:-1] + lengths, np.int8(-1))
    return np.cumsum(mask[:-1], dtype=np.int8).astype(bool)


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
    """Open a prepared data set; its arrays are mapped, its items and pictures read when they are asked for.

    Raises ArtifactError when it is absent, incomplete, of another format, or does not agree with itself.
    """
    info = read_info(uri)
    arrays = open_arrays(uri, str(info.get("fingerprint", "")))
    return Dataset(uri, open_items(uri, arrays), info, _events(arrays, info))


def _events(arrays: Arrays, info: Mapping[str, Any]) -> Events:
    kinds = info.get("events")
    masks: dict[str, np.ndarray] = {}
    if kinds is not None:
        event = arrays["event"]
        for name, chosen in (("is_history", kinds["history"]), ("is_target", kinds["target"])):
            if set(chosen) != set(kinds["kinds"]):
                masks[name] = np.isin(event, [kinds["kinds"].index(kind) for kind in chosen])
    user_ids = Ids(arrays.user_ids)
    return Events(user_ids, arrays["user_offset"], arrays["item_row"], arrays["timestamp"], **masks)
