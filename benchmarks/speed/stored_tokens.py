"""`pixrec embed` and the interleaved user tower with stored picture tokens, beside the same without.

    python -m benchmarks.speed.stored_tokens [items] [hidden width] [layers] [picture side]      (4096 96 2 64)

One untrained `pixrec-tiny` with a frozen vision part as wide and deep as its language model; 256 px JPEGs, 256 of them
shared by all items; one torch thread, batches of 128. Embedding is run twice each way in turn, into a new index each
time; its rate runs from the first to the last stored part, so the start of the actor is left out. User vectors are
those of 64 histories of 10 items, one after the other, as a server reads them.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import catalogs
from pixrec.artifact import Model, load_index, load_model
from pixrec.config import Config, EmbedConfig, ModelConfig, TinyConfig
from pixrec.data import tokens
from pixrec.data.items import load_items
from pixrec.model import vision
from pixrec.model.catalog import Catalog

PICTURE_PX, BATCH, PART_ITEMS, ROUNDS = 256, 128, 256, 2
HISTORIES, HISTORY_ITEMS = 64, 10


def main(items: int = 4096, width: int = 96, layers: int = 2, side_px: int = 64) -> int:
    torch.set_num_threads(1)
    tiny = TinyConfig(
        hidden_width=width, num_layers=layers, vision_width=width, vision_layers=layers, image_size_px=side_px
    )
    config = Config(model=ModelConfig(tiny=tiny, freeze_vision=True, max_history_items=HISTORY_ITEMS))
    with tempfile.TemporaryDirectory(prefix="pixrec-tokens-") as folder:
        place = Path(folder)
        catalogs.write_model(place / "model", config)
        catalogs.write_catalog(place / "data", items, picture_px=PICTURE_PX)
        model = load_model(str(place / "model"))
        fill_store(place, model)
        rates = embedding_rates(place)
        cosine = lowest_cosine(place)
        seconds = {where: history_seconds(place, model, where) for where in (None, "auto")}
    print_rates("embed", "items/s", {where: statistics.mean(found) for where, found in rates.items()})
    print(f"each run: without {_list(rates[None])}, with {_list(rates['auto'])}; lowest cosine {cosine:.6f}")
    print_rates("histories", "histories/s", {where: 1 / found for where, found in seconds.items()})
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    return 0


def fill_store(place: Path, model: Model) -> None:
    """What `pixrec train` leaves beside a data set."""
    table, backbone = load_items(str(place / "data")), model.tower.backbone
    pictures = list({picture for row in range(len(table)) if (picture := table.image(row)) is not None})
    folder = tokens.store_folder(f"{place / 'data'}.tokens", vision.vision_fingerprint(backbone))
    tokens.write_part(folder, vision.encode_pictures(backbone, pictures))
    tokens.complete_store(folder, vision.token_schema(backbone))


def embedding_rates(place: Path) -> dict[str | None, list[float]]:
    """Items a second of each run, by `embed.picture_tokens`."""
    from pixrec.cluster.session import connect

    rates: dict[str | None, list[float]] = {None: [], "auto": []}
    with connect(progress=False):
        for number in range(ROUNDS):
            for where, found in rates.items():
                found.append(_rate(place, where, f"index-{where}-{number}"))
    return rates


def _rate(place: Path, where: str | None, index: str) -> float:
    from pixrec.cluster.embed import embed

    moments: list[tuple[float, int]] = []

    def note(stage: str, done: int, total: int | None, text: str) -> None:
        if done and stage == "embed":
            moments.append((time.perf_counter(), done))

    settings = EmbedConfig(batch_size=BATCH, threads_per_actor=1, max_part_items=PART_ITEMS, picture_tokens=where)
    places = [str(place / name) for name in ("model", "data", index)]
    manifest: dict[str, Any] = embed(*places, Config(embed=settings), progress=note)
    assert manifest["pictures_from_tokens"] == (manifest["with_image"] if where else 0)
    (first_at, first), (last_at, last) = moments[0], moments[-1]
    return (last - first) / (last_at - first_at)


def lowest_cosine(place: Path) -> float:
    """Of all items, between both ways."""
    plain, stored = (load_index(str(place / f"index-{where}-0")) for where in (None, "auto"))
    order = {item: row for row, item in enumerate(stored.item_ids)}
    rows = [order[item] for item in plain.item_ids]
    return float((plain.vectors * stored.vectors[rows]).sum(1).min())


def history_seconds(place: Path, model: Model, where: str | None) -> float:
    """Median seconds of one history; its pictures are not decoded yet."""
    tokens = vision.open_store(f"{place / 'data'}.tokens", model.tower.backbone) if where else None
    catalog, rng = Catalog(load_items(str(place / "data")), model.encoder, tokens=tokens), np.random.default_rng(0)
    histories = rng.choice(len(catalog), (HISTORIES, HISTORY_ITEMS), replace=False)
    seconds = []
    for history in histories:
        began = time.perf_counter()
        model.embedder().users(catalog, [history], None)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def print_rates(what: str, unit: str, rates: dict[str | None, float]) -> None:
    plain, stored = rates[None], rates["auto"]
    print(f"{what}: {plain:,.1f} {unit} with pictures, {stored:,.1f} with stored tokens: {stored / plain:.2f} times")


def _list(values: list[float]) -> str:
    return " and ".join(f"{value:,.0f}" for value in values)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
