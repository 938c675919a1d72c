"""What runs in the replicas that hold a version: encoding in batches, ranking, and answering for the items.

Plain classes, which Serve makes into deployments; `pixrec.serving.deployments` says how many and where.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
from ray import serve
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from pixrec.config import ServeConfig
from pixrec.errors import ArtifactError, InputError, PixRecError, UnreadableImage
from pixrec.live.places import open_store
from pixrec.live.store import Store, StoreAway, StoreFull
from pixrec.query import Answer, Filters, NewItem, Query, Vectors
from pixrec.serving.backend import (
    Change,
    FilterValues,
    Incomplete,
    ItemChange,
    NotStored,
    Refusal,
    ShardsMissing,
    ToEmbed,
    Versions,
)
from pixrec.serving.metrics import Counted, ReplicaMetrics, ShardMetrics
from pixrec.serving.published import Outcome, Rollout, Source

if TYPE_CHECKING:
    from pixrec.recommender import Recommender
    from pixrec.retrieval.ranking import Asked
    from pixrec.retrieval.search import Found
    from pixrec.serving.shards import Shards

FILTER_VALUES_OFFERED = 50


class Replica:
    """Computes in one thread, and counts.

    Two computations at once would fight over the same cores. The event loop stays free to gather the next batch.
    """

    def __init__(self, config: ServeConfig, metrics: Counted) -> None:
        import torch  # only a replica that computes pays for torch

        torch.set_num_threads(config.threads_per_replica)
        self._metrics = metrics
        self._computing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="recommender")

    async def _compute(self, stage: str, function: Callable[..., Any], *args: Any) -> Any:
        def measured() -> Any:
            with self._metrics.stage(stage):
                return function(*args)

        return await asyncio.get_running_loop().run_in_executor(self._computing, measured)

    async def metrics(self) -> tuple[dict[str, str], str]:
        return replica_labels(), self._metrics.text()


class RetrievalReplica(Replica):
    """Searches one part of the index, by vectors that a replica of the model computed: in whatever version that names.

    What it holds follows from what it is asked for, so the parts of one answer are always of the same version.
    """

    def __init__(self, source: Source, config: ServeConfig, number: int = 0) -> None:
        """number: of the part, of `config.retrieval_shards`."""
        from pixrec.serving.shards import Held

        self._held = Held(lambda versions: source.load_shard(versions, number, config.retrieval_shards))
        super().__init__(config, ShardMetrics(self._held))
        wanted = source.wanted()
        self._held.of(Versions(str(wanted["model_fingerprint"]), str(wanted["version"])))

    async def search(
        self,
        versions: Versions,
        vectors: np.ndarray,
        k: int,
        filters: Filters,
        of_content: bool,
        barred: np.ndarray,
    ) -> Found:
        shard = self._held.get(versions)
        if shard is None:
            shard = await asyncio.to_thread(self._held.of, versions)
        return await self._compute("search", shard.search, vectors, k, filters, of_content, barred)

    async def hold(self, versions: Versions) -> str | None:
        """Load these versions where they are not; returns why they cannot be."""
        try:
            await asyncio.to_thread(self._held.of, versions)
        except PixRecError as error:
            return str(error)
        return None


class RecommenderReplica(Replica):
    """Holds one loaded recommender and answers for it; histories that arrive together share one forward pass.

    It follows what is published.
    """

    def __init__(self, source: Source, config: ServeConfig, *retrieval: DeploymentHandle) -> None:
        """retrieval: the deployments that search the parts of the index; none: this replica does."""
        self._shards = _shards(retrieval, config, self._lost_shard) if retrieval else None
        self._config, self._store = config, store_of(config)
        self._rollout = Rollout(source, self._loaded, config.canary_share)
        self._counted = ReplicaMetrics(self._rollout)
        super().__init__(config, self._counted)
        self._rollout.watch(config.poll_seconds)
        self._filter_values: tuple[Recommender, FilterValues] | None = None
        batched = serve.batch(
            max_batch_size=config.max_batch_size,
            batch_wait_timeout_s=config.batch_wait_seconds,
            batch_size_fn=lambda calls: sum(map(len, calls)),
        )
        self._answer_together = batched(self.answer_calls)

    def _loaded(self, recommender: Recommender) -> None:
        """Prepare a recommender that was loaded and is not used yet."""
        if self._store is not None:
            recommender.live.follow(self._store)
        if self._shards is not None:
            self._shards.hold(_versions(recommender))

    @property
    def _recommender(self) -> Recommender:
        return self._rollout.current

    def _lost_shard(self, number: int) -> None:
        self._counted.lost_shard(number)

    async def reload(self) -> Change:
        return self._change(await asyncio.to_thread(self._rollout.refresh, True))

    def _change(self, outcome: Outcome) -> Change:
        return Change(outcome, self._rollout.state())

    async def recommend(self, query: Query) -> Answer | Refusal | Incomplete:
        return (await self.recommend_all([query]))[0]

    async def recommend_all(self, queries: list[Query]) -> list[Answer | Refusal | Incomplete]:
        """The answers in the order of the queries: at most `max_batch_size`, as one call of the HTTP deployment."""
        refusals = [await self._refused(query) for query in queries]
        sound = [query for query, refusal in zip(queries, refusals, strict=True) if refusal is None]
        answers = iter(await self._answer_together(sound) if sound else [])
        return [next(answers) if refusal is None else refusal for refusal in refusals]

    async def _refused(self, query: Query) -> Refusal | None:
        """Why the query is refused, before it joins a batch, where it would fail its neighbours."""
        recommender = self._rollout.for_query(query)
        refusal = self._refusal(query, recommender)
        if refusal is None and query.new_items:
            try:
                await self._compute("encode", recommender.encode_new, query.new_items)  # which keeps the vectors
            except InputError as error:
                return Refusal("new_items", str(error))
        return refusal

    async def answer_calls(self, calls: list[list[Query]]) -> list[list[Answer | Incomplete]]:
        """The answers to calls that came at about the same time."""
        answers = iter(await self.answer_all([query for call in calls for query in call]))
        return [[next(answers) for _ in call] for call in calls]

    async def answer_all(self, queries: list[Query]) -> list[Answer | Incomplete]:
        """The answers in the order of the queries; those who get a canary are a batch of their own."""
        batches: dict[Recommender, list[int]] = {}
        for place, query in enumerate(queries):
            batches.setdefault(self._rollout.for_query(query), []).append(place)
        answers: dict[int, Answer | Incomplete] = {}
        for recommender, places in batches.items():
            found = await self._answered(recommender, [queries[place] for place in places])
            answers |= zip(places, found, strict=True)
        return [answers[place] for place in range(len(queries))]

    async def _answered(self, recommender: Recommender, queries: list[Query]) -> Sequence[Answer | Incomplete]:
        self._counted.batch_size.observe(len(queries))
        start = time.perf_counter()
        asked, vectors = await self._compute("encode", _encoded, recommender, queries)
        answers = await self._retrieve(recommender, recommender.rank, asked, vectors)
        if isinstance(answers, Incomplete):
            return [answers for _ in queries]
        self._counted.answered(sum(len(query.history) for query in queries), answers)
        self._counted.took(recommender.index_version, time.perf_counter() - start)
        return answers

    async def _retrieve(self, recommender: Recommender, rank: Callable[..., Any], *args: Any) -> Any | Incomplete:
        """What `rank`, of the recommender, makes of these arguments: by a search in this process or in the shards."""
        if self._shards is None:
            return await self._compute("retrieve", rank, *args)
        search = self._shards.of(_versions(recommender))
        try:
            with self._metrics.stage("retrieve"):
                found = await asyncio.to_thread(rank, *args, search=search)
        except ShardsMissing as missing:
            return Incomplete(str(missing))
        if not search.missing:
            return found
        missing_shards = sorted(search.missing)
        if isinstance(found, Answer):
            return dataclasses.replace(found, missing_shards=missing_shards)
        return [dataclasses.replace(answer, missing_shards=missing_shards) for answer in found]

    async def similar(self, item_id: str, query: Query) -> Answer | Refusal | Incomplete | None:
        if not await asyncio.to_thread(self._recommender.knows, item_id):
            return None

        def vector(recommender: Recommender) -> np.ndarray:
            return recommender.item_vectors([item_id])[0]

        return self._refusal(query) or await self._near(vector, query)

    async def search(self, text: str, image: bytes | None, query: Query) -> Answer | Refusal | Incomplete:
        refusal = self._refusal(query)
        if refusal is not None:
            return refusal
        try:
            return await self._near(lambda recommender: recommender.search_vector(text, image), query, of_content=True)
        except UnreadableImage as error:
            return Refusal("image_base64", str(error))

    async def _near(
        self, vector_of: Callable[[Recommender], np.ndarray], query: Query, of_content: bool = False
    ) -> Answer | Incomplete:
        """The items nearest to the vector (D,) that `vector_of` gives; `of_content` as `Recommender.near` takes it."""
        recommender = self._recommender
        vector = await self._compute("encode", vector_of, recommender)
        return await self._retrieve(recommender, recommender.near, vector, query, of_content)

    async def embed(self, wanted: ToEmbed) -> Vectors | Refusal:
        try:
            return await self._compute("encode", _embedded, self._recommender, wanted)
        except UnreadableImage as error:
            return Refusal("images_base64", str(error))

    async def filters(self) -> FilterValues:
        recommender, known = self._recommender, self._filter_values
        if known is None or known[0] is not recommender:
            found = await asyncio.to_thread(recommender.items.filter_values, FILTER_VALUES_OFFERED)
            self._filter_values = known = recommender, found
        return known[1]

    async def fields(self, item_id: str) -> dict[str, Any] | None:
        recommender = self._recommender
        return recommender.fields(item_id) if await asyncio.to_thread(recommender.knows, item_id) else None

    async def image(self, item_id: str) -> bytes | None:
        recommender = self._recommender
        known = await asyncio.to_thread(recommender.knows, item_id)
        return await asyncio.to_thread(recommender.image, item_id) if known else None

    async def add_items(self, items: Mapping[str, NewItem]) -> Versions | Refusal | NotStored:
        return await self._compute("encode", self._add_items, items)

    def _add_items(self, items: Mapping[str, NewItem]) -> Versions | Refusal | NotStored:
        recommender, store = self._recommender, self._store
        assert store is not None
        try:
            store.put(recommender.model_version, *recommender.embed_new(items), self._config.max_live_items)
        except InputError as error:
            return Refusal("items", str(error))
        except StoreFull:
            most = self._config.max_live_items
            return NotStored(f"the store holds {most} items, the most that serve.max_live_items allows", full=True)
        except StoreAway as error:
            return NotStored(str(error))
        return _versions(recommender)

    async def change_item(self, item_id: str, change: ItemChange) -> Versions | Refusal | NotStored | None:
        return await asyncio.to_thread(self._change_item, item_id, change)

    def _change_item(self, item_id: str, change: ItemChange) -> Versions | Refusal | NotStored | None:
        recommender, store = self._recommender, self._store
        assert store is not None
        if not recommender.knows(item_id):
            return None
        problem = recommender.column_problem(change.fields)
        if problem is not None:
            return Refusal("fields", problem)
        try:
            store.change(item_id, change.fields, change.hidden)
        except StoreAway as error:
            return NotStored(str(error))
        return _versions(recommender)

    async def versions(self) -> Versions:
        return _versions(self._recommender)

    async def state(self) -> dict[str, Any]:
        return self._rollout.state()

    async def pin(self, version: str | None) -> Change | None:
        try:
            return self._change(await asyncio.to_thread(self._rollout.pin, version))
        except ArtifactError:
            return None

    async def rollback(self) -> Change | None:
        outcome = await asyncio.to_thread(self._rollout.rollback)
        return None if outcome is None else self._change(outcome)

    def _refusal(self, query: Query, recommender: Recommender | None = None) -> Refusal | None:
        items = (recommender or self._recommender).items
        problem = items.filter_problem(query.filters)
        if problem is not None:
            return Refusal("filters", problem)
        unknown = next((name for name in query.max_per if name not in items.filter_fields), None)
        if unknown is not None:
            known = ", ".join(items.filter_fields) or "none"
            return Refusal("max_per", f"{unknown!r} is no field of this catalog to count by; known: {known}")
        wrong = query.problem()
        return None if wrong is None else Refusal(*wrong)


def store_of(config: ServeConfig) -> Store | None:
    """The store that the settings name; None where they name none (`index` has become a place by now)."""
    if config.store in ("none", "index"):
        return None
    kept, half_life_days = config.max_events_kept, config.store_half_life_days
    return open_store(config.store, kept, config.store_password, half_life_days)


def _versions(recommender: Recommender) -> Versions:
    return Versions(recommender.model_version, recommender.index_version)


def _shards(retrieval: Sequence[DeploymentHandle], config: ServeConfig, lost: Callable[[int], None]) -> Shards:
    from pixrec.serving.shards import Shards

    return Shards(retrieval, config, lost)


def _encoded(recommender: Recommender, queries: Sequence[Query]) -> tuple[list[Asked], np.ndarray]:
    asked = recommender.read(queries)
    return asked, recommender.encode(asked)


def _embedded(recommender: Recommender, wanted: ToEmbed) -> Vectors:
    """The vectors wanted: contents in one pass of the item tower, histories in one of the user tower."""
    contents = [(text, None) for text in wanted.texts] + [("", image) for image in wanted.images]
    made = recommender.content_vectors(contents).tolist() if contents else []
    known = [item_id for item_id in dict.fromkeys(wanted.item_ids) if recommender.knows(item_id)]
    of_item = dict(zip(known, recommender.item_vectors(known).tolist() if known else [], strict=True))
    asked = recommender.read([Query(history) for history in wanted.histories])
    users = recommender.encode(asked).tolist() if asked else []
    return Vectors(
        made[: len(wanted.texts)],
        made[len(wanted.texts) :],
        [of_item.get(item_id) for item_id in wanted.item_ids],
        [vector if one.known else None for one, vector in zip(asked, users, strict=True)],
        recommender.model_version,
        recommender.index_version,
    )


def replica_labels() -> dict[str, str]:
    """Labels that tell the metrics of this process apart."""
    try:
        found = serve.get_replica_context()
    except RayServeException:
        return {"deployment": "none", "replica": "none"}
    return {"deployment": found.deployment, "replica": found.replica_id.unique_id}
