"""The training objective over the outputs of the towers, joined over all workers.

    L = (1 - alpha - |beta|) L_NIG + alpha L_TT + beta L_UT

L_NIG is next-item generation: cross-entropy on the text tokens of the next item. L_TT contrasts v_T|U (the next item
read after the history) with v_T (the item read alone), and L_UT contrasts v_U (the history) with v_T; both are InfoNCE.
The form is that of CALRec (Li et al., RecSys 2024, arXiv 2405.02429) and PixRec (arXiv 2601.06458).

`TrainingTask` computes it in one forward pass; `gradcache` computes the same with less memory. Knows no optimiser.

Shapes: B histories · L items in a history · U distinct items of one worker · P examples (a prefix and its next item)
· G candidates (items gathered from all workers, and extra ones) · N items of the catalog · D width of the shared space.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pixrec.config import TrainConfig
from pixrec.model.encoding import Histories, Items
from pixrec.model.losses import Part, gather_with_gradient, info_nce, next_item_generation
from pixrec.model.towers import DualTower, tokens_of

PARTS = ("nig", "tt", "ut")


@dataclass(frozen=True)
class Batch:
    items: Items
    histories: Histories
    item_rows: Tensor
    """(U,) catalog rows of the items, which tell the same item apart across workers"""
    log_inclusion: Tensor
    """(U,) log chance of each item to be in the step's batch"""

    def to(self, device: torch.device | str) -> Batch:
        rows, inclusion = (t.to(device, non_blocking=True) for t in (self.item_rows, self.log_inclusion))
        return Batch(self.items.to(device), self.histories.to(device), rows, inclusion)

    def tokens(self) -> tuple[float, float]:
        """Tokens read, and tokens computed: with padding."""
        counts = [tokens_of(part.length) for part in (self.items, self.histories)]
        return float(sum(read for read, _ in counts)), float(sum(computed for _, computed in counts))


@dataclass(frozen=True)
class Extra:
    """Items drawn from a table of vectors computed earlier; they get no gradient."""

    vectors: Tensor
    """(E, D)"""
    rows: Tensor
    """(E,) catalog rows"""
    log_inclusion: Tensor
    """(E,) log chance of each to be in the step's batch"""
    drawn: float
    """Chance of an item of the catalog to be drawn."""


@dataclass(frozen=True)
class Candidates:
    """All item vectors that an anchor is compared with."""

    vectors: Tensor
    """(G, D)"""
    ids: Tensor
    """(G,) catalog rows"""
    log_inclusion: Tensor | None
    """(G,) log chance of each to be among the candidates; None without logQ correction"""
    start: int
    """Where this worker's own items begin."""


class TrainingTask(nn.Module):
    """The mixed objective as one forward pass, so that DDP and FSDP see all of it.

    Returns the loss whose gradient, averaged over workers, is that of the joined batch, and a detached vector of
    (total, count) for each of PARTS, this worker's share.
    """

    def __init__(self, tower: DualTower, config: TrainConfig) -> None:
        super().__init__()
        self.tower = tower
        self.config = config
        self.gather = gather_with_gradient if config.negatives == "global" else _keep
        self.touches = False

    def weights(self) -> dict[str, float]:
        """Weight of each part."""
        alpha, beta = self.config.alpha, self.config.beta
        return {"nig": 1 - alpha - abs(beta), "tt": alpha, "ut": beta}

    @property
    def generates(self) -> bool:
        """Whether L_NIG has a weight, so that scores of the next items' text are needed."""
        return self.weights()["nig"] > 1e-9

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function of the towers; under FSDP their weights are whole inside of it."""
        return function(*args)

    def autocast(self) -> torch.autocast:
        """The precision that the towers run in."""
        device = self.tower.log_temperature.device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.config.precision == "bf16")

    def keep_in_graph(self, tensor: Tensor) -> Tensor:
        """The tensor with a gradient of zero to all weights that FSDP reduces together. Every worker must take part in
        that reduction, also one whose share of the batch has no picture, say."""
        if not (self.touches and torch.is_grad_enabled()):
            return tensor
        backbone = self.tower.backbone
        layers = {id(p) for p in backbone.family.language_model(backbone.model).layers.parameters()}  # type: ignore
        bound = [p for p in self.tower.parameters() if p.requires_grad and p.ndim and id(p) not in layers]
        return tensor + 0 * torch.stack([p.reshape(-1)[0].float() for p in bound]).sum()

    def forward(self, batch: Batch, extra: Extra | None = None) -> tuple[Tensor, Tensor]:
        with self.autocast():
            out = self.tower(batch.items, batch.histories, generate=self.generates)
        candidates = self.candidates(out.item.float(), batch.item_rows, batch.log_inclusion, extra)
        seen = history_rows(batch.histories, batch.item_rows) if self.config.mask_history else None
        parts = {}
        for name, anchors in (("ut", out.user.float()), ("tt", out.target_given_user.float())):
            pool, start = self.pool(anchors, batch.item_rows[out.target])
            parts[name] = self.contrast(anchors, out.target, seen, candidates, pool, start)
        if out.text_logits is not None and out.text_ids is not None and len(out.text_ids):
            parts["nig"] = next_item_generation(out.text_logits, out.text_ids)
        zero = candidates.vectors.new_zeros(())
        totals = torch.stack([torch.stack(parts[n]) if n in parts else torch.stack([zero, zero]) for n in PARTS])
        counts, world_size = joined_counts(totals[:, 1])
        means = totals[:, 0] / counts.clamp(min=1) * world_size
        weights = self.weights()
        loss = sum((weights[n] * means[i] for i, n in enumerate(PARTS)), zero)
        return self.keep_in_graph(loss), totals.detach()

    def temperature(self) -> Tensor:
        temperature = self.tower.temperature
        return temperature if self.config.learnable_temperature else temperature.detach()

    def candidates(self, vectors: Tensor, rows: Tensor, log_inclusion: Tensor, extra: Extra | None) -> Candidates:
        """Join this worker's items (U, D) with those of the others and the extra ones."""
        everyone, start = self.gather(vectors)
        ids, _ = self.gather(rows)
        inclusion = self.gather(log_inclusion)[0] if self.config.logq_correction else None
        if extra is not None:
            everyone, ids = torch.cat([everyone, extra.vectors]), torch.cat([ids, extra.rows])
            if inclusion is not None:  # an item may come by the batch, by the draw, or by both
                by_batch = torch.cat([inclusion, extra.log_inclusion]).exp()
                inclusion = (1 - (1 - by_batch) * (1 - extra.drawn)).log()
        return Candidates(everyone, ids, inclusion, start)

    def pool(self, anchors: Tensor, target_rows: Tensor) -> tuple[tuple[Tensor, Tensor] | None, int]:
        """Anchors of all workers with the catalog rows of their targets, for the other direction of the loss."""
        if not self.config.symmetric:
            return None, 0
        everyone, start = self.gather(anchors)
        return (everyone, self.gather(target_rows)[0]), start

    def contrast(
        self,
        anchors: Tensor,
        target: Tensor,
        seen: Tensor | None,
        candidates: Candidates,
        pool: tuple[Tensor, Tensor] | None,
        pool_start: int,
    ) -> Part:
        """InfoNCE of anchors (P, D) whose targets are this worker's items `target` (P,), `seen` (P, L) masked.

        With a `pool` (anchors of all workers, among which these begin at `pool_start`, and the rows of their
        targets), the mean of both directions.
        """
        own = target + candidates.start
        temperature = self.temperature()
        excluded = None if seen is None else among(candidates.ids, seen)
        part = info_nce(
            anchors, candidates.vectors, own, candidates.ids, temperature, candidates.log_inclusion, excluded
        )
        if pool is None:
            return part
        mine = pool_start + torch.arange(len(anchors), device=anchors.device)
        other = info_nce(candidates.vectors[own], pool[0], mine, pool[1], temperature, once=False)
        return Part((part.total + other.total) / 2, part.examples)


def history_rows(histories: Histories, item_rows: Tensor) -> Tensor:
    """(P, L) catalog rows of all items of each example's history; -1 on padding."""
    rows = torch.where(histories.item >= 0, item_rows[histories.item.clamp(min=0)], -1)
    return rows[histories.example // rows.shape[1]]


def among(ids: Tensor, seen: Tensor) -> Tensor:
    """(P, G) bool: which of the candidates `ids` (G,) stand in `seen` (P, L)."""
    found = torch.zeros(len(seen), len(ids), dtype=torch.bool, device=ids.device)
    for column in seen.unbind(1):
        found |= ids.unsqueeze(0) == column.unsqueeze(1)
    return found


def joined_counts(counts: Tensor) -> tuple[Tensor, int]:
    """Counts summed over all workers, and how many workers there are."""
    joined = counts.detach().clone()
    if not (dist.is_available() and dist.is_initialized()):
        return joined, 1
    dist.all_reduce(joined)
    return joined, dist.get_world_size()


def _keep(tensor: Tensor) -> tuple[Tensor, int]:
    return tensor, 0
