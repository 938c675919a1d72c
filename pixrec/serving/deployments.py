"""The Ray Serve deployments: one checks requests, one holds the model, and where wanted some search. Knows no route.

The ingress never imports torch, so it starts in seconds, stays small, and can have as many replicas as HTTP needs.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import AutoscalingConfig, BackpressureConfig
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from pixrec.config import ServeConfig
from pixrec.query import Answer, NewItem, Query, Vectors
from pixrec.serving.backend import (
    Change,
    FilterValues,
    Incomplete,
    ItemChange,
    NotStored,
    Overloaded,
    Refusal,
    ToEmbed,
    Unavailable,
    Versions,
)
from pixrec.serving.gathering import Gathered
from pixrec.serving.http import create_api
from pixrec.serving.metrics import RequestMetrics, merged
from pixrec.serving.published import Source
from pixrec.serving.replicas import RecommenderReplica, RetrievalReplica, replica_labels, store_of

logger = logging.getLogger("ray.serve.pixrec")  # Serve writes what goes there, with the id of the request

METRICS_SECONDS = 5.0

RECOMMENDER, RETRIEVAL, INGRESS = "Recommender", "Retrieval", "Ingress"


class ServeBackend:
    """A Backend that asks the replicas through Serve handles, and says why when none answers."""

    def __init__(
        self,
        recommender: DeploymentHandle,
        config: ServeConfig,
        metrics: RequestMetrics | None = None,
        retrieval: Sequence[DeploymentHandle] = (),
    ) -> None:
        self._recommender, self._retrieval, self._config = recommender, retrieval, config
        self._metrics = metrics or RequestMetrics()
        self._together = Gathered[Query, Any](self._recommend_all, config.max_batch_size, config.max_calls)

    async def recommend(self, query: Query) -> Answer | Refusal:
        if query.new_items:  # their texts and pictures take a while, for which no other should wait
            return await self._ask("recommend", query)
        return await self._answered("recommend", self._together.ask(query))

    async def _recommend_all(self, queries: list[Query]) -> list[Any]:
        async with asyncio.timeout(self._config.request_timeout_seconds):
            return await self._call("recommend_all", queries)

    async def similar(self, item_id: str, query: Query) -> Answer | Refusal | None:
        return await self._ask("similar", item_id, query)

    async def search(self, text: str, image: bytes | None, query: Query) -> Answer | Refusal:
        return await self._ask("search", text, image, query)

    async def embed(self, wanted: ToEmbed) -> Vectors | Refusal:
        return await self._ask("embed", wanted)

    async def filters(self) -> FilterValues:
        return await self._ask("filters")

    async def fields(self, item_id: str) -> dict[str, Any] | None:
        return await self._ask("fields", item_id)

    async def image(self, item_id: str) -> bytes | None:
        return await self._ask("image", item_id)

    async def add_items(self, items: Mapping[str, NewItem]) -> Versions | Refusal | NotStored:
        return await self._ask("add_items", items)

    async def change_item(self, item_id: str, change: ItemChange) -> Versions | Refusal | NotStored | None:
        return await self._ask("change_item", item_id, change)

    async def versions(self) -> Versions:
        return await self._ask("versions")

    async def state(self) -> dict[str, Any]:
        return await self._ask("state")

    async def reload(self) -> list[Change]:
        found = await self._everywhere(self._recommender, "reload", self._config.load_timeout_seconds)
        changes = [change for change in found if isinstance(change, Change)]
        if not changes:
            raise Unavailable("no replica answered; try again")
        return changes

    async def pin(self, version: str | None) -> list[Change] | None:
        return await self._then_reload(await self._ask("pin", version, timeout=self._config.load_timeout_seconds))

    async def rollback(self) -> list[Change] | None:
        return await self._then_reload(await self._ask("rollback", timeout=self._config.load_timeout_seconds))

    async def _then_reload(self, first: Change | None) -> list[Change] | None:
        """What one replica could do all others do; what it refused they are not asked for."""
        if first is None:
            return None
        return [first] if first.outcome == "refused" else [first, *await self.reload()]

    async def metrics(self) -> str:
        texts = [(replica_labels(), self._metrics.text())]
        handles = [self._recommender, *self._retrieval]
        found = await asyncio.gather(*(self._everywhere(handle, "metrics", METRICS_SECONDS) for handle in handles))
        texts += [one for answers in found for one in answers if isinstance(one, tuple)]
        if self._config.num_ingress_replicas > 1:
            texts += await self._other_ingresses()
        return merged(texts)

    async def _other_ingresses(self) -> list[tuple[dict[str, str], str]]:
        context = serve.get_replica_context()
        handle = serve.get_deployment_handle(INGRESS, context.app_name)
        found = await self._everywhere(handle, "own_metrics", METRICS_SECONDS)
        mine = replica_labels()
        return [one for one in found if isinstance(one, tuple) and one[0] != mine]

    async def _everywhere(self, handle: DeploymentHandle, method: str, timeout: float) -> list[Any]:
        """What every replica answers; those that fail are left out by the caller."""
        try:
            return await handle.broadcast(method).results_async(timeout_s=timeout, return_exceptions=True)
        except TimeoutError:
            raise Unavailable(f"not every replica answered within {timeout:g} s") from None
        except (RayError, RayServeException):
            logger.exception("the replicas could not be asked for %s", method)
            raise Unavailable("the model is not available; try again") from None

    async def _ask(self, method: str, *args: Any, timeout: float | None = None) -> Any:
        return await self._answered(method, self._call(method, *args), timeout)

    async def _call(self, method: str, *args: Any) -> Any:
        return await getattr(self._recommender, method).remote(*args)

    async def _answered(self, method: str, answer: Awaitable[Any], timeout: float | None = None) -> Any:
        self._metrics.validated()
        seconds = timeout or self._config.request_timeout_seconds
        try:
            async with asyncio.timeout(seconds):
                found = await answer
        except BackPressureError:
            raise Overloaded("too many requests are waiting; try again") from None
        except TimeoutError:
            raise Unavailable(f"no answer within {seconds:g} s; try again") from None
        except (RayError, RayServeException):
            logger.exception("the recommender failed to answer %s", method)
            raise Unavailable("the model is not available; try again") from None
        if isinstance(found, Incomplete):
            raise Unavailable(f"{found.message}; try again")
        return found


class Ingress:
    """Serves the HTTP application; Serve calls the constructor, then asks for the application, both in the replica."""

    def __init__(self, recommender: DeploymentHandle, config: ServeConfig, *retrieval: DeploymentHandle) -> None:
        self._metrics = RequestMetrics()
        self._backend = ServeBackend(recommender, config, self._metrics, retrieval)
        self._config = config

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_api(self._backend, self._config, self._metrics, store_of(self._config))

    async def own_metrics(self) -> tuple[dict[str, str], str]:
        return replica_labels(), self._metrics.text()


def bind(source: Source, config: ServeConfig) -> serve.Application:
    """The application over what `source` publishes, which loads in the replicas and must be importable there."""
    shared: dict[str, Any] = {
        "max_queued_requests": config.max_queued_requests,
        "backpressure_config": BackpressureConfig(status_code=503, retry_after_s=config.retry_after_seconds),
        "logging_config": LoggingConfig(encoding=config.log_format.upper()),
    }
    holds_a_version = {
        **shared,
        "max_ongoing_requests": config.max_ongoing_requests,
        "max_surge_percent": 100,  # a new deployment loads beside the old one, which answers until then
        "max_constructor_retry_count": 2,  # a model that cannot be loaded will not load the twentieth time either
    }
    shards = config.retrieval_shards if config.num_retrieval_replicas else 0
    retrieval = [
        serve.deployment(
            name=RETRIEVAL if shards == 1 else f"{RETRIEVAL}{number}",
            num_replicas=config.num_retrieval_replicas,
            ray_actor_options={"num_cpus": config.cpus_per_retrieval},
            **holds_a_version,
        )(RetrievalReplica).bind(source, config, number)
        for number in range(shards)
    ]
    recommender = serve.deployment(
        name=RECOMMENDER,
        **_scaling(config),
        ray_actor_options={"num_cpus": config.cpus_per_replica, "num_gpus": config.gpus_per_replica},
        **holds_a_version,
    )(RecommenderReplica).bind(source, config, *retrieval)
    ingress = serve.deployment(
        name=INGRESS,
        num_replicas=config.num_ingress_replicas,
        ray_actor_options={"num_cpus": config.cpus_per_ingress},
        # Room for more than the application admits: it refuses at the least cost, and knows why.
        max_ongoing_requests=config.max_in_flight + config.max_queued_requests,
        **shared,
    )(serve.ingress()(Ingress))
    return ingress.bind(recommender, config, *retrieval)


def _scaling(config: ServeConfig) -> dict[str, Any]:
    """A fixed number of replicas, or one that follows the requests."""
    if config.max_replicas is None:
        return {"num_replicas": config.num_replicas}
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=config.min_replicas,
            initial_replicas=max(1, config.min_replicas),
            max_replicas=config.max_replicas,
            target_ongoing_requests=config.target_ongoing_requests,
        )
    }
