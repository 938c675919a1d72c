"""Every verb on a large shop, and the memory of each process that takes part.

    python -m benchmarks.scale.shop SHOP [--items 1000000] [--events 50000000]
    python -m benchmarks.scale.pipeline SHOP OUT [--steps 500] [--users 20000] [--verbs prepare train embed ...]

Runs `pixrec prepare`, `train` (two workers, a compact user tower on a small item tower that reads the texts), for four
minutes `embed` with a model of the default shape, which sees the pictures too, and then `embed`, `evaluate` and `serve`
with the trained model, each as a user would start it. Every few seconds reads the proportional set size (what is its
own, and its share of what several map) of all processes. Prints, and adds to OUT/memory.json, for each verb its time
and for each kind of process the largest one at its peak, with how much of that is its own; and the peak of the sum of
all. A verb whose result is there already is passed over. `index` in place of `embed` writes the index from the item
vectors that the training has left in the cache of the node, which saves an hour. Linux only.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
import urllib.request
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.processes import below
from benchmarks.scale.memory import memory_mib
from pixrec import storage
from pixrec.artifact import index_version, load_model, save_model, untrained_model
from pixrec.config import Config
from pixrec.data.sequences import load_dataset
from pixrec.index import shared_tensor
from pixrec.training.content import ROWS_AT_A_TIME
from pixrec.training.phases import id_rows_of

VERBS = ("prepare", "train", "pictures", "embed", "index", "evaluate", "serve")
SECONDS_BETWEEN = 3.0
PICTURES_SECONDS = 240
PORT = 8123
CONFIG = """
model: {user_tower: compact, modalities: text, embedding_width: 64, tiny: {hidden_width: 64, num_layers: 1}}
train:
  max_steps: 30
  validate_every_steps: 30
  num_workers: 2
  compact: {loss: sampled, epochs: 1, max_steps: STEPS, validate_every_steps: STEPS, max_validation_users: 500}
embed: {batch_size: 64}
evaluate: {scorers: [popularity], max_users: USERS, seen: filtered}
"""


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale.pipeline", description=__doc__.splitlines()[0])
    parser.add_argument("shop", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--users", type=int, default=20_000)
    parser.add_argument("--verbs", nargs="+", choices=VERBS, default=[verb for verb in VERBS if verb != "index"])
    parser.add_argument("--write-index", action="store_true", help=argparse.SUPPRESS)
    a = parser.parse_args(argv)
    if a.write_index:
        return write_index(a.out)
    a.out.mkdir(parents=True, exist_ok=True)
    config = a.out / "config.yaml"
    config.write_text(CONFIG.replace("STEPS", str(a.steps)).replace("USERS", str(a.users)))
    results = a.out / "memory.json"
    found: dict[str, Any] = json.loads(results.read_text()) if results.exists() else {}
    for verb in a.verbs:
        if verb in found:
            continue
        found[verb] = run(verb, command(verb, a.shop, a.out, config), a.out)
        results.write_text(json.dumps(found, indent=1))
        print(table({verb: found[verb]}), flush=True)
    return 0


def command(verb: str, shop: Path, out: Path, config: Path) -> list[str]:
    data, model, index = (str(out / name) for name in ("data", "model", "index"))
    both = ["--model", model, "--data", data]
    arguments = {
        "prepare": ["--items", str(shop / "items"), "--interactions", str(shop / "interactions"), "--out", data],
        "train": ["--data", data, "--out", model, "--config", str(config)],
        "embed": [*both, "--out", index, "--config", str(config)],
        "evaluate": [*both, "--index", index, "--out", str(out / "report"), "--config", str(config)],
        "serve": [*both, "--index", index, "--port", str(PORT)],
    }
    program = str(Path(sys.executable).parent / "pixrec")
    if verb == "index":
        return [sys.executable, "-m", "benchmarks.scale.pipeline", str(shop), str(out), "--write-index"]
    if verb != "pictures":
        return [program, verb, *arguments[verb]]
    seeing = str(out / "model-pictures")
    save_model(seeing, untrained_model(Config(), [data]), {})
    return [program, "embed", "--model", seeing, "--data", data, "--out", str(out / "index-pictures")]


def write_index(out: Path) -> int:
    """The index that `pixrec embed` would make, of the content vectors that training mapped."""
    dataset, model = load_dataset(str(out / "data")), load_model(str(out / "model"))
    tower, total = model.tower.compact, len(dataset.items)
    assert tower is not None
    (place,) = Path(storage.node_place("")).glob(f"content-*-{dataset.items.row_of.digest}.npy")
    content, id_rows = shared_tensor(np.load(place, mmap_mode="r")), torch.from_numpy(id_rows_of(model, dataset))
    facts = {"data": str((out / "data").absolute())}
    with index_version(
        str(out / "index"), model.fingerprint, model.config.model.index_width, "float32", facts
    ) as index:
        for start in range(0, total, ROWS_AT_A_TIME):
            rows = slice(start, min(total, start + ROWS_AT_A_TIME))
            with torch.no_grad():
                vectors = tower.item_vectors(content[rows], id_rows[rows]).numpy()
            ids = [dataset.items.item_ids[row] for row in range(rows.start, rows.stop)]
            index.add(ids, vectors, ["0" * 32] * len(ids))
    return 0


def run(verb: str, line: list[str], out: Path) -> dict[str, Any]:
    """Seconds, and by kind of process MiB at the peak."""
    largest: dict[str, dict[str, float]] = defaultdict(lambda: {"pss": 0.0})
    most, began, last = 0.0, time.monotonic(), ""
    log = out / f"{verb}.log"
    with log.open("w") as errors, subprocess.Popen(line, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
        while process.poll() is None:
            total = 0.0
            for number, name in {process.pid: "driver", **below(process.pid)}.items():
                now = memory_mib(number)
                kind = "driver" if number == process.pid else kind_of(name)
                total += now.get("pss", 0.0)
                largest[kind] = max(largest[kind], now, key=lambda one: one.get("pss", 0.0))
            most = max(most, total)
            if verb == "serve" and is_ready():
                last = ask(out)
                process.terminate()
            if verb == "pictures" and time.monotonic() - began > PICTURES_SECONDS:
                process.terminate()
            time.sleep(SECONDS_BETWEEN)
        assert process.stdout is not None
        last = last or process.stdout.read().strip().rpartition("\n")[2]
    if process.returncode and verb not in ("serve", "pictures"):
        raise SystemExit(f"{verb} ended with {process.returncode}: {log}")
    return {"seconds": round(time.monotonic() - began), "tree": round(most), "kinds": largest, "result": last}


def kind_of(command_line: str) -> str:
    """What a process is, from its command line."""
    if found := re.match(r"ray::\w+", command_line):
        return found[0]
    for name in ("raylet", "gcs_server"):
        if f"/{name}" in command_line.split(" ")[0]:
            return name
    return "others of Ray" if "ray" in command_line else "others"


def is_ready() -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/healthz", timeout=1) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def ask(out: Path) -> str:
    """200 requests, each with a history of its own; milliseconds of the median."""
    dataset = load_dataset(str(out / "data"))
    times = []
    for user in range(200):
        start = int(dataset.events.offsets[user])
        history = [dataset.items.item_ids[int(row)] for row in dataset.events.rows[start : start + 10]]
        body = json.dumps({"history": history, "k": 10}).encode()
        asked = urllib.request.Request(
            f"http://127.0.0.1:{PORT}/v1/recommend", body, {"content-type": "application/json"}
        )
        began = time.monotonic()
        with urllib.request.urlopen(asked, timeout=60) as answer:
            assert len(json.load(answer)["items"]) == 10
        times.append(1000 * (time.monotonic() - began))
    return json.dumps({"requests": len(times), "median_ms": round(sorted(times)[100], 1)})


def table(found: dict[str, Any]) -> str:
    lines = []
    for verb, result in found.items():
        lines.append(
            f"{verb}: {result['seconds']} s, all processes together {result['tree']:,} MiB. {result['result']}"
        )
        for kind, peak in sorted(result["kinds"].items(), key=lambda pair: -pair[1]["pss"]):
            own, files = peak.get("anonymous", 0.0), peak.get("files", 0.0)
            lines.append(f"  {kind:44} {peak['pss']:9,.0f} MiB, {own:9,.0f} its own, {files:8,.0f} files")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
