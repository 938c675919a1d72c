"""The stages of a training run in their order, and whether their data sets fit. Knows no Ray and no model."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from pixrec import storage
from pixrec.config import Config
from pixrec.data.joined import TrainingData, count_leaks, join_datasets
from pixrec.data.sequences import DATASET_MARKER, Dataset, load_dataset
from pixrec.errors import ArtifactError, ConfigError, InputError
from pixrec.training.interleaved import BatchSource


class Stage(NamedTuple):
    """What is trained on, and how."""

    name: str
    """empty for the last, the training on --data"""
    data: list[str]
    """absolute URIs of its data sets"""
    config: Config
    """the run's, with the stage's own rates and weights"""

    def part(self, part: str) -> str:
        """What the log calls the stage of a `part` (both, text, image)."""
        return f"{part}_{self.name}" if self.name else part

    def folder(self, work: str) -> str:
        """Where below `work`, the part's folder, its checkpoints lie."""
        return storage.join(work, "stages", self.name) if self.name else work


def plan(data: str, config: Config) -> list[Stage]:
    """All stages, the training on `data` last."""
    before = [
        Stage(
            stage.name,
            [storage.absolute(uri) for uri in stage.data or [data]],
            dataclasses.replace(config, train=config.train.of_stage(stage)),
        )
        for stage in config.train.stages
    ]
    return [*before, Stage("", [storage.absolute(data)], config)]


def vocabulary(stages: list[Stage]) -> list[str]:
    """The data sets of all stages, each once, --data first: one tokenizer serves them all."""
    return list(dict.fromkeys(uri for stage in reversed(stages) for uri in stage.data))


def stage_facts(stages: list[Stage]) -> list[dict[str, Any]]:
    """`name` of every stage before the last, and `data` and `data_fingerprints` of its sets."""
    return [
        {"name": s.name, "data": s.data, "data_fingerprints": [_fingerprint(uri) for uri in s.data]}
        for s in stages
        if s.name
    ]


def check_stages(stages: list[Stage], target: Dataset) -> None:
    """Raise where a data set is no prepared one, where a stage has nothing to learn from, or where a set other than
    `target` has held-out events of it among its training events (see `count_leaks` for what is not found)."""
    for stage in stages:
        if not stage.name:
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
    BatchSource(data.histories, config.model.max_history_items, config.train)
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
