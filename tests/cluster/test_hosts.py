"""Several hosts on this machine, each a network namespace, that share an S3 endpoint and no folder. Skipped where
namespaces are not allowed; `python -m benchmarks.faults.hosts` has more faults, and compares with a single machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.faults.hosts import BUCKET, Endpoint, Hosts, NotAllowed, Run, fill, pipeline, reached
from pixrec import storage
from pixrec.artifact import list_versions, load_index
from pixrec.data.sequences import load_dataset

ITEMS, USERS, STEPS = 24, 48, 8
CONFIG = f"""
model: {{max_history_items: 4, tiny: {{hidden_width: 32, num_layers: 1, vision_width: 32, vision_layers: 1}}}}
train: {{num_workers: 1, max_workers: 2, cpus_per_worker: 2, max_steps: {STEPS}, validate_every_steps: 2}}
embed: {{batch_size: 8, max_part_items: 8, num_actors: 2, cpus_per_actor: 1}}
evaluate: {{scorers: [popularity], bootstrap_samples: 50}}
job: {{cpus: 1, memory_gib: 0.5}}
"""


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    try:
        with Hosts(workers=2) as hosts, Endpoint(hosts.gateway), reached(hosts):
            fill(hosts, ITEMS, USERS, CONFIG)
            hosts.ready()
            yield hosts
    except NotAllowed as reason:
        pytest.skip(f"this machine makes no hosts: {reason}")


def test_the_doctor_finds_three_healthy_nodes(hosts: Hosts) -> None:
    places = ["--read", f"{BUCKET}/catalog", "--write", f"{BUCKET}/out", f"--config={BUCKET}/config.yaml"]
    summary = Run(hosts, "doctor", ["doctor", *places]).summary()
    assert summary["faults"] == []
    assert {node["name"] for node in summary["nodes"]} == {host.address for host in hosts.hosts}
    assert [node["cpus"] for node in summary["nodes"] if node["is_head"]] == [0]


def test_a_node_is_lost_during_training(hosts: Hosts) -> None:
    run = Run(hosts, "nightly", pipeline(f"{BUCKET}/out"))
    run.until(r"train both step 2:")
    driver = hosts.driver_host("nightly")
    assert driver in hosts.workers, "the job's own process takes no place on the head"
    next(host for host in hosts.workers if host is not driver).kill()
    joined = Run(hosts, "nightly", ["pipeline", "--of", "no matter"])
    summary = run.summary()
    assert joined.summary() == summary, "a second one of the name joins"
    assert summary["steps"] == dict.fromkeys(["prepare", "train", "embed", "evaluate"], "made")
    assert summary["published_model"] == "new"
    assert len(hosts.nodes()) == 2

    found, data = load_index(summary["index"]), load_dataset(summary["data"])
    assert sorted(found.item_ids) == sorted(data.items.item_ids), "every item once"
    assert found.version == summary["version"]
    assert [v["current"] for v in list_versions(summary["index"])] == [True]
    losses = [row for row in storage.read_text(f"{summary['model']}/training.jsonl").splitlines() if '"loss"' in row]
    assert len(losses) == STEPS
