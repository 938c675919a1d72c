"""The two Ray Serve deployments: one checks requests, one holds the model. Knows no route.

The ingress never imports torch, so it starts in seconds, stays small, and can have as many replicas as HTTP needs.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import BackpressureConfig
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from pixrec.config import ServeConfig
from pixrec.errors import InputError, UnreadableImage
from pixrec.query import Answer, Filters, Query
from pixrec.serving.backend import FilterValues, Overloaded, Refusal, Unavailable, Versions
from pixrec.serving.http import create_api

if TYPE_CHECKING:
    from pixrec.recommender import Recommender

logger = logging.getLogger(__name__)

FILTER_VALUES_OFFERED = 50

RECOMMENDER, INGRESS = "Recommender", "Ingress"


class RecommenderReplica:
    """Holds one loaded recommender and answers for it; histories that arrive together share one forward pass."""

    def __init__(self, load: Callable[[], Recommender], config: ServeConfig) -> None:
        import torch  # here and below: only the replica that computes pays for torch

        torch.set_num_threads(config.threads_per_replica)
        self._recommender = load()
        self._versions = Versions(self._recommender.model_version, self._recommender.index_version)
        self._filter_fields = list(self._recommender.items.filter_fields)
        self._filter_values: FilterValues | None = None
        # One thread computes: two forward passes at once would fight over the same cores. The event loop stays free
        # to gather the next batch.
        self._computing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="recommender")
        batched = serve.batch(max_batch_size=config.max_batch_size, batch_wait_timeout_s=config.batch_wait_seconds)
        self._answer_together = batched(self.answer_all)

    async def recommend(self, query: Query) -> Answer | Refusal:
        # Refused before it joins a batch, where it would fail its neighbours.
        refusal = self._refusal(query.filters)
        if refusal is not None:
            return refusal
        problem = query.problem()
        if problem is not None:
            return Refusal(*problem)
        if query.new_items:
            try:
                await self._compute(self._recommender.encode_new, query.new_items)  # which keeps the vectors
            except InputError as error:
                return Refusal("new_items", str(error))
        return await self._answer_together(query)

    async def answer_all(self, queries: list[Query]) -> list[Answer]:
        return await self._compute(self._recommender.answer, queries)

    async def similar(self, item_id: str, k: int, filters: Filters) -> Answer | Refusal | None:
        if item_id not in self._recommender.items.row_of:
            return None
        refusal = self._refusal(filters)
        return refusal or await self._compute(self._recommender.similar, item_id, k, filters)

    async def search(self, text: str, image: bytes | None, k: int, filters: Filters) -> Answer | Refusal:
        refusal = self._refusal(filters)
        if refusal is not None:
            return refusal
        try:
            return await self._compute(self._recommender.search, text, image, k, filters)
        except UnreadableImage as error:
            return Refusal("image_base64", str(error))

    async def filters(self) -> FilterValues:
        if self._filter_values is None:
            self._filter_values = await asyncio.to_thread(self._recommender.items.filter_values, FILTER_VALUES_OFFERED)
        return self._filter_values

    async def fields(self, item_id: str) -> dict[str, Any] | None:
        row = self._recommender.items.row_of.get(item_id)
        return None if row is None else self._recommender.items.fields(row)

    async def image(self, item_id: str) -> bytes | None:
        row = self._recommender.items.row_of.get(item_id)
        return None if row is None else self._recommender.items.image(row)

    async def versions(self) -> Versions:
        return self._versions

    async def _compute(self, function: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._computing, function, *args)

    def _refusal(self, filters: Filters) -> Refusal | None:
        unknown = next((name for name in filters if name not in self._filter_fields), None)
        if unknown is None:
            return None
        known = ", ".join(self._filter_fields) or "none"
        return Refusal("filters", f"{unknown!r} is no filter field of this catalog; known: {known}")


class ServeBackend:
    """A Backend that asks the recommender's replicas through a Serve handle, and says why when none answers."""

    def __init__(self, recommender: DeploymentHandle, timeout_seconds: float) -> None:
        self._recommender = recommender
        self._timeout_seconds = timeout_seconds

    async def recommend(self, query: Query) -> Answer | Refusal:
        return await self._ask("recommend", query)

    async def similar(self, item_id: str, k: int, filters: Filters) -> Answer | Refusal | None:
        return await self._ask("similar", item_id, k, filters)

    async def search(self, text: str, image: bytes | None, k: int, filters: Filters) -> Answer | Refusal:
        return await self._ask("search", text, image, k, filters)

    async def filters(self) -> FilterValues:
        return await self._ask("filters")

    async def fields(self, item_id: str) -> dict[str, Any] | None:
        return await self._ask("fields", item_id)

    async def image(self, item_id: str) -> bytes | None:
        return await self._ask("image", item_id)

    async def versions(self) -> Versions:
        return await self._ask("versions")

    async def _ask(self, method: str, *args: Any) -> Any:
        try:
            async with asyncio.timeout(self._timeout_seconds):
                return await getattr(self._recommender, method).remote(*args)
        except BackPressureError:
            raise Overloaded("too many requests are waiting; try again") from None
        except TimeoutError:
            raise Unavailable(f"no answer within {self._timeout_seconds:g} s; try again") from None
        except (RayError, RayServeException):
            logger.exception("the recommender failed to answer %s", method)
            raise Unavailable("the model is not available; try again") from None


class Ingress:
    """Serves the HTTP application; Serve calls the constructor, then asks for the application, both in the replica."""

    def __init__(self, recommender: DeploymentHandle, config: ServeConfig) -> None:
        self._backend = ServeBackend(recommender, config.request_timeout_seconds)
        self._config = config

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_api(self._backend, self._config)


def bind(load: Callable[[], Recommender], config: ServeConfig) -> serve.Application:
    """The application: `load` runs in every replica of the recommender and must be importable there."""
    backpressure = BackpressureConfig(status_code=503, retry_after_s=config.retry_after_seconds)
    recommender = serve.deployment(
        name=RECOMMENDER,
        num_replicas=config.num_replicas,
        ray_actor_options={"num_cpus": config.cpus_per_replica, "num_gpus": config.gpus_per_replica},
        max_ongoing_requests=config.max_ongoing_requests,
        max_queued_requests=config.max_queued_requests,
        backpressure_config=backpressure,
        max_surge_percent=100,  # a new index is loaded beside the old one, which answers until then
        max_constructor_retry_count=2,  # a model that cannot be loaded will not load the twentieth time either
    )(RecommenderReplica)
    ingress = serve.deployment(
        name=INGRESS,
        num_replicas=config.num_ingress_replicas,
        ray_actor_options={"num_cpus": config.cpus_per_ingress},
        # Room for all that the recommender admits: whoever refuses first should be the one who knows why.
        max_ongoing_requests=config.num_replicas * config.max_ongoing_requests + config.max_queued_requests,
        max_queued_requests=config.max_queued_requests,
        backpressure_config=backpressure,
    )(serve.ingress()(Ingress))
    return ingress.bind(recommender.bind(load, config), config)
