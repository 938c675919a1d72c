"""How each phase of a training begins: the interleaved towers, the compact tower on their item vectors, and both
together. Knows data sets and models; knows no Ray and no order of phases.

Shapes: N items of the catalog.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pixrec.artifact import Model, load_heads, load_model, untrained_model, with_compact
from pixrec.config import Config
from pixrec.data.ids import IdIndex, only
from pixrec.data.joined import TrainingData, join_datasets
from pixrec.data.sequences import Dataset, HeldOut, load_dataset, sample_users
from pixrec.model.catalog import Catalog
from pixrec.model.encoders import DualEncoder, EncoderTower, Part
from pixrec.model.texts import find_texts
from pixrec.model.vision import find_tokens
from pixrec.training.checkpoint import holds_shards, restore
from pixrec.training.compact import CompactTrainer
from pixrec.training.content import content_table
from pixrec.training.interleaved import InterleavedTrainer
from pixrec.training.joint import JointTrainer
from pixrec.training.reading import Collator
from pixrec.training.stages import Phase
from pixrec.training.trainer import Trainer
from pixrec.training.validation import item_table
from pixrec.training.windows import ShiftedWindows

STATISTICS_ITEMS = 20_000
"""Items that the statistics of encoders' vectors are taken from."""


class Begun(NamedTuple):
    """A phase at its beginning, or where a checkpoint left it."""

    trainer: Trainer[Any]
    model: Model
    """what checkpoints are written from: the model under training"""
    held_out: HeldOut


def begin(
    phase: Phase,
    data: Sequence[str],
    config: Config,
    device: str,
    *,
    start: str | None = None,
    vocabulary: Sequence[str] = (),
    checkpoint: str | None = None,
) -> Begun:
    """Begin a phase on the data sets at `data` with the weights of the model at `start`, or go on from the local folder
    of a `checkpoint`. The compact and the joint phase take one data set, and a `start` except for the compact tower of
    encoders; without one, a model is untrained, and has read the data sets of `vocabulary`."""
    datasets = [load_dataset(uri) for uri in data]
    joined = join_datasets(datasets)
    source, origin = start, config.train.start
    if checkpoint is not None and phase != "compact" and not holds_shards(checkpoint):
        source = checkpoint
    model = untrained_model(config, vocabulary, device) if source is None else load_model(source, device)
    backbone, learning = model.tower.backbone, set[Part]()
    if phase == "joint" and isinstance(backbone, DualEncoder):
        learning = backbone.tune(config.model, config.train.seed)
    tokens = None if "image" in learning else find_tokens(data, config, backbone)
    catalog = Catalog(joined.items, model.encoder, tokens=tokens)
    if isinstance(model.tower, EncoderTower):
        model.tower.stored_texts = None if "text" in learning else find_texts(data, config, backbone)
    trainer: Trainer[Any]
    if phase == "interleaved":
        model.tower.compact = None  # of the model at `train.start`; its own phase goes on with it
        model = dataclasses.replace(model, embedded_ids=IdIndex.of(pa.array([], pa.large_string())))
        trainer = interleaved_trainer(model, catalog, joined, config)
    elif phase == "compact":
        before = None if origin is None else model if source == origin else load_model(origin, device)
        trainer, model = compact_trainer(model, catalog, datasets[0], config, before)
        if checkpoint is not None:  # the item tower stands still
            load_heads(model, checkpoint)
    else:
        trainer = joint_trainer(model, catalog, datasets[0], config)
    if checkpoint is not None:
        restore(trainer, model, checkpoint)
    users = (config.train if phase == "interleaved" else config.train.compact).max_validation_users
    held_out = sample_users(joined.valid, users, config.train.seed)
    return Begun(trainer, dataclasses.replace(model, config=config), held_out)


def interleaved_trainer(model: Model, catalog: Catalog, data: TrainingData, config: Config) -> InterleavedTrainer:
    """The trainer of the towers of `model` on the training events of `data`, whose items are those of `catalog`."""
    source = ShiftedWindows(data.histories, config.model.max_history_items, config.train)
    collator = Collator(catalog, data.counts, config, source.examples_per_step)
    return InterleavedTrainer(model.tower, source, collator, config)


def compact_trainer(
    base: Model, catalog: Catalog, dataset: Dataset, config: Config, before: Model | None = None
) -> tuple[CompactTrainer, Model]:
    """A compact tower on the item vectors of `base`, which stand still, and the model that it belongs to. It goes on
    from that of the model `before`; without one it is fresh, and its projection of content begins as their whitening,
    which encoders have of their own.

    The workers, where torch.distributed is initialised, compute the vectors between them.
    """
    trained = None if before is None else before.tower.compact
    base.tower.compact = None  # content is what the item tower alone makes of an item
    content = _content(base, catalog, config)
    counts = dataset.training_counts()
    known = only(dataset.items.item_ids, np.flatnonzero(counts > 0))
    model = with_compact(base, known)
    assert model.tower.compact is not None
    if before is not None and trained is not None:
        rows = before.embedded_ids.rows_of(pa.array(known, pa.large_string()))
        model.tower.compact.continue_from(trained, torch.from_numpy(rows.astype(np.int64)))
    elif isinstance(base.tower, EncoderTower):
        model.tower.compact.scale_content()
    else:
        model.tower.compact.whiten(content)
    trainer = CompactTrainer(
        model.tower.compact,
        content=content if content.shape[1] else None,
        config=config.train.compact,
        id_dropout=config.model.compact.id_dropout,
        id_dropout_events=config.model.compact.id_dropout_events,
        seed=config.train.seed,
        item_ids=dataset.items.item_ids,
        **_learned_from(model, dataset, config),
    )
    trainer.validates_first = trained is not None
    return trainer, model


def _content(base: Model, catalog: Catalog, config: Config) -> Tensor:
    """What the compact tower learns on, (N, C). Encoders that have seen no catalog take its statistics first, of a
    sample where it is large."""
    total = len(catalog)
    if not config.model.content_width:
        return torch.zeros(total, 0)
    if isinstance(base.tower, EncoderTower) and not base.tower.fitted:
        rows = np.arange(total)
        if total > STATISTICS_ITEMS:
            rows = np.sort(np.random.default_rng(config.train.seed).choice(total, STATISTICS_ITEMS, replace=False))
        raw = torch.from_numpy(item_table(base.tower, catalog, config, rows=rows))
        standardised = base.tower.fit(raw.to(base.tower.log_temperature.device))
        if len(rows) == total:
            return standardised.cpu()
    return content_table(base, catalog, config, config.model.content_width)


def joint_trainer(model: Model, catalog: Catalog, dataset: Dataset, config: Config) -> JointTrainer:
    """The trainer of both towers of a `model` whose compact tower is trained."""
    return JointTrainer(model.tower, catalog, config=config, **_learned_from(model, dataset, config))


def _learned_from(model: Model, dataset: Dataset, config: Config) -> dict[str, Any]:
    return {
        "histories": dataset.training_histories(),
        "counts": dataset.training_counts(),
        "id_rows": id_rows_of(model, dataset),
        "timestamps": None if config.model.compact.time == "none" else dataset.training_timestamps(),
    }


def id_rows_of(model: Model, dataset: Dataset) -> np.ndarray:
    """(N,) for each item of the data set the row of its learned vector in the model, -1 where it has none."""
    return model.embedded_ids.rows_of(pa.array(dataset.items.item_ids, pa.large_string())).astype(np.int64)
