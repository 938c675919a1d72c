"""The dashboard's queries, evaluated by a real Prometheus that scrapes what replicas expose. Takes a few seconds."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from benchmarks.scrape import dashboard_queries, installed, scraping
from pixrec.query import COSINE, PURCHASE_SHARE, Answer
from pixrec.serving.backend import Versions
from pixrec.serving.metrics import ReplicaMetrics, RequestMetrics, ShardMetrics, merged

MANIFEST = {"time": "2026-11-28T00:00:00+00:00", "rows": 12, "recall": {"recall@10": 0.98}}


RAY = """ray_node_cpu_utilization{instance="n"} 5
ray_object_store_memory{Location="MMAP_SHM"} 7
ray_serve_deployment_queued_queries{deployment="Ingress"} 0
"""
"""As the nodes of Ray tell it, on pages of their own."""


class Replicas:
    """One of each kind, with a canary, whose counts go up with every scrape."""

    def __init__(self) -> None:
        stable, canary = (SimpleNamespace(model_version="m", index_version=name) for name in ("stable", "canary"))
        self.outcomes = {"swapped": 1}
        rollout = SimpleNamespace(in_use=(stable, MANIFEST), canary=canary, outcomes=self.outcomes, refused=None)
        self.ingress, self.model = RequestMetrics(), ReplicaMetrics(rollout)  # type: ignore[arg-type]
        self.shard = ShardMetrics(SimpleNamespace(versions=lambda: [Versions("m", "stable")]))  # type: ignore[arg-type]

    def page(self) -> str:
        self.ingress.answered("/v1/recommend", 200, 0.02)
        self.ingress.answered("/healthz", 200, 0.001)
        self.model.batch_size.observe(4)
        self.model.answered(8, [Answer([], COSINE, "m", "stable")] * 3)
        self.model.answered(2, [Answer([], PURCHASE_SHARE, "m", "canary", ["ghost"], fallback=True)])
        self.model.lost_shard(1)
        for version in ("stable", "canary"):
            self.model.took(version, 0.01)
        for counted, stage in ((self.model, "encode"), (self.model, "retrieve"), (self.shard, "search")):
            with counted.stage(stage):
                pass
        self.outcomes["swapped"] += 1
        kinds = {"Ingress": self.ingress, "Recommender": self.model, "Retrieval1": self.shard}
        own = merged([({"deployment": kind, "replica": "r"}, counted.text()) for kind, counted in kinds.items()])
        return own + RAY


@pytest.fixture
def target() -> Iterator[str]:
    replicas = Replicas()

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            page = replicas.page().encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.send_header("Content-Length", str(len(page)))
            self.end_headers()
            self.wfile.write(page)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_every_query_of_the_dashboard_gives_numbers(target: str) -> None:
    if not installed():
        pytest.skip("Debian's prometheus is not installed")
    queries = dashboard_queries("1m")
    with scraping(target, "500ms") as prometheus:
        deadline, found = time.monotonic() + 60, dict[str, dict[str, float]]()
        while time.monotonic() < deadline and not all(found.get(name) for name in queries):
            found = {name: prometheus.values(query) for name, query in queries.items()}
            time.sleep(0.2)
    assert not [name for name, values in found.items() if not values]
    assert found["Fallbacks and unknown items: answers by popularity"] == {"{}": pytest.approx(0.25)}
    assert found["Fallbacks and unknown items: unknown items"] == {"{}": pytest.approx(0.1)}
    assert found["Histories in a batch: mean"] == {"{}": 4}
    by_version = found["Answers by version: {{index_version}}"]
    assert by_version['{"index_version": "stable"}'] == pytest.approx(3 * by_version['{"index_version": "canary"}'])
    assert found["Shards without an answer: {{shard}}"]['{"shard": "1"}'] > 0
    assert found["Published version refused: refused"] == {"{}": 0}
