"""History in, ranked items out: a model, an index and the items behind it. No Ray, no HTTP.

Shapes: B histories · N items of the catalog · D width of the shared space.
"""

from __future__ import annotations

import functools
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pixrec import storage
from pixrec.artifact import Index, Model, index_manifest, load_content, load_index, load_model
from pixrec.artifact.folded import VersionContents, embedded, version_contents
from pixrec.config import Config, PrepareConfig
from pixrec.data.arrays import open_arrays
from pixrec.data.images import shrink_image
from pixrec.data.items import DATASET_MARKER, ItemTable, content_hash, open_items, read_info
from pixrec.data.sequences import Dataset, load_dataset
from pixrec.data.text import item_text
from pixrec.data.tokens import PictureTokens
from pixrec.errors import ArtifactError, InputError, UnreadableImage
from pixrec.index import in_order
from pixrec.live.contents import LiveContents
from pixrec.live.overlay import Base, Overlay, View, wrong_column
from pixrec.live.popularity import LivePopularity
from pixrec.live.store import AddedItem, EmbeddedVectors
from pixrec.model.catalog import Catalog
from pixrec.model.compact import UNKNOWN_TIME
from pixrec.model.encoding import Content
from pixrec.model.vision import find_tokens
from pixrec.query import COSINE, PURCHASE_SHARE, Answer, Filters, NewItem, Query, ScoreKind
from pixrec.retrieval.ranking import Asked, Ranked, Ranking, VectorSearch
from pixrec.retrieval.search import Searcher
from pixrec.schema import IMAGE
from pixrec.scorers.blend import fitted_mixture
from pixrec.scorers.towers import TowerScorer

EMBEDDED_AT_A_TIME = 64
"""Live items in one forward pass of the item tower."""

NEW_ITEMS_KEPT = 10_000
"""Vectors of new items that are kept; the one not asked for the longest goes first."""

_EVENTS_AT_A_TIME, _DAY_MS = 1_000_000, 86_400_000


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
        indexed = np.zeros(len(items), dtype=bool)
        indexed[rows] = True
        self._vectors = in_order(index.vectors, rows, len(items))
        new = np.flatnonzero(~indexed)  # items that came after the index: in histories, not among the answers
        if len(new):
            self._vectors[new] = self._embedder.items(catalog, new)
        structure = index.structure() if index.structure else None
        if structure is not None and not np.array_equal(rows, np.arange(len(items))):
            structure = structure.renumbered(rows)
        of_content = None if content is None else Searcher(content)
        self._content = content
        version = version or VersionContents()
        base = Base(items, self._vectors, content, indexed, version.content_hashes, version.folded)
        self.live = Overlay(base, self.model_version, self.embed_added)
        sold, searcher = LivePopularity(self.live, items.row_of), Searcher(self._vectors, structure)
        self.ranking = Ranking(items, indexed, searcher, of_content, training_counts, sold)
        self.column_problem = functools.partial(wrong_column, schema=base.schema)
        self._contents = LiveContents(items, self.live)
        self._catalog = Catalog(self._contents, model.encoder, tokens=tokens)
        self._temperature = model.temperature
        self._new_vectors: OrderedDict[bytes, np.ndarray] = OrderedDict()

    def blend_with(self, dataset: Dataset, new_item_share: float | None = None) -> None:
        """Rank recommendations by the mixture of the model with what the data set behind the index counts, from now on;
        its weights are taken from the validation events. `new_item_share`: as `serve.new_item_share`."""
        scores = TowerScorer("pixrec", self._embedder, self._catalog, self._vectors).scores
        self.ranking.mixture = fitted_mixture(dataset, self._temperature, scores, self._content, new_item_share)

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
        answers = []
        for one, items in zip(asked, self.ranking.rank(asked, vectors, view, search), strict=True):
            unknown = [i for i in one.query.history if i not in one.rows and i not in one.new_vectors]
            reasons = self.ranking.reasons(one, items, view) if one.query.reasons else None
            answers.append(self._answer(items, self.ranking.kind(one), reached, [*dict.fromkeys(unknown)], reasons))
        return answers

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
        return self.ranking.vectors_of(item_ids, self.live.view)

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
        newest = self._embedder.max_history_items
        known = ([one.query.history[place] for place in one.known[-newest:]] for one in asked)
        histories = [one.vectors(ids, self._vectors) for one, ids in zip(asked, known, strict=True)]
        return self._embedder.users_of_vectors(histories, timestamps)

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
        return self._answer(self.ranking.near(vector, one, view, search, of_content), COSINE, reached)

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


def _timestamps(query: Query, known: Sequence[int]) -> np.ndarray:
    """When each known item of the history was met, (L,), UNKNOWN_TIME where the query does not say."""
    if query.timestamps is None:
        return np.full(len(known), UNKNOWN_TIME, dtype=np.int64)
    return np.asarray(query.timestamps, dtype=np.int64)[known]


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
    new_item_share: float | None = None,
) -> Recommender:
    """As `pixrec.load_recommender`; `version`: of the index, by default the current one; `half_life_days`: as
    `serve.popularity_half_life_days`; `new_item_share`: as `serve.new_item_share`, None: as the model's config says."""
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
    settings = loaded.config.serve
    if settings.blend if blend is None else blend:
        recommender.blend_with(load_dataset(uri), settings.new_item_share if new_item_share is None else new_item_share)
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
