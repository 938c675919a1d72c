"""What is counted and measured, for Prometheus. A process counts by itself; one scrape gathers all of them.

Knows prometheus_client; knows no Ray and no model. Nothing here holds a history, a text or a key.
"""

from __future__ import annotations

import contextlib
import datetime
import time
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from pixrec.query import Answer
from pixrec.serving.published import Outcome, Rollout

if TYPE_CHECKING:
    from pixrec.serving.shards import Held

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)

arrived: ContextVar[float] = ContextVar("arrived")
"""When the request at hand came in, by `time.perf_counter`."""


class Counted:
    """What every process measures of itself."""

    def __init__(self) -> None:
        disable_created_metrics()
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._stages = self._histogram("pixrec_stage_seconds", "Time spent in a stage", SECONDS, "stage")

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measures a block as the stage `name`."""
        with self._stages.labels(name).time():
            yield

    def text(self) -> str:
        return generate_latest(self.registry).decode()

    def _counter(self, name: str, what: str, *labels: str) -> Counter:
        return Counter(name, what, labels, registry=self.registry)

    def _gauge(self, name: str, what: str, *labels: str) -> Gauge:
        return Gauge(name, what, labels, registry=self.registry)

    def _histogram(self, name: str, what: str, buckets: Iterable[float], *labels: str) -> Histogram:
        return Histogram(name, what, labels, buckets=tuple(buckets), registry=self.registry)


class RequestMetrics(Counted):
    """Of an HTTP replica: requests by route and code."""

    def __init__(self) -> None:
        super().__init__()
        self._requests = self._counter("pixrec_requests", "Requests answered", "route", "code")
        self._seconds = self._histogram("pixrec_request_seconds", "Time to answer a request", SECONDS, "route")
        self.in_flight = self._gauge("pixrec_requests_in_flight", "Requests that wait for their answer")

    def answered(self, route: str, code: int, seconds: float) -> None:
        self._requests.labels(route, code).inc()
        self._seconds.labels(route).observe(seconds)

    def validated(self) -> None:
        """The request at hand is read and checked, and goes on to the model."""
        with contextlib.suppress(LookupError):
            self._stages.labels("validate").observe(time.perf_counter() - arrived.get())


class ReplicaMetrics(Counted):
    """Of a replica that holds a version: batches, answers and the version itself."""

    def __init__(self, rollout: Rollout) -> None:
        super().__init__()
        self._rollout = rollout
        self.batch_size = self._histogram("pixrec_batch_size", "Histories encoded in one forward pass", BATCHES)
        self._answers = self._counter("pixrec_answers", "Recommendations given")
        self._fallbacks = self._counter("pixrec_fallbacks", "Recommendations by popularity: no item was known")
        self._items = self._counter("pixrec_history_items", "Items in histories")
        self._unknown = self._counter("pixrec_unknown_items", "Items in histories that nobody knows")
        self._reloads = self._counter("pixrec_reloads", "Looks for another version", "outcome")
        self._refused = self._gauge("pixrec_version_refused", "1 while the published version cannot be served")
        self._info = self._gauge("pixrec_version_info", "The versions in use", "model_version", "index_version")
        self._published = self._gauge("pixrec_index_published_seconds", "When the index was published, in Unix time")
        self._rows = self._gauge("pixrec_index_items", "Items in the index")
        self._recall = self._gauge("pixrec_index_recall", "Measured recall of the index, by name", "name")
        self._canary = self._gauge("pixrec_canary_info", "The canary's versions", "model_version", "index_version")
        by_version = ("index_version",)
        self._of_version = self._counter("pixrec_version_answers", "Recommendations given, by version", *by_version)
        self._empty = self._counter("pixrec_version_fallbacks", "Those by popularity, by version", *by_version)
        self._took = self._histogram("pixrec_version_seconds", "Time to answer a batch", SECONDS, *by_version)
        self._lost = self._counter("pixrec_shard_misses", "Searches that a part of the index did not answer", "shard")
        self._told: dict[Outcome, int] = {}

    def lost_shard(self, number: int) -> None:
        self._lost.labels(number).inc()

    def answered(self, history_items: int, answers: Iterable[Answer]) -> None:
        self._items.inc(history_items)
        for answer in answers:
            self._answers.inc()
            self._fallbacks.inc(answer.fallback)
            self._of_version.labels(answer.index_version).inc()
            self._empty.labels(answer.index_version).inc(answer.fallback)
            self._unknown.inc(len(answer.unknown_items))

    def took(self, index_version: str, seconds: float) -> None:
        self._took.labels(index_version).observe(seconds)

    def _forget(self, versions: set[str]) -> None:
        """All versions but these, which are in use: there would be more of them with every publication."""
        for counted in (self._of_version, self._empty, self._took):
            for family in counted.collect():
                for version in {sample.labels["index_version"] for sample in family.samples} - versions:
                    counted.remove(version)

    def text(self) -> str:
        rollout = self._rollout
        for outcome, count in rollout.outcomes.items():
            self._reloads.labels(outcome).inc(count - self._told.get(outcome, 0))
            self._told[outcome] = count
        self._refused.set(rollout.refused is not None)
        recommender, manifest = rollout.in_use
        self._info.clear()
        self._info.labels(recommender.model_version, recommender.index_version).set(1)
        self._canary.clear()
        if rollout.canary is not None:
            self._canary.labels(rollout.canary.model_version, rollout.canary.index_version).set(1)
        self._forget({held.index_version for held in (recommender, rollout.canary) if held is not None})
        self._published.set(unix_time(manifest.get("time")))
        self._rows.set(manifest.get("rows", 0))
        for name, recall in recalls(manifest):
            self._recall.labels(name).set(recall)
        return super().text()


class ShardMetrics(Counted):
    """Of a replica that searches a part of an index: the versions of it that it holds."""

    def __init__(self, held: Held) -> None:
        super().__init__()
        self._held = held
        self._info = self._gauge("pixrec_shard_info", "The versions held", "model_version", "index_version")

    def text(self) -> str:
        self._info.clear()
        for versions in self._held.versions():
            self._info.labels(versions.model_version, versions.index_version).set(1)
        return super().text()


def recalls(manifest: Mapping[str, object]) -> Iterator[tuple[str, float]]:
    """What a manifest says of the recall of its index, by name."""
    for name, value in manifest.items():
        if name.startswith("recall"):
            for inner, number in value.items() if isinstance(value, Mapping) else [("", value)]:
                if isinstance(number, (int, float)) and (not inner or inner.startswith("recall")):
                    yield f"{name} {inner}".strip(), float(number)


def unix_time(written: object) -> float:
    """Seconds since the epoch of an ISO time; NaN where there is none."""
    try:
        return datetime.datetime.fromisoformat(str(written)).timestamp()
    except ValueError:
        return float("nan")


def merged(texts: Iterable[tuple[Mapping[str, str], str]]) -> str:
    """One exposition of those of several processes, each with labels that tell it apart."""
    families: dict[str, Metric] = {}
    for labels, text in texts:
        for family in text_string_to_metric_families(text):
            whole = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                whole.samples.append(sample._replace(labels={**sample.labels, **labels}))

    class Gathered:
        def collect(self) -> Iterable[Metric]:
            return families.values()

    return generate_latest(Gathered()).decode()
