"""Whether an item that is added to a running server is found as well as one of the index.

    python -m benchmarks.quality.live DATA [--pictures FOLDER] [--model MODEL] [--items 1000] [--users 100]

A tenth of the items of a prepared data set (`--share`) is left out of an index and then sent to `POST /v1/items`, with
the columns of the data set and the pictures as their files lie in FOLDER (`<item_id>.jpg`), or as the data set has
them. For each user all items are ranked, by that and by an index that holds them all. Prints one JSON object: how many
ranks of the items that were added are the same, and by how much scores differ. Of a large data set the first `--items`
items are taken. Without --model it is an untrained one: the question is whether two ways to a vector are the same,
which no training answers. HTTP is answered in this process, without Ray.
"""

from __future__ import annotations

import argparse
import base64
import dataclasses
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import torch

from benchmarks.quality.served import served
from pixrec.artifact import Index, Model, load_model, new_model
from pixrec.config import CompactConfig, Config, ModelConfig, ServeConfig
from pixrec.data.items import ItemTable
from pixrec.data.sequences import Dataset, load_dataset
from pixrec.model.catalog import Catalog
from pixrec.query import Query
from pixrec.recommender import Recommender
from pixrec.schema import IMAGE, ITEM_ID, TEXT_FIELDS
from pixrec.serving.published import Source

KEY, AT_A_TIME, HISTORY_ITEMS = "key", 25, 20


class Held:
    """A source of one version, which is there already."""

    def __init__(self, recommender: Recommender) -> None:
        self._recommender = recommender

    def wanted(self) -> dict[str, str]:
        return {"model_fingerprint": self._recommender.model_version, "version": self._recommender.index_version}

    def load(self, manifest: Mapping[str, Any]) -> Recommender:
        return self._recommender


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--model")
    parser.add_argument("--pictures", type=Path)
    parser.add_argument("--items", type=int, default=1000)
    parser.add_argument("--share", type=float, default=0.1)
    parser.add_argument("--users", type=int, default=100)
    a = parser.parse_args()
    torch.set_num_threads(1)
    dataset = load_dataset(a.data)
    items, rng = first(dataset.items, a.items), np.random.default_rng(0)
    model = untrained(items) if a.model is None else load_model(a.model)
    started = time.perf_counter()
    vectors = model.embedder().items(Catalog(items, model.encoder), np.arange(len(items)))
    embedded = time.perf_counter() - started
    held = np.sort(rng.choice(len(items), round(a.share * len(items)), replace=False))
    rest = np.setdiff1d(np.arange(len(items)), held)
    counts, ids = np.zeros(len(items)), list(items.item_ids)
    whole = Recommender(model, Index("all", ids, vectors, {}), items, counts)
    part = Recommender(model, Index("part", [ids[row] for row in rest], vectors[rest], {}), items, counts)
    with tempfile.TemporaryDirectory() as folder:
        config = ServeConfig(poll_seconds=0, store=f"{folder}/live.sqlite", admin_key=KEY, max_body_bytes=10**9)
        started = time.perf_counter()
        with served(cast(Source, Held(part)), config) as server:
            for start in range(0, len(held), AT_A_TIME):
                sent = [body(items, int(row), a.pictures) for row in held[start : start + AT_A_TIME]]
                assert server.post("/v1/items", {"items": sent})["stored"] == len(sent)
            adding = time.perf_counter() - started
            found = compared(whole, part, histories(dataset, len(items), a.users, rng), [ids[row] for row in held])
    facts = {"data": Path(a.data).name, "items": len(items), "added": len(held)}
    seconds = {"seconds_full_embed": round(embedded, 1), "seconds_adding": round(adding, 1)}
    print(json.dumps({**facts, **found, **seconds}))


def first(items: ItemTable, count: int) -> ItemTable:
    """The first so many items, with their pictures."""
    if len(items) <= count:
        return items
    rows = [{**items.fields(row), IMAGE: items.image(row)} for row in range(count)]
    return ItemTable(pa.Table.from_pylist(rows, items.schema.append(pa.field(IMAGE, pa.binary()))))


def untrained(items: ItemTable) -> Model:
    config = Config(model=ModelConfig(user_tower="compact", compact=CompactConfig()))
    model = new_model(config, [items.text(row) for row in range(len(items))])
    return dataclasses.replace(model, info={"fingerprint": "untrained"})


def body(items: ItemTable, row: int, pictures: Path | None) -> dict[str, Any]:
    """The item as a shop would send it."""
    fields = items.fields(row)
    file = None if pictures is None else pictures / f"{fields['item_id']}.jpg"
    picture = items.image(row)
    if picture is not None and file is not None and file.exists():
        picture = file.read_bytes()
    told = {name: fields[name] for name in (ITEM_ID, *TEXT_FIELDS) if fields.get(name) is not None}
    return told if picture is None else {**told, "image_base64": base64.b64encode(picture).decode()}


def histories(dataset: Dataset, num_items: int, users: int, rng: np.random.Generator) -> list[list[str]]:
    """The newest events of so many users on the first `num_items` items."""
    bounds, rows = dataset.events.offsets, dataset.events.rows
    found: list[list[str]] = []
    for user in rng.permutation(len(bounds) - 1):
        known = [row for row in rows[bounds[user] : bounds[user + 1]] if row < num_items][-HISTORY_ITEMS:]
        if known and len(found) < users:
            found.append([dataset.items.item_ids[row] for row in known])
    return found


def compared(
    whole: Recommender, part: Recommender, histories: Sequence[Sequence[str]], added: Sequence[str]
) -> dict[str, Any]:
    """How the ranks and the scores of the items that were added differ between two recommenders."""
    same, moved, apart = 0, 0, 0.0
    for history in histories:
        query = Query(list(history), len(whole.items), exclude_history=False)
        one, other = (found.answer([query])[0].items for found in (part, whole))
        at, there = ({item: place for place, (item, _) in enumerate(ranked)} for ranked in (one, other))
        score, expected = dict(one), dict(other)
        for item in added:
            same += at[item] == there[item]
            moved = max(moved, abs(at[item] - there[item]))
            apart = max(apart, abs(score[item] - expected[item]))
    return {
        "users": len(histories),
        "ranks": len(histories) * len(added),
        "same_rank": same,
        "largest_difference_of_ranks": moved,
        "largest_difference_of_scores": apart,
    }


if __name__ == "__main__":
    main()
