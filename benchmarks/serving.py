"""A server under load from another process: batching, swaps, kills, overload, memory, odd requests, Prometheus.

    python -m benchmarks.serving [name ...] [--items 100000] [--seconds 10]

Names: batching, swap, kill, overload, memory, schema, prometheus (the last needs Debian's `prometheus`); default: the
first five. Every server is `pixrec serve` on an untrained compact model and random vectors; what is compared is
measured within one run.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import catalogs
from benchmarks.processes import below, proportional_memory_mib
from pixrec.artifact import index_version, new_model, save_model, with_compact
from pixrec.client import AsyncClient, RequestFailed
from pixrec.config import CompactConfig, Config, ModelConfig, TinyConfig

WIDTH, CLIENTS, SWAPS, KILL_EVERY_SECONDS = 128, 64, 20, 10.0
KEY = "benchmark"
TINY = TinyConfig(hidden_width=64, num_layers=1, num_heads=2, vision_width=32, vision_layers=1, image_size_px=32)
CONFIG = Config(model=ModelConfig(embedding_width=WIDTH, user_tower="compact", compact=CompactConfig(), tiny=TINY))
PIXREC = (sys.executable, "-c", "import sys; from pixrec.cli import main; sys.exit(main())")


class Shop:
    """A catalog of `items`, two models and versions of an index that either of them made."""

    def __init__(self, folder: Path, items: int) -> None:
        self.folder, self.items = folder, items
        catalogs.write_catalog(folder / "data", items, picture_px=32, with_picture=0.0)
        self.models: dict[str, str] = {}
        for name in ("model", "other"):
            model = with_compact(new_model(CONFIG, [f"title {name} {n}" for n in range(1000)]), [])
            self.models[str(folder / name)] = str(save_model(str(folder / name), model, {})["fingerprint"])
        self.pairs: set[str] = set()
        self.publish("model", 0)

    def publish(self, model: str, seed: int) -> str:
        """A version of random vectors; returns its name."""
        place = str(self.folder / model)
        vectors = np.random.default_rng(seed).standard_normal((self.items, WIDTH), dtype=np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        facts = {"data": str(self.folder / "data"), "data_fingerprint": f"{self.items}-0", "model": place}
        with index_version(str(self.folder / "index"), self.models[place], WIDTH, "float32", facts) as writer:
            ids = [f"i{row:07d}" for row in range(self.items)]
            writer.add(ids, vectors, ids)
        self.pairs.add(f"{self.models[place]} {writer.manifest['version']}")
        return str(writer.manifest["version"])


class Server:
    """A `pixrec serve` in a process of its own."""

    def __init__(self, url: str, process: int) -> None:
        self.url, self.process = url, process

    def replicas(self, deployment: str) -> list[int]:
        return [pid for pid, command in below(self.process).items() if f"ServeReplica:pixrec:{deployment}" in command]

    def memory_mib(self, deployment: str = "Recommender") -> list[int]:
        return [round(proportional_memory_mib(pid)) for pid in self.replicas(deployment)]

    def ask(self, path: str, method: str = "POST") -> Any:
        headers = {"X-API-Key": KEY, "Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}{path}", headers=headers, method=method)
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.loads(answer.read())

    def load(self, seconds: float, **options: Any) -> subprocess.Popen[str]:
        """`pixrec bench-serve` on this server, begun."""
        chosen = [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))]
        command = [*PIXREC, "bench-serve", "--url", self.url, "--seconds", str(seconds), *chosen]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    def loaded(self, seconds: float, **options: Any) -> dict[str, Any]:
        return result(self.load(seconds, **options))


def result(load: subprocess.Popen[str]) -> dict[str, Any]:
    written, _ = load.communicate(timeout=900)
    assert load.returncode == 0
    return dict(json.loads(written))


@contextlib.contextmanager
def serving(shop: Shop, **settings: Any) -> Iterator[Server]:
    """A server with these `serve` settings, for the length of the block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {"admin_key": KEY, "poll_seconds": 0, "cpus_per_replica": 0.2, **settings}
    chosen = [text for name, value in settings.items() for text in ("--set", f"serve.{name}={value}")]
    places = [f"--{name}={shop.folder / name}" for name in ("model", "index", "data")]
    with open(shop.folder / "server.log", "w") as log:
        process = subprocess.Popen([*PIXREC, "serve", *places, "--port", str(port), *chosen], stderr=log)
    server = Server(f"http://127.0.0.1:{port}", process.pid)
    try:
        deadline = time.monotonic() + 600
        while True:
            with contextlib.suppress(OSError):
                server.ask("/readyz", "GET")
                break
            assert process.poll() is None, (shop.folder / "server.log").read_text()[-2000:]
            assert time.monotonic() < deadline, "the server does not answer"
            time.sleep(0.5)
        server.loaded(2, clients=4)  # first calls compile and connect
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(120)


def batching(shop: Shop, seconds: float) -> dict[str, Any]:
    """Closed loop, with batches and without."""
    found = {}
    for name, size in (("on", 32), ("off", 1)):
        with serving(shop, max_batch_size=size) as server:
            told = server.loaded(seconds, clients=CLIENTS)
            found[name] = {k: told[k] for k in ("codes", "answers_per_second", "milliseconds", "stages_ms")}
    encoded = {  # histories that the user tower and the search could take in a second, alone
        name: 1000 * one["stages_ms"]["batch"] / (one["stages_ms"]["encode"] + one["stages_ms"]["retrieve"])
        for name, one in found.items()
    }
    ratio = found["on"]["answers_per_second"] / found["off"]["answers_per_second"]
    return {**found, "ratio_http": round(ratio, 2), "ratio_model": round(encoded["on"] / encoded["off"], 2)}


def swap(shop: Shop, seconds: float) -> dict[str, Any]:
    """Index and model change again and again under load."""
    with serving(shop) as server:
        before, took = server.memory_mib(), []
        load = server.load(max(seconds, 5.0 * SWAPS), rate=10)
        outcomes: collections.Counter[str] = collections.Counter()
        for number in range(SWAPS):
            shop.publish(("other", "model")[number % 2], number + 1)
            started = time.monotonic()
            outcomes.update(replica["outcome"] for replica in server.ask("/admin/reload")["replicas"])
            took.append(time.monotonic() - started)
        told = result(load)
        return {
            "swaps": dict(outcomes),
            "seconds_each": round(float(np.median(took)), 2),
            "codes": told["codes"],
            "milliseconds": told["milliseconds"],
            "pairs_seen": len(told["versions"]),
            "pairs_that_were_never_published": len(set(told["versions"]) - shop.pairs),
            "replica_mib": {"before": before, "after": server.memory_mib()},
        }


def kill(shop: Shop, seconds: float) -> dict[str, Any]:
    """SIGKILL of a replica every 10 s, each kind in turn: with the shipped client, and without retries."""
    rng, deaths = random.Random(0), collections.Counter[str]()
    with serving(shop, num_replicas=2, num_ingress_replicas=2, num_retrieval_replicas=2) as server:
        length = max(seconds, 12 * KILL_EVERY_SECONDS) if seconds >= 10 else 3 * KILL_EVERY_SECONDS
        plain = server.load(length, rate=4)
        command = [sys.executable, "-m", "benchmarks.serving", "--shopper", server.url, "--seconds", str(length)]
        shopper = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        kinds, began = ("Recommender", "Ingress", "Retrieval"), time.monotonic()
        while time.monotonic() - began < length - KILL_EVERY_SECONDS:
            time.sleep(KILL_EVERY_SECONDS)
            kind = kinds[sum(deaths.values()) % len(kinds)]
            if victims := server.replicas(kind):
                os.kill(rng.choice(victims), signal.SIGKILL)
                deaths[kind] += 1
        told = result(plain)
        return {"kills": dict(deaths), "shipped_client": result(shopper), "without_retries": told["codes"],
                "share_200_without_retries": told["share_200"]}  # fmt: skip


async def shop_on(url: str, seconds: float) -> dict[str, Any]:
    """Four shoppers with the shipped client, one request after the other."""
    counts: collections.Counter[str] = collections.Counter()

    async def shopper(client: AsyncClient, end: float) -> None:
        while time.monotonic() < end:
            try:
                await client.recommend(["i0000001", "i0000002"])
                counts["answered"] += 1
            except RequestFailed as failed:
                counts[f"failed: {failed.status}"] += 1
            await asyncio.sleep(0.5)

    async with AsyncClient(url) as client:
        await asyncio.gather(*(shopper(client, time.monotonic() + seconds) for _ in range(4)))
    return dict(counts)


def overload(shop: Shop, seconds: float) -> dict[str, Any]:
    """Five times as many requests as the server can answer, and what comes after."""
    with serving(shop, max_ongoing_requests=64, max_queued_requests=64) as server:
        capacity = server.loaded(seconds, clients=32)["answers_per_second"]
        calm = server.loaded(seconds, rate=round(capacity / 3, 1))
        flooded = server.loaded(seconds, rate=round(5 * capacity, 1))
        after = server.loaded(seconds, rate=round(capacity / 3, 1))
    keys = ("codes", "answers_per_second", "milliseconds")
    found = {name: {k: told[k] for k in keys} for name, told in
             (("calm", calm), ("five_times", flooded), ("after", after))}  # fmt: skip
    return {"capacity": capacity, **found}


def memory(shop: Shop, seconds: float) -> dict[str, Any]:
    """Proportional set size of each of two replicas of each kind, idle after some load."""
    with serving(shop, num_replicas=2, num_retrieval_replicas=2) as server:
        server.loaded(seconds, clients=8)
        found = {kind: server.memory_mib(kind) for kind in ("Recommender", "Retrieval", "Ingress")}
    return {"vectors_mib": round(shop.items * WIDTH * 4 / 2**20), "replica_mib": found}


def schema(shop: Shop, seconds: float) -> dict[str, Any]:
    """Requests drawn from the OpenAPI file, sound and broken: no 5xx, and every answer fits its schema."""
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    with serving(shop) as server:
        command = ["schemathesis", "run", f"{server.url}/openapi.json", "-c", checks, "-n", str(round(30 * seconds)),
                   "--phases", "fuzzing", "-H", f"X-API-Key: {KEY}", "--seed", "0", "--request-timeout", "60",
                   "--exclude-path", "/admin/pin", "--exclude-path", "/admin/rollback"]  # fmt: skip
        place = Path(sys.executable).with_name(command[0])
        ran = subprocess.run([str(place), *command[1:]], capture_output=True, text=True)
    lines = [line for line in ran.stdout.splitlines() if "generated" in line or "❌" in line or "passed" in line]
    return {"exit_code": ran.returncode, "said": lines}


def prometheus(shop: Shop, seconds: float) -> dict[str, Any]:
    """Every query of the dashboard, evaluated by a Prometheus that scrapes a server under load."""
    panels = json.loads(Path("serve/dashboard.json").read_text())["panels"]
    queries = {f"{p['title']}: {t['legendFormat']}": t["expr"] for p in panels for t in p["targets"]}
    with serving(shop) as server, tempfile.TemporaryDirectory() as folder:
        target = server.url.removeprefix("http://")
        scrape = {"job_name": "pixrec", "scrape_interval": "2s", "static_configs": [{"targets": [target]}]}
        (Path(folder) / "prometheus.yml").write_text(json.dumps({"scrape_configs": [scrape]}))  # JSON is YAML
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        options = [f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
        command = ["prometheus", *options, f"--web.listen-address={address}"]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
            try:
                server.loaded(max(seconds, 20), rate=10)
                found = {name: _evaluated(address, query) for name, query in queries.items()}
            finally:
                process.terminate()
    return {"series": found, "queries_without_an_answer": sorted(name for name, n in found.items() if not n)}


def _evaluated(address: str, query: str) -> int:
    """Series with a number that a query of the dashboard gives."""
    asked = urllib.parse.urlencode({"query": query.replace("$__rate_interval", "1m")})
    with urllib.request.urlopen(f"http://{address}/api/v1/query?{asked}", timeout=60) as answer:
        return sum(one["value"][1] != "NaN" for one in json.loads(answer.read())["data"]["result"])


MORE = {"schema": schema, "prometheus": prometheus}
SCENARIOS = {"batching": batching, "swap": swap, "kill": kill, "overload": overload, "memory": memory}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("names", nargs="*", metavar="name")
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--shopper", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.shopper:
        print(json.dumps(asyncio.run(shop_on(a.shopper, a.seconds))))
        return 0
    unknown = set(a.names) - {*SCENARIOS, *MORE}
    if unknown:
        parser.error(f"no scenario {min(unknown)!r}; there are {', '.join(SCENARIOS | MORE)}")
    with tempfile.TemporaryDirectory(prefix="pixrec-serving-") as folder:
        shop = Shop(Path(folder), a.items)
        for name in a.names or SCENARIOS:
            found = (SCENARIOS | MORE)[name](shop, a.seconds)
            print(json.dumps({name: found}), flush=True)
    print(f"{a.items:,} x {WIDTH}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
