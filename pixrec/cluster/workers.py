"""Training processes under Ray Train: starting them, their news to the driver, the checkpoint that was best."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import ray
import ray.train
import ray.train.torch
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig

from pixrec import storage
from pixrec.cluster.progress import listening
from pixrec.config import TrainConfig
from pixrec.errors import InputError

_DONE, _DIVERGED = "done.json", "diverged.json"
_MAIL_SECONDS = 1.0

OnRow = Callable[[dict[str, Any]], None]


def run_workers(
    worker: Callable[[dict[str, Any]], None], job: dict[str, Any], work: str, settings: TrainConfig, on_row: OnRow
) -> str:
    """Run `worker(job)` in every training process; returns the URI of the checkpoint with the best `score`.

    `work` keeps the checkpoints; a run that is done already is not done again. `job` gets `work`, for `end_diverged`,
    and a `mailbox` for a NewsLog, whose rows reach `on_row`. Raises InputError where the workers ended diverged.
    """
    done = storage.join(work, _DONE)
    if storage.exists(done):
        return str(storage.read_json(done)["best"])
    diverged = storage.join(work, _DIVERGED)
    storage.remove(diverged)
    filesystem, path = storage.arrow_location(work)
    remote = storage.is_remote(work)
    with listening(on_row) as mailbox:
        trainer = ray.train.torch.TorchTrainer(
            _fetched,
            train_loop_config={"worker": ray.put(worker), "job": {**job, "work": work, "mailbox": mailbox}},
            scaling_config=ScalingConfig(
                num_workers=_num_workers(settings),  # type: ignore[arg-type]
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
        if storage.exists(diverged):
            raise InputError(str(storage.read_json(diverged)["message"]))
        best = result.get_best_checkpoint("score", "max")
        if best is None:
            raise RuntimeError("training ended without a checkpoint")
        best_uri = f"s3://{best.path}" if remote else best.path
        storage.write_json(done, {"best": best_uri})  # also where `on_row` fails: that is raised behind this block
    return best_uri


def _fetched(config: dict[str, Any]) -> None:
    """The worker, met in its own process alone: Ray Train's controller, which starts before any worker, need not import
    what that imports, for seconds."""
    ray.get(config["worker"])(config["job"])


def end_diverged(work: str, rank: int, message: str, batch: dict[str, Any]) -> None:
    """Keep the batch at which a worker ended, beside the checkpoints, and tell the driver; the worker returns then."""
    place = storage.join(work, f"diverged-batch-{rank}.json")
    storage.write_json(place, batch)
    if rank == 0:
        storage.write_json(storage.join(work, _DIVERGED), {"message": f"{message}; the batch is kept at {place}"})


def _num_workers(settings: TrainConfig) -> int | tuple[int, int]:
    most = settings.max_workers
    return settings.num_workers if most is None else (settings.num_workers, most)


class NewsLog:
    """Rows on their way to the driver, those of steps at most once a second; silent on all workers but the first."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox = mailbox if ray.train.get_context().get_world_rank() == 0 else None
        self._rows: list[dict[str, Any]] = []
        self._sent = self._last = time.monotonic()

    def add(self, row: dict[str, Any]) -> None:
        """Take a row. One of a validation, which has no loss, is there when this returns: the worker may end next."""
        moment, now = time.monotonic(), "loss" not in row
        self._rows.append({**row, "seconds": round(moment - self._last, 4)})
        self._last = moment
        if self._mailbox is not None and (now or moment - self._sent >= _MAIL_SECONDS):
            arrived = self._mailbox.put.remote(self._rows)
            self._rows, self._sent = [], moment
            if now:
                ray.get(arrived)
