"""Preparing a large table of events beside Polars (streaming) and DuckDB, which do the same filtering and ordering.

    python -m benchmarks.speed.prepare [events] [who ...]        (5000000, all of pixrec polars duckdb)

Each gets a table of items and a log of events in the order of their time,
leaves out events on unknown items, users and items with fewer than 5 events until none has fewer, brings each user's
events in order of time (equal times in input order) and writes one row a user: ids and timestamps as lists. Of the
result of each a digest is printed: they must agree. PixRec writes its arrays, its id index and its items as well.

Time is that of the whole process; beside it stands the CPU time of the process and all that it started, which says
more on a machine that has other work too. Memory is the largest sum, over the process and all that it started, of the
proportional set size: what is private, and its share of what is mapped by several.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.processes import below, cpu_seconds, proportional_memory_mib

EVENTS, MIN_EVENTS = 5_000_000, 5
_BLOCK = 1_000_000

PIXREC = """
import sys
from pixrec.cluster.prepare import prepare
from pixrec.config import PrepareConfig
items, events, out = sys.argv[1:]
prepare(items, events, out + "/data", PrepareConfig(min_user_events=5, min_item_events=5), lambda *step: None)
"""

POLARS = """
import sys
import polars as pl
items, events, out = sys.argv[1:]
known = pl.scan_parquet(items).select("item_id")
frame = pl.scan_parquet(events, row_index_name="n").join(known, on="item_id", how="semi")
frame.sink_parquet(f"{out}/0.parquet", engine="streaming")
size, step = pl.scan_parquet(f"{out}/0.parquet").select(pl.len()).collect().item(), 0
while True:
    frame = pl.scan_parquet(f"{out}/{step}.parquet")
    for column in ("user_id", "item_id"):
        often = frame.group_by(column).len().filter(pl.col("len") >= 5).select(column)
        frame = frame.join(often, on=column, how="semi")
    step += 1
    frame.sink_parquet(f"{out}/{step}.parquet", engine="streaming")
    left = pl.scan_parquet(f"{out}/{step}.parquet").select(pl.len()).collect(engine="streaming").item()
    if left == size:
        break
    size = left
ordered = pl.scan_parquet(f"{out}/{step}.parquet").sort("user_id", "timestamp", "n")
columns = pl.col("item_id").alias("item_ids"), pl.col("timestamp").alias("timestamps")
lists = ordered.group_by("user_id", maintain_order=True).agg(*columns)
lists.sink_parquet(f"{out}/sequences.parquet", engine="streaming")
"""

DUCKDB = """
import sys
import duckdb
items, events, out = sys.argv[1:]
base = duckdb.connect(f"{out}/base.duckdb")
base.execute("SET enable_progress_bar = false")
numbered = f"SELECT user_id, item_id, timestamp, row_number() OVER () AS n FROM '{events}'"
base.execute(f"CREATE TABLE e0 AS SELECT * FROM ({numbered}) SEMI JOIN '{items}' USING (item_id)")
size, step = base.execute("SELECT count(*) FROM e0").fetchone()[0], 0
while True:
    often = [f"(SELECT {c} FROM e{step} GROUP BY {c} HAVING count(*) >= 5)" for c in ("user_id", "item_id")]
    joins = f"SEMI JOIN {often[0]} USING (user_id) SEMI JOIN {often[1]} USING (item_id)"
    base.execute(f"CREATE TABLE e{step + 1} AS SELECT * FROM e{step} {joins}")
    base.execute(f"DROP TABLE e{step}")
    step += 1
    left = base.execute(f"SELECT count(*) FROM e{step}").fetchone()[0]
    if left == size:
        break
    size = left
lists = "list(item_id ORDER BY timestamp, n) AS item_ids, list(timestamp ORDER BY timestamp, n) AS timestamps"
grouped = f"SELECT user_id, {lists} FROM e{step} GROUP BY user_id"
base.execute(f"COPY ({grouped}) TO '{out}/sequences.parquet' (COMPRESSION zstd)")
"""

SCRIPTS = {"pixrec": PIXREC, "polars": POLARS, "duckdb": DUCKDB}


def main(events: int, who: list[str]) -> int:
    digests = set()
    with tempfile.TemporaryDirectory(prefix="pixrec-prepare-") as folder:
        place = Path(folder)
        write_tables(place, events)
        print(f"{events:,} events, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}", flush=True)
        for name in who:
            out = place / name
            out.mkdir()
            tables = [str(place / "items.parquet"), str(place / "events.parquet")]
            seconds, cpu, peak = measure(SCRIPTS[name], [*tables, str(out)])
            digests.add(digest(out / "data" / "sequences" if name == "pixrec" else out / "sequences.parquet"))
            print(
                f"{name:8} {seconds:7.1f} s {events / seconds:12,.0f} events/s {cpu:7.1f} CPU s {peak:8,.0f} MiB",
                flush=True,
            )
            shutil.rmtree(out)
    print(f"the same sequences: {len(digests) == 1}")
    return 0 if len(digests) == 1 else 1


def write_tables(place: Path, events: int, *, seed: int = 0) -> None:
    """A log of `events` in the order of time, of a twentieth as many users and a fiftieth as many items, of which a
    hundredth is in no items table; popularity and activity fall off like a power."""
    users, items = max(events // 20, 10), max(events // 50, 10)
    rng = np.random.default_rng(seed)
    names = [f"item-{number:08d}" for number in range(items)]
    known = names[: items * 99 // 100]
    pq.write_table(pa.table({"item_id": known, "title": known}), place / "items.parquet")
    item_ids = pa.array(names)
    user_ids = pa.array([f"user-{number:09d}" for number in rng.permutation(users)])
    schema = pa.schema([("user_id", pa.string()), ("item_id", pa.string()), ("timestamp", pa.int64())])
    now = 1_600_000_000_000
    with pq.ParquetWriter(place / "events.parquet", schema, compression="zstd") as writer:
        for start in range(0, events, _BLOCK):
            size = min(_BLOCK, events - start)
            moments = now + np.cumsum(rng.integers(0, 2_000, size))
            now = int(moments[-1])
            user = (rng.random(size) ** 2 * users).astype(np.int64)
            item = (rng.random(size) ** 3 * items).astype(np.int64)
            columns = [user_ids.take(pa.array(user)), item_ids.take(pa.array(item)), pa.array(moments)]
            writer.write_table(pa.table(columns, schema=schema))


def measure(script: str, arguments: list[str]) -> tuple[float, float, float]:
    """Seconds, CPU seconds, and MiB at the peak, of a Python script."""
    started, peak = time.monotonic(), 0.0
    used: dict[int, float] = {}
    with subprocess.Popen([sys.executable, "-c", script, *arguments]) as run:
        while run.poll() is None:
            processes = [run.pid, *below(run.pid)]
            peak = max(peak, sum(map(proportional_memory_mib, processes)))
            used.update({process: max(used.get(process, 0.0), cpu_seconds(process)) for process in processes})
            time.sleep(0.2)
        if run.returncode:
            raise SystemExit(f"the script ended with {run.returncode}")
    return time.monotonic() - started, sum(used.values()), peak


def digest(place: Path) -> str:
    """Of all users' ids, items and times, whatever the order of the users."""
    files = sorted(place.glob("*.parquet")) if place.is_dir() else [place]
    total, users = 0, 0
    for file in files:
        for batch in pq.ParquetFile(file).iter_batches(batch_size=20_000):
            columns = (batch.column(name).to_pylist() for name in ("user_id", "item_ids", "timestamps"))
            for row in zip(*columns, strict=True):
                total ^= int.from_bytes(hashlib.blake2b(repr(row).encode(), digest_size=16).digest())
                users += 1
    return f"{users}-{total:032x}"


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else EVENTS
    sys.exit(main(count, sys.argv[2:] or list(SCRIPTS)))
