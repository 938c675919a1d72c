"""Training processes under Ray Train: starting them, their news to the driver, their checkpoints.

With `train.num_workers` 0 the driver itself trains (Ray Train's local mode), which keeps no checkpoint of its own: the
work folder then has the latest and the best one in `here/`.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import ray
import ray.autoscaler.sdk
import ray.train
import ray.train.torch
from ray.train import (
    Checkpoint,
    CheckpointConfig,
    CheckpointConsistencyMode,
    CheckpointUploadMode,
    FailureConfig,
    RunConfig,
    ScalingConfig,
)

from pixrec import storage
from pixrec.cluster.progress import listening
from pixrec.config import TrainConfig
from pixrec.errors import InputError

_DONE, _DIVERGED, _HERE, _KEPT = "done.json", "diverged.json", "here", "kept.json"
_MAIL_SECONDS = 1.0
_LOOK_SECONDS = 5.0

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
    await_gpus(settings)
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
        if settings.num_workers == 0:
            best_uri = _kept_here(work)["best"]
        else:
            best = result.get_best_checkpoint("score", "max")
            if best is None:
                raise RuntimeError("training ended without a checkpoint")
            best_uri = f"s3://{best.path}" if remote else best.path
        storage.write_json(done, {"best": best_uri})  # also where `on_row` fails: that is raised behind this block
    return best_uri


def _nodes() -> int:
    return sum(node["Alive"] for node in ray.nodes())


class Cluster(NamedTuple):
    """What waiting for GPUs asks of a cluster and of a clock."""

    resources: Callable[[], dict[str, float]] = lambda: ray.cluster_resources()
    nodes: Callable[[], int] = _nodes
    request: Callable[[list[dict[str, float]]], None] = lambda bundles: ray.autoscaler.sdk.request_resources(
        bundles=bundles
    )
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True)
    sleep: Callable[[float], None] = time.sleep
    now: Callable[[], float] = time.monotonic


def await_gpus(settings: TrainConfig, cluster: Cluster | None = None) -> None:
    """Return when the cluster has as many GPUs as the workers need. Where it has too few, says so at once, asks an
    autoscaler for them, and raises InputError after `train.gpu_wait_seconds`."""
    cluster, wanted = cluster or Cluster(), settings.num_workers if settings.use_gpu else 0
    began = cluster.now()

    def lacks() -> str:
        found = cluster.resources()
        if found.get("GPU", 0) >= wanted:
            return ""
        nodes, cpus = cluster.nodes(), found.get("CPU", 0)
        return (
            f"train.num_workers {settings.num_workers} with train.use_gpu needs {wanted} GPUs, and the cluster has "
            f"{found.get('GPU', 0):g} ({nodes} nodes, {cpus:g} CPUs)"
        )

    if not (lack := lacks()):
        return
    cluster.say(
        f"{lack}; waiting up to {settings.gpu_wait_seconds:g} s (train.gpu_wait_seconds), as an autoscaler may still "
        "be adding nodes"
    )
    try:
        cluster.request([{"CPU": settings.cpus_per_worker, "GPU": 1.0}] * wanted)
        while lack:
            if cluster.now() - began >= settings.gpu_wait_seconds:
                raise InputError(f"{lack}; add GPU nodes, lower train.num_workers, or set train.use_gpu to false")
            cluster.sleep(min(_LOOK_SECONDS, settings.gpu_wait_seconds))
            lack = lacks()
    finally:
        cluster.request([])


class Checkpoints:
    """A worker's checkpoints on their way to the work folder, at most one at a time: a worker that dies loses no more
    than what came after the last but one."""

    def __init__(self, work: str, num_workers: int) -> None:
        self._work, self._here = work, num_workers == 0
        self._reported = False

    @contextlib.contextmanager
    def latest(self) -> Iterator[str | None]:
        """A local folder with what to go on from."""
        if self._here:
            kept = _kept_here(self._work)
            with storage.local_folder(kept["latest"]) if kept else contextlib.nullcontext() as folder:
                yield folder
            return
        checkpoint = ray.train.get_checkpoint()
        with checkpoint.as_directory() if checkpoint else contextlib.nullcontext() as folder:
            yield folder

    def add(self, folder: str | None, score: float, step: int) -> None:
        """Hand on a local folder, which is removed then. All workers call it, also those that wrote none."""
        if self._here:
            assert folder is not None
            _keep_here(self._work, folder, score, step)
            return
        if self._reported:
            ray.train.get_all_reported_checkpoints(CheckpointConsistencyMode.COMMITTED)
        ray.train.report(
            {"score": score, "step": step},
            checkpoint=None if folder is None else Checkpoint.from_directory(folder),
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,  # which removes the folder afterwards
        )
        self._reported = True


def _kept_here(work: str) -> dict[str, Any]:
    """`latest`, `best` and its `score`; nothing where there is no checkpoint yet."""
    kept = storage.join(work, _HERE, _KEPT)
    return storage.read_json(kept) if storage.exists(kept) else {}


def _keep_here(work: str, folder: str, score: float, step: int) -> None:
    kept, target = _kept_here(work), storage.join(work, _HERE, f"step-{step}")
    storage.remove(target)
    storage.copy_folder(folder, target)
    shutil.rmtree(folder)
    is_best = not kept or score > kept["score"]
    now = {"latest": target, "best": target if is_best else kept["best"], "score": score if is_best else kept["score"]}
    storage.write_json(storage.join(work, _HERE, _KEPT), now)
    for old in {kept.get("latest"), kept.get("best")} - {None, now["latest"], now["best"]}:
        storage.remove(str(old))


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
