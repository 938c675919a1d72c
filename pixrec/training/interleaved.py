"""Training of the item tower and the interleaved user tower on pictures and texts.

Shapes: B histories of one step · U distinct items of one worker · P examples (a prefix and its next item).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pixrec.config import Config
from pixrec.data.sequences import HeldOut
from pixrec.model import gradcache
from pixrec.model.backbone import compile_layers, learns_with_adapters
from pixrec.model.encoders import DualEncoder
from pixrec.model.losses import all_reduced_rows
from pixrec.model.objective import PARTS, Extra, TrainingTask
from pixrec.model.parallel import average_gradients, clip_gradients, shard
from pixrec.model.seeding import reseed, seed_of
from pixrec.model.towers import DualTower
from pixrec.model.usage import usage
from pixrec.training.groups import groups
from pixrec.training.reading import Collator, Feed, Read, Reader
from pixrec.training.trainer import Trainer
from pixrec.training.validation import item_table, validate
from pixrec.training.windows import ShiftedWindows

_MEASURED_STEPS = 20


class InterleavedTrainer(Trainer[DualTower]):
    """Model, optimiser, schedule and step counter of one worker. What it reads comes from `feed`, by default read in
    this process."""

    def __init__(
        self, tower: DualTower, source: ShiftedWindows, collator: Collator, config: Config, feed: Feed | None = None
    ) -> None:
        train = config.train
        super().__init__(tower, train.seed)
        self.config, self.source, self.collate = config, source, collator
        self.limit = self.decay_steps = source.total_steps()
        self.every, self.warmup_steps = train.validate_every_steps, int(train.warmup_fraction * self.limit)
        self.item_ids = collator.catalog.table.item_ids
        choose_trainable(tower, config)
        self.core = TrainingTask(tower, train)
        self.task: nn.Module = self.core
        self.in_shards = train.parallel == "fsdp2"
        self.sharded = self.in_shards and self.world_size > 1
        prepare_backbone(tower, config)
        if self.sharded:
            shard(self.core)
        elif self.world_size > 1 and train.micro_batch_histories is None:
            self.task = DistributedDataParallel(self.core, find_unused_parameters=True)
        named = {n: p for n, p in tower.named_parameters() if p.requires_grad}
        self._optimise(named, groups(tower, named, config), train.weight_decay)
        self.table: Tensor | None = None
        self.feed = feed or Reader(source, collator).feed(self.rank, self.world_size, self.device.type == "cuda")
        self._reads: Iterator[Read] = iter(())
        self._read_until = -1
        """The step whose Read `_reads` gives next."""
        self._took: list[tuple[float, float, float]] = []
        """Of the first steps here, seconds: of the reader, of the step but for its waiting, of that waiting."""

    def validate(self, held_out: HeldOut) -> dict[str, float]:
        """Figures over the whole catalog (see `validation`); also renews the table of extra negatives."""
        if not len(held_out.targets) and not self.config.train.extra_negatives:
            return {}
        figures, vectors = self.core.run(validate, self.tower, self.collate.catalog, held_out, self.config)
        if self.config.train.extra_negatives:
            self.table = torch.from_numpy(vectors)
        return dict(figures)

    def state(self) -> dict[str, Tensor]:
        """All tensors of the tower by name, where they are sharded this worker's shards; the parameters themselves."""
        return {n.removeprefix("tower."): t for n, t in self.core.state_dict().items()}

    def _backward(self, windows: Sequence[np.ndarray]) -> Tensor:
        """And of all workers the totals and counts of PARTS, histories, tokens, tokens and padding, seconds waited."""
        config, passes = self.config.train, len(self._read.passes)
        self.task.train()
        totals, loss = torch.zeros(len(PARTS), 2, device=self.device), torch.zeros((), device=self.device)
        real = slots = 0.0
        for i, one_pass in enumerate(self._read.passes):
            seed = seed_of(self._seed(self.step, i))
            extra = self._extra(i)
            if config.micro_batch_histories is not None:
                encoder, longest = self.collate.catalog.encoder, self.config.model.max_history_items
                began = time.perf_counter()
                parts = one_pass.parts(encoder, config.micro_batch_histories, longest)
                self._waited += time.perf_counter() - began
                one, sums, used = gradcache.backward(self.core, parts, extra, seed, 1 / passes)
            else:
                reseed(seed, self.device)
                encoded = one_pass.batch().to(self.device)
                if isinstance(self.task, DistributedDataParallel):
                    self.task.require_backward_grad_sync = i == passes - 1
                one, sums = self.task(encoded, extra)
                (one / passes).backward()
                used = encoded.tokens()
            totals, loss = totals + sums, loss + one.detach() / passes
            real, slots = real + used[0], slots + used[1]
        if self.sharded or config.micro_batch_histories is not None:
            average_gradients(self.named.values())
        counted = torch.tensor([len(windows), real, slots, self._waited, self._read.seconds])
        mine = [loss.view(1) / self.world_size, counted.to(self.device, non_blocking=True), totals.flatten()]
        return all_reduced_rows(torch.cat(mine))

    def _row(self, found: list[float], norm: float) -> dict[str, float]:
        histories, real, slots, waited, reading, *parts = found
        seconds = time.perf_counter() - self._started
        waited, reading = waited / self.world_size, reading / self.world_size
        return {
            **{f"loss_{n}": parts[2 * i] / parts[2 * i + 1] for i, n in enumerate(PARTS) if parts[2 * i + 1]},
            "gradient_norm": norm,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "padding_share": 1 - real / max(slots, 1.0),
            "samples_per_second": histories / seconds,
            "tokens_per_second": real / seconds,
            "data_wait_share": waited / seconds,
            **self._readers(reading, seconds, waited),
            **usage(self.tower, real / seconds / self.world_size, self.device),
        }

    def _readers(self, reading: float, seconds: float, waited: float) -> dict[str, float]:
        """How many readers keep up with a worker and what steps waited, once enough steps have been taken to tell."""
        if len(self._took) > _MEASURED_STEPS:
            return {}
        self._took.append((reading, seconds - waited, waited))
        if len(self._took) <= _MEASURED_STEPS:
            return {}
        read, busy, idle = np.array(self._took)[1:].mean(0)  # the first step warms up
        return {"readers_needed": read / busy, "read_seconds": read, "busy_seconds": busy, "wait_seconds": idle}

    def _clip(self) -> Tensor:
        return clip_gradients(self.named.values(), self.config.train.gradient_clip)

    def _seed(self, step: int, index: int) -> list[int]:
        return [self.seed, 2, step, self.rank, *([index] if index else [])]

    def _next(self) -> Sequence[np.ndarray]:
        self._started = time.perf_counter()
        if self._read_until != self.step:
            self._reads = self.feed(self.step)
        self._read = next(self._reads)
        if self._read.step != self.step:
            raise RuntimeError(f"the feed gave step {self._read.step} in place of step {self.step}")
        self._read_until = self.step + 1
        self._waited = time.perf_counter() - self._started
        return self._read.windows

    def _extra(self, index: int) -> Extra | None:
        """Further negatives of this pass, the same on every worker."""
        count = self.config.train.extra_negatives
        if not count:
            return None
        if self.table is None:
            self.table = torch.from_numpy(self.core.run(item_table, self.tower, self.collate.catalog, self.config))
            self.task.train()
        total = len(self.table)
        rng = np.random.default_rng([self.config.train.seed, 3, self.step, index])
        rows = torch.from_numpy(rng.choice(total, min(count, total), replace=False))
        drawn = self.table[rows], rows, torch.from_numpy(self.collate.log_inclusion)[rows]
        vectors, rows, inclusion = (tensor.to(self.device, non_blocking=True) for tensor in drawn)
        return Extra(vectors, rows, inclusion, len(rows) / total)


def choose_trainable(tower: DualTower, config: Config) -> None:
    """Freeze what the configuration leaves without a gradient, in place.

    A model that was read from its folder comes with all of it, or with frozen adapters.
    """
    backbone, lora = tower.backbone, config.model.lora
    family, tuned = backbone.family, backbone.tuned if isinstance(backbone, DualEncoder) else None
    for name, parameter in backbone.named_parameters():
        if parameter.is_floating_point():  # those in 4 bits are not
            learns = not lora.enabled or learns_with_adapters(name, lora, family.vision_parts)
            parameter.requires_grad_(learns if tuned is None else name in tuned)
    if tuned is None and (config.model.modalities == "text" or config.model.freeze_vision):
        for parameter in family.vision_parameters(backbone.model):
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
        compile_layers(backbone)
