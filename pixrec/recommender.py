"""History in, ranked items out: a model, an index and the items behind it. No Ray, no HTTP.

Shapes: B histories · N items of the catalog · D width of the shared space.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import operator
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from pixrec import storage
from pixrec.artifact import Index, Model, index_manifest, load_content, load_index, load_model
from pixrec.config import Config
from pixrec.data.arrays import open_arrays
from pixrec.data.items import DATASET_MARKER, ItemTable, open_items, read_info
from pixrec.data.sequences import Dataset, load_dataset
from pixrec.data.text import item_text
from pixrec.errors import ArtifactError, InputError, UnreadableImage
from pixrec.index import in_order, shared_tensor
from pixrec.model.catalog import Catalog
from pixrec.model.compact import UNKNOWN_TIME
from pixrec.model.encoding import Content
from pixrec.model.vision import PictureTokens, find_tokens
from pixrec.query import COSINE, PROBABILITY, PURCHASE_SHARE, Answer, Filters, NewItem, Query, ScoreKind
from pixrec.retrieval.rerank import choose
from pixrec.retrieval.search import Found, Searcher
from pixrec.scorers.blend import Mixture, fitted_mixture
from pixrec.scorers.towers import TowerScorer

NEW_ITEMS_KEPT = 10_000
"""Vectors of new items that are kept; the one not asked for the longest goes first."""

LEAST_CANDIDATES = 100
"""Diversity and caps choose among at least so many."""

_EVENTS_AT_A_TIME, _DAY_MS = 1_000_000, 86_400_000

Ranked = list[tuple[str, float]]
"""(item_id, score), best first."""

VectorSearch = Callable[[np.ndarray, int, Filters, bool], Found]
"""The k items nearest to each vector (B, D) of those that pass the filters, by their rows; the last argument says
whether to compare the content vectors, where there are any."""


class Asked(NamedTuple):
    """A query, and what of its history is known."""

    query: Query
    rows: dict[str, int]
    """of the items of the catalog in the history and among those to exclude"""
    known: list[int]
    """places in the history, ascending"""
    new_vectors: Mapping[str, np.ndarray]
    """vectors (D,) of its new items"""

    @property
    def excluded(self) -> set[int]:
        """rows that must not be among the answers"""
        ids = {*self.query.exclude, *(self.query.history if self.query.exclude_history else ())}
        return {self.rows[i] for i in ids if i in self.rows}

    def widened(self) -> Asked:
        """With as many answers as diversity and caps choose among."""
        if not self.query.diversity and not self.query.max_per:
            return self
        return self._replace(query=dataclasses.replace(self.query, k=max(LEAST_CANDIDATES, 5 * self.query.k)))


class Recommender:
    """Answers queries about one index version. Thread-safe as long as nothing else uses the model."""

    def __init__(
        self,
        model: Model,
        index: Index,
        items: ItemTable,
        training_counts: np.ndarray,
        tokens: PictureTokens | None = None,
        content: np.ndarray | None = None,
    ) -> None:
        """content: (N, C) what `search` compares, where that is not the item vectors."""
        self.config: Config = model.config
        self.model_version = model.fingerprint
        self.index_version = index.version
        self.index_manifest = index.manifest
        self.items = items
        self._embedder = model.embedder()
        self._catalog = Catalog(items, model.encoder, tokens=tokens)
        rows = index.rows_among(items)
        self._indexed = np.zeros(len(items), dtype=bool)
        self._indexed[rows] = True
        self._vectors = in_order(index.vectors, rows, len(items))
        new = np.flatnonzero(~self._indexed)  # items that came after the index: in histories, not among the answers
        if len(new):
            self._vectors[new] = self._embedder.items(self._catalog, new)
        structure = index.structure() if index.structure else None
        if structure is not None and not np.array_equal(rows, np.arange(len(items))):
            structure = structure.renumbered(rows)
        self._searcher = Searcher(self._vectors, structure)
        self._content = None if content is None else Searcher(content)
        self._mixture: Mixture | None = None
        self._temperature = model.temperature
        self._new_vectors: OrderedDict[bytes, np.ndarray] = OrderedDict()
        self._popularity = (training_counts / (training_counts.sum() or 1)).astype(np.float32)
        self._most_bought_first = np.argsort(-self._popularity, kind="stable").astype(np.int32)

    def blend_with(self, dataset: Dataset) -> None:
        """Rank recommendations by the mixture of the model with what the data set behind the index counts, from now on;
        its weights are taken from the validation events."""
        scorer = TowerScorer("pixrec", self._embedder, self._catalog, self._vectors)
        self._mixture = fitted_mixture(dataset, self._temperature, scorer.scores)

    def recommend(
        self, history: Sequence[str], k: int = 10, *, exclude: Sequence[str] = (), exclude_history: bool = True
    ) -> list[tuple[str, float]]:
        """The `k` items nearest to the user, as (item_id, cosine), or by chance where the ranking is a blend, best
        first. Raises InputError on k < 1.

        Where nothing of the history is known: the most bought items, and their share of all purchases.
        """
        return self.answer([Query(list(history), k, exclude, exclude_history)])[0].items

    def answer(self, queries: Sequence[Query]) -> list[Answer]:
        """Answer all queries with one forward pass of the user tower and, filters aside, one search.

        Raises InputError as `Query.check` and `encode_new` do.
        """
        asked = self.read(queries)
        return self.rank(asked, self.encode(asked))

    def read(self, queries: Sequence[Query]) -> list[Asked]:
        """Look the items of the queries up and encode new ones. Raises InputError as `answer` does."""
        return [self._read(query) for query in queries]

    def encode(self, asked: Sequence[Asked]) -> np.ndarray:
        """The user vectors (B, D), in one forward pass; zeros where nothing of a history is known."""
        vectors = np.zeros((len(asked), self._vectors.shape[1]), np.float32)
        with_history = [i for i, one in enumerate(asked) if one.known]
        if with_history:
            vectors[with_history] = self._user_vectors([asked[i] for i in with_history])
        return vectors

    def rank(self, asked: Sequence[Asked], vectors: np.ndarray, search: VectorSearch | None = None) -> list[Answer]:
        """Answer what was asked by the user vectors (B, D) that `encode` gave for it: filters aside, one search.

        `search` finds the nearest items in place of this process, where the ranking is no blend.
        """
        found = self._ranked([one.widened() for one in asked], vectors, search)
        answers = []
        for i, one in enumerate(asked):
            kind = (PROBABILITY if self._mixture else COSINE) if one.known else PURCHASE_SHARE
            unknown = [i for i in one.query.history if i not in one.rows and i not in one.new_vectors]
            items = self._choose(one, found[i], functools.partial(self._ranked_one, vectors[i : i + 1], search))
            reasons = self._reasons(one, items) if one.query.reasons else None
            answers.append(self._answer(items, kind, list(dict.fromkeys(unknown)), reasons))
        return answers

    def _ranked(self, asked: Sequence[Asked], vectors: np.ndarray, search: VectorSearch | None) -> list[Ranked]:
        """The best k of each, by score alone."""
        with_history = [i for i, one in enumerate(asked) if one.known]
        ranked: dict[int, Ranked] = {}
        for filters, members in _by_filters([one.query for one in asked], with_history):
            chosen = [with_history[m] for m in members]
            of_filters = vectors[chosen], [asked[i] for i in chosen], filters
            found = self._blended(*of_filters) if self._mixture else self._nearest(*of_filters, search or self.found)
            ranked |= zip(chosen, found, strict=True)
        return [ranked[i] if i in ranked else self._most_bought(one) for i, one in enumerate(asked)]

    def _ranked_one(self, vector: np.ndarray, search: VectorSearch | None, one: Asked) -> Ranked:
        return self._ranked([one], vector, search)[0]

    def _choose(self, one: Asked, found: Ranked, again: Callable[[Asked], Ranked]) -> Ranked:
        """What the query's diversity and caps leave of the best `found`; looks `again`, wider, when that is too few."""
        query, looked = one.query, one.widened().query.k
        if not query.diversity and not query.max_per:
            return found[: query.k]
        while True:
            rows = [self.items.row_of[item_id] for item_id, _ in found]
            caps = [(self.items.values(name, rows), most) for name, most in query.max_per.items()]
            scores = np.array([score for _, score in found], np.float32)
            chosen = choose(scores, np.asarray(self._vectors[rows], np.float32), query.k, query.diversity, caps)
            if len(chosen) == query.k or len(found) < looked:
                return [found[place] for place in chosen]
            looked *= 4
            found = again(one._replace(query=dataclasses.replace(query, k=looked)))

    def _reasons(self, one: Asked, items: Ranked) -> dict[str, str]:
        """By answer the item of the history that is nearest to it; none where nothing of the history is known."""
        known = list(dict.fromkeys(one.query.history[place] for place in one.known))
        if not known or not items:
            return {}
        history = np.stack([self._vectors[one.rows[i]] if i in one.rows else one.new_vectors[i] for i in known])
        rows = [self.items.row_of[item_id] for item_id, _ in items]
        nearest = (self._vectors[rows].astype(np.float32) @ history.T.astype(np.float32)).argmax(axis=1)
        return {item_id: known[place] for (item_id, _), place in zip(items, nearest.tolist(), strict=True)}

    def similar(self, item_id: str, k: int = 10, filters: Filters | None = None, **options: Any) -> Answer:
        """Items whose vectors lie nearest to that item's; `options` as in Query. Raises KeyError when the item is
        unknown."""
        query = Query([], k, [item_id], filters=filters or {}, **options)
        return self.near(self._vectors[self.items.row_of[item_id]], query)

    def search(
        self, text: str = "", image: bytes | None = None, k: int = 10, filters: Filters | None = None, **options: Any
    ) -> Answer:
        """Items nearest to a text, a picture or both, encoded as an item; where the model has frozen encoders, by the
        mean of what these make of text and picture. `options` as in Query. Raises InputError when both are empty."""
        if not text.strip() and image is None:
            raise InputError("search needs a text or a picture")
        query = Query([], k, filters=filters or {}, **options)
        return self.near(self.search_vector(text, image), query, of_content=True)

    def search_vector(self, text: str, image: bytes | None) -> np.ndarray:
        """What a search compares: that of the encoders (C,) where the index has content vectors, or an item's vector
        (D,). Raises UnreadableImage."""
        if self._content is None:
            return self.content_vectors([(text, image)])[0]
        pixels = None if image is None else self._embedder.encoder.decode(image)
        query = self._embedder.query(Content(text, pixels))
        assert query is not None
        return query

    def content_vectors(self, contents: Sequence[tuple[str, bytes | None]]) -> np.ndarray:
        """Vectors (U, D) of texts, pictures or both, encoded as items. Raises UnreadableImage."""
        decode = self._embedder.encoder.decode
        read = [Content(text, None if image is None else decode(image)) for text, image in contents]
        return self._embedder.contents(read)

    def item_vectors(self, item_ids: Sequence[str]) -> np.ndarray:
        """Vectors (U, D) float32 of items of the catalog. Raises KeyError when one is unknown."""
        return np.asarray(self._vectors[[self.items.row_of[item_id] for item_id in item_ids]], np.float32)

    def encode_new(self, new_items: Mapping[str, NewItem]) -> dict[str, np.ndarray]:
        """Vectors (D,) of items that the data set lacks; kept, so that each is encoded once.

        Raises InputError on an unreadable picture, with the item's name, and where the user tower reads pictures and
        text instead of vectors. Items of the data set are passed over.
        """
        new_items = {item_id: item for item_id, item in new_items.items() if item_id not in self.items.row_of}
        if new_items and not self._embedder.reads_item_vectors:
            raise InputError("new_items: this model's user tower is interleaved; only a compact one takes new items")
        contents, keys = dict[bytes, Content](), dict[str, bytes]()
        for item_id, item in new_items.items():
            text = item_text(item.fields)
            keys[item_id] = hashlib.blake2b(text.encode() + b"\0" + (item.image or b""), digest_size=16).digest()
            if keys[item_id] not in self._new_vectors:
                contents[keys[item_id]] = Content(text, self._pixels(item_id, item.image))
        if contents:
            made = self._embedder.contents(list(contents.values()))
            self._new_vectors |= dict(zip(contents, made, strict=True))
        found = {item_id: self._new_vectors[key] for item_id, key in keys.items()}
        for key in keys.values():
            self._new_vectors.move_to_end(key)
        while len(self._new_vectors) > NEW_ITEMS_KEPT:
            self._new_vectors.popitem(last=False)
        return found

    def _pixels(self, item_id: str, image: bytes | None) -> np.ndarray | None:
        try:
            return None if image is None else self._embedder.encoder.decode(image)
        except UnreadableImage as error:
            raise InputError(f"item {item_id!r}: {error}") from None

    def _read(self, query: Query) -> Asked:
        query.check()
        new = self.encode_new(query.new_items) if query.new_items else {}
        found = ((i, self.items.row_of.get(i)) for i in {*query.history, *query.exclude})
        rows = {item_id: row for item_id, row in found if row is not None}
        known = [place for place, i in enumerate(query.history) if i in rows or i in new]
        return Asked(query, rows, known, new)

    def _user_vectors(self, asked: Sequence[Asked]) -> np.ndarray:
        """Vectors (B, D) of users whose history holds at least one known item."""
        timed = any(one.query.timestamps is not None for one in asked)
        timestamps = [_timestamps(one.query, one.known) for one in asked] if timed else None
        if not any(one.new_vectors for one in asked):
            rows = [np.array([one.rows[one.query.history[place]] for place in one.known]) for one in asked]
            return self._embedder.users(self._catalog, rows, self._vectors, timestamps)
        return self._embedder.users_of_vectors([self._history_vectors(one) for one in asked], timestamps)

    def _history_vectors(self, asked: Asked) -> np.ndarray:
        """Vectors (L, D) of the newest known items of a history."""
        newest = [asked.query.history[place] for place in asked.known[-self._embedder.max_history_items :]]
        return np.stack([self._vectors[asked.rows[i]] if i in asked.rows else asked.new_vectors[i] for i in newest])

    def near(
        self, vector: np.ndarray, query: Query, of_content: bool = False, search: VectorSearch | None = None
    ) -> Answer:
        """The items nearest to one vector (D,), whatever the query's history; `of_content`: to one of
        `search_vector`; `search` as in `rank`."""
        one = self._read(query)

        def find(wider: Asked) -> Ranked:
            return self._nearest(vector[None], [wider], query.filters, search or self.found, of_content)[0]

        return self._answer(self._choose(one, find(one.widened()), find), COSINE)

    def _answer(
        self,
        items: Ranked,
        kind: ScoreKind,
        unknown: Sequence[str] = (),
        reasons: Mapping[str, str] | None = None,
    ) -> Answer:
        fallback = kind == PURCHASE_SHARE
        return Answer(items, kind, self.model_version, self.index_version, list(unknown), fallback, reasons)

    def found(self, vectors: np.ndarray, k: int, filters: Filters, of_content: bool) -> Found:
        """A VectorSearch among the vectors in this process."""
        searcher = (self._content if of_content else None) or self._searcher
        return searcher.search(vectors, k, self._allowed(filters))

    def _nearest(
        self,
        vectors: np.ndarray,
        asked: Sequence[Asked],
        filters: Filters,
        search: VectorSearch,
        of_content: bool = False,
    ) -> list[Ranked]:
        """For each vector (B, D) its query's k best of the items that pass the filters, by cosine."""
        barred = [one.excluded for one in asked]
        most = max(one.query.k + len(out) for one, out in zip(asked, barred, strict=True))
        scores, found = search(vectors, most, filters, of_content)
        ranked = []
        for one, out, row_scores, row_found in zip(asked, barred, scores.tolist(), found.tolist(), strict=True):
            pairs = [(self.items.item_ids[r], s) for r, s in zip(row_found, row_scores, strict=True) if r not in out]
            ranked.append(pairs[: one.query.k])
        return ranked

    def _blended(self, vectors: np.ndarray, asked: Sequence[Asked], filters: Filters) -> list[list[tuple[str, float]]]:
        """As `_nearest`, by the chance of each item to be next."""
        assert self._mixture is not None
        allowed, ranked = self._allowed(filters), []
        cosines = torch.from_numpy(vectors) @ shared_tensor(self._vectors).float().T
        histories = [
            np.array([one.rows[i] for i in one.query.history if i in one.rows], dtype=np.int64) for one in asked
        ]
        for one, chances in zip(asked, self._mixture.probabilities(cosines, histories).numpy(), strict=True):
            chances[~allowed] = -1
            chances[list(one.excluded)] = -1
            found = np.argsort(-chances, kind="stable")[: one.query.k]
            ranked.append([(self.items.item_ids[row], float(chances[row])) for row in found if chances[row] >= 0])
        return ranked

    def _most_bought(self, asked: Asked) -> list[tuple[str, float]]:
        """What to give somebody of whom nothing is known: (item_id, share of all training events)."""
        allowed = self._allowed(asked.query.filters)
        allowed[list(asked.excluded)] = False
        rows = self._most_bought_first[allowed[self._most_bought_first]][: asked.query.k]
        return [(self.items.item_ids[row], float(self._popularity[row])) for row in rows]

    def _allowed(self, filters: Filters) -> np.ndarray:
        return self._indexed & self.items.filter_mask(filters) if filters else self._indexed.copy()


def _timestamps(query: Query, known: Sequence[int]) -> np.ndarray:
    """When each known item of the history was met, (L,), UNKNOWN_TIME where the query does not say."""
    if query.timestamps is None:
        return np.full(len(known), UNKNOWN_TIME, dtype=np.int64)
    return np.asarray(query.timestamps, dtype=np.int64)[known]


def _by_filters(queries: Sequence[Query], which: Sequence[int]) -> list[tuple[Filters, list[int]]]:
    """Positions in `which` of the queries that share their filters: those without any are searched together."""
    groups: dict[str, tuple[Filters, list[int]]] = {}
    for position, i in enumerate(which):
        filters = queries[i].filters
        same = repr(sorted(filters.items(), key=operator.itemgetter(0)))
        groups.setdefault(same, (filters, []))[1].append(position)
    return list(groups.values())


def recent_counts(rows: np.ndarray, timestamps: np.ndarray, num_items: int, half_life_days: float) -> np.ndarray:
    """float64 (N,): the events of each item, of which one that is `half_life_days` older than the newest of all counts
    half. rows and timestamps (ms): of E events, in any order."""
    counts, newest = np.zeros(num_items), timestamps.max(initial=0)
    for start in range(0, len(rows), _EVENTS_AT_A_TIME):
        block = slice(start, start + _EVENTS_AT_A_TIME)
        age_days = (newest - timestamps[block]) / _DAY_MS
        counts += np.bincount(rows[block], 0.5 ** (age_days / half_life_days), minlength=num_items)
    return counts


def load_recommender(
    model: str,
    index: str,
    data: str | None = None,
    blend: bool | None = None,
    version: str | None = None,
    half_life_days: float | None = None,
) -> Recommender:
    """As `pixrec.load_recommender`; `version`: of the index, by default the current one; `half_life_days`: as
    `serve.popularity_half_life_days`."""
    loaded = load_model(model)
    uri = data or data_of(index, index_manifest(index, version))
    arrays = open_arrays(uri, str(read_info(uri).get("fingerprint", "")))
    items = open_items(uri, arrays)
    found = load_index(index, loaded.fingerprint, items, version)
    content = load_content(index, found.manifest, items)
    tokens = find_tokens(uri, loaded.config, loaded.tower.backbone)
    counts = arrays["training_count"]
    if half_life_days is not None:
        counts = recent_counts(arrays["item_row"], arrays["timestamp"], len(items), half_life_days)
    recommender = Recommender(loaded, found, items, counts, tokens, content)
    if loaded.config.serve.blend if blend is None else blend:
        recommender.blend_with(load_dataset(uri))
    return recommender


def data_of(index: str, manifest: Mapping[str, Any]) -> str:
    """Where the data set behind an index version lies: where it lay, or as far from the index as it lay then."""
    places = [manifest["data"]]
    if manifest.get("data_from_index"):
        places.insert(0, storage.resolve(manifest["data_from_index"], storage.absolute(index)))
    for place in places:
        if storage.exists(storage.join(place, DATASET_MARKER)):
            return place
    raise ArtifactError(f"{index}: its data set is neither at {' nor at '.join(places)}; name it with --data")
