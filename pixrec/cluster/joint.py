"""Both towers together under Ray Train, on top of a model whose compact tower is trained."""

from __future__ import annotations

from typing import Any

import ray.train
import ray.train.torch
import torch
from ray.train import Checkpoint

from pixrec.artifact import Model, load_model
from pixrec.cluster.compact import report_validations, restored
from pixrec.cluster.workers import OnRow, run_workers
from pixrec.config import Config, dump_config, load_config
from pixrec.data.sequences import Dataset, load_dataset
from pixrec.errors import ConfigError
from pixrec.model.catalog import Catalog
from pixrec.model.vision import find_tokens
from pixrec.training.compact import EarlyStopping
from pixrec.training.joint import JointTrainer
from pixrec.training.phases import joint_trainer


def fit_joint(model: str, data: str, work: str, config: Config, on_row: OnRow) -> str:
    """Train both towers of the model at `model`; returns the URI of the best checkpoint, a whole model.

    The model as it came is one of those that may be best.
    """
    job = {"model": model, "data": data, "config": dump_config(config)}
    return run_workers(_worker, job, work, config.train, on_row)


def check_joint(config: Config) -> None:
    """Raise ConfigError where train.joint asks for what there is not."""
    if not config.train.joint.epochs:
        return
    if config.model.user_tower != "compact":
        raise ConfigError(
            f"train.joint.epochs {config.train.joint.epochs} needs the compact user tower; set model.user_tower to "
            "compact, or train.joint.epochs to 0"
        )
    if config.train.parallel == "fsdp2":
        raise ConfigError(
            "train.joint keeps whole towers on every worker, so not with train.parallel fsdp2; set it to ddp, or "
            "train.joint.epochs to 0"
        )


def _worker(job: dict[str, Any]) -> None:
    config = load_config(job["config"])
    torch.set_num_threads(config.train.threads_per_worker)
    dataset = load_dataset(job["data"])
    device = str(ray.train.torch.get_device())
    trainer, model, watch = _begin(job["model"], dataset, config, device, ray.train.get_checkpoint())
    report_validations(trainer, model, watch, dataset, config, job["mailbox"])


def _begin(
    model_uri: str, dataset: Dataset, config: Config, device: str, checkpoint: Checkpoint | None
) -> tuple[JointTrainer, Model, EarlyStopping]:
    """The trainer as it stands: fresh on both towers of the model, or as `checkpoint` left it."""
    model = load_model(model_uri, device)
    tokens = find_tokens(dataset.uri, config, model.tower.backbone)
    trainer = joint_trainer(model, Catalog(dataset.items, model.encoder, tokens=tokens), dataset, config)
    return trainer, model, restored(trainer, model, config.train.joint.patience, checkpoint, device)
