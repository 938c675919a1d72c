"""Fine-tuning under Ray Train: the phases of a training one after the other, each in N workers, and the published
model."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import ray.train.torch
import torch

from pixrec import storage
from pixrec.artifact import MODEL_MARKER, knockout_uri
from pixrec.cluster.feed import feed_by_ray_data, uses_ray_data
from pixrec.cluster.vision import frozen_once
from pixrec.cluster.workers import Checkpoints, NewsLog, OnRow, end_diverged, run_workers
from pixrec.config import Config, Modalities, dump_config, load_config
from pixrec.data.sequences import load_dataset
from pixrec.training.checkpoint import make_whole, publish, save_checkpoint
from pixrec.training.interleaved import InterleavedTrainer
from pixrec.training.phases import begin
from pixrec.training.stages import begin_work, check_resumable, model_facts, plan, vocabulary, work_folder
from pixrec.training.tracking import TrainingLog
from pixrec.training.trainer import DivergedError


def train(data: str, out: str, config: Config, *, resume: bool, on_row: OnRow) -> dict[str, Any]:
    """Train the model and its knockouts through all stages and publish them at `out`; returns model.json.

    `on_row` gets every logged row: `part` (both, text, image; in a stage with its name behind, as in both_joint),
    `step`, `total_steps`, losses or validation figures. Until the model is published, --resume goes on from what lies
    in the work folder: a folder for the model and for each knockout, in it one for each stage.
    """
    dataset, work = load_dataset(data), work_folder(out)
    (check_resumable if resume else begin_work)(out, dataset, config)
    parts: list[Modalities] = [config.model.modalities, *config.train.knockouts]
    with (
        contextlib.closing(TrainingLog(work, config.train.trackers, storage.name(out))) as log,
        storage.staged_folder(out, MODEL_MARKER, "model") as staging,
    ):

        def log_row(row: dict[str, Any]) -> None:
            log.add(row)
            on_row(row)

        for part in reversed(parts):  # the model itself last, so that its marker completes the folder
            start = config.train.start
            if start is not None and part != parts[0]:
                start = knockout_uri(start, part)
            part_config = dataclasses.replace(
                config,
                model=dataclasses.replace(config.model, modalities=part),
                train=dataclasses.replace(config.train, start=start),
            )
            best = _fit(part, storage.absolute(data), storage.join(work, part), part_config, log_row)
            publish(best, staging if part == parts[0] else knockout_uri(staging, part), model_facts(dataset, config))
        log.save(staging)
        info = storage.read_json(storage.join(staging, MODEL_MARKER))
    storage.remove(work)
    return info


def _fit(part: str, data: str, work: str, config: Config, on_row: OnRow) -> str:
    """Train one model, stage by stage; returns the URI of the best checkpoint of the last, a whole model."""
    stages, best = plan(data, config), config.train.start
    texts = vocabulary(stages)
    for stage in stages:
        if stage.phase == "interleaved" or best == config.train.start:
            for uri in stage.data:
                frozen_once(uri, stage.config, texts)

        def log_row(row: dict[str, Any], name: str = stage.part(part)) -> None:
            on_row({"part": name, **row})

        job: dict[str, Any] = {"phase": stage.phase, "data": stage.data, "start": best, "vocabulary": texts}
        job["config"] = dump_config(stage.config)
        best = run_workers(_worker, job, stage.folder(work), stage.config.train, log_row)
        make_whole(best)
    assert best is not None
    return best


def _worker(job: dict[str, Any]) -> None:
    """What every training process runs: a phase from its beginning or the last checkpoint, its log, and a checkpoint
    after each validation."""
    config = load_config(job["config"])
    torch.set_num_threads(config.train.threads_per_worker)
    checkpoints = Checkpoints(job["work"], config.train.num_workers)
    with checkpoints.latest() as folder:
        trainer, model, held_out = begin(
            job["phase"],
            job["data"],
            config,
            str(ray.train.torch.get_device()),
            start=job["start"],
            vocabulary=job["vocabulary"],
            checkpoint=folder,
        )
    if isinstance(trainer, InterleavedTrainer) and uses_ray_data(config.train):
        feed_by_ray_data(trainer, job["data"], config)
    log = NewsLog(job["mailbox"])
    try:
        for figures in trainer.validations(held_out, log.add):
            checkpoints.add(save_checkpoint(trainer, model, figures), trainer.score(figures), trainer.step)
    except DivergedError as error:  # on all workers at once; an exception would be retried, to the same end
        end_diverged(job["work"], trainer.rank, str(error), error.batch)
