"""What a user costs: the compact tower beside the interleaved one, on the demo's model. Quality is `pixrec evaluate`'s.

Multiplications and additions are counted by torch, memory is that of the weights a request needs, times are one
thread's. The interleaved tower reads 10 items with pictures and text, the compact one up to 200 vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import workload
from benchmarks.timing import Row, seconds_each
from pixrec.artifact import with_compact

NUM_HISTORIES = 32
INTERLEAVED_LENGTH, COMPACT_LENGTHS = 10, (10, 200)


def run() -> list[Row]:
    work = workload.make()
    histories = {length: work.histories(NUM_HISTORIES, length) for length in (INTERLEAVED_LENGTH, *COMPACT_LENGTHS)}
    interleaved = work.model.embedder()
    both = with_compact(workload.make().model, work.catalog.table.item_ids)
    compact = both.embedder()
    vectors = compact.items(work.catalog, np.arange(len(work.catalog)))
    calls: dict[str, Callable[[], Any]] = {
        "interleaved": lambda: interleaved.users(work.catalog, histories[INTERLEAVED_LENGTH], None)
    }
    for length in COMPACT_LENGTHS:
        calls[f"compact {length}"] = lambda length=length: compact.users(work.catalog, histories[length], vectors)
    taken, cost = seconds_each(calls), {name: _flops(call) / NUM_HISTORIES for name, call in calls.items()}
    assert both.tower.compact is not None
    weights = {
        "interleaved": _megabytes(work.model.tower),
        "compact": _megabytes(both.tower.compact.user),
    }
    rows = []
    for length in COMPACT_LENGTHS:
        name = f"compact {length}"
        note = (
            f"{1e3 * taken[name] / NUM_HISTORIES:.2f} ms a user against "
            f"{1e3 * taken['interleaved'] / NUM_HISTORIES:.2f}; {weights['compact']:.2f} MB of weights against "
            f"{weights['interleaved']:.1f}"
        )
        what, other = f"compact tower, {length} items", f"interleaved, {INTERLEAVED_LENGTH} items"
        rates = NUM_HISTORIES / taken[name], NUM_HISTORIES / taken["interleaved"]
        rows.append(Row(what, rates[0], other, rates[1], "users/s", note))
        rows.append(Row(what, 1e6 / cost[name], other, 1e6 / cost["interleaved"], "users/MFLOP"))
    return rows


def _flops(call: Callable[[], Any]) -> int:
    """Floating-point operations of a call; attention by plain matrix products, which the counter knows."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        call()
    return int(counter.get_total_flops())


def _megabytes(module: torch.nn.Module) -> float:
    return sum(p.numel() * p.element_size() for p in module.parameters()) / 1e6
