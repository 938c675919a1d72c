"""Training as it is done here, beside a plain loop written the way the paper's reference trains; memory; scaling.

    python -m benchmarks.speed.training                       # speed, on one CPU thread
    python -m benchmarks.speed.training --memory              # peak memory of GradCache at 64 and 4,096 histories
    python -m benchmarks.speed.training --scaling             # 1 and 2 workers, gloo, a thread each
    python -m benchmarks.speed.training --device cuda --shape smolvlm-256m --histories 32 # speed and MFU, bf16
    python -m benchmarks.speed.training --device cuda --memory    # the same memory, of the device

The plain loop: every example (a prefix and its next item) is a prompt of its own, its text goes through the tokenizer
and its pictures through the decoder and the vision part at every step, no vector or picture is shared, and every prompt
is padded to the longest there may be. Same backbone, same weights, same objective, same optimiser, same precision.

MFU counts the arithmetic of a step as torch's FlopCounterMode does: matrix products and attention, forward and
backward, pictures and padding included.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText, LlamaConfig, SmolVLMConfig
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig

from benchmarks import workload
from benchmarks.timing import Row, seconds_each
from pixrec.artifact import Model, new_model
from pixrec.config import load_config
from pixrec.data.images import decode_image
from pixrec.model.catalog import Catalog
from pixrec.model.losses import info_nce, next_item_generation
from pixrec.model.usage import peak_flops
from pixrec.training.interleaved import InterleavedTrainer
from pixrec.training.reading import Collator
from pixrec.training.windows import ShiftedWindows

LENGTH, HISTORIES, PLAIN_EXAMPLES = 9, 16, 16
MEMORY_BATCHES, MICRO_BATCH, MEMORY_LENGTH = (64, 4096), 16, 3


def run(
    device: str = "cpu", shape: str = "pixrec-tiny", histories: int = HISTORIES, overrides: Sequence[str] = ()
) -> list[Row]:
    work = make(device, shape, overrides)
    trainer = trainer_of(work, histories, LENGTH)
    plain = PlainLoop(make(device, shape, overrides))
    last: dict[str, float] = {}

    def ours() -> None:
        last.update(trainer.train_step())

    with FlopCounterMode(display=False) as counter:
        ours()
    with FlopCounterMode(display=False) as plain_counter:
        plain.step()
    taken = seconds_each({"ours": finished(device, ours), "plain": finished(device, plain.step)}, rounds=5)
    examples = histories * (LENGTH - 1)
    facts = f"{100 * last['padding_share']:.0f} % padding, {100 * last['data_wait_share']:.1f} % waiting for data"
    mfu = f", {last['peak_memory_bytes'] / 2**30:.1f} GiB"
    if device == "cuda":
        peak = peak_flops(torch.cuda.get_device_name()) or math.nan
        used = (c.get_total_flops() / taken[n] / peak for c, n in ((counter, "ours"), (plain_counter, "plain")))
        mfu += ", MFU {:.3f} against {:.3f}".format(*used)
    return [
        Row(
            what=f"training {shape} on {device}, histories of {LENGTH} items",
            ours=examples / taken["ours"],
            alternative="a prompt an example, nothing shared",
            theirs=PLAIN_EXAMPLES / taken["plain"],
            unit="examples/s",
            note=facts + mfu,
        )
    ]


def finished(device: str, step: Callable[[], Any]) -> Callable[[], None]:
    """The step with what it has put in the device's queue."""

    def done() -> None:
        step()
        if device == "cuda":
            torch.cuda.synchronize()

    return done


def make(device: str, shape: str, overrides: Sequence[str]) -> workload.Workload:
    common = ["train.num_workers=1", "train.epochs=1000", "model.max_history_items=10"]
    if shape == "pixrec-tiny":
        work = workload.make(load_config("", [*common, *overrides]))
    else:
        work = workload.make(load_config("", common))
        with tempfile.TemporaryDirectory() as folder:
            write_smolvlm_256m(folder, work.model)
            config = load_config("", [*common, f"model.backbone={folder}", *overrides])
            model = new_model(config, [], device)
        work = workload.Workload(config, model, Catalog(work.catalog.table, model.encoder))
    work.model.tower.to(device)
    return work


def write_smolvlm_256m(folder: str, model: Model) -> None:
    """The shape of SmolVLM-256M-Instruct with random weights and the tokenizer of `model`, for `from_pretrained`."""
    tokenizer = model.encoder.tokenizer
    ids = tokenizer.get_vocab()
    text = LlamaConfig(
        vocab_size=49280, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=False, pad_token_id=ids["<pad>"],
    )  # fmt: skip
    vision = SmolVLMVisionConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, image_size=512,
        patch_size=16,
    )  # fmt: skip
    whole = SmolVLMConfig(text_config=text, vision_config=vision, image_token_id=ids["<image>"], scale_factor=4)
    AutoModelForImageTextToText.from_config(whole).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def trainer_of(work: workload.Workload, histories: int, length: int) -> InterleavedTrainer:
    train = dataclasses.replace(work.config.train, histories_per_step=histories)
    config = dataclasses.replace(work.config, train=train)
    rows = work.histories(max(histories, 64), length)
    source = ShiftedWindows(rows, config.model.max_history_items, config.train)
    counts = np.bincount(np.concatenate(rows), minlength=len(work.catalog))
    collator = Collator(work.catalog, counts, config, source.examples_per_step)
    return InterleavedTrainer(work.model.tower, source, collator, config)


class PlainLoop:
    """The loop to compare with."""

    def __init__(self, work: workload.Workload) -> None:
        self.config, self.tower, self.table = work.config, work.model.tower.train(), work.catalog.table
        self.encoder, self.tokenizer = work.model.encoder, work.model.encoder.tokenizer
        self.family, self.device = self.tower.backbone.family, self.tower.log_temperature.device
        self.optimizer = torch.optim.AdamW(self.tower.parameters(), lr=1e-4)
        picture = [*self.family.picture_prefix, *["<image>"] * self.family.tokens_per_picture]
        self.picture = "".join([*picture, *self.family.picture_suffix])
        model = self.config.model
        item_tokens = model.max_text_tokens + len(picture) + len(self.family.picture_suffix) + 1
        self.longest = item_tokens * (model.max_history_items + 1)
        self.rows = work.histories(64, LENGTH)
        self.rng = np.random.default_rng(0)

    def step(self) -> None:
        histories = [self.rows[i] for i in self.rng.integers(0, len(self.rows), PLAIN_EXAMPLES)]
        ends = self.rng.integers(1, LENGTH, PLAIN_EXAMPLES)
        prefixes = [h[:end] for h, end in zip(histories, ends, strict=True)]
        targets = np.array([h[end] for h, end in zip(histories, ends, strict=True)])
        self.optimizer.zero_grad(set_to_none=True)
        bf16 = self.config.train.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            loss = self.loss(prefixes, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.tower.parameters(), 1.0)
        self.optimizer.step()

    def loss(self, prefixes: list[np.ndarray], targets: np.ndarray) -> torch.Tensor:
        tower, config = self.tower, self.config.train
        ids, mask, hidden = self.read([[*p, t] for p, t in zip(prefixes, targets, strict=True)])
        lengths = torch.tensor([len(self.ids([*p])) for p in prefixes], device=self.device)
        place = torch.arange(ids.shape[1], device=self.device)
        before = mask & (place < lengths.unsqueeze(1))
        user = F.normalize(tower.user_tower.projection(mean(hidden, before)), dim=-1)
        conditioned = F.normalize(tower.item_proj(mean(hidden, mask & ~before)), dim=-1)
        _, alone_mask, alone = self.read([[t] for t in targets])
        item = F.normalize(tower.item_proj(mean(alone, alone_mask)), dim=-1)
        rows, own = torch.from_numpy(targets).to(self.device), torch.arange(len(targets), device=self.device)
        ut = info_nce(user, item, own, rows, tower.temperature)
        tt = info_nce(conditioned, item, own, rows, tower.temperature)
        texts = [len(self.tokenizer(self.table.text(int(t)))["input_ids"]) for t in targets]
        limit = lengths + torch.tensor(texts, device=self.device)
        named = (mask & ~before & (place < limit.unsqueeze(1)))[:, 1:]
        logits = tower.backbone.token_logits(hidden[:, :-1])  # of every position, as the library's own forward gives
        nig = next_item_generation(logits[named], ids[:, 1:][named])
        weights = {"nig": 1 - config.alpha - abs(config.beta), "tt": config.alpha, "ut": config.beta}
        return sum(weights[n] * p.total / p.examples for n, p in (("nig", nig), ("tt", tt), ("ut", ut)))

    def read(self, prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Prompts of catalog rows to token ids, mask and hidden states, all from scratch."""
        ids = torch.full((len(prompts), self.longest), self.encoder.pad_id)
        mask = torch.zeros(len(prompts), self.longest, dtype=torch.bool)
        for i, prompt in enumerate(prompts):
            tokens = self.ids(prompt)
            ids[i, : len(tokens)], mask[i, : len(tokens)] = torch.tensor(tokens), True
        size = self.family.image_size_px
        pixels = np.stack([decode_image(self.table.image(int(row)), size) for p in prompts for row in p])
        slots = torch.full(ids.shape, -1)
        is_picture = ids == self.family.image_token_id
        slots[is_picture] = torch.arange(int(is_picture.sum()))
        ids, mask, slots = ids.to(self.device), mask.to(self.device), slots.to(self.device)
        pictures = self.tower.backbone.picture_tokens(torch.from_numpy(pixels).to(self.device)).flatten(0, 1)
        return ids, mask, self.tower.backbone.hidden_states(ids, mask, slots, pictures)

    def ids(self, rows: list[int]) -> list[int]:
        text = "".join(f"{self.table.text(int(row))}{self.picture}{self.tokenizer.eos_token}" for row in rows)
        return self.tokenizer(text)["input_ids"]


def mean(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    weight = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)


def peak_memory(histories: int, device: str) -> float:
    """Peak bytes of a fresh process that takes one step of GradCache: resident, or on a GPU of its allocator."""
    command = [sys.executable, "-m", "benchmarks.speed.training", "--step-of", str(histories), "--device", device]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1])["peak_memory_bytes"])


def one_step(histories: int, device: str) -> dict[str, float]:
    work = make(device, "pixrec-tiny", [f"train.micro_batch_histories={MICRO_BATCH}"])
    return trainer_of(work, histories, MEMORY_LENGTH).train_step()


def _worker(rank: int, size: int, port: int, results: Any) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=size)
    trainer = trainer_of(make("cpu", "pixrec-tiny", []), HISTORIES * size, LENGTH)
    trainer.train_step()
    started = time.perf_counter()
    waits = [trainer.train_step()["data_wait_share"] for _ in range(8)]
    if rank == 0:
        results.put((8 * HISTORIES * size / (time.perf_counter() - started), float(np.mean(waits))))
    dist.destroy_process_group()


def throughput(size: int) -> tuple[float, float]:
    """Histories a second of `size` workers that read HISTORIES each, and the share of time they wait for data."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    workers = [context.Process(target=_worker, args=(rank, size, port, results)) for rank in range(size)]
    for worker in workers:
        worker.start()
    found = results.get()
    for worker in workers:
        worker.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shape", default="pixrec-tiny", choices=["pixrec-tiny", "smolvlm-256m"])
    parser.add_argument("--histories", type=int, default=HISTORIES, help="of one step of ours")
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--scaling", action="store_true")
    parser.add_argument("--step-of", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    load = functools.partial(print, f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    if options.step_of:
        print(json.dumps(one_step(options.step_of, options.device)))
    elif options.memory:
        small, large = (peak_memory(n, options.device) for n in MEMORY_BATCHES)
        print(f"GradCache, {MICRO_BATCH} histories at a time, peak memory on the {options.device}:")
        print(f"{MEMORY_BATCHES[0]} histories {small / 2**20:.0f} MiB, {MEMORY_BATCHES[1]} {large / 2**20:.0f} MiB, "
              f"{large / small:.2f}x")  # fmt: skip
    elif options.scaling:
        (one, wait), (two, waits) = throughput(1), throughput(2)
        print(f"1 worker {one:.1f} histories/s, waits {100 * wait:.1f} %; 2 workers {two:.1f}, {100 * waits:.1f} %; "
              f"efficiency {two / one / 2:.2f}")  # fmt: skip
        load()
    else:
        precision = ["train.precision=bf16"] if options.device == "cuda" else []
        for row in run(options.device, options.shape, options.histories, [*precision, *options.set]):
            print(f"{row.what}: {row.ours:.1f} {row.unit}, {row.alternative}: {row.theirs:.1f}, {row.ratio:.1f}x; "
                  f"{row.note}")  # fmt: skip
        load()


if __name__ == "__main__":
    main()
