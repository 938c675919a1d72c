"""`pixrec embed` end to end, beside the model alone and beside a plain PyTorch script that does the same work.

    python -m benchmarks.speed.embed [items] [hidden width] [layers] [picture side]      (20000 96 2 64)

All use one torch thread for the model and batches of 128, on the same prepared catalog of 256 px JPEGs. The model
alone has its inputs encoded in memory; it is measured before and after, since the machine may be shared. The plain
script is a DataLoader with one worker process, Pillow and transformers' own image processor.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks import catalogs
from pixrec.artifact import Model, load_index, load_model
from pixrec.config import Config, EmbedConfig, ModelConfig, TinyConfig
from pixrec.data.images import decode_image
from pixrec.data.items import ItemTable, load_items
from pixrec.model.catalog import Embedder
from pixrec.model.encoding import Content, Items

BATCH, PICTURE_PX = 128, 256
ALONE_SECONDS, ALONE_BATCHES, SCRIPT_ITEMS = 12.0, 16, 3072


def main(items: int = 20_000, width: int = 96, layers: int = 2, side_px: int = 64) -> int:
    torch.set_num_threads(1)
    tiny = TinyConfig(
        hidden_width=width, num_layers=layers, vision_width=width, vision_layers=layers, image_size_px=side_px
    )
    config = Config(model=ModelConfig(tiny=tiny), embed=EmbedConfig(batch_size=BATCH, threads_per_actor=1))
    with tempfile.TemporaryDirectory(prefix="pixrec-embed-") as folder:
        place = Path(folder)
        catalogs.write_model(place / "model", config)
        catalogs.write_catalog(place / "data", items, picture_px=PICTURE_PX)
        model = load_model(str(place / "model"))
        batches = encoded(model, place)
        before = alone(model.embedder(), batches)
        ours, wall, ray_seconds = with_ray(place, config)
        after = alone(model.embedder(), batches)
        theirs, vectors = script(model, place)
        index = load_index(str(place / "index"))
        rows = [index.item_ids.index(f"i{row:07d}") for row in range(len(vectors))]
        cosine = float((index.vectors[rows] * vectors).sum(1).mean())
        changed(place, config, items)
    reference = (before + after) / 2
    print(f"model alone, inputs in memory: {before:,.0f} items/s before, {after:,.0f} after")
    print(f"embed: {ours:,.0f} items/s from the first to the last part: {ours / reference:.2f} of the model alone")
    print(f"       {items / wall:,.0f} items/s with the start of the actor: {items / wall / reference:.2f}; "
          f"{wall:.0f} s for {items:,} items, and {ray_seconds:.0f} s for the start of Ray")  # fmt: skip
    print(f"plain script, DataLoader and transformers' processor: {theirs:,.0f} items/s; embed is "
          f"{ours / theirs:.2f} times that; mean cosine of the vectors {cosine:.4f}")  # fmt: skip
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    return 0


def encoded(model: Model, place: Path) -> list[Items]:
    """Batches of items of like length, as `embed` makes them too."""
    table = load_items(str(place / "data"))
    size = model.encoder.image_size_px
    rows = sorted(range(ALONE_BATCHES * BATCH), key=lambda row: len(table.text(row)))
    batches = [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]
    return [model.encoder.items([_content(table, row, size) for row in batch]) for batch in batches]


def _content(table: ItemTable, row: int, size: int) -> Content:
    picture = table.image(row)
    assert picture is not None
    return Content(table.text(row), decode_image(picture, size))


def alone(embedder: Embedder, batches: list[Items]) -> float:
    """Items a second of the model and nothing else."""
    done, started = 0, time.perf_counter()
    with torch.inference_mode():
        while time.perf_counter() - started < ALONE_SECONDS:
            for batch in batches:
                embedder.tower.item_vectors(batch)
                done += len(batch)
    return done / (time.perf_counter() - started)


def with_ray(place: Path, config: Config) -> tuple[float, float, float]:
    """Items a second from the first to the last stored part; seconds of the whole call; seconds Ray took to start."""
    from pixrec.cluster.session import connect

    began = time.perf_counter()
    with connect(progress=False):
        ready = time.perf_counter()
        _, moments = _embed(place, config)
        wall = time.perf_counter() - ready
    (first_at, first), (last_at, last) = moments[0], moments[-1]
    return (last - first) / (last_at - first_at), wall, ready - began


def changed(place: Path, config: Config, items: int) -> None:
    """Embed again with 1 % of the catalog changed, and say what that cost in model work."""
    from pixrec.cluster.session import connect

    some = frozenset(np.random.default_rng(0).choice(items, items // 100, replace=False).tolist())
    catalogs.write_catalog(place / "data", items, picture_px=PICTURE_PX, changed=some)
    with connect(progress=False):
        manifest, _ = _embed(place, config)
    passes = -(-manifest["computed"] // BATCH), -(-items // BATCH)
    print(f"1 % changed: {manifest['computed']} of {items} items computed ({manifest['computed'] / items:.2%}), "
          f"{passes[0]} forward passes in place of {passes[1]}")  # fmt: skip


def _embed(place: Path, config: Config) -> tuple[dict[str, Any], list[tuple[float, int]]]:
    from pixrec.cluster.embed import embed

    moments: list[tuple[float, int]] = []

    def note(stage: str, done: int, total: int | None, text: str) -> None:
        if done and stage == "embed":
            moments.append((time.perf_counter(), done))

    places = [str(place / name) for name in ("model", "data", "index")]
    return embed(*places, dataclasses.replace(config), progress=note), moments


class Pictures(Dataset[tuple[str, bytes]]):
    """What a plain script would read: title and picture of each row."""

    def __init__(self, place: Path) -> None:
        files = sorted((place / "data" / "items").glob("*.parquet"))
        self._table = ItemTable(pq.read_table(files[: -(-SCRIPT_ITEMS // catalogs.ROWS_PER_FILE)]))

    def __len__(self) -> int:
        return min(SCRIPT_ITEMS, len(self._table))

    def __getitem__(self, row: int) -> tuple[str, bytes]:
        return self._table.text(row), self._table.image(row) or b""


def collate(rows: list[tuple[str, bytes]], processor: Any) -> tuple[list[str], Tensor]:
    pictures = [[Image.open(io.BytesIO(data)).convert("RGB")] for _, data in rows]
    return [text for text, _ in rows], processor(images=pictures, return_tensors="pt")["pixel_values"][:, 0]


def script(model: Model, place: Path) -> tuple[float, np.ndarray]:
    """Items a second of the DataLoader script after its first batch, and its vectors (U, D)."""
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    size = {"longest_edge": model.encoder.image_size_px}
    processor = Idefics3ImageProcessorPil(
        do_image_splitting=False, size=size, max_image_size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    loader = DataLoader(
        Pictures(place), BATCH, num_workers=1, collate_fn=functools.partial(collate, processor=processor)
    )
    vectors, moments = [], []
    for part in _forward(model, loader):
        vectors.append(part)
        moments.append(time.perf_counter())
    done = sum(map(len, vectors[1:]))
    return done / (moments[-1] - moments[0]), np.concatenate(vectors)


def _forward(model: Model, loader: DataLoader[Any]) -> Iterator[np.ndarray]:
    tower, encoder = model.tower.eval(), model.encoder
    nothing = np.zeros((encoder.image_size_px, encoder.image_size_px, 3), np.uint8)
    encode_pictures: Callable[..., Tensor] = tower.backbone.family.encode_pictures
    with torch.inference_mode():
        for texts, pixels in loader:
            items = encoder.items([Content(text, nothing) for text in texts])
            pictures = encode_pictures(tower.backbone.model, pixels)
            yield tower.item_vectors(items, pictures.flatten(0, 1)).numpy()


if __name__ == "__main__":
    sys.exit(main(*(int(word) for word in sys.argv[1:])))
