"""One optimisation step and its state. No Ray, no file system, no progress bar.

Every batch is a pure function of the seed and the step number, so that a resumed run continues exactly where the
other stopped. Workers split each batch between them and are joined by torch.distributed where it is initialised.

Shapes: B histories of one step · U distinct items of one worker · P examples (a prefix and its next item).
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pixrec.config import Config, Modalities, TrainConfig
from pixrec.data.sequences import HeldOut
from pixrec.errors import InputError
from pixrec.model import gradcache
from pixrec.model.catalog import Catalog, distinct_rows
from pixrec.model.gradcache import HistoryPart, Parts
from pixrec.model.objective import PARTS, Batch, Extra, TrainingTask
from pixrec.model.parallel import (
    average_gradients,
    clip_gradients,
    optimizer_tensors,
    restore_optimizer,
    shard,
    whole,
)
from pixrec.model.seeding import reseed, seed_of
from pixrec.model.towers import DualTower
from pixrec.model.usage import usage
from pixrec.training.validation import item_table, validate


class BatchSource:
    """Training histories as windows of at most `max_history_items` + 1 events, every event a target once an epoch."""

    def __init__(self, histories: Sequence[np.ndarray], max_history_items: int, config: TrainConfig) -> None:
        self.histories = [h for h in histories if len(h) >= 2]
        if not self.histories:
            raise InputError(
                "no training history has two events, so there is no next item to learn; lower prepare.min_* "
                "or give more interactions"
            )
        self.stride = max_history_items
        self.config = config
        windows = [(i, end) for i, h in enumerate(self.histories) for end in range(len(h), 1, -self.stride)]
        self.windows = np.array(windows, dtype=np.int64)
        self._lengths = np.minimum(self.windows[:, 1], self.stride + 1)
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None
        self.steps_per_epoch = math.ceil(len(self.windows) / config.histories_per_step)
        self.examples_per_step = sum(len(h) - 1 for h in self.histories) / self.steps_per_epoch

    def total_steps(self) -> int:
        steps = self.steps_per_epoch * self.config.epochs
        return steps if self.config.max_steps is None else min(steps, self.config.max_steps)

    def step(self, step: int, rank: int = 0, world_size: int = 1) -> list[np.ndarray]:
        """The windows of catalog rows that worker `rank` reads in `step`."""
        epoch, within = divmod(step, self.steps_per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, *self._draw(epoch))
        _, order, shift = self._epoch
        size = self.config.histories_per_step
        chosen = order[within * size : (within + 1) * size][rank::world_size]
        return [self._window(int(self.windows[w][0]), int(self.windows[w][1]), int(shift[w])) for w in chosen]

    def _draw(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The order of the windows in an epoch, and how far each is shifted."""
        rng = np.random.default_rng([self.config.seed, 1, epoch])
        size = self.config.histories_per_step
        order = np.resize(rng.permutation(len(self.windows)), self.steps_per_epoch * size)
        shift = rng.integers(0, self.stride, len(self.windows))
        if self.config.bucket_steps == 1:
            return order, shift
        buckets = np.split(order, range(self.config.bucket_steps * size, len(order), self.config.bucket_steps * size))
        batches = []
        for bucket in buckets:
            alike = bucket[np.argsort(self._lengths[bucket], kind="stable")].reshape(-1, size)
            batches.append(rng.permutation(alike))  # no order of lengths from step to step
        return np.concatenate(batches).ravel(), shift

    def _window(self, history: int, end: int, shift: int) -> np.ndarray:
        whole = self.histories[history]
        if len(whole) > self.stride + 1:  # where windows are cut changes from epoch to epoch
            end = max(end - shift, 2)
        return whole[max(0, end - self.stride - 1) : end]


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


class DivergedError(InputError):
    """The loss or its gradient is no number any more. `batch` says what the worker read."""

    def __init__(self, message: str, batch: dict[str, Any]) -> None:
        super().__init__(message)
        self.batch = batch


class _Read(NamedTuple):
    """What one step reads."""

    windows: list[np.ndarray]
    passes: list[Plan]
    whole: list[Batch]


class InterleavedTrainer:
    """Model, optimiser, schedule and step counter of one worker."""

    def __init__(self, tower: DualTower, source: BatchSource, collator: Collator, config: Config) -> None:
        self.config = config
        self.tower, self.source, self.collate = tower, source, collator
        self.device = tower.log_temperature.device
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        choose_trainable(tower, config)
        self.core = TrainingTask(tower, config.train)
        self.task: nn.Module = self.core
        self.sharded = config.train.parallel == "fsdp2" and self.world_size > 1
        prepare_backbone(tower, config)
        if self.sharded:
            shard(self.core)
        elif self.world_size > 1 and config.train.micro_batch_histories is None:
            self.task = DistributedDataParallel(self.core, find_unused_parameters=True)
        self.named = {n: p for n, p in tower.named_parameters() if p.requires_grad}
        rate, decay = config.train.learning_rate, config.train.weight_decay
        self.optimizer = torch.optim.AdamW(_groups(self.named), lr=rate, weight_decay=decay, betas=(0.9, 0.98))
        self.total_steps = source.total_steps()
        self.step = 0
        self.table: Tensor | None = None
        self._ahead: tuple[int, Future[_Read]] | None = None
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pixrec-read")

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then cosine decay to a tenth of the peak."""
        peak = self.config.train.learning_rate
        warmup = max(1, int(self.config.train.warmup_fraction * self.total_steps))
        if step < warmup:
            return peak * (step + 1) / warmup
        progress = (step - warmup) / max(1, self.total_steps - warmup)
        return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))

    def train_step(self) -> dict[str, float]:
        """One optimisation step over all workers; returns the joined loss, its parts and what the step took."""
        started = time.perf_counter()
        read = self._next()
        waited = time.perf_counter() - started
        self.task.train()
        self.optimizer.zero_grad(set_to_none=True)
        totals, loss, tokens = self._backward(read)
        if self.sharded or self.config.train.micro_batch_histories is not None:
            average_gradients(self.named.values())
        norm = clip_gradients(self.named.values(), self.config.train.gradient_clip)
        sums = torch.tensor([float(loss) / self.world_size, len(read.windows), *tokens, waited], device=self.device)
        joined = torch.cat([totals.flatten(), sums])
        if self.world_size > 1:
            dist.all_reduce(joined)
        *parts, joined_loss, histories, real, slots, all_waited = joined.tolist()
        self._refuse_divergence(joined_loss, norm, read.windows)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.step)
        self.optimizer.step()
        self.step += 1
        seconds = time.perf_counter() - started
        losses = {f"loss_{n}": parts[2 * i] / parts[2 * i + 1] for i, n in enumerate(PARTS) if parts[2 * i + 1]}
        return {
            "step": self.step,
            "loss": joined_loss,
            **losses,
            "temperature": float(self.tower.temperature.detach()),
            "gradient_norm": norm,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "padding_share": 1 - real / max(slots, 1.0),
            "samples_per_second": histories / seconds,
            "tokens_per_second": real / seconds,
            "data_wait_share": all_waited / self.world_size / seconds,
            **usage(self.tower, real / seconds / self.world_size, self.device),
        }

    def validate(self, catalog: Catalog, held_out: HeldOut) -> dict[str, float]:
        """Figures over the whole catalog (see `validation`); also renews the table of extra negatives."""
        self._settle()
        if not len(held_out.targets) and not self.config.train.extra_negatives:
            return {}
        figures, vectors = self.core.run(validate, self.tower, catalog, held_out, self.config)
        if self.config.train.extra_negatives:
            self.table = torch.from_numpy(vectors)
        self.task.train()
        return figures

    def whole_state(self) -> dict[str, Tensor]:
        """All weights, whole and on the CPU; a collective where they are sharded."""
        return {n: whole(t.detach()).to("cpu").contiguous() for n, t in self.tower.state_dict().items()}

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """The optimiser's state by parameter name, whole, for safetensors."""
        return optimizer_tensors(self.optimizer, self.named)

    def restore(self, step: int, tensors: dict[str, Tensor]) -> None:
        """Continue after `step` with the state that `optimizer_tensors` gave."""
        self.step = step
        restore_optimizer(self.optimizer, self.named, tensors)

    def _backward(self, read: _Read) -> tuple[Tensor, Tensor, tuple[float, float]]:
        """Gradients of all passes; returns totals of PARTS, the loss, and (tokens, tokens and padding)."""
        config, passes = self.config.train, len(read.passes)
        totals, loss = torch.zeros(len(PARTS), 2, device=self.device), torch.zeros((), device=self.device)
        real = slots = 0.0
        for i, plan in enumerate(read.passes):
            seed = seed_of(self._seed(self.step, i))
            extra = self._extra(i)
            if config.micro_batch_histories is not None:
                parts = self.collate.parts(plan, config.micro_batch_histories)
                one, sums, used = gradcache.backward(self.core, parts, extra, seed, 1 / passes)
            else:
                reseed(seed, self.device)
                batch = read.whole[i].to(self.device)
                if isinstance(self.task, DistributedDataParallel):
                    self.task.require_backward_grad_sync = i == passes - 1
                one, sums = self.task(batch, extra)
                (one / passes).backward()
                used = batch.tokens()
            totals, loss = totals + sums, loss + one.detach() / passes
            real, slots = real + used[0], slots + used[1]
        return totals, loss, (real, slots)

    def _seed(self, step: int, index: int) -> list[int]:
        return [self.config.train.seed, 2, step, self.rank, *([index] if index else [])]

    def _next(self) -> _Read:
        """The step's batch, read while the step before was taken."""
        if self._ahead is None or self._ahead[0] != self.step:
            self._settle()
            self._ahead = (self.step, self._reader.submit(self._read, self.step))
        read = self._ahead[1].result()
        following = self.step + 1
        self._ahead = (following, self._reader.submit(self._read, following)) if following < self.total_steps else None
        return read

    def _read(self, step: int) -> _Read:
        windows = self.source.step(step, self.rank, self.world_size)
        count = self.config.train.gradient_accumulation
        passes = []
        for i in range(count):
            passes.append(self.collate.plan(windows[i::count], np.random.default_rng(self._seed(step, i))))
        at_once = self.config.train.micro_batch_histories is None
        return _Read(windows, passes, [self.collate.batch(plan) for plan in passes] if at_once else [])

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

    def _refuse_divergence(self, loss: float, norm: float, windows: list[np.ndarray]) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            return
        ids = self.collate.catalog.table.item_ids
        histories = [[ids[row] for row in window] for window in windows]
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm}"
        raise DivergedError(
            f"{what} at step {self.step + 1}, whose batch holds among others {', '.join(histories[0][:3])}; lower "
            f"train.learning_rate ({self.config.train.learning_rate}) or look at those items",
            {"step": self.step + 1, "loss": str(loss), "gradient_norm": str(norm), "histories": histories},
        )


def _groups(named: dict[str, nn.Parameter]) -> list[dict[str, Any]]:
    """Parameter groups: weight decay on matrices only; scalars apart, which are never sharded."""
    matrices = [p for p in named.values() if p.ndim >= 2]
    vectors = [p for p in named.values() if p.ndim == 1]
    scalars = [p for p in named.values() if p.ndim == 0]
    groups: list[dict[str, Any]] = [
        {"params": matrices},
        {"params": vectors, "weight_decay": 0.0},
        {"params": scalars, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


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
