"""Training of the item tower and the interleaved user tower on pictures and texts.

Shapes: B histories of one step · U distinct items of one worker · P examples (a prefix and its next item).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pixrec.config import Config, Modalities
from pixrec.data.sequences import HeldOut
from pixrec.model import gradcache
from pixrec.model.catalog import Catalog, distinct_rows
from pixrec.model.gradcache import HistoryPart, Parts
from pixrec.model.losses import all_reduced_rows
from pixrec.model.objective import PARTS, Batch, Extra, TrainingTask
from pixrec.model.parallel import average_gradients, clip_gradients, shard, whole
from pixrec.model.seeding import reseed, seed_of
from pixrec.model.towers import DualTower
from pixrec.model.usage import usage
from pixrec.training.trainer import Trainer
from pixrec.training.validation import item_table, validate
from pixrec.training.windows import ShiftedWindows


@dataclass(frozen=True)
class Plan:
    """What a worker reads in one pass: drawn, but not yet encoded."""

    rows: np.ndarray
    """(U,) distinct catalog rows"""
    modalities: list[Modalities]
    """what is kept of each of them"""
    windows: list[np.ndarray]
    """histories as indices into `rows`"""
    log_inclusion: np.ndarray
    """(U,) log chance of each item to be in the pass"""


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
        return self.batch(self.plan(windows, rng))

    def plan(self, windows: Sequence[np.ndarray], rng: np.random.Generator) -> Plan:
        """Draw what each item loses."""
        rows, local = distinct_rows(windows)
        modalities: list[Modalities] = [self.config.model.modalities] * len(rows)
        dropout = self.config.train.modality_dropout
        if self.config.model.modalities == "both" and dropout > 0:
            draw = rng.random(len(rows))
            has_picture = self.catalog.table.with_image[rows]
            modalities = [
                "text" if d < dropout else "image" if d < 2 * dropout and p else "both"
                for d, p in zip(draw, has_picture, strict=True)
            ]
        return Plan(rows, modalities, local, self.log_inclusion[rows])

    def batch(self, plan: Plan) -> Batch:
        """All of a plan at once."""
        items = self.catalog.items(plan.rows, plan.modalities)
        return Batch(
            items,
            self.catalog.encoder.histories(items, plan.windows),
            torch.from_numpy(plan.rows.astype(np.int64)),
            torch.from_numpy(plan.log_inclusion),
        )

    def parts(self, plan: Plan, histories_at_a_time: int) -> Parts:
        """A plan in parts of histories of like length, and of as many items as those may hold."""
        items_at_a_time = histories_at_a_time * (self.config.model.max_history_items + 1)
        order = sorted(range(len(plan.windows)), key=lambda i: len(plan.windows[i]))
        chunks = [order[i : i + histories_at_a_time] for i in range(0, len(order), histories_at_a_time)]
        slices = [np.arange(len(plan.rows))[i : i + items_at_a_time] for i in range(0, len(plan.rows), items_at_a_time)]
        return Parts(
            torch.from_numpy(plan.rows.astype(np.int64)),
            torch.from_numpy(plan.log_inclusion),
            [functools.partial(self._items, plan, chosen) for chosen in slices],
            [functools.partial(self._histories, plan, chosen) for chosen in chunks],
        )

    def _items(self, plan: Plan, chosen: np.ndarray) -> Any:
        return self.catalog.items(plan.rows[chosen], [plan.modalities[i] for i in chosen])

    def _histories(self, plan: Plan, chosen: list[int]) -> HistoryPart:
        of_batch, local = distinct_rows([plan.windows[i] for i in chosen])
        items = self._items(plan, of_batch)
        return HistoryPart(items, self.catalog.encoder.histories(items, local), torch.from_numpy(of_batch))


_Read = tuple[Sequence[np.ndarray], list[Plan], list[Batch]]
"""The windows of a step, its passes, and those encoded where they are not read in parts."""


class InterleavedTrainer(Trainer[DualTower]):
    """Model, optimiser, schedule and step counter of one worker."""

    def __init__(self, tower: DualTower, source: ShiftedWindows, collator: Collator, config: Config) -> None:
        train = config.train
        super().__init__(tower, train.seed)
        self.config, self.source, self.collate = config, source, collator
        self.limit = self.decay_steps = source.total_steps()
        self.every, self.warmup_steps = train.validate_every_steps, int(train.warmup_fraction * self.limit)
        self.item_ids = collator.catalog.table.item_ids
        choose_trainable(tower, config)
        self.core = TrainingTask(tower, train)
        self.task: nn.Module = self.core
        self.sharded = train.parallel == "fsdp2" and self.world_size > 1
        prepare_backbone(tower, config)
        if self.sharded:
            shard(self.core)
        elif self.world_size > 1 and train.micro_batch_histories is None:
            self.task = DistributedDataParallel(self.core, find_unused_parameters=True)
        named = {n: p for n, p in tower.named_parameters() if p.requires_grad}
        self._optimise(named, _groups(named, train.learning_rate), train.weight_decay)
        self.table: Tensor | None = None
        self._ahead: tuple[int, Future[_Read]] | None = None
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pixrec-read")

    def validate(self, held_out: HeldOut) -> dict[str, float]:
        """Figures over the whole catalog (see `validation`); also renews the table of extra negatives."""
        self._settle()
        if not len(held_out.targets) and not self.config.train.extra_negatives:
            return {}
        figures, vectors = self.core.run(validate, self.tower, self.collate.catalog, held_out, self.config)
        if self.config.train.extra_negatives:
            self.table = torch.from_numpy(vectors)
        return dict(figures)

    def whole_state(self) -> dict[str, Tensor]:
        """All weights, whole and on the CPU; a collective where they are sharded."""
        return {n: whole(t.detach()).to("cpu").contiguous() for n, t in self.tower.state_dict().items()}

    def _backward(self, windows: Sequence[np.ndarray]) -> tuple[float, list[float]]:
        """And of all workers the totals and counts of PARTS, histories, tokens, tokens and padding, seconds waited."""
        config, passes = self.config.train, len(self._passes)
        self.task.train()
        totals, loss = torch.zeros(len(PARTS), 2, device=self.device), torch.zeros((), device=self.device)
        real = slots = 0.0
        for i, plan in enumerate(self._passes):
            seed = seed_of(self._seed(self.step, i))
            extra = self._extra(i)
            if config.micro_batch_histories is not None:
                parts = self.collate.parts(plan, config.micro_batch_histories)
                one, sums, used = gradcache.backward(self.core, parts, extra, seed, 1 / passes)
            else:
                reseed(seed, self.device)
                encoded = self._encoded[i].to(self.device)
                if isinstance(self.task, DistributedDataParallel):
                    self.task.require_backward_grad_sync = i == passes - 1
                one, sums = self.task(encoded, extra)
                (one / passes).backward()
                used = encoded.tokens()
            totals, loss = totals + sums, loss + one.detach() / passes
            real, slots = real + used[0], slots + used[1]
        if self.sharded or config.micro_batch_histories is not None:
            average_gradients(self.named.values())
        mine = [float(loss) / self.world_size, len(windows), real, slots, self._waited]
        joined = all_reduced_rows(torch.cat([torch.tensor(mine, device=self.device), totals.flatten()])).tolist()
        return joined[0], joined[1:]

    def _row(self, found: list[float], norm: float) -> dict[str, float]:
        histories, real, slots, waited, *parts = found
        seconds = time.perf_counter() - self._started
        return {
            **{f"loss_{n}": parts[2 * i] / parts[2 * i + 1] for i, n in enumerate(PARTS) if parts[2 * i + 1]},
            "gradient_norm": norm,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "padding_share": 1 - real / max(slots, 1.0),
            "samples_per_second": histories / seconds,
            "tokens_per_second": real / seconds,
            "data_wait_share": waited / self.world_size / seconds,
            **usage(self.tower, real / seconds / self.world_size, self.device),
        }

    def _clip(self) -> float:
        return clip_gradients(self.named.values(), self.config.train.gradient_clip)

    def _seed(self, step: int, index: int) -> list[int]:
        return [self.seed, 2, step, self.rank, *([index] if index else [])]

    def _next(self) -> Sequence[np.ndarray]:
        """What the step reads, read while the step before was taken."""
        self._started = time.perf_counter()
        if self._ahead is None or self._ahead[0] != self.step:
            self._settle()
            self._ahead = (self.step, self._reader.submit(self._read, self.step))
        windows, self._passes, self._encoded = self._ahead[1].result()
        following = self.step + 1
        self._ahead = (following, self._reader.submit(self._read, following)) if following < self.limit else None
        self._waited = time.perf_counter() - self._started
        return windows

    def _read(self, step: int) -> _Read:
        windows = self.source.step(step, self.rank, self.world_size)
        count = self.config.train.gradient_accumulation
        passes = []
        for i in range(count):
            passes.append(self.collate.plan(windows[i::count], np.random.default_rng(self._seed(step, i))))
        at_once = self.config.train.micro_batch_histories is None
        return windows, passes, [self.collate.batch(plan) for plan in passes] if at_once else []

    def _settle(self) -> None:
        """Wait for what is being read: the catalog's caches are not for two threads."""
        if self._ahead is not None:
            self._ahead[1].exception()

    def _extra(self, index: int) -> Extra | None:
        """Further negatives of this pass, the same on every worker."""
        count = self.config.train.extra_negatives
        if not count:
            return None
        if self.table is None:
            self._settle()
            self.table = torch.from_numpy(self.core.run(item_table, self.tower, self.collate.catalog, self.config))
            self.task.train()
        total = len(self.table)
        rng = np.random.default_rng([self.config.train.seed, 3, self.step, index])
        rows = torch.from_numpy(rng.choice(total, min(count, total), replace=False))
        inclusion = torch.from_numpy(self.collate.log_inclusion)[rows].to(self.device)
        return Extra(self.table[rows].to(self.device), rows.to(self.device), inclusion, len(rows) / total)


def _groups(named: dict[str, nn.Parameter], rate: float) -> list[dict[str, Any]]:
    """Parameter groups: weight decay on matrices only; scalars apart, which are never sharded."""
    matrices = {"params": [p for p in named.values() if p.ndim >= 2], "lr": rate}
    others = [[p for p in named.values() if p.ndim == ndim] for ndim in (1, 0)]
    return [matrices, *({"params": params, "lr": rate, "weight_decay": 0.0} for params in others)]


def choose_trainable(tower: DualTower, config: Config) -> None:
    """Freeze what the configuration leaves without a gradient, in place."""
    family = tower.backbone.family
    if config.model.modalities == "text" or config.model.freeze_vision:
        for parameter in family.vision_parameters(tower.backbone.model):
            parameter.requires_grad_(False)
    if not config.train.learnable_temperature:
        tower.log_temperature.requires_grad_(False)


def prepare_backbone(tower: DualTower, config: Config) -> None:
    """Activation checkpointing and compilation of the backbone, in place."""
    backbone = tower.backbone
    if config.train.activation_checkpointing:
        model = backbone.model  # the second name is that of older releases of transformers
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    if config.train.compile:
        backbone.family.language_model(backbone.model).compile(dynamic=True)
