"""Days of a shop replayed through the loop: serve, store what shoppers do, learn from it over night, serve again.

    python -m benchmarks.quality.replay TABLES --out FOLDER [--days 7] [--events 1000] [--set KEY=VALUE ...]

TABLES is a folder with interactions.parquet (with real times, such as MovieLens-100K). All events before the last
`--days` days are learned from first, and stored. Then, day by day, each event is preceded by a `recommend` by `user_id`
(of a long day, of `--events` events drawn at random), which finds the item among its 10 or does not, and followed by a
`POST /v1/events`. Three shops answer the same requests over the same store:

    once    the model of the beginning, all the time
    loop    every night `pixrec pipeline` with pipeline.store, and pipeline.start=served for `--epochs-on` passes
    anew    every night the same with fresh weights, for `--epochs` passes

Prints, for each day, the events asked for, recall@10 of each shop, and the seconds of each night; then all days
together with 95 % intervals over events. The model is a compact tower 64 wide that learns a vector for each item
(`--set` changes it). HTTP is answered in this process, training and embedding by Ray.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.quality.served import Served, served
from pixrec.artifact import index_manifest
from pixrec.cluster.session import connect
from pixrec.config import Config, ServeConfig, load_config
from pixrec.evaluation.significance import bootstrap_ci
from pixrec.live.places import open_store
from pixrec.live.store import Event
from pixrec.pipeline import pipeline
from pixrec.serving.published import Published

SHOPS = ("once", "loop", "anew")
SETTINGS = f"""
model: {{backbone: none, user_tower: compact, modalities: text, embedding_width: 64, compact: {{layers: 1}}}}
train:
  num_workers: 0
  threads_per_worker: 2
  compact: {{warmup_steps: 20, averaging: 0.98, validate_every_epochs: 2, patience: 4}}
evaluate: {{scorers: [popularity], bootstrap_samples: 50}}
pipeline: {{publish: always, store_every_hours: {1 / 3600}}}
"""
K, DAY_MS = 10, 86_400_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", type=Path)
    parser.add_argument("--out", type=Path, help="an empty folder; by default one that is removed")
    parser.add_argument("--days", type=int, default=7)
    parser.add_argument("--events", type=int, default=1000, help="most that are asked for of a day")
    parser.add_argument("--epochs", type=int, default=24, help="most passes with fresh weights")
    parser.add_argument("--epochs-on", type=int, default=4, help="most passes of a night of the loop")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    a = parser.parse_args()
    with ExitStack() as stack:
        out = Path(a.out or stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(connect(progress=False))
        run(a, out, stack)


def run(a: argparse.Namespace, out: Path, stack: ExitStack) -> None:
    before, days = split(pq.read_table(a.tables / "interactions.parquet"), a.days)
    out.mkdir(parents=True, exist_ok=True)
    table, place = str(out / "interactions.parquet"), str(out / "live.sqlite")
    pq.write_table(before, table)
    store, started = open_store(place), time.perf_counter()
    for start in range(0, len(before), 5000):
        store.add(list(events_of(before.slice(start, 5000))))
    store.close()
    print(f"{len(before)} events stored in {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    config = load_config(SETTINGS, [f"train.compact.epochs={a.epochs}", *a.set])
    seconds = {"once": [night(table, out / "once", config, place)]}
    for name in ("loop", "anew"):
        shutil.copytree(out / "once", out / name)
    shops = {name: opened(str(out / name / "index"), place, stack) for name in SHOPS}
    on = [f"train.compact.epochs={a.epochs_on}", "pipeline.start=served"]
    nightly = {"loop": load_config(base=config, overrides=on), "anew": config}

    rng, found = np.random.default_rng(0), []
    print(
        f"{'day':>3} {'events':>6} " + " ".join(f"{name:>6}" for name in SHOPS) + "   seconds of the night: loop, anew"
    )
    for number, day in enumerate(days):
        asked = np.zeros(len(day), bool)
        asked[rng.permutation(len(day))[: a.events]] = True
        hits = []
        for event, is_asked in zip(events_of(day), asked, strict=True):
            if is_asked:
                hits.append([finds(shop, event) for shop in shops.values()])
            told = {"user_id": event.user_id, "item_id": event.item_id, "timestamp": event.timestamp}
            shops["once"].post("/v1/events", {"events": [told]})
        found.append(np.array(hits))
        if number + 1 < len(days):
            for name, settings in nightly.items():
                seconds.setdefault(name, []).append(night(table, out / name, settings, place))
                shops[name].reload()
        recalls = " ".join(f"{recall:6.3f}" for recall in found[-1].mean(0))
        nights = ", ".join(f"{seconds[name][number]:.1f}" for name in nightly) if number + 1 < len(days) else ""
        print(f"{number + 1:3} {len(hits):6} {recalls}   {nights}", flush=True)
    print(json.dumps({"tables": a.tables.name, **summed(np.concatenate(found), seconds)}))


def split(table: pa.Table, days: int) -> tuple[pa.Table, list[pa.Table]]:
    """The events before the last so many days that have any, and those of each of these, all in order of time."""
    table = table.select(["user_id", "item_id", "timestamp"])
    table = table.take(np.argsort(table["timestamp"].to_numpy(), kind="stable"))
    day = table["timestamp"].to_numpy() // DAY_MS
    last = np.unique(day)[-days:]
    return table.filter(pa.array(day < last[0])), [table.filter(pa.array(day == one)) for one in last]


def events_of(table: pa.Table) -> Iterator[Event]:
    return (Event(row["user_id"], row["item_id"], row["timestamp"]) for row in table.to_pylist())


def night(table: str, out: Path, config: Config, store: str) -> float:
    """Run the pipeline; returns its seconds."""
    started = time.perf_counter()
    settings = load_config(base=config, overrides=[f"pipeline.store={store}"])
    pipeline(None, table, str(out), config=settings, progress=True)
    return time.perf_counter() - started


def opened(index: str, store: str, stack: ExitStack) -> Served:
    source = Published(str(index_manifest(index)["model"]), index)
    return stack.enter_context(served(source, ServeConfig(poll_seconds=0, store=store)))


def finds(shop: Served, event: Event) -> bool:
    answer = shop.post("/v1/recommend", {"user_id": event.user_id, "k": K})
    return event.item_id in [item["item_id"] for item in answer["items"]]


def summed(hits: np.ndarray, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Of all days: recall of each shop, its difference from the one trained once, and seconds of a night."""
    found: dict[str, Any] = {"events": len(hits)}
    for column, name in enumerate(SHOPS):
        ours = hits[:, column].astype(float)
        found[name] = {"recall@10": round(ours.mean(), 4), "ci95": _rounded(bootstrap_ci(ours))}
        if column:
            found[name]["minus once"] = _rounded(bootstrap_ci(ours - hits[:, 0]))
            found[name]["mean seconds of a night"] = (
                round(float(np.mean(seconds[name])), 1) if name in seconds else None
            )
    found["seconds of the first training"] = round(seconds["once"][0], 1)
    return found


def _rounded(interval: tuple[float, float]) -> list[float]:
    return [round(float(end), 4) for end in interval]


if __name__ == "__main__":
    main()
