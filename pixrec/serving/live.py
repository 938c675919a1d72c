"""The routes of what shoppers do: events and histories. Knows a store and no model."""

from __future__ import annotations

import asyncio
import logging
import time

from fastapi import APIRouter
from fastapi.responses import Response

from pixrec.config import ServeConfig
from pixrec.live.store import Event, Store, StoreAway
from pixrec.serving.bodies import DeletedBody, EventsBody, RecommendBody, StoredBody
from pixrec.serving.edge import NO_STORE, check_length, field_error, no_store
from pixrec.serving.gate import JsonResponse

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


def event_routes(given: Store | None, config: ServeConfig) -> APIRouter:
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

    @router.delete("/users/{user_id:path}", response_model=DeletedBody)
    async def forget(user_id: str) -> Response:
        """Delete all that is stored of a user."""
        return JsonResponse({"deleted": await asyncio.to_thread(store().forget, user_id)})

    return router
