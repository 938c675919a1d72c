"""Kills one embed job again and again, at random moments, and shows that its index is that of an undisturbed one.

    python -m benchmarks.faults.kill [kills] [items]       (20 and 5000)

The victim, drawn by lot, is the driver, the model actor, a decoding worker or the node (its raylet); always SIGKILL.
When the job has ended it is started again, until it publishes.
"""

from __future__ import annotations

import collections
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks import catalogs
from benchmarks.processes import below
from pixrec.artifact import load_index
from pixrec.artifact.unfinished import Unfinished
from pixrec.config import Config, EmbedConfig, ModelConfig, TinyConfig, dump_config

KILLS, ITEMS = 20, 5000
VICTIMS = {"driver": None, "model actor": "ItemEmbedder", "decoding worker": "decode_items", "node": "raylet/raylet"}
TINY = TinyConfig(hidden_width=128, num_layers=4, num_heads=4, vision_width=128, vision_layers=4, image_size_px=128)
CONFIG = Config(
    model=ModelConfig(embedding_width=64, tiny=TINY),
    embed=EmbedConfig(batch_size=32, max_part_items=64, threads_per_actor=1),
)
_LONGEST_SECONDS = 1.2


def main(kills: int, items: int) -> int:
    rng = random.Random(0)
    with tempfile.TemporaryDirectory(prefix="pixrec-kill-") as folder:
        place = Path(folder)
        catalogs.write_model(place / "model", CONFIG)
        catalogs.write_catalog(place / "data", items, picture_px=128, with_picture=0.9)
        (place / "config.yaml").write_text(dump_config(CONFIG))
        started = time.monotonic()
        run = start(place, "whole")
        assert run.wait() == 0
        print(f"undisturbed: {time.monotonic() - started:.0f} s", flush=True)
        killed = disturb(place, kills, rng)
        whole, disturbed = (load_index(str(place / name)) for name in ("whole", "disturbed"))
    order = [np.argsort(index.item_ids) for index in (whole, disturbed)]
    ids = [[index.item_ids[row] for row in rows] for index, rows in zip((whole, disturbed), order, strict=True)]
    apart = float(np.abs(whole.vectors[order[0]] - disturbed.vectors[order[1]]).max())
    facts = {name: disturbed.manifest[name] for name in ("rows", "computed", "resumed", "redone")}
    print(f"kills: {sum(killed.values())}: {dict(killed)}")
    print(f"each item once: {ids[0] == ids[1] and len(set(ids[1])) == items}; vectors differ by at most {apart:.1e}")
    print(f"{facts}: {facts['redone'] / items:.1%} of the work was done twice, at most")
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    return 0 if ids[0] == ids[1] and apart <= 1e-6 else 1


def start(place: Path, out: str) -> subprocess.Popen[bytes]:
    options = [f"--{name}={place / name}" for name in ("model", "data")]
    code = "import sys; from pixrec.cli import main; sys.exit(main(sys.argv[1:]))"
    words = ["embed", *options, f"--out={place / out}", f"--config={place / 'config.yaml'}"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen([sys.executable, "-c", code, *words], **quiet)


def disturb(place: Path, kills: int, rng: random.Random) -> collections.Counter[str]:
    """Run the job until it publishes, killing on the way; returns how often each kind of victim was killed."""
    killed: collections.Counter[str] = collections.Counter()
    work = _work(place)
    run, seen = start(place, "disturbed"), 0
    while True:
        if sum(killed.values()) == kills:
            while end(run, 600) != 0:  # killed by the last signal
                run = start(place, "disturbed")
            return killed
        early = rng.random() < 0.2  # wherever it is, its start included; else while it computes
        while run.poll() is None and len(work.files()) <= seen and not early:
            time.sleep(0.05)
        if run.poll() == 0:
            print("the job ended early: give it more items")
            return killed
        if run.poll() is None:
            time.sleep(rng.uniform(0, _LONGEST_SECONDS))
            kind = rng.choice(list(VICTIMS))
            if kill(run.pid, VICTIMS[kind]):
                killed[kind] += 1
                print(f"{sum(killed.values())}: {kind} after {_stored(work)} parts", flush=True)
            if kind in ("driver", "node"):
                end(run)
        seen = len(work.files())
        if run.poll() is not None:
            run = start(place, "disturbed")


def end(run: subprocess.Popen[bytes], seconds: float = 30) -> int:
    """Wait for the end of a job; one that has lost its node and does not notice is killed."""
    try:
        return run.wait(seconds)
    except subprocess.TimeoutExpired:
        run.kill()
        return run.wait()


def kill(driver: int, name: str | None) -> bool:
    """SIGKILL to the driver, or to one process below it whose command line holds `name`; False when there is none."""
    victims = [driver] if name is None else [process for process, command in below(driver).items() if name in command]
    if not victims:
        return False
    os.kill(victims[0], signal.SIGKILL)
    return True


def _work(place: Path) -> Unfinished:
    from pixrec.artifact import load_model

    return Unfinished(str(place / "disturbed"), load_model(str(place / "model")).fingerprint)


def _stored(work: Unfinished) -> int:
    return len([file for file in work.files() if file.endswith(".parquet")])


if __name__ == "__main__":
    words = [int(word) for word in sys.argv[1:]]
    sys.exit(main(*(words or (KILLS, ITEMS))))
