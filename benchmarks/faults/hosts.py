"""What becomes of a whole pipeline while a host of its cluster, a link or the S3 endpoint fails.

    python -m benchmarks.faults.hosts [FAULT ...] [--workers 2] [--items 200] [--set KEY=VALUE ...]

FAULT is none, kill-prepare, kill-train, kill-embed (a worker node that does not run the job's own process, SIGKILL with
all its processes), kill-driver (the one that does), cut-train (its link for 30 s), kill-head, s3-503 (the endpoint
answers 503 for 60 s while training), s3-slow (a second more for each answer, for 120 s), full-store (twice what Ray's
object stores hold, put there by another job while training) or kill-serve (a worker node under an application that is
asked by the shipped client); all by default. Each but the last is one `pixrec submit -- pipeline` of a small synthetic
shop with these settings (`--set model.lora.enabled=true`), whose results are compared with those of a single machine.
The hosts are those of `benchmarks.hosts`. With Debian's prometheus, kill-serve evaluates the queries of the dashboard
meanwhile; with chromium, --picture draws some.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import signal
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.hosts import BUCKET, PATIENCE_SECONDS, STORE_BYTES, Endpoint, Hosts, Run, fill, reached, wait
from benchmarks.scrape import dashboard_queries, installed, scraping
from pixrec.artifact import load_index
from pixrec.client import Client, RequestFailed
from pixrec.data.sequences import load_dataset

SAME_WORKERS, OTHER_WORKERS = 1e-6, 0.02
"""How far components of unit vectors may lie apart after 24 steps: as many ranks round alike, fewer do not."""
CUT_SECONDS, REFUSE_SECONDS, SLOW_SECONDS = 30, 60, 120
PICTURED = ("Requests by code", "Time to answer /v1: 99", "Load of Ray's nodes", "Ray's object store")
FILL = (
    f"{sys.executable} -c 'import numpy, ray, time; ray.init(); "
    f"kept = [ray.put(numpy.zeros({STORE_BYTES // 10}, numpy.uint8)) for _ in range(20)]; time.sleep(60)'"
)
CONFIG = """
model: {user_tower: compact}
train:
  num_workers: 1
  max_workers: 2
  cpus_per_worker: 2
  max_steps: 24
  validate_every_steps: 4
  compact: {epochs: 1, validate_every_epochs: 1}
embed: {batch_size: 16, max_part_items: 16, num_actors: 2, cpus_per_actor: 1}
evaluate: {scorers: [popularity], bootstrap_samples: 100}
job: {cpus: 1, memory_gib: 0.5, attempts: 4}
"""


def pipeline(place: str, settings: Sequence[str]) -> list[str]:
    """The command that makes everything below a place."""
    tables = [f"--{table}={BUCKET}/catalog/{table}.parquet" for table in ("items", "interactions")]
    return ["pipeline", *tables, f"--out={place}", f"--config={BUCKET}/config.yaml", *settings]


def single_machine(hosts: Hosts, place: str, settings: Sequence[str]) -> dict[str, Any]:
    """The same pipeline on one machine, with as many workers, since sums over ranks are rounded by their number."""
    workers = f"train.num_workers={len(hosts.workers)}"
    small = [
        f"--set={name}"
        for name in (workers, "train.max_workers=null", "train.cpus_per_worker=0.3", "embed.cpus_per_actor=0.2")
    ]
    process = hosts.pixrec(*pipeline(place, settings), *small)
    out, err = process.communicate(timeout=PATIENCE_SECONDS)
    if process.returncode:
        raise RuntimeError(err)
    return dict(json.loads(out.splitlines()[-1]))


def compare(found: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    """How far the results of two runs are apart; also asserts that each item has one vector."""
    data, other = load_dataset(found["data"]), load_dataset(expected["data"])
    vectors = []
    for summary in (found, expected):
        index = load_index(summary["index"], version=summary["version"])
        assert len(set(index.item_ids)) == len(index.item_ids) == len(data.items), "every item once"
        vectors.append(index.vectors[np.argsort(list(index.item_ids))])
    metrics = [summary["results"]["pixrec"] for summary in (found, expected)]
    return {
        "data_equal": data.info["fingerprint"] == other.info["fingerprint"],
        "largest_vector_difference": float(np.abs(vectors[0] - vectors[1]).max()),
        "largest_metric_difference": max(
            abs(metrics[0][name] - metrics[1][name]) for name in metrics[0] if name != "ci95"
        ),
    }


FAULTS = (
    "none",
    "kill-prepare",
    "kill-train",
    "kill-embed",
    "kill-driver",
    "cut-train",
    "kill-head",
    "s3-503",
    "s3-slow",
    "full-store",
    "kill-serve",
)
MOMENTS = {"prepare": r"== prepare", "train": r"train both step 8:", "embed": r"== embed"}


def disturb(fault: str, hosts: Hosts, endpoint: Endpoint, run: Run) -> None:
    """Wait for the moment, and let it happen. A killed worker stays away until the next run."""
    what, _, when = fault.partition("-")
    if fault == "none":
        return
    run.until(MOMENTS.get(when, MOMENTS["train"]))
    driver = hosts.driver_host(run.name)
    other = next(host for host in hosts.workers if host is not driver)
    if fault == "cut-train":
        with hosts.cut(other):
            time.sleep(CUT_SECONDS)
        return
    if what == "full":
        for host in hosts.workers:
            hosts.ask("/api/jobs/", {"entrypoint": FILL, "entrypoint_resources": {f"node:{host.address}": 0.001}})
        return
    if what == "s3":
        endpoint.refusing, endpoint.slow_seconds = fault == "s3-503", 1.0 if fault == "s3-slow" else 0.0
        time.sleep(REFUSE_SECONDS if fault == "s3-503" else SLOW_SECONDS)
        endpoint.refusing, endpoint.slow_seconds = False, 0.0
        return
    victim = hosts.head if when == "head" else driver if when == "driver" else other
    assert victim is not None
    victim.kill()
    print(f"{fault}: killed {victim.name} at {time.monotonic() - run.began:.0f} s", flush=True)
    if when == "head":
        for host in hosts.workers:
            host.kill()
        hosts.start_head()
        hosts.start_lost()


class Shoppers:
    """Four threads that ask a server by the shipped client, one request after the other; a context manager."""

    def __init__(self, url: str, histories: Sequence[list[str]]) -> None:
        self._url, self._histories = url, histories
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._shop, daemon=True) for _ in range(4)]
        self.seconds: list[float] = []
        self.failures: list[str] = []

    def __enter__(self) -> Shoppers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(120)

    def _shop(self) -> None:
        with Client(self._url) as client:
            for history in itertools.cycle(self._histories):
                if self._stop.wait(0.1):
                    return
                began = time.monotonic()
                try:
                    client.recommend(history)
                    self.seconds.append(time.monotonic() - began)
                except RequestFailed as failed:
                    self.failures.append(str(failed)[:200])


def lose_a_server(hosts: Hosts, made: dict[str, Any], picture: str | None) -> dict[str, Any]:
    """Serve what a run made on two hosts, ask through the head, and kill one of the two."""
    settings = {"num_replicas": 2, "num_ingress_replicas": 2, "poll_seconds": 0, "store": "none"}
    args = {name: made[name] for name in ("model", "index", "data")} | {"config": {"serve": settings}}
    app = {"name": "pixrec", "route_prefix": "/", "import_path": "serve.app:builder", "args": args}
    http = {"host": "0.0.0.0", "port": 8000}  # of the host's own network
    config = {"proxy_location": "EveryNode", "http_options": http, "applications": [app]}

    def replicas() -> list[str]:
        """Nodes on which replicas of the model run."""
        told = hosts.ask("/api/serve/applications/")["applications"].get("pixrec", {})
        running = told.get("deployments", {}).get("Recommender", {}).get("replicas", [])
        return [one["node_ip"] for one in running if one["state"] == "RUNNING"]

    hosts.ask("/api/serve/applications/", config, "PUT")
    wait(lambda: len(replicas()) == 2, PATIENCE_SECONDS, "replicas")
    ids = list(load_index(made["index"]).item_ids)
    front = f"{hosts.head.address}:8000"
    with contextlib.ExitStack() as stack:
        watching = stack.enter_context(scraping(front, "5s", hosts.metrics())) if installed() else None
        shoppers = stack.enter_context(Shoppers(f"http://{front}", [ids[n : n + 5] for n in range(50)]))
        wait(lambda: len(shoppers.seconds) > 300, PATIENCE_SECONDS, "answers")
        before, victim = replicas(), hosts.workers[-1]
        victim.kill()
        wait(lambda: replicas().count(victim.address) == 0 and len(replicas()) == 2, PATIENCE_SECONDS, "other replicas")
        answered = len(shoppers.seconds)
        wait(lambda: len(shoppers.seconds) > answered + 300, PATIENCE_SECONDS, "answers after it")
        unanswered = []
        if watching is not None:
            queries = dashboard_queries("30s")
            unanswered = sorted(name for name, query in queries.items() if not watching.values(query))
            if picture:
                watching.picture([q for name, q in queries.items() if name.startswith(PICTURED)], 3, picture)
    told: dict[str, Any] = {"queries_without_an_answer": unanswered} if watching is not None else {}
    told |= {"replicas_on_hosts": len(set(before)), "answered": len(shoppers.seconds), "failed": len(shoppers.failures)}
    return {**told, "failures": sorted(set(shoppers.failures))[:3], "longest_seconds": round(max(shoppers.seconds), 1)}


def main(faults: list[str], workers: int, items: int, settings: Sequence[str], picture: str | None) -> int:
    worst = 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the hosts go too
    with Hosts(workers) as hosts, Endpoint(hosts.gateway) as endpoint, reached(hosts):
        fill(hosts, items, 2 * items, CONFIG)
        expected = single_machine(hosts, f"{BUCKET}/single", settings)
        for fault in faults:
            hosts.start_lost()
            began = time.monotonic()
            if fault == "kill-serve":
                found = lose_a_server(hosts, expected, picture)
                print(json.dumps({"fault": fault, "seconds": round(time.monotonic() - began), **found}), flush=True)
                worst |= bool(found["failed"])
                continue
            try:
                apart = compare(undergo(fault, hosts, endpoint, settings), expected)
            except (RuntimeError, TimeoutError) as error:
                apart = {"failed": str(error)}
            print(json.dumps({"fault": fault, "seconds": round(time.monotonic() - began), **apart}), flush=True)
            allowed = SAME_WORKERS if fault == "none" else OTHER_WORKERS
            worst |= not apart.get("data_equal") or apart["largest_vector_difference"] > allowed
    return int(worst)


def undergo(fault: str, hosts: Hosts, endpoint: Endpoint, settings: Sequence[str]) -> dict[str, Any]:
    """What a pipeline says at its end that was disturbed so; one whose head went is submitted again."""
    run = Run(hosts, f"{fault}-{hosts.id}", pipeline(f"{BUCKET}/{fault}", settings))
    disturb(fault, hosts, endpoint, run)
    try:
        return run.summary()
    except RuntimeError:
        if fault != "kill-head":
            raise
        return Run(hosts, f"{fault}-again", pipeline(f"{BUCKET}/{fault}", settings)).summary()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faults", nargs="*", choices=[*FAULTS, []], default=[])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--picture", help="a .png")
    given = parser.parse_args()
    settings = [f"--set={setting}" for setting in given.set]
    sys.exit(main(given.faults or list(FAULTS), given.workers, given.items, settings, given.picture))
