"""Memory as `pixrec train --dry-run` computes it, beside what training takes: SmolVLM-256M's shape on the CPU.

    python -m benchmarks.speed.plan [way ...]      # all weights, all with activations computed again, LoRA

A step of two histories of two items, with two pictures of 512 px, in float32, each way in a process of its own.
Measured is the most memory that is resident at a time during the step, less what was there before the weights were
read. On a GPU nothing of this has been measured.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from benchmarks.processes import own_memory_mib
from benchmarks.speed import training
from pixrec.training.dry_run import plan_memory
from pixrec.training.interleaved import InterleavedTrainer
from pixrec.training.reading import Collator, Reader
from pixrec.training.windows import ShiftedWindows

WAYS = {
    "all weights": [],
    "all weights, activations again": ["train.activation_checkpointing=true"],
    "LoRA": ["model.lora.enabled=true"],
}
HISTORIES = [np.array([0, 1]), np.array([1, 0])]


def measure(way: str) -> dict[str, int]:
    """Bytes, computed by kind and measured."""
    torch.set_num_threads(1)
    before = own_memory_mib(os.getpid())
    settings = ["train.histories_per_step=2", "model.user_tower=interleaved", "train.modality_dropout=0.0", *WAYS[way]]
    work = training.make("cpu", "smolvlm-256m", settings)
    config = work.config
    source = ShiftedWindows(HISTORIES, config.model.max_history_items, config.train)
    collator = Collator(work.catalog, np.ones(len(work.catalog)), config, source.examples_per_step)
    batch = Reader(source, collator).read(0, 0, 1).passes[0].batch()
    trainer = InterleavedTrainer(work.model.tower, source, collator, config)
    for parameter in trainer.named.values():  # what the optimiser keeps is there from the second step on
        parameter.grad = torch.zeros_like(parameter)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    trainer.train_step()
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    measured = 1024 * int(peak.split()[1]) - int(2**20 * before)
    return {**plan_memory(work.model.tower.to("meta"), batch, config), "measured": measured}


def main() -> None:
    if sys.argv[1:2] == ["alone"]:
        print(json.dumps(measure(sys.argv[2])))
        return
    for way in sys.argv[1:] or WAYS:
        command = [sys.executable, "-m", "benchmarks.speed.plan", "alone", way]
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}  # what is freed goes back
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        found = json.loads(done.stdout.splitlines()[-1])
        parts = ", ".join(f"{name} {size / 2**20:,.0f}" for name, size in found.items())
        print(f"{way}: MiB: {parts}; computed / measured {found['total'] / found['measured']:.2f}", flush=True)


if __name__ == "__main__":
    main()
