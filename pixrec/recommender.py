"""History in, ranked items out: a model, an index and the items behind it. No Ray, no HTTP.

Shapes: B histories · N items of the catalog · D width of the shared space.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import operator
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from pixrec import storage
from pixrec.artifact import Index, Model, index_manifest, load_content, load_index, load_model
from pixrec.artifact.folded import VersionContents, embedded, version_contents
from pixrec.config import Config, PrepareConfig
from pixrec.data.arrays import open_arrays
from pixrec.data.images import shrink_image
from pixrec.data.items import DATASET_MARKER, ItemTable, content_hash, open_items, read_info
from pixrec.data.sequences import Dataset, load_dataset
from pixrec.data.text import item_text
from pixrec.errors import ArtifactError, InputError, UnreadableImage
from pixrec.index import in_order, shared_tensor, top_k
from pixrec.live.contents import LiveContents
from pixrec.live.overlay import Base, Overlay, View, wrong_column
from pixrec.live.popularity import PRIOR_EVENTS, LivePopularity
from pixrec.live.store import AddedItem, EmbeddedVectors
from pixrec.model.catalog import Catalog
from pixrec.model.compact import UNKNOWN_TIME
from pixrec.model.encoding import Content
from pixrec.model.vision import PictureTokens, find_tokens
from pixrec.query import COSINE, PROBABILITY, PURCHASE_SHARE, Answer, Filters, NewItem, Query, ScoreKind
from pixrec.retrieval.rerank import choose
from pixrec.retrieval.search import Found, Searcher
from pixrec.schema import IMAGE
from pixrec.scorers.blend import Mixture, fitted_mixture
from pixrec.scorers.towers import TowerScorer

EMBEDDED_AT_A_TIME = 64
"""Live items in one forward pass of the item tower."""

NEW_ITEMS_KEPT = 10_000
"""Vectors of new items that are kept; the one not asked for the longest goes first."""

LEAST_CANDIDATES = 100
"""Diversity and caps choose among at least so many."""

_EVENTS_AT_A_TIME, _DAY_MS = 1_000_000, 86_400_000

Ranked = list[tuple[str, float]]
"""(item_id, score), best first."""

VectorSearch = Callable[[np.ndarray, int, Filters, bool, np.ndarray], Found]
"""The k items nearest to each vector (B, D) of those that pass the filters, by their rows; then whether to compare the
content vectors, where there are any, and the rows that may not be answers."""


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
        version: VersionContents | None = None,
        picture_px: int = PrepareConfig.image_size_px,
    ) -> None:
        """content: (N, C) what `search` compares, where that is not the item vectors. `version`: what else the
        version of the index says of items; `picture_px`: at what size the data set keeps pictures."""
        self.config: Config = model.config
        self.model_version = model.fingerprint
        self.index_version = index.version
        self.index_manifest = index.manifest
        self.items = items
        self._embedder, self._picture_px = model.embedder(), picture_px
        self._using_model = threading.Lock()
        """Held while the model computes: what follows the store may want vectors in any thread."""
        self._reads_vectors = self._embedder.reads_item_vectors
        catalog = Catalog(items, model.encoder, tokens=tokens)
        rows = index.rows_among(items)
        self._indexed = np.zeros(len(items), dtype=bool)
        self._indexed[rows] = True
        self._vectors = in_order(index.vectors, rows, len(items))
        new = np.flatnonzero(~self._indexed)  # items that came after the index: in histories, not among the answers
        if len(new):
            self._vectors[new] = self._embedder.items(catalog, new)
        structure = index.structure() if index.structure else None
        if structure is not None and not np.array_equal(rows, np.arange(len(items))):
            structure = structure.renumbered(rows)
        self._searcher = Searcher(self._vectors, structure)
        self._content = None if content is None else Searcher(content)
        version = version or VersionContents()
        base = Base(items, self._vectors, content, self._indexed, version.content_hashes, version.folded)
        self.live = Overlay(base, self.model_version, self.embed_added)
        self.column_problem = functools.partial(wrong_column, schema=base.schema)
        self._contents = LiveContents(items, self.live)
        self._catalog = Catalog(self._contents, model.encoder, tokens=tokens)
        self._mixture: Mixture | None = None
        self._temperature = model.temperature
        self._new_vectors: OrderedDict[bytes, np.ndarray] = OrderedDict()
        self._popularity = (training_counts / (training_counts.sum() or 1)).astype(np.float32)
        self._most_bought_first = np.argsort(-self._popularity, kind="stable").astype(np.int32)
        self._live_popularity = LivePopularity(self.live, items.row_of)

    def blend_with(self, dataset: Dataset) -> None:
        """Rank recommendations by the mixture of the model with what the data set behind the index counts, from now on;
        its weights are taken from the validation events."""
        scorer = TowerScorer("pixrec", self._embedder, self._catalog, self._vectors)
        self._mixture = fitted_mixture(dataset, self._temperature, scorer.scores)

    def knows(self, item_id: str) -> bool:
        """Whether the item is one of the catalog or, by now, a live one."""
        self.live.refresh()
        return item_id in self.items.row_of or item_id in self.live.view.row_of

    def fields(self, item_id: str) -> dict[str, Any] | None:
        """Every column of an item but its picture, and `hidden` where it is; None: unknown."""
        view = self.live.view
        at, row = view.row_of.get(item_id), self.items.row_of.get(item_id)
        if at is not None:
            hidden = {} if view.shown[at] else {"hidden": True}
            return {
                **dict.fromkeys(name for name in self.items.schema.names if name != IMAGE),
                **view.fields[at],
                **hidden,
            }
        return None if row is None else self.items.fields(row)

    def image(self, item_id: str) -> bytes | None:
        """The stored picture; None where there is none."""
        view = self.live.view
        at, row = view.row_of.get(item_id), self.items.row_of.get(item_id)
        if at is not None and view.has_content[at]:
            content = self.live.content_of(item_id)
            return None if content is None else content.image
        return None if row is None else self.items.image(row)

    def embed_new(self, new: Mapping[str, NewItem]) -> tuple[list[AddedItem], list[EmbeddedVectors]]:
        """New items as a data set would have them, and their vectors. Raises InputError on a column that the catalog
        lacks, a value of another type, and a picture that cannot be read, with the item's id."""
        added = []
        for item_id, item in new.items():
            try:
                problem = self.column_problem(item.fields)
                if problem is not None:
                    raise InputError(problem)
                text = item_text(item.fields)
                image = None if item.image is None else shrink_image(item.image, self._picture_px)
            except InputError as error:
                raise InputError(f"item {item_id!r}: {error}") from None
            added.append(AddedItem(item_id, dict(item.fields), text, image, content_hash(text, image)))
        return added, self.embed_added(added)

    def embed_added(self, added: Sequence[AddedItem]) -> list[EmbeddedVectors]:
        """What the item tower makes of items, as `pixrec embed` does. Raises InputError with the id of an item whose
        picture cannot be read."""
        starts = range(0, len(added), EMBEDDED_AT_A_TIME)
        with self._using_model:
            blocks = (embedded(self._embedder, added[start : start + EMBEDDED_AT_A_TIME]) for start in starts)
            return [one for block in blocks for one in block]

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
        self.live.refresh()
        return [self._read(query) for query in queries]

    def encode(self, asked: Sequence[Asked]) -> np.ndarray:
        """The user vectors (B, D), in one forward pass; zeros where nothing of a history is known."""
        vectors = np.zeros((len(asked), self._vectors.shape[1]), np.float32)
        with_history = [i for i, one in enumerate(asked) if one.known]
        if with_history:
            with self._using_model:
                vectors[with_history] = self._user_vectors([asked[i] for i in with_history])
        return vectors

    def rank(self, asked: Sequence[Asked], vectors: np.ndarray, search: VectorSearch | None = None) -> list[Answer]:
        """Answer what was asked by the user vectors (B, D) that `encode` gave for it: filters aside, one search.

        `search` finds the nearest items of the index in place of this process, where the ranking is no blend.
        """
        reached, view = self.live.refresh(), self.live.view
        found = self._ranked([one.widened() for one in asked], vectors, view, search)
        answers = []
        for i, one in enumerate(asked):
            kind = (PROBABILITY if self._mixture else COSINE) if one.known else PURCHASE_SHARE
            unknown = [i for i in one.query.history if i not in one.rows and i not in one.new_vectors]
            again = functools.partial(self._ranked_one, vectors[i : i + 1], view, search)
            items = self._choose(one, found[i], again, view)
            reasons = self._reasons(one, items, view) if one.query.reasons else None
            answers.append(self._answer(items, kind, reached, list(dict.fromkeys(unknown)), reasons))
        return answers

    def _ranked(
        self, asked: Sequence[Asked], vectors: np.ndarray, view: View, search: VectorSearch | None
    ) -> list[Ranked]:
        """The best k of each, by score alone."""
        with_history = [i for i, one in enumerate(asked) if one.known]
        ranked: dict[int, Ranked] = {}
        for filters, members in _by_filters([one.query for one in asked], with_history):
            chosen = [with_history[m] for m in members]
            of_filters = vectors[chosen], [asked[i] for i in chosen], filters, view
            found = self._blended(*of_filters) if self._mixture else self._nearest(*of_filters, search or self.found)
            ranked |= zip(chosen, found, strict=True)
        return [ranked[i] if i in ranked else self._most_bought(one, view) for i, one in enumerate(asked)]

    def _ranked_one(self, vector: np.ndarray, view: View, search: VectorSearch | None, one: Asked) -> Ranked:
        return self._ranked([one], vector, view, search)[0]

    def _choose(self, one: Asked, found: Ranked, again: Callable[[Asked], Ranked], view: View) -> Ranked:
        """What the query's diversity and caps leave of the best `found`; looks `again`, wider, when that is too few."""
        query, looked = one.query, one.widened().query.k
        if not query.diversity and not query.max_per:
            return found[: query.k]
        while True:
            ids = [item_id for item_id, _ in found]
            caps = [(self._values_of(name, ids, view), most) for name, most in query.max_per.items()]
            scores = np.array([score for _, score in found], np.float32)
            chosen = choose(scores, self._vectors_of(ids, view), query.k, query.diversity, caps)
            if len(chosen) == query.k or len(found) < looked:
                return [found[place] for place in chosen]
            looked *= 4
            found = again(one._replace(query=dataclasses.replace(query, k=looked)))

    def _vectors_of(self, item_ids: Sequence[str], view: View) -> np.ndarray:
        """Vectors (U, D) float32 of items of the catalog and live ones. Raises KeyError when one is unknown."""
        places = [view.row_of.get(item_id) for item_id in item_ids]
        rows = [0 if at is not None else self.items.row_of[i] for i, at in zip(item_ids, places, strict=True)]
        found = np.array(self._vectors[rows], np.float32)
        for place, at in enumerate(places):
            if at is not None:
                found[place] = view.vectors[at]
        return found

    def _values_of(self, name: str, item_ids: Sequence[str], view: View) -> list[Any]:
        """What the column `name` holds of items of the catalog and live ones."""
        places = [view.row_of.get(item_id) for item_id in item_ids]
        rows = [0 if at is not None else self.items.row_of[i] for i, at in zip(item_ids, places, strict=True)]
        found = self.items.values(name, rows)
        return [value if at is None else view.fields[at].get(name) for value, at in zip(found, places, strict=True)]

    def _reasons(self, one: Asked, items: Ranked, view: View) -> dict[str, str]:
        """By answer the item of the history that is nearest to it; none where nothing of the history is known."""
        known = list(dict.fromkeys(one.query.history[place] for place in one.known))
        if not known or not items:
            return {}
        history = np.stack([self._history_vector(one, item_id) for item_id in known]).astype(np.float32)
        nearest = (self._vectors_of([item_id for item_id, _ in items], view) @ history.T).argmax(axis=1)
        return {item_id: known[place] for (item_id, _), place in zip(items, nearest.tolist(), strict=True)}

    def similar(self, item_id: str, k: int = 10, filters: Filters | None = None, **options: Any) -> Answer:
        """Items whose vectors lie nearest to that item's; `options` as in Query. Raises KeyError when the item is
        unknown."""
        query = Query([], k, [item_id], filters=filters or {}, **options)
        return self.near(self.item_vectors([item_id])[0], query)

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
        with self._using_model:
            query = self._embedder.query(Content(text, pixels))
        assert query is not None
        return query

    def content_vectors(self, contents: Sequence[tuple[str, bytes | None]]) -> np.ndarray:
        """Vectors (U, D) of texts, pictures or both, encoded as items. Raises UnreadableImage."""
        decode = self._embedder.encoder.decode
        read = [Content(text, None if image is None else decode(image)) for text, image in contents]
        with self._using_model:
            return self._embedder.contents(read)

    def item_vectors(self, item_ids: Sequence[str]) -> np.ndarray:
        """Vectors (U, D) float32 of items. Raises KeyError when one is unknown."""
        self.live.refresh()
        return self._vectors_of(item_ids, self.live.view)

    def encode_new(self, new_items: Mapping[str, NewItem]) -> dict[str, np.ndarray]:
        """Vectors (D,) of items that the data set lacks; kept, so that each is encoded once.

        Raises InputError on an unreadable picture, with the item's name, and where the user tower reads pictures and
        text instead of vectors. Items of the data set and live ones are passed over.
        """
        new_items = {item_id: item for item_id, item in new_items.items() if not self.knows(item_id)}
        if new_items and not self._embedder.reads_item_vectors:
            raise InputError("new_items: this model's user tower is interleaved; only a compact one takes new items")
        contents, keys = dict[bytes, Content](), dict[str, bytes]()
        for item_id, item in new_items.items():
            text = item_text(item.fields)
            keys[item_id] = hashlib.blake2b(text.encode() + b"\0" + (item.image or b""), digest_size=16).digest()
            if keys[item_id] not in self._new_vectors:
                contents[keys[item_id]] = Content(text, self._pixels(item_id, item.image))
        if contents:
            with self._using_model:
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
        new, view = self.encode_new(query.new_items) if query.new_items else {}, self.live.view
        if view.row_of:
            live = (i for i in {*query.history} if i in view.row_of)
            new |= {i: view.vectors[view.row_of[i]] for i in live if self._can_read(view, i)}
        found = ((i, self.items.row_of.get(i)) for i in {*query.history, *query.exclude})
        rows = {item_id: row for item_id, row in found if row is not None}
        known = [place for place, i in enumerate(query.history) if i in rows or i in new]
        return Asked(query, rows, known, new)

    def _can_read(self, view: View, item_id: str) -> bool:
        """Whether the user tower can be given a live item: an interleaved one needs its text and its picture."""
        return self._reads_vectors or self._contents.number(view, item_id) is not None

    def _user_vectors(self, asked: Sequence[Asked]) -> np.ndarray:
        """Vectors (B, D) of users whose history holds at least one known item."""
        timed = any(one.query.timestamps is not None for one in asked)
        timestamps = [_timestamps(one.query, one.known) for one in asked] if timed else None
        if not any(one.new_vectors for one in asked):
            rows = [np.array([one.rows[one.query.history[place]] for place in one.known]) for one in asked]
            return self._embedder.users(self._catalog, rows, self._vectors, timestamps)
        if not self._reads_vectors:
            return self._embedder.users(self._catalog, [self._numbers(one) for one in asked], None)
        return self._embedder.users_of_vectors([self._history_vectors(one) for one in asked], timestamps)

    def _history_vectors(self, asked: Asked) -> np.ndarray:
        """Vectors (L, D) of the newest known items of a history."""
        newest = [asked.query.history[place] for place in asked.known[-self._embedder.max_history_items :]]
        return np.stack([self._history_vector(asked, item_id) for item_id in newest])

    def _history_vector(self, asked: Asked, item_id: str) -> np.ndarray:
        """The vector (D,) of an item of a history; of a live one as it is now."""
        found = asked.new_vectors.get(item_id)
        return self._vectors[asked.rows[item_id]] if found is None else found

    def _numbers(self, asked: Asked) -> np.ndarray:
        """Numbers (L,) of the known items of a history, as the catalog reads them."""
        view = self.live.view
        numbers = (self._contents.number(view, asked.query.history[place]) for place in asked.known)
        return np.array([number for number in numbers if number is not None], np.int64)

    def near(
        self, vector: np.ndarray, query: Query, of_content: bool = False, search: VectorSearch | None = None
    ) -> Answer:
        """The items nearest to one vector (D,), whatever the query's history; `of_content`: to one of
        `search_vector`; `search` as in `rank`."""
        reached, view, one = self.live.refresh(), self.live.view, self._read(query)

        def find(wider: Asked) -> Ranked:
            return self._nearest(vector[None], [wider], query.filters, view, search or self.found, of_content)[0]

        return self._answer(self._choose(one, find(one.widened()), find, view), COSINE, reached)

    def _answer(
        self,
        items: Ranked,
        kind: ScoreKind,
        reached: bool,
        unknown: Sequence[str] = (),
        reasons: Mapping[str, str] | None = None,
    ) -> Answer:
        """reached: whether the store of live items was."""
        fallback, versions = kind == PURCHASE_SHARE, (self.model_version, self.index_version)
        return Answer(items, kind, *versions, list(unknown), fallback, reasons, store_away=not reached)

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
            pairs = [(self.items.item_ids[r], s) for r, s in zip(row_found, row_scores, strict=True) if r not in out]
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
        assert self._mixture is not None
        rows, known = torch.from_numpy(vectors), len(self.items)
        cosines = rows @ shared_tensor(self._vectors).float().T
        places, item_ids = self._places(view), self.items.item_ids
        if len(places):
            cosines = torch.cat([cosines, torch.zeros(len(rows), view.num_new)], 1)
            cosines[:, places] = rows @ torch.from_numpy(view.vectors[view.current]).T
        allowed, ranked = self._allowed_in_place(filters, view), []
        histories = [
            np.array([one.rows[i] for i in one.query.history if i in one.rows], dtype=np.int64) for one in asked
        ]
        for one, chances in zip(asked, self._mixture.probabilities(cosines, histories).numpy(), strict=True):
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
        known, item_ids = len(self.items), self.items.item_ids
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
        allowed = self._indexed & self.items.filter_mask(filters) if filters else self._indexed.copy()
        allowed[barred] = False
        return allowed

    def _places(self, view: View) -> np.ndarray:
        """Of each current live item the row of the catalog in whose place it stands, or a further one."""
        new = len(self.items) + np.cumsum(view.base_rows[view.current] < 0) - 1
        return np.where(view.base_rows[view.current] < 0, new, view.base_rows[view.current])

    def _allowed_in_place(self, filters: Filters, view: View) -> np.ndarray:
        """bool (N + live items of no place in the catalog): all that may be answers."""
        allowed = self._allowed(filters, view.barred)
        if len(view.current):
            allowed = np.concatenate([allowed, np.zeros(view.num_new, bool)])
            allowed[self._places(view)] = view.mask(filters)[view.current]
        return allowed


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
    info = read_info(uri)
    px = int(info.get("config", {}).get("image_size_px", PrepareConfig.image_size_px))
    arrays = open_arrays(uri, str(info.get("fingerprint", "")))
    items = open_items(uri, arrays)
    found = load_index(index, loaded.fingerprint, items, version)
    content = load_content(index, found.manifest, items)
    tokens = find_tokens(uri, loaded.config, loaded.tower.backbone)
    counts = arrays["training_count"]
    if half_life_days is not None:
        counts = recent_counts(arrays["item_row"], arrays["timestamp"], len(items), half_life_days)
    recommender = Recommender(
        loaded, found, items, counts, tokens, content, version_contents(index, found.manifest), px
    )
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
