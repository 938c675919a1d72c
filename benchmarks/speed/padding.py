"""Padding of real batches, and what a step takes: rows parted by length beside rows padded to the longest of the batch.

    pixrec prepare --items D/items.parquet --interactions D/interactions.parquet --out data
    python -m benchmarks.speed.padding data [--steps 12] [--set key=value ...]

Each step of the interleaved training on `data`, drawn at random, is computed forward and backward in every way in turn,
with the same weights of `pixrec-tiny`: processor time on one thread, the median of the ratios to one pass for all rows.
A way is named by `towers.PASS_TOKENS`, what a pass is taken to cost beside its tokens.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from typing import Any

import numpy as np
import torch

from pixrec.artifact import new_model
from pixrec.config import load_config
from pixrec.data.sequences import load_dataset
from pixrec.model import towers
from pixrec.model.catalog import Catalog
from pixrec.model.objective import Batch, TrainingTask
from pixrec.model.seeding import reseed
from pixrec.model.towers import length_groups, tokens_of
from pixrec.training.reading import Collator, Reader
from pixrec.training.windows import ShiftedWindows

ONE_PASS = 10**9
WAYS = (ONE_PASS, 1000, 512, 256, 128, 64)


def take(task: TrainingTask, batch: Batch, pass_tokens: int) -> dict[str, Any]:
    """Forward and backward of a batch: loss, gradient, seconds, tokens, tokens computed, passes."""
    towers.PASS_TOKENS = pass_tokens
    task.zero_grad()
    reseed(0, torch.device("cpu"))
    started = time.process_time()
    loss, _ = task(batch)
    loss.backward()
    seconds = time.process_time() - started
    lengths = [batch.items.length, batch.histories.length]
    return {
        "seconds": seconds,
        "loss": loss.item(),
        "gradient": torch.cat([p.grad.flatten() for p in task.parameters() if p.grad is not None]),
        "tokens": np.sum([tokens_of(length) for length in lengths], axis=0),
        "passes": sum(len(length_groups(length.numpy())) for length in lengths),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="a prepared data set")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value")
    a = parser.parse_args()
    torch.set_num_threads(1)
    config = load_config("", ["model.user_tower=interleaved", "train.num_workers=1", *a.set])
    data = load_dataset(a.data)
    model = new_model(config, [data.items.text(row) for row in range(len(data.items))])
    source = ShiftedWindows(data.training_histories(), config.model.max_history_items, config.train)
    catalog = Catalog(data.items, model.encoder)
    reader = Reader(source, Collator(catalog, data.training_counts(), config, source.examples_per_step))
    task, found = TrainingTask(model.tower.train(), config.train), {way: list[dict[str, Any]]() for way in WAYS}
    for step in np.random.default_rng(0).choice(source.total_steps(), a.steps, replace=False):
        batch = reader.read(int(step), 0, 1).passes[0].batch()
        for way in WAYS:
            found[way].append(take(task, batch, way))
    print(f"{'a pass, in tokens':>18} {'padding':>8} {'passes':>7} {'time':>6} {'loss differs':>13} {'gradient':>9}")
    for way, rows in found.items():
        pairs = list(zip(rows, found[ONE_PASS], strict=True))
        read, computed = np.sum([row["tokens"] for row in rows], axis=0)
        time_ratio = statistics.median(row["seconds"] / one["seconds"] for row, one in pairs)
        loss = max(abs(row["loss"] / one["loss"] - 1) for row, one in pairs)
        apart = max(float((row["gradient"] - one["gradient"]).norm() / one["gradient"].norm()) for row, one in pairs)
        name = "one for all rows" if way == ONE_PASS else str(way)
        passes = math.fsum(row["passes"] for row in rows) / len(rows)
        print(f"{name:>18} {1 - read / computed:8.1%} {passes:7.1f} {time_ratio:6.2f} {loss:13.0e} {apart:9.0e}")


if __name__ == "__main__":
    main()
