"""Training histories cut into windows, and the windows of an epoch dealt into batches.

The batches of an epoch are a function of the histories, the settings, the seed and the epoch's number alone, so that a
resumed run reads what the undisturbed one would have. They are arrays of numbers: where each window begins and ends in
the one array of all events. A window is a view of that, made when its batch is asked for. Where only some events may be
a target, every window ends with one.

Shapes: B histories · E events · W windows of an epoch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from pixrec.config import SequenceConfig, TrainConfig
from pixrec.data.sequences import Histories
from pixrec.errors import InputError

POOL_STEPS = 16
"""`RecentWindows` sorts the windows of so many steps by length together, so that those of a batch are alike."""


class Batches(Sequence[Histories]):
    """The batches of an epoch: its windows in order, and where each batch ends."""

    def __init__(self, windows: Histories, ends: np.ndarray) -> None:
        self.windows, self._bounds = windows, [0, *ends.tolist()]

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, at: int) -> Histories:  # type: ignore[override]
        return self.windows[self._bounds[at] : self._bounds[at + 1]]


class _Windows(ABC):
    """Windows of at most `max_history_items` + 1 events of the histories that have two or more.

    An event is a row, or a pair of a row and its timestamp: a history of n is an array (n,) or (n, 2).
    """

    stream: int
    """Tells the random numbers of one way of cutting from those of the other."""

    def __init__(self, histories: Sequence[np.ndarray], max_history_items: int, size: int, seed: int) -> None:
        given = Histories.of(histories)
        self._targets = None if given.is_target is None else np.flatnonzero(given.is_target)
        if self._targets is not None:
            newest = self._newest_target(given.ends)
            given = Histories(given.values, given.starts, np.maximum(newest, given.starts), given.is_target)
        self.histories = given.only(given.lengths >= 2)
        if not len(self.histories):
            ends = "" if self._targets is None else " of which the later is of a kind of prepare.target_events"
            raise InputError(
                f"no training history has two events{ends}, so there is no next item to learn; lower prepare.min_* "
                "or give more interactions"
            )
        self.lengths = self.histories.lengths
        self.stride, self.size, self.seed = max_history_items, size, seed
        self._latest: tuple[int, Batches] | None = None

    def epoch(self, epoch: int) -> Batches:
        """The batches of an epoch, each of up to `size` windows of events, oldest first."""
        if self._latest is None or self._latest[0] != epoch:
            history, end, ends = self._draw(np.random.default_rng([self.seed, self.stream, epoch]))
            first = self.histories.starts[history]
            if self._targets is not None:
                earliest = self._targets[np.searchsorted(self._targets, first + 1)] + 1 - first
                end = np.maximum(self._newest_target(first + end) - first, earliest)
            starts = first + np.maximum(0, end - self.stride - 1)
            windows = Histories(self.histories.values, starts, first + end, self.histories.is_target)
            self._latest = (epoch, Batches(windows, ends))
        return self._latest[1]

    @abstractmethod
    def _draw(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Number of the history (W,) and end within it (W,) of each window in order; where each batch ends."""

    def _grid(self, histories: np.ndarray, newest: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Windows of the histories of these numbers (B,) that end at `newest` (B,) and at every `stride` events before,
        while two events are left: numbers of their histories (W,) and their ends (W,), the newest of each history
        first. Left out are those whose last `stride` events hold no target."""
        counts = np.maximum(0, -((1 - newest) // self.stride))  # of range(newest, 1, -stride)
        history, newest = np.repeat(histories, counts), np.repeat(newest, counts)
        before = np.arange(len(history)) - np.repeat(np.cumsum(counts) - counts, counts)
        end = newest - self.stride * before
        if self._targets is None:
            return history, end
        first = self.histories.starts[history]
        kept = self._newest_target(first + end) > first + np.maximum(end - self.stride, 1)
        return history[kept], end[kept]

    def _newest_target(self, ends: np.ndarray) -> np.ndarray:
        """(…,) the newest end, at `ends` or before, of a piece of the array of all events that ends with a target; 0
        where there is none."""
        assert self._targets is not None
        place = np.searchsorted(self._targets, ends)
        return np.where(place > 0, self._targets[np.maximum(place, 1) - 1] + 1, 0)

    def _alike(self, order: np.ndarray, end: np.ndarray, pool: int) -> np.ndarray:
        """Windows in an order, those of each `pool` sorted by their length."""
        lengths = np.minimum(end[order], self.stride + 1)
        return order[np.lexsort((lengths, np.arange(len(order)) // pool))]


class ShiftedWindows(_Windows):
    """As many batches in every epoch, all of one size: the newest window of every history, and older ones, which end
    before a cut that moves from epoch to epoch, always as many. So every event is a target once where windows fit; of
    longer histories the newest events always are, older ones the less often the older they are. What the interleaved
    towers read."""

    stream = 1

    def __init__(self, histories: Sequence[np.ndarray], max_history_items: int, config: TrainConfig) -> None:
        super().__init__(histories, max_history_items, config.histories_per_step, config.seed)
        self.config = config
        self._history, self._end = self._grid(np.arange(len(self.lengths)), self.lengths)
        self._is_older = self._end < self.lengths[self._history]
        self.steps_per_epoch = -(-len(self._end) // self.size)
        self.examples_per_step = int((self.lengths - 1).sum()) / self.steps_per_epoch

    def total_steps(self) -> int:
        steps = self.steps_per_epoch * self.config.epochs
        return steps if self.config.max_steps is None else min(steps, self.config.max_steps)

    def step(self, step: int, rank: int = 0, world_size: int = 1) -> Sequence[np.ndarray]:
        """The windows of catalog rows that worker `rank` reads in `step`."""
        epoch, within = divmod(step, self.steps_per_epoch)
        return self.epoch(epoch)[within][rank::world_size]

    def _draw(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        order = np.resize(rng.permutation(len(self._end)), self.steps_per_epoch * self.size)
        later = rng.integers(0, self.stride, len(self.lengths))  # the newest window does not move
        ends = self._end + later[self._history] * self._is_older
        if (steps := self.config.bucket_steps) > 1:
            alike = self._alike(order, ends, steps * self.size).reshape(-1, self.size)
            buckets = np.split(alike, range(steps, len(alike), steps))
            order = np.concatenate([rng.permutation(b) for b in buckets]).ravel()  # no order of lengths step by step
        return self._history[order], ends[order], np.arange(self.size, len(order) + 1, self.size)


class RecentWindows(_Windows):
    """Each epoch the newest window of every history, and older ones cut at places that change. Batches are of windows
    of like length. What the compact tower reads."""

    stream = 3

    def __init__(
        self, histories: Sequence[np.ndarray], max_history_items: int, config: SequenceConfig, seed: int
    ) -> None:
        super().__init__(histories, max_history_items, config.histories_per_step, seed)

    def _draw(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        long = np.flatnonzero(self.lengths > self.stride + 1)
        older, older_end = self._grid(long, self.lengths[long] - rng.integers(1, self.stride + 1, len(long)))
        history = np.concatenate([np.arange(len(self.lengths)), older])
        end = np.concatenate([self.lengths, older_end])
        by_history = np.argsort(history, kind="stable")
        history, end = history[by_history], end[by_history]
        near = self._alike(rng.permutation(len(end)), end, self.size * POOL_STEPS)
        batches = np.split(near, range(self.size, len(near), self.size))
        dealt = [batches[b] for b in rng.permutation(len(batches))]
        order = np.concatenate(dealt)
        return history[order], end[order], np.cumsum([len(batch) for batch in dealt])


class _Pairs:
    """Two arrays (E,) as one of pairs (E, 2), put together for the piece that is asked for."""

    def __init__(self, *columns: np.ndarray) -> None:
        self.columns = columns

    def __getitem__(self, piece: Any) -> np.ndarray:
        return np.stack([column[piece] for column in self.columns], axis=1)


def timed(histories: Sequence[np.ndarray], timestamps: Sequence[np.ndarray] | None) -> Sequence[np.ndarray]:
    """Histories (n, 2) of rows and their timestamps; as they are where those are unknown."""
    if timestamps is None:
        return histories
    rows, times = Histories.of(histories), Histories.of(timestamps)
    if not (np.array_equal(rows.starts, times.starts) and np.array_equal(rows.ends, times.ends)):
        raise ValueError("the timestamps are not those of the histories: they lie elsewhere in their array")
    return Histories(cast(np.ndarray, _Pairs(rows.values, times.values)), rows.starts, rows.ends, rows.is_target)


def targets_of(windows: Sequence[np.ndarray]) -> list[np.ndarray]:
    """bool (n,) of each window: which of its events are learned, never the first."""
    marks = windows.marks if isinstance(windows, Histories) else None
    found = [np.ones(len(window), bool) for window in windows] if marks is None else [mark.copy() for mark in marks]
    for mark in found:
        mark[0] = False
    return found


def rows_of(window: np.ndarray) -> np.ndarray:
    """The catalog rows (n,) of a window of rows, or of pairs of a row and its timestamp."""
    return window if window.ndim == 1 else window[:, 0]
