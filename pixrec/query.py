"""What is asked of a recommender and what it answers: one definition for the library, the server and HTTP.

Plain values. Knows no vector, no model and no HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pixrec.errors import InputError

Filters = Mapping[str, Sequence[Any] | Mapping[str, float]]
"""Values by field: an item passes when it holds, in every field named, one of the values given for it, or a number
within the range given, `{"min": x, "max": y}`."""

ScoreKind = Literal["cosine", "purchase_share", "probability"]
"""What a score is: the cosine of two vectors, the item's share of all training events, or its chance to be next where
the ranking is a blend; each is at most 1."""
COSINE: ScoreKind = "cosine"
PURCHASE_SHARE: ScoreKind = "purchase_share"
PROBABILITY: ScoreKind = "probability"

MAX_TIMESTAMP = 4 * 10**14
"""Milliseconds since the epoch: further away lies nobody's purchase, and differences stay far from overflowing."""


@dataclass(frozen=True)
class NewItem:
    """An item that came after the data set."""

    fields: Mapping[str, Any]
    """title, brand, category, price, description; what is unknown is left out"""
    image: bytes | None = None
    """its picture, the bytes of an image file"""


@dataclass(frozen=True)
class Query:
    """A shopper's history and what is wanted for it."""

    history: Sequence[str] = ()
    """item ids, oldest first; unknown ones are passed over"""
    k: int = 10
    """how many items to return at most"""
    exclude: Sequence[str] = ()
    """items never to return"""
    exclude_history: bool = True
    """whether items of the history are left out too"""
    filters: Filters = field(default_factory=dict)
    new_items: Mapping[str, NewItem] = field(default_factory=dict)
    """items of the history that the data set lacks, by id"""
    timestamps: Sequence[int] | None = None
    """when each event of the history was, milliseconds since the epoch, never falling; None: unknown"""
    diversity: float = 0.0
    """from 0, the best scores, to 1, items as unlike each other as can be (maximal marginal relevance)"""
    max_per: Mapping[str, int] = field(default_factory=dict)
    """how many answers may share a value of a field, such as {"brand": 2}; those without a value are not counted"""
    reasons: bool = False
    """whether each answer comes with the item of the history that is nearest to it"""
    user_id: str | None = None
    """over HTTP: whose stored events are the history, in place of one"""

    def check(self) -> None:
        """Raise InputError unless `k` is at least 1 and the timestamps fit the history."""
        problem = self.problem()
        if problem is not None:
            raise InputError(problem[1])

    def problem(self) -> tuple[str, str] | None:
        """The field at fault and what is wrong with it; None when all is well."""
        if self.k < 1:
            return "k", f"k is {self.k}: must be at least 1"
        if not 0 <= self.diversity <= 1:
            return "diversity", f"diversity is {self.diversity}: must be between 0 and 1"
        if any(most < 1 for most in self.max_per.values()):
            return "max_per", "max_per holds a number below 1: leave the field out instead"
        message = _misfit(self.timestamps, len(self.history)) if self.timestamps is not None else None
        return None if message is None else ("timestamps", message)


@dataclass(frozen=True)
class Answer:
    """Ranked items and where they came from."""

    items: list[tuple[str, float]]
    """(item_id, score), best first; fewer than k when fewer qualify"""
    score_kind: ScoreKind
    model_version: str
    index_version: str
    unknown_items: list[str] = field(default_factory=list)
    """items of the history that nobody knows"""
    fallback: bool = False
    """True when nothing of the history was known and the most bought items were given instead"""
    reasons: Mapping[str, str] | None = None
    """by item, the item of the history that is nearest to it; None where nobody asked"""
    missing_shards: Sequence[int] | None = None
    """numbers of the parts of a sharded index that gave no answer, whose items are lacking; None where all did"""
    store_away: bool = False
    """True when the store of live items and events did not answer: what it would have added or hidden may be missing"""

    def to_dict(self) -> dict[str, Any]:
        """The answer of `pixrec recommend` and of the HTTP routes; without what is None, and with `store_away` only
        where the store is."""
        items = [{"item_id": item_id, "score": score} for item_id, score in self.items]
        told = {name: value for name, value in vars(self).items() if value is not None}
        if not self.store_away:
            del told["store_away"]
        return {**told, "items": items}


def _misfit(timestamps: Sequence[int], length: int) -> str | None:
    """What keeps the timestamps from belonging to a history of this length, oldest first."""
    if len(timestamps) != length:
        return f"timestamps holds {len(timestamps)} values for {length} items of history: one each"
    for place in range(1, length):
        if timestamps[place] < timestamps[place - 1]:
            return (
                f"timestamps[{place}] {timestamps[place]} is before the one ahead of it: give the history oldest first"
            )
    if length and not -MAX_TIMESTAMP <= timestamps[0] <= timestamps[-1] <= MAX_TIMESTAMP:
        return "timestamps are milliseconds since the epoch: some lie more than 10,000 years from now"
    return None


@dataclass(frozen=True)
class Vectors:
    """Vectors in the shared space, each a list of D numbers, in the order they were asked for; None: nothing known."""

    texts: list[list[float]]
    images: list[list[float]]
    item_ids: list[list[float] | None]
    histories: list[list[float] | None]
    model_version: str
    index_version: str
