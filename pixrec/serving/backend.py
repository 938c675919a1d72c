"""What the HTTP routes ask of whoever holds the model: one small seam, so that the routes are tested without Ray.

Knows plain values only: no torch, no Ray, no HTTP.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

Filters = dict[str, list[Any]]


@dataclass(frozen=True)
class Versions:
    """Which model and which index an answer came from. During a rollout two replicas may differ."""

    model_version: str
    index_version: str


@dataclass(frozen=True)
class NewItem:
    """An item of a history that the catalog lacks: what it says, and its picture."""

    fields: dict[str, Any]
    image: bytes | None = None


@dataclass(frozen=True)
class RecommendRequest:
    """A history and what is asked about it; the fields are those of the HTTP body."""

    history: list[str]
    k: int
    exclude: list[str] = field(default_factory=list)
    exclude_history: bool = True
    filters: Filters = field(default_factory=dict)
    new_items: dict[str, NewItem] = field(default_factory=dict)
    timestamps: list[int] | None = None


@dataclass(frozen=True)
class Ranking:
    """Ranked (item_id, score), best first, and where they came from."""

    items: list[tuple[str, float]]
    versions: Versions
    unknown_items: list[str] = field(default_factory=list)
    fallback: bool = False


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

    async def recommend(self, request: RecommendRequest) -> Ranking | Refusal: ...

    async def similar(self, item_id: str, k: int, filters: Filters) -> Ranking | Refusal | None: ...

    async def search(self, text: str, image: bytes | None, k: int, filters: Filters) -> Ranking | Refusal: ...

    async def fields(self, item_id: str) -> dict[str, Any] | None: ...

    async def image(self, item_id: str) -> bytes | None: ...

    async def versions(self) -> Versions: ...
