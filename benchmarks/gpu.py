"""Training and embedding with the shapes of real backbones on one GPU, beside a plain loop; no Ray.

    python -m benchmarks gpu                                  # all, at most 10 minutes on an H100 or H200
    python -m benchmarks gpu --shapes qwen2.5-vl-3b --modes lora nf4
    python -m benchmarks gpu --photographs FOLDER             # JPEGs of your own in place of drawn ones

Weights are random and of the real sizes; the tokenizer is a small one. Items are varied: texts of 2 to 30 words, every
tenth without a picture, JPEGs of 240 to 640 px in several shapes. Histories have 2 to 9 items.

The plain loop is what one would write with transformers and peft on the first day: a prompt an example (a history and
the item that followed it), padded to the longest, the library's own forward pass with its attention mask, pictures
decoded and encoded for each prompt anew, the same objective, optimiser and precision, the same weights.

MFU is the arithmetic of a step (matrix products and attention, forward and backward, counted by torch's
FlopCounterMode; padding included, and the second forward pass of activation checkpointing, which the shapes of 2 B and
more use: of those it is the share of the device that is busy) over the device's peak in bf16. The last line of stdout
is JSON. Without a GPU the same code runs shapes of some 100,000 weights, says so, and reports no MFU and no GPU figure.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText

from benchmarks.shapes import shape, small_tokenizer
from pixrec.artifact import Model, new_model
from pixrec.config import Config, load_config
from pixrec.data.drawing import COLOURS, CUTS, KINDS, PATTERNS, draw_product
from pixrec.data.items import ItemTable
from pixrec.errors import PixRecError
from pixrec.model.backbone import with_masks
from pixrec.model.catalog import Catalog
from pixrec.model.families.qwen import QwenVL
from pixrec.model.losses import info_nce, next_item_generation
from pixrec.model.usage import peak_flops
from pixrec.schema import MISSING, OK, PREPARED_ITEM_FIELDS
from pixrec.training.interleaved import InterleavedTrainer
from pixrec.training.reading import Collator
from pixrec.training.windows import ShiftedWindows

SHAPES = ("smolvlm-256m", "smolvlm2-2.2b", "qwen2.5-vl-3b", "paligemma2-3b")
MODES = {
    "full": ["model.dtype=float32"],
    "lora": ["model.dtype=bf16", "model.lora.enabled=true"],
    "nf4": ["model.dtype=bf16", "model.lora.enabled=true", "model.lora.base=nf4"],
}
NUM_ITEMS, HISTORIES, LONGEST, STEPS = 192, 16, 9, 6
WORDS = ("red", "round", "soft", "canvas", "steel", "warm")


def make_items(photographs: str | None, small: bool) -> ItemTable:
    """Varied items: texts of several lengths, JPEGs of several sizes and shapes, some without a picture."""
    rng = np.random.default_rng(0)
    files = sorted(Path(photographs).glob("**/*.jp*g")) if photographs else []
    titles, pictures = [], []
    for row in range(NUM_ITEMS if not small else 48):
        titles.append(" ".join(rng.choice(WORDS, int(rng.integers(2, 30)))))
        if row % 10 == 9:
            pictures.append(None)
        elif files:
            pictures.append(files[row % len(files)].read_bytes())
        else:
            side = int(rng.integers(240, 640))
            look = (row % len(COLOURS), row % len(PATTERNS), row % CUTS)
            picture = draw_product(KINDS[row % len(KINDS)], *look, size_px=side, rng=rng)
            shorter = int(side * rng.uniform(0.6, 1))
            width, height = (side, shorter) if row % 2 else (shorter, side)
            sink = io.BytesIO()
            picture.crop((0, 0, width, height)).save(sink, "JPEG", quality=90)
            pictures.append(sink.getvalue())
    count = len(titles)
    columns = {
        "item_id": [f"i{row:03d}" for row in range(count)], "title": titles, "brand": ["Fennwick"] * count,
        "category": ["goods"] * count, "description": [None] * count, "price": [20.0] * count, "image": pictures,
        "image_status": [MISSING if picture is None else OK for picture in pictures],
    }  # fmt: skip
    return ItemTable(pa.table(columns, schema=pa.schema(PREPARED_ITEM_FIELDS)))


def save_shape(folder: str, name: str, texts: list[str], device: str) -> None:
    """A backbone of random weights with a small tokenizer, for `from_pretrained`."""
    tokenizer = small_tokenizer(texts)
    config = shape(name, tokenizer.get_vocab(), small=device == "cpu")
    with torch.device(device):
        kind = torch.bfloat16 if device == "cuda" else torch.float32
        model = AutoModelForImageTextToText.from_config(config, dtype=kind)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@dataclasses.dataclass
class Work:
    config: Config
    model: Model
    items: ItemTable
    histories: list[np.ndarray]
    device: torch.device

    @classmethod
    def make(cls, name: str, folder: str, mode: str, items: ItemTable, device: str, overrides: list[str]) -> Work:
        large = "256m" not in name
        precision = "bf16" if device == "cuda" else "float32"
        config = load_config("", [
            f"model.backbone={folder}", "model.user_tower=interleaved", f"train.precision={precision}",
            "train.num_workers=1", "train.epochs=1000",
            f"train.histories_per_step={HISTORIES if device == 'cuda' else 4}",
            f"train.activation_checkpointing={str(large).lower()}",
            *(MODES[mode] if device == "cuda" else [s for s in MODES[mode] if "dtype" not in s]), *overrides,
        ])  # fmt: skip
        model = new_model(config, [], device)
        rng = np.random.default_rng(1)
        histories = [rng.integers(0, len(items), int(rng.integers(2, LONGEST + 1))) for _ in range(256)]
        return cls(config, model, items, histories, torch.device(device))

    def trainer(self) -> InterleavedTrainer:
        source = ShiftedWindows(self.histories, self.config.model.max_history_items, self.config.train)
        counts = np.bincount(np.concatenate(self.histories), minlength=len(self.items))
        catalog = Catalog(self.items, self.model.encoder)
        return InterleavedTrainer(
            self.model.tower, source, Collator(catalog, counts, self.config, source.examples_per_step), self.config
        )


class PlainLoop:
    """The loop to compare with. Its model is the library's, called as the library's documentation calls it."""

    def __init__(self, work: Work) -> None:
        self.work, self.tower, self.encoder = work, work.model.tower.train(), work.model.encoder
        self.backbone, self.rng = self.tower.backbone, np.random.default_rng(2)
        with_masks(self.backbone.model)
        if isinstance(self.backbone.family, QwenVL):  # as it comes
            self.backbone.family.vision._attn_implementation_internal = "sdpa"
        self.optimizer = torch.optim.AdamW([p for p in self.tower.parameters() if p.requires_grad], lr=1e-4)
        self.examples = work.config.train.histories_per_step

    def step(self) -> None:
        chosen = [self.work.histories[i] for i in self.rng.integers(0, len(self.work.histories), self.examples)]
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.work.device.type, torch.bfloat16, enabled=self.work.config.train.precision == "bf16"):
            loss = self.loss(chosen)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.tower.parameters(), 1.0)
        self.optimizer.step()

    def loss(self, histories: list[np.ndarray]) -> torch.Tensor:
        tower, train = self.tower, self.work.config.train
        targets = np.array([history[-1] for history in histories])
        hidden, whole = self.read(histories)
        last = whole.position == (whole.item >= 0).sum(1, keepdim=True) - 1
        content = whole.is_token & ~whole.is_separator
        user = F.normalize(tower.user_tower.projection(_mean(hidden, content & ~last)), dim=-1)
        conditioned = F.normalize(tower.item_proj(_mean(hidden, content & last)), dim=-1)
        states, alone = self.read([np.array([target]) for target in targets])
        item = F.normalize(tower.item_proj(_mean(states, alone.is_token & ~alone.is_separator)), dim=-1)
        rows, own = torch.from_numpy(targets).to(self.work.device), torch.arange(len(targets), device=self.work.device)
        ut = info_nce(user.float(), item.float(), own, rows, tower.temperature)
        tt = info_nce(conditioned.float(), item.float(), own, rows, tower.temperature)
        named = (whole.is_text & last)[:, 1:]
        nig = next_item_generation(self.backbone.token_logits(hidden[:, :-1][named]), whole.token_ids[:, 1:][named])
        weights = {"nig": 1 - train.alpha - abs(train.beta), "tt": train.alpha, "ut": train.beta}
        return sum(weights[n] * p.total / p.examples for n, p in (("nig", nig), ("tt", tt), ("ut", ut)))

    def read(self, histories: list[np.ndarray]) -> tuple[torch.Tensor, Any]:
        """Prompts from scratch, nothing shared: texts tokenised, pictures decoded and encoded; states (B, T, W)."""
        table, encoder, device = self.work.items, self.encoder, self.work.device
        rows = [int(row) for history in histories for row in history]
        pictures = [table.image(row) for row in rows]
        decoded = [None if picture is None else encoder.decode(picture) for picture in pictures]
        items = encoder.items_from_tokens(encoder.tokenize([table.text(row) for row in rows]), decoded)
        ends = np.cumsum([len(history) for history in histories])
        places = np.split(np.arange(len(rows)), ends[:-1])
        prompts = encoder.histories(items, places).to(device)
        items = items.to(device)
        model = self.backbone.model
        inputs = {"input_ids": prompts.token_ids, "attention_mask": prompts.is_token.long()}
        scaled = items.pixels.permute(0, 3, 1, 2).float() / 255
        pixels = ((scaled - self.backbone.pixel_mean) / self.backbone.pixel_std).to(self.backbone.dtype)
        kind, in_picture = model.config.model_type, (prompts.picture_slot >= 0).long()
        if kind == "smolvlm":
            inputs["pixel_values"] = pixels.unsqueeze(1)
        elif kind == "paligemma":
            inputs |= {"pixel_values": pixels, "token_type_ids": 1 - in_picture}
        else:
            grid = F.pad(items.grid * self.backbone.family.merge, (1, 0), value=1).to(device)
            inputs |= {"pixel_values": self.backbone.family.patches(pixels), "image_grid_thw": grid,
                       "mm_token_type_ids": in_picture}  # fmt: skip
        return model.model(**inputs, use_cache=False).last_hidden_state.float(), prompts


def _mean(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    weight = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)


def measure(step: Callable[[], Any], device: torch.device, steps: int) -> dict[str, float]:
    """Mean seconds and arithmetic (FLOP) of a step, and the most bytes on the GPU. Steps differ in size, so both are
    means, of other steps."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    counted = max(1, steps // 2)
    with FlopCounterMode(display=False) as counter:
        for _ in range(counted):
            step()
    _finish(device)
    started = time.perf_counter()
    for _ in range(steps):
        step()
    _finish(device)
    flop = counter.get_total_flops() / counted
    found = {"step_seconds": (time.perf_counter() - started) / steps, "step_flop": flop}
    if device.type == "cuda":
        found["peak_memory_bytes"] = float(torch.cuda.max_memory_allocated())
        if (peak := peak_flops(torch.cuda.get_device_name())) is not None:
            found["mfu"] = flop / found["step_seconds"] / peak
    return found


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def attempt(name: str, folder: str, mode: str, items: ItemTable, device: str, overrides: list[str]) -> dict[str, Any]:
    """`measure_one`, or what kept it; the model is gone afterwards."""
    try:
        return measure_one(Work.make(name, folder, mode, items, device, overrides), name, mode)
    except (PixRecError, torch.OutOfMemoryError) as error:
        return {"shape": name, "mode": mode, "failed": " ".join(str(error).split())[:100]}


def measure_one(work: Work, name: str, mode: str) -> dict[str, Any]:
    """Training, embedding and the plain loop of one shape in one mode."""
    parameters = list(work.model.tower.parameters())
    found: dict[str, Any] = {"shape": name, "mode": mode, "training": measure_training(work)}
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    found["parameters"] = {"trained": trained, "total": sum(p.numel() for p in parameters)}
    _free(work)
    embedder, catalog = work.model.embedder(), Catalog(work.items, work.model.encoder, cache_bytes=0)
    embedder.precision = work.config.train.precision
    rows = np.arange(len(work.items))
    tokens = int(catalog.items(rows).length.sum())
    embedding = measure(lambda: embedder.items(catalog, rows, batch_size=64), work.device, 2)
    found["embedding"] = {
        **embedding,
        "items_per_second": len(rows) / embedding["step_seconds"],
        "tokens_per_second": tokens / embedding["step_seconds"],
        "pictures_per_second": int(work.items.with_image.sum()) / embedding["step_seconds"],
    }
    plain = PlainLoop(work)
    loop = measure(plain.step, work.device, 2)
    found["plain"] = {**loop, "examples_per_second": plain.examples / loop["step_seconds"]}
    found["ratio"] = found["training"]["examples_per_second"] / found["plain"]["examples_per_second"]
    return found


def measure_training(work: Work) -> dict[str, float]:
    """Steps of the trainer that `pixrec train` runs."""
    trainer, rows, sizes = work.trainer(), [], []

    def step() -> None:
        rows.append(trainer.train_step())
        read = trainer._read.passes[0]
        sizes.append((len(read.items.grid), len(read.batch().histories.example)))

    training = measure(step, work.device, STEPS if work.device.type == "cuda" else 2)
    pictures, examples = np.mean(sizes, axis=0) / training["step_seconds"]
    shares = {n: statistics.fmean(row[n] for row in rows) for n in ("padding_share", "data_wait_share")}
    tokens = statistics.median(row["tokens_per_second"] for row in rows)
    per_second = {"tokens": tokens, "pictures": pictures, "examples": examples}
    return {**training, **{f"{n}_per_second": float(value) for n, value in per_second.items()}, **shares}


def _free(work: Work) -> None:
    """Gradients and the state of the optimiser, so that the next has the memory to itself."""
    work.model.tower.zero_grad(set_to_none=True)
    gc.collect()
    if work.device.type == "cuda":
        torch.cuda.empty_cache()


def table(results: list[dict[str, Any]]) -> str:
    head = ("shape", "mode", "step s", "MFU", "GiB", "tokens/s", "pictures/s", "examples/s", "plain", "ratio",
            "plain MFU", "padding", "embed items/s", "embed MFU")  # fmt: skip
    lines = [head]
    for one in results:
        if "failed" in one:
            lines.append((one["shape"], one["mode"], one["failed"], *[""] * (len(head) - 3)))
            continue
        training, plain = one["training"], one["plain"]
        lines.append((
            one["shape"], one["mode"], f"{training['step_seconds']:.3f}", _mfu(training),
            f"{training['peak_memory_bytes'] / 2**30:.1f}" if "peak_memory_bytes" in training else "-",
            f"{training['tokens_per_second']:,.0f}", f"{training['pictures_per_second']:,.0f}",
            f"{training['examples_per_second']:,.1f}", f"{plain['examples_per_second']:,.1f}", f"{one['ratio']:.1f}",
            _mfu(plain), f"{training['padding_share']:.0%}", f"{one['embedding']['items_per_second']:,.0f}",
            _mfu(one["embedding"]),
        ))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _mfu(found: dict[str, float]) -> str:
    return f"{found['mfu']:.3f}" if "mfu" in found else "-"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--photographs", metavar="FOLDER", help="JPEGs to use in place of drawn products")
    parser.add_argument("--seconds", type=float, default=540.0, help="time; no shape begins a mode after its share")
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine = torch.cuda.get_device_name() if device == "cuda" else "no GPU: tiny shapes on the CPU, not a GPU figure"
    print(machine, file=sys.stderr, flush=True)
    started, results = time.monotonic(), []
    items = make_items(options.photographs, small=device == "cpu")
    texts = [items.text(row) for row in range(len(items))]
    for number, name in enumerate(options.shapes):
        until = started + options.seconds * (number + 1) / len(options.shapes)  # what is left goes to the next
        with tempfile.TemporaryDirectory() as folder:
            if time.monotonic() < until:
                save_shape(folder, name, texts, device)
            for mode in options.modes:
                if time.monotonic() > until:
                    results.append({"shape": name, "mode": mode, "failed": "no time left"})
                    continue
                print(f"{name} {mode} ...", file=sys.stderr, flush=True)
                results.append(attempt(name, folder, mode, items, device, options.set))
                gc.collect()
                if device == "cuda":
                    torch.cuda.empty_cache()
    print(table(results))
    facts = {"machine": machine, "gpu": device == "cuda", "torch": torch.__version__}
    print(json.dumps({**facts, "seconds": round(time.monotonic() - started), "results": results}))
    return 0
