"""How a benchmark is timed and what it reports. Knows no benchmark."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """One comparison: how fast ours is, how fast the named alternative, both in `unit` (higher is better)."""

    what: str
    ours: float
    alternative: str
    theirs: float
    unit: str
    note: str = ""

    @property
    def ratio(self) -> float:
        return self.ours / self.theirs


def seconds_each(
    calls: Mapping[str, Callable[[], Any]], rounds: int = 7, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Median seconds of each call, after one that is not counted.

    The calls take turns, so that a machine that is busy for a while slows all of them. `time.process_time` as the
    `clock` leaves out what others had of the processor, for work on one thread.
    """
    for call in calls.values():
        call()
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            started = clock()
            call()
            taken[name].append(clock() - started)
    return {name: statistics.median(values) for name, values in taken.items()}
