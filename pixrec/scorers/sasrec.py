"""SASRec as a baseline of the evaluation: the compact tower on learned id vectors alone, trained on the spot.

Kang & McAuley, ICDM 2018, with the losses that later work found stronger: softmax over sampled negatives or over the
whole catalog (Klenitskiy & Vasilev, RecSys 2023) and gBCE (Petrov & Macdonald, RecSys 2023).

Shapes: B users · N items.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch

from pixrec.config import SasrecConfig, SequenceConfig
from pixrec.data.sequences import Dataset, Histories, Users, sample_users
from pixrec.model.compact import CompactTower
from pixrec.model.seeding import seeded
from pixrec.scorers.protocol import Scorer
from pixrec.training.compact import CompactTrainer

LOSS_OF: dict[str, Literal["full", "sampled", "gbce"] | None] = {
    "sasrec": None,  # the loss of the config
    "sasrec_sampled": "sampled",
    "sasrec_full": "full",
    "sasrec_gbce": "gbce",
}


class Sasrec(Scorer):
    """A trained SASRec. Items without a training event have no vector: they rank last."""

    needs = ("events",)

    def __init__(self, name: str, trainer: CompactTrainer, counts: np.ndarray, figures: dict[str, float]) -> None:
        self.name, self.figures = name, figures
        self._trainer = trainer
        self._table = trainer.item_vectors()
        self._cold = torch.from_numpy(counts == 0).to(self._table.device)

    @torch.no_grad()
    def scores(self, users: Users) -> torch.Tensor:
        """Scores (B, N) float32 by the users' histories."""
        queries = self._trainer.user_vectors(users.histories, self._table)
        return (queries @ self._table.T).masked_fill(self._cold, float("-inf"))


def train_sasrec(
    name: str,
    dataset: Dataset,
    config: SasrecConfig,
    on_row: Callable[[dict[str, Any]], None] = lambda row: None,
    epochs: int | None = None,
    device: str = "cpu",
) -> Sasrec:
    """Train the SASRec that `evaluate.scorers` calls `name` on the training events of `dataset`.

    `epochs`: how many, where validation has told it before, as of another seed. `device`: where it is trained and
    scores.
    """
    loss = LOSS_OF[name]
    training = config.training if loss is None else dataclasses.replace(config.training, loss=loss)
    trainer, counts = _begin(dataset, dataset.training_histories(), config, training, device)
    figures = {} if epochs is None else {"epoch": float(epochs)}
    if epochs is None:
        validation = sample_users(dataset.held_out("valid"), training.max_validation_users, config.seed)
        figures = trainer.fit(validation, on_row)
    if config.refit:
        histories = dataset.training_histories(with_validation=True)
        trainer, counts = _begin(dataset, histories, config, training, device)
    if config.refit or epochs is not None:
        while trainer.epoch < figures["epoch"]:
            trainer.train_epoch(on_row)
        trainer.mean.keep()
    return Sasrec(name, trainer, counts, figures)


def _begin(
    dataset: Dataset, histories: Sequence[np.ndarray], config: SasrecConfig, training: SequenceConfig, device: str
) -> tuple[CompactTrainer, np.ndarray]:
    """An untrained SASRec with a vector for each item of the histories, and their counts (N,)."""
    counts = np.zeros(len(dataset.items), np.int64)
    for block in Histories.of(histories).blocks():
        counts += np.bincount(block.flat(), minlength=len(counts))
    warm = np.flatnonzero(counts > 0)
    id_rows = np.full(len(dataset.items), -1)
    id_rows[warm] = np.arange(len(warm))
    with seeded(config.seed):
        tower = CompactTower(config.width, config.tower, None, len(warm), unit=False).to(device)
    return CompactTrainer(tower, histories, counts, None, id_rows, training, seed=config.seed), counts
