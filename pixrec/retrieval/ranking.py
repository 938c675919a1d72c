"""Which items come first: the nearest, the likeliest or the most bought, filtered, varied, and the reasons why.

Ranks the items of one index version and what live items put in their place. Knows vectors, columns and queries; knows
no model: what it made of a history comes as a vector.

Shapes: B queries · L items of a history · N items of the catalog · D width of the shared space · C width of content
vectors · U answers.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from pixrec.data.items import ItemTable
from pixrec.index import shared_tensor, top_k
from pixrec.live.overlay import View
from pixrec.live.popularity import PRIOR_EVENTS, LivePopularity
from pixrec.query import COSINE, PROBABILITY, PURCHASE_SHARE, Filters, Query, ScoreKind
from pixrec.retrieval.rerank import choose
from pixrec.retrieval.search import Found, Searcher

LEAST_CANDIDATES = 100
"""Diversity and caps choose among at least so many."""

Ranked = list[tuple[str, float]]
"""(item_id, score), best first."""

VectorSearch = Callable[[np.ndarray, int, Filters, bool, np.ndarray], Found]
"""The k items nearest to each vector (B, D) of those that pass the filters, by their rows; then whether to compare the
content vectors, where there are any, and the rows that may not be answers."""


Moved = tuple[np.ndarray, np.ndarray]
"""Columns (E,) and the content vectors (E, C) of items that are live."""


class Mixture(Protocol):
    """Turns cosines and what was counted into chances (`pixrec.scorers.blend`)."""

    def probabilities(
        self, scores: torch.Tensor, histories: Sequence[np.ndarray], moved: Moved | None = None
    ) -> torch.Tensor:
        """(B, N) by the model's scores (B, N) and the histories of rows; `moved`: content that is not the catalog's."""
        ...


class Asked(NamedTuple):
    """A query, and what of its history is known."""

    query: Query
    rows: dict[str, int]
    """of the items of the catalog in the history and among those to exclude"""
    known: list[int]
    """places in the history, ascending"""
    new_vectors: Mapping[str, np.ndarray]
    """vectors (D,) of its new items and of live ones"""

    @property
    def excluded_ids(self) -> set[str]:
        """items that must not be among the answers"""
        return {*self.query.exclude, *(self.query.history if self.query.exclude_history else ())}

    @property
    def excluded(self) -> set[int]:
        """rows of those in the catalog"""
        return {self.rows[i] for i in self.excluded_ids if i in self.rows}

    def vectors(self, item_ids: Sequence[str], of_rows: np.ndarray) -> np.ndarray:
        """Vectors (L, D) of known items of the history, by those of the catalog's rows (N, D); of a live one as it is
        now."""
        new, rows = self.new_vectors, self.rows
        return np.stack([new[item_id] if item_id in new else of_rows[rows[item_id]] for item_id in item_ids])

    def widened(self) -> Asked:
        """With as many answers as diversity and caps choose among."""
        if not self.query.diversity and not self.query.max_per:
            return self
        return self._replace(query=dataclasses.replace(self.query, k=max(LEAST_CANDIDATES, 5 * self.query.k)))


class Ranking:
    """Ranks the items of an index version, and in every call those of a view of the live ones."""

    def __init__(
        self,
        items: ItemTable,
        indexed: np.ndarray,
        searcher: Searcher,
        content: Searcher | None,
        training_counts: np.ndarray,
        live_popularity: LivePopularity,
    ) -> None:
        """indexed: bool (N,), which items may be answers; searcher: of the vectors (N, D) of all; content: of what a
        search compares instead, where there is any; training_counts (N,): events of each item;
        live_popularity: what sells now."""
        self._items, self._indexed = items, indexed
        self._searcher, self._content, self._vectors = searcher, content, searcher.vectors
        self.mixture: Mixture | None = None
        """What recommendations are ranked by in place of cosines."""
        self._popularity = (training_counts / (training_counts.sum() or 1)).astype(np.float32)
        self._most_bought_first = np.argsort(-self._popularity, kind="stable").astype(np.int32)
        self._live_popularity = live_popularity

    def rank(
        self, asked: Sequence[Asked], vectors: np.ndarray, view: View, search: VectorSearch | None = None
    ) -> list[Ranked]:
        """The answers to each, by the user vectors (B, D): one search for those of the same filters. `search` finds the
        nearest items of the index in place of this process, where the ranking is no blend."""
        found = self._best([one.widened() for one in asked], vectors, view, search)
        ranked = []
        for i, one in enumerate(asked):
            again = functools.partial(self._best_of_one, vectors[i : i + 1], view, search)
            ranked.append(self._choose(one, found[i], again, view))
        return ranked

    def kind(self, one: Asked) -> ScoreKind:
        """What the scores of `rank` are."""
        return (PROBABILITY if self.mixture else COSINE) if one.known else PURCHASE_SHARE

    def near(
        self, vector: np.ndarray, one: Asked, view: View, search: VectorSearch | None = None, of_content: bool = False
    ) -> Ranked:
        """The items nearest to one vector (D,), or by content (C,), whatever the query's history."""

        def find(wider: Asked) -> Ranked:
            nearest = self._nearest(vector[None], [wider], one.query.filters, view, search or self.found, of_content)
            return nearest[0]

        return self._choose(one, find(one.widened()), find, view)

    def _best(
        self, asked: Sequence[Asked], vectors: np.ndarray, view: View, search: VectorSearch | None
    ) -> list[Ranked]:
        """The best k of each, by score alone."""
        with_history = [i for i, one in enumerate(asked) if one.known]
        ranked: dict[int, Ranked] = {}
        for filters, members in _by_filters([one.query for one in asked], with_history):
            chosen = [with_history[m] for m in members]
            of_filters = vectors[chosen], [asked[i] for i in chosen], filters, view
            found = self._blended(*of_filters) if self.mixture else self._nearest(*of_filters, search or self.found)
            ranked |= zip(chosen, found, strict=True)
        return [ranked[i] if i in ranked else self._most_bought(one, view) for i, one in enumerate(asked)]

    def _best_of_one(self, vector: np.ndarray, view: View, search: VectorSearch | None, one: Asked) -> Ranked:
        return self._best([one], vector, view, search)[0]

    def _choose(self, one: Asked, found: Ranked, again: Callable[[Asked], Ranked], view: View) -> Ranked:
        """What the query's diversity and caps leave of the best `found`; looks `again`, wider, when that is too few."""
        query, looked = one.query, one.widened().query.k
        if not query.diversity and not query.max_per:
            return found[: query.k]
        while True:
            ids = [item_id for item_id, _ in found]
            caps = [(self._values_of(name, ids, view), most) for name, most in query.max_per.items()]
            scores = np.array([score for _, score in found], np.float32)
            chosen = choose(scores, self.vectors_of(ids, view), query.k, query.diversity, caps)
            if len(chosen) == query.k or len(found) < looked:
                return [found[place] for place in chosen]
            looked *= 4
            found = again(one._replace(query=dataclasses.replace(query, k=looked)))

    def vectors_of(self, item_ids: Sequence[str], view: View) -> np.ndarray:
        """Vectors (U, D) float32 of items of the catalog and live ones. Raises KeyError when one is unknown."""
        places = [view.row_of.get(item_id) for item_id in item_ids]
        rows = [0 if at is not None else self._items.row_of[i] for i, at in zip(item_ids, places, strict=True)]
        found = np.array(self._vectors[rows], np.float32)
        for place, at in enumerate(places):
            if at is not None:
                found[place] = view.vectors[at]
        return found

    def _values_of(self, name: str, item_ids: Sequence[str], view: View) -> list[Any]:
        """What the column `name` holds of items of the catalog and live ones."""
        places = [view.row_of.get(item_id) for item_id in item_ids]
        rows = [0 if at is not None else self._items.row_of[i] for i, at in zip(item_ids, places, strict=True)]
        found = self._items.values(name, rows)
        return [value if at is None else view.fields[at].get(name) for value, at in zip(found, places, strict=True)]

    def reasons(self, one: Asked, items: Ranked, view: View) -> dict[str, str]:
        """By answer the item of the history that is nearest to it; none where nothing of the history is known."""
        known = list(dict.fromkeys(one.query.history[place] for place in one.known))
        if not known or not items:
            return {}
        history = one.vectors(known, self._vectors).astype(np.float32)
        nearest = (self.vectors_of([item_id for item_id, _ in items], view) @ history.T).argmax(axis=1)
        return {item_id: known[place] for (item_id, _), place in zip(items, nearest.tolist(), strict=True)}

    def found(self, vectors: np.ndarray, k: int, filters: Filters, of_content: bool, barred: np.ndarray) -> Found:
        """A VectorSearch among the vectors in this process."""
        searcher = (self._content if of_content else None) or self._searcher
        return searcher.search(vectors, k, self._allowed(filters, barred))

    def _nearest(
        self,
        vectors: np.ndarray,
        asked: Sequence[Asked],
        filters: Filters,
        view: View,
        search: VectorSearch,
        of_content: bool = False,
    ) -> list[Ranked]:
        """For each vector (B, D) its query's k best of the items that pass the filters, by cosine; `of_content`: of
        vectors (B, C), where items have such."""
        live = view.content if of_content and self._content is not None else view.vectors
        barred = [one.excluded for one in asked]
        most = max(one.query.k + len(out) for one, out in zip(asked, barred, strict=True))
        scores, found = search(vectors, most, filters, of_content, view.barred)
        ranked = []
        for out, row_scores, row_found in zip(barred, scores.tolist(), found.tolist(), strict=True):
            pairs = [(self._items.item_ids[r], s) for r, s in zip(row_found, row_scores, strict=True) if r not in out]
            ranked.append(pairs)
        rows = np.flatnonzero(view.mask(filters))
        if len(rows):
            assert live is not None
            excluded = [one.excluded_ids & view.row_of.keys() for one in asked]
            most = max(one.query.k + len(out) for one, out in zip(asked, excluded, strict=True))
            live_scores, live_rows = top_k(vectors, live, most, rows)
            for pairs, without, row_scores, places in zip(ranked, excluded, live_scores, live_rows, strict=True):
                named = zip((view.item_ids[row] for row in places), row_scores.tolist(), strict=True)
                pairs += [(item_id, score) for item_id, score in named if item_id not in without]
                pairs.sort(key=lambda pair: -pair[1])  # stable: of equal scores those of the index come first
        return [pairs[: one.query.k] for one, pairs in zip(asked, ranked, strict=True)]

    def _blended(self, vectors: np.ndarray, asked: Sequence[Asked], filters: Filters, view: View) -> list[Ranked]:
        """As `_nearest`, by the chance of each item to be next. A live item keeps what was counted of the item in
        whose place it stands."""
        assert self.mixture is not None
        rows, known = torch.from_numpy(vectors), len(self._items)
        cosines = rows @ shared_tensor(self._vectors).float().T
        places, item_ids = self._places(view), self._items.item_ids
        if len(places):
            cosines = torch.cat([cosines, torch.zeros(len(rows), view.num_new)], 1)
            cosines[:, places] = rows @ torch.from_numpy(view.vectors[view.current]).T
        allowed, ranked = self._allowed_in_place(filters, view), []
        histories = [
            np.array([one.rows[i] for i in one.query.history if i in one.rows], dtype=np.int64) for one in asked
        ]
        moved = None if view.content is None or not len(places) else (places, view.content[view.current])
        for one, chances in zip(asked, self.mixture.probabilities(cosines, histories, moved).numpy(), strict=True):
            chances[~allowed] = -1
            chances[list(one.excluded)] = -1
            chances[[known + view.new_of[i] for i in one.excluded_ids if i in view.new_of]] = -1
            found = np.argsort(-chances, kind="stable")[: one.query.k]
            named = ((item_ids[row] if row < known else view.new_ids[row - known], row) for row in found.tolist())
            ranked.append([(item_id, float(chances[row])) for item_id, row in named if chances[row] >= 0])
        return ranked

    def _most_bought(self, asked: Asked, view: View) -> list[tuple[str, float]]:
        """What to give somebody of whom nothing is known: (item_id, share of all events). Those of the store count by
        their age, and beside them the training events as `PRIOR_EVENTS` of now."""
        known, item_ids = len(self._items), self._items.item_ids
        allowed = self._allowed_in_place(asked.query.filters, view)
        allowed[list(asked.excluded)] = False
        allowed[[known + view.new_of[i] for i in asked.excluded_ids if i in view.new_of]] = False
        sold = self._live_popularity.sold()
        live = {known + view.new_of[i]: count for i, count in sold.others.items() if i in view.new_of}
        numbers = np.concatenate([sold.rows, np.array([*live], np.int64)])
        counts = np.concatenate([sold.counts, np.array([*live.values()], np.float64)])
        total = counts.sum() + PRIOR_EVENTS
        counts, numbers = counts[allowed[numbers]], numbers[allowed[numbers]]
        allowed[numbers] = False
        order = self._most_bought_first
        if view.num_new:
            order = np.concatenate([order, np.arange(known, known + view.num_new)])
        chosen = np.concatenate([numbers, order[allowed[order]][: asked.query.k]])
        shares = np.where(chosen < known, self._popularity[np.minimum(chosen, known - 1)], 0) * (PRIOR_EVENTS / total)
        shares[: len(counts)] += counts / total
        best = np.argsort(-shares, kind="stable")[: asked.query.k]
        names = (item_ids[row] if row < known else view.new_ids[row - known] for row in chosen[best].tolist())
        return list(zip(names, shares[best].tolist(), strict=True))

    def _allowed(self, filters: Filters, barred: np.ndarray) -> np.ndarray:
        """bool (N,): the items of the catalog that may be answers, but for the rows `barred`."""
        allowed = self._indexed & self._items.filter_mask(filters) if filters else self._indexed.copy()
        allowed[barred] = False
        return allowed

    def _places(self, view: View) -> np.ndarray:
        """Of each current live item the row of the catalog in whose place it stands, or a further one."""
        new = len(self._items) + np.cumsum(view.base_rows[view.current] < 0) - 1
        return np.where(view.base_rows[view.current] < 0, new, view.base_rows[view.current])

    def _allowed_in_place(self, filters: Filters, view: View) -> np.ndarray:
        """bool (N + live items of no place in the catalog): all that may be answers."""
        allowed = self._allowed(filters, view.barred)
        if len(view.current):
            allowed = np.concatenate([allowed, np.zeros(view.num_new, bool)])
            allowed[self._places(view)] = view.mask(filters)[view.current]
        return allowed


def _by_filters(queries: Sequence[Query], which: Sequence[int]) -> list[tuple[Filters, list[int]]]:
    """Positions in `which` of the queries that share their filters: those without any are searched together."""
    groups: dict[str, tuple[Filters, list[int]]] = {}
    for position, i in enumerate(which):
        filters = queries[i].filters
        same = repr(sorted(filters.items(), key=operator.itemgetter(0)))
        groups.setdefault(same, (filters, []))[1].append(position)
    return list(groups.values())
