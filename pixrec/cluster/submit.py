"""A command as a job of a Ray cluster, under a name: who submits the same name again joins the job that runs.

A job that was lost with its node is begun again, and the command goes on from where it was. Knows no step of any
command.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shlex
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Protocol

from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from pixrec.config import JobConfig
from pixrec.console import Console
from pixrec.errors import ConfigError, InputError, PixRecError

_GIB = 1024**3
_AT_FAULT = PixRecError.exit_code
"""The exit code of a command whose input or arguments are at fault: it would end alike again."""
_LAST_CHARACTERS = 100_000


class JobServer(Protocol):
    """What submitting asks of a cluster's job server."""

    def list_jobs(self) -> list[JobDetails]: ...
    @property
    def submit_job(self) -> Callable[..., str]: ...
    def delete_job(self, job_id: str) -> bool: ...
    def get_job_info(self, job_id: str) -> JobDetails: ...
    def tail_job_logs(self, job_id: str) -> AsyncIterator[str]: ...


def submit(
    name: str,
    command: Sequence[str],
    settings: JobConfig,
    console: Console,
    *,
    server: JobServer | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, Any]:
    """Run `pixrec` with the arguments `command` as the job `name`, and write its log to stderr; returns what its last
    line sums up.

    A job of that name that runs is joined, one that has ended well is not run again. Raises InputError where the
    command says that its input is at fault, where the cluster does not answer, or where the job ends otherwise
    `job.attempts` times.
    """
    command = [*command][command[:1] == ["--"] :]
    if not command:
        raise InputError(f"--name {name}: no command; give it behind --, as in -- pipeline --out s3://...")
    server = server or _server(settings)
    for attempt in range(1, settings.attempts + 1):
        found = _find(server, name)
        if found is None or found.status in (JobStatus.FAILED, JobStatus.STOPPED):
            _begin(server, name, command, settings, begun_before=found is not None)
            console.say(f"job {name}: begun")
        else:
            console.say(f"job {name}: {'done before' if found.status.is_terminal() else 'runs already, joined'}")
        ended, said = _follow(server, name, settings, sleep)
        if ended.status == JobStatus.SUCCEEDED:
            return _summary(name, said)
        last = said.rstrip().rpartition("\n")[2]
        if ended.driver_exit_code == _AT_FAULT:
            raise InputError(f"job {name}: {last}")
        why = " ".join(str(ended.message).split())[:300]
        console.say(f"job {name} ended {ended.status} ({why}), attempt {attempt} of {settings.attempts}")
    raise InputError(f"job {name} ended {ended.status} {settings.attempts} times (job.attempts), last: {why or last}")


def _server(settings: JobConfig) -> JobServer:
    address = os.environ.get("RAY_API_SERVER_ADDRESS") or settings.address
    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"job.address {address}: no job server answers ({reason}); forward it, or set it") from None


def _find(server: JobServer, name: str) -> JobDetails | None:
    return next((job for job in server.list_jobs() if job.submission_id == name), None)


def _begin(server: JobServer, name: str, command: Sequence[str], settings: JobConfig, *, begun_before: bool) -> None:
    if begun_before:
        server.delete_job(name)  # only an ended one can be deleted, and only then is its name free
    runtime_env: dict[str, Any] = {"env_vars": {key: os.environ[key] for key in settings.env if key in os.environ}}
    if settings.working_dir is not None:
        if not os.path.isdir(settings.working_dir):
            raise ConfigError(f"job.working_dir {settings.working_dir} is no folder")
        runtime_env |= {"working_dir": settings.working_dir, "excludes": [".git", ".venv", "demo-out", "out"]}
    try:
        server.submit_job(
            entrypoint=shlex.join(["pixrec", *command]),
            submission_id=name,
            runtime_env=runtime_env,
            entrypoint_num_cpus=settings.cpus or None,
            entrypoint_memory=(settings.cpus and round(settings.memory_gib * _GIB)) or None,
        )
    except RuntimeError:
        if _find(server, name) is None:  # else somebody else was faster: joined
            raise


def _follow(
    server: JobServer, name: str, settings: JobConfig, sleep: Callable[[float], None]
) -> tuple[JobDetails, str]:
    """The job when it has ended, and the end of its log, which goes to stderr meanwhile."""
    shown, said = 0, ""

    async def tail() -> None:
        nonlocal shown, said
        seen = 0
        async for text in server.tail_job_logs(name):  # from the beginning, each time
            new, seen = text[max(0, shown - seen) :], seen + len(text)
            if new:
                print(new, end="", file=sys.stderr, flush=True)
                shown, said = seen, (said + new)[-_LAST_CHARACTERS:]

    while True:
        with contextlib.suppress(RuntimeError):  # the connection was lost, or the log is not there yet
            asyncio.run(tail())
        info = server.get_job_info(name)
        if info.status.is_terminal():
            return info, said
        sleep(settings.poll_seconds)


def _summary(name: str, said: str) -> dict[str, Any]:
    """The last JSON object of a log: stdout and stderr are one there."""
    for line in reversed(said.splitlines()):
        if line.startswith("{"):
            return {"job": name, **json.loads(line)}
    raise RuntimeError(f"job {name} ended without its summary")
