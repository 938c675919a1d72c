"""A backend without a model, and a client without a network."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from pixrec.config import ServeConfig
from pixrec.query import COSINE, PURCHASE_SHARE, Answer, Filters, NewItem, Query, Vectors
from pixrec.serving.backend import Change, FilterValues, ItemChange, NotStored, Refusal, ToEmbed, Versions
from pixrec.serving.http import create_api

JPEG = b"\xff\xd8\xff and so on"


class FakeBackend:
    """Ranks a small catalog in its own order, and raises `trouble` instead when that is set."""

    def __init__(self, fields: dict[str, dict[str, Any]], images: dict[str, bytes] | None = None) -> None:
        self.catalog, self.images = fields, images or {}
        self.trouble: Exception | None = None
        self.asked: list[tuple[Any, ...]] = []

    async def recommend(self, request: Query) -> Answer | Refusal:
        self.request = request
        known = [item_id for item_id in request.history if item_id in self.catalog or item_id in request.new_items]
        left_out = {*request.exclude, *(request.history if request.exclude_history else ())}
        answer = self._rank("recommend", request.k, request.filters, left_out)
        if isinstance(answer, Refusal):
            return answer
        unknown = [item_id for item_id in request.history if item_id not in known]
        kind = COSINE if known else PURCHASE_SHARE
        return dataclasses.replace(answer, unknown_items=unknown, fallback=not known, score_kind=kind)

    async def similar(self, item_id: str, query: Query) -> Answer | Refusal | None:
        self.request = query
        return self._rank("similar", query.k, query.filters, {item_id}) if item_id in self.catalog else None

    async def search(self, text: str, image: bytes | None, query: Query) -> Answer | Refusal:
        self.request = query
        if image == b"not a picture":
            return Refusal("image_base64", "unreadable picture: not a picture")
        return self._rank("search", query.k, query.filters, set(), text, image)

    async def embed(self, wanted: ToEmbed) -> Vectors | Refusal:
        self._ask("embed", wanted)
        if b"not a picture" in wanted.images:
            return Refusal("images_base64", "unreadable picture: not a picture")
        return Vectors(
            [[1.0, 0.0] for _ in wanted.texts],
            [[0.0, 1.0] for _ in wanted.images],
            [[0.6, 0.8] if item_id in self.catalog else None for item_id in wanted.item_ids],
            [[0.8, 0.6] if set(history) & set(self.catalog) else None for history in wanted.histories],
            "model-1",
            "index-1",
        )

    async def state(self) -> dict[str, Any]:
        self._ask("state")
        return {"model_version": "model-1", "index_version": "index-1", "published": None, "refused": None}

    async def reload(self) -> list[Change]:
        self._ask("reload")
        return [Change("swapped", await self.state())]

    async def pin(self, version: str | None) -> list[Change] | None:
        self._ask("pin", version)
        if version == "of-another-model":
            return [Change("refused", {**await self.state(), "refused": "made by another model"})]
        return None if version == "ghost" else [Change("unchanged", await self.state())]

    async def rollback(self) -> list[Change] | None:
        self._ask("rollback")
        return None

    async def metrics(self) -> str:
        self._ask("metrics")
        return "# HELP a_total b\n"

    async def filters(self) -> FilterValues:
        self._ask("filters")
        return {"brand": [("Acme", 3), ("Øre", 1)], "year": [(2001, 2)]}

    async def fields(self, item_id: str) -> dict[str, Any] | None:
        self._ask("fields", item_id)
        return self.catalog.get(item_id)

    async def image(self, item_id: str) -> bytes | None:
        self._ask("image", item_id)
        return self.images.get(item_id)

    async def add_items(self, items: Mapping[str, NewItem]) -> Versions | Refusal | NotStored:
        self._ask("add_items", items)
        if len(self.catalog) + len(items) > 100:
            return NotStored("the store is full", full=True)
        if "away" in items:
            return NotStored("the store is away")
        for item_id, item in items.items():
            if set(item.fields) - {"title", "brand", "category", "price", "description", "stock"}:
                return Refusal("items", f"item {item_id!r} has a column that this catalog lacks")
            self.catalog[item_id] = {"item_id": item_id, **item.fields}
            if item.image is not None:
                self.images[item_id] = item.image
        return Versions("model-1", "index-1")

    async def change_item(self, item_id: str, change: ItemChange) -> Versions | Refusal | NotStored | None:
        self._ask("change_item", item_id, change)
        if item_id not in self.catalog:
            return None
        if set(change.fields) - {"price", "stock"}:
            return Refusal("fields", "no such column")
        self.catalog[item_id] |= change.fields
        return Versions("model-1", "index-1")

    async def versions(self) -> Versions:
        self._ask("versions")
        return Versions("model-1", "index-1")

    def _ask(self, *question: Any) -> None:
        self.asked.append(question)
        if self.trouble is not None:
            raise self.trouble

    def _rank(self, method: str, k: int, filters: Filters, left_out: set[str], *rest: Any) -> Answer | Refusal:
        self._ask(method, k, filters, *rest)
        if set(filters) - {"brand"}:
            return Refusal("filters", "no such filter field")
        ids = [item_id for item_id in self.catalog if item_id not in left_out][:k]
        return Answer([(item_id, 1.0 - 0.1 * n) for n, item_id in enumerate(ids)], COSINE, "model-1", "index-1")


class Client:
    """Synchronous requests straight into an ASGI application."""

    def __init__(self, api: FastAPI) -> None:
        self._transport = httpx.ASGITransport(api, raise_app_exceptions=False)

    def __call__(self, method: str, path: str, **request: Any) -> httpx.Response:
        async def once() -> httpx.Response:
            async with httpx.AsyncClient(transport=self._transport, base_url="http://pixrec") as client:
                return await client.request(method, path, **request)

        return asyncio.run(once())


@pytest.fixture
def backend() -> FakeBackend:
    catalog = {
        "a": {"item_id": "a", "title": "A lamp", "price": 9.5, "weight": math.nan},
        "b/ä 1": {"item_id": "b/ä 1", "title": "A <b>vase</b>", "price": None},
        "c": {"item_id": "c", "title": None},
        "c/image": {"item_id": "c/image", "title": "its name is a trap"},
    }
    return FakeBackend(catalog, images={"a": JPEG, "b/ä 1": b"\x89PNG rest", "c/image": b"RIFF1234WEBP"})


@pytest.fixture
def client_for(backend: FakeBackend) -> Callable[..., Client]:
    """A client of the application under this `serve` config."""

    def make(metrics: Any = None, store: Any = None, **config: Any) -> Client:
        return Client(create_api(backend, ServeConfig(**config), metrics, store))

    return make


@pytest.fixture
def client(client_for: Callable[..., Client]) -> Client:
    return client_for()
