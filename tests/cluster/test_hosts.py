"""Several hosts on this machine, each a network namespace, that share an S3 endpoint and no folder. Skipped where
namespaces are not allowed, and where Ray's nodes do not start in time. What is run here is a job off the head that asks
all of them; `python -m benchmarks.faults.hosts` runs whole pipelines on such hosts and kills some of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.hosts import BUCKET, Endpoint, Hosts, NotAllowed, Run, fill, reached, wait
from benchmarks.scrape import dashboard_queries, installed, scraping

START_SECONDS, RUN_SECONDS = 240, 600
CONFIG = "{train: {num_workers: 1}, job: {cpus: 1, memory_gib: 0.5}}"


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    try:
        with Hosts(workers=2, start_seconds=START_SECONDS) as hosts, Endpoint(hosts.gateway), reached(hosts):
            fill(hosts, items=24, users=48, config=CONFIG)
            hosts.ready()
            yield hosts
    except (NotAllowed, TimeoutError) as reason:  # Ray gives a node 30 s to register, whatever the machine's load
        pytest.skip(f"this machine makes no hosts: {reason}")


def test_the_doctor_finds_three_healthy_nodes(hosts: Hosts) -> None:
    places = ["--read", f"{BUCKET}/catalog", "--write", f"{BUCKET}/out", f"--config={BUCKET}/config.yaml"]
    summary = Run(hosts, "doctor", ["doctor", *places]).summary(RUN_SECONDS)
    assert summary["faults"] == []
    assert {node["name"] for node in summary["nodes"]} == {host.address for host in hosts.hosts}
    assert [node["cpus"] for node in summary["nodes"] if node["is_head"]] == [0]


@pytest.mark.skipif(not installed(), reason="Debian's prometheus is not installed")
def test_the_dashboard_shows_every_node(hosts: Hosts) -> None:
    queries = {name: query for name, query in dashboard_queries("1m").items() if "ray_node" in query}
    assert queries
    with scraping(f"{hosts.head.address}:8265", "1s", hosts.metrics()) as prometheus:
        for query in queries.values():
            wait(lambda query=query: len(prometheus.values(query)) == len(hosts.hosts), START_SECONDS, query)
