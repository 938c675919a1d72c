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
import pyarrow as pa
import torch

import pixrec
from pixrec import storage
from pixrec.artifact import Model, index_version, load_model, save_model, untrained_model
from pixrec.cluster.vision import PictureEncoder, TextEncoder
from pixrec.config import Config, change_config, dump_config, load_config
from pixrec.data.items import PICTURES_FOLDER
from pixrec.data.pictures import open_pictures
from pixrec.data.sequences import Dataset, load_dataset
from pixrec.data.tokens import complete_store, covered, store_folder, stored_pictures, texts_place, tokens_place
from pixrec.model.catalog import Catalog
from pixrec.model.encoders import EncoderTower
from pixrec.model.texts import find_texts, text_fingerprint, text_schema
from pixrec.model.vision import find_tokens, token_schema, vision_fingerprint
from pixrec.report import format_table
from pixrec.schema import IMAGE, ITEMS
from pixrec.training.choice import choose
from pixrec.training.phases import begin
from pixrec.training.stages import check_ready, model_facts, plan, vocabulary

SCORERS = ("popularity", "repeat_last", "item_transition", "blend")


def store_frozen(data: str, config: Config) -> None:
    """What `pixrec train` does before the first step where pictures and texts are encoded once, and at which rate."""
    backbone = untrained_model(config, [data]).tower.backbone
    pictures, texts = (of(data, config.model, "auto") for of in (tokens_place, texts_place))
    stored = open_pictures(storage.join(data, PICTURES_FOLDER))
    if pictures is not None and not covered(folder := store_folder(pictures, vision_fingerprint(backbone))):
        started, encoder = time.monotonic(), PictureEncoder(dump_config(config), [data], folder)
        for start in range(0, len(stored), 512):
            block = stored.read(np.arange(start, min(start + 512, len(stored))))
            encoder(pa.table({IMAGE: pa.array(block, pa.binary())}))
        complete_store(folder, token_schema(backbone), ["stored"])
        _say(f"pictures stored, {len(stored_pictures(folder)) / (time.monotonic() - started):.1f} a second")
    if texts is not None and not covered(folder := store_folder(texts, text_fingerprint(backbone))):
        started, text_encoder = time.monotonic(), TextEncoder(dump_config(config), [data], folder)
        text_encoder(pa.table({"file": [str(file) for file in storage.table_files(storage.join(data, ITEMS))]}))
        complete_store(folder, text_schema(backbone), ["stored"])
        _say(f"texts stored, {len(stored_pictures(folder)) / (time.monotonic() - started):.1f} a second")


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
    if isinstance(model.tower, EncoderTower):
        model.tower.stored_texts = find_texts(dataset.uri, model.config, model.tower.backbone)
    catalog = Catalog(dataset.items, model.encoder, tokens=tokens)
    vectors, content = model.embedder().items_and_search(catalog, np.arange(len(dataset.items)), 64)
    facts = {"data": storage.absolute(dataset.uri), "data_fingerprint": dataset.info["fingerprint"]}
    width = 0 if content is None else content.shape[1]
    with index_version(str(out / "index"), model.fingerprint, vectors.shape[1], "float32", facts, width) as writer:
        hashes = [dataset.items.content_hash(row) for row in range(len(dataset.items))]
        writer.add(dataset.items.item_ids, vectors, hashes, content=content)


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
        if config.model.text_encoder is not None:
            store_frozen(storage.absolute(a.data), config)
        publish(train(a.data, a.out, config), dataset, a.out)
    scorers = [*SCORERS, *a.scorers]
    config = change_config(config, {"evaluate.scorers": scorers})
    places = (str(a.out / name) for name in ("model", "index", "report"))
    model, index, out = places
    report = pixrec.evaluate(model, a.data, out, index=index, config=config)
    print(format_table(report.info))


if __name__ == "__main__":
    main()
