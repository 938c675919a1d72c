"""One optimisation step, and the loop of steps and validations, whatever is trained. No Ray, no file system.

A trainer is a strategy: what a step reads, what its loss is, and what is validated. All else is here. Every batch is a
function of the seed and of the place in the training, so that a resumed run continues exactly where the other stopped.
Workers split each batch between them and are joined by torch.distributed where it is initialised.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from pixrec.data.sequences import HeldOut
from pixrec.errors import InputError
from pixrec.model.averaging import WeightMean
from pixrec.model.compact import CompactTower
from pixrec.model.masters import Masters
from pixrec.model.parallel import optimizer_tensors, rank_and_size, restore_optimizer
from pixrec.model.rowwise import RowwiseAdamW
from pixrec.model.towers import DualTower
from pixrec.training.windows import rows_of

Tower = TypeVar("Tower", DualTower, CompactTower)
OnRow = Callable[[dict[str, Any]], None]


class DivergedError(InputError):
    """The loss or its gradient is no number any more. `batch` says what the worker read."""

    def __init__(self, message: str, batch: dict[str, Any]) -> None:
        super().__init__(message)
        self.batch = batch


class EarlyStopping:
    """Remembers the best validation and how many came since."""

    def __init__(self, patience: float = math.inf) -> None:
        self.patience = patience
        self.best = -math.inf
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


def scheduled(peak: float, step: int, warmup_steps: int, total_steps: int | None = None) -> float:
    """The learning rate of a step, from 0: linear warm-up to the peak, which stays or, with `total_steps`, falls as a
    cosine to a tenth of it."""
    warmup = max(1, warmup_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    if total_steps is None:
        return peak
    progress = (step - warmup) / max(1, total_steps - warmup)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


class Trainer(ABC, Generic[Tower]):
    """What is trained, its optimiser and its place in the data, on one worker. Subclasses set what has none here."""

    section = "train"
    """Where the settings stand, for those who have to change them."""
    counters: tuple[str, ...] = ("step",)
    """What tells the place in the data."""
    shown: tuple[str, ...] = ()
    """Which of them stand among the figures of a validation."""
    every: int
    """Steps between validations."""
    limit: int
    """Steps of the whole training."""
    in_shards = False
    """Whether checkpoints are of shards, a part from each worker."""
    validates_first = False
    """Whether the weights before the first step may be the best."""
    warmup_steps: int
    decay_steps: int | None = None
    """Where the rate has fallen to a tenth; None: it stays at its peak."""
    item_ids: Sequence[Any]
    """What people call the items, by row."""

    def __init__(self, tower: Tower, seed: int, patience: float = math.inf) -> None:
        self.tower: Tower = tower
        self.device, self.seed = tower.log_temperature.device, seed
        self.rank, self.world_size = rank_and_size()
        self.watch = EarlyStopping(patience)
        self.step = self.epoch = 0

    def _optimise(
        self, named: dict[str, nn.Parameter], groups: Sequence[dict[str, Any]], decay: float, averaging: float = 0.0
    ) -> None:
        """Move the parameters `named`, in `groups` with the `lr` each has once warmed up; those of a group that is
        `rowwise` as `RowwiseAdamW` says, and without a mean."""
        self.masters = Masters(named)
        peaks = [
            {**group, "params": self.masters.of(group["params"]), "peak": group["lr"]}
            for group in groups
            if group["params"]
        ]
        rowwise = {p for group in peaks if group.get("rowwise") for p in group["params"]}
        self.named = named
        self.mean = WeightMean({name: p for name, p in named.items() if p not in rowwise}, averaging)
        self.optimizer = RowwiseAdamW(peaks, weight_decay=decay, betas=(0.9, 0.98), fused=True)

    @property
    def total_steps(self) -> int:
        """Optimisation steps of the whole training, as far as is known."""
        return self.limit

    @abstractmethod
    def _next(self) -> Sequence[np.ndarray]:
        """The windows that the next step reads."""

    @abstractmethod
    def _backward(self, windows: Sequence[np.ndarray]) -> Tensor:
        """Leave the gradient of the joined batch; returns its loss and what else `_row` wants to know, (1 + F,)."""

    def _clip(self) -> Tensor:
        """Bound the gradient; returns its norm before, ()."""
        return torch.zeros((), device=self.device)

    def _row(self, found: list[float], norm: float) -> dict[str, float]:
        """What the log gets of a step beside its loss."""
        return {}

    @abstractmethod
    def validate(self, held_out: HeldOut) -> dict[str, float]:
        """Figures named `valid_…`; none where nobody is held out."""

    def train_step(self) -> dict[str, Any]:
        """One optimisation step over all workers; returns the joined loss and what else the log gets."""
        return self._step(self._next())

    def _step(self, windows: Sequence[np.ndarray]) -> dict[str, Any]:
        self.optimizer.zero_grad(set_to_none=True)
        found = self._backward(windows)
        more = torch.stack([self._clip(), self.tower.temperature.detach()])
        loss, *others, norm, temperature = torch.cat([found, more]).tolist()  # the one wait for a GPU of a step
        self._guard(loss, norm, windows)
        for group in self.optimizer.param_groups:
            group["lr"] = scheduled(group["peak"], self.step, self.warmup_steps, self.decay_steps)
        self.masters.take_gradients()
        self.optimizer.step()
        self.masters.give_weights()
        self.step += 1
        self.mean.update(self.step)
        at = {"step": self.step, "total_steps": self.total_steps}
        return {**at, "loss": loss, "temperature": temperature, **self._row(others, norm)}

    def _guard(self, loss: float, norm: float, windows: Sequence[np.ndarray]) -> None:
        """Raise DivergedError before the weights are spoilt."""
        if math.isfinite(loss) and math.isfinite(norm):
            return
        histories = [[self.item_ids[row] for row in rows_of(window)] for window in windows]
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm}"
        raise DivergedError(
            f"{what} at step {self.step + 1}, whose batch holds among others {', '.join(map(str, histories[0][:3]))}; "
            f"lower {self.section}.learning_rate ({self.optimizer.param_groups[0]['peak']}) or look at those items",
            {"step": self.step + 1, "loss": str(loss), "gradient_norm": str(norm), "histories": histories},
        )

    def validations(self, held_out: HeldOut, on_row: OnRow = lambda row: None) -> Iterator[dict[str, float]]:
        """Train until the end, or until nothing gets better; the figures of every validation. While they are looked at,
        the weights are those that were validated. `on_row` gets a row a step and a row a validation."""
        if self.validates_first and self.watch.best == -math.inf:
            yield self._validation(held_out, on_row)
        while not self._has_ended() and not self.watch.over:
            on_row(self.train_step())
            if self._has_ended() or self._is_due():
                with self.mean.applied():
                    yield self._validation(held_out, on_row)

    def _has_ended(self) -> bool:
        return self.step >= self.limit

    def _is_due(self) -> bool:
        """Whether a validation follows the last step."""
        return self.step % self.every == 0

    def _validation(self, held_out: HeldOut, on_row: OnRow) -> dict[str, float]:
        figures = {**self.validate(held_out), **{name: float(getattr(self, name)) for name in self.shown}}
        on_row({**figures, **self.position(), "total_steps": self.total_steps})
        self.watch.is_best(self.score(figures), figures)
        return figures

    def score(self, figures: dict[str, float]) -> float:
        """What the best weights have most of: NDCG@10, or steps where nobody is held out."""
        return figures.get("valid_ndcg@10", float(self.step))

    def fit(self, held_out: HeldOut, on_row: OnRow = lambda row: None) -> dict[str, float]:
        """Train until no validation has been better for `patience` of them; the best weights stay.

        Returns the figures of the best validation.
        """
        best = dict[str, Tensor]()
        for figures in self.validations(held_out, on_row):
            if self.watch.figures is figures:
                best = {name: parameter.detach().clone() for name, parameter in self.named.items()}
        with torch.no_grad():
            for name, parameter in self.named.items():
                parameter.copy_(best[name])
        return self.watch.figures

    def position(self) -> dict[str, int]:
        """How far training has come."""
        return {name: getattr(self, name) for name in self.counters}

    def training_tensors(self) -> dict[str, Tensor]:
        """What training goes on from beside the model, for safetensors: the optimiser's state by parameter name, this
        worker's share of it where weights are sharded, and, where a mean of the weights is kept, that and the last
        weights."""
        return optimizer_tensors(self.optimizer, self.masters.named) | self.masters.tensors() | self.mean.tensors()

    def restore(self, position: dict[str, int], tensors: dict[str, Tensor]) -> None:
        """Continue after `position` with what `training_tensors` gave."""
        for name in self.counters:
            setattr(self, name, position.get(name, 0))
        restore_optimizer(self.optimizer, self.masters.named, tensors)
        self.masters.restore(tensors)
        self.mean.restore(tensors)
