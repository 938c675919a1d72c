"""Memory of an evaluation and of a serving replica, by the size of the shop.

    python -m benchmarks.scale.memory evaluate [--items 1000000] [--events 50000000] [--users 20000] [--model]
    python -m benchmarks.scale.memory serve [--items 1000000] [--events 50000000] [--width 64]

Writes a prepared data set, and for `--model` and `serve` an untrained model with a compact user tower and an index of
random vectors, below `--folder` (a temporary folder, unless given; what is there is used). The pictures are few and
small: nobody reads them. Then one process does the work; printed are its proportional set size, at its peak and at the
end, and how much of it are pages of files, which processes of a node share.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from pixrec import storage
from pixrec.artifact import index_version, load_model, new_model, save_model
from pixrec.artifact.model import with_compact
from pixrec.config import Config
from pixrec.data.arrays import ARRAYS_FOLDER, ITEM_ID_FILE, write_arrays
from pixrec.data.pictures import complete, write_part
from pixrec.data.sequences import DATASET_MARKER, FORMAT, ITEMS_FOLDER, PICTURES_FOLDER
from pixrec.schema import IMAGE, MISSING, PREPARED_ITEM_FIELDS

ROWS_PER_PART, EVENTS_PER_USER = 16_384, 50
DAY_MS = 86_400_000

_EVALUATE = """
import sys
from pixrec.verbs import evaluate
data, model, index, out, users = sys.argv[1:]
settings = {"evaluate.max_users": int(users), "evaluate.seen": "filtered",
            "evaluate.scorers": ["popularity", "repeat_last", "item_transition"]}
if model:
    settings["evaluate.scorers"] = ["popularity"]
evaluate(model or None, data, out, index=index or None, config=settings, progress=True)
"""
_SERVE = """
import sys
import json
data, model, index = sys.argv[1:4]
import torch
torch.set_num_threads(1)
from pixrec.recommender import load_recommender
from pixrec.query import Query
found = load_recommender(model, index, data)
fields = list(found.items.filter_fields)
print("LOADED", flush=True); sys.stdin.readline()
ids = [found.items.item_ids[row] for row in range(0, len(found.items), max(1, len(found.items) // 20))]
for k in range(5):
    found.answer([Query(ids[k : k + 10], 10)] * 8)
found.items.fields(7), found.items.image(7)
print("ASKED", flush=True); sys.stdin.readline()
found.answer([Query(ids[:10], 10, filters={"brand": ["Brand 7"]})])
print("FILTERED", flush=True); sys.stdin.readline()
"""


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale.memory", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("evaluate", "serve"))
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--events", type=int, default=50_000_000)
    parser.add_argument("--users", type=int, default=20_000)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--model", action="store_true", help="evaluate: a model with a compact tower, and its index")
    parser.add_argument("--folder", type=Path)
    a = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (a.folder or Path(temporary)) / f"{a.items}-{a.events}"
        data = draw(folder / "data", a.items, a.events)
        model = index = ""
        if a.what == "serve" or a.model:
            model, index = draw_model(folder, data, a.items, a.width)
        if a.what == "evaluate":
            with tempfile.TemporaryDirectory() as out:
                report([_EVALUATE, data, model, index, str(Path(out) / "report"), str(a.users)], a.items)
        else:
            report([_SERVE, data, model, index], a.items)
    return 0


def draw(folder: Path, items: int, events: int) -> str:
    """A prepared data set, drawn as the one of `benchmarks.scale.shop`, without pictures."""
    uri = str(folder)
    if storage.exists(storage.join(uri, DATASET_MARKER)):
        return uri
    rng = np.random.default_rng(0)
    users = max(1, events // EVENTS_PER_USER)
    lengths = rng.integers(10, 2 * EVENTS_PER_USER - 9, users)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    total = int(offsets[-1])
    rows = np.minimum(np.exp(rng.random(total) * np.log(items + 1)).astype(np.int64) - 1, items - 1).astype(np.int32)
    moments = 1_700_000_000_000 + np.cumsum(rng.integers(1, DAY_MS, total))
    moments -= np.repeat(moments[offsets[:-1]], lengths) - 1_700_000_000_000
    counts = np.bincount(rows, minlength=items)
    parts = []
    for number, start in enumerate(range(0, items, ROWS_PER_PART)):
        stop = min(items, start + ROWS_PER_PART)
        storage.write_table(str(folder / ITEMS_FOLDER / f"part-{number:06d}.parquet"), _items(start, stop))
        write_part(str(folder / PICTURES_FOLDER), number, [None] * (stop - start))
        parts.append(stop - start)
    complete(str(folder / PICTURES_FOLDER), len(parts))
    write_arrays(
        uri,
        item_ids=[f"B{row:09d}" for row in range(items)],
        has_image=np.zeros(items, bool),
        training_count=counts,
        user_ids=[f"u{user:09d}" for user in range(users)],
        user_offset=offsets,
        item_row=rows,
        timestamp=moments,
    )
    facts = {"format": FORMAT, "fingerprint": f"memory-{items}-{events}", "split": {"kind": "leave_one_out"}}
    storage.write_json(storage.join(uri, DATASET_MARKER), {**facts, "item_parts": parts})
    return uri


def _items(start: int, stop: int) -> pa.Table:
    rows = range(start, stop)
    columns = {
        "item_id": [f"B{row:09d}" for row in rows],
        "title": [f"A product of linen and oak, number {row}" for row in rows],
        "brand": [f"Brand {row % 500}" for row in rows],
        "category": [f"Category {row % 40}" for row in rows],
        "description": ["Made to last, and to be looked at every day. " * 4] * len(rows),
        "price": [float(row % 1000) for row in rows],
        "image_status": [MISSING] * len(rows),
    }
    return pa.table(columns, schema=pa.schema([field for field in PREPARED_ITEM_FIELDS if field[0] != IMAGE]))


def draw_model(folder: Path, data: str, items: int, width: int) -> tuple[str, str]:
    """An untrained model without id vectors, and an index of random unit vectors."""
    model, index = str(folder / f"model-{width}"), str(folder / f"index-{width}")
    if not storage.exists(storage.join(index, "CURRENT")):
        base = Config()
        compact = dataclasses.replace(base.model.compact, id_embedding=False)
        config = dataclasses.replace(
            base, model=dataclasses.replace(base.model, embedding_width=width, user_tower="compact", compact=compact)
        )
        save_model(model, with_compact(new_model(config, ["A product of linen and oak"] * 9), []), {})
        ids = storage.map_column(storage.join(data, ARRAYS_FOLDER, ITEM_ID_FILE))
        rng = np.random.default_rng(1)
        with index_version(index, load_model(model).fingerprint, width, "float32", {"data": data}) as writer:
            for start in range(0, items, ROWS_PER_PART):
                part = ids[start : start + ROWS_PER_PART].to_pylist()
                vectors = rng.standard_normal((len(part), width), dtype=np.float32)
                vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
                writer.add(part, vectors, ["0" * 32] * len(part), [False] * len(part))
    return model, index


def report(command: list[str], items: int) -> None:
    """Run one process; print its memory at the peak, and at every line that it writes to be let go on."""
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-c", *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    assert process.stdin is not None
    assert process.stdout is not None
    lines: list[str] = []
    peak = {"pss": 0.0, "anonymous": 0.0, "files": 0.0}
    os.set_blocking(process.stdout.fileno(), False)
    while process.poll() is None:
        now = memory_mib(process.pid)
        if now:
            peak = max(peak, now, key=lambda found: found["pss"])
        line = process.stdout.readline().strip()
        if line.isupper():
            time.sleep(0.3)
            now = memory_mib(process.pid)
            lines.append(json.dumps({"at": line.lower(), **now, "peak_pss": peak["pss"], "items": items}))
            process.stdin.write("\n")
        time.sleep(0.2)  # to look costs the process time: its page tables are walked
    if process.returncode:
        raise SystemExit(f"the process ended with {process.returncode}")
    seconds = round(time.monotonic() - began, 1)
    for line in [*lines, json.dumps({"at": "peak", **peak, "items": items, "seconds": seconds})]:
        print(line, flush=True)


def memory_mib(process: int) -> dict[str, float]:
    """Proportional set size, of which memory of its own and pages of files; empty when the process has ended."""
    try:
        rollup = Path(f"/proc/{process}/smaps_rollup").read_text()
    except OSError:
        return {}
    sizes = {name: int(size) / 1024 for name, size in re.findall(r"^(Pss\w*):\s+(\d+) kB", rollup, re.MULTILINE)}
    if not sizes:
        return {}
    return {
        name: round(sizes[key], 1) for name, key in (("pss", "Pss"), ("anonymous", "Pss_Anon"), ("files", "Pss_File"))
    }


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
