"""What is counted, and how the counts of several processes become one page for Prometheus."""

from __future__ import annotations

import math
from types import SimpleNamespace

from prometheus_client.parser import text_string_to_metric_families

from pixrec.query import COSINE, PURCHASE_SHARE, Answer
from pixrec.serving.metrics import ReplicaMetrics, RequestMetrics, merged, recalls, unix_time


def samples(text: str) -> dict[tuple[str, str], float]:
    """Value by name and by the values of the labels, in the order of their names."""
    found = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {
        (sample.name, ",".join(sample.labels[name] for name in sorted(sample.labels))): sample.value for sample in found
    }


def rollout() -> SimpleNamespace:
    recommender = SimpleNamespace(model_version="m", index_version="i")
    manifest = {"time": "2026-11-28T00:00:00+00:00", "rows": 12, "recall_of_float32": {"recall@10": 0.9, "queries": 5}}
    return SimpleNamespace(
        in_use=(recommender, manifest), canary=None, outcomes={"refused": 2}, refused="made by another model"
    )


def test_a_replica_tells_its_version_and_what_it_answered() -> None:
    metrics = ReplicaMetrics(rollout())
    metrics.answered(3, [Answer([], COSINE, "m", "i", ["ghost"]), Answer([], PURCHASE_SHARE, "m", "i", fallback=True)])
    with metrics.stage("encode"):
        pass
    for _ in range(2):  # a second scrape counts nothing twice
        found = samples(metrics.text())
    assert found["pixrec_answers_total", ""] == 2
    assert found["pixrec_fallbacks_total", ""] == 1
    assert (found["pixrec_unknown_items_total", ""], found["pixrec_history_items_total", ""]) == (1, 3)
    assert found["pixrec_reloads_total", "refused"] == 2
    assert found["pixrec_version_refused", ""] == 1
    assert found["pixrec_version_info", "i,m"] == 1
    assert found["pixrec_index_published_seconds", ""] == 1795824000
    assert found["pixrec_index_recall", "recall_of_float32 recall@10"] == 0.9
    assert found["pixrec_stage_seconds_count", "encode"] == 1
    assert found["process_resident_memory_bytes", ""] > 0


def test_what_two_versions_answer_is_told_apart() -> None:
    both = rollout()
    both.canary = SimpleNamespace(model_version="m2", index_version="i2")
    metrics = ReplicaMetrics(both)
    metrics.answered(1, [Answer([], COSINE, "m", "i"), Answer([], PURCHASE_SHARE, "m2", "i2", fallback=True)])
    metrics.took("i2", 0.02)
    found = samples(metrics.text())
    assert (found["pixrec_version_answers_total", "i"], found["pixrec_version_answers_total", "i2"]) == (1, 1)
    assert (found["pixrec_version_fallbacks_total", "i"], found["pixrec_version_fallbacks_total", "i2"]) == (0, 1)
    assert found["pixrec_version_seconds_count", "i2"] == 1
    assert found["pixrec_canary_info", "i2,m2"] == 1
    both.canary = None
    left = samples(metrics.text())
    assert not [name for name, labels in left if "i2" in labels.split(",")], "a version that is gone leaves no series"


def test_pages_of_several_processes_become_one() -> None:
    first, second = RequestMetrics(), RequestMetrics()
    first.answered("/v1/recommend", 200, 0.1)
    second.answered("/v1/recommend", 200, 0.2)
    second.answered("/v1/recommend", 503, 0.2)
    text = merged([({"replica": "a"}, first.text()), ({"replica": "b"}, second.text())])
    assert text.count("# TYPE pixrec_requests_total counter") == 1
    found = samples(text)
    assert found["pixrec_requests_total", "200,a,/v1/recommend"] == 1
    assert found["pixrec_requests_total", "503,b,/v1/recommend"] == 1


def test_what_a_manifest_does_not_say() -> None:
    assert math.isnan(unix_time(None))
    assert dict(recalls({"rows": 3})) == {}
    assert dict(recalls({"recall": 0.98})) == {"recall": 0.98}
