"""Every verb has a job, and a job is its verb: the command line with one word filled in."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

JOBS = Path(__file__).parents[2] / "jobs"


def test_there_is_a_job_for_each_verb() -> None:
    verbs = {"prepare", "train", "embed", "evaluate", "recommend", "demo", "pipeline"}
    assert {p.stem for p in JOBS.glob("*.py")} == verbs


@pytest.mark.parametrize("job", sorted(JOBS.glob("*.py")), ids=lambda job: job.stem)
def test_a_job_runs_its_verb_and_exits_with_its_code(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []

    def main(argv: list[str]) -> int:
        ran.append(argv)
        return 2

    monkeypatch.setattr("pixrec.cli.main", main)
    monkeypatch.setattr(sys, "argv", [str(job), "--out", "somewhere"])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(job), run_name="__main__")
    assert exit_.value.code == 2
    assert ran == [[job.stem, "--out", "somewhere"]]
    assert len(job.read_text().splitlines()) <= 12  # parse, one call, one JSON line


@pytest.mark.parametrize("job", sorted(JOBS.glob("*.py")), ids=lambda job: job.stem)
def test_importing_a_job_runs_nothing(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pixrec.cli.main", lambda argv: pytest.fail("it ran"))
    runpy.run_path(str(job), run_name="job")
