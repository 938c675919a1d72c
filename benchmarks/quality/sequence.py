"""SASRec with its losses on one prepared data set, several seeds, beside popularity: the figures to hold against the
published ones.

    python -m benchmarks.quality.sequence DATA --scorers sasrec_sampled --seeds 0 1 2 [--set sasrec.width=128 ...]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from typing import Any

import numpy as np
import torch

from pixrec.config import load_config
from pixrec.data.sequences import HeldOut, load_dataset
from pixrec.evaluation import bootstrap_ci
from pixrec.metrics import rank_targets, user_metrics
from pixrec.scorers import Scorer, train_sasrec
from pixrec.scorers.baselines import Popularity

METRICS = ("recall@1", "recall@10", "ndcg@10")


def ranks(scorer: Scorer, held_out: HeldOut) -> dict[str, np.ndarray]:
    """Ranks (B,) of the users' targets, seen items allowed and filtered."""
    parts: dict[str, list[np.ndarray]] = {"allowed": [], "filtered": []}
    for start in range(0, len(held_out.targets), 256):
        block = held_out.only(np.arange(start, min(start + 256, len(held_out.targets))))
        found = rank_targets(scorer.scores(block.users), block.targets, block.histories)
        parts["allowed"].append(found.allowed)
        parts["filtered"].append(found.filtered)
    return {seen: np.concatenate(found) for seen, found in parts.items()}


def figures(found: dict[str, np.ndarray]) -> dict[str, Any]:
    """Mean and interval over the users of each of METRICS, for each kind of `ranks`."""
    result = {}
    for seen, of_users in found.items():
        values = user_metrics(of_users, (1, 10))
        result[seen] = {m: [round(float(values[m].mean()), 4), *np.round(bootstrap_ci(values[m]), 4)] for m in METRICS}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("--scorers", nargs="+", default=["sasrec_sampled"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--set", nargs="*", default=[], dest="overrides")
    parser.add_argument("--epochs", type=int, help="train for so many; otherwise the first seed's validation tells")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config, dataset = load_config("", args.overrides).sasrec, load_dataset(args.data)
    held_out = dataset.held_out("test")
    popularity = Popularity(dataset.training_counts())
    print(json.dumps({"scorer": "popularity", **figures(ranks(popularity, held_out))}), flush=True)
    for name in args.scorers:
        epochs = args.epochs
        for seed in args.seeds:
            started = time.monotonic()
            scorer = train_sasrec(
                name, dataset, dataclasses.replace(config, seed=seed), _validations, epochs, args.device
            )
            epochs = int(scorer.figures["epoch"])
            row = {"scorer": name, "seed": seed, "seconds": round(time.monotonic() - started), "epochs": epochs}
            print(json.dumps({**row, **figures(ranks(scorer, held_out))}), flush=True)


def _validations(row: dict[str, Any]) -> None:
    if "valid_ndcg@10" in row:
        print(json.dumps({k: round(v, 4) for k, v in row.items()}), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
