"""The compact user tower under Ray Train, on top of a model whose item tower is trained.

The workers compute the item vectors of the catalog once, between them, and then share every batch of histories.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import safetensors.torch
import torch
from ray.train import Checkpoint

from pixrec.artifact import Model, load_model, save_model
from pixrec.cluster.workers import NewsLog, OnRow, run_workers
from pixrec.config import Config, dump_config, load_config
from pixrec.data.sequences import Dataset, load_dataset, sample_users
from pixrec.model.catalog import Catalog
from pixrec.model.vision import find_tokens
from pixrec.training.compact import CompactTrainer, EarlyStopping
from pixrec.training.phases import compact_trainer

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
    report_validations(trainer, model, watch, dataset, config, job["mailbox"])


def report_validations(
    trainer: CompactTrainer, model: Model, watch: EarlyStopping, dataset: Dataset, config: Config, mailbox: Any
) -> None:
    """Train to the end; every validation goes to the log and, with a checkpoint, to Ray."""
    held_out = sample_users(dataset.held_out("valid"), config.train.compact.max_validation_users, config.train.seed)
    log = NewsLog(mailbox, {})
    for figures in trainer.validations(held_out, watch, log.add):
        at = {"step": trainer.step, "epoch": trainer.epoch}
        log.add({**figures, **at}, now=True)
        score = figures.get("valid_ndcg@10", float(trainer.epoch))
        with tempfile.TemporaryDirectory(prefix="pixrec-") as folder:
            saved = None
            if ray.train.get_context().get_world_rank() == 0:
                save_model(folder, dataclasses.replace(model, config=config), {**at, "metrics": figures})
                _save_state(trainer, watch, Path(folder))
                saved = Checkpoint.from_directory(folder)
            ray.train.report({"score": score, "epoch": trainer.epoch}, checkpoint=saved)


def _begin(
    model_uri: str, dataset: Dataset, config: Config, device: str, checkpoint: Checkpoint | None
) -> tuple[CompactTrainer, Model, EarlyStopping]:
    """The trainer as it stands: fresh on top of the model's item tower, or as `checkpoint` left it."""
    base = load_model(model_uri, device)
    tokens = find_tokens(dataset.uri, config, base.tower.backbone)
    trainer, model = compact_trainer(base, Catalog(dataset.items, base.encoder, tokens=tokens), dataset, config)
    return trainer, model, restored(trainer, model, config.train.compact.patience, checkpoint, device)


def restored(
    trainer: CompactTrainer, model: Model, patience: int, checkpoint: Checkpoint | None, device: str
) -> EarlyStopping:
    """Bring trainer and model to where `checkpoint`, if any, left them; returns what watches the validations."""
    watch = EarlyStopping(patience)
    if checkpoint is None:
        return watch
    with checkpoint.as_directory() as folder:
        model.tower.load_state_dict(load_model(folder, device).tower.state_dict())
        state = json.loads((Path(folder) / _STATE).read_text())
        watch.best, watch.since = state["best"], state["since"]
        trainer.restore(state["epoch"], state["step"], safetensors.torch.load_file(Path(folder) / _OPTIMIZER, device))
    return watch


def _save_state(trainer: CompactTrainer, watch: EarlyStopping, folder: Path) -> None:
    safetensors.torch.save_file(trainer.training_tensors(), folder / _OPTIMIZER)
    state = {"epoch": trainer.epoch, "step": trainer.step, "best": watch.best, "since": watch.since}
    (folder / _STATE).write_text(json.dumps(state))
