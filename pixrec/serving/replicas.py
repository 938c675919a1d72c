"""What runs in the replicas that hold a version: encoding in batches, ranking, and answering for the items.

Plain classes, which Serve makes into deployments; `pixrec.serving.deployments` says how many and where.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
from ray import serve
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from pixrec.config import ServeConfig
from pixrec.errors import ArtifactError, InputError, UnreadableImage
from pixrec.live.places import open_store
from pixrec.live.store import Store, StoreAway, StoreFull
from pixrec.query import Answer, NewItem, Query, Vectors
from pixrec.serving.backend import Change, FilterValues, ItemChange, NotStored, Refusal, ToEmbed, Versions
from pixrec.serving.metrics import ReplicaMetrics
from pixrec.serving.published import Outcome, Rollout, Source

if TYPE_CHECKING:
    from pixrec.recommender import Asked, Recommender

FILTER_VALUES_OFFERED = 50


class Replica:
    """What holds a version: it follows what is published, computes in one thread, and counts.

    Two computations at once would fight over the same cores. The event loop stays free to gather the next batch.
    """

    def __init__(self, source: Source, config: ServeConfig, **rollout: Any) -> None:
        """rollout: further arguments of the Rollout."""
        import torch  # only a replica that computes pays for torch

        torch.set_num_threads(config.threads_per_replica)
        self._config, self._store = config, store_of(config)
        self._rollout = Rollout(source, loaded=self._loaded, **rollout)
        self._rollout.watch(config.poll_seconds)
        self._metrics = ReplicaMetrics(self._rollout)
        self._computing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="recommender")

    def _loaded(self, recommender: Recommender) -> None:
        """Prepare a recommender that was loaded and is not used yet."""
        if self._store is not None:
            recommender.live.follow(self._store)

    @property
    def _recommender(self) -> Recommender:
        return self._rollout.current

    async def _compute(self, stage: str, function: Callable[..., Any], *args: Any) -> Any:
        def measured() -> Any:
            with self._metrics.stage(stage):
                return function(*args)

        return await asyncio.get_running_loop().run_in_executor(self._computing, measured)

    async def reload(self) -> Change:
        return self._change(await asyncio.to_thread(self._rollout.refresh, True))

    def _change(self, outcome: Outcome) -> Change:
        return Change(outcome, self._rollout.state())

    async def metrics(self) -> tuple[dict[str, str], str]:
        return replica_labels(), self._metrics.text()


class RetrievalReplica(Replica):
    """Ranks by vectors that a replica of the model computed, among the items of the same version."""

    def __init__(self, source: Source, config: ServeConfig) -> None:
        # A batch that was encoded before a swap is still ranked by the index that belongs to it.
        keep_seconds = 2 * config.request_timeout_seconds
        super().__init__(source, config, keep_seconds=keep_seconds)

    def _loaded(self, recommender: Recommender) -> None:
        super()._loaded(recommender)
        recommender.release_tower()

    async def rank(self, versions: Versions, asked: list[Asked], vectors: np.ndarray) -> list[Answer] | None:
        """None: these versions are not here any more."""
        recommender = await self._of(versions)
        return None if recommender is None else await self._compute("retrieve", recommender.rank, asked, vectors)

    async def near(self, versions: Versions, vector: np.ndarray, query: Query, of_content: bool) -> Answer | None:
        recommender = await self._of(versions)
        if recommender is None:
            return None
        return await self._compute("retrieve", recommender.near, vector, query, of_content)

    async def _of(self, versions: Versions) -> Recommender | None:
        if versions == _versions(self._recommender):
            return self._recommender
        return await asyncio.to_thread(self._rollout.of, versions.model_version, versions.index_version)


class RecommenderReplica(Replica):
    """Holds one loaded recommender and answers for it; histories that arrive together share one forward pass."""

    def __init__(self, source: Source, config: ServeConfig, retrieval: DeploymentHandle | None = None) -> None:
        """retrieval: the deployment that ranks; None: this replica does."""
        super().__init__(source, config)
        self._retrieval = retrieval
        self._filter_values: tuple[Recommender, FilterValues] | None = None
        batched = serve.batch(max_batch_size=config.max_batch_size, batch_wait_timeout_s=config.batch_wait_seconds)
        self._answer_together = batched(self.answer_all)

    async def recommend(self, query: Query) -> Answer | Refusal:
        # Refused before it joins a batch, where it would fail its neighbours.
        refusal = self._refusal(query)
        if refusal is not None:
            return refusal
        if query.new_items:
            try:
                await self._compute("encode", self._recommender.encode_new, query.new_items)  # which keeps the vectors
            except InputError as error:
                return Refusal("new_items", str(error))
        return await self._answer_together(query)

    async def answer_all(self, queries: list[Query]) -> list[Answer]:
        self._metrics.batch_size.observe(len(queries))
        answers = await self._answered(queries)
        self._metrics.answered(sum(len(query.history) for query in queries), answers)
        return answers

    async def _answered(self, queries: list[Query]) -> list[Answer]:
        if self._retrieval is None:
            return await asyncio.get_running_loop().run_in_executor(self._computing, self._answer_here, queries)
        for _ in range(2):
            recommender = self._recommender
            asked, vectors = await self._compute("encode", _encoded, recommender, queries)
            found = await self._retrieval.rank.remote(_versions(recommender), asked, vectors)
            if found is not None:
                return found
            await self.reload()  # retrieval has moved on
        raise RuntimeError("no retrieval replica has the versions of this replica")

    def _answer_here(self, queries: list[Query]) -> list[Answer]:
        recommender = self._recommender
        with self._metrics.stage("encode"):
            asked, vectors = _encoded(recommender, queries)
        with self._metrics.stage("retrieve"):
            return recommender.rank(asked, vectors)

    async def similar(self, item_id: str, query: Query) -> Answer | Refusal | None:
        if not await asyncio.to_thread(self._recommender.knows, item_id):
            return None

        def vector(recommender: Recommender) -> np.ndarray:
            return recommender.item_vectors([item_id])[0]

        return self._refusal(query) or await self._near(vector, query)

    async def search(self, text: str, image: bytes | None, query: Query) -> Answer | Refusal:
        refusal = self._refusal(query)
        if refusal is not None:
            return refusal
        try:
            return await self._near(lambda recommender: recommender.search_vector(text, image), query, of_content=True)
        except UnreadableImage as error:
            return Refusal("image_base64", str(error))

    async def _near(
        self, vector_of: Callable[[Recommender], np.ndarray], query: Query, of_content: bool = False
    ) -> Answer:
        """The items nearest to the vector (D,) that `vector_of` gives; `of_content` as `Recommender.near` takes it."""
        for _ in range(2):
            recommender = self._recommender
            vector = await self._compute("encode", vector_of, recommender)
            if self._retrieval is None:
                return await self._compute("retrieve", recommender.near, vector, query, of_content)
            found = await self._retrieval.near.remote(_versions(recommender), vector, query, of_content)
            if found is not None:
                return found
            await self.reload()
        raise RuntimeError("no retrieval replica has the versions of this replica")

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

    def _refusal(self, query: Query) -> Refusal | None:
        items = self._recommender.items
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
    return open_store(config.store, config.max_events_kept, config.store_password)


def _versions(recommender: Recommender) -> Versions:
    return Versions(recommender.model_version, recommender.index_version)


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
