"""The table of learned id vectors: memory an item and time a step, by the optimiser that moves it.

    python -m benchmarks.scale.ids [10000 1000000 10000000]

Steps of the compact tower on id vectors alone, 64 wide, 128 histories of up to 50 events a step, 256 sampled negatives.
Bytes an item are those of the weights, their gradient, the optimiser's state and the mean of the weights, as allocated.
AdamW is left out where it would take more than 4 GB.
"""

from __future__ import annotations

import sys
import time

import numpy as np
import torch

from pixrec.config import CompactConfig, SequenceConfig
from pixrec.data.sequences import Histories
from pixrec.model.compact import CompactTower
from pixrec.training.compact import CompactTrainer

SIZES, WIDTH, USERS, EVENTS, STEPS = (10_000, 1_000_000, 10_000_000), 64, 2_000, 50, 12
MOST_BYTES = 4 * 2**30


def main(argv: list[str]) -> int:
    torch.set_num_threads(1)
    print(f"{'items':>12} {'optimiser':18} {'bytes an item':>14} {'ms a step':>10}")
    for size in [int(a) for a in argv] or SIZES:
        for optimizer in ("adamw", "rowwise_adagrad"):
            bytes_an_item = 24 * WIDTH if optimizer == "adamw" else 4 * WIDTH + 4
            if bytes_an_item * size > MOST_BYTES:
                print(f"{size:12,} {optimizer:18} {bytes_an_item:14,} (by computation)")
                continue
            held, milliseconds = measure(size, optimizer)
            print(f"{size:12,} {optimizer:18} {held / size:14,.0f} {milliseconds:10.0f}", flush=True)
    return 0


def measure(size: int, optimizer: str) -> tuple[int, float]:
    """Bytes held for the table, and milliseconds of the median step."""
    rows = np.random.default_rng(0).integers(0, size, USERS * EVENTS).astype(np.int32)
    starts = np.arange(0, len(rows), EVENTS)
    config = SequenceConfig(loss="sampled", id_optimizer=optimizer)  # type: ignore[arg-type]
    tower = CompactTower(WIDTH, CompactConfig(max_history_items=EVENTS), None, size)
    histories = Histories(rows, starts, starts + EVENTS)
    trainer = CompactTrainer(tower, histories, np.ones(size, np.int32), None, np.arange(size), config)
    times = []
    for _ in range(STEPS):
        began = time.perf_counter()
        trainer.train_step()
        times.append(time.perf_counter() - began)
    table = tower.id_embedding.weight  # type: ignore[union-attr]
    held = [table, *trainer.optimizer.state[table].values(), *trainer.mean.tensors().values()]
    of_table = [t for t in held if len(t.shape) and len(t) == size]
    sizes = {t.data_ptr(): t.numel() * t.element_size() for t in of_table if t.data_ptr()}
    gradient = 0 if table.grad is None else table.grad.numel() * 4
    return sum(sizes.values()) + gradient, 1000 * float(np.median(times[2:]))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
