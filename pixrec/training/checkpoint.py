"""Checkpoints of a training: a whole model, and beside it what training goes on from. No Ray."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import safetensors.torch

from pixrec import storage
from pixrec.artifact import MODEL_MARKER, Model, save_model
from pixrec.training.interleaved import InterleavedTrainer
from pixrec.training.trainer import Trainer

_OPTIMIZER, _STATE = "optimizer.safetensors", "state.json"


def save_checkpoint(trainer: Trainer[Any], model: Model, figures: dict[str, float]) -> str | None:
    """Write a local folder, the caller's to remove, on the first worker; None on the others. All have to call it."""
    tensors = trainer.training_tensors()
    if isinstance(trainer, InterleavedTrainer) and trainer.sharded:  # `model` is a whole copy
        model.tower.load_state_dict(trainer.whole_state())
    if trainer.rank != 0:
        return None
    folder = tempfile.mkdtemp(prefix="pixrec-")
    save_model(folder, model, {**trainer.position(), "metrics": figures})
    safetensors.torch.save_file(tensors, Path(folder) / _OPTIMIZER)
    state = {**trainer.position(), "best": trainer.watch.best, "since": trainer.watch.since}
    (Path(folder) / _STATE).write_text(json.dumps(state))
    return folder


def restore(trainer: Trainer[Any], folder: str) -> None:
    """Continue where the checkpoint of a local folder was made; the trainer's model has its weights already."""
    state = json.loads((Path(folder) / _STATE).read_text())
    trainer.watch.best, trainer.watch.since = state["best"], state["since"]
    trainer.restore(state, safetensors.torch.load_file(Path(folder) / _OPTIMIZER, str(trainer.device)))


def publish(checkpoint: str, target: str, facts: dict[str, Any]) -> None:
    """Copy a checkpoint's model to `target` without what training goes on from, with more `facts` in model.json."""
    for file in storage.list_files(checkpoint):
        relative = file[len(checkpoint.rstrip("/")) + 1 :]
        if relative not in (_OPTIMIZER, _STATE, MODEL_MARKER):
            storage.write_bytes(storage.join(target, relative), storage.read_bytes(file))
    info = storage.read_json(storage.join(checkpoint, MODEL_MARKER))
    storage.write_json(storage.join(target, MODEL_MARKER), {**info, **facts})
