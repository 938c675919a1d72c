"""Fine-tuning under Ray Train: the plain InterleavedTrainer in N workers, checkpoints, resuming, the published model.

A run keeps its checkpoints in a hidden folder beside --out, one part for the model and one for each knockout, in it a
folder for each stage of `train.stages`.
It is removed once the model is published whole; until then --resume continues from it.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import ray.train.torch
import safetensors.torch
import torch
from ray.train import Checkpoint, CheckpointConsistencyMode, CheckpointUploadMode

from pixrec import storage
from pixrec.artifact import MODEL_MARKER, Model, knockout_uri, load_model, save_model, untrained_model
from pixrec.cluster.compact import fit_compact
from pixrec.cluster.joint import check_joint, fit_joint
from pixrec.cluster.vision import vision_once
from pixrec.cluster.workers import NewsLog, OnRow, end_diverged, run_workers
from pixrec.config import Config, Modalities, dump_config, load_config
from pixrec.data.joined import join_datasets
from pixrec.data.sequences import Dataset, load_dataset, sample_users
from pixrec.errors import ArtifactError, ConfigError, InputError
from pixrec.model.catalog import Catalog
from pixrec.model.vision import find_tokens
from pixrec.training.interleaved import DivergedError, InterleavedTrainer
from pixrec.training.phases import interleaved_trainer
from pixrec.training.stages import check_stages, plan, stage_facts, vocabulary
from pixrec.training.tracking import TrainingLog

_CONFIG, _DATA = "config.yaml", "data.json"
_OPTIMIZER, _STATE = "optimizer.safetensors", "state.json"


def train(data: str, out: str, config: Config, *, resume: bool, on_row: OnRow) -> dict[str, Any]:
    """Train the model and its knockouts through all stages and publish them at `out`; returns model.json.

    `on_row` gets every logged row: `part` (both, text, image; in a stage with its name behind, as in both_joint),
    `step`, `total_steps`, losses or validation figures.
    """
    dataset = load_dataset(data)
    work = _work_folder(out)
    if resume:
        _check_resumable(out, dataset, config)
    else:
        storage.remove(work)
        storage.write_json(storage.join(work, _DATA), _data_facts(dataset, config))
        storage.write_bytes(storage.join(work, _CONFIG), dump_config(config).encode())

    parts: list[Modalities] = [config.model.modalities, *config.train.knockouts]
    with (
        contextlib.closing(TrainingLog(work, config.train.trackers, storage.name(out))) as log,
        storage.staged_folder(out, MODEL_MARKER, "model") as staging,
    ):

        def log_row(row: dict[str, Any]) -> None:
            log.add(row)
            on_row(row)

        for part in reversed(parts):  # the model itself last, so that its marker completes the folder
            part_config = dataclasses.replace(config, model=dataclasses.replace(config.model, modalities=part))
            best = _fit(part, storage.absolute(data), storage.join(work, part), part_config, log_row)
            _publish(best, staging if part == parts[0] else knockout_uri(staging, part), dataset, config)
        log.save(staging)
        info = storage.read_json(storage.join(staging, MODEL_MARKER))
    storage.remove(work)
    return info


def check_ready(data: str, out: str, config: Config, resume: bool) -> None:
    """Raise before Ray starts when --out cannot be written, when there is nothing to resume, or when the data set or
    one of the stages' offers the towers nothing to learn from, is none, or gives away what is held out."""
    check_joint(config)
    storage.check_writable(out, MODEL_MARKER, "model")
    dataset = load_dataset(data)
    if resume:
        _check_resumable(out, dataset, config)
    wanted = config.model.modalities
    if config.train.knockouts and wanted != "both":
        raise ConfigError(f"train.knockouts needs model.modalities both, not {wanted}; set train.knockouts to []")
    if config.model.user_tower == "compact" and config.model.compact.time != "none":
        dataset.training_timestamps()  # raises where they tell no time
    check_stages(plan(data, config), dataset)


def _work_folder(out: str) -> str:
    return storage.join(storage.parent(out), f".{storage.name(out)}.training")


def _data_facts(dataset: Dataset, config: Config) -> dict[str, Any]:
    facts = {"uri": storage.absolute(dataset.uri), "fingerprint": dataset.info.get("fingerprint")}
    return {**facts, "stages": stage_facts(plan(dataset.uri, config))}


def _check_resumable(out: str, dataset: Dataset, config: Config) -> None:
    work = _work_folder(out)
    settings = storage.join(work, _CONFIG)
    if not storage.exists(settings):
        raise ArtifactError(f"--resume: no unfinished run of {out} lies at {work}; start without --resume")
    if storage.read_text(settings) != dump_config(config):
        raise ConfigError(f"--resume: the configuration differs from the unfinished run's {settings}; use that one")
    begun_on, found = storage.read_json(storage.join(work, _DATA)), _data_facts(dataset, config)
    if begun_on["fingerprint"] != found["fingerprint"]:
        raise InputError(f"--resume: {found['uri']} is not the data set {begun_on['uri']} of the unfinished run")
    for before, now in zip(begun_on.get("stages", []), found["stages"], strict=True):
        if before["data_fingerprints"] != now["data_fingerprints"]:
            raise InputError(
                f"--resume: the data sets of train.stages {now['name']} are not those of the unfinished run"
            )


def _fit(part: str, data: str, work: str, config: Config, on_row: OnRow) -> str:
    """Train one model: the interleaved towers, stage by stage, then, if so set, the compact user tower on their item
    vectors of `data`, and then that and the item tower together."""
    stages, start = plan(data, config), None
    texts = vocabulary(stages)
    for stage in stages:
        for uri in stage.data:
            vision_once(uri, stage.config, texts)
        job = {"data": stage.data, "vocabulary": texts, "start": start, "config": dump_config(stage.config)}
        log_row = functools.partial(_log_part, on_row, stage.part(part))
        start = best = run_workers(_worker, job, stage.folder(work), stage.config.train, log_row)
    if config.model.user_tower == "compact":
        best = fit_compact(
            best, data, storage.join(work, "compact"), config, functools.partial(_log_part, on_row, f"{part}_compact")
        )
    if config.train.joint.epochs:
        log_row = functools.partial(_log_part, on_row, f"{part}_compact_joint")
        best = fit_joint(best, data, storage.join(work, "joint"), config, log_row)
    return best


def _log_part(on_row: OnRow, part: str, row: dict[str, Any]) -> None:
    on_row({"part": part, **row})


def _worker(job: dict[str, Any]) -> None:
    """What every training process runs: the InterleavedTrainer, its log, and a checkpoint after each validation."""
    config = load_config(job["config"])
    torch.set_num_threads(config.train.threads_per_worker)
    data = join_datasets([load_dataset(uri) for uri in job["data"]])
    model = untrained_model(config, job["vocabulary"], str(ray.train.torch.get_device()))
    begun = _restore(model, ray.train.get_checkpoint(), job["start"])
    tokens = find_tokens(job["data"], config, model.tower.backbone)
    catalog = Catalog(data.items, model.encoder, tokens=tokens)
    saved = _to_save(model, config)
    trainer = interleaved_trainer(model, catalog, data, config)
    trainer.restore(*begun)
    held_out = sample_users(data.valid, config.train.max_validation_users, config.train.seed)
    log = NewsLog(job["mailbox"], {"total_steps": trainer.total_steps})
    reported = False
    while trainer.step < trainer.total_steps:
        try:
            log.add(trainer.train_step())
        except DivergedError as error:  # on all workers at once; an exception would be retried, to the same end
            end_diverged(job["work"], trainer.rank, str(error), error.batch)
            return
        if trainer.step % config.train.validate_every_steps == 0 or trainer.step == trainer.total_steps:
            figures = trainer.validate(catalog, held_out)
            log.add({"step": trainer.step, **figures}, now=True)
            score = figures.get("valid_ndcg@10", float(trainer.step))
            checkpoint = _checkpoint(trainer, saved, figures)
            if reported:  # at most one upload at a time: a worker that dies loses no more than an interval and it
                ray.train.get_all_reported_checkpoints(CheckpointConsistencyMode.COMMITTED)
            metrics = {"score": score, "step": trainer.step}
            ray.train.report(metrics, checkpoint=checkpoint, checkpoint_upload_mode=CheckpointUploadMode.ASYNC)
            reported = True


def _to_save(model: Model, config: Config) -> Model:
    """What checkpoints are written from: the model itself, or a whole copy of one that is about to be sharded."""
    sharded = config.train.parallel == "fsdp2" and ray.train.get_context().get_world_size() > 1
    tower = copy.deepcopy(model.tower).to("cpu") if sharded else model.tower
    return dataclasses.replace(model, tower=tower, config=config)


def _checkpoint(trainer: InterleavedTrainer, saved: Model, figures: dict[str, float]) -> Checkpoint | None:
    """Model, optimiser and position in a local folder, which Ray removes once it is uploaded; the first worker's."""
    optimizer = trainer.optimizer_tensors()
    if trainer.sharded:
        saved.tower.load_state_dict(trainer.whole_state())
    if trainer.rank != 0:
        return None
    folder = tempfile.mkdtemp(prefix="pixrec-")
    save_model(folder, saved, {"step": trainer.step, "metrics": figures})
    safetensors.torch.save_file(optimizer, Path(folder) / _OPTIMIZER)
    (Path(folder) / _STATE).write_text(json.dumps({"step": trainer.step}))
    return Checkpoint.from_directory(folder)


def _restore(
    model: Model, checkpoint: Checkpoint | None, start: str | None = None
) -> tuple[int, dict[str, torch.Tensor]]:
    """Bring a checkpoint's weights into `model`; returns its step and the optimiser's state.

    Without one the stage begins: at step 0, with the weights of the model at `start` where there is one.
    """
    device = str(model.tower.log_temperature.device)
    if checkpoint is None:
        if start is not None:
            model.tower.load_state_dict(load_model(start, device).tower.state_dict())
        return 0, {}
    with checkpoint.as_directory() as folder:
        model.tower.load_state_dict(load_model(folder, device).tower.state_dict())
        state = json.loads((Path(folder) / _STATE).read_text())
        return int(state["step"]), safetensors.torch.load_file(Path(folder) / _OPTIMIZER, device)


def _publish(checkpoint: str, target: str, dataset: Dataset, config: Config) -> None:
    """Copy a checkpoint's model to `target` without the optimiser, completing its model.json."""
    for file in storage.list_files(checkpoint):
        relative = file[len(checkpoint.rstrip("/")) + 1 :]
        if relative not in (_OPTIMIZER, _STATE, MODEL_MARKER):
            storage.write_bytes(storage.join(target, relative), storage.read_bytes(file))
    info = storage.read_json(storage.join(checkpoint, MODEL_MARKER))
    facts = {
        "data": storage.absolute(dataset.uri),
        "data_fingerprint": dataset.info.get("fingerprint"),
        "trained_events": int(np.sum(dataset.training_counts())),
    }
    before = stage_facts(plan(dataset.uri, config))
    storage.write_json(storage.join(target, MODEL_MARKER), {**info, **facts, **({"stages": before} if before else {})})
