"""What a recommender must beat: scorers without a trained model. Know rows, counts and given vectors; no files.

Shapes: B users · N items · D width of given vectors · E events of training.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from pixrec.data.interactions import BINS, Window, count_bins, order_statistics
from pixrec.data.sequences import Histories, Users
from pixrec.scorers.protocol import Scorer


class Popularity(Scorer):
    """Every user gets the items with the most training events; equally popular items tie."""

    name = "popularity"
    needs = ("events",)

    def __init__(self, training_counts: np.ndarray) -> None:
        """training_counts (N,): events of each item that training may see."""
        self._popularity_N = torch.from_numpy(_levels(np.asarray(training_counts)))

    def scores(self, users: Users) -> torch.Tensor:
        """(B, N) float32, higher is better, in [0, 1)."""
        return self._popularity_N.expand(len(users.histories), -1)


class RecentPopularity(Popularity):
    """The items with the most events in the last stretch of training; among equals the more popular over all time."""

    name = "recent_popularity"

    def __init__(
        self, rows: Sequence[np.ndarray], timestamps: Sequence[np.ndarray], num_items: int, recent_share: float
    ) -> None:
        """rows, timestamps: those of the events of training, user by user. The last `recent_share` of them by time
        count as recent, with all that happened at the moment the stretch begins."""
        rows, timestamps = Histories.of(rows), Histories.of(timestamps)
        begins = _quantile(timestamps, 1 - recent_share)
        recent, ever = np.zeros(num_items, np.int64), np.zeros(num_items, np.int64)
        for some, when in zip(rows.blocks(), timestamps.blocks(), strict=True):
            ever += np.bincount(some.flat(), minlength=num_items)
            recent += np.bincount(some.flat()[when.flat() >= begins], minlength=num_items)
        # int64 holds both counts exactly, so that `super` may rank them as one number
        super().__init__(recent * (int(ever.max(initial=0)) + 1) + ever)


def _quantile(timestamps: Histories, share: float) -> int:
    """The first of the timestamps that has at least this share of the others before it; a block in memory at a time."""
    timestamps = timestamps.only(timestamps.lengths > 0)
    if not len(timestamps):
        return 0
    rank = math.ceil((int(timestamps.lengths.sum()) - 1) * share)
    bounds = [(block.flat().min(), block.flat().max()) for block in timestamps.blocks()]

    def histogram(windows: Sequence[Window]) -> list[np.ndarray]:
        counts = [np.zeros(BINS, np.int64) for _ in windows]
        for block in timestamps.blocks():
            for count, window in zip(counts, windows, strict=True):
                count += count_bins(block.flat(), window)
        return counts

    lows, highs = zip(*bounds, strict=True)
    return order_statistics([rank], int(min(lows)), int(max(highs)), histogram)[0]


class RepeatLast(Popularity):
    """The user's own items again, most recent first, then the most popular ones."""

    name = "repeat_last"

    def scores(self, users: Users) -> torch.Tensor:
        """(B, N) float32, higher is better; the history's items have 1 and more."""
        scores_BN = super().scores(users).numpy().copy()
        for scores, history in zip(scores_BN, users.histories, strict=True):
            scores[history] = np.arange(1, len(history) + 1)  # of a repeated item the last, most recent place holds
        return torch.from_numpy(scores_BN)


_LEAST_CHANCE = 1e-12


class ItemTransition(Scorer):
    """What followed the user's last item in training histories, smoothed over the graph of such steps.

    With P the row-normalised counts of consecutive items, an item's walk is the mean of its rows of P, P², ... P^steps,
    each weighted `damping` times the one before. An item followed n times has the score (n · walk + b · popularity) /
    (n + b): what little was seen of an item leans on what everybody takes (Dirichlet smoothing).
    """

    name = "item_transition"
    needs = ("events",)

    def __init__(
        self, histories: Sequence[np.ndarray], num_items: int, *, steps: int = 2, damping: float = 0.3,
        backoff_events: float = 10.0,
    ) -> None:  # fmt: skip
        """histories: the rows of each training history. backoff_events: b above."""
        pairs, events = _consecutive(histories, num_items)
        starts = np.flatnonzero(np.concatenate([pairs[:1] == pairs[:1], pairs[1:] != pairs[:-1]]))  # of equal pairs
        counts, pairs = np.diff(starts, append=len(pairs)).astype(np.int32), pairs[starts]
        self._next = (pairs % num_items).astype(np.int32)
        pairs //= num_items  # which leaves the first item of each
        self._starts = np.searchsorted(pairs, np.arange(num_items + 1))
        self._followed = np.bincount(pairs, weights=counts, minlength=num_items)
        self._share = counts / self._followed[pairs]
        self._popularity = events / max(1, int(events.sum()))
        self._weights = damping ** np.arange(steps) / (damping ** np.arange(steps)).sum()
        self._backoff = backoff_events

    def scores(self, users: Users) -> torch.Tensor:
        """(B, N) float32: the logarithm of each item's chance to be next, not below log(1e-12).

        As logarithms, because the chances of rare items lie closer together than what counts as a tie.
        """
        return torch.from_numpy(self.chances(users).clip(_LEAST_CHANCE)).log_()

    def chances(self, users: Users) -> np.ndarray:
        """(B, N) float32: each item's chance to be next, by the last of the history, which must not be empty."""
        last, place = np.unique([h[-1] for h in users.histories], return_inverse=True)
        found = np.empty((len(last), len(self._popularity)), np.float32)
        for row, item in zip(found, last, strict=True):
            row[:] = self._chances_after(int(item))
        return found[place]

    def _chances_after(self, item: int) -> np.ndarray:
        step = np.zeros(len(self._popularity))
        step[item] = 1.0
        walk = np.zeros_like(step)
        for weight in self._weights:
            step = self._follow(step)
            walk += weight * step
        seen = self._followed[item]
        return (seen * walk + self._backoff * self._popularity) / (seen + self._backoff)

    def _follow(self, step: np.ndarray) -> np.ndarray:
        """One step of a distribution (N,) over the graph; touches only the rows of P that it needs."""
        items = np.flatnonzero(step)
        counts = self._starts[items + 1] - self._starts[items]
        edges = np.arange(counts.sum()) + np.repeat(self._starts[items] - np.cumsum(counts) + counts, counts)
        flow = np.repeat(step[items], counts) * self._share[edges]
        return np.bincount(self._next[edges], weights=flow, minlength=len(step))


class ContentLinear(Scorer):
    """A linear user model on frozen item vectors: how far content goes without a user tower.

    A user is the mean of the history's vectors, each item's weight `decay` times that of the one after it; a matrix
    takes it to the next item's vector. The matrix is the ridge solution over all consecutive pairs of training.
    """

    name = "content_linear"
    needs = ("model", "events")

    def __init__(
        self, histories: Sequence[np.ndarray], vectors: np.ndarray, *, decay: float = 0.8, ridge: float = 1e-3,
        max_history_items: int = 50,
    ) -> None:  # fmt: skip
        """histories: training histories of rows; vectors (N, D). ridge: as a share of the mean squared length."""
        self._vectors = np.asarray(vectors, dtype=np.float32)
        self._decay, self._longest = decay, max_history_items
        width = self._vectors.shape[1]
        gram, cross = np.zeros((width, width)), np.zeros((width, width))
        for users, following in self._pairs([h[-max_history_items - 1 :] for h in histories if len(h) > 1]):
            gram += users.T @ users
            cross += users.T @ self._vectors[following]
        ridge_term = ridge * max(float(np.trace(gram)), 1e-12) / width * np.eye(width)
        self._map = np.linalg.solve(gram + ridge_term, cross).astype(np.float32)
        self._items = torch.from_numpy(self._vectors)

    def scores(self, users: Users) -> torch.Tensor:
        """(B, N) float32: the inner product of the mapped user with each item."""
        means = np.stack([self._user(h[-self._longest :]) for h in users.histories])
        return torch.from_numpy(means @ self._map) @ self._items.T

    def _user(self, history: np.ndarray) -> np.ndarray:
        weights = self._decay ** np.arange(len(history))[::-1]
        return (weights / weights.sum()).astype(np.float32) @ self._vectors[history]

    def _pairs(self, histories: Sequence[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """For each place in the histories: the users (P, D) up to there, and the rows (P,) that followed."""
        by_length = sorted(histories, key=len, reverse=True)
        lengths = np.array([len(h) for h in by_length])
        sums = np.zeros((len(by_length), self._vectors.shape[1]), dtype=np.float32)
        for place in range(int(lengths.max(initial=1)) - 1):
            alive = int((lengths > place + 1).sum())
            sums = self._decay * sums[:alive] + self._vectors[[h[place] for h in by_length[:alive]]]
            weight = (1 - self._decay ** (place + 1)) / (1 - self._decay) if self._decay < 1 else place + 1
            yield sums / np.float32(weight), np.array([h[place + 1] for h in by_length[:alive]])


def _consecutive(histories: Sequence[np.ndarray], num_items: int) -> tuple[np.ndarray, np.ndarray]:
    """Every pair of items that follow each other, as one number, int64, sorted; and how often each item occurs (N,)."""
    given = Histories.of(histories)
    pairs = np.empty(int(np.maximum(given.lengths - 1, 0).sum()), np.int64)
    events, done = np.zeros(num_items, np.int64), 0
    for block in given.blocks():
        rows = block.flat().astype(np.int64)  # a product of two rows does not fit into less
        goes_on = np.ones(len(rows), dtype=bool)
        goes_on[np.cumsum(block.lengths) - 1] = False
        here = np.flatnonzero(goes_on)
        pairs[done : done + len(here)] = rows[here] * num_items + rows[here + 1]
        events += np.bincount(rows, minlength=num_items)
        done += len(here)
    pairs.sort()
    return pairs, events


def _levels(counts: np.ndarray) -> np.ndarray:
    """Dense ranks in [0, 1) float32 rather than counts: float32 would merge neighbouring counts above 2**24."""
    distinct, level = np.unique(counts, return_inverse=True)
    return (level / max(len(distinct), 1)).astype(np.float32)
