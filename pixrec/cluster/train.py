"""Fine-tuning under Ray Train: the plain Trainer in N workers, checkpoints, resuming, the published model.

A run keeps its checkpoints in a hidden folder beside --out, one part for the model and one for each knockout.
It is removed once the model is published whole; until then --resume continues from it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
import ray.train.torch
import safetensors.torch
import torch
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig

from pixrec import storage
from pixrec.artifact import MODEL_MARKER, knockout_uri, load_model, new_model, save_model
from pixrec.cluster.progress import listening
from pixrec.config import Config, Modalities, dump_config, load_config
from pixrec.data.sequences import Dataset, load_dataset, sample_users
from pixrec.errors import ArtifactError, ConfigError, InputError
from pixrec.model.catalog import Catalog
from pixrec.tracking import TrainingLog
from pixrec.training import BatchSource, Collator, Trainer

_CONFIG, _DATA = "config.yaml", "data.json"
_OPTIMIZER, _STATE, _DONE = "optimizer.safetensors", "state.json", "done.json"
_MAIL_SECONDS = 1.0

OnRow = Callable[[dict[str, Any]], None]


def train(data: str, out: str, config: Config, *, resume: bool, on_row: OnRow) -> dict[str, Any]:
    """Train the model and its knockouts and publish them at `out`; returns model.json.

    `on_row` gets every logged row: `part` (both, text, image), `step`, `total_steps`, losses or validation figures.
    """
    dataset = load_dataset(data)
    work = _work_folder(out)
    if resume:
        _check_resumable(out, dataset, config)
    else:
        storage.remove(work)
        storage.write_json(storage.join(work, _DATA), _data_facts(dataset))
        storage.write_bytes(storage.join(work, _CONFIG), dump_config(config).encode())

    parts: list[Modalities] = [config.model.modalities, *config.train.knockouts]
    with (
        contextlib.closing(TrainingLog(work)) as log,
        storage.staged_folder(out, MODEL_MARKER, "model") as staging,
    ):

        def log_row(row: dict[str, Any]) -> None:
            log.add(row)
            on_row(row)

        for part in reversed(parts):  # the model itself last, so that its marker completes the folder
            part_config = dataclasses.replace(config, model=dataclasses.replace(config.model, modalities=part))
            best = _fit(part, storage.absolute(data), storage.join(work, part), part_config, log_row)
            _publish(best, staging if part == parts[0] else knockout_uri(staging, part), dataset)
        log.save(staging)
        info = storage.read_json(storage.join(staging, MODEL_MARKER))
    storage.remove(work)
    return info


def check_ready(data: str, out: str, config: Config, resume: bool) -> None:
    """Raise before Ray starts when --out cannot be written, when there is nothing to resume, or when the data set
    offers the towers nothing to learn from."""
    storage.check_writable(out, MODEL_MARKER, "model")
    dataset = load_dataset(data)
    if resume:
        _check_resumable(out, dataset, config)
    BatchSource(dataset.training_histories(), config.model.max_history_items, config.train)
    wanted = config.model.modalities
    if config.train.knockouts and wanted != "both":
        raise ConfigError(f"train.knockouts needs model.modalities both, not {wanted}; set train.knockouts to []")
    text = wanted != "image" and any(dataset.items.text(row) for row in range(len(dataset.items)))
    if not text and (wanted == "text" or not dataset.info["images"]["ok"]):
        raise InputError(
            f"{dataset.uri}: no item has {'a picture' if wanted == 'image' else 'a text or a picture'} for the towers "
            "to read; give pixrec prepare an items table"
        )


def _work_folder(out: str) -> str:
    return storage.join(storage.parent(out), f".{storage.name(out)}.training")


def _data_facts(dataset: Dataset) -> dict[str, Any]:
    return {"uri": storage.absolute(dataset.uri), "fingerprint": dataset.info.get("fingerprint")}


def _check_resumable(out: str, dataset: Dataset, config: Config) -> None:
    work = _work_folder(out)
    settings = storage.join(work, _CONFIG)
    if not storage.exists(settings):
        raise ArtifactError(f"--resume: no unfinished run of {out} lies at {work}; start without --resume")
    if storage.read_text(settings) != dump_config(config):
        raise ConfigError(f"--resume: the configuration differs from the unfinished run's {settings}; use that one")
    begun_on, found = storage.read_json(storage.join(work, _DATA)), _data_facts(dataset)
    if begun_on["fingerprint"] != found["fingerprint"]:
        raise InputError(f"--resume: {found['uri']} is not the data set {begun_on['uri']} of the unfinished run")


def _fit(part: str, data: str, work: str, config: Config, on_row: OnRow) -> str:
    """Run the workers; returns the URI of the best checkpoint. A part that is done already is not run again."""
    done = storage.join(work, _DONE)
    if storage.exists(done):
        return str(storage.read_json(done)["best"])
    filesystem, path = storage.arrow_location(work)
    remote = storage.is_remote(work)
    settings = config.train
    with listening(lambda row: on_row({"part": part, **row})) as mailbox:
        trainer = ray.train.torch.TorchTrainer(
            _worker,
            train_loop_config={"data": data, "config": dump_config(config), "mailbox": mailbox},
            scaling_config=ScalingConfig(
                num_workers=settings.num_workers,
                use_gpu=settings.use_gpu,
                resources_per_worker={"CPU": settings.cpus_per_worker, **({"GPU": 1} if settings.use_gpu else {})},
            ),
            torch_config=ray.train.torch.TorchConfig(backend="nccl" if settings.use_gpu else "gloo"),
            run_config=RunConfig(
                name="run",
                storage_path=path,
                storage_filesystem=filesystem if remote else None,
                failure_config=FailureConfig(max_failures=settings.max_failures),
                checkpoint_config=CheckpointConfig(num_to_keep=1, checkpoint_score_attribute="score"),
            ),
        )
        result = trainer.fit()
    best = result.get_best_checkpoint("score", "max")
    if best is None:
        raise RuntimeError("training ended without a checkpoint")
    best_uri = f"s3://{best.path}" if remote else best.path
    storage.write_json(done, {"best": best_uri})
    return best_uri


def _worker(job: dict[str, Any]) -> None:
    """What every training process runs: the Trainer, its log, and a checkpoint after each validation."""
    config = load_config(job["config"])
    torch.set_num_threads(config.train.threads_per_worker)
    context = ray.train.get_context()
    device = ray.train.torch.get_device()
    dataset = load_dataset(job["data"])
    texts = [dataset.items.text(row) for row in range(len(dataset.items))]
    model = new_model(config, texts, str(device))
    catalog = Catalog(dataset.items, model.encoder)
    source = BatchSource(dataset.training_histories(), config.model.max_history_items, config.train)
    collator = Collator(catalog, dataset.training_counts(), config, source.examples_per_step)
    trainer = Trainer(model.tower, source, collator, config)
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            _restore(trainer, Path(folder))
    held_out = sample_users(dataset.held_out("valid"), config.train.max_validation_users, config.train.seed)
    log = _Log(job["mailbox"] if context.get_world_rank() == 0 else None, trainer.total_steps)
    while trainer.step < trainer.total_steps:
        log.add(trainer.train_step())
        if trainer.step % config.train.validate_every_steps == 0 or trainer.step == trainer.total_steps:
            figures = trainer.validate(catalog, held_out) if len(held_out.targets) else {}
            log.add({"step": trainer.step, **figures}, now=True)
            score = figures.get("valid_ndcg@10", float(trainer.step))
            with tempfile.TemporaryDirectory(prefix="pixrec-") as folder:
                saved = None
                if context.get_world_rank() == 0:
                    save_model(folder, dataclasses.replace(model, config=config), {"step": trainer.step, **figures})
                    _save_state(trainer, Path(folder))
                    saved = Checkpoint.from_directory(folder)
                ray.train.report({"score": score, "step": trainer.step}, checkpoint=saved)


class _Log:
    """Rows on their way to the driver, sent at most once a second; silent on all workers but the first."""

    def __init__(self, mailbox: Any, total_steps: int) -> None:
        self._mailbox, self._total_steps = mailbox, total_steps
        self._rows: list[dict[str, Any]] = []
        self._sent = self._last = time.monotonic()

    def add(self, row: dict[str, Any], now: bool = False) -> None:
        moment = time.monotonic()
        self._rows.append({**row, "total_steps": self._total_steps, "seconds": round(moment - self._last, 4)})
        self._last = moment
        if self._mailbox is not None and (now or moment - self._sent >= _MAIL_SECONDS):
            arrived = self._mailbox.put.remote(self._rows)
            self._rows, self._sent = [], moment
            if now:
                ray.get(arrived)  # the worker may end before the driver takes the rows, not before they are there


def _save_state(trainer: Trainer, folder: Path) -> None:
    safetensors.torch.save_file(trainer.optimizer_tensors(), folder / _OPTIMIZER)
    (folder / _STATE).write_text(json.dumps({"step": trainer.step}))


def _restore(trainer: Trainer, folder: Path) -> None:
    trainer.tower.load_state_dict(load_model(str(folder), str(trainer.device)).tower.state_dict())
    state = json.loads((folder / _STATE).read_text())
    trainer.restore(int(state["step"]), safetensors.torch.load_file(folder / _OPTIMIZER, str(trainer.device)))


def _publish(checkpoint: str, target: str, dataset: Dataset) -> None:
    """Copy a checkpoint's model to `target` without the optimiser, completing its model.json."""
    for file in storage.list_files(checkpoint):
        relative = file[len(checkpoint.rstrip("/")) + 1 :]
        if relative not in (_OPTIMIZER, _STATE, MODEL_MARKER):
            storage.write_bytes(storage.join(target, relative), storage.read_bytes(file))
    info = storage.read_json(storage.join(checkpoint, MODEL_MARKER))
    facts = {
        "data_fingerprint": dataset.info.get("fingerprint"),
        "trained_events": int(np.sum(dataset.training_counts())),
    }
    storage.write_json(storage.join(target, MODEL_MARKER), {**info, **facts})
