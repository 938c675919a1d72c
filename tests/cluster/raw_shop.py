"""What the tests of `prepare` begin with: tables, pictures of all kinds, raw files of Amazon Reviews 2023."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pixrec.config import PrepareConfig

NUM_ITEMS = 300  # three slices
CONFIG = PrepareConfig(image_size_px=16, max_image_bytes=50_000, num_cpus_per_task=0.5)
PICTURES: dict[str, tuple[str, str | None]] = {
    "good.jpg": ("ok", None),
    "good.png": ("ok", None),
    "cut.jpg": ("rejected", "truncated"),
    "text.jpg": ("rejected", "not a picture"),
    "empty.jpg": ("rejected", "empty"),
    "huge.jpg": ("rejected", "file too large"),
    "http://localhost/1.jpg": ("rejected", "address refused"),
    "nowhere.jpg": ("missing", "file not found"),
    "": ("missing", None),
}


def silent(stage: str, done: int, total: int | None, note: str = "") -> None:
    pass


def jpeg() -> bytes:
    sink = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8)).save(sink, "JPEG")
    return sink.getvalue()


def write_items(folder: Path, columns: dict[str, Any] | None = None) -> str:
    ids = [f"i{number:03d}" for number in range(NUM_ITEMS)]
    np.random.default_rng(1).shuffle(ids)
    columns = columns or {"image_uri": [list(PICTURES)[row % len(PICTURES)] for row in range(NUM_ITEMS)]}
    table = pa.table(
        {"item_id": [*ids[:-1], None], "title": [f"Title {i}" for i in ids], "year": [2000] * NUM_ITEMS, **columns}
    )
    pq.write_table(table, folder / "items.parquet", row_group_size=200)
    return str(folder / "items.parquet")


def write_interactions(folder: Path) -> str:
    random = np.random.default_rng(2)
    columns = {
        "user_id": [f"u{random.integers(30)}" for _ in range(500)],
        "item_id": [f"i{random.integers(320):03d}" for _ in range(500)],
        "timestamp": random.integers(0, 400, 500),
        "rating": random.integers(1, 6, 500).astype(float),
    }
    columns["user_id"][7] = None
    pq.write_table(pa.table(columns), folder / "interactions.parquet")
    return str(folder / "interactions.parquet")


def write_raw(folder: Path) -> Path:
    """Both tables and the pictures they name, all kinds of them."""
    folder.mkdir()
    whole = jpeg()
    (folder / "good.jpg").write_bytes(whole)
    Image.new("RGBA", (8, 20), (0, 0, 255, 128)).save(folder / "good.png")
    (folder / "cut.jpg").write_bytes(whole[:-200])
    (folder / "text.jpg").write_text("no picture")
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "huge.jpg").write_bytes(whole + b"\0" * 50_000)
    write_items(folder)
    write_interactions(folder)
    return folder


def write_amazon(folder: Path, pictures: list[str]) -> tuple[str, str]:
    """Items B0, B1, ... with one picture each, in the published format; odd lines and reviews among them."""
    items = [
        {
            "parent_asin": f"B{row}",
            "title": f"Cup &amp; saucer {row}",
            "main_category": "Kitchen",
            "price": "from 5.00",
            "images": [{"variant": "PT01", "hi_res": "http://192.0.2.1/no"}, {"variant": "MAIN", "large": url}],
            "description": ["<b>Blue</b>", "cup"],
        }
        for row, url in enumerate(pictures)
    ]
    reviews = [
        {
            "user_id": f"u{user}",
            "parent_asin": f"B{(user + step) % len(items)}",
            "timestamp": 1000 * step,
            "rating": 4 + user % 2,
        }
        for user in range(6)
        for step in range(4)
    ]
    reviews += [reviews[0], {**reviews[1], "rating": 1.0}, {**reviews[2], "parent_asin": "B999"}]
    with gzip.open(folder / "meta_Kitchen.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(item) + "\n" for item in items) + "{half a line\n")
    (folder / "Kitchen.jsonl").write_text("".join(json.dumps(review) + "\n" for review in reviews) + "[]\n")
    return str(folder / "meta_Kitchen.jsonl.gz"), str(folder / "Kitchen.jsonl")


def everything_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
