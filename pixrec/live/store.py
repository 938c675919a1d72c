"""Where a server keeps what happens between two versions of an index: one interface, and the values that pass it.

`pixrec.live.sqlite` is the store of one node, `pixrec.live.redis` that of many. Whatever a method has returned for is
stored. Knows values; knows no model.

Shapes: D width of the shared space · C width of what a search compares.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

MODELS_KEPT = 2
"""Of each item the vectors of so many models are kept: that in use, and the one that takes its place."""
FEEDBACK_KEPT = 1_000_000
"""Of so many seen items it is known that they were counted, in a SQLite store; in Redis, for the time below."""
FEEDBACK_SECONDS = 7 * 86_400


class StoreAway(Exception):
    """The store did not answer; nothing of what was asked is done, or it may be asked again without harm."""


class StoreFull(Exception):
    """The store holds as many items as it may."""


@dataclass(frozen=True)
class Event:
    """Somebody met an item."""

    user_id: str
    item_id: str
    timestamp: int
    """milliseconds since the epoch"""
    event: str | None = None
    """view, cart, purchase, or any word"""


@dataclass(frozen=True)
class Feedback:
    """What became of an answer."""

    request_id: str
    model_version: str
    impressions: Sequence[str]
    """items of the answer that were seen"""
    clicks: Sequence[str]
    """those that were clicked, which counts as seen"""


class EmbeddedVectors(NamedTuple):
    """What an item tower made of an item."""

    vector: np.ndarray
    """(D,) float32"""
    content: np.ndarray | None
    """(C,) float16 that a search compares, where that is not the vector"""


@dataclass(frozen=True)
class AddedItem:
    """An item as it is sent: with all of its columns, and what its vectors are made of."""

    item_id: str
    fields: Mapping[str, Any]
    text: str
    image: bytes | None
    content_hash: str
    """of text and picture, as an index has it"""


@dataclass(frozen=True)
class LiveItem:
    """What the store says of an item, without its picture."""

    item_id: str
    fields: Mapping[str, Any]
    """all columns of an added item; of an item of the index those that were changed"""
    content_hash: str | None
    """None: not an added item, but one of the index that was changed or hidden"""
    hidden: bool
    change: int
    """number of its last change; they grow"""
    vectors: EmbeddedVectors | None = None
    """by the model asked for; None: not made yet"""


class Store(Protocol):
    """All methods may raise StoreAway, may be called by several threads, and by several processes at a time."""

    def add(self, events: Sequence[Event]) -> None:
        """Store all of the events or none; equal timestamps keep their order, and one that is there already stays
        one, so that events may be sent again."""
        ...

    def history(self, user_id: str, most: int) -> list[tuple[str, int]]:
        """(item_id, timestamp) of the last `most` events of a user, oldest first."""
        ...

    def forget(self, user_id: str) -> int:
        """Delete all events of a user; returns how many there were."""
        ...

    def events(self) -> Iterator[list[Event]]:
        """All events, user by user, each oldest first, some at a time."""
        ...

    def popular(self, most: int) -> list[tuple[str, float]]:
        """The `most` items that sell best lately, best first, each with the events of now that its events are worth:
        one that is a half-life of the store old counts half. Events that were deleted since are counted on."""
        ...

    def add_feedback(self, feedback: Sequence[Feedback]) -> None:
        """Count impressions and clicks; of one answer an item counts once, however often it is told."""
        ...

    def click_through(self) -> dict[str, tuple[int, int]]:
        """Impressions and clicks by model version."""
        ...

    def put(self, model: str, items: Sequence[AddedItem], vectors: Sequence[EmbeddedVectors], most: int) -> None:
        """Add the items with their vectors by this model, or put them in the place of what was there; all or none.

        Raises StoreFull when there would be more than `most` items.
        """
        ...

    def change(self, item_id: str, fields: Mapping[str, Any], hidden: bool | None = None) -> None:
        """Change columns of an item, and whether it is hidden; what is not named stays."""
        ...

    def last_change(self) -> int:
        """The number of the last change of any item; 0 before the first."""
        ...

    def changes(self, after: int, model: str, most: int) -> list[LiveItem]:
        """The first `most` items whose last change came after that number, in the order of their changes."""
        ...

    def contents(self, item_ids: Sequence[str]) -> list[AddedItem]:
        """The added ones among these items, with their pictures."""
        ...

    def set_vectors(self, model: str, made: Mapping[tuple[str, str], EmbeddedVectors]) -> None:
        """Add vectors by another model, by item id and content hash; those of content that has changed are dropped.

        A change of each item.
        """
        ...

    def close(self) -> None: ...
