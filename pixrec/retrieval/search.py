"""Search among the vectors of an index: exact, or approximate where the index has a structure for it; filtered; in
shards. Knows vectors and rows; knows no item, no file and no process.

Shapes: B queries · N items · D width · k results · C candidates · S shards.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol

import numpy as np

from pixrec.index import top_k
from pixrec.retrieval.approximate import Approximate

LEAST_RESULTS = 16
"""As many are proposed as for so many results, also where fewer are wanted."""
EXACT_SHARE = 0.05
"""Where no more of the items pass a filter, all that do are compared: reading the lists they lie in takes as long."""

Found = tuple[np.ndarray, np.ndarray]
"""Scores (B, k) float32, descending, and rows (B, k) int64; of equal scores the lower row comes first. Fewer columns
where fewer items may be found."""


class Search(Protocol):
    """One index, or a part of one."""

    def search(self, queries: np.ndarray, k: int, allowed: np.ndarray | None = None) -> Found: ...


class Searcher:
    """Searches vectors (N, D) float32, which may be mapped."""

    def __init__(self, vectors: np.ndarray, approximate: Approximate | None = None, first_row: int = 0) -> None:
        """approximate: a structure whose rows are those of `vectors`; without one every search is exact.

        first_row: what the rows of the answers begin at, where the vectors are a part of an index.
        """
        self.vectors, self.approximate, self.first_row = vectors, approximate, first_row

    def search(self, queries: np.ndarray, k: int, allowed: np.ndarray | None = None) -> Found:
        """The k items with the largest inner product for each query (B, D). allowed: bool (N,), which may be found.

        Approximate only who is found: scores are exact, and each query gets k items where so many may be found.
        """
        passing = len(self.vectors) if allowed is None else int(np.count_nonzero(allowed))
        if passing == len(self.vectors):
            allowed = None
        structure, enough = self.approximate, EXACT_SHARE * len(self.vectors)
        if structure is None or passing <= max(enough, structure.proposed_each * k):
            scores, rows = self._exact(queries, k, allowed)
        else:
            scores, rows = self._approximate(structure, queries, k, allowed)
        return scores, rows + self.first_row

    def _exact(self, queries: np.ndarray, k: int, allowed: np.ndarray | None) -> Found:
        return top_k(queries, self.vectors, k, None if allowed is None else np.flatnonzero(allowed))

    def _approximate(self, structure: Approximate, queries: np.ndarray, k: int, allowed: np.ndarray | None) -> Found:
        if k < 1 or not np.isfinite(queries).all():
            return self._exact(queries, k, allowed)  # which says what is wrong
        count = structure.proposed_each * max(k, LEAST_RESULTS)
        proposed = np.sort(structure.candidates(queries, count, allowed), axis=1)
        scores = np.einsum("bcd,bd->bc", self.vectors[proposed], queries.astype(np.float32, copy=False))
        scores[proposed < 0] = -np.inf
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        scores, rows = np.take_along_axis(scores, order, 1), np.take_along_axis(proposed, order, 1)
        short = np.flatnonzero(rows[:, -1] < 0)
        if len(short):  # the lists that were read held fewer
            scores[short], rows[short] = self._exact(queries[short], k, allowed)
        return scores, rows


class Merged(NamedTuple):
    scores: np.ndarray
    rows: np.ndarray
    missing: list[int]
    """Numbers of the shards that gave no answer: what they hold may be lacking."""


def row_ranges(num_rows: int, shards: int) -> list[range]:
    """The rows of each of S shards, which differ by one at most in how many they are."""
    bounds = [num_rows * number // shards for number in range(shards + 1)]
    return [range(first, last) for first, last in itertools.pairwise(bounds)]


def merge(answers: Sequence[Found | None], k: int) -> Merged:
    """The k best of what the shards of one index found, in their order; None stands for a shard that did not answer.

    With all answers that of one index, ties included. Raises ValueError where there is none at all.
    """
    given = [answer for answer in answers if answer is not None]
    if not given:
        raise ValueError("no shard gave an answer")
    scores, rows = (np.hstack(columns) for columns in zip(*given, strict=True))
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]  # lower rows stand in earlier shards
    missing = [number for number, answer in enumerate(answers) if answer is None]
    return Merged(np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1), missing)


def search_shards(
    shards: Sequence[Search],
    queries: np.ndarray,
    k: int,
    allowed: Sequence[np.ndarray | None] | None = None,
    lost: Callable[[int, Exception], None] = lambda number, error: None,
) -> Merged:
    """Ask all shards side by side and merge. allowed: for each shard, as its own search takes it.

    A shard that raises is among those `missing`; `lost` is told which and why. Raises ValueError when all do.
    """

    def ask(number: int) -> Found | None:
        try:
            return shards[number].search(queries, k, None if allowed is None else allowed[number])
        except Exception as error:
            lost(number, error)
            return None

    with ThreadPoolExecutor(max_workers=len(shards)) as pool:
        return merge(list(pool.map(ask, range(len(shards)))), k)
