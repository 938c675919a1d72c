"""Runs that are disturbed end as the undisturbed run would have: killed workers, errors, --resume."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes import TINY, tiny_dataset, write_prepared

from pixrec import cli
from pixrec.artifact import load_model
from pixrec.cluster import train as module
from pixrec.cluster.train import train
from pixrec.config import dump_config

STEPS, SURVIVED = 8, 1
CONFIG = dataclasses.replace(
    TINY,
    train=dataclasses.replace(
        TINY.train, num_workers=2, epochs=10, max_steps=STEPS, validate_every_steps=2, max_failures=SURVIVED
    ),
)


def sabotaged(notes: Path) -> Callable[[dict[str, Any]], None]:
    """The work of a worker that notes its steps and does what a file `<fault>-<step>-<rank>` of `notes` asks, once.

    `kill` ends the process as a lost machine would, `raise` is an error of its own.
    """

    def work(job: dict[str, Any]) -> None:  # defined in here, so that it reaches the workers whole
        from pixrec.cluster import train
        from pixrec.errors import InputError

        class Saboteur(train.Trainer):
            def train_step(self) -> dict[str, float]:
                with open(notes / f"steps-{self.rank}", "a") as file:
                    file.write(f"{self.step}\n")
                kill, error = (notes / f"{fault}-{self.step}-{self.rank}" for fault in ("kill", "raise"))
                if kill.exists():
                    kill.unlink()
                    os.kill(os.getpid(), signal.SIGKILL)
                if error.exists():
                    error.unlink()
                    raise InputError(f"a fault at step {self.step}")
                return super().train_step()

        train.Trainer = Saboteur
        train._worker(job)

    return work


def figures(folder: Path) -> list[dict[str, Any]]:
    """The training log without what differs from run to run."""
    rows = [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def test_a_disturbed_run_ends_as_the_undisturbed(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    data, out, hidden = tmp_path / "data", tmp_path / "model", tmp_path / ".model.training"
    write_prepared(data, tiny_dataset(num_users=20))
    (tmp_path / "config.yaml").write_text(dump_config(CONFIG))

    def run(*more: str) -> list[str]:
        """The lines on stderr of a run that fails, the summary of one that does not."""
        options = ("--data", str(data), "--out", str(out), "--config", str(tmp_path / "config.yaml"), *more)
        code = cli.main(["train", *options])
        captured = capfd.readouterr()
        assert (code, bool(captured.out)) in ((0, True), (2, False)), captured.err
        return [captured.out] if code == 0 else captured.err.splitlines()

    calm = train(str(data), str(tmp_path / "calm"), CONFIG, resume=False, on_row=lambda row: None)

    # One worker is killed, which the run survives; then all raise, which it does not.
    notes = tmp_path / "notes"
    notes.mkdir()
    for fault in ("kill-5-1", "raise-7-0", "raise-7-1"):
        (notes / fault).touch()
    with monkeypatch.context() as patch:
        patch.setattr(module, "_worker", sabotaged(notes))
        assert run()[-1] == "pixrec train: a fault at step 7"
        assert sorted(os.listdir(notes)) == ["steps-0", "steps-1"], "all faults have struck"
        steps = [int(line) for line in (notes / "steps-1").read_text().split()]
        again = steps[6]
        assert steps == [*range(6), *range(again, STEPS)]
        assert again in (2, 4), "the run went on from a checkpoint"
        assert sorted(os.listdir(tmp_path)) == [".model.training", "calm", "config.yaml", "data", "notes"]

        # The log fails while the last steps are taken: no model yet, but nothing of the training is lost.
        def full(row: dict[str, Any]) -> None:
            raise OSError("disk full")

        with pytest.raises(OSError, match="disk full"):
            train(str(data), str(out), CONFIG, resume=True, on_row=full)
        resumed_at = int((notes / "steps-1").read_text().split()[len(steps)])
        assert resumed_at in (4, 6)
        assert not out.exists()

    assert "differs from the unfinished run's" in run("--resume", "--set", "train.seed=1")[0]
    write_prepared(tmp_path / "other", tiny_dataset(num_users=21))
    assert "is not the data set" in run("--resume", "--data", str(tmp_path / "other"))[0]
    assert hidden.exists()

    summary = json.loads(run("--resume")[0])
    assert not hidden.exists()
    assert summary["fingerprint"] == calm["fingerprint"] == load_model(str(out)).fingerprint
    assert {key: value for key, value in summary.items() if key != "out"} == calm
    assert figures(out) == figures(tmp_path / "calm")
