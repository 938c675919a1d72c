"""Jobs by name, on a stand-in for the job server. The real one is met in test_hosts.py."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from ray.job_submission import JobDetails, JobStatus, JobType

from pixrec.cluster.submit import submit
from pixrec.config import JobConfig
from pixrec.console import Console
from pixrec.errors import ConfigError, InputError

COMMAND = ["--", "pipeline", "--out", "s3://bucket/a b"]
DONE = 'working\n{"out": "s3://bucket"}\n'


class Server:
    """Jobs that end as they are told to: (status, exit code, log) of each attempt in turn."""

    def __init__(self, *ends: tuple[JobStatus, int | None, str], running: bool = False) -> None:
        self.ends, self.submitted, self.jobs = list(ends), list[dict[str, Any]](), dict[str, JobDetails]()
        self.faster: str | None = None
        if running:
            self._add("nightly", JobStatus.RUNNING)

    def _add(self, name: str, status: JobStatus, code: int | None = None, message: str = "") -> None:
        self.jobs[name] = JobDetails(
            type=JobType.SUBMISSION,
            submission_id=name,
            status=status,
            entrypoint="",
            driver_exit_code=code,
            message=message,
        )

    def list_jobs(self) -> list[JobDetails]:
        return list(self.jobs.values())

    def submit_job(self, **job: Any) -> str:
        if self.faster:
            self._add(self.faster, JobStatus.RUNNING)
        if job["submission_id"] in self.jobs:
            raise RuntimeError("Job with submission_id already exists")
        self.submitted.append(job)
        self._add(job["submission_id"], JobStatus.RUNNING)
        return job["submission_id"]

    def delete_job(self, job_id: str) -> bool:
        assert self.jobs[job_id].status.is_terminal()
        del self.jobs[job_id]
        return True

    def get_job_info(self, job_id: str) -> JobDetails:
        return self.jobs[job_id]

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        status, code, log = self.ends.pop(0)
        for line in log.splitlines(keepends=True):
            yield line
        if status == JobStatus.RUNNING:
            raise RuntimeError("WebSocket connection closed unexpectedly")
        self._add(job_id, status, code, f"exit code {code}")


GOOD = (JobStatus.SUCCEEDED, 0, DONE)
LOST = (JobStatus.FAILED, None, "working\n")


def run(server: Server, **settings: Any) -> dict[str, Any]:
    with Console(quiet=True) as console:
        return submit("nightly", COMMAND, JobConfig(**settings), console, server=server, sleep=lambda seconds: None)


def test_a_job_is_submitted_off_the_head_and_sums_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://s3")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    server = Server(GOOD)
    assert run(server) == {"job": "nightly", "out": "s3://bucket"}
    (job,) = server.submitted
    assert job["entrypoint"] == "pixrec pipeline --out 's3://bucket/a b'"
    assert (job["entrypoint_num_cpus"], job["entrypoint_memory"]) == (1.0, 2 * 1024**3)
    assert job["runtime_env"]["env_vars"]["AWS_ENDPOINT_URL"] == "http://s3"
    assert "secret" not in str(job)


def test_a_job_of_the_name_that_runs_is_joined() -> None:
    server = Server(GOOD, running=True)
    assert run(server)["out"] == "s3://bucket"
    assert server.submitted == []


def test_two_who_submit_at_the_same_moment_have_one_job() -> None:
    server = Server(GOOD)
    server.faster = "nightly"
    assert run(server)["out"] == "s3://bucket"
    assert server.submitted == []


def test_a_job_that_was_lost_is_begun_again() -> None:
    server = Server(LOST, LOST, GOOD)
    assert run(server)["out"] == "s3://bucket"
    assert len(server.submitted) == 3
    with pytest.raises(InputError, match=r"job nightly ended FAILED 2 times \(job.attempts\)"):
        run(Server(LOST, LOST), attempts=2)


def test_an_input_at_fault_is_not_tried_again() -> None:
    server = Server((JobStatus.FAILED, 2, "pixrec pipeline: s3://bucket: no such file\n"))
    with pytest.raises(InputError, match=r"^job nightly: pixrec pipeline: s3://bucket: no such file$"):
        run(server)
    assert len(server.submitted) == 1


def test_a_lost_connection_shows_no_line_twice(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(Server((JobStatus.RUNNING, None, "working\n"), GOOD))["out"] == "s3://bucket"
    assert capsys.readouterr().err == DONE


def test_what_cannot_be_submitted_is_told() -> None:
    with pytest.raises(ConfigError, match=r"job\.working_dir nowhere is no folder"):
        run(Server(GOOD), working_dir="nowhere")
    with Console(quiet=True) as console, pytest.raises(InputError, match="no command; give it behind --"):
        submit("nightly", ["--"], JobConfig(), console, server=Server())
