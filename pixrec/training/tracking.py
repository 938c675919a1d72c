"""The log of a training run: rows for the report, TensorBoard events for those who watch, MLflow and Weights & Biases
for those who ask. No Ray."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch.utils.tensorboard import SummaryWriter

from pixrec import storage
from pixrec.errors import ConfigError

_ROWS, _EVENTS = "training.jsonl", "tensorboard"
_NOT_FIGURES = ("part", "step", "total_steps")


class TrainingLog:
    """Rows of all parts of a run, kept below `folder`; continues what an interrupted run left there.

    A row is a dict with `part`, `step` and figures. On s3:// the events are kept locally until `save`. `trackers` get
    the figures too, in a run named `name`.
    """

    def __init__(self, folder: str, trackers: Sequence[str] = (), name: str = "pixrec") -> None:
        self._trackers = [open_tracker(tracker, name) for tracker in trackers]
        self._folder = folder
        self._remote = storage.is_remote(folder)
        self._events = tempfile.mkdtemp(prefix="pixrec-") if self._remote else storage.join(folder, _EVENTS)
        self._writers: dict[str, SummaryWriter] = {}
        self.rows = read_log(folder)

    def add(self, row: dict[str, Any]) -> None:
        """Take a row; validation rows also bring what was logged so far to `folder`."""
        self.rows.append(row)
        part = row["part"]
        if part not in self._writers:
            self._writers[part] = SummaryWriter(f"{self._events}/{part}", flush_secs=5)
        for name, value in row.items():
            if name not in _NOT_FIGURES:
                self._writers[part].add_scalar(name, value, row["step"])
        figures = {f"{part}/{n}": v for n, v in row.items() if n not in _NOT_FIGURES}
        for tracker in self._trackers:
            tracker.log(figures, row["step"])
        if any(name.startswith("valid_") for name in row):
            self.save(self._folder)

    def save(self, folder: str) -> None:
        """Write the rows, and the events where they are not there already, below `folder`."""
        # A resumed part logs the steps after its checkpoint again; the later row of a step counts.
        latest = {(row["part"], row["step"], "loss" in row): row for row in self.rows}
        lines = "".join(json.dumps(row) + "\n" for row in latest.values())
        storage.write_bytes(storage.join(folder, _ROWS), lines.encode())
        for writer in self._writers.values():
            writer.flush()
        target = storage.join(folder, _EVENTS)
        if target != self._events and storage.exists(self._events):
            storage.copy_folder(self._events, target)

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()
        for tracker in self._trackers:
            tracker.close()
        if self._remote:
            storage.remove(self._events)


class Tracker(Protocol):
    """A service that keeps figures."""

    def log(self, figures: dict[str, float], step: int) -> None: ...

    def close(self) -> None: ...


def open_tracker(name: str, run: str) -> Tracker:
    """Begin a run with `mlflow` or `wandb`. Raises ConfigError where the package is not installed."""
    if name not in _TRACKERS:
        raise ConfigError(f"train.trackers names {name!r}; known: {', '.join(_TRACKERS)}")
    try:
        return _TRACKERS[name](run)
    except ImportError:
        raise ConfigError(
            f"train.trackers names {name!r}, which is not installed; pip install 'pixrec[{name}]'"
        ) from None


class _MLflow:
    def __init__(self, run: str) -> None:
        import mlflow

        self._mlflow = mlflow
        mlflow.start_run(run_name=run)

    def log(self, figures: dict[str, float], step: int) -> None:
        # MLflow takes no @ in a name.
        self._mlflow.log_metrics({name.replace("@", "_at_"): value for name, value in figures.items()}, step=step)

    def close(self) -> None:
        self._mlflow.end_run()


class _WandB:
    def __init__(self, run: str) -> None:
        import wandb

        self._run = wandb.init(project="pixrec", name=run)

    def log(self, figures: dict[str, float], step: int) -> None:
        # The parts of a run count their steps each from 1, and W&B's own step may not go back.
        self._run.log({**figures, "step": step})

    def close(self) -> None:
        self._run.finish()


_TRACKERS: dict[str, Callable[[str], Tracker]] = {"mlflow": _MLflow, "wandb": _WandB}


def read_log(folder: str) -> list[dict[str, Any]]:
    """The rows kept below `folder`, none when there is no log."""
    file = storage.join(folder, _ROWS)
    return [json.loads(line) for line in storage.read_text(file).splitlines()] if storage.exists(file) else []
