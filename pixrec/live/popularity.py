"""What sells best lately, by the events of a store: how a store counts it, and what a replica knows of it.

An event weighs 2^(its time / half-life). That grows with its time and stays as it is afterwards, so that an event costs
one addition and a ranking none (forward decay: Cormode et al., ICDE 2009). What is kept of each item is the base-2
logarithm of the sum of its weights, a score, for which no time is too late.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pixrec.live.store import StoreAway

if TYPE_CHECKING:
    from pixrec.live.overlay import Overlay

HALF_LIFE_DAYS = 7.0
HALF_LIVES_KEPT = 40
"""What is older counts nothing, less than a millionth of a millionth of a new event, and is deleted."""
ITEMS_READ = 1000
"""The items that a replica knows the sales of; all others are ranked by the index."""
READ_SECONDS = 10.0
"""A replica reads them again when they are older and somebody needs them."""
PRIOR_EVENTS = 100.0
"""The popularity of the index counts as so many events of now beside those of the store, so that the first ones that a
store ever gets do not decide alone, and that the index does where there are none."""
_DAY_MS = 86_400_000.0

logger = logging.getLogger("ray.serve.pixrec")


class Decay(NamedTuple):
    """An event that is `half_life_days` old counts half."""

    half_life_days: float = HALF_LIFE_DAYS

    def now(self) -> float:
        """The score of one event at this moment; no event weighs more, whatever time it is said to have."""
        return time.time() * 1000 / self.half_life_ms

    @property
    def half_life_ms(self) -> float:
        return self.half_life_days * _DAY_MS

    def score(self, timestamp: int, now: float) -> float:
        """That of one event. timestamp: in milliseconds"""
        return min(timestamp / self.half_life_ms, now)

    def counts(self, scores: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
        """Events of now that items are worth by their scores."""
        now = self.now()
        return [(item_id, 2.0 ** min(score - now, 1000.0)) for item_id, score in scores]


def joined(one: float, other: float) -> float:
    """The score of what two scores stand for together: log2(2^one + 2^other)."""
    return max(one, other) + math.log2(1 + 2.0 ** -abs(one - other))


class Sold(NamedTuple):
    """Decayed counts of the items that sell best."""

    rows: np.ndarray
    """int64 (R,): those of the catalog, by row"""
    counts: np.ndarray
    """float64 (R,)"""
    others: Mapping[str, float]
    """those of all other items, by id"""


class LivePopularity:
    """What a replica knows of the sales in the store that its overlay follows."""

    def __init__(self, live: Overlay, row_of: Mapping[str, int]) -> None:
        self._live, self._row_of = live, row_of
        self._read_at = -math.inf
        self._sold = Sold(np.zeros(0, np.int64), np.zeros(0), {})

    def sold(self) -> Sold:
        """At most `READ_SECONDS` old; while the store does not answer, what was read last."""
        store = self._live.store
        if store is not None and time.monotonic() - self._read_at >= READ_SECONDS:
            self._read_at = time.monotonic()
            try:
                self._sold = self._placed(store.popular(ITEMS_READ))
            except StoreAway as error:
                logger.warning("%s", error)
        return self._sold

    def _placed(self, found: Sequence[tuple[str, float]]) -> Sold:
        rows = {row: count for item_id, count in found if (row := self._row_of.get(item_id)) is not None}
        others = {item_id: count for item_id, count in found if self._row_of.get(item_id) is None}
        return Sold(np.array([*rows], np.int64), np.array([*rows.values()], np.float64), others)
