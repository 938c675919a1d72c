"""The objective's loss and gradients with few histories in memory at a time (GradCache, Gao et al., RepL4NLP 2021).

The vectors of the whole batch are computed in parts without a graph. The loss is taken on them, which gives the
gradient of each vector. Then every part is computed again, with a graph, and sent that gradient. Picture tokens are
computed in the same way and before: each picture once without a graph, for all that reads it, and where the vision part
learns once more, to be sent the gradient that all of these have left. What the whole batch needs are its vectors and
picture tokens; all else grows with the part.

Each part draws its dropout from a seed of its own, so both passes see the same.

Shapes: U distinct items of one worker · P examples · D width of the shared space · L items in a history
· M pictures · K tokens a picture · X numbers of a picture token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from pixrec.model.encoding import Histories, Items
from pixrec.model.losses import all_reduced_rows, next_item_generation
from pixrec.model.objective import PARTS, Candidates, Extra, TrainingTask, history_rows, joined_counts
from pixrec.model.seeding import reseed
from pixrec.model.towers import HistoryOutputs, tokens_of

_ANCHORS_AT_A_TIME = 1024
_PICTURE_SEEDS = 2**40
"""Where the seeds of picture parts begin, above those of items and histories."""


@dataclass(frozen=True)
class Parts:
    """A batch of one worker in parts. Picture tokens are numbered over all of them."""

    item_rows: Tensor
    """(U,) catalog rows of the distinct items"""
    log_inclusion: Tensor
    """(U,) log chance of each item to be in the step's batch"""
    pictures: Sequence[Callable[[], Items]]
    """Together the U items with their pictures, in order, each copied when it is asked for."""
    items: Sequence[Items]
    """The same without pictures."""
    histories: Sequence[Histories]
    """Together all histories, over the U items."""


class GradCache:
    """Vectors that are made part by part, each time anew: first without a graph, then with one, to be sent what the
    loss said of them."""

    def __init__(self, make: Callable[[int, bool], Tensor], parts: Sequence[tuple[int, bool]]) -> None:
        """`make` gets the number of a part and whether its tokens count; `parts` say which ones are made and whether
        they count. What `make` draws at random must be the same both times."""
        self.make, self.parts = make, parts

    @torch.no_grad()
    def vectors(self) -> list[Tensor]:
        """Those of the parts that count."""
        made = [(self.make(i, counts), counts) for i, counts in self.parts]
        return [vectors for vectors, counts in made if counts]

    def send(self, gradient: Tensor | None) -> None:
        """Add to the parameters' gradients what follows from that of all vectors, in the order of the parts."""
        start = 0
        for i, counts in self.parts:
            made = self.make(i, False)
            rows = slice(start, start + (len(made) if counts else 0))
            if made.requires_grad:
                _sent(made, gradient, rows).backward()
            start = rows.stop


@dataclass(frozen=True)
class _Vectors:
    """Vectors of the whole batch, leaves of the loss."""

    item: Tensor
    user: Tensor
    conditioned: Tensor
    target: Tensor
    seen: Tensor | None
    tokens: float


def backward(
    task: TrainingTask, parts: Parts, extra: Extra | None, seed: int, share: float = 1.0
) -> tuple[Tensor, Tensor, tuple[float, float]]:
    """Add `share` of the loss's gradient to the parameters.

    Returns loss and totals as `TrainingTask.forward` does, and (tokens, tokens with padding). The gradient is this
    worker's: the caller averages it over the workers, unless FSDP does.
    """
    device = task.tower.log_temperature.device
    rows, inclusion = (t.to(device, non_blocking=True) for t in (parts.item_rows, parts.log_inclusion))
    parts = replace(parts, item_rows=rows, log_inclusion=inclusion)
    cache = _Cache(task, parts, seed)
    vectors = cache.vectors()
    counts = (vectors.tokens, len(vectors.user), len(vectors.user))
    totals = torch.tensor([[0.0, count] for count in counts]).to(device, non_blocking=True)
    joined, world_size = joined_counts(totals[:, 1])
    weights = task.weights()
    scale = {n: weights[n] * world_size / c for n, c in zip(PARTS, joined.clamp(min=1), strict=True)}
    _contrast(task, vectors, parts, extra, {n: share * s for n, s in scale.items()}, totals)
    totals[0, 0] = cache.send_to_histories(vectors, share * scale["nig"])
    cache.items.send(vectors.item.grad)
    cache.send_to_pictures()
    loss = sum((scale[n] * totals[i, 0] for i, n in enumerate(PARTS)), totals.new_zeros(()))
    return loss, totals, (cache.real, cache.slots)


def _contrast(
    task: TrainingTask,
    vectors: _Vectors,
    parts: Parts,
    extra: Extra | None,
    scale: dict[str, Tensor],
    totals: Tensor,
) -> None:
    """Gradients of both InfoNCE terms on the vectors, a block of anchors at a time; adds the sums to `totals`."""
    own = vectors.item.detach()
    gathered = task.candidates(own, parts.item_rows, parts.log_inclusion, extra)
    leaf = gathered.vectors.detach().requires_grad_()
    candidates = Candidates(leaf, gathered.ids, gathered.log_inclusion, gathered.start)
    everyone = task.config.negatives == "global"
    for index, name, anchors in ((2, "ut", vectors.user), (1, "tt", vectors.conditioned)):
        pool, start = task.pool(anchors.detach(), parts.item_rows[vectors.target])
        pool_leaf = None if pool is None else pool[0].detach().requires_grad_()
        for first in range(0, len(anchors), _ANCHORS_AT_A_TIME):
            block = slice(first, first + _ANCHORS_AT_A_TIME)
            part = task.contrast(
                anchors[block],
                vectors.target[block],
                None if vectors.seen is None else vectors.seen[block],
                candidates,
                None if pool is None or pool_leaf is None else (pool_leaf, pool[1]),
                start + first,
            )
            totals[index, 0] += part.total.detach()
            (scale[name] * part.total).backward()
        if pool_leaf is not None and pool_leaf.grad is not None and anchors.grad is not None:
            anchors.grad = anchors.grad + _own_rows(pool_leaf.grad, start, len(anchors), everyone)
    assert leaf.grad is not None
    vectors.item.grad = _own_rows(leaf.grad, candidates.start, len(own), everyone)


def _own_rows(gradient: Tensor, start: int, count: int, everyone: bool) -> Tensor:
    """What the losses of all workers say of this worker's rows."""
    return (all_reduced_rows(gradient) if everyone else gradient)[start : start + count].clone()


class _Cache:
    """The passes over the parts."""

    def __init__(self, task: TrainingTask, parts: Parts, seed: int) -> None:
        self.task, self.tower, self.parts, self.seed = task, task.tower, parts, seed
        self.device = task.tower.log_temperature.device
        self.real = self.slots = 0.0
        # Under FSDP every pass is a collective: workers with fewer parts go through their first one again, for nothing.
        self.pictures = GradCache(self._pictures, _as_many_everywhere(len(parts.pictures)))
        self.table = torch.zeros(0)
        self.items = GradCache(self._items, _as_many_everywhere(len(parts.items)))
        self.history_parts = _as_many_everywhere(len(parts.histories))

    @torch.no_grad()
    def vectors(self) -> _Vectors:
        backbone = self.tower.backbone
        learns = any(p.requires_grad for p in backbone.family.vision_parameters(backbone.model))
        self.table = torch.cat(self.pictures.vectors()).requires_grad_(learns)  # (M·K, X)
        item = torch.cat(self.items.vectors())
        user, conditioned, target, seen, tokens = [], [], [], [], 0
        for i, counts in self.history_parts:
            histories, out = self._histories(i, generate=False)
            if not counts:
                continue
            self._count(histories.length)
            user.append(out.user.float())
            conditioned.append(out.target_given_user.float())
            target.append(histories.target)
            tokens += len(histories.text) if self.task.generates else 0
            if self.task.config.mask_history:
                seen.append(history_rows(histories, self.parts.item_rows))
        return _Vectors(
            item.requires_grad_(),
            torch.cat(user).requires_grad_(),
            torch.cat(conditioned).requires_grad_(),
            torch.cat(target),
            _cat_padded(seen) if seen else None,
            float(tokens),
        )

    def send_to_histories(self, vectors: _Vectors, nig_scale: Tensor) -> Tensor:
        """Second pass over the histories; returns the sum of L_NIG."""
        total, start = vectors.item.new_zeros(()), 0
        for i, counts in self.history_parts:
            _, out = self._histories(i, generate=self.task.generates)
            rows = slice(start, start + (len(out.user) if counts else 0))
            surrogate = _sent(out.user, vectors.user.grad, rows)
            surrogate = surrogate + _sent(out.target_given_user, vectors.conditioned.grad, rows)
            if out.text_logits is not None and out.text_ids is not None and len(out.text_ids):
                nig = next_item_generation(out.text_logits, out.text_ids).total
                surrogate = surrogate + nig * (nig_scale if counts else 0)
                total += nig.detach() if counts else 0
            surrogate.backward()
            start = rows.stop
        return total

    def _count(self, length: Tensor) -> None:
        read, computed = tokens_of(length)
        self.real, self.slots = self.real + read, self.slots + computed

    def send_to_pictures(self) -> None:
        """Second pass over the pictures, where what encodes them learns."""
        if self.table.requires_grad:
            self.pictures.send(torch.zeros_like(self.table) if self.table.grad is None else self.table.grad)

    def _pictures(self, i: int, count: bool) -> Tensor:
        reseed(self.seed + _PICTURE_SEEDS + i, self.device)
        with self.task.autocast():
            return self.task.run(self._read_pictures, self.parts.pictures[i]().to(self.device)).float()

    def _items(self, i: int, count: bool) -> Tensor:
        reseed(self.seed + 2 * i, self.device)
        with self.task.autocast():
            items = self.parts.items[i].to(self.device)
            if count:
                self._count(items.length)
            return self.task.run(self._read_items, items).float()

    def _histories(self, i: int, generate: bool) -> tuple[Histories, HistoryOutputs]:
        reseed(self.seed + 2 * i + 1, self.device)
        histories = self.parts.histories[i].to(self.device)
        with self.task.autocast():
            return histories, self.task.run(self._read, histories, generate)

    def _read_pictures(self, items: Items) -> Tensor:
        return self.task.keep_in_graph(self.tower.pictures(items))

    def _read_items(self, items: Items) -> Tensor:
        return self.task.keep_in_graph(self.tower.item_vectors(items, self.table))

    def _read(self, histories: Histories, generate: bool) -> HistoryOutputs:
        out = self.tower.read_histories(histories, self.table, generate)
        return out._replace(user=self.task.keep_in_graph(out.user))


def _sent(made: Tensor, gradient: Tensor | None, rows: slice) -> Tensor:
    """A sum whose gradient on `made` is those rows of `gradient`; no rows: zero."""
    assert gradient is not None
    return (made.float() * gradient[rows]).sum() if rows.stop > rows.start else 0 * made.float().sum()


def _as_many_everywhere(count: int) -> list[tuple[int, bool]]:
    """Indices of this worker's parts and whether each counts; as many on every worker."""
    most = torch.tensor(count)
    if dist.is_available() and dist.is_initialized():
        most = most.to("cuda") if dist.get_backend() == "nccl" else most
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return [(i if i < count else 0, i < count) for i in range(int(most))]


def _cat_padded(rows: list[Tensor]) -> Tensor:
    """Stack (P, L) tensors of different L, filled up with -1."""
    width = max(r.shape[1] for r in rows)
    return torch.cat([torch.nn.functional.pad(r, (0, width - r.shape[1]), value=-1) for r in rows])
