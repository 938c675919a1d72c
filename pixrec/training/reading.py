"""What a step of the interleaved training reads: pictures looked up and decoded, texts tokenised, all of it collated.

A `Read` is a function of the data, the settings, the step, and the worker's rank among how many: of nothing else, so
not of who makes it, when, or what was read before. A pass is drawn for all workers together and each takes its share,
so that any number of workers reads the same. Knows no weights and no Ray: readers may be other processes, and a Read
goes between processes as safetensors.

Shapes: B histories of one worker · U distinct items of one worker.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from pixrec.config import Config, Modalities
from pixrec.model.catalog import Catalog, ahead, distinct_rows
from pixrec.model.encoding import Histories, ItemEncoder, Items
from pixrec.model.gradcache import Parts
from pixrec.model.objective import Batch
from pixrec.training.windows import ShiftedWindows, targets_of


@dataclass(frozen=True)
class Plan:
    """What a worker reads in one pass: drawn, but not yet encoded."""

    rows: np.ndarray
    """(U,) distinct catalog rows"""
    modalities: list[Modalities]
    """what is kept of each of them"""
    windows: list[np.ndarray]
    """histories as indices into `rows`"""
    is_target: list[np.ndarray]
    """bool beside them: which events are to be foretold"""
    log_inclusion: np.ndarray
    """(U,) log chance of each item to be in the pass"""


@dataclass(frozen=True)
class Pass:
    """A pass of one worker, encoded."""

    windows: Sequence[np.ndarray]
    """(B,) histories of catalog rows"""
    is_target: Sequence[np.ndarray]
    """bool beside them: which events are to be foretold"""
    item_rows: Tensor
    """(U,) distinct catalog rows"""
    log_inclusion: Tensor
    """(U,) log chance of each item to be in the pass"""
    items: Items
    """the U items"""
    histories: Histories | None
    """None where they are written part by part (`parts`)"""

    def batch(self) -> Batch:
        """All of it at once."""
        assert self.histories is not None
        return Batch(self.items, self.histories, self.item_rows, self.log_inclusion)

    def parts(self, encoder: ItemEncoder, histories_at_a_time: int, max_history_items: int) -> Parts:
        """In parts of histories of like length, and of as many items as those may hold."""
        _, local = distinct_rows(self.windows)
        count, items_at_a_time = len(self.items), histories_at_a_time * (max_history_items + 1)
        order = sorted(range(len(local)), key=lambda i: len(local[i]))
        chunks = [order[i : i + histories_at_a_time] for i in range(0, len(order), histories_at_a_time)]
        slices = [np.arange(count)[i : i + items_at_a_time] for i in range(0, count, items_at_a_time)]
        slots, items, first = self.items.picture_slot.clone(), [], 0
        for chosen in slices:  # every picture's tokens stand behind those of the parts before
            part = encoder.select(self.items, chosen)
            shown = part.picture_slot >= 0
            moved = torch.where(shown, part.picture_slot + first, -1)
            slots[torch.from_numpy(chosen), : moved.shape[1]] = moved
            items.append(
                replace(part, picture_slot=moved, pixels=part.pixels[:0], grid=part.grid[:0], ready=part.ready[:0])
            )
            first += int(shown.sum())
        everything = replace(self.items, picture_slot=slots)
        histories = [
            encoder.histories(everything, [local[i] for i in chosen], [self.is_target[i] for i in chosen])
            for chosen in chunks
        ]
        pictures = [functools.partial(encoder.select, self.items, chosen) for chosen in slices]
        return Parts(self.item_rows, self.log_inclusion, pictures, items, histories)


class Read(NamedTuple):
    """What one worker reads in one step."""

    step: int
    passes: list[Pass]
    seconds: float
    """how long the reader took"""

    @property
    def windows(self) -> list[np.ndarray]:
        """The histories of all passes."""
        return [window for one in self.passes for window in one.windows]

    def pinned(self) -> Read:
        """In memory that a GPU copies from on its own."""
        return _read_of({name: tensor.pin_memory() for name, tensor in _tensors_of(self).items()})

    def to_bytes(self) -> bytes:
        """As safetensors."""
        return safetensors.torch.save(_tensors_of(self))

    @classmethod
    def from_bytes(cls, data: bytes | memoryview, pin: bool = False) -> Read:
        """The Read that `to_bytes` gave, copied once, to memory that all its tensors share; `pin` as in `pinned`."""
        view = memoryview(data)
        start = 8 + int.from_bytes(view[:8], "little")  # https://huggingface.co/docs/safetensors: length, JSON, tensors
        header = json.loads(bytes(view[8:start]))
        memory = torch.empty(len(view) - start, dtype=torch.uint8, pin_memory=pin)
        memory.numpy()[:] = np.frombuffer(view[start:], np.uint8)
        found = {}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            found[name] = memory[begin:end].view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
        return _read_of(found)


Feed = Callable[[int], Iterator[Read]]
"""From a step on, the Read of each step in order, to the end of the training."""

_DTYPES = {"I64": torch.int64, "U8": torch.uint8, "BOOL": torch.bool, "F16": torch.float16, "F32": torch.float32}
_DTYPES["F64"] = torch.float64


def _tensors_of(read: Read) -> dict[str, Tensor]:
    found = {"step": torch.tensor(read.step), "seconds": torch.tensor(read.seconds, dtype=torch.float64)}
    for number, one in enumerate(read.passes):
        own = {"item_rows": one.item_rows, "log_inclusion": one.log_inclusion}
        own["windows"] = torch.from_numpy(np.concatenate(one.windows).astype(np.int64))
        own["is_target"] = torch.from_numpy(np.concatenate(one.is_target))
        own["lengths"] = torch.tensor([len(window) for window in one.windows])
        for part, value in (("items", one.items), ("histories", one.histories)):
            if value is not None:
                own |= {f"{part}.{field.name}": getattr(value, field.name) for field in fields(value)}
        found |= {f"{number}.{name}": tensor for name, tensor in own.items()}
    return found


def _read_of(found: dict[str, Tensor]) -> Read:
    passes: list[Pass] = []
    while f"{len(passes)}.item_rows" in found:
        prefix = f"{len(passes)}."
        own = {name.removeprefix(prefix): tensor for name, tensor in found.items() if name.startswith(prefix)}
        bounds = np.cumsum(own["lengths"].numpy())[:-1]
        windows, is_target = (np.split(own[name].numpy(), bounds) for name in ("windows", "is_target"))
        items = Items(**{field.name: own[f"items.{field.name}"] for field in fields(Items)})
        histories = None
        if "histories.token_ids" in own:
            histories = Histories(**{field.name: own[f"histories.{field.name}"] for field in fields(Histories)})
        passes.append(Pass(windows, is_target, own["item_rows"], own["log_inclusion"], items, histories))
    return Read(int(found["step"]), passes, float(found["seconds"]))


class Collator:
    """Windows to a Batch: encodes their distinct items once, with modality dropout."""

    def __init__(self, catalog: Catalog, training_counts: np.ndarray, config: Config, examples_per_step: float) -> None:
        self.catalog = catalog
        self.config = config
        share = np.maximum(training_counts, 1) / max(1, training_counts.sum())
        examples = examples_per_step / config.train.gradient_accumulation
        if config.train.negatives == "local":
            examples /= max(1, config.train.num_workers)
        self.log_inclusion = np.log(-np.expm1(examples * np.log1p(-np.minimum(share, 1 - 1e-9)))).astype(np.float32)

    def __call__(self, windows: Sequence[np.ndarray], rng: np.random.Generator) -> Batch:
        return self.encoded(self.plan(windows, rng)).batch()

    def plan(self, windows: Sequence[np.ndarray], rng: np.random.Generator, rank: int = 0, world_size: int = 1) -> Plan:
        """Draw what each item of all workers' windows loses; the part of it that one worker reads."""
        mine = windows[rank::world_size]
        rows, local = distinct_rows(mine)
        modalities: list[Modalities] = [self.config.model.modalities] * len(rows)
        dropout = self.config.train.modality_dropout
        if self.config.model.modalities == "both" and dropout > 0:
            everyone = rows if world_size == 1 else np.unique(np.concatenate(windows))
            draw = rng.random(len(everyone))[np.searchsorted(everyone, rows)]
            has_picture = self.catalog.table.with_image[rows]
            modalities = [
                "text" if d < dropout else "image" if d < 2 * dropout and p else "both"
                for d, p in zip(draw, has_picture, strict=True)
            ]
        return Plan(rows, modalities, local, targets_of(mine), self.log_inclusion[rows])

    def encoded(self, plan: Plan, *, in_parts: bool = False) -> Pass:
        """A plan encoded; `in_parts`: without the histories."""
        items = self.catalog.items(plan.rows, plan.modalities)
        return Pass(
            [plan.rows[window] for window in plan.windows],
            plan.is_target,
            torch.from_numpy(plan.rows.astype(np.int64)),
            torch.from_numpy(plan.log_inclusion),
            items,
            None if in_parts else self.catalog.encoder.histories(items, plan.windows, plan.is_target),
        )


class Reader:
    """Makes the Read of any step."""

    def __init__(self, source: ShiftedWindows, collator: Collator) -> None:
        self.source, self.collator, self.config = source, collator, collator.config.train

    def read(self, step: int, rank: int, world_size: int) -> Read:
        """What worker `rank` reads in `step`. The passes of a step do not depend on the number of workers either."""
        started = time.perf_counter()
        windows, count = self.source.step(step), self.config.gradient_accumulation
        passes = []
        for i in range(count):
            rng = np.random.default_rng([self.config.seed, 2, step, i])
            plan = self.collator.plan(windows[i::count], rng, rank, world_size)
            in_parts = self.config.micro_batch_histories is not None
            passes.append(self.collator.encoded(plan, in_parts=in_parts))
        return Read(step, passes, time.perf_counter() - started)

    def feed(self, rank: int, world_size: int, pin: bool = False) -> Feed:
        """A feed in this process: a thread reads a step while the one before is taken."""

        def read(step: int) -> Read:
            made = self.read(step, rank, world_size)
            return made.pinned() if pin else made

        return lambda first: ahead(read, range(first, self.source.total_steps()))
