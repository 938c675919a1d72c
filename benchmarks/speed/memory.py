"""Memory and time of `pixrec embed` as the catalog grows, with an object store smaller than the decoded catalog.

    python -m benchmarks.speed.memory [small] [large]     (items; 20000 and 200000)

Each size runs in a process of its own. Memory is each process's own resident memory at its peak, by what it does;
the object store, shared by all, stands apart.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from benchmarks import catalogs
from benchmarks.processes import below, own_memory_mib, shared_memory_mib
from pixrec.config import Config, EmbedConfig, ModelConfig, TinyConfig

SIZES = (20_000, 200_000)
PICTURE_PX, MODEL_PX, WITH_PICTURE = 64, 64, 0.5
OBJECT_STORE_BYTES = 100 * 1024**2
TINY = TinyConfig(hidden_width=16, num_layers=1, num_heads=2, vision_width=16, vision_layers=1, image_size_px=MODEL_PX)
CONFIG = Config(model=ModelConfig(embedding_width=64, tiny=TINY), embed=EmbedConfig(threads_per_actor=1, num_actors=1))


def main(sizes: list[int]) -> int:
    small, large = sizes or SIZES
    with tempfile.TemporaryDirectory(prefix="pixrec-memory-") as folder:
        place = Path(folder)
        catalogs.write_model(place / "model", CONFIG)
        measured = {size: measure(place, size) for size in (small, large)}
    print(f"{'own memory at the peak, MiB':40} {small:>12,} {large:>12,} {'ratio':>7}")
    for name in sorted(measured[small]["peak"].keys() | measured[large]["peak"].keys()):
        one, other = (measured[size]["peak"].get(name, 0.0) for size in (small, large))
        print(f"{name:40} {one:12.0f} {other:12.0f} {other / one if one else 0:7.2f}")
    rates = [measured[size]["rate"] for size in (small, large)]
    print(f"{'items a second':40} {rates[0]:12.0f} {rates[1]:12.0f} {rates[1] / rates[0]:7.2f}")
    pixels = large * WITH_PICTURE * 3 * MODEL_PX**2 / 1024**2
    print(f"decoded pictures: {pixels:.0f} MiB; object store: {OBJECT_STORE_BYTES / 1024**2:.0f} MiB")
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    return 0


def measure(place: Path, size: int) -> dict[str, object]:
    """Peaks by kind of process, and items a second from the first to the last stored part."""
    data = place / f"data-{size}"
    catalogs.write_catalog(data, size, picture_px=PICTURE_PX, with_picture=WITH_PICTURE)
    command = [sys.executable, "-m", "benchmarks.speed.memory", "embed", str(place), data.name]
    peak: dict[str, float] = defaultdict(float)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        while run.poll() is None:
            for process, kind in {**below(run.pid), run.pid: "driver"}.items():
                name = _kind(kind)
                peak[name] = max(peak[name], own_memory_mib(process))
                if name == "raylet":
                    peak["object store, resident"] = max(peak["object store, resident"], shared_memory_mib(process))
            time.sleep(0.2)
        assert run.stdout
        told = json.loads(run.stdout.read().splitlines()[-1])
    assert run.returncode == 0
    return {"peak": dict(peak), **told}


def _kind(command: str) -> str:
    for name in ("ItemEmbedder", "raylet", "gcs_server"):
        if name in command:
            return {"ItemEmbedder": "model actor", "gcs_server": "Ray's control store"}.get(name, name)
    if command == "driver":
        return "driver"
    return "decoding worker" if command.startswith("ray::") else "Ray's other processes"


def embed_once(place: Path, data: str) -> None:
    """In a process of its own: embed under a small object store and say how long the computing took."""
    import ray

    from pixrec.cluster.embed import embed
    from pixrec.cluster.session import connect

    moments: list[tuple[float, int]] = []

    def note(stage: str, done: int, total: int | None, text: str) -> None:
        if done:
            moments.append((time.monotonic(), done))
        print(f"\r{stage} {done}/{total} {text}   ", end="", file=sys.stderr)

    ray.init(
        address="local",
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    with connect(progress=False):
        index = str(place / f"index-{data}")
        manifest = embed(str(place / "model"), str(place / data), index, dataclasses.replace(CONFIG), progress=note)
    ray.shutdown()
    (began, first), (ended, last) = moments[0], moments[-1]
    print(json.dumps({"rate": (last - first) / (ended - began), "rows": manifest["rows"]}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["embed"]:
        embed_once(Path(sys.argv[2]), sys.argv[3])
    else:
        sys.exit(main([int(word) for word in sys.argv[1:]]))
