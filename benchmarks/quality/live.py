"""Whether an item that is added to a running server is found as well as one of the index.

    python -m benchmarks.quality.live DATA --pictures FOLDER [--model MODEL] [--share 0.1] [--users 200]

A share of the items of a prepared data set is left out of an index and then sent to the store as /v1/items does,
with the columns of the data set and the pictures as their files lie in FOLDER (`<item_id>.jpg`), or as the data set has
them. For each user all items are ranked, by that and by an index that holds them all. Prints one JSON object: how many
ranks of the items that were added are the same, and by how much scores differ. Without --model it is an untrained one:
the question is whether two ways to a vector are the same, which no training answers. No Ray, no HTTP.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from pixrec.artifact import Index, load_model, new_model
from pixrec.config import CompactConfig, Config, ModelConfig
from pixrec.data.sequences import load_dataset
from pixrec.live.sqlite import SqliteStore
from pixrec.model.catalog import Catalog
from pixrec.query import NewItem, Query
from pixrec.recommender import Recommender
from pixrec.schema import TEXT_FIELDS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--model")
    parser.add_argument("--pictures")
    parser.add_argument("--share", type=float, default=0.1)
    parser.add_argument("--users", type=int, default=200)
    a = parser.parse_args()
    torch.set_num_threads(1)
    dataset = load_dataset(a.data)
    items = dataset.items
    if a.model is None:
        config = Config(model=ModelConfig(user_tower="compact", compact=CompactConfig()))
        model = new_model(config, [items.text(row) for row in range(len(items))])
        model = dataclasses.replace(model, info={"fingerprint": "untrained"})
    else:
        model = load_model(a.model)
    started = time.perf_counter()
    vectors = model.embedder().items(Catalog(items, model.encoder), np.arange(len(items)))
    embedded = time.perf_counter() - started
    rng = np.random.default_rng(0)
    held = np.sort(rng.choice(len(items), round(a.share * len(items)), replace=False))
    rest = np.setdiff1d(np.arange(len(items)), held)
    counts, ids = np.zeros(len(items)), list(items.item_ids)
    whole = Recommender(model, Index("all", ids, vectors, {}), items, counts)
    part = Recommender(model, Index("part", [ids[row] for row in rest], vectors[rest], {}), items, counts)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        part.live.follow(SqliteStore(f"{folder}/live.sqlite", 1))
        for start in range(0, len(held), 50):
            new = {ids[row]: added(items, row, a.pictures) for row in held[start : start + 50]}
            assert part.live.store is not None
            part.live.store.put(part.model_version, *part.embed_new(new), len(items))
        adding = time.perf_counter() - started
        users = rng.choice(len(dataset.events.offsets) - 1, a.users, replace=False)
        bounds = dataset.events.offsets
        histories = [[ids[row] for row in dataset.events.rows[bounds[user] : bounds[user + 1]][-20:]] for user in users]
        queries = [Query(history, len(items), exclude_history=False) for history in histories if history]
        same, moved, apart, ranks = 0, 0, 0.0, 0
        for query in queries:
            one, other = (found.answer([query])[0].items for found in (part, whole))
            at, there = ({item: place for place, (item, _) in enumerate(ranked)} for ranked in (one, other))
            score, expected = dict(one), dict(other)
            for row in held:
                same += at[ids[row]] == there[ids[row]]
                moved = max(moved, abs(at[ids[row]] - there[ids[row]]))
                apart = max(apart, abs(score[ids[row]] - expected[ids[row]]))
                ranks += 1
    print(
        json.dumps(
            {
                "data": Path(a.data).name,
                "items": len(items),
                "added": len(held),
                "users": len(queries),
                "ranks": ranks,
                "same_rank": same,
                "largest_difference_of_ranks": moved,
                "largest_difference_of_scores": apart,
                "seconds_full_embed": round(embedded, 1),
                "seconds_adding": round(adding, 1),
            }
        )
    )


def added(items, row: int, pictures: str | None) -> NewItem:
    """The item as a shop would send it."""
    fields = items.fields(int(row))
    told = {name: fields[name] for name in TEXT_FIELDS if fields.get(name) is not None}
    file = None if pictures is None else Path(pictures) / f"{fields['item_id']}.jpg"
    picture = items.image(int(row))
    return NewItem(told, file.read_bytes() if file is not None and picture is not None and file.exists() else picture)


if __name__ == "__main__":
    main()
