"""The routes of what shoppers do: events and histories. Knows a store and no model."""

from __future__ import annotations

import asyncio
import logging
import time

from fastapi import APIRouter
from fastapi.responses import Response

from pixrec.config import ServeConfig
from pixrec.live.store import Event, Feedback, Store, StoreAway
from pixrec.serving.backend import Backend
from pixrec.serving.bodies import DeletedBody, EventsBody, FeedbackBody, RecommendBody, StoredBody
from pixrec.serving.edge import NO_STORE, check_length, field_error, no_store
from pixrec.serving.gate import JsonResponse

FEEDBACK_METRICS = {
    "pixrec_impressions_total": "Recommended items that were seen, as reported.",
    "pixrec_clicks_total": "Recommended items that were clicked, as reported.",
}
logger = logging.getLogger("ray.serve.pixrec")


async def history_of(
    body: RecommendBody, store: Store | None, config: ServeConfig
) -> tuple[list[str], list[int] | None, bool]:
    """Items and times of the history, of the body or of what is stored of the user; and whether the store was away,
    in which case the history is empty."""
    given = body.model_fields_set
    if body.user_id is None:
        if "history" not in given:
            raise field_error("history", "give a history, or a user_id")
        return body.history, body.timestamps, False
    if "history" in given or body.timestamps is not None:
        raise field_error("user_id", "give a history with its timestamps, or a user_id: not both")
    if store is None:
        raise field_error("user_id", NO_STORE)
    try:
        found = await asyncio.to_thread(store.history, body.user_id, config.max_request_items)
    except StoreAway as error:
        logger.warning("%s", error)
        return [], None, True
    return [item_id for item_id, _ in found], [timestamp for _, timestamp in found], False


def event_routes(given: Store | None, config: ServeConfig, backend: Backend) -> APIRouter:
    router = APIRouter(prefix="/v1")

    def store() -> Store:
        if given is None:
            raise no_store()
        return given

    @router.post("/events", response_model=StoredBody)
    async def add_events(body: EventsBody) -> Response:
        """Store what shoppers did; the same event sent again is stored once."""
        check_length("events", len(body.events), config.max_events, "events")
        now = int(1000 * time.time())
        added = [Event(e.user_id, e.item_id, now if e.timestamp is None else e.timestamp, e.event) for e in body.events]
        await asyncio.to_thread(store().add, added)
        return JsonResponse({"stored": len(added)})

    @router.post("/feedback", response_model=StoredBody)
    async def add_feedback(body: FeedbackBody) -> Response:
        """Tell which items of an answer were seen and clicked: `/metrics` counts both by model version."""
        told = Feedback(body.request_id, body.model_version, body.impressions, body.clicks)
        check_length("impressions", len(told.impressions) + len(told.clicks), config.max_request_items, "items")
        known = await asyncio.to_thread(store().click_through)
        if told.model_version not in known and told.model_version != (await backend.versions()).model_version:
            raise field_error("model_version", "no such version of the model is in use, nor was one")
        await asyncio.to_thread(store().add_feedback, [told])
        return JsonResponse({"stored": len({*told.impressions, *told.clicks})})

    @router.delete("/users/{user_id:path}", response_model=DeletedBody)
    async def forget(user_id: str) -> Response:
        """Delete all that is stored of a user."""
        return JsonResponse({"deleted": await asyncio.to_thread(store().forget, user_id)})

    return router


def feedback_metrics(store: Store | None) -> str:
    """Impressions and clicks by model version, as Prometheus reads them; nothing where the store does not answer."""
    try:
        counts = {} if store is None else store.click_through()
    except StoreAway:
        return ""
    lines = []
    for number, (name, meaning) in enumerate(FEEDBACK_METRICS.items() if counts else ()):
        lines += [f"# HELP {name} {meaning}", f"# TYPE {name} counter"]
        lines += [f'{name}{{model_version="{model}"}} {both[number]}' for model, both in counts.items()]
    return "".join(f"{line}\n" for line in lines)
