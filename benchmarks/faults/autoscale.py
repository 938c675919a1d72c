"""Nodes that come for what a job asks and go afterwards: Ray's autoscaler (v2) over its provider of fake nodes.

    python -m benchmarks.faults.autoscale [--items 200]

A head that takes no work, up to two nodes for decoding (2 CPUs) and up to two for models (2 CPUs, 1 GPU), none at
first, each a Ray node of its own on one host of `benchmarks.hosts`. Their GPUs are numbers only: embedding computes on
CPUs there, and training gets its nodes but then fails for want of CUDA. Each verb is one `pixrec submit`; which nodes
there were in the meantime is printed, and how long it took until all had gone.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FakeMultiNodeProvider

from benchmarks.hosts import BUCKET, PATIENCE_SECONDS, Endpoint, Hosts, Run, fill, reached, wait

IDLE_MINUTES = 0.25
STORE = {"object_store_memory": 100 * 1024**2}
TYPES = {"decode": {"CPU": 2}, "model": {"CPU": 2, "GPU": 1}}
CONFIG = """
model: {user_tower: compact}
prepare: {num_cpus_per_task: 1}
train: {num_workers: 2, cpus_per_worker: 1, max_steps: 8, gpu_wait_seconds: 300}
embed: {batch_size: 16, max_part_items: 16, num_actors: 2, cpus_per_actor: 1, gpus_per_actor: 1}
evaluate: {scorers: [popularity], bootstrap_samples: 100}
job: {cpus: 1, memory_gib: 0, attempts: 1}  # a fake node cannot say how much memory it has
"""
ENVIRONMENT = {
    "RAY_FAKE_CLUSTER": "1",
    "RAY_enable_autoscaler_v2": "1",
    "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
}


def autoscaling(folder: Path) -> str:
    """The file that the head is started with."""
    types: dict[str, Any] = {
        name: {"resources": {**resources, **STORE}, "node_config": {}, "max_workers": 2}
        for name, resources in TYPES.items()
    }
    head = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
    # By its class: Ray's wheel lacks the file of defaults that the name `fake_multinode` stands for.
    module = f"{FakeMultiNodeProvider.__module__}.{FakeMultiNodeProvider.__name__}"
    provider = {"type": "external", "module": module, "head_node_id": FAKE_HEAD_NODE_ID, "launch_multiple": True}
    commands = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    told = {
        **{f"{name}_commands": [] for name in commands},
        **{name: {} for name in ("auth", "docker", "file_mounts", "head_node", "worker_nodes")},
        **{name: [] for name in ("cluster_synced_files", "rsync_exclude", "rsync_filter")},
        "cluster_name": "pixrec",
        "max_workers": 4,
        "idle_timeout_minutes": IDLE_MINUTES,
        "upscaling_speed": 1.0,
        "provider": provider | dict.fromkeys(("disable_node_updaters", "disable_launch_config_check"), True),
        "available_node_types": types | {"ray.head.default": head},
        "head_node_type": "ray.head.default",
    }
    place = folder / "autoscaling.json"
    place.write_text(json.dumps(told))  # JSON is YAML
    return str(place)


def types(hosts: Hosts) -> dict[str, int]:
    """How many nodes of each type there are."""
    gpus = [node["resources_total"].get("GPU", 0) for node in hosts.nodes() if not node["is_head_node"]]
    return {"decode": gpus.count(0), "model": len(gpus) - gpus.count(0)}


@contextmanager
def watched(hosts: Hosts) -> Iterator[dict[str, int]]:
    """The most nodes of each type that were seen inside the block."""
    most, stop = dict.fromkeys(TYPES, 0), Event()

    def watch() -> None:
        while not stop.wait(0.5):
            for name, count in types(hosts).items():
                most[name] = max(most[name], count)

    thread = Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield most
    finally:
        stop.set()
        thread.join()


def main(items: int) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the hosts go too
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:  # a host has a /tmp of its own
        options = [f"--autoscaling-config={autoscaling(Path(folder))}"]
        with Hosts(0, head_options=options, more=ENVIRONMENT) as hosts, Endpoint(hosts.gateway), reached(hosts):
            fill(hosts, items, 2 * items, CONFIG)
            hosts.ready()
            tables = [f"--{table}={BUCKET}/catalog/{table}.parquet" for table in ("items", "interactions")]
            config, data, model = f"--config={BUCKET}/config.yaml", f"{BUCKET}/data", f"{BUCKET}/model"
            on_cpus = ["--set=train.num_workers=1", "--set=train.use_gpu=false"]
            verbs = {
                "prepare": ["prepare", *tables, "--out", data],
                "train, no GPU": ["train", "--data", data, "--out", model, *on_cpus],
                "embed, a GPU an actor": ["embed", "--model", model, "--data", data, "--out", f"{BUCKET}/index"],
                "train, two GPUs": ["train", "--data", data, "--out", f"{model}-gpu", "--set=train.use_gpu=true"],
            }
            for number, (name, verb) in enumerate(verbs.items()):
                print(json.dumps({"job": name, **one(hosts, f"job-{number}", [*verb, config])}), flush=True)


def one(hosts: Hosts, name: str, command: list[str]) -> dict[str, Any]:
    """Run a verb on a cluster that has no node; which came, and when they had gone."""
    began = time.monotonic()
    with watched(hosts) as most:
        try:
            Run(hosts, name, command).summary()
            ended = "done"
        except RuntimeError as error:
            ended = str(error).splitlines()[-1][-200:]
    took = time.monotonic()
    wait(lambda: not any(types(hosts).values()), PATIENCE_SECONDS, "the nodes to go")
    return {"ended": ended, "seconds": round(took - began), "most_nodes": most,
            "seconds_until_none": round(time.monotonic() - took)}  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=200)
    main(parser.parse_args().items)
