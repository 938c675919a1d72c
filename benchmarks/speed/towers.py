"""What a user costs: the compact tower beside the interleaved one, on the demo's model. Quality is `pixrec evaluate`'s.

    python -m benchmarks.speed.towers smolvlm-256m     # the interleaved one of that shape, random weights: six minutes

Multiplications and additions are counted by torch, memory is that of the weights a request needs, times are one
thread's. The interleaved tower reads 10 items with pictures and text, the compact one up to 200 vectors.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.__main__ import table
from benchmarks.speed import training
from benchmarks.timing import Row, seconds_each
from pixrec.artifact import with_compact

HISTORIES = {"pixrec-tiny": 32, "smolvlm-256m": 1}
ROUNDS = {"pixrec-tiny": 7, "smolvlm-256m": 1}
INTERLEAVED_LENGTH, COMPACT_LENGTHS = 10, (10, 200)


def run(shape: str = "pixrec-tiny") -> list[Row]:
    """Users a second and users per operation, for each length of the compact tower's history."""
    count = HISTORIES[shape]
    work = training.make("cpu", shape, [])
    histories = {length: work.histories(count, length) for length in (INTERLEAVED_LENGTH, *COMPACT_LENGTHS)}
    interleaved = work.model.embedder()
    tiny = training.make("cpu", "pixrec-tiny", [])  # whose vectors are as wide, and take less time to compute
    both = with_compact(tiny.model, tiny.catalog.table.item_ids)
    compact = both.embedder()
    vectors = compact.items(tiny.catalog, np.arange(len(tiny.catalog)))
    calls: dict[str, Callable[[], Any]] = {
        "interleaved": lambda: interleaved.users(work.catalog, histories[INTERLEAVED_LENGTH], None)
    }
    for length in COMPACT_LENGTHS:
        calls[f"compact {length}"] = lambda length=length: compact.users(tiny.catalog, histories[length], vectors)
    cost = {name: _flops(call) / count for name, call in calls.items()}
    taken = seconds_each(calls, ROUNDS[shape])
    assert both.tower.compact is not None
    weights = {"interleaved": _megabytes(work.model.tower), "compact": _megabytes(both.tower.compact.user)}
    rows = []
    for length in COMPACT_LENGTHS:
        name = f"compact {length}"
        note = (
            f"{1e3 * taken[name] / count:.2f} ms a user against {1e3 * taken['interleaved'] / count:.2f}; "
            f"{weights['compact']:.2f} MB of weights against {weights['interleaved']:.1f}"
        )
        what, other = f"compact tower, {length} items", f"interleaved, {shape}, {INTERLEAVED_LENGTH} items"
        rows.append(Row(what, count / taken[name], other, count / taken["interleaved"], "users/s", note))
        rows.append(Row(what, 1e6 / cost[name], other, 1e6 / cost["interleaved"], "users/MFLOP"))
    return rows


def _flops(call: Callable[[], Any]) -> int:
    """Floating-point operations of a call; attention by plain matrix products, which the counter knows."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        call()
    return int(counter.get_total_flops())


def _megabytes(module: torch.nn.Module) -> float:
    return sum(p.numel() * p.element_size() for p in module.parameters()) / 1e6


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(table(run(*sys.argv[1:])))
