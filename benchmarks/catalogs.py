"""Prepared data sets of any size and untrained models, on disk, for the benchmarks of batch embedding."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa

from pixrec import storage
from pixrec.artifact import new_model, save_model
from pixrec.config import Config
from pixrec.data.arrays import write_arrays
from pixrec.data.drawing import COLOURS, CUTS, KINDS, PATTERNS, draw_product
from pixrec.data.pictures import complete, write_part
from pixrec.data.sequences import DATASET_MARKER, FORMAT, PICTURES_FOLDER
from pixrec.schema import IMAGE, ITEMS, MISSING, OK, PREPARED_ITEM_FIELDS

ROWS_PER_FILE = 1024
_LOOKS = 256
_WORDS = ("light", "warm", "everyday", "organic", "city", "classic", "wide", "soft", "northern", "double", "plain")


def write_catalog(
    folder: Path, num_items: int, *, picture_px: int, with_picture: float = 1.0, changed: frozenset[int] = frozenset()
) -> None:
    """A prepared data set of `num_items`, in files of `ROWS_PER_FILE`; the rows in `changed` have other titles.

    `_LOOKS` pictures are drawn and shared; titles of 2 to 12 words tell the items apart.
    """
    pictures, parts = _pictures(picture_px), []
    has_image = np.array([row % 100 < 100 * with_picture for row in range(num_items)])
    for number, start in enumerate(range(0, num_items, ROWS_PER_FILE)):
        rows = range(start, min(start + ROWS_PER_FILE, num_items))
        shown = has_image[rows.start : rows.stop]
        columns = {
            "item_id": [f"i{row:07d}" for row in rows],
            "title": [_title(row) + " anew" * (row in changed) for row in rows],
            "brand": ["Fennwick"] * len(rows),
            "category": [KINDS[row % len(KINDS)] for row in rows],
            "description": [None] * len(rows),
            "price": [20.0 + row % 7 for row in rows],
            "image_status": [OK if show else MISSING for show in shown],
        }
        part = folder / ITEMS / f"part-{number:06d}.parquet"
        schema = pa.schema([field for field in PREPARED_ITEM_FIELDS if field[0] != IMAGE])
        storage.write_table(str(part), pa.table(columns, schema=schema))
        stored = [pictures[row % _LOOKS] if show else None for row, show in zip(rows, shown, strict=True)]
        write_part(str(folder / PICTURES_FOLDER), number, stored)
        parts.append(len(rows))
    complete(str(folder / PICTURES_FOLDER), len(parts))
    write_arrays(
        str(folder),
        item_ids=[f"i{row:07d}" for row in range(num_items)],
        has_image=has_image,
        training_count=np.zeros(num_items),
        user_ids=["u"],
        user_offset=np.array([0, 1]),
        item_row=np.zeros(1),
        timestamp=np.zeros(1),
    )
    facts = {"format": FORMAT, "fingerprint": f"{num_items}-{len(changed)}", "items": {"kept": num_items}}
    storage.write_json(str(folder / DATASET_MARKER), {**facts, "item_parts": parts, "split": {"kind": "leave_one_out"}})


def write_model(folder: Path, config: Config) -> None:
    """An untrained model whose tokenizer has read a thousand titles."""
    save_model(str(folder), new_model(config, [_title(row) for row in range(1000)]), {})


def _title(row: int) -> str:
    rng = np.random.default_rng(row)
    words = [_WORDS[i] for i in rng.integers(0, len(_WORDS), rng.integers(2, 12))]
    return f"{' '.join(words)} {KINDS[row % len(KINDS)]} {row}"


def _pictures(size_px: int) -> list[bytes]:
    rng = np.random.default_rng(0)
    pictures = []
    for row in range(_LOOKS):
        look = (row % len(COLOURS), row % len(PATTERNS), row % CUTS)
        sink = io.BytesIO()
        draw_product(KINDS[row % len(KINDS)], *look, size_px=size_px, rng=rng).save(sink, "JPEG", quality=90)
        pictures.append(sink.getvalue())
    return pictures
