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
        self._popularity = (training_counts / max(1, int(training_counts.sum()))).astype(np.float32)

    def recommend(
        self, history: Sequence[str], k: int = 10, *, exclude: Sequence[str] = (), exclude_history: bool = True
    ) -> list[tuple[str, float]]:
        """The `k` items nearest to the user, as (item_id, cosine), best first. Raises InputError on k < 1."""
        return self.answer([Query(list(history), k, exclude, exclude_history)])[0].items

    def answer(self, queries: Sequence[Query]) -> list[Answer]:
        """Answer all queries with one forward pass of the user tower."""
        known = [[self.items.row_of[i] for i in q.history if i in self.items.row_of] for q in queries]
        with_history = [i for i, rows in enumerate(known) if rows]
        vectors: dict[int, np.ndarray] = {}
        if with_history:
            histories = [np.array(known[i], dtype=np.int64) for i in with_history]
            encoded = self._embedder.users(self._catalog, histories, self._vectors)
            vectors = dict(zip(with_history, encoded, strict=True))
        answers = []
        for i, query in enumerate(queries):
            excluded = {*query.exclude, *(query.history if query.exclude_history else ())}
            unknown = list(dict.fromkeys(x for x in query.history if x not in self.items.row_of))
            ranked = self._nearest(vectors.get(i), query.k, excluded, query.filters)
            answers.append(Answer(ranked, unknown, fallback=i not in vectors))
        return answers

    def similar(self, item_id: str, k: int = 10, filters: Filters | None = None) -> Answer:
        """Items whose vectors lie nearest to that item's. Raises KeyError when the item is unknown."""
        row = self.items.row_of[item_id]
        vector = self._vectors[row] if self._indexed[row] else self._embedder.items(self._catalog, np.array([row]))[0]
        return Answer(self._nearest(vector, k, {item_id}, filters or {}), [], fallback=False)

    def search(self, text: str = "", image: bytes | None = None, k: int = 10, filters: Filters | None = None) -> Answer:
        """Items nearest to a text, a picture or both, encoded as an item. Raises InputError when both are empty."""
        if not text.strip() and image is None:
            raise InputError("search needs a text or a picture")
        pixels = None if image is None else decode_image(image, self._embedder.encoder.image_size_px)
        vector = self._embedder.contents([Content(text, pixels)])[0]
        return Answer(self._nearest(vector, k, set(), filters or {}), [], fallback=False)

    def _nearest(
        self, vector: np.ndarray | None, k: int, excluded: set[str], filters: Filters
    ) -> list[tuple[str, float]]:
        """The best k of the items that qualify, by cosine with `vector` (D,), by popularity without one."""
        if k < 1:
            raise InputError(f"k is {k}: must be at least 1")
        allowed = self._indexed & self.items.filter_mask(filters) if filters else self._indexed
        out = np.array([self.items.row_of[i] for i in excluded if i in self.items.row_of], dtype=np.int64)
        if vector is None:
            rows = np.flatnonzero(allowed & ~np.isin(np.arange(len(allowed)), out))
            order = rows[np.argsort(-self._popularity[rows], kind="stable")][:k]
            return [(self.items.item_ids[r], float(self._popularity[r])) for r in order]
        everything = allowed.all()
        rows = np.arange(len(allowed)) if everything else np.flatnonzero(allowed)
        if not len(rows):
            return []
        candidates = self._vectors if everything else self._vectors[rows]
        scores, found = top_k(vector[None], candidates, min(len(rows), k + len(out)))
        barred = set(out.tolist())
        ranked = [
            (self.items.item_ids[row], float(score))
            for row, score in zip(rows[found[0]].tolist(), scores[0], strict=True)
            if row not in barred
        ]
        return ranked[:k]


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
