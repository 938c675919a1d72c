"""Training of a compact tower on item vectors: SASRec's way, where every position of a history predicts its next item.

Shapes: B histories of one step · L longest of them · P examples · N items of the catalog · K candidates of one step
· C width of content vectors · D width of the shared space.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pixrec.config import SequenceConfig
from pixrec.data.sequences import HeldOut, Histories
from pixrec.metrics import LOGGED, rank_metrics, target_ranks
from pixrec.model.compact import CompactTower
from pixrec.model.losses import all_reduced_rows, gather_with_gradient
from pixrec.model.parallel import sum_gradients, sum_sparse_gradient
from pixrec.model.seeding import reseed, seed_of
from pixrec.model.softmax import catalog_softmax, generalised_bce, sampled_softmax
from pixrec.training.trainer import OnRow, Trainer
from pixrec.training.windows import RecentWindows, targets_of, timed

USERS_PER_PASS, ITEMS_PER_PASS = 256, 65_536
MAX_SCORES = 2**25  # of a pass over a large catalog: 128 MB
WHOLE_EVENTS = 8
"""Histories of a step are padded to a multiple of this many events, so that few steps have a shape of their own."""
ROWWISE_FROM = 200_000
"""Learned id vectors from which on `train.compact.id_optimizer` auto moves row by row."""


class CompactTrainer(Trainer[CompactTower]):
    """A compact tower, its optimiser and its place in the data.

    `content` (N, C) are the items' content vectors, which stand still, or None; `id_rows` (N,) each item's row of
    learned vectors, -1 for none; `counts` (N,) the events of training: an item without any is no candidate, as nothing
    could tell the model that it is good. `timestamps`, beside the rows of `histories`, say when the events were, in
    milliseconds; a tower that reads no time does not look at them. `item_ids` (N,) name the items of a batch that
    diverged; without them their rows do.
    """

    section, counters, shown = "train.compact", ("step", "epoch", "batch"), ("epoch",)

    def __init__(
        self,
        tower: CompactTower,
        histories: Sequence[np.ndarray],
        counts: np.ndarray,
        content: Tensor | None,
        id_rows: np.ndarray,
        config: SequenceConfig,
        id_dropout: float = 0.0,
        seed: int = 0,
        timestamps: Sequence[np.ndarray] | None = None,
        item_ids: Sequence[str] | None = None,
        id_dropout_events: int | None = None,
    ) -> None:
        super().__init__(tower, seed, config.patience)
        self.config = config
        self.warmup_steps, self.item_ids = config.warmup_steps, item_ids or range(len(id_rows))
        dropped = np.full(len(id_rows), 0.0 if content is None else id_dropout, np.float32)
        if id_dropout_events is not None:
            dropped *= (id_dropout_events / (id_dropout_events + counts)).astype(np.float32)
        self.id_dropout = torch.from_numpy(dropped).to(self.device)
        events = timed(histories, timestamps) if tower.user.reads_times else histories
        self.source = RecentWindows(events, tower.user.max_history_items, config, seed)
        self.content = None if content is None else content.to(self.device)
        self.id_rows = torch.from_numpy(id_rows.astype(np.int64)).to(self.device)
        self.ever_again = _has_repeats(histories)
        self.warm = torch.from_numpy(np.flatnonzero(counts > 0)).to(self.device)
        self.nothing_known = self.id_rows < 0 if content is None else torch.zeros_like(self.id_rows, dtype=torch.bool)
        self.batch = 0  # of the epoch, the next one
        self.table = _rowwise_table(tower, config)
        named = {n: p for n, p in tower.named_parameters() if p.requires_grad}
        self._optimise(named, self._groups(named), config.weight_decay, config.averaging)

    def _groups(self, named: dict[str, nn.Parameter]) -> list[dict[str, Any]]:
        """What the optimiser is told of the compact tower."""
        rate, content = self.config.content_learning_rate, self.tower.content
        alone = self.tower.id_embedding is None
        projection = None if rate is None or content is None or alone else content.weight
        others = [p for p in named.values() if p is not self.table and p is not projection]
        groups: list[dict[str, Any]] = [{"params": others, "lr": self.config.learning_rate}]
        if projection is not None:
            groups.append({"params": [projection], "lr": rate})
        if self.table is not None:
            groups.append({"params": [self.table], "lr": self.config.id_learning_rate, "rowwise": True})
        return groups

    @property
    def total_steps(self) -> int:
        """That of epochs as long as this one."""
        steps = self.config.epochs * len(self.source.epoch(self.epoch))
        return steps if self.config.max_steps is None else min(steps, self.config.max_steps)

    def _has_ended(self) -> bool:
        most = self.config.max_steps
        return self.epoch >= self.config.epochs or (most is not None and self.step >= most)

    def _is_due(self) -> bool:
        steps = self.config.validate_every_steps
        return bool(steps and self.step % steps == 0) or (
            not self.batch and self.epoch % self.config.validate_every_epochs == 0
        )

    def train_step(self) -> dict[str, Any]:
        row = super().train_step()
        self.batch += 1
        if self.batch == len(self.source.epoch(self.epoch)):
            self.epoch, self.batch = self.epoch + 1, 0
        return row

    def train_epoch(self, on_row: OnRow = lambda row: None) -> None:
        """One pass over the training histories; `on_row` gets a row a step."""
        epoch = self.epoch
        while self.epoch == epoch:
            on_row(self.train_step())

    def _next(self) -> Sequence[np.ndarray]:
        return self.source.epoch(self.epoch)[self.batch]

    def _backward(self, windows: Sequence[np.ndarray]) -> Tensor:
        reseed(seed_of([self.seed, 4, self.step]), self.device)
        each = (len(windows),) if self.config.loss == "gbce" else ()  # its own for every history, or shared by all
        negatives = self.warm[torch.randint(len(self.warm), (*each, self.config.negatives), device=self.device)]
        by_content_alone = torch.rand(len(self.id_rows), device=self.device) < self.id_dropout
        reseed(seed_of([self.seed, 5, self.step, self.rank]), self.device)
        self.tower.train()
        examples = sum(int(marks.sum()) for marks in targets_of(windows))
        mine = windows[self.rank :: self.world_size]
        negatives = negatives[self.rank :: self.world_size] if each else negatives
        loss = self._loss(mine, negatives, by_content_alone) if mine else 0.0 * self.tower.log_temperature
        (loss / examples).backward()
        self._join_gradients()
        return all_reduced_rows(loss.detach().view(1)) / examples

    def _loss(self, windows: Sequence[np.ndarray], negatives: Tensor, by_content_alone: Tensor) -> Tensor:
        """Sum of the loss over the examples of this worker's windows."""
        rows, is_item, timestamps = self._padded(windows, self.tower.user.max_history_items + 1)
        has_next, given = is_item.copy(), None if timestamps is None else timestamps[:, :-1]
        has_next[is_item] = np.concatenate(targets_of(windows))
        has_next = has_next[:, 1:]
        examples = torch.from_numpy(np.flatnonzero(has_next)).to(self.device)
        if self.config.loss == "full":
            items = torch.arange(len(self.id_rows), device=self.device)
        else:
            items = torch.unique(torch.cat([rows.flatten(), negatives.flatten()]))
            rows, negatives = torch.searchsorted(items, rows), torch.searchsorted(items, negatives)
        id_rows = self.id_rows[items].masked_fill(by_content_alone[items], -1)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            table = self.tower.item_vectors(self._content_at(items), id_rows)
            states = self.tower.user_vectors(nn.functional.embedding(rows[:, :-1], table), given)
        states, table = states.flatten(0, 1)[examples].float() / self.tower.temperature, table.float()
        target = rows[:, 1:].flatten()[examples]
        if self.config.loss == "full":
            target = torch.searchsorted(self.warm, target)
            return catalog_softmax(states, table[self.warm], target, bfloat16=self.config.precision == "bf16")
        positives, others = nn.functional.embedding(target, table), nn.functional.embedding(negatives, table)
        rate = min(1.0, self.config.negatives / max(1, len(self.warm) - 1))
        if self.config.loss == "sampled":
            same = negatives.unsqueeze(0) == target.unsqueeze(1)
            return sampled_softmax(states, positives, others, same, torch.full_like(others[:, 0], rate).log())
        same = negatives[examples // has_next.shape[1]] == target.unsqueeze(1)
        by_history = states.new_zeros(has_next.size, states.shape[1]).index_copy(0, examples, states)
        against = by_history.unflatten(0, has_next.shape) @ others.transpose(1, 2)
        against = against.flatten(0, 1)[examples].masked_fill(same, float("-inf"))
        return generalised_bce((states * positives).sum(1), against, rate, self.config.calibration)

    def _content_at(self, items: Tensor) -> Tensor | None:
        """Content vectors of the items (U,) that a step's loss reads, where there are any."""
        return None if self.content is None else self.content[items]

    def _join_gradients(self) -> None:
        """Sum the gradients of all workers; each one's loss is already its share of the joined mean."""
        sum_gradients(p for p in self.named.values() if p is not self.table)
        if self.table is not None:
            sum_sparse_gradient(self.table)

    def _padded(self, windows: Sequence[np.ndarray], most: int) -> tuple[Tensor, np.ndarray, Tensor | None]:
        """Rows (B, L), padded on the right with row 0, which of them are items (B, L), and their timestamps (B, L).
        L is at most `most`.

        The mask stays with the processor: a GPU that is asked how many items there are has to be waited for.
        """
        lengths = np.array([len(w) for w in windows])
        length = min(most, -(-int(lengths.max()) // WHOLE_EVENTS) * WHOLE_EVENTS)
        is_item = np.arange(length) < lengths[:, None]
        events = np.zeros((*is_item.shape, *windows[0].shape[1:]), dtype=np.int64)
        events[is_item] = np.concatenate(windows)
        padded = torch.from_numpy(events).to(self.device)
        return (padded, is_item, None) if padded.ndim == 2 else (padded[..., 0], is_item, padded[..., 1])

    @torch.no_grad()
    def item_vectors(self) -> Tensor:
        """Vectors (N, D) of the whole catalog."""
        self.tower.eval()
        total = len(self.id_rows)
        vectors = torch.empty(total, self.tower.user.width, device=self.device)
        for start in range(0, total, ITEMS_PER_PASS):
            rows = slice(start, start + ITEMS_PER_PASS)
            content = None if self.content is None else self.content[rows]
            vectors[rows] = self.tower.item_vectors(content, self.id_rows[rows])
        return vectors

    @torch.no_grad()
    def user_vectors(
        self, histories: Sequence[np.ndarray], table: Tensor, timestamps: Sequence[np.ndarray] | None = None
    ) -> Tensor:
        """Vectors (B, D) of whole histories, of which the last `max_history_items` are read."""
        self.tower.eval()
        events = timed(histories, timestamps) if self.tower.user.reads_times else histories
        most = self.tower.user.max_history_items
        rows, is_item, padded = self._padded([h[-most:] for h in events], most)
        last = torch.from_numpy(is_item.sum(1) - 1).to(self.device)
        return self.tower.user_vectors_at(table[rows], last, padded)

    @torch.no_grad()
    def validate(self, held_out: HeldOut) -> dict[str, float]:
        """NDCG@10 and recall over the whole catalog, nothing where nobody is held out; the workers share the users.

        Items of the user's history are no candidates where no training history has an item twice, nor are items that a
        tower of id vectors alone does not know.
        """
        if not len(held_out.targets):
            return {}
        table, ranks = self.item_vectors(), np.zeros(0, dtype=np.int64)
        users = np.arange(self.rank, len(held_out.targets), self.world_size)
        at_once = max(1, min(USERS_PER_PASS, MAX_SCORES // len(table)))
        for start in range(0, len(users), at_once):
            chosen = users[start : start + at_once]
            part = held_out.only(chosen)
            queries = self.user_vectors(part.histories, table, part.timestamps)
            seen = None if self.ever_again else part.histories
            scores = (queries @ table.T).masked_fill(self.nothing_known, float("-inf"))
            ranks = np.append(ranks, target_ranks(scores, part.targets, seen))
        joined, _ = gather_with_gradient(torch.from_numpy(ranks).to(self.device))
        return {f"valid_{k}": v for k, v in rank_metrics(joined.cpu().numpy(), (1, 10), LOGGED).items()}


def _rowwise_table(tower: CompactTower, config: SequenceConfig) -> Tensor | None:
    """The learned id vectors where they move row by row; their gradient is sparse from here on."""
    ids = tower.id_embedding
    if ids is None or config.id_optimizer == "adamw":
        return None
    if config.id_optimizer == "auto" and ids.num_embeddings < ROWWISE_FROM:
        return None
    ids.sparse = True
    return ids.weight


def _has_repeats(histories: Sequence[np.ndarray]) -> bool:
    """Whether some history has an item twice."""
    for block in Histories.of(histories).blocks():
        keys = np.repeat(np.arange(len(block), dtype=np.int64), block.lengths) << 32 | block.flat()
        keys.sort()
        if (keys[1:] == keys[:-1]).any():
            return True
    return False
