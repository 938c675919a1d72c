"""History in, ranked items out: a model, an index and the items behind it. No Ray, no HTTP.

Shapes: B histories · N items of the catalog · D width of the shared space.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pixrec import storage
from pixrec.artifact import Index, Model, index_manifest, load_index, load_model
from pixrec.config import Config
from pixrec.data.images import decode_image
from pixrec.data.items import ItemTable
from pixrec.data.sequences import DATASET_MARKER, load_dataset
from pixrec.errors import ArtifactError, InputError
from pixrec.index import top_k
from pixrec.model.catalog import Catalog
from pixrec.model.encoding import Content

Filters = Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class Query:
    history: Sequence[str]
    """item ids, oldest first; unknown ones are passed over"""
    k: int = 10
    exclude: Sequence[str] = ()
    exclude_history: bool = True
    filters: Filters = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    items: list[tuple[str, float]]
    """(item_id, score), best first; fewer than k when fewer qualify"""
    unknown_items: list[str]
    fallback: bool
    """True when nothing of the history was known and the most bought items were given instead"""


class Recommender:
    """Answers queries about one index version. Thread-safe as long as nothing else uses the model."""

    def __init__(self, model: Model, index: Index, items: ItemTable, training_counts: np.ndarray) -> None:
        self.config: Config = model.config
        self.model_version = model.fingerprint
        self.index_version = index.version
        self.items = items
        self._embedder = model.embedder()
        self._catalog = Catalog(items, model.encoder)
        rows = np.array([items.row_of.get(i, -1) for i in index.item_ids], dtype=np.int64)
        if (rows < 0).any():
            stray = index.item_ids[int(np.argmin(rows))]
            raise ArtifactError(f"the index holds item {stray!r}, which the data set lacks; run pixrec embed again")
        self._indexed = np.zeros(len(items), dtype=bool)
        self._indexed[rows] = True
        self._vectors = np.zeros((len(items), index.vectors.shape[1]), dtype=np.float32)
        self._vectors[rows] = index.vectors
        new = np.flatnonzero(~self._indexed)  # items that came after the index: in histories, not among the answers
        if len(new):
            self._vectors[new] = self._embedder.items(self._catalog, new)
        self._popularity = (training_counts / max(1, int(training_counts.sum()))).astype(np.float32)

    def recommend(
        self, history: Sequence[str], k: int = 10, *, exclude: Sequence[str] = (), exclude_history: bool = True
    ) -> list[tuple[str, float]]:
        """The `k` items nearest to the user, as (item_id, cosine), best first. Raises InputError on k < 1."""
        return self.answer([Query(list(history), k, exclude, exclude_history)])[0].items

    def answer(self, queries: Sequence[Query]) -> list[Answer]:
        """Answer all queries with one forward pass of the user tower and, filters aside, one search."""
        known = [[self.items.row_of[i] for i in q.history if i in self.items.row_of] for q in queries]
        with_history = [i for i, rows in enumerate(known) if rows]
        ranked: dict[int, list[tuple[str, float]]] = {}
        if with_history:
            histories = [np.array(known[i], dtype=np.int64) for i in with_history]
            vectors = self._embedder.users(self._catalog, histories, self._vectors)
            for filters, members in _by_filters(queries, with_history):
                chosen = [queries[with_history[m]] for m in members]
                found = self._nearest(vectors[members], chosen, filters)
                ranked |= dict(zip((with_history[m] for m in members), found, strict=True))
        answers = []
        for i, query in enumerate(queries):
            unknown = list(dict.fromkeys(x for x in query.history if x not in self.items.row_of))
            items = ranked[i] if i in ranked else self._most_bought(query)
            answers.append(Answer(items, unknown, fallback=i not in ranked))
        return answers

    def similar(self, item_id: str, k: int = 10, filters: Filters | None = None) -> Answer:
        """Items whose vectors lie nearest to that item's. Raises KeyError when the item is unknown."""
        vector = self._vectors[self.items.row_of[item_id]]
        query = Query([], k, exclude=[item_id])
        return Answer(self._nearest(vector[None], [query], filters or {})[0], [], fallback=False)

    def search(self, text: str = "", image: bytes | None = None, k: int = 10, filters: Filters | None = None) -> Answer:
        """Items nearest to a text, a picture or both, encoded as an item. Raises InputError when both are empty."""
        if not text.strip() and image is None:
            raise InputError("search needs a text or a picture")
        pixels = None if image is None else decode_image(image, self._embedder.encoder.image_size_px)
        vector = self._embedder.contents([Content(text, pixels)])[0]
        return Answer(self._nearest(vector[None], [Query([], k)], filters or {})[0], [], fallback=False)

    def _nearest(
        self, vectors: np.ndarray, queries: Sequence[Query], filters: Filters
    ) -> list[list[tuple[str, float]]]:
        """For each vector (B, D) its query's k best of the items that pass the filters, by cosine."""
        rows = np.flatnonzero(self._allowed(filters))
        barred = [self._excluded(query) for query in queries]
        if not len(rows):
            return [[] for _ in queries]
        candidates = self._vectors if len(rows) == len(self._vectors) else self._vectors[rows]
        most = max(_checked_k(q) + len(b) for q, b in zip(queries, barred, strict=True))
        scores, found = top_k(vectors, candidates, min(len(rows), most))
        ranked = []
        for query, out, row_scores, row_found in zip(
            queries, barred, scores.tolist(), rows[found].tolist(), strict=True
        ):
            pairs = [(self.items.item_ids[r], s) for r, s in zip(row_found, row_scores, strict=True) if r not in out]
            ranked.append(pairs[: query.k])
        return ranked

    def _most_bought(self, query: Query) -> list[tuple[str, float]]:
        """What to give somebody of whom nothing is known: (item_id, share of all training events)."""
        allowed = self._allowed(query.filters)
        allowed[list(self._excluded(query))] = False
        rows = np.flatnonzero(allowed)
        order = rows[np.argsort(-self._popularity[rows], kind="stable")][: _checked_k(query)]
        return [(self.items.item_ids[row], float(self._popularity[row])) for row in order]

    def _allowed(self, filters: Filters) -> np.ndarray:
        return self._indexed & self.items.filter_mask(filters) if filters else self._indexed.copy()

    def _excluded(self, query: Query) -> set[int]:
        ids = {*query.exclude, *(query.history if query.exclude_history else ())}
        return {self.items.row_of[i] for i in ids if i in self.items.row_of}


def _checked_k(query: Query) -> int:
    if query.k < 1:
        raise InputError(f"k is {query.k}: must be at least 1")
    return query.k


def _by_filters(queries: Sequence[Query], which: Sequence[int]) -> list[tuple[Filters, list[int]]]:
    """Positions in `which` of the queries that share their filters: those without any are searched together."""
    groups: dict[str, tuple[Filters, list[int]]] = {}
    for position, i in enumerate(which):
        filters = queries[i].filters
        groups.setdefault(repr(sorted((k, list(v)) for k, v in filters.items())), (filters, []))[1].append(position)
    return list(groups.values())


def load_recommender(model: str, index: str, data: str | None = None) -> Recommender:
    """As `pixrec.load_recommender`."""
    loaded = load_model(model)
    found = load_index(index, loaded.fingerprint)
    dataset = load_dataset(data or _data_of(index))
    return Recommender(loaded, found, dataset.items, dataset.training_counts())


def _data_of(index: str) -> str:
    """Where the data set behind an index lies: where it lay, or as far from the index as it lay then."""
    manifest = index_manifest(index)
    places = [manifest["data"]]
    if manifest.get("data_from_index"):
        places.insert(0, storage.resolve(manifest["data_from_index"], storage.absolute(index)))
    for place in places:
        if storage.exists(storage.join(place, DATASET_MARKER)):
            return place
    raise ArtifactError(f"{index}: its data set is neither at {' nor at '.join(places)}; name it with --data")
