"""The compact user tower under Ray Train, on top of a model whose item tower is trained.

The workers compute the item vectors of the catalog once, between them, and then share every batch of histories.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import ray.train.torch
import safetensors.torch
import torch
from ray.train import Checkpoint

from pixrec.artifact import Model, load_model, save_model, with_compact
from pixrec.cluster.workers import NewsLog, OnRow, run_workers
from pixrec.config import Config, dump_config, load_config
from pixrec.data.sequences import Dataset, load_dataset, sample_users
from pixrec.model.catalog import Catalog
from pixrec.sequential import EarlyStopping, SequenceTrainer
from pixrec.validation import item_table

_STATE, _OPTIMIZER = "state.json", "optimizer.safetensors"


def fit_compact(model: str, data: str, work: str, config: Config, on_row: OnRow) -> str:
    """Train the compact tower of the model at `model`; returns the URI of the best checkpoint, a whole model."""
    job = {"model": model, "data": data, "config": dump_config(config)}
    return run_workers(_worker, job, work, config.train, on_row)


def _worker(job: dict[str, Any]) -> None:
    config = load_config(job["config"])
    torch.set_num_threads(config.train.threads_per_worker)
    device = str(ray.train.torch.get_device())
    dataset = load_dataset(job["data"])
    trainer, model, watch = _begin(job["model"], dataset, config, device, ray.train.get_checkpoint())
    held_out = sample_users(dataset.held_out("valid"), config.train.compact.max_validation_users, config.train.seed)
    log = NewsLog(job["mailbox"], {})
    while trainer.epoch < config.train.compact.epochs and not watch.over:
        trainer.train_epoch(log.add)
        if trainer.epoch % config.train.compact.validate_every_epochs and trainer.epoch < config.train.compact.epochs:
            continue
        figures = trainer.validate(held_out) if len(held_out.targets) else {}
        log.add({"step": trainer.step, "epoch": trainer.epoch, **figures}, now=True)
        score = figures.get("valid_ndcg@10", float(trainer.epoch))
        watch.is_best(score, figures)
        with tempfile.TemporaryDirectory(prefix="pixrec-") as folder:
            saved = None
            if ray.train.get_context().get_world_rank() == 0:
                facts = {"step": trainer.step, "epoch": trainer.epoch, **figures}
                save_model(folder, dataclasses.replace(model, config=config), facts)
                _save_state(trainer, watch, Path(folder))
                saved = Checkpoint.from_directory(folder)
            ray.train.report({"score": score, "epoch": trainer.epoch}, checkpoint=saved)


def _begin(
    model_uri: str, dataset: Dataset, config: Config, device: str, checkpoint: Checkpoint | None
) -> tuple[SequenceTrainer, Model, EarlyStopping]:
    """The trainer as it stands: fresh on top of the model's item tower, or as `checkpoint` left it."""
    base = load_model(model_uri, device)
    content = torch.from_numpy(item_table(base.tower, Catalog(dataset.items, base.encoder), config))
    counts = dataset.training_counts()
    trained = [dataset.items.item_ids[row] for row in np.flatnonzero(counts > 0)]
    model = with_compact(base, trained)
    assert model.tower.compact is not None
    row_of = {item_id: row for row, item_id in enumerate(model.identities)}
    identity = np.array([row_of.get(item_id, -1) for item_id in dataset.items.item_ids])
    trainer = SequenceTrainer(
        model.tower.compact,
        dataset.training_histories(),
        counts,
        content,
        identity,
        config.train.compact,
        config.model.compact.identity_dropout,
        config.train.seed,
    )
    watch = EarlyStopping(config.train.compact.patience)
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            _restore(trainer, watch, folder, device)
    return trainer, model, watch


def _save_state(trainer: SequenceTrainer, watch: EarlyStopping, folder: Path) -> None:
    safetensors.torch.save_file(trainer.optimizer_tensors(), folder / _OPTIMIZER)
    state = {"epoch": trainer.epoch, "step": trainer.step, "best": watch.best, "since": watch.since}
    (folder / _STATE).write_text(json.dumps(state))


def _restore(trainer: SequenceTrainer, watch: EarlyStopping, folder: str, device: str) -> None:
    compact = load_model(folder, device).tower.compact
    assert compact is not None
    trainer.tower.load_state_dict(compact.state_dict())
    state = json.loads((Path(folder) / _STATE).read_text())
    watch.best, watch.since = state["best"], state["since"]
    tensors = safetensors.torch.load_file(Path(folder) / _OPTIMIZER, device)
    trainer.restore(state["epoch"], state["step"], tensors)
