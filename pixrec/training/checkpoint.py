"""Checkpoints of a training: a model, and beside it what training goes on from. No Ray.

A checkpoint holds a whole model. Under FSDP2 it holds shards, which every worker writes of its own: safetensors by
torch.distributed.checkpoint (whose other formats are pickles), which any number of workers reads again, each the parts
that it has. `make_whole` makes a whole model of it, whose weights are mapped from files meanwhile and not in memory.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from pixrec import storage
from pixrec.artifact import (
    DESCRIPTION,
    MODEL_MARKER,
    Model,
    describe_model,
    described_model,
    give_weights,
    own_names,
    save_model,
)
from pixrec.model.parallel import empty_state
from pixrec.training.interleaved import InterleavedTrainer
from pixrec.training.trainer import Trainer

_OPTIMIZER, _STATE, _SHARDS = "optimizer.safetensors", "state.json", "shards"
_WEIGHT, _TRAINING = "model/", "training/"


def save_checkpoint(trainer: Trainer[Any], model: Model, figures: dict[str, float]) -> str | None:
    """Write a local folder, the caller's to remove, on the first worker; None on the others. All have to call it.

    Where weights are sharded every worker writes one; put together they are the checkpoint.
    """
    if trainer.rank != 0 and not trainer.in_shards:
        return None
    folder = tempfile.mkdtemp(prefix="pixrec-")
    facts = {**trainer.position(), "metrics": figures}
    if trainer.in_shards:
        writer = HuggingFaceStorageWriter(os.path.join(folder, _SHARDS), save_distributed=True)
        with _quietly():
            dcp.save(_shards(trainer, model), storage_writer=writer, no_dist=trainer.world_size == 1)
        if trainer.rank != 0:
            return folder
        describe_model(folder, model, facts)
    else:
        save_model(folder, model, facts)
        safetensors.torch.save_file(trainer.training_tensors(), Path(folder) / _OPTIMIZER)
    state = {**trainer.position(), "best": trainer.watch.best, "since": trainer.watch.since}
    (Path(folder) / _STATE).write_text(json.dumps(state))
    return folder


def restore(trainer: Trainer[Any], model: Model, folder: str) -> None:
    """Continue where the checkpoint of a local folder was made; unless it holds shards, the model of the trainer has
    its weights already."""
    state = json.loads((Path(folder) / _STATE).read_text())
    trainer.watch.best, trainer.watch.since = state["best"], state["since"]
    if not holds_shards(folder):
        trainer.restore(state, safetensors.torch.load_file(Path(folder) / _OPTIMIZER))
        return
    reader = HuggingFaceStorageReader(os.path.join(folder, _SHARDS))
    stored = reader.read_metadata().state_dict_metadata
    found = empty_state(trainer.masters.named, {key.removeprefix(_TRAINING) for key in stored})
    wanted = {key: tensor for key, tensor in _shards(trainer, model).items() if key.startswith(_WEIGHT)}
    wanted |= {_TRAINING + key: tensor for key, tensor in found.items()}
    with _quietly():
        dcp.load(wanted, storage_reader=reader, no_dist=trainer.world_size == 1)
    trainer.restore(state, found)


def holds_shards(folder: str) -> bool:
    """Whether the weights of a checkpoint are spread over files as they were over workers."""
    return bool(storage.list_files(storage.join(folder, _SHARDS)))


def make_whole(checkpoint: str) -> None:
    """Give a checkpoint of shards a whole model beside them, so that it is a model's folder like any other; one that
    is whole stays as it is."""
    if storage.exists(storage.join(checkpoint, MODEL_MARKER)):
        return
    with storage.local_folder(checkpoint) as folder, tempfile.TemporaryDirectory(dir=folder) as mapped:
        reader = HuggingFaceStorageReader(os.path.join(folder, _SHARDS))
        model = described_model(folder)
        stored = cast(dict[str, TensorStorageMetadata], reader.read_metadata().state_dict_metadata)
        weights = {name: _mapped(mapped, i, stored[_WEIGHT + name]) for i, name in enumerate(own_names(model))}
        with _quietly():
            dcp.load({_WEIGHT + name: tensor for name, tensor in weights.items()}, storage_reader=reader, no_dist=True)
        give_weights(model, weights)
        made = os.path.join(mapped, "model")
        _copy_model(made, checkpoint, save_model(made, model, model.info))


def publish(checkpoint: str, target: str, facts: dict[str, Any]) -> None:
    """Copy a checkpoint's model to `target` without what training goes on from, with more `facts` in model.json."""
    _copy_model(checkpoint, target, {**storage.read_json(storage.join(checkpoint, MODEL_MARKER)), **facts})


def _copy_model(source: str, target: str, info: dict[str, Any]) -> None:
    """Copy the files of a model; model.json, written last, holds `info`."""
    for file in storage.list_files(source):
        relative = file[len(source.rstrip("/")) + 1 :]
        if relative not in (_OPTIMIZER, _STATE, DESCRIPTION, MODEL_MARKER) and not relative.startswith(f"{_SHARDS}/"):
            storage.copy_file(file, storage.join(target, relative))
    storage.write_json(storage.join(target, MODEL_MARKER), info)


def _mapped(folder: str, number: int, stored: TensorStorageMetadata) -> Tensor:
    """A tensor that is a file, to be filled and read a piece at a time."""
    file, count = os.path.join(folder, f"{number}.weights"), math.prod(stored.size)
    return torch.from_file(file, shared=True, size=count, dtype=stored.properties.dtype).view(stored.size)


def _shards(trainer: Trainer[Any], model: Model) -> dict[str, Tensor]:
    """This worker's part of what a checkpoint holds."""
    assert isinstance(trainer, InterleavedTrainer)
    state = trainer.state()
    weights = {_WEIGHT + name: state[name] for name in own_names(model)}
    return weights | {_TRAINING + key: tensor for key, tensor in trainer.training_tensors().items()}


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without the warning of torch.distributed.checkpoint that there is one process, which is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield
