from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import fsspec
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pixrec.errors import ConfigError
from pixrec.training.tracking import TrainingLog, read_log


def loss(step: int, value: float = 1.0, part: str = "both") -> dict[str, Any]:
    return {"part": part, "step": step, "total_steps": 4, "loss": value}


def valid(step: int, value: float = 0.5, part: str = "both") -> dict[str, Any]:
    return {"part": part, "step": step, "total_steps": 4, "valid_recall@10": value}


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_rows_for_the_report_and_events_for_those_who_watch(tmp_path: Path):
    rows = [loss(1, 2.0), loss(2, 1.5), valid(2), loss(1, 3.0, part="text"), valid(1, 0.25, part="text")]
    log = TrainingLog(str(tmp_path / "work"))
    for row in rows:
        log.add(row)
    log.save(str(tmp_path / "model"))
    log.close()
    assert read_log(str(tmp_path / "model")) == rows
    events = tmp_path / "model" / "tensorboard"
    assert sorted(path.name for path in events.iterdir()) == ["both", "text"]
    assert scalars(events / "both", "loss") == [(1, 2.0), (2, 1.5)]
    assert scalars(events / "both", "valid_recall@10") == [(2, 0.5)]
    assert scalars(events / "text", "loss") == [(1, 3.0)]


def test_a_validation_brings_the_rows_to_disk(tmp_path: Path):
    log = TrainingLog(str(tmp_path))
    log.add(loss(1))
    assert read_log(str(tmp_path)) == []
    log.add(valid(1))
    assert read_log(str(tmp_path)) == [loss(1), valid(1)]
    log.close()


def test_a_resumed_run_continues_the_log_and_says_a_step_once(tmp_path: Path):
    first = TrainingLog(str(tmp_path))
    for row in (loss(1, 2.0), valid(1), loss(2, 1.5), valid(2)):
        first.add(row)
    first.close()
    resumed = TrainingLog(str(tmp_path))
    assert resumed.rows == [loss(1, 2.0), valid(1), loss(2, 1.5), valid(2)]
    for row in (loss(2, 1.25), loss(3, 1.0), valid(3, 0.75)):  # step 2 again: the checkpoint was of step 1
        resumed.add(row)
    resumed.close()
    kept = read_log(str(tmp_path))
    assert [(row["step"], row["loss"]) for row in kept if "loss" in row] == [(1, 2.0), (2, 1.25), (3, 1.0)]
    assert [row["step"] for row in kept if "loss" not in row] == [1, 2, 3]


def test_on_a_remote_place_the_events_wait_in_a_local_folder(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pixrec.storage.places._REMOTE", ("memory://",))
    log = TrainingLog("memory://bucket/work")
    log.add(loss(1))
    log.add(valid(1))
    log.save("memory://bucket/model")
    local = Path(log._events)
    assert local.is_dir()
    log.close()
    assert not local.exists()
    assert read_log("memory://bucket/work") == read_log("memory://bucket/model") == [loss(1), valid(1)]
    folders = fsspec.filesystem("memory").ls("/bucket/model/tensorboard", detail=False)
    assert folders == ["/bucket/model/tensorboard/both"]


def test_no_log(tmp_path: Path):
    assert read_log(str(tmp_path)) == []


class Service:
    """What mlflow and wandb offer, as far as it is used."""

    def __init__(self) -> None:
        self.said: list[Any] = []

    def start_run(self, run_name: str) -> None:
        self.said.append(run_name)

    def log_metrics(self, figures: dict[str, float], step: int) -> None:
        self.said.append((figures, step))

    def end_run(self) -> None:
        self.said.append("end")

    def init(self, project: str, name: str) -> Service:
        self.said.append(f"{project}/{name}")
        return self

    def log(self, figures: dict[str, float]) -> None:
        self.said.append(figures)

    def finish(self) -> None:
        self.said.append("end")


def test_trackers_get_every_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    mlflow, wandb = Service(), Service()
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    log = TrainingLog(str(tmp_path), ("mlflow", "wandb"), "shop")
    log.add(loss(1, 2.0))
    log.add(valid(1))
    log.close()
    assert mlflow.said == ["shop", ({"both/loss": 2.0}, 1), ({"both/valid_recall_at_10": 0.5}, 1), "end"]
    figures = [{"both/loss": 2.0, "step": 1}, {"both/valid_recall@10": 0.5, "step": 1}]
    assert wandb.said == ["pixrec/shop", *figures, "end"]


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_tracker_that_is_not_installed_is_said_with_its_extra(tmp_path: Path, monkeypatch, name: str):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=rf"{name}.*pip install 'pixrec\[{name}\]'"):
        TrainingLog(str(tmp_path), (name,))
