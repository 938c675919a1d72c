"""What each phase of a training starts from: the trainer of the interleaved towers, of the compact tower on their item
vectors, and of both together. Knows data sets and models; knows no Ray, no checkpoints and no order of phases.

Shapes: N items of the catalog.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from pixrec.artifact import Model, with_compact
from pixrec.config import Config
from pixrec.data.joined import TrainingData
from pixrec.data.sequences import Dataset
from pixrec.model.catalog import Catalog
from pixrec.training.compact import CompactTrainer
from pixrec.training.interleaved import BatchSource, Collator, InterleavedTrainer
from pixrec.training.joint import JointTrainer
from pixrec.training.validation import item_table


def interleaved_trainer(model: Model, catalog: Catalog, data: TrainingData, config: Config) -> InterleavedTrainer:
    """The trainer of the towers of `model` on the training events of `data`, whose items are those of `catalog`."""
    source = BatchSource(data.histories, config.model.max_history_items, config.train)
    collator = Collator(catalog, data.counts, config, source.examples_per_step)
    return InterleavedTrainer(model.tower, source, collator, config)


def compact_trainer(base: Model, catalog: Catalog, dataset: Dataset, config: Config) -> tuple[CompactTrainer, Model]:
    """A fresh compact tower on the item vectors of `base`, which stand still, and the model that it belongs to; its
    projection of content begins as their whitening.

    The workers, where torch.distributed is initialised, compute the vectors between them.
    """
    content = torch.from_numpy(item_table(base.tower, catalog, config))
    counts = dataset.training_counts()
    trained = [dataset.items.item_ids[row] for row in np.flatnonzero(counts > 0)]
    model = with_compact(base, trained)
    assert model.tower.compact is not None
    model.tower.compact.whiten(content.to(model.tower.log_temperature.device))
    trainer = CompactTrainer(
        model.tower.compact,
        dataset.training_histories(),
        counts,
        content,
        id_rows_of(model, dataset),
        config.train.compact,
        config.model.compact.id_dropout,
        config.train.seed,
        _timestamps(dataset, config),
    )
    return trainer, model


def joint_trainer(model: Model, catalog: Catalog, dataset: Dataset, config: Config) -> JointTrainer:
    """The trainer of both towers of a `model` whose compact tower is trained."""
    return JointTrainer(
        model.tower,
        catalog,
        dataset.training_histories(),
        dataset.training_counts(),
        id_rows_of(model, dataset),
        config,
        _timestamps(dataset, config),
    )


def id_rows_of(model: Model, dataset: Dataset) -> np.ndarray:
    """(N,) for each item of the data set the row of its learned vector in the model, -1 where it has none."""
    row_of = {item_id: row for row, item_id in enumerate(model.embedded_ids)}
    return np.array([row_of.get(item_id, -1) for item_id in dataset.items.item_ids])


def _timestamps(dataset: Dataset, config: Config) -> Sequence[np.ndarray] | None:
    return None if config.model.compact.time == "none" else dataset.training_timestamps()
