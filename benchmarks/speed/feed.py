"""Training fed in its own process and by Ray Data: steps a second, and the share of a step that waits for data.

    python -m benchmarks.speed.feed [--items 4000] [--steps 20] [--readers 1,2,4]

One worker, `pixrec-tiny` with pictures of 224 px. Every item has a JPEG of its own, and no decoded picture is kept: so
it is with a catalog that no cache holds.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import statistics
import tempfile
import time
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import yaml
from PIL import Image

from pixrec import storage
from pixrec.artifact import new_model
from pixrec.cluster.feed import feed_by_ray_data
from pixrec.cluster.session import connect
from pixrec.config import Config, load_config
from pixrec.data.arrays import write_arrays
from pixrec.data.joined import join_datasets
from pixrec.data.pictures import complete, write_part
from pixrec.data.sequences import DATASET_MARKER, FORMAT, ITEMS_FOLDER, PICTURES_FOLDER, load_dataset
from pixrec.model.catalog import Catalog
from pixrec.training.interleaved import InterleavedTrainer
from pixrec.training.phases import interleaved_trainer

PICTURE_PX, IMAGE_PX, HISTORY, WARM_UP = 320, 224, 9, 3
CONFIG = {
    "model": {"user_tower": "interleaved", "tiny": {"image_size_px": IMAGE_PX, "patch_size_px": 28}},
    "train": {"histories_per_step": 16, "num_workers": 1, "epochs": 100},
}


def write_shop(uri: str, items: int) -> None:
    """A prepared data set of `items` items and as many users of HISTORY events and two held out."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (items, 20, 20, 3), dtype=np.uint8)
    write_part(storage.join(uri, PICTURES_FOLDER), 0, [_jpeg(pixels) for pixels in coarse])
    complete(storage.join(uri, PICTURES_FOLDER), 1)
    ids, events = [f"i{row:07d}" for row in range(items)], HISTORY + 2
    columns = {"item_id": ids, "title": [f"Product {row * 7919 % 10007} of {row % 97}" for row in range(items)]}
    storage.write_table(storage.join(uri, ITEMS_FOLDER, "part-000000.parquet"), pa.table(columns))
    rows = rng.integers(0, items, items * events, dtype=np.int32)
    write_arrays(
        uri,
        item_ids=ids,
        has_image=np.ones(items, bool),
        training_count=np.bincount(rows, minlength=items),
        user_ids=[f"u{user:07d}" for user in range(items)],
        user_offset=np.arange(0, items * events + 1, events),
        item_row=rows,
        timestamp=np.arange(items * events),
    )
    facts = {"format": FORMAT, "fingerprint": f"feed-{items}", "split": {"kind": "leave_one_out"}}
    storage.write_json(storage.join(uri, DATASET_MARKER), facts)


def _jpeg(coarse: np.ndarray) -> bytes:
    sink = io.BytesIO()
    picture = Image.fromarray(coarse).resize((PICTURE_PX, PICTURE_PX), Image.Resampling.BICUBIC)
    picture.save(sink, "JPEG", quality=90)
    return sink.getvalue()


def measure(trainer: InterleavedTrainer, steps: int) -> dict[str, float]:
    """Of some steps after the first ones: steps a second, and medians of what each step says."""
    for _ in range(WARM_UP):
        trainer.train_step()
    started = time.perf_counter()
    rows = [trainer.train_step() for _ in range(steps)]
    seconds = time.perf_counter() - started
    wait = statistics.median(row["data_wait_share"] for row in rows)
    return {"steps_per_second": steps / seconds, "wait": wait, "loss": rows[-1]["loss"]}


def main(items: int, steps: int, readers: Sequence[int]) -> None:
    config = load_config(yaml.safe_dump(CONFIG), base=Config())
    with tempfile.TemporaryDirectory(prefix="pixrec-feed-") as folder, connect(progress=False):
        write_shop(folder, items)
        data = join_datasets([load_dataset(folder)])
        texts = [data.items.text(row) for row in range(len(data.items))]
        found: dict[str, dict[str, float]] = {}
        for count in [0, *readers]:
            train = dataclasses.replace(config.train, readers_per_worker=count or None)
            settings, model = dataclasses.replace(config, train=train), new_model(config, texts)
            trainer = interleaved_trainer(model, Catalog(data.items, model.encoder, cache_bytes=0), data, settings)
            if count:
                feed_by_ray_data(trainer, [folder], settings)
            name = f"{count} readers of Ray Data" if count else "in the process"
            found[name] = measure(trainer, steps)
            trainer._reads.close()  # type: ignore[attr-defined]
            rate, wait, loss = found[name].values()
            print(f"{name:24} {rate:6.2f} steps/s, {wait:4.0%} of a step waits; loss {loss:.9f}", flush=True)
        assert len({row["loss"] for row in found.values()}) == 1, "the batches differ"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.feed")
    parser.add_argument("--items", type=int, default=4000)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--readers", default="1,2,4", type=lambda text: [int(word) for word in text.split(",")])
    chosen = parser.parse_args()
    main(chosen.items, chosen.steps, chosen.readers)
