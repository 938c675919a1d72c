"""What `pixrec train` chooses for a data set, beside what counting gives: trained, embedded and evaluated without Ray.

    pixrec prepare --items D/items.parquet --interactions D/interactions.parquet --out data
    python -m benchmarks.quality.default data --out FOLDER [--seed 0] [--set key=value ...] [--scorers sasrec_full ...]

Prints the line that says what was chosen and the table of the report; FOLDER gets `model`, `index` and `report`, as the
commands would make them. `--set` comes on top of the choice.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pixrec
from pixrec import storage
from pixrec.artifact import Model, index_version, load_model, save_model, untrained_model
from pixrec.config import Config, change_config, load_config
from pixrec.data.sequences import Dataset, load_dataset
from pixrec.model.catalog import Catalog
from pixrec.model.vision import (
    complete_store,
    encode_pictures,
    find_tokens,
    store_folder,
    token_schema,
    tokens_place,
    vision_fingerprint,
    write_part,
)
from pixrec.report import format_table
from pixrec.training.choice import choose
from pixrec.training.phases import begin
from pixrec.training.stages import check_ready, model_facts, plan, vocabulary

SCORERS = ("popularity", "repeat_last", "item_transition", "blend")


def store_pictures(dataset: Dataset, model: Model, config: Config, batch: int = 32) -> float:
    """What `pixrec train` does before the first step where pictures are encoded once; pictures per second."""
    place = tokens_place(dataset.uri, config.model, config.train.picture_tokens)
    rows = np.flatnonzero(dataset.items.with_image)
    if place is None or not len(rows) or find_tokens(dataset.uri, config, model.tower.backbone) is not None:
        return 0.0
    backbone, started = model.tower.backbone, time.monotonic()
    folder = store_folder(place, vision_fingerprint(backbone))
    for start in range(0, len(rows), batch):
        pictures = [picture for picture in dataset.items.images(rows[start : start + batch]) if picture is not None]
        write_part(folder, encode_pictures(backbone, pictures))
    complete_store(folder, token_schema(backbone), [dataset.info["fingerprint"]])
    return len(rows) / (time.monotonic() - started)


def train(data: str, out: Path, config: Config) -> Model:
    """The phases of `pixrec train` one after the other, the best weights of each kept."""
    check_ready(data, str(out / "model"), config, False)
    dataset, start, stages = load_dataset(data), None, plan(data, config)
    for number, stage in enumerate(stages):
        started = time.monotonic()
        begun = begin(stage.phase, stage.data, stage.config, "cpu", start=start, vocabulary=vocabulary(stages))
        _say(f"{stage.phase}: vectors ready after {time.monotonic() - started:.0f} s")
        found = begun.trainer.fit(begun.held_out, _validations)
        last = number == len(stages) - 1
        start = str(out / ("model" if last else f"stage-{number}"))
        save_model(start, begun.model, {"metrics": found, **(model_facts(dataset, config) if last else {})})
        _say(f"{stage.phase}: trained after {time.monotonic() - started:.0f} s")
    return load_model(str(out / "model"))


def publish(model: Model, dataset: Dataset, out: Path) -> None:
    """An index version with the vectors of all items."""
    tokens = find_tokens(dataset.uri, model.config, model.tower.backbone)
    catalog = Catalog(dataset.items, model.encoder, tokens=tokens)
    vectors = model.embedder().items(catalog, np.arange(len(dataset.items)), 64)
    facts = {"data": storage.absolute(dataset.uri), "data_fingerprint": dataset.info["fingerprint"]}
    with index_version(str(out / "index"), model.fingerprint, vectors.shape[1], "float32", facts) as writer:
        writer.add(dataset.items.item_ids, vectors, [dataset.items.content_hash(r) for r in range(len(dataset.items))])


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _validations(row: dict[str, Any]) -> None:
    if "valid_ndcg@10" in row:
        _say(json.dumps({key: round(value, 4) for key, value in row.items()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="a prepared data set")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value")
    parser.add_argument("--scorers", nargs="*", default=[], help="beside popularity, repeat_last, item_transition")
    parser.add_argument("--threads", type=int, default=2)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    dataset = load_dataset(a.data)
    choice = choose(dataset)
    _say(choice.why)
    settings = [f"train.seed={a.seed}", f"sasrec.seed={a.seed}", *a.set]
    config = load_config(overrides=settings, base=change_config(Config(), choice.settings))
    if not storage.exists(str(a.out / "model" / "model.json")):
        speed = store_pictures(dataset, untrained_model(config, [storage.absolute(a.data)]), config)
        _say(f"pictures stored, {speed:.1f} a second" if speed else "no picture to store")
        publish(train(a.data, a.out, config), dataset, a.out)
    scorers = [*SCORERS, *a.scorers]
    config = change_config(config, {"evaluate.scorers": scorers})
    places = (str(a.out / name) for name in ("model", "index", "report"))
    model, index, out = places
    report = pixrec.evaluate(model, a.data, out, index=index, config=config)
    print(format_table(report.info))


if __name__ == "__main__":
    main()
