"""The model and the catalog that the benchmarks of the towers share: the demo's model, untrained, on drawn products."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pixrec.artifact import Model, new_model
from pixrec.config import Config
from pixrec.data.drawing import COLOURS, CUTS, KINDS, PATTERNS, draw_product
from pixrec.data.items import ItemTable
from pixrec.model.catalog import Catalog
from pixrec.schema import OK, PREPARED_ITEM_FIELDS

NUM_ITEMS = 128
PICTURE_PX = 64


@dataclass(frozen=True)
class Workload:
    config: Config
    model: Model
    catalog: Catalog

    def histories(self, count: int, length: int, seed: int = 0) -> list[np.ndarray]:
        """`count` histories of `length` rows each, drawn at random."""
        rng = np.random.default_rng(seed)
        return [rng.integers(0, len(self.catalog), length) for _ in range(count)]


def make(config: Config | None = None) -> Workload:
    config = config or Config()
    items = _items()
    model = new_model(config, [items.text(row) for row in range(len(items))])
    return Workload(config, model, Catalog(items, model.encoder))


def _items() -> ItemTable:
    rng = np.random.default_rng(0)
    looks = [(row % len(COLOURS), row % len(PATTERNS), row % CUTS) for row in range(NUM_ITEMS)]
    kinds = [KINDS[row % len(KINDS)] for row in range(NUM_ITEMS)]
    columns = {
        "item_id": [f"i{row:03d}" for row in range(NUM_ITEMS)],
        "title": [f"Everyday {kind}" for kind in kinds],
        "brand": ["Fennwick"] * NUM_ITEMS,
        "category": kinds,
        "description": [None] * NUM_ITEMS,
        "price": [20.0 + row % 7 for row in range(NUM_ITEMS)],
        "image": [_jpeg(kind, *look, rng) for kind, look in zip(kinds, looks, strict=True)],
        "image_status": [OK] * NUM_ITEMS,
    }
    return ItemTable(pa.table(columns, schema=pa.schema(PREPARED_ITEM_FIELDS)))


def _jpeg(kind: str, colour: int, pattern: int, cut: int, rng: np.random.Generator) -> bytes:
    sink = io.BytesIO()
    draw_product(kind, colour, pattern, cut, size_px=PICTURE_PX, rng=rng).save(sink, "JPEG", quality=90)
    return sink.getvalue()
