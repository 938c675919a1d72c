"""`python -m benchmarks [name ...]`: runs all benchmarks, or those named, and prints one table. Writes nothing.
`python -m benchmarks gpu` (see `benchmarks.gpu`) measures the shapes of real backbones on a GPU."""

from __future__ import annotations

import os
import sys
import time
from importlib import import_module

import torch

from benchmarks.timing import Row

NAMES = ("decode", "fetch", "retrieval", "batching", "positions", "towers", "evaluation")


def main(wanted: list[str]) -> int:
    if wanted[:1] == ["gpu"]:
        from benchmarks.gpu import main as measure_gpu

        return measure_gpu(wanted[1:])
    unknown = [name for name in wanted if name not in NAMES]
    if unknown:
        print(f"no benchmark {unknown[0]!r}; there are {', '.join(NAMES)}", file=sys.stderr)
        return 2
    torch.set_num_threads(1)  # so that a ratio is that of the work, not of the scheduler on a shared machine
    started = time.monotonic()
    rows: list[Row] = []
    for name in wanted or NAMES:
        print(f"{name} ...", file=sys.stderr, flush=True)
        rows += import_module(f"benchmarks.speed.{name}").run()
    print(table(rows))
    print(f"\none thread of {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {time.monotonic() - started:.0f} s")
    return 0


def table(rows: list[Row]) -> str:
    cells = [("what", "ours", "alternative", "theirs", "unit", "ratio", "")]
    for row in rows:
        cells.append((row.what, f"{row.ours:.4g}", row.alternative, f"{row.theirs:.4g}", row.unit,
                      f"{row.ratio:.2f}x", row.note))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
