"""What a further node brings: preparing and embedding on one, two and three hosts of one core each.

    python -m benchmarks.speed.nodes [--items 2304] [--cost 0.04] [--nodes 1 2 3]

A simulation, for a machine with fewer cores than that: an item costs `--cost` seconds more in the stage that is
measured, in which no core is used, so that hosts do not take each other's. All else (Ray, S3, the plan, the driver) is
real. The hosts are those of `benchmarks.hosts`. A rate is that from when each host has done a piece to the last piece;
`seconds` is the whole stage, Ray's start of workers included. Prints one JSON object for each number of nodes.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from typing import Any

import pyarrow as pa

from benchmarks.hosts import BUCKET, PATIENCE_SECONDS, Endpoint, Hosts, fill, reached, wait
from pixrec import storage
from pixrec.artifact import save_model, untrained_model
from pixrec.artifact.embedding import ItemEmbedder
from pixrec.cluster import embed, prepare
from pixrec.cluster.session import connect
from pixrec.config import load_config

COST = "PIXREC_BENCHMARK_SECONDS_AN_ITEM"
CONFIG = """
model: {user_tower: compact}
prepare: {num_cpus_per_task: 1}
embed: {batch_size: 12, max_part_items: 12, num_actors: %d, cpus_per_actor: 0.5, cpus_per_decode: 0.5}
job: {cpus: 1}
"""


class SlowEmbedder(ItemEmbedder):
    """An actor to which an item costs more."""

    def __call__(self, block: pa.Table) -> pa.Table:
        time.sleep(float(os.environ[COST]) * len(block))
        return super().__call__(block)


def slow_answer(row: dict[str, Any], *, work: Any) -> dict[str, str]:
    """What a task of prepare says, later where it is about items."""
    if "stop" in row:
        time.sleep(float(os.environ[COST]) * (row["stop"] - row["start"]))
    return _answer(row, work=work)


_answer = prepare._answer


class Watch:
    """A progress that remembers when how much was done."""

    def __init__(self, words: str, nodes: int) -> None:
        self._words, self._nodes, self._began = words, nodes, time.monotonic()
        self._seen: list[tuple[float, int]] = []

    def __call__(self, words: str, done: int, total: int | None, note: str = "", /) -> None:
        if words == self._words and done > (self._seen[-1][1] if self._seen else 0):
            self._seen.append((time.monotonic(), done))

    def told(self) -> dict[str, float]:
        (first, before), (last, after) = self._seen[self._nodes - 1], self._seen[-1]
        rate = (after - before) / (last - first)
        return {"items_per_second": round(rate, 2), "seconds": round(time.monotonic() - self._began, 1)}


def inside(place: str, nodes: int) -> None:
    """The job: both stages on the cluster of so many workers that it runs in."""
    config = load_config(storage.read_text(f"{BUCKET}/config.yaml"))
    embed.ItemEmbedder = SlowEmbedder  # type: ignore[misc]
    prepare._answer = slow_answer
    items, events = (f"{BUCKET}/catalog/{table}.parquet" for table in ("items", "interactions"))
    data, model = f"{place}/data", f"{place}/model"
    with connect():
        preparing = Watch("preparing items", nodes)
        prepare.prepare(items, events, data, config.prepare, preparing)
        found = {"prepare": preparing.told()}
        with tempfile.TemporaryDirectory() as local:
            save_model(local, untrained_model(config, [data]), {})
            storage.copy_folder(local, model)
        embedding = Watch("embed", nodes)
        embed.embed(model, data, f"{place}/index", config, progress=embedding)
    print(json.dumps({**found, "embed": embedding.told()}))


def on_hosts(nodes: int, items: int, cost: float) -> dict[str, Any]:
    """What the job says on so many hosts."""
    with Hosts(nodes, cpus=1) as hosts, Endpoint(hosts.gateway), reached(hosts):
        fill(hosts, items, 100, CONFIG % nodes)
        hosts.ready()
        command = f"{sys.executable} -m benchmarks.speed.nodes --inside {BUCKET}/made-{nodes} --nodes {nodes}"
        environment = {"env_vars": {COST: str(cost)}}
        name = hosts.ask("/api/jobs/", {"entrypoint": command, "runtime_env": environment})["submission_id"]
        wait(lambda: hosts.job(name).get("status") in ("SUCCEEDED", "FAILED"), PATIENCE_SECONDS, "the job")
        log = hosts.ask(f"/api/jobs/{name}/logs")["logs"]
        if hosts.job(name)["status"] == "FAILED":
            raise RuntimeError(log[-3000:])
        return {"nodes": nodes, **json.loads(next(line for line in log.splitlines() if line.startswith("{")))}


def main(nodes: list[int], items: int, cost: float) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the hosts go too
    alone: dict[str, float] = {}
    for count in nodes:
        found = on_hosts(count, items, cost)
        for stage in ("prepare", "embed"):
            rate = found[stage]["items_per_second"]
            found[stage]["of_perfect"] = round(rate / (count * alone.setdefault(stage, rate / count)), 3)
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--items", type=int, default=2304)
    parser.add_argument("--cost", type=float, default=0.04)
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside:
        inside(given.inside, *given.nodes)
    else:
        main(given.nodes, given.items, given.cost)
