"""Processes that tests start or disturb: ranks, workers that die on the way, those that must have ended."""

from __future__ import annotations

import importlib
import os
import select
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

LIBRARY = [
    "pixrec.training.interleaved",
    "pixrec.training.joint",
    "pixrec.artifact.model",
    "pixrec.recommender",
    "pixrec.evaluation.protocol",
    "pixrec.cli",
]
MODEL_CODE = ["transformers.models.smolvlm.modeling_smolvlm"]
"""Of `pixrec-tiny`: loaded where a model is built."""
Ranked = tuple[int, Callable[[str], None]]


def run_ranks(folder: str, *jobs: Ranked, backend: str = "gloo") -> None:
    """Every `(size, work)` in its turn: `work(folder)` on as many ranks; the processes are the same. With nccl each has
    a GPU of its own; a test is skipped where there are too few.

    They are forked from one that has imported the library: a process that imports it takes 6 s of CPU time.
    """
    most = max(size for size, _ in jobs)
    if backend == "nccl" and torch.cuda.device_count() < most:
        pytest.skip(f"nccl on {most} ranks needs {most} GPUs, and there are {torch.cuda.device_count()}")
    mp.set_forkserver_preload([*LIBRARY, *MODEL_CODE])
    mp.start_processes(_rank, (folder, jobs, backend), most, start_method="forkserver")


def rank_device() -> str:
    """Where a rank computes: on its GPU under nccl, else on the CPU, as a process without others."""
    on_gpu = dist.is_initialized() and dist.get_backend() == "nccl"
    return f"cuda:{dist.get_rank()}" if on_gpu else "cpu"


def _rank(rank: int, folder: str, jobs: Sequence[Ranked], backend: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    for number, (size, work) in enumerate(jobs):
        if rank < size:
            dist.init_process_group(backend, f"file://{folder}/meeting-{number}", rank=rank, world_size=size)
            try:
                work(folder)
            finally:
                dist.destroy_process_group()


def disturbed(
    module: ModuleType, trainer: str, method: str, disturb: Callable[[Any], None]
) -> Callable[[dict[str, Any]], None]:
    """The `_worker` of `module` with `disturb(trainer)` before every call of a method of the class `trainer` of
    `pixrec.training.phases`.

    For Ray Train: it reaches the processes whole, and changes the class there alone.
    """
    place = module.__name__

    def work(job: dict[str, Any]) -> None:
        phases = importlib.import_module("pixrec.training.phases")
        plain = getattr(phases, trainer)

        def disturbed_method(self: Any, *args: Any) -> Any:
            disturb(self)
            return getattr(plain, method)(self, *args)

        setattr(phases, trainer, type(trainer, (plain,), {method: disturbed_method}))
        importlib.import_module(place)._worker(job)

    return work


def die_once(note: Path) -> None:
    """End this process as a lost machine would, while the file `note` is there."""
    if note.exists():
        note.unlink()
        os.kill(os.getpid(), signal.SIGKILL)


def wait_for_the_end_of(name: str, seconds: float = 60) -> None:
    """Return when no process below this one has `name` in its command line."""
    while found := _processes(name):
        try:
            process = os.pidfd_open(found[0])
        except ProcessLookupError:
            continue
        ended = select.select([process], [], [], seconds)[0]
        os.close(process)
        assert ended, f"{name}, process {found[0]}, goes on"


def _processes(name: str) -> list[int]:
    parents: dict[int, int] = {}
    found = []
    for entry in Path("/proc").iterdir():
        try:
            state, parent = (entry / "stat").read_text().rsplit(")", 1)[1].split()[:2]
            parents[int(entry.name)] = int(parent)
            if state != "Z" and name in (entry / "cmdline").read_text():
                found.append(int(entry.name))
        except (ValueError, OSError):
            continue

    def is_ours(process: int) -> bool:
        return process == os.getpid() or (process in parents and is_ours(parents[process]))

    return [process for process in found if is_ours(process)]
