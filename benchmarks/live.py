"""What the stores of events and items cost, a server whose items change under load, and one whose store is lost.

    python -m benchmarks.live store [--events 1000000 --users 100000] [--redis]
    python -m benchmarks.live serve [--items 10000 --replicas 4 --clients 64] [--redis]
    python -m benchmarks.live away [--seconds 30]

`store` fills an empty store with events, in batches, and then measures single look-ups and inserts: p50 and p99
in milliseconds, and bytes an event; a Redis server is started for it in a folder of its own. `serve` puts load on a
`pixrec serve`, adds items meanwhile, hides one of each batch, and counts what failed, what was not found at once and
what was returned after it was hidden; then each replica is killed, the server is started anew, and the items are
embedded into a new version, after each of which the same is asked again. `away` kills the Redis server of one under
load, starts it again after some seconds, and looks for all that was reported as stored. Each prints one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.serving import KEY, PIXREC, PLACES, Server, Shop, serving
from pixrec.artifact import load_index
from pixrec.client import AsyncClient, Rejected, RequestFailed, Retries
from pixrec.console import Console
from pixrec.live.places import open_store
from pixrec.live.store import Event, Store
from pixrec.query import Answer, NewItem, Query

PROBES = 2000
NEIGHBOURS = 10


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def redis_server(folder: str, port: int) -> tuple[subprocess.Popen[bytes], str]:
    """A server that writes each change to disk before it answers, as SQLite does, and reads what lies there."""
    kept = ["--appendonly", "yes", "--appendfsync", "always", "--save", "", "--dir", folder]
    process = subprocess.Popen(["redis-server", "--port", str(port), *kept], stdout=subprocess.DEVNULL)
    for _ in range(200):
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            break
        except OSError:
            time.sleep(0.05)
    return process, f"redis://127.0.0.1:{port}"


def drawn(events: int, users: int, batch: int, rng: np.random.Generator) -> Iterator[list[Event]]:
    """Events of random users and items, in the order of time."""
    for start in range(0, events, batch):
        count = min(batch, events - start)
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


def measure_store(store: Store, folder: str, events: int, users: int, batch: int) -> dict[str, Any]:
    rng, started, done = np.random.default_rng(0), time.perf_counter(), 0
    with Console() as console:
        for drawn_events in drawn(events, users, batch, rng):
            store.add(drawn_events)
            done += len(drawn_events)
            console.progress("events stored", done, events)
    filled = time.perf_counter() - started
    asked = [f"u{user}" for user in rng.integers(0, users, PROBES)]
    new = [Event(user, f"item{n}", 1_800_000_000_000 + n) for n, user in enumerate(asked)]
    return {
        "events": events,
        "users": users,
        "batch": batch,
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
            return {
                "store": "sqlite",
                **measure_store(open_store(f"{folder}/live.sqlite"), folder, a.events, a.users, a.batch),
            }
        process, url = redis_server(folder, free_port())
        try:
            store: Any = open_store(url)
            found = measure_store(store, folder, a.events, a.users, a.batch)
            used = int(store._redis.info("memory")["used_memory"])
            return {"store": "redis", **found, "bytes_an_event_in_memory": round(used / a.events, 1)}
        finally:
            process.terminate()
            process.wait()


class Outcome:
    """What clients saw: how long answers took, which requests failed, how many answers the store was away for."""

    def __init__(self) -> None:
        self.taken: list[float] = []
        self.failed: list[str] = []
        self.away = 0

    def told(self) -> dict[str, Any]:
        p50, p99 = np.percentile(self.taken, [50, 99]) * 1000
        said = {"answered": len(self.taken), "failed": len(self.failed), "failures": sorted(set(self.failed))[:3]}
        return {**said, "store_away": self.away, "p50_ms": round(p50, 1), "p99_ms": round(p99, 1)}


async def shoppers(
    url: str, clients: int, ask: Callable[[AsyncClient], Awaitable[Answer]], stop: asyncio.Event, pause: float = 0.0
):
    """Clients without retries that ask one request after the other until `stop`, with `pause` seconds between them."""
    seen = Outcome()

    async def shopper(client: AsyncClient) -> None:
        while not stop.is_set():
            started = time.perf_counter()
            try:
                answer = await ask(client)
                seen.taken.append(time.perf_counter() - started)
                seen.away += answer.store_away
            except RequestFailed as error:
                seen.failed.append(str(error)[:200])
            await asyncio.sleep(pause)

    async with AsyncClient(url, KEY, retries=Retries(attempts=1)) as client:
        await asyncio.gather(*(shopper(client) for _ in range(clients)))
    return seen


async def look(client: AsyncClient, found: str, hidden: str, times: int) -> tuple[int, int]:
    """How often, of `times` questions asked at once, an added item was unknown, and a hidden one was returned for it,
    which was the nearest before."""

    async def similar() -> Answer | None:
        try:
            return await client.similar(found, NEIGHBOURS)
        except Rejected:
            return None

    answers = await asyncio.gather(*(similar() for _ in range(times)))
    returned = sum(hidden in [item_id for item_id, _ in answer.items] for answer in answers if answer)
    return answers.count(None), returned


async def change_items(
    url: str, items: int, batch: int, replicas: int, console: Console
) -> tuple[list[tuple[str, str]], dict[str, Any]]:
    """Add items, and hide the nearest of one of each batch; both are looked for at once, twice as often as there are
    replicas. Returns an item and a hidden one of each batch."""
    pairs, missed, returned, adding = [], 0, 0, list[float]()
    async with AsyncClient(url, KEY) as client:
        for start in range(0, items, batch):
            new = {
                f"live/{n}": NewItem({"title": f"novelty {n}", "price": n % 90}) for n in range(start, start + batch)
            }
            started = time.perf_counter()
            await client.add_items(new)
            adding.append(time.perf_counter() - started)
            one = next(iter(new))
            near = [item_id for item_id, _ in (await client.similar(one, NEIGHBOURS)).items]
            other = next(item_id for item_id in near if item_id.startswith("live/") and int(item_id[5:]) % batch)
            await client.hide_item(other)
            pairs.append((one, other))
            counted = await look(client, one, other, 2 * replicas)
            missed, returned = missed + counted[0], returned + counted[1]
            console.progress("items added", start + batch, items)
    p50, p99 = np.percentile(adding, [50, 99])
    told = {
        "added": items,
        "batch": batch,
        "hidden": len(pairs),
        "add_p50_s": round(p50, 3),
        "add_p99_s": round(p99, 3),
    }
    return pairs, {**told, "not_found_at_once": missed, "returned_after_hidden": returned}


def still(url: str, pairs: list[tuple[str, str]], replicas: int) -> dict[str, int]:
    """The same question as `change_items` asks, of some of its items."""

    async def asked() -> list[tuple[int, int]]:
        async with AsyncClient(url, KEY) as client:
            return [await look(client, *pair, 2 * replicas) for pair in pairs[:: max(1, len(pairs) // 10)]]

    missed, returned = np.sum(asyncio.run(asked()), axis=0).tolist()
    return {"not_found": missed, "returned_though_hidden": returned}


def kill_each(server: Server, replicas: int, console: Console) -> int:
    """SIGKILL of each replica that there is, the next when another has taken its place; returns how many."""
    victims = server.replicas("Recommender")
    for done, victim in enumerate(victims):
        console.progress("replicas killed", done, len(victims))
        os.kill(victim, signal.SIGKILL)
        deadline = time.monotonic() + 300
        while victim in (there := server.replicas("Recommender")) or len(there) < replicas:
            assert time.monotonic() < deadline, "no replica took the place of one that was killed"
            time.sleep(0.5)
    return len(victims)


def run_serve(a: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=a.folder) as folder:
        shop = Shop(Path(folder) / "shop", a.catalog)
        process, store = redis_server(folder, free_port()) if a.redis else (None, "index")
        one = {"num_replicas": a.replicas, "cpus_per_replica": 0.1, "threads_per_replica": 1, "store": store}
        try:
            with serving(shop, **one) as server:
                found = asyncio.run(_under_load(server.url, shop, a))
                pairs = found.pop("pairs")
                with Console() as console:
                    killed = kill_each(server, a.replicas, console)
                found["after_kills"] = {"killed": killed, **still(server.url, pairs, a.replicas)}
            with serving(shop, **one) as server:
                found["after_restart"] = still(server.url, pairs, a.replicas)
                found["embed"] = _embed(shop, store)
                server.ask("/admin/reload")
                found["after_embed"] = still(server.url, pairs, a.replicas)
        finally:
            if process is not None:
                process.terminate()
                process.wait()
    told = {"store": "redis" if a.redis else "sqlite", "replicas": a.replicas, "clients": a.clients}
    return {**told, **found, "load": os.getloadavg()[0]}


async def _under_load(url: str, shop: Shop, a: argparse.Namespace) -> dict[str, Any]:
    rng = random.Random(0)

    def ask(client: AsyncClient) -> Awaitable[Answer]:
        return client.recommend([f"i{rng.randrange(shop.items):07d}" for _ in range(5)])

    stop = asyncio.Event()
    asking = asyncio.create_task(shoppers(url, a.clients, ask, stop, a.pause))
    with Console() as console:
        pairs, changed = await change_items(url, a.items, a.batch, a.replicas, console)
    stop.set()
    return {**changed, "recommend": (await asking).told(), "pairs": pairs}


def _embed(shop: Shop, store: str) -> dict[str, Any]:
    """`pixrec embed` twice, with the live items: how many items each version has, each id once."""
    places = [f"--{flag}={shop.folder / name}" for flag, name in zip(("model", "out", "data"), PLACES, strict=True)]
    found = {}
    for time_ in ("first", "again"):
        command = [*PIXREC, "embed", *places, "--set", f"embed.live_items={store}", "--set", "embed.cpus_per_actor=0.5"]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=1200)
        assert ran.returncode == 0, ran.stderr[-2000:]
        ids = list(load_index(str(shop.folder / "index")).item_ids)
        told = json.loads(ran.stdout.splitlines()[-1])
        counted = {name: told.get(name) for name in ("live_items", "live_computed")}
        found[time_] = {"items": len(ids), "twice": len(ids) - len(set(ids)), **counted}
    return found


def run_away(a: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=a.folder) as folder:
        shop, port = Shop(Path(folder) / "shop", a.catalog), free_port()
        process, store = redis_server(folder, port)
        try:
            with serving(shop, num_replicas=2, store=store) as server:

                async def all_of_it() -> dict[str, Any]:
                    nonlocal process
                    stop = asyncio.Event()
                    asking = asyncio.create_task(
                        shoppers(server.url, 8, lambda client: client.answer(Query(user_id="u1")), stop)
                    )
                    writing = asyncio.create_task(_write(server.url, stop))
                    await asyncio.sleep(5)
                    process.kill()
                    process.wait()
                    await asyncio.sleep(a.seconds)
                    process, _ = await asyncio.to_thread(redis_server, folder, port)
                    await asyncio.sleep(10)
                    stop.set()
                    stored, refused = await writing
                    return {"recommend": (await asking).told(), "refused": refused, "stored": stored}

                found = asyncio.run(all_of_it())
            kept = {event.item_id for block in open_store(store).events() for event in block}
            stored = found.pop("stored")
            return {"seconds_away": a.seconds, **found, "stored": len(stored), "lost": len(set(stored) - kept),
                    "load": os.getloadavg()[0]}  # fmt: skip
        finally:
            process.terminate()
            process.wait()


async def _write(url: str, stop: asyncio.Event) -> tuple[list[str], int]:
    """Send events one by one until `stop`; returns the items of those that were reported as stored, and how many were
    not."""
    stored: list[str] = []
    refused = 0
    async with AsyncClient(url, KEY, retries=Retries(attempts=1)) as client:
        while not stop.is_set():
            item_id = f"i{len(stored) + refused:07d}"
            try:
                await client.add_events([{"user_id": f"u{len(stored) % 50}", "item_id": item_id, "event": "view"}])
                stored.append(item_id)
            except RequestFailed:
                refused += 1
            await asyncio.sleep(0.02)
    return stored, refused


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="where the stores lie (default: the temporary folder)")
    kinds = parser.add_subparsers(dest="kind", required=True)
    store, served, away = (kinds.add_parser(name) for name in ("store", "serve", "away"))
    for sub in (store, served):
        sub.add_argument("--redis", action="store_true")
    for sub in (served, away):
        sub.add_argument("--catalog", type=int, default=2000)
    away.add_argument("--seconds", type=float, default=30.0)
    store.add_argument("--events", type=int, default=1_000_000)
    store.add_argument("--users", type=int, default=100_000)
    store.add_argument("--batch", type=int, default=100, help="events of one call while the store is filled")
    served.add_argument("--replicas", type=int, default=4)
    served.add_argument("--clients", type=int, default=64)
    served.add_argument("--items", type=int, default=10_000)
    served.add_argument("--pause", type=float, default=2.0, help="seconds between two requests of a client")
    served.add_argument("--batch", type=int, default=100)
    a = parser.parse_args()
    print(json.dumps({"store": run_store, "serve": run_serve, "away": run_away}[a.kind](a)))


if __name__ == "__main__":
    main()
