"""The ablation table: what each part of the objective, each sign of beta, the temperature, the negatives and the
pictures are worth, on the synthetic shop, without Ray.

    python -m benchmarks.quality.ablation --out ablation.jsonl --seeds 0 1 2 --items 600 --users 2500 --steps 750
    python -m benchmarks.quality.ablation --out ablation.jsonl --table      # only print what is there

Every cell trains a model from scratch with the same data, the same number of steps and the default settings but for
those it names, and ranks the test targets among the whole catalog. One line of JSON a cell and seed; what the file
holds already is not run again, so an interrupted table goes on. Recall@10 and NDCG@10 break ties at random, which
spares the text-only model the penalty for its equal texts. Mean over the seeds, with the 95 % interval of Student's t.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pixrec.artifact import new_model
from pixrec.config import Config, SyntheticConfig, load_config
from pixrec.data.items import ItemTable
from pixrec.data.sequences import Dataset, Events, HeldOut
from pixrec.data.synthetic import build_world, picture, shop
from pixrec.metrics import random_tie_metrics, rank_targets
from pixrec.model.catalog import Catalog
from pixrec.schema import OK, PREPARED_ITEM_FIELDS
from pixrec.training.interleaved import InterleavedTrainer
from pixrec.training.reading import Collator
from pixrec.training.windows import ShiftedWindows

CELLS: dict[str, list[str]] = {
    "default": [],
    "NIG alone": ["train.alpha=0", "train.beta=0"],
    "TT alone": ["train.beta=0", "train.alpha=1"],
    "UT alone": ["train.alpha=0", "train.beta=1"],
    "NIG and UT": ["train.alpha=0", "train.beta=0.9"],
    "TT and UT": ["train.alpha=0.1", "train.beta=0.9"],
    "paper's weights": ["train.beta=0.025", "train.alpha=0.125", "train.temperature=0.5"],
    "paper's weights, beta < 0": ["train.beta=-0.025", "train.alpha=0.125", "train.temperature=0.5"],
    "beta < 0": ["train.beta=-0.9"],
    "tau fixed at 0.07": ["train.learnable_temperature=false"],
    "tau fixed at 0.5": ["train.learnable_temperature=false", "train.temperature=0.5"],
    "symmetric": ["train.symmetric=true"],
    "history masked": ["train.mask_history=true"],
    "no logQ": ["train.logq_correction=false"],
    "128 extra negatives": ["train.extra_negatives=128"],
    "local negatives of 4": ["train.gradient_accumulation=4"],  # what 4 workers would contrast, each by itself
    "mean pooling": ["model.user_pooling=mean"],
    "without pictures": ["model.modalities=text"],
    "without text": ["model.modalities=image"],
}
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
FIGURES = ("recall@1", "recall@10", "ndcg@10")


def synthetic_dataset(config: SyntheticConfig) -> Dataset:
    """The synthetic shop as `prepare` would leave it, in memory."""
    world = build_world(config)
    count = len(world.item_ids)
    columns = {
        "item_id": world.item_ids,
        "title": world.title,
        "brand": world.brand,
        "category": world.category,
        "description": [None] * count,
        "price": world.price,
        "image": [picture(world, row) for row in range(count)],
        "image_status": [OK] * count,
    }
    items = ItemTable(pa.table(columns, schema=pa.schema(PREPARED_ITEM_FIELDS)))
    bought = shop(world)
    order = np.lexsort((bought.timestamp, bought.user))
    users, lengths = np.unique(bought.user, return_counts=True)
    events = Events(
        [f"u{user}" for user in users],
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        bought.item[order],
        bought.timestamp[order],
    )
    info = {"fingerprint": repr(config), "split": {"kind": "leave_one_out"}, "images": {"ok": count}}
    return Dataset("memory", items, info, events)


def trained_and_ranked(dataset: Dataset, config: Config) -> dict[str, Any]:
    """Train for `train.max_steps` and rank the test targets."""
    model = new_model(config, [dataset.items.text(row) for row in range(len(dataset.items))])
    catalog = Catalog(dataset.items, model.encoder)
    source = ShiftedWindows(dataset.training_histories(), config.model.max_history_items, config.train)
    collator = Collator(catalog, dataset.training_counts(), config, source.examples_per_step)
    trainer = InterleavedTrainer(model.tower, source, collator, config)
    started, row = time.perf_counter(), {}
    while trainer.step < trainer.total_steps:
        row = trainer.train_step()
        if config.train.extra_negatives and trainer.step % config.train.validate_every_steps == 0:
            trainer.validate(_few(dataset.held_out("valid")))
    seconds = time.perf_counter() - started
    held_out, embedder = dataset.held_out("test"), model.embedder()
    vectors = embedder.items(catalog, np.arange(len(catalog)))
    found = []
    for start in range(0, len(held_out.targets), 64):
        histories = held_out.histories[start : start + 64]
        scores = embedder.users(catalog, histories, vectors) @ vectors.T
        found.append(rank_targets(scores, held_out.targets[start : start + 64]))
    ranks, ties = (np.concatenate([getattr(f, name) for f in found]) for name in ("allowed", "ties"))
    figures = random_tie_metrics(ranks, ties, (1, 10))
    last = {name: value for name, value in row.items() if name.startswith(("loss", "temperature"))}
    return {**{name: figures[name] for name in FIGURES}, **last, "steps": trainer.step, "seconds": round(seconds, 1)}


def _few(held_out: HeldOut) -> HeldOut:
    return HeldOut(held_out.user_ids[:64], held_out.histories[:64], held_out.targets[:64])


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a row a cell, the mean of the seeds and their interval."""
    lines = ["| cell | seeds | R@1 | R@10 | NDCG@10 |", "|---|---|---|---|---|"]
    for cell in dict.fromkeys(row["cell"] for row in rows):
        of_cell = [row for row in rows if row["cell"] == cell]
        figures = (_interval([row[name] for row in of_cell]) for name in FIGURES)
        lines.append(f"| {cell} | {len(of_cell)} | {' | '.join(figures)} |")
    return "\n".join(lines)


def _interval(values: list[float]) -> str:
    mean = statistics.fmean(values)
    if len(values) not in T_95:
        return f"{mean:.3f}"
    half = T_95[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:.3f} ± {half:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description="The ablation table on the synthetic shop.")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, one for each cell and seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--items", type=int, default=600)
    parser.add_argument("--users", type=int, default=2500)
    parser.add_argument("--steps", type=int, default=750)
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS))
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value", help="settings of every cell")
    parser.add_argument("--table", action="store_true", help="run nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    setting = {"items": options.items, "users": options.users, "max_steps": options.steps, "set": options.set}
    rows = [row for row in rows if row["setting"] == setting]
    if not options.table:
        done = {(row["cell"], row["seed"]) for row in rows}
        dataset = synthetic_dataset(SyntheticConfig(num_items=options.items, num_users=options.users))
        for seed in options.seeds:
            for cell in options.cells:
                if (cell, seed) in done:
                    continue
                common = ["train.num_workers=1", "train.epochs=1000", f"train.max_steps={options.steps}"]
                config = load_config("", [*common, *options.set, *CELLS[cell], f"train.seed={seed}"])
                row = {"cell": cell, "seed": seed, "setting": setting, **trained_and_ranked(dataset, config)}
                rows.append(row)
                with options.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(f"{cell}, seed {seed}: R@10 {row['recall@10']:.3f}, {row['seconds']} s", file=sys.stderr)
    print(table(rows))


if __name__ == "__main__":
    main()
