"""The stages of a training run in their order, whether their data sets fit, and whether an unfinished run goes on.

A run keeps its checkpoints in a hidden folder beside --out, one part for the model and one for each knockout. It is
removed once the model is published whole; until then --resume continues from it. Knows no Ray.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any, Literal, NamedTuple

import numpy as np

from pixrec import storage
from pixrec.artifact import MODEL_MARKER, knockout_uri, untrained_model
from pixrec.config import Config, TrainConfig, dump_config, load_config, to_dict
from pixrec.data.joined import TrainingData, count_leaks, join_datasets
from pixrec.data.sequences import DATASET_MARKER, Dataset, load_dataset
from pixrec.errors import ArtifactError, ConfigError, InputError
from pixrec.model.encoders import DualEncoder
from pixrec.training.windows import ShiftedWindows

Phase = Literal["interleaved", "compact", "joint"]

_CONFIG, _DATA = "config.yaml", "data.json"
_MACHINERY = (
    "max_workers",
    "cpus_per_worker",
    "threads_per_worker",
    "use_gpu",
    "feed",
    "cpus_per_reader",
    "readers_per_worker",
    "max_failures",
    "trackers",
)
"""Settings of `train` that change nothing of what is learned."""


class Stage(NamedTuple):
    """What is trained on, and how."""

    name: str
    """what the log and the errors call it; empty for the training of the interleaved towers on --data"""
    phase: Phase
    data: list[str]
    """absolute URIs of its data sets"""
    config: Config
    """the run's, with the stage's own rates and weights"""
    place: str = ""
    """where below the part's folder its checkpoints lie"""

    def part(self, part: str) -> str:
        """What the log calls the stage of a `part` (both, text, image)."""
        return f"{part}_{self.name}" if self.name else part

    def folder(self, work: str) -> str:
        """Where its checkpoints lie, given the part's folder."""
        return storage.join(work, self.place) if self.place else work


def plan(data: str, config: Config) -> list[Stage]:
    """All stages in their order: those of `train.stages`, the training on `data`, and what is set of the compact tower
    on its item vectors and of both towers together."""
    target = [storage.absolute(data)]
    if not config.model.content_width and (config.train.stages or config.train.joint.epochs):
        raise ConfigError(
            "model.backbone none leaves no item tower: train.stages and train.joint have nothing to train; leave them "
            "out"
        )
    if not config.model.trains_backbone and config.train.stages:
        raise ConfigError(
            "train.stages trains a model.backbone, and model.text_encoder is tuned by train.joint alone; leave "
            "train.stages out"
        )
    stages = [
        Stage(
            stage.name,
            "interleaved",
            [storage.absolute(uri) for uri in stage.data] or target,
            dataclasses.replace(config, train=config.train.of_stage(stage)),
            f"stages/{stage.name}",
        )
        for stage in config.train.stages
    ]
    if config.model.trains_backbone:
        stages.append(Stage("", "interleaved", target, config))
    if config.model.user_tower == "compact":
        stages.append(Stage("compact", "compact", target, config, "compact"))
    if config.train.joint.epochs:
        stages.append(Stage("compact_joint", "joint", target, config, "joint"))
    return stages


def vocabulary(stages: list[Stage]) -> list[str]:
    """The data sets of all stages, each once, --data first: one tokenizer serves them all."""
    return list(dict.fromkeys(uri for stage in reversed(stages) for uri in stage.data))


def stage_facts(stages: list[Stage]) -> list[dict[str, Any]]:
    """`name` of every stage before the training on --data, and `data` and `data_fingerprints` of its sets."""
    return [
        {"name": s.name, "data": s.data, "data_fingerprints": [_fingerprint(uri) for uri in s.data]}
        for s in stages
        if s.name and s.phase == "interleaved"
    ]


def check_ready(data: str, out: str, config: Config, resume: bool) -> None:
    """Raise before Ray starts when --out cannot be written, when there is nothing to resume, or when the data set or
    one of the stages' offers the towers nothing to learn from, is none, or gives away what is held out."""
    check_joint(config)
    check_start(config)
    storage.check_writable(out, MODEL_MARKER, "model")
    dataset = load_dataset(data)
    if resume:
        check_resumable(out, dataset, config)
    wanted = config.model.modalities
    if config.train.knockouts and wanted != "both":
        raise ConfigError(f"train.knockouts needs model.modalities both, not {wanted}; set train.knockouts to []")
    if config.model.user_tower == "compact" and config.model.compact.time != "none":
        dataset.training_timestamps()  # raises where they tell no time
    check_stages(plan(data, config), dataset)


def check_start(config: Config) -> None:
    """Raise where `train.start` names no model whose weights this one could begin with."""
    start = config.train.start
    if start is None:
        return
    parts = [start, *(knockout_uri(start, part) for part in config.train.knockouts)]
    if lacking := [uri for uri in parts if not storage.exists(storage.join(uri, MODEL_MARKER))]:
        raise ArtifactError(f"train.start: {lacking[0]} holds no complete model; name another, or leave it out")
    before = to_dict(load_config(storage.read_text(storage.join(start, _CONFIG))).model)
    if other := [f"model.{name}" for name, value in to_dict(config.model).items() if before.get(name) != value]:
        raise ConfigError(
            f"train.start: {start} was trained with another {', '.join(other)}; set it alike, or leave train.start out"
        )


def check_joint(config: Config) -> None:
    """Raise ConfigError where train.joint asks for what there is not. Encoders that it tunes are loaded for that."""
    encoders = config.model.text_encoder is not None
    if not config.train.joint.epochs:
        if encoders and config.model.lora.enabled and config.train.start is None:
            raise ConfigError(
                "model.lora with model.text_encoder is trained by train.joint; set train.joint.epochs, or leave "
                "model.lora out"
            )
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
    if encoders and config.train.activation_checkpointing:
        raise ConfigError(
            "train.activation_checkpointing does not reach model.text_encoder, which is in evaluation mode; lower "
            "train.joint.micro_batch_items, and leave it out"
        )
    for part in (config.model.modalities, *config.train.knockouts) if encoders else ():
        settings = dataclasses.replace(config.model, modalities=part)
        backbone = untrained_model(dataclasses.replace(config, model=settings), []).tower.backbone
        assert isinstance(backbone, DualEncoder)
        backbone.tune(settings, config.train.seed)  # raises where nothing is left to learn


def work_folder(out: str) -> str:
    """Where an unfinished run of `out` keeps its checkpoints and its log: hidden, beside it."""
    return storage.join(storage.parent(out), f".{storage.name(out)}.training")


def begin_work(out: str, dataset: Dataset, config: Config) -> None:
    """Empty the work folder, and note what `check_resumable` compares."""
    work = work_folder(out)
    storage.remove(work)
    storage.write_json(storage.join(work, _DATA), _data_facts(dataset, config))
    storage.write_bytes(storage.join(work, _CONFIG), dump_config(config).encode())


def check_resumable(out: str, dataset: Dataset, config: Config) -> None:
    """Raise where no run lies in the work folder, or one of other settings or data sets."""
    work = work_folder(out)
    settings = storage.join(work, _CONFIG)
    if not storage.exists(settings):
        raise ArtifactError(f"--resume: no unfinished run of {out} lies at {work}; start without --resume")
    if _compared(load_config(storage.read_text(settings))) != _compared(config):
        raise ConfigError(f"--resume: the configuration differs from the unfinished run's {settings}; use that one")
    begun_on, found = storage.read_json(storage.join(work, _DATA)), _data_facts(dataset, config)
    if begun_on["fingerprint"] != found["fingerprint"]:
        raise InputError(f"--resume: {found['uri']} is not the data set {begun_on['uri']} of the unfinished run")
    for before, now in zip(begun_on.get("stages", []), found["stages"], strict=True):
        if before["data_fingerprints"] != now["data_fingerprints"]:
            raise InputError(
                f"--resume: the data sets of train.stages {now['name']} are not those of the unfinished run"
            )


def _compared(config: Config) -> Config:
    """The settings that an unfinished run must go on with: all but those that say on what it runs. The batches, and so
    the losses, are the same on any number of workers, unless each has negatives of its own."""
    usual, train = TrainConfig(), config.train
    same: dict[str, Any] = {name: getattr(usual, name) for name in _MACHINERY}
    if train.negatives == "global":
        same["num_workers"] = 1
    return dataclasses.replace(config, train=dataclasses.replace(train, **same))


def has_begun(out: str) -> bool:
    """Whether an unfinished run of `out` lies in its work folder."""
    return storage.exists(storage.join(work_folder(out), _CONFIG))


def training_key(dataset: Dataset, config: Config) -> str:
    """Hash of the data and of the settings that a training learns from: runs of one key train the same model."""
    facts = _data_facts(dataset, config)
    stages = [stage["data_fingerprints"] for stage in facts["stages"]]
    learned = [facts["fingerprint"], stages, to_dict(_compared(config))]
    return hashlib.blake2b(json.dumps(learned).encode(), digest_size=8).hexdigest()


def _data_facts(dataset: Dataset, config: Config) -> dict[str, Any]:
    facts = {"uri": storage.absolute(dataset.uri), "fingerprint": dataset.info.get("fingerprint")}
    return {**facts, "stages": stage_facts(plan(dataset.uri, config))}


def model_facts(dataset: Dataset, config: Config) -> dict[str, Any]:
    """What model.json says of the data a model was trained on."""
    facts = _data_facts(dataset, config)
    counted = {"trained_events": int(np.sum(dataset.training_counts()))}
    before: dict[str, Any] = {"stages": facts["stages"]} if facts["stages"] else {}
    if config.train.start is not None:
        before["start"] = {
            "uri": config.train.start,
            "fingerprint": storage.read_json(storage.join(config.train.start, MODEL_MARKER))["fingerprint"],
        }
    return {"data": facts["uri"], "data_fingerprint": facts["fingerprint"], **counted, **before}


def check_stages(stages: list[Stage], target: Dataset) -> None:
    """Raise where a data set is no prepared one, where a stage has nothing to learn from, or where a set other than
    `target` has held-out events of it among its training events (see `count_leaks` for what is not found)."""
    for stage in stages:
        if stage.phase == "joint" or (stage.phase == "compact" and stage.config.model.trains_backbone):
            continue
        if not stage.name or stage.phase == "compact":
            check_learnable(target.uri, join_datasets([target]), stage.config)
            continue
        where = f"train.stages {stage.name}"
        _check_tokens_place(stage, target)
        try:
            datasets = [load_dataset(uri) for uri in stage.data]
            _check_alone(datasets, target)
            check_learnable(" and ".join(stage.data), join_datasets(datasets), stage.config)
        except ArtifactError as error:
            raise ArtifactError(f"{where}: {error}") from None
        except InputError as error:
            raise InputError(f"{where}: {error}") from None


def check_learnable(name: str, data: TrainingData, config: Config) -> None:
    """Raise InputError when the data offers the towers nothing to learn from."""
    ShiftedWindows(data.histories, config.model.max_history_items, config.train)  # raises where none has two events
    if not config.model.content_width:
        return
    wanted = config.model.modalities
    text = wanted != "image" and any(data.items.text(row) for row in range(len(data.items)))
    if not text and (wanted == "text" or not data.items.with_image.any()):
        raise InputError(
            f"{name}: no item has {'a picture' if wanted == 'image' else 'a text or a picture'} for the towers "
            "to read; give pixrec prepare an items table"
        )


def _check_alone(datasets: list[Dataset], target: Dataset) -> None:
    """No set twice, and none that gives away what `target` holds out."""
    seen: dict[Any, str] = {}
    for dataset in datasets:
        fingerprint = dataset.info.get("fingerprint")
        if fingerprint is not None and fingerprint in seen:
            raise InputError(f"{dataset.uri} and {seen[fingerprint]} are the same data set; name it once")
        seen[fingerprint] = dataset.uri
        if fingerprint != target.info.get("fingerprint") and (leaks := count_leaks(target, dataset)):
            raise InputError(
                f"{leaks} training events of {dataset.uri} are validation or test events of {target.uri}; leave it "
                "out, or prepare both with splits that agree"
            )


def _check_tokens_place(stage: Stage, target: Dataset) -> None:
    place = stage.config.train.picture_tokens
    elsewhere = set(stage.data) != {storage.absolute(target.uri)}
    if stage.config.model.freeze_vision and elsewhere and place not in ("auto", None):
        raise ConfigError(
            f"train.picture_tokens {place!r} keeps the pictures of one data set, and train.stages {stage.name} has "
            "others; set it to auto"
        )


def _fingerprint(uri: str) -> Any:
    return storage.read_json(storage.join(uri, DATASET_MARKER)).get("fingerprint")
