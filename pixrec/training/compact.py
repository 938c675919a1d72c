"""Training of a compact tower on item vectors: SASRec's way, where every position of a history predicts its next item.

No Ray, no file system. Every batch is a pure function of the seed and the epoch, so that a resumed run continues as the
other would have. Workers split each batch between them and are joined by torch.distributed where it is initialised.

Shapes: B histories of one step · L longest of them · P examples · N items of the catalog · K candidates of one step
· C width of content vectors · D width of the shared space.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from pixrec.config import SequenceConfig
from pixrec.data.sequences import HeldOut
from pixrec.errors import InputError
from pixrec.metrics import LOGGED, rank_metrics, target_ranks
from pixrec.model.averaging import WeightMean
from pixrec.model.compact import CompactTower
from pixrec.model.losses import gather_with_gradient
from pixrec.model.parallel import optimizer_tensors, restore_optimizer, sum_gradients
from pixrec.model.seeding import reseed, seed_of
from pixrec.model.softmax import catalog_softmax, generalised_bce, sampled_softmax

POOL_STEPS = 16
"""Histories of so many steps are sorted by length together, so that a batch holds histories of like length."""

USERS_PER_PASS = 256

OnRow = Callable[[dict[str, Any]], None]


class WindowSource:
    """Training histories as windows of at most `max_history_items` + 1 events: each epoch the newest of every history,
    and older ones cut at places that change.

    An event is a row, or a pair of a row and its timestamp: a history of n is an array (n,) or (n, 2).
    """

    def __init__(self, histories: Sequence[np.ndarray], max_history_items: int, config: SequenceConfig, seed: int):
        self.histories = [h for h in histories if len(h) >= 2]
        if not self.histories:
            raise InputError(
                "no training history has two events, so there is no next item to learn; lower prepare.min_* "
                "or give more interactions"
            )
        self.length = max_history_items + 1
        self.size = config.histories_per_step
        self.seed = seed

    def epoch(self, epoch: int) -> list[list[np.ndarray]]:
        """The batches of `epoch`, each up to `histories_per_step` windows of events, oldest first."""
        rng = np.random.default_rng([self.seed, 3, epoch])
        windows = [window for history in self.histories for window in self._windows(history, rng)]
        order, pool = rng.permutation(len(windows)), self.size * POOL_STEPS
        batches = []
        for start in range(0, len(order), pool):
            near = sorted(order[start : start + pool], key=lambda i: len(windows[i]))
            batches += [near[i : i + self.size] for i in range(0, len(near), self.size)]
        return [[windows[i] for i in batches[b]] for b in rng.permutation(len(batches))]

    def _windows(self, history: np.ndarray, rng: np.random.Generator) -> Iterator[np.ndarray]:
        yield history[-self.length :]
        if len(history) > self.length:
            step = self.length - 1
            for end in range(len(history) - int(rng.integers(1, step + 1)), 1, -step):
                yield history[max(0, end - self.length) : end]


class CompactTrainer:
    """A compact tower, its optimiser and its place in the data.

    `content` (N, C) are the items' content vectors, which stand still, or None; `id_rows` (N,) each item's row of
    learned vectors, -1 for none; `counts` (N,) the events of training: an item without any is no candidate, as nothing
    could tell the model that it is good. `timestamps`, beside the rows of `histories`, say when the events were, in
    milliseconds; a tower that reads no time does not look at them.
    """

    section = "train.compact"
    """Where `config` stands."""
    validates_first = False
    """Whether the weights before the first step may be the best."""

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
    ) -> None:
        self.tower, self.config, self.seed = tower, config, seed
        self.trained: nn.Module = tower  # all that the optimiser moves
        self.id_dropout = id_dropout if content is not None else 0.0
        self.device = tower.log_temperature.device
        events = _timed(histories, timestamps) if tower.user.reads_times else histories
        self.source = WindowSource(events, tower.user.max_history_items, config, seed)
        self.content = None if content is None else content.to(self.device)
        self.id_rows = torch.from_numpy(id_rows.astype(np.int64)).to(self.device)
        self.ever_again = any(len(np.unique(h)) < len(h) for h in histories)
        self.warm = torch.from_numpy(np.flatnonzero(counts > 0)).to(self.device)
        self.nothing_known = self.id_rows < 0 if content is None else torch.zeros_like(self.id_rows, dtype=torch.bool)
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self.named = {n: p for n, p in tower.named_parameters() if p.requires_grad}
        self.optimizer = self._adamw((self.named, config.learning_rate))
        self.epoch = self.step = 0
        self.mean = WeightMean(self.named, config.averaging)

    def train_epoch(self, on_row: OnRow = lambda row: None) -> None:
        """One pass over the training histories; `on_row` gets a row a step."""
        batches = self.source.epoch(self.epoch)
        for windows in batches:
            loss = self._step(windows)
            facts = {"total_steps": self.config.epochs * len(batches), "temperature": self.tower.temperature.item()}
            on_row({"step": self.step, "loss": loss, **facts})
        self.epoch += 1

    def _step(self, windows: list[np.ndarray]) -> float:
        """One optimisation step over all workers; returns the joined mean loss of an example."""
        reseed(seed_of([self.seed, 4, self.step]), self.device)
        each = (len(windows),) if self.config.loss == "gbce" else ()  # its own for every history, or shared by all
        negatives = self.warm[torch.randint(len(self.warm), (*each, self.config.negatives), device=self.device)]
        by_content_alone = torch.rand(len(self.id_rows), device=self.device) < self.id_dropout
        reseed(seed_of([self.seed, 5, self.step, self.rank]), self.device)
        self.tower.train()
        examples = sum(len(w) - 1 for w in windows)
        mine = windows[self.rank :: self.world_size]
        self.optimizer.zero_grad(set_to_none=True)
        negatives = negatives[self.rank :: self.world_size] if each else negatives
        loss = self._loss(mine, negatives, by_content_alone) if mine else 0.0 * self.tower.log_temperature
        (loss / examples).backward()
        self._join_gradients()
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * min(1.0, (self.step + 1) / max(1, self.config.warmup_steps))
        self.optimizer.step()
        self.step += 1
        self.mean.update(self.step)
        joined = loss.detach().clone()
        if self.world_size > 1:
            dist.all_reduce(joined)
        total = joined.item()
        if not math.isfinite(total):
            raise InputError(
                f"the loss is {total} at step {self.step}; lower {self.section}.learning_rate "
                f"({self.config.learning_rate})"
            )
        return total / examples

    def _loss(self, windows: list[np.ndarray], negatives: Tensor, by_content_alone: Tensor) -> Tensor:
        """Sum of the loss over the examples of this worker's windows."""
        rows, is_item, timestamps = self._padded(windows)
        has_next, given = is_item[:, 1:], None if timestamps is None else timestamps[:, :-1]
        examples = torch.from_numpy(np.flatnonzero(has_next)).to(self.device)
        if self.config.loss == "full":
            items = torch.arange(len(self.id_rows), device=self.device)
        else:
            items = torch.unique(torch.cat([rows.flatten(), negatives.flatten()]))
        place = torch.full((len(self.id_rows),), -1, device=self.device)
        place[items] = torch.arange(len(items), device=self.device)
        id_rows = self.id_rows[items].masked_fill(by_content_alone[items], -1)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            table = self.tower.item_vectors(self._content_at(items), id_rows)
            states = self.tower.user_vectors(nn.functional.embedding(place[rows[:, :-1]], table), given)
        states, table = states.flatten(0, 1)[examples].float() / self.tower.temperature, table.float()
        target = place[rows[:, 1:].flatten()[examples]]
        if self.config.loss == "full":
            place = torch.full_like(place, -1)
            place[self.warm] = torch.arange(len(self.warm), device=self.device)
            return catalog_softmax(states, table[self.warm], place[target], bfloat16=self.config.precision == "bf16")
        positives, others = nn.functional.embedding(target, table), nn.functional.embedding(place[negatives], table)
        rate = min(1.0, self.config.negatives / max(1, len(self.warm) - 1))
        if self.config.loss == "sampled":
            same = place[negatives].unsqueeze(0) == target.unsqueeze(1)
            return sampled_softmax(states, positives, others, same, torch.full_like(others[:, 0], rate).log())
        same = place[negatives][examples // has_next.shape[1]] == target.unsqueeze(1)
        by_history = states.new_zeros(has_next.size, states.shape[1]).index_copy(0, examples, states)
        against = by_history.unflatten(0, has_next.shape) @ others.transpose(1, 2)
        against = against.flatten(0, 1)[examples].masked_fill(same, float("-inf"))
        return generalised_bce((states * positives).sum(1), against, rate, self.config.calibration)

    def _content_at(self, items: Tensor) -> Tensor | None:
        """Content vectors of the items (U,) that a step's loss reads, where there are any."""
        return None if self.content is None else self.content[items]

    def _adamw(self, *rated: tuple[dict[str, nn.Parameter], float]) -> torch.optim.AdamW:
        """The optimiser of parameters by name, each group with the rate it has once warmed up."""
        groups = [{"params": list(named.values()), "lr": rate, "peak": rate} for named, rate in rated if named]
        return torch.optim.AdamW(groups, weight_decay=self.config.weight_decay, betas=(0.9, 0.98))

    def _join_gradients(self) -> None:
        """Sum the gradients of all workers; each one's loss is already its share of the joined mean."""
        sum_gradients(self.named.values())

    def _padded(self, windows: Sequence[np.ndarray]) -> tuple[Tensor, np.ndarray, Tensor | None]:
        """Rows (B, L), padded on the right with row 0, which of them are items (B, L), and their timestamps (B, L).

        The mask stays with the processor: a GPU that is asked how many items there are has to be waited for.
        """
        lengths = np.array([len(w) for w in windows])
        is_item = np.arange(int(lengths.max())) < lengths[:, None]
        events = np.zeros((*is_item.shape, *windows[0].shape[1:]), dtype=np.int64)
        events[is_item] = np.concatenate(windows)
        padded = torch.from_numpy(events).to(self.device)
        return (padded, is_item, None) if padded.ndim == 2 else (padded[..., 0], is_item, padded[..., 1])

    @torch.no_grad()
    def item_vectors(self) -> Tensor:
        """Vectors (N, D) of the whole catalog."""
        self.tower.eval()
        return self.tower.item_vectors(self.content, self.id_rows)

    @torch.no_grad()
    def user_vectors(
        self, histories: Sequence[np.ndarray], table: Tensor, timestamps: Sequence[np.ndarray] | None = None
    ) -> Tensor:
        """Vectors (B, D) of whole histories, of which the last `max_history_items` are read."""
        self.tower.eval()
        events = _timed(histories, timestamps) if self.tower.user.reads_times else histories
        rows, is_item, padded = self._padded([h[-self.tower.user.max_history_items :] for h in events])
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
        for start in range(0, len(users), USERS_PER_PASS):
            chosen = users[start : start + USERS_PER_PASS]
            part = held_out.only(chosen)
            queries = self.user_vectors(part.histories, table, part.timestamps)
            seen = None if self.ever_again else part.histories
            scores = (queries @ table.T).masked_fill(self.nothing_known, float("-inf"))
            ranks = np.append(ranks, target_ranks(scores, part.targets, seen))
        joined, _ = gather_with_gradient(torch.from_numpy(ranks).to(self.device))
        return {f"valid_{k}": v for k, v in rank_metrics(joined.cpu().numpy(), (1, 10), LOGGED).items()}

    def fit(self, held_out: HeldOut, on_row: OnRow = lambda row: None) -> dict[str, float]:
        """Train until no validation has been better for `patience` of them; the best weights stay in the tower.

        Returns the figures of the best validation and its `epoch`.
        """
        watch, best = EarlyStopping(self.config.patience), dict[str, Tensor]()
        for figures in self.validations(held_out, watch, on_row):  # within, the tower is what was validated
            on_row({"step": self.step, **figures, "epoch": self.epoch})
            if watch.figures is figures:
                best = copy.deepcopy(self.trained.state_dict())
        self.trained.load_state_dict(best)
        return watch.figures

    def validations(self, held_out: HeldOut, watch: EarlyStopping, on_row: OnRow) -> Iterator[dict[str, float]]:
        """Train until `watch` has seen enough; the figures of every validation, with its `epoch`. While they are looked
        at, the tower has the weights that were validated."""
        if self.validates_first and watch.best == -float("inf"):
            yield self._validation(held_out, watch)
        while self.epoch < self.config.epochs and not watch.over:
            self.train_epoch(on_row)
            if self.epoch % self.config.validate_every_epochs == 0 or self.epoch == self.config.epochs:
                with self.mean.applied():
                    yield self._validation(held_out, watch)

    def _validation(self, held_out: HeldOut, watch: EarlyStopping) -> dict[str, float]:
        figures = {**self.validate(held_out), "epoch": float(self.epoch)}
        watch.is_best(figures.get("valid_ndcg@10", float(self.epoch)), figures)
        return figures

    def training_tensors(self) -> dict[str, Tensor]:
        """What training goes on from beside the model, for safetensors: the optimiser's state by parameter name and,
        where a mean of the weights is kept, that and the last weights."""
        return optimizer_tensors(self.optimizer, self.named) | self.mean.tensors()

    def restore(self, epoch: int, step: int, tensors: dict[str, Tensor]) -> None:
        """Continue after `epoch` with what `training_tensors` gave."""
        self.epoch, self.step = epoch, step
        restore_optimizer(self.optimizer, self.named, tensors)
        self.mean.restore(tensors)


class EarlyStopping:
    """Remembers the best validation and how many came since."""

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.best = -float("inf")
        self.since = 0
        self.figures: dict[str, float] = {}

    @property
    def over(self) -> bool:
        return self.since >= self.patience

    def is_best(self, score: float, figures: dict[str, float] | None = None) -> bool:
        """Take note of a validation; whether it is the best so far."""
        if score <= self.best:
            self.since += 1
            return False
        self.best, self.since, self.figures = score, 0, figures or {}
        return True


def _timed(histories: Sequence[np.ndarray], timestamps: Sequence[np.ndarray] | None) -> Sequence[np.ndarray]:
    """Histories (n, 2) of rows and their timestamps; as they are where those are unknown."""
    if timestamps is None:
        return histories
    return [np.stack([h, t], axis=1) for h, t in zip(histories, timestamps, strict=True)]
