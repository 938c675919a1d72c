"""What the HTTP routes ask of whoever holds the model: one small seam, so that the routes are tested without Ray.

Knows plain values only: no torch, no Ray, no HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from pixrec.query import Answer, NewItem, Query, Vectors

FilterValues = dict[str, list[tuple[Any, int]]]
"""Most frequent values of each field that a request may filter by, and how many items hold each."""


@dataclass(frozen=True)
class Versions:
    """Which model and which index answer. During a rollout two replicas may differ."""

    model_version: str
    index_version: str


@dataclass(frozen=True)
class ToEmbed:
    """What /v1/embed is to give the vectors of."""

    texts: Sequence[str] = ()
    images: Sequence[bytes] = ()
    item_ids: Sequence[str] = ()
    histories: Sequence[Sequence[str]] = ()


@dataclass(frozen=True)
class ItemChange:
    """What is to change of an item; the rest stays."""

    fields: Mapping[str, Any] = field(default_factory=dict)
    hidden: bool | None = None


@dataclass(frozen=True)
class NotStored:
    """A change of items that was not stored."""

    message: str
    full: bool = False
    """whether the store holds as much as it may; otherwise it did not answer"""


@dataclass(frozen=True)
class Change:
    """What a replica made of a call of an /admin route."""

    outcome: str
    """swapped, unchanged or refused"""
    state: dict[str, Any]
    """its versions, and why another one is refused"""


@dataclass(frozen=True)
class Refusal:
    """A request that is well formed but asks for what this catalog cannot give; `field` is the body's field."""

    field: str
    message: str


@dataclass(frozen=True)
class Incomplete:
    """No answer, since a part of the index gave none and one without it is not wanted."""

    message: str


class ShardsMissing(Exception):
    """Raised where a search needs a shard of the index that gives no answer."""


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

    async def similar(self, item_id: str, query: Query) -> Answer | Refusal | None: ...

    async def search(self, text: str, image: bytes | None, query: Query) -> Answer | Refusal: ...

    async def embed(self, wanted: ToEmbed) -> Vectors | Refusal: ...

    async def filters(self) -> FilterValues: ...

    async def fields(self, item_id: str) -> dict[str, Any] | None: ...

    async def image(self, item_id: str) -> bytes | None: ...

    async def add_items(self, items: Mapping[str, NewItem]) -> Versions | Refusal | NotStored:
        """Embed and store items by their ids, in the place of those that are there; the versions that embedded them."""
        ...

    async def change_item(self, item_id: str, change: ItemChange) -> Versions | Refusal | NotStored | None: ...

    async def versions(self) -> Versions: ...

    async def state(self) -> dict[str, Any]:
        """The versions of a replica, when its index was published, what recall it has, what is refused and why."""
        ...

    async def reload(self) -> list[Change]:
        """Every replica looks for another version now."""
        ...

    async def pin(self, version: str | None) -> list[Change] | None:
        """Every replica serves `version`, or with None what is current; None: there is no such version."""
        ...

    async def rollback(self) -> list[Change] | None:
        """Every replica serves the version that was published before; None: there is none."""
        ...

    async def metrics(self) -> str:
        """What all replicas count and measure, as Prometheus reads it."""
        ...
