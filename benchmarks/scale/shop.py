"""A shop of any size on disk: pictures that differ in every byte, events with a long tail.

    python -m benchmarks.scale.shop FOLDER [--items 1000000] [--events 50000000] [--processes 2]

Writes `items/` (with the bytes of the pictures, some 12 KB each) and `interactions/`, in parts. A tenth of the items
have no picture. Users have 10 to 90 events, in no order of time between each other. What a user takes depends on what
was taken before: half of the events are one of the 8 items that follow the last one in a ring, the other half is drawn
by popularity (Zipf, exponent 1), so that there is something to learn.
"""

from __future__ import annotations

import argparse
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg

ITEMS_PER_PART, EVENTS_PER_PART = 20_000, 2_000_000
PICTURE_PX, LEAST_PICTURE_BYTES = 96, 10_000
EVENTS_PER_USER = 50
START_MS, SPREAD_MS = 1_700_000_000_000, 365 * 86_400_000
BRANDS, CATEGORIES = 500, 40
WORDS = ("linen", "oak", "brass", "canvas", "glass", "wool", "clay", "steel", "paper", "cork", "silk", "stone")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale.shop", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--events", type=int, default=50_000_000)
    parser.add_argument("--processes", type=int, default=2)
    a = parser.parse_args(argv)
    draw(a.folder, a.items, a.events, a.processes)
    return 0


def draw(folder: Path, items: int, events: int, processes: int = 2) -> None:
    """Write the shop; a part is a function of its number and of the sizes."""
    for name in ("items", "interactions"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with ProcessPoolExecutor(processes) as pool:
        jobs = [pool.submit(_items, folder, part, items) for part in range(-(-items // ITEMS_PER_PART))]
        jobs += [pool.submit(_events, folder, part, items, events) for part in range(-(-events // EVENTS_PER_PART))]
        for done, job in enumerate(as_completed(jobs), 1):
            job.result()
            print(f"\r{done}/{len(jobs)} parts, {time.monotonic() - began:.0f} s  ", end="", file=sys.stderr)
    print(file=sys.stderr)


def _items(folder: Path, part: int, items: int) -> None:
    rows = range(part * ITEMS_PER_PART, min(items, (part + 1) * ITEMS_PER_PART))
    rng = np.random.default_rng([1, part])
    first, second = rng.integers(0, len(WORDS), (2, len(rows)))
    table = pa.table(
        {
            "item_id": [f"B{row:09d}" for row in rows],
            "title": [f"{WORDS[a]} {WORDS[b]} No. {row}" for a, b, row in zip(first, second, rows, strict=True)],
            "brand": [f"Brand {b}" for b in rng.integers(0, BRANDS, len(rows))],
            "category": [f"Category {c}" for c in rng.integers(0, CATEGORIES, len(rows))],
            "price": np.round(rng.lognormal(3, 1, len(rows)), 2),
            "image": pa.array([None if row % 10 == 9 else picture(row) for row in rows], pa.binary()),
        }
    )
    pq.write_table(table, folder / "items" / f"part-{part:05d}.parquet", row_group_size=2_000, compression="none")


def picture(row: int) -> bytes:
    """A JPEG of noise over a colour: at least 10 KB, no two alike."""
    rng = np.random.default_rng([2, row])
    pixels = rng.integers(0, 256, (PICTURE_PX, PICTURE_PX, 3), dtype=np.uint8) // 2 + rng.integers(0, 128, 3, np.uint8)
    data = simplejpeg.encode_jpeg(pixels, quality=86, colorsubsampling="444")
    assert len(data) >= LEAST_PICTURE_BYTES, len(data)
    return data


def _events(folder: Path, part: int, items: int, events: int) -> None:
    """Whole users, each with the events of a walk; in the file they lie mixed, as a log has them."""
    rng = np.random.default_rng([3, part])
    count = min(events, (part + 1) * EVENTS_PER_PART) - part * EVENTS_PER_PART
    lengths = rng.integers(10, 2 * EVENTS_PER_USER - 9, -(-count // 10))
    lengths = lengths[: np.searchsorted(np.cumsum(lengths), count) + 1]
    user = np.repeat(np.arange(len(lengths)), lengths)[:count]
    place = np.arange(count) - np.searchsorted(user, user)
    popular = np.minimum((items ** rng.random(count)).astype(np.int64), items) - 1  # Zipf, exponent 1
    follows = (place > 0) & (rng.random(count) < 0.5)
    row = popular.copy()
    for step in np.unique(place)[1:]:  # a walk: what follows depends on what was drawn before
        at = np.flatnonzero((place == step) & follows)
        row[at] = (row[at - 1] + 1 + rng.integers(0, 8, len(at))) % items
    begins = START_MS + rng.integers(0, SPREAD_MS, len(lengths))
    when = begins[user] + place * 60_000 + rng.integers(0, 60_000, count)
    order = rng.permutation(count)
    number = part * (EVENTS_PER_PART // 10) + user
    table = pa.table(
        {
            "user_id": _names("u", number[order]),
            "item_id": _names("B", row[order]),
            "timestamp": when[order],
        }
    )
    pq.write_table(table, folder / "interactions" / f"part-{part:05d}.parquet", row_group_size=250_000)


def _names(letter: str, numbers: np.ndarray) -> pa.Array:
    """The ids behind numbers, each distinct one written once."""
    distinct, place = np.unique(numbers, return_inverse=True)
    return pa.array([f"{letter}{number:09d}" for number in distinct], pa.string()).take(pa.array(place))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
