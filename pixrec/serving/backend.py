"""What the HTTP routes ask of whoever holds the model: one small seam, so that the routes are tested without Ray.

Knows plain values only: no torch, no Ray, no HTTP.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from pixrec.query import Answer, Filters, Query

FilterValues = dict[str, list[tuple[Any, int]]]
"""Most frequent values of each field that a request may filter by, and how many items hold each."""


@dataclass(frozen=True)
class Versions:
    """Which model and which index answer. During a rollout two replicas may differ."""

    model_version: str
    index_version: str


@dataclass(frozen=True)
class Refusal:
    """A request that is well formed but asks for what this catalog cannot give; `field` is the body's field."""

    field: str
    message: str


class BackendError(Exception):
    """The backend gave no answer.

    BackendError
    ├── Overloaded      too many requests wait already; the same request may succeed in a moment
    └── Unavailable     the model is starting, gone, or did not answer in time
    """


class Overloaded(BackendError):
    pass


class Unavailable(BackendError):
    pass


class Backend(Protocol):
    """None stands for an item that is unknown, or has no picture. Every method may raise a BackendError."""

    async def recommend(self, query: Query) -> Answer | Refusal: ...

    async def similar(self, item_id: str, k: int, filters: Filters) -> Answer | Refusal | None: ...

    async def search(self, text: str, image: bytes | None, k: int, filters: Filters) -> Answer | Refusal: ...

    async def filters(self) -> FilterValues: ...

    async def fields(self, item_id: str) -> dict[str, Any] | None: ...

    async def image(self, item_id: str) -> bytes | None: ...

    async def versions(self) -> Versions: ...
