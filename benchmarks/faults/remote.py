"""Every verb on local folders and on an S3 endpoint alone, and whether both give the same.

    python -m benchmarks.faults.remote

A small synthetic catalog and a compact tower, two workers. The endpoint is moto's server on the loopback. Of the second
run nothing lies in a local folder but the cache of the node, which begins empty. Compared are the tables, the losses of
all steps, the vectors and the metrics.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from moto.server import ThreadedMotoServer

from pixrec import storage
from pixrec.artifact import load_index
from pixrec.config import SyntheticConfig
from pixrec.data.sequences import load_dataset
from pixrec.data.synthetic import build_world, write_catalog
from pixrec.training.tracking import read_log

BUCKET = "s3://warehouse"
CONFIG = """
model: {user_tower: compact}
train: {max_steps: 30, validate_every_steps: 15, feed: ray_data, compact: {epochs: 2, validate_every_epochs: 1}}
evaluate: {scorers: [popularity, recent_popularity, repeat_last, item_transition]}
"""


def main() -> int:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line a request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ |= {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    fs, _ = storage.locate(BUCKET)
    fs.mkdir(BUCKET.removeprefix("s3://"))
    with tempfile.TemporaryDirectory(prefix="pixrec-remote-") as folder:
        os.environ["PIXREC_CACHE"] = str(Path(folder) / "cache")
        config = Path(folder) / "config.yaml"
        config.write_text(CONFIG)
        write_catalog(build_world(SyntheticConfig(num_items=200, num_users=400)), f"{folder}/catalog")
        for file in storage.list_files(f"{folder}/catalog"):
            storage.write_bytes(f"{BUCKET}/catalog{file.removeprefix(f'{folder}/catalog')}", storage.read_bytes(file))
        found = {place: everything(place, str(config)) for place in (folder, BUCKET)}
    server.stop()
    alike = {name: same(found[folder][name], found[BUCKET][name]) for name in found[folder]}
    for name, equal in alike.items():
        print(f"{name}: {'the same' if equal else 'DIFFERENT'}")
    return 0 if all(alike.values()) else 1


def everything(place: str, config: str) -> dict[str, Any]:
    """Run all verbs at `place`; what came of them."""
    tables = [f"--{name}={place}/catalog/{name}.parquet" for name in ("items", "interactions")]
    data, model, index = (f"--{name}={place}/{name}" for name in ("data", "model", "index"))
    runs = {
        "prepare": [*tables, f"--out={place}/data"],
        "train": [data, f"--out={place}/model"],
        "embed": [model, data, f"--out={place}/index"],
        "evaluate": [model, data, index, f"--out={place}/report"],
    }
    for verb, arguments in runs.items():
        began = time.monotonic()
        program = str(Path(sys.executable).parent / "pixrec")
        subprocess.run([program, verb, *arguments, "--config", config], check=True, capture_output=True)
        print(f"{verb} at {place}: {time.monotonic() - began:.0f} s", flush=True)
    dataset, found = load_dataset(f"{place}/data"), load_index(f"{place}/index")
    order = np.argsort(list(found.item_ids))
    rows = read_log(f"{place}/model")
    return {
        "events": (np.array(dataset.events.rows), np.array(dataset.events.offsets), dataset.info["fingerprint"]),
        "losses": np.array([row["loss"] for row in rows if "loss" in row]),
        "vectors": found.vectors[order],
        "metrics": storage.read_json(f"{place}/report/metrics.json")["results"],
    }


def same(one: Any, other: Any) -> bool:
    if isinstance(one, tuple):
        return all(same(a, b) for a, b in zip(one, other, strict=True))
    return bool(np.array_equal(one, other)) if isinstance(one, np.ndarray) else one == other


if __name__ == "__main__":
    raise SystemExit(main())
