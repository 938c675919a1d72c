"""One optimisation step and its state. No Ray, no file system, no progress bar.

Every batch is a pure function of the seed and the step number, so that a resumed run continues exactly where the
other stopped. Workers split each batch between them and are joined by torch.distributed where it is initialised.

Shapes: B histories of one step · U distinct items of one worker · P examples (a prefix and its next item).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pixrec.config import Config, Modalities, TrainConfig
from pixrec.data.sequences import HeldOut
from pixrec.errors import InputError
from pixrec.metrics import rank_metrics, target_ranks
from pixrec.model.catalog import Catalog, Embedder, distinct_rows
from pixrec.model.encoding import Histories, Items
from pixrec.model.losses import gather_with_gradient, info_nce, next_item_generation
from pixrec.model.towers import DualTower

PARTS = ("nig", "tt", "ut")


@dataclass(frozen=True)
class Batch:
    items: Items
    histories: Histories
    item_rows: Tensor
    """(U,) catalog rows of the items, which tell the same item apart across workers"""
    log_inclusion: Tensor
    """(U,) log chance of each item to be in the step's batch"""

    def to(self, device: torch.device) -> Batch:
        return Batch(
            self.items.to(device), self.histories.to(device), self.item_rows.to(device), self.log_inclusion.to(device)
        )


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
        self.steps_per_epoch = math.ceil(len(self.windows) / config.histories_per_step)
        self.examples_per_step = sum(len(h) - 1 for h in self.histories) / self.steps_per_epoch

    def total_steps(self) -> int:
        steps = self.steps_per_epoch * self.config.epochs
        return steps if self.config.max_steps is None else min(steps, self.config.max_steps)

    def step(self, step: int, rank: int = 0, world_size: int = 1) -> list[np.ndarray]:
        """The windows of catalog rows that worker `rank` reads in `step`."""
        epoch, within = divmod(step, self.steps_per_epoch)
        rng = np.random.default_rng([self.config.seed, 1, epoch])
        size = self.config.histories_per_step
        order = np.resize(rng.permutation(len(self.windows)), self.steps_per_epoch * size)
        shift = rng.integers(0, self.stride, len(self.windows))
        chosen = order[within * size : (within + 1) * size][rank::world_size]
        return [self._window(int(self.windows[w][0]), int(self.windows[w][1]), int(shift[w])) for w in chosen]

    def _window(self, history: int, end: int, shift: int) -> np.ndarray:
        whole = self.histories[history]
        if len(whole) > self.stride + 1:  # where windows are cut changes from epoch to epoch
            end = max(end - shift, 2)
        return whole[max(0, end - self.stride - 1) : end]


class Collator:
    """Windows to a Batch: encodes their distinct items once, with modality dropout."""

    def __init__(self, catalog: Catalog, training_counts: np.ndarray, config: Config, examples_per_step: float) -> None:
        self.catalog = catalog
        self.config = config
        share = np.maximum(training_counts, 1) / max(1, training_counts.sum())
        self.log_inclusion = np.log(-np.expm1(examples_per_step * np.log1p(-np.minimum(share, 1 - 1e-9))))

    def __call__(self, windows: Sequence[np.ndarray], rng: np.random.Generator) -> Batch:
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
        items = self.catalog.items(rows, modalities)
        return Batch(
            items,
            self.catalog.encoder.histories(items, local),
            torch.from_numpy(rows.astype(np.int64)),
            torch.from_numpy(self.log_inclusion[rows].astype(np.float32)),
        )


class TrainingTask(nn.Module):
    """The mixed objective (DESIGN §3) as one forward pass, so that DDP sees all of it.

    Returns the loss whose gradient, averaged over workers, is that of the joined batch, and a detached vector of
    (total, count) for each of PARTS, this worker's share.
    """

    def __init__(self, tower: DualTower, config: TrainConfig) -> None:
        super().__init__()
        self.tower = tower
        self.config = config

    def weights(self) -> dict[str, float]:
        """Weight of each part that the user tower offers."""
        if not self.tower.user_tower.needs_pictures_of_history:
            return {"ut": 1.0}
        alpha, beta = self.config.alpha, self.config.beta
        return {"nig": 1 - alpha - abs(beta), "tt": alpha, "ut": beta}

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        config, weights = self.config, self.weights()
        out = self.tower(batch.items, batch.histories, generate=weights.get("nig", 0) > 1e-9)
        candidates, start = gather_with_gradient(out.item)
        candidate_rows, _ = gather_with_gradient(batch.item_rows)
        log_inclusion, _ = gather_with_gradient(batch.log_inclusion)
        temperature = self.tower.temperature if config.learnable_temperature else self.tower.temperature.detach()
        parts = {}
        for name, anchors in (("ut", out.user), ("tt", out.target_given_user)):
            if anchors is not None:
                parts[name] = info_nce(
                    anchors,
                    candidates,
                    out.target + start,
                    candidate_rows,
                    temperature,
                    log_inclusion if config.logq_correction else None,
                )
        if out.text_logits is not None and out.text_ids is not None and len(out.text_ids):
            parts["nig"] = next_item_generation(out.text_logits, out.text_ids)
        zero = out.item.new_zeros(())
        totals = torch.stack([torch.stack(parts[n]) if n in parts else torch.stack([zero, zero]) for n in PARTS])
        counts, world_size = totals[:, 1].detach().clone(), 1
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(counts)
            world_size = dist.get_world_size()
        means = totals[:, 0] / counts.clamp(min=1) * world_size
        loss = sum((weights.get(n, 0.0) * means[i] for i, n in enumerate(PARTS)), zero)
        return loss, totals.detach()


class Trainer:
    """Model, optimiser, schedule and step counter of one worker."""

    def __init__(self, tower: DualTower, source: BatchSource, collator: Collator, config: Config) -> None:
        self.config = config
        self.tower, self.source, self.collate = tower, source, collator
        self.device = tower.log_temperature.device
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        choose_trainable(tower, config)
        self.task: nn.Module = TrainingTask(tower, config.train)
        if self.world_size > 1:
            self.task = DistributedDataParallel(self.task, find_unused_parameters=True)
        self.named = {n: p for n, p in tower.named_parameters() if p.requires_grad}
        matrices = [p for p in self.named.values() if p.ndim >= 2]
        others = [p for p in self.named.values() if p.ndim < 2]
        groups: list[dict[str, Any]] = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(
            groups, lr=config.train.learning_rate, weight_decay=config.train.weight_decay, betas=(0.9, 0.98)
        )
        self.total_steps = source.total_steps()
        self.step = 0

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then cosine decay to a tenth of the peak."""
        peak = self.config.train.learning_rate
        warmup = max(1, int(self.config.train.warmup_fraction * self.total_steps))
        if step < warmup:
            return peak * (step + 1) / warmup
        progress = (step - warmup) / max(1, self.total_steps - warmup)
        return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))

    def train_step(self) -> dict[str, float]:
        """One optimisation step over all workers; returns the joined loss and its parts."""
        seed = [self.config.train.seed, 2, self.step, self.rank]
        torch.manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))
        windows = self.source.step(self.step, self.rank, self.world_size)
        batch = self.collate(windows, np.random.default_rng(seed))
        self.task.train()
        loss, totals = self.task(batch.to(self.device))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.named.values(), self.config.train.gradient_clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.step)
        self.optimizer.step()
        joined = torch.cat([totals.flatten(), loss.detach().reshape(1) / self.world_size])
        if self.world_size > 1:
            dist.all_reduce(joined)
        self.step += 1
        if not torch.isfinite(joined[-1]):
            raise InputError(
                f"the loss is {float(joined[-1])} at step {self.step}; lower train.learning_rate "
                f"({self.config.train.learning_rate})"
            )
        parts = joined[:-1].view(len(PARTS), 2).tolist()
        losses = {f"loss_{n}": total / count for n, (total, count) in zip(PARTS, parts, strict=True) if count}
        return {
            "step": self.step,
            "loss": float(joined[-1]),
            **losses,
            "temperature": float(self.tower.temperature.detach()),
            "gradient_norm": float(norm),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
        }

    def validate(self, catalog: Catalog, held_out: HeldOut) -> dict[str, float]:
        """NDCG@10 and recall over the whole catalog; the workers share items and users between them."""
        embedder = Embedder(
            self.tower, catalog.encoder, self.config.model.modalities, self.config.model.max_history_items
        )
        mine = np.arange(self.rank, len(catalog), self.world_size)
        gathered, _ = gather_with_gradient(torch.from_numpy(embedder.items(catalog, mine)).to(self.device))
        rows, _ = gather_with_gradient(torch.from_numpy(mine).to(self.device))
        vectors = np.empty(gathered.shape, dtype=np.float32)
        vectors[rows.cpu().numpy()] = gathered.cpu().numpy()
        ranks = np.zeros(0, dtype=np.int64)
        users = np.arange(self.rank, len(held_out.targets), self.world_size)
        for start in range(0, len(users), 64):
            chosen = users[start : start + 64]
            queries = embedder.users(catalog, [held_out.histories[i] for i in chosen], vectors)
            ranks = np.append(ranks, target_ranks(queries @ vectors.T, held_out.targets[chosen]))
        joined, _ = gather_with_gradient(torch.from_numpy(ranks).to(self.device))
        self.task.train()
        return {f"valid_{k}": v for k, v in rank_metrics(joined.cpu().numpy(), (1, 10)).items()}

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """The optimiser's state by parameter name, for safetensors."""
        names: dict[Any, str] = {p: n for n, p in self.named.items()}
        return {
            f"{names[p]}/{key}": value.detach().contiguous()
            for p, state in self.optimizer.state.items()
            for key, value in state.items()
        }

    def restore(self, step: int, tensors: dict[str, Tensor]) -> None:
        """Continue after `step` with the state that `optimizer_tensors` gave."""
        self.step = step
        for name, parameter in self.named.items():
            state = {k: tensors[f"{name}/{k}"] for k in ("exp_avg", "exp_avg_sq", "step") if f"{name}/{k}" in tensors}
            if state:
                self.optimizer.state[parameter] = state


def choose_trainable(tower: DualTower, config: Config) -> None:
    """Freeze what the configuration leaves without a gradient, in place."""
    family = tower.backbone.family
    if config.model.modalities == "text":
        for parameter in family.vision_parameters(tower.backbone.model):
            parameter.requires_grad_(False)
    if not config.train.learnable_temperature:
        tower.log_temperature.requires_grad_(False)
