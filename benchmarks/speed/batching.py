"""One forward pass of the user tower for many histories, as the server makes it, beside one pass for each."""

from __future__ import annotations

import numpy as np

from benchmarks import workload
from benchmarks.timing import Row, seconds_each

NUM_HISTORIES, LENGTH = 32, 8


def run() -> list[Row]:
    work = workload.make()
    embedder = work.model.embedder()
    histories = work.histories(NUM_HISTORIES, LENGTH)

    def together() -> np.ndarray:
        return embedder.users(work.catalog, histories, None)

    def one_by_one() -> np.ndarray:
        return np.concatenate([embedder.users(work.catalog, [history], None) for history in histories])

    apart = float(np.abs(together() - one_by_one()).max())
    taken = seconds_each({"together": together, "one by one": one_by_one})
    return [
        Row(
            what=f"{NUM_HISTORIES} histories of {LENGTH} items in one pass",
            ours=NUM_HISTORIES / taken["together"],
            alternative="one pass a history",
            theirs=NUM_HISTORIES / taken["one by one"],
            unit="histories/s",
            note=f"vectors differ by at most {apart:.0e}",
        )
    ]
