"""What the stores of events and items cost, and a server whose items change under load.

    python -m benchmarks.live store --events 1000000 --users 100000 [--redis]
    python -m benchmarks.live serve --model M --index I --data D [--replicas 4 --clients 64 --items 10000]

`store` fills an empty store with events, in batches of 100, and then measures single look-ups and inserts: p50 and p99
in milliseconds, and bytes an event; a Redis server is started for it in a folder of its own. `serve` runs the
application with its replicas on this machine, puts load on it, adds items meanwhile, hides some, and counts what
failed, what was not found at once and what was returned after it was hidden. Both print one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pixrec.live.places import open_store
from pixrec.live.store import Event, Store

BATCH, PROBES = 100, 2000


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def redis_server(folder: str) -> tuple[subprocess.Popen[bytes], str]:
    """A server that writes each change to disk before it answers, as SQLite does."""
    port = str(free_port())
    kept = ["--appendonly", "yes", "--appendfsync", "always", "--save", "", "--dir", folder]
    process = subprocess.Popen(["redis-server", "--port", port, *kept], stdout=subprocess.DEVNULL)
    for _ in range(200):
        try:
            socket.create_connection(("127.0.0.1", int(port)), 1).close()
            break
        except OSError:
            time.sleep(0.05)
    return process, f"redis://127.0.0.1:{port}"


def drawn(events: int, users: int, rng: np.random.Generator) -> Iterator[list[Event]]:
    """Events of random users and items, in the order of time."""
    for start in range(0, events, BATCH):
        count = min(BATCH, events - start)
        pairs = zip(rng.integers(0, users, count).tolist(), rng.integers(0, 100_000, count).tolist(), strict=True)
        yield [Event(f"u{u}", f"item{i}", 1_700_000_000_000 + start + n, "view") for n, (u, i) in enumerate(pairs)]


def milliseconds(calls: list[Callable[[], Any]]) -> dict[str, float]:
    taken = []
    for call in calls:
        started = time.perf_counter()
        call()
        taken.append(1000 * (time.perf_counter() - started))
    return {f"p{p}": round(float(np.percentile(taken, p)), 3) for p in (50, 99)}


def folder_bytes(folder: str) -> int:
    return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())


def measure_store(store: Store, folder: str, events: int, users: int) -> dict[str, Any]:
    rng, started = np.random.default_rng(0), time.perf_counter()
    for batch in drawn(events, users, rng):
        store.add(batch)
    filled = time.perf_counter() - started
    asked = [f"u{user}" for user in rng.integers(0, users, PROBES)]
    new = [Event(user, f"item{n}", 1_800_000_000_000 + n) for n, user in enumerate(asked)]
    return {
        "events": events,
        "users": users,
        "events_per_second_in_batches": round(events / filled),
        "look_up_ms": milliseconds([lambda user=user: store.history(user, 1000) for user in asked]),
        "insert_ms": milliseconds([lambda event=event: store.add([event]) for event in new]),
        "last_change_ms": milliseconds([store.last_change] * PROBES),
        "bytes_an_event_on_disk": round(folder_bytes(folder) / events, 1),
        "load": os.getloadavg()[0],
    }


def run_store(a: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=a.folder) as folder:
        if not a.redis:
            return {"store": "sqlite", **measure_store(open_store(f"{folder}/live.sqlite"), folder, a.events, a.users)}
        process, url = redis_server(folder)
        try:
            store: Any = open_store(url)
            found = measure_store(store, folder, a.events, a.users)
            used = int(store._redis.info("memory")["used_memory"])
            return {"store": "redis", **found, "bytes_an_event_in_memory": round(used / a.events, 1)}
        finally:
            process.terminate()
            process.wait()


async def shoppers(url: str, key: str, histories: list[list[str]], clients: int, stop: asyncio.Event) -> dict[str, Any]:
    """Clients that ask one request after the other until `stop`."""
    from pixrec.client import AsyncClient, RequestFailed, Retries

    taken: list[float] = []
    failed: list[str] = []

    async def shopper(client: AsyncClient) -> None:
        while not stop.is_set():
            started = time.perf_counter()
            try:
                await client.recommend(random.choice(histories), 10)
                taken.append(time.perf_counter() - started)
            except RequestFailed as error:
                failed.append(str(error)[:200])

    async with AsyncClient(url, key, retries=Retries(attempts=1)) as client:
        await asyncio.gather(*(shopper(client) for _ in range(clients)))
    p50, p99 = np.percentile(taken, [50, 99]) * 1000
    return {"answered": len(taken), "failed": len(failed), "p50_ms": round(p50, 1), "p99_ms": round(p99, 1),
            "failures": sorted(set(failed))[:3]}  # fmt: skip


async def change_items(url: str, key: str, items: int, batch: int, source: list[dict[str, Any]]) -> dict[str, Any]:
    """Add items, each batch looked for at once as often as there may be replicas; hide one of each, and look again."""
    from pixrec.client import AsyncClient
    from pixrec.query import NewItem

    columns = ("title", "brand", "category", "price", "description")
    added, hidden_seen, not_seen, adding = 0, 0, 0, list[float]()
    async with AsyncClient(url, key) as client:
        while added < items:
            new = {}
            for number in range(added, min(items, added + batch)):
                fields = source[number % len(source)]
                told = {name: fields[name] for name in columns if fields.get(name) is not None}
                new[f"live/{number}"] = NewItem({**told, "title": f"{told.get('title') or 'item'} {number}"})
            started = time.perf_counter()
            await client.add_items(new)
            adding.append(time.perf_counter() - started)
            one, other = list(new)[:2]
            for _ in range(8):
                answer = await client.similar(one, 50)  # an unknown item would be refused
                not_seen += answer.items == []
            await client.hide_item(other)
            for _ in range(8):
                answer = await client.similar(one, 50)
                hidden_seen += other in [item_id for item_id, _ in answer.items]
            added += len(new)
    p50, p99 = np.percentile(adding, [50, 99])
    return {"added": added, "batch": batch, "add_p50_s": round(p50, 3), "add_p99_s": round(p99, 3),
            "not_found_at_once": not_seen, "returned_after_hidden": hidden_seen}  # fmt: skip


def run_serve(a: argparse.Namespace) -> dict[str, Any]:
    from ray import serve

    from pixrec.cluster.session import connect
    from pixrec.config import Config, ServeConfig
    from pixrec.data.items import load_items
    from pixrec.serving.app import build_app

    key, port, table = "benchmark", free_port(), load_items(a.data)
    ids = list(table.item_ids)
    histories = [random.sample(ids, 5) for _ in range(200)]
    source = [table.fields(row) for row in range(min(1000, len(ids)))]
    with connect(), tempfile.TemporaryDirectory(dir=a.folder) as folder:
        process, store = redis_server(folder) if a.redis else (None, f"{folder}/live.sqlite")
        config = ServeConfig(
            api_key=key,
            store=store,
            num_replicas=a.replicas,
            cpus_per_replica=0.1,
            threads_per_replica=1,
            poll_seconds=0,
        )
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": port}, proxy_location="HeadOnly")
            serve.run(build_app(a.model, a.index, a.data, Config(serve=config)), name="live", route_prefix="/")
            url = f"http://127.0.0.1:{port}"

            async def both() -> dict[str, Any]:
                stop = asyncio.Event()
                asking = asyncio.create_task(shoppers(url, key, histories, a.clients, stop))
                changed = await change_items(url, key, a.items, a.batch, source)
                stop.set()
                return {**changed, "recommend": await asking}

            found = asyncio.run(both())
        finally:
            serve.shutdown()
            if process is not None:
                process.terminate()
                process.wait()
    told = {"store": "redis" if a.redis else "sqlite", "replicas": a.replicas, "clients": a.clients}
    return {**told, **found, "load": os.getloadavg()[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="where the stores lie (default: the temporary folder)")
    kinds = parser.add_subparsers(dest="kind", required=True)
    store, served = kinds.add_parser("store"), kinds.add_parser("serve")
    for sub in (store, served):
        sub.add_argument("--redis", action="store_true")
    store.add_argument("--events", type=int, default=1_000_000)
    store.add_argument("--users", type=int, default=100_000)
    for name in ("model", "index", "data"):
        served.add_argument(f"--{name}", required=True)
    served.add_argument("--replicas", type=int, default=4)
    served.add_argument("--clients", type=int, default=64)
    served.add_argument("--items", type=int, default=10_000)
    served.add_argument("--batch", type=int, default=50)
    a = parser.parse_args()
    print(json.dumps(run_store(a) if a.kind == "store" else run_serve(a)))


if __name__ == "__main__":
    main()
